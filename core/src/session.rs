//! The device's end of a link: the handshake, and whose messages are whose.
//!
//! One link carries many workspaces, each on a channel. [`ClientSession::start`] gives the
//! first message; every later one goes through [`ClientSession::receive`].

use crate::clock::Now;
use crate::wire::{Channel, Fault, FaultCode, Hello, Message, VERSION_MAX, VERSION_MIN, WireError};

/// Why a link can't be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SessionError {
    /// The other end sent bytes that are no message.
    #[error("the relay sent something that is no message: {0}")]
    Wire(#[from] WireError),
    /// The other end broke the protocol.
    #[error("the relay broke the protocol: {0}")]
    Protocol(&'static str),
    /// The other end speaks another version.
    #[error(
        "the relay speaks protocol version {version}, this software {VERSION_MIN} to {VERSION_MAX}; update the older one"
    )]
    Incompatible {
        /// Its version.
        version: u16,
    },
}

/// What a message means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The handshake is done. What was sent behind the first message is answered after this.
    Ready {
        /// The relay's clock minus this device's, in milliseconds, give or take half of the
        /// time that the handshake took.
        relay_ahead_ms: i64,
        /// What this device's clocks said when it was that: at the beginning of the handshake.
        measured: Now,
    },
    /// A message for one channel.
    Channel(Channel, Message),
    /// The relay ends the link, or refuses all of it.
    Fault {
        /// For programs.
        code: FaultCode,
        /// For people.
        message: String,
    },
    /// A message that may be skipped.
    Skipped,
}

/// See the [module](self).
#[derive(Clone, Debug)]
pub struct ClientSession {
    started: Now,
    ready: bool,
}

impl ClientSession {
    /// A session, and the message to begin it with.
    pub fn start(now: Now, software: &str) -> (Self, Vec<u8>) {
        let hello = Hello {
            version_min: VERSION_MIN,
            version_max: VERSION_MAX,
            software: software.to_owned(),
            wall_ms: now.wall.0,
            features_required: 0,
            features: 0,
            proof: Vec::new(),
        };
        (Self { started: now, ready: false }, Message::from(hello).encode())
    }

    /// Takes one message of the other end.
    pub fn receive(&mut self, now: Now, bytes: &[u8]) -> Result<Event, SessionError> {
        let Some(message) = Message::decode(bytes)? else {
            reached!(SessionSkipped);
            return Ok(Event::Skipped);
        };
        match message {
            Message::Welcome(welcome) => {
                if self.ready {
                    reached!(SessionTwice);
                    return Err(SessionError::Protocol("it welcomed this device twice"));
                }
                if !(VERSION_MIN..=VERSION_MAX).contains(&welcome.version) || welcome.features_required != 0 {
                    reached!(SessionIncompatible);
                    return Err(SessionError::Incompatible { version: welcome.version });
                }
                reached!(SessionReady);
                self.ready = true;
                // The relay read its clock about halfway between our two readings.
                let took = now.mono.0.saturating_sub(self.started.mono.0);
                let here = self.started.wall.0.saturating_add(took / 2);
                let ahead = i128::from(welcome.wall_ms) - i128::from(here);
                let ahead = ahead.clamp(i128::from(i64::MIN / 2), i128::from(i64::MAX / 2)) as i64;
                Ok(Event::Ready { relay_ahead_ms: ahead, measured: self.started })
            }
            Message::Fault(Fault { channel: None, code, message }) => {
                reached!(SessionFault);
                Ok(Event::Fault { code: FaultCode::from_u16(code).unwrap_or(FaultCode::Internal), message })
            }
            message if !self.ready => {
                reached!(SessionEarly);
                drop(message);
                Err(SessionError::Protocol("it spoke before it welcomed this device"))
            }
            message => match message.channel() {
                Some(channel) => {
                    reached!(SessionChannel);
                    Ok(Event::Channel(channel, message))
                }
                None => {
                    reached!(SessionForeign);
                    Err(SessionError::Protocol("it sent what only a device sends"))
                }
            },
        }
    }
}

impl Message {
    /// The channel that a message of the relay belongs to.
    pub fn channel(&self) -> Option<Channel> {
        match self {
            Message::Granted(m) => Some(m.channel),
            Message::Ack(m) => Some(m.channel),
            Message::Feed(m) => Some(m.channel),
            Message::CaughtUp(m) => Some(m.channel),
            Message::SchemaIs(m) => Some(m.channel),
            Message::Fault(m) => m.channel,
            Message::Hello(_)
            | Message::Welcome(_)
            | Message::SignIn(_)
            | Message::Open(_)
            | Message::Changes(_)
            | Message::PushSchema(_)
            | Message::FetchSchema(_)
            | Message::Refresh(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::{MonoMs, WallMs};
    #[cfg(feature = "marks")]
    use crate::reached::{Mark, take};
    use crate::wire::{CaughtUp, FetchSchema, Welcome};

    fn at(ms: u64) -> Now {
        Now { mono: MonoMs(ms), wall: WallMs(1_000_000 + ms) }
    }

    fn welcome() -> Welcome {
        Welcome {
            version: VERSION_MAX,
            software: "test".into(),
            wall_ms: 1_000_150,
            features_required: 0,
            features: 0,
        }
    }

    fn caught_up() -> Message {
        CaughtUp { channel: 7, epoch: [0; 16], cursor: 0, digest: [0; 32] }.into()
    }

    fn begun() -> ClientSession {
        ClientSession::start(at(100), "test").0
    }

    fn ready() -> ClientSession {
        let mut session = begun();
        let event = session.receive(at(200), &Message::from(welcome()).encode());
        assert_eq!(event, Ok(Event::Ready { relay_ahead_ms: 0, measured: at(100) }));
        session
    }

    /// Counts the mark of the branch that the message went through, and no other.
    #[cfg(feature = "marks")]
    macro_rules! passing {
        ($mark:ident, $receive:expr) => {{
            take();
            let event = $receive;
            let passed: Vec<Mark> =
                take().into_iter().filter(|(_, times)| *times > 0).map(|(mark, _)| mark).collect();
            assert_eq!(passed, [Mark::$mark]);
            event
        }};
    }

    #[cfg(not(feature = "marks"))]
    macro_rules! passing {
        ($mark:ident, $receive:expr) => {
            $receive
        };
    }

    #[test]
    fn a_relay_that_welcomes_twice_breaks_the_protocol() {
        let again = Message::from(welcome()).encode();
        let mut session = ready();
        let event = passing!(SessionTwice, session.receive(at(300), &again));
        assert!(matches!(event, Err(SessionError::Protocol(_))), "{event:?}");
    }

    #[test]
    fn a_relay_of_another_version_or_with_demands_is_incompatible() {
        for other in [
            Welcome { version: VERSION_MAX + 1, ..welcome() },
            Welcome { version: VERSION_MIN - 1, ..welcome() },
            Welcome { features_required: 1, ..welcome() },
        ] {
            let bytes = Message::from(other.clone()).encode();
            let mut session = begun();
            let event = passing!(SessionIncompatible, session.receive(at(200), &bytes));
            assert_eq!(event, Err(SessionError::Incompatible { version: other.version }));
            let event = passing!(SessionEarly, session.receive(at(300), &caught_up().encode()));
            assert!(matches!(event, Err(SessionError::Protocol(_))), "nothing has begun: {event:?}");
        }
    }

    #[test]
    fn nothing_of_a_channel_comes_before_the_welcome() {
        let bytes = caught_up().encode();
        let event = passing!(SessionEarly, begun().receive(at(200), &bytes));
        assert!(matches!(event, Err(SessionError::Protocol(_))), "{event:?}");
        let mut session = ready();
        let event = passing!(SessionChannel, session.receive(at(300), &bytes));
        assert_eq!(event, Ok(Event::Channel(7, caught_up())));
    }

    #[test]
    fn what_only_a_device_sends_is_taken_from_no_relay() {
        let bytes = Message::from(FetchSchema { channel: 7 }).encode();
        let mut session = ready();
        let event = passing!(SessionForeign, session.receive(at(300), &bytes));
        assert!(matches!(event, Err(SessionError::Protocol(_))), "{event:?}");
    }

    #[test]
    fn messages_of_a_later_version_are_skipped_unless_they_must_be_understood() {
        let mut session = ready();
        assert_eq!(passing!(SessionSkipped, session.receive(at(300), &[200, 0, 1])), Ok(Event::Skipped));
        let required = session.receive(at(300), &[200, 1, 1]);
        assert_eq!(required, Err(SessionError::Wire(WireError::UnknownRequired(200))));
        let event = passing!(SessionChannel, session.receive(at(300), &caught_up().encode()));
        assert!(event.is_ok(), "the session goes on");
    }
}
