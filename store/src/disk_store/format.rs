//! The file `FORMAT`: one line that says what a directory holds.
//!
//! ```text
//! anabranch-store 2 redb encrypted 5f3a91c0
//! ```
//! After the name come the version of the stored format, the backend, `plain` or `encrypted`,
//! and the CRC-32 of what is before it. Invariant of all versions from 2 on: the line begins
//! with name and version and ends with that checksum, so that a newer format can be told from
//! a damaged file.
//!
//! Version 1 (`anabranch-store 1 sled-0.34`) is a plain store on sled. Its database is the
//! same as in version 2; only this line differs.

use std::fs;
use std::io;
use std::path::Path;

use anabranch_core::store::StoreError;

use crate::backend::BackendKind;
use crate::files::{io_error, replace};

/// The stored format that this program writes and the newest that it reads.
const VERSION: u32 = 2;
const NAME: &str = "anabranch-store";
const FILE: &str = "FORMAT";

/// What a directory holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Format {
    pub(super) version: u32,
    pub(super) backend: BackendKind,
    pub(super) encrypted: bool,
}

impl Format {
    /// The format of new stores.
    pub(super) fn new(backend: BackendKind, encrypted: bool) -> Format {
        Format { version: VERSION, backend, encrypted }
    }

    /// Reads the file; `None` if there is none.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] or [`StoreError::NewerFormat`].
    pub(super) fn load(dir: &Path) -> Result<Option<Format>, StoreError> {
        match fs::read(dir.join(FILE)) {
            Ok(text) => Format::parse(&text).map(Some),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(io_error("read FORMAT")(e)),
        }
    }

    /// Puts the file in place, durably.
    pub(super) fn save(self, dir: &Path) -> Result<(), StoreError> {
        replace(dir, FILE, self.line().as_bytes()).map_err(io_error("write FORMAT"))
    }

    /// Refuses a version that this program does not know.
    pub(super) fn check_version(found: u32) -> Result<(), StoreError> {
        match found > VERSION {
            true => Err(StoreError::NewerFormat { found, supported: VERSION }),
            false => Ok(()),
        }
    }

    /// What an older store becomes; `None` if it is of the newest version.
    pub(super) fn upgraded(self) -> Option<Format> {
        (self.version < VERSION).then_some(Format { version: VERSION, ..self })
    }

    fn line(self) -> String {
        let kind = if self.encrypted { "encrypted" } else { "plain" };
        let text = format!("{NAME} {VERSION} {} {kind}", self.backend);
        format!("{text} {:08x}\n", crc32fast::hash(text.as_bytes()))
    }

    fn parse(text: &[u8]) -> Result<Format, StoreError> {
        let damaged = || StoreError::Damaged { what: "the FORMAT file can't be read".into() };
        let text = std::str::from_utf8(text).map_err(|_| damaged())?;
        if text == "anabranch-store 1 sled-0.34\n" {
            return Ok(Format { version: 1, backend: BackendKind::Sled, encrypted: false });
        }
        let line = text.lines().next().ok_or_else(damaged)?;
        let (text, sum) = line.rsplit_once(' ').ok_or_else(damaged)?;
        if sum != format!("{:08x}", crc32fast::hash(text.as_bytes())) {
            return Err(damaged());
        }
        let mut words = text.split(' ');
        let version = match (words.next(), words.next().map(str::parse::<u32>)) {
            (Some(NAME), Some(Ok(version))) if version >= 2 => version,
            _ => return Err(damaged()),
        };
        Format::check_version(version)?;
        let backend = words.next().and_then(BackendKind::from_name).ok_or_else(damaged)?;
        let encrypted = match words.next() {
            Some("plain") => false,
            Some("encrypted") => true,
            _ => return Err(damaged()),
        };
        Ok(Format { version, backend, encrypted })
    }
}

/// Reads bytes as the file `FORMAT` and writes what was understood in the newest version, for tests
/// of hostile input.
///
/// # Errors
/// [`StoreError::Damaged`] or [`StoreError::NewerFormat`].
#[doc(hidden)]
pub fn reread_format(bytes: &[u8]) -> Result<String, StoreError> {
    Format::parse(bytes).map(Format::line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_read_back_and_a_changed_one_is_damage() {
        for backend in BackendKind::ALL {
            for encrypted in [false, true] {
                let format = Format::new(backend, encrypted);
                let line = format.line();
                assert_eq!(Format::parse(line.as_bytes()).unwrap(), format);
                for at in 0..line.len() - 1 {
                    for bit in 0..8 {
                        let mut bytes = line.clone().into_bytes();
                        bytes[at] ^= 1 << bit;
                        let parsed = Format::parse(&bytes);
                        assert!(matches!(parsed, Err(StoreError::Damaged { .. })), "{bytes:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn versions_are_told_apart() {
        let old = Format::parse(b"anabranch-store 1 sled-0.34\n").unwrap();
        assert_eq!(old.upgraded(), Some(Format::new(BackendKind::Sled, false)));
        assert_eq!(Format::new(BackendKind::Redb, true).upgraded(), None);
        let text = "anabranch-store 3 whatever comes";
        let line = format!("{text} {:08x}\nmore\n", crc32fast::hash(text.as_bytes()));
        let newer = Format::parse(line.as_bytes());
        assert!(matches!(newer, Err(StoreError::NewerFormat { found: 3, supported: 2 })));
    }
}
