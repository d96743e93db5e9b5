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
//! questions. If the outbox fills all the same, the link is cut. Of the links of devices that have not
//! signed in there is a bound, at which the oldest is cut: anyone can make them.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use anabranch_core::id::DeviceId;
use anabranch_core::relay::{ConnId, Input, UserTag};
use anabranch_core::wire::{FaultCode, MESSAGE_BYTES_MAX};
use anabranch_transport::{
    Connection, FRAME_BYTES_MAX_BEFORE_SIGN_IN, FrameReceiver, FrameSender, TransportError,
};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
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
/// How often it is looked at whether a message that is larger than its link's own room goes on, and how
/// much must have come of it since: 8 KiB a second. Else the link is cut: others wait for the room that it
/// holds.
const LARGE_WINDOW: Duration = Duration::from_secs(60);
const LARGE_WINDOW_BYTES_MIN: usize = 60 * 8 * 1024;
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
    strangers: Arc<Strangers>,
    stopping: watch::Receiver<bool>,
}

impl Shared {
    /// `strangers_max` is how many links there may be of devices that have not signed in.
    pub(crate) fn new(
        events: mpsc::Sender<Event>,
        stopping: watch::Receiver<bool>,
        strangers_max: usize,
    ) -> Self {
        let strangers = Arc::new(Strangers { links: Mutex::default(), max: strangers_max.max(1) });
        Self { events, large: Arc::new(Semaphore::new(LARGE_KIB_MAX)), strangers, stopping }
    }
}

/// The links of devices that have not signed in, by number and therefore by age, and how each is told to
/// leave. Newcomers get in whatever the others do: a device that means to sign in does so at once, and
/// those who only hold a place are the oldest soon.
struct Strangers {
    links: Mutex<BTreeMap<ConnId, oneshot::Sender<()>>>,
    max: usize,
}

impl Strangers {
    fn enter(self: &Arc<Self>, conn: ConnId) -> Stranger {
        let (leave, told) = oneshot::channel();
        let mut links = self.lock();
        if links.len() >= self.max
            && let Some((_, oldest)) = links.pop_first()
        {
            // One that is leaving by itself does not hear it.
            let _ = oldest.send(());
        }
        links.insert(conn, leave);
        Stranger { conn, told, all: self.clone() }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<ConnId, oneshot::Sender<()>>> {
        self.links.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The place of a link among them, until it is dropped.
struct Stranger {
    conn: ConnId,
    told: oneshot::Receiver<()>,
    all: Arc<Strangers>,
}

impl Stranger {
    /// Waits until it has to leave; for ever if it is none any more.
    async fn leaves(place: &mut Option<Self>) -> End {
        if let Some(stranger) = place
            && (&mut stranger.told).await.is_ok()
        {
            return End::cut(FaultCode::Quota, CROWDED);
        }
        std::future::pending().await
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        self.all.lock().remove(&self.conn);
    }
}

const CROWDED: &str = "too many devices connect and don't sign in; try again";

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
    let mut stranger = Some(shared.strangers.enter(conn));
    let opened = tokio::select! {
        _ = Stranger::leaves(&mut stranger) => {
            connection.close(FaultCode::Quota as u32, CROWDED);
            return;
        }
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
        end = read(conn, &mut receiver, notices, &backlog, (&shared, stranger)) => end,
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
    (shared, mut stranger): (&Shared, Option<Stranger>),
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
                        stranger = None;
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
            end = Stranger::leaves(&mut stranger) => return end,
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
    let frame = if is_large(bytes) { paced(receiver).await? } else { receiver.next().await };
    let frame = frame.map_err(ended)?.ok_or(End::Finished)?;
    Ok((frame, Held { _slot: slot, _room: taken }))
}

/// Reads a message for as long as it goes on coming. What is due is a pace and no total: over a slow
/// network the largest message takes a quarter of an hour, and cut short it would be begun again for ever.
async fn paced(receiver: &mut FrameReceiver) -> Result<Result<Option<Vec<u8>>, TransportError>, End> {
    let mut pace = Pace { arrived: receiver.arrived() };
    loop {
        match timeout(LARGE_WINDOW, receiver.next()).await {
            Ok(frame) => return Ok(frame),
            Err(_) if pace.is_kept(receiver.arrived()) => {}
            Err(_) => return Err(End::cut(FaultCode::Quota, "the device sends a message too slowly")),
        }
    }
}

/// How much of a message had arrived when it was last looked at.
struct Pace {
    arrived: usize,
}

impl Pace {
    /// Whether enough has come in a window.
    fn is_kept(&mut self, arrived: usize) -> bool {
        let came = arrived.saturating_sub(std::mem::replace(&mut self.arrived, arrived));
        came >= LARGE_WINDOW_BYTES_MIN
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use anabranch_transport::{DeviceKey, Endpoint, Limits, connect_addr};

    /// 4 MiB over 128 kbit/s take more than four minutes.
    #[test]
    fn a_large_message_may_take_long_if_it_goes_on() {
        const BYTES_PER_S: usize = 128_000 / 8;
        let windows = 4 * 1024 * 1024 / (BYTES_PER_S * LARGE_WINDOW.as_secs() as usize);
        assert!(windows > 3);
        let mut pace = Pace { arrived: 0 };
        let arrived = |window: usize| window * BYTES_PER_S * LARGE_WINDOW.as_secs() as usize;
        assert!((1..=windows).all(|window| pace.is_kept(arrived(window))));
        assert!(!pace.is_kept(arrived(windows)), "nothing more comes");
        assert!(!pace.is_kept(arrived(windows) + LARGE_WINDOW_BYTES_MIN - 1));
    }

    const STRANGERS_MAX: usize = 3;

    /// Strangers that only hold their places leave for newcomers; who has signed in stays.
    #[tokio::test]
    async fn when_strangers_are_many_the_oldest_leaves() {
        let key = DeviceKey::generate().unwrap();
        let endpoint = Endpoint::bind("127.0.0.1:0".parse().unwrap(), &key, Limits::default()).unwrap();
        let (address, relay) = (endpoint.local_addr().unwrap(), endpoint.key());
        let (events, mut inbox) = mpsc::channel(64);
        let (_stop, stopping) = watch::channel(false);
        let shared = Shared::new(events, stopping, STRANGERS_MAX);
        tokio::spawn(async move {
            let mut conn = 0;
            while let Some(connection) = endpoint.accept().await {
                conn += 1;
                tokio::spawn(serve(ConnId(conn), connection, shared.clone()));
            }
        });
        let mut devices = Vec::new();
        let mut come = async || {
            let own = DeviceKey::generate().unwrap();
            let connection = connect_addr(address, relay, &own, Duration::from_secs(10)).await.unwrap();
            let (mut sender, receiver) = connection.open_control().await.unwrap();
            sender.send(vec![1]).await.unwrap();
            let link = loop {
                match inbox.recv().await.unwrap() {
                    Event::Connected { link, .. } => break link,
                    Event::Input(..) | Event::Stop => {}
                }
            };
            devices.push((connection.clone(), sender, receiver));
            (connection, link)
        };
        let (member, link) = come().await;
        link.signed_in(Arc::new(Semaphore::new(LARGE_KIB_PER_USER)));
        let mut links = Vec::new();
        while links.len() < 2 * STRANGERS_MAX {
            links.push(come().await);
        }
        for (connection, _) in &links[..STRANGERS_MAX] {
            let end = timeout(Duration::from_secs(10), connection.closed()).await.unwrap();
            let TransportError::Refused { code, .. } = end else { panic!("{end}") };
            assert_eq!(code, FaultCode::Quota as u64);
        }
        let stay = links[STRANGERS_MAX..].iter().map(|(connection, _)| connection);
        assert!(stay.chain([&member]).all(|connection| connection.close_reason().is_none()));
    }
}
