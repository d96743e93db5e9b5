//! What may have happened to a store's directory between two openings, and what is said of
//! it: never a panic, never a silent loss, never a deletion.

use std::fs;
use std::path::{Path, PathBuf};

use anabranch_store::{
    BackendKind, Batch, CommitNo, DiskStore, Keyspace, Store, StoreError, StoreKey, StoreOptions, View, rekey,
};

/// Every way to keep a store, with its name.
fn kinds() -> [(&'static str, StoreOptions); 4] {
    let plain = |kind| StoreOptions::default().backend(kind);
    let encrypted = |kind| plain(kind).encryption(key(1));
    [
        ("sled", plain(BackendKind::Sled)),
        ("redb", plain(BackendKind::Redb)),
        ("encrypted sled", encrypted(BackendKind::Sled)),
        ("encrypted redb", encrypted(BackendKind::Redb)),
    ]
}

fn key(n: u8) -> StoreKey {
    StoreKey::from_bytes([n; 32])
}

fn open(dir: &Path) -> Result<DiskStore, StoreError> {
    DiskStore::open(dir, StoreOptions::default())
}

/// The file that the backend keeps its data in.
fn main_file(dir: &Path) -> PathBuf {
    let sled = dir.join("db");
    if sled.exists() { sled } else { dir.join("data.redb") }
}

fn write(store: &DiskStore, from: u64, to: u64) -> CommitNo {
    let mut last = CommitNo(0);
    for n in from..to {
        let mut batch = Batch::new();
        batch.put(Keyspace::ROW, n.to_be_bytes(), vec![n as u8; 300]);
        last = store.commit(batch).unwrap();
    }
    store.wait_durable(last).unwrap();
    last
}

fn count(store: &DiskStore) -> usize {
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
    // The last word is the CRC-32 of what is before it, in all versions from 2 on.
    fs::write(dir.path().join("FORMAT"), "anabranch-store 3 whatever comes 72a0d205\nmore\n").unwrap();
    let before = all_files(dir.path());
    assert!(matches!(open(dir.path()), Err(StoreError::NewerFormat { found: 3, supported: 2 })));
    assert!(all_files(dir.path()) == before, "something was changed");
}

#[test]
fn a_database_that_is_not_ours_is_left_where_it_is() {
    for name in ["db", "data.redb"] {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(name), "someone else's").unwrap();
        assert!(matches!(open(dir.path()), Err(StoreError::Damaged { .. })));
        assert_eq!(fs::read(dir.path().join(name)).unwrap(), b"someone else's");
    }
}

#[test]
fn another_backend_than_the_configured_is_refused_and_changes_nothing() {
    for (has, wants) in [(BackendKind::Sled, BackendKind::Redb), (BackendKind::Redb, BackendKind::Sled)] {
        let dir = tempfile::tempdir().unwrap();
        let store = DiskStore::open(dir.path(), StoreOptions::default().backend(has)).unwrap();
        assert_eq!((store.backend(), store.is_encrypted()), (has, false));
        write(&store, 0, 10);
        drop(store);
        let before = all_files(dir.path());
        let error =
            DiskStore::open(dir.path(), StoreOptions::default().backend(wants)).map(drop).unwrap_err();
        assert!(matches!(error, StoreError::OtherBackend { .. }));
        let text = error.to_string();
        let convert = format!("`anabranch store compact --backend {wants}`");
        assert!(text.contains(has.name()) && text.contains(&convert), "{text}");
        assert!(all_files(dir.path()) == before, "something was changed");
        assert_eq!(count(&open(dir.path()).unwrap()), 10, "without a wish, what is there is taken");
    }
}

#[test]
fn keys_that_do_not_fit_are_refused_and_change_nothing() {
    for kind in BackendKind::ALL {
        let options = StoreOptions::default().backend(kind);
        let (plain, secret) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        write(&DiskStore::open(plain.path(), options.clone()).unwrap(), 0, 10);
        let store = DiskStore::open(secret.path(), options.clone().encryption(key(1))).unwrap();
        assert!(store.is_encrypted());
        write(&store, 0, 10);
        drop(store);
        let before = (all_files(plain.path()), all_files(secret.path()));
        let refused =
            |dir: &Path, options: &StoreOptions| DiskStore::open(dir, options.clone()).map(drop).unwrap_err();
        assert!(matches!(refused(secret.path(), &options), StoreError::KeyNeeded { .. }));
        let wrong = options.clone().encryption(key(2));
        assert!(matches!(refused(secret.path(), &wrong), StoreError::WrongKey { .. }));
        assert!(matches!(refused(plain.path(), &wrong), StoreError::NotEncrypted { .. }));
        assert!(matches!(rekey(plain.path(), &key(1), &key(2)), Err(StoreError::NotEncrypted { .. })));
        assert!(matches!(rekey(secret.path(), &key(2), &key(3)), Err(StoreError::WrongKey { .. })));
        assert!((all_files(plain.path()), all_files(secret.path())) == before, "something was changed");
    }
}

#[test]
fn another_key_takes_the_place_of_the_old_one_at_once() {
    for kind in BackendKind::ALL {
        let dir = tempfile::tempdir().unwrap();
        let options = |n| StoreOptions::default().backend(kind).encryption(key(n));
        let store = DiskStore::open(dir.path(), options(1)).unwrap();
        write(&store, 0, 10);
        let busy = rekey(dir.path(), &key(1), &key(2));
        assert!(matches!(busy, Err(StoreError::InUse { .. })), "{busy:?}");
        store.rekey(&key(1), &key(2)).unwrap();
        write(&store, 10, 20);
        drop(store);
        assert!(matches!(DiskStore::open(dir.path(), options(1)), Err(StoreError::WrongKey { .. })));
        // As a kill in the middle of it would leave it: the new file is not in place yet.
        fs::write(dir.path().join("KEY.new"), "half").unwrap();
        rekey(dir.path(), &key(2), &key(3)).unwrap();
        assert_eq!(count(&DiskStore::open(dir.path(), options(3)).unwrap()), 20);
    }
}

/// A kill while a store is made leaves any of these files; the next opening makes it.
#[test]
fn a_store_that_was_never_finished_is_made_again() {
    for (name, options) in kinds() {
        let dir = tempfile::tempdir().unwrap();
        for leftover in ["FORMAT.new", "KEY", "KEY.new"] {
            fs::write(dir.path().join(leftover), "half").unwrap();
        }
        fs::write(dir.path().join("data.redb.new"), "half").unwrap();
        write(&DiskStore::open(dir.path(), options.clone()).unwrap(), 0, 10);
        assert_eq!(count(&DiskStore::open(dir.path(), options).unwrap()), 10, "{name}");
    }
}

/// sled writes what it has recovered beside what it recovered before, then renames it. What a
/// kill leaves half written it would take for the newest.
#[test]
fn an_opening_of_sled_that_was_cut_short_is_done_again() {
    let dir = tempfile::tempdir().unwrap();
    let options = StoreOptions::default().backend(BackendKind::Sled);
    let open = || DiskStore::open(dir.path(), options.clone()).unwrap();
    write(&open(), 0, 10);
    write(&open(), 10, 20);
    let whole = fs::read(&snapshots(dir.path())[0]).unwrap();
    for cut in [0, 1, whole.len() / 2, whole.len() - 1] {
        fs::write(dir.path().join("snap.00000000FFFFFFFF.generating"), &whole[..cut]).unwrap();
        let store = open();
        assert_eq!(count(&store), 20, "{cut} of {} bytes", whole.len());
        assert!(!store.rolled_back());
        assert_eq!(snapshots(dir.path()).len(), 1, "{cut} of {} bytes: leftovers", whole.len());
        store.shut_down().unwrap();
    }
}

fn snapshots(dir: &Path) -> Vec<PathBuf> {
    let paths = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    paths.filter(|path| path.file_name().unwrap().to_string_lossy().starts_with("snap.")).collect()
}

/// After the renaming sled overwrites what the older snapshot needs. A power cut can undo the first and keep
/// the second.
#[test]
fn what_sled_recovered_is_needed_though_its_name_was_lost() {
    let parent = tempfile::tempdir().unwrap();
    let (dir, cut) = (parent.path().join("store"), parent.path().join("cut"));
    let open = |dir: &Path| DiskStore::open(dir, StoreOptions::default().backend(BackendKind::Sled)).unwrap();
    let mut n = 0;
    let mut put = |store: &DiskStore, batches: u64| {
        for _ in 0..batches {
            let mut batch = Batch::new();
            batch.put(Keyspace::ROW, (n % 3_u64).to_be_bytes(), vec![n as u8; 20_000]);
            let commit = store.commit(batch).unwrap();
            store.wait_durable(commit).unwrap();
            n += 1;
        }
    };
    put(&open(&dir), 7);
    drop(open(&dir));
    for round in 0..8 {
        put(&open(&dir), 30 + 7 * (round % 5));
        let older = snapshots(&dir).remove(0);
        let older_bytes = fs::read(&older).unwrap();
        drop(open(&dir));
        for older_is_there in [true, false] {
            copy_dir(&dir, &cut);
            let newer = snapshots(&cut).remove(0);
            fs::rename(
                &newer,
                newer.with_extension(format!("{}.generating", newer.extension().unwrap().display())),
            )
            .unwrap();
            if older_is_there {
                fs::write(cut.join(older.file_name().unwrap()), &older_bytes).unwrap();
            }
            let store = DiskStore::open(&cut, StoreOptions::default());
            let store = store.unwrap_or_else(|e| panic!("round {round}, {older_is_there}: {e}"));
            assert_eq!((count(&store), store.rolled_back()), (3, false), "round {round}, {older_is_there}");
            store.shut_down().unwrap();
            fs::remove_dir_all(&cut).unwrap();
        }
    }
}

/// sled writes `conf` in two steps and syncs it never.
#[test]
fn a_making_of_sled_that_was_cut_short_is_done_again() {
    let parent = tempfile::tempdir().unwrap();
    let options = StoreOptions::default().backend(BackendKind::Sled);
    let whole = parent.path().join("whole");
    DiskStore::open(&whole, options.clone()).unwrap().shut_down().unwrap();
    let conf = fs::read(whole.join("conf")).unwrap();
    let halves = [0, 1, 8, 9, conf.len() - 4, conf.len() - 1, conf.len()].map(|cut| conf[..cut].to_vec());
    for (n, conf) in halves.into_iter().chain([vec![0; conf.len()]]).enumerate() {
        let dir = parent.path().join(format!("store {n}"));
        fs::create_dir_all(dir.join("blobs")).unwrap();
        fs::copy(whole.join("FORMAT"), dir.join("FORMAT")).unwrap();
        fs::write(dir.join("conf"), conf).unwrap();
        let store = DiskStore::open(&dir, options.clone()).unwrap_or_else(|e| panic!("{n}: {e}"));
        assert!(!store.rolled_back(), "{n}");
        write(&store, 0, 10);
        drop(store);
        assert_eq!(count(&DiskStore::open(&dir, options.clone()).unwrap()), 10, "{n}");
    }
}

/// To sled a large value that it can't read is the end of all that was written.
#[test]
fn a_large_value_that_can_not_be_read_now_costs_nothing() {
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("store");
    let options = || StoreOptions::default().backend(BackendKind::Sled);
    let store = DiskStore::open(&dir, options()).unwrap();
    let mut last = CommitNo(0);
    for n in 0..20_u64 {
        let mut batch = Batch::new();
        (0..3_u64).for_each(|key| batch.put(Keyspace::ROW, key.to_be_bytes(), vec![n as u8; 50_000]));
        last = store.commit(batch).unwrap();
    }
    store.wait_durable(last).unwrap();
    let kept = parent.path().join("kept");
    copy_dir(&dir, &kept);
    store.shut_down().unwrap();
    let blobs: Vec<PathBuf> =
        fs::read_dir(kept.join("blobs")).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(!blobs.is_empty());
    for blob in blobs {
        let bytes = fs::read(&blob).unwrap();
        fs::remove_file(&blob).unwrap();
        fs::create_dir(&blob).unwrap();
        let refused = DiskStore::open(&kept, options()).err().unwrap();
        assert!(matches!(refused, StoreError::Io { .. }), "{refused}");
        fs::remove_dir(&blob).unwrap();
        fs::write(&blob, bytes).unwrap();
    }
    let store = DiskStore::open(&kept, options()).unwrap();
    assert_eq!((count(&store), store.rolled_back(), store.durable().unwrap()), (3, false, last));
}

#[test]
fn commits_are_refused_while_space_is_short_and_reads_go_on() {
    for (_, options) in kinds() {
        let open = |dir: &Path| DiskStore::open(dir, options.clone());
        let dir = tempfile::tempdir().unwrap();
        write(&open(dir.path()).unwrap(), 0, 10);
        let options = options.clone().free_space_floor_bytes(u64::MAX / 2);
        let store = DiskStore::open(dir.path(), options).unwrap();
        assert!(matches!(store.commit(Batch::new()), Err(StoreError::NoSpace { .. })));
        assert_eq!(count(&store), 10);
        store.shut_down().unwrap();
    }
}

#[test]
fn a_damaged_store_is_moved_aside_whole() {
    for (_, options) in kinds() {
        let open = |dir: &Path| DiskStore::open(dir, options.clone());
        let parent = tempfile::tempdir().unwrap();
        let dir = parent.path().join("store");
        for n in 1..=2 {
            write(&open(&dir).unwrap(), 0, 50);
            fs::write(dir.join("FORMAT"), "nonsense").unwrap();
            let error = open(&dir).map(|_| ()).unwrap_err();
            let moved = parent.path().join(format!("store.damaged-{n}"));
            assert!(
                matches!(&error, StoreError::Damaged { what } if what.contains(&*moved.to_string_lossy()))
            );
            assert!(main_file(&moved).exists() && !dir.exists());
        }
        let store = open(&dir).unwrap();
        assert_eq!((count(&store), store.rolled_back()), (0, false), "opening again starts afresh");
    }
}

/// Bytes are flipped, files cut and zeroed at pseudo-random places. Each time either the
/// store opens and shows all of what was written, or what it lost is reported, or it is moved
/// aside; no panic gets out and no value is wrong. `ANABRANCH_DAMAGE_ROUNDS` sets how often.
fn random_damage_is_reported(name: &str, options: &StoreOptions) {
    const ENTRIES: u64 = 300;
    let parent = tempfile::tempdir().unwrap();
    let good = parent.path().join("good");
    let store = DiskStore::open(&good, options.clone()).unwrap();
    // Older values too, so that there are old pages which damage can lead to.
    for n in (0..ENTRIES).step_by(3) {
        let mut batch = Batch::new();
        batch.put(Keyspace::ROW, n.to_be_bytes(), "an older value");
        store.commit(batch).unwrap();
    }
    let last = write(&store, 0, ENTRIES);
    store.shut_down().unwrap();
    drop(store);
    let number = |name: &str| std::env::var(name).ok().and_then(|n| n.parse::<u64>().ok());
    let rounds = number("ANABRANCH_DAMAGE_ROUNDS").unwrap_or(24);
    let mut random = number("ANABRANCH_DAMAGE_SEED").unwrap_or(0x1234_5678) | 1;
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
        let path = pick_file(&dir, &mut next);
        let mut bytes = fs::read(&path).unwrap();
        // Most of a database is zeros: damage falls on what is in use.
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
        let context = format!("{name}, round {round}, {}", path.display());
        match DiskStore::open(&dir, options.clone()) {
            Err(StoreError::Damaged { what }) => {
                assert!(what.contains("damaged-1"), "{context}: {what}");
                let beside = path_beside(&dir);
                assert!(!dir.exists() && main_file(&beside).exists(), "{context}");
                fs::remove_dir_all(beside).unwrap();
                moved += 1;
            }
            Err(other) => panic!("{context}: {other:?}"),
            Ok(store) => {
                match check_values(&store, ENTRIES, &context).and_then(|()| store.verify()) {
                    Err(StoreError::Damaged { .. } | StoreError::Poisoned { .. }) => reported += 1,
                    Err(other) => panic!("{context}: {other:?}"),
                    Ok(found) if store.rolled_back() => {
                        assert!(found <= ENTRIES && store.durable().unwrap() >= last, "{context}");
                        reported += 1;
                    }
                    Ok(found) => {
                        assert_eq!(found, ENTRIES, "{context}: a silent loss");
                        whole += 1;
                    }
                }
                drop(store);
                fs::remove_dir_all(&dir).unwrap();
            }
        }
    }
    println!("{name}: of {rounds}: {moved} moved aside, {reported} reported, {whole} not harmed");
}

/// One of the store's files, the database most often.
fn pick_file(dir: &Path, next: &mut impl FnMut() -> usize) -> PathBuf {
    let names = fs::read_dir(dir).unwrap().filter_map(|entry| entry.unwrap().file_name().into_string().ok());
    let mut files: Vec<String> = names.filter(|name| dir.join(name).is_file() && name != "LOCK").collect();
    files.sort();
    let main = main_file(dir).file_name().unwrap().to_str().unwrap().to_owned();
    files.extend(std::iter::repeat_n(main, 4));
    dir.join(&files[next() % files.len()])
}

/// A store that says nothing of having lost something shows every value, and the right one.
fn check_values(store: &DiskStore, entries: u64, context: &str) -> Result<(), StoreError> {
    for n in 0..entries {
        match store.get(View::Published, Keyspace::ROW, &n.to_be_bytes())? {
            None => assert!(store.rolled_back(), "{context}: {n} is missing"),
            Some(value) if store.rolled_back() => {
                assert!(value == vec![n as u8; 300] || value == b"an older value", "{context}: {n}");
            }
            Some(value) => assert_eq!(value, vec![n as u8; 300], "{context}: {n} is wrong"),
        }
    }
    Ok(())
}

#[test]
fn random_damage_to_sled_is_reported() {
    random_damage_is_reported(kinds()[0].0, &kinds()[0].1);
}

#[test]
fn random_damage_to_redb_is_reported() {
    random_damage_is_reported(kinds()[1].0, &kinds()[1].1);
}

#[test]
fn random_damage_to_encrypted_sled_is_reported() {
    random_damage_is_reported(kinds()[2].0, &kinds()[2].1);
}

#[test]
fn random_damage_to_encrypted_redb_is_reported() {
    random_damage_is_reported(kinds()[3].0, &kinds()[3].1);
}

fn path_beside(dir: &Path) -> PathBuf {
    let mut name = dir.file_name().unwrap().to_owned();
    name.push(".damaged-1");
    dir.with_file_name(name)
}

#[test]
fn an_older_database_under_newer_commit_numbers_is_a_roll_back_until_handled() {
    for (_, options) in kinds() {
        let open = |dir: &Path| DiskStore::open(dir, options.clone());
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
}

#[test]
fn a_lost_database_or_lost_commit_numbers_are_a_roll_back() {
    for (_, options) in kinds() {
        let open = |dir: &Path| DiskStore::open(dir, options.clone());
        let parent = tempfile::tempdir().unwrap();
        let lost_db = parent.path().join("lost db");
        let newest = write(&open(&lost_db).unwrap(), 0, 20);
        for entry in fs::read_dir(&lost_db).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                fs::remove_dir_all(path).unwrap();
            } else if !["COMMITS", "FORMAT", "KEY"].iter().any(|name| path.ends_with(name)) {
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
}

#[test]
fn numbers_go_on_past_a_reserved_block() {
    for (_, options) in kinds() {
        let open = |dir: &Path| DiskStore::open(dir, options.clone());
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path()).unwrap();
        let last = write(&store, 0, 2500);
        drop(store);
        let store = open(dir.path()).unwrap();
        assert!(!store.rolled_back());
        assert_eq!(store.durable().unwrap(), last);
    }
}
