//! sled 0.34 as a backend: one tree, and the syncs that sled leaves out.
//!
//! sled's `flush` does not sync on Linux: it is `pwrite` and `sync_file_range`. So
//! [`Backend::sync`] syncs the same file through a second handle, and the files that sled
//! makes for large pages and never syncs.
//!
//! That is not enough. sled moves what is still needed out of a segment, flushes, and writes over the
//! segment, all between two of our syncs. `sync_file_range` writes data, not that the file has grown: in
//! a power cut the moved pages, at the end of a file that grew, were gone, and so was what they had
//! been moved from (one in ten to twenty cuts did not open again). So where the file system can, each
//! write to the file is made synchronous, which is what sled takes a flush for; then there is
//! nothing left to sync but blobs.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use anabranch_core::store::StoreError;
use sled::IVec;

use super::{Backend, Bytes, Change, Entries, Reader, Visit, file_error};
use crate::durability::lock;
use crate::files::{io_error, sync_dir};
use crate::keys::KeyRange;
use crate::options::StoreOptions;

/// sled collects garbage only when it flushes by itself.
const FLUSH_EVERY_MS: u64 = 500;

/// sled's threads let go of its files a little after the last handle was dropped.
const LOCK_WAIT: Duration = Duration::from_secs(2);
const LOCK_RETRY: Duration = Duration::from_millis(25);

/// See the [module](self).
pub(crate) struct Sled {
    db: sled::Db,
    files: Mutex<Files>,
    #[cfg(any(test, feature = "contract"))]
    syncs: bool,
}

impl Sled {
    pub(crate) fn open(dir: &Path, options: &StoreOptions) -> Result<Sled, StoreError> {
        remove_unfinished(dir).map_err(io_error("remove what an earlier opening left"))?;
        open_blobs(dir).map_err(io_error("open a file of large values"))?;
        let db = open_db(dir, options)?;
        // sled may have recovered what was written but never synced, and has perhaps just made
        // its files.
        db.flush().map_err(refused("flush"))?;
        let mut files = Files::open(dir).map_err(io_error("open the database file"))?;
        #[cfg(any(test, feature = "contract"))]
        let through = options.syncs;
        #[cfg(not(any(test, feature = "contract")))]
        let through = true;
        // First, since sled's own thread may write between this and the sync.
        if through && let Err(e) = files.write_through() {
            tracing::warn!(
                dir = %dir.display(), error = %e,
                "this file system has no synchronous files: a power cut may harm sled; redb is safe here"
            );
        }
        files.sync_names(dir).map_err(io_error("sync the store's files"))?;
        Ok(Sled {
            db,
            files: Mutex::new(files),
            #[cfg(any(test, feature = "contract"))]
            syncs: options.syncs,
        })
    }
}

/// sled writes a snapshot of what it has recovered while it opens, and renames it when it is whole. If
/// it was stopped before that it takes the half for the newest, and finds it damaged
/// (spacejam/sled, issue 1527). What the half was made from is still there; of a whole one it may be
/// overwritten, though its new name was lost in a power cut. Half a `conf` is damage to sled too, which
/// makes it anew where it is missing: it says the same in each store.
fn remove_unfinished(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        // How much lies between what is summed and the sum.
        let beside = match entry.file_name().to_str() {
            Some("conf") => 0,
            Some(name) if name.starts_with("snap.") && name.ends_with(".generating") => 8,
            _ => continue,
        };
        if !is_whole(&fs::read(entry.path())?, beside) {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Whether a file of sled's ends with the checksum of what comes before it and before `beside` bytes.
fn is_whole(file: &[u8], beside: usize) -> bool {
    let Some((rest, sum)) = file.split_last_chunk() else { return false };
    let summed = rest.len().checked_sub(beside).and_then(|end| rest.get(..end));
    summed.is_some_and(|summed| !summed.is_empty() && crc32fast::hash(summed) == u32::from_le_bytes(*sum))
}

/// A blob that sled can't open is to it the end of all that was written, and it writes over the rest. That
/// may pass (a right that is missing), so it is asked first.
fn open_blobs(dir: &Path) -> io::Result<()> {
    let blobs = match fs::read_dir(dir.join("blobs")) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        blobs => blobs?,
    };
    for blob in blobs {
        let path = blob?.path();
        if !File::options().read(true).write(true).open(&path)?.metadata()?.is_file() {
            return Err(io::Error::other(format!("{} is no file", path.display())));
        }
    }
    Ok(())
}

fn open_db(dir: &Path, options: &StoreOptions) -> Result<sled::Db, StoreError> {
    let config = sled::Config::new()
        .path(dir)
        .cache_capacity(options.cache_bytes)
        .flush_every_ms(Some(FLUSH_EVERY_MS));
    let started = Instant::now();
    loop {
        match config.open() {
            Ok(db) => return Ok(db),
            Err(sled::Error::Io(e)) if e.to_string().contains("could not acquire lock") => {
                if started.elapsed() >= LOCK_WAIT {
                    return Err(StoreError::InUse { dir: dir.display().to_string(), pid: 0 });
                }
                thread::sleep(LOCK_RETRY);
            }
            Err(e) => return Err(refused("open sled")(e)),
        }
    }
}

/// See [`BackendKind::wait_released`](super::BackendKind::wait_released). sled holds a lock on
/// its file for as long as a thread of it lives.
pub(crate) fn wait_released(dir: &Path) -> Result<(), StoreError> {
    let file = File::open(dir.join("db")).map_err(io_error("open the database file"))?;
    let started = Instant::now();
    while file.try_lock().is_err() {
        if started.elapsed() >= LOCK_WAIT {
            return Err(StoreError::InUse { dir: dir.display().to_string(), pid: std::process::id() });
        }
        thread::sleep(LOCK_RETRY);
    }
    Ok(())
}

impl Backend for Sled {
    fn shows_unsynced(&self) -> bool {
        true
    }

    fn reader(&self) -> Result<Box<dyn Reader + '_>, StoreError> {
        Ok(Box::new(&self.db))
    }

    fn apply(&self, changes: &[Change]) -> Result<(), StoreError> {
        let mut batch = sled::Batch::default();
        for change in changes {
            let key = &*change.stored_key;
            match &change.stored {
                Some(value) => batch.insert(key, &**value),
                None => batch.remove(key),
            }
        }
        self.db.apply_batch(batch).map_err(refused("commit"))?;
        self.db.flush().map_err(refused("flush"))?;
        Ok(())
    }

    fn sync(&self) -> Result<(), StoreError> {
        #[cfg(any(test, feature = "contract"))]
        if !self.syncs {
            return Ok(());
        }
        lock(&self.files).sync().map_err(io_error("sync"))
    }

    fn stored(&self) -> &dyn Backend {
        self
    }

    fn sealed(&self, key: Bytes, value: Option<Bytes>) -> Result<Change, StoreError> {
        Ok(Change::plain(key, value))
    }

    fn opened_entry(&self, key: &Bytes, stored: &Bytes) -> Result<(Bytes, Bytes), StoreError> {
        Ok((key.clone(), stored.clone()))
    }

    fn verify(&self) -> Result<(), StoreError> {
        // sled checks each page that it reads; reading every entry reads them all.
        Ok(())
    }

    fn trim(&self) -> Result<(), StoreError> {
        Ok(())
    }

    fn disk_bytes(&self) -> u64 {
        self.db.size_on_disk().unwrap_or(0)
    }
}

impl Reader for &sled::Db {
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, StoreError> {
        Ok(sled::Tree::get(self, key).map_err(refused("get"))?.map(|value| Bytes::from(&*value)))
    }

    fn range(&self, range: &KeyRange, descending: bool) -> Result<Entries<'_>, StoreError> {
        let entries = sled::Tree::range::<IVec, _>(self, range.bounds::<IVec>());
        let owned = |entry: sled::Result<(IVec, IVec)>| match entry {
            Ok((key, value)) => Ok((Bytes::from(&*key), Bytes::from(&*value))),
            Err(e) => Err(refused("scan")(e)),
        };
        if descending { Ok(Box::new(entries.rev().map(owned))) } else { Ok(Box::new(entries.map(owned))) }
    }

    fn walk(&self, visit: &mut Visit<'_>) -> Result<(), StoreError> {
        for entry in self.iter() {
            let (key, value) = entry.map_err(refused("scan"))?;
            visit(&key, &value)?;
        }
        Ok(())
    }
}

/// Makes each write to a file, or to those that will be made in a directory, durable when it
/// returns, through any handle and from now on.
#[cfg(target_os = "linux")]
fn write_through(file: &File) -> io::Result<()> {
    use rustix::fs::{IFlags, ioctl_getflags, ioctl_setflags};
    let flags = ioctl_getflags(file)?;
    if !flags.contains(IFlags::SYNC) {
        ioctl_setflags(file, flags | IFlags::SYNC)?;
    }
    Ok(())
}

/// Elsewhere sled syncs what it flushes.
#[cfg(not(target_os = "linux"))]
fn write_through(_: &File) -> io::Result<()> {
    Ok(())
}

fn refused(operation: &'static str) -> impl Fn(sled::Error) -> StoreError {
    move |error| match error {
        sled::Error::Io(e) => file_error(operation, e),
        other => StoreError::Damaged { what: format!("{operation}: {other}") },
    }
}

/// The files behind sled's back.
struct Files {
    db: File,
    /// Whether each write is durable when it returns.
    written_through: bool,
    blobs: PathBuf,
    synced_blobs: BTreeSet<OsString>,
}

impl Files {
    fn open(dir: &Path) -> io::Result<Files> {
        let db = File::options().read(true).write(true).open(dir.join("db"))?;
        Ok(Files { db, written_through: false, blobs: dir.join("blobs"), synced_blobs: BTreeSet::new() })
    }

    /// Syncs everything flushed so far.
    fn sync(&mut self) -> io::Result<()> {
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
        if self.written_through { Ok(()) } else { self.db.sync_data() }
    }

    /// From now on what sled has written is durable, in the order in which it was written.
    fn write_through(&mut self) -> io::Result<()> {
        if cfg!(target_os = "linux") {
            write_through(&self.db)?;
            write_through(&File::open(&self.blobs)?)?;
            self.written_through = true;
        }
        Ok(())
    }

    /// Syncs everything, and the names of the files.
    fn sync_names(&mut self, dir: &Path) -> io::Result<()> {
        self.sync()?;
        self.db.sync_all()?;
        File::options().write(true).open(dir.join("conf"))?.sync_all()?;
        sync_dir(&self.blobs)?;
        sync_dir(dir)?;
        dir.parent().map_or(Ok(()), sync_dir)
    }
}
