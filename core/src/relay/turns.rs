//! Whose turn it is: work is shared out between workspaces, within one between users, within one
//! between devices, within one between connections, each by what it has cost so far.
//!
//! At each level whoever has used least goes first (start-time fair queueing, Goyal et al. 1996).
//! Whoever comes back after a rest begins where those who stayed are, not behind, so a pause saves
//! up nothing; and what was used is remembered through a pause, so it pays off no debt either.
//! One origin's backlog therefore delays only itself: others wait for one turn, whatever is queued.

use std::collections::{BTreeMap, BTreeSet};

use super::ConnId;
use super::layout::WorkspaceHash;
use crate::id::DeviceId;

/// Levels of sharing.
const LEVELS: usize = 4;

type Key = [u8; 32];

/// Where work comes from: workspace, user, device, connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Origin([Key; LEVELS]);

impl Origin {
    /// A connection that has signed in to nothing. All of these count as one workspace.
    pub(super) fn stranger(device: DeviceId, conn: ConnId) -> Self {
        Self([[0; 32], [0; 32], device.0, number(conn)])
    }

    /// A connection that has signed in, by its newest sign-in.
    pub(super) fn member(workspace: WorkspaceHash, user: &str, device: DeviceId, conn: ConnId) -> Self {
        let mut place = [0; 32];
        place[..16].copy_from_slice(&workspace.0);
        // Not zero, as for strangers, whatever the hash is.
        place[16] = 1;
        Self([place, *blake3::hash(user.as_bytes()).as_bytes(), device.0, number(conn)])
    }

    /// Whose it is, among all workspaces.
    pub(super) fn user(&self) -> User {
        User(self.0[0], self.0[1])
    }

    pub(super) fn conn(&self) -> ConnId {
        let mut number = [0; 8];
        number.copy_from_slice(&self.0[LEVELS - 1][..8]);
        ConnId(u64::from_be_bytes(number))
    }
}

/// A user of a workspace; those who have not signed in are one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct User(Key, Key);

fn number(conn: ConnId) -> Key {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&conn.0.to_be_bytes());
    key
}

/// The connections that have work, in the order in which they get turns.
#[derive(Debug, Default)]
pub(super) struct Turns(Level);

impl Turns {
    /// Has a connection wait for its turn. One that waits already goes on waiting.
    pub(super) fn wait(&mut self, origin: &Origin) {
        self.0.wait(&origin.0);
    }

    /// A connection has no work any more.
    pub(super) fn rest(&mut self, origin: &Origin) {
        self.0.rest(&origin.0);
    }

    /// Whose turn it is, and after that one those of other users who come next. They stay so until the
    /// first is charged or rests.
    pub(super) fn first(&self) -> impl Iterator<Item = Origin> {
        let users = self.0.in_order().flat_map(|(workspace, users)| {
            users.in_order().map(move |(user, devices)| (workspace, user, devices))
        });
        users.filter_map(|(workspace, user, devices)| {
            let (device, conns) = devices.in_order().next()?;
            let (conn, _) = conns.in_order().next()?;
            Some(Origin([workspace, user, device, conn]))
        })
    }

    /// Counts what a turn has cost against whose it was, on every level.
    pub(super) fn charge(&mut self, origin: &Origin, cost: u64) {
        self.0.charge(&origin.0, cost);
    }

    /// How many origins are remembered, on all levels.
    #[cfg(test)]
    fn size(&self) -> usize {
        self.0.size()
    }
}

/// One level of sharing.
///
/// Invariants: a member is in `waiting` or in `idle`, by what it has used; nothing in `idle` has
/// used less than `clock`; without anyone waiting there are no members, as nobody is owed anything.
#[derive(Debug, Default)]
struct Level {
    /// What the one served last had used before.
    clock: u64,
    members: BTreeMap<Key, Member>,
    waiting: BTreeSet<(u64, Key)>,
    idle: BTreeSet<(u64, Key)>,
}

#[derive(Debug, Default)]
struct Member {
    used: u64,
    below: Level,
}

impl Level {
    /// Those who wait, in the order of their turns.
    fn in_order(&self) -> impl Iterator<Item = (Key, &Level)> {
        self.waiting.iter().filter_map(|(_, key)| Some((*key, &self.members.get(key)?.below)))
    }

    fn wait(&mut self, path: &[Key]) {
        let Some((key, rest)) = path.split_first() else { return };
        let clock = self.clock;
        let member = self.members.entry(*key).or_insert_with(|| Member { used: clock, ..Member::default() });
        self.idle.remove(&(member.used, *key));
        self.waiting.insert((member.used, *key));
        member.below.wait(rest);
    }

    fn rest(&mut self, path: &[Key]) {
        let Some((key, rest)) = path.split_first() else { return };
        let Some(member) = self.members.get_mut(key) else { return };
        member.below.rest(rest);
        if !member.below.waiting.is_empty() || !self.waiting.remove(&(member.used, *key)) {
            return;
        }
        if self.waiting.is_empty() {
            *self = Level::default();
        } else {
            self.idle.insert((member.used, *key));
            self.forget();
        }
    }

    fn charge(&mut self, path: &[Key], cost: u64) {
        let Some((key, rest)) = path.split_first() else { return };
        let Some(member) = self.members.get_mut(key) else { return };
        member.below.charge(rest, cost);
        let before = member.used;
        member.used = before.saturating_add(cost);
        let place = if self.waiting.remove(&(before, *key)) { &mut self.waiting } else { &mut self.idle };
        place.remove(&(before, *key));
        place.insert((member.used, *key));
        if let Some((least, _)) = self.waiting.first() {
            self.clock = self.clock.max(before.min(*least));
        }
        self.forget();
    }

    /// Forgets those who rest and would come back at the clock all the same.
    fn forget(&mut self) {
        while let Some((used, key)) = self.idle.first().copied().filter(|(used, _)| *used <= self.clock) {
            self.idle.remove(&(used, key));
            self.members.remove(&key);
        }
    }

    #[cfg(test)]
    fn size(&self) -> usize {
        self.members.len() + self.members.values().map(|member| member.below.size()).sum::<usize>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(workspace: u8, user: &str, device: u8, conn: u64) -> Origin {
        Origin::member(WorkspaceHash([workspace; 16]), user, DeviceId([device; 32]), ConnId(conn))
    }

    fn first(turns: &Turns) -> ConnId {
        turns.first().next().unwrap().conn()
    }

    /// Serves `turns` turns that cost `cost` each; whose they were, while all go on waiting.
    fn serve(turns: &mut Turns, origins: &[Origin], count: usize, cost: u64) -> Vec<u64> {
        let of = |conn: ConnId| origins.iter().find(|origin| origin.conn() == conn).copied();
        (0..count)
            .map(|_| {
                let conn = first(turns);
                turns.charge(&of(conn).unwrap(), cost);
                conn.0
            })
            .collect()
    }

    #[test]
    fn a_user_with_a_thousand_devices_gets_no_more_than_one_with_one() {
        let mut turns = Turns::default();
        let mut origins: Vec<Origin> =
            (0..1_000).map(|n| member(1, "mallory", (n % 250) as u8, 10 + n)).collect();
        origins.push(member(1, "ann", 255, 1));
        origins.iter().for_each(|origin| turns.wait(origin));
        let served = serve(&mut turns, &origins, 1_000, 7);
        assert_eq!(served.iter().filter(|conn| **conn == 1).count(), 500);
    }

    #[test]
    fn a_workspace_of_many_users_gets_no_more_than_one_of_one_and_strangers_count_as_one() {
        let mut turns = Turns::default();
        let users: Vec<Origin> =
            (0..50).map(|n| member(1, &format!("user{n}"), n, 100 + u64::from(n))).collect();
        let strangers: Vec<Origin> =
            (0..50).map(|n| Origin::stranger(DeviceId([n; 32]), ConnId(200 + u64::from(n)))).collect();
        let alone = member(2, "ann", 77, 1);
        let all = [&users[..], &strangers, &[alone]].concat();
        all.iter().for_each(|origin| turns.wait(origin));
        let served = serve(&mut turns, &all, 900, 3);
        let count = |range: std::ops::Range<u64>| served.iter().filter(|conn| range.contains(*conn)).count();
        assert_eq!((count(1..2), count(100..200), count(200..300)), (300, 300, 300));
    }

    #[test]
    fn turns_are_shared_by_what_they_cost() {
        let mut turns = Turns::default();
        let (dear, cheap) = (member(1, "ann", 1, 1), member(1, "ben", 2, 2));
        turns.wait(&dear);
        turns.wait(&cheap);
        let mut used = [0, 0];
        for _ in 0..1_000 {
            let conn = first(&turns);
            let (origin, cost) = if conn.0 == 1 { (&dear, 100) } else { (&cheap, 1) };
            turns.charge(origin, cost);
            used[conn.0 as usize - 1] += cost;
        }
        assert!(used[0].abs_diff(used[1]) <= 100, "{used:?}");
    }

    #[test]
    fn who_comes_seldom_waits_for_one_turn_only() {
        let mut turns = Turns::default();
        let busy: Vec<Origin> = (0..20).map(|n| member(1, "mallory", n, 10 + u64::from(n))).collect();
        let rare = member(1, "ann", 99, 1);
        busy.iter().for_each(|origin| turns.wait(origin));
        for _ in 0..50 {
            serve(&mut turns, &busy, 13, 1_000);
            turns.wait(&rare);
            assert_eq!(first(&turns), ConnId(1));
            turns.charge(&rare, 5);
            turns.rest(&rare);
        }
    }

    #[test]
    fn a_rest_neither_saves_up_nor_pays_off() {
        let mut turns = Turns::default();
        let (steady, sly) = (member(1, "ann", 1, 1), member(1, "mallory", 2, 2));
        turns.wait(&steady);
        let mut used = [0, 0];
        for _ in 0..300 {
            // Works dearly when it gets a turn, and is not there when it would be another's.
            turns.wait(&sly);
            let conn = first(&turns);
            let (origin, cost) = if conn.0 == 1 { (&steady, 1) } else { (&sly, 50) };
            turns.charge(origin, cost);
            used[conn.0 as usize - 1] += cost;
            turns.rest(&sly);
        }
        assert!(used[1] <= used[0] + 50, "{used:?}");
    }

    #[test]
    fn who_has_left_is_forgotten() {
        let mut turns = Turns::default();
        let steady = member(1, "ann", 1, 1);
        turns.wait(&steady);
        for conn in 2..10_000 {
            let passing = Origin::stranger(DeviceId([conn as u8; 32]), ConnId(conn));
            turns.wait(&passing);
            let first = first(&turns);
            turns.charge(if first.0 == 1 { &steady } else { &passing }, 10);
            turns.rest(&passing);
        }
        serve(&mut turns, &[steady], 3, 10);
        assert_eq!(turns.size(), 4);
        turns.rest(&steady);
        assert_eq!((turns.size(), turns.first().next()), (0, None));
    }
}
