//! A relay that went back: noticed, and repaired from what this device holds.
//!
//! A relay that was restored from an older copy, or replaced by an empty one, shows by a new epoch
//! of its feed, by a feed that ends before this device's cursor, or by another digest at the same
//! cursor. Then a new *generation* begins: nothing counts as admitted any more, and the feed is
//! read from its start, which says what the relay still has. What it has not is put into the outbox
//! as it is, same bytes and same hash: a device brings what it wrote itself; an authority or admin
//! brings what anyone wrote, as the relay takes their word for it. What neither can bring is counted
//! until whoever wrote it has been there.
//!
//! Every step is durable before the next relies on it. If one is cut short, it is done again: the
//! feed goes on from the cursor, and what the outbox has already is not put there twice.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};

use automerge::ChangeHash;

use super::apply::Touched;
use super::layout::{EntityRecord, OutboxRecord};
use super::{Output, PendingRef, Replica, for_each};
use crate::admission::{RefusalCode, Vouches};
use crate::change::{Change, Origin, Role};
use crate::clock::{Hlc, Now};
use crate::codec::{self, HeaderRecord};
use crate::header::Header;
use crate::id::{Author, DeviceId, EntityHash, EntityKey};
use crate::store::{Batch, CommitNo, Keyspace, StoreError, View};
use crate::wire::{GrantRole, Refused};

/// Entities read from the store at once.
const PAGE: usize = 256;
/// Most schemas of the relay that are remembered.
const SCHEMAS_MAX: usize = 256;
/// Changes that are put into the outbox in one batch, unless a transaction has more.
const BATCH_CHANGES: usize = 512;

/// A change that the relay lacks.
#[derive(Debug)]
struct Missing {
    entity: EntityHash,
    /// Among the entity's headers.
    place: u32,
    /// Who wrote it.
    device: Option<DeviceId>,
    header: Header,
}

impl Missing {
    /// Its transaction. Anyone can write the id of another's, so it means nothing without its author.
    fn transaction(&self) -> Option<(Option<DeviceId>, [u8; 16])> {
        Some((self.device, self.header.tx?.id))
    }
}

/// What a look through the headers finds.
#[derive(Debug, Default)]
struct Found {
    /// What the relay lacks and this device may bring.
    missing: Vec<Missing>,
    /// Entities of which it lacks more.
    lacking: BTreeSet<EntityHash>,
    /// Entities of which it has some of a device and lacks some: one edit may be among both.
    mixed: BTreeSet<EntityHash>,
}

/// What is read of an entity of which the relay lacks something.
#[derive(Debug)]
struct Lacked {
    key: EntityKey,
    /// Bytes and edit of each change that is missing.
    changes: BTreeMap<ChangeHash, (usize, Origin)>,
    /// Edits that wait to be offered again already, by who wrote them.
    offered: BTreeSet<(Option<DeviceId>, Origin)>,
}

/// What must be offered together: the members of a transaction, or one change.
#[derive(Debug, Default)]
struct Parcel {
    members: Vec<usize>,
    time: Hlc,
    /// How many parcels must go before this.
    waits_for: usize,
    /// Who waits for this.
    before: Vec<usize>,
}

impl Replica {
    /// From now on nothing counts as admitted but what the feed of `epoch` brings from its start.
    /// The caller commits.
    pub(super) fn begin_repair(&mut self, epoch: [u8; 16]) {
        tracing::warn!("the relay went back: finding out what it lacks");
        self.channel.repaired = true;
        self.channel.rereads = true;
        self.repair.generation += 1;
        self.repair.reading = true;
        self.repair.waits_for_schema = self.repair.schema != [0; 32];
        self.state.epoch = epoch;
        self.state.cursor = 0;
        self.state.digest = [0; 32];
        // Entities learn of their generation when they are loaded.
        self.cache.clear();
        // A look at everything begins anew with the digest.
        self.scrub = None;
    }

    pub(super) fn is_offered_again(&self, number: u64) -> bool {
        self.outbox.get(&number).is_some_and(|pending| pending.again)
    }

    /// Whether a change waits to be offered again.
    pub(super) fn offers_again(&self, hash: EntityHash, change: &ChangeHash) -> bool {
        self.number_again(hash, change).is_some()
    }

    pub(super) fn is_pending(&self, hash: EntityHash, change: &ChangeHash) -> bool {
        self.pending_number(hash, change).is_some()
    }

    fn number_again(&self, hash: EntityHash, change: &ChangeHash) -> Option<u64> {
        let number = self.pending_number(hash, change);
        number.filter(|number| self.is_offered_again(*number))
    }

    pub(super) fn pending_number(&self, hash: EntityHash, change: &ChangeHash) -> Option<u64> {
        let is_it = |number: &&u64| self.outbox.get(number).is_some_and(|pending| pending.hash == *change);
        self.pending.get(&hash)?.iter().find(is_it).copied()
    }

    /// Deals with the answer that a change which was offered again is refused, where that is not for good. What
    /// is for good the feed tells, whatever the answer.
    pub(super) fn refused_again(
        &mut self,
        batch: &mut Batch,
        hash: EntityHash,
        refusal: &Refused,
        touched: &mut BTreeMap<EntityHash, Touched>,
    ) -> Result<bool, StoreError> {
        let change = ChangeHash(refusal.hash);
        let Some(number) = self.number_again(hash, &change) else { return Ok(false) };
        if refusal.code == RefusalCode::Superseded as u16 && self.is_here_again(hash, &change)? {
            return Ok(false);
        }
        match RefusalCode::from_u16(refusal.code) {
            // Who has what it builds on, or the schema that it was written by, may bring that yet; a clock may be
            // set right; the same edit by another name comes by the feed.
            Some(
                RefusalCode::MissingDependency
                | RefusalCode::ClockAhead
                | RefusalCode::UnknownField
                | RefusalCode::Superseded,
            ) => {
                self.channel.stalled.insert(hash);
                touched.entry(hash).or_default();
            }
            // Its operations are numbered after some that the relay may not have yet. Those that came beside it
            // count from now on.
            Some(RefusalCode::BadSequence) => {
                self.channel.stalled.insert(hash);
                if touched.entry(hash).or_default().has_admitted() {
                    self.channel.overtaken.insert(hash);
                }
            }
            // This device lost the right to speak for it, and for what goes with it, or to write at all. Others
            // may have it.
            Some(RefusalCode::ForgedAuthor | RefusalCode::ForgedRole | RefusalCode::Forbidden) => {
                let beside =
                    self.beside(number).filter(|(_, pending)| pending.again).map(|(number, _)| *number);
                let gone: BTreeSet<u64> = beside.chain([number]).collect();
                for number in gone {
                    let Some(pending) = self.delete_outbox(batch, number)? else { continue };
                    self.load(&pending.key)?;
                    self.lacking.insert(pending.entity);
                    batch.put(Keyspace::META, self.keys.lacking(pending.entity), []);
                    touched.entry(pending.entity).or_default();
                }
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Whether the edit of a change is here, admitted, as another one: it came while nobody knew that the relay had
    /// gone back.
    fn is_here_again(&mut self, hash: EntityHash, change: &ChangeHash) -> Result<bool, StoreError> {
        let entity = &self.loaded(hash)?.entity;
        let headers = entity.headers();
        let Some(device) = headers.by_hash(change).map(|header| headers.device(header)) else {
            return Ok(false);
        };
        let of_device = headers.headers().iter().filter(|header| headers.device(header) == device);
        let admitted = of_device.filter(|header| header.admitted).map(|header| header.hash).collect();
        let edit = entity.changes(&BTreeSet::from([*change])).first().map(Change::origin);
        Ok(entity.changes(&admitted).iter().any(|other| Some(other.origin()) == edit))
    }

    /// The relay has more of an entity: what waited for that is tried again, with what travels
    /// with it.
    pub(super) fn unstall(&mut self, hash: EntityHash) {
        let mut open = vec![hash];
        while let Some(next) = open.pop() {
            if self.channel.stalled.remove(&next) {
                let numbers = self.pending.get(&next).into_iter().flatten();
                open.extend(numbers.flat_map(|number| self.members(*number)));
            }
        }
    }

    /// Sees whether the relay still lacks something of an entity that others have to bring.
    pub(super) fn note_lacking(&mut self, batch: &mut Batch, hash: EntityHash) {
        if !self.lacking.contains(&hash) || self.repair.reading {
            return;
        }
        let pending = self.pending_of(hash);
        let lacks = |header: &Header| !header.admitted && !pending.contains(&header.hash);
        let lacks =
            self.cache.get(&hash).is_some_and(|loaded| loaded.entity.headers().headers().iter().any(lacks));
        if !lacks {
            self.lacking.remove(&hash);
            batch.delete(Keyspace::META, self.keys.lacking(hash));
        }
    }

    pub(super) fn pending_of(&self, hash: EntityHash) -> BTreeSet<ChangeHash> {
        let numbers = self.pending.get(&hash).into_iter().flatten();
        numbers.filter_map(|number| self.outbox.get(number)).map(|pending| pending.hash).collect()
    }

    fn vouches(&self) -> Option<Vouches> {
        match self.role() {
            GrantRole::Reader => None,
            GrantRole::Writer => Some(Vouches::Own),
            GrantRole::Admin => Some(Vouches::Devices),
            GrantRole::Authority => Some(Vouches::Anyone),
        }
    }

    /// The whole feed was read: what the relay lacks goes into the outbox.
    pub(super) fn offer_again(&mut self, now: Now) -> Result<(), StoreError> {
        let mut found = self.find_missing()?;
        if self.take_out_twins(now, &found.mixed)? {
            found = self.find_missing()?;
        }
        tracing::warn!(
            changes = found.missing.len(),
            entities_lacking = found.lacking.len(),
            "offering the relay what it has lost"
        );
        let (batch, numbers) = self.offer(found)?;
        self.repair.reading = false;
        self.look_at_schema();
        self.commit_again(batch, numbers)
    }

    /// What others had to bring this device may bring itself by now: once in a session.
    pub(super) fn offer_lacking(&mut self) -> Result<(), StoreError> {
        if self.lacking.is_empty()
            || self.vouches().is_none()
            || std::mem::replace(&mut self.channel.looked, true)
        {
            return Ok(());
        }
        let mut found = Found::default();
        for entity in &self.lacking {
            let Some(bytes) = self.store.get(View::Latest, Keyspace::ENTITY, &self.keys.entity(*entity))?
            else {
                continue;
            };
            let record = self.keys.entity_record(&*self.store, &bytes)?;
            self.find_missing_of(record, &mut found)?;
        }
        let (batch, numbers) = self.offer(found)?;
        self.commit_again(batch, numbers)
    }

    /// Takes out of entities what the relay has as another change. Whether there was any.
    fn take_out_twins(&mut self, now: Now, entities: &BTreeSet<EntityHash>) -> Result<bool, StoreError> {
        let mut any = false;
        for hash in entities {
            match self.load(&self.key_of(*hash)?) {
                Ok(_) => {}
                // Others bring it once it is mended.
                Err(StoreError::Damaged { .. }) => continue,
                Err(error) => return Err(error),
            }
            let (mut batch, mut touched) = (Batch::new(), BTreeMap::new());
            self.displace_twins(&mut batch, now, *hash, &mut touched)?;
            if !touched.is_empty() {
                any = true;
                self.finish(batch, now, touched)?;
            }
            self.trim_cache();
        }
        Ok(any)
    }

    /// Puts into the outbox what the relay lacks, and writes down of what others have to bring it. Returns the last
    /// batch, with its numbers in the outbox.
    fn offer(&mut self, found: Found) -> Result<(Batch, Vec<u64>), StoreError> {
        let Found { mut missing, mut lacking, .. } = found;
        let mut lacked = self.read_lacked(&missing)?;
        // Of an edit that is here by two names the older is offered, on which more may have been built. What is of a
        // damaged document is for others to bring.
        missing.retain(|change| {
            let offered = lacked.get_mut(&change.entity).is_some_and(|entity| {
                let edit = entity.changes.get(&change.header.hash).map(|(_, edit)| (change.device, *edit));
                edit.is_some_and(|edit| entity.offered.insert(edit))
            });
            if !offered {
                lacking.insert(change.entity);
            }
            offered
        });
        self.leave_torn_transactions(&mut missing, &mut lacking);
        // What builds on that may have been told to wait for it, or be so soon.
        for entity in missing.iter().map(|missing| missing.entity).collect::<BTreeSet<_>>() {
            self.unstall(entity);
            if self.channel.busy.contains(&entity) {
                self.channel.overtaken.insert(entity);
            }
        }
        let parcels = in_order(&missing);
        let mut batch = Batch::new();
        let mut numbers = Vec::new();
        for parcel in parcels {
            for missing in parcel.iter().filter_map(|place| missing.get(*place)) {
                numbers.push(self.queue_again(&mut batch, missing, &lacked)?);
            }
            if numbers.len() >= BATCH_CHANGES {
                self.commit_again(std::mem::take(&mut batch), std::mem::take(&mut numbers))?;
            }
        }
        for gone in self.lacking.difference(&lacking) {
            batch.delete(Keyspace::META, self.keys.lacking(*gone));
        }
        for come in lacking.difference(&self.lacking) {
            batch.put(Keyspace::META, self.keys.lacking(*come), []);
        }
        self.lacking = lacking;
        Ok((batch, numbers))
    }

    /// Whether the relay lost the schema too. Who may push it does, if it is the one that was lost.
    pub(super) fn look_at_schema(&mut self) {
        let lost = self.repair.schema;
        self.end_wait_for_schema();
        let manages = matches!(self.role(), GrantRole::Admin | GrantRole::Authority);
        if self.repair.waits_for_schema && manages && self.config.schema.hash() == lost {
            self.exchange_schema(true);
        }
    }

    /// Ends the wait for a schema that the relay lost, unless the one that it has is an older one.
    fn end_wait_for_schema(&mut self) {
        let has = self.channel.relay_schema.unwrap_or_default();
        // Where the relay has none at all, it says so of each change, and takes none.
        self.repair.waits_for_schema &= has != [0; 32] && self.is_older(has, self.repair.schema);
        if !self.repair.waits_for_schema && has != [0; 32] {
            self.repair.schema = has;
        }
    }

    /// Whether the relay had a schema before it had another.
    fn is_older(&self, schema: [u8; 32], than: [u8; 32]) -> bool {
        let place = |hash| self.schemas.iter().position(|known| *known == hash);
        match (place(schema), place(than)) {
            (Some(schema), Some(than)) => schema < than,
            (known, _) => known.is_some(),
        }
    }

    /// Writes down that the feed tells of a schema. One that a relay still has after it went back keeps its place
    /// among the others; one that it gets again is its newest.
    pub(super) fn note_schema(&mut self, hash: [u8; 32]) {
        let known = self.schemas.contains(&hash);
        if hash == [0; 32] || self.schemas.last() == Some(&hash) || (known && self.repair.reading) {
            return;
        }
        self.schemas.retain(|known| *known != hash);
        self.schemas.push(hash);
        let surplus = self.schemas.len().saturating_sub(SCHEMAS_MAX);
        self.schemas.drain(..surplus);
        self.schemas_changed = true;
    }

    fn find_missing(&self) -> Result<Found, StoreError> {
        let mut found = Found::default();
        let prefix = self.keys.prefix();
        let mut from = Vec::new();
        loop {
            let page = self.store.scan(View::Latest, Keyspace::ENTITY, &prefix, &from, PAGE)?;
            for (_, bytes) in &page {
                let record = self.keys.entity_record(&*self.store, bytes)?;
                if record.headers > 0 {
                    self.find_missing_of(record, &mut found)?;
                }
            }
            match page.last() {
                Some((key, _)) if page.len() == PAGE => from = [&key[..], &[0]].concat(),
                _ => return Ok(found),
            }
        }
    }

    fn find_missing_of(&self, record: EntityRecord, found: &mut Found) -> Result<(), StoreError> {
        let known_type = self.ty(&record.type_name).is_some();
        let Ok(key) = EntityKey::new(record.type_name, record.id) else { return Ok(()) };
        let hash = self.hash(&key);
        let pending = self.pending_of(hash);
        let current = record.generation == self.repair.generation;
        let vouches = self.vouches().filter(|_| known_type);
        let before = found.missing.len();
        let (mut has, mut lacks) = (BTreeSet::new(), BTreeSet::new());
        let mut places = 0..;
        let read = for_each(&*self.store, Keyspace::HEADER, &self.keys.headers(hash), |_, bytes| {
            let header = Header::from(codec::decode::<HeaderRecord>(bytes, "a header")?);
            let place = places.next().unwrap_or_default();
            let author = record.actors.get(header.actor as usize);
            let device =
                author.and_then(|(_, author)| Author::from_bytes(author)).map(|author| author.device);
            if current && header.admitted {
                has.insert(device);
                return Ok(());
            }
            if pending.contains(&header.hash) {
                return Ok(());
            }
            lacks.insert(device);
            let own = device == Some(self.config.device);
            let may = match vouches {
                None => false,
                Some(Vouches::Anyone) => true,
                Some(Vouches::Devices) => header.role == Role::Device,
                Some(Vouches::Own) => own && header.role == Role::Device,
            };
            if may {
                found.missing.push(Missing { entity: hash, place, device, header });
            } else {
                found.lacking.insert(hash);
            }
            Ok(())
        });
        if !has.is_disjoint(&lacks) {
            found.mixed.insert(hash);
        }
        match read {
            Err(StoreError::Damaged { what }) => {
                tracing::error!(entity = %key, %what, "it can't be offered to the relay");
                found.missing.truncate(before);
                found.lacking.insert(hash);
                Ok(())
            }
            read => read,
        }
    }

    /// Leaves out transactions that are not here whole: the relay takes no part of one.
    fn leave_torn_transactions(&self, missing: &mut Vec<Missing>, lacking: &mut BTreeSet<EntityHash>) {
        let mut members: BTreeMap<_, BTreeSet<EntityHash>> = BTreeMap::new();
        for (change, tx) in missing.iter().filter_map(|change| Some((change, change.transaction()?))) {
            members.entry(tx).or_default().insert(change.entity);
        }
        missing.retain(|change| {
            let found = change.transaction().and_then(|tx| members.get(&tx)).map(BTreeSet::len);
            let whole = change.header.tx.is_none_or(|tx| found == Some(tx.members as usize));
            if !whole {
                lacking.insert(change.entity);
            }
            whole
        });
    }

    /// Reads the entities that changes are missing of, as far as their documents can be read.
    fn read_lacked(&mut self, missing: &[Missing]) -> Result<BTreeMap<EntityHash, Lacked>, StoreError> {
        let mut lacked = BTreeMap::new();
        // Found entity by entity, as a document writes out many changes as fast as one.
        for stretch in missing.chunk_by(|a, b| a.entity == b.entity) {
            let Some(Missing { entity: hash, .. }) = stretch.first() else { continue };
            let key = self.key_of(*hash)?;
            match self.load(&key) {
                Ok(_) => {}
                Err(StoreError::Damaged { what }) => {
                    tracing::error!(entity = %key, %what, "it can't be offered to the relay");
                    continue;
                }
                Err(error) => return Err(error),
            }
            let pending = self.pending_of(*hash);
            let entity = &self.loaded(*hash)?.entity;
            let wanted = stretch.iter().map(|missing| missing.header.hash).collect();
            let changes = entity.changes(&wanted);
            let changes =
                changes.iter().map(|change| (change.hash(), (change.weight(), change.origin()))).collect();
            let device = |change: &Change| {
                entity.headers().by_hash(&change.hash()).map(|header| entity.headers().device(header))
            };
            let offered = entity.changes(&pending);
            let offered = offered.iter().map(|change| (device(change), change.origin())).collect();
            lacked.insert(*hash, Lacked { key, changes, offered });
            self.trim_cache();
        }
        Ok(lacked)
    }

    /// Changes that wait to be offered again, each after what it builds on: what this device might not bring before
    /// may have a higher number than what builds on that.
    pub(super) fn again_in_order(&self, numbers: &[u64]) -> Result<Vec<u64>, StoreError> {
        let mut wanted: BTreeMap<EntityHash, BTreeMap<ChangeHash, u64>> = BTreeMap::new();
        for (number, pending) in numbers.iter().filter_map(|number| Some((*number, self.outbox.get(number)?)))
        {
            wanted.entry(pending.entity).or_default().insert(pending.hash, number);
        }
        let (mut missing, mut found) = (Vec::new(), Vec::new());
        for (entity, changes) in wanted {
            let mut places = 0..;
            for_each(&*self.store, Keyspace::HEADER, &self.keys.headers(entity), |_, bytes| {
                let header = Header::from(codec::decode::<HeaderRecord>(bytes, "a header")?);
                let place = places.next().unwrap_or_default();
                if let Some(number) = changes.get(&header.hash) {
                    let tx = self.outbox.get(number).and_then(|pending| pending.tx);
                    let device = tx.and_then(|tx| tx.author).map(DeviceId);
                    missing.push(Missing { entity, place, device, header });
                    found.push(*number);
                }
                Ok(())
            })?;
        }
        Ok(in_order(&missing).into_iter().flatten().filter_map(|place| found.get(place).copied()).collect())
    }

    /// Puts a change into the outbox as it is. It is sent once the batch is durable.
    fn queue_again(
        &mut self,
        batch: &mut Batch,
        missing: &Missing,
        lacked: &BTreeMap<EntityHash, Lacked>,
    ) -> Result<u64, StoreError> {
        let Missing { entity: hash, header, .. } = missing;
        let change = lacked
            .get(hash)
            .and_then(|entity| Some((entity.key.clone(), entity.changes.get(&header.hash)?.0)));
        let (key, bytes) = change.ok_or_else(|| StoreError::Damaged {
            what: format!("a document lacks its change {}", header.hash),
        })?;
        let number = self.state.outbox_next;
        self.state.outbox_next += 1;
        let tx = header.tx.map(|tx| (tx.id, tx.members));
        let record = OutboxRecord {
            type_name: key.type_name().to_owned(),
            id: key.id().to_owned(),
            hash: header.hash.0,
            intents: Vec::new(),
            authority: header.role == Role::Authority,
            tx,
            origin: None,
            skew_ms: self.correction_ms(),
            dated: false,
            // It left the device long ago, and is counted among what was sent.
            sent: true,
            bytes: bytes as u32,
            again: true,
            author: tx.and(missing.device).map(|device| device.0),
        };
        self.put_outbox(batch, number, &record)?;
        let pending = PendingRef {
            entity: *hash,
            key,
            hash: header.hash,
            origin: Origin::of(&header.hash),
            tx: record.transaction(),
            commit: CommitNo(u64::MAX),
            sent: true,
            mark: self.state.sent,
            bytes,
            again: true,
        };
        self.track(number, pending);
        Ok(number)
    }

    pub(super) fn key_of(&self, hash: EntityHash) -> Result<EntityKey, StoreError> {
        let damaged = || StoreError::Damaged { what: "an entity that was found is gone".into() };
        let bytes = self.store.get(View::Latest, Keyspace::ENTITY, &self.keys.entity(hash))?;
        let record = self.keys.entity_record(&*self.store, &bytes.ok_or_else(damaged)?)?;
        EntityKey::new(record.type_name, record.id).map_err(|_| damaged())
    }

    fn commit_again(&mut self, mut batch: Batch, numbers: Vec<u64>) -> Result<(), StoreError> {
        let queued = || numbers.iter().filter_map(|number| self.outbox.get(number));
        let entities: BTreeMap<EntityHash, EntityKey> =
            queued().map(|pending| (pending.entity, pending.key.clone())).collect();
        for (hash, key) in &entities {
            self.load(key)?;
            self.materialise(&mut batch, *hash)?;
        }
        let after = self.commit(batch)?;
        for number in numbers {
            if let Some(pending) = self.outbox.get_mut(&number) {
                pending.commit = after;
            }
        }
        if !entities.is_empty() {
            self.outputs.push_back(Output::Changed { after, entities: entities.into_values().collect() });
        }
        self.trim_cache();
        Ok(())
    }
}

/// Sorts changes into parcels, each after what it builds on, otherwise by time.
fn in_order(missing: &[Missing]) -> Vec<Vec<usize>> {
    let mut parcels: Vec<Parcel> = Vec::new();
    let mut of_tx = BTreeMap::new();
    let mut parcel_of: Vec<usize> = Vec::with_capacity(missing.len());
    for (place, change) in missing.iter().enumerate() {
        let new = parcels.len();
        let parcel = change.transaction().map_or(new, |tx| *of_tx.entry(tx).or_insert(new));
        if parcel == new {
            parcels.push(Parcel::default());
        }
        parcels[parcel].members.push(place);
        parcels[parcel].time = parcels[parcel].time.max(change.header.time);
        parcel_of.push(parcel);
    }
    let places: BTreeMap<(EntityHash, u32), usize> = missing
        .iter()
        .zip(&parcel_of)
        .map(|(change, parcel)| ((change.entity, change.place), *parcel))
        .collect();
    for (change, later) in missing.iter().zip(&parcel_of) {
        for dep in &change.header.deps {
            if let Some(earlier) = places.get(&(change.entity, *dep)).filter(|earlier| *earlier != later) {
                parcels[*earlier].before.push(*later);
                parcels[*later].waits_for += 1;
            }
        }
    }
    let mut ready: BinaryHeap<Reverse<(Hlc, usize)>> = BinaryHeap::new();
    ready.extend(
        parcels.iter().enumerate().filter(|(_, p)| p.waits_for == 0).map(|(n, p)| Reverse((p.time, n))),
    );
    let mut order = Vec::with_capacity(parcels.len());
    while let Some(Reverse((_, next))) = ready.pop() {
        order.push(std::mem::take(&mut parcels[next].members));
        for later in std::mem::take(&mut parcels[next].before) {
            parcels[later].waits_for -= 1;
            if parcels[later].waits_for == 0 {
                ready.push(Reverse((parcels[later].time, later)));
            }
        }
    }
    // Transactions are made at one moment each, so none can build on each other; if some did all the
    // same, the relay would say so of each.
    order.extend(parcels.into_iter().map(|parcel| parcel.members).filter(|members| !members.is_empty()));
    order
}
