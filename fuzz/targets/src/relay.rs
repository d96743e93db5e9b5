//! The relay's decisions, whatever devices send in whatever order.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use anabranch_core::admission::Judge;
use anabranch_core::change::Change;
use anabranch_core::clock::Now;
use anabranch_core::digest::Digest;
use anabranch_core::entity::Entity;
use anabranch_core::id::{DeviceId, EntityHash, EntityKey};
use anabranch_core::relay::{ConnId, Input, Output, Relay, RelayConfig};
use anabranch_core::store::{CommitNo, Store as _};
use anabranch_core::wire::*;
use anabranch_store::MemoryStore;
use automerge::{ActorId, ChangeHash};

use crate::{Draw, admission, noise_seeds, world};

/// More steps than any input of reasonable length takes.
const STEPS_MAX: usize = 400;

struct Host {
    relay: Relay,
    store: Arc<MemoryStore>,
    told: Vec<Output>,
    ms: u64,
    /// Devices that ever signed in as one that may bring the changes of others.
    vouching: BTreeSet<DeviceId>,
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
        Self { relay, store, told: Vec::new(), ms: 0, vouching: BTreeSet::new() }
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
    let mut conns: Vec<(ConnId, DeviceId)> = Vec::new();
    let mut next = 0;
    let mut history = world::history().iter().cycle();
    for _ in 0..STEPS_MAX {
        if draw.is_empty() {
            break;
        }
        if conns.len() < 3 {
            next += 1;
            let conn = ConnId(next);
            let device = world::device(1 + next as u8 % 3);
            host.handle(Input::Connected { conn, device });
            if !draw.one_in(8) {
                host.say(conn, world::hello());
                let roles = ["writer", "writer", "writer", "authority", "reader", "admin", "writer/once"];
                // The third device wrote as an authority.
                let usual = if device == world::device(3) { "authority" } else { "writer" };
                let role = if draw.one_in(2) { *draw.of(&roles) } else { usual };
                host.say(conn, world::sign_in(1, Some(role)));
                if matches!(role, "authority" | "admin") {
                    host.vouching.insert(device);
                }
            }
            conns.push((conn, device));
        }
        let at = draw.below(conns.len());
        let conn = conns[at].0;
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
                let Host { store, ms, vouching, .. } = host;
                host = Host { ms, vouching, ..Host::open(store.reopen()) };
                conns.clear();
            }
            7..=11 => {
                // What really happened, each change by its device, with changed ones before it.
                for made in history.by_ref().take(1 + draw.below(4)) {
                    let own = conns.iter().find(|(_, device)| *device == made.device);
                    let by = own.map_or(conn, |(conn, _)| *conn);
                    let honest = world::part("t1", std::slice::from_ref(&made.change));
                    for _ in 0..draw.below(6) {
                        let changes = vec![admission::change_one(made, &mut draw)];
                        let changed = EntityChanges { changes, ..honest.clone() };
                        host.say(by, world::changes(1, vec![changed]));
                    }
                    host.say(by, world::changes(1, vec![honest]));
                }
            }
            12..=14 => {
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
        for output in host.told.drain(..) {
            if let Output::Close { conn, .. } = output {
                conns.retain(|(other, _)| *other != conn);
            }
        }
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
                let made = world::history().iter().find(|made| made.change.bytes() == &bytes[..]);
                if let Some(made) = made {
                    *bytes = admission::change_one(made, draw);
                }
            }
        }
    }
}

/// The feed has no gap, and its digest is the one that a device would compute from it; every device
/// can take all of it; a relay that comes back says the same.
fn check(mut host: Host) {
    host.flush();
    let feed = read_feed(&mut host);
    let before = host.relay.digest(&world::home()).unwrap();
    if let Some((_, digest)) = before {
        assert_eq!(digest_of(&feed), digest, "the digest is not the feed's");
    }
    check_authors(&feed, &host.vouching);
    check_entities(&feed);
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

/// The changes of an entry are of whoever brought them, but for those who may bring any.
fn check_authors(feed: &[FeedEntry], vouching: &BTreeSet<DeviceId>) {
    let mut authors: BTreeMap<ActorId, DeviceId> = BTreeMap::new();
    for entry in feed {
        let FeedBody::Changes { author, unit } = &entry.body else { continue };
        for change in unit.entities.iter().flat_map(|part| &part.changes) {
            let change = Change::parse(change).unwrap();
            if let Some(author) = change.author() {
                authors.insert(change.actor().clone(), author.device);
            }
            let wrote = authors.get(change.actor()).expect("an actor begins with its first change");
            let brought = DeviceId(*author);
            assert!(*wrote == brought || vouching.contains(&brought), "the changes of another are taken");
        }
    }
}

/// One entity as the feed has it.
#[derive(Default)]
struct Admitted {
    changes: Vec<Change>,
    genesis: Vec<(String, u8)>,
}

/// Everything that was admitted can be applied, in the order of the feed and in another one, and leaves
/// documents that load.
fn check_entities(feed: &[FeedEntry]) {
    let mut entities: BTreeMap<EntityKey, Admitted> = BTreeMap::new();
    for entry in feed {
        let FeedBody::Changes { unit, .. } = &entry.body else { continue };
        for part in &unit.entities {
            let key = EntityKey::new(&*part.type_name, &*part.id).unwrap();
            let Admitted { changes, genesis } = entities.entry(key).or_default();
            changes.extend(part.changes.iter().map(|bytes| Change::parse(bytes).unwrap()));
            genesis.extend(part.genesis.iter().cloned());
        }
    }
    for (key, Admitted { mut changes, genesis }) in entities {
        let ty = world::schema().types.get(key.type_name());
        let together = |changes: &[Change]| {
            let mut entity = Entity::new(&world::home(), &key, ty);
            entity.name_containers(&genesis);
            let received = entity.receive(changes.to_vec(), ty, Judge::Admitted, true);
            assert!(received.applied.len() == changes.len(), "{key}: a device refuses {received:?}");
            admission::prove(&entity, ty);
            (entity.heads(), ty.map(|ty| entity.row(ty)))
        };
        let in_order = together(&changes);
        changes.reverse();
        assert_eq!(together(&changes), in_order, "{key} depends on the order of its changes");
    }
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    noise_seeds(&[0, 20, 40, 80, 160, 300, 300, 600, 1200, 2400])
}
