//! A device's end of a channel, held to what it says: the test speaks for the relay.

use std::sync::Arc;

use anabranch_core::change::Change;
use anabranch_core::clock::{Now, WallMs};
use anabranch_core::id::EntityKey;
use anabranch_core::intent::Intent;
use anabranch_core::replica::{ChannelState, Edit, Held, Output, Replica};
use anabranch_core::store::CommitNo;
use anabranch_core::wire::{
    Ack, CaughtUp, Changes, Fault, FaultCode, Feed, FeedBody, FeedEntry, FetchSchema, Grant, GrantRole,
    Granted, Message, PushSchema, Refresh, SchemaIs, SignIn,
};
use anabranch_store::{MemoryStore, Store};
use serde_json::json;

use crate::faults::{START, THINGS, alone, edit, granted, set};

/// A replica, and the disk that the test flushes.
pub(crate) struct Line {
    pub(crate) store: Arc<MemoryStore>,
    pub(crate) replica: Replica,
    now: Now,
}

impl Line {
    pub(crate) fn begin(source: &str) -> Self {
        let store = Arc::new(MemoryStore::manual());
        Self { replica: Replica::open(store.clone(), alone(source)).unwrap(), store, now: START }
    }

    fn pass(&mut self, ms: u64) {
        self.now = Now { mono: self.now.mono + ms, wall: WallMs(self.now.wall.0 + ms) };
    }

    pub(crate) fn write(&mut self, id: &str, intents: &[Intent]) {
        self.replica.write(self.now, &[edit(id, intents)], true).unwrap();
    }

    pub(crate) fn receive(&mut self, message: impl Into<Message>) {
        self.replica.receive(self.now, message.into()).unwrap();
    }

    pub(crate) fn refused(&mut self, code: FaultCode) {
        self.receive(Fault { channel: Some(1), code: code as u16, message: "no".into() });
    }

    /// The disk catches up with what is queued now, and not with what follows from that.
    fn flush_once(&mut self) {
        let commit = self.replica.last_commit();
        self.store.make_durable(commit).unwrap();
        self.replica.durable(commit).unwrap();
    }

    pub(crate) fn flush(&mut self) {
        while self.store.durable().unwrap() < self.replica.last_commit() {
            self.flush_once();
        }
    }

    fn outputs(&mut self) -> Vec<Output> {
        std::iter::from_fn(|| self.replica.poll_output()).collect()
    }

    /// What was sent since the last look.
    pub(crate) fn sent(&mut self) -> Vec<Message> {
        let outputs = self.outputs().into_iter();
        let bytes =
            outputs.filter_map(|output| if let Output::Send(bytes) = output { Some(bytes) } else { None });
        bytes.map(|bytes| Message::decode(&bytes).unwrap().unwrap()).collect()
    }

    pub(crate) fn sign_ins(&mut self) -> Vec<SignIn> {
        let sent = self.sent().into_iter();
        sent.filter_map(|sent| if let Message::SignIn(sign_in) = sent { Some(sign_in) } else { None })
            .collect()
    }

    pub(crate) fn units(&mut self) -> Vec<Changes> {
        let sent = self.sent().into_iter();
        sent.filter_map(|sent| if let Message::Changes(unit) = sent { Some(unit) } else { None }).collect()
    }
}

pub(crate) fn grant() -> Granted {
    let Message::Granted(granted) = granted() else { unreachable!() };
    granted
}

/// By the number of changes sent the relay knows a store that went back; by the number of a unit the
/// device knows an answer that comes late.
#[test]
fn a_sign_in_counts_what_was_durably_sent_and_units_are_numbered_on() {
    let mut line = Line::begin(THINGS);
    assert_eq!(line.replica.relay_schema(), None);
    line.replica.connect(1, None);
    assert_eq!(*line.replica.channel_state(), ChannelState::SigningIn);
    line.receive(granted());
    assert_eq!(line.replica.relay_schema(), Some([1; 32]));
    for id in ["a", "b", "c"] {
        line.write(id, &[set("name", json!(id))]);
        line.flush();
    }
    let newest = line.units().iter().map(|unit| unit.unit_id).max().unwrap();
    // Marked as sent; the mark is not durable, so it has not left. Nor has what is not even marked.
    line.write("d", &[set("name", json!("d"))]);
    line.flush_once();
    line.write("e", &[set("name", json!("e"))]);
    assert_eq!(line.units(), []);

    line.replica.disconnect();
    assert_eq!(*line.replica.channel_state(), ChannelState::Offline);
    line.replica.connect(1, None);
    assert_eq!(line.sign_ins()[0].sent, 3);
    line.receive(granted());
    let again = line.units();
    let ids: Vec<&str> = again.iter().flat_map(|unit| &unit.unit.entities).map(|part| &*part.id).collect();
    assert_eq!(ids, ["a", "b", "c"], "what was durable goes again at once");
    assert!(again.iter().all(|unit| unit.unit_id > newest), "{newest} is no number of these: {again:?}");
}

/// What it writes from then on must not be taken for what it wrote before.
#[test]
fn a_device_that_the_relay_knows_further_on_begins_a_new_incarnation() {
    let mut line = Line::begin(THINGS);
    line.replica.connect(1, None);
    line.receive(Granted { behind: true, incarnation: 4, ..grant() });
    line.flush();
    line.sent();
    line.replica.disconnect();
    line.replica.connect(1, None);
    assert_eq!(line.sign_ins()[0].incarnation, 5);
}

#[test]
fn what_waits_is_dated_by_the_clock_as_the_newest_sign_in_knows_it() {
    const HOUR_MS: i64 = 3_600_000;
    let mut line = Line::begin(THINGS);
    line.write("a", &[set("name", json!("a"))]);
    for ahead_ms in [HOUR_MS, -HOUR_MS] {
        line.replica.disconnect();
        line.replica.connect(1, None);
        line.replica.relay_clock_is(START, ahead_ms);
        line.receive(granted());
    }
    line.flush();
    let unit = line.units().remove(0).unit;
    let change = Change::parse(&unit.entities[0].changes[0]).unwrap();
    assert_eq!(change.time().wall().0 as i64 - START.wall.0 as i64, -HOUR_MS);
}

/// Devices that were refused together must not come back together, nor for ever at the same pace.
#[test]
fn a_refusal_that_time_mends_is_followed_by_ever_longer_waits() {
    let mut line = Line::begin(THINGS);
    line.replica.connect(1, Some("token".into()));
    let wait = |line: &mut Line| {
        line.sent();
        line.refused(FaultCode::ShuttingDown);
        assert!(matches!(line.replica.channel_state(), ChannelState::Faulted { .. }));
        let wait_ms = line.replica.next_wakeup().unwrap().0 - line.now.mono.0;
        line.pass(wait_ms - 1);
        line.replica.tick(line.now);
        assert_eq!(line.sign_ins(), [], "not before");
        line.pass(1);
        line.replica.tick(line.now);
        assert_eq!(line.replica.next_wakeup(), None);
        wait_ms
    };
    let mut shares = Vec::new();
    for longest_ms in [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300, 300].map(|seconds| seconds * 1_000) {
        let wait_ms = wait(&mut line);
        assert!((longest_ms / 2..=longest_ms).contains(&wait_ms), "{wait_ms} of {longest_ms}");
        assert_eq!(line.sign_ins()[0].token.as_deref(), Some("token"));
        shares.push(wait_ms * 100 / longest_ms);
    }
    // From the half to the whole of it.
    assert!(shares.iter().any(|share| *share < 70) && shares.iter().any(|share| *share > 80), "{shares:?}");
    line.receive(granted());
    line.receive(Ack { channel: 1, unit_id: 99, seq: 0, refused: Vec::new() });
    assert!(wait(&mut line) <= 1_000, "the relay had answered: a row of refusals begins anew");
}

#[test]
fn a_refusal_that_time_does_not_mend_stays_until_somebody_brings_a_token() {
    let mut line = Line::begin(THINGS);
    line.replica.refresh("early".into());
    assert_eq!(line.sent(), [], "without a link nothing is sent");
    line.replica.connect(1, Some("old".into()));
    line.receive(granted());
    line.sent();
    line.replica.refresh("in time".into());
    assert_eq!(line.sent(), [Refresh { channel: 1, token: "in time".into() }.into()]);
    line.refused(FaultCode::TokenExpired);
    // What was asked in the same breath.
    line.refused(FaultCode::NotSignedIn);
    let refused = ChannelState::Faulted { code: FaultCode::TokenExpired, message: "no".into() };
    assert_eq!((line.replica.channel_state(), line.replica.next_wakeup()), (&refused, None));
    line.write("a", &[set("name", json!("a"))]);
    line.flush();
    assert_eq!(line.units(), [], "nothing leaves meanwhile");
    line.replica.refresh("new".into());
    assert_eq!(line.sign_ins()[0].token.as_deref(), Some("new"));
    line.refused(FaultCode::TokenExpired);
    line.replica.disconnect();
    assert_eq!(*line.replica.channel_state(), refused, "why stays visible");
}

/// Signing in again on a link that stands measures no clock.
#[test]
fn a_clock_that_is_unsure_stays_so_until_the_next_handshake() {
    let mut line = Line::begin(THINGS);
    line.replica.connect(1, None);
    line.replica.relay_clock_is(START, 0);
    let reconnects = |line: &mut Line| {
        line.outputs();
        line.refused(FaultCode::Quota);
        let wakeup = line.replica.next_wakeup().unwrap();
        line.pass(wakeup.0 - line.now.mono.0);
        line.replica.tick(line.now);
        line.outputs().into_iter().filter(|output| *output == Output::Reconnect).count()
    };
    assert_eq!(reconnects(&mut line), 0);
    line.now.wall.0 += 60_000;
    assert_eq!([reconnects(&mut line), reconnects(&mut line)], [1, 0]);
    line.receive(granted());
    line.write("a", &[set("name", json!("a"))]);
    line.flush();
    assert_eq!(line.units(), []);
    let now = line.now;
    line.replica.relay_clock_is(now, 0);
    line.replica.durable(CommitNo(0)).unwrap();
    line.flush();
    assert_eq!(line.units().len(), 1);
}

#[test]
fn a_schema_is_brought_unasked_only_by_who_may_and_where_there_is_none() {
    for (role, schema, brings) in [
        (GrantRole::Writer, [0; 32], false),
        (GrantRole::Authority, [1; 32], false),
        (GrantRole::Authority, [0; 32], true),
        (GrantRole::Admin, [0; 32], true),
    ] {
        let mut line = Line::begin(THINGS);
        line.replica.connect(1, None);
        let granted = grant();
        line.receive(Granted { schema, grant: Grant { role: role.code(), ..granted.grant }, ..granted });
        let brought = line.sent().iter().any(|sent| matches!(sent, Message::PushSchema(_)));
        assert_eq!(brought, brings, "{role:?} where the relay has {schema:?}");
    }
}

#[test]
fn schemas_are_pushed_and_fetched_and_answers_kept_in_order() {
    let mut line = Line::begin(THINGS);
    line.replica.connect(1, None);
    line.receive(granted());
    line.sent();
    line.replica.exchange_schema(true);
    line.replica.exchange_schema(false);
    let asked: [Message; 2] =
        [PushSchema { channel: 1, source: THINGS.into() }.into(), FetchSchema { channel: 1 }.into()];
    assert_eq!(line.sent(), asked);
    assert_eq!(line.replica.take_schema_answer(), None);
    let refused =
        SchemaIs { channel: 1, hash: [2; 32], source: None, problems: vec!["it lacks a field".into()] };
    let none = SchemaIs { hash: [0; 32], problems: Vec::new(), ..refused.clone() };
    let newer = SchemaIs { hash: [3; 32], ..none.clone() };
    for (answer, known) in [(&refused, [1; 32]), (&none, [1; 32]), (&newer, [3; 32])] {
        line.receive(answer.clone());
        assert_eq!(line.replica.relay_schema(), Some(known));
    }
    let taken: Vec<SchemaIs> = std::iter::from_fn(|| line.replica.take_schema_answer()).collect();
    assert_eq!(taken, [refused, none, newer]);
}

/// An older schema might refuse what was written by one that the relay lost.
#[test]
fn what_waits_for_a_lost_schema_leaves_as_soon_as_another_comes() {
    let (older, lost, newer) = ([1; 32], [2; 32], [3; 32]);
    let feed = |hashes: &[[u8; 32]]| {
        let entry = |(seq, hash): (u64, &[u8; 32])| FeedEntry { seq, body: FeedBody::Schema { hash: *hash } };
        Feed { channel: 1, entries: (1..).zip(hashes).map(entry).collect(), end: hashes.len() as u64 }
    };
    let caught_up =
        |life: u8, cursor: u64| CaughtUp { channel: 1, epoch: [life; 16], cursor, digest: [0; 32] };
    for (held, waits) in [(&[older][..], true), (&[older, lost, older], false)] {
        let mut line = Line::begin(THINGS);
        line.replica.connect(1, None);
        line.receive(Granted { schema: older, ..grant() });
        line.receive(caught_up(1, 0));
        line.receive(SchemaIs { channel: 1, hash: lost, source: None, problems: Vec::new() });
        line.replica.disconnect();
        line.write("a", &[set("name", json!("a"))]);
        line.replica.connect(1, None);
        line.receive(Granted { schema: older, epoch: [2; 16], ..grant() });
        line.receive(feed(held));
        line.receive(caught_up(2, held.len() as u64));
        line.flush();
        assert_eq!(line.units().is_empty(), waits, "the feed has {held:?}");
        if waits {
            assert_eq!(line.replica.held().unwrap(), Some(Held::SchemaLost));
            let FeedEntry { body, .. } = feed(&[newer]).entries.remove(0);
            line.receive(Feed { channel: 1, entries: vec![FeedEntry { seq: 2, body }], end: 2 });
            line.flush();
            assert_eq!(line.units().len(), 1);
        }
    }
}

/// One round trip for each edit would take a device that was away for long hours to come back.
#[test]
fn a_backlog_travels_in_few_units_that_are_not_too_large() {
    let mut line = Line::begin(THINGS);
    let small = 600;
    for n in 0..small {
        line.write(&format!("small-{n:03}"), &[set("name", json!("a"))]);
    }
    for n in 0..40 {
        line.write(&format!("wide-{n:03}"), &[set("name", json!("x".repeat(100 * 1024)))]);
    }
    line.replica.connect(1, None);
    line.flush();
    line.receive(granted());
    line.flush();
    let units = line.units();
    let sizes: Vec<usize> = units.iter().map(|unit| unit.unit.entities.len()).collect();
    // Until answers come no more than 16 units are under way.
    assert_eq!(sizes, [&[256, 256, 90][..], &[2; 13]].concat());
    let ids: Vec<&str> = units.iter().flat_map(|unit| &unit.unit.entities).map(|part| &*part.id).collect();
    assert!(ids.is_sorted(), "the oldest first");
    line.receive(Ack { channel: 1, unit_id: units[0].unit_id, seq: 1, refused: Vec::new() });
    line.flush();
    assert_eq!(line.units().len(), 1);
}

/// The relay takes no unit above its bound, however much one entity has.
#[test]
fn what_one_entity_has_pending_is_cut_into_units_too() {
    let mut line = Line::begin(THINGS);
    for n in 0..10 {
        line.write("a", &[set("name", json!(n.to_string().repeat(100 * 1024)))]);
    }
    line.flush();
    line.replica.connect(1, None);
    line.receive(granted());
    let mut sizes = Vec::new();
    loop {
        line.flush();
        let Some(unit) = line.units().pop() else { break };
        sizes.push(unit.unit.entities[0].changes.len());
        line.receive(Ack { channel: 1, unit_id: unit.unit_id, seq: sizes.len() as u64, refused: Vec::new() });
    }
    assert_eq!(sizes, [2; 5]);
}

/// After a start too, when nothing of the parents is in memory.
#[test]
fn a_child_waits_for_a_parent_that_the_relay_lacks_and_not_for_an_edit_of_one_that_it_has() {
    let mut line = Line::begin(THINGS);
    line.replica.connect(1, None);
    line.receive(granted());
    line.write("known", &[set("name", json!("a"))]);
    line.flush();
    let unit_id = line.units()[0].unit_id;
    line.receive(Ack { channel: 1, unit_id, seq: 1, refused: Vec::new() });
    line.replica.disconnect();
    line.write("known", &[set("name", json!("b"))]);
    line.write("child", &[set("parent", json!("known"))]);
    line.write("orphan", &[set("parent", json!("new"))]);
    line.write("new", &[set("name", json!("a"))]);
    line.flush();

    let store = Arc::new(line.store.reopen());
    let replica = Replica::open(store.clone(), alone(THINGS)).unwrap();
    let mut line = Line { store, replica, now: line.now };
    line.replica.connect(1, None);
    line.receive(granted());
    let mut gone: Vec<Vec<String>> = Vec::new();
    for seq in 2..4 {
        line.flush();
        let units = line.units();
        gone.push(units.iter().flat_map(|unit| &unit.unit.entities).map(|part| part.id.clone()).collect());
        for unit in units {
            line.receive(Ack { channel: 1, unit_id: unit.unit_id, seq, refused: Vec::new() });
        }
    }
    assert_eq!(gone, [vec!["known", "child", "new"], vec!["orphan"]]);
}

/// What is in flight of a member is not sent a second time beside it; and a child that is older than its
/// parent holds nobody back.
#[test]
fn a_transaction_waits_for_what_is_in_flight_of_its_members_and_for_no_child() {
    let mut line = Line::begin(THINGS);
    line.replica.connect(1, None);
    line.receive(granted());
    let gone = |line: &mut Line| {
        line.flush();
        let units = line.units();
        let parts = units.iter().flat_map(|unit| &unit.unit.entities);
        let parts: Vec<String> = parts.map(|part| format!("{} {}", part.id, part.changes.len())).collect();
        (parts, units.last().map(|unit| unit.unit_id))
    };
    let ack = |line: &mut Line, unit: Option<u64>, seq: u64| {
        line.receive(Ack { channel: 1, unit_id: unit.unwrap(), seq, refused: Vec::new() });
    };
    let name = [set("name", json!("a"))];
    line.write("a", &name);
    let (first, unit) = gone(&mut line);
    assert_eq!(first, ["a 1"]);
    line.write("child", &[set("parent", json!("b"))]);
    let both = [edit("a", &[set("name", json!("b"))]), edit("b", &name)];
    line.replica.write(line.now, &both, true).unwrap();
    assert_eq!(gone(&mut line).0, [""; 0]);
    ack(&mut line, unit, 1);
    let (second, unit) = gone(&mut line);
    assert_eq!(second, ["a 1", "b 1"]);
    ack(&mut line, unit, 2);
    assert_eq!(gone(&mut line).0, ["child 1"]);
}

#[test]
fn what_its_schema_puts_first_is_sent_first() {
    let urgent = THINGS.replace("[thing", "[alert").replace("version = 1", "version = 1\npriority = 9");
    let late = THINGS.replace("[thing", "[trace").replace("version = 1", "version = 1\npriority = -9");
    let mut line = Line::begin(&[THINGS, &late, &urgent].concat());
    for name in ["trace", "thing", "alert", "thing"] {
        let key = EntityKey::new(name, "a").unwrap();
        let edit = Edit { key, ..edit("a", &[set("name", json!("a"))]) };
        line.replica.write(line.now, &[edit], true).unwrap();
    }
    line.flush();
    line.replica.connect(1, None);
    line.receive(granted());
    line.flush();
    let units = line.units();
    let types: Vec<&str> =
        units.iter().flat_map(|unit| &unit.unit.entities).map(|part| &*part.type_name).collect();
    assert_eq!(types, ["alert", "thing", "trace"]);
}
