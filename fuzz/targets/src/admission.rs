//! Admission (tier 1) and the guard around the document (tier 2), over valid changes that were
//! changed and given the checksum that then belongs to them.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};

use anabranch_core::admission::{Judge, RefusalCode, Vouches};
use anabranch_core::change::Change;
use anabranch_core::entity::Entity;
use anabranch_core::schema::EntityType;
use automerge::legacy::{Key, ObjectId, OpId, OpType};
use automerge::{ActorId, Change as RawChange, ExpandedChange, ObjType, ScalarValue};

use crate::chunk::Chunk;
use crate::world::{self, Made};
use crate::{Draw, Noise};

/// What became of the changes that were changed, over all inputs of this process.
#[derive(Debug, Default)]
pub struct Figures {
    /// All.
    pub changes: AtomicU64,
    /// Not even bytes of a change.
    pub malformed: AtomicU64,
    /// Refused by admission at the relay.
    pub refused: AtomicU64,
    /// Taken by the relay and held by the document.
    pub accepted: AtomicU64,
    /// Taken by the relay and refused by the guard: what only a device can tell.
    pub guarded: AtomicU64,
}

/// See [`Figures`].
pub static FIGURES: Figures = Figures {
    changes: AtomicU64::new(0),
    malformed: AtomicU64::new(0),
    refused: AtomicU64::new(0),
    accepted: AtomicU64::new(0),
    guarded: AtomicU64::new(0),
};

fn count(figure: &AtomicU64) {
    figure.fetch_add(1, Ordering::Relaxed);
}

pub(crate) fn run(data: &[u8]) {
    let mut draw = Draw::new(data);
    let history = world::history();
    let at = draw.below(history.len());
    let mut entity = history[at].before.clone();
    // Some changed ones on top of each other, and what really came next between them.
    for made in &history[at..(at + 3).min(history.len())] {
        let changed = change_one(made, &mut draw);
        offer(&mut entity, made, &changed, &mut draw);
        let honest = made.change.clone();
        let received = entity.receive(vec![honest], Some(world::ty()), Judge::Admitted, true);
        // It can have lost its place to a changed copy of it, and by nothing else.
        for (_, refusal) in &received.refused {
            let displaced = matches!(
                refusal.code,
                RefusalCode::BadSequence | RefusalCode::MissingDependency | RefusalCode::DependsOnRefused
            );
            assert!(displaced, "an honest change is refused: {refusal}");
        }
        prove(&entity, Some(world::ty()));
    }
}

/// Offers bytes to an entity as a device would at the relay, and as the relay does at a device.
fn offer(entity: &mut Entity, made: &Made, bytes: &[u8], draw: &mut Draw<'_>) {
    count(&FIGURES.changes);
    let Ok(change) = Change::parse(bytes) else { return count(&FIGURES.malformed) };
    let author = change.author().map_or(made.device, |author| author.device);
    // Half of the time by whoever the change says wrote it, else by the real author.
    let device = if draw.one_in(2) { author } else { made.device };
    let judge =
        Judge::Relay { device, role: made.role, vouches: Vouches::Own, now: world::now(600_000).wall };
    let relay = entity.judge(&change, Some(world::ty()), judge);
    let as_admitted = entity.judge(&change, Some(world::ty()), Judge::Admitted);
    if relay.is_ok() {
        assert_eq!(as_admitted, relay, "a device refuses what the relay admits");
    }
    let received = entity.receive(vec![change], Some(world::ty()), Judge::Admitted, true);
    let held = !received.applied.is_empty() || !received.known.is_empty();
    match (relay, held) {
        (Err(_), _) => count(&FIGURES.refused),
        (Ok(_), true) => count(&FIGURES.accepted),
        (Ok(_), false) => count(&FIGURES.guarded),
    }
}

/// The document loads again as what it is, and everything that is shown of it can be computed.
pub(crate) fn prove(entity: &Entity, ty: Option<&EntityType>) {
    let saved = entity.save_proved().unwrap_or_else(|error| panic!("accepted, and does not load: {error}"));
    let again = Entity::load(
        &world::home(),
        entity.key(),
        ty,
        &saved,
        &[],
        entity.headers().clone(),
        &entity.named_containers(),
    );
    let again = again.unwrap_or_else(|error| panic!("accepted, and does not load: {error}"));
    if let Some(ty) = ty {
        assert_eq!(again.row(ty), entity.row(ty), "loaded again it shows another row");
    }
    assert_eq!(again.heads(), entity.heads());
}

/// The bytes of a change with something changed, in one of three ways.
pub(crate) fn change_one(made: &Made, draw: &mut Draw<'_>) -> Vec<u8> {
    let bytes = made.change.bytes();
    match draw.below(8) {
        0..=3 => {
            let mut chunk = Chunk::parse(bytes).unwrap();
            for _ in 0..1 + draw.below(4) {
                mutate(&mut chunk, draw);
            }
            chunk.write()
        }
        4 => {
            let mut body = crate::chunk::body_of(bytes).unwrap().to_vec();
            for _ in 0..1 + draw.below(4) {
                let at = draw.word() % body.len();
                body[at] ^= draw.byte();
            }
            crate::chunk::seal(&body)
        }
        _ => rewrite(made, draw).unwrap_or_else(|| bytes.to_vec()),
    }
}

/// Changes one part of a chunk.
pub fn mutate(chunk: &mut Chunk, draw: &mut Draw<'_>) {
    let other = Chunk::parse(draw_made(draw).change.bytes()).unwrap();
    match draw.below(20) {
        0..=5 => mutate_column(chunk, draw),
        6 => {
            if let Some(mine) = chunk.columns.get_mut(draw.below(12)) {
                let same = other.columns.iter().find(|(kind, _)| *kind == mine.0);
                mine.1 = same.map(|(_, data)| data.clone()).unwrap_or_default();
            }
        }
        7 => {
            if let Some(column) = chunk.columns.get_mut(draw.below(12)) {
                column.0 ^= 1 << draw.below(8);
            }
        }
        8 => chunk.seq = near(chunk.seq, draw),
        9 => chunk.start_op = near(chunk.start_op, draw),
        10 => chunk.time = near(chunk.time as u64, draw) as i64,
        11 => chunk.deps = other.deps,
        12 => {
            let at = draw.below(chunk.deps.len() + 1);
            match draw.below(4) {
                0 if at < chunk.deps.len() => drop(chunk.deps.remove(at)),
                1 if at < chunk.deps.len() => chunk.deps.push(chunk.deps[at]),
                2 => chunk.deps.insert(at, [draw.byte(); 32]),
                _ => chunk.deps.push(draw_made(draw).change.hash().0),
            }
            if draw.one_in(2) {
                chunk.deps.sort_unstable();
            }
        }
        13 => chunk.actor = other.actor,
        14 => {
            chunk.actor = match draw.below(3) {
                0 => Vec::new(),
                1 => [&[0x13, 0xb2, 0x23, 0x09, draw.byte()][..], &chunk.actor].concat(),
                _ => draw.take(16).to_vec(),
            }
        }
        15 => {
            chunk.message =
                draw.of(&["", "d", "a", "dr", "ar", "x", "d.BwcHBwcHBwcHBwcHBwcHBw.3"]).as_bytes().to_vec()
        }
        16 => match draw.below(3) {
            0 => drop(chunk.others.pop()),
            1 => chunk.others.extend(other.others),
            _ => chunk.others.reverse(),
        },
        17 => chunk.extra = other.extra,
        18 => {
            let at = draw.below(chunk.extra.len() + 1);
            if let Some(byte) = chunk.extra.get_mut(at) {
                *byte ^= draw.byte();
            }
        }
        _ => {
            let (one, two) = (draw.below(chunk.columns.len().max(1)), draw.below(chunk.columns.len().max(1)));
            if one != two {
                let data = chunk.columns[one].1.clone();
                chunk.columns[one].1 = std::mem::replace(&mut chunk.columns[two].1, data);
            }
        }
    }
}

fn draw_made(draw: &mut Draw<'_>) -> &'static Made {
    draw.of(world::history())
}

fn mutate_column(chunk: &mut Chunk, draw: &mut Draw<'_>) {
    let count = chunk.columns.len().max(1);
    let Some((_, data)) = chunk.columns.get_mut(draw.below(count)) else { return };
    let at = draw.below(data.len() + 1);
    match draw.below(5) {
        0 | 1 => {
            if let Some(byte) = data.get_mut(at) {
                *byte ^= 1 << draw.below(8);
            }
        }
        2 => {
            if let Some(byte) = data.get_mut(at) {
                *byte = *draw.of(&[0, 1, 2, 0x3f, 0x40, 0x7e, 0x7f, 0x80, 0xff]);
            }
        }
        3 => data.insert(at, *draw.of(&[0, 1, 2, 3, 0x7e, 0x7f, 0x80, 0xff])),
        _ if at < data.len() => drop(data.remove(at)),
        _ => data.clear(),
    }
}

fn near(value: u64, draw: &mut Draw<'_>) -> u64 {
    match draw.below(6) {
        0 => value.wrapping_add(1),
        1 => value.wrapping_sub(1),
        2 => value.wrapping_add(1 << 16),
        3 => value.wrapping_sub(1 << 30),
        _ => draw.number(),
    }
}

/// Changes operations, and has the library write them: columns stay in order, what they say does
/// not. `None` where the library itself can't write it.
fn rewrite(made: &Made, draw: &mut Draw<'_>) -> Option<Vec<u8>> {
    let mut expanded = made.change.expand().ok()?;
    for _ in 0..1 + draw.below(3) {
        rewrite_operation(&mut expanded, draw);
    }
    // The library keeps these bytes only where no author is given beside them.
    if let Some(author) = expanded.author.take() {
        expanded.extra_bytes = [&[1, author.as_bytes().len() as u8][..], author.as_bytes()].concat();
    }
    expanded.hash = None;
    catch_unwind(AssertUnwindSafe(|| RawChange::from(expanded).raw_bytes().to_vec())).ok()
}

fn rewrite_operation(expanded: &mut ExpandedChange, draw: &mut Draw<'_>) {
    let operations = &mut expanded.operations;
    let at = draw.below(operations.len().max(1));
    let Some(own) = operations.get(at).cloned() else { return };
    let donor = draw_made(draw).change.expand().ok();
    let donated = donor.and_then(|donor| donor.operations.get(draw.below(donor.operations.len())).cloned());
    let id = draw_id(&expanded.actor_id, draw);
    let operation = &mut operations[at];
    match draw.below(12) {
        0 => operations.insert(at, own),
        1 => drop(operations.remove(at)),
        2 => operations.extend(donated),
        3 => operation.pred = vec![id].into(),
        4 => operation.pred = own.pred.iter().cloned().chain([id]).collect::<Vec<_>>().into(),
        5 => operation.pred = Vec::new().into(),
        6 => operation.obj = if draw.one_in(2) { ObjectId::Root } else { ObjectId::Id(id) },
        7 => {
            operation.key = match draw.below(4) {
                0 => Key::Seq(automerge::legacy::ElementId::Head),
                1 => Key::Seq(automerge::legacy::ElementId::Id(id)),
                _ => Key::Map(
                    (*draw.of(&["title", "count", "tags", "body", "serv!", "#money", "~", "", "x y", "log"]))
                        .into(),
                ),
            }
        }
        8 => operation.action = draw_action(draw),
        9 => operation.insert = !operation.insert,
        10 => {
            if let Some(donated) = donated {
                operation.key = donated.key;
                operation.obj = donated.obj;
            }
        }
        _ => {
            if let Some(donated) = donated {
                operation.action = donated.action;
                operation.pred = donated.pred;
            }
        }
    }
}

/// An operation's id: of the history, of a genesis, of this change itself, or of nothing.
fn draw_id(own: &ActorId, draw: &mut Draw<'_>) -> OpId {
    let made = draw_made(draw);
    let within = draw.below(made.change.raw().len()) as u64;
    match draw.below(5) {
        0 => OpId::new(made.change.start_op() + within, made.change.actor()),
        1 => {
            let genesis = anabranch_core::genesis::Genesis::all(world::ty());
            draw.of(&genesis).op_id()
        }
        2 => OpId::new(made.change.start_op() + within, own),
        3 => OpId::new(u64::from(draw.byte()), own),
        _ => OpId::new(draw.number() & 0xffff_ffff, &ActorId::from(&[draw.byte(); 16][..])),
    }
}

fn draw_action(draw: &mut Draw<'_>) -> OpType {
    match draw.below(14) {
        0 => OpType::Delete,
        1 => OpType::Increment(draw.number() as i64),
        2 => OpType::Make(ObjType::Map),
        3 => OpType::Make(ObjType::Text),
        4 => OpType::Put(ScalarValue::counter(draw.number() as i64)),
        5 => OpType::Put(ScalarValue::Null),
        6 => OpType::Put(ScalarValue::F64(f64::from_bits(draw.number()))),
        7 => OpType::Put(ScalarValue::Unknown { type_code: 10 + draw.byte() % 6, bytes: vec![1, 2] }),
        8 => OpType::Put(ScalarValue::Timestamp(draw.number() as i64)),
        9 => OpType::Put(ScalarValue::Uint(draw.number())),
        10 => OpType::Put(ScalarValue::Int(draw.number() as i64)),
        11 => OpType::Put(ScalarValue::Boolean(draw.one_in(2))),
        12 => OpType::MarkEnd(draw.one_in(2)),
        _ => OpType::Put(ScalarValue::Str(
            (*draw.of(&["", "x", "{\"cents\":1}", "{\"cents\":\"1\"}", "[1, 2]", "a\u{0}b"])).into(),
        )),
    }
}

/// Runs the target over as many changes as are asked for, made from a seed; gives how many there
/// were in the end.
pub fn run_many(seed: u64, changes: u64) -> u64 {
    let mut noise = Noise::new(seed);
    let before = FIGURES.changes.load(Ordering::Relaxed);
    loop {
        let done = FIGURES.changes.load(Ordering::Relaxed) - before;
        if done >= changes {
            return done;
        }
        let length = 8 + noise.below(64);
        run(&noise.bytes(length));
    }
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    (0..64u64)
        .map(|number| {
            let mut bytes = vec![number as u8];
            bytes.extend(Noise::new(number).bytes(24));
            bytes
        })
        .collect()
}
