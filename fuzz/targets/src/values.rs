//! Values as people and scripts write them on the command line.

use std::sync::Arc;

use anabranch_core::replica::{Edit, Replica};
use anabranch_core::rows::Rows;
use anabranch_store::MemoryStore;

use crate::{link, world};

pub(crate) fn run(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let edits = anabranch_cli::read_values(world::ty(), text);
    if edits.is_empty() {
        return;
    }
    let store = Arc::new(MemoryStore::new());
    let mut replica = Replica::open(store.clone(), link::config()).unwrap();
    let rows = Rows::new(store, world::schema().clone(), &world::home());
    for edit in edits.into_iter().take(8) {
        let edit = Edit { based_on: None, ..edit };
        if replica.write(world::now(1), std::slice::from_ref(&edit), true).is_err() {
            continue;
        }
        let Some(row) = rows.get(&edit.key).expect("rows can be read") else { continue };
        // What was written is a value that its field takes.
        for (name, value) in &row.fields {
            let field = &world::schema().types[edit.key.type_name()].fields[name];
            if !value.is_null() {
                assert_eq!(field.check(value).as_ref(), Ok(value), "{name} after {edit:?}");
            }
        }
    }
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    [
        "",
        "title=a=b",
        "title=null",
        "title=\"null\"",
        "level=-9223372036854775808",
        "level=1e3",
        "ratio=-0.0",
        "ratio=NaN",
        "flag=true",
        "at=2026-02-30T25:00:00Z",
        "at=2026-01-01T00:00:00.5+01:00",
        "extra={\"a\":[1,{\"b\":null}]}",
        "count+=3",
        "count-=-9223372036854775808",
        "tags+=new york",
        "tags-=x",
        "log+=7",
        "days.2026.01=5",
        "days.=1",
        "body=two words",
        "money=CHF",
        "best=7",
        "nope=1",
        "=",
        "+=",
        r#"{"type":"thing","id":"t1","set":{"title":"n"},"increment":{"count":2},"add":{"tags":["a"]},"splice":{"body":[[0,1,"x"]]}}"#,
        r#"{"type":"thing","id":"t1","put":{"days":{"d":null}},"append":{"log":[1]},"remove":{"tags":["c"]}}"#,
        "{\"type\":\"country\",\"id\":\"\",\"delete\":true}\n\n{\"type\":\"x\",\"id\":\"x\"}",
        r#"[{"id":"a"},{"id":"b","n":1e999}]"#,
        "[[[[[[[[[[[[[[[[[[[[[[[[",
    ]
    .map(|text| text.as_bytes().to_vec())
    .into()
}
