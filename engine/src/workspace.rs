//! A workspace: entities by type and id, with values by field name.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anabranch_core::id::{DeviceId, EntityKey, WorkspaceId};
use anabranch_core::query::{self, Filter, Query};
use anabranch_core::replica::{Edit, Fault, Replica};
use anabranch_core::rows::{ConflictRecord, RefusedRecord, RowRecord, Rows, SyncStatus};
use anabranch_core::schema::Schema;
use anabranch_core::store::Store;
use anabranch_core::wire::{FaultCode, GrantRole, SchemaIs};
use base64::Engine as _;
use futures_core::Stream;
use serde_json::Value as Json;
use tokio::sync::{broadcast, oneshot, watch};

use crate::error::{Category, Error};
use crate::hub::{Command, Feeds, Reply};
use crate::link::{Wanted, WantedGuard};
use crate::queue::Commands;
use crate::status::{SyncReport, WorkspaceStatus};

/// An entity as people see it.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Record {
    /// Its type.
    pub type_name: String,
    /// Its id.
    pub id: String,
    /// Every field of the schema; null, or the field's default, where nothing was written.
    pub fields: BTreeMap<String, Json>,
    /// A token for edits based on this version.
    pub version: String,
    /// Where it stands.
    pub status: SyncStatus,
    /// Whether it is deleted.
    pub deleted: bool,
    /// When its first change was written, milliseconds since 1970.
    pub created_ms: u64,
    /// When its last change was written, milliseconds since 1970.
    pub updated_ms: u64,
    /// Name of the device of the last change.
    pub updated_by: String,
}

/// A page of a query's result.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Page {
    /// In order.
    pub records: Vec<Record>,
    /// Where to go on; none at the end.
    pub cursor: Option<String>,
}

/// Something that waits for a person.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct ConflictItem {
    /// The entity's type.
    pub type_name: String,
    /// Its id.
    pub id: String,
    /// A field, a group, `field.key` for an entry of a map, or `*` for the whole entity.
    pub field: String,
    /// `manual`, `tie`, or `lost_edit`: a deletion won over edits that it had not seen.
    pub kind: String,
    /// What competes, the newest first.
    pub sides: Vec<ConflictSide>,
    /// What all sides started from.
    pub base: Option<Json>,
}

/// One of the competing values.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct ConflictSide {
    /// Name of the device that wrote it last.
    pub device: String,
    /// Names of all devices that wrote this value, the last first: equal values are one side.
    pub devices: Vec<String>,
    /// Whether this device is one of them.
    pub mine: bool,
    /// The value; null for a cleared field or a deletion.
    pub value: Json,
    /// When it was written, milliseconds since 1970.
    pub time_ms: u64,
}

/// How a person settles a conflict.
#[derive(Clone, Debug, PartialEq)]
pub enum Resolution {
    /// The side that this device wrote, alone or with others; an error if it wrote none, or
    /// several.
    Mine,
    /// The only side that this device did not write; an error if there are several.
    Theirs,
    /// One of the sides, counted from 1.
    Side(usize),
    /// Another value.
    Value(Json),
}

/// An entity changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ChangeEvent {
    /// This one. What it is now is durable and can be read.
    Changed(EntityKey),
    /// More changed than this stream could hold: read again what is shown.
    Missed,
}

/// The stream of changes of a workspace.
pub struct ChangeStream {
    events: broadcast::Receiver<EntityKey>,
    // A sender that is alive while the engine is keeps the stream open; this one must not.
    status: watch::Receiver<WorkspaceStatus>,
}

impl ChangeStream {
    /// The next change; none when the engine has shut down. Safe to drop and call again.
    pub async fn next(&mut self) -> Option<ChangeEvent> {
        loop {
            tokio::select! {
                biased;
                event = self.events.recv() => match event {
                    Ok(key) => return Some(ChangeEvent::Changed(key)),
                    Err(broadcast::error::RecvError::Lagged(_)) => return Some(ChangeEvent::Missed),
                    Err(broadcast::error::RecvError::Closed) => return None,
                },
                changed = self.status.changed() => if changed.is_err() {
                    return None;
                },
            }
        }
    }
}

/// A boxed stream, to be polled by any runtime.
pub type BoxStream<T> = Pin<Box<dyn Stream<Item = T> + Send>>;

/// Everything that workspaces share.
pub(crate) struct Shared {
    pub(crate) commands: Commands,
    pub(crate) store: Arc<dyn Store>,
    pub(crate) upkeep: anabranch_store::Upkeep,
    pub(crate) dir: std::path::PathBuf,
    pub(crate) schema: Arc<Schema>,
    pub(crate) device: DeviceId,
    pub(crate) wanted: Arc<Wanted>,
    pub(crate) has_relay: bool,
    pub(crate) timers: tokio::runtime::Handle,
    pub(crate) next_sync: AtomicU64,
}

impl Shared {
    pub(crate) async fn ask<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Result<T, Error> {
        let (reply, answer) = oneshot::channel();
        self.commands.ask(command(reply)).await?;
        answer.await.map_err(|_| Error::closed())?
    }
}

/// What [`Workspace::verify`] found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Verification {
    /// Entries that were looked at: documents, rows, index entries, conflicts.
    pub entries: u64,
    /// What was wrong.
    pub faults: Vec<Fault>,
}

/// A workspace of an engine. Cheap to clone; it keeps the engine open.
#[derive(Clone)]
pub struct Workspace {
    id: WorkspaceId,
    shared: Arc<Shared>,
    _engine: Arc<crate::Inner>,
    rows: Rows,
    feeds: Feeds,
}

impl Workspace {
    pub(crate) async fn open(engine: Arc<crate::Inner>, id: WorkspaceId) -> Result<Self, Error> {
        let shared = Arc::clone(&engine.shared);
        let workspace = id.clone();
        let feeds = shared.ask(|reply| Command::Open { workspace, reply }).await?;
        let rows = Rows::new(Arc::clone(&shared.store), Arc::clone(&shared.schema), &id);
        Ok(Self { id, shared, _engine: engine, rows, feeds })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        self.id.as_str()
    }

    /// Its types.
    pub fn schema(&self) -> &Arc<Schema> {
        &self.shared.schema
    }

    /// One entity; none if it does not exist or is deleted.
    pub async fn get(&self, type_name: &str, id: &str) -> Result<Option<Record>, Error> {
        self.known(type_name)?;
        let key = EntityKey::new(type_name, id)?;
        match self.rows.get(&key)? {
            Some(row) if !row.deleted => Ok(Some(self.record(key, row)?)),
            _ => Ok(None),
        }
    }

    fn known(&self, type_name: &str) -> Result<(), Error> {
        if self.shared.schema.types.contains_key(type_name) {
            return Ok(());
        }
        let known: Vec<&str> = self.shared.schema.types.keys().map(String::as_str).collect();
        let message = format!("the schema has no type {type_name:?}; it has {}", known.join(", "));
        Err(Error::new(Category::Validation, "unknown_type", message))
    }

    fn record(&self, key: EntityKey, row: RowRecord) -> Result<Record, Error> {
        let updated_by = match parse_device(&row.updated_by) {
            Some(device) => self.rows.device_name(&device)?,
            None => row.updated_by,
        };
        Ok(Record {
            type_name: key.type_name().to_owned(),
            id: key.id().to_owned(),
            fields: row.fields,
            version: row.version,
            status: row.status,
            deleted: row.deleted,
            created_ms: row.created_ms,
            updated_ms: row.updated_ms,
            updated_by,
        })
    }

    /// Answers a query from durable rows.
    pub async fn query(&self, query: &Query) -> Result<Page, Error> {
        let found = query::run(&self.rows, query)?;
        let records =
            found.rows.into_iter().map(|(key, row)| self.record(key, row)).collect::<Result<_, _>>()?;
        Ok(Page { records, cursor: found.cursor })
    }

    /// Reads a condition such as `level = expert` for entities of a type.
    pub fn filter(&self, type_name: &str, text: &str) -> Result<Filter, Error> {
        self.known(type_name)?;
        Ok(Filter::parse(&self.shared.schema.types[type_name], text)?)
    }

    /// A live query: yields the result, then the whole result again after each change to it. An
    /// error does not end it: the next change to an entity of the type is a new try. Ends when
    /// the engine shuts down.
    pub fn watch(&self, query: Query) -> BoxStream<Result<Page, Error>> {
        let start = (self.clone(), self.changes(), query, Live::default());
        Box::pin(futures_util::stream::unfold(
            start,
            |(workspace, mut changes, query, mut live)| async move {
                loop {
                    if live.begun {
                        match changes.next().await? {
                            ChangeEvent::Changed(key) if key.type_name() != query.type_name => continue,
                            _ => {}
                        }
                    }
                    if let Some(news) = live.news(workspace.query(&query).await) {
                        return Some((news, (workspace, changes, query, live)));
                    }
                }
            },
        ))
    }

    /// Every change from now on, each when it is durable.
    pub fn changes(&self) -> ChangeStream {
        ChangeStream { events: self.feeds.events.subscribe(), status: self.feeds.status.clone() }
    }

    /// Makes all edits as one transaction. When this returns they are durable, and the next
    /// read shows them. Gives each entity's version. Dropped before it returns, the write may
    /// or may not be made.
    pub async fn write(&self, edits: Vec<Edit>) -> Result<Vec<String>, Error> {
        self.write_as(edits, true).await
    }

    /// Like [`Workspace::write`] without the rules of the schema and the role: for tests that
    /// prove that the relay checks for itself.
    #[doc(hidden)]
    pub async fn write_unchecked(&self, edits: Vec<Edit>) -> Result<Vec<String>, Error> {
        self.write_as(edits, false).await
    }

    async fn write_as(&self, edits: Vec<Edit>, checked: bool) -> Result<Vec<String>, Error> {
        let workspace = self.id.clone();
        self.shared.ask(|reply| Command::Write { workspace, edits, checked, reply }).await
    }

    /// Makes each edit for itself: bulk writes. One that fails does not stop the others.
    pub async fn write_each(&self, edits: Vec<Edit>) -> Result<Vec<Result<String, Error>>, Error> {
        let workspace = self.id.clone();
        self.shared.ask(|reply| Command::WriteEach { workspace, edits, reply }).await
    }

    /// Everything that waits for a person, in order of type and id.
    pub async fn conflicts(&self) -> Result<Vec<ConflictItem>, Error> {
        let mut items = Vec::new();
        for (key, record) in self.rows.conflicts()? {
            items.push(self.conflict(&key, record)?);
        }
        Ok(items)
    }

    fn conflict(&self, key: &EntityKey, record: ConflictRecord) -> Result<ConflictItem, Error> {
        let mut sides = Vec::with_capacity(record.sides.len());
        for side in record.sides {
            let wrote = std::iter::once(side.device).chain(side.others).map(DeviceId);
            let wrote: Vec<DeviceId> = wrote.collect();
            let names: Result<Vec<String>, _> =
                wrote.iter().map(|device| self.rows.device_name(device)).collect();
            let devices = names?;
            sides.push(ConflictSide {
                device: devices[0].clone(),
                devices,
                mine: wrote.contains(&self.shared.device),
                value: side.value,
                time_ms: side.time_ms,
            });
        }
        Ok(ConflictItem {
            type_name: key.type_name().to_owned(),
            id: key.id().to_owned(),
            field: record.field,
            kind: record.kind,
            sides,
            base: record.base,
        })
    }

    /// Settles a conflict, here and with the next sync everywhere.
    pub async fn resolve(
        &self,
        type_name: &str,
        id: &str,
        field: &str,
        choice: Resolution,
    ) -> Result<(), Error> {
        let key = EntityKey::new(type_name, id)?;
        let group = self.group_of(type_name, field);
        let name = group.as_deref().unwrap_or(field);
        let found = self.rows.conflicts()?.into_iter().find(|(k, record)| *k == key && record.field == name);
        let Some((_, record)) = found else {
            let message = format!("{name:?} of {key} is not in conflict");
            return Err(Error::new(Category::NotFound, "no_conflict", message)
                .with_help("`conflicts` lists what is; perhaps another device has settled it"));
        };
        let sides = self.conflict(&key, record)?.sides;
        let value = pick(&sides, choice)?;
        self.write(vec![Replica::resolution(&key, name, value)]).await?;
        Ok(())
    }

    /// The group that a field is resolved with.
    fn group_of(&self, type_name: &str, field: &str) -> Option<String> {
        self.shared.schema.types.get(type_name)?.fields.get(field)?.group.clone()
    }

    /// What the relay refused, oldest first, each with its number.
    pub async fn refused(&self) -> Result<Vec<(u64, RefusedRecord)>, Error> {
        Ok(self.rows.refused()?)
    }

    /// Forgets a refused change that the user has dealt with.
    pub async fn dismiss(&self, number: u64) -> Result<(), Error> {
        let workspace = self.id.clone();
        let found = self.shared.ask(|reply| Command::Dismiss { workspace, number, reply }).await?;
        if found { Ok(()) } else { Err(no_refused(number)) }
    }

    /// Makes a refused edit again, and forgets the refusal.
    pub async fn retry_refused(&self, number: u64) -> Result<(), Error> {
        let found = self.rows.refused()?.into_iter().find(|(known, _)| *known == number);
        let (_, record) = found.ok_or_else(|| no_refused(number))?;
        let workspace = self.id.clone();
        self.shared.ask(|reply| Command::RetryRefused { workspace, record, reply }).await?;
        self.dismiss(number).await
    }

    /// Figures, as they are now.
    pub fn status(&self) -> WorkspaceStatus {
        self.feeds.status.borrow().clone()
    }

    /// Figures as they change: always the latest, never a queue.
    pub fn watch_status(&self) -> BoxStream<WorkspaceStatus> {
        let start = (self.feeds.status.clone(), true);
        Box::pin(futures_util::stream::unfold(start, |(mut status, first)| async move {
            if !first {
                status.changed().await.ok()?;
            }
            let now = status.borrow_and_update().clone();
            Some((now, (status, false)))
        }))
    }

    /// One complete exchange with the relay, within `deadline`. What was achieved is kept
    /// however it ends; dropped before, it is as if the deadline had come.
    pub async fn sync(&self, deadline: Duration) -> Result<SyncReport, Error> {
        self.needs_relay()?;
        let id = self.shared.next_sync.fetch_add(1, Ordering::Relaxed);
        let workspace = self.id.clone();
        let (reply, answer) = oneshot::channel();
        // Asked before the link is wanted: a link that fails at once must find who waits.
        self.shared.commands.ask(Command::Sync { workspace, id, reply }).await?;
        // And before its time can be up: what ends it must find it.
        let _timer = self.timer(deadline, move || Command::SyncTimeout { id });
        let _link: WantedGuard = self.shared.wanted.want();
        answer.await.map_err(|_| Error::closed())?
    }

    fn needs_relay(&self) -> Result<(), Error> {
        if self.shared.has_relay {
            return Ok(());
        }
        Err(Error::new(Category::Usage, "no_relay", "no relay is configured")
            .with_help("give the engine the relay's address when it is opened"))
    }

    fn timer(&self, after: Duration, command: impl FnOnce() -> Command + Send + 'static) -> Timer {
        let commands = self.shared.commands.clone();
        Timer(self.shared.timers.spawn(async move {
            tokio::time::sleep(after).await;
            // A hub that has ended waits for nothing.
            let _ = commands.tell(command());
        }))
    }

    /// Pushes this engine's schema to the relay. Admins and authorities only.
    pub async fn push_schema(&self, deadline: Duration) -> Result<(), Error> {
        let answer = self.exchange_schema(true, deadline).await?;
        if answer.problems.is_empty() {
            return Ok(());
        }
        let problems = answer.problems.join("; ");
        if ![GrantRole::Admin.name(), GrantRole::Authority.name()].contains(&self.status().role) {
            return Err(Error::fault(FaultCode::Forbidden, problems));
        }
        let message = format!("the relay refused the schema: {problems}");
        Err(Error::new(Category::Validation, "schema_refused", message))
    }

    /// The workspace's schema as the relay has it; none where none was pushed.
    pub async fn fetch_schema(&self, deadline: Duration) -> Result<Option<String>, Error> {
        Ok(self.exchange_schema(false, deadline).await?.source)
    }

    /// Looks at everything that is stored of the workspace: does each document load, do rows,
    /// indexes and conflicts follow from the documents, do all of them add up to the digest.
    /// `progress` hears how many entries were looked at so far. Other calls go on meanwhile.
    ///
    /// With `mend`, what follows from a document is written anew. A document that can't be read is
    /// removed, so that the next sync fetches it again; what was not yet sent of it goes to the
    /// refused changes, with the code `damaged`. Dropped half way, it stops; nothing is lost.
    ///
    /// # Errors
    /// [`Category::Storage`] where the store can't read a value at all.
    pub async fn verify(&self, mend: bool, mut progress: impl FnMut(u64)) -> Result<Verification, Error> {
        let mut verification = Verification::default();
        let mut from_start = true;
        loop {
            let (reply, answer) = oneshot::channel();
            let command = Command::Verify { workspace: self.id.clone(), from_start, mend, reply };
            self.shared.commands.ask(command).await?;
            let step = answer.await.map_err(|_| Error::closed())??;
            from_start = false;
            verification.entries += step.entries;
            verification.faults.extend(step.faults);
            progress(verification.entries);
            if step.done {
                return Ok(verification);
            }
        }
    }

    async fn exchange_schema(&self, push: bool, deadline: Duration) -> Result<SchemaIs, Error> {
        self.needs_relay()?;
        let _link = self.shared.wanted.want();
        let start = std::time::Instant::now();
        let report = self.sync(deadline).await?;
        if let Some(error) = report.error {
            return Err(error);
        }
        let workspace = self.id.clone();
        let (reply, answer) = oneshot::channel();
        self.shared.commands.ask(Command::Schema { workspace, push, reply }).await?;
        let (late, mut too_late) = oneshot::channel::<()>();
        let left = deadline.saturating_sub(start.elapsed());
        let timer = self.shared.timers.spawn(async move {
            tokio::time::sleep(left).await;
            drop(late);
        });
        let _timer = Timer(timer);
        tokio::select! {
            answer = answer => answer.map_err(|_| Error::closed())?,
            _ = &mut too_late => Err(Error::new(Category::Network, "timeout", "the relay did not answer in time")),
        }
    }
}

/// What a live query has shown.
#[derive(Default)]
struct Live {
    begun: bool,
    /// None after an error: whatever comes next is news.
    shown: Option<Page>,
}

impl Live {
    /// The result, unless it is what was shown last.
    fn news(&mut self, result: Result<Page, Error>) -> Option<Result<Page, Error>> {
        self.begun = true;
        if let (Ok(page), Some(shown)) = (&result, &self.shown)
            && page == shown
        {
            return None;
        }
        self.shown = result.as_ref().ok().cloned();
        Some(result)
    }
}

/// Ends a timer's task when it is not waited for any more.
struct Timer(tokio::task::JoinHandle<()>);

impl Drop for Timer {
    fn drop(&mut self) {
        self.0.abort();
    }
}

fn no_refused(number: u64) -> Error {
    Error::new(Category::NotFound, "no_refused", format!("there is no refused change {number}"))
}

/// The value that a choice stands for.
fn pick(sides: &[ConflictSide], choice: Resolution) -> Result<Json, Error> {
    let only = |mine: bool| {
        let found: Vec<&ConflictSide> = sides.iter().filter(|side| side.mine == mine).collect();
        match (&found[..], mine) {
            ([side], _) => Ok(side.value.clone()),
            ([], true) => Err("this device wrote none of the sides".to_owned()),
            ([], false) => Err("this device wrote all of the sides".to_owned()),
            (more, true) => Err(format!("{} sides are of this device", more.len())),
            (more, false) => Err(format!("{} sides are of other devices", more.len())),
        }
    };
    let result = match choice {
        Resolution::Mine => only(true),
        Resolution::Theirs => only(false),
        Resolution::Side(number) => match number.checked_sub(1).and_then(|place| sides.get(place)) {
            Some(side) => Ok(side.value.clone()),
            None => Err(format!("there is no side {number}")),
        },
        Resolution::Value(value) => Ok(value),
    };
    result.map_err(|what| {
        let message = format!("{what}; there are {}", numbered(sides));
        Error::new(Category::Validation, "no_such_side", message)
            .with_help("name a side by its number, or give a value")
    })
}

/// The sides as a person can tell them apart.
fn numbered(sides: &[ConflictSide]) -> String {
    const VALUE_CHARS_MAX: usize = 60;
    let side = |(place, side): (usize, &ConflictSide)| {
        let mut value = side.value.to_string();
        if let Some((end, _)) = value.char_indices().nth(VALUE_CHARS_MAX) {
            value.truncate(end);
            value.push('…');
        }
        format!("{}: {value} ({})", place + 1, side.devices.join(", "))
    };
    sides.iter().enumerate().map(side).collect::<Vec<_>>().join("; ")
}

fn parse_device(text: &str) -> Option<DeviceId> {
    let bytes = base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(text).ok()?;
    Some(DeviceId(bytes.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_result_after_an_error_is_news() {
        let failed = || Err(Error::closed());
        let mut live = Live::default();
        assert_eq!(live.news(Ok(Page::default())).map(|news| news.is_ok()), Some(true));
        assert!(live.news(Ok(Page::default())).is_none());
        assert_eq!(live.news(failed()).map(|news| news.is_ok()), Some(false));
        assert_eq!(live.news(Ok(Page::default())).map(|news| news.is_ok()), Some(true));
        assert!(live.news(Ok(Page::default())).is_none());
    }
}
