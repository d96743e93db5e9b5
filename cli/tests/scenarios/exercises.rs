//! Reference data: one authority, many readers.

use std::collections::BTreeMap;
use std::fs;

use serde_json::{Value, json};

use crate::world::{Relay, World, terminate};

const FIELDS: [&str; 10] = [
    "category",
    "equipment",
    "force",
    "images",
    "instructions",
    "level",
    "mechanic",
    "name",
    "primaryMuscles",
    "secondaryMuscles",
];

type Record = BTreeMap<String, Value>;

fn records(world: &World) -> Vec<Record> {
    serde_json::from_str(&fs::read_to_string(world.data.join("exercises.json")).unwrap()).unwrap()
}

/// What an export of the input is: all fields of the schema, keys and lines sorted.
fn normalised(records: &[Record]) -> String {
    let mut lines: Vec<String> = records
        .iter()
        .map(|record| {
            let mut line: Record = record.clone();
            for field in FIELDS {
                line.entry(field.to_owned()).or_insert(Value::Null);
            }
            assert_eq!(line.len(), FIELDS.len() + 1);
            serde_json::to_string(&line).unwrap() + "\n"
        })
        .collect();
    lines.sort();
    lines.concat()
}

fn imported() -> Option<(World, Relay, Vec<Record>)> {
    let world = World::new()?;
    let relay = world.relay();
    for (device, role) in [("server", "authority"), ("phone", "writer"), ("glass", "reader")] {
        world.join(device, &relay, role);
    }
    let file = world.data.join("exercises.json");
    let report = world.run("server", &["import", file.to_str().unwrap(), "--type", "exercise"]).ok().json();
    assert_eq!(report, json!({"type": "exercise", "total": 873, "imported": 873, "failed": 0}));
    assert_eq!(world.sync("server")["sent"], 873);
    let records = records(&world);
    Some((world, relay, records))
}

#[test]
fn all_exercises_reach_a_writer_and_a_reader() {
    let Some((world, _relay, records)) = imported() else { return };
    for device in ["phone", "glass"] {
        assert_eq!(world.sync(device)["received"], 873, "{device}");
    }
    let expected = normalised(&records);
    for device in ["server", "phone", "glass"] {
        assert!(world.export(device, "exercise") == expected, "{device} has something else than the input");
        assert_eq!(world.status(device)["digest"], world.status("server")["digest"]);
    }
    // Nothing is left to say.
    for device in ["server", "phone", "glass"] {
        let report = world.sync(device);
        assert_eq!((&report["sent"], &report["received"]), (&json!(0), &json!(0)), "{device}");
    }
    // The same file again is no change.
    let file = world.data.join("exercises.json");
    world.run("server", &["import", file.to_str().unwrap(), "--type", "exercise"]).ok();
    assert_eq!(world.sync("server")["sent"], 0);

    refusals(&world, &expected, &records[0]["id"]);
    queries(&world, &records);
}

/// What devices may not write is refused by themselves, and by the relay where they do not check.
fn refusals(world: &World, expected: &str, id: &Value) {
    let id = id.as_str().unwrap();
    for device in ["phone", "glass"] {
        for args in [&["set", "exercise", id, "name=x"][..], &["delete", "exercise", id]] {
            world.run(device, args).error("validation", 3);
        }
        world.run(device, &["set", "exercise", "new", "name=x"]).error("validation", 3);
        world.run(device, &["set", "exercise", id, "name=mine", "--unchecked"]).ok();
        world.run(device, &["delete", "exercise", id, "--unchecked"]).ok();
        world.run(device, &["set", "exercise", "new", "name=mine", "--unchecked"]).ok();
        assert_ne!(world.export(device, "exercise"), expected);
        world.run(device, &["sync"]).ok();
        assert!(world.export(device, "exercise") == expected, "{device} has kept what was refused");
        let refused = world.run(device, &["refused"]).ok().lines();
        assert!(refused.len() >= 2, "{refused:?}");
        assert_eq!(world.status(device)["refused"], refused.len());
        assert_eq!(world.status(device)["pending"], 0);
        assert!(refused.iter().any(|r| r["id"] == id && r["code"] == "forbidden"), "{refused:?}");
        assert!(refused.iter().any(|r| r["id"] == "new" && r["code"] == "forbidden"), "{refused:?}");
        world.run(device, &["get", "exercise", "new"]).error("not_found", 7);
        for record in &refused {
            world.run(device, &["refused", "dismiss", &record["number"].to_string()]).ok();
        }
        assert_eq!(world.status(device)["refused"], 0);
    }
    // A reader writes nothing at all.
    world.run("glass", &["set", "note", "n", "body=x"]).error("validation", 3);
    world.run("glass", &["set", "note", "n", "body=x", "--unchecked"]).ok();
    world.run("glass", &["sync"]).ok();
    assert_eq!(world.export("glass", "note"), "");
    assert_eq!(world.run("glass", &["refused"]).ok().lines().len(), 1);
    assert_eq!(world.sync("server")["received"], 0);
    assert!(world.export("server", "exercise") == expected);
}

/// `list` against a computation on the input.
fn queries(world: &World, records: &[Record]) {
    let text = |record: &Record, field: &str| record[field].as_str().map(str::to_owned);
    let ids = |args: &[&str]| -> Vec<String> {
        let mut found = Vec::new();
        let lines = world.run("phone", &[&["list", "exercise"], args].concat()).ok().lines();
        for line in &lines {
            found.push(line["id"].as_str().unwrap().to_owned());
        }
        found
    };
    let computed = |keep: &dyn Fn(&Record) -> bool, order: Option<(&str, bool)>| -> Vec<String> {
        let mut kept: Vec<&Record> = records.iter().filter(|record| keep(record)).collect();
        kept.sort_by(|a, b| {
            let by_field = order.map(|(field, descending)| {
                let order = text(a, field).cmp(&text(b, field));
                if descending { order.reverse() } else { order }
            });
            let by_id = a["id"].as_str().cmp(&b["id"].as_str());
            by_field.unwrap_or(by_id).then(match order {
                Some((_, true)) => by_id.reverse(),
                _ => by_id,
            })
        });
        kept.iter().map(|record| record["id"].as_str().unwrap().to_owned()).collect()
    };
    let is =
        |field: &'static str, value: &'static str| move |r: &Record| text(r, field).as_deref() == Some(value);
    assert_eq!(ids(&[]), computed(&|_| true, None));
    assert_eq!(ids(&["--where", "level = expert"]), computed(&is("level", "expert"), None));
    assert_eq!(ids(&["--where", "force = push"]), computed(&is("force", "push"), None));
    let both = |r: &Record| is("level", "beginner")(r) && is("category", "stretching")(r);
    assert_eq!(
        ids(&["--where", "level = beginner", "--where", "category=stretching"]),
        computed(&both, None)
    );
    let named = |r: &Record| text(r, "name").is_some_and(|name| *"M" <= *name && *name < *"P");
    assert_eq!(ids(&["--where", "name >= M", "--where", "name < P"]), computed(&named, None));
    assert_eq!(
        ids(&["--where", "level = expert", "--order-by", "name"]),
        computed(&is("level", "expert"), Some(("name", false)))
    );
    assert_eq!(
        ids(&["--where", "category = cardio", "--order-by", "-name"]),
        computed(&is("category", "cardio"), Some(("name", true)))
    );
    // Whole order by an indexed field and by one that is not.
    for (argument, order) in [
        ("level", ("level", false)),
        ("-level", ("level", true)),
        ("name", ("name", false)),
        ("-name", ("name", true)),
    ] {
        let (found, expected) = (ids(&["--order-by", argument]), computed(&|_| true, Some(order)));
        let values = |ids: &[String]| -> Vec<Option<String>> {
            let by_id: BTreeMap<&str, &Record> =
                records.iter().map(|record| (record["id"].as_str().unwrap(), record)).collect();
            ids.iter().map(|id| text(by_id[&**id], order.0)).collect()
        };
        assert_eq!(values(&found), values(&expected), "{argument}");
        let sorted = |mut ids: Vec<String>| {
            ids.sort();
            ids
        };
        assert_eq!(sorted(found), sorted(expected), "{argument}");
    }
    // Page by page, each once, as in one go.
    for args in
        [&[][..], &["--order-by", "level"], &["--order-by", "-mechanic"], &["--where", "force = pull"]]
    {
        let mut after: Option<String> = None;
        let mut found = Vec::new();
        loop {
            let mut page = [&["list", "exercise", "--limit", "70"], args].concat();
            if let Some(cursor) = &after {
                page.extend(["--after", cursor]);
            }
            let lines = world.run("phone", &page).ok().lines();
            assert!(lines.len() <= 70);
            found.extend(lines.iter().map(|line| line["id"].as_str().unwrap().to_owned()));
            match lines.last().and_then(|line| line["cursor"].as_str()) {
                Some(cursor) => after = Some(cursor.to_owned()),
                None => break,
            }
        }
        assert_eq!(found, ids(args), "{args:?}");
    }
    assert_eq!(ids(&["--limit", "1"]).len(), 1);
    for (args, code) in [
        (&["--where", "level"][..], 3),
        (&["--where", "nope = 1"], 3),
        (&["--order-by", "nope"], 3),
        (&["--limit", "0"], 2),
        (&["--limit", "-1"], 2),
        (&["--after", "nonsense"], 2),
    ] {
        let ran = world.run("phone", &[&["list", "exercise"], args].concat());
        assert_eq!(ran.code, code, "{args:?}: {} {}", ran.out, ran.err);
    }
}

/// A refused edit takes nothing with it that could stand without it.
#[test]
fn what_was_written_after_a_refused_edit_is_kept() {
    let Some(world) = World::new() else { return };
    let relay = world.relay();
    for (device, role) in [("server", "authority"), ("phone", "writer"), ("tablet", "writer")] {
        world.join(device, &relay, role);
    }
    world.run("server", &["schema", "push"]).ok();
    world.set("phone", &["hero", "h", "name=Bo", "age=10", "traits+=brave"]);
    world.set("phone", &["story", "s", "play_count+=3", "title=one"]);
    world.settle(&["phone", "tablet"]);

    world.set("phone", &["hero", "h", "age=500", "traits+=x", "--unchecked"]);
    world.set("phone", &["hero", "h", "name=Bob", "traits+=kind"]);
    world.set("phone", &["story", "s", "play_count+=2"]);
    world.set("phone", &["hero", "h", "traits-=brave"]);
    assert_eq!(world.fields("phone", "hero", "h")["age"], 500);
    world.set("tablet", &["hero", "h", "traits+=calm"]);
    for device in ["phone", "tablet", "phone"] {
        world.sync(device);
    }
    for device in ["phone", "tablet"] {
        let hero = world.fields(device, "hero", "h");
        assert_eq!(
            (&hero["name"], &hero["age"], &hero["traits"]),
            (&json!("Bob"), &json!(10), &json!(["calm", "kind"])),
            "{device}"
        );
        assert_eq!(world.fields(device, "story", "s")["play_count"], 5, "{device}");
    }
    assert_eq!(world.export("phone", "hero"), world.export("tablet", "hero"));
    assert_eq!(world.sync("phone")["digest"], world.sync("tablet")["digest"]);
    let refused = world.run("phone", &["refused"]).ok().lines();
    assert_eq!(refused.len(), 1, "{refused:?}");
    assert_eq!((&refused[0]["code"], &refused[0]["id"]), (&json!("validation"), &json!("h")));
    assert_eq!(world.status("phone")["refused"], 1);

    // Members of a transaction stand or fall together.
    let lines = "{\"type\":\"hero\",\"id\":\"h\",\"set\":{\"age\":900}}\n{\"type\":\"note\",\"id\":\"n\",\"set\":{\"body\":\"x\"}}";
    world.run_with_input("phone", &["set", "-", "--unchecked"], lines.as_bytes()).ok();
    world.set("phone", &["note", "m", "body=y"]);
    world.sync("phone");
    world.run("phone", &["get", "note", "n"]).error("not_found", 7);
    assert_eq!(world.fields("phone", "hero", "h")["age"], 10);
    world.sync("tablet");
    assert_eq!(world.fields("tablet", "note", "m")["body"], "y");
    world.run("tablet", &["get", "note", "n"]).error("not_found", 7);
    // Sent again as it is, it is refused here; the part that can stand is written.
    for record in world.run("phone", &["refused"]).ok().lines() {
        let ran = world.run("phone", &["refused", "retry", &record["number"].to_string()]);
        match record["type"].as_str().unwrap() {
            "note" => assert_eq!(ran.code, 0, "{ran:?}"),
            _ => assert_eq!(ran.code, 3, "{ran:?}"),
        }
    }
    world.settle(&["phone", "tablet"]);
    assert_eq!(world.fields("tablet", "note", "n")["body"], "x");
    assert_eq!(world.export("phone", "hero"), world.export("tablet", "hero"));
}

/// A refused parent holds its children back, and that is no complete sync.
#[test]
fn children_of_a_refused_parent_wait_for_it() {
    let Some(world) = World::new() else { return };
    let relay = world.relay();
    for (device, role) in [("server", "authority"), ("phone", "writer"), ("tablet", "writer")] {
        world.join(device, &relay, role);
    }
    world.run("server", &["schema", "push"]).ok();
    world.set("phone", &["hero", "h", "name=x", "age=999", "--unchecked"]);
    world.set("phone", &["story", "s", "hero=h", "title=t"]);
    world.set("phone", &["illustration", "i", "story=s"]);
    world.set("phone", &["note", "n", "tags+=x"]);
    for _ in 0..2 {
        let sync = world.run("phone", &["sync", "--deadline", "20s"]);
        let error = sync.error("validation", 3);
        assert_eq!(error["code"], "held_by_refused");
        for part in ["story/s", "hero/h", "refused"] {
            assert!(error["message"].as_str().unwrap().contains(part), "{error}");
        }
        assert!(error["help"].as_str().unwrap().contains("`anabranch refused`"), "{error}");
        let report = sync.json();
        assert_eq!((&report["outcome"], &report["pending"]), (&json!("partial"), &json!(2)), "{report}");
        assert_eq!(report["reason"]["code"], "held_by_refused");
        assert_eq!(world.status("phone")["refused"], 1);
    }
    world.sync("tablet");
    assert_eq!(world.export("tablet", "story"), "");
    assert_eq!(world.fields("tablet", "note", "n")["tags"], json!(["x"]));
    let mut watch = world.watch("phone");
    let event = watch.event(|event| event["state"] == "pending");
    assert_eq!((&event["pending"], &event["reason"]["code"]), (&json!(2), &json!("held_by_refused")));
    assert_eq!(world.status("phone")["state"], "pending");
    // Written rightly, it takes them along.
    world.set("phone", &["hero", "h", "name=x", "age=9"]);
    watch.event(|event| event["state"] == "up_to_date" && event["pending"] == 0);
    assert_eq!(terminate(&mut watch.child), 0);
    world.settle(&["phone", "tablet"]);
    assert_eq!(world.fields("tablet", "illustration", "i")["story"], "s");
    assert_eq!(world.fields("tablet", "story", "s")["hero"], "h");
}
