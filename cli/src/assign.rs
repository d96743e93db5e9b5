//! What a person or a script writes down as an edit, and what the engine calls it.

use std::collections::BTreeMap;

use anabranch::schema::{EntityType, Field, FieldKind, FieldType, Policy};
use anabranch::{Edit, EntityKey, Expect, Intent, Schema, parse_version};
use serde::Deserialize;
use serde_json::Value as Json;

use crate::failure::Failure;

/// An edit as a line of JSON.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct EditLine {
    #[serde(rename = "type")]
    type_name: String,
    id: String,
    #[serde(default)]
    set: BTreeMap<String, Json>,
    #[serde(default)]
    increment: BTreeMap<String, i64>,
    #[serde(default)]
    add: BTreeMap<String, Vec<Json>>,
    #[serde(default)]
    remove: BTreeMap<String, Vec<Json>>,
    #[serde(default)]
    append: BTreeMap<String, Vec<Json>>,
    #[serde(default)]
    put: BTreeMap<String, BTreeMap<String, Json>>,
    #[serde(default)]
    splice: BTreeMap<String, Vec<(usize, usize, String)>>,
    #[serde(default)]
    delete: bool,
    #[serde(default)]
    if_version: Option<String>,
}

/// An edit of one entity, whether it exists or not.
pub(crate) fn edit(
    type_name: &str,
    id: &str,
    intents: Vec<Intent>,
    if_version: Option<&str>,
) -> Result<Edit, Failure> {
    let key = EntityKey::new(type_name, id)
        .map_err(|error| Failure::validation("invalid_name", error.to_string()))?;
    let based_on = match if_version {
        Some(token) => Some(parse_version(token).ok_or_else(|| {
            Failure::usage("bad_version", format!("{token:?} is no version"))
                .help("give the `version` that `get` or `list` prints, unchanged")
        })?),
        None => None,
    };
    Ok(Edit { key, intents, based_on, expect: Expect::Any })
}

/// Reads JSON lines as edits. Empty lines are skipped.
pub(crate) fn edit_lines(text: &str) -> Result<Vec<Edit>, Failure> {
    let mut edits = Vec::new();
    for (number, line) in text.lines().enumerate() {
        if line.trim().is_empty() {
            continue;
        }
        let line: EditLine = serde_json::from_str(line).map_err(|error| {
            Failure::usage("bad_line", format!("line {} of the input is no edit: {error}", number + 1))
                .help("`anabranch set --help` shows the form of a line")
        })?;
        edits.push(line.into_edit()?);
    }
    match edits.is_empty() {
        true => Err(Failure::usage("no_edits", "the input has no edits")
            .help("`anabranch set --help` shows the form of a line")),
        false => Ok(edits),
    }
}

impl EditLine {
    fn into_edit(self) -> Result<Edit, Failure> {
        let mut intents = Vec::new();
        intents.extend(self.set.into_iter().map(|(field, value)| Intent::Set { field, value }));
        intents.extend(self.increment.into_iter().map(|(field, by)| Intent::Increment { field, by }));
        for (field, elements) in self.add {
            intents.extend(elements.into_iter().map(|element| Intent::Add { field: field.clone(), element }));
        }
        for (field, elements) in self.remove {
            intents
                .extend(elements.into_iter().map(|element| Intent::Remove { field: field.clone(), element }));
        }
        intents.extend(self.append.into_iter().map(|(field, items)| Intent::Insert {
            field,
            at: None,
            items,
        }));
        for (field, entries) in self.put {
            let put = |(key, value)| Intent::Put { field: field.clone(), key, value };
            intents.extend(entries.into_iter().map(put));
        }
        for (field, splices) in self.splice {
            let splice = |(at, delete, insert)| Intent::Splice { field: field.clone(), at, delete, insert };
            intents.extend(splices.into_iter().map(splice));
        }
        if self.delete {
            intents.push(Intent::Delete);
        }
        edit(&self.type_name, &self.id, intents, self.if_version.as_deref())
    }
}

/// The type by a name, or what to call it instead.
pub(crate) fn entity_type<'a>(schema: &'a Schema, name: &str) -> Result<&'a EntityType, Failure> {
    schema.types.get(name).ok_or_else(|| {
        let known: Vec<&str> = schema.types.keys().map(String::as_str).collect();
        Failure::validation("unknown_type", format!("the schema has no type {name:?}"))
            .help(format!("its types are {}", known.join(", ")))
    })
}

/// How an assignment changes its field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operator {
    Set,
    Add,
    Remove,
}

/// Reads `field=value`, `field+=x`, `field-=x` or `field.key=value`.
pub(crate) fn assignment(ty: &EntityType, text: &str) -> Result<Intent, Failure> {
    let Some((target, value)) = text.split_once('=') else {
        return Err(Failure::usage("bad_assignment", format!("{text:?} is no assignment"))
            .help("write field=value, field+=x, field-=x or field.key=value"));
    };
    let (target, operator) = match (target.strip_suffix('+'), target.strip_suffix('-')) {
        (Some(target), _) => (target, Operator::Add),
        (_, Some(target)) => (target, Operator::Remove),
        _ => (target, Operator::Set),
    };
    let (name, key) = match target.split_once('.') {
        Some((name, key)) => (name, Some(key)),
        None => (target, None),
    };
    let Some(field) = ty.fields.get(name) else {
        let known: Vec<&str> = ty.fields.keys().map(String::as_str).collect();
        return Err(Failure::validation("unknown_field", format!("{} has no field {name:?}", ty.name))
            .help(format!("its fields are {}", known.join(", "))));
    };
    intent(field, key, operator, value)
}

fn intent(field: &Field, key: Option<&str>, operator: Operator, value: &str) -> Result<Intent, Failure> {
    let name = field.name.clone();
    match (field.kind(), key, operator) {
        (FieldKind::Map, Some(key), Operator::Set) => {
            Ok(Intent::Put { field: name, key: key.to_owned(), value: element(field, value)? })
        }
        (_, Some(_), _) => Err(unfit(field, "field.key=value sets entries of maps")),
        (_, None, Operator::Set) => Ok(Intent::Set { field: name, value: whole(field, value)? }),
        (FieldKind::Counter, None, Operator::Add) => {
            Ok(Intent::Increment { field: name, by: number(field, value)? })
        }
        (FieldKind::Counter, None, Operator::Remove) => {
            let by = number(field, value)?.checked_neg();
            let by = by.ok_or_else(|| unfit(field, "the number is too small"))?;
            Ok(Intent::Increment { field: name, by })
        }
        (FieldKind::Set, None, Operator::Add) => {
            Ok(Intent::Add { field: name, element: element(field, value)? })
        }
        (FieldKind::Set, None, Operator::Remove) => {
            Ok(Intent::Remove { field: name, element: element(field, value)? })
        }
        (FieldKind::List, None, Operator::Add) => {
            Ok(Intent::Insert { field: name, at: None, items: vec![element(field, value)?] })
        }
        (_, None, Operator::Add) => Err(unfit(field, "field+=x is for counters, sets and lists")),
        (_, None, Operator::Remove) => Err(unfit(field, "field-=x is for counters and sets")),
    }
}

fn unfit(field: &Field, what: &str) -> Failure {
    let held = match (&field.ty, field.policy) {
        (FieldType::Scalar(_), Policy::Counter) => "a counter",
        (FieldType::Scalar(_), _) => "a single value",
        (FieldType::Text, _) => "a text",
        (FieldType::Set(_), _) => "a set",
        (FieldType::List(_), _) => "a list",
        (FieldType::Map(_), _) => "a map",
    };
    Failure::usage("bad_assignment", format!("{} is {held}; {what}", field.name))
        .help(format!("set all of it with {}=value, or give a JSON line to `set -`", field.name))
}

fn whole(field: &Field, text: &str) -> Result<Json, Failure> {
    // Otherwise a string could not be cleared; the word itself goes in quotes.
    if text.trim() == "null" {
        return Ok(Json::Null);
    }
    // Which values the field takes is for the engine to say: it knows whether checks are off.
    let unchecked = Field { required: false, one_of: Vec::new(), min: None, max: None, ..field.clone() };
    parse(&unchecked, text)
}

/// A value of one element of a set or list, or of an entry of a map.
fn element(field: &Field, text: &str) -> Result<Json, Failure> {
    match &field.ty {
        FieldType::Set(of) | FieldType::List(of) | FieldType::Map(of) => {
            let single = Field { ty: FieldType::Scalar(of.clone()), policy: Policy::Lww, ..field.clone() };
            whole(&single, text)
        }
        FieldType::Scalar(_) | FieldType::Text => whole(field, text),
    }
}

fn number(field: &Field, text: &str) -> Result<i64, Failure> {
    text.trim().parse().map_err(|_| {
        Failure::validation(
            "invalid",
            format!("counter {:?} got {text:?}; give it a whole number", field.name),
        )
    })
}

fn parse(field: &Field, text: &str) -> Result<Json, Failure> {
    field.parse_text(text).map_err(|error| Failure::validation("invalid", error.to_string()))
}

/// Reads what is to be imported: a JSON array of objects, or an object per line.
pub(crate) fn import_records(text: &str) -> Result<Vec<serde_json::Map<String, Json>>, Failure> {
    let bad = |place: String, error: String| {
        Failure::validation("bad_import", format!("{place} can't be imported: {error}"))
            .help("give a JSON array of objects, or one object per line")
    };
    if text.trim_start().starts_with('[') {
        return serde_json::from_str(text).map_err(|error| bad("the input".to_owned(), error.to_string()));
    }
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    lines
        .map(|(number, line)| {
            serde_json::from_str(line).map_err(|error| bad(format!("line {}", number + 1), error.to_string()))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::failure::Category;
    use serde_json::json;

    const SCHEMA: &str = r#"
[thing]
version = 1
[thing.fields]
name = { type = "string" }
reps = { type = "int", merge = "counter" }
tags = { type = "set", of = "string" }
log  = { type = "list", of = "int" }
days = { type = "map", of = "json" }
body = { type = "text" }
at   = { type = "timestamp" }
"#;

    fn read(text: &str) -> Result<Intent, Failure> {
        let schema = Schema::parse(SCHEMA, "test.toml").unwrap();
        assignment(&schema.types["thing"], text)
    }

    #[test]
    fn assignments_mean_what_their_field_is() {
        let field = |name: &str| name.to_owned();
        let cases = [
            ("name=a=b", Intent::Set { field: field("name"), value: json!("a=b") }),
            ("name=42", Intent::Set { field: field("name"), value: json!("42") }),
            ("name=null", Intent::Set { field: field("name"), value: Json::Null }),
            ("name=\"null\"", Intent::Set { field: field("name"), value: json!("null") }),
            ("name=", Intent::Set { field: field("name"), value: json!("") }),
            ("reps+=3", Intent::Increment { field: field("reps"), by: 3 }),
            ("reps-=3", Intent::Increment { field: field("reps"), by: -3 }),
            ("tags+=new york", Intent::Add { field: field("tags"), element: json!("new york") }),
            ("tags-=x", Intent::Remove { field: field("tags"), element: json!("x") }),
            ("log+=7", Intent::Insert { field: field("log"), at: None, items: vec![json!(7)] }),
            (
                "days.2026.01={\"kg\":5}",
                Intent::Put { field: field("days"), key: "2026.01".to_owned(), value: json!({"kg": 5}) },
            ),
            ("days.x=null", Intent::Put { field: field("days"), key: field("x"), value: Json::Null }),
            ("body=two words", Intent::Set { field: field("body"), value: json!("two words") }),
        ];
        for (text, intent) in cases {
            assert_eq!(read(text).unwrap_or_else(|e| panic!("{text}: {}", e.message)), intent, "{text}");
        }
    }

    #[test]
    fn a_wrong_assignment_says_whether_form_or_value_is_wrong() {
        for (text, category) in [
            ("name", Category::Usage),
            ("name+=x", Category::Usage),
            ("log-=1", Category::Usage),
            ("name.key=x", Category::Usage),
            ("nope=1", Category::Validation),
            ("=1", Category::Validation),
            ("reps+=many", Category::Validation),
            ("log+=many", Category::Validation),
            ("at=yesterday", Category::Validation),
        ] {
            assert_eq!(read(text).unwrap_err().category, category, "{text}");
        }
    }

    #[test]
    fn a_line_carries_every_kind_of_edit() {
        let text = r#"
{"type":"thing","id":"t1","set":{"name":"n"},"increment":{"reps":2},"add":{"tags":["a","b"]},"remove":{"tags":["c"]},"append":{"log":[1]},"put":{"days":{"d":null}},"splice":{"body":[[0,1,"x"]]}}
{"type":"thing","id":"t2","delete":true}
"#;
        let edits = edit_lines(text).unwrap();
        assert_eq!(edits.len(), 2);
        assert_eq!(edits[0].intents.len(), 8);
        assert_eq!(edits[1].intents, [Intent::Delete]);
        for wrong in ["", "[]", "{\"type\":\"thing\"}", "{\"type\":\"thing\",\"id\":\"x\",\"sett\":{}}"] {
            assert_eq!(edit_lines(wrong).unwrap_err().category, Category::Usage, "{wrong}");
        }
    }

    #[test]
    fn imports_are_arrays_or_lines() {
        assert_eq!(import_records("[{\"id\":\"a\"},{\"id\":\"b\"}]").unwrap().len(), 2);
        assert_eq!(import_records("{\"id\":\"a\"}\n\n{\"id\":\"b\"}\n").unwrap().len(), 2);
        assert!(import_records("{\"id\":").unwrap_err().message.starts_with("line 1 "));
    }
}
