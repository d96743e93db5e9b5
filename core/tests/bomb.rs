//! What messages that inflate cost a relay. A test binary of its own with one test: the system counts the
//! memory of a process, so nothing else may use any.

// In a test a panic is the report.
#![allow(clippy::unwrap_used)]

// Not every helper is needed here.
#[allow(dead_code)]
#[path = "it/support/mod.rs"]
mod support;

use std::io::Write as _;

use anabranch_core::relay::{Input, Output};
use anabranch_core::wire::{FaultCode, MESSAGE_BYTES_MAX};
use support::{Device, World};

/// What a bomb holds.
const INFLATED_BYTES: u64 = 256 << 20;
/// What is inflated of it ends with the longest message, 8 MiB. It lies in a buffer that doubles, so
/// of up to 16 MiB, beside the one of 8 MiB that it outgrew, and zstd looks back over 8 MiB at most.
const BOUND_BYTES: u64 = 32 << 20;

#[test]
fn a_bomb_is_not_inflated_beyond_the_longest_message() {
    let packed = packed_zeros();
    let bomb = |announced: u32| [&[6, 3][..], &announced.to_le_bytes(), &packed].concat();
    let mut world = World::with_schema();
    let Some(before) = status_bytes("VmRSS:") else {
        println!("skipped: this system does not tell what memory a process has");
        return;
    };
    for announced in [u32::MAX, MESSAGE_BYTES_MAX as u32, 9, MESSAGE_BYTES_MAX as u32, 1 << 20] {
        let conn = world.join(&Device::new(4), "writer");
        world.outputs(conn);
        world.handle(Input::Received { conn, bytes: bomb(announced) });
        let outputs = world.outputs(conn);
        let closed = matches!(outputs.last(), Some(Output::Close { code: FaultCode::Protocol, .. }));
        assert!(closed, "{outputs:?}");
        world.handle(Input::Disconnected { conn });
    }
    // The highest of the process's life counts, so that nothing is missed that was freed again.
    let grown = status_bytes("VmHWM:").unwrap().saturating_sub(before);
    assert!(grown < BOUND_BYTES, "bombs of {} MiB took {} MiB", INFLATED_BYTES >> 20, grown >> 20);
    assert!(grown > MESSAGE_BYTES_MAX as u64 / 2, "{grown} bytes: nothing was inflated");
}

/// Made piece by piece, as it would count itself otherwise.
fn packed_zeros() -> Vec<u8> {
    let mut encoder = zstd::Encoder::new(Vec::new(), 3).unwrap();
    let piece = vec![0; 1 << 20];
    for _ in 0..INFLATED_BYTES >> 20 {
        encoder.write_all(&piece).unwrap();
    }
    encoder.finish().unwrap()
}

/// A line of what the system knows of this process, where it does.
fn status_bytes(what: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with(what))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib * 1024)
}
