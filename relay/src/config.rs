//! How a relay is set up: a TOML file, over it the environment, over that flags.
//!
//! ```toml
//! data = "/var/lib/anabranch"              # keys and store; the only setting without a default
//! listen = "0.0.0.0:4433"                  # UDP
//! public_address = "relay.example:4433"    # what devices dial; else the address listened on
//! require_schema = true                    # refuse changes until a schema was pushed
//! grant_days = 30                          # how long a sign-in holds
//! workspaces_per_connection = 64
//! connections_per_device = 8
//! connections_per_user = 256               # to one workspace
//! connections_per_workspace = 5000
//! device_kib_per_second = 8192             # what may be sent, with eight seconds' worth at once
//! user_kib_per_second = 16384              # to one workspace
//! workspace_kib_per_second = 65536
//! unsent_mb = 512                          # memory for what devices do not read
//! cache_mb = 512                           # memory for pages of the store
//! store_backend = "redb"                   # of a new store: sled (the default) or redb
//! store_passphrase_file = "/run/secret"    # of an encrypted store; or store_key_file: 64 hex digits
//!
//! [issuers]                                # issuers/acme.jwks.json signs for this `iss`
//! acme = "https://acme.example"
//! ```
//!
//! Each setting but `issuers` also goes by an environment variable:
//! `ANABRANCH_RELAY_DATA`, `ANABRANCH_RELAY_LISTEN` and so on, and `ANABRANCH_RELAY_CONFIG`
//! names the file. `ANABRANCH_RELAY_STORE_PASSPHRASE` is the passphrase itself; it has no place
//! in the file.

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anabranch_store::{BackendKind, StoreError, StoreKey};
use serde::Deserialize;

use crate::keys::{Issuers, KeyError, RelayDir};

const ENV_PREFIX: &str = "ANABRANCH_RELAY_";
const FILE_BYTES_MAX: u64 = 1024 * 1024;
const DEFAULT_PORT: u16 = 4433;

/// What the command line says. Everything is optional.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct RelayOptions {
    /// Defaults for trying things out: data in `./anabranch-relay`, listening on
    /// `127.0.0.1:4433`, no schema required.
    pub dev: bool,
    /// The configuration file.
    pub config: Option<PathBuf>,
    /// Overrides `data`.
    pub data: Option<PathBuf>,
    /// Overrides `listen`: `HOST:PORT`, where port 0 lets the system choose.
    pub listen: Option<String>,
    /// Overrides `public_address`.
    pub public_address: Option<String>,
    /// Overrides `require_schema`.
    pub require_schema: Option<bool>,
    /// Begins a new epoch at the start, so that devices bring what a store that was restored lacks.
    /// A store that can tell that it went back begins one by itself.
    pub new_epoch: bool,
    /// Milliseconds by which the wall clock is shifted, for tests of wrong clocks.
    pub clock_offset_ms: i64,
}

/// Why a relay can't be set up.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file can't be read.
    #[error("could not read the configuration {}: {cause}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The system's words.
        cause: String,
    },
    /// The file is no TOML, or says what no relay understands.
    #[error("{}:{line}:{column}: {what}", path.display())]
    BadFile {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// The column, from 1.
        column: usize,
        /// What is wrong, and what would be right.
        what: String,
    },
    /// A setting has a value that can't be used.
    #[error("{origin}: {setting} = {value:?} can't be used; {expected}")]
    BadValue {
        /// Where it was set.
        origin: String,
        /// The setting.
        setting: &'static str,
        /// Its value.
        value: String,
        /// What would be right.
        expected: &'static str,
    },
    /// No directory was given.
    #[error(
        "no data directory is set: give --data DIR, set {ENV_PREFIX}DATA, or put data = \"DIR\" into the \
         configuration; with --dev there is a default"
    )]
    NoData,
    /// The store's key can't be read.
    #[error("store_key_file or store_passphrase_file: {0}")]
    StoreKey(StoreError),
    /// The keys are not in order.
    #[error(transparent)]
    Keys(#[from] KeyError),
}

/// A complete, checked set-up.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RelaySettings {
    /// Whether these are the defaults for trying things out.
    pub dev: bool,
    /// The relay's directory.
    pub dir: RelayDir,
    /// Where to listen (UDP).
    pub listen: SocketAddr,
    /// `HOST:PORT` that devices dial, if it is not the address listened on.
    pub public_address: Option<String>,
    /// Whether changes are refused until a schema was pushed.
    pub require_schema: bool,
    /// How long a sign-in holds.
    pub grant_days: u32,
    /// Workspaces that one connection may open.
    pub workspaces_per_connection: u32,
    /// Connections of one device at once.
    pub connections_per_device: u32,
    /// Connections of one user to a workspace at once.
    pub connections_per_user: u32,
    /// Connections to one workspace at once.
    pub connections_per_workspace: u32,
    /// What one device may send, in KiB a second.
    pub device_kib_per_second: u32,
    /// What one user's devices may send to a workspace, in KiB a second.
    pub user_kib_per_second: u32,
    /// What may be sent to one workspace, in KiB a second.
    pub workspace_kib_per_second: u32,
    /// Memory for what devices do not read, in MiB.
    pub unsent_mb: u32,
    /// Memory for pages of the store, in MiB.
    pub cache_mb: u32,
    /// What keeps the store, if that is set.
    pub store_backend: Option<BackendKind>,
    /// Where the key of an encrypted store comes from.
    pub store_key: Option<KeySource>,
    /// Names of issuer files and the `iss` claims of their issuers.
    pub issuers: BTreeMap<String, String>,
    /// Whether a new epoch begins at the start.
    pub new_epoch: bool,
    /// Milliseconds by which the wall clock is shifted.
    pub clock_offset_ms: i64,
}

/// Where the key of an encrypted store comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum KeySource {
    /// A file with 64 hexadecimal digits.
    KeyFile(PathBuf),
    /// A file with a passphrase.
    PassphraseFile(PathBuf),
    /// Given as it is.
    Given(StoreKey),
}

impl KeySource {
    /// Reads the key.
    ///
    /// # Errors
    /// [`ConfigError::StoreKey`].
    pub fn read(&self) -> Result<StoreKey, ConfigError> {
        match self {
            KeySource::KeyFile(path) => StoreKey::from_key_file(path),
            KeySource::PassphraseFile(path) => StoreKey::from_passphrase_file(path),
            KeySource::Given(key) => Ok(key.clone()),
        }
        .map_err(ConfigError::StoreKey)
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    data: Option<PathBuf>,
    listen: Option<String>,
    public_address: Option<String>,
    require_schema: Option<bool>,
    grant_days: Option<u32>,
    workspaces_per_connection: Option<u32>,
    connections_per_device: Option<u32>,
    connections_per_user: Option<u32>,
    connections_per_workspace: Option<u32>,
    device_kib_per_second: Option<u32>,
    user_kib_per_second: Option<u32>,
    workspace_kib_per_second: Option<u32>,
    unsent_mb: Option<u32>,
    cache_mb: Option<u32>,
    store_backend: Option<String>,
    store_key_file: Option<PathBuf>,
    store_passphrase_file: Option<PathBuf>,
    #[serde(default)]
    issuers: BTreeMap<String, String>,
}

/// A value and where it came from.
struct Set<T> {
    value: T,
    origin: String,
}

/// Collects one setting from its sources, the strongest first.
struct Sources<'a> {
    env: &'a BTreeMap<String, String>,
    file: Option<&'a Path>,
}

impl Sources<'_> {
    fn pick<T>(
        &self,
        setting: &'static str,
        flag: Option<T>,
        file: Option<T>,
        parse: impl FnOnce(&str) -> Option<T>,
        expected: &'static str,
    ) -> Result<Option<Set<T>>, ConfigError> {
        if let Some(value) = flag {
            return Ok(Some(Set { value, origin: "command line".into() }));
        }
        let variable = format!("{ENV_PREFIX}{}", setting.to_uppercase());
        if let Some(text) = self.env.get(&variable) {
            return match parse(text) {
                Some(value) => Ok(Some(Set { value, origin: variable })),
                None => {
                    Err(ConfigError::BadValue { origin: variable, setting, value: text.clone(), expected })
                }
            };
        }
        let origin = self.file.map_or_else(String::new, |path| path.display().to_string());
        Ok(file.map(|value| Set { value, origin }))
    }
}

impl RelayOptions {
    /// Nothing set.
    pub fn new() -> Self {
        Self::default()
    }

    /// Settings for trying things out; see [`RelayOptions::dev`].
    pub fn dev() -> Self {
        Self { dev: true, ..Self::default() }
    }

    /// Sets the relay's directory.
    #[must_use]
    pub fn data(mut self, data: impl Into<PathBuf>) -> Self {
        self.data = Some(data.into());
        self
    }

    /// Sets where to listen: `HOST:PORT`, where port 0 lets the system choose.
    #[must_use]
    pub fn listen(mut self, listen: impl Into<String>) -> Self {
        self.listen = Some(listen.into());
        self
    }

    /// Joins flags, the process's environment, the configuration file and defaults.
    ///
    /// # Errors
    /// [`ConfigError`], naming where the fault lies and what would be right.
    pub fn resolve(&self) -> Result<RelaySettings, ConfigError> {
        self.resolve_in(std::env::vars_os().filter_map(|(name, value)| {
            // What is not Unicode can't be one of ours.
            Some((name.into_string().ok()?, value.into_string().ok()?))
        }))
    }

    /// Like [`resolve`](Self::resolve) in a given environment.
    ///
    /// # Errors
    /// As there.
    pub fn resolve_in(
        &self,
        env: impl IntoIterator<Item = (String, String)>,
    ) -> Result<RelaySettings, ConfigError> {
        let env: BTreeMap<String, String> =
            env.into_iter().filter(|(name, _)| name.starts_with(ENV_PREFIX)).collect();
        let path = self.config.clone().or_else(|| env.get(&format!("{ENV_PREFIX}CONFIG")).map(PathBuf::from));
        let file = match &path {
            Some(path) => read_file(path)?,
            None => File::default(),
        };
        self.join(&env, path.as_deref(), file)
    }

    /// Like [`resolve`](Self::resolve) in no environment, with a text in place of the configuration
    /// file, for tests of hostile input.
    ///
    /// # Errors
    /// As there.
    #[doc(hidden)]
    pub fn resolve_text(&self, text: &str) -> Result<RelaySettings, ConfigError> {
        let path = Path::new("relay.toml");
        self.join(&BTreeMap::new(), Some(path), parse_file(path, text)?)
    }

    fn join(
        &self,
        env: &BTreeMap<String, String>,
        path: Option<&Path>,
        file: File,
    ) -> Result<RelaySettings, ConfigError> {
        let sources = Sources { env, file: path };
        let text = |text: &str| Some(text.to_owned());
        let number = |text: &str| text.parse().ok();

        let data =
            sources.pick("data", self.data.clone(), file.data, |t| Some(t.into()), "give a directory")?;
        let data = match data {
            Some(Set { value, origin }) if value.as_os_str().is_empty() => {
                return Err(ConfigError::BadValue {
                    origin,
                    setting: "data",
                    value: String::new(),
                    expected: "give a directory",
                });
            }
            Some(set) => set.value,
            None if self.dev => PathBuf::from("anabranch-relay"),
            None => return Err(ConfigError::NoData),
        };

        let expected = "give an IP address and a port, as in 0.0.0.0:4433 or [::]:4433";
        let listen = sources.pick("listen", self.listen.clone(), file.listen, text, expected)?;
        let listen = match listen {
            Some(Set { value, origin }) => value.parse().map_err(|_| ConfigError::BadValue {
                origin,
                setting: "listen",
                value,
                expected,
            })?,
            None if self.dev => SocketAddr::from(([127, 0, 0, 1], DEFAULT_PORT)),
            None => SocketAddr::from(([0, 0, 0, 0], DEFAULT_PORT)),
        };

        let expected = "give a name or an address and a port, as in relay.example:4433";
        let public = sources.pick(
            "public_address",
            self.public_address.clone(),
            file.public_address,
            text,
            expected,
        )?;
        let public_address = match public {
            Some(Set { value, origin }) if !is_host_and_port(&value) => {
                return Err(ConfigError::BadValue { origin, setting: "public_address", value, expected });
            }
            public => public.map(|set| set.value),
        };

        let expected = "give true or false";
        let require_schema = sources.pick(
            "require_schema",
            self.require_schema,
            file.require_schema,
            |t| t.parse().ok(),
            expected,
        )?;
        let bounded = |setting, file: Option<u32>, default: u32, max: u32, expected| {
            let set = sources.pick(setting, None, file, number, expected)?;
            match set {
                Some(Set { value, origin }) if value == 0 || value > max => {
                    Err(ConfigError::BadValue { origin, setting, value: value.to_string(), expected })
                }
                set => Ok(set.map_or(default, |set| set.value)),
            }
        };
        let expected = "give sled or redb";
        let backend = sources.pick("store_backend", None, file.store_backend, text, expected)?;
        let store_backend = match backend {
            Some(Set { value, origin }) => match BackendKind::from_name(&value) {
                Some(kind) => Some(kind),
                None => {
                    let setting = "store_backend";
                    return Err(ConfigError::BadValue { origin, setting, value, expected });
                }
            },
            None => None,
        };
        let path = |setting, file| sources.pick(setting, None, file, |t| Some(t.into()), "give a file");
        let store_key = one_key(
            path("store_key_file", file.store_key_file)?,
            path("store_passphrase_file", file.store_passphrase_file)?,
            env.get(&format!("{ENV_PREFIX}STORE_PASSPHRASE")),
        )?;
        let connections = |setting, file, default| bounded(setting, file, default, 10_000, "give 1 to 10000");
        let rate = |setting, file, kib: u32| bounded(setting, file, kib, 1 << 22, "give 1 to 4194304 KiB");
        let settings = RelaySettings {
            dev: self.dev,
            dir: RelayDir::new(data),
            listen,
            public_address,
            require_schema: require_schema.map_or(!self.dev, |set| set.value),
            grant_days: bounded("grant_days", file.grant_days, 30, 3650, "give 1 to 3650 days")?,
            workspaces_per_connection: bounded(
                "workspaces_per_connection",
                file.workspaces_per_connection,
                64,
                4096,
                "give 1 to 4096",
            )?,
            connections_per_device: connections("connections_per_device", file.connections_per_device, 8)?,
            connections_per_user: connections("connections_per_user", file.connections_per_user, 256)?,
            connections_per_workspace: connections(
                "connections_per_workspace",
                file.connections_per_workspace,
                5_000,
            )?,
            device_kib_per_second: rate("device_kib_per_second", file.device_kib_per_second, 8 << 10)?,
            user_kib_per_second: rate("user_kib_per_second", file.user_kib_per_second, 16 << 10)?,
            workspace_kib_per_second: rate(
                "workspace_kib_per_second",
                file.workspace_kib_per_second,
                64 << 10,
            )?,
            unsent_mb: bounded("unsent_mb", file.unsent_mb, 512, 1 << 20, "give 1 to 1048576 MiB")?,
            cache_mb: bounded(
                "cache_mb",
                file.cache_mb,
                if self.dev { 64 } else { 512 },
                1024 * 1024,
                "give 1 to 1048576 MiB",
            )?,
            store_backend,
            store_key,
            issuers: file.issuers,
            new_epoch: self.new_epoch,
            clock_offset_ms: self.clock_offset_ms,
        };
        for name in env.keys() {
            let known = ["config", "data", "listen", "public_address", "require_schema", "grant_days"]
                .into_iter()
                .chain(["workspaces_per_connection", "cache_mb", "store_backend", "store_key_file"])
                .chain(["store_passphrase_file", "store_passphrase", "connections_per_device"])
                .chain(["connections_per_user", "connections_per_workspace", "device_kib_per_second"])
                .chain(["user_kib_per_second", "workspace_kib_per_second", "unsent_mb"]);
            // No error: platforms set variables by the names of services.
            if !known.map(|name| format!("{ENV_PREFIX}{}", name.to_uppercase())).any(|known| known == *name) {
                tracing::warn!(name, "an environment variable by this name is not looked at");
            }
        }
        Ok(settings)
    }

    /// Checks the set-up without starting, and changes nothing: settings, issuers' keys, the
    /// directory.
    ///
    /// # Errors
    /// The first fault found.
    pub fn check(&self) -> Result<RelaySettings, ConfigError> {
        let settings = self.resolve()?;
        settings.check()?;
        Ok(settings)
    }
}

impl RelaySettings {
    fn check(&self) -> Result<(), ConfigError> {
        let root = self.dir.root();
        if root.exists() && !root.is_dir() {
            let what = "this is no directory; give one, or a name that is not taken".to_owned();
            return Err(KeyError::Unusable { path: root.to_owned(), what }.into());
        }
        self.dir.address()?;
        if let Some(source) = &self.store_key {
            source.read()?;
        }
        let (_, problems) = Issuers::read(&self.dir.issuers_path(), &self.issuers)?;
        match problems.into_iter().next() {
            Some(problem) => Err(problem.into()),
            None => Ok(()),
        }
    }
}

/// Takes the one key that is set: of two, one would be ignored.
fn one_key(
    key_file: Option<Set<PathBuf>>,
    passphrase_file: Option<Set<PathBuf>>,
    passphrase: Option<&String>,
) -> Result<Option<KeySource>, ConfigError> {
    let set = [
        key_file.map(|set| ("store_key_file", set.origin, KeySource::KeyFile(set.value))),
        passphrase_file
            .map(|set| ("store_passphrase_file", set.origin, KeySource::PassphraseFile(set.value))),
        passphrase.map(|text| {
            let source = KeySource::Given(StoreKey::from_passphrase(text));
            ("store_passphrase", format!("{ENV_PREFIX}STORE_PASSPHRASE"), source)
        }),
    ];
    let mut set = set.into_iter().flatten();
    match (set.next(), set.next()) {
        (Some((setting, origin, _)), Some((other, ..))) => Err(ConfigError::BadValue {
            origin,
            setting,
            value: format!("together with {other}"),
            expected: "give only one of store_key_file, store_passphrase_file and store_passphrase",
        }),
        (first, _) => Ok(first.map(|(_, _, source)| source)),
    }
}

fn is_host_and_port(text: &str) -> bool {
    text.rsplit_once(':').is_some_and(|(host, port)| {
        let bracketed = host.starts_with('[') && host.ends_with(']');
        let plain = !host.is_empty() && !host.contains([':', '/', '#', '@', '[', ']']);
        port.parse::<u16>().is_ok_and(|port| port != 0)
            && (bracketed || plain)
            && !host.contains(char::is_whitespace)
    })
}

fn read_file(path: &Path) -> Result<File, ConfigError> {
    let unreadable = |cause: String| ConfigError::Unreadable { path: path.to_owned(), cause };
    let bytes = fs::metadata(path).map_err(|error| unreadable(error.to_string()))?.len();
    if bytes > FILE_BYTES_MAX {
        return Err(unreadable(format!("its {bytes} bytes are more than a configuration has")));
    }
    let text = fs::read_to_string(path).map_err(|error| unreadable(error.to_string()))?;
    parse_file(path, &text)
}

fn parse_file(path: &Path, text: &str) -> Result<File, ConfigError> {
    toml::from_str(text).map_err(|error| {
        let before = text.get(..error.span().map_or(0, |span| span.start)).unwrap_or_default();
        ConfigError::BadFile {
            path: path.to_owned(),
            line: before.matches('\n').count() + 1,
            column: before.rsplit('\n').next().unwrap_or_default().chars().count() + 1,
            what: error.message().to_owned(),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolve(options: &RelayOptions, env: &[(&str, &str)]) -> Result<RelaySettings, ConfigError> {
        options.resolve_in(env.iter().map(|(name, value)| (name.to_string(), value.to_string())))
    }

    fn file(text: &str) -> (tempfile::TempDir, RelayOptions) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("relay.toml");
        fs::write(&path, text).unwrap();
        (folder, RelayOptions { config: Some(path), ..RelayOptions::default() })
    }

    #[test]
    fn development_needs_no_settings() {
        let settings = resolve(&RelayOptions::dev(), &[]).unwrap();
        assert_eq!(settings.listen.to_string(), "127.0.0.1:4433");
        assert_eq!(settings.dir.root(), Path::new("anabranch-relay"));
        assert!(!settings.require_schema);
        assert!(matches!(resolve(&RelayOptions::new(), &[]), Err(ConfigError::NoData)));
        assert!(resolve(&RelayOptions::new().data("x"), &[]).unwrap().require_schema);
    }

    #[test]
    fn flags_go_over_the_environment_and_that_over_the_file() {
        let (_folder, options) = file("data = \"file\"\nlisten = \"127.0.0.1:1\"\ngrant_days = 7\n");
        let env = [("ANABRANCH_RELAY_DATA", "env"), ("ANABRANCH_RELAY_LISTEN", "127.0.0.1:2")];
        let settings = resolve(&options.data("flag"), &env).unwrap();
        assert_eq!(settings.dir.root(), Path::new("flag"));
        assert_eq!(settings.listen.port(), 2);
        assert_eq!(settings.grant_days, 7);
    }

    #[test]
    fn errors_say_where_and_what_would_be_right() {
        for (text, expected) in [
            (
                "data = \"x\"\n\nlistn = \"x\"\n",
                "relay.toml:3:1: unknown field `listn`, expected one of `data`",
            ),
            (
                "data = \"x\"\ngrant_days = \"many\"\n",
                "relay.toml:2:14: invalid type: string \"many\", expected u32",
            ),
            ("data = \"x\"\nlisten = \"4433\"\n", "relay.toml: listen = \"4433\" can't be used; give an IP"),
            (
                "data = \"x\"\npublic_address = \"relay.example\"\n",
                "public_address = \"relay.example\" can't be used",
            ),
            ("data = \"x\"\ncache_mb = 0\n", "cache_mb = \"0\" can't be used; give 1 to"),
            ("data = \"\"\n", "give a directory"),
            (
                "data = \"x\"\nstore_backend = \"rocks\"\n",
                "store_backend = \"rocks\" can't be used; give sled or",
            ),
            (
                "data = \"x\"\nstore_key_file = \"a\"\nstore_passphrase_file = \"b\"\n",
                "store_key_file = \"together with store_passphrase_file\" can't be used; give only one",
            ),
            ("data = [\n", "relay.toml:"),
        ] {
            let (_folder, options) = file(text);
            let error = resolve(&options, &[]).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
        let error =
            resolve(&RelayOptions::dev(), &[("ANABRANCH_RELAY_REQUIRE_SCHEMA", "maybe")]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "ANABRANCH_RELAY_REQUIRE_SCHEMA: require_schema = \"maybe\" can't be used; give true or false"
        );
    }

    #[test]
    fn the_store_is_as_file_and_environment_say() {
        let (folder, options) = file("data = \"x\"\nstore_backend = \"redb\"\n");
        let settings = resolve(&options, &[]).unwrap();
        assert_eq!((settings.store_backend, settings.store_key), (Some(BackendKind::Redb), None));
        let secret = folder.path().join("secret");
        let env = [("ANABRANCH_RELAY_STORE_PASSPHRASE_FILE", secret.to_str().unwrap())];
        let settings = resolve(&options, &env).unwrap();
        let source = settings.store_key.unwrap();
        let error = source.read().unwrap_err().to_string();
        assert!(error.contains("secret: No such file"), "{error}");
        fs::write(&secret, "correct horse\n").unwrap();
        assert_eq!(source.read().unwrap(), StoreKey::from_passphrase("correct horse"));
        let settings = resolve(&options, &[("ANABRANCH_RELAY_STORE_PASSPHRASE", "correct horse")]).unwrap();
        let shown = format!("{settings:?}");
        assert!(!shown.contains("horse") && shown.contains("StoreKey(passphrase)"), "{shown}");
    }

    #[test]
    fn a_check_finds_unusable_issuers_and_makes_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let data = folder.path().join("relay");
        let options = RelayOptions::dev().data(&data);
        options.check().unwrap();
        assert!(!data.exists());
        fs::create_dir_all(data.join("issuers")).unwrap();
        fs::write(data.join("issuers/acme.jwks.json"), "{}").unwrap();
        let error = options.check().unwrap_err().to_string();
        assert!(error.contains("acme.jwks.json: not a JWK set"), "{error}");
    }
}
