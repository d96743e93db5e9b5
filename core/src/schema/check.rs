//! Whether a schema may follow one that is published, for devices that still run the older.

use std::fmt;

use super::model::{Bound, EntityType, Field, FieldType, Policy, ScalarType, Schema};
use super::value::describe;

/// What a change of the schema means for devices that run the older one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// Old and new apps go on side by side.
    Safe,
    /// Old and new apps would compute different values or refuse each other's writes.
    Breaking,
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Severity::Safe => "safe",
            Severity::Breaking => "breaking",
        })
    }
}

/// One difference between a schema and its successor. Prints as `severity type.field: text`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// What it means for older devices.
    pub severity: Severity,
    /// The type that differs.
    pub type_name: String,
    /// The field that differs, where it is one.
    pub field: Option<String>,
    /// What differs and, where it breaks something, what to do instead.
    pub text: String,
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.severity, self.type_name)?;
        if let Some(field) = &self.field {
            write!(f, ".{field}")?;
        }
        write!(f, ": {}", self.text)
    }
}

impl Schema {
    /// Every difference between this schema, which is published, and its successor. The
    /// successor may be published too if none is [`Severity::Breaking`].
    ///
    /// Frozen once published are a field's type, merge, group, tie and default: every device
    /// computes values from them alone, so two devices that disagree never converge. They also
    /// decide how the field is laid out in the document ([`Field::kind`]), which is thereby frozen.
    pub fn compatibility(&self, newer: &Schema) -> Vec<Change> {
        let mut changes = Vec::new();
        for (name, old) in &self.types {
            match newer.types.get(name) {
                Some(new) => Comparison { name, changes: &mut changes }.types(old, new),
                None => Comparison { name, changes: &mut changes }.add(
                    Severity::Breaking,
                    None,
                    "the type was removed; keep it, older devices still write it",
                ),
            }
        }
        for name in newer.types.keys().filter(|name| !self.types.contains_key(*name)) {
            Comparison { name, changes: &mut changes }.add(Severity::Safe, None, "the type is new");
        }
        changes
    }
}

struct Comparison<'a> {
    name: &'a str,
    changes: &'a mut Vec<Change>,
}

impl Comparison<'_> {
    fn add(&mut self, severity: Severity, field: Option<&str>, text: impl Into<String>) {
        self.changes.push(Change {
            severity,
            type_name: self.name.to_owned(),
            field: field.map(str::to_owned),
            text: text.into(),
        });
    }

    fn types(&mut self, old: &EntityType, new: &EntityType) {
        let before = self.changes.len();
        if old.is_server_only() != new.is_server_only() {
            let text = "who may create and delete was changed by server_only; define a new type instead";
            self.add(Severity::Breaking, None, text);
        } else if old.default_policy != new.default_policy {
            self.add(Severity::Safe, None, "the policy of fields added later was changed");
        }
        for (name, field) in &old.fields {
            match new.fields.get(name) {
                Some(new) => self.fields(field, new),
                None => self.add(
                    Severity::Breaking,
                    Some(name),
                    "the field was removed; keep it, older devices still write it",
                ),
            }
        }
        for (name, field) in &new.fields {
            if old.fields.contains_key(name) {
                continue;
            }
            if field.required && field.default.is_none() {
                let text = "the field is new and required, which existing entities can't meet; give it a \
                            default or make it optional";
                self.add(Severity::Breaking, Some(name), text);
            } else {
                self.add(Severity::Safe, Some(name), "the field is new");
            }
        }
        for (key, old, new) in [("index", &old.indexes, &new.indexes), ("unique", &old.unique, &new.unique)] {
            for list in new.iter().filter(|list| !old.contains(list)) {
                self.add(Severity::Safe, None, format!("{key} {} is new", list.join(", ")));
            }
            for list in old.iter().filter(|list| !new.contains(list)) {
                self.add(Severity::Safe, None, format!("{key} {} was removed", list.join(", ")));
            }
        }
        if old.priority != new.priority {
            let text = format!("priority was {} and is {}", old.priority, new.priority);
            self.add(Severity::Safe, None, text);
        }

        let changed = self.changes.len() > before;
        let (from, to) = (old.version, new.version);
        if to < from {
            let text =
                format!("version went back from {from} to {to}; raise it to {}", from.saturating_add(1));
            self.add(Severity::Breaking, None, text);
        } else if to == from && changed {
            let text =
                format!("the type was changed but not its version; raise it to {}", from.saturating_add(1));
            self.add(Severity::Breaking, None, text);
        } else if to > from && !changed {
            self.add(Severity::Safe, None, format!("version was raised to {to} and nothing else changed"));
        }
    }

    fn fields(&mut self, old: &Field, new: &Field) {
        let name = Some(old.name.as_str());
        let mut frozen = |what: &str, old: String, new: String| {
            if old != new {
                let text =
                    format!("{what} is frozen but went from {old} to {new}; add a field of another name");
                self.add(Severity::Breaking, name, text);
            }
        };
        let none = || "none".to_owned();
        frozen("type", type_text(&old.ty), type_text(&new.ty));
        frozen("merge", merge_text(old).to_owned(), merge_text(new).to_owned());
        frozen(
            "group",
            old.group.clone().map_or_else(none, |group| format!("{group:?}")),
            new.group.clone().map_or_else(none, |group| format!("{group:?}")),
        );
        frozen("tie", old.tie.name().to_owned(), new.tie.name().to_owned());
        if old.default != new.default {
            let text = |field: &Field| field.default.as_ref().map_or_else(none, describe);
            let (old, new) = (text(old), text(new));
            let text = format!(
                "default is frozen but went from {old} to {new}; devices would show different values: add a \
                 field of another name"
            );
            self.add(Severity::Breaking, name, text);
        }
        match (old.required, new.required) {
            (false, true) => self.add(
                Severity::Breaking,
                name,
                "the field became required, which older devices don't know; leave it optional",
            ),
            (true, false) => self.add(Severity::Safe, name, "the field became optional"),
            _ => {}
        }
        self.one_of(old, new);
        let above = |a: &Bound, b: &Bound| a.is_above(*b);
        self.limit(&old.name, "min", old.min, new.min, |old, new| above(new, old));
        self.limit(&old.name, "max", old.max, new.max, |old, new| above(old, new));
        self.limit(&old.name, "max_bytes", old.max_bytes, new.max_bytes, |old, new| new < old);
        if let (Some(old_rule), Some(new_rule)) = (&old.blob, &new.blob) {
            let (old_media, new_media) = (&old_rule.media, &new_rule.media);
            let narrowed = !new_media.is_empty()
                && (old_media.is_empty() || old_media.iter().any(|media| !new_media.contains(media)));
            self.values(&old.name, "media", narrowed, old_media != new_media);
            if old_rule.keep != new_rule.keep {
                self.add(Severity::Safe, name, "how long devices keep the bytes was changed");
            }
        }
    }

    fn one_of(&mut self, old: &Field, new: &Field) {
        let narrowed = !new.one_of.is_empty()
            && (old.one_of.is_empty() || old.one_of.iter().any(|value| !new.one_of.contains(value)));
        self.values(&old.name, "one_of", narrowed, old.one_of != new.one_of);
    }

    fn values(&mut self, field: &str, key: &str, narrowed: bool, changed: bool) {
        if narrowed {
            let text =
                format!("{key} was narrowed, which refuses what older devices write; keep every old value");
            self.add(Severity::Breaking, Some(field), text);
        } else if changed {
            self.add(Severity::Safe, Some(field), format!("{key} allows all it did; its list was changed"));
        }
    }

    fn limit<T: fmt::Display + PartialEq>(
        &mut self,
        field: &str,
        key: &str,
        old: Option<T>,
        new: Option<T>,
        narrower: impl Fn(&T, &T) -> bool,
    ) {
        match (&old, &new) {
            (Some(old), Some(new)) if old == new => {}
            (None, None) => {}
            (Some(old), Some(new)) if !narrower(old, new) => {
                self.add(Severity::Safe, Some(field), format!("{key} was widened from {old} to {new}"));
            }
            (Some(_), None) => self.add(Severity::Safe, Some(field), format!("{key} was removed")),
            (old, Some(new)) => {
                let old = old.as_ref().map_or_else(|| "none".to_owned(), T::to_string);
                let text = format!(
                    "{key} was narrowed from {old} to {new}, which refuses what older devices write; keep it"
                );
                self.add(Severity::Breaking, Some(field), text);
            }
        }
    }
}

fn type_text(ty: &FieldType) -> String {
    let scalar = match ty.scalar() {
        ScalarType::Ref(to) => format!("ref to {to}"),
        scalar => scalar.name().to_owned(),
    };
    match ty {
        FieldType::Scalar(_) => scalar,
        FieldType::Text => "text".to_owned(),
        FieldType::Set(_) | FieldType::List(_) | FieldType::Map(_) => format!("{} of {scalar}", ty.name()),
    }
}

/// The policy; of a changed type the containers' implied merge would say the same twice.
fn merge_text(field: &Field) -> &'static str {
    match field.policy {
        Policy::Text | Policy::Set | Policy::List => "the type's own",
        policy => policy.name(),
    }
}
