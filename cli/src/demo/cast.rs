//! The processes of the demo: each command is this program again, on a directory of its own.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::Value as Json;

use crate::failure::{Category, Failure};

/// Where it all happens.
pub(super) struct Stage {
    program: PathBuf,
    dir: PathBuf,
}

/// What a command said.
pub(super) struct Ran {
    /// Its exit code; none if a signal ended it.
    pub(super) code: Option<i32>,
    /// What it printed, without the last line break.
    pub(super) text: String,
    errors: String,
}

impl Ran {
    /// What it printed, as JSON lines.
    pub(super) fn lines(&self) -> Result<Vec<Json>, Failure> {
        self.text
            .lines()
            .map(|line| {
                serde_json::from_str(line).map_err(|error| failed(format!("{line:?} is no JSON: {error}")))
            })
            .collect()
    }

    /// The one object that it printed.
    pub(super) fn object(&self) -> Result<Json, Failure> {
        self.lines()?.into_iter().next().ok_or_else(|| failed("a command printed nothing".to_owned()))
    }

    /// The message of its error.
    pub(super) fn error(&self) -> String {
        let last = self.errors.lines().last().unwrap_or_default();
        let error: Json = serde_json::from_str(last).unwrap_or_default();
        error["error"]["message"].as_str().unwrap_or(last).to_owned()
    }
}

/// The story did not go as it must.
pub(super) fn failed(what: String) -> Failure {
    Failure::new(Category::Internal, "demo_failed", what)
        .help("run it again with --keep and look at the directories")
}

impl Stage {
    pub(super) fn new(dir: &Path) -> Result<Self, Failure> {
        let program = std::env::current_exe()
            .map_err(|error| failed(format!("this program does not find itself: {error}")))?;
        Ok(Self { program, dir: dir.to_owned() })
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    fn command(&self, data: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.args(arguments).arg("--json").arg("--data").arg(self.path(data));
        // Settings of whoever runs the demo are not part of the story.
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("ANABRANCH_") {
                command.env_remove(name);
            }
        }
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn spawn(&self, data: &str, arguments: &[&str]) -> Result<Child, Failure> {
        let spawned = self.command(data, arguments).spawn();
        spawned.map_err(|error| failed(format!("a process could not be started: {error}")))
    }

    /// Runs a command to its end, whatever that is.
    pub(super) fn run(&self, data: &str, arguments: &[&str]) -> Result<Ran, Failure> {
        self.run_with_input(data, arguments, None)
    }

    fn run_with_input(&self, data: &str, arguments: &[&str], input: Option<&str>) -> Result<Ran, Failure> {
        let mut command = self.command(data, arguments);
        if input.is_some() {
            command.stdin(Stdio::piped());
        }
        let lost = |error: std::io::Error| failed(format!("a process could not be run: {error}"));
        let mut child = command.spawn().map_err(lost)?;
        if let (Some(mut stdin), Some(input)) = (child.stdin.take(), input) {
            // A few hundred bytes: they fit into the pipe.
            stdin.write_all(input.as_bytes()).map_err(lost)?;
        }
        let output = child.wait_with_output().map_err(lost)?;
        Ok(Ran {
            code: output.status.code(),
            text: String::from_utf8_lossy(&output.stdout).trim_end().to_owned(),
            errors: String::from_utf8_lossy(&output.stderr).trim_end().to_owned(),
        })
    }

    /// Runs a command that has to succeed.
    pub(super) fn must(&self, data: &str, arguments: &[&str]) -> Result<Ran, Failure> {
        self.must_with_input(data, arguments, None)
    }

    /// The same with standard input.
    pub(super) fn must_with_input(
        &self,
        data: &str,
        arguments: &[&str],
        input: Option<&str>,
    ) -> Result<Ran, Failure> {
        let ran = self.run_with_input(data, arguments, input)?;
        match ran.code {
            Some(0) => Ok(ran),
            code => Err(failed(format!(
                "`{}` on {data} ended with {}: {}",
                arguments.join(" "),
                code.map_or("a signal".to_owned(), |code| code.to_string()),
                ran.error()
            ))),
        }
    }

    /// Starts an import, kills it when it has told its first progress, and gives what it had
    /// acknowledged by then.
    pub(super) fn import_and_kill(&self, data: &str, arguments: &[&str]) -> Result<(u64, bool), Failure> {
        let lost = |error: std::io::Error| failed(format!("a process could not be killed: {error}"));
        let mut child = self.spawn(data, arguments)?;
        let mut acknowledged = 0;
        if let Some(errors) = child.stderr.take() {
            for line in BufReader::new(errors).lines() {
                let line: Json = serde_json::from_str(&line.map_err(lost)?).unwrap_or_default();
                if let Some(done) = line["progress"]["done"].as_u64() {
                    acknowledged = done;
                    break;
                }
            }
        }
        child.kill().map_err(lost)?;
        let status = child.wait().map_err(lost)?;
        Ok((acknowledged, status.code().is_none()))
    }

    /// Starts a relay and waits until it listens.
    pub(super) fn relay(&self, listen: &str) -> Result<Relay, Failure> {
        let mut child = self.spawn("relay", &["relay", "--dev", "--listen", listen])?;
        let mut line = String::new();
        if let Some(output) = child.stdout.take() {
            let _ = BufReader::new(output).read_line(&mut line);
        }
        let url =
            serde_json::from_str::<Json>(&line).ok().and_then(|said| Some(said["url"].as_str()?.to_owned()));
        let Some(url) = url else {
            let mut errors = String::new();
            let _ = child.kill();
            if let Some(mut stderr) = child.stderr.take() {
                let _ = stderr.read_to_string(&mut errors);
            }
            return Err(failed(format!("the relay did not start: {errors}")));
        };
        // Somebody has to take what it logs, or it stops at a full pipe.
        if let Some(mut errors) = child.stderr.take() {
            std::thread::spawn(move || std::io::copy(&mut errors, &mut std::io::sink()));
        }
        Ok(Relay { child, url })
    }
}

/// A running relay. Dropping it kills it.
pub(super) struct Relay {
    child: Child,
    pub(super) url: String,
}

impl Relay {
    /// `HOST:PORT`.
    pub(super) fn address(&self) -> &str {
        let without_scheme = self.url.strip_prefix("quic://").unwrap_or(&self.url);
        without_scheme.split('#').next().unwrap_or(without_scheme)
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
