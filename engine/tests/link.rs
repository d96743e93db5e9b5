//! Links that end, tokens that are refused, relays that go away: an engine comes back by
//! itself, and does not hammer at what turns it away.

#![expect(clippy::unwrap_used, reason = "a test says what is wrong by panicking")]

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use anabranch::{
    Edit, Engine, EngineBuilder, EntityKey, Expect, Intent, SyncOutcome, SyncState, TokenSource,
};
use anabranch_core::wire::{
    CaughtUp, Fault, FaultCode, Grant, GrantRole, Granted, MESSAGE_BYTES_MAX, Message, SchemaIs, Welcome,
};
use anabranch_relay::{MintOptions, RelayDaemon, RelayHandle, RelayOptions, mint_token};
use anabranch_transport::{DeviceKey, Endpoint, Limits};
use serde_json::json;

const SCHEMA: &str = "[task]\nversion = 1\n[task.fields]\ntitle = { type = \"string\" }\n";
const PATIENCE: Duration = Duration::from_secs(20);

fn builder(dir: &Path, url: &str) -> EngineBuilder {
    Engine::builder(dir).schema_source(SCHEMA, "schema.toml").unwrap().relay(url)
}

async fn relay(dir: &Path) -> RelayHandle {
    RelayDaemon::start(RelayOptions::dev().data(dir.join("relay")).listen("127.0.0.1:0")).await.unwrap()
}

fn token(dir: &Path, user: &str) -> String {
    mint_token(&dir.join("relay"), &MintOptions::new("home", user).role(GrantRole::Writer)).unwrap().token
}

fn task(id: &str) -> Edit {
    let intents = vec![Intent::Set { field: "title".into(), value: json!(id) }];
    Edit { key: EntityKey::new("task", id).unwrap(), intents, based_on: None, expect: Expect::Any }
}

async fn until(what: impl Fn() -> bool) {
    let waiting = async {
        while !what() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, waiting).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_workspace_opened_on_a_standing_link_knows_the_relays_clock() {
    const YEAR_MS: i64 = 365 * 24 * 60 * 60 * 1000;
    let dir = tempfile::tempdir().unwrap();
    let relay = relay(dir.path()).await;
    let engine = builder(&dir.path().join("late"), &relay.url().to_string())
        .token(token(dir.path(), "late"))
        .clock_offset_ms(YEAR_MS)
        .open()
        .await
        .unwrap();
    // Long enough for the handshake.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let workspace = engine.workspace("home").await.unwrap();
    workspace.write(vec![task("t")]).await.unwrap();
    until(|| workspace.status().state == SyncState::UpToDate && workspace.status().pending == 0).await;
    assert!(workspace.refused().await.unwrap().is_empty());
    assert!((workspace.status().clock_skew_ms - YEAR_MS).abs() < 60_000, "{:?}", workspace.status());
    assert!(workspace.get("task", "t").await.unwrap().is_some());
}
