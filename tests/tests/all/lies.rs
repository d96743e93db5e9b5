//! A device and a relay that lies: the test speaks for the relay. The device takes no harm, keeps what it
//! wrote, and says what is wrong where nothing goes on.

use std::sync::Arc;

use anabranch_core::id::{EntityKey, STORE_LIVES_FORGOTTEN_MAX, WorkspaceId};
use anabranch_core::replica::{ChannelState, Held};
use anabranch_core::rows::Rows;
use anabranch_core::schema::Schema;
use anabranch_core::session::{ClientSession, Event, SessionError};
use anabranch_core::wire::{
    Ack, CaughtUp, EntityChanges, FaultCode, Feed, FeedBody, FeedEntry, Granted, Message, Open, Refused,
    Unit, VERSION_MAX, Welcome, WireError,
};
use serde_json::json;

use crate::channel::{Line, grant};
use crate::faults::{START, THINGS, granted, set};

/// A device that has written `mine`, and a relay that has let it in and not answered yet.
fn listening() -> Line {
    let mut line = Line::begin(THINGS);
    line.write("mine", &[set("name", json!("kept"))]);
    line.flush();
    line.replica.connect(1, None);
    line.receive(granted());
    line.flush();
    line
}

fn page(entries: impl IntoIterator<Item = (u64, FeedBody)>) -> Feed {
    let entries = entries.into_iter().map(|(seq, body)| FeedEntry { seq, body }).collect();
    Feed { channel: 1, entries, end: u64::MAX }
}

fn someone() -> FeedBody {
    FeedBody::Device { key: [8; 32], name: "phone".into(), platform: "test".into() }
}

fn caught_up(cursor: u64, digest: [u8; 32]) -> CaughtUp {
    CaughtUp { channel: 1, epoch: [1; 16], cursor, digest }
}

fn refusal(id: &str, hash: [u8; 32]) -> Refused {
    Refused { type_name: "thing".into(), id: id.into(), hash, code: 1, message: "no".into() }
}

fn opens(sent: &[Message]) -> Vec<Open> {
    let open = |sent: &Message| if let Message::Open(open) = sent { Some(open.clone()) } else { None };
    sent.iter().filter_map(open).collect()
}

fn rows(line: &Line) -> Rows {
    let schema = Arc::new(Schema::parse(THINGS, "test.toml").unwrap());
    Rows::new(line.store.clone(), schema, &WorkspaceId::new("home").unwrap())
}

#[track_caller]
fn says(line: &Line, what: &str) {
    match line.replica.channel_state() {
        ChannelState::Faulted { code: FaultCode::Protocol, message } if message.contains(what) => {}
        other => panic!("{other:?}"),
    }
}

/// What the device wrote is shown as it was, counts as refused by nobody, and goes to a relay that keeps to
/// the protocol.
#[track_caller]
fn keeps_its_edit(mut line: Line) {
    line.replica.disconnect();
    line.sent();
    line.replica.connect(1, None);
    let sent = line.sent();
    let Open { cursor, digest, .. } = opens(&sent).remove(0);
    line.receive(grant());
    line.receive(caught_up(cursor, digest));
    line.flush();
    let sent: Vec<String> =
        line.units().into_iter().flat_map(|unit| unit.unit.entities).map(|part| part.id).collect();
    assert_eq!(sent, ["mine"]);
    let row = rows(&line).get(&EntityKey::new("thing", "mine").unwrap()).unwrap().unwrap();
    assert_eq!(row.fields["name"], json!("kept"));
    assert_eq!(rows(&line).refused().unwrap(), []);
}

#[test]
fn a_feed_with_a_gap_is_not_taken_for_whole() {
    for (entries, missing) in [
        (vec![(1, someone()), (3, someone()), (2, someone())], "entry 2 has not come"),
        (vec![(5, someone())], "entry 1 has not come"),
        (vec![(u64::MAX, someone())], "entry 1 has not come"),
    ] {
        let mut line = listening();
        line.receive(page(entries));
        says(&line, missing);
        // What comes after it makes it no better.
        line.receive(caught_up(3, [0; 32]));
        says(&line, missing);
        keeps_its_edit(line);
    }
    let mut line = listening();
    line.receive(page([(0, someone()), (1, someone()), (1, someone()), (2, someone())]));
    line.receive(page([(1, someone())]));
    line.receive(caught_up(2, [0; 32]));
    assert_eq!(*line.replica.channel_state(), ChannelState::Live, "what it has already it passes over");
    keeps_its_edit(line);
}

#[test]
fn a_cursor_that_jumps_is_no_end_of_the_feed() {
    for cursor in [2, u64::MAX] {
        let mut line = listening();
        line.receive(page([(1, someone())]));
        line.receive(caught_up(cursor, [0; 32]));
        says(&line, "entry 2 has not come");
        keeps_its_edit(line);
    }
    // One of another life of the relay is none at all.
    let mut line = listening();
    line.receive(CaughtUp { epoch: [9; 16], ..caught_up(u64::MAX, [0; 32]) });
    assert!(matches!(line.replica.channel_state(), ChannelState::CatchingUp { .. }));
    keeps_its_edit(line);
}

/// While the feed is read anew, what was asked for before may still come, after another sign-in too.
#[test]
fn entries_of_an_earlier_request_are_no_gap() {
    for signs_in_again in [false, true] {
        let mut line = listening();
        line.receive(page((1..=3).map(|seq| (seq, someone()))));
        line.sent();
        line.receive(caught_up(3, [9; 32]));
        assert_eq!(opens(&line.sent()).iter().map(|open| open.cursor).collect::<Vec<_>>(), [0]);
        if signs_in_again {
            line.refused(FaultCode::TokenExpired);
            line.replica.refresh("new".into());
            line.receive(granted());
        }
        line.receive(page([(4, someone())]));
        line.receive(caught_up(4, [9; 32]));
        assert!(matches!(line.replica.channel_state(), ChannelState::CatchingUp { .. }));
        // With its first entry the new answer has begun.
        line.receive(page((1..=2).map(|seq| (seq, someone()))));
        line.receive(page([(4, someone())]));
        says(&line, "entry 3 has not come");
        keeps_its_edit(line);
    }
}

#[test]
fn answers_to_units_that_were_never_sent_mean_nothing() {
    let mut line = listening();
    let unit = line.units().remove(0);
    let hash = anabranch_core::change::Change::parse(&unit.unit.entities[0].changes[0]).unwrap().hash().0;
    for unit_id in [unit.unit_id + 1, u64::MAX] {
        line.receive(Ack { channel: 1, unit_id, seq: u64::MAX, refused: Vec::new() });
        line.receive(Ack { channel: 1, unit_id, seq: u64::MAX, refused: vec![refusal("mine", hash)] });
    }
    line.receive(caught_up(0, [0; 32]));
    assert_eq!(*line.replica.channel_state(), ChannelState::Live);
    assert!(!line.replica.is_complete(), "the unit was not answered");
    keeps_its_edit(line);
    // To one that was: refusals of what was not in it.
    let mut line = listening();
    let unit_id = line.units()[0].unit_id;
    let refused = vec![refusal("mine", [9; 32]), refusal("other", [9; 32])];
    line.receive(Ack { channel: 1, unit_id, seq: 1, refused });
    line.flush();
    assert_eq!(rows(&line).refused().unwrap(), []);
}

/// Of the last life there is none after it: what the device wrote in it twice could not be told apart.
#[test]
fn a_life_that_the_device_cannot_have_had_is_not_believed() {
    for incarnation in [u32::MAX, u32::MAX - 1, STORE_LIVES_FORGOTTEN_MAX + 1] {
        let mut line = Line::begin(THINGS);
        line.write("mine", &[set("name", json!("kept"))]);
        line.flush();
        line.replica.connect(1, None);
        for _ in 0..3 {
            line.receive(Granted { behind: true, incarnation, ..grant() });
            says(&line, &format!("had {incarnation} lives"));
        }
        line.flush();
        assert_eq!(line.units(), []);
        line.replica.connect(1, None);
        assert_eq!(line.sign_ins().last().unwrap().incarnation, 0);
        keeps_its_edit(line);
    }
    let mut line = Line::begin(THINGS);
    line.replica.connect(1, None);
    line.receive(Granted { behind: true, incarnation: STORE_LIVES_FORGOTTEN_MAX, ..grant() });
    line.flush();
    line.replica.connect(1, None);
    assert_eq!(line.sign_ins().last().unwrap().incarnation, STORE_LIVES_FORGOTTEN_MAX + 1);
}

#[test]
fn a_digest_that_stays_wrong_is_told_and_asked_about_once() {
    let mut line = listening();
    let unit_id = line.units()[0].unit_id;
    for round in 0..5 {
        line.receive(caught_up(0, [9; 32]));
        line.flush();
        assert_eq!(opens(&line.sent()).len(), usize::from(round == 0), "round {round}");
    }
    assert_eq!(*line.replica.channel_state(), ChannelState::Live);
    line.receive(Ack { channel: 1, unit_id: unit_id + 1, seq: 0, refused: Vec::new() });
    line.receive(Ack { channel: 1, unit_id, seq: 0, refused: Vec::new() });
    line.receive(caught_up(0, [9; 32]));
    assert_eq!(line.replica.held().unwrap(), Some(Held::Diverged));
    let mut line = listening();
    line.receive(caught_up(0, [9; 32]));
    line.receive(caught_up(0, [9; 32]));
    keeps_its_edit(line);
}

#[test]
fn refusals_of_what_the_device_never_had_mean_nothing() {
    let mut line = listening();
    let odd = |type_name: &str, id: &str| Refused {
        type_name: type_name.into(),
        id: id.into(),
        ..refusal("", [9; 32])
    };
    let refusals = [
        refusal("mine", [9; 32]),
        refusal("never", [9; 32]),
        odd("", ""),
        odd("nothing", "n"),
        odd("thing", ""),
    ];
    line.receive(page((1..).zip(refusals.map(FeedBody::Refused))));
    line.receive(caught_up(5, [0; 32]));
    assert_eq!(*line.replica.channel_state(), ChannelState::Live);
    keeps_its_edit(line);
}

/// To take it out would lose it: what was admitted is not written again.
#[test]
fn a_refusal_of_what_the_relay_admitted_is_not_believed() {
    let mut line = listening();
    let part = line.units().remove(0).unit.entities.remove(0);
    let change = anabranch_core::change::Change::parse(&part.changes[0]).unwrap();
    let whole = FeedBody::Changes { author: [1; 32], unit: Unit { entities: vec![part] } };
    let own = FeedBody::Own(vec![("thing".into(), "mine".into(), vec![change.hash().0])]);
    let takes_back = || FeedBody::Refused(refusal("mine", change.hash().0));
    line.receive(page([(1, own)]));
    line.receive(page([(2, takes_back())]));
    line.flush();
    let asked = opens(&line.sent());
    assert_eq!((asked.len(), asked[0].cursor, asked[0].full), (1, 0, true), "the relay may have gone back");
    for _ in 0..3 {
        line.receive(page([(1, whole.clone()), (2, takes_back())]));
    }
    line.flush();
    assert_eq!(opens(&line.sent()), []);
    let row = rows(&line).get(&EntityKey::new("thing", "mine").unwrap()).unwrap().unwrap();
    assert_eq!(row.fields["name"], json!("kept"));
    assert_eq!(rows(&line).refused().unwrap(), []);
}

/// Which it will not show: the device would ask for ever.
#[test]
fn own_changes_that_the_relay_keeps_back_are_asked_for_a_few_times() {
    let mut line = listening();
    line.sent();
    let own = || FeedBody::Own(vec![("thing".into(), "lost".into(), vec![[9; 32]])]);
    let mut asked = 0;
    for _ in 0..100 {
        line.receive(page([(1, own())]));
        asked += opens(&line.sent()).len();
    }
    assert_eq!(asked, 16);
    says(&line, "entry 1");
    keeps_its_edit(line);
}

#[test]
fn changes_that_are_none_are_passed_over() {
    let mut line = listening();
    let part = |id: &str, changes: Vec<Vec<u8>>| EntityChanges {
        type_name: "thing".into(),
        id: id.into(),
        genesis: vec![("nothing".into(), 200)],
        changes,
        signature: vec![7; 9],
    };
    let noise = |id: &str| FeedBody::Changes {
        author: [1; 32],
        unit: Unit { entities: vec![part(id, vec![vec![], vec![0x85, 0x6f, 0x4a, 0x83], vec![7; 300]])] },
    };
    line.receive(page((1..).zip([noise("mine"), noise("other"), noise("")])));
    line.receive(caught_up(3, [0; 32]));
    keeps_its_edit(line);
}

/// With a reason, and before the device gets to see any of it.
#[test]
fn entries_of_no_known_kind_end_the_link() {
    let (mut session, _) = ClientSession::start(START, "test");
    let welcome = Welcome {
        version: VERSION_MAX,
        software: "test".into(),
        wall_ms: START.wall.0,
        features_required: 0,
        features: 0,
    };
    assert!(matches!(session.receive(START, &Message::from(welcome).encode()), Ok(Event::Ready { .. })));
    let known = page([(1, FeedBody::Schema { hash: [1; 32] })]);
    let mut bytes = Message::from(known).encode();
    assert_eq!(bytes[2..6], [1, 1, 1, 4], "channel, entries, place, kind");
    bytes[5] = 5;
    let event = session.receive(START, &bytes);
    assert!(matches!(event, Err(SessionError::Wire(WireError::Malformed(_)))), "{event:?}");
}
