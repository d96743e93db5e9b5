//! The relay's decisions, whatever devices send in whatever order.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use anabranch_core::change::Change;
use anabranch_core::clock::Now;
use anabranch_core::digest::Digest;
use anabranch_core::id::{EntityHash, EntityKey};
use anabranch_core::relay::{ConnId, Input, Output, Relay, RelayConfig};
use anabranch_core::store::{CommitNo, Store as _};
use anabranch_core::wire::*;
use anabranch_store::MemoryStore;
use automerge::ChangeHash;

use crate::chunk::Chunk;
use crate::{Draw, admission, noise_seeds, world};

/// More steps than any input of reasonable length takes.
const STEPS_MAX: usize = 400;

struct Host {
    relay: Relay,
    store: Arc<MemoryStore>,
    told: Vec<Output>,
    ms: u64,
}

impl Host {
    fn open(store: MemoryStore) -> Self {
        let store = Arc::new(store);
        let mut config = RelayConfig::default();
        config.require_schema = false;
        config.grant_ms = 50_000;
        config.cached_entities = 2;
        let relay =
            Relay::open(store.clone(), Box::new(world::RoleTokens), config, [7; 16]).expect("an open relay");
        store.make_durable(CommitNo(u64::MAX)).unwrap();
        Self { relay, store, told: Vec::new(), ms: 0 }
    }

    fn now(&self) -> Now {
        world::now(self.ms)
    }

    fn handle(&mut self, input: Input) {
        self.relay.handle(self.now(), input).expect("no input makes the relay fail");
        while let Some(output) = self.relay.poll_output() {
            if let Output::Send { conn, .. } = &output {
                let conn = *conn;
                self.relay.handle(self.now(), Input::Sent { conn }).expect("no input makes the relay fail");
            }
            self.told.push(output);
        }
    }

    fn flush(&mut self) {
        self.store.make_durable(CommitNo(u64::MAX)).unwrap();
        let durable = self.store.durable().unwrap();
        self.handle(Input::Durable(durable));
    }

    fn say(&mut self, conn: ConnId, message: impl Into<Message>) {
        self.handle(Input::Received { conn, bytes: message.into().encode() });
    }
}

pub(crate) fn run(data: &[u8]) {
    let mut draw = Draw::new(data);
    let mut host = Host::open(MemoryStore::manual());
    let mut conns = Vec::new();
    let mut next = 0;
    for _ in 0..STEPS_MAX {
        if draw.is_empty() {
            break;
        }
        if conns.len() < 3 {
            next += 1;
            let conn = ConnId(next);
            host.handle(Input::Connected { conn, device: world::device(1 + next as u8 % 3) });
            if !draw.one_in(8) {
                host.say(conn, world::hello());
                let role = *draw.of(&["writer", "authority", "reader", "admin", "writer/once"]);
                host.say(conn, world::sign_in(1, Some(role)));
            }
            conns.push(conn);
        }
        let at = draw.below(conns.len());
        let conn = conns[at];
        match draw.below(24) {
            0 => {
                host.handle(Input::Disconnected { conn });
                conns.remove(at);
            }
            1 => {
                host.ms += 20_000;
                host.handle(Input::Tick);
            }
            2..=5 => host.flush(),
            6 => {
                host.store.make_durable(CommitNo(u64::MAX)).unwrap();
                host = Host { ms: host.ms, ..Host::open(host.store.reopen()) };
                conns.clear();
            }
            7..=14 => {
                let who = 1 + draw.below(3) as u8;
                let mut parts = world::parts_of(who);
                let skip = draw.below(parts.len());
                parts.drain(..skip);
                parts.truncate(1 + draw.below(4));
                if draw.one_in(2) {
                    for part in &mut parts {
                        mutate_part(part, &mut draw);
                    }
                }
                host.say(conn, world::changes(1, parts));
            }
            _ => {
                let samples = world::messages();
                let mut bytes = draw.of(&samples).encode();
                if draw.one_in(2) && !bytes.is_empty() {
                    let at = draw.word() % bytes.len();
                    bytes[at] ^= draw.byte();
                }
                host.handle(Input::Received { conn, bytes });
            }
        }
        host.told.clear();
    }
    check(host);
}

fn mutate_part(part: &mut EntityChanges, draw: &mut Draw<'_>) {
    match draw.below(6) {
        0 => part.id = "t2".into(),
        1 => part.type_name = draw.of(&["country", "nothing", ""]).to_string(),
        2 => part.genesis = vec![("log".into(), draw.byte()), ("no field!".into(), 1)],
        _ => {
            for bytes in &mut part.changes {
                if let Some(mut chunk) = Chunk::parse(bytes) {
                    admission::mutate(&mut chunk, draw);
                    *bytes = chunk.write();
                }
            }
        }
    }
}

/// The feed has no gap, and its digest is the one that a device would compute from it; a relay
/// that comes back says the same.
fn check(mut host: Host) {
    host.flush();
    let feed = read_feed(&mut host);
    let before = host.relay.digest(&world::home()).unwrap();
    if let Some((_, digest)) = before {
        assert_eq!(digest_of(&feed), digest, "the digest is not the feed's");
    }
    let host = Host::open(host.store.reopen());
    assert_eq!(host.relay.digest(&world::home()).unwrap(), before, "a restart changed the digest");
}

fn read_feed(host: &mut Host) -> Vec<FeedEntry> {
    let conn = ConnId(u64::MAX);
    host.handle(Input::Connected { conn, device: world::device(9) });
    host.told.clear();
    host.say(conn, world::hello());
    host.say(conn, world::sign_in(1, Some("reader")));
    host.flush();
    host.say(conn, Open { full: true, ..world::open(1, 0) });
    host.flush();
    let entries: Vec<FeedEntry> = host
        .told
        .drain(..)
        .filter_map(|output| match output {
            Output::Send { conn: to, bytes } if to == conn => Message::decode(&bytes).unwrap(),
            _ => None,
        })
        .flat_map(|message| if let Message::Feed(feed) = message { feed.entries } else { Vec::new() })
        .collect();
    host.handle(Input::Disconnected { conn });
    assert!(entries.iter().map(|entry| entry.seq).eq(1..=entries.len() as u64), "the feed has a gap");
    entries
}

fn digest_of(feed: &[FeedEntry]) -> Digest {
    let mut heads: BTreeMap<EntityKey, BTreeSet<ChangeHash>> = BTreeMap::new();
    for entry in feed {
        let FeedBody::Changes { unit, .. } = &entry.body else { continue };
        for part in &unit.entities {
            let heads = heads.entry(EntityKey::new(&*part.type_name, &*part.id).unwrap()).or_default();
            for change in part.changes.iter().map(|bytes| Change::parse(bytes).unwrap()) {
                change.deps().iter().for_each(|dep| {
                    heads.remove(dep);
                });
                assert!(heads.insert(change.hash()));
            }
        }
    }
    let mut digest = Digest::default();
    for (entity, heads) in heads {
        let heads: Vec<ChangeHash> = heads.into_iter().collect();
        digest.replace(EntityHash::of(&world::home(), &entity), &[], &heads);
    }
    digest
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    noise_seeds(&[0, 20, 40, 80, 160, 300, 300, 600])
}
