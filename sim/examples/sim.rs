//! What `cargo xtask sim` runs: see the chapter on testing in `docs/`.

use std::collections::{BTreeMap, BTreeSet};
use std::process::{Command, ExitCode};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use anabranch_sim::{Fault, Options, Outcome, Report, classes, keep_panics, minimise, run};

/// Runs are made of small allocations.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const USAGE: &str = "\
usage: cargo xtask sim [--seeds A..B] [--minutes M] [--devices N] [--steps N]
           [--faults a,b | --without a,b] [--only STEPS] [--absent DEVICES]
           [--fast] [--jobs N] [--demand N] [--coverage]
           [--trace] [--no-minimise] [--mutate NAME|all]

Runs the seeds A to B (B not included), or as many from A on as M minutes allow, and holds each to
the reference model. A seed that fails is made small, and printed with the command that runs it
again. With --fast documents have light bodies, so that thousands of devices fit. --jobs says how many
seeds are run side by side; as many as there are cores unless given.
With --demand a run fails if it injected a class of faults less often than that, with --coverage if it
missed a branch of the policies, the status or the sessions. --mutate builds a known fault in and reports
how many seeds it takes to see it.";
/// Runs that making a plan small may take, and how long.
const MINIMISE_RUNS: usize = 400;
const MINIMISE_TIME: Duration = Duration::from_secs(10 * 60);
/// Seeds within which a known fault must be seen.
#[cfg(feature = "mutations")]
const MUTATION_SEEDS: u64 = 400;

struct Args {
    seeds: std::ops::Range<u64>,
    minutes: Option<u64>,
    options: Options,
    minimise: bool,
    jobs: usize,
    demand: u64,
    coverage: bool,
    mutate: Option<String>,
}

fn main() -> ExitCode {
    let args = match parse(std::env::args().skip(1)) {
        Ok(args) => args,
        Err(wrong) => {
            eprintln!("{wrong}\n\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    keep_panics();
    match &args.mutate {
        Some(name) => mutate(name, &args),
        None => simulate(&args),
    }
}

fn simulate(args: &Args) -> ExitCode {
    let started = Instant::now();
    let deadline = args.minutes.map(|minutes| started + Duration::from_secs(60 * minutes));
    let (mut total, mut failed) = (Report::default(), 0u64);
    runs(args, deadline, |outcome| {
        print!("{}", outcome.trace);
        total.add(&outcome.report);
        if !outcome.wrong.is_empty() {
            failed += 1;
            report_failure(&outcome, args);
        }
    });
    print!("{total}");
    let met = demand(&total, args.demand) && coverage(&total, args.coverage);
    let (seconds, busy) = (started.elapsed().as_secs_f64(), busy_seconds());
    println!(
        "{} runs in {seconds:.0} s, {:.1} core-minutes, {failed} with violations; per core-minute:",
        total.get("runs"),
        busy / 60.0
    );
    let crashes = total.get("crash") + total.get("torn") + total.get("crash-relay");
    for (what, times) in [
        ("admitted changes", total.get("admitted changes")),
        ("syncs", total.get("syncs")),
        ("crashes", crashes),
        ("faults", total.all_faults()),
        ("events", total.get("events")),
    ] {
        println!("  {what} {:.0}", times as f64 * 60.0 / busy);
    }
    if failed == 0 && met { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Time that all cores spent on this process. On a machine that others use too, it says more than
/// the time that passed.
fn busy_seconds() -> f64 {
    let spent = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    spent.tv_sec as f64 + spent.tv_nsec as f64 / 1e9
}

/// Whether every branch was reached that a simulation can reach; prints all of them.
#[cfg(feature = "marks")]
fn coverage(total: &Report, wanted: bool) -> bool {
    use anabranch_core::reached::Mark;
    if !wanted {
        return true;
    }
    let times = |mark: &Mark| total.reached.get(mark.what()).copied().unwrap_or_default();
    println!("branches of the policies, the status and the sessions:");
    for mark in Mark::ALL {
        let note = match (times(mark), mark.elsewhere()) {
            (0, Some(test)) => format!(" (reached by {test})"),
            (0, None) => " NOT REACHED".into(),
            _ => String::new(),
        };
        println!("  {:>12} {}{note}", times(mark), mark.what());
    }
    let missed = Mark::ALL.iter().filter(|mark| times(mark) == 0 && mark.elsewhere().is_none()).count();
    let reached = Mark::ALL.iter().filter(|mark| times(mark) > 0).count();
    println!("{reached} of {} reached, {missed} missed", Mark::ALL.len());
    missed == 0
}

#[cfg(not(feature = "marks"))]
fn coverage(_: &Report, wanted: bool) -> bool {
    if wanted {
        println!("built without the feature `marks`: use cargo xtask sim --coverage");
    }
    !wanted
}

/// Whether each class of faults was injected often enough; names those that were not.
fn demand(total: &Report, least: u64) -> bool {
    let times = |class: &str| total.faults.get(class).copied().unwrap_or_default();
    let rare: Vec<String> = classes()
        .into_iter()
        .filter(|class| times(class) < least)
        .map(|class| format!("{class} ({})", times(class)))
        .collect();
    if !rare.is_empty() {
        println!("fewer than {least}: {}", rare.join(", "));
    }
    rare.is_empty()
}

/// Runs seeds side by side and hands over what came of them in the order of the seeds.
fn runs(args: &Args, deadline: Option<Instant>, mut done: impl FnMut(Outcome)) {
    // A seed is begun when it is not too far ahead of the last one that was handed over, so that
    // little waits for its turn.
    let ahead = 16 * args.jobs as u64;
    let next = AtomicU64::new(args.seeds.start);
    let (handed, moved) = (Mutex::new(args.seeds.start), Condvar::new());
    let (tell, hear) = mpsc::sync_channel::<Outcome>(args.jobs);
    std::thread::scope(|scope| {
        for _ in 0..args.jobs {
            let (next, handed, moved, tell) = (&next, &handed, &moved, tell.clone());
            scope.spawn(move || {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    let late = || deadline.is_some_and(|deadline| Instant::now() >= deadline);
                    if seed >= args.seeds.end || late() {
                        return;
                    }
                    let mut handed = handed.lock().unwrap_or_else(PoisonError::into_inner);
                    while seed >= handed.saturating_add(ahead) {
                        handed = moved.wait(handed).unwrap_or_else(PoisonError::into_inner);
                    }
                    drop(handed);
                    if tell.send(run(seed, &args.options)).is_err() {
                        return;
                    }
                }
            });
        }
        drop(tell);
        let mut waiting: BTreeMap<u64, Outcome> = BTreeMap::new();
        let mut expected = args.seeds.start;
        for outcome in hear {
            waiting.insert(outcome.seed, outcome);
            while let Some(outcome) = waiting.remove(&expected) {
                done(outcome);
                expected += 1;
                *handed.lock().unwrap_or_else(PoisonError::into_inner) = expected;
                moved.notify_all();
            }
        }
        // At the end of the time a seed may be left out before one that was run.
        waiting.into_values().for_each(done);
    });
}

fn report_failure(outcome: &Outcome, args: &Args) {
    let Outcome { seed, devices, steps, wrong, .. } = outcome;
    println!("\nseed {seed} ({devices} devices, {steps} steps) at commit {}:", commit());
    for wrong in wrong.iter().take(5) {
        println!("  {}", wrong.chars().take(1_000).collect::<String>());
    }
    println!("  replay: {}", command(*seed, &args.options));
    if args.minimise {
        let small = minimise(*seed, &args.options, MINIMISE_RUNS, MINIMISE_TIME);
        println!("  short:  {}", command(*seed, &small));
        for wrong in run(*seed, &small).wrong.iter().take(2) {
            println!("    {}", wrong.chars().take(1_000).collect::<String>());
        }
    }
}

/// The command that runs a seed again, to the same byte.
fn command(seed: u64, options: &Options) -> String {
    let mut text = format!("cargo xtask sim --seeds {seed}..{} --no-minimise --trace", seed + 1);
    let list =
        |numbers: &BTreeSet<usize>| numbers.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    for (name, number) in [("devices", options.devices), ("steps", options.steps)] {
        if let Some(number) = number {
            text += &format!(" --{name} {number}");
        }
    }
    if options.fast {
        text += " --fast";
    }
    if options.faults != Fault::usual() {
        let names: Vec<&str> = options.faults.iter().map(|fault| fault.name()).collect();
        text += &format!(" --faults '{}'", names.join(","));
    }
    if !options.absent.is_empty() {
        text += &format!(" --absent {}", list(&options.absent));
    }
    if let Some(only) = &options.only {
        text += &format!(" --only '{}'", list(only));
    }
    text
}

fn commit() -> String {
    let git = |args: &[&str]| {
        let output = Command::new("git").args(args).output().ok()?;
        Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let hash = git(&["rev-parse", "--short", "HEAD"]).unwrap_or_default();
    let changed =
        git(&["status", "--porcelain", "--untracked-files=no"]).is_some_and(|text| !text.is_empty());
    if changed { format!("{hash} with local changes") } else { hash }
}

#[cfg(not(feature = "mutations"))]
fn mutate(_: &str, _: &Args) -> ExitCode {
    eprintln!("built without the feature `mutations`: use cargo xtask sim --mutate");
    ExitCode::from(2)
}

#[cfg(feature = "mutations")]
fn mutate(name: &str, args: &Args) -> ExitCode {
    use anabranch_core::mutation::{self, Mutation};
    let mut missed = 0;
    for mutation in Mutation::ALL {
        let told = format!("{mutation:?}");
        if name != "all" && !told.eq_ignore_ascii_case(name) {
            continue;
        }
        mutation::set(Some(mutation));
        let first = args.seeds.start;
        let found = (first..first + MUTATION_SEEDS).map(|seed| run(seed, &args.options));
        let found = found.into_iter().find(|outcome| !outcome.wrong.is_empty());
        mutation::set(None);
        if let Some(Outcome { seed, .. }) = found
            && !run(seed, &args.options).wrong.is_empty()
        {
            missed += 1;
            println!("{told}: seed {seed} fails without it too, which says nothing");
            continue;
        }
        match found {
            Some(outcome) => {
                let seeds = outcome.seed - first + 1;
                let wrong: String = outcome.wrong[0].chars().take(160).collect();
                println!("{told}: seen after {seeds} seeds: {wrong}");
            }
            None => {
                missed += 1;
                println!("{told}: NOT SEEN in {MUTATION_SEEDS} seeds");
            }
        }
    }
    if missed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn parse(mut args: impl Iterator<Item = String>) -> Result<Args, String> {
    let mut parsed = Args {
        seeds: 0..100,
        minutes: None,
        options: Options::default(),
        minimise: true,
        jobs: std::thread::available_parallelism().map_or(1, usize::from),
        demand: 0,
        coverage: false,
        mutate: None,
    };
    let mut ends = None;
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or_else(|| format!("{arg} needs a value"));
        match arg.as_str() {
            "--seeds" => {
                let text = value()?;
                let (first, end) = text.split_once("..").ok_or("--seeds needs A..B")?;
                let first = number(first)?;
                ends = Some(if end.is_empty() { u64::MAX } else { number(end)? });
                parsed.seeds = first..u64::MAX;
            }
            "--minutes" => parsed.minutes = Some(number(&value()?)?),
            "--devices" => parsed.options.devices = Some(number(&value()?)? as usize),
            "--steps" => parsed.options.steps = Some(number(&value()?)? as usize),
            "--faults" => parsed.options.faults = faults(&value()?)?,
            "--without" => {
                let without = faults(&value()?)?;
                parsed.options.faults.retain(|fault| !without.contains(fault));
            }
            "--only" => parsed.options.only = Some(numbers(&value()?)?),
            "--absent" => parsed.options.absent = numbers(&value()?)?,
            "--fast" if cfg!(feature = "fast") => parsed.options.fast = true,
            "--fast" => return Err("built without the feature `fast`: use cargo xtask sim --fast".into()),
            "--trace" => parsed.options.trace = true,
            "--jobs" => parsed.jobs = (number(&value()?)? as usize).max(1),
            "--demand" => parsed.demand = number(&value()?)?,
            "--coverage" => parsed.coverage = true,
            "--no-minimise" => parsed.minimise = false,
            "--mutate" => parsed.mutate = Some(value()?),
            other => return Err(format!("{other:?} is no option")),
        }
    }
    // With a time limit alone there is no last seed.
    parsed.seeds.end = match (ends, parsed.minutes) {
        (Some(end), _) => end,
        (None, Some(_)) => u64::MAX,
        (None, None) => 100,
    };
    Ok(parsed)
}

fn number(text: &str) -> Result<u64, String> {
    text.parse().map_err(|_| format!("{text:?} is no number"))
}

fn numbers(text: &str) -> Result<BTreeSet<usize>, String> {
    text.split(',').filter(|part| !part.is_empty()).map(|part| number(part).map(|n| n as usize)).collect()
}

fn faults(text: &str) -> Result<BTreeSet<Fault>, String> {
    let known = || Fault::ALL.map(Fault::name).join(", ");
    let names = text.split(',').filter(|name| !name.is_empty());
    names
        .map(|name| Fault::from_name(name).ok_or_else(|| format!("{name:?} is none of {}", known())))
        .collect()
}
