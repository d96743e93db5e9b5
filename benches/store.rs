//! The store beside what a user would pick instead (SQLite in WAL mode, synchronous = FULL) and
//! beside the limits (append + fdatasync; the same merged batches written to the backend by one thread
//! that does nothing else), in one run: machines differ and are noisy, so the ratios are what counts.
//!
//! `cargo bench -p anabranch-benches --bench store`. By environment:
//! `ANABRANCH_BENCH_DIR` (the volume to measure), `ANABRANCH_BENCH_ROUNDS` (5; 0 leaves commits out),
//! `ANABRANCH_BENCH_KEYS` (100000, for reads and opening; 0 leaves them out), `ANABRANCH_BENCH_WRITERS`
//! (`1,8,64`), `ANABRANCH_BENCH_ONLY` (words of names: only contenders that have one of them),
//! `ANABRANCH_BENCH_ORDER` (`scattered` keys, as hashes are, or `ascending`).

#![expect(clippy::unwrap_used, reason = "a bench has no one to report to")]

use std::collections::VecDeque;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use anabranch_store::{BackendKind, Batch, CommitNo, Keyspace, Store, StoreKey, StoreOptions, View, open};
use tokio::sync::oneshot;

/// How long each contender writes in each round.
const SLICE: Duration = Duration::from_millis(600);
const VALUE_BYTES: usize = 300;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [reader, path, name, keys] = arguments.as_slice()
        && reader == READER
    {
        return open_and_read(Path::new(path), name, keys.parse().unwrap());
    }
    let rounds = number("ANABRANCH_BENCH_ROUNDS", 5);
    let keys = number("ANABRANCH_BENCH_KEYS", 100_000) as u64;
    let writers = text("ANABRANCH_BENCH_WRITERS").unwrap_or_else(|| "1,8,64".to_owned());
    let dir = match std::env::var_os("ANABRANCH_BENCH_DIR") {
        Some(dir) => tempfile::tempdir_in(dir).unwrap(),
        None => tempfile::tempdir().unwrap(),
    };
    let order = if ascending() { "ascending" } else { "scattered" };
    println!("{VALUE_BYTES} B a commit, {order} keys, medians of {rounds} rounds, contenders in turn\n");
    for writers in writers.split(',').filter(|_| rounds > 0) {
        commits(dir.path(), writers.parse().unwrap(), rounds);
    }
    if keys > 0 {
        reads(dir.path(), keys);
    }
}

/// One who makes small values durable, one after the other for each of its writers.
trait Contender {
    fn name(&self) -> String;

    /// Lets as many writers write for a while.
    fn run(&self, writers: usize) -> Run;
}

/// What came of it.
struct Run {
    speed: Speed,
    /// The numbers of the values that became durable together, where that is known.
    groups: Vec<Vec<u64>>,
}

#[derive(Clone, Copy)]
struct Speed {
    per_second: f64,
    /// Microseconds of processor time for each value, of all threads. Less disturbed by whoever else
    /// uses the machine.
    cpu_us: f64,
}

struct Meter {
    start: Instant,
    cpu_us: f64,
}

impl Meter {
    fn start() -> Meter {
        Meter { start: Instant::now(), cpu_us: cpu_us() }
    }

    fn is_over(&self) -> bool {
        self.start.elapsed() >= SLICE
    }

    fn speed(&self, values: usize) -> Speed {
        let per_second = values as f64 / self.start.elapsed().as_secs_f64();
        Speed { per_second, cpu_us: (cpu_us() - self.cpu_us) / values as f64 }
    }
}

/// Processor time of this process so far; 0 where Linux does not tell it.
fn cpu_us() -> f64 {
    const TICK_US: f64 = 10_000.0;
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let behind_name = stat.rsplit(')').next().unwrap_or_default();
    let ticks = behind_name.split_whitespace().skip(11).take(2).filter_map(|n| n.parse::<f64>().ok());
    ticks.sum::<f64>() * TICK_US
}

/// `writers` threads, each of which waits for its write.
fn threads(writers: usize, write: impl Fn(u64, &[u8]) + Sync) -> Speed {
    let done = AtomicUsize::new(0);
    let meter = Meter::start();
    std::thread::scope(|scope| {
        for _ in 0..writers {
            scope.spawn(|| {
                let value = value();
                while !meter.is_over() {
                    write(next(), &value);
                    done.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
    });
    meter.speed(done.into_inner())
}

/// The number of the next value; none is used twice.
fn next() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// What the store does in a run, so that the same can be done without it.
#[derive(Default)]
struct Log {
    durable: Mutex<Vec<u64>>,
    commits: Mutex<Vec<(CommitNo, u64)>>,
}

impl Log {
    fn groups(&self) -> Vec<Vec<u64>> {
        let mut commits = std::mem::take(&mut *self.commits.lock().unwrap());
        commits.sort_unstable();
        let mut commits = commits.into_iter().peekable();
        let durable = std::mem::take(&mut *self.durable.lock().unwrap());
        let up_to =
            |last| std::iter::from_fn(|| Some(commits.next_if(|(commit, _)| commit.0 <= last)?.1)).collect();
        durable.into_iter().map(up_to).filter(|group: &Vec<u64>| !group.is_empty()).collect()
    }
}

/// Threads that commit and block until it is durable.
struct Blocking {
    name: &'static str,
    store: Arc<dyn Store>,
}

impl Contender for Blocking {
    fn name(&self) -> String {
        format!("anabranch-store, {}", self.name)
    }

    fn run(&self, writers: usize) -> Run {
        let log = Arc::new(Log::default());
        let heard = Arc::clone(&log);
        self.store
            .set_durable_hook(Arc::new(move |news| heard.durable.lock().unwrap().push(news.unwrap().0)));
        let speed = threads(writers, |n, value| {
            let commit = self.store.commit(put(n, value)).unwrap();
            self.store.wait_durable(commit).unwrap();
            log.commits.lock().unwrap().push((commit, n));
        });
        Run { speed, groups: log.groups() }
    }
}

/// Tasks whose writes go through one thread, as in the engine and the relay: it commits, and
/// answers each when the hook has said that it is durable.
struct Tasks {
    name: &'static str,
    store: Arc<dyn Store>,
}

enum Command {
    Write(u64, oneshot::Sender<()>),
    Durable,
}

impl Contender for Tasks {
    fn name(&self) -> String {
        format!("anabranch-store, {}, tasks", self.name)
    }

    fn run(&self, writers: usize) -> Run {
        let log = Arc::new(Log::default());
        let (commands, received) = mpsc::channel();
        let told = Arc::new(AtomicBool::new(false));
        let (heard, tell, telling) = (Arc::clone(&log), commands.clone(), Arc::clone(&told));
        self.store.set_durable_hook(Arc::new(move |news| {
            heard.durable.lock().unwrap().push(news.unwrap().0);
            if !telling.swap(true, Ordering::AcqRel) {
                // The hub of an earlier run has ended.
                let _ = tell.send(Command::Durable);
            }
        }));
        let done = Arc::new(AtomicUsize::new(0));
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().unwrap();
        let meter = Arc::new(Meter::start());
        let tasks: Vec<_> = (0..writers)
            .map(|_| {
                let (commands, done, meter) = (commands.clone(), Arc::clone(&done), Arc::clone(&meter));
                runtime.spawn(async move {
                    while !meter.is_over() {
                        let (reply, durable) = oneshot::channel();
                        commands.send(Command::Write(next(), reply)).unwrap();
                        durable.await.unwrap();
                        done.fetch_add(1, Ordering::Relaxed);
                    }
                })
            })
            .collect();
        drop(commands);
        hub(&*self.store, &received, &told, &tasks, &log);
        Run { speed: meter.speed(done.load(Ordering::Relaxed)), groups: log.groups() }
    }
}

/// Commits what comes and answers what is durable, until all tasks have ended.
fn hub(
    store: &dyn Store,
    received: &mpsc::Receiver<Command>,
    told: &AtomicBool,
    tasks: &[tokio::task::JoinHandle<()>],
    log: &Log,
) {
    let value = value();
    let mut promised = VecDeque::new();
    while !tasks.iter().all(tokio::task::JoinHandle::is_finished) {
        match received.recv_timeout(Duration::from_millis(10)) {
            Ok(Command::Write(n, reply)) => {
                let commit = store.commit(put(n, &value)).unwrap();
                log.commits.lock().unwrap().push((commit, n));
                promised.push_back((commit, reply));
            }
            Ok(Command::Durable) => {
                told.store(false, Ordering::Release);
                let durable = store.durable().unwrap();
                let due = promised.iter().take_while(|(commit, _)| *commit <= durable).count();
                for (_, reply) in promised.drain(..due) {
                    let _ = oneshot::Sender::send(reply, ());
                }
            }
            Err(_) => {}
        }
    }
}

fn put(n: u64, value: &[u8]) -> Batch {
    let mut batch = Batch::new();
    batch.put(Keyspace::ROW, key(n), value);
    batch
}

/// SQLite as its users run it where nothing may be lost: WAL, synchronous = FULL, one
/// connection for each thread, a busy timeout.
struct Sqlite {
    path: std::path::PathBuf,
}

thread_local! {
    static CONNECTION: std::cell::RefCell<Option<rusqlite::Connection>> = const { std::cell::RefCell::new(None) };
}

impl Sqlite {
    fn new(path: std::path::PathBuf) -> Self {
        let sqlite = Self { path };
        let connection = sqlite.connect();
        connection.execute_batch("CREATE TABLE kv (k BLOB PRIMARY KEY, v BLOB) WITHOUT ROWID").unwrap();
        sqlite
    }

    fn connect(&self) -> rusqlite::Connection {
        let connection = rusqlite::Connection::open(&self.path).unwrap();
        connection.busy_timeout(Duration::from_secs(60)).unwrap();
        connection.pragma_update(None, "journal_mode", "WAL").unwrap();
        connection.pragma_update(None, "synchronous", "FULL").unwrap();
        connection
    }
}

impl Contender for Sqlite {
    fn name(&self) -> String {
        "SQLite, WAL, synchronous = FULL".to_owned()
    }

    fn run(&self, writers: usize) -> Run {
        let speed = threads(writers, |n, value| {
            CONNECTION.with_borrow_mut(|connection| {
                let connection = connection.get_or_insert_with(|| self.connect());
                let mut insert =
                    connection.prepare_cached("INSERT OR REPLACE INTO kv VALUES (?1, ?2)").unwrap();
                insert.execute((&key(n)[..], value)).unwrap();
            });
        });
        Run { speed, groups: Vec::new() }
    }
}

/// The limit for one writer: nothing durable costs less.
struct Append {
    file: File,
}

impl Contender for Append {
    fn name(&self) -> String {
        "append + fdatasync".to_owned()
    }

    fn run(&self, writers: usize) -> Run {
        let speed = threads(writers, |n, value| {
            let record = [&key(n), value].concat();
            (&self.file).write_all(&record).unwrap();
            self.file.sync_data().unwrap();
        });
        Run { speed, groups: Vec::new() }
    }
}

/// A backend without the store.
trait Raw {
    /// Writes a group as the store gives it to the backend, durably.
    fn write(&self, group: &[(Vec<u8>, Vec<u8>)]);
}

struct RawRedb(redb::Database);

const RAW_TABLE: redb::TableDefinition<&[u8], &[u8]> = redb::TableDefinition::new("raw");

impl RawRedb {
    fn new(dir: &Path) -> Self {
        let db = redb::Builder::new().set_cache_size(CACHE_BYTES as usize).create(dir.join("db"));
        Self(db.unwrap())
    }
}

impl Raw for RawRedb {
    fn write(&self, group: &[(Vec<u8>, Vec<u8>)]) {
        let write = self.0.begin_write().unwrap();
        {
            let mut table = write.open_table(RAW_TABLE).unwrap();
            for (key, value) in group {
                table.insert(key.as_slice(), value.as_slice()).unwrap();
            }
        }
        write.commit().unwrap();
    }
}

/// sled alone makes nothing durable, so a sync follows.
struct RawSled {
    db: sled::Db,
    file: File,
}

impl RawSled {
    fn new(dir: &Path) -> Self {
        let db = sled::Config::new().path(dir).cache_capacity(CACHE_BYTES).open().unwrap();
        let file = File::open(dir.join("db")).unwrap();
        Self { db, file }
    }
}

impl Raw for RawSled {
    fn write(&self, group: &[(Vec<u8>, Vec<u8>)]) {
        let mut batch = sled::Batch::default();
        for (key, value) in group {
            batch.insert(key.as_slice(), value.as_slice());
        }
        self.db.apply_batch(batch).unwrap();
        self.db.flush().unwrap();
        self.file.sync_data().unwrap();
    }
}

const CACHE_BYTES: u64 = 48_000_000;

/// Writes the merged batches of a run again, to the backend alone.
fn run_raw(raw: &dyn Raw, groups: &[Vec<u64>]) -> Speed {
    // As long as with the store: the keyspace before the key, a checksum behind the value, and one record
    // that says how far the store is.
    let stored = [value(), vec![0; 4]].concat();
    let prepared = groups.iter().map(|group| {
        let put = |n: &u64| ([&[Keyspace::ROW.0], &key(*n)[..]].concat(), stored.clone());
        let own = (b"\0commit".to_vec(), vec![0; 12]);
        let mut group: Vec<_> = group.iter().map(put).chain([own]).collect();
        group.sort_unstable();
        group
    });
    let prepared: Vec<_> = prepared.collect();
    let meter = Meter::start();
    let mut values = 0;
    for group in &prepared {
        raw.write(group);
        values += group.len() - 1;
        if meter.is_over() {
            break;
        }
    }
    meter.speed(values)
}

/// Who is measured, and what its merged batches are written to alone.
struct Lane {
    contender: Box<dyn Contender>,
    raw: Option<Box<dyn Raw>>,
    speeds: Vec<Speed>,
    raw_speeds: Vec<Speed>,
    group: Vec<f64>,
}

impl Lane {
    fn new(contender: impl Contender + 'static, raw: Option<Box<dyn Raw>>) -> Lane {
        let contender = Box::new(contender);
        Lane { contender, raw, speeds: Vec::new(), raw_speeds: Vec::new(), group: Vec::new() }
    }

    fn round(&mut self, writers: usize) {
        let run = self.contender.run(writers);
        self.speeds.push(run.speed);
        if let Some(raw) = &self.raw {
            self.raw_speeds.push(run_raw(&**raw, &run.groups));
            let values: usize = run.groups.iter().map(Vec::len).sum();
            self.group.push(values as f64 / run.groups.len() as f64);
        }
    }

    fn per_second(&self) -> f64 {
        median(self.speeds.iter().map(|speed| speed.per_second))
    }

    fn print(&self, limit: Option<f64>) {
        let cpu_us = median(self.speeds.iter().map(|speed| speed.cpu_us));
        print!("  {:<38} {:>8.0}/s {cpu_us:>6.1} us CPU each", self.contender.name(), self.per_second());
        if let Some(limit) = limit {
            print!("  {:>6.2} x the time of append + fdatasync", limit / self.per_second());
        }
        if self.raw.is_some() {
            let pairs = || self.speeds.iter().zip(&self.raw_speeds);
            print!(
                "   {:.2} x the same batches ({:.0} each) raw: {:.0}/s, {:.1} us CPU each",
                median(pairs().map(|(store, raw)| store.per_second / raw.per_second)),
                median(self.group.iter().copied()),
                median(self.raw_speeds.iter().map(|speed| speed.per_second)),
                median(self.raw_speeds.iter().map(|speed| speed.cpu_us)),
            );
        }
        println!();
    }
}

fn commits(dir: &Path, writers: usize, rounds: usize) {
    let sub = |name: &str| {
        let path = dir.join(format!("{name}-{writers}"));
        std::fs::create_dir_all(&path).unwrap();
        path
    };
    let mut lanes = Vec::new();
    if wanted("append") {
        lanes.push(Lane::new(Append { file: File::create(sub("append").join("log")).unwrap() }, None));
    }
    if wanted("sqlite") {
        lanes.push(Lane::new(Sqlite::new(sub("sqlite").join("db")), None));
    }
    for (name, options) in kinds() {
        let raw = |way: &str| -> Option<Box<dyn Raw>> {
            let dir = sub(&format!("raw-{name}-{way}"));
            match options.backend {
                Some(BackendKind::Redb) => Some(Box::new(RawRedb::new(&dir))),
                _ => Some(Box::new(RawSled::new(&dir))),
            }
        };
        if wanted(&format!("{name} threads")) {
            let store = open(sub(name), options.clone()).unwrap();
            lanes.push(Lane::new(Blocking { name, store }, raw("threads")));
        }
        if writers > 1 && wanted(&format!("{name} tasks")) {
            let store = open(sub(&format!("{name}-tasks")), options.clone()).unwrap();
            lanes.push(Lane::new(Tasks { name, store }, raw("tasks")));
        }
    }
    // In turn, so that a slow moment of the machine meets all.
    for _ in 0..rounds {
        lanes.iter_mut().for_each(|lane| lane.round(writers));
    }
    println!("{writers} writer(s), durable commits/s:");
    let limit = wanted("append").then(|| lanes[0].per_second());
    lanes.iter().for_each(|lane| lane.print(limit));
    println!();
}

/// Reads from, and opening of, a store with `keys` values; what it takes on disk and in memory. Each is
/// opened by a process of its own, so that what it takes is not mixed with what filling it took.
fn reads(dir: &Path, keys: u64) {
    println!("{keys} values of {VALUE_BYTES} B:");
    for (name, options) in kinds().into_iter().filter(|(name, _)| wanted(name)) {
        let path = dir.join(format!("reads-{name}"));
        let store = open(&path, options).unwrap();
        let value = value();
        let start = Instant::now();
        for chunk in (0..keys).collect::<Vec<_>>().chunks(500) {
            let mut batch = Batch::new();
            chunk.iter().for_each(|n| batch.put(Keyspace::ROW, key(*n), value.as_slice()));
            let commit = store.commit(batch).unwrap();
            store.wait_durable(commit).unwrap();
        }
        let filled = keys as f64 / start.elapsed().as_secs_f64();
        store.shut_down().unwrap();
        drop(store);
        print!("  {name:<15} filled {filled:>7.0}/s");
        std::io::stdout().flush().unwrap();
        let reader = std::process::Command::new(std::env::current_exe().unwrap())
            .arg(READER)
            .args([path.as_os_str(), name.as_ref(), keys.to_string().as_ref()])
            .status();
        assert!(reader.unwrap().success());
        std::fs::remove_dir_all(&path).unwrap();
    }
}

/// First argument of the process that opens and reads.
const READER: &str = "--read";

/// The other process of [`reads`].
fn open_and_read(path: &Path, name: &str, keys: u64) {
    const READS: u64 = 20_000;
    let (_, options) = kinds().into_iter().find(|(kind, _)| *kind == name).unwrap();
    let meter = Meter::start();
    let store = open(path, options).unwrap();
    let opened = (meter.start.elapsed(), Duration::from_secs_f64(meter.speed(1).cpu_us / 1e6));
    let meter = Meter::start();
    for n in 0..READS {
        let key = key(n * 7919 % keys);
        assert!(store.get(View::Published, Keyspace::ROW, &key).unwrap().is_some());
    }
    let random = meter.speed(READS as usize);
    let meter = Meter::start();
    let (mut from, mut seen) = (Vec::new(), 0);
    loop {
        let page = store.scan(View::Published, Keyspace::ROW, &[], &from, 256).unwrap();
        let Some((last, _)) = page.last() else { break };
        from = [last.as_slice(), &[0]].concat();
        seen += page.len();
    }
    assert_eq!(seen as u64, keys);
    let ordered = meter.speed(seen);
    let per_live = store.stats().disk_bytes as f64 / (keys * (VALUE_BYTES as u64 + 16)) as f64;
    println!(
        "   open {:>7.1?} ({:.1?} CPU)   random reads {:>6.0}/s ({:.1} us CPU each)   ordered {:>7.0}/s ({:.1} us \
         CPU each)   {per_live:.2} bytes on disk per live byte   {} MB resident at most",
        opened.0,
        opened.1,
        random.per_second,
        random.cpu_us,
        ordered.per_second,
        ordered.cpu_us,
        peak_resident_bytes() / 1_000_000,
    );
}

/// The most memory this process ever held; 0 where Linux does not tell it.
fn peak_resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

/// Every kind of store that can be opened.
fn kinds() -> Vec<(&'static str, StoreOptions)> {
    let plain = |kind| StoreOptions::default().backend(kind);
    let encrypted = |kind| plain(kind).encryption(StoreKey::from_bytes([7; 32]));
    vec![
        ("sled", plain(BackendKind::Sled)),
        ("sled encrypted", encrypted(BackendKind::Sled)),
        ("redb", plain(BackendKind::Redb)),
        ("redb encrypted", encrypted(BackendKind::Redb)),
    ]
}

/// The key of a value. Scattered over all keys, as hashes are, unless told otherwise.
fn key(n: u64) -> [u8; 16] {
    let n = if ascending() { n } else { n.wrapping_mul(0x9e37_79b9_7f4a_7c15) };
    let mut key = [0; 16];
    key[8..].copy_from_slice(&n.to_be_bytes());
    key
}

fn ascending() -> bool {
    static ASCENDING: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    *ASCENDING.get_or_init(|| text("ANABRANCH_BENCH_ORDER").is_some_and(|order| order == "ascending"))
}

/// Whether a contender is to be measured.
fn wanted(name: &str) -> bool {
    text("ANABRANCH_BENCH_ONLY").is_none_or(|only| only.split(',').any(|one| name.contains(one)))
}

/// Half of it compresses, as records do.
fn value() -> Vec<u8> {
    let mut random = 0x2545_f491_4f6c_dd1d_u64;
    (0..VALUE_BYTES)
        .map(|n| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            if n % 2 == 0 { b'a' } else { random as u8 }
        })
        .collect()
}

fn median(figures: impl Iterator<Item = f64>) -> f64 {
    let mut figures: Vec<f64> = figures.collect();
    figures.sort_unstable_by(f64::total_cmp);
    figures[figures.len() / 2]
}

fn number(name: &str, default: usize) -> usize {
    text(name).and_then(|n| n.parse().ok()).unwrap_or(default)
}

fn text(name: &str) -> Option<String> {
    std::env::var(name).ok()
}
