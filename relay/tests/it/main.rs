//! A whole relay: sockets, disk, clock. What is tested here is that the parts are joined
//! rightly; what the relay decides is tested in core, without any of them.

// The helpers below are tests as much as what calls them.
#![allow(clippy::unwrap_used)]

mod device;
mod disturbances;
mod running;
mod siege;
mod tokens;

use std::time::Duration;

use anabranch_relay::{MintOptions, RelayDaemon, RelayHandle, RelayOptions, mint_token};

/// A relay in a directory of its own, listening on a port of the system's choice.
struct Bench {
    folder: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    fn dir(&self) -> std::path::PathBuf {
        self.folder.path().join("relay")
    }

    fn options(&self) -> RelayOptions {
        RelayOptions::dev().data(self.dir()).listen("127.0.0.1:0")
    }

    async fn start(&self) -> RelayHandle {
        RelayDaemon::start(self.options()).await.unwrap()
    }

    fn token(&self, workspace: &str, user: &str) -> String {
        mint_token(&self.dir(), &MintOptions::new(workspace, user)).unwrap().token
    }
}

/// Fails rather than hangs.
async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(20), what).await.expect("it took too long")
}
