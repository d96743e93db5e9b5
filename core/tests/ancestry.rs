//! Histories that branch: who had seen what is found out at a price that does not grow with how they branch, and
//! an entity that very many wrote to at once goes on.

// In a test a panic is the report.
#![allow(clippy::unwrap_used)]

// Not every helper is needed here.
#[allow(dead_code)]
mod support;

use std::collections::BTreeSet;

use anabranch_core::admission::{Judge, RefusalCode};
use anabranch_core::change::{CHANGE_DEPS_MAX, Change, Role};
use anabranch_core::clock::{Hlc, WallMs};
use anabranch_core::entity::{EditContext, Entity};
use anabranch_core::header::{Header, HeaderIndex};
use anabranch_core::id::{Author, DeviceId, Incarnation};
use anabranch_core::intent::Intent;
use anabranch_core::schema::{EntityType, Schema};
use automerge::{ActorId, ChangeHash};
use serde_json::json;
use support::*;

/// Random numbers, the same each time (Steele, Lea and Flood, "Fast splittable pseudorandom number generators").
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u32) -> u32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((word ^ (word >> 31)) % u64::from(sides)) as u32
    }
}

fn header(place: u32, actor: u32, seq: u64, deps: Vec<u32>) -> Header {
    let mut hash = [0; 32];
    hash[..4].copy_from_slice(&place.to_be_bytes());
    Header {
        hash: ChangeHash(hash),
        actor,
        seq,
        time: Hlc::from_wall(WallMs(u64::from(place))),
        max_op: u64::from(place) + 1,
        role: Role::Device,
        revives: false,
        tx: None,
        deps,
        admitted: true,
    }
}

fn actors(count: u32) -> Vec<(ActorId, Author)> {
    let author = |n: u32| Author { device: DeviceId([n as u8; 32]), incarnation: Incarnation(u64::from(n)) };
    (0..count).map(|n| (ActorId::from(n.to_be_bytes().to_vec()), author(n))).collect()
}

/// Each change follows its actor's last, and some others.
fn history(dice: &mut Dice, changes: u32, writers: u32) -> Vec<Header> {
    let mut last: Vec<Option<(u32, u64)>> = vec![None; writers as usize];
    (0..changes)
        .map(|place| {
            let actor = dice.roll(writers);
            let own = last[actor as usize];
            let mut deps: BTreeSet<u32> = own.into_iter().map(|(place, _)| place).collect();
            deps.extend(
                (0..dice.roll(3))
                    .filter(|_| place > 0)
                    .map(|_| dice.roll(place.max(1)))
                    .filter(|d| *d < place),
            );
            let seq = own.map_or(1, |(_, seq)| seq + 1);
            last[actor as usize] = Some((place, seq));
            header(place, actor, seq, deps.into_iter().collect())
        })
        .collect()
}

#[test]
fn what_was_seen_is_what_a_walk_along_all_dependencies_finds() {
    for seed in 0..40 {
        let mut dice = Dice(seed);
        let (changes, writers) = (20 + dice.roll(120), 1 + dice.roll(12));
        let headers = history(&mut dice, changes, writers);
        let index = HeaderIndex::from_parts(headers.clone(), actors(writers)).unwrap();
        let mut ancestors: Vec<BTreeSet<u32>> = Vec::new();
        for header in &headers {
            let mut all: BTreeSet<u32> = header.deps.iter().copied().collect();
            header.deps.iter().for_each(|dep| all.extend(&ancestors[*dep as usize]));
            ancestors.push(all);
        }
        for _ in 0..2_000 {
            let (old, new) = (dice.roll(changes), dice.roll(changes));
            assert_eq!(
                index.is_ancestor(old, new),
                ancestors[new as usize].contains(&old),
                "{seed}: {old} {new}"
            );
        }
        let (one, two) = (dice.roll(changes), dice.roll(changes));
        let common = index.past([one]).common(&index.past([two]));
        let both = index.past([one, two]);
        let follows = index.followers(one);
        for place in 0..changes {
            let within = |side: u32| side == place || ancestors[side as usize].contains(&place);
            let header = &headers[place as usize];
            assert_eq!(
                common.holds(header),
                within(one) && within(two),
                "{seed}: {place} of {one} and {two}"
            );
            assert_eq!(both.holds(header), within(one) || within(two), "{seed}: {place} of {one} or {two}");
            assert_eq!(follows[place as usize], ancestors[place as usize].contains(&one), "{seed}: {place}");
        }
        let kept = dice.roll(changes) as usize;
        let mut cut = index.clone();
        cut.truncate(kept);
        let actors_left =
            headers[..kept].iter().map(|header| header.actor).max().map_or(0, |actor| actor + 1);
        let whole = HeaderIndex::from_parts(headers[..kept].to_vec(), actors(actors_left));
        if actors_left as usize == cut.actors().len() {
            assert_eq!(Some(&cut), whole.as_ref(), "{seed}");
        }
        assert!(headers[kept..].iter().all(|header| !cut.contains(&header.hash)));
    }
}

/// A change of few bytes can name a million operations of another branch as what it replaces. Asking that of each
/// walked the branch each time.
#[test]
fn a_branch_is_walked_once_however_often_it_is_asked() {
    const LONG: u32 = 20_000;
    let chain = (0..LONG).map(|place| {
        let actor = u32::from(place > 0);
        header(
            place,
            actor,
            u64::from(if place == 0 { 1 } else { place }),
            place.checked_sub(1).into_iter().collect(),
        )
    });
    let index = HeaderIndex::from_parts(chain.collect(), actors(2)).unwrap();
    assert!(index.is_ancestor(0, LONG - 1));
    let once = index.walked();
    assert!(once < u64::from(LONG) + 100, "{once}");
    // A change after the other asks, as those of a unit do.
    for place in 1..LONG {
        assert!(index.past([place]).holds(index.get(0).unwrap()));
    }
    assert!(index.walked() < 4 * u64::from(LONG), "{}", index.walked());
}

const SCHEMA: &str = r#"
[note]
version = 1
[note.fields]
title = { type = "string" }
count = { type = "int", merge = "counter" }
"#;

fn note() -> EntityType {
    Schema::parse(SCHEMA, "note").unwrap().types["note"].clone()
}

fn edit(entity: &mut Entity, ty: &EntityType, number: u32, wall: u64, intents: &[Intent]) -> Change {
    let mut device = [0; 32];
    device[..4].copy_from_slice(&number.to_be_bytes());
    let context = EditContext {
        ty,
        author: Author { device: DeviceId(device), incarnation: Incarnation(0) },
        role: Role::Device,
        wall: WallMs(wall),
        spread: 0,
        tx: None,
        origin: None,
        based_on: None,
        checked: true,
    };
    entity.edit(&context, intents).unwrap().unwrap().change
}

/// A change names its dependencies, and no more than so many. Each of more devices than that wrote before it heard
/// of the others.
#[test]
fn an_entity_that_very_many_wrote_to_at_once_can_be_edited() {
    const WRITERS: u32 = CHANGE_DEPS_MAX as u32 + 500;
    let (ty, key) = (note(), key("note", "n1"));
    let add = |by| Intent::Increment { field: "count".into(), by };
    let set = |value: &str| Intent::Set { field: "title".into(), value: json!(value) };
    let mut first = Entity::new(&home(), &key, Some(&ty));
    let mut all = vec![edit(&mut first, &ty, 0, 1_000, &[set("first")])];
    for number in 1..=WRITERS {
        let mut alone = first.clone();
        all.push(edit(
            &mut alone,
            &ty,
            number,
            2_000 + u64::from(number),
            &[set(&format!("{number}")), add(1)],
        ));
    }
    let mut entity = Entity::new(&home(), &key, Some(&ty));
    let received = entity.receive(all.clone(), Some(&ty), Judge::Admitted, true);
    assert_eq!(received.applied.len(), all.len(), "{:?}", received.refused);
    assert_eq!(entity.heads().len(), WRITERS as usize);
    for (round, heads) in [601, 1].into_iter().enumerate() {
        let change =
            edit(&mut entity, &ty, 7_000, 9_000 + round as u64, &[set(&format!("mine {round}")), add(1)]);
        assert!(change.deps().len() <= CHANGE_DEPS_MAX);
        all.push(change);
        let row = entity.row(&ty);
        assert_eq!(row.fields["title"], json!(format!("mine {round}")));
        assert_eq!(row.fields["count"], json!(WRITERS as usize + round + 1));
        assert_eq!(entity.heads().len(), heads);
    }
    let mut other = Entity::new(&home(), &key, Some(&ty));
    other.receive(all, Some(&ty), Judge::Admitted, true);
    assert_eq!(other.row(&ty), entity.row(&ty));
}

/// An entity has places for so many authors. A device that begins anew again and again gets no more than its share.
#[test]
fn no_device_takes_the_places_of_all_authors() {
    let mut world = World::lenient();
    let conn = world.join(&Device::new(1), "writer");
    let mut refused = 0;
    for incarnation in 0..1_010 {
        let mut life = Device::new(1);
        life.author.incarnation = Incarnation::new(incarnation, 0);
        let change = life.edit("n1");
        let ack = world.submit(conn, unit([of("n1", &[&change])]));
        refused += codes(&ack).iter().filter(|code| **code == RefusalCode::Quota).count();
    }
    assert_eq!(refused, 10);
    let mut other = Device::new(2);
    let conn = world.join(&other, "writer");
    assert_eq!(world.submit(conn, unit([of("n1", &[&other.edit("n1")])])).refused, []);
}
