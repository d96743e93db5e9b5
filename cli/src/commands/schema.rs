//! `schema check`, `schema push` and `schema show`.

use std::path::PathBuf;
use std::time::Duration;

use anabranch::Workspace;
use anabranch::schema::Severity;
use serde_json::{Value as Json, json};

use crate::args::{DataCommand, Global, SchemaCommand};
use crate::config::{DeviceDir, parse_schema, read_text};
use crate::failure::{Category, Failure};
use crate::output::Output;
use crate::owner;

pub(crate) async fn schema(
    global: Global,
    command: SchemaCommand,
    output: &mut Output,
) -> Result<(), Failure> {
    match command {
        SchemaCommand::Check { files } => check(&files, output).await,
        SchemaCommand::Push { file, deadline } => {
            if let Some(file) = file {
                replace(&global, &file).await?;
            }
            super::data(global, DataCommand::RelaySchema { push: true, deadline }, output).await
        }
        SchemaCommand::Show { relay: true, deadline } => {
            super::data(global, DataCommand::RelaySchema { push: false, deadline }, output).await
        }
        SchemaCommand::Show { relay: false, .. } => {
            let dir = DeviceDir::new(&global)?;
            dir.config()?;
            show(&read_text(&dir.schema_path())?, output).await
        }
    }
}

async fn show(source: &str, output: &mut Output) -> Result<(), Failure> {
    output.result(json!({ "schema": source }), source.trim_end()).await
}

async fn check(files: &[PathBuf], output: &mut Output) -> Result<(), Failure> {
    let schemas = files
        .iter()
        .map(|file| parse_schema(&read_text(file)?, file))
        .collect::<Result<Vec<_>, Failure>>()?;
    let (changes, types) = match &schemas[..] {
        [old, new] => (old.compatibility(new), new.types.len()),
        [new] => (Vec::new(), new.types.len()),
        _ => return Err(Failure::usage("bad_arguments", "give one or two files")),
    };
    let breaking = changes.iter().filter(|change| change.severity == Severity::Breaking).count();
    if output.json {
        let changes: Vec<Json> = changes
            .iter()
            .map(|change| {
                json!({
                    "severity": change.severity.to_string(),
                    "type": change.type_name,
                    "field": change.field,
                    "text": change.text,
                })
            })
            .collect();
        let object = json!({ "types": types, "compatible": breaking == 0, "changes": changes });
        output.object(&object).await?;
    } else {
        for change in &changes {
            output.text(change.to_string()).await?;
        }
        if breaking == 0 {
            output.text(format!("{types} types, no mistakes")).await?;
        }
    }
    match breaking {
        0 => Ok(()),
        _ => Err(incompatible(breaking)),
    }
}

fn incompatible(breaking: usize) -> Failure {
    let message = format!("{breaking} changes would break devices that run the older schema");
    Failure::validation("incompatible_schema", message)
        .help("`anabranch schema check OLD NEW` says for each what to do instead")
}

/// Makes a file the device's schema, if it may follow the present one.
async fn replace(global: &Global, file: &std::path::Path) -> Result<(), Failure> {
    let dir = DeviceDir::new(global)?;
    dir.config()?;
    let source = read_text(file)?;
    let newer = parse_schema(&source, file)?;
    let changes = dir.schema()?.compatibility(&newer);
    let breaking = changes.iter().filter(|change| change.severity == Severity::Breaking).count();
    if breaking > 0 {
        return Err(incompatible(breaking));
    }
    if owner::connect(dir.root()).await.is_some() {
        let message = "another process owns the directory and works by the present schema";
        return Err(Failure::usage("in_use", message).help("stop `anabranch watch` first"));
    }
    dir.write_schema(&source)
}

/// What takes the relay.
pub(crate) async fn with_relay(
    workspace: &Workspace,
    push: bool,
    deadline_ms: u64,
    output: &mut Output,
) -> Result<(), Failure> {
    let deadline = Duration::from_millis(deadline_ms);
    if push {
        workspace.push_schema(deadline).await?;
        let types = workspace.schema().types.len();
        let object = json!({ "pushed": true, "types": types });
        return output.result(object, format!("the relay now checks by these {types} types")).await;
    }
    match workspace.fetch_schema(deadline).await? {
        Some(source) => show(&source, output).await,
        None => {
            Err(Failure::new(Category::NotFound, "no_schema", "the relay has no schema of this workspace")
                .help("an admin or authority gives it one with `anabranch schema push`"))
        }
    }
}
