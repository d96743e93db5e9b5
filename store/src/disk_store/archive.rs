//! Backups of a store and directories made of them; their form is described in
//! [`backup`](crate::backup).

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anabranch_core::store::StoreError;

use super::commits::Commits;
use super::format::Format;
use super::lock::DirLock;
use super::snapshot::Snapshot;
use super::{Shared, open, swap};
use crate::backend::{Backend, BackendKind, Bytes, Change, put_in_order, release};
use crate::backup::{
    BackupReport, Entries, Manifest, Writer, create_private_dir, damaged, restore_file, sync_tree,
};
use crate::durability::lock;
use crate::encrypt::KEY_FILE;
use crate::files::{io_error, sync_dir};
use crate::keys::OWN;
use crate::options::StoreOptions;

/// See [`DiskStore::backup`](super::DiskStore::backup).
pub(super) fn backup(
    shared: &Shared,
    format: Format,
    target: &Path,
    files: &[(PathBuf, PathBuf)],
    progress: &mut dyn FnMut(u64),
) -> Result<BackupReport, StoreError> {
    let place = Place::prepare(target, ".partial")?;
    let written = write_backup(shared, format, &place.building, files, progress);
    let manifest = place.settle(written)?;
    Ok(manifest.report())
}

fn write_backup(
    shared: &Shared,
    format: Format,
    dir: &Path,
    files: &[(PathBuf, PathBuf)],
    progress: &mut dyn FnMut(u64),
) -> Result<Manifest, StoreError> {
    let io = io_error("write the backup");
    let mut writer = Writer::create(dir).map_err(&io)?;
    let mut snapshot = Snapshot::begin(shared)?;
    let epoch = lock(&shared.commits).record().epoch;
    for (key, value) in snapshot.own_records(&epoch)? {
        writer.entry(&key, &value).map_err(&io)?;
    }
    let mut entries = 0;
    while let Some(page) = snapshot.page()? {
        for (key, value) in &page {
            snapshot.reveal(key, value)?;
            writer.entry(key, value).map_err(&io)?;
        }
        entries += page.len() as u64;
        progress(entries);
    }
    let commit = snapshot.last();
    drop(snapshot);
    if format.encrypted {
        writer.key_file(&shared.dir.join(KEY_FILE)).map_err(&io)?;
    }
    for (name, from) in files {
        writer.given_file(name, from).map_err(&io)?;
    }
    writer.finish(format.version, format.backend, format.encrypted, commit).map_err(&io)
}

/// Makes `data_dir`, which must be empty or absent, of a backup: the store in `data_dir/store`, and beside
/// it the files that were given with the backup. `backend` keeps the store, else the one that it had. No key
/// is needed: an encrypted store stays so. Calls `progress` with the entries so far and their number.
///
/// When this returns, everything had the hash that the backup says, was compared once it was
/// written, and is durable. The store counts as rolled back
/// ([`DiskStore::rolled_back`](super::DiskStore::rolled_back)): it may be behind what it was.
///
/// # Errors
/// [`StoreError::Exists`], [`StoreError::Damaged`] if the backup is damaged,
/// [`StoreError::NewerFormat`], [`StoreError::Io`]. Then `data_dir` is as it was.
pub fn restore(
    backup: impl AsRef<Path>,
    data_dir: impl AsRef<Path>,
    backend: Option<BackendKind>,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<BackupReport, StoreError> {
    let backup = backup.as_ref();
    let manifest = Manifest::load(backup)?;
    Format::check_version(manifest.format)?;
    let place = Place::prepare(data_dir.as_ref(), ".restoring")?;
    let written = write_restored(backup, &manifest, &place.building, backend, progress);
    place.settle(written)?;
    Ok(manifest.report())
}

fn write_restored(
    backup: &Path,
    manifest: &Manifest,
    dir: &Path,
    backend: Option<BackendKind>,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(), StoreError> {
    for (part, path) in manifest.given() {
        restore_file(backup, part, &dir.join(path))?;
    }
    let store = dir.join("store");
    create_private_dir(&store).map_err(io_error("create the store's directory"))?;
    if let Some(part) = manifest.key() {
        restore_file(backup, part, &store.join(KEY_FILE))?;
    }
    let format = Format::new(backend.unwrap_or(manifest.backend), manifest.encrypted);
    format.save(&store)?;
    let mut build = Build::begin(&store, format.backend, &StoreOptions::default())?;
    let mut entries = Entries::open(backup, manifest)?;
    while let Some((key, value)) = entries.next()? {
        build.put(key, value)?;
        progress(build.entries, manifest.entries);
    }
    build.finish()?;
    compare(&*format.backend.open(&store, &StoreOptions::default())?, backup, manifest)?;
    format.backend.wait_released(&store)?;
    let commits = Commits::create(&store.join("COMMITS"), open::new_epoch()?, manifest.commit, true);
    commits.map_err(io_error("write COMMITS"))?;
    Ok(())
}

/// Compares what is stored with the backup, entry by entry.
fn compare(backend: &dyn Backend, backup: &Path, manifest: &Manifest) -> Result<(), StoreError> {
    let mut entries = Entries::open(backup, manifest)?;
    let reader = backend.reader()?;
    while let Some((key, value)) = entries.next()? {
        if reader.get(&key)? != Some(value) {
            return Err(damaged("what was restored reads back differently".into()));
        }
    }
    let mut count = 0;
    reader.walk(&mut |key, _| {
        count += u64::from(!key.starts_with(&[OWN.0]));
        Ok(())
    })?;
    if count != manifest.entries {
        return Err(damaged(format!("it says {} entries and has {count}", manifest.entries)));
    }
    Ok(())
}

/// A store that is filled entry by entry.
pub(super) struct Build {
    backend: Box<dyn Backend>,
    kind: BackendKind,
    dir: PathBuf,
    changes: Vec<Change>,
    bytes: usize,
    /// How many were put, without the store's own.
    pub(super) entries: u64,
}

/// Changes that are written at once: each group costs a sync.
const GROUP_BYTES_MAX: usize = 8 << 20;

impl Build {
    pub(super) fn begin(dir: &Path, kind: BackendKind, options: &StoreOptions) -> Result<Build, StoreError> {
        let backend = kind.open(dir, options)?;
        Ok(Build::on(backend, kind, dir))
    }

    /// The same on top of a backend that is open.
    pub(super) fn on(backend: Box<dyn Backend>, kind: BackendKind, dir: &Path) -> Build {
        Build { backend, kind, dir: dir.to_owned(), changes: Vec::new(), bytes: 0, entries: 0 }
    }

    pub(super) fn put(&mut self, key: Bytes, value: Bytes) -> Result<(), StoreError> {
        self.entries += u64::from(!key.starts_with(&[OWN.0]));
        self.bytes += key.len() + value.len();
        self.changes.push(self.backend.sealed(key, Some(value))?);
        if self.bytes >= GROUP_BYTES_MAX {
            self.write()?;
        }
        Ok(())
    }

    fn write(&mut self) -> Result<(), StoreError> {
        put_in_order(&mut self.changes);
        self.backend.apply(&self.changes)?;
        self.changes.clear();
        self.bytes = 0;
        Ok(())
    }

    /// Makes everything durable and lets go of the files.
    pub(super) fn finish(mut self) -> Result<(), StoreError> {
        self.write()?;
        self.backend.trim()?;
        self.backend.sync()?;
        release(self.backend);
        self.kind.wait_released(&self.dir)
    }
}

/// A directory that is made under another name, and renamed when it is complete.
struct Place {
    target: PathBuf,
    building: PathBuf,
    /// In the directory that is built, of which one process at a time takes care.
    lock: DirLock,
}

impl Place {
    /// Refuses a target that is neither absent nor an empty directory. Removes what a killed process left.
    fn prepare(target: &Path, suffix: &str) -> Result<Place, StoreError> {
        let io = io_error("make a directory");
        let name = target.file_name().ok_or_else(|| io(io::Error::other("it has no name")))?;
        let parent =
            target.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        create_private_dir(parent).map_err(&io)?;
        let target = parent.canonicalize().map_err(&io)?.join(name);
        let empty = match fs::read_dir(&target) {
            Ok(mut entries) => entries.next().is_none(),
            Err(e) => e.kind() == io::ErrorKind::NotFound,
        };
        if !empty {
            return Err(StoreError::Exists { path: target.display().to_string() });
        }
        let mut name = name.to_owned();
        name.push(suffix);
        let building = target.with_file_name(name);
        create_private_dir(&building).map_err(&io)?;
        let lock = DirLock::take(&building)?;
        for entry in fs::read_dir(&building).map_err(&io)? {
            let entry = entry.map_err(&io)?;
            if entry.file_name() == "LOCK" {
                continue;
            }
            let is_dir = entry.file_type().map_err(&io)?.is_dir();
            let removed =
                if is_dir { fs::remove_dir_all(entry.path()) } else { fs::remove_file(entry.path()) };
            removed.map_err(&io)?;
        }
        Ok(Place { target, building, lock })
    }

    /// Gives the directory its name if it is complete, removes it otherwise.
    fn settle<T>(self, written: Result<T, StoreError>) -> Result<T, StoreError> {
        let finish = || {
            fs::remove_file(self.building.join("LOCK"))?;
            sync_tree(&self.building)?;
            fs::rename(&self.building, &self.target)?;
            self.target.parent().map_or(Ok(()), sync_dir)
        };
        let settled = written.and_then(|written| match finish() {
            Ok(()) => Ok(written),
            Err(e) => Err(io_error("put the directory in its place")(e)),
        });
        if settled.is_err() {
            swap::remove(&self.building);
        }
        drop(self.lock);
        settled
    }
}
