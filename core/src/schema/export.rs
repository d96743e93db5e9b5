//! From a [`Schema`] back to a file, and to its hash.

use serde_json::{Map, Value as Json, json};

use super::model::{Bound, EntityType, Field, FieldType, Keep, Policy, ScalarType, Schema, Tie};
use super::value::canonical_json;

impl Schema {
    /// The schema as a file, types and fields by name and nothing spelt out that is a default.
    /// [`Schema::parse`] reads it back as an equal schema.
    pub fn to_toml(&self) -> String {
        let types: Vec<String> = self.types.values().map(EntityType::to_toml).collect();
        types.join("\n")
    }

    /// The schema's identity: BLAKE3 of a canonical form that doesn't depend on the order of
    /// what has none, on comments, or on whether a default was spelt out.
    pub fn hash(&self) -> [u8; 32] {
        let types: Map<String, Json> =
            self.types.values().map(|ty| (ty.name.clone(), type_form(ty))).collect();
        let mut hasher = blake3::Hasher::new_derive_key("anabranch schema v1");
        hasher.update(canonical_json(&Json::Object(types)).as_bytes());
        *hasher.finalize().as_bytes()
    }
}

impl EntityType {
    /// The type as a file of its own. [`EntityType::parse`] reads it back as an equal type.
    pub fn to_toml(&self) -> String {
        let name = key(&self.name);
        let mut out = format!("[{name}]\nversion = {}\n", self.version);
        if let Some(policy) = self.default_policy {
            out += &format!("merge = {}\n", string(policy.name()));
        }
        if self.priority != 0 {
            out += &format!("priority = {}\n", self.priority);
        }
        for (key, lists) in [("index", &self.indexes), ("unique", &self.unique)] {
            if !lists.is_empty() {
                out += &format!("{key} = {}\n", toml(&json!(lists)));
            }
        }
        out += &format!("\n[{name}.fields]\n");
        for field in self.fields.values() {
            let values: Vec<String> = definition(self, field)
                .iter()
                .map(|(key, value)| format!("{key} = {}", toml(value)))
                .collect();
            out += &format!("{} = {{ {} }}\n", key(&field.name), values.join(", "));
        }
        out
    }
}

/// What a file says about the field, defaults left out.
fn definition(ty: &EntityType, field: &Field) -> Vec<(&'static str, Json)> {
    let mut out = vec![("type", json!(field.ty.name()))];
    if !matches!(field.ty, FieldType::Scalar(_) | FieldType::Text) {
        out.push(("of", json!(field.ty.scalar().name())));
    }
    if let ScalarType::Ref(to) = field.ty.scalar() {
        out.push(("to", json!(to)));
    }
    let implied = field.ty.implied_policy().or(ty.default_policy).unwrap_or(Policy::Lww);
    if field.policy != implied {
        out.push(("merge", json!(field.policy.name())));
    }
    out.extend(rules(field));
    out
}

/// The rules of a field apart from type and policy, defaults left out.
fn rules(field: &Field) -> Vec<(&'static str, Json)> {
    let bound = |bound: Bound| match bound {
        Bound::Int(int) => json!(int),
        Bound::Float(float) => json!(float),
    };
    let mut out = Vec::new();
    out.extend(field.group.as_ref().map(|group| ("group", json!(group))));
    out.extend(field.required.then_some(("required", json!(true))));
    out.extend((!field.one_of.is_empty()).then(|| ("one_of", json!(field.one_of))));
    out.extend(field.min.map(|min| ("min", bound(min))));
    out.extend(field.max.map(|max| ("max", bound(max))));
    out.extend(field.max_bytes.map(|max| ("max_bytes", json!(max))));
    out.extend(field.default.as_ref().map(|default| ("default", default.clone())));
    out.extend((field.tie == Tie::Manual).then_some(("tie", json!("manual"))));
    if let Some(rule) = &field.blob {
        out.extend((!rule.media.is_empty()).then(|| ("media", json!(rule.media))));
        match rule.keep {
            Keep::Cached => {}
            Keep::Forever => out.push(("keep", json!("forever"))),
            Keep::Days(days) => out.push(("keep_days", json!(days))),
        }
    }
    out
}

/// What is hashed. A rule added to the language later must be left out where it has its
/// default, so that the hashes of published schemas stay.
fn type_form(ty: &EntityType) -> Json {
    let mut out = Map::new();
    out.insert("version".to_owned(), json!(ty.version));
    if let Some(policy) = ty.default_policy.filter(|policy| *policy != Policy::Lww) {
        out.insert("merge".to_owned(), json!(policy.name()));
    }
    if ty.priority != 0 {
        out.insert("priority".to_owned(), json!(ty.priority));
    }
    for (key, lists) in [("index", &ty.indexes), ("unique", &ty.unique)] {
        let mut lists = lists.clone();
        lists.sort();
        if !lists.is_empty() {
            out.insert(key.to_owned(), json!(lists));
        }
    }
    let fields: Map<String, Json> =
        ty.fields.values().map(|field| (field.name.clone(), field_form(field))).collect();
    out.insert("fields".to_owned(), Json::Object(fields));
    Json::Object(out)
}

fn field_form(field: &Field) -> Json {
    let mut out = Map::new();
    out.insert("type".to_owned(), json!(field.ty.name()));
    if !matches!(field.ty, FieldType::Scalar(_) | FieldType::Text) {
        out.insert("of".to_owned(), json!(field.ty.scalar().name()));
    }
    if let ScalarType::Ref(to) = field.ty.scalar() {
        out.insert("to".to_owned(), json!(to));
    }
    out.insert("merge".to_owned(), json!(field.policy.name()));
    for (key, mut value) in rules(field) {
        if let ("one_of" | "media", Json::Array(values)) = (key, &mut value) {
            values.sort_by_key(canonical_json);
        }
        out.insert(key.to_owned(), value);
    }
    Json::Object(out)
}

/// JSON as TOML on one line. TOML has no null, and no type of ours allows one in a schema.
fn toml(value: &Json) -> String {
    match value {
        Json::Null => string("null"),
        Json::Bool(bool) => bool.to_string(),
        Json::Number(number) => number.to_string(),
        Json::String(text) => string(text),
        Json::Array(values) => {
            let values: Vec<String> = values.iter().map(toml).collect();
            format!("[{}]", values.join(", "))
        }
        Json::Object(entries) if entries.is_empty() => "{}".to_owned(),
        Json::Object(entries) => {
            let entries: Vec<String> =
                entries.iter().map(|(name, value)| format!("{} = {}", key(name), toml(value))).collect();
            format!("{{ {} }}", entries.join(", "))
        }
    }
}

fn key(name: &str) -> String {
    let bare = |b: u8| b.is_ascii_alphanumeric() || b == b'_' || b == b'-';
    match !name.is_empty() && name.bytes().all(bare) {
        true => name.to_owned(),
        false => string(name),
    }
}

/// A basic string: every character stands for itself except those that TOML escapes.
fn string(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            c if c.is_control() => out.push_str(&format!("\\u{:04X}", c as u32)),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}
