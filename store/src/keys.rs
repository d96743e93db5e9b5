//! Physical keys: one byte of keyspace, then the key, so that one ordered map holds all
//! keyspaces in order.

use anabranch_core::store::{Batch, KEY_BYTES_MAX, Keyspace, Op, StoreError, VALUE_BYTES_MAX};

/// The keyspace that the stores use for records of their own.
pub(crate) const OWN: Keyspace = Keyspace(0);

/// Puts the keyspace before the key.
pub(crate) fn physical(keyspace: Keyspace, key: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(1 + key.len());
    out.push(keyspace.0);
    out.extend_from_slice(key);
    out
}

/// The key without its keyspace.
pub(crate) fn logical(physical: &[u8]) -> Vec<u8> {
    physical.get(1..).unwrap_or_default().to_vec()
}

/// Refuses the keyspace of the stores' own records.
pub(crate) fn check_keyspace(keyspace: Keyspace) -> Result<(), StoreError> {
    if keyspace == OWN {
        return Err(StoreError::Io {
            operation: "use keyspace 0",
            cause: "it belongs to the store itself; keyspaces of callers start at 1".into(),
        });
    }
    Ok(())
}

/// Refuses a batch that breaks a bound, before anything of it is queued.
pub(crate) fn check_batch(batch: &Batch) -> Result<(), StoreError> {
    for op in batch.ops() {
        let (keyspace, key, value_bytes) = match op {
            Op::Put(keyspace, key, value) => (*keyspace, key, value.len()),
            Op::Delete(keyspace, key) => (*keyspace, key, 0),
        };
        check_keyspace(keyspace)?;
        if key.len() > KEY_BYTES_MAX {
            return Err(StoreError::TooLarge { what: "key", bytes: key.len(), max_bytes: KEY_BYTES_MAX });
        }
        if value_bytes > VALUE_BYTES_MAX {
            return Err(StoreError::TooLarge {
                what: "value",
                bytes: value_bytes,
                max_bytes: VALUE_BYTES_MAX,
            });
        }
    }
    Ok(())
}

/// A range of physical keys: `lower ≤ key < upper`, where no `upper` means the end.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct KeyRange {
    /// What all keys of the range start with; at least the keyspace.
    pub(crate) prefix: Vec<u8>,
    pub(crate) lower: Vec<u8>,
    pub(crate) upper: Option<Vec<u8>>,
}

impl KeyRange {
    /// The keys that [`Store::scan`](anabranch_core::store::Store::scan) covers; `None` if
    /// there can be none.
    pub(crate) fn forward(keyspace: Keyspace, prefix: &[u8], from: &[u8]) -> Option<KeyRange> {
        let prefix = physical(keyspace, prefix);
        let upper = successor(&prefix);
        let lower =
            if from.is_empty() { prefix.clone() } else { prefix.clone().max(physical(keyspace, from)) };
        KeyRange { prefix, lower, upper }.non_empty()
    }

    /// The keys that [`Store::scan_rev`](anabranch_core::store::Store::scan_rev) covers.
    pub(crate) fn reverse(keyspace: Keyspace, prefix: &[u8], before: &[u8]) -> Option<KeyRange> {
        let prefix = physical(keyspace, prefix);
        let lower = prefix.clone();
        let end = successor(&lower);
        let upper = match (end, before.is_empty()) {
            (end, true) => end,
            (Some(end), false) => Some(end.min(physical(keyspace, before))),
            (None, false) => Some(physical(keyspace, before)),
        };
        KeyRange { prefix, lower, upper }.non_empty()
    }

    /// All keys of a keyspace.
    pub(crate) fn keyspace(keyspace: Keyspace) -> KeyRange {
        let prefix = vec![keyspace.0];
        KeyRange { lower: prefix.clone(), upper: successor(&prefix), prefix }
    }

    /// Ranges over ordered maps panic where the start lies behind the end.
    fn non_empty(self) -> Option<KeyRange> {
        match &self.upper {
            Some(upper) if *upper <= self.lower => None,
            _ => Some(self),
        }
    }

    /// As the bounds that ordered maps take.
    pub(crate) fn bounds<'a, K: From<&'a [u8]>>(&'a self) -> (std::ops::Bound<K>, std::ops::Bound<K>) {
        use std::ops::Bound;
        let upper = match &self.upper {
            Some(upper) => Bound::Excluded(K::from(upper.as_slice())),
            None => Bound::Unbounded,
        };
        (Bound::Included(K::from(self.lower.as_slice())), upper)
    }
}

/// The first key after all keys that start with `prefix`.
pub(crate) fn successor(prefix: &[u8]) -> Option<Vec<u8>> {
    let mut next = prefix.to_vec();
    while let Some(last) = next.pop() {
        if let Some(more) = last.checked_add(1) {
            next.push(more);
            return Some(next);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_of_all_ones_ends_at_the_next_keyspace() {
        let range = KeyRange::forward(Keyspace(4), &[0xff, 0xff], &[]).unwrap();
        assert_eq!(range.upper, Some(vec![5]));
        let range = KeyRange::forward(Keyspace(255), &[0xff], &[]).unwrap();
        assert_eq!(range.upper, None);
    }

    #[test]
    fn a_start_behind_the_prefix_is_an_empty_range_not_a_panic() {
        assert_eq!(KeyRange::forward(Keyspace(4), b"a", b"b"), None);
        assert_eq!(KeyRange::reverse(Keyspace(4), b"b", b"a"), None);
        assert_eq!(KeyRange::reverse(Keyspace(4), b"b", b"b"), None);
    }
}
