//! The upkeep of stores, on real processes.

use std::fs;

use serde_json::{Value, json};

use super::{Ran, Relay, World, keys, ran, terminate};

const SECRET: &str = "ANABRANCH_PASSPHRASE";

impl World {
    /// A device with some notes.
    fn with_notes(&self, device: &str, args: &[&str]) {
        let init = ["init", "--device", device, "--schema", "schema.toml", "--workspace", "home"];
        self.run(device, &[&init[..], args].concat()).ok();
        for n in 0..20 {
            self.run(device, &["set", "note", &format!("n{n}"), "title=Hello", "views+=1"]).ok();
        }
    }

    fn notes(&self, device: &str) -> String {
        self.run(device, &["export", "note"]).ok().out
    }

    fn store(&self, data: &str, args: &[&str]) -> Ran {
        self.run(data, &[&["store"], args].concat())
    }
}

#[test]
fn stats_and_verify_tell_what_is_there() {
    for backend in ["sled", "redb"] {
        let world = World::new();
        world.with_notes("a", &["--backend", backend]);
        let stats = world.store("a", &["stats"]).ok().json();
        assert_eq!(keys(&stats), ["backend", "disk_bytes", "encrypted", "format", "kinds", "live_bytes"]);
        assert_eq!((&stats["backend"], &stats["encrypted"]), (&json!(backend), &json!(false)));
        assert_eq!(stats["kinds"]["rows"]["entries"], 20);
        assert_eq!(stats["kinds"]["outbox"]["entries"], 20);
        let bytes: u64 =
            stats["kinds"].as_object().unwrap().values().map(|kind| kind["bytes"].as_u64().unwrap()).sum();
        assert_eq!(stats["live_bytes"], bytes);
        assert!(stats["disk_bytes"].as_u64().unwrap() > bytes);
        let entries: u64 =
            stats["kinds"].as_object().unwrap().values().map(|kind| kind["entries"].as_u64().unwrap()).sum();
        let verified = world.store("a", &["verify"]).ok().json();
        // Twenty documents and twenty rows; the type has no index.
        assert_eq!(verified, json!({ "entries": 40, "faults": [] }));
        assert!(entries > 40, "{stats}");
        let text = world.plain("a", &["store", "stats"]).ok().out;
        assert!(text.contains("rows") && text.contains(backend), "{text}");

        let nothing = world.store("nowhere", &["stats"]).error(2);
        assert_eq!(nothing["code"], "no_store");
        assert!(!world.path("nowhere").exists());
    }
}

#[test]
fn a_damaged_store_is_told_and_moved_aside() {
    let world = World::new();
    world.with_notes("a", &["--backend", "redb"]);
    let file = world.path("a/store/data.redb");
    let mut bytes = fs::read(&file).unwrap();
    let at = bytes.windows(5).position(|found| found == b"Hello").unwrap();
    bytes[at] ^= 1;
    fs::write(&file, bytes).unwrap();
    let error = world.store("a", &["verify"]).error(10);
    assert_eq!(error["code"], "damaged");
    assert!(error["message"].as_str().unwrap().contains("store.damaged-1"), "{error}");
    assert!(world.path("a/store.damaged-1/data.redb").exists() && !world.path("a/store").exists());
}

#[test]
fn a_backup_beside_watch_becomes_a_device_again() {
    for encrypted in [false, true] {
        let world = World::new();
        fs::write(world.path("secret"), "correct horse\n").unwrap();
        let secret: &[&str] = if encrypted { &["--passphrase-file", "secret"] } else { &[] };
        world.with_notes("a", secret);
        let before = world.notes("a");
        let watch = world.watch("a");
        // Relative to where the command runs, not the owner.
        let made = world.store("a", &["backup", "copy"]).ok().json();
        assert_eq!(keys(&made), ["backend", "backup", "bytes", "commit", "encrypted", "entries", "files"]);
        assert_eq!(made["files"], json!(["anabranch.toml", "device.key", "schema.toml"]));
        assert_eq!(made["encrypted"], json!(encrypted));
        world.run("a", &["set", "note", "later", "title=x"]).ok();
        let again = world.store("a", &["backup", "copy"]).error(2);
        assert_eq!(again["code"], "exists");
        drop(watch);

        let refused = world.store("a", &["restore", "copy"]).error(2);
        assert_eq!(refused["code"], "exists");
        let restored = world.store("b", &["restore", "copy"]).ok().json();
        assert_eq!(restored["entries"], made["entries"]);
        assert_eq!(world.notes("b"), before);
        assert_eq!(
            fs::read(world.path("a/device.key")).unwrap(),
            fs::read(world.path("b/device.key")).unwrap()
        );
        // It goes on from there, on another backend too.
        world.run("b", &["set", "note", "n1", "title=Again"]).ok();
        world.store("c", &["restore", "copy", "--backend", "redb"]).ok();
        assert_eq!(world.notes("c"), before);
        assert_eq!(world.store("c", &["stats"]).ok().json()["backend"], "redb");

        let entries = world.path("copy/entries");
        let mut bytes = fs::read(&entries).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(&entries, bytes).unwrap();
        assert_eq!(world.store("d", &["restore", "copy"]).error(10)["code"], "damaged");
        assert!(!world.path("d").exists());
    }
}

#[test]
fn a_backup_of_a_running_relay_becomes_a_relay_again() {
    let world = World::new();
    let relay = world.relay();
    world.join("a", &relay.url, "writer");
    world.run("a", &["set", "note", "n1", "title=Hello"]).ok();
    world.sync("a");
    let made = world.store("relay", &["backup", "copy"]).ok().json();
    let files: Vec<&str> =
        made["files"].as_array().unwrap().iter().map(|file| file.as_str().unwrap()).collect();
    assert!(files.contains(&"relay.key") && files.contains(&"issuers/dev.key"), "{files:?}");
    let stats = world.store("relay", &["stats"]).ok().json();
    assert!(stats["kinds"]["feed"]["entries"].as_u64().unwrap() > 0, "{stats}");
    assert_eq!(world.store("relay", &["verify"]).ok().json()["faults"], json!([]));
    assert_eq!(world.run("relay", &["list", "note"]).error(2)["code"], "not_initialised");

    // What comes after the backup is lost with the relay, but not with the device.
    world.run("a", &["set", "note", "n2", "title=Later"]).ok();
    world.sync("a");
    drop(relay);
    fs::rename(world.path("relay"), world.path("lost")).unwrap();
    world.store("relay", &["restore", "copy"]).ok();
    let relay = world.relay();
    let config = world.path("a/anabranch.toml");
    let text = fs::read_to_string(&config).unwrap();
    let line = text.lines().find(|line| line.starts_with("relay")).unwrap();
    fs::write(&config, text.replace(line, &format!("relay = {:?}", relay.url))).unwrap();
    world.sync("a");
    world.join("b", &relay.url, "writer");
    world.sync("b");
    assert_eq!(world.notes("b"), world.notes("a"), "the relay has what was lost from the device");
    assert!(world.notes("b").contains("Later"));
    end(relay);
}

fn end(mut relay: Relay) {
    assert_eq!(terminate(&mut relay.child), 0);
}

#[test]
fn a_compacted_store_is_kept_as_it_is_told_and_the_configuration_follows() {
    let world = World::new();
    fs::write(world.path("secret"), "correct horse\n").unwrap();
    world.with_notes("a", &["--backend", "sled"]);
    let before = world.notes("a");
    let watch = world.watch("a");
    assert_eq!(world.store("a", &["compact"]).error(10)["code"], "in_use");
    drop(watch);
    let steps: [(&[&str], Value, Value); 4] = [
        (&[], json!("sled"), json!(false)),
        (&["--backend", "redb"], json!("redb"), json!(false)),
        (&["--encrypt", "--new-passphrase-file", "secret"], json!("redb"), json!(true)),
        (&["--backend", "sled", "--decrypt"], json!("sled"), json!(false)),
    ];
    for (args, backend, encrypted) in steps {
        let done = world.store("a", &[&["compact"], args].concat()).ok().json();
        assert_eq!(keys(&done), ["backend", "bytes_after", "bytes_before", "encrypted", "entries"]);
        assert_eq!((&done["backend"], &done["encrypted"]), (&backend, &encrypted), "{args:?}");
        assert_eq!(world.notes("a"), before, "{args:?}");
        let stats = world.store("a", &["stats"]).ok().json();
        assert_eq!((&stats["backend"], &stats["encrypted"]), (&backend, &encrypted), "{args:?}");
    }
    let mut names: Vec<_> = fs::read_dir(world.path("a"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert!(!names.iter().any(|name| name.starts_with("store.")), "{names:?}");
    let plain = world.store("a", &["compact", "--decrypt"]).error(10);
    assert_eq!(plain["code"], "not_encrypted");
}

#[test]
fn another_passphrase_takes_the_place_of_the_old_one() {
    let world = World::new();
    for (name, text) in [("old", "correct horse"), ("new", "battery staple"), ("short", "short")] {
        fs::write(world.path(name), text).unwrap();
    }
    world.with_notes("a", &["--passphrase-file", "old"]);
    let before = world.notes("a");
    let rekey = |args: &[&str]| world.store("a", &[&["rekey"], args].concat());
    assert_eq!(rekey(&[]).error(2)["code"], "key_needed", "there is no terminal to ask at");
    assert_eq!(rekey(&["--new-passphrase-file", "short"]).error(2)["code"], "bad_passphrase");
    assert_eq!(rekey(&["--new-passphrase-file", "new"]).ok().json(), json!({ "rekeyed": true }));
    // The configuration names the new file.
    assert_eq!(world.notes("a"), before);
    let old = world.run("a", &["export", "note", "--passphrase-file", "old"]).error(10);
    assert_eq!(old["code"], "wrong_key");
    let by_variable = world
        .command("a", &["store", "rekey", "--json"])
        .env("ANABRANCH_NEW_PASSPHRASE", "correct horse")
        .output()
        .unwrap();
    ran(by_variable).ok();
    let export =
        world.command("a", &["export", "note", "--json"]).env(SECRET, "correct horse").output().unwrap();
    assert_eq!(ran(export).ok().out, before);
    world.with_notes("plain", &[]);
    assert_eq!(
        world.store("plain", &["rekey", "--new-passphrase-file", "new"]).error(2)["code"],
        "not_encrypted"
    );
}
