//! Power is cut at any moment; what had been acknowledged until then is there, whole.
//!
//! The store lies on an ext4 in a file. A writer is stopped (not killed: nothing may reach the
//! disk that would not have), its acknowledgements are counted, and the file is copied: it holds what
//! had reached the disk. Then the copy is mounted, which replays its journal, and opened.
//!
//! `ANABRANCH_POWER_ROUNDS` sets how often for each kind of store (4 by default),
//! `ANABRANCH_POWER_SEED` when the power goes. It takes root; others skip it.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::thread;
use std::time::{Duration, Instant};

use anabranch_store::{Store, open};

use crate::mount::{Mounted, can_mount, make_image};
use crate::workload::{Random, check, newest_acknowledged, number, options, start_writer};

const IMAGE_MB: u64 = 256;
/// Keeps the store smaller than the image.
const BATCHES_MAX: u64 = 600;
/// A fresh image after so many rounds on one.
const ROUNDS_PER_IMAGE: u64 = 4;

/// Ends the writer, also when the test panics: else the file system could not be unmounted.
struct Writer {
    child: Child,
    acknowledgements: PathBuf,
}

impl Writer {
    /// The acknowledgements go to a file outside of the image: whatever a stopped writer printed
    /// is there at once.
    fn start(kind: &str, store: &Path, scratch: &Path) -> Writer {
        let acknowledgements = scratch.join("acknowledged");
        let stdout = File::create(&acknowledgements).unwrap();
        Writer { child: start_writer(kind, store, BATCHES_MAX, stdout), acknowledgements }
    }

    fn acknowledged(&self) -> u64 {
        newest_acknowledged(fs::read_to_string(&self.acknowledgements).unwrap().lines())
    }

    fn stop(&self) {
        let stopped = Command::new("kill").args(["-STOP", &self.child.id().to_string()]).status().unwrap();
        assert!(stopped.success());
    }

    /// Waits until this many further batches are acknowledged, and a little.
    fn wait(&mut self, more: u64, wait: Duration) {
        let started = Instant::now();
        let mut first = 0;
        loop {
            let newest = self.acknowledged();
            first = if first == 0 { newest } else { first };
            if newest >= first + more && newest > 0 {
                break;
            }
            assert!(self.child.try_wait().unwrap().is_none(), "the writer ended by itself");
            assert!(started.elapsed() < Duration::from_secs(60), "the writer hangs");
            thread::sleep(Duration::from_millis(1));
        }
        thread::sleep(wait);
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a power cut did.
#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    Kept,
    Lost(String),
}

fn cut_power(kind: &str, rounds: u64) -> Vec<Outcome> {
    let mut random = Random::new(number("ANABRANCH_POWER_SEED").unwrap_or(0x51ed_2701));
    let scratch = tempfile::tempdir().unwrap();
    let mut outcomes = Vec::new();
    let mut image = PathBuf::new();
    for round in 0..rounds {
        if round % ROUNDS_PER_IMAGE == 0 {
            image = make_image(scratch.path(), IMAGE_MB);
        }
        let copy = scratch.path().join("copy");
        let acknowledged = {
            let mounted = Mounted::image(&image, scratch.path()).unwrap();
            let mut writer = Writer::start(kind, &mounted.dir().join("store"), scratch.path());
            writer.wait(random.below(200), Duration::from_micros(random.below(20_000)));
            writer.stop();
            let acknowledged = writer.acknowledged();
            mounted.copy_image(&image, &copy);
            acknowledged
        };
        // The next round goes on with what the power cut left.
        fs::rename(&copy, &image).unwrap();
        let mounted = Mounted::image(&image, scratch.path()).unwrap();
        let outcome = look(kind, &mounted.dir().join("store"), acknowledged);
        println!("{kind}, round {round}: {acknowledged} acknowledged, {outcome:?}");
        let lost = outcome != Outcome::Kept;
        outcomes.push(outcome);
        if lost {
            break;
        }
    }
    outcomes
}

fn look(kind: &str, dir: &Path, acknowledged: u64) -> Outcome {
    let store = match open(dir, options(kind)) {
        Ok(store) => store,
        Err(e) => return Outcome::Lost(format!("it does not open: {e}")),
    };
    let found = store.durable().unwrap().0;
    if store.rolled_back() {
        return Outcome::Lost(format!("rolled back to {found}"));
    }
    if found < acknowledged {
        return Outcome::Lost(format!("{found} is there"));
    }
    check(&*store, found);
    store.verify().unwrap();
    store.shut_down().unwrap();
    Outcome::Kept
}

fn what_was_acknowledged_outlives_a_power_cut(kind: &str) {
    if !can_mount("a power cut") {
        return;
    }
    let rounds = number("ANABRANCH_POWER_ROUNDS").unwrap_or(4);
    let outcomes = cut_power(kind, rounds);
    assert!(outcomes.iter().all(|outcome| *outcome == Outcome::Kept), "{kind}: {outcomes:?}");
    println!("{kind}: {rounds} power cuts");
}

/// The test proves something only if it fails where the store's syncs are left out.
fn without_syncs_a_power_cut_loses(kind: &str) {
    if !can_mount("a power cut without syncs") {
        return;
    }
    let outcomes = cut_power(kind, 8);
    assert!(outcomes.iter().any(|outcome| *outcome != Outcome::Kept), "{kind}: nothing was lost in 8 rounds");
}

#[test]
fn what_sled_acknowledged_outlives_a_power_cut() {
    what_was_acknowledged_outlives_a_power_cut("sled");
}

#[test]
fn what_redb_acknowledged_outlives_a_power_cut() {
    what_was_acknowledged_outlives_a_power_cut("redb");
}

#[test]
fn what_encrypted_sled_acknowledged_outlives_a_power_cut() {
    what_was_acknowledged_outlives_a_power_cut("sled encrypted");
}

#[test]
fn what_encrypted_redb_acknowledged_outlives_a_power_cut() {
    what_was_acknowledged_outlives_a_power_cut("redb encrypted");
}

#[test]
fn sled_without_syncs_loses_in_a_power_cut() {
    without_syncs_a_power_cut_loses("sled unsynced");
}

#[test]
fn redb_without_syncs_loses_in_a_power_cut() {
    without_syncs_a_power_cut_loses("redb unsynced");
}
