//! A real editing trace, typed by one device and read by another.

#![expect(clippy::unwrap_used, reason = "a test says what is wrong by panicking")]

use std::io::Read;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anabranch::{Edit, Engine, EntityKey, Expect, Intent, SyncOutcome};
use anabranch_relay::{MintOptions, RelayDaemon, RelayOptions, mint_token};
use serde_json::Value as Json;

const SCHEMA: &str = "[note]\nversion = 1\n[note.fields]\nbody = { type = \"text\" }\n";
const KEYSTROKES_PER_CHANGE: usize = 100;

fn trace() -> Option<Json> {
    let dir = std::env::var_os("ANABRANCH_DATA").map_or_else(
        || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared/data")),
        PathBuf::from,
    );
    let file = std::fs::File::open(dir.join("automerge-paper.json.gz")).ok()?;
    let mut text = String::new();
    flate2::read::GzDecoder::new(file).read_to_string(&mut text).unwrap();
    Some(serde_json::from_str(&text).unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_paper_arrives_as_it_was_typed() {
    let Some(trace) = trace() else {
        println!("skipped: no automerge-paper.json.gz in ANABRANCH_DATA");
        return;
    };
    // A debug build types the beginning; ANABRANCH_PAPER=full or a release build all of it.
    let full = !cfg!(debug_assertions) || std::env::var("ANABRANCH_PAPER").is_ok_and(|v| v == "full");
    let dir = tempfile::tempdir().unwrap();
    let options = RelayOptions::dev().data(dir.path().join("relay")).listen("127.0.0.1:0");
    let relay = RelayDaemon::start(options).await.unwrap();
    let open = |name: &'static str| {
        let token = mint_token(&dir.path().join("relay"), &MintOptions::new("home", name)).unwrap().token;
        let builder = Engine::builder(dir.path().join(name))
            .schema_source(SCHEMA, "schema.toml")
            .unwrap()
            .relay(&relay.url().to_string())
            .token(token)
            .background_sync(false);
        async move { builder.open().await.unwrap() }
    };
    let (writer, reader) = (open("writer").await, open("reader").await);
    let (desk, shelf) = (writer.workspace("home").await.unwrap(), reader.workspace("home").await.unwrap());
    let mut expected: Vec<char> = Vec::new();
    let patches: Vec<Intent> = trace["txns"]
        .as_array()
        .unwrap()
        .iter()
        .flat_map(|txn| txn["patches"].as_array().unwrap())
        .map(|patch| Intent::Splice {
            field: "body".into(),
            at: patch[0].as_u64().unwrap() as usize,
            delete: patch[1].as_u64().unwrap() as usize,
            insert: patch[2].as_str().unwrap().to_owned(),
        })
        .collect();
    let take = if full { patches.len() } else { 10_000 };
    for patch in &patches[..take] {
        let Intent::Splice { at, delete, insert, .. } = patch else { unreachable!() };
        expected.splice(*at..at + delete, insert.chars());
    }
    let expected: String = expected.into_iter().collect();
    if full {
        assert_eq!(expected, trace["endContent"].as_str().unwrap());
    }
    let key = EntityKey::new("note", "paper").unwrap();
    let started = Instant::now();
    for intents in patches[..take].chunks(KEYSTROKES_PER_CHANGE) {
        let edit = Edit { key: key.clone(), intents: intents.to_vec(), based_on: None, expect: Expect::Any };
        desk.write(vec![edit]).await.unwrap();
    }
    let typed = started.elapsed();
    for workspace in [&desk, &shelf] {
        let report = workspace.sync(Duration::from_secs(300)).await.unwrap();
        assert_eq!(report.outcome, SyncOutcome::Complete, "{:?}", report.error);
    }
    println!("{take} keystrokes: typed in {typed:?}, synced in {:?}", started.elapsed() - typed);
    let row = shelf.get("note", "paper").await.unwrap().unwrap();
    assert_eq!(row.fields["body"].as_str().unwrap(), expected);
    assert_eq!(desk.status().digest, shelf.status().digest);
}
