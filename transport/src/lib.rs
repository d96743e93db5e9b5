//! Moves opaque frames between authenticated ed25519 keys, and knows nothing of what they mean.
//!
//! Every link is one QUIC connection. Both ends prove an ed25519 key in the TLS 1.3 handshake
//! (raw public keys, [RFC 7250]), so there are no certificates and no authorities: a client pins
//! the server's key, a server learns the client's key and leaves the decision to its application.
//!
//! ```no_run
//! use anabranch_transport::{DeviceKey, Endpoint, Limits, RelayUrl, TransportError, connect};
//! use std::time::Duration;
//!
//! # async fn server() -> Result<(), TransportError> {
//! let endpoint = Endpoint::bind(([0, 0, 0, 0], 4433).into(), &DeviceKey::generate()?, Limits::default())?;
//! while let Some(connection) = endpoint.accept().await {
//!     let (mut sender, mut receiver) = connection.accept_control().await?;
//!     while let Some(frame) = receiver.next().await? {
//!         sender.send(frame).await?;
//!     }
//! }
//! # Ok(()) }
//!
//! # async fn client() -> Result<(), TransportError> {
//! let url: RelayUrl = "quic://relay.example:4433#Gb9ECWmEzf6FQbrBZ9w7lshQhqowtrbLDFw4rXAxZuE".parse()?;
//! let connection = connect(&url, &DeviceKey::generate()?, Duration::from_secs(10)).await?;
//! let (mut sender, mut receiver) = connection.open_control().await?;
//! sender.send(b"hello".to_vec()).await?;
//! let answer = receiver.next().await?;
//! connection.close(0, "done");
//! # Ok(()) }
//! ```
//!
//! # Frames
//!
//! On the control stream a frame is `[length: u32 little endian][flags: u8][payload]`. The flags
//! are reserved and must be 0; the length counts the payload only. A receiver refuses frames over
//! [`FRAME_BYTES_MAX_BEFORE_SIGN_IN`] until its application calls [`FrameReceiver::raise_limit`].
//!
//! # What is deliberately absent
//!
//! No compression (it belongs to the codec of the messages), no reconnecting (the caller knows
//! when), no authorisation (the caller knows whom), no 0-RTT and no session resumption (a replayed
//! first flight must not reach a state machine).
//!
//! # Cancellation
//!
//! Every future of this crate may be dropped at any time. None leaves a connection in a state that
//! a later call can't continue from; what is lost, if anything, is said at the method.
//!
//! [RFC 7250]: https://www.rfc-editor.org/rfc/rfc7250

mod connection;
mod endpoint;
mod error;
mod frame;
mod key;
mod tls;
mod url;

#[cfg(test)]
mod tests;

pub use connection::{Connection, connect, connect_addr};
pub use endpoint::{Endpoint, Limits};
pub use error::{Category, TransportError};
pub use frame::{FRAME_BYTES_MAX, FRAME_BYTES_MAX_BEFORE_SIGN_IN, FrameDecoder, FrameReceiver, FrameSender};
pub use key::{DeviceKey, PublicKey};
#[doc(hidden)]
pub use tls::read_certificate;
pub use url::RelayUrl;
