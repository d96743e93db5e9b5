//! Admission of a unit: which of its changes are taken, which are refused, and what follows.
//!
//! Three passes. Every change is judged by itself, in causal order. Then refusals spread: to
//! what depends on a refused change, and to the other members of its transaction, so that a
//! transaction is taken whole or not at all. What survives is kept.
//!
//! A refusal either *lasts* (it is stored and fed, and given again whenever the change comes
//! back) or it *passes*: a retry may succeed, so nothing is stored. A lasting refusal is
//! found by hash alone, so it must never be possible to cause one for another device's
//! change: whatever depends on who submits passes.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;

use automerge::{ActorId, ChangeHash};

use super::entities::{Entity, EntityCache, Pushed, Size};
use super::feed::{FeedEntity, FeedRecord};
use super::layout::RefusalRecord;
use super::workspace::{Draft, Workspace};
use super::{RelayConfig, cut};
use crate::admission::{self, Context, Judge, Refusal, RefusalCode, Vouches};
use crate::change::{self, Change, EDIT_OPS_MAX, MalformedChange, OP_COUNTER_MAX, Role, TxMark};
use crate::clock::WallMs;
use crate::codec;
use crate::genesis::Genesis;
use crate::header::DEVICE_ACTORS_MAX;
use crate::id::{Author, DeviceId, EntityHash, EntityKey, WorkspaceId};
use crate::schema::EntityType;
use crate::store::{Keyspace, Store, StoreError, View};
use crate::targets::ChangeTargets;
use crate::wire::{ENTITY_BYTES_MAX, EntityChanges, FaultCode, GrantRole, Hash, Refused, Unit, UnitSize};

/// Longest message of a refusal.
const REFUSAL_BYTES_MAX: usize = 256;
/// Bytes of messages that one answer carries; refusals beyond have a code only.
const ANSWER_MESSAGES_BYTES_MAX: usize = 512 * 1024;
/// Most changes of an entity; more are refused for good.
const ENTITY_CHANGES_MAX: usize = 500_000;
/// Most actors of an entity; changes of more are refused for good.
const ENTITY_ACTORS_MAX: usize = 10_000;
/// Most operations of an entity; changes with more are refused for good.
const ENTITY_OPS_MAX: u64 = 10_000_000;
/// How far the counter of a change may be ahead of what the entity has and it depends on. A device that saw
/// what is not taken, and built on a version before it, leaves a gap. However many changes an
/// entity has, such gaps don't take up the numbers that there are for operations.
const COUNTER_GAP_MAX: u64 = 1_000;
const _: () = assert!(ENTITY_CHANGES_MAX as u64 * COUNTER_GAP_MAX + ENTITY_OPS_MAX < OP_COUNTER_MAX / 2);

/// Who submits what to where.
#[derive(Clone, Copy)]
pub(super) struct Submission<'a> {
    pub(super) store: &'a dyn Store,
    pub(super) config: &'a RelayConfig,
    pub(super) workspace: &'a Workspace,
    pub(super) device: DeviceId,
    pub(super) role: GrantRole,
    pub(super) now: WallMs,
}

/// What became of a unit.
#[derive(Debug)]
pub(super) struct Verdict {
    /// For the answer, in the order of the unit.
    pub(super) refused: Vec<Refused>,
    /// What the unit touched, to go to the cache once the draft is committed.
    pub(super) entities: Vec<Entity>,
}

/// Why nothing of a unit was looked at.
pub(super) type UnitFault = (FaultCode, String);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    /// Stored earlier.
    Stored,
    /// To be stored now.
    Lasts,
    /// Only for the answer.
    Passes,
}

#[derive(Debug)]
enum Fate {
    /// Admitted earlier.
    Known,
    /// Taken, unless a refusal spreads to it.
    Taken,
    Refused(Refusal, Standing),
}

impl Fate {
    /// Whether the change may be taken when something else has come, or when it is later.
    fn waits(&self) -> bool {
        let codes = [RefusalCode::MissingDependency, RefusalCode::ClockAhead, RefusalCode::UnknownField];
        matches!(self, Fate::Refused(refusal, Standing::Passes) if codes.contains(&refusal.code))
    }
}

/// One change of the unit.
struct Item {
    target: usize,
    hash: ChangeHash,
    tx: Option<(TxKey, TxMark)>,
    fate: Fate,
}

/// A transaction: its id, and its author by the word of the changes, as anyone can write the id of
/// another's. Whose a change is that builds on what is not here may not be known.
type TxKey = ([u8; 16], Option<DeviceId>);

/// All that have the id of one.
fn same_id((id, _): TxKey) -> RangeInclusive<TxKey> {
    (id, None)..=(id, Some(DeviceId([u8::MAX; 32])))
}

/// For whose changes a session speaks.
fn vouches(role: GrantRole) -> Vouches {
    match role {
        GrantRole::Authority => Vouches::Anyone,
        GrantRole::Admin => Vouches::Devices,
        GrantRole::Writer | GrantRole::Reader => Vouches::Own,
    }
}

/// One entity of the unit.
struct Target<'a> {
    entity: Entity,
    /// Its type, or that the schema has no such type; nothing where there is no schema.
    ty: Option<Result<&'a EntityType, ()>>,
    containers: Containers<'a>,
    /// What was pushed to the entity's index.
    pushed: Vec<Pushed>,
    /// Containers that the unit names.
    named: Vec<(String, u8)>,
    /// Whose each actor is that begins in the unit, whatever becomes of that.
    begun: BTreeMap<ActorId, DeviceId>,
    signature: Vec<u8>,
}

/// The containers that an entity can have.
enum Containers<'a> {
    /// Those of its type.
    Schema(&'a BTreeMap<String, Genesis>),
    /// Those of its type, and what was named before the schema was known.
    Both(BTreeMap<String, Genesis>),
    /// What devices named.
    Named,
}

impl Target<'_> {
    fn containers(&self) -> &BTreeMap<String, Genesis> {
        match &self.containers {
            Containers::Schema(genesis) => genesis,
            Containers::Both(genesis) => genesis,
            Containers::Named => &self.entity.named,
        }
    }

    fn transaction(&mut self, workspace: &WorkspaceId, change: &Change) -> Option<(TxKey, TxMark)> {
        if let Some(author) = change.author()
            && admission::is_actor_of(change.actor(), author, workspace, &self.entity.key)
        {
            self.begun.entry(change.actor().clone()).or_insert(author.device);
        }
        let tx = change.note().tx?;
        let known = self.entity.index.actor(change.actor()).map(|entry| entry.author.device);
        let device = known.or_else(|| self.begun.get(change.actor()).copied());
        Some(((tx.id, device), tx))
    }

    fn knows(&self, dep: &ChangeHash) -> bool {
        self.entity.index.contains(dep) || self.containers().values().any(|genesis| genesis.hash == *dep)
    }
}

/// Judges a unit and puts everything that follows into `draft`: headers, entities, refusals,
/// feed entries, digest. `size` is that of the unit.
pub(super) fn admit(
    submission: Submission<'_>,
    cache: &mut EntityCache,
    draft: &mut Draft,
    unit: Unit,
    size: &UnitSize,
) -> Result<Result<Verdict, UnitFault>, StoreError> {
    let keys = match check_bounds(&unit, size) {
        Ok(keys) => keys,
        Err(fault) => return Ok(Err(fault)),
    };
    if submission.config.require_schema && submission.workspace.schema.is_none() {
        let text = format!("{} has no schema yet; an admin must push one", submission.workspace.id);
        return Ok(Err((FaultCode::SchemaMissing, text)));
    }
    let mut judging = Judging { submission, targets: Vec::new(), items: Vec::new(), places: BTreeMap::new() };
    let mut by_entity: BTreeMap<EntityHash, usize> = BTreeMap::new();
    for (key, part) in keys.into_iter().zip(unit.entities) {
        let hash = EntityHash::of(&submission.workspace.id, &key);
        let target = match by_entity.get(&hash) {
            Some(target) => *target,
            None => {
                by_entity.insert(hash, judging.targets.len());
                judging.add_target(cache, key, hash)?
            }
        };
        judging.judge_part(target, part)?;
    }
    judging.spread();
    judging.finish(draft).map(Ok)
}

/// Checks the size of a unit and the names in it.
fn check_bounds(unit: &Unit, size: &UnitSize) -> Result<Vec<EntityKey>, UnitFault> {
    let mut keys = Vec::new();
    for part in &unit.entities {
        let key = EntityKey::new(part.type_name.clone(), part.id.clone());
        keys.push(key.map_err(|error| (FaultCode::Protocol, error.to_string()))?);
    }
    match size.exceeds() {
        Some(limit) => Err((FaultCode::Quota, format!("the unit has {limit}: send less at once"))),
        None => Ok(keys),
    }
}

struct Judging<'a> {
    submission: Submission<'a>,
    targets: Vec<Target<'a>>,
    items: Vec<Item>,
    /// Where a change of a target is in `items`.
    places: BTreeMap<(usize, ChangeHash), usize>,
}

impl<'a> Judging<'a> {
    fn add_target(
        &mut self,
        cache: &mut EntityCache,
        key: EntityKey,
        hash: EntityHash,
    ) -> Result<usize, StoreError> {
        let Submission { store, workspace, .. } = self.submission;
        let entity = match cache.take(workspace.hash, hash) {
            Some(entity) => entity,
            None => Entity::load(store, workspace.hash, key, hash)?,
        };
        let typed = workspace.schema.as_ref().map(|schema| schema.of(entity.key.type_name()).ok_or(()));
        let containers = match typed {
            Some(Ok((_, genesis))) if entity.named.is_empty() => Containers::Schema(genesis),
            Some(Ok((_, genesis))) => {
                let mut both = entity.named.clone();
                both.extend(genesis.iter().map(|(field, genesis)| (field.clone(), genesis.clone())));
                Containers::Both(both)
            }
            _ => Containers::Named,
        };
        let ty = typed.map(|known| known.map(|(ty, _)| ty));
        self.targets.push(Target {
            entity,
            ty,
            containers,
            pushed: Vec::new(),
            named: Vec::new(),
            begun: BTreeMap::new(),
            signature: Vec::new(),
        });
        Ok(self.targets.len() - 1)
    }

    /// Judges the changes of one entity, each by itself.
    fn judge_part(&mut self, at: usize, part: EntityChanges) -> Result<(), StoreError> {
        let target = &mut self.targets[at];
        if target.ty.is_none() && self.submission.role != GrantRole::Reader {
            target.entity.name_containers(&part.genesis);
        }
        target.named.extend(part.genesis);
        target.signature = part.signature;
        for bytes in part.changes {
            // Automerge 0.12 computes a change's hash and does not hold it against the checksum.
            let parsed = Change::parse(&bytes).and_then(|change| {
                let fits = checksum_fits(&bytes, &change.hash());
                if fits { Ok(change) } else { Err(MalformedChange("its checksum is wrong")) }
            });
            let known_hash = parsed.as_ref().map_or_else(|_| raw_hash(&bytes), |change| Some(change.hash()));
            // Bytes without a hash of their own get a name for the answer.
            let hash = known_hash.unwrap_or_else(|| ChangeHash(*blake3::hash(&bytes).as_bytes()));
            if self.places.contains_key(&(at, hash)) {
                continue;
            }
            let workspace = &self.submission.workspace.id;
            let tx = parsed.as_ref().ok().and_then(|change| self.targets[at].transaction(workspace, change));
            let fate = match parsed {
                Ok(change) => match self.judge_change(at, &change)? {
                    Ok((author, marks)) => {
                        let target = &mut self.targets[at];
                        target.entity.push(&change, author, &marks);
                        target.pushed.push(Pushed { change, author, marks });
                        Fate::Taken
                    }
                    Err(fate) => fate,
                },
                Err(error) => self.judge_malformed(at, known_hash, error.to_string())?,
            };
            self.places.insert((at, hash), self.items.len());
            self.items.push(Item { target: at, hash, tx, fate });
        }
        Ok(())
    }

    /// The fate of bytes that are no change. Where Automerge can tell the hash, its author
    /// knows the change by it; else nobody can hold such a change, and nothing is stored.
    fn judge_malformed(&self, at: usize, hash: Option<ChangeHash>, text: String) -> Result<Fate, StoreError> {
        let stored = match hash {
            Some(hash) => self.stored_refusal(&self.targets[at], &hash)?,
            None => None,
        };
        if let Some(refusal) = stored {
            return Ok(Fate::Refused(refusal, Standing::Stored));
        }
        let lasts = hash.is_some() && self.submission.role != GrantRole::Reader;
        let standing = if lasts { Standing::Lasts } else { Standing::Passes };
        Ok(Fate::Refused(Refusal::new(RefusalCode::Malformed, text), standing))
    }

    /// Judges one change. Returns its author and where it acts if it can be taken.
    fn judge_change(
        &self,
        at: usize,
        change: &Change,
    ) -> Result<Result<(Author, ChangeTargets), Fate>, StoreError> {
        let Submission { workspace, device, role, now, .. } = self.submission;
        let target = &self.targets[at];
        let refuse = |code: RefusalCode, text: &str, standing: Standing| {
            Ok(Err(Fate::Refused(Refusal::new(code, text), standing)))
        };
        if target.entity.index.contains(&change.hash()) {
            return Ok(Err(Fate::Known));
        }
        if let Some(refusal) = self.stored_refusal(target, &change.hash())? {
            return Ok(Err(Fate::Refused(refusal, Standing::Stored)));
        }
        if role == GrantRole::Reader {
            // Readers leave no trace, not even refusals: those would be written for all to see.
            return refuse(RefusalCode::Forbidden, "a reader writes nothing", Standing::Passes);
        }
        let mut missing = false;
        for dep in change.deps().iter().filter(|dep| !target.knows(dep)) {
            match self.places.get(&(at, *dep)).map(|place| &self.items[*place].fate) {
                Some(Fate::Refused(_, Standing::Passes)) => missing = true,
                Some(Fate::Refused(..)) => return Ok(Err(depends_on_refused())),
                _ if self.stored_refusal(target, dep)?.is_some() => return Ok(Err(depends_on_refused())),
                _ => missing = true,
            }
        }
        let author =
            change.author().or_else(|| target.entity.index.actor(change.actor()).map(|entry| entry.author));
        let vouches = vouches(role);
        let writer = author.map(|author| author.device).or_else(|| target.begun.get(change.actor()).copied());
        if vouches == Vouches::Own && writer.is_some_and(|writer| writer != device) {
            return refuse(
                RefusalCode::ForgedAuthor,
                "the change was written by another device than the one that sent it",
                Standing::Passes,
            );
        }
        // This, and that it is here already, is said before what it builds on is missed: that may never come, and
        // whoever brings this is not to wait for it in vain.
        if vouches != Vouches::Anyone && change.note().role == Role::Authority {
            return refuse(
                RefusalCode::ForgedRole,
                "the change claims a role that its device does not have",
                Standing::Passes,
            );
        }
        if let Some(writer) = writer
            && self.has_twin(target, change, writer)?
        {
            return refuse(
                RefusalCode::Superseded,
                "the edit is here already, as another change",
                Standing::Passes,
            );
        }
        if missing {
            let text = "it depends on a change that is not known";
            return refuse(RefusalCode::MissingDependency, text, Standing::Passes);
        }
        let index = &target.entity.index;
        let new_actor = index.actor(change.actor()).is_none();
        if index.len() >= ENTITY_CHANGES_MAX || (new_actor && index.actors().len() >= ENTITY_ACTORS_MAX) {
            return refuse(RefusalCode::Quota, "the entity has too many changes or authors", Standing::Lasts);
        }
        if new_actor && author.is_some_and(|author| index.is_full_of(author.device)) {
            let text = format!(
                "the device has {DEVICE_ACTORS_MAX} actors in the entity, by lives of its store and edits of \
                 versions that lacked its own; it must edit the newest version"
            );
            return refuse(RefusalCode::Quota, &text, Standing::Lasts);
        }
        if let Some(text) = exceeds(&target.entity.size, change) {
            return refuse(RefusalCode::Quota, &text, Standing::Lasts);
        }
        let below = change.deps().iter().filter_map(|dep| index.by_hash(dep)).map(|header| header.max_op);
        // Not what else the unit brings: it may be refused.
        let reached = below.fold(target.entity.stored_size.counter, u64::max);
        if change.start_op() > reached + 1 + COUNTER_GAP_MAX {
            return refuse(
                RefusalCode::BadSequence,
                "its operations are numbered too far ahead of what the entity has; make it again",
                Standing::Passes,
            );
        }
        // Who brings another's change brings back what a relay lost, and that may have lost the schema too.
        let brought = author.is_some_and(|author| author.device != device);
        let unknown = if brought { Standing::Passes } else { Standing::Lasts };
        let ty = match target.ty {
            Some(Err(())) => {
                let text = format!("the schema has no type {:?}", target.entity.key.type_name());
                return refuse(RefusalCode::UnknownField, &text, unknown);
            }
            Some(Ok(ty)) => Some(ty),
            None => None,
        };
        let role = if role == GrantRole::Authority { Role::Authority } else { Role::Device };
        let context = Context {
            workspace: &workspace.id,
            entity: &target.entity.key,
            ty,
            genesis: target.containers(),
            headers: index,
            targets: Some(&target.entity.targets),
            judge: Judge::Relay { device, role, vouches, now },
        };
        Ok(admission::judge_and_mark(change, &context).map_err(|refusal| {
            let standing = match refusal.code {
                RefusalCode::MissingDependency
                | RefusalCode::ClockAhead
                | RefusalCode::ForgedAuthor
                | RefusalCode::ForgedRole => Standing::Passes,
                RefusalCode::UnknownField => unknown,
                _ => Standing::Lasts,
            };
            Fate::Refused(refusal, standing)
        }))
    }

    /// Whether the edit of a change was admitted as another one. Two lives of a device may both date it
    /// again, and what one of them sent may come back by others after the relay lost it.
    fn has_twin(&self, target: &Target<'_>, change: &Change, author: DeviceId) -> Result<bool, StoreError> {
        let Submission { store, workspace, .. } = self.submission;
        let origin = change.origin();
        let index = &target.entity.index;
        if change.note().origin.is_some() && index.first_of(origin).is_some_and(|h| index.device(h) == author)
        {
            return Ok(true);
        }
        let key = workspace.hash.made_again(target.entity.hash, author, origin);
        Ok(store.get(View::Latest, Keyspace::REFUSED, &key)?.is_some())
    }

    fn stored_refusal(
        &self,
        target: &Target<'_>,
        change: &ChangeHash,
    ) -> Result<Option<Refusal>, StoreError> {
        let Submission { store, workspace, .. } = self.submission;
        if mutated!(ReadmitRefused) {
            return Ok(None);
        }
        let key = workspace.hash.refusal(target.entity.hash, &change.0);
        let Some(bytes) = store.get(View::Latest, Keyspace::REFUSED, &key)? else { return Ok(None) };
        let record: RefusalRecord = codec::decode(&bytes, "a refusal")?;
        let code = RefusalCode::from_u16(record.code).unwrap_or(RefusalCode::Malformed);
        Ok(Some(Refusal::new(code, record.message)))
    }

    /// Spreads refusals to dependants and to the other members of transactions. Each change
    /// is visited once, so the cost grows with the unit, however refusals chain.
    fn spread(&mut self) {
        let mut dependants: BTreeMap<(usize, ChangeHash), Vec<usize>> = BTreeMap::new();
        for (at, target) in self.targets.iter().enumerate() {
            for Pushed { change, .. } in &target.pushed {
                let Some(place) = self.places.get(&(at, change.hash())) else { continue };
                for dep in change.deps() {
                    dependants.entry((at, *dep)).or_default().push(*place);
                }
            }
        }
        let mut transactions = self.transactions();
        for transaction in transactions.values().filter(|transaction| !transaction.is_whole()) {
            for place in &transaction.places {
                self.refuse_taken(*place, lasts(RefusalCode::Transaction, INCOMPLETE), false);
            }
        }
        // Lasting refusals first: where both reach a change, no retry can help it.
        for lasting in [true, false] {
            let spreads =
                |fate: &Fate| matches!(fate, Fate::Refused(_, s) if (*s != Standing::Passes) == lasting);
            let mut open: Vec<usize> =
                (0..self.items.len()).filter(|place| spreads(&self.items[*place].fate)).collect();
            while let Some(place) = open.pop() {
                let item = &self.items[place];
                let Fate::Refused(cause, _) = &item.fate else { continue };
                let (code, tx) = (cause.code, item.tx);
                let below = dependants.remove(&(item.target, item.hash)).unwrap_or_default();
                let beside = tx.map(|(key, _)| take_beside(&mut transactions, key)).unwrap_or_default();
                for place in below {
                    let fate = if lasting {
                        depends_on_refused()
                    } else {
                        passes(RefusalCode::MissingDependency, BELOW_NOT_TAKEN)
                    };
                    if self.refuse_taken(place, fate, false) {
                        open.push(place);
                    }
                }
                // Of one author none is ever taken where another is refused for good, what only waits neither: who
                // has all of it from a feed that was lost, and were told of the others alone, would be left with half.
                // Nobody does that to another's transaction but who vouches for it.
                let all = lasting
                    && tx.is_some_and(|((_, device), _)| device.is_some_and(|of| self.speaks_for(of)));
                for place in beside {
                    let fate = if lasting {
                        lasts(RefusalCode::Transaction, BESIDE_REFUSED)
                    } else {
                        passes(beside_not_taken(code), BESIDE_NOT_TAKEN)
                    };
                    if self.refuse_taken(place, fate, all) {
                        open.push(place);
                    }
                }
            }
        }
    }

    fn speaks_for(&self, device: DeviceId) -> bool {
        device == self.submission.device || vouches(self.submission.role) != Vouches::Own
    }

    /// Refuses what would be taken, and what `waits_too` for something that can come yet.
    fn refuse_taken(&mut self, place: usize, fate: Fate, waits_too: bool) -> bool {
        let item = &mut self.items[place];
        let refused = matches!(item.fate, Fate::Taken) || waits_too && item.fate.waits();
        if refused {
            item.fate = fate;
        }
        refused
    }

    fn transactions(&self) -> BTreeMap<TxKey, Transaction> {
        let mut transactions: BTreeMap<TxKey, Transaction> = BTreeMap::new();
        for (place, item) in self.items.iter().enumerate() {
            if let Some((key, tx)) = item.tx {
                let transaction = transactions.entry(key).or_default();
                transaction.announced.insert(tx.members);
                transaction.targets.insert(item.target);
                transaction.places.push(place);
            }
        }
        // A change of an unknown author is not taken, and with it nothing that may belong to it.
        let unknown: Vec<TxKey> =
            transactions.keys().filter(|(_, device)| device.is_none()).copied().collect();
        for key in unknown {
            transactions.range_mut(same_id(key)).for_each(|(_, transaction)| transaction.is_open = true);
        }
        transactions
    }

    /// Puts what follows from the fates into the draft.
    fn finish(self, draft: &mut Draft) -> Result<Verdict, StoreError> {
        let Self { submission, mut targets, items, places } = self;
        let workspace = submission.workspace.hash;
        let mut accepted = Vec::new();
        for (at, target) in targets.iter_mut().enumerate() {
            let kept = |hash: &ChangeHash| {
                places.get(&(at, *hash)).is_some_and(|place| matches!(items[*place].fate, Fate::Taken))
            };
            let before = target.entity.heads();
            target.entity.settle(&target.pushed, kept);
            draft.tip.digest.replace(target.entity.hash, &before, &target.entity.heads());
            for Pushed { change, author, .. } in &target.pushed {
                if let Some(origin) = change.note().origin
                    && kept(&change.hash())
                {
                    let key = workspace.made_again(target.entity.hash, author.device, origin);
                    draft.batch.put(Keyspace::REFUSED, key, []);
                }
            }
            let changes: Vec<(Hash, Vec<u8>)> = target
                .pushed
                .iter()
                .filter(|pushed| kept(&pushed.change.hash()))
                .map(|pushed| (pushed.change.hash().0, pushed.change.bytes().to_vec()))
                .collect();
            if changes.is_empty() {
                continue;
            }
            let named: BTreeSet<(String, u8)> = std::mem::take(&mut target.named).into_iter().collect();
            let fits = |(field, kind): &(String, u8)| {
                target.containers().get(field).is_some_and(|genesis| genesis.kind.code() == *kind)
            };
            accepted.push(FeedEntity {
                type_name: target.entity.key.type_name().to_owned(),
                id: target.entity.key.id().to_owned(),
                genesis: named.into_iter().filter(fits).collect(),
                changes,
                signature: std::mem::take(&mut target.signature),
            });
            target.entity.put(&mut draft.batch, workspace);
        }
        if !accepted.is_empty() {
            draft.append(&FeedRecord::Changes { author: submission.device.0, entities: accepted });
        }
        let mut refused = Vec::new();
        let mut message_bytes = 0;
        for item in items {
            let Fate::Refused(refusal, standing) = item.fate else { continue };
            let entity = &targets[item.target].entity;
            let message = cut(&refusal.message, REFUSAL_BYTES_MAX);
            let mut answer = Refused {
                type_name: entity.key.type_name().to_owned(),
                id: entity.key.id().to_owned(),
                hash: item.hash.0,
                code: refusal.code as u16,
                message: message.to_owned(),
            };
            if standing == Standing::Lasts {
                let record = RefusalRecord { code: answer.code, message: message.to_owned() };
                let key = workspace.refusal(entity.hash, &item.hash.0);
                draft.batch.put(Keyspace::REFUSED, key, codec::encode(&record));
                let Refused { type_name, id, hash, code, message } = answer.clone();
                draft.append(&FeedRecord::Refused { type_name, id, hash, code, message });
            }
            message_bytes += answer.message.len();
            if message_bytes > ANSWER_MESSAGES_BYTES_MAX {
                answer.message.clear();
            }
            refused.push(answer);
        }
        Ok(Verdict { refused, entities: targets.into_iter().map(|target| target.entity).collect() })
    }
}

/// Why an entity that has so much can't take a change.
fn exceeds(size: &Size, change: &Change) -> Option<String> {
    if change.operations() > EDIT_OPS_MAX {
        let operations = change.operations();
        return Some(format!("the edit has {operations} operations; {EDIT_OPS_MAX} are allowed: split it"));
    }
    if size.operations + change.operations() as u64 > ENTITY_OPS_MAX {
        return Some(format!(
            "the entity has {} operations, {ENTITY_OPS_MAX} are allowed: go on in a new one",
            size.operations
        ));
    }
    (size.bytes + change.bytes().len() as u64 > ENTITY_BYTES_MAX as u64).then(|| {
        format!(
            "the changes of the entity have {} bytes, {ENTITY_BYTES_MAX} are allowed: go on in a new one",
            size.bytes
        )
    })
}

/// What a unit holds of one transaction.
#[derive(Default)]
struct Transaction {
    /// Numbers of members that its changes announce.
    announced: BTreeSet<u32>,
    /// Entities with a change of it, known ones too: a unit may come again.
    targets: BTreeSet<usize>,
    places: Vec<usize>,
    /// Whether there are changes that may belong to another.
    is_open: bool,
}

impl Transaction {
    fn is_whole(&self) -> bool {
        if mutated!(SplitTransaction) || self.is_open {
            return true;
        }
        self.announced.iter().eq([&(self.targets.len() as u32)])
    }
}

/// Takes out the places of all that may be of a transaction.
fn take_beside(transactions: &mut BTreeMap<TxKey, Transaction>, key: TxKey) -> Vec<usize> {
    let keys: Vec<TxKey> = match key {
        (_, None) => transactions.range(same_id(key)).map(|(key, _)| *key).collect(),
        _ => vec![key],
    };
    let taken = keys.iter().filter_map(|key| transactions.remove(key));
    taken.flat_map(|transaction| transaction.places).collect()
}

const INCOMPLETE: &str = "the unit does not hold its transaction whole";
const BESIDE_REFUSED: &str = "another member of its transaction was refused";
const BESIDE_NOT_TAKEN: &str = "another member of its transaction was not taken";
const BELOW_NOT_TAKEN: &str = "it depends on a change that was not taken";

fn lasts(code: RefusalCode, text: &str) -> Fate {
    Fate::Refused(Refusal::new(code, text), Standing::Lasts)
}

fn passes(code: RefusalCode, text: &str) -> Fate {
    Fate::Refused(Refusal::new(code, text), Standing::Passes)
}

fn depends_on_refused() -> Fate {
    lasts(RefusalCode::DependsOnRefused, "it depends on a refused change")
}

/// What is said of a member of a transaction of which another is not taken now: what mends that one mends all, but
/// that an edit is here already is said of that edit alone.
fn beside_not_taken(cause: RefusalCode) -> RefusalCode {
    match cause {
        RefusalCode::Superseded => RefusalCode::MissingDependency,
        other => other,
    }
}

/// The hash of a change that is well-formed to Automerge, if not to us.
fn raw_hash(bytes: &[u8]) -> Option<ChangeHash> {
    let raw = change::parse_raw(bytes).ok()?;
    Some(raw.hash()).filter(|hash| checksum_fits(bytes, hash))
}

/// Whether the checksum of a chunk is the beginning of its hash. If it is not, the bytes must
/// not count as the change of that hash: anybody can damage a checksum.
fn checksum_fits(bytes: &[u8], hash: &ChangeHash) -> bool {
    bytes.get(4..8) == Some(&hash.0[..4])
}
