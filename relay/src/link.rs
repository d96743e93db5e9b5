//! One connection: frames in, frames out, and a bound on both.
//!
//! ```text
//! network ─▶ read ─▶ event queue ─▶ driver ─▶ outbox of this link ─▶ write ─▶ network
//! ```
//! Invariant: a link never has more than [`INPUTS_MAX`] messages in the event queue, so no
//! link can keep others from being heard. While its outbox is long, nothing is read from it:
//! a device that does not take its answers gets to ask no more questions. If the outbox fills
//! all the same, the link is cut.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anabranch_core::id::DeviceId;
use anabranch_core::relay::{ConnId, Input};
use anabranch_core::wire::{FaultCode, MESSAGE_BYTES_MAX};
use anabranch_transport::{Connection, FrameReceiver, FrameSender, TransportError};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::time::{Instant, timeout, timeout_at};

use crate::driver::Event;

/// Messages of one link that may wait for the driver; then nothing more is read from it.
const INPUTS_MAX: usize = 4;
/// Messages of the outbox at which nothing more is read from a link.
const OUTBOX_PAUSE: usize = 64;
/// Messages of the outbox at which a link is cut.
const OUTBOX_MAX: usize = 1024;
/// Bytes of all links' messages that may wait for the driver; then nothing more is read.
const QUEUED_KIB_MAX: usize = 64 * 1024;
/// How long a device may take to open its stream, and then to sign in, until it is cut.
const OPEN_TIMEOUT: Duration = Duration::from_secs(10);
const SIGN_IN_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a closing link may take to deliver what was sent before.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(2);

/// What all links share.
#[derive(Clone)]
pub(crate) struct Shared {
    events: mpsc::Sender<Event>,
    /// In KiB.
    queued: Arc<Semaphore>,
    stopping: watch::Receiver<bool>,
}

impl Shared {
    pub(crate) fn new(events: mpsc::Sender<Event>, stopping: watch::Receiver<bool>) -> Self {
        Self { events, queued: Arc::new(Semaphore::new(QUEUED_KIB_MAX)), stopping }
    }
}

/// What a queued message holds until the driver has taken it.
pub(crate) struct Held {
    _slot: OwnedSemaphorePermit,
    _bytes: OwnedSemaphorePermit,
}

enum Outgoing {
    Frame(Vec<u8>),
    Close(FaultCode, String),
}

/// What a link has to know at once, past its outbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Notice {
    None,
    /// The device signed in.
    SignedIn,
    /// The outbox is full.
    Overrun,
}

#[derive(Default)]
struct Backlog {
    messages: AtomicUsize,
    shrank: Notify,
}

impl Backlog {
    async fn below(&self, bound: usize) {
        loop {
            let shrank = self.shrank.notified();
            if self.messages.load(Ordering::Acquire) < bound {
                return;
            }
            shrank.await;
        }
    }
}

/// The driver's end of a link.
pub(crate) struct LinkHandle {
    outbox: mpsc::Sender<Outgoing>,
    backlog: Arc<Backlog>,
    notice: watch::Sender<Notice>,
}

impl LinkHandle {
    /// Queues a message. Cuts the link if its outbox is full.
    pub(crate) fn send(&self, bytes: Vec<u8>) {
        self.push(Outgoing::Frame(bytes));
    }

    /// Closes the link after what was sent before.
    pub(crate) fn close(&self, code: FaultCode, reason: String) {
        self.push(Outgoing::Close(code, reason));
    }

    /// Lets messages up to the full bound in, and lifts the deadline of the sign-in.
    pub(crate) fn signed_in(&self) {
        self.notice.send_if_modified(|notice| {
            let first = *notice == Notice::None;
            if first {
                *notice = Notice::SignedIn;
            }
            first
        });
    }

    fn push(&self, message: Outgoing) {
        self.backlog.messages.fetch_add(1, Ordering::AcqRel);
        if let Err(mpsc::error::TrySendError::Full(_)) = self.outbox.try_send(message) {
            self.notice.send_replace(Notice::Overrun);
        }
    }
}

/// Why a link ends.
enum End {
    /// The device left or the network did.
    Gone(TransportError),
    /// The device closed its stream.
    Finished,
    /// This end closes it, after what is in the outbox if `flush`.
    Close { code: FaultCode, reason: String, flush: bool },
    /// The relay is stopping.
    Stopping,
}

impl End {
    fn cut(code: FaultCode, reason: &str) -> Self {
        End::Close { code, reason: reason.into(), flush: false }
    }
}

/// Serves one connection until it ends. The driver learns of its beginning and its end.
pub(crate) async fn serve(conn: ConnId, connection: Connection, mut shared: Shared) {
    let device = DeviceId(*connection.peer_key().as_bytes());
    let opened = tokio::select! {
        opened = timeout(OPEN_TIMEOUT, connection.accept_control()) => opened,
        _ = shared.stopping.wait_for(|stop| *stop) => {
            connection.close(FaultCode::ShuttingDown as u32, "the relay is shutting down");
            return;
        }
    };
    let (mut sender, mut receiver) = match opened {
        Ok(Ok(streams)) => streams,
        Ok(Err(error)) => {
            tracing::debug!(conn = conn.0, %device, %error, "a connection ended before it began");
            return;
        }
        Err(_) => {
            connection.close(FaultCode::Protocol as u32, "no stream was opened in time");
            return;
        }
    };
    let (outbox, outgoing) = mpsc::channel(OUTBOX_MAX);
    let (notice, notices) = watch::channel(Notice::None);
    let backlog = Arc::new(Backlog::default());
    let handle = LinkHandle { outbox, backlog: backlog.clone(), notice };
    if shared.events.send(Event::Connected { conn, device, link: handle }).await.is_err() {
        connection.close(FaultCode::ShuttingDown as u32, "the relay is shutting down");
        return;
    }
    tracing::info!(conn = conn.0, %device, "connected");

    // Both in this task: when it tells of the end, nothing of this link follows.
    let end = tokio::select! {
        end = read(conn, &mut receiver, notices, &backlog, &shared) => end,
        end = write(conn, &mut sender, outgoing, &backlog, &shared) => end,
    };
    match &end {
        End::Gone(error) => tracing::info!(conn = conn.0, %device, %error, "disconnected"),
        End::Finished => tracing::info!(conn = conn.0, %device, "disconnected"),
        End::Close { code, reason, .. } => {
            tracing::info!(conn = conn.0, %device, code = code.name(), reason, "closed");
        }
        End::Stopping => tracing::debug!(conn = conn.0, %device, "closed, as the relay stops"),
    }
    let _ = shared.events.send(Event::Input(Input::Disconnected { conn }, None)).await;
    let (code, reason, flush) = match end {
        End::Gone(_) | End::Finished => (0, String::new(), false),
        End::Close { code, reason, flush } => (code as u32, reason, flush),
        End::Stopping => (FaultCode::ShuttingDown as u32, "the relay is shutting down".into(), true),
    };
    if flush && timeout(FLUSH_TIMEOUT, sender.finish()).await.is_err() {
        tracing::debug!(conn = conn.0, "closed before everything was delivered");
    }
    connection.close(code, &reason);
}

async fn read(
    conn: ConnId,
    receiver: &mut FrameReceiver,
    mut notices: watch::Receiver<Notice>,
    backlog: &Backlog,
    shared: &Shared,
) -> End {
    let slots = Arc::new(Semaphore::new(INPUTS_MAX));
    let sign_in_by = Instant::now() + SIGN_IN_TIMEOUT;
    let mut signed_in = false;
    loop {
        let next = async {
            backlog.below(OUTBOX_PAUSE).await;
            let slot = slots.clone().acquire_owned().await;
            (slot, receiver.next().await)
        };
        let in_time = async { if signed_in { Ok(next.await) } else { timeout_at(sign_in_by, next).await } };
        let (slot, frame) = tokio::select! {
            // Notices first: the limit is raised before the answer to the sign-in leaves, so
            // that the first large message after it never meets the small limit.
            biased;
            changed = notices.changed() => {
                match changed.map(|()| *notices.borrow_and_update()) {
                    Ok(Notice::None) => {}
                    Ok(Notice::SignedIn) => {
                        signed_in = true;
                        receiver.raise_limit(MESSAGE_BYTES_MAX);
                    }
                    Ok(Notice::Overrun) => {
                        return End::cut(FaultCode::Quota, "the device takes its messages too slowly");
                    }
                    Err(_) => return End::Stopping,
                }
                continue;
            }
            frame = in_time => match frame {
                Ok(frame) => frame,
                Err(_) => return End::cut(FaultCode::NotSignedIn, "the device did not sign in in time"),
            },
        };
        let frame = match frame {
            Ok(Some(frame)) => frame,
            Ok(None) => return End::Finished,
            Err(error) if error.is_peer_fault() => {
                let reason = error.to_string();
                return End::Close { code: FaultCode::Protocol, reason, flush: true };
            }
            Err(error) => return End::Gone(error),
        };
        let kib = u32::try_from(frame.len() / 1024 + 1).unwrap_or(u32::MAX);
        let (Ok(slot), Ok(bytes)) = (slot, shared.queued.clone().acquire_many_owned(kib).await) else {
            return End::Stopping;
        };
        let held = Held { _slot: slot, _bytes: bytes };
        let input = Input::Received { conn, bytes: frame };
        if shared.events.send(Event::Input(input, Some(held))).await.is_err() {
            return End::Stopping;
        }
    }
}

async fn write(
    conn: ConnId,
    sender: &mut FrameSender,
    mut outgoing: mpsc::Receiver<Outgoing>,
    backlog: &Backlog,
    shared: &Shared,
) -> End {
    while let Some(message) = outgoing.recv().await {
        match message {
            Outgoing::Frame(bytes) => {
                if let Err(error) = sender.send(bytes).await {
                    return End::Gone(error);
                }
            }
            Outgoing::Close(code, reason) => return End::Close { code, reason, flush: true },
        }
        backlog.messages.fetch_sub(1, Ordering::AcqRel);
        backlog.shrank.notify_one();
        if shared.events.send(Event::Input(Input::Sent { conn }, None)).await.is_err() {
            return End::Stopping;
        }
    }
    End::Stopping
}
