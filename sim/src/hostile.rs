//! Those who attack the relay.

use crate::cluster::Cluster;
use crate::dice::Dice;

/// Damages bytes: flips, cuts, adds.
pub(crate) fn damage(bytes: &mut Vec<u8>, dice: &mut Dice) {
    match dice.roll(4) {
        0 if !bytes.is_empty() => bytes.truncate(dice.roll(bytes.len())),
        1 => bytes.extend((0..1 + dice.roll(64)).map(|_| dice.next() as u8)),
        _ => {
            for _ in 0..1 + dice.roll(4) {
                let place = dice.roll(bytes.len());
                if let Some(byte) = bytes.get_mut(place) {
                    *byte ^= 1 << dice.roll(8);
                }
            }
        }
    }
}

impl Cluster {
    pub(crate) fn attack(&mut self, _dice: &mut Dice) {}
}
