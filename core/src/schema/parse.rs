//! From a schema file to a [`Schema`]: every rule of the language, and every error with its
//! line, what is wrong and what would be right.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde_json::Value as Json;
use toml_edit::{Document, Item, TableLike, Value};

use super::model::{
    BlobRule, Bound, EntityType, Field, FieldType, Group, Keep, Policy, ScalarType, Schema, Tie,
};
use super::value::{VALUE_BYTES_MAX, describe, quote_short};
use crate::id::NAME_BYTES_MAX;

/// Longest schema file in bytes.
pub const SOURCE_BYTES_MAX: usize = 1 << 20;
/// Most types of a schema.
pub const TYPES_MAX: usize = 1_000;
/// Most fields of a type.
pub const FIELDS_MAX: usize = 1_000;
/// Most errors reported at once; further ones are counted.
pub const ERRORS_MAX: usize = 100;

/// One mistake in a schema file. Prints as `file:line: message`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{file}:{line}: {message}")]
pub struct SchemaError {
    /// The file as the caller named it.
    pub file: String,
    /// Line, counted from 1.
    pub line: usize,
    /// What is wrong and what would be right.
    pub message: String,
}

/// Every mistake found in a schema file, by line. A retry can't help: the file must change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SchemaErrors {
    /// At least one and at most [`ERRORS_MAX`].
    pub errors: Vec<SchemaError>,
    /// How many more there were.
    pub omitted: usize,
}

impl fmt::Display for SchemaErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, error) in self.errors.iter().enumerate() {
            if i > 0 {
                f.write_str("\n")?;
            }
            write!(f, "{error}")?;
        }
        match self.omitted {
            0 => Ok(()),
            omitted => write!(f, "\nand {omitted} more"),
        }
    }
}

impl std::error::Error for SchemaErrors {}

impl Schema {
    /// Reads a schema file. `file` is its name in errors.
    ///
    /// # Errors
    /// Every mistake in the file, not only the first; of TOML's syntax, the first.
    pub fn parse(source: &str, file: &str) -> Result<Self, SchemaErrors> {
        let mut reader = Reader::new(source, file);
        let types = reader.types(source);
        reader.check_references();
        reader.finish(Schema { types })
    }

    /// The schema of types that were made by other means, each checked by the rules of a
    /// file. Lines in errors are those of [`Schema::to_toml`].
    ///
    /// # Errors
    /// As [`Schema::parse`]; and two types of one name, or a type that no file can express.
    pub fn from_types(types: impl IntoIterator<Item = EntityType>) -> Result<Self, SchemaErrors> {
        const FILE: &str = "<types>";
        let mut by_name = BTreeMap::new();
        for ty in types {
            if let Some(twice) = by_name.insert(ty.name.clone(), ty) {
                let message =
                    format!("type {} is given twice; name each type once", quote_short(&twice.name));
                return Err(one_error(FILE, message));
            }
        }
        let given = Schema { types: by_name };
        let read = Schema::parse(&given.to_toml(), FILE)?;
        for (name, ty) in &given.types {
            if read.types.get(name) != Some(ty) {
                let message = format!(
                    "type {} isn't in the form that its schema file gives it; build it with EntityType::parse",
                    quote_short(name)
                );
                return Err(one_error(FILE, message));
            }
        }
        Ok(read)
    }
}

impl EntityType {
    /// Reads a file of exactly one type. The types that its references name are not looked
    /// for; [`Schema::from_types`] does so.
    ///
    /// # Errors
    /// As [`Schema::parse`], and for none or more than one type.
    pub fn parse(source: &str, file: &str) -> Result<Self, SchemaErrors> {
        let mut reader = Reader::new(source, file);
        let mut types = reader.types(source);
        if reader.errors.is_empty() && types.len() != 1 {
            reader.error(0, format!("found {} types; define exactly one", types.len()));
        }
        let ty = types.pop_first().map(|(_, ty)| ty);
        match reader.finish(ty)? {
            Some(ty) => Ok(ty),
            None => Err(one_error(file, "found no type; define exactly one".to_owned())),
        }
    }
}

fn one_error(file: &str, message: String) -> SchemaErrors {
    SchemaErrors { errors: vec![SchemaError { file: file.to_owned(), line: 1, message }], omitted: 0 }
}

const TYPE_KEYS: &[&str] = &["version", "merge", "group", "index", "unique", "priority", "fields"];
const FIELD_KEYS: &[&str] = &[
    "type",
    "of",
    "to",
    "merge",
    "group",
    "required",
    "one_of",
    "min",
    "max",
    "max_bytes",
    "default",
    "tie",
    "media",
    "keep",
    "keep_days",
];
const SCALARS: &[&str] = &["bool", "int", "float", "string", "timestamp", "json", "ref", "blob"];
const CONTAINERS: &[&str] = &["text", "set", "list", "map"];
const POLICIES: &[Policy] = &[
    Policy::ServerWins,
    Policy::ServerOnly,
    Policy::ClientWins,
    Policy::Lww,
    Policy::FirstWrite,
    Policy::Max,
    Policy::Min,
    Policy::Counter,
    Policy::Set,
    Policy::List,
    Policy::Map,
    Policy::Text,
    Policy::Manual,
];
/// What any single value can have, and therefore a type as the default of its fields.
const VALUE_POLICIES: &[Policy] = &[
    Policy::ServerWins,
    Policy::ServerOnly,
    Policy::ClientWins,
    Policy::Lww,
    Policy::FirstWrite,
    Policy::Manual,
];

/// Words from other systems, and ours.
const OTHER_WORDS: &[(&str, &str)] = &[
    ("integer", "int"),
    ("number", "float"),
    ("double", "float"),
    ("boolean", "bool"),
    ("str", "string"),
    ("date", "timestamp"),
    ("datetime", "timestamp"),
    ("time", "timestamp"),
    ("array", "list"),
    ("vec", "list"),
    ("object", "json"),
    ("reference", "ref"),
    ("file", "blob"),
    ("attachment", "blob"),
    ("last_write_wins", "lww"),
    ("last_writer_wins", "lww"),
    ("last_write", "lww"),
    ("first_write_wins", "first_write"),
    ("sum", "counter"),
    ("union", "set"),
    ("read_only", "server_only"),
    ("values", "one_of"),
    ("enum", "one_of"),
    ("max_len", "max_bytes"),
    ("max_length", "max_bytes"),
    ("mime", "media"),
    ("policy", "merge"),
    ("indexes", "index"),
];

/// A key and its value, with their places in the source.
#[derive(Clone, Copy)]
struct Entry<'a> {
    key: &'a str,
    key_at: usize,
    item: &'a Item,
    at: usize,
}

fn entries<'a>(table: &'a dyn TableLike, fallback_at: usize) -> Vec<Entry<'a>> {
    table
        .iter()
        .map(|(key, item)| {
            let key_at = table.key(key).and_then(|key| key.span()).map_or(fallback_at, |span| span.start);
            let at = item.span().map_or(key_at, |span| span.start);
            Entry { key, key_at, item, at }
        })
        .collect()
}

/// What a type says about fields that don't say it themselves.
struct TypeDefaults {
    policy: Policy,
    group: Option<String>,
}

struct Reader<'a> {
    file: &'a str,
    line_starts: Vec<usize>,
    errors: Vec<SchemaError>,
    omitted: usize,
    /// Names of types, the faulty ones included: a reference to one is no second error.
    declared: BTreeSet<String>,
    /// Place, referring field, and the type referred to.
    references: Vec<(usize, String, String)>,
}

impl<'a> Reader<'a> {
    fn new(source: &str, file: &'a str) -> Self {
        let line_starts = source.match_indices('\n').map(|(i, _)| i + 1).collect();
        Self {
            file,
            line_starts,
            errors: Vec::new(),
            omitted: 0,
            declared: BTreeSet::new(),
            references: Vec::new(),
        }
    }

    fn error(&mut self, at: usize, message: impl Into<String>) {
        if self.errors.len() == ERRORS_MAX {
            self.omitted += 1;
            return;
        }
        let line = 1 + self.line_starts.partition_point(|start| *start <= at);
        self.errors.push(SchemaError { file: self.file.to_owned(), line, message: message.into() });
    }

    fn finish<T>(mut self, done: T) -> Result<T, SchemaErrors> {
        if self.errors.is_empty() {
            return Ok(done);
        }
        self.errors.sort_by_key(|error| error.line);
        Err(SchemaErrors { errors: self.errors, omitted: self.omitted })
    }

    fn types(&mut self, source: &str) -> BTreeMap<String, EntityType> {
        let mut types = BTreeMap::new();
        if source.len() > SOURCE_BYTES_MAX {
            self.error(0, format!("{} bytes; a schema file has at most {SOURCE_BYTES_MAX}", source.len()));
            return types;
        }
        let document = match Document::parse(source) {
            Ok(document) => document,
            Err(error) => {
                let at = error.span().map_or(0, |span| span.start);
                let message: Vec<&str> = error.message().lines().collect();
                self.error(at, format!("not TOML: {}", message.join("; ")));
                return types;
            }
        };
        let entries = entries(document.as_table(), 0);
        if entries.len() > TYPES_MAX {
            self.error(0, format!("{} types; a schema has at most {TYPES_MAX}", entries.len()));
            return types;
        }
        self.declared = entries.iter().map(|entry| entry.key.to_owned()).collect();
        for entry in entries {
            if let Some(ty) = self.entity_type(entry) {
                types.insert(ty.name.clone(), ty);
            }
        }
        types
    }

    fn check_references(&mut self) {
        for (at, path, to) in std::mem::take(&mut self.references) {
            if !self.declared.contains(&to) {
                let names: Vec<&str> = self.declared.iter().map(String::as_str).collect();
                let hint = suggest(&to, &names).map(|near| format!("did you mean {near:?}?"));
                let hint = hint.unwrap_or_else(|| "name a type of this file".to_owned());
                self.error(at, format!("{path}: no type {} in this schema; {hint}", quote_short(&to)));
            }
        }
    }

    fn entity_type(&mut self, entry: Entry<'_>) -> Option<EntityType> {
        let name = entry.key;
        self.check_type_name(name, entry.key_at);
        let Some(table) = entry.item.as_table_like() else {
            let found = entry.item.type_name();
            self.error(
                entry.key_at,
                format!("{} is not a type but of kind {found}; define types as [name]", quote_short(name)),
            );
            return None;
        };
        let path = short_name(name);
        let (mut version, mut policy, mut group, mut priority) = (None, None, None, 0);
        let (mut index, mut unique, mut fields) = (None, None, None);
        for entry in entries(table, entry.key_at) {
            match entry.key {
                "version" => version = Some(self.number(&path, entry, 1, i64::from(u32::MAX))),
                "merge" => policy = self.policy(&path, entry).and_then(|p| self.type_policy(&path, entry, p)),
                "group" => group = self.group_name(&path, entry),
                "priority" => {
                    priority = self
                        .number(&path, entry, i64::from(i32::MIN), i64::from(i32::MAX))
                        .unwrap_or(0) as i32;
                }
                "index" => index = Some(entry),
                "unique" => unique = Some(entry),
                "fields" => fields = Some(entry),
                _ => self.unknown_key(&path, entry, TYPE_KEYS),
            }
        }
        let version = match version {
            Some(version) => version.unwrap_or(1) as u32,
            None => {
                self.error(entry.key_at, format!("{path}: no `version`; add `version = 1`"));
                1
            }
        };
        let Some(fields_entry) = fields else {
            self.error(entry.key_at, format!("{path}: no `fields`; add a table [{path}.fields]"));
            return None;
        };
        let defaults = TypeDefaults { policy: policy.unwrap_or(Policy::Lww), group };
        let (fields, declared) = self.fields(&path, fields_entry, &defaults)?;
        let groups = self.groups(&path, &fields, fields_entry);
        let indexes = index.map(|entry| self.key_lists(&path, entry, &fields, &declared)).unwrap_or_default();
        let unique = unique.map(|entry| self.key_lists(&path, entry, &fields, &declared)).unwrap_or_default();
        let fields = fields.into_iter().map(|(name, (_, field))| (name, field)).collect();
        Some(EntityType {
            name: name.to_owned(),
            version,
            // One spelling of the default, so that writing it down makes no other schema.
            default_policy: policy.filter(|policy| *policy != Policy::Lww),
            fields,
            groups,
            indexes,
            unique,
            priority,
        })
    }

    /// The fields with their places, and every name that was declared, faulty or not.
    #[allow(clippy::type_complexity)]
    fn fields(
        &mut self,
        path: &str,
        entry: Entry<'_>,
        defaults: &TypeDefaults,
    ) -> Option<(BTreeMap<String, (usize, Field)>, BTreeSet<String>)> {
        let Some(table) = entry.item.as_table_like() else {
            self.error(entry.key_at, format!("{path}: `fields` must be a table; write [{path}.fields]"));
            return None;
        };
        let entries = entries(table, entry.key_at);
        if entries.len() > FIELDS_MAX {
            self.error(entry.key_at, format!("{path}: {} fields; at most {FIELDS_MAX}", entries.len()));
            return None;
        }
        let declared: BTreeSet<String> = entries.iter().map(|entry| entry.key.to_owned()).collect();
        let mut fields = BTreeMap::new();
        for entry in entries {
            self.check_field_name(path, entry.key, entry.key_at);
            if let Some(field) = self.field(path, entry, defaults) {
                fields.insert(entry.key.to_owned(), (entry.key_at, field));
            }
        }
        Some((fields, declared))
    }

    fn field(&mut self, type_path: &str, entry: Entry<'_>, defaults: &TypeDefaults) -> Option<Field> {
        let path = &format!("{type_path}.{}", short_name(entry.key));
        let Some(table) = entry.item.as_table_like() else {
            self.error(
                entry.key_at,
                format!(
                    "{path}: a field is a table; write {} = {{ type = \"string\" }}",
                    short_name(entry.key)
                ),
            );
            return None;
        };
        let mut keys: BTreeMap<&str, Entry<'_>> = BTreeMap::new();
        for entry in entries(table, entry.key_at) {
            match FIELD_KEYS.contains(&entry.key) {
                true => drop(keys.insert(entry.key, entry)),
                false => self.unknown_key(path, entry, FIELD_KEYS),
            }
        }
        let key = |name: &str| keys.get(name).copied();

        let ty = self.field_type(path, entry.key_at, &keys);
        let own_policy = key("merge").map(|entry| (entry, self.policy(path, entry)));
        let own_group = key("group").map(|entry| (entry, self.group_name(path, entry)));
        let required = key("required").and_then(|entry| self.bool(path, entry)).unwrap_or(false);
        let tie = key("tie").and_then(|entry| self.tie(path, entry)).unwrap_or_default();
        let max_bytes = key("max_bytes").and_then(|entry| self.number(path, entry, 1, i64::MAX));
        let blob = self.blob_rule(path, &keys);
        let ty = ty?;
        let scalar = ty.scalar();

        let policy = match (own_policy, ty.implied_policy()) {
            (Some((entry, Some(policy))), implied) => {
                if !ty.allowed_policies().contains(&policy) {
                    self.policy_misfit(path, entry, &ty, policy);
                }
                match (policy, implied) {
                    // The map itself merges by key; its entries take the newest.
                    (Policy::Map, Some(implied)) => implied,
                    _ => policy,
                }
            }
            // A policy that can't be read has been reported; no guess may add errors to it.
            (Some((_, None)), _) => return None,
            (None, Some(implied)) => implied,
            (None, None) => defaults.policy,
        };

        let group_is_own = own_group.is_some();
        let mut group = match own_group {
            Some((entry, group)) => group.map(|group| (entry.at, group)),
            None => defaults.group.clone().map(|group| (entry.key_at, group)),
        };
        if let Some((at, group_name)) = &group {
            let misfit = match (&ty, policy) {
                (FieldType::Scalar(_), Policy::Counter) => Some("a counter".to_owned()),
                (FieldType::Scalar(_), Policy::Max | Policy::Min) => Some(format!("{:?}", policy.name())),
                (FieldType::Scalar(_), _) => None,
                _ => Some(format!("a {}", ty.name())),
            };
            if let Some(misfit) = misfit {
                let fix = match group_is_own {
                    true => "remove its `group`",
                    false => "remove the type's `group` and name the group at the fields that belong to it",
                };
                self.error(
                    *at,
                    format!(
                        "{path}: {misfit} merges by itself and can't be part of the group {group_name:?}, which is \
                         resolved as one; {fix}"
                    ),
                );
                group = None;
            }
        }

        if let Some(entry) = key("tie")
            && tie == Tie::Manual
            && policy != Policy::Lww
        {
            self.error(
                entry.key_at,
                format!(
                    "{path}: `tie` decides between equal times, which only \"lww\" compares; remove it, or use \
                     merge = \"lww\" instead of {:?}",
                    policy.name()
                ),
            );
        }
        if !matches!(ty, FieldType::Scalar(_)) {
            for name in ["required", "default"] {
                if let Some(entry) = key(name) {
                    let what = ty.name();
                    self.error(
                        entry.key_at,
                        format!("{path}: a {what} is there from the start, empty; remove `{name}`"),
                    );
                }
            }
        }
        if matches!(ty, FieldType::Scalar(_)) && policy == Policy::Counter {
            for name in ["required", "one_of", "min", "max", "default"] {
                if let Some(entry) = key(name) {
                    self.error(
                        entry.key_at,
                        format!(
                            "{path}: a counter is the sum of increments from 0 and no device sees the others'; \
                             remove `{name}`"
                        ),
                    );
                }
            }
        }
        if let (Some(max), Some(entry)) = (max_bytes, key("max_bytes")) {
            match scalar {
                ScalarType::Blob => {}
                ScalarType::String | ScalarType::Json if max as usize <= VALUE_BYTES_MAX => {}
                ScalarType::String | ScalarType::Json => self.error(
                    entry.at,
                    format!(
                        "{path}: `max_bytes` of a value is at most {VALUE_BYTES_MAX}; use a blob for more"
                    ),
                ),
                _ => self.error(
                    entry.key_at,
                    format!("{path}: `max_bytes` is for string, text, json and blob; remove it"),
                ),
            }
        }
        for name in ["media", "keep", "keep_days"] {
            if let Some(entry) = key(name)
                && scalar != ScalarType::Blob
            {
                self.error(entry.key_at, format!("{path}: `{name}` is for blob; remove it"));
            }
        }
        let min = key("min").and_then(|entry| self.bound(path, entry, &scalar));
        let max = key("max").and_then(|entry| self.bound(path, entry, &scalar));
        if let (Some(low), Some(high)) = (min, max)
            && low.is_above(high)
        {
            let at = key("min").map_or(entry.key_at, |entry| entry.at);
            self.error(at, format!("{path}: min {low} is above max {high}; swap them"));
        }

        let mut field = Field {
            name: entry.key.to_owned(),
            ty,
            policy,
            group: group.map(|(_, group)| group),
            required: false,
            one_of: Vec::new(),
            min,
            max,
            max_bytes: max_bytes.map(|max| max as u64),
            default: None,
            tie,
            blob: (scalar == ScalarType::Blob).then_some(blob),
        };
        if let Some(entry) = key("one_of") {
            field.one_of = self.one_of(path, entry, &field, &scalar);
        }
        if let Some(entry) = key("default")
            && let FieldType::Scalar(scalar) = &field.ty
        {
            if *scalar == ScalarType::Blob {
                self.error(entry.key_at, format!("{path}: a blob has no default; remove it"));
            } else if let Some(value) = self.json(path, entry.item, entry.at) {
                match field.check(&value) {
                    Ok(value) => field.default = Some(value),
                    Err(error) => self.error(entry.at, format!("{path}: `default`: {error}")),
                }
            }
        }
        field.required = required;
        Some(field)
    }

    fn field_type(&mut self, path: &str, at: usize, keys: &BTreeMap<&str, Entry<'_>>) -> Option<FieldType> {
        let Some(entry) = keys.get("type") else {
            self.error(at, format!("{path}: no `type`; add one of {}", type_names()));
            return None;
        };
        let name = self.string(path, *entry)?;
        let container: Option<fn(ScalarType) -> FieldType> = match name {
            "set" => Some(FieldType::Set),
            "list" => Some(FieldType::List),
            "map" => Some(FieldType::Map),
            _ => None,
        };
        if let (None, Some(of)) = (&container, keys.get("of")) {
            self.error(of.key_at, format!("{path}: `of` is for set, list and map; remove it"));
        }
        let scalar_entry = match container {
            None => Some(*entry),
            Some(_) => keys.get("of").copied(),
        };
        let Some(scalar_entry) = scalar_entry else {
            self.error(
                entry.at,
                format!("{path}: a {name} needs `of`, the type of its elements; add of = \"string\""),
            );
            return None;
        };
        let scalar_name = self.string(path, scalar_entry)?;
        let to = keys.get("to").copied();
        if let (true, Some(to)) = (scalar_name != "ref", to) {
            self.error(to.key_at, format!("{path}: `to` is for ref; remove it"));
        }
        let scalar = match scalar_name {
            "bool" => ScalarType::Bool,
            "int" => ScalarType::Int,
            "float" => ScalarType::Float,
            "string" => ScalarType::String,
            "timestamp" => ScalarType::Timestamp,
            "json" => ScalarType::Json,
            "blob" => ScalarType::Blob,
            "ref" => {
                let Some(to) = to else {
                    self.error(
                        scalar_entry.at,
                        format!("{path}: a ref needs `to`; add to = \"…\" with the type it refers to"),
                    );
                    return None;
                };
                let name = self.string(path, to)?.to_owned();
                self.references.push((to.at, path.to_owned(), name.clone()));
                ScalarType::Ref(name)
            }
            "text" if container.is_none() => return Some(FieldType::Text),
            _ if container.is_some() && CONTAINERS.contains(&scalar_name) => {
                self.error(
                    scalar_entry.at,
                    format!(
                        "{path}: elements are single values, not {scalar_name}; use one of {}, of which json \
                         holds anything as one unit",
                        SCALARS.join(", ")
                    ),
                );
                return None;
            }
            _ => {
                let candidates: Vec<&str> = match container {
                    None => SCALARS.iter().chain(CONTAINERS).copied().collect(),
                    Some(_) => SCALARS.to_vec(),
                };
                let hint = did_you_mean(scalar_name, &candidates);
                self.error(scalar_entry.at, format!("{path}: no type {}; {hint}", quote_short(scalar_name)));
                return None;
            }
        };
        if name == "set" && matches!(scalar, ScalarType::Float | ScalarType::Json | ScalarType::Blob) {
            self.error(
                scalar_entry.at,
                format!(
                    "{path}: a set can't tell elements of {scalar_name} apart reliably; use of = \"bool\", \
                     \"int\", \"string\", \"timestamp\" or \"ref\", or type = \"list\""
                ),
            );
            return None;
        }
        Some(match container {
            Some(container) => container(scalar),
            None => FieldType::Scalar(scalar),
        })
    }

    /// Members of a group are one value: they share policy and tie. The document holds the
    /// group where a field of that name would be, so that only a member may have its name.
    fn groups(
        &mut self,
        path: &str,
        fields: &BTreeMap<String, (usize, Field)>,
        entry: Entry<'_>,
    ) -> BTreeMap<String, Group> {
        let mut groups: BTreeMap<String, Group> = BTreeMap::new();
        for (name, (at, field)) in fields {
            let Some(group_name) = &field.group else { continue };
            let Some(group) = groups.get_mut(group_name) else {
                groups.insert(
                    group_name.clone(),
                    Group {
                        name: group_name.clone(),
                        policy: field.policy,
                        tie: field.tie,
                        members: vec![name.clone()],
                    },
                );
                continue;
            };
            let first = &group.members[0];
            let differs = |key: &str, a: &str, b: &str| {
                format!(
                    "{path}: the group {group_name:?} is resolved as one, but {first:?} has {key} = {a:?} and \
                     {name:?} has {key} = {b:?}; give both the same"
                )
            };
            let at = (*at).max(entry.key_at);
            if group.policy != field.policy {
                let message = differs("merge", group.policy.name(), field.policy.name());
                self.error(at, message);
            } else if group.tie != field.tie {
                let message = differs("tie", group.tie.name(), field.tie.name());
                self.error(at, message);
            }
            group.members.push(name.clone());
        }
        for group in groups.keys() {
            if let Some((at, field)) = fields.get(group)
                && field.group.as_ref() != Some(group)
            {
                self.error(
                    *at,
                    format!(
                        "{path}: the group {group:?} has the name of a field that isn't in it; give one of them \
                         another name, or put the field into the group"
                    ),
                );
            }
        }
        groups
    }

    /// `index` and `unique`: a list of lists of fields, or a single field.
    fn key_lists(
        &mut self,
        path: &str,
        entry: Entry<'_>,
        fields: &BTreeMap<String, (usize, Field)>,
        declared: &BTreeSet<String>,
    ) -> Vec<Vec<String>> {
        let key = entry.key;
        let shape = |reader: &mut Self| {
            reader.error(
                entry.at,
                format!("{path}: `{key}` must be a list of lists of fields, as in {key} = [[\"a\"], [\"b\", \"c\"]]"),
            );
            Vec::new()
        };
        let mut lists: Vec<Vec<(usize, String)>> = Vec::new();
        if let Some(name) = entry.item.as_str() {
            lists.push(vec![(entry.at, name.to_owned())]);
        } else if let Some(array) = entry.item.as_array() {
            let flat = array.iter().filter(|value| value.is_str()).count();
            if flat > 1 {
                self.error(
                    entry.at,
                    format!(
                        "{path}: `{key}` could mean one {key} of all these fields or one of each; write \
                         {key} = [[\"a\", \"b\"]] or {key} = [[\"a\"], [\"b\"]]"
                    ),
                );
                return Vec::new();
            }
            for value in array {
                let at = value.span().map_or(entry.at, |span| span.start);
                let names = match value {
                    Value::String(name) if array.len() == 1 => vec![(at, name.value().clone())],
                    Value::Array(names) => {
                        let mut list = Vec::new();
                        for value in names {
                            let at = value.span().map_or(at, |span| span.start);
                            let Some(name) = value.as_str() else { return shape(self) };
                            list.push((at, name.to_owned()));
                        }
                        list
                    }
                    _ => return shape(self),
                };
                if names.is_empty() {
                    self.error(at, format!("{path}: an empty list in `{key}`; name at least one field"));
                    continue;
                }
                lists.push(names);
            }
        } else {
            return shape(self);
        }

        let mut result: Vec<Vec<String>> = Vec::new();
        for list in lists {
            let mut names: Vec<String> = Vec::new();
            let at = list.first().map_or(entry.at, |(at, _)| *at);
            for (at, name) in list {
                if !declared.contains(&name) {
                    let siblings: Vec<&str> = declared.iter().map(String::as_str).collect();
                    let hint = suggest(&name, &siblings).map(|near| format!("did you mean {near:?}?"));
                    let hint = hint.unwrap_or_else(|| "name a field of this type".to_owned());
                    self.error(at, format!("{path}: no field {} for `{key}`; {hint}", quote_short(&name)));
                } else if let Some((_, field)) = fields.get(&name)
                    && !field.is_indexable()
                {
                    let what = match field.policy {
                        Policy::Counter => "counter",
                        _ => field.ty.name(),
                    };
                    self.error(
                        at,
                        format!(
                            "{path}: {name:?} is a {what}, which `{key}` can't hold; use bool, int, float, \
                             string, timestamp or ref"
                        ),
                    );
                } else if names.contains(&name) {
                    self.error(at, format!("{path}: {name:?} is twice in one `{key}`; remove one"));
                } else {
                    names.push(name);
                }
            }
            if result.contains(&names) && !names.is_empty() {
                self.error(at, format!("{path}: `{key}` names {names:?} twice; remove one"));
            } else {
                result.push(names);
            }
        }
        // Their order means nothing, so it makes no other schema.
        result.sort();
        result
    }

    fn check_type_name(&mut self, name: &str, at: usize) {
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

    fn check_field_name(&mut self, path: &str, name: &str, at: usize) {
        if name == "id" {
            self.error(
                at,
                format!("{path}: every entity has an \"id\" already; give this field another name"),
            );
        } else if let Some(why) = name_misfit(name) {
            self.error(at, format!("{path}: the field name {} {why}", quote_short(name)));
        }
    }

    fn group_name(&mut self, path: &str, entry: Entry<'_>) -> Option<String> {
        let name = self.string(path, entry)?;
        match name_misfit(name) {
            None => Some(name.to_owned()),
            Some(why) => {
                self.error(entry.at, format!("{path}: the group name {} {why}", quote_short(name)));
                None
            }
        }
    }

    fn policy(&mut self, path: &str, entry: Entry<'_>) -> Option<Policy> {
        let name = self.string(path, entry)?;
        let found = POLICIES.iter().find(|policy| policy.name() == name).copied();
        if found.is_none() {
            let names: Vec<&str> = POLICIES.iter().map(|policy| policy.name()).collect();
            let hint = did_you_mean(name, &names);
            self.error(entry.at, format!("{path}: no policy {}; {hint}", quote_short(name)));
        }
        found
    }

    fn type_policy(&mut self, path: &str, entry: Entry<'_>, policy: Policy) -> Option<Policy> {
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

    fn policy_misfit(&mut self, path: &str, entry: Entry<'_>, ty: &FieldType, policy: Policy) {
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

    fn tie(&mut self, path: &str, entry: Entry<'_>) -> Option<Tie> {
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

    fn blob_rule(&mut self, path: &str, keys: &BTreeMap<&str, Entry<'_>>) -> BlobRule {
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

    fn bound(&mut self, path: &str, entry: Entry<'_>, scalar: &ScalarType) -> Option<Bound> {
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

    fn one_of(&mut self, path: &str, entry: Entry<'_>, field: &Field, scalar: &ScalarType) -> Vec<Json> {
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

    fn unknown_key(&mut self, path: &str, entry: Entry<'_>, allowed: &[&str]) {
        let hint = did_you_mean(entry.key, allowed);
        self.error(entry.key_at, format!("{path}: no key {}; {hint}", quote_short(entry.key)));
    }

    fn mistyped(&mut self, path: &str, entry: Entry<'_>, expected: &str) {
        let found = entry.item.type_name();
        self.error(entry.at, format!("{path}: `{}` is of kind {found}; make it {expected}", entry.key));
    }

    fn string<'i>(&mut self, path: &str, entry: Entry<'i>) -> Option<&'i str> {
        let found = entry.item.as_str();
        if found.is_none() {
            self.mistyped(path, entry, "a string in quotes");
        }
        found
    }

    fn bool(&mut self, path: &str, entry: Entry<'_>) -> Option<bool> {
        let found = entry.item.as_bool();
        if found.is_none() {
            self.mistyped(path, entry, "true or false");
        }
        found
    }

    fn number(&mut self, path: &str, entry: Entry<'_>, least: i64, greatest: i64) -> Option<i64> {
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

    fn strings(&mut self, path: &str, entry: Entry<'_>) -> Vec<(usize, String)> {
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

    fn json(&mut self, path: &str, item: &Item, at: usize) -> Option<Json> {
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

    /// Recurses no deeper than TOML's parser, which stops at 80.
    fn json_value(&mut self, path: &str, value: &Value, at: usize) -> Option<Json> {
        let at = value.span().map_or(at, |span| span.start);
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
                array.iter().map(|value| self.json_value(path, value, at)).collect::<Option<_>>()?,
            ),
            Value::InlineTable(table) => Json::Object(
                table
                    .iter()
                    .map(|(key, value)| Some((key.to_owned(), self.json_value(path, value, at)?)))
                    .collect::<Option<_>>()?,
            ),
        })
    }
}

impl FieldType {
    /// The name in schema files.
    pub fn name(&self) -> &'static str {
        match self {
            FieldType::Scalar(scalar) => scalar.name(),
            FieldType::Text => "text",
            FieldType::Set(_) => "set",
            FieldType::List(_) => "list",
            FieldType::Map(_) => "map",
        }
    }

    /// The type of the value, of each element, or of each entry; a text's is a string.
    pub fn scalar(&self) -> ScalarType {
        match self {
            FieldType::Scalar(scalar)
            | FieldType::Set(scalar)
            | FieldType::List(scalar)
            | FieldType::Map(scalar) => scalar.clone(),
            FieldType::Text => ScalarType::String,
        }
    }

    /// The policy of a container that names none, whatever the type's default. For a map it
    /// is the policy of its entries.
    pub fn implied_policy(&self) -> Option<Policy> {
        match self {
            FieldType::Scalar(_) => None,
            FieldType::Text => Some(Policy::Text),
            FieldType::Set(_) => Some(Policy::Set),
            FieldType::List(_) => Some(Policy::List),
            FieldType::Map(_) => Some(Policy::Lww),
        }
    }

    /// The policies that `merge` may name for a field of this type.
    pub fn allowed_policies(&self) -> Vec<Policy> {
        let numbers: &[Policy] = match self.scalar() {
            ScalarType::Int | ScalarType::Float | ScalarType::Timestamp => &[Policy::Max, Policy::Min],
            _ => &[],
        };
        match self {
            FieldType::Scalar(scalar) => {
                let counter: &[Policy] = match scalar {
                    ScalarType::Int => &[Policy::Counter],
                    _ => &[],
                };
                [VALUE_POLICIES, numbers, counter].concat()
            }
            FieldType::Map(_) => {
                [&[Policy::Map, Policy::Lww, Policy::FirstWrite, Policy::Manual], numbers].concat()
            }
            FieldType::Text => vec![Policy::Text],
            FieldType::Set(_) => vec![Policy::Set],
            FieldType::List(_) => vec![Policy::List],
        }
    }

    fn description(&self) -> String {
        match self {
            FieldType::Scalar(scalar) => format!("type = {:?}", scalar.name()),
            FieldType::Text => "type = \"text\"".to_owned(),
            FieldType::Set(of) | FieldType::List(of) | FieldType::Map(of) => {
                format!("a {} of {}", self.name(), of.name())
            }
        }
    }
}

impl ScalarType {
    /// The name in schema files.
    pub fn name(&self) -> &'static str {
        match self {
            ScalarType::Bool => "bool",
            ScalarType::Int => "int",
            ScalarType::Float => "float",
            ScalarType::String => "string",
            ScalarType::Timestamp => "timestamp",
            ScalarType::Json => "json",
            ScalarType::Ref(_) => "ref",
            ScalarType::Blob => "blob",
        }
    }
}

impl Field {
    /// Whether an index or a unique key may hold the field: one value that has an order.
    pub fn is_indexable(&self) -> bool {
        match &self.ty {
            FieldType::Scalar(ScalarType::Json | ScalarType::Blob) => false,
            FieldType::Scalar(_) => self.policy != Policy::Counter,
            _ => false,
        }
    }
}

impl Bound {
    pub(super) fn is_above(self, other: Bound) -> bool {
        match (self, other) {
            (Bound::Int(a), Bound::Int(b)) => a > b,
            (a, b) => a.as_f64() > b.as_f64(),
        }
    }

    fn as_f64(self) -> f64 {
        match self {
            Bound::Int(int) => int as f64,
            Bound::Float(float) => float,
        }
    }
}

impl fmt::Display for Bound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Bound::Int(int) => write!(f, "{int}"),
            Bound::Float(float) => write!(f, "{float}"),
        }
    }
}

impl Tie {
    /// The name in schema files.
    pub fn name(self) -> &'static str {
        match self {
            Tie::Clock => "clock",
            Tie::Manual => "manual",
        }
    }
}

/// What is wrong with the name of a field or group.
fn name_misfit(name: &str) -> Option<&'static str> {
    let mut chars = name.chars();
    let fits = chars.next().is_some_and(|c| c.is_ascii_alphabetic())
        && chars.all(|c| c.is_ascii_alphanumeric() || c == '_');
    if name.starts_with('_') {
        Some("starts with _, which is reserved; start with a letter")
    } else if !fits {
        Some("must start with a letter and go on with letters, digits and _")
    } else if name.len() > NAME_BYTES_MAX {
        Some("has more than 64 bytes; shorten it")
    } else {
        None
    }
}

/// A name as part of a path in messages: as it stands where it is fit to be printed.
fn short_name(name: &str) -> String {
    match name_misfit(name) {
        None => name.to_owned(),
        Some(_) => quote_short(name),
    }
}

fn type_names() -> String {
    [SCALARS, CONTAINERS].concat().join(", ")
}

fn policy_names(policies: &[Policy]) -> String {
    policies.iter().map(|policy| policy.name()).collect::<Vec<_>>().join(", ")
}

fn did_you_mean(word: &str, allowed: &[&str]) -> String {
    match suggest(word, allowed) {
        Some(near) => format!("did you mean {near:?}?"),
        None => format!("use one of {}", allowed.join(", ")),
    }
}

/// The word that was probably meant: another system's name for it, or the one most like it
/// within a third of its letters.
fn suggest<'a>(word: &str, allowed: &[&'a str]) -> Option<&'a str> {
    if word.len() > NAME_BYTES_MAX {
        return None;
    }
    let lower = word.to_lowercase().replace('-', "_");
    let known = OTHER_WORDS.iter().find(|(other, _)| *other == lower).map(|(_, ours)| *ours);
    if let Some(found) = allowed.iter().find(|allowed| Some(**allowed) == known || **allowed == lower) {
        return Some(found);
    }
    allowed
        .iter()
        .map(|allowed| (edit_distance(&lower, &allowed.to_lowercase()), *allowed))
        .filter(|(distance, allowed)| *distance <= (allowed.len().max(lower.len()) / 3).max(1))
        .filter(|(distance, allowed)| *distance < allowed.len())
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, allowed)| allowed)
}

/// Insertions, deletions, replacements and swaps of neighbours between two short words.
fn edit_distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut before: Vec<usize> = Vec::new();
    let mut last: Vec<usize> = (0..=b.len()).collect();
    for i in 0..a.len() {
        let mut row = vec![i + 1];
        for j in 0..b.len() {
            let mut cost = (last[j] + usize::from(a[i] != b[j])).min(last[j + 1] + 1).min(row[j] + 1);
            if i > 0 && j > 0 && a[i] == b[j - 1] && a[i - 1] == b[j] {
                cost = cost.min(before[j - 1] + 1);
            }
            row.push(cost);
        }
        before = std::mem::replace(&mut last, row);
    }
    last[b.len()]
}
