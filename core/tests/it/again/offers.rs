//! What is offered again, by whom, when, and what waits for it.

use anabranch_core::admission::RefusalCode;
use anabranch_core::change::Change;
use anabranch_core::genesis::GenesisKind;
use anabranch_core::id::Incarnation;
use anabranch_core::relay::Input;
use anabranch_core::replica::Held;
use anabranch_core::wire::*;
use serde_json::json;

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
