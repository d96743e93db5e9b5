//! Another directory in the place of a store's, so that a kill at any moment leaves a store.
//!
//! ```text
//! store + store.compacting      being built: `store` is the store
//! store.replaced + store.compacting    complete: it is to take the place
//! store.replaced + store        in place; the old one can go
//! store.removing + store        it goes
//! ```
//! Two renames lead from one to the next. The lock on the old directory is held throughout and
//! moves with it: whoever finds no `store` waits for it, then takes the second step.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anabranch_core::store::StoreError;

use super::commits::{Commits, Epoch};
use super::lock::DirLock;
use crate::files::{io_error, sync_dir};

/// The directories of a swap.
pub(super) struct Places {
    pub(super) dir: PathBuf,
    pub(super) building: PathBuf,
    pub(super) replaced: PathBuf,
    /// What is certainly not needed: a removal that was cut short goes on whatever is left.
    removing: PathBuf,
}

impl Places {
    /// `None` for a path without a name, which can't be renamed either.
    fn of(dir: &Path) -> Option<Places> {
        let beside = |suffix: &str| {
            let mut name = dir.file_name()?.to_owned();
            name.push(suffix);
            Some(dir.with_file_name(name))
        };
        let (building, replaced) = (beside(".compacting")?, beside(".replaced")?);
        let removing = beside(".removing")?;
        Some(Places { dir: dir.to_owned(), building, replaced, removing })
    }

    /// The places beside a directory that exists.
    pub(super) fn beside(dir: &Path) -> Result<Places, StoreError> {
        let dir = dir.canonicalize().map_err(io_error("find the store's directory"))?;
        Places::of(&dir)
            .ok_or(StoreError::Io { operation: "find the store's directory", cause: "it has no name".into() })
    }

    fn sync_names(&self) -> io::Result<()> {
        self.dir.parent().map_or(Ok(()), sync_dir)
    }

    /// Puts the directory that was built in the place of the store's, whose lock the caller
    /// holds. `moved_aside` is called between the two steps.
    pub(super) fn swap(&self, moved_aside: &mut dyn FnMut()) -> io::Result<()> {
        self.sync_names()?;
        fs::rename(&self.dir, &self.replaced)?;
        self.sync_names()?;
        moved_aside();
        if let Err(e) = fs::rename(&self.building, &self.dir) {
            fs::rename(&self.replaced, &self.dir)?;
            return Err(e);
        }
        self.sync_names()
    }
}

impl Places {
    /// Removes the directory that made way. It is renamed first: half of it could not be told from
    /// somebody else's.
    pub(super) fn remove_replaced(&self) {
        match fs::rename(&self.replaced, &self.removing) {
            // Else the name could be lost in a power cut, and half of it not.
            Ok(()) => match self.sync_names() {
                Ok(()) => remove(&self.removing),
                Err(error) => {
                    tracing::warn!(dir = %self.removing.display(), %error, "a directory that is not needed stays until the next opening");
                }
            },
            Err(error) => {
                tracing::warn!(dir = %self.replaced.display(), %error, "a directory that is not needed could not be removed");
            }
        }
    }
}

/// Takes the second step of a swap, if a kill fell between the two.
pub(super) fn finish(dir: &Path) -> Result<(), StoreError> {
    let Some(places) = Places::of(&resolved(dir)) else { return Ok(()) };
    let interrupted = || !places.dir.exists() && places.replaced.exists();
    if !interrupted() {
        return Ok(());
    }
    let lock = match DirLock::take(&places.replaced) {
        // Someone else took the step meanwhile.
        Err(_) if !interrupted() => return Ok(()),
        lock => lock?,
    };
    if interrupted() {
        // What was moved aside made way for a complete directory.
        let complete = if places.building.exists() { &places.building } else { &places.replaced };
        tracing::info!(from = %complete.display(), "finishing the replacement of a store that was interrupted");
        fs::rename(complete, &places.dir)
            .and_then(|()| places.sync_names())
            .map_err(io_error("finish the replacement of a store"))?;
    }
    drop(lock);
    Ok(())
}

/// Where the directory lies, also if it is a link to one that is missing.
fn resolved(dir: &Path) -> PathBuf {
    let target = match fs::read_link(dir) {
        Ok(link) => dir.parent().map_or_else(|| link.clone(), |parent| parent.join(&link)),
        Err(_) => dir.to_owned(),
    };
    let parent = target.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    match (parent.canonicalize(), target.file_name()) {
        (Ok(parent), Some(name)) => parent.join(name),
        _ => target,
    }
}

/// Removes what a killed swap left beside a store that is open: one that was never finished,
/// and the directory that this one replaced.
pub(super) fn clean(dir: &Path, epoch: Epoch) {
    let Some(places) = Places::of(dir) else { return };
    for path in [&places.building, &places.removing] {
        if path.exists() {
            remove(path);
        }
    }
    if places.replaced.exists() {
        // Only what is known to be an older copy of this very store.
        match Commits::load(&places.replaced.join("COMMITS")) {
            Ok(Some(commits)) if commits.record().epoch == epoch => places.remove_replaced(),
            _ => {
                tracing::warn!(dir = %places.replaced.display(), "left alone: it is not what this store replaced");
            }
        }
    }
}

/// Removes a directory; what can't be removed is left for the next time.
pub(super) fn remove(dir: &Path) {
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(dir = %dir.display(), error = %e, "a directory that is not needed could not be removed");
        }
        _ => {}
    }
}
