//! Passphrases: from a file, a variable, or whoever sits at the terminal.

use std::io::IsTerminal as _;
use std::path::Path;

use anabranch::StoreKey;
use console::Term;

use crate::config::read_passphrase;
use crate::failure::Failure;

/// Holds a new passphrase, where there is no file.
const NEW_PASSPHRASE_VARIABLE: &str = "ANABRANCH_NEW_PASSPHRASE";

/// The passphrase that a store shall have: it is typed twice where nothing else says it.
pub(crate) fn new_passphrase(file: Option<&Path>) -> Result<StoreKey, Failure> {
    let key = match (file, std::env::var(NEW_PASSPHRASE_VARIABLE)) {
        (Some(path), _) => read_passphrase(path)?,
        (None, Ok(text)) => StoreKey::from_passphrase(text),
        (None, Err(_)) => {
            let help = format!("give --new-passphrase-file FILE, or set {NEW_PASSPHRASE_VARIABLE}");
            let first = typed("New passphrase: ")?
                .ok_or_else(|| Failure::usage("key_needed", "no new passphrase was given").help(help))?;
            if typed("The same again: ")?.as_ref() != Some(&first) {
                return Err(Failure::usage("bad_passphrase", "the two passphrases differ"));
            }
            first
        }
    };
    key.check_new().map_err(|error| Failure::usage("bad_passphrase", error.to_string()))?;
    Ok(key)
}

/// Asks at the terminal, without showing what is typed; `None` where there is none.
pub(crate) fn typed(prompt: &str) -> Result<Option<StoreKey>, Failure> {
    if !std::io::stdin().is_terminal() || !std::io::stderr().is_terminal() {
        return Ok(None);
    }
    let term = Term::stderr();
    let line = term.write_str(prompt).and_then(|()| term.read_secure_line());
    line.map(|line| Some(StoreKey::from_passphrase(line)))
        .map_err(|error| Failure::internal(format!("the terminal can't be read: {error}")))
}
