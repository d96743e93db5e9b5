//! Processes that are killed at any moment.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::process::{Child, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

use crate::world::{Ran, World, setting};

/// What was told to be done, and what may have been done without being told.
#[derive(Default)]
struct Told {
    visits: i64,
    unsure: i64,
    records: Vec<String>,
}

impl Told {
    fn took(&mut self, child: Child) {
        let ran = Ran::of(child.wait_with_output().unwrap());
        match ran.code {
            0 => self.visits += 1,
            _ => self.unsure += 1,
        }
    }
}

struct Chance(u64);

impl Chance {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }

    fn pause(&mut self, most_ms: u64) {
        std::thread::sleep(Duration::from_micros(self.below(most_ms * 1_000)));
    }
}

const VISIT: [&str; 4] = ["set", "space", "s", "visits+=1"];

/// Imports notes and kills that; what the progress had told by then is there.
fn killed_import(world: &World, chance: &mut Chance, told: &mut Told, round: u64) {
    let ids: Vec<String> = (0..1_000).map(|n| format!("r{round}-{n:04}")).collect();
    let input: String = ids.iter().map(|id| json!({"id": id, "tags": ["x"]}).to_string() + "\n").collect();
    let args = ["import", "-", "--type", "note", "--progress"];
    let mut child = world.command("phone", &args).stdin(Stdio::piped()).spawn().unwrap();
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    let stderr = BufReader::new(child.stderr.take().unwrap());
    let reader = std::thread::spawn(move || {
        let lines = stderr.lines().map_while(Result::ok);
        let done =
            lines.filter_map(|line| serde_json::from_str::<Value>(&line).ok()?["progress"]["done"].as_u64());
        done.last().unwrap_or_default()
    });
    chance.pause(400);
    child.kill().unwrap();
    child.wait().unwrap();
    let done = usize::try_from(reader.join().unwrap()).unwrap();
    let prefix = format!("r{round}-");
    let there: Vec<String> = world
        .run("phone", &["export", "note"])
        .ok()
        .lines()
        .iter()
        .filter_map(|line| line["id"].as_str().filter(|id| id.starts_with(&prefix)).map(str::to_owned))
        .collect();
    assert!(there.len() >= done, "{} of {done} records that were told are there", there.len());
    assert_eq!(there, ids[..there.len()], "what is there is no beginning of the input");
    told.records.extend(there);
}

/// Kills whatever `child` is at some moment.
fn kill(mut child: Child, chance: &mut Chance, most_ms: u64) -> Ran {
    chance.pause(most_ms);
    let _ = child.kill();
    Ran::of(child.wait_with_output().unwrap())
}

#[test]
fn kills_lose_nothing_that_was_told_and_double_nothing() {
    let Some(world) = World::new() else { return };
    let rounds = setting("ANABRANCH_KILL_ROUNDS", 6);
    let seed = setting("ANABRANCH_KILL_SEED", u64::from(std::process::id()));
    println!("{rounds} rounds, ANABRANCH_KILL_SEED={seed}");
    let mut chance = Chance(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let mut relay = world.relay();
    let address = relay.address().to_owned();
    world.join("phone", &relay, "writer");
    world.join("tablet", &relay, "writer");
    let mut told = Told::default();
    let spawn = |device: &str, args: &[&str]| world.command(device, args).spawn().unwrap();
    let start = chance.below(6);
    for round in 0..rounds {
        for device in ["phone", "tablet"] {
            for _ in 0..=chance.below(2) {
                told.took(spawn(device, &VISIT));
            }
        }
        match (round + start) % 6 {
            0 => killed_import(&world, &mut chance, &mut told, round),
            // A write is killed, told or not.
            1 => {
                for device in ["phone", "tablet"] {
                    match kill(spawn(device, &VISIT), &mut chance, 80).out.is_empty() {
                        true => told.unsure += 1,
                        false => told.visits += 1,
                    }
                }
            }
            // A device is killed in a sync.
            2 | 3 => {
                killed_import(&world, &mut chance, &mut told, round);
                let sync = ["sync", "--deadline", "20s"];
                kill(spawn("phone", &sync), &mut chance, 300);
                kill(spawn("tablet", &sync), &mut chance, 300);
            }
            // The relay is killed in syncs.
            4 => {
                killed_import(&world, &mut chance, &mut told, round);
                let sync = ["sync", "--deadline", "3s"];
                let syncs = [spawn("phone", &sync), spawn("tablet", &sync)];
                chance.pause(300);
                relay.kill();
                for child in syncs {
                    let ran = Ran::of(child.wait_with_output().unwrap());
                    assert!([0, 6, 11].contains(&ran.code), "{ran:?}");
                }
                relay = world.relay_at(&address);
            }
            // All at once, while an owner is connected.
            _ => {
                let watch = spawn("phone", &["watch"]);
                let writes: Vec<Child> = (0..4).map(|_| spawn("phone", &VISIT)).collect();
                let sync = spawn("tablet", &["sync", "--deadline", "3s"]);
                chance.pause(200);
                relay.kill();
                let mut watch = watch;
                let _ = watch.kill();
                let _ = watch.stdout.take().unwrap().read_to_end(&mut Vec::new());
                watch.wait().unwrap();
                for write in writes {
                    told.took(write);
                }
                sync.wait_with_output().unwrap();
                relay = world.relay_at(&address);
            }
        }
        if chance.below(3) == 0 {
            world.set("tablet", &["space", "s", "name=x"]);
        }
        world.settle(&["phone", "tablet"]);
        for device in ["phone", "tablet"] {
            let visits = world.fields(device, "space", "s")["visits"].as_i64().unwrap();
            assert!(
                (told.visits..=told.visits + told.unsure).contains(&visits),
                "round {round}, {device}: {visits} where {} were told and {} not",
                told.visits,
                told.unsure
            );
            assert_eq!(world.run(device, &["refused"]).ok().out, "", "round {round}, {device}");
        }
        let notes = world.export("tablet", "note");
        assert!(notes == world.export("phone", "note"), "round {round}");
        assert_eq!(notes.lines().count(), told.records.len(), "round {round}");
        assert_eq!(world.export("phone", "space"), world.export("tablet", "space"), "round {round}");
    }
    // Somebody new gets the same from the relay alone.
    world.join("new", &relay, "reader");
    world.settle(&["new", "phone"]);
    assert_eq!(world.export("new", "space"), world.export("phone", "space"));
    assert!(world.export("new", "note") == world.export("phone", "note"));
}

fn copy(from: &std::path::Path, to: &std::path::Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().map(Result::unwrap) {
        match entry.file_type().unwrap().is_dir() {
            true => copy(&entry.path(), &to.join(entry.file_name())),
            false => drop(std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap()),
        }
    }
}

/// A device that is put back to an older copy of its directory, and two that go on from one
/// copy: what they wrote before and after counts once.
#[test]
fn a_directory_that_went_back_or_was_copied_loses_nothing() {
    let Some(world) = World::new() else { return };
    let relay = world.relay();
    world.join("phone", &relay, "writer");
    world.join("tablet", &relay, "writer");
    world.set("phone", &["space", "s", "visits+=1"]);
    world.settle(&["phone", "tablet"]);

    copy(&world.path("phone"), &world.path("old"));
    world.set("phone", &["space", "s", "visits+=10"]);
    world.set("phone", &["note", "n", "tags+=sent"]);
    world.sync("phone");
    std::fs::remove_dir_all(world.path("phone")).unwrap();
    copy(&world.path("old"), &world.path("phone"));
    world.set("phone", &["space", "s", "visits+=100"]);
    world.set("phone", &["note", "n", "tags+=after"]);
    world.settle(&["phone", "tablet"]);

    copy(&world.path("phone"), &world.path("copy"));
    world.set("phone", &["space", "s", "visits+=1000"]);
    world.set("copy", &["space", "s", "visits+=10000"]);
    world.set("phone", &["note", "m", "tags+=phone"]);
    world.set("copy", &["note", "m", "tags+=copy"]);
    world.settle(&["phone", "copy", "tablet"]);
    world.set("copy", &["space", "s", "visits+=100000"]);
    world.set("phone", &["space", "s", "visits+=1000000"]);
    world.settle(&["copy", "tablet", "phone"]);
    for device in ["phone", "copy", "tablet"] {
        assert_eq!(world.fields(device, "space", "s")["visits"], 1_111_111, "{device}");
        assert_eq!(world.fields(device, "note", "n")["tags"], json!(["after", "sent"]), "{device}");
        assert_eq!(world.fields(device, "note", "m")["tags"], json!(["copy", "phone"]), "{device}");
        assert_eq!(world.run(device, &["refused"]).ok().out, "", "{device}");
    }
}

/// A relay that was put back to an older copy of its directory has lost what came since: the devices
/// that have it bring it back, each what it wrote, and nobody is asked about anything.
#[test]
fn a_relay_that_went_back_gets_again_what_it_lost() {
    for new_epoch in [false, true] {
        let Some(world) = World::new() else { return };
        let mut relay = world.relay();
        let address = relay.address().to_owned();
        for device in ["phone", "tablet", "laptop"] {
            world.join(device, &relay, "writer");
        }
        world.set("phone", &["space", "s", "visits+=1"]);
        world.set("laptop", &["note", "old", "tags+=laptop"]);
        world.settle(&["phone", "tablet", "laptop"]);
        assert_eq!(crate::world::terminate(&mut relay.child), 0);
        copy(&world.path("relay"), &world.path("backup"));
        let mut relay = world.relay_at(&address);
        world.set("phone", &["space", "s", "visits+=10"]);
        world.set("laptop", &["note", "old", "tags-=laptop"]);
        world.settle(&["phone", "laptop", "tablet"]);
        // Builds on what the others wrote after the copy was made.
        world.set("tablet", &["space", "s", "visits+=100"]);
        world.set("tablet", &["note", "n", "tags+=new"]);
        world.settle(&["tablet", "phone", "laptop"]);
        relay.kill();
        std::fs::remove_dir_all(world.path("relay")).unwrap();
        copy(&world.path("backup"), &world.path("relay"));
        let relay = match new_epoch {
            true => world.relay_with(&address, &["--new-epoch"]),
            false => world.relay_at(&address),
        };
        // The feed grows past where some devices had been.
        world.set("laptop", &["note", "after", "tags+=laptop"]);
        let first = world.run("tablet", &["sync", "--deadline", "20s"]);
        assert_eq!(world.status("tablet")["lacking"], 2, "{first:?}");
        world.run("laptop", &["sync", "--deadline", "20s"]);
        world.settle(&["phone", "laptop", "tablet"]);
        for device in ["phone", "tablet", "laptop"] {
            assert_eq!(world.fields(device, "space", "s")["visits"], 111, "{device}");
            assert_eq!(world.fields(device, "note", "n")["tags"], json!(["new"]), "{device}");
            assert_eq!(world.status(device)["lacking"], 0, "{device}");
            assert_eq!(world.run(device, &["refused"]).ok().out, "", "{device}");
        }
        // Somebody new gets everything from the relay.
        world.join("new", &relay, "reader");
        world.settle(&["new", "phone"]);
        for type_name in ["space", "note"] {
            let there = world.export("new", type_name);
            for device in ["phone", "tablet", "laptop"] {
                assert_eq!(world.export(device, type_name), there, "{device}");
            }
        }
    }
}
