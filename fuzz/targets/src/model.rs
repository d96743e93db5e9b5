//! A device held to a map: what was written and made durable is shown, nothing else is.

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
use serde_json::{Value as Json, json};

use crate::{Draw, link, noise_seeds, world};

const STEPS_MAX: usize = 400;

/// What one thing shows.
#[derive(Clone, Debug, Default, PartialEq)]
struct Thing {
    deleted: bool,
    title: Option<String>,
    level: Option<i64>,
    best: Option<i64>,
    count: i64,
    tags: BTreeSet<String>,
    log: Vec<String>,
    days: BTreeMap<String, i64>,
    body: Vec<char>,
}

type Things = BTreeMap<EntityKey, Thing>;

struct World {
    store: Arc<MemoryStore>,
    replica: Replica,
    ms: u64,
    /// What each commit made of everything, those that are durable gone but for the newest.
    states: Vec<(CommitNo, Things)>,
    unique: u32,
}

impl World {
    fn open(store: MemoryStore, things: Things) -> Self {
        let store = Arc::new(store);
        let replica = Replica::open(store.clone(), link::config()).expect("what was written can be opened");
        let mut world = Self { store, replica, ms: 0, states: Vec::new(), unique: 0 };
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
        let (ms, unique) = (self.ms, self.unique);
        let mut world = Self::open(self.store.reopen(), things);
        (world.ms, world.unique) = (ms, unique);
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
            let (intents, possible) = self.intents(&mut thing, known.is_some(), draw);
            valid &= possible;
            after.insert(key.clone(), thing);
            edits.push(Edit { key, intents, based_on: None, expect });
        }
        self.ms += u64::from(draw.byte());
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
                thing.tags.insert(element.clone());
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
            assert_eq!(tags, thing.tags.iter().map(String::as_str).collect::<Vec<_>>(), "{key}");
            for (field, value) in [
                ("title", json!(thing.title)),
                ("level", json!(thing.level)),
                ("best", json!(thing.best)),
                ("count", json!(thing.count)),
                ("log", json!(thing.log)),
                ("days", json!(thing.days)),
                ("body", json!(text)),
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
    noise_seeds(&[0, 20, 40, 80, 160, 300, 300, 600])
}
