//! The program `anabranch`: a relay, a demo, and a scriptable client.
//!
//! Every command prints for people, or with `--json` for programs. What JSON there is, is a
//! contract, and so are the exit codes (see `failure::Category` and `anabranch --help`).
//!
//! Commands on a device's data, and on the stores of devices and relays, run in the process that
//! owns the directory: usually their own; while `watch` or a relay runs, that one, reached over a
//! socket (`owner`).

mod args;
mod assign;
mod commands;
mod config;
mod demo;
mod failure;
mod output;
mod owner;
mod secret;

use std::process::ExitCode;

use clap::Parser as _;
use clap::error::ErrorKind;
use tracing_subscriber::EnvFilter;

use crate::args::{Cli, Command};
use crate::failure::{Category, Failure};
use crate::output::Output;

/// Runs the program with the arguments of this process.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return wrong_arguments(&error),
    };
    let json = cli.global.json;
    log_to_stderr(matches!(cli.command, Command::Relay(_)), json);
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            let failure = Failure::internal(format!("the system gives no threads: {error}"));
            failure.print(json);
            return failure.exit_code();
        }
    };
    let result = runtime.block_on(run(cli));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            failure.print(json);
            failure.exit_code()
        }
    }
}

async fn run(cli: Cli) -> Result<(), Failure> {
    let Cli { global, command } = cli;
    let mut output = Output::process(global.json);
    let result = match command {
        Command::Relay(args) => commands::relay(global, args, &mut output).await,
        Command::Token(args) => commands::token(global, args, &mut output).await,
        Command::Init(args) => commands::init(global, args, &mut output).await,
        Command::Demo(args) => demo::demo(args, &mut output).await,
        Command::Schema(command) => commands::schema(global, command, &mut output).await,
        Command::Store(args) => commands::store(global, args, &mut output).await,
        Command::Watch => commands::watch(global, &mut output).await,
        Command::Data(command) => commands::data(global, command, &mut output).await,
    };
    let flushed = output.flush().await;
    result.and(flushed)
}

/// Reads a text as everything that a person may write as values: an assignment, lines of edits,
/// and records to import. Gives what was understood, for tests of hostile input.
#[doc(hidden)]
pub fn read_values(ty: &anabranch::schema::EntityType, text: &str) -> Vec<anabranch::Edit> {
    let mut edits = assign::edit_lines(text).unwrap_or_default();
    if let Ok(intent) = assign::assignment(ty, text) {
        edits.extend(assign::edit(&ty.name, "id", vec![intent], None).ok());
    }
    let _ = assign::import_records(text);
    edits
}

/// Reads a text as a device's configuration and writes what was understood, for tests of hostile
/// input; then as one that gets a line more and loses one.
#[doc(hidden)]
pub fn reread_config(text: &str) -> (Option<String>, Option<String>) {
    let config = config::parse_config(text).ok();
    let lines = [("relay", Some("quic://x:1".into())), ("token", None)];
    (config.and_then(|config| toml::to_string(&config).ok()), config::with_lines(text, &lines).ok())
}

/// Reads a line as what another process asks the owner of a directory, and as a piece of its
/// answer, and writes what was understood, for tests of hostile input.
#[doc(hidden)]
pub fn reread_line(line: &str) -> (Option<Vec<u8>>, Option<Vec<u8>>) {
    (owner::reread_request(line.as_bytes()), owner::reread_frame(line))
}

/// What clap found wrong, in the form of all other errors; its help as it is.
fn wrong_arguments(error: &clap::Error) -> ExitCode {
    if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
        // Whoever closed the output has read enough.
        let _ = error.print();
        return ExitCode::SUCCESS;
    }
    let json = std::env::args_os().any(|arg| arg == "--json");
    if error.kind() == ErrorKind::InvalidUtf8 {
        not_utf8().print(json);
    } else if json {
        let text = error.render().to_string();
        // What is wrong comes first, then hints and the usage, each behind an empty line.
        let wrong: Vec<&str> = text.lines().map(str::trim).take_while(|line| !line.is_empty()).collect();
        let message = wrong.join(" ").trim_start_matches("error: ").to_owned();
        Failure::usage("bad_arguments", message).print(true);
    } else {
        let _ = error.print();
    }
    ExitCode::from(Category::Usage as u8)
}

/// Clap does not say which argument it is.
fn not_utf8() -> Failure {
    let mut arguments = std::env::args_os().skip(1);
    let wrong = arguments.find(|argument| argument.to_str().is_none()).unwrap_or_default();
    let message = format!("the argument {:?} is not UTF-8 text", wrong.to_string_lossy());
    Failure::usage("not_utf8", message).help(
        "only directories and files may have such names; write values as UTF-8, or as \\u escapes in JSON",
    )
}

/// Events for whoever runs it: a relay tells what it does, other commands only when asked to.
fn log_to_stderr(relay: bool, json: bool) {
    let default = if relay { "info" } else { "off" };
    let filter = EnvFilter::try_from_env("ANABRANCH_LOG").unwrap_or_else(|_| EnvFilter::new(default));
    let events = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match json {
        true => events.json().init(),
        false => events.init(),
    }
}
