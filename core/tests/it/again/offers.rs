//! What is offered again, by whom, when, and what waits for it.

use anabranch_core::admission::RefusalCode;
use anabranch_core::change::Change;
use anabranch_core::genesis::GenesisKind;
use anabranch_core::id::Incarnation;
use anabranch_core::intent::Intent;
use anabranch_core::relay::Input;
use anabranch_core::replica::Held;
use anabranch_core::replica::{self, Edit};
use anabranch_core::schema::Schema;
use anabranch_core::store::Keyspace;
use anabranch_core::wire::*;
use serde_json::json;
use std::sync::Arc;

use crate::support::phone::*;
use crate::support::*;

use super::*;

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
    sign_in_anew(&mut phone, &mut world, "writer", 0);
    let mut changes = asked(&mut phone, &mut world);
    assert_eq!(changes.unit.entities[0].changes.len(), 5);
    phone.write(&world, &[edit("n1", vec![set("title", json!("new"))])]).unwrap();
    let mut ack = refusing(&changes, &[("n1", RefusalCode::Validation)]);
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

/// Nor does it lose the only copy there is of what others wrote.
#[test]
fn a_reader_keeps_what_others_have_to_bring() {
    let (mut world, _, mut admin) = lost_by_the_relay();
    offers(&mut admin, &mut world, "admin");
    admin.join(&mut world, "reader");
    assert!(admin.row("n1").is_some());
    assert_eq!(admin.replica.status().lacking, 1);
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
        damage_one(broken, Keyspace::DOC, "n1");
        restart(broken, SCHEMA);
        let verified = broken.replica.verify(world.now, 1000, true).unwrap();
        assert_eq!(verified.faults.len(), 1, "{verified:?}");
        broken.join(&mut world, role);
        whole.join(&mut world, other);
        broken.talk(&mut world);
        assert!(whole.row("n1").is_some() && whole.row("n2").is_some(), "{damaged}");
    }
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

/// A note, or a transaction, of another device that is here by two names, as it came again while nobody knew yet that the
/// relay had gone back. With it the other device in its newer life, and what that calls it.
fn here_twice(role: &str, ids: &[&str]) -> (World, Phone, Device, Vec<EntityChanges>) {
    let mut world = World::with_schema();
    let mut phone = Phone::new(2, SCHEMA);
    phone.join(&mut world, role);
    let mut author = Device::new(1);
    let mut life = other_life(1, Incarnation::new(7, 0));
    let conn = world.join(&author, "writer");
    let part = |id: &&str, change: &Change| EntityChanges {
        genesis: vec![("stars".into(), GenesisKind::Counter.code())],
        ..of(id, &[change])
    };
    let tx = || if ids.len() == 1 { Draft::default() } else { in_tx(7, ids.len() as u32) };
    let stars = |draft| Draft { increments: Some("stars"), ..draft };
    let firsts: Vec<Change> = ids.iter().map(|id| author.write(id, stars(tx()))).collect();
    let parts = ids.iter().zip(&firsts).map(|(id, change)| part(id, change)).collect::<Vec<_>>();
    assert_eq!(world.submit(conn, unit(parts)).refused, []);
    phone.talk(&mut world);
    let again = ids.iter().zip(&firsts);
    let again: Vec<_> =
        again.map(|(id, first)| part(id, &life.write(id, stars(made_again(first))))).collect();
    let seq = world.whole_feed().len() as u64;
    let body = FeedBody::Changes { author: author.id().0, unit: unit(again.clone()) };
    phone.hear(&world, Feed { channel: 1, entries: vec![FeedEntry { seq, body }], end: seq });
    (world, phone, life, again)
}

#[test]
fn an_edit_that_is_here_twice_is_offered_once() {
    for ids in [&["n1"][..], &["n1", "n2"]] {
        let (mut world, mut admin, ..) = here_twice("admin", ids);
        lose_all(&mut world, SCHEMA);
        admin.join(&mut world, "admin");
        assert_eq!((admin.replica.status().pending, admin.replica.held().unwrap()), (0, None));
        assert_eq!((told(&admin), admin.replica.status().lacking), (vec![], 0));
        assert_eq!(admin.row("n1").unwrap().fields["stars"], json!(1));
    }
}

/// What was built on the older of the two comes back with it.
#[test]
fn what_was_built_on_an_edit_that_is_here_twice_comes_back() {
    for builder in [2, 3] {
        let mut world = World::with_schema();
        let mut phones = [2, 3].map(|number| Phone::new(number, SCHEMA));
        phones[0].join(&mut world, "admin");
        phones[1].join(&mut world, "writer");
        let mut author = Device::new(1);
        let conn = world.join(&author, "writer");
        let first = author.edit("n1");
        assert_eq!(world.submit(conn, unit([of("n1", &[&first])])).refused, []);
        phones.iter_mut().for_each(|phone| phone.talk(&mut world));
        let by = &mut phones[builder - 2];
        by.write(&world, &[edit("n1", vec![set("title", json!("built"))])]).unwrap();
        by.talk(&mut world);
        let [admin, _] = &mut phones;
        admin.talk(&mut world);
        let again = other_life(1, Incarnation::new(7, 0)).write("n1", made_again(&first));
        let seq = world.whole_feed().len() as u64;
        let body = FeedBody::Changes { author: author.id().0, unit: unit([of("n1", &[&again])]) };
        admin.hear(&world, Feed { channel: 1, entries: vec![FeedEntry { seq, body }], end: seq });
        lose_all(&mut world, SCHEMA);
        admin.join(&mut world, "admin");
        assert_eq!(admin.row("n1").unwrap().fields["title"], json!("built"));
        assert_eq!((admin.replica.status().pending, told(admin)), (0, vec![]), "{builder}");
    }
}

/// Whoever may bring it or not, and whatever was written since.
#[test]
fn an_edit_that_is_here_twice_counts_once_when_it_comes() {
    for role in ["admin", "writer"] {
        for writes in [false, true] {
            let (mut world, mut phone, life, again) = here_twice(role, &["n1", "n2"]);
            phone.replica.disconnect();
            if writes {
                phone.write(&world, &[edit("n1", vec![set("title", json!("mine"))])]).unwrap();
            }
            lose_all(&mut world, SCHEMA);
            let conn = world.join(&life, "writer");
            assert_eq!(world.submit(conn, unit(again)).refused, []);
            phone.join(&mut world, role);
            assert_eq!((phone.replica.status().pending, phone.replica.held().unwrap()), (0, None), "{role}");
            assert_eq!((told(&phone), phone.replica.status().lacking), (vec![], 0), "{role}");
            let row = phone.row("n1").unwrap();
            assert_eq!(row.fields["stars"], json!(1), "{role}");
            assert_eq!(row.fields["title"] == json!("mine"), writes);
        }
    }
}

/// A writer who has edits like these on what somebody else wrote, which the relay has lost with all else.
fn wrote_on_anothers(titles: impl Iterator<Item = String>) -> (World, Phone) {
    let mut world = World::with_schema();
    let mut author = Device::new(1);
    let conn = world.join(&author, "writer");
    assert_eq!(world.submit(conn, unit([of("n1", &[&author.edit("n1")])])).refused, []);
    let mut phone = Phone::new(2, SCHEMA);
    phone.join(&mut world, "writer");
    for title in titles {
        phone.write(&world, &[edit("n1", vec![set("title", json!(title))])]).unwrap();
        phone.talk(&mut world);
    }
    lose_all(&mut world, SCHEMA);
    (world, phone)
}

/// One who has come back, and can't bring them without that.
fn waits_for_another(titles: impl Iterator<Item = String>) -> (World, Phone) {
    let (mut world, mut phone) = wrote_on_anothers(titles);
    phone.join(&mut world, "writer");
    assert!(matches!(phone.replica.held().unwrap(), Some(Held::MissingAtRelay { .. })));
    (world, phone)
}

/// It may bring what others wrote now, and more than a unit takes of what it wrote itself waits for that.
#[test]
fn what_may_be_brought_now_goes_before_what_builds_on_it() {
    let title = |seed: u64| -> String {
        (0..1000).map(|block| blake3::hash(&(seed * 10_000 + block).to_be_bytes()).to_string()).collect()
    };
    let (mut world, mut phone) = waits_for_another((0..8).map(title));
    phone.join(&mut world, "admin");
    assert_eq!((phone.replica.status().pending, phone.replica.held().unwrap()), (0, None));
    assert_eq!(phone.replica.status().lacking, 0);
}

/// Nor does the child leave alone while its parent is not durable.
#[test]
fn what_may_be_brought_now_is_waited_for_until_it_is_durable() {
    let (mut world, mut phone) = waits_for_another(std::iter::once("mine".to_owned()));
    phone.replica.refresh(token("admin"));
    phone.talk(&mut world);
    assert_eq!((phone.replica.status().pending, phone.replica.held().unwrap()), (0, None));
    assert_eq!(phone.replica.status().lacking, 0);
}

/// Nor where the child was the last that the store made durable.
#[test]
fn what_may_be_brought_now_is_waited_for_when_nothing_else_was_written() {
    let (mut world, mut phone) = wrote_on_anothers(std::iter::once("mine".to_owned()));
    sign_in_anew(&mut phone, &mut world, "writer", 0);
    let sends = |phone: &mut Phone, world: &mut World| {
        let mut sent = Vec::new();
        while let Some(output) = phone.replica.poll_output() {
            let replica::Output::Send(bytes) = output else { continue };
            sent.extend(Message::decode(&bytes).unwrap());
            world.handle(Input::Received { conn: phone.conn, bytes });
        }
        for message in world.settle(phone.conn) {
            if !matches!(message, Message::Welcome(_)) {
                phone.replica.receive(world.now, message).unwrap();
            }
        }
        sent.iter().any(|message| matches!(message, Message::Changes(_)))
    };
    let mut durable = phone.store.flush();
    for _ in 0..5 {
        sends(&mut phone, &mut world);
    }
    assert_eq!((phone.replica.status().pending, phone.replica.status().lacking), (1, 1));
    // The child leaves when just it is durable, and is told to wait.
    while !sends(&mut phone, &mut world) {
        durable.0 += 1;
        assert!(durable <= phone.replica.last_commit(), "it does not leave");
        phone.replica.durable(durable).unwrap();
    }
    phone.replica.refresh(token("admin"));
    for _ in 0..5 {
        assert!(!sends(&mut phone, &mut world));
    }
    assert_eq!(phone.replica.status().lacking, 0, "the parent is to be brought");
    phone.talk(&mut world);
    assert_eq!((phone.replica.status().pending, phone.replica.held().unwrap()), (0, None));
    assert_eq!(phone.replica.status().lacking, 0);
}

/// What the relay did not take is offered once in a session, however often the grant is renewed.
#[test]
fn a_grant_that_is_renewed_as_it_was_brings_nothing_again() {
    let (mut world, _, mut admin) = lost_by_the_relay();
    let changes = offers(&mut admin, &mut world, "admin");
    admin.hear(&world, refusing(&changes, &[("n1", RefusalCode::ForgedAuthor)]));
    // Once it was found to be lacking, and once as it is looked at what is.
    admin.replica.confirm();
    let changes = asked(&mut admin, &mut world);
    admin.hear(&world, refusing(&changes, &[("n1", RefusalCode::ForgedAuthor)]));
    admin.talk(&mut world);
    assert_eq!((admin.replica.status().pending, admin.replica.status().lacking), (0, 1));
    admin.replica.refresh(token("admin"));
    admin.talk(&mut world);
    assert_eq!((admin.replica.status().pending, admin.replica.status().lacking), (0, 1));
    // With another right there may be more to bring.
    admin.replica.refresh(token("authority"));
    admin.talk(&mut world);
    assert_eq!((admin.replica.status().pending, admin.replica.status().lacking), (0, 0));
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
    for (lacking, damaged) in
        [false, true].iter().flat_map(|lacking| [(*lacking, Keyspace::DOC), (*lacking, Keyspace::HEADER)])
    {
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
        damage_one(&phone, damaged, "n1");
        restart(&mut phone, SCHEMA);
        phone.join(&mut world, "writer");
        assert_eq!((phone.replica.status().lacking, phone.replica.held().unwrap()), (2, None));
        let mut third = Phone::new(3, SCHEMA);
        third.join(&mut world, "writer");
        assert!(third.row("n3").is_some() && third.row("n2").is_none());
        assert_eq!(phone.replica.verify(world.now, 1000, true).unwrap().faults.len(), 1);
        phone.store.flush();
        // Whose changes they were is not to be read any more where the headers are damaged.
        let lost = Vec::from_iter((damaged == Keyspace::DOC).then_some("n1"));
        assert_eq!(told(&phone), lost);
        assert_eq!(phone.replica.status().lacking, 1);
    }
}

const TEXT: &str = r#"
[note]
version = 1
[note.fields]
title = { type = "string" }
body = { type = "text" }
"#;

/// It was numbered after a text that comes beside it, and which the relay did not have when it looked.
#[test]
fn an_edit_of_an_older_version_comes_back() {
    for who in ["writer", "admin"] {
        let mut world = World::strict();
        give_schema(&mut world, TEXT);
        let mut author = Phone::new(1, TEXT);
        let mut admin = Phone::new(2, TEXT);
        author.join(&mut world, "writer");
        admin.join(&mut world, "admin");
        author.write(&world, &[edit("n1", vec![set("title", json!("x"))])]).unwrap();
        author.talk(&mut world);
        let read = replica::parse_version(&author.row("n1").unwrap().version).unwrap();
        let insert = "x".repeat(1500);
        let long = Intent::Splice { field: "body".into(), at: 0, delete: 0, insert };
        author.write(&world, &[edit("n1", vec![long])]).unwrap();
        author.talk(&mut world);
        let title = edit("n1", vec![set("title", json!("y"))]);
        author.write(&world, &[Edit { based_on: Some(read), ..title }]).unwrap();
        author.talk(&mut world);
        admin.talk(&mut world);
        lose_all(&mut world, TEXT);
        let phone = if who == "writer" { &mut author } else { &mut admin };
        phone.join(&mut world, who);
        assert_eq!((phone.replica.status().pending, told(phone)), (0, vec![]), "{who}");
        assert_eq!(phone.row("n1").unwrap().fields["title"], json!("y"), "{who}");
        let mut third = Phone::new(3, TEXT);
        third.join(&mut world, "writer");
        assert_eq!(third.row("n1").unwrap().fields["title"], json!("y"), "{who}");
    }
}

/// The app and the relay are of an older schema by now: what waits of a type that neither knows is refused, and keeps
/// nothing else from being sent.
#[test]
fn what_waits_of_a_type_that_is_gone_is_refused() {
    for once_taken in [false, true] {
        let both =
            format!("{SCHEMA}\n[extra]\nversion = 1\n[extra.fields]\ntitle = {{ type = \"string\" }}\n");
        let mut world = World::strict();
        give_schema(&mut world, &both);
        let mut phone = Phone::new(1, &both);
        phone.join(&mut world, "writer");
        let title = |id| edit(id, vec![set("title", json!("x"))]);
        if !once_taken {
            phone.replica.disconnect();
        }
        phone.write(&world, &[Edit { key: key("extra", "e1"), ..title("e1") }]).unwrap();
        phone.write(&world, &[title("n1")]).unwrap();
        phone.store.flush();
        if once_taken {
            phone.talk(&mut world);
            lose_all(&mut world, &both);
            offers(&mut phone, &mut world, "writer");
        }
        lose_all(&mut world, SCHEMA);
        phone.schema = Arc::new(Schema::parse(SCHEMA, "older.toml").unwrap());
        restart(&mut phone, SCHEMA);
        phone.join(&mut world, "writer");
        assert_eq!(
            (phone.replica.status().pending, told(&phone)),
            (0, vec!["e1".to_owned()]),
            "{once_taken}"
        );
        assert!(world.whole_feed().iter().any(|entry| matches!(entry.body, FeedBody::Changes { .. })));
    }
}

/// What the relay has of it by another name can't be put in its place before the type is known again.
#[test]
fn what_waits_of_a_type_that_is_gone_does_not_count_twice() {
    let both = format!(
        "{SCHEMA}\n[extra]\nversion = 1\n[extra.fields]\nstars = {{ type = \"int\", merge = \"counter\" }}\n"
    );
    let extra = key("extra", "e1");
    let mut world = World::strict();
    give_schema(&mut world, &both);
    let mut phone = Phone::new(1, &both);
    phone.join(&mut world, "writer");
    let add = Intent::Increment { field: "stars".into(), by: 1 };
    phone.write(&world, &[Edit { key: extra.clone(), ..edit("e1", vec![add]) }]).unwrap();
    let was = change_of(&asked(&mut phone, &mut world), "e1", 0);
    let draft = Draft { increments: Some("stars"), ..made_again(&was) };
    let again = other_life(1, Incarnation::new(7, 0)).write_in(&extra, draft);
    let genesis = vec![("stars".into(), GenesisKind::Counter.code())];
    let part = EntityChanges { genesis, ..of_entity(&extra, &[&again]) };
    let admin = world.join(&Device::new(9), "admin");
    assert_eq!(world.submit(admin, unit([part])).refused, []);
    phone.schema = Arc::new(Schema::parse(SCHEMA, "older.toml").unwrap());
    restart(&mut phone, SCHEMA);
    sign_in_anew(&mut phone, &mut world, "writer", 0);
    while let Some(output) = phone.replica.poll_output() {
        let replica::Output::Send(bytes) = output else { continue };
        world.handle(Input::Received { conn: phone.conn, bytes });
    }
    let told = world.settle(phone.conn).into_iter().filter(|message| !matches!(message, Message::Welcome(_)));
    let heard: Result<(), _> =
        told.into_iter().try_for_each(|message| phone.replica.receive(world.now, message));
    assert!(heard.unwrap_err().to_string().contains("no type"));
    phone.schema = Arc::new(Schema::parse(&both, "newer.toml").unwrap());
    restart(&mut phone, &both);
    phone.join(&mut world, "writer");
    assert_eq!((phone.replica.status().pending, phone.replica.held().unwrap()), (0, None));
    assert_eq!(phone.rows().get(&extra).unwrap().unwrap().fields["stars"], json!(1));
}
