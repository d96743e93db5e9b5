//! How much devices, users and workspaces may send: a token bucket each. At an empty one nothing
//! is refused: what was sent waits until there is more, and nothing further is read meanwhile.

use std::collections::BTreeMap;

use super::layout::WorkspaceHash;
use crate::clock::MonoMs;
use crate::id::DeviceId;

/// What a message counts at least, in bytes: small ones cost more than their bytes say.
pub(super) const MESSAGE_BYTES_MIN: u64 = 256;
/// Buckets that are full again are forgotten once there are so many more than a moment ago.
const SWEEP_EVERY: usize = 1024;

/// How much may be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Bytes that come free in a second.
    pub bytes_per_s: u64,
    /// Bytes that may come at once after a rest.
    pub burst_bytes: u64,
}

impl Rate {
    /// So many KiB a second, and eight seconds' worth of them at once.
    pub const fn kib_per_s(kib: u64) -> Self {
        Self { bytes_per_s: kib * 1024, burst_bytes: kib * 1024 * 8 }
    }
}

/// What is left of a rate. It may be overdrawn by one message, which is then waited off.
#[derive(Clone, Copy, Debug)]
struct Bucket {
    /// In thousandths of a byte, so that no millisecond is lost to rounding.
    level: i128,
    at: MonoMs,
}

impl Bucket {
    fn full(rate: Rate, now: MonoMs) -> Self {
        Self { level: i128::from(rate.burst_bytes) * 1000, at: now }
    }

    fn refill(&mut self, rate: Rate, now: MonoMs) {
        let passed = now.0.saturating_sub(self.at.0);
        let came = i128::from(rate.bytes_per_s) * i128::from(passed);
        self.level = (self.level + came).min(i128::from(rate.burst_bytes) * 1000);
        self.at = self.at.max(now);
    }

    /// When there is something in it, if there is nothing now.
    fn empty_until(&self, rate: Rate) -> Option<MonoMs> {
        let lacking = 1 - self.level;
        let rate = i128::from(rate.bytes_per_s.max(1));
        (lacking > 0).then(|| self.at + u64::try_from((lacking + rate - 1) / rate).unwrap_or(u64::MAX / 2))
    }
}

/// Whose bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Holder {
    Device(DeviceId),
    User(WorkspaceHash, [u8; 32]),
    Workspace(WorkspaceHash),
}

/// Who sends.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sender<'a> {
    pub(super) workspace: WorkspaceHash,
    pub(super) user: &'a str,
    pub(super) device: DeviceId,
}

/// The buckets of all who sent lately.
#[derive(Debug)]
pub(super) struct Quotas {
    device: Rate,
    user: Rate,
    workspace: Rate,
    buckets: BTreeMap<Holder, Bucket>,
    sweep_at: usize,
}

impl Quotas {
    pub(super) fn new(device: Rate, user: Rate, workspace: Rate) -> Self {
        Self { device, user, workspace, buckets: BTreeMap::new(), sweep_at: SWEEP_EVERY }
    }

    /// Whether more may be taken from a sender now; if not, when.
    pub(super) fn wait_until(&mut self, now: MonoMs, sender: Sender<'_>) -> Option<MonoMs> {
        self.holders(sender)
            .into_iter()
            .filter_map(|(holder, rate)| {
                let bucket = self.buckets.get_mut(&holder)?;
                bucket.refill(rate, now);
                bucket.empty_until(rate)
            })
            .max()
    }

    /// Counts a message that was taken.
    pub(super) fn take(&mut self, now: MonoMs, sender: Sender<'_>, bytes: u64) {
        for (holder, rate) in self.holders(sender) {
            let bucket = self.buckets.entry(holder).or_insert_with(|| Bucket::full(rate, now));
            bucket.refill(rate, now);
            bucket.level -= i128::from(bytes.max(MESSAGE_BYTES_MIN)) * 1000;
        }
        if self.buckets.len() > self.sweep_at {
            self.sweep(now);
        }
    }

    fn holders(&self, sender: Sender<'_>) -> [(Holder, Rate); 3] {
        let user = *blake3::hash(sender.user.as_bytes()).as_bytes();
        [
            (Holder::Device(sender.device), self.device),
            (Holder::User(sender.workspace, user), self.user),
            (Holder::Workspace(sender.workspace), self.workspace),
        ]
    }

    /// Forgets what is full: it says no more than none at all.
    fn sweep(&mut self, now: MonoMs) {
        let (device, user, workspace) = (self.device, self.user, self.workspace);
        self.buckets.retain(|holder, bucket| {
            let rate = match holder {
                Holder::Device(_) => device,
                Holder::User(..) => user,
                Holder::Workspace(_) => workspace,
            };
            bucket.refill(rate, now);
            bucket.level < i128::from(rate.burst_bytes) * 1000
        });
        self.sweep_at = self.buckets.len() + SWEEP_EVERY;
    }
}

/// How long a device keeps a name at least, in milliseconds: each is an entry of the feed for ever, and
/// readers may rename their devices too.
pub(super) const RENAME_MS_MIN: u64 = 60 * 60 * 1000;
/// Devices that are known to have been renamed lately; while there are so many, no other is.
const RENAMES_MAX: usize = 10_000;

/// Which devices were renamed lately. A restart forgets it.
#[derive(Debug, Default)]
pub(super) struct Renames(BTreeMap<(WorkspaceHash, DeviceId), MonoMs>);

impl Renames {
    /// Whether a device of a workspace may have another name now; if so, that counts.
    pub(super) fn take(&mut self, now: MonoMs, device: (WorkspaceHash, DeviceId)) -> bool {
        let is_recent = |at: &MonoMs| now.0.saturating_sub(at.0) < RENAME_MS_MIN;
        if self.0.len() >= RENAMES_MAX {
            self.0.retain(|_, at| is_recent(at));
        }
        if self.0.get(&device).is_some_and(is_recent) || self.0.len() >= RENAMES_MAX {
            return false;
        }
        self.0.insert(device, now);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RATE: Rate = Rate { bytes_per_s: 1_000, burst_bytes: 10_000 };
    const WIDE: Rate = Rate { bytes_per_s: 1_000_000, burst_bytes: 1_000_000 };

    fn sender(device: u8, user: &str) -> Sender<'_> {
        Sender { workspace: WorkspaceHash([1; 16]), user, device: DeviceId([device; 32]) }
    }

    #[test]
    fn a_burst_is_taken_and_then_the_rate() {
        let mut quotas = Quotas::new(RATE, WIDE, WIDE);
        let ann = sender(1, "ann");
        let mut now = MonoMs(5_000);
        for _ in 0..10 {
            assert_eq!(quotas.wait_until(now, ann), None);
            quotas.take(now, ann, 1_000);
        }
        assert_eq!(quotas.wait_until(now, ann), Some(MonoMs(5_001)));
        let mut taken = 0;
        while now.0 < 65_000 {
            match quotas.wait_until(now, ann) {
                Some(at) => {
                    assert!(at > now);
                    now = at;
                }
                None => {
                    quotas.take(now, ann, 500);
                    taken += 500;
                }
            }
        }
        assert!((60_000..61_500).contains(&taken), "{taken}");
        // A long rest fills it to the brim and no more.
        now = MonoMs(1_000_000_000);
        quotas.take(now, ann, 10_000);
        assert!(quotas.wait_until(now, ann).is_some());
    }

    #[test]
    fn each_of_device_user_and_workspace_holds_back() {
        let now = MonoMs(0);
        for (place, rates) in
            [[RATE, WIDE, WIDE], [WIDE, RATE, WIDE], [WIDE, WIDE, RATE]].into_iter().enumerate()
        {
            let [device, user, workspace] = rates;
            let mut quotas = Quotas::new(device, user, workspace);
            quotas.take(now, sender(1, "ann"), 10_000);
            let waits = [sender(1, "ann"), sender(2, "ann"), sender(3, "ben")]
                .map(|sender| quotas.wait_until(now, sender).is_some());
            assert_eq!(waits, [true, place > 0, place > 1]);
        }
    }

    #[test]
    fn a_clock_that_stands_still_or_goes_back_gives_nothing() {
        let mut quotas = Quotas::new(RATE, WIDE, WIDE);
        quotas.take(MonoMs(9_000), sender(1, "ann"), 10_000);
        assert!(quotas.wait_until(MonoMs(3_000), sender(1, "ann")).is_some());
        assert!(quotas.wait_until(MonoMs(9_000), sender(1, "ann")).is_some());
        assert_eq!(quotas.wait_until(MonoMs(9_002), sender(1, "ann")), None);
    }

    #[test]
    fn renames_are_rare_and_remembered_in_bounds() {
        let device = |number: u32| {
            let mut device = [0; 32];
            device[..4].copy_from_slice(&number.to_be_bytes());
            (WorkspaceHash([1; 16]), DeviceId(device))
        };
        let mut renames = Renames::default();
        let now = MonoMs(5_000);
        for number in 0..RENAMES_MAX as u32 {
            assert_eq!([renames.take(now, device(number)), renames.take(now, device(number))], [true, false]);
        }
        assert!(!renames.take(now + (RENAME_MS_MIN - 1), device(u32::MAX)), "as many as are remembered");
        assert!(renames.take(now + RENAME_MS_MIN, device(u32::MAX)));
        assert_eq!(renames.0.len(), 1);
    }

    #[test]
    fn those_who_stopped_sending_are_forgotten() {
        let mut quotas = Quotas::new(WIDE, WIDE, WIDE);
        for second in 0..20_000u64 {
            let mut device = [0; 32];
            device[..8].copy_from_slice(&second.to_be_bytes());
            let user = format!("user{second}");
            let passing = Sender { device: DeviceId(device), ..sender(0, &user) };
            quotas.take(MonoMs(second * 1_000), passing, 1_000);
        }
        assert!(quotas.buckets.len() <= 2 * SWEEP_EVERY, "{}", quotas.buckets.len());
    }
}
