//! One change as it comes from outside.

use anabranch_core::change::{CHANGE_OPS_MAX, Change, OP_COUNTER_MAX};

use crate::chunk::{self, Chunk};
use crate::world;

pub(crate) fn run(data: &[u8]) {
    look(data);
    // As a body, so that what lies behind the checksum is reached too.
    look(&chunk::seal(data));
    if let Some(chunk) = Chunk::parse(data) {
        assert_eq!(Chunk::parse(&chunk.write()), Some(chunk), "a change reads back as another");
    }
}

fn look(bytes: &[u8]) {
    let Ok(change) = Change::parse(bytes) else { return };
    assert_eq!(change.bytes(), bytes, "a change has two forms");
    assert!(change.max_op() <= OP_COUNTER_MAX);
    assert!(change.time().to_change_time() >= 0);
    assert_eq!(change.author().is_some(), change.seq() == 1);
    if let Ok(expanded) = change.expand() {
        assert!(!expanded.operations.is_empty() && expanded.operations.len() <= CHANGE_OPS_MAX);
    }
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let changes = world::history().iter().step_by(4).map(|made| made.change.bytes().to_vec());
    let mut seeds: Vec<Vec<u8>> = changes.collect();
    let bodies: Vec<Vec<u8>> =
        seeds.iter().filter_map(|bytes| chunk::body_of(bytes)).map(<[u8]>::to_vec).collect();
    // A change that claims operations without end.
    let mut endless = Chunk::parse(&seeds[0]).unwrap();
    for (kind, data) in &mut endless.columns {
        let mut claimed = Vec::new();
        if *kind & 7 == 4 {
            chunk::put_unsigned(1 << 40, &mut claimed);
        } else {
            chunk::put_signed(1 << 40, &mut claimed);
            claimed.extend_from_slice(data.get(1..).unwrap_or_default());
        }
        *data = claimed;
    }
    seeds.push(endless.write());
    seeds.extend(bodies);
    seeds.push(vec![0x85, 0x6f, 0x4a, 0x83, 0, 0, 0, 0, 2, 1, 0]);
    seeds.push(Vec::new());
    seeds
}
