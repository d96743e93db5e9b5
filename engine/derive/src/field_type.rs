//! From a Rust type and its attributes to a type of the schema.

use syn::{Error, GenericArgument, PathArguments, Result, Type};

use crate::attributes::{FieldAttributes, VALUE_POLICIES};

/// How a field is defined: `type`, `of`, and the policy that it ends up with.
#[derive(Debug)]
pub(crate) struct FieldType {
    pub(crate) container: Option<&'static str>,
    /// The type of the value or of its elements.
    pub(crate) scalar: &'static str,
}

impl FieldType {
    pub(crate) fn name(&self) -> &'static str {
        self.container.unwrap_or(self.scalar)
    }

    /// The policy of a container that names none.
    pub(crate) fn implied_policy(&self) -> Option<&'static str> {
        self.container.map(|container| if container == "map" { "lww" } else { container })
    }

    pub(crate) fn allowed_policies(&self) -> Vec<&'static str> {
        let numbers: &[&str] = match self.scalar {
            "int" | "float" | "timestamp" => &["max", "min"],
            _ => &[],
        };
        match self.container {
            None if self.scalar == "int" => [VALUE_POLICIES, numbers, &["counter"]].concat(),
            None => [VALUE_POLICIES, numbers].concat(),
            Some("map") => [&["map", "lww", "first_write", "manual"], numbers].concat(),
            Some(container) => vec![container],
        }
    }

    pub(crate) fn infer(ty: &Type, attributes: &FieldAttributes) -> Result<Self> {
        let ty = generic("Option", 1, ty).map_or(ty, |arguments| arguments[0]);
        let marks = [
            attributes.json.as_ref().map(|at| at.error("")),
            attributes.timestamp.as_ref().map(|at| at.error("")),
            attributes.blob.as_ref().map(|at| at.error("")),
            attributes.to.as_ref().map(|at| at.error("")),
        ];
        let marks: Vec<Error> = marks.into_iter().flatten().collect();
        if let Some(second) = marks.get(1) {
            let message = "json, timestamp, blob and to exclude each other; keep one";
            return Err(Error::new(second.span(), message));
        }
        let policy = attributes.policy.as_ref();
        let named = policy.map_or("", |policy| policy.value.as_str());
        let single = |scalar| Ok(Self { container: None, scalar });
        let container = |container, of: &Type| {
            let scalar = element(of, attributes);
            Ok(Self { container: Some(container), scalar })
        };

        if attributes.json.is_some() {
            return single("json");
        }
        if let Some(arguments) = generic("BTreeSet", 1, ty).or_else(|| generic("HashSet", 1, ty)) {
            let set: Self = container("set", arguments[0])?;
            if !["bool", "int", "string", "timestamp", "ref"].contains(&set.scalar) {
                let message = format!(
                    "a set can't hold elements of {}; use bool, integers, String, #[field(timestamp)] or \
                     #[field(to = \"…\")], or make the whole field one value by #[field(json)]",
                    set.scalar
                );
                return Err(Error::new_spanned(arguments[0], message));
            }
            return Ok(set);
        }
        if let Some(arguments) = generic("BTreeMap", 2, ty).or_else(|| generic("HashMap", 2, ty))
            && last_name(arguments[0]).as_deref() == Some("String")
        {
            return container("map", arguments[1]);
        }
        if let Some(arguments) = generic("Vec", 1, ty)
            && named == "list"
        {
            return container("list", arguments[0]);
        }
        if named == "text" && last_name(ty).as_deref() == Some("String") {
            return Ok(Self { container: Some("text"), scalar: "string" });
        }
        if let Some(policy) = policy {
            let needs = match named {
                "text" => "a String",
                "list" => "a Vec<T>",
                "set" => "a BTreeSet<T> or HashSet<T>",
                "map" => "a BTreeMap<String, T> or HashMap<String, T>",
                _ => "",
            };
            if !needs.is_empty() {
                return Err(
                    policy.error(format!("{named} needs {needs} here; change the type or the policy"))
                );
            }
        }
        if let Some("i128" | "u128") = last_name(ty).as_deref() {
            return Err(Error::new_spanned(ty, "an integer has at most 64 bits; use i64, or #[field(json)]"));
        }
        single(element(ty, attributes))
    }
}

/// The type of one value.
fn element(ty: &Type, attributes: &FieldAttributes) -> &'static str {
    if attributes.to.is_some() {
        return "ref";
    } else if attributes.timestamp.is_some() {
        return "timestamp";
    } else if attributes.blob.is_some() {
        return "blob";
    }
    match last_name(ty).as_deref() {
        Some("bool") => "bool",
        Some("i8" | "i16" | "i32" | "i64" | "isize" | "u8" | "u16" | "u32" | "u64" | "usize") => "int",
        Some("f32" | "f64") => "float",
        Some("String") => "string",
        _ => "json",
    }
}

/// The last name of a path without arguments: `String` of `std::string::String`.
fn last_name(ty: &Type) -> Option<String> {
    match ungrouped(ty) {
        Type::Path(path) if path.qself.is_none() => path
            .path
            .segments
            .last()
            .filter(|last| last.arguments.is_none())
            .map(|last| last.ident.to_string()),
        _ => None,
    }
}

/// The arguments of a type of that name, at least so many of them.
fn generic<'a>(name: &str, count: usize, ty: &'a Type) -> Option<Vec<&'a Type>> {
    let Type::Path(path) = ungrouped(ty) else { return None };
    let last = path.path.segments.last().filter(|last| last.ident == name)?;
    let PathArguments::AngleBracketed(arguments) = &last.arguments else { return None };
    let types: Vec<&Type> = arguments
        .args
        .iter()
        .filter_map(|argument| match argument {
            GenericArgument::Type(ty) => Some(ty),
            _ => None,
        })
        .collect();
    (types.len() >= count).then_some(types)
}

/// A type without the invisible group that a `macro_rules` expansion puts around it.
fn ungrouped(ty: &Type) -> &Type {
    match ty {
        Type::Group(group) => ungrouped(&group.elem),
        Type::Paren(paren) => ungrouped(&paren.elem),
        ty => ty,
    }
}
