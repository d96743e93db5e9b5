//! The floor of free space.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anabranch_core::store::StoreError;

use crate::files::io_error;

/// The lowest floor. Backends write while they open and where they collect garbage, and on a full
/// volume a thread of sled that waits for it may wait for ever.
pub(super) const FREE_BYTES_MIN: u64 = 4 << 20;

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
        let floor_bytes = floor_bytes.max(FREE_BYTES_MIN);
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
