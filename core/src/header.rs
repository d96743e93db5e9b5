//! The header index: who wrote which change of an entity, when, and on top of what.
//!
//! It answers ancestry without Automerge, on devices and on the relay. Headers stand in
//! causal order: a change's dependencies come before it, so a search backwards can stop
//! early.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

use automerge::{ActorId, ChangeHash};

use crate::change::{Change, Origin, Role, TxMark};
use crate::clock::Hlc;
use crate::id::{Author, DeviceId};

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

/// Changes together with all that their authors had seen. Each change follows all earlier ones of its actor,
/// so that the newest of each actor says everything.
#[derive(Clone, Debug, Default)]
pub struct Past {
    /// By index of an actor, the number of its newest change in here; 0 is none.
    newest: Vec<u64>,
}

impl Past {
    /// Whether a change is in here.
    pub fn holds(&self, header: &Header) -> bool {
        self.newest.get(header.actor as usize).is_some_and(|newest| *newest >= header.seq)
    }

    /// What is in both.
    pub fn common(mut self, other: &Past) -> Past {
        self.newest.truncate(other.newest.len());
        self.newest.iter_mut().zip(&other.newest).for_each(|(mine, theirs)| *mine = (*mine).min(*theirs));
        self
    }

    fn add(&mut self, actor: u32, seq: u64) {
        let actor = actor as usize;
        if self.newest.len() <= actor {
            self.newest.resize(actor + 1, 0);
        }
        self.newest[actor] = self.newest[actor].max(seq);
    }

    /// Adds what is in another.
    pub fn add_all(&mut self, other: &Past) {
        if self.newest.len() < other.newest.len() {
            self.newest.resize(other.newest.len(), 0);
        }
        self.newest.iter_mut().zip(&other.newest).for_each(|(mine, theirs)| *mine = (*mine).max(*theirs));
    }
}

/// Pasts that are remembered: those of whole branches, so that who asks along a branch walks it once.
const PASTS_MAX: usize = 16;

/// Putting together the numbers of so many actors costs what looking at one header does.
const NUMBERS_PER_HEADER: u64 = 64;

#[derive(Clone, Debug, Default)]
struct Remembered {
    /// By the newest change in them, the one asked for last at the end.
    pasts: VecDeque<(u32, Past)>,
    /// Headers that were looked at, and numbers of actors that were put together.
    walked: u64,
}

/// The headers of one entity.
#[derive(Clone, Debug, Default)]
pub struct HeaderIndex {
    headers: Vec<Header>,
    actors: Vec<ActorEntry>,
    by_actor: BTreeMap<ActorId, u32>,
    by_hash: BTreeMap<ChangeHash, u32>,
    remembered: RefCell<Remembered>,
}

impl PartialEq for HeaderIndex {
    fn eq(&self, other: &Self) -> bool {
        self.headers == other.headers && self.actors == other.actors
    }
}

impl Eq for HeaderIndex {}

impl HeaderIndex {
    /// An index without changes.
    pub fn new() -> Self {
        Self::default()
    }

    /// From what was stored. Returns `None` where the parts don't fit each other.
    pub fn from_parts(headers: Vec<Header>, actors: Vec<(ActorId, Author)>) -> Option<Self> {
        let mut index = Self {
            headers: Vec::with_capacity(headers.len()),
            actors: actors
                .into_iter()
                .map(|(actor, author)| ActorEntry { actor, author, places: Vec::new() })
                .collect(),
            ..Self::default()
        };
        let places = index.actors.iter().zip(0..);
        index.by_actor = places.map(|(entry, place)| (entry.actor.clone(), place)).collect();
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
        self.actors.get(*self.by_actor.get(actor)? as usize)
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
        let actor = match self.by_actor.get(change.actor()) {
            Some(actor) => *actor as usize,
            None => {
                self.by_actor.insert(change.actor().clone(), self.actors.len() as u32);
                self.actors.push(ActorEntry { actor: change.actor().clone(), author, places: Vec::new() });
                self.actors.len() - 1
            }
        };
        self.actors[actor].places.push(place);
        let note = change.note();
        self.headers.push(Header {
            hash: change.hash(),
            actor: actor as u32,
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

    /// Takes all changes out but the first `len`.
    pub fn truncate(&mut self, len: usize) {
        for header in self.headers.drain(len.min(self.headers.len())..).rev() {
            self.by_hash.remove(&header.hash);
            self.actors[header.actor as usize].places.pop();
        }
        while let Some(entry) = self.actors.pop_if(|entry| entry.places.is_empty()) {
            self.by_actor.remove(&entry.actor);
        }
        self.remembered.get_mut().pasts.retain(|(place, _)| (*place as usize) < len);
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

    /// The changes at `places` with all that their authors had seen.
    pub fn past(&self, places: impl IntoIterator<Item = u32>) -> Past {
        let mut past = Past::default();
        for place in places {
            if !self.headers.get(place as usize).is_none_or(|header| past.holds(header)) {
                past.add_all(&self.past_of(place));
            }
        }
        past
    }

    fn past_of(&self, place: u32) -> Past {
        let mut remembered = self.remembered.borrow_mut();
        // What is remembered is whole: behind what it holds nothing has to be looked for.
        let (mut past, mut known) = (Past::default(), Past::default());
        // From the end, so that none is met twice.
        let mut open = BTreeSet::from([place]);
        while let Some(place) = open.pop_last() {
            let header = &self.headers[place as usize];
            if known.holds(header) {
                continue;
            }
            remembered.walked += 1;
            if let Some((_, whole)) = remembered.pasts.iter().find(|(at, _)| *at == place) {
                known.add_all(whole);
                remembered.walked += known.newest.len() as u64 / NUMBERS_PER_HEADER;
                continue;
            }
            past.add(header.actor, header.seq);
            open.extend(&header.deps);
        }
        past.add_all(&known);
        remembered.pasts.retain(|(at, _)| *at != place);
        if remembered.pasts.len() >= PASTS_MAX {
            remembered.pasts.pop_front();
        }
        remembered.pasts.push_back((place, past.clone()));
        past
    }

    /// How many headers were looked at so far, to find out what was seen by whom. It is what that has cost.
    pub fn walked(&self) -> u64 {
        self.remembered.borrow().walked
    }

    /// Whether the change at `ancestor` was seen by the author of the one at `descendant`.
    /// A change is not its own ancestor.
    pub fn is_ancestor(&self, ancestor: u32, descendant: u32) -> bool {
        ancestor < descendant && self.past([descendant]).holds(&self.headers[ancestor as usize])
    }

    /// By place, whether the author of a change had seen the one at `place`.
    pub fn followers(&self, place: u32) -> Vec<bool> {
        let mut follows = vec![false; self.headers.len()];
        for (at, header) in self.headers.iter().enumerate().skip(place as usize + 1) {
            follows[at] = header.deps.iter().any(|dep| *dep == place || follows[*dep as usize]);
        }
        follows
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
