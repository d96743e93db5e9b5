//! The program as scripts use it: separate processes, real directories, a real relay.

#![allow(clippy::unwrap_used, reason = "tests and their helpers fail by panicking")]

#[path = "cli/store.rs"]
mod store;

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

const SCHEMA: &str = r#"
[exercise]
version = 1
merge = "server_only"
index = [["level"]]
[exercise.fields]
name  = { type = "string", required = true }
level = { type = "string" }

[note]
version = 1
[note.fields]
title = { type = "string" }
body  = { type = "text" }
tags  = { type = "set", of = "string" }
views = { type = "int", merge = "counter" }
log   = { type = "list", of = "string" }
days  = { type = "map", of = "int", merge = "max" }
due   = { type = "timestamp" }
price = { type = "int", merge = "manual", group = "cost" }
money = { type = "string", merge = "manual", group = "cost" }
"#;

/// A directory with a schema, and the program on directories in it.
struct World {
    dir: TempDir,
}

/// How a command ended.
struct Ran {
    code: i32,
    out: String,
    err: String,
}

impl Ran {
    fn ok(self) -> Self {
        assert_eq!(self.code, 0, "out: {}\nerr: {}", self.out, self.err);
        self
    }

    fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|e| panic!("{e}: {:?} {}", self.out, self.err))
    }

    fn lines(&self) -> Vec<Value> {
        self.out.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// The error object: one line, with exactly the parts that the contract names.
    fn error(&self, exit_code: i32) -> Value {
        assert_eq!(self.code, exit_code, "out: {}\nerr: {}", self.out, self.err);
        let error: Value = serde_json::from_str(self.err.lines().last().unwrap()).unwrap();
        assert_eq!(keys(&error), ["error"]);
        assert_eq!(keys(&error["error"]), ["category", "code", "help", "message"]);
        for part in ["category", "code", "help", "message"] {
            assert!(!error["error"][part].as_str().unwrap().is_empty(), "{part} is empty: {error}");
        }
        error["error"].clone()
    }
}

fn keys(value: &Value) -> Vec<&str> {
    value.as_object().unwrap().keys().map(String::as_str).collect()
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("schema.toml"), SCHEMA).unwrap();
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self, data: &str, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_anabranch"));
        command.args(args).arg("--data").arg(self.path(data)).current_dir(self.dir.path());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn plain(&self, data: &str, args: &[&str]) -> Ran {
        ran(self.command(data, args).output().unwrap())
    }

    fn run(&self, data: &str, args: &[&str]) -> Ran {
        ran(self.command(data, args).arg("--json").output().unwrap())
    }

    fn run_with_input(&self, data: &str, args: &[&str], input: &str) -> Ran {
        let mut child = self.command(data, args).arg("--json").stdin(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        ran(child.wait_with_output().unwrap())
    }

    /// A device that has never heard of a relay.
    fn local(&self, device: &str) {
        self.run(device, &["init", "--device", device, "--schema", "schema.toml", "--workspace", "home"])
            .ok();
    }

    fn token(&self, args: &[&str]) -> String {
        let all = [&["token", "--workspace", "home", "--user", "ann"], args].concat();
        self.run("relay", &all).ok().json()["token"].as_str().unwrap().to_owned()
    }

    fn join_as(&self, device: &str, url: &str, token: &str) {
        let args = ["init", "--device", device, "--schema", "schema.toml", "--workspace", "home"];
        self.run(device, &[&args[..], &["--relay", url, "--token", token]].concat()).ok();
    }

    fn join(&self, device: &str, url: &str, role: &str) {
        self.join_as(device, url, &self.token(&["--role", role]));
    }

    fn relay(&self) -> Relay {
        self.relay_with(&[])
    }

    fn relay_with(&self, args: &[&str]) -> Relay {
        let all = [&["relay", "--dev", "--listen", "127.0.0.1:0", "--json"], args].concat();
        let mut child = self.command("relay", &all).stderr(Stdio::null()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let said: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(keys(&said), ["event", "key", "url"]);
        assert_eq!(said["event"], "listening");
        let url = said["url"].as_str().unwrap().to_owned();
        assert!(url.ends_with(&format!("#{}", said["key"].as_str().unwrap())));
        Relay { child, url }
    }

    /// Starts `watch` and waits until it owns the directory.
    fn watch(&self, data: &str) -> Watch {
        let mut child = self.command(data, &["watch", "--json"]).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let first: Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
        assert_eq!(first["event"], "status");
        Watch { child, lines: Box::new(lines) }
    }

    fn sync(&self, device: &str) -> Value {
        let report = self.run(device, &["sync", "--deadline", "20s"]).ok().json();
        assert_eq!(report["outcome"], "complete");
        report
    }
}

fn ran(output: Output) -> Ran {
    Ran {
        code: output.status.code().unwrap_or(-1),
        out: String::from_utf8(output.stdout).unwrap(),
        err: String::from_utf8(output.stderr).unwrap(),
    }
}

fn terminate(child: &mut Child) -> i32 {
    let pid = child.id().to_string();
    assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    child.wait().unwrap().code().unwrap_or(-1)
}

struct Relay {
    child: Child,
    url: String,
}

impl Drop for Relay {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

struct Watch {
    child: Child,
    lines: Box<dyn Iterator<Item = std::io::Result<String>>>,
}

impl Watch {
    /// The next event of a kind; other kinds are skipped.
    fn event(&mut self, kind: &str) -> Value {
        loop {
            let line: Value = serde_json::from_str(&self.lines.next().unwrap().unwrap()).unwrap();
            if line["event"] == kind {
                return line;
            }
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn what_json_prints_is_a_contract() {
    let world = World::new();
    world.local("a");
    let set =
        world.run("a", &["set", "note", "n1", "title=Hello", "tags+=b", "tags+=a", "views+=3"]).ok().json();
    assert_eq!(keys(&set), ["id", "type", "version"]);

    let got = world.run("a", &["get", "note", "n1"]).ok().json();
    assert_eq!(keys(&got), ["fields", "id", "status", "type", "version"]);
    assert_eq!(got["type"], "note");
    assert_eq!(got["id"], "n1");
    assert_eq!(got["status"], "pending_create");
    assert_eq!(got["version"], set["version"]);
    assert_eq!(
        got["fields"],
        json!({
            "title": "Hello", "body": "", "tags": ["a", "b"], "views": 3, "log": [], "days": {},
            "due": null, "price": null, "money": null
        })
    );

    world.run("a", &["set", "note", "n0", "due=2026-01-02T03:04:05+01:00"]).ok();
    let listed = world.run("a", &["list", "note"]).ok().lines();
    assert_eq!(listed.len(), 2);
    assert_eq!(listed[1], got);
    assert_eq!(listed[0]["fields"]["due"], "2026-01-02T02:04:05Z");

    let export = world.run("a", &["export", "note"]).ok().out;
    let lines: Vec<&str> = export.lines().collect();
    assert_eq!(
        lines[1],
        "{\"body\":\"\",\"days\":{},\"due\":null,\"id\":\"n1\",\"log\":[],\"money\":null,\"price\":null,\
         \"tags\":[\"a\",\"b\"],\"title\":\"Hello\",\"views\":3}"
    );
    assert!(lines.is_sorted());
    assert_eq!(export, world.plain("a", &["export", "note"]).ok().out);

    let status = world.run("a", &["status"]).ok().json();
    assert_eq!(
        keys(&status),
        ["clock_skew_ms", "conflicts", "digest", "lacking", "pending", "refused", "state"]
    );
    assert_eq!(status["pending"], 2);
    assert_eq!(status["state"], "offline");
    assert_eq!(world.run("a", &["conflicts"]).ok().out, "");
    assert_eq!(world.run("a", &["refused"]).ok().out, "");
}

#[test]
fn assignments_reach_every_kind_of_field() {
    let world = World::new();
    world.local("a");
    let set = |args: &[&str]| world.run("a", &[&["set", "note", "n1"], args].concat()).ok();
    set(&[
        "title=42",
        "body=some text",
        "log+=one",
        "days.mon=3",
        "price=5",
        "money=EUR",
        "tags=[\"x\",\"y\"]",
    ]);
    set(&["log+=two", "days.mon=2", "days.tue=1", "views+=5", "views-=2", "tags-=x", "title=null"]);
    let fields = world.run("a", &["get", "note", "n1"]).ok().json()["fields"].clone();
    assert_eq!(
        fields,
        json!({
            "title": null, "body": "some text", "tags": ["y"], "views": 3, "log": ["one", "two"],
            "days": {"mon": 3, "tue": 1}, "due": null, "price": 5, "money": "EUR"
        })
    );
}

#[test]
fn json_lines_are_one_transaction() {
    let world = World::new();
    world.local("a");
    let lines = r#"{"type":"note","id":"n1","set":{"title":"one","body":"abc"}}
{"type":"note","id":"n2","increment":{"views":2},"append":{"log":["x"]},"put":{"days":{"mon":1}},"add":{"tags":["t"]}}
"#;
    let versions = world.run_with_input("a", &["set", "-"], lines).ok().lines();
    assert_eq!(versions.len(), 2);
    let splice = r#"{"type":"note","id":"n1","splice":{"body":[[3,0,"déf"],[0,1,""],[4,1,"!"]]}}"#;
    world.run_with_input("a", &["set", "-"], splice).ok();
    assert_eq!(world.run("a", &["get", "note", "n1"]).ok().json()["fields"]["body"], "bcdé!");

    let half_wrong = "{\"type\":\"note\",\"id\":\"n3\",\"set\":{\"title\":\"x\"}}\n{\"type\":\"note\",\"id\":\"n4\",\"set\":{\"views\":\"x\"}}";
    world.run_with_input("a", &["set", "-"], half_wrong).error(3);
    world.run("a", &["get", "note", "n3"]).error(7);
    assert_eq!(world.run_with_input("a", &["set", "-"], "nonsense").error(2)["code"], "bad_line");
}

#[test]
fn deleting_hides_and_setting_brings_back() {
    let world = World::new();
    world.local("a");
    world.run("a", &["set", "note", "n1", "title=x"]).ok();
    let version = world.run("a", &["get", "note", "n1"]).ok().json()["version"].as_str().unwrap().to_owned();
    world.run("a", &["delete", "note", "n1", "--if-version", &version]).ok();
    assert_eq!(world.run("a", &["get", "note", "n1"]).error(7)["code"], "not_found");
    assert_eq!(world.run("a", &["list", "note"]).ok().out, "");
    world.run("a", &["delete", "note", "n1"]).error(7);
    world.run("a", &["delete", "note", "never"]).error(7);
    world.run("a", &["set", "note", "n1", "title=again"]).ok();
    assert_eq!(world.run("a", &["get", "note", "n1"]).ok().json()["fields"]["title"], "again");
}

#[test]
fn lists_filter_order_and_go_on() {
    let world = World::new();
    world.local("a");
    for (id, views, title) in [("n1", 1, "c"), ("n2", 2, "b"), ("n3", 3, "a"), ("n4", 4, "d")] {
        world.run("a", &["set", "note", id, &format!("views+={views}"), &format!("title={title}")]).ok();
    }
    let ids = |args: &[&str]| -> Vec<String> {
        let listed = world.run("a", &[&["list", "note"], args].concat()).ok().lines();
        listed.iter().map(|line| line["id"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(ids(&["--where", "views > 1", "--where", "views <= 3"]), ["n2", "n3"]);
    assert_eq!(ids(&["--order-by", "title"]), ["n3", "n2", "n1", "n4"]);
    assert_eq!(ids(&["--order-by", "-title", "--limit", "2"]), ["n4", "n1"]);
    let first = world.run("a", &["list", "note", "--limit", "3"]).ok().lines();
    assert!(first[0].get("cursor").is_none());
    let cursor = first[2]["cursor"].as_str().unwrap();
    let rest = world.run("a", &["list", "note", "--limit", "3", "--after", cursor]).ok().lines();
    assert_eq!(rest.len(), 1);
    assert_eq!(rest[0]["id"], "n4");
    assert!(rest[0].get("cursor").is_none());
    assert_eq!(world.run("a", &["list", "note", "--where", "nope = 1"]).error(3)["category"], "validation");
    world.run("a", &["list", "note", "--order-by", "nope"]).error(3);
}

#[test]
fn each_kind_of_failure_has_its_exit_code() {
    let world = World::new();
    world.local("a");
    assert_eq!(world.run("a", &["set", "note"]).error(2)["category"], "usage");
    assert_eq!(world.run("a", &["no-such-command"]).error(2)["code"], "bad_arguments");
    assert_eq!(world.run("none", &["list", "note"]).error(2)["code"], "not_initialised");
    assert_eq!(world.run("a", &["set", "note", "n1", "views"]).error(2)["code"], "bad_assignment");
    assert_eq!(
        world.run("a", &["set", "note", "n1", "title=x", "--if-version", "x"]).error(2)["code"],
        "bad_version"
    );
    assert_eq!(world.run("a", &["list", "note", "--after", "x"]).error(2)["code"], "bad_cursor");
    let unknown = "A".repeat(43);
    world.run("a", &["set", "note", "n8", "title=x"]).ok();
    assert_eq!(
        world.run("a", &["set", "note", "n8", "title=y", "--if-version", &unknown]).error(2)["code"],
        "unknown_version"
    );
    assert_eq!(
        world.run("a", &["import", "nowhere.json", "--type", "note"]).error(2)["code"],
        "no_such_file"
    );
    assert_eq!(world.run("a", &["set", "note", "n1"]).error(3)["code"], "nothing_written");
    assert_eq!(world.run("a", &["set", "nope", "n1", "x=1"]).error(3)["code"], "unknown_type");
    assert_eq!(world.run("a", &["set", "note", "n1", "nope=1"]).error(3)["code"], "unknown_field");
    assert_eq!(world.run("a", &["set", "note", "n1", "due=soon"]).error(3)["category"], "validation");
    assert_eq!(world.run("a", &["set", "exercise", "e1", "name=x"]).error(3)["category"], "validation");
    assert_eq!(world.run("a", &["get", "note", "n9"]).error(7)["category"], "not_found");
    assert_eq!(
        world.run("a", &["resolve", "note", "n9", "cost", "--keep", "mine"]).error(7)["category"],
        "not_found"
    );
    assert_eq!(world.run("a", &["refused", "dismiss", "9"]).error(7)["category"], "not_found");
    assert_eq!(world.run("a", &["sync"]).error(6)["code"], "no_relay");
    let twice = ["init", "--device", "b", "--schema", "schema.toml", "--workspace", "home"];
    assert_eq!(world.run("a", &twice).error(2)["code"], "already_initialised");
    let plain = world.plain("a", &["get", "note", "n9"]);
    assert_eq!(plain.code, 7);
    assert!(plain.err.starts_with("error: ") && plain.err.contains("help: "), "{}", plain.err);
}

#[test]
fn secrets_are_private() {
    use std::os::unix::fs::PermissionsExt as _;
    let world = World::new();
    world.local("a");
    let mode = |name: &str| fs::metadata(world.path(name)).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode("a"), 0o700);
    assert_eq!(mode("a/anabranch.toml"), 0o600);
    let _watch = world.watch("a");
    assert_eq!(mode("a/anabranch.sock"), 0o600);
}

#[test]
fn an_export_imports_as_the_same() {
    let world = World::new();
    world.local("a");
    world.local("b");
    let lines: String = (0..450)
        .map(|n| format!("{}\n", json!({"id": format!("n{n}"), "title": format!("t{n}"), "body": "x y", "views": n, "tags": ["a", n.to_string()], "days": {"mon": n}, "price": n})))
        .collect();
    fs::write(world.path("notes.jsonl"), lines).unwrap();
    let report = world.run("a", &["import", "notes.jsonl", "--type", "note"]).ok().json();
    assert_eq!(report, json!({"type": "note", "total": 450, "imported": 450, "failed": 0}));
    let export = world.run("a", &["export", "note"]).ok().out;
    assert_eq!(export.lines().count(), 450);
    world.run_with_input("b", &["import", "-", "--type", "note"], &export).ok();
    assert_eq!(world.run("b", &["export", "note"]).ok().out, export);
    // Again: the same values are no change, counters too.
    world.run_with_input("b", &["import", "-", "--type", "note", "--id-field", "id"], &export).ok();
    assert_eq!(world.run("b", &["export", "note"]).ok().out, export);
}

#[test]
fn a_bad_record_does_not_stop_an_import() {
    let world = World::new();
    world.local("a");
    let records = json!([{"key": "n1", "title": "x"}, {"title": "no id"}, {"key": "n2", "views": "many"}, {"key": 7, "title": "y"}, {"key": "n3"}]);
    let imported = world.run_with_input(
        "a",
        &["import", "-", "--type", "note", "--id-field", "key", "--progress"],
        &records.to_string(),
    );
    let error = imported.error(3);
    assert_eq!(imported.json(), json!({"type": "note", "total": 5, "imported": 2, "failed": 3}));
    assert!(error["message"].as_str().unwrap().starts_with("3 of 5 "));
    let notes: Vec<Value> = imported.err.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(notes[0]["record"], "record 2");
    assert_eq!(notes[1]["record"], "n2");
    assert_eq!((&notes[2]["record"], &notes[2]["error"]["code"]), (&json!("n3"), &json!("nothing_written")));
    assert_eq!(notes[3], json!({"progress": {"done": 5, "total": 5}}));
    assert_eq!(world.run("a", &["list", "note"]).ok().lines().len(), 2);
}

#[test]
fn commands_go_through_the_process_that_owns_the_directory() {
    let world = World::new();
    world.local("a");
    let mut watch = world.watch("a");
    world.run("a", &["set", "note", "n1", "title=x"]).ok();
    let event = watch.event("change");
    assert_eq!((&event["type"], &event["id"]), (&json!("note"), &json!("n1")));
    assert_eq!(event["fields"]["title"], "x");
    let lines = "{\"type\":\"note\",\"id\":\"n2\",\"set\":{\"title\":\"y\"}}";
    world.run_with_input("a", &["set", "-"], lines).ok();
    assert_eq!(world.run("a", &["list", "note"]).ok().lines().len(), 2);
    assert_eq!(world.plain("a", &["export", "note"]).ok().out.lines().count(), 2);
    assert_eq!(world.run("a", &["get", "note", "n9"]).error(7)["code"], "not_found");
    assert_eq!(world.run("a", &["set", "exercise", "e", "name=x"]).error(3)["category"], "validation");
    assert_eq!(
        world.run("a", &["get", "note", "n1", "--clock-offset", "1d"]).error(2)["code"],
        "clock_of_owner"
    );
    fs::write(world.path("in.json"), json!([{"id": "n3", "title": "z"}]).to_string()).unwrap();
    world.run("a", &["import", "in.json", "--type", "note"]).ok();

    // A second watch follows through the first.
    let mut second = world.watch("a");
    world.run("a", &["delete", "note", "n3"]).ok();
    let event = second.event("change");
    assert_eq!((&event["id"], &event["deleted"]), (&json!("n3"), &json!(true)));
    assert_eq!(terminate(&mut second.child), 0);

    assert_eq!(terminate(&mut watch.child), 0);
    assert!(!world.path("a/anabranch.sock").exists());
    assert_eq!(world.run("a", &["list", "note"]).ok().lines().len(), 2);
}

#[test]
fn an_owner_that_is_stopped_holds_nobody_up_for_long() {
    let world = World::new();
    world.local("a");
    let watch = world.watch("a");
    world.run("a", &["set", "note", "n1", "title=x"]).ok();
    let pid = watch.child.id().to_string();
    let signal = |name: &str| assert!(Command::new("kill").args([name, &pid]).status().unwrap().success());
    signal("-STOP");
    let start = Instant::now();
    let get = world.command("a", &["get", "note", "n1", "--json"]).spawn().unwrap();
    // What has a deadline keeps it.
    let error = world.run("a", &["sync", "--deadline", "1s"]).error(10);
    assert!(start.elapsed() < Duration::from_secs(6), "{:?}", start.elapsed());
    assert_eq!((&error["category"], &error["code"]), (&json!("storage"), &json!("owner_silent")));
    for part in ["message", "help"] {
        assert!(error[part].as_str().unwrap().contains(&pid), "{error}");
    }
    assert_eq!(ran(get.wait_with_output().unwrap()).error(10)["code"], "owner_silent");
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    signal("-CONT");
    world.run("a", &["get", "note", "n1"]).ok();
}

/// A command that is quiet for longer than an owner may be silent is not cut off.
#[test]
fn a_quiet_owner_is_no_silent_one() {
    let world = World::new();
    let token = world.token(&[]);
    let silent = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    world.join_as("a", &format!("quic://{}", silent.local_addr().unwrap()), &token);
    let mut watch = world.watch("a");
    let mut second = world.watch("a");
    world.run("a", &["sync", "--deadline", "12s"]).error(6);
    world.run("a", &["set", "note", "n1", "title=x"]).ok();
    assert_eq!(second.event("change")["id"], "n1");
    // Who followed an owner that ends becomes the next.
    assert_eq!(terminate(&mut watch.child), 0);
    second.event("missed");
    world.run("a", &["set", "note", "n2", "title=x"]).ok();
    assert_eq!(second.event("change")["id"], "n2");
    assert_eq!(terminate(&mut second.child), 0);
}

#[test]
fn a_long_import_locks_nobody_out() {
    const RECORDS: usize = 8_000;
    let world = World::new();
    world.local("a");
    let lines: String =
        (0..RECORDS).map(|n| format!("{}\n", json!({"id": format!("n{n:05}"), "title": "x"}))).collect();
    fs::write(world.path("in.jsonl"), lines).unwrap();
    let args = ["import", "in.jsonl", "--type", "note", "--progress", "--json"];
    let mut import = world.command("a", &args).spawn().unwrap();
    let mut progress = BufReader::new(import.stderr.take().unwrap());
    let mut line = String::new();
    progress.read_line(&mut line).unwrap();
    assert!(line.contains("progress"), "{line}");
    let rest = std::thread::spawn(move || drop(std::io::copy(&mut progress, &mut std::io::sink())));

    let set = world.run("a", &["set", "note", "mine", "title=y"]).ok().json();
    assert_eq!(world.run("a", &["get", "note", "mine"]).ok().json()["version"], set["version"]);
    let mut watch = world.command("a", &["watch", "--json"]).spawn().unwrap();
    let lines = BufReader::new(watch.stdout.take().unwrap()).lines().map_while(Result::ok);
    let (send, events) = std::sync::mpsc::channel::<Value>();
    let reader = std::thread::spawn(move || {
        lines.for_each(|line| send.send(serde_json::from_str(&line).unwrap()).unwrap_or_default());
    });
    // Nobody reads what this one prints: it must not keep the import from ending.
    let mut stalled = world.command("a", &["watch", "--json"]).spawn().unwrap();
    events.recv_timeout(Duration::from_secs(20)).unwrap();
    assert!(import.try_wait().unwrap().is_none(), "the import was over too soon to tell");
    assert_eq!(ran(import.wait_with_output().unwrap()).ok().json()["imported"], RECORDS);
    rest.join().unwrap();
    stalled.kill().unwrap();
    stalled.wait().unwrap();

    // Who followed the import owns the directory now.
    let start = Instant::now();
    while !world.path("a/anabranch.sock").exists() {
        assert!(start.elapsed() < Duration::from_secs(20), "nobody listens");
        std::thread::sleep(Duration::from_millis(10));
    }
    world.run("a", &["set", "note", "last", "title=z"]).ok();
    while events.recv_timeout(Duration::from_secs(20)).unwrap()["id"] != "last" {}
    assert_eq!(terminate(&mut watch), 0);
    reader.join().unwrap();
    assert_eq!(world.run("a", &["export", "note"]).ok().out.lines().count(), RECORDS + 2);
}

#[test]
fn what_is_not_utf_8_is_told_as_any_error() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt as _;
    let world = World::new();
    world.local("a");
    let wrong = OsStr::from_bytes(b"title=\xff");
    let error =
        ran(world.command("a", &["set", "note", "n1", "--json"]).arg(wrong).output().unwrap()).error(2);
    assert_eq!((&error["category"], &error["code"]), (&json!("usage"), &json!("not_utf8")));
    assert!(error["message"].as_str().unwrap().contains("title="), "{error}");
    let plain = ran(world.command("a", &["set", "note", "n1"]).arg(wrong).output().unwrap());
    assert_eq!(plain.code, 2);
    assert!(plain.err.starts_with("error: ") && plain.err.contains("help: "), "{}", plain.err);

    // A file may have such a name, also where another process owns the directory.
    let file = OsStr::from_bytes(b"in\xff.json");
    fs::write(world.dir.path().join(file), r#"[{"id": "n1", "title": "x"}]"#).unwrap();
    let import =
        || ran(world.command("a", &["import", "--type", "note", "--json"]).arg(file).output().unwrap());
    import().ok();
    let _watch = world.watch("a");
    import().ok();
}

#[test]
fn the_environment_of_the_tests_means_nothing_to_the_program() {
    let world = World::new();
    world.local("a");
    let status = || world.command("a", &["status", "--json"]).env("ANABRANCH_DATA", "/nowhere").output();
    assert_eq!(ran(status().unwrap()).ok().json(), world.run("a", &["status"]).ok().json());
    let mut command = Command::new(env!("CARGO_BIN_EXE_anabranch"));
    command.args(["relay", "--check", "--json"]).env("ANABRANCH_DATA", "/nowhere");
    assert_eq!(ran(command.output().unwrap()).error(2)["code"], "no_data_dir");
}

#[test]
fn a_socket_that_a_killed_process_left_is_no_obstacle() {
    let world = World::new();
    world.local("a");
    let mut watch = world.watch("a");
    world.run("a", &["set", "note", "n1", "title=x"]).ok();
    watch.child.kill().unwrap();
    watch.child.wait().unwrap();
    assert!(world.path("a/anabranch.sock").exists());
    assert_eq!(world.run("a", &["get", "note", "n1"]).ok().json()["fields"]["title"], "x");
    let _again = world.watch("a");
    world.run("a", &["get", "note", "n1"]).ok();
}

#[test]
fn commands_at_the_same_time_wait_for_each_other() {
    let world = World::new();
    world.local("a");
    let children: Vec<Child> =
        (0..6).map(|_| world.command("a", &["set", "note", "n1", "views+=1"]).spawn().unwrap()).collect();
    for child in children {
        ran(child.wait_with_output().unwrap()).ok();
    }
    assert_eq!(world.run("a", &["get", "note", "n1"]).ok().json()["fields"]["views"], 6);
}

#[test]
fn a_reader_that_goes_away_is_no_failure() {
    let world = World::new();
    world.local("a");
    let lines: String = (0..3_000)
        .map(|n| format!("{}\n", json!({"id": format!("n{n}"), "title": "x".repeat(100)})))
        .collect();
    world.run_with_input("a", &["import", "-", "--type", "note"], &lines).ok();
    let mut child = world.command("a", &["list", "note", "--json"]).spawn().unwrap();
    let mut first = String::new();
    BufReader::with_capacity(64, child.stdout.take().unwrap()).read_line(&mut first).unwrap();
    let done = ran(child.wait_with_output().unwrap());
    assert_eq!((done.code, done.err.as_str()), (0, ""));
}

#[test]
fn without_a_relay_a_sync_ends_in_time_and_loses_nothing() {
    let world = World::new();
    let token = world.token(&[]);
    // Nobody listens there: the socket is bound and never read.
    let silent = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    world.join_as("a", &format!("quic://{}", silent.local_addr().unwrap()), &token);
    world.run("a", &["set", "note", "n1", "title=x"]).ok();
    let start = Instant::now();
    let sync = world.run("a", &["sync", "--deadline", "1s"]);
    assert!(start.elapsed() < Duration::from_secs(4), "{:?}", start.elapsed());
    assert_eq!(sync.error(6)["category"], "network");
    let report = sync.json();
    assert_eq!(keys(&report), ["digest", "lacking", "outcome", "pending", "received", "refused", "sent"]);
    assert_eq!((&report["outcome"], &report["pending"]), (&json!("offline"), &json!(1)));
    assert_eq!(world.run("a", &["get", "note", "n1"]).ok().json()["status"], "pending_create");
}

#[test]
fn two_devices_meet_through_a_relay() {
    let world = World::new();
    let mut relay = world.relay();
    world.join("server", &relay.url, "authority");
    // Without its key in the address: the token tells it.
    world.join("phone", relay.url.split('#').next().unwrap(), "writer");
    let invite =
        world.run("relay", &["token", "--workspace", "home", "--user", "bob", "--invite"]).ok().json();
    let invite = invite["invite"].as_str().unwrap();
    world.run("tablet", &["init", "--device", "tablet", "--schema", "schema.toml", "--invite", invite]).ok();
    world.run("server", &["schema", "push"]).ok();

    let exercises: Vec<Value> =
        (0..300).map(|n| json!({"id": format!("e{n}"), "name": format!("E {n}"), "level": "x"})).collect();
    fs::write(world.path("e.json"), json!(exercises).to_string()).unwrap();
    world.run("server", &["import", "e.json", "--type", "exercise", "--id-field", "id"]).ok();
    assert_eq!(world.sync("server")["sent"], 300);
    assert_eq!(world.sync("phone")["received"], 300);
    world.sync("tablet");
    let export = world.run("server", &["export", "exercise"]).ok().out;
    assert_eq!(world.run("phone", &["export", "exercise"]).ok().out, export);
    assert_eq!(world.run("tablet", &["export", "exercise"]).ok().out, export);
    let schema = world.run("phone", &["schema", "show", "--relay"]).ok().json();
    assert!(schema["schema"].as_str().unwrap().contains("[exercise.fields]"));

    // Refused here, and by the relay where the check here was left out.
    assert_eq!(world.run("phone", &["set", "exercise", "e1", "name=x"]).error(3)["category"], "validation");
    world.run("phone", &["set", "exercise", "e1", "name=x", "--unchecked"]).ok();
    world.sync("phone");
    let refused = world.run("phone", &["refused"]).ok().lines();
    assert_eq!(refused.len(), 1);
    assert_eq!(keys(&refused[0]), ["code", "id", "intents", "message", "number", "time", "type"]);
    assert_eq!(world.run("phone", &["status"]).ok().json()["refused"], 1);
    assert_eq!(world.run("phone", &["export", "exercise"]).ok().out, export);
    world.run("phone", &["refused", "dismiss", &refused[0]["number"].to_string()]).ok();
    assert_eq!(world.run("phone", &["refused"]).ok().out, "");

    // A running watch gets what others send.
    let mut watch = world.watch("tablet");
    world.run("phone", &["set", "note", "n1", "title=hi"]).ok();
    let sync = world.sync("phone");
    loop {
        let event = watch.event("change");
        if event["id"] == "n1" {
            assert_eq!(event["fields"]["title"], "hi");
            break;
        }
    }
    assert_eq!(world.sync("tablet")["digest"], sync["digest"]);
    assert_eq!(terminate(&mut watch.child), 0);
    assert_eq!(terminate(&mut relay.child), 0);
}

#[test]
fn a_conflict_settled_on_one_device_is_settled_on_both() {
    let world = World::new();
    let relay = world.relay();
    world.join("phone", &relay.url, "writer");
    world.join("tablet", &relay.url, "writer");
    world.run("phone", &["set", "note", "n1", "price=100", "money=EUR"]).ok();
    world.sync("phone");
    world.sync("tablet");
    world.run("phone", &["set", "note", "n1", "price=200"]).ok();
    world.run("tablet", &["set", "note", "n1", "money=JPY"]).ok();
    world.sync("phone");
    world.sync("tablet");
    world.sync("phone");

    let conflicts = world.run("phone", &["conflicts"]).ok();
    assert_eq!(conflicts.out, world.run("tablet", &["conflicts"]).ok().out);
    let conflicts = conflicts.lines();
    assert_eq!(conflicts.len(), 1);
    let conflict = &conflicts[0];
    for (part, value) in [("type", "note"), ("id", "n1"), ("field", "cost"), ("kind", "manual")] {
        assert_eq!(conflict[part], value);
    }
    let sides = conflict["sides"].as_array().unwrap();
    assert_eq!(sides.len(), 2);
    assert_eq!(keys(&sides[0]), ["device", "devices", "time", "value"]);
    assert_eq!(sides[0]["devices"], json!(["tablet"]));
    assert!(sides[0]["time"].as_str().unwrap().ends_with('Z'));
    assert_eq!(sides[0]["device"], "tablet");
    assert_eq!(sides[0]["value"], json!({"price": 100, "money": "JPY"}));
    assert_eq!(sides[1]["device"], "phone");
    assert_eq!(sides[1]["value"], json!({"price": 200, "money": "EUR"}));
    assert_eq!(world.run("phone", &["get", "note", "n1"]).ok().json()["status"], "conflict");
    assert_eq!(world.run("phone", &["set", "note", "n1", "price=1"]).error(4)["category"], "conflict");

    let value = r#"{"price":200,"money":"JPY"}"#;
    world.run("tablet", &["resolve", "note", "n1", "cost", "--value", value]).ok();
    world.sync("tablet");
    world.sync("phone");
    for device in ["phone", "tablet"] {
        assert_eq!(world.run(device, &["conflicts"]).ok().out, "");
        let fields = world.run(device, &["get", "note", "n1"]).ok().json()["fields"].clone();
        assert_eq!((&fields["price"], &fields["money"]), (&json!(200), &json!("JPY")));
    }
    assert_eq!(
        world.run("phone", &["export", "note"]).ok().out,
        world.run("tablet", &["export", "note"]).ok().out
    );
}

/// As the book says: for texts, equal values are not one candidate.
#[test]
fn what_merges_edit_by_edit_stands_there_twice_where_two_create_it() {
    let world = World::new();
    let relay = world.relay();
    for device in ["phone", "tablet"] {
        world.join(device, &relay.url, "writer");
        let fields = ["title=Legs", "body=Legs", "log=[\"x\"]", "views=3", "tags=[\"y\"]"];
        world.run(device, &[&["set", "note", "monday"], &fields[..]].concat()).ok();
    }
    for device in ["phone", "tablet", "phone", "tablet"] {
        world.sync(device);
    }
    let fields = world.run("phone", &["get", "note", "monday"]).ok().json()["fields"].clone();
    assert_eq!((&fields["title"], &fields["body"]), (&json!("Legs"), &json!("LegsLegs")));
    assert_eq!((&fields["log"], &fields["views"]), (&json!(["x", "x"]), &json!(6)));
    assert_eq!(fields["tags"], json!(["y"]));
    // Set as a whole, it becomes the difference to what was seen: edits of both stay.
    world.run("phone", &["set", "note", "monday", "body=My LegsLegs"]).ok();
    world.run("tablet", &["set", "note", "monday", "body=LegsLegs!"]).ok();
    for device in ["phone", "tablet", "phone"] {
        world.sync(device);
    }
    for device in ["phone", "tablet"] {
        let fields = world.run(device, &["get", "note", "monday"]).ok().json()["fields"].clone();
        assert_eq!((&fields["title"], &fields["body"]), (&json!("Legs"), &json!("My LegsLegs!")), "{device}");
    }
}

/// Equal values are one side, and it is the side of all who wrote it.
#[test]
fn every_device_finds_its_own_side() {
    let world = World::new();
    let relay = world.relay();
    let devices = ["phone", "tablet", "laptop", "desk"];
    for device in devices {
        world.join(device, &relay.url, "writer");
    }
    world.run("phone", &["set", "note", "n1", "price=1", "money=EUR"]).ok();
    world.run("phone", &["set", "note", "n2", "price=1", "money=EUR"]).ok();
    devices.iter().for_each(|device| drop(world.sync(device)));
    for (device, price) in [("phone", "200"), ("tablet", "200"), ("laptop", "300")] {
        for note in ["n1", "n2"] {
            world.run(device, &["set", "note", note, &format!("price={price}")]).ok();
        }
    }
    for device in devices.iter().chain(&devices) {
        world.sync(device);
    }
    let conflicts = world.run("desk", &["conflicts"]).ok();
    for device in devices {
        assert_eq!(world.run(device, &["conflicts"]).ok().out, conflicts.out, "{device}");
    }
    let conflicts = conflicts.lines();
    let sides = conflicts[0]["sides"].as_array().unwrap();
    assert_eq!(sides.len(), 2);
    let side = sides.iter().find(|side| side["value"]["price"] == 200).unwrap();
    let mut wrote: Vec<&str> =
        side["devices"].as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect();
    assert_eq!(side["device"], wrote[0]);
    wrote.sort_unstable();
    assert_eq!(wrote, ["phone", "tablet"]);

    // Who wrote none of it is told what there is to choose from.
    let error = world.run("desk", &["resolve", "note", "n1", "cost", "--keep", "mine"]).error(3);
    assert_eq!(error["code"], "no_such_side");
    let message = error["message"].as_str().unwrap();
    assert!(message.contains("this device wrote none of the sides"), "{message}");
    for part in ["1: ", "2: ", "200", "300", "phone", "tablet", "laptop"] {
        assert!(message.contains(part), "{part}: {message}");
    }
    let error = world.run("desk", &["resolve", "note", "n1", "cost", "--keep", "theirs"]).error(3);
    assert!(error["message"].as_str().unwrap().contains("2 sides are of other devices"), "{error}");

    for (device, note) in [("phone", "n1"), ("tablet", "n2")] {
        world.run(device, &["resolve", "note", note, "cost", "--keep", "mine"]).ok();
        let fields = world.run(device, &["get", "note", note]).ok().json()["fields"].clone();
        assert_eq!(fields["price"], 200, "{device}");
    }
}

#[test]
fn a_form_that_was_open_overwrites_nothing_unseen() {
    let world = World::new();
    let relay = world.relay();
    world.join("phone", &relay.url, "writer");
    world.join("tablet", &relay.url, "writer");
    world.run("phone", &["set", "note", "n1", "price=1", "money=EUR"]).ok();
    world.sync("phone");
    world.sync("tablet");
    let seen = world.run("phone", &["get", "note", "n1"]).ok().json()["version"].as_str().unwrap().to_owned();
    world.run("tablet", &["set", "note", "n1", "price=2"]).ok();
    world.sync("tablet");
    world.sync("phone");
    world.run("phone", &["set", "note", "n1", "price=3", "--if-version", &seen]).ok();
    assert_eq!(world.run("phone", &["conflicts"]).ok().lines().len(), 1);
}

#[test]
fn each_way_not_to_get_in_has_its_own_error() {
    let world = World::new();
    let relay = world.relay();
    let mut codes = Vec::new();
    let mut refused = |device: &str, url: &str, token: &str| {
        world.join_as(device, url, token);
        world.run(device, &["set", "note", "n1", "title=x"]).ok();
        let sync = world.run(device, &["sync", "--deadline", "10s"]);
        let error = sync.error(5);
        assert_eq!(error["category"], "auth");
        assert_eq!(sync.json()["outcome"], "auth");
        assert_eq!(sync.json()["pending"], 1);
        codes.push(error["code"].as_str().unwrap().to_owned());
    };
    refused("wrong", &relay.url, "not.a.token");
    refused("expired", &relay.url, &world.token(&["--ttl", "1h", "--clock-offset", "-2h"]));
    let elsewhere = world.run("relay", &["token", "--workspace", "work", "--user", "ann"]).ok().json();
    refused("elsewhere", &relay.url, elsewhere["token"].as_str().unwrap());
    let other = World::new();
    let other_relay = other.relay();
    let key = other_relay.url.split('#').nth(1).unwrap();
    let wrong_key = format!("{}#{key}", relay.url.split('#').next().unwrap());
    refused("key", &wrong_key, &world.token(&[]));

    // An invite is for one device.
    let invite =
        world.run("relay", &["token", "--workspace", "home", "--user", "bob", "--invite"]).ok().json();
    let invite = invite["invite"].as_str().unwrap();
    for device in ["first", "second"] {
        world.run(device, &["init", "--device", device, "--schema", "schema.toml", "--invite", invite]).ok();
    }
    world.sync("first");
    codes.push(world.run("second", &["sync"]).error(5)["code"].as_str().unwrap().to_owned());
    let unique: std::collections::BTreeSet<_> = codes.iter().collect();
    assert_eq!(unique.len(), codes.len(), "{codes:?}");
}

#[test]
fn a_wrong_clock_shows_as_skew() {
    let world = World::new();
    let relay = world.relay();
    world.join("a", &relay.url, "writer");
    world.run("a", &["set", "note", "n1", "title=x", "--clock-offset", "365d"]).ok();
    let report = world.run("a", &["sync", "--clock-offset", "365d"]).ok().json();
    assert_eq!((&report["outcome"], &report["sent"]), (&json!("complete"), &json!(1)));
    let skew =
        world.run("a", &["status", "--clock-offset", "365d"]).ok().json()["clock_skew_ms"].as_i64().unwrap();
    assert!((skew - 365 * 86_400_000).abs() < 60_000, "{skew}");
}

#[test]
fn schemas_are_checked_before_they_are_used() {
    let world = World::new();
    let check = |args: &[&str]| {
        ran(Command::new(env!("CARGO_BIN_EXE_anabranch"))
            .current_dir(world.dir.path())
            .args(args)
            .output()
            .unwrap())
    };
    fs::write(world.path("bad.toml"), "[note]\nversion = 1\n[note.fields]\ntitle = { type = \"sting\" }\n")
        .unwrap();
    let bad = check(&["schema", "check", "bad.toml", "--json"]);
    assert!(bad.error(3)["message"].as_str().unwrap().contains("bad.toml:4: "));
    let same = check(&["schema", "check", "schema.toml", "schema.toml", "--json"]);
    assert_eq!(same.ok().json(), json!({"types": 2, "compatible": true, "changes": []}));
    let newer = SCHEMA
        .replace("[note]\nversion = 1", "[note]\nversion = 2")
        .replace("[note.fields]", "[note.fields]\nextra = { type = \"int\" }");
    fs::write(world.path("newer.toml"), &newer).unwrap();
    let compatible = check(&["schema", "check", "schema.toml", "newer.toml", "--json"]).ok().json();
    assert!(compatible["changes"].as_array().unwrap().iter().any(|change| change["field"] == "extra"));
    assert_eq!(compatible["compatible"], true);
    let broken = check(&["schema", "check", "newer.toml", "schema.toml", "--json"]);
    assert_eq!(broken.error(3)["code"], "incompatible_schema");
    assert_eq!(broken.json()["compatible"], false);
    assert_eq!(
        world.run("a", &["init", "--device", "a", "--schema", "bad.toml", "--workspace", "w"]).code,
        3
    );
    assert!(!world.path("a/anabranch.toml").exists());

    let relay = world.relay();
    world.join("admin", &relay.url, "admin");
    world.join("writer", &relay.url, "writer");
    world.run("writer", &["schema", "show", "--relay"]).error(7);
    assert_ne!(world.run("writer", &["schema", "push"]).code, 0);
    world.run("admin", &["schema", "push"]).ok();
    world.run("admin", &["schema", "push", "newer.toml"]).ok();
    assert!(world.run("admin", &["schema", "show"]).ok().out.contains("extra"));
    assert!(world.run("writer", &["schema", "show", "--relay"]).ok().out.contains("extra"));
}

#[test]
fn a_relay_s_configuration_can_be_checked() {
    let world = World::new();
    let checked = world.run("relay", &["relay", "--check", "--listen", "127.0.0.1:4433"]).ok().json();
    assert_eq!(checked["listen"], "127.0.0.1:4433");
    assert!(!world.path("relay").exists());
    fs::write(world.path("relay.toml"), "listn = \"127.0.0.1:1\"\n").unwrap();
    let bad = world.run("relay", &["relay", "--check", "--config", "relay.toml"]).error(2);
    assert!(bad["message"].as_str().unwrap().contains("relay.toml:1:1: "), "{bad}");
}

#[test]
fn the_demo_tells_a_true_story() {
    let output = Command::new(env!("CARGO_BIN_EXE_anabranch")).args(["demo", "--json"]).output().unwrap();
    let told = ran(output).ok();
    let end = told.lines().pop().unwrap();
    assert_eq!((&end["event"], &end["equal"]), (&json!("end"), &json!(true)));
    assert_eq!(end["digest"].as_str().unwrap().len(), 64);
}

#[test]
fn an_encrypted_directory_opens_with_its_passphrase_only() {
    const SECRET: &str = "ANABRANCH_PASSPHRASE";
    for backend in ["sled", "redb"] {
        let world = World::new();
        fs::write(world.path("secret"), "correct horse\n").unwrap();
        fs::write(world.path("wrong"), "battery staple\n").unwrap();
        fs::write(world.path("short"), "short\n").unwrap();
        let init =
            ["init", "--device", "d", "--schema", "schema.toml", "--workspace", "home", "--backend", backend];
        let refused = world.run("d", &[&init[..], &["--passphrase-file", "short"]].concat());
        assert_eq!(refused.code, 2, "{}", refused.err);
        assert!(refused.err.contains("at least 8 bytes"), "{}", refused.err);
        world.run("d", &[&init[..], &["--passphrase-file", "secret"]].concat()).ok();
        world.run("d", &["set", "note", "n1", "title=Milk"]).ok();
        let format = fs::read_to_string(world.path("d/store/FORMAT")).unwrap();
        assert!(format.contains(&format!("{backend} encrypted")), "{format}");

        let wrong = world.run("d", &["get", "note", "n1", "--passphrase-file", "wrong"]);
        assert_eq!(wrong.code, 10, "{}", wrong.err);
        assert!(wrong.err.contains("wrong_key"), "{}", wrong.err);
        fs::rename(world.path("secret"), world.path("elsewhere")).unwrap();
        let gone = world.run("d", &["get", "note", "n1"]);
        assert!(gone.code == 2 && gone.err.contains("bad_passphrase"), "{}", gone.err);
        let found =
            world.command("d", &["get", "note", "n1", "--json"]).env(SECRET, "correct horse").output();
        assert_eq!(ran(found.unwrap()).ok().json()["fields"]["title"], "Milk");

        // Without a file the variable is all there is.
        let made = world.command("e", &init).env(SECRET, "correct horse").output().unwrap();
        ran(made).ok();
        let refused = world.run("e", &["list", "note"]);
        assert!(refused.code == 2 && refused.err.contains("key_needed"), "{}", refused.err);
        assert!(!world.path("e/store").exists(), "no plain store in its place");
        ran(world
            .command("e", &["set", "note", "n1", "title=x"])
            .env(SECRET, "correct horse")
            .output()
            .unwrap())
        .ok();

        // The variable may be meant for another directory; the option can't.
        world.local("plain");
        ran(world.command("plain", &["list", "note"]).env(SECRET, "correct horse").output().unwrap()).ok();
        let refused = world.run("plain", &["list", "note", "--passphrase-file", "elsewhere"]);
        assert!(refused.code == 2 && refused.err.contains("not_encrypted"), "{}", refused.err);
    }
}

#[test]
fn a_directory_with_another_backend_than_configured_says_how_to_convert_it() {
    let world = World::new();
    world.local("d");
    world.run("d", &["set", "note", "n1", "title=Milk"]).ok();
    let config = world.path("d/anabranch.toml");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(&config, format!("backend = \"redb\"\n{text}")).unwrap();
    let refused = world.run("d", &["get", "note", "n1"]);
    assert_eq!(refused.code, 10, "{}", refused.err);
    assert!(refused.err.contains("other_backend"), "{}", refused.err);
    assert!(refused.err.contains("anabranch store compact --backend redb"), "{}", refused.err);
}
