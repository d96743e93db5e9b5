//! What users meant and were promised, and what became of it.
//!
//! A *promise* is one user's edit of one entity. The engine may make its change again, with
//! another date or on another base, so a promise has a row of changes, of which at most one may
//! ever be admitted. What passes through a device's disk tells which.

use std::collections::{BTreeMap, BTreeSet};

use anabranch_core::change::{Change, Origin};
use anabranch_core::id::EntityKey;
use anabranch_core::intent::Intent;
use anabranch_core::store::CommitNo;
use automerge::ChangeHash;
use serde_json::Value as Json;

use crate::disk::Noted;
use crate::model::Screen;

/// A promise's place in the ledger.
pub(crate) type PromiseId = usize;

/// What a device says became of a promise.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Fate {
    /// The relay admitted it.
    Admitted,
    /// It was refused, for this reason.
    Refused { code: String, message: String, intents: Vec<Intent> },
    /// Its author deleted what nobody else knew of.
    Forgotten,
}

/// One user's edit of one entity.
#[derive(Clone, Debug)]
pub(crate) struct Promise {
    pub(crate) device: usize,
    pub(crate) key: EntityKey,
    pub(crate) meant: Meant,
    pub(crate) tx: Option<[u8; 16]>,
    /// The changes that it was, the newest last, each with the commit that wrote it down.
    pub(crate) changes: Vec<(ChangeHash, CommitNo)>,
    pub(crate) fate: Option<(Fate, CommitNo)>,
    /// Made durable with this commit.
    pub(crate) commit: CommitNo,
    /// Power was lost before it was durable: nobody was promised anything.
    pub(crate) void: bool,
    /// An older backup took the device's place: what had not been sent may be gone.
    pub(crate) excused: bool,
}

/// What a user meant, and what they saw.
#[derive(Clone, Debug)]
pub(crate) struct Meant {
    pub(crate) intents: Vec<Intent>,
    pub(crate) base: Vec<ChangeHash>,
    pub(crate) screen: Screen,
    /// The true time.
    pub(crate) at_ms: u64,
    /// Whether the software checked it, as honest software does.
    pub(crate) checked: bool,
    /// How often the device's clock had been set.
    pub(crate) jumps: u32,
    /// How far it had drifted in all.
    pub(crate) wandered_ms: u64,
}

/// What a device told its user: an edit is lost that had been acknowledged.
#[derive(Clone, Debug)]
pub(crate) struct Told {
    pub(crate) promise: PromiseId,
    device: usize,
    number: u64,
    commit: CommitNo,
    pub(crate) ended: Option<(Ended, CommitNo)>,
}

/// How a device stopped telling of a loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// The edit came back.
    Withdrawn,
    /// The user let go of it: it may come back all the same.
    Dismissed,
}

/// A change that some device made.
#[derive(Clone, Debug)]
pub(crate) struct Made {
    pub(crate) promise: PromiseId,
    /// As the outbox has them: with positions as they are on this change's base.
    pub(crate) intents: Vec<Intent>,
    pub(crate) authority: bool,
    /// Whether the engine made it again from the intents.
    pub(crate) again: bool,
}

/// An entity, an actor and the number of a change of theirs.
type Place = (EntityKey, Vec<u8>, u64);

/// See the [module](self).
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    pub(crate) promises: Vec<Promise>,
    pub(crate) made: BTreeMap<ChangeHash, Made>,
    /// Pending promises by device and number in its outbox.
    numbers: BTreeMap<(usize, u64), PromiseId>,
    /// Changes that the relay lost and that a device offers again, whoever wrote them.
    offered: BTreeSet<(usize, u64)>,
    /// Devices that ever got an older backup.
    pub(crate) restored: BTreeSet<usize>,
    /// What devices told their users is lost though it had been acknowledged.
    pub(crate) told_lost: Vec<Told>,
    /// What a user lets go of just now, by device and number.
    pub(crate) dismissed: Option<(usize, u64)>,
    /// Changes that left a device.
    pub(crate) sent: BTreeMap<ChangeHash, (EntityKey, Change)>,
    /// Changes of devices that the relay has answered for good.
    answered: BTreeMap<Place, ChangeHash>,
    /// What is against the rules, as it was seen.
    pub(crate) wrong: Vec<String>,
}

impl Ledger {
    /// Writes down what went by a device's disk. `writing` has what its user just meant.
    pub(crate) fn note(
        &mut self,
        device: usize,
        noted: Vec<Noted>,
        writing: Option<&BTreeMap<EntityKey, Meant>>,
    ) {
        let mut noted = noted.into_iter().peekable();
        while let Some(one) = noted.next() {
            match one {
                Noted::Pending { commit, number, record } => {
                    self.pending(device, commit, number, &record, writing)
                }
                Noted::Settled { number, .. } if self.offered.remove(&(device, number)) => {}
                Noted::Settled { commit, number } => {
                    let fate = match noted.peek() {
                        Some(Noted::Refused { commit: with, record, .. })
                            if *with == commit && !intents(record).is_empty() =>
                        {
                            Fate::Refused {
                                code: text(record, "code"),
                                message: text(record, "message"),
                                intents: intents(record),
                            }
                        }
                        _ if writing.is_some() => Fate::Forgotten,
                        _ => Fate::Admitted,
                    };
                    match self.numbers.remove(&(device, number)) {
                        Some(promise) => self.promises[promise].fate = Some((fate, commit)),
                        None => {
                            self.wrong.push(format!("device {device} settles {number}, which is not pending"))
                        }
                    }
                }
                // It was admitted once, and what it meant was forgotten.
                Noted::Refused { commit, number, record } if intents(&record).is_empty() => {
                    match self.edit(device, &record) {
                        Some(promise) => {
                            self.told_lost.push(Told { promise, device, number, commit, ended: None })
                        }
                        None => self.wrong.push(format!(
                            "device {device} tells of the loss of what nobody wrote: {record}"
                        )),
                    }
                }
                Noted::Refused { .. } => {}
                Noted::Withdrawn { commit, number } => {
                    let mut told = self.told_lost.iter_mut().rev();
                    if let Some(told) = told.find(|told| (told.device, told.number) == (device, number)) {
                        let dismissed = self.dismissed == Some((device, number));
                        let how = if dismissed { Ended::Dismissed } else { Ended::Withdrawn };
                        told.ended = Some((how, commit));
                    }
                }
                Noted::Half { commit, found, members } => self.wrong.push(format!(
                    "commit {} of device {device} has {found} of a transaction's {members} entities",
                    commit.0
                )),
            }
        }
    }

    /// Which of a device's promises a refused record is about.
    fn edit(&self, device: usize, record: &Json) -> Option<PromiseId> {
        let key = EntityKey::new(text(record, "type_name"), text(record, "id")).ok()?;
        let edit = Origin(serde_json::from_value(record["edit"].clone()).ok()?);
        let is_it = |promise: &Promise| {
            let mut names = promise.changes.iter();
            promise.device == device && promise.key == key && names.any(|(hash, _)| Origin::of(hash) == edit)
        };
        self.promises.iter().rposition(is_it)
    }

    /// The relay has a change for good, admitted or refused. No actor says two things under one number.
    pub(crate) fn answered(&mut self, key: &EntityKey, change: &Change) {
        let place = (key.clone(), change.actor().to_bytes().to_vec(), change.seq());
        let first = *self.answered.entry(place).or_insert(change.hash());
        if first != change.hash() {
            let (seq, hash) = (change.seq(), change.hash());
            self.wrong.push(format!("number {seq} of an actor of {key} was sent as {first} and as {hash}"));
        }
    }

    fn pending(
        &mut self,
        device: usize,
        commit: CommitNo,
        number: u64,
        record: &Json,
        writing: Option<&BTreeMap<EntityKey, Meant>>,
    ) {
        if record["again"].as_bool() == Some(true) {
            self.offered.insert((device, number));
            return;
        }
        let Some((key, hash)) = name(record) else {
            self.wrong.push(format!("device {device} writes a pending change that can't be read"));
            return;
        };
        let (promise, again) = match self.numbers.get(&(device, number)) {
            Some(promise) => (*promise, true),
            None => {
                let Some(meant) = writing.and_then(|writing| writing.get(&key)) else {
                    self.wrong.push(format!("device {device} queues an edit of {key} that nobody made"));
                    return;
                };
                let tx = serde_json::from_value::<Option<([u8; 16], u32)>>(record["tx"].clone());
                self.promises.push(Promise {
                    device,
                    key: key.clone(),
                    meant: meant.clone(),
                    tx: tx.ok().flatten().map(|(id, _)| id),
                    changes: Vec::new(),
                    fate: None,
                    commit,
                    void: false,
                    excused: false,
                });
                self.numbers.insert((device, number), self.promises.len() - 1);
                (self.promises.len() - 1, false)
            }
        };
        let changes = &mut self.promises[promise].changes;
        if changes.last().is_some_and(|(last, _)| *last == hash) {
            return;
        }
        changes.push((hash, commit));
        let authority = record["authority"].as_bool().unwrap_or_default();
        let made = Made { promise, intents: intents(record), authority, again };
        if let Some(earlier) = self.made.insert(hash, made)
            && earlier.promise != promise
            && !self.promises[earlier.promise].void
        {
            self.wrong.push(format!("two edits of {key} are one change"));
        }
    }

    /// A device lost power, and all after the commit `durable`. `outbox` is what it finds.
    pub(crate) fn crashed(&mut self, device: usize, durable: CommitNo, outbox: &[(u64, Json)]) {
        for promise in self.promises.iter_mut().filter(|promise| promise.device == device) {
            promise.changes.retain(|(_, commit)| *commit <= durable);
            promise.void |= promise.commit > durable;
            if promise.fate.as_ref().is_some_and(|(_, commit)| *commit > durable) {
                promise.fate = None;
            }
        }
        self.told_lost.retain(|told| told.device != device || told.commit <= durable);
        for told in self.told_lost.iter_mut().filter(|told| told.device == device) {
            told.ended = told.ended.filter(|(_, commit)| *commit <= durable);
        }
        self.find(device, outbox);
    }

    /// An older backup took the place of what a device had.
    pub(crate) fn restored(&mut self, device: usize, outbox: &[(u64, Json)]) {
        self.restored.insert(device);
        self.told_lost.retain(|told| told.device != device);
        for promise in self.promises.iter_mut().filter(|promise| promise.device == device) {
            promise.excused |= !matches!(promise.fate, Some((Fate::Admitted, _)));
            promise.commit = CommitNo(0);
            promise.changes.iter_mut().for_each(|(_, commit)| *commit = CommitNo(0));
            promise.fate.iter_mut().for_each(|(_, commit)| *commit = CommitNo(0));
        }
        self.find(device, outbox);
        let pending: Vec<PromiseId> =
            self.numbers.range((device, 0)..=(device, u64::MAX)).map(|(_, promise)| *promise).collect();
        for promise in pending {
            let promise = &mut self.promises[promise];
            promise.fate = None;
            // The backup has it, so it is still owed.
            promise.excused = false;
        }
    }

    fn find(&mut self, device: usize, outbox: &[(u64, Json)]) {
        self.numbers.retain(|(other, _), _| *other != device);
        self.offered.retain(|(other, _)| *other != device);
        for (number, record) in outbox {
            if record["again"].as_bool() == Some(true) {
                self.offered.insert((device, *number));
                continue;
            }
            match name(record).and_then(|(_, hash)| self.made.get(&hash).map(|made| (hash, made.promise))) {
                Some((hash, promise)) => {
                    self.numbers.insert((device, *number), promise);
                    let changes = &mut self.promises[promise].changes;
                    if changes.last().is_none_or(|(last, _)| *last != hash) {
                        changes.push((hash, CommitNo(0)));
                    }
                }
                None => self.wrong.push(format!("device {device} finds a pending change that it never made")),
            }
        }
    }

    /// What is pending on a device.
    pub(crate) fn pending_on(&self, device: usize) -> impl Iterator<Item = &Promise> {
        let numbers = self.numbers.range((device, 0)..=(device, u64::MAX));
        numbers.map(|(_, promise)| &self.promises[*promise])
    }
}

fn intents(record: &Json) -> Vec<Intent> {
    serde_json::from_value(record["intents"].clone()).unwrap_or_default()
}

fn text(record: &Json, field: &str) -> String {
    record[field].as_str().unwrap_or_default().to_owned()
}

fn name(record: &Json) -> Option<(EntityKey, ChangeHash)> {
    let key = EntityKey::new(record["type_name"].as_str()?, record["id"].as_str()?).ok()?;
    Some((key, ChangeHash(serde_json::from_value(record["hash"].clone()).ok()?)))
}
