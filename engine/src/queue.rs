//! The ways into the hub and from it to the link, each with a bound.
//!
//! Whoever asks the hub waits until there is room: a future that is slow, and nothing that grows.
//! The hub itself waits for nobody, least of all for the link, which waits for the hub: a link that
//! takes too little is let go, and what was to be sent is in the outbox still.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::Sender;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use crate::error::Error;
use crate::hub::Command;

/// Commands of callers that may wait for the hub; further callers wait for room.
pub(crate) const COMMANDS_MAX: usize = 256;

/// The callers' way into the hub.
#[derive(Clone)]
pub(crate) struct Commands {
    hub: Sender<Command>,
    room: Arc<Semaphore>,
}

/// The room that a command takes until the hub has dealt with it.
pub(crate) struct Room(#[allow(dead_code, reason = "held, not looked at")] OwnedSemaphorePermit);

impl Commands {
    pub(crate) fn new(hub: Sender<Command>) -> Self {
        Self { hub, room: Arc::new(Semaphore::new(COMMANDS_MAX)) }
    }

    /// Asks the hub, once there is room. In the order of the calls. If the future is dropped, either
    /// nothing was asked, or it is done whether or not anyone waits for the answer.
    ///
    /// # Errors
    /// That the engine was closed.
    pub(crate) async fn ask(&self, command: Command) -> Result<(), Error> {
        let room = self.room.clone().acquire_owned().await.map_err(|_| Error::closed())?;
        let asked = Command::Asked { command: Box::new(command), room: Room(room) };
        self.hub.send(asked).map_err(|_| Error::closed())
    }

    /// Tells the hub what can't wait: that time is up, or that all is to end. Once for each thing that
    /// was asked, so these are bounded as well.
    ///
    /// # Errors
    /// That the engine was closed.
    pub(crate) fn tell(&self, command: Command) -> Result<(), Error> {
        self.hub.send(command).map_err(|_| Error::closed())
    }
}

/// The hub's way to the link.
pub(crate) struct Outgoing {
    frames: mpsc::UnboundedSender<Vec<u8>>,
    queued: Arc<AtomicUsize>,
}

/// The link's end of it.
pub(crate) struct Frames {
    frames: mpsc::UnboundedReceiver<Vec<u8>>,
    queued: Arc<AtomicUsize>,
}

/// A way from the hub to a link.
pub(crate) fn frames() -> (Outgoing, Frames) {
    let (sender, receiver) = mpsc::unbounded_channel();
    let queued = Arc::new(AtomicUsize::new(0));
    (Outgoing { frames: sender, queued: queued.clone() }, Frames { frames: receiver, queued })
}

impl Outgoing {
    /// Queues a frame, unless `max` wait already: then it returns false. A link that is gone reports
    /// itself.
    #[must_use]
    pub(crate) fn push(&self, frame: Vec<u8>, max: usize) -> bool {
        let room = self.queued.fetch_add(1, Ordering::AcqRel) < max;
        if room {
            drop(self.frames.send(frame));
        } else {
            self.queued.fetch_sub(1, Ordering::AcqRel);
        }
        room
    }
}

impl Frames {
    /// The next frame; `None` once the hub has let go of the link.
    pub(crate) async fn next(&mut self) -> Option<Vec<u8>> {
        let frame = self.frames.recv().await?;
        self.queued.fetch_sub(1, Ordering::AcqRel);
        Some(frame)
    }

    #[cfg(test)]
    pub(crate) fn try_next(&mut self) -> Option<Vec<u8>> {
        let frame = self.frames.try_recv().ok()?;
        self.queued.fetch_sub(1, Ordering::AcqRel);
        Some(frame)
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::sync::mpsc::channel;
    use std::task::{Context, Poll, Waker};

    use super::*;

    fn poll<T>(future: std::pin::Pin<&mut impl Future<Output = T>>) -> Poll<T> {
        future.poll(&mut Context::from_waker(Waker::noop()))
    }

    #[test]
    fn callers_wait_for_room_and_nobody_is_forgotten() {
        let (sender, hub) = channel();
        let commands = Commands::new(sender);
        for id in 0..COMMANDS_MAX as u64 {
            assert!(matches!(poll(pin!(commands.ask(Command::SyncTimeout { id }))), Poll::Ready(Ok(()))));
        }
        let mut next = pin!(commands.ask(Command::SyncTimeout { id: 1_000 }));
        let mut last = Box::pin(commands.ask(Command::SyncTimeout { id: 1_001 }));
        assert!(poll(next.as_mut()).is_pending() && poll(last.as_mut()).is_pending());
        // What can't wait gets through.
        commands.tell(Command::LinkConnecting).unwrap();
        drop(hub.recv().unwrap());
        assert!(poll(last.as_mut()).is_pending(), "the first to come is the first to be served");
        assert!(matches!(poll(next), Poll::Ready(Ok(()))));
        // One that gives up leaves its place to others.
        drop(last);
        drop(hub.recv().unwrap());
        assert!(poll(pin!(commands.ask(Command::SyncTimeout { id: 1_002 }))).is_ready());
        // A hub that ends keeps nobody waiting.
        let mut waiting = pin!(commands.ask(Command::SyncTimeout { id: 1_003 }));
        assert!(poll(waiting.as_mut()).is_pending());
        drop(hub);
        assert!(matches!(poll(waiting), Poll::Ready(Err(_))));
    }

    #[test]
    fn frames_beyond_the_bound_are_not_taken() {
        let (outgoing, mut frames) = frames();
        assert!((0..3).all(|n| outgoing.push(vec![n], 3)));
        assert!(!outgoing.push(vec![9], 3));
        assert_eq!(frames.try_next(), Some(vec![0]));
        assert!(outgoing.push(vec![3], 3));
        let rest: Vec<_> = std::iter::from_fn(|| frames.try_next()).collect();
        assert_eq!(rest, [vec![1], vec![2], vec![3]]);
    }
}
