//! What stands between sled and the disk: the checksum of each value, the sync that sled
//! leaves out, and the floor of free space.

use std::any::Any;
use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anabranch_core::store::StoreError;
use sled::IVec;

const CHECKSUM_BYTES: usize = 4;

/// Appends the checksum. It covers the key too, so that a value under a wrong key is noticed.
pub(super) fn seal(key: &[u8], mut value: Vec<u8>) -> IVec {
    value.extend_from_slice(&checksum(key, &value));
    value.into()
}

/// The value without its checksum, if that is right.
pub(super) fn unseal<'a>(key: &[u8], stored: &'a [u8]) -> Result<&'a [u8], StoreError> {
    match stored.split_last_chunk::<CHECKSUM_BYTES>() {
        Some((value, sum)) if *sum == checksum(key, value) => Ok(value),
        _ => {
            let (keyspace, key) = key.split_first().unwrap_or((&0, &[]));
            let mut what = format!("the checksum of a value is wrong: keyspace {keyspace}, key ");
            for byte in key {
                let _ = write!(what, "{byte:02x}");
            }
            Err(StoreError::Damaged { what })
        }
    }
}

fn checksum(key: &[u8], value: &[u8]) -> [u8; CHECKSUM_BYTES] {
    let mut hasher = crc32fast::Hasher::new();
    // Lengths are part of it, or bytes could move from the key to the value unnoticed.
    hasher.update(&(key.len() as u64).to_be_bytes());
    hasher.update(key);
    hasher.update(value);
    hasher.finalize().to_be_bytes()
}

/// The words of a panic.
pub(super) fn panic_words(panic: &(dyn Any + Send)) -> String {
    if let Some(words) = panic.downcast_ref::<&str>() {
        (*words).to_owned()
    } else if let Some(words) = panic.downcast_ref::<String>() {
        words.clone()
    } else {
        "no words".to_owned()
    }
}

/// Says whether sled met damage or the system refused.
pub(super) fn sled_error(operation: &'static str, error: sled::Error) -> StoreError {
    use io::ErrorKind::{InvalidData, NotFound, UnexpectedEof};
    match error {
        // A file that is missing or too short, once the store is open, is damage.
        sled::Error::Io(e) if !matches!(e.kind(), InvalidData | NotFound | UnexpectedEof) => {
            StoreError::Io { operation, cause: e.to_string() }
        }
        other => StoreError::Damaged { what: format!("{operation}: {other}") },
    }
}

pub(super) fn io_error(operation: &'static str) -> impl Fn(io::Error) -> StoreError {
    move |e| StoreError::Io { operation, cause: e.to_string() }
}

/// Syncs a directory, so that the names in it survive power loss. Only Unix can and must.
pub(super) fn sync_dir(dir: &Path) -> io::Result<()> {
    if cfg!(unix) { File::open(dir)?.sync_all() } else { Ok(()) }
}

/// Syncs what sled has written and flushed.
pub(super) struct Disk {
    db: File,
    blobs: PathBuf,
    synced_blobs: BTreeSet<OsString>,
}

impl Disk {
    pub(super) fn open(dir: &Path) -> io::Result<Disk> {
        let db = File::options().read(true).write(true).open(dir.join("db"))?;
        Ok(Disk { db, blobs: dir.join("blobs"), synced_blobs: BTreeSet::new() })
    }

    /// When this returns, everything flushed before the call survives power loss.
    pub(super) fn sync(&mut self) -> io::Result<()> {
        // sled writes a page above 128 KiB, such as one of many larger values, to a file of
        // its own and never syncs that.
        let mut present = BTreeSet::new();
        let mut news = false;
        for entry in fs::read_dir(&self.blobs)? {
            let name = entry?.file_name();
            if !self.synced_blobs.contains(&name) {
                match File::options().write(true).open(self.blobs.join(&name)) {
                    Ok(blob) => blob.sync_all()?,
                    // sled removes what it has replaced meanwhile.
                    Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                    Err(e) => return Err(e),
                }
                news = true;
            }
            present.insert(name);
        }
        self.synced_blobs = present;
        if news {
            sync_dir(&self.blobs)?;
        }
        self.db.sync_data()
    }
}

/// Watches free space without asking the system on each commit.
pub(super) struct Space {
    dir: PathBuf,
    floor_bytes: u64,
    /// The last answer and what may still happen before the next question.
    known: Option<Known>,
}

struct Known {
    asked: Instant,
    commits_left: u32,
    bytes_left: u64,
}

const ASK_AFTER: Duration = Duration::from_secs(1);
const ASK_AFTER_COMMITS: u32 = 256;
const ASK_AFTER_BYTES: u64 = 1 << 20;

impl Space {
    pub(super) fn new(dir: &Path, floor_bytes: u64) -> Self {
        Space { dir: dir.to_path_buf(), floor_bytes, known: None }
    }

    /// Refuses a commit while there is less free space than the floor.
    pub(super) fn check(&mut self, bytes: u64) -> Result<(), StoreError> {
        if let Some(known) = &mut self.known
            && known.commits_left > 0
            && known.bytes_left >= bytes
            && known.asked.elapsed() < ASK_AFTER
        {
            known.commits_left -= 1;
            known.bytes_left -= bytes;
            return Ok(());
        }
        self.known = None;
        let free_bytes = fs4::available_space(&self.dir).map_err(io_error("ask for free space"))?;
        if free_bytes < self.floor_bytes.saturating_add(bytes) {
            return Err(StoreError::NoSpace { free_bytes, floor_bytes: self.floor_bytes });
        }
        self.known = Some(Known {
            asked: Instant::now(),
            commits_left: ASK_AFTER_COMMITS,
            bytes_left: ASK_AFTER_BYTES,
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flipped_bit_or_a_wrong_key_is_noticed_and_named() {
        let sealed = seal(b"\x05key", b"value".to_vec());
        assert_eq!(unseal(b"\x05key", &sealed).unwrap(), b"value");
        let mut flipped = sealed.to_vec();
        flipped[2] ^= 1;
        let error = unseal(b"\x05key", &flipped).unwrap_err().to_string();
        assert!(error.contains("keyspace 5") && error.contains("6b6579"), "{error}");
        assert!(unseal(b"\x05kez", &sealed).is_err());
        assert!(unseal(b"\x05key", b"abc").is_err(), "shorter than a checksum");
    }

    #[test]
    fn free_space_is_asked_for_again_after_many_commits_or_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let mut space = Space::new(dir.path(), 0);
        space.check(1).unwrap();
        // Stands for a disk that fills up after the first question.
        space.floor_bytes = u64::MAX;
        space.check(1).unwrap();
        assert!(matches!(space.check(ASK_AFTER_BYTES), Err(StoreError::NoSpace { .. })));
        assert!(matches!(space.check(1), Err(StoreError::NoSpace { .. })), "asked each time while short");
    }
}
