//! Changes that are made or offered again, because what they built on was refused or the relay lost them.

// In a test a panic is the report.
#![allow(clippy::unwrap_used)]

#[path = "support/phone.rs"]
mod phone;
// Not every helper is needed here.
#[allow(dead_code)]
mod support;

use std::sync::Arc;

use anabranch_core::admission::RefusalCode;
use anabranch_core::change::{Change, Note};
use anabranch_core::clock::Hlc;
use anabranch_core::genesis::GenesisKind;
use anabranch_core::id::{EntityHash, Incarnation};
use anabranch_core::intent::Intent;
use anabranch_core::relay::{Input, RelayConfig};
use anabranch_core::replica::{self, Edit, Held};
use anabranch_core::store::{Batch, Keyspace, Store, View};
use anabranch_core::wire::*;
use phone::*;
use serde_json::json;
use support::*;

/// One field more than the relay's.
fn newer() -> String {
    SCHEMA.replacen(
        "version = 1\n[note.fields]",
        "version = 2\n[note.fields]\nmore = { type = \"string\" }",
        1,
    )
}

/// Goes on until a phone sends changes, which are to be answered by hand.
fn asked(phone: &mut Phone, world: &mut World) -> Changes {
    for _ in 0..100 {
        phone.replica.durable(phone.store.flush()).unwrap();
        while let Some(output) = phone.replica.poll_output() {
            let replica::Output::Send(bytes) = output else { continue };
            if let Ok(Some(Message::Changes(changes))) = Message::decode(&bytes) {
                return changes;
            }
            world.handle(Input::Received { conn: phone.conn, bytes });
        }
        let told = world.settle(phone.conn);
        for message in told.into_iter().filter(|message| !matches!(message, Message::Welcome(_))) {
            phone.hear(world, message);
        }
    }
    panic!("it sends no changes");
}

/// An answer that refuses the first change of each entity that is named.
fn refusing(asked: &Changes, refusals: &[(&str, RefusalCode)]) -> Ack {
    let refused = refusals.iter().map(|(id, code)| {
        let part = asked.unit.entities.iter().find(|part| part.id == *id).unwrap();
        Refused {
            type_name: part.type_name.clone(),
            id: part.id.clone(),
            hash: Change::parse(&part.changes[0]).unwrap().hash().0,
            code: *code as u16,
            message: "no".into(),
        }
    });
    Ack { channel: 1, unit_id: asked.unit_id, seq: 0, refused: refused.collect() }
}

/// Signs in over a new link, by which the relay's clock is found to be so far ahead.
fn sign_in(phone: &mut Phone, world: &mut World, role: &str, ahead_ms: i64) {
    phone.conn = world.greet(&phone.device);
    phone.replica.disconnect();
    phone.replica.relay_clock_is(world.now, ahead_ms);
    phone.replica.connect(1, Some(token(role)));
}

/// Signs in and sends changes, which are to be answered by hand.
fn offers(phone: &mut Phone, world: &mut World, role: &str) -> Changes {
    sign_in(phone, world, role, 0);
    asked(phone, world)
}

/// Of which entities the user is told that an edit was refused or is lost.
fn told(phone: &Phone) -> Vec<String> {
    let refused = phone.rows().refused().unwrap();
    let mut told: Vec<_> = refused.into_iter().map(|(_, record)| record.id).collect();
    told.sort();
    told
}

fn change_of(changes: &Changes, id: &str, place: usize) -> Change {
    let part = changes.unit.entities.iter().find(|part| part.id == id).unwrap();
    Change::parse(&part.changes[place]).unwrap()
}

/// The same edit as another change.
fn made_again(of: &Change) -> Draft {
    let note = Note { tx: of.note().tx, origin: Some(of.origin()), ..Note::default() };
    Draft { note, ..Draft::default() }
}

/// Another life of a device's store.
fn other_life(number: u8, incarnation: Incarnation) -> Device {
    let mut life = Device::new(number);
    life.author.incarnation = incarnation;
    life
}

/// What is dated anew lies where it lay among the edits of its device, whatever has become of the clock.
#[test]
fn an_edit_that_is_made_again_does_not_overtake_a_later_one() {
    for set_back_ms in [0, 120_000] {
        let mut world = World::with_schema();
        let mut phone = Phone::new(1, &newer());
        phone.join(&mut world, "writer");
        phone.write(&world, &[edit("n1", vec![set("title", json!("base"))])]).unwrap();
        phone.talk(&mut world);
        let read = replica::parse_version(&phone.row("n1").unwrap().version).unwrap();
        for (field, value) in [("more", "refused"), ("title", "first")] {
            world.pass(10);
            phone.write(&world, &[edit("n1", vec![set(field, json!(value))])]).unwrap();
        }
        world.pass(10);
        // Of a form that was opened before the others were written.
        let second = Edit { based_on: Some(read), ..edit("n1", vec![set("title", json!("second"))]) };
        phone.write(&world, &[second]).unwrap();
        phone.store.flush();
        assert_eq!(phone.row("n1").unwrap().fields["title"], json!("second"));
        asked(&mut phone, &mut world);
        world.pass(10);
        sign_in(&mut phone, &mut world, "writer", set_back_ms);
        phone.talk(&mut world);
        let status = phone.replica.status();
        assert_eq!((status.pending, phone.rows().refused().unwrap().len()), (0, 1));
        assert_eq!(phone.row("n1").unwrap().fields["title"], json!("second"));
        // And what it says next comes after all of that.
        phone.write(&world, &[edit("n1", vec![set("title", json!("third"))])]).unwrap();
        phone.talk(&mut world);
        assert_eq!(phone.row("n1").unwrap().fields["title"], json!("third"));
    }
}

/// The clock is set while an answer is under way. What was sent had been dated by a clock that was measured, so
/// what is made of it later is not dated by what is measured then.
#[test]
fn an_edit_that_was_sent_once_keeps_its_date_though_the_clock_is_set() {
    for (refused, before_ms, after_ms) in [(0, 0, 120_000), (1, 120_000, 0)] {
        let mut world = World::with_schema();
        let mut phone = Phone::new(1, SCHEMA);
        sign_in(&mut phone, &mut world, "writer", before_ms);
        phone.talk(&mut world);
        phone.write(&world, &[edit("n1", vec![set("title", json!("base"))])]).unwrap();
        phone.talk(&mut world);
        let read = replica::parse_version(&phone.row("n1").unwrap().version).unwrap();
        for value in ["first", "second"] {
            world.pass(10);
            let edit = edit("n1", vec![set("title", json!(value))]);
            phone.write(&world, &[Edit { based_on: Some(read.clone()), ..edit }]).unwrap();
        }
        let changes = asked(&mut phone, &mut world);
        let sent = &changes.unit.entities[0].changes;
        assert_eq!(sent.len(), 2);
        let mut ack = refusing(&changes, &[("n1", RefusalCode::BadSequence)]);
        ack.refused[0].hash = Change::parse(&sent[refused]).unwrap().hash().0;
        world.now.wall.0 = world.now.wall.0 + before_ms as u64 - after_ms as u64;
        phone.hear(&world, ack);
        world.pass(10);
        sign_in(&mut phone, &mut world, "writer", after_ms);
        asked(&mut phone, &mut world);
        assert_eq!(phone.row("n1").unwrap().fields["title"], json!("second"), "{after_ms}");
    }
}

/// The relay has lost everything, and an admin has given it this schema.
fn lose_all(world: &mut World, source: &str) {
    world.store = Arc::default();
    world.crash(RelayConfig::default());
    give_schema(world, source);
}

fn give_schema(world: &mut World, source: &str) {
    let admin = world.join(&Device::new(99), "admin");
    world.send(admin, PushSchema { channel: 1, source: source.into() });
    world.settle(admin);
}

/// An empty relay gets a schema that lacks a field. What its author is told, the others are told too.
#[test]
fn what_is_refused_for_good_when_it_comes_back_goes_everywhere() {
    let mut world = World::strict();
    let mut author = Phone::new(1, &newer());
    let mut authority = Phone::new(2, &newer());
    let mut third = Phone::new(3, &newer());
    authority.join(&mut world, "authority");
    author.join(&mut world, "writer");
    author.write(&world, &[edit("n1", vec![set("more", json!("x"))])]).unwrap();
    author.talk(&mut world);
    authority.talk(&mut world);
    third.join(&mut world, "writer");
    assert!(authority.row("n1").is_some() && third.row("n1").is_some());

    lose_all(&mut world, SCHEMA);
    authority.join(&mut world, "authority");
    assert!(matches!(authority.replica.held().unwrap(), Some(Held::MissingAtRelay { .. })));
    author.join(&mut world, "writer");
    let refused = author.rows().refused().unwrap();
    assert_eq!(refused.len(), 1);
    authority.talk(&mut world);
    third.join(&mut world, "writer");
    for phone in [&author, &authority, &third] {
        assert_eq!((phone.row("n1"), phone.replica.held().unwrap()), (None, None));
        assert_eq!(phone.replica.status().pending, 0);
    }
}

/// To wait for what a change builds on is not to make it again, of which there is an end.
#[test]
fn an_edit_may_wait_for_others_as_often_as_it_must() {
    let mut world = World::with_schema();
    let mut phone = Phone::new(1, SCHEMA);
    phone.join(&mut world, "writer");
    phone.write(&world, &[edit("n1", vec![set("title", json!("base"))])]).unwrap();
    phone.talk(&mut world);
    let mut other = Device::new(2);
    let conn = world.join(&other, "writer");
    phone.talk(&mut world);
    phone.write(&world, &[edit("n1", vec![set("title", json!("mine"))])]).unwrap();
    for _ in 0..10 {
        let ack = refusing(&asked(&mut phone, &mut world), &[("n1", RefusalCode::MissingDependency)]);
        phone.hear(&world, ack);
        let change = other.write("n1", Draft { increments: Some("stars"), ..Draft::default() });
        let genesis = vec![("stars".into(), GenesisKind::Counter.code())];
        let part = EntityChanges { genesis, ..of("n1", &[&change]) };
        assert_eq!(world.submit(conn, unit([part])).refused, []);
        for message in world.settle(phone.conn) {
            phone.hear(&world, message);
        }
    }
    let ack = refusing(&asked(&mut phone, &mut world), &[("n1", RefusalCode::ClockAhead)]);
    phone.hear(&world, ack);
    assert_eq!((phone.replica.status().pending, phone.rows().refused().unwrap().len()), (1, 0));
}

/// An authority brings back a transaction that the relay lost, and is none any more when it is answered: one half
/// alone would be refused for good.
#[test]
fn what_one_may_not_offer_any_more_goes_with_its_transaction() {
    for first in [RefusalCode::MissingDependency, RefusalCode::ForgedAuthor] {
        let mut world = World::strict();
        let mut authority = Phone::new(1, SCHEMA);
        authority.join(&mut world, "authority");
        let mut author = Device::new(2);
        let conn = world.join(&author, "writer");
        let parts = ["c", "d"].map(|id| of(id, &[&author.write(id, in_tx(7, 2))]));
        assert_eq!(world.submit(conn, unit(parts)).refused, []);
        authority.talk(&mut world);

        lose_all(&mut world, SCHEMA);
        authority.conn = world.greet(&authority.device);
        authority.replica.disconnect();
        authority.replica.connect(1, Some(token("authority")));
        let changes = asked(&mut authority, &mut world);
        assert_eq!(changes.unit.entities.len(), 2);
        let halves = [("c", first), ("d", RefusalCode::ForgedAuthor)];
        authority.hear(&world, refusing(&changes, &halves));
        let status = authority.replica.status();
        assert_eq!((status.pending, status.lacking), (0, 2));
        assert_eq!(authority.rows().refused().unwrap(), []);
        for id in ["c", "d"] {
            assert!(authority.row(id).is_some(), "{id} is kept");
        }
    }
}

/// Only what names the field is refused, and that may pass, so what builds on it is not refused for good.
#[test]
fn what_builds_on_a_field_that_the_relay_lacks_waits_with_it() {
    let mut world = World::strict();
    let mut author = Phone::new(1, &newer());
    let mut authority = Phone::new(2, &newer());
    authority.join(&mut world, "authority");
    author.join(&mut world, "writer");
    author.write(&world, &[edit("n1", vec![set("more", json!("x"))])]).unwrap();
    author.talk(&mut world);
    authority.talk(&mut world);
    authority.write(&world, &[edit("n1", vec![set("title", json!("mine"))])]).unwrap();
    authority.talk(&mut world);
    assert_eq!(authority.replica.status().pending, 0);

    lose_all(&mut world, SCHEMA);
    authority.join(&mut world, "authority");
    assert_eq!(authority.rows().refused().unwrap(), []);
    give_schema(&mut world, &newer());
    authority.join(&mut world, "authority");
    let fields = authority.row("n1").unwrap().fields;
    assert_eq!((&fields["more"], &fields["title"]), (&json!("x"), &json!("mine")));
    assert_eq!(authority.replica.status().pending, 0);
}

/// Nor is what was not sent yet, whatever keeps the relay from taking what it builds on.
#[test]
fn a_new_edit_waits_for_what_it_builds_on_and_what_the_relay_does_not_take_now() {
    for (schema, role) in [(SCHEMA.to_owned(), "admin"), (newer(), "writer")] {
        let mut world = World::strict();
        let mut author = Phone::new(1, &newer());
        let mut other = Phone::new(2, &newer());
        other.join(&mut world, "admin");
        author.join(&mut world, "writer");
        author.write(&world, &[edit("n1", vec![set("more", json!("x"))])]).unwrap();
        author.talk(&mut world);
        other.talk(&mut world);

        lose_all(&mut world, &schema);
        // It has put what is lost into its outbox, and both are marked as sent, but it hears no answer.
        let mine = edit("n1", vec![set("title", json!("mine"))]);
        for edits in [&[][..], &[mine]] {
            other.conn = world.greet(&other.device);
            other.replica.disconnect();
            other.write(&world, edits).unwrap();
            other.replica.connect(1, Some(token("admin")));
            asked(&mut other, &mut world);
        }
        other.join(&mut world, role);
        assert_eq!(other.rows().refused().unwrap(), [], "{role}");
        assert!(matches!(other.replica.held().unwrap(), Some(Held::MissingAtRelay { .. })), "{role}");

        give_schema(&mut world, &newer());
        author.join(&mut world, "writer");
        other.join(&mut world, role);
        author.talk(&mut world);
        for phone in [&author, &other] {
            let fields = phone.row("n1").unwrap().fields;
            assert_eq!((&fields["more"], &fields["title"]), (&json!("x"), &json!("mine")), "{role}");
            assert_eq!((phone.replica.status().pending, phone.replica.held().unwrap()), (0, None));
        }
    }
}

/// Titles are shorter than they were.
const NARROW: &str = r#"
[note]
version = 1
[note.fields]
title = { type = "string", max_bytes = 3 }
stars = { type = "int", merge = "counter" }
"#;

/// What is refused for good takes with it what builds on it, and that the rest of its transaction.
#[test]
fn what_is_refused_for_good_when_it_comes_back_leaves_no_half_of_a_transaction() {
    for (field, source) in [("more", SCHEMA), ("title", NARROW)] {
        let mut world = World::strict();
        let mut first = Phone::new(1, &newer());
        let mut second = Phone::new(2, &newer());
        let mut third = Phone::new(3, &newer());
        Phone::new(4, &newer()).join(&mut world, "authority");
        first.join(&mut world, "writer");
        second.join(&mut world, "writer");
        first.write(&world, &[edit("n1", vec![set(field, json!("long"))])]).unwrap();
        first.talk(&mut world);
        second.talk(&mut world);
        let both = ["n1", "n2"].map(|id| edit(id, vec![set("title", json!("b"))]));
        second.write(&world, &both).unwrap();
        second.talk(&mut world);
        first.talk(&mut world);
        third.join(&mut world, "writer");
        assert!(first.row("n2").is_some() && third.row("n2").is_some());

        lose_all(&mut world, source);
        for _ in 0..2 {
            for phone in [&mut first, &mut second, &mut third] {
                phone.join(&mut world, "writer");
            }
        }
        for phone in [&first, &second, &third] {
            assert_eq!((phone.row("n1"), phone.row("n2")), (None, None), "{field}");
            assert_eq!((phone.replica.status().lacking, phone.replica.held().unwrap()), (0, None));
        }
        // Whoever wrote what is gone is told.
        assert_eq!(first.rows().refused().unwrap().len(), 1);
        assert_eq!(second.rows().refused().unwrap().len(), 2);
        assert_eq!(third.rows().refused().unwrap(), []);
    }
}

/// Somebody else has brought it back, and the author, who hears of that first, has nothing under way.
#[test]
fn an_author_is_told_of_a_refusal_of_what_another_brought_back() {
    let mut world = World::strict();
    let mut author = Phone::new(1, SCHEMA);
    let mut authority = Phone::new(2, SCHEMA);
    authority.join(&mut world, "authority");
    author.join(&mut world, "writer");
    author.write(&world, &[edit("n1", vec![set("title", json!("long title"))])]).unwrap();
    author.talk(&mut world);
    authority.talk(&mut world);
    lose_all(&mut world, NARROW);
    authority.join(&mut world, "authority");
    assert_eq!((authority.row("n1"), authority.rows().refused().unwrap()), (None, vec![]));
    author.join(&mut world, "writer");
    assert_eq!(author.row("n1"), None);
    let refused = author.rows().refused().unwrap();
    assert_eq!(refused.len(), 1);
    assert_eq!(refused[0].1.code, RefusalCode::Validation.name());
    // What it meant was forgotten when it was admitted.
    let again = author.replica.retry_refused(world.now, &refused[0].1).unwrap_err();
    assert!(again.to_string().contains("write it anew"), "{again}");
}

/// The answer comes before the feed, which says that it is for good: what is written next waits for nothing.
#[test]
fn what_waited_for_a_change_that_is_refused_for_good_goes_on() {
    let mut world = World::strict();
    Phone::new(2, &newer()).join(&mut world, "authority");
    let mut author = Phone::new(1, &newer());
    author.join(&mut world, "writer");
    author.write(&world, &[edit("n1", vec![set("more", json!("x"))])]).unwrap();
    author.talk(&mut world);
    lose_all(&mut world, SCHEMA);
    author.join(&mut world, "writer");
    assert_eq!((author.row("n1"), author.replica.status().pending), (None, 0));
    author.write(&world, &[edit("n1", vec![set("title", json!("next"))])]).unwrap();
    author.talk(&mut world);
    assert_eq!((author.replica.status().pending, author.replica.held().unwrap()), (0, None));
}

/// A relay that lost what this device wrote has what another life of its store wrote in the same place. What
/// goes with that was acknowledged once; only what is the same edit by another name is not lost.
#[test]
fn an_author_is_told_of_what_another_life_of_its_own_took_the_place_of() {
    for is_made_again in [true, false] {
        let mut world = World::with_schema();
        let mut phone = Phone::new(1, SCHEMA);
        phone.join(&mut world, "writer");
        let mut places = Vec::new();
        for (title, ids) in [("x", &["n1", "n2"][..]), ("y", &["n1"])] {
            let edits: Vec<Edit> = ids.iter().map(|id| edit(id, vec![set("title", json!(title))])).collect();
            phone.write(&world, &edits).unwrap();
            let changes = asked(&mut phone, &mut world);
            places.push(changes.unit.entities.iter().map(|part| part.changes[0].clone()).collect::<Vec<_>>());
            world.handle(Input::Received { conn: phone.conn, bytes: Message::from(changes).encode() });
            phone.talk(&mut world);
        }
        assert_eq!(phone.replica.status().pending, 0);

        lose_all(&mut world, SCHEMA);
        let mut life = Device::new(1);
        let conn = world.join(&life, "writer");
        let parts = ["n1", "n2"].iter().zip(&places[0]).map(|(id, was)| {
            let mut draft = in_tx(9, 2);
            draft.note.origin = is_made_again.then(|| Change::parse(was).unwrap().origin());
            of(id, &[&life.write(id, draft)])
        });
        let parts: Vec<_> = parts.collect();
        assert_eq!(world.submit(conn, unit(parts)).refused, []);
        phone.join(&mut world, "writer");
        for id in ["n1", "n2"] {
            assert_eq!(phone.row(id).unwrap().fields["title"], json!("hello"));
        }
        let refused = phone.rows().refused().unwrap();
        let told: Vec<&str> = refused.iter().map(|(_, record)| record.id.as_str()).collect();
        let lost = if is_made_again { vec!["n1"] } else { vec!["n1", "n1", "n2"] };
        assert_eq!(told, lost);
        assert!(refused.iter().all(|(_, record)| record.intents.is_empty()));
    }
}

/// What is offered again is not made again, so it does not count among what is.
#[test]
fn what_can_not_be_offered_again_leaves_a_new_edit_its_tries() {
    let mut world = World::with_schema();
    let mut phone = Phone::new(1, SCHEMA);
    phone.join(&mut world, "writer");
    for n in 0..5 {
        phone.write(&world, &[edit("n1", vec![set("title", json!(n.to_string()))])]).unwrap();
        phone.talk(&mut world);
    }
    lose_all(&mut world, SCHEMA);
    sign_in(&mut phone, &mut world, "writer", 0);
    let mut changes = asked(&mut phone, &mut world);
    assert_eq!(changes.unit.entities[0].changes.len(), 5);
    phone.write(&world, &[edit("n1", vec![set("title", json!("new"))])]).unwrap();
    let mut ack = refusing(&changes, &[("n1", RefusalCode::BadSequence)]);
    for bytes in &changes.unit.entities[0].changes[1..] {
        ack.refused.push(Refused { hash: Change::parse(bytes).unwrap().hash().0, ..ack.refused[0].clone() });
    }
    phone.hear(&world, ack);
    assert_eq!(phone.rows().refused().unwrap().len(), 5);
    for _ in 0..3 {
        changes = asked(&mut phone, &mut world);
        phone.hear(&world, refusing(&changes, &[("n1", RefusalCode::BadSequence)]));
    }
    assert_eq!((phone.replica.status().pending, phone.rows().refused().unwrap().len()), (1, 5));
}

/// The relay has a whole transaction by other names.
#[test]
fn nobody_is_told_of_a_transaction_that_the_relay_has_by_another_name() {
    let mut world = World::with_schema();
    let mut phone = Phone::new(1, SCHEMA);
    phone.join(&mut world, "writer");
    phone.write(&world, &["n1", "n2"].map(|id| edit(id, vec![set("title", json!("x"))]))).unwrap();
    phone.talk(&mut world);
    lose_all(&mut world, SCHEMA);
    let changes = offers(&mut phone, &mut world, "writer");
    // Another life of its store was faster.
    let mut life = other_life(1, Incarnation::new(7, 0));
    let conn = world.join(&life, "writer");
    let parts: Vec<_> =
        ["n1", "n2"].map(|id| of(id, &[&life.write(id, made_again(&change_of(&changes, id, 0)))])).into();
    assert_eq!(world.submit(conn, unit(parts)).refused, []);
    world.handle(Input::Received { conn: phone.conn, bytes: Message::from(changes).encode() });
    phone.talk(&mut world);
    for id in ["n1", "n2"] {
        assert_eq!(phone.row(id).unwrap().fields["title"], json!("hello"));
    }
    assert_eq!((phone.replica.status().pending, told(&phone)), (0, vec![]));
}

/// Two edits, one on the other, both there by other names.
#[test]
fn nobody_is_told_of_a_chain_that_the_relay_has_by_another_name() {
    let mut world = World::with_schema();
    let mut phone = Phone::new(1, SCHEMA);
    phone.join(&mut world, "writer");
    for title in ["x", "y"] {
        phone.write(&world, &[edit("n1", vec![set("title", json!(title))])]).unwrap();
        phone.talk(&mut world);
    }
    lose_all(&mut world, SCHEMA);
    let changes = offers(&mut phone, &mut world, "writer");
    let mut life = other_life(1, Incarnation::new(7, 0));
    let conn = world.join(&life, "writer");
    let again = [0, 1].map(|place| life.write("n1", made_again(&change_of(&changes, "n1", place))));
    assert_eq!(world.submit(conn, unit([of("n1", &[&again[0], &again[1]])])).refused, []);
    world.handle(Input::Received { conn: phone.conn, bytes: Message::from(changes).encode() });
    phone.talk(&mut world);
    assert_eq!((phone.replica.status().pending, told(&phone)), (0, vec![]));
}

/// An admin's transaction builds on what the relay has by another name now: all of it is lost, and the admin is to
/// be told of each of its halves.
#[test]
fn an_author_is_told_of_both_halves_that_go_with_a_superseded_change() {
    for below in ["n1", "n2"] {
        let mut world = World::with_schema();
        let mut writer = Device::new(1);
        let conn = world.join(&writer, "writer");
        let mut admin = Phone::new(2, SCHEMA);
        admin.join(&mut world, "admin");
        let first = writer.edit(below);
        assert_eq!(world.submit(conn, unit([of(below, &[&first])])).refused, []);
        admin.talk(&mut world);
        admin.write(&world, &["n1", "n2"].map(|id| edit(id, vec![set("title", json!("both"))]))).unwrap();
        admin.talk(&mut world);
        assert_eq!(admin.replica.status().pending, 0);

        lose_all(&mut world, SCHEMA);
        let changes = offers(&mut admin, &mut world, "admin");
        assert_eq!(changes.unit.entities.iter().map(|part| part.changes.len()).sum::<usize>(), 3);
        let mut life = other_life(1, Incarnation::new(7, 0));
        let conn = world.join(&life, "writer");
        let again = life.write(below, made_again(&first));
        // Neither is durable when both have been judged.
        let again = Changes { channel: 1, unit_id: 1, sent: 0, unit: unit([of(below, &[&again])]) };
        world.send(conn, again);
        world.handle(Input::Received { conn: admin.conn, bytes: Message::from(changes).encode() });
        admin.talk(&mut world);
        assert_eq!(told(&admin), ["n1", "n2"], "{below}");
    }
}

/// A writer's note that an admin has too, and the relay no more.
fn lost_by_the_relay() -> (World, Phone, Phone) {
    let mut world = World::with_schema();
    let mut author = Phone::new(1, SCHEMA);
    let mut admin = Phone::new(2, SCHEMA);
    author.join(&mut world, "writer");
    admin.join(&mut world, "admin");
    author.write(&world, &[edit("n1", vec![set("title", json!("x"))])]).unwrap();
    author.talk(&mut world);
    admin.talk(&mut world);
    lose_all(&mut world, SCHEMA);
    (world, author, admin)
}

/// A writer becomes a reader while it brings back what the relay lost. An admin brings it.
#[test]
fn a_reader_is_not_told_that_what_it_wrote_is_lost() {
    let (mut world, mut author, mut admin) = lost_by_the_relay();
    offers(&mut author, &mut world, "writer");
    author.join(&mut world, "reader");
    admin.join(&mut world, "admin");
    author.talk(&mut world);
    assert_eq!(author.row("n1").unwrap().fields["title"], json!("x"));
    assert!(told(&author).is_empty());
}

/// Nor does it lose the only copy there is of what others wrote.
#[test]
fn a_reader_keeps_what_others_have_to_bring() {
    let (mut world, _, mut admin) = lost_by_the_relay();
    offers(&mut admin, &mut world, "admin");
    admin.join(&mut world, "reader");
    assert!(admin.row("n1").is_some());
    assert_eq!(admin.replica.status().lacking, 1);
}

/// What builds on a change that is dated too late for the relay waits with that.
#[test]
fn a_new_edit_waits_for_what_the_relay_finds_too_late() {
    let mut world = World::with_schema();
    let mut phone = Phone::new(1, SCHEMA);
    phone.join(&mut world, "writer");
    phone.write(&world, &[edit("n1", vec![set("title", json!("x"))])]).unwrap();
    phone.talk(&mut world);
    lose_all(&mut world, SCHEMA);
    // The new machine's clock is behind.
    world.now.wall.0 -= 20 * 60 * 1000;
    sign_in(&mut phone, &mut world, "writer", 0);
    phone.talk(&mut world);
    assert_eq!(phone.replica.status().pending, 1);
    phone.write(&world, &[edit("n1", vec![set("title", json!("new"))])]).unwrap();
    phone.talk(&mut world);
    assert!(told(&phone).is_empty());
    let mut other = Device::new(2);
    other.clock = Hlc::from_wall(world.now.wall);
    let conn = world.join(&other, "writer");
    phone.talk(&mut world);
    for n in 0..16 {
        let change = other.write("n1", Draft { field: "title", ..Draft::default() });
        let ack = world.submit(conn, unit([of("n1", &[&change])]));
        assert_eq!(ack.refused, []);
        phone.talk(&mut world);
        assert!(told(&phone).is_empty(), "{n}");
    }
}

/// The edits of another life come in two units.
#[test]
fn nobody_is_told_of_an_edit_that_the_next_entry_brings() {
    let mut world = World::with_schema();
    let mut phone = Phone::new(1, SCHEMA);
    phone.join(&mut world, "writer");
    let mut was = Vec::new();
    for title in ["x", "y"] {
        phone.write(&world, &[edit("n1", vec![set("title", json!(title))])]).unwrap();
        let changes = asked(&mut phone, &mut world);
        was.push(change_of(&changes, "n1", 0));
        world.handle(Input::Received { conn: phone.conn, bytes: Message::from(changes).encode() });
        phone.talk(&mut world);
    }
    lose_all(&mut world, SCHEMA);
    let mut life = Device::new(1);
    let conn = world.join(&life, "writer");
    for was in &was {
        let again = life.write("n1", made_again(was));
        assert_eq!(world.submit(conn, unit([of("n1", &[&again])])).refused, []);
    }
    phone.join(&mut world, "writer");
    assert_eq!((phone.replica.status().pending, told(&phone)), (0, vec![]));
}

/// One half of a transaction was made again, the other came as it was: what builds on that is not lost.
#[test]
fn what_builds_on_the_half_that_came_as_it_was_is_kept() {
    for order in [["n1", "n2"], ["n2", "n1"]] {
        let mut world = World::with_schema();
        let mut phone = Phone::new(1, SCHEMA);
        phone.join(&mut world, "writer");
        phone.write(&world, &["n1", "n2"].map(|id| edit(id, vec![set("title", json!("x"))]))).unwrap();
        let changes = asked(&mut phone, &mut world);
        let was = ["n1", "n2"].map(|id| change_of(&changes, id, 0));
        world.handle(Input::Received { conn: phone.conn, bytes: Message::from(changes).encode() });
        phone.talk(&mut world);
        phone.write(&world, &[edit("n2", vec![set("title", json!("y"))])]).unwrap();
        phone.talk(&mut world);
        lose_all(&mut world, SCHEMA);
        let mut life = other_life(1, Incarnation::new(0, 1));
        let conn = world.join(&life, "writer");
        let again = life.write("n1", made_again(&was[0]));
        let part = |id: &str| if id == "n1" { of(id, &[&again]) } else { of(id, &[&was[1]]) };
        assert_eq!(world.submit(conn, unit(order.map(part))).refused, []);
        phone.join(&mut world, "writer");
        assert_eq!(phone.row("n2").unwrap().fields["title"], json!("y"), "{order:?}");
        assert_eq!((phone.replica.status().pending, told(&phone)), (0, vec![]), "{order:?}");
    }
}

/// The only copy of what the relay lost is damaged: its author is told.
#[test]
fn an_author_is_told_that_the_only_copy_is_damaged() {
    let mut world = World::with_schema();
    let mut phone = Phone::new(1, SCHEMA);
    phone.join(&mut world, "writer");
    phone.write(&world, &[edit("n1", vec![set("title", json!("x"))])]).unwrap();
    phone.talk(&mut world);
    lose_all(&mut world, SCHEMA);
    offers(&mut phone, &mut world, "writer");
    phone.store.damage(Keyspace::DOC);
    restart(&mut phone, SCHEMA);
    let verified = phone.replica.verify(world.now, 1000, true).unwrap();
    assert_eq!(verified.faults.len(), 1, "{verified:?}");
    phone.join(&mut world, "writer");
    assert_eq!((phone.row("n1"), phone.replica.status().pending), (None, 0));
    assert_eq!(told(&phone).len(), 1);
}

/// The store of whoever wrote it went back, and they wrote something else in its place. Who had just deleted the first
/// is told why that is refused, and can do it again.
#[test]
fn a_deletion_of_what_was_replaced_is_refused_with_the_reason() {
    let mut world = World::with_schema();
    let mut phone = Phone::new(2, SCHEMA);
    phone.join(&mut world, "writer");
    let mut author = Device::new(1);
    let conn = world.join(&author, "writer");
    assert_eq!(world.submit(conn, unit([of("n1", &[&author.edit("n1")])])).refused, []);
    phone.talk(&mut world);
    lose_all(&mut world, SCHEMA);
    phone.replica.disconnect();
    phone.write(&world, &[edit("n1", vec![Intent::Delete])]).unwrap();
    let mut life = Device::new(1);
    let conn = world.join(&life, "writer");
    let other = life.write("n1", Draft { title: "other".into(), ..Draft::default() });
    assert_eq!(world.submit(conn, unit([of("n1", &[&other])])).refused, []);
    phone.join(&mut world, "writer");
    assert_eq!(phone.row("n1").unwrap().fields["title"], json!("other"));
    let refused = phone.rows().refused().unwrap();
    assert_eq!(refused.len(), 1);
    assert!(refused[0].1.message.contains("replaced by another"), "{:?}", refused[0]);
    phone.replica.retry_refused(world.now, &refused[0].1).unwrap();
    phone.talk(&mut world);
    assert!(phone.row("n1").unwrap().deleted);
}

/// Begins anew with what the store holds.
fn restart(phone: &mut Phone, source: &str) {
    phone.replica = Phone::open(&phone.store, &phone.schema, source, phone.device.id());
}

/// Damages the document of one note.
fn damage_one(phone: &Phone, id: &str) {
    let hash = EntityHash::of(&home(), &key("note", id)).0;
    let mut batch = Batch::new();
    for (place, _) in phone.store.scan(View::Latest, Keyspace::DOC, &[], &[], 1000).unwrap() {
        if place.windows(hash.len()).any(|part| part == hash) {
            batch.put(Keyspace::DOC, place, vec![1, 255]);
        }
    }
    phone.store.commit(batch).unwrap();
    phone.store.flush();
}

/// An edit of its own that says it is the other's is told by the relay to be there already.
#[test]
fn another_writer_can_not_hide_a_loss() {
    let mut world = World::with_schema();
    let mut mallory = Device::new(1);
    let conn = world.join(&mallory, "writer");
    let mut admin = Phone::new(2, SCHEMA);
    admin.join(&mut world, "admin");
    let first = mallory.edit("n1");
    assert_eq!(world.submit(conn, unit([of("n1", &[&first])])).refused, []);
    admin.talk(&mut world);
    admin.write(&world, &[edit("n1", vec![set("title", json!("mine"))])]).unwrap();
    let changes = asked(&mut admin, &mut world);
    let mine = change_of(&changes, "n1", 0);
    world.handle(Input::Received { conn: admin.conn, bytes: Message::from(changes).encode() });
    admin.talk(&mut world);
    // A change of its own that says it is the admin's edit.
    let copy = mallory.write("n1", made_again(&mine));
    assert_eq!(world.submit(conn, unit([of("n1", &[&copy])])).refused, []);
    admin.talk(&mut world);
    assert_eq!(admin.replica.status().pending, 0);

    lose_all(&mut world, SCHEMA);
    let changes = offers(&mut admin, &mut world, "admin");
    let mut life = other_life(1, Incarnation::new(7, 0));
    let conn = world.join(&life, "writer");
    let again = [&first, &copy].map(|was| life.write("n1", made_again(was)));
    let again = Changes { channel: 1, unit_id: 1, sent: 0, unit: unit([of("n1", &[&again[0], &again[1]])]) };
    world.send(conn, again);
    world.handle(Input::Received { conn: admin.conn, bytes: Message::from(changes).encode() });
    admin.talk(&mut world);
    assert_eq!(admin.replica.status().pending, 0);
    assert_eq!(told(&admin), ["n1"]);
}

/// Of a transaction that is offered again. The relay would refuse the half for good, whoever has the whole.
#[test]
fn a_half_is_not_offered_when_the_other_is_damaged() {
    for damaged in ["author", "admin"] {
        let mut world = World::with_schema();
        let mut author = Phone::new(1, SCHEMA);
        let mut admin = Phone::new(2, SCHEMA);
        author.join(&mut world, "writer");
        admin.join(&mut world, "admin");
        author.write(&world, &["n1", "n2"].map(|id| edit(id, vec![set("title", json!("both"))]))).unwrap();
        author.talk(&mut world);
        admin.talk(&mut world);
        lose_all(&mut world, SCHEMA);
        let (broken, role, whole, other) = match damaged {
            "author" => (&mut author, "writer", &mut admin, "admin"),
            _ => (&mut admin, "admin", &mut author, "writer"),
        };
        offers(broken, &mut world, role);
        damage_one(broken, "n1");
        restart(broken, SCHEMA);
        let verified = broken.replica.verify(world.now, 1000, true).unwrap();
        assert_eq!(verified.faults.len(), 1, "{verified:?}");
        broken.join(&mut world, role);
        whole.join(&mut world, other);
        broken.talk(&mut world);
        assert!(whole.row("n1").is_some() && whole.row("n2").is_some(), "{damaged}");
    }
}

/// The relay has it, and its answer was lost.
#[test]
fn what_was_sent_and_damaged_is_not_told_when_it_comes_back() {
    let mut world = World::with_schema();
    let mut phone = Phone::new(1, SCHEMA);
    phone.join(&mut world, "writer");
    phone.write(&world, &[edit("n1", vec![set("title", json!("x"))])]).unwrap();
    let changes = asked(&mut phone, &mut world);
    // The answer is lost.
    world.handle(Input::Received { conn: phone.conn, bytes: Message::from(changes).encode() });
    world.settle(phone.conn);
    damage_one(&phone, "n1");
    restart(&mut phone, SCHEMA);
    assert_eq!(phone.replica.verify(world.now, 1000, true).unwrap().faults.len(), 1);
    phone.join(&mut world, "writer");
    assert_eq!(phone.row("n1").unwrap().fields["title"], json!("x"));
    assert!(told(&phone).is_empty(), "{:?}", phone.rows().refused().unwrap());
}

/// The relay has the edit by another name, and loses it before the feed brings it.
#[test]
fn what_the_relay_has_by_another_name_stays_until_that_comes() {
    let mut world = World::with_schema();
    let mut phone = Phone::new(1, SCHEMA);
    phone.join(&mut world, "writer");
    phone.write(&world, &[edit("n1", vec![set("title", json!("x"))])]).unwrap();
    phone.talk(&mut world);
    lose_all(&mut world, SCHEMA);
    let changes = offers(&mut phone, &mut world, "writer");
    phone.hear(&world, refusing(&changes, &[("n1", RefusalCode::Superseded)]));
    // Before its feed brings the other change the relay goes back once more.
    lose_all(&mut world, SCHEMA);
    phone.join(&mut world, "writer");
    assert!(phone.row("n1").is_some() || told(&phone) == ["n1"]);
}

/// There is no row to be made of it.
#[test]
fn what_is_told_of_a_damaged_entity_can_be_dismissed() {
    let mut world = World::with_schema();
    let mut phone = Phone::new(1, &newer());
    phone.join(&mut world, "writer");
    phone.write(&world, &[edit("n1", vec![set("title", json!("x"))])]).unwrap();
    phone.talk(&mut world);
    for value in ["1", "2"] {
        phone.write(&world, &[edit("n1", vec![set("more", json!(value))])]).unwrap();
        phone.talk(&mut world);
    }
    assert_eq!(phone.replica.status().refused, 2);
    damage_one(&phone, "n1");
    restart(&mut phone, &newer());
    let number = phone.rows().refused().unwrap()[0].0;
    assert!(phone.replica.dismiss(number).unwrap());
    assert!(!phone.replica.dismiss(number).unwrap(), "it is gone");
    phone.store.flush();
    assert_eq!((phone.replica.status().refused, phone.rows().refused().unwrap().len()), (1, 1));
}

/// The feed overtakes the answer: one half is made again before the other is told to wait.
#[test]
fn a_transaction_does_not_wait_for_what_the_feed_has_brought() {
    let mut world = World::with_schema();
    let mut phone = Phone::new(1, SCHEMA);
    phone.join(&mut world, "writer");
    phone.write(&world, &[edit("n1", vec![set("title", json!("a"))])]).unwrap();
    phone.write(&world, &["n1", "n2"].map(|id| edit(id, vec![set("title", json!("both"))]))).unwrap();
    let changes = asked(&mut phone, &mut world);
    let was = change_of(&changes, "n1", 0);
    // An admin brings the same edit of another life of the store.
    let mut life = other_life(1, Incarnation::new(7, 0));
    let admin = world.join(&Device::new(9), "admin");
    let again = life.write("n1", made_again(&was));
    assert_eq!(world.submit(admin, unit([of("n1", &[&again])])).refused, []);
    world.handle(Input::Received { conn: phone.conn, bytes: Message::from(changes).encode() });
    for message in world.settle(phone.conn) {
        phone.hear(&world, message);
    }
    phone.talk(&mut world);
    assert_eq!((phone.replica.status().pending, phone.replica.held().unwrap()), (0, None));
}

/// Others were to bring it, and nobody else has it.
#[test]
fn who_may_write_again_brings_what_it_wrote() {
    for while_reading in [false, true] {
        let mut world = World::with_schema();
        let mut author = Phone::new(1, SCHEMA);
        author.join(&mut world, "writer");
        author.write(&world, &[edit("n1", vec![set("title", json!("x"))])]).unwrap();
        author.talk(&mut world);
        lose_all(&mut world, SCHEMA);
        if !while_reading {
            offers(&mut author, &mut world, "writer");
        }
        author.join(&mut world, "reader");
        assert_eq!(author.replica.status().lacking, 1);
        author.join(&mut world, "writer");
        author.join(&mut world, "writer");
        let mut third = Phone::new(3, SCHEMA);
        third.join(&mut world, "writer");
        author.write(&world, &[edit("n1", vec![set("title", json!("y"))])]).unwrap();
        author.talk(&mut world);
        assert!(third.row("n1").is_some());
    }
}

/// The relay's clock was set back by more than this device had measured, which shows only when it is measured anew.
#[test]
fn an_edit_that_the_relay_finds_too_late_is_dated_by_the_next_measurement() {
    const BACK_MS: i64 = 20 * 60 * 1000;
    let mut world = World::with_schema();
    let mut phone = Phone::new(1, SCHEMA);
    sign_in(&mut phone, &mut world, "writer", 0);
    phone.talk(&mut world);
    phone.write(&world, &[edit("n1", vec![set("title", json!("x"))])]).unwrap();
    let mut changes = asked(&mut phone, &mut world);
    for ahead_ms in [0, -BACK_MS] {
        sign_in(&mut phone, &mut world, "writer", ahead_ms);
        changes = asked(&mut phone, &mut world);
        phone.hear(&world, refusing(&changes, &[("n1", RefusalCode::ClockAhead)]));
        changes = asked(&mut phone, &mut world);
    }
    let dated = change_of(&changes, "n1", 0).time().wall().0 as i64;
    assert!(dated <= world.now.wall.0 as i64 - BACK_MS, "{}", dated - START.0 as i64);
}

/// What builds on it, and the other half of that one's transaction, are told to wait, in whatever order.
#[test]
fn a_transaction_on_what_is_dated_again_does_not_wait() {
    for (first, second) in [("n1", "n2"), ("n2", "n1")] {
        let mut world = World::with_schema();
        let mut phone = Phone::new(1, SCHEMA);
        phone.join(&mut world, "writer");
        phone.write(&world, &[edit(first, vec![set("title", json!("a"))])]).unwrap();
        let both = [first, second].map(|id| edit(id, vec![set("title", json!("both"))]));
        phone.write(&world, &both).unwrap();
        let changes = asked(&mut phone, &mut world);
        let late = [(first, RefusalCode::ClockAhead), (second, RefusalCode::MissingDependency)];
        let mut ack = refusing(&changes, &late);
        let below = change_of(&changes, first, 1).hash().0;
        let code = RefusalCode::MissingDependency as u16;
        ack.refused.push(Refused { hash: below, code, ..ack.refused[0].clone() });
        phone.hear(&world, ack);
        phone.talk(&mut world);
        assert_eq!((phone.replica.status().pending, phone.replica.held().unwrap()), (0, None), "{first}");
    }
}

/// Of a transaction that is refused for good each member has its own reason, in whatever order they are looked at.
#[test]
fn an_author_reads_which_half_of_a_transaction_was_refused_for_itself() {
    for (wrong, right) in [("n1", "n2"), ("n2", "n1")] {
        let mut world = World::strict();
        Phone::new(2, &newer()).join(&mut world, "authority");
        let mut author = Phone::new(1, &newer());
        author.join(&mut world, "writer");
        let both = [edit(wrong, vec![set("more", json!("x"))]), edit(right, vec![set("title", json!("y"))])];
        author.write(&world, &both).unwrap();
        author.talk(&mut world);
        lose_all(&mut world, SCHEMA);
        author.join(&mut world, "writer");
        let refused = author.rows().refused().unwrap();
        let code = |id: &str| &refused.iter().find(|(_, record)| record.id == id).unwrap().1.code;
        assert_eq!((code(wrong).as_str(), code(right).as_str()), ("unknown_field", "transaction"));
    }
}

/// It came while nobody knew yet that the relay had gone back, so nothing took the place of the other.
#[test]
fn an_edit_that_is_here_twice_is_offered_once() {
    let mut world = World::with_schema();
    let mut admin = Phone::new(2, SCHEMA);
    admin.join(&mut world, "admin");
    let mut author = Device::new(1);
    let conn = world.join(&author, "writer");
    let first = author.edit("n1");
    assert_eq!(world.submit(conn, unit([of("n1", &[&first])])).refused, []);
    let seq = world.whole_feed().len() as u64 + 1;
    admin.talk(&mut world);
    let again = other_life(1, Incarnation::new(7, 0)).write("n1", made_again(&first));
    let body = FeedBody::Changes { author: author.id().0, unit: unit([of("n1", &[&again])]) };
    admin.hear(&world, Feed { channel: 1, entries: vec![FeedEntry { seq, body }], end: seq });
    lose_all(&mut world, SCHEMA);
    admin.join(&mut world, "admin");
    assert_eq!((admin.replica.status().pending, admin.replica.held().unwrap()), (0, None));
    assert!(told(&admin).is_empty());
}

/// It may bring what others wrote now, and more than a unit takes of what it wrote itself waits for that.
#[test]
fn what_may_be_brought_now_goes_before_what_builds_on_it() {
    let mut world = World::with_schema();
    let mut author = Device::new(1);
    let conn = world.join(&author, "writer");
    assert_eq!(world.submit(conn, unit([of("n1", &[&author.edit("n1")])])).refused, []);
    let mut phone = Phone::new(2, SCHEMA);
    phone.join(&mut world, "writer");
    for seed in 0..8u64 {
        let hash = |block: u64| blake3::hash(&(seed * 10_000 + block).to_be_bytes()).to_string();
        let title: String = (0..1000).map(hash).collect();
        phone.write(&world, &[edit("n1", vec![set("title", json!(title))])]).unwrap();
        phone.talk(&mut world);
    }
    lose_all(&mut world, SCHEMA);
    phone.join(&mut world, "writer");
    assert!(matches!(phone.replica.held().unwrap(), Some(Held::MissingAtRelay { .. })));
    phone.join(&mut world, "admin");
    assert_eq!((phone.replica.status().pending, phone.replica.held().unwrap()), (0, None));
    assert_eq!(phone.replica.status().lacking, 0);
}

/// Its right changes while it is connected, and nothing else happens.
#[test]
fn who_may_write_from_now_on_brings_what_it_wrote() {
    let mut world = World::with_schema();
    let mut author = Phone::new(1, SCHEMA);
    author.join(&mut world, "writer");
    author.write(&world, &[edit("n1", vec![set("title", json!("x"))])]).unwrap();
    author.talk(&mut world);
    let mut other = Phone::new(2, SCHEMA);
    other.join(&mut world, "writer");
    lose_all(&mut world, SCHEMA);
    author.join(&mut world, "reader");
    other.join(&mut world, "writer");
    assert_eq!((author.replica.status().lacking, other.replica.status().lacking), (1, 1));
    // What both have one of them may bring.
    other.replica.refresh(token("admin"));
    other.talk(&mut world);
    author.talk(&mut world);
    assert_eq!((author.replica.status().lacking, other.replica.status().lacking), (0, 0));
    lose_all(&mut world, SCHEMA);
    author.join(&mut world, "reader");
    assert_eq!(author.replica.status().lacking, 1);
    author.replica.refresh(token("writer"));
    author.talk(&mut world);
    assert_eq!(author.replica.status().lacking, 0);
    assert!(world.whole_feed().iter().any(|entry| matches!(entry.body, FeedBody::Changes { .. })));
}

/// The others are brought, and its transactions wait for who has all of them.
#[test]
fn one_damaged_document_does_not_keep_the_others_from_coming_back() {
    for lacking in [false, true] {
        let mut world = World::with_schema();
        let mut phone = Phone::new(1, SCHEMA);
        phone.join(&mut world, "writer");
        let title = |id: &str| edit(id, vec![set("title", json!("x"))]);
        phone.write(&world, &["n1", "n2"].map(title)).unwrap();
        phone.write(&world, &[title("n3")]).unwrap();
        phone.talk(&mut world);
        lose_all(&mut world, SCHEMA);
        if lacking {
            phone.join(&mut world, "reader");
        }
        damage_one(&phone, "n1");
        restart(&mut phone, SCHEMA);
        phone.join(&mut world, "writer");
        assert_eq!((phone.replica.status().lacking, phone.replica.held().unwrap()), (2, None));
        let mut third = Phone::new(3, SCHEMA);
        third.join(&mut world, "writer");
        assert!(third.row("n3").is_some() && third.row("n2").is_none());
        assert_eq!(phone.replica.verify(world.now, 1000, true).unwrap().faults.len(), 1);
        phone.store.flush();
        assert_eq!((told(&phone), phone.replica.status().lacking), (vec!["n1".to_owned()], 1));
    }
}
