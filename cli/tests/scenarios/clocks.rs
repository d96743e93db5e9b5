//! Wrong clocks.

use serde_json::{Value, json};

use crate::world::World;

const YEAR_MS: i64 = 365 * 86_400_000;

fn now_ms() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    i64::try_from(since.as_millis()).unwrap()
}

/// The wall time of a side of a conflict, roughly.
fn year(time: &Value) -> i64 {
    time.as_str().unwrap()[..4].parse().unwrap()
}

fn theme(value: &str) -> Value {
    json!({"set": {"theme": value}})
}

fn name(value: &str) -> Value {
    json!({"set": {"name": value}})
}

/// A device whose clock is a year off, from before it first hears of the relay.
fn a_year_off(offset: &str, offset_ms: i64) {
    let Some(world) = World::new() else { return };
    let relay = world.relay();
    for device in ["phone", "wrong", "server"] {
        world.join(device, &relay, if device == "server" { "authority" } else { "writer" });
    }
    let wrong = |args: &[&str]| world.run("wrong", &[args, &["--clock-offset", offset]].concat());

    // Two edits before the clock is known to be wrong: their order stays.
    world.edit("wrong", "preferences", "own", &theme("first"), offset).ok();
    world.edit("wrong", "preferences", "own", &theme("second"), offset).ok();
    world.edit("wrong", "space", "own", &json!({"increment": {"visits": 4}}), offset).ok();
    world.edit("phone", "preferences", "x", &theme("base"), "0s").ok();
    world.edit("phone", "space", "x", &name("base"), "0s").ok();
    world.sync("phone");
    let report = world.sync_with("wrong", &["--clock-offset", offset]);
    assert_eq!(report["sent"], 3);
    let skew = wrong(&["status"]).ok().json()["clock_skew_ms"].as_i64().unwrap();
    assert!((skew - offset_ms).abs() < 60_000, "{skew}");
    world.sync("phone");
    assert_eq!(world.fields("phone", "preferences", "own")["theme"], "second");
    assert_eq!(world.fields("phone", "space", "own")["visits"], 4);

    // Each has its turn: the later of two edits wins, by the right time.
    for (first, second) in [("wrong", "phone"), ("phone", "wrong")] {
        for device in [first, second] {
            let offset = if device == "wrong" { offset } else { "0s" };
            world.edit(device, "preferences", "x", &theme(device), offset).ok();
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        world.sync_with("wrong", &["--clock-offset", offset]);
        world.sync("phone");
        world.sync_with("wrong", &["--clock-offset", offset]);
        for device in ["phone", "wrong"] {
            assert_eq!(world.fields(device, "preferences", "x")["theme"], second, "{first} then {second}");
        }
    }

    // It takes what others write, and others what it writes; nobody refuses anything. The times
    // that people see are right.
    world.edit("wrong", "space", "x", &name("wrong"), offset).ok();
    world.edit("phone", "space", "x", &name("phone"), "0s").ok();
    world.sync_with("wrong", &["--clock-offset", offset]);
    world.sync("phone");
    world.sync_with("wrong", &["--clock-offset", offset]);
    let conflicts = world.conflicts("phone");
    assert_eq!(conflicts.len(), 1);
    let this_year: i64 = 1970 + now_ms() / (YEAR_MS + YEAR_MS / 1_461);
    for side in conflicts[0]["sides"].as_array().unwrap() {
        assert!((year(&side["time"]) - this_year).abs() <= 0, "{side} in {this_year}");
    }
    assert_eq!(wrong(&["conflicts"]).ok().lines(), conflicts);
    wrong(&["resolve", "space", "x", "name", "--keep", "mine"]).ok();
    world.sync_with("wrong", &["--clock-offset", offset]);
    world.sync("phone");
    world.sync("server");
    assert_eq!(world.fields("phone", "space", "x")["name"], "wrong");
    for device in ["phone", "wrong", "server"] {
        assert_eq!(world.run(device, &["refused"]).ok().out, "", "{device}");
        assert_eq!(world.export(device, "preferences"), world.export("phone", "preferences"));
        assert_eq!(world.export(device, "space"), world.export("phone", "space"));
    }
    let skew = world.status("phone")["clock_skew_ms"].as_i64().unwrap();
    assert!(skew.abs() < 60_000, "{skew}");

    // The clock is mended between an edit and the sync, and back: still its turn and no more.
    world.edit("wrong", "preferences", "x", &theme("wrong"), offset).ok();
    std::thread::sleep(std::time::Duration::from_millis(50));
    world.edit("phone", "preferences", "x", &theme("phone"), "0s").ok();
    world.sync("wrong");
    world.sync("phone");
    world.sync("wrong");
    for device in ["phone", "wrong"] {
        assert_eq!(world.fields(device, "preferences", "x")["theme"], "phone", "{device}");
    }
    let skew = world.status("wrong")["clock_skew_ms"].as_i64().unwrap();
    assert!(skew.abs() < 60_000, "{skew}");
    world.edit("phone", "preferences", "x", &theme("phone again"), "0s").ok();
    std::thread::sleep(std::time::Duration::from_millis(50));
    world.edit("wrong", "preferences", "x", &theme("wrong again"), "0s").ok();
    world.settle(&["wrong", "phone", "server"]);
    assert_eq!(world.fields("phone", "preferences", "x")["theme"], "wrong again");
    assert_eq!(world.run("wrong", &["refused"]).ok().out, "");
}

#[test]
fn a_device_a_year_ahead_wins_no_more_than_its_turn() {
    a_year_off("365d", YEAR_MS);
}

#[test]
fn a_device_a_year_behind_has_its_turn() {
    a_year_off("-365d", -YEAR_MS);
}

/// The clock jumps ahead for one edit only, which the device can't know of: the relay does.
#[test]
fn an_edit_of_a_moment_with_a_wrong_clock_does_not_stay_on_top() {
    let Some(world) = World::new() else { return };
    let relay = world.relay();
    for device in ["phone", "tablet"] {
        world.join(device, &relay, "writer");
    }
    world.edit("phone", "preferences", "x", &theme("base"), "0s").ok();
    world.settle(&["phone", "tablet"]);
    world.edit("phone", "preferences", "x", &theme("ahead"), "365d").ok();
    world.edit("phone", "preferences", "x", &json!({"set": {"language": "de"}}), "0s").ok();
    world.sync("phone");
    world.sync("tablet");
    assert_eq!(world.fields("tablet", "preferences", "x")["theme"], "ahead");
    world.edit("tablet", "preferences", "x", &theme("next"), "0s").ok();
    world.settle(&["tablet", "phone"]);
    for device in ["phone", "tablet"] {
        let fields = world.fields(device, "preferences", "x");
        assert_eq!((&fields["theme"], &fields["language"]), (&json!("next"), &json!("de")), "{device}");
        assert_eq!(world.run(device, &["refused"]).ok().out, "");
    }
    assert_eq!(world.export("phone", "preferences"), world.export("tablet", "preferences"));

    // Extremes are answered, not crashed on.
    for offset in ["36500d", "-36500d", "1000000d", "-1000000d"] {
        let ran = world.edit("phone", "preferences", "x", &theme(offset), offset);
        assert_eq!(ran.code, 0, "{offset}: {ran:?}");
        assert_eq!(world.fields("phone", "preferences", "x")["theme"], offset);
        world.run("phone", &["get", "preferences", "x"]).ok();
        world.sync("phone");
        world.sync("tablet");
        assert_eq!(world.fields("tablet", "preferences", "x")["theme"], offset);
    }
    world.edit("tablet", "preferences", "x", &theme("last"), "0s").ok();
    world.settle(&["tablet", "phone"]);
    assert_eq!(world.fields("phone", "preferences", "x")["theme"], "last");
    for wrong in ["", "x", "1y", "99999999999999999999d", "1.5d"] {
        world.run("phone", &["status", "--clock-offset", wrong]).error("usage", 2);
    }
}
