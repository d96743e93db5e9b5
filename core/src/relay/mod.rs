//! What a relay decides: who may do what, what is admitted, in which order it is fed to whom.
//!
//! No sockets, no clock, no threads: the daemon turns the world into [`Input`]s and carries
//! out the [`Output`]s. A reply that promises something leaves only when the commit it
//! promises is durable; per connection, outputs keep their order.
//!
//! ```text
//! loop {
//!     relay.handle(now, input)?;
//!     while let Some(output) = relay.poll_output() { carry_out(output) }
//!     // and call handle(now, Input::Tick) at relay.next_wakeup()
//! }
//! ```
//!
//! A host that serves many shares the work out: it hands over what has come
//! ([`Relay::accept`], which is cheap), then has the relay do one piece of work for whoever's turn
//! it is ([`Relay::turn`]), and looks for inputs again.
//!
//! ```text
//! loop {
//!     for input in what_has_come() { relay.accept(now, input)? }
//!     let turn = relay.turn(now)?;
//!     relay.charge(what_that_took);
//!     while let Some(output) = relay.poll_output() { carry_out(output) }
//!     if turn.is_none() { wait_for_an_input() }
//! }
//! ```
//!
//! One request, from its bytes to its answer: `hub` takes the input, `turns` says when it is dealt
//! with and `quota` how much one may ask, `session` knows the connection, `requests` does what was asked with the help of `grants` (who may), `admit`
//! and `entities` (what is taken) and `schemas`; `workspace` makes one batch of what follows
//! and holds back its answer until that is durable; `pump` then serves the `feed` to all who
//! listen. `layout` has every key and record.

mod admit;
mod entities;
mod feed;
mod grants;
mod hub;
mod layout;
mod pump;
mod quota;
mod requests;
mod schemas;
mod session;
mod turns;
mod verify;
mod workspace;

pub use hub::{Relay, Turn, UserTag};
pub use quota::Rate;
pub use verify::{Checked, verify};
pub use workspace::all as workspaces;

use crate::clock::WallMs;
use crate::id::DeviceId;
use crate::store::CommitNo;
use crate::wire::{FaultCode, GrantRole, MESSAGE_BYTES_MAX};

/// Most bytes that one connection has waiting for its network. Beyond 1.25 MiB nothing more is looked
/// at for it, so it is that and one message, the largest there is.
pub const UNSENT_BYTES_MAX: usize = session::ANSWER_BYTES_MAX + MESSAGE_BYTES_MAX;

/// A connection's number, chosen by the host, never used twice while the relay runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ConnId(pub u64);

/// What happens to the relay.
#[derive(Clone, Debug)]
pub enum Input {
    /// A device connected and proved its key.
    Connected {
        /// The connection.
        conn: ConnId,
        /// The device's key.
        device: DeviceId,
    },
    /// A message arrived. Until it is dealt with it counts as the relay's memory: the host hands in
    /// no more of a connection than it wants held, and hears of each that is dealt with by a
    /// [`Turn`].
    Received {
        /// The connection.
        conn: ConnId,
        /// Its bytes.
        bytes: Vec<u8>,
    },
    /// One earlier [`Output::Send`] was handed to the network: there is room for more.
    Sent {
        /// The connection.
        conn: ConnId,
    },
    /// A connection ended.
    Disconnected {
        /// The connection.
        conn: ConnId,
    },
    /// The store made everything up to this commit durable.
    Durable(CommitNo),
    /// Time passed.
    Tick,
    /// The relay shall stop: sessions are told to go away.
    Drain,
}

/// What the host must do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Send a message. The host answers with [`Input::Sent`] once it was written.
    Send {
        /// The connection.
        conn: ConnId,
        /// Its bytes.
        bytes: Vec<u8>,
    },
    /// The device signed in: messages up to the full bound may be taken from it.
    RaiseLimit {
        /// The connection.
        conn: ConnId,
    },
    /// Close the connection, after what was sent before.
    Close {
        /// The connection.
        conn: ConnId,
        /// Why.
        code: FaultCode,
        /// For people.
        reason: String,
    },
}

/// What a valid token says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claims {
    /// The workspace.
    pub workspace: String,
    /// The user.
    pub user: String,
    /// The role.
    pub role: GrantRole,
    /// The token's own id, for single use.
    pub token_id: String,
    /// Whether the first device to use it is the only one.
    pub single_use: bool,
    /// From when it holds.
    pub not_before: WallMs,
    /// Until when it holds.
    pub expires: WallMs,
}

/// Checks tokens: signature, issuer, audience, times. Implemented by the daemon, so that
/// core knows no token format.
pub trait TokenVerifier: Send {
    /// The claims of a valid token, or why it is not one.
    fn verify(&self, token: &str, now: WallMs) -> Result<Claims, (FaultCode, String)>;
}

/// Settings of a relay. Every bound says what happens at it.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct RelayConfig {
    /// Name and version that sessions see.
    pub software: String,
    /// How long a grant holds after a sign-in, in milliseconds.
    pub grant_ms: u64,
    /// Whether changes are refused until a schema was pushed. Without it, an unknown schema
    /// means that only shape, identity and order are checked.
    pub require_schema: bool,
    /// Messages that may wait for one connection's network; beyond, its feed pauses.
    pub send_window: usize,
    /// Workspaces that one connection may open; more are refused with a quota fault.
    pub channels_max: usize,
    /// Entities whose header index is kept in memory.
    pub cached_entities: usize,
    /// Connections of one device at once; beyond, the one made first is closed.
    pub device_connections_max: usize,
    /// Connections of one user to a workspace at once; a sign-in beyond is refused with a quota fault.
    pub user_connections_max: usize,
    /// Connections to one workspace at once; a sign-in beyond is refused with a quota fault.
    pub workspace_connections_max: usize,
    /// How much one device may send; beyond, it is not listened to for a while.
    pub device_rate: Rate,
    /// How much the devices of one user may send to a workspace; beyond, they are not listened to for
    /// a while.
    pub user_rate: Rate,
    /// How much may be sent to one workspace; beyond, nobody there is listened to for a while.
    pub workspace_rate: Rate,
    /// Bytes that wait for all connections' networks; beyond, the one with most of them is closed.
    pub unsent_bytes_max: usize,
}

impl Default for RelayConfig {
    fn default() -> Self {
        Self {
            software: format!("anabranch-relay/{}", env!("CARGO_PKG_VERSION")),
            grant_ms: 30 * 24 * 60 * 60 * 1000,
            require_schema: true,
            send_window: 16,
            channels_max: 64,
            cached_entities: 10_000,
            device_connections_max: 8,
            user_connections_max: 256,
            workspace_connections_max: 5_000,
            device_rate: Rate::kib_per_s(8 * 1024),
            user_rate: Rate::kib_per_s(16 * 1024),
            workspace_rate: Rate::kib_per_s(64 * 1024),
            unsent_bytes_max: 512 * 1024 * 1024,
        }
    }
}

/// The beginning of a text, at most `bytes_max` long: what peers name is bounded everywhere.
fn cut(text: &str, bytes_max: usize) -> &str {
    let end = (0..=bytes_max.min(text.len())).rev().find(|at| text.is_char_boundary(*at));
    &text[..end.unwrap_or(0)]
}
