//! No relay, a relay that lets nobody in, and a relay that is shouted at.

use std::collections::BTreeSet;
use std::net::UdpSocket;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::world::World;

#[test]
fn without_a_relay_everything_local_works() {
    let Some(world) = World::new() else { return };
    let mut relay = world.relay();
    world.join("phone", &relay, "writer");
    world.join("tablet", &relay, "writer");
    // A port that nobody listens on, one that listens and never answers, and a name that is none.
    let silent = UdpSocket::bind("127.0.0.1:0").unwrap();
    let token = world.token(&[]);
    world.join_with("silent", &format!("quic://{}#{}", silent.local_addr().unwrap(), relay.key()), &token);
    world.join_with("nowhere", &format!("quic://no-such-host.invalid:4433#{}", relay.key()), &token);
    relay.kill();
    for device in ["phone", "silent", "nowhere"] {
        world.set(device, &["note", "n", "body=hello", "tags+=a"]);
        world.set(device, &["note", "n", "tags+=b"]);
        world.set(device, &["space", "s", "visits+=2", "name=x"]);
        world.run(device, &["delete", "note", "n"]).ok();
        world.set(device, &["note", "n", "tags+=c"]);
        assert_eq!(world.run(device, &["list", "note"]).ok().lines().len(), 1);
        let pending = world.status(device)["pending"].clone();
        for _ in 0..2 {
            let start = Instant::now();
            let sync = world.run(device, &["sync", "--deadline", "2s"]);
            assert!(start.elapsed() < Duration::from_secs(6), "{device}: {:?}", start.elapsed());
            sync.error("network", 6);
            let report = sync.json();
            assert_eq!((&report["outcome"], &report["pending"]), (&json!("offline"), &pending), "{device}");
        }
        assert_eq!(world.status(device)["state"], "offline");
        assert_eq!(world.status(device)["pending"], pending);
        assert_eq!(world.fields(device, "space", "s")["visits"], 2);
    }
    // The relay is back at its address: nothing was lost.
    let _relay = world.relay_at(relay.address());
    world.settle(&["phone", "tablet"]);
    assert_eq!(world.fields("tablet", "space", "s")["visits"], 2);
    assert_eq!(world.export("tablet", "note"), world.export("phone", "note"));
}

#[test]
fn each_way_not_to_get_in_has_its_own_error() {
    let Some(world) = World::new() else { return };
    let relay = world.relay();
    let mut codes: Vec<String> = Vec::new();
    let mut refused = |device: &str, url: &str, token: &str| {
        world.join_with(device, url, token);
        world.set(device, &["note", "n", "body=x"]);
        let start = Instant::now();
        let sync = world.run(device, &["sync", "--deadline", "20s"]);
        assert!(start.elapsed() < Duration::from_secs(5), "{device} waits for what won't come");
        let error = sync.error("auth", 5);
        assert_eq!(
            (&sync.json()["outcome"], &sync.json()["pending"]),
            (&json!("auth"), &json!(1)),
            "{device}"
        );
        assert_eq!(world.fields(device, "note", "n")["body"], "x");
        codes.push(error["code"].as_str().unwrap().to_owned());
    };
    let token = world.token(&[]);
    refused("garbage", &relay.url, "not.a.token");
    refused("expired", &relay.url, &world.token(&["--ttl", "1h", "--clock-offset", "-2h"]));
    let elsewhere = world.run("relay", &["token", "--workspace", "work", "--user", "ann"]).ok().json();
    refused("elsewhere", &relay.url, elsewhere["token"].as_str().unwrap());
    let other = World::new().unwrap();
    let other_relay = other.relay();
    refused("key", &format!("quic://{}#{}", relay.address(), other_relay.key()), &token);
    // Signed by another relay's issuer.
    let foreign = other.token(&[]);
    world.join_with("foreign", &relay.url, &foreign);
    let sync = world.run("foreign", &["sync", "--deadline", "20s"]);
    let foreign = sync.error("auth", 5)["code"].clone();
    // One letter of the signature is another.
    let (head, signature) = token.rsplit_once('.').unwrap();
    let forged = match signature.strip_prefix('A') {
        Some(rest) => format!("{head}.B{rest}"),
        None => format!("{head}.A{}", &signature[1..]),
    };
    world.join_with("forged", &relay.url, &forged);
    let forged = world.run("forged", &["sync", "--deadline", "20s"]).error("auth", 5)["code"].clone();
    for code in [&foreign, &forged] {
        assert!(code.as_str().is_some_and(|code| code.contains("token")), "{code}");
    }

    let invite = world.invite();
    for device in ["first", "second"] {
        world.run(device, &["init", "--device", device, "--schema", "schema.toml", "--invite", &invite]).ok();
    }
    world.sync("first");
    world.sync("first");
    codes.push(world.run("second", &["sync"]).error("auth", 5)["code"].as_str().unwrap().to_owned());
    world.sync("first");
    assert_eq!(codes.iter().collect::<BTreeSet<_>>().len(), codes.len(), "{codes:?}");

    for (args, code) in [
        (&["--relay", "http://x", "--token", "t"][..], "bad_relay_url"),
        (&["--relay", "quic://127.0.0.1:1", "--token", "t"], "no_relay_key"),
        (&["--relay", "quic://127.0.0.1:1#nokey", "--token", "t"], "bad_relay_url"),
        (&["--relay", "quic://127.0.0.1:99999#x", "--token", "t"], "bad_relay_url"),
        (&["--relay", &relay.url, "--token", " "], "no_token"),
    ] {
        let init = ["init", "--device", "d", "--schema", "schema.toml", "--workspace", "home"];
        let ran = world.run("broken", &[&init[..], args].concat());
        assert_eq!(ran.error("usage", 2)["code"], code, "{args:?}");
        assert!(!world.path("broken/anabranch.toml").exists());
    }
    for invite in ["", "x", &invite[..invite.len() / 2], &format!("{invite}x")] {
        let ran =
            world.run("broken", &["init", "--device", "d", "--schema", "schema.toml", "--invite", invite]);
        // A letter too many may be in the token, which only the relay judges.
        assert!(ran.code == 2 || invite.len() > 100 && ran.code == 0, "{invite:?}: {ran:?}");
        let _ = std::fs::remove_dir_all(world.path("broken"));
    }
}

/// A new token in the device's file is all it takes.
#[test]
fn a_new_token_lets_a_device_in_again() {
    let Some(world) = World::new() else { return };
    let relay = world.relay();
    let expired = world.token(&["--ttl", "1h", "--clock-offset", "-2h"]);
    world.join_with("phone", &relay.url, &expired);
    world.set("phone", &["note", "n", "body=x"]);
    world.run("phone", &["sync"]).error("auth", 5);
    let file = world.path("phone/anabranch.toml");
    let config = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, config.replace(&expired, &world.token(&[]))).unwrap();
    world.sync("phone");
    // What it was granted outlives the token.
    let config = std::fs::read_to_string(&file).unwrap();
    let token = config.lines().find_map(|line| line.strip_prefix("token = ")).unwrap().to_owned();
    std::fs::write(&file, config.replace(&token, &format!("{expired:?}"))).unwrap();
    world.set("phone", &["note", "n", "tags+=x"]);
    let again = world.run("phone", &["sync"]);
    assert!(again.code == 0 || again.code == 5, "{again:?}");
}

#[test]
fn garbage_does_not_stop_a_relay() {
    let Some(world) = World::new() else { return };
    let mut relay = world.relay();
    world.join("phone", &relay, "writer");
    world.join("tablet", &relay, "writer");
    world.set("phone", &["note", "n", "body=before"]);
    world.settle(&["phone", "tablet"]);

    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let shout = |rounds: usize, random: &mut dyn FnMut() -> u64| {
        for round in 0..rounds {
            let length = (random() % 1_500) as usize;
            let mut packet: Vec<u8> = (0..length).map(|_| random() as u8).collect();
            match (round % 4, packet.len()) {
                // An initial packet of version 1, of an unknown version, a short header.
                (1, 6..) => packet[..6].copy_from_slice(&[0xc3, 0, 0, 0, 1, 8]),
                (2, 6..) => packet[..6].copy_from_slice(&[0xc3, 0xfa, 0xce, 0xb0, 0x0c, 20]),
                (3, 1..) => packet[0] = 0x40,
                _ => {}
            }
            // A full queue at the other end is no fault here.
            let _ = socket.send_to(&packet, relay.address());
        }
    };
    shout(3_000, &mut random);
    world.set("phone", &["space", "s", "visits+=1"]);
    shout(300, &mut random);
    world.settle(&["phone", "tablet"]);
    // In the middle of a session too.
    let mut watch = world.watch("tablet");
    world.sync("tablet");
    shout(3_000, &mut random);
    world.set("phone", &["space", "s", "visits+=1"]);
    world.sync("phone");
    let seen = watch.event(|event| event["id"] == "s" && event["fields"]["visits"] == 2);
    assert_eq!(seen["event"], "change");
    assert!(relay.child.try_wait().unwrap().is_none(), "the relay has ended");
    assert_eq!(crate::world::terminate(&mut relay.child), 0);
    let _: Value = world.status("tablet");
}

/// A device whose relay is killed and started again learns so from the new one, with the next thing
/// that it sends, and not by the silence of the old one.
#[test]
fn a_relay_that_was_killed_and_started_again_is_found_at_once() {
    let Some(world) = World::new() else { return };
    let mut relay = world.relay();
    let address = relay.address().to_owned();
    world.join("phone", &relay, "writer");
    let mut watch = world.watch("phone");
    let done = |event: &Value| event["state"] == "up_to_date" && event["pending"] == 0;
    let empty = "0".repeat(64);
    world.set("phone", &["note", "n", "tags+=old"]);
    let before = watch.event(|event| done(event) && event["digest"] != empty.as_str());
    relay.kill();
    let _relay = world.relay_at(&address);
    let start = std::time::Instant::now();
    world.set("phone", &["note", "n", "tags+=new"]);
    watch.event(|event| done(event) && event["digest"] != before["digest"]);
    assert!(start.elapsed() < Duration::from_secs(8), "{:?}", start.elapsed());
}
