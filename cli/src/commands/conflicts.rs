//! `conflicts`, `resolve` and `refused`: what waits for a person.

use std::fmt::Write as _;

use anabranch::{Resolution, Workspace};
use serde_json::{Value as Json, json};

use super::read::plain;
use super::time;
use crate::args::{RefusedAction, ResolveArgs, Side};
use crate::assign;
use crate::failure::{Category, Failure};
use crate::output::Output;

pub(crate) async fn conflicts(workspace: &Workspace, output: &mut Output) -> Result<(), Failure> {
    let conflicts = workspace.conflicts().await?;
    if conflicts.is_empty() && !output.json {
        return output.text("nothing waits for a decision").await;
    }
    for conflict in conflicts {
        if output.json {
            let sides: Vec<Json> = conflict
                .sides
                .iter()
                .map(|side| {
                    json!({
                        "device": side.device,
                        "devices": side.devices,
                        "value": side.value,
                        "time": time(side.time_ms),
                    })
                })
                .collect();
            let object = json!({
                "type": conflict.type_name,
                "id": conflict.id,
                "field": conflict.field,
                "kind": conflict.kind,
                "sides": sides,
                "base": conflict.base,
            });
            output.object(&object).await?;
            continue;
        }
        let mut text =
            format!("{}/{} {} ({})\n", conflict.type_name, conflict.id, conflict.field, conflict.kind);
        if let Some(base) = &conflict.base {
            let _ = writeln!(text, "  before: {}", plain(base));
        }
        for (place, side) in conflict.sides.iter().enumerate() {
            let mine = if side.mine { ", this device" } else { "" };
            let (number, value, at) = (place + 1, plain(&side.value), time(side.time_ms));
            let _ = writeln!(text, "  {number}: {value}   ({}{mine}, {at})", side.devices.join(", "));
        }
        let _ = write!(
            text,
            "  settle it: anabranch resolve {} {} '{}' --keep mine|theirs|N, or --value JSON",
            conflict.type_name, conflict.id, conflict.field
        );
        output.text(text).await?;
    }
    Ok(())
}

pub(crate) async fn resolve(
    workspace: &Workspace,
    args: &ResolveArgs,
    output: &mut Output,
) -> Result<(), Failure> {
    assign::entity_type(workspace.schema(), &args.entity.type_name)?;
    let (resolution, told) = match (args.choice.keep, &args.choice.value) {
        (Some(Side::Mine), _) => (Resolution::Mine, json!("mine")),
        (Some(Side::Theirs), _) => (Resolution::Theirs, json!("theirs")),
        (Some(Side::Number(number)), _) => (Resolution::Side(number), json!(number)),
        (None, Some(text)) => {
            let value: Json = serde_json::from_str(text).map_err(|error| {
                Failure::usage("bad_value", format!("{text:?} is not JSON: {error}"))
                    .help("strings go in quotes, as in --value '\"text\"'; a group takes an object")
            })?;
            (Resolution::Value(value), json!("value"))
        }
        (None, None) => return Err(Failure::usage("bad_arguments", "give --keep or --value")),
    };
    let (type_name, id) = (&args.entity.type_name, &args.entity.id);
    workspace.resolve(type_name, id, &args.field, resolution).await?;
    let object = json!({ "type": type_name, "id": id, "field": args.field, "kept": told });
    let text =
        format!("{} of {type_name}/{id} is settled here, and with the next sync everywhere", args.field);
    output.result(object, text).await
}

pub(crate) async fn refused(
    workspace: &Workspace,
    action: Option<RefusedAction>,
    output: &mut Output,
) -> Result<(), Failure> {
    let refused = workspace.refused().await?;
    let exists = |number: u64| match refused.iter().any(|(known, _)| *known == number) {
        true => Ok(()),
        false => {
            Err(Failure::new(Category::NotFound, "not_found", format!("there is no refused edit {number}"))
                .help("`anabranch refused` prints them with their numbers"))
        }
    };
    match action.unwrap_or(RefusedAction::List) {
        RefusedAction::List => {
            if refused.is_empty() && !output.json {
                return output.text("nothing was refused").await;
            }
            for (number, record) in refused {
                let at = time(record.time_ms);
                let text = format!(
                    "{number}: {}/{} at {at}: {} ({})\n  settle it: anabranch refused retry {number}, or dismiss {number}",
                    record.type_name, record.id, record.message, record.code
                );
                let object = json!({
                    "number": number,
                    "type": record.type_name,
                    "id": record.id,
                    "code": record.code,
                    "message": record.message,
                    "time": at,
                    "intents": record.intents,
                });
                output.result(object, text).await?;
            }
            Ok(())
        }
        RefusedAction::Dismiss { number } => {
            exists(number)?;
            workspace.dismiss(number).await?;
            output.result(json!({ "number": number, "dismissed": true }), "forgotten").await
        }
        RefusedAction::Retry { number } => {
            exists(number)?;
            workspace.retry_refused(number).await?;
            let text = "written again; the next sync sends it";
            output.result(json!({ "number": number, "retried": true }), text).await
        }
    }
}
