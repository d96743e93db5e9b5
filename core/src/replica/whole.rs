//! A transaction is all or nothing on its author's device too: when a member goes because it was
//! refused, or because written again it means nothing, the others go with it, in the same commit.
//! The relay would refuse them next, and until then people would see half of a transaction.

use std::collections::{BTreeMap, BTreeSet};

use automerge::ChangeHash;

use super::Replica;
use super::apply::Remake;
use crate::admission::RefusalCode;
use crate::clock::Now;
use crate::id::{EntityHash, EntityKey};
use crate::store::{Batch, StoreError};

impl Replica {
    /// Notes that a pending member of a transaction is gone.
    pub(super) fn broke(&mut self, tx: Option<([u8; 16], u32)>) {
        self.broken.extend(tx.map(|(id, _)| id));
    }

    /// Takes out what is left of transactions that lost a member. Returns the entities that were
    /// rebuilt.
    pub(super) fn keep_whole(
        &mut self,
        batch: &mut Batch,
        now: Now,
    ) -> Result<BTreeSet<EntityHash>, StoreError> {
        let mut rebuilt = BTreeSet::new();
        while let Some(tx) = self.broken.pop_first() {
            reached!(TransactionGone);
            let mut left: BTreeMap<EntityHash, (EntityKey, BTreeSet<ChangeHash>)> = BTreeMap::new();
            for pending in self.outbox.values().filter(|pending| !pending.again) {
                if pending.tx.is_some_and(|(id, _)| id == tx) {
                    let entity = left.entry(pending.entity);
                    entity.or_insert_with(|| (pending.key.clone(), BTreeSet::new())).1.insert(pending.hash);
                }
            }
            for (hash, (key, gone)) in left {
                self.load(&key)?;
                let why = "another member of its transaction was refused";
                let reason = (RefusalCode::Transaction.name().to_owned(), why.to_owned());
                let reasons = gone.iter().map(|change| (*change, reason.clone())).collect();
                let numbers = self.pending.get(&hash).into_iter().flatten();
                let new_incarnation =
                    numbers.filter_map(|number| self.outbox.get(number)).any(|pending| pending.sent);
                let remake = Remake { gone, reasons, new_incarnation, ..Remake::default() };
                self.rebuild(batch, now, hash, &remake)?;
                self.unstall(hash);
                rebuilt.insert(hash);
            }
        }
        Ok(rebuilt)
    }
}
