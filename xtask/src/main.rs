//! Chores of the workspace, each a cargo command with the right profile and features.

mod fuzz;

use std::process::{Command, ExitCode};

const USAGE: &str = "\
usage: cargo xtask sim [OPTIONS]           simulate the whole system; cargo xtask sim --help says more
       cargo xtask fuzz [--minutes M] [--no-libfuzzer]
           run all fuzz targets, which share M minutes, 13 unless given; without libFuzzer they run in a
           mutation loop that knows nothing of coverage, and that is soon built";

/// A minute for each target.
const FUZZ_MINUTES: u64 = 13;

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    match args.next().as_deref() {
        Some("sim") => sim(&args.collect::<Vec<String>>()),
        Some("fuzz") => match fuzz_options(args) {
            Some((minutes, engine)) => fuzz(minutes, engine),
            None => {
                eprintln!("{USAGE}");
                ExitCode::from(2)
            }
        },
        _ => {
            eprintln!("{USAGE}");
            ExitCode::from(2)
        }
    }
}

fn fuzz_options(mut args: impl Iterator<Item = String>) -> Option<(u64, Option<fuzz::Engine>)> {
    let (mut minutes, mut engine) = (FUZZ_MINUTES, None);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--minutes" => minutes = args.next()?.parse().ok().filter(|minutes| *minutes > 0)?,
            "--no-libfuzzer" => engine = Some(fuzz::Engine::Loop),
            _ => return None,
        }
    }
    Some((minutes, engine))
}

fn fuzz(minutes: u64, engine: Option<fuzz::Engine>) -> ExitCode {
    match fuzz::run(minutes, engine) {
        Ok(()) => ExitCode::SUCCESS,
        Err(found) => {
            eprintln!("{found}");
            ExitCode::FAILURE
        }
    }
}

fn sim(args: &[String]) -> ExitCode {
    let mut cargo = vec!["run", "--quiet", "--release", "--locked", "--package", "anabranch-sim"];
    let mutates = args.iter().any(|arg| arg == "--mutate");
    cargo.extend([
        "--example",
        "sim",
        "--features",
        if mutates { "fast,marks,mutations" } else { "fast,marks" },
        "--",
    ]);
    let status = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(cargo)
        .args(args)
        .status();
    match status.map(|status| status.code()) {
        Ok(Some(0)) => ExitCode::SUCCESS,
        Ok(code) => ExitCode::from(code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1)),
        Err(error) => {
            eprintln!("cargo can't be run: {error}");
            ExitCode::FAILURE
        }
    }
}
