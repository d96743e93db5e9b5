//! An entity: one Automerge document, pure.
//!
//! `(snapshot, changes or edits, schema) → new state`. Nothing here reads a clock, draws
//! entropy or touches a store, so that work on different entities can run side by side and a
//! run can be repeated to the byte: actor and time are set before every commit.

mod base;
mod document;
mod edit;
mod rebuild;
mod resolve;

use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};

use automerge::ChangeHash;

use crate::admission::{self, Context, Judge, Refusal, RefusalCode};
use crate::change::Change;
use crate::genesis::{Genesis, GenesisKind, NAMED_CONTAINERS_MAX};
use crate::header::HeaderIndex;
use crate::id::{Author, EntityKey, WorkspaceId};
use crate::schema::{EntityType, FIELDS_MAX};
use crate::wire::EntityChanges;

#[cfg(feature = "light")]
pub use document::light::set as set_light_bodies;
pub use edit::{Again, EditContext, EditError, Edited};
pub use rebuild::{Pending, Rebuilt, Rewritten};
pub use resolve::{Conflict, ConflictKind, Row, Side, WHOLE_ENTITY};

use document::Document;
use resolve::Reader;

/// An entity in memory: its document, its header index, its containers.
#[derive(Clone, Debug)]
pub struct Entity {
    workspace: WorkspaceId,
    key: EntityKey,
    doc: Document,
    headers: HeaderIndex,
    /// Containers by field: those of the type, and those that peers named.
    genesis: BTreeMap<String, Genesis>,
    /// Fields whose genesis change is in the document.
    begun: BTreeSet<String>,
    /// Bytes of the snapshot and of the changes after it: how long a proof takes goes with them.
    weight: usize,
    /// Whether what came last from outside was proved to load again.
    proved: bool,
}

/// Documents lighter than this are proved to load again with everything that comes from outside;
/// heavier ones when they are folded, since the proof then takes milliseconds.
const PROVE_BELOW_BYTES: usize = 64 * 1024;

/// Why a stored entity can't be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the document of {entity} {what}")]
pub struct LoadError {
    entity: EntityKey,
    what: String,
}

/// The document can't hold a change.
struct Unloadable;

/// What became of changes that were received.
#[derive(Clone, Debug, Default)]
pub struct Received {
    /// Applied now, in causal order.
    pub applied: Vec<ChangeHash>,
    /// Known before.
    pub known: Vec<ChangeHash>,
    /// Refused, each with its reason. Nothing of them is in the document.
    pub refused: Vec<(ChangeHash, Refusal)>,
}

impl Entity {
    /// An entity without changes.
    pub fn new(workspace: &WorkspaceId, key: &EntityKey, ty: Option<&EntityType>) -> Self {
        Self {
            workspace: workspace.clone(),
            key: key.clone(),
            doc: Document::new(),
            headers: HeaderIndex::new(),
            genesis: known_containers(key, ty, &[]),
            begun: BTreeSet::new(),
            weight: 0,
            proved: true,
        }
    }

    /// From a snapshot, the changes stored after it, and the header index. `named` are the
    /// containers that peers named beyond the type's own.
    pub fn load(
        workspace: &WorkspaceId,
        key: &EntityKey,
        ty: Option<&EntityType>,
        snapshot: &[u8],
        increments: &[Vec<u8>],
        headers: HeaderIndex,
        named: &[(String, u8)],
    ) -> Result<Self, LoadError> {
        let fail = |what: String| LoadError { entity: key.clone(), what };
        let genesis = known_containers(key, ty, named);
        let doc = catch_unwind(AssertUnwindSafe(|| {
            let mut doc = if snapshot.is_empty() { Document::new() } else { Document::load(snapshot)? };
            let changes: Result<Vec<_>, _> =
                increments.iter().map(|bytes| automerge::Change::try_from(&bytes[..])).collect();
            let changes = changes.map_err(|error| error.to_string())?;
            // Containers that began after the snapshot are in neither.
            let begins = |genesis: &&Genesis| {
                !doc.has(&genesis.hash) && changes.iter().any(|change| change.deps().contains(&genesis.hash))
            };
            let mut all: Vec<_> = genesis.values().filter(begins).map(|g| g.change().clone()).collect();
            all.extend(changes);
            doc.apply(all)?;
            Ok::<_, document::DocumentError>(doc)
        }))
        .map_err(|_| fail("makes the document library panic".into()))?
        .map_err(|error| fail(format!("can't be loaded: {error}")))?;
        let mut entity = Self {
            workspace: workspace.clone(),
            key: key.clone(),
            doc,
            headers,
            genesis,
            begun: BTreeSet::new(),
            weight: snapshot.len() + increments.iter().map(Vec::len).sum::<usize>(),
            proved: false,
        };
        let begun = entity.genesis.values().filter(|g| entity.doc.has(&g.hash));
        entity.begun = begun.map(|g| g.field.clone()).collect();
        if entity.headers.headers().iter().any(|h| !entity.doc.has(&h.hash)) {
            return Err(fail("lacks changes that its header index has".into()));
        }
        Ok(entity)
    }

    /// The whole document as one snapshot.
    pub fn save(&self) -> Vec<u8> {
        self.doc.save()
    }

    /// The snapshot, after proof that it loads to the same document.
    pub fn save_proved(&self) -> Result<Vec<u8>, LoadError> {
        let saved = self.doc.save_proved();
        saved.map_err(|what| LoadError { entity: self.key.clone(), what: what.to_owned() })
    }

    /// Whether [`Entity::save_proved`] is known to succeed, so that [`Entity::save`] will do.
    pub(crate) fn is_proved(&self) -> bool {
        self.proved
    }

    /// The entity's name.
    pub fn key(&self) -> &EntityKey {
        &self.key
    }

    /// Its header index.
    pub fn headers(&self) -> &HeaderIndex {
        &self.headers
    }

    /// Its version: the changes that nothing else builds on.
    pub fn heads(&self) -> Vec<ChangeHash> {
        self.headers.heads()
    }

    /// Marks changes as admitted by the relay. Returns the places that were not so before.
    pub fn admit(&mut self, hashes: &[ChangeHash]) -> Vec<u32> {
        hashes.iter().filter_map(|hash| self.headers.admit(hash)).collect()
    }

    /// Marks every change as not admitted: the relay has lost what it had.
    pub fn forget_admission(&mut self) {
        self.headers.forget_admission();
    }

    /// What people see.
    pub fn row(&self, ty: &EntityType) -> Row {
        self.reader(None).row(ty)
    }

    /// Whether it is deleted.
    pub fn is_deleted(&self) -> bool {
        matches!(self.reader(None).life(), resolve::Life::Deleted { .. })
    }

    /// What someone saw who read the version `heads`.
    pub fn row_at(&self, ty: &EntityType, heads: &[ChangeHash]) -> Row {
        self.reader(Some(heads)).row(ty)
    }

    fn reader<'a>(&'a self, at: Option<&'a [ChangeHash]>) -> Reader<'a> {
        Reader { doc: &self.doc, headers: &self.headers, at }
    }

    /// Changes in causal order.
    pub fn changes(&self, hashes: &BTreeSet<ChangeHash>) -> Vec<Change> {
        self.raw_changes(|hash| hashes.contains(hash))
            .into_iter()
            .filter_map(|raw| Change::from_raw(raw).ok())
            .collect()
    }

    /// Changes in causal order. To write out one change the library walks over the whole
    /// document, and it needs no longer for many: so they are asked for together.
    fn raw_changes(&self, wanted: impl Fn(&ChangeHash) -> bool) -> Vec<automerge::Change> {
        let headers = self.headers.headers();
        let Some(first) = headers.iter().find(|header| wanted(&header.hash)) else { return Vec::new() };
        let before: Vec<ChangeHash> =
            first.deps.iter().filter_map(|dep| self.headers.get(*dep)).map(|header| header.hash).collect();
        let mut found: BTreeMap<ChangeHash, automerge::Change> =
            self.doc.changes_since(&before).into_iter().map(|change| (change.hash(), change)).collect();
        headers
            .iter()
            .filter(|header| wanted(&header.hash))
            .filter_map(|header| found.remove(&header.hash))
            .collect()
    }

    /// Changes of it as they travel in a unit.
    pub(crate) fn part(&self, changes: &[Change]) -> EntityChanges {
        EntityChanges {
            type_name: self.key.type_name().to_owned(),
            id: self.key.id().to_owned(),
            genesis: self.genesis_of(changes),
            changes: changes.iter().map(|change| change.bytes().to_vec()).collect(),
            signature: Vec::new(),
        }
    }

    /// The containers that `changes` depend on directly, for receivers that don't know them.
    pub fn genesis_of(&self, changes: &[Change]) -> Vec<(String, u8)> {
        self.genesis
            .values()
            .filter(|genesis| changes.iter().any(|change| change.deps().contains(&genesis.hash)))
            .map(|genesis| (genesis.field.clone(), genesis.kind.code()))
            .collect()
    }

    /// Adds containers that a peer named. Unknown kinds, and more than a relay takes up, are passed
    /// over: the changes that need them will miss a dependency.
    pub fn name_containers(&mut self, named: &[(String, u8)]) {
        for (field, code) in named {
            if self.genesis.len() < FIELDS_MAX + NAMED_CONTAINERS_MAX
                && !self.genesis.contains_key(field)
                && let Some(genesis) = Genesis::named(self.key.type_name(), field, *code)
            {
                self.genesis.insert(field.clone(), genesis);
            }
        }
    }

    /// Containers beyond those that the type has, for storage.
    pub fn named_containers(&self) -> Vec<(String, u8)> {
        self.genesis.values().map(|genesis| (genesis.field.clone(), genesis.kind.code())).collect()
    }

    /// Takes changes that came from outside, in any order. Each is judged (tier 1), then
    /// applied where a panic is caught (tier 2). A change that is refused, and all that build
    /// on it, leave no trace in the document.
    pub fn receive(
        &mut self,
        changes: Vec<Change>,
        ty: Option<&EntityType>,
        judge: Judge,
        admitted: bool,
    ) -> Received {
        // All at once first: the library needs little longer for many changes than for one.
        // If the document can't hold them all, each is tried for itself.
        let before = self.headers.len();
        match self.receive_together(changes.clone(), ty, judge, admitted) {
            Ok(received) => received,
            Err(Unloadable) => {
                self.headers.truncate(before);
                self.receive_each(changes, ty, judge, admitted)
            }
        }
    }

    fn receive_together(
        &mut self,
        changes: Vec<Change>,
        ty: Option<&EntityType>,
        judge: Judge,
        admitted: bool,
    ) -> Result<Received, Unloadable> {
        let mut accepted = Vec::with_capacity(changes.len());
        let received = self.sort_out(changes, |entity, change| {
            let author = entity.judge(change, ty, judge)?;
            entity.headers.push(change, author, admitted);
            accepted.push(change.clone());
            Ok(())
        });
        if !accepted.is_empty() {
            self.apply(&accepted)?;
        }
        Ok(received)
    }

    fn receive_each(
        &mut self,
        changes: Vec<Change>,
        ty: Option<&EntityType>,
        judge: Judge,
        admitted: bool,
    ) -> Received {
        self.sort_out(changes, |entity, change| {
            let author = entity.judge(change, ty, judge)?;
            entity
                .apply(std::slice::from_ref(change))
                .map_err(|Unloadable| Refusal::new(RefusalCode::Unloadable, "the document can't hold it"))?;
            entity.headers.push(change, author, admitted);
            Ok(())
        })
    }

    /// Takes changes in causal order, as far as what they build on is known.
    fn sort_out(
        &mut self,
        changes: Vec<Change>,
        mut take: impl FnMut(&mut Self, &Change) -> Result<(), Refusal>,
    ) -> Received {
        let mut received = Received::default();
        let mut open = changes;
        loop {
            let mut waiting = Vec::new();
            let mut progress = false;
            for change in open {
                if self.headers.contains(&change.hash()) {
                    received.known.push(change.hash());
                    continue;
                }
                if change.deps().iter().any(|dep| !self.knows(dep)) {
                    waiting.push(change);
                    continue;
                }
                match take(self, &change) {
                    Ok(()) => {
                        progress = true;
                        received.applied.push(change.hash());
                    }
                    Err(refusal) => received.refused.push((change.hash(), refusal)),
                }
            }
            open = waiting;
            if !progress || open.is_empty() {
                break;
            }
        }
        for change in open {
            let lost = received.refused.iter().any(|(hash, _)| change.deps().contains(hash));
            let refusal = if lost {
                Refusal::new(RefusalCode::DependsOnRefused, "it builds on a change that was refused")
            } else {
                Refusal::new(RefusalCode::MissingDependency, "something it builds on is not known here")
            };
            received.refused.push((change.hash(), refusal));
        }
        received
    }

    /// Whether all that a change builds on is here or in `with`.
    pub(crate) fn has_deps_of(&self, change: &Change, with: &BTreeSet<ChangeHash>) -> bool {
        change.deps().iter().all(|dep| with.contains(dep) || self.knows(dep))
    }

    fn knows(&self, dep: &ChangeHash) -> bool {
        self.headers.contains(dep) || self.genesis.values().any(|genesis| genesis.hash == *dep)
    }

    /// Tier 2: applies judged changes where a panic is caught. If the document can't hold them
    /// it is put back to what it was before.
    fn apply(&mut self, changes: &[Change]) -> Result<(), Unloadable> {
        let mut raw: Vec<automerge::Change> = Vec::new();
        let mut begun = Vec::new();
        for genesis in self.genesis.values().filter(|genesis| !self.begun.contains(&genesis.field)) {
            if changes.iter().any(|change| change.deps().contains(&genesis.hash)) {
                begun.push(genesis.field.clone());
                raw.push(genesis.change().clone());
            }
        }
        raw.extend(changes.iter().map(|change| change.raw().clone()));
        let before = self.doc.heads();
        let weight = self.weight + changes.iter().map(|change| change.bytes().len()).sum::<usize>();
        let light = weight < PROVE_BELOW_BYTES;
        let copy = light.then(|| self.doc.clone());
        let doc = &mut self.doc;
        let applied = catch_unwind(AssertUnwindSafe(|| {
            doc.apply(raw).is_ok() && changes.iter().all(|change| doc.has(&change.hash()))
        }));
        if !matches!(applied, Ok(true)) || (light && self.save_proved().is_err()) {
            match copy {
                Some(copy) => self.doc = copy,
                None => self.restore(&before).map_err(|_| Unloadable)?,
            }
            return Err(Unloadable);
        }
        self.begun.extend(begun);
        self.weight = weight;
        self.proved = light;
        Ok(())
    }

    /// Builds the document again without what came after `heads`.
    fn restore(&mut self, heads: &[ChangeHash]) -> Result<(), LoadError> {
        let fail = || LoadError { entity: self.key.clone(), what: "can't be restored after a panic".into() };
        let doc = catch_unwind(AssertUnwindSafe(|| self.doc.fork_at(heads)))
            .map_err(|_| fail())?
            .map_err(|_| fail())?;
        self.doc = doc;
        Ok(())
    }

    /// Judges a change without taking it.
    pub fn judge(&self, change: &Change, ty: Option<&EntityType>, judge: Judge) -> Result<Author, Refusal> {
        let context = Context {
            workspace: &self.workspace,
            entity: &self.key,
            ty,
            genesis: &self.genesis,
            headers: &self.headers,
            targets: None,
            judge,
        };
        admission::judge(change, &context)
    }
}

fn known_containers(
    key: &EntityKey,
    ty: Option<&EntityType>,
    named: &[(String, u8)],
) -> BTreeMap<String, Genesis> {
    let mut known: BTreeMap<String, Genesis> =
        ty.map(Genesis::all).unwrap_or_default().into_iter().map(|g| (g.field.clone(), g)).collect();
    for (field, code) in named {
        if let Some(kind) = GenesisKind::from_code(*code) {
            known.entry(field.clone()).or_insert_with(|| Genesis::new(key.type_name(), field, kind));
        }
    }
    known
}
