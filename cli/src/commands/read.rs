//! `get`, `list` and `export`.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use anabranch::schema::canonical_json;
use anabranch::{Query, Record, Workspace};
use serde_json::{Map, Value as Json, json};

use super::time;
use crate::args::{EntityArgs, ListArgs};
use crate::assign;
use crate::failure::{Category, Failure};
use crate::output::Output;

/// Rows read at once.
const PAGE_ROWS: usize = 1_000;
/// Longest value shown in a list for people.
const LIST_VALUE_CHARS_MAX: usize = 40;

pub(crate) async fn get(
    workspace: &Workspace,
    entity: &EntityArgs,
    output: &mut Output,
) -> Result<(), Failure> {
    let ty = assign::entity_type(workspace.schema(), &entity.type_name)?;
    let Some(record) = workspace.get(&entity.type_name, &entity.id).await? else {
        let message = format!("there is no {} {:?} on this device", entity.type_name, entity.id);
        return Err(Failure::new(Category::NotFound, "not_found", message)
            .help("`anabranch list` prints what there is; `anabranch sync` fetches what others wrote"));
    };
    if output.json {
        return output.object(&record_json(&record)).await;
    }
    let mut text = format!("{}/{} ({})\n", record.type_name, record.id, record.status.name());
    let width = ty.fields.keys().map(String::len).max().unwrap_or_default();
    for (name, value) in &record.fields {
        let _ = writeln!(text, "  {name:width$}  {}", plain(value));
    }
    let _ = write!(
        text,
        "  last written by {} at {}\n  version {}",
        record.updated_by,
        time(record.updated_ms),
        record.version
    );
    output.text(text).await
}

pub(crate) async fn list(workspace: &Workspace, args: ListArgs, output: &mut Output) -> Result<(), Failure> {
    let ty = assign::entity_type(workspace.schema(), &args.type_name)?;
    let mut query = Query { type_name: args.type_name.clone(), deleted: args.deleted, ..Query::default() };
    for text in &args.filters {
        query.filters.push(workspace.filter(&args.type_name, text)?);
    }
    if let Some(field) = &args.order_by {
        let (field, descending) = match field.strip_prefix('-') {
            Some(field) => (field, true),
            None => (field.as_str(), false),
        };
        if field != "id" && !ty.fields.contains_key(field) {
            let known: Vec<&str> = ty.fields.keys().map(String::as_str).collect();
            let message = format!("{} has no field {field:?}", ty.name);
            return Err(Failure::validation("unknown_field", message)
                .help(format!("its fields are {}", known.join(", "))));
        }
        query.order_by = Some((field.to_owned(), descending));
    }
    query.after = args.after;
    let limit = args.limit.map(|limit| usize::try_from(limit).unwrap_or(usize::MAX));
    let mut left = limit.unwrap_or(usize::MAX);
    loop {
        query.limit = Some(left.min(PAGE_ROWS));
        let page = workspace.query(&query).await?;
        left = left.saturating_sub(page.records.len());
        let ends = left == 0 || page.cursor.is_none();
        let last = page.records.len().saturating_sub(1);
        for (place, record) in page.records.iter().enumerate() {
            if output.json {
                let mut object = record_json(record);
                if let (true, Some(cursor)) = (ends && place == last, &page.cursor) {
                    object["cursor"] = json!(cursor);
                }
                output.object(&object).await?;
            } else {
                output.text(list_line(record)).await?;
            }
        }
        match page.cursor {
            Some(cursor) if !ends => query.after = Some(cursor),
            Some(cursor) if !output.json => {
                return output.note(format!("there are more: go on with --after {cursor}")).await;
            }
            _ => return Ok(()),
        }
    }
}

pub(crate) async fn export(
    workspace: &Workspace,
    type_name: &str,
    output: &mut Output,
) -> Result<(), Failure> {
    assign::entity_type(workspace.schema(), type_name)?;
    let mut query = Query { type_name: type_name.to_owned(), limit: Some(PAGE_ROWS), ..Query::default() };
    let mut lines = BTreeSet::new();
    loop {
        let page = workspace.query(&query).await?;
        for record in page.records {
            let mut object: Map<String, Json> = record.fields.into_iter().collect();
            object.insert("id".to_owned(), Json::String(record.id));
            lines.insert(canonical_json(&Json::Object(object)));
        }
        match page.cursor {
            Some(cursor) => query.after = Some(cursor),
            None => break,
        }
    }
    for line in lines {
        output.text(line).await?;
    }
    Ok(())
}

/// The object of `get` and of each line of `list`.
pub(super) fn record_json(record: &Record) -> Json {
    let mut object = json!({
        "type": record.type_name,
        "id": record.id,
        "status": record.status.name(),
        "version": record.version,
        "fields": record.fields,
    });
    if record.deleted {
        object["deleted"] = json!(true);
    }
    object
}

fn list_line(record: &Record) -> String {
    let mut line = record.id.clone();
    if record.deleted {
        line.push_str("  (deleted)");
    }
    if record.status != anabranch::SyncStatus::Synced {
        let _ = write!(line, "  [{}]", record.status.name());
    }
    for (name, value) in record.fields.iter().filter(|(_, value)| !is_empty(value)) {
        let mut text = plain(value).replace('\n', " ");
        if text.chars().count() > LIST_VALUE_CHARS_MAX {
            text = text.chars().take(LIST_VALUE_CHARS_MAX - 1).chain(['…']).collect();
        }
        let _ = write!(line, "  {name}={text}");
    }
    line
}

fn is_empty(value: &Json) -> bool {
    match value {
        Json::Null => true,
        Json::String(text) => text.is_empty(),
        Json::Array(items) => items.is_empty(),
        Json::Object(entries) => entries.is_empty(),
        _ => false,
    }
}

/// A value as people read it: strings without quotes.
pub(super) fn plain(value: &Json) -> String {
    match value {
        Json::Null => "–".to_owned(),
        Json::String(text) => text.clone(),
        Json::Array(items) => {
            let items: Vec<String> = items.iter().map(plain).collect();
            format!("[{}]", items.join(", "))
        }
        other => other.to_string(),
    }
}
