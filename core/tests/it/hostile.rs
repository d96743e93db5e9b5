//! Peers that mean harm, each told as a story at the relay: it is refused with the reason, what
//! came beside it is taken, and nothing else happens.

use crate::support::*;
use anabranch_core::admission::{INCREMENT_MAX, Judge, RefusalCode};
use anabranch_core::change::{Change, OP_COUNTER_MAX};
use anabranch_core::clock::{Hlc, WallMs};
use anabranch_core::entity::Entity;
use anabranch_core::genesis::{Genesis, GenesisKind};
use anabranch_core::id::{Author, Incarnation};
use anabranch_core::relay::{ConnId, Output};
use anabranch_core::schema::Schema;
use anabranch_core::wire::*;
use automerge::legacy::{ElementId, Key, ObjectId, OpId, OpType};
use automerge::{ActorId, Change as RawChange, ChangeHash, ExpandedChange, ObjType, ScalarValue};

/// The next change of a device, with something of it forged and the checksum right again.
fn forge(device: &Device, id: &str, how: impl FnOnce(&mut ExpandedChange)) -> Vec<u8> {
    forge_draft(device, id, Draft::default(), how)
}

fn forge_draft(device: &Device, id: &str, draft: Draft, how: impl FnOnce(&mut ExpandedChange)) -> Vec<u8> {
    let honest = device.clone().write(id, draft);
    let mut expanded = honest.expand().unwrap();
    expanded.author = None;
    expanded.extra_bytes = honest.raw().extra_bytes().to_vec();
    expanded.hash = None;
    how(&mut expanded);
    RawChange::from(expanded).raw_bytes().to_vec()
}

fn raw(id: &str, changes: Vec<Vec<u8>>) -> EntityChanges {
    EntityChanges { changes, ..of(id, &[]) }
}

struct Story {
    world: World,
    device: Device,
    conn: ConnId,
    honest: u32,
}

impl Story {
    /// A writer whose note `n1` has two changes.
    fn begin() -> Self {
        let mut world = World::with_schema();
        let mut device = Device::new(1);
        let conn = world.join(&device, "writer");
        let (one, two) = (device.edit("n1"), device.edit("n1"));
        assert_eq!(world.submit(conn, unit([of("n1", &[&one, &two])])).refused, []);
        Self { world, device, conn, honest: 0 }
    }

    /// Sends bytes as a change of `n1`, between honest changes of other notes.
    #[track_caller]
    fn refused(&mut self, bytes: Vec<u8>, code: RefusalCode) -> String {
        self.refused_in("n1", bytes, code)
    }

    #[track_caller]
    fn refused_in(&mut self, id: &str, bytes: Vec<u8>, code: RefusalCode) -> String {
        self.honest += 1;
        let (before, after) = (format!("before{}", self.honest), format!("after{}", self.honest));
        let parts = [
            of(&before, &[&self.device.edit(&before)]),
            raw(id, vec![bytes]),
            of(&after, &[&self.device.edit(&after)]),
        ];
        let ack = self.world.submit(self.conn, unit(parts));
        assert_eq!(codes(&ack), [code], "{:?}", ack.refused);
        assert_eq!(ack.refused[0].id, id);
        assert!(!ack.refused[0].message.is_empty(), "a refusal says why");
        let feed = self.world.whole_feed();
        let taken = |id: &str| {
            feed.iter().any(|entry| {
                matches!(&entry.body, FeedBody::Changes { unit, .. } if unit.entities.iter().any(|e| e.id == id))
            })
        };
        assert!(taken(&before) && taken(&after), "the honest rest is taken");
        assert_eq!(digest_of(&feed), self.world.digest().1);
        ack.refused[0].message.clone()
    }

    /// The device goes on where it was.
    #[track_caller]
    fn goes_on(mut self) {
        let next = self.device.edit("n1");
        assert_eq!(self.world.submit(self.conn, unit([of("n1", &[&next])])).refused, []);
    }
}

#[test]
fn actors_that_are_not_the_authors_are_forged() {
    let mut story = Story::begin();
    let other = Author { device: story.device.id(), incarnation: Incarnation(9) };
    for actor in [
        ActorId::from(&[7; 16][..]),
        other.actor(&home(), &key("note", "n1")),
        ActorId::from(&[][..]),
        // Derived for an isolated edit, from another base and with a level that has two spellings.
        ActorId::from([&[0x13, 0xb2, 0x23, 0x09, 1][..], &[7; 16]].concat()),
        ActorId::from(
            [
                &[0x13, 0xb2, 0x23, 0x09, 0x81, 0][..],
                story.device.author.actor(&home(), &key("note", "x")).to_bytes(),
            ]
            .concat(),
        ),
    ] {
        let bytes = forge(&story.device, "x", |change| change.actor_id = actor);
        story.refused_in("x", bytes, RefusalCode::ForgedActor);
    }
    story.goes_on();
}

#[test]
fn gaps_and_forks_of_a_sequence_are_refused() {
    let mut story = Story::begin();
    for seq in [4, 2, u64::MAX] {
        let bytes = forge(&story.device, "n1", |change| change.seq = seq);
        story.refused(bytes, RefusalCode::BadSequence);
    }
    story.goes_on();
}

#[test]
fn a_change_that_leaves_out_its_predecessor_is_refused() {
    let mut story = Story::begin();
    let mut other = Device::new(2);
    let conn = story.world.join(&other, "writer");
    let aside = other.edit("n1");
    story.world.submit(conn, unit([of("n1", &[&aside])]));
    for deps in [vec![], vec![aside.hash()]] {
        let bytes = forge(&story.device, "n1", |change| change.deps = deps);
        story.refused(bytes, RefusalCode::BadSequence);
    }
    story.goes_on();
}

#[test]
fn counters_of_operations_have_limits_both_ways() {
    let mut story = Story::begin();
    for (start, code) in [
        (1, RefusalCode::OutOfOrder),
        (2, RefusalCode::OutOfOrder),
        (OP_COUNTER_MAX, RefusalCode::Malformed),
        (u64::from(u32::MAX), RefusalCode::Malformed),
        (u64::MAX, RefusalCode::Malformed),
    ] {
        let bytes = forge(&story.device, "n1", |change| change.start_op = start.try_into().unwrap());
        story.refused(bytes, code);
    }
    story.goes_on();
}

#[test]
fn negative_early_and_future_times_are_refused() {
    let mut story = Story::begin();
    let limit = Hlc::from_wall(WallMs(START.0 + 5 * 60 * 1000));
    for (time, code) in [
        (-1, RefusalCode::Malformed),
        (i64::MIN, RefusalCode::Malformed),
        (0, RefusalCode::OutOfOrder),
        (limit.next().to_change_time(), RefusalCode::ClockAhead),
        (i64::MAX, RefusalCode::ClockAhead),
    ] {
        let bytes = forge(&story.device, "n1", |change| change.time = time);
        story.refused(bytes, code);
    }
    let tolerated = story.device.clone().write("n2", Draft { ahead_ms: 5 * 60 * 1000, ..Draft::default() });
    assert_eq!(tolerated.time(), limit);
    assert_eq!(story.world.submit(story.conn, unit([of("n2", &[&tolerated])])).refused, []);
    story.goes_on();
}

#[test]
fn unknown_objects_are_refused() {
    let mut story = Story::begin();
    let own = story.device.author.actor(&home(), &key("note", "n1"));
    for object in [OpId::new(1, &own), OpId::new(1, &ActorId::from(&[9; 16][..])), OpId::new(99, &own)] {
        let bytes = forge(&story.device, "n1", |change| change.operations[0].obj = ObjectId::Id(object));
        story.refused(bytes, RefusalCode::BadShape);
    }
    let bytes = forge(&story.device, "n1", |change| change.operations[0].key = Key::Seq(ElementId::Head));
    story.refused(bytes, RefusalCode::BadShape);
    story.goes_on();
}

/// Notes with a register beside the title, a text and a list.
const ROOMY: &str = r#"
[note]
version = 1
[note.fields]
title = { type = "string" }
other = { type = "string" }
stars = { type = "int", merge = "counter" }
body = { type = "text" }
items = { type = "list", of = "string" }
"#;

fn roomy() -> World {
    world_of(ROOMY)
}

fn world_of(schema: &str) -> World {
    let mut world = World::strict();
    let conn = world.join(&Device::new(99), "admin");
    world.send(conn, PushSchema { channel: 1, source: schema.into() });
    assert!(matches!(&world.settle(conn)[0], Message::SchemaIs(answer) if answer.problems.is_empty()));
    world.handle(anabranch_core::relay::Input::Disconnected { conn });
    world
}

fn container(field: &str, kind: GenesisKind) -> Genesis {
    Genesis::new("note", field, kind)
}

fn insert(genesis: &Genesis, behind: Option<&OpId>) -> automerge::legacy::Op {
    automerge::legacy::Op {
        action: OpType::Put(ScalarValue::Str("a".into())),
        obj: ObjectId::Id(genesis.op_id()),
        key: Key::Seq(behind.map_or(ElementId::Head, |id| ElementId::Id(id.clone()))),
        pred: Vec::new().into(),
        insert: true,
    }
}

fn remove(genesis: &Genesis, item: &OpId) -> automerge::legacy::Op {
    automerge::legacy::Op {
        action: OpType::Delete,
        key: Key::Seq(ElementId::Id(item.clone())),
        pred: vec![item.clone()].into(),
        insert: false,
        ..insert(genesis, None)
    }
}

fn put(key: &str, pred: Vec<OpId>) -> automerge::legacy::Op {
    automerge::legacy::Op {
        action: OpType::Put(ScalarValue::Str("b".into())),
        obj: ObjectId::Root,
        key: Key::Map(key.into()),
        pred: pred.into(),
        insert: false,
    }
}

/// The first change of a device to an entity, on top of others, with these operations.
fn on_top(device: &Device, id: &str, onto: &[(ChangeHash, u64)], ops: Vec<automerge::legacy::Op>) -> Vec<u8> {
    // Later than what it is on top of, whose counters grow with time here.
    let ahead_ms = onto.iter().map(|(_, counter)| counter * 100).max().unwrap_or_default();
    let draft = Draft { onto: onto.to_vec(), ahead_ms, ..Draft::default() };
    forge_draft(device, id, draft, |change| change.operations = ops)
}

/// A world in which `n1` has a title, an item of a text and one of a list, by one change; its hash,
/// newest counter and actor.
fn furnished() -> (World, Device, ChangeHash, u64, ActorId) {
    let mut world = roomy();
    let writer = Device::new(1);
    let conn = world.join(&writer, "writer");
    let (body, items) = (container("body", GenesisKind::Text), container("items", GenesisKind::List));
    let onto = [(body.hash, 1), (items.hash, 1)];
    let ops = vec![put("title", Vec::new()), insert(&body, None), insert(&items, None)];
    let bytes = on_top(&writer, "n1", &onto, ops);
    let change = Change::parse(&bytes).unwrap();
    assert_eq!(world.submit(conn, unit([raw("n1", vec![bytes])])).refused, []);
    (world, writer, change.hash(), change.max_op(), change.actor().clone())
}

/// Devices refuse such changes, since their documents can't be loaded again; the relay admitted them.
#[test]
fn what_stands_elsewhere_is_neither_replaced_nor_removed_nor_stood_behind() {
    let (mut world, _, base, newest, actor) = furnished();
    let (body, items) = (container("body", GenesisKind::Text), container("items", GenesisKind::List));
    let id = |counter: u64| OpId::new(counter, &actor);
    let (title, letter, item) = (id(newest - 2), id(newest - 1), id(newest));
    let mut number = 10;
    let mut offer = |world: &mut World, op: automerge::legacy::Op| {
        number += 1;
        let device = Device::new(number);
        let conn = world.join(&device, "writer");
        let bytes = on_top(&device, "n1", &[(base, newest)], vec![op]);
        let ack = world.submit(conn, unit([raw("n1", vec![bytes])]));
        ack.refused.first().map(|refused| (codes(&ack)[0], refused.message.clone()))
    };
    for op in [
        put("other", vec![title.clone()]),
        put("title", vec![letter.clone()]),
        put("title", vec![item.clone()]),
        remove(&body, &item),
        remove(&items, &letter),
        remove(&items, &title),
        insert(&body, Some(&item)),
        insert(&items, Some(&letter)),
        insert(&items, Some(&title)),
        // Between two operations of the change there is no other.
        put("title", vec![id(newest + 1)]),
    ] {
        let (code, why) = offer(&mut world, op).unwrap();
        assert_eq!(code, RefusalCode::BadShape, "{why}");
        let known = ["not written there", "no item of that sequence", "can't have seen"];
        assert!(known.iter().any(|known| why.contains(known)), "{why}");
    }
    for op in [
        put("title", vec![title]),
        remove(&body, &letter),
        insert(&body, Some(&letter)),
        remove(&items, &item),
        insert(&items, Some(&item)),
    ] {
        assert_eq!(offer(&mut world, op), None);
    }
    assert_eq!(digest_of(&world.whole_feed()), world.digest().1);
}

#[test]
fn a_change_inserts_behind_its_own_items_of_that_sequence_and_replaces_none() {
    let mut world = roomy();
    let (body, items) = (container("body", GenesisKind::Text), container("items", GenesisKind::List));
    let mut number = 0;
    let mut offer = |second: &dyn Fn(&OpId) -> automerge::legacy::Op| {
        number += 1;
        let device = Device::new(number);
        let conn = world.join(&device, "writer");
        let first = OpId::new(2, &device.author.actor(&home(), &key("note", "n1")));
        let ops = vec![insert(&body, None), second(&first)];
        let bytes = on_top(&device, "n1", &[(body.hash, 1), (items.hash, 1)], ops);
        codes(&world.submit(conn, unit([raw("n1", vec![bytes])])))
    };
    assert_eq!(offer(&|first| insert(&body, Some(first))), []);
    assert_eq!(offer(&|first| insert(&items, Some(first))), [RefusalCode::BadShape]);
    let replacing = |first: &OpId| automerge::legacy::Op {
        pred: vec![first.clone()].into(),
        ..insert(&body, Some(first))
    };
    assert_eq!(offer(&replacing), [RefusalCode::BadShape]);
}

#[test]
fn a_container_is_written_into_only_where_it_has_begun() {
    let (mut world, _, base, newest, _) = furnished();
    let (body, stars) = (container("body", GenesisKind::Text), container("stars", GenesisKind::Counter));
    let mut plain = Device::new(2);
    let conn = world.join(&plain, "writer");
    let aside = plain.edit("n1");
    assert_eq!(world.submit(conn, unit([of("n1", &[&aside])])).refused, []);
    let count = || automerge::legacy::Op {
        action: OpType::Increment(1),
        pred: vec![stars.op_id()].into(),
        ..put("stars", Vec::new())
    };
    let mut number = 10;
    let mut offer = |world: &mut World, onto: &[(ChangeHash, u64)], op: automerge::legacy::Op| {
        number += 1;
        let device = Device::new(number);
        let conn = world.join(&device, "writer");
        let ack = world.submit(conn, unit([raw("n1", vec![on_top(&device, "n1", onto, vec![op])])]));
        ack.refused.first().map(|refused| (codes(&ack)[0], refused.message.clone()))
    };
    let aside = (aside.hash(), aside.max_op());
    // Begun by a change beside, which this one has not seen; not begun at all.
    for (onto, op) in [
        (vec![aside], insert(&body, None)),
        (vec![], insert(&body, None)),
        (vec![(base, newest)], count()),
        (vec![aside, (base, newest)], count()),
    ] {
        let (code, why) = offer(&mut world, &onto, op).unwrap();
        assert_eq!(code, RefusalCode::BadShape, "{why}");
        assert!(why.contains("had not begun"), "{why}");
    }
    for (onto, op) in [
        (vec![aside, (body.hash, 1)], insert(&body, None)),
        (vec![aside, (base, newest)], insert(&body, None)),
        (vec![(base, newest), (stars.hash, 1)], count()),
    ] {
        assert_eq!(offer(&mut world, &onto, op), None);
    }
}

/// What was admitted before the relay kept where operations act is built on as before.
#[test]
fn headers_of_an_earlier_layout_are_understood_and_new_ones_cost_little() {
    use anabranch_core::codec::{self, HeaderRecord};
    use anabranch_core::store::{Batch, Keyspace, Store, View};
    use anabranch_core::targets::ChangeTargets;
    let (mut world, _, base, newest, actor) = furnished();
    let rows = world.store.scan(View::Latest, Keyspace::HEADER, &[], &[], 1_000).unwrap();
    let mut batch = Batch::new();
    for (key, value) in rows {
        let (header, _): (HeaderRecord, ChangeTargets) = codec::decode_as(2, &value, "a header").unwrap();
        let earlier = codec::encode(&header);
        // Three operations at three places, and two containers.
        assert_eq!(value.len() - earlier.len(), 1 + 3 * 6 + 1 + 2 * 5);
        batch.put(Keyspace::HEADER, key, earlier);
    }
    world.store.commit(batch).unwrap();
    world.store.flush();
    world.crash(anabranch_core::relay::RelayConfig::default());

    let device = Device::new(2);
    let conn = world.join(&device, "writer");
    let title = OpId::new(newest - 2, &actor);
    let bytes = on_top(&device, "n1", &[(base, newest)], vec![put("title", vec![title])]);
    assert_eq!(world.submit(conn, unit([raw("n1", vec![bytes])])).refused, []);
    // Of the earlier one nothing is known, so devices judge alone.
    let device = Device::new(3);
    let conn = world.join(&device, "writer");
    let letter = OpId::new(newest - 1, &actor);
    let bytes = on_top(&device, "n1", &[(base, newest)], vec![put("other", vec![letter])]);
    assert_eq!(world.submit(conn, unit([raw("n1", vec![bytes])])).refused, []);
}

/// Automerge believes what an operation says it replaces: such a change left documents that could
/// be saved and not loaded.
#[test]
fn unknown_and_unseen_predecessors_are_refused() {
    let mut story = Story::begin();
    let mut other = Device::new(2);
    let conn = story.world.join(&other, "writer");
    let aside = other.edit("n1");
    story.world.submit(conn, unit([of("n1", &[&aside])]));
    let own = story.device.author.actor(&home(), &key("note", "n1"));
    let counter = Genesis::new("note", "stars", GenesisKind::Counter);
    for preds in [
        vec![OpId::new(1, &ActorId::from(&[9; 16][..]))],
        vec![OpId::new(99, &own)],
        // In the relay's index, but not below this change.
        vec![OpId::new(1, aside.actor())],
        // Its own operation, which is not earlier.
        vec![OpId::new(3, &own)],
        vec![OpId::new(1, &own), OpId::new(1, &own)],
        vec![counter.op_id()],
    ] {
        let bytes = forge(&story.device, "n1", |change| change.operations[0].pred = preds.into());
        story.refused(bytes, RefusalCode::BadShape);
    }
    let bytes = forge(&story.device, "n1", |change| change.operations[0].insert = true);
    story.refused(bytes, RefusalCode::BadShape);
    // The same key twice, the second time as if the first had not been.
    let bytes = forge(&story.device, "n1", |change| change.operations.push(change.operations[0].clone()));
    story.refused(bytes, RefusalCode::BadShape);
    story.goes_on();
}

#[test]
fn increments_fit_counters_only_and_are_bounded() {
    let mut story = Story::begin();
    let bytes = forge(&story.device, "n1", |change| change.operations[0].action = OpType::Increment(1));
    story.refused(bytes, RefusalCode::BadShape);
    let counts = || Draft { increments: Some("stars"), ..Draft::default() };
    for (by, code) in [
        (INCREMENT_MAX + 1, RefusalCode::Validation),
        (i64::MIN, RefusalCode::Validation),
        (i64::MAX, RefusalCode::Validation),
    ] {
        let bytes = forge_draft(&story.device, "n1", counts(), |change| {
            change.operations[0].action = OpType::Increment(by);
        });
        story.refused(bytes, code);
    }
    for action in [
        OpType::Put(ScalarValue::Int(7)),
        OpType::Put(ScalarValue::counter(7)),
        OpType::Delete,
        OpType::Make(ObjType::Map),
    ] {
        let bytes = forge_draft(&story.device, "n1", counts(), |change| change.operations[0].action = action);
        story.refused(bytes, RefusalCode::BadShape);
    }
    story.goes_on();
}

#[test]
fn what_breaks_a_rule_of_the_schema_is_refused() {
    const RULES: &str = r#"
[note]
version = 1
[note.fields]
title = { type = "string", required = true, max_bytes = 5 }
day = { type = "timestamp", required = true, merge = "manual", group = "plan" }
days = { type = "set", of = "timestamp" }
stars = { type = "int", merge = "counter" }
body = { type = "text" }
"#;
    let mut world = world_of(RULES);
    let (days, stars, body) = (
        container("days", GenesisKind::Set),
        container("stars", GenesisKind::Counter),
        container("body", GenesisKind::Text),
    );
    let register = |key: &str, value: &str| automerge::legacy::Op {
        action: OpType::Put(ScalarValue::Str(value.into())),
        ..put(key, Vec::new())
    };
    let whole = || vec![register("title", "ok"), register("#plan", r#"{"day":"2025-06-15T12:00:00Z"}"#)];
    let and = |op: automerge::legacy::Op| [whole(), vec![op]].concat();
    let of_set = |key: &str| automerge::legacy::Op {
        action: OpType::Put(ScalarValue::Int(1)),
        obj: ObjectId::Id(days.op_id()),
        ..put(key, Vec::new())
    };
    let more =
        |key: &str, pred: Vec<OpId>| automerge::legacy::Op { action: OpType::Increment(1), ..put(key, pred) };
    let taken = vec![
        whole(),
        and(of_set(r#""2025-06-15T12:00:00Z""#)),
        and(more("stars", vec![stars.op_id()])),
        and(insert(&body, None)),
    ];
    let broken = vec![
        vec![register("title", "longer"), whole().remove(1)],
        vec![register("title", "ok")],
        vec![register("title", "ok"), register("#plan", r#"{"day":null}"#)],
        vec![register("title", "ok"), register("#plan", r#"{"day":"2025-06-15T14:00:00+02:00"}"#)],
        and(of_set(r#""2025-06-15T14:00:00+02:00""#)),
        and(of_set(r#""never""#)),
    ];
    let misshapen = vec![
        and(more("stars", vec![])),
        and(more("body", vec![body.op_id()])),
        and(automerge::legacy::Op {
            action: OpType::Put(ScalarValue::Str("".into())),
            ..insert(&body, None)
        }),
    ];
    let mut number = 0;
    for (cases, wanted) in
        [(taken, None), (broken, Some(RefusalCode::Validation)), (misshapen, Some(RefusalCode::BadShape))]
    {
        for ops in cases {
            number += 1;
            let (device, id) = (Device::new(number), format!("n{number}"));
            let conn = world.join(&device, "writer");
            let bytes = on_top(&device, &id, &[(days.hash, 1), (stars.hash, 1), (body.hash, 1)], ops.clone());
            let ack = world.submit(conn, unit([raw(&id, vec![bytes])]));
            assert_eq!(codes(&ack).first().copied(), wanted, "{ops:?}: {:?}", ack.refused);
        }
    }
}

#[test]
fn another_devices_change_is_taken_from_nobody_else() {
    let mut story = Story::begin();
    let stolen = Device::new(2).edit("n9");
    story.refused_in("n9", stolen.bytes().to_vec(), RefusalCode::ForgedAuthor);
    // The author claimed beside an actor that is one's own.
    let victim = Device::new(2).author.to_bytes();
    let bytes = forge(&story.device, "n9", |change| {
        change.extra_bytes = [&[1, victim.len() as u8][..], &victim].concat();
    });
    story.refused_in("n9", bytes, RefusalCode::ForgedAuthor);
    story.goes_on();
}

#[test]
fn a_change_replayed_into_another_entity_is_forged_there() {
    let mut story = Story::begin();
    let elsewhere = story.device.clone().edit("n7");
    story.refused_in("n8", elsewhere.bytes().to_vec(), RefusalCode::ForgedActor);
    // The same id under another type.
    let country = key("country", "n7");
    let part = EntityChanges { type_name: "country".into(), ..raw("n7", vec![elsewhere.bytes().to_vec()]) };
    let ack = story.world.submit(story.conn, unit([part]));
    assert_eq!(codes(&ack), [RefusalCode::ForgedActor], "{country}");
    assert_eq!(story.world.submit(story.conn, unit([of("n7", &[&elsewhere])])).refused, []);
}

#[test]
fn a_forged_beginning_of_a_container_is_refused() {
    let mut story = Story::begin();
    let genesis = Genesis::new("note", "stars", GenesisKind::Counter);
    // As it is, it names no author, so it can't travel; nor can another in its name.
    story.refused(genesis.change().raw_bytes().to_vec(), RefusalCode::Malformed);
    let bytes = forge(&story.device, "x", |change| change.actor_id = genesis.actor.clone());
    story.refused_in("x", bytes, RefusalCode::ForgedActor);
    // One of a kind that the type does not have.
    let other = Genesis::new("note", "stars", GenesisKind::List);
    let bytes = forge(&story.device, "n1", |change| {
        change.deps.push(other.hash);
        change.deps.sort_unstable();
    });
    story.refused(bytes, RefusalCode::MissingDependency);
    // Containers are made by nobody.
    let bytes = forge(&story.device, "n1", |change| {
        change.operations[0].key = Key::Map("stars".into());
        change.operations[0].action = OpType::Make(ObjType::List);
    });
    story.refused(bytes, RefusalCode::BadShape);
    story.goes_on();
}

#[test]
fn a_forged_mark_of_an_authority_is_refused() {
    let mut story = Story::begin();
    for message in ["a", "ar"] {
        let bytes = forge(&story.device, "n1", |change| change.message = Some(message.into()));
        story.refused(bytes, RefusalCode::ForgedRole);
    }
    for message in ["", "x", "aa", "d.AAAA.1", "d\u{0}"] {
        let bytes = forge(&story.device, "n1", |change| change.message = Some(message.into()));
        story.refused(bytes, RefusalCode::Malformed);
    }
    // The authority's register of a field that has none.
    let bytes = forge(&story.device, "n1", |change| change.operations[0].key = Key::Map("title!".into()));
    story.refused(bytes, RefusalCode::BadShape);
    story.goes_on();
}

#[test]
fn a_refused_change_comes_back_by_nobody() {
    let mut story = Story::begin();
    let refused = story.device.write("n5", Draft { field: "nope", ..Draft::default() });
    let bytes = refused.bytes().to_vec();
    story.refused_in("n5", bytes.clone(), RefusalCode::UnknownField);
    let mut third = Device::new(3);
    let conn = story.world.join(&third, "writer");
    let brought = story.world.submit(conn, unit([raw("n5", vec![bytes.clone()])]));
    assert_eq!(codes(&brought), [RefusalCode::UnknownField], "with the reason that it had");
    let onto = Draft { onto: vec![(refused.hash(), 1)], ..Draft::default() };
    let built = third.write("n5", onto);
    let beside = third.edit("n6");
    let parts = [raw("n5", vec![bytes, built.bytes().to_vec()]), of("n6", &[&beside])];
    let ack = story.world.submit(conn, unit(parts));
    assert_eq!(codes(&ack), [RefusalCode::UnknownField, RefusalCode::DependsOnRefused]);
    let feed = story.world.whole_feed();
    let has = |entry: &FeedEntry| matches!(&entry.body, FeedBody::Changes { unit, .. } if unit.entities[0].id == "n6");
    assert!(feed.iter().any(has), "what came beside it is taken");
    assert_eq!(digest_of(&feed), story.world.digest().1);
}

#[test]
fn messages_beyond_the_bound_and_bombs_close_their_connection_only() {
    let mut story = Story::begin();
    let ten_megabytes = [&[6, 1][..], &vec![0; 10 << 20]].concat();
    let packed = zstd::bulk::compress(&vec![0; 256 << 20], 3).unwrap();
    let bomb = |announced: u32| [&[6, 3][..], &announced.to_le_bytes(), &packed].concat();
    for bytes in [ten_megabytes, bomb(u32::MAX), bomb(MESSAGE_BYTES_MAX as u32), bomb(9)] {
        let conn = story.world.join(&Device::new(4), "writer");
        story.world.outputs(conn);
        story.world.handle(anabranch_core::relay::Input::Received { conn, bytes });
        let outputs = story.world.outputs(conn);
        assert!(
            matches!(outputs.last(), Some(Output::Close { code: FaultCode::Protocol, .. })),
            "{outputs:?}"
        );
    }
    story.goes_on();
}

/// Columns are run-length encoded: a few bytes can claim any number of operations.
#[test]
fn a_change_that_claims_endless_operations_costs_nothing() {
    let mut story = Story::begin();
    let mut bytes = forge(&story.device, "n1", |_| {});
    // The run of the one action, put: [-1, 1] becomes a run of 2^40 in a longer column.
    let at = bytes.windows(3).rposition(|window| window == [0x42, 2, 0x56]).unwrap();
    bytes[at + 1] = 7;
    let actions = bytes.windows(2).rposition(|window| window == [0x7f, 1]).unwrap();
    bytes.splice(actions..actions + 1, [0x80, 0x80, 0x80, 0x80, 0x80, 0x20]);
    let why = story.refused(reseal(bytes, 5), RefusalCode::Malformed);
    assert!(why.contains("claim more than a change may hold"), "{why}");
    story.goes_on();
}

/// Makes the length of a chunk right again whose body grew.
fn reseal(mut bytes: Vec<u8>, grown: u16) -> Vec<u8> {
    let two = bytes[9] & 0x80 != 0;
    let high = if two { u16::from(bytes[10]) << 7 } else { 0 };
    let length = (u16::from(bytes[9] & 0x7f) | high) + grown;
    let written: Vec<u8> =
        if length < 128 { vec![length as u8] } else { vec![length as u8 | 0x80, (length >> 7) as u8] };
    bytes.splice(9..if two { 11 } else { 10 }, written);
    bytes
}

/// Operations take next to no bytes, and each of them is looked at.
#[test]
fn operations_of_a_unit_are_bounded() {
    let mut story = Story::begin();
    let empty = || Draft { title: String::new(), ..Draft::default() };
    let many = |id: &str, count: usize| {
        forge_draft(&story.device, id, empty(), |change| {
            let (actor, start) = (change.actor_id.clone(), change.start_op.get());
            let first = change.operations[0].clone();
            change.operations = (0..count as u64)
                .map(|place| {
                    let mut operation = first.clone();
                    if place > 0 {
                        operation.pred = vec![OpId::new(start + place - 1, &actor)].into();
                    }
                    operation
                })
                .collect();
        })
    };
    let parts: Vec<EntityChanges> =
        (0..41).map(|number| format!("big{number}")).map(|id| raw(&id, vec![many(&id, 100_000)])).collect();
    assert!(parts.iter().map(|part| part.changes[0].len()).sum::<usize>() < 20_000);
    story.world.send(story.conn, changes(unit(parts[..2].to_vec())));
    let told = story.world.settle(story.conn);
    assert!(matches!(&told[..], [Message::Ack(ack), ..] if ack.refused.is_empty()), "{told:?}");
    story.world.send(story.conn, changes(unit(parts)));
    assert_eq!(faults(&story.world.settle(story.conn)), [(Some(1), FaultCode::Quota)]);
    story.goes_on();
}

#[test]
fn a_thousand_writers_of_one_field_at_once_are_all_taken_and_seen() {
    let mut world = World::with_schema();
    let schema = Schema::parse(SCHEMA, "schema.toml").unwrap();
    let ty = &schema.types["note"];
    let mut entity = Entity::new(&home(), &key("note", "n1"), Some(ty));
    let mut hashes: Vec<ChangeHash> = Vec::new();
    let mut changes = Vec::new();
    for number in 0..1_000u32 {
        let mut device = Device::new(0);
        let mut id = [0; 32];
        id[..4].copy_from_slice(&number.to_be_bytes());
        device.author.device.0 = id;
        let conn = world.join(&device, "writer");
        let change = device.write("n1", Draft { title: format!("title {number}"), ..Draft::default() });
        assert_eq!(world.submit(conn, unit([of("n1", &[&change])])).refused, []);
        world.handle(anabranch_core::relay::Input::Disconnected { conn });
        hashes.push(change.hash());
        changes.push(change);
    }
    let received = entity.receive(changes, Some(ty), Judge::Admitted, true);
    assert!(received.refused.is_empty());
    assert_eq!(entity.heads().len(), 1_000);
    let row = entity.row(ty);
    assert!(row.fields["title"].as_str().unwrap().starts_with("title "));
    assert!(entity.save_proved().is_ok());
    // One who has seen them all settles it.
    let mut last = Device::new(7);
    let conn = world.join(&last, "writer");
    let onto = hashes.iter().map(|hash| (*hash, 1)).collect();
    let settled = last.write("n1", Draft { onto, ahead_ms: 1_000, ..Draft::default() });
    assert_eq!(settled.deps().len(), 1_000);
    assert_eq!(world.submit(conn, unit([of("n1", &[&settled])])).refused, []);
    assert_eq!(digest_of(&world.whole_feed()), world.digest().1);
    assert!(Change::parse(settled.bytes()).is_ok());
}
