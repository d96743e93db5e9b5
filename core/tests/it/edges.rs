//! What peers do at the edges of what they may, each told as a story: strangers that cost more than they
//! say, names that are taken before anyone knows whose they are, ids that are copied.

use std::sync::Arc;

use crate::support::phone::*;
use crate::support::*;
use anabranch_core::admission::RefusalCode;
use anabranch_core::change::Change;
use anabranch_core::genesis::{Genesis, GenesisKind};
use anabranch_core::intent::Intent;
use anabranch_core::relay::{ConnId, Input, Output, RelayConfig};
use anabranch_core::replica::{self, Edit, WriteError};
use anabranch_core::store::{Keyspace, Store, View};
use anabranch_core::wire::*;
use automerge::ChangeHash;
use automerge::legacy::OpId;
use serde_json::json;

/// A message whose body is zeros: few bytes of the wire.
fn zeros(kind: u8, length: usize) -> Vec<u8> {
    let packed = zstd::bulk::compress(&vec![0; length], 19).unwrap();
    [&[kind, 3][..], &(length as u32).to_le_bytes(), &packed].concat()
}

fn closed(outputs: &[Output]) -> Option<FaultCode> {
    outputs.iter().find_map(|output| match output {
        Output::Close { code, .. } => Some(*code),
        _ => None,
    })
}

#[test]
fn what_a_stranger_sends_is_not_inflated() {
    const CHANGES: u8 = 6;
    const FEED: u8 = 8;
    for kind in [CHANGES, FEED, 1, 3, 5, 10, 13] {
        let bomb = zeros(kind, MESSAGE_BYTES_MAX);
        assert!(bomb.len() < STRANGER_BYTES_MAX, "the transport lets it in");
        for greeted in [false, true] {
            let mut world = World::strict();
            let device = Device::new(1);
            let conn = if greeted { world.greet(&device) } else { world.connect(&device) };
            world.outputs(conn);
            world.handle(Input::Received { conn, bytes: bomb.clone() });
            assert!(closed(&world.outputs(conn)).is_some(), "{kind} {greeted}");
        }
    }
    // The changes of who has not signed in are not looked at, however few.
    let mut world = World::strict();
    let conn = world.greet(&Device::new(1));
    world.send(conn, changes(unit([of("n1", &[&Device::new(1).edit("n1")])])));
    assert_eq!(closed(&world.outputs(conn)), Some(FaultCode::NotSignedIn));
}

#[test]
fn who_signs_in_and_asks_in_one_breath_is_heard() {
    let mut world = World::with_schema();
    let mut device = Device::new(1);
    let conn = world.connect(&device);
    // Nothing of it is durable before the last of it is said.
    world.send(conn, hello());
    world.send(conn, sign_in(Some(&token("writer"))));
    world.send(conn, open_from(0));
    let long = Draft { title: "x".repeat(100 * 1024), ..Draft::default() };
    world.send(conn, changes(unit([of("n1", &[&device.write("n1", long)])])));
    let told = world.settle(conn);
    assert_eq!(faults(&told), []);
    assert!(told.iter().any(|message| matches!(message, Message::Ack(ack) if ack.refused.is_empty())));
    assert!(caught_up(&told).is_some());
}

#[test]
fn who_can_sign_in_nowhere_is_told_for_each_workspace_and_not_for_ever() {
    let mut world = World::strict();
    let conn = world.greet(&Device::new(1));
    let channels = RelayConfig::default().channels_max as u32;
    for channel in 1..=channels {
        world.send(conn, SignIn { channel, ..sign_in(Some("nonsense")) });
        world.send(conn, Open { channel, ..open_from(0) });
    }
    let told = world.outputs(conn);
    assert_eq!(closed(&told), None, "an honest device whose tokens are all too old");
    let mut asked = 0;
    while closed(&world.outputs(conn)).is_none() {
        world.send(conn, sign_in(Some("nonsense")));
        asked += 1;
        assert!(asked < 1_000, "for ever");
    }
}

#[test]
fn a_device_is_not_renamed_more_than_once_an_hour() {
    let mut world = World::strict();
    let device = Device::new(1);
    let names = |world: &mut World| -> Vec<String> {
        let mut names = Vec::new();
        for entry in world.whole_feed() {
            if let FeedBody::Device { key, name, .. } = entry.body
                && key == Device::new(1).id().0
            {
                names.push(name);
            }
        }
        names
    };
    let conn = world.greet(&device);
    let asked = |name: &str| SignIn { device_name: name.into(), ..sign_in(Some(&token("reader"))) };
    for _ in 0..100 {
        for name in ["ann's", "bea's"] {
            world.send(conn, asked(name));
        }
    }
    world.settle(conn);
    assert_eq!(names(&mut world), ["ann's", "bea's"]);
    world.pass(60 * 60 * 1000);
    world.send(conn, asked("cleo's"));
    world.settle(conn);
    assert_eq!(names(&mut world), ["ann's", "bea's", "cleo's"]);
}

const GROUPED: &str = r#"
[note]
version = 1
[note.fields]
title = { type = "string", merge = "manual", group = "plan" }
"#;

/// A group with a member that no schema knows, so many levels deep.
fn grouped(title: &str, depth: usize) -> Draft {
    let deep = format!("{}{}", "[".repeat(depth), "]".repeat(depth));
    let group = format!("{{\"title\":\"{title}\",\"zz\":{deep}}}");
    Draft { title: group, field: "#plan", ..Draft::default() }
}

#[test]
fn members_of_a_group_that_nobody_knows_are_bounded() {
    let mut world = World::strict();
    let admin = world.join(&Device::new(99), "admin");
    world.send(admin, PushSchema { channel: 1, source: GROUPED.into() });
    let mut device = Device::new(1);
    let conn = world.join(&device, "writer");
    let fits = device.write("n1", grouped("a", 64));
    assert_eq!(world.submit(conn, unit([of("n1", &[&fits])])).refused, []);
    let deep = device.write("n2", grouped("a", 65));
    assert_eq!(codes(&world.submit(conn, unit([of("n2", &[&deep])]))), [RefusalCode::Validation]);
    let long = Draft {
        title: format!("{{\"title\":\"a\",\"zz\":\"{}\"}}", "x".repeat(1024 * 1024)),
        ..grouped("a", 1)
    };
    let long = device.write("n3", long);
    assert_eq!(codes(&world.submit(conn, unit([of("n3", &[&long])]))), [RefusalCode::Validation]);
}

/// A relay that knew no schema took what nests as deep as can be read at all. What stands around it in a
/// record makes it deeper.
#[test]
fn one_record_that_cannot_be_read_hides_no_other() {
    let mut world = World::lenient();
    for (number, title) in [(1, "a"), (2, "b")] {
        let mut device = Device::new(number);
        let conn = world.join(&device, "writer");
        for (id, depth) in [("deep", 125), ("flat", 1)] {
            let change = device.write(id, grouped(title, depth));
            assert_eq!(world.submit(conn, unit([of(id, &[&change])])).refused, []);
        }
    }
    let mut phone = Phone::new(3, GROUPED);
    phone.join(&mut world, "writer");
    assert_eq!(phone.replica.status().conflicts, 2);
    let conflicts = phone.rows().conflicts().unwrap();
    let of: Vec<&str> = conflicts.iter().map(|(key, _)| key.id()).collect();
    assert_eq!(of, ["flat"]);
}

/// Notes with many counters: each is named by its field in every change that needs it.
fn counting() -> String {
    let fields: String =
        (0..4).map(|n| format!("{} = {{ type = \"int\", merge = \"counter\" }}\n", counter(n))).collect();
    format!("[note]\nversion = 1\n[note.fields]\n{fields}")
}

fn counter(number: usize) -> String {
    format!("counter_{number:0>2}_{}", "x".repeat(53))
}

fn import(notes: usize) -> Vec<Edit> {
    let all = || (0..4).map(|n| Intent::Increment { field: counter(n), by: 1 }).collect();
    (0..notes).map(|n| edit(&format!("{n:0>250}"), all())).collect()
}

#[test]
fn no_transaction_is_written_that_the_relay_would_never_take() {
    let mut world = World::strict();
    let source = counting();
    let admin = world.join(&Device::new(99), "admin");
    world.send(admin, PushSchema { channel: 1, source: source.clone() });
    let mut phone = Phone::new(1, &source);
    let refused = phone.write(&world, &import(5_600)).unwrap_err();
    let WriteError::TooLarge(limit) = &refused else { panic!("{refused}") };
    assert_eq!(limit.what, "bytes with names and containers", "{limit}");
    assert!(refused.to_string().contains("split it"), "{refused}");
    // The largest that it takes goes through.
    let mut notes = 5_600;
    while phone.write(&world, &import(notes)).is_err() {
        notes -= 500;
    }
    assert!(notes > 1_000, "{notes}");
    phone.join(&mut world, "writer");
    assert_eq!(phone.replica.status().pending, 0, "all of it was admitted");
    assert_eq!(world.whole_feed().len(), notes.min(1) + 4, "as one entry");
}

/// Says of a note's title that it is a counter.
fn named(part: EntityChanges) -> EntityChanges {
    EntityChanges { genesis: vec![("title".into(), GenesisKind::Counter.code())], ..part }
}

/// Without a schema a relay believes what it is told of fields. With it, those are what it says.
#[test]
fn a_field_that_was_named_a_container_is_what_the_schema_says() {
    let mut world = World::lenient();
    let mut hostile = Device::new(1);
    let other = world.join(&hostile, "writer");
    let counted = || Draft { increments: Some("title"), ..Draft::default() };
    let change = hostile.write("n1", counted());
    assert_eq!(world.submit(other, unit([named(of("n1", &[&change]))])).refused, []);

    let mut phone = Phone::new(2, SCHEMA);
    phone.join(&mut world, "admin");
    assert_ne!(world.relay.digest(&home()).unwrap(), None);
    for title in ["mine", "mine again"] {
        phone.write(&world, &[edit("n1", vec![set("title", json!(title))])]).unwrap();
        phone.talk(&mut world);
        assert_eq!(phone.replica.status().pending, 0, "{title}");
        assert_eq!(phone.row("n1").unwrap().fields["title"], json!(title));
    }
    // Nor does it go on as a container.
    let change = hostile.write("n1", counted());
    assert_eq!(codes(&world.submit(other, unit([named(of("n1", &[&change]))]))), [RefusalCode::BadShape]);

    // Those who come later see the same, and may write it too.
    let mut later = Phone::new(3, SCHEMA);
    later.join(&mut world, "writer");
    assert_eq!(later.row("n1").unwrap().fields["title"], json!("mine again"));
    later.write(&world, &[edit("n1", vec![set("title", json!("theirs"))])]).unwrap();
    later.talk(&mut world);
    phone.talk(&mut world);
    assert_eq!(phone.row("n1").unwrap().fields["title"], json!("theirs"));
    assert_eq!(later.replica.held().unwrap(), None);
    assert_eq!(phone.replica.held().unwrap(), None);
}

/// What is no part of the container is looked at as if nobody had named one.
#[test]
fn writes_beside_a_named_container_are_looked_at_as_ever() {
    let mut world = World::lenient();
    let mut hostile = Device::new(1);
    let other = world.join(&hostile, "writer");
    let change = hostile.write("n1", Draft { increments: Some("title"), ..Draft::default() });
    assert_eq!(world.submit(other, unit([named(of("n1", &[&change]))])).refused, []);
    // While there is no schema, it is what it was named, and nothing is put in its place.
    let early = Device::new(2).edit("n1");
    let conn = world.join(&Device::new(2), "writer");
    assert_eq!(codes(&world.submit(conn, unit([of("n1", &[&early])]))), [RefusalCode::BadShape]);

    let admin = world.join(&Device::new(9), "admin");
    world.send(admin, PushSchema { channel: 1, source: SCHEMA.into() });
    // Who never heard of it writes the field.
    let mut honest = Device::new(3);
    let conn = world.join(&honest, "writer");
    let first = honest.edit("n1");
    assert_eq!(world.submit(conn, unit([of("n1", &[&first])])).refused, []);
    // Who has not seen that does not replace it.
    let mut blind = Device::new(4);
    let conn = world.join(&blind, "writer");
    let container = Genesis::new("note", "title", GenesisKind::Counter);
    for (replaced, why) in [
        (OpId::new(first.start_op(), first.actor()), "can't have seen"),
        (container.op_id(), "had not begun where its author was"),
    ] {
        let blindly = blind.write("n1", Draft { replaces: vec![replaced], ..Draft::default() });
        let ack = world.submit(conn, unit([of("n1", &[&blindly])]));
        assert_eq!(codes(&ack), [RefusalCode::BadShape]);
        assert!(ack.refused[0].message.contains(why), "{}", ack.refused[0].message);
        blind = Device::new(4);
    }
}

/// Nor does a device judge by its older schema what the relay admitted by a newer one.
#[test]
fn a_field_that_was_named_a_container_is_a_register_to_who_does_not_know_it() {
    const OLDER: &str = r#"
[note]
version = 1
[note.fields]
stars = { type = "int", merge = "counter" }
"#;
    let counted = || Draft { increments: Some("title"), ..Draft::default() };
    {
        let mut world = World::lenient();
        let mut hostile = Device::new(1);
        let other = world.join(&hostile, "writer");
        let mut phone = Phone::new(2, SCHEMA);
        phone.join(&mut world, "writer");
        phone.write(&world, &[edit("n1", vec![set("title", json!("first"))])]).unwrap();
        phone.talk(&mut world);
        let change = hostile.write("n1", counted());
        assert_eq!(world.submit(other, unit([named(of("n1", &[&change]))])).refused, []);
        phone.join(&mut world, "admin");
        phone.talk(&mut world);
        let stars = Intent::Increment { field: "stars".into(), by: 5 };
        phone.write(&world, &[edit("n1", vec![set("title", json!("mine")), stars])]).unwrap();
        phone.talk(&mut world);
        assert_eq!((phone.replica.status().pending, phone.rows().refused().unwrap()), (0, vec![]));

        let mut older = Phone::new(3, OLDER);
        older.join(&mut world, "writer");
        older.talk(&mut world);
        assert_eq!(older.replica.held().unwrap(), None);
        assert_eq!(older.row("n1").unwrap().fields["stars"], json!(5));
        assert_eq!(phone.row("n1").unwrap().fields["title"], json!("mine"));
    }
}

#[test]
fn what_a_device_is_told_of_containers_is_bounded() {
    let world = World::lenient();
    let mut phone = Phone::new(1, SCHEMA);
    let mut other = Device::new(2);
    let change = other.edit("n1");
    let genesis = (0..5_000).map(|n| (format!("f{n}"), 1)).chain([("no field".into(), 1)]).collect();
    let body = FeedBody::Changes {
        author: other.id().0,
        unit: unit([EntityChanges { genesis, ..of("n1", &[&change]) }]),
    };
    phone.hear(&world, Feed { channel: 1, entries: vec![FeedEntry { seq: 1, body }], end: 1 });
    assert!(phone.row("n1").is_some());
    let records = phone.store.scan(View::Latest, Keyspace::ENTITY, &[], &[], 100).unwrap();
    let stored: usize = records.iter().map(|(_, value)| value.len()).sum();
    assert!(stored < 16 * 1024, "{stored} bytes");
}

/// Members of two transactions that say the same id: the second was written by who had read the first.
fn copied() -> (Vec<EntityChanges>, Vec<EntityChanges>) {
    let write = |device: u8, ids: &[&str]| {
        let mut device = Device::new(device);
        let members = ids.len() as u32;
        ids.iter().map(|id| of(id, &[&device.write(id, in_tx(7, members))])).collect::<Vec<_>>()
    };
    (write(1, &["a", "b"]), write(2, &["c", "d", "e"]))
}

#[test]
fn a_copied_id_of_a_transaction_tears_nothing_at_the_relay() {
    let mut world = World::with_schema();
    let conn = world.join(&Device::new(9), "authority");
    let (honest, copy) = copied();
    // One who brings what others wrote brings both in one unit.
    let ack = world.submit(conn, unit(honest.iter().chain(&copy).cloned()));
    assert_eq!(ack.refused, []);
    // Half of the copy is none of the other's business.
    let mut world = World::with_schema();
    let conn = world.join(&Device::new(9), "authority");
    let ack = world.submit(conn, unit(honest.iter().chain(&copy[..2]).cloned()));
    assert_eq!(codes(&ack), [RefusalCode::Transaction; 2]);
    assert!(ack.refused.iter().all(|refused| ["c", "d"].contains(&&*refused.id)));
}

/// What a relay lost is brought again later: the rest of the transaction must not be refused for good.
#[test]
fn a_member_that_builds_on_what_is_lost_is_not_the_end_of_the_others() {
    let mut world = World::with_schema();
    let mut device = Device::new(1);
    let conn = world.join(&device, "writer");
    let lost = device.edit("d");
    let members = [device.write("c", in_tx(7, 2)), device.write("d", in_tx(7, 2))];
    let whole = unit([of("c", &[&members[0]]), of("d", &[&members[1]])]);
    assert_eq!(codes(&world.submit(conn, whole.clone())), [RefusalCode::MissingDependency; 2]);
    assert_eq!(world.submit(conn, unit([of("d", &[&lost])])).refused, []);
    assert_eq!(world.submit(conn, whole).refused, []);
}

/// Those who have it from a feed that the relay lost hear of each member by itself: half of it must not stay.
/// A transaction of an edit that is refused for good and one that only waits, sent by this connection.
fn is_refused_whole_for_good(
    world: &mut World,
    conn: ConnId,
    device: &mut Device,
    unfit: Draft,
    code: RefusalCode,
) {
    let first = device.edit("d");
    assert_eq!(world.submit(conn, unit([of("d", &[&first])])).refused, []);
    let lost = device.edit("d");
    let members = [device.write("c", unfit), device.write("d", in_tx(7, 2))];
    let whole = unit([of("c", &[&members[0]]), of("d", &[&members[1]])]);
    let both = [code, RefusalCode::Transaction];
    assert_eq!(codes(&world.submit(conn, whole.clone())), both);
    let told = world.whole_feed().into_iter().filter(|entry| matches!(entry.body, FeedBody::Refused(_)));
    assert_eq!(told.count(), 2);
    assert_eq!(world.submit(conn, unit([of("d", &[&lost])])).refused, []);
    assert_eq!(codes(&world.submit(conn, whole)), both, "it stays so");
}

/// Found by the simulator (seed 3822).
#[test]
fn a_transaction_is_refused_for_good_with_those_that_only_wait() {
    let mut world = World::with_schema();
    let mut device = Device::new(1);
    let conn = world.join(&device, "writer");
    let unfit = Draft { field: "nothing", ..in_tx(7, 2) };
    is_refused_whole_for_good(&mut world, conn, &mut device, unfit, RefusalCode::UnknownField);

    // Who knows of a change that waits, and copies the id, does it no harm.
    let mut honest = Device::new(2);
    let missing = honest.edit("e");
    let waits = honest.write("e", in_tx(8, 1));
    let copy = device.write("f", Draft { field: "nothing", ..in_tx(8, 1) });
    let mixed = unit([of("e", &[&waits]), of("f", &[&copy])]);
    let told: Vec<RefusalCode> = codes(&world.submit(conn, mixed));
    assert!(told.contains(&RefusalCode::UnknownField), "{told:?}");
    let other = world.join(&honest, "writer");
    assert_eq!(world.submit(other, unit([of("e", &[&missing, &waits])])).refused, []);
}

/// So it is when somebody who vouches for its author brings it.
#[test]
fn a_transaction_that_another_brings_is_refused_for_good_with_those_that_only_wait() {
    let mut world = World::with_schema();
    let conn = world.join(&Device::new(9), "admin");
    // A text in the place of a counter: no schema to come allows that.
    let unfit = Draft { field: "stars", ..in_tx(7, 2) };
    is_refused_whole_for_good(&mut world, conn, &mut Device::new(1), unfit, RefusalCode::BadShape);
}

/// A member that was made again is durable later than the others, and marked as sent later still: the others were
/// sent without it, and all of them refused.
#[test]
fn a_transaction_leaves_whole_whenever_its_members_are_ready() {
    let mut world = World::with_schema();
    let mut phone = Phone::new(1, SCHEMA);
    phone.join(&mut world, "writer");
    let ids = ["a", "b", "c"];
    let all = |title: &str| -> Vec<Edit> {
        ids.iter().map(|id| edit(id, vec![set("title", json!(title))])).collect()
    };
    // Large, so that each is a unit of its own.
    for created in all(&"x".repeat(300_000)) {
        phone.write(&world, &[created]).unwrap();
    }
    phone.write(&world, &all("whole")).unwrap();
    // What they build on is refused, one by one.
    let mut units = Vec::new();
    loop {
        phone.replica.durable(phone.store.flush()).unwrap();
        let mut answers = Vec::new();
        while let Some(output) = phone.replica.poll_output() {
            let replica::Output::Send(bytes) = output else { continue };
            let Ok(Some(Message::Changes(asked))) = Message::decode(&bytes) else { continue };
            let refuse = |part: &EntityChanges, bytes: &[u8]| Refused {
                type_name: part.type_name.clone(),
                id: part.id.clone(),
                hash: Change::parse(bytes).unwrap().hash().0,
                code: RefusalCode::Validation as u16,
                message: "no".into(),
            };
            let parts = || asked.unit.entities.iter();
            units.push(parts().map(|part| part.changes.len()).sum::<usize>());
            let refused = parts().flat_map(|part| part.changes.iter().map(|bytes| refuse(part, bytes)));
            answers.push(Ack { channel: 1, unit_id: asked.unit_id, seq: 0, refused: refused.collect() });
        }
        if answers.is_empty() {
            break;
        }
        for answer in answers {
            phone.hear(&world, answer);
        }
    }
    assert_eq!(units, [1, 1, 1, 3], "the transaction goes once, and whole");
}

/// A change that is made again says more: of which edit it is, by whom, and whose values it replaces.
#[test]
fn the_largest_transaction_is_taken_when_it_is_made_again_too() {
    let mut world = World::with_schema();
    let mut phone = Phone::new(1, SCHEMA);
    phone.join(&mut world, "writer");
    let ids: Vec<String> = (0..30).map(|n| n.to_string()).collect();
    let all = |title: &str| -> Vec<Edit> {
        ids.iter().map(|id| edit(id, vec![set("title", json!(title))])).collect()
    };
    phone.write(&world, &all("small")).unwrap();
    phone.talk(&mut world);
    assert_eq!(phone.replica.status().pending, 0);
    phone.replica.disconnect();
    let mut length = UNIT_BYTES_MAX / ids.len();
    while phone.write(&world, &all(&"x".repeat(length))).is_err() {
        length -= 4;
    }
    // Somebody has a newer store of this device.
    let newer = world.greet(&phone.device);
    world.send(newer, SignIn { sent: 9_999, ..sign_in(Some(&token("writer"))) });
    world.settle(newer);
    phone.join(&mut world, "writer");
    phone.talk(&mut world);
    assert_eq!((phone.replica.status().pending, phone.rows().refused().unwrap()), (0, vec![]));
    let taken = world.whole_feed().into_iter().filter(|entry| match &entry.body {
        FeedBody::Changes { unit, .. } => unit.entities.len() == ids.len(),
        _ => false,
    });
    assert_eq!(taken.count(), 2);
}

/// Transactions of two authors with one id and as many members, each as large as a unit may be: who brings them
/// again sends them as two.
#[test]
fn a_copied_id_of_a_transaction_is_brought_again_by_itself() {
    let mut world = World::with_schema();
    let title: String = "x".repeat(200_000);
    for (number, ids) in [(1u8, ["a", "b"]), (2, ["c", "d"])] {
        let conn = world.join(&Device::new(number), "writer");
        let mut device = Device::new(number);
        let members = ids.map(|id| {
            // Ten large changes of each entity, the last of them a member.
            let large = || Draft { title: format!("{id}{title}"), ..Draft::default() };
            let mut all: Vec<Change> = (0..9).map(|_| device.write(id, large())).collect();
            all.push(device.write(id, Draft { title: title.clone(), ..in_tx(7, 2) }));
            all
        });
        let parts = ids.iter().zip(&members).map(|(id, all)| of(id, &all.iter().collect::<Vec<_>>()));
        assert_eq!(world.submit(conn, unit(parts)).refused, []);
    }
    let mut phone = Phone::new(9, SCHEMA);
    phone.join(&mut world, "authority");
    world.store = Arc::default();
    world.crash(RelayConfig::default());
    phone.join(&mut world, "authority");
    phone.talk(&mut world);
    assert_eq!((phone.replica.status().pending, phone.replica.held().unwrap()), (0, None));
    assert!(["a", "b", "c", "d"].iter().all(|id| phone.row(id).is_some()));
    let together = world.whole_feed().into_iter().any(|entry| match entry.body {
        FeedBody::Changes { unit, .. } => {
            let has = |id: &str| unit.entities.iter().any(|part| part.id == id);
            has("a") && has("c") && unit.entities.iter().all(|part| part.changes.len() == 1)
        }
        _ => false,
    });
    assert!(!together, "members of both in one unit");
}

#[test]
fn a_copied_id_of_a_transaction_keeps_nobody_from_repairing_a_relay() {
    let mut world = World::with_schema();
    let (honest, copy) = copied();
    for (number, parts) in [(1, honest), (2, copy)] {
        let conn = world.join(&Device::new(number), "writer");
        assert_eq!(world.submit(conn, unit(parts)).refused, []);
    }
    let mut phone = Phone::new(9, SCHEMA);
    phone.join(&mut world, "authority");
    assert!(phone.row("a").is_some());
    // All is lost but what the phone holds.
    world.store = Arc::default();
    world.crash(RelayConfig::default());
    phone.join(&mut world, "authority");
    phone.talk(&mut world);
    let mut brought: Vec<String> = Vec::new();
    for entry in world.whole_feed() {
        if let FeedBody::Changes { unit, .. } = entry.body {
            brought.extend(unit.entities.into_iter().map(|part| part.id));
        }
    }
    brought.sort_unstable();
    assert_eq!(brought, ["a", "b", "c", "d", "e"]);
    assert_eq!(phone.replica.held().unwrap(), None);
}

#[test]
fn a_copied_id_of_a_transaction_tears_nothing_at_a_device() {
    let world = World::strict();
    let mut phone = Phone::new(3, SCHEMA);
    let (honest, _) = copied();
    let mut other = Device::new(2);
    let builds_on_unknown = Draft { onto: vec![(ChangeHash([9; 32]), 5)], ..in_tx(7, 2) };
    let copy = [of("c", &[&other.write("c", in_tx(7, 2))]), of("d", &[&other.write("d", builds_on_unknown)])];
    let unit = unit(honest.into_iter().chain(copy));
    let body = FeedBody::Changes { author: [9; 32], unit };
    phone.hear(&world, Feed { channel: 1, entries: vec![FeedEntry { seq: 1, body }], end: 1 });
    assert!(phone.row("a").is_some() && phone.row("b").is_some(), "it is whole");
    assert_eq!(phone.row("c"), None, "it waits for its other half");
}

/// Whoever names another's transaction in a change of its own, or speaks in its name, has that other's change
/// refused with it only if it may speak for the other.
#[test]
fn a_transaction_that_waits_is_not_ended_by_somebody_else() {
    let mut world = World::with_schema();
    let mut hostile = Device::new(1);
    let conn = world.join(&hostile, "writer");
    let refused = hostile.write("f", Draft { field: "nothing", ..Draft::default() });
    assert_eq!(codes(&world.submit(conn, unit([of("f", &[&refused])]))), [RefusalCode::UnknownField]);
    let mut honest = Device::new(2);
    let lost = honest.edit("e");
    let waits = honest.write("e", in_tx(8, 1));

    // It begins the other's actor as its own, or in the other's name.
    let actor = honest.author.actor(&home(), &key("note", "e"));
    let own = hostile.write("e", Draft { actor: Some(actor), ..Draft::default() });
    let beside = hostile.write("f", Draft { field: "nothing", ..in_tx(8, 1) });
    let mut mask = Device::new(2);
    let forged = mask.write("e", Draft { title: "forged".into(), ..Draft::default() });
    let below = mask.write("f", Draft { onto: vec![(refused.hash(), 1)], ..in_tx(8, 1) });
    for (begins, beside) in [(&own, &beside), (&forged, &below)] {
        let ack = world.submit(conn, unit([of("e", &[begins, &waits]), of("f", &[beside])]));
        let told = ack.refused.iter().find(|refused| refused.hash == waits.hash().0).unwrap();
        assert_ne!(told.code, RefusalCode::Transaction as u16);
    }
    let other = world.join(&honest, "writer");
    assert_eq!(world.submit(other, unit([of("e", &[&lost, &waits])])).refused, []);
}
