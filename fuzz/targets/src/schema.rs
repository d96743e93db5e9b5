//! Schema files, and values by the fields that they define.

use anabranch_core::schema::{EntityType, Schema};

use crate::world;

pub(crate) fn run(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let _ = EntityType::parse(text, "fuzz.toml");
    match Schema::parse(text, "fuzz.toml") {
        Ok(schema) => {
            let written = schema.to_toml();
            let again = Schema::parse(&written, "written.toml").unwrap_or_else(|error| {
                panic!("a schema is written out as none: {error}\n{written}");
            });
            assert_eq!(again.types, schema.types, "a schema is written out as another:\n{written}");
            assert_eq!(again.hash(), schema.hash());
            assert!(schema.compatibility(&again).is_empty(), "a schema differs from itself");
            for field in schema.types.values().flat_map(|ty| ty.fields.values()) {
                for value in ["", "null", "1", "-1e999", "[1]", "{}", "2026-01-01T00:00:00Z", "\"x\"", text] {
                    if let Ok(canonical) = field.parse_text(value)
                        && !canonical.is_null()
                    {
                        assert_eq!(field.check(&canonical).ok(), Some(canonical), "{value:?} of {field:?}");
                    }
                }
            }
        }
        Err(errors) => assert!(!errors.to_string().is_empty()),
    }
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let table = |fields: &str| format!("[t]\nversion = 1\n[t.fields]\n{fields}\n");
    let mut seeds = vec![
        world::SCHEMA.to_owned(),
        table("a = { type = \"int\", min = 0, max = 9, default = 3 }"),
        table(
            "a = { type = \"ref\", to = \"t\" }\nb = { type = \"blob\", media = [\"a/b\"], max_bytes = 5 }",
        ),
        table(
            "a = { type = \"float\", merge = \"max\" }\nb = { type = \"map\", of = \"int\", merge = \"min\" }",
        ),
        table("a = { type = \"string\", one_of = [\"x\", \"y\"], required = true, tie = \"manual\" }"),
        table("a = { type = \"int\", merge = \"counter\", min = 1 }"),
        table("a = { type = \"nothing\" }"),
        "[t]\nversion = 0\nmerge = \"no\"\nindex = [[\"a\"], []]\n".to_owned(),
        "[_x]\nversion = 1\n".to_owned(),
        "a = [[[[[[[[[[1]]]]]]]]]]".to_owned(),
        "[t".to_owned(),
        String::new(),
    ];
    seeds.push(format!("{}{}", table("a = { type = \"text\" }"), world::SCHEMA));
    seeds.into_iter().map(String::into_bytes).collect()
}
