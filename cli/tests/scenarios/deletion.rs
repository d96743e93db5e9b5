//! Deletions that meet edits.

use serde_json::{Value, json};

use crate::world::World;

const DEVICES: [&str; 2] = ["phone", "tablet"];

/// An edit of each kind, and what shows it where the entity lives.
fn edits() -> Vec<(&'static str, Value, Value, &'static str, Value)> {
    vec![
        ("preferences", json!({"set": {"theme": "a"}}), json!({"set": {"theme": "b"}}), "theme", json!("b")),
        (
            "note",
            json!({"set": {"body": "a"}}),
            json!({"splice": {"body": [[1, 0, "b"]]}}),
            "body",
            json!("ab"),
        ),
        (
            "space",
            json!({"increment": {"visits": 1}}),
            json!({"increment": {"visits": 2}}),
            "visits",
            json!(3),
        ),
        (
            "recovery",
            json!({"put": {"days": {"a": 1}}}),
            json!({"put": {"days": {"b": 2}}}),
            "days",
            json!({"a": 1, "b": 2}),
        ),
        (
            "watchlist_item",
            json!({"set": {"kind": "k", "value": "v"}}),
            json!({"add": {"labels": ["x"]}}),
            "labels",
            json!(["x"]),
        ),
        (
            "invoice",
            json!({"set": {"amount_cents": 1}}),
            json!({"set": {"amount_cents": 2}}),
            "amount_cents",
            json!(2),
        ),
    ]
}

fn world() -> Option<(World, crate::world::Relay)> {
    let world = World::new()?;
    let relay = world.relay();
    for device in DEVICES {
        world.join(device, &relay, "writer");
    }
    for (type_name, base, ..) in edits() {
        world.edit("phone", type_name, "x", &base, "-50s").ok();
    }
    world.settle(&DEVICES);
    Some((world, relay))
}

fn both_orders(test: impl Fn(&World, [&str; 2])) {
    for order in [DEVICES, ["tablet", "phone"]] {
        let Some((world, _relay)) = world() else { return };
        test(&world, order);
    }
}

#[test]
fn a_later_edit_brings_back_what_was_deleted() {
    both_orders(|world, order| {
        for (type_name, _, edit, ..) in edits() {
            world.run("phone", &["delete", type_name, "x", "--clock-offset", "-20s"]).ok();
            world.edit("tablet", type_name, "x", &edit, "20s").ok();
        }
        world.settle(&order);
        for (type_name, _, _, field, value) in edits() {
            for device in DEVICES {
                assert_eq!(world.fields(device, type_name, "x")[field], value, "{type_name} on {device}");
            }
            assert_eq!(world.export("phone", type_name), world.export("tablet", type_name));
        }
        assert_eq!(world.conflicts("phone"), Vec::<Value>::new());
    });
}

#[test]
fn an_edit_before_a_deletion_is_lost_and_reported() {
    both_orders(|world, order| {
        for (type_name, _, edit, ..) in edits() {
            world.run("phone", &["delete", type_name, "x", "--clock-offset", "20s"]).ok();
            world.edit("tablet", type_name, "x", &edit, "-20s").ok();
        }
        world.settle(&order);
        let conflicts = world.conflicts("phone");
        assert_eq!(conflicts, world.conflicts("tablet"));
        assert_eq!(conflicts.len(), edits().len());
        for conflict in &conflicts {
            assert_eq!(conflict["kind"], "lost_edit");
            let sides: Vec<&Value> =
                conflict["sides"].as_array().unwrap().iter().map(|side| &side["device"]).collect();
            assert_eq!(sides, ["phone", "tablet"], "{conflict}");
        }
        for (type_name, ..) in edits() {
            for device in DEVICES {
                world.run(device, &["get", type_name, "x"]).error("not_found", 7);
                assert_eq!(world.export(device, type_name), "");
                assert_eq!(world.run(device, &["list", type_name]).ok().out, "");
                let deleted = world.run(device, &["list", type_name, "--deleted"]).ok().lines();
                assert_eq!((deleted.len(), &deleted[0]["deleted"]), (1, &json!(true)), "{type_name}");
            }
        }
        // Whoever lost the edit brings some back; the others are confirmed as deleted.
        for (number, (type_name, ..)) in edits().into_iter().enumerate() {
            let keep = if number % 2 == 0 { "mine" } else { "theirs" };
            world.run("tablet", &["resolve", type_name, "x", "*", "--keep", keep]).ok();
        }
        world.settle(&order);
        for device in DEVICES {
            assert_eq!(world.conflicts(device), Vec::<Value>::new(), "{device}");
        }
        for (number, (type_name, _, _, field, value)) in edits().into_iter().enumerate() {
            for device in DEVICES {
                if number % 2 == 0 {
                    assert_eq!(world.fields(device, type_name, "x")[field], value, "{type_name} on {device}");
                } else {
                    world.run(device, &["get", type_name, "x"]).error("not_found", 7);
                }
            }
        }
    });
}

#[test]
fn deletions_of_both_and_new_beginnings_agree() {
    both_orders(|world, order| {
        // Both delete: nothing is lost, nothing is reported.
        for device in DEVICES {
            world.run(device, &["delete", "note", "x"]).ok();
        }
        // One deletes and creates anew, the other edits what was.
        world.run("phone", &["delete", "space", "x", "--clock-offset", "-30s"]).ok();
        world.set("phone", &["space", "x", "visits+=5", "--clock-offset", "-20s"]);
        world.set("tablet", &["space", "x", "visits+=7", "--clock-offset", "20s"]);
        world.settle(&order);
        assert_eq!(world.conflicts("phone"), Vec::<Value>::new());
        assert_eq!(world.export("phone", "note"), "");
        let expected = world.export("phone", "space");
        assert_eq!(expected, world.export("tablet", "space"));
        assert_eq!(world.fields("phone", "space", "x")["visits"], 13);
        // What both had deleted, one creates again.
        world.set("tablet", &["note", "x", "tags+=again"]);
        world.settle(&order);
        for device in DEVICES {
            assert_eq!(world.fields(device, "note", "x")["tags"], json!(["again"]), "{device}");
        }
        // Deleted and sent, then edited by someone who knows nothing of it, long ago.
        world.run("phone", &["delete", "note", "x"]).ok();
        world.sync("phone");
        world.edit("tablet", "note", "x", &json!({"add": {"tags": ["old"]}}), "-40s").ok();
        world.settle(&order);
        assert_eq!(world.export("phone", "note"), world.export("tablet", "note"));
    });
}
