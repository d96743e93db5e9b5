//! The types that the simulated apps keep: a schema of version N, and the same of version N+1.

use std::path::{Path, PathBuf};

/// A schema of the same kinds, for where the data is not at hand.
const KINDS: &str = include_str!("../schema.toml");
/// A type with the policies that the five apps leave out.
const REST: &str = r#"
[rest]
version = 1
[rest.fields]
first   = { type = "string", merge = "first_write" }
low     = { type = "float", merge = "min" }
even    = { type = "string", tie = "manual" }
entries = { type = "map", of = "string", merge = "manual" }
"#;
/// Types to which version N+1 adds fields.
const GROWN: [&str; 5] = ["preferences", "note", "hero", "watchlist_item", "recovery"];
/// What it adds.
const ADDED: &str = "added_name = { type = \"string\", default = \"new\" }\n\
                     added_count = { type = \"int\", merge = \"counter\" }\n\
                     added_tags = { type = \"set\", of = \"string\" }\n";

/// The schema of the five apps that the engine is for: `schema.toml` of `ANABRANCH_DATA`, or of
/// `../shared/data` beside the workspace, else the one that is checked in.
pub(crate) fn schema() -> String {
    let data = match std::env::var_os("ANABRANCH_DATA") {
        Some(data) => PathBuf::from(data),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data"),
    };
    std::fs::read_to_string(data.join("schema.toml")).unwrap_or_else(|_| KINDS.to_owned()) + REST
}

/// The next version of a schema: some types have more fields.
pub(crate) fn next_version(source: &str) -> String {
    let mut next = String::with_capacity(source.len() + 1024);
    let mut grows = false;
    for line in source.lines() {
        if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.split([']', '.']).next()) {
            grows = GROWN.contains(&name);
        }
        match line {
            "version = 1" if grows => next.push_str("version = 2"),
            _ => next.push_str(line),
        }
        next.push('\n');
        if grows && line.trim_end().ends_with(".fields]") {
            next.push_str(ADDED);
        }
    }
    next
}

#[cfg(test)]
mod tests {
    use anabranch_core::schema::Schema;

    use super::*;

    #[test]
    fn the_next_version_has_more_fields_in_some_types() {
        for source in [schema(), KINDS.to_owned() + REST] {
            let now = Schema::parse(&source, "now").unwrap();
            let next = Schema::parse(&next_version(&source), "next").unwrap();
            assert_eq!(now.types.len(), 20);
            for (name, ty) in &now.types {
                let grown = next.types[name].fields.len() - ty.fields.len();
                assert_eq!(grown, if GROWN.contains(&name.as_str()) { 3 } else { 0 }, "{name}");
            }
        }
    }
}
