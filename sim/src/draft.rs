//! Edits of any type, drawn from a few bytes, so that a failing schedule shrinks.

use std::collections::{BTreeMap, BTreeSet};

use anabranch_core::entity::Row;
use anabranch_core::intent::Intent;
use anabranch_core::schema::{EntityType, Field, FieldKind, FieldType, ScalarType, timestamp_from_ms};
use serde_json::{Value as Json, json};

use crate::model::{Screen, characters};

/// What an intent is drawn from.
pub type Draw = [u8; 4];

/// Keys of maps. Few, so that devices meet.
const KEYS: [&str; 3] = ["a", "b", "c d"];

/// The sequences of a row.
pub fn screen_of(ty: &EntityType, row: &BTreeMap<String, Json>) -> Screen {
    let sequences =
        ty.fields.values().filter(|field| matches!(field.kind(), FieldKind::Text | FieldKind::List));
    sequences
        .map(|field| {
            let items = match &row[&field.name] {
                Json::String(text) => characters(text),
                Json::Array(items) => items.clone(),
                other => panic!("{other}"),
            };
            (field.name.clone(), items)
        })
        .collect()
}

/// Draws intents for someone who sees `row`. `unique` numbers the items of sequences.
pub fn intents(
    ty: &EntityType,
    row: &Row,
    screen: &Screen,
    draws: &[Draw],
    creates: bool,
    unique: &mut u32,
) -> Vec<Intent> {
    let mut drawn =
        Drawing { row, screen: screen.clone(), unique, touched: BTreeSet::new(), out: Vec::new() };
    if creates {
        for field in ty.fields.values().filter(|field| field.required) {
            let value = value(field, usize::from(draws.first().map_or(0, |draw| draw[2])));
            drawn.out.push(Intent::Set { field: field.name.clone(), value });
        }
    }
    let fields: Vec<&Field> = ty.fields.values().collect();
    for draw in draws {
        match usize::from(draw[0]) % (fields.len() + 2) {
            place if place < fields.len() => drawn.field(fields[place], draw),
            _ if creates => {}
            _ if row.deleted => drawn.out.push(Intent::Revive),
            _ if draw[1] % 2 == 0 => return vec![Intent::Delete],
            _ => drawn.out.push(if draw[1] % 16 == 1 { Intent::Revive } else { continue }),
        }
    }
    if row.deleted && draws.first().is_some_and(|draw| draw[3] % 4 != 0) {
        // Most edits of what is deleted bring it back.
        if draws[0][3] % 4 == 1 {
            return vec![Intent::Delete];
        }
        drawn.out.insert(0, Intent::Revive);
    }
    drawn.out
}

struct Drawing<'a> {
    row: &'a Row,
    screen: Screen,
    unique: &'a mut u32,
    touched: BTreeSet<String>,
    out: Vec<Intent>,
}

impl Drawing<'_> {
    fn field(&mut self, field: &Field, draw: &Draw) {
        let [_, act, a, b] = draw.map(usize::from);
        let name = field.name.clone();
        // A container is set as a whole only before anything else is done to it.
        let whole = self.touched.insert(name.clone()) && act % 5 == 4;
        let open = |name: &str| self.row.conflicts.iter().any(|conflict| conflict.field == name);
        let intent = match field.kind() {
            FieldKind::Register if open(&name) && act % 4 != 0 => {
                Intent::Resolve { field: name, value: value(field, a) }
            }
            FieldKind::GroupMember if open(field.group.as_ref().unwrap()) && act % 4 != 0 => {
                let mut members = serde_json::Map::new();
                members.insert(name, value(field, a));
                Intent::Resolve { field: field.group.clone().unwrap(), value: Json::Object(members) }
            }
            FieldKind::Register | FieldKind::GroupMember if act % 8 == 7 => {
                Intent::Set { field: name, value: Json::Null }
            }
            FieldKind::Register | FieldKind::GroupMember => {
                Intent::Set { field: name, value: value(field, a) }
            }
            FieldKind::Counter if whole => Intent::Set { field: name, value: json!(a as i64 % 9) },
            FieldKind::Counter => Intent::Increment { field: name, by: a as i64 % 9 - 3 },
            FieldKind::Set if whole => {
                let elements: Vec<Json> =
                    (0..4).filter(|n| a >> n & 1 == 1).map(|n| element(field, n)).collect();
                Intent::Set { field: name, value: field.check(&Json::Array(elements)).unwrap() }
            }
            FieldKind::Set if act % 2 == 0 => Intent::Add { field: name, element: element(field, a) },
            FieldKind::Set => Intent::Remove { field: name, element: element(field, a) },
            FieldKind::Map if whole => {
                let entries = (0..3).filter(|n| a >> n & 1 == 1);
                let entries = entries.map(|n| (KEYS[n].to_owned(), element(field, b + n)));
                Intent::Set { field: name, value: Json::Object(entries.collect()) }
            }
            FieldKind::Map => {
                let key = KEYS[a % 3];
                let value = if act % 8 == 7 { Json::Null } else { element(field, b) };
                match open(&format!("{name}.{key}")) && act % 4 != 0 {
                    true => Intent::Resolve { field: format!("{name}.{key}"), value },
                    false => Intent::Put { field: name, key: key.to_owned(), value },
                }
            }
            FieldKind::List | FieldKind::Text => return self.sequence(field, act, a, b, whole),
        };
        self.out.push(intent);
    }

    fn sequence(&mut self, field: &Field, act: usize, a: usize, b: usize, whole: bool) {
        let name = field.name.clone();
        let text = field.kind() == FieldKind::Text;
        let mut new = Vec::new();
        for _ in 0..1 + b % 3 {
            *self.unique += 1;
            new.push(if text { letter(*self.unique) } else { item(field, *self.unique) });
        }
        let mut view = self.screen.remove(&name).unwrap_or_default();
        let at = a % (view.len() + 1);
        let gone = if act.is_multiple_of(2) { 0 } else { (b / 3 % 3).min(view.len() - at) };
        if act % 3 == 2 && gone > 0 {
            new.clear();
        }
        if !whole && !text && gone > 0 {
            self.out.push(Intent::RemoveItems { field: name.clone(), at, count: gone });
        }
        let appends = at == view.len() && b.is_multiple_of(2);
        view.splice(at..at + gone, new.iter().cloned());
        let joined = |items: &[Json]| items.iter().filter_map(Json::as_str).collect::<String>();
        if whole {
            let value = if text { Json::String(joined(&view)) } else { Json::Array(view.clone()) };
            self.out.push(Intent::Set { field: name.clone(), value });
        } else if text {
            self.out.push(Intent::Splice { field: name.clone(), at, delete: gone, insert: joined(&new) });
        } else if !new.is_empty() {
            let at = (!appends).then_some(at);
            self.out.push(Intent::Insert { field: name.clone(), at, items: new });
        }
        self.screen.insert(name, view);
    }
}

/// Characters of one, two and four bytes, none twice.
fn letter(n: u32) -> Json {
    let start = [0x4e00, 0x100, 0x1f300, 0x400][n as usize % 4];
    characters(&char::from_u32(start + n / 4).unwrap().to_string()).remove(0)
}

fn item(field: &Field, n: u32) -> Json {
    let item = match field.ty {
        FieldType::List(ScalarType::Int | ScalarType::Float) => json!(n),
        FieldType::List(ScalarType::Json) if n.is_multiple_of(2) => json!({ "n": n }),
        FieldType::List(ScalarType::Timestamp) => json!(timestamp_from_ms(i64::from(n))),
        _ => json!(format!("i{n}")),
    };
    field.check_element(&item).unwrap()
}

fn element(field: &Field, n: usize) -> Json {
    let scalar = match &field.ty {
        FieldType::Set(of) | FieldType::Map(of) | FieldType::List(of) | FieldType::Scalar(of) => of,
        FieldType::Text => panic!("a text has no elements"),
    };
    field.check_element(&scalar_value(field, scalar, n)).unwrap()
}

/// One of a few values that the field allows.
fn value(field: &Field, n: usize) -> Json {
    let FieldType::Scalar(scalar) = &field.ty else { panic!("{} is no register", field.name) };
    let value = if field.one_of.is_empty() {
        scalar_value(field, scalar, n)
    } else {
        field.one_of[n % field.one_of.len()].clone()
    };
    field.check(&value).unwrap()
}

fn scalar_value(field: &Field, scalar: &ScalarType, n: usize) -> Json {
    let n = n % 4;
    match scalar {
        ScalarType::Bool => json!(n.is_multiple_of(2)),
        ScalarType::Int => json!([1, 2, 7, 30][n]),
        ScalarType::Float => json!([0.5, 1.0, 2.25, 70.0][n]),
        ScalarType::String | ScalarType::Ref(_) => json!(["a", "b", "ü", "c"][n]),
        ScalarType::Timestamp => json!(timestamp_from_ms(1_700_000_000_000 + n as i64)),
        ScalarType::Json => {
            [json!({"a": 1, "b": [2]}), json!({"a": 2, "b": [2]}), json!("x"), json!([])][n].clone()
        }
        ScalarType::Blob => {
            let media = field.blob.as_ref().and_then(|rule| rule.media.first()).cloned();
            json!({"hash": format!("h{n}"), "media": media.unwrap_or("a/b".into()), "name": "f", "size": 10})
        }
    }
}
