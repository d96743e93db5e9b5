//! From a schema file to a [`Schema`]: every rule of the language, and every error with its
//! line, what is wrong and what would be right.

mod values;
mod words;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::panic::catch_unwind;

use toml_edit::{Document, Item, TableLike, Value};

use words::{did_you_mean, suggest};

use super::model::{EntityType, Field, FieldType, Group, Policy, ScalarType, Schema, Tie};
use super::value::{VALUE_BYTES_MAX, quote_short};
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
        // The library panics where a dotted key extends a value that is missing.
        let document = match catch_unwind(|| Document::parse(source)) {
            Ok(Ok(document)) => document,
            Err(_) => {
                self.error(0, "not TOML: a key extends a value that is missing or no table".to_owned());
                return types;
            }
            Ok(Err(error)) => {
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
