//! Chores of the workspace, each a cargo command with the right profile and features.

mod fuzz;

use std::process::{Command, ExitCode};

const USAGE: &str = "\
usage: cargo xtask sim [OPTIONS]           simulate the whole system; cargo xtask sim --help says more
       cargo xtask fuzz [--minutes M] [--jobs N] [--no-libfuzzer]
           run all fuzz targets in M minutes, 14 unless given, N side by side, one unless given; each
           gets the same time, so 14 targets in pairs get M/7 minutes; without libFuzzer they run in a
           mutation loop that knows nothing of coverage, and that is soon built";

/// A minute for each target.
const FUZZ_MINUTES: u64 = 14;

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    match args.next().as_deref() {
        Some("sim") => sim(&args.collect::<Vec<String>>()),
        Some("fuzz") => match fuzz_options(args) {
            Some((minutes, jobs, engine)) => fuzz(minutes, jobs, engine),
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

fn fuzz_options(mut args: impl Iterator<Item = String>) -> Option<(u64, usize, Option<fuzz::Engine>)> {
    let (mut minutes, mut jobs, mut engine) = (FUZZ_MINUTES, 1, None);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--minutes" => minutes = args.next()?.parse().ok().filter(|minutes| *minutes > 0)?,
            "--jobs" => jobs = args.next()?.parse().ok().filter(|jobs| *jobs > 0)?,
            "--no-libfuzzer" => engine = Some(fuzz::Engine::Loop),
            _ => return None,
        }
    }
    Some((minutes, jobs, engine))
}

fn fuzz(minutes: u64, jobs: usize, engine: Option<fuzz::Engine>) -> ExitCode {
    match fuzz::run(minutes, jobs, engine) {
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
