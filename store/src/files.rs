//! Small files, written so that a kill or a power cut leaves the old or the new.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

use anabranch_core::store::StoreError;

/// Makes a [`StoreError`] of what the system said.
pub(crate) fn io_error(operation: &'static str) -> impl Fn(io::Error) -> StoreError {
    move |e| StoreError::Io { operation, cause: e.to_string() }
}

/// Syncs a directory, so that the names in it survive power loss. Only Unix can and must.
pub(crate) fn sync_dir(dir: &Path) -> io::Result<()> {
    if cfg!(unix) { File::open(dir)?.sync_all() } else { Ok(()) }
}

/// Makes a file, or puts another in its place. When this returns it survives power loss; at
/// any moment before, the file is what it was or what it shall be.
pub(crate) fn replace(dir: &Path, name: &str, contents: &[u8]) -> io::Result<()> {
    let temporary = dir.join(format!("{name}.new"));
    let mut file = File::create(&temporary)?;
    file.write_all(contents)?;
    file.sync_all()?;
    drop(file);
    fs::rename(&temporary, dir.join(name))?;
    sync_dir(dir)
}
