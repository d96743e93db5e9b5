//! Encryption at rest: a backend on top of another.
//!
//! **Values** are sealed with XChaCha20-Poly1305 under a random nonce, as
//! `nonce (24) ‖ ciphertext ‖ tag (16)`. Associated data are the version of this form and the
//! key under which the value is stored, which begins with the keyspace: a value that was moved
//! is not accepted.
//!
//! **Keys** are hidden as [`KeyForm`] says:
//! - `Secret`: the key is stored as `keyspace ‖ PRF(keyspace ‖ key)`, and the key itself in
//!   front of the value, inside the seal. Their order exists in memory only: all keys of these
//!   keyspaces are read when the store is opened.
//! - `Hashes`: each hash is replaced by a keyed permutation of it. Numbers behind the hashes
//!   stay, so that they keep their order on disk.
//!
//! How many entries of which length there are is not hidden.
//!
//! Both keys follow from the *data key*, which is random and lies, wrapped, in `KEY`; see
//! [`key_file`].

mod cipher;
mod hide;
mod key_file;
#[cfg(feature = "os-key-store")]
mod os_key;

use std::collections::BTreeSet;
use std::ops::Bound;
use std::sync::{Mutex, PoisonError, RwLock, RwLockReadGuard};

use anabranch_core::store::{KeyForm, Keyspace, StoreError};
use zeroize::Zeroizing;

use crate::backend::{Backend, Bytes, Change, Entries, Reader, Visit};
use crate::durability::lock;
use crate::keys::{KeyRange, successor};
use cipher::{Cipher, NONCE_BYTES};
use hide::Hider;
pub use key_file::StoreKey;
#[doc(hidden)]
pub use key_file::reread_key;
pub(crate) use key_file::{DataKey, FILE as KEY_FILE, create_data_key, load_data_key, rekey};

/// Version of the form of values and keys; part of what is authenticated.
const VERSION: u8 = 1;
/// Nonces drawn from the system at once.
const NONCES: usize = 128;

/// Fills `bytes` with randomness of the system.
pub(crate) fn draw(bytes: &mut [u8]) -> Result<(), StoreError> {
    getrandom::fill(bytes).map_err(|e| StoreError::Io { operation: "draw randomness", cause: e.to_string() })
}

/// See the [module](self).
pub(crate) struct Encrypted {
    inner: Box<dyn Backend>,
    cipher: Cipher,
    hider: Hider,
    nonces: Mutex<Vec<[u8; NONCE_BYTES]>>,
    /// The keys of all `Secret` keyspaces. Invariant: it has every key that is stored, before
    /// and after the group that is being written. A reader holds it from before it looks into
    /// the inner backend until it ends, so that to what one look of the inner backend shows it
    /// always has all keys; it may have keys that are not there.
    directory: RwLock<Directory>,
}

type Directory = BTreeSet<Bytes>;
type Bounds = (Bound<Bytes>, Bound<Bytes>);

impl Encrypted {
    /// Reads all keys that are kept in memory, and with them their values.
    pub(crate) fn open(inner: Box<dyn Backend>, key: &DataKey) -> Result<Encrypted, StoreError> {
        let value_key = Zeroizing::new(blake3::derive_key("anabranch 2026 store values v1", key.as_slice()));
        let encrypted = Encrypted {
            inner,
            cipher: Cipher::new(value_key),
            hider: Hider::new(key),
            nonces: Mutex::default(),
            directory: RwLock::default(),
        };
        let mut keys = Vec::new();
        {
            let reader = encrypted.inner.reader()?;
            for keyspace in (1..=u8::MAX).map(Keyspace).filter(|keyspace| is_secret(*keyspace)) {
                for entry in reader.range(&KeyRange::keyspace(keyspace), false)? {
                    let (stored_key, stored) = entry?;
                    keys.push(encrypted.secret_key(&stored_key, &stored)?);
                }
            }
        }
        // A set that is made of what is sorted is built without comparing each with the others.
        keys.sort_unstable();
        let directory = Directory::from_iter(keys);
        *encrypted.directory.write().unwrap_or_else(PoisonError::into_inner) = directory;
        Ok(encrypted)
    }

    fn seal(&self, stored_key: &[u8], parts: &[&[u8]]) -> Result<Bytes, StoreError> {
        let sealed = self.cipher.seal(&self.nonce()?, &associated(stored_key), parts);
        let refused = |_| StoreError::Io { operation: "encrypt", cause: "the value is too long".into() };
        Ok(sealed.map_err(refused)?.into())
    }

    fn open_value(&self, stored_key: &[u8], stored: &[u8]) -> Result<Vec<u8>, StoreError> {
        let refused = |_| StoreError::Damaged {
            what: format!(
                "a value can't be decrypted: keyspace {}, stored key {}",
                stored_key.first().unwrap_or(&0),
                hide::hex(stored_key.get(1..).unwrap_or_default()),
            ),
        };
        self.cipher.open(&associated(stored_key), stored).map_err(refused)
    }

    /// The key of an entry of a `Secret` keyspace, which is certainly what is stored there: also where the
    /// value was damaged behind it. Reading that value names the damage.
    fn secret_key(&self, stored_key: &[u8], stored: &[u8]) -> Result<Bytes, StoreError> {
        let belongs = |text: &[u8]| match split_secret(text) {
            Some((key, _)) if self.hider.secret(key) == *stored_key => Some(Bytes::from(key)),
            _ => None,
        };
        match self.open_value(stored_key, stored) {
            Ok(text) => belongs(&text).ok_or_else(moved),
            Err(damage) => {
                let text = self.cipher.unverified(stored).ok();
                // Nobody without the keys finds another text whose key is hidden like this one.
                let key = text.and_then(|text| belongs(&text)).ok_or_else(|| damage.clone())?;
                tracing::error!(%damage, "one value of the store is damaged");
                Ok(key)
            }
        }
    }

    /// The key and value of an entry of a `Secret` keyspace.
    fn open_secret(&self, stored_key: &[u8], stored: &[u8]) -> Result<(Vec<u8>, Bytes), StoreError> {
        let text = self.open_value(stored_key, stored)?;
        match split_secret(&text) {
            Some((key, value)) if self.hider.secret(key) == *stored_key => {
                Ok((key.to_vec(), Bytes::from(value)))
            }
            _ => Err(moved()),
        }
    }

    fn nonce(&self) -> Result<[u8; NONCE_BYTES], StoreError> {
        let mut nonces = lock(&self.nonces);
        if let Some(nonce) = nonces.pop() {
            return Ok(nonce);
        }
        let mut drawn = [0; NONCE_BYTES * NONCES];
        draw(&mut drawn)?;
        nonces.extend(drawn.as_chunks().0);
        nonces.pop().ok_or(StoreError::Io { operation: "draw randomness", cause: "nothing came".into() })
    }
}

/// The key and the value of the text of an entry of a `Secret` keyspace.
fn split_secret(text: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = text.split_first_chunk::<2>()?;
    rest.split_at_checked(usize::from(u16::from_be_bytes(*length)))
}

fn moved() -> StoreError {
    StoreError::Damaged { what: "an entry was stored under another key".into() }
}

fn associated(stored_key: &[u8]) -> Vec<u8> {
    [&[VERSION], stored_key].concat()
}

fn keyspace_of(key: &[u8]) -> Keyspace {
    Keyspace(key.first().copied().unwrap_or(0))
}

/// Whether keys of the keyspace are in the directory. The store's own two records have keys
/// that tell nothing.
fn is_secret(keyspace: Keyspace) -> bool {
    keyspace.0 != 0 && keyspace.key_form() == KeyForm::Secret
}

impl Backend for Encrypted {
    fn shows_unsynced(&self) -> bool {
        self.inner.shows_unsynced()
    }

    fn reader(&self) -> Result<Box<dyn Reader + '_>, StoreError> {
        // In this order; see the field.
        let directory = self.directory.read().unwrap_or_else(PoisonError::into_inner);
        let inner = self.inner.reader()?;
        Ok(Box::new(Look { store: self, inner, directory }))
    }

    fn apply(&self, changes: &[Change]) -> Result<(), StoreError> {
        let secret = |put: bool| {
            let of_kind = changes.iter().filter(move |change| change.stored.is_some() == put);
            of_kind.map(|change| &change.key).filter(|key| is_secret(keyspace_of(key)))
        };
        {
            let mut directory = self.directory.write().unwrap_or_else(PoisonError::into_inner);
            directory.extend(secret(true).cloned());
        }
        self.inner.apply(changes)?;
        let mut gone = secret(false).peekable();
        if gone.peek().is_some() {
            let mut directory = self.directory.write().unwrap_or_else(PoisonError::into_inner);
            for key in gone {
                directory.remove(key);
            }
        }
        Ok(())
    }

    fn sync(&self) -> Result<(), StoreError> {
        self.inner.sync()
    }

    fn stored(&self) -> &dyn Backend {
        &*self.inner
    }

    fn sealed(&self, key: Bytes, value: Option<Bytes>) -> Result<Change, StoreError> {
        let stored_key = Bytes::from(self.hider.hide(&key));
        let stored = match value {
            None => None,
            Some(value) if is_secret(keyspace_of(&key)) => {
                let length = u16::try_from(key.len()).map_err(|_| StoreError::TooLarge {
                    what: "key",
                    bytes: key.len(),
                    max_bytes: usize::from(u16::MAX),
                })?;
                Some(self.seal(&stored_key, &[&length.to_be_bytes(), &key, &value])?)
            }
            Some(value) => Some(self.seal(&stored_key, &[&value])?),
        };
        Ok(Change { key, stored_key, stored })
    }

    fn opened_entry(&self, key: &Bytes, stored: &Bytes) -> Result<(Bytes, Bytes), StoreError> {
        if is_secret(keyspace_of(key)) {
            let (key, value) = self.open_secret(key, stored)?;
            return Ok((key.into(), value));
        }
        Ok((self.hider.reveal(key).into(), self.open_value(key, stored)?.into()))
    }

    fn is_absent(&self, key: &[u8]) -> bool {
        let directory = || self.directory.read().unwrap_or_else(PoisonError::into_inner);
        is_secret(keyspace_of(key)) && !directory().contains(key)
    }

    fn verify(&self) -> Result<(), StoreError> {
        self.inner.verify()
    }

    fn trim(&self) -> Result<(), StoreError> {
        self.inner.trim()
    }

    fn disk_bytes(&self) -> u64 {
        self.inner.disk_bytes()
    }
}

/// A look at the current state.
struct Look<'a> {
    store: &'a Encrypted,
    inner: Box<dyn Reader + 'a>,
    directory: RwLockReadGuard<'a, Directory>,
}

impl Reader for Look<'_> {
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, StoreError> {
        let stored_key = self.store.hider.hide(key);
        let Some(stored) = self.inner.get(&stored_key)? else { return Ok(None) };
        let text = self.store.open_value(&stored_key, &stored)?;
        if !is_secret(keyspace_of(key)) {
            return Ok(Some(text.into()));
        }
        match split_secret(&text) {
            Some((found, value)) if found == key => Ok(Some(value.into())),
            _ => Err(moved()),
        }
    }

    fn range(&self, range: &KeyRange, descending: bool) -> Result<Entries<'_>, StoreError> {
        let keyspace = keyspace_of(&range.prefix);
        if is_secret(keyspace) {
            return Ok(Box::new(DirectoryRange::new(self, range, descending)));
        }
        match self.store.hider.hashes(&range.prefix) {
            Some(hashes) => self.behind_hashes(range, hashes, descending),
            None => self.sorted(range, keyspace, descending),
        }
    }

    fn walk(&self, visit: &mut Visit<'_>) -> Result<(), StoreError> {
        self.inner.walk(&mut |stored_key, stored| {
            let (key, value) = self.store.opened_entry(&stored_key.into(), &stored.into())?;
            visit(&key, &value)
        })
    }
}

impl Look<'_> {
    /// A range whose keys all have the same hashes, the first `hashes` bytes: behind them the
    /// order on disk is that of the keys.
    fn behind_hashes(
        &self,
        range: &KeyRange,
        hashes: usize,
        descending: bool,
    ) -> Result<Entries<'_>, StoreError> {
        let hider = &self.store.hider;
        let prefix = hider.hide(&range.prefix);
        let lower = hider.hide(&range.lower);
        let upper = match &range.upper {
            Some(upper) if upper.starts_with(&range.prefix) => Some(hider.hide(upper)),
            _ => successor(&prefix),
        };
        let real = range.prefix[..hashes].to_vec();
        let stored = self.inner.range(&KeyRange { prefix, lower, upper }, descending)?;
        Ok(Box::new(stored.map(move |entry| {
            let (stored_key, stored) = entry?;
            let value = self.store.open_value(&stored_key, &stored)?;
            Ok(([&real, &stored_key[hashes..]].concat().into(), value.into()))
        })))
    }

    /// Any other range: the keys of the whole keyspace are read and put in order.
    fn sorted(
        &self,
        range: &KeyRange,
        keyspace: Keyspace,
        descending: bool,
    ) -> Result<Entries<'_>, StoreError> {
        let mut keys = Vec::new();
        for entry in self.inner.range(&KeyRange::keyspace(keyspace), false)? {
            let key = self.store.hider.reveal(&entry?.0);
            if range.lower <= key && range.upper.as_ref().is_none_or(|upper| key < *upper) {
                keys.push(key);
            }
        }
        keys.sort_unstable();
        if descending {
            keys.reverse();
        }
        let entries = keys.into_iter().filter_map(|key| {
            let value = self.get(&key).transpose()?;
            Some(value.map(|value| (key.into(), value)))
        });
        Ok(Box::new(entries))
    }
}

/// The entries of a range of a `Secret` keyspace. Keys are taken from the directory in growing
/// portions: finding the place where the last one ended takes as long as several keys.
struct DirectoryRange<'a> {
    look: &'a Look<'a>,
    rest: Bounds,
    descending: bool,
    portion: std::vec::IntoIter<Bytes>,
    portion_keys: usize,
}

const PORTION_KEYS_MIN: usize = 4;
const PORTION_KEYS_MAX: usize = 256;

impl<'a> DirectoryRange<'a> {
    fn new(look: &'a Look<'a>, range: &KeyRange, descending: bool) -> Self {
        let portion = Vec::new().into_iter();
        DirectoryRange { look, rest: range.bounds(), descending, portion, portion_keys: PORTION_KEYS_MIN }
    }

    fn next_key(&mut self) -> Option<Bytes> {
        if let Some(key) = self.portion.next() {
            return Some(key);
        }
        // Ordered sets panic where the start lies behind the end, as it does at the end.
        if let (Bound::Included(lower) | Bound::Excluded(lower), Bound::Excluded(upper)) = &self.rest
            && lower >= upper
        {
            return None;
        }
        let rest = self.look.directory.range::<Bytes, _>(self.rest.clone());
        let portion: Vec<Bytes> = if self.descending {
            rest.rev().take(self.portion_keys).cloned().collect()
        } else {
            rest.take(self.portion_keys).cloned().collect()
        };
        self.portion_keys = (2 * self.portion_keys).min(PORTION_KEYS_MAX);
        let passed = Bound::Excluded(Bytes::clone(portion.last()?));
        if self.descending {
            self.rest.1 = passed;
        } else {
            self.rest.0 = passed;
        }
        self.portion = portion.into_iter();
        self.portion.next()
    }
}

impl Iterator for DirectoryRange<'_> {
    type Item = Result<(Bytes, Bytes), StoreError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let key = self.next_key()?;
            match self.look.get(&key) {
                Ok(Some(value)) => return Some(Ok((key, value))),
                Ok(None) => {}
                Err(e) => return Some(Err(e)),
            }
        }
    }
}
