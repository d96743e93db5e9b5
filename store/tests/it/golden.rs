//! Stores as earlier versions and this one have written them are opened, and hold what was
//! written.
//!
//! `ANABRANCH_GOLDEN_WRITE=1` writes those of the newest format anew; do so for a new format,
//! under new names. Those of earlier formats were written by the programs of their time.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anabranch_store::{
    BackendKind, Batch, CommitNo, DiskStore, Entry, Keyspace, Store, StoreKey, StoreOptions, View,
};
use flate2::Compression;
use flate2::read::GzDecoder;
use flate2::write::GzEncoder;

const KEYSPACES: std::ops::RangeInclusive<u8> = 1..=14;

/// What every golden store holds, made by 21 batches: 20 that put entries, one that changes
/// some and removes some.
fn batches(repeats: usize) -> Vec<Batch> {
    let mut batches: Vec<Batch> = (0..20_u8)
        .map(|n| {
            let mut batch = Batch::new();
            for keyspace in KEYSPACES {
                batch.put(Keyspace(keyspace), key(n), value(keyspace, n, repeats));
            }
            batch
        })
        .collect();
    let mut last = Batch::new();
    for keyspace in KEYSPACES {
        last.put(Keyspace(keyspace), key(3), "changed");
        last.put(Keyspace(keyspace), key(4), "");
        last.delete(Keyspace(keyspace), key(5));
    }
    batches.push(last);
    batches
}

/// Keys like those of replicas and relays: hashes, then something of any length.
fn key(n: u8) -> Vec<u8> {
    let mut key = vec![n % 2; 16];
    key.extend([n % 3; 32]);
    key.extend(std::iter::repeat_n(n, usize::from(n)));
    key
}

fn value(keyspace: u8, n: u8, repeats: usize) -> Vec<u8> {
    format!("value {n} of keyspace {keyspace}. ").repeat(usize::from(n) % 7 * repeats).into_bytes()
}

fn expected(keyspace: u8, repeats: usize) -> Vec<Entry> {
    let mut entries: Vec<Entry> =
        (0..20).filter(|n| *n != 5).map(|n| (key(n), value(keyspace, n, repeats))).collect();
    entries[3].1 = b"changed".to_vec();
    entries[4].1 = Vec::new();
    entries.sort();
    entries
}

/// Encrypted stores can't be compressed, so they hold less.
fn repeats(options: &StoreOptions) -> usize {
    if options.encryption.is_some() { 1 } else { 5 }
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden")
}

fn unpacked(name: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let packed = File::open(folder().join(format!("{name}.tar.gz"))).unwrap();
    tar::Archive::new(GzDecoder::new(packed)).unpack(dir.path()).unwrap();
    dir
}

fn key_of_golden_stores() -> StoreKey {
    StoreKey::from_bytes(*b"the key of all the golden stores")
}

fn newest() -> [(&'static str, StoreOptions); 5] {
    let plain = |kind| StoreOptions::default().backend(kind);
    let passphrase = StoreKey::from_passphrase("the passphrase of a golden store");
    [
        ("format-2-sled", plain(BackendKind::Sled)),
        ("format-2-redb", plain(BackendKind::Redb)),
        ("format-2-sled-encrypted", plain(BackendKind::Sled).encryption(key_of_golden_stores())),
        ("format-2-redb-encrypted", plain(BackendKind::Redb).encryption(key_of_golden_stores())),
        ("format-2-redb-passphrase", plain(BackendKind::Redb).encryption(passphrase)),
    ]
}

fn check(name: &str, dir: &Path, options: &StoreOptions) {
    let store = DiskStore::open(dir, options.clone()).unwrap();
    assert!(!store.rolled_back(), "{name}");
    assert_eq!(store.durable().unwrap(), CommitNo(21), "{name}");
    for keyspace in KEYSPACES {
        for view in [View::Published, View::Latest] {
            let found = store.scan(view, Keyspace(keyspace), b"", b"", 100).unwrap();
            assert!(
                found == expected(keyspace, repeats(options)),
                "{name}: keyspace {keyspace} holds something else"
            );
        }
    }
    assert_eq!(store.verify().unwrap(), 14 * 19, "{name}");
}

#[test]
fn golden_stores_hold_what_was_written() {
    if std::env::var("ANABRANCH_GOLDEN_WRITE").is_ok() {
        newest().iter().for_each(|(name, options)| write(name, options));
    }
    for (name, options) in newest() {
        let dir = unpacked(name);
        check(name, dir.path(), &options);
    }
}

#[test]
fn a_store_of_format_1_becomes_one_of_format_2() {
    let dir = unpacked("format-1-sled");
    let format = dir.path().join("FORMAT");
    assert_eq!(fs::read_to_string(&format).unwrap(), "anabranch-store 1 sled-0.34\n");
    // As an upgrade leaves it that was killed before the new file was in place.
    fs::write(dir.path().join("FORMAT.new"), "anabranch-sto").unwrap();
    for options in [StoreOptions::default(), StoreOptions::default().backend(BackendKind::Sled)] {
        check("format-1-sled", dir.path(), &options);
        assert!(fs::read_to_string(&format).unwrap().starts_with("anabranch-store 2 sled plain "));
    }
    let dir = unpacked("format-1-sled");
    let refused = StoreOptions::default().backend(BackendKind::Redb);
    assert!(DiskStore::open(dir.path(), refused).is_err());
    assert_eq!(fs::read_to_string(dir.path().join("FORMAT")).unwrap(), "anabranch-store 1 sled-0.34\n");
}

fn write(name: &str, options: &StoreOptions) {
    let dir = tempfile::tempdir().unwrap();
    let store = DiskStore::open(dir.path(), options.clone()).unwrap();
    for batch in batches(repeats(options)) {
        store.commit(batch).unwrap();
    }
    store.shut_down().unwrap();
    drop(store);
    pack(name, dir.path());
}

fn pack(name: &str, dir: &Path) {
    fs::create_dir_all(folder()).unwrap();
    let packed = File::create(folder().join(format!("{name}.tar.gz"))).unwrap();
    let mut archive = tar::Builder::new(GzEncoder::new(packed, Compression::best()));
    fs::remove_file(dir.join("LOCK")).unwrap();
    archive.append_dir_all("", dir).unwrap();
    archive.into_inner().unwrap().finish().unwrap();
}
