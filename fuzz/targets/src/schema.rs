//! Schema files, what may follow them, and values by the fields that they define.

use anabranch_core::schema::{EntityType, Field, Schema, Severity};

use crate::{files, world};

/// Stands between a published schema and its successor.
const SUCCESSOR: &str = "\n---\n";

pub(crate) fn run(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    match text.split_once(SUCCESSOR) {
        Some((published, newer)) => compare(published, newer),
        None => read(text),
    }
}

/// What may be published after a schema computes every value as that does, and takes every value that
/// it takes.
fn compare(published: &str, newer: &str) {
    let Ok(published) = Schema::parse(published, "published.toml") else { return };
    let Ok(newer) = Schema::parse(newer, "newer.toml") else { return };
    if published.compatibility(&newer).iter().any(|change| change.severity == Severity::Breaking) {
        return;
    }
    for (name, old) in &published.types {
        let new = newer.types.get(name).expect("a type that was published stays");
        assert_eq!(new.is_server_only(), old.is_server_only(), "who creates {name}");
        assert!(new.version >= old.version);
        assert!(new.version > old.version || new == old, "{name} has two forms of one version");
        for (name, old) in &old.fields {
            let new = new.fields.get(name).expect("a field that was published stays");
            // As text: devices show 0 and -0 as different values.
            let default = |field: &Field| field.default.as_ref().map(ToString::to_string);
            assert_eq!((&new.ty, new.kind(), new.policy), (&old.ty, old.kind(), old.policy), "{name}");
            assert_eq!((&new.group, new.tie), (&old.group, old.tie), "{name}");
            assert_eq!(default(new), default(old), "the default of {name}");
            for value in VALUES {
                if let Ok(value) = old.parse_text(value) {
                    assert_eq!(new.check(&value).ok(), Some(value), "{name} refuses what it took");
                }
            }
        }
        for (name, new) in new.fields.iter().filter(|(name, _)| !old.fields.contains_key(*name)) {
            assert!(!new.required || new.default.is_some(), "{name} is missing in what exists");
        }
    }
}

const VALUES: [&str; 11] =
    ["", "null", "0", "1", "3.5", "-1e999", "[1]", "{}", "2026-01-01T00:00:00Z", "\"x\"", "x"];

fn read(text: &str) {
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
                for value in VALUES.into_iter().chain([text]) {
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
    let deep = files::deep_toml().replacen("a = ", "a = { type = \"json\", default = ", 1);
    seeds.push(table(&format!("{deep} }}")));
    for (old, new) in PAIRS {
        let newer = table(new).replace("version = 1", "version = 2");
        seeds.push(format!("{}{SUCCESSOR}{newer}", table(old)));
    }
    // The same version, a type less, a type more, another policy for what comes.
    let whole = world::SCHEMA;
    let (thing, _) = whole.split_at(whole.find("[country]").unwrap());
    for (old, new) in [
        (whole, whole.replace("version = 1", "version = 2")),
        (whole, thing.to_owned()),
        (thing, whole.to_owned()),
        (whole, whole.replace("merge = \"server_only\"", "")),
        (thing, thing.replace("version = 1\n", "version = 2\nmerge = \"manual\"\npriority = 3\n")),
        (thing, thing.replace("version = 1\nindex", "version = 2\n#")),
    ] {
        seeds.push(format!("{old}{SUCCESSOR}{new}"));
    }
    seeds.into_iter().map(String::into_bytes).collect()
}

/// Fields of a type and of its successor: what is frozen, what may be widened, what is new.
const PAIRS: &[(&str, &str)] = &[
    ("a = { type = \"int\" }", "a = { type = \"int\" }\nb = { type = \"string\" }"),
    (
        "a = { type = \"int\" }",
        "a = { type = \"int\" }\nb = { type = \"int\", required = true, default = 0 }",
    ),
    ("a = { type = \"int\" }", "a = { type = \"int\", merge = \"max\" }"),
    ("a = { type = \"int\" }", "a = { type = \"float\" }"),
    ("a = { type = \"float\", default = 0.0 }", "a = { type = \"float\", default = -0.0 }"),
    ("a = { type = \"json\", default = { a = 1 } }", "a = { type = \"json\", default = { a = 1.0 } }"),
    ("a = { type = \"int\", min = 0, max = 9 }", "a = { type = \"int\", min = -1, max = 9 }"),
    ("a = { type = \"float\", min = 0, max = 9 }", "a = { type = \"float\", min = -0.0, max = 9.5 }"),
    ("a = { type = \"string\", one_of = [\"x\"] }", "a = { type = \"string\", one_of = [\"x\", \"y\"] }"),
    ("a = { type = \"string\", max_bytes = 5 }", "a = { type = \"string\" }"),
    ("a = { type = \"string\", required = true }", "a = { type = \"string\" }"),
    ("a = { type = \"string\" }", "a = { type = \"string\", tie = \"manual\" }"),
    ("a = { type = \"set\", of = \"int\" }", "a = { type = \"list\", of = \"int\" }"),
    ("a = { type = \"blob\", media = [\"a/b\"] }", "a = { type = \"blob\" }"),
    (
        "a = { type = \"int\", merge = \"manual\", group = \"g\" }\nb = { type = \"int\", merge = \"manual\", group = \"g\" }",
        "a = { type = \"int\", merge = \"manual\" }\nb = { type = \"int\", merge = \"manual\", group = \"g\" }",
    ),
    (
        "a = { type = \"int\", merge = \"manual\", group = \"g\" }",
        "a = { type = \"int\", merge = \"manual\", group = \"g\" }\nb = { type = \"int\", merge = \"manual\", group = \"g\" }",
    ),
];
