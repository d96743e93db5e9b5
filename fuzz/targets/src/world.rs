//! What targets start from: a schema with every policy, a history of real changes by several
//! devices, samples of every message. The same in every run.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use anabranch_core::change::{Change, Role};
use anabranch_core::clock::{MonoMs, Now, WallMs};
use anabranch_core::entity::{EditContext, EditError, Entity};
use anabranch_core::genesis::{Genesis, GenesisKind};
use anabranch_core::id::{Author, DeviceId, EntityKey, Incarnation, WorkspaceId};
use anabranch_core::intent::Intent;
use anabranch_core::relay::{Claims, TokenVerifier};
use anabranch_core::schema::{EntityType, Schema};
use anabranch_core::wire::*;
use serde_json::json;

/// The wall clock when everything begins.
pub(crate) const START: WallMs = WallMs(1_750_000_000_000);

/// Every kind of field and every policy.
pub(crate) const SCHEMA: &str = r#"
[thing]
version = 1
index = [["level"], ["title", "level"]]
[thing.fields]
title = { type = "string" }
first = { type = "string", merge = "first_write" }
level = { type = "int" }
ratio = { type = "float" }
flag  = { type = "bool" }
at    = { type = "timestamp" }
extra = { type = "json" }
mine  = { type = "string", merge = "manual" }
cents = { type = "int", merge = "manual", group = "money" }
money = { type = "string", merge = "manual", group = "money" }
serv  = { type = "string", merge = "server_wins" }
clie  = { type = "string", merge = "client_wins" }
best  = { type = "int", merge = "max" }
least = { type = "int", merge = "min" }
count = { type = "int", merge = "counter" }
tags  = { type = "set", of = "string" }
log   = { type = "list", of = "string" }
days  = { type = "map", of = "int", merge = "max" }
body  = { type = "text" }

[country]
version = 1
merge = "server_only"
[country.fields]
name = { type = "string" }
"#;

pub(crate) fn schema() -> &'static Arc<Schema> {
    static PARSED: OnceLock<Arc<Schema>> = OnceLock::new();
    PARSED.get_or_init(|| Arc::new(Schema::parse(SCHEMA, "thing.toml").unwrap()))
}

pub(crate) fn ty() -> &'static EntityType {
    &schema().types["thing"]
}

pub(crate) fn home() -> WorkspaceId {
    WorkspaceId::new("home").unwrap()
}

pub(crate) fn thing(id: &str) -> EntityKey {
    EntityKey::new("thing", id).unwrap()
}

pub(crate) fn device(number: u8) -> DeviceId {
    DeviceId([number; 32])
}

pub(crate) fn now(ms: u64) -> Now {
    Now { mono: MonoMs(1_000 + ms), wall: WallMs(START.0 + ms) }
}

/// Who wrote what, on top of what.
pub(crate) struct Made {
    /// Everything that was known before to someone who knows all.
    pub(crate) before: Entity,
    pub(crate) change: Change,
    pub(crate) device: DeviceId,
    pub(crate) role: Role,
}

/// Three devices, the third an authority, edit one thing: alone, at the same time, and on top of
/// each other.
pub(crate) fn history() -> &'static [Made] {
    static HISTORY: OnceLock<Vec<Made>> = OnceLock::new();
    HISTORY.get_or_init(make_history)
}

fn make_history() -> Vec<Made> {
    let key = thing("t1");
    let blank = || Entity::new(&home(), &key, Some(ty()));
    let mut everything = blank();
    let mut replicas = vec![blank(), blank(), blank()];
    let mut made = Vec::new();
    let mut wall = START.0;
    for (round, intents) in rounds().into_iter().enumerate() {
        for (number, intents) in intents.into_iter().enumerate() {
            if intents.is_empty() {
                continue;
            }
            wall += 1_000;
            let author = Author { device: device(number as u8 + 1), incarnation: Incarnation(0) };
            let role = if number == 2 { Role::Authority } else { Role::Device };
            let context = EditContext {
                ty: ty(),
                author,
                role,
                wall: WallMs(wall),
                spread: 0,
                tx: None,
                again: None,
                based_on: None,
                checked: true,
            };
            let edited = match replicas[number].edit(&context, &intents) {
                Ok(Some(edited)) => edited,
                // What was deleted is not edited before it is back.
                Ok(None) | Err(EditError::NotFound(_)) => continue,
                Err(error) => panic!("{error}: {intents:?}"),
            };
            let before = everything.clone();
            take(&mut everything, &edited.change);
            made.push(Made { before, change: edited.change, device: author.device, role });
        }
        // Now and then all meet.
        if round % 2 == 1 {
            let changes: Vec<Change> = made.iter().map(|made| made.change.clone()).collect();
            for replica in &mut replicas {
                changes.iter().for_each(|change| take(replica, change));
            }
        }
    }
    made
}

fn take(entity: &mut Entity, change: &Change) {
    let judge = anabranch_core::admission::Judge::Admitted;
    let received = entity.receive(vec![change.clone()], Some(ty()), judge, true);
    assert!(received.refused.is_empty(), "{:?}", received.refused);
}

fn rounds() -> Vec<[Vec<Intent>; 3]> {
    let set = |field: &str, value| Intent::Set { field: field.into(), value };
    let add = |element| Intent::Add { field: "tags".into(), element: json!(element) };
    let remove = |element| Intent::Remove { field: "tags".into(), element: json!(element) };
    let count = |by| Intent::Increment { field: "count".into(), by };
    let put = |key: &str, value| Intent::Put { field: "days".into(), key: key.into(), value };
    let insert = |at, items: &[&str]| Intent::Insert {
        field: "log".into(),
        at,
        items: items.iter().map(|item| json!(item)).collect(),
    };
    let splice =
        |at, delete, insert: &str| Intent::Splice { field: "body".into(), at, delete, insert: insert.into() };
    vec![
        [
            vec![
                set("title", json!("one")),
                set("first", json!("f")),
                set("level", json!(3)),
                set("ratio", json!(0.5)),
                set("flag", json!(true)),
                set("at", json!("2026-01-01T00:00:00Z")),
                set("extra", json!({"a": [1, null]})),
            ],
            vec![],
            vec![],
        ],
        [vec![set("mine", json!("a")), count(3), add("x")], vec![], vec![set("serv", json!("s"))]],
        [
            vec![count(5), set("title", json!("two")), set("mine", json!("b")), set("clie", json!("c"))],
            vec![count(-2), set("title", json!("zwei")), set("mine", json!("c")), add("y"), remove("x")],
            vec![set("serv", json!("t")), set("clie", json!("d")), put("mon", json!(4))],
        ],
        [
            vec![splice(0, 0, "hello"), insert(None, &["a", "b", "c"]), put("mon", json!(9))],
            vec![set("cents", json!(200)), set("money", json!("CHF")), set("best", json!(7))],
            vec![],
        ],
        [
            vec![splice(2, 2, "LL"), insert(Some(1), &["n"]), set("cents", json!(300))],
            vec![splice(5, 0, " wörld"), set("money", json!("JPY")), set("least", json!(-4))],
            vec![add("z"), set("level", json!(9))],
        ],
        [
            vec![Intent::RemoveItems { field: "log".into(), at: 0, count: 2 }, splice(0, 3, "")],
            vec![insert(None, &["end"]), set("best", json!(12)), put("tue", json!(1))],
            vec![],
        ],
        [vec![Intent::Delete], vec![set("title", json!("three")), count(1)], vec![]],
        [vec![set("title", json!(null)), remove("y")], vec![], vec![set("serv", json!("u"))]],
        [vec![Intent::Delete], vec![], vec![]],
        [vec![Intent::Revive, set("title", json!("back"))], vec![], vec![]],
        [vec![count(1)], vec![count(1)], vec![count(1)]],
        [vec![splice(0, 0, "x")], vec![splice(0, 0, "y")], vec![splice(0, 0, "z")]],
    ]
}

/// Tokens are the names of roles.
pub(crate) struct RoleTokens;

impl TokenVerifier for RoleTokens {
    fn verify(&self, token: &str, _: WallMs) -> Result<Claims, (FaultCode, String)> {
        let (role, once) = match token.strip_suffix("/once") {
            Some(role) => (role, true),
            None => (token, false),
        };
        Ok(Claims {
            workspace: "home".into(),
            user: "ada".into(),
            role: GrantRole::from_name(role).ok_or((FaultCode::TokenInvalid, "no token".to_owned()))?,
            token_id: token.into(),
            single_use: once,
            not_before: WallMs(0),
            expires: WallMs(START.0 * 2),
        })
    }
}

/// The changes of one device in the history, each in a part of its own.
pub(crate) fn parts_of(number: u8) -> Vec<EntityChanges> {
    let made = history().iter().filter(|made| made.device == device(number));
    made.map(|made| part("t1", std::slice::from_ref(&made.change))).collect()
}

pub(crate) fn part(id: &str, changes: &[Change]) -> EntityChanges {
    let genesis: BTreeMap<String, GenesisKind> =
        Genesis::all(ty()).into_iter().map(|genesis| (genesis.field, genesis.kind)).collect();
    EntityChanges {
        type_name: "thing".into(),
        id: id.into(),
        genesis: genesis.into_iter().map(|(field, kind)| (field, kind.code())).collect(),
        changes: changes.iter().map(|change| change.bytes().to_vec()).collect(),
        signature: Vec::new(),
    }
}

pub(crate) fn hello() -> Hello {
    Hello {
        version_min: 1,
        version_max: 1,
        software: "fuzz".into(),
        wall_ms: START.0,
        features_required: 0,
        features: 0,
        proof: Vec::new(),
    }
}

pub(crate) fn sign_in(channel: Channel, token: Option<&str>) -> SignIn {
    SignIn {
        channel,
        workspace: "home".into(),
        token: token.map(str::to_owned),
        device_name: "phone".into(),
        platform: "fuzz".into(),
        incarnation: 0,
        sent: 0,
    }
}

pub(crate) fn open(channel: Channel, cursor: u64) -> Open {
    Open { channel, epoch: [7; 16], cursor, digest: [0; 32], full: cursor % 2 == 1 }
}

pub(crate) fn changes(channel: Channel, parts: Vec<EntityChanges>) -> Changes {
    Changes { channel, unit_id: 5, sent: 1, unit: Unit { entities: parts } }
}

pub(crate) fn granted(channel: Channel, behind: bool) -> Granted {
    Granted {
        channel,
        grant: Grant {
            workspace: "home".into(),
            device: [1; 32],
            user: "ada".into(),
            role: GrantRole::Writer.code(),
            types: Vec::new(),
            not_before_ms: START.0,
            not_after_ms: START.0 * 2,
            serial: 1,
        },
        schema: schema().hash(),
        behind,
        incarnation: u32::from(behind),
        epoch: [7; 16],
    }
}

pub(crate) fn feed(channel: Channel, from: u64, bodies: Vec<FeedBody>) -> Feed {
    let end = from + bodies.len() as u64;
    let entries = bodies.into_iter().zip(from..).map(|(body, seq)| FeedEntry { seq, body }).collect();
    Feed { channel, entries, end }
}

/// One of every message, and of every body of the feed.
pub(crate) fn messages() -> Vec<Message> {
    let refused = Refused {
        type_name: "thing".into(),
        id: "t1".into(),
        hash: history()[0].change.hash().0,
        code: 7,
        message: "no".into(),
    };
    let bodies = vec![
        FeedBody::Device { key: [1; 32], name: "phone".into(), platform: "fuzz".into() },
        FeedBody::Schema { hash: schema().hash() },
        FeedBody::Changes { author: [2; 32], unit: Unit { entities: parts_of(2) } },
        FeedBody::Own(vec![("thing".into(), "t1".into(), vec![[3; 32]])]),
        FeedBody::Refused(refused.clone()),
    ];
    vec![
        hello().into(),
        Welcome { version: 1, software: "fuzz".into(), wall_ms: START.0, features_required: 0, features: 0 }
            .into(),
        sign_in(1, Some("writer")).into(),
        sign_in(1, None).into(),
        granted(1, false).into(),
        granted(1, true).into(),
        open(1, 0).into(),
        open(1, u64::MAX).into(),
        changes(1, parts_of(1)).into(),
        changes(1, parts_of(3)).into(),
        Ack { channel: 1, unit_id: 1, seq: 4, refused: vec![refused] }.into(),
        feed(1, 1, bodies).into(),
        CaughtUp { channel: 1, epoch: [7; 16], cursor: 5, digest: [0; 32] }.into(),
        PushSchema { channel: 1, source: SCHEMA.into() }.into(),
        SchemaIs { channel: 1, hash: schema().hash(), source: Some(SCHEMA.into()), problems: Vec::new() }
            .into(),
        FetchSchema { channel: 1 }.into(),
        Refresh { channel: 1, token: "reader".into() }.into(),
        Fault { channel: None, code: 13, message: "bye".into() }.into(),
        Fault { channel: Some(1), code: 10, message: "no schema".into() }.into(),
    ]
}
