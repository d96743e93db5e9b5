//! What the tests that stop a process write, and what has to be there afterwards.

use std::io::Write;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use anabranch_store::{BackendKind, Batch, CommitNo, Keyspace, Store, StoreKey, StoreOptions, View, open};

const DIR: &str = "ANABRANCH_WRITER_DIR";
const KIND: &str = "ANABRANCH_WRITER_KIND";
const BATCHES: &str = "ANABRANCH_WRITER_BATCHES";
const KEYS: u64 = 12;

/// Every way to keep a store.
pub(crate) const KINDS: [&str; 4] = ["sled", "redb", "sled encrypted", "redb encrypted"];

/// How a store of this name is opened: a backend, perhaps with `encrypted` or `unsynced` behind it.
pub(crate) fn options(kind: &str) -> StoreOptions {
    let mut words = kind.split(' ');
    let backend = words.next().and_then(BackendKind::from_name).unwrap();
    words.fold(StoreOptions::default().backend(backend), |options, word| match word {
        "encrypted" => options.encryption(StoreKey::from_bytes([9; 32])),
        "unsynced" => options.without_syncs_for_tests(),
        other => panic!("{other}"),
    })
}

/// The same, whatever the backend is.
pub(crate) fn any_backend(kind: &str) -> StoreOptions {
    let mut options = options(kind);
    options.backend = None;
    options
}

/// A number that the environment gives.
pub(crate) fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// Pseudo-random numbers (xorshift), the same for the same seed.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Random {
        Random(seed | 1)
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

/// Batch `n` writes its number to a set of keys that all batches share, to keys of its own,
/// and removes those of the batch before it. So each prefix of batches has one exact state.
pub(crate) fn batch(n: u64) -> Batch {
    let mut batch = Batch::new();
    for key in 0..KEYS {
        batch.put(Keyspace::ROW, format!("shared {key:02}"), n.to_be_bytes());
        let mut own = n.to_be_bytes().to_vec();
        own.resize(8 + (n % 5 * 700) as usize, b'.');
        batch.put(Keyspace::DOC, own_key(n, key), own);
        if n > 0 && n.is_multiple_of(2) {
            batch.delete(Keyspace::DOC, own_key(n - 1, key));
        }
    }
    batch
}

/// Like a document's: behind the hashes, which are the same here, come numbers.
fn own_key(n: u64, key: u64) -> Vec<u8> {
    [&[7; 48][..], format!("{n:08} {key:02}").as_bytes()].concat()
}

pub(crate) fn check(store: &dyn Store, last: u64) {
    for view in [View::Published, View::Latest] {
        let shared = store.scan(view, Keyspace::ROW, b"shared", b"", 100).unwrap();
        assert_eq!(shared.len() as u64, if last == 0 { 0 } else { KEYS });
        assert!(shared.iter().all(|(_, value)| value[..] == last.to_be_bytes()), "a torn batch");
    }
    let mut expected =
        (1..=last).filter(|n| n % 2 == 0 || *n == last).flat_map(|n| (0..KEYS).map(move |k| (n, k)));
    let mut from = Vec::new();
    loop {
        let page = store.scan(View::Published, Keyspace::DOC, &[7; 48], &from, 500).unwrap();
        let Some((newest, _)) = page.last() else { break };
        from = [newest.as_slice(), &[0]].concat();
        for (key, value) in page {
            let (n, k) = expected.next().expect("more than was committed");
            assert_eq!(key, own_key(n, k));
            assert_eq!(value[..8], n.to_be_bytes());
        }
    }
    assert_eq!(expected.next(), None, "a batch is missing");
}

/// Starts this executable again as a process that writes to the store in `dir` until it is
/// stopped, or has written `batches`, and prints each number that is acknowledged.
pub(crate) fn start_writer(kind: &str, dir: &Path, batches: u64, stdout: impl Into<Stdio>) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "workload::writer", "--nocapture", "--test-threads=1"])
        .env(DIR, dir)
        .env(KIND, kind)
        .env(BATCHES, batches.to_string())
        .stdin(Stdio::null())
        .stdout(stdout)
        .spawn()
        .unwrap()
}

/// The newest acknowledged number among these lines. The last one can be cut off, which makes its
/// number smaller, never larger.
pub(crate) fn newest_acknowledged<'a>(lines: impl Iterator<Item = &'a str>) -> u64 {
    lines.filter_map(|line| line.strip_prefix("acknowledged ")?.parse().ok()).max().unwrap_or(0)
}

/// Not a test by itself: the process that is stopped.
#[test]
fn writer() {
    let Ok(dir) = std::env::var(DIR) else { return };
    let store = open(dir, options(&std::env::var(KIND).unwrap())).unwrap();
    store.set_durable_hook(Arc::new(|news| {
        let mut out = std::io::stdout().lock();
        let _ = writeln!(out, "\nacknowledged {}", news.unwrap().0).and_then(|()| out.flush());
    }));
    let mut n = store.durable().unwrap().0;
    println!("\nopen {n}");
    for _ in 0..number(BATCHES).unwrap() {
        n += 1;
        assert_eq!(store.commit(batch(n)).unwrap(), CommitNo(n));
    }
    loop {
        std::thread::park();
    }
}
