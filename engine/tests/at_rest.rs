//! What lies in the files of stores after real work on devices and at a relay.

#![expect(clippy::unwrap_used, reason = "a test says what is wrong by panicking")]

use std::fs;
use std::path::Path;
use std::time::Duration;

use anabranch::{
    BackendKind, Edit, Engine, EntityKey, Expect, Intent, Query, StoreKey, StoreOptions, SyncOutcome,
    Workspace,
};
use anabranch_relay::{GrantRole, MintOptions, RelayDaemon, RelayOptions, mint_token};
use serde_json::json;

const SCHEMA: &str = r#"
[confidential_dossier]
version = 1
index = [["nickname_of_it"], ["size"]]
[confidential_dossier.fields]
nickname_of_it = { type = "string", merge = "manual" }
size = { type = "int" }
long_story = { type = "text" }

[guarded_ledger]
version = 1
merge = "server_only"
[guarded_ledger.fields]
nickname_of_it = { type = "string" }
"#;

/// What must not be found: names of workspace, types, fields, devices and users; ids; values.
const NEEDLES: [&str; 12] = [
    "workspace-of-conspirators",
    "confidential_dossier",
    "guarded_ledger",
    "nickname_of_it",
    "long_story",
    "entity-called-",
    "value-of-device-",
    "telling-device-",
    "user-incognito-",
    "once upon a time",
    "value-before-deletion",
    "refused-secret",
];

/// Which needles lie in the files below a directory, in any file.
fn found_in(dir: &Path) -> Vec<&'static str> {
    let mut bytes = Vec::new();
    collect(dir, &mut bytes);
    let holds = |needle: &str| bytes.windows(needle.len()).any(|window| window == needle.as_bytes());
    NEEDLES.into_iter().filter(|needle| holds(needle)).collect()
}

fn collect(dir: &Path, bytes: &mut Vec<u8>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        bytes.extend(path.file_name().unwrap().as_encoded_bytes());
        if path.is_dir() {
            collect(&path, bytes);
        } else {
            bytes.extend(fs::read(&path).unwrap());
        }
    }
}

async fn write(workspace: &Workspace, type_name: &str, id: &str, intents: Vec<Intent>) {
    let key = EntityKey::new(type_name, id).unwrap();
    workspace.write(vec![Edit { key, intents, based_on: None, expect: Expect::Any }]).await.unwrap();
}

fn set(field: &str, value: serde_json::Value) -> Intent {
    Intent::Set { field: field.into(), value }
}

/// Two devices and a relay work: rows, indexes, texts large enough to be split, deletions,
/// conflicts, a refusal, pending changes at the end.
async fn work(dir: &Path, backend: BackendKind, passphrase: Option<&str>) {
    let mut relay = RelayOptions::dev().data(dir.join("relay")).listen("127.0.0.1:0");
    let mut config = format!("store_backend = \"{backend}\"\n");
    let mut options = StoreOptions::default().backend(backend);
    if let Some(passphrase) = passphrase {
        let file = dir.join("passphrase");
        fs::write(&file, passphrase).unwrap();
        config.push_str(&format!("store_passphrase_file = {:?}\n", file.to_str().unwrap()));
        options = options.encryption(StoreKey::from_bytes([3; 32]));
    }
    fs::write(dir.join("relay.toml"), config).unwrap();
    relay.config = Some(dir.join("relay.toml"));
    let relay = RelayDaemon::start(relay).await.unwrap();
    let mut devices = Vec::new();
    for n in 0..2 {
        let name = format!("telling-device-{n}");
        let mint = MintOptions::new("workspace-of-conspirators", format!("user-incognito-{n}"));
        let token = mint_token(&dir.join("relay"), &mint.role(GrantRole::Admin)).unwrap().token;
        let engine = Engine::builder(dir.join(&name))
            .schema_source(SCHEMA, "schema.toml")
            .unwrap()
            .device_name(&name)
            .relay(&relay.url().to_string())
            .token(token)
            .background_sync(false)
            .store(options.clone())
            .open()
            .await
            .unwrap();
        let workspace = engine.workspace("workspace-of-conspirators").await.unwrap();
        devices.push((engine, workspace));
    }
    let dossier = "confidential_dossier";
    let sync = async |n: usize| {
        let report = devices[n].1.sync(Duration::from_secs(60)).await.unwrap();
        assert_eq!(report.outcome, SyncOutcome::Complete, "{report:?}");
    };
    devices[0].1.push_schema(Duration::from_secs(10)).await.unwrap();
    let edits = (0..20).map(|n| Edit {
        key: EntityKey::new(dossier, format!("entity-called-{n}")).unwrap(),
        intents: vec![set("nickname_of_it", json!("value-before-deletion")), set("size", json!(n))],
        based_on: None,
        expect: Expect::Any,
    });
    devices[0].1.write(edits.collect()).await.unwrap();
    sync(0).await;
    let story = "once upon a time ".repeat(9000);
    let splice = Intent::Splice { field: "long_story".into(), at: 0, delete: 0, insert: story };
    write(&devices[0].1, dossier, "entity-called-0", vec![splice]).await;
    sync(0).await;
    sync(1).await;
    for (n, (_, workspace)) in devices.iter().enumerate() {
        let value = set("nickname_of_it", json!(format!("value-of-device-{n}")));
        write(workspace, dossier, "entity-called-1", vec![value]).await;
    }
    write(&devices[1].1, dossier, "entity-called-2", vec![Intent::Delete]).await;
    sync(0).await;
    sync(1).await;
    sync(0).await;
    assert_eq!(devices[0].1.conflicts().await.unwrap().len(), 1);
    let found = devices[0].1.query(&Query { type_name: dossier.into(), ..Query::default() }).await.unwrap();
    assert_eq!(found.records.len(), 19);
    let key = EntityKey::new("guarded_ledger", "entity-called-forbidden").unwrap();
    let intents = vec![set("nickname_of_it", json!("refused-secret"))];
    let edit = Edit { key, intents, based_on: None, expect: Expect::Any };
    devices[0].1.write_unchecked(vec![edit]).await.unwrap();
    sync(0).await;
    assert_eq!(devices[0].1.refused().await.unwrap().len(), 1);
    for (n, (_, workspace)) in devices.iter().enumerate() {
        let value = set("nickname_of_it", json!(format!("value-of-device-{n}, never sent")));
        write(workspace, dossier, "entity-called-4", vec![value]).await;
    }
    for (engine, _) in devices {
        engine.shutdown().await.unwrap();
    }
    relay.shutdown().await.unwrap();
}

fn stores(dir: &Path) -> [std::path::PathBuf; 3] {
    [dir.join("relay/store"), dir.join("telling-device-0/store"), dir.join("telling-device-1/store")]
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_can_be_read_in_the_files_of_encrypted_stores() {
    for backend in BackendKind::ALL {
        let dir = tempfile::tempdir().unwrap();
        work(dir.path(), backend, Some("the relay's own passphrase")).await;
        for store in stores(dir.path()) {
            let found = found_in(&store);
            assert!(found.is_empty(), "{backend}, {}: {found:?}", store.display());
        }
    }
}

/// The same search finds all of it where nothing is encrypted, or it would prove nothing.
#[tokio::test(flavor = "multi_thread")]
async fn all_of_it_can_be_read_in_the_files_of_plain_stores() {
    for backend in BackendKind::ALL {
        let dir = tempfile::tempdir().unwrap();
        work(dir.path(), backend, None).await;
        let found: std::collections::BTreeSet<_> =
            stores(dir.path()).iter().flat_map(|store| found_in(store)).collect();
        let missed: Vec<_> = NEEDLES.into_iter().filter(|needle| !found.contains(needle)).collect();
        assert!(missed.is_empty(), "{backend}: {missed:?}");
    }
}
