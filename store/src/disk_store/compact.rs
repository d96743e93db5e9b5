//! A store written anew beside itself, then put in its own place: without the space that the
//! backend had not given back, on another backend, encrypted or no longer.

use std::fs;
use std::path::Path;

use anabranch_core::store::{Store, StoreError};

use super::archive::Build;
use super::format::Format;
use super::snapshot::Snapshot;
use super::swap::{self, Places};
use super::usage::Usage;
use super::{DiskStore, open};
use crate::backend::BackendKind;
use crate::backup::{create_private_dir, sync_tree};
use crate::durability::lock;
use crate::encrypt::{self, Encrypted, StoreKey};
use crate::files::{io_error, replace};
use crate::options::StoreOptions;

/// What becomes of a store that is written anew.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct CompactOptions {
    /// What keeps it from now on; the backend that it has if `None`.
    pub backend: Option<BackendKind>,
    /// Whether it is encrypted from now on.
    pub encryption: Encryption,
}

impl CompactOptions {
    /// Sets [`CompactOptions::backend`].
    #[must_use]
    pub fn backend(mut self, kind: BackendKind) -> Self {
        self.backend = Some(kind);
        self
    }

    /// Sets [`CompactOptions::encryption`].
    #[must_use]
    pub fn encryption(mut self, encryption: Encryption) -> Self {
        self.encryption = encryption;
        self
    }
}

/// Whether a store that is written anew is encrypted.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub enum Encryption {
    /// As it was, with the same keys.
    #[default]
    Keep,
    /// No longer.
    Plain,
    /// With this key, and everything under a new data key, also if it was encrypted already.
    Key(StoreKey),
}

/// How far a store is that is written anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum CompactStep {
    /// So many entries were written.
    Copied(u64),
    /// So many of so many entries were compared.
    Compared(u64, u64),
    /// It is complete and durable; the old one was moved aside.
    MovedAside,
    /// It is in place; the old one will be removed.
    InPlace,
}

/// What became of a store that was written anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct CompactReport {
    /// What keeps it now.
    pub backend: BackendKind,
    /// Whether it is encrypted now.
    pub encrypted: bool,
    /// How many entries it has.
    pub entries: u64,
    /// Its bytes on disk before.
    pub bytes_before: u64,
    /// And now.
    pub bytes_after: u64,
}

/// Writes the store in `dir` anew, which must not be open, and compares every entry before
/// the new one takes the place of the old. Commit numbers and the store's identity go on.
/// Needs as much room as the store has live bytes. `options` open it as it is.
///
/// When this returns the new store is in place, durable, and the old one is gone. A kill at
/// any moment leaves a store that opens with everything, the old or the new; what else it
/// leaves is removed by the next opening.
///
/// # Errors
/// What [`DiskStore::open`] answers, [`StoreError::Damaged`] if the store is damaged,
/// [`StoreError::NotEncrypted`] if [`Encryption::Plain`] is asked for and it is plain already,
/// [`StoreError::Exists`] if something else is in the way, [`StoreError::Io`]. Then the store is as it was.
pub fn compact(
    dir: impl AsRef<Path>,
    options: StoreOptions,
    target: &CompactOptions,
    progress: &mut dyn FnMut(CompactStep),
) -> Result<CompactReport, StoreError> {
    let store = DiskStore::open(dir.as_ref(), options.clone())?;
    let places = Places::beside(dir.as_ref())?;
    if matches!(target.encryption, Encryption::Plain) && !store.is_encrypted() {
        return Err(StoreError::NotEncrypted { dir: places.dir.display().to_string() });
    }
    for path in [&places.building, &places.replaced] {
        if path.exists() {
            return Err(StoreError::Exists { path: path.display().to_string() });
        }
    }
    let bytes_before = store.stats().disk_bytes;
    let built = build(&store, &places, &options, target, progress);
    let (entries, bytes_after) = match built {
        Ok(built) => built,
        Err(e) => {
            swap::remove(&places.building);
            return Err(e);
        }
    };
    // The directory stays this process's own until the new one is in its place.
    let dir_lock = lock(&store.dir_lock).take();
    let was = store.backend();
    let (backend, encrypted) = (target.backend.unwrap_or(was), target.encrypted(&store));
    store.shut_down()?;
    // What it still removes, it removes by name.
    was.wait_released(&places.dir)?;
    places.swap(&mut || progress(CompactStep::MovedAside)).map_err(io_error("swap the directories"))?;
    progress(CompactStep::InPlace);
    places.remove_replaced();
    drop(dir_lock);
    Ok(CompactReport { backend, encrypted, entries, bytes_before, bytes_after })
}

impl CompactOptions {
    fn encrypted(&self, store: &DiskStore) -> bool {
        match self.encryption {
            Encryption::Keep => store.is_encrypted(),
            Encryption::Plain => false,
            Encryption::Key(_) => true,
        }
    }

    /// How the new store is opened.
    fn opens(&self, store: &DiskStore, options: &StoreOptions) -> StoreOptions {
        let mut options = options.clone();
        options.backend = Some(self.backend.unwrap_or(store.backend()));
        match &self.encryption {
            Encryption::Keep => {}
            Encryption::Plain => options.encryption = None,
            Encryption::Key(key) => options.encryption = Some(key.clone()),
        }
        options
    }
}

/// Makes the new store beside the old one, durable and compared: its entries and bytes.
fn build(
    store: &DiskStore,
    places: &Places,
    options: &StoreOptions,
    target: &CompactOptions,
    progress: &mut dyn FnMut(CompactStep),
) -> Result<(u64, u64), StoreError> {
    let opens = target.opens(store, options);
    create_private_dir(&places.building).map_err(io_error("make a directory"))?;
    let entries = copy(store, &places.building, &opens, target, progress)?;
    // As the next process will: from what is on disk.
    let new = DiskStore::open(&places.building, opens)?;
    let bytes = new.stats().disk_bytes;
    compare(store, &new, entries, progress)?;
    let kind = new.backend();
    new.shut_down()?;
    drop(new);
    kind.wait_released(&places.building)?;
    take_over(&places.dir, &places.building).map_err(io_error("set the owner of the new store"))?;
    sync_tree(&places.building).map_err(io_error("sync the new store"))?;
    Ok((entries, bytes))
}

fn copy(
    store: &DiskStore,
    to: &Path,
    opens: &StoreOptions,
    target: &CompactOptions,
    progress: &mut dyn FnMut(CompactStep),
) -> Result<u64, StoreError> {
    let kind = opens.backend.unwrap_or_default();
    let keep = matches!(target.encryption, Encryption::Keep);
    let data_key = match &target.encryption {
        Encryption::Key(key) => Some(encrypt::create_data_key(to, key)?),
        Encryption::Keep if store.is_encrypted() => {
            let key = fs::read(store.shared.dir.join(encrypt::KEY_FILE)).map_err(io_error("read KEY"))?;
            replace(to, encrypt::KEY_FILE, &key).map_err(io_error("write KEY"))?;
            None
        }
        _ => None,
    };
    Format::new(kind, target.encrypted(store)).save(to)?;
    let backend = kind.open(to, opens)?;
    let mut build = match data_key {
        Some(key) => Build::on(Box::new(Encrypted::open(backend, &key)?), kind, to),
        None => Build::on(backend, kind, to),
    };
    let mut snapshot = Snapshot::begin(&store.shared)?;
    let commits = lock(&store.shared.commits).copy_to(&to.join("COMMITS"));
    let epoch = commits.map_err(io_error("write COMMITS"))?.record().epoch;
    let own = match keep {
        true => snapshot.own_records(&epoch)?,
        false => open::own_records(&epoch, snapshot.last()).into(),
    };
    for (key, value) in own {
        build.put(key, value)?;
    }
    while let Some(page) = snapshot.page()? {
        for (key, value) in page {
            let revealed = snapshot.reveal(&key, &value)?;
            let (key, value) = if keep { (key, value) } else { revealed };
            build.put(key, value)?;
        }
        progress(CompactStep::Copied(build.entries));
    }
    let entries = build.entries;
    build.finish()?;
    Ok(entries)
}

/// Compares every entry of two stores, and how many there are.
fn compare(
    old: &DiskStore,
    new: &DiskStore,
    entries: u64,
    progress: &mut dyn FnMut(CompactStep),
) -> Result<(), StoreError> {
    let differs =
        || StoreError::Damaged { what: "the store that was written anew reads back differently".into() };
    let mut snapshot = Snapshot::begin(&old.shared)?;
    let backend = new.shared.published().backend()?.clone();
    let reader = backend.reader()?;
    let mut compared = 0;
    while let Some(page) = snapshot.page()? {
        for (key, value) in &page {
            let (key, value) = snapshot.reveal(key, value)?;
            if reader.get(&key)?.as_ref() != Some(&value) {
                return Err(differs());
            }
        }
        compared += page.len() as u64;
        progress(CompactStep::Compared(compared, entries));
    }
    drop(reader);
    if compared != entries || Usage::count(&new.shared)?.total().entries != entries {
        return Err(differs());
    }
    Ok(())
}

/// Gives the new directory the permissions of the old one, and its owner, in whose name the
/// store is opened next.
#[cfg(unix)]
fn take_over(old: &Path, new: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::{MetadataExt, chown};
    let (was, is) = (fs::metadata(old)?, fs::metadata(new)?);
    fs::set_permissions(new, was.permissions())?;
    if (was.uid(), was.gid()) == (is.uid(), is.gid()) {
        return Ok(());
    }
    fn give(path: &Path, uid: u32, gid: u32) -> std::io::Result<()> {
        chown(path, Some(uid), Some(gid))?;
        if path.is_dir() {
            for entry in fs::read_dir(path)? {
                give(&entry?.path(), uid, gid)?;
            }
        }
        Ok(())
    }
    give(new, was.uid(), was.gid())
}

#[cfg(not(unix))]
fn take_over(_: &Path, _: &Path) -> std::io::Result<()> {
    Ok(())
}
