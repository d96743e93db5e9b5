//! The file `KEY`: the data key of an encrypted store, wrapped by the caller's key or by one
//! that a passphrase gives. Another key or passphrase means another `KEY` and nothing else.
//!
//! The file has two equal slots of 4096 bytes, so that damage to one loses nothing:
//!
//! | bytes | |
//! |---|---|
//! | 8 | `anabkey1` |
//! | 1 | 1: the caller's 32 bytes; 2: a passphrase through argon2id |
//! | 3 × 4 | argon2id: memory in KiB, passes, lanes; zeros for the caller's bytes |
//! | 16 | salt |
//! | 24 | nonce |
//! | 48 | the data key, sealed with XChaCha20-Poly1305; what is before the nonce is authenticated |
//! | 4 | CRC-32 of all this, so that damage can be told from a wrong key |
//!
//! Numbers are big-endian.

use std::fmt;
use std::fs;
use std::io::Read as _;
use std::path::Path;

use anabranch_core::store::StoreError;
use argon2::{Algorithm, Argon2, Params};
use zeroize::Zeroizing;

use super::cipher::{Cipher, NONCE_BYTES, TAG_BYTES};
use super::draw;
use crate::files::{io_error, replace};

/// The random key from which those for values and keys follow.
pub(crate) type DataKey = Zeroizing<[u8; 32]>;

pub(crate) const FILE: &str = "KEY";
const MAGIC: [u8; 8] = *b"anabkey1";
const SLOT_BYTES: usize = 4096;
const SALT_BYTES: usize = 16;
const HEAD_BYTES: usize = 8 + 1 + 12 + SALT_BYTES;
const WRAPPED_BYTES: usize = NONCE_BYTES + 32 + TAG_BYTES;
const RECORD_BYTES: usize = HEAD_BYTES + WRAPPED_BYTES + 4;

/// A passphrase or a key is shorter; anything longer is another file.
const SECRET_FILE_BYTES_MAX: usize = 4096;

/// Fewer characters are guessed soon, whatever they go through.
const PASSPHRASE_BYTES_MIN: usize = 8;

/// What unlocks an encrypted store: 32 bytes that the caller keeps, or a passphrase.
///
/// The bytes are wiped from memory when the last clone is dropped, and [`fmt::Debug`] doesn't
/// show them.
#[derive(Clone, PartialEq, Eq)]
pub struct StoreKey(Secret);

#[derive(Clone, PartialEq, Eq)]
enum Secret {
    Raw(Zeroizing<[u8; 32]>),
    Passphrase(Zeroizing<String>),
}

impl StoreKey {
    /// 32 bytes from a good source of randomness, or from the operating system's key store.
    pub fn from_bytes(key: [u8; 32]) -> StoreKey {
        StoreKey(Secret::Raw(Zeroizing::new(key)))
    }

    /// A passphrase, of at least eight bytes where it is set. It goes through argon2id (64 MiB,
    /// three passes, four lanes: the second recommendation of RFC 9106), which takes a few
    /// hundred milliseconds each time a store is opened.
    pub fn from_passphrase(passphrase: impl Into<String>) -> StoreKey {
        StoreKey(Secret::Passphrase(Zeroizing::new(passphrase.into())))
    }

    /// Refuses what a store can't be given as its key: a passphrase that is too short.
    pub fn check_new(&self) -> Result<(), StoreError> {
        match &self.0 {
            Secret::Passphrase(passphrase) if passphrase.len() < PASSPHRASE_BYTES_MIN => {
                Err(StoreError::Io {
                    operation: "set a passphrase",
                    cause: format!("it needs at least {PASSPHRASE_BYTES_MIN} bytes"),
                })
            }
            _ => Ok(()),
        }
    }

    /// A passphrase from a file: its text without the line end. At most 4096 bytes.
    pub fn from_passphrase_file(path: impl AsRef<Path>) -> Result<StoreKey, StoreError> {
        let mut text = read_secret(path.as_ref())?;
        if text.ends_with('\n') {
            text.pop();
            if text.ends_with('\r') {
                text.pop();
            }
        }
        Ok(StoreKey(Secret::Passphrase(text)))
    }

    /// A key from a file: 64 hexadecimal digits, and a line end or not.
    pub fn from_key_file(path: impl AsRef<Path>) -> Result<StoreKey, StoreError> {
        let text = read_secret(path.as_ref())?;
        let digits = text.trim_end().as_bytes();
        let mut key = Zeroizing::new([0; 32]);
        let complete = digits.len() == 2 * key.len()
            && digits.chunks(2).zip(key.iter_mut()).all(|(pair, byte)| {
                let pair = std::str::from_utf8(pair).ok().filter(|pair| !pair.starts_with('+'));
                pair.and_then(|pair| u8::from_str_radix(pair, 16).ok()).map(|n| *byte = n).is_some()
            });
        if !complete {
            let cause = format!("{}: it has to be 64 hexadecimal digits", path.as_ref().display());
            return Err(StoreError::Io { operation: "read a key", cause });
        }
        Ok(StoreKey(Secret::Raw(key)))
    }
}

/// Reads a small file that holds a secret.
fn read_secret(path: &Path) -> Result<Zeroizing<String>, StoreError> {
    let refused = |cause: String| StoreError::Io {
        operation: "read a key",
        cause: format!("{}: {cause}", path.display()),
    };
    // All of it is reserved at once: what grows leaves copies behind.
    let mut text = Zeroizing::new(String::with_capacity(SECRET_FILE_BYTES_MAX + 1));
    let file = fs::File::open(path).map_err(|e| refused(e.to_string()))?;
    let read = file.take(SECRET_FILE_BYTES_MAX as u64 + 1).read_to_string(&mut text);
    match read.map_err(|e| refused(e.to_string()))? {
        0 => Err(refused("it is empty".into())),
        bytes if bytes > SECRET_FILE_BYTES_MAX => {
            Err(refused(format!("it has more than {SECRET_FILE_BYTES_MAX} bytes")))
        }
        _ => Ok(text),
    }
}

impl fmt::Debug for StoreKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match &self.0 {
            Secret::Raw(_) => "StoreKey(bytes)",
            Secret::Passphrase(_) => "StoreKey(passphrase)",
        })
    }
}

/// Draws the data key of a new store and writes `KEY`, durably.
pub(crate) fn create_data_key(dir: &Path, key: &StoreKey) -> Result<DataKey, StoreError> {
    let mut data_key = DataKey::new([0; 32]);
    draw(data_key.as_mut_slice())?;
    save(dir, key, &data_key)?;
    Ok(data_key)
}

/// The data key of a store.
///
/// # Errors
/// [`StoreError::WrongKey`], or [`StoreError::Damaged`] if `KEY` is missing or can't be read.
pub(crate) fn load_data_key(dir: &Path, key: &StoreKey) -> Result<DataKey, StoreError> {
    let file = match fs::read(dir.join(FILE)) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            let what = "the file KEY is missing, without which nothing can be read; put it back".into();
            return Err(StoreError::Damaged { what });
        }
        Err(e) => return Err(io_error("read KEY")(e)),
    };
    let record = Record::first(&file).ok_or_else(|| StoreError::Damaged {
        what: "the file KEY is damaged, without which nothing can be read; put a copy of it back".into(),
    })?;
    record.unwrap(dir, key)
}

/// Reads bytes as the file `KEY` and writes the slot that was understood, for tests of hostile input.
/// A key of 32 bytes is tried on it; a passphrase is not, which takes as long as the file says.
#[doc(hidden)]
pub fn reread_key(file: &[u8]) -> Option<Vec<u8>> {
    let record = Record::first(file)?;
    let _ = record.unwrap(Path::new(""), &StoreKey::from_bytes([1; 32]));
    Some(record.encode().to_vec())
}

/// See [`rekey`](crate::rekey).
pub(crate) fn rekey(dir: &Path, old: &StoreKey, new: &StoreKey) -> Result<(), StoreError> {
    let data_key = load_data_key(dir, old)?;
    save(dir, new, &data_key)
}

fn save(dir: &Path, key: &StoreKey, data_key: &DataKey) -> Result<(), StoreError> {
    let slot = Record::wrap(key, data_key)?.encode();
    let mut file = vec![0; 2 * SLOT_BYTES];
    file[..RECORD_BYTES].copy_from_slice(&slot);
    file[SLOT_BYTES..SLOT_BYTES + RECORD_BYTES].copy_from_slice(&slot);
    replace(dir, FILE, &file).map_err(io_error("write KEY"))
}

/// How the wrapping key comes about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Raw,
    Argon2id { memory_kib: u32, passes: u32, lanes: u32 },
}

impl Kind {
    const PASSPHRASE: Kind = Kind::Argon2id { memory_kib: 64 << 10, passes: 3, lanes: 4 };

    fn encode(self) -> [u8; 13] {
        let (code, numbers) = match self {
            Kind::Raw => (1, [0; 3]),
            Kind::Argon2id { memory_kib, passes, lanes } => (2, [memory_kib, passes, lanes]),
        };
        let mut out = [0; 13];
        out[0] = code;
        for (place, number) in numbers.into_iter().enumerate() {
            out[1 + 4 * place..5 + 4 * place].copy_from_slice(&number.to_be_bytes());
        }
        out
    }

    /// `None` beyond 1 GiB, 64 passes or 16 lanes: a file must not make a program use more.
    fn decode(bytes: &[u8; 13]) -> Option<Kind> {
        let number = |place: usize| bytes[1 + 4 * place..].first_chunk().map(|b| u32::from_be_bytes(*b));
        match bytes[0] {
            1 => Some(Kind::Raw),
            2 => {
                let (memory_kib, passes, lanes) = (number(0)?, number(1)?, number(2)?);
                let bounded = memory_kib <= 1 << 20 && passes <= 64 && lanes <= 16;
                bounded.then_some(Kind::Argon2id { memory_kib, passes, lanes })
            }
            _ => None,
        }
    }
}

struct Record {
    kind: Kind,
    salt: [u8; SALT_BYTES],
    /// Nonce, data key and tag.
    wrapped: [u8; WRAPPED_BYTES],
}

impl Record {
    fn wrap(key: &StoreKey, data_key: &DataKey) -> Result<Record, StoreError> {
        key.check_new()?;
        let kind = match &key.0 {
            Secret::Raw(_) => Kind::Raw,
            Secret::Passphrase(_) => Kind::PASSPHRASE,
        };
        let (mut salt, mut nonce) = ([0; SALT_BYTES], [0; NONCE_BYTES]);
        draw(&mut salt)?;
        draw(&mut nonce)?;
        let wrapping = wrapping_key(&key.0, kind, &salt)?;
        let wrapped = Cipher::new(wrapping).seal(&nonce, &head(kind, &salt), &[data_key.as_slice()]);
        let wrapped = wrapped.ok().and_then(|wrapped| wrapped.try_into().ok());
        let wrapped = wrapped
            .ok_or_else(|| StoreError::Io { operation: "wrap the key", cause: "encryption failed".into() })?;
        Ok(Record { kind, salt, wrapped })
    }

    fn unwrap(&self, dir: &Path, key: &StoreKey) -> Result<DataKey, StoreError> {
        let wrong = |why| StoreError::WrongKey { dir: dir.display().to_string(), why };
        match (&key.0, self.kind) {
            (Secret::Raw(_), Kind::Argon2id { .. }) => return Err(wrong("it has a passphrase")),
            (Secret::Passphrase(_), Kind::Raw) => {
                return Err(wrong("it has a key of 32 bytes, not a passphrase"));
            }
            (Secret::Raw(_), Kind::Raw) | (Secret::Passphrase(_), Kind::Argon2id { .. }) => {}
        }
        let wrapping = wrapping_key(&key.0, self.kind, &self.salt)?;
        let opened = Cipher::new(wrapping).open(&head(self.kind, &self.salt), &self.wrapped);
        let opened = Zeroizing::new(opened.map_err(|_| wrong("what was given does not unlock it"))?);
        let mut data_key = DataKey::new([0; 32]);
        data_key.copy_from_slice(&opened);
        Ok(data_key)
    }

    fn encode(&self) -> [u8; RECORD_BYTES] {
        let body = [&head(self.kind, &self.salt)[..], &self.wrapped].concat();
        let mut out = [0; RECORD_BYTES];
        out[..body.len()].copy_from_slice(&body);
        out[body.len()..].copy_from_slice(&crc32fast::hash(&body).to_be_bytes());
        out
    }

    /// That of the first slot that can be trusted.
    fn first(file: &[u8]) -> Option<Record> {
        file.chunks(SLOT_BYTES).take(2).find_map(Record::decode)
    }

    fn decode(slot: &[u8]) -> Option<Record> {
        let (body, sum) = slot.get(..RECORD_BYTES)?.split_last_chunk::<4>()?;
        if *sum != crc32fast::hash(body).to_be_bytes() {
            return None;
        }
        let (magic, rest) = body.split_first_chunk::<8>()?;
        let (kind, rest) = rest.split_first_chunk::<13>()?;
        let (salt, wrapped) = rest.split_first_chunk()?;
        if *magic != MAGIC {
            return None;
        }
        Some(Record { kind: Kind::decode(kind)?, salt: *salt, wrapped: wrapped.try_into().ok()? })
    }
}

fn head(kind: Kind, salt: &[u8; SALT_BYTES]) -> [u8; HEAD_BYTES] {
    let mut out = [0; HEAD_BYTES];
    out[..8].copy_from_slice(&MAGIC);
    out[8..21].copy_from_slice(&kind.encode());
    out[21..].copy_from_slice(salt);
    out
}

fn wrapping_key(
    secret: &Secret,
    kind: Kind,
    salt: &[u8; SALT_BYTES],
) -> Result<Zeroizing<[u8; 32]>, StoreError> {
    match (secret, kind) {
        (Secret::Passphrase(passphrase), Kind::Argon2id { memory_kib, passes, lanes }) => {
            let refused = |e: argon2::Error| StoreError::Damaged { what: format!("the file KEY: {e}") };
            let params = Params::new(memory_kib, passes, lanes, Some(32)).map_err(refused)?;
            let mut out = Zeroizing::new([0; 32]);
            Argon2::new(Algorithm::Argon2id, argon2::Version::V0x13, params)
                .hash_password_into(passphrase.as_bytes(), salt, out.as_mut_slice())
                .map_err(refused)?;
            Ok(out)
        }
        (Secret::Raw(key), _) => {
            Ok(Zeroizing::new(blake3::derive_key("anabranch 2026 store key wrapping v1", key.as_slice())))
        }
        (Secret::Passphrase(_), Kind::Raw) => Err(StoreError::Io {
            operation: "unwrap the key",
            cause: "a passphrase has to go through argon2id".into(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raw(n: u8) -> StoreKey {
        StoreKey::from_bytes([n; 32])
    }

    #[test]
    fn the_key_unlocks_and_nothing_else_does() {
        let dir = tempfile::tempdir().unwrap();
        let data_key = create_data_key(dir.path(), &raw(1)).unwrap();
        let file = fs::read(dir.path().join(FILE)).unwrap();
        assert_eq!(load_data_key(dir.path(), &raw(1)).unwrap(), data_key);
        for wrong in [raw(2), StoreKey::from_passphrase("correct horse")] {
            assert!(matches!(load_data_key(dir.path(), &wrong), Err(StoreError::WrongKey { .. })));
            assert!(matches!(rekey(dir.path(), &wrong, &raw(3)), Err(StoreError::WrongKey { .. })));
        }
        assert_eq!(fs::read(dir.path().join(FILE)).unwrap(), file, "a wrong key changed something");

        rekey(dir.path(), &raw(1), &StoreKey::from_passphrase("correct horse")).unwrap();
        assert_eq!(load_data_key(dir.path(), &StoreKey::from_passphrase("correct horse")).unwrap(), data_key);
        for wrong in [raw(1), StoreKey::from_passphrase("battery staple")] {
            assert!(matches!(load_data_key(dir.path(), &wrong), Err(StoreError::WrongKey { .. })));
        }
    }

    #[test]
    fn a_short_passphrase_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let error = create_data_key(dir.path(), &StoreKey::from_passphrase("short")).unwrap_err();
        assert!(error.to_string().contains("at least 8 bytes"), "{error}");
        assert!(!dir.path().join(FILE).exists());
    }

    #[test]
    fn damage_to_one_slot_loses_nothing_and_damage_to_both_is_no_wrong_key() {
        let dir = tempfile::tempdir().unwrap();
        let data_key = create_data_key(dir.path(), &raw(1)).unwrap();
        let path = dir.path().join(FILE);
        let good = fs::read(&path).unwrap();
        for at in 0..RECORD_BYTES {
            let mut file = good.clone();
            file[at] ^= 1;
            fs::write(&path, &file).unwrap();
            assert_eq!(load_data_key(dir.path(), &raw(1)).unwrap(), data_key);
            file[SLOT_BYTES + at] ^= 1;
            fs::write(&path, &file).unwrap();
            assert!(matches!(load_data_key(dir.path(), &raw(1)), Err(StoreError::Damaged { .. })));
        }
        fs::remove_file(&path).unwrap();
        assert!(matches!(load_data_key(dir.path(), &raw(1)), Err(StoreError::Damaged { .. })));
    }

    #[test]
    fn a_file_that_asks_for_a_terabyte_is_refused_before_anything_is_allocated() {
        let dir = tempfile::tempdir().unwrap();
        let key = StoreKey::from_passphrase("correct horse");
        create_data_key(dir.path(), &key).unwrap();
        let path = dir.path().join(FILE);
        let good = fs::read(&path).unwrap();
        for (place, number) in [(0, 1_u32 << 30), (1, 65), (2, 17), (0, u32::MAX)] {
            let mut slot = good[..RECORD_BYTES].to_vec();
            slot[9 + 4 * place..13 + 4 * place].copy_from_slice(&number.to_be_bytes());
            let sum = crc32fast::hash(&slot[..RECORD_BYTES - 4]);
            slot[RECORD_BYTES - 4..].copy_from_slice(&sum.to_be_bytes());
            fs::write(&path, slot).unwrap();
            assert!(matches!(load_data_key(dir.path(), &key), Err(StoreError::Damaged { .. })));
        }
    }

    #[test]
    fn keys_and_passphrases_come_from_files() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("secret");
        for text in ["correct horse", "correct horse\n", "correct horse\r\n"] {
            fs::write(&path, text).unwrap();
            let read = StoreKey::from_passphrase_file(&path).unwrap();
            assert!(read == StoreKey::from_passphrase("correct horse"), "{text:?}");
        }
        fs::write(&path, "0a".repeat(32) + "\n").unwrap();
        assert!(StoreKey::from_key_file(&path).unwrap() == StoreKey::from_bytes([10; 32]));
        for text in ["0a".repeat(31), "0a".repeat(33), "+a".repeat(32), "zz".repeat(32), String::new()] {
            fs::write(&path, text).unwrap();
            let error = StoreKey::from_key_file(&path).unwrap_err().to_string();
            assert!(error.contains("secret: it "), "{error}");
        }
        fs::write(&path, "x".repeat(SECRET_FILE_BYTES_MAX + 1)).unwrap();
        assert!(StoreKey::from_passphrase_file(&path).is_err());
        assert!(StoreKey::from_passphrase_file(dir.path().join("none")).is_err());
    }

    #[test]
    fn secrets_are_not_shown() {
        let shown = format!("{:?} {:?}", raw(9), StoreKey::from_passphrase("correct horse"));
        assert_eq!(shown, "StoreKey(bytes) StoreKey(passphrase)");
    }
}
