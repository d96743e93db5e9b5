//! The codec of the wire.

use anabranch_core::clock::{MonoMs, Now, WallMs};
use anabranch_core::session::{ClientSession, Event};
use anabranch_core::wire::*;

use crate::world;

pub(crate) fn run(data: &[u8]) {
    if let Ok(Some(message)) = Message::decode(data) {
        let again = Message::decode(&message.encode());
        assert_eq!(again.as_ref(), Ok(&Some(message)), "a message reads back as another");
    }
    let now = Now { mono: MonoMs(1), wall: WallMs(1) };
    let (mut session, _) = ClientSession::start(now, "fuzz");
    let welcome = Welcome {
        version: VERSION_MAX,
        software: "fuzz".into(),
        wall_ms: u64::MAX,
        features_required: 0,
        features: 0,
    };
    let ready = session.receive(now, &Message::from(welcome).encode());
    assert!(matches!(ready, Ok(Event::Ready { .. })));
    let _ = session.receive(now, data);
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let mut seeds: Vec<Vec<u8>> = world::messages().iter().map(Message::encode).collect();
    // A bomb, a length that lies, kinds that nobody knows.
    for (announced, plain) in [(1024u32, 8 << 20), (u32::MAX, 8 << 20), (8 << 20, 8 << 20), (7, 3)] {
        let mut bomb = vec![6, 3];
        bomb.extend(announced.to_le_bytes());
        bomb.extend(zstd::bulk::compress(&vec![0; plain], 19).unwrap());
        seeds.push(bomb);
    }
    seeds.push(vec![8, 1, 0, 253, 0, 0, 0, 0, 0, 0, 0, 64]);
    seeds.extend([vec![200, 0, 1], vec![200, 1, 1], vec![]]);
    seeds
}
