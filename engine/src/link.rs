//! The link to the relay: connects while someone wants it, and moves frames.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::Sender;
use std::time::Duration;

use anabranch_core::wire::MESSAGE_BYTES_MAX;
use anabranch_transport::{DeviceKey, RelayUrl, TransportError, connect};
use tokio::sync::{Notify, Semaphore};

use crate::error::Error;
use crate::hub::Command;
use crate::queue;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
const BACKOFF_BASE: Duration = Duration::from_millis(250);
const BACKOFF_MAX: Duration = Duration::from_secs(30);
/// Frames that may wait for the hub; then the link stops reading.
const FRAMES_QUEUED_MAX: usize = 64;

type TokenFuture = Pin<Box<dyn Future<Output = Result<String, String>> + Send>>;

/// Where tokens come from.
#[derive(Clone)]
pub enum TokenSource {
    /// One token for as long as it holds.
    Fixed(String),
    /// Asked for each connect, and when the relay wants another.
    Callback(Arc<dyn Fn() -> TokenFuture + Send + Sync>),
}

impl TokenSource {
    /// A source that asks the app.
    pub fn callback<F, R>(ask: F) -> Self
    where
        F: Fn() -> R + Send + Sync + 'static,
        R: Future<Output = Result<String, String>> + Send + 'static,
    {
        Self::Callback(Arc::new(move || Box::pin(ask())))
    }
}

impl From<String> for TokenSource {
    fn from(token: String) -> Self {
        Self::Fixed(token)
    }
}

impl From<&str> for TokenSource {
    fn from(token: &str) -> Self {
        Self::Fixed(token.to_owned())
    }
}

/// Whether someone wants a link, and the bells that the link task listens to.
#[derive(Default)]
pub(crate) struct Wanted {
    count: AtomicUsize,
    changed: Notify,
    token: Notify,
    signed_in: AtomicBool,
    stopped: AtomicBool,
}

impl Wanted {
    /// Wants a link for as long as the guard lives, and at once: a running wait is cut short.
    pub(crate) fn want(self: &Arc<Self>) -> WantedGuard {
        self.count.fetch_add(1, Ordering::AcqRel);
        self.changed.notify_one();
        WantedGuard(Arc::clone(self))
    }

    fn is_wanted(&self) -> bool {
        self.count.load(Ordering::Acquire) > 0 && !self.stopped.load(Ordering::Acquire)
    }

    /// From now on no link is of use to anybody.
    pub(crate) fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
        self.changed.notify_one();
    }

    pub(crate) fn ask_for_token(&self) {
        self.token.notify_one();
    }

    /// The relay talks to us: the next failure starts the waits anew.
    pub(crate) fn signed_in(&self) {
        self.signed_in.store(true, Ordering::Release);
    }
}

pub(crate) struct WantedGuard(Arc<Wanted>);

impl Drop for WantedGuard {
    fn drop(&mut self) {
        self.0.count.fetch_sub(1, Ordering::AcqRel);
        self.0.changed.notify_one();
    }
}

pub(crate) struct LinkConfig {
    pub(crate) relay: RelayUrl,
    pub(crate) key: DeviceKey,
    pub(crate) token: Option<TokenSource>,
}

/// Keeps a link while one is wanted. Ends when the hub is gone.
pub(crate) async fn run(config: LinkConfig, wanted: Arc<Wanted>, hub: Sender<Command>) {
    let mut failures: u32 = 0;
    loop {
        while !wanted.is_wanted() {
            wanted.changed.notified().await;
        }
        if hub.send(Command::LinkConnecting).is_err() {
            return;
        }
        let end = once(&config, &wanted, &hub).await;
        if wanted.signed_in.swap(false, Ordering::AcqRel) {
            failures = 0;
        }
        let unwanted = matches!(end, Ok(End::Unwanted));
        if hub.send(Command::LinkDown { error: end.err() }).is_err() {
            return;
        }
        if unwanted {
            // By now someone may want it.
            continue;
        }
        failures = failures.saturating_add(1);
        let wait = backoff(failures);
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = wanted.changed.notified() => {}
        }
    }
}

/// Exponential, with full jitter in its upper half, so that many devices don't come back at
/// once.
fn backoff(failures: u32) -> Duration {
    let ceiling = BACKOFF_BASE.saturating_mul(1 << failures.min(10)).min(BACKOFF_MAX);
    let mut random = [0; 2];
    // Without entropy the wait is merely the longest.
    if getrandom::fill(&mut random).is_err() {
        return ceiling;
    }
    let part = u32::from(u16::from_be_bytes(random));
    ceiling / 2 + (ceiling / 2).mul_f64(f64::from(part) / f64::from(u16::MAX))
}

/// How a link ended without an error of its own.
enum End {
    /// Nobody wanted it any more.
    Unwanted,
    /// The hub let go of it, and knows why.
    LetGo,
}

async fn once(config: &LinkConfig, wanted: &Arc<Wanted>, hub: &Sender<Command>) -> Result<End, Error> {
    let token = fetch_token(config.token.as_ref()).await?;
    let connection = tokio::select! {
        connected = connect(&config.relay, &config.key, CONNECT_TIMEOUT) => connected?,
        () = unwanted(wanted) => return Ok(End::Unwanted),
    };
    let (mut sender, mut receiver) = connection.open_control().await?;
    // The relay proved the key that we expect.
    receiver.raise_limit(MESSAGE_BYTES_MAX);
    let (outgoing, mut queue) = queue::frames();
    if hub.send(Command::LinkUp { outgoing, token }).is_err() {
        return Ok(End::LetGo);
    }
    let write = async {
        while let Some(frame) = queue.next().await {
            sender.send(frame).await?;
        }
        sender.finish().await
    };
    let permits = Arc::new(Semaphore::new(FRAMES_QUEUED_MAX));
    let read = async {
        while let Some(bytes) = receiver.next().await? {
            // Not dropped before the hub has taken the frame: see `Frame`.
            let Ok(permit) = permits.clone().acquire_owned().await else { break };
            if hub.send(Command::Frame { bytes, _permit: permit }).is_err() {
                break;
            }
        }
        Ok::<(), TransportError>(())
    };
    let tokens = async {
        let mut asked: u32 = 0;
        loop {
            wanted.token.notified().await;
            // A token that was taken ends a row of those that were not.
            if wanted.signed_in.load(Ordering::Acquire) {
                asked = 0;
            }
            if asked > 0 {
                tokio::time::sleep(backoff(asked)).await;
            }
            asked = asked.saturating_add(1);
            wanted.signed_in.store(false, Ordering::Release);
            if let Some(source @ TokenSource::Callback(_)) = &config.token {
                match fetch_token(Some(source)).await {
                    Ok(Some(token)) => {
                        if hub.send(Command::Token { token }).is_err() {
                            return;
                        }
                    }
                    Ok(None) => {}
                    Err(error) => {
                        tracing::warn!(%error, "no new token");
                        wanted.ask_for_token();
                    }
                }
            }
        }
    };
    let result = tokio::select! {
        written = write => written.map(|()| End::LetGo).map_err(Error::from),
        read = read => read.map_err(Error::from).and(Err(lost())),
        () = tokens => Ok(End::LetGo),
        () = unwanted(wanted) => Ok(End::Unwanted),
    };
    connection.close(0, "done");
    connection.closed_and_sent().await;
    result
}

fn lost() -> Error {
    Error::new(crate::Category::Network, "connection_lost", "the relay ended the connection")
}

async fn unwanted(wanted: &Wanted) {
    while wanted.is_wanted() {
        wanted.changed.notified().await;
    }
}

async fn fetch_token(source: Option<&TokenSource>) -> Result<Option<String>, Error> {
    match source {
        None => Ok(None),
        Some(TokenSource::Fixed(token)) => Ok(Some(token.clone())),
        Some(TokenSource::Callback(ask)) => ask().await.map(Some).map_err(|message| {
            Error::new(crate::Category::Auth, "no_token", format!("the app has no token: {message}"))
        }),
    }
}
