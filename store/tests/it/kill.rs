//! A process that writes is killed at any moment; what it had acknowledged is there, whole.
//!
//! `ANABRANCH_KILL_ROUNDS` sets how often for each kind of store (12 by default),
//! `ANABRANCH_KILL_SEED` when the kills fall.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anabranch_store::{Store, open};

use crate::workload::{Random, check, newest_acknowledged, number, options, start_writer};

fn write_until_killed(kind: &str, dir: &Path, lines: u64, wait: Duration) -> u64 {
    let mut child = start_writer(kind, dir, u64::MAX, Stdio::piped());
    let mut acknowledged = 0;
    let mut heard = 0;
    let mut killed = false;
    for line in BufReader::new(child.stdout.take().unwrap()).lines() {
        let line = line.unwrap();
        if line.starts_with("acknowledged ") {
            acknowledged = acknowledged.max(newest_acknowledged(std::iter::once(&*line)));
            heard += 1;
        }
        if heard >= lines && !killed {
            // With no line to wait for, the kill falls while the store is opened or made.
            // Kills fall at any point of the next group, not just behind an acknowledgement.
            std::thread::sleep(wait);
            child.kill().unwrap();
            killed = true;
        }
    }
    let status = child.wait().unwrap();
    assert!(killed && status.code().is_none(), "the writer ended by itself: {status}");
    acknowledged
}

fn what_was_acknowledged_outlives_a_killed_process(kind: &str) {
    let rounds = number("ANABRANCH_KILL_ROUNDS").unwrap_or(12);
    let mut random = Random::new(number("ANABRANCH_KILL_SEED").unwrap_or(0x9e37_79b9));
    let mut dir = tempfile::tempdir().unwrap();
    let mut last = 0;
    for round in 0..rounds {
        // A fresh directory now and then, or checking everything would take ever longer.
        if round > 0 && round % 10 == 0 {
            dir = tempfile::tempdir().unwrap();
            last = 0;
        }
        let wait = Duration::from_micros(random.below(20_000));
        let acknowledged = write_until_killed(kind, dir.path(), random.below(13), wait);
        let store = open(dir.path(), options(kind)).unwrap();
        let found = store.durable().unwrap().0;
        assert!(!store.rolled_back(), "{kind}, round {round}: taken for rolled back at {found}");
        assert!(
            found >= acknowledged,
            "{kind}, round {round}: {acknowledged} was acknowledged, {found} is there"
        );
        assert!(found >= last, "{kind}, round {round}: {last} was there before, {found} is now");
        check(&*store, found);
        last = found;
    }
    println!("{kind}: {rounds} kills");
}

#[test]
fn what_sled_acknowledged_outlives_a_killed_process() {
    what_was_acknowledged_outlives_a_killed_process("sled");
}

#[test]
fn what_redb_acknowledged_outlives_a_killed_process() {
    what_was_acknowledged_outlives_a_killed_process("redb");
}

#[test]
fn what_encrypted_sled_acknowledged_outlives_a_killed_process() {
    what_was_acknowledged_outlives_a_killed_process("sled encrypted");
}

#[test]
fn what_encrypted_redb_acknowledged_outlives_a_killed_process() {
    what_was_acknowledged_outlives_a_killed_process("redb encrypted");
}
