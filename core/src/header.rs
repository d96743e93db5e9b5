//! The header index: who wrote which change of an entity, when, and on top of what.
//!
//! It answers ancestry without Automerge, on devices and on the relay. Headers stand in
//! causal order: a change's dependencies come before it, so a search backwards can stop
//! early.

mod past;

use std::collections::{BTreeMap, BTreeSet};

use automerge::{ActorId, ChangeHash};

use crate::change::{Change, Origin, Role, TxMark};
use crate::clock::Hlc;
use crate::id::{Author, DeviceId};

pub use past::Past;
use past::Versions;

/// Most actors of one device in an entity. A device that came to more could leave no room for those
/// of others.
pub const DEVICE_ACTORS_MAX: usize = 1_000;

/// One actor of an entity.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ActorEntry {
    /// The actor.
    pub actor: ActorId,
    /// Whose it is.
    pub author: Author,
    /// Indices of its changes, in order.
    pub places: Vec<u32>,
}

impl ActorEntry {
    /// Index of its newest change.
    pub fn newest(&self) -> Option<u32> {
        self.places.last().copied()
    }
}

/// What is kept of one change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// The change.
    pub hash: ChangeHash,
    /// Index of its actor.
    pub actor: u32,
    /// Its place among the actor's changes.
    pub seq: u64,
    /// When it was written.
    pub time: Hlc,
    /// Counter of its last operation.
    pub max_op: u64,
    /// In which role.
    pub role: Role,
    /// Whether it revives a deleted entity.
    pub revives: bool,
    /// Its transaction.
    pub tx: Option<TxMark>,
    /// Indices of its dependencies, genesis changes left out.
    pub deps: Vec<u32>,
    /// Whether the relay has admitted it (always so on the relay).
    pub admitted: bool,
}

/// The headers of one entity.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HeaderIndex {
    headers: Vec<Header>,
    actors: Vec<ActorEntry>,
    by_hash: BTreeMap<ChangeHash, u32>,
    by_actor: BTreeMap<ActorId, u32>,
    versions: Versions,
}

impl HeaderIndex {
    /// An index without changes.
    pub fn new() -> Self {
        Self::default()
    }

    /// From what was stored. Returns `None` where the parts don't fit each other.
    pub fn from_parts(headers: Vec<Header>, actors: Vec<(ActorId, Author)>) -> Option<Self> {
        let mut index = Self { headers: Vec::with_capacity(headers.len()), ..Self::default() };
        for (actor, author) in actors {
            index.add_actor(actor, author);
        }
        for header in headers {
            let place = index.headers.len() as u32;
            if header.deps.iter().any(|dep| *dep >= place) {
                return None;
            }
            index.actors.get_mut(header.actor as usize)?.places.push(place);
            index.by_hash.insert(header.hash, place);
            index.headers.push(header);
        }
        Some(index)
    }

    /// How many changes it knows.
    pub fn len(&self) -> usize {
        self.headers.len()
    }

    /// Whether it knows none.
    pub fn is_empty(&self) -> bool {
        self.headers.is_empty()
    }

    /// The headers in causal order.
    pub fn headers(&self) -> &[Header] {
        &self.headers
    }

    /// The actors in order of their first change here.
    pub fn actors(&self) -> &[ActorEntry] {
        &self.actors
    }

    /// The header at a place.
    pub fn get(&self, place: u32) -> Option<&Header> {
        self.headers.get(place as usize)
    }

    /// Where a change stands.
    pub fn place(&self, hash: &ChangeHash) -> Option<u32> {
        self.by_hash.get(hash).copied()
    }

    /// A change's header.
    pub fn by_hash(&self, hash: &ChangeHash) -> Option<&Header> {
        self.get(self.place(hash)?)
    }

    /// The change of which `origin` is the beginning of the hash.
    pub fn first_of(&self, origin: Origin) -> Option<&Header> {
        let mut from = [0; 32];
        from[..12].copy_from_slice(&origin.0);
        let (hash, place) = self.by_hash.range(ChangeHash(from)..).next()?;
        self.get(*place).filter(|_| Origin::of(hash) == origin)
    }

    /// Whether the change is known.
    pub fn contains(&self, hash: &ChangeHash) -> bool {
        self.by_hash.contains_key(hash)
    }

    /// The entry of an actor.
    pub fn actor(&self, actor: &ActorId) -> Option<&ActorEntry> {
        self.actors.get(self.actor_place(actor)? as usize)
    }

    /// Index of an actor.
    pub fn actor_place(&self, actor: &ActorId) -> Option<u32> {
        self.by_actor.get(actor).copied()
    }

    /// Whether a device has as many actors here as it may have.
    pub fn is_full_of(&self, device: DeviceId) -> bool {
        self.actors.len() >= DEVICE_ACTORS_MAX
            && self.actors.iter().filter(|entry| entry.author.device == device).count() >= DEVICE_ACTORS_MAX
    }

    fn add_actor(&mut self, actor: ActorId, author: Author) -> u32 {
        let place = self.actors.len() as u32;
        self.by_actor.entry(actor.clone()).or_insert(place);
        self.actors.push(ActorEntry { actor, author, places: Vec::new() });
        place
    }

    /// Who wrote a change.
    pub fn author(&self, header: &Header) -> Author {
        self.actors[header.actor as usize].author
    }

    /// Which device wrote a change.
    pub fn device(&self, header: &Header) -> DeviceId {
        self.author(header).device
    }

    /// Adds a change whose dependencies are all known (or genesis changes). `author` is the
    /// author of its actor. Returns its place.
    pub fn push(&mut self, change: &Change, author: Author, admitted: bool) -> u32 {
        let place = self.headers.len() as u32;
        let actor = self.actor_place(change.actor());
        let actor = actor.unwrap_or_else(|| self.add_actor(change.actor().clone(), author));
        self.actors[actor as usize].places.push(place);
        let note = change.note();
        self.headers.push(Header {
            hash: change.hash(),
            actor,
            seq: change.seq(),
            time: change.time(),
            max_op: change.max_op(),
            role: note.role,
            revives: note.revives,
            tx: note.tx,
            deps: change.deps().iter().filter_map(|dep| self.place(dep)).collect(),
            admitted,
        });
        self.by_hash.insert(change.hash(), place);
        place
    }

    /// Takes out again what was added after the first so many changes, actors included.
    pub fn truncate(&mut self, changes: usize) {
        for header in self.headers.drain(changes.min(self.headers.len())..).rev() {
            self.by_hash.remove(&header.hash);
            self.actors[header.actor as usize].places.pop();
        }
        while let Some(last) = self.actors.pop_if(|entry| entry.places.is_empty()) {
            self.by_actor.remove(&last.actor);
        }
        self.versions.truncate(changes);
    }

    /// Marks a change as admitted by the relay. Returns its place if it was not so before.
    pub fn admit(&mut self, hash: &ChangeHash) -> Option<u32> {
        let place = self.place(hash)?;
        let header = &mut self.headers[place as usize];
        (!std::mem::replace(&mut header.admitted, true)).then_some(place)
    }

    /// Marks every change as not admitted.
    pub fn forget_admission(&mut self) {
        self.headers.iter_mut().for_each(|header| header.admitted = false);
    }

    /// Where the change of an actor stands that must hold its operation with this counter.
    pub fn holder(&self, actor: &ActorId, counter: u64) -> Option<u32> {
        let places = &self.actor(actor)?.places;
        // Counters grow with the actor's changes: the first that reaches it.
        let at = places.partition_point(|place| self.headers[*place as usize].max_op < counter);
        places.get(at).copied()
    }

    /// Whether the change at `ancestor` was seen by the author of the one at `descendant`.
    /// A change is not its own ancestor.
    pub fn is_ancestor(&self, ancestor: u32, descendant: u32) -> bool {
        if ancestor >= descendant {
            return false;
        }
        let (old, new) = (&self.headers[ancestor as usize], &self.headers[descendant as usize]);
        // A change depends on all earlier ones of its own actor.
        old.actor == new.actor || new.deps.contains(&ancestor) || self.past([descendant]).contains(ancestor)
    }

    /// Some changes, and all that they build on.
    pub fn past(&self, places: impl IntoIterator<Item = u32>) -> Past<'_> {
        Past::new(self, places.into_iter().collect())
    }

    /// What was seen by the author of any of some changes; they are in it only where another of them
    /// builds on them.
    pub fn past_below(&self, places: impl IntoIterator<Item = u32>) -> Past<'_> {
        self.past(places.into_iter().flat_map(|place| self.headers[place as usize].deps.iter().copied()))
    }

    /// Those among some changes that no other of them builds on, the newest first.
    pub fn newest_of(&self, places: &BTreeSet<u32>) -> Vec<u32> {
        let below = self.past_below(places.iter().copied());
        places.iter().rev().copied().filter(|place| !below.contains(*place)).collect()
    }

    /// By place, which changes build on the one at `place`.
    pub fn above(&self, place: u32) -> Vec<bool> {
        let mut above = vec![false; self.headers.len()];
        for (later, header) in self.headers.iter().enumerate().skip(place as usize + 1) {
            above[later] = header.deps.iter().any(|dep| *dep == place || above[*dep as usize]);
        }
        above
    }

    /// What the answers about ancestry take in memory, as a number of headers.
    pub fn answers_weight(&self) -> usize {
        self.versions.weight()
    }

    /// The changes that nothing else depends on, in byte order.
    pub fn heads(&self) -> Vec<ChangeHash> {
        self.heads_where(|_| true)
    }

    /// The heads of what the relay admitted, in byte order.
    pub fn admitted_heads(&self) -> Vec<ChangeHash> {
        self.heads_where(|header| header.admitted)
    }

    fn heads_where(&self, keep: impl Fn(&Header) -> bool) -> Vec<ChangeHash> {
        let mut covered = vec![false; self.headers.len()];
        for header in self.headers.iter().filter(|h| keep(h)) {
            for dep in &header.deps {
                covered[*dep as usize] = true;
            }
        }
        let mut heads: Vec<ChangeHash> = self
            .headers
            .iter()
            .zip(&covered)
            .filter(|(header, covered)| keep(header) && !**covered)
            .map(|(header, _)| header.hash)
            .collect();
        heads.sort_unstable();
        heads
    }

    /// Everything that depends on one of `roots`, them included.
    pub fn descendants(&self, roots: &BTreeSet<ChangeHash>) -> BTreeSet<ChangeHash> {
        let mut found = vec![false; self.headers.len()];
        let mut hashes = BTreeSet::new();
        for (place, header) in self.headers.iter().enumerate() {
            if roots.contains(&header.hash) || header.deps.iter().any(|dep| found[*dep as usize]) {
                found[place] = true;
                hashes.insert(header.hash);
            }
        }
        hashes
    }
}
