//! A workspace in memory: where its feed ends, its digest, its schema, who listens.

use std::collections::{BTreeMap, VecDeque};

use super::ConnId;
use super::feed::{self, FeedRecord, SharedPages};
use super::layout::{WorkspaceHash, WorkspaceRecord};
use super::schemas::Published;
use crate::codec;
use crate::digest::Digest;
use crate::id::WorkspaceId;
use crate::store::{Batch, CommitNo, Keyspace, Store, StoreError, View};
use crate::wire::Channel;

/// Keys read from the store at once.
const SCAN_KEYS: usize = 1024;

/// The end of a feed and the digest of exactly that moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Tip {
    pub(super) seq: u64,
    pub(super) digest: Digest,
}

/// A workspace that some connection uses, or whose newest commit is not durable yet.
///
/// Invariant: kept in memory while `pending` is not empty, so that what is read from the
/// store when one is loaded is durable.
#[derive(Debug)]
pub(super) struct Workspace {
    pub(super) id: WorkspaceId,
    pub(super) hash: WorkspaceHash,
    /// With everything committed.
    pub(super) tip: Tip,
    /// With everything durable: what devices may be told.
    pub(super) durable: Tip,
    /// Commits that are not durable yet.
    pending: VecDeque<(CommitNo, Tip)>,
    /// Serial of the newest grant.
    pub(super) serial: u64,
    pub(super) schema: Option<Published>,
    /// The channels that are signed in, and the users that signed them in.
    pub(super) members: BTreeMap<(ConnId, Channel), String>,
    /// How many of them each user has.
    users: BTreeMap<String, usize>,
    /// What many read of the newest entries.
    pub(super) pages: SharedPages,
}

impl Workspace {
    pub(super) fn new(id: WorkspaceId, hash: WorkspaceHash) -> Self {
        Self {
            id,
            hash,
            tip: Tip::default(),
            durable: Tip::default(),
            pending: VecDeque::new(),
            serial: 0,
            schema: None,
            members: BTreeMap::new(),
            users: BTreeMap::new(),
            pages: SharedPages::default(),
        }
    }

    /// Takes in a channel that a user has signed in, again or for the first time.
    pub(super) fn join(&mut self, place: (ConnId, Channel), user: &str) {
        self.leave(place);
        self.members.insert(place, user.to_owned());
        *self.users.entry(user.to_owned()).or_default() += 1;
    }

    /// Takes out a channel, if it is in.
    pub(super) fn leave(&mut self, place: (ConnId, Channel)) {
        let Some(user) = self.members.remove(&place) else { return };
        if let Some(count) = self.users.get_mut(&user) {
            *count -= 1;
            if *count == 0 {
                self.users.remove(&user);
            }
        }
    }

    /// How many channels a user has signed in.
    pub(super) fn count_of(&self, user: &str) -> usize {
        self.users.get(user).copied().unwrap_or_default()
    }

    /// Reads a workspace; `None` if nobody ever signed in to it.
    pub(super) fn load(store: &dyn Store, id: &WorkspaceId) -> Result<Option<Self>, StoreError> {
        let hash = WorkspaceHash::of(id);
        let Some(record) = read_record(store, hash)? else { return Ok(None) };
        let tip = Tip { seq: record.feed_end, digest: Digest(record.digest) };
        let schema = Published::load(store, hash)?;
        Ok(Some(Self { tip, durable: tip, serial: record.serial, schema, ..Self::new(id.clone(), hash) }))
    }

    /// What must be durable before anything about this workspace is promised.
    pub(super) fn gate(&self) -> CommitNo {
        self.pending.back().map_or(CommitNo(0), |(commit, _)| *commit)
    }

    /// Takes note of what became durable. Returns whether devices can be told more.
    pub(super) fn became_durable(&mut self, durable: CommitNo) -> bool {
        let before = self.durable;
        while let Some((_, tip)) = self.pending.front().filter(|(commit, _)| *commit <= durable) {
            self.durable = *tip;
            self.pending.pop_front();
        }
        if self.durable != before {
            self.pages = SharedPages::default();
        }
        self.durable != before
    }

    /// Whether commits are still on their way to the disk.
    pub(super) fn is_settled(&self) -> bool {
        self.pending.is_empty()
    }

    /// Begins a batch on top of what is committed.
    pub(super) fn draft(&self) -> Draft {
        Draft { batch: Batch::new(), workspace: self.hash, tip: self.tip, serial: self.serial }
    }

    /// Commits a draft of this workspace, with its feed end and digest in the same batch.
    pub(super) fn commit(&mut self, store: &dyn Store, draft: Draft) -> Result<CommitNo, StoreError> {
        let Draft { mut batch, tip, serial, .. } = draft;
        let record = WorkspaceRecord {
            name: self.id.as_str().to_owned(),
            feed_end: tip.seq,
            digest: tip.digest.0,
            serial,
        };
        batch.put(Keyspace::META, self.hash.0, codec::encode(&record));
        let commit = store.commit(batch)?;
        self.tip = tip;
        self.serial = serial;
        self.pending.push_back((commit, tip));
        Ok(commit)
    }
}

/// The stored record of a workspace.
pub(super) fn read_record(
    store: &dyn Store,
    hash: WorkspaceHash,
) -> Result<Option<WorkspaceRecord>, StoreError> {
    store
        .get(View::Latest, Keyspace::META, &hash.0)?
        .map(|bytes| codec::decode(&bytes, "the record of a workspace"))
        .transpose()
}

/// The workspaces of a relay's store, in no order that means anything.
pub fn all(store: &dyn Store) -> Result<Vec<WorkspaceId>, StoreError> {
    let mut found = Vec::new();
    let mut from = Vec::new();
    loop {
        let page = store.scan(View::Latest, Keyspace::META, &[], &from, SCAN_KEYS)?;
        for (key, value) in page.iter().filter(|(key, _)| key.len() == 16) {
            let record: WorkspaceRecord = codec::decode(value, "the record of a workspace")?;
            let id = WorkspaceId::new(record.name).ok().filter(|id| WorkspaceHash::of(id).0[..] == key[..]);
            found.push(id.ok_or_else(|| StoreError::Damaged {
                what: "the record of a workspace has another's name".into(),
            })?);
        }
        match page.last() {
            Some((last, _)) if page.len() == SCAN_KEYS => from = [last, &[0][..]].concat(),
            _ => return Ok(found),
        }
    }
}

/// One batch in the making. Nothing of it is visible until [`Workspace::commit`], so that an
/// error half way leaves no trace.
#[derive(Debug)]
pub(super) struct Draft {
    pub(super) batch: Batch,
    workspace: WorkspaceHash,
    pub(super) tip: Tip,
    pub(super) serial: u64,
}

impl Draft {
    /// Appends an entry to the feed.
    pub(super) fn append(&mut self, record: &FeedRecord) {
        self.tip.seq += 1;
        feed::put(&mut self.batch, self.workspace, self.tip.seq, record);
    }
}
