//! Many who want much of one relay, each told as a story: everyone gets their share of its work,
//! and nobody makes it hold more than it says.

use crate::support::*;
use anabranch_core::relay::{ConnId, Input, Output, Rate, RelayConfig, Turn, UNSENT_BYTES_MAX};
use anabranch_core::wire::*;

fn lenient() -> RelayConfig {
    let mut config = RelayConfig::default();
    config.require_schema = false;
    config
}

fn token_of(user: &str) -> String {
    format!("{HOME}/{user}/writer/t1/3600000")
}

/// A writer of a user, who listens to the feed.
fn join(world: &mut World, number: u8, user: &str) -> (Device, ConnId) {
    let device = Device::new(number);
    let conn = world.greet(&device);
    world.send(conn, sign_in(Some(&token_of(user))));
    world.send(conn, open_from(0));
    world.settle(conn);
    (device, conn)
}

/// Hands a message over that waits for its turn.
fn hand_over(world: &mut World, conn: ConnId, message: impl Into<Message>) {
    let input = Input::Received { conn, bytes: message.into().encode() };
    world.relay.accept(world.now, input).unwrap();
}

fn one_note(device: &mut Device, id: &str) -> Changes {
    let change = device.edit(id);
    changes(unit([of(id, &[&change])]))
}

#[test]
fn a_backlog_delays_only_whose_it_is() {
    let mut world = World::with(lenient());
    let mut attackers: Vec<(Device, ConnId)> = (10..40).map(|n| join(&mut world, n, "mallory")).collect();
    let (mut honest, conn) = join(&mut world, 1, "ann");
    for (device, conn) in &mut attackers {
        for round in 0..20 {
            hand_over(&mut world, *conn, one_note(device, &format!("m{}-{round}", conn.0)));
        }
    }
    for round in 0..10 {
        // The attackers get turns, which the host has measured.
        for _ in 0..5 {
            assert!(matches!(world.relay.turn(world.now).unwrap(), Some(Turn::Message(of)) if of != conn));
            world.relay.charge(900);
        }
        hand_over(&mut world, conn, one_note(&mut honest, &format!("a{round}")));
        assert_eq!(world.relay.turn(world.now).unwrap(), Some(Turn::Message(conn)));
        world.relay.charge(300);
    }
}

#[test]
fn two_users_at_work_get_half_of_it_each_however_many_devices_they_have() {
    let mut world = World::with(lenient());
    let mut attackers: Vec<(Device, ConnId)> = (10..40).map(|n| join(&mut world, n, "mallory")).collect();
    let (mut honest, conn) = join(&mut world, 1, "ann");
    for round in 0..10 {
        for (device, conn) in &mut attackers {
            hand_over(&mut world, *conn, one_note(device, &format!("m{}-{round}", conn.0)));
        }
    }
    for round in 0..100 {
        hand_over(&mut world, conn, one_note(&mut honest, &format!("a{round}")));
    }
    let mut own = 0;
    for _ in 0..200 {
        own += usize::from(world.relay.turn(world.now).unwrap() == Some(Turn::Message(conn)));
        world.relay.charge(500);
        world.store.flush();
        let durable = world.store.flush();
        world.relay.accept(world.now, Input::Durable(durable)).unwrap();
    }
    // The listeners' feeds are their own affair too.
    assert!((90..=100).contains(&own), "{own}");
}

#[test]
fn an_answer_does_not_wait_until_all_the_others_have_heard() {
    let mut world = World::with(lenient());
    for number in 10..60 {
        join(&mut world, number, "listeners");
    }
    let (mut honest, conn) = join(&mut world, 1, "ann");
    hand_over(&mut world, conn, one_note(&mut honest, "n1"));
    assert_eq!(world.relay.turn(world.now).unwrap(), Some(Turn::Message(conn)));
    while world.relay.poll_output().is_some() {}
    let durable = world.store.flush();
    world.relay.accept(world.now, Input::Durable(durable)).unwrap();
    let first = world.relay.poll_output();
    let Some(Output::Send { conn: to, bytes }) = first else { panic!("{first:?}") };
    assert_eq!(to, conn);
    assert!(matches!(Message::decode(&bytes), Ok(Some(Message::Ack(_)))));
    assert_eq!(world.relay.poll_output(), None, "what others hear takes turns");
    let mut heard = 0;
    while let Some(turn) = world.relay.turn(world.now).unwrap() {
        assert!(matches!(turn, Turn::Feed(_)));
        heard += std::iter::from_fn(|| world.relay.poll_output()).count();
    }
    assert_eq!(heard, 2 * 51, "an entry and its end, for everyone");
}

#[test]
fn requests_wait_while_the_disk_is_behind() {
    let mut world = World::with(lenient());
    let (mut device, conn) = join(&mut world, 1, "ann");
    for round in 0..300 {
        hand_over(&mut world, conn, one_note(&mut device, &format!("n{round}")));
    }
    let mut taken = 0;
    while world.relay.turn(world.now).unwrap().is_some() {
        taken += 1;
    }
    assert!((50..150).contains(&taken), "{taken} units of some five operations each");
    while taken < 300 {
        let durable = world.store.flush();
        world.relay.accept(world.now, Input::Durable(durable)).unwrap();
        while let Some(turn) = world.relay.turn(world.now).unwrap() {
            taken += usize::from(turn == Turn::Message(conn));
        }
    }
    let (waiting, _) = world.relay.memory(conn);
    assert_eq!(waiting, 0);
}

#[test]
fn who_writes_little_does_not_wait_for_the_disk_before_its_turn() {
    let mut world = World::with(lenient());
    let mut attackers: Vec<(Device, ConnId)> =
        (10..14).map(|n| join(&mut world, n, &format!("mallory{n}"))).collect();
    let (mut honest, conn) = join(&mut world, 1, "ann");
    for round in 0..300 {
        for (device, conn) in &mut attackers {
            hand_over(&mut world, *conn, one_note(device, &format!("m{}-{round}", conn.0)));
        }
    }
    while world.relay.turn(world.now).unwrap().is_some() {}
    hand_over(&mut world, conn, one_note(&mut honest, "a1"));
    assert_eq!(world.relay.turn(world.now).unwrap(), Some(Turn::Message(conn)));
    assert_eq!(world.relay.turn(world.now).unwrap(), None, "and nobody else");
    // Not by much, nor by very many users.
    let mut passed = 0;
    for round in 2..100 {
        hand_over(&mut world, conn, one_note(&mut honest, &format!("a{round}")));
        passed += usize::from(world.relay.turn(world.now).unwrap().is_some());
    }
    assert!((3..10).contains(&passed), "{passed}");
    passed = 0;
    for number in 20..250 {
        let device = Device::new(number);
        let conn = world.greet(&device);
        hand_over(&mut world, conn, sign_in(Some(&token_of(&format!("user{number}")))));
        hand_over(&mut world, conn, open_from(0));
        while world.relay.turn(world.now).unwrap().is_some() {
            passed += 1;
        }
    }
    assert!(passed < 200, "{passed}");
}

#[test]
fn who_sends_more_than_a_rate_is_not_listened_to_for_a_while() {
    let small = Rate { bytes_per_s: 10_000, burst_bytes: 50_000 };
    for place in 0..3 {
        let mut config = lenient();
        *[&mut config.device_rate, &mut config.user_rate, &mut config.workspace_rate][place] = small;
        let mut world = World::with(config);
        let (mut first, conn) = join(&mut world, 1, "ann");
        let (mut second, beside) = join(&mut world, 2, "ann");
        let (mut third, other) = join(&mut world, 3, "ben");
        world.inbox(conn);
        let large = Draft { title: "x".repeat(20_000), ..Draft::default() };
        for round in 0..6 {
            let id = format!("n{round}");
            let change = first.write(&id, large.clone());
            world.send(conn, changes(unit([of(&id, &[&change])])));
        }
        world.flush();
        let acks = |told: &[Message]| told.iter().filter(|m| matches!(m, Message::Ack(_))).count();
        assert_eq!(acks(&world.inbox(conn)), 3, "the burst, overdrawn by one");
        let (waiting, _) = world.relay.memory(conn);
        assert!(waiting > 0);
        // Nobody else is held back but those whose limit it is.
        world.send(beside, one_note(&mut second, "b"));
        world.send(other, one_note(&mut third, "o"));
        world.flush();
        assert_eq!(
            (acks(&world.inbox(beside)), acks(&world.inbox(other))),
            (usize::from(place < 1), usize::from(place < 2))
        );
        // Time passes, and the relay says itself when to look.
        let mut rounds = 0;
        let mut heard = 0;
        while heard < 3 {
            let at = world.relay.next_wakeup().unwrap();
            world.pass(at.0.saturating_sub(world.now.mono.0));
            world.flush();
            heard += acks(&world.inbox(conn));
            rounds += 1;
            assert!(rounds < 20);
        }
        assert!((3_000..8_000).contains(&(world.now.mono.0 - 1_000)), "{:?}", world.now.mono);
        assert_eq!(world.relay.memory(conn).0, 0);
    }
}

#[test]
fn connections_of_a_device_a_user_and_a_workspace_are_bounded() {
    let mut config = lenient();
    config.device_connections_max = 3;
    config.user_connections_max = 4;
    config.workspace_connections_max = 6;
    let mut world = World::with(config);
    let device = Device::new(1);
    let conns: Vec<ConnId> = (0..5).map(|_| world.connect(&device)).collect();
    let closed = |world: &mut World, conn| {
        world.outputs(conn).iter().any(|o| matches!(o, Output::Close { code: FaultCode::Quota, .. }))
    };
    let ends: Vec<bool> = conns.iter().map(|conn| closed(&mut world, *conn)).collect();
    assert_eq!(ends, [true, true, false, false, false], "those made first are lost ones");

    let mut sign_in_as = |number: u8, user: &str| {
        let conn = world.greet(&Device::new(number));
        world.send(conn, sign_in(Some(&token_of(user))));
        let told = world.settle(conn);
        (conn, faults(&told))
    };
    let full = vec![(Some(1), FaultCode::Quota)];
    for number in 10..14 {
        assert_eq!(sign_in_as(number, "mallory").1, []);
    }
    let (refused, told) = sign_in_as(14, "mallory");
    assert_eq!(told, full);
    assert_eq!(sign_in_as(20, "ann").1, []);
    let (last, told) = sign_in_as(21, "ben");
    assert_eq!(told, []);
    assert_eq!(sign_in_as(22, "cy").1, full);
    // A place that is left is free; so is one's own for another sign-in.
    world.send(last, sign_in(Some(&token_of("ben"))));
    assert_eq!(faults(&world.settle(last)), []);
    world.handle(Input::Disconnected { conn: last });
    world.send(refused, sign_in(Some(&token_of("cy"))));
    assert_eq!(faults(&world.settle(refused)), []);
}

/// Answers as large as they can be, which nobody reads.
fn ask_for_large_answers(world: &mut World, conn: ConnId, device: &mut Device) {
    // Noise, so that no compression helps.
    let mut state = u64::from(device.id().0[0]) * 1_000_003 + conn.0;
    let mut parts = Vec::new();
    for _ in 0..6_000 {
        let mut id = String::new();
        while id.len() < 240 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            id.push_str(&format!("{:016x}", state));
        }
        parts.push(raw(&id[..240]));
    }
    hand_over(world, conn, changes(Unit { entities: parts }));
}

fn raw(id: &str) -> EntityChanges {
    EntityChanges { changes: vec![vec![7; 20]], ..of(id, &[]) }
}

#[test]
fn what_a_device_does_not_read_is_bounded_by_connection() {
    let mut world = World::with(lenient());
    let (mut device, conn) = join(&mut world, 1, "mallory");
    let (mut honest, other) = join(&mut world, 2, "ann");
    world.stuck.insert(conn);
    let mut highest = 0;
    for _ in 0..12 {
        ask_for_large_answers(&mut world, conn, &mut device);
        while world.relay.turn(world.now).unwrap().is_some() {
            highest = highest.max(world.relay.memory(conn).1);
        }
        world.flush();
        highest = highest.max(world.relay.memory(conn).1);
    }
    assert!(highest > 1024 * 1024, "{highest}: the bound was never felt");
    assert!(highest <= UNSENT_BYTES_MAX, "{highest}");
    // What it asks beyond waits, and others don't.
    assert!(world.relay.memory(conn).0 > 0);
    world.inbox(other);
    assert_eq!(world.submit(other, unit([of("n1", &[&honest.edit("n1")])])).refused, []);
}

#[test]
fn what_all_devices_together_do_not_read_is_bounded() {
    const UNSENT_MAX: usize = 4 * 1024 * 1024;
    let mut config = lenient();
    config.unsent_bytes_max = UNSENT_MAX;
    let mut world = World::with(config);
    let (mut honest, other) = join(&mut world, 200, "ann");
    let mut deaf: Vec<(Device, ConnId)> =
        (1..10).map(|n| join(&mut world, n, &format!("mallory{n}"))).collect();
    let conns: Vec<ConnId> = deaf.iter().map(|(_, conn)| *conn).chain([other]).collect();
    let (mut cut, mut highest) = (0, 0);
    for (device, conn) in &mut deaf {
        ask_for_large_answers(&mut world, *conn, device);
        loop {
            let turn = world.relay.turn(world.now).unwrap();
            // What a commit holds back counts too, but whom the relay lets go it tells behind that.
            let durable = world.store.flush();
            world.relay.accept(world.now, Input::Durable(durable)).unwrap();
            while let Some(output) = world.relay.poll_output() {
                let Output::Close { conn, code, .. } = output else { continue };
                assert_eq!((code, conn == other), (FaultCode::Quota, false));
                world.relay.accept(world.now, Input::Disconnected { conn }).unwrap();
                cut += 1;
            }
            let all: usize = conns.iter().map(|conn| world.relay.memory(*conn).1).sum();
            assert!(all <= UNSENT_MAX, "{all} after {cut} were let go");
            assert!(world.relay.memory(other).1 < 1024 * 1024, "it is not the honest one's");
            highest = highest.max(all);
            if turn.is_none() {
                break;
            }
        }
    }
    assert!(highest > UNSENT_MAX / 2, "{highest}: the bound was never felt");
    assert!(cut > 0, "those who read nothing are let go");
    world.inbox(other);
    assert_eq!(world.submit(other, unit([of("n1", &[&honest.edit("n1")])])).refused, []);
}

#[test]
fn shared_pages_show_each_what_is_for_them() {
    let mut world = World::with(lenient());
    let (mut writer, writing) = join(&mut world, 1, "ann");
    let listeners: Vec<(Device, ConnId)> = (10..15).map(|n| join(&mut world, n, "ben")).collect();
    for (_, conn) in &listeners {
        world.inbox(*conn);
    }
    world.inbox(writing);
    let change = writer.edit("n1");
    world.send(writing, changes(unit([of("n1", &[&change])])));
    world.flush();
    let own = entries(&world.inbox(writing));
    assert!(matches!(&own[..], [FeedEntry { body: FeedBody::Own(_), .. }]), "{own:?}");
    for (_, conn) in &listeners {
        let heard = entries(&world.inbox(*conn));
        let [FeedEntry { body: FeedBody::Changes { unit, .. }, .. }] = &heard[..] else {
            panic!("{heard:?}")
        };
        assert_eq!(unit.entities[0].changes, [change.bytes()]);
    }
    // One who wants its own changes in full gets what all get.
    let again = world.greet(&writer);
    world.send(again, sign_in(Some(&token_of("ann"))));
    world.send(again, Open { full: true, ..open_from(0) });
    let heard = entries(&world.settle(again));
    assert!(heard.iter().any(|e| matches!(&e.body, FeedBody::Changes { .. })));
    assert!(!heard.iter().any(|e| matches!(&e.body, FeedBody::Own(_))));
}
