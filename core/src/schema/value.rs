//! Values of fields: what is allowed, and the one form in which equal values are equal bytes.

use std::cmp::Ordering;
use std::fmt::Write as _;

use serde_json::{Map, Number, Value as Json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::model::{Bound, Field, FieldType, Policy, ScalarType};
use crate::id::ID_BYTES_MAX;

/// Longest single value in bytes of canonical JSON: of a scalar, a text, or one element.
pub const VALUE_BYTES_MAX: usize = 1 << 20;
/// Deepest nesting of arrays and objects in a `json` value.
pub const JSON_DEPTH_MAX: usize = 64;
/// Longest key of a map's entry in bytes.
pub const MAP_KEY_BYTES_MAX: usize = 256;

/// 0000-01-01T00:00:00Z in milliseconds since 1970.
const TIMESTAMP_MIN_MS: i64 = -62_167_219_200_000;
/// 9999-12-31T23:59:59.999Z in milliseconds since 1970.
const TIMESTAMP_MAX_MS: i64 = 253_402_300_799_999;

/// Why a value is refused. Each names the field, what is wrong, and what would be right.
/// A retry can't help: the value must change.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ValueError {
    /// No value where there must be one.
    #[error("field {field:?} is required; give it a value")]
    Required {
        /// The field.
        field: String,
    },
    /// A value of another type.
    #[error("field {field:?} got {got}; give it {expected}")]
    Type {
        /// The field.
        field: String,
        /// The value, shortened.
        got: String,
        /// What would be right.
        expected: String,
    },
    /// Not one of the values listed.
    #[error("field {field:?} got {got}; allowed are {allowed}")]
    OneOf {
        /// The field.
        field: String,
        /// The value, shortened.
        got: String,
        /// The values allowed.
        allowed: String,
    },
    /// Below `min` or above `max`.
    #[error("field {field:?} got {got}; it must be {bound}")]
    Range {
        /// The field.
        field: String,
        /// The value.
        got: String,
        /// The bound, as in `at least 0`.
        bound: String,
    },
    /// Longer than allowed.
    #[error("field {field:?} got {got} bytes; at most {max} are allowed")]
    TooLong {
        /// The field.
        field: String,
        /// Length of the value in bytes.
        got: u64,
        /// Longest allowed, in bytes.
        max: u64,
    },
    /// A `json` value that is nested too deeply.
    #[error("field {field:?} got JSON nested more than {JSON_DEPTH_MAX} deep; flatten it")]
    TooDeep {
        /// The field.
        field: String,
    },
    /// A map key that is not one.
    #[error("field {field:?} got the key {got}, which {why}")]
    Key {
        /// The field.
        field: String,
        /// The key, shortened.
        got: String,
        /// What is wrong with it and what would be right.
        why: String,
    },
    /// An element was checked of a field that has none.
    #[error("field {field:?} has no elements: only set, list and map fields do; check the whole value")]
    NoElements {
        /// The field.
        field: String,
    },
}

impl Field {
    /// Checks a value of the whole field and gives its canonical form: a set as a sorted
    /// array without duplicates, a list as an array, a map as an object, a text as a string, a
    /// counter as an integer. `null` means "no value" and passes where none is required.
    ///
    /// Every element is bounded by [`VALUE_BYTES_MAX`]; how many there may be is up to the
    /// caller, who knows what was received.
    ///
    /// # Errors
    /// What is wrong with the value and what would be right.
    pub fn check(&self, value: &Json) -> Result<Json, ValueError> {
        if value.is_null() {
            return match self.required {
                true => Err(ValueError::Required { field: self.name.clone() }),
                false => Ok(Json::Null),
            };
        }
        match &self.ty {
            FieldType::Scalar(scalar) => self.check_scalar(scalar, value),
            FieldType::Text => self.check_scalar(&ScalarType::String, value),
            FieldType::Set(scalar) => {
                let mut elements = self.check_array(scalar, value)?;
                elements.sort_by(|a, b| compare(scalar, a, b));
                elements.dedup();
                Ok(Json::Array(elements))
            }
            FieldType::List(scalar) => self.check_array(scalar, value).map(Json::Array),
            FieldType::Map(scalar) => {
                let Json::Object(entries) = value else {
                    return Err(self.wrong(value, "an object of keys and values"));
                };
                let mut canonical = Map::new();
                for (key, value) in entries {
                    self.check_key(key)?;
                    canonical.insert(key.clone(), self.check_present(scalar, value)?);
                }
                Ok(Json::Object(canonical))
            }
        }
    }

    /// Checks one element of a set or list, or the value of one entry of a map, and gives its
    /// canonical form.
    ///
    /// # Errors
    /// As [`Field::check`], and for a field without elements. `null` is no element.
    pub fn check_element(&self, value: &Json) -> Result<Json, ValueError> {
        match &self.ty {
            FieldType::Set(scalar) | FieldType::List(scalar) | FieldType::Map(scalar) => {
                self.check_present(scalar, value)
            }
            FieldType::Scalar(_) | FieldType::Text => {
                Err(ValueError::NoElements { field: self.name.clone() })
            }
        }
    }

    /// Checks the key of a map's entry: 1–256 bytes, no control characters.
    ///
    /// # Errors
    /// What is wrong with the key.
    pub fn check_key(&self, key: &str) -> Result<(), ValueError> {
        let why = if key.is_empty() {
            "is empty; give it at least one character".to_owned()
        } else if key.len() > MAP_KEY_BYTES_MAX {
            format!("has {} bytes; at most {MAP_KEY_BYTES_MAX} are allowed", key.len())
        } else if key.chars().any(char::is_control) {
            "contains a control character; use printable characters".to_owned()
        } else {
            return Ok(());
        };
        Err(ValueError::Key { field: self.name.clone(), got: quote_short(key), why })
    }

    /// Reads a value as a person types it. Fields of strings, texts and references take the
    /// words as they stand (`42` is the string "42") unless they are a JSON string in quotes;
    /// a timestamp may go without quotes; anything else is JSON. The result is checked and
    /// canonical, as by [`Field::check`].
    ///
    /// # Errors
    /// As [`Field::check`], and for what is not JSON.
    pub fn parse_text(&self, text: &str) -> Result<Json, ValueError> {
        let value = self.ty.read_text(text).map_err(|e| ValueError::Type {
            field: self.name.clone(),
            got: format!("{}, which is not JSON ({e})", quote_short(text)),
            expected: self.expected(),
        })?;
        self.check(&value)
    }

    /// What the field takes, in words.
    fn expected(&self) -> String {
        match &self.ty {
            FieldType::Scalar(scalar) => scalar.expected().to_owned(),
            FieldType::Text => "a string".to_owned(),
            FieldType::Set(of) | FieldType::List(of) => {
                format!("an array, in which each element is {}", of.expected())
            }
            FieldType::Map(of) => format!("an object, in which each value is {}", of.expected()),
        }
    }

    fn wrong(&self, value: &Json, expected: &str) -> ValueError {
        ValueError::Type { field: self.name.clone(), got: describe(value), expected: expected.to_owned() }
    }

    fn check_array(&self, scalar: &ScalarType, value: &Json) -> Result<Vec<Json>, ValueError> {
        match value {
            Json::Array(elements) => {
                elements.iter().map(|element| self.check_present(scalar, element)).collect()
            }
            _ => Err(self.wrong(value, &self.expected())),
        }
    }

    /// An element: unlike a field it can't be without a value.
    fn check_present(&self, scalar: &ScalarType, value: &Json) -> Result<Json, ValueError> {
        match value.is_null() {
            true => Err(self.wrong(value, scalar.expected())),
            false => self.check_scalar(scalar, value),
        }
    }

    fn check_scalar(&self, scalar: &ScalarType, value: &Json) -> Result<Json, ValueError> {
        let wrong = || self.wrong(value, scalar.expected());
        let canonical = match scalar {
            ScalarType::Bool => Json::Bool(value.as_bool().ok_or_else(wrong)?),
            ScalarType::Int => {
                let int = as_int(value).ok_or_else(wrong)?;
                self.check_bounds(&int.to_string(), |bound| match bound {
                    Bound::Int(bound) => Some(int.cmp(&bound)),
                    Bound::Float(bound) => (int as f64).partial_cmp(&bound),
                })?;
                Json::from(int)
            }
            ScalarType::Float => {
                // Adding zero turns -0.0 into 0.0 and changes nothing else.
                let float = value.as_f64().filter(|f| f.is_finite()).ok_or_else(wrong)? + 0.0;
                self.check_bounds(&float.to_string(), |bound| match bound {
                    Bound::Int(bound) => float.partial_cmp(&(bound as f64)),
                    Bound::Float(bound) => float.partial_cmp(&bound),
                })?;
                Json::from(float)
            }
            ScalarType::String => {
                let string = value.as_str().ok_or_else(wrong)?;
                self.check_length(string.len() as u64)?;
                value.clone()
            }
            ScalarType::Timestamp => {
                let ms = match value {
                    Json::String(text) => timestamp_to_ms(text),
                    _ => as_int(value).filter(|ms| (TIMESTAMP_MIN_MS..=TIMESTAMP_MAX_MS).contains(ms)),
                };
                Json::String(timestamp_from_ms(ms.ok_or_else(wrong)?))
            }
            ScalarType::Json => {
                let canonical = canonicalize(value, 0).map_err(|error| match error {
                    JsonError::TooDeep => ValueError::TooDeep { field: self.name.clone() },
                    JsonError::TooLong { got } => ValueError::TooLong {
                        field: self.name.clone(),
                        got: got as u64,
                        max: VALUE_BYTES_MAX as u64,
                    },
                })?;
                self.check_length(canonical_json(&canonical).len() as u64)?;
                canonical
            }
            ScalarType::Ref(_) => {
                let id = value.as_str().ok_or_else(wrong)?;
                if id.is_empty() || id.len() > ID_BYTES_MAX || id.chars().any(char::is_control) {
                    return Err(wrong());
                }
                value.clone()
            }
            ScalarType::Blob => self.check_blob(value)?,
        };
        if !self.one_of.is_empty() && !self.one_of.contains(&canonical) {
            return Err(ValueError::OneOf {
                field: self.name.clone(),
                got: describe(value),
                allowed: self.one_of.iter().map(describe).collect::<Vec<_>>().join(", "),
            });
        }
        Ok(canonical)
    }

    fn check_bounds(&self, got: &str, cmp: impl Fn(Bound) -> Option<Ordering>) -> Result<(), ValueError> {
        let refuse =
            |bound: String| Err(ValueError::Range { field: self.name.clone(), got: got.to_owned(), bound });
        match (self.min, self.max) {
            (Some(min), _) if cmp(min) == Some(Ordering::Less) => refuse(format!("at least {min}")),
            (_, Some(max)) if cmp(max) == Some(Ordering::Greater) => refuse(format!("at most {max}")),
            _ => Ok(()),
        }
    }

    fn check_length(&self, got: u64) -> Result<(), ValueError> {
        let max = self.max_bytes.unwrap_or(u64::MAX).min(VALUE_BYTES_MAX as u64);
        match got > max {
            true => Err(ValueError::TooLong { field: self.name.clone(), got, max }),
            false => Ok(()),
        }
    }

    fn check_blob(&self, value: &Json) -> Result<Json, ValueError> {
        let wrong = || self.wrong(value, ScalarType::Blob.expected());
        let object = value.as_object().filter(|object| object.len() == 4).ok_or_else(wrong)?;
        let string = |key: &str| object.get(key).and_then(Json::as_str).ok_or_else(wrong);
        let (hash, media, name) = (string("hash")?, string("media")?, string("name")?);
        let size = object.get("size").and_then(as_int).filter(|size| *size >= 0).ok_or_else(wrong)?;
        if hash.is_empty() || [hash, media, name].iter().any(|text| text.len() > ID_BYTES_MAX) {
            return Err(wrong());
        }
        if let Some(max) = self.max_bytes
            && size as u64 > max
        {
            return Err(ValueError::TooLong { field: self.name.clone(), got: size as u64, max });
        }
        let allowed = self.blob.as_ref().map_or(&[][..], |rule| &rule.media);
        if !allowed.is_empty() && !allowed.iter().any(|allowed| allowed == media) {
            return Err(ValueError::OneOf {
                field: self.name.clone(),
                got: quote_short(media),
                allowed: allowed.join(", "),
            });
        }
        let mut canonical = object.clone();
        canonical.insert("size".to_owned(), Json::from(size));
        Ok(Json::Object(canonical))
    }

    /// The order of canonical values of a scalar field or of elements of a container, as
    /// sets keep them and queries sort by: numbers and instants by size, `false` before
    /// `true`, strings by their bytes, anything else by its canonical JSON.
    pub fn compare(&self, a: &Json, b: &Json) -> Ordering {
        match &self.ty {
            FieldType::Scalar(of) | FieldType::Set(of) | FieldType::List(of) | FieldType::Map(of) => {
                compare(of, a, b)
            }
            FieldType::Text => compare(&ScalarType::String, a, b),
        }
    }

    /// What the field is while nothing was written: its default, 0 for a counter, an empty
    /// container, or `null`.
    pub fn empty_value(&self) -> Json {
        match &self.ty {
            FieldType::Scalar(_) if self.policy == Policy::Counter => Json::from(0),
            FieldType::Scalar(_) => self.default.clone().unwrap_or(Json::Null),
            FieldType::Text => Json::String(String::new()),
            FieldType::Set(_) | FieldType::List(_) => Json::Array(Vec::new()),
            FieldType::Map(_) => Json::Object(Map::new()),
        }
    }
}

impl FieldType {
    /// Reads a value as [`Field::parse_text`] does, without checking it.
    pub(crate) fn read_text(&self, text: &str) -> serde_json::Result<Json> {
        let json = || serde_json::from_str::<Json>(text);
        match self {
            FieldType::Text | FieldType::Scalar(ScalarType::String | ScalarType::Ref(_)) => match json() {
                Ok(value @ Json::String(_)) => Ok(value),
                _ => Ok(Json::String(text.to_owned())),
            },
            FieldType::Scalar(ScalarType::Timestamp) => {
                json().or_else(|_| Ok(Json::String(text.trim().to_owned())))
            }
            _ => json(),
        }
    }
}

impl ScalarType {
    fn expected(&self) -> &'static str {
        match self {
            ScalarType::Bool => "true or false",
            ScalarType::Int => "an integer of 64 bits",
            ScalarType::Float => "a number",
            ScalarType::String => "a string",
            ScalarType::Timestamp => {
                "a time such as \"2026-01-01T10:00:00Z\" (RFC 3339, years 0000 to 9999) or integer \
                 milliseconds since 1970"
            }
            ScalarType::Json => "any JSON value",
            ScalarType::Ref(_) => "an entity's id: a string of 1 to 256 bytes without control characters",
            ScalarType::Blob => {
                "{\"hash\": string, \"size\": bytes, \"media\": string, \"name\": string}, each string at \
                 most 256 bytes"
            }
        }
    }
}

/// Milliseconds since 1970 of an RFC 3339 timestamp with any offset; what is finer than a
/// millisecond is cut off. `None` where it is no such timestamp or outside the years 0000–9999.
pub fn timestamp_to_ms(text: &str) -> Option<i64> {
    let nanos = OffsetDateTime::parse(text, &Rfc3339).ok()?.unix_timestamp_nanos();
    let ms = i64::try_from(nanos.div_euclid(1_000_000)).ok()?;
    (TIMESTAMP_MIN_MS..=TIMESTAMP_MAX_MS).contains(&ms).then_some(ms)
}

/// The canonical timestamp: RFC 3339 in UTC, with three digits of fraction where the
/// milliseconds aren't zero. Instants outside the years 0000–9999 become the nearest inside.
pub fn timestamp_from_ms(ms: i64) -> String {
    let ms = ms.clamp(TIMESTAMP_MIN_MS, TIMESTAMP_MAX_MS);
    let (seconds, fraction) = (ms.div_euclid(1_000), ms.rem_euclid(1_000));
    // Inside the range above this can't fail.
    let at = OffsetDateTime::from_unix_timestamp(seconds).unwrap_or(OffsetDateTime::UNIX_EPOCH);
    let (year, month, day) = (at.year(), u8::from(at.month()), at.day());
    let (hour, minute, second) = at.to_hms();
    let mut text = format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}");
    if fraction != 0 {
        let _ = write!(text, ".{fraction:03}");
    }
    text.push('Z');
    text
}

/// JSON with sorted keys and no spaces: equal values are equal bytes. Values that passed
/// [`Field::check`] have their numbers in canonical form too.
///
/// Doesn't recurse, so that no value can exhaust the stack.
pub fn canonical_json(value: &Json) -> String {
    enum Step<'a> {
        Value(&'a Json),
        Key(&'a str),
        Text(&'static str),
    }
    let mut out = String::new();
    let mut todo = vec![Step::Value(value)];
    while let Some(step) = todo.pop() {
        match step {
            Step::Text(text) => out.push_str(text),
            Step::Key(key) => {
                push_json_string(&mut out, key);
                out.push(':');
            }
            Step::Value(Json::Array(elements)) => {
                out.push('[');
                todo.push(Step::Text("]"));
                for (i, element) in elements.iter().enumerate().rev() {
                    todo.push(Step::Value(element));
                    if i > 0 {
                        todo.push(Step::Text(","));
                    }
                }
            }
            Step::Value(Json::Object(entries)) => {
                out.push('{');
                todo.push(Step::Text("}"));
                // Sorted here, not only by the map's type: a dependency elsewhere could switch
                // serde_json to insertion order.
                let mut entries: Vec<_> = entries.iter().collect();
                entries.sort_unstable_by_key(|(key, _)| *key);
                for (i, (key, value)) in entries.into_iter().enumerate().rev() {
                    todo.push(Step::Value(value));
                    todo.push(Step::Key(key));
                    if i > 0 {
                        todo.push(Step::Text(","));
                    }
                }
            }
            Step::Value(Json::String(text)) => push_json_string(&mut out, text),
            Step::Value(Json::Null) => out.push_str("null"),
            Step::Value(Json::Bool(bool)) => out.push_str(if *bool { "true" } else { "false" }),
            Step::Value(Json::Number(number)) => {
                let _ = write!(out, "{number}");
            }
        }
    }
    out
}

fn push_json_string(out: &mut String, text: &str) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            c if (c as u32) < 0x20 => {
                let _ = write!(out, "\\u{:04x}", c as u32);
            }
            c => out.push(c),
        }
    }
    out.push('"');
}

/// Why a JSON value has no canonical form.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum JsonError {
    /// Nested too deeply.
    #[error("JSON nested more than {JSON_DEPTH_MAX} deep; flatten it")]
    TooDeep,
    /// Too long.
    #[error("JSON of {got} bytes; at most {VALUE_BYTES_MAX} are allowed")]
    TooLong {
        /// Length of the canonical form in bytes.
        got: usize,
    },
}

/// The canonical form of any JSON value within [`JSON_DEPTH_MAX`] and [`VALUE_BYTES_MAX`]:
/// floats without a fraction become integers where both are exact, so that `5.0` from one
/// language and `5` from another are equal.
///
/// # Errors
/// A value that is nested too deeply or too long.
pub fn check_json(value: &Json) -> Result<Json, JsonError> {
    let canonical = canonicalize(value, 0)?;
    match canonical_json(&canonical).len() {
        got if got > VALUE_BYTES_MAX => Err(JsonError::TooLong { got }),
        _ => Ok(canonical),
    }
}

fn canonicalize(value: &Json, depth: usize) -> Result<Json, JsonError> {
    Ok(match value {
        Json::Array(_) | Json::Object(_) if depth == JSON_DEPTH_MAX => return Err(JsonError::TooDeep),
        Json::Array(elements) => Json::Array(
            elements.iter().map(|element| canonicalize(element, depth + 1)).collect::<Result<_, _>>()?,
        ),
        Json::Object(entries) => Json::Object(
            entries
                .iter()
                .map(|(key, value)| Ok((key.clone(), canonicalize(value, depth + 1)?)))
                .collect::<Result<_, _>>()?,
        ),
        Json::Number(number) => Json::Number(canonical_number(number)),
        Json::Null | Json::Bool(_) | Json::String(_) => value.clone(),
    })
}

fn canonical_number(number: &Number) -> Number {
    /// Up to here every integer has a float of its own.
    const EXACT: f64 = 9_007_199_254_740_992.0;
    match number.as_f64() {
        Some(float) if number.is_f64() && float.fract() == 0.0 && float.abs() <= EXACT => {
            Number::from(float as i64)
        }
        _ => number.clone(),
    }
}

/// An integer, also where it is written as a float without fraction.
fn as_int(value: &Json) -> Option<i64> {
    /// 2^63, the first float above `i64::MAX`.
    const END: f64 = 9_223_372_036_854_775_808.0;
    let number = value.as_number()?;
    if !number.is_f64() {
        return number.as_i64();
    }
    let float = number.as_f64()?;
    (float.fract() == 0.0 && (-END..END).contains(&float)).then_some(float as i64)
}

fn compare(scalar: &ScalarType, a: &Json, b: &Json) -> Ordering {
    let order = match scalar {
        ScalarType::Bool => a.as_bool().cmp(&b.as_bool()),
        ScalarType::Int => as_int(a).cmp(&as_int(b)),
        ScalarType::Float => a.as_f64().partial_cmp(&b.as_f64()).unwrap_or(Ordering::Equal),
        ScalarType::String | ScalarType::Ref(_) => a.as_str().cmp(&b.as_str()),
        ScalarType::Timestamp => {
            let ms = |value: &Json| value.as_str().and_then(timestamp_to_ms);
            ms(a).cmp(&ms(b))
        }
        ScalarType::Json | ScalarType::Blob => Ordering::Equal,
    };
    // Whatever compares as equal without being equal still needs one order on every device.
    order.then_with(|| if a == b { Ordering::Equal } else { canonical_json(a).cmp(&canonical_json(b)) })
}

/// A value for an error message: short, so that a message can't be as large as its cause.
pub(crate) fn describe(value: &Json) -> String {
    match value {
        Json::Null => "no value (null)".to_owned(),
        Json::Bool(bool) => bool.to_string(),
        Json::Number(number) => number.to_string(),
        Json::String(text) => quote_short(text),
        Json::Array(elements) => format!("an array of {}", elements.len()),
        Json::Object(entries) => format!("an object of {}", entries.len()),
    }
}

pub(super) fn quote_short(text: &str) -> String {
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{:?}…", &text[..end]),
        None => format!("{text:?}"),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::schema::EntityType;

    /// A field from its definition in a schema file.
    fn field(definition: &str) -> Field {
        let source = format!("[t]\nversion = 1\n[t.fields]\nf = {{ {definition} }}\n");
        let ty = EntityType::parse(&source, "test").unwrap();
        ty.fields["f"].clone()
    }

    /// A value of the field is canonically `expected`, and its canonical form is its own.
    #[track_caller]
    fn check(definition: &str, value: Json, expected: Json) {
        let field = field(definition);
        let canonical = field.check(&value).unwrap();
        assert_eq!(canonical_json(&canonical), canonical_json(&expected));
        assert_eq!(canonical_json(&field.check(&canonical).unwrap()), canonical_json(&canonical));
    }

    /// A value of the field is refused with a message that contains `message`.
    #[track_caller]
    fn refuse(definition: &str, value: Json, message: &str) {
        let error = field(definition).check(&value).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
        assert!(error.contains("\"f\""), "names no field: {error}");
    }

    #[test]
    fn ints_are_integers_of_64_bits() {
        check("type = \"int\"", json!(5.0), json!(5));
        check("type = \"int\"", json!(-0.0), json!(0));
        check("type = \"int\"", json!(i64::MIN), json!(i64::MIN));
        check("type = \"int\"", json!(i64::MAX), json!(i64::MAX));
        refuse("type = \"int\"", json!(u64::MAX), "give it an integer of 64 bits");
        refuse("type = \"int\"", json!(9_223_372_036_854_775_808.0), "integer of 64 bits");
        refuse("type = \"int\"", json!(5.5), "got 5.5");
        refuse("type = \"int\"", json!("5"), "got \"5\"");
    }

    #[test]
    fn floats_are_finite_and_have_one_zero() {
        check("type = \"float\"", json!(-0.0), json!(0.0));
        check("type = \"float\"", json!(5), json!(5.0));
        check("type = \"float\"", json!(0.1), json!(0.1));
        refuse("type = \"float\"", json!("NaN"), "give it a number");
    }

    #[test]
    fn timestamps_are_utc_with_milliseconds_where_needed() {
        let ts = "type = \"timestamp\"";
        check(ts, json!("2026-01-01T10:00:00Z"), json!("2026-01-01T10:00:00Z"));
        check(ts, json!("2026-01-01T12:00:00.25+02:00"), json!("2026-01-01T10:00:00.250Z"));
        check(ts, json!("2026-01-01T10:00:00.2509999Z"), json!("2026-01-01T10:00:00.250Z"));
        check(ts, json!("1969-12-31T23:59:59.9999Z"), json!("1969-12-31T23:59:59.999Z"));
        check(ts, json!(0), json!("1970-01-01T00:00:00Z"));
        check(ts, json!(-1), json!("1969-12-31T23:59:59.999Z"));
        check(ts, json!("0000-01-01T00:00:00Z"), json!("0000-01-01T00:00:00Z"));
        check(ts, json!("9999-12-31T23:59:59.999Z"), json!("9999-12-31T23:59:59.999Z"));
        refuse(ts, json!("9999-12-31T23:59:59-01:00"), "RFC 3339");
        refuse(ts, json!("0000-01-01T00:00:00+01:00"), "RFC 3339");
        refuse(ts, json!("2026-01-01"), "RFC 3339");
        refuse(ts, json!("2026-02-30T10:00:00Z"), "RFC 3339");
        refuse(ts, json!(i64::MAX), "years 0000 to 9999");
        refuse(ts, json!(true), "got true");
        assert_eq!(timestamp_from_ms(i64::MIN), "0000-01-01T00:00:00Z");
        assert_eq!(timestamp_from_ms(i64::MAX), "9999-12-31T23:59:59.999Z");
    }

    #[test]
    fn null_means_no_value() {
        check("type = \"string\"", Json::Null, Json::Null);
        check("type = \"set\", of = \"int\"", Json::Null, Json::Null);
        refuse("type = \"string\", required = true", Json::Null, "required");
    }

    #[test]
    fn sets_are_sorted_without_duplicates() {
        check("type = \"set\", of = \"int\"", json!([10, 9, 9.0]), json!([9, 10]));
        check("type = \"set\", of = \"string\"", json!(["b", "a", "b"]), json!(["a", "b"]));
        check(
            "type = \"set\", of = \"timestamp\"",
            json!(["2026-01-01T00:00:00.250Z", "2026-01-01T00:00:00Z", "2026-01-01T01:00:00+01:00"]),
            json!(["2026-01-01T00:00:00Z", "2026-01-01T00:00:00.250Z"]),
        );
        refuse("type = \"set\", of = \"int\"", json!([1, null]), "no value");
        refuse("type = \"set\", of = \"int\"", json!(1), "an array");
    }

    #[test]
    fn lists_keep_order_and_duplicates() {
        check("type = \"list\", of = \"int\"", json!([2, 1.0, 2]), json!([2, 1, 2]));
        refuse("type = \"list\", of = \"int\"", json!({"a": 1}), "an array");
    }

    #[test]
    fn maps_check_keys_and_entries() {
        let map = "type = \"map\", of = \"int\", max = 9";
        check(map, json!({"b": 2.0, "a": 1}), json!({"a": 1, "b": 2}));
        refuse(map, json!({"a": 10}), "at most 9");
        refuse(map, json!({"": 1}), "is empty");
        refuse(map, json!({"a\u{1}": 1}), "control character");
        refuse(map, json!({"a".repeat(257): 1}), "257 bytes");
        refuse(map, json!([1]), "an object");
    }

    #[test]
    fn elements_are_checked_by_themselves() {
        let days = field("type = \"map\", of = \"int\"");
        assert_eq!(days.check_element(&json!(3.0)), Ok(json!(3)));
        assert!(days.check_element(&Json::Null).is_err());
        assert!(days.check_key("monday").is_ok());
        let error = field("type = \"string\"").check_element(&json!("a")).unwrap_err();
        assert!(matches!(error, ValueError::NoElements { .. }));
    }

    #[test]
    fn bounds_lengths_and_lists_of_values_are_enforced() {
        check("type = \"int\", min = 0, max = 9", json!(9), json!(9));
        refuse("type = \"int\", min = 0", json!(-1), "at least 0");
        refuse("type = \"float\", max = 0.5", json!(0.75), "at most 0.5");
        check("type = \"string\", max_bytes = 4", json!("äö"), json!("äö"));
        refuse("type = \"string\", max_bytes = 3", json!("äö"), "got 4 bytes; at most 3");
        refuse("type = \"text\", max_bytes = 3", json!("four"), "at most 3");
        refuse("type = \"json\", max_bytes = 6", json!({"a": 10}), "got 8 bytes");
        refuse("type = \"string\"", json!("x".repeat(VALUE_BYTES_MAX + 1)), "at most 1048576");
        refuse("type = \"string\", one_of = [\"low\", \"high\"]", json!("mid"), "\"low\", \"high\"");
        check("type = \"int\", one_of = [1, 2]", json!(2.0), json!(2));
    }

    #[test]
    fn json_values_are_bounded_and_canonical() {
        check(
            "type = \"json\"",
            json!({"b": [1.0, -0.0, 1.5], "a": null}),
            json!({"a": null, "b": [1, 0, 1.5]}),
        );
        let nested = |depth| (0..depth).fold(json!(1), |inner, _| json!([inner]));
        check("type = \"json\"", nested(JSON_DEPTH_MAX), nested(JSON_DEPTH_MAX));
        refuse("type = \"json\"", nested(JSON_DEPTH_MAX + 1), "64 deep");
        assert_eq!(check_json(&nested(65)), Err(JsonError::TooDeep));
        let long = json!(["x".repeat(VALUE_BYTES_MAX)]);
        assert_eq!(check_json(&long), Err(JsonError::TooLong { got: VALUE_BYTES_MAX + 4 }));
    }

    #[test]
    fn references_are_ids() {
        let hero = "type = \"ref\", to = \"hero\"";
        check(hero, json!("h1"), json!("h1"));
        refuse(hero, json!(""), "an entity's id");
        refuse(hero, json!("a\nb"), "an entity's id");
        refuse(hero, json!(7), "an entity's id");
    }

    #[test]
    fn blobs_name_hash_size_media_and_name() {
        let photo = "type = \"blob\", media = [\"image/png\"], max_bytes = 10";
        let blob =
            |size: Json, media: &str| json!({"hash": "ab", "size": size, "media": media, "name": "a.png"});
        check(photo, blob(json!(10.0), "image/png"), blob(json!(10), "image/png"));
        refuse(photo, blob(json!(11), "image/png"), "got 11 bytes; at most 10");
        refuse(photo, blob(json!(-1), "image/png"), "\"hash\": string");
        refuse(photo, blob(json!(1), "image/gif"), "allowed are image/png");
        refuse(photo, json!({"hash": "ab", "size": 1, "media": "image/png"}), "\"name\": string");
        refuse(photo, json!("ab"), "\"hash\": string");
    }

    #[test]
    fn words_are_read_by_field() {
        let read = |definition: &str, text: &str| field(definition).parse_text(text);
        assert_eq!(read("type = \"string\"", "42"), Ok(json!("42")));
        assert_eq!(read("type = \"string\"", "\"42\""), Ok(json!("42")));
        assert_eq!(read("type = \"string\"", "\"open"), Ok(json!("\"open")));
        assert_eq!(read("type = \"string\"", ""), Ok(json!("")));
        assert_eq!(read("type = \"text\"", "a b"), Ok(json!("a b")));
        assert_eq!(read("type = \"ref\", to = \"x\"", "7"), Ok(json!("7")));
        assert_eq!(read("type = \"timestamp\"", "2026-01-01T10:00:00Z"), Ok(json!("2026-01-01T10:00:00Z")));
        assert_eq!(read("type = \"timestamp\"", "1000"), Ok(json!("1970-01-01T00:00:01Z")));
        assert_eq!(read("type = \"timestamp\"", "null"), Ok(Json::Null));
        assert_eq!(read("type = \"int\"", "5"), Ok(json!(5)));
        assert_eq!(read("type = \"set\", of = \"string\"", "[\"b\",\"a\"]"), Ok(json!(["a", "b"])));
        let error = read("type = \"bool\"", "yes").unwrap_err().to_string();
        assert!(error.contains("not JSON") && error.contains("true or false"), "{error}");
    }

    #[test]
    fn an_unwritten_field_has_a_value_of_its_kind() {
        assert_eq!(field("type = \"int\", merge = \"counter\"").empty_value(), json!(0));
        assert_eq!(field("type = \"bool\", default = false").empty_value(), json!(false));
        assert_eq!(field("type = \"bool\"").empty_value(), Json::Null);
        assert_eq!(field("type = \"map\", of = \"int\"").empty_value(), json!({}));
    }

    #[test]
    fn canonical_json_does_not_recurse() {
        let mut deep = json!(1);
        for _ in 0..200_000 {
            deep = Json::Array(vec![deep]);
        }
        assert_eq!(canonical_json(&deep).len(), 400_001);
        // Dropping it would recurse in serde_json.
        std::mem::forget(deep);
    }

    fn any_json() -> impl Strategy<Value = Json> {
        let leaf = prop_oneof![
            Just(Json::Null),
            any::<bool>().prop_map(Json::from),
            any::<i64>().prop_map(Json::from),
            any::<f64>().prop_map(Json::from),
            ".*".prop_map(Json::from),
        ];
        leaf.prop_recursive(4, 32, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Json::from),
                prop::collection::btree_map(".*", inner, 0..4)
                    .prop_map(|map| Json::Object(map.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn canonical_json_is_the_same_value(value in any_json()) {
            let text = canonical_json(&value);
            prop_assert_eq!(serde_json::to_string(&value).unwrap(), text.clone());
            prop_assert_eq!(serde_json::from_str::<Json>(&text).unwrap(), value);
        }

        #[test]
        fn the_canonical_form_is_its_own(value in any_json()) {
            for definition in [
                "type = \"bool\"", "type = \"int\"", "type = \"float\"", "type = \"string\"",
                "type = \"timestamp\"", "type = \"json\"", "type = \"blob\"", "type = \"text\"",
                "type = \"set\", of = \"int\"", "type = \"list\", of = \"json\"",
                "type = \"map\", of = \"json\"",
            ] {
                let field = field(definition);
                let _ = field.check_element(&value);
                if let Ok(once) = field.check(&value) {
                    prop_assert_eq!(field.check(&once), Ok(once));
                }
            }
        }

        #[test]
        fn timestamps_survive(ms in TIMESTAMP_MIN_MS..=TIMESTAMP_MAX_MS) {
            prop_assert_eq!(timestamp_to_ms(&timestamp_from_ms(ms)), Some(ms));
        }

        #[test]
        fn no_text_panics(text in ".*") {
            let _ = timestamp_to_ms(&text);
            for definition in ["type = \"timestamp\"", "type = \"json\"", "type = \"string\""] {
                let _ = field(definition).parse_text(&text);
            }
        }
    }
}
