//! `cargo xtask fuzz --minutes M`: all fuzz targets, some side by side.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;

/// Longest input that libFuzzer makes.
const INPUT_BYTES_MAX: u32 = 8192;
/// What one input may take.
const INPUT_SECONDS_MAX: u32 = 30;
const MEMORY_MIB_MAX: u32 = 3000;

/// Runs every target by `engine`, `jobs` at a time; the targets share `minutes` evenly. Where none is asked for, it is libFuzzer if
/// cargo-fuzz and a C++ compiler are there; if not, it says what is missing and takes the built-in
/// mutation loop.
///
/// # Errors
/// Which targets found something, and where the inputs are; or what could not be started.
pub(crate) fn run(minutes: u64, jobs: usize, engine: Option<Engine>) -> Result<(), String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let targets = targets(&root)?;
    let seconds = (minutes * 60 * jobs as u64 / targets.len() as u64).max(1);
    let engine = engine.unwrap_or_else(|| best(&root));
    let logs = root.join("target/fuzz");
    for target in &targets {
        let kept = logs.join("corpus").join(target);
        std::fs::create_dir_all(&kept).map_err(|error| format!("{}: {error}", kept.display()))?;
    }
    let (open, found) = (Mutex::new(targets.iter()), Mutex::new(Vec::new()));
    let next = || open.lock().ok()?.next();
    let work = || {
        while let Some(target) = next() {
            let log = logs.join(format!("{target}.log"));
            println!("{target}: {seconds} s, told in {}", log.display());
            if let Err(wrong) = one(engine.command(&root, target, seconds), &log)
                && let Ok(mut found) = found.lock()
            {
                found.push(format!("{target} ({wrong})"));
            }
        }
    };
    std::thread::scope(|scope| (0..jobs).for_each(|_| drop(scope.spawn(work))));
    let found = found.into_inner().unwrap_or_default();
    if found.is_empty() {
        println!("{} targets, {seconds} s each, nothing found", targets.len());
        return Ok(());
    }
    Err(format!(
        "found something: {}. The inputs are in fuzz/artifacts; keep each in fuzz/found/TARGET under a name \
         that says what it is, where every test run goes through it",
        found.join(", ")
    ))
}

/// Runs one target; what it tells goes into a file.
fn one(mut command: Command, log: &Path) -> Result<(), String> {
    let told = File::create(log).and_then(|file| Ok((file.try_clone()?, file)));
    let (out, err) = told.map_err(|error| format!("{}: {error}", log.display()))?;
    let status = command.stdin(Stdio::null()).stdout(out).stderr(err).status();
    match status.map_err(|error| error.to_string())? {
        status if status.success() => Ok(()),
        status => Err(format!("{status}, see {}", log.display())),
    }
}

/// What makes the inputs.
pub(crate) enum Engine {
    /// Guided by coverage.
    LibFuzzer,
    /// Blind, and built by cargo alone.
    Loop,
}

fn best(root: &Path) -> Engine {
    match build(root) {
        Ok(()) => Engine::LibFuzzer,
        Err(missing) => {
            println!("libFuzzer can't be had here: {missing}");
            println!("instead runs the built-in mutation loop, which knows nothing of coverage");
            Engine::Loop
        }
    }
}

impl Engine {
    fn command(&self, root: &Path, target: &str, seconds: u64) -> Command {
        match self {
            Engine::LibFuzzer => {
                let mut command = cargo_fuzz(root);
                command.args(["run", "--sanitizer", "none", target]);
                // What it finds worth keeping goes into the first folder, so that the corpus stays as it is made.
                let corpora = ["target/fuzz/corpus", "fuzz/corpus", "fuzz/found"];
                let corpora = corpora.map(|folder| root.join(folder).join(target));
                command.args(corpora.iter().filter(|corpus| corpus.is_dir()));
                command.arg("--").args([
                    format!("-max_total_time={seconds}"),
                    format!("-timeout={INPUT_SECONDS_MAX}"),
                    format!("-rss_limit_mb={MEMORY_MIB_MAX}"),
                    format!("-max_len={INPUT_BYTES_MAX}"),
                ]);
                command
            }
            Engine::Loop => {
                let mut command = cargo(root);
                command.args(["run", "--quiet", "--release", "--package", "anabranch-fuzz-targets"]);
                command.args(["--example", "mutate", "--", target, &seconds.to_string()]);
                command
            }
        }
    }
}

/// Builds all targets; or says what is missing for it.
fn build(root: &Path) -> Result<(), String> {
    let installed = cargo_fuzz(root).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    if !installed.is_ok_and(|status| status.success()) {
        return Err("cargo-fuzz is not installed; `cargo install cargo-fuzz` does it".into());
    }
    let built = cargo_fuzz(root).args(["build", "--sanitizer", "none"]).status();
    match built {
        Ok(status) if status.success() => Ok(()),
        _ => Err("the targets can't be built with it (see above); it needs a C++ compiler".into()),
    }
}

fn targets(root: &Path) -> Result<Vec<String>, String> {
    let folder = root.join("fuzz/fuzz_targets");
    let entries = std::fs::read_dir(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    let paths = entries.flatten().map(|entry| entry.path());
    let mut names: Vec<String> =
        paths.filter_map(|path: PathBuf| Some(path.file_stem()?.to_str()?.to_owned())).collect();
    names.sort();
    match names.is_empty() {
        true => Err(format!("{} has no targets", folder.display())),
        false => Ok(names),
    }
}

fn cargo(root: &Path) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root);
    command
}

fn cargo_fuzz(root: &Path) -> Command {
    let mut command = cargo(root);
    // Coverage is a flag of the compiler that is not stable yet.
    command.arg("fuzz").env("RUSTC_BOOTSTRAP", "1");
    command
}
