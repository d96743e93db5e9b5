//! Queries by type: filter, order, limit, and a cursor to go on.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Number, Value as Json};

use crate::id::EntityKey;
use crate::rows::{RowRecord, Rows, index_value, index_values};
use crate::schema::{EntityType, Field, FieldType, ScalarType, ValueError, describe};
use crate::store::StoreError;

/// Most rows of one page; a query without a limit gives this many and a cursor.
pub const LIMIT_MAX: usize = 10_000;

/// How a filter compares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Equal.
    Eq,
    /// Not equal.
    Ne,
    /// Less.
    Lt,
    /// Less or equal.
    Le,
    /// Greater.
    Gt,
    /// Greater or equal.
    Ge,
    /// A text contains a text; a set, list or JSON array has an element; a map has a key.
    Contains,
}

/// A condition on one field.
#[derive(Clone, Debug, PartialEq)]
pub struct Filter {
    /// The field; `id` is the entity's id.
    pub field: String,
    /// How to compare.
    pub op: Op,
    /// With what.
    pub value: Json,
}

/// What to find.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Query {
    /// The type.
    pub type_name: String,
    /// All must hold.
    pub filters: Vec<Filter>,
    /// A field to order by, and whether descending; none orders by id.
    pub order_by: Option<(String, bool)>,
    /// Most rows to give; at most [`LIMIT_MAX`].
    pub limit: Option<usize>,
    /// Where an earlier page ended.
    pub after: Option<String>,
    /// Also entities that are deleted.
    pub deleted: bool,
}

/// A page of results.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Found {
    /// In order.
    pub rows: Vec<(EntityKey, RowRecord)>,
    /// Where to go on; none at the end.
    pub cursor: Option<String>,
}

/// Why a query can't be answered.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QueryError {
    /// The query itself.
    #[error("{0}")]
    Invalid(String),
    /// The cursor.
    #[error("the cursor is none that a query gave; start without one")]
    BadCursor,
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
}

fn invalid<T>(message: impl Into<String>) -> Result<T, QueryError> {
    Err(QueryError::Invalid(message.into()))
}

impl Filter {
    /// Reads `field > value`. The comparison is one of `=`, `!=`, `<`, `<=`, `>`, `>=`,
    /// `contains`; the value is JSON, or plain text where the field holds text.
    pub fn parse(ty: &EntityType, text: &str) -> Result<Self, QueryError> {
        let text = text.trim();
        let end = text.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).unwrap_or(text.len());
        let (name, rest) = text.split_at(end);
        let rest = rest.trim_start();
        let operators = [
            ("!=", Op::Ne),
            ("<=", Op::Le),
            (">=", Op::Ge),
            ("==", Op::Eq),
            ("=", Op::Eq),
            ("<", Op::Lt),
            (">", Op::Gt),
            ("contains ", Op::Contains),
        ];
        let Some((op, value)) =
            operators.iter().find_map(|(sign, op)| rest.strip_prefix(sign).map(|value| (*op, value.trim())))
        else {
            return invalid(format!(
                "{text:?} is no condition; write for example 'level = expert' or 'reps >= 5'"
            ));
        };
        let held = match name {
            "id" => FieldType::Text,
            _ => match (&lookup(ty, name)?.ty, op) {
                (FieldType::Set(of) | FieldType::List(of), Op::Contains) => FieldType::Scalar(of.clone()),
                // A map contains keys.
                (FieldType::Map(_), Op::Contains) => FieldType::Text,
                (of, _) => of.clone(),
            },
        };
        let value = match value {
            "null" if name != "id" && op != Op::Contains => Json::Null,
            // What can't be read is refused as what the words are: a string.
            _ => held.read_text(value).unwrap_or_else(|_| Json::String(value.to_owned())),
        };
        Self { field: name.to_owned(), op, value }.checked(ty)
    }

    /// The same with its value as rows hold it.
    ///
    /// # Errors
    /// That the field can't be compared with it.
    fn checked(&self, ty: &EntityType) -> Result<Self, QueryError> {
        let Self { field: name, op, value } = self;
        let value = match name.as_str() {
            "id" if value.is_string() => value.clone(),
            "id" => return invalid(format!("an id is a string; {} is none", describe(value))),
            _ => as_held(lookup(ty, name)?, *op, value)?,
        };
        Ok(Self { field: name.clone(), op: *op, value })
    }

    fn matches(&self, ty: &EntityType, key: &EntityKey, row: &RowRecord) -> bool {
        if self.field == "id" {
            let Json::String(id) = &self.value else { return false };
            return match self.op {
                Op::Contains => key.id().contains(&**id),
                op => holds(op, key.id().cmp(id)),
            };
        }
        let Some(field) = ty.fields.get(&self.field) else { return false };
        let value = row.fields.get(&self.field).unwrap_or(&Json::Null);
        match self.op {
            Op::Contains => match (value, &self.value) {
                (Json::String(text), Json::String(part)) => text.contains(&**part),
                (Json::Array(items), element) => items.contains(element),
                (Json::Object(entries), Json::String(key)) => entries.contains_key(key),
                _ => false,
            },
            Op::Eq => equal(field, value, &self.value),
            Op::Ne => !equal(field, value, &self.value),
            op => order(field, value, &self.value).is_some_and(|ordering| holds(op, ordering)),
        }
    }
}

/// The value as rows hold it. The field's bounds don't matter: what lies beyond them is less or greater
/// all the same.
fn as_held(field: &Field, op: Op, value: &Json) -> Result<Json, QueryError> {
    let any = Field {
        required: false,
        one_of: Vec::new(),
        min: None,
        max: None,
        max_bytes: None,
        blob: None,
        ..field.clone()
    };
    let wrong = |error: ValueError| QueryError::Invalid(error.to_string());
    let kind = field.ty.name();
    let ordered = !matches!(op, Op::Eq | Op::Ne | Op::Contains);
    match &field.ty {
        FieldType::Scalar(ScalarType::Json) => any.check(value).map_err(wrong),
        FieldType::Set(_) | FieldType::List(_) if op == Op::Contains => {
            any.check_element(value).map_err(wrong)
        }
        FieldType::Scalar(ScalarType::String | ScalarType::Ref(_)) | FieldType::Text | FieldType::Map(_)
            if op == Op::Contains =>
        {
            match value {
                Json::String(_) => Ok(value.clone()),
                _ => invalid(format!("field {:?} contains strings; {} is none", field.name, describe(value))),
            }
        }
        _ if op == Op::Contains => invalid(format!(
            "field {:?} of type {kind} contains nothing; `contains` is for texts, sets, lists, maps and JSON",
            field.name
        )),
        FieldType::Scalar(ScalarType::Blob) | FieldType::Set(_) | FieldType::List(_) | FieldType::Map(_)
            if ordered =>
        {
            invalid(format!("field {:?} of type {kind} has no order; compare it by = or !=", field.name))
        }
        _ if ordered && value.is_null() => invalid(format!(
            "field {:?} is neither less nor greater than null; compare it by = or !=",
            field.name
        )),
        FieldType::Scalar(ScalarType::Int) if value.is_number() => {
            Ok(any.check(value).unwrap_or_else(|_| value.clone()))
        }
        // An empty text is no reference, and less than all.
        FieldType::Scalar(ScalarType::Ref(_)) if value.is_string() => Ok(value.clone()),
        _ => any.check(value).map_err(wrong),
    }
}

fn equal(field: &Field, a: &Json, b: &Json) -> bool {
    a == b || order(field, a, b) == Some(Ordering::Equal)
}

fn holds(op: Op, ordering: Ordering) -> bool {
    match op {
        Op::Eq | Op::Contains => ordering.is_eq(),
        Op::Ne => ordering.is_ne(),
        Op::Lt => ordering.is_lt(),
        Op::Le => ordering.is_le(),
        Op::Gt => ordering.is_gt(),
        Op::Ge => ordering.is_ge(),
    }
}

/// Order of two values of a field; none where there is none: null, or values of containers.
fn order(field: &Field, a: &Json, b: &Json) -> Option<Ordering> {
    match (a, b) {
        (Json::Number(a), Json::Number(b)) => match (integer(a), integer(b)) {
            (Some(a), Some(b)) => Some(a.cmp(&b)),
            (Some(a), None) => order_mixed(a, b.as_f64()?),
            (None, Some(b)) => order_mixed(b, a.as_f64()?).map(Ordering::reverse),
            (None, None) => a.as_f64()?.partial_cmp(&b.as_f64()?),
        },
        (Json::String(a), Json::String(b)) => match &field.ty {
            FieldType::Scalar(ScalarType::Timestamp) => {
                Some(crate::schema::timestamp_to_ms(a)?.cmp(&crate::schema::timestamp_to_ms(b)?))
            }
            _ => Some(a.cmp(b)),
        },
        (Json::Bool(a), Json::Bool(b)) => Some(a.cmp(b)),
        _ => None,
    }
}

fn integer(number: &Number) -> Option<i128> {
    number.as_i64().map(i128::from).or_else(|| number.as_u64().map(i128::from))
}

/// Order of an integer of 64 bits and a float, which as an integer of 128 is exact or beyond all of 64.
fn order_mixed(a: i128, b: f64) -> Option<Ordering> {
    let whole = a.cmp(&(b as i128));
    Some(whole.then(0.0.partial_cmp(&b.fract())?))
}

fn lookup<'a>(ty: &'a EntityType, name: &str) -> Result<&'a Field, QueryError> {
    ty.fields.get(name).ok_or_else(|| {
        let known: Vec<&str> = ty.fields.keys().map(String::as_str).collect();
        QueryError::Invalid(format!("{} has no field {name:?}; it has {}", ty.name, known.join(", ")))
    })
}

/// What a result is ordered by: the encoded value of the field, then the id.
type Place = (Vec<u8>, String);

fn place(field: Option<&Field>, key: &EntityKey, row: &RowRecord) -> Place {
    let mut value = Vec::new();
    if let Some(field) = field {
        match row.fields.get(&field.name) {
            // Whole texts, where an index holds only their beginning.
            Some(Json::String(text)) if !matches!(field.ty, FieldType::Scalar(ScalarType::Timestamp)) => {
                value.push(1);
                value.extend_from_slice(text.as_bytes());
            }
            other => index_value(field, other.unwrap_or(&Json::Null), &mut value),
        }
    }
    (value, key.id().to_owned())
}

/// Answers a query from durable rows. Each page shows one moment; rows that change between
/// two pages may be seen twice or not at all.
pub fn run(rows: &Rows, query: &Query) -> Result<Found, QueryError> {
    let schema = rows.schema();
    let Some(ty) = schema.types.get(&query.type_name) else {
        let known: Vec<&str> = schema.types.keys().map(String::as_str).collect();
        return invalid(format!("the schema has no type {:?}; it has {}", query.type_name, known.join(", ")));
    };
    let filters: Vec<Filter> =
        query.filters.iter().map(|filter| filter.checked(ty)).collect::<Result<_, _>>()?;
    let (order, descending) = match &query.order_by {
        Some((name, descending)) if name == "id" => (None, *descending),
        Some((name, descending)) => {
            let field = lookup(ty, name)?;
            if !matches!(&field.ty, FieldType::Scalar(scalar) if !matches!(scalar, ScalarType::Json | ScalarType::Blob))
            {
                return invalid(format!("{}.{name} has no order", ty.name));
            }
            (Some(field), *descending)
        }
        None => (None, false),
    };
    let after = query.after.as_deref().map(parse_cursor).transpose()?;
    let limit = query.limit.unwrap_or(LIMIT_MAX).min(LIMIT_MAX);
    let mut best: BTreeMap<Place, (EntityKey, RowRecord)> = BTreeMap::new();
    let mut more = false;
    // Without an order of its own the scan gives rows in theirs, and may stop early.
    let in_order = order.is_none() && !descending;
    let mut take = |key: EntityKey, row: RowRecord| -> bool {
        if (row.deleted && !query.deleted) || !filters.iter().all(|filter| filter.matches(ty, &key, &row)) {
            return true;
        }
        let place = place(order, &key, &row);
        if let Some(after) = &after
            && (if descending { place >= *after } else { place <= *after })
        {
            return true;
        }
        best.insert(place, (key, row));
        if best.len() > limit {
            more = true;
            if descending {
                best.pop_first();
            } else {
                best.pop_last();
            }
            return !in_order;
        }
        true
    };
    // Deleted rows are in no index.
    let index = if query.deleted { None } else { equal_index(ty, &filters) };
    match index {
        Some((index, values)) => {
            let mut from: Option<Vec<u8>> = None;
            loop {
                let (page, go_on) = rows.index_page(&ty.name, index, &values, from.as_deref(), false)?;
                from = page.last().map(|(key, _)| key.clone());
                for (_, key) in page {
                    // Indexed rows come in the index's order: all of them are looked at.
                    if let Some(row) = rows.get_found(&key)? {
                        take(key, row);
                    }
                }
                if !go_on {
                    break;
                }
            }
        }
        None => {
            let mut from = after.as_ref().filter(|_| in_order).map(|(_, id)| id.clone());
            'pages: loop {
                let (page, go_on) = rows.page(&ty.name, from.as_deref())?;
                from = page.last().map(|(key, _)| key.id().to_owned());
                for (key, row) in page {
                    if !take(key, row) {
                        break 'pages;
                    }
                }
                if !go_on {
                    break;
                }
            }
        }
    }
    let last = if descending { best.first_key_value() } else { best.last_key_value() };
    let cursor = last.filter(|_| more).map(|(place, _)| write_cursor(place));
    let ordered: Vec<_> =
        if descending { best.into_values().rev().collect() } else { best.into_values().collect() };
    Ok(Found { rows: ordered, cursor })
}

/// An index whose first fields are all bound by equality, with their encoded values.
fn equal_index(ty: &EntityType, filters: &[Filter]) -> Option<(u8, Vec<u8>)> {
    ty.indexes
        .iter()
        .enumerate()
        .filter_map(|(number, fields)| {
            let bound: Vec<(&Field, &Json)> = fields
                .iter()
                .map_while(|name| {
                    let equal = filters.iter().find(|f| f.field == *name && f.op == Op::Eq)?;
                    Some((ty.fields.get(name)?, &equal.value))
                })
                .collect();
            let count = bound.len();
            (count > 0).then(|| (count, number as u8, index_values(bound.into_iter())))
        })
        .max_by_key(|(bound, ..)| *bound)
        .map(|(_, number, values)| (number, values))
}

fn write_cursor(place: &Place) -> String {
    let mut bytes = (place.0.len() as u32).to_be_bytes().to_vec();
    bytes.extend_from_slice(&place.0);
    bytes.extend_from_slice(place.1.as_bytes());
    URL_SAFE_NO_PAD.encode(bytes)
}

fn parse_cursor(text: &str) -> Result<Place, QueryError> {
    let parse = || {
        let bytes = URL_SAFE_NO_PAD.decode(text).ok()?;
        let (length, rest) = bytes.split_first_chunk::<4>()?;
        let (value, id) = rest.split_at_checked(u32::from_be_bytes(*length) as usize)?;
        Some((value.to_vec(), String::from_utf8(id.to_vec()).ok()?))
    };
    parse().ok_or(QueryError::BadCursor)
}
