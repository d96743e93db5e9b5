//! Whatever comes.

use std::collections::{BTreeMap, BTreeSet};

use anabranch_core::change::Change;
use anabranch_core::relay::{Input, RelayConfig};
use anabranch_core::store::Store as _;
use anabranch_core::wire::*;
use proptest::prelude::*;

use crate::support::*;

fn any_message() -> impl Strategy<Value = Vec<u8>> {
    let mut device = Device::new(1);
    let samples: Vec<Message> = vec![
        hello().into(),
        sign_in(Some(&token("writer"))).into(),
        sign_in(Some(&token("admin"))).into(),
        sign_in(None).into(),
        SignIn { channel: 2, ..sign_in(Some("work/ada/writer/t1/9")) }.into(),
        open_from(0).into(),
        open_from(u64::MAX).into(),
        changes(unit([of("n1", &[&device.edit("n1"), &device.edit("n1")])])).into(),
        changes(unit([of("n1", &[&device.edit("n1")]), of("n2", &[&device.write("n2", in_tx(1, 2))])]))
            .into(),
        changes(unit([of("n1", &[]), EntityChanges { id: String::new(), ..of("n1", &[]) }])).into(),
        PushSchema { channel: 1, source: SCHEMA.into() }.into(),
        FetchSchema { channel: 1 }.into(),
        Refresh { channel: 1, token: token("reader") }.into(),
        Fault { channel: None, code: 999, message: "ouch".into() }.into(),
    ];
    let samples: Vec<Vec<u8>> = samples.iter().map(Message::encode).collect();
    prop_oneof![
        8 => prop::sample::select(samples.clone()),
        2 => (prop::sample::select(samples), any::<prop::sample::Index>(), any::<u8>()).prop_map(
            |(mut bytes, at, byte)| {
                let at = at.index(bytes.len());
                bytes[at] ^= byte;
                bytes
            }
        ),
        1 => prop::collection::vec(any::<u8>(), 0..60),
    ]
}

fn any_input() -> impl Strategy<Value = (u8, u64, Vec<u8>)> {
    (0u8..20, 1u64..4, any_message())
}

/// What a device writes in one step: into which of four notes, and how.
#[derive(Clone, Copy, Debug)]
enum Step {
    Good(u8),
    Bad(u8),
    Ahead(u8),
    /// Into the note and the next one, together; with a member that is no good.
    Pair(u8, bool),
    /// The unit so far is sent, or lost, or sent after the next one.
    Send,
    Lose,
    Delay,
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0u8..4).prop_map(Step::Good),
        1 => (0u8..4).prop_map(Step::Bad),
        1 => (0u8..4).prop_map(Step::Ahead),
        3 => (0u8..4, prop::bool::weighted(0.2)).prop_map(|(at, bad)| Step::Pair(at, bad)),
        3 => Just(Step::Send),
        1 => Just(Step::Lose),
        1 => Just(Step::Delay),
    ]
}

/// Turns steps into the units that reach the relay, in order.
fn units_of(script: &[Step]) -> Vec<Unit> {
    let mut device = Device::new(1);
    let (mut current, mut delayed, mut arrived) = (Vec::new(), Vec::new(), Vec::new());
    let mut write = |current: &mut Vec<EntityChanges>, at: u8, draft: Draft| {
        let id = format!("n{}", at % 4);
        current.push(of(&id, &[&device.write(&id, draft)]));
    };
    for (number, step) in script.iter().enumerate() {
        match *step {
            Step::Good(at) => write(&mut current, at, Draft::default()),
            Step::Bad(at) => write(&mut current, at, Draft { field: "nope", ..Draft::default() }),
            Step::Ahead(at) => write(&mut current, at, Draft { ahead_ms: 600_000, ..Draft::default() }),
            Step::Pair(at, bad) => {
                let field = if bad { "nope" } else { "title" };
                write(&mut current, at, Draft { field, ..in_tx(number as u8, 2) });
                write(&mut current, at + 1, in_tx(number as u8, 2));
            }
            Step::Send => {
                arrived.push(unit(std::mem::take(&mut current)));
                arrived.append(&mut delayed);
            }
            Step::Lose => current.clear(),
            Step::Delay => delayed.push(unit(std::mem::take(&mut current))),
        }
    }
    arrived
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// However units are lost, delayed and repeated: what is admitted depends on nothing that
    /// is not, no transaction is admitted in part, nothing is both admitted and refused for
    /// good, and a relay without a cache decides the same.
    #[test]
    fn what_is_admitted_hangs_together(script in prop::collection::vec(any_step(), 1..60)) {
        let units = units_of(&script);
        let run = |cached_entities| {
            let mut world = World::with_schema();
            let mut config = RelayConfig::default();
            config.cached_entities = cached_entities;
            world.crash(config);
            let conn = world.join(&Device::new(1), "writer");
            let answers: Vec<Ack> = units.iter().map(|unit| world.submit(conn, unit.clone())).collect();
            let again: Vec<Ack> = units.iter().map(|unit| world.submit(conn, unit.clone())).collect();
            let third: Vec<Ack> = units.iter().map(|unit| world.submit(conn, unit.clone())).collect();
            (world.whole_feed(), world.digest(), answers, again, third)
        };
        let (feed, digest, answers, again, third) = run(1_000);
        let uncached = run(0);
        prop_assert_eq!((&feed, digest), (&uncached.0, uncached.1));
        prop_assert_eq!((&answers, &again, &third), (&uncached.2, &uncached.3, &uncached.4));
        prop_assert_eq!(digest_of(&feed), digest.1);

        let mut admitted = BTreeSet::new();
        let mut refused = BTreeSet::new();
        for entry in &feed {
            let mut members: BTreeMap<[u8; 16], BTreeSet<&str>> = BTreeMap::new();
            match &entry.body {
                FeedBody::Changes { unit, .. } => {
                    for part in &unit.entities {
                        for change in part.changes.iter().map(|bytes| Change::parse(bytes).unwrap()) {
                            prop_assert!(change.deps().iter().all(|dep| admitted.contains(&dep.0)));
                            prop_assert!(admitted.insert(change.hash().0), "admitted twice");
                            if let Some(tx) = change.note().tx {
                                members.entry(tx.id).or_default().insert(&part.id);
                            }
                        }
                    }
                }
                FeedBody::Refused(r) => prop_assert!(refused.insert(r.hash), "refused twice"),
                _ => {}
            }
            prop_assert!(members.values().all(|members| members.len() == 2), "a transaction in part");
        }
        prop_assert!(admitted.is_disjoint(&refused));
        for answer in third.iter().flat_map(|ack| &ack.refused) {
            prop_assert!(!admitted.contains(&answer.hash));
        }
    }

    /// Whatever devices send, in whatever order: no panic, a feed without a gap, and a digest
    /// that belongs to it, which a relay that comes back reads the same.
    #[test]
    fn nothing_that_comes_in_breaks_the_relay(script in prop::collection::vec(any_input(), 1..60)) {
        let mut config = RelayConfig::default();
        config.require_schema = false;
        config.grant_ms = 5_000;
        let mut world = World::with(config.clone());
        let device = Device::new(1);
        let mut conns = Vec::new();
        for (what, which, bytes) in script {
            if conns.len() < 3 {
                conns.push(world.greet(&device));
            }
            let at = which as usize % conns.len();
            let conn = conns[at];
            match what {
                0 => {
                    world.handle(Input::Disconnected { conn });
                    conns.remove(at);
                }
                1 => world.pass(3_000),
                2 => world.handle(Input::Sent { conn }),
                3 | 4 => world.flush(),
                5 => drop(world.stuck.insert(conn)),
                _ => world.handle(Input::Received { conn, bytes }),
            }
        }
        world.flush();
        prop_assert_eq!(world.store.durable().unwrap().0, world.store.commits());
        world.stuck.clear();
        let feed = world.whole_feed();
        let digest = world.digest();
        prop_assert_eq!(digest_of(&feed), digest.1);
        world.crash(config);
        prop_assert_eq!(world.digest(), digest);
    }
}
