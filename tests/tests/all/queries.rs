//! Queries over rows and indexes: what is found must not depend on how it is looked for.

use std::sync::Arc;

use anabranch_core::id::EntityKey;
use anabranch_core::query::{self, Filter, Op, Query};
use anabranch_core::replica::Replica;
use anabranch_core::rows::Rows;
use anabranch_store::MemoryStore;
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
