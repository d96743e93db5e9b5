//! Who owns a directory.

use std::fs::{self, File};
use std::io::{self, Read, Seek, Write};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anabranch_core::store::StoreError;

use crate::files::io_error;

/// How long to wait for an earlier owner: a killed process can hold its lock briefly.
const LOCK_WAIT: Duration = Duration::from_secs(2);
const LOCK_RETRY: Duration = Duration::from_millis(25);

/// The lock on a directory, held while its file is open.
pub(super) struct DirLock {
    _file: File,
}

impl DirLock {
    pub(super) fn take(dir: &Path) -> Result<DirLock, StoreError> {
        let path = dir.join("LOCK");
        let started = Instant::now();
        loop {
            let options = File::options().read(true).write(true).create(true).truncate(false).open(&path);
            let mut file = options.map_err(io_error("open LOCK"))?;
            match file.try_lock() {
                // An owner may have moved the directory aside while this waited: then the
                // lock is on a file that is no longer the store's.
                Ok(()) if is_same_file(&file, &path) => {
                    write_pid(&mut file).map_err(io_error("write LOCK"))?;
                    return Ok(DirLock { _file: file });
                }
                Ok(()) => {}
                Err(fs::TryLockError::WouldBlock) => {
                    if started.elapsed() >= LOCK_WAIT {
                        let mut text = String::new();
                        // Where locks are mandatory it can't be read; 0 says so.
                        let _ = file.read_to_string(&mut text);
                        let pid = text.trim().parse().unwrap_or(0);
                        return Err(StoreError::InUse { dir: dir.display().to_string(), pid });
                    }
                }
                Err(fs::TryLockError::Error(e)) => return Err(io_error("lock LOCK")(e)),
            }
            thread::sleep(LOCK_RETRY);
        }
    }
}

fn write_pid(file: &mut File) -> io::Result<()> {
    file.set_len(0)?;
    file.rewind()?;
    writeln!(file, "{}", std::process::id())
}

#[cfg(unix)]
fn is_same_file(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    match (file.metadata(), fs::metadata(path)) {
        (Ok(held), Ok(named)) => held.dev() == named.dev() && held.ino() == named.ino(),
        _ => false,
    }
}

/// Elsewhere a directory can't be moved while a file in it is open.
#[cfg(not(unix))]
fn is_same_file(_: &File, _: &Path) -> bool {
    true
}
