//! Devices that write, lose their link, lose power, and come back: at the end all agree, on
//! what the model says.

use anabranch_core::intent::Intent;
use anabranch_core::store::CommitNo;
use anabranch_tests::draft::Draw;
use anabranch_tests::net::Net;
use proptest::prelude::*;
use serde_json::json;

use crate::schedules::{EVERYTHING, config};

#[derive(Clone, Debug)]
pub(crate) enum Event {
    Write { node: u8, parts: Vec<(u8, Vec<Draw>)>, flush: bool },
    Connect { node: u8 },
    Disconnect { node: u8 },
    Deliver { node: u8, messages: u8 },
    Flush { node: u8 },
    FlushRelay,
    Crash { node: u8 },
    CrashRelay,
    BackUpRelay,
    RestoreRelay { told: bool },
    Quiet,
}

pub(crate) fn events() -> impl Strategy<Value = Vec<Event>> {
    let node = any::<u8>;
    let draws = prop::collection::vec(any::<Draw>(), 1..4);
    let parts = prop::collection::vec((any::<u8>(), draws), 1..3);
    let event = prop_oneof![
        12 => (node(), parts, prop::bool::weighted(0.7))
            .prop_map(|(node, parts, flush)| Event::Write { node, parts, flush }),
        4 => node().prop_map(|node| Event::Connect { node }),
        2 => node().prop_map(|node| Event::Disconnect { node }),
        8 => (node(), 1u8..8).prop_map(|(node, messages)| Event::Deliver { node, messages }),
        3 => node().prop_map(|node| Event::Flush { node }),
        5 => Just(Event::FlushRelay),
        1 => node().prop_map(|node| Event::Crash { node }),
        1 => Just(Event::CrashRelay),
        1 => Just(Event::Quiet),
    ];
    prop::collection::vec(event, 1..60)
}

pub(crate) fn play(net: &mut Net, events: &[Event]) {
    let place = |net: &Net, node: &u8| usize::from(*node) % net.devices();
    for event in events {
        net.pass(7);
        match event {
            Event::Write { node, parts, flush } => {
                let node = place(net, node);
                net.write(node, parts);
                if *flush {
                    net.flush(node);
                }
            }
            Event::Connect { node } => net.connect(place(net, node)),
            Event::Disconnect { node } => net.disconnect(place(net, node)),
            Event::Deliver { node, messages } => {
                let node = place(net, node);
                for _ in 0..*messages {
                    net.deliver(node, true);
                    net.deliver(node, false);
                }
            }
            Event::Flush { node } => net.flush(place(net, node)),
            Event::FlushRelay => net.flush_relay(),
            Event::Crash { node } => net.crash(place(net, node)),
            Event::CrashRelay => net.crash_relay(),
            Event::BackUpRelay => net.back_up_relay(),
            Event::RestoreRelay { told } => net.restore_relay(*told),
            Event::Quiet => net.quiet(),
        }
    }
}

/// What one device does to the one entity that all count in.
#[derive(Clone, Debug)]
enum Count {
    /// Adds one, now and then in the same breath as something that only the relay refuses.
    Add {
        node: u8,
        forbidden: bool,
    },
    Else(Event),
}

fn counts() -> impl Strategy<Value = Vec<Count>> {
    let add =
        (any::<u8>(), prop::bool::weighted(0.3)).prop_map(|(node, forbidden)| Count::Add { node, forbidden });
    let other = events().prop_map(|mut events| events.swap_remove(0));
    let other = other.prop_filter("writes are others", |event| !matches!(event, Event::Write { .. }));
    prop::collection::vec(prop_oneof![add, other.prop_map(Count::Else)], 1..50)
}

pub(crate) const COUNTING: &str = r#"
[thing]
version = 1
[thing.fields]
count = { type = "int", merge = "counter" }
body  = { type = "text" }
only  = { type = "string", merge = "server_only" }
"#;

proptest! {
    #![proptest_config(config(60))]

    /// Whatever is lost on the way, dated anew, refused beside it or written again: what a
    /// user was promised counts once. Clocks are off by up to a year.
    #[test]
    fn every_promised_increment_counts_once(
        offsets in prop::collection::vec(prop_oneof![
            Just(0i64), Just(31_536_000_000), Just(-31_536_000_000), Just(120_000), -50_000i64..50_000
        ], 2..4),
        counts in counts(),
    ) {
        let mut net = Net::new(COUNTING, "thing", &offsets);
        // Each promise: the device, its commit, and whether it was what the relay refuses.
        let mut promised: Vec<(usize, CommitNo, bool)> = Vec::new();
        for (turn, count) in counts.into_iter().enumerate() {
            match count {
                Count::Add { node, forbidden } => {
                    net.pass(7);
                    let node = usize::from(node) % net.devices();
                    let forbidden = forbidden && node > 0;
                    let intent = match forbidden {
                        true => Intent::Set { field: "only".into(), value: json!(turn.to_string()) },
                        false => Intent::Increment { field: "count".into(), by: 1 },
                    };
                    let commit = net.write_plainly(node, "e", &[intent], !forbidden);
                    promised.push((node, commit, forbidden));
                }
                Count::Else(event) => {
                    if let Event::Crash { node } = event {
                        let node = usize::from(node) % net.devices();
                        let durable = net.durable(node);
                        promised.retain(|(other, commit, _)| *other != node || *commit <= durable);
                    }
                    play(&mut net, &[event]);
                }
            }
        }
        net.agree();
        let increments = promised.iter().filter(|(_, _, forbidden)| !forbidden).count();
        for node in 0..net.devices() {
            let (row, refused) = net.look(node, "e");
            let shown = row.map_or(json!(0), |row| row.fields["count"].clone());
            prop_assert_eq!(shown, json!(increments), "device {}", node);
            let forbidden = promised.iter().filter(|(other, _, forbidden)| *other == node && *forbidden).count();
            prop_assert_eq!(refused, forbidden as u64, "device {}", node);
        }
    }
}

proptest! {
    #![proptest_config(config(60))]

    #[test]
    fn all_devices_and_the_relay_end_as_the_model_says(
        offsets in prop::collection::vec(-20_000i64..20_000, 2..5),
        events in events(),
    ) {
        let mut net = Net::new(&format!("[thing]\nversion = 1\n[thing.fields]\n{EVERYTHING}"), "thing", &offsets);
        play(&mut net, &events);
        net.settle();
    }
}

fn forbidden(value: &str) -> Intent {
    Intent::Set { field: "only".into(), value: json!(value) }
}

fn one_more() -> Intent {
    Intent::Increment { field: "count".into(), by: 1 }
}

#[test]
fn an_answer_about_a_change_says_nothing_of_what_it_was_rewritten_to() {
    let mut net = Net::new(COUNTING, "thing", &[0, 0]);
    let ben = 1;
    net.write_plainly(ben, "e", &[forbidden("a")], false);
    net.connect(ben);
    let deliver = |net: &mut Net, messages: usize| {
        for _ in 0..messages {
            net.deliver(ben, true);
            net.deliver(ben, false);
        }
    };
    deliver(&mut net, 2);
    net.flush_relay();
    deliver(&mut net, 1);
    // The relay refuses the change; its answer is lost with the link.
    net.flush(ben);
    deliver(&mut net, 2);
    net.write_plainly(ben, "e", &[one_more()], true);
    // Both are sent; then the feed tells of the refusal, and after it the answer of both.
    net.agree();
    assert_eq!(net.look(0, "e").0.expect("the increment reached the relay").fields["count"], 1);
}

#[test]
fn any_number_of_refusals_in_one_session_costs_nothing_else() {
    let mut net = Net::new(COUNTING, "thing", &[0, 0]);
    for turn in 0..6 {
        net.write_plainly(1, "e", &[forbidden(&turn.to_string())], false);
        net.write_plainly(1, "e", &[one_more()], true);
    }
    net.agree();
    let (row, refused) = net.look(1, "e");
    assert_eq!((row.expect("the increments stay").fields["count"].clone(), refused), (json!(6), 6));
    assert_eq!(net.look(0, "e").0.unwrap().fields["count"], 6);
}

#[test]
fn a_long_session_with_many_refusals_costs_nothing_else() {
    let mut net = Net::new(COUNTING, "thing", &[0, 0]);
    net.connect(1);
    net.quiet();
    for turn in 0..6 {
        net.write_plainly(1, "e", &[forbidden(&turn.to_string())], false);
        net.write_plainly(1, "e", &[one_more()], true);
        net.quiet();
    }
    net.agree();
    let (row, refused) = net.look(1, "e");
    assert_eq!((row.expect("the increments stay").fields["count"].clone(), refused), (json!(6), 6));
}
