//! Conditions and cursors as people and programs write them.

use std::collections::BTreeSet;
use std::sync::{Arc, OnceLock};

use anabranch_core::intent::Intent;
use anabranch_core::query::{self, Filter, Query};
use anabranch_core::replica::{Edit, Expect, Replica};
use anabranch_core::rows::Rows;
use anabranch_store::MemoryStore;
use serde_json::json;

use crate::{link, world};

fn rows() -> &'static Rows {
    static ROWS: OnceLock<Rows> = OnceLock::new();
    ROWS.get_or_init(|| {
        let store = Arc::new(MemoryStore::new());
        let mut replica = Replica::open(store.clone(), link::config()).unwrap();
        for number in 0..12 {
            let set = |field: &str, value| Intent::Set { field: field.into(), value };
            let intents = vec![
                set("title", json!(["a", "b\u{0}c", "", "ü"][number % 4])),
                set("level", if number % 5 == 0 { json!(null) } else { json!(number as i64 - 6) }),
                set("ratio", json!([-0.0, 0.0, 1.5, -2.5, 1e300][number % 5])),
                set("flag", json!(number % 2 == 0)),
                set("at", json!("2026-01-01T00:00:00Z")),
                set("extra", json!([number, {"a": "x"}])),
                Intent::Add { field: "tags".into(), element: json!("x") },
                Intent::Put { field: "days".into(), key: "mon".into(), value: json!(number) },
                Intent::Splice { field: "body".into(), at: 0, delete: 0, insert: "hello".into() },
            ];
            let key = world::thing(&format!("t{number:02}"));
            let edit = Edit { key, intents, based_on: None, expect: Expect::New };
            replica.write(world::now(number as u64), &[edit], true).unwrap();
        }
        Rows::new(store, world::schema().clone(), &world::home())
    })
}

/// A line of conditions, then one to order by, then a cursor; the rest is looked at as each.
pub(crate) fn run(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let mut lines = text.split('\n');
    let (conditions, order, cursor) =
        (lines.next().unwrap_or_default(), lines.next().unwrap_or_default(), lines.next());
    let mut query = Query { type_name: "thing".into(), limit: Some(3), ..Query::default() };
    for condition in conditions.split(';').take(4) {
        query.filters.extend(Filter::parse(world::ty(), condition).ok());
    }
    query::run(rows(), &query).expect("a condition that was read can be asked");
    if !order.is_empty() {
        let (field, descending) = order.strip_prefix('-').map_or((order, false), |field| (field, true));
        query.order_by = Some((field.to_owned(), descending));
    }
    let from_anywhere = Query { after: cursor.map(str::to_owned), ..query.clone() };
    let _ = query::run(rows(), &from_anywhere);
    let Ok(whole) = query::run(rows(), &Query { limit: None, ..query.clone() }) else { return };
    assert!(whole.cursor.is_none(), "twelve rows are a page");
    let mut seen = BTreeSet::new();
    let mut paged = Vec::new();
    loop {
        let page = query::run(rows(), &query).expect("a page follows a page");
        for (key, _) in page.rows {
            assert!(seen.insert(key.clone()), "{key} comes twice");
            paged.push(key);
        }
        match page.cursor {
            Some(cursor) => query.after = Some(cursor),
            None => break,
        }
    }
    assert!(whole.rows.iter().map(|(key, _)| key).eq(&paged), "pages are not the whole");
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    [
        "",
        "level > 3",
        "level <= -2; flag = true\n-level",
        "title contains b\ntitle",
        "title = \"ü\"; level != null\nratio",
        "tags contains x\nid",
        "days contains mon\n-id",
        "extra contains {\"a\":\"x\"}",
        "at >= 2026-01-01T00:00:00Z\nat",
        "ratio == 0\n-ratio\nAAAAAHQwMQ",
        "id > t03",
        "level = 1e300",
        "level = 0.5;title = a",
        "nope = 1",
        "level contains 1\nextra\n!!!!",
        "body contains ell\nlevel\n_____w",
    ]
    .map(|text| text.as_bytes().to_vec())
    .into()
}
