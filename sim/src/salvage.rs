//! What devices hold that a relay which went back has not.
//!
//! Changes are not signed yet, so the relay takes a change again from the device that wrote it, and on the
//! word of an authority (or of an admin, what no authority wrote). The promise is therefore: *what its author
//! or an authority still holds comes back, and what only others hold is counted as lacking.* What nobody
//! may bring holds back what builds on it, and the members of its transaction.

use std::collections::{BTreeMap, BTreeSet};

use anabranch_core::change::Role;
use anabranch_core::codec::{self, HeaderRecord};
use anabranch_core::header::Header;
use anabranch_core::id::{EntityHash, EntityKey};
use anabranch_core::schema::{FieldType, ScalarType};
use anabranch_core::store::{Keyspace, Store, View};
use anabranch_core::wire::GrantRole;
use automerge::ChangeHash;

use crate::cluster::Cluster;
use crate::device::Device;

/// What one device holds of an entity beyond what the relay has, by the places of changes.
#[derive(Clone, Debug, Default)]
pub(crate) struct Beyond {
    headers: Vec<Header>,
    /// Of these, what the relay lacks.
    missing: BTreeSet<u32>,
}

impl Beyond {
    pub(crate) fn changes(&self) -> impl Iterator<Item = ChangeHash> {
        self.missing.iter().filter_map(|place| self.headers.get(*place as usize)).map(|header| header.hash)
    }
}

/// By entity.
pub(crate) type Salvage = BTreeMap<EntityHash, Beyond>;

impl Device {
    /// What this device holds beyond `admitted`.
    fn salvage(&self, admitted: &BTreeSet<ChangeHash>) -> Salvage {
        let mut salvage = Salvage::new();
        let found = self.disk.scan(View::Latest, Keyspace::HEADER, &[], &[], usize::MAX).unwrap_or_default();
        for (key, bytes) in found {
            // A workspace's prefix, the entity, and the place.
            let Some(entity) = key.get(16..32).and_then(|hash| hash.try_into().ok()) else { continue };
            let Ok(record) = codec::decode::<HeaderRecord>(&bytes, "a header") else { continue };
            let beyond = salvage.entry(EntityHash(entity)).or_default();
            let header = Header::from(record);
            if !admitted.contains(&header.hash) {
                beyond.missing.insert(beyond.headers.len() as u32);
            }
            beyond.headers.push(header);
        }
        salvage.retain(|_, beyond| !beyond.missing.is_empty());
        salvage
    }

    /// The changes in the outbox, with the entities that they are of.
    fn queued(&self) -> BTreeMap<ChangeHash, EntityKey> {
        let name = |record: &serde_json::Value| {
            let key = EntityKey::new(record["type_name"].as_str()?, record["id"].as_str()?).ok()?;
            Some((ChangeHash(serde_json::from_value(record["hash"].clone()).ok()?), key))
        };
        self.disk.outbox().iter().filter_map(|(_, record)| name(record)).collect()
    }

    /// The entities that one refers to.
    fn parents(&self, key: &EntityKey) -> Vec<EntityKey> {
        let (Some(ty), Ok(Some(row))) = (self.ty(key), self.rows().get(key)) else { return Vec::new() };
        let parent = |(name, to): (&str, &str)| EntityKey::new(to, row.fields.get(name)?.as_str()?).ok();
        let refs = ty.fields.values().filter_map(|field| match &field.ty {
            FieldType::Scalar(ScalarType::Ref(to)) => Some((field.name.as_str(), to.as_str())),
            _ => None,
        });
        refs.filter_map(parent).collect()
    }
}

impl Cluster {
    /// Holds every device to what it owes a relay that went back. Returns what each holds beyond `admitted`.
    pub(crate) fn check_salvage(&mut self, admitted: &BTreeSet<ChangeHash>) -> Vec<Salvage> {
        let salvages: Vec<Salvage> = self.devices.iter().map(|device| device.salvage(admitted)).collect();
        let names = self.names();
        for (device, salvage) in salvages.iter().enumerate() {
            let wrong = self.owed(device, salvage, &names);
            self.ledger.wrong.extend(wrong);
            self.report.count("entities lacking at the relay", salvage.len() as u64);
        }
        salvages
    }

    fn names(&self) -> BTreeMap<EntityHash, EntityKey> {
        let keys = self.ledger.promises.iter().map(|promise| &promise.key).chain(self.strangers.values());
        keys.map(|key| (EntityHash::of(&Self::workspace(), key), key.clone())).collect()
    }

    /// What a device fails to do of what it owes.
    fn owed(&self, device: usize, salvage: &Salvage, names: &BTreeMap<EntityHash, EntityKey>) -> Vec<String> {
        let this = &self.devices[device];
        let Some(replica) = &this.replica else { return Vec::new() };
        let queued = this.queued();
        let mut wrong = Vec::new();
        let mut lacking = 0;
        let mut blocked: BTreeSet<EntityHash> = BTreeSet::new();
        for (entity, beyond) in salvage {
            let idle: Vec<&Header> = beyond
                .missing
                .iter()
                .filter_map(|place| beyond.headers.get(*place as usize))
                .filter(|header| !queued.contains_key(&header.hash))
                .collect();
            lacking += u64::from(!idle.is_empty());
            for header in idle {
                blocked.insert(*entity);
                if self.may_bring(device, names.get(entity), header) && !self.is_torn(device, salvage, header)
                {
                    let key = names.get(entity).map(ToString::to_string);
                    wrong.push(format!("device {device} does not bring back {} of {key:?}", header.hash));
                }
            }
        }
        let counted = replica.status().lacking;
        if counted != lacking {
            wrong
                .push(format!("device {device} counts {counted} entities lacking at the relay of {lacking}"));
        }
        self.spread(device, salvage, &queued, &mut blocked);
        for (change, key) in &queued {
            if !blocked.contains(&EntityHash::of(&Self::workspace(), key)) {
                wrong.push(format!("{change} of {key} waits on device {device} for nothing"));
            }
        }
        wrong
    }

    /// Whether the relay would take a change from a device.
    fn may_bring(&self, device: usize, key: Option<&EntityKey>, header: &Header) -> bool {
        let this = &self.devices[device];
        let author = self.ledger.made.get(&header.hash).map(|made| self.ledger.promises[made.promise].device);
        let known = key.is_some_and(|key| this.ty(key).is_some());
        known
            && match this.role {
                GrantRole::Authority => true,
                GrantRole::Admin => header.role == Role::Device,
                GrantRole::Writer => author == Some(device) && header.role == Role::Device,
                GrantRole::Reader => false,
            }
    }

    /// Whether a device has not all members of a change's transaction to bring.
    fn is_torn(&self, device: usize, salvage: &Salvage, header: &Header) -> bool {
        let Some(tx) = header.tx else { return false };
        let members = salvage.values().filter(|beyond| {
            let mut missing = beyond.missing.iter().filter_map(|place| beyond.headers.get(*place as usize));
            missing.any(|other| other.tx == Some(tx) && self.may_bring_any(device, other))
        });
        members.count() < tx.members as usize
    }

    /// As [`Cluster::may_bring`], whatever the entity.
    fn may_bring_any(&self, device: usize, header: &Header) -> bool {
        let promise = self.ledger.made.get(&header.hash).map(|made| &self.ledger.promises[made.promise]);
        self.may_bring(device, promise.map(|promise| &promise.key), header)
    }

    /// What waits for what is blocked is blocked: members of transactions, and what refers to it.
    fn spread(
        &self,
        device: usize,
        salvage: &Salvage,
        queued: &BTreeMap<ChangeHash, EntityKey>,
        blocked: &mut BTreeSet<EntityHash>,
    ) {
        let place = |key: &EntityKey| EntityHash::of(&Self::workspace(), key);
        let mut waits: BTreeSet<(EntityHash, EntityHash)> = BTreeSet::new();
        let mut members: BTreeMap<[u8; 16], BTreeSet<EntityHash>> = BTreeMap::new();
        for (entity, beyond) in salvage {
            let missing = beyond.missing.iter().filter_map(|place| beyond.headers.get(*place as usize));
            for tx in
                missing.filter(|header| queued.contains_key(&header.hash)).filter_map(|header| header.tx)
            {
                members.entry(tx.id).or_default().insert(*entity);
            }
        }
        for together in members.values() {
            waits.extend(together.iter().flat_map(|one| together.iter().map(|other| (*one, *other))));
        }
        for key in queued.values().collect::<BTreeSet<_>>() {
            waits.extend(self.devices[device].parents(key).iter().map(|parent| (place(key), place(parent))));
        }
        loop {
            let before = blocked.len();
            let more: Vec<EntityHash> =
                waits.iter().filter(|(_, on)| blocked.contains(on)).map(|(one, _)| *one).collect();
            blocked.extend(more);
            if blocked.len() == before {
                return;
            }
        }
    }
}
