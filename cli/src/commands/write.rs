//! `set` and `delete`.

use anabranch::{Edit, EntityKey, Expect, Intent, Workspace};
use serde_json::json;

use crate::args::{EntityArgs, SetArgs};
use crate::assign;
use crate::failure::Failure;
use crate::output::Output;

pub(crate) async fn set(
    workspace: &Workspace,
    args: SetArgs,
    input: Option<&str>,
    output: &mut Output,
) -> Result<(), Failure> {
    let edits = match (input, &args.id) {
        (Some(lines), None) => {
            if args.if_version.is_some() {
                return Err(Failure::usage("bad_arguments", "--if-version is for one entity")
                    .help("give each line its own \"if_version\""));
            }
            assign::edit_lines(lines)?
        }
        (None, Some(id)) => {
            let ty = assign::entity_type(workspace.schema(), &args.type_name)?;
            let assignments = args.assignments.iter();
            let intents = assignments.map(|text| assign::assignment(ty, text)).collect::<Result<_, _>>()?;
            vec![assign::edit(&args.type_name, id, intents, args.if_version.as_deref())?]
        }
        _ => {
            return Err(Failure::usage("bad_arguments", "set takes TYPE ID ASSIGNMENT…, or - alone")
                .help("see `anabranch set --help`"));
        }
    };
    let keys: Vec<_> = edits.iter().map(|edit| edit.key.clone()).collect();
    let versions = write(workspace, edits, args.unchecked).await?;
    for (key, version) in keys.iter().zip(versions) {
        if version.is_empty() {
            return Err(nothing_written(key));
        }
        let object = json!({ "type": key.type_name(), "id": key.id(), "version": version });
        output.result(object, format!("{key} is saved on this device")).await?;
    }
    Ok(())
}

pub(crate) async fn delete(
    workspace: &Workspace,
    entity: &EntityArgs,
    if_version: Option<&str>,
    unchecked: bool,
    output: &mut Output,
) -> Result<(), Failure> {
    assign::entity_type(workspace.schema(), &entity.type_name)?;
    let mut edit = assign::edit(&entity.type_name, &entity.id, vec![Intent::Delete], if_version)?;
    edit.expect = Expect::Existing;
    let key = edit.key.clone();
    let versions = write_as(workspace, vec![edit], unchecked).await?;
    // What was created and deleted before it was ever sent leaves nothing behind.
    let version = versions.first().filter(|version| !version.is_empty());
    let object = json!({
        "type": key.type_name(), "id": key.id(), "version": version, "deleted": true,
    });
    output.result(object, format!("{key} is deleted on this device")).await
}

/// An entity is what was written into it: one without any value does not come to be.
pub(super) fn nothing_written(key: &EntityKey) -> Failure {
    Failure::validation("nothing_written", format!("{key} was not created: it has no value in any field"))
        .help("give it at least one value")
}

/// Writes edits of entities that exist, are new, or were deleted: to set fields of a deleted
/// entity is to create it again.
async fn write(workspace: &Workspace, mut edits: Vec<Edit>, unchecked: bool) -> Result<Vec<String>, Failure> {
    for edit in &mut edits {
        let revives = edit.based_on.is_none() && !edit.intents.contains(&Intent::Delete);
        let key = &edit.key;
        assign::entity_type(workspace.schema(), key.type_name())?;
        if revives && workspace.get(key.type_name(), key.id()).await?.is_none() {
            edit.expect = Expect::New;
        }
    }
    // An entity that several lines edit is new to the first of them only; they become one edit.
    let mut known = std::collections::BTreeSet::new();
    for edit in &mut edits {
        if !known.insert(edit.key.clone()) {
            edit.expect = Expect::Any;
        }
    }
    match write_as(workspace, edits.clone(), unchecked).await {
        // Something arrived since it was looked up.
        Err(failure) if failure.code == "exists" => {
            edits.iter_mut().for_each(|edit| edit.expect = Expect::Any);
            write_as(workspace, edits, unchecked).await
        }
        result => result,
    }
}

async fn write_as(workspace: &Workspace, edits: Vec<Edit>, unchecked: bool) -> Result<Vec<String>, Failure> {
    Ok(match unchecked {
        true => workspace.write_unchecked(edits).await?,
        false => workspace.write(edits).await?,
    })
}
