//! The relay daemon of Anabranch: `anabranch_core::relay` decides, this crate acts.
//!
//! ```no_run
//! # async fn relay() -> Result<(), anabranch_relay::RelayError> {
//! use anabranch_relay::{RelayDaemon, RelayOptions};
//!
//! let relay = RelayDaemon::start(RelayOptions::dev()).await?;
//! println!("devices reach it at {}", relay.url());
//! relay.shutdown().await
//! # }
//! ```
//!
//! # How it works
//!
//! One thread, the driver, owns the core and turns events into its inputs, one after the other.
//! Each connection is a task that reads frames into the driver's queue and writes what the
//! driver puts into its outbox. The store reports what became durable, which releases answers.
//! Nothing but the driver decides, and the driver waits for no connection.
//!
//! # What is deliberately absent
//!
//! No rule about who may do what (that is core's), no bytes on the disk but keys (the store's),
//! no line of TLS (the transport's).

pub mod config;
mod daemon;
mod driver;
pub mod keys;
mod link;
pub mod token;
mod verify;

/// What a grant allows.
pub use anabranch_core::wire::GrantRole;
/// Figures, checks and backups of a running relay's store.
pub use anabranch_store::Upkeep;
pub use config::{ConfigError, KeySource, RelayOptions, RelaySettings};
pub use daemon::{RelayDaemon, RelayError, RelayHandle};
pub use keys::{KeyError, RelayDir};
pub use token::{
    Invite, JwtVerifier, MintOptions, Minted, PeekedClaims, TokenError, mint_invite, mint_token, peek_claims,
};
pub use verify::{Verification, verify};
