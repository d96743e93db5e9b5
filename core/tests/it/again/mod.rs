//! Changes that are made or offered again, because what they built on was refused or the relay lost them.

mod dates;
mod losses;
mod offers;
mod refusals;

use std::sync::Arc;

use anabranch_core::admission::RefusalCode;
use anabranch_core::change::{Change, Note};
use anabranch_core::id::{EntityHash, Incarnation};
use anabranch_core::relay::{Input, RelayConfig};
use anabranch_core::replica::{self};
use anabranch_core::store::{Batch, Keyspace, Store, View};
use anabranch_core::wire::*;
use serde_json::json;

use crate::support::phone::*;
use crate::support::*;

/// One field more than the relay's.
fn newer() -> String {
    SCHEMA.replacen(
        "version = 1\n[note.fields]",
        "version = 2\n[note.fields]\nmore = { type = \"string\" }",
        1,
    )
}

/// Goes on until a phone sends changes, which are to be answered by hand.
fn asked(phone: &mut Phone, world: &mut World) -> Changes {
    for _ in 0..100 {
        phone.replica.durable(phone.store.flush()).unwrap();
        while let Some(output) = phone.replica.poll_output() {
            let replica::Output::Send(bytes) = output else { continue };
            if let Ok(Some(Message::Changes(changes))) = Message::decode(&bytes) {
                return changes;
            }
            world.handle(Input::Received { conn: phone.conn, bytes });
        }
        let told = world.settle(phone.conn);
        for message in told.into_iter().filter(|message| !matches!(message, Message::Welcome(_))) {
            phone.hear(world, message);
        }
    }
    panic!("it sends no changes");
}

/// An answer that refuses the first change of each entity that is named.
fn refusing(asked: &Changes, refusals: &[(&str, RefusalCode)]) -> Ack {
    let refused = refusals.iter().map(|(id, code)| {
        let part = asked.unit.entities.iter().find(|part| part.id == *id).unwrap();
        Refused {
            type_name: part.type_name.clone(),
            id: part.id.clone(),
            hash: Change::parse(&part.changes[0]).unwrap().hash().0,
            code: *code as u16,
            message: "no".into(),
        }
    });
    Ack { channel: 1, unit_id: asked.unit_id, seq: 0, refused: refused.collect() }
}

/// Signs in over a new link, by which the relay's clock is found to be so far ahead.
fn sign_in_anew(phone: &mut Phone, world: &mut World, role: &str, ahead_ms: i64) {
    phone.conn = world.greet(&phone.device);
    phone.replica.disconnect();
    phone.replica.relay_clock_is(world.now, ahead_ms);
    phone.replica.connect(1, Some(token(role)));
}

/// Signs in and sends changes, which are to be answered by hand.
fn offers(phone: &mut Phone, world: &mut World, role: &str) -> Changes {
    sign_in_anew(phone, world, role, 0);
    asked(phone, world)
}

/// Of which entities the user is told that an edit was refused or is lost.
fn told(phone: &Phone) -> Vec<String> {
    let refused = phone.rows().refused().unwrap();
    let mut told: Vec<_> = refused.into_iter().map(|(_, record)| record.id).collect();
    told.sort();
    told
}

fn change_of(changes: &Changes, id: &str, place: usize) -> Change {
    let part = changes.unit.entities.iter().find(|part| part.id == id).unwrap();
    Change::parse(&part.changes[place]).unwrap()
}

/// The same edit as another change.
fn made_again(of: &Change) -> Draft {
    let note = Note { tx: of.note().tx, origin: Some(of.origin()), ..Note::default() };
    Draft { note, ..Draft::default() }
}

/// Another life of a device's store.
fn other_life(number: u8, incarnation: Incarnation) -> Device {
    let mut life = Device::new(number);
    life.author.incarnation = incarnation;
    life
}

/// The relay has lost everything, and an admin has given it this schema.
fn lose_all(world: &mut World, source: &str) {
    world.store = Arc::default();
    world.crash(RelayConfig::default());
    give_schema(world, source);
}

fn give_schema(world: &mut World, source: &str) {
    let admin = world.join(&Device::new(99), "admin");
    world.send(admin, PushSchema { channel: 1, source: source.into() });
    world.settle(admin);
}

/// A writer's note that an admin has too, and the relay no more.
fn lost_by_the_relay() -> (World, Phone, Phone) {
    let mut world = World::with_schema();
    let mut author = Phone::new(1, SCHEMA);
    let mut admin = Phone::new(2, SCHEMA);
    author.join(&mut world, "writer");
    admin.join(&mut world, "admin");
    author.write(&world, &[edit("n1", vec![set("title", json!("x"))])]).unwrap();
    author.talk(&mut world);
    admin.talk(&mut world);
    lose_all(&mut world, SCHEMA);
    (world, author, admin)
}

/// Begins anew with what the store holds.
fn restart(phone: &mut Phone, source: &str) {
    phone.replica = Phone::open(&phone.store, &phone.schema, source, phone.device.id());
}

/// Damages what is stored of one note.
fn damage_one(phone: &Phone, what: Keyspace, id: &str) {
    let hash = EntityHash::of(&home(), &key("note", id)).0;
    let mut batch = Batch::new();
    for (place, _) in phone.store.scan(View::Latest, what, &[], &[], 1000).unwrap() {
        if place.windows(hash.len()).any(|part| part == hash) {
            batch.put(what, place, vec![1, 255]);
        }
    }
    phone.store.commit(batch).unwrap();
    phone.store.flush();
}
