//! Chores of the workspace, each a cargo command with the right profile and features.

use std::process::{Command, ExitCode};

const USAGE: &str = "\
usage: cargo xtask sim [OPTIONS]    simulate the whole system; cargo xtask sim --help says more";

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    match args.next().as_deref() {
        Some("sim") => sim(&args.collect::<Vec<String>>()),
        _ => {
            eprintln!("{USAGE}");
            ExitCode::from(2)
        }
    }
}

fn sim(args: &[String]) -> ExitCode {
    let mut cargo = vec!["run", "--quiet", "--release", "--locked", "--package", "anabranch-sim"];
    cargo.extend(["--example", "sim"]);
    if args.iter().any(|arg| arg == "--mutate") {
        cargo.extend(["--features", "mutations"]);
    }
    cargo.push("--");
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
