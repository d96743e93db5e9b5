//! One process owns a directory; the others go through it.

use std::process::Child;
use std::time::Duration;

use serde_json::{Value, json};

use crate::world::{Ran, World, terminate};

#[test]
fn every_command_works_while_watch_runs() {
    let Some(world) = World::new() else { return };
    let relay = world.relay();
    world.join("phone", &relay, "writer");
    world.join("tablet", &relay, "writer");
    let mut watch = world.watch("phone");
    world.set("phone", &["space", "s", "name=one", "visits+=1"]);
    world.edit("phone", "note", "n", &json!({"splice": {"body": [[0, 0, "hi"]]}}), "0s").ok();
    world.sync("phone");
    world.sync("tablet");
    assert_eq!(world.export("phone", "space"), world.export("tablet", "space"));
    assert_eq!(world.export("phone", "note"), world.export("tablet", "note"));

    // What another device writes is printed without anybody asking.
    world.set("tablet", &["note", "n", "tags+=far"]);
    world.sync("tablet");
    let event = watch.event(|event| event["fields"]["tags"] == json!(["far"]));
    assert_eq!(event["event"], "change");
    world.sync("phone");

    // A conflict is seen, listed and settled through the owner.
    world.run("phone", &["get", "space", "s"]).ok();
    let base = world.run("phone", &["get", "space", "s"]).ok().json()["version"].clone();
    world.set("tablet", &["space", "s", "name=two"]);
    world.sync("tablet");
    watch.event(|event| event["id"] == "s" && event["fields"]["name"] == "two");
    world.set("phone", &["space", "s", "name=three", "--if-version", base.as_str().unwrap()]);
    assert_eq!(world.conflicts("phone").len(), 1);
    world.run("phone", &["set", "space", "s", "name=four"]).error("conflict", 4);
    world.sync("phone");
    world.sync("tablet");
    assert_eq!(world.conflicts("tablet"), world.conflicts("phone"));
    world.run("phone", &["resolve", "space", "s", "name", "--keep", "theirs"]).ok();
    world.sync("phone");
    world.sync("tablet");
    assert_eq!(world.conflicts("tablet"), Vec::<Value>::new());
    assert_eq!(world.fields("tablet", "space", "s")["name"], "two");

    // Errors come through as they are.
    world.run("phone", &["get", "note", "none"]).error("not_found", 7);
    world.run("phone", &["set", "nope", "x", "a=1"]).error("validation", 3);
    world.run("phone", &["set", "note", "n"]).ok();
    assert_eq!(world.run("phone", &["refused"]).ok().out, "");
    assert_eq!(world.status("phone")["pending"], 0);
    let digest = world.status("phone")["digest"].clone();
    assert_eq!(terminate(&mut watch.child), 0);
    assert_eq!(world.status("phone")["digest"], digest);
    assert_eq!(world.sync("tablet")["digest"], digest);
}

/// A relay that dies without a word is away for those who have a link to it, too.
#[test]
fn a_relay_that_dies_under_a_link_is_offline() {
    let Some(world) = World::new() else { return };
    let mut relay = world.relay();
    world.join("phone", &relay, "writer");
    let mut watch = world.watch("phone");
    world.sync("phone");
    relay.kill();
    world.set("phone", &["space", "s", "visits+=1"]);
    let start = std::time::Instant::now();
    let sync = world.run("phone", &["sync", "--deadline", "2s"]);
    assert!(start.elapsed() < Duration::from_secs(6), "{:?}", start.elapsed());
    sync.error("network", 6);
    assert_eq!((&sync.json()["outcome"], &sync.json()["pending"]), (&json!("offline"), &json!(1)));
    assert_eq!(terminate(&mut watch.child), 0);
    let _relay = world.relay_at(relay.address());
    assert_eq!(world.sync("phone")["sent"], 1);
}

/// Writers at the same time, with an owner, without one, and while owners come and go.
#[test]
fn writers_at_the_same_time_lose_nothing() {
    let Some(world) = World::new() else { return };
    world.local("a");
    let burst = |count: usize| {
        let set = |n: usize| {
            let id = format!("n{n}");
            world.command("a", &["set", "note", &id, "tags+=x"]).spawn().unwrap()
        };
        let add = |_: usize| world.command("a", &["set", "space", "s", "visits+=1"]).spawn().unwrap();
        let children: Vec<Child> = (0..count).map(|n| if n % 2 == 0 { add(n) } else { set(n) }).collect();
        for child in children {
            Ran::of(child.wait_with_output().unwrap()).ok();
        }
    };
    burst(10);
    assert_eq!(world.fields("a", "space", "s")["visits"], 5);
    let mut watch = world.watch("a");
    burst(20);
    assert_eq!(world.fields("a", "space", "s")["visits"], 15);
    assert_eq!(terminate(&mut watch.child), 0);
    assert_eq!(world.fields("a", "space", "s")["visits"], 15);
    assert_eq!(world.run("a", &["list", "note"]).ok().lines().len(), 10);

    // Owners come and go meanwhile: who is cut off says so, and has written once or not at all.
    let mut told = 0;
    let mut unsure = 0;
    for _ in 0..3 {
        let mut watch = world.watch("a");
        let children: Vec<Child> = (0..8)
            .map(|_| world.command("a", &["set", "space", "s", "visits+=1"]).spawn().unwrap())
            .collect();
        std::thread::sleep(Duration::from_millis(15));
        terminate(&mut watch.child);
        for child in children {
            let ran = Ran::of(child.wait_with_output().unwrap());
            match ran.code {
                0 => told += 1,
                _ => {
                    ran.error("storage", 10);
                    unsure += 1;
                }
            }
        }
    }
    let visits = world.fields("a", "space", "s")["visits"].as_i64().unwrap();
    assert!((15 + told..=15 + told + unsure).contains(&visits), "{visits}: 15 + {told} + up to {unsure}");
}
