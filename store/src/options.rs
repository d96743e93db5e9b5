//! How a store on disk is opened.

use crate::backend::BackendKind;
use crate::encrypt::StoreKey;

/// How a store on disk is opened.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct StoreOptions {
    /// What keeps the bytes. `None`, the default, takes what the directory has, and sled where
    /// a store is made. A directory that has another backend is refused.
    pub backend: Option<BackendKind>,
    /// The key or passphrase of an encrypted store; a new store is encrypted if one is given.
    /// `None`, the default, for a plain store. What does not fit the directory is refused.
    pub encryption: Option<StoreKey>,
    /// Bytes of memory for cached pages. 48 MB by default, which suits a device; a relay
    /// wants 512 MB or more.
    pub cache_bytes: u64,
    /// Commits are refused with [`StoreError::NoSpace`](crate::StoreError::NoSpace) while fewer
    /// bytes than this are free on the volume. 16 MiB by default, 4 MiB at least: it has to hold
    /// what is queued and what the backend rewrites.
    pub free_space_floor_bytes: u64,
    /// Whether opening checks every page, so that damage done while the store was closed is
    /// found before anything is read. On by default. sled does so in any case. redb reads its
    /// whole file for it; without the check it notices damage only where pages no longer make
    /// sense or a value fails its checksum, and [`DiskStore::verify`](crate::DiskStore::verify)
    /// has to find the rest.
    pub check_on_open: bool,
    /// Whether commits are synced. Only tests say no.
    #[cfg(any(test, feature = "contract"))]
    pub(crate) syncs: bool,
}

impl Default for StoreOptions {
    fn default() -> Self {
        StoreOptions {
            backend: None,
            encryption: None,
            cache_bytes: 48_000_000,
            free_space_floor_bytes: 16 << 20,
            check_on_open: true,
            #[cfg(any(test, feature = "contract"))]
            syncs: true,
        }
    }
}

impl StoreOptions {
    /// Sets [`StoreOptions::backend`].
    #[must_use]
    pub fn backend(mut self, kind: BackendKind) -> Self {
        self.backend = Some(kind);
        self
    }

    /// Sets [`StoreOptions::encryption`].
    #[must_use]
    pub fn encryption(mut self, key: StoreKey) -> Self {
        self.encryption = Some(key);
        self
    }

    /// Sets [`StoreOptions::cache_bytes`].
    #[must_use]
    pub fn cache_bytes(mut self, bytes: u64) -> Self {
        self.cache_bytes = bytes;
        self
    }

    /// Sets [`StoreOptions::free_space_floor_bytes`].
    #[must_use]
    pub fn free_space_floor_bytes(mut self, bytes: u64) -> Self {
        self.free_space_floor_bytes = bytes;
        self
    }

    /// Sets [`StoreOptions::check_on_open`].
    #[must_use]
    pub fn check_on_open(mut self, check: bool) -> Self {
        self.check_on_open = check;
        self
    }

    /// Leaves out the syncs of commits, so that a test of power loss can show that it would
    /// notice that. Such a store does not keep its word.
    #[cfg(any(test, feature = "contract"))]
    #[doc(hidden)]
    #[must_use]
    pub fn without_syncs_for_tests(mut self) -> Self {
        self.syncs = false;
        self
    }
}
