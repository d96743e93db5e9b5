//! The running relay: starting, stopping, and what happens when something fails.

use std::future::Future;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anabranch_core::relay::{ConnId, Input, Rate, Relay, RelayConfig};
use anabranch_core::store::{Store as _, StoreError};
use anabranch_core::wire::FaultCode;
use anabranch_store::{DiskStore, StoreOptions, Upkeep};
use anabranch_transport::{DeviceKey, Endpoint, Limits, PublicKey, RelayUrl, TransportError};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::{JoinError, JoinSet};
use tokio::time::{Instant, timeout_at};

use crate::config::{ConfigError, KeySource, RelayOptions, RelaySettings};
use crate::driver::{Clock, Driver, EVENTS_MAX, Event, watch_durable};
use crate::keys::KeyError;
use crate::link;
use crate::token::JwtVerifier;

/// The part of all connections that devices may have which have not signed in: a third, so that even when
/// all come back at once each has the time to sign in before newcomers press it out.
const STRANGERS_PART: usize = 3;
/// How long a stopping relay waits for what it has to tell its devices.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);

/// Why a relay can't start, or had to stop.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RelayError {
    /// It is set up wrongly.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Its keys or its directory can't be used.
    #[error(transparent)]
    Keys(#[from] KeyError),
    /// The store can't be opened or failed. After a failure nothing was acknowledged that is
    /// not stored; starting again may help once the cause is gone.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The network can't be used.
    #[error(transparent)]
    Network(#[from] TransportError),
    /// The operating system gave no thread, no random numbers or no signals.
    #[error("could not {action}: {cause}")]
    System {
        /// What was tried.
        action: &'static str,
        /// The system's words.
        cause: String,
    },
    /// A fault of this program. What was acknowledged is stored; the relay can be started
    /// again.
    #[error("the relay stopped on a fault of its own, please report it: {what}")]
    Panicked {
        /// The panic's message.
        what: String,
    },
}

impl RelayError {
    /// Whether starting again, with nothing changed but time, may help.
    pub fn can_retry(&self) -> bool {
        match self {
            RelayError::Network(error) => error.can_retry(),
            RelayError::Store(error) => {
                matches!(error, StoreError::InUse { .. } | StoreError::NoSpace { .. })
            }
            RelayError::Panicked { .. } | RelayError::System { .. } => true,
            RelayError::Config(_) | RelayError::Keys(_) => false,
        }
    }
}

/// Starts relays.
#[derive(Debug)]
pub struct RelayDaemon;

impl RelayDaemon {
    /// Starts a relay: makes its directory and keys where they are absent, opens the store,
    /// listens. When this returns, devices can connect, and the relay's `address` file says
    /// where. Call it within a tokio runtime, which has to outlive the relay.
    ///
    /// # Errors
    /// [`RelayError`]; nothing keeps running then. A second relay in one directory fails with
    /// [`StoreError::InUse`].
    pub async fn start(options: RelayOptions) -> Result<RelayHandle, RelayError> {
        let settings = options.resolve()?;
        let opened = tokio::task::spawn_blocking(move || Opened::open(settings));
        let opened = opened
            .await
            .map_err(|error| RelayError::System { action: "open the store", cause: error.to_string() })??;
        opened.serve()
    }

    /// Runs a relay until the process is told to end by SIGTERM or SIGINT (Ctrl-C), then stops
    /// it as [`RelayHandle::shutdown`] does. `started` is called once devices can connect.
    ///
    /// # Errors
    /// As [`RelayDaemon::start`] and [`RelayHandle::wait`].
    pub async fn run_until_signal(
        options: RelayOptions,
        started: impl FnOnce(&RelayHandle),
    ) -> Result<(), RelayError> {
        // Before the start, so that no signal is missed.
        let signal = end_signal()?;
        let relay = Self::start(options).await?;
        started(&relay);
        tokio::select! {
            ended = relay.wait() => ended,
            name = signal => {
                tracing::info!(signal = name, "stopping");
                relay.shutdown().await
            }
        }
    }
}

#[cfg(unix)]
fn end_signal() -> Result<impl Future<Output = &'static str>, RelayError> {
    use tokio::signal::unix::{SignalKind, signal};
    let listen = |kind| {
        signal(kind)
            .map_err(|error| RelayError::System { action: "listen for signals", cause: error.to_string() })
    };
    let mut terminate = listen(SignalKind::terminate())?;
    let mut interrupt = listen(SignalKind::interrupt())?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
        }
    })
}

#[cfg(not(unix))]
fn end_signal() -> Result<impl Future<Output = &'static str>, RelayError> {
    Ok(async {
        if tokio::signal::ctrl_c().await.is_err() {
            // Without a way to be told, run on.
            std::future::pending::<()>().await;
        }
        "Ctrl-C"
    })
}

/// A running relay. Dropping it stops the relay without waiting for that.
#[derive(Debug)]
pub struct RelayHandle {
    url: RelayUrl,
    local_addr: SocketAddr,
    dir: PathBuf,
    upkeep: Upkeep,
    stop: watch::Sender<bool>,
    ended: watch::Receiver<Option<Result<(), RelayError>>>,
}

impl RelayHandle {
    /// The URL by which devices reach it, with its key.
    pub fn url(&self) -> &RelayUrl {
        &self.url
    }

    /// The address that it listens on.
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Figures, checks and backups of the relay's store while it runs.
    pub fn upkeep(&self) -> &Upkeep {
        &self.upkeep
    }

    /// Stops the relay: devices are told to go away and get what was acknowledged to them,
    /// for at most five seconds, then the store is closed. When this returns, everything that
    /// was taken in is durable and the directory is free for another relay. Dropping the
    /// future does not undo it.
    ///
    /// # Errors
    /// As [`RelayHandle::wait`].
    pub async fn shutdown(&self) -> Result<(), RelayError> {
        self.stop.send_replace(true);
        self.wait().await
    }

    /// Waits until the relay has stopped, asked to or not.
    ///
    /// # Errors
    /// Why it could not go on.
    pub async fn wait(&self) -> Result<(), RelayError> {
        let mut ended = self.ended.clone();
        match ended.wait_for(Option::is_some).await.as_deref() {
            Ok(Some(ended)) => ended.clone(),
            // Its task was lost, with the runtime that it ran in.
            Ok(None) | Err(_) => Err(RelayError::System {
                action: "keep the relay running",
                cause: "its runtime ended".into(),
            }),
        }
    }
}

/// Everything that blocks while it is opened.
struct Opened {
    settings: RelaySettings,
    key: DeviceKey,
    verifier: JwtVerifier,
    store: Arc<DiskStore>,
}

impl Opened {
    fn open(settings: RelaySettings) -> Result<Self, RelayError> {
        let dir = &settings.dir;
        dir.create()?;
        let key = dir.relay_key()?;
        let verifier = JwtVerifier::open(dir, settings.issuers.clone())?;
        let mut options = StoreOptions::default().cache_bytes(u64::from(settings.cache_mb) << 20);
        options.backend = settings.store_backend;
        options.encryption = settings.store_key.as_ref().map(KeySource::read).transpose()?;
        let store = Arc::new(DiskStore::open(dir.store_path(), options)?);
        if store.rolled_back() {
            tracing::error!("the store is behind what it once held: an older copy, or a lost file");
        }
        if store.rolled_back() || settings.new_epoch {
            store.wait_durable(Relay::renew_epoch(&*store, random_epoch()?)?)?;
            store.roll_back_handled()?;
            tracing::warn!("the feeds have a new epoch: devices bring what this relay has lost");
        }
        Ok(Self { settings, key, verifier, store })
    }

    fn serve(self) -> Result<RelayHandle, RelayError> {
        let Opened { settings, key, verifier, store } = self;
        let system = |action, cause: String| RelayError::System { action, cause };
        let epoch_seed = random_epoch()?;
        let keys = verifier.key_count();
        let durable = watch_durable(&*store)?;
        let upkeep = Upkeep::of(&store);
        let relay = Relay::open(store.clone(), Box::new(verifier), relay_config(&settings), epoch_seed)?;

        let limits = Limits::default();
        let strangers_max = limits.connections_max / STRANGERS_PART;
        let endpoint = Endpoint::bind(settings.listen, &key, limits)?;
        let local_addr = endpoint.local_addr()?;
        let url = public_url(&settings, local_addr, key.public())?;
        settings.dir.write_address(&url)?;

        let (events, inbox) = mpsc::channel(EVENTS_MAX);
        let driver =
            Driver { relay, store, events: inbox, durable, clock: Clock::new(settings.clock_offset_ms) };
        let (report, driver_ended) = oneshot::channel();
        let runtime = Handle::current();
        thread::Builder::new()
            .name("anabranch-relay".into())
            .spawn(move || {
                let _ = report.send(driver.run(&runtime));
            })
            .map_err(|error| system("start a thread", error.to_string()))?;

        let (stop, stopping) = watch::channel(false);
        let (end, ended) = watch::channel(None);
        let shared = link::Shared::new(events.clone(), stopping.clone(), strangers_max);
        tokio::spawn(async move {
            let result = supervise(endpoint, shared, events, stopping, driver_ended).await;
            end.send_replace(Some(result));
        });
        tracing::info!(
            %url, %local_addr, dir = %settings.dir.root().display(), keys,
            require_schema = settings.require_schema, "the relay is listening"
        );
        if settings.clock_offset_ms != 0 {
            tracing::warn!(offset_ms = settings.clock_offset_ms, "the wall clock is shifted");
        }
        let dir = settings.dir.root().to_owned();
        Ok(RelayHandle { url, local_addr, dir, upkeep, stop, ended })
    }
}

fn random_epoch() -> Result<[u8; 16], RelayError> {
    let mut epoch = [0; 16];
    getrandom::fill(&mut epoch)
        .map_err(|error| RelayError::System { action: "get random numbers", cause: error.to_string() })?;
    Ok(epoch)
}

fn relay_config(settings: &RelaySettings) -> RelayConfig {
    let mut config = RelayConfig::default();
    config.software = format!("anabranch-relay/{}", env!("CARGO_PKG_VERSION"));
    config.grant_ms = u64::from(settings.grant_days) * 24 * 60 * 60 * 1000;
    config.require_schema = settings.require_schema;
    config.channels_max = settings.workspaces_per_connection as usize;
    config.device_connections_max = settings.connections_per_device as usize;
    config.user_connections_max = settings.connections_per_user as usize;
    config.workspace_connections_max = settings.connections_per_workspace as usize;
    config.device_rate = Rate::kib_per_s(settings.device_kib_per_second.into());
    config.user_rate = Rate::kib_per_s(settings.user_kib_per_second.into());
    config.workspace_rate = Rate::kib_per_s(settings.workspace_kib_per_second.into());
    config.unsent_bytes_max = (settings.unsent_mb as usize) << 20;
    config
}

fn public_url(
    settings: &RelaySettings,
    local_addr: SocketAddr,
    key: PublicKey,
) -> Result<RelayUrl, RelayError> {
    let dialled = match &settings.public_address {
        Some(address) => address.clone(),
        None if local_addr.ip().is_unspecified() => {
            tracing::warn!(
                "no public_address is set; invites name an address that works on this machine only"
            );
            match local_addr {
                SocketAddr::V4(_) => format!("127.0.0.1:{}", local_addr.port()),
                SocketAddr::V6(_) => format!("[::1]:{}", local_addr.port()),
            }
        }
        None => local_addr.to_string(),
    };
    Ok(format!("quic://{dialled}#{key}").parse()?)
}

/// Takes connections until told to stop or the driver ends; then takes leave in order.
async fn supervise(
    endpoint: Endpoint,
    shared: link::Shared,
    events: mpsc::Sender<Event>,
    mut stopping: watch::Receiver<bool>,
    mut driver_ended: oneshot::Receiver<Result<(), RelayError>>,
) -> Result<(), RelayError> {
    let mut links = JoinSet::new();
    let mut next_conn = 1;
    let early_end = loop {
        tokio::select! {
            ended = &mut driver_ended => break Some(ended),
            // An error is the handle's end: nobody is left to stop it later.
            _ = stopping.wait_for(|stop| *stop) => break None,
            Some(link) = links.join_next() => log_panic(link),
            connection = endpoint.accept() => match connection {
                Some(connection) => {
                    links.spawn(link::serve(ConnId(next_conn), connection, shared.clone()));
                    next_conn += 1;
                }
                None => break None,
            },
        }
    };
    drop(shared);

    let by = Instant::now() + DRAIN_TIMEOUT;
    let drain = async {
        if early_end.is_none() {
            let _ = events.send(Event::Input(Input::Drain, None)).await;
        }
        while let Some(link) = links.join_next().await {
            log_panic(link);
        }
    };
    if timeout_at(by, drain).await.is_err() {
        tracing::warn!(links = links.len(), "some devices did not take leave in time");
        links.shutdown().await;
    }
    endpoint.close(FaultCode::ShuttingDown as u32, "the relay is shutting down").await;

    let ended = match early_end {
        Some(ended) => ended,
        None => {
            let _ = events.send(Event::Stop).await;
            driver_ended.await
        }
    };
    let ended = ended.unwrap_or_else(|_| Err(RelayError::Panicked { what: "its thread vanished".into() }));
    if ended.is_ok() {
        tracing::info!("the relay has stopped");
    }
    ended
}

fn log_panic(link: Result<(), JoinError>) {
    if let Err(error) = link {
        tracing::error!(%error, "a connection's task ended on a fault of ours");
    }
}
