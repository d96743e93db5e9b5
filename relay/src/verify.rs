//! Looking at everything that a relay's store holds.

use anabranch_core::relay;
use anabranch_store::{StoreError, Upkeep};

/// How often a workspace is looked at that is written to meanwhile.
const TRIES: usize = 5;

/// What [`verify`] found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Verification {
    /// Values whose checksums were compared.
    pub entries: u64,
    /// What is wrong, each with its workspace.
    pub faults: Vec<(String, String)>,
}

/// Looks at everything: checksums, the feed of each workspace, each change in it, the entities
/// that follow from it, and the digest. The relay may run meanwhile. `progress` hears how many
/// entities and feed entries of the present workspace were looked at. Blocks on the disk.
///
/// # Errors
/// Where the store can't read a value at all; they name it.
pub fn verify(upkeep: &Upkeep, progress: &mut dyn FnMut(u64)) -> Result<Verification, StoreError> {
    let mut found = Verification { entries: upkeep.verify()?, ..Verification::default() };
    for workspace in relay::workspaces(upkeep.store())? {
        let mut checked = None;
        for _ in 0..TRIES {
            checked = relay::verify(upkeep.store(), &workspace, progress)?;
            if checked.is_some() {
                break;
            }
        }
        let faults = match checked {
            Some(checked) => checked.faults,
            None => vec!["it is written to all the time, nothing can be said of it now".into()],
        };
        found.faults.extend(faults.into_iter().map(|what| (workspace.to_string(), what)));
    }
    Ok(found)
}
