//! The checksum of each stored value.

use std::fmt::Write as _;

use anabranch_core::store::StoreError;

use crate::backend::Bytes;

const CHECKSUM_BYTES: usize = 4;

/// Appends the checksum. It covers the key too, so that a value under a wrong key is noticed.
pub(super) fn seal(key: &[u8], mut value: Vec<u8>) -> Bytes {
    value.extend_from_slice(&checksum(key, &value));
    value.into()
}

/// The value without its checksum, if that is right.
pub(super) fn unseal<'a>(key: &[u8], stored: &'a [u8]) -> Result<&'a [u8], StoreError> {
    match stored.split_last_chunk::<CHECKSUM_BYTES>() {
        Some((value, sum)) if *sum == checksum(key, value) => Ok(value),
        _ => {
            let (keyspace, key) = key.split_first().unwrap_or((&0, &[]));
            let mut what = format!("the checksum of a value is wrong: keyspace {keyspace}, key ");
            for byte in key {
                let _ = write!(what, "{byte:02x}");
            }
            Err(StoreError::Damaged { what })
        }
    }
}

fn checksum(key: &[u8], value: &[u8]) -> [u8; CHECKSUM_BYTES] {
    let mut hasher = crc32fast::Hasher::new();
    // Lengths are part of it, or bytes could move from the key to the value unnoticed.
    hasher.update(&(key.len() as u64).to_be_bytes());
    hasher.update(key);
    hasher.update(value);
    hasher.finalize().to_be_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flipped_bit_or_a_wrong_key_is_noticed_and_named() {
        let sealed = seal(b"\x05key", b"value".to_vec());
        assert_eq!(unseal(b"\x05key", &sealed).unwrap(), b"value");
        let mut flipped = sealed.to_vec();
        flipped[2] ^= 1;
        let error = unseal(b"\x05key", &flipped).unwrap_err().to_string();
        assert!(error.contains("keyspace 5") && error.contains("6b6579"), "{error}");
        assert!(unseal(b"\x05kez", &sealed).is_err());
        assert!(unseal(b"\x05key", b"abc").is_err(), "shorter than a checksum");
    }
}
