//! Device keys and their public halves.

use crate::error::TransportError;
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use ed25519_dalek::{
    SigningKey, VerifyingKey,
    pkcs8::{DecodePrivateKey, EncodePrivateKey, spki::der::pem::LineEnding},
};
use std::{
    fmt,
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    path::{Path, PathBuf},
    str::FromStr,
};

/// A PEM file of one ed25519 key has some 120 bytes; anything much larger is another file.
const KEY_FILE_BYTES_MAX: u64 = 16 * 1024;

/// The ed25519 key by which a device or a relay is known.
///
/// The private half is wiped from memory on drop and never shown by `Debug`.
#[derive(Clone)]
pub struct DeviceKey {
    signing: SigningKey,
    public: PublicKey,
}

impl DeviceKey {
    /// A new key from the system's random numbers.
    ///
    /// # Errors
    /// [`TransportError::Io`] if the system has none.
    pub fn generate() -> Result<Self, TransportError> {
        let mut seed = [0; 32];
        getrandom::fill(&mut seed).map_err(|error| {
            TransportError::io("get random numbers from the system", io::Error::other(error.to_string()))
        })?;
        Ok(Self::from_seed(&seed))
    }

    /// The key of a 32-byte seed, the private key of RFC 8032.
    pub fn from_seed(seed: &[u8; 32]) -> Self {
        let signing = SigningKey::from_bytes(seed);
        let public = PublicKey(signing.verifying_key().to_bytes());
        Self { signing, public }
    }

    /// The seed, from which [`from_seed`](Self::from_seed) makes the same key. Secret.
    pub fn to_seed(&self) -> [u8; 32] {
        self.signing.to_bytes()
    }

    /// Reads a key in PKCS #8 PEM, as written by [`to_pem`](Self::to_pem) or `openssl genpkey
    /// -algorithm ed25519`.
    ///
    /// # Errors
    /// [`TransportError::BadKey`] if it is anything else.
    pub fn from_pem(pem: &str) -> Result<Self, TransportError> {
        // The parser's own words can't be trusted to leave out what it read.
        let signing = SigningKey::from_pkcs8_pem(pem.trim())
            .map_err(|_| TransportError::bad_key("not an ed25519 private key in PKCS #8 PEM"))?;
        Ok(Self::from_seed(&signing.to_bytes()))
    }

    /// The key in PKCS #8 PEM. Secret.
    ///
    /// # Errors
    /// [`TransportError::BadKey`] if it can't be encoded, which is not known to happen.
    pub fn to_pem(&self) -> Result<String, TransportError> {
        let pem = self.signing.to_pkcs8_pem(LineEnding::LF);
        pem.map(|pem| pem.to_string()).map_err(|_| TransportError::bad_key("it can't be encoded as PEM"))
    }

    /// Reads the key from a PEM file, or makes a new one and stores it there if there is none.
    ///
    /// The file is readable by its owner only (on Unix; a wider mode is narrowed with a warning).
    /// When this returns, the file and its name are on disk. Of several processes that do this at
    /// once, one stores its key and all return that one. Blocks for the time of a few disk writes.
    ///
    /// # Errors
    /// [`TransportError::Io`] if the file can't be read or written; its folder must exist.
    /// [`TransportError::BadKey`] if it holds no key; it is then left as it is, because replacing
    /// it would silently change who this device is.
    pub fn load_or_create(path: impl AsRef<Path>) -> Result<Self, TransportError> {
        let path = path.as_ref();
        if let Some(key) = load(path)? {
            return Ok(key);
        }
        let key = Self::generate()?;
        if store_new(path, key.to_pem()?.as_bytes())? {
            return Ok(key);
        }
        // Another process was faster; what it stored is complete.
        load(path)?.ok_or_else(|| {
            let gone = io::Error::new(io::ErrorKind::NotFound, "it vanished while it was opened");
            TransportError::io(format!("read the device key {}", path.display()), gone)
        })
    }

    /// The public half.
    pub fn public(&self) -> PublicKey {
        self.public
    }

    pub(crate) fn signing(&self) -> &SigningKey {
        &self.signing
    }
}

impl fmt::Debug for DeviceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceKey").field("public", &self.public).finish_non_exhaustive()
    }
}

/// The public half of a [`DeviceKey`]: how devices and relays are named.
///
/// Written as 43 characters of base64url without padding. Any 32 bytes can be held; whether they
/// are a usable key is checked where a key comes in: by [`FromStr`] and in every handshake.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PublicKey(pub [u8; 32]);

impl PublicKey {
    /// The raw bytes.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// Whether the bytes are a key that one person only can hold the private half of.
    ///
    /// Besides non-points this refuses keys of small order, for which anybody can make signatures,
    /// and second encodings of a point, by which one key would have two names.
    ///
    /// # Errors
    /// [`TransportError::BadKey`].
    pub fn check(&self) -> Result<(), TransportError> {
        let key = VerifyingKey::from_bytes(&self.0)
            .map_err(|_| TransportError::bad_key("the bytes are no ed25519 public key"))?;
        if key.is_weak() || key.to_edwards().compress().to_bytes() != self.0 {
            return Err(TransportError::bad_key("the bytes are an ed25519 public key that proves nothing"));
        }
        Ok(())
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&URL_SAFE_NO_PAD.encode(self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({self})")
    }
}

impl FromStr for PublicKey {
    type Err = TransportError;

    fn from_str(text: &str) -> Result<Self, TransportError> {
        // Shortest bound first, so that a large text is not decoded to be refused.
        if text.len() != 43 {
            let detail = format!("a public key has 43 characters of base64url, this has {}", text.len());
            return Err(TransportError::bad_key(detail));
        }
        let mut bytes = [0; 32];
        match URL_SAFE_NO_PAD.decode_slice(text, &mut bytes) {
            Ok(32) => {
                let key = Self(bytes);
                key.check()?;
                Ok(key)
            }
            _ => Err(TransportError::bad_key("a public key has only the characters A-Z a-z 0-9 - _")),
        }
    }
}

fn load(path: &Path) -> Result<Option<DeviceKey>, TransportError> {
    let action = || format!("read the device key {}", path.display());
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(TransportError::io(action(), error)),
    };
    narrow_mode(path, &file);
    let mut pem = String::new();
    file.take(KEY_FILE_BYTES_MAX)
        .read_to_string(&mut pem)
        .map_err(|error| TransportError::io(action(), error))?;
    match DeviceKey::from_pem(&pem) {
        Ok(key) => Ok(Some(key)),
        Err(TransportError::BadKey { detail }) => {
            let detail =
                format!("{}: {detail}; restore the file, or move it away to get a new key", path.display());
            Err(TransportError::bad_key(detail))
        }
        Err(error) => Err(error),
    }
}

/// Stores a new file, complete or not at all. `false` if there is one already.
fn store_new(path: &Path, contents: &[u8]) -> Result<bool, TransportError> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let mut random = [0; 8];
    getrandom::fill(&mut random).map_err(|error| {
        TransportError::io("get random numbers from the system", io::Error::other(error.to_string()))
    })?;
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{:016x}.tmp", u64::from_le_bytes(random)));
    let temporary = Temporary(folder.join(name));

    let write = || -> io::Result<bool> {
        let mut options = OpenOptions::new();
        options.write(true).create_new(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let mut file = options.open(&temporary.0)?;
        file.write_all(contents)?;
        file.sync_all()?;
        // A link, unlike a rename, never replaces the key that another process stored meanwhile.
        match fs::hard_link(&temporary.0, path) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(false),
            // Some file systems have no links.
            Err(_) if path.try_exists()? => return Ok(false),
            Err(_) => fs::rename(&temporary.0, path)?,
        }
        #[cfg(unix)]
        File::open(folder)?.sync_all()?;
        Ok(true)
    };
    write().map_err(|error| TransportError::io(format!("store the device key {}", path.display()), error))
}

/// A file that is gone when this is dropped.
struct Temporary(PathBuf);

impl Drop for Temporary {
    fn drop(&mut self) {
        // Gone already if it was renamed; a leftover holds a key that nobody uses.
        let _ = fs::remove_file(&self.0);
    }
}

/// Best effort: a secret mounted read-only can't be narrowed and is no reason not to start.
#[cfg(unix)]
fn narrow_mode(path: &Path, file: &File) {
    use std::os::unix::fs::PermissionsExt;
    let is_wide = file.metadata().is_ok_and(|metadata| metadata.permissions().mode() & 0o077 != 0);
    if !is_wide {
        return;
    }
    let path = path.display();
    match file.set_permissions(fs::Permissions::from_mode(0o600)) {
        Ok(()) => {
            tracing::warn!(%path, "the device key was open to others than its owner; narrowed to mode 0600")
        }
        Err(error) => tracing::warn!(%path, %error, "the device key is open to others than its owner"),
    }
}

#[cfg(not(unix))]
fn narrow_mode(_path: &Path, _file: &File) {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_survive_the_way_through_seed_pem_and_text() {
        let key = DeviceKey::generate().unwrap();
        assert_eq!(DeviceKey::from_seed(&key.to_seed()).public(), key.public());
        let pem = key.to_pem().unwrap();
        assert!(pem.starts_with("-----BEGIN PRIVATE KEY-----"));
        assert_eq!(DeviceKey::from_pem(&pem).unwrap().to_seed(), key.to_seed());
        let text = key.public().to_string();
        assert_eq!(text.len(), 43);
        assert_eq!(text.parse::<PublicKey>().unwrap(), key.public());
    }

    #[test]
    fn a_key_made_by_openssl_is_read() {
        // RFC 8410, section 10.3.
        let pem = "-----BEGIN PRIVATE KEY-----\n\
                   MC4CAQAwBQYDK2VwBCIEINTuctv5E1hK1bbY8fdp+K06/nwoy/HU++CXqI9EdVhC\n\
                   -----END PRIVATE KEY-----\n";
        let public = DeviceKey::from_pem(pem).unwrap().public();
        assert_eq!(public.to_string(), "Gb9ECWmEzf6FQbrBZ9w7lshQhqowtrbLDFw4rXAxZuE");
    }

    #[test]
    fn a_private_key_is_never_shown() {
        let key = DeviceKey::from_seed(&[42; 32]);
        assert_eq!(format!("{key:?}"), format!("DeviceKey {{ public: PublicKey({}), .. }}", key.public()));
        let error = DeviceKey::from_pem("-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n-----END PRIVATE KEY-----");
        assert!(!error.unwrap_err().to_string().contains("c2VjcmV0"));
    }

    #[test]
    fn keys_that_prove_nothing_are_refused() {
        let mut identity = [0; 32];
        identity[0] = 1;
        // The same point as y = 3, written as p + 3.
        let mut second_name = [0xff; 32];
        (second_name[0], second_name[31]) = (0xf0, 0x7f);
        for bytes in [[0; 32], identity, second_name, [0xff; 32]] {
            let text = PublicKey(bytes).to_string();
            assert!(text.parse::<PublicKey>().is_err(), "{text}");
        }
        for text in ["", "AAAA", &"!".repeat(43), &"A".repeat(44)] {
            assert!(text.parse::<PublicKey>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_stored_key_is_found_again_and_only_its_owner_can_read_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("device.pem");
        let key = DeviceKey::load_or_create(&path).unwrap();
        assert_eq!(DeviceKey::load_or_create(&path).unwrap().public(), key.public());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "a temporary file is left");
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            let mode = || fs::metadata(&path).unwrap().permissions().mode() & 0o777;
            assert_eq!(mode(), 0o600);
            fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
            assert_eq!(DeviceKey::load_or_create(&path).unwrap().public(), key.public());
            assert_eq!(mode(), 0o600);
        }
    }

    #[test]
    fn a_damaged_key_file_is_reported_and_never_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("device.pem");
        fs::write(&path, "").unwrap();
        let error = DeviceKey::load_or_create(&path).unwrap_err();
        assert!(matches!(error, TransportError::BadKey { .. }), "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"");
        let error = DeviceKey::load_or_create(folder.path().join("missing/device.pem")).unwrap_err();
        assert!(matches!(error, TransportError::Io { .. }), "{error}");
    }

    #[test]
    fn processes_that_start_at_once_agree_on_one_key() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("device.pem");
        let keys: Vec<_> = std::thread::scope(|scope| {
            let start = || DeviceKey::load_or_create(&path).unwrap().public();
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(start)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(keys.iter().all(|key| *key == keys[0]));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
