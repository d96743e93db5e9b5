//! One error for the whole crate, sorted by who has to act.

use crate::key::PublicKey;
use std::{io, sync::Arc, time::Duration};

/// Longest piece of a peer's own words that is repeated in an error.
const PEER_TEXT_CHARS_MAX: usize = 256;

/// Why an operation of the transport failed.
///
/// The texts are written for the person who has to act. Ask [`category`](Self::category) rather
/// than matching on variants to decide what to do next.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum TransportError {
    /// The server answered with another key than the pinned one. Retrying can't help: either the
    /// address is wrong, or the server was set up anew, or someone is in between.
    #[error(
        "the server's key is {found}, but {expected} was expected; check the address, and change the \
         expected key only if the operator of the server confirms the new one"
    )]
    WrongPeerKey {
        /// The key that the client was told to expect.
        expected: PublicKey,
        /// The key that the server presented.
        found: PublicKey,
    },

    /// No server answered: no network, a wrong address, a firewall, or a server that is down.
    #[error("can't reach {target}: {detail}; check the network and the address, then try again")]
    Unreachable {
        /// The address or URL that was tried.
        target: String,
        /// What happened.
        detail: String,
    },

    /// The server answered that it takes no more connections at the moment.
    #[error("the server takes no more connections at the moment; try again later")]
    Busy,

    /// Something answered, but no common protocol was found or the handshake broke its rules.
    #[error(
        "the handshake failed: {detail}; check that an anabranch relay of a compatible version is at that \
         address"
    )]
    Handshake {
        /// What the TLS or QUIC implementation said.
        detail: String,
    },

    /// The peer broke the rules of QUIC on an established connection, which ended it.
    #[error("the peer broke the QUIC protocol: {detail}; check that it runs a compatible version")]
    Violation {
        /// What the QUIC implementation said.
        detail: String,
    },

    /// The application at the other end closed the connection or stopped reading, and said why.
    #[error("the peer closed the connection with code {code}: {reason}")]
    Refused {
        /// The code given by the application at the other end.
        code: u64,
        /// The reason it gave, shortened and without control characters. Text of the peer's choice.
        reason: String,
    },

    /// An established connection broke: the network went away, or the peer died or restarted.
    #[error("the connection was lost: {detail}; connect again")]
    ConnectionLost {
        /// What happened.
        detail: String,
    },

    /// This end closed the connection, the endpoint, or the stream.
    #[error("the connection is closed at this end; open a new one")]
    Closed,

    /// The peer announced a frame over the limit of this receiver. Nothing of it was allocated.
    #[error(
        "the peer announced a frame of {bytes} bytes, but at most {max_bytes} are accepted here; close the \
         connection"
    )]
    FrameTooLarge {
        /// The announced length of the payload.
        bytes: u64,
        /// The limit in force.
        max_bytes: u64,
    },

    /// The peer broke the rules of framing. The stream can't be used any more.
    #[error("the peer sent a malformed frame: {detail}; close the connection")]
    BadFrame {
        /// Which rule was broken.
        detail: String,
    },

    /// A frame of this end's own application is over what any receiver takes. Nothing was sent.
    #[error("a frame of {bytes} bytes can't be sent, the most is {max_bytes}; split it")]
    OversizedSend {
        /// The length of the payload.
        bytes: u64,
        /// The limit of the format.
        max_bytes: u64,
    },

    /// A key could not be understood.
    #[error("bad key: {detail}")]
    BadKey {
        /// What is wrong with it. Never contains private key material.
        detail: String,
    },

    /// The address of a relay could not be understood.
    #[error("bad relay address {url:?}: {detail}; the form is quic://HOST:PORT#KEY")]
    BadUrl {
        /// The address as given.
        url: String,
        /// What is wrong with it.
        detail: String,
    },

    /// The operating system refused something.
    #[error("could not {action}: {source}")]
    Io {
        /// What was tried.
        action: String,
        /// What the system said.
        source: Arc<io::Error>,
    },
}

/// Who has to act on a [`TransportError`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Category {
    /// There is no way to the peer at the moment: offline. Try again later, with increasing pauses.
    Network,
    /// The peer is alive but takes no more connections at the moment. Try again later.
    Overload,
    /// The peer is not who it should be. Trying again can't help, a person has to decide.
    Authentication,
    /// The peer's application ended the connection; its code says whether trying again can help.
    Refusal,
    /// The peer broke the protocol or speaks another one. Close the connection.
    Peer,
    /// This end closed, was given something unusable, or its system failed.
    Local,
}

impl TransportError {
    /// Who has to act.
    pub fn category(&self) -> Category {
        match self {
            Self::Unreachable { .. } | Self::ConnectionLost { .. } => Category::Network,
            Self::Busy => Category::Overload,
            Self::WrongPeerKey { .. } => Category::Authentication,
            Self::Refused { .. } => Category::Refusal,
            Self::Handshake { .. }
            | Self::Violation { .. }
            | Self::FrameTooLarge { .. }
            | Self::BadFrame { .. } => Category::Peer,
            Self::Closed
            | Self::OversizedSend { .. }
            | Self::BadKey { .. }
            | Self::BadUrl { .. }
            | Self::Io { .. } => Category::Local,
        }
    }

    /// The peer can't be reached at the moment; an app shows this as "offline".
    pub fn is_offline(&self) -> bool {
        self.category() == Category::Network
    }

    /// The server is not the one whose key was pinned.
    pub fn is_wrong_key(&self) -> bool {
        self.category() == Category::Authentication
    }

    /// The peer broke the protocol or speaks another one.
    pub fn is_peer_fault(&self) -> bool {
        self.category() == Category::Peer
    }

    /// The same call may succeed later with nothing changed but time.
    pub fn can_retry(&self) -> bool {
        matches!(self.category(), Category::Network | Category::Overload)
    }

    pub(crate) fn io(action: impl Into<String>, source: io::Error) -> Self {
        Self::Io { action: action.into(), source: Arc::new(source) }
    }

    pub(crate) fn bad_key(detail: impl Into<String>) -> Self {
        Self::BadKey { detail: detail.into() }
    }

    pub(crate) fn bad_frame(detail: impl Into<String>) -> Self {
        Self::BadFrame { detail: detail.into() }
    }

    pub(crate) fn unreachable(target: impl ToString, detail: impl Into<String>) -> Self {
        Self::Unreachable { target: target.to_string(), detail: detail.into() }
    }

    pub(crate) fn no_answer(target: impl ToString, timeout: Duration) -> Self {
        Self::unreachable(target, format!("no answer within {timeout:?}"))
    }

    /// An error of an attempt to connect to `target`.
    pub(crate) fn from_handshake(error: quinn::ConnectionError, target: impl ToString) -> Self {
        match error {
            quinn::ConnectionError::TimedOut => Self::unreachable(target, "no answer"),
            quinn::ConnectionError::ConnectionClosed(ref close)
                if close.error_code == quinn::TransportErrorCode::CONNECTION_REFUSED =>
            {
                Self::Busy
            }
            quinn::ConnectionError::Reset => Self::unreachable(target, "the server restarted"),
            quinn::ConnectionError::ApplicationClosed(_)
            | quinn::ConnectionError::LocallyClosed
            | quinn::ConnectionError::CidsExhausted => Self::from_connection(error),
            quinn::ConnectionError::VersionMismatch
            | quinn::ConnectionError::TransportError(_)
            | quinn::ConnectionError::ConnectionClosed(_) => {
                Self::Handshake { detail: peer_text(error.to_string().as_bytes()) }
            }
        }
    }

    /// An error of an established connection.
    pub(crate) fn from_connection(error: quinn::ConnectionError) -> Self {
        match error {
            quinn::ConnectionError::ApplicationClosed(close) => {
                Self::Refused { code: close.error_code.into_inner(), reason: peer_text(&close.reason) }
            }
            quinn::ConnectionError::LocallyClosed => Self::Closed,
            quinn::ConnectionError::TimedOut => {
                Self::ConnectionLost { detail: "the peer has not been heard of for too long".into() }
            }
            quinn::ConnectionError::Reset => Self::ConnectionLost { detail: "the peer restarted".into() },
            quinn::ConnectionError::CidsExhausted => {
                Self::ConnectionLost { detail: "out of connection ids".into() }
            }
            quinn::ConnectionError::VersionMismatch | quinn::ConnectionError::TransportError(_) => {
                Self::Violation { detail: peer_text(error.to_string().as_bytes()) }
            }
            quinn::ConnectionError::ConnectionClosed(ref close) => {
                let detail = peer_text(error.to_string().as_bytes());
                // Codes from 0x100 on carry TLS alerts (RFC 9001, section 4.8): a client is done
                // with the handshake before the server has judged the client's key, and learns so.
                match u64::from(close.error_code) {
                    0x100..=0x1ff => Self::Handshake { detail },
                    _ => Self::ConnectionLost { detail },
                }
            }
        }
    }
}

/// Makes text of a peer's choice fit for a log line or a screen.
fn peer_text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes)
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(PEER_TEXT_CHARS_MAX)
        .collect()
}
