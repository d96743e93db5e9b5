//! The relay's decisions, told as stories: who gets in, what is taken, who hears of it.

// In a test a panic is the report.
#![allow(clippy::unwrap_used)]

mod support;

use std::collections::{BTreeMap, BTreeSet};

use anabranch_core::admission::RefusalCode;
use anabranch_core::change::{Change, Note};
use anabranch_core::genesis::GenesisKind;
use anabranch_core::id::{Author, Incarnation, STORE_LIFE_MAX};
use anabranch_core::relay::{Input, Output, RelayConfig, verify};
use anabranch_core::store::{Batch, Keyspace, Store as _, View};
use anabranch_core::wire::*;
use proptest::prelude::*;
use support::*;

// ── Sessions ──────────────────────────────────────────────────────────────────────────────

#[test]
fn hello_is_answered_with_the_version_that_both_speak() {
    let mut world = World::strict();
    let conn = world.greet(&Device::new(1));
    match &world.inbox(conn)[..] {
        [Message::Welcome(welcome)] => assert_eq!((welcome.version, welcome.wall_ms), (1, START.0)),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_device_without_a_common_version_or_feature_is_told_and_closed() {
    for hello in [
        Hello { version_min: 2, version_max: 9, ..hello() },
        Hello { version_min: 0, version_max: 0, ..hello() },
        Hello { features_required: 4, ..hello() },
    ] {
        let mut world = World::strict();
        let conn = world.connect(&Device::new(1));
        world.send(conn, hello);
        closed_with(&mut world, conn, FaultCode::Incompatible);
    }
}

/// The connection was told why and closed, and nothing else.
#[track_caller]
fn closed_with(world: &mut World, conn: anabranch_core::relay::ConnId, code: FaultCode) {
    let outputs = world.outputs(conn);
    match &outputs[..] {
        [Output::Send { bytes, .. }, Output::Close { code: closed, .. }] => {
            let told = [Message::decode(bytes).unwrap().unwrap()];
            assert_eq!(faults(&told), [(None, code)]);
            assert_eq!(*closed, code);
        }
        other => panic!("{other:?}"),
    }
    world.send(conn, hello());
    assert_eq!(world.outputs(conn), [], "nothing more is taken");
}

#[test]
fn what_breaks_the_protocol_closes_the_connection() {
    let before: [Vec<u8>; 4] = [Message::from(sign_in(None)).encode(), vec![], vec![1, 1, 255], vec![200, 0]];
    for bytes in before {
        let mut world = World::strict();
        let conn = world.connect(&Device::new(1));
        world.handle(Input::Received { conn, bytes });
        closed_with(&mut world, conn, FaultCode::Protocol);
    }
    let done = CaughtUp { channel: 1, epoch: [0; 16], cursor: 0, digest: [0; 32] };
    for message in [Message::from(hello()), Message::from(done)] {
        let mut world = World::strict();
        let conn = world.greet(&Device::new(1));
        world.outputs(conn);
        world.send(conn, message);
        closed_with(&mut world, conn, FaultCode::Protocol);
    }
}

#[test]
fn unknown_messages_are_skipped_unless_they_are_required() {
    let mut world = World::strict();
    let conn = world.greet(&Device::new(1));
    world.outputs(conn);
    world.handle(Input::Received { conn, bytes: vec![200, 0, 1] });
    assert_eq!(world.outputs(conn), []);
    world.handle(Input::Received { conn, bytes: vec![200, 1, 1] });
    closed_with(&mut world, conn, FaultCode::Incompatible);
}

#[test]
fn a_connection_that_never_says_hello_is_closed() {
    let mut world = World::strict();
    let conn = world.connect(&Device::new(1));
    let patient = world.greet(&Device::new(2));
    world.outputs(patient);
    let at = world.relay.next_wakeup().unwrap();
    world.pass(at.0 - world.now.mono.0);
    closed_with(&mut world, conn, FaultCode::Protocol);
    assert_eq!(world.outputs(patient), []);
    assert_eq!(world.relay.next_wakeup(), None);
}

#[test]
fn a_device_that_asks_and_never_listens_is_closed() {
    let mut world = World::strict();
    let device = Device::new(1);
    let conn = world.join(&device, "writer");
    world.outputs(conn);
    world.stuck.insert(conn);
    for _ in 0..1_100 {
        world.send(conn, sign_in(None));
    }
    let outputs = world.outputs(conn);
    assert!(matches!(outputs.last(), Some(Output::Close { code: FaultCode::Quota, .. })));
    assert!(outputs.len() < 1_100);
}

#[test]
fn draining_tells_everybody_and_lets_nobody_in() {
    let mut world = World::strict();
    let one = world.greet(&Device::new(1));
    let two = world.join(&Device::new(2), "writer");
    world.outputs(one);
    world.handle(Input::Drain);
    closed_with(&mut world, one, FaultCode::ShuttingDown);
    closed_with(&mut world, two, FaultCode::ShuttingDown);
    let late = world.connect(&Device::new(3));
    closed_with(&mut world, late, FaultCode::ShuttingDown);
    for conn in [one, two, late] {
        world.handle(Input::Disconnected { conn });
    }
    assert_eq!(world.relay.connections(), 0);
    assert_eq!(world.relay.next_wakeup(), None);
}

// ── Sign-in ───────────────────────────────────────────────────────────────────────────────

#[track_caller]
fn sign_in_fault(world: &mut World, device: &Device, asked: SignIn) -> FaultCode {
    let conn = world.greet(device);
    world.send(conn, asked);
    let told = world.settle(conn);
    let found = faults(&told);
    assert_eq!(found.len(), 1, "{told:?}");
    assert_eq!(found[0].0, Some(1), "the connection goes on");
    found[0].1
}

#[track_caller]
fn granted(world: &mut World, device: &Device, asked: SignIn) -> Granted {
    let conn = world.greet(device);
    world.send(conn, asked);
    let told = world.settle(conn);
    match &told[..] {
        [Message::Welcome(_), Message::Granted(granted)] => granted.clone(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn each_failure_of_a_sign_in_has_its_own_code() {
    let mut world = World::strict();
    let device = Device::new(1);
    for (token, code) in [
        (None, FaultCode::NotSignedIn),
        (Some("nonsense"), FaultCode::TokenInvalid),
        (Some("home/ada/writer/t1/0"), FaultCode::TokenExpired),
        (Some("work/ada/writer/t1/3600000"), FaultCode::WrongWorkspace),
    ] {
        assert_eq!(sign_in_fault(&mut world, &device, sign_in(token)), code);
    }
    let nameless = SignIn { workspace: String::new(), ..sign_in(Some("/ada/writer/t1/3600000")) };
    assert_eq!(sign_in_fault(&mut world, &device, nameless), FaultCode::WrongWorkspace);
    assert_eq!(world.relay.workspaces().unwrap(), [], "no failure makes a workspace");
}

#[test]
fn a_grant_outlives_the_token_that_it_came_by() {
    let mut world = World::strict();
    let device = Device::new(1);
    let first = granted(&mut world, &device, sign_in(Some("home/ada/writer/t1/1000")));
    assert_eq!(first.grant.not_after_ms, START.0 + RelayConfig::default().grant_ms);
    assert_eq!((first.grant.serial, &*first.grant.user), (1, "ada"));
    world.pass(2_000);
    for token in [None, Some("home/ada/writer/t1/1000")] {
        assert_eq!(granted(&mut world, &device, sign_in(token)).grant, first.grant);
    }
    assert_eq!(
        sign_in_fault(&mut world, &Device::new(2), sign_in(None)),
        FaultCode::NotSignedIn,
        "it is bound to the device"
    );
    world.pass(RelayConfig::default().grant_ms);
    assert_eq!(sign_in_fault(&mut world, &device, sign_in(None)), FaultCode::TokenExpired);
}

#[test]
fn a_token_with_another_role_or_user_renews_the_grant_at_once_on_every_connection() {
    let mut world = World::with_schema();
    let mut device = Device::new(1);
    let writing = world.join(&device, "writer");
    let reader = granted(&mut world, &device, sign_in(Some(&token("reader"))));
    assert_eq!((reader.grant.role, reader.grant.serial), (GrantRole::Reader.code(), 3));
    let ack = world.submit(writing, unit([of("n1", &[&device.edit("n1")])]));
    assert_eq!(codes(&ack), [RefusalCode::Forbidden]);
    let other = granted(&mut world, &device, sign_in(Some("home/bob/reader/t2/3600000")));
    assert_eq!((&*other.grant.user, other.grant.serial), ("bob", 4));
}

#[test]
fn an_invite_is_bound_to_the_first_device_that_uses_it() {
    let mut world = World::strict();
    let invite = sign_in(Some("home/ada/writer/i1/3600000/once"));
    let (one, two) = (Device::new(1), Device::new(2));
    granted(&mut world, &one, invite.clone());
    granted(&mut world, &one, invite.clone());
    assert_eq!(sign_in_fault(&mut world, &two, invite.clone()), FaultCode::TokenUsed);
    world.crash(RelayConfig::default());
    assert_eq!(sign_in_fault(&mut world, &two, invite.clone()), FaultCode::TokenUsed);
    granted(&mut world, &one, invite.clone());
    let before = granted(&mut world, &two, sign_in(Some(&token("writer"))));
    let after = granted(&mut world, &two, invite);
    assert_eq!(before.grant, after.grant, "who has a grant needs no invite");
}

#[test]
fn an_invite_shown_by_a_device_that_has_a_grant_is_used_up_too() {
    let mut world = World::strict();
    let (one, two) = (Device::new(1), Device::new(2));
    granted(&mut world, &one, sign_in(Some(&token("writer"))));
    let invite = sign_in(Some("home/ada/writer/i1/3600000/once"));
    granted(&mut world, &one, invite.clone());
    assert_eq!(sign_in_fault(&mut world, &two, invite), FaultCode::TokenUsed);
}

#[test]
fn a_failed_channel_leaves_the_others_alone() {
    let mut world = World::strict();
    let conn = world.greet(&Device::new(1));
    world.send(conn, sign_in(Some(&token("writer"))));
    world.send(conn, SignIn { channel: 2, workspace: "work".into(), ..sign_in(None) });
    world.send(conn, Open { channel: 2, ..open_from(0) });
    world.send(conn, open_from(0));
    let told = world.settle(conn);
    assert_eq!(faults(&told), [(Some(2), FaultCode::NotSignedIn); 2]);
    assert!(caught_up(&told).is_some());
}

#[test]
fn the_number_of_channels_is_bounded() {
    let mut config = RelayConfig::default();
    config.channels_max = 2;
    let mut world = World::with(config);
    let conn = world.greet(&Device::new(1));
    for channel in 1..=3 {
        world.send(conn, SignIn { channel, ..sign_in(Some(&token("writer"))) });
    }
    assert_eq!(faults(&world.settle(conn)), [(Some(3), FaultCode::Quota)]);
}

#[test]
fn an_expired_grant_pauses_the_channel_until_a_refresh() {
    let mut world = World::with_schema();
    let mut device = Device::new(1);
    let mut config = RelayConfig::default();
    config.grant_ms = 5_000;
    world.crash(config);
    let conn = world.greet(&device);
    world.send(conn, sign_in(Some("home/ada/writer/t1/5000")));
    world.send(conn, open_from(0));
    world.settle(conn);
    let wakeup = world.relay.next_wakeup().unwrap();
    world.pass(wakeup.0 - world.now.mono.0);
    assert_eq!(faults(&world.inbox(conn)), [(Some(1), FaultCode::TokenExpired)], "it is told at once");
    world.send(conn, changes(unit([of("n1", &[&device.edit("n1")])])));
    world.send(conn, open_from(0));
    assert_eq!(faults(&world.settle(conn)), [(Some(1), FaultCode::TokenExpired); 2]);

    let refresh = |token: &str| Refresh { channel: 1, token: token.into() };
    world.send(conn, refresh("home/eve/writer/t9/3600000"));
    assert_eq!(faults(&world.inbox(conn)), [(Some(1), FaultCode::TokenInvalid)], "the user stays");
    world.send(conn, refresh("home/ada/writer/t2/3600000"));
    let told = world.settle(conn);
    assert!(matches!(&told[..], [Message::Granted(_)]), "{told:?}");
    world.send(conn, open_from(0));
    assert!(caught_up(&world.inbox(conn)).is_some());
}

#[test]
fn a_store_that_went_back_is_told() {
    let mut world = World::strict();
    let device = Device::new(1);
    let at = |incarnation, sent| SignIn { incarnation, sent, ..sign_in(Some(&token("writer"))) };
    for (incarnation, sent, behind) in [
        (0, 5, false),
        (0, 5, false),
        (0, 9, false),
        (0, 8, true),
        // It was told to begin life 1.
        (0, 99, true),
        // And now life 2, as somebody may have written in the other.
        (1, 0, true),
        (3, 0, false),
        (3, 0, false),
        (2, 99, true),
        (4, 0, false),
    ] {
        let told = granted(&mut world, &device, at(incarnation, sent));
        assert_eq!(told.behind, behind, "{incarnation}, {sent}");
    }
    let conn = world.greet(&device);
    world.send(conn, at(4, 0));
    world.send(conn, Changes { sent: 7, ..changes(Unit::default()) });
    world.settle(conn);
    assert_eq!(world.settle(conn), []);
    assert!(!granted(&mut world, &device, at(4, 7)).behind);
}

/// A device goes back to an older store, is told to begin another life, writes in it, and loses that
/// store too before it has signed in again. What it writes next must not have the numbers of what the
/// life in between wrote. Found by the simulator (seeds 1564, 3082 and 3268).
#[test]
fn a_store_that_goes_back_twice_is_told_of_the_life_in_between() {
    let mut world = World::with_schema();
    let device = Device::new(1);
    let claims = |incarnation, sent| SignIn { incarnation, sent, ..sign_in(Some(&token("writer"))) };
    granted(&mut world, &device, claims(0, 5));
    let mut begun = BTreeSet::new();
    for _ in 0..3 {
        let told = granted(&mut world, &device, claims(0, 2));
        assert!(told.behind);
        let next = Incarnation::next_store(0, told.incarnation).unwrap();
        assert!(begun.insert(next), "{next} is begun twice");
    }
    let newest = *begun.last().unwrap();
    assert!(!granted(&mut world, &device, claims(newest, 1)).behind);
}

/// Devices lie about what only they can know. Nobody else is the worse for it, and they themselves go on.
#[test]
fn lies_about_lives_and_counts_harm_nobody() {
    let mut world = World::with_schema();
    let mut honest = Device::new(2);
    let beside = world.join(&honest, "writer");
    let mut liar = Device::new(1);
    let claims = |incarnation, sent| SignIn { incarnation, sent, ..sign_in(Some(&token("writer"))) };
    for incarnation in [u32::MAX, STORE_LIFE_MAX + 1] {
        assert_eq!(sign_in_fault(&mut world, &liar, claims(incarnation, 0)), FaultCode::Protocol);
    }
    // It was not written down: what is true is believed as before.
    let told = granted(&mut world, &liar, claims(0, 0));
    assert_eq!((told.behind, told.incarnation), (false, 0));
    // More than it can have sent in this life: what it says later without lying begins another one.
    granted(&mut world, &liar, claims(0, u64::MAX));
    let conn = world.greet(&liar);
    world.send(conn, claims(0, u64::MAX));
    world.send(conn, Changes { sent: u64::MAX, ..changes(unit([of("n1", &[&liar.edit("n1")])])) });
    world.send(conn, Changes { sent: 0, ..changes(unit([of("n1", &[&liar.edit("n1")])])) });
    let told = world.settle(conn);
    assert_eq!(told.iter().filter(|m| matches!(m, Message::Ack(ack) if ack.refused.is_empty())).count(), 2);
    let told = granted(&mut world, &liar, claims(0, 2));
    assert_eq!((told.behind, told.incarnation), (true, 0));
    let next = Incarnation::next_store(0, told.incarnation).unwrap();
    assert!(!granted(&mut world, &liar, claims(next, 0)).behind);
    // The last life that is believed leaves no other; the device hears which the relay knows.
    granted(&mut world, &liar, claims(STORE_LIFE_MAX, 0));
    let told = granted(&mut world, &liar, claims(next, 0));
    assert_eq!((told.behind, told.incarnation), (true, STORE_LIFE_MAX));
    assert_eq!(Incarnation::next_store(next, told.incarnation), None);

    assert_eq!(world.submit(beside, unit([of("n2", &[&honest.edit("n2")])])).refused, []);
    assert!(!granted(&mut world, &honest, claims(0, 0)).behind);
    assert_eq!(digest_of(&world.whole_feed()), world.digest().1);
}

#[test]
fn lies_about_cursors_and_digests_get_the_feed_as_it_is() {
    let mut world = World::with_schema();
    let mut honest = Device::new(2);
    let beside = world.join(&honest, "writer");
    let mut liar = Device::new(1);
    let conn = world.join(&liar, "writer");
    world.submit(conn, unit([of("n1", &[&liar.edit("n1")])]));
    world.inbox(conn);
    let (end, digest) = world.digest();
    let all: Vec<u64> = (1..=end).collect();
    let beyond = [end + 1, u64::MAX - 1, u64::MAX];
    let lies = beyond.map(|cursor| (open_from(cursor), &all[..])).into_iter().chain([
        (Open { epoch: [9; 16], ..open_from(u64::MAX) }, &all[..]),
        (Open { digest: [9; 32], ..open_from(end) }, &[][..]),
        (Open { digest: [9; 32], full: true, ..open_from(end - 1) }, &all[end as usize - 1..]),
    ]);
    for (lie, expected) in lies {
        world.send(conn, lie.clone());
        let told = world.settle(conn);
        let seqs: Vec<u64> = entries(&told).iter().map(|entry| entry.seq).collect();
        assert_eq!((&seqs[..], faults(&told)), (expected, vec![]), "{lie:?}");
        let done = caught_up(&told).unwrap();
        assert_eq!((done.cursor, done.digest), (end, digest.0), "the device sees what it is wrong about");
    }
    // The same connection is told of the next entry, and so is everyone else.
    world.inbox(beside);
    world.submit(beside, unit([of("n2", &[&honest.edit("n2")])]));
    assert_eq!(entries(&world.inbox(conn)).iter().map(|entry| entry.seq).collect::<Vec<_>>(), [end + 1]);
    let again = world.join(&liar, "writer");
    assert_eq!(world.submit(again, unit([of("n1", &[&liar.edit("n1")])])).refused, []);
    assert_eq!(digest_of(&world.whole_feed()), world.digest().1);
}

#[test]
fn what_a_unit_says_was_sent_is_remembered() {
    let mut world = World::with_schema();
    let mut device = Device::new(1);
    let conn = world.join(&device, "writer");
    let message = Changes { sent: 3, ..changes(unit([of("n1", &[&device.edit("n1")])])) };
    world.send(conn, message);
    world.flush();
    assert!(!granted(&mut world, &device, SignIn { sent: 3, ..sign_in(None) }).behind);
    assert!(granted(&mut world, &device, SignIn { sent: 2, ..sign_in(None) }).behind);
}

#[test]
fn the_feed_tells_of_new_devices_and_new_names() {
    let mut world = World::strict();
    let device = Device::new(1);
    for name in ["phone", "phone", "tablet\n"] {
        granted(&mut world, &device, SignIn { device_name: name.into(), ..sign_in(Some(&token("writer"))) });
    }
    let named: Vec<String> = world
        .whole_feed()
        .into_iter()
        .filter_map(|entry| match entry.body {
            FeedBody::Device { key, name, .. } if key == [1; 32] => Some(name),
            _ => None,
        })
        .collect();
    assert_eq!(named, ["phone", "tablet"]);
}

// ── Durability and the feed ───────────────────────────────────────────────────────────────

#[test]
fn nothing_is_promised_before_it_is_durable() {
    let mut world = World::with_schema();
    let (mut writer, reader) = (Device::new(1), Device::new(2));
    let conn = world.greet(&writer);
    world.inbox(conn);
    world.send(conn, sign_in(Some(&token("writer"))));
    assert_eq!(world.outputs(conn), [], "no grant before it is stored");
    world.flush();
    let outputs = world.outputs(conn);
    assert!(matches!(outputs[..], [Output::Send { .. }, Output::RaiseLimit { .. }]), "{outputs:?}");

    let listener = world.join(&reader, "reader");
    world.inbox(listener);
    let change = writer.edit("n1");
    world.send(conn, changes(unit([of("n1", &[&change])])));
    assert_eq!(world.inbox(conn), []);
    assert_eq!(world.inbox(listener), []);
    world.send(listener, open_from(0));
    let early = world.inbox(listener);
    assert!(entries(&early).iter().all(|entry| !matches!(entry.body, FeedBody::Changes { .. })));
    assert_ne!(caught_up(&early).unwrap().digest, world.digest().1.0, "nor who asks meanwhile");
    world.flush();
    assert!(matches!(&world.inbox(conn)[..], [Message::Ack(_)]));
    let heard = world.inbox(listener);
    assert!(matches!(&heard[..], [Message::Feed(_), Message::CaughtUp(_)]), "{heard:?}");
    let (seq, digest) = world.digest();
    let done = caught_up(&heard).unwrap();
    assert_eq!((done.cursor, done.digest), (seq, digest.0));
}

#[test]
fn what_was_not_durable_in_a_crash_was_never_promised_and_can_be_sent_again() {
    let mut world = World::with_schema();
    let mut device = Device::new(1);
    let conn = world.join(&device, "writer");
    let change = device.edit("n1");
    world.send(conn, changes(unit([of("n1", &[&change])])));
    world.crash(RelayConfig::default());
    let conn = world.join(&device, "writer");
    let ack = world.submit(conn, unit([of("n1", &[&change])]));
    assert_eq!(ack.refused, []);
    assert_eq!(digest_of(&world.whole_feed()), world.digest().1);
}

#[test]
fn an_author_gets_stubs_of_its_own_changes_unless_it_asks_for_all() {
    let mut world = World::with_schema();
    let mut device = Device::new(1);
    let conn = world.join(&device, "writer");
    let change = device.edit("n1");
    world.submit(conn, unit([of("n1", &[&change])]));
    let own = |world: &mut World, full| {
        let conn = world.greet(&device);
        world.send(conn, sign_in(None));
        world.send(conn, Open { full, ..open_from(0) });
        entries(&world.settle(conn)).pop().unwrap().body
    };
    let stub = FeedBody::Own(vec![("note".into(), "n1".into(), vec![change.hash().0])]);
    assert_eq!(own(&mut world, false), stub);
    let whole = FeedBody::Changes { author: [1; 32], unit: unit([of("n1", &[&change])]) };
    assert_eq!(own(&mut world, true), whole);
}

#[test]
fn a_reconnect_with_nothing_new_costs_one_round_trip() {
    let mut world = World::with_schema();
    let mut writer = Device::new(1);
    let conn = world.join(&writer, "writer");
    for _ in 0..50 {
        world.submit(conn, unit([of("n1", &[&writer.edit("n1")])]));
    }
    world.join(&Device::new(2), "reader");
    let (cursor, digest) = world.digest();
    let commits = world.store.commits();
    let conn = world.connect(&Device::new(2));
    world.send(conn, hello());
    world.send(conn, sign_in(Some(&token("reader"))));
    world.send(conn, open_from(cursor));
    let told = world.inbox(conn);
    match &told[..] {
        [Message::Welcome(_), Message::Granted(_), Message::CaughtUp(done)] => {
            assert_eq!((done.cursor, done.digest), (cursor, digest.0));
        }
        other => panic!("{other:?}"),
    }
    assert!(told.iter().map(|m| m.encode().len()).sum::<usize>() < 1_000);
    assert_eq!(world.store.commits(), commits, "and no write");
}

#[test]
fn a_device_that_was_away_gets_what_it_missed_and_no_more() {
    let mut world = World::with_schema();
    let mut writer = Device::new(1);
    let conn = world.join(&writer, "writer");
    world.submit(conn, unit([of("n1", &[&writer.edit("n1")])]));
    world.join(&Device::new(2), "reader");
    let (cursor, _) = world.digest();
    for _ in 0..3 {
        world.submit(conn, unit([of("n1", &[&writer.edit("n1")])]));
    }
    let back = world.greet(&Device::new(2));
    world.send(back, sign_in(None));
    world.send(back, open_from(cursor));
    let told = world.inbox(back);
    assert!(entries(&told).iter().map(|e| e.seq).eq(cursor + 1..=cursor + 3));
    assert_eq!(caught_up(&told).unwrap().cursor, cursor + 3);
}

#[test]
fn a_cursor_of_another_life_of_the_feed_means_nothing() {
    let mut world = World::with_schema();
    let mut device = Device::new(1);
    let conn = world.join(&device, "writer");
    world.submit(conn, unit([of("n1", &[&device.edit("n1")])]));
    let (end, _) = world.digest();
    let first = |world: &mut World, open: Open| {
        world.send(conn, open);
        entries(&world.settle(conn))
    };
    let other_epoch = first(&mut world, Open { epoch: [1; 16], ..open_from(end) });
    assert_eq!(other_epoch[0].seq, 1);
    assert!(matches!(other_epoch.last().unwrap().body, FeedBody::Own(_)));
    let beyond = first(&mut world, open_from(end + 10));
    assert_eq!(beyond[0].seq, 1);
    assert!(
        matches!(beyond.last().unwrap().body, FeedBody::Changes { .. }),
        "a relay that went back gives the device its own changes too"
    );
}

#[test]
fn the_feed_comes_in_bounded_pages_without_a_gap() {
    let mut world = World::with_schema();
    let mut writer = Device::new(1);
    let conn = world.join(&writer, "writer");
    for number in 0..600 {
        let id = format!("n{number}");
        world.send(conn, changes(unit([of(&id, &[&writer.edit(&id)])])));
    }
    let big = Draft { title: "x".repeat(300_000), ..Draft::default() };
    for number in 0..4 {
        let id = format!("big{number}");
        world.send(conn, changes(unit([of(&id, &[&writer.write(&id, big.clone())])])));
    }
    world.flush();
    let feed = world.whole_feed();
    assert!(feed.len() > 604);
    assert_eq!(digest_of(&feed), world.digest().1);

    let reader = world.greet(&Device::new(3));
    world.send(reader, sign_in(Some(&token("reader"))));
    world.send(reader, open_from(0));
    let told = world.settle(reader);
    let pages: Vec<&Feed> =
        told.iter().filter_map(|m| if let Message::Feed(f) = m { Some(f) } else { None }).collect();
    assert!(pages.len() >= 6);
    assert!(pages.iter().all(|page| page.entries.len() <= 256));
}

#[test]
fn a_slow_reader_pauses_itself_and_nobody_else() {
    let mut config = RelayConfig::default();
    config.require_schema = false;
    config.send_window = 3;
    let mut world = World::with(config);
    let mut writer = Device::new(1);
    let writing = world.join(&writer, "writer");
    let slow = world.join(&Device::new(2), "reader");
    let quick = world.join(&Device::new(3), "reader");
    world.inbox(slow);
    world.inbox(quick);
    world.stuck.insert(slow);
    for _ in 0..20 {
        world.submit(writing, unit([of("n1", &[&writer.edit("n1")])]));
    }
    let (end, digest) = world.digest();
    assert_eq!(caught_up(&world.inbox(quick)).unwrap().cursor, end);
    let first = world.inbox(slow);
    assert_eq!(first.len(), 3, "a full window: {first:?}");
    let mut heard = entries(&first);
    let mut done = None;
    for _ in 0..20 {
        world.take_one(slow);
        let told = world.inbox(slow);
        heard.extend(entries(&told));
        done = caught_up(&told).or(done);
    }
    assert_eq!(heard.last().unwrap().seq, end);
    assert!(heard.windows(2).all(|pair| pair[1].seq == pair[0].seq + 1));
    assert_eq!(done.unwrap().digest, digest.0);
}

#[test]
fn the_channels_of_a_connection_are_served_in_turn() {
    let mut config = RelayConfig::default();
    config.require_schema = false;
    let mut world = World::with(config);
    let device = Device::new(2);
    let conn = world.greet(&device);
    for channel in 1..=3 {
        world.send(conn, SignIn { channel, ..sign_in(Some(&token("reader"))) });
        world.send(conn, Open { channel, ..open_from(0) });
    }
    world.settle(conn);
    let mut writer = Device::new(1);
    let writing = world.join(&writer, "writer");
    world.inbox(conn);
    world.submit(writing, unit([of("n1", &[&writer.edit("n1")])]));
    let served: Vec<u32> = world
        .inbox(conn)
        .iter()
        .map(|m| match m {
            Message::Feed(feed) => feed.channel,
            Message::CaughtUp(done) => done.channel,
            other => panic!("{other:?}"),
        })
        .collect();
    let mut sorted = served.clone();
    sorted.sort_unstable();
    assert_eq!(sorted, [1, 1, 2, 2, 3, 3]);
    assert!(served.windows(2).all(|pair| pair[0] != pair[1]), "{served:?}");
}

#[test]
fn a_relay_that_comes_back_is_the_same() {
    let mut world = World::with_schema();
    let (mut one, mut two) = (Device::new(1), Device::new(2));
    let (a, b) = (world.join(&one, "writer"), world.join(&two, "writer"));
    let base = one.edit("n1");
    world.submit(a, unit([of("n1", &[&base])]));
    world.submit(a, unit([of("n1", &[&one.edit("n1")])]));
    let onto = Draft { onto: vec![(base.hash(), 1)], ..Draft::default() };
    world.submit(b, unit([of("n1", &[&two.write("n1", onto)])]));
    let refused = one.write("n2", Draft { field: "nope", ..Draft::default() });
    assert_eq!(codes(&world.submit(a, unit([of("n2", &[&refused])]))), [RefusalCode::UnknownField]);
    let (feed, digest, epoch) = (world.whole_feed(), world.digest(), world.relay.epoch());
    assert_eq!(digest_of(&feed), digest.1);

    world.crash(RelayConfig::default());
    assert_eq!(world.relay.epoch(), epoch);
    assert_eq!(world.relay.workspaces().unwrap(), [home()]);
    assert_eq!(world.digest(), digest);
    let feed_again = world.whole_feed();
    assert_eq!(feed_again, feed);
    let a = world.greet(&one);
    world.send(a, sign_in(None));
    world.settle(a);
    let ack = world.submit(a, unit([of("n1", &[&one.edit("n1")])]));
    assert_eq!(ack.refused, [], "the chain goes on where it was");
    assert_eq!(codes(&world.submit(a, unit([of("n2", &[&refused])]))), [RefusalCode::UnknownField]);
    assert_eq!(digest_of(&world.whole_feed()), world.digest().1);
}

#[test]
fn a_cache_that_holds_nothing_changes_nothing() {
    let run = |cached_entities| {
        let mut config = RelayConfig::default();
        config.require_schema = false;
        config.cached_entities = cached_entities;
        let mut world = World::with(config);
        let mut device = Device::new(1);
        let conn = world.join(&device, "writer");
        for turn in 0..10 {
            let id = format!("n{}", turn % 3);
            world.submit(conn, unit([of(&id, &[&device.edit(&id), &device.edit(&id)])]));
        }
        (world.whole_feed(), world.digest())
    };
    assert_eq!(run(0), run(1_000));
}

#[test]
fn a_damaged_record_fails_the_request_that_met_it() {
    let mut world = World::with_schema();
    let mut device = Device::new(1);
    let conn = world.join(&device, "writer");
    world.store.damage(Keyspace::FEED);
    world.send(conn, open_from(0));
    assert_eq!(faults(&world.settle(conn)), [(Some(1), FaultCode::Internal)]);
    assert_eq!(world.submit(conn, unit([of("n1", &[&device.edit("n1")])])).refused, []);
}

// ── Admission ─────────────────────────────────────────────────────────────────────────────

#[test]
fn a_unit_that_comes_twice_gets_the_same_answer_and_leaves_no_second_trace() {
    let mut world = World::with_schema();
    let mut device = Device::new(1);
    let conn = world.join(&device, "writer");
    let good = device.edit("n1");
    let bad = device.write("n2", Draft { field: "nope", ..Draft::default() });
    let twice = unit([of("n1", &[&good]), of("n2", &[&bad])]);
    let first = world.submit(conn, twice.clone());
    assert_eq!(codes(&first), [RefusalCode::UnknownField]);
    let commits = world.store.commits();
    assert_eq!(world.submit(conn, twice), first);
    assert_eq!(world.store.commits(), commits);
}

#[test]
fn a_unit_holding_known_and_new_changes_feeds_only_the_new() {
    let mut world = World::with_schema();
    let mut device = Device::new(1);
    let conn = world.join(&device, "writer");
    let (one, two) = (device.edit("n1"), device.edit("n1"));
    world.submit(conn, unit([of("n1", &[&one])]));
    world.submit(conn, unit([of("n1", &[&one, &two, &two])]));
    let last = world.whole_feed().into_iter().rev().find_map(|entry| match entry.body {
        FeedBody::Changes { unit, .. } => Some(unit),
        _ => None,
    });
    assert_eq!(last, Some(unit([of("n1", &[&two])])));
}

#[test]
fn a_refusal_is_remembered_and_everybody_hears_of_it() {
    let mut world = World::with_schema();
    let mut device = Device::new(1);
    let conn = world.join(&device, "writer");
    let bad = device.write("n1", Draft { field: "nope", ..Draft::default() });
    let child = device.edit("n1");
    let ack = world.submit(conn, unit([of("n1", &[&bad, &child])]));
    assert_eq!(codes(&ack), [RefusalCode::UnknownField, RefusalCode::DependsOnRefused]);
    let grandchild = device.edit("n1");
    let ack = world.submit(conn, unit([of("n1", &[&grandchild])]));
    assert_eq!(codes(&ack), [RefusalCode::DependsOnRefused], "in a later unit too");
    let told: Vec<_> = world
        .whole_feed()
        .into_iter()
        .filter_map(
            |entry| if let FeedBody::Refused(refused) = entry.body { Some(refused.hash) } else { None },
        )
        .collect();
    assert_eq!(told, [bad.hash().0, child.hash().0, grandchild.hash().0]);
    assert_eq!(digest_of(&world.whole_feed()), world.digest().1);
}

#[test]
fn a_refused_change_takes_nothing_with_it_that_does_not_depend_on_it() {
    let mut world = World::with_schema();
    let mut device = Device::new(1);
    let conn = world.join(&device, "writer");
    let bad = device.write("n1", Draft { field: "nope", ..Draft::default() });
    let good = device.edit("n2");
    let ack = world.submit(conn, unit([of("n1", &[&bad]), of("n2", &[&good])]));
    assert_eq!(ack.refused.iter().map(|r| &*r.id).collect::<Vec<_>>(), ["n1"]);
    assert_eq!(world.submit(conn, unit([of("n2", &[&device.edit("n2")])])).refused, []);
}

#[test]
fn what_a_retry_can_help_is_not_held_against_the_change() {
    let mut world = World::with_schema();
    let mut device = Device::new(1);
    let conn = world.join(&device, "writer");
    let (one, two, three) = (device.edit("n1"), device.edit("n1"), device.edit("n1"));
    let early = unit([of("n1", &[&two, &three])]);
    let missing = RefusalCode::MissingDependency;
    assert_eq!(codes(&world.submit(conn, early.clone())), [missing, missing]);
    world.submit(conn, unit([of("n1", &[&one])]));
    assert_eq!(world.submit(conn, early.clone()).refused, []);

    let ahead = Draft { ahead_ms: 600_000, ..Draft::default() };
    let future = unit([of("n2", &[&device.write("n2", ahead)])]);
    let commits = world.store.commits();
    assert_eq!(codes(&world.submit(conn, future.clone())), [RefusalCode::ClockAhead]);
    assert_eq!(world.store.commits(), commits, "nothing is stored");
    world.pass(600_000);
    assert_eq!(world.submit(conn, future).refused, []);
}

#[test]
fn a_gap_in_a_chain_that_is_known_in_part_can_be_filled() {
    let mut world = World::with_schema();
    let mut device = Device::new(1);
    let conn = world.join(&device, "writer");
    let (one, two, three) = (device.edit("n1"), device.edit("n1"), device.edit("n1"));
    world.submit(conn, unit([of("n1", &[&one])]));
    let ack = world.submit(conn, unit([of("n1", &[&three])]));
    assert_eq!(codes(&ack), [RefusalCode::MissingDependency]);
    assert_eq!(world.submit(conn, unit([of("n1", &[&two, &three])])).refused, []);
}

#[test]
fn a_transaction_is_taken_whole_or_not_at_all() {
    let mut world = World::with_schema();
    let mut device = Device::new(1);
    let conn = world.join(&device, "writer");
    let bad = device.write("a", Draft { field: "nope", ..in_tx(1, 3) });
    let (b, c) = (device.write("b", in_tx(1, 3)), device.write("c", in_tx(1, 3)));
    let after_c = device.write("c", in_tx(2, 2));
    let with_it = device.write("d", in_tx(2, 2));
    let alone = device.edit("e");
    let ack = world.submit(
        conn,
        unit([
            of("a", &[&bad]),
            of("b", &[&b]),
            of("c", &[&c, &after_c]),
            of("d", &[&with_it]),
            of("e", &[&alone]),
        ]),
    );
    use RefusalCode::*;
    assert_eq!(codes(&ack), [UnknownField, Transaction, Transaction, DependsOnRefused, Transaction]);
    assert_eq!(digest_of(&world.whole_feed()), world.digest().1);
    assert_eq!(world.submit(conn, unit([of("e", &[&device.edit("e")])])).refused, []);

    let (f, g) = (device.write("f", in_tx(3, 2)), device.write("g", in_tx(3, 2)));
    let whole = unit([of("f", &[&f]), of("g", &[&g])]);
    assert_eq!(world.submit(conn, whole.clone()).refused, []);
    assert_eq!(world.submit(conn, whole).refused, [], "known members count as present");
}

#[test]
fn a_transaction_that_lacks_a_member_or_has_one_too_many_is_refused() {
    let mut world = World::with_schema();
    let mut device = Device::new(1);
    let conn = world.join(&device, "writer");
    let (a, b, c) =
        (device.write("a", in_tx(1, 2)), device.write("b", in_tx(1, 2)), device.write("c", in_tx(1, 2)));
    let both = [RefusalCode::Transaction; 2];
    let lonely = device.write("l", in_tx(2, 2));
    assert_eq!(codes(&world.submit(conn, unit([of("l", &[&lonely])]))), both[..1]);
    assert_eq!(world.submit(conn, unit([of("a", &[&a]), of("b", &[&b])])).refused, []);
    let late = unit([of("a", &[&a]), of("b", &[&b]), of("c", &[&c])]);
    assert_eq!(codes(&world.submit(conn, late)), both[..1], "it was shown already");
    let (d, e) = (device.write("d", in_tx(3, 2)), device.write("e", in_tx(3, 3)));
    assert_eq!(codes(&world.submit(conn, unit([of("d", &[&d]), of("e", &[&e])]))), both);
}

#[test]
fn a_transaction_waits_whole_for_what_one_member_lacks() {
    let mut world = World::with_schema();
    let mut device = Device::new(1);
    let conn = world.join(&device, "writer");
    let first = device.edit("a");
    let (a, b) = (device.write("a", in_tx(1, 2)), device.write("b", in_tx(1, 2)));
    let tx = unit([of("a", &[&a]), of("b", &[&b])]);
    assert_eq!(codes(&world.submit(conn, tx.clone())), [RefusalCode::MissingDependency; 2]);
    world.submit(conn, unit([of("a", &[&first])]));
    assert_eq!(world.submit(conn, tx).refused, []);
}

#[test]
fn a_reader_writes_nothing_not_even_refusals() {
    let mut world = World::with_schema();
    let mut device = Device::new(1);
    let conn = world.join(&device, "reader");
    let attempt = unit([of("n1", &[&device.edit("n1")])]);
    let commits = world.store.commits();
    assert_eq!(codes(&world.submit(conn, attempt.clone())), [RefusalCode::Forbidden]);
    let garbage = EntityChanges { changes: vec![vec![1, 2, 3]], ..of("n1", &[]) };
    assert_eq!(codes(&world.submit(conn, unit([garbage]))), [RefusalCode::Malformed]);
    assert_eq!(world.store.commits(), commits);
    world.send(conn, sign_in(Some(&token("writer"))));
    world.settle(conn);
    assert_eq!(world.submit(conn, attempt).refused, [], "once it may, the same change is taken");
}

#[test]
fn nobody_writes_as_another_device_role_or_actor() {
    let mut world = World::with_schema();
    let (mut ada, mut eve) = (Device::new(1), Device::new(2));
    let (a, e) = (world.join(&ada, "writer"), world.join(&eve, "writer"));
    let stolen = ada.edit("n1");
    let later = ada.edit("n1");
    let commits = world.store.commits();
    let ack = world.submit(e, unit([of("n1", &[&stolen, &later])]));
    assert_eq!(codes(&ack), [RefusalCode::ForgedAuthor; 2]);
    assert_eq!(world.store.commits(), commits);
    let ack = world.submit(a, unit([of("n1", &[&stolen, &later])]));
    assert_eq!(ack.refused, [], "what another device tried with it does not stick to it");

    let fork = eve.clone();
    let forged_role = eve.write("n2", as_authority());
    assert_eq!(codes(&world.submit(e, unit([of("n2", &[&forged_role])]))), [RefusalCode::ForgedRole]);
    eve = fork;
    let wrong_actor = Author { device: eve.id(), incarnation: Incarnation(9) };
    let actor = Some(wrong_actor.actor(&home(), &key("note", "n3")));
    let forged_actor = eve.write("n3", Draft { actor, ..Draft::default() });
    assert_eq!(codes(&world.submit(e, unit([of("n3", &[&forged_actor])]))), [RefusalCode::ForgedActor]);
    let elsewhere = eve.edit("n4");
    assert_eq!(codes(&world.submit(e, unit([of("n5", &[&elsewhere])]))), [RefusalCode::ForgedActor]);
    assert_eq!(world.submit(e, unit([of("n4", &[&elsewhere])])).refused, [], "in its place it is good");
}

#[test]
fn authorities_and_admins_bring_what_others_wrote_and_writers_do_not() {
    let mut world = World::with_schema();
    let (mut ada, mut backend) = (Device::new(1), Device::new(2));
    let (writer, admin, authority) = (Device::new(3), Device::new(4), Device::new(5));
    let by_ada = [ada.edit("n1"), ada.edit("n1")];
    let country = key("country", "ch");
    let named = || Draft { field: "name", ..as_authority() };
    let by_backend = [backend.write_in(&country, named()), backend.write_in(&country, named())];
    let notes = || unit([of("n1", &[&by_ada[0], &by_ada[1]])]);
    let reference = || unit([of_entity(&country, &[&by_backend[0], &by_backend[1]])]);
    let conn = world.join(&writer, "writer");
    let commits = world.store.commits();
    assert_eq!(codes(&world.submit(conn, notes())), [RefusalCode::ForgedAuthor; 2]);
    assert_eq!(codes(&world.submit(conn, reference())), [RefusalCode::ForgedAuthor; 2]);
    let conn = world.join(&admin, "admin");
    assert_eq!(codes(&world.submit(conn, reference())), [RefusalCode::ForgedRole; 2]);
    assert_eq!(world.store.commits(), commits + 1, "none of these refusals lasts");
    // Out of its place, or without what it builds on, nobody's word helps.
    assert_eq!(codes(&world.submit(conn, unit([of("n2", &[&by_ada[0]])]))), [RefusalCode::ForgedActor]);
    assert_eq!(codes(&world.submit(conn, unit([of("n1", &[&by_ada[1]])]))), [RefusalCode::MissingDependency]);
    assert_eq!(world.submit(conn, notes()).refused, []);
    let conn = world.join(&authority, "authority");
    assert_eq!(world.submit(conn, reference()).refused, []);
    assert_eq!(digest_of(&world.whole_feed()), world.digest().1);
    // It is Ada's as before.
    let conn = world.join(&ada, "writer");
    assert_eq!(world.submit(conn, notes()).refused, [], "it is known");
    assert_eq!(world.submit(conn, unit([of("n1", &[&ada.edit("n1")])])).refused, []);
}

/// Of each change the relay says what is so of that change: a device must be able to tell what is there by another
/// name, and what waits.
#[test]
fn what_is_here_by_another_name_is_said_of_that_alone() {
    let mut world = World::with_schema();
    let mut lost = Device::new(1);
    let first = lost.edit("n1");
    let second = lost.write("n1", in_tx(7, 2));
    let beside = lost.write("n2", in_tx(7, 2));
    let below = lost.edit("n1");
    let mut life = Device::new(1);
    life.author.incarnation = Incarnation::new(7, 0);
    let conn = world.join(&life, "writer");
    let again = |life: &mut Device, of: &Change| {
        let note = Note { origin: Some(of.origin()), ..Note::default() };
        life.write("n1", Draft { note, ..Draft::default() })
    };
    let there = [again(&mut life, &first), again(&mut life, &second)];
    assert_eq!(world.submit(conn, unit([of("n1", &[&there[0], &there[1]])])).refused, []);
    let ack = world.submit(conn, unit([of("n1", &[&first, &second, &below]), of("n2", &[&beside])]));
    let mut found = codes(&ack);
    found.sort();
    let waits = [RefusalCode::MissingDependency; 2];
    assert_eq!(found, [&waits[..], &[RefusalCode::Superseded; 2]].concat());
}

#[test]
fn reference_data_is_written_by_authorities_only() {
    let mut world = World::with_schema();
    let (mut person, mut backend) = (Device::new(1), Device::new(2));
    let (p, b) = (world.join(&person, "writer"), world.join(&backend, "authority"));
    let country = key("country", "ch");
    let name = |draft: Draft| Draft { field: "name", ..draft };
    let attempt = person.write_in(&country, name(Draft::default()));
    assert_eq!(codes(&world.submit(p, unit([of_entity(&country, &[&attempt])]))), [RefusalCode::Forbidden]);
    let real = backend.write_in(&country, name(as_authority()));
    assert_eq!(world.submit(b, unit([of_entity(&country, &[&real])])).refused, []);
    // Its counters are reference data too.
    let visits = |draft: Draft| Draft { increments: Some("visits"), ahead_ms: 1_000, ..draft };
    let onto = vec![(real.hash(), real.max_op())];
    let visit = Device::new(3).write_in(&country, visits(Draft { onto, ..Draft::default() }));
    let third = world.join(&Device::new(3), "writer");
    let ack = world.submit(third, unit([of_entity(&country, &[&visit])]));
    assert_eq!(codes(&ack), [RefusalCode::Forbidden]);
    let counted = backend.write_in(&country, visits(as_authority()));
    assert_eq!(world.submit(b, unit([of_entity(&country, &[&counted])])).refused, []);
}

#[test]
fn a_fork_of_one_actor_is_refused() {
    let mut world = World::with_schema();
    let mut device = Device::new(1);
    let mut clone = device.clone();
    let conn = world.join(&device, "writer");
    world.submit(conn, unit([of("n1", &[&device.edit("n1")])]));
    let other = clone.write("n1", Draft { title: "another".into(), ..Draft::default() });
    assert_eq!(codes(&world.submit(conn, unit([of("n1", &[&other])]))), [RefusalCode::BadSequence]);
}

#[test]
fn without_a_schema_nothing_is_taken_by_default() {
    let mut world = World::strict();
    let mut device = Device::new(1);
    let conn = world.join(&device, "writer");
    let change = device.edit("n1");
    world.send(conn, changes(unit([of("n1", &[&change])])));
    assert_eq!(faults(&world.settle(conn)), [(Some(1), FaultCode::SchemaMissing)]);
    let admin = world.join(&Device::new(9), "admin");
    world.send(admin, PushSchema { channel: 1, source: SCHEMA.into() });
    world.flush();
    assert_eq!(world.submit(conn, unit([of("n1", &[&change])])).refused, []);
    let stranger = device.write_in(&key("planet", "mars"), Draft::default());
    let ack = world.submit(conn, unit([of_entity(&key("planet", "mars"), &[&stranger])]));
    assert_eq!(codes(&ack), [RefusalCode::UnknownField]);
}

#[test]
fn containers_come_from_the_schema_or_else_from_who_uses_them() {
    let counts = || Draft { increments: Some("stars"), ..Draft::default() };
    let mut world = World::with_schema();
    let mut device = Device::new(1);
    let conn = world.join(&device, "writer");
    assert_eq!(world.submit(conn, unit([of("n1", &[&device.write("n1", counts())])])).refused, []);

    let mut world = World::lenient();
    let mut device = Device::new(1);
    let conn = world.join(&device, "writer");
    let change = device.write("n1", counts());
    let ack = world.submit(conn, unit([of("n1", &[&change])]));
    assert_eq!(codes(&ack), [RefusalCode::MissingDependency], "nobody named it");
    let mut named = of("n1", &[&change]);
    named.genesis =
        vec![("stars".into(), GenesisKind::Counter.code()), ("no field!".into(), 1), ("x".into(), 99)];
    assert_eq!(world.submit(conn, unit([named])).refused, []);
    let mut config = RelayConfig::default();
    config.require_schema = false;
    world.crash(config);
    let conn = world.join(&device, "writer");
    let next = device.write("n1", counts());
    assert_eq!(world.submit(conn, unit([of("n1", &[&next])])).refused, [], "it is remembered");
    let forwarded = world.whole_feed().into_iter().find_map(|entry| match entry.body {
        FeedBody::Changes { unit, .. } => Some(unit.entities[0].genesis.clone()),
        _ => None,
    });
    assert_eq!(forwarded, Some(vec![("stars".to_owned(), GenesisKind::Counter.code())]));
}

#[test]
fn malformed_changes_are_refused_and_their_neighbours_taken() {
    let mut world = World::with_schema();
    let mut device = Device::new(1);
    let conn = world.join(&device, "writer");
    let good = device.edit("n1");
    let mut flipped = good.bytes().to_vec();
    *flipped.last_mut().unwrap() ^= 1;
    let mut part = of("n1", &[&good]);
    part.changes.extend([vec![], flipped, vec![0; 40]]);
    let ack = world.submit(conn, unit([part]));
    assert_eq!(codes(&ack), [RefusalCode::Malformed; 3]);
    assert_eq!(digest_of(&world.whole_feed()), world.digest().1);
}

/// A refusal is found by the hash, and the hash does not cover the checksum: if damaged bytes
/// were refused for good, anybody could have anybody's change refused.
#[test]
fn a_damaged_copy_of_a_change_is_not_held_against_the_change() {
    let mut world = World::with_schema();
    let (mut ada, eve) = (Device::new(1), Device::new(2));
    let (a, e) = (world.join(&ada, "writer"), world.join(&eve, "writer"));
    let change = ada.edit("n1");
    let mut damaged = of("n1", &[&change]);
    damaged.changes[0][5] ^= 1;
    let commits = world.store.commits();
    assert_eq!(codes(&world.submit(e, unit([damaged]))), [RefusalCode::Malformed]);
    assert_eq!(world.store.commits(), commits);
    assert_eq!(world.submit(a, unit([of("n1", &[&change])])).refused, []);
}

#[test]
fn units_beyond_their_bounds_are_refused_and_the_session_goes_on() {
    let mut world = World::with_schema();
    let mut device = Device::new(1);
    let conn = world.join(&device, "writer");
    let wide = unit((0..UNIT_ENTITIES_MAX + 1).map(|n| of(&format!("n{n}"), &[])));
    let long = unit([EntityChanges { changes: vec![Vec::new(); 20_001], ..of("n1", &[]) }]);
    let heavy = unit([EntityChanges { changes: vec![vec![0; 1 << 20]; 5], ..of("n1", &[]) }]);
    for unit in [wide, long, heavy] {
        world.send(conn, changes(unit));
        assert_eq!(faults(&world.settle(conn)), [(Some(1), FaultCode::Quota)]);
    }
    assert_eq!(world.submit(conn, unit([of("n1", &[&device.edit("n1")])])).refused, []);
}

#[test]
fn refusals_that_chain_through_transactions_cost_no_more_than_the_unit() {
    let mut world = World::with_schema();
    let mut device = Device::new(1);
    let conn = world.join(&device, "writer");
    // Each transaction holds the end of one entity's chain and the start of the next one's.
    let mut parts = vec![vec![device.write("n0", Draft { field: "nope", ..Draft::default() })]];
    for number in 0..120u8 {
        parts[number as usize].push(device.write(&format!("n{number}"), in_tx(number, 2)));
        parts.push(vec![device.write(&format!("n{}", number + 1), in_tx(number, 2))]);
    }
    let parts = parts.iter().enumerate();
    let ack = world
        .submit(conn, unit(parts.map(|(n, part)| of(&format!("n{n}"), &part.iter().collect::<Vec<_>>()))));
    assert_eq!(ack.refused.len(), 241);
    assert_eq!(digest_of(&world.whole_feed()), world.digest().1);
}

// ── Schemas ───────────────────────────────────────────────────────────────────────────────

#[test]
fn a_schema_is_pushed_by_those_who_manage_the_workspace() {
    let mut world = World::strict();
    for (number, role) in ["reader", "writer"].into_iter().enumerate() {
        let conn = world.join(&Device::new(number as u8), role);
        world.send(conn, PushSchema { channel: 1, source: SCHEMA.into() });
        let told = world.settle(conn);
        assert_eq!(faults(&told), []);
        let answers = told.iter().filter_map(|m| if let Message::SchemaIs(m) = m { Some(m) } else { None });
        let problems: Vec<&String> = answers.flat_map(|answer| &answer.problems).collect();
        assert_eq!(problems, ["only an admin or an authority pushes a schema"]);
    }
    let admin = world.join(&Device::new(9), "admin");
    let push = |world: &mut World, source: &str| {
        world.send(admin, PushSchema { channel: 1, source: source.into() });
        let told = world.settle(admin);
        told.into_iter()
            .find_map(|m| if let Message::SchemaIs(answer) = m { Some(answer) } else { None })
            .unwrap()
    };
    let broken = push(&mut world, "[note");
    assert_eq!((broken.hash, broken.problems.len()), ([0; 32], 1));
    let first = push(&mut world, SCHEMA);
    assert_eq!(first.problems, Vec::<String>::new());
    let commits = world.store.commits();
    assert_eq!(push(&mut world, SCHEMA), first);
    assert_eq!(world.store.commits(), commits, "the same again changes nothing");
    let incompatible = push(&mut world, &SCHEMA.replace("title =", "name ="));
    assert_eq!(incompatible.hash, first.hash);
    assert!(!incompatible.problems.is_empty());
    let wider = SCHEMA
        .replace("[note]\nversion = 1", "[note]\nversion = 2")
        .replace("[country]", "body = { type = \"text\" }\n[country]");
    let second = push(&mut world, &wider);
    assert_eq!(second.problems, Vec::<String>::new());
    assert_ne!(second.hash, first.hash);
    let told: Vec<Hash> = world
        .whole_feed()
        .into_iter()
        .filter_map(|entry| if let FeedBody::Schema { hash } = entry.body { Some(hash) } else { None })
        .collect();
    assert_eq!(told, [first.hash, second.hash]);

    world.crash(RelayConfig::default());
    let reader = world.join(&Device::new(3), "reader");
    world.send(reader, FetchSchema { channel: 1 });
    let answer = SchemaIs { source: Some(wider), ..second };
    assert_eq!(world.inbox(reader), [Message::SchemaIs(answer)]);
}

// ── Whatever comes ────────────────────────────────────────────────────────────────────────

fn any_message() -> impl Strategy<Value = Vec<u8>> {
    let mut device = Device::new(1);
    let samples: Vec<Message> = vec![
        hello().into(),
        sign_in(Some(&token("writer"))).into(),
        sign_in(Some(&token("admin"))).into(),
        sign_in(None).into(),
        SignIn { channel: 2, ..sign_in(Some("work/ada/writer/t1/9")) }.into(),
        open_from(0).into(),
        open_from(u64::MAX).into(),
        changes(unit([of("n1", &[&device.edit("n1"), &device.edit("n1")])])).into(),
        changes(unit([of("n1", &[&device.edit("n1")]), of("n2", &[&device.write("n2", in_tx(1, 2))])]))
            .into(),
        changes(unit([of("n1", &[]), EntityChanges { id: String::new(), ..of("n1", &[]) }])).into(),
        PushSchema { channel: 1, source: SCHEMA.into() }.into(),
        FetchSchema { channel: 1 }.into(),
        Refresh { channel: 1, token: token("reader") }.into(),
        Fault { channel: None, code: 999, message: "ouch".into() }.into(),
    ];
    let samples: Vec<Vec<u8>> = samples.iter().map(Message::encode).collect();
    prop_oneof![
        8 => prop::sample::select(samples.clone()),
        2 => (prop::sample::select(samples), any::<prop::sample::Index>(), any::<u8>()).prop_map(
            |(mut bytes, at, byte)| {
                let at = at.index(bytes.len());
                bytes[at] ^= byte;
                bytes
            }
        ),
        1 => prop::collection::vec(any::<u8>(), 0..60),
    ]
}

fn any_input() -> impl Strategy<Value = (u8, u64, Vec<u8>)> {
    (0u8..20, 1u64..4, any_message())
}

/// What a device writes in one step: into which of four notes, and how.
#[derive(Clone, Copy, Debug)]
enum Step {
    Good(u8),
    Bad(u8),
    Ahead(u8),
    /// Into the note and the next one, together; with a member that is no good.
    Pair(u8, bool),
    /// The unit so far is sent, or lost, or sent after the next one.
    Send,
    Lose,
    Delay,
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0u8..4).prop_map(Step::Good),
        1 => (0u8..4).prop_map(Step::Bad),
        1 => (0u8..4).prop_map(Step::Ahead),
        3 => (0u8..4, prop::bool::weighted(0.2)).prop_map(|(at, bad)| Step::Pair(at, bad)),
        3 => Just(Step::Send),
        1 => Just(Step::Lose),
        1 => Just(Step::Delay),
    ]
}

/// Turns steps into the units that reach the relay, in order.
fn units_of(script: &[Step]) -> Vec<Unit> {
    let mut device = Device::new(1);
    let (mut current, mut delayed, mut arrived) = (Vec::new(), Vec::new(), Vec::new());
    let mut write = |current: &mut Vec<EntityChanges>, at: u8, draft: Draft| {
        let id = format!("n{}", at % 4);
        current.push(of(&id, &[&device.write(&id, draft)]));
    };
    for (number, step) in script.iter().enumerate() {
        match *step {
            Step::Good(at) => write(&mut current, at, Draft::default()),
            Step::Bad(at) => write(&mut current, at, Draft { field: "nope", ..Draft::default() }),
            Step::Ahead(at) => write(&mut current, at, Draft { ahead_ms: 600_000, ..Draft::default() }),
            Step::Pair(at, bad) => {
                let field = if bad { "nope" } else { "title" };
                write(&mut current, at, Draft { field, ..in_tx(number as u8, 2) });
                write(&mut current, at + 1, in_tx(number as u8, 2));
            }
            Step::Send => {
                arrived.push(unit(std::mem::take(&mut current)));
                arrived.append(&mut delayed);
            }
            Step::Lose => current.clear(),
            Step::Delay => delayed.push(unit(std::mem::take(&mut current))),
        }
    }
    arrived
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// However units are lost, delayed and repeated: what is admitted depends on nothing that
    /// is not, no transaction is admitted in part, nothing is both admitted and refused for
    /// good, and a relay without a cache decides the same.
    #[test]
    fn what_is_admitted_hangs_together(script in prop::collection::vec(any_step(), 1..60)) {
        let units = units_of(&script);
        let run = |cached_entities| {
            let mut world = World::with_schema();
            let mut config = RelayConfig::default();
            config.cached_entities = cached_entities;
            world.crash(config);
            let conn = world.join(&Device::new(1), "writer");
            let answers: Vec<Ack> = units.iter().map(|unit| world.submit(conn, unit.clone())).collect();
            let again: Vec<Ack> = units.iter().map(|unit| world.submit(conn, unit.clone())).collect();
            let third: Vec<Ack> = units.iter().map(|unit| world.submit(conn, unit.clone())).collect();
            (world.whole_feed(), world.digest(), answers, again, third)
        };
        let (feed, digest, answers, again, third) = run(1_000);
        let uncached = run(0);
        prop_assert_eq!((&feed, digest), (&uncached.0, uncached.1));
        prop_assert_eq!((&answers, &again, &third), (&uncached.2, &uncached.3, &uncached.4));
        prop_assert_eq!(digest_of(&feed), digest.1);

        let mut admitted = BTreeSet::new();
        let mut refused = BTreeSet::new();
        for entry in &feed {
            let mut members: BTreeMap<[u8; 16], BTreeSet<&str>> = BTreeMap::new();
            match &entry.body {
                FeedBody::Changes { unit, .. } => {
                    for part in &unit.entities {
                        for change in part.changes.iter().map(|bytes| Change::parse(bytes).unwrap()) {
                            prop_assert!(change.deps().iter().all(|dep| admitted.contains(&dep.0)));
                            prop_assert!(admitted.insert(change.hash().0), "admitted twice");
                            if let Some(tx) = change.note().tx {
                                members.entry(tx.id).or_default().insert(&part.id);
                            }
                        }
                    }
                }
                FeedBody::Refused(r) => prop_assert!(refused.insert(r.hash), "refused twice"),
                _ => {}
            }
            prop_assert!(members.values().all(|members| members.len() == 2), "a transaction in part");
        }
        prop_assert!(admitted.is_disjoint(&refused));
        for answer in third.iter().flat_map(|ack| &ack.refused) {
            prop_assert!(!admitted.contains(&answer.hash));
        }
    }

    /// Whatever devices send, in whatever order: no panic, a feed without a gap, and a digest
    /// that belongs to it, which a relay that comes back reads the same.
    #[test]
    fn nothing_that_comes_in_breaks_the_relay(script in prop::collection::vec(any_input(), 1..60)) {
        let mut config = RelayConfig::default();
        config.require_schema = false;
        config.grant_ms = 5_000;
        let mut world = World::with(config.clone());
        let device = Device::new(1);
        let mut conns = Vec::new();
        for (what, which, bytes) in script {
            if conns.len() < 3 {
                conns.push(world.greet(&device));
            }
            let at = which as usize % conns.len();
            let conn = conns[at];
            match what {
                0 => {
                    world.handle(Input::Disconnected { conn });
                    conns.remove(at);
                }
                1 => world.pass(3_000),
                2 => world.handle(Input::Sent { conn }),
                3 | 4 => world.flush(),
                5 => drop(world.stuck.insert(conn)),
                _ => world.handle(Input::Received { conn, bytes }),
            }
        }
        world.flush();
        prop_assert_eq!(world.store.durable().unwrap().0, world.store.commits());
        world.stuck.clear();
        let feed = world.whole_feed();
        let digest = world.digest();
        prop_assert_eq!(digest_of(&feed), digest.1);
        world.crash(config);
        prop_assert_eq!(world.digest(), digest);
    }
}

// ── Looking at everything ─────────────────────────────────────────────────────────────────

#[test]
fn what_is_missing_from_a_store_is_found() {
    let look = |world: &World| verify(&*world.store, &home(), &mut |_| ()).unwrap().unwrap();
    for keyspace in [Keyspace::FEED, Keyspace::ENTITY, Keyspace::HEADER] {
        let mut world = World::with_schema();
        let mut ann = Device::new(1);
        let conn = world.join(&ann, "writer");
        for id in ["a", "b", "c"] {
            let (first, second) = (ann.edit(id), ann.edit(id));
            world.submit(conn, unit([of(id, &[&first, &second])]));
        }
        let checked = look(&world);
        assert_eq!((checked.entities, checked.faults), (3, vec![]));
        assert!(checked.feed_entries >= 3);
        let page = world.store.scan(View::Latest, keyspace, &[], &[], 100).unwrap();
        let (place, _) = page.last().unwrap();
        let mut batch = Batch::new();
        batch.delete(keyspace, place.clone());
        world.store.commit(batch).unwrap();
        assert!(!look(&world).faults.is_empty(), "{keyspace:?}");
    }
}

/// A relay that lost everything may have been brought an older schema before it is brought back what a newer one
/// allowed. Refused for good, that would be lost to all who still hold it.
#[test]
fn what_another_brings_back_is_not_refused_for_good_for_a_field_that_the_schema_lacks() {
    let mut world = World::with_schema();
    let (mut author, authority) = (Device::new(1), Device::new(2));
    let conn = world.join(&authority, "authority");
    let change = author.write("n1", Draft { field: "more", ..Draft::default() });
    let lasting = |world: &mut World| {
        world.whole_feed().iter().filter(|entry| matches!(entry.body, FeedBody::Refused(_))).count()
    };
    assert_eq!(codes(&world.submit(conn, unit([of("n1", &[&change])]))), [RefusalCode::UnknownField]);
    assert_eq!(lasting(&mut world), 0);
    let newer = SCHEMA.replacen("version = 1", "version = 2", 1);
    let newer = newer.replacen("\nstars", "\nmore = { type = \"string\" }\nstars", 1);
    world.send(conn, PushSchema { channel: 1, source: newer });
    world.settle(conn);
    assert_eq!(world.submit(conn, unit([of("n1", &[&change])])).refused, []);
    // Its own author can do something about it.
    let conn = world.join(&author, "writer");
    let change = author.write("n2", Draft { field: "never", ..Draft::default() });
    assert_eq!(codes(&world.submit(conn, unit([of("n2", &[&change])]))), [RefusalCode::UnknownField]);
    assert_eq!(lasting(&mut world), 1);
}
