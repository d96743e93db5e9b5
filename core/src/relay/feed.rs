//! The feed: what happened in a workspace, gap-free and in one order for everyone.

use std::collections::{BTreeMap, BTreeSet};

use bincode::{Decode, Encode};

use super::layout::{WorkspaceHash, feed_place};
use crate::codec;
use crate::id::DeviceId;
use crate::store::{Batch, Keyspace, Store, StoreError, View};
use crate::wire::{Channel, EntityChanges, FeedBody, FeedEntry, Hash, Refused, Unit};

/// Most entries of one page.
const PAGE_ENTRIES_MAX: usize = 256;
/// Stored bytes after which a page ends; one larger entry makes a page by itself. A page is one turn:
/// reading, encoding and compressing it is what everyone else waits for.
const PAGE_BYTES_MAX: usize = 128 * 1024;
/// Keys read from the store at once: with full values 2 MiB.
const SCAN_KEYS: usize = 32;
/// Pages of a workspace that are kept for others: listeners lag behind the newest entry by different
/// numbers of entries, and few of these are far behind.
const SHARED_PAGES_MAX: usize = 16;
/// Largest page that is kept for others.
const SHARED_BYTES_MAX: usize = 64 * 1024;

/// An entry as it is stored, apart from its form on the wire.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub(super) enum FeedRecord {
    Changes { author: [u8; 32], entities: Vec<FeedEntity> },
    Refused { type_name: String, id: String, hash: Hash, code: u16, message: String },
    Device { key: [u8; 32], name: String, platform: String },
    Schema { hash: Hash },
}

/// The changes of one entity within an entry.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub(super) struct FeedEntity {
    pub(super) type_name: String,
    pub(super) id: String,
    pub(super) genesis: Vec<(String, u8)>,
    /// Each change with its hash, so that its author is told without parsing it again.
    pub(super) changes: Vec<(Hash, Vec<u8>)>,
    pub(super) signature: Vec<u8>,
}

/// To whom an entry is shown.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reader<'a> {
    pub(super) device: DeviceId,
    /// Types that the reader may see; empty means all.
    pub(super) types: &'a [String],
    /// Whether its own changes are sent in full too.
    pub(super) full: bool,
}

impl Reader<'_> {
    fn sees(&self, type_name: &str) -> bool {
        self.types.is_empty() || self.types.iter().any(|name| name == type_name)
    }
}

impl FeedRecord {
    /// The entry as `reader` gets it; `None` if nothing of it is for that reader.
    pub(super) fn show(self, reader: Reader<'_>) -> Option<FeedBody> {
        match self {
            FeedRecord::Changes { author, entities } => {
                let visible = entities.into_iter().filter(|entity| reader.sees(&entity.type_name));
                if author == reader.device.0 && !reader.full {
                    let own: Vec<_> = visible
                        .map(|e| (e.type_name, e.id, e.changes.into_iter().map(|(hash, _)| hash).collect()))
                        .collect();
                    return (!own.is_empty()).then_some(FeedBody::Own(own));
                }
                let entities: Vec<_> = visible
                    .map(|entity| EntityChanges {
                        type_name: entity.type_name,
                        id: entity.id,
                        genesis: entity.genesis,
                        changes: entity.changes.into_iter().map(|(_, bytes)| bytes).collect(),
                        signature: entity.signature,
                    })
                    .collect();
                (!entities.is_empty()).then_some(FeedBody::Changes { author, unit: Unit { entities } })
            }
            FeedRecord::Refused { type_name, id, hash, code, message } => reader
                .sees(&type_name)
                .then_some(FeedBody::Refused(Refused { type_name, id, hash, code, message })),
            FeedRecord::Device { key, name, platform } => Some(FeedBody::Device { key, name, platform }),
            FeedRecord::Schema { hash } => Some(FeedBody::Schema { hash }),
        }
    }
}

/// Writes the entry `seq`, which is new.
pub(super) fn put(batch: &mut Batch, workspace: WorkspaceHash, seq: u64, record: &FeedRecord) {
    codec::put_large(batch, Keyspace::FEED, &workspace.feed(seq), &codec::encode(record), 0);
}

/// A part of the feed, read for one reader.
#[derive(Debug, Default)]
pub(super) struct Page {
    pub(super) entries: Vec<FeedEntry>,
    /// The newest entry read, shown or not.
    pub(super) last: u64,
    /// Whose changes are among what was read.
    pub(super) authors: BTreeSet<[u8; 32]>,
}

/// Pages of the newest entries, as they are sent to everyone who may see all of them and wrote none.
/// Many listeners want the same when something new is there: it is read, encoded and compressed once.
#[derive(Debug, Default)]
pub(super) struct SharedPages(BTreeMap<(u64, Channel), SharedPage>);

/// One of them.
#[derive(Clone, Debug)]
pub(super) struct SharedPage {
    /// The newest entry in it.
    pub(super) last: u64,
    /// Who wrote of it.
    authors: BTreeSet<[u8; 32]>,
    /// The message.
    pub(super) bytes: Vec<u8>,
}

impl SharedPages {
    /// The page from an entry on, if it is here and the reader gets it as everyone does.
    pub(super) fn get(&self, from: u64, channel: Channel, reader: Reader<'_>) -> Option<&SharedPage> {
        let page = self.0.get(&(from, channel))?;
        let same = reader.types.is_empty() && (reader.full || !page.authors.contains(&reader.device.0));
        same.then_some(page)
    }

    /// Keeps a page if others may want it: it ends with the newest entry, and the reader got it as
    /// everyone does. At the bounds nothing is kept.
    pub(super) fn keep(
        &mut self,
        place: (u64, Channel),
        page: &Page,
        end: u64,
        reader: Reader<'_>,
        bytes: &[u8],
    ) {
        let same = reader.types.is_empty() && (reader.full || !page.authors.contains(&reader.device.0));
        if same && page.last == end && self.0.len() < SHARED_PAGES_MAX && bytes.len() <= SHARED_BYTES_MAX {
            let shared = SharedPage { last: page.last, authors: page.authors.clone(), bytes: bytes.to_vec() };
            self.0.insert(place, shared);
        }
    }
}

/// Reads a page of the entries `from..=to`, of which there is at least one.
pub(super) fn page(
    store: &dyn Store,
    workspace: WorkspaceHash,
    from: u64,
    to: u64,
    reader: Reader<'_>,
) -> Result<Page, StoreError> {
    let read = records(store, workspace, from, to)?;
    let last = read.last().map_or(from, |(seq, _)| *seq);
    let author = |record: &FeedRecord| match record {
        FeedRecord::Changes { author, .. } => Some(*author),
        _ => None,
    };
    let authors = read.iter().filter_map(|(_, record)| author(record)).collect();
    let shown =
        read.into_iter().filter_map(|(seq, record)| Some(FeedEntry { seq, body: record.show(reader)? }));
    Ok(Page { entries: shown.collect(), last, authors })
}

/// The records of a page of the entries `from..=to`, of which there is at least one: with no gap,
/// beginning with `from`.
pub(super) fn records(
    store: &dyn Store,
    workspace: WorkspaceHash,
    from: u64,
    to: u64,
) -> Result<Vec<(u64, FeedRecord)>, StoreError> {
    let mut read = Assembly { next: from, ..Assembly::default() };
    let mut start = workspace.feed(from);
    while !read.full {
        let rows = store.scan(View::Latest, Keyspace::FEED, &workspace.0, &start, SCAN_KEYS)?;
        for (key, value) in &rows {
            let place = feed_place(key).ok_or_else(|| damaged(from, "has a key of no known form"))?;
            if place.0 > to {
                read.end()?;
                read.full = true;
            } else {
                read.part(place, value)?;
            }
            if read.full {
                break;
            }
        }
        match rows.last() {
            Some((key, _)) if rows.len() == SCAN_KEYS => {
                start.clone_from(key);
                start.push(0);
            }
            _ => {
                read.end()?;
                break;
            }
        }
    }
    if read.records.is_empty() {
        return Err(damaged(from, "is missing"));
    }
    Ok(read.records)
}

fn damaged(seq: u64, how: &str) -> StoreError {
    StoreError::Damaged { what: format!("feed entry {seq} {how}") }
}

/// Puts the parts of entries together until the page is full.
#[derive(Default)]
struct Assembly {
    records: Vec<(u64, FeedRecord)>,
    /// The entry that comes next.
    next: u64,
    open: Option<(u64, u32, Vec<u8>)>,
    bytes: usize,
    full: bool,
}

impl Assembly {
    fn part(&mut self, place: (u64, u32), value: &[u8]) -> Result<(), StoreError> {
        if let Some((seq, part, bytes)) = &mut self.open
            && *seq == place.0
        {
            if place.1 != *part + 1 {
                return Err(damaged(place.0, "lacks a part"));
            }
            *part = place.1;
            bytes.extend_from_slice(value);
            return Ok(());
        }
        self.end()?;
        if self.full {
            return Ok(());
        }
        if place != (self.next, 0) {
            return Err(damaged(self.next, "is missing"));
        }
        self.open = Some((place.0, 0, value.to_vec()));
        Ok(())
    }

    /// Takes the entry that is complete now, if the page has room for it.
    fn end(&mut self) -> Result<(), StoreError> {
        let Some((seq, _, bytes)) = self.open.take() else { return Ok(()) };
        self.bytes += bytes.len();
        let rest = !self.records.is_empty();
        if rest && (self.records.len() == PAGE_ENTRIES_MAX || self.bytes > PAGE_BYTES_MAX) {
            self.full = true;
            return Ok(());
        }
        self.records.push((seq, codec::decode(&bytes, &format!("feed entry {seq}"))?));
        self.next = seq + 1;
        Ok(())
    }
}
