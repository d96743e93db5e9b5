//! The first words of a connection, and its last.

use anabranch_core::relay::{Input, Output};
use anabranch_core::wire::*;

use crate::support::*;

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
