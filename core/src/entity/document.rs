//! The document of an entity: all that is asked of the document library is asked here.
//!
//! Every build has Automerge behind it. Under the feature `light`, which only the simulator uses, a
//! thread may have light bodies in its place (see [`light`]): the same changes, to the byte,
//! held so that thousands of devices fit into one simulation.

mod full;
#[cfg(any(test, feature = "light"))]
pub(super) mod light;

use automerge::{ActorId, ChangeHash, ObjId, ScalarValue};

use full::Full;
#[cfg(any(test, feature = "light"))]
use light::Light;

/// What the document library says when something can't be done.
pub(super) type DocumentError = String;

/// A version to read; none is the present.
pub(super) type At<'a> = Option<&'a [ChangeHash]>;

/// One operation, decided before the change begins.
#[derive(Clone, Debug)]
pub(super) enum Step {
    /// Write a register or a map's entry: `fresh` removes what is there first, so that the
    /// write carries a new time even where the value stays.
    Put {
        obj: ObjId,
        key: String,
        value: ScalarValue,
        fresh: bool,
    },
    Remove {
        obj: ObjId,
        key: String,
    },
    Increment {
        key: String,
        by: i64,
    },
    /// Insert items; none as position appends.
    Insert {
        obj: ObjId,
        at: Option<usize>,
        items: Vec<ScalarValue>,
    },
    RemoveItems {
        obj: ObjId,
        at: usize,
        count: usize,
    },
    Splice {
        obj: ObjId,
        at: usize,
        delete: usize,
        insert: String,
    },
}

/// What a change says beside its operations.
#[derive(Clone, Debug)]
pub(super) struct Commit<'a> {
    pub(super) actor: ActorId,
    /// Stands in an actor's first change.
    pub(super) author: Vec<u8>,
    /// The version that the change is made on.
    pub(super) at: At<'a>,
    pub(super) message: String,
    pub(super) time: i64,
}

/// See the [module](self).
#[derive(Clone, Debug)]
#[cfg_attr(
    any(test, feature = "light"),
    expect(clippy::large_enum_variant, reason = "the small one is for tests and simulations only")
)]
pub(super) enum Document {
    Full(Full),
    #[cfg(any(test, feature = "light"))]
    Light(Light),
}

/// Asks whichever body there is.
macro_rules! ask {
    ($self:ident, $body:ident => $answer:expr) => {
        match $self {
            Document::Full($body) => $answer,
            #[cfg(any(test, feature = "light"))]
            Document::Light($body) => $answer,
        }
    };
}

impl Document {
    /// Without changes.
    pub(super) fn new() -> Self {
        #[cfg(any(test, feature = "light"))]
        if light::is_on() {
            return Document::Light(Light::default());
        }
        Document::Full(Full::new())
    }

    /// From what [`Document::save`] gave.
    pub(super) fn load(snapshot: &[u8]) -> Result<Self, DocumentError> {
        #[cfg(any(test, feature = "light"))]
        if light::is_on() {
            return Light::load(snapshot).map(Document::Light);
        }
        Full::load(snapshot).map(Document::Full)
    }

    /// The whole document as bytes.
    pub(super) fn save(&self) -> Vec<u8> {
        ask!(self, body => body.save())
    }

    /// The whole document as bytes, after proof that they load as the same.
    pub(super) fn save_proved(&self) -> Result<Vec<u8>, &'static str> {
        ask!(self, body => body.save_proved())
    }

    /// Takes changes. One whose dependencies are not there and don't come with it is not in the
    /// document afterwards.
    pub(super) fn apply(&mut self, changes: Vec<automerge::Change>) -> Result<(), DocumentError> {
        ask!(self, body => body.apply(changes))
    }

    /// The document as it was in a version.
    pub(super) fn fork_at(&self, heads: &[ChangeHash]) -> Result<Self, DocumentError> {
        Ok(match self {
            Document::Full(body) => Document::Full(body.fork_at(heads)?),
            #[cfg(any(test, feature = "light"))]
            Document::Light(body) => Document::Light(body.fork_at(heads)?),
        })
    }

    /// The changes that nothing else builds on, containers' beginnings among them.
    pub(super) fn heads(&self) -> Vec<ChangeHash> {
        ask!(self, body => body.heads())
    }

    /// Whether a change is in the document.
    pub(super) fn has(&self, hash: &ChangeHash) -> bool {
        ask!(self, body => body.has(hash))
    }

    /// One change.
    pub(super) fn change(&self, hash: &ChangeHash) -> Option<automerge::Change> {
        ask!(self, body => body.change(hash))
    }

    /// All changes that a version does not include, in causal order.
    pub(super) fn changes_since(&self, heads: &[ChangeHash]) -> Vec<automerge::Change> {
        ask!(self, body => body.changes_since(heads))
    }

    /// The change in which an operation is.
    pub(super) fn change_of(&self, id: &ObjId) -> Option<ChangeHash> {
        ask!(self, body => body.change_of(id))
    }

    /// The values that stand at a key of a map, concurrent ones side by side.
    pub(super) fn values(&self, obj: &ObjId, key: &str, at: At<'_>) -> Vec<(ScalarValue, ObjId)> {
        ask!(self, body => body.values(obj, key, at))
    }

    /// The value at a key of the root that the library favours; none if it is a container.
    pub(super) fn value(&self, key: &str, at: At<'_>) -> Option<ScalarValue> {
        ask!(self, body => body.value(key, at))
    }

    /// The container at a key of the root.
    pub(super) fn container(&self, key: &str, at: At<'_>) -> Option<ObjId> {
        ask!(self, body => body.container(key, at))
    }

    /// The keys of a map.
    pub(super) fn keys(&self, obj: &ObjId, at: At<'_>) -> Vec<String> {
        ask!(self, body => body.keys(obj, at))
    }

    /// The length of a list, or of a text in code points.
    pub(super) fn length(&self, obj: &ObjId, at: At<'_>) -> usize {
        ask!(self, body => body.length(obj, at))
    }

    /// The items of a list or a text, with their ids.
    pub(super) fn items(&self, obj: &ObjId, at: At<'_>) -> Vec<(ScalarValue, ObjId)> {
        ask!(self, body => body.items(obj, at))
    }

    /// A text.
    pub(super) fn text(&self, obj: &ObjId, at: At<'_>) -> String {
        ask!(self, body => body.text(obj, at))
    }

    /// Makes one change of some steps. If that fails, nothing has changed.
    pub(super) fn commit(
        &mut self,
        commit: Commit<'_>,
        steps: Vec<Step>,
    ) -> Result<automerge::Change, DocumentError> {
        ask!(self, body => body.commit(commit, steps))
    }
}
