//! Opening a directory: who owns it, what it holds, whether the backend can read it, and
//! whether it is as far as it once was.

use std::fs;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::thread;

use anabranch_core::store::StoreError;

use super::StoreOptions;
use super::commits::{Commits, Epoch};
use super::format::Format;
use super::lock::DirLock;
use super::seal::{seal, unseal};
use super::space::FREE_BYTES_MIN;
use super::swap;
use crate::backend::{Backend, BackendKind, Bytes, panic_words};
use crate::encrypt::{self, Encrypted, StoreKey};
use crate::files::{io_error, sync_dir};

/// Holds the number of the newest commit; written with each group.
pub(super) const COMMIT_KEY: [u8; 7] = *b"\0commit";
/// Holds the epoch of the store; see [`commits`](super::commits).
const EPOCH_KEY: [u8; 6] = *b"\0epoch";

/// A directory that is open and consistent.
pub(super) struct Opened {
    pub(super) backend: Arc<dyn Backend>,
    pub(super) commits: Commits,
    pub(super) last: u64,
    pub(super) rolled_back: bool,
    pub(super) format: Format,
    pub(super) lock: DirLock,
}

/// Why a directory did not open.
enum Refusal {
    /// Its contents can't be read: it is moved aside.
    Damage(String),
    /// It is left as it is.
    Other(StoreError),
}

impl From<StoreError> for Refusal {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Damaged { what } => Refusal::Damage(what),
            other => Refusal::Other(other),
        }
    }
}

/// See [`DiskStore::open`](super::DiskStore::open).
pub(super) fn open(dir: &Path, options: &StoreOptions) -> Result<Opened, StoreError> {
    swap::finish(dir)?;
    fs::create_dir_all(dir).map_err(io_error("create the store's directory"))?;
    // What is renamed, and named in errors, must not depend on the working directory.
    let dir = dir.canonicalize().map_err(io_error("find the store's directory"))?;
    let free_bytes = fs4::available_space(&dir).map_err(io_error("ask for free space"))?;
    if free_bytes < FREE_BYTES_MIN {
        return Err(StoreError::NoSpace { free_bytes, floor_bytes: FREE_BYTES_MIN });
    }
    let lock = DirLock::take(&dir)?;
    match open_contents(&dir, options) {
        Ok((format, parts)) => {
            swap::clean(&dir, parts.commits.record().epoch);
            Ok(Opened {
                backend: Arc::from(parts.backend),
                commits: parts.commits,
                last: parts.last,
                rolled_back: parts.rolled_back,
                format,
                lock,
            })
        }
        Err(Refusal::Other(error)) => Err(error),
        Err(Refusal::Damage(what)) => {
            // A backend can't work without room and says so in many ways; that is no damage.
            if let Ok(free_bytes) = fs4::available_space(&dir)
                && let floor_bytes = options.free_space_floor_bytes.max(FREE_BYTES_MIN)
                && free_bytes < floor_bytes
            {
                tracing::warn!(%what, free_bytes, "the store did not open while space was short");
                return Err(StoreError::NoSpace { free_bytes, floor_bytes });
            }
            Err(StoreError::Damaged { what: quarantine(&dir, &what) })
        }
    }
}

/// See [`rekey`](super::rekey).
pub(super) fn rekey(dir: &Path, old: &StoreKey, new: &StoreKey) -> Result<(), StoreError> {
    let dir = dir.canonicalize().map_err(io_error("find the store's directory"))?;
    let _lock = DirLock::take(&dir)?;
    match Format::load(&dir)? {
        Some(format) if format.encrypted => encrypt::rekey(&dir, old, new),
        _ => Err(StoreError::NotEncrypted { dir: dir.display().to_string() }),
    }
}

/// Moves a damaged directory aside and says so.
fn quarantine(dir: &Path, what: &str) -> String {
    let moved = (1..10_000_u32).find_map(|n| {
        let mut name = dir.file_name()?.to_owned();
        name.push(format!(".damaged-{n}"));
        let target = dir.with_file_name(name);
        // Only the owner of the lock gets here, so nothing appears between the two calls.
        (!target.exists()).then_some(target)
    });
    let Some(target) = moved else {
        return format!("{what}; {} could not be moved aside", dir.display());
    };
    if let Err(e) = fs::rename(dir, &target) {
        return format!("{what}; {} could not be moved aside: {e}", dir.display());
    }
    if let Some(Err(e)) = dir.parent().map(sync_dir) {
        tracing::warn!(error = %e, "syncing the directory above a store that was moved aside");
    }
    format!("{what}; everything was moved to {}", target.display())
}

fn open_contents(dir: &Path, options: &StoreOptions) -> Result<(Format, Parts), Refusal> {
    let (format, data_key) = match Format::load(dir)? {
        Some(format) => {
            check_fits(dir, format, options)?;
            let key = options.encryption.as_ref();
            (format, key.map(|key| encrypt::load_data_key(dir, key)).transpose()?)
        }
        None => begin_directory(dir, options)?,
    };
    let parts = open_guarded(dir, format, data_key, options)?;
    if let Some(upgraded) = format.upgraded() {
        upgraded.save(dir)?;
        return Ok((upgraded, parts));
    }
    Ok((format, parts))
}

/// Refuses options that are not for this store.
fn check_fits(dir: &Path, format: Format, options: &StoreOptions) -> Result<(), Refusal> {
    let shown = || dir.display().to_string();
    if let Some(configured) = options.backend
        && configured != format.backend
    {
        let (found, configured) = (format.backend.name(), configured.name());
        return Err(Refusal::Other(StoreError::OtherBackend { dir: shown(), found, configured }));
    }
    match (format.encrypted, &options.encryption) {
        (true, None) => Err(Refusal::Other(StoreError::KeyNeeded { dir: shown() })),
        (false, Some(_)) => Err(Refusal::Other(StoreError::NotEncrypted { dir: shown() })),
        _ => Ok(()),
    }
}

/// Writes down what the directory is going to hold, before there is anything else.
fn begin_directory(
    dir: &Path,
    options: &StoreOptions,
) -> Result<(Format, Option<encrypt::DataKey>), Refusal> {
    if BackendKind::ALL.iter().any(|kind| dir.join(kind.main_file()).exists()) {
        // Not moved: it may well be someone else's.
        return Err(Refusal::Other(StoreError::Damaged {
            what: format!("{} holds a database but no FORMAT file; it was left there", dir.display()),
        }));
    }
    let data_key = options.encryption.as_ref().map(|key| encrypt::create_data_key(dir, key)).transpose()?;
    let format = Format::new(options.backend.unwrap_or_default(), data_key.is_some());
    format.save(dir)?;
    Ok((format, data_key))
}

struct Parts {
    backend: Box<dyn Backend>,
    commits: Commits,
    last: u64,
    rolled_back: bool,
}

/// Opens the backend on a thread of its own, because it may panic on what it can't read.
fn open_guarded(
    dir: &Path,
    format: Format,
    data_key: Option<encrypt::DataKey>,
    options: &StoreOptions,
) -> Result<Parts, Refusal> {
    let panicked = move |words: &str| Refusal::Damage(format!("{} panicked: {words}", format.backend));
    let (path, options) = (dir.to_path_buf(), options.clone());
    let body = move || {
        let open = || {
            let backend = format.backend.open(&path, &options)?;
            let backend = match data_key {
                Some(key) => Box::new(Encrypted::open(backend, &key)?),
                None => backend,
            };
            reconcile(&path, backend)
        };
        catch_unwind(AssertUnwindSafe(open)).unwrap_or_else(|panic| Err(panicked(&panic_words(&*panic))))
    };
    let opening = thread::Builder::new().name("anabranch-store-open".to_owned()).spawn(body);
    let opening = opening.map_err(|e| Refusal::Other(io_error("start a thread")(e)))?;
    opening.join().unwrap_or_else(|panic| Err(panicked(&panic_words(&*panic))))
}

/// Compares the backend with `COMMITS`.
fn reconcile(dir: &Path, backend: Box<dyn Backend>) -> Result<Parts, Refusal> {
    let io = |e: io::Error| Refusal::Other(io_error("read or write COMMITS")(e));
    let path = dir.join("COMMITS");
    let epoch: Option<Epoch> = read_own(&*backend, &EPOCH_KEY)?;
    let last = read_own(&*backend, &COMMIT_KEY)?.map_or(0, u64::from_be_bytes);
    let known = Commits::load(&path).map_err(io)?;

    // Making a store ends with COMMITS; one that was never finished has nothing to lose.
    let unfinished = known.is_none() && last == 0;
    if unfinished {
        let epoch = match epoch {
            Some(epoch) => epoch,
            None => begin(&*backend, new_epoch()?, 0)?,
        };
        let commits = Commits::create(&path, epoch, 0, false).map_err(io)?;
        return Ok(Parts { backend, commits, last: 0, rolled_back: false });
    }
    if let Some(commits) = known {
        if commits.proves(epoch, last) {
            return Ok(Parts { backend, commits, last, rolled_back: false });
        }
        let mut commits = commits;
        // Written down first, so that it is found again if this is interrupted.
        commits.begin_roll_back().map_err(io)?;
        // No number that was ever acknowledged is used again.
        let resumed = last.max(commits.record().reserved);
        tracing::warn!(last, durable = commits.record().durable, resumed, "the store was rolled back");
        let epoch = match epoch {
            Some(epoch) => epoch,
            None => new_epoch()?,
        };
        begin(&*backend, epoch, resumed)?;
        commits.adopt(epoch, resumed).map_err(io)?;
        return Ok(Parts { backend, commits, last: resumed, rolled_back: true });
    }
    tracing::warn!(last, "COMMITS is missing or can't be read: the store may have been rolled back");
    let epoch = match epoch {
        Some(epoch) => epoch,
        None => new_epoch()?,
    };
    begin(&*backend, epoch, last)?;
    let commits = Commits::create(&path, epoch, last, true).map_err(io)?;
    Ok(Parts { backend, commits, last, rolled_back: true })
}

/// Makes the backend go on from commit `last` of `epoch`, durably.
fn begin(backend: &dyn Backend, epoch: Epoch, last: u64) -> Result<Epoch, Refusal> {
    let records = own_records(&epoch, last).into_iter();
    let changes: Result<Vec<_>, _> = records.map(|(key, value)| backend.sealed(key, Some(value))).collect();
    backend.apply(&changes?)?;
    backend.sync()?;
    Ok(epoch)
}

/// The records by which the store knows itself.
pub(super) fn own_records(epoch: &[u8], last: u64) -> [(Bytes, Bytes); 2] {
    let own = |key: &[u8], value: &[u8]| (Bytes::from(key), seal(key, value.to_vec()));
    [own(&EPOCH_KEY, epoch), own(&COMMIT_KEY, &last.to_be_bytes())]
}

pub(super) fn new_epoch() -> Result<Epoch, StoreError> {
    let mut epoch = Epoch::default();
    encrypt::draw(&mut epoch)?;
    Ok(epoch)
}

fn read_own<const N: usize>(backend: &dyn Backend, key: &[u8]) -> Result<Option<[u8; N]>, Refusal> {
    let Some(stored) = backend.reader()?.get(key)? else { return Ok(None) };
    match unseal(key, &stored)?.try_into() {
        Ok(value) => Ok(Some(value)),
        Err(_) => Err(Refusal::Damage("a record of the store's own has a wrong length".into())),
    }
}
