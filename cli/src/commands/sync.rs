//! `sync`, `status` and `watch`.

use std::pin::pin;
use std::time::Duration;

use anabranch::{ChangeEvent, SyncOutcome, SyncReport, Workspace, WorkspaceStatus};
use serde_json::{Value as Json, json};
use tokio::signal::unix::{SignalKind, signal};

use super::read::record_json;
use crate::args::{DataCommand, Global};
use crate::config::{DeviceDir, Opened};
use crate::failure::{Category, Failure};
use crate::output::Output;
use crate::owner::{self, Forwarded, Listener, Owner, Parting, Request};

/// How often `watch` looks whether its own state changed.
const STATE_PERIOD: Duration = Duration::from_millis(200);

/// How often figures are asked for, 2 ms apart.
const FIGURES_TRIES: u32 = 500;

pub(crate) async fn sync(
    workspace: &Workspace,
    deadline_ms: u64,
    output: &mut Output,
) -> Result<(), Failure> {
    let (outcome, sent, received, pending, refused, lacking, digest, error) =
        match workspace.sync(Duration::from_millis(deadline_ms)).await {
            Ok(report) => {
                let SyncReport { outcome, sent, received, pending, refused, lacking, digest, error, .. } =
                    report;
                (outcome, sent, received, pending, refused, lacking, digest, error)
            }
            // Without a relay a device is offline for good, which loses nothing either.
            Err(error) if error.code() == "no_relay" => {
                let status = figures(workspace).await;
                let WorkspaceStatus { pending, refused, lacking, digest, .. } = status;
                (SyncOutcome::Offline, 0, 0, pending, refused, lacking, digest, Some(error))
            }
            Err(error) => return Err(error.into()),
        };
    let mut object = json!({
        "outcome": outcome.name(), "sent": sent, "received": received, "pending": pending,
        "refused": refused, "lacking": lacking, "digest": digest,
    });
    let error = error.map(failure);
    if let (SyncOutcome::Partial, Some(cause)) = (outcome, &error) {
        object["reason"] = reason_json(cause);
    }
    let mut text = format!("{}: {sent} sent, {received} received, {pending} still to send", outcome.name());
    if refused > 0 {
        text.push_str(&format!("; {refused} refused: see `anabranch refused`"));
    }
    if lacking > 0 {
        text.push_str(&format!("; the relay lost something of {lacking} that other devices have to bring"));
    }
    output.result(object, text).await?;
    let (category, code, message) = match outcome {
        SyncOutcome::Complete => return Ok(()),
        SyncOutcome::Partial => {
            (Category::Deadline, "partial", "the sync stopped before everything was exchanged")
        }
        SyncOutcome::Offline => (Category::Network, "offline", "the relay could not be reached in time"),
        SyncOutcome::Auth => (Category::Auth, "auth", "the relay did not accept this device"),
    };
    Err(match error {
        // A relay that refuses says why; that outranks how the sync ended.
        Some(cause) if outcome == SyncOutcome::Partial && cause.category != Category::Network => cause,
        Some(mut cause) => {
            cause.category = category;
            cause
        }
        None => Failure::new(category, code, message),
    })
}

pub(crate) async fn status(workspace: &Workspace, output: &mut Output) -> Result<(), Failure> {
    let status = figures(workspace).await;
    let text = format!(
        "workspace {}, {}\n{} to send, {} in conflict, {} refused\ndigest {}\nclock {} ms ahead of the relay's",
        workspace.name(),
        status.state.name(),
        status.pending,
        status.conflicts,
        status.refused,
        status.digest,
        status.clock_skew_ms
    );
    output.result(status_json(&status), text).await?;
    if output.json {
        return Ok(());
    }
    if let Some(held) = &status.held {
        let cause = failure(held.into());
        output.text(format!("{}\n  help: {}", cause.message, cause.help_text())).await?;
    }
    match &status.last_error {
        Some(error) => output.text(format!("last error: {error}")).await,
        None => Ok(()),
    }
}

/// An error of a sync, with the commands that help.
fn failure(error: anabranch::Error) -> Failure {
    let held_by_refused = error.code() == "held_by_refused";
    let failure = Failure::from(error);
    match held_by_refused {
        true => failure.help(
            "`anabranch refused` prints what was refused and why; write it rightly, or `retry` or `dismiss` it there",
        ),
        false => failure,
    }
}

fn reason_json(cause: &Failure) -> Json {
    json!({ "code": cause.code, "message": cause.message, "help": cause.help_text() })
}

/// Where the device stands. A workspace that was opened just now has no figures yet.
async fn figures(workspace: &Workspace) -> WorkspaceStatus {
    for _ in 0..FIGURES_TRIES {
        let status = workspace.status();
        if !status.digest.is_empty() {
            return status;
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    workspace.status()
}

fn status_json(status: &WorkspaceStatus) -> Json {
    let mut object = json!({
        "state": status.state.name(),
        "pending": status.pending,
        "conflicts": status.conflicts,
        "refused": status.refused,
        "lacking": status.lacking,
        "digest": status.digest,
        "clock_skew_ms": status.clock_skew_ms,
    });
    if let Some(held) = &status.held {
        object["reason"] = reason_json(&failure(held.into()));
    }
    object
}

/// Owns the directory and stays connected, until SIGTERM or Ctrl-C.
pub(crate) async fn watch(global: Global, output: &mut Output) -> Result<(), Failure> {
    let dir = DeviceDir::new(&global)?;
    let config = dir.config()?;
    let no_signals =
        |error: std::io::Error| Failure::internal(format!("could not listen for signals: {error}"));
    // Before anything is open, so that no signal is missed.
    let mut terminate = signal(SignalKind::terminate()).map_err(no_signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(no_signals)?;
    let mut end = pin!(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    });
    let offset = global.clock_offset;
    let mut again = false;
    // Where the owner ends, the next one is followed, or this process becomes it.
    let device = loop {
        match dir.reach(&config, offset, true, owner::SILENCE_MAX).await? {
            Opened::Here(device) => break device,
            Opened::Elsewhere(stream) => {
                let request = Request::new(global.json, offset, None, DataCommand::Follow { again });
                tokio::select! {
                    () = &mut end => return Ok(()),
                    result = owner::forward(stream, &request, output) => match result? {
                        Forwarded::Done => return Ok(()),
                        Forwarded::Leaving => again = true,
                        Forwarded::NotTaken => {}
                    },
                }
                // It may have others to serve before it leaves.
                tokio::time::sleep(STATE_PERIOD).await;
            }
        }
    };
    let result = match Listener::bind(dir.root()) {
        Ok(listener) => {
            let work = async {
                tokio::select! {
                    () = end => Ok(()),
                    result = follow(&device.workspace, again, output) => result,
                }
            };
            listener.serve_during(&Owner::Device(device.clone()), Parting::Soon, work).await
        }
        Err(failure) => Err(failure),
    };
    let closed = device.engine.shutdown().await.map_err(Failure::from);
    result.and(closed)
}

/// Prints every change, and where the device stands whenever that changes. `again` where
/// changes were followed before and some may have been missed since.
pub(crate) async fn follow(workspace: &Workspace, again: bool, output: &mut Output) -> Result<(), Failure> {
    let mut changes = workspace.changes();
    if again {
        missed(output).await?;
    }
    let mut period = tokio::time::interval(STATE_PERIOD);
    period.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
    let mut shown = None;
    figures(workspace).await;
    loop {
        tokio::select! {
            biased;
            change = changes.next() => match change {
                Some(ChangeEvent::Changed(key)) => changed(workspace, key.type_name(), key.id(), output).await?,
                Some(ChangeEvent::Missed) => missed(output).await?,
                None => return Ok(()),
            },
            _ = period.tick() => {
                let status = workspace.status();
                let object = status_json(&status);
                if shown.as_ref() != Some(&object) {
                    let text = format!("{} ({} to send)", status.state.name(), status.pending);
                    shown = Some(object.clone());
                    let mut event = object;
                    event["event"] = json!("status");
                    output.result(event, text).await?;
                }
            }
        }
        output.flush().await?;
    }
}

async fn missed(output: &mut Output) -> Result<(), Failure> {
    let text = "more changed than could be shown; `list` prints what is";
    output.result(json!({ "event": "missed" }), text).await
}

async fn changed(
    workspace: &Workspace,
    type_name: &str,
    id: &str,
    output: &mut Output,
) -> Result<(), Failure> {
    let (mut object, text) = match workspace.get(type_name, id).await? {
        Some(record) => {
            let text = format!("{type_name}/{id} changed, written by {}", record.updated_by);
            (record_json(&record), text)
        }
        None => {
            let object = json!({ "type": type_name, "id": id, "deleted": true });
            (object, format!("{type_name}/{id} is gone"))
        }
    };
    object["event"] = json!("change");
    output.result(object, text).await
}
