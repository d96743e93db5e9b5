//! A relay that is put back to an older copy, or replaced by an empty one: devices bring what they
//! hold, and at the end everything is there once.

use anabranch_core::intent::Intent;
use anabranch_core::wire::GrantRole;
use anabranch_tests::net::Net;
use proptest::prelude::*;
use serde_json::json;

use crate::network::{COUNTING, Event, events, play};
use crate::schedules::{EVERYTHING, config};

/// Stretches of a schedule: what happens, whether a copy is made then, and whether the relay is put
/// back after it, told of that or not.
fn stretches() -> impl Strategy<Value = Vec<(Vec<Event>, bool, Option<bool>)>> {
    let back = prop_oneof![2 => Just(None), 1 => Just(Some(true)), 2 => Just(Some(false))];
    prop::collection::vec((events(), any::<bool>(), back), 1..4)
}

fn play_stretches(net: &mut Net, stretches: &[(Vec<Event>, bool, Option<bool>)]) {
    for (events, back_up, back) in stretches {
        play(net, events);
        if *back_up {
            play(net, &[Event::BackUpRelay]);
        }
        if let Some(told) = back {
            play(net, &[Event::RestoreRelay { told: *told }]);
        }
    }
}

fn everything() -> String {
    format!("[thing]\nversion = 1\n[thing.fields]\n{EVERYTHING}")
}

proptest! {
    #![proptest_config(config(25))]

    /// An authority is among the devices: it brings what anyone wrote.
    #[test]
    fn a_relay_that_went_back_is_repaired(
        offsets in prop::collection::vec(-20_000i64..20_000, 2..5),
        stretches in stretches(),
    ) {
        let mut net = Net::new(&everything(), "thing", &offsets);
        net.back_up_relay();
        play_stretches(&mut net, &stretches);
        net.settle();
        for node in 0..net.devices() {
            prop_assert_eq!(net.lacking(node), 0);
        }
    }

    /// Each device brings its own, and waits for what that builds on.
    #[test]
    fn writers_alone_repair_it_too(
        offsets in prop::collection::vec(-20_000i64..20_000, 2..5),
        stretches in stretches(),
    ) {
        let mut net = Net::new(&everything(), "thing", &offsets);
        net.appoint(0, GrantRole::Writer);
        net.disconnect(0);
        net.connect(0);
        net.quiet();
        net.back_up_relay();
        play_stretches(&mut net, &stretches);
        net.settle();
        for node in 0..net.devices() {
            prop_assert_eq!(net.lacking(node), 0);
        }
    }
}

fn one_more() -> Intent {
    Intent::Increment { field: "count".into(), by: 1 }
}

fn count(net: &Net, node: usize, id: &str) -> serde_json::Value {
    net.look(node, id).0.map_or(json!(null), |row| row.fields["count"].clone())
}

#[test]
fn an_empty_relay_gets_everything_schema_included() {
    let mut net = Net::new(COUNTING, "thing", &[0, 0, 0]);
    for turn in 0..5 {
        for node in 0..3 {
            net.write_plainly(node, &format!("e{turn}"), &[one_more()], true);
        }
    }
    net.write_together(1, &[("a", &[one_more()]), ("b", &[one_more()])], true);
    net.agree();
    net.restore_relay(true);
    // Whoever comes first finds no schema, and is not refused for good.
    net.connect(1);
    net.quiet();
    net.agree();
    for node in 0..3 {
        assert_eq!(count(&net, node, "e4"), 3, "device {node}");
        assert_eq!(count(&net, node, "b"), 1, "device {node}");
        assert_eq!(net.look(node, "e4").1, 0);
    }
}

#[test]
fn what_only_an_absent_device_can_bring_is_counted_and_waited_for() {
    let mut net = Net::new(COUNTING, "thing", &[0, 0, 0]);
    net.appoint(0, GrantRole::Writer);
    net.agree();
    net.back_up_relay();
    net.write_plainly(1, "e", &[one_more()], true);
    net.write_plainly(1, "f", &[one_more()], true);
    net.agree();
    // Builds on what device 1 wrote.
    net.write_plainly(2, "e", &[one_more()], true);
    net.agree();
    net.restore_relay(false);
    for node in [0, 2] {
        net.connect(node);
    }
    net.quiet();
    assert_eq!((net.lacking(0), net.lacking(2)), (2, 2));
    assert_eq!(count(&net, 2, "e"), 2, "nothing is lost meanwhile");
    net.crash(2);
    net.connect(2);
    net.quiet();
    assert_eq!(net.lacking(2), 2, "it is known after a restart too");
    net.connect(1);
    net.quiet();
    net.agree();
    for node in 0..3 {
        assert_eq!((count(&net, node, "e"), count(&net, node, "f")), (json!(2), json!(1)), "device {node}");
        assert_eq!(net.lacking(node), 0, "device {node}");
    }
}

#[test]
fn nothing_is_sent_to_a_relay_that_lost_the_schema_it_was_made_by() {
    let mut net = Net::new(COUNTING, "thing", &[0, 0, 0]);
    net.agree();
    net.back_up_relay();
    let newer = COUNTING.replace("version = 1", "version = 2") + "more = { type = \"string\" }\n";
    for node in 0..3 {
        net.upgrade(node, &newer);
    }
    net.quiet();
    net.push_schema(0);
    net.quiet();
    let more = Intent::Set { field: "more".into(), value: json!("newer") };
    net.write_plainly(1, "e", std::slice::from_ref(&more), true);
    net.write_plainly(2, "e", &[one_more()], true);
    net.agree();
    net.restore_relay(false);
    for node in [1, 2] {
        net.connect(node);
    }
    net.write_plainly(2, "f", &[more], true);
    net.quiet();
    assert_eq!((net.pending(1), net.pending(2)), (1, 2), "an older schema would refuse it for good");
    // The authority has the schema, and pushes it as it finds it lost.
    net.connect(0);
    net.quiet();
    net.agree();
    for node in 0..3 {
        let (row, refused) = net.look(node, "e");
        let fields = row.unwrap().fields;
        assert_eq!((&fields["more"], &fields["count"]), (&json!("newer"), &json!(1)), "device {node}");
        assert_eq!(refused, 0);
        assert_eq!(net.look(node, "f").0.unwrap().fields["more"], json!("newer"));
    }
}

/// A relay went back twice to one backup, which has an older schema. Who had brought the newer one in between,
/// and not heard of it in the feed, saw no difference, and sent what the older schema refuses for good.
/// Found by the simulator (seed 3822).
#[test]
fn a_relay_that_goes_back_to_the_same_place_twice_has_lost_its_schema_twice() {
    for heard in 0..10 {
        let mut net = Net::new(COUNTING, "thing", &[0, 0]);
        net.agree();
        net.back_up_relay();
        let newer = COUNTING.replace("version = 1", "version = 2") + "more = { type = \"string\" }\n";
        for node in 0..2 {
            net.upgrade(node, &newer);
        }
        net.quiet();
        net.push_schema(0);
        net.quiet();
        net.write_plainly(0, "e", &[Intent::Set { field: "more".into(), value: json!("newer") }], true);
        net.agree();
        net.restore_relay(false);
        net.connect(0);
        for _ in 0..heard {
            net.flush(0);
            while net.deliver(0, true) {}
            net.flush_relay();
            net.deliver(0, false);
        }
        net.restore_relay(false);
        net.agree();
        for node in 0..2 {
            let (row, refused) = net.look(node, "e");
            assert_eq!(row.unwrap().fields["more"], json!("newer"), "device {node}, {heard} messages heard");
            assert_eq!((refused, net.pending(node)), (0, 0), "device {node}, {heard} messages heard");
        }
    }
}

#[test]
fn what_was_refused_stays_refused() {
    let mut net = Net::new(COUNTING, "thing", &[0, 0]);
    net.agree();
    net.back_up_relay();
    net.write_plainly(1, "e", &[one_more()], true);
    let forbidden = Intent::Set { field: "only".into(), value: json!("mine") };
    net.write_plainly(1, "e", &[forbidden], false);
    net.write_plainly(1, "e", &[one_more()], true);
    net.agree();
    net.restore_relay(true);
    net.agree();
    for node in 0..2 {
        let (row, refused) = net.look(node, "e");
        let fields = row.unwrap().fields;
        assert_eq!((&fields["count"], &fields["only"]), (&json!(2), &json!(null)), "device {node}");
        assert_eq!(refused, u64::from(node == 1), "what was refused before the restore, once");
    }
}

/// What a device dated anew when its store had come back was looked for under the names that it had before,
/// and the replica failed.
#[test]
fn a_device_that_went_back_with_a_wrong_clock_repairs_a_relay_that_went_back() {
    let mut net = Net::new(COUNTING, "thing", &[0, 0]);
    net.agree();
    net.back_up_relay();
    net.disconnect(1);
    let earlier = net.backup(1);
    net.write_plainly(1, "f", &[one_more()], true);
    net.flush(1);
    let backup = net.backup(1);
    // The life that is lost sent something, but not this.
    net.restore(1, &earlier);
    net.write_plainly(1, "g", &[one_more()], true);
    net.agree();
    net.restore(1, &backup);
    net.set_clock(1, -47_000_000_000);
    // It hears that its store went back, and the link breaks.
    net.connect(1);
    while net.deliver(1, true) {}
    net.flush_relay();
    for _ in 0..2 {
        net.deliver(1, false);
    }
    net.flush(1);
    net.restore_relay(true);
    net.agree();
    assert_eq!(net.set_back(), 1);
    for node in 0..2 {
        for id in ["f", "g"] {
            assert_eq!(count(&net, node, id), json!(1), "{id} on device {node}");
        }
    }
}

/// The relay went back to before it was brought a newer schema, and was brought it again before some
/// devices came: to them it looked as if it had lost the older one, for ever.
#[test]
fn a_relay_that_went_back_and_has_a_newer_schema_since_lost_none() {
    let mut net = Net::new(COUNTING, "thing", &[0, 0, 0]);
    net.agree();
    net.back_up_relay();
    net.write_plainly(1, "e", &[one_more()], true);
    net.agree();
    net.restore_relay(true);
    let newer = COUNTING.replace("version = 1", "version = 2") + "more = { type = \"string\" }\n";
    net.upgrade(0, &newer);
    net.quiet();
    net.push_schema(0);
    net.quiet();
    for node in [1, 2] {
        net.connect(node);
    }
    net.write_plainly(2, "e", &[one_more()], true);
    net.quiet();
    for node in 0..3 {
        assert_eq!(net.pending(node), 0, "device {node}");
    }
    net.agree();
    assert_eq!(count(&net, 0, "e"), 2);
}

/// What waits for the schema that a relay lost is sent when somebody has pushed a later one meanwhile.
#[test]
fn a_later_schema_ends_the_wait_for_one_that_was_lost() {
    let mut net = Net::new(COUNTING, "thing", &[0, 0, 0]);
    net.agree();
    net.back_up_relay();
    let newer = COUNTING.replace("version = 1", "version = 2") + "more = { type = \"string\" }\n";
    let newest = newer.replace("version = 2", "version = 3") + "most = { type = \"string\" }\n";
    net.upgrade(0, &newer);
    net.quiet();
    net.push_schema(0);
    net.quiet();
    net.agree();
    net.disconnect(0);
    net.restore_relay(false);
    for node in [1, 2] {
        net.connect(node);
    }
    net.write_plainly(1, "e", &[one_more()], true);
    net.quiet();
    assert_eq!(net.pending(1), 1, "an older schema might refuse it for good");
    for node in [1, 2] {
        net.disconnect(node);
    }
    net.upgrade(0, &newest);
    net.quiet();
    net.push_schema(0);
    net.quiet();
    net.connect(1);
    net.quiet();
    assert_eq!(net.pending(1), 0);
    net.agree();
}

/// A relay that went back to before its first schema was brought a newer one before some devices came, which
/// waited for the older one, for ever, also if their own app is as old.
#[test]
fn a_schema_that_came_after_the_one_that_was_lost_is_waited_for_by_nobody() {
    let mut net = Net::new(COUNTING, "thing", &[0, 0, 0, 0]);
    net.agree();
    net.write_plainly(1, "e", &[one_more()], true);
    net.agree();
    net.appoint(3, GrantRole::Authority);
    net.agree();
    net.restore_relay(true);
    let newer = COUNTING.replace("version = 1", "version = 2") + "more = { type = \"string\" }\n";
    net.upgrade(0, &newer);
    net.quiet();
    net.push_schema(0);
    net.quiet();
    net.upgrade(2, &newer);
    for node in 1..4 {
        net.write_plainly(node, "e", &[one_more()], true);
    }
    net.agree();
    for node in 0..4 {
        assert_eq!(net.pending(node), 0, "device {node}");
        assert_eq!(count(&net, node, "e"), json!(4), "device {node}");
    }
}

/// Three devices that hold what device 1 wrote since its backup and the relay's. Both went back to those.
fn both_went_back() -> Net {
    let mut net = Net::new(COUNTING, "thing", &[0, 0, 0]);
    net.write_plainly(1, "e", &[one_more()], true);
    net.agree();
    net.back_up_relay();
    let backup = net.backup(1);
    net.write_plainly(1, "e", &[one_more()], true);
    net.write_together(1, &[("a", &[one_more()]), ("b", &[one_more()])], true);
    net.agree();
    net.restore(1, &backup);
    net.restore_relay(false);
    net
}

#[test]
fn what_others_bring_back_makes_a_device_that_went_back_write_again() {
    let mut net = both_went_back();
    net.write_plainly(1, "e", &[one_more()], true);
    // The authority comes first, and brings what was lost.
    net.connect(0);
    net.quiet();
    net.agree();
    for node in 0..3 {
        assert_eq!(count(&net, node, "e"), 3, "device {node}");
        assert_eq!((count(&net, node, "a"), count(&net, node, "b")), (json!(1), json!(1)), "device {node}");
    }
}

/// Each of the others refused what the relay had admitted in the place of what they held, and differed for good.
#[test]
fn what_a_relay_admitted_displaces_what_others_hold_in_its_place() {
    let mut net = both_went_back();
    net.disconnect(0);
    net.disconnect(2);
    net.write_plainly(1, "a", &[one_more(), one_more()], true);
    net.connect(1);
    net.quiet();
    // What builds on what is displaced goes with it: it was never there.
    net.write_plainly(2, "a", &[one_more()], true);
    net.agree();
    for node in 0..3 {
        assert_eq!(count(&net, node, "a"), 3, "device {node}");
        // The other member of the transaction is gone too, and what has its own place is not.
        assert_eq!(count(&net, node, "b"), json!(null), "device {node}");
        assert_eq!(count(&net, node, "e"), 2, "device {node}");
        assert_eq!(net.lacking(node), 0, "device {node}");
    }
}

/// A year and a half: more than is tolerated.
const FAR_MS: i64 = 47_000_000_000;

/// Two lives of a device sent an edit with different dates, as one of them had a wrong clock. The relay lost what
/// the first had sent, and others bring it back.
#[test]
fn an_edit_that_two_lives_sent_in_different_forms_counts_once() {
    for (first_clock, second_clock) in [(0, FAR_MS), (FAR_MS, 0)] {
        for others_first in [false, true] {
            let mut net = Net::new(COUNTING, "thing", &[0, 0, 0]);
            net.agree();
            net.back_up_relay();
            net.disconnect(1);
            net.set_clock(1, first_clock);
            net.write_plainly(1, "e", &[one_more()], true);
            net.flush(1);
            let backup = net.backup(1);
            net.agree();
            net.restore(1, &backup);
            net.restore_relay(false);
            net.set_clock(1, second_clock);
            for node in if others_first { [0, 1] } else { [1, 0] } {
                net.connect(node);
                net.quiet();
            }
            net.agree();
            for node in 0..3 {
                let wrong = format!("device {node}, others first: {others_first}, clock {first_clock}");
                assert_eq!(count(&net, node, "e"), 1, "{wrong}");
                assert_eq!(net.look(node, "e").1, 0, "refused: {wrong}");
            }
        }
    }
}

/// What is displaced may be of a type that an older app does not know: it stopped at that for ever.
#[test]
fn what_an_app_does_not_know_is_displaced_too() {
    let newer = format!(
        "{COUNTING}\n[other]\nversion = 1\n[other.fields]\ncount = {{ type = \"int\", merge = \"counter\" }}\n"
    );
    let mut net = Net::new(&newer, "other", &[0, 0, 0]);
    net.agree();
    net.upgrade(2, COUNTING);
    net.agree();
    net.back_up_relay();
    let backup = net.backup(1);
    net.write_plainly(1, "e", &[one_more()], true);
    net.agree();
    net.restore(1, &backup);
    net.restore_relay(false);
    net.write_plainly(1, "e", &[one_more(), one_more()], true);
    net.connect(1);
    net.quiet();
    net.agree();
    assert_eq!((count(&net, 0, "e"), count(&net, 1, "e")), (json!(2), json!(2)));
}
