//! The derive: checks the struct, writes its type as a schema file, and the code around it.

use std::collections::BTreeMap;

use proc_macro2::TokenStream;
use quote::{format_ident, quote};
use syn::{Data, DeriveInput, Error, Fields, Ident, Result};

use crate::attributes::{At, EntityAttributes, FieldAttributes, Value, plain_name, toml_string};
use crate::field_type::FieldType;

/// A field with all that is known about it.
struct Field<'a> {
    ident: &'a Ident,
    /// Its name in the schema.
    name: String,
    ty: FieldType,
    policy: String,
    attributes: FieldAttributes,
    group: Option<String>,
}

/// The code for a struct.
pub(crate) fn expand(input: &DeriveInput) -> Result<TokenStream> {
    let (toml, fields) = definition(input)?;
    let ident = &input.ident;
    let vis = &input.vis;
    let constants = fields.iter().map(|(ident, name)| {
        let constant = format_ident!("{}", constant_name(&plain_name(ident)), span = ident.span());
        let doc = format!("The field `{name}`, for queries.");
        quote! {
            #[doc = #doc]
            #[allow(dead_code)]
            #vis const #constant: ::anabranch::FieldName<Self> = ::anabranch::FieldName::new(#name);
        }
    });
    Ok(quote! {
        #[automatically_derived]
        impl ::anabranch::Entity for #ident {
            fn entity_type() -> ::anabranch::schema::EntityType {
                ::anabranch::__private::parse_type(#toml)
            }
        }

        #[automatically_derived]
        impl #ident {
            #(#constants)*
        }
    })
}

/// The type as a schema file, and its fields by Rust's and the schema's name.
fn definition(input: &DeriveInput) -> Result<(String, Vec<(Ident, String)>)> {
    let mut errors = Errors::default();
    let named = match &input.data {
        Data::Struct(data) => match &data.fields {
            Fields::Named(named) => &named.named,
            _ => return Err(Error::new_spanned(&input.ident, "an entity is a struct with named fields")),
        },
        _ => return Err(Error::new_spanned(&input.ident, "an entity is a struct; put an enum into a field")),
    };
    if !input.generics.params.is_empty() {
        return Err(Error::new_spanned(&input.generics, "an entity has no parameters; name the types"));
    }
    let entity = EntityAttributes::parse(&input.attrs)?;
    let name = match &entity.name {
        Some(name) => {
            errors.check(check_type_name(name));
            name.value.clone()
        }
        None => {
            let message = "add #[entity(name = \"…\", version = 1)]: the name is what devices agree on";
            errors.add(Error::new(input.ident.span(), message));
            String::new()
        }
    };
    if entity.version.is_none() && entity.name.is_some() {
        errors.add(Error::new(input.ident.span(), "add `version = 1` to #[entity(…)]"));
    }
    if let Some(group) = &entity.group {
        errors.check(check_name("group", &group.value).map_err(|why| group.error(why)));
    }

    let mut fields: Vec<Field<'_>> = Vec::new();
    for field in named {
        let Some(ident) = &field.ident else { continue };
        match read_field(field, ident, &entity) {
            Ok(Some(field)) => fields.push(field),
            Ok(None) => {}
            Err(error) => errors.add(error),
        }
    }
    errors.finish()?;

    let mut constants: BTreeMap<String, String> = BTreeMap::new();
    let mut names: BTreeMap<&str, &Field<'_>> = BTreeMap::new();
    for field in &fields {
        let constant = constant_name(&plain_name(field.ident));
        if let Some(other) = constants.insert(constant.clone(), field.name.clone()) {
            let message =
                format!("the constant {constant} is that of {other:?} already; rename one of the fields");
            errors.add(Error::new_spanned(field.ident, message));
        }
        if names.insert(&field.name, field).is_some() {
            let message = format!("two fields are named {:?}; rename one", field.name);
            errors.add(Error::new_spanned(field.ident, message));
        }
        errors.check(check_field(field));
    }
    check_groups(&fields, &mut errors);
    for (key, lists) in [("index", &entity.index), ("unique", &entity.unique)] {
        check_keys(key, lists, &names, &mut errors);
    }
    errors.finish()?;

    let mut toml = format!("[{name}]\n");
    let mut line = |key: &str, value: Option<String>| {
        if let Some(value) = value {
            toml.push_str(&format!("{key} = {value}\n"));
        }
    };
    let list_of_lists = |lists: &[At<Vec<String>>]| {
        let lists: Vec<String> = lists
            .iter()
            .map(|list| list.value.iter().map(|name| toml_string(name)).collect::<Vec<_>>().join(", "))
            .map(|list| format!("[{list}]"))
            .collect();
        (!lists.is_empty()).then(|| format!("[{}]", lists.join(", ")))
    };
    line("version", entity.version.as_ref().map(|version| version.value.to_string()));
    line("merge", entity.merge.as_ref().map(|merge| toml_string(&merge.value)));
    line("group", entity.group.as_ref().map(|group| toml_string(&group.value)));
    line("priority", entity.priority.as_ref().map(|priority| priority.value.to_string()));
    line("index", list_of_lists(&entity.index));
    line("unique", list_of_lists(&entity.unique));
    toml.push_str(&format!("\n[{name}.fields]\n"));
    for field in &fields {
        toml.push_str(&field_line(field));
    }
    Ok((toml, fields.into_iter().map(|field| (field.ident.clone(), field.name)).collect()))
}

/// `None` where serde skips the field.
fn read_field<'a>(
    field: &syn::Field,
    ident: &'a Ident,
    entity: &EntityAttributes,
) -> Result<Option<Field<'a>>> {
    let attributes = FieldAttributes::parse(&field.attrs)?;
    if attributes.skipped {
        return Ok(None);
    }
    let plain = plain_name(ident);
    let name = match (&attributes.serde_rename, &entity.rename_all) {
        (Some(rename), _) => rename.value.clone(),
        (None, Some(rule)) => rename_all(&plain, rule)?,
        (None, None) => plain,
    };
    if let Some(rename) = &attributes.rename
        && rename.value != name
    {
        // The engine sees the struct through serde: a name of the schema's own would lose the
        // field's values.
        return Err(rename.error(format!(
            "serde names this field {name:?}; write #[serde(rename = {:?})], which renames both",
            rename.value
        )));
    }
    if name == "id" {
        let message =
            "every entity has an \"id\" already; rename this field, or leave it out by #[serde(skip)]";
        return Err(Error::new_spanned(ident, message));
    }
    check_name("field", &name).map_err(|why| match &attributes.serde_rename {
        Some(rename) => rename.error(why),
        None => Error::new_spanned(ident, why),
    })?;
    let ty = FieldType::infer(&field.ty, &attributes)?;
    let policy = match (&attributes.policy, ty.implied_policy()) {
        (Some(policy), implied) => {
            let allowed = ty.allowed_policies();
            if !allowed.contains(&policy.value.as_str()) {
                let hint = match ty.container {
                    Some("text") | None => "",
                    Some(_) => "; or make the whole field one value by #[field(json)]",
                };
                return Err(policy.error(format!(
                    "{} does not fit a {} field; allowed are {}{hint}",
                    policy.value,
                    ty.name(),
                    allowed.join(", ")
                )));
            }
            match (policy.value.as_str(), implied) {
                ("map", Some(implied)) => implied.to_owned(),
                (policy, _) => policy.to_owned(),
            }
        }
        (None, Some(implied)) => implied.to_owned(),
        (None, None) => entity.merge.as_ref().map_or_else(|| "lww".to_owned(), |merge| merge.value.clone()),
    };
    let own_group = attributes.group.as_ref();
    if let Some(group) = own_group {
        check_name("group", &group.value).map_err(|why| group.error(why))?;
    }
    let group = own_group.or(entity.group.as_ref()).map(|group| group.value.clone());
    if group.is_some() && (ty.container.is_some() || ["counter", "max", "min"].contains(&policy.as_str())) {
        let what = ty.container.unwrap_or(&policy);
        return Err(match own_group {
            Some(group) => group.error(format!("{what} merges by itself and can't be in a group; remove it")),
            None => Error::new(
                ident.span(),
                format!(
                    "{what} merges by itself and can't be in the group that #[entity(group = …)] makes of all \
                     fields; name the group at the fields that belong to it"
                ),
            ),
        });
    }
    Ok(Some(Field { ident, name, ty, policy, attributes, group }))
}

/// The rules for values that hold within one field.
fn check_field(field: &Field<'_>) -> Result<()> {
    let Field { attributes: a, ty, policy, .. } = field;
    let mut errors = Errors::default();
    if let Some(tie) = a.tie.as_ref().filter(|tie| tie.value == "manual")
        && policy != "lww"
    {
        errors.add(tie.error(format!("only lww compares times, this is {policy}; remove it")));
    }
    let fixed_start = ty.container.is_some() || policy == "counter";
    if fixed_start {
        let what = ty.container.unwrap_or("counter");
        let message = format!("a {what} starts empty and is always there; remove it");
        errors.extend(a.required.as_ref().map(|at| at.error(&message)));
        errors.extend(a.default.as_ref().map(|at| at.error(&message)));
    }
    if policy == "counter" {
        let message = "a counter is a sum that no device sees alone; remove it";
        errors.extend([&a.one_of, &a.min, &a.max].into_iter().flatten().map(|at| at.error(message)));
    }
    let number = ["int", "float"].contains(&ty.scalar);
    for bound in [&a.min, &a.max].into_iter().flatten() {
        let fits = match (&bound.value, ty.scalar) {
            (Value::Int(_), "int" | "float") | (Value::Float(_), "float") => true,
            _ if number => false,
            _ => {
                errors.add(
                    bound.error(format!("min and max are for numbers, this is {}; remove it", ty.scalar)),
                );
                continue;
            }
        };
        if !fits {
            errors.add(bound.error(format!("expected a literal of type {}", ty.scalar)));
        }
    }
    if let (Some(min), Some(max)) = (&a.min, &a.max)
        && number_of(&min.value) > number_of(&max.value)
    {
        errors.add(min.error("min is above max; swap them"));
    }
    if let Some(one_of) = &a.one_of {
        match &one_of.value {
            _ if !["string", "int"].contains(&ty.scalar) => {
                errors
                    .add(one_of.error(format!("one_of is for strings and integers, this is {}", ty.scalar)));
            }
            Value::List(values) if !values.is_empty() => {
                for value in values {
                    errors.check(check_literal(value, ty.scalar));
                }
            }
            _ => errors.add(one_of.error("expected a list of at least one value, as in [\"a\", \"b\"]")),
        }
    }
    if let (Some(default), false) = (&a.default, fixed_start) {
        errors.check(check_literal(default, ty.scalar));
        let allowed = a.one_of.as_ref().map(|one_of| &one_of.value);
        if let Some(Value::List(values)) = allowed
            && !values.iter().any(|value| value.value.to_toml() == default.value.to_toml())
        {
            errors.add(default.error("the default is not in one_of; add it there"));
        }
        let number = number_of(&default.value);
        let bound = |bound: &Option<At<Value>>| bound.as_ref().and_then(|bound| number_of(&bound.value));
        if let Some(number) = number
            && (bound(&a.min).is_some_and(|min| number < min)
                || bound(&a.max).is_some_and(|max| number > max))
        {
            errors.add(default.error("the default is outside min and max"));
        }
    }
    if let Some(max_bytes) = &a.max_bytes
        && !["string", "json", "blob"].contains(&ty.scalar)
    {
        let message = format!("max_bytes is for strings, texts, json and blobs, this is {}", ty.scalar);
        errors.add(max_bytes.error(message));
    }
    if ty.scalar != "blob" {
        let message = format!("this is for blobs; the field is {}: add `blob` or remove it", ty.scalar);
        errors.extend(a.media.as_ref().map(|at| at.error(&message)));
        errors.extend(a.keep.as_ref().map(|at| at.error(&message)));
        errors.extend(a.keep_days.as_ref().map(|at| at.error(&message)));
    }
    if let Some(media) = &a.media {
        let strings = match &media.value {
            Value::List(values) => {
                !values.is_empty() && values.iter().all(|value| matches!(value.value, Value::String(_)))
            }
            _ => false,
        };
        if !strings {
            errors.add(media.error("expected a list of media types, as in [\"image/png\"]"));
        }
    }
    match (&a.keep, &a.keep_days) {
        (Some(_), Some(days)) => errors.add(days.error("keep and keep_days exclude each other; remove one")),
        (Some(keep), None) if !["forever", "cached"].contains(&keep.value.as_str()) => {
            errors.add(keep.error("allowed are \"forever\" and \"cached\""));
        }
        _ => {}
    }
    errors.finish()
}

fn check_literal(value: &At<Value>, scalar: &str) -> Result<()> {
    let fits = match (&value.value, scalar) {
        (_, "json") => true,
        (Value::Bool(_), "bool") => true,
        (Value::Int(_), "int" | "float" | "timestamp") => true,
        (Value::Float(_), "float") => true,
        (Value::String(_), "string" | "timestamp" | "ref") => true,
        (_, "blob") => return Err(value.error("a blob has no default; remove it")),
        _ => false,
    };
    match fits {
        true => Ok(()),
        false => Err(value.error(format!("expected a literal of type {scalar}"))),
    }
}

fn number_of(value: &Value) -> Option<f64> {
    match value {
        Value::Int(int) => Some(*int as f64),
        Value::Float(float) => Some(*float),
        _ => None,
    }
}

fn check_groups(fields: &[Field<'_>], errors: &mut Errors) {
    let mut first_of: BTreeMap<&str, &Field<'_>> = BTreeMap::new();
    for field in fields {
        let Some(group) = &field.group else { continue };
        let first = *first_of.entry(group).or_insert(field);
        let tie =
            |field: &Field<'_>| field.attributes.tie.as_ref().map_or("clock".to_owned(), |t| t.value.clone());
        if (&first.policy, tie(first)) != (&field.policy, tie(field)) {
            let message = format!(
                "the group {group:?} is resolved as one, but {:?} is {} with tie {} and {:?} is {} with tie {}; \
                 give both the same",
                first.name,
                first.policy,
                tie(first),
                field.name,
                field.policy,
                tie(field)
            );
            errors.add(match (&field.attributes.policy, &field.attributes.group) {
                (Some(policy), _) => policy.error(message),
                (None, Some(group)) => group.error(message),
                (None, None) => Error::new_spanned(field.ident, message),
            });
        }
    }
    for field in fields {
        if first_of.contains_key(field.name.as_str()) && field.group.as_ref() != Some(&field.name) {
            let message =
                format!("{:?} is the name of a group that this field isn't in; rename one", field.name);
            errors.add(Error::new_spanned(field.ident, message));
        }
    }
}

fn check_keys(key: &str, lists: &[At<Vec<String>>], names: &BTreeMap<&str, &Field<'_>>, errors: &mut Errors) {
    for (i, list) in lists.iter().enumerate() {
        for (j, name) in list.value.iter().enumerate() {
            match names.get(name.as_str()) {
                None => {
                    let known: Vec<&str> = names.keys().copied().collect();
                    errors.add(list.error(format!("no field {name:?}; the fields are {}", known.join(", "))));
                }
                Some(field)
                    if field.ty.container.is_some() || ["json", "blob"].contains(&field.ty.scalar) =>
                {
                    let what = field.ty.name();
                    errors.add(list.error(format!(
                        "{name:?} is a {what}, which {key} can't hold; use bool, numbers, strings, timestamps or \
                         references"
                    )));
                }
                Some(field) if field.policy == "counter" => {
                    errors
                        .add(list.error(format!("{name:?} is a counter, which {key} can't hold; remove it")));
                }
                Some(_) if list.value[..j].contains(name) => {
                    errors.add(list.error(format!("{name:?} is there twice; remove one")));
                }
                Some(_) => {}
            }
        }
        if lists[..i].iter().any(|other| other.value == list.value) {
            errors.add(list.error(format!("this {key} is there twice; remove one")));
        }
    }
}

fn field_line(field: &Field<'_>) -> String {
    let a = &field.attributes;
    let mut parts = vec![format!("type = {}", toml_string(field.ty.name()))];
    let mut part = |key: &str, value: Option<String>| {
        parts.extend(value.map(|value| format!("{key} = {value}")));
    };
    let text = |at: &Option<At<String>>| at.as_ref().map(|at| toml_string(&at.value));
    let value = |at: &Option<At<Value>>| at.as_ref().map(|at| at.value.to_toml());
    let number = |at: &Option<At<i64>>| at.as_ref().map(|at| at.value.to_string());
    let of =
        field.ty.container.filter(|container| *container != "text").map(|_| toml_string(field.ty.scalar));
    part("of", of);
    part("to", text(&a.to));
    part("merge", text(&a.policy));
    part("group", text(&a.group));
    part("tie", text(&a.tie));
    part("required", a.required.as_ref().map(|_| "true".to_owned()));
    part("one_of", value(&a.one_of));
    part("min", value(&a.min));
    part("max", value(&a.max));
    part("max_bytes", number(&a.max_bytes));
    part("default", value(&a.default));
    part("media", value(&a.media));
    part("keep", text(&a.keep));
    part("keep_days", number(&a.keep_days));
    format!("{} = {{ {} }}\n", field.name, parts.join(", "))
}

fn check_type_name(name: &At<String>) -> Result<()> {
    let mut chars = name.value.chars();
    let fits = chars.next().is_some_and(|c| c.is_ascii_lowercase())
        && chars.all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_');
    match fits && name.value.len() <= 64 {
        true => Ok(()),
        false => Err(name.error("a type's name is a-z followed by a-z, 0-9 and _, at most 64 bytes")),
    }
}

fn check_name(what: &str, name: &str) -> std::result::Result<(), String> {
    let mut chars = name.chars();
    let fits = chars.next().is_some_and(|c| c.is_ascii_alphabetic())
        && chars.all(|c| c.is_ascii_alphanumeric() || c == '_');
    match fits && name.len() <= 64 {
        true => Ok(()),
        false => Err(format!(
            "{name:?}: a {what}'s name is a letter followed by letters, digits and _, at most 64 bytes"
        )),
    }
}

/// Serde's `rename_all` for a field, whose own name is taken to be snake_case.
fn rename_all(name: &str, rule: &At<String>) -> Result<String> {
    let capital = |word: &str| {
        let mut chars = word.chars();
        chars.next().map(|first| first.to_ascii_uppercase().to_string() + chars.as_str()).unwrap_or_default()
    };
    let pascal = || name.split('_').map(capital).collect::<String>();
    Ok(match rule.value.as_str() {
        "lowercase" | "snake_case" => name.to_owned(),
        "UPPERCASE" | "SCREAMING_SNAKE_CASE" => name.to_ascii_uppercase(),
        "PascalCase" => pascal(),
        "camelCase" => {
            let pascal = pascal();
            let (first, rest) = pascal.split_at(usize::from(pascal.is_ascii() && !pascal.is_empty()));
            first.to_ascii_lowercase() + rest
        }
        _ => {
            let message = "field names hold letters, digits and _; allowed are camelCase, PascalCase, \
                           snake_case, SCREAMING_SNAKE_CASE, lowercase and UPPERCASE";
            return Err(rule.error(message));
        }
    })
}

/// `STARTED_AT` for `started_at` and for `startedAt`.
fn constant_name(name: &str) -> String {
    let mut out = String::new();
    let mut before = '_';
    for c in name.chars() {
        if c.is_uppercase() && (before.is_lowercase() || before.is_numeric()) {
            out.push('_');
        }
        out.extend(c.to_uppercase());
        before = c;
    }
    out
}

/// Every error of a struct at once.
#[derive(Default)]
struct Errors(Option<Error>);

impl Errors {
    fn add(&mut self, error: Error) {
        match &mut self.0 {
            Some(first) => first.combine(error),
            None => self.0 = Some(error),
        }
    }

    fn extend(&mut self, errors: impl IntoIterator<Item = Error>) {
        errors.into_iter().for_each(|error| self.add(error));
    }

    fn check(&mut self, result: Result<()>) {
        self.extend(result.err());
    }

    fn finish(&mut self) -> Result<()> {
        self.0.take().map_or(Ok(()), Err)
    }
}

#[cfg(test)]
mod tests {
    use anabranch_core::schema::EntityType;

    use super::*;

    fn derive(source: &str) -> Result<(String, Vec<(Ident, String)>)> {
        definition(&syn::parse_str(source).unwrap())
    }

    /// The struct is the same type as the schema file.
    #[track_caller]
    fn check(source: &str, file: &str) {
        let (toml, _) = derive(source).unwrap_or_else(|error| panic!("{error}"));
        let derived = EntityType::parse(&toml, "derived").unwrap_or_else(|errors| panic!("{errors}\n{toml}"));
        let expected = EntityType::parse(file, "file").unwrap();
        assert_eq!(derived, expected, "{toml}");
        expand(&syn::parse_str(source).unwrap()).unwrap();
    }

    /// The field makes the same type as its definition in a schema file.
    #[track_caller]
    fn check_one(field: &str, definition: &str) {
        check(
            &format!("#[entity(name = \"t\", version = 1)] struct T {{ {field} }}"),
            &format!("[t]\nversion = 1\n[t.fields]\nf = {{ {definition} }}\n"),
        );
    }

    /// The struct is refused once, at these words of the source, with this message.
    #[track_caller]
    fn refuse(source: &str, at: &str, message: &str) {
        let error = derive(source).expect_err("accepted");
        let all: Vec<String> = error.clone().into_iter().map(|error| error.to_string()).collect();
        assert_eq!(all.len(), 1, "{all:?}");
        assert!(all[0].contains(message), "{all:?}");
        assert_eq!(error.span().source_text().as_deref(), Some(at), "{all:?}");
    }

    #[track_caller]
    fn refuse_one(field: &str, at: &str, message: &str) {
        refuse(&format!("#[entity(name = \"t\", version = 1)] struct T {{ {field} }}"), at, message);
    }

    #[test]
    fn a_struct_is_a_type() {
        check(
            "#[entity(name = \"workout\", version = 2, index = \"started_at\", index = \"title, done\",
                      unique = \"started_at\", merge = \"client_wins\", priority = -10)]
             pub struct Workout {
                 title: String,
                 done: bool,
                 #[field(required, timestamp)] started_at: String,
                 #[merge(text)] notes: String,
                 #[merge(manual, group = \"log\")] sets: Vec<SetEntry>,
                 #[merge(manual, group = \"log\")] completed: Option<i64>,
                 #[merge(counter)] reps: i64,
                 #[merge(set)] tags: BTreeSet<String>,
                 #[merge(max)] best_kg: f64,
                 #[serde(skip)] cache: Cache,
             }",
            r#"[workout]
               version = 2
               merge = "client_wins"
               priority = -10
               index = [["started_at"], ["title", "done"]]
               unique = [["started_at"]]
               [workout.fields]
               title = { type = "string" }
               done = { type = "bool" }
               started_at = { type = "timestamp", required = true }
               notes = { type = "text" }
               sets = { type = "json", merge = "manual", group = "log" }
               completed = { type = "int", merge = "manual", group = "log" }
               reps = { type = "int", merge = "counter" }
               tags = { type = "set", of = "string" }
               best_kg = { type = "float", merge = "max" }"#,
        );
        check(
            "#[entity(name = \"invoice\", version = 1, merge = \"manual\", group = \"whole\")]
             struct Invoice { cents: i64, paid: bool }",
            "[invoice]\nversion = 1\nmerge = \"manual\"\ngroup = \"whole\"\n[invoice.fields]\n\
             cents = { type = \"int\" }\npaid = { type = \"bool\" }\n",
        );
    }

    #[test]
    fn rust_types_are_schema_types() {
        for (rust, definition) in [
            ("bool", "type = \"bool\""),
            ("u8", "type = \"int\""),
            ("i64", "type = \"int\""),
            ("usize", "type = \"int\""),
            ("f32", "type = \"float\""),
            ("String", "type = \"string\""),
            ("std::string::String", "type = \"string\""),
            ("Option<String>", "type = \"string\""),
            ("std::option::Option<f64>", "type = \"float\""),
            ("BTreeSet<i32>", "type = \"set\", of = \"int\""),
            ("std::collections::HashSet<String, Hasher>", "type = \"set\", of = \"string\""),
            ("Option<HashSet<bool>>", "type = \"set\", of = \"bool\""),
            ("BTreeMap<String, u32>", "type = \"map\", of = \"int\""),
            ("HashMap<String, Day>", "type = \"map\", of = \"json\""),
            ("BTreeMap<u32, u32>", "type = \"json\""),
            ("Vec<u8>", "type = \"json\""),
            ("(i64, i64)", "type = \"json\""),
            ("Address", "type = \"json\""),
            ("Wrapper<String>", "type = \"json\""),
        ] {
            check_one(&format!("f: {rust}"), definition);
        }
    }

    #[test]
    fn marks_beat_the_rust_type() {
        check_one("#[field(json)] f: BTreeSet<String>", "type = \"json\"");
        check_one(
            "#[field(json)] #[merge(manual)] f: BTreeSet<String>",
            "type = \"json\", merge = \"manual\"",
        );
        check_one("#[field(timestamp)] f: i64", "type = \"timestamp\"");
        check_one("#[field(timestamp)] f: BTreeSet<Instant>", "type = \"set\", of = \"timestamp\"");
        check_one("#[field(to = \"hero\")] f: Option<HeroId>", "type = \"ref\", to = \"hero\"");
        check_one(
            "#[field(to = \"hero\")] f: BTreeSet<HeroId>",
            "type = \"set\", of = \"ref\", to = \"hero\"",
        );
        check_one(
            "#[field(blob, media = [\"a/b\"], max_bytes = 9, keep_days = 3)] f: Option<Photo>",
            "type = \"blob\", media = [\"a/b\"], max_bytes = 9, keep_days = 3",
        );
        check_one("#[field(blob, keep = \"forever\")] f: Photo", "type = \"blob\", keep = \"forever\"");
        refuse_one("#[field(json, timestamp)] f: i64", "timestamp", "exclude each other");
    }

    #[test]
    fn policies_are_words() {
        for policy in
            ["server_wins", "server_only", "client_wins", "first_write", "max", "min", "counter", "manual"]
        {
            check_one(
                &format!("#[merge({policy})] f: i64"),
                &format!("type = \"int\", merge = \"{policy}\""),
            );
        }
        check_one("#[merge(list)] f: Vec<Comment>", "type = \"list\", of = \"json\"");
        check_one("#[merge(list)] f: Option<Vec<String>>", "type = \"list\", of = \"string\"");
        check_one("#[merge(text)] f: Option<String>", "type = \"text\"");
        check_one("#[merge(map)] f: BTreeMap<String, bool>", "type = \"map\", of = \"bool\"");
        check_one("#[merge(max)] f: BTreeMap<String, i64>", "type = \"map\", of = \"int\", merge = \"max\"");
        check_one("#[merge(lww, tie = \"manual\")] f: i64", "type = \"int\", tie = \"manual\"");
        check_one("#[merge(tie = \"manual\")] f: i64", "type = \"int\", tie = \"manual\"");
        check_one("#[merge(group = \"g\")] f: i64", "type = \"int\", group = \"g\"");
    }

    #[test]
    fn rules_for_values_are_carried_over() {
        check_one(
            "#[field(required, one_of = [\"a\\n\", \"b\"], max_bytes = 3, default = \"b\")] f: String",
            "type = \"string\", required = true, one_of = [\"a\\n\", \"b\"], max_bytes = 3, default = \"b\"",
        );
        check_one("#[field(min = -1, max = 1_000)] f: i64", "type = \"int\", min = -1, max = 1000");
        check_one(
            "#[field(min = -9223372036854775808)] f: i64",
            "type = \"int\", min = -9223372036854775808",
        );
        check_one("#[field(min = 0, max = 1.)] f: f64", "type = \"float\", min = 0.0, max = 1.0");
        check_one("#[field(default = [1, true])] f: Vec<Json>", "type = \"json\", default = [1, true]");
        check_one("#[field(default = 0)] f: f64", "type = \"float\", default = 0.0");
    }

    #[test]
    fn fields_are_named_as_serde_names_them() {
        check_one(
            "#[serde(default, rename = \"f\", with = \"a::b\", bound(x = \"y\"))] g: i64",
            "type = \"int\"",
        );
        check_one("#[serde(rename = \"f\")] #[field(rename = \"f\")] g: i64", "type = \"int\"");
        check(
            "#[serde(rename_all = \"camelCase\", deny_unknown_fields)] #[entity(name = \"t\", version = 1, index = \"startedAt\")]
             struct T { #[field(timestamp)] started_at: String, r#type: String }",
            "[t]\nversion = 1\nindex = \"startedAt\"\n[t.fields]\nstartedAt = { type = \"timestamp\" }\n\
             type = { type = \"string\" }\n",
        );
        refuse_one("#[field(rename = \"f\")] g: i64", "\"f\"", "#[serde(rename = \"f\")]");
        refuse_one("#[serde(rename = \"a-b\")] g: i64", "\"a-b\"", "letters, digits");
        refuse_one("#[serde(flatten)] g: Rest", "flatten", "fields are its own");
        refuse_one("#[serde(rename(serialize = \"a\"))] g: i64", "rename", "one name");
        refuse_one("id: i64", "id", "every entity has an \"id\"");
        refuse_one("a: i64, #[serde(rename = \"a\")] b: i64", "b", "two fields are named \"a\"");
        refuse_one("aB: i64, a_b: i64", "a_b", "the constant A_B");
        refuse(
            "#[serde(rename_all = \"kebab-case\")] #[entity(name = \"t\", version = 1)] struct T { a: i64 }",
            "\"kebab-case\"",
            "camelCase",
        );
    }

    #[test]
    fn constants_are_in_capitals() {
        assert_eq!(constant_name("started_at"), "STARTED_AT");
        assert_eq!(constant_name("primaryMuscles"), "PRIMARY_MUSCLES");
        assert_eq!(constant_name("best1RM"), "BEST1_RM");
    }

    #[test]
    fn the_struct_says_name_and_version() {
        refuse("struct T { a: i64 }", "T", "#[entity(name = \"…\", version = 1)]");
        refuse("#[entity(name = \"t\")] struct T { a: i64 }", "T", "version = 1");
        refuse("#[entity(name = \"T\", version = 1)] struct T { a: i64 }", "\"T\"", "a-z");
        refuse("#[entity(name = \"t\", version = 0)] struct T { a: i64 }", "0", "from 1 to");
        refuse(
            "#[entity(name = \"t\", version = 1, nam = 1)] struct T {}",
            "nam",
            "allowed are name, version",
        );
        refuse("#[entity(name = \"t\", name = \"t\", version = 1)] struct T {}", "\"t\"", "given twice");
        refuse("#[entity(name = \"t\", version = 1, merge = \"max\")] struct T {}", "\"max\"", "server_wins");
        refuse("#[entity(name = \"t\", version = 1)] struct T<A> { a: A }", "<A>", "no parameters");
        refuse("#[entity(name = \"t\", version = 1)] enum T { A }", "T", "is a struct");
        refuse("#[entity(name = \"t\", version = 1)] struct T(i64);", "T", "named fields");
    }

    #[test]
    fn a_wrong_policy_is_an_error_at_its_place() {
        refuse_one("#[merge(lwww)] f: i64", "lwww", "allowed are server_wins");
        refuse_one("#[merge(counter)] f: f64", "counter", "does not fit a float field");
        refuse_one("#[merge(max)] f: String", "max", "does not fit a string field");
        refuse_one("#[merge(manual)] f: BTreeSet<String>", "manual", "#[field(json)]");
        refuse_one("#[merge(text)] f: i64", "text", "needs a String");
        refuse_one("#[merge(list)] f: Comments", "list", "needs a Vec<T>");
        refuse_one("#[merge(set)] f: Vec<String>", "set", "needs a BTreeSet<T>");
        refuse_one("#[merge(map)] f: BTreeMap<u8, u8>", "map", "needs a BTreeMap<String, T>");
        refuse_one("#[merge(lww, max)] f: i64", "max", "given twice");
        refuse_one("#[merge(tie = \"manuel\")] f: i64", "\"manuel\"", "\"manual\"");
        refuse_one("#[merge(max, tie = \"manual\")] f: i64", "\"manual\"", "only lww");
        refuse_one("f: BTreeSet<Address>", "Address", "can't hold elements of json");
        refuse_one("f: u128", "u128", "at most 64 bits");
    }

    #[test]
    fn a_wrong_group_is_an_error_at_its_place() {
        refuse_one("#[merge(counter, group = \"g\")] f: i64", "\"g\"", "counter merges by itself");
        refuse_one("#[merge(group = \"g\")] f: BTreeSet<i64>", "\"g\"", "set merges by itself");
        refuse_one("#[merge(group = \"a b\")] f: i64", "\"a b\"", "letters, digits");
        refuse_one(
            "#[merge(group = \"g\")] a: i64, #[merge(manual, group = \"g\")] b: i64",
            "manual",
            "\"a\" is lww with tie clock and \"b\" is manual",
        );
        refuse_one("#[merge(group = \"b\")] a: i64, b: i64", "b", "name of a group");
        refuse(
            "#[entity(name = \"t\", version = 1, group = \"whole\")] struct T { a: i64, tags: BTreeSet<i64> }",
            "tags",
            "name the group at the fields",
        );
    }

    #[test]
    fn a_wrong_rule_is_an_error_at_its_place() {
        refuse_one("#[field(requird)] f: i64", "requird", "allowed are required");
        refuse_one("#[merge(counter)] #[field(required)] f: i64", "required", "a counter starts");
        refuse_one("#[merge(counter)] #[field(min = 0)] f: i64", "0", "a counter is a sum");
        refuse_one("#[field(default = 1)] f: BTreeSet<i64>", "1", "a set starts empty");
        refuse_one("#[field(min = 0.5)] f: i64", "0.5", "of type int");
        refuse_one("#[field(min = 1)] f: String", "1", "for numbers");
        refuse_one("#[field(min = 2, max = 1)] f: i64", "2", "swap them");
        refuse_one("#[field(min = 99999999999999999999)] f: i64", "99999999999999999999", "64 bits");
        refuse_one("#[field(min = x)] f: i64", "x", "expected a literal");
        refuse_one("#[field(default = \"a\")] f: i64", "\"a\"", "of type int");
        refuse_one("#[field(default = 3, max = 2)] f: i64", "3", "outside min and max");
        refuse_one("#[field(one_of = [1], default = 2)] f: i64", "2", "not in one_of");
        refuse_one("#[field(one_of = [1, \"a\"])] f: i64", "\"a\"", "of type int");
        refuse_one("#[field(one_of = [true])] f: bool", "[true]", "strings and integers");
        refuse_one("#[field(max_bytes = 1)] f: i64", "1", "max_bytes is for");
        refuse_one("#[field(media = [\"a/b\"])] f: Photo", "[\"a/b\"]", "add `blob`");
        refuse_one("#[field(blob, default = 1)] f: Photo", "1", "no default");
        refuse_one("#[field(blob, keep = \"long\")] f: Photo", "\"long\"", "\"forever\"");
    }

    #[test]
    fn a_wrong_index_is_an_error_at_its_place() {
        let with = |keys: &str| {
            format!(
                "#[entity(name = \"t\", version = 1, {keys})] struct T {{ a: i64, tags: BTreeSet<i64>, \
                 #[merge(counter)] n: i64 }}"
            )
        };
        refuse(&with("index = \"b\""), "\"b\"", "the fields are a, n, tags");
        refuse(&with("index = \"tags\""), "\"tags\"", "is a set");
        refuse(&with("unique = \"n\""), "\"n\"", "is a counter");
        refuse(&with("index = \"a, a\""), "\"a, a\"", "there twice");
    }

    #[test]
    fn every_error_is_reported() {
        let error = derive("#[entity(name = \"T\", version = 1)] struct T { #[merge(x)] a: i64, id: i64 }")
            .unwrap_err();
        assert_eq!(error.into_iter().count(), 3);
    }
}
