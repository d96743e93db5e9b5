//! One change of an entity, as it comes from outside: parsed, bounded, not yet trusted.
//!
//! Nothing from outside reaches Automerge unchecked: only plain chunks of type 1 are taken
//! (a deflated one of 261 KB can inflate to 768 MiB), the size is capped first, and parsing
//! runs where a panic of the library is caught.

use std::panic::{AssertUnwindSafe, catch_unwind};

use automerge::{ActorId, Change as RawChange, ChangeHash, ExpandedChange};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

use crate::clock::Hlc;
use crate::columns;
use crate::id::Author;

/// Largest change in bytes.
pub const CHANGE_BYTES_MAX: usize = 2 * 1024 * 1024;
/// Most operations of a change that is read.
pub const CHANGE_OPS_MAX: usize = 1_000_000;
/// Most operations of a change that is new: devices make none with more, and the relay takes none.
/// Read out, one takes some two hundred bytes. A text takes one for each letter.
pub const EDIT_OPS_MAX: usize = 250_000;
/// Most bytes of the keys of a change, each counted as often as it is written to.
pub const CHANGE_KEY_BYTES_MAX: usize = 16 * 1024 * 1024;
/// Largest operation counter, far below where Automerge's columns overflow.
pub const OP_COUNTER_MAX: u64 = 1 << 31;
/// Most dependencies of a change.
pub const CHANGE_DEPS_MAX: usize = 1_000;

/// In which role a change was written. It rides in the hashed message; the relay checks it
/// against the author's grant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// A device of a person.
    #[default]
    Device,
    /// The app's own backend.
    Authority,
}

/// Which transaction a change belongs to, so that receivers show the members together by
/// whatever route they came.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct TxMark {
    /// The transaction's id.
    pub id: [u8; 16],
    /// How many entities it changed.
    pub members: u32,
}

/// Which edit of a user a change makes: the first 12 bytes of the hash of the first change that was
/// made for it. A change that was dated again, or made again on another base, carries it, so that a
/// device whose store went back knows an edit of its own by whatever name the relay has it. It counts
/// between changes of one device to one entity only, so nobody can name another's edit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Origin(pub [u8; 12]);

impl Origin {
    /// The edit that `hash` was the first change for.
    pub fn of(hash: &ChangeHash) -> Self {
        let mut first = [0; 12];
        first.copy_from_slice(&hash.0[..12]);
        Self(first)
    }
}

/// What resolution and receivers need to know of a change: its commit message.
///
/// Written as one letter for the role (`d`, `a`), then `r` if the change revives a deleted
/// entity, then for a member of a transaction `.`, 22 characters of base64url, `.` and the
/// number of members, then for a change that was made again `~` and 16 characters of base64url.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Note {
    /// The writer's role.
    pub role: Role,
    /// Whether the change revives a deleted entity.
    pub revives: bool,
    /// The transaction.
    pub tx: Option<TxMark>,
    /// The edit that it makes again.
    pub origin: Option<Origin>,
}

impl Note {
    /// The commit message.
    pub fn to_message(self) -> String {
        let mut text = String::from(match self.role {
            Role::Device => "d",
            Role::Authority => "a",
        });
        if self.revives {
            text.push('r');
        }
        if let Some(tx) = self.tx {
            text.push('.');
            text.push_str(&URL_SAFE_NO_PAD.encode(tx.id));
            text.push('.');
            text.push_str(&tx.members.to_string());
        }
        if let Some(origin) = self.origin {
            text.push('~');
            text.push_str(&URL_SAFE_NO_PAD.encode(origin.0));
        }
        text
    }

    /// Reads a commit message; `None` if it is not exactly what [`Note::to_message`] writes.
    pub fn from_message(text: &str) -> Option<Self> {
        let (rest, origin) = match text.split_once('~') {
            Some((rest, origin)) => {
                (rest, Some(Origin(URL_SAFE_NO_PAD.decode(origin).ok()?.try_into().ok()?)))
            }
            None => (text, None),
        };
        let mut parts = rest.split('.');
        let (role, revives) = match parts.next()? {
            "d" => (Role::Device, false),
            "dr" => (Role::Device, true),
            "a" => (Role::Authority, false),
            "ar" => (Role::Authority, true),
            _ => return None,
        };
        let tx = match (parts.next(), parts.next(), parts.next()) {
            (None, None, None) => None,
            (Some(id), Some(members), None) => Some(TxMark {
                id: URL_SAFE_NO_PAD.decode(id).ok()?.try_into().ok()?,
                members: members.parse().ok()?,
            }),
            _ => return None,
        };
        let note = Note { role, revives, tx, origin };
        (note.to_message() == text).then_some(note)
    }
}

/// Why bytes are not a change that any honest peer sends.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a valid change: {0}")]
pub struct MalformedChange(pub &'static str);

/// A change that parsed: its header is known and its operations can be listed.
#[derive(Clone, Debug)]
pub struct Change {
    raw: RawChange,
    hash: ChangeHash,
    time: Hlc,
    note: Note,
    author: Option<Author>,
}

impl Change {
    /// Parses the bytes of one change as a peer sent them. Checks the bounds of this module
    /// and that the message and author are ours; everything else is admission's business.
    pub fn parse(bytes: &[u8]) -> Result<Self, MalformedChange> {
        let raw = parse_raw(bytes)?;
        // The library leaves the checksum of a chunk unchecked here; without it one hash would
        // have many byte forms.
        if bytes.get(4..8) != Some(&raw.hash().0[..4]) {
            return Err(MalformedChange("its checksum is wrong"));
        }
        Self::from_raw(raw)
    }

    /// Takes a change that this process built or loaded.
    pub fn from_raw(raw: RawChange) -> Result<Self, MalformedChange> {
        if raw.is_empty() {
            return Err(MalformedChange("it has no operations"));
        }
        if raw.len() > CHANGE_OPS_MAX || raw.deps().len() > CHANGE_DEPS_MAX {
            return Err(MalformedChange("too many operations or dependencies"));
        }
        let start_op = raw.start_op().get();
        if start_op.checked_add(raw.len() as u64).is_none_or(|end| end > OP_COUNTER_MAX) {
            return Err(MalformedChange("operation counter out of range"));
        }
        let time = Hlc::from_change_time(raw.timestamp()).ok_or(MalformedChange("negative time"))?;
        let note = raw
            .message()
            .and_then(Note::from_message)
            .ok_or(MalformedChange("its message is not one of ours"))?;
        let author = match raw.author() {
            None if raw.seq() == 1 => {
                return Err(MalformedChange("the first change of an actor names no author"));
            }
            None => None,
            Some(_) if raw.seq() != 1 => return Err(MalformedChange("a later change names an author again")),
            Some(author) => {
                Some(Author::from_bytes(author.as_bytes()).ok_or(MalformedChange("unknown form of author"))?)
            }
        };
        let hash = raw.hash();
        Ok(Self { raw, hash, time, note, author })
    }

    /// The hash that names the change.
    pub fn hash(&self) -> ChangeHash {
        self.hash
    }

    /// When it was written, by its author's clock.
    pub fn time(&self) -> Hlc {
        self.time
    }

    /// Its message.
    pub fn note(&self) -> Note {
        self.note
    }

    /// The edit that it makes, again or for the first time.
    pub fn origin(&self) -> Origin {
        self.note.origin.unwrap_or_else(|| Origin::of(&self.hash))
    }

    /// Who wrote it, where this is the actor's first change.
    pub fn author(&self) -> Option<Author> {
        self.author
    }

    /// Its actor.
    pub fn actor(&self) -> &ActorId {
        self.raw.actor_id()
    }

    /// Its place among the actor's changes, from 1.
    pub fn seq(&self) -> u64 {
        self.raw.seq()
    }

    /// What it directly depends on.
    pub fn deps(&self) -> &[ChangeHash] {
        self.raw.deps()
    }

    /// Counter of its first operation.
    pub fn start_op(&self) -> u64 {
        self.raw.start_op().get()
    }

    /// Counter of its last operation.
    pub fn max_op(&self) -> u64 {
        self.start_op() + self.raw.len() as u64 - 1
    }

    /// How many operations it has.
    pub fn operations(&self) -> usize {
        self.raw.len()
    }

    /// What it weighs for those who look at it, in bytes: its own, or more where few stand for many
    /// operations.
    pub fn weight(&self) -> usize {
        weight(self.bytes())
    }

    /// The plain bytes, as they are sent and stored.
    pub fn bytes(&self) -> &[u8] {
        self.raw.raw_bytes()
    }

    /// The library's form, to be applied.
    pub fn raw(&self) -> &RawChange {
        &self.raw
    }

    /// The operations, with every id written out. Runs where a panic is caught: checksums
    /// say nothing about the columns inside.
    ///
    /// Columns can say one thing in many ways, and a document keeps what they say, not how: a
    /// change in any but the usual form has another hash when the document is loaded again, which
    /// then fails. So any other form is refused.
    pub fn expand(&self) -> Result<ExpandedChange, MalformedChange> {
        // Read out twice, so that there is one copy at a time.
        let read = || (is_usual_form(&self.raw, self.raw.decode()), self.raw.decode());
        match catch_unwind(AssertUnwindSafe(read)) {
            Ok((true, expanded)) => Ok(expanded),
            Ok((false, _)) => Err(MalformedChange("it is not in the form that changes have")),
            Err(_) => Err(MalformedChange("its operations cannot be read")),
        }
    }
}

/// Whether the library would write these operations as this change.
fn is_usual_form(raw: &RawChange, mut expanded: ExpandedChange) -> bool {
    // It would draw an actor for an author; what it keeps of one are these bytes.
    expanded.author = None;
    expanded.extra_bytes = raw.extra_bytes().to_vec();
    expanded.hash = None;
    RawChange::from(expanded).raw_bytes() == raw.raw_bytes()
}

/// See [`Change::weight`]. What is no change, or claims more than one may hold, is not read out.
pub(crate) fn weight(bytes: &[u8]) -> usize {
    let read = columns::claim(bytes).filter(|claim| {
        claim.items <= CHANGE_OPS_MAX as u64 && claim.text_bytes <= CHANGE_KEY_BYTES_MAX as u64
    });
    bytes.len().max(read.map_or(0, |claim| claim.weight() as usize))
}

/// The library's parse of a plain change, bounded in time and memory.
pub(crate) fn parse_raw(bytes: &[u8]) -> Result<RawChange, MalformedChange> {
    if bytes.len() > CHANGE_BYTES_MAX {
        return Err(MalformedChange("larger than a change may be"));
    }
    // magic (4), checksum (4), then the chunk type: 1 is a plain change.
    if bytes.get(8) != Some(&1) {
        return Err(MalformedChange("not a plain change chunk"));
    }
    let claim = columns::claim(bytes).ok_or(MalformedChange("its columns cannot be read"))?;
    if claim.items > CHANGE_OPS_MAX as u64 || claim.text_bytes > CHANGE_KEY_BYTES_MAX as u64 {
        return Err(MalformedChange("its columns claim more than a change may hold"));
    }
    catch_unwind(|| RawChange::from_bytes(bytes.to_vec()))
        .map_err(|_| MalformedChange("its columns cannot be read"))?
        .map_err(|_| MalformedChange("it cannot be parsed"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_read_back_and_nothing_else_is_a_note() {
        let tx = TxMark { id: [7; 16], members: 3 };
        let origin = Origin([9; 12]);
        for role in [Role::Device, Role::Authority] {
            for revives in [false, true] {
                for (tx, origin) in
                    [(None, None), (Some(tx), None), (None, Some(origin)), (Some(tx), Some(origin))]
                {
                    let note = Note { role, revives, tx, origin };
                    assert_eq!(Note::from_message(&note.to_message()), Some(note));
                }
            }
        }
        for wrong in [
            "",
            "x",
            "d.",
            "d..",
            "dd",
            "d.AAAA.1",
            "d.BwcHBwcHBwcHBwcHBwcHBw.03",
            "d.BwcHBwcHBwcHBwcHBwcHBw.3.4",
            "d~",
            "d~AAAA",
            "d~AAAAAAAAAAAAAAAA~AAAAAAAAAAAAAAAA",
            "d~AAAAAAAAAAAAAAAA.BwcHBwcHBwcHBwcHBwcHBw.3",
            "~AAAAAAAAAAAAAAAA",
        ] {
            assert_eq!(Note::from_message(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn garbage_is_no_change() {
        assert!(Change::parse(b"").is_err());
        assert!(Change::parse(&[0; 100]).is_err());
        let mut deflated = vec![0x85, 0x6f, 0x4a, 0x83, 0, 0, 0, 0, 2];
        deflated.extend([0; 50]);
        assert_eq!(Change::parse(&deflated).unwrap_err(), MalformedChange("not a plain change chunk"));
    }
}
