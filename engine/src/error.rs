//! Errors, sorted by who can do something about them.

use anabranch_core::entity::EditError;
use anabranch_core::id::NameError;
use anabranch_core::query::QueryError;
use anabranch_core::replica::{Held, WriteError};
use anabranch_core::session::SessionError;
use anabranch_core::store::StoreError;
use anabranch_core::wire::FaultCode;
use anabranch_transport::TransportError;

/// Who can do something about an error, and what kind of thing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Category {
    /// The relay can't be reached. Trying again later helps.
    Network,
    /// Signing in again helps, or another token.
    Auth,
    /// The data breaks a rule of the schema. Editing it helps.
    Validation,
    /// A person has to decide first.
    Conflict,
    /// A limit was reached.
    Quota,
    /// The relay failed or refused.
    Server,
    /// There is no such thing.
    NotFound,
    /// The device's store failed.
    Storage,
    /// The caller asked for something that has no meaning.
    Usage,
}

impl Category {
    /// The name that programs see.
    pub fn name(self) -> &'static str {
        match self {
            Category::Network => "network",
            Category::Auth => "auth",
            Category::Validation => "validation",
            Category::Conflict => "conflict",
            Category::Quota => "quota",
            Category::Server => "server",
            Category::NotFound => "not_found",
            Category::Storage => "storage",
            Category::Usage => "usage",
        }
    }

    /// Whether the same call may succeed later.
    pub fn is_retryable(self) -> bool {
        matches!(self, Category::Network | Category::Server)
    }
}

/// Anything that goes wrong. [`Error::category`] says who can help, [`Error::code`] is stable
/// for programs, the message is for people, and [`Error::help`] says what to do.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    category: Category,
    code: String,
    message: String,
    help: Option<String>,
    store: Option<Box<StoreError>>,
}

impl Error {
    /// An error of a category, with a code for programs and a message for people.
    pub fn new(category: Category, code: impl Into<String>, message: impl Into<String>) -> Self {
        Self { category, code: code.into(), message: message.into(), help: None, store: None }
    }

    /// The same error with advice.
    #[must_use]
    pub fn with_help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }

    /// Who can do something about it.
    pub fn category(&self) -> Category {
        self.category
    }

    /// A stable name for programs.
    pub fn code(&self) -> &str {
        &self.code
    }

    /// What to do.
    pub fn help(&self) -> Option<&str> {
        self.help.as_deref()
    }

    /// The store's own error, where it is one.
    pub fn store_error(&self) -> Option<&StoreError> {
        self.store.as_deref()
    }

    pub(crate) fn closed() -> Self {
        Self::new(Category::Usage, "closed", "the engine is shut down; open it again")
    }

    pub(crate) fn fault(code: FaultCode, message: String) -> Self {
        let category = match code {
            FaultCode::Quota => Category::Quota,
            code if code.is_auth() => Category::Auth,
            _ => Category::Server,
        };
        let help = match code {
            FaultCode::TokenExpired
            | FaultCode::TokenInvalid
            | FaultCode::TokenUsed
            | FaultCode::NotSignedIn => {
                "get a new token from whoever runs the relay and sign in with it; nothing written here is lost"
            }
            FaultCode::WrongWorkspace => {
                "use a token for this workspace, or the workspace that the token is for"
            }
            FaultCode::SchemaMissing => "let an admin or authority of the workspace push its schema",
            FaultCode::Revoked => "ask an admin of the workspace",
            FaultCode::Forbidden => "ask an admin of the workspace for a role that may do this",
            FaultCode::Incompatible => "update the older of the two programs",
            FaultCode::Quota => "wait, or ask the relay's operator for more",
            _ => "try again later; if it stays, tell the relay's operator",
        };
        Self::new(category, code.name(), message).with_help(help)
    }
}

impl From<&Held> for Error {
    fn from(held: &Held) -> Self {
        match held {
            Held::RefusedParent { entity, parent } => Self::new(
                Category::Validation,
                "held_by_refused",
                format!("{entity} waits for {parent}, which it refers to and which the relay refused"),
            )
            .with_help(
                "look at `refused` for the reason, then write it rightly, or retry or dismiss it there",
            ),
            Held::MissingAtRelay { entity } => Self::new(
                Category::Server,
                "missing_at_relay",
                format!("the relay lacks what the changes of {entity} build on"),
            )
            .with_help(
                "other devices may have to bring it; it is offered again then, and at the next connect",
            ),
            Held::Diverged => Self::new(
                Category::Server,
                "digest_mismatch",
                "this device and the relay hold different things although everything was fetched again",
            )
            .with_help("tell the relay's operator; what was written here is kept"),
            Held::SchemaLost => Self::new(
                Category::Server,
                "schema_lost",
                "the relay went back and lost the workspace's schema",
            )
            .with_help("let an admin or authority of the workspace push it; nothing written here is lost"),
            _ => Self::new(Category::Server, "held", "something is still to be exchanged"),
        }
    }
}

impl From<StoreError> for Error {
    fn from(error: StoreError) -> Self {
        let (category, code) = match &error {
            StoreError::InUse { .. } => (Category::Storage, "in_use"),
            StoreError::Damaged { .. } => (Category::Storage, "damaged"),
            StoreError::NewerFormat { .. } => (Category::Storage, "newer_format"),
            StoreError::OtherBackend { .. } => (Category::Storage, "other_backend"),
            StoreError::KeyNeeded { .. } => (Category::Storage, "key_needed"),
            StoreError::NotEncrypted { .. } => (Category::Storage, "not_encrypted"),
            StoreError::WrongKey { .. } => (Category::Storage, "wrong_key"),
            StoreError::Exists { .. } => (Category::Usage, "exists"),
            StoreError::NoSpace { .. } => (Category::Quota, "no_space"),
            StoreError::TooLarge { .. } => (Category::Quota, "too_large"),
            _ => (Category::Storage, "store"),
        };
        Self { store: Some(Box::new(error.clone())), ..Self::new(category, code, error.to_string()) }
    }
}

impl From<EditError> for Error {
    fn from(error: EditError) -> Self {
        let message = error.to_string();
        match error {
            EditError::Validation(_) => Self::new(Category::Validation, "invalid", message),
            EditError::Conflict { .. } => Self::new(Category::Conflict, "in_conflict", message)
                .with_help("look at it with `conflicts` and settle it with `resolve`"),
            EditError::NotFound(_) => Self::new(Category::NotFound, "not_found", message),
            EditError::UnknownVersion(_) => Self::new(Category::Usage, "unknown_version", message)
                .with_help("versions come with what is read, and go with the entity that they came with"),
            EditError::TooLarge { .. } | EditError::TooManyOperations { .. } => {
                Self::new(Category::Quota, "too_large", message)
            }
            EditError::Full { .. } => Self::new(Category::Quota, "entity_full", message),
            _ => Self::new(Category::Storage, "document", message),
        }
    }
}

impl From<WriteError> for Error {
    fn from(error: WriteError) -> Self {
        let message = error.to_string();
        match error {
            WriteError::Edit(error) => error.into(),
            WriteError::Store(error) => error.into(),
            WriteError::Exists(_) => Self::new(Category::Validation, "exists", message),
            WriteError::UnknownType { .. } => Self::new(Category::Validation, "unknown_type", message),
            WriteError::ReadOnly => Self::new(Category::Validation, "read_only", message),
            WriteError::TooLarge(_) => Self::new(Category::Quota, "too_large", message),
            _ => Self::new(Category::Storage, "write", message),
        }
    }
}

impl From<QueryError> for Error {
    fn from(error: QueryError) -> Self {
        match error {
            QueryError::Store(error) => error.into(),
            QueryError::BadCursor => Self::new(Category::Usage, "bad_cursor", error.to_string())
                .with_help("a cursor comes with a page, and goes with the query that gave it"),
            error => Self::new(Category::Validation, "invalid_query", error.to_string()),
        }
    }
}

impl From<NameError> for Error {
    fn from(error: NameError) -> Self {
        Self::new(Category::Validation, "invalid_name", error.to_string())
    }
}

impl From<SessionError> for Error {
    fn from(error: SessionError) -> Self {
        let code = match error {
            SessionError::Incompatible { .. } => "incompatible",
            _ => "protocol",
        };
        Self::new(Category::Server, code, error.to_string())
    }
}

impl From<TransportError> for Error {
    fn from(error: TransportError) -> Self {
        let message = error.to_string();
        if error.is_wrong_key() {
            return Self::new(Category::Auth, "wrong_relay_key", message).with_help(
                "check the relay's address; take a new one from the operator only if they changed the key",
            );
        }
        match error {
            TransportError::BadUrl { .. } => Self::new(Category::Usage, "bad_url", message),
            TransportError::BadKey { .. } => Self::new(Category::Storage, "bad_key", message),
            TransportError::Io { .. } => Self::new(Category::Storage, "io", message),
            error if error.is_peer_fault() => Self::new(Category::Server, "handshake", message),
            TransportError::Busy => Self::new(Category::Network, "relay_busy", message),
            _ => Self::new(Category::Network, "unreachable", message)
                .with_help("check the network; what was written here goes out when the relay can be reached"),
        }
    }
}
