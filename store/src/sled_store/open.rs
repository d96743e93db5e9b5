//! Opening a directory: who owns it, what format it has, whether sled can read it, and
//! whether it is as far as it once was.

use std::fs::{self, File};
use std::io::{self, Read, Seek, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anabranch_core::store::StoreError;
use sled::IVec;

use super::StoreOptions;
use super::commits::{Commits, Epoch};
use super::disk::{Disk, io_error, panic_words, seal, sync_dir, unseal};

/// Holds the number of the newest commit; written with each group.
pub(super) const COMMIT_KEY: [u8; 7] = *b"\0commit";
/// Holds the epoch of the store; see [`commits`](super::commits).
const EPOCH_KEY: [u8; 6] = *b"\0epoch";

/// The stored format that this program writes and the newest that it reads.
const FORMAT: u32 = 1;
const FORMAT_NAME: &str = "anabranch-store";

/// How long to wait for an earlier owner: a killed process can hold its lock briefly, and
/// sled's threads let go a little after the store was dropped.
const LOCK_WAIT: Duration = Duration::from_secs(2);
const LOCK_RETRY: Duration = Duration::from_millis(25);

/// sled writes while it opens, and on a full volume a thread that waits for it may wait for
/// ever. Below this much room it is not even tried.
const OPEN_FREE_BYTES_MIN: u64 = 4 << 20;

/// sled collects garbage only when it flushes by itself.
const FLUSH_EVERY_MS: u64 = 500;

/// A directory that is open and consistent.
pub(super) struct Opened {
    pub(super) db: sled::Db,
    pub(super) disk: Disk,
    pub(super) commits: Commits,
    pub(super) last: u64,
    pub(super) rolled_back: bool,
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

/// See [`SledStore::open`](super::SledStore::open).
pub(super) fn open(dir: &Path, options: &StoreOptions) -> Result<Opened, StoreError> {
    fs::create_dir_all(dir).map_err(io_error("create the store's directory"))?;
    // What is renamed, and named in errors, must not depend on the working directory.
    let dir = dir.canonicalize().map_err(io_error("find the store's directory"))?;
    let free_bytes = fs4::available_space(&dir).map_err(io_error("ask for free space"))?;
    if free_bytes < OPEN_FREE_BYTES_MIN {
        return Err(StoreError::NoSpace { free_bytes, floor_bytes: OPEN_FREE_BYTES_MIN });
    }
    let lock = DirLock::take(&dir)?;
    match check_format(&dir).and_then(|()| open_guarded(&dir, options)) {
        Ok(parts) => Ok(Opened {
            db: parts.db,
            disk: parts.disk,
            commits: parts.commits,
            last: parts.last,
            rolled_back: parts.rolled_back,
            lock,
        }),
        Err(Refusal::Other(error)) => Err(error),
        Err(Refusal::Damage(what)) => {
            // sled can't work without room and says so in many ways; that is no damage.
            if let Ok(free_bytes) = fs4::available_space(&dir)
                && free_bytes < options.free_space_floor_bytes
            {
                let floor_bytes = options.free_space_floor_bytes;
                tracing::warn!(%what, free_bytes, "the store did not open while space was short");
                return Err(StoreError::NoSpace { free_bytes, floor_bytes });
            }
            Err(StoreError::Damaged { what: quarantine(&dir, &what) })
        }
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

/// The lock on a directory, held while its file is open.
pub(super) struct DirLock {
    _file: File,
}

impl DirLock {
    fn take(dir: &Path) -> Result<DirLock, StoreError> {
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

/// Reads `FORMAT`, or writes it before there is anything else.
fn check_format(dir: &Path) -> Result<(), Refusal> {
    let path = dir.join("FORMAT");
    let text = match fs::read(&path) {
        Ok(text) => text,
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            if dir.join("db").exists() {
                // Not moved: it may well be someone else's.
                return Err(Refusal::Other(StoreError::Damaged {
                    what: format!("{} holds a database but no FORMAT file; it was left there", dir.display()),
                }));
            }
            return write_format(dir, &path).map_err(|e| Refusal::Other(io_error("write FORMAT")(e)));
        }
        Err(e) => return Err(Refusal::Other(io_error("read FORMAT")(e))),
    };
    let text = String::from_utf8_lossy(&text);
    let mut words = text.split_whitespace();
    let found = match (words.next(), words.next().map(str::parse::<u32>)) {
        (Some(FORMAT_NAME), Some(Ok(found))) if found > 0 => found,
        _ => return Err(Refusal::Damage("the FORMAT file can't be read".into())),
    };
    if found > FORMAT {
        return Err(Refusal::Other(StoreError::NewerFormat { found, supported: FORMAT }));
    }
    Ok(())
}

fn write_format(dir: &Path, path: &Path) -> io::Result<()> {
    // Under another name first: a torn FORMAT would look like damage.
    let temporary = dir.join("FORMAT.new");
    let mut file = File::create(&temporary)?;
    writeln!(file, "{FORMAT_NAME} {FORMAT} sled-0.34")?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    sync_dir(dir)
}

struct Parts {
    db: sled::Db,
    disk: Disk,
    commits: Commits,
    last: u64,
    rolled_back: bool,
}

/// Opens sled on a thread of its own, because it panics on what it can't read.
fn open_guarded(dir: &Path, options: &StoreOptions) -> Result<Parts, Refusal> {
    let (path, options) = (dir.to_path_buf(), options.clone());
    let body = move || {
        catch_unwind(AssertUnwindSafe(|| open_parts(&path, &options)))
            .unwrap_or_else(|panic| Err(Refusal::Damage(format!("sled panicked: {}", panic_words(&*panic)))))
    };
    let opening = thread::Builder::new().name("anabranch-store-open".to_owned()).spawn(body);
    let opening = opening.map_err(|e| Refusal::Other(io_error("start a thread")(e)))?;
    opening.join().unwrap_or_else(|_| Err(Refusal::Damage("sled panicked".into())))
}

fn open_parts(dir: &Path, options: &StoreOptions) -> Result<Parts, Refusal> {
    let db = open_sled(dir, options)?;
    let mut disk = Disk::open(dir).map_err(|e| Refusal::Other(io_error("open the database file")(e)))?;
    // sled may have recovered what was written but never synced, and has perhaps just made
    // its files.
    sync_all(dir, &db, &mut disk)?;
    reconcile(dir, db, disk)
}

fn open_sled(dir: &Path, options: &StoreOptions) -> Result<sled::Db, Refusal> {
    let config = sled::Config::new()
        .path(dir)
        .cache_capacity(options.cache_bytes)
        .flush_every_ms(Some(FLUSH_EVERY_MS));
    let started = Instant::now();
    loop {
        match config.open() {
            Ok(db) => return Ok(db),
            Err(sled::Error::Io(e)) if e.to_string().contains("could not acquire lock") => {
                if started.elapsed() >= LOCK_WAIT {
                    return Err(StoreError::InUse { dir: dir.display().to_string(), pid: 0 }.into());
                }
                thread::sleep(LOCK_RETRY);
            }
            Err(e) => return Err(sled_refusal("open sled", e)),
        }
    }
}

fn sled_refusal(operation: &'static str, error: sled::Error) -> Refusal {
    super::disk::sled_error(operation, error).into()
}

fn sync_all(dir: &Path, db: &sled::Db, disk: &mut Disk) -> Result<(), Refusal> {
    db.flush().map_err(|e| sled_refusal("flush", e))?;
    let sync = || -> io::Result<()> {
        disk.sync()?;
        File::options().write(true).open(dir.join("conf"))?.sync_all()?;
        sync_dir(&dir.join("blobs"))?;
        sync_dir(dir)?;
        dir.parent().map_or(Ok(()), sync_dir)
    };
    let mut sync = sync;
    sync().map_err(|e| Refusal::Other(io_error("sync the store's files")(e)))
}

/// Compares sled with `COMMITS`.
fn reconcile(dir: &Path, db: sled::Db, mut disk: Disk) -> Result<Parts, Refusal> {
    let io = |e: io::Error| Refusal::Other(io_error("read or write COMMITS")(e));
    let path: PathBuf = dir.join("COMMITS");
    let epoch: Option<Epoch> = read_own(&db, &EPOCH_KEY)?;
    let last = read_own(&db, &COMMIT_KEY)?.map_or(0, u64::from_be_bytes);
    let known = Commits::load(&path).map_err(io)?;

    // Making a store ends with COMMITS; one that was never finished has nothing to lose.
    let unfinished = known.is_none() && last == 0;
    if unfinished {
        let epoch = match epoch {
            Some(epoch) => epoch,
            None => begin(dir, &db, &mut disk, new_epoch()?, 0)?,
        };
        let commits = Commits::create(&path, epoch, 0, false).map_err(io)?;
        return Ok(Parts { db, disk, commits, last: 0, rolled_back: false });
    }
    if let Some(commits) = known {
        if commits.proves(epoch, last) {
            return Ok(Parts { db, disk, commits, last, rolled_back: false });
        }
        let mut commits = commits;
        // Written down first, so that it is found again if this is interrupted.
        commits.begin_roll_back().map_err(io)?;
        // No number that was ever acknowledged is used again.
        let resumed = last.max(commits.record().reserved);
        tracing::warn!(last, durable = commits.record().durable, resumed, "the store was rolled back");
        let epoch = epoch.map_or_else(new_epoch, Ok)?;
        begin(dir, &db, &mut disk, epoch, resumed)?;
        commits.adopt(epoch, resumed).map_err(io)?;
        return Ok(Parts { db, disk, commits, last: resumed, rolled_back: true });
    }
    tracing::warn!(last, "COMMITS is missing or can't be read: the store may have been rolled back");
    let epoch = epoch.map_or_else(new_epoch, Ok)?;
    begin(dir, &db, &mut disk, epoch, last)?;
    let commits = Commits::create(&path, epoch, last, true).map_err(io)?;
    Ok(Parts { db, disk, commits, last, rolled_back: true })
}

/// Makes sled go on from commit `last` of `epoch`, durably.
fn begin(dir: &Path, db: &sled::Db, disk: &mut Disk, epoch: Epoch, last: u64) -> Result<Epoch, Refusal> {
    let mut batch = sled::Batch::default();
    batch.insert(&EPOCH_KEY, seal(&EPOCH_KEY, epoch.to_vec()));
    batch.insert(&COMMIT_KEY, seal(&COMMIT_KEY, last.to_be_bytes().to_vec()));
    db.apply_batch(batch).map_err(|e| sled_refusal("commit", e))?;
    sync_all(dir, db, disk)?;
    Ok(epoch)
}

fn new_epoch() -> Result<Epoch, Refusal> {
    let mut epoch = Epoch::default();
    getrandom::fill(&mut epoch)
        .map_err(|e| Refusal::Other(StoreError::Io { operation: "draw randomness", cause: e.to_string() }))?;
    Ok(epoch)
}

fn read_own<const N: usize>(db: &sled::Db, key: &[u8]) -> Result<Option<[u8; N]>, Refusal> {
    let stored: Option<IVec> = db.get(key).map_err(|e| sled_refusal("get", e))?;
    let Some(stored) = stored else { return Ok(None) };
    let value = unseal(key, &stored)?;
    match value.try_into() {
        Ok(value) => Ok(Some(value)),
        Err(_) => Err(Refusal::Damage("a record of the store's own has a wrong length".into())),
    }
}
