//! What went wrong, in the words and numbers that people and programs rely on.

use std::process::ExitCode;

use serde::{Deserialize, Serialize};
use serde_json::{Value as Json, json};

/// Kinds of failure. The number of each is its exit code, which is stable and documented in
/// the help of the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Category {
    Internal = 1,
    Usage = 2,
    Validation = 3,
    Conflict = 4,
    Auth = 5,
    Network = 6,
    NotFound = 7,
    Quota = 8,
    Server = 9,
    Storage = 10,
    Deadline = 11,
    /// Whoever read the output has stopped reading: no failure, but no reason to go on.
    OutputClosed = 0,
}

impl Category {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Category::Internal => "internal",
            Category::Usage => "usage",
            Category::Validation => "validation",
            Category::Conflict => "conflict",
            Category::Auth => "auth",
            Category::Network => "network",
            Category::NotFound => "not_found",
            Category::Quota => "quota",
            Category::Server => "server",
            Category::Storage => "storage",
            Category::Deadline => "deadline",
            Category::OutputClosed => "output_closed",
        }
    }

    /// What to do where nothing more exact is known.
    fn help(self) -> &'static str {
        match self {
            Category::Internal => "this is a fault of the program: please report it with the message",
            Category::Usage => "see --help",
            Category::Validation => "change the value to what the schema allows",
            Category::Conflict => {
                "`anabranch conflicts` lists what waits for a decision, `anabranch resolve` settles it"
            }
            Category::Auth => "put a valid token into anabranch.toml in the device's directory",
            Category::Network => "nothing is lost; try again when the relay can be reached",
            Category::NotFound => "`anabranch list TYPE` prints what there is",
            Category::Quota => "send less at once, or ask whoever runs the relay for more",
            Category::Server => "try again later; if it stays, tell whoever runs the relay",
            Category::Storage => "check the directory, its owner and the free space",
            Category::Deadline => "run sync again: it goes on where this one stopped",
            Category::OutputClosed => "",
        }
    }
}

/// A failure of a command.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Failure {
    pub(crate) category: Category,
    /// For programs: stable.
    pub(crate) code: String,
    /// For people: what happened.
    pub(crate) message: String,
    /// For people: what to do.
    help: Option<String>,
}

impl Failure {
    pub(crate) fn new(category: Category, code: impl Into<String>, message: impl Into<String>) -> Self {
        Self { category, code: code.into(), message: message.into(), help: None }
    }

    pub(crate) fn usage(code: &str, message: impl Into<String>) -> Self {
        Self::new(Category::Usage, code, message)
    }

    pub(crate) fn validation(code: &str, message: impl Into<String>) -> Self {
        Self::new(Category::Validation, code, message)
    }

    pub(crate) fn storage(action: &str, path: &std::path::Path, error: &std::io::Error) -> Self {
        let code = match error.kind() {
            std::io::ErrorKind::PermissionDenied => "permission_denied",
            _ => "io",
        };
        Self::new(Category::Storage, code, format!("could not {action} {}: {error}", path.display()))
    }

    pub(crate) fn internal(message: impl Into<String>) -> Self {
        Self::new(Category::Internal, "internal", message)
    }

    pub(crate) fn output(error: &std::io::Error) -> Self {
        match error.kind() {
            std::io::ErrorKind::BrokenPipe => Self::new(Category::OutputClosed, "output_closed", ""),
            _ => Self::new(Category::Storage, "output", format!("could not write the output: {error}")),
        }
    }

    pub(crate) fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }

    pub(crate) fn help_text(&self) -> &str {
        self.help.as_deref().unwrap_or_else(|| self.category.help())
    }

    /// The object that `--json` prints.
    pub(crate) fn to_json(&self) -> Json {
        json!({ "error": {
            "category": self.category.name(),
            "code": self.code,
            "message": self.message,
            "help": self.help_text(),
        }})
    }

    /// Tells it on standard error.
    pub(crate) fn print(&self, as_json: bool) {
        use std::io::Write as _;
        if self.category == Category::OutputClosed {
            return;
        }
        let text = match as_json {
            true => self.to_json().to_string(),
            false => format!("error: {}\n  help: {}", self.message, self.help_text()),
        };
        // Nobody is left to tell if this fails.
        let _ = writeln!(std::io::stderr(), "{text}");
    }

    pub(crate) fn exit_code(&self) -> ExitCode {
        ExitCode::from(self.category as u8)
    }
}

impl From<anabranch::Error> for Failure {
    fn from(error: anabranch::Error) -> Self {
        use anabranch::Category as Theirs;
        let category = match error.category() {
            Theirs::Network => Category::Network,
            Theirs::Auth => Category::Auth,
            Theirs::Validation => Category::Validation,
            Theirs::Conflict => Category::Conflict,
            Theirs::Quota => Category::Quota,
            Theirs::Server => Category::Server,
            Theirs::NotFound => Category::NotFound,
            Theirs::Storage => Category::Storage,
            Theirs::Usage => Category::Usage,
            _ => Category::Internal,
        };
        let mut failure = Self::new(category, error.code(), error.to_string());
        failure.help = error.help().map(str::to_owned);
        failure
    }
}

impl From<anabranch::store::StoreError> for Failure {
    fn from(error: anabranch::store::StoreError) -> Self {
        anabranch::Error::from(error).into()
    }
}

impl From<anabranch_relay::ConfigError> for Failure {
    fn from(error: anabranch_relay::ConfigError) -> Self {
        use anabranch_relay::ConfigError;
        match &error {
            ConfigError::Keys(keys) => keys.clone().into(),
            ConfigError::NoData => Self::usage("no_data_dir", error.to_string()),
            _ => Self::usage("bad_config", error.to_string()),
        }
    }
}

impl From<anabranch_relay::KeyError> for Failure {
    fn from(error: anabranch_relay::KeyError) -> Self {
        Self::new(Category::Storage, "keys", error.to_string())
    }
}

impl From<anabranch_relay::TokenError> for Failure {
    fn from(error: anabranch_relay::TokenError) -> Self {
        use anabranch_relay::TokenError;
        match error {
            TokenError::Key(error) => error.into(),
            TokenError::Unusable { .. } => Self::usage("bad_token_request", error.to_string()),
            TokenError::NoAddress { .. } => Self::usage("no_address", error.to_string()),
            TokenError::BadInvite { .. } => Self::usage("bad_invite", error.to_string()),
            _ => Self::internal(error.to_string()),
        }
    }
}

impl From<anabranch_relay::RelayError> for Failure {
    fn from(error: anabranch_relay::RelayError) -> Self {
        use anabranch_relay::RelayError;
        let help = match error.can_retry() {
            true => "starting it again may help",
            false => "the cause has to be mended first",
        };
        match error {
            RelayError::Config(error) => error.into(),
            RelayError::Keys(error) => error.into(),
            RelayError::Network(error) => {
                Self::new(Category::Network, "relay_network", error.to_string()).help(help)
            }
            RelayError::Store(error) => {
                Self::new(Category::Storage, "relay_store", error.to_string()).help(help)
            }
            other => Self::internal(other.to_string()),
        }
    }
}
