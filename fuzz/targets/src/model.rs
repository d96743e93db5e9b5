//! A device held to a map: what was written and made durable is shown, nothing else is. It drives
//! core's [`Replica`] through the calls that the engine makes, without the engine's threads.
//!
//! The first byte says whether edits also name the version that the user saw: the present one, or one of
//! before, by which the device's own edits meet as if two had made them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use anabranch_core::entity::EditError;
use anabranch_core::id::EntityKey;
use anabranch_core::intent::Intent;
use anabranch_core::query::{self, Filter, Op, Query};
use anabranch_core::replica::{Edit, Expect, Replica, WriteError, parse_version};
use anabranch_core::rows::Rows;
use anabranch_core::store::{CommitNo, Store as _};
use anabranch_store::MemoryStore;
use automerge::ChangeHash;
use serde_json::{Value as Json, json};

use crate::{Draw, link, noise_seeds, world};

const STEPS_MAX: usize = 400;
/// Versions of one entity that are remembered.
const VERSIONS_MAX: usize = 6;

/// What one thing shows.
#[derive(Clone, Debug, Default, PartialEq)]
struct Thing {
    deleted: bool,
    title: Option<String>,
    level: Option<i64>,
    best: Option<i64>,
    count: i64,
    /// Each with the edits that added it: who removes it removes those that it saw.
    tags: BTreeMap<String, BTreeSet<u32>>,
    log: Vec<String>,
    days: BTreeMap<String, i64>,
    body: Vec<char>,
    /// Values that no other replaced, the newest last. If they differ, a person has to settle it.
    mine: Vec<(u32, String)>,
}

impl Thing {
    fn in_conflict(&self) -> bool {
        self.mine.iter().any(|(_, value)| *value != self.mine[0].1)
    }
}

/// What a thing showed at a time that the user may go back to.
#[derive(Clone, Debug)]
struct Version {
    heads: Vec<ChangeHash>,
    commit: CommitNo,
    thing: Thing,
}

type Things = BTreeMap<EntityKey, Thing>;

struct World {
    store: Arc<MemoryStore>,
    replica: Replica,
    ms: u64,
    /// What each commit made of everything, those that are durable gone but for the newest.
    states: Vec<(CommitNo, Things)>,
    unique: u32,
    /// Whether edits name versions.
    versioned: bool,
    /// Of each thing since it was created or brought back, the newest last.
    versions: BTreeMap<EntityKey, Vec<Version>>,
}

impl World {
    fn open(store: MemoryStore, things: Things) -> Self {
        let store = Arc::new(store);
        let replica = Replica::open(store.clone(), link::config()).expect("what was written can be opened");
        let mut world = Self {
            store,
            replica,
            ms: 0,
            states: Vec::new(),
            unique: 0,
            versioned: false,
            versions: BTreeMap::new(),
        };
        world.states.push((world.replica.last_commit(), things));
        world
    }

    fn latest(&self) -> &Things {
        &self.states.last().unwrap().1
    }

    fn durable(&self) -> &Things {
        let durable = self.store.durable().unwrap();
        &self.states.iter().rev().find(|(commit, _)| *commit <= durable).unwrap_or(&self.states[0]).1
    }

    fn rows(&self) -> Rows {
        Rows::new(self.store.clone(), world::schema().clone(), &world::home())
    }

    /// Some of what is queued becomes durable.
    fn flush(&mut self, commits: u64) {
        let upto = CommitNo(self.store.durable().unwrap().0.saturating_add(commits));
        self.store.make_durable(upto).unwrap();
        let durable = self.store.durable().unwrap();
        self.replica.durable(durable).unwrap();
        while self.replica.poll_output().is_some() {}
    }

    /// The process dies: what was not durable is gone.
    fn crash(self) -> Self {
        let things = self.durable().clone();
        let durable = self.store.durable().unwrap();
        let mut world = Self {
            ms: self.ms,
            unique: self.unique,
            versioned: self.versioned,
            versions: self.versions,
            ..Self::open(self.store.reopen(), things)
        };
        for versions in world.versions.values_mut() {
            versions.retain(|version| version.commit <= durable);
        }
        world
    }

    fn write(&mut self, draw: &mut Draw<'_>) {
        let mut after = self.latest().clone();
        let mut edits: Vec<Edit> = Vec::new();
        let members = if draw.one_in(4) { 2 + draw.below(2) } else { 1 };
        let mut valid = true;
        for _ in 0..members {
            let key = world::thing(["a", "b", "c", "d"][draw.below(4)]);
            if edits.iter().any(|edit| edit.key == key) {
                continue;
            }
            let known = after.get(&key).cloned();
            let mut thing = known.clone().unwrap_or_default();
            let expect = *draw.of(&[Expect::Any, Expect::Any, Expect::Any, Expect::New, Expect::Existing]);
            // To create what is deleted is to bring it back, which is another edit than drawn here.
            let deleted = known.as_ref().is_some_and(|thing| thing.deleted);
            let expect = if deleted { Expect::Any } else { expect };
            valid &= match expect {
                Expect::Any => true,
                Expect::New => known.is_none(),
                Expect::Existing => known.is_some(),
            };
            let (intents, possible, based_on) = match self.versioned {
                true => self.versioned_intents(&key, &mut thing, known.is_some(), draw),
                false => {
                    let (intents, possible) = self.intents(&mut thing, known.is_some(), draw);
                    (intents, possible, None)
                }
            };
            valid &= possible;
            after.insert(key.clone(), thing);
            edits.push(Edit { key, intents, based_on, expect });
        }
        // Edits of one reading of the clock are told apart too.
        let passed = draw.byte();
        self.ms += u64::from(if self.versioned { passed / 128 } else { passed });
        let before = self.replica.last_commit();
        match self.replica.write(world::now(self.ms), &edits, true) {
            Ok(written) => {
                assert!(valid, "{edits:?} was written");
                let alone = edits.len() == 1 || written.changed == 1;
                for (edit, version) in edits.iter().zip(&written.versions) {
                    let forgotten = version.is_empty();
                    let deletes = matches!(edit.intents[..], [Intent::Delete]);
                    // What nobody else has seen is forgotten when it is deleted by itself.
                    assert!(!forgotten || !self.latest().contains_key(&edit.key) || (deletes && alone));
                    assert!(!version.is_empty() || parse_version(version).is_none());
                    if forgotten {
                        after.remove(&edit.key);
                    }
                    self.remember(edit, version, written.commit, after.get(&edit.key));
                }
                if written.commit != before {
                    self.states.push((written.commit, after));
                } else {
                    assert_eq!(&after, self.latest(), "{edits:?} was said to change nothing");
                }
            }
            Err(error @ (WriteError::Edit(_) | WriteError::Exists(_))) => {
                assert!(!matches!(error, WriteError::Edit(EditError::Document(_))), "{error}: {edits:?}");
                assert!(!valid, "{error}: {edits:?} was not written");
                assert_eq!(self.replica.last_commit(), before, "a write that failed left something");
            }
            Err(error) => panic!("{error}: {edits:?}"),
        }
    }

    fn remember(&mut self, edit: &Edit, version: &str, commit: CommitNo, thing: Option<&Thing>) {
        let versions = self.versions.entry(edit.key.clone()).or_default();
        if edit.intents.iter().any(|intent| matches!(intent, Intent::Delete | Intent::Revive)) {
            versions.clear();
        }
        let (Some(thing), Some(heads)) = (thing, parse_version(version)) else { return versions.clear() };
        let known = versions.last().is_some_and(|last| last.heads == heads);
        if !thing.deleted && !known {
            versions.push(Version { heads, commit, thing: thing.clone() });
        }
        let surplus = versions.len().saturating_sub(VERSIONS_MAX);
        versions.drain(..surplus);
    }

    /// Intents, whether they can be carried out, and on which version.
    fn versioned_intents(
        &mut self,
        key: &EntityKey,
        thing: &mut Thing,
        exists: bool,
        draw: &mut Draw<'_>,
    ) -> (Vec<Intent>, bool, Option<Vec<ChangeHash>>) {
        let choice = draw.below(8);
        let versions = self.versions.get(key).map_or(&[][..], Vec::as_slice);
        let current = versions.last().map(|version| version.heads.clone());
        match (choice, current) {
            (0..=1, based_on) => {
                let (intents, possible) = self.intents(thing, exists, draw);
                (intents, possible, based_on)
            }
            (2, based_on) if !thing.deleted => {
                let (intents, possible) = self.set_mine(thing, draw);
                (intents, possible, based_on)
            }
            (3, Some(mut unknown)) => {
                unknown.push(ChangeHash([draw.byte(); 32]));
                (vec![Intent::Increment { field: "count".into(), by: 1 }], false, Some(unknown))
            }
            (4.., Some(_)) => {
                // At the far end is the thing before it was created.
                let at = draw.below(versions.len() + 1);
                let base = versions.get(at).cloned();
                let base = base.unwrap_or(Version {
                    heads: Vec::new(),
                    commit: CommitNo(0),
                    thing: Thing::default(),
                });
                let intents = self.late_intents(thing, &base.thing, draw);
                (intents, true, Some(base.heads))
            }
            _ => {
                let (intents, possible) = self.intents(thing, exists, draw);
                (intents, possible, None)
            }
        }
    }

    /// Writes what is settled by hand, as one who sees all of it.
    fn set_mine(&mut self, thing: &mut Thing, draw: &mut Draw<'_>) -> (Vec<Intent>, bool) {
        self.unique += 1;
        let value = (*draw.of(&["x", "y", "z"])).to_owned();
        let resolves = draw.one_in(2);
        let open = thing.in_conflict();
        let possible = resolves || !open;
        let same = !open && thing.mine.last().is_some_and(|(_, shown)| *shown == value);
        if possible && !same {
            thing.mine = vec![(self.unique, value.clone())];
        }
        let (field, value) = ("mine".to_owned(), json!(value));
        let intent = if resolves { Intent::Resolve { field, value } } else { Intent::Set { field, value } };
        (vec![intent], possible)
    }

    /// What a user means who saw `base`, each field once. What came since stays beside it, as far as it is
    /// of another kind, and gives way where one value has to stand.
    fn late_intents(&mut self, thing: &mut Thing, base: &Thing, draw: &mut Draw<'_>) -> Vec<Intent> {
        let set = |field: &str, value: Json| Intent::Set { field: field.into(), value };
        let mut intents: Vec<Intent> = Vec::new();
        for _ in 0..1 + draw.below(3) {
            self.unique += 1;
            let unique = self.unique;
            let word = (*draw.of(&["x", "y", "ü", "z z", ""])).to_owned();
            let number = i64::from(draw.byte()) - 100;
            let kind = draw.below(8);
            let field = ["title", "level", "best", "count", "tags", "log", "days", "mine"][kind];
            if intents.iter().any(|intent| intent.field() == Some(field)) {
                continue;
            }
            intents.push(match field {
                "title" => {
                    let title = (!draw.one_in(5)).then_some(word);
                    if title != base.title {
                        thing.title = title.clone();
                    }
                    set(field, json!(title))
                }
                "level" => {
                    let level = (!draw.one_in(5)).then_some(number);
                    if level != base.level {
                        thing.level = level;
                    }
                    set(field, json!(level))
                }
                "best" => {
                    thing.best = thing.best.max(Some(number));
                    set(field, json!(number))
                }
                "tags" => match base.tags.get(&word) {
                    Some(seen) => {
                        if let Some(held) = thing.tags.get_mut(&word) {
                            held.retain(|add| !seen.contains(add));
                        }
                        thing.tags.retain(|_, held| !held.is_empty());
                        Intent::Remove { field: field.into(), element: json!(word) }
                    }
                    None => {
                        thing.tags.entry(word.clone()).or_default().insert(unique);
                        Intent::Add { field: field.into(), element: json!(word) }
                    }
                },
                "log" if !base.log.is_empty() => {
                    let at = draw.below(base.log.len());
                    let count = 1 + draw.below(base.log.len() - at);
                    thing.log.retain(|item| !base.log[at..at + count].contains(item));
                    Intent::RemoveItems { field: field.into(), at, count }
                }
                "days" if world::ty().fields["days"].check_key(&word).is_ok() => {
                    let best = thing.days.entry(word.clone()).or_insert(number);
                    *best = number.max(*best);
                    Intent::Put { field: field.into(), key: word, value: json!(number) }
                }
                "mine" => {
                    let value = (*draw.of(&["x", "y", "z"])).to_owned();
                    let shown = base.mine.last().map(|(_, shown)| shown);
                    if base.in_conflict() || shown != Some(&value) {
                        thing.mine.retain(|held| !base.mine.contains(held));
                        thing.mine.push((unique, value.clone()));
                    }
                    Intent::Resolve { field: field.into(), value: json!(value) }
                }
                _ => {
                    thing.count += number;
                    Intent::Increment { field: "count".into(), by: number }
                }
            });
        }
        intents
    }

    fn intents(&mut self, thing: &mut Thing, exists: bool, draw: &mut Draw<'_>) -> (Vec<Intent>, bool) {
        if exists && thing.deleted {
            return match draw.below(3) {
                // Already so.
                0 => (vec![Intent::Delete], false),
                1 => {
                    thing.deleted = false;
                    (vec![Intent::Revive], true)
                }
                _ => {
                    let intent = Intent::Increment { field: "count".into(), by: 1 };
                    (vec![intent], false)
                }
            };
        }
        if draw.one_in(8) {
            thing.deleted = exists;
            return (vec![Intent::Delete], exists);
        }
        let mut intents = Vec::new();
        let mut valid = true;
        for _ in 0..1 + draw.below(4) {
            let before = thing.body.clone();
            let (intent, possible) = self.intent(thing, draw);
            // A text that was edited is not set as a whole too: one of them would be lost.
            let whole = matches!(intent, Intent::Set { .. }) && intent.field() == Some("body");
            if whole && intents.iter().any(|earlier: &Intent| earlier.field() == Some("body")) {
                thing.body = before;
                continue;
            }
            valid &= possible;
            intents.push(intent);
        }
        (intents, valid)
    }

    fn intent(&mut self, thing: &mut Thing, draw: &mut Draw<'_>) -> (Intent, bool) {
        let set = |field: &str, value: Json| Intent::Set { field: field.into(), value };
        let word = |draw: &mut Draw<'_>| (*draw.of(&["x", "y", "ü", "z z", ""])).to_owned();
        let number = i64::from(draw.byte()) - 100;
        let intent = match draw.below(16) {
            0 | 1 => {
                thing.title = (!draw.one_in(5)).then(|| word(draw));
                set("title", json!(thing.title))
            }
            2 => {
                thing.level = (!draw.one_in(5)).then_some(number);
                set("level", json!(thing.level))
            }
            3 => {
                if thing.best.is_none_or(|best| best < number) {
                    thing.best = Some(number);
                }
                set("best", json!(number))
            }
            4 | 5 => {
                thing.count += number;
                Intent::Increment { field: "count".into(), by: number }
            }
            6 => {
                let element = word(draw);
                self.unique += 1;
                thing.tags.entry(element.clone()).or_insert_with(|| BTreeSet::from([self.unique]));
                Intent::Add { field: "tags".into(), element: json!(element) }
            }
            7 => {
                let element = word(draw);
                thing.tags.remove(&element);
                Intent::Remove { field: "tags".into(), element: json!(element) }
            }
            8 | 9 => {
                self.unique += 1;
                let item = format!("i{}", self.unique);
                let at = (!draw.one_in(3)).then(|| draw.below(thing.log.len() + 1));
                thing.log.insert(at.unwrap_or(thing.log.len()), item.clone());
                Intent::Insert { field: "log".into(), at, items: vec![json!(item)] }
            }
            10 if !thing.log.is_empty() => {
                let at = draw.below(thing.log.len());
                let count = 1 + draw.below(thing.log.len() - at);
                thing.log.drain(at..at + count);
                Intent::RemoveItems { field: "log".into(), at, count }
            }
            11 => {
                let (key, value) = (word(draw), number);
                let best = thing.days.entry(key.clone()).or_insert(value);
                *best = value.max(*best);
                // A key is one that the field takes.
                return (Intent::Put { field: "days".into(), key: key.clone(), value: json!(value) }, {
                    world::ty().fields["days"].check_key(&key).is_ok()
                });
            }
            12 | 13 => {
                let at = draw.below(thing.body.len() + 1);
                let delete = draw.below(thing.body.len() - at + 1);
                let insert = word(draw);
                thing.body.splice(at..at + delete, insert.chars());
                Intent::Splice { field: "body".into(), at, delete, insert }
            }
            14 => {
                let text = word(draw);
                thing.body = text.chars().collect();
                set("body", json!(text))
            }
            _ => {
                let wrong: [Intent; 6] = [
                    set("nothing", json!(1)),
                    set("level", json!("high")),
                    Intent::Insert { field: "log".into(), at: Some(usize::MAX), items: vec![json!("x")] },
                    Intent::RemoveItems { field: "log".into(), at: usize::MAX, count: 2 },
                    Intent::Splice { field: "body".into(), at: 1, delete: usize::MAX, insert: "".into() },
                    Intent::Increment { field: "count".into(), by: i64::MIN },
                ];
                return (draw.of(&wrong).clone(), false);
            }
        };
        (intent, true)
    }

    /// What is shown is what the model says is durable.
    fn compare(&self) {
        let expected = self.durable();
        let rows = self.rows();
        let conflicts = rows.conflicts().expect("conflicts can be read");
        for id in ["a", "b", "c", "d"] {
            let key = world::thing(id);
            let row = rows.get(&key).expect("rows can be read");
            assert_eq!(row.is_some(), expected.contains_key(&key), "{key} is there, or is not");
            let (Some(row), Some(thing)) = (row, expected.get(&key)) else { continue };
            assert_eq!(row.deleted, thing.deleted, "{key}");
            let text: String = thing.body.iter().collect();
            let mut tags: Vec<&str> =
                row.fields["tags"].as_array().unwrap().iter().filter_map(Json::as_str).collect();
            tags.sort_unstable();
            assert_eq!(tags, thing.tags.keys().map(String::as_str).collect::<Vec<_>>(), "{key}");
            let open =
                conflicts.iter().filter(|(of, conflict)| *of == key && conflict.field == "mine").count();
            assert_eq!(open > 0, thing.in_conflict() && !thing.deleted, "{key}: {:?}", thing.mine);
            for (field, value) in [
                ("title", json!(thing.title)),
                ("level", json!(thing.level)),
                ("best", json!(thing.best)),
                ("count", json!(thing.count)),
                ("log", json!(thing.log)),
                ("days", json!(thing.days)),
                ("body", json!(text)),
                ("mine", json!(thing.mine.last().map(|(_, value)| value))),
            ] {
                assert_eq!(row.fields[field], value, "{key}.{field}");
            }
        }
    }

    fn ask(&self, draw: &mut Draw<'_>) {
        let bound = i64::from(draw.byte()) - 100;
        let op = *draw.of(&[Op::Lt, Op::Ge, Op::Eq, Op::Ne]);
        let query = Query {
            type_name: "thing".into(),
            filters: vec![Filter { field: "level".into(), op, value: json!(bound) }],
            order_by: draw.one_in(2).then(|| ("level".to_owned(), draw.one_in(2))),
            ..Query::default()
        };
        let found = query::run(&self.rows(), &query).expect("a query is answered");
        let found: BTreeSet<EntityKey> = found.rows.into_iter().map(|(key, _)| key).collect();
        let holds = |level: Option<i64>| match (op, level) {
            (Op::Ne, level) => level != Some(bound),
            (Op::Lt, Some(level)) => level < bound,
            (Op::Ge, Some(level)) => level >= bound,
            (_, level) => level == Some(bound),
        };
        let alive = self.durable().iter().filter(|(_, thing)| !thing.deleted && holds(thing.level));
        assert_eq!(found, alive.map(|(key, _)| key.clone()).collect(), "{query:?}");
    }
}

pub(crate) fn run(data: &[u8]) {
    let mut draw = Draw::new(data);
    let mut world = World::open(MemoryStore::manual(), Things::new());
    world.versioned = draw.one_in(2);
    world.flush(u64::MAX);
    for _ in 0..STEPS_MAX {
        if draw.is_empty() {
            break;
        }
        match draw.below(16) {
            0 => {
                world = world.crash();
                world.compare();
            }
            1 => world.flush(1 + u64::from(draw.byte() % 4)),
            2 | 3 => {
                world.flush(u64::MAX);
                world.compare();
            }
            4 => world.ask(&mut draw),
            _ => world.write(&mut draw),
        }
    }
    world.flush(u64::MAX);
    world.compare();
    let world = world.crash();
    world.compare();
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let lengths = [0, 20, 40, 80, 160, 300, 300, 600];
    let seeds = noise_seeds(&lengths).into_iter();
    // Of each, one that names versions.
    seeds.flat_map(|seed| [[&[0], &seed[..]].concat(), [&[1], &seed[..]].concat()]).collect()
}
