//! Engines and a real relay over real QUIC, as an app would use them.

#![expect(clippy::unwrap_used, reason = "a test says what is wrong by panicking")]

use std::path::Path;
use std::time::Duration;

use anabranch::{
    Edit, Engine, EntityKey, Expect, Intent, Query, Resolution, SyncOutcome, SyncStatus, Workspace,
};
use anabranch_core::wire::GrantRole;
use anabranch_relay::{MintOptions, RelayDaemon, RelayHandle, RelayOptions, mint_token};
use serde_json::{Value as Json, json};

const SCHEMA: &str = r#"
[task]
version = 1
[task.fields]
title = { type = "string", required = true }
notes = { type = "text" }
tags = { type = "set", of = "string" }
points = { type = "int", merge = "counter" }
due = { type = "string", merge = "manual" }
best = { type = "int", merge = "max" }
owner = { type = "string", merge = "server_wins" }

[project]
version = 1
[project.fields]
name = { type = "string", required = true, max_bytes = 20 }
lead = { type = "ref", to = "person" }

[person]
version = 1
priority = 100
[person.fields]
friend = { type = "ref", to = "person" }
project = { type = "ref", to = "project" }

[country]
version = 1
merge = "server_only"
[country.fields]
name = { type = "string", required = true }
"#;

const PATIENCE: Duration = Duration::from_secs(20);

struct Net {
    dir: tempfile::TempDir,
    relay: Option<RelayHandle>,
    url: String,
}

impl Net {
    async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut net = Self { dir, relay: None, url: String::new() };
        net.start_relay("127.0.0.1:0").await;
        net
    }

    async fn start_relay(&mut self, listen: &str) {
        let options = RelayOptions::dev().data(self.relay_dir()).listen(listen);
        let relay = RelayDaemon::start(options).await.unwrap();
        self.url = relay.url().to_string();
        self.relay = Some(relay);
    }

    fn relay_dir(&self) -> std::path::PathBuf {
        self.dir.path().join("relay")
    }

    fn token(&self, user: &str, role: GrantRole) -> String {
        mint_token(&self.relay_dir(), &MintOptions::new("home", user).role(role)).unwrap().token
    }

    async fn device(&self, name: &str, role: GrantRole) -> (Engine, Workspace) {
        self.device_at(name, role, 0).await
    }

    async fn device_at(&self, name: &str, role: GrantRole, clock_offset_ms: i64) -> (Engine, Workspace) {
        let engine = Engine::builder(self.dir.path().join(name))
            .schema_source(SCHEMA, "schema.toml")
            .unwrap()
            .relay(&self.url)
            .token(self.token(name, role))
            .device_name(name)
            .assume_role(role.name())
            .clock_offset_ms(clock_offset_ms)
            .background_sync(false)
            .open()
            .await
            .unwrap();
        let workspace = engine.workspace("home").await.unwrap();
        (engine, workspace)
    }
}

fn edit(type_name: &str, id: &str, intents: Vec<Intent>) -> Edit {
    Edit { key: EntityKey::new(type_name, id).unwrap(), intents, based_on: None, expect: Expect::Any }
}

fn set(field: &str, value: Json) -> Intent {
    Intent::Set { field: field.into(), value }
}

async fn write(workspace: &Workspace, id: &str, intents: Vec<Intent>) {
    workspace.write(vec![edit("task", id, intents)]).await.unwrap();
}

async fn sync(workspace: &Workspace) {
    let report = workspace.sync(PATIENCE).await.unwrap();
    assert_eq!(report.outcome, SyncOutcome::Complete, "{:?}", report.error);
}

async fn field(workspace: &Workspace, id: &str, name: &str) -> Json {
    workspace.get("task", id).await.unwrap().unwrap().fields[name].clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn edits_made_offline_meet_and_agree() {
    let net = Net::start().await;
    let (_a, phone) = net.device("phone", GrantRole::Writer).await;
    let (_b, tablet) = net.device("tablet", GrantRole::Writer).await;
    write(
        &phone,
        "t1",
        vec![set("title", json!("Milk")), set("points", json!(3)), set("notes", json!("two litres"))],
    )
    .await;
    assert_eq!(phone.get("task", "t1").await.unwrap().unwrap().status, SyncStatus::PendingCreate);
    sync(&phone).await;
    assert_eq!(phone.get("task", "t1").await.unwrap().unwrap().status, SyncStatus::Synced);
    sync(&tablet).await;
    assert_eq!(field(&tablet, "t1", "title").await, json!("Milk"));
    // Both edit offline.
    write(
        &phone,
        "t1",
        vec![
            Intent::Increment { field: "points".into(), by: 5 },
            Intent::Add { field: "tags".into(), element: json!("shop") },
            Intent::Splice { field: "notes".into(), at: 0, delete: 0, insert: "Oat: ".into() },
            set("best", json!(10)),
            set("due", json!("monday")),
        ],
    )
    .await;
    write(
        &tablet,
        "t1",
        vec![
            Intent::Increment { field: "points".into(), by: 7 },
            Intent::Add { field: "tags".into(), element: json!("home") },
            Intent::Splice { field: "notes".into(), at: 10, delete: 0, insert: ", please".into() },
            set("best", json!(20)),
            set("due", json!("tuesday")),
        ],
    )
    .await;
    sync(&tablet).await;
    sync(&phone).await;
    sync(&tablet).await;
    for device in [&phone, &tablet] {
        assert_eq!(field(device, "t1", "points").await, json!(15));
        assert_eq!(field(device, "t1", "tags").await, json!(["home", "shop"]));
        assert_eq!(field(device, "t1", "notes").await, json!("Oat: two litres, please"));
        assert_eq!(field(device, "t1", "best").await, json!(20));
        let conflicts = device.conflicts().await.unwrap();
        assert_eq!(conflicts.len(), 1);
        assert_eq!((conflicts[0].field.as_str(), conflicts[0].kind.as_str()), ("due", "manual"));
        let mut sides: Vec<&str> = conflicts[0].sides.iter().map(|side| side.device.as_str()).collect();
        sides.sort_unstable();
        assert_eq!(sides, ["phone", "tablet"]);
        let row = device.get("task", "t1").await.unwrap().unwrap();
        assert_eq!(row.status, SyncStatus::Conflict);
    }
    let refused = phone.write(vec![edit("task", "t1", vec![set("due", json!("never"))])]).await.unwrap_err();
    assert_eq!(refused.category().name(), "conflict");
    phone.resolve("task", "t1", "due", Resolution::Theirs).await.unwrap();
    sync(&phone).await;
    sync(&tablet).await;
    for device in [&phone, &tablet] {
        assert!(device.conflicts().await.unwrap().is_empty());
        assert_eq!(field(device, "t1", "due").await, json!("tuesday"));
    }
    assert_eq!(phone.status().digest, tablet.status().digest);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_authority_stands_unless_its_value_was_seen() {
    let net = Net::start().await;
    let (_s, server) = net.device("server", GrantRole::Authority).await;
    let (_a, phone) = net.device("phone", GrantRole::Writer).await;
    let (_b, tablet) = net.device("tablet", GrantRole::Writer).await;
    write(&server, "t", vec![set("title", json!("x")), set("owner", json!("ann"))]).await;
    sync(&server).await;
    sync(&phone).await;
    sync(&tablet).await;
    write(&server, "t", vec![set("owner", json!("bob"))]).await;
    write(&phone, "t", vec![set("owner", json!("cid"))]).await;
    sync(&phone).await;
    sync(&server).await;
    sync(&tablet).await;
    assert_eq!(field(&tablet, "t", "owner").await, json!("bob"));
    write(&tablet, "t", vec![set("owner", json!("dan"))]).await;
    sync(&tablet).await;
    sync(&server).await;
    sync(&phone).await;
    for device in [&server, &phone, &tablet] {
        assert_eq!(field(device, "t", "owner").await, json!("dan"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_write_is_rolled_back_and_blocks_nothing() {
    let net = Net::start().await;
    let (_s, server) = net.device("server", GrantRole::Authority).await;
    let (_a, phone) = net.device("phone", GrantRole::Writer).await;
    server.write(vec![edit("country", "pt", vec![set("name", json!("Portugal"))])]).await.unwrap();
    sync(&server).await;
    sync(&phone).await;
    let local =
        phone.write(vec![edit("country", "pt", vec![set("name", json!("Spain"))])]).await.unwrap_err();
    assert_eq!(local.category().name(), "validation");
    phone.write_unchecked(vec![edit("country", "pt", vec![set("name", json!("Spain"))])]).await.unwrap();
    write(&phone, "t", vec![set("title", json!("fine"))]).await;
    sync(&phone).await;
    let row = phone.get("country", "pt").await.unwrap().unwrap();
    assert_eq!((&row.fields["name"], row.status), (&json!("Portugal"), SyncStatus::Failed));
    let refused = phone.refused().await.unwrap();
    assert_eq!((refused.len(), refused[0].1.code.as_str()), (1, "forbidden"));
    phone.dismiss(refused[0].0).await.unwrap();
    assert_eq!(phone.get("country", "pt").await.unwrap().unwrap().status, SyncStatus::Synced);
    sync(&server).await;
    assert_eq!(field(&server, "t", "title").await, json!("fine"));
    assert_eq!(phone.status().digest, server.status().digest);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_clock_is_corrected_before_anything_leaves() {
    const YEAR_MS: i64 = 365 * 24 * 60 * 60 * 1000;
    for offset in [YEAR_MS, -YEAR_MS] {
        let net = Net::start().await;
        let (_a, wrong) = net.device_at("wrong", GrantRole::Writer, offset).await;
        let (_b, right) = net.device("right", GrantRole::Writer).await;
        write(&wrong, "t", vec![set("title", json!("first")), set("notes", json!("one"))]).await;
        write(&wrong, "t", vec![set("title", json!("second"))]).await;
        sync(&wrong).await;
        sync(&right).await;
        write(&right, "t", vec![set("title", json!("third"))]).await;
        sync(&right).await;
        sync(&wrong).await;
        let row = wrong.get("task", "t").await.unwrap().unwrap();
        assert_eq!(row.fields["title"], json!("third"));
        assert!((wrong.status().clock_skew_ms - offset).abs() < 60_000);
        let here =
            std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis() as i64;
        assert!((row.created_ms as i64 - here).abs() < 60_000, "{} is not about {here}", row.created_ms);
        assert_eq!(row, right.get("task", "t").await.unwrap().unwrap());
        // And again while it is connected and its skew is known.
        write(&wrong, "t", vec![set("title", json!("fourth"))]).await;
        sync(&wrong).await;
        sync(&right).await;
        assert_eq!(field(&right, "t", "title").await, json!("fourth"));
        assert!(wrong.refused().await.unwrap().is_empty());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn deletions_and_edits_meet() {
    let net = Net::start().await;
    let (_a, phone) = net.device("phone", GrantRole::Writer).await;
    let (_b, tablet) = net.device("tablet", GrantRole::Writer).await;
    for id in ["early", "late"] {
        write(&phone, id, vec![set("title", json!(id))]).await;
    }
    sync(&phone).await;
    sync(&tablet).await;
    let pause = || tokio::time::sleep(Duration::from_millis(5));
    // The edit is later: it revives.
    phone.write(vec![edit("task", "late", vec![Intent::Delete])]).await.unwrap();
    pause().await;
    write(&tablet, "late", vec![set("title", json!("kept"))]).await;
    // The deletion is later: the edit is lost and reported.
    write(&tablet, "early", vec![set("title", json!("lost"))]).await;
    pause().await;
    phone.write(vec![edit("task", "early", vec![Intent::Delete])]).await.unwrap();
    sync(&phone).await;
    sync(&tablet).await;
    sync(&phone).await;
    for device in [&phone, &tablet] {
        assert_eq!(field(device, "late", "title").await, json!("kept"));
        assert!(device.get("task", "early").await.unwrap().is_none());
        let conflicts = device.conflicts().await.unwrap();
        assert_eq!(conflicts.len(), 1);
        assert_eq!((conflicts[0].id.as_str(), conflicts[0].kind.as_str()), ("early", "lost_edit"));
    }
    tablet.resolve("task", "early", "*", Resolution::Mine).await.unwrap();
    sync(&tablet).await;
    sync(&phone).await;
    assert_eq!(field(&phone, "early", "title").await, json!("lost"));
    assert!(phone.conflicts().await.unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_created_and_deleted_before_the_first_send_sends_nothing() {
    let net = Net::start().await;
    let (_a, phone) = net.device("phone", GrantRole::Writer).await;
    write(&phone, "t", vec![set("title", json!("short"))]).await;
    phone.write(vec![edit("task", "t", vec![Intent::Delete])]).await.unwrap();
    assert_eq!(phone.status().pending, 0);
    let report = phone.sync(PATIENCE).await.unwrap();
    assert_eq!((report.outcome, report.sent), (SyncOutcome::Complete, 0));
    write(&phone, "t", vec![set("title", json!("again"))]).await;
    sync(&phone).await;
    assert!(phone.refused().await.unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_arrives_whole() {
    let net = Net::start().await;
    let (_a, phone) = net.device("phone", GrantRole::Writer).await;
    let (_b, tablet) = net.device("tablet", GrantRole::Writer).await;
    let edits =
        (0..50).map(|n| edit("task", &format!("t{n}"), vec![set("title", json!(n.to_string()))])).collect();
    phone.write(edits).await.unwrap();
    sync(&phone).await;
    sync(&tablet).await;
    let page = tablet.query(&Query { type_name: "task".into(), ..Query::default() }).await.unwrap();
    assert_eq!(page.records.len(), 50);
    assert_eq!(phone.status().digest, tablet.status().digest);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_that_stays_connected_hears_of_every_change() {
    let net = Net::start().await;
    let (_a, phone) = net.device("phone", GrantRole::Writer).await;
    let live = Engine::builder(net.dir.path().join("live"))
        .schema_source(SCHEMA, "schema.toml")
        .unwrap()
        .relay(&net.url)
        .token(net.token("live", GrantRole::Writer))
        .open()
        .await
        .unwrap();
    let workspace = live.workspace("home").await.unwrap();
    let mut changes = workspace.changes();
    write(&phone, "t", vec![set("title", json!("hello"))]).await;
    sync(&phone).await;
    let event = tokio::time::timeout(PATIENCE, changes.next()).await.unwrap().unwrap();
    assert_eq!(event, anabranch::ChangeEvent::Changed(EntityKey::new("task", "t").unwrap()));
    assert_eq!(field(&workspace, "t", "title").await, json!("hello"));
    live.shutdown().await.unwrap();
    assert!(changes.next().await.is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_relay_everything_local_works_and_sync_says_offline() {
    let mut net = Net::start().await;
    net.relay.take().unwrap().shutdown().await.unwrap();
    let (engine, phone) = net.device("phone", GrantRole::Writer).await;
    write(&phone, "t", vec![set("title", json!("kept"))]).await;
    let report = phone.sync(Duration::from_millis(600)).await.unwrap();
    assert_eq!((report.outcome, report.pending), (SyncOutcome::Offline, 1));
    engine.shutdown().await.unwrap();
    drop((engine, phone));
    let (_engine, phone) = net.device("phone", GrantRole::Writer).await;
    assert_eq!(field(&phone, "t", "title").await, json!("kept"));
    let listen = net.url.trim_start_matches("quic://").split('#').next().unwrap().to_owned();
    net.start_relay(&listen).await;
    sync(&phone).await;
    assert_eq!(phone.status().pending, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_way_to_be_turned_away_has_its_own_name() {
    let net = Net::start().await;
    let other = Net::start().await;
    let open = |name: &'static str, url: String, token: Option<String>, workspace: &'static str| {
        let dir = net.dir.path().join(name);
        async move {
            let mut builder =
                Engine::builder(Path::new(&dir)).schema_source(SCHEMA, "s.toml").unwrap().relay(&url);
            if let Some(token) = token {
                builder = builder.token(token);
            }
            let engine = builder.background_sync(false).open().await.unwrap();
            let workspace = engine.workspace(workspace).await.unwrap();
            let report = workspace.sync(PATIENCE).await.unwrap();
            assert_eq!(report.outcome, SyncOutcome::Auth);
            report.error.unwrap().code().to_owned()
        }
    };
    let good = net.token("x", GrantRole::Writer);
    let foreign = other.token("x", GrantRole::Writer);
    let wrong_key =
        format!("{}#{}", net.url.split('#').next().unwrap(), other.url.split('#').nth(1).unwrap());
    assert_eq!(open("none", net.url.clone(), None, "home").await, "not_signed_in");
    assert_eq!(open("garbage", net.url.clone(), Some("x.y.z".into()), "home").await, "token_invalid");
    assert_eq!(open("foreign", net.url.clone(), Some(foreign), "home").await, "token_invalid");
    assert_eq!(open("elsewhere", net.url.clone(), Some(good.clone()), "work").await, "wrong_workspace");
    assert_eq!(open("key", wrong_key, Some(good), "home").await, "wrong_relay_key");
}

#[tokio::test(flavor = "multi_thread")]
async fn parents_arrive_before_their_children_whatever_their_priority() {
    let net = Net::start().await;
    let (_a, phone) = net.device("phone", GrantRole::Writer).await;
    let live = Engine::builder(net.dir.path().join("live"))
        .schema_source(SCHEMA, "schema.toml")
        .unwrap()
        .relay(&net.url)
        .token(net.token("live", GrantRole::Writer))
        .open()
        .await
        .unwrap();
    let workspace = live.workspace("home").await.unwrap();
    sync(&workspace).await;
    let mut changes = workspace.changes();
    phone.write(vec![edit("person", "child", vec![set("project", json!("parent"))])]).await.unwrap();
    phone.write(vec![edit("project", "parent", vec![set("name", json!("later"))])]).await.unwrap();
    // Two that refer to each other go together.
    phone.write(vec![edit("person", "a", vec![set("friend", json!("b"))])]).await.unwrap();
    phone.write(vec![edit("person", "b", vec![set("friend", json!("a"))])]).await.unwrap();
    sync(&phone).await;
    let mut order = Vec::new();
    while order.len() < 4 {
        match tokio::time::timeout(PATIENCE, changes.next()).await.unwrap().unwrap() {
            anabranch::ChangeEvent::Changed(key) => order.push(key.id().to_owned()),
            anabranch::ChangeEvent::Missed => unreachable!("four events fit"),
        }
    }
    let place = |id: &str| order.iter().position(|known| known == id).unwrap();
    assert!(place("parent") < place("child"), "{order:?}");
    sync(&workspace).await;
    assert_eq!(workspace.status().digest, phone.status().digest);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_parent_holds_its_children_until_it_is_dealt_with() {
    let net = Net::start().await;
    let (_s, server) = net.device("server", GrantRole::Authority).await;
    sync(&server).await; // its schema is pushed: the relay checks by it
    let (_a, phone) = net.device("phone", GrantRole::Writer).await;
    let too_long = "a name that is longer than the schema allows";
    phone.write_unchecked(vec![edit("project", "p", vec![set("name", json!(too_long))])]).await.unwrap();
    phone.write(vec![edit("person", "child", vec![set("project", json!("p"))])]).await.unwrap();
    write(&phone, "other", vec![set("title", json!("goes"))]).await;
    let report = phone.sync(PATIENCE).await.unwrap();
    assert_eq!((report.outcome, report.sent, report.pending), (SyncOutcome::Partial, 1, 1));
    let refused = phone.refused().await.unwrap();
    assert_eq!((refused.len(), refused[0].1.code.as_str()), (1, "validation"));
    // The user gives the project a shorter name: it goes, and its child after it.
    phone.write(vec![edit("project", "p", vec![set("name", json!("short"))])]).await.unwrap();
    phone.dismiss(refused[0].0).await.unwrap();
    sync(&phone).await;
    sync(&server).await;
    assert_eq!(server.status().digest, phone.status().digest);
    assert!(server.get("person", "child").await.unwrap().is_some());
}
