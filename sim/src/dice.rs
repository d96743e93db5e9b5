//! Chance that can be repeated.

/// A small generator of even numbers of chance (splitmix64).
#[derive(Clone, Debug)]
pub struct Dice(pub u64);

impl Dice {
    /// Dice for one purpose: others that are rolled more or less often don't move it.
    pub fn of(seed: u64, purpose: u64) -> Self {
        let mut dice = Dice(seed ^ purpose.wrapping_mul(0xa076_1d64_78bd_642f));
        Dice(dice.word() ^ purpose)
    }

    /// 64 bits.
    pub fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `sides`; 0 where there are none.
    pub fn roll(&mut self, sides: usize) -> usize {
        (self.word() % (sides as u64).max(1)) as usize
    }

    /// A number from a range, its end included.
    pub fn between(&mut self, least: u64, most: u64) -> u64 {
        least + self.word() % (most - least + 1)
    }

    /// Whether something happens that does so once in `n`.
    pub fn once_in(&mut self, n: usize) -> bool {
        self.roll(n) == 0
    }

    /// One of some things.
    pub fn pick<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.roll(of.len())]
    }

    /// A place below `count`, small ones much more often: place n has a weight of 1/(n + 1).
    pub fn skewed(&mut self, count: usize) -> usize {
        let weight = |n: usize| 1_000_000 / (n as u64 + 1);
        let mut at = self.word() % (0..count).map(weight).sum::<u64>().max(1);
        for place in 0..count {
            match at.checked_sub(weight(place)) {
                Some(rest) => at = rest,
                None => return place,
            }
        }
        0
    }

    /// Puts things in another order.
    pub fn shuffle<T>(&mut self, things: &mut [T]) {
        for place in (1..things.len()).rev() {
            things.swap(place, self.roll(place + 1));
        }
    }
}
