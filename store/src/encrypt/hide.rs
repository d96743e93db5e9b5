//! How keys are hidden; see [`super`].

use std::fmt::Write as _;

use anabranch_core::store::KeyForm;
use zeroize::Zeroizing;

use super::key_file::DataKey;
use super::{is_secret, keyspace_of};

/// Bytes of a pseudo-random key.
const SECRET_BYTES: usize = 32;
/// Four make a strong pseudo-random permutation of a pseudo-random function (Luby and Rackoff,
/// 1988); for short blocks more are needed.
const ROUNDS: u8 = 8;

/// Hides keys, and finds those again that can be found.
pub(super) struct Hider {
    key: Zeroizing<[u8; 32]>,
}

impl Hider {
    pub(super) fn new(key: &DataKey) -> Hider {
        Hider { key: Zeroizing::new(blake3::derive_key("anabranch 2026 store keys v1", key.as_slice())) }
    }

    /// The key under which `key` is stored.
    pub(super) fn hide(&self, key: &[u8]) -> Vec<u8> {
        if is_secret(keyspace_of(key)) { self.secret(key).to_vec() } else { self.permuted(key, false) }
    }

    /// The key that is stored as `stored_key` in a keyspace of hashes.
    pub(super) fn reveal(&self, stored_key: &[u8]) -> Vec<u8> {
        self.permuted(stored_key, true)
    }

    /// The stored form of a secret key.
    pub(super) fn secret(&self, key: &[u8]) -> [u8; 1 + SECRET_BYTES] {
        let mut out = [0; 1 + SECRET_BYTES];
        out[0] = keyspace_of(key).0;
        out[1..].copy_from_slice(blake3::keyed_hash(&self.key, key).as_bytes());
        out
    }

    /// How many bytes of a key the keyspace and its hashes take, if `key` has them all.
    pub(super) fn hashes(&self, key: &[u8]) -> Option<usize> {
        let bytes = 1 + hash_lengths(key).iter().sum::<usize>();
        (key.len() >= bytes).then_some(bytes)
    }

    fn permuted(&self, key: &[u8], back: bool) -> Vec<u8> {
        let mut out = key.to_vec();
        let mut rest = out.get_mut(1..).unwrap_or_default();
        for (place, bytes) in hash_lengths(key).iter().enumerate() {
            // A key that ends within a hash is none of ours, yet must not be readable.
            let (block, behind) = rest.split_at_mut((*bytes).min(rest.len()));
            self.permute(keyspace_of(key).0, place as u8, block, back);
            rest = behind;
        }
        out
    }

    /// A Feistel network over the two halves of a block.
    fn permute(&self, keyspace: u8, place: u8, block: &mut [u8], back: bool) {
        let length = block.len() as u64;
        let (left, right) = block.split_at_mut(block.len() / 2);
        for step in 0..ROUNDS {
            let round = if back { ROUNDS - 1 - step } else { step };
            let (source, target) = if round % 2 == 0 { (&*right, &mut *left) } else { (&*left, &mut *right) };
            let mut hasher = blake3::Hasher::new_keyed(&self.key);
            // The last byte is never a keyspace, with which what `secret` hashes begins.
            hasher.update(&[0, keyspace, place, round]).update(&length.to_be_bytes()).update(source);
            let mut pad = hasher.finalize_xof();
            let mut mask = [0; 64];
            for chunk in target.chunks_mut(mask.len()) {
                pad.fill(&mut mask);
                chunk.iter_mut().zip(mask).for_each(|(byte, mask)| *byte ^= mask);
            }
        }
    }
}

/// The hashes with which a key of this keyspace begins.
fn hash_lengths(key: &[u8]) -> &'static [usize] {
    match keyspace_of(key).key_form() {
        KeyForm::Hashes(lengths) if keyspace_of(key).0 != 0 => lengths,
        _ => &[],
    }
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use anabranch_core::store::Keyspace;

    fn hider() -> Hider {
        Hider::new(&DataKey::new([7; 32]))
    }

    #[test]
    fn what_is_hidden_is_found_again_and_numbers_keep_their_order() {
        let hider = hider();
        for keyspace in [Keyspace::DOC, Keyspace::FEED] {
            let mut longest = vec![keyspace.0];
            longest.extend(1..=70);
            for length in 1..longest.len() {
                let hidden = hider.hide(&longest[..length]);
                assert_eq!(hidden.len(), length);
                assert_eq!(hider.reveal(&hidden), longest[..length]);
                // One byte may happen to be mapped to itself, more than four won't.
                assert!(length < 5 || hidden[1..5] != longest[1..5], "length {length} is readable");
            }
            let hashes = hider.hashes(&longest).unwrap();
            assert_eq!(hider.hide(&longest)[hashes..], longest[hashes..]);
            assert_eq!(hider.hashes(&longest[..hashes - 1]), None);
        }
    }

    #[test]
    fn other_keys_and_places_hide_otherwise() {
        let key = [&[Keyspace::DOC.0][..], &[1; 48]].concat();
        let hidden = hider().hide(&key);
        assert_ne!(hidden, Hider::new(&DataKey::new([8; 32])).hide(&key));
        let feed = [&[Keyspace::FEED.0][..], &[1; 48]].concat();
        assert_ne!(hidden[1..17], hider().hide(&feed)[1..17]);
        assert_ne!(hidden[1..17], hidden[17..33]);
    }

    #[test]
    fn secret_keys_show_their_keyspace_only() {
        let hidden = hider().hide(b"\x05workout\0anna");
        assert_eq!((hidden.len(), hidden[0]), (1 + SECRET_BYTES, 5));
        assert_ne!(hidden, hider().hide(b"\x05workout\0annb"));
    }
}
