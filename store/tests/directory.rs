//! What may have happened to a store's directory between two openings, and what is said of
//! it: never a panic, never a silent loss, never a deletion.

// The helpers of tests are tests too.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};

use anabranch_store::{Batch, CommitNo, Keyspace, SledStore, Store, StoreError, StoreOptions, View};

fn open(dir: &Path) -> Result<SledStore, StoreError> {
    SledStore::open(dir, StoreOptions::default())
}

fn write(store: &SledStore, from: u64, to: u64) -> CommitNo {
    let mut last = CommitNo(0);
    for n in from..to {
        let mut batch = Batch::new();
        batch.put(Keyspace::ROW, n.to_be_bytes(), vec![n as u8; 300]);
        last = store.commit(batch).unwrap();
    }
    store.wait_durable(last).unwrap();
    last
}

fn count(store: &SledStore) -> usize {
    store.scan(View::Published, Keyspace::ROW, b"", b"", usize::MAX).unwrap().len()
}

fn copy_dir(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_dir(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

fn all_files(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut files: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_file() && !path.ends_with("LOCK"))
        .map(|path| (path.clone(), fs::read(path).unwrap()))
        .collect();
    files.sort();
    files
}

#[test]
fn a_second_owner_is_refused_and_told_who_the_first_is() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path()).unwrap();
    match open(dir.path()) {
        Err(StoreError::InUse { pid, .. }) => assert_eq!(pid, std::process::id()),
        other => panic!("{:?}", other.err()),
    }
    drop(store);
    open(dir.path()).unwrap();
}

#[test]
fn a_second_owner_waits_a_moment_for_the_first_to_let_go() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path()).unwrap();
    std::thread::scope(|threads| {
        let second = threads.spawn(|| open(dir.path()).map(|_| ()));
        store.shut_down().unwrap();
        second.join().unwrap().unwrap();
    });
}

#[test]
fn a_newer_format_is_left_untouched() {
    let dir = tempfile::tempdir().unwrap();
    write(&open(dir.path()).unwrap(), 0, 10);
    fs::write(dir.path().join("FORMAT"), "anabranch-store 2 whatever\nmore\n").unwrap();
    let before = all_files(dir.path());
    assert!(matches!(open(dir.path()), Err(StoreError::NewerFormat { found: 2, supported: 1 })));
    assert!(all_files(dir.path()) == before, "something was changed");
}

#[test]
fn a_database_that_is_not_ours_is_left_where_it_is() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("db"), "someone else's").unwrap();
    assert!(matches!(open(dir.path()), Err(StoreError::Damaged { .. })));
    assert_eq!(fs::read(dir.path().join("db")).unwrap(), b"someone else's");
}

#[test]
fn commits_are_refused_while_space_is_short_and_reads_go_on() {
    let dir = tempfile::tempdir().unwrap();
    write(&open(dir.path()).unwrap(), 0, 10);
    let options = StoreOptions::default().free_space_floor_bytes(u64::MAX / 2);
    let store = SledStore::open(dir.path(), options).unwrap();
    assert!(matches!(store.commit(Batch::new()), Err(StoreError::NoSpace { .. })));
    assert_eq!(count(&store), 10);
    store.shut_down().unwrap();
}

#[test]
fn a_damaged_store_is_moved_aside_whole() {
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("store");
    for n in 1..=2 {
        write(&open(&dir).unwrap(), 0, 50);
        fs::write(dir.join("FORMAT"), "nonsense").unwrap();
        let error = open(&dir).map(|_| ()).unwrap_err();
        let moved = parent.path().join(format!("store.damaged-{n}"));
        assert!(matches!(&error, StoreError::Damaged { what } if what.contains(&*moved.to_string_lossy())));
        assert!(moved.join("db").exists() && !dir.exists());
    }
    let store = open(&dir).unwrap();
    assert_eq!((count(&store), store.rolled_back()), (0, false), "opening again starts afresh");
}

/// Bytes are flipped, files cut and zeroed at pseudo-random places. Each time either the
/// store opens and what it lost is reported, or it is moved aside; no panic gets out.
#[test]
fn random_damage_is_reported() {
    const ENTRIES: u64 = 300;
    let parent = tempfile::tempdir().unwrap();
    let good = parent.path().join("good");
    let store = open(&good).unwrap();
    let last = write(&store, 0, ENTRIES);
    store.shut_down().unwrap();
    drop(store);
    let rounds = std::env::var("ANABRANCH_DAMAGE_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(24);
    let mut random = 0x1234_5678_u64;
    let (mut moved, mut whole, mut reported) = (0, 0, 0);
    for round in 0..rounds {
        let dir = parent.path().join(format!("bad {round}"));
        copy_dir(&good, &dir);
        let mut next = || {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random as usize
        };
        let snapshots =
            fs::read_dir(&dir).unwrap().filter_map(|entry| entry.unwrap().file_name().into_string().ok());
        let mut files: Vec<String> = snapshots.filter(|name| name.starts_with("snap")).collect();
        files.extend(["db", "db", "db", "conf", "COMMITS"].map(str::to_owned));
        let path = dir.join(&files[next() % files.len()]);
        let mut bytes = fs::read(&path).unwrap();
        // Most of a sled file is zeros: damage falls on what is in use.
        let used = bytes.iter().rposition(|byte| *byte != 0).map_or(1, |at| at + 1);
        match next() % 3 {
            0 => (0..1 + next() % 8).for_each(|_| bytes[next() % used] ^= 1 << (next() % 8)),
            1 => bytes.truncate(next() % used),
            _ => {
                let at = next() % used;
                let end = (at + 4096).min(bytes.len());
                bytes[at..end].fill(0);
            }
        }
        fs::write(&path, bytes).unwrap();
        match open(&dir) {
            Err(StoreError::Damaged { what }) => {
                assert!(what.contains("damaged-1"), "round {round}: {what}");
                assert!(!dir.exists() && path_beside(&dir).join("db").exists());
                moved += 1;
            }
            Err(other) => panic!("round {round}, {}: {other:?}", path.display()),
            Ok(store) => match store.verify() {
                Err(StoreError::Damaged { .. }) => reported += 1,
                Err(other) => panic!("round {round}, {}: {other:?}", path.display()),
                Ok(found) if store.rolled_back() => {
                    assert!(found <= ENTRIES && store.durable().unwrap() >= last);
                    reported += 1;
                }
                Ok(found) => {
                    assert_eq!(found, ENTRIES, "round {round}, {}: a silent loss", path.display());
                    whole += 1;
                }
            },
        }
    }
    println!("of {rounds}: {moved} moved aside, {reported} reported, {whole} not harmed");
}

fn path_beside(dir: &Path) -> PathBuf {
    let mut name = dir.file_name().unwrap().to_owned();
    name.push(".damaged-1");
    dir.with_file_name(name)
}

#[test]
fn an_older_database_under_newer_commit_numbers_is_a_roll_back_until_handled() {
    let parent = tempfile::tempdir().unwrap();
    let (dir, old) = (parent.path().join("store"), parent.path().join("old"));
    write(&open(&dir).unwrap(), 0, 20);
    copy_dir(&dir, &old);
    let newest = write(&open(&dir).unwrap(), 20, 40);
    fs::copy(dir.join("COMMITS"), old.join("COMMITS")).unwrap();

    let store = open(&old).unwrap();
    assert!(store.rolled_back());
    assert_eq!(count(&store), 20);
    assert!(write(&store, 40, 41) > newest, "no number is used twice");
    drop(store);
    let store = open(&old).unwrap();
    assert!(store.rolled_back(), "reported until it is handled");
    store.roll_back_handled().unwrap();
    drop(store);
    assert!(!open(&old).unwrap().rolled_back());
    assert!(!open(&dir).unwrap().rolled_back(), "the original is what it was");
}

#[test]
fn a_lost_database_or_lost_commit_numbers_are_a_roll_back() {
    let parent = tempfile::tempdir().unwrap();
    let lost_db = parent.path().join("lost db");
    let newest = write(&open(&lost_db).unwrap(), 0, 20);
    for entry in fs::read_dir(&lost_db).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            fs::remove_dir_all(path).unwrap();
        } else if !path.ends_with("COMMITS") && !path.ends_with("FORMAT") {
            fs::remove_file(path).unwrap();
        }
    }
    let store = open(&lost_db).unwrap();
    assert!(store.rolled_back() && store.durable().unwrap() > newest);

    let lost_numbers = parent.path().join("lost numbers");
    write(&open(&lost_numbers).unwrap(), 0, 20);
    fs::remove_file(lost_numbers.join("COMMITS")).unwrap();
    let store = open(&lost_numbers).unwrap();
    assert!(store.rolled_back());
    assert_eq!(count(&store), 20);
}

#[test]
fn numbers_go_on_past_a_reserved_block() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path()).unwrap();
    let last = write(&store, 0, 2500);
    drop(store);
    let store = open(dir.path()).unwrap();
    assert!(!store.rolled_back());
    assert_eq!(store.durable().unwrap(), last);
}
