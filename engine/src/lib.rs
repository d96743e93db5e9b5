//! **Anabranch**: apps embed it to work fully offline and rejoin later without losing anything.
//!
//! Each entity is one document that merges; a schema says how concurrent values of each field
//! become one; what a person must decide lands in a conflict inbox that is itself in sync.
//! Open an [`Engine`], take a [`Workspace`], and read and write: nothing on that path waits for
//! the network. With a relay configured, changes go out and come in by themselves.

mod error;
mod hub;
mod link;
mod queue;
mod status;
mod storage;
mod transaction;
mod typed;
mod workspace;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::mpsc;
use std::time::Duration;

use anabranch_core::codec;
use anabranch_core::id::{DeviceId, WorkspaceId};
use anabranch_core::replica::ReplicaConfig;
use anabranch_core::store::{Batch, Keyspace, Store, View};
use anabranch_core::wire::GrantRole;
use anabranch_store::DiskStore;
use anabranch_transport::DeviceKey;

pub use anabranch_core::entity::WHOLE_ENTITY;
pub use anabranch_core::id::EntityKey;
pub use anabranch_core::intent::Intent;
pub use anabranch_core::query::{Filter, Op, Query};
pub use anabranch_core::replica::{Edit, Expect, Fault, parse_version};
pub use anabranch_core::rows::{RefusedRecord, SyncStatus};
/// How the store on disk is kept: which backend, encrypted or not, how much memory.
pub use anabranch_store::{BackendKind, StoreKey, StoreOptions};
/// The address of a relay: where it is and who it is.
pub use anabranch_transport::RelayUrl;
/// Schemas: the types of a workspace, their fields, and the policy of each.
pub mod schema {
    pub use anabranch_core::schema::*;
}
/// The upkeep of stores: what takes the space, backups, and stores written anew. The store of an
/// engine lies in `store` in its directory.
pub mod store {
    pub use anabranch_store::{
        BackupReport, CompactOptions, CompactReport, CompactStep, Encryption, Kept, KindFigures,
        StorageFigures, StorageKind, StoreError, Upkeep, compact, peek, rekey, restore,
    };
}
pub use anabranch_derive::Entity;
pub use error::{Category, Error};
pub use link::TokenSource;
pub use schema::Schema;
pub use status::{Held, SyncOutcome, SyncReport, SyncState, WorkspaceStatus};
pub use transaction::Transaction;
pub use typed::{Entities, Entity, FieldName, Find, Loaded};
pub use workspace::{
    BoxStream, ChangeEvent, ChangeStream, ConflictItem, ConflictSide, Page, Record, Resolution, Verification,
    Workspace,
};

use hub::{Clock, Command, Hub, HubConfig};
use link::{LinkConfig, Wanted, WantedGuard};
use queue::Commands;
use workspace::Shared;

/// Where the count of the store's lives is kept.
const STORE_LIFE: &[u8] = b"engine/store-life";

/// What an engine is opened with.
#[must_use]
pub struct EngineBuilder {
    dir: PathBuf,
    schema: Schema,
    relay: Option<String>,
    token: Option<TokenSource>,
    device_name: Option<String>,
    assumed_role: Option<GrantRole>,
    clock_offset_ms: i64,
    background_sync: bool,
    store: StoreOptions,
    scrub_every: Option<Duration>,
    error: Option<Error>,
}

impl EngineBuilder {
    /// Adds the types of a schema.
    pub fn schema(mut self, schema: Schema) -> Self {
        self.schema.types.extend(schema.types);
        self
    }

    /// Adds the types of a schema file. `file` names it in errors.
    pub fn schema_source(self, source: &str, file: &str) -> Result<Self, Error> {
        let schema = Schema::parse(source, file)
            .map_err(|errors| Error::new(Category::Validation, "invalid_schema", errors.to_string()))?;
        Ok(self.schema(schema))
    }

    /// Adds a type of the app.
    pub fn register<T: Entity>(mut self) -> Self {
        let ty = T::entity_type();
        self.schema.types.insert(ty.name.clone(), ty);
        self
    }

    /// The relay's address: `quic://HOST:PORT#KEY`.
    pub fn relay(mut self, url: &str) -> Self {
        self.relay = Some(url.to_owned());
        self
    }

    /// A token to sign in with, or where to get one.
    pub fn token(mut self, token: impl Into<TokenSource>) -> Self {
        self.token = Some(token.into());
        self
    }

    /// What people call this device.
    pub fn device_name(mut self, name: &str) -> Self {
        self.device_name = Some(name.to_owned());
        self
    }

    /// The role to check edits by until the relay has granted one: `reader`, `writer`,
    /// `authority` or `admin`.
    pub fn assume_role(mut self, role: &str) -> Self {
        match GrantRole::from_name(role) {
            Some(role) => self.assumed_role = Some(role),
            None => {
                let message = format!("{role:?} is no role; there are reader, writer, authority and admin");
                self.error = Some(Error::new(Category::Usage, "unknown_role", message));
            }
        }
        self
    }

    /// Shifts the wall clock, for tests.
    pub fn clock_offset_ms(mut self, offset_ms: i64) -> Self {
        self.clock_offset_ms = offset_ms;
        self
    }

    /// Whether to keep a link to the relay at all times (the default), or only during
    /// [`Workspace::sync`].
    pub fn background_sync(mut self, on: bool) -> Self {
        self.background_sync = on;
        self
    }

    /// How the store on disk is kept. By default an existing store as it is, and a new one on
    /// sled, not encrypted.
    pub fn store(mut self, options: StoreOptions) -> Self {
        self.store = options;
        self
    }

    /// How long after one slow look at everything that is stored the next one begins: a day by
    /// default, `None` for never. It compares documents, rows, indexes and the digest, mends what
    /// follows from something else, and has the next sync fetch what is missing; see
    /// [`WorkspaceStatus::damage`]. [`Workspace::verify`] does the same at once, and so does the engine itself when it
    /// meets a damaged record, once an hour at most.
    pub fn scrub_every(mut self, every: Option<Duration>) -> Self {
        self.scrub_every = every;
        self
    }

    /// Opens the store in the directory, creating it where there is none, and starts to sync.
    ///
    /// # Errors
    /// [`Category::Storage`] with code `in_use` if another process has the directory, `damaged`
    /// if the store can't be trusted (it is moved aside, nothing is deleted), `key_needed`,
    /// `wrong_key`, `not_encrypted` or `other_backend` if [`EngineBuilder::store`] doesn't fit
    /// it (nothing is changed).
    pub async fn open(self) -> Result<Engine, Error> {
        if let Some(error) = self.error {
            return Err(error);
        }
        // Types of several sources must also fit each other.
        let schema = Schema::from_types(self.schema.types.into_values())
            .map_err(|errors| Error::new(Category::Validation, "invalid_schema", errors.to_string()))?;
        let relay: Option<RelayUrl> = self.relay.as_deref().map(str::parse).transpose()?;
        let dir = self.dir.clone();
        let (store, key, seed) = run_blocking(move || prepare(&dir, self.store)).await?;
        let store_life = store_life(&store)?;
        let disk = Arc::new(store);
        let store: Arc<dyn Store> = disk.clone();
        let device = DeviceId(key.public().0);
        let schema = Arc::new(schema);
        let template = ReplicaConfig {
            workspace: WorkspaceId::new("template")?,
            device,
            device_name: self.device_name.unwrap_or_else(|| device.to_string().chars().take(8).collect()),
            platform: std::env::consts::OS.to_owned(),
            schema_source: schema.to_toml(),
            schema: Arc::clone(&schema),
            assumed_role: self.assumed_role,
            store_life,
            seed,
        };
        let io = |error: std::io::Error| Error::new(Category::Storage, "threads", error.to_string());
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("anabranch-io")
            .enable_all()
            .build()
            .map_err(io)?;
        let wanted = Arc::new(Wanted::default());
        let (commands, inbox) = mpsc::channel::<Command>();
        let clock = Clock::new(self.clock_offset_ms);
        let config = HubConfig { template, clock, scrub_every: self.scrub_every };
        let hub = Hub::new(config, Arc::clone(&store), Arc::clone(&wanted), &commands);
        std::thread::Builder::new().name("anabranch-hub".into()).spawn(move || hub.run(inbox)).map_err(io)?;
        let has_relay = relay.is_some();
        if let Some(relay) = relay {
            let link = LinkConfig { relay, key, token: self.token };
            runtime.spawn(link::run(link, Arc::clone(&wanted), commands.clone()));
        }
        let background = (has_relay && self.background_sync).then(|| wanted.want());
        let shared = Arc::new(Shared {
            commands: Commands::new(commands),
            store,
            upkeep: store::Upkeep::of(&disk),
            dir: self.dir,
            schema,
            device,
            wanted,
            has_relay,
            timers: runtime.handle().clone(),
            next_sync: AtomicU64::new(1),
        });
        Ok(Engine { inner: Arc::new(Inner { shared, runtime: Some(runtime), _background: background }) })
    }
}

/// Opens what lies in the directory. Blocks on the disk.
fn prepare(dir: &Path, options: StoreOptions) -> Result<(DiskStore, DeviceKey, [u8; 32]), Error> {
    std::fs::create_dir_all(dir).map_err(|error| {
        Error::new(Category::Storage, "io", format!("can't create {}: {error}", dir.display()))
    })?;
    let store = DiskStore::open(dir.join("store"), options)?;
    let key = DeviceKey::load_or_create(dir.join("device.key"))?;
    let mut seed = [0; 32];
    getrandom::fill(&mut seed).map_err(|error| {
        Error::new(Category::Storage, "entropy", format!("the system gives no entropy: {error}"))
    })?;
    Ok((store, key, seed))
}

/// Which life of the store this is; a new one if the store was found to have gone back.
fn store_life(store: &DiskStore) -> Result<u32, Error> {
    let stored = store.get(View::Latest, Keyspace::META, STORE_LIFE)?;
    let mut life: u32 =
        stored.map(|bytes| codec::decode(&bytes, "the store's life")).transpose()?.unwrap_or_default();
    if store.rolled_back() {
        life += 1;
        let mut batch = Batch::new();
        batch.put(Keyspace::META, STORE_LIFE, codec::encode(&life));
        store.wait_durable(store.commit(batch)?)?;
        store.roll_back_handled()?;
        tracing::warn!("the store is older than what it once held: a new incarnation begins");
    }
    Ok(life)
}

/// Runs what blocks on a thread of its own, on whatever runtime the caller is.
async fn run_blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    let (done, result) = tokio::sync::oneshot::channel();
    let spawned = std::thread::Builder::new().name("anabranch-open".into()).spawn(move || {
        // The caller may have stopped waiting.
        let _ = done.send(work());
    });
    spawned.map_err(|error| Error::new(Category::Storage, "threads", error.to_string()))?;
    result.await.map_err(|_| Error::new(Category::Storage, "damaged", "opening the store failed"))?
}

pub(crate) struct Inner {
    shared: Arc<Shared>,
    runtime: Option<tokio::runtime::Runtime>,
    _background: Option<WantedGuard>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        // The hub makes everything durable and ends. Nobody waits for it here.
        let (reply, _) = tokio::sync::oneshot::channel();
        let _ = self.shared.commands.tell(Command::Shutdown { reply });
        if let Some(runtime) = self.runtime.take() {
            // A runtime must not be dropped on a thread of another one.
            runtime.shutdown_background();
        }
    }
}

/// The engine of one device: its store, its key, its link to a relay. Cheap to clone; when the
/// last clone and the last [`Workspace`] are dropped it shuts down.
#[derive(Clone)]
pub struct Engine {
    inner: Arc<Inner>,
}

impl Engine {
    /// An engine in a directory of its own.
    pub fn builder(dir: impl AsRef<Path>) -> EngineBuilder {
        EngineBuilder {
            dir: dir.as_ref().to_owned(),
            schema: Schema { types: Default::default() },
            relay: None,
            token: None,
            device_name: None,
            assumed_role: None,
            clock_offset_ms: 0,
            background_sync: true,
            store: StoreOptions::default(),
            scrub_every: Some(Duration::from_secs(24 * 60 * 60)),
            error: None,
        }
    }

    /// A workspace. From now on it takes part in syncs.
    pub async fn workspace(&self, name: &str) -> Result<Workspace, Error> {
        Workspace::open(Arc::clone(&self.inner), WorkspaceId::new(name)?).await
    }

    /// This device's public key, which is its identity.
    pub fn device(&self) -> String {
        self.inner.shared.device.to_string()
    }

    /// Makes everything durable, ends the link, and closes the store. Other handles get errors
    /// from now on. When this returns the directory can be opened again.
    pub async fn shutdown(&self) -> Result<(), Error> {
        let (reply, done) = tokio::sync::oneshot::channel();
        self.inner.shared.commands.tell(Command::Shutdown { reply })?;
        done.await.map_err(|_| Error::closed())
    }
}

#[doc(hidden)]
pub mod __private {
    //! For the code that `#[derive(Entity)]` writes.
    use crate::schema::EntityType;

    /// The type that the derive wrote as a schema file of one type.
    ///
    /// # Panics
    /// On what the derive could not see, such as a default longer than `max_bytes`. It is the
    /// app's own source that is wrong, so the first run of it says so.
    pub fn parse_type(source: &str) -> EntityType {
        EntityType::parse(source, "#[derive(Entity)]").unwrap_or_else(|errors| panic!("{errors}"))
    }
}

/// The examples in the README and the book, so that they compile and run.
#[cfg(doctest)]
mod documents {
    #[doc = include_str!("../../README.md")]
    struct Readme;

    #[doc = include_str!("../../docs/src/schema.md")]
    struct Schema;
}
