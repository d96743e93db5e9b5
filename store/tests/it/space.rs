//! A disk that is full: writes are refused, nothing waits for ever, nobody sees what is not
//! durable, and with room again everything that was acknowledged is there. It takes root.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anabranch_store::{CommitNo, DiskStore, Keyspace, Store, StoreError, View};

use crate::mount::{Mounted, can_mount, make_image};
use crate::workload::{KINDS, batch, check, options};

const IMAGE_MB: u64 = 34;
/// Commits of which only the last one is waited for.
const BURST: u64 = 16;
/// Longer than anything here takes by far.
const HANGS_AFTER: Duration = Duration::from_secs(180);

/// What fills the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Filler {
    /// The store itself, up to the default floor.
    Store,
    /// The store itself, with a floor of nothing.
    StoreWithoutFloor,
    /// Others, to the last byte, between two commits.
    Others,
}

#[test]
fn a_full_disk_refuses_and_loses_nothing() {
    if !can_mount("a full disk") {
        return;
    }
    for kind in KINDS {
        for filled in [Filler::Store, Filler::StoreWithoutFloor, Filler::Others] {
            let scratch = tempfile::tempdir().unwrap();
            let image = make_image(scratch.path(), IMAGE_MB);
            let mounted = Mounted::image(&image, scratch.path()).unwrap();
            let (done, result) = mpsc::channel::<()>();
            let dir = mounted.dir().to_owned();
            let body = thread::spawn(move || {
                // Sent when the thread ends, by a panic too.
                let _done = done;
                fill_and_go_on(kind, filled, &dir);
            });
            let hangs = result.recv_timeout(HANGS_AFTER) == Err(mpsc::RecvTimeoutError::Timeout);
            assert!(!hangs, "{kind}, {filled:?}: it hangs");
            if let Err(panic) = body.join() {
                std::panic::resume_unwind(panic);
            }
        }
    }
}

fn fill_and_go_on(kind: &str, filled: Filler, dir: &Path) {
    let context = format!("{kind}, {filled:?}");
    let ballast = dir.join("ballast");
    // What is left above the floor is a few megabytes.
    let ballast_mb = if filled == Filler::StoreWithoutFloor { 20 } else { 8 };
    write_zeros(&ballast, ballast_mb << 20).unwrap();
    let mut options = options(kind);
    if filled == Filler::StoreWithoutFloor {
        options = options.free_space_floor_bytes(0);
    }
    if filled == Filler::Others {
        options = options.free_space_floor_bytes(1 << 20);
    }
    let store = DiskStore::open(dir.join("store"), options.clone()).unwrap();
    let acknowledged = AtomicU64::new(0);
    let refused = watched(&store, &context, || write_until_refused(&store, filled, dir, &acknowledged));
    let acknowledged = acknowledged.into_inner();
    println!("{context}: {acknowledged} acknowledged, then: {refused}");
    let category_says_so = match &refused {
        StoreError::NoSpace { .. } => refused.to_string().contains("free some space"),
        // The system refused in the middle of a commit.
        StoreError::Poisoned { cause } => filled == Filler::Others && cause.contains("No space left"),
        _ => false,
    };
    assert!(category_says_so, "{context}: {refused:?}");

    if filled != Filler::Others {
        // Reads go on. Where nothing at all is left, sled refuses even those.
        let newest = store.durable().unwrap();
        check(&store, newest.0);
        assert!(matches!(store.commit(batch(newest.0 + 1)), Err(StoreError::NoSpace { .. })));
    }
    let _ = store.shut_down();
    drop(store);
    match DiskStore::open(dir.join("store"), options.clone()) {
        // Where there is just enough room to open it, all of it is there.
        Ok(store) => whole(&store, acknowledged, &context),
        Err(StoreError::NoSpace { .. }) => {}
        Err(other) => panic!("{context}: it opens neither nor says that space is short: {other}"),
    }

    fs::remove_file(&ballast).unwrap();
    let _ = fs::remove_file(dir.join("others"));
    // The file system gives the room back with its next commit.
    File::open(dir).unwrap().sync_all().unwrap();
    let store = DiskStore::open(dir.join("store"), options).unwrap_or_else(|e| panic!("{context}: {e}"));
    whole(&store, acknowledged, &context);
    let newest = store.durable().unwrap().0;
    for n in newest + 1..=newest + 10 {
        store.wait_durable(store.commit(batch(n)).unwrap()).unwrap();
    }
    check(&store, newest + 10);
    store.verify().unwrap();
}

fn whole(store: &DiskStore, acknowledged: u64, context: &str) {
    let newest = store.durable().unwrap().0;
    assert!(newest >= acknowledged && !store.rolled_back(), "{context}: {newest} of {acknowledged}");
    check(store, newest);
}

/// Runs `body` while readers look for what is torn or not durable.
fn watched<T>(store: &DiskStore, context: &str, body: impl FnOnce() -> T) -> T {
    let done = AtomicBool::new(false);
    thread::scope(|threads| {
        for _ in 0..2 {
            threads.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    let Ok(seen) = store.scan(View::Published, Keyspace::ROW, b"shared", b"", 99) else {
                        return;
                    };
                    let Some((_, first)) = seen.first() else { continue };
                    assert!(seen.iter().all(|(_, value)| value == first), "{context}: a torn batch");
                    let number = u64::from_be_bytes(first[..].try_into().unwrap());
                    // Published just before it is told; a store that has failed tells nothing more.
                    while let Ok(durable) = store.durable() {
                        if durable.0 >= number {
                            break;
                        }
                        thread::yield_now();
                    }
                }
            });
        }
        let result = body();
        done.store(true, Ordering::Relaxed);
        result
    })
}

fn write_until_refused(
    store: &DiskStore,
    filled: Filler,
    dir: &Path,
    acknowledged: &AtomicU64,
) -> StoreError {
    for n in 1..100_000 {
        if filled == Filler::Others && n == 100 {
            let full = write_zeros(&dir.join("others"), u64::MAX).unwrap_err();
            assert_eq!(full.kind(), std::io::ErrorKind::StorageFull);
        }
        let mut done = store.commit(batch(n));
        if let Ok(commit) = done
            && n % BURST == 0
        {
            done = store.wait_durable(commit).map(|()| commit);
        }
        match done {
            Ok(_) if n % BURST == 0 => acknowledged.store(n, Ordering::Relaxed),
            Ok(_) => {}
            Err(e) => {
                // What was queued before becomes durable, unless the store has failed.
                if store.wait_durable(CommitNo(n - 1)).is_ok() {
                    acknowledged.store(n - 1, Ordering::Relaxed);
                }
                return e;
            }
        }
    }
    panic!("the disk was never full");
}

fn write_zeros(path: &Path, bytes: u64) -> std::io::Result<()> {
    let mut file = File::create(path)?;
    let zeros = vec![0; 64 << 10];
    let mut left = bytes;
    while left > 0 {
        let part = left.min(zeros.len() as u64);
        file.write_all(&zeros[..part as usize])?;
        left -= part;
    }
    file.sync_all()
}
