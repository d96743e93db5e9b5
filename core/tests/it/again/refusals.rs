//! What is refused for good: with what it takes along, and what its author reads.

use anabranch_core::admission::RefusalCode;
use anabranch_core::intent::Intent;
use anabranch_core::replica::Held;
use serde_json::json;

use crate::support::phone::*;
use crate::support::*;

use super::*;

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
