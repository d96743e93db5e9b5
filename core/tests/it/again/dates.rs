//! How what is made again is dated.

use anabranch_core::admission::RefusalCode;
use anabranch_core::change::Change;
use anabranch_core::clock::Hlc;
use anabranch_core::replica::{self, Edit};
use anabranch_core::wire::*;
use serde_json::json;

use crate::support::phone::*;
use crate::support::*;

use super::*;

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
        sign_in_anew(&mut phone, &mut world, "writer", set_back_ms);
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
        sign_in_anew(&mut phone, &mut world, "writer", before_ms);
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
        sign_in_anew(&mut phone, &mut world, "writer", after_ms);
        asked(&mut phone, &mut world);
        assert_eq!(phone.row("n1").unwrap().fields["title"], json!("second"), "{after_ms}");
    }
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
    sign_in_anew(&mut phone, &mut world, "writer", 0);
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

/// The relay's clock was set back by more than this device had measured, which shows only when it is measured anew.
#[test]
fn an_edit_that_the_relay_finds_too_late_is_dated_by_the_next_measurement() {
    const BACK_MS: i64 = 20 * 60 * 1000;
    let mut world = World::with_schema();
    let mut phone = Phone::new(1, SCHEMA);
    sign_in_anew(&mut phone, &mut world, "writer", 0);
    phone.talk(&mut world);
    phone.write(&world, &[edit("n1", vec![set("title", json!("x"))])]).unwrap();
    let mut changes = asked(&mut phone, &mut world);
    for ahead_ms in [0, -BACK_MS] {
        sign_in_anew(&mut phone, &mut world, "writer", ahead_ms);
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
