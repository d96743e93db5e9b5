//! Devices that write, lose their link, lose power, and come back: at the end all agree, on
//! what the model says.

use anabranch_tests::draft::Draw;
use anabranch_tests::net::Net;
use proptest::prelude::*;

use crate::schedules::{EVERYTHING, config};

#[derive(Clone, Debug)]
enum Event {
    Write { node: u8, parts: Vec<(u8, Vec<Draw>)>, flush: bool },
    Connect { node: u8 },
    Disconnect { node: u8 },
    Deliver { node: u8, messages: u8 },
    Flush { node: u8 },
    FlushRelay,
    Crash { node: u8 },
    CrashRelay,
    Quiet,
}

fn events() -> impl Strategy<Value = Vec<Event>> {
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

fn play(net: &mut Net, events: &[Event]) {
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
            Event::Quiet => net.quiet(),
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
