//! What the relay knows of each entity: its header index, heads and containers.

use std::collections::{BTreeMap, BTreeSet};

use automerge::{ActorId, ChangeHash};

use super::layout::{self, ActorRecord, EntityRecord, WorkspaceHash};
use crate::change::Change;
use crate::codec;
use crate::genesis::{Genesis, NAMED_CONTAINERS_MAX};
use crate::header::{Header, HeaderIndex};
use crate::id::{Author, EntityHash, EntityKey};
use crate::store::{Batch, Entry, Keyspace, Store, StoreError, View};
use crate::targets::{ChangeTargets, Targets};

/// Keys read from the store at once.
const SCAN_KEYS: usize = 1024;
/// Headers that the cache may hold for each entity that it may hold, on average.
const CACHED_HEADERS_PER_ENTITY: usize = 64;

/// A change that was added to an entity and may have to leave it again.
#[derive(Clone, Debug)]
pub(super) struct Pushed {
    pub(super) change: Change,
    pub(super) author: Author,
    pub(super) marks: ChangeTargets,
}

/// How much there is of an entity.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Size {
    /// Of all changes, as far as they were counted.
    pub(super) bytes: u64,
    /// As far as they are known.
    pub(super) operations: u64,
    /// The greatest counter of an operation.
    pub(super) counter: u64,
}

/// An entity as admission needs it.
#[derive(Clone, Debug)]
pub(super) struct Entity {
    pub(super) key: EntityKey,
    pub(super) hash: EntityHash,
    pub(super) index: HeaderIndex,
    /// Where the operations of these changes acted.
    pub(super) targets: Targets,
    /// Of the changes that are not stored yet.
    new_targets: Vec<ChangeTargets>,
    /// The changes that nothing else depends on.
    heads: BTreeSet<ChangeHash>,
    /// Containers that devices named while no schema was known.
    pub(super) named: BTreeMap<String, Genesis>,
    /// How many changes and actors are committed.
    stored: (usize, usize),
    named_stored: usize,
    /// With what was pushed.
    pub(super) size: Size,
    /// Of what is committed.
    pub(super) stored_size: Size,
}

impl Entity {
    fn new(key: EntityKey, hash: EntityHash) -> Self {
        Self {
            key,
            hash,
            index: HeaderIndex::new(),
            targets: Targets::default(),
            new_targets: Vec::new(),
            heads: BTreeSet::new(),
            named: BTreeMap::new(),
            stored: (0, 0),
            named_stored: 0,
            size: Size::default(),
            stored_size: Size::default(),
        }
    }

    /// Reads an entity; one that nobody wrote yet is empty.
    pub(super) fn load(
        store: &dyn Store,
        workspace: WorkspaceHash,
        key: EntityKey,
        hash: EntityHash,
    ) -> Result<Self, StoreError> {
        let damaged = |how: &str| StoreError::Damaged { what: format!("the entity {key} {how}") };
        let mut rows = scan_all(store, Keyspace::ENTITY, &workspace.entity(hash))?.into_iter();
        let Some((first, record)) = rows.next() else { return Ok(Self::new(key, hash)) };
        if first != workspace.entity(hash) {
            return Err(damaged("lacks its record"));
        }
        let (record, bytes) = layout::decode_entity(&record)?;
        let mut actors = Vec::new();
        for (_, bytes) in rows {
            let actor: ActorRecord = codec::decode(&bytes, "the record of an actor")?;
            let author = Author::from_bytes(&actor.author).ok_or_else(|| damaged("has an unknown author"))?;
            actors.push((ActorId::from(actor.actor), author));
        }
        let mut headers: Vec<Header> = Vec::new();
        let mut targets = Targets::default();
        let mut size = Size { bytes, ..Size::default() };
        let found = scan_all(store, Keyspace::HEADER, &workspace.entity(hash))?;
        let records = layout::join_headers(found).ok_or_else(|| damaged("lacks a part of a header"))?;
        for bytes in records {
            let (header, marks) = layout::decode_header(&bytes)?;
            let before = marks.as_ref().map_or(0, |marks| marks.operations());
            size.operations += before;
            size.counter = size.counter.max(header.max_op);
            targets.push((header.max_op + 1).saturating_sub(before), &header.deps, marks.as_ref());
            headers.push(header);
        }
        let stored = (headers.len(), actors.len());
        if stored != (record.changes as usize, record.actors as usize) {
            return Err(damaged("has another number of changes than its record says"));
        }
        let index = HeaderIndex::from_parts(headers, actors)
            .ok_or_else(|| damaged("has headers that don't fit each other"))?;
        let heads = index.heads().into_iter().collect();
        let mut entity =
            Self { index, targets, heads, stored, size, stored_size: size, ..Self::new(key, hash) };
        entity.name_containers(&record.genesis);
        entity.named_stored = entity.named.len();
        Ok(entity)
    }

    /// Whether it is just as the last batch put it, containers that were only named included.
    pub(super) fn is_stored(&self) -> bool {
        (self.index.len(), self.index.actors().len()) == self.stored && self.named.len() == self.named_stored
    }

    /// The heads in byte order.
    pub(super) fn heads(&self) -> Vec<ChangeHash> {
        self.heads.iter().copied().collect()
    }

    /// Takes up containers that a device named. What is no field or no kind is left out.
    pub(super) fn name_containers(&mut self, named: &[(String, u8)]) {
        for (field, kind) in named {
            if self.named.len() < NAMED_CONTAINERS_MAX
                && !self.named.contains_key(field)
                && let Some(genesis) = Genesis::named(self.key.type_name(), field, *kind)
            {
                self.named.insert(field.clone(), genesis);
            }
        }
    }

    /// Adds a change whose dependencies are all here.
    pub(super) fn push(&mut self, change: &Change, author: Author, marks: &ChangeTargets) {
        let place = self.index.push(change, author, true);
        if let Some(header) = self.index.get(place) {
            self.targets.push(change.start_op(), &header.deps, Some(marks));
        }
        self.new_targets.push(marks.clone());
        self.size.bytes += change.bytes().len() as u64;
        self.size.operations += change.operations() as u64;
        self.size.counter = self.size.counter.max(change.max_op());
    }

    /// What it takes in memory, as a number of headers.
    fn weight(&self) -> usize {
        self.index.len() + self.index.answers_weight() + self.targets.weight()
    }

    /// Keeps what was pushed since the last commit only where `keep` says so.
    /// Invariant: nothing that is kept depends on what is not.
    pub(super) fn settle(&mut self, pushed: &[Pushed], keep: impl Fn(&ChangeHash) -> bool) {
        let kept = || pushed.iter().filter(|pushed| keep(&pushed.change.hash()));
        if kept().count() < pushed.len() {
            let (changes, _) = self.stored;
            self.index.truncate(changes);
            self.targets.truncate(changes);
            self.size = self.stored_size;
            self.new_targets.clear();
            for Pushed { change, author, marks } in kept() {
                self.push(change, *author, marks);
            }
        }
        for Pushed { change, .. } in kept() {
            for dep in change.deps() {
                self.heads.remove(dep);
            }
            self.heads.insert(change.hash());
        }
    }

    /// Puts what is new into a batch, which the caller commits.
    pub(super) fn put(&mut self, batch: &mut Batch, workspace: WorkspaceHash) {
        if self.is_stored() {
            return;
        }
        let now = (self.index.len(), self.index.actors().len());
        let new = self.index.headers().iter().enumerate().skip(self.stored.0);
        for ((place, header), marks) in new.zip(std::mem::take(&mut self.new_targets)) {
            let key = workspace.numbered(self.hash, place as u32);
            layout::put_header(batch, &key, header, marks);
        }
        for (number, entry) in self.index.actors().iter().enumerate().skip(self.stored.1) {
            let record =
                ActorRecord { actor: entry.actor.to_bytes().to_vec(), author: entry.author.to_bytes() };
            let key = workspace.numbered(self.hash, number as u32);
            batch.put(Keyspace::ENTITY, key, codec::encode(&record));
        }
        let record = EntityRecord {
            type_name: self.key.type_name().to_owned(),
            id: self.key.id().to_owned(),
            genesis: self.named.values().map(|g| (g.field.clone(), g.kind.code())).collect(),
            changes: now.0 as u32,
            actors: now.1 as u32,
        };
        let record = layout::encode_entity(record, self.size.bytes);
        batch.put(Keyspace::ENTITY, workspace.entity(self.hash), record);
        self.stored = now;
        self.stored_size = self.size;
        self.named_stored = self.named.len();
    }
}

fn scan_all(store: &dyn Store, keyspace: Keyspace, prefix: &[u8]) -> Result<Vec<Entry>, StoreError> {
    let mut all: Vec<Entry> = Vec::new();
    loop {
        let from = all.last().map_or_else(Vec::new, |(key, _)| [key, &[0][..]].concat());
        let page = store.scan(View::Latest, keyspace, prefix, &from, SCAN_KEYS)?;
        let more = page.len() == SCAN_KEYS;
        all.extend(page);
        if !more {
            return Ok(all);
        }
    }
}

/// Entities kept in memory. At its bounds, of entities and of their headers together, the one
/// used longest ago leaves.
///
/// Invariant: an entity in the cache equals what [`View::Latest`] of the store says.
#[derive(Debug)]
pub(super) struct EntityCache {
    entities: BTreeMap<(WorkspaceHash, EntityHash), (u64, Entity)>,
    by_use: BTreeMap<u64, (WorkspaceHash, EntityHash)>,
    uses: u64,
    headers: usize,
    entities_max: usize,
}

impl EntityCache {
    pub(super) fn new(entities_max: usize) -> Self {
        Self { entities: BTreeMap::new(), by_use: BTreeMap::new(), uses: 0, headers: 0, entities_max }
    }

    /// Takes an entity out, to be changed and put back once it is committed.
    pub(super) fn take(&mut self, workspace: WorkspaceHash, hash: EntityHash) -> Option<Entity> {
        let (used, entity) = self.entities.remove(&(workspace, hash))?;
        self.by_use.remove(&used);
        self.headers -= entity.weight();
        Some(entity)
    }

    pub(super) fn put(&mut self, workspace: WorkspaceHash, entity: Entity) {
        let key = (workspace, entity.hash);
        self.take(key.0, key.1);
        self.uses += 1;
        self.headers += entity.weight();
        self.by_use.insert(self.uses, key);
        self.entities.insert(key, (self.uses, entity));
        let headers_max = self.entities_max.saturating_mul(CACHED_HEADERS_PER_ENTITY);
        while self.entities.len() > self.entities_max || self.headers > headers_max {
            let Some((_, oldest)) = self.by_use.first_key_value() else { return };
            let oldest = *oldest;
            self.take(oldest.0, oldest.1);
        }
    }
}
