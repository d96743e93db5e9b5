//! What a change builds on, as the newest change of each actor.
//!
//! A change depends on all earlier ones of its own actor, so that much says it all, and whether another
//! change is among it takes one look. Finding it takes a walk backwards, which ends where the answer for an
//! earlier change is known: answers are kept, of long walks also those half-way, so that histories of
//! any form are not walked again and again.

use std::collections::{BTreeMap, BinaryHeap};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::{Header, HeaderIndex};

/// Headers that a walk may visit without its answer being kept.
const FREE_STEPS: usize = 32;
/// Most answers that are kept.
const KEPT_MAX: usize = 1_024;
/// Most actors that the answers which are kept name together, 4 bytes each.
const KEPT_ACTORS_MAX: usize = 1 << 20;
/// Actors in answers that weigh as much as a header.
const ACTORS_PER_HEADER: usize = 64;

/// For each actor one more than the place of its newest change, 0 for none.
type Newest = Vec<u32>;

/// Some changes of an entity, and all that they build on.
#[derive(Clone, Debug)]
pub struct Past<'a> {
    headers: &'a [Header],
    newest: Newest,
}

impl<'a> Past<'a> {
    pub(super) fn new(index: &'a HeaderIndex, places: Vec<u32>) -> Self {
        let newest = index.versions.lock().of(&index.headers, places);
        Self { headers: &index.headers, newest }
    }

    /// Whether it includes the change at a place.
    pub fn contains(&self, place: u32) -> bool {
        covers(&self.newest, self.headers, place)
    }

    /// Leaves only what another past includes too.
    pub fn retain(&mut self, other: &Past<'_>) {
        self.newest.truncate(other.newest.len());
        for (newest, other) in self.newest.iter_mut().zip(&other.newest) {
            *newest = (*newest).min(*other);
        }
    }

    /// For each actor that is in it the place of its newest change.
    pub fn newest(&self) -> impl Iterator<Item = u32> {
        self.newest.iter().filter_map(|newest| newest.checked_sub(1))
    }

    /// Whether it includes nothing.
    pub fn is_empty(&self) -> bool {
        self.newest.iter().all(|newest| *newest == 0)
    }
}

fn covers(newest: &Newest, headers: &[Header], place: u32) -> bool {
    let actor = headers[place as usize].actor as usize;
    newest.get(actor).is_some_and(|newest| *newest > place)
}

fn merge(into: &mut Newest, other: &Newest) {
    into.resize(into.len().max(other.len()), 0);
    for (newest, other) in into.iter_mut().zip(other) {
        *newest = (*newest).max(*other);
    }
}

/// Answers that are kept. They follow from the headers, so they make no difference between two indexes
/// and don't go with a copy.
#[derive(Debug, Default)]
pub(super) struct Versions(Mutex<Kept>);

impl Clone for Versions {
    fn clone(&self) -> Self {
        Self::default()
    }
}

impl PartialEq for Versions {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for Versions {}

impl Versions {
    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets answers for all changes but the first so many.
    pub(super) fn truncate(&mut self, changes: usize) {
        let kept = self.0.get_mut().unwrap_or_else(PoisonError::into_inner);
        for (_, answer) in kept.answers.split_off(&(changes as u32)) {
            kept.actors -= answer.newest.len();
        }
    }

    pub(super) fn weight(&self) -> usize {
        self.lock().actors / ACTORS_PER_HEADER
    }
}

#[derive(Debug, Default)]
struct Kept {
    /// By the place of the change that is the newest of it.
    answers: BTreeMap<u32, Answer>,
    /// How many actors the answers name together.
    actors: usize,
    uses: u64,
}

#[derive(Debug)]
struct Answer {
    newest: Newest,
    used: u64,
}

impl Kept {
    fn of(&mut self, headers: &[Header], places: Vec<u32>) -> Newest {
        let (newest, visited) = self.walk(headers, &places);
        if visited.len() <= FREE_STEPS {
            return newest;
        }
        // Half-way, and half-way to there, for whoever comes from elsewhere.
        let halves = std::iter::successors(Some(visited.len() / 2), |half| Some(half / 2));
        let mut stops: Vec<u32> =
            halves.take_while(|half| *half > FREE_STEPS).map(|half| visited[visited.len() - half]).collect();
        // The lowest first: the walk to the next one ends there.
        stops.reverse();
        if let [place] = places[..] {
            stops.push(place);
        }
        for place in stops {
            let (answer, _) = self.walk(headers, &[place]);
            self.keep(place, answer);
        }
        newest
    }

    /// What `places` build on, and they, and the changes that were visited to find it, the newest first.
    fn walk(&mut self, headers: &[Header], places: &[u32]) -> (Newest, Vec<u32>) {
        self.uses += 1;
        // What is known as a whole: where the walk need not go.
        let mut known = Newest::new();
        let mut visited = Vec::new();
        // The newest first: then nothing that is met later can cover what was visited, and what
        // is met twice is met in a row.
        let mut open: BinaryHeap<u32> = places.iter().copied().collect();
        while let Some(place) = open.pop() {
            if visited.last() == Some(&place) || covers(&known, headers, place) {
                continue;
            }
            if let Some(answer) = self.answers.get_mut(&place) {
                answer.used = self.uses;
                merge(&mut known, &answer.newest);
                continue;
            }
            visited.push(place);
            open.extend(&headers[place as usize].deps);
        }
        let mut newest = known;
        for place in &visited {
            let actor = headers[*place as usize].actor as usize;
            if newest.len() <= actor {
                newest.resize(actor + 1, 0);
            }
            newest[actor] = newest[actor].max(place + 1);
        }
        (newest, visited)
    }

    fn keep(&mut self, place: u32, newest: Newest) {
        self.actors += newest.len();
        if let Some(before) = self.answers.insert(place, Answer { newest, used: self.uses }) {
            self.actors -= before.newest.len();
        }
        while self.answers.len() > KEPT_MAX || self.actors > KEPT_ACTORS_MAX {
            let oldest = self.answers.iter().min_by_key(|(_, answer)| answer.used).map(|(place, _)| *place);
            let Some(answer) = oldest.and_then(|oldest| self.answers.remove(&oldest)) else { return };
            self.actors -= answer.newest.len();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use automerge::{ActorId, ChangeHash};

    use super::*;
    use crate::change::Role;
    use crate::clock::Hlc;
    use crate::id::{Author, DeviceId, Incarnation};

    /// Chance that can be repeated (splitmix64).
    struct Dice(u64);

    impl Dice {
        fn roll(&mut self, count: usize) -> usize {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = self.0;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            ((z ^ (z >> 31)) % count.max(1) as u64) as usize
        }
    }

    /// An index of the changes (actor, dependencies).
    fn index(changes: &[(usize, Vec<u32>)]) -> HeaderIndex {
        let actors = changes.iter().map(|(actor, _)| actor + 1).max().unwrap_or_default();
        let author = Author { device: DeviceId([1; 32]), incarnation: Incarnation(0) };
        let mut seqs = vec![0; actors];
        let headers = changes.iter().enumerate().map(|(place, (actor, deps))| {
            seqs[*actor] += 1;
            let mut hash = [0; 32];
            hash[..8].copy_from_slice(&(place as u64).to_be_bytes());
            Header {
                hash: ChangeHash(hash),
                actor: *actor as u32,
                seq: seqs[*actor],
                time: Hlc::ZERO,
                max_op: place as u64 + 1,
                role: Role::Device,
                revives: false,
                tx: None,
                deps: deps.clone(),
                admitted: true,
            }
        });
        let headers = headers.collect();
        let actors = (0..actors).map(|actor| (ActorId::from(&actor.to_be_bytes()[..]), author)).collect();
        HeaderIndex::from_parts(headers, actors).unwrap()
    }

    /// A history: each change builds on its actor's previous one and on some others.
    fn history(dice: &mut Dice, changes: usize, actors: usize) -> Vec<(usize, Vec<u32>)> {
        let mut newest: Vec<Option<u32>> = vec![None; actors];
        let mut made: Vec<(usize, Vec<u32>)> = Vec::new();
        let mut begun = 0;
        for place in 0..changes {
            let actor = dice.roll(actors.min(begun + 1));
            begun = begun.max(actor + 1);
            let mut deps: BTreeSet<u32> = newest[actor].into_iter().collect();
            for _ in 0..dice.roll(3) {
                // Mostly near by.
                let far = dice.roll(8) == 0;
                let back = 1 + dice.roll(if far { place } else { place.min(9) });
                deps.extend(u32::try_from(place).unwrap().checked_sub(back as u32));
            }
            newest[actor] = Some(place as u32);
            made.push((actor, deps.into_iter().collect()));
        }
        made
    }

    #[test]
    fn a_past_is_what_can_be_reached() {
        for seed in 0..40 {
            let dice = &mut Dice(seed);
            let (changes, actors) = (1 + dice.roll(400), 1 + dice.roll(40));
            let changes = history(dice, changes, actors);
            let index = index(&changes);
            let mut below: Vec<BTreeSet<u32>> = Vec::new();
            for (_, deps) in &changes {
                let of = |dep: &u32| below[*dep as usize].iter().copied().chain([*dep]);
                below.push(deps.iter().flat_map(of).collect());
            }
            let all = || 0..changes.len() as u32;
            for _ in 0..60 {
                let places: Vec<u32> = (0..dice.roll(4)).map(|_| dice.roll(changes.len()) as u32).collect();
                let (past, under) = (index.past(places.clone()), index.past_below(places.clone()));
                let mut both = past.clone();
                let other = dice.roll(changes.len()) as u32;
                both.retain(&index.past([other]));
                let reached = |place: u32| places.iter().any(|from| below[*from as usize].contains(&place));
                for place in all() {
                    let with = reached(place) || places.contains(&place);
                    assert_eq!(past.contains(place), with, "{seed}: {place} from {places:?}");
                    assert_eq!(under.contains(place), reached(place), "{seed}: {place} below {places:?}");
                    let seen = place == other || below[other as usize].contains(&place);
                    assert_eq!(both.contains(place), with && seen);
                    assert_eq!(index.is_ancestor(place, other), below[other as usize].contains(&place));
                }
                assert_eq!(past.is_empty(), places.is_empty());
            }
        }
    }

    /// Steps, and not time, so that it fails nowhere by chance.
    #[test]
    fn long_histories_are_walked_once_and_not_for_each_question() {
        let chain = |length: u32, actors: u32| -> Vec<(usize, Vec<u32>)> {
            let deps = |place: u32| place.checked_sub(1).into_iter().chain(place.checked_sub(actors));
            (0..length)
                .map(|place| ((place % actors) as usize, BTreeSet::from_iter(deps(place))))
                .map(|(actor, deps)| (actor, deps.into_iter().collect()))
                .collect()
        };
        for actors in [1, 2, 300] {
            let index = index(&chain(20_000, actors));
            let mut steps = 0;
            // From the start, from the end, and here and there.
            let rising = (0..20_000).step_by(7);
            let strewn = (0..3_000).map(|n: u32| n.wrapping_mul(2_654_435_761) % 20_000);
            for place in rising.clone().chain(rising.rev()).chain(strewn) {
                steps += index.versions.lock().walk(&index.headers, &[place]).1.len();
                assert!(index.past([place]).contains(0));
            }
            assert!(steps < 1_500_000, "{actors}: {steps}");
            let kept = index.versions.lock();
            assert!(kept.answers.len() <= KEPT_MAX && kept.actors <= KEPT_ACTORS_MAX);
            assert_eq!(kept.actors, kept.answers.values().map(|answer| answer.newest.len()).sum::<usize>());
        }
    }

    #[test]
    fn what_was_added_last_leaves_no_trace() {
        let dice = &mut Dice(5);
        let changes = history(dice, 300, 20);
        for length in [300, 299, 150, 1, 0] {
            let before = {
                let before = index(&changes[..length]);
                // Actors without changes are none.
                before.past(0..length as u32);
                before
            };
            let mut longer = index(&changes);
            longer.past([299]);
            longer.truncate(length);
            assert_eq!(longer.headers, before.headers);
            assert_eq!(longer.by_hash, before.by_hash);
            assert_eq!(longer.by_actor, before.by_actor);
            assert_eq!(longer.actors, before.actors);
            assert!(longer.versions.lock().answers.range(length as u32..).next().is_none());
        }
    }
}
