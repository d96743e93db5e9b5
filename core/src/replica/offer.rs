//! What a relay lost and this device may bring: found in the store, and put into the outbox as it is.
//!
//! Each change goes after what it builds on, transactions whole, of an edit by two names the older. What is left
//! is *lacking*: others have to bring it, or this device once it may.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};

use automerge::ChangeHash;

use super::layout::{EntityRecord, OutboxRecord};
use super::{Output, PendingRef, Replica, for_each};
use crate::admission::Vouches;
use crate::change::{Change, Origin, Role};
use crate::clock::{Hlc, Now};
use crate::codec::{self, HeaderRecord};
use crate::header::Header;
use crate::id::{Author, DeviceId, EntityHash, EntityKey};
use crate::store::{Batch, CommitNo, Keyspace, StoreError, View};

/// Entities read from the store at once.
const PAGE: usize = 256;
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
