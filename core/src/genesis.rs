//! Genesis changes: the containers of an entity, made the same by everyone.
//!
//! Two devices that each create a container at one key lose a subtree, and two counters
//! created at one key conflict instead of summing. So containers are never created by
//! devices: each comes from a change whose bytes follow from (type, field, kind) alone. It
//! has no dependencies and time 0, and never travels: a receiver makes it again. There is one per container, so that a later
//! schema can add its own.

use std::num::NonZeroU64;

use automerge::legacy::{Key, ObjectId, Op, OpId, OpType, SortedVec};
use automerge::{ActorId, Change as RawChange, ChangeHash, ExpandedChange, ObjType, ScalarValue};

use crate::schema::{EntityType, FieldKind};
use crate::shape::RootKey;

/// Most containers that devices may name for an entity beyond those of its type; more are not taken up.
pub(crate) const NAMED_CONTAINERS_MAX: usize = 256;

/// What a genesis change makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum GenesisKind {
    /// A counter at zero.
    Counter,
    /// The map that holds a set's elements.
    Set,
    /// A list.
    List,
    /// A map.
    Map,
    /// A text.
    Text,
}

impl GenesisKind {
    /// The number that is hashed, stored and sent.
    pub fn code(self) -> u8 {
        match self {
            GenesisKind::Counter => 1,
            GenesisKind::Set => 2,
            GenesisKind::List => 3,
            GenesisKind::Map => 4,
            GenesisKind::Text => 5,
        }
    }

    /// From its number.
    pub fn from_code(code: u8) -> Option<Self> {
        [Self::Counter, Self::Set, Self::List, Self::Map, Self::Text].into_iter().find(|k| k.code() == code)
    }

    /// The container that a field of this kind needs.
    pub fn of(kind: FieldKind) -> Option<Self> {
        match kind {
            FieldKind::Register | FieldKind::GroupMember => None,
            FieldKind::Counter => Some(Self::Counter),
            FieldKind::Set => Some(Self::Set),
            FieldKind::List => Some(Self::List),
            FieldKind::Map => Some(Self::Map),
            FieldKind::Text => Some(Self::Text),
        }
    }
}

/// One container's beginning.
#[derive(Clone, Debug)]
pub struct Genesis {
    /// The field.
    pub field: String,
    /// What it makes.
    pub kind: GenesisKind,
    /// The change's hash.
    pub hash: ChangeHash,
    /// The change's actor; its one operation is number 1.
    pub actor: ActorId,
    change: RawChange,
}

impl Genesis {
    /// The genesis of `field` in entities of `type_name`.
    pub fn new(type_name: &str, field: &str, kind: GenesisKind) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key("anabranch 2026 genesis v1");
        for part in [type_name, field] {
            hasher.update(&(part.len() as u32).to_be_bytes());
            hasher.update(part.as_bytes());
        }
        hasher.update(&[kind.code()]);
        let actor = ActorId::from(&hasher.finalize().as_bytes()[..16]);
        let action = match kind {
            GenesisKind::Counter => OpType::Put(ScalarValue::counter(0)),
            GenesisKind::Set | GenesisKind::Map => OpType::Make(ObjType::Map),
            GenesisKind::List => OpType::Make(ObjType::List),
            GenesisKind::Text => OpType::Make(ObjType::Text),
        };
        let op = Op {
            action,
            obj: ObjectId::Root,
            key: Key::Map(field.into()),
            pred: SortedVec::new(),
            insert: false,
        };
        let change = RawChange::from(ExpandedChange {
            operations: vec![op],
            actor_id: actor.clone(),
            hash: None,
            seq: 1,
            start_op: NonZeroU64::MIN,
            time: 0,
            message: None,
            deps: Vec::new(),
            extra_bytes: Vec::new(),
            author: None,
        });
        Self { field: field.to_owned(), kind, hash: change.hash(), actor, change }
    }

    /// The container that a peer named for entities of `type_name`; none if it is no field or no kind
    /// that is known.
    pub(crate) fn named(type_name: &str, field: &str, code: u8) -> Option<Self> {
        let kind = GenesisKind::from_code(code)?;
        let fits = matches!(RootKey::parse(field), Some(RootKey::Field { shadow: false, .. }));
        fits.then(|| Self::new(type_name, field, kind))
    }

    /// All containers that entities of `ty` can have, in order of field names.
    pub fn all(ty: &EntityType) -> Vec<Self> {
        ty.fields
            .values()
            .filter_map(|field| Some(Self::new(&ty.name, &field.name, GenesisKind::of(field.kind())?)))
            .collect()
    }

    /// The change, to be applied.
    pub fn change(&self) -> &RawChange {
        &self.change
    }

    /// The id of what it makes.
    pub fn op_id(&self) -> OpId {
        OpId::new(1, &self.actor)
    }

    /// Whether `id` names what it makes.
    pub fn made(&self, id: &OpId) -> bool {
        id.counter() == 1 && *id.actor() == self.actor
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The bytes go into every document of every device: they can never change.
    #[test]
    fn genesis_bytes_are_frozen() {
        let hashes: Vec<String> =
            [GenesisKind::Counter, GenesisKind::Set, GenesisKind::List, GenesisKind::Map, GenesisKind::Text]
                .into_iter()
                .map(|kind| Genesis::new("note", "body", kind).hash.to_string())
                .collect();
        assert_eq!(hashes, include_str!("../golden/genesis.txt").lines().collect::<Vec<_>>());
    }

    #[test]
    fn genesis_differs_by_type_field_and_kind() {
        let one = Genesis::new("note", "body", GenesisKind::Text);
        for other in [
            Genesis::new("notes", "body", GenesisKind::Text),
            Genesis::new("note", "tags", GenesisKind::Text),
            Genesis::new("note", "body", GenesisKind::List),
        ] {
            assert_ne!(one.hash, other.hash);
            assert_ne!(one.actor, other.actor);
        }
    }
}
