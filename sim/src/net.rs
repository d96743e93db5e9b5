//! Links: two streams of whole messages, in order, that take their time and may end at any
//! message.
//!
//! The transport is QUIC streams, so a link loses no single message and swaps none: what is
//! lost is what comes after some message, when the link ends. Doubles come by sending again
//! over the next link, and another order comes from an old link whose messages arrive when
//! the next one already stands.

use std::collections::{BTreeMap, VecDeque};

use anabranch_core::session::ClientSession;
use automerge::ChangeHash;

use crate::dice::Dice;
use crate::hostile::Expected;

/// Messages that the network takes before the relay's host must wait.
const WINDOW: usize = 8;

/// One direction.
#[derive(Debug, Default)]
pub(crate) struct Stream {
    pub(crate) under_way: VecDeque<Vec<u8>>,
    /// Whether the arrival of the first one is scheduled.
    pub(crate) armed: bool,
    /// Messages that the host has not been told were taken.
    pub(crate) owed: usize,
}

impl Stream {
    /// Puts a message on its way. Whether the network takes it at once.
    pub(crate) fn push(&mut self, bytes: Vec<u8>) -> bool {
        self.under_way.push_back(bytes);
        let taken = self.under_way.len() <= WINDOW;
        self.owed += usize::from(!taken);
        taken
    }

    pub(crate) fn bytes(&self) -> usize {
        self.under_way.iter().map(Vec::len).sum()
    }

    /// Some messages at the end never arrive. Returns how many.
    pub(crate) fn cut(&mut self, dice: &mut Dice) -> usize {
        let kept = dice.roll(self.under_way.len() + 1);
        let lost = self.under_way.len() - kept;
        self.under_way.truncate(kept);
        lost
    }
}

/// Who is at the other end of a link from the relay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Peer {
    Device(usize),
    Stranger,
}

pub(crate) struct Link {
    pub(crate) peer: Peer,
    pub(crate) session: Option<ClientSession>,
    pub(crate) up: Stream,
    pub(crate) down: Stream,
    pub(crate) dice: Dice,
    /// It is broken: nothing new gets through.
    pub(crate) broken: bool,
    /// Its other end reads nothing.
    pub(crate) deaf: bool,
    /// The next message on it is damaged.
    pub(crate) damages: bool,
    /// It breaks behind the next message to the relay, which arrives late.
    pub(crate) lingers: bool,
    /// Until when nothing that is under way to the relay arrives.
    pub(crate) late_ms: u64,
    /// Which ends have noticed: the device's, the relay's.
    pub(crate) ended: [bool; 2],
    /// Which of its device's links it is.
    pub(crate) number: u64,
    /// What a stranger must be told of the changes in its units.
    pub(crate) expected: BTreeMap<u64, Vec<(ChangeHash, Expected)>>,
    /// A stranger says nothing on it that may be answered like a unit.
    pub(crate) senseless: bool,
}

impl Link {
    pub(crate) fn new(peer: Peer, session: Option<ClientSession>, number: u64, dice: Dice) -> Self {
        Self {
            peer,
            session,
            up: Stream::default(),
            down: Stream::default(),
            dice,
            broken: false,
            deaf: false,
            damages: false,
            lingers: false,
            late_ms: 0,
            ended: [false; 2],
            number,
            expected: BTreeMap::new(),
            senseless: false,
        }
    }

    pub(crate) fn stream(&mut self, up: bool) -> &mut Stream {
        if up { &mut self.up } else { &mut self.down }
    }
}
