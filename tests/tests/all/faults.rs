//! Faults that were found by reading: each test is what a user would have lost.

use std::sync::Arc;

use anabranch_core::change::Role;
use anabranch_core::clock::{MonoMs, Now, WallMs};
use anabranch_core::entity::{EditContext, Entity};
use anabranch_core::id::{Author, DeviceId, EntityKey, Incarnation, WorkspaceId};
use anabranch_core::intent::Intent;
use anabranch_core::replica::{ChannelState, Edit, Expect, Output, Replica, ReplicaConfig, WriteError};
use anabranch_core::rows::Rows;
use anabranch_core::schema::Schema;
use anabranch_core::store::StoreError;
use anabranch_core::wire::{
    EntityChanges, Feed, FeedBody, FeedEntry, Grant, GrantRole, Granted, Message, Unit,
};
use anabranch_store::{FaultStore, MemoryStore};
use anabranch_tests::net::Net;
use anabranch_tests::world::START_MS;
use serde_json::{Value as Json, json};

pub(crate) const THINGS: &str = r#"
[thing]
version = 1
[thing.fields]
count  = { type = "int", merge = "counter" }
name   = { type = "string" }
only   = { type = "string", merge = "server_only" }
parent = { type = "ref", to = "thing" }
"#;

pub(crate) const START: Now = Now { mono: MonoMs(1_000), wall: WallMs(1_750_000_000_000) };

fn one_more() -> Intent {
    Intent::Increment { field: "count".into(), by: 1 }
}

pub(crate) fn set(field: &str, value: Json) -> Intent {
    Intent::Set { field: field.into(), value }
}

fn forbidden() -> Intent {
    set("only", json!("mine"))
}

fn under(parent: &str) -> Intent {
    set("parent", json!(parent))
}

fn count(net: &Net, node: usize, id: &str) -> Json {
    net.look(node, id).0.map_or(Json::Null, |row| row.fields["count"].clone())
}

pub(crate) fn alone(source: &str) -> ReplicaConfig {
    ReplicaConfig {
        workspace: WorkspaceId::new("home").unwrap(),
        device: DeviceId([1; 32]),
        device_name: "device".into(),
        platform: "test".into(),
        schema: Arc::new(Schema::parse(source, "test.toml").unwrap()),
        schema_source: source.to_owned(),
        assumed_role: Some(GrantRole::Writer),
        store_life: 0,
        seed: [1; 32],
    }
}

pub(crate) fn edit(id: &str, intents: &[Intent]) -> Edit {
    let key = EntityKey::new("thing", id).unwrap();
    Edit { key, intents: intents.to_vec(), based_on: None, expect: Expect::Any }
}

/// A relay went back and on by another way, past the place in its feed that a device had reached. Of a
/// transaction there the device could take the member that built on nothing it lacked.
#[test]
fn no_half_of_a_transaction_is_shown_that_a_relay_took_by_another_way() {
    let mut net = Net::new(THINGS, "thing", &[0, 0, 0]);
    net.connect(1);
    net.quiet();
    net.back_up_relay();
    for _ in 0..2 {
        net.write_plainly(0, "p", &[one_more()], true);
        net.quiet();
    }
    assert_eq!(count(&net, 1, "p"), json!(2));
    net.restore_relay(false);
    net.connect(2);
    net.quiet();
    net.write_plainly(2, "q", &[one_more()], true);
    net.quiet();
    let other = [set("name", json!("r"))];
    net.write_together(2, &[("q", &[one_more()]), ("r", &other)], true);
    net.quiet();
    net.connect(1);
    let mut moved = true;
    while moved {
        moved = net.deliver(1, true);
        net.flush_relay();
        moved |= net.deliver(1, false);
        net.flush(1);
        let (one, two) = (count(&net, 1, "q") == json!(2), net.look(1, "r").0.is_some());
        assert_eq!(one, two, "a transaction shows in one entity, and not in the other");
    }
    net.agree();
    assert_eq!(count(&net, 1, "q"), json!(2));
}

/// What is kept of an entity beside its document grows with the number of its writers, and outgrew what a store
/// takes as one value: a device that heard of them all stopped.
#[test]
fn an_entity_with_a_thousand_writers_is_kept() {
    let store = Arc::new(MemoryStore::new());
    let config = alone(THINGS);
    let mut replica = Replica::open(store.clone(), config.clone()).unwrap();
    replica.connect(1, None);
    replica.receive(START, granted()).unwrap();
    let entry = |number: u32| {
        let mut device = DeviceId([9; 32]);
        device.0[..4].copy_from_slice(&number.to_be_bytes());
        let (key, ty) = (EntityKey::new("thing", "a").unwrap(), &config.schema.types["thing"]);
        let mut entity = Entity::new(&config.workspace, &key, Some(ty));
        let context = EditContext {
            ty,
            author: Author { device, incarnation: Incarnation(0) },
            role: Role::Device,
            wall: START.wall,
            spread: 0,
            tx: None,
            again: None,
            based_on: None,
            checked: true,
        };
        let edited = entity.edit(&context, &[set("name", json!(format!("n{number}")))]).unwrap().unwrap();
        let part = EntityChanges {
            type_name: "thing".into(),
            id: "a".into(),
            genesis: Vec::new(),
            changes: vec![edited.change.bytes().to_vec()],
            signature: Vec::new(),
        };
        let body = FeedBody::Changes { author: device.0, unit: Unit { entities: vec![part] } };
        FeedEntry { seq: u64::from(number) + 1, body }
    };
    let feed = Feed { channel: 1, entries: (0..1_000).map(entry).collect(), end: 1_000 };
    replica.receive(START, Message::Feed(feed)).unwrap();
    let mut again = Replica::open(store, config).unwrap();
    assert_eq!(again.verify(START, usize::MAX, false).unwrap().faults, []);
    again.write(START, &[edit("a", &[set("name", json!("settled"))])], true).unwrap();
    while !again.verify(START, 100, false).unwrap().done {}
}

/// The relay takes a device in.
pub(crate) fn granted() -> Message {
    let grant = Grant {
        workspace: "home".into(),
        device: [1; 32],
        user: "ada".into(),
        role: GrantRole::Writer.code(),
        types: Vec::new(),
        not_before_ms: 0,
        not_after_ms: u64::MAX,
        serial: 1,
    };
    Granted { channel: 1, grant, schema: [1; 32], behind: false, incarnation: 0, epoch: [1; 16] }.into()
}

/// A document of some size is not written anew with each edit. What was added to it lacked the beginning of a
/// container that it was the first to use.
#[test]
fn a_large_document_that_begins_a_container_opens_again() {
    let store = Arc::new(MemoryStore::new());
    let mut replica = Replica::open(store.clone(), alone(THINGS)).unwrap();
    let long: String = (0..9_000u32).map(|n| char::from_u32(0x4e00 + n * 7_919 % 20_000).unwrap()).collect();
    replica.write(START, &[edit("a", &[set("name", json!(long))])], true).unwrap();
    replica.write(START, &[edit("a", &[one_more()])], true).unwrap();
    let mut again = Replica::open(store.clone(), alone(THINGS)).unwrap();
    again.write(START, &[edit("a", &[one_more()])], true).unwrap();
    let rows = Rows::new(store, alone(THINGS).schema, &WorkspaceId::new("home").unwrap());
    let row = rows.get(&EntityKey::new("thing", "a").unwrap()).unwrap().unwrap();
    assert_eq!(row.fields["count"], json!(2));
}

/// An edit that a transaction builds on is refused. One member means nothing without it; the others
/// stood alone until the relay refused them as well.
#[test]
fn no_half_of_a_transaction_is_ever_shown() {
    let named =
        THINGS.replace("name   = { type = \"string\" }", "name = { type = \"string\", required = true }");
    let mut net = Net::new(&named, "thing", &[0, 0]);
    net.write_plainly(1, "a", &[set("name", json!("a")), forbidden()], false);
    let other = [set("name", json!("b"))];
    net.write_together(1, &[("a", &[one_more()]), ("b", &other)], true);
    net.flush(1);
    assert_eq!(count(&net, 1, "a"), json!(1));
    net.connect(1);
    let mut moved = true;
    while moved {
        moved = net.deliver(1, true);
        net.flush_relay();
        moved |= net.deliver(1, false);
        net.flush(1);
        let (one, two) = (count(&net, 1, "a") == json!(1), net.look(1, "b").0.is_some());
        assert_eq!(one, two, "a transaction shows in one entity, and not in the other");
    }
    assert_eq!((net.look(1, "a"), net.look(1, "b")), ((None, 3), (None, 3)));
    assert_eq!(net.pending(1), 0);
}

#[test]
fn a_write_that_the_store_did_not_take_leaves_nothing_behind() {
    let store = Arc::new(FaultStore::new(MemoryStore::new()).unwrap());
    let mut replica = Replica::open(store.clone(), alone(THINGS)).unwrap();
    replica.write(START, &[edit("kept", &[one_more()])], true).unwrap();
    let before = replica.status();
    store.fill();
    for edits in [
        vec![edit("new", &[one_more()])],
        vec![edit("kept", &[one_more()]), edit("new", &[one_more()])],
        // Never sent: it would be forgotten.
        vec![edit("kept", &[Intent::Delete])],
    ] {
        let refused = replica.write(START, &edits, true);
        assert!(matches!(refused, Err(WriteError::Store(StoreError::NoSpace { .. }))), "{refused:?}");
        assert_eq!(replica.status(), before, "after {edits:?}");
    }
    store.make_room();
    replica.write(START, &[edit("new", &[one_more()])], true).unwrap();
    let after = replica.status();
    drop(replica);
    let replica = Replica::open(store, alone(THINGS)).unwrap();
    assert_eq!(replica.status(), after);
    assert_eq!(after.pending, 2);
}

#[test]
fn transactions_that_wait_for_each_others_parents_go_together() {
    let mut net = Net::new(THINGS, "thing", &[0, 0]);
    net.write_together(1, &[("a", &[one_more()]), ("x", &[one_more()])], true);
    net.write_together(1, &[("p", &[one_more()]), ("q", &[one_more(), under("a")])], true);
    net.write_plainly(1, "x", &[under("p")], true);
    net.agree();
    for id in ["a", "x", "p", "q"] {
        assert_eq!(count(&net, 0, id), json!(1), "{id}");
    }
}

#[test]
fn a_refusal_does_not_reach_a_transaction_that_only_came_later() {
    for lose_the_answer in [false, true] {
        let mut net = Net::new(THINGS, "thing", &[0, 0]);
        net.write_plainly(1, "a", &[forbidden()], false);
        net.write_together(1, &[("a", &[one_more()]), ("b", &[one_more()])], true);
        net.connect(1);
        if lose_the_answer {
            net.flush(1);
            for _ in 0..2 {
                net.deliver(1, true);
                net.flush_relay();
                net.deliver(1, false);
            }
            net.flush(1);
            while net.deliver(1, true) {}
            net.flush_relay();
            net.disconnect(1);
        }
        net.agree();
        for node in [0, 1] {
            assert_eq!(
                (count(&net, node, "a"), count(&net, node, "b")),
                (json!(1), json!(1)),
                "device {node}"
            );
        }
        assert_eq!(net.look(1, "a").1, 1);
    }
}

#[test]
fn a_transaction_with_a_refused_member_is_refused_whole() {
    let mut net = Net::new(THINGS, "thing", &[0, 0]);
    net.write_plainly(1, "a", &[one_more()], true);
    net.write_together(1, &[("a", &[one_more()]), ("b", &[forbidden()]), ("c", &[one_more()])], false);
    net.write_plainly(1, "c", &[one_more()], true);
    net.agree();
    for node in [0, 1] {
        assert_eq!(count(&net, node, "a"), json!(1), "device {node}");
        assert_eq!(count(&net, node, "b"), Json::Null, "device {node}");
        assert_eq!(count(&net, node, "c"), json!(1), "device {node}");
    }
    assert_eq!(net.look(1, "a").1, 3);
}

#[test]
fn power_lost_over_writes_that_were_never_sent_is_no_store_that_went_back() {
    let mut net = Net::new(THINGS, "thing", &[0, 0]);
    net.connect(1);
    net.quiet();
    net.write_plainly(1, "a", &[one_more()], true);
    net.flush(1);
    net.write_plainly(1, "a", &[one_more()], true);
    net.flush(1);
    // Not durable when the second of `a` leaves.
    net.write_plainly(1, "b", &[one_more()], true);
    net.deliver(1, true);
    net.flush_relay();
    while net.deliver(1, false) {}
    while net.deliver(1, true) {}
    net.flush_relay();
    net.crash(1);
    net.agree();
    assert_eq!(net.set_back(), 0);
    assert_eq!(count(&net, 0, "a"), json!(2));
}

#[test]
fn a_sync_on_a_link_that_is_still_catching_up_is_an_exchange_too() {
    let mut net = Net::new(THINGS, "thing", &[0, 0]);
    net.connect(1);
    net.quiet();
    net.confirm(1);
    // The relay has answered the first question; the answer is under way.
    net.deliver(1, true);
    net.write_plainly(0, "a", &[one_more()], true);
    net.flush(0);
    net.deliver(0, true);
    net.flush_relay();
    net.confirm(1);
    for _ in 0..20 {
        if net.is_complete(1) {
            break;
        }
        net.deliver(1, false);
        net.flush(1);
        net.deliver(1, true);
    }
    assert!(net.is_complete(1));
    assert_eq!(count(&net, 1, "a"), json!(1));
}

/// What a backup had as never sent may have been sent since. It was made again under another
/// name, and counted twice.
#[test]
fn what_a_restored_store_had_pending_counts_once() {
    let mut net = Net::new(THINGS, "thing", &[0, 0]);
    net.write_plainly(1, "a", &[one_more()], true);
    net.flush(1);
    let backup = net.backup(1);
    net.connect(1);
    net.quiet();
    net.restore(1, &backup);
    net.agree();
    for node in [0, 1] {
        assert_eq!(count(&net, node, "a"), json!(1), "device {node}");
    }
    assert_eq!(net.set_back(), 1);
}

/// It was pending at the life that the store had lost, and went out as the first change of that life's actor: under
/// the number of one that the relay had refused. Nobody holds what was refused, but signed by one hand both would
/// be proof of a fork.
#[test]
fn what_a_store_that_went_back_sends_has_numbers_of_its_own() {
    let mut net = Net::new(THINGS, "thing", &[0, 0]);
    net.connect(1);
    net.quiet();
    let backup = net.backup(1);
    net.write_plainly(1, "a", &[one_more(), forbidden()], false);
    net.quiet();
    net.restore(1, &backup);
    net.pass(10);
    net.write_plainly(1, "a", &[one_more()], true);
    net.agree();
    assert_eq!(net.set_back(), 1);
    assert_eq!(count(&net, 0, "a"), json!(1));
    assert_eq!(net.numbers_used_twice(), 0);
}

#[test]
fn what_a_restored_store_lost_and_what_was_written_since_count_once_each() {
    let mut net = Net::new(THINGS, "thing", &[0, 0]);
    net.write_plainly(1, "a", &[one_more()], true);
    net.flush(1);
    let backup = net.backup(1);
    net.connect(1);
    net.quiet();
    // Lost by the device, and at the relay.
    net.write_plainly(1, "a", &[one_more()], true);
    net.quiet();
    net.restore(1, &backup);
    // In the place of what was lost, and later: at the same moment it would be the same change.
    net.pass(10);
    net.write_plainly(1, "a", &[one_more()], true);
    net.flush(1);
    net.connect(1);
    net.flush(1);
    // Power is lost while what was lost comes back.
    for _ in 0..3 {
        net.deliver(1, true);
        net.flush_relay();
        net.deliver(1, false);
    }
    net.flush(1);
    net.crash(1);
    net.agree();
    for node in [0, 1] {
        assert_eq!(count(&net, node, "a"), json!(3), "device {node}");
    }
    assert_eq!(net.look(1, "a").1, 0);
}

/// Asking once more while an answer waited for the relay's disk made a device fetch the whole
/// feed: it held the digest of an older place against what it had been told since.
#[test]
fn an_answer_that_overtakes_the_feed_is_no_difference() {
    let mut net = Net::new(THINGS, "thing", &[0, 0]);
    net.connect(1);
    net.quiet();
    net.write_plainly(1, "a", &[one_more()], true);
    net.flush(1);
    net.deliver(1, true);
    // The answer waits for the relay's disk, and so does what is asked now.
    net.confirm(1);
    net.deliver(1, true);
    net.flush_relay();
    for _ in 0..2 {
        net.deliver(1, false);
    }
    assert!(!matches!(net.state(1), ChannelState::CatchingUp { cursor: 0, .. }), "{:?}", net.state(1));
    net.quiet();
    assert!(net.is_complete(1));
}

#[test]
fn a_large_transaction_does_not_ride_with_what_leaves_no_room_for_it() {
    let mut random = 1u64;
    let mut noise = |length: usize| -> Vec<Intent> {
        let mut draw = || {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            char::from(b'0' + (random >> 58) as u8)
        };
        vec![set("name", json!((0..length).map(|_| draw()).collect::<String>()))]
    };
    let mut net = Net::new(THINGS, "thing", &[0, 0]);
    net.write_plainly(1, "small", &noise(200_000), true);
    let large: Vec<Vec<Intent>> = (0..4).map(|_| noise(1_045_000)).collect();
    let first = [one_more()];
    let parts = std::iter::once(&first[..]).chain(large.iter().map(Vec::as_slice));
    let parts: Vec<(&str, &[Intent])> = ["0", "a", "b", "c", "d"].into_iter().zip(parts).collect();
    net.write_together(1, &parts, true);
    net.agree();
    assert!(net.look(0, "d").0.is_some());
}

#[test]
fn who_watches_hears_of_what_was_dated_anew_when_it_can_be_read() {
    const YEAR_MS: i64 = 31_536_000_000;
    let store = Arc::new(MemoryStore::manual());
    let config = alone(THINGS);
    let mut replica = Replica::open(store.clone(), config.clone()).unwrap();
    let commit = replica.write(START, &[edit("e", &[one_more()])], true).unwrap().commit;
    store.make_durable(commit).unwrap();
    replica.durable(commit).unwrap();
    replica.relay_clock_is(START, -YEAR_MS);
    replica.connect(1, None);
    while replica.poll_output().is_some() {}
    replica.receive(START, granted()).unwrap();
    let mut told = None;
    while let Some(output) = replica.poll_output() {
        if let Output::Changed { after, entities } = output {
            assert_eq!(entities, [EntityKey::new("thing", "e").unwrap()]);
            told = Some(after);
        }
    }
    store.make_durable(told.unwrap()).unwrap();
    let rows = Rows::new(store, config.schema.clone(), &config.workspace);
    let row = rows.get(&EntityKey::new("thing", "e").unwrap()).unwrap().unwrap();
    assert_eq!(row.created_ms, START.wall.0 - YEAR_MS as u64);
}

/// A year and a half: more than is tolerated.
const FAR_MS: i64 = 47_000_000_000;

/// The backup had a pending edit as it was before the clock was found wrong. The relay has it dated anew, so
/// it did not know it again, and the edit was sent and counted once more.
#[test]
fn what_was_dated_anew_after_a_backup_counts_once() {
    let mut net = Net::new(THINGS, "thing", &[0, -FAR_MS]);
    net.write_plainly(1, "a", &[one_more()], true);
    // Made on top of the first.
    net.write_plainly(1, "a", &[one_more()], true);
    net.write_together(1, &[("b", &[one_more()]), ("c", &[one_more()])], true);
    net.flush(1);
    let backup = net.backup(1);
    net.connect(1);
    net.quiet();
    for _ in 0..2 {
        net.restore(1, &backup);
        net.write_plainly(1, "a", &[set("name", json!("new"))], true);
        net.agree();
    }
    for node in [0, 1] {
        for (id, counted) in [("a", 2), ("b", 1), ("c", 1)] {
            assert_eq!(count(&net, node, id), json!(counted), "{id} on device {node}");
        }
        assert_eq!(net.look(node, "a").0.unwrap().fields["name"], json!("new"), "device {node}");
    }
    assert_eq!(net.set_back(), 2);
}

/// Items that were appended stay where they are though the change that did it is another one.
#[test]
fn what_builds_on_an_edit_that_was_dated_anew_keeps_its_place() {
    const LISTS: &str = "[thing]\nversion = 1\n[thing.fields]\ntext = { type = \"text\" }\n";
    let splice =
        |at, insert: &str| Intent::Splice { field: "text".into(), at, delete: 0, insert: insert.into() };
    let mut net = Net::new(LISTS, "thing", &[0, -FAR_MS]);
    net.write_plainly(1, "a", &[splice(0, "bcd")], true);
    net.flush(1);
    let earlier = net.backup(1);
    net.write_plainly(1, "a", &[splice(1, "x")], true);
    net.flush(1);
    let backup = net.backup(1);
    // The life that is lost sent the first edit only.
    net.restore(1, &earlier);
    net.connect(1);
    net.quiet();
    net.write_plainly(0, "a", &[splice(0, "a")], true);
    net.agree();
    net.restore(1, &backup);
    net.agree();
    for node in [0, 1] {
        assert_eq!(net.look(node, "a").0.unwrap().fields["text"], json!("abxcd"), "device {node}");
    }
}

/// A device that edits while its clock is wrong dated its edits wrongly until it connected anew; those
/// too far ahead were refused.
#[test]
fn a_clock_that_is_set_while_connected_is_measured_again() {
    for off_ms in [FAR_MS, -FAR_MS] {
        let mut net = Net::new(THINGS, "thing", &[0, 0]);
        net.connect(1);
        net.quiet();
        net.set_clock(1, off_ms);
        net.pass(1_000);
        net.write_plainly(1, "a", &[one_more()], true);
        net.quiet();
        let (row, refused) = net.look(0, "a");
        let dated = row.unwrap().updated_ms;
        assert!(dated.abs_diff(START_MS + 1_000) < 1_000, "dated {dated}, the clock is {off_ms} ms off");
        assert_eq!(refused, 0);
        net.agree();
    }
}

/// What the handshake measured was taken for what the clock had been at its end.
#[test]
fn a_clock_that_is_set_within_the_handshake_is_measured_again() {
    let mut net = Net::new(THINGS, "thing", &[0, 0]);
    net.connect(1);
    net.set_clock(1, FAR_MS);
    net.quiet();
    net.write_plainly(1, "a", &[one_more()], true);
    net.quiet();
    assert!(net.look(0, "a").0.unwrap().updated_ms.abs_diff(START_MS) < 1_000);
    assert_eq!(net.look(1, "a").1, 0);
}

/// Both clocks of a machine may gain or lose time, so one can't tell of the other for ever.
#[test]
fn a_clock_that_was_measured_long_ago_is_measured_again() {
    const HOUR_MS: u64 = 3_600_000;
    let mut replica = Replica::open(Arc::new(MemoryStore::new()), alone(THINGS)).unwrap();
    replica.connect(1, None);
    replica.relay_clock_is(START, 0);
    let mut reconnects = |hours: u64| {
        let now = Now { mono: START.mono + hours * HOUR_MS, wall: WallMs(START.wall.0 + hours * HOUR_MS) };
        replica.write(now, &[edit("e", &[one_more()])], true).unwrap();
        std::iter::from_fn(|| replica.poll_output()).filter(|output| *output == Output::Reconnect).count()
    };
    assert_eq!([1, 5, 7, 8].map(&mut reconnects), [0, 0, 1, 0]);
}

/// A device that was restored and does at once what it had done before, by a clock that is behind what it
/// has seen, made the same change again: two edits counted as one.
#[test]
fn a_restored_device_that_repeats_itself_makes_another_edit() {
    let mut net = Net::new(THINGS, "thing", &[0, 0]);
    net.connect(1);
    net.write_plainly(1, "a", &[one_more()], true);
    net.quiet();
    let backup = net.backup(1);
    net.write_plainly(1, "a", &[one_more()], true);
    net.quiet();
    net.restore(1, &backup);
    net.write_plainly(1, "a", &[one_more()], true);
    net.agree();
    for node in [0, 1] {
        assert_eq!(count(&net, node, "a"), json!(3), "device {node}");
    }
}
