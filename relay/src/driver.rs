//! The one thread that owns the relay's core: it turns events into inputs, one after the
//! other, and hands out the outputs. It never waits for a link; only for the store, whose
//! queue is the bound on what is not yet durable.

use std::any::Any;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anabranch_core::clock::{MonoMs, Now, WallMs};
use anabranch_core::id::DeviceId;
use anabranch_core::relay::{ConnId, Input, Output, Relay};
use anabranch_core::store::{CommitNo, Store, StoreError};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};

use crate::daemon::RelayError;
use crate::link::{Held, LinkHandle};
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

enum Wake {
    Event(Option<Event>),
    Durable,
    Time,
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
        let mut links = BTreeMap::new();
        self.hand_out(&mut links);
        let mut ticked = false;
        loop {
            let wakeup = self.relay.next_wakeup();
            // Under load events never run out: what is due goes first, but not twice in a row.
            let due = !ticked && wakeup.is_some_and(|at| at <= self.clock.now().mono);
            let wake = if due { Wake::Time } else { runtime.block_on(self.wait(wakeup)) };
            ticked = matches!(wake, Wake::Time);
            // `held` lives until the input was handled: only then may its link send another.
            let (input, held) = match wake {
                Wake::Event(Some(Event::Connected { conn, device, link })) => {
                    links.insert(conn, link);
                    (Input::Connected { conn, device }, None)
                }
                Wake::Event(Some(Event::Input(input, held))) => {
                    if let Input::Disconnected { conn } = &input {
                        links.remove(conn);
                    }
                    (input, held)
                }
                Wake::Event(Some(Event::Stop) | None) => return Ok(()),
                Wake::Durable => (Input::Durable(self.durable.borrow_and_update().clone()?), None),
                Wake::Time => (Input::Tick, None),
            };
            self.relay.handle(self.clock.now(), input)?;
            self.hand_out(&mut links);
            drop(held);
        }
    }

    async fn wait(&mut self, wakeup: Option<MonoMs>) -> Wake {
        let at = wakeup.map_or_else(|| Instant::now() + SLEEP_MAX, |at| self.clock.at(at));
        tokio::select! {
            // Durability first: it is what devices wait for, and many commits make one report.
            biased;
            Ok(()) = self.durable.changed() => Wake::Durable,
            event = self.events.recv() => Wake::Event(event),
            () = tokio::time::sleep_until(at.into()) => Wake::Time,
        }
    }

    fn hand_out(&mut self, links: &mut BTreeMap<ConnId, LinkHandle>) {
        let outputs: Vec<Output> = std::iter::from_fn(|| self.relay.poll_output()).collect();
        // Before the grant that comes with it can leave: the device may answer that with a
        // message over the old limit.
        for output in &outputs {
            if let Output::RaiseLimit { conn } = output
                && let Some(link) = links.get(conn)
            {
                link.signed_in();
            }
        }
        for output in outputs {
            // Outputs for a link that is gone already have nowhere to go.
            match output {
                Output::Send { conn, bytes } => {
                    if let Some(link) = links.get(&conn) {
                        link.send(bytes);
                    }
                }
                Output::Close { conn, code, reason } => {
                    if let Some(link) = links.get(&conn) {
                        link.close(code, reason);
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
