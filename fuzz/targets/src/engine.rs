//! An [`Engine`] held to a map: the calls that apps make, on a real store in a directory of its own. What
//! a call made is shown by the next one, on the stream of changes and in live queries, and is there when the
//! engine is opened again or restored from a backup.
//!
//! The engine has threads, a clock and a random seed. None of these decides what is shown, so a finding
//! is as a rule one again.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anabranch::store::restore;
use anabranch::{
    BackendKind, BoxStream, Category, ChangeEvent, ChangeStream, Edit, Engine, EntityKey, Error, Expect,
    Filter, Intent, Op, Page, Query, Record, Resolution, StoreKey, StoreOptions, Workspace,
};
use futures_util::future::{FutureExt as _, join_all};
use futures_util::stream::StreamExt as _;
use serde_json::json;

use crate::things::{Drawn, IDS, Thing, Things, Users, answer, question};
use crate::{Draw, noise_seeds, world};

const STEPS_MAX: usize = 120;
/// Writes that wait at once.
const WRITES_MAX: usize = 6;
/// How long anything may take before it counts as stuck, all of a run too, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);
/// The workspace's one thing that only marks a place in the order of what is written.
const MARK: &str = "mark";

/// How the engine of a run is opened.
#[derive(Clone, Copy)]
struct Setting {
    backend: BackendKind,
    encrypted: bool,
}

impl Setting {
    fn draw(draw: &mut Draw<'_>) -> Self {
        Self { backend: *draw.of(&[BackendKind::Sled, BackendKind::Redb]), encrypted: draw.one_in(3) }
    }

    async fn open(self, dir: &Path) -> Result<Engine, Error> {
        let mut options = StoreOptions::default().backend(self.backend);
        if self.encrypted {
            options = options.encryption(StoreKey::from_bytes([7; 32]));
        }
        let schema = anabranch::Schema { types: world::schema().types.clone() };
        Engine::builder(dir).schema(schema).assume_role("writer").store(options).open().await
    }
}

/// A live query and what it has shown last.
struct Live {
    query: Query,
    page: Page,
    pages: BoxStream<Result<Page, Error>>,
}

struct Backup {
    dir: PathBuf,
    things: Things,
    at: u64,
}

struct World<'a> {
    scratch: &'a Path,
    setting: Setting,
    dir: PathBuf,
    engine: Engine,
    workspace: Workspace,
    changes: ChangeStream,
    live: Option<Live>,
    backup: Option<Backup>,
    things: Things,
    users: Users,
    /// Calls that wrote, and directories that were made.
    count: u64,
}

/// What must come, and soon.
async fn soon<T>(what: &str, coming: impl Future<Output = T>) -> T {
    match tokio::time::timeout(PATIENCE, coming).await {
        Ok(came) => came,
        Err(_) => panic!("{what} does not come"),
    }
}

impl<'a> World<'a> {
    async fn new(scratch: &'a Path, draw: &mut Draw<'_>) -> Self {
        let users = Users::new(draw.one_in(2));
        let setting = Setting::draw(draw);
        let dir = scratch.join("first");
        let engine = setting.open(&dir).await.expect("a new directory can be opened");
        let workspace = engine.workspace("home").await.expect("a workspace can be opened");
        Self {
            scratch,
            setting,
            dir,
            changes: workspace.changes(),
            engine,
            workspace,
            live: None,
            backup: None,
            things: Things::new(),
            users,
            count: 0,
        }
    }

    /// The engine ends, with or without anybody waiting for it, and is opened again.
    async fn reopen(mut self, waits: bool) -> Self {
        self.live = None;
        if waits {
            self.engine.shutdown().await.expect("an engine can be shut down");
            while soon("the end of a stream of changes", self.changes.next()).await.is_some() {}
            let late =
                self.workspace.write(vec![]).await.expect_err("an engine that was shut down is closed");
            assert_eq!(late.code(), "closed", "{late}");
        }
        let Self { scratch, setting, dir, engine, workspace, changes, backup, things, users, count, .. } =
            self;
        drop((engine, workspace, changes));
        let engine = soon("the store of an engine that was dropped", async {
            loop {
                match setting.open(&dir).await {
                    Ok(engine) => return engine,
                    Err(error) if !waits && error.code() == "in_use" => {
                        // Of the end of an engine that was dropped nobody is told.
                        tokio::time::sleep(Duration::from_millis(1)).await;
                    }
                    Err(error) => panic!("{error}"),
                }
            }
        })
        .await;
        let workspace = engine.workspace("home").await.expect("a workspace can be opened");
        let changes = workspace.changes();
        Self { scratch, setting, dir, engine, workspace, changes, live: None, backup, things, users, count }
    }

    async fn back_up(&mut self) {
        self.count += 1;
        let dir = self.scratch.join(format!("backup-{}", self.count));
        self.engine.backup(&dir, &[]).await.expect("a backup can be made");
        self.backup = Some(Backup { dir, things: self.things.clone(), at: self.count });
    }

    /// The device is lost; what was backed up goes on in another directory.
    async fn restore(mut self) -> Self {
        let Some(backup) = self.backup.take() else { return self };
        self.count += 1;
        let dir = self.scratch.join(format!("restored-{}", self.count));
        restore(&backup.dir, &dir, None, &mut |_, _| {}).expect("a backup can be restored");
        self.engine.shutdown().await.expect("an engine can be shut down");
        self.users.went_back(backup.at);
        Self { dir, things: backup.things, ..self }.reopen(false).await
    }

    /// Waits until everything that tells of a write has told.
    async fn told(&mut self, before: &Things) {
        let differs = |key: &&EntityKey| before.get(key) != self.things.get(key);
        let keys: BTreeSet<&EntityKey> = before.keys().chain(self.things.keys()).collect();
        let mut awaited: BTreeSet<EntityKey> = keys.into_iter().filter(differs).cloned().collect();
        while !awaited.is_empty() {
            match soon(&format!("a change of {awaited:?}"), self.changes.next()).await {
                Some(ChangeEvent::Changed(key)) => drop(awaited.remove(&key)),
                Some(ChangeEvent::Missed) => break,
                None => panic!("the stream of changes has ended"),
            }
        }
        self.compare().await;
        let (things, pending) = (&self.things, self.things.len() as u64);
        let conflicts = things.values().filter(|thing| thing.in_conflict()).count() as u64;
        let mut figures = self.workspace.watch_status();
        let right = async {
            loop {
                let now = figures.next().await.expect("an engine that runs has figures");
                if (now.pending, now.conflicts, now.refused, now.damage) == (pending, conflicts, 0, 0) {
                    break;
                }
            }
        };
        soon(&format!("{pending} pending and {conflicts} conflicts"), right).await;
        if let Some(live) = &mut self.live {
            let right = async {
                while !shows(&live.page, &live.query, things) {
                    live.page = live.pages.next().await.expect("the query lives").expect("and is answered");
                }
            };
            soon("the answer to a live query", right).await;
        }
    }

    /// Forgets what was told before a call.
    fn quiet(&mut self) {
        while self.changes.next().now_or_never().is_some() {}
    }

    fn took(&mut self, drawn: &Drawn, versions: &[String]) {
        let things = &self.things;
        let changed = |(edit, version): &(&Edit, &String)| {
            let known = things.get(&edit.key);
            known != drawn.after.get(&edit.key) && (known.is_some() || !version.is_empty())
        };
        let changes = drawn.edits.iter().zip(versions).filter(changed).count();
        let alone = drawn.edits.len() == 1 || changes == 1;
        let mut after = self.users.wrote(drawn, versions, alone, self.count, &self.things);
        for edit in &drawn.edits {
            match after.remove_entry(&edit.key) {
                Some((key, thing)) => drop(self.things.insert(key, thing)),
                None => drop(self.things.remove(&edit.key)),
            }
        }
    }

    fn answered(&mut self, drawn: &Drawn, result: Result<Vec<String>, Error>) {
        match result {
            Ok(versions) => self.took(drawn, &versions),
            Err(error) => {
                let kinds = [Category::Validation, Category::NotFound, Category::Conflict, Category::Usage];
                assert!(kinds.contains(&error.category()), "{error}: {:?}", drawn.edits);
                assert!(!drawn.possible, "{error}: {:?} was not written", drawn.edits);
            }
        }
    }

    async fn write(&mut self, draw: &mut Draw<'_>) {
        let before = self.things.clone();
        self.quiet();
        self.count += 1;
        let drawn = self.users.edits(&before, draw);
        let result = self.workspace.write(drawn.edits.clone()).await;
        self.answered(&drawn, result);
        self.told(&before).await;
    }

    /// Several, each on what the one before made; none after one that may leave nothing, as a deletion does,
    /// or a first edit that says nothing. Edits that name versions need the answers of those before.
    fn several(&mut self, draw: &mut Draw<'_>, single: bool) -> Vec<Drawn> {
        let most = if self.users.versioned() { 1 } else { 1 + draw.below(WRITES_MAX) };
        let mut all: Vec<Drawn> = Vec::new();
        while all.len() < most {
            let latest =
                all.iter().rev().find(|drawn| drawn.possible).map_or(&self.things, |drawn| &drawn.after);
            let latest = latest.clone();
            let drawn =
                if single { self.users.single(&latest, draw) } else { self.users.edits(&latest, draw) };
            let unsure = drawn.edits.iter().any(|edit| drawn.after[&edit.key].may_leave_nothing(false));
            all.push(drawn);
            if unsure {
                break;
            }
        }
        all
    }

    /// Writes that wait at the same time are made in the order of the calls.
    async fn write_at_once(&mut self, draw: &mut Draw<'_>) {
        let before = self.things.clone();
        self.quiet();
        self.count += 1;
        let all = self.several(draw, false);
        let results = join_all(all.iter().map(|drawn| self.workspace.write(drawn.edits.clone()))).await;
        for (drawn, result) in all.iter().zip(results) {
            self.answered(drawn, result);
        }
        self.told(&before).await;
    }

    /// In bulk: one that fails does not stop the others.
    async fn write_each(&mut self, draw: &mut Draw<'_>) {
        let before = self.things.clone();
        self.quiet();
        self.count += 1;
        let all = self.several(draw, true);
        let edits: Vec<Edit> = all.iter().flat_map(|drawn| drawn.edits.clone()).collect();
        let results = self.workspace.write_each(edits).await.expect("bulk writes are answered one by one");
        assert_eq!(results.len(), all.len());
        for (drawn, result) in all.iter().zip(results) {
            self.answered(drawn, result.map(|version| vec![version]));
        }
        self.told(&before).await;
    }

    /// Nobody waits for the answer of a write: it is made or it is not, as a whole.
    async fn write_and_leave(&mut self, draw: &mut Draw<'_>) {
        let before = self.things.clone();
        self.quiet();
        self.count += 1;
        let drawn = self.users.edits(&before, draw);
        match self.workspace.write(drawn.edits.clone()).now_or_never() {
            Some(result) => self.answered(&drawn, result),
            None => self.made_or_not(&drawn).await,
        }
        self.told(&before).await;
    }

    async fn made_or_not(&mut self, drawn: &Drawn) {
        let key = world::thing(MARK);
        let intents = vec![Intent::Increment { field: "count".into(), by: 1 }];
        let mark = Edit { key: key.clone(), intents, based_on: None, expect: Expect::Any };
        self.workspace.write(vec![mark]).await.expect("a mark can be written");
        let shown = self.shown().await;
        let mut states = self.states(std::slice::from_ref(drawn), &shown);
        for state in &mut states {
            state.entry(key.clone()).or_default().count += 1;
        }
        self.stands_at(states, &shown);
        for edit in &drawn.edits {
            let version = shown.get(&edit.key).map_or("", |record| &record.version);
            self.users.saw(edit, version, self.count, self.things.get(&edit.key));
        }
    }

    /// What there may be if some of these writes were made, in their order.
    fn states(&self, all: &[Drawn], shown: &BTreeMap<EntityKey, Record>) -> Vec<Things> {
        let mut states = vec![self.things.clone()];
        for drawn in all.iter().filter(|drawn| drawn.possible) {
            let before = &states[states.len() - 1];
            let mut after = before.clone();
            for key in drawn.edits.iter().map(|edit| &edit.key) {
                let thing = &drawn.after[key];
                if shown.contains_key(key) || !thing.may_leave_nothing(before.contains_key(key)) {
                    after.insert(key.clone(), thing.clone());
                } else {
                    after.remove(key);
                }
            }
            states.push(after);
        }
        states
    }

    /// Takes what is shown as it is, if it is one of some states: the last that it may be.
    fn stands_at(&mut self, states: Vec<Things>, shown: &BTreeMap<EntityKey, Record>) {
        let wrong: Vec<String> = states.iter().filter_map(|state| differs(shown, state)).collect();
        let state = states.into_iter().rev().find(|state| differs(shown, state).is_none());
        self.things = state.unwrap_or_else(|| panic!("none of what there may be is shown: {wrong:?}"));
    }

    /// Writes are under way while the engine ends, or a backup of it is made. Without versions: nobody sees
    /// any of what these make.
    async fn write_meanwhile(mut self, draw: &mut Draw<'_>) -> Self {
        if self.users.versioned() {
            return self;
        }
        self.count += 1;
        let all = self.several(draw, false);
        for drawn in &all {
            // An answer that is there at once changes nothing of what there may be.
            let _ = self.workspace.write(drawn.edits.clone()).now_or_never();
        }
        if draw.one_in(2) {
            self = self.reopen(draw.one_in(2)).await;
        } else {
            self.back_up().await;
            // It holds some of these writes, which a device restored from it shows.
            self = self.restore().await;
        }
        let shown = self.shown().await;
        self.stands_at(self.states(&all, &shown), &shown);
        self
    }

    async fn resolve(&mut self, draw: &mut Draw<'_>) {
        let before = self.things.clone();
        self.quiet();
        self.count += 1;
        let disputed: Vec<&EntityKey> =
            before.iter().filter(|(_, thing)| thing.in_conflict()).map(|(key, _)| key).collect();
        let any = world::thing(IDS[draw.below(IDS.len())]);
        let key = if disputed.is_empty() || draw.one_in(4) { any } else { (*draw.of(&disputed)).clone() };
        let choice = match draw.below(4) {
            0 => Resolution::Mine,
            1 => Resolution::Theirs,
            2 => Resolution::Side(draw.below(4)),
            _ => Resolution::Value(json!("settled")),
        };
        let thing = self.things.get(&key).filter(|thing| thing.in_conflict());
        // All sides are of this device.
        let value = thing.and_then(|thing| match &choice {
            Resolution::Mine | Resolution::Theirs => None,
            Resolution::Side(number) => sides(thing).get(number.checked_sub(1)?).cloned(),
            Resolution::Value(_) => Some("settled".to_owned()),
        });
        let result = self.workspace.resolve("thing", key.id(), "mine", choice.clone()).await;
        match (value, result) {
            (Some(value), Ok(())) => {
                let mut thing = before[&key].clone();
                self.users.settled(&mut thing, &value);
                self.things.insert(key.clone(), thing.clone());
                let record = self.workspace.get("thing", key.id()).await.expect("things can be read");
                let intents = vec![Intent::Resolve { field: "mine".into(), value: json!(value) }];
                let edit = Edit { key, intents, based_on: None, expect: Expect::Any };
                self.users.saw(&edit, &record.expect("it is there").version, self.count, Some(&thing));
            }
            (None, Err(error)) => {
                let code = if thing.is_some() { "no_such_side" } else { "no_conflict" };
                assert_eq!(error.code(), code, "{error}");
            }
            (value, result) => panic!("{value:?} is to settle {key} by {choice:?}: {result:?}"),
        }
        self.told(&before).await;
    }

    /// Everything, deleted or not, by a query in small pages.
    async fn shown(&self) -> BTreeMap<EntityKey, Record> {
        let mut query =
            Query { type_name: "thing".into(), limit: Some(2), deleted: true, ..Query::default() };
        let mut shown = BTreeMap::new();
        loop {
            let page = self.workspace.query(&query).await.expect("a query is answered");
            for record in page.records {
                let key = world::thing(&record.id);
                assert!(
                    shown.last_key_value().is_none_or(|(last, _)| *last < key),
                    "{key} comes in its turn"
                );
                shown.insert(key, record);
            }
            match page.cursor {
                Some(cursor) => query.after = Some(cursor),
                None => return shown,
            }
        }
    }

    async fn compare(&self) {
        let shown = self.shown().await;
        if let Some(what) = differs(&shown, &self.things) {
            panic!("{what}");
        }
        for (key, record) in &shown {
            let got = self.workspace.get("thing", key.id()).await.expect("things can be read");
            assert_eq!(got.as_ref(), Some(record).filter(|record| !record.deleted), "{key}");
        }
        let open = self.workspace.conflicts().await.expect("conflicts can be read");
        let open: Vec<(String, Vec<String>)> = open
            .into_iter()
            .map(|item| {
                assert_eq!((&*item.field, &*item.kind), ("mine", "manual"), "{item:?}");
                let values = item.sides.iter().map(|side| side.value.as_str().unwrap().to_owned()).collect();
                (item.id, values)
            })
            .collect();
        let disputed = self.things.iter().filter(|(_, thing)| thing.in_conflict());
        let expected: Vec<_> = disputed.map(|(key, thing)| (key.id().to_owned(), sides(thing))).collect();
        assert_eq!(open, expected);
    }

    async fn ask(&mut self, draw: &mut Draw<'_>) {
        let query = question(&self.things, draw);
        let found = self.workspace.query(&query).await.expect("a query is answered");
        assert!(shows(&found, &query, &self.things), "{found:?} answers {query:?}");
        if draw.one_in(2) {
            let mut pages = self.workspace.watch(query.clone());
            let page =
                soon("the first result", pages.next()).await.expect("it lives").expect("it is answered");
            assert!(shows(&page, &query, &self.things), "{page:?} answers {query:?}");
            self.live = Some(Live { query, page, pages });
        }
    }

    async fn verify(&self, draw: &mut Draw<'_>) {
        let verified = self.workspace.verify(draw.one_in(2), |_| {}).await.expect("all can be read");
        assert_eq!(verified.faults, []);
        assert!(verified.entries >= self.things.len() as u64, "{verified:?}");
    }

    /// Calls that make no sense, or none without a relay.
    async fn nonsense(&self, draw: &mut Draw<'_>) {
        let workspace = &self.workspace;
        let text = String::from_utf8_lossy(draw.take(12)).into_owned();
        let number = draw.number();
        let query = Query { type_name: "thing".into(), ..Query::default() };
        let error = match draw.below(12) {
            0 => workspace.get(&format!("no {text}"), "a").await.expect_err("there is no such type"),
            1 => workspace.filter("nothing", &text).expect_err("there is no such type"),
            2 => workspace.retry_refused(number).await.expect_err("nothing was refused"),
            3 => workspace.dismiss(number).await.expect_err("nothing was refused"),
            4 => workspace.sync(Duration::from_millis(number)).await.expect_err("there is no relay"),
            5 => workspace.push_schema(Duration::from_millis(1)).await.expect_err("there is no relay"),
            6 => workspace.fetch_schema(Duration::from_millis(1)).await.expect_err("there is no relay"),
            7 => {
                let order_by = Some((format!("no {text}"), false));
                let query = Query { order_by, ..query };
                workspace.query(&query).await.expect_err("there is no such field")
            }
            8 => {
                let filters = vec![Filter { field: "level".into(), op: Op::Lt, value: json!(text) }];
                workspace.query(&Query { filters, ..query }).await.expect_err("a level is a number")
            }
            9 => {
                let query = Query { after: Some(format!("no {text}")), ..query };
                workspace.query(&query).await.expect_err("no query gave that")
            }
            10 => {
                let found = workspace.resolve("thing", "a", &format!("no {text}"), Resolution::Mine).await;
                found.expect_err("there is no such field")
            }
            _ => self.engine.workspace(&format!("\u{1}{text}")).await.err().expect("that is no name"),
        };
        assert!(!error.to_string().is_empty() && !error.code().is_empty());
        assert_ne!(error.category(), Category::Storage, "{error}");
        // Anything may be an id, and a condition on something that there is.
        let _ = workspace.get("thing", &text).await;
        let _ = workspace.filter("thing", &text);
    }
}

/// The values that compete, the newest first, each once.
fn sides(thing: &Thing) -> Vec<String> {
    let mut sides: Vec<String> = Vec::new();
    for (_, value) in thing.mine.iter().rev() {
        if !sides.contains(value) {
            sides.push(value.clone());
        }
    }
    sides
}

/// Whether a page is the answer to a query.
fn shows(page: &Page, query: &Query, things: &Things) -> bool {
    let answer = answer(things, query);
    let is = |(record, key): (&Record, &EntityKey)| {
        record.id == key.id() && things[key].check(record.deleted, &record.fields).is_ok()
    };
    page.records.len() == answer.len() && page.records.iter().zip(&answer).all(is)
}

/// What is shown and not meant, or meant and not shown.
fn differs(shown: &BTreeMap<EntityKey, Record>, things: &Things) -> Option<String> {
    if !shown.keys().eq(things.keys()) {
        return Some(format!("{:?} are shown, {:?} were meant", shown.keys(), things.keys()));
    }
    shown.iter().find_map(|(key, record)| {
        let checked = things[key].check(record.deleted, &record.fields);
        checked.err().map(|what| format!("{key}: {what}"))
    })
}

async fn story(scratch: &Path, data: &[u8]) {
    let mut draw = Draw::new(data);
    let mut world = World::new(scratch, &mut draw).await;
    for _ in 0..STEPS_MAX {
        if draw.is_empty() {
            break;
        }
        match draw.below(32) {
            0 => world = world.reopen(draw.one_in(2)).await,
            1 => world.back_up().await,
            2 => world = world.restore().await,
            3 => world.verify(&mut draw).await,
            4 | 5 => world.ask(&mut draw).await,
            6 => world.nonsense(&mut draw).await,
            7 => world.resolve(&mut draw).await,
            8 => world = world.write_meanwhile(&mut draw).await,
            9 | 10 => world.write_and_leave(&mut draw).await,
            11..=13 => world.write_each(&mut draw).await,
            14..=17 => world.write_at_once(&mut draw).await,
            _ => world.write(&mut draw).await,
        }
    }
    let world = world.reopen(true).await;
    world.compare().await;
    world.verify(&mut draw).await;
    world.engine.shutdown().await.expect("an engine can be shut down");
}

pub(crate) fn run(data: &[u8]) {
    // Nothing here cuts the power, so a disk would only take longer.
    let memory = Path::new("/dev/shm");
    let scratch = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    runtime.block_on(soon("the end", story(scratch.path(), data)));
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let lengths = [0, 30, 90, 180, 300];
    let seeds = noise_seeds(&lengths).into_iter();
    // Of each, on either store, one that names versions.
    let ways = [[0, 0], [0, 1], [1, 0], [1, 1]];
    seeds.flat_map(|seed| ways.map(|way| [&way[..], &seed].concat())).collect()
}
