//! What people and scripts get wrong: a clear error and the right exit code, never a crash.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;

use serde_json::json;

use crate::world::{Ran, World};

#[test]
fn wrong_arguments_are_usage() {
    let Some(world) = World::new() else { return };
    world.local("a");
    for args in [
        &["nope"][..],
        &[],
        &["set"],
        &["set", "note"],
        &["set", "note", "n", "body"],
        &["set", "note", "n", "body+=x"],
        &["set", "note", "n", "tags.x=1"],
        &["set", "note", "n", "body=x", "--nope"],
        &["set", "note", "n", "body=x", "--if-version", "zzz"],
        &["set", "note", "n", "body=x", "--if-version", ""],
        &["get", "note"],
        &["get", "note", "n", "more"],
        &["resolve", "note", "n", "body"],
        &["resolve", "note", "n", "body", "--keep", "0"],
        &["resolve", "note", "n", "body", "--keep", "mine", "--value", "1"],
        &["resolve", "note", "n", "body", "--value", "{"],
        &["sync", "--deadline", "soon"],
        &["sync", "--deadline", "-1s"],
        &["import", "none.json", "--type", "note"],
        &["import", "schema.toml"],
        &["refused", "dismiss", "x"],
        &["list"],
        &["init", "--device", "a", "--schema", "none.toml", "--workspace", "w"],
        &["init", "--device", "a", "--schema", "schema.toml", "--workspace", "w"],
        &["token", "--workspace", "w"],
        &["relay", "--listen", "nowhere"],
        &["schema", "check"],
        &["schema", "check", "none.toml"],
    ] {
        world.run("a", args).error("usage", 2);
    }
    world
        .run("b", &["init", "--device", "", "--schema", "schema.toml", "--workspace", "w"])
        .error("usage", 2);
    world
        .run("b", &["init", "--device", "b", "--schema", "schema.toml", "--workspace", "a\nb"])
        .error("usage", 2);
    for command in ["set note n body=x", "get note n", "list note", "status", "sync", "conflicts", "watch"] {
        let args: Vec<&str> = command.split(' ').collect();
        assert_eq!(world.run("none", &args).error("usage", 2)["code"], "not_initialised", "{command}");
    }
    assert!(!world.path("none").exists(), "a wrong --data was made a directory");
}

#[test]
fn wrong_values_are_validation() {
    let Some(world) = World::new() else { return };
    world.local("a");
    let long = "x".repeat(300);
    for args in [
        &["note", "", "body=x"][..],
        &["note", "a\nb", "body=x"],
        &["note", "a\u{7f}b", "body=x"],
        &["note", &long, "body=x"],
        &["note", "n", "nope=x"],
        &["note", "n", "=x"],
        &["note", "n"],
        &["nope", "n", "body=x"],
        &["_device", "n", "name=x"],
        &["exercise", "e", "name=x"],
        &["space", "s", "visits+=9223372036854775807"],
        &["space", "s", "visits=9223372036854775807"],
        &["space", "s", "visits=1.5"],
        &["space", "s", "comments+={"],
        &["health_metric", "h", "kind=x", "value=NaN"],
        &["health_metric", "h", "kind=x", "value=1e999"],
        &["health_metric", "h", "kind=x", "taken_at=tomorrow"],
        &["health_metric", "h", "kind=x", "taken_at=2026-02-30T00:00:00Z"],
        &["health_metric", "h", "value=1"],
        &["hero", "h", "name=x", "age=201"],
        &["hero", "h", "name=x", "age=-1"],
        &["hero", "h", "name=null"],
        &["alert", "a", "title=x", "severity=worst"],
        &["alert", "a", "title=x", "read=maybe"],
        &["invoice", "i", "currency=EURO"],
        &["invoice", "i", "amount_cents=99999999999999999999"],
        &["watchlist_item", "w", "kind=x"],
        &["profile", "p", "avatar=me.png"],
        &["volume", "v", "week=1", "sets.a=x"],
        &["volume", "v", "week=1", "sets.=1"],
    ] {
        world.run("a", &[&["set"], args].concat()).error("validation", 3);
    }
    for type_name in ["note", "hero", "space", "invoice", "volume"] {
        assert_eq!(world.export("a", type_name), "", "{type_name}");
    }
    assert_eq!(world.status("a")["pending"], 0);
    for id in ["../../etc/passwd", "a b", "ü/☃", "-", "--", "*", "%00", "a#b", &"x".repeat(256)] {
        world.run("a", &["set", "--", "note", id, "tags+=ok"]).ok();
        assert_eq!(world.run("a", &["get", "--", "note", id]).ok().json()["id"], id);
    }
    assert_eq!(world.run("a", &["list", "note"]).ok().lines().len(), 9);
}

#[test]
fn lines_that_are_no_edits_write_nothing() {
    let Some(world) = World::new() else { return };
    world.local("a");
    let set = |input: &[u8]| world.run_with_input("a", &["set", "-"], input);
    for input in [
        "{",
        "[]",
        "null",
        "\"x\"",
        "{}",
        "{\"type\":\"note\"}",
        "{\"type\":\"note\",\"id\":1}",
        "{\"type\":\"note\",\"id\":\"n\",\"sett\":{}}",
        "{\"type\":\"note\",\"id\":\"n\",\"splice\":{\"body\":[[-1,0,\"x\"]]}}",
        "{\"type\":\"note\",\"id\":\"n\",\"splice\":{\"body\":[[0,0]]}}",
        "{\"type\":\"note\",\"id\":\"n\",\"set\":{\"body\":\"\\ud800\"}}",
        "{\"type\":\"note\",\"id\":\"n\",\"if_version\":\"x\",\"set\":{\"body\":\"x\"}}",
        "",
        "\n\n",
    ] {
        set(input.as_bytes()).error("usage", 2);
    }
    let deep = format!(
        "{{\"type\":\"recovery\",\"id\":\"n\",\"put\":{{\"days\":{{\"a\":{}{}}}}}}}",
        "[".repeat(5_000),
        "]".repeat(5_000)
    );
    assert_eq!(set(deep.as_bytes()).code, 2);
    for input in [
        "{\"type\":\"note\",\"id\":\"n\",\"splice\":{\"body\":[[1,0,\"x\"]]}}",
        "{\"type\":\"note\",\"id\":\"n\",\"splice\":{\"body\":[[0,18446744073709551615,\"x\"]]}}",
        "{\"type\":\"note\",\"id\":\"n\",\"splice\":{\"tags\":[[0,0,\"x\"]]}}",
        "{\"type\":\"note\",\"id\":\"n\",\"increment\":{\"body\":1}}",
        "{\"type\":\"note\",\"id\":\"n\",\"set\":{\"body\":7}}",
        "{\"type\":\"note\",\"id\":\"n\",\"set\":{\"tags\":[[1]]}}",
        "{\"type\":\"note\",\"id\":\"n\",\"set\":{\"body\":\"x\"},\"delete\":true}",
        "{\"type\":\"note\",\"id\":\"ok\",\"set\":{\"body\":\"x\"}}\n{\"type\":\"hero\",\"id\":\"bad\",\"set\":{\"age\":1}}",
        "{\"type\":\"note\",\"id\":\"n\"}",
    ] {
        let ran = set(input.as_bytes());
        ran.error("validation", 3);
    }
    set(b"\xff\xfe{}").error("validation", 3);
    set(b"{\"type\":\"note\",\"id\":\"gone\",\"delete\":true}").error("not_found", 7);
    assert_eq!(world.export("a", "note"), "");
    assert_eq!(world.status("a")["pending"], 0);

    // Imports: a record that is wrong stops no other, input that is none writes nothing.
    let import = |input: &[u8]| world.run_with_input("a", &["import", "-", "--type", "note"], input);
    for input in [&b"{"[..], b"[{]", b"[1]", b"{\"id\":\"a\"}\n{", b"\xff"] {
        import(input).error("validation", 3);
    }
    assert_eq!(import(b"").ok().json()["total"], 0);
    assert_eq!(import(b"[]").ok().json()["total"], 0);
    assert_eq!(world.export("a", "note"), "");
}

#[test]
fn arguments_that_are_not_text_are_usage() {
    let Some(world) = World::new() else { return };
    world.local("a");
    for args in [
        &[&b"set"[..], b"note", b"\xff\xfe", b"body=x"][..],
        &[b"set", b"note", b"n", b"body=\xff"],
        &[b"get", b"\xff", b"n"],
        &[b"\xff"],
    ] {
        let mut command = world.command("a", &[]);
        command.args(args.iter().map(|arg| OsStr::from_bytes(arg)));
        Ran::of(command.output().unwrap()).error("usage", 2);
    }
    // A directory may have any name.
    let odd = world.dir.path().join(OsStr::from_bytes(b"odd-\xff"));
    let mut command = std::process::Command::new(crate::world::binary());
    command.args(["init", "--device", "d", "--workspace", "w", "--schema"]).arg(world.path("schema.toml"));
    Ran::of(command.arg("--data").arg(&odd).output().unwrap()).ok();
    assert!(odd.is_dir());
}

#[test]
fn huge_values_are_stored_or_refused_as_a_whole() {
    let Some(world) = World::new() else { return };
    let relay = world.relay();
    world.join("phone", &relay, "writer");
    world.join("tablet", &relay, "writer");
    let mut kept = 0;
    for (number, bytes) in [100_000, 1_000_000, 4_000_000, 20_000_000].into_iter().enumerate() {
        let edit = json!({"set": {"body": "x".repeat(bytes)}});
        let ran = world.edit("phone", "note", &format!("n{number}"), &edit, "0s");
        match ran.code {
            0 => kept += 1,
            _ => {
                let error = ran.error(if ran.code == 8 { "quota" } else { "validation" }, ran.code);
                assert!(error["message"].as_str().unwrap().len() < 1_000, "the error quotes the value");
            }
        }
        // Strings are bounded by the schema, or not.
        let edit = json!({"set": {"theme": "é".repeat(bytes / 2)}});
        let ran = world.edit("phone", "preferences", &format!("p{number}"), &edit, "0s");
        assert!([0, 3, 8].contains(&ran.code), "{} {}", ran.code, ran.err);
    }
    assert!(kept >= 1, "not even 100 KB of text");
    let pending = world.status("phone")["pending"].clone();
    let report = world.sync("phone");
    assert_eq!(report["sent"], pending);
    world.sync("tablet");
    for type_name in ["note", "preferences"] {
        assert!(world.export("phone", type_name) == world.export("tablet", type_name), "{type_name}");
    }
    assert_eq!(world.run("phone", &["refused"]).ok().out, "");
    // Many elements and keys.
    let elements: Vec<String> = (0..3_000).map(|n| format!("e{n}")).collect();
    let ran = world.edit("phone", "note", "many", &json!({"add": {"tags": elements}}), "0s");
    assert_eq!(ran.code, 0, "{}", ran.err);
    world.settle(&["phone", "tablet"]);
    assert_eq!(world.fields("tablet", "note", "many")["tags"].as_array().unwrap().len(), 3_000);
}

/// What stands in the directory is damaged or may not be read.
#[test]
fn a_broken_directory_is_told_as_such() {
    let Some(world) = World::new() else { return };
    world.local("a");
    world.set("a", &["note", "n", "tags+=x"]);
    let config = world.path("a/anabranch.toml");
    let text = std::fs::read_to_string(&config).unwrap();
    for broken in ["", "x", "device = 1", &text[..text.len() / 2]] {
        std::fs::write(&config, broken).unwrap();
        world.run("a", &["get", "note", "n"]).error("usage", 2);
    }
    std::fs::write(&config, &text).unwrap();
    let schema = world.path("a/schema.toml");
    let source = std::fs::read_to_string(&schema).unwrap();
    std::fs::write(&schema, "[note\n").unwrap();
    world.run("a", &["get", "note", "n"]).error("validation", 3);
    std::fs::write(&schema, source).unwrap();
    assert_eq!(world.fields("a", "note", "n")["tags"], json!(["x"]));
    // A file in place of the directory.
    std::fs::write(world.path("file"), "x").unwrap();
    let ran = world.run("file", &["status"]);
    assert!([2, 10].contains(&ran.code), "{ran:?}");
    let ran = world.run("file", &["init", "--device", "d", "--schema", "schema.toml", "--workspace", "w"]);
    assert_eq!(ran.code, 10, "{ran:?}");
}
