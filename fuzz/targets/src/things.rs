//! What the users of one device mean and should see: a map, computed without documents. Two targets
//! hold a device to it, one at core's [`Replica`](anabranch_core::replica::Replica), one at the engine.

use std::collections::{BTreeMap, BTreeSet};

use anabranch_core::id::EntityKey;
use anabranch_core::intent::Intent;
use anabranch_core::query::{Filter, Op, Query};
use anabranch_core::replica::{Edit, Expect, parse_version};
use automerge::ChangeHash;
use serde_json::{Value as Json, json};

use crate::{Draw, world};

/// Versions of one entity that are remembered.
const VERSIONS_MAX: usize = 6;

/// The ids that users write to.
pub(crate) const IDS: [&str; 4] = ["a", "b", "c", "d"];

/// What one thing shows.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Thing {
    pub(crate) deleted: bool,
    title: Option<String>,
    level: Option<i64>,
    best: Option<i64>,
    pub(crate) count: i64,
    /// Each with the edits that added it: who removes it removes those that it saw.
    tags: BTreeMap<String, BTreeSet<u32>>,
    log: Vec<String>,
    days: BTreeMap<String, i64>,
    body: Vec<char>,
    /// Values that no other replaced, the newest last. If they differ, a person has to settle it.
    pub(crate) mine: Vec<(u32, String)>,
}

impl Thing {
    /// Whether a person has to settle something.
    pub(crate) fn in_conflict(&self) -> bool {
        !self.deleted && self.disputed()
    }

    fn disputed(&self) -> bool {
        self.mine.iter().any(|(_, value)| *value != self.mine[0].1)
    }

    /// Whether there may be no such thing: nobody else has seen what is deleted, or a first edit said nothing.
    pub(crate) fn may_leave_nothing(&self, known: bool) -> bool {
        self.deleted || !known && *self == Self::default()
    }

    /// Whether that is what is shown; else what differs.
    pub(crate) fn check(&self, deleted: bool, fields: &BTreeMap<String, Json>) -> Result<(), String> {
        if deleted != self.deleted {
            return Err(format!("deleted is {deleted}"));
        }
        let text: String = self.body.iter().collect();
        let mut tags: Vec<&str> =
            fields["tags"].as_array().unwrap().iter().filter_map(Json::as_str).collect();
        tags.sort_unstable();
        for (field, shown, meant) in [
            ("tags", &json!(tags), json!(self.tags.keys().collect::<Vec<_>>())),
            ("title", &fields["title"], json!(self.title)),
            ("level", &fields["level"], json!(self.level)),
            ("best", &fields["best"], json!(self.best)),
            ("count", &fields["count"], json!(self.count)),
            ("log", &fields["log"], json!(self.log)),
            ("days", &fields["days"], json!(self.days)),
            ("body", &fields["body"], json!(text)),
            ("mine", &fields["mine"], json!(self.mine.last().map(|(_, value)| value))),
        ] {
            if *shown != meant {
                return Err(format!("{field} is {shown}, {meant} was meant"));
            }
        }
        Ok(())
    }
}

/// What a thing showed at a time that the user may go back to.
#[derive(Clone, Debug)]
struct Version {
    heads: Vec<ChangeHash>,
    /// When: what its driver counts.
    at: u64,
    thing: Thing,
}

pub(crate) type Things = BTreeMap<EntityKey, Thing>;

/// What is written as one.
#[derive(Debug)]
pub(crate) struct Drawn {
    pub(crate) edits: Vec<Edit>,
    /// What that makes of everything.
    pub(crate) after: Things,
    /// Whether it can be written.
    pub(crate) possible: bool,
}

/// Who writes, and the versions that they have seen.
#[derive(Default)]
pub(crate) struct Users {
    unique: u32,
    /// Whether edits name versions.
    versioned: bool,
    /// Of each thing since it was created or brought back, the newest last.
    versions: BTreeMap<EntityKey, Vec<Version>>,
}

impl Users {
    pub(crate) fn new(versioned: bool) -> Self {
        Self { versioned, ..Self::default() }
    }

    pub(crate) fn versioned(&self) -> bool {
        self.versioned
    }

    /// Edits of one to three things.
    pub(crate) fn edits(&mut self, latest: &Things, draw: &mut Draw<'_>) -> Drawn {
        let members = if draw.one_in(4) { 2 + draw.below(2) } else { 1 };
        let mut drawn = Drawn { edits: Vec::new(), after: latest.clone(), possible: true };
        for _ in 0..members {
            let key = world::thing(IDS[draw.below(IDS.len())]);
            if drawn.edits.iter().all(|edit| edit.key != key) {
                self.edit(key, &mut drawn, draw);
            }
        }
        drawn
    }

    /// One edit of one thing.
    pub(crate) fn single(&mut self, latest: &Things, draw: &mut Draw<'_>) -> Drawn {
        let mut drawn = Drawn { edits: Vec::new(), after: latest.clone(), possible: true };
        self.edit(world::thing(IDS[draw.below(IDS.len())]), &mut drawn, draw);
        drawn
    }

    fn edit(&mut self, key: EntityKey, drawn: &mut Drawn, draw: &mut Draw<'_>) {
        let known = drawn.after.get(&key).cloned();
        let mut thing = known.clone().unwrap_or_default();
        let expect = *draw.of(&[Expect::Any, Expect::Any, Expect::Any, Expect::New, Expect::Existing]);
        // To create what is deleted is to bring it back, which is another edit than drawn here.
        let deleted = known.as_ref().is_some_and(|thing| thing.deleted);
        let expect = if deleted { Expect::Any } else { expect };
        drawn.possible &= match expect {
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
        drawn.possible &= possible;
        drawn.after.insert(key.clone(), thing);
        drawn.edits.push(Edit { key, intents, based_on, expect });
    }

    /// It was written, at a time that the driver counts, and each thing has a version; none where it was
    /// forgotten. What is shown from now on; `alone` says whether nothing else changed with a thing.
    pub(crate) fn wrote(
        &mut self,
        drawn: &Drawn,
        versions: &[String],
        alone: bool,
        at: u64,
        latest: &Things,
    ) -> Things {
        assert!(drawn.possible, "{:?} was written", drawn.edits);
        assert_eq!(drawn.edits.len(), versions.len(), "each entity has a version");
        let mut after = drawn.after.clone();
        for (edit, version) in drawn.edits.iter().zip(versions) {
            let forgotten = version.is_empty();
            let deletes = matches!(edit.intents[..], [Intent::Delete]);
            // What nobody else has seen is forgotten when it is deleted by itself, and a first edit that says
            // nothing makes nothing.
            let may_be = match latest.contains_key(&edit.key) {
                true => deletes && alone,
                false => after[&edit.key].may_leave_nothing(false),
            };
            assert!(!forgotten || may_be, "{edit:?} left nothing");
            assert!(forgotten || parse_version(version).is_some(), "{version:?} is none");
            if forgotten {
                after.remove(&edit.key);
            }
            self.saw(edit, version, at, after.get(&edit.key));
        }
        after
    }

    /// The user sees what an edit made of a thing.
    pub(crate) fn saw(&mut self, edit: &Edit, version: &str, at: u64, thing: Option<&Thing>) {
        let versions = self.versions.entry(edit.key.clone()).or_default();
        if edit.intents.iter().any(|intent| matches!(intent, Intent::Delete | Intent::Revive)) {
            versions.clear();
        }
        let (Some(thing), Some(heads)) = (thing, parse_version(version)) else { return versions.clear() };
        let known = versions.last().is_some_and(|last| last.heads == heads);
        if !thing.deleted && !known {
            versions.push(Version { heads, at, thing: thing.clone() });
        }
        let surplus = versions.len().saturating_sub(VERSIONS_MAX);
        versions.drain(..surplus);
    }

    /// What came after that time is not there any more.
    pub(crate) fn went_back(&mut self, at: u64) {
        for versions in self.versions.values_mut() {
            versions.retain(|version| version.at <= at);
        }
    }

    /// Another value of what a person settles.
    pub(crate) fn settled(&mut self, thing: &mut Thing, value: &str) {
        self.unique += 1;
        thing.mine = vec![(self.unique, value.to_owned())];
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
                let base = base.unwrap_or(Version { heads: Vec::new(), at: 0, thing: Thing::default() });
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
        let open = thing.disputed();
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
                    if base.disputed() || shown != Some(&value) {
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
                // Added again, it survives who removes it and had not seen that.
                thing.tags.insert(element.clone(), BTreeSet::from([self.unique]));
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
}

/// A question about levels, as a rule one that some thing is an answer to.
pub(crate) fn question(things: &Things, draw: &mut Draw<'_>) -> Query {
    let levels: Vec<Option<i64>> = things.values().map(|thing| thing.level).collect();
    let (near, far) = (i64::from(draw.byte() % 3) - 1, i64::from(draw.byte()) - 100);
    let level = if levels.is_empty() || draw.one_in(4) { Some(far) } else { *draw.of(&levels) };
    let (ops, value) = match level {
        Some(level) => (&[Op::Eq, Op::Lt, Op::Ge, Op::Ne][..], json!(level + near)),
        None => (&[Op::Eq, Op::Ne][..], Json::Null),
    };
    Query {
        type_name: "thing".into(),
        filters: vec![Filter { field: "level".into(), op: *draw.of(ops), value }],
        order_by: draw.one_in(2).then(|| ("level".to_owned(), draw.one_in(2))),
        ..Query::default()
    }
}

/// The answer to a [`question`], in order.
pub(crate) fn answer(things: &Things, query: &Query) -> Vec<EntityKey> {
    let (op, bound) = (query.filters[0].op, query.filters[0].value.as_i64());
    let meets = |level: Option<i64>| match op {
        Op::Eq => level == bound,
        Op::Ne => level != bound,
        Op::Lt => level.is_some() && level < bound,
        _ => level.is_some() && level >= bound,
    };
    let mut found: Vec<(Option<i64>, &EntityKey)> = things
        .iter()
        .filter(|(_, thing)| !thing.deleted && meets(thing.level))
        .map(|(key, thing)| (thing.level.filter(|_| query.order_by.is_some()), key))
        .collect();
    found.sort();
    if query.order_by.as_ref().is_some_and(|(_, descending)| *descending) {
        found.reverse();
    }
    found.into_iter().map(|(_, key)| key.clone()).collect()
}
