//! The file `COMMITS`: how far the store had come, kept apart from the backend, so that a store
//! which has silently gone back is noticed.
//!
//! Three slots of one record each, 4 KiB apart so that a torn write spoils only one. Two
//! are written in turn and synced: when a store is made, when numbers are reserved, and
//! when it is shut down. The third is written without a sync after each sync of the backend: it
//! survives the death of the process for certain and power loss by chance, and costs next
//! to nothing.
//!
//! - `durable`: a commit that was durable when the record was written. A backend behind it
//!   has gone back.
//! - `reserved`: no commit above it was acknowledged, or even given to the backend. Reserved
//!   in blocks, so that one sync serves many commits. A backend above it means that this file has
//!   gone back.
//! - `epoch`: random, also inside the backend. Where they differ the files don't belong together.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;

use anabranch_core::store::StoreError;

use crate::files::{io_error, sync_dir};

/// Numbers reserved with one sync.
const BLOCK: u64 = 1024;

const MAGIC: [u8; 8] = *b"anabcmt1";
const RECORD_BYTES: usize = 64;
const SLOT_BYTES: u64 = 4096;
/// The slot that is written without a sync.
const HINT_SLOT: u64 = 2;

/// What tells one store from another.
pub(super) type Epoch = [u8; 16];

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Record {
    generation: u64,
    pub(super) epoch: Epoch,
    pub(super) reserved: u64,
    pub(super) durable: u64,
    /// A roll-back was found and not yet handled.
    pub(super) rolled_back: bool,
}

impl Record {
    fn encode(&self) -> [u8; RECORD_BYTES] {
        let mut out = [0; RECORD_BYTES];
        out[0..8].copy_from_slice(&MAGIC);
        out[8..16].copy_from_slice(&self.generation.to_be_bytes());
        out[16..32].copy_from_slice(&self.epoch);
        out[32..40].copy_from_slice(&self.reserved.to_be_bytes());
        out[40..48].copy_from_slice(&self.durable.to_be_bytes());
        out[48] = u8::from(self.rolled_back);
        let sum = crc32fast::hash(&out[..60]);
        out[60..].copy_from_slice(&sum.to_be_bytes());
        out
    }

    fn decode(bytes: &[u8; RECORD_BYTES]) -> Option<Record> {
        let number = |at: usize| bytes[at..].first_chunk().map(|b| u64::from_be_bytes(*b));
        if bytes[..8] != MAGIC || bytes[60..] != crc32fast::hash(&bytes[..60]).to_be_bytes() {
            return None;
        }
        Some(Record {
            // None is ever the last: another is written behind it.
            generation: number(8).filter(|generation| *generation < u64::MAX)?,
            epoch: *bytes[16..].first_chunk()?,
            reserved: number(32)?,
            durable: number(40)?,
            rolled_back: bytes[48] != 0,
        })
    }

    /// What the records of all slots say together.
    fn newest(found: &[Record]) -> Option<Record> {
        let mut record = found.iter().max_by_key(|record| record.generation)?.clone();
        // Both numbers only grow within an epoch, whichever slot they were written to.
        for other in found.iter().filter(|other| other.epoch == record.epoch) {
            record.reserved = record.reserved.max(other.reserved);
            record.durable = record.durable.max(other.durable);
        }
        Some(record)
    }
}

/// Reads bytes as the records of the file's slots and gives the record that is written next, for
/// tests of hostile input.
#[doc(hidden)]
pub fn reread_commits(slots: &[u8]) -> Option<Vec<u8>> {
    let (slots, _) = slots.as_chunks();
    let found: Vec<Record> = slots.iter().filter_map(Record::decode).collect();
    let mut record = Record::newest(&found)?;
    record.generation += 1;
    Some(record.encode().to_vec())
}

/// The open file. See the [module](self).
pub(super) struct Commits {
    file: File,
    record: Record,
}

impl Commits {
    /// Reads the file; `None` if there is none, or nothing in it can be trusted.
    pub(super) fn load(path: &Path) -> io::Result<Option<Commits>> {
        let mut file = match File::options().read(true).write(true).open(path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e),
        };
        let mut found = Vec::new();
        for slot in 0..=HINT_SLOT {
            let mut bytes = [0; RECORD_BYTES];
            file.seek(SeekFrom::Start(slot * SLOT_BYTES))?;
            match file.read_exact(&mut bytes) {
                Ok(()) => found.extend(Record::decode(&bytes)),
                Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {}
                Err(e) => return Err(e),
            }
        }
        Ok(Record::newest(&found).map(|record| Commits { file, record }))
    }

    /// Makes the file of a store whose newest durable commit is `durable`.
    pub(super) fn create(path: &Path, epoch: Epoch, durable: u64, rolled_back: bool) -> io::Result<Commits> {
        let reserved = durable.saturating_add(BLOCK);
        Commits::create_with(path, Record { generation: 0, epoch, reserved, durable, rolled_back })
    }

    /// Makes a file that says of a copy of the store what this one says.
    pub(super) fn copy_to(&self, path: &Path) -> io::Result<Commits> {
        Commits::create_with(path, Record { generation: 0, ..self.record.clone() })
    }

    fn create_with(path: &Path, record: Record) -> io::Result<Commits> {
        let file = File::options().read(true).write(true).create(true).truncate(true).open(path)?;
        let mut commits = Commits { file, record };
        commits.write_synced()?;
        commits.file.sync_all()?;
        if let Some(dir) = path.parent() {
            sync_dir(dir)?;
        }
        Ok(commits)
    }

    pub(super) fn record(&self) -> &Record {
        &self.record
    }

    /// Whether a backend with this epoch and newest commit is what this file was written for.
    pub(super) fn proves(&self, epoch: Option<Epoch>, last: u64) -> bool {
        let record = &self.record;
        epoch == Some(record.epoch)
            && (record.durable..=record.reserved).contains(&last)
            && !record.rolled_back
    }

    /// Writes down that a roll-back was found, before anything else is done about it.
    pub(super) fn begin_roll_back(&mut self) -> io::Result<()> {
        self.record.rolled_back = true;
        self.write_synced()
    }

    /// Takes up with a backend that goes on from `durable`.
    pub(super) fn adopt(&mut self, epoch: Epoch, durable: u64) -> io::Result<()> {
        self.record.epoch = epoch;
        self.record.durable = durable;
        self.record.reserved = durable.saturating_add(BLOCK);
        self.write_synced()
    }

    /// Confirms that the roll-back was handled.
    pub(super) fn settle(&mut self) -> Result<(), StoreError> {
        if self.record.rolled_back {
            self.record.rolled_back = false;
            self.write_synced().map_err(io_error("write COMMITS"))?;
        }
        Ok(())
    }

    /// Must return before commit `last` is given to the backend.
    pub(super) fn reserve(&mut self, last: u64) -> Result<(), StoreError> {
        if last > self.record.reserved {
            self.record.reserved = last.saturating_add(BLOCK);
            self.write_synced().map_err(io_error("reserve commit numbers"))?;
        }
        Ok(())
    }

    /// Notes, without a sync, that `durable` is durable now.
    pub(super) fn note_durable(&mut self, durable: u64) -> Result<(), StoreError> {
        self.record.durable = durable;
        self.write(HINT_SLOT).map_err(io_error("write COMMITS"))
    }

    /// Notes, with a sync, that `durable` is durable.
    pub(super) fn sync_durable(&mut self, durable: u64) -> Result<(), StoreError> {
        self.record.durable = durable;
        self.write_synced().map_err(io_error("write COMMITS"))
    }

    fn write_synced(&mut self) -> io::Result<()> {
        self.record.generation += 1;
        self.write(self.record.generation % HINT_SLOT)?;
        self.file.sync_data()
    }

    fn write(&mut self, slot: u64) -> io::Result<()> {
        self.file.seek(SeekFrom::Start(slot * SLOT_BYTES))?;
        self.file.write_all(&self.record.encode())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_numbers_survive_a_torn_slot() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("COMMITS");
        assert!(Commits::load(&path).unwrap().is_none());
        let mut commits = Commits::create(&path, [7; 16], 0, false).unwrap();
        commits.reserve(BLOCK).unwrap();
        assert_eq!(commits.record().reserved, BLOCK, "reserved already");
        commits.reserve(BLOCK + 1).unwrap();
        commits.note_durable(3).unwrap();
        let reserved = 2 * BLOCK + 1;
        let loaded = Commits::load(&path).unwrap().unwrap();
        assert_eq!((loaded.record().reserved, loaded.record().durable), (reserved, 3));

        // The generation before is intact when a slot is torn, and the hint has the rest.
        let mut file = File::options().write(true).open(&path).unwrap();
        file.seek(SeekFrom::Start((commits.record.generation % HINT_SLOT) * SLOT_BYTES + 33)).unwrap();
        file.write_all(&[9, 9]).unwrap();
        let loaded = Commits::load(&path).unwrap().unwrap();
        assert_eq!((loaded.record().reserved, loaded.record().durable), (reserved, 3));

        std::fs::write(&path, b"short").unwrap();
        assert!(Commits::load(&path).unwrap().is_none());

        let last = Record { generation: u64::MAX, ..loaded.record().clone() };
        std::fs::write(&path, last.encode()).unwrap();
        assert!(Commits::load(&path).unwrap().is_none(), "no generation comes behind it");
    }

    #[test]
    fn only_a_store_between_the_numbers_is_proved() {
        let dir = tempfile::tempdir().unwrap();
        let mut commits = Commits::create(&dir.path().join("COMMITS"), [7; 16], 0, false).unwrap();
        commits.note_durable(5).unwrap();
        assert!(commits.proves(Some([7; 16]), 5) && commits.proves(Some([7; 16]), BLOCK));
        assert!(!commits.proves(Some([7; 16]), 4), "the backend went back");
        assert!(!commits.proves(Some([7; 16]), BLOCK + 1), "COMMITS went back");
        assert!(!commits.proves(Some([8; 16]), 5) && !commits.proves(None, 5), "another store");
        commits.begin_roll_back().unwrap();
        assert!(!commits.proves(Some([7; 16]), 5), "not handled yet");
    }
}
