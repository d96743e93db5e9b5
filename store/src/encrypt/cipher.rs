//! XChaCha20-Poly1305, as draft-irtf-cfrg-xchacha-03 has it: HChaCha20 makes a key of its own of the
//! first 16 bytes of the nonce; ChaCha20-Poly1305 takes that key, and the last eight bytes as nonce.
//!
//! ring knows only the second half, and is an order of magnitude faster than what knows both.

use chacha20::cipher::consts::U10;
use chacha20::cipher::{KeyIvInit, StreamCipher, StreamCipherSeek};
use chacha20::{XChaCha20, hchacha};
use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, Tag, UnboundKey};
use zeroize::Zeroizing;

pub(super) const NONCE_BYTES: usize = 24;
pub(super) const TAG_BYTES: usize = 16;
const PREFIX_BYTES: usize = 16;

/// What does not open: another key, other associated data, or changed bytes.
#[derive(Debug)]
pub(super) struct Refused;

/// See the [module](self).
pub(super) struct Cipher {
    key: Zeroizing<[u8; 32]>,
}

impl Cipher {
    pub(super) fn new(key: Zeroizing<[u8; 32]>) -> Cipher {
        Cipher { key }
    }

    /// `nonce ‖ ciphertext ‖ tag` of the parts of a text, one after the other. No nonce may be used twice.
    pub(super) fn seal(
        &self,
        nonce: &[u8; NONCE_BYTES],
        associated: &[u8],
        parts: &[&[u8]],
    ) -> Result<Vec<u8>, Refused> {
        let text_bytes: usize = parts.iter().map(|part| part.len()).sum();
        let mut out = Vec::with_capacity(NONCE_BYTES + text_bytes + TAG_BYTES);
        out.extend_from_slice(nonce);
        parts.iter().for_each(|part| out.extend_from_slice(part));
        let (key, rest) = self.halves(nonce)?;
        let text = &mut out[NONCE_BYTES..];
        let tag = key.seal_in_place_separate_tag(rest, Aad::from(associated), text).map_err(|_| Refused)?;
        out.extend_from_slice(tag.as_ref());
        Ok(out)
    }

    /// The text of what [`Cipher::seal`] made.
    pub(super) fn open(&self, associated: &[u8], sealed: &[u8]) -> Result<Vec<u8>, Refused> {
        let (nonce, sealed) = sealed.split_first_chunk().ok_or(Refused)?;
        let (text, tag) = sealed.split_last_chunk::<TAG_BYTES>().ok_or(Refused)?;
        let mut text = text.to_vec();
        let (key, rest) = self.halves(nonce)?;
        key.open_in_place_separate_tag(rest, Aad::from(associated), Tag::from(*tag), &mut text, 0..)
            .map_err(|_| Refused)?;
        Ok(text)
    }

    /// The text whether or not anything was changed. Nothing in it can be trusted.
    pub(super) fn unverified(&self, sealed: &[u8]) -> Result<Vec<u8>, Refused> {
        let (nonce, sealed) = sealed.split_first_chunk::<NONCE_BYTES>().ok_or(Refused)?;
        let (text, _) = sealed.split_last_chunk::<TAG_BYTES>().ok_or(Refused)?;
        let mut text = text.to_vec();
        let mut stream = XChaCha20::new((&*self.key).into(), nonce.into());
        // The first block is the key of the tag.
        stream.seek(64_u64);
        stream.apply_keystream(&mut text);
        Ok(text)
    }

    /// The key and the nonce of the second half.
    fn halves(&self, nonce: &[u8; NONCE_BYTES]) -> Result<(LessSafeKey, Nonce), Refused> {
        let (prefix, rest) = nonce.split_at(PREFIX_BYTES);
        let key = Zeroizing::new(<[u8; 32]>::from(hchacha::<U10>((&*self.key).into(), prefix.into())));
        let key = UnboundKey::new(&CHACHA20_POLY1305, key.as_slice()).map_err(|_| Refused)?;
        let mut short = [0; 12];
        short[4..].copy_from_slice(rest);
        Ok((LessSafeKey::new(key), Nonce::assume_unique_for_key(short)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use chacha20poly1305::aead::{Aead, KeyInit, Payload};
    use chacha20poly1305::{XChaCha20Poly1305, XNonce};

    #[test]
    fn it_is_xchacha20_poly1305() {
        let other = XChaCha20Poly1305::new(&[9; 32].into());
        let cipher = Cipher::new(Zeroizing::new([9; 32]));
        for length in [0, 1, 15, 16, 17, 63, 64, 65, 300, 5000] {
            let text: Vec<u8> = (0..length).map(|n| n as u8).collect();
            let nonce: [u8; NONCE_BYTES] = std::array::from_fn(|n| (n * 7 + length) as u8);
            let payload = Payload { msg: &text, aad: b"key" };
            let expected = other.encrypt(XNonce::from_slice(&nonce), payload).unwrap();
            let half = length / 2;
            let sealed = cipher.seal(&nonce, b"key", &[&text[..half], &text[half..]]).unwrap();
            assert_eq!(sealed, [&nonce[..], &expected].concat());
            assert_eq!(cipher.open(b"key", &sealed).unwrap(), text);
            assert_eq!(cipher.unverified(&sealed).unwrap(), text);
        }
    }

    #[test]
    fn what_was_changed_is_refused() {
        let cipher = Cipher::new(Zeroizing::new([9; 32]));
        let sealed = cipher.seal(&[1; NONCE_BYTES], b"key", &[b"text"]).unwrap();
        for at in 0..sealed.len() {
            let mut changed = sealed.clone();
            changed[at] ^= 1;
            assert!(cipher.open(b"key", &changed).is_err(), "byte {at}");
            assert!(cipher.open(b"key", &sealed[..at]).is_err(), "{at} bytes");
        }
        assert!(cipher.open(b"kez", &sealed).is_err());
        assert!(Cipher::new(Zeroizing::new([8; 32])).open(b"key", &sealed).is_err());
    }
}
