//! The rules of the schema language, one test for each.

use std::path::{Path, PathBuf};

use proptest::prelude::*;
use serde_json::json;

use super::*;

/// A schema with one type of two fields, as the start of most tests.
fn parse(source: &str) -> Result<Schema, SchemaErrors> {
    Schema::parse(source, "s.toml")
}

/// The file is a schema, and its export is an equal one.
#[track_caller]
fn accept(source: &str) -> Schema {
    let schema = parse(source).unwrap_or_else(|errors| panic!("{errors}"));
    let export = schema.to_toml();
    let again = parse(&export).unwrap_or_else(|errors| panic!("{errors}\n{export}"));
    assert_eq!(again, schema, "{export}");
    assert_eq!(again.hash(), schema.hash());
    assert_eq!(Schema::from_types(schema.types.values().cloned()).as_ref(), Ok(&schema));
    schema
}

/// The file has exactly these mistakes: each a line and parts of the message.
#[track_caller]
fn refuse(source: &str, expected: &[(usize, &[&str])]) {
    let errors = parse(source).expect_err("accepted");
    assert_eq!(errors.errors.len(), expected.len(), "{errors}");
    for (error, (line, parts)) in errors.errors.iter().zip(expected) {
        assert_eq!(error.line, *line, "{error}");
        assert_eq!(error.file, "s.toml");
        for part in *parts {
            assert!(error.message.contains(part), "no {part:?} in: {error}");
        }
    }
}

/// A type `t` with the one field `f`.
fn with_field(definition: &str) -> String {
    format!("[t]\nversion = 1\n[t.fields]\nf = {{ {definition} }}\n")
}

#[track_caller]
fn accept_field(definition: &str) -> Field {
    accept(&with_field(definition)).types["t"].fields["f"].clone()
}

/// The field has exactly one mistake, whose message names it and contains the parts.
#[track_caller]
fn refuse_field(definition: &str, parts: &[&str]) {
    refuse(&with_field(definition), &[(4, &[&["t.f: "], parts].concat())]);
}

/// A type with these keys and the fields `a` (string), `b` (int), `s` (set), `c` (counter).
fn with_keys(keys: &str) -> String {
    format!(
        "[t]\nversion = 1\n{keys}\n[t.fields]\na = {{ type = \"string\" }}\nb = {{ type = \"int\" }}\n\
         s = {{ type = \"set\", of = \"int\" }}\nc = {{ type = \"int\", merge = \"counter\" }}\n"
    )
}

// ── Keys and names ──────────────────────────────────────────────────────────────────────

#[test]
fn every_mistake_is_reported_with_its_line() {
    refuse(
        "[a]\nversion = 0\nmerg = \"lww\"\n[a.fields]\nx = { type = \"strin\" }\ny = { typ = \"int\" }\n\n[b]\n",
        &[
            (2, &["a: `version` is 0", "make it 1 to"]),
            (3, &["a: no key \"merg\"", "did you mean \"merge\"?"]),
            (5, &["a.x: no type \"strin\"", "did you mean \"string\"?"]),
            (6, &["a.y: no key \"typ\"", "did you mean \"type\"?"]),
            (6, &["a.y: no `type`", "bool, int"]),
            (8, &["b: no `version`", "version = 1"]),
            (8, &["b: no `fields`", "[b.fields]"]),
        ],
    );
    let errors = parse("[a]\nversion = 0\n").unwrap_err();
    assert!(errors.to_string().starts_with("s.toml:1: a: no `fields`"), "{errors}");
}

#[test]
fn syntax_errors_have_a_line() {
    refuse("[a]\nversion = 1\nversion = 2\n", &[(3, &["not TOML", "duplicate key"])]);
    refuse("[a\n", &[(1, &["not TOML"])]);
}

#[test]
fn an_empty_file_is_a_schema_without_types() {
    assert!(accept("# nothing yet\n").types.is_empty());
}

#[test]
fn type_names_are_small_letters_digits_and_underscores() {
    let fields = "version = 1\nfields = {}\n";
    accept(&format!("[a_1]\n{fields}"));
    accept(&format!("[{}]\n{fields}", "a".repeat(64)));
    refuse(&format!("[{}]\n{fields}", "a".repeat(65)), &[(1, &["at most 64 bytes"])]);
    refuse(&format!("[Note]\n{fields}"), &[(1, &["\"Note\"", "a-z"])]);
    refuse(&format!("[1a]\n{fields}"), &[(1, &["a-z"])]);
    refuse(&format!("[\"\"]\n{fields}"), &[(1, &["a-z"])]);
    refuse(&format!("[_a]\n{fields}"), &[(1, &["reserved"])]);
}

#[test]
fn field_names_are_letters_digits_and_underscores() {
    let named = |name: &str| format!("[t]\nversion = 1\n[t.fields]\n{name} = {{ type = \"int\" }}\n");
    accept(&named("primaryMuscles_2"));
    refuse(&named("id"), &[(4, &["\"id\" already", "another name"])]);
    refuse(&named("_a"), &[(4, &["reserved"])]);
    refuse(&named("a-b"), &[(4, &["letters, digits"])]);
    refuse(&named("\"ä\""), &[(4, &["letters, digits"])]);
    refuse(&named(&"a".repeat(65)), &[(4, &["64 bytes"])]);
}

#[test]
fn a_type_is_a_table() {
    refuse("version = 1\n", &[(1, &["not a type", "[name]"])]);
    refuse("d == .\nd .= .\n", &[(1, &["not TOML"])]);
    refuse("[[a]]\nversion = 1\n", &[(1, &["not a type"])]);
    refuse("[a]\nversion = 1\nfields = 3\n", &[(3, &["`fields` must be a table"])]);
    refuse("[a]\nversion = 1\n[a.fields]\nx = \"string\"\n", &[(4, &["a field is a table", "x = {"])]);
}

#[test]
fn values_of_keys_have_their_kinds() {
    refuse("[a]\nversion = \"1\"\nfields = {}\n", &[(2, &["`version` is of kind string", "an integer"])]);
    refuse("[a]\nversion = 4294967296\nfields = {}\n", &[(2, &["4294967295"])]);
    refuse("[a]\nversion = 1\nmerge = 1\nfields = {}\n", &[(3, &["a string"])]);
    refuse("[a]\nversion = 1\npriority = 1.5\nfields = {}\n", &[(3, &["an integer"])]);
    refuse_field("type = \"int\", required = 1", &["`required`", "true or false"]);
}

#[test]
fn fields_may_be_tables_of_their_own() {
    let schema = accept("[t]\nversion = 1\n[t.fields.f]\ntype = \"json\"\n[t.fields.f.default]\na = 1\n");
    assert_eq!(schema.types["t"].fields["f"].default, Some(json!({"a": 1})));
    refuse("[t]\nversion = 1\n[t.fields]\nf.typ = \"int\"\n", &[(4, &["typ"]), (4, &["no `type`"])]);
}

#[test]
fn other_systems_words_are_understood() {
    refuse_field("type = \"boolean\"", &["did you mean \"bool\"?"]);
    refuse_field("type = \"datetime\"", &["did you mean \"timestamp\"?"]);
    refuse_field("type = \"String\"", &["did you mean \"string\"?"]);
    refuse_field("type = \"int\", merge = \"last_write_wins\"", &["did you mean \"lww\"?"]);
    refuse_field("type = \"int\", merge = \"server-wins\"", &["did you mean \"server_wins\"?"]);
    refuse_field("type = \"quaternion\"", &["use one of bool, int"]);
    refuse_field("type = \"string\", max_length = 3", &["did you mean \"max_bytes\"?"]);
}

// ── Types ───────────────────────────────────────────────────────────────────────────────

#[test]
fn containers_hold_single_values() {
    let set = accept_field("type = \"set\", of = \"string\"");
    assert_eq!((set.policy, set.kind()), (Policy::Set, FieldKind::Set));
    let list = accept_field("type = \"list\", of = \"json\"");
    assert_eq!((list.policy, list.kind()), (Policy::List, FieldKind::List));
    let text = accept_field("type = \"text\"");
    assert_eq!((text.policy, text.kind()), (Policy::Text, FieldKind::Text));
    refuse_field("type = \"set\"", &["needs `of`", "of = \"string\""]);
    refuse_field("type = \"map\", of = \"set\"", &["single values, not set", "json"]);
    refuse_field("type = \"list\", of = \"text\"", &["single values, not text"]);
    refuse_field("type = \"text\", of = \"string\"", &["`of` is for set, list and map"]);
    refuse_field("type = \"string\", of = \"string\"", &["`of` is for set, list and map"]);
}

#[test]
fn sets_hold_what_can_be_told_apart() {
    for of in ["bool", "int", "string", "timestamp"] {
        accept_field(&format!("type = \"set\", of = \"{of}\""));
    }
    accept_field("type = \"set\", of = \"ref\", to = \"t\"");
    for of in ["float", "json", "blob"] {
        refuse_field(&format!("type = \"set\", of = \"{of}\""), &[of, "\"string\"", "type = \"list\""]);
    }
}

#[test]
fn references_name_a_type_of_the_schema() {
    accept_field("type = \"ref\", to = \"t\"");
    let note = "[note]\nversion = 1\nfields = {}\n";
    accept(&format!("{}{note}", with_field("type = \"ref\", to = \"note\"")));
    refuse(
        &format!("{}{note}", with_field("type = \"ref\", to = \"notes\"")),
        &[(4, &["t.f: no type \"notes\"", "did you mean \"note\"?"])],
    );
    refuse_field("type = \"ref\"", &["needs `to`"]);
    refuse_field("type = \"list\", of = \"ref\"", &["needs `to`"]);
    refuse_field("type = \"string\", to = \"t\"", &["`to` is for ref"]);
    // A type by itself doesn't know the others.
    assert!(EntityType::parse(&with_field("type = \"ref\", to = \"other\""), "s.toml").is_ok());
}

#[test]
fn a_type_by_itself_is_exactly_one() {
    assert!(EntityType::parse("", "s.toml").is_err());
    let two = "[a]\nversion = 1\nfields = {}\n[b]\nversion = 1\nfields = {}\n";
    let errors = EntityType::parse(two, "s.toml").unwrap_err();
    assert!(errors.to_string().contains("exactly one"), "{errors}");
}

#[test]
fn types_made_by_hand_meet_the_same_rules() {
    let schema = accept(&with_field("type = \"ref\", to = \"t\""));
    let mut ty = schema.types["t"].clone();
    assert!(Schema::from_types([ty.clone(), ty.clone()]).unwrap_err().to_string().contains("twice"));
    ty.fields.get_mut("f").unwrap().ty = FieldType::Scalar(ScalarType::Ref("nothing".to_owned()));
    assert!(Schema::from_types([ty.clone()]).unwrap_err().to_string().contains("no type \"nothing\""));
    ty.fields.get_mut("f").unwrap().ty = FieldType::Scalar(ScalarType::Json);
    ty.fields.get_mut("f").unwrap().default = Some(json!([null]));
    assert!(Schema::from_types([ty]).unwrap_err().to_string().contains("EntityType::parse"));
}

// ── Policies ────────────────────────────────────────────────────────────────────────────

#[test]
fn a_fields_own_merge_beats_the_containers_beats_the_types() {
    let schema = accept(
        "[t]\nversion = 1\nmerge = \"server_wins\"\n[t.fields]\nown = { type = \"int\", merge = \"max\" }\n\
         inherited = { type = \"int\" }\nnotes = { type = \"text\" }\ndays = { type = \"map\", of = \"int\" }\n\
         best = { type = \"map\", of = \"int\", merge = \"max\" }\n[u]\nversion = 1\n[u.fields]\n\
         plain = { type = \"int\" }\n",
    );
    let policy = |ty: &str, field: &str| schema.types[ty].fields[field].policy;
    assert_eq!(policy("t", "own"), Policy::Max);
    assert_eq!(policy("t", "inherited"), Policy::ServerWins);
    assert_eq!(policy("t", "notes"), Policy::Text);
    assert_eq!(policy("t", "days"), Policy::Lww);
    assert_eq!(policy("t", "best"), Policy::Max);
    assert_eq!(policy("u", "plain"), Policy::Lww);
}

#[test]
fn every_policy_fits_the_types_it_is_for() {
    let any = ["server_wins", "server_only", "client_wins", "lww", "first_write", "manual"];
    let allowed: &[(&str, &[&str])] = &[
        ("type = \"bool\"", &[]),
        ("type = \"int\"", &["max", "min", "counter"]),
        ("type = \"float\"", &["max", "min"]),
        ("type = \"timestamp\"", &["max", "min"]),
        ("type = \"string\"", &[]),
        ("type = \"json\"", &[]),
        ("type = \"blob\"", &[]),
        ("type = \"ref\", to = \"t\"", &[]),
    ];
    let all = ["max", "min", "counter", "set", "list", "map", "text"];
    for (ty, more) in allowed {
        for policy in any {
            assert_eq!(accept_field(&format!("{ty}, merge = \"{policy}\"")).policy.name(), policy);
        }
        for policy in all {
            let definition = format!("{ty}, merge = \"{policy}\"");
            match more.contains(&policy) {
                true => assert_eq!(accept_field(&definition).policy.name(), policy),
                false => refuse_field(&definition, &["does not fit", "use server_wins"]),
            }
        }
    }
    for container in ["text", "set", "list"] {
        let of = if container == "text" { "" } else { ", of = \"string\"" };
        for policy in any.iter().chain(&all) {
            let definition = format!("type = \"{container}\"{of}, merge = \"{policy}\"");
            match *policy == container {
                true => assert_eq!(accept_field(&definition).policy.name(), container),
                false => refuse_field(&definition, &["does not fit", &format!("use {container}")]),
            }
        }
    }
}

#[test]
fn a_maps_merge_is_that_of_its_entries() {
    let map = |of: &str, merge: &str| format!("type = \"map\", of = \"{of}\", merge = \"{merge}\"");
    assert_eq!(accept_field(&map("json", "map")).policy, Policy::Lww);
    for merge in ["lww", "first_write", "manual"] {
        assert_eq!(accept_field(&map("json", merge)).policy.name(), merge);
    }
    assert_eq!(accept_field(&map("float", "min")).policy, Policy::Min);
    refuse_field(&map("json", "max"), &["does not fit a map of json", "use map, lww, first_write, manual"]);
    refuse_field(&map("int", "counter"), &["does not fit"]);
    refuse_field(&map("int", "server_wins"), &["does not fit"]);
}

#[test]
fn a_types_merge_must_fit_any_value() {
    let with = |merge: &str| {
        format!("[t]\nversion = 1\nmerge = \"{merge}\"\n[t.fields]\nf = {{ type = \"int\" }}\n")
    };
    for merge in ["server_wins", "server_only", "client_wins", "first_write", "manual"] {
        let schema = accept(&with(merge));
        assert_eq!(schema.types["t"].fields["f"].policy.name(), merge);
        assert_eq!(schema.types["t"].is_server_only(), merge == "server_only");
    }
    assert_eq!(accept(&with("lww")).types["t"].default_policy, None);
    refuse(&with("max"), &[(3, &["compares numbers", "set it at a field"])]);
    refuse(&with("counter"), &[(3, &["sums integers"])]);
    refuse(&with("text"), &[(3, &["without being told"])]);
    refuse(&with("lwww"), &[(3, &["did you mean \"lww\"?"])]);
}

#[test]
fn counters_have_no_value_to_restrict() {
    accept_field("type = \"int\", merge = \"counter\"");
    for rule in ["required = true", "one_of = [1]", "min = 0", "max = 1", "default = 0"] {
        let name = rule.split(' ').next().unwrap();
        refuse_field(
            &format!("type = \"int\", merge = \"counter\", {rule}"),
            &["a counter", &format!("remove `{name}`")],
        );
    }
}

#[test]
fn containers_are_there_from_the_start() {
    refuse_field("type = \"text\", required = true", &["a text is there from the start"]);
    refuse_field("type = \"set\", of = \"int\", default = [1]", &["remove `default`"]);
}

#[test]
fn a_manual_tie_needs_lww() {
    assert_eq!(accept_field("type = \"int\", tie = \"manual\"").tie, Tie::Manual);
    assert_eq!(accept_field("type = \"int\", tie = \"clock\"").tie, Tie::Clock);
    assert_eq!(accept_field("type = \"map\", of = \"int\", tie = \"manual\"").tie, Tie::Manual);
    refuse_field(
        "type = \"int\", merge = \"max\", tie = \"manual\"",
        &["only \"lww\"", "instead of \"max\""],
    );
    refuse_field("type = \"text\", tie = \"manual\"", &["only \"lww\""]);
    refuse_field("type = \"int\", tie = \"manuel\"", &["did you mean \"manual\"?"]);
}

// ── Groups ──────────────────────────────────────────────────────────────────────────────

#[test]
fn members_of_a_group_are_found_by_name() {
    let schema = accept(
        "[t]\nversion = 1\n[t.fields]\nb = { type = \"int\", merge = \"manual\", group = \"log\" }\n\
         a = { type = \"json\", merge = \"manual\", group = \"log\" }\nc = { type = \"int\" }\n",
    );
    let ty = &schema.types["t"];
    let log = Group {
        name: "log".to_owned(),
        policy: Policy::Manual,
        tie: Tie::Clock,
        members: vec!["a".to_owned(), "b".to_owned()],
    };
    assert_eq!(ty.groups.values().collect::<Vec<_>>(), [&log]);
    assert_eq!(ty.fields["a"].kind(), FieldKind::GroupMember);
    assert_eq!(ty.fields["c"].kind(), FieldKind::Register);
}

#[test]
fn a_type_may_be_one_group() {
    let schema = accept(
        "[t]\nversion = 1\nmerge = \"manual\"\ngroup = \"whole\"\n[t.fields]\na = { type = \"int\" }\n\
         b = { type = \"int\" }\nc = { type = \"int\", merge = \"lww\", group = \"own\" }\n",
    );
    let groups = &schema.types["t"].groups;
    assert_eq!(groups["whole"].members, ["a", "b"]);
    assert_eq!(groups["own"].members, ["c"]);
    refuse(
        &with_keys("group = \"whole\""),
        &[
            (7, &["a set merges by itself", "remove the type's `group`"]),
            (8, &["a counter merges by itself"]),
        ],
    );
}

#[test]
fn a_group_has_one_policy_and_one_tie() {
    refuse(
        "[t]\nversion = 1\n[t.fields]\na = { type = \"int\", group = \"g\" }\n\
         b = { type = \"int\", group = \"g\", merge = \"manual\" }\n",
        &[(5, &["\"a\" has merge = \"lww\"", "\"b\" has merge = \"manual\"", "give both the same"])],
    );
    refuse(
        "[t]\nversion = 1\n[t.fields]\na = { type = \"int\", group = \"g\" }\n\
         b = { type = \"int\", group = \"g\", tie = \"manual\" }\n",
        &[(5, &["\"a\" has tie = \"clock\"", "\"b\" has tie = \"manual\""])],
    );
    let schema = accept(
        "[t]\nversion = 1\n[t.fields]\na = { type = \"int\", group = \"g\", tie = \"manual\" }\n\
         b = { type = \"int\", group = \"g\", tie = \"manual\" }\n",
    );
    assert_eq!(schema.types["t"].groups["g"].tie, Tie::Manual);
}

#[test]
fn groups_have_names_of_their_own_and_hold_single_values() {
    accept_field("type = \"int\", group = \"f\"");
    refuse(
        "[t]\nversion = 1\n[t.fields]\na = { type = \"int\", group = \"b\" }\nb = { type = \"int\" }\n",
        &[(5, &["the group \"b\" has the name of a field that isn't in it", "another name"])],
    );
    refuse_field("type = \"int\", group = \"a b\"", &["group name \"a b\"", "letters, digits"]);
    refuse_field("type = \"int\", group = \"_g\"", &["reserved"]);
    refuse_field("type = \"set\", of = \"int\", group = \"g\"", &["a set", "remove its `group`"]);
    refuse_field("type = \"int\", merge = \"counter\", group = \"g\"", &["a counter"]);
    refuse_field("type = \"int\", merge = \"max\", group = \"g\"", &["\"max\" merges by itself"]);
}

// ── Rules for values ────────────────────────────────────────────────────────────────────

#[test]
fn bounds_fit_the_type() {
    assert_eq!(accept_field("type = \"int\", min = -1, max = 1").min, Some(Bound::Int(-1)));
    assert_eq!(accept_field("type = \"float\", min = 0").min, Some(Bound::Float(0.0)));
    assert_eq!(accept_field("type = \"float\", max = 1e300").max, Some(Bound::Float(1e300)));
    accept_field("type = \"map\", of = \"int\", min = 0");
    refuse_field("type = \"int\", min = 0.5", &["must be an integer"]);
    refuse_field("type = \"int\", min = 2, max = 1", &["min 2 is above max 1"]);
    refuse_field("type = \"float\", max = nan", &["holds exactly"]);
    refuse_field("type = \"float\", max = 9007199254740993", &["holds exactly"]);
    refuse_field("type = \"string\", min = 1", &["`min` is for int and float"]);
}

#[test]
fn defaults_are_valid_values() {
    assert_eq!(accept_field("type = \"float\", default = 1").default, Some(json!(1.0)));
    assert_eq!(
        accept_field("type = \"timestamp\", default = 2026-01-01T12:00:00+02:00").default,
        Some(json!("2026-01-01T10:00:00Z"))
    );
    let nested = json!({"a": [1, {"b c": "\u{1}\"\\\n"}], "d": {}});
    let field = accept_field(
        "type = \"json\", default = { a = [1.0, { \"b c\" = \"\\u0001\\\"\\\\\\n\" }], d = {} }",
    );
    assert_eq!(field.default, Some(nested));
    // Dotted keys nest further than the parser's own bound.
    let keys = "a.".repeat(78);
    let deep = format!("{}1{}", format!("{{ {keys}a = ").repeat(78), " }".repeat(78));
    refuse_field(&format!("type = \"json\", default = {deep}"), &["nested", "64 deep"]);
    refuse_field("type = \"int\", default = \"1\"", &["`default`", "integer"]);
    refuse_field("type = \"int\", min = 2, default = 1", &["at least 2"]);
    refuse_field("type = \"string\", one_of = [\"a\"], default = \"b\"", &["allowed are \"a\""]);
    refuse_field("type = \"float\", default = inf", &["not a finite number"]);
    refuse_field("type = \"blob\", default = \"a\"", &["no default"]);
    accept_field("type = \"string\", required = true, default = \"a\"");
}

#[test]
fn one_of_lists_distinct_valid_strings_or_ints() {
    assert_eq!(accept_field("type = \"int\", one_of = [2, 1]").one_of, [json!(2), json!(1)]);
    accept_field("type = \"set\", of = \"string\", one_of = [\"a\"]");
    refuse_field("type = \"bool\", one_of = [true]", &["string and int"]);
    refuse_field("type = \"int\", one_of = [1, 1]", &["1 is twice"]);
    refuse_field("type = \"int\", one_of = []", &["at least one"]);
    refuse_field("type = \"int\", one_of = [\"1\"]", &["`one_of`", "integer"]);
    refuse_field("type = \"int\", max = 1, one_of = [2]", &["at most 1"]);
    refuse_field("type = \"string\", max_bytes = 1, one_of = [\"ab\"]", &["at most 1"]);
}

#[test]
fn max_bytes_is_for_what_has_a_length() {
    for ty in ["string", "text", "json", "blob"] {
        assert_eq!(accept_field(&format!("type = \"{ty}\", max_bytes = 9")).max_bytes, Some(9));
    }
    accept_field("type = \"blob\", max_bytes = 5_000_000_000");
    refuse_field("type = \"int\", max_bytes = 8", &["string, text, json and blob"]);
    refuse_field("type = \"string\", max_bytes = 0", &["make it 1 to"]);
    refuse_field("type = \"string\", max_bytes = 2_000_000", &["use a blob"]);
}

#[test]
fn blobs_say_media_and_how_long_they_are_kept() {
    let rule = |definition: &str| accept_field(definition).blob.unwrap();
    assert_eq!(rule("type = \"blob\""), BlobRule::default());
    assert_eq!(rule("type = \"blob\", keep = \"forever\"").keep, Keep::Forever);
    assert_eq!(rule("type = \"blob\", keep_days = 30").keep, Keep::Days(30));
    assert_eq!(
        rule("type = \"blob\", media = [\"image/png\", \"audio/mpeg\"]").media,
        ["audio/mpeg", "image/png"]
    );
    refuse_field("type = \"blob\", keep = \"for ever\"", &["did you mean \"forever\"?"]);
    refuse_field("type = \"blob\", keep = \"forever\", keep_days = 1", &["exclude each other"]);
    refuse_field("type = \"blob\", keep_days = 0", &["make it 1 to"]);
    refuse_field("type = \"blob\", media = \"image/png\"", &["a list of"]);
    refuse_field("type = \"blob\", media = [\"png\"]", &["\"image/png\""]);
    refuse_field("type = \"string\", media = [\"image/png\"]", &["`media` is for blob"]);
    refuse_field("type = \"string\", keep_days = 1", &["`keep_days` is for blob"]);
}

// ── Indexes ─────────────────────────────────────────────────────────────────────────────

#[test]
fn indexes_are_lists_of_lists() {
    let lists = |keys: &str| accept(&with_keys(keys)).types["t"].indexes.clone();
    assert_eq!(lists("index = [[\"b\", \"a\"], [\"a\"]]"), [vec!["a"], vec!["b", "a"]]);
    assert_eq!(lists("index = \"a\""), [vec!["a"]]);
    assert_eq!(lists("index = [\"a\"]"), [vec!["a"]]);
    assert_eq!(accept(&with_keys("unique = [[\"a\"]]")).types["t"].unique, [vec!["a"]]);
    refuse(&with_keys("index = [\"a\", \"b\"]"), &[(3, &["could mean", "[[\"a\"], [\"b\"]]"])]);
    refuse(&with_keys("index = 3"), &[(3, &["a list of lists"])]);
    refuse(&with_keys("index = [[3]]"), &[(3, &["a list of lists"])]);
    refuse(&with_keys("index = [[]]"), &[(3, &["at least one field"])]);
}

#[test]
fn indexes_hold_single_values_that_exist() {
    refuse(&with_keys("index = [[\"kind\"]]"), &[(3, &["no field \"kind\"", "name a field of this type"])]);
    refuse(
        "[t]\nversion = 1\nindex = \"knid\"\n[t.fields]\nkind = { type = \"int\" }\n",
        &[(3, &["did you mean \"kind\"?"])],
    );
    refuse(&with_keys("unique = [[\"s\"]]"), &[(3, &["\"s\" is a set", "`unique`"])]);
    refuse(&with_keys("index = [[\"c\"]]"), &[(3, &["\"c\" is a counter"])]);
    refuse(&with_keys("index = [[\"a\", \"a\"]]"), &[(3, &["twice in one"])]);
    refuse(&with_keys("index = [[\"a\"], [\"a\"]]"), &[(3, &["twice"])]);
    refuse(
        "[t]\nversion = 1\nindex = \"j\"\n[t.fields]\nj = { type = \"json\" }\n",
        &[(3, &["\"j\" is a json"])],
    );
    // A faulty field is one error, not two.
    refuse("[t]\nversion = 1\nindex = \"f\"\n[t.fields]\nf = { type = \"x\" }\n", &[(5, &["no type \"x\""])]);
    accept("[t]\nversion = 1\nindex = \"f\"\n[t.fields]\nf = { type = \"int\", group = \"g\" }\n");
}

// ── Bounds of the file ──────────────────────────────────────────────────────────────────

#[test]
fn files_types_and_fields_are_bounded() {
    let types =
        |n: usize| (0..n).map(|i| format!("[t{i}]\nversion = 1\nfields = {{}}\n")).collect::<String>();
    accept(&types(TYPES_MAX));
    refuse(&types(TYPES_MAX + 1), &[(1, &["1001 types"])]);
    let fields = |n: usize| {
        let fields: String = (0..n).map(|i| format!("f{i} = {{ type = \"int\" }}\n")).collect();
        format!("[t]\nversion = 1\n[t.fields]\n{fields}")
    };
    accept(&fields(FIELDS_MAX));
    refuse(&fields(FIELDS_MAX + 1), &[(3, &["1001 fields"])]);
    accept(&" ".repeat(SOURCE_BYTES_MAX));
    refuse(&" ".repeat(SOURCE_BYTES_MAX + 1), &[(1, &["at most 1048576"])]);
}

#[test]
fn a_flood_of_mistakes_is_counted() {
    let source: String = (0..1_000).map(|i| format!("a{i} = 1\n")).collect();
    let errors = parse(&source).unwrap_err();
    assert_eq!((errors.errors.len(), errors.omitted), (ERRORS_MAX, 1_000 - ERRORS_MAX));
    assert!(errors.to_string().ends_with("and 900 more"));
}

#[test]
fn hostile_files_are_refused_quickly() {
    let n = SOURCE_BYTES_MAX / 2 - 100;
    for source in [
        format!("a = {}", "[".repeat(n)),
        format!("a = {}{}", "{a=".repeat(n / 3), "}".repeat(n / 3)),
        format!("[{}a]", "a.".repeat(n)),
        format!("{}a = 1", "a.".repeat(n)),
        format!("[t]\nversion = 1\n[t.fields]\n{} = 1", "a".repeat(n)),
        format!("[t]\nversion = 1\nindex = [{}]\nfields = {{}}", "[\"a\"],".repeat(n / 6)),
        format!("[t]\nversion = 1\n{}", "x=1\n".repeat(n / 4)),
        with_field(&format!("type = \"string\", one_of = [{}]", "\"aaa\",".repeat(n / 6))),
        (0..n / 12).map(|i| format!("a{i} = 1\n")).collect(),
    ] {
        assert!(parse(&source).is_err());
    }
}

// ── Export and hash ─────────────────────────────────────────────────────────────────────

#[test]
fn the_hash_is_of_the_meaning() {
    let short = accept(
        "[b]\nversion = 1\nindex = [[\"y\"], [\"x\"]]\n[b.fields]\nx = { type = \"int\" }\ny = { type = \"string\", one_of = [\"p\", \"q\"] }\n[a]\nversion = 1\nfields = {}\n",
    );
    let long = accept(
        "# the same\n[a]\nversion = 1\npriority = 0\nfields = {}\n[b]\nversion = 1\nmerge = \"lww\"\n\
         index = [[\"x\"], [\"y\"]]\n[b.fields]\n\
         y = { type = \"string\", merge = \"lww\", one_of = [\"q\", \"p\"], required = false, tie = \"clock\" }\n\
         x.type = \"int\"\n",
    );
    assert_eq!(short.hash(), long.hash());
    for changed in [
        "type = \"int\", merge = \"max\"",
        "type = \"int\", min = 0",
        "type = \"int\", required = true",
        "type = \"int\", default = 0",
        "type = \"int\", tie = \"manual\"",
        "type = \"int\", group = \"g\"",
        "type = \"float\"",
    ] {
        assert_ne!(accept(&with_field(changed)).hash(), accept(&with_field("type = \"int\"")).hash());
    }
}

#[test]
fn the_hash_of_a_published_schema_stays() {
    let schema = accept(
        "[t]\nversion = 2\nmerge = \"server_wins\"\npriority = 3\nindex = [[\"a\"]]\nunique = [[\"a\", \"b\"]]\n\
         [t.fields]\na = { type = \"int\", min = 0, max = 9, default = 1, required = true }\n\
         b = { type = \"float\", min = 0.5 }\nc = { type = \"ref\", to = \"t\" }\n\
         d = { type = \"blob\", media = [\"image/png\"], keep_days = 3, max_bytes = 10 }\n\
         e = { type = \"map\", of = \"int\", merge = \"max\" }\n\
         f = { type = \"string\", merge = \"lww\", tie = \"manual\", one_of = [\"x\", \"y\"] }\n\
         g = { type = \"json\", group = \"h\" }\n",
    );
    let hex: String = schema.hash().iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(hex, "dc210b78f8858485608d765daa4bfed08edf44f52767e3b88f541ee302628696");
}

// ── Compatibility ───────────────────────────────────────────────────────────────────────

/// The findings between two definitions of the field `f`, the second in version 2.
#[track_caller]
fn field_changes(old: &str, new: &str) -> Vec<String> {
    let old = accept(&with_field(old));
    let mut new = accept(&with_field(new));
    new.types.get_mut("t").unwrap().version = 2;
    old.compatibility(&new).iter().map(Change::to_string).collect()
}

#[track_caller]
fn breaks(old: &str, new: &str, part: &str) {
    let changes = field_changes(old, new);
    assert_eq!(changes.len(), 1, "{changes:?}");
    assert!(changes[0].starts_with("breaking t.f: ") && changes[0].contains(part), "{changes:?}");
}

#[track_caller]
fn is_safe(old: &str, new: &str, part: &str) {
    let changes = field_changes(old, new);
    assert_eq!(changes.len(), 1, "{changes:?}");
    assert!(changes[0].starts_with("safe t.f: ") && changes[0].contains(part), "{changes:?}");
}

#[test]
fn a_published_fields_type_merge_group_tie_and_default_are_frozen() {
    breaks("type = \"int\"", "type = \"float\"", "type is frozen but went from int to float");
    breaks("type = \"int\"", "type = \"int\", merge = \"max\"", "merge is frozen but went from lww to max");
    breaks("type = \"int\"", "type = \"int\", merge = \"counter\"", "merge is frozen");
    breaks("type = \"int\"", "type = \"int\", group = \"g\"", "group is frozen but went from none to \"g\"");
    breaks("type = \"int\"", "type = \"int\", tie = \"manual\"", "tie is frozen");
    breaks("type = \"int\"", "type = \"int\", default = 1", "default is frozen but went from none to 1");
    breaks("type = \"json\", default = [1]", "type = \"json\", default = [2]", "default is frozen");
    breaks(
        "type = \"set\", of = \"int\"",
        "type = \"set\", of = \"string\"",
        "from set of int to set of string",
    );
}

#[test]
fn rules_may_be_widened_but_not_narrowed() {
    breaks("type = \"int\"", "type = \"int\", required = true", "became required");
    is_safe("type = \"int\", required = true", "type = \"int\"", "became optional");
    breaks("type = \"int\"", "type = \"int\", min = 1", "min was narrowed from none to 1");
    breaks("type = \"int\", min = 1", "type = \"int\", min = 2", "min was narrowed from 1 to 2");
    is_safe("type = \"int\", min = 1", "type = \"int\", min = 0", "min was widened");
    is_safe("type = \"int\", min = 1", "type = \"int\"", "min was removed");
    breaks("type = \"int\", max = 2", "type = \"int\", max = 1", "max was narrowed");
    is_safe("type = \"int\", max = 1", "type = \"int\", max = 2", "max was widened");
    breaks("type = \"text\", max_bytes = 2", "type = \"text\", max_bytes = 1", "max_bytes was narrowed");
    breaks("type = \"int\", one_of = [1, 2]", "type = \"int\", one_of = [1, 3]", "one_of was narrowed");
    breaks("type = \"int\"", "type = \"int\", one_of = [1]", "one_of was narrowed");
    is_safe("type = \"int\", one_of = [1]", "type = \"int\", one_of = [1, 2]", "one_of allows all");
    breaks("type = \"blob\"", "type = \"blob\", media = [\"image/png\"]", "media was narrowed");
    is_safe("type = \"blob\", keep_days = 1", "type = \"blob\", keep = \"forever\"", "keep the bytes");
}

/// The findings between two files.
#[track_caller]
fn changes(old: &str, new: &str) -> Vec<String> {
    accept(old).compatibility(&accept(new)).iter().map(Change::to_string).collect()
}

#[test]
fn types_and_fields_may_be_added_but_not_removed() {
    let a = "[a]\nversion = 1\nfields.x.type = \"int\"\n";
    let with_b = format!("{a}[b]\nversion = 1\nfields = {{}}\n");
    assert_eq!(changes(a, &with_b), ["safe b: the type is new"]);
    assert_eq!(
        changes(&with_b, a),
        ["breaking b: the type was removed; keep it, older devices still write it"]
    );
    let y = |rules: &str| {
        format!("[a]\nversion = 2\nfields.x.type = \"int\"\nfields.y = {{ type = \"int\"{rules} }}\n")
    };
    assert_eq!(changes(a, &y("")), ["safe a.y: the field is new"]);
    assert_eq!(changes(a, &y(", required = true, default = 1")), ["safe a.y: the field is new"]);
    let required = changes(a, &y(", required = true"));
    assert!(required.len() == 1 && required[0].starts_with("breaking a.y: "), "{required:?}");
    let removed = changes(&y(""), "[a]\nversion = 3\nfields.x.type = \"int\"\n");
    assert!(
        removed.len() == 1 && removed[0].starts_with("breaking a.y: the field was removed"),
        "{removed:?}"
    );
}

#[test]
fn versions_are_raised_with_a_change() {
    let with =
        |version: u32, keys: &str| format!("[a]\nversion = {version}\n{keys}\nfields.x.type = \"int\"\n");
    assert!(changes(&with(1, ""), &with(1, "")).is_empty());
    assert_eq!(
        changes(&with(1, ""), &with(1, "index = \"x\"")),
        ["safe a: index x is new", "breaking a: the type was changed but not its version; raise it to 2"]
    );
    assert_eq!(changes(&with(1, ""), &with(2, "priority = 5")), ["safe a: priority was 0 and is 5"]);
    assert_eq!(
        changes(&with(2, ""), &with(1, "")),
        ["breaking a: version went back from 2 to 1; raise it to 3"]
    );
    assert_eq!(
        changes(&with(1, ""), &with(2, "")),
        ["safe a: version was raised to 2 and nothing else changed"]
    );
}

#[test]
fn who_may_write_a_type_is_frozen() {
    let with = |version: u32, merge: &str| {
        format!(
            "[a]\nversion = {version}\nmerge = \"{merge}\"\nfields.x = {{ type = \"int\", merge = \"lww\" }}\n"
        )
    };
    let found = changes(&with(1, "lww"), &with(2, "server_only"));
    assert!(found.len() == 1 && found[0].starts_with("breaking a: who may create"), "{found:?}");
    let found = changes(&with(1, "lww"), &with(2, "manual"));
    assert!(
        found.len() == 1 && found[0].starts_with("safe a: the policy of fields added later"),
        "{found:?}"
    );
}

// ── The shared file, and arbitrary ones ─────────────────────────────────────────────────

/// The folder of shared data: `ANABRANCH_DATA`, or next to the workspace.
fn data(file: &str) -> Option<PathBuf> {
    let folder = std::env::var_os("ANABRANCH_DATA")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data"), PathBuf::from);
    let path = folder.join(file);
    if !path.exists() {
        println!("skipped: no {}; set ANABRANCH_DATA to the folder of {file}", path.display());
        return None;
    }
    Some(path)
}

#[test]
fn the_shared_schema_loads_as_it_stands() {
    let Some(path) = data("schema.toml") else { return };
    let source = std::fs::read_to_string(path).unwrap();
    let schema = accept(&source);
    assert_eq!(schema.types.len(), 19);
    let field = |ty: &str, field: &str| &schema.types[ty].fields[field];
    assert_eq!(field("alert", "read").policy, Policy::ServerWins);
    assert_eq!(field("alert", "read").default, Some(json!(false)));
    assert_eq!(field("profile", "name").tie, Tie::Manual);
    assert_eq!(field("hero", "traits").policy, Policy::Set);
    assert_eq!(field("volume", "sets").policy, Policy::Max);
    assert_eq!(field("recovery", "days").policy, Policy::Lww);
    assert_eq!(field("story", "hero").ty, FieldType::Scalar(ScalarType::Ref("hero".to_owned())));
    assert_eq!(field("story", "play_count").kind(), FieldKind::Counter);
    assert_eq!(field("hero", "avatar").blob.as_ref().unwrap().keep, Keep::Forever);
    assert_eq!(schema.types["invoice"].groups["whole"].members, ["amount_cents", "currency", "paid"]);
    assert_eq!(schema.types["story"].groups["content"].policy, Policy::Manual);
    assert!(schema.types["exercise"].is_server_only());
    assert_eq!(schema.types["exercise"].indexes, [["category"], ["level"]]);
    assert_eq!(schema.types["workout"].priority, 10);
    assert!(schema.compatibility(&schema).is_empty());
}

const VALID: &str = "[t]\nversion = 1\nmerge = \"manual\"\ngroup = \"g\"\nindex = [[\"a\", \"b\"]]\n[t.fields]\n\
     a = { type = \"int\", min = 0, one_of = [1, 2], default = 1 }\nb = { type = \"float\", max = 1.5 }\n\
     c = { type = \"ref\", to = \"t\" }\nd = { type = \"json\", default = { a = [1, 2] } }\n\
     [u]\nversion = 1\n[u.fields]\ne = { type = \"map\", of = \"int\", merge = \"max\" }\n\
     f = { type = \"blob\", media = [\"a/b\"], keep_days = 3 }\ng = { type = \"int\", merge = \"counter\" }\n";

/// Reading never panics, errors have a line of the file, and what is read survives export.
fn survives(source: &str) {
    match parse(source) {
        Ok(schema) => assert_eq!(parse(&schema.to_toml()), Ok(schema)),
        Err(errors) => {
            let lines = source.matches('\n').count() + 1;
            assert!(errors.errors.iter().all(|error| (1..=lines).contains(&error.line)), "{errors}");
        }
    }
}

proptest! {
    #[test]
    fn any_string_is_read_or_refused(source in "(?s).{0,200}") {
        survives(&source);
    }

    #[test]
    fn any_words_of_the_language_are_read_or_refused(
        words in prop::collection::vec(prop::sample::select(vec![
            "[t]", "[t.fields]", "[[t]]", "\n", "version", " = ", "1", "merge", "\"lww\"", "\"manual\"", "type",
            "\"map\"", "\"int\"", "{ ", " }", ", ", "a", "[\"a\"]", "default", "1.5", "inf", "one_of", "index",
            "group", "\"g\"", "a = { type = \"int\" }\n", "2026-01-01T00:00:00Z", ".", "\"", "\\", "#", "ä",
        ]), 0..40),
    ) {
        survives(&words.concat());
        survives(&format!("[t]\nversion = 1\n[t.fields]\n{}", words.concat()));
        survives(&with_field(&words.concat()));
    }

    #[test]
    fn a_mutated_file_is_read_or_refused(
        mutations in prop::collection::vec((0..VALID.len(), 0..40_usize, ".{0,8}"), 1..4),
    ) {
        let mut source = VALID.to_owned();
        for (at, length, text) in mutations {
            let at = at.min(source.len());
            let end = (at + length).min(source.len());
            if source.is_char_boundary(at) && source.is_char_boundary(end) {
                source.replace_range(at..end, &text);
            }
        }
        survives(&source);
    }

    #[test]
    fn a_swapped_word_is_read_or_refused(from in 0..60_usize, to in 0..60_usize) {
        let mut words: Vec<&str> = VALID.split_inclusive([' ', '\n']).collect();
        let (from, to) = (from % words.len(), to % words.len());
        words.swap(from, to);
        survives(&words.concat());
    }
}

#[test]
fn the_mutated_file_is_valid() {
    accept(VALID);
}
