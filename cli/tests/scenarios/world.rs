//! Processes and directories.

use std::fs;
use std::io::{BufRead, BufReader, Write as _};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;

/// The directory of the real input, where it is there.
pub(crate) fn data_dir() -> Option<PathBuf> {
    let dir = std::env::var_os("ANABRANCH_DATA").map_or_else(
        || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared/data")),
        PathBuf::from,
    );
    let dir = fs::canonicalize(dir).ok().filter(|dir| dir.join("schema.toml").is_file());
    if dir.is_none() {
        println!("skipped: no schema.toml in ANABRANCH_DATA");
    }
    dir
}

/// A setting of a test, as a number.
pub(crate) fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().map_or(default, |text| text.parse().unwrap())
}

pub(crate) fn binary() -> PathBuf {
    std::env::var_os("ANABRANCH_BIN").map_or_else(|| env!("CARGO_BIN_EXE_anabranch").into(), PathBuf::from)
}

/// Directories of a relay and of devices with the real schema.
pub(crate) struct World {
    pub(crate) dir: TempDir,
    pub(crate) data: PathBuf,
}

/// How a command ended.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) code: i32,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Ran {
    pub(crate) fn of(output: Output) -> Self {
        let ran = Self {
            code: output.status.code().unwrap_or(-1),
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
        };
        assert!(!ran.err.contains("panicked"), "it panicked: {}", ran.err);
        ran
    }

    #[track_caller]
    pub(crate) fn ok(self) -> Self {
        assert_eq!(self.code, 0, "out: {}\nerr: {}", self.out, self.err);
        self
    }

    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|e| panic!("{e}: {:?} {}", self.out, self.err))
    }

    #[track_caller]
    pub(crate) fn lines(&self) -> Vec<Value> {
        self.out.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// The error object: always of the same form, with an exit code of its kind.
    #[track_caller]
    pub(crate) fn error(&self, category: &str, exit_code: i32) -> Value {
        assert_eq!(self.code, exit_code, "out: {}\nerr: {}", self.out, self.err);
        let last = self.err.lines().last().unwrap_or_default();
        let error: Value = serde_json::from_str(last).unwrap_or_else(|e| panic!("{e}: {:?}", self.err));
        for part in ["category", "code", "message", "help"] {
            let text = error["error"][part].as_str().unwrap_or_default();
            assert!(!text.is_empty(), "no {part}: {error}");
        }
        assert_eq!(error["error"]["category"], category, "{error}");
        error["error"].clone()
    }
}

impl World {
    /// Where there is input; otherwise the test has nothing to run on.
    pub(crate) fn new() -> Option<Self> {
        let data = data_dir()?;
        let dir = tempfile::tempdir().unwrap();
        fs::copy(data.join("schema.toml"), dir.path().join("schema.toml")).unwrap();
        Some(Self { dir, data })
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn command(&self, data: &str, args: &[&str]) -> Command {
        let mut command = Command::new(binary());
        // In front: behind `--` they would be no options.
        command.arg("--json").arg("--data").arg(self.path(data)).args(args).current_dir(self.dir.path());
        command.env("ANABRANCH_LOG", "off");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    pub(crate) fn run(&self, data: &str, args: &[&str]) -> Ran {
        Ran::of(self.command(data, args).output().unwrap())
    }

    pub(crate) fn run_with_input(&self, data: &str, args: &[&str], input: &[u8]) -> Ran {
        let mut child = self.command(data, args).stdin(Stdio::piped()).spawn().unwrap();
        // Whoever reads nothing closes the pipe.
        let _ = child.stdin.take().unwrap().write_all(input);
        Ran::of(child.wait_with_output().unwrap())
    }

    /// A device that has never heard of a relay.
    pub(crate) fn local(&self, device: &str) {
        self.run(device, &["init", "--device", device, "--schema", "schema.toml", "--workspace", "home"])
            .ok();
    }

    pub(crate) fn token(&self, args: &[&str]) -> String {
        let all = [&["token", "--workspace", "home", "--user", "ann"], args].concat();
        self.run("relay", &all).ok().json()["token"].as_str().unwrap().to_owned()
    }

    pub(crate) fn invite(&self) -> String {
        let args = ["token", "--workspace", "home", "--user", "bob", "--invite"];
        self.run("relay", &args).ok().json()["invite"].as_str().unwrap().to_owned()
    }

    pub(crate) fn join_with(&self, device: &str, url: &str, token: &str) {
        let args = ["init", "--device", device, "--schema", "schema.toml", "--workspace", "home"];
        self.run(device, &[&args[..], &["--relay", url, "--token", token]].concat()).ok();
    }

    pub(crate) fn join(&self, device: &str, relay: &Relay, role: &str) {
        self.join_with(device, &relay.url, &self.token(&["--role", role]));
    }

    pub(crate) fn relay(&self) -> Relay {
        self.relay_at("127.0.0.1:0")
    }

    pub(crate) fn relay_at(&self, listen: &str) -> Relay {
        self.relay_with(listen, &[])
    }

    pub(crate) fn relay_with(&self, listen: &str, more: &[&str]) -> Relay {
        let args = [&["relay", "--dev", "--listen", listen], more].concat();
        let mut child = self.command("relay", &args).stderr(Stdio::null()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let said: Value = serde_json::from_str(&line).unwrap();
        Relay { child, url: said["url"].as_str().unwrap().to_owned() }
    }

    /// Starts `watch` and waits until it owns the directory.
    pub(crate) fn watch(&self, data: &str) -> Watch {
        let mut child = self.command(data, &["watch"]).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let (send, events) = mpsc::channel();
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                let _ = send.send(serde_json::from_str(&line).unwrap());
            }
        });
        let mut watch = Watch { child, events, first: None };
        watch.first = Some(watch.event(|event| event["event"] == "status"));
        watch
    }

    #[track_caller]
    pub(crate) fn sync(&self, device: &str) -> Value {
        self.sync_with(device, &[])
    }

    #[track_caller]
    pub(crate) fn sync_with(&self, device: &str, args: &[&str]) -> Value {
        let report = self.run(device, &[&["sync", "--deadline", "60s"], args].concat()).ok().json();
        assert_eq!(report["outcome"], "complete", "{device}: {report}");
        assert_eq!(report["pending"], 0, "{device}: {report}");
        report
    }

    /// Syncs in this order until each has what all wrote; their digests are equal then.
    #[track_caller]
    pub(crate) fn settle(&self, devices: &[&str]) {
        for device in devices {
            self.sync(device);
        }
        let digests: Vec<Value> = devices.iter().map(|device| self.sync(device)["digest"].clone()).collect();
        assert!(digests.iter().all(|digest| *digest == digests[0]), "{digests:?}");
    }

    /// One edit of one entity: a line of `set -` without type and id.
    #[track_caller]
    pub(crate) fn edit(&self, device: &str, type_name: &str, id: &str, edit: &Value, offset: &str) -> Ran {
        let mut line = edit.clone();
        line["type"] = type_name.into();
        line["id"] = id.into();
        let args = ["set", "-", "--clock-offset", offset];
        self.run_with_input(device, &args, line.to_string().as_bytes())
    }

    #[track_caller]
    pub(crate) fn set(&self, device: &str, args: &[&str]) {
        self.run(device, &[&["set"], args].concat()).ok();
    }

    #[track_caller]
    pub(crate) fn fields(&self, device: &str, type_name: &str, id: &str) -> Value {
        self.run(device, &["get", type_name, id]).ok().json()["fields"].clone()
    }

    #[track_caller]
    pub(crate) fn export(&self, device: &str, type_name: &str) -> String {
        self.run(device, &["export", type_name]).ok().out
    }

    #[track_caller]
    pub(crate) fn conflicts(&self, device: &str) -> Vec<Value> {
        self.run(device, &["conflicts"]).ok().lines()
    }

    #[track_caller]
    pub(crate) fn status(&self, device: &str) -> Value {
        self.run(device, &["status"]).ok().json()
    }
}

/// Tells a process to end, and its exit code.
pub(crate) fn terminate(child: &mut Child) -> i32 {
    let pid = child.id().to_string();
    assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    child.wait().unwrap().code().unwrap_or(-1)
}

pub(crate) struct Relay {
    pub(crate) child: Child,
    pub(crate) url: String,
}

impl Relay {
    /// HOST:PORT.
    pub(crate) fn address(&self) -> &str {
        self.url.trim_start_matches("quic://").split('#').next().unwrap()
    }

    pub(crate) fn key(&self) -> &str {
        self.url.split('#').nth(1).unwrap()
    }

    /// Kills it as a power cut would.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(crate) struct Watch {
    pub(crate) child: Child,
    events: mpsc::Receiver<Value>,
    /// The first status: it may be the one that a test waits for, and then it isn't told again.
    first: Option<Value>,
}

impl Watch {
    /// The next event that fits; others are skipped.
    #[track_caller]
    pub(crate) fn event(&mut self, fits: impl Fn(&Value) -> bool) -> Value {
        loop {
            let event = self.first.take().unwrap_or_else(|| {
                self.events.recv_timeout(Duration::from_secs(30)).expect("no such event came")
            });
            if fits(&event) {
                return event;
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
