//! One connection: frames in, frames out, and a bound on both.
//!
//! ```text
//! network ─▶ read ─▶ event queue ─▶ driver ─▶ outbox of this link ─▶ write ─▶ network
//! ```
//! Invariants: a link never has more than [`INPUTS_MAX`] messages in the event queue, so no
//! link can keep others from being heard. Nothing is read of a message before there is room for
//! all of it: every link has [`OWN_KIB`] for small ones, which nobody else can take, and larger ones
//! share [`LARGE_KIB_MAX`], of which one user gets [`LARGE_KIB_PER_USER`]. While its outbox is long,
//! nothing is read from a link: a device that does not take its answers gets to ask no more
//! questions. If the outbox fills all the same, the link is cut.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use anabranch_core::id::DeviceId;
use anabranch_core::relay::{ConnId, Input, UserTag};
use anabranch_core::wire::{FaultCode, MESSAGE_BYTES_MAX};
use anabranch_transport::{
    Connection, FRAME_BYTES_MAX_BEFORE_SIGN_IN, FrameReceiver, FrameSender, TransportError,
};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::time::{Instant, sleep, timeout, timeout_at};

use crate::driver::Event;

/// Messages of one link that may wait for the driver; then nothing more is read from it.
const INPUTS_MAX: usize = 4;
/// Messages of the outbox at which nothing more is read from a link.
const OUTBOX_PAUSE: usize = 64;
/// Messages of the outbox at which a link is cut.
const OUTBOX_MAX: usize = 1024;
/// Room for messages that a link has to itself, from their first byte until they were dealt with.
const OWN_KIB: usize = FRAME_BYTES_MAX_BEFORE_SIGN_IN / 1024;
/// Room for messages that are larger than that, of all links together; then none of them is read.
const LARGE_KIB_MAX: usize = 64 * 1024;
/// How much of it the devices of one user get: one message of the largest.
const LARGE_KIB_PER_USER: usize = MESSAGE_BYTES_MAX / 1024;
/// How long a device may take to send a message that is larger than its link's own room, until it is
/// cut: others wait for the room that it holds.
const LARGE_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a device may take to open its stream, and then to sign in, until it is cut.
const OPEN_TIMEOUT: Duration = Duration::from_secs(10);
const SIGN_IN_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a closing link may take to deliver what was sent before.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(2);

/// What all links share.
#[derive(Clone)]
pub(crate) struct Shared {
    events: mpsc::Sender<Event>,
    /// Room for large messages, in KiB.
    large: Arc<Semaphore>,
    stopping: watch::Receiver<bool>,
}

impl Shared {
    pub(crate) fn new(events: mpsc::Sender<Event>, stopping: watch::Receiver<bool>) -> Self {
        Self { events, large: Arc::new(Semaphore::new(LARGE_KIB_MAX)), stopping }
    }
}

/// What a message holds until it was dealt with.
pub(crate) struct Held {
    _slot: OwnedSemaphorePermit,
    _room: Vec<OwnedSemaphorePermit>,
}

/// Each user's part of the room for large messages.
#[derive(Default)]
pub(crate) struct Pools(BTreeMap<UserTag, Weak<Semaphore>>);

impl Pools {
    /// The part of a user, for as long as anyone holds it.
    pub(crate) fn of(&mut self, user: UserTag) -> Arc<Semaphore> {
        if let Some(pool) = self.0.get(&user).and_then(Weak::upgrade) {
            return pool;
        }
        let pool = Arc::new(Semaphore::new(LARGE_KIB_PER_USER));
        self.0.retain(|_, pool| pool.strong_count() > 0);
        self.0.insert(user, Arc::downgrade(&pool));
        pool
    }
}

enum Outgoing {
    Frame(Vec<u8>),
    Close(FaultCode, String),
}

/// What a link has to know at once, past its outbox.
#[derive(Clone, Debug)]
enum Notice {
    None,
    /// The device signed in; its user's part of the room for large messages.
    SignedIn(Arc<Semaphore>),
    /// The link is to be closed after what was sent before, if the device takes that.
    Closing(FaultCode, String),
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
        self.push(Outgoing::Close(code, reason.clone()));
        self.notice.send_if_modified(|notice| {
            let ends = !matches!(notice, Notice::Overrun);
            if ends {
                *notice = Notice::Closing(code, reason);
            }
            ends
        });
    }

    /// Lets messages up to the full bound in, within the user's part of the room for them, and lifts
    /// the deadline of the sign-in.
    pub(crate) fn signed_in(&self, large: Arc<Semaphore>) {
        self.notice.send_if_modified(|notice| {
            let first = matches!(notice, Notice::None);
            if first {
                *notice = Notice::SignedIn(large);
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
    let mut room = Room::new(shared);
    let sign_in_by = Instant::now() + SIGN_IN_TIMEOUT;
    loop {
        let next = next_message(receiver, backlog, &room);
        let signed_in = room.of_user.is_some();
        let in_time = async { if signed_in { Ok(next.await) } else { timeout_at(sign_in_by, next).await } };
        let message = tokio::select! {
            // Notices first: the limit is raised before the answer to the sign-in leaves, so
            // that the first large message after it never meets the small limit.
            biased;
            changed = notices.changed() => {
                match changed.map(|()| notices.borrow_and_update().clone()) {
                    Ok(Notice::None) => {}
                    Ok(Notice::SignedIn(of_user)) => {
                        room.of_user = Some(of_user);
                        receiver.raise_limit(MESSAGE_BYTES_MAX);
                    }
                    Ok(Notice::Closing(code, reason)) => {
                        // If the device takes what was sent before, `write` ends the link earlier.
                        sleep(FLUSH_TIMEOUT).await;
                        return End::Close { code, reason, flush: false };
                    }
                    Ok(Notice::Overrun) => {
                        return End::cut(FaultCode::Quota, "the device takes its messages too slowly");
                    }
                    Err(_) => return End::Stopping,
                }
                continue;
            }
            message = in_time => match message {
                Ok(message) => message,
                Err(_) => return End::cut(FaultCode::NotSignedIn, "the device did not sign in in time"),
            },
        };
        let (bytes, held) = match message {
            Ok(message) => message,
            Err(end) => return end,
        };
        let input = Input::Received { conn, bytes };
        if shared.events.send(Event::Input(input, Some(held))).await.is_err() {
            return End::Stopping;
        }
    }
}

/// The room that a link's messages may take.
struct Room {
    slots: Arc<Semaphore>,
    own: Arc<Semaphore>,
    large: Arc<Semaphore>,
    /// Once the device signed in; before, there are no large messages.
    of_user: Option<Arc<Semaphore>>,
}

impl Room {
    fn new(shared: &Shared) -> Self {
        Self {
            slots: Arc::new(Semaphore::new(INPUTS_MAX)),
            own: Arc::new(Semaphore::new(OWN_KIB)),
            large: shared.large.clone(),
            of_user: None,
        }
    }

    /// Waits for room for a message. The user's part comes first: those who wait for that hold
    /// nothing that others need.
    async fn take(&self, bytes: usize) -> Option<Vec<OwnedSemaphorePermit>> {
        let kib = u32::try_from(bytes.div_ceil(1024).max(1)).ok()?;
        let pools = match &self.of_user {
            Some(of_user) if is_large(bytes) => vec![of_user, &self.large],
            _ => vec![&self.own],
        };
        let mut taken = Vec::new();
        for pool in pools {
            taken.push(pool.clone().acquire_many_owned(kib).await.ok()?);
        }
        Some(taken)
    }
}

fn is_large(bytes: usize) -> bool {
    bytes > OWN_KIB * 1024
}

/// Reads the next message once there is room for it. If the future is dropped, nothing is lost.
async fn next_message(
    receiver: &mut FrameReceiver,
    backlog: &Backlog,
    room: &Room,
) -> Result<(Vec<u8>, Held), End> {
    backlog.below(OUTBOX_PAUSE).await;
    let slot = room.slots.clone().acquire_owned().await.map_err(|_| End::Stopping)?;
    let bytes = receiver.announced().await.map_err(ended)?.ok_or(End::Finished)?;
    let taken = room.take(bytes).await.ok_or(End::Stopping)?;
    let frame = if is_large(bytes) {
        let late = || End::cut(FaultCode::Quota, "the device took too long to send a message");
        timeout(LARGE_TIMEOUT, receiver.next()).await.map_err(|_| late())?
    } else {
        receiver.next().await
    };
    let frame = frame.map_err(ended)?.ok_or(End::Finished)?;
    Ok((frame, Held { _slot: slot, _room: taken }))
}

fn ended(error: TransportError) -> End {
    if error.is_peer_fault() {
        End::Close { code: FaultCode::Protocol, reason: error.to_string(), flush: true }
    } else {
        End::Gone(error)
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
