//! The word that was probably meant.

use crate::id::NAME_BYTES_MAX;

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

pub(super) fn did_you_mean(word: &str, allowed: &[&str]) -> String {
    match suggest(word, allowed) {
        Some(near) => format!("did you mean {near:?}?"),
        None => format!("use one of {}", allowed.join(", ")),
    }
}

/// The word that was probably meant: another system's name for it, or the one most like it
/// within a third of its letters.
pub(super) fn suggest<'a>(word: &str, allowed: &[&'a str]) -> Option<&'a str> {
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
        .map(|allowed| (strsim::osa_distance(&lower, &allowed.to_lowercase()), *allowed))
        .filter(|(distance, allowed)| *distance <= (allowed.len().max(lower.len()) / 3).max(1))
        .filter(|(distance, allowed)| *distance < allowed.len())
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, allowed)| allowed)
}
