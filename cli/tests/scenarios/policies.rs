//! What the policies of the 19 types make of edits that did not know of each other.
//!
//! The table says what was written and what must come of it, by the words of the policies; it
//! computes nothing with the engine's code.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value, json};

use crate::world::{Ran, World};

/// Edits of one entity of one type, and what they come to.
struct Case {
    type_name: &'static str,
    /// Who creates it.
    creator: &'static str,
    base: Value,
    /// What the device writes whose clock is earlier, or the later one.
    early: Value,
    late: Value,
    /// What the authority writes, where the policy knows one.
    server: Value,
    /// Fields afterwards. `{"any_order": […]}` leaves the order of a list open.
    fields: Value,
    /// Open conflicts: the field or group, what the later and the earlier device wrote.
    conflicts: Vec<(&'static str, Value, Value)>,
}

fn blob(name: &str) -> Value {
    json!({ "hash": format!("hash-of-{name}"), "size": 3, "media": "image/jpeg", "name": name })
}

fn case(type_name: &'static str, base: Value, early: Value, late: Value, fields: Value) -> Case {
    let conflicts = Vec::new();
    Case { type_name, creator: "phone", base, early, late, server: Value::Null, fields, conflicts }
}

impl Case {
    fn created_by(mut self, creator: &'static str) -> Self {
        self.creator = creator;
        self
    }

    fn server(mut self, edit: Value) -> Self {
        self.server = edit;
        self
    }

    fn conflict(mut self, field: &'static str, late: Value, early: Value) -> Self {
        self.conflicts.push((field, late, early));
        self
    }
}

/// Every type of the schema, most fields of it.
fn cases() -> Vec<Case> {
    vec![
        // server_wins: what the authority wrote stands against what had not seen it, whoever is
        // later; what only devices wrote since, the later one decides.
        case(
            "alert",
            json!({"set": {"title": "base", "severity": "low"}}),
            json!({"set": {"title": "early", "severity": "medium", "raised_at": "2026-01-01T00:00:00Z"}}),
            json!({"set": {"title": "late", "severity": "high", "read": true}}),
            json!({"title": "server", "severity": "high", "read": true, "raised_at": "2026-02-02T00:00:00Z"}),
        )
        .created_by("server")
        .server(json!({"set": {"title": "server", "raised_at": "2026-02-02T00:00:00Z"}})),
        case(
            "exposure",
            json!({"set": {"source": "base"}}),
            json!({"set": {"source": "early", "removed": true, "email": "early@x"}}),
            json!({"set": {"email": "late@x"}}),
            json!({"source": "server", "email": "late@x", "removed": false}),
        )
        .server(json!({"set": {"source": "server", "removed": false}}))
        .created_by("server"),
        case(
            "preferences",
            json!({"set": {"theme": "base", "notifications": true, "language": "en"}}),
            json!({"set": {"theme": "early", "language": "de"}}),
            json!({"set": {"theme": "late", "notifications": false}}),
            json!({"theme": "late", "notifications": false, "language": "de"}),
        ),
        case(
            "watchlist_item",
            json!({"set": {"kind": "email", "value": "base", "notes": "middle"}, "add": {"labels": ["a", "b"]}}),
            json!({"set": {"value": "early"}, "remove": {"labels": ["a"]}, "add": {"labels": ["b", "c"]},
                "splice": {"notes": [[0, 0, "first "]]}}),
            json!({"set": {"value": "late", "kind": "phone"}, "remove": {"labels": ["b"]},
                "add": {"labels": ["a", "d"]}, "splice": {"notes": [[6, 0, " last"]]}}),
            json!({"kind": "phone", "value": "late", "labels": ["a", "b", "c", "d"], "notes": "first middle last"}),
        ),
        case(
            "profile",
            json!({"set": {"name": "base", "bio": "one two three"}}),
            json!({"set": {"name": "early", "avatar": blob("early.jpg")}, "splice": {"bio": [[0, 3, "1"]]}}),
            json!({"set": {"name": "late"}, "splice": {"bio": [[8, 5, "3"]]}}),
            json!({"name": "late", "bio": "1 two 3", "avatar": blob("early.jpg")}),
        ),
        case(
            "space",
            json!({"set": {"name": "base"}, "append": {"comments": [{"by": "base"}]},
                "add": {"members": ["ann", "bob"]}, "increment": {"visits": 5}}),
            json!({"set": {"name": "early"}, "append": {"comments": [{"by": "early"}]},
                "remove": {"members": ["ann", "bob"]}, "increment": {"visits": 3}}),
            json!({"set": {"name": "late"}, "append": {"comments": [{"by": "late"}, {"by": "late"}]},
                "add": {"members": ["ann"]}, "increment": {"visits": -1}}),
            json!({
                "name": "late", "members": ["ann"], "visits": 7,
                "comments": {"any_order": [{"by": "base"}, {"by": "early"}, {"by": "late"}, {"by": "late"}]},
            }),
        )
        .conflict("name", json!("late"), json!("early")),
        case(
            "invoice",
            json!({"set": {"amount_cents": 100, "currency": "EUR", "paid": false}}),
            json!({"set": {"amount_cents": 200}}),
            json!({"set": {"currency": "JPY"}}),
            json!({"amount_cents": 100, "currency": "JPY", "paid": false}),
        )
        .conflict(
            "whole",
            json!({"amount_cents": 100, "currency": "JPY", "paid": false}),
            json!({"amount_cents": 200, "currency": "EUR", "paid": false}),
        ),
        case(
            "hero",
            json!({"set": {"name": "base", "age": 10}, "add": {"traits": ["brave"]}}),
            json!({"set": {"name": "early", "age": 11}, "add": {"traits": ["kind"]}}),
            json!({"set": {"age": 12, "avatar": blob("late.jpg")}, "remove": {"traits": ["brave"]}}),
            json!({"name": "server", "age": 12, "avatar": blob("late.jpg"), "traits": ["brave", "kind"]}),
        )
        // The creator is a device: what an authority wrote without seeing an edit stands all the same.
        .server(json!({"set": {"name": "server"}, "add": {"traits": ["brave"]}})),
        case(
            "story",
            json!({"set": {"hero": "h1", "title": "base", "content": "once", "favorite": false}}),
            json!({"set": {"title": "early", "hero": "h2", "favorite": true}, "increment": {"play_count": 2}}),
            json!({"set": {"content": "late", "hero": "h3"}, "increment": {"play_count": 3}}),
            json!({"hero": "h3", "title": "base", "content": "late", "favorite": true, "play_count": 5}),
        )
        .conflict(
            "content",
            json!({"title": "base", "content": "late"}),
            json!({"title": "early", "content": "once"}),
        ),
        case(
            "illustration",
            json!({"set": {"story": "s1"}}),
            json!({"set": {"story": "s2", "image": blob("early.jpg")}}),
            json!({"set": {"story": "s3", "image": blob("late.jpg")}}),
            json!({"story": "s3", "image": blob("server.jpg")}),
        )
        .server(json!({"set": {"image": blob("server.jpg")}})),
        // client_wins: what a device wrote stands against what the authority wrote unseen.
        case(
            "story_event",
            json!({"set": {"title": "base", "prompt": "base"}}),
            json!({"set": {"title": "early"}}),
            json!({"set": {"title": "late"}}),
            json!({"title": "late", "prompt": "server"}),
        )
        .server(json!({"set": {"title": "server", "prompt": "server"}})),
        case(
            "health_metric",
            json!({"set": {"kind": "pulse", "value": 60.5}}),
            json!({"set": {"kind": "early", "value": 61.5, "taken_at": "2026-01-01T00:00:00Z"}}),
            json!({"set": {"value": 62.25, "taken_at": "2026-01-02T00:00:00.500Z"}}),
            json!({"kind": "server", "value": 62.25, "taken_at": "2026-01-02T00:00:00.500Z"}),
        )
        .server(json!({"set": {"kind": "server"}})),
        case(
            "user_preference",
            json!({"set": {"units": "metric", "goal": 5}}),
            json!({"set": {"goal": 6}}),
            json!({"set": {"units": "imperial"}}),
            json!({"units": "imperial", "goal": 6}),
        )
        .server(json!({"set": {"goal": 9}}))
        .created_by("server"),
        case(
            "note",
            json!({"set": {"body": "a b"}, "add": {"tags": ["x"]}}),
            json!({"splice": {"body": [[3, 0, " c"]]}, "remove": {"tags": ["x"]}}),
            json!({"splice": {"body": [[0, 2, ""]]}, "add": {"tags": ["x", "y"]}}),
            json!({"body": "b c", "tags": ["x", "y"]}),
        ),
        case(
            "workout",
            json!({"set": {"started_at": "2026-01-01T10:00:00Z", "sets": [[5, 50]], "notes": "ok"}}),
            json!({"set": {"sets": [[5, 50], [5, 55]]}, "splice": {"notes": [[0, 0, "very "]]}, "add": {"tags": ["legs"]}}),
            json!({"set": {"completed_at": "2026-01-01T11:00:00Z", "started_at": "2026-01-01T10:05:00Z"},
                "add": {"tags": ["core"]}}),
            json!({"started_at": "2026-01-01T10:05:00Z", "sets": [[5, 50]], "completed_at": "2026-01-01T11:00:00Z",
                "notes": "very ok", "tags": ["core", "legs"]}),
        )
        .conflict(
            "log",
            json!({"sets": [[5, 50]], "completed_at": "2026-01-01T11:00:00Z"}),
            json!({"sets": [[5, 50], [5, 55]]}),
        ),
        case(
            "volume",
            json!({"set": {"week": "2026-W01"}, "put": {"sets": {"chest": 5, "legs": 8}}}),
            json!({"set": {"week": "early"}, "put": {"sets": {"chest": 9, "arms": 3}}}),
            json!({"put": {"sets": {"chest": 7, "legs": 2, "back": 4}}}),
            json!({"week": "early", "sets": {"chest": 9, "legs": 8, "arms": 3, "back": 4}}),
        ),
        case(
            "recovery",
            json!({"put": {"days": {"mon": {"sleep": 8}, "thu": 1, "fri": 1}}}),
            json!({"put": {"days": {"mon": {"sleep": 6}, "tue": [1, 2], "thu": null, "fri": 2}}}),
            json!({"put": {"days": {"mon": {"sleep": 7}, "wed": "x", "thu": 3, "fri": null}}}),
            json!({"days": {"mon": {"sleep": 7}, "tue": [1, 2], "wed": "x", "thu": 3}}),
        ),
        case(
            "progression",
            json!({"set": {"exercise": "e1", "next_kg": 10.0}}),
            json!({"set": {"next_kg": 12.5, "confirmed": true}}),
            json!({"set": {"next_kg": 15.0, "exercise": "e2"}}),
            json!({"exercise": "e2", "next_kg": 15.0, "confirmed": true}),
        )
        .conflict("next_kg", json!(15.0), json!(12.5)),
        case(
            "exercise",
            json!({"set": {"name": "base", "level": "beginner", "instructions": ["one"]}}),
            Value::Null,
            Value::Null,
            json!({"name": "server", "level": "expert", "instructions": ["one", "two"]}),
        )
        .created_by("server")
        .server(json!({"set": {"name": "server", "level": "expert", "instructions": ["one", "two"]}})),
    ]
}

const ALL: [&str; 3] = ["phone", "tablet", "server"];

fn world() -> Option<(World, crate::world::Relay)> {
    let world = World::new()?;
    let relay = world.relay();
    for (device, role) in [("phone", "writer"), ("tablet", "writer"), ("server", "authority")] {
        world.join(device, &relay, role);
    }
    world.run("server", &["schema", "push"]).ok();
    Some((world, relay))
}

/// Exports of all types and the open conflicts are the same everywhere.
fn assert_equal(world: &World, devices: &[&str]) {
    for case in cases() {
        let export = world.export(devices[0], case.type_name);
        for device in &devices[1..] {
            assert_eq!(world.export(device, case.type_name), export, "{} on {device}", case.type_name);
        }
    }
    let conflicts = world.conflicts(devices[0]);
    for device in devices {
        assert_eq!(world.conflicts(device), conflicts, "{device}");
        assert_eq!(world.status(device)["conflicts"], conflicts.len(), "{device}");
    }
}

/// Each of `expected` is there, and each other field as after the base.
fn assert_fields(what: &str, fields: &Value, expected: &Value) {
    for (name, expected) in expected.as_object().unwrap() {
        let found = &fields[name];
        match expected.get("any_order").and_then(Value::as_array) {
            Some(items) => {
                let sorted = |items: &[Value]| {
                    let mut texts: Vec<String> = items.iter().map(Value::to_string).collect();
                    texts.sort();
                    texts
                };
                let found = found.as_array().map(|found| sorted(found));
                assert_eq!(found.as_ref(), Some(&sorted(items)), "{what} {name}");
            }
            None => assert_eq!(found, expected, "{what} {name}: {fields}"),
        }
    }
}

/// Offline edits everywhere, then syncs in `order`; `late` is the device with the later clock.
fn meet(order: [&str; 3], late: &str, server_late: bool) {
    let Some((world, _relay)) = world() else { return };
    let early = if late == "phone" { "tablet" } else { "phone" };
    for case in cases() {
        world.edit(case.creator, case.type_name, "x", &case.base, "-50s").ok();
    }
    world.settle(&ALL);
    assert_equal(&world, &ALL);

    for case in cases() {
        let writes = [
            (early, &case.early, "-20s"),
            (late, &case.late, "20s"),
            ("server", &case.server, if server_late { "40s" } else { "-40s" }),
        ];
        for (device, edit, offset) in writes {
            if !edit.is_null() {
                world.edit(device, case.type_name, "x", edit, offset).ok();
            }
        }
        if case.type_name == "exercise" {
            for device in ["phone", "tablet"] {
                let edit = json!({"set": {"name": device}});
                world.edit(device, "exercise", "x", &edit, "0s").error("validation", 3);
                world.run(device, &["delete", "exercise", "x"]).error("validation", 3);
            }
        }
    }
    world.settle(&order);
    assert_equal(&world, &ALL);

    let mut found: BTreeMap<(String, String), Value> = BTreeMap::new();
    for conflict in world.conflicts("server") {
        let part = |name: &str| conflict[name].as_str().unwrap().to_owned();
        found.insert((part("type"), part("field")), conflict.clone());
    }
    for case in cases() {
        let name = case.type_name;
        assert_fields(name, &world.fields("phone", name, "x"), &case.fields);
        let status = world.run("phone", &["get", name, "x"]).ok().json()["status"].clone();
        assert_eq!(status, if case.conflicts.is_empty() { "synced" } else { "conflict" }, "{name}");
        for (field, late_value, early_value) in &case.conflicts {
            let conflict = found
                .remove(&(name.to_owned(), (*field).to_owned()))
                .unwrap_or_else(|| panic!("{name}.{field} is in no conflict"));
            assert_eq!((&conflict["id"], &conflict["kind"]), (&json!("x"), &json!("manual")), "{conflict}");
            let sides: Vec<(&Value, &Value)> =
                conflict["sides"].as_array().unwrap().iter().map(|s| (&s["device"], &s["value"])).collect();
            let (late, early) = (json!(late), json!(early));
            assert_eq!(sides, [(&late, late_value), (&early, early_value)], "{conflict}");
        }
    }
    assert!(found.is_empty(), "nobody disagreed on {:?}", found.keys());
    settle_conflicts(&world);
    in_turn(&world);
}

/// Each way to resolve; what was chosen stands everywhere.
fn settle_conflicts(world: &World) {
    let mut expected = Vec::new();
    for (number, conflict) in world.conflicts("phone").into_iter().enumerate() {
        let part = |name: &str| conflict[name].as_str().unwrap();
        let sides = conflict["sides"].as_array().unwrap();
        let of = |mine: bool| {
            let side = sides.iter().find(|side| (side["device"] == "phone") == mine).unwrap();
            side["value"].clone()
        };
        let given = match part("type") {
            "invoice" => json!({"amount_cents": 300, "currency": "USD", "paid": true}),
            "workout" => json!({"sets": [], "completed_at": "2027-01-01T00:00:00Z"}),
            "story" => json!({"title": "t", "content": "c"}),
            "space" => json!("given"),
            _ => json!(99.5),
        };
        let (choice, value) = match number % 4 {
            0 => (["--keep", "mine"], of(true)),
            1 => (["--keep", "theirs"], of(false)),
            2 => (["--keep", "2"], sides[1]["value"].clone()),
            _ => (["--value", &*given.to_string()], given.clone()),
        };
        let (type_name, field) = (part("type").to_owned(), part("field").to_owned());
        // Not even the same device writes past an open conflict.
        let member = match &value {
            Value::Object(members) => members.keys().next().unwrap().clone(),
            _ => field.clone(),
        };
        let written = sides[0]["value"].get(&member).unwrap_or(&sides[0]["value"]);
        world.edit("phone", &type_name, "x", &json!({"set": {member: written}}), "0s").error("conflict", 4);
        world.run("phone", &[&["resolve", &*type_name, "x", &*field][..], &choice[..]].concat()).ok();
        expected.push((type_name, field, value));
    }
    assert_eq!(world.conflicts("phone"), Vec::<Value>::new());
    assert_eq!(world.conflicts("tablet").len(), expected.len());
    world.settle(&ALL);
    assert_equal(world, &ALL);
    assert_eq!(world.conflicts("tablet"), Vec::<Value>::new());
    for (type_name, field, value) in expected {
        let fields = world.fields("tablet", &type_name, "x");
        match &value {
            Value::Object(members) => assert_fields(&type_name, &fields, &json!(members)),
            single => assert_eq!(fields[&field], *single, "{type_name}.{field}"),
        }
    }
}

/// Edits one after the other never conflict, and the last one stands, whatever the policy says
/// of edits that had not seen each other.
fn in_turn(world: &World) {
    for (device, other) in [("phone", "tablet"), ("tablet", "phone"), ("server", "phone")] {
        for case in cases() {
            if case.type_name == "exercise" && device != "server" {
                continue;
            }
            world.edit(device, case.type_name, "x", &turn(&case, device), "0s").ok();
        }
        world.settle(&[device, other]);
        world.settle(&ALL);
        assert_eq!(world.conflicts(other), Vec::<Value>::new());
        for case in cases() {
            if case.type_name != "exercise" || device == "server" {
                let fields = world.fields(other, case.type_name, "x");
                assert_fields(case.type_name, &fields, &turn(&case, device)["set"]);
            }
        }
    }
    assert_equal(world, &ALL);
}

/// All single values of a case, as one device writes them.
fn turn(case: &Case, device: &str) -> Value {
    let mut set = Map::new();
    for name in ["base", "early", "late"] {
        let edit = match name {
            "base" => &case.base,
            "early" => &case.early,
            _ => &case.late,
        };
        set.extend(edit.get("set").and_then(Value::as_object).cloned().unwrap_or_default());
    }
    let number = ALL.iter().position(|known| *known == device).unwrap();
    for (name, value) in &mut set {
        *value = match value {
            Value::String(text) if text.starts_with("20") && text.ends_with('Z') => {
                json!(format!("2026-03-0{}T00:00:00Z", number + 1))
            }
            Value::String(_) if name == "severity" => json!(["low", "medium", "high"][number]),
            Value::String(_) if name == "units" => json!(["metric", "imperial", "metric"][number]),
            Value::String(_) if name == "currency" => json!(["EUR", "USD", "CHF"][number]),
            Value::String(_) => json!(format!("by {device}")),
            Value::Bool(_) => json!(number % 2 == 1),
            Value::Number(n) if n.is_f64() => json!(100.5 + number as f64),
            Value::Number(_) => json!(100 + number),
            Value::Object(_) => blob(device),
            _ => json!([[number]]),
        };
    }
    if set.is_empty() {
        set.insert("days".into(), json!({"sun": number}));
    }
    json!({ "set": set })
}

#[test]
fn the_table_has_all_types() {
    let Some(data) = crate::world::data_dir() else { return };
    let schema = std::fs::read_to_string(data.join("schema.toml")).unwrap();
    let types: BTreeSet<&str> = schema
        .lines()
        .filter_map(|line| line.strip_prefix('[')?.split_once(']').map(|(name, _)| name))
        .filter(|name| !name.contains('.'))
        .collect();
    assert_eq!(types, cases().iter().map(|case| case.type_name).collect());
    assert_eq!(types.len(), 19);
}

#[test]
fn the_earlier_one_syncs_first() {
    meet(["phone", "tablet", "server"], "tablet", false);
}

#[test]
fn the_later_one_syncs_first() {
    meet(["tablet", "phone", "server"], "tablet", true);
}

#[test]
fn the_authority_syncs_first_then_the_later_one() {
    meet(["server", "phone", "tablet"], "phone", false);
}

#[test]
fn the_authority_syncs_between_them() {
    meet(["tablet", "server", "phone"], "phone", true);
}

/// What two devices write into all single values of a type. Texts are left out: theirs is to
/// keep both edits, whatever they say.
fn alike(case: &Case, device: &str) -> Value {
    let mut edit = turn(case, device);
    let set = edit["set"].as_object_mut().unwrap();
    for text in ["notes", "bio", "body"] {
        set.remove(text);
    }
    if set.is_empty() {
        return json!({"add": {"tags": [device]}});
    }
    edit
}

/// Two devices that write the same do not disagree, on what is new and on what there is.
#[test]
fn the_same_values_written_twice_are_no_conflict() {
    let Some((world, _relay)) = world() else { return };
    for case in cases() {
        if case.type_name == "exercise" {
            continue;
        }
        for (device, offset) in [("phone", "-20s"), ("tablet", "20s")] {
            world.edit(device, case.type_name, "new", &alike(&case, "phone"), offset).ok();
        }
    }
    world.settle(&ALL);
    for case in cases() {
        if case.type_name == "exercise" {
            continue;
        }
        let before = world.fields("phone", case.type_name, "new");
        assert_fields(
            case.type_name,
            &before,
            alike(&case, "phone").get("set").unwrap_or(&json!({"tags": ["phone"]})),
        );
        for device in ["phone", "tablet"] {
            world.edit(device, case.type_name, "new", &alike(&case, "tablet"), "0s").ok();
        }
    }
    world.settle(&["tablet", "phone", "server"]);
    assert_equal(&world, &ALL);
    assert_eq!(world.conflicts("phone"), Vec::<Value>::new());
    for case in cases().iter().filter(|case| case.type_name != "exercise") {
        let fields = world.fields("server", case.type_name, "new");
        assert_fields(
            case.type_name,
            &fields,
            alike(case, "tablet").get("set").unwrap_or(&json!({"tags": ["phone", "tablet"]})),
        );
    }
}

/// A third device that saw the server's value and wrote on top of it does not bring the loser
/// back, in whichever order they arrive.
#[test]
fn a_third_device_that_saw_the_server_s_value_does_not_mask_it() {
    for (number, order) in
        [["phone", "third", "tablet"], ["third", "phone", "tablet"], ["tablet", "third", "phone"]]
            .into_iter()
            .enumerate()
    {
        let Some((world, relay)) = world() else { return };
        world.join("third", &relay, "writer");
        let title = |value: &str| json!({"set": {"title": value}});
        world.edit("server", "alert", "x", &title("base"), "-50s").ok();
        world.edit("server", "alert", "y", &title("base"), "-50s").ok();
        world.edit("server", "hero", "x", &json!({"set": {"name": "base"}}), "-50s").ok();
        world.settle(&["server", "phone", "tablet", "third"]);

        // The phone does not know of the server's value; the third device does, and writes
        // another field of one alert, the same field of the other.
        world.edit("phone", "alert", "x", &title("phone"), "40s").ok();
        world.edit("phone", "alert", "y", &title("phone"), "40s").ok();
        world.edit("phone", "hero", "x", &json!({"set": {"name": "phone"}}), "40s").ok();
        world.edit("server", "alert", "x", &title("server"), "-20s").ok();
        world.edit("server", "alert", "y", &title("server"), "-20s").ok();
        world.edit("server", "hero", "x", &json!({"set": {"name": "server"}}), "-20s").ok();
        world.sync("server");
        world.sync("third");
        world.edit("third", "alert", "x", &json!({"set": {"read": true}}), "0s").ok();
        // The value that it saw already: no change, or none that counts against the server's.
        let again: Ran = world.edit("third", "hero", "x", &json!({"set": {"name": "server"}}), "0s");
        assert_eq!(again.code, 0, "{again:?}");
        world.edit("third", "alert", "y", &title("third"), "0s").ok();
        world.settle(&order);
        world.settle(&["server", "phone", "tablet", "third"]);
        assert_equal(&world, &["server", "phone", "tablet", "third"]);
        let x = world.fields("phone", "alert", "x");
        assert_eq!((&x["title"], &x["read"]), (&json!("server"), &json!(true)), "order {number}");
        assert_eq!(world.fields("phone", "alert", "y")["title"], "third", "order {number}");
        assert_eq!(world.fields("tablet", "hero", "x")["name"], "server", "order {number}");
    }
}

/// Equal times are made by a change that both devices saw and that is ahead of their clocks:
/// what they write is at its millisecond.
#[test]
fn equal_times_are_for_a_person_where_the_schema_says_so() {
    let Some((world, _relay)) = world() else { return };
    let (name, theme) = (|v: &str| json!({"set": {"name": v}}), |v: &str| json!({"set": {"theme": v}}));
    world.edit("server", "profile", "x", &name("base"), "55s").ok();
    world.edit("server", "preferences", "x", &theme("base"), "55s").ok();
    world.settle(&["server", "phone", "tablet"]);
    for device in ["phone", "tablet"] {
        world.edit(device, "profile", "x", &name(device), "0s").ok();
        world.edit(device, "preferences", "x", &theme(device), "0s").ok();
    }
    world.settle(&["tablet", "phone", "server"]);
    assert_equal(&world, &ALL);
    let conflicts = world.conflicts("phone");
    assert_eq!(conflicts.len(), 1, "{conflicts:?}");
    assert_eq!(
        (&conflicts[0]["type"], &conflicts[0]["field"], &conflicts[0]["kind"]),
        (&json!("profile"), &json!("name"), &json!("tie"))
    );
    assert_eq!(conflicts[0]["sides"][0]["time"], conflicts[0]["sides"][1]["time"]);
    // A tie that nobody waits for is decided the same way everywhere.
    let shown = world.fields("phone", "preferences", "x")["theme"].clone();
    assert!(shown == "phone" || shown == "tablet", "{shown}");
    world.run("tablet", &["resolve", "profile", "x", "name", "--keep", "mine"]).ok();
    world.settle(&["tablet", "phone", "server"]);
    assert_equal(&world, &ALL);
    assert_eq!(world.conflicts("phone"), Vec::<Value>::new());
    assert_eq!(world.fields("phone", "profile", "x")["name"], "tablet");
}
