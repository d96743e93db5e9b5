//! What the attributes say, with the places where they say it.

use proc_macro2::TokenStream;
use quote::ToTokens;
use syn::ext::IdentExt as _;
use syn::meta::ParseNestedMeta;
use syn::parse::{Parse, ParseStream};
use syn::{Attribute, Error, Ident, Lit, LitStr, Result, Token, bracketed, token};

pub(crate) const POLICIES: &[&str] = &[
    "server_wins",
    "server_only",
    "client_wins",
    "lww",
    "first_write",
    "max",
    "min",
    "counter",
    "set",
    "list",
    "map",
    "text",
    "manual",
];
/// Policies that any single value can have.
pub(crate) const VALUE_POLICIES: &[&str] =
    &["server_wins", "server_only", "client_wins", "lww", "first_write", "manual"];

/// A part of an attribute and its tokens, for errors that point at it.
#[derive(Clone)]
pub(crate) struct At<T> {
    pub(crate) value: T,
    pub(crate) tokens: TokenStream,
}

impl<T> At<T> {
    fn new(value: T, tokens: impl ToTokens) -> Self {
        Self { value, tokens: tokens.into_token_stream() }
    }

    pub(crate) fn error(&self, message: impl std::fmt::Display) -> Error {
        Error::new_spanned(&self.tokens, message)
    }
}

/// A literal, or a list of them.
#[derive(Clone)]
pub(crate) enum Value {
    Bool(bool),
    Int(i64),
    Float(f64),
    String(String),
    List(Vec<At<Value>>),
}

impl Value {
    pub(crate) fn to_toml(&self) -> String {
        match self {
            Value::Bool(bool) => bool.to_string(),
            Value::Int(int) => int.to_string(),
            // The form for debugging keeps a float apart from an integer: `1.0`.
            Value::Float(float) => format!("{float:?}"),
            Value::String(text) => toml_string(text),
            Value::List(values) => {
                let values: Vec<String> = values.iter().map(|value| value.value.to_toml()).collect();
                format!("[{}]", values.join(", "))
            }
        }
    }
}

pub(crate) fn toml_string(text: &str) -> String {
    let mut out = String::from('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            c if c.is_control() => out.push_str(&format!("\\u{:04X}", c as u32)),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

impl Parse for At<Value> {
    fn parse(input: ParseStream<'_>) -> Result<Self> {
        if input.peek(token::Bracket) {
            let content;
            let bracket = bracketed!(content in input);
            let values = content.parse_terminated(At::<Value>::parse, Token![,])?;
            let mut tokens = TokenStream::new();
            bracket.surround(&mut tokens, |tokens| {
                for value in &values {
                    value.tokens.to_tokens(tokens);
                }
            });
            return Ok(At { value: Value::List(values.into_iter().collect()), tokens });
        }
        let minus: Option<Token![-]> = input.parse()?;
        let lit: Lit = input.parse().map_err(|error| {
            Error::new(
                error.span(),
                "expected a literal, as in 1, 0.5, true or \"a\", or a list of them in []",
            )
        })?;
        let mut tokens = minus.to_token_stream();
        lit.to_tokens(&mut tokens);
        let wrong = |why: &str| Err(Error::new_spanned(&tokens, why));
        let sign = if minus.is_some() { "-" } else { "" };
        let value = match &lit {
            Lit::Int(int) => match format!("{sign}{}", int.base10_digits()).parse() {
                Ok(int) => Value::Int(int),
                Err(_) => return wrong("an integer has at most 64 bits"),
            },
            Lit::Float(float) => match format!("{sign}{}", float.base10_digits()).parse::<f64>() {
                Ok(float) if float.is_finite() => Value::Float(float),
                _ => return wrong("a float must be finite"),
            },
            Lit::Str(text) if minus.is_none() => Value::String(text.value()),
            Lit::Bool(bool) if minus.is_none() => Value::Bool(bool.value),
            _ => return wrong("expected an integer, a float, true, false or a string"),
        };
        Ok(At { value, tokens })
    }
}

/// `= "…"` of a part, as text.
fn string(meta: &ParseNestedMeta<'_>) -> Result<At<String>> {
    let value = meta.value()?;
    let lit: LitStr =
        value.parse().map_err(|error| Error::new(error.span(), "expected a string, as in \"a\""))?;
    Ok(At::new(lit.value(), lit))
}

fn int(meta: &ParseNestedMeta<'_>, least: i64, greatest: i64) -> Result<At<i64>> {
    let value: At<Value> = meta.value()?.parse()?;
    match value.value {
        Value::Int(int) if (least..=greatest).contains(&int) => Ok(At { value: int, tokens: value.tokens }),
        _ => Err(value.error(format!("expected an integer from {least} to {greatest}"))),
    }
}

fn once<T>(slot: &mut Option<At<T>>, found: At<T>) -> Result<()> {
    if slot.is_some() {
        return Err(found.error("given twice; remove one"));
    }
    *slot = Some(found);
    Ok(())
}

fn unknown(meta: &ParseNestedMeta<'_>, allowed: &str) -> Error {
    meta.error(format!("unknown key; allowed are {allowed}"))
}

/// `#[entity(…)]`.
#[derive(Default)]
pub(crate) struct EntityAttributes {
    pub(crate) name: Option<At<String>>,
    pub(crate) version: Option<At<i64>>,
    pub(crate) merge: Option<At<String>>,
    pub(crate) group: Option<At<String>>,
    pub(crate) priority: Option<At<i64>>,
    pub(crate) index: Vec<At<Vec<String>>>,
    pub(crate) unique: Vec<At<Vec<String>>>,
    /// serde's, for the names of fields.
    pub(crate) rename_all: Option<At<String>>,
}

impl EntityAttributes {
    pub(crate) fn parse(attributes: &[Attribute]) -> Result<Self> {
        let mut out = Self::default();
        for attribute in attributes {
            if attribute.path().is_ident("entity") {
                attribute.parse_nested_meta(|meta| out.entity(&meta))?;
            } else if attribute.path().is_ident("serde") {
                attribute.parse_nested_meta(|meta| match meta.path.is_ident("rename_all") {
                    true => once(&mut out.rename_all, string(&meta)?),
                    false => skip(&meta),
                })?;
            }
        }
        Ok(out)
    }

    fn entity(&mut self, meta: &ParseNestedMeta<'_>) -> Result<()> {
        let key = meta.path.get_ident().map(Ident::to_string).unwrap_or_default();
        match key.as_str() {
            "name" => once(&mut self.name, string(meta)?),
            "version" => once(&mut self.version, int(meta, 1, i64::from(u32::MAX))?),
            "merge" => {
                let policy = string(meta)?;
                if !VALUE_POLICIES.contains(&policy.value.as_str()) {
                    let allowed = VALUE_POLICIES.join(", ");
                    return Err(policy.error(format!("not a policy for every field; allowed are {allowed}")));
                }
                once(&mut self.merge, policy)
            }
            "group" => once(&mut self.group, string(meta)?),
            "priority" => once(&mut self.priority, int(meta, i64::from(i32::MIN), i64::from(i32::MAX))?),
            "index" | "unique" => {
                let list = string(meta)?;
                let names = list.value.split(',').map(|name| name.trim().to_owned()).collect();
                let list = At { value: names, tokens: list.tokens };
                match key.as_str() {
                    "index" => self.index.push(list),
                    _ => self.unique.push(list),
                }
                Ok(())
            }
            _ => Err(unknown(meta, "name, version, merge, group, index, unique, priority")),
        }
    }
}

/// `#[merge(…)]` and `#[field(…)]`, and what serde says about the name.
#[derive(Default)]
pub(crate) struct FieldAttributes {
    pub(crate) policy: Option<At<String>>,
    pub(crate) group: Option<At<String>>,
    pub(crate) tie: Option<At<String>>,
    pub(crate) required: Option<At<()>>,
    pub(crate) json: Option<At<()>>,
    pub(crate) timestamp: Option<At<()>>,
    pub(crate) blob: Option<At<()>>,
    pub(crate) to: Option<At<String>>,
    pub(crate) one_of: Option<At<Value>>,
    pub(crate) min: Option<At<Value>>,
    pub(crate) max: Option<At<Value>>,
    pub(crate) default: Option<At<Value>>,
    pub(crate) media: Option<At<Value>>,
    pub(crate) max_bytes: Option<At<i64>>,
    pub(crate) keep: Option<At<String>>,
    pub(crate) keep_days: Option<At<i64>>,
    pub(crate) rename: Option<At<String>>,
    pub(crate) serde_rename: Option<At<String>>,
    /// Serde leaves the field out, so that it is none of the type's.
    pub(crate) skipped: bool,
}

impl FieldAttributes {
    pub(crate) fn parse(attributes: &[Attribute]) -> Result<Self> {
        let mut out = Self::default();
        for attribute in attributes {
            if attribute.path().is_ident("merge") {
                attribute.parse_nested_meta(|meta| out.merge(&meta))?;
            } else if attribute.path().is_ident("field") {
                attribute.parse_nested_meta(|meta| out.field(&meta))?;
            } else if attribute.path().is_ident("serde") {
                attribute.parse_nested_meta(|meta| out.serde(&meta))?;
            }
        }
        Ok(out)
    }

    fn merge(&mut self, meta: &ParseNestedMeta<'_>) -> Result<()> {
        let key = meta.path.get_ident().map(Ident::to_string).unwrap_or_default();
        match key.as_str() {
            "group" => once(&mut self.group, string(meta)?),
            "tie" => {
                let tie = string(meta)?;
                match tie.value.as_str() {
                    "clock" | "manual" => once(&mut self.tie, tie),
                    _ => Err(tie.error("no such tie; allowed are \"clock\" and \"manual\"")),
                }
            }
            policy if POLICIES.contains(&policy) => {
                once(&mut self.policy, At::new(policy.to_owned(), &meta.path))
            }
            _ => Err(meta.error(format!(
                "no such policy; allowed are {}, and group = \"…\", tie = \"manual\"",
                POLICIES.join(", ")
            ))),
        }
    }

    fn field(&mut self, meta: &ParseNestedMeta<'_>) -> Result<()> {
        let key = meta.path.get_ident().map(Ident::to_string).unwrap_or_default();
        let word = || At::new((), &meta.path);
        let value = || meta.value()?.parse::<At<Value>>();
        match key.as_str() {
            "required" => once(&mut self.required, word()),
            "json" => once(&mut self.json, word()),
            "timestamp" => once(&mut self.timestamp, word()),
            "blob" => once(&mut self.blob, word()),
            "to" => once(&mut self.to, string(meta)?),
            "one_of" => once(&mut self.one_of, value()?),
            "min" => once(&mut self.min, value()?),
            "max" => once(&mut self.max, value()?),
            "default" => once(&mut self.default, value()?),
            "media" => once(&mut self.media, value()?),
            "max_bytes" => once(&mut self.max_bytes, int(meta, 1, i64::MAX)?),
            "keep" => once(&mut self.keep, string(meta)?),
            "keep_days" => once(&mut self.keep_days, int(meta, 1, i64::from(u32::MAX))?),
            "rename" => once(&mut self.rename, string(meta)?),
            _ => Err(unknown(
                meta,
                "required, one_of, min, max, max_bytes, default, to, json, timestamp, blob, media, keep, \
                 keep_days, rename",
            )),
        }
    }

    fn serde(&mut self, meta: &ParseNestedMeta<'_>) -> Result<()> {
        let key = meta.path.get_ident().map(Ident::to_string).unwrap_or_default();
        match key.as_str() {
            "rename" if meta.input.peek(Token![=]) => once(&mut self.serde_rename, string(meta)?),
            "rename" => Err(meta.error("an entity's field has one name; write #[serde(rename = \"…\")]")),
            "flatten" => Err(meta.error("an entity's fields are its own; name them in this struct")),
            "skip" => {
                self.skipped = true;
                Ok(())
            }
            "skip_serializing" | "skip_deserializing" => {
                Err(meta.error("an entity's field is both written and read; use #[serde(skip)] or neither"))
            }
            _ => skip(meta),
        }
    }
}

/// Passes over a part that is for someone else.
fn skip(meta: &ParseNestedMeta<'_>) -> Result<()> {
    if meta.input.peek(Token![=]) {
        meta.value()?;
        while !meta.input.is_empty() && !meta.input.peek(Token![,]) {
            meta.input.parse::<proc_macro2::TokenTree>()?;
        }
    } else if meta.input.peek(token::Paren) {
        meta.input.parse::<proc_macro2::Group>()?;
    }
    Ok(())
}

/// The name of a field in Rust, raw identifiers without their mark.
pub(crate) fn plain_name(ident: &Ident) -> String {
    ident.unraw().to_string()
}
