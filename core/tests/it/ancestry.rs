//! Histories of forms that cost much to look through: long, wide, and with more ends than a change may
//! name. What they come to is the same as for any other, and nobody is locked out.

use std::num::NonZeroU64;

use crate::support::*;
use anabranch_core::admission::{Judge, RefusalCode};
use anabranch_core::change::{CHANGE_DEPS_MAX, Change, Note, Role};
use anabranch_core::clock::{Hlc, WallMs};
use anabranch_core::entity::{ConflictKind, EditContext, EditError, Edited, Entity, Pending, WHOLE_ENTITY};
use anabranch_core::genesis::{Genesis, GenesisKind};
use anabranch_core::header::DEVICE_ACTORS_MAX;
use anabranch_core::id::{Author, DeviceId, Incarnation};
use anabranch_core::intent::Intent;
use anabranch_core::relay::{ConnId, Input};
use anabranch_core::schema::{EntityType, Schema};
use anabranch_core::shape::TOMBSTONE;
use anabranch_core::wire::*;
use automerge::legacy::{ElementId, Key, ObjectId, Op, OpId, OpType};
use automerge::{ActorId, Change as RawChange, ChangeHash, ExpandedChange, ScalarValue};
use serde_json::json;

const NOTES: &str = r#"
[note]
version = 1
[note.fields]
title = { type = "string" }
other = { type = "string" }
ask = { type = "string", merge = "manual" }
stars = { type = "int", merge = "counter" }
tags = { type = "set", of = "string" }
days = { type = "map", of = "string" }
body = { type = "text" }
"#;

fn note() -> EntityType {
    Schema::parse(NOTES, "schema.toml").unwrap().types["note"].clone()
}

fn world() -> World {
    let mut world = World::strict();
    let conn = world.join(&Device::new(99), "admin");
    world.send(conn, PushSchema { channel: 1, source: NOTES.into() });
    assert!(matches!(&world.settle(conn)[0], Message::SchemaIs(answer) if answer.problems.is_empty()));
    world.handle(Input::Disconnected { conn });
    world
}

fn device(number: u32) -> DeviceId {
    let mut id = [0; 32];
    id[..4].copy_from_slice(&number.to_be_bytes());
    DeviceId(id)
}

/// An actor whose changes of `n1` are written by hand.
struct Hand {
    author: Author,
    newest: Option<(ChangeHash, u64, u64)>,
}

impl Hand {
    fn new(number: u32, incarnation: u32) -> Self {
        let author = Author { device: device(number), incarnation: Incarnation::new(incarnation, 0) };
        Self { author, newest: None }
    }

    fn actor(&self) -> ActorId {
        self.author.actor(&home(), &key("note", "n1"))
    }

    /// The next change, on top of others (and of genesis changes), at a reading of the clock.
    fn write(
        &mut self,
        onto: &[&Change],
        genesis: &[&Genesis],
        tick: u64,
        ops: impl FnOnce(u64) -> Vec<Op>,
    ) -> Change {
        let (seq, mut start_op) = self.newest.map_or((1, 1), |(_, seq, op)| (seq + 1, op + 1));
        let mut deps: Vec<ChangeHash> = self.newest.iter().map(|(hash, ..)| *hash).collect();
        deps.extend(onto.iter().map(|change| change.hash()));
        start_op = onto.iter().map(|change| change.max_op() + 1).fold(start_op, u64::max);
        deps.extend(genesis.iter().map(|genesis| genesis.hash));
        start_op = genesis.iter().map(|_| 2).fold(start_op, u64::max);
        deps.sort_unstable();
        deps.dedup();
        let mut extra_bytes = Vec::new();
        if seq == 1 {
            let author = self.author.to_bytes();
            extra_bytes = [&[1, author.len() as u8][..], &author].concat();
        }
        let time = Hlc::from_u64(Hlc::from_wall(START).to_u64() + tick);
        let raw = RawChange::from(ExpandedChange {
            operations: ops(start_op),
            actor_id: self.actor(),
            hash: None,
            seq,
            start_op: NonZeroU64::new(start_op).unwrap(),
            time: time.to_change_time(),
            message: Some(Note::default().to_message()),
            deps,
            extra_bytes,
            author: None,
        });
        let change = Change::parse(raw.raw_bytes()).unwrap();
        self.newest = Some((change.hash(), seq, change.max_op()));
        change
    }
}

fn put(key: &str, value: &str, pred: Vec<OpId>) -> Op {
    Op {
        action: OpType::Put(ScalarValue::Str(value.into())),
        obj: ObjectId::Root,
        key: Key::Map(key.into()),
        pred: pred.into(),
        insert: false,
    }
}

fn tombstone() -> Op {
    Op { action: OpType::Put(ScalarValue::Boolean(true)), ..put(TOMBSTONE, "", Vec::new()) }
}

fn taken(entity: &mut Entity, ty: &EntityType, changes: &[Change]) {
    let received = entity.receive(changes.to_vec(), Some(ty), Judge::Admitted, true);
    assert_eq!(received.refused, []);
}

fn entity() -> Entity {
    Entity::new(&home(), &key("note", "n1"), Some(&note()))
}

fn submit(world: &mut World, number: u32, changes: &[&Change], genesis: &[(&str, GenesisKind)]) -> Ack {
    let mut device = Device::new(0);
    device.author.device = self::device(number);
    let conn: ConnId = world.join(&device, "writer");
    let genesis = genesis.iter().map(|(field, kind)| ((*field).to_owned(), kind.code())).collect();
    let ack = world.submit(conn, unit([EntityChanges { genesis, ..of("n1", changes) }]));
    world.handle(Input::Disconnected { conn });
    ack
}

/// One life of a device writes a field very often in one change of a few bytes, another makes a long
/// chain on top, and then replaces all that the first wrote. Neither the relay nor a device
/// walks the chain once for each.
#[test]
fn all_that_a_change_replaces_is_looked_up_in_one_walk() {
    const WRITES: u64 = 20_000;
    const CHAIN: u64 = 5_000;
    let mut world = world();
    let mut first = Hand::new(1, 0);
    let actor = first.actor();
    let many = first.write(&[], &[], 0, |start| {
        let pred = |nth| if nth == 0 { Vec::new() } else { vec![OpId::new(start + nth - 1, &actor)] };
        (0..WRITES).map(|nth| put("title", "", pred(nth))).collect()
    });
    assert!(many.bytes().len() < 300);
    let mut second = Hand::new(1, 1);
    let mut changes = vec![many];
    for tick in 1..=CHAIN {
        let onto: Vec<&Change> = changes.iter().take(usize::from(tick == 1)).collect();
        let next = second.write(&onto, &[], tick, |start| {
            let pred = if tick == 1 { Vec::new() } else { vec![OpId::new(start - 1, &second_actor())] };
            vec![put("other", "b", pred)]
        });
        changes.push(next);
    }
    let start = changes[0].start_op();
    let all: Vec<OpId> = (0..WRITES).map(|nth| OpId::new(start + nth, &actor)).collect();
    changes.push(second.write(&[], &[], CHAIN + 1, |_| vec![put("title", "z", all)]));
    for part in changes.chunks(4_000) {
        let part: Vec<&Change> = part.iter().collect();
        assert_eq!(submit(&mut world, 1, &part, &[]).refused, []);
    }
    let ty = note();
    let mut entity = entity();
    taken(&mut entity, &ty, &changes);
    assert_eq!(entity.row(&ty).fields["title"], "z");

    // Who has not seen the last write of it all names nothing else either.
    let mut third = Hand::new(2, 0);
    let unseen = OpId::new(changes.last().unwrap().start_op(), &second_actor());
    let before = &changes[changes.len() - 2];
    let wrong = third.write(&[before], &[], CHAIN + 2, |_| vec![put("title", "x", vec![unseen])]);
    let ack = submit(&mut world, 2, &[&wrong], &[]);
    assert_eq!(codes(&ack), [RefusalCode::BadShape]);
    assert!(ack.refused[0].message.contains("can't have seen"), "{}", ack.refused[0].message);
}

fn second_actor() -> ActorId {
    Hand::new(1, 1).actor()
}

/// A chain of one change for each of many lives, and on its end a competing value for each of as many.
fn wide(count: u32) -> (Vec<Change>, Vec<Change>) {
    let mut chain: Vec<Change> = Vec::new();
    for number in 0..count {
        let onto: Vec<&Change> = chain.last().into_iter().collect();
        let field = if number == 0 { "ask" } else { "other" };
        let next = Hand::new(number / 500, number)
            .write(&onto, &[], number.into(), |_| vec![put(field, &format!("{number}"), Vec::new())]);
        chain.push(next);
    }
    let start = OpId::new(1, &Hand::new(0, 0).actor());
    let end = chain.last().unwrap();
    let sides = (0..count).map(|number| {
        Hand::new(100 + number / 500, number).write(&[end], &[], u64::from(count + number), |_| {
            vec![put("ask", &format!("side {number}"), vec![start.clone()])]
        })
    });
    let sides = sides.collect();
    (chain, sides)
}

#[test]
fn what_many_competing_values_started_from_is_found_in_one_pass() {
    const COUNT: u32 = 500;
    let ty = note();
    let (chain, sides) = wide(COUNT);
    let mut entity = entity();
    taken(&mut entity, &ty, &chain);
    taken(&mut entity, &ty, &sides);
    let row = entity.row(&ty);
    let conflict = &row.conflicts[0];
    assert_eq!((&*conflict.field, conflict.kind), ("ask", ConflictKind::Manual));
    assert_eq!(conflict.sides.len(), COUNT as usize);
    assert_eq!(conflict.sides[0].value, format!("side {}", COUNT - 1));
    assert_eq!(conflict.base, Some(json!("0")));
    // One that started from nothing leaves them nothing in common.
    let alone = Hand::new(900, 0).write(&[], &[], 0, |_| vec![put("ask", "alone", Vec::new())]);
    taken(&mut entity, &ty, &[alone]);
    let conflict = &entity.row(&ty).conflicts[0];
    assert_eq!((conflict.sides.len(), &conflict.base), (COUNT as usize + 1, &None));
    assert_eq!(conflict.sides[COUNT as usize].value, "alone");
}

#[test]
fn a_deletion_of_a_wide_history_loses_what_was_written_beside_it() {
    const COUNT: u32 = 300;
    let ty = note();
    let mut entity = entity();
    let mut hands: Vec<Hand> = (0..COUNT).map(|number| Hand::new(1, number)).collect();
    let mut changes: Vec<Change> = Vec::new();
    for tick in 0..4 * COUNT {
        let onto: Vec<&Change> = changes.last().into_iter().collect();
        let hand = &mut hands[(tick % COUNT) as usize];
        changes.push(hand.write(&onto, &[], tick.into(), |_| vec![put("title", "a", Vec::new())]));
    }
    let middle = &changes[(2 * COUNT) as usize];
    let beside: Vec<Change> = (0..COUNT)
        .map(|number| {
            let tick = u64::from(4 * COUNT + number);
            let ops =
                |_| if number % 3 == 0 { vec![tombstone()] } else { vec![put("other", "b", Vec::new())] };
            Hand::new(2 + number % 2, number).write(&[middle], &[], tick, ops)
        })
        .collect();
    let deletion = Hand::new(9, 0).write(&[changes.last().unwrap()], &[], 9_000, |_| vec![tombstone()]);
    taken(&mut entity, &ty, &changes);
    taken(&mut entity, &ty, std::slice::from_ref(&deletion));
    let row = entity.row(&ty);
    assert!(row.deleted && row.conflicts.is_empty(), "it had seen all");
    taken(&mut entity, &ty, &beside);
    let row = entity.row(&ty);
    let conflict = &row.conflicts[0];
    assert!(row.deleted);
    assert_eq!((&*conflict.field, conflict.kind), (WHOLE_ENTITY, ConflictKind::LostEdit));
    // The newest of each device that is more than a deletion.
    let lost: Vec<ChangeHash> = conflict.sides[1..].iter().map(|side| side.change).collect();
    let newest = |odd| beside.iter().enumerate().rfind(|(n, _)| n % 2 == odd && n % 3 != 0).unwrap();
    let [even, odd] = [0, 1].map(newest);
    assert_eq!(lost, [odd.max_by_place(even), odd.min_by_place(even)]);
    // In the version before, none of it was there.
    assert!(entity.row_at(&ty, &[deletion.hash()]).conflicts.is_empty());
    assert!(!entity.row_at(&ty, &[middle.hash()]).deleted);
    // An edit beside it that is later brings it back.
    let late = Hand::new(8, 0).write(&[middle], &[], 9_001, |_| vec![put("other", "c", Vec::new())]);
    taken(&mut entity, &ty, &[late]);
    assert!(!entity.row(&ty).deleted);
}

/// Of two numbered changes, the later or the earlier.
trait ByPlace {
    fn max_by_place(&self, other: Self) -> ChangeHash;
    fn min_by_place(&self, other: Self) -> ChangeHash;
}

impl ByPlace for (usize, &Change) {
    fn max_by_place(&self, other: Self) -> ChangeHash {
        if self.0 > other.0 { self.1.hash() } else { other.1.hash() }
    }

    fn min_by_place(&self, other: Self) -> ChangeHash {
        if self.0 > other.0 { other.1.hash() } else { self.1.hash() }
    }
}

#[test]
fn what_the_document_cannot_hold_leaves_the_index_as_it_was() {
    let ty = note();
    let mut entity = entity();
    let mut ann = Hand::new(1, 0);
    let one = ann.write(&[], &[], 0, |_| vec![put("title", "a", Vec::new())]);
    taken(&mut entity, &ty, std::slice::from_ref(&one));
    let before = entity.headers().clone();
    // It replaces at one key what stands at another: only the document shows that.
    let title = OpId::new(1, &ann.actor());
    let mut ben = Hand::new(2, 0);
    let bad = ben.write(&[&one], &[], 1, |_| vec![put("other", "b", vec![title])]);
    let on_bad = Hand::new(3, 0).write(&[&bad], &[], 2, |_| vec![put("ask", "c", Vec::new())]);
    let received = entity.receive(vec![bad.clone(), on_bad.clone()], Some(&ty), Judge::Admitted, true);
    let refused: Vec<_> = received.refused.iter().map(|(hash, why)| (*hash, why.code)).collect();
    let expected = [(bad.hash(), RefusalCode::Unloadable), (on_bad.hash(), RefusalCode::DependsOnRefused)];
    assert_eq!(refused, expected);
    assert_eq!(*entity.headers(), before);
    // What came beside it is taken, and others go on.
    let two = ann.write(&[], &[], 3, |_| vec![put("other", "d", Vec::new())]);
    let received = entity.receive(vec![bad, two.clone()], Some(&ty), Judge::Admitted, true);
    assert_eq!(received.applied, [two.hash()]);
    let three = Hand::new(3, 0).write(&[&two], &[], 4, |_| vec![put("ask", "c", Vec::new())]);
    taken(&mut entity, &ty, std::slice::from_ref(&three));
    let mut fresh = self::entity();
    taken(&mut fresh, &ty, &[one, two, three]);
    assert_eq!(entity.headers(), fresh.headers());
    assert_eq!(entity.row(&ty), fresh.row(&ty));
}

/// A device that edits as an engine does.
struct Editor {
    author: Author,
    entity: Entity,
    ty: EntityType,
    tick: u64,
}

impl Editor {
    fn new(number: u32, changes: &[Change]) -> Self {
        let (ty, mut entity) = (note(), entity());
        taken(&mut entity, &ty, changes);
        let author = Author { device: device(number), incarnation: Incarnation::new(0, 0) };
        Self { author, entity, ty, tick: 10_000 }
    }

    fn try_edit(
        &mut self,
        based_on: Option<&[ChangeHash]>,
        intents: &[Intent],
    ) -> Result<Option<Edited>, EditError> {
        self.tick += 1;
        let context = EditContext {
            ty: &self.ty,
            author: self.author,
            role: Role::Device,
            wall: WallMs(START.0 + self.tick),
            spread: 0,
            tx: None,
            again: None,
            based_on,
            checked: true,
        };
        self.entity.edit(&context, intents)
    }

    fn edit(&mut self, intents: &[Intent]) -> Edited {
        self.try_edit(None, intents).unwrap().unwrap()
    }
}

fn set(field: &str, value: &str) -> Intent {
    Intent::Set { field: field.into(), value: json!(value) }
}

/// So many devices that each write one change of the note without having seen another's.
fn at_once(
    count: u32,
    genesis: &[&Genesis],
    onto: &[&Change],
    op: impl Fn(u32, u64) -> Vec<Op>,
) -> Vec<Change> {
    (0..count)
        .map(|number| {
            Hand::new(1_000 + number, 0).write(onto, genesis, 10 + u64::from(number), |at| op(number, at))
        })
        .collect()
}

const CROWD: u32 = 1_500;

fn increments() -> Vec<Change> {
    let stars = Genesis::new("note", "stars", GenesisKind::Counter);
    at_once(CROWD, &[&stars], &[], |_, _| {
        vec![Op { action: OpType::Increment(1), ..put("stars", "", vec![stars.op_id()]) }]
    })
}

#[test]
fn more_concurrent_changes_than_one_may_name_lock_nobody_out() {
    let mut world = world();
    let counters = increments();
    let writers: Vec<Change> = (0..CROWD)
        .map(|number| {
            let tick = 10 + u64::from(number);
            Hand::new(5_000 + number, 0)
                .write(&[], &[], tick, |_| vec![put("title", &format!("{number}"), Vec::new())])
        })
        .collect();
    let mut admin = Device::new(0);
    admin.author.device = device(9_999);
    let conn = world.join(&admin, "admin");
    for part in [&counters, &writers] {
        let part: Vec<&Change> = part.iter().collect();
        let genesis = vec![("stars".to_owned(), GenesisKind::Counter.code())];
        let ack = world.submit(conn, unit([EntityChanges { genesis, ..of("n1", &part) }]));
        assert_eq!(ack.refused, []);
    }
    let all: Vec<Change> = counters.into_iter().chain(writers).collect();
    let mut editor = Editor::new(1, &all);
    let mut heads = editor.entity.heads().len();
    assert_eq!(heads, 2 * CROWD as usize);
    let mut made = Vec::new();
    for round in 0..5 {
        let title = format!("honest {round}");
        let edited =
            editor.edit(&[set("title", &title), Intent::Increment { field: "stars".into(), by: 10 }]);
        assert!(edited.change.deps().len() <= CHANGE_DEPS_MAX);
        let row = editor.entity.row(&editor.ty);
        assert_eq!(row.fields["title"], title);
        assert_eq!(row.fields["stars"], CROWD + 10 * (round + 1));
        let now = editor.entity.heads().len();
        assert!(now < heads || now == 1, "{now} after {heads}");
        heads = now;
        made.push(edited.change);
    }
    assert_eq!(heads, 1, "soon there is one end again");
    assert!(made.iter().all(|change| *change.actor() == *made[0].actor()), "one actor is enough");
    let sent: Vec<&Change> = made.iter().collect();
    assert_eq!(submit(&mut world, 1, &sent, &[("stars", GenesisKind::Counter)]).refused, []);
    assert_eq!(digest_of(&world.whole_feed()), world.digest().1);
    let mut other = Editor::new(2, &all);
    taken(&mut other.entity, &other.ty, &made);
    assert_eq!(other.entity.row(&other.ty), editor.entity.row(&editor.ty));
    assert_eq!(other.entity.heads(), editor.entity.heads());
    assert!(other.entity.save_proved().is_ok());
}

#[test]
fn an_edit_of_a_crowded_note_takes_effect_where_it_writes() {
    let ty = note();
    let mut before = Editor::new(3, &[]);
    let body = before.edit(&[
        set("ask", "old"),
        Intent::Splice { field: "body".into(), at: 0, delete: 0, insert: "0123456789".into() },
        Intent::Add { field: "tags".into(), element: json!("x") },
        Intent::Put { field: "days".into(), key: "mon".into(), value: json!("old") },
    ]);
    let start = body.change;
    // The oldest of the crowd, which is not among the newest, writes what matters.
    let mut early = Editor::new(4, std::slice::from_ref(&start));
    early.tick = 20_000;
    let early = early.edit(&[
        set("title", "early"),
        Intent::Put { field: "days".into(), key: "mon".into(), value: json!("new") },
        Intent::Splice { field: "body".into(), at: 5, delete: 2, insert: "abc".into() },
        Intent::Add { field: "tags".into(), element: json!("y") },
    ]);
    let crowd: Vec<Change> = (0..CROWD)
        .map(|number| {
            let later = Hlc::from_wall(WallMs(30_000)).to_u64() + u64::from(number);
            Hand::new(1_000 + number, 0)
                .write(&[&start], &[], later, |_| vec![put("other", &format!("{number}"), Vec::new())])
        })
        .collect();
    let all: Vec<Change> = [start, early.change].into_iter().chain(crowd).collect();
    let mut editor = Editor::new(1, &all);
    editor.tick = 50_000;
    let row = editor.entity.row(&ty);
    assert_eq!(row.fields["body"], "01234abc789");
    let edited = editor.edit(&[
        set("title", "late"),
        Intent::Put { field: "days".into(), key: "mon".into(), value: json!("late") },
        Intent::Remove { field: "tags".into(), element: json!("y") },
        // From the text before the early edit, through it, to behind it.
        Intent::Splice { field: "body".into(), at: 4, delete: 5, insert: "-".into() },
    ]);
    assert!(editor.entity.heads().len() > 1, "it did not see all");
    let row = editor.entity.row(&ty);
    assert_eq!(row.fields["title"], "late");
    assert_eq!(row.fields["days"], json!({"mon": "late"}));
    assert_eq!(row.fields["tags"], json!(["x"]));
    assert_eq!(row.fields["body"], "0123-89");
    let mut fresh = Editor::new(2, &all);
    taken(&mut fresh.entity, &ty, std::slice::from_ref(&edited.change));
    assert_eq!(fresh.entity.row(&ty), row);
    // So does a deletion, of which nobody's newer edit makes a draw.
    editor.edit(&[Intent::Delete]);
    assert!(editor.entity.row(&ty).deleted);
    editor.edit(&[Intent::Revive]);
    assert!(!editor.entity.row(&ty).deleted);
    // And an edit of the version that someone read, crowded as it was.
    let version = fresh.entity.heads();
    assert!(version.len() > 1);
    fresh.tick = 60_000;
    fresh.try_edit(Some(&version), &[set("other", "mine")]).unwrap().unwrap();
    assert_eq!(fresh.entity.row(&ty).fields["other"], "mine");
}

/// Text that others removed stands in the version on which an edit comes to be based, and stays out of it.
#[test]
fn a_removal_in_a_crowded_text_removes_what_was_meant() {
    let ty = note();
    let body = Genesis::new("note", "body", GenesisKind::Text);
    let mut ann = Hand::new(3, 0);
    let actor = ann.actor();
    let item = |behind: ElementId, letter: &str| Op {
        obj: ObjectId::Id(body.op_id()),
        key: Key::Seq(behind),
        insert: true,
        ..put("", letter, Vec::new())
    };
    let start = ann.write(&[], &[&body], 0, |at| {
        let behind =
            |nth: u64| nth.checked_sub(1).map_or(ElementId::Head, |n| OpId::new(at + n, &actor).into());
        "abcdef".chars().zip(0..).map(|(letter, nth)| item(behind(nth), &letter.to_string())).collect()
    });
    // The oldest of the crowd removed the c.
    let c = OpId::new(start.start_op() + 2, &actor);
    let gone = Hand::new(4, 0).write(&[&start], &[], 5, |_| {
        vec![Op {
            action: OpType::Delete,
            insert: false,
            pred: vec![c.clone()].into(),
            ..item(c.clone().into(), "")
        }]
    });
    let crowd =
        at_once(CROWD, &[], &[&start], |number, _| vec![put("other", &format!("{number}"), Vec::new())]);
    let all: Vec<Change> = [start, gone].into_iter().chain(crowd).collect();
    let mut editor = Editor::new(1, &all);
    assert_eq!(editor.entity.row(&ty).fields["body"], "abdef");
    // "bde", between which the c still stands for the newest.
    let edited =
        editor.edit(&[Intent::Splice { field: "body".into(), at: 1, delete: 3, insert: "-".into() }]);
    assert_eq!(editor.entity.row(&ty).fields["body"], "a-f", "{:?}", edited.intents);
}

/// So does one that is made again without a refused edit before it, whose letter is back.
#[test]
fn a_removal_that_is_made_again_removes_what_was_meant() {
    let mut editor = Editor::new(1, &[]);
    let splice =
        |at, delete, insert: &str| Intent::Splice { field: "body".into(), at, delete, insert: insert.into() };
    editor.edit(&[splice(0, 0, "abcdef")]);
    let pending: Vec<Pending> = [splice(2, 1, ""), splice(1, 3, "-")]
        .into_iter()
        .map(|intent| {
            let edited = editor.edit(&[intent]);
            Pending {
                hash: edited.change.hash(),
                intents: edited.intents,
                role: Role::Device,
                tx: None,
                origin: edited.change.origin(),
                wall: None,
                twin: None,
            }
        })
        .collect();
    assert_eq!(editor.entity.row(&editor.ty).fields["body"], "a-f");
    let refused = [pending[0].hash].into();
    let author = Author { incarnation: Incarnation::new(0, 1), ..editor.author };
    let rebuilt = editor.entity.rebuild(&refused, &[].into(), &pending, &editor.ty, author).unwrap();
    let body = rebuilt.entity.row(&editor.ty).fields["body"].clone();
    assert!(["a-cf", "ac-f"].iter().any(|expected| body == *expected), "{body}");
}

#[test]
fn a_device_takes_no_more_actors_of_an_entity_than_leave_room_for_others() {
    let mut world = world();
    let lives: Vec<Change> = (0..=DEVICE_ACTORS_MAX as u32)
        .map(|life| Hand::new(1, life).write(&[], &[], life.into(), |_| vec![put("title", "a", Vec::new())]))
        .collect();
    let (last, first) = lives.split_last().unwrap();
    let sent: Vec<&Change> = first.iter().collect();
    assert_eq!(submit(&mut world, 1, &sent, &[]).refused, []);
    let ack = submit(&mut world, 1, &[last], &[]);
    assert_eq!(codes(&ack), [RefusalCode::Quota]);
    assert!(ack.refused[0].message.contains("newest version"), "{}", ack.refused[0].message);
    // Actors that it has go on, and other devices come.
    let mut known = Hand::new(1, 0);
    known.write(&[], &[], 0, |_| vec![put("title", "a", Vec::new())]);
    let next = known.write(&[], &[], 9_000, |_| vec![put("other", "b", Vec::new())]);
    assert_eq!(submit(&mut world, 1, &[&next], &[]).refused, []);
    let other = Hand::new(2, 0).write(&[], &[], 9_000, |_| vec![put("title", "c", Vec::new())]);
    assert_eq!(submit(&mut world, 2, &[&other], &[]).refused, []);
    // An honest device learns it before it sends anything.
    let mut editor = Editor::new(1, first);
    editor.edit(&[set("other", "mine")]);
    let version = [first[5].hash()];
    let error = editor.try_edit(Some(&version), &[set("other", "mine too")]).unwrap_err();
    assert!(matches!(&error, EditError::Validation(why) if why.contains("read it again")), "{error}");
    editor.edit(&[set("other", "mine too")]);
}

/// Each stands for a version of its own to who reads them.
#[test]
fn an_entity_takes_no_more_actors_than_are_allowed() {
    const ENTITY_ACTORS_MAX: u32 = 10_000;
    let mut world = world();
    let hand = |number| {
        let mut hand = Hand::new(number, 0);
        let change = hand.write(&[], &[], number.into(), |_| vec![put("title", "a", Vec::new())]);
        (hand, change)
    };
    let (_, all): (Vec<Hand>, Vec<Change>) = (0..ENTITY_ACTORS_MAX).map(hand).unzip();
    let authority = world.join(&Device::new(99), "authority");
    let ack = world.submit(authority, unit([of("n1", &all.iter().collect::<Vec<_>>())]));
    assert_eq!(ack.refused, []);
    let (_, newcomer) = hand(ENTITY_ACTORS_MAX);
    let ack = submit(&mut world, ENTITY_ACTORS_MAX, &[&newcomer], &[]);
    assert_eq!(codes(&ack), [RefusalCode::Quota]);
    assert!(ack.refused[0].message.contains("too many changes or authors"), "{}", ack.refused[0].message);
    // Those that it has go on.
    let (mut known, _) = hand(1);
    let next = known.write(&[], &[], ENTITY_ACTORS_MAX.into(), |_| vec![put("other", "b", Vec::new())]);
    assert_eq!(submit(&mut world, 1, &[&next], &[]).refused, []);
}
