//! `import`.

use anabranch::{Edit, Expect, Intent, Workspace};
use serde_json::{Map, Value as Json, json};

use super::write::nothing_written;
use crate::args::ImportArgs;
use crate::assign;
use crate::failure::Failure;
use crate::output::Output;

/// Records written at once: enough for a good rate, few enough that progress shows.
const CHUNK_RECORDS: usize = 200;

pub(crate) async fn import(
    workspace: &Workspace,
    args: &ImportArgs,
    text: &str,
    output: &mut Output,
) -> Result<(), Failure> {
    let ty = assign::entity_type(workspace.schema(), &args.type_name)?;
    let records = assign::import_records(text)?;
    let total = records.len();
    // An id may be data as well.
    let keeps_id = ty.fields.contains_key(&args.id_field);
    let mut first_failure: Option<Failure> = None;
    let mut failed = 0;
    let mut done = 0;
    output.progress(0, total as u64, false).await?;
    for chunk in records.chunks(CHUNK_RECORDS) {
        let mut edits = Vec::with_capacity(chunk.len());
        let mut keys = Vec::with_capacity(chunk.len());
        let mut failures = Vec::new();
        for (place, record) in chunk.iter().enumerate() {
            match edit(workspace, args, keeps_id, record).await {
                Ok(edit) => {
                    keys.push(edit.key.clone());
                    edits.push(edit);
                }
                Err(failure) => failures.push((format!("record {}", done + place + 1), failure)),
            }
        }
        let results = workspace.write_each(edits).await?;
        for (key, result) in keys.into_iter().zip(results) {
            let failure = match result {
                Ok(version) if version.is_empty() => nothing_written(&key),
                Ok(_) => continue,
                Err(error) => error.into(),
            };
            failures.push((key.id().to_owned(), failure));
        }
        for (which, failure) in failures {
            failed += 1;
            let note = match output.json {
                true => {
                    let mut object = failure.to_json();
                    object["record"] = json!(which);
                    object.to_string()
                }
                false => format!("{which}: {}", failure.message),
            };
            output.note(note).await?;
            first_failure.get_or_insert(failure);
        }
        done += chunk.len();
        output.progress(done as u64, total as u64, args.progress).await?;
    }
    let imported = total - failed;
    let object = json!({ "type": args.type_name, "total": total, "imported": imported, "failed": failed });
    output.result(object, format!("{imported} of {total} are saved on this device")).await?;
    match first_failure {
        Some(failure) => {
            let message =
                format!("{failed} of {total} were not imported, the first because {}", failure.message);
            Err(Failure::new(failure.category, failure.code.clone(), message).help(failure.help_text()))
        }
        None => Ok(()),
    }
}

async fn edit(
    workspace: &Workspace,
    args: &ImportArgs,
    keeps_id: bool,
    record: &Map<String, Json>,
) -> Result<Edit, Failure> {
    let id = match record.get(&args.id_field) {
        Some(Json::String(id)) => id.clone(),
        Some(id @ Json::Number(_)) => id.to_string(),
        _ => {
            return Err(Failure::validation("no_id", format!("it has no id in {:?}", args.id_field))
                .help("name the field that is the id with --id-field; ids are strings or numbers"));
        }
    };
    let fields = record.iter().filter(|(name, _)| keeps_id || **name != args.id_field);
    let intents = fields.map(|(name, value)| Intent::Set { field: name.clone(), value: value.clone() });
    let mut edit = assign::edit(&args.type_name, &id, intents.collect(), None)?;
    if workspace.get(&args.type_name, &id).await?.is_none() {
        edit.expect = Expect::New;
    }
    Ok(edit)
}
