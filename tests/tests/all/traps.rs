//! The traps that were proved, each once: what a plain document would do wrong here.
//!
//! Every edit and every meeting in these stories is also held to the model.

use anabranch_core::admission::{INCREMENT_MAX, Judge, RefusalCode};
use anabranch_core::change::{Change, Role};
use anabranch_core::clock::Hlc;
use anabranch_core::entity::{ConflictKind, EditError, Entity, Row};
use anabranch_core::intent::Intent;
use anabranch_tests::world::{START_MS, World, fields};
use automerge::transaction::Transactable;
use automerge::{ObjType, ROOT, ReadDoc, ScalarValue};
use serde_json::{Value as Json, json};

const ANN: usize = 0;
const BEN: usize = 1;
const CAT: usize = 2;

fn set(field: &str, value: Json) -> Intent {
    Intent::Set { field: field.into(), value }
}

fn add(field: &str, element: &str) -> Intent {
    Intent::Add { field: field.into(), element: json!(element) }
}

fn remove(field: &str, element: &str) -> Intent {
    Intent::Remove { field: field.into(), element: json!(element) }
}

fn more(field: &str, by: i64) -> Intent {
    Intent::Increment { field: field.into(), by }
}

fn put(field: &str, key: &str, value: Json) -> Intent {
    Intent::Put { field: field.into(), key: key.into(), value }
}

fn splice(at: usize, delete: usize, insert: &str) -> Intent {
    Intent::Splice { field: "body".into(), at, delete, insert: insert.into() }
}

fn insert(at: Option<usize>, items: &[i64]) -> Intent {
    Intent::Insert { field: "items".into(), at, items: items.iter().map(|n| json!(n)).collect() }
}

fn resolve(field: &str, value: Json) -> Intent {
    Intent::Resolve { field: field.into(), value }
}

fn values(row: &Row, conflict: &str) -> Vec<Json> {
    let conflict = row.conflicts.iter().find(|c| c.field == conflict).expect("a conflict");
    conflict.sides.iter().map(|side| side.value.clone()).collect()
}

// ── Registers ─────────────────────────────────────────────────────────────────────────────

#[test]
fn putting_an_unchanged_value_makes_no_change() {
    let mut world = World::of(&fields("title = { type = \"string\" }"), 2);
    world.edit(ANN, &[set("title", json!("a"))]);
    assert_eq!(world.try_edit(ANN, None, &[set("title", json!("a"))]).unwrap(), None);
    // Nor does it take part in anything later: Ben's word stands though Ann repeated hers.
    world.exchange(ANN, BEN);
    world.edit(BEN, &[set("title", json!("b"))]);
    assert_eq!(world.try_edit(ANN, None, &[set("title", json!("a"))]).unwrap(), None);
    world.settle(1);
    assert_eq!(world.row(ANN).fields["title"], "b");
}

#[test]
fn a_resolution_with_the_winner_is_newer_than_what_it_settles() {
    let mut world = World::of(&fields("ask = { type = \"string\", merge = \"manual\" }"), 3);
    world.edit(ANN, &[set("ask", json!("x"))]);
    world.edit(BEN, &[set("ask", json!("y"))]);
    world.edit(CAT, &[set("ask", json!("z"))]);
    world.exchange(ANN, BEN);
    assert_eq!(world.row(ANN).fields["ask"], "y", "the newest shows meanwhile");
    let resolution = world.edit(ANN, &[resolve("ask", json!("y"))]);
    assert!(world.row(ANN).conflicts.is_empty());
    // Cat's word came before the resolution, and after what it settles.
    world.settle(1);
    assert_eq!(values(&world.row(CAT), "ask"), [json!("y"), json!("z")]);
    assert_eq!(world.row(CAT).conflicts[0].sides[0].time, world.log.edit(resolution).time);
    world.edit(CAT, &[resolve("ask", json!("z"))]);
    world.settle(2);
    assert!(world.row(ANN).conflicts.is_empty());
}

#[test]
fn a_cleared_field_is_a_value_and_not_a_gap() {
    let mut world = World::of(
        &fields("title = { type = \"string\" }\nask = { type = \"string\", merge = \"manual\" }"),
        2,
    );
    world.edit(ANN, &[set("title", json!("a")), set("ask", json!("a"))]);
    world.exchange(ANN, BEN);
    world.edit(BEN, &[set("title", json!("b")), set("ask", json!("b"))]);
    world.edit(ANN, &[set("title", Json::Null), set("ask", Json::Null)]);
    world.settle(1);
    assert_eq!(world.row(BEN).fields["title"], Json::Null, "the later clearing wins");
    assert_eq!(values(&world.row(BEN), "ask"), [Json::Null, json!("b")]);
    assert_eq!(world.row(BEN).conflicts[0].base, Some(json!("a")));
}

#[test]
fn a_delete_alone_is_refused_because_it_leaves_no_trace() {
    let mut world =
        World::of(&fields("title = { type = \"string\" }\ndays = { type = \"map\", of = \"int\" }"), 1);
    world.edit(ANN, &[set("title", json!("a")), put("days", "mon", json!(1))]);
    let bare = world.forge(ANN, |tx| tx.delete(ROOT, "title").unwrap());
    assert_eq!(world.submit(ANN, bare).unwrap_err().code, RefusalCode::BadShape);
    let bare = world.forge(ANN, |tx| {
        let (_, days) = tx.get(ROOT, "days").unwrap().unwrap();
        tx.delete(&days, "mon").unwrap();
    });
    assert_eq!(world.submit(ANN, bare).unwrap_err().code, RefusalCode::BadShape);
}

#[test]
fn equal_values_are_one_candidate() {
    let mut world = World::of(&fields("ask = { type = \"string\", merge = \"manual\" }"), 3);
    world.edit(ANN, &[set("ask", json!("x"))]);
    world.edit(BEN, &[set("ask", json!("x"))]);
    world.settle(1);
    assert!(world.row(ANN).conflicts.is_empty(), "importing a file twice is no conflict");
    world.edit(CAT, &[set("ask", json!("y"))]);
    world.settle(2);
    assert!(world.row(ANN).conflicts.is_empty(), "nor is an edit after the other");
}

#[test]
fn a_side_names_everyone_who_wrote_its_value_once() {
    let mut world = World::of(&fields("ask = { type = \"string\", merge = \"manual\" }"), 3);
    world.edit(ANN, &[set("ask", json!("old"))]);
    world.settle(1);
    // Ann saves a form twice, so her value stands there twice; then Ben writes it too.
    let form = world.devices[ANN].entity.heads();
    for _ in 0..2 {
        world.wall_ms += 1_000;
        world.try_edit(ANN, Some(&form), &[set("ask", json!("x"))]).unwrap().unwrap();
    }
    world.edit(BEN, &[set("ask", json!("x"))]);
    world.edit(CAT, &[set("ask", json!("y"))]);
    world.settle(2);
    let row = world.row(CAT);
    let sides: Vec<_> =
        row.conflicts[0].sides.iter().map(|side| (&side.value, side.device, &side.others[..])).collect();
    let device = |place: usize| world.devices[place].author.device;
    assert_eq!(sides, [(&json!("y"), device(CAT), &[][..]), (&json!("x"), device(BEN), &[device(ANN)])]);
}

#[test]
fn the_first_value_stands_though_it_is_written_again_later() {
    let mut world = World::of(&fields("first = { type = \"string\", merge = \"first_write\" }"), 3);
    world.edit(ANN, &[set("first", json!("a"))]);
    world.edit(BEN, &[set("first", json!("b"))]);
    world.edit(CAT, &[set("first", json!("a"))]);
    world.settle(1);
    assert_eq!(world.row(BEN).fields["first"], "a");
    let overwrite = world.try_edit(BEN, None, &[set("first", json!("c"))]);
    assert!(matches!(overwrite, Err(EditError::Validation(_))), "{overwrite:?}");
    let disguised = world.try_edit(BEN, None, &[resolve("first", json!("c"))]);
    assert!(matches!(disguised, Err(EditError::Validation(_))), "{disguised:?}");
}

#[test]
fn later_intents_of_one_edit_build_on_earlier_ones() {
    let ty = fields(
        r#"title = { type = "string" }
        best = { type = "int", merge = "max" }
        tags = { type = "set", of = "string" }
        days = { type = "map", of = "int" }"#,
    );
    let mut world = World::of(&ty, 2);
    world.edit(ANN, &[set("title", json!("a")), set("title", Json::Null)]);
    assert_eq!(world.row(ANN).fields["title"], Json::Null);
    world.edit(ANN, &[set("best", json!(10)), set("best", json!(7))]);
    assert_eq!(world.row(ANN).fields["best"], 10);
    world.edit(ANN, &[add("tags", "x"), add("tags", "y"), remove("tags", "x")]);
    assert_eq!(world.row(ANN).fields["tags"], json!(["y"]));
    world.edit(
        ANN,
        &[put("days", "mon", json!(1)), put("days", "mon", Json::Null), put("days", "mon", json!(2))],
    );
    assert_eq!(world.row(ANN).fields["days"], json!({"mon": 2}));
    world.settle(1);
}

#[test]
fn a_tie_compares_milliseconds() {
    let mut world = World::of(&fields("name = { type = \"string\", tie = \"manual\" }"), 3);
    world.wall_ms += 5;
    world.try_edit(ANN, None, &[set("name", json!("a"))]).unwrap();
    // Ben's edit is the second of his millisecond.
    world.try_edit(BEN, None, &[set("name", json!("first"))]).unwrap();
    world.try_edit(BEN, None, &[set("name", json!("b"))]).unwrap();
    world.settle(1);
    assert_eq!(values(&world.row(CAT), "name"), [json!("b"), json!("a")]);
    assert_eq!(world.row(CAT).conflicts[0].kind, ConflictKind::Tie);
    world.edit(CAT, &[resolve("name", json!("a"))]);
    world.settle(2);
    // A millisecond apart nobody is asked.
    world.edit(ANN, &[set("name", json!("c"))]);
    world.wall_ms += 1;
    world.try_edit(BEN, None, &[set("name", json!("d"))]).unwrap();
    world.settle(3);
    assert!(world.row(CAT).conflicts.is_empty());
    assert_eq!(world.row(CAT).fields["name"], "d");
}

#[test]
fn nested_json_is_one_value() {
    let mut world = World::of(&fields("log = { type = \"json\", merge = \"manual\" }"), 2);
    world.edit(ANN, &[set("log", json!({"sets": [1, 2], "note": {"a": 1}}))]);
    world.exchange(ANN, BEN);
    world.edit(ANN, &[set("log", json!({"sets": [1, 2], "note": {"a": 2}}))]);
    world.edit(BEN, &[set("log", json!([]))]);
    world.settle(1);
    let both = [json!([]), json!({"sets": [1, 2], "note": {"a": 2}})];
    assert_eq!(values(&world.row(ANN), "log"), both, "the inner edit competes with the replacement");
}

#[test]
fn a_group_never_mixes_two_versions() {
    let ty = fields(
        "amount = { type = \"int\", merge = \"manual\", group = \"money\" }
        currency = { type = \"string\", merge = \"manual\", group = \"money\" }",
    );
    let mut world = World::of(&ty, 2);
    world.edit(ANN, &[set("amount", json!(100)), set("currency", json!("EUR"))]);
    world.exchange(ANN, BEN);
    world.edit(ANN, &[set("amount", json!(200))]);
    world.edit(BEN, &[set("currency", json!("JPY"))]);
    world.settle(1);
    let row = world.row(ANN);
    let sides = [json!({"amount": 100, "currency": "JPY"}), json!({"amount": 200, "currency": "EUR"})];
    assert_eq!(values(&row, "money"), sides);
    assert_eq!((&row.fields["amount"], &row.fields["currency"]), (&json!(100), &json!("JPY")));
    let blind = world.try_edit(ANN, None, &[set("amount", json!(1))]);
    assert!(matches!(blind, Err(EditError::Conflict { .. })), "{blind:?}");
    world.edit(ANN, &[resolve("money", json!({"amount": 200, "currency": "USD"}))]);
    world.settle(2);
    assert!(world.row(BEN).conflicts.is_empty());
}

#[test]
fn a_third_device_does_not_mask_the_servers_value() {
    let ty = fields("level = { type = \"string\", merge = \"server_wins\" }");
    let mut world = World::new(&ty, &[Role::Device, Role::Authority, Role::Device]);
    let server = BEN;
    world.edit(server, &[set("level", json!("server"))]);
    world.exchange(server, CAT);
    world.edit(CAT, &[set("level", json!("aware"))]);
    // Ann never saw the server's value, and is the last to write.
    world.edit(ANN, &[set("level", json!("unaware"))]);
    world.settle(1);
    assert_eq!(world.row(ANN).fields["level"], "aware");
    world.edit(server, &[set("level", json!("again"))]);
    world.edit(ANN, &[set("level", json!("unaware"))]);
    world.settle(2);
    assert_eq!(world.row(ANN).fields["level"], "again");
}

#[test]
fn a_device_cannot_write_the_servers_register() {
    let ty = fields(
        "level = { type = \"string\", merge = \"server_wins\" }\nonly = { type = \"string\", merge = \"server_only\" }",
    );
    let mut world = World::new(&ty, &[Role::Device, Role::Authority]);
    for (key, code) in [("level!", RefusalCode::Forbidden), ("only", RefusalCode::Forbidden)] {
        let forged = world.forge(ANN, |tx| tx.put(ROOT, key, "mine").unwrap());
        assert_eq!(world.submit(ANN, forged).unwrap_err().code, code, "{key}");
    }
    let local = world.try_edit(ANN, None, &[set("only", json!("mine"))]);
    assert!(matches!(local, Err(EditError::Validation(_))));
}

#[test]
fn nan_is_refused() {
    let mut world = World::of(&fields("kg = { type = \"float\" }"), 1);
    let forged = world.forge(ANN, |tx| tx.put(ROOT, "kg", ScalarValue::F64(f64::NAN)).unwrap());
    assert_eq!(world.submit(ANN, forged).unwrap_err().code, RefusalCode::BadShape);
}

// ── Containers ────────────────────────────────────────────────────────────────────────────

#[test]
fn two_devices_that_begin_the_same_containers_lose_nothing() {
    let ty = fields(
        r#"body = { type = "text" }
        items = { type = "list", of = "int" }
        tags = { type = "set", of = "string" }
        days = { type = "map", of = "int" }
        count = { type = "int", merge = "counter" }"#,
    );
    let mut world = World::of(&ty, 2);
    let begin = |n: i64, name: &str| {
        [
            splice(0, 0, name),
            insert(None, &[n, n + 1]),
            add("tags", name),
            put("days", name, json!(n)),
            more("count", n),
        ]
    };
    world.edit(ANN, &begin(10, "ab"));
    world.edit(BEN, &begin(20, "cd"));
    world.settle(1);
    let row = world.row(ANN);
    assert_eq!(row.fields["body"].as_str().unwrap().len(), 4);
    assert_eq!(row.fields["items"].as_array().unwrap().len(), 4);
    assert_eq!(row.fields["tags"], json!(["ab", "cd"]));
    assert_eq!(row.fields["days"], json!({"ab": 10, "cd": 20}));
    assert_eq!(row.fields["count"], 30, "two counters begun at one key would compete, not sum");
}

#[test]
fn increments_of_all_devices_sum() {
    let mut world = World::of(&fields("count = { type = \"int\", merge = \"counter\" }"), 3);
    world.edit(ANN, &[more("count", 5)]);
    world.exchange(ANN, BEN);
    world.edit(ANN, &[more("count", -2)]);
    world.edit(BEN, &[set("count", json!(8))]);
    world.edit(CAT, &[more("count", 100)]);
    world.settle(1);
    assert_eq!(world.row(ANN).fields["count"], 106, "setting 5 to 8 means adding 3");
}

#[test]
fn an_increment_is_bounded_so_that_no_sum_wraps() {
    let mut world = World::of(&fields("count = { type = \"int\", merge = \"counter\" }"), 1);
    world.edit(ANN, &[more("count", INCREMENT_MAX)]);
    let forged = world.forge(ANN, |tx| tx.increment(ROOT, "count", INCREMENT_MAX + 1).unwrap());
    assert_eq!(world.submit(ANN, forged).unwrap_err().code, RefusalCode::Validation);
    let forged = world.forge(ANN, |tx| tx.increment(ROOT, "count", i64::MIN).unwrap());
    assert_eq!(world.submit(ANN, forged).unwrap_err().code, RefusalCode::Validation);
}

#[test]
fn a_counter_is_never_put_or_deleted_under_increments() {
    let mut world = World::of(&fields("count = { type = \"int\", merge = \"counter\" }"), 1);
    world.edit(ANN, &[more("count", 5)]);
    let forged = [
        world.forge(ANN, |tx| tx.put(ROOT, "count", ScalarValue::counter(7)).unwrap()),
        world.forge(ANN, |tx| tx.delete(ROOT, "count").unwrap()),
        world.forge(ANN, |tx| tx.put(ROOT, "count", 7).unwrap()),
    ];
    for change in forged {
        assert_eq!(world.submit(ANN, change).unwrap_err().code, RefusalCode::BadShape);
    }
}

#[test]
fn an_element_added_again_survives_a_removal_that_had_not_seen_it() {
    let mut world = World::of(&fields("tags = { type = \"set\", of = \"string\" }"), 2);
    world.edit(ANN, &[add("tags", "x")]);
    world.exchange(ANN, BEN);
    world.edit(ANN, &[add("tags", "x")]);
    world.edit(BEN, &[remove("tags", "x")]);
    world.settle(1);
    assert_eq!(world.row(BEN).fields["tags"], json!(["x"]));
    world.edit(BEN, &[remove("tags", "x")]);
    world.settle(2);
    assert_eq!(world.row(ANN).fields["tags"], json!([]), "a removal that saw both adds holds");
}

/// Not in that of the text by which the document holds them.
#[test]
fn a_set_shows_in_the_order_of_its_values() {
    let ty =
        fields("words = { type = \"set\", of = \"string\" }\nnumbers = { type = \"set\", of = \"int\" }");
    let mut world = World::of(&ty, 2);
    let large = -(1_i64 << 53);
    let add = |field: &str, element: Json| Intent::Add { field: field.into(), element };
    world.edit(ANN, &[add("words", json!("a b")), add("numbers", json!(large)), add("numbers", json!(10))]);
    world.edit(BEN, &[add("words", json!("a")), add("numbers", json!(large - 1)), add("numbers", json!(9))]);
    world.settle(1);
    assert_eq!(world.row(BEN).fields["words"], json!(["a", "a b"]));
    assert_eq!(world.row(BEN).fields["numbers"], json!([large - 1, large, 9, 10]));
}

#[test]
fn a_removed_item_stays_removed_beside_concurrent_edits() {
    let mut world = World::of(&fields("items = { type = \"list\", of = \"int\" }"), 2);
    world.edit(ANN, &[insert(None, &[1, 2, 3])]);
    world.exchange(ANN, BEN);
    world.edit(ANN, &[Intent::RemoveItems { field: "items".into(), at: 1, count: 1 }]);
    world.edit(BEN, &[insert(Some(2), &[9])]);
    world.settle(1);
    assert_eq!(world.row(ANN).fields["items"], json!([1, 9, 3]));
    // Setting an item in place would bring a removed one back: nobody may.
    let forged = world.forge(ANN, |tx| {
        let (_, items) = tx.get(ROOT, "items").unwrap().unwrap();
        tx.put(&items, 0, 7).unwrap();
    });
    assert_eq!(world.submit(ANN, forged).unwrap_err().code, RefusalCode::BadShape);
}

#[test]
fn text_keeps_both_edits_and_counts_code_points() {
    let mut world = World::of(&fields("body = { type = \"text\" }"), 2);
    world.edit(ANN, &[splice(0, 0, "🌀é\u{301}z")]);
    world.exchange(ANN, BEN);
    world.edit(ANN, &[splice(1, 1, "A")]);
    world.edit(BEN, &[splice(4, 0, "B")]);
    world.settle(1);
    assert_eq!(world.row(ANN).fields["body"], "🌀A\u{301}zB");
}

#[test]
fn devices_create_no_objects() {
    let mut world =
        World::of(&fields("title = { type = \"string\" }\nitems = { type = \"list\", of = \"json\" }"), 1);
    world.edit(ANN, &[insert(None, &[1])]);
    let forged = [
        world.forge(ANN, |tx| drop(tx.put_object(ROOT, "title", ObjType::Map).unwrap())),
        world.forge(ANN, |tx| {
            let (_, items) = tx.get(ROOT, "items").unwrap().unwrap();
            drop(tx.insert_object(&items, 0, ObjType::Map).unwrap());
        }),
        world.forge(ANN, |tx| drop(tx.put_object(ROOT, "items", ObjType::List).unwrap())),
    ];
    for change in forged {
        assert_eq!(world.submit(ANN, change).unwrap_err().code, RefusalCode::BadShape);
    }
}

#[test]
fn a_maximum_is_never_lowered_or_cleared() {
    let ty = fields(
        "best = { type = \"int\", merge = \"max\" }\ntops = { type = \"map\", of = \"int\", merge = \"max\" }",
    );
    let mut world = World::of(&ty, 2);
    world.edit(ANN, &[set("best", json!(10)), put("tops", "a", json!(10))]);
    world.edit(BEN, &[set("best", json!(4)), put("tops", "a", json!(4))]);
    world.settle(1);
    assert_eq!(world.row(BEN).fields["best"], 10, "the later, smaller value loses");
    assert_eq!(world.row(BEN).fields["tops"], json!({"a": 10}));
    assert_eq!(world.try_edit(BEN, None, &[set("best", json!(9))]).unwrap(), None);
    for clearing in [set("best", Json::Null), put("tops", "a", Json::Null)] {
        assert!(matches!(world.try_edit(BEN, None, &[clearing]), Err(EditError::Validation(_))));
    }
}

#[test]
fn a_maximum_is_exact_where_floats_are_not() {
    let mut world = World::of(&fields("best = { type = \"int\", merge = \"max\" }"), 2);
    let large = (1_i64 << 53) + 1;
    world.edit(ANN, &[set("best", json!(large))]);
    world.edit(BEN, &[set("best", json!(large - 1))]);
    world.settle(1);
    assert_eq!(world.row(BEN).fields["best"], large);
}

// ── Deletion ──────────────────────────────────────────────────────────────────────────────

fn note() -> World {
    let ty = fields(
        "title = { type = \"string\" }\nbody = { type = \"text\" }
        count = { type = \"int\", merge = \"counter\" }\nitems = { type = \"list\", of = \"int\" }",
    );
    let mut world = World::of(&ty, 3);
    world.edit(ANN, &[set("title", json!("a"))]);
    world.meet_all();
    world
}

#[test]
fn every_kind_of_later_edit_revives() {
    for edit in [set("title", json!("b")), splice(0, 0, "x"), more("count", 1), insert(None, &[1])] {
        let mut world = note();
        world.edit(ANN, &[Intent::Delete]);
        world.edit(BEN, std::slice::from_ref(&edit));
        world.settle(1);
        assert!(!world.row(ANN).deleted, "{edit:?}");
        assert!(world.row(ANN).conflicts.is_empty());
    }
}

#[test]
fn an_edit_before_a_deletion_that_did_not_see_it_is_lost_but_reported() {
    let mut world = note();
    world.edit(BEN, &[more("count", 1)]);
    world.edit(ANN, &[Intent::Delete]);
    world.settle(1);
    let row = world.row(CAT);
    assert!(row.deleted);
    assert_eq!(row.conflicts[0].kind, ConflictKind::LostEdit);
    // Deleting again confirms it, everywhere.
    world.edit(CAT, &[Intent::Delete]);
    world.settle(2);
    assert!(world.row(ANN).deleted && world.row(ANN).conflicts.is_empty());
    assert!(matches!(world.try_edit(ANN, None, &[more("count", 1)]), Err(EditError::NotFound(_))));
    world.edit(ANN, &[Intent::Revive, more("count", 1)]);
    world.settle(3);
    assert!(!world.row(BEN).deleted);
    assert_eq!(world.row(BEN).fields["count"], 2);
}

#[test]
fn lost_edits_are_reported_the_same_whatever_came_first() {
    let mut world = note();
    world.wall_ms += 1_000;
    // Both at one moment; then Ann deletes, having seen neither.
    world.try_edit(CAT, None, &[more("count", 1)]).unwrap();
    world.try_edit(BEN, None, &[more("count", 1)]).unwrap();
    world.edit(ANN, &[Intent::Delete]);
    world.settle(1);
    assert_eq!(world.row(ANN).conflicts[0].sides.len(), 3);
}

#[test]
fn a_deletion_that_was_taken_back_is_no_lost_edit() {
    let mut world = note();
    world.edit(BEN, &[Intent::Delete]);
    world.edit(BEN, &[Intent::Revive]);
    world.edit(ANN, &[Intent::Delete]);
    world.settle(1);
    let row = world.row(CAT);
    assert!(row.deleted);
    assert_eq!(row.conflicts[0].sides.len(), 2, "the deletion and Ben's revival");
}

#[test]
fn who_deletes_too_stands_beside_the_deletion_unless_they_lost_an_edit() {
    let mut world = note();
    world.edit(CAT, &[more("count", 1)]);
    world.edit(BEN, &[Intent::Delete]);
    world.edit(ANN, &[Intent::Delete]);
    world.settle(1);
    let conflict = &world.row(CAT).conflicts[0];
    assert_eq!(conflict.sides.len(), 2, "the deletion and Cat's edit");
    assert_eq!(conflict.sides[0].others, [world.devices[BEN].author.device]);
    assert_eq!(conflict.sides[1].device, world.devices[CAT].author.device);
}

#[test]
fn both_deleting_is_no_conflict() {
    let mut world = note();
    world.edit(ANN, &[Intent::Delete]);
    world.edit(BEN, &[Intent::Delete]);
    world.settle(1);
    assert!(world.row(CAT).deleted && world.row(CAT).conflicts.is_empty());
}

#[test]
fn reference_data_is_deleted_and_brought_back_by_authorities_alone() {
    let source =
        "[thing]\nversion = 1\nmerge = \"server_only\"\n[thing.fields]\nname = { type = \"string\" }\n";
    let ty = anabranch_tests::world::schema(source).types["thing"].clone();
    let mut world = World::new(&ty, &[Role::Device, Role::Authority]);
    let server = BEN;
    world.edit(server, &[set("name", json!("a"))]);
    world.exchange(ANN, server);
    for forbidden in [Intent::Delete, Intent::Revive, set("name", json!("b"))] {
        assert!(matches!(world.try_edit(ANN, None, &[forbidden]), Err(EditError::Validation(_))));
    }
    world.edit(server, &[Intent::Delete]);
    world.exchange(ANN, server);
    assert!(matches!(world.try_edit(ANN, None, &[Intent::Revive]), Err(EditError::Validation(_))));
    world.edit(server, &[Intent::Revive]);
    world.settle(1);
}

// ── Versions and actors ───────────────────────────────────────────────────────────────────

#[test]
fn a_form_opened_before_a_remote_change_does_not_overwrite_it_unseen() {
    let mut world = World::of(&fields("ask = { type = \"string\", merge = \"manual\" }"), 2);
    world.edit(ANN, &[set("ask", json!("old"))]);
    world.exchange(ANN, BEN);
    let form = world.devices[ANN].entity.heads();
    world.edit(BEN, &[set("ask", json!("remote"))]);
    world.exchange(ANN, BEN);
    world.wall_ms += 1_000;
    world.try_edit(ANN, Some(&form), &[set("ask", json!("form"))]).unwrap().unwrap();
    world.settle(1);
    assert_eq!(values(&world.row(BEN), "ask"), [json!("form"), json!("remote")]);
    let blind = world.try_edit(ANN, None, &[set("ask", json!("again"))]);
    assert!(matches!(blind, Err(EditError::Conflict { .. })), "{blind:?}");
}

#[test]
fn edits_of_older_versions_have_derived_actors_that_pass_admission() {
    let mut world = World::of(&fields("body = { type = \"text\" }"), 2);
    world.edit(ANN, &[splice(0, 0, "a")]);
    let form = world.devices[ANN].entity.heads();
    world.edit(ANN, &[splice(1, 0, "b")]);
    for letter in ["c", "d", "e"] {
        world.wall_ms += 1;
        let id = world.try_edit(ANN, Some(&form), &[splice(1, 0, letter)]).unwrap().unwrap();
        assert_eq!(world.change(id).actor().to_bytes().len(), 4 + 1 + 16);
    }
    world.settle(1);
}

#[test]
fn an_edit_of_an_older_version_names_its_actors_previous_change() {
    let mut world = World::of(&fields("body = { type = \"text\" }"), 2);
    world.edit(ANN, &[splice(0, 0, "a")]);
    let first = world.devices[ANN].entity.heads();
    world.edit(ANN, &[splice(1, 0, "b")]);
    world.wall_ms += 1;
    // By a derived actor; then a common edit hides it from the heads.
    world.try_edit(ANN, Some(&first), &[splice(1, 0, "c")]).unwrap().unwrap();
    world.edit(ANN, &[splice(0, 0, "d")]);
    let later = world.devices[ANN].entity.heads();
    world.edit(ANN, &[splice(0, 0, "e")]);
    world.wall_ms += 1;
    world.try_edit(ANN, Some(&later), &[splice(0, 0, "f")]).unwrap().unwrap();
    world.settle(1);
}

#[test]
fn two_histories_of_one_actor_are_told_apart() {
    let mut world = World::of(&fields("title = { type = \"string\" }"), 3);
    // Ben's store is a copy of Ann's: he writes as her.
    world.devices[BEN].author = world.devices[ANN].author;
    world.edit(ANN, &[set("title", json!("ann"))]);
    let clone = world.forge(BEN, |tx| tx.put(ROOT, "title", "ben").unwrap());
    assert_eq!(world.submit(BEN, clone.clone()).unwrap_err().code, RefusalCode::BadSequence);
    world.meet(ANN, CAT, 1, 1);
    let ty = world.ty.clone();
    let received = world.devices[CAT].entity.receive(vec![clone], Some(&ty), Judge::Admitted, true);
    assert_eq!(received.refused[0].1.code, RefusalCode::BadSequence);
    world.check(CAT);
    world.check_saved(&world.devices[CAT].entity);
}

#[test]
fn an_actor_of_another_entity_is_forged() {
    let mut world = World::of(&fields("title = { type = \"string\" }"), 2);
    let change = world.edit(ANN, &[set("title", json!("a"))]);
    let other = anabranch_core::id::EntityKey::new("thing", "other").unwrap();
    let mut entity = Entity::new(&world.workspace, &other, Some(&world.ty));
    let received = entity.receive(vec![world.change(change).clone()], Some(&world.ty), Judge::Admitted, true);
    assert_eq!(received.refused[0].1.code, RefusalCode::ForgedActor);
}

// ── Time ──────────────────────────────────────────────────────────────────────────────────

#[test]
fn a_negative_time_is_refused_before_anything_reads_it() {
    let world = World::of(&fields("title = { type = \"string\" }"), 1);
    let change = world.forge(ANN, |tx| tx.put(ROOT, "title", "a").unwrap());
    let mut expanded = change.expand().unwrap();
    expanded.time = -1;
    let raw = automerge::Change::from(expanded);
    assert!(Change::parse(raw.raw_bytes()).is_err());
    assert_eq!(Hlc::from_change_time(-1), None);
    assert_eq!(Hlc::from_change_time(i64::MIN), None);
}

#[test]
fn a_clock_a_year_ahead_wins_no_more_than_its_turn() {
    let mut world = World::of(&fields("title = { type = \"string\" }"), 2);
    world.devices[ANN].offset_ms = 31_536_000_000;
    world.edit(BEN, &[set("title", json!("ben"))]);
    world.edit(ANN, &[set("title", json!("ann"))]);
    world.exchange(ANN, BEN);
    assert_eq!(world.row(BEN).fields["title"], "ann");
    let id = world.edit(BEN, &[set("title", json!("ben again"))]);
    assert!(world.log.edit(id).time.wall().0 > START_MS + 31_000_000_000, "later than all that Ben saw");
    world.settle(1);
    assert_eq!(world.row(ANN).fields["title"], "ben again");
}

#[test]
fn a_damaged_change_is_no_change() {
    let mut world = World::of(&fields("title = { type = \"string\" }"), 1);
    let id = world.edit(ANN, &[set("title", json!("abcdef"))]);
    let bytes = world.change(id).bytes().to_vec();
    for place in 0..bytes.len() {
        let mut damaged = bytes.clone();
        damaged[place] ^= 0x10;
        if let Ok(change) = Change::parse(&damaged) {
            assert_ne!(change.hash(), world.change(id).hash(), "byte {place}");
            assert!(world.submit(ANN, change).is_err(), "byte {place}");
        }
    }
}
