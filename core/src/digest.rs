//! A digest of a workspace's state, to prove cheaply that two sides hold the same.
//!
//! The sum modulo 2²⁵⁶ of blake3(entity ‖ heads) over all entities, with the heads that the
//! relay admitted. Adding and removing one entity's term costs the same whatever is stored.
//! It finds faults; it is no proof against malice.

use automerge::ChangeHash;

use crate::id::EntityHash;

/// The sum over the entities of a workspace.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct Digest(pub [u8; 32]);

impl Digest {
    /// Replaces an entity's term. Heads must be in byte order; no heads means no term.
    pub fn replace(&mut self, entity: EntityHash, before: &[ChangeHash], after: &[ChangeHash]) {
        if before == after {
            return;
        }
        if !before.is_empty() {
            let complement = negate(term(entity, before));
            self.0 = add(self.0, complement);
        }
        if !after.is_empty() {
            self.0 = add(self.0, term(entity, after));
        }
    }
}

impl std::fmt::Display for Digest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl std::fmt::Debug for Digest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Digest({self})")
    }
}

fn term(entity: EntityHash, heads: &[ChangeHash]) -> [u8; 32] {
    debug_assert!(heads.is_sorted());
    let mut hasher = blake3::Hasher::new_derive_key("anabranch 2026 digest v1");
    hasher.update(&entity.0);
    for head in heads {
        hasher.update(&head.0);
    }
    *hasher.finalize().as_bytes()
}

/// Little-endian addition modulo 2²⁵⁶.
fn add(a: [u8; 32], b: [u8; 32]) -> [u8; 32] {
    let mut sum = [0; 32];
    let mut carry = 0u16;
    for (place, out) in sum.iter_mut().enumerate() {
        let total = u16::from(a[place]) + u16::from(b[place]) + carry;
        *out = (total & 0xff) as u8;
        carry = total >> 8;
    }
    sum
}

fn negate(a: [u8; 32]) -> [u8; 32] {
    let mut one = [0; 32];
    one[0] = 1;
    add(a.map(|byte| !byte), one)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_does_not_matter_and_what_left_leaves_no_trace() {
        let (a, b) = (EntityHash([1; 16]), EntityHash([2; 16]));
        let (old, new) = ([ChangeHash([3; 32])], [ChangeHash([4; 32])]);
        let mut left = Digest::default();
        left.replace(a, &[], &old);
        left.replace(b, &[], &old);
        left.replace(a, &old, &new);
        let mut right = Digest::default();
        right.replace(b, &[], &old);
        right.replace(a, &[], &new);
        assert_eq!(left, right);
        left.replace(a, &new, &[]);
        left.replace(b, &old, &[]);
        assert_eq!(left, Digest::default());
    }
}
