//! A device, whatever a relay sends it.

use std::sync::Arc;

use anabranch_core::intent::Intent;
use anabranch_core::replica::{Edit, Expect, Output, Replica, ReplicaConfig};
use anabranch_core::rows::Rows;
use anabranch_core::store::{CommitNo, Store as _};
use anabranch_core::wire::*;
use anabranch_store::MemoryStore;
use serde_json::json;

use crate::chunk::Chunk;
use crate::{Draw, admission, noise_seeds, world};

const STEPS_MAX: usize = 300;

pub(crate) fn config() -> ReplicaConfig {
    ReplicaConfig {
        workspace: world::home(),
        device: world::device(1),
        device_name: "phone".into(),
        platform: "fuzz".into(),
        schema: world::schema().clone(),
        schema_source: world::SCHEMA.into(),
        assumed_role: Some(GrantRole::Writer),
        store_life: 0,
        seed: [1; 32],
    }
}

struct Device {
    replica: Replica,
    store: Arc<MemoryStore>,
    ms: u64,
    /// Units that were sent and can be answered.
    sent: Vec<Changes>,
    written: u64,
}

impl Device {
    fn open(store: MemoryStore) -> Self {
        let store = Arc::new(store);
        let replica = Replica::open(store.clone(), config()).expect("what it wrote itself can be opened");
        Self { replica, store, ms: 0, sent: Vec::new(), written: 0 }
    }

    fn drain(&mut self) {
        while let Some(output) = self.replica.poll_output() {
            if let Output::Send(bytes) = output
                && let Ok(Some(Message::Changes(changes))) = Message::decode(&bytes)
            {
                self.sent.push(changes);
            }
        }
    }

    fn hear(&mut self, message: Message) {
        self.replica.receive(world::now(self.ms), message).expect("no message makes a device fail");
        self.drain();
    }

    fn flush(&mut self) {
        loop {
            let commit = self.replica.last_commit();
            self.store.make_durable(commit).unwrap();
            self.replica.durable(commit).expect("durability makes no device fail");
            self.drain();
            if self.replica.last_commit() == commit {
                return;
            }
        }
    }

    fn write(&mut self, id: &str) {
        self.written += 1;
        let intents = vec![
            Intent::Increment { field: "count".into(), by: 1 },
            Intent::Splice { field: "body".into(), at: 0, delete: 0, insert: "w".into() },
            Intent::Set { field: "level".into(), value: json!(self.written) },
        ];
        let edit = Edit { key: world::thing(id), intents, based_on: None, expect: Expect::Any };
        // A relay may make it a reader, or delete what it writes to; else it must be able to.
        let _ = self.replica.write(world::now(self.ms), &[edit], true);
        self.drain();
    }
}

pub(crate) fn run(data: &[u8]) {
    let mut draw = Draw::new(data);
    let mut device = Device::open(MemoryStore::manual());
    device.write("t1");
    device.flush();
    device.replica.connect(1, Some("writer".into()));
    device.hear(world::granted(1, false).into());
    let mut seq = 1;
    for _ in 0..STEPS_MAX {
        if draw.is_empty() {
            break;
        }
        device.ms += 10;
        match draw.below(20) {
            0 => {
                device.replica.disconnect();
                let now = world::now(device.ms);
                device.replica.relay_clock_is(now, draw.number() as i64 >> draw.below(40));
                device.replica.connect(1, None);
            }
            1 => device.hear(world::granted(1, draw.one_in(2)).into()),
            2 => {
                let id = *draw.of(&["t1", "t2"]);
                device.write(id);
            }
            3 | 4 => device.flush(),
            5 => {
                device.store.make_durable(CommitNo(device.store.durable().unwrap().0 + 1)).unwrap();
                let (ms, written) = (device.ms, device.written);
                device = Device { ms, written, ..Device::open(device.store.reopen()) };
                device.replica.connect(1, None);
            }
            6 | 7 => answer(&mut device, &mut draw),
            8..=14 => {
                let bodies = bodies(&device, &mut draw);
                let from = if draw.one_in(8) { draw.number() } else { seq };
                if from == seq {
                    seq += bodies.len() as u64;
                }
                device.hear(world::feed(1, from.min(u64::MAX - 64), bodies).into());
            }
            15 => {
                let cursor = if draw.one_in(3) { draw.number() } else { seq - 1 };
                let digest = [draw.byte(); 32];
                device.hear(CaughtUp { channel: 1, epoch: [7; 16], cursor, digest }.into());
                // It may have been asked to begin anew.
                seq = if draw.one_in(2) { 1 } else { seq };
            }
            _ => {
                let samples = world::messages();
                let mut bytes = draw.of(&samples).encode();
                if draw.one_in(2) && !bytes.is_empty() {
                    let at = draw.word() % bytes.len();
                    bytes[at] ^= draw.byte();
                }
                if let Ok(Some(message)) = Message::decode(&bytes) {
                    device.hear(message);
                }
            }
        }
    }
    check(device);
}

fn answer(device: &mut Device, draw: &mut Draw<'_>) {
    let Some(sent) = device.sent.pop() else { return };
    let mut refused = Vec::new();
    for part in &sent.unit.entities {
        for bytes in &part.changes {
            if draw.one_in(2)
                && let Ok(change) = anabranch_core::change::Change::parse(bytes)
            {
                refused.push(Refused {
                    type_name: part.type_name.clone(),
                    id: part.id.clone(),
                    hash: change.hash().0,
                    code: u16::from(draw.byte() % 20),
                    message: "no".into(),
                });
            }
        }
    }
    device.hear(Ack { channel: 1, unit_id: sent.unit_id, seq: 1, refused }.into());
}

fn bodies(device: &Device, draw: &mut Draw<'_>) -> Vec<FeedBody> {
    let mut bodies = Vec::new();
    for _ in 0..1 + draw.below(3) {
        let number = 2 + draw.below(2) as u8;
        let mut parts = world::parts_of(number);
        let skip = draw.below(parts.len());
        let count = 1 + draw.below(6);
        let mut parts: Vec<EntityChanges> = parts.drain(skip..).take(count).collect();
        if draw.one_in(3) {
            for part in &mut parts {
                damage(part, draw);
            }
        }
        bodies.push(match draw.below(8) {
            0 => {
                let own = device.sent.last().map(|sent| &sent.unit.entities);
                let own = own.into_iter().flatten().map(|part| {
                    let hashes = part.changes.iter().filter_map(|bytes| {
                        anabranch_core::change::Change::parse(bytes).ok().map(|change| change.hash().0)
                    });
                    (part.type_name.clone(), part.id.clone(), hashes.collect())
                });
                FeedBody::Own(own.collect())
            }
            1 => {
                let made = draw.of(world::history());
                FeedBody::Refused(Refused {
                    type_name: "thing".into(),
                    id: draw.of(&["t1", "t2", ""]).to_string(),
                    hash: made.change.hash().0,
                    code: u16::from(draw.byte() % 20),
                    message: "no".into(),
                })
            }
            2 => FeedBody::Own(vec![("thing".into(), "t1".into(), vec![[draw.byte(); 32]])]),
            _ => FeedBody::Changes { author: [number; 32], unit: Unit { entities: parts } },
        });
    }
    bodies
}

fn damage(part: &mut EntityChanges, draw: &mut Draw<'_>) {
    match draw.below(8) {
        0 => part.id = draw.of(&["t2", "", "a\u{0}b"]).to_string(),
        1 => part.type_name = draw.of(&["country", "nothing", ""]).to_string(),
        2 => part.genesis = vec![("log".into(), draw.byte() % 8), ("no field!".into(), 1)],
        3 => part.changes.reverse(),
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

/// What is durable can be opened and read, with what was asked for in doubt left in place.
fn check(mut device: Device) {
    device.flush();
    let pending = device.replica.status().pending;
    let again = Device::open(device.store.reopen());
    assert_eq!(again.replica.status().pending, pending, "a restart changed what waits");
    let rows = Rows::new(again.store.clone(), world::schema().clone(), &world::home());
    let (found, _) = rows.page("thing", None).expect("rows can be read");
    for (key, row) in found {
        assert_eq!(rows.get(&key).unwrap().as_ref(), Some(&row));
    }
    rows.conflicts().expect("conflicts can be read");
    rows.refused().expect("refusals can be read");
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    noise_seeds(&[0, 20, 40, 80, 160, 300, 300, 600])
}
