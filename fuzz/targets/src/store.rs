//! Stores that hold what no program of ours wrote.

use std::sync::{Arc, OnceLock};

use anabranch_core::codec::{self, HeaderRecord};
use anabranch_core::header::Header;
use anabranch_core::intent::Intent;
use anabranch_core::query::{self, Query};
use anabranch_core::relay::{ConnId, Input, Relay, RelayConfig};
use anabranch_core::replica::{Edit, Expect, Replica};
use anabranch_core::rows::Rows;
use anabranch_core::store::{Batch, Entry, Keyspace, Store, View};
use anabranch_core::wire::*;
use anabranch_store::MemoryStore;
use serde_json::json;

use crate::{Draw, link, noise_seeds, world};

const KEYSPACES: [Keyspace; 14] = [
    Keyspace::META,
    Keyspace::ENTITY,
    Keyspace::DOC,
    Keyspace::HEADER,
    Keyspace::ROW,
    Keyspace::INDEX,
    Keyspace::OUTBOX,
    Keyspace::CONFLICT,
    Keyspace::REFUSED,
    Keyspace::DEVICE,
    Keyspace::FEED,
    Keyspace::GRANT,
    Keyspace::SCHEMA,
    Keyspace::SPILL,
];

type Content = Vec<(Keyspace, Entry)>;

fn content_of(store: &dyn Store) -> Content {
    let all = KEYSPACES.iter().flat_map(|keyspace| {
        let entries = store.scan(View::Latest, *keyspace, &[], &[], 10_000).unwrap();
        entries.into_iter().map(|entry| (*keyspace, entry))
    });
    all.collect()
}

/// What a device's store holds that has written, received, and been refused something.
fn device_content() -> &'static Content {
    static CONTENT: OnceLock<Content> = OnceLock::new();
    CONTENT.get_or_init(|| {
        let store = Arc::new(MemoryStore::new());
        let mut replica = Replica::open(store.clone(), link::config()).unwrap();
        replica.connect(1, None);
        replica.receive(world::now(0), world::granted(1, false).into()).unwrap();
        let bodies = (2..=3).map(|n| {
            let unit = Unit { entities: world::parts_of(n) };
            FeedBody::Changes { author: [n; 32], unit }
        });
        let mut bodies: Vec<FeedBody> = bodies.collect();
        bodies.insert(0, FeedBody::Changes { author: [1; 32], unit: Unit { entities: world::parts_of(1) } });
        replica.receive(world::now(0), world::feed(1, 1, bodies).into()).unwrap();
        for (id, size) in [("t1", 3), ("t2", 10), ("t3", 70_000)] {
            // A long value is spilled; as a register it takes no time to load.
            let intents = vec![
                Intent::Splice { field: "body".into(), at: 0, delete: 0, insert: id.into() },
                Intent::Set { field: "title".into(), value: json!("x".repeat(size)) },
            ];
            let edit = Edit { key: world::thing(id), intents, based_on: None, expect: Expect::Any };
            replica.write(world::now(5), &[edit], true).unwrap();
        }
        content_of(&*store)
    })
}

fn relay(store: Arc<MemoryStore>) -> Result<Relay, anabranch_core::store::StoreError> {
    let mut config = RelayConfig::default();
    config.cached_entities = 1;
    Relay::open(store, Box::new(world::RoleTokens), config, [7; 16])
}

fn relay_content() -> &'static Content {
    static CONTENT: OnceLock<Content> = OnceLock::new();
    CONTENT.get_or_init(|| {
        let store = Arc::new(MemoryStore::new());
        let mut relay = relay(store.clone()).unwrap();
        speak(&mut relay).unwrap();
        content_of(&*store)
    })
}

/// Everything that a relay is ever asked for.
fn speak(relay: &mut Relay) -> Result<(), anabranch_core::store::StoreError> {
    for number in 1..=3u8 {
        let conn = ConnId(u64::from(number));
        relay.handle(world::now(0), Input::Connected { conn, device: world::device(number) })?;
        let role = if number == 3 { "authority" } else { "writer" };
        let said: [Message; 5] = [
            world::hello().into(),
            world::sign_in(1, Some(role)).into(),
            PushSchema { channel: 1, source: world::SCHEMA.into() }.into(),
            FetchSchema { channel: 1 }.into(),
            world::changes(1, world::parts_of(number)).into(),
        ];
        for message in said {
            relay.handle(world::now(0), Input::Received { conn, bytes: message.encode() })?;
        }
    }
    for number in 1..=3u8 {
        let conn = ConnId(u64::from(number));
        for message in [
            Message::from(world::changes(1, world::parts_of(number))),
            Open { full: true, ..world::open(1, 0) }.into(),
            world::open(1, 3).into(),
        ] {
            relay.handle(world::now(0), Input::Received { conn, bytes: message.encode() })?;
        }
    }
    while relay.poll_output().is_some() {}
    Ok(())
}

/// A store with some of its entries damaged.
fn damaged(content: &Content, draw: &mut Draw<'_>) -> Arc<MemoryStore> {
    let mut content = content.clone();
    for _ in 0..1 + draw.below(3) {
        let at = draw.word() % content.len();
        let donor = content[draw.word() % content.len()].1.clone();
        // Now and then the key, which says as much as the value.
        let damaged = draw.one_in(4);
        let (key, value) = &mut content[at].1;
        let (value, donor) = if damaged { (key, donor.0) } else { (value, donor.1) };
        let place = draw.word() % (value.len() + 1);
        match draw.below(8) {
            0 | 1 => {
                if let Some(byte) = value.get_mut(place) {
                    *byte ^= 1 << draw.below(8);
                }
            }
            2 => {
                if let Some(byte) = value.get_mut(place) {
                    *byte = *draw.of(&[0, 1, 0x7f, 0x80, 0xfb, 0xfc, 0xfd, 0xff]);
                }
            }
            3 => value.truncate(place),
            4 => *value = donor,
            5 => *value = draw.take(24).to_vec(),
            6 => value.insert(place, draw.byte()),
            _ => drop(content.remove(at)),
        }
    }
    let store = MemoryStore::new();
    let mut batch = Batch::new();
    content.into_iter().for_each(|(keyspace, (key, value))| batch.put(keyspace, key, value));
    store.commit(batch).unwrap();
    Arc::new(store)
}

pub(crate) fn run(data: &[u8]) {
    let mut draw = Draw::new(data);
    if draw.one_in(3) {
        let store = damaged(relay_content(), &mut draw);
        if let Ok(mut relay) = relay(store) {
            let _ = relay.workspaces();
            let _ = relay.digest(&world::home());
            let _ = speak(&mut relay);
        }
    } else {
        let store = damaged(device_content(), &mut draw);
        use_device(store);
    }
    let _ = codec::decode::<HeaderRecord>(draw.rest(), "a header").map(Header::from);
}

fn use_device(store: Arc<MemoryStore>) {
    let rows = Rows::new(store.clone(), world::schema().clone(), &world::home());
    let _ = rows.page("thing", None);
    let _ = rows.conflicts();
    let _ = rows.refused();
    let _ = rows.device_name(&world::device(1));
    let _ = query::run(&rows, &Query { type_name: "thing".into(), ..Query::default() });
    let Ok(mut replica) = Replica::open(store, link::config()) else { return };
    for id in ["t1", "t2", "t3"] {
        let _ = rows.get(&world::thing(id));
        let intents = vec![Intent::Increment { field: "count".into(), by: 1 }];
        let edit = Edit { key: world::thing(id), intents, based_on: None, expect: Expect::Any };
        let _ = replica.write(world::now(9), &[edit], true);
    }
    replica.connect(1, None);
    let _ = replica.durable(replica.last_commit());
    let _ = replica.receive(world::now(9), world::granted(1, true).into());
    let _ = replica.durable(replica.last_commit());
    let bodies = vec![FeedBody::Changes { author: [2; 32], unit: Unit { entities: world::parts_of(2) } }];
    let _ = replica.receive(world::now(9), world::feed(1, 1, bodies).into());
    let _ = replica.status();
    while replica.poll_output().is_some() {}
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    noise_seeds(&[0, 8, 8, 8, 12, 12, 16, 16, 24, 24, 32, 32])
}
