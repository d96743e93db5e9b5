//! Backups: a directory with one state of a store, and the files that belong to it.
//!
//! ```text
//! BACKUP/MANIFEST       what is here, with a BLAKE3 hash of each file
//! BACKUP/entries        the store's entries as they are stored, in order
//! BACKUP/KEY            of an encrypted store: its data key, wrapped
//! BACKUP/files/NAME     files that were given with it
//! ```
//! An entry is `[bytes of the key: u16][bytes of the value: u32][key][value]`, numbers
//! big-endian. Those of an encrypted store are as secret as in it: a backup opens with the key
//! that the store had when it was made.
//!
//! `MANIFEST` is text, a line for each fact, and ends with the hash of what is before:
//! ```text
//! anabranch-backup 1
//! store 2 sled plain
//! commit 4711
//! entries 1200
//! file 812345 <hash> entries
//! file 119 <hash> files/device.key
//! end <hash>
//! ```

use std::fs::{self, File};
use std::io::{self, BufRead as _, BufReader, BufWriter, Read, Write};
use std::path::{Component, Path, PathBuf};

use anabranch_core::store::StoreError;

use crate::backend::{BackendKind, Bytes};
use crate::files::{io_error, sync_dir};
use crate::keys::OWN;

/// Version of the form of backups.
const VERSION: u32 = 1;
const NAME: &str = "anabranch-backup";
const MANIFEST: &str = "MANIFEST";
const ENTRIES: &str = "entries";
const KEY: &str = crate::encrypt::KEY_FILE;
const FILES: &str = "files";

/// A manifest is short; what is much longer is another file.
const MANIFEST_BYTES_MAX: u64 = 1 << 20;
/// Longest stored key and value: bounds of the store and what encryption adds.
const KEY_BYTES_MAX: usize = 4096;
const STORED_BYTES_MAX: usize = 128 << 10;

/// What a backup holds.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct BackupReport {
    /// The store's backend.
    pub backend: BackendKind,
    /// Whether it is encrypted, and with it the backup.
    pub encrypted: bool,
    /// The newest commit in it.
    pub commit: u64,
    /// Entries of the store.
    pub entries: u64,
    /// Bytes of all its files but the manifest.
    pub bytes: u64,
    /// The files that were given with it, as they are called there.
    pub files: Vec<PathBuf>,
}

/// A file of a backup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) name: String,
    bytes: u64,
    hash: blake3::Hash,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Manifest {
    pub(crate) format: u32,
    pub(crate) backend: BackendKind,
    pub(crate) encrypted: bool,
    pub(crate) commit: u64,
    /// Without the store's own.
    pub(crate) entries: u64,
    pub(crate) parts: Vec<Part>,
}

impl Manifest {
    /// Reads and checks the manifest of a backup.
    ///
    /// # Errors
    /// [`StoreError::NewerFormat`], [`StoreError::Damaged`], [`StoreError::Io`].
    pub(crate) fn load(backup: &Path) -> Result<Manifest, StoreError> {
        let path = backup.join(MANIFEST);
        let file = File::open(&path).map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => {
                damaged(format!("{} is no backup: it has no MANIFEST", backup.display()))
            }
            _ => io_error("open the backup's MANIFEST")(e),
        })?;
        let mut text = String::new();
        file.take(MANIFEST_BYTES_MAX).read_to_string(&mut text).map_err(|e| match e.kind() {
            io::ErrorKind::InvalidData => damaged("its MANIFEST can't be read".into()),
            _ => io_error("read the backup's MANIFEST")(e),
        })?;
        Manifest::parse(&text)
    }

    pub(crate) fn report(&self) -> BackupReport {
        let files = self.parts.iter().filter_map(|part| given_name(&part.name));
        BackupReport {
            backend: self.backend,
            encrypted: self.encrypted,
            commit: self.commit,
            entries: self.entries,
            bytes: self.parts.iter().map(|part| part.bytes).sum(),
            files: files.map(PathBuf::from).collect(),
        }
    }

    fn text(&self) -> String {
        let kind = if self.encrypted { "encrypted" } else { "plain" };
        let mut text = format!(
            "{NAME} {VERSION}\nstore {} {} {kind}\ncommit {}\nentries {}\n",
            self.format, self.backend, self.commit, self.entries
        );
        for part in &self.parts {
            text.push_str(&format!("file {} {} {}\n", part.bytes, part.hash.to_hex(), part.name));
        }
        let hash = blake3::hash(text.as_bytes()).to_hex();
        text.push_str(&format!("end {hash}\n"));
        text
    }

    fn parse(text: &str) -> Result<Manifest, StoreError> {
        let unreadable = || damaged("its MANIFEST can't be read".into());
        // The first line of every version, and the hash, which newer ones have too.
        let (body, end) = text.rsplit_once("end ").ok_or_else(unreadable)?;
        if end != format!("{}\n", blake3::hash(body.as_bytes()).to_hex()) {
            return Err(unreadable());
        }
        // A name may end with a carriage return.
        let mut lines = body.split_terminator('\n').map(|line| line.split_once(' ').unwrap_or((line, "")));
        match lines.next() {
            Some((NAME, version)) => match version.parse::<u32>() {
                Ok(VERSION) => {}
                Ok(found) if found > VERSION => {
                    return Err(StoreError::NewerFormat { found, supported: VERSION });
                }
                _ => return Err(unreadable()),
            },
            _ => return Err(unreadable()),
        }
        let mut manifest = Manifest {
            format: 0,
            backend: BackendKind::default(),
            encrypted: false,
            commit: 0,
            entries: 0,
            parts: Vec::new(),
        };
        for line in lines {
            manifest.take_line(line).ok_or_else(unreadable)?;
        }
        // Nothing that was written has more bytes than a number holds.
        let bytes = manifest.parts.iter().try_fold(0, |sum: u64, part| sum.checked_add(part.bytes));
        let whole = bytes.is_some()
            && manifest.format > 0
            && manifest.has(ENTRIES)
            && manifest.has(KEY) == manifest.encrypted;
        if whole { Ok(manifest) } else { Err(unreadable()) }
    }

    fn take_line(&mut self, (word, rest): (&str, &str)) -> Option<()> {
        match word {
            "store" => {
                let mut words = rest.split(' ');
                self.format = words.next()?.parse().ok()?;
                self.backend = BackendKind::from_name(words.next()?)?;
                self.encrypted = match words.next()? {
                    "encrypted" => true,
                    "plain" => false,
                    _ => return None,
                };
            }
            "commit" => self.commit = rest.parse().ok()?,
            "entries" => self.entries = rest.parse().ok()?,
            "file" => {
                let mut words = rest.splitn(3, ' ');
                let bytes = words.next()?.parse().ok()?;
                let hash = blake3::Hash::from_hex(words.next()?).ok()?;
                let name = words.next()?.to_owned();
                if name != ENTRIES && name != KEY {
                    // Nothing in it may lead out of the directory that it is restored to.
                    given_name(&name)?;
                }
                self.parts.push(Part { name, bytes, hash });
            }
            _ => return None,
        }
        Some(())
    }

    fn has(&self, name: &str) -> bool {
        self.parts.iter().any(|part| part.name == name)
    }

    fn part(&self, name: &str) -> Result<&Part, StoreError> {
        let found = self.parts.iter().find(|part| part.name == name);
        found.ok_or_else(|| damaged(format!("it has no file {name}")))
    }
}

/// Reads a text as a MANIFEST and writes what was understood, for tests of hostile input.
///
/// # Errors
/// [`StoreError::NewerFormat`], [`StoreError::Damaged`].
#[doc(hidden)]
pub fn reread_manifest(text: &str) -> Result<String, StoreError> {
    let manifest = Manifest::parse(text)?;
    let report = manifest.report();
    debug_assert_eq!(report.files.len(), manifest.given().count());
    Ok(manifest.text())
}

/// The path of a file that was given with a backup, if it is a plain one.
fn given_name(name: &str) -> Option<&Path> {
    let path = Path::new(name).strip_prefix(FILES).ok()?;
    let plain = path.components().all(|part| matches!(part, Component::Normal(_)));
    (plain && path.components().next().is_some()).then_some(path)
}

pub(crate) fn damaged(what: String) -> StoreError {
    StoreError::Damaged { what: format!("the backup can't be trusted: {what}") }
}

/// Writes a backup into a directory that is renamed when it is complete.
pub(crate) struct Writer {
    dir: PathBuf,
    parts: Vec<Part>,
    entries: Hashed<BufWriter<File>>,
    count: u64,
}

impl Writer {
    pub(crate) fn create(dir: &Path) -> io::Result<Writer> {
        let file = create_private(&dir.join(ENTRIES))?;
        let entries = Hashed::new(BufWriter::with_capacity(1 << 20, file));
        Ok(Writer { dir: dir.to_owned(), parts: Vec::new(), entries, count: 0 })
    }

    pub(crate) fn entry(&mut self, key: &[u8], value: &[u8]) -> io::Result<()> {
        let too_long = |_| io::Error::from(io::ErrorKind::InvalidInput);
        self.entries.write_all(&u16::try_from(key.len()).map_err(too_long)?.to_be_bytes())?;
        self.entries.write_all(&u32::try_from(value.len()).map_err(too_long)?.to_be_bytes())?;
        self.entries.write_all(key)?;
        self.entries.write_all(value)?;
        self.count += u64::from(!key.starts_with(&[OWN.0]));
        Ok(())
    }

    /// Adds the file `KEY` of an encrypted store.
    pub(crate) fn key_file(&mut self, from: &Path) -> io::Result<()> {
        self.copy(KEY.to_owned(), from)
    }

    /// Adds a file that was given.
    pub(crate) fn given_file(&mut self, name: &Path, from: &Path) -> io::Result<()> {
        let refused = || io::Error::other(format!("{} is no name for a file of a backup", name.display()));
        let name = format!("{FILES}/{}", name.to_str().ok_or_else(refused)?);
        if given_name(&name).is_none() || name.contains('\n') {
            return Err(refused());
        }
        if let Some(parent) = self.dir.join(&name).parent() {
            create_private_dir(parent)?;
        }
        self.copy(name, from)
    }

    fn copy(&mut self, name: String, from: &Path) -> io::Result<()> {
        let mut file = Hashed::new(create_private(&self.dir.join(&name))?);
        io::copy(&mut File::open(from)?, &mut file)?;
        file.inner.sync_all()?;
        self.parts.push(file.part(name));
        Ok(())
    }

    /// Completes the directory; it is durable when this returns, but for its name.
    pub(crate) fn finish(
        mut self,
        format: u32,
        backend: BackendKind,
        encrypted: bool,
        commit: u64,
    ) -> io::Result<Manifest> {
        self.entries.flush()?;
        self.entries.inner.get_ref().sync_all()?;
        self.parts.insert(0, self.entries.part(ENTRIES.to_owned()));
        let manifest =
            Manifest { format, backend, encrypted, commit, entries: self.count, parts: self.parts };
        let mut file = create_private(&self.dir.join(MANIFEST))?;
        file.write_all(manifest.text().as_bytes())?;
        file.sync_all()?;
        sync_tree(&self.dir)?;
        Ok(manifest)
    }
}

/// Reads the entries of a backup and hashes them on the way.
pub(crate) struct Entries<R = File> {
    file: Hashed<BufReader<R>>,
    part: Part,
}

impl Entries {
    pub(crate) fn open(backup: &Path, manifest: &Manifest) -> Result<Entries, StoreError> {
        let part = manifest.part(ENTRIES)?.clone();
        let file = File::open(backup.join(ENTRIES)).map_err(read_error)?;
        let file = Hashed::new(BufReader::with_capacity(1 << 20, file));
        Ok(Entries { file, part })
    }
}

impl<R: Read> Entries<R> {
    /// The next entry; `None` behind the last one, when all of it had the right hash.
    pub(crate) fn next(&mut self) -> Result<Option<(Bytes, Bytes)>, StoreError> {
        if self.file.inner.fill_buf().map_err(read_error)?.is_empty() {
            return self.check_end().map(|()| None);
        }
        let (mut key, mut value) = ([0; 2], [0; 4]);
        self.read(&mut key)?;
        self.read(&mut value)?;
        let (key, value) = (usize::from(u16::from_be_bytes(key)), u32::from_be_bytes(value) as usize);
        if key == 0 || key > KEY_BYTES_MAX || value > STORED_BYTES_MAX {
            return Err(damaged(format!("{ENTRIES} holds an entry that is none")));
        }
        let mut bytes = vec![0; key + value];
        self.read(&mut bytes)?;
        let (key, value) = bytes.split_at(key);
        Ok(Some((key.into(), value.into())))
    }

    fn read(&mut self, out: &mut [u8]) -> Result<(), StoreError> {
        self.file.read_exact(out).map_err(read_error)
    }

    fn check_end(&mut self) -> Result<(), StoreError> {
        if self.file.bytes != self.part.bytes || self.file.hasher.finalize() != self.part.hash {
            return Err(damaged(format!("{ENTRIES} was changed")));
        }
        Ok(())
    }
}

/// Reads bytes as the entries of a backup whose MANIFEST has their hash, for tests of hostile input.
///
/// # Errors
/// [`StoreError::Damaged`].
#[doc(hidden)]
pub fn reread_entries(bytes: &[u8]) -> Result<Vec<(Bytes, Bytes)>, StoreError> {
    let part = Part { name: ENTRIES.to_owned(), bytes: bytes.len() as u64, hash: blake3::hash(bytes) };
    let mut entries = Entries { file: Hashed::new(BufReader::new(bytes)), part };
    std::iter::from_fn(|| entries.next().transpose()).collect()
}

/// Copies a file out of a backup, if it has the right hash.
pub(crate) fn restore_file(backup: &Path, part: &Part, to: &Path) -> Result<(), StoreError> {
    let mut from = Hashed::new(File::open(backup.join(&part.name)).map_err(read_error)?);
    if let Some(parent) = to.parent() {
        create_private_dir(parent).map_err(io_error("create a directory"))?;
    }
    let mut file = create_private(to).map_err(io_error("write a restored file"))?;
    io::copy(&mut from, &mut file).map_err(io_error("write a restored file"))?;
    file.sync_all().map_err(io_error("sync a restored file"))?;
    if from.bytes != part.bytes || from.hasher.finalize() != part.hash {
        return Err(damaged(format!("{} was changed", part.name)));
    }
    Ok(())
}

impl Manifest {
    /// The files that were given with the backup, and where each belongs.
    pub(crate) fn given(&self) -> impl Iterator<Item = (&Part, &Path)> {
        self.parts.iter().filter_map(|part| Some((part, given_name(&part.name)?)))
    }

    /// The wrapped data key of an encrypted store.
    pub(crate) fn key(&self) -> Option<&Part> {
        self.parts.iter().find(|part| part.name == KEY)
    }
}

fn read_error(error: io::Error) -> StoreError {
    match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::UnexpectedEof => {
            damaged("a file is missing or too short".into())
        }
        _ => io_error("read the backup")(error),
    }
}

/// What went through, and its hash.
struct Hashed<T> {
    inner: T,
    hasher: blake3::Hasher,
    bytes: u64,
}

impl<T> Hashed<T> {
    fn new(inner: T) -> Self {
        Hashed { inner, hasher: blake3::Hasher::new(), bytes: 0 }
    }

    fn passed(&mut self, bytes: &[u8]) {
        self.hasher.update(bytes);
        self.bytes += bytes.len() as u64;
    }

    fn part(&self, name: String) -> Part {
        Part { name, bytes: self.bytes, hash: self.hasher.finalize() }
    }
}

impl<T: Write> Write for Hashed<T> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.passed(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

impl<T: Read> Read for Hashed<T> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(out)?;
        self.passed(&out[..read]);
        Ok(read)
    }
}

/// Makes a file that only its owner reads: it may hold keys.
fn create_private(path: &Path) -> io::Result<File> {
    let mut options = File::options();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.open(path)
}

pub(crate) fn create_private_dir(path: &Path) -> io::Result<()> {
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(path)
}

/// Syncs a directory and those in it.
pub(crate) fn sync_tree(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            sync_tree(&entry.path())?;
        }
    }
    sync_dir(dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest() -> Manifest {
        let part = |name: &str| Part { name: name.into(), bytes: 3, hash: blake3::hash(b"abc") };
        Manifest {
            format: 2,
            backend: BackendKind::Redb,
            encrypted: true,
            commit: 7,
            entries: 9,
            parts: vec![part(ENTRIES), part(KEY), part("files/issuers/a b.pem")],
        }
    }

    #[test]
    fn a_manifest_is_read_back_and_any_change_of_it_is_noticed() {
        let text = manifest().text();
        assert_eq!(Manifest::parse(&text).unwrap(), manifest());
        assert_eq!(manifest().report().files, [Path::new("issuers/a b.pem")]);
        for at in 0..text.len() {
            let mut bytes = text.clone().into_bytes();
            bytes[at] ^= 1;
            let changed = String::from_utf8(bytes).unwrap();
            assert!(matches!(Manifest::parse(&changed), Err(StoreError::Damaged { .. })), "{changed}");
            assert!(Manifest::parse(&text[..at]).is_err());
        }
    }

    #[test]
    fn a_name_may_end_with_a_carriage_return() {
        let mut odd = manifest();
        let part = Part { name: "files/a\r".into(), bytes: 1, hash: blake3::hash(b"a") };
        odd.parts.push(part);
        assert_eq!(Manifest::parse(&odd.text()).unwrap(), odd);
    }

    #[test]
    fn files_with_more_bytes_than_a_number_holds_are_refused() {
        let mut many = manifest();
        many.parts[0].bytes = u64::MAX;
        assert!(matches!(Manifest::parse(&many.text()), Err(StoreError::Damaged { .. })));
    }

    fn sealed(body: &str) -> String {
        format!("{body}end {}\n", blake3::hash(body.as_bytes()).to_hex())
    }

    #[test]
    fn newer_manifests_and_names_that_lead_elsewhere_are_refused() {
        let newer = Manifest::parse(&sealed("anabranch-backup 2\nwhatever comes\n"));
        assert!(matches!(newer, Err(StoreError::NewerFormat { found: 2, supported: 1 })));
        let hash = blake3::hash(b"").to_hex();
        for name in ["files/../x", "/etc/passwd", "files/", "files", "x", ""] {
            let body = format!(
                "anabranch-backup 1\nstore 2 sled plain\ncommit 1\nentries 1\nfile 1 {hash} entries\nfile 1 {hash} {name}\n"
            );
            assert!(Manifest::parse(&sealed(&body)).is_err(), "{name}");
        }
    }
}
