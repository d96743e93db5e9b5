//! Who gets in, as whom, and what is known of them.

use std::collections::BTreeSet;

use anabranch_core::admission::RefusalCode;
use anabranch_core::id::{Incarnation, STORE_LIFE_MAX};
use anabranch_core::relay::RelayConfig;
use anabranch_core::wire::*;

use crate::support::*;

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
