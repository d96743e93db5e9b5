//! What an engine's store takes, and a backup of an engine that runs.

#![expect(clippy::unwrap_used, reason = "a test says what is wrong by panicking")]

use anabranch::schema::Schema;
use anabranch::store::{StorageKind, restore};
use anabranch::{Category, Edit, Engine, EntityKey, Expect, Intent};
use serde_json::json;

const SCHEMA: &str = "[note]\nversion = 1\n[note.fields]\ntitle = { type = \"string\" }\n";

async fn open(dir: &std::path::Path) -> Engine {
    let schema = Schema::parse(SCHEMA, "schema.toml").unwrap();
    Engine::builder(dir).schema(schema).open().await.unwrap()
}

#[tokio::test]
async fn a_backup_of_a_running_engine_is_an_engine_again() {
    let scratch = tempfile::tempdir().unwrap();
    let path = |name: &str| scratch.path().join(name);
    let engine = open(&path("a")).await;
    let home = engine.workspace("home").await.unwrap();
    let write = async |workspace: &anabranch::Workspace, id: &str| {
        let set = Intent::Set { field: "title".into(), value: json!(id) };
        let key = EntityKey::new("note", id).unwrap();
        let edit = Edit { key, intents: vec![set], based_on: None, expect: Expect::Any };
        workspace.write(vec![edit]).await.unwrap();
    };
    write(&home, "before").await;
    let figures = engine.storage().await.unwrap();
    let rows = figures.kinds.iter().find(|one| one.kind == StorageKind::Rows).unwrap();
    assert_eq!(rows.entries, 1);
    assert!(figures.live_bytes > 0 && figures.disk_bytes > figures.live_bytes);

    std::fs::write(path("a/settings"), "mine").unwrap();
    let report = engine.backup(path("copy"), &["settings", "not there"]).await.unwrap();
    assert_eq!(report.files.len(), 2, "{report:?}");
    let refused = engine.backup(path("copy"), &[]).await.unwrap_err();
    assert_eq!((refused.category(), refused.code()), (Category::Usage, "exists"));
    write(&home, "after").await;

    restore(path("copy"), path("b"), None, &mut |_, _| {}).unwrap();
    assert_eq!(std::fs::read_to_string(path("b/settings")).unwrap(), "mine");
    let restored = open(&path("b")).await;
    assert_eq!(restored.device(), engine.device());
    let home = restored.workspace("home").await.unwrap();
    assert!(home.get("note", "before").await.unwrap().is_some());
    assert!(home.get("note", "after").await.unwrap().is_none());
    write(&home, "after").await;
    restored.shutdown().await.unwrap();
    engine.shutdown().await.unwrap();
}
