//! What every store promises, as checks that run against any of them.
//!
//! ```ignore
//! contract::run_all(&|| {
//!     let dir = tempfile::tempdir().unwrap();
//!     Box::new(move || open(dir.path(), StoreOptions::default()).unwrap())
//! });
//! ```
//!
//! A check panics where a promise is broken, with words that say which.

// A check that can't go on must stop; that is what a test is.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use anabranch_core::store::{
    Batch, CommitNo, Entry, KEY_BYTES_MAX, Keyspace, Store, StoreError, VALUE_BYTES_MAX, View,
};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

/// Opens one store: the first call makes it, empty; later calls open what is stored, after
/// the store of the call before was shut down and dropped.
pub type Opener = Box<dyn Fn() -> Arc<dyn Store>>;

/// Makes the opener of a store that nothing was ever written to.
pub type NewStore<'a> = &'a dyn Fn() -> Opener;

const ROW: Keyspace = Keyspace::ROW;
const DOC: Keyspace = Keyspace::DOC;

/// Runs every check, each on a store of its own.
pub fn run_all(new_store: NewStore<'_>) {
    ranges_follow_prefix_from_before_and_limit(new_store);
    keyspaces_do_not_mix(new_store);
    the_later_operation_of_a_batch_wins(new_store);
    latest_shows_a_commit_at_once(new_store);
    durable_only_grows_and_the_hook_hears_of_it(new_store);
    a_failing_hook_stops_nothing(new_store);
    bounds_are_refused_and_leave_nothing(new_store);
    what_was_acknowledged_outlives_the_store(new_store);
    a_closed_store_says_so(new_store);
    published_scans_are_never_torn(new_store);
    latest_scans_are_never_torn(new_store);
    scans_between_many_writers_are_never_torn(new_store);
    many_writers_share_the_store(new_store);
    a_model_agrees(new_store, 24);
}

fn put(entries: &[(&str, &str)]) -> Batch {
    let mut batch = Batch::new();
    for (key, value) in entries {
        batch.put(ROW, *key, *value);
    }
    batch
}

fn commit_durably(store: &dyn Store, batch: Batch) -> CommitNo {
    let commit = store.commit(batch).unwrap();
    store.wait_durable(commit).unwrap();
    commit
}

fn names(page: Vec<Entry>) -> Vec<String> {
    page.into_iter().map(|(key, _)| String::from_utf8_lossy(&key).into_owned()).collect()
}

/// Order, prefix, `from`, `before` and `limit` of scans in both directions and both views.
pub fn ranges_follow_prefix_from_before_and_limit(new_store: NewStore<'_>) {
    let open = new_store();
    let store = open();
    let all = ["", "a", "b", "b/1", "b/2", "b/3", "c"];
    commit_durably(&*store, put(&all.map(|key| (key, "v"))));
    let mut ones = Batch::new();
    ones.put(DOC, [0xff, 0xff], "v");
    ones.put(DOC, [0xff, 0xff, 0], "v");
    commit_durably(&*store, ones);
    for view in [View::Published, View::Latest] {
        let scan = |prefix: &str, from: &str, limit| {
            names(store.scan(view, ROW, prefix.as_bytes(), from.as_bytes(), limit).unwrap())
        };
        let scan_rev = |prefix: &str, before: &str, limit| {
            names(store.scan_rev(view, ROW, prefix.as_bytes(), before.as_bytes(), limit).unwrap())
        };
        assert_eq!(scan("", "", 99), all, "everything in order");
        assert_eq!(scan("b", "", 99), ["b", "b/1", "b/2", "b/3"], "an empty from starts at the prefix");
        assert_eq!(scan("b", "b/2", 99), ["b/2", "b/3"], "from is inclusive");
        assert_eq!(scan("b", "a", 99), ["b", "b/1", "b/2", "b/3"], "a from before the prefix");
        assert_eq!(scan("b", "c", 99), [""; 0], "a from behind the prefix");
        assert_eq!(scan("b", "b/1\0", 1), ["b/2"], "the next page starts behind the last key");
        assert_eq!(scan("", "", 0), [""; 0], "no limit, no entries");
        assert_eq!(scan("x", "", 99), [""; 0], "nothing has the prefix");

        let mut reversed = all;
        reversed.reverse();
        assert_eq!(scan_rev("", "", 99), reversed, "everything in descending order");
        assert_eq!(scan_rev("b", "", 2), ["b/3", "b/2"], "an empty before starts at the end");
        assert_eq!(scan_rev("b", "b/2", 99), ["b/1", "b"], "before is exclusive");
        assert_eq!(scan_rev("b", "z", 1), ["b/3"], "a before behind the prefix");
        assert_eq!(scan_rev("b", "b", 99), [""; 0], "nothing is before the prefix");
        assert_eq!(scan_rev("b", "a", 99), [""; 0], "a before ahead of the prefix");
        assert_eq!(scan_rev("", "", 0), [""; 0], "no limit, no entries");

        assert_eq!(store.scan(view, DOC, &[0xff, 0xff], &[], 99).unwrap().len(), 2, "a prefix of ones");
        assert_eq!(store.scan_rev(view, DOC, &[0xff], &[0xff, 0xff, 0], 99).unwrap().len(), 1);
    }
}

/// One key in two keyspaces is two keys, and scans stay in theirs.
pub fn keyspaces_do_not_mix(new_store: NewStore<'_>) {
    let open = new_store();
    let store = open();
    let mut batch = Batch::new();
    for n in [1, 2, 254, 255] {
        batch.put(Keyspace(n), "key", [n]);
    }
    commit_durably(&*store, batch);
    for n in [1, 2, 254, 255] {
        assert_eq!(store.get(View::Published, Keyspace(n), b"key").unwrap().unwrap(), [n]);
        assert_eq!(store.scan(View::Published, Keyspace(n), b"", b"", 9).unwrap().len(), 1);
        assert_eq!(store.scan_rev(View::Latest, Keyspace(n), b"", b"", 9).unwrap().len(), 1);
    }
    assert!(store.get(View::Published, Keyspace(0), b"key").is_err(), "keyspace 0 is the store's own");
    let mut batch = Batch::new();
    batch.put(Keyspace(0), "key", "value");
    assert!(store.commit(batch).is_err(), "keyspace 0 is the store's own");
}

/// Order counts inside a batch; deleting what is absent is no error.
pub fn the_later_operation_of_a_batch_wins(new_store: NewStore<'_>) {
    let open = new_store();
    let store = open();
    let mut batch = put(&[("a", "1"), ("a", "2"), ("b", "1")]);
    batch.delete(ROW, "b");
    batch.delete(ROW, "never there");
    batch.delete(ROW, "c");
    batch.append(put(&[("c", "3")]));
    let commit = store.commit(batch).unwrap();
    for view in [View::Latest, View::Published] {
        if view == View::Published {
            store.wait_durable(commit).unwrap();
        }
        assert_eq!(store.get(view, ROW, b"a").unwrap().unwrap(), b"2");
        assert_eq!(store.get(view, ROW, b"b").unwrap(), None);
        assert_eq!(names(store.scan(view, ROW, b"", b"", 9).unwrap()), ["a", "c"]);
    }
}

/// A commit is in [`View::Latest`] when `commit` returns, and in [`View::Published`] no
/// later than its number is durable.
pub fn latest_shows_a_commit_at_once(new_store: NewStore<'_>) {
    let open = new_store();
    let store = open();
    for round in 0..200_u32 {
        let value = round.to_string();
        let commit = store.commit(put(&[("a", &value), (&value, "x")])).unwrap();
        assert_eq!(store.get(View::Latest, ROW, b"a").unwrap().unwrap(), value.as_bytes());
        let newest = store.scan(View::Latest, ROW, value.as_bytes(), b"", 1).unwrap();
        assert_eq!(names(newest), [value.as_str()]);
        if round % 20 == 0 {
            store.wait_durable(commit).unwrap();
            assert!(store.durable().unwrap() >= commit);
            assert_eq!(store.get(View::Published, ROW, b"a").unwrap().unwrap(), value.as_bytes());
        }
        let delete = if round > 0 { (round - 1).to_string() } else { "none".into() };
        let mut batch = Batch::new();
        batch.delete(ROW, delete.as_bytes());
        store.commit(batch).unwrap();
        assert_eq!(store.get(View::Latest, ROW, delete.as_bytes()).unwrap(), None);
    }
}

/// Numbers grow by one; `durable` never falls; the hook hears growing numbers and in the
/// end the last.
pub fn durable_only_grows_and_the_hook_hears_of_it(new_store: NewStore<'_>) {
    let open = new_store();
    let store = open();
    let heard = Arc::new(Mutex::new(Vec::new()));
    let log = Arc::clone(&heard);
    store.set_durable_hook(Arc::new(move |news| log.lock().unwrap().push(news.unwrap())));
    let mut last = store.commit(put(&[("a", "0")])).unwrap();
    let mut durable = CommitNo(0);
    for n in 1..100_u32 {
        let commit = store.commit(put(&[("a", &n.to_string())])).unwrap();
        assert_eq!(commit.0, last.0 + 1, "numbers grow by one");
        last = commit;
        let now = store.durable().unwrap();
        assert!(now >= durable && now <= last, "durable only grows, and not beyond what was committed");
        durable = now;
    }
    // An empty batch is a commit like any other.
    last = store.commit(Batch::new()).unwrap();
    store.wait_durable(last).unwrap();
    assert_eq!(store.durable().unwrap(), last);
    assert_eq!(store.stats().durable, last);
    store.shut_down().unwrap();
    let heard = heard.lock().unwrap();
    assert!(heard.is_sorted_by(|a, b| a < b), "the hook hears growing numbers: {heard:?}");
    assert_eq!(heard.last(), Some(&last), "the hook hears of the last commit");
}

/// A hook that panics is the listener's bug; what is stored stays stored.
pub fn a_failing_hook_stops_nothing(new_store: NewStore<'_>) {
    let open = new_store();
    let store = open();
    store.set_durable_hook(Arc::new(|_| std::panic::resume_unwind(Box::new("to order"))));
    commit_durably(&*store, put(&[("a", "1")]));
    commit_durably(&*store, put(&[("a", "2")]));
    assert_eq!(store.get(View::Published, ROW, b"a").unwrap().unwrap(), b"2");
}

/// The largest key and value fit; one byte more is refused with its whole batch.
pub fn bounds_are_refused_and_leave_nothing(new_store: NewStore<'_>) {
    let open = new_store();
    let store = open();
    let mut batch = Batch::new();
    batch.put(ROW, vec![7; KEY_BYTES_MAX], vec![1; VALUE_BYTES_MAX]);
    commit_durably(&*store, batch);
    let value = store.get(View::Published, ROW, &[7; KEY_BYTES_MAX]).unwrap().unwrap();
    assert_eq!(value, vec![1; VALUE_BYTES_MAX]);

    let mut long_value = put(&[("a", "1")]);
    long_value.put(ROW, "b", vec![1; VALUE_BYTES_MAX + 1]);
    let mut long_key = put(&[("a", "1")]);
    long_key.put(ROW, vec![7; KEY_BYTES_MAX + 1], "1");
    let mut long_deleted = put(&[("a", "1")]);
    long_deleted.delete(ROW, vec![7; KEY_BYTES_MAX + 1]);
    for (batch, what) in [(long_value, "value"), (long_key, "key"), (long_deleted, "key")] {
        match store.commit(batch) {
            Err(StoreError::TooLarge { what: said, .. }) => assert_eq!(said, what),
            other => panic!("expected TooLarge, got {other:?}"),
        }
    }
    assert_eq!(store.get(View::Latest, ROW, b"a").unwrap(), None, "a refused batch leaves nothing");
    commit_durably(&*store, put(&[("a", "1")]));
}

/// What `wait_durable` or `shut_down` confirmed is there after opening again, and numbers
/// go on from where they were.
pub fn what_was_acknowledged_outlives_the_store(new_store: NewStore<'_>) {
    let open = new_store();
    let mut last = CommitNo(0);
    for round in 0..4_u32 {
        let store = open();
        assert_eq!(store.durable().unwrap(), last, "all that was committed is durable after opening");
        for earlier in 0..round {
            let key = earlier.to_string();
            for (view, name) in [(View::Published, "p"), (View::Latest, "l")] {
                let found = store.get(view, ROW, key.as_bytes()).unwrap();
                assert_eq!(found.as_deref(), Some(b"kept".as_slice()), "{name}: key {key} in round {round}");
                assert_eq!(store.get(view, ROW, format!("gone {key}").as_bytes()).unwrap(), None);
            }
        }
        let key = round.to_string();
        let gone = format!("gone {key}");
        let first = store.commit(put(&[(&key, "kept"), (&gone, "x")])).unwrap();
        assert_eq!(first.0, last.0 + 1, "numbers continue");
        let mut batch = Batch::new();
        batch.delete(ROW, gone.as_bytes());
        last = store.commit(batch).unwrap();
        store.shut_down().unwrap();
    }
}

/// After `shut_down` every call is refused with [`StoreError::Closed`].
pub fn a_closed_store_says_so(new_store: NewStore<'_>) {
    let open = new_store();
    let store = open();
    commit_durably(&*store, put(&[("a", "1")]));
    store.shut_down().unwrap();
    assert!(matches!(store.get(View::Latest, ROW, b"a"), Err(StoreError::Closed)));
    assert!(matches!(store.get(View::Published, ROW, b"a"), Err(StoreError::Closed)));
    assert!(matches!(store.scan(View::Published, ROW, b"", b"", 1), Err(StoreError::Closed)));
    assert!(matches!(store.scan_rev(View::Latest, ROW, b"", b"", 1), Err(StoreError::Closed)));
    assert!(matches!(store.commit(Batch::new()), Err(StoreError::Closed)));
    assert!(matches!(store.durable(), Err(StoreError::Closed)));
    assert!(matches!(store.wait_durable(CommitNo(9)), Err(StoreError::Closed)));
    assert!(matches!(store.shut_down(), Err(StoreError::Closed)));
}

/// Scans of published state while batches are written see whole batches only, and
/// generations that never go back.
pub fn published_scans_are_never_torn(new_store: NewStore<'_>) {
    scans_are_never_torn(new_store, View::Published);
}

/// The same for [`View::Latest`].
pub fn latest_scans_are_never_torn(new_store: NewStore<'_>) {
    scans_are_never_torn(new_store, View::Latest);
}

/// How many scans there are at least, all while batches are written: `ANABRANCH_TORN_SCANS`.
fn torn_scans_min() -> u64 {
    std::env::var("ANABRANCH_TORN_SCANS").ok().and_then(|n| n.parse().ok()).unwrap_or(2)
}

fn scans_are_never_torn(new_store: NewStore<'_>, view: View) {
    // More keys than fit one page of any tree, and every other batch removes half of them.
    const KEYS: u32 = 60;
    const GENERATIONS_MIN: u32 = 240;
    let scans_min = torn_scans_min();
    let open = new_store();
    let store = open();
    let done = AtomicBool::new(false);
    let scans = AtomicU64::new(0);
    let last_generation = AtomicU32::new(0);
    thread::scope(|threads| {
        let read = |descending: bool| {
            let mut newest = 0_u32;
            loop {
                let finished = done.load(Ordering::SeqCst);
                let page = if descending {
                    store.scan_rev(view, ROW, b"key", b"", 1000).unwrap()
                } else {
                    store.scan(view, ROW, b"key", b"", 1000).unwrap()
                };
                let generation =
                    page.first().map_or(0, |(_, v)| u32::from_be_bytes(v[..4].try_into().unwrap()));
                assert!(page.iter().all(|(_, v)| v[..4] == generation.to_be_bytes()), "a torn scan");
                let expected = match generation {
                    0 => 0,
                    odd if odd % 2 == 1 => KEYS,
                    _ => KEYS / 2,
                };
                assert_eq!(page.len(), expected as usize, "generation {generation}: a torn scan");
                assert!(generation >= newest, "generation {generation} was seen after {newest}");
                newest = generation;
                scans.fetch_add(1, Ordering::Relaxed);
                if finished {
                    assert_eq!(
                        newest,
                        last_generation.load(Ordering::SeqCst),
                        "all that is durable is published"
                    );
                    return;
                }
                thread::yield_now();
            }
        };
        let readers = [threads.spawn(move || read(false)), threads.spawn(move || read(true))];
        // Set however this thread ends, or a failing commit would leave the readers running.
        let _end = SetOnDrop(&done);
        let mut last = CommitNo(0);
        for generation in 1.. {
            let enough = generation > GENERATIONS_MIN && scans.load(Ordering::Relaxed) >= scans_min;
            // A reader that ends before it is told to has found a torn scan.
            if enough || readers.iter().any(|reader| reader.is_finished()) {
                break;
            }
            last_generation.store(generation, Ordering::SeqCst);
            let mut batch = Batch::new();
            for n in 0..KEYS {
                let key = format!("key {n:04}");
                if generation % 2 == 0 && n % 2 == 0 {
                    batch.delete(ROW, key);
                } else {
                    let mut value = generation.to_be_bytes().to_vec();
                    value.resize(4 + (n as usize % 7) * 20, 0);
                    batch.put(ROW, key, value);
                }
            }
            last = store.commit(batch).unwrap();
            if generation % 8 == 0 {
                store.wait_durable(last).unwrap();
            }
        }
        store.wait_durable(last).unwrap();
    });
    assert!(scans.load(Ordering::Relaxed) >= scans_min);
}

/// Several threads write, each keys of its own, and wait until they are durable. Published scans see whole
/// batches, none older than what was acknowledged before.
pub fn scans_between_many_writers_are_never_torn(new_store: NewStore<'_>) {
    const WRITERS: usize = 6;
    const KEYS: u32 = 12;
    const GENERATIONS_MIN: u32 = 60;
    let scans_min = torn_scans_min();
    let open = new_store();
    let store = open();
    let acknowledged: [AtomicU32; WRITERS] = Default::default();
    let done = AtomicBool::new(false);
    let mut scans = 0;
    let write = |writer: usize| {
        for generation in 1_u32.. {
            if done.load(Ordering::SeqCst) {
                return;
            }
            let mut batch = Batch::new();
            for n in 0..KEYS {
                let key = format!("{writer} {n:02}");
                if generation % 2 == 0 && n % 2 == 0 {
                    batch.delete(ROW, key);
                } else {
                    batch.put(ROW, key, generation.to_be_bytes());
                }
            }
            commit_durably(&*store, batch);
            acknowledged[writer].store(generation, Ordering::SeqCst);
        }
    };
    thread::scope(|threads| {
        let write = &write;
        for writer in 0..WRITERS {
            threads.spawn(move || write(writer));
        }
        let _end = SetOnDrop(&done);
        let mut newest = [0; WRITERS];
        while scans < scans_min
            || acknowledged.iter().any(|generation| generation.load(Ordering::Relaxed) < GENERATIONS_MIN)
        {
            for (writer, newest) in newest.iter_mut().enumerate() {
                let before = acknowledged[writer].load(Ordering::SeqCst);
                let prefix = format!("{writer} ");
                let page = store.scan(View::Published, ROW, prefix.as_bytes(), b"", 100).unwrap();
                let generation =
                    page.first().map_or(0, |(_, v)| u32::from_be_bytes(v[..].try_into().unwrap()));
                assert!(page.iter().all(|(_, v)| v[..] == generation.to_be_bytes()), "a torn scan");
                let expected = match generation {
                    0 => 0,
                    odd if odd % 2 == 1 => KEYS,
                    _ => KEYS / 2,
                };
                assert_eq!(page.len(), expected as usize, "generation {generation}: a torn scan");
                assert!(
                    generation >= before.max(*newest),
                    "{generation} was seen after {before} or {newest}"
                );
                *newest = generation;
                scans += 1;
            }
        }
    });
}

struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Threads that commit and wait at the same time all get their batches kept.
pub fn many_writers_share_the_store(new_store: NewStore<'_>) {
    const WRITERS: u32 = 8;
    const BATCHES: u32 = 40;
    let open = new_store();
    let store = open();
    thread::scope(|threads| {
        for writer in 0..WRITERS {
            let store = &store;
            threads.spawn(move || {
                for n in 0..BATCHES {
                    commit_durably(&**store, put(&[(&format!("{writer} {n:03}"), "v")]));
                    let mine = format!("{writer} ");
                    let found = store.scan(View::Published, ROW, mine.as_bytes(), b"", 1000).unwrap();
                    assert_eq!(found.len() as u32, n + 1);
                }
            });
        }
    });
    assert_eq!(store.durable().unwrap(), CommitNo(u64::from(WRITERS * BATCHES)));
}

#[derive(Clone, Debug)]
enum Step {
    Commit(Vec<(u8, Vec<u8>, Option<Vec<u8>>)>),
    Wait,
    Reopen,
    Get(View, u8, Vec<u8>),
    Scan(View, u8, Vec<u8>, Vec<u8>, usize, bool),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    // Few different bytes, so that keys collide and prefixes match.
    let key = || prop::collection::vec(prop::sample::select(vec![0_u8, 1, 0x61, 0xff]), 0..4);
    let keyspace = || prop::sample::select(vec![1_u8, 2, 255]);
    let view = || prop::sample::select(vec![View::Published, View::Latest]);
    let value = prop::option::weighted(0.7, prop::collection::vec(any::<u8>(), 0..40));
    let commit = prop::collection::vec((keyspace(), key(), value), 0..12).prop_map(Step::Commit);
    let get = (view(), keyspace(), key()).prop_map(|(v, ks, k)| Step::Get(v, ks, k));
    let scan = (view(), keyspace(), key(), key(), 0_usize..20, any::<bool>())
        .prop_map(|(v, ks, p, f, n, d)| Step::Scan(v, ks, p, f, n, d));
    let step = prop_oneof![8 => commit, 1 => Just(Step::Wait), 1 => Just(Step::Reopen), 8 => get, 12 => scan];
    prop::collection::vec(step, 1..60)
}

type Model = BTreeMap<(u8, Vec<u8>), Vec<u8>>;

fn model_scan(model: &Model, ks: u8, prefix: &[u8], bound: &[u8], limit: usize, rev: bool) -> Vec<Entry> {
    let inside = model.iter().filter(|((space, key), _)| {
        let reached = bound.is_empty() || if rev { key.as_slice() < bound } else { key.as_slice() >= bound };
        *space == ks && key.starts_with(prefix) && reached
    });
    let mut all: Vec<Entry> = inside.map(|((_, key), value)| (key.clone(), value.clone())).collect();
    if rev {
        all.reverse();
    }
    all.truncate(limit);
    all
}

/// Random steps give what an ordered map gives. Published reads are compared after waiting,
/// as only then is it certain what they show.
pub fn a_model_agrees(new_store: NewStore<'_>, cases: u32) {
    let config = Config { cases, failure_persistence: None, ..Config::default() };
    let outcome = TestRunner::new(config).run(&steps(), |steps| {
        let open = new_store();
        let mut store = open();
        let mut model = Model::new();
        let mut last = CommitNo(0);
        for step in steps {
            match step {
                Step::Commit(ops) => {
                    let mut batch = Batch::new();
                    for (ks, key, value) in ops {
                        match value {
                            Some(value) => {
                                batch.put(Keyspace(ks), key.clone(), value.clone());
                                model.insert((ks, key), value);
                            }
                            None => {
                                batch.delete(Keyspace(ks), key.clone());
                                model.remove(&(ks, key));
                            }
                        }
                    }
                    last = store.commit(batch).unwrap();
                }
                Step::Wait => store.wait_durable(last).unwrap(),
                Step::Reopen => {
                    store.shut_down().unwrap();
                    drop(store);
                    store = open();
                }
                Step::Get(view, ks, key) => {
                    if view == View::Published {
                        store.wait_durable(last).unwrap();
                    }
                    let found = store.get(view, Keyspace(ks), &key).unwrap();
                    prop_assert_eq!(found.as_ref(), model.get(&(ks, key)));
                }
                Step::Scan(view, ks, prefix, bound, limit, rev) => {
                    if view == View::Published {
                        store.wait_durable(last).unwrap();
                    }
                    let found = if rev {
                        store.scan_rev(view, Keyspace(ks), &prefix, &bound, limit).unwrap()
                    } else {
                        store.scan(view, Keyspace(ks), &prefix, &bound, limit).unwrap()
                    };
                    prop_assert_eq!(found, model_scan(&model, ks, &prefix, &bound, limit, rev));
                }
            }
        }
        Ok(())
    });
    if let Err(e) = outcome {
        panic!("{e}");
    }
}
