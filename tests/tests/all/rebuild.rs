//! Refused changes leave, and everything that did not need them stays.

use std::collections::{BTreeMap, BTreeSet};

use anabranch_core::change::{Origin, Role};
use anabranch_core::entity::{Entity, Pending, Rewritten};
use anabranch_core::id::{Author, Incarnation};
use anabranch_core::intent::Intent;
use anabranch_core::schema::EntityType;
use anabranch_tests::model::{Deed, Edit, EditId, Effects, Log, Seen};
use anabranch_tests::world::{World, fields};
use proptest::prelude::*;
use serde_json::{Value as Json, json};

use crate::schedules::{config, everything, play, steps};

const ANN: usize = 0;
const BEN: usize = 1;

/// Rebuilds Ann's entity without `refused`. Her edits from number `first` on are pending; what
/// is left must be what the model makes of the log without the refused edits. Returns the
/// entity and what became of each pending edit.
fn rebuild(
    world: &World,
    pending: &BTreeMap<EditId, Vec<Intent>>,
    refused: &BTreeSet<EditId>,
) -> (Entity, Vec<Rewritten>) {
    let ann = &world.devices[ANN];
    let author = Author { incarnation: Incarnation::new(0, 1), ..ann.author };
    let own: Vec<Pending> = pending
        .iter()
        .map(|(id, intents)| Pending {
            hash: world.change(*id).hash(),
            intents: intents.clone(),
            role: ann.role,
            tx: None,
            origin: Origin::of(&world.change(*id).hash()),
            wall: None,
            twin: None,
        })
        .collect();
    let hashes = refused.iter().map(|id| world.change(*id).hash()).collect();
    let rebuilt = ann.entity.rebuild(&hashes, &BTreeSet::new(), &own, &world.ty, author).unwrap();
    let mut log = world.log.clone();
    // Which edit of the new log stands for which of the old one; none where it is gone.
    let mut now: BTreeMap<EditId, Option<EditId>> =
        world.seen_by(ANN).into_iter().map(|id| (id, Some(id))).collect();
    for ((id, _), result) in pending.iter().zip(&rebuilt.pending) {
        now.insert(*id, remade(&mut log, &now, world, *id, refused, result));
    }
    let seen: Seen = now.values().flatten().copied().collect();
    if let Err(wrong) = log.check(&seen, &rebuilt.entity.row(&world.ty)) {
        panic!("without {refused:?}: {wrong}\n{}", world.story());
    }
    world.check_saved(&rebuilt.entity);
    (rebuilt.entity, rebuilt.pending)
}

/// What the model makes of one pending edit, held to what the engine made of it.
fn remade(
    log: &mut Log,
    now: &BTreeMap<EditId, Option<EditId>>,
    world: &World,
    id: EditId,
    refused: &BTreeSet<EditId>,
    result: &Rewritten,
) -> Option<EditId> {
    let told = || format!("edit {id} without {refused:?}: {result:?}\n{}", world.story());
    let old = log.edit(id).clone();
    if refused.contains(&id) {
        assert!(matches!(result, Rewritten::Gone { why: None, .. }), "{}", told());
        return None;
    }
    if old.saw.iter().all(|seen| now[seen] == Some(*seen)) {
        assert!(matches!(result, Rewritten::Kept(_)), "{}", told());
        return Some(id);
    }
    let saw: Seen = old.saw.iter().filter_map(|seen| now[seen]).collect();
    let came: Vec<(String, Json)> = saw
        .iter()
        .flat_map(|seen| &log.edit(*seen).deeds)
        .filter_map(|deed| match deed {
            Deed::Sequence { field, came, .. } => Some(came.iter().map(|item| (field.clone(), item.clone()))),
            Deed::Plain(_) => None,
        })
        .flatten()
        .collect();
    let deeds: Vec<Deed> = old.deeds.iter().map(|deed| without_lost_items(deed, &came)).collect();
    let effects = log.judge(old.role, &saw, &deeds);
    match (&effects, result) {
        (Ok(effects), Rewritten::Again { change, .. }) => {
            assert_ne!(*effects, Effects::none(), "{}", told());
            assert_eq!(change.time().wall(), old.time.wall(), "its time: {}", told());
            assert!(change.time() <= old.time, "its time: {}", told());
            Some(log.push(Edit {
                time: change.time(),
                actor: change.actor().to_bytes().to_vec(),
                saw,
                deeds,
                effects: effects.clone(),
                ..old
            }))
        }
        (Ok(effects), Rewritten::Gone { why: Some(_), .. }) => {
            assert_eq!(*effects, Effects::none(), "{}", told());
            None
        }
        (Err(_), Rewritten::Gone { why: Some(_), .. }) => None,
        _ => panic!("the model says {effects:?} of {}", told()),
    }
}

/// Items that only refused edits brought can't be removed, nor stand before anything.
fn without_lost_items(deed: &Deed, came: &[(String, Json)]) -> Deed {
    let Deed::Sequence { field, gone, came: new, view, fleeting } = deed else { return deed.clone() };
    let there = |item: &&Json| came.iter().any(|(name, known)| name == field && known == *item);
    Deed::Sequence {
        field: field.clone(),
        gone: gone.iter().filter(there).cloned().collect(),
        came: new.clone(),
        view: view.iter().filter(|item| there(item) || new.contains(item)).cloned().collect(),
        fleeting: *fleeting,
    }
}

/// A story in which Ann edits alone: the edits, of which one is refused.
struct Story {
    world: World,
    pending: BTreeMap<EditId, Vec<Intent>>,
}

impl Story {
    fn of(ty: &EntityType) -> Self {
        Self { world: World::of(ty, 2), pending: BTreeMap::new() }
    }

    fn edit(&mut self, intents: &[Intent]) -> EditId {
        let id = self.world.edit(ANN, intents);
        self.pending.insert(id, intents.to_vec());
        id
    }

    fn refuse(&self, id: EditId) -> (BTreeMap<String, Json>, Vec<Rewritten>) {
        let (entity, results) = rebuild(&self.world, &self.pending, &BTreeSet::from([id]));
        (entity.row(&self.world.ty).fields, results)
    }
}

fn everyday() -> EntityType {
    fields(
        r#"title = { type = "string" }
        body = { type = "text" }
        items = { type = "list", of = "int" }
        tags = { type = "set", of = "string" }
        days = { type = "map", of = "int" }
        count = { type = "int", merge = "counter" }"#,
    )
}

fn set(field: &str, value: Json) -> Intent {
    Intent::Set { field: field.into(), value }
}

fn more(by: i64) -> Intent {
    Intent::Increment { field: "count".into(), by }
}

fn splice(at: usize, delete: usize, insert: &str) -> Intent {
    Intent::Splice { field: "body".into(), at, delete, insert: insert.into() }
}

fn insert(at: Option<usize>, items: &[i64]) -> Intent {
    Intent::Insert { field: "items".into(), at, items: items.iter().map(|n| json!(n)).collect() }
}

#[test]
fn counters_are_not_doubled() {
    let mut story = Story::of(&everyday());
    story.edit(&[more(5)]);
    let refused = story.edit(&[more(10)]);
    story.edit(&[more(100)]);
    story.edit(&[more(1_000)]);
    assert_eq!(story.refuse(refused).0["count"], 1_105);
}

#[test]
fn text_stays_where_it_was_meant() {
    let mut story = Story::of(&everyday());
    story.edit(&[splice(0, 0, "ad")]);
    let refused = story.edit(&[splice(1, 0, "XYZ")]);
    story.edit(&[splice(4, 0, "bc")]);
    story.edit(&[splice(1, 1, "")]);
    story.edit(&[splice(6, 0, "e")]);
    assert_eq!(story.refuse(refused).0["body"], "abcde");
}

#[test]
fn a_replacement_that_reaches_into_refused_text_takes_the_rest() {
    let mut story = Story::of(&everyday());
    story.edit(&[splice(0, 0, "abcd")]);
    let refused = story.edit(&[splice(2, 0, "XY")]);
    story.edit(&[splice(1, 4, "-")]);
    assert_eq!(story.refuse(refused).0["body"], "a-d");
}

#[test]
fn list_items_stay_where_they_were_meant() {
    let mut story = Story::of(&everyday());
    story.edit(&[insert(None, &[1, 5])]);
    let refused = story.edit(&[insert(Some(1), &[90, 91])]);
    story.edit(&[insert(Some(3), &[2, 3])]);
    story.edit(&[Intent::RemoveItems { field: "items".into(), at: 1, count: 1 }]);
    story.edit(&[insert(None, &[6])]);
    assert_eq!(story.refuse(refused).0["items"], json!([1, 2, 3, 5, 6]));
}

#[test]
fn sets_and_maps_keep_what_was_independent() {
    let add = |element: &str| Intent::Add { field: "tags".into(), element: json!(element) };
    let put =
        |key: &str, value: i64| Intent::Put { field: "days".into(), key: key.into(), value: json!(value) };
    let mut story = Story::of(&everyday());
    story.edit(&[add("a"), put("mon", 1)]);
    let refused = story.edit(&[add("b"), put("mon", 2), put("tue", 2)]);
    story.edit(&[add("c"), put("wed", 3)]);
    story.edit(&[Intent::Remove { field: "tags".into(), element: json!("b") }]);
    let (fields, results) = story.refuse(refused);
    assert_eq!(fields["tags"], json!(["a", "c"]));
    assert_eq!(fields["days"], json!({"mon": 1, "wed": 3}));
    assert!(matches!(&results[3], Rewritten::Gone { why: Some(_), .. }), "there is nothing to remove");
}

#[test]
fn edits_of_what_was_never_created_go_with_a_reason() {
    let ty = fields(
        "name = { type = \"string\", required = true }\ncount = { type = \"int\", merge = \"counter\" }",
    );
    let mut story = Story::of(&ty);
    let create = story.edit(&[set("name", json!("a"))]);
    story.edit(&[more(1)]);
    story.edit(&[Intent::Delete]);
    let (_, results) = story.refuse(create);
    for result in &results[1..] {
        assert!(matches!(result, Rewritten::Gone { why: Some(why), .. } if !why.is_empty()), "{result:?}");
    }
}

#[test]
fn order_and_times_are_kept() {
    let mut story = Story::of(&everyday());
    let refused = story.edit(&[set("title", json!("a"))]);
    let rest = [story.edit(&[more(1)]), story.edit(&[set("title", json!("b"))]), story.edit(&[more(2)])];
    let (_, results) = story.refuse(refused);
    for (id, result) in rest.iter().zip(&results[1..]) {
        let Rewritten::Again { change, .. } = result else { panic!("{result:?}") };
        assert_eq!(change.time(), story.world.log.edit(*id).time);
    }
}

#[test]
fn another_devices_beginning_does_not_cost_the_edits_after_a_refused_one() {
    let mut story = Story::of(&everyday());
    let refused = story.edit(&[set("title", json!("a"))]);
    story.edit(&[more(1), splice(0, 0, "x")]);
    story.world.edit(BEN, &[more(10)]);
    story.world.meet(BEN, ANN, 1, 1);
    assert_eq!(story.refuse(refused).0["count"], 11);
}

#[test]
fn an_edit_across_what_others_wrote_meanwhile_stays_in_place() {
    let mut story = Story::of(&everyday());
    story.world.edit(BEN, &[splice(0, 0, "ad")]);
    story.world.meet(BEN, ANN, 1, 1);
    let refused = story.edit(&[splice(1, 0, "XX")]);
    story.world.edit(BEN, &[splice(1, 0, "b")]);
    story.world.meet(BEN, ANN, 1, 1);
    let at = story.world.row(ANN).fields["body"].as_str().unwrap().find('d').unwrap();
    story.edit(&[splice(at, 0, "c")]);
    assert_eq!(story.refuse(refused).0["body"], "abcd");
}

proptest! {
    #![proptest_config(config(120))]

    /// Ann shares the beginning; then she edits alone and only hears. Any of her edits may be
    /// refused.
    #[test]
    fn a_rebuilt_entity_is_the_log_without_the_refused(
        shared in steps(8),
        alone in steps(16),
        which: u32,
        authority: bool,
    ) {
        let role = if authority { Role::Authority } else { Role::Device };
        let mut world = World::new(&everything(), &[role, Role::Device, Role::Authority]);
        let mut unique = 0;
        play(&mut world, &shared, &mut unique);
        let begun = world.seen_by(ANN);
        let alone: Vec<_> = alone.into_iter().map(|step| step.hears_only(ANN as u8)).collect();
        play(&mut world, &alone, &mut unique);
        let pending: BTreeMap<EditId, Vec<Intent>> = world
            .seen_by(ANN)
            .into_iter()
            .filter(|id| !begun.contains(id) && world.log.edit(*id).device == world.devices[ANN].author.device)
            .map(|id| (id, world.intents(id).to_vec()))
            .collect();
        let chosen = pending.keys().enumerate().filter(|(n, _)| which >> (n % 32) & 1 == 1);
        let refused: BTreeSet<EditId> = chosen.map(|(_, id)| *id).collect();
        rebuild(&world, &pending, &refused);
    }
}
