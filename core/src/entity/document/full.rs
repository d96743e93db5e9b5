//! Automerge.

use std::panic::{AssertUnwindSafe, catch_unwind};

use automerge::transaction::{CommitOptions, Transactable, Transaction};
use automerge::{Author, Automerge, ChangeHash, ObjId, PatchLog, ROOT, ReadDoc, ScalarValue, Value};

use super::{At, Commit, DocumentError, Step};

/// See the [module](super).
#[derive(Clone, Debug)]
pub(in crate::entity) struct Full(Automerge);

fn told(error: impl std::fmt::Display) -> DocumentError {
    error.to_string()
}

impl Full {
    pub(super) fn new() -> Self {
        Self(Automerge::new())
    }

    pub(super) fn load(snapshot: &[u8]) -> Result<Self, DocumentError> {
        Automerge::load(snapshot).map(Self).map_err(told)
    }

    pub(super) fn save(&self) -> Vec<u8> {
        self.0.save()
    }

    pub(super) fn save_proved(&self) -> Result<Vec<u8>, &'static str> {
        let bytes = catch_unwind(AssertUnwindSafe(|| self.0.save())).map_err(|_| "can't be saved")?;
        let again = catch_unwind(AssertUnwindSafe(|| Automerge::load(&bytes)))
            .map_err(|_| "makes the document library panic when it is loaded again")?
            .map_err(|_| "does not load again")?;
        if again.get_heads() != self.0.get_heads() || again.hydrate(None) != self.0.hydrate(None) {
            return Err("loads again as something else");
        }
        Ok(bytes)
    }

    pub(super) fn apply(&mut self, changes: Vec<automerge::Change>) -> Result<(), DocumentError> {
        self.0.apply_changes(changes).map_err(told)
    }

    pub(super) fn fork_at(&self, heads: &[ChangeHash]) -> Result<Self, DocumentError> {
        self.0.fork_at(heads).map(Self).map_err(told)
    }

    pub(super) fn heads(&self) -> Vec<ChangeHash> {
        self.0.get_heads()
    }

    pub(super) fn has(&self, hash: &ChangeHash) -> bool {
        self.0.get_change_meta_by_hash(hash).is_some()
    }

    pub(super) fn change(&self, hash: &ChangeHash) -> Option<automerge::Change> {
        self.0.get_change_by_hash(hash)
    }

    pub(super) fn changes_since(&self, heads: &[ChangeHash]) -> Vec<automerge::Change> {
        self.0.get_changes(heads)
    }

    pub(super) fn change_of(&self, id: &ObjId) -> Option<ChangeHash> {
        self.0.hash_for_opid(id)
    }

    pub(super) fn values(&self, obj: &ObjId, key: &str, at: At<'_>) -> Vec<(ScalarValue, ObjId)> {
        let all = match at {
            Some(heads) => self.0.get_all_at(obj, key, heads),
            None => self.0.get_all(obj, key),
        };
        all.unwrap_or_default().into_iter().filter_map(scalar).collect()
    }

    fn get(&self, key: &str, at: At<'_>) -> Option<(Value<'_>, ObjId)> {
        let found = match at {
            Some(heads) => self.0.get_at(ROOT, key, heads),
            None => self.0.get(ROOT, key),
        };
        found.ok().flatten()
    }

    pub(super) fn value(&self, key: &str, at: At<'_>) -> Option<ScalarValue> {
        scalar(self.get(key, at)?).map(|(scalar, _)| scalar)
    }

    pub(super) fn container(&self, key: &str, at: At<'_>) -> Option<ObjId> {
        match self.get(key, at)? {
            (Value::Object(_), id) => Some(id),
            _ => None,
        }
    }

    pub(super) fn keys(&self, obj: &ObjId, at: At<'_>) -> Vec<String> {
        match at {
            Some(heads) => self.0.keys_at(obj, heads).collect(),
            None => self.0.keys(obj).collect(),
        }
    }

    pub(super) fn length(&self, obj: &ObjId, at: At<'_>) -> usize {
        match at {
            Some(heads) => self.0.length_at(obj, heads),
            None => self.0.length(obj),
        }
    }

    pub(super) fn items(&self, obj: &ObjId, at: At<'_>) -> Vec<(ScalarValue, ObjId)> {
        let items: Vec<_> = match at {
            Some(heads) => self.0.list_range_at(obj, .., heads).collect(),
            None => self.0.list_range(obj, ..).collect(),
        };
        let of = |item: automerge::iter::ListRangeItem<'_>| {
            let id = item.id();
            scalar((item.value.into_value(), id))
        };
        items.into_iter().filter_map(of).collect()
    }

    pub(super) fn text(&self, obj: &ObjId, at: At<'_>) -> String {
        match at {
            Some(heads) => self.0.text_at(obj, heads),
            None => self.0.text(obj),
        }
        .unwrap_or_default()
    }

    pub(super) fn commit(
        &mut self,
        commit: Commit<'_>,
        steps: Vec<Step>,
    ) -> Result<automerge::Change, DocumentError> {
        self.0.set_author(Some(Author::from(commit.author)));
        self.0.set_actor(commit.actor);
        let mut tx = match commit.at {
            Some(heads) => self.0.transaction_at(PatchLog::inactive(), heads).map_err(told)?,
            None => self.0.transaction(),
        };
        for step in steps {
            if let Err(error) = carry_out(step, &mut tx) {
                tx.rollback();
                return Err(told(error));
            }
        }
        let options = CommitOptions::default().with_message(commit.message).with_time(commit.time);
        let (hash, _) = tx.commit_with(options);
        hash.and_then(|hash| self.change(&hash)).ok_or_else(|| "nothing was changed".into())
    }
}

fn scalar((value, id): (Value<'_>, ObjId)) -> Option<(ScalarValue, ObjId)> {
    match value {
        Value::Scalar(scalar) => Some((scalar.into_owned(), id)),
        Value::Object(_) => None,
    }
}

fn carry_out(step: Step, tx: &mut Transaction<'_>) -> Result<(), automerge::AutomergeError> {
    match step {
        Step::Put { obj, key, value, fresh } => {
            if fresh {
                tx.delete(&obj, &*key)?;
            }
            tx.put(&obj, &*key, value)
        }
        Step::Remove { obj, key } => tx.delete(&obj, &*key),
        Step::Increment { key, by } => tx.increment(ROOT, &*key, by),
        Step::Insert { obj, at, items } => {
            let start = at.unwrap_or_else(|| tx.length(&obj));
            for (offset, item) in items.into_iter().enumerate() {
                tx.insert(&obj, start + offset, item)?;
            }
            Ok(())
        }
        Step::RemoveItems { obj, at, count } => {
            for _ in 0..count {
                tx.delete(&obj, at)?;
            }
            Ok(())
        }
        Step::Splice { obj, at, delete, insert } => {
            tx.splice_text(&obj, at, isize::try_from(delete).unwrap_or(isize::MAX), &insert)
        }
    }
}
