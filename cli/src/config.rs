//! The directory of a device, as far as this program wrote it.
//!
//! ```text
//! DIR/anabranch.toml    device, workspace, relay and token; mode 0600
//! DIR/schema.toml       the schema
//! DIR/anabranch.sock    the socket of the process that owns the directory, while one does
//! ```
//!
//! The engine keeps its own files beside them.

use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::panic::catch_unwind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anabranch::{BackendKind, Engine, Schema, StoreKey, StoreOptions, TokenSource, Workspace};
use serde::{Deserialize, Serialize};
use tokio::net::UnixStream;

use crate::args::Global;
use crate::failure::{Category, Failure};
use crate::owner;

/// What `init` was told.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct DeviceConfig {
    /// What people call the device.
    pub(crate) device: String,
    pub(crate) workspace: String,
    /// With its key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) relay: Option<String>,
    /// Secret.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) token: Option<String>,
    /// What keeps the store; sled where nothing is said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) backend: Option<String>,
    /// Whether the store is encrypted. Without a passphrase such a directory is not opened, and
    /// never made plain.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) encrypted: bool,
    /// The file with the passphrase, where nothing else says it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) passphrase_file: Option<PathBuf>,
}

/// The directory of a device.
#[derive(Clone, Debug)]
pub(crate) struct DeviceDir {
    root: PathBuf,
    passphrase_file: Option<PathBuf>,
}

/// Holds the passphrase itself, where there is no file.
const PASSPHRASE_VARIABLE: &str = "ANABRANCH_PASSPHRASE";

impl DeviceDir {
    /// The directory given by `--data`.
    pub(crate) fn new(global: &Global) -> Result<Self, Failure> {
        match &global.data {
            Some(root) => Ok(Self { root: root.clone(), passphrase_file: global.passphrase_file.clone() }),
            None => Err(Failure::usage("no_data_dir", "no directory was given").help("give --data DIR")),
        }
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    pub(crate) fn schema_path(&self) -> PathBuf {
        self.root.join("schema.toml")
    }

    fn config_path(&self) -> PathBuf {
        self.root.join("anabranch.toml")
    }

    /// Makes the directory. The configuration is written last: while it is missing, `init` can
    /// be repeated.
    pub(crate) fn create(&self, config: &DeviceConfig, schema_source: &str) -> Result<(), Failure> {
        let path = self.config_path();
        if path.exists() {
            let message = format!("{} is already set up", self.root.display());
            return Err(Failure::usage("already_initialised", message)
                .help("choose another directory; to change relay or token, edit its anabranch.toml"));
        }
        let mut builder = std::fs::DirBuilder::new();
        builder.recursive(true).mode(0o700);
        builder.create(&self.root).map_err(|error| Failure::storage("create", &self.root, &error))?;
        self.write_schema(schema_source)?;
        let text = toml::to_string(config).map_err(|error| Failure::internal(error.to_string()))?;
        write_private(&path, &text)
    }

    /// Whether `init` made it.
    pub(crate) fn is_configured(&self) -> bool {
        self.config_path().exists()
    }

    /// Sets lines of the configuration, or takes them out; the others stay as they are.
    pub(crate) fn set(&self, lines: &[(&str, Option<toml_edit::Value>)]) -> Result<(), Failure> {
        let path = self.config_path();
        let text = with_lines(&read_text(&path)?, lines)
            .map_err(|what| Failure::usage("bad_config", format!("{}: {what}", path.display())))?;
        write_private(&path, &text)
    }

    /// Replaces the schema.
    pub(crate) fn write_schema(&self, source: &str) -> Result<(), Failure> {
        write_private(&self.schema_path(), source)
    }

    /// What was given to encrypt with or to open what is encrypted: `--passphrase-file`, else
    /// the variable.
    pub(crate) fn given_key(&self) -> Result<Option<StoreKey>, Failure> {
        if let Some(path) = &self.passphrase_file {
            return read_passphrase(path).map(Some);
        }
        match std::env::var(PASSPHRASE_VARIABLE) {
            Ok(text) => Ok(Some(StoreKey::from_passphrase(text))),
            Err(std::env::VarError::NotPresent) => Ok(None),
            Err(std::env::VarError::NotUnicode(_)) => {
                let message = format!("{PASSPHRASE_VARIABLE} is not UTF-8 text");
                Err(Failure::usage("bad_passphrase", message))
            }
        }
    }

    /// How the store is opened.
    fn store_options(&self, config: &DeviceConfig) -> Result<StoreOptions, Failure> {
        let mut options = StoreOptions::default();
        if let Some(name) = &config.backend {
            let kind = BackendKind::from_name(name).ok_or_else(|| {
                let message = format!("{}: backend = {name:?} is none", self.config_path().display());
                Failure::usage("bad_config", message).help("there are sled and redb")
            })?;
            options = options.backend(kind);
        }
        if config.encrypted {
            let key = match (self.given_key()?, &config.passphrase_file) {
                (Some(key), _) => key,
                (None, Some(path)) => read_passphrase(path)?,
                (None, None) => {
                    let message =
                        format!("{} is encrypted, and no passphrase was given", self.root.display());
                    return Err(Failure::usage("key_needed", message)
                        .help(format!("give --passphrase-file FILE, or set {PASSPHRASE_VARIABLE}")));
                }
            };
            options = options.encryption(key);
        } else if self.passphrase_file.is_some() {
            // The variable may be meant for another directory; this can't.
            let message = format!("{} is not encrypted", self.root.display());
            return Err(Failure::usage("not_encrypted", message).help("leave --passphrase-file out"));
        }
        Ok(options)
    }

    /// What `init` was told.
    pub(crate) fn config(&self) -> Result<DeviceConfig, Failure> {
        let path = self.config_path();
        let text = std::fs::read_to_string(&path).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => {
                let message = format!("{} is no directory of a device", self.root.display());
                Failure::usage("not_initialised", message)
                    .help("make it with `anabranch init`, or give another one with --data")
            }
            _ => Failure::storage("read", &path, &error),
        })?;
        parse_config(&text).map_err(|what| {
            Failure::usage("bad_config", format!("{}: {what}", path.display()))
                .help("mend the file; `anabranch init` in a fresh directory shows what it looks like")
        })
    }

    /// The device's schema.
    pub(crate) fn schema(&self) -> Result<Schema, Failure> {
        let path = self.schema_path();
        parse_schema(&read_text(&path)?, &path)
    }

    /// Reaches the process that owns the directory, or opens the engine and becomes it. Waits
    /// up to `patience` where another process holds the directory and does not listen.
    pub(crate) async fn reach(
        &self,
        config: &DeviceConfig,
        clock_offset_ms: i64,
        background_sync: bool,
        patience: Duration,
    ) -> Result<Opened, Failure> {
        let schema = self.schema()?;
        let store = self.store_options(config)?;
        let deadline = tokio::time::Instant::now() + patience;
        loop {
            if let Some(stream) = owner::connect(&self.root).await {
                return Ok(Opened::Elsewhere(stream));
            }
            let mut builder = Engine::builder(&self.root)
                .schema(schema.clone())
                .store(store.clone())
                .device_name(&config.device)
                .clock_offset_ms(clock_offset_ms)
                .background_sync(background_sync);
            if let Some(relay) = &config.relay {
                builder = builder.relay(relay);
            }
            if let Some(token) = &config.token {
                // Asked for at each sign-in: a new token in the file is taken without a restart.
                let dir = self.clone();
                builder = builder.token(TokenSource::callback(move || {
                    let token = dir.config().map(|config| config.token.unwrap_or_default());
                    std::future::ready(token.map_err(|failure| failure.message))
                }));
                // Edits made before the first sign-in are checked by the role that it will give.
                if let Some(claims) = anabranch_relay::peek_claims(token) {
                    builder = builder.assume_role(claims.role.name());
                }
            }
            let failure = match builder.open().await {
                Ok(engine) => {
                    let workspace = engine.workspace(&config.workspace).await?;
                    return Ok(Opened::Here(Device {
                        root: self.root.clone(),
                        engine,
                        workspace,
                        clock_offset_ms,
                    }));
                }
                Err(error) => Failure::from(error),
            };
            let in_use = failure.category == Category::Storage && failure.code.contains("in_use");
            if !in_use || tokio::time::Instant::now() > deadline {
                return Err(failure);
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

/// How the directory is reached.
pub(crate) enum Opened {
    /// This process owns it.
    Here(Device),
    /// Another one does, and listens.
    Elsewhere(UnixStream),
}

/// An open device.
#[derive(Clone)]
pub(crate) struct Device {
    pub(crate) root: PathBuf,
    pub(crate) engine: Engine,
    pub(crate) workspace: Workspace,
    pub(crate) clock_offset_ms: i64,
}

/// Parses a schema; every mistake is told with file and line.
/// Reads a configuration, or says what is wrong with it.
pub(crate) fn parse_config(text: &str) -> Result<DeviceConfig, String> {
    toml::from_str(text).map_err(|error| error.message().trim().to_owned())
}

/// A configuration with lines set or taken out, or what is wrong with it.
pub(crate) fn with_lines(text: &str, lines: &[(&str, Option<toml_edit::Value>)]) -> Result<String, String> {
    // The library panics where a dotted key extends a value that is missing.
    let mut document = catch_unwind(|| text.parse::<toml_edit::DocumentMut>())
        .map_err(|_| "not TOML: a key extends a value that is missing or no table".to_owned())?
        .map_err(|error| error.to_string())?;
    for (key, value) in lines {
        match value {
            Some(value) => document[key] = toml_edit::value(value.clone()),
            None => drop(document.remove(key)),
        }
    }
    Ok(document.to_string())
}

pub(crate) fn parse_schema(source: &str, path: &Path) -> Result<Schema, Failure> {
    Schema::parse(source, &path.display().to_string()).map_err(|errors| {
        Failure::validation("bad_schema", errors.to_string()).help("mend the lines named in the message")
    })
}

pub(crate) fn read_passphrase(path: &Path) -> Result<StoreKey, Failure> {
    StoreKey::from_passphrase_file(path).map_err(|error| {
        Failure::usage("bad_passphrase", error.to_string()).help("give a file that holds the passphrase")
    })
}

/// Reads a file that a person named.
pub(crate) fn read_text(path: &Path) -> Result<String, Failure> {
    std::fs::read_to_string(path).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => {
            Failure::usage("no_such_file", format!("there is no file {}", path.display()))
                .help("check the name and the directory that it is relative to")
        }
        std::io::ErrorKind::InvalidData => {
            Failure::validation("not_utf8", format!("{} is not UTF-8 text", path.display()))
        }
        _ => Failure::storage("read", path, &error),
    })
}

/// Writes a file that only its owner reads; afterwards it is there in full or not at all.
fn write_private(path: &Path, text: &str) -> Result<(), Failure> {
    let parent = path.parent().unwrap_or(Path::new("."));
    let temporary = path.with_extension(format!("new-{}", std::process::id()));
    let write = || {
        let mut file = std::fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&temporary, path)?;
        std::fs::File::open(parent)?.sync_all()
    };
    write().map_err(|error| {
        let _ = std::fs::remove_file(&temporary);
        Failure::storage("write", path, &error)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_set_and_taken_out_and_others_stay() {
        let text = "device = \"phone\" # mine\nworkspace = \"home\"\ntoken = \"a\"\n";
        let edited = with_lines(text, &[("relay", Some("quic://x:1".into())), ("token", None)]).unwrap();
        assert_eq!(edited, "device = \"phone\" # mine\nworkspace = \"home\"\nrelay = \"quic://x:1\"\n");
    }

    /// Found by fuzzing: the library panics here, which is no more than a mistake in a file.
    #[test]
    fn a_dotted_key_that_extends_a_missing_value_is_an_error() {
        let text = "d == .\nd .= .\n";
        let error = with_lines(text, &[("token", None)]).unwrap_err();
        assert!(error.contains("not TOML"), "{error}");
        assert!(parse_config(text).is_err());
    }
}
