//! Admission, tier 1: what a change may be, judged without loading the document.
//!
//! Changes with valid checksums can panic Automerge or leave a document that no longer
//! loads. So every change from outside is first held against the header index, the
//! author's identity, and the schema. Because devices never create objects (see
//! [`genesis`](crate::genesis)), the target of each operation is known from its id alone.

use std::cell::OnceCell;
use std::collections::{BTreeMap, BTreeSet};

use automerge::legacy::{Key, ObjectId, Op, OpId, OpType};
use automerge::{ActorId, ChangeHash, ScalarValue};
use serde_json::Value as Json;

use crate::change::{Change, Role};
use crate::clock::{Hlc, WallMs};
use crate::genesis::{Genesis, GenesisKind};
use crate::header::{HeaderIndex, Past};
use crate::id::{Author, DeviceId, EntityKey, WorkspaceId};
use crate::schema::{EntityType, Field, FieldKind, Policy, check_json};
use crate::shape::{self, RootKey};
use crate::targets::{ChangeTargets, Mark, Place, Targets};

/// How far ahead of the relay's clock a change may be, in milliseconds.
pub const AHEAD_MS_MAX: u64 = 5 * 60 * 1000;
/// Largest absolute increment of a counter, so that no honest sum overflows 64 bits.
pub const INCREMENT_MAX: i64 = 1_000_000_000_000;
/// Most derived actors that one author needs for edits based on older versions.
const CONCURRENCY_LEVEL_MAX: u64 = 100_000;
/// What Automerge puts before an actor to derive another for an isolated edit.
const DERIVED_ACTOR_MAGIC: [u8; 4] = [0x13, 0xb2, 0x23, 0x09];

/// Why a change was refused. The numbers go over the wire and are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u16)]
#[non_exhaustive]
pub enum RefusalCode {
    /// The bytes are not a change.
    Malformed = 1,
    /// The actor is not the one that the author has in this entity.
    ForgedActor = 2,
    /// The author is not the device that signed in.
    ForgedAuthor = 3,
    /// The role in the change is not the author's.
    ForgedRole = 4,
    /// The sequence of the actor's changes has a gap or a fork.
    BadSequence = 5,
    /// Something it depends on is not known here.
    MissingDependency = 6,
    /// Its time is too far ahead of the relay's clock.
    ClockAhead = 7,
    /// Its time or operation counter is not above what it depends on.
    OutOfOrder = 8,
    /// An operation does not fit the shape of entities.
    BadShape = 9,
    /// The schema has no such type or field.
    UnknownField = 10,
    /// A value breaks a rule of the schema.
    Validation = 11,
    /// The role may not write this.
    Forbidden = 12,
    /// It depends on a refused change.
    DependsOnRefused = 13,
    /// Another member of its transaction was refused.
    Transaction = 14,
    /// The document cannot hold it.
    Unloadable = 15,
    /// A limit was reached.
    Quota = 16,
    /// The relay has the edit as another change of the same device, whose store went back.
    Superseded = 17,
}

impl RefusalCode {
    /// From its number.
    pub fn from_u16(code: u16) -> Option<Self> {
        use RefusalCode::*;
        [
            Malformed,
            ForgedActor,
            ForgedAuthor,
            ForgedRole,
            BadSequence,
            MissingDependency,
            ClockAhead,
            OutOfOrder,
            BadShape,
            UnknownField,
            Validation,
            Forbidden,
            DependsOnRefused,
            Transaction,
            Unloadable,
            Quota,
            Superseded,
        ]
        .into_iter()
        .find(|known| *known as u16 == code)
    }

    /// The name that programs see.
    pub fn name(self) -> &'static str {
        match self {
            RefusalCode::Malformed => "malformed",
            RefusalCode::ForgedActor => "forged_actor",
            RefusalCode::ForgedAuthor => "forged_author",
            RefusalCode::ForgedRole => "forged_role",
            RefusalCode::BadSequence => "bad_sequence",
            RefusalCode::MissingDependency => "missing_dependency",
            RefusalCode::ClockAhead => "clock_ahead",
            RefusalCode::OutOfOrder => "out_of_order",
            RefusalCode::BadShape => "bad_shape",
            RefusalCode::UnknownField => "unknown_field",
            RefusalCode::Validation => "validation",
            RefusalCode::Forbidden => "forbidden",
            RefusalCode::DependsOnRefused => "depends_on_refused",
            RefusalCode::Transaction => "transaction",
            RefusalCode::Unloadable => "unloadable",
            RefusalCode::Quota => "quota",
            RefusalCode::Superseded => "superseded",
        }
    }
}

/// Why a change was refused, for programs and for people.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// For programs.
    pub code: RefusalCode,
    /// For people.
    pub message: String,
}

impl Refusal {
    /// A refusal.
    pub fn new(code: RefusalCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }
}

fn refuse<T>(code: RefusalCode, message: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal::new(code, message))
}

/// For whose changes a session speaks. Changes are not signed, so whoever brings another device's
/// change, to a relay that lost it, has to be trusted to have it from there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vouches {
    /// For the device's own, in the role of its grant.
    Own,
    /// For those of any device, in the role of the grant: an admin's word makes no reference data.
    Devices,
    /// For anyone's in any role: an authority could have written them itself.
    Anyone,
}

/// By whose authority a change is offered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Judge {
    /// The relay, judging what a signed-in device submits.
    Relay {
        /// The device whose session it is.
        device: DeviceId,
        /// The role of its grant.
        role: Role,
        /// Whose changes it may bring.
        vouches: Vouches,
        /// The relay's clock.
        now: WallMs,
    },
    /// A device taking what the relay has already admitted: time, role and schema are not
    /// judged again, so that a wrong clock or an older schema here refuses nobody.
    Admitted,
}

/// Everything that a change is judged against.
#[derive(Clone, Copy, Debug)]
pub struct Context<'a> {
    /// The workspace.
    pub workspace: &'a WorkspaceId,
    /// The entity.
    pub entity: &'a EntityKey,
    /// Its type, where this side knows one.
    pub ty: Option<&'a EntityType>,
    /// The containers that the entity can have: all of its type's, and what peers named.
    pub genesis: &'a BTreeMap<String, Genesis>,
    /// What the entity holds.
    pub headers: &'a HeaderIndex,
    /// Where the operations of that acted, on a side that has no document to know it by.
    pub targets: Option<&'a Targets>,
    /// Who judges.
    pub judge: Judge,
}

/// Judges one change. Its dependencies must have been pushed to the index before.
/// Returns the author of its actor.
pub fn judge(change: &Change, context: &Context<'_>) -> Result<Author, Refusal> {
    judge_and_mark(change, context).map(|(author, _)| author)
}

/// Like [`judge`]. Returns also where the change's operations act, if the context keeps that.
pub fn judge_and_mark(change: &Change, context: &Context<'_>) -> Result<(Author, ChangeTargets), Refusal> {
    let author = identity(change, context)?;
    let first = causality(change, context)?;
    if let Judge::Relay { device, role, vouches, now } = context.judge {
        if author.device != device && vouches == Vouches::Own {
            return refuse(
                RefusalCode::ForgedAuthor,
                "the change was written by another device than the one that sent it",
            );
        }
        if change.note().role != role && vouches != Vouches::Anyone {
            return refuse(RefusalCode::ForgedRole, "the change claims a role that its device does not have");
        }
        let limit = Hlc::from_wall(WallMs(now.0.saturating_add(AHEAD_MS_MAX)));
        if change.time() > limit {
            return refuse(
                RefusalCode::ClockAhead,
                format!(
                    "the change is dated {} s ahead of the relay",
                    (change.time().wall().0 - now.0) / 1000
                ),
            );
        }
    }
    let checked = matches!(context.judge, Judge::Relay { .. });
    let targets = operations(change, context, checked, first)?;
    Ok((author, targets))
}

fn identity(change: &Change, context: &Context<'_>) -> Result<Author, Refusal> {
    let author = match (change.author(), context.headers.actor(change.actor())) {
        (Some(author), None) => author,
        (None, Some(entry)) => entry.author,
        (Some(_), Some(_)) => {
            return refuse(
                RefusalCode::BadSequence,
                "the actor has begun twice: two histories share one identity",
            );
        }
        (None, None) => {
            return refuse(RefusalCode::MissingDependency, "the actor's first change is not known");
        }
    };
    if !is_actor_of(change.actor(), author, context.workspace, context.entity) {
        return refuse(
            RefusalCode::ForgedActor,
            "the actor is not the one that this device has in this entity",
        );
    }
    Ok(author)
}

/// Whether an actor is the one that an author has in an entity, or derived from it.
pub(crate) fn is_actor_of(
    actor: &ActorId,
    author: Author,
    workspace: &WorkspaceId,
    entity: &EntityKey,
) -> bool {
    base_actor(actor) == Some(author.actor(workspace, entity).to_bytes())
}

/// The actor that Automerge derives for an isolated edit while `level` others are not covered
/// by the version that the edit is based on.
pub(crate) fn derived_actor(base: &ActorId, level: u64) -> ActorId {
    if level == 0 {
        return base.clone();
    }
    let mut bytes = DERIVED_ACTOR_MAGIC.to_vec();
    let mut rest = level;
    while rest >= 0x80 {
        bytes.push(rest as u8 | 0x80);
        rest >>= 7;
    }
    bytes.push(rest as u8);
    bytes.extend_from_slice(base.to_bytes());
    ActorId::from(bytes)
}

/// The 16 bytes that bind an actor, or those within an actor derived for an isolated edit.
fn base_actor(actor: &ActorId) -> Option<&[u8]> {
    let bytes = actor.to_bytes();
    if bytes.len() == 16 {
        return Some(bytes);
    }
    let rest = bytes.strip_prefix(&DERIVED_ACTOR_MAGIC)?;
    let (level, base) = rest.split_at_checked(rest.len().checked_sub(16)?)?;
    // A level has one spelling: LEB128 without padding.
    let mut value: u64 = 0;
    for (place, byte) in level.iter().enumerate() {
        value |= u64::from(byte & 0x7f) << (7 * place.min(8));
        let last = place + 1 == level.len();
        if last != (byte & 0x80 == 0) || (last && place > 0 && *byte == 0) {
            return None;
        }
    }
    (1..=CONCURRENCY_LEVEL_MAX).contains(&value).then_some(base)
}

/// Checks the place of a change in the graph. Returns whether it is a beginning: it depends
/// on nothing but genesis changes.
fn causality(change: &Change, context: &Context<'_>) -> Result<bool, Refusal> {
    let headers = context.headers;
    let newest = headers.actor(change.actor()).and_then(|entry| headers.get(entry.newest()?));
    let expected_seq = newest.map_or(1, |header| header.seq + 1);
    if change.seq() != expected_seq {
        return refuse(
            RefusalCode::BadSequence,
            format!("it is number {} of its actor, number {expected_seq} was expected", change.seq()),
        );
    }
    if let Some(newest) = newest
        && !change.deps().contains(&newest.hash)
    {
        return refuse(RefusalCode::BadSequence, "it does not depend on its actor's previous change");
    }
    let mut first = true;
    let mut seen = BTreeSet::new();
    for dep in change.deps() {
        if !seen.insert(dep) {
            return refuse(RefusalCode::BadShape, "it names a dependency twice");
        }
        let (max_op, time) = if let Some(header) = headers.by_hash(dep) {
            first = false;
            (header.max_op, header.time)
        } else if context.genesis.values().any(|genesis| genesis.hash == *dep) {
            (1, Hlc::ZERO)
        } else {
            return refuse(
                RefusalCode::MissingDependency,
                format!("it depends on {dep}, which is not known"),
            );
        };
        if change.start_op() <= max_op || change.time() <= time {
            return refuse(
                RefusalCode::OutOfOrder,
                "its time or counter is not above those of what it depends on",
            );
        }
    }
    Ok(first)
}

/// Where an operation acts.
enum Target<'a> {
    Root(&'a str),
    Container(&'a Genesis),
}

fn operations(
    change: &Change,
    context: &Context<'_>,
    checked: bool,
    first: bool,
) -> Result<ChangeTargets, Refusal> {
    let mut marks = Marks::new(change, context);
    let below = Below::new(change, context.headers);
    let expanded = change.expand().map_err(|e| Refusal::new(RefusalCode::Malformed, e.to_string()))?;
    let role = change.note().role;
    let mut revives = false;
    // Keys deleted and not put again: a delete alone leaves no trace to resolve by.
    let mut cleared: BTreeSet<(Option<&str>, &str)> = BTreeSet::new();
    let mut written: BTreeSet<String> = BTreeSet::new();
    // What this change has put at a key and not removed: only that is there for its next one.
    let mut standing: BTreeMap<(&ObjectId, &str), OpId> = BTreeMap::new();
    for (place, op) in expanded.operations.iter().enumerate() {
        let target = target(op, context)?;
        let mark = marks.mark(op, &target)?;
        predecessors(change, &expanded.operations[..place], op, (&target, mark), context, &below)?;
        if let Key::Map(key) = &op.key {
            let before = match op.action {
                OpType::Put(_) => {
                    let id = OpId::new(change.start_op() + place as u64, change.actor());
                    standing.insert((&op.obj, key), id)
                }
                _ => standing.remove(&(&op.obj, &**key)),
            };
            if before.is_some_and(|before| op.pred.iter().ne([&before])) {
                return refuse(RefusalCode::BadShape, "it writes a key twice, and not on top of itself");
            }
        }
        match target {
            Target::Root(key) => {
                let register = masked_register(context, key);
                if let Some(genesis) = context.genesis.get(key)
                    && (!register || matches!(op.action, OpType::Increment(_)))
                {
                    counter_op(op, genesis)?;
                    marks.needs(genesis)?;
                    if checked {
                        belongs(context, genesis)?;
                        writable(context, role, key)?;
                    }
                    written.insert(key.to_owned());
                    continue;
                }
                if let Some(genesis) = context.genesis.get(key).filter(|genesis| replaces(op, genesis)) {
                    marks.needs(genesis)?;
                }
                let root = RootKey::parse(key).ok_or_else(|| {
                    Refusal::new(RefusalCode::BadShape, format!("{key:?} is no key of an entity"))
                })?;
                match &op.action {
                    OpType::Delete => {
                        cleared.insert((None, key));
                    }
                    OpType::Put(value) => {
                        cleared.remove(&(None, key));
                        if root == RootKey::Tombstone {
                            match value {
                                ScalarValue::Boolean(true) => {}
                                ScalarValue::Boolean(false) => revives = true,
                                _ => return refuse(RefusalCode::BadShape, "a tombstone is true or false"),
                            }
                            if checked
                                && context.ty.is_some_and(EntityType::is_server_only)
                                && role != Role::Authority
                            {
                                return refuse(
                                    RefusalCode::Forbidden,
                                    format!(
                                        "entities of {} are reference data: only an authority deletes them",
                                        context.entity.type_name()
                                    ),
                                );
                            }
                        } else if let Some(ty) = context.ty.filter(|_| checked) {
                            register_put(ty, &root, value, role, &mut written)?;
                        } else if matches!(value, ScalarValue::Counter(_) | ScalarValue::Unknown { .. }) {
                            return refuse(RefusalCode::BadShape, "a register holds a plain scalar");
                        }
                    }
                    _ => {
                        return refuse(
                            RefusalCode::BadShape,
                            "devices neither create objects nor increment registers",
                        );
                    }
                }
            }
            Target::Container(genesis) => {
                if checked {
                    belongs(context, genesis)?;
                    writable(context, role, &genesis.field)?;
                }
                let field = context.ty.filter(|_| checked).and_then(|ty| ty.fields.get(&genesis.field));
                container_op(op, genesis, field, &mut cleared)?;
                written.insert(genesis.field.clone());
            }
        }
    }
    if !cleared.is_empty() {
        return refuse(RefusalCode::BadShape, "it removes a value and leaves no tombstone");
    }
    if revives != change.note().revives {
        return refuse(RefusalCode::BadShape, "its message and its operations disagree on a revival");
    }
    if checked
        && first
        && let Some(ty) = context.ty
    {
        if ty.is_server_only() && role != Role::Authority {
            return refuse(
                RefusalCode::Forbidden,
                format!("{} is reference data: only an authority creates it", ty.name),
            );
        }
        if let Some(field) = ty.fields.values().find(|f| f.required && !written.contains(&f.name)) {
            return refuse(
                RefusalCode::Validation,
                format!("{}.{} is required and has no value", ty.name, field.name),
            );
        }
    }
    Ok(marks.made)
}

/// Marks the places of a change's operations, where the context keeps such marks.
struct Marks<'a> {
    targets: Option<&'a Targets>,
    deps: Vec<u32>,
    genesis_deps: BTreeSet<ChangeHash>,
    /// Fields whose containers have begun below the change.
    begun: BTreeSet<&'a str>,
    /// Marks of sequences: a text has an operation for each letter.
    items: BTreeMap<&'a str, Mark>,
    made: ChangeTargets,
}

impl<'a> Marks<'a> {
    fn new(change: &Change, context: &Context<'a>) -> Self {
        let mut made = ChangeTargets::default();
        let (mut deps, mut genesis_deps) = (Vec::new(), BTreeSet::new());
        if context.targets.is_some() {
            for dep in change.deps() {
                match context.headers.place(dep) {
                    Some(place) => deps.push(place),
                    None => {
                        made.begin(dep);
                        genesis_deps.insert(*dep);
                    }
                }
            }
        }
        Self {
            targets: context.targets,
            deps,
            genesis_deps,
            begun: BTreeSet::new(),
            items: BTreeMap::new(),
            made,
        }
    }

    /// Refuses a change that acts on a container that has not begun below it.
    fn needs(&mut self, genesis: &'a Genesis) -> Result<(), Refusal> {
        let Some(targets) = self.targets else { return Ok(()) };
        if self.begun.contains(&*genesis.field) {
            return Ok(());
        }
        if !self.genesis_deps.contains(&genesis.hash) && !targets.has_begun(&genesis.hash, &self.deps) {
            return refuse(
                RefusalCode::BadShape,
                format!("it writes into {:?}, which had not begun where its author was", genesis.field),
            );
        }
        self.begun.insert(&genesis.field);
        Ok(())
    }

    /// The mark of the place where an operation acts.
    fn mark(&mut self, op: &Op, target: &Target<'a>) -> Result<Mark, Refusal> {
        if self.targets.is_none() {
            return Ok(Mark::NOTHING);
        }
        let mark = match (target, &op.key) {
            (Target::Root(key), _) => Mark::key(None, key),
            (Target::Container(genesis), Key::Map(key)) => Mark::key(Some(&genesis.field), key),
            (Target::Container(genesis), Key::Seq(_)) => {
                *self.items.entry(&genesis.field).or_insert_with(|| Mark::item(&genesis.field))
            }
        };
        if let Target::Container(genesis) = target {
            self.needs(genesis)?;
        }
        self.made.push(if matches!(op.action, OpType::Put(_)) { mark } else { Mark::NOTHING });
        Ok(mark)
    }
}

fn target<'a>(op: &'a Op, context: &'a Context<'_>) -> Result<Target<'a>, Refusal> {
    match (&op.obj, &op.key) {
        (ObjectId::Root, Key::Map(key)) => Ok(Target::Root(key)),
        (ObjectId::Id(id), _) => match context.genesis.values().find(|genesis| genesis.made(id)) {
            Some(genesis) => Ok(Target::Container(genesis)),
            None => refuse(
                RefusalCode::BadShape,
                "it writes into an object that entities of this type do not have",
            ),
        },
        (ObjectId::Root, Key::Seq(_)) => refuse(RefusalCode::BadShape, "the root of an entity is no list"),
    }
}

/// Checks what an operation says it replaces, or stands behind. The library believes it: an
/// operation that replaces what its author can't have seen, or what was held elsewhere, leaves a
/// document that can't be saved and loaded again.
fn predecessors(
    change: &Change,
    earlier: &[Op],
    op: &Op,
    (target, mark): (&Target<'_>, Mark),
    context: &Context<'_>,
    below: &Below<'_>,
) -> Result<(), Refusal> {
    let bad = |what: &str| refuse(RefusalCode::BadShape, what);
    let element = match &op.key {
        Key::Seq(element) => Some(element.as_opid()),
        Key::Map(_) => None,
    };
    if op.insert {
        return match element {
            None => bad("only sequences are inserted into"),
            Some(_) if op.pred.iter().next().is_some() => bad("an insertion replaces nothing"),
            Some(Some(behind)) => match seen(change, earlier, op, behind, mark, context, below) {
                Seen::Here => Ok(()),
                Seen::Elsewhere => bad("it inserts behind what is no item of that sequence"),
                Seen::Never => bad("it inserts behind what its author can't have seen"),
            },
            Some(None) => Ok(()),
        };
    }
    if matches!(op.action, OpType::Delete) && op.pred.iter().next().is_none() {
        return bad("it removes what it does not name");
    }
    // Devices never write an item anew, so nothing but its insertion can be removed.
    if let Some(element) = element
        && op.pred.iter().ne(element)
    {
        return bad("it removes an item and names another");
    }
    let mut before = None;
    for pred in op.pred.iter() {
        let order = (pred.counter(), pred.actor().to_bytes());
        if before.replace(order).is_some_and(|before| before >= order) {
            return bad("it names what it replaces twice or out of order");
        }
        // A counter is incremented on top of its genesis, which is looked at there.
        if matches!(op.action, OpType::Increment(_)) {
            continue;
        }
        // What somebody had named a container before the schema said that it is a register.
        if let Target::Root(key) = target
            && masked_register(context, key)
            && context.genesis.get(*key).is_some_and(|genesis| genesis.made(pred))
        {
            continue;
        }
        match seen(change, earlier, op, pred, mark, context, below) {
            Seen::Here => {}
            Seen::Elsewhere => return bad("it replaces what was not written there"),
            Seen::Never => return bad("it replaces what its author can't have seen"),
        }
    }
    Ok(())
}

/// What a change builds on. A change may name very many operations, and all of it is found out once,
/// when the first of them asks.
struct Below<'a> {
    headers: &'a HeaderIndex,
    deps: Vec<u32>,
    past: OnceCell<Past<'a>>,
}

impl<'a> Below<'a> {
    fn new(change: &Change, headers: &'a HeaderIndex) -> Self {
        let deps = change.deps().iter().filter_map(|dep| headers.place(dep)).collect();
        Self { headers, deps, past: OnceCell::new() }
    }

    fn contains(&self, place: u32) -> bool {
        self.past.get_or_init(|| self.headers.past(self.deps.iter().copied())).contains(place)
    }
}

/// Where the author of a change can have seen an operation.
enum Seen {
    /// Where the change names it, for all that is known.
    Here,
    Elsewhere,
    Never,
}

/// Whether the author of a change can have seen the operation `id` where `op` acts, which is at `mark`.
/// Without marks, what `id` did is known only if it is of the same change.
fn seen(
    change: &Change,
    earlier: &[Op],
    op: &Op,
    id: &OpId,
    mark: Mark,
    context: &Context<'_>,
    below: &Below<'_>,
) -> Seen {
    if id.actor() == change.actor()
        && let Some(place) = id.counter().checked_sub(change.start_op())
    {
        let own = usize::try_from(place).ok().and_then(|place| earlier.get(place));
        let in_sequence = matches!(op.key, Key::Seq(_));
        let here = own.is_some_and(|own| {
            own.obj == op.obj
                && matches!(own.action, OpType::Put(_))
                && if in_sequence { own.insert } else { own.key == op.key }
        });
        return if here { Seen::Here } else { Seen::Never };
    }
    let Some(place) = context.headers.holder(id.actor(), id.counter()) else { return Seen::Never };
    // All earlier changes of its own actor are below it.
    if id.actor() != change.actor() && !below.contains(place) {
        return Seen::Never;
    }
    match context.targets.map(|targets| targets.place(place, id.counter())) {
        None | Some(Place::Unknown) => Seen::Here,
        Some(Place::At(there)) if there == mark => Seen::Here,
        Some(Place::At(_)) => Seen::Elsewhere,
        Some(Place::Nowhere) => Seen::Never,
    }
}

/// Whether a field is a register of which somebody says that it is a container, as anyone could before the
/// schema was known here. A device with an older schema takes what the relay admitted by a newer one.
fn masked_register(context: &Context<'_>, key: &str) -> bool {
    let field = context.ty.and_then(|ty| ty.fields.get(key));
    context.genesis.contains_key(key)
        && match field {
            Some(field) => GenesisKind::of(field.kind()).is_none(),
            None => matches!(context.judge, Judge::Admitted),
        }
}

/// Whether an operation replaces the beginning of a container.
fn replaces(op: &Op, genesis: &Genesis) -> bool {
    op.pred.iter().any(|pred| genesis.made(pred))
}

/// Refuses to write into a container of which the schema says that it is something else.
fn belongs(context: &Context<'_>, genesis: &Genesis) -> Result<(), Refusal> {
    match context.ty.and_then(|ty| ty.fields.get(&genesis.field)) {
        Some(field) if GenesisKind::of(field.kind()) != Some(genesis.kind) => refuse(
            RefusalCode::BadShape,
            format!("{:?} is held as something else by the schema", genesis.field),
        ),
        _ => Ok(()),
    }
}

/// Whether the role may write a field at all, and the schema has it.
fn writable(context: &Context<'_>, role: Role, name: &str) -> Result<(), Refusal> {
    let Some(ty) = context.ty else { return Ok(()) };
    let Some(field) = ty.fields.get(name) else {
        return refuse(RefusalCode::UnknownField, format!("{} has no field {name:?}", ty.name));
    };
    if role != Role::Authority && (field.policy == Policy::ServerOnly || ty.is_server_only()) {
        return refuse(
            RefusalCode::Forbidden,
            format!("{}.{name} is reference data: only an authority writes it", ty.name),
        );
    }
    Ok(())
}

fn register_put(
    ty: &EntityType,
    root: &RootKey<'_>,
    value: &ScalarValue,
    role: Role,
    written: &mut BTreeSet<String>,
) -> Result<(), Refusal> {
    let (name, policy, shadow) = match *root {
        RootKey::Field { name, shadow } => {
            let Some(field) = ty.fields.get(name) else {
                return refuse(RefusalCode::UnknownField, format!("{} has no field {name:?}", ty.name));
            };
            if field.kind() != FieldKind::Register {
                return refuse(
                    RefusalCode::BadShape,
                    format!("{}.{name} is not held as a register", ty.name),
                );
            }
            let json = shape::scalar_to_json(field, value).ok_or_else(|| {
                Refusal::new(RefusalCode::BadShape, format!("{}.{name} has another type of value", ty.name))
            })?;
            validate(field, &json)?;
            if !json.is_null() {
                written.insert(name.to_owned());
            }
            (name, field.policy, shadow)
        }
        RootKey::Group { name, shadow } => {
            let Some(group) = ty.groups.get(name) else {
                return refuse(RefusalCode::UnknownField, format!("{} has no group {name:?}", ty.name));
            };
            let members = shape::group_from_scalar(value).ok_or_else(|| {
                Refusal::new(RefusalCode::BadShape, format!("group {name:?} is not canonical JSON"))
            })?;
            for (member, json) in &members {
                // Members that this schema does not know are kept: a newer app wrote them. Whoever reads
                // the group reads them too.
                if !ty.fields.contains_key(member)
                    && let Err(error) = check_json(json)
                {
                    return refuse(RefusalCode::Validation, format!("{}.{member}: {error}", ty.name));
                }
                if let Some(field) = ty.fields.get(member) {
                    if field.group.as_deref() != Some(name) {
                        return refuse(
                            RefusalCode::BadShape,
                            format!("{member:?} is no member of group {name:?}"),
                        );
                    }
                    validate(field, json)?;
                    if !json.is_null() {
                        written.insert(member.clone());
                    }
                }
            }
            (name, group.policy, shadow)
        }
        RootKey::Tombstone => return Ok(()),
    };
    let authority = role == Role::Authority;
    match policy {
        Policy::ServerOnly if !authority => refuse(
            RefusalCode::Forbidden,
            format!("{}.{name} is reference data: only an authority writes it", ty.name),
        ),
        Policy::ServerWins | Policy::ClientWins if shadow != authority => refuse(
            RefusalCode::Forbidden,
            format!("the register of {}.{name} belongs to the other role", ty.name),
        ),
        Policy::ServerWins | Policy::ClientWins => Ok(()),
        _ if shadow => refuse(RefusalCode::BadShape, format!("{}.{name} has no second register", ty.name)),
        _ => Ok(()),
    }
}

fn validate(field: &Field, json: &Json) -> Result<(), Refusal> {
    match field.check(json) {
        Ok(canonical) if canonical == *json => Ok(()),
        Ok(_) => {
            refuse(RefusalCode::Validation, format!("{}: the value is not in canonical form", field.name))
        }
        Err(error) => refuse(RefusalCode::Validation, error.to_string()),
    }
}

fn counter_op(op: &Op, genesis: &Genesis) -> Result<(), Refusal> {
    let OpType::Increment(by) = op.action else {
        return refuse(RefusalCode::BadShape, format!("the key {:?} belongs to a container", genesis.field));
    };
    if genesis.kind != GenesisKind::Counter || op.pred.iter().ne([&genesis.op_id()]) {
        return refuse(
            RefusalCode::BadShape,
            format!("{:?} is incremented, but is no counter", genesis.field),
        );
    }
    if by.checked_abs().is_none_or(|by| by > INCREMENT_MAX) {
        return refuse(
            RefusalCode::Validation,
            format!("{}: an increment is at most {INCREMENT_MAX}", genesis.field),
        );
    }
    Ok(())
}

fn container_op<'a>(
    op: &'a Op,
    genesis: &'a Genesis,
    field: Option<&Field>,
    cleared: &mut BTreeSet<(Option<&'a str>, &'a str)>,
) -> Result<(), Refusal> {
    let bad = || {
        Refusal::new(
            RefusalCode::BadShape,
            format!("an operation does not fit what {:?} holds", genesis.field),
        )
    };
    let own_ids = |id: &OpId| *id.actor() != genesis.actor;
    match (genesis.kind, &op.key, &op.action, op.insert) {
        (GenesisKind::Set, Key::Map(element), OpType::Put(ScalarValue::Int(_)), false) => {
            let json = shape::element_from_key(element).ok_or_else(bad)?;
            if let Some(field) = field {
                validate_element(field, &json)?;
            }
            Ok(())
        }
        (GenesisKind::Set, Key::Map(_), OpType::Delete, false) => Ok(()),
        (GenesisKind::Map, Key::Map(key), OpType::Put(value), false) => {
            if matches!(value, ScalarValue::Counter(_) | ScalarValue::Unknown { .. }) {
                return Err(bad());
            }
            cleared.remove(&(Some(&genesis.field), key));
            if let Some(field) = field {
                field.check_key(key).map_err(|e| Refusal::new(RefusalCode::Validation, e.to_string()))?;
                let json = shape::scalar_to_json(field, value).ok_or_else(bad)?;
                if !json.is_null() {
                    validate_element(field, &json)?;
                } else if matches!(field.policy, Policy::Max | Policy::Min) {
                    return refuse(
                        RefusalCode::Validation,
                        format!(
                            "{}.{key}: the entries of a {} map can't be removed",
                            field.name,
                            field.policy.name()
                        ),
                    );
                }
            }
            Ok(())
        }
        (GenesisKind::Map, Key::Map(key), OpType::Delete, false) => {
            cleared.insert((Some(&genesis.field), key));
            Ok(())
        }
        (GenesisKind::List, Key::Seq(_), OpType::Put(value), true) => {
            if matches!(value, ScalarValue::Counter(_) | ScalarValue::Unknown { .. }) {
                return Err(bad());
            }
            if let Some(field) = field {
                let json = shape::scalar_to_json(field, value).ok_or_else(bad)?;
                validate_element(field, &json)?;
            }
            Ok(())
        }
        (GenesisKind::Text, Key::Seq(_), OpType::Put(ScalarValue::Str(text)), true) if !text.is_empty() => {
            Ok(())
        }
        (GenesisKind::List | GenesisKind::Text, Key::Seq(at), OpType::Delete, false) => {
            if at.as_opid().is_some_and(own_ids) { Ok(()) } else { Err(bad()) }
        }
        _ => Err(bad()),
    }
}

fn validate_element(field: &Field, json: &Json) -> Result<(), Refusal> {
    match field.check_element(json) {
        Ok(canonical) if canonical == *json => Ok(()),
        Ok(_) => {
            refuse(RefusalCode::Validation, format!("{}: an element is not in canonical form", field.name))
        }
        Err(error) => refuse(RefusalCode::Validation, error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Programs know the names, peers and stores the numbers.
    #[test]
    fn refusals_keep_their_numbers_and_names() {
        let names = [
            "malformed",
            "forged_actor",
            "forged_author",
            "forged_role",
            "bad_sequence",
            "missing_dependency",
            "clock_ahead",
            "out_of_order",
            "bad_shape",
            "unknown_field",
            "validation",
            "forbidden",
            "depends_on_refused",
            "transaction",
            "unloadable",
            "quota",
            "superseded",
        ];
        for (number, name) in (1..).zip(names) {
            let code = RefusalCode::from_u16(number).expect("a known code");
            assert_eq!((code as u16, code.name()), (number, name));
        }
        assert_eq!((RefusalCode::from_u16(0), RefusalCode::from_u16(18)), (None, None));
    }

    #[test]
    fn a_derived_actor_has_one_spelling_and_a_bounded_level() {
        let base = ActorId::from(&[7; 16][..]);
        let spelled = |level: &[u8]| ActorId::from([&DERIVED_ACTOR_MAGIC[..], level, &[7; 16]].concat());
        assert_eq!(derived_actor(&base, 0), base);
        for (level, bytes) in [
            (1, &[1][..]),
            (127, &[0x7f]),
            (128, &[0x80, 1]),
            (300, &[0xac, 2]),
            (CONCURRENCY_LEVEL_MAX, &[0xa0, 0x8d, 6]),
        ] {
            assert_eq!(derived_actor(&base, level), spelled(bytes), "{level}");
            assert_eq!(base_actor(&spelled(bytes)), Some(&[7; 16][..]), "{level}");
        }
        for bytes in [
            &[][..],
            &[0],
            // Padded, unended, and with another one behind it.
            &[0x81, 0],
            &[0x81],
            &[1, 1],
            // One more than the greatest, and one that no number holds.
            &[0xa1, 0x8d, 6],
            &[0x81, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 1],
        ] {
            assert_eq!(base_actor(&spelled(bytes)), None, "{bytes:?}");
        }
        assert_eq!(base_actor(&ActorId::from(&[7; 15][..])), None);
        assert_eq!(base_actor(&ActorId::from(&[7; 17][..])), None);
    }
}
