//! The relay's directory: which file lies where, and the keys among them.
//!
//! ```text
//! DIR/relay.key            the relay's TLS identity, ed25519, PKCS #8 PEM, mode 0600
//! DIR/address              the URL by which devices reach it, written when it starts
//! DIR/issuers/dev.key      the private key of the built-in issuer `dev`, mode 0600
//! DIR/issuers/*.pub.pem    a trusted issuer's ed25519 key (SubjectPublicKeyInfo PEM)
//! DIR/issuers/*.jwks.json  a trusted issuer's keys as a JWK set (RFC 7517)
//! DIR/store/               the store, and its lock
//! DIR/anabranch.sock       (command line only) where `anabranch store` finds the running relay
//! ```
//!
//! Keys are plain files, so that tokens are made beside a running relay without asking it.
//! The part of a file's name before `.pub.pem` or `.jwks.json` names the issuer: it is what
//! the `iss` claim has to say, unless the configuration maps the name to another.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use anabranch_transport::{DeviceKey, RelayUrl, TransportError};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ed25519_dalek::VerifyingKey;
use ed25519_dalek::pkcs8::spki::der::pem::LineEnding;
use ed25519_dalek::pkcs8::{DecodePublicKey, EncodePublicKey};
use jsonwebtoken::DecodingKey;
use jsonwebtoken::jwk::{
    AlgorithmParameters, CommonParameters, EllipticCurve, Jwk, OctetKeyPairParameters, OctetKeyPairType,
    ThumbprintHash,
};
use serde::Deserialize;

/// The issuer whose private key lies in the directory.
pub const BUILT_IN_ISSUER: &str = "dev";
/// Largest issuer file; a larger one is an error.
const ISSUER_FILE_BYTES_MAX: u64 = 256 * 1024;
/// Most issuer files, and most keys of one; more are an error.
const ISSUER_FILES_MAX: usize = 64;
const KEYS_PER_ISSUER_MAX: usize = 64;
/// A URL is short; anything much larger is another file.
const ADDRESS_BYTES_MAX: u64 = 1024;

/// Why a key, or another file of the directory, can't be used.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeyError {
    /// The operating system refused.
    #[error("could not {action} {}: {cause}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The system's words.
        cause: String,
    },
    /// A file is not what its name says.
    #[error("{}: {what}", path.display())]
    Unusable {
        /// The file.
        path: PathBuf,
        /// What is wrong, and what would be right.
        what: String,
    },
    /// A private key can't be read or made.
    #[error(transparent)]
    Transport(#[from] TransportError),
}

fn io_error<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> KeyError + 'a {
    move |error| KeyError::Io { action, path: path.to_owned(), cause: error.to_string() }
}

/// The relay's directory. See the [module](self) for what lies in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RelayDir {
    root: PathBuf,
}

impl RelayDir {
    /// Names the directory; touches nothing.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Where the store lies.
    pub fn store_path(&self) -> PathBuf {
        self.root.join("store")
    }

    /// Where the trusted issuers' keys lie.
    pub fn issuers_path(&self) -> PathBuf {
        self.root.join("issuers")
    }

    /// Where the running relay says how to reach it.
    pub fn address_path(&self) -> PathBuf {
        self.root.join("address")
    }

    /// Makes the directory and its `issuers`, readable by their owner only.
    ///
    /// # Errors
    /// [`KeyError::Io`].
    pub fn create(&self) -> Result<(), KeyError> {
        let path = self.issuers_path();
        let mut builder = fs::DirBuilder::new();
        builder.recursive(true);
        #[cfg(unix)]
        std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
        builder.create(&path).map_err(io_error("create", &path))
    }

    /// The relay's identity. Made if it is absent; [`RelayDir::create`] comes first.
    ///
    /// # Errors
    /// [`KeyError::Transport`] if the file can't be read or written, or holds no key.
    pub fn relay_key(&self) -> Result<DeviceKey, KeyError> {
        Ok(DeviceKey::load_or_create(self.root.join("relay.key"))?)
    }

    /// The built-in issuer's private key. Made if it is absent, together with the public half
    /// that relays read; [`RelayDir::create`] comes first. Safe beside a running relay.
    ///
    /// # Errors
    /// [`KeyError::Transport`] for the private half, [`KeyError::Io`] for the public one.
    pub fn issuer_key(&self) -> Result<DeviceKey, KeyError> {
        let folder = self.issuers_path();
        let key = DeviceKey::load_or_create(folder.join(format!("{BUILT_IN_ISSUER}.key")))?;
        let path = folder.join(format!("{BUILT_IN_ISSUER}.pub.pem"));
        let unusable = |what: String| KeyError::Unusable { path: path.clone(), what };
        let pem = VerifyingKey::from_bytes(key.public().as_bytes())
            .map_err(|error| error.to_string())
            .and_then(|public| public.to_public_key_pem(LineEnding::LF).map_err(|error| error.to_string()))
            .map_err(|error| {
                unusable(format!("the built-in issuer's public key can't be written: {error}"))
            })?;
        // Rewritten where it differs: it follows a private key that was replaced.
        if read_bounded(&path, ISSUER_FILE_BYTES_MAX).ok().as_deref() != Some(pem.as_str()) {
            replace(&path, &pem)?;
        }
        Ok(key)
    }

    /// The URL under which a relay last ran here; `None` if none did.
    ///
    /// # Errors
    /// [`KeyError::Io`], or [`KeyError::Unusable`] if the file holds no URL.
    pub fn address(&self) -> Result<Option<RelayUrl>, KeyError> {
        let path = self.address_path();
        let text = match read_bounded(&path, ADDRESS_BYTES_MAX) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(io_error("read", &path)(error)),
        };
        match text.trim().parse() {
            Ok(url) => Ok(Some(url)),
            Err(error) => {
                Err(KeyError::Unusable { what: format!("{error}; start the relay to rewrite it"), path })
            }
        }
    }

    /// Says under which URL this relay is reached.
    pub(crate) fn write_address(&self, url: &RelayUrl) -> Result<(), KeyError> {
        replace(&self.address_path(), &format!("{url}\n"))
    }
}

/// The keys that may sign tokens: by issuer, then by key id.
///
/// Only ed25519 keys are trusted, and only for EdDSA: a key fixes its algorithm, the token
/// does not choose it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Issuers {
    by_name: BTreeMap<String, BTreeMap<String, DecodingKey>>,
}

impl Issuers {
    /// Reads a directory. What one file has wrong is reported and leaves out that file only,
    /// so that a slip in one issuer's file does not lock out the users of another.
    ///
    /// `names` maps the names of files to the `iss` claims of their issuers.
    pub(crate) fn read(
        folder: &Path,
        names: &BTreeMap<String, String>,
    ) -> Result<(Self, Vec<KeyError>), KeyError> {
        let mut issuers = Self::default();
        let mut problems = Vec::new();
        let mut paths = BTreeSet::new();
        match fs::read_dir(folder) {
            Ok(entries) => {
                for entry in entries {
                    let path = entry.map_err(io_error("list", folder))?.path();
                    if stem(&path).is_some() {
                        paths.insert(path);
                    }
                    if paths.len() > ISSUER_FILES_MAX {
                        let what = format!("has more than {ISSUER_FILES_MAX} issuer files; move some away");
                        return Err(KeyError::Unusable { path: folder.to_owned(), what });
                    }
                }
            }
            // Nobody is trusted yet.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(io_error("list", folder)(error)),
        }
        for path in paths {
            let Some(stem) = stem(&path) else { continue };
            let name = names.get(stem).map_or(stem, String::as_str);
            match read_keys(&path) {
                Ok(keys) => issuers.by_name.entry(name.to_owned()).or_default().extend(keys),
                Err(problem) => problems.push(problem),
            }
        }
        for stem in names.keys() {
            let files = [".pub.pem", ".jwks.json"].map(|ending| folder.join(format!("{stem}{ending}")));
            if !files.iter().any(|file| file.exists()) {
                let what = format!(
                    "the issuer {stem:?} is configured, but neither this file nor {stem}.pub.pem exists"
                );
                problems.push(KeyError::Unusable { path: files[1].clone(), what });
            }
        }
        Ok((issuers, problems))
    }

    /// The key of that id. A token without an id is taken to mean its issuer's only key.
    pub(crate) fn key(&self, issuer: &str, key_id: Option<&str>) -> Option<&DecodingKey> {
        let keys = self.by_name.get(issuer)?;
        match key_id {
            Some(id) => keys.get(id),
            None if keys.len() == 1 => keys.values().next(),
            None => None,
        }
    }

    /// How many keys are trusted.
    pub(crate) fn key_count(&self) -> usize {
        self.by_name.values().map(BTreeMap::len).sum()
    }
}

/// The issuer's name in a file's name; `None` for files that are not issuers'.
fn stem(path: &Path) -> Option<&str> {
    let name = path.file_name()?.to_str()?;
    name.strip_suffix(".pub.pem").or_else(|| name.strip_suffix(".jwks.json")).filter(|stem| !stem.is_empty())
}

fn read_keys(path: &Path) -> Result<Vec<(String, DecodingKey)>, KeyError> {
    let text = read_bounded(path, ISSUER_FILE_BYTES_MAX).map_err(io_error("read", path))?;
    parse_keys(path, &text)
}

/// Reads a text as an issuer's file of that name and gives the ids of its keys, for tests of hostile
/// input.
///
/// # Errors
/// [`KeyError::Unusable`].
#[doc(hidden)]
pub fn read_issuer_keys(path: &Path, text: &str) -> Result<Vec<String>, KeyError> {
    Ok(parse_keys(path, text)?.into_iter().map(|(id, _)| id).collect())
}

fn parse_keys(path: &Path, text: &str) -> Result<Vec<(String, DecodingKey)>, KeyError> {
    let unusable = |what: String| KeyError::Unusable { path: path.to_owned(), what };
    if path.extension().is_some_and(|extension| extension == "pem") {
        let key = VerifyingKey::from_public_key_pem(text.trim()).map_err(|_| {
            unusable("not an ed25519 public key in PEM; `openssl pkey -in KEY -pubout` writes one".into())
        })?;
        return Ok(vec![trusted(key.as_bytes(), None)]);
    }
    let set: JwkSet = serde_json::from_str(text)
        .map_err(|error| unusable(format!("not a JWK set, {{\"keys\": […]}}: {error}")))?;
    if set.keys.len() > KEYS_PER_ISSUER_MAX {
        return Err(unusable(format!("has {} keys, at most {KEYS_PER_ISSUER_MAX} are read", set.keys.len())));
    }
    let mut keys = Vec::new();
    for key in set.keys {
        // Sets mix keys of several kinds and uses; those that can't sign here are no fault.
        if key.kty != "OKP" || key.crv.as_deref() != Some("Ed25519") || key.used_for.as_deref() == Some("enc")
        {
            tracing::debug!(path = %path.display(), kty = key.kty, "skipped a key that is not ed25519");
            continue;
        }
        let mut x = [0; 32];
        match URL_SAFE_NO_PAD.decode_slice(key.x.unwrap_or_default(), &mut x) {
            Ok(32) if VerifyingKey::from_bytes(&x).is_ok_and(|key| !key.is_weak()) => {
                keys.push(trusted(&x, key.kid));
            }
            _ => {
                return Err(unusable(
                    "an Ed25519 key has an unusable \"x\"; it has to be 32 bytes in base64url".into(),
                ));
            }
        }
    }
    if keys.is_empty() {
        return Err(unusable("holds no Ed25519 key; this version checks EdDSA tokens only".into()));
    }
    Ok(keys)
}

#[derive(Deserialize)]
struct JwkSet {
    keys: Vec<SetKey>,
}

#[derive(Deserialize)]
struct SetKey {
    kty: String,
    crv: Option<String>,
    x: Option<String>,
    kid: Option<String>,
    #[serde(rename = "use")]
    used_for: Option<String>,
}

fn trusted(key: &[u8; 32], id: Option<String>) -> (String, DecodingKey) {
    (id.unwrap_or_else(|| key_id(key)), DecodingKey::from_ed_der(key))
}

/// The id of a key that nobody named: its JWK thumbprint (RFC 7638). It changes with the key,
/// so that a replaced key is noticed.
pub(crate) fn key_id(key: &[u8; 32]) -> String {
    let parameters = OctetKeyPairParameters {
        key_type: OctetKeyPairType::OctetKeyPair,
        curve: EllipticCurve::Ed25519,
        x: URL_SAFE_NO_PAD.encode(key),
    };
    let jwk =
        Jwk { common: CommonParameters::default(), algorithm: AlgorithmParameters::OctetKeyPair(parameters) };
    jwk.thumbprint(ThumbprintHash::SHA256)
}

fn read_bounded(path: &Path, bytes_max: u64) -> io::Result<String> {
    let mut text = String::new();
    let read = File::open(path)?.take(bytes_max + 1).read_to_string(&mut text)?;
    if read as u64 > bytes_max {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("larger than {bytes_max} bytes")));
    }
    Ok(text)
}

/// Replaces a small public file: a reader sees the old text or the new one, never a part.
fn replace(path: &Path, text: &str) -> Result<(), KeyError> {
    let mut random = [0; 8];
    getrandom::fill(&mut random).map_err(|error| {
        io_error("get random numbers to write", path)(io::Error::other(error.to_string()))
    })?;
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{:016x}.tmp", u64::from_le_bytes(random)));
    let temporary = path.with_file_name(name);
    let write = || {
        let mut file = File::create_new(&temporary)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    };
    write().map_err(|error| {
        let _ = fs::remove_file(&temporary);
        io_error("write", path)(error)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_id_is_the_thumbprint_of_rfc_8037() {
        // RFC 8037, appendix A.3.
        let x = URL_SAFE_NO_PAD.decode("11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo").unwrap();
        assert_eq!(key_id(&x.try_into().unwrap()), "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k");
    }

    #[test]
    fn a_bad_file_is_reported_and_leaves_the_others_trusted() {
        let folder = tempfile::tempdir().unwrap();
        let dir = RelayDir::new(folder.path());
        dir.create().unwrap();
        let key = dir.issuer_key().unwrap();
        fs::write(dir.issuers_path().join("bad.pub.pem"), "no key").unwrap();
        fs::write(dir.issuers_path().join("notes.txt"), "not looked at").unwrap();
        let x = URL_SAFE_NO_PAD.encode(key.public().as_bytes());
        fs::write(
            dir.issuers_path().join("acme.jwks.json"),
            format!(r#"{{"keys":[{{"kty":"RSA","n":"1","e":"1"}},{{"kty":"OKP","crv":"Ed25519","kid":"one","x":"{x}"}}]}}"#),
        )
        .unwrap();

        let names = BTreeMap::from([("acme".to_owned(), "https://acme.example".to_owned())]);
        let (issuers, problems) = Issuers::read(&dir.issuers_path(), &names).unwrap();
        assert_eq!(problems.len(), 1, "{problems:?}");
        assert!(problems[0].to_string().contains("bad.pub.pem"));
        assert!(issuers.key("dev", Some(&key_id(key.public().as_bytes()))).is_some());
        assert!(issuers.key("dev", None).is_some());
        assert!(issuers.key("https://acme.example", Some("one")).is_some());
        assert!(issuers.key("acme", Some("one")).is_none());
    }

    #[test]
    fn a_key_is_kept_once_made_and_its_public_half_follows_it() {
        let folder = tempfile::tempdir().unwrap();
        let dir = RelayDir::new(folder.path());
        dir.create().unwrap();
        let first = dir.issuer_key().unwrap();
        assert_eq!(dir.issuer_key().unwrap().public(), first.public());
        fs::remove_file(dir.issuers_path().join("dev.key")).unwrap();
        let second = dir.issuer_key().unwrap();
        assert_ne!(second.public(), first.public());
        let (issuers, _) = Issuers::read(&dir.issuers_path(), &BTreeMap::new()).unwrap();
        assert!(issuers.key("dev", Some(&key_id(second.public().as_bytes()))).is_some());
        assert!(issuers.key("dev", Some(&key_id(first.public().as_bytes()))).is_none());
    }
}
