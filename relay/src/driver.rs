//! The one thread that owns the relay's core. It tells the core of everything that has come, has it
//! do one piece of work for whoever's turn it is, hands out the outputs, and looks again what has
//! come: nobody waits for more than one piece of another's work. It never waits for a link; only
//! for the store, whose queue is the bound on what is not yet durable, and which the core does not
//! fill.

use std::any::Any;
use std::collections::{BTreeMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anabranch_core::clock::{MonoMs, Now, WallMs};
use anabranch_core::id::DeviceId;
use anabranch_core::relay::{ConnId, Input, Output, Relay, Turn};
use anabranch_core::store::{CommitNo, Store, StoreError};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};

use crate::daemon::RelayError;
use crate::link::{Held, LinkHandle, Pools};
use crate::token::system_wall;

/// Events of all links that may wait; a link waits with its next one then.
pub(crate) const EVENTS_MAX: usize = 1024;
/// How long the driver sleeps at most.
const SLEEP_MAX: Duration = Duration::from_secs(3600);

/// What happens to the driver.
pub(crate) enum Event {
    Connected {
        conn: ConnId,
        device: DeviceId,
        link: LinkHandle,
    },
    Input(Input, Option<Held>),
    /// Make everything durable and end.
    Stop,
}

/// Both clocks of the machine; the wall clock may be shifted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock {
    start: Instant,
    offset_ms: i64,
}

impl Clock {
    pub(crate) fn new(offset_ms: i64) -> Self {
        Self { start: Instant::now(), offset_ms }
    }

    pub(crate) fn now(&self) -> Now {
        let mono = u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX);
        let wall = system_wall().0.saturating_add_signed(self.offset_ms);
        Now { mono: MonoMs(mono), wall: WallMs(wall) }
    }

    fn at(&self, mono: MonoMs) -> Instant {
        self.start + Duration::from_millis(mono.0).min(self.start.elapsed() + SLEEP_MAX)
    }
}

/// What the store last said about durability.
pub(crate) type Durable = watch::Receiver<Result<CommitNo, StoreError>>;

/// Has the store report durability here. Only the newest report counts, so the store's
/// thread never waits.
pub(crate) fn watch_durable(store: &dyn Store) -> Result<Durable, StoreError> {
    let (sender, receiver) = watch::channel(Ok(store.durable()?));
    store.set_durable_hook(Arc::new(move |durable| {
        drop(sender.send_replace(durable));
    }));
    Ok(receiver)
}

pub(crate) struct Driver {
    pub(crate) relay: Relay,
    pub(crate) store: Arc<dyn Store>,
    pub(crate) events: mpsc::Receiver<Event>,
    pub(crate) durable: Durable,
    pub(crate) clock: Clock,
}

/// What the driver has of a link.
struct Link {
    handle: LinkHandle,
    /// For each message that waits for its turn, oldest first: what it holds until then.
    held: VecDeque<Held>,
}

#[derive(Default)]
struct Links {
    open: BTreeMap<ConnId, Link>,
    pools: Pools,
}

/// Whether the driver goes on.
enum Next {
    GoOn,
    Stop,
}

impl Driver {
    /// Runs until told to stop, or until something fails that can't be gone on from. In
    /// either case the store is shut down when this returns, and every link has lost its
    /// driver, which ends it.
    pub(crate) fn run(mut self, runtime: &Handle) -> Result<(), RelayError> {
        let ended = catch_unwind(AssertUnwindSafe(|| self.serve(runtime))).unwrap_or_else(|panic| {
            // What core holds in memory can't be trusted any more; what is stored can.
            Err(RelayError::Panicked { what: panic_words(&*panic) })
        });
        if let Err(error) = &ended {
            tracing::error!(%error, "the relay stops: it can't go on");
        }
        let closed = catch_unwind(AssertUnwindSafe(|| self.store.shut_down()))
            .unwrap_or_else(|panic| Err(StoreError::Damaged { what: panic_words(&*panic) }));
        match (ended, closed) {
            (Err(error), _) => Err(error),
            (Ok(()), closed) => closed.map_err(RelayError::Store),
        }
    }

    fn serve(&mut self, runtime: &Handle) -> Result<(), RelayError> {
        let mut links = Links::default();
        self.hand_out(&mut links);
        loop {
            if let Next::Stop = self.take_in(&mut links)? {
                return Ok(());
            }
            self.hand_out(&mut links);
            let begun = Instant::now();
            let turn = self.relay.turn(self.clock.now())?;
            self.relay.charge(u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX));
            self.hand_out(&mut links);
            match turn {
                Some(Turn::Message(conn)) => {
                    // Only now may its link send another.
                    if let Some(link) = links.open.get_mut(&conn) {
                        link.held.pop_front();
                    }
                }
                Some(Turn::Feed(_)) => {}
                None => {
                    if let Next::Stop = runtime.block_on(self.wait(&mut links))? {
                        return Ok(());
                    }
                }
            }
        }
    }

    /// Tells the core of everything that has come meanwhile; none of it costs much.
    fn take_in(&mut self, links: &mut Links) -> Result<Next, RelayError> {
        // Durability first: it is what devices wait for, and many commits make one report.
        if self.durable.has_changed().unwrap_or(false) {
            self.became_durable()?;
        }
        if self.relay.next_wakeup().is_some_and(|at| at <= self.clock.now().mono) {
            self.relay.accept(self.clock.now(), Input::Tick)?;
        }
        // Those that come while these are looked at have to wait for a turn.
        for _ in 0..EVENTS_MAX {
            match self.events.try_recv() {
                Ok(event) => {
                    if let Next::Stop = self.take(event, links)? {
                        return Ok(Next::Stop);
                    }
                }
                Err(_) => break,
            }
        }
        Ok(Next::GoOn)
    }

    async fn wait(&mut self, links: &mut Links) -> Result<Next, RelayError> {
        let wakeup = self.relay.next_wakeup();
        let at = wakeup.map_or_else(|| Instant::now() + SLEEP_MAX, |at| self.clock.at(at));
        tokio::select! {
            biased;
            Ok(()) = self.durable.changed() => self.became_durable().map(|()| Next::GoOn),
            event = self.events.recv() => match event {
                Some(event) => self.take(event, links),
                None => Ok(Next::Stop),
            },
            // What is due is dealt with as with anything else that has come.
            () = tokio::time::sleep_until(at.into()) => Ok(Next::GoOn),
        }
    }

    fn became_durable(&mut self) -> Result<(), RelayError> {
        let durable = self.durable.borrow_and_update().clone()?;
        Ok(self.relay.accept(self.clock.now(), Input::Durable(durable))?)
    }

    fn take(&mut self, event: Event, links: &mut Links) -> Result<Next, RelayError> {
        let input = match event {
            Event::Connected { conn, device, link } => {
                links.open.insert(conn, Link { handle: link, held: VecDeque::new() });
                Input::Connected { conn, device }
            }
            Event::Input(input, held) => {
                match &input {
                    Input::Disconnected { conn } => drop(links.open.remove(conn)),
                    Input::Received { conn, .. } => {
                        if let Some(link) = links.open.get_mut(conn) {
                            link.held.extend(held);
                        }
                    }
                    _ => {}
                }
                input
            }
            Event::Stop => return Ok(Next::Stop),
        };
        self.relay.accept(self.clock.now(), input)?;
        Ok(Next::GoOn)
    }

    fn hand_out(&mut self, links: &mut Links) {
        let outputs: Vec<Output> = std::iter::from_fn(|| self.relay.poll_output()).collect();
        // Before the grant that comes with it can leave: the device may answer that with a
        // message over the old limit.
        for output in &outputs {
            if let Output::RaiseLimit { conn } = output
                && let Some(user) = self.relay.user_of(*conn)
                && let Some(link) = links.open.get(conn)
            {
                link.handle.signed_in(links.pools.of(user));
            }
        }
        for output in outputs {
            // Outputs for a link that is gone already have nowhere to go.
            match output {
                Output::Send { conn, bytes } => {
                    if let Some(link) = links.open.get(&conn) {
                        link.handle.send(bytes);
                    }
                }
                Output::Close { conn, code, reason } => {
                    if let Some(link) = links.open.get(&conn) {
                        link.handle.close(code, reason);
                    }
                }
                Output::RaiseLimit { .. } => {}
            }
        }
    }
}

fn panic_words(panic: &(dyn Any + Send)) -> String {
    panic
        .downcast_ref::<&str>()
        .map(ToString::to_string)
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "no message".into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use anabranch_core::relay::{Claims, RelayConfig, TokenVerifier};
    use anabranch_core::wire::{FaultCode, Hello, Message, SignIn, VERSION_MAX, VERSION_MIN};
    use anabranch_store::MemoryStore;

    /// Stands for any fault of ours that an input brings to light.
    struct PanickingVerifier;

    impl TokenVerifier for PanickingVerifier {
        fn verify(&self, _token: &str, _now: WallMs) -> Result<Claims, (FaultCode, String)> {
            panic!("a fault of ours");
        }
    }

    #[tokio::test]
    async fn a_panic_ends_the_driver_with_its_words_and_a_closed_store() {
        let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
        let durable = watch_durable(&*store).unwrap();
        let relay =
            Relay::open(store.clone(), Box::new(PanickingVerifier), RelayConfig::default(), [7; 16]).unwrap();
        let (events, inbox) = mpsc::channel(EVENTS_MAX);
        let driver = Driver { relay, store: store.clone(), events: inbox, durable, clock: Clock::new(0) };
        let runtime = Handle::current();
        let thread = std::thread::spawn(move || driver.run(&runtime));

        let conn = ConnId(1);
        let hello = Hello {
            version_min: VERSION_MIN,
            version_max: VERSION_MAX,
            software: "test".into(),
            wall_ms: 0,
            features_required: 0,
            features: 0,
            proof: Vec::new(),
        };
        let sign_in = SignIn {
            channel: 1,
            workspace: "home".into(),
            token: Some("any".into()),
            device_name: "test".into(),
            platform: "test".into(),
            incarnation: 0,
            sent: 0,
        };
        let device = DeviceId([1; 32]);
        events.send(Event::Input(Input::Connected { conn, device }, None)).await.ok().unwrap();
        for message in [Message::from(hello), Message::from(sign_in)] {
            let input = Input::Received { conn, bytes: message.encode() };
            events.send(Event::Input(input, None)).await.ok().unwrap();
        }
        // Ends the driver if nothing else did.
        drop(events);
        let ended = tokio::task::spawn_blocking(|| thread.join()).await.unwrap().unwrap();
        assert!(
            matches!(&ended, Err(RelayError::Panicked { what }) if what == "a fault of ours"),
            "{ended:?}"
        );
        assert!(matches!(store.durable(), Err(StoreError::Closed)));
    }
}
