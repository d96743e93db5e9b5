//! Who is told that an acknowledged edit is lost, and who is not.

use anabranch_core::admission::RefusalCode;
use anabranch_core::change::Change;
use anabranch_core::id::Incarnation;
use anabranch_core::relay::Input;
use anabranch_core::replica::Edit;
use anabranch_core::store::Keyspace;
use anabranch_core::wire::*;
use serde_json::json;

use crate::support::phone::*;
use crate::support::*;

use super::*;

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
    damage_one(&phone, Keyspace::DOC, "n1");
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
    damage_one(&phone, Keyspace::DOC, "n1");
    restart(&mut phone, &newer());
    let number = phone.rows().refused().unwrap()[0].0;
    assert!(phone.replica.dismiss(number).unwrap());
    assert!(!phone.replica.dismiss(number).unwrap(), "it is gone");
    phone.store.flush();
    assert_eq!((phone.replica.status().refused, phone.rows().refused().unwrap().len()), (1, 1));
}
