//! The engine beside a limit of the machine, in one run: machines differ and are noisy, so the
//! ratios are what counts.
//!
//! `cargo bench -p anabranch-benches` (`ANABRANCH_BENCH_ENTITIES=n` for another size)

#![expect(clippy::unwrap_used, reason = "a bench has no one to report to")]

use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use anabranch::{Edit, Engine, EntityKey, Expect, Intent, SyncOutcome, Workspace};
use anabranch_relay::{MintOptions, RelayDaemon, RelayOptions, mint_token};
use serde_json::json;

const SCHEMA: &str = r#"
[entry]
version = 1
[entry.fields]
title = { type = "string" }
body = { type = "string" }
kind = { type = "string" }
place = { type = "string" }
count = { type = "int" }
weight = { type = "float" }
done = { type = "bool" }
when = { type = "timestamp" }
color = { type = "string" }
rank = { type = "int" }
"#;
const WRITES: usize = 500;
const PATIENCE: Duration = Duration::from_secs(300);

#[tokio::main]
async fn main() {
    let entities: usize =
        std::env::var("ANABRANCH_BENCH_ENTITIES").ok().and_then(|n| n.parse().ok()).unwrap_or(10_000);
    let dir = tempfile::tempdir().unwrap();
    durable_writes(dir.path()).await;
    initial_sync(dir.path(), entities).await;
}

/// One durable write at a time through the whole API, beside raw append + fdatasync.
async fn durable_writes(dir: &Path) {
    let (_engine, workspace) = open(&dir.join("local"), None).await;
    let mut file = std::fs::File::create(dir.join("raw")).unwrap();
    let (mut raw, mut ours) = (Vec::new(), Vec::new());
    // In turn, so that a slow moment of the machine meets both.
    for n in 0..WRITES {
        let start = Instant::now();
        file.write_all(&[7; 400]).unwrap();
        file.sync_data().unwrap();
        raw.push(start.elapsed());
        let start = Instant::now();
        workspace.write(vec![entry(n)]).await.unwrap();
        ours.push(start.elapsed());
    }
    let (raw, ours) = (median(raw), median(ours));
    println!(
        "durable write, one writer: {ours:?}; append + fdatasync: {raw:?}; ratio {:.2}",
        ratio(ours, raw)
    );
}

/// Device → relay → empty device, beside writing the same rows' JSON to a file once.
async fn initial_sync(dir: &Path, entities: usize) {
    let relay_dir = dir.join("relay");
    let relay = RelayDaemon::start(RelayOptions::dev().data(&relay_dir).listen("127.0.0.1:0")).await.unwrap();
    let token = |user: &str| mint_token(&relay_dir, &MintOptions::new("home", user)).unwrap().token;
    let url = relay.url().to_string();
    let (_a, full) = open(&dir.join("full"), Some((&url, token("full")))).await;
    let (_b, empty) = open(&dir.join("empty"), Some((&url, token("empty")))).await;
    let start = Instant::now();
    for chunk in (0..entities).collect::<Vec<_>>().chunks(500) {
        let edits = chunk.iter().map(|n| entry(*n)).collect();
        for written in full.write_each(edits).await.unwrap() {
            written.unwrap();
        }
    }
    let written = start.elapsed();
    let up = sync(&full).await;
    let down = sync(&empty).await;
    let again = sync(&empty).await;
    let per_second = |took: Duration| (entities as f64 / took.as_secs_f64()) as u64;
    println!(
        "{entities} entities of 10 fields: written in {written:?} ({}/s), up {up:?} ({}/s), down {down:?} ({}/s), \
         reconnect with nothing changed {again:?}",
        per_second(written),
        per_second(up),
        per_second(down),
    );
    relay.shutdown().await.unwrap();
}

async fn sync(workspace: &Workspace) -> Duration {
    let start = Instant::now();
    let report = workspace.sync(PATIENCE).await.unwrap();
    assert_eq!(report.outcome, SyncOutcome::Complete, "{:?}", report.error);
    start.elapsed()
}

async fn open(dir: &Path, relay: Option<(&str, String)>) -> (Engine, Workspace) {
    let mut builder =
        Engine::builder(dir).schema_source(SCHEMA, "schema.toml").unwrap().background_sync(false);
    if let Some((url, token)) = relay {
        builder = builder.relay(url).token(token);
    }
    let engine = builder.open().await.unwrap();
    let workspace = engine.workspace("home").await.unwrap();
    (engine, workspace)
}

fn entry(n: usize) -> Edit {
    let set = |field: &str, value| Intent::Set { field: field.into(), value };
    let intents = vec![
        set("title", json!(format!("Entry number {n}"))),
        set("body", json!("A sentence or two about what was done, as people write them down.")),
        set("kind", json!(["run", "lift", "swim"][n % 3])),
        set("place", json!("the gym around the corner")),
        set("count", json!(n)),
        set("weight", json!(n as f64 / 4.0)),
        set("done", json!(n.is_multiple_of(2))),
        set("when", json!(1_700_000_000_000_u64 + n as u64 * 60_000)),
        set("color", json!("green")),
        set("rank", json!(n % 10)),
    ];
    let key = EntityKey::new("entry", format!("e{n}")).unwrap();
    Edit { key, intents, based_on: None, expect: Expect::Any }
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

fn ratio(ours: Duration, raw: Duration) -> f64 {
    ours.as_secs_f64() / raw.as_secs_f64()
}
