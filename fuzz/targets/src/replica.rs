//! A device held to a map: what was written and made durable is shown, nothing else is. It drives
//! core's [`Replica`] through the calls that the engine makes, without the engine's threads, and cuts its
//! power between any two of them.
//!
//! The first byte says whether edits also name the version that the user saw: the present one, or one of
//! before, by which the device's own edits meet as if two had made them.

use std::sync::Arc;

use anabranch_core::entity::EditError;
use anabranch_core::id::EntityKey;
use anabranch_core::query;
use anabranch_core::replica::{Replica, WriteError};
use anabranch_core::rows::Rows;
use anabranch_core::store::{CommitNo, Store as _};
use anabranch_store::MemoryStore;

use crate::things::{IDS, Things, Users, answer, question};
use crate::{Draw, link, noise_seeds, world};

const STEPS_MAX: usize = 400;

struct World {
    store: Arc<MemoryStore>,
    replica: Replica,
    ms: u64,
    /// What each commit made of everything, those that are durable gone but for the newest.
    states: Vec<(CommitNo, Things)>,
    users: Users,
}

impl World {
    fn open(store: MemoryStore, things: Things, users: Users) -> Self {
        let store = Arc::new(store);
        let replica = Replica::open(store.clone(), link::config()).expect("what was written can be opened");
        let states = vec![(replica.last_commit(), things)];
        Self { store, replica, ms: 0, states, users }
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
    fn crash(mut self) -> Self {
        let things = self.durable().clone();
        self.users.went_back(self.store.durable().unwrap().0);
        Self { ms: self.ms, ..Self::open(self.store.reopen(), things, self.users) }
    }

    fn write(&mut self, draw: &mut Draw<'_>) {
        let latest = self.states.last().unwrap().1.clone();
        let drawn = self.users.edits(&latest, draw);
        let edits = &drawn.edits;
        // Edits of one reading of the clock are told apart too.
        let passed = draw.byte();
        self.ms += u64::from(if self.users.versioned() { passed / 128 } else { passed });
        let before = self.replica.last_commit();
        match self.replica.write(world::now(self.ms), edits, true) {
            Ok(written) => {
                let alone = edits.len() == 1 || written.changed == 1;
                let after = self.users.wrote(&drawn, &written.versions, alone, written.commit.0, &latest);
                if written.commit != before {
                    self.states.push((written.commit, after));
                } else {
                    assert_eq!(&after, self.latest(), "{edits:?} was said to change nothing");
                }
            }
            Err(error @ (WriteError::Edit(_) | WriteError::Exists(_))) => {
                assert!(!matches!(error, WriteError::Edit(EditError::Document(_))), "{error}: {edits:?}");
                assert!(!drawn.possible, "{error}: {edits:?} was not written");
                assert_eq!(self.replica.last_commit(), before, "a write that failed left something");
            }
            Err(error) => panic!("{error}: {edits:?}"),
        }
    }

    /// What is shown is what the model says is durable.
    fn compare(&self) {
        let expected = self.durable();
        let rows = self.rows();
        let conflicts = rows.conflicts().expect("conflicts can be read");
        for id in IDS {
            let key = world::thing(id);
            let row = rows.get(&key).expect("rows can be read");
            assert_eq!(row.is_some(), expected.contains_key(&key), "{key} is there, or is not");
            let (Some(row), Some(thing)) = (row, expected.get(&key)) else { continue };
            if let Err(what) = thing.check(row.deleted, &row.fields) {
                panic!("{key}: {what}");
            }
            let open = conflicts.iter().any(|(of, conflict)| *of == key && conflict.field == "mine");
            assert_eq!(open, thing.in_conflict(), "{key}: {:?}", thing.mine);
        }
    }

    fn ask(&self, draw: &mut Draw<'_>) {
        let things = self.durable();
        let query = question(things, draw);
        let found = query::run(&self.rows(), &query).expect("a query is answered");
        let found: Vec<EntityKey> = found.rows.into_iter().map(|(key, _)| key).collect();
        assert_eq!(found, answer(things, &query), "{query:?}");
    }
}

pub(crate) fn run(data: &[u8]) {
    let mut draw = Draw::new(data);
    let users = Users::new(draw.one_in(2));
    let mut world = World::open(MemoryStore::manual(), Things::new(), users);
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
