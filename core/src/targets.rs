//! Where the operations of an entity acted, in a few bytes each.
//!
//! A change names operations of others by their ids: what it replaces, removes or stands behind. Whether
//! these were at the same key, or items of the same sequence, is not to be seen from ids, and whether
//! a container has begun below a change not from its header. Documents know both. A side without
//! documents keeps a mark of 32 bits for each operation's place, equal ones in a row once, and which
//! containers each change was the first to depend on.
//!
//! Two places can have one mark, by chance or by somebody's labour. What slips through so is what
//! devices refuse, as they do with all that does not fit their documents.

use automerge::ChangeHash;
use bincode::{Decode, Encode};

/// Containers told apart per entity; more count as begun everywhere.
const CONTAINERS_MAX: usize = 63;
/// The bit by which any container may have begun.
const ANY: u64 = 1 << CONTAINERS_MAX;
/// Runs of marks that weigh as much as a header.
const RUNS_PER_HEADER: usize = 16;

/// The place of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark(u32);

impl Mark {
    /// Of an operation that leaves nothing to be replaced.
    pub const NOTHING: Mark = Mark(0);

    /// A key of the root, or of the container of a field.
    pub fn key(container: Option<&str>, key: &str) -> Self {
        Self::of(&[
            &[u8::from(container.is_some())],
            container.unwrap_or_default().as_bytes(),
            &[0],
            key.as_bytes(),
        ])
    }

    /// An item of the sequence of a field.
    pub fn item(field: &str) -> Self {
        Self::of(&[&[2], field.as_bytes()])
    }

    fn of(parts: &[&[u8]]) -> Self {
        let mut hasher = blake3::Hasher::new();
        parts.iter().for_each(|part| {
            hasher.update(part);
        });
        Self(short(hasher.finalize().as_bytes()).max(1))
    }
}

fn short(hash: &[u8; 32]) -> u32 {
    u32::from_le_bytes([hash[0], hash[1], hash[2], hash[3]])
}

/// Of one change, as it is stored.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct ChangeTargets {
    /// How many operations in a row have which mark.
    runs: Vec<(u32, u32)>,
    /// The containers whose genesis changes it depends on directly.
    begins: Vec<u32>,
}

impl ChangeTargets {
    /// Takes note of the next operation.
    pub fn push(&mut self, mark: Mark) {
        match self.runs.last_mut() {
            Some((count, last)) if *last == mark.0 => *count += 1,
            _ => self.runs.push((1, mark.0)),
        }
    }

    /// How many operations the change has.
    pub fn operations(&self) -> u64 {
        self.runs.iter().map(|(count, _)| u64::from(*count)).sum()
    }

    /// Takes note of a container whose genesis change it depends on.
    pub fn begin(&mut self, genesis: &ChangeHash) {
        self.begins.push(short(&genesis.0));
    }
}

/// Of all changes of an entity, in the order of its header index.
#[derive(Clone, Debug, Default)]
pub struct Targets {
    changes: Vec<Placed>,
    /// The containers that have begun anywhere; the place is a bit's.
    containers: Vec<u32>,
    runs: usize,
}

#[derive(Clone, Debug)]
struct Placed {
    /// Counter of its first operation.
    start_op: u64,
    /// (end, mark) of runs, counted from `start_op`; nothing where it is not known.
    runs: Option<Vec<(u32, u32)>>,
    /// Containers that have begun, by this change or below it.
    begun: u64,
}

/// What is known of an operation's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Nothing: the change was taken before this was kept.
    Unknown,
    /// The change has no such operation.
    Nowhere,
    /// This.
    At(Mark),
}

impl Targets {
    /// Adds the change that comes next in the header index, with what it depends on there. `targets`
    /// is `None` for one of which nothing is known.
    pub fn push(&mut self, start_op: u64, deps: &[u32], targets: Option<&ChangeTargets>) {
        let Some(targets) = targets else {
            return self.changes.push(Placed { start_op, runs: None, begun: ANY });
        };
        let mut begun = self.begun(deps);
        for container in &targets.begins {
            begun |= self.bit_of(*container);
        }
        let mut end = 0;
        let ends = targets.runs.iter().map(|(count, mark)| {
            end = u32::saturating_add(end, *count);
            (end, *mark)
        });
        let runs: Vec<(u32, u32)> = ends.collect();
        self.runs += runs.len();
        self.changes.push(Placed { start_op, runs: Some(runs), begun });
    }

    /// Forgets all changes but the first so many.
    pub fn truncate(&mut self, changes: usize) {
        self.changes.truncate(changes);
        self.runs = self.changes.iter().filter_map(|placed| placed.runs.as_ref()).map(Vec::len).sum();
    }

    /// Where the operation with a counter acted, of the change at a place.
    pub fn place(&self, change: u32, counter: u64) -> Place {
        let Some(placed) = self.changes.get(change as usize) else { return Place::Unknown };
        let Some(runs) = &placed.runs else { return Place::Unknown };
        let Some(at) = counter.checked_sub(placed.start_op) else { return Place::Nowhere };
        let run = runs.partition_point(|(end, _)| u64::from(*end) <= at);
        runs.get(run).map_or(Place::Nowhere, |(_, mark)| Place::At(Mark(*mark)))
    }

    /// Whether a container has begun below a change that depends on these, or may have, for all that is
    /// known.
    pub fn has_begun(&self, genesis: &ChangeHash, deps: &[u32]) -> bool {
        let begun = self.begun(deps);
        let place = self.containers.iter().position(|known| *known == short(&genesis.0));
        begun & ANY != 0 || place.is_some_and(|place| begun & (1 << place) != 0)
    }

    /// What it takes in memory, as a number of headers.
    pub fn weight(&self) -> usize {
        self.runs / RUNS_PER_HEADER
    }

    fn begun(&self, deps: &[u32]) -> u64 {
        deps.iter()
            .fold(0, |all, dep| all | self.changes.get(*dep as usize).map_or(ANY, |placed| placed.begun))
    }

    fn bit_of(&mut self, container: u32) -> u64 {
        let place = self.containers.iter().position(|known| *known == container);
        match place {
            Some(place) => 1 << place,
            None if self.containers.len() == CONTAINERS_MAX => ANY,
            None => {
                self.containers.push(container);
                1 << (self.containers.len() - 1)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn genesis(number: u8) -> ChangeHash {
        ChangeHash([number; 32])
    }

    #[test]
    fn operations_are_found_by_change_and_counter() {
        let (title, body) = (Mark::key(None, "title"), Mark::item("body"));
        let mut one = ChangeTargets::default();
        [title, body, body, body, Mark::NOTHING, title].into_iter().for_each(|mark| one.push(mark));
        assert_eq!(one.runs.len(), 4);
        let mut targets = Targets::default();
        targets.push(10, &[], Some(&one));
        targets.push(16, &[0], None);
        let seen: Vec<Place> = (9..17).map(|counter| targets.place(0, counter)).collect();
        let at = Place::At;
        let nothing = at(Mark::NOTHING);
        assert_eq!(
            seen,
            [Place::Nowhere, at(title), at(body), at(body), at(body), nothing, at(title), Place::Nowhere]
        );
        assert_eq!(targets.place(1, 16), Place::Unknown);
    }

    #[test]
    fn places_have_marks_of_their_own() {
        let marks = [
            Mark::key(None, "a"),
            Mark::key(None, "ab"),
            Mark::key(Some("a"), "b"),
            Mark::key(Some("a"), ""),
            Mark::key(Some(""), "a"),
            Mark::item("a"),
            Mark::item("ab"),
            Mark::NOTHING,
        ];
        for (place, mark) in marks.iter().enumerate() {
            assert!(!marks[..place].contains(mark), "{place}");
        }
    }

    #[test]
    fn containers_begin_where_they_are_depended_on_and_above() {
        let begins = |number: u8| {
            let mut one = ChangeTargets::default();
            one.begin(&genesis(number));
            one
        };
        let mut targets = Targets::default();
        targets.push(1, &[], Some(&begins(1)));
        targets.push(2, &[], Some(&begins(2)));
        targets.push(3, &[0], Some(&ChangeTargets::default()));
        let begun = |deps: &[u32]| [1, 2].map(|number| targets.has_begun(&genesis(number), deps));
        assert_eq!(begun(&[]), [false, false]);
        assert_eq!(begun(&[2]), [true, false]);
        assert_eq!(begun(&[1]), [false, true]);
        assert_eq!(begun(&[1, 2]), [true, true]);
        // Above what is not known anything may have begun.
        let mut older = targets.clone();
        older.push(4, &[], None);
        assert!(older.has_begun(&genesis(9), &[3]) && !older.has_begun(&genesis(9), &[2]));
        // As above more containers than are told apart.
        for number in 3..=80 {
            targets.push(9, &[], Some(&begins(number)));
        }
        assert!(targets.has_begun(&genesis(80), &[80]) && targets.has_begun(&genesis(1), &[80]));
        assert!(!targets.has_begun(&genesis(1), &[3]));
    }
}
