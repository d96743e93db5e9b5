//! What stands behind one key of a schema file: names, policies, bounds, defaults.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value as Json;
use toml_edit::{Item, Value};

use super::words::did_you_mean;
use super::{Entry, POLICIES, Reader, name_misfit, policy_names};
use crate::id::NAME_BYTES_MAX;
use crate::schema::model::{
    BlobRule, Bound, Field, FieldType, Keep, Policy, ScalarType, Tie, VALUE_POLICIES,
};
use crate::schema::value::{JSON_DEPTH_MAX, describe, quote_short};

impl Reader<'_> {
    pub(super) fn check_type_name(&mut self, name: &str, at: usize) {
        let mut chars = name.chars();
        let fits = chars.next().is_some_and(|c| c.is_ascii_lowercase())
            && chars.all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_');
        if name.starts_with('_') {
            self.error(at, format!("type {}: names that start with _ are reserved", quote_short(name)));
        } else if !fits {
            self.error(
                at,
                format!(
                    "type {}: a type's name starts with a-z and goes on with a-z, 0-9 and _",
                    quote_short(name)
                ),
            );
        } else if name.len() > NAME_BYTES_MAX {
            self.error(at, format!("type {}: at most {NAME_BYTES_MAX} bytes", quote_short(name)));
        }
    }

    pub(super) fn check_field_name(&mut self, path: &str, name: &str, at: usize) {
        if name == "id" {
            self.error(
                at,
                format!("{path}: every entity has an \"id\" already; give this field another name"),
            );
        } else if let Some(why) = name_misfit(name) {
            self.error(at, format!("{path}: the field name {} {why}", quote_short(name)));
        }
    }

    pub(super) fn group_name(&mut self, path: &str, entry: Entry<'_>) -> Option<String> {
        let name = self.string(path, entry)?;
        match name_misfit(name) {
            None => Some(name.to_owned()),
            Some(why) => {
                self.error(entry.at, format!("{path}: the group name {} {why}", quote_short(name)));
                None
            }
        }
    }

    pub(super) fn policy(&mut self, path: &str, entry: Entry<'_>) -> Option<Policy> {
        let name = self.string(path, entry)?;
        let found = POLICIES.iter().find(|policy| policy.name() == name).copied();
        if found.is_none() {
            let names: Vec<&str> = POLICIES.iter().map(|policy| policy.name()).collect();
            let hint = did_you_mean(name, &names);
            self.error(entry.at, format!("{path}: no policy {}; {hint}", quote_short(name)));
        }
        found
    }

    pub(super) fn type_policy(&mut self, path: &str, entry: Entry<'_>, policy: Policy) -> Option<Policy> {
        if VALUE_POLICIES.contains(&policy) {
            return Some(policy);
        }
        let why = match policy {
            Policy::Max | Policy::Min => "compares numbers, which not every field is",
            Policy::Counter => "sums integers, which not every field is",
            _ => "belongs to the fields of that type, which have it without being told",
        };
        self.error(
            entry.at,
            format!(
                "{path}: {:?} {why}; set it at a field, or give the type one of {}",
                policy.name(),
                policy_names(VALUE_POLICIES)
            ),
        );
        None
    }

    pub(super) fn policy_misfit(&mut self, path: &str, entry: Entry<'_>, ty: &FieldType, policy: Policy) {
        let hint = match policy {
            Policy::Text | Policy::Set | Policy::List | Policy::Map => {
                format!(", or type = {:?}", policy.name())
            }
            _ => String::new(),
        };
        self.error(
            entry.at,
            format!(
                "{path}: merge = {:?} does not fit {}; use {}{hint}",
                policy.name(),
                ty.description(),
                policy_names(&ty.allowed_policies()),
            ),
        );
    }

    pub(super) fn tie(&mut self, path: &str, entry: Entry<'_>) -> Option<Tie> {
        match self.string(path, entry)? {
            "clock" => Some(Tie::Clock),
            "manual" => Some(Tie::Manual),
            other => {
                let hint = did_you_mean(other, &["clock", "manual"]);
                self.error(entry.at, format!("{path}: no tie {}; {hint}", quote_short(other)));
                None
            }
        }
    }

    pub(super) fn blob_rule(&mut self, path: &str, keys: &BTreeMap<&str, Entry<'_>>) -> BlobRule {
        let mut rule = BlobRule::default();
        if let Some(entry) = keys.get("media") {
            for (at, name) in self.strings(path, *entry) {
                let fits = name.len() <= 255
                    && name.split_once('/').is_some_and(|(kind, subtype)| {
                        let fits = |part: &str| {
                            !part.is_empty()
                                && part.bytes().all(|b| b.is_ascii_graphic() && b != b'/' && b != b'*')
                        };
                        fits(kind) && fits(subtype)
                    });
                if !fits {
                    self.error(
                        at,
                        format!("{path}: {} is no media type; write it as \"image/png\"", quote_short(&name)),
                    );
                } else if rule.media.contains(&name) {
                    self.error(at, format!("{path}: {name:?} is twice in `media`; remove one"));
                } else {
                    rule.media.push(name);
                }
            }
            // Their order means nothing, so it makes no other schema.
            rule.media.sort();
        }
        if let (Some(_), Some(days)) = (keys.get("keep"), keys.get("keep_days")) {
            self.error(days.key_at, format!("{path}: `keep` and `keep_days` exclude each other; remove one"));
        }
        if let Some(entry) = keys.get("keep") {
            match self.string(path, *entry) {
                Some("forever") => rule.keep = Keep::Forever,
                Some("cached") | None => {}
                Some(other) => {
                    let hint = did_you_mean(other, &["forever", "cached"]);
                    self.error(entry.at, format!("{path}: no keep {}; {hint}", quote_short(other)));
                }
            }
        } else if let Some(entry) = keys.get("keep_days")
            && let Some(days) = self.number(path, *entry, 1, i64::from(u32::MAX))
        {
            rule.keep = Keep::Days(days as u32);
        }
        rule
    }

    pub(super) fn bound(&mut self, path: &str, entry: Entry<'_>, scalar: &ScalarType) -> Option<Bound> {
        let key = entry.key;
        match scalar {
            ScalarType::Int => match entry.item.as_integer() {
                Some(bound) => Some(Bound::Int(bound)),
                None => {
                    self.error(
                        entry.at,
                        format!("{path}: `{key}` of an int must be an integer, as in {key} = 1"),
                    );
                    None
                }
            },
            ScalarType::Float => {
                // Compared as floats, kept as floats: `0` and `0.0` are one bound.
                let bound = match entry.item.as_integer() {
                    Some(int) => Some(int as f64).filter(|float| *float as i128 == i128::from(int)),
                    None => entry.item.as_float().filter(|float| float.is_finite()),
                };
                if bound.is_none() {
                    self.error(
                        entry.at,
                        format!(
                            "{path}: `{key}` of a float must be a number that a 64-bit float holds exactly"
                        ),
                    );
                }
                bound.map(|bound| Bound::Float(bound + 0.0))
            }
            _ => {
                self.error(entry.key_at, format!("{path}: `{key}` is for int and float; remove it"));
                None
            }
        }
    }

    pub(super) fn one_of(
        &mut self,
        path: &str,
        entry: Entry<'_>,
        field: &Field,
        scalar: &ScalarType,
    ) -> Vec<Json> {
        let mut allowed = Vec::new();
        if !matches!(scalar, ScalarType::String | ScalarType::Int) {
            self.error(entry.key_at, format!("{path}: `one_of` is for string and int; remove it"));
            return allowed;
        }
        let Some(array) = entry.item.as_array().filter(|array| !array.is_empty()) else {
            self.error(entry.at, format!("{path}: `one_of` must be a list of at least one value"));
            return allowed;
        };
        // Checked as one value, whether the field holds one or many.
        let mut single = field.clone();
        single.ty = FieldType::Scalar(scalar.clone());
        let mut seen = BTreeSet::new();
        for value in array {
            let at = value.span().map_or(entry.at, |span| span.start);
            let Some(value) = self.json_value(path, value, at) else { continue };
            match single.check(&value) {
                Ok(value) if !seen.insert(value.to_string()) => {
                    self.error(at, format!("{path}: {} is twice in `one_of`; remove one", describe(&value)));
                }
                Ok(value) => allowed.push(value),
                Err(error) => self.error(at, format!("{path}: `one_of`: {error}")),
            }
        }
        allowed
    }

    pub(super) fn unknown_key(&mut self, path: &str, entry: Entry<'_>, allowed: &[&str]) {
        let hint = did_you_mean(entry.key, allowed);
        self.error(entry.key_at, format!("{path}: no key {}; {hint}", quote_short(entry.key)));
    }

    pub(super) fn mistyped(&mut self, path: &str, entry: Entry<'_>, expected: &str) {
        let found = entry.item.type_name();
        self.error(entry.at, format!("{path}: `{}` is of kind {found}; make it {expected}", entry.key));
    }

    pub(super) fn string<'i>(&mut self, path: &str, entry: Entry<'i>) -> Option<&'i str> {
        let found = entry.item.as_str();
        if found.is_none() {
            self.mistyped(path, entry, "a string in quotes");
        }
        found
    }

    pub(super) fn bool(&mut self, path: &str, entry: Entry<'_>) -> Option<bool> {
        let found = entry.item.as_bool();
        if found.is_none() {
            self.mistyped(path, entry, "true or false");
        }
        found
    }

    pub(super) fn number(&mut self, path: &str, entry: Entry<'_>, least: i64, greatest: i64) -> Option<i64> {
        let found = entry.item.as_integer();
        match found {
            None => self.mistyped(path, entry, "an integer"),
            Some(number) if !(least..=greatest).contains(&number) => {
                self.error(
                    entry.at,
                    format!("{path}: `{}` is {number}; make it {least} to {greatest}", entry.key),
                );
                return None;
            }
            Some(_) => {}
        }
        found
    }

    pub(super) fn strings(&mut self, path: &str, entry: Entry<'_>) -> Vec<(usize, String)> {
        let strings: Option<Vec<(usize, String)>> = entry.item.as_array().and_then(|array| {
            array
                .iter()
                .map(|value| {
                    let at = value.span().map_or(entry.at, |span| span.start);
                    Some((at, value.as_str()?.to_owned()))
                })
                .collect()
        });
        match strings {
            Some(strings) if !strings.is_empty() => strings,
            _ => {
                self.mistyped(path, entry, "a list of at least one string");
                Vec::new()
            }
        }
    }

    pub(super) fn json(&mut self, path: &str, item: &Item, at: usize) -> Option<Json> {
        match item {
            Item::Value(value) => self.json_value(path, value, at),
            // A default written as a table of its own: [type.fields.name.default]
            Item::Table(table) => {
                self.json_value(path, &Value::InlineTable(table.clone().into_inline_table()), at)
            }
            Item::None | Item::ArrayOfTables(_) => {
                self.error(at, format!("{path}: write this value inline, as in [{{ a = 1 }}]"));
                None
            }
        }
    }

    pub(super) fn json_value(&mut self, path: &str, value: &Value, at: usize) -> Option<Json> {
        self.json_below(path, value, at, 0)
    }

    /// The library's own bound is 80 tables inside each other, each under a key of 80 parts: too deep for
    /// a thread's stack.
    fn json_below(&mut self, path: &str, value: &Value, at: usize, depth: usize) -> Option<Json> {
        let at = value.span().map_or(at, |span| span.start);
        if depth == JSON_DEPTH_MAX && matches!(value, Value::Array(_) | Value::InlineTable(_)) {
            self.error(at, format!("{path}: nested more than {JSON_DEPTH_MAX} deep; flatten it"));
            return None;
        }
        let depth = depth + 1;
        Some(match value {
            Value::String(string) => Json::String(string.value().clone()),
            Value::Integer(int) => Json::from(*int.value()),
            Value::Float(float) if float.value().is_finite() => Json::from(*float.value()),
            Value::Float(_) => {
                self.error(at, format!("{path}: not a finite number; write one with digits"));
                return None;
            }
            Value::Boolean(bool) => Json::Bool(*bool.value()),
            Value::Datetime(datetime) => Json::String(datetime.value().to_string()),
            Value::Array(array) => Json::Array(
                array.iter().map(|value| self.json_below(path, value, at, depth)).collect::<Option<_>>()?,
            ),
            Value::InlineTable(table) => Json::Object(
                table
                    .iter()
                    .map(|(key, value)| Some((key.to_owned(), self.json_below(path, value, at, depth)?)))
                    .collect::<Option<_>>()?,
            ),
        })
    }
}
