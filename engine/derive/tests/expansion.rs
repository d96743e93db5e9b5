//! The expanded code compiles against the items that it names, and does what it says. They
//! stand in here for the engine's, so that the macro is tested without it.

// The expansion names `::anabranch`, which is this test.
extern crate self as anabranch;

use std::collections::{BTreeMap, BTreeSet};
use std::marker::PhantomData;

use anabranch_derive::Entity;

pub(crate) use anabranch_core::schema;

pub(crate) trait Entity {
    fn entity_type() -> schema::EntityType;
}

pub(crate) struct FieldName<T> {
    name: &'static str,
    of: PhantomData<fn() -> T>,
}

impl<T> FieldName<T> {
    pub(crate) const fn new(name: &'static str) -> Self {
        Self { name, of: PhantomData }
    }
}

pub(crate) mod __private {
    pub(crate) fn parse_type(toml: &str) -> crate::schema::EntityType {
        crate::schema::EntityType::parse(toml, "derive(Entity)").expect("a valid type")
    }
}

struct SetEntry;

#[derive(Entity)]
#[entity(name = "workout", version = 1, index = "started_at", unique = "started_at")]
#[allow(dead_code)]
struct Workout {
    title: String,
    #[field(required, timestamp)]
    started_at: String,
    #[merge(text)]
    notes: String,
    #[merge(manual, group = "log")]
    sets: Vec<SetEntry>,
    #[merge(counter)]
    reps: i64,
    #[merge(set)]
    tags: BTreeSet<String>,
    #[merge(max)]
    best_kg: f64,
    days: BTreeMap<String, u32>,
    r#type: Option<String>,
}

#[test]
fn a_derived_type_equals_its_file() {
    let file = r#"
        [workout]
        version = 1
        index = [["started_at"]]
        unique = [["started_at"]]
        [workout.fields]
        title = { type = "string" }
        started_at = { type = "timestamp", required = true }
        notes = { type = "text" }
        sets = { type = "json", merge = "manual", group = "log" }
        reps = { type = "int", merge = "counter" }
        tags = { type = "set", of = "string" }
        best_kg = { type = "float", merge = "max" }
        days = { type = "map", of = "int" }
        type = { type = "string" }
    "#;
    let file = schema::Schema::parse(file, "workout.toml").unwrap();
    let derived = schema::Schema::from_types([Workout::entity_type()]).unwrap();
    assert_eq!(derived, file);
    assert_eq!(derived.hash(), file.hash());
}

#[test]
fn each_field_has_a_constant() {
    assert_eq!(Workout::STARTED_AT.name, "started_at");
    assert_eq!(Workout::TYPE.name, "type");
    assert_eq!(Workout::BEST_KG.name, "best_kg");
}
