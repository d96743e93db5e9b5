//! A process that writes is killed at any moment; what it had acknowledged is there, whole.
//!
//! The test starts its own executable again as the writer. `ANABRANCH_KILL_ROUNDS` sets how
//! often for each kind of store (12 by default), `ANABRANCH_KILL_SEED` when the kills fall.

// The helpers of tests are tests too.
#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anabranch_store::{BackendKind, Batch, CommitNo, Keyspace, Store, StoreKey, StoreOptions, View, open};

const DIR: &str = "ANABRANCH_KILL_DIR";
const KIND: &str = "ANABRANCH_KILL_KIND";
const KEYS: u64 = 12;

/// How a store of this name is opened: a backend, with ` encrypted` behind it or not.
fn options(kind: &str) -> StoreOptions {
    let backend = kind.split(' ').next().and_then(BackendKind::from_name).unwrap();
    let options = StoreOptions::default().backend(backend);
    if kind.ends_with("encrypted") { options.encryption(StoreKey::from_bytes([9; 32])) } else { options }
}

/// Batch `n` writes its number to a set of keys that all batches share, to keys of its own,
/// and removes those of the batch before it. So each prefix of batches has one exact state.
fn batch(n: u64) -> Batch {
    let mut batch = Batch::new();
    for key in 0..KEYS {
        batch.put(Keyspace::ROW, format!("shared {key:02}"), n.to_be_bytes());
        let mut own = n.to_be_bytes().to_vec();
        own.resize(8 + (n % 5 * 700) as usize, b'.');
        batch.put(Keyspace::DOC, own_key(n, key), own);
        if n > 0 && n.is_multiple_of(2) {
            batch.delete(Keyspace::DOC, own_key(n - 1, key));
        }
    }
    batch
}

/// Like a document's: behind the hashes, which are the same here, come numbers.
fn own_key(n: u64, key: u64) -> Vec<u8> {
    [&[7; 48][..], format!("{n:08} {key:02}").as_bytes()].concat()
}

fn check(store: &dyn Store, last: u64) {
    for view in [View::Published, View::Latest] {
        let shared = store.scan(view, Keyspace::ROW, b"shared", b"", 100).unwrap();
        assert_eq!(shared.len() as u64, if last == 0 { 0 } else { KEYS });
        assert!(shared.iter().all(|(_, value)| value[..] == last.to_be_bytes()), "a torn batch");
    }
    let mut expected =
        (1..=last).filter(|n| n % 2 == 0 || *n == last).flat_map(|n| (0..KEYS).map(move |k| (n, k)));
    let mut from = Vec::new();
    loop {
        let page = store.scan(View::Published, Keyspace::DOC, &[7; 48], &from, 500).unwrap();
        let Some((newest, _)) = page.last() else { break };
        from = [newest.as_slice(), &[0]].concat();
        for (key, value) in page {
            let (n, k) = expected.next().expect("more than was committed");
            assert_eq!(key, own_key(n, k));
            assert_eq!(value[..8], n.to_be_bytes());
        }
    }
    assert_eq!(expected.next(), None, "a batch is missing");
}

/// Not a test by itself: the process that is killed. Prints each acknowledged number.
#[test]
fn writer() {
    let Ok(dir) = std::env::var(DIR) else { return };
    let store = open(dir, options(&std::env::var(KIND).unwrap())).unwrap();
    store.set_durable_hook(Arc::new(|news| {
        let mut out = std::io::stdout().lock();
        let _ = writeln!(out, "\nacknowledged {}", news.unwrap().0).and_then(|()| out.flush());
    }));
    let mut n = store.durable().unwrap().0;
    println!("\nopen {n}");
    loop {
        n += 1;
        assert_eq!(store.commit(batch(n)).unwrap(), CommitNo(n));
    }
}

fn write_until_killed(kind: &str, dir: &Path, lines: u64, wait: Duration) -> u64 {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "writer", "--nocapture", "--test-threads=1"])
        .env(DIR, dir)
        .env(KIND, kind)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut acknowledged = 0;
    let mut heard = 0;
    let mut killed = false;
    for line in BufReader::new(child.stdout.take().unwrap()).lines() {
        let line = line.unwrap();
        if let Some(n) = line.strip_prefix("acknowledged ") {
            // The last line can be cut off, which makes its number smaller, never larger.
            acknowledged = acknowledged.max(n.parse().unwrap_or(0));
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
    if std::env::var(DIR).is_ok() {
        return;
    }
    let number = |name: &str| std::env::var(name).ok().and_then(|n| n.parse::<u64>().ok());
    let rounds = number("ANABRANCH_KILL_ROUNDS").unwrap_or(12);
    let mut random = number("ANABRANCH_KILL_SEED").unwrap_or(0x9e37_79b9) | 1;
    let mut dir = tempfile::tempdir().unwrap();
    let mut last = 0;
    for round in 0..rounds {
        // A fresh directory now and then, or checking everything would take ever longer.
        if round > 0 && round % 10 == 0 {
            dir = tempfile::tempdir().unwrap();
            last = 0;
        }
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let acknowledged =
            write_until_killed(kind, dir.path(), random % 13, Duration::from_micros(random % 20_000));
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
