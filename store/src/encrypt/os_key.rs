//! Keys of stores that the operating system keeps: Keychain on macOS, Credential Manager on
//! Windows, the Secret Service elsewhere (GNOME Keyring, KWallet, KeePassXC).

use anabranch_core::store::StoreError;
use keyring::Error;
use zeroize::Zeroizing;

use super::{StoreKey, draw};

const KEY_BYTES: usize = 32;

impl StoreKey {
    /// The key that the operating system's key store keeps for `account` of `service`; drawn at
    /// random and put there if it has none yet. A service is usually the app's reverse domain
    /// name (`org.example.workouts`), an account the directory or the user that the store is for.
    ///
    /// When this returns, the key store has given the key back. It may ask the user, and so may
    /// take as long as a user does: call it where blocking is allowed.
    ///
    /// An entry that was removed can't be told from one that never was: a new key is drawn, and
    /// opening the store it doesn't fit fails with [`StoreError::WrongKey`], which changes nothing.
    ///
    /// # Errors
    /// [`StoreError::Io`] if there is no key store, if it is locked or refuses, or if the entry is
    /// something else than a key. None of these draws a new key.
    pub fn from_os_key_store(service: &str, account: &str) -> Result<StoreKey, StoreError> {
        let refused = |what: String| StoreError::Io {
            operation: "ask the operating system's key store",
            cause: format!("{what} (service {service:?}, account {account:?})"),
        };
        if let Err(error) = keyring::Entry::store_status() {
            return Err(refused(format!("there is none that can be reached: {error}")));
        }
        let entry = keyring::Entry::new(service, account).map_err(|error| refused(error.to_string()))?;
        load_or_create(&entry.inner).map_err(refused)
    }
}

fn load_or_create(entry: &keyring_core::Entry) -> Result<StoreKey, String> {
    if let Some(key) = load(entry)? {
        return Ok(StoreKey::from_bytes(*key));
    }
    let mut key = Zeroizing::new([0; KEY_BYTES]);
    draw(key.as_mut_slice()).map_err(|error| error.to_string())?;
    entry.set_secret(key.as_slice()).map_err(|error| error.to_string())?;
    // A store that is encrypted by a key that nobody kept is lost.
    match load(entry)? {
        Some(kept) if kept == key => Ok(StoreKey::from_bytes(*kept)),
        _ => {
            Err("it took the new key, and gives another one back: is another process creating it? Try again"
                .into())
        }
    }
}

fn load(entry: &keyring_core::Entry) -> Result<Option<Zeroizing<[u8; KEY_BYTES]>>, String> {
    let secret = match entry.get_secret() {
        Ok(secret) => Zeroizing::new(secret),
        Err(Error::NoEntry) => return Ok(None),
        Err(error) => return Err(error.to_string()),
    };
    match <[u8; KEY_BYTES]>::try_from(secret.as_slice()) {
        Ok(key) => Ok(Some(Zeroizing::new(key))),
        Err(_) => Err(format!(
            "the entry has {} bytes, a key has {KEY_BYTES}: something else lies there",
            secret.len()
        )),
    }
}

#[cfg(test)]
mod tests {
    use keyring_core::mock;

    use super::*;

    fn entry() -> keyring_core::Entry {
        let store: std::sync::Arc<keyring_core::CredentialStore> = mock::Store::new().unwrap();
        store.build("org.example.workouts", "store", None).unwrap()
    }

    fn fails_next(entry: &keyring_core::Entry, error: Error) {
        entry.as_any().downcast_ref::<mock::Cred>().unwrap().set_error(error);
    }

    #[test]
    fn a_key_is_drawn_once_and_kept() {
        let (mine, other) = (entry(), entry());
        let key = load_or_create(&mine).unwrap();
        assert!(load_or_create(&mine).unwrap() == key);
        assert_eq!(mine.get_secret().unwrap().len(), KEY_BYTES);
        assert!(load_or_create(&other).unwrap() != key, "another store has another key");
    }

    #[test]
    fn a_locked_key_store_is_an_error_and_draws_nothing() {
        let entry = entry();
        fails_next(&entry, Error::NoStorageAccess("it is locked".into()));
        let error = load_or_create(&entry).unwrap_err();
        assert!(error.contains("it is locked"), "{error}");
        assert!(matches!(entry.get_secret(), Err(Error::NoEntry)));
    }

    #[test]
    #[ignore = "asks the key store of the person who runs it"]
    fn the_key_store_of_this_machine_keeps_a_key() {
        let (service, account) = ("org.anabranch.test", "a store of a test");
        let key = StoreKey::from_os_key_store(service, account).unwrap();
        let again = StoreKey::from_os_key_store(service, account).unwrap();
        keyring::Entry::new(service, account).unwrap().delete_credential().unwrap();
        assert!(again == key);
    }

    #[test]
    fn what_is_no_key_is_left_alone() {
        let entry = entry();
        entry.set_secret(b"a password").unwrap();
        let error = load_or_create(&entry).unwrap_err();
        assert!(error.contains("10 bytes"), "{error}");
        assert_eq!(entry.get_secret().unwrap(), b"a password");
    }
}
