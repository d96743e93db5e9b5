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

#[tokio::test(flavor = "multi_thread")]
async fn after_signing_in_again_the_next_sync_is_whole() {
    let dir = tempfile::tempdir().unwrap();
    let relay = relay(dir.path()).await;
    let good = token(dir.path(), "phone");
    for background in [false, true] {
        let signed_in = Arc::new(AtomicBool::new(false));
        let source = {
            let (signed_in, good, asked) = (signed_in.clone(), good.clone(), AtomicBool::new(false));
            TokenSource::callback(move || {
                let answer = match (signed_in.load(Ordering::Relaxed), asked.swap(true, Ordering::Relaxed)) {
                    (true, _) => Ok(good.clone()),
                    (false, false) => Ok("x.y.z".to_owned()),
                    (false, true) => Err("nobody is signed in".to_owned()),
                };
                async move { answer }
            })
        };
        let engine = builder(&dir.path().join(format!("phone-{background}")), &relay.url().to_string())
            .token(source)
            .background_sync(background)
            .open()
            .await
            .unwrap();
        let workspace = engine.workspace("home").await.unwrap();
        workspace.write(vec![task("t")]).await.unwrap();
        assert_eq!(workspace.sync(PATIENCE).await.unwrap().outcome, SyncOutcome::Auth);
        signed_in.store(true, Ordering::Relaxed);
        let report = workspace.sync(PATIENCE).await.unwrap();
        assert_eq!(
            (report.outcome, report.pending),
            (SyncOutcome::Complete, 0),
            "{background} {:?}",
            report.error
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_app_is_not_asked_for_tokens_without_end() {
    let dir = tempfile::tempdir().unwrap();
    let relay = relay(dir.path()).await;
    let good = token(dir.path(), "phone");
    for fails in [false, true] {
        let asked = Arc::new(AtomicUsize::new(0));
        let signed_in = Arc::new(AtomicBool::new(false));
        let source = {
            let (asked, signed_in, good) = (asked.clone(), signed_in.clone(), good.clone());
            TokenSource::callback(move || {
                let first = asked.fetch_add(1, Ordering::Relaxed) == 0;
                let answer = match (signed_in.load(Ordering::Relaxed), fails && !first) {
                    (true, _) => Ok(good.clone()),
                    (false, true) => Err("nobody is signed in".to_owned()),
                    (false, false) => Ok("x.y.z".to_owned()),
                };
                async move { answer }
            })
        };
        let engine = builder(&dir.path().join(format!("phone-{fails}")), &relay.url().to_string())
            .token(source)
            .open()
            .await
            .unwrap();
        let workspace = engine.workspace("home").await.unwrap();
        tokio::time::sleep(Duration::from_secs(2)).await;
        let times = asked.load(Ordering::Relaxed);
        assert!((2..10).contains(&times), "asked {times} times in two seconds");
        // And by itself it goes on when somebody has signed in.
        signed_in.store(true, Ordering::Relaxed);
        until(|| workspace.status().state == SyncState::UpToDate).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sync_without_time_ends() {
    let dir = tempfile::tempdir().unwrap();
    let url = format!("quic://127.0.0.1:9#{}", DeviceKey::generate().unwrap().public());
    let engine = builder(dir.path(), &url).background_sync(false).open().await.unwrap();
    let workspace = engine.workspace("home").await.unwrap();
    for _ in 0..200 {
        let report = tokio::time::timeout(PATIENCE, workspace.sync(Duration::ZERO)).await.unwrap().unwrap();
        assert_eq!(report.outcome, SyncOutcome::Offline);
    }
}

/// A relay that answers each message of a connection as it is told.
async fn relay_of(
    answer: impl Fn(usize, Message) -> Vec<Message> + Send + Sync + 'static,
) -> (String, Arc<AtomicUsize>) {
    let key = DeviceKey::generate().unwrap();
    let endpoint = Endpoint::bind("127.0.0.1:0".parse().unwrap(), &key, Limits::default()).unwrap();
    let url = format!("quic://{}#{}", endpoint.local_addr().unwrap(), endpoint.key());
    let connections = Arc::new(AtomicUsize::new(0));
    let (count, answer) = (connections.clone(), Arc::new(answer));
    tokio::spawn(async move {
        while let Some(connection) = endpoint.accept().await {
            let number = count.fetch_add(1, Ordering::Relaxed);
            let answer = answer.clone();
            tokio::spawn(async move {
                let (mut sender, mut receiver) = connection.accept_control().await.unwrap();
                receiver.raise_limit(MESSAGE_BYTES_MAX);
                while let Ok(Some(bytes)) = receiver.next().await {
                    for message in answer(number, Message::decode(&bytes).unwrap().unwrap()) {
                        sender.send(message.encode()).await.unwrap();
                    }
                }
            });
        }
    });
    (url, connections)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_that_turns_all_away_is_left_in_peace() {
    let (url, connections) = relay_of(|_, _| {
        let fault = Fault { channel: None, code: FaultCode::Internal as u16, message: "not today".into() };
        vec![fault.into()]
    })
    .await;
    let dir = tempfile::tempdir().unwrap();
    let _engine = builder(dir.path(), &url).open().await.unwrap();
    tokio::time::sleep(Duration::from_secs(2)).await;
    let times = connections.load(Ordering::Relaxed);
    assert!((1..8).contains(&times), "{times} connections in two seconds");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unanswered_question_for_the_schema_takes_no_later_answer() {
    let (url, _) = relay_of(|_, message| match message {
        Message::Hello(hello) => vec![
            Welcome {
                version: 1,
                software: "test".into(),
                wall_ms: hello.wall_ms,
                features_required: 0,
                features: 0,
            }
            .into(),
        ],
        Message::SignIn(asked) => {
            let grant = Grant {
                workspace: asked.workspace,
                device: [1; 32],
                user: "ada".into(),
                role: GrantRole::Writer.code(),
                types: Vec::new(),
                not_before_ms: 0,
                not_after_ms: u64::MAX,
                serial: 1,
            };
            vec![
                Granted {
                    channel: asked.channel,
                    grant,
                    schema: [1; 32],
                    behind: false,
                    incarnation: 0,
                    epoch: [1; 16],
                }
                .into(),
            ]
        }
        Message::Open(asked) => vec![
            CaughtUp {
                channel: asked.channel,
                epoch: [1; 16],
                cursor: asked.cursor,
                digest: asked.digest,
            }
            .into(),
        ],
        Message::FetchSchema(asked) => {
            static TIMES: AtomicUsize = AtomicUsize::new(0);
            if TIMES.fetch_add(1, Ordering::Relaxed) == 0 {
                return Vec::new();
            }
            let source = Some("two".to_owned());
            vec![SchemaIs { channel: asked.channel, hash: [1; 32], source, problems: Vec::new() }.into()]
        }
        _ => Vec::new(),
    })
    .await;
    let dir = tempfile::tempdir().unwrap();
    let engine = builder(dir.path(), &url).token("t").background_sync(false).open().await.unwrap();
    let workspace = engine.workspace("home").await.unwrap();
    let first = workspace.fetch_schema(Duration::from_secs(1)).await.unwrap_err();
    assert_eq!(first.code(), "timeout");
    let second = workspace.fetch_schema(Duration::from_secs(5)).await.unwrap();
    assert_eq!(second.as_deref(), Some("two"));
}
