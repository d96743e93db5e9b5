//! What an app can show of the state of things.

pub use anabranch_core::replica::Held;

use crate::error::{Category, Error};

/// How a workspace stands with the relay.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum SyncState {
    /// No link. Everything local works.
    #[default]
    Offline,
    /// Looking for the relay.
    Connecting,
    /// The relay answered; the device shows who it is.
    SigningIn,
    /// Changes are moving.
    Syncing {
        /// Steps done.
        done: u64,
        /// Steps in all, as far as is known.
        total: u64,
    },
    /// Everything was received, everything written here was admitted.
    UpToDate,
    /// All that could be exchanged was, and the two sides still differ: [`WorkspaceStatus::held`]
    /// says why.
    Pending,
    /// The relay wants another token. Nothing is lost meanwhile.
    Auth,
    /// The relay refused the workspace for another reason.
    Faulted,
}

impl SyncState {
    /// The name that programs see.
    pub fn name(self) -> &'static str {
        match self {
            SyncState::Offline => "offline",
            SyncState::Connecting => "connecting",
            SyncState::SigningIn => "signing_in",
            SyncState::Syncing { .. } => "syncing",
            SyncState::UpToDate => "up_to_date",
            SyncState::Pending => "pending",
            SyncState::Auth => "auth",
            SyncState::Faulted => "faulted",
        }
    }
}

/// Figures of a workspace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct WorkspaceStatus {
    /// How it stands with the relay.
    pub state: SyncState,
    /// Why it is [`SyncState::Pending`].
    pub held: Option<Held>,
    /// Entities with changes that the relay has not admitted.
    pub pending: u64,
    /// Entities with something that waits for a person.
    pub conflicts: u64,
    /// Refused changes that were not dismissed.
    pub refused: u64,
    /// Digest of what the relay admitted, in hex: equal on all devices that are up to date.
    pub digest: String,
    /// How far this device's clock is ahead of the relay's, in milliseconds.
    pub clock_skew_ms: i64,
    /// Faults found in what is stored since the workspace was opened, mended where that can be;
    /// the log says which.
    pub damage: u64,
    /// What went wrong last, until it is overcome.
    pub last_error: Option<String>,
    /// Who can do something about [`WorkspaceStatus::last_error`].
    pub error_category: Option<Category>,
    /// When everything was last in sync, milliseconds since 1970 by the relay's clock.
    pub synced_ms: Option<u64>,
    /// Entities of which the relay lost something, as it went back, that other devices have to bring
    /// it, or this one once it may: nothing is lost as long as they do.
    pub lacking: u64,
    /// The role of this device: `reader`, `writer`, `authority` or `admin`.
    pub role: &'static str,
}

/// How a sync ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SyncOutcome {
    /// Everything was exchanged.
    Complete,
    /// Time ran out, or the relay stopped, with something done; or something is held back, and
    /// [`SyncReport::error`] says by what. What was achieved is kept.
    Partial,
    /// The relay could not be reached.
    Offline,
    /// The relay wants another token, or is not the one that it should be.
    Auth,
}

impl SyncOutcome {
    /// The name that programs see.
    pub fn name(self) -> &'static str {
        match self {
            SyncOutcome::Complete => "complete",
            SyncOutcome::Partial => "partial",
            SyncOutcome::Offline => "offline",
            SyncOutcome::Auth => "auth",
        }
    }
}

/// What one sync did.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct SyncReport {
    /// How it ended.
    pub outcome: SyncOutcome,
    /// Changes that the relay admitted.
    pub sent: u64,
    /// Changes received.
    pub received: u64,
    /// Entities that still have something to send.
    pub pending: u64,
    /// Refused changes that wait to be dealt with.
    pub refused: u64,
    /// Entities of which the relay lost something that other devices have to bring it.
    pub lacking: u64,
    /// Digest of what the relay admitted, in hex.
    pub digest: String,
    /// Why it was not complete.
    pub error: Option<Error>,
}
