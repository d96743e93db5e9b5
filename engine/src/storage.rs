//! What an engine's store takes, and its upkeep while the engine runs.

use std::path::{Path, PathBuf};

use anabranch_store::{BackupReport, StorageFigures, Upkeep};

use crate::error::Error;
use crate::{Engine, run_blocking};

impl Engine {
    /// What the store holds, by kind, and what it takes on disk. Reads the whole store, on a
    /// thread of its own; reading and writing go on meanwhile.
    pub async fn storage(&self) -> Result<StorageFigures, Error> {
        let upkeep = self.upkeep();
        run_blocking(move || Ok(upkeep.figures()?)).await
    }

    /// Backs the engine up into the new directory `target`: one state of the store, the
    /// device's key, and those of `files` that there are in the engine's directory, such as an app's own
    /// settings. Reading and writing go on meanwhile.
    ///
    /// When this returns the backup is complete and durable; dropping the future does not end it.
    /// [`restore`](crate::store::restore) makes a directory of it, with the files beside the store; the
    /// engine that opens that goes on under a new incarnation. The backup is as secret as the directory: who has
    /// it can sign in as this device. Let not both run: a restored device takes the place of the one before.
    ///
    /// # Errors
    /// Code `exists` if there is something at `target`, `damaged` if the store is.
    pub async fn backup(&self, target: impl AsRef<Path>, files: &[&str]) -> Result<BackupReport, Error> {
        let (upkeep, target) = (self.upkeep(), target.as_ref().to_owned());
        let dir = &self.inner.shared.dir;
        let named = |name: &&str| (PathBuf::from(name), dir.join(name));
        let all = ["device.key"].iter().chain(files);
        let files: Vec<_> = all.map(named).filter(|(_, from)| from.exists()).collect();
        run_blocking(move || Ok(upkeep.backup(&target, &files, &mut |_| {})?)).await
    }

    /// The store's upkeep, for those who run it themselves. Blocks on the disk.
    pub fn upkeep(&self) -> Upkeep {
        self.inner.shared.upkeep.clone()
    }
}
