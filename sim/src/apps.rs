//! The types that the simulated apps keep: a schema of version N, and the same of version N+1.

/// The types of the five apps.
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

/// The schema of the five apps that the engine is for. Always the one that is checked in, so that a seed means
/// the same everywhere.
pub(crate) fn schema() -> String {
    KINDS.to_owned() + REST
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
        let now = Schema::parse(&schema(), "now").unwrap();
        let next = Schema::parse(&next_version(&schema()), "next").unwrap();
        assert_eq!(now.types.len(), 20);
        for (name, ty) in &now.types {
            let grown = next.types[name].fields.len() - ty.fields.len();
            assert_eq!(grown, if GROWN.contains(&name.as_str()) { 3 } else { 0 }, "{name}");
        }
    }
}
