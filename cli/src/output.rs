//! Where a command's output goes: to this process's streams, or through the socket to the
//! process that forwarded the command.

use std::io::{BufWriter, IsTerminal as _, Stdout, Write as _};

use indicatif::{ProgressBar, ProgressStyle};
use serde::{Deserialize, Serialize};
use serde_json::{Value as Json, json};
use tokio::sync::mpsc;

use crate::failure::Failure;

/// One piece of output, as the socket carries it: a line of JSON each.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "snake_case")]
pub(crate) enum Frame {
    /// A line of standard output.
    Line { text: String },
    /// A line of standard error.
    Note { text: String },
    /// How far a long command is.
    Progress { done: u64, total: u64, lines: bool },
    /// Lines up to here shall be seen now.
    Flush,
    /// The owner has the command, and has not stopped.
    Alive,
    /// The owner ends; another one may go on with the command.
    Leaving,
    /// The command is over.
    End { failure: Option<Failure> },
}

/// Where output goes, and in which form.
pub(crate) struct Output {
    /// Whether programs read it.
    pub(crate) json: bool,
    target: Target,
}

enum Target {
    Process { stdout: BufWriter<Stdout>, bar: Option<ProgressBar> },
    Socket(mpsc::Sender<Frame>),
}

impl Output {
    /// To this process's streams.
    pub(crate) fn process(json: bool) -> Self {
        let stdout = BufWriter::new(std::io::stdout());
        Self { json, target: Target::Process { stdout, bar: None } }
    }

    /// Through a socket. The channel is bounded: a slow reader slows the command down.
    pub(crate) fn socket(json: bool, frames: mpsc::Sender<Frame>) -> Self {
        Self { json, target: Target::Socket(frames) }
    }

    /// A line for people.
    pub(crate) async fn text(&mut self, text: impl Into<String>) -> Result<(), Failure> {
        self.frame(Frame::Line { text: text.into() }).await
    }

    /// A line for programs.
    pub(crate) async fn object(&mut self, value: &Json) -> Result<(), Failure> {
        self.text(value.to_string()).await
    }

    /// The one result of a command: `object` for programs, `text` for people.
    pub(crate) async fn result(&mut self, object: Json, text: impl Into<String>) -> Result<(), Failure> {
        match self.json {
            true => self.object(&object).await,
            false => self.text(text).await,
        }
    }

    /// A line on standard error.
    pub(crate) async fn note(&mut self, text: impl Into<String>) -> Result<(), Failure> {
        self.frame(Frame::Note { text: text.into() }).await
    }

    /// How far a long command is: a bar on a terminal, and with `lines` a line of JSON. `total` is 0
    /// where it is not known.
    pub(crate) async fn progress(&mut self, done: u64, total: u64, lines: bool) -> Result<(), Failure> {
        self.frame(Frame::Progress { done, total, lines }).await
    }

    /// Everything up to here shall be seen now.
    pub(crate) async fn flush(&mut self) -> Result<(), Failure> {
        self.frame(Frame::Flush).await
    }

    /// Carries out a frame.
    pub(crate) async fn frame(&mut self, frame: Frame) -> Result<(), Failure> {
        let (stdout, bar) = match &mut self.target {
            Target::Process { stdout, bar } => (stdout, bar),
            Target::Socket(frames) => {
                let closed = || Failure::output(&std::io::ErrorKind::BrokenPipe.into());
                return frames.send(frame).await.map_err(|_| closed());
            }
        };
        let written = match frame {
            Frame::Line { text } => writeln!(stdout, "{text}"),
            Frame::Note { text } => match bar {
                Some(bar) => {
                    bar.suspend(|| eprint_line(&text));
                    Ok(())
                }
                None => {
                    eprint_line(&text);
                    Ok(())
                }
            },
            Frame::Progress { done, total, lines } => {
                if lines {
                    eprint_line(&json!({ "progress": { "done": done, "total": total } }).to_string());
                } else if !self.json && std::io::stderr().is_terminal() {
                    let bar = bar.get_or_insert_with(|| new_bar(total));
                    bar.set_length(total.max(done));
                    bar.set_position(done);
                    if total > 0 && done >= total {
                        bar.finish_and_clear();
                    }
                }
                Ok(())
            }
            Frame::Flush => stdout.flush(),
            Frame::Alive | Frame::Leaving | Frame::End { .. } => Ok(()),
        };
        written.map_err(|error| Failure::output(&error))
    }
}

fn new_bar(total: u64) -> ProgressBar {
    let bar = ProgressBar::new(total);
    if let Ok(style) = ProgressStyle::with_template("{bar:40} {pos}/{len}, {per_sec}, {eta} to go") {
        bar.set_style(style);
    }
    bar
}

fn eprint_line(text: &str) {
    // Unlike eprintln!, this does not panic where standard error is closed.
    let _ = writeln!(std::io::stderr(), "{text}");
}
