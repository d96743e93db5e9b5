//! A replica: everything that one device holds of one workspace, and what it must still do.
//!
//! It is driven, it does not act. The host calls a method with the time, drains
//! [`Replica::poll_output`], and calls [`Replica::durable`] when the store has made more
//! durable. One writer at a time owns it; reads go through [`Rows`](crate::rows::Rows).
//!
//! - [`Replica::write`] makes local edits. What it returns may be told to the app once its
//!   commit is durable, and leaves the device no earlier.
//! - [`Replica::connect`], [`Replica::receive`] and [`Replica::disconnect`] are the link to a
//!   relay: see [`session`](crate::session).

mod apply;
mod displace;
pub(crate) mod layout;
mod offer;
mod outbox;
mod repair;
mod verify;
mod whole;
mod write;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use automerge::{ActorId, ChangeHash};

use crate::change::{Change, Origin, Role};
use crate::clock::{Now, WallMs};
use crate::codec::{self, HeaderRecord};
use crate::digest::Digest;
use crate::entity::{Entity, LoadError};
use crate::header::{Header, HeaderIndex};
use crate::id::{Author, DeviceId, EntityHash, EntityKey, Incarnation, WorkspaceId};
use crate::intent::Intent;
use crate::rows::{INDEX_FORM, index_keys};
use crate::schema::{EntityType, Schema};
use crate::store::{Batch, CommitNo, Keyspace, Store, StoreError, View};
use crate::wire::GrantRole;

use layout::{
    ConflictRecord, DeviceRecord, EntityRecord, Keys, OutboxRecord, PendingTx, RefusedRecord, RepairRecord,
    RowRecord, SideRecord, StateRecord, SyncStatus, from_json, to_json,
};
pub use outbox::{ChannelState, Held};
pub use verify::{Fault, Verified};
pub use write::{Edit, Expect, WriteError, Written};

/// Documents smaller than this are stored whole after each change.
const FOLD_BELOW_BYTES: u64 = 4 * 1024;
/// Most increments stored after a snapshot.
const INCREMENTS_MAX: usize = 16;
/// A snapshot is folded when its increments have this many times its bytes. A change alone
/// takes about eight times the bytes that it takes within a snapshot, so about a quarter of a
/// document is applied when it is loaded, and it is folded each time it has grown by a
/// quarter: proving that a large snapshot loads is what costs.
const FOLD_INCREMENTS_FACTOR: u64 = 2;
/// Entities whose documents stay loaded.
const CACHED_ENTITIES_MAX: usize = 256;
/// A clock is corrected when it is off by more than this, in milliseconds.
pub const SKEW_TOLERATED_MS: u64 = 60_000;

/// What a replica is opened with.
#[derive(Clone, Debug)]
pub struct ReplicaConfig {
    /// The workspace.
    pub workspace: WorkspaceId,
    /// This device.
    pub device: DeviceId,
    /// Its name for people.
    pub device_name: String,
    /// Its operating system.
    pub platform: String,
    /// The types of the workspace.
    pub schema: Arc<Schema>,
    /// The schema as a file, to be pushed where this device may and the relay has none.
    pub schema_source: String,
    /// The role to assume until a grant says otherwise.
    pub assumed_role: Option<GrantRole>,
    /// Which life of the store this is. It grows when the store was found to have gone back;
    /// then a new incarnation begins, so that no (actor, seq) is used twice.
    pub store_life: u32,
    /// Random bytes: where ids of transactions start from.
    pub seed: [u8; 32],
}

/// What the host must do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Send a message on the link.
    Send(Vec<u8>),
    /// Entities changed, to be told once the commit is durable.
    Changed {
        /// Durable then.
        after: CommitNo,
        /// Which.
        entities: Vec<EntityKey>,
    },
    /// The state of the channel or the figures changed.
    Status,
    /// End the link and connect anew, so that the handshake measures the clock: it was set, or the machine
    /// slept. Until then what is written waits.
    Reconnect,
}

/// Figures that an app can show.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ReplicaStatus {
    /// Entities with changes that the relay has not admitted.
    pub pending: u64,
    /// Entities with something that waits for a person.
    pub conflicts: u64,
    /// Changes that were refused and not dismissed.
    pub refused: u64,
    /// Digest of what the relay admitted.
    pub digest: Digest,
    /// How far this device's clock is ahead of the relay's, in milliseconds; measured at each
    /// connect, and a new one is asked for when the clock was set: see [`Output::Reconnect`].
    pub clock_skew_ms: i64,
    /// Changes admitted by the relay since the replica was opened.
    pub sent: u64,
    /// Changes received since the replica was opened.
    pub received: u64,
    /// When the last sync completed.
    pub synced: Option<WallMs>,
    /// Entities of which the relay lost something that other devices have to bring it, or this one once it may.
    pub lacking: u64,
}

/// An entity in memory with its record.
#[derive(Debug)]
struct Loaded {
    entity: Entity,
    record: EntityRecord,
    used: u64,
}

/// One pending change, in memory.
#[derive(Clone, Debug)]
struct PendingRef {
    entity: EntityHash,
    key: EntityKey,
    hash: ChangeHash,
    origin: Origin,
    tx: Option<PendingTx>,
    commit: CommitNo,
    sent: bool,
    /// How many changes were marked as sent in this life of the store when this one was: what
    /// the relay is told, so that it is never told of a mark that is not durable.
    mark: u64,
    bytes: usize,
    /// Offered again as it is: see [`OutboxRecord::again`].
    again: bool,
}

/// See the [module](self).
pub struct Replica {
    config: ReplicaConfig,
    store: Arc<dyn Store>,
    keys: Keys,
    state: StateRecord,
    repair: RepairRecord,
    /// As the store has it.
    repair_stored: RepairRecord,
    /// Entities of which the relay lacks something that was not this device's to bring.
    lacking: BTreeSet<EntityHash>,
    cache: BTreeMap<EntityHash, Loaded>,
    uses: u64,
    outbox: BTreeMap<u64, PendingRef>,
    /// Records of the outbox in the batch under construction, which the store does not show yet.
    unwritten: BTreeMap<u64, OutboxRecord>,
    /// Outbox numbers by entity.
    pending: BTreeMap<EntityHash, BTreeSet<u64>>,
    /// Entities with refused changes, and how many.
    refused: BTreeMap<EntityKey, u64>,
    /// Which of them go should their edits come back, by number.
    lost: BTreeMap<EntityKey, BTreeMap<u64, Origin>>,
    /// Transactions of which a pending member is gone and the others are still there.
    broken: BTreeSet<[u8; 16]>,
    conflicts: u64,
    sent: u64,
    received: u64,
    transactions: u64,
    channel: outbox::Link,
    outputs: VecDeque<Output>,
    last_commit: CommitNo,
    /// The store went back, and the feed has not yet brought all that it lost: nothing leaves,
    /// since what looks as if it had never been sent may have been.
    recovering: bool,
    /// Hashes of the schemas that the relay had, in the order in which it got them.
    schemas: Vec<[u8; 32]>,
    schemas_changed: bool,
    /// Indexes hold nothing of what rows say: see [`Replica::follow_schema`].
    reindexing: bool,
    /// A look at everything that is under way.
    scrub: Option<verify::Scrub>,
}

impl Replica {
    /// Opens what the store holds of a workspace.
    pub fn open(store: Arc<dyn Store>, config: ReplicaConfig) -> Result<Self, StoreError> {
        let keys = Keys::of(&config.workspace);
        let mut state = match store.get(View::Latest, Keyspace::META, &keys.state())? {
            Some(bytes) => codec::decode(&bytes, "the replica's state")?,
            None => StateRecord { outbox_next: 1, refused_next: 1, ..StateRecord::default() },
        };
        let repair = store.get(View::Latest, Keyspace::META, &keys.repair())?;
        let repair: RepairRecord = repair
            .map(|bytes| codec::decode(&bytes, "where a repair stands"))
            .transpose()?
            .unwrap_or_default();
        if state.store_life != config.store_life {
            state.store_life = config.store_life;
            state.incarnation = state.incarnation.saturating_add(1);
        }
        if state.role == 0
            && let Some(role) = config.assumed_role
        {
            state.role = role.code();
        }
        let mut replica = Self {
            config,
            store,
            keys,
            state,
            repair_stored: repair.clone(),
            repair,
            lacking: BTreeSet::new(),
            cache: BTreeMap::new(),
            uses: 0,
            outbox: BTreeMap::new(),
            unwritten: BTreeMap::new(),
            pending: BTreeMap::new(),
            refused: BTreeMap::new(),
            lost: BTreeMap::new(),
            conflicts: 0,
            sent: 0,
            received: 0,
            transactions: 0,
            broken: BTreeSet::new(),
            channel: outbox::Link::default(),
            outputs: VecDeque::new(),
            last_commit: CommitNo(0),
            recovering: false,
            schemas: Vec::new(),
            schemas_changed: false,
            reindexing: false,
            scrub: None,
        };
        replica.recovering =
            replica.store.get(View::Latest, Keyspace::META, &replica.keys.recovering())?.is_some();
        let schemas = replica.store.get(View::Latest, Keyspace::META, &replica.keys.schemas())?;
        replica.schemas = schemas.unwrap_or_default().as_chunks().0.to_vec();
        replica.load_queues()?;
        let own = DeviceRecord {
            name: replica.config.device_name.clone(),
            platform: replica.config.platform.clone(),
        };
        let place = replica.keys.device(&replica.config.device.0);
        if replica.store.get(View::Latest, Keyspace::DEVICE, &place)? != Some(codec::encode(&own)) {
            let mut batch = Batch::new();
            batch.put(Keyspace::DEVICE, place, codec::encode(&own));
            replica.commit(batch)?;
        }
        replica.follow_schema()?;
        Ok(replica)
    }

    /// Writes rows and indexes anew if they follow another schema than the replica was opened
    /// with, or another form of index keys: new fields show their defaults, new indexes hold what was written before, and
    /// what was of an unknown type is shown. Documents stay as they are. If this is cut
    /// short, it begins again at the next start.
    fn follow_schema(&mut self) -> Result<(), StoreError> {
        const PAGE: usize = 256;
        let store = Arc::clone(&self.store);
        let place = self.keys.schema();
        let follows = [&self.config.schema.hash()[..], &[INDEX_FORM]].concat();
        if store.get(View::Latest, Keyspace::META, &place)?.is_some_and(|followed| followed == follows) {
            return Ok(());
        }
        let prefix = self.keys.prefix();
        loop {
            let page = store.scan(View::Latest, Keyspace::INDEX, &prefix, &[], PAGE)?;
            if page.is_empty() {
                break;
            }
            let mut batch = Batch::new();
            page.into_iter().for_each(|(key, _)| batch.delete(Keyspace::INDEX, key));
            self.commit(batch)?;
        }
        self.reindexing = true;
        let mut from = Vec::new();
        loop {
            let page = store.scan(View::Latest, Keyspace::ENTITY, &prefix, &from, PAGE)?;
            let mut batch = Batch::new();
            for (_, bytes) in &page {
                let record = self.keys.entity_record(&*store, bytes)?;
                let Ok(key) = EntityKey::new(record.type_name, record.id) else { continue };
                if record.headers == 0 {
                    continue;
                }
                match self.load(&key) {
                    Ok(entity) => self.materialise(&mut batch, entity)?,
                    // It is no more readable than it was before; the others are.
                    Err(StoreError::Damaged { what }) => tracing::error!(entity = %key, %what, "not shown"),
                    Err(error) => return Err(error),
                }
            }
            self.trim_cache();
            match page.last() {
                Some((key, _)) if page.len() == PAGE => {
                    from = [&key[..], &[0]].concat();
                    self.commit(batch)?;
                }
                _ => {
                    self.reindexing = false;
                    batch.put(Keyspace::META, place, follows);
                    self.commit(batch)?;
                    return Ok(());
                }
            }
        }
    }

    fn load_queues(&mut self) -> Result<(), StoreError> {
        let store = Arc::clone(&self.store);
        let prefix = self.keys.prefix();
        for_each(&*store, Keyspace::OUTBOX, &prefix, |key, head| {
            let Some(number) = key.last_chunk::<8>().map(|n| u64::from_be_bytes(*n)) else { return Ok(()) };
            let bytes = self.keys.whole(&*store, View::Latest, head)?;
            let record: OutboxRecord = from_json(&bytes, "a pending change")?;
            let (origin, tx) = (record.origin(), record.transaction());
            let Ok(entity) = EntityKey::new(record.type_name, record.id) else { return Ok(()) };
            let pending = PendingRef {
                entity: EntityHash::of(&self.config.workspace, &entity),
                key: entity,
                hash: ChangeHash(record.hash),
                origin,
                tx,
                commit: CommitNo(0),
                sent: record.sent,
                mark: self.state.sent,
                bytes: record.bytes as usize,
                again: record.again,
            };
            self.track(number, pending);
            Ok(())
        })?;
        for_each(&*store, Keyspace::REFUSED, &prefix, |key, head| {
            let bytes = self.keys.whole(&*store, View::Latest, head)?;
            let record: RefusedRecord = from_json(&bytes, "a refused change")?;
            let Some(number) = key.last_chunk::<8>().map(|n| u64::from_be_bytes(*n)) else { return Ok(()) };
            if let Ok(entity) = EntityKey::new(record.type_name, record.id) {
                self.track_refused(entity, number, record.edit.map(Origin));
            }
            Ok(())
        })?;
        for_each(&*store, Keyspace::META, &self.keys.all_lacking(), |key, _| {
            self.lacking.extend(key.last_chunk().map(|hash| EntityHash(*hash)));
            Ok(())
        })?;
        for_each(&*store, Keyspace::CONFLICT, &prefix, |_, _| {
            self.conflicts += 1;
            Ok(())
        })
    }

    /// Reads everything from the store again, where a commit was refused half way through an
    /// operation ([`StoreError::NoSpace`]): what is in memory may be ahead of the store then. The
    /// link is over; what was queued for the store earlier still becomes durable.
    ///
    /// Where this fails the replica must not be used until it succeeds.
    pub fn reopen(&mut self) -> Result<(), StoreError> {
        let mut fresh = Self::open(Arc::clone(&self.store), self.config.clone())?;
        fresh.last_commit = fresh.last_commit.max(self.last_commit);
        for (number, pending) in &mut fresh.outbox {
            let known = self.outbox.get(number).filter(|known| {
                known.commit <= self.last_commit && (known.hash, known.sent) == (pending.hash, pending.sent)
            });
            // What is not known to be durable counts as part of the last commit.
            pending.commit = known.map_or(fresh.last_commit, |known| known.commit);
            pending.mark = known.map_or(pending.mark, |known| known.mark);
        }
        fresh.transactions = self.transactions;
        (fresh.sent, fresh.received) = (self.sent, self.received);
        fresh.channel = self.channel.ended();
        let told = self.outputs.drain(..).filter(|output| !matches!(output, Output::Send(_)));
        fresh.outputs = told.chain([Output::Status]).collect();
        *self = fresh;
        Ok(())
    }

    fn track(&mut self, number: u64, pending: PendingRef) {
        self.pending.entry(pending.entity).or_default().insert(number);
        self.outbox.insert(number, pending);
    }

    fn untrack(&mut self, number: u64) -> Option<PendingRef> {
        let pending = self.outbox.remove(&number)?;
        if let Some(numbers) = self.pending.get_mut(&pending.entity) {
            numbers.remove(&number);
            if numbers.is_empty() {
                self.pending.remove(&pending.entity);
            }
        }
        Some(pending)
    }

    /// What the host must do next.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// Figures.
    pub fn status(&self) -> ReplicaStatus {
        ReplicaStatus {
            pending: self.pending.len() as u64,
            conflicts: self.conflicts,
            refused: self.refused.values().sum(),
            digest: Digest(self.state.digest),
            clock_skew_ms: self.state.skew_ms.saturating_neg(),
            sent: self.sent,
            received: self.received,
            lacking: self.lacking.len() as u64,
            synced: (self.state.synced_ms > 0).then_some(WallMs(self.state.synced_ms)),
        }
    }

    /// The types of the workspace.
    pub fn schema(&self) -> &Arc<Schema> {
        &self.config.schema
    }

    /// The role that this device has, as far as it knows.
    pub fn role(&self) -> GrantRole {
        GrantRole::from_code(self.state.role).unwrap_or(GrantRole::Writer)
    }

    fn change_role(&self) -> Role {
        if self.role() == GrantRole::Authority { Role::Authority } else { Role::Device }
    }

    /// The last batch that this replica committed.
    pub fn last_commit(&self) -> CommitNo {
        self.last_commit
    }

    /// How much this device's clock must be corrected by, in milliseconds.
    fn correction_ms(&self) -> i64 {
        if self.state.skew_ms.unsigned_abs() > SKEW_TOLERATED_MS { self.state.skew_ms } else { 0 }
    }

    fn corrected(&self, now: Now) -> WallMs {
        WallMs(now.wall.0.saturating_add_signed(self.correction_ms()))
    }

    fn author(&self, record: &EntityRecord) -> Author {
        Author {
            device: self.config.device,
            incarnation: Incarnation::new(self.state.incarnation, record.rebuilds),
        }
    }

    fn ty(&self, name: &str) -> Option<&EntityType> {
        self.config.schema.types.get(name)
    }

    fn hash(&self, key: &EntityKey) -> EntityHash {
        EntityHash::of(&self.config.workspace, key)
    }

    fn put_device(&self, batch: &mut Batch, key: [u8; 32], name: &str, platform: &str) {
        let record = DeviceRecord { name: name.to_owned(), platform: platform.to_owned() };
        batch.put(Keyspace::DEVICE, self.keys.device(&key), codec::encode(&record));
    }

    /// Commits a batch together with the replica's state.
    fn commit(&mut self, mut batch: Batch) -> Result<CommitNo, StoreError> {
        batch.put(Keyspace::META, self.keys.state(), codec::encode(&self.state));
        if std::mem::take(&mut self.schemas_changed) {
            batch.put(Keyspace::META, self.keys.schemas(), self.schemas.concat());
        }
        if self.repair != self.repair_stored {
            batch.put(Keyspace::META, self.keys.repair(), codec::encode(&self.repair));
        }
        self.last_commit = self.store.commit(batch)?;
        self.unwritten.clear();
        self.repair_stored.clone_from(&self.repair);
        Ok(self.last_commit)
    }

    /// An entity from the cache or the store; a new one where there is none.
    fn load(&mut self, key: &EntityKey) -> Result<EntityHash, StoreError> {
        let hash = self.hash(key);
        self.uses += 1;
        if let Some(loaded) = self.cache.get_mut(&hash) {
            loaded.used = self.uses;
            return Ok(hash);
        }
        let ty = self.ty(key.type_name()).cloned();
        let loaded = match self.store.get(View::Latest, Keyspace::ENTITY, &self.keys.entity(hash))? {
            None => Loaded {
                entity: Entity::new(&self.config.workspace, key, ty.as_ref()),
                record: EntityRecord {
                    type_name: key.type_name().to_owned(),
                    id: key.id().to_owned(),
                    generation: self.repair.generation,
                    ..EntityRecord::default()
                },
                used: self.uses,
            },
            Some(bytes) => {
                let record = self.read_entity(&bytes)?;
                let entity = self.load_stored(key, hash, &record, ty.as_ref())?;
                Loaded { entity, record, used: self.uses }
            }
        };
        self.cache.insert(hash, loaded);
        Ok(hash)
    }

    /// Reads the record of an entity. What an earlier generation says of admission is left out.
    fn read_entity(&self, bytes: &[u8]) -> Result<EntityRecord, StoreError> {
        let mut record = self.keys.entity_record(&*self.store, bytes)?;
        if record.generation != self.repair.generation {
            record.admitted_heads.clear();
        }
        Ok(record)
    }

    fn load_stored(
        &self,
        key: &EntityKey,
        hash: EntityHash,
        record: &EntityRecord,
        ty: Option<&EntityType>,
    ) -> Result<Entity, StoreError> {
        let damaged = |what: String| StoreError::Damaged { what };
        // Grows with what is there: the count may be damaged.
        let mut headers = Vec::new();
        for_each(&*self.store, Keyspace::HEADER, &self.keys.headers(hash), |_, bytes| {
            headers.push(Header::from(codec::decode::<HeaderRecord>(bytes, "a header")?));
            Ok(())
        })?;
        let mut actors = Vec::with_capacity(record.actors.len());
        for (actor, author) in &record.actors {
            let author = Author::from_bytes(author).ok_or_else(|| damaged(format!("an author of {key}")))?;
            actors.push((ActorId::from(&actor[..]), author));
        }
        let headers = (headers.len() == record.headers as usize)
            .then(|| HeaderIndex::from_parts(headers, actors))
            .flatten()
            .ok_or_else(|| damaged(format!("the header index of {key}")))?;
        let read = |key: Vec<u8>| self.keys.get(&*self.store, View::Latest, Keyspace::DOC, &key);
        let snapshot = read(self.keys.snapshot(hash))?.unwrap_or_default();
        let mut increments = Vec::new();
        for number in 0..record.increments.len() as u32 {
            let bytes = read(self.keys.increment(hash, number))?;
            let changes = bytes.as_deref().and_then(split_increment);
            increments.extend(changes.ok_or_else(|| damaged(format!("increment {number} of {key}")))?);
        }
        let mut entity = Entity::load(
            &self.config.workspace,
            key,
            ty,
            &snapshot,
            &increments,
            headers,
            &record.containers,
        )
        .map_err(|error| damaged(error.to_string()))?;
        if record.generation != self.repair.generation {
            entity.forget_admission();
        }
        Ok(entity)
    }

    fn loaded(&mut self, hash: EntityHash) -> Result<&mut Loaded, StoreError> {
        self.cache
            .get_mut(&hash)
            .ok_or(StoreError::Damaged { what: "an entity that was loaded is gone".into() })
    }

    /// Drops what was used longest ago. Never called while an operation is under way.
    fn trim_cache(&mut self) {
        while self.cache.len() > CACHED_ENTITIES_MAX {
            let oldest = self.cache.iter().min_by_key(|(_, loaded)| loaded.used).map(|(hash, _)| *hash);
            match oldest {
                Some(oldest) => self.cache.remove(&oldest),
                None => break,
            };
        }
    }

    /// Writes everything about an entity that new changes moved. `changes` are those that
    /// were added since it was last written; `rewritten` says that the entity was rebuilt.
    fn persist(
        &mut self,
        batch: &mut Batch,
        hash: EntityHash,
        changes: &[Change],
        admitted: &[u32],
        rewritten: bool,
        proved: bool,
    ) -> Result<(), StoreError> {
        let store = Arc::clone(&self.store);
        let keys = self.keys;
        let mut spills = self.state.spills;
        let generation = self.repair.generation;
        let loaded = self.loaded(hash)?;
        let Loaded { entity, record, .. } = loaded;
        if entity.headers().is_empty() {
            let key = entity.key().clone();
            let record = record.clone();
            return self.remove(batch, hash, &key, &record);
        }
        let before = record.headers;
        let after = entity.headers().len() as u32;
        let outdated = std::mem::replace(&mut record.generation, generation) != generation;
        let first_new = if rewritten || outdated { 0 } else { before };
        for place in (first_new..after).chain(admitted.iter().copied().filter(|place| *place < first_new)) {
            if let Some(header) = entity.headers().get(place) {
                batch.put(
                    Keyspace::HEADER,
                    keys.header(hash, place),
                    codec::encode(&HeaderRecord::from(header)),
                );
            }
        }
        for place in after..before {
            batch.delete(Keyspace::HEADER, keys.header(hash, place));
        }
        if rewritten || !changes.is_empty() {
            let bytes: u64 = changes.iter().map(|change| change.bytes().len() as u64).sum();
            let appended = record.increments.iter().sum::<u64>() + bytes;
            let small = record.snapshot_bytes + appended < FOLD_BELOW_BYTES;
            let full = appended > FOLD_INCREMENTS_FACTOR * record.snapshot_bytes
                || record.increments.len() >= INCREMENTS_MAX;
            // What cannot be loaded again must not replace what can.
            let proved = entity.is_proved() || (proved && small);
            let snapshot = match (rewritten || small || full, proved && !rewritten) {
                (false, _) => None,
                (true, true) => Some(entity.save()),
                (true, false) => match entity.save_proved() {
                    Ok(snapshot) => Some(snapshot),
                    Err(error) if rewritten => return Err(StoreError::Damaged { what: error.to_string() }),
                    Err(error) => {
                        tracing::warn!(%error, "a snapshot failed its proof: the last good one is kept");
                        None
                    }
                },
            };
            match snapshot {
                Some(snapshot) => {
                    for number in 0..record.increments.len() as u32 {
                        keys.delete(&*store, batch, Keyspace::DOC, keys.increment(hash, number))?;
                    }
                    record.increments.clear();
                    record.snapshot_bytes = snapshot.len() as u64;
                    keys.put(&*store, batch, &mut spills, Keyspace::DOC, keys.snapshot(hash), &snapshot)?;
                }
                None => append(&keys, &*store, batch, &mut spills, hash, record, changes)?,
            }
        }
        record.actors = entity
            .headers()
            .actors()
            .iter()
            .map(|entry| (entry.actor.to_bytes().to_vec(), entry.author.to_bytes()))
            .collect();
        record.containers = entity.named_containers();
        record.headers = after;
        let heads = entity.headers().admitted_heads();
        let heads_before: Vec<ChangeHash> =
            record.admitted_heads.iter().map(|head| ChangeHash(*head)).collect();
        record.admitted_heads = heads.iter().map(|head| head.0).collect();
        self.state.spills = spills;
        self.account(hash, &heads_before, &heads);
        self.note_lacking(batch, hash);
        self.materialise(batch, hash)
    }

    /// Removes an entity that no change is left of.
    fn remove(
        &mut self,
        batch: &mut Batch,
        hash: EntityHash,
        key: &EntityKey,
        record: &EntityRecord,
    ) -> Result<(), StoreError> {
        let store = Arc::clone(&self.store);
        for place in 0..record.headers {
            batch.delete(Keyspace::HEADER, self.keys.header(hash, place));
        }
        self.keys.delete(&*store, batch, Keyspace::DOC, self.keys.snapshot(hash))?;
        for number in 0..record.increments.len() as u32 {
            self.keys.delete(&*store, batch, Keyspace::DOC, self.keys.increment(hash, number))?;
        }
        let heads: Vec<ChangeHash> = record.admitted_heads.iter().map(|head| ChangeHash(*head)).collect();
        self.account(hash, &heads, &[]);
        if record.rebuilds > 0 {
            // The count must outlive the entity: its next life is another incarnation.
            let stub = EntityRecord {
                type_name: record.type_name.clone(),
                id: record.id.clone(),
                rebuilds: record.rebuilds,
                ..EntityRecord::default()
            };
            self.put_entity(batch, hash, &stub)?;
        } else {
            self.keys.delete_entity(&*store, batch, hash)?;
        }
        if self.lacking.remove(&hash) {
            batch.delete(Keyspace::META, self.keys.lacking(hash));
        }
        self.put_row(batch, key, None)?;
        self.put_conflicts(batch, key, &[])?;
        self.cache.remove(&hash);
        Ok(())
    }

    /// Writes an entity's record, row, index entries and conflicts.
    fn materialise(&mut self, batch: &mut Batch, hash: EntityHash) -> Result<(), StoreError> {
        let loaded = self.loaded(hash)?;
        let record = loaded.record.clone();
        let key = loaded.entity.key().clone();
        self.put_entity(batch, hash, &record)?;
        let Some(ty) = self.config.schema.types.get(key.type_name()) else {
            // A type of a newer schema: kept, not shown.
            return Ok(());
        };
        let Some(Loaded { entity, record, .. }) = self.cache.get(&hash) else { return Ok(()) };
        let (row, conflicts) = self.presented(ty, &key, hash, entity, record);
        self.put_row(batch, &key, Some(&row))?;
        self.put_conflicts(batch, &key, &conflicts)
    }

    fn put_entity(
        &mut self,
        batch: &mut Batch,
        hash: EntityHash,
        record: &EntityRecord,
    ) -> Result<(), StoreError> {
        let mut spills = self.state.spills;
        self.keys.put_entity(&*self.store, batch, &mut spills, hash, record)?;
        self.state.spills = spills;
        Ok(())
    }

    /// What people see of an entity: its row and what waits for them.
    fn presented(
        &self,
        ty: &EntityType,
        key: &EntityKey,
        hash: EntityHash,
        entity: &Entity,
        record: &EntityRecord,
    ) -> (RowRecord, Vec<ConflictRecord>) {
        let shown = entity.row(ty);
        let first = entity.headers().headers().first();
        let last = entity.headers().headers().iter().max_by_key(|header| header.time);
        let status = if self.refused.contains_key(key) {
            reached!(StatusFailed);
            SyncStatus::Failed
        } else if !shown.conflicts.is_empty() {
            reached!(StatusConflict);
            SyncStatus::Conflict
        } else if !self.pending.contains_key(&hash) {
            reached!(StatusSynced);
            SyncStatus::Synced
        } else if shown.deleted {
            reached!(StatusPendingDelete);
            SyncStatus::PendingDelete
        } else if record.admitted_heads.is_empty() {
            reached!(StatusPendingCreate);
            SyncStatus::PendingCreate
        } else {
            reached!(StatusPendingUpdate);
            SyncStatus::PendingUpdate
        };
        let row = RowRecord {
            version: version_token(&entity.heads()),
            status,
            deleted: shown.deleted,
            created_ms: first.map_or(0, |header| header.time.wall().0),
            updated_ms: last.map_or(0, |header| header.time.wall().0),
            updated_by: last.map(|header| entity.headers().device(header).to_string()).unwrap_or_default(),
            fields: shown.fields,
        };
        let conflicts = shown
            .conflicts
            .into_iter()
            .map(|conflict| ConflictRecord {
                field: conflict.field,
                kind: conflict.kind.name().to_owned(),
                sides: conflict
                    .sides
                    .into_iter()
                    .map(|side| SideRecord {
                        device: side.device.0,
                        others: side.others.into_iter().map(|device| device.0).collect(),
                        value: side.value,
                        time_ms: side.time.wall().0,
                    })
                    .collect(),
                base: conflict.base,
            })
            .collect();
        (row, conflicts)
    }

    fn put_row(
        &mut self,
        batch: &mut Batch,
        key: &EntityKey,
        row: Option<&RowRecord>,
    ) -> Result<(), StoreError> {
        let store = Arc::clone(&self.store);
        let place = self.keys.row(key);
        let ty = self.config.schema.types.get(key.type_name()).cloned();
        if let Some(ty) = ty.filter(|ty| !ty.indexes.is_empty()) {
            let old = match self.reindexing {
                false => self.keys.get(&*store, View::Latest, Keyspace::ROW, &place)?,
                true => None,
            };
            // Of one that can't be read old entries stay: whoever looks something up compares the row.
            let old: Option<RowRecord> = old.and_then(|bytes| from_json(&bytes, "a row").ok());
            let before = old.map(|old| index_keys(&self.keys, &ty, key, &old)).unwrap_or_default();
            let after = row.map(|row| index_keys(&self.keys, &ty, key, row)).unwrap_or_default();
            for gone in before.iter().filter(|entry| !after.contains(entry)) {
                batch.delete(Keyspace::INDEX, gone.clone());
            }
            for come in after.into_iter().filter(|entry| !before.contains(entry)) {
                batch.put(Keyspace::INDEX, come, key.id().as_bytes());
            }
        }
        match row {
            Some(row) => {
                let mut spills = self.state.spills;
                self.keys.put(&*store, batch, &mut spills, Keyspace::ROW, place, &to_json(row))?;
                self.state.spills = spills;
                Ok(())
            }
            None => self.keys.delete(&*store, batch, Keyspace::ROW, place),
        }
    }

    fn put_conflicts(
        &mut self,
        batch: &mut Batch,
        key: &EntityKey,
        conflicts: &[ConflictRecord],
    ) -> Result<(), StoreError> {
        let store = Arc::clone(&self.store);
        let place = self.keys.row(key);
        let had = store.get(View::Latest, Keyspace::CONFLICT, &place)?.is_some();
        if conflicts.is_empty() {
            if had {
                self.keys.delete(&*store, batch, Keyspace::CONFLICT, place)?;
                self.conflicts = self.conflicts.saturating_sub(1);
            }
        } else {
            let mut spills = self.state.spills;
            self.keys.put(&*store, batch, &mut spills, Keyspace::CONFLICT, place, &to_json(&conflicts))?;
            self.state.spills = spills;
            if !had {
                self.conflicts += 1;
            }
        }
        Ok(())
    }

    fn put_outbox(
        &mut self,
        batch: &mut Batch,
        number: u64,
        record: &OutboxRecord,
    ) -> Result<(), StoreError> {
        let store = Arc::clone(&self.store);
        let mut spills = self.state.spills;
        let place = self.keys.number(number);
        self.keys.put(&*store, batch, &mut spills, Keyspace::OUTBOX, place, &to_json(record))?;
        self.state.spills = spills;
        self.unwritten.insert(number, record.clone());
        Ok(())
    }

    fn read_outbox(&self, number: u64) -> Result<OutboxRecord, StoreError> {
        if let Some(record) = self.unwritten.get(&number) {
            return Ok(record.clone());
        }
        let bytes = self.keys.get(&*self.store, View::Latest, Keyspace::OUTBOX, &self.keys.number(number))?;
        let bytes = bytes
            .ok_or_else(|| StoreError::Damaged { what: format!("pending change {number} is missing") })?;
        from_json(&bytes, "a pending change")
    }

    fn delete_outbox(&mut self, batch: &mut Batch, number: u64) -> Result<Option<PendingRef>, StoreError> {
        let store = Arc::clone(&self.store);
        self.keys.delete(&*store, batch, Keyspace::OUTBOX, self.keys.number(number))?;
        self.unwritten.remove(&number);
        Ok(self.untrack(number))
    }

    /// Tells the user of a refused edit, by its code and message and what it meant; of none that is lost is that
    /// known. It is taken back should `edit` come back.
    fn put_refused(
        &mut self,
        batch: &mut Batch,
        now: Now,
        key: &EntityKey,
        (code, message): (String, String),
        intents: Vec<Intent>,
        edit: Option<Origin>,
    ) -> Result<(), StoreError> {
        let record = RefusedRecord {
            type_name: key.type_name().to_owned(),
            id: key.id().to_owned(),
            code,
            message,
            intents,
            time_ms: self.corrected(now).0,
            edit: edit.map(|edit| edit.0),
        };
        let store = Arc::clone(&self.store);
        let number = self.state.refused_next;
        self.state.refused_next += 1;
        let mut spills = self.state.spills;
        let place = self.keys.number(number);
        self.keys.put(&*store, batch, &mut spills, Keyspace::REFUSED, place, &to_json(&record))?;
        self.state.spills = spills;
        self.track_refused(key.clone(), number, edit);
        Ok(())
    }

    fn track_refused(&mut self, key: EntityKey, number: u64, edit: Option<Origin>) {
        if let Some(edit) = edit {
            self.lost.entry(key.clone()).or_default().insert(number, edit);
        }
        *self.refused.entry(key).or_default() += 1;
    }

    /// Takes back what was told of edits of this device that have come back, by whatever names.
    fn withdraw_refused(
        &mut self,
        batch: &mut Batch,
        key: &EntityKey,
        edits: &BTreeSet<Origin>,
    ) -> Result<(), StoreError> {
        let Some(lost) = self.lost.get(key) else { return Ok(()) };
        let back = lost.iter().filter(|(_, edit)| edits.contains(edit));
        let numbers: Vec<u64> = back.map(|(number, _)| *number).collect();
        for number in numbers {
            self.delete_refused(batch, number, key)?;
        }
        Ok(())
    }

    fn delete_refused(&mut self, batch: &mut Batch, number: u64, key: &EntityKey) -> Result<(), StoreError> {
        let store = Arc::clone(&self.store);
        self.keys.delete(&*store, batch, Keyspace::REFUSED, self.keys.number(number))?;
        if let Some(lost) = self.lost.get_mut(key) {
            lost.remove(&number);
            if lost.is_empty() {
                self.lost.remove(key);
            }
        }
        if let Some(count) = self.refused.get_mut(key) {
            *count -= 1;
            if *count == 0 {
                self.refused.remove(key);
            }
        }
        Ok(())
    }

    /// Forgets a refused change that the app has dealt with. `false` where there is none.
    pub fn dismiss(&mut self, number: u64) -> Result<bool, StoreError> {
        let store = Arc::clone(&self.store);
        let place = self.keys.number(number);
        let Some(bytes) = self.keys.get(&*store, View::Latest, Keyspace::REFUSED, &place)? else {
            return Ok(false);
        };
        let record: RefusedRecord = from_json(&bytes, "a refused change")?;
        let mut batch = Batch::new();
        let Ok(key) = EntityKey::new(record.type_name, record.id) else {
            self.keys.delete(&*store, &mut batch, Keyspace::REFUSED, place)?;
            self.commit(batch)?;
            return Ok(true);
        };
        let loaded = match self.load(&key) {
            // There is no row to be made of it.
            Err(StoreError::Damaged { .. }) => None,
            loaded => Some(loaded?),
        };
        self.delete_refused(&mut batch, number, &key)?;
        if let Some(hash) = loaded
            && !self.loaded(hash)?.entity.headers().is_empty()
        {
            self.materialise(&mut batch, hash)?;
        }
        let after = self.commit(batch)?;
        self.outputs.push_back(Output::Changed { after, entities: vec![key] });
        self.outputs.push_back(Output::Status);
        Ok(true)
    }
}

/// Appends changes as an increment, merged with earlier ones that are not much larger: their
/// number stays logarithmic, and each byte is rewritten a logarithmic number of times.
fn append(
    keys: &Keys,
    store: &dyn Store,
    batch: &mut Batch,
    spills: &mut u64,
    hash: EntityHash,
    record: &mut EntityRecord,
    changes: &[Change],
) -> Result<(), StoreError> {
    let mut bytes = join_increment(changes);
    while let Some(last) = record.increments.last()
        && *last <= 2 * bytes.len() as u64
    {
        let place = keys.increment(hash, record.increments.len() as u32 - 1);
        let earlier = keys.get(store, View::Latest, Keyspace::DOC, &place)?;
        let mut merged = earlier
            .ok_or_else(|| StoreError::Damaged { what: "an increment of a document is missing".into() })?;
        merged.extend_from_slice(&bytes);
        bytes = merged;
        keys.delete(store, batch, Keyspace::DOC, place)?;
        record.increments.pop();
    }
    let place = keys.increment(hash, record.increments.len() as u32);
    keys.put(store, batch, spills, Keyspace::DOC, place, &bytes)?;
    record.increments.push(bytes.len() as u64);
    Ok(())
}

/// Changes, each behind its length.
fn join_increment(changes: &[Change]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for change in changes {
        bytes.extend_from_slice(&(change.bytes().len() as u32).to_be_bytes());
        bytes.extend_from_slice(change.bytes());
    }
    bytes
}

fn split_increment(mut bytes: &[u8]) -> Option<Vec<Vec<u8>>> {
    let mut changes = Vec::new();
    while !bytes.is_empty() {
        let (length, rest) = bytes.split_first_chunk::<4>()?;
        let (change, rest) = rest.split_at_checked(u32::from_be_bytes(*length) as usize)?;
        changes.push(change.to_vec());
        bytes = rest;
    }
    Some(changes)
}

/// Visits every entry under a prefix.
fn for_each(
    store: &dyn Store,
    keyspace: Keyspace,
    prefix: &[u8],
    mut visit: impl FnMut(&[u8], &[u8]) -> Result<(), StoreError>,
) -> Result<(), StoreError> {
    const PAGE: usize = 512;
    let mut from = Vec::new();
    loop {
        let page = store.scan(View::Latest, keyspace, prefix, &from, PAGE)?;
        for (key, value) in &page {
            visit(key, value)?;
        }
        match page.last() {
            Some((key, _)) if page.len() == PAGE => from = [&key[..], &[0]].concat(),
            _ => return Ok(()),
        }
    }
}

/// The token that stands for a version of an entity: its heads.
pub fn version_token(heads: &[ChangeHash]) -> String {
    use base64::Engine as _;
    let parts: Vec<String> =
        heads.iter().map(|head| base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(head.0)).collect();
    parts.join(".")
}

/// Reads a version token; `None` if it is none.
pub fn parse_version(token: &str) -> Option<Vec<ChangeHash>> {
    use base64::Engine as _;
    token
        .split('.')
        .map(|part| {
            let bytes = base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(part).ok()?;
            Some(ChangeHash(bytes.try_into().ok()?))
        })
        .collect()
}

impl From<LoadError> for StoreError {
    fn from(error: LoadError) -> Self {
        StoreError::Damaged { what: error.to_string() }
    }
}
