//! `store`: the upkeep of what devices and relays keep on disk.

use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anabranch::store::{
    BackupReport, CompactOptions, CompactStep, Encryption, Kept, StorageFigures, StoreError, Upkeep, compact,
    peek, rekey, restore,
};
use anabranch::{BackendKind, StoreKey, StoreOptions};
use anabranch_relay::{KeySource, RelayOptions};
use serde_json::{Value as Json, json};
use tokio::time::Instant;

use crate::args::{DataCommand, Global, NewPassphrase, StoreArgs, StoreCommand, StoreTask};
use crate::config::{Device, DeviceDir, read_passphrase};
use crate::failure::{Category, Failure};
use crate::output::Output;
use crate::owner::{self, Forwarded, Request};
use crate::secret::{new_passphrase, typed};

/// How long to wait for another command that has the store open.
const IN_USE_WAIT: Duration = Duration::from_secs(10);
/// How often progress is shown.
const PROGRESS_PERIOD: Duration = Duration::from_millis(100);
/// Files of a device's or relay's directory that belong into a backup, where there are any.
const FILES: [&str; 4] = ["device.key", "anabranch.toml", "schema.toml", "relay.key"];
/// A relay's keys by which it knows tokens.
const ISSUERS: &str = "issuers";

pub(crate) async fn store(global: Global, args: StoreArgs, output: &mut Output) -> Result<(), Failure> {
    let dir = DeviceDir::new(&global)?;
    let place = Place { store: dir.root().join("store"), dir, relay_config: args.config };
    match args.command {
        StoreCommand::Stats => place.online(&global, StoreTask::Stats, output).await,
        StoreCommand::Verify { mend } if place.dir.is_configured() => {
            super::data(global, DataCommand::Store(StoreTask::Verify { mend }), output).await
        }
        StoreCommand::Verify { mend } => place.online(&global, StoreTask::Verify { mend }, output).await,
        StoreCommand::Backup { to } => {
            // The owner of the directory may work in another one.
            let to = std::path::absolute(&to).map_err(|error| Failure::storage("find", &to, &error))?;
            place.online(&global, StoreTask::Backup { to }, output).await
        }
        StoreCommand::Restore { from, backend } => place.restore(from, backend, output).await,
        StoreCommand::Compact { backend, encrypt, decrypt, new } => {
            place.compact(backend, encrypt, decrypt, &new, output).await
        }
        StoreCommand::Rekey { new } => place.rekey(&new, output).await,
    }
}

/// The directory of a device or a relay, and the store in it.
struct Place {
    dir: DeviceDir,
    store: PathBuf,
    relay_config: Option<PathBuf>,
}

impl Place {
    /// How the store is kept.
    fn kept(&self) -> Result<Kept, Failure> {
        peek(&self.store)?.ok_or_else(|| {
            let message = format!("{} holds no store", self.dir.root().display());
            Failure::usage("no_store", message).help("give the directory of a device or a relay with --data")
        })
    }

    /// What opens the store as it is.
    fn options(&self) -> Result<StoreOptions, Failure> {
        let options = StoreOptions::default();
        Ok(match self.kept()?.encrypted {
            true => options.encryption(self.key()?),
            false => options,
        })
    }

    /// The key of the store: as it is given, as the configuration says, or as it is typed.
    fn key(&self) -> Result<StoreKey, Failure> {
        if let Some(key) = self.dir.given_key()? {
            return Ok(key);
        }
        if self.dir.is_configured()
            && let Some(path) = self.dir.config()?.passphrase_file
        {
            return read_passphrase(&path);
        }
        let mut relay = RelayOptions::dev().data(self.dir.root());
        relay.config = self.relay_config.clone();
        if let Some(key) = relay.resolve()?.store_key.as_ref().map(KeySource::read).transpose()? {
            return Ok(key);
        }
        typed("Passphrase: ")?.ok_or_else(|| {
            let message = format!("{} is encrypted, and no passphrase was given", self.dir.root().display());
            Failure::usage("key_needed", message)
                .help("give --passphrase-file FILE, or set ANABRANCH_PASSPHRASE")
        })
    }

    /// Does what can be done while the store is in use: by the process that owns it, if there is
    /// one.
    async fn online(&self, global: &Global, task: StoreTask, output: &mut Output) -> Result<(), Failure> {
        let deadline = Instant::now() + IN_USE_WAIT;
        let mut options = None;
        let upkeep = loop {
            if let Some(stream) = owner::connect(self.dir.root()).await {
                let request = Request::new(global.json, 0, None, DataCommand::Store(task.clone()));
                match owner::forward(stream, &request, output).await? {
                    Forwarded::Done => return Ok(()),
                    // It ended before it did anything.
                    Forwarded::NotTaken | Forwarded::Leaving => {}
                }
            }
            let options = match &options {
                Some(options) => options,
                None => options.insert(self.options()?),
            };
            let (dir, options) = (self.store.clone(), StoreOptions::clone(options));
            match blocking(move || Upkeep::open(dir, options)).await? {
                Err(StoreError::InUse { .. }) if Instant::now() < deadline => {}
                opened => break opened?,
            }
        };
        let result = carry_out(upkeep.clone(), self.dir.root(), task, output).await;
        let closed = blocking(move || upkeep.close()).await?;
        result.and(Ok(closed?))
    }

    async fn restore(
        &self,
        from: PathBuf,
        backend: Option<BackendKind>,
        output: &mut Output,
    ) -> Result<(), Failure> {
        let root = self.dir.root().to_owned();
        let to = root.clone();
        let report = with_progress(output, move |progress| {
            restore(from, to, backend, &mut |done, total| progress.set(done, total))
        })
        .await??;
        if self.dir.is_configured() && backend.is_some() {
            self.dir.set(&[("backend", backend.map(|kind| kind.name().into()))])?;
        }
        let text = format!("{} was made of the backup: {}", root.display(), in_words(&report));
        let mut object = report_json(&report);
        object["data"] = json!(root.display().to_string());
        output.result(object, text).await
    }

    async fn compact(
        &self,
        backend: Option<BackendKind>,
        encrypt: bool,
        decrypt: bool,
        new: &NewPassphrase,
        output: &mut Output,
    ) -> Result<(), Failure> {
        let options = self.options()?;
        let mut target = CompactOptions::default();
        target.backend = backend;
        if encrypt {
            target = target.encryption(Encryption::Key(new_passphrase(new.new_passphrase_file.as_deref())?));
        } else if decrypt {
            target = target.encryption(Encryption::Plain);
        }
        let configured = self.dir.is_configured();
        if configured && backend.is_some() {
            // If this is interrupted, the configuration fits the store before and after.
            self.dir.set(&[("backend", None)])?;
        }
        let dir = self.store.clone();
        let report = with_progress(output, move |progress| {
            compact(dir, options, &target, &mut |step| match step {
                CompactStep::Copied(done) => progress.set(done, 0),
                CompactStep::Compared(done, total) => progress.set(done, total),
                _ => {}
            })
        })
        .await??;
        if configured {
            let mut lines = Vec::new();
            if backend.is_some() {
                lines.push(("backend", Some(report.backend.name().into())));
            }
            if encrypt {
                lines.push(("encrypted", Some(true.into())));
                lines.push(("passphrase_file", remembered(new)?));
            } else if decrypt {
                lines.push(("encrypted", None));
                lines.push(("passphrase_file", None));
            }
            if !lines.is_empty() {
                self.dir.set(&lines)?;
            }
        }
        let object = json!({
            "backend": report.backend.name(),
            "encrypted": report.encrypted,
            "entries": report.entries,
            "bytes_before": report.bytes_before,
            "bytes_after": report.bytes_after,
        });
        let text = format!(
            "{} entries, {} before and {} now; kept by {}, {}",
            report.entries,
            size(report.bytes_before),
            size(report.bytes_after),
            report.backend,
            if report.encrypted { "encrypted" } else { "not encrypted" },
        );
        output.result(object, text).await
    }

    async fn rekey(&self, new: &NewPassphrase, output: &mut Output) -> Result<(), Failure> {
        if !self.kept()?.encrypted {
            let message = format!("{} is not encrypted", self.dir.root().display());
            return Err(
                Failure::usage("not_encrypted", message).help("`store compact --encrypt` encrypts it")
            );
        }
        let (old, key) = (self.key()?, new_passphrase(new.new_passphrase_file.as_deref())?);
        let dir = self.store.clone();
        blocking(move || rekey(dir, &old, &key)).await??;
        if self.dir.is_configured() {
            self.dir.set(&[("passphrase_file", remembered(new)?)])?;
        }
        let text = "the store has another passphrase; backups made before open with the old one";
        output.result(json!({ "rekeyed": true }), text).await
    }
}

/// The name of the new passphrase's file, as a configuration remembers it.
fn remembered(new: &NewPassphrase) -> Result<Option<toml_edit::Value>, Failure> {
    let Some(path) = &new.new_passphrase_file else { return Ok(None) };
    let path = path.canonicalize().map_err(|error| Failure::storage("find", path, &error))?;
    Ok(Some(path.display().to_string().into()))
}

/// Does what can be done while the store is in use, in the process that has it open.
pub(crate) async fn carry_out(
    upkeep: Upkeep,
    root: &Path,
    task: StoreTask,
    output: &mut Output,
) -> Result<(), Failure> {
    match task {
        StoreTask::Stats => {
            let figures = blocking(move || upkeep.figures()).await??;
            output.result(figures_json(&figures), figures_text(&figures)).await
        }
        StoreTask::Verify { mend: true } => {
            Err(Failure::usage("not_a_device", "a relay's store can't be mended").help(
                "devices that sync bring a relay what it lost, after it was restored or with --new-epoch",
            ))
        }
        StoreTask::Verify { mend: false } => verify_relay(upkeep, output).await,
        StoreTask::Backup { to } => {
            let files = files(root)?;
            let target = to.clone();
            let report = with_progress(output, move |progress| {
                upkeep.backup(&target, &files, &mut |done| progress.set(done, 0))
            })
            .await??;
            let text =
                format!("{} holds {}; it is as secret as the directory", to.display(), in_words(&report));
            let mut object = report_json(&report);
            object["backup"] = json!(to.display().to_string());
            output.result(object, text).await
        }
    }
}

/// What belongs into a backup beside the store.
fn files(root: &Path) -> Result<Vec<(PathBuf, PathBuf)>, Failure> {
    let mut names: Vec<PathBuf> =
        FILES.iter().map(PathBuf::from).filter(|name| root.join(name).is_file()).collect();
    let issuers = root.join(ISSUERS);
    if issuers.is_dir() {
        let failed = |error| Failure::storage("read", &issuers, &error);
        for entry in std::fs::read_dir(&issuers).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            if entry.path().is_file() {
                names.push(Path::new(ISSUERS).join(entry.file_name()));
            }
        }
    }
    names.sort();
    Ok(names.into_iter().map(|name| (name.clone(), root.join(name))).collect())
}

fn report_json(report: &BackupReport) -> Json {
    json!({
        "backend": report.backend.name(),
        "encrypted": report.encrypted,
        "commit": report.commit,
        "entries": report.entries,
        "bytes": report.bytes,
        "files": report.files.iter().map(|file| file.display().to_string()).collect::<Vec<_>>(),
    })
}

fn in_words(report: &BackupReport) -> String {
    let files: Vec<String> = report.files.iter().map(|file| file.display().to_string()).collect();
    let with = if files.is_empty() { String::new() } else { format!(", and {}", files.join(", ")) };
    format!("{} entries, {}{with}", report.entries, size(report.bytes))
}

fn figures_json(figures: &StorageFigures) -> Json {
    let kinds = figures
        .kinds
        .iter()
        .map(|one| (one.kind.name().to_owned(), json!({ "entries": one.entries, "bytes": one.bytes })));
    json!({
        "backend": figures.backend.name(),
        "encrypted": figures.encrypted,
        "format": figures.format,
        "disk_bytes": figures.disk_bytes,
        "live_bytes": figures.live_bytes,
        "kinds": kinds.collect::<serde_json::Map<_, _>>(),
    })
}

fn figures_text(figures: &StorageFigures) -> String {
    let mut text = format!(
        "{}, format {}, {}: {} on disk, {} live",
        figures.backend,
        figures.format,
        if figures.encrypted { "encrypted" } else { "not encrypted" },
        size(figures.disk_bytes),
        size(figures.live_bytes),
    );
    for one in &figures.kinds {
        text.push_str(&format!("\n{:<14}{:>12}  {:>10}", one.kind.name(), one.entries, size(one.bytes)));
    }
    text
}

fn size(bytes: u64) -> String {
    indicatif::HumanBytes(bytes).to_string()
}

/// How far a thread is that works for a command.
#[derive(Clone, Default)]
struct Progress(Arc<(AtomicU64, AtomicU64)>);

impl Progress {
    /// `total` is 0 where it is not known.
    fn set(&self, done: u64, total: u64) {
        self.0.0.store(done, Ordering::Relaxed);
        self.0.1.store(total, Ordering::Relaxed);
    }
}

/// Does what blocks, and shows meanwhile how far it is.
/// Looks at everything that a device holds.
pub(crate) async fn verify_device(device: &Device, mend: bool, output: &mut Output) -> Result<(), Failure> {
    let upkeep = device.engine.upkeep();
    blocking(move || upkeep.verify()).await??;
    let mut seen = 0;
    let (report, mut reports) = tokio::sync::watch::channel(0);
    let mut looking = pin!(device.workspace.verify(mend, |entries| {
        report.send_replace(entries);
    }));
    let found = loop {
        tokio::select! {
            found = &mut looking => break found?,
            Ok(()) = reports.changed() => {
                seen = seen.max(*reports.borrow_and_update());
                output.progress(seen, 0, false).await?;
            }
        }
    };
    output.progress(1, 1, false).await?;
    let faults = found.faults.iter().map(|fault| {
        let entity = fault.entity.as_ref();
        json!({
            "type": entity.map(|key| key.type_name()),
            "id": entity.map(|key| key.id()),
            "what": fault.what,
            "mended": fault.mended,
        })
    });
    let lines = found.faults.iter().map(|fault| match &fault.entity {
        Some(entity) => format!("{entity}: {}", fault.what),
        None => fault.what.clone(),
    });
    tell_faults(found.entries, faults.collect(), lines.collect(), mend, output).await
}

/// Looks at everything that a relay holds.
async fn verify_relay(upkeep: Upkeep, output: &mut Output) -> Result<(), Failure> {
    let look = move |progress: &Progress| anabranch_relay::verify(&upkeep, &mut |seen| progress.set(seen, 0));
    let found = with_progress(output, look).await??;
    let objects =
        found.faults.iter().map(|(workspace, what)| json!({ "workspace": workspace, "what": what }));
    let lines = found.faults.iter().map(|(workspace, what)| format!("{workspace}: {what}"));
    tell_faults(found.entries, objects.collect(), lines.collect(), false, output).await
}

async fn tell_faults(
    entries: u64,
    faults: Vec<Json>,
    lines: Vec<String>,
    mended: bool,
    output: &mut Output,
) -> Result<(), Failure> {
    let count = faults.len();
    let text = match count {
        0 => format!("{entries} entries, all good"),
        _ => lines.join("\n"),
    };
    output.result(json!({ "entries": entries, "faults": faults }), text).await?;
    if count == 0 || mended {
        return Ok(());
    }
    let message = format!("{count} faults in what is stored");
    Err(Failure::new(Category::Storage, "faults", message)
        .help("on a device `store verify --mend` and a sync; a relay is restored from a backup, and devices that sync bring the rest"))
}

async fn with_progress<T: Send + 'static>(
    output: &mut Output,
    work: impl FnOnce(&Progress) -> T + Send + 'static,
) -> Result<T, Failure> {
    let progress = Progress::default();
    let reports = progress.clone();
    let mut work = tokio::task::spawn_blocking(move || work(&reports));
    let mut period = tokio::time::interval(PROGRESS_PERIOD);
    let result = loop {
        tokio::select! {
            done = &mut work => break done,
            _ = period.tick() => {
                let (done, total) = (progress.0.0.load(Ordering::Relaxed), progress.0.1.load(Ordering::Relaxed));
                output.progress(done, total, false).await?;
            }
        }
    };
    // The bar goes.
    output.progress(1, 1, false).await?;
    result.map_err(|error| Failure::internal(error.to_string()))
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Failure> {
    tokio::task::spawn_blocking(work).await.map_err(|error| Failure::internal(error.to_string()))
}
