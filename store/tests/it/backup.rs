//! A backup made while writing goes on is one state, and a directory made of it has that state.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anabranch_store::{
    BackendKind, BackupReport, Batch, DiskStore, Keyspace, Store, StoreError, View, restore,
};

use crate::workload::{KINDS, any_backend, batch, check, options};

fn backup(store: &DiskStore, target: &Path) -> Result<BackupReport, StoreError> {
    store.backup(target, &[], &mut |_| {})
}

fn put_back(backup: &Path, dir: &Path) -> Result<BackupReport, StoreError> {
    restore(backup, dir, None, &mut |_, _| {})
}

/// The number of the newest batch in a store of [`batch`]es.
fn newest(store: &DiskStore) -> u64 {
    let value = store.get(View::Published, Keyspace::ROW, b"shared 00").unwrap();
    value.map_or(0, |value| u64::from_be_bytes(value.try_into().unwrap()))
}

#[test]
fn backups_beside_a_writer_are_whole_states() {
    for kind in KINDS {
        let scratch = tempfile::tempdir().unwrap();
        let store = DiskStore::open(scratch.path().join("store"), options(kind)).unwrap();
        let done = AtomicBool::new(false);
        let mut states = Vec::new();
        std::thread::scope(|threads| {
            let writer = threads.spawn(|| {
                let mut n = 0;
                while !done.load(Ordering::Relaxed) {
                    n += 1;
                    store.commit(batch(n)).unwrap();
                }
            });
            for round in 0..3 {
                while newest(&store) < 20 * (round + 1) {
                    assert!(!writer.is_finished());
                    std::thread::yield_now();
                }
                let target = scratch.path().join(format!("backup {round}"));
                let before = newest(&store);
                let report = backup(&store, &target).unwrap();
                assert!(report.commit >= before, "{kind}: a backup of the past");
                states.push((target, report, newest(&store)));
            }
            done.store(true, Ordering::Relaxed);
        });
        for (target, report, newest_after) in states {
            let data = target.with_extension("restored");
            assert_eq!(put_back(&target, &data).unwrap(), report);
            let restored = DiskStore::open(data.join("store"), options(kind)).unwrap();
            assert!(restored.rolled_back(), "{kind}: a restored store does not say so");
            let found = newest(&restored);
            assert_eq!(found, report.commit, "{kind}");
            assert!(found <= newest_after);
            check(&restored, found);
            assert_eq!(restored.usage().unwrap().total().entries, report.entries);
            restored.roll_back_handled().unwrap();
            drop(restored);
            assert!(!DiskStore::open(data.join("store"), options(kind)).unwrap().rolled_back());
        }
    }
}

fn filled(kind: &str, dir: &Path) -> DiskStore {
    let store = DiskStore::open(dir, options(kind)).unwrap();
    for n in 1..=40 {
        store.commit(batch(n)).unwrap();
    }
    let last = store.commit(batch(41)).unwrap();
    store.wait_durable(last).unwrap();
    store
}

#[test]
fn files_come_along_and_any_backend_takes_it() {
    for kind in KINDS {
        let scratch = tempfile::tempdir().unwrap();
        let path = |name: &str| scratch.path().join(name);
        let store = filled(kind, &path("data/store"));
        fs::create_dir(path("data/issuers")).unwrap();
        fs::write(path("data/device.key"), "secret").unwrap();
        fs::write(path("data/issuers/a b.pem"), "public").unwrap();
        let files =
            ["device.key", "issuers/a b.pem"].map(|name| (PathBuf::from(name), path("data").join(name)));
        let report = store.backup(path("backup"), &files, &mut |_| {}).unwrap();
        assert_eq!(report.files, files.clone().map(|(name, _)| name));
        assert_eq!((report.backend, report.encrypted), (store.backend(), store.is_encrypted()));
        #[cfg(unix)]
        for name in ["backup", "backup/entries", "backup/files/device.key"] {
            use std::os::unix::fs::PermissionsExt;
            assert_eq!(fs::metadata(path(name)).unwrap().permissions().mode() & 0o077, 0, "{name}");
        }
        for backend in BackendKind::ALL {
            let data = path(backend.name());
            restore(path("backup"), &data, Some(backend), &mut |_, _| {}).unwrap();
            assert_eq!(fs::read(data.join("device.key")).unwrap(), b"secret");
            assert_eq!(fs::read(data.join("issuers/a b.pem")).unwrap(), b"public");
            let restored = DiskStore::open(data.join("store"), any_backend(kind)).unwrap();
            assert_eq!((restored.backend(), restored.is_encrypted()), (backend, store.is_encrypted()));
            check(&restored, 41);
        }
    }
}

#[test]
fn nothing_is_overwritten_and_leftovers_are_not_in_the_way() {
    let scratch = tempfile::tempdir().unwrap();
    let path = |name: &str| scratch.path().join(name);
    let store = filled("sled", &path("store"));
    // As killed processes leave them.
    for name in ["backup.partial/files", "data.restoring/store"] {
        fs::create_dir_all(path(name)).unwrap();
        fs::write(path(name).join("half"), "half").unwrap();
    }
    backup(&store, &path("backup")).unwrap();
    assert!(matches!(backup(&store, &path("backup")), Err(StoreError::Exists { .. })));
    fs::create_dir(path("data")).unwrap();
    put_back(&path("backup"), &path("data")).unwrap();
    assert!(matches!(put_back(&path("backup"), &path("data")), Err(StoreError::Exists { .. })));
    let mut names: Vec<_> = fs::read_dir(scratch.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, ["backup", "data", "store"]);
    assert!(!path("data/store/half").exists());
}

#[test]
fn a_changed_backup_is_refused_and_restores_nothing() {
    for kind in ["sled", "redb encrypted"] {
        let scratch = tempfile::tempdir().unwrap();
        let path = |name: &str| scratch.path().join(name);
        fs::write(path("device.key"), "secret").unwrap();
        let store = filled(kind, &path("store"));
        let files = [(PathBuf::from("device.key"), path("device.key"))];
        store.backup(path("backup"), &files, &mut |_| {}).unwrap();
        let mut names = vec!["MANIFEST", "entries", "files/device.key"];
        if store.is_encrypted() {
            names.push("KEY");
        }
        for name in names {
            let file = path("backup").join(name);
            let good = fs::read(&file).unwrap();
            let step = (good.len() / 12).max(1);
            for at in (0..good.len()).step_by(step) {
                let mut bad = good.clone();
                bad[at] ^= 0x10;
                for bad in [&bad, &good[..at].to_vec()] {
                    fs::write(&file, bad).unwrap();
                    let refused = put_back(&path("backup"), &path("data"));
                    assert!(matches!(refused, Err(StoreError::Damaged { .. })), "{name}, {at}: {refused:?}");
                    assert!(!path("data").exists() && !path("data.restoring").exists(), "{name}");
                }
            }
            fs::write(&file, [&good[..], b"more"].concat()).unwrap();
            assert!(put_back(&path("backup"), &path("data")).is_err(), "{name}: longer");
            fs::remove_file(&file).unwrap();
            assert!(put_back(&path("backup"), &path("data")).is_err(), "{name}: missing");
            fs::write(&file, good).unwrap();
        }
        put_back(&path("backup"), &path("data")).unwrap();
        check(&DiskStore::open(path("data/store"), options(kind)).unwrap(), 41);
    }
}

/// Not a promise but a figure: what a backup costs those who write meanwhile. Printed with
/// `--nocapture`.
#[test]
fn writers_go_on_during_a_backup() {
    for kind in KINDS {
        let scratch = tempfile::tempdir().unwrap();
        let store = DiskStore::open(scratch.path().join("store"), options(kind)).unwrap();
        let value = vec![7; 8 << 10];
        for n in 0..20_u32 {
            let mut large = Batch::new();
            for k in 0..100_u32 {
                let key = [&[5; 48][..], &(n * 100 + k).to_be_bytes()].concat();
                large.put(Keyspace::DOC, key, value.clone());
            }
            store.wait_durable(store.commit(large).unwrap()).unwrap();
        }
        let rate = |store: &DiskStore, during: &dyn Fn() -> bool| {
            let started = Instant::now();
            let mut commits = 0_u32;
            let mut slowest = 0.0_f64;
            while during() {
                let one = Instant::now();
                let mut small = Batch::new();
                small.put(Keyspace::DOC, [&[5; 48][..], &(commits % 2000).to_be_bytes()].concat(), "small");
                store.wait_durable(store.commit(small).unwrap()).unwrap();
                slowest = slowest.max(one.elapsed().as_secs_f64());
                commits += 1;
            }
            (f64::from(commits) / started.elapsed().as_secs_f64(), slowest * 1000.0, commits)
        };
        let started = Instant::now();
        let alone = rate(&store, &|| started.elapsed().as_secs_f64() < 0.5);
        let done = AtomicBool::new(false);
        let beside = std::thread::scope(|threads| {
            threads.spawn(|| {
                backup(&store, &scratch.path().join("backup")).unwrap();
                done.store(true, Ordering::Relaxed);
            });
            rate(&store, &|| !done.load(Ordering::Relaxed))
        });
        assert!(beside.2 > 0, "{kind}: no commit became durable during a backup of 16 MB");
        println!(
            "{kind}: {:.0} commits/s alone (slowest {:.0} ms), {:.0} during a backup (slowest {:.0} ms)",
            alone.0, alone.1, beside.0, beside.1
        );
    }
}
