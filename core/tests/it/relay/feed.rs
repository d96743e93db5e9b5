//! What is durable before it is said, and who hears of it.

use anabranch_core::admission::RefusalCode;
use anabranch_core::relay::{Output, RelayConfig};
use anabranch_core::store::Keyspace;
use anabranch_core::wire::*;

use crate::support::*;

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
