//! The store beside what a user would pick instead (SQLite in WAL mode, synchronous = FULL) and
//! beside the limit (append + fdatasync), in one run: machines differ and are noisy, so the
//! ratios are what counts.
//!
//! `cargo bench -p anabranch-benches --bench store`. Sizes by environment:
//! `ANABRANCH_BENCH_DIR` (the volume to measure), `ANABRANCH_BENCH_ROUNDS` (5; 0 leaves commits out),
//! `ANABRANCH_BENCH_KEYS` (100000, for reads and opening).

#![expect(clippy::unwrap_used, reason = "a bench has no one to report to")]

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anabranch_store::{BackendKind, Batch, Keyspace, Store, StoreKey, StoreOptions, View, open};

/// How long each contender writes in each round.
const SLICE: Duration = Duration::from_millis(600);
const WRITERS: [usize; 3] = [1, 8, 64];
const VALUE_BYTES: usize = 300;

fn main() {
    let rounds = number("ANABRANCH_BENCH_ROUNDS", 5);
    let keys = number("ANABRANCH_BENCH_KEYS", 100_000) as u64;
    let dir = match std::env::var_os("ANABRANCH_BENCH_DIR") {
        Some(dir) => tempfile::tempdir_in(dir).unwrap(),
        None => tempfile::tempdir().unwrap(),
    };
    println!("{VALUE_BYTES} B a commit, medians of {rounds} rounds, contenders in turn\n");
    for writers in WRITERS.into_iter().filter(|_| rounds > 0) {
        commits(dir.path(), writers, rounds);
    }
    reads(dir.path(), keys);
}

/// One who makes one small value after the other durable.
trait Contender: Sync {
    fn name(&self) -> String;
    /// Returns when the value is durable.
    fn write(&self, key: u64, value: &[u8]);
}

struct Ours {
    name: &'static str,
    store: Arc<dyn Store>,
}

impl Contender for Ours {
    fn name(&self) -> String {
        format!("anabranch-store, {}", self.name)
    }

    fn write(&self, key: u64, value: &[u8]) {
        let mut batch = Batch::new();
        batch.put(Keyspace::ROW, key_bytes(key), value);
        let commit = self.store.commit(batch).unwrap();
        self.store.wait_durable(commit).unwrap();
    }
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

    fn write(&self, key: u64, value: &[u8]) {
        CONNECTION.with_borrow_mut(|connection| {
            let connection = connection.get_or_insert_with(|| self.connect());
            let mut insert = connection.prepare_cached("INSERT OR REPLACE INTO kv VALUES (?1, ?2)").unwrap();
            insert.execute((&key_bytes(key)[..], value)).unwrap();
        });
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

    fn write(&self, key: u64, value: &[u8]) {
        let mut record = key_bytes(key).to_vec();
        record.extend_from_slice(value);
        (&self.file).write_all(&record).unwrap();
        self.file.sync_data().unwrap();
    }
}

/// The limit of many writers on a backend: batches that are merged already, written by one
/// thread that does nothing else.
trait Raw {
    fn write_merged(&self, keys: std::ops::Range<u64>, value: &[u8]);
}

struct RawRedb(redb::Database);

const RAW_TABLE: redb::TableDefinition<&[u8], &[u8]> = redb::TableDefinition::new("raw");

impl Raw for RawRedb {
    fn write_merged(&self, keys: std::ops::Range<u64>, value: &[u8]) {
        let write = self.0.begin_write().unwrap();
        {
            let mut table = write.open_table(RAW_TABLE).unwrap();
            keys.for_each(|key| drop(table.insert(&key_bytes(key)[..], value).unwrap()));
        }
        write.commit().unwrap();
    }
}

struct RawSled {
    db: sled::Db,
    file: File,
}

impl RawSled {
    fn new(dir: &Path) -> Self {
        let db = sled::Config::new().path(dir).cache_capacity(48_000_000).open().unwrap();
        let file = File::open(dir.join("db")).unwrap();
        Self { db, file }
    }
}

impl Raw for RawSled {
    fn write_merged(&self, keys: std::ops::Range<u64>, value: &[u8]) {
        let mut batch = sled::Batch::default();
        for key in keys {
            batch.insert(&key_bytes(key)[..], value);
        }
        self.db.apply_batch(batch).unwrap();
        self.db.flush().unwrap();
        self.file.sync_data().unwrap();
    }
}

fn commits(dir: &Path, writers: usize, rounds: usize) {
    let sub = |name: &str| {
        let path = dir.join(format!("{name}-{writers}"));
        std::fs::create_dir_all(&path).unwrap();
        path
    };
    let mut contenders: Vec<Box<dyn Contender>> = vec![
        Box::new(Append { file: File::create(sub("append").join("log")).unwrap() }),
        Box::new(Sqlite::new(sub("sqlite").join("db"))),
    ];
    for (name, options) in kinds() {
        let store = open(sub(name), options).unwrap();
        contenders.push(Box::new(Ours { name, store }));
    }
    let raws: [(&str, Box<dyn Raw>); 2] = [
        ("sled", Box::new(RawSled::new(&sub("raw-sled")))),
        ("redb", Box::new(RawRedb(redb::Database::create(sub("raw-redb").join("db")).unwrap()))),
    ];
    let mut figures: Vec<Vec<f64>> = vec![Vec::new(); contenders.len()];
    let mut merged: Vec<Vec<f64>> = vec![Vec::new(); raws.len()];
    // In turn, so that a slow moment of the machine meets all.
    for _ in 0..rounds {
        for (contender, figures) in contenders.iter().zip(&mut figures) {
            figures.push(run(&**contender, writers));
        }
        for ((_, raw), figures) in raws.iter().zip(&mut merged) {
            figures.push(run_merged(&**raw, writers as u64));
        }
    }
    println!("{writers} writer(s), durable commits/s:");
    let limit = median(&figures[0]);
    for (contender, figures) in contenders.iter().zip(&figures) {
        let (name, figure) = (contender.name(), median(figures));
        print!("  {name:<40} {figure:>9.0}/s   {:>6.2} x the time of append + fdatasync", limit / figure);
        for ((backend, _), merged) in raws.iter().zip(&merged) {
            if name.contains(backend) {
                print!("   {:.2} x {backend} alone with {writers} merged", figure / median(merged));
            }
        }
        println!();
    }
    for ((backend, _), merged) in raws.iter().zip(&merged) {
        println!(
            "  {:<40} {:>9.0}/s",
            format!("{backend} alone, {writers} merged into one batch"),
            median(merged)
        );
    }
    println!();
}

/// Durable commits per second of `writers` threads.
fn run(contender: &dyn Contender, writers: usize) -> f64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let done = AtomicU64::new(0);
    let start = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..writers {
            scope.spawn(|| {
                let value = value();
                while start.elapsed() < SLICE {
                    contender.write(NEXT.fetch_add(1, Ordering::Relaxed), &value);
                    done.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
    });
    done.load(Ordering::Relaxed) as f64 / start.elapsed().as_secs_f64()
}

fn run_merged(raw: &dyn Raw, size: u64) -> f64 {
    let value = value();
    let mut next = 1 << 40;
    let start = Instant::now();
    while start.elapsed() < SLICE {
        raw.write_merged(next..next + size, &value);
        next += size;
    }
    (next - (1 << 40)) as f64 / start.elapsed().as_secs_f64()
}

/// Reads from, and opening of, a store with `keys` values; what it takes on disk.
fn reads(dir: &Path, keys: u64) {
    const READS: u64 = 20_000;
    println!("{keys} values of {VALUE_BYTES} B:");
    for (name, options) in kinds() {
        let path = dir.join(format!("reads-{name}"));
        let store = open(&path, options.clone()).unwrap();
        let value = value();
        let start = Instant::now();
        for chunk in (0..keys).collect::<Vec<_>>().chunks(500) {
            let mut batch = Batch::new();
            // Scattered, as hashed keys are.
            chunk.iter().for_each(|n| batch.put(Keyspace::ROW, key_bytes(scatter(*n)), value.as_slice()));
            let commit = store.commit(batch).unwrap();
            store.wait_durable(commit).unwrap();
        }
        let filled = start.elapsed();
        store.shut_down().unwrap();
        drop(store);
        let start = Instant::now();
        let store = open(&path, options).unwrap();
        let opened = start.elapsed();
        let start = Instant::now();
        for n in 0..READS {
            let key = key_bytes(scatter(n * 7919 % keys));
            assert!(store.get(View::Published, Keyspace::ROW, &key).unwrap().is_some());
        }
        let random = start.elapsed();
        let start = Instant::now();
        let (mut from, mut seen) = (Vec::new(), 0_u64);
        loop {
            let page = store.scan(View::Published, Keyspace::ROW, &[], &from, 256).unwrap();
            let Some((last, _)) = page.last() else { break };
            from = [last.as_slice(), &[0]].concat();
            seen += page.len() as u64;
        }
        assert_eq!(seen, keys);
        let ordered = start.elapsed();
        let per_live = store.stats().disk_bytes as f64 / (keys * (VALUE_BYTES as u64 + 16)) as f64;
        println!(
            "  {name:<20} filled {:>8.0}/s   open {opened:>9.1?}   random reads {:>8.0}/s   ordered {:>9.0}/s   \
             {per_live:.2} bytes on disk per live byte",
            keys as f64 / filled.as_secs_f64(),
            READS as f64 / random.as_secs_f64(),
            keys as f64 / ordered.as_secs_f64(),
        );
    }
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

fn key_bytes(n: u64) -> [u8; 16] {
    let mut key = [0; 16];
    key[8..].copy_from_slice(&n.to_be_bytes());
    key
}

fn scatter(n: u64) -> u64 {
    n.wrapping_mul(0x9e37_79b9_7f4a_7c15)
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

fn median(figures: &[f64]) -> f64 {
    let mut figures = figures.to_vec();
    figures.sort_unstable_by(f64::total_cmp);
    figures[figures.len() / 2]
}

fn number(name: &str, default: usize) -> usize {
    std::env::var(name).ok().and_then(|n| n.parse().ok()).unwrap_or(default)
}
