//! Queries over rows and indexes: what is found must not depend on how it is looked for.

use std::sync::{Arc, Mutex};

use anabranch_core::id::EntityKey;
use anabranch_core::query::{self, Filter, Op, Query};
use anabranch_core::replica::{Edit, Replica, parse_version};
use anabranch_core::rows::Rows;
use anabranch_core::store::{Batch, CommitNo, DurableHook, Entry, Keyspace, StoreError, StoreStats, View};
use anabranch_store::{MemoryStore, Store};
use serde_json::{Value as Json, json};

use crate::faults::{START, alone, edit, set};

const BEFORE: &str = "[thing]\nversion = 1\n[thing.fields]\nname = { type = \"string\" }\n";
const AFTER: &str = "[thing]\nversion = 2\nindex = [[\"kind\"], [\"name\"]]\n[thing.fields]\n\
    name = { type = \"string\" }\nkind = { type = \"string\", default = \"plain\" }\n";

fn ids(rows: &Rows, field: &str, op: Op, value: Json) -> Vec<String> {
    let filters = vec![Filter { field: field.into(), op, value }];
    let query = Query { type_name: "thing".into(), filters, ..Query::default() };
    query::run(rows, &query).unwrap().rows.into_iter().map(|(key, _)| key.id().to_owned()).collect()
}

#[test]
fn rows_and_indexes_follow_a_newer_schema() {
    let store = Arc::new(MemoryStore::new());
    let mut replica = Replica::open(store.clone(), alone(BEFORE)).unwrap();
    for n in 0..300 {
        replica.write(START, &[edit(&format!("t{n}"), &[set("name", json!("x"))])], true).unwrap();
    }
    replica.write(START, &[edit("y", &[set("name", json!("y"))])], true).unwrap();
    for source in [AFTER, BEFORE, AFTER] {
        let config = alone(source);
        drop(replica);
        replica = Replica::open(store.clone(), config.clone()).unwrap();
        let rows = Rows::new(store.clone(), config.schema.clone(), &config.workspace);
        assert_eq!(ids(&rows, "name", Op::Eq, json!("y")), ["y"]);
        assert_eq!(ids(&rows, "name", Op::Eq, json!("x")).len(), 300);
        let kind = config.schema.types["thing"].fields.contains_key("kind");
        if kind {
            assert_eq!(ids(&rows, "kind", Op::Eq, json!("plain")).len(), 301);
        }
        assert_eq!(
            rows.get(&EntityKey::new("thing", "y").unwrap()).unwrap().unwrap().fields.len(),
            1 + usize::from(kind)
        );
        assert_eq!(replica.status().pending, 301);
    }
}

#[test]
fn an_index_changes_no_answer() {
    const FIELDS: &str = "n = { type = \"int\" }\nf = { type = \"float\" }\nt = { type = \"timestamp\" }\n";
    let plain = format!("[thing]\nversion = 1\n[thing.fields]\n{FIELDS}");
    let indexed =
        format!("[thing]\nversion = 1\nindex = [[\"n\"], [\"f\"], [\"t\"]]\n[thing.fields]\n{FIELDS}");
    let found: Vec<Vec<Vec<String>>> = [plain, indexed]
        .iter()
        .map(|source| {
            let store = Arc::new(MemoryStore::new());
            let config = alone(source);
            let mut replica = Replica::open(store.clone(), config.clone()).unwrap();
            replica.write(START, &[edit("null", &[set("n", json!(null))])], true).unwrap();
            for (id, n, f) in [("a", -5, -0.0), ("b", 0, 0.0), ("c", 5, 2.5)] {
                let intents =
                    [set("n", json!(n)), set("f", json!(f)), set("t", json!("2026-01-01T00:00:00Z"))];
                replica.write(START, &[edit(id, &intents)], true).unwrap();
            }
            let rows = Rows::new(store, config.schema.clone(), &config.workspace);
            let ask = |field: &str, value: Json| {
                let equal = ids(&rows, field, Op::Eq, value.clone());
                let unequal = ids(&rows, field, Op::Ne, value.clone());
                assert!(
                    equal.iter().all(|id| !unequal.contains(id)),
                    "{field} is and is not {value}: {equal:?}"
                );
                equal
            };
            vec![
                ask("n", json!(5)),
                ask("n", json!(5.0)),
                ask("n", json!(-5.0)),
                ask("n", json!(2.5)),
                ask("n", json!(null)),
                ask("f", json!(0)),
                ask("f", json!(-0.0)),
                ask("f", json!(2.5)),
                ask("t", json!("2026-01-01T01:00:00+01:00")),
            ]
        })
        .collect();
    assert_eq!(found[0], found[1]);
    assert_eq!(found[0][1], ["c"]);
}

#[test]
fn what_a_field_is_compared_with_is_read_as_its_values_are() {
    let fields = "n = { type = \"int\", max = 9 }\nt = { type = \"timestamp\" }\ns = { type = \"set\", of = \"int\" }\n\
        name = { type = \"string\" }\nm = { type = \"map\", of = \"float\" }\nb = { type = \"text\" }\n\
        big = { type = \"int\" }\nj = { type = \"json\" }\nr = { type = \"ref\", to = \"thing\" }\n\
        p = { type = \"blob\" }\n";
    let store = Arc::new(MemoryStore::new());
    let config = alone(&format!("[thing]\nversion = 1\nindex = [[\"big\"]]\n[thing.fields]\n{fields}"));
    let ty = &config.schema.types["thing"];
    let mut replica = Replica::open(store.clone(), config.clone()).unwrap();
    let intents = [
        set("n", json!(5)),
        set("t", json!("2026-01-01T00:00:00Z")),
        set("s", json!([7, 3])),
        set("name", json!("null")),
        set("m", json!({"42": 1})),
        set("b", json!("at 42")),
        set("big", json!(9_007_199_254_740_993i64)),
        set("j", json!([5.0])),
    ];
    replica.write(START, &[edit("a", &intents)], true).unwrap();
    let rows = Rows::new(store, config.schema.clone(), &config.workspace);
    let ms = anabranch_core::schema::timestamp_to_ms("2026-01-01T00:00:00Z").unwrap();
    for (field, op, value) in [
        ("n", Op::Lt, json!(5.5)),
        ("n", Op::Gt, json!(4.5)),
        ("n", Op::Lt, json!(100)),
        ("n", Op::Lt, json!(u64::MAX)),
        ("n", Op::Ne, json!(null)),
        ("name", Op::Ne, json!(null)),
        ("t", Op::Eq, json!(ms)),
        ("t", Op::Lt, json!(ms + 1)),
        ("t", Op::Eq, json!("2026-01-01T01:00:00+01:00")),
        ("s", Op::Contains, json!(7.0)),
        ("s", Op::Eq, json!([7, 3, 7])),
        ("m", Op::Eq, json!({"42": 1})),
        ("big", Op::Eq, json!(9_007_199_254_740_993i64)),
        ("big", Op::Ne, json!(9_007_199_254_740_992.0)),
        ("big", Op::Gt, json!(9_007_199_254_740_992.0)),
        ("j", Op::Eq, json!([5])),
        ("j", Op::Contains, json!(5.0)),
        ("r", Op::Eq, json!(null)),
        ("p", Op::Eq, json!(null)),
    ] {
        assert_eq!(ids(&rows, field, op, value.clone()), ["a"], "{field} {op:?} {value}");
    }
    assert!(ids(&rows, "big", Op::Eq, json!(9_007_199_254_740_992.0)).is_empty());
    for text in ["name = null", "r != null", "b = 42"] {
        let found = Filter::parse(ty, text).map(|filter| ids(&rows, &filter.field, filter.op, filter.value));
        assert!(found.unwrap().is_empty(), "{text}");
    }
    for text in
        ["name contains null", "b contains 42", "m contains 42", "id = \"a\"", "id = a", "s contains 7"]
    {
        let filter = Filter::parse(ty, text).unwrap();
        assert_eq!(ids(&rows, &filter.field, filter.op, filter.value), ["a"], "{text}");
    }

    let wrong = [
        ("n", Op::Lt, json!("abc"), "field \"n\" got \"abc\"; give it an integer of 64 bits"),
        ("n", Op::Eq, json!(true), "got true"),
        ("n", Op::Ge, json!(null), "neither less nor greater than null"),
        ("n", Op::Contains, json!(5), "of type int contains nothing"),
        ("t", Op::Eq, json!("yesterday"), "give it a time such as"),
        ("t", Op::Contains, json!("2026"), "of type timestamp contains nothing"),
        ("s", Op::Contains, json!("x"), "an integer of 64 bits"),
        ("s", Op::Eq, json!(["x"]), "an integer of 64 bits"),
        ("s", Op::Lt, json!([7]), "of type set has no order"),
        ("name", Op::Contains, json!(1), "contains strings; 1 is none"),
        ("m", Op::Contains, json!(1), "contains strings; 1 is none"),
        ("b", Op::Eq, json!(["x"]), "give it a string"),
        ("p", Op::Eq, json!({}), "give it {\"hash\""),
        ("id", Op::Eq, json!(1), "an id is a string; 1 is none"),
    ];
    for (field, op, value, message) in wrong {
        let filters = vec![Filter { field: field.into(), op, value: value.clone() }];
        let query = Query { type_name: "thing".into(), filters, ..Query::default() };
        let error = query::run(&rows, &query).expect_err(&format!("{field} {op:?} {value}")).to_string();
        assert!(error.contains(message), "{error}");
    }
    for (text, message) in [
        ("t < 2026-01-01", "got \"2026-01-01\"; give it a time such as"),
        ("n < abc", "got \"abc\"; give it an integer"),
        ("s contains x", "got \"x\"; give it an integer"),
        ("m = x", "give it an object"),
    ] {
        let error = Filter::parse(ty, text).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    }
}

/// Longer than any key, in a type with as many of them in one index as there are fields: what is
/// received must be stored, and found by its whole value.
#[test]
fn long_and_hostile_texts_are_indexed_and_found() {
    let names: Vec<String> = (0..12).map(|n| format!("t{n:02}")).collect();
    let fields: String = names.iter().map(|name| format!("{name} = {{ type = \"string\" }}\n")).collect();
    let index = serde_json::to_string(&names).unwrap();
    let source = format!("[thing]\nversion = 1\nindex = [{index}, [\"t00\"]]\n[thing.fields]\n{fields}");
    let store = Arc::new(MemoryStore::new());
    let config = alone(&source);
    let mut replica = Replica::open(store.clone(), config.clone()).unwrap();
    let prefix = "p".repeat(1_500);
    // Zeros take two bytes each, and the first differs from the others only behind the bound.
    let texts =
        [format!("{prefix}b"), format!("{prefix}a"), prefix.clone(), "\0".repeat(1_500), "p".repeat(256)];
    for (n, text) in texts.iter().enumerate() {
        let intents: Vec<_> = names.iter().map(|name| set(name, json!(text))).collect();
        let id = format!("{n}{}", "i".repeat(255));
        replica.write(START, &[edit(&id, &intents)], true).unwrap();
    }
    let rows = Rows::new(store, config.schema.clone(), &config.workspace);
    let place = |id: &str| id.as_bytes()[0] - b'0';
    for (n, text) in texts.iter().enumerate() {
        for field in ["t00", "t07"] {
            let found = ids(&rows, field, Op::Eq, json!(text));
            assert_eq!(found.iter().map(|id| place(id)).collect::<Vec<_>>(), [n as u8], "{field}");
            assert_eq!(ids(&rows, field, Op::Ne, json!(text)).len(), texts.len() - 1);
        }
        // By all of the long index.
        let filters =
            names.iter().map(|name| Filter { field: name.clone(), op: Op::Eq, value: json!(text) }).collect();
        let query = Query { type_name: "thing".into(), filters, ..Query::default() };
        assert_eq!(query::run(&rows, &query).unwrap().rows.len(), 1);
    }
    assert_eq!(ids(&rows, "t00", Op::Eq, json!(format!("{prefix}c"))), [""; 0]);
    assert_eq!(ids(&rows, "t00", Op::Gt, json!(prefix)).len(), 2);

    // In order and page by page, whatever the keys hold of the values.
    for descending in [false, true] {
        let mut seen = Vec::new();
        let mut after = None;
        loop {
            let order_by = Some(("t00".to_owned(), descending));
            let query =
                Query { type_name: "thing".into(), order_by, limit: Some(1), after, ..Query::default() };
            let page = query::run(&rows, &query).unwrap();
            seen.extend(page.rows.iter().map(|(key, _)| place(key.id())));
            match page.cursor {
                Some(cursor) => after = Some(cursor),
                None => break,
            }
        }
        let mut expected = [3, 4, 2, 1, 0];
        if descending {
            expected.reverse();
        }
        assert_eq!(seen, expected);
    }

    // Deleted and changed, they leave nothing behind.
    let gone = format!("0{}", "i".repeat(255));
    replica.write(START, &[edit(&gone, &[anabranch_core::intent::Intent::Delete])], true).unwrap();
    assert_eq!(ids(&rows, "t00", Op::Eq, json!(texts[0])), [""; 0]);
    let changed = format!("1{}", "i".repeat(255));
    replica.write(START, &[edit(&changed, &[set("t00", json!(prefix))])], true).unwrap();
    assert_eq!(ids(&rows, "t00", Op::Eq, json!(texts[1])), [""; 0]);
    assert_eq!(ids(&rows, "t00", Op::Eq, json!(prefix)).len(), 2);
}

/// A store in which something happens right after a scan.
struct Interrupted {
    inner: Arc<MemoryStore>,
    then: Mutex<Option<Box<dyn FnOnce() + Send>>>,
}

impl Store for Interrupted {
    fn get(&self, view: View, keyspace: Keyspace, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        self.inner.get(view, keyspace, key)
    }
    fn scan(
        &self,
        view: View,
        keyspace: Keyspace,
        prefix: &[u8],
        from: &[u8],
        limit: usize,
    ) -> Result<Vec<Entry>, StoreError> {
        let found = self.inner.scan(view, keyspace, prefix, from, limit);
        if let Some(then) = self.then.lock().unwrap().take() {
            then();
        }
        found
    }
    fn scan_rev(
        &self,
        view: View,
        keyspace: Keyspace,
        prefix: &[u8],
        before: &[u8],
        limit: usize,
    ) -> Result<Vec<Entry>, StoreError> {
        self.inner.scan_rev(view, keyspace, prefix, before, limit)
    }
    fn commit(&self, batch: Batch) -> Result<CommitNo, StoreError> {
        self.inner.commit(batch)
    }
    fn durable(&self) -> Result<CommitNo, StoreError> {
        self.inner.durable()
    }
    fn wait_durable(&self, commit: CommitNo) -> Result<(), StoreError> {
        self.inner.wait_durable(commit)
    }
    fn set_durable_hook(&self, hook: DurableHook) {
        self.inner.set_durable_hook(hook);
    }
    fn stats(&self) -> StoreStats {
        self.inner.stats()
    }
    fn shut_down(&self) -> Result<(), StoreError> {
        self.inner.shut_down()
    }
}

/// What is too large for one record lies in parts, and those are gone when it was replaced.
#[test]
fn conflicts_that_change_while_they_are_read_are_read() {
    const SOURCE: &str = "[thing]\nversion = 1\nmerge = \"manual\"\n[thing.fields]\n\
        name = { type = \"string\", max_bytes = 100000 }\n";
    let inner = Arc::new(MemoryStore::new());
    let config = alone(SOURCE);
    let mut replica = Replica::open(inner.clone(), config.clone()).unwrap();
    let first = replica.write(START, &[edit("a", &[set("name", json!("first"))])], true).unwrap();
    let seen = parse_version(&first.versions[0]);
    let large = move |letter: &str| {
        let intents = [set("name", json!(letter.repeat(50_000)))];
        Edit { based_on: seen.clone(), ..edit("a", &intents) }
    };
    for letter in ["x", "y"] {
        replica.write(START, &[large(letter)], true).unwrap();
    }
    let replace = Box::new(move || drop(replica.write(START, &[large("z")], true).unwrap()));
    let store = Arc::new(Interrupted { inner, then: Mutex::new(Some(replace)) });
    let rows = Rows::new(store, config.schema.clone(), &config.workspace);
    let conflicts = rows.conflicts().unwrap();
    assert_eq!(conflicts.len(), 1);
    assert_eq!(conflicts[0].1.sides.len(), 3);
}
