//! Time: our own types, so that nothing in core reads a clock.
//!
//! Order comes from causality first. Where two changes are concurrent, their hybrid logical
//! clocks decide (Kulkarni et al., "Logical Physical Clocks", 2014): wall-clock milliseconds
//! with a counter below them, never at or below the time of anything the change depends on.

use std::fmt;
use std::ops::Add;

/// Milliseconds since 1970, UTC.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WallMs(pub u64);

/// Milliseconds of a clock that never jumps; only differences mean something.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MonoMs(pub u64);

impl Add<u64> for MonoMs {
    type Output = MonoMs;

    fn add(self, ms: u64) -> MonoMs {
        MonoMs(self.0.saturating_add(ms))
    }
}

/// What both clocks of a machine say at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Now {
    /// The clock for timeouts.
    pub mono: MonoMs,
    /// The clock that people set, right or wrong.
    pub wall: WallMs,
}

/// Latest wall time that a change can carry: 47 bits, the year 6429.
pub const WALL_MS_MAX: u64 = (1 << 47) - 1;

/// A hybrid logical clock reading: 48 bits of milliseconds above a counter of 16 bits.
/// It is the `time` of an Automerge change, so it is never negative there.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Hlc(u64);

impl Hlc {
    /// The reading of genesis changes, before all others.
    pub const ZERO: Hlc = Hlc(0);

    /// The first reading of a millisecond.
    pub fn from_wall(wall: WallMs) -> Self {
        Hlc(wall.0.min(WALL_MS_MAX) << 16)
    }

    /// Reads the time of a change. `None` where it is negative.
    pub fn from_change_time(time: i64) -> Option<Self> {
        u64::try_from(time).ok().map(Hlc)
    }

    /// The form that a change carries.
    pub fn to_change_time(self) -> i64 {
        i64::try_from(self.0).unwrap_or(i64::MAX)
    }

    /// The milliseconds.
    pub fn wall(self) -> WallMs {
        WallMs(self.0 >> 16)
    }

    /// The counter within the millisecond.
    pub fn counter(self) -> u16 {
        (self.0 & 0xffff) as u16
    }

    /// The number, for storage.
    pub fn to_u64(self) -> u64 {
        self.0
    }

    /// From storage; clamps what a change could not carry.
    pub fn from_u64(value: u64) -> Self {
        Hlc(value.min(i64::MAX as u64))
    }

    /// The reading that is `readings` later.
    pub fn later_by(self, readings: u16) -> Self {
        Hlc((self.0 + u64::from(readings)).min(i64::MAX as u64))
    }

    /// The next reading. The counter carries over into the milliseconds.
    pub fn next(self) -> Self {
        Hlc((self.0 + 1).min(i64::MAX as u64))
    }

    /// The least reading that is at `wall` or later, and later than `after`.
    pub fn at_least(wall: WallMs, after: Hlc) -> Self {
        Hlc::from_wall(wall).max(after.next())
    }
}

impl fmt::Debug for Hlc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}+{}", self.wall().0, self.counter())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reading_is_later_than_what_it_follows_and_no_earlier_than_the_wall() {
        let seen = Hlc::from_wall(WallMs(1_000));
        assert_eq!(Hlc::at_least(WallMs(2_000), seen), Hlc::from_wall(WallMs(2_000)));
        assert_eq!(Hlc::at_least(WallMs(500), seen), seen.next());
        assert!(Hlc::at_least(WallMs(1_000), seen) > seen);
    }

    #[test]
    fn a_full_counter_carries_into_the_milliseconds() {
        let full = Hlc(Hlc::from_wall(WallMs(7)).0 | 0xffff);
        assert_eq!(full.next(), Hlc::from_wall(WallMs(8)));
    }

    #[test]
    fn no_reading_is_negative_as_a_change_time() {
        assert!(Hlc::from_wall(WallMs(u64::MAX)).to_change_time() >= 0);
        assert!(Hlc::from_u64(u64::MAX).to_change_time() >= 0);
        assert_eq!(Hlc::from_change_time(-1), None);
    }
}
