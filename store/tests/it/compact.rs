//! A store that is written anew keeps everything, whatever interrupts it.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anabranch_store::{
    BackendKind, Batch, CompactOptions, CompactReport, CompactStep, DiskStore, Encryption, Keyspace, Store,
    StoreError, StoreKey, StoreOptions, compact,
};

use crate::workload::{KINDS, Random, any_backend, batch, check, number, options};

const BATCHES: u64 = 60;
const DIR: &str = "ANABRANCH_COMPACT_DIR";
const KIND: &str = "ANABRANCH_COMPACT_KIND";
const ABORT_AT: &str = "ANABRANCH_COMPACT_ABORT_AT";

fn fill(kind: &str, dir: &Path) {
    let store = DiskStore::open(dir, options(kind)).unwrap();
    for n in 1..=BATCHES {
        store.commit(batch(n)).unwrap();
    }
    store.shut_down().unwrap();
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Everything is there, the store counts as no other than before, and goes on.
fn check_whole(dir: &Path, options: StoreOptions, context: &str) {
    let store = DiskStore::open(dir, options).unwrap_or_else(|e| panic!("{context}: {e}"));
    assert!(!store.rolled_back(), "{context}: taken for rolled back");
    assert_eq!(store.durable().unwrap().0, BATCHES, "{context}: commit numbers");
    check(&store, BATCHES);
    store.shut_down().unwrap();
    assert_eq!(names(dir.parent().unwrap()), ["store"], "{context}: leftovers");
}

fn run(dir: &Path, kind: &str, target: &CompactOptions) -> Result<CompactReport, StoreError> {
    compact(dir, any_backend(kind), target, &mut |_| {})
}

#[test]
fn a_removal_that_was_cut_short_goes_on() {
    let scratch = tempfile::tempdir().unwrap();
    let dir = scratch.path().join("store");
    fill("sled", &dir);
    // Its commit numbers went first, so nothing in it says whose it was.
    let removing = scratch.path().join("store.removing");
    fs::create_dir(&removing).unwrap();
    fs::write(removing.join("db"), "what is left").unwrap();
    check_whole(&dir, options("sled"), "a removal");
}

#[test]
fn any_kind_becomes_any_other() {
    let other_key = StoreKey::from_bytes([4; 32]);
    for kind in KINDS {
        for backend in BackendKind::ALL {
            for encryption in [Encryption::Keep, Encryption::Plain, Encryption::Key(other_key.clone())] {
                let scratch = tempfile::tempdir().unwrap();
                let dir = scratch.path().join("store");
                fill(kind, &dir);
                let context = format!("{kind} to {backend} {encryption:?}");
                let was_encrypted = kind.contains("encrypted");
                let target = CompactOptions::default().backend(backend).encryption(encryption.clone());
                let done = run(&dir, kind, &target);
                let mut opens = any_backend(kind);
                match encryption {
                    Encryption::Plain if !was_encrypted => {
                        assert!(matches!(done, Err(StoreError::NotEncrypted { .. })), "{context}");
                        check_whole(&dir, opens, &context);
                        continue;
                    }
                    Encryption::Plain => opens.encryption = None,
                    Encryption::Key(key) => opens.encryption = Some(key),
                    _ => {}
                }
                let report = done.unwrap();
                assert_eq!(report.backend, backend, "{context}");
                assert_eq!(report.encrypted, opens.encryption.is_some(), "{context}");
                check_whole(&dir, opens.backend(backend), &context);
            }
        }
    }
}

#[test]
fn a_store_takes_less_room_afterwards() {
    for kind in KINDS {
        let scratch = tempfile::tempdir().unwrap();
        let dir = scratch.path().join("store");
        let store = DiskStore::open(&dir, options(kind)).unwrap();
        // Nine of ten entries go again.
        for (n, kept) in (0..3000_u32).map(|n| (n, true)).chain((0..2700).map(|n| (n, false))) {
            let key = [&[7; 48][..], &n.to_be_bytes()].concat();
            let mut batch = Batch::new();
            match kept {
                true => batch.put(Keyspace::DOC, key, vec![n as u8; 4096]),
                false => batch.delete(Keyspace::DOC, key),
            }
            store.commit(batch).unwrap();
        }
        store.shut_down().unwrap();
        let report = run(&dir, kind, &CompactOptions::default()).unwrap();
        println!("{kind}: {} bytes, {} afterwards", report.bytes_before, report.bytes_after);
        assert_eq!(report.entries, 300);
        assert!(report.bytes_after < report.bytes_before / 2, "{kind}: {report:?}");
    }
}

#[test]
fn a_roll_back_that_was_not_handled_is_not_forgotten() {
    for kind in KINDS {
        let scratch = tempfile::tempdir().unwrap();
        let dir = scratch.path().join("store");
        fill(kind, &dir);
        fs::remove_file(dir.join("COMMITS")).unwrap();
        run(&dir, kind, &CompactOptions::default()).unwrap();
        let store = DiskStore::open(&dir, any_backend(kind)).unwrap();
        assert!(store.rolled_back(), "{kind}");
        check(&store, BATCHES);
    }
}

#[test]
fn a_store_in_use_or_with_another_key_is_left_alone() {
    let scratch = tempfile::tempdir().unwrap();
    let dir = scratch.path().join("store");
    fill("redb encrypted", &dir);
    let wrong = StoreOptions::default().encryption(StoreKey::from_bytes([1; 32]));
    let refused = compact(&dir, wrong, &CompactOptions::default(), &mut |_| {});
    assert!(matches!(refused, Err(StoreError::WrongKey { .. })));
    let store = DiskStore::open(&dir, any_backend("redb encrypted")).unwrap();
    let refused = run(&dir, "redb encrypted", &CompactOptions::default());
    assert!(matches!(refused, Err(StoreError::InUse { .. })));
    drop(store);
    // Not what this store replaced: it stays, and says so.
    fs::create_dir(scratch.path().join("store.replaced")).unwrap();
    let refused = run(&dir, "redb encrypted", &CompactOptions::default());
    assert!(matches!(refused, Err(StoreError::Exists { .. })));
    fs::remove_dir(scratch.path().join("store.replaced")).unwrap();
    check_whole(&dir, any_backend("redb encrypted"), "in the end");
}

/// Not a test by itself: the process that is killed. Goes from one backend to the other and
/// back until then.
#[test]
fn compactor() {
    let Ok(dir) = std::env::var(DIR) else { return };
    let kind = std::env::var(KIND).unwrap();
    let mut steps_left = number(ABORT_AT);
    for turn in 0.. {
        let target = CompactOptions::default().backend(BackendKind::ALL[(turn + 1) % 2]);
        let mut step = |_: CompactStep| match &mut steps_left {
            Some(0) => std::process::abort(),
            Some(left) => *left -= 1,
            None => {}
        };
        compact(&dir, any_backend(&kind), &target, &mut step).unwrap();
    }
}

fn start(kind: &str, dir: &Path, abort_at: Option<u64>) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "compact::compactor", "--test-threads=1"]).env(DIR, dir).env(KIND, kind);
    if let Some(step) = abort_at {
        command.env(ABORT_AT, step.to_string());
    }
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

/// `ANABRANCH_COMPACT_KILL_ROUNDS` sets how often for each kind of store (14 by default).
#[test]
fn a_kill_at_any_moment_leaves_a_whole_store() {
    let rounds = number("ANABRANCH_COMPACT_KILL_ROUNDS").unwrap_or(14);
    let mut random = Random::new(number("ANABRANCH_COMPACT_KILL_SEED").unwrap_or(0x2545_f491));
    for kind in KINDS {
        let scratch = tempfile::tempdir().unwrap();
        let dir = scratch.path().join("store");
        fill(kind, &dir);
        let started = Instant::now();
        run(&dir, kind, &CompactOptions::default()).unwrap();
        let takes_us = started.elapsed().as_micros() as u64;
        let mut swaps = 0;
        for round in 0..rounds {
            let before = DiskStore::open(&dir, any_backend(kind)).unwrap().backend();
            let mut child = start(kind, &dir, None);
            std::thread::sleep(Duration::from_micros(random.below(takes_us * 5 / 2)));
            child.kill().unwrap();
            assert!(child.wait().unwrap().code().is_none(), "the process ended by itself");
            check_whole(&dir, any_backend(kind), &format!("{kind}, round {round}"));
            swaps += u64::from(DiskStore::open(&dir, any_backend(kind)).unwrap().backend() != before);
        }
        println!("{kind}: {rounds} kills, the backend was another afterwards {swaps} times");
    }
}

/// Each place at which progress is told, the two between the renames among them.
#[test]
fn an_end_at_each_step_leaves_a_whole_store() {
    for kind in ["sled", "redb encrypted"] {
        let scratch = tempfile::tempdir().unwrap();
        let dir = scratch.path().join("store");
        fill(kind, &dir);
        let mut steps = Vec::new();
        compact(&dir, any_backend(kind), &CompactOptions::default(), &mut |step| steps.push(step)).unwrap();
        assert!(steps.ends_with(&[CompactStep::MovedAside, CompactStep::InPlace]), "{steps:?}");
        for at in 0..steps.len() as u64 {
            let status = start(kind, &dir, Some(at)).wait().unwrap();
            assert!(status.code().is_none(), "{kind}: it did not end at step {at}");
            check_whole(&dir, any_backend(kind), &format!("{kind}, step {at}"));
        }
        println!("{kind}: {} steps", steps.len());
    }
}
