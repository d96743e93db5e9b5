//! What a few bytes, or very many, can do to a relay and to those who read from it: each story told at
//! its bound.

use crate::support::*;
use anabranch_core::admission::{Judge, RefusalCode};
use anabranch_core::change::{Change, EDIT_OPS_MAX, OP_COUNTER_MAX, Role};
use anabranch_core::clock::WallMs;
use anabranch_core::codec::{self, HeaderRecord};
use anabranch_core::entity::{EditContext, EditError, Entity};
use anabranch_core::genesis::{Genesis, GenesisKind};
use anabranch_core::intent::Intent;
use anabranch_core::relay::{ConnId, Input, Rate, RelayConfig, verify};
use anabranch_core::schema::Schema;
use anabranch_core::store::{Batch, Keyspace, Store, StoreError, VALUE_BYTES_MAX, View};
use anabranch_core::wire::*;
use automerge::legacy::{Key, ObjectId, Op, OpId, OpType};
use automerge::{Change as RawChange, ExpandedChange, ScalarValue};
use serde_json::json;

const ROOMY: &str = r#"
[note]
version = 1
[note.fields]
title = { type = "string" }
other = { type = "string" }
body = { type = "text" }
tags = { type = "set", of = "string" }
"#;

fn roomy() -> World {
    world_with(RelayConfig::default())
}

fn world_with(config: RelayConfig) -> World {
    let mut world = World::with(config);
    let conn = world.join(&Device::new(99), "admin");
    world.send(conn, PushSchema { channel: 1, source: ROOMY.into() });
    assert!(matches!(&world.settle(conn)[0], Message::SchemaIs(answer) if answer.problems.is_empty()));
    world.handle(Input::Disconnected { conn });
    world
}

fn raw(id: &str, changes: Vec<Vec<u8>>) -> EntityChanges {
    EntityChanges { changes, ..of(id, &[]) }
}

/// The next change of a device, with something of it forged and the checksum right again.
fn forge(device: &Device, id: &str, draft: Draft, how: impl FnOnce(&mut ExpandedChange)) -> Vec<u8> {
    let honest = device.clone().write(id, draft);
    let mut expanded = honest.expand().unwrap();
    expanded.author = None;
    expanded.extra_bytes = honest.raw().extra_bytes().to_vec();
    expanded.hash = None;
    how(&mut expanded);
    RawChange::from(expanded).raw_bytes().to_vec()
}

/// A change that puts so many values, in turn at each of these keys, each on top of the last.
fn puts(device: &Device, id: &str, keys: &[&str], count: u64) -> Vec<u8> {
    forge(device, id, Draft::default(), |change| {
        let (actor, start) = (change.actor_id.clone(), change.start_op.get());
        let turns = keys.len() as u64;
        change.operations = (0..count)
            .map(|place| Op {
                action: OpType::Put(ScalarValue::Str("".into())),
                obj: ObjectId::Root,
                key: Key::Map(keys[(place % turns) as usize].into()),
                pred: match place.checked_sub(turns) {
                    Some(before) => vec![OpId::new(start + before, &actor)].into(),
                    None => Vec::new().into(),
                },
                insert: false,
            })
            .collect();
    })
}

/// The device that writes by its own document, as engines do.
struct Writer {
    device: Device,
    schema: Schema,
    entity: Entity,
    wall: WallMs,
}

impl Writer {
    fn new(number: u8, id: &str) -> Self {
        let schema = Schema::parse(ROOMY, "schema.toml").unwrap();
        let entity = Entity::new(&home(), &key("note", id), Some(&schema.types["note"]));
        Self { device: Device::new(number), schema, entity, wall: START }
    }

    fn edit(&mut self, intents: &[Intent]) -> Result<Change, EditError> {
        let context = EditContext {
            ty: &self.schema.types["note"],
            author: self.device.author,
            role: Role::Device,
            wall: self.wall,
            spread: 0,
            tx: None,
            again: None,
            based_on: None,
            checked: true,
        };
        Ok(self.entity.edit(&context, intents)?.unwrap().change)
    }

    /// Takes in all that the relay has of its entity.
    fn read(&mut self, feed: &[FeedEntry]) {
        let id = self.entity.key().id().to_owned();
        for entry in feed {
            let FeedBody::Changes { unit, .. } = &entry.body else { continue };
            for part in unit.entities.iter().filter(|part| part.id == id) {
                let changes = part.changes.iter().map(|bytes| Change::parse(bytes).unwrap()).collect();
                let ty = &self.schema.types["note"];
                let received = self.entity.receive(changes, Some(ty), Judge::Admitted, true);
                assert_eq!(received.refused, []);
            }
        }
    }
}

fn set(field: &str, value: &str) -> Intent {
    Intent::Set { field: field.into(), value: json!(value) }
}

/// Makes everything durable and lets the relay fall and rise; all is as it should be then.
fn restart(world: &mut World) {
    world.flush();
    let checked = verify(&*world.store, &home(), &mut |_| {}).unwrap().unwrap();
    assert_eq!(checked.faults, Vec::<String>::new());
    world.crash(RelayConfig::default());
}

fn join(world: &mut World, number: u8) -> (Device, ConnId) {
    let device = Device::new(number);
    let conn = world.join(&device, "writer");
    (device, conn)
}

/// The relay kept where the operations of a change act in one value. An import of that many elements
/// ended it, and ended it again whenever it was begun anew.
#[test]
fn an_import_of_many_elements_is_taken_and_its_places_are_known_after_a_restart() {
    let mut world = roomy();
    let mut writer = Writer::new(1, "n1");
    let conn = world.join(&writer.device, "writer");
    let add = |n: u32| Intent::Add { field: "tags".into(), element: json!(format!("element {n}")) };
    let import = writer.edit(&(0..25_000).map(add).collect::<Vec<_>>()).unwrap();
    assert_eq!(world.submit(conn, unit([of("n1", &[&import])])).refused, []);
    let headers = world.store.scan(View::Latest, Keyspace::HEADER, &[], &[], 100).unwrap();
    assert_eq!(headers.len(), 3, "places take some 150 KB, in values of at most {VALUE_BYTES_MAX} bytes");
    restart(&mut world);

    let (device, conn) = join(&mut world, 2);
    let tags = Genesis::new("note", "tags", GenesisKind::Set);
    let expanded = import.expand().unwrap();
    let id_of = |place: usize| OpId::new(import.start_op() + place as u64, import.actor());
    let key_of = |place: usize| expanded.operations[place].key.clone();
    let removal = |at: usize, named: usize| {
        let draft =
            Draft { onto: vec![(import.hash(), import.max_op())], ahead_ms: 1_000, ..Draft::default() };
        forge(&device, "n1", draft, |change| {
            change.operations = vec![Op {
                action: OpType::Delete,
                obj: ObjectId::Id(tags.op_id()),
                key: key_of(at),
                pred: vec![id_of(named)].into(),
                insert: false,
            }];
        })
    };
    for (at, named) in [(24_000, 24_001), (0, 24_999)] {
        let ack = world.submit(conn, unit([raw("n1", vec![removal(at, named)])]));
        assert_eq!(codes(&ack), [RefusalCode::BadShape], "{:?}", ack.refused);
    }
    assert_eq!(world.submit(conn, unit([raw("n1", vec![removal(24_000, 24_000)])])).refused, []);
    restart(&mut world);
    let (_, conn) = join(&mut world, 1);
    let more = writer.edit(&[set("title", "on")]).unwrap();
    assert_eq!(world.submit(conn, unit([of("n1", &[&more])])).refused, []);
}

/// Two registers written in turn take few bytes, and a place for each operation.
#[test]
fn two_registers_written_in_turn_end_no_relay() {
    let mut world = roomy();
    let (device, conn) = join(&mut world, 1);
    let bytes = puts(&device, "n1", &["title", "other"], 60_000);
    assert_eq!(world.submit(conn, unit([raw("n1", vec![bytes])])).refused, []);
    restart(&mut world);
    let (mut other, conn) = join(&mut world, 2);
    let change = other.edit("n1");
    assert_eq!(world.submit(conn, unit([of("n1", &[&change])])).refused, []);
}

/// What the store refuses before it queues anything ends nothing but the request.
#[test]
fn a_batch_that_is_too_large_for_the_store_costs_its_sender_a_fault() {
    let mut world = roomy();
    let (mut device, conn) = join(&mut world, 1);
    let change = device.edit("n1");
    let too_large = StoreError::TooLarge { what: "value", bytes: 70_000, max_bytes: VALUE_BYTES_MAX };
    world.store.refuse_next(too_large);
    world.send(conn, changes(unit([of("n1", &[&change])])));
    assert_eq!(faults(&world.settle(conn)), [(Some(1), FaultCode::Quota)]);
    // Nothing was kept in memory of what the store did not take.
    assert_eq!(world.submit(conn, unit([of("n1", &[&change])])).refused, []);
    restart(&mut world);
}

/// A few hundred bytes of run-length encoding are a gigabyte once they are read out.
#[test]
fn a_change_of_more_operations_than_an_edit_has_is_refused_for_good() {
    let mut world = roomy();
    let (device, conn) = join(&mut world, 1);
    let too_many = puts(&device, "n1", &["title"], EDIT_OPS_MAX as u64 + 1);
    assert!(too_many.len() < 2_000, "{}", too_many.len());
    let ack = world.submit(conn, unit([raw("n1", vec![too_many.clone()])]));
    assert_eq!(codes(&ack), [RefusalCode::Quota]);
    assert_eq!(
        ack.refused[0].hash,
        Change::parse(&too_many).unwrap().hash().0,
        "its author knows it by that"
    );
    assert!(ack.refused[0].message.contains("250001 operations; 250000 are allowed"), "{:?}", ack.refused);
    assert_eq!(codes(&world.submit(conn, unit([raw("n1", vec![too_many])]))), [RefusalCode::Quota]);
}

/// As many as an edit may have are not too many.
#[test]
fn a_change_of_as_many_operations_as_an_edit_may_have_is_taken() {
    let mut world = roomy();
    let (device, conn) = join(&mut world, 1);
    let bytes = puts(&device, "n1", &["title"], EDIT_OPS_MAX as u64);
    assert_eq!(world.submit(conn, unit([raw("n1", vec![bytes])])).refused, []);
}

#[test]
fn a_device_makes_no_edit_of_more_operations_than_the_relay_takes() {
    let mut writer = Writer::new(1, "n1");
    let paste =
        |count: usize| [Intent::Splice { field: "body".into(), at: 0, delete: 0, insert: "x".repeat(count) }];
    let error = writer.edit(&paste(EDIT_OPS_MAX + 1)).unwrap_err();
    assert_eq!(error, EditError::TooManyOperations { operations: EDIT_OPS_MAX + 1 });
    assert!(writer.entity.headers().is_empty(), "nothing of it was made");
    let page = writer.edit(&paste(100_000)).unwrap();
    assert_eq!(page.operations(), 100_000);
    assert_eq!(page.weight(), 3_200_000, "so that few such go at once");
    let mut world = roomy();
    let conn = world.join(&writer.device, "writer");
    assert_eq!(world.submit(conn, unit([of("n1", &[&page])])).refused, []);
}

/// They were counted by their bytes: next to nothing.
#[test]
fn operations_count_against_what_a_device_may_send() {
    let mut config = RelayConfig::default();
    config.device_rate = Rate::kib_per_s(64);
    let mut world = world_with(config);
    let (mut device, conn) = join(&mut world, 1);
    let bytes = puts(&device, "many", &["title"], 100_000);
    assert!(bytes.len() < 2_000, "{}", bytes.len());
    assert_eq!(world.submit(conn, unit([raw("many", vec![bytes])])).refused, []);
    // 3.7 MB at 64 KiB a second, of which eight seconds' worth was free.
    world.send(conn, changes(unit([of("n1", &[&device.edit("n1")])])));
    assert_eq!(world.settle(conn), []);
    world.pass(40_000);
    assert_eq!(world.settle(conn), []);
    world.pass(20_000);
    assert!(matches!(&world.settle(conn)[..], [Message::Ack(ack), ..] if ack.refused.is_empty()));
}

/// Numbers of operations only grow. One change that took the last of them made an entity that nobody
/// could edit any more.
#[test]
fn the_counters_of_an_entity_are_not_used_up_by_leaps() {
    let mut world = roomy();
    let (mut device, conn) = join(&mut world, 1);
    let first = device.edit("n1");
    assert_eq!(world.submit(conn, unit([of("n1", &[&first])])).refused, []);
    let leap = |device: &Device, start: u64, note: Option<Draft>| {
        let draft = note.unwrap_or_default();
        forge(device, "n1", draft, |change| change.start_op = start.try_into().unwrap())
    };
    for start in [OP_COUNTER_MAX - 1, 1_000_000, first.max_op() + 1_002] {
        let ack = world.submit(conn, unit([raw("n1", vec![leap(&device, start, None)])]));
        assert_eq!(codes(&ack), [RefusalCode::BadSequence], "{start}");
    }
    // Nor by way of what is refused beside it.
    let (other, other_conn) = join(&mut world, 2);
    let ladder = leap(&other, first.max_op() + 1_001, Some(in_tx(1, 2)));
    let third = Device::new(3);
    let top = leap(&third, first.max_op() + 2_002, None);
    let admin = world.join(&Device::new(4), "admin");
    let ack = world.submit(admin, unit([raw("n1", vec![ladder, top.clone()])]));
    assert_eq!(codes(&ack), [RefusalCode::Transaction, RefusalCode::BadSequence]);

    // In steps, each as far as is tolerated.
    let mut reached = first.max_op();
    let mut climber = other.clone();
    for _ in 0..50 {
        let start = reached + 1_001;
        let honest = climber
            .clone()
            .write("n1", Draft { onto: vec![(first.hash(), reached)], ahead_ms: 100, ..Draft::default() });
        let bytes = leap_on(&honest, start);
        let change = Change::parse(&bytes).unwrap();
        climber.adopt(&key("note", "n1"), &change);
        assert_eq!(world.submit(other_conn, unit([raw("n1", vec![bytes])])).refused, []);
        reached = start;
    }
    // An honest device that has seen it all goes on, without a gap.
    let mut writer = Writer::new(5, "n1");
    writer.wall = WallMs(START.0 + 1_000);
    writer.read(&world.whole_feed());
    let conn = world.join(&writer.device, "writer");
    for text in ["one", "two"] {
        let change = writer.edit(&[set("title", text)]).unwrap();
        assert!(change.start_op() > reached && change.max_op() < 60_000);
        assert_eq!(world.submit(conn, unit([of("n1", &[&change])])).refused, []);
    }
    // What was refused for its number was not refused for good.
    assert_eq!(codes(&world.submit(admin, unit([raw("n1", vec![top])]))), Vec::<RefusalCode>::new());
}

/// A change as it is, but for the number of its first operation.
fn leap_on(honest: &Change, start: u64) -> Vec<u8> {
    let mut expanded = honest.expand().unwrap();
    expanded.author = None;
    expanded.extra_bytes = honest.raw().extra_bytes().to_vec();
    expanded.hash = None;
    expanded.start_op = start.try_into().unwrap();
    RawChange::from(expanded).raw_bytes().to_vec()
}

type EntityRecord = (String, String, Vec<(String, u8)>, u32, u32);

/// The key and the record of the only entity, and the bytes that it counts.
fn record(world: &World) -> (Vec<u8>, EntityRecord, u64) {
    let rows = world.store.scan(View::Latest, Keyspace::ENTITY, &[], &[], 10).unwrap();
    let (key, value) = rows.into_iter().find(|(key, _)| key.len() == 32).unwrap();
    let (record, bytes) = codec::decode_as(2, &value, "an entity").unwrap();
    (key, record, bytes)
}

fn rewrite(world: &mut World, keyspace: Keyspace, key: Vec<u8>, value: Vec<u8>) {
    let mut batch = Batch::new();
    batch.put(keyspace, key, value);
    world.store.commit(batch).unwrap();
    world.flush();
    world.crash(RelayConfig::default());
}

/// Devices could not read what was larger than 64 MiB, and asked for it for ever.
#[test]
fn an_entity_has_no_more_bytes_than_devices_can_read() {
    let mut world = roomy();
    let (mut device, conn) = join(&mut world, 1);
    let (one, two) = (device.edit("n1"), device.edit("n1"));
    assert_eq!(world.submit(conn, unit([of("n1", &[&one, &two])])).refused, []);
    let (key, parts, bytes) = record(&world);
    assert_eq!(bytes, (one.bytes().len() + two.bytes().len()) as u64);

    // A record from before says nothing: what comes from then on is counted.
    rewrite(&mut world, Keyspace::ENTITY, key.clone(), codec::encode(&parts));
    let (_, conn) = join(&mut world, 1);
    let three = device.edit("n1");
    assert_eq!(world.submit(conn, unit([of("n1", &[&three])])).refused, []);
    let (key, parts, bytes) = record(&world);
    assert_eq!(bytes, three.bytes().len() as u64);

    // Room for one more.
    let four = device.edit("n1");
    let nearly = ENTITY_BYTES_MAX as u64 - four.bytes().len() as u64;
    rewrite(&mut world, Keyspace::ENTITY, key, codec::encode_as(2, &(parts, nearly)));
    is_the_last(&mut world, &mut device, &four, "go on in a new one");
}

/// After this change of an entity there is room for none of it, and for others.
fn is_the_last(world: &mut World, device: &mut Device, last: &Change, message: &str) {
    let (_, conn) = join(world, 1);
    let more = device.edit("n1");
    let ack = world.submit(conn, unit([of("n1", &[last, &more])]));
    assert_eq!(codes(&ack), [RefusalCode::Quota]);
    assert_eq!(ack.refused[0].hash, more.hash().0);
    assert!(ack.refused[0].message.contains(message), "{:?}", ack.refused);
    assert_eq!(codes(&world.submit(conn, unit([of("n1", &[&more])]))), [RefusalCode::Quota]);
    assert_eq!(world.submit(conn, unit([of("n2", &[&device.edit("n2")])])).refused, []);
}

/// Operations take few bytes, and memory all the same.
#[test]
fn an_entity_has_no_more_operations_than_are_allowed() {
    const ENTITY_OPS_MAX: u32 = 10_000_000;
    let mut world = roomy();
    let (mut device, conn) = join(&mut world, 1);
    assert_eq!(world.submit(conn, unit([of("n1", &[&device.edit("n1")])])).refused, []);
    // As if that had been all that there may be but for one, in one place each.
    let mut headers = world.store.scan(View::Latest, Keyspace::HEADER, &[], &[], 10).unwrap();
    let (key, value) = headers.pop().unwrap();
    type Targets = (Vec<(u32, u32)>, Vec<u32>);
    let (header, mut targets): (HeaderRecord, Targets) = codec::decode_as(2, &value, "a header").unwrap();
    targets.0[0].0 = ENTITY_OPS_MAX - 1;
    rewrite(&mut world, Keyspace::HEADER, key, codec::encode_as(2, &(header, targets)));
    let last = device.edit("n1");
    is_the_last(&mut world, &mut device, &last, "10000000 are allowed");
}

/// What goes beyond is told by its code alone, lest an answer be larger than a message.
#[test]
fn an_answer_has_room_for_so_many_messages_and_for_every_code() {
    const MESSAGES: usize = 512 * 1024 / 64;
    let mut world = roomy();
    let (device, conn) = join(&mut world, 1);
    // Of a type whose name makes a message of 64 bytes.
    let stranger = key(&"x".repeat(39), "n1");
    let all: Vec<Change> = (0..=MESSAGES)
        .map(|n| device.clone().write_in(&stranger, Draft { title: n.to_string(), ..Draft::default() }))
        .collect();
    let ack = world.submit(conn, unit([of_entity(&stranger, &all.iter().collect::<Vec<_>>())]));
    assert_eq!(codes(&ack), vec![RefusalCode::UnknownField; MESSAGES + 1]);
    let told = ack.refused.iter().map(|refused| refused.message.len());
    assert!(told.eq([vec![64; MESSAGES], vec![0]].concat()));
}

/// A device alone stops where the relay would refuse.
#[test]
fn a_device_writes_no_more_into_an_entity_than_the_relay_takes() {
    let mut writer = Writer::new(1, "n1");
    let value = "x".repeat((1 << 20) - 100);
    let mut written = 0;
    let error = loop {
        let (title, other) = (format!("{written}{value}"), format!("{value}{written}"));
        match writer.edit(&[set("title", &title), set("other", &other)]) {
            Ok(change) => written += change.bytes().len(),
            Err(error) => break error,
        }
    };
    assert!(matches!(error, EditError::Full { .. }), "{error}");
    assert!((ENTITY_BYTES_MAX - 3 * (1 << 20)..=ENTITY_BYTES_MAX).contains(&written), "{written}");
    assert!(writer.edit(&[set("title", "a last word")]).is_ok());
}
