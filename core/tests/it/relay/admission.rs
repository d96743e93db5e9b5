//! What is taken, and what is refused.

use anabranch_core::admission::RefusalCode;
use anabranch_core::change::{Change, Note};
use anabranch_core::genesis::GenesisKind;
use anabranch_core::id::{Author, Incarnation};
use anabranch_core::relay::RelayConfig;
use anabranch_core::wire::*;
use automerge::Change as RawChange;

use crate::support::*;

#[test]
fn a_unit_that_comes_twice_gets_the_same_answer_and_leaves_no_second_trace() {
    let mut world = World::with_schema();
    let mut device = Device::new(1);
    let conn = world.join(&device, "writer");
    let good = device.edit("n1");
    let bad = device.write("n2", Draft { field: "nope", ..Draft::default() });
    let twice = unit([of("n1", &[&good]), of("n2", &[&bad])]);
    let first = world.submit(conn, twice.clone());
    assert_eq!(codes(&first), [RefusalCode::UnknownField]);
    let commits = world.store.commits();
    assert_eq!(world.submit(conn, twice), first);
    assert_eq!(world.store.commits(), commits);
}

#[test]
fn a_unit_holding_known_and_new_changes_feeds_only_the_new() {
    let mut world = World::with_schema();
    let mut device = Device::new(1);
    let conn = world.join(&device, "writer");
    let (one, two) = (device.edit("n1"), device.edit("n1"));
    world.submit(conn, unit([of("n1", &[&one])]));
    world.submit(conn, unit([of("n1", &[&one, &two, &two])]));
    let last = world.whole_feed().into_iter().rev().find_map(|entry| match entry.body {
        FeedBody::Changes { unit, .. } => Some(unit),
        _ => None,
    });
    assert_eq!(last, Some(unit([of("n1", &[&two])])));
}

#[test]
fn a_refusal_is_remembered_and_everybody_hears_of_it() {
    let mut world = World::with_schema();
    let mut device = Device::new(1);
    let conn = world.join(&device, "writer");
    let bad = device.write("n1", Draft { field: "nope", ..Draft::default() });
    let child = device.edit("n1");
    let ack = world.submit(conn, unit([of("n1", &[&bad, &child])]));
    assert_eq!(codes(&ack), [RefusalCode::UnknownField, RefusalCode::DependsOnRefused]);
    let grandchild = device.edit("n1");
    let ack = world.submit(conn, unit([of("n1", &[&grandchild])]));
    assert_eq!(codes(&ack), [RefusalCode::DependsOnRefused], "in a later unit too");
    let told: Vec<_> = world
        .whole_feed()
        .into_iter()
        .filter_map(
            |entry| if let FeedBody::Refused(refused) = entry.body { Some(refused.hash) } else { None },
        )
        .collect();
    assert_eq!(told, [bad.hash().0, child.hash().0, grandchild.hash().0]);
    assert_eq!(digest_of(&world.whole_feed()), world.digest().1);
}

#[test]
fn a_refused_change_takes_nothing_with_it_that_does_not_depend_on_it() {
    let mut world = World::with_schema();
    let mut device = Device::new(1);
    let conn = world.join(&device, "writer");
    let bad = device.write("n1", Draft { field: "nope", ..Draft::default() });
    let good = device.edit("n2");
    let ack = world.submit(conn, unit([of("n1", &[&bad]), of("n2", &[&good])]));
    assert_eq!(ack.refused.iter().map(|r| &*r.id).collect::<Vec<_>>(), ["n1"]);
    assert_eq!(world.submit(conn, unit([of("n2", &[&device.edit("n2")])])).refused, []);
}

#[test]
fn what_a_retry_can_help_is_not_held_against_the_change() {
    let mut world = World::with_schema();
    let mut device = Device::new(1);
    let conn = world.join(&device, "writer");
    let (one, two, three) = (device.edit("n1"), device.edit("n1"), device.edit("n1"));
    let early = unit([of("n1", &[&two, &three])]);
    let missing = RefusalCode::MissingDependency;
    assert_eq!(codes(&world.submit(conn, early.clone())), [missing, missing]);
    world.submit(conn, unit([of("n1", &[&one])]));
    assert_eq!(world.submit(conn, early.clone()).refused, []);

    let ahead = Draft { ahead_ms: 600_000, ..Draft::default() };
    let future = unit([of("n2", &[&device.write("n2", ahead)])]);
    let commits = world.store.commits();
    assert_eq!(codes(&world.submit(conn, future.clone())), [RefusalCode::ClockAhead]);
    assert_eq!(world.store.commits(), commits, "nothing is stored");
    world.pass(600_000);
    assert_eq!(world.submit(conn, future).refused, []);
}

#[test]
fn a_gap_in_a_chain_that_is_known_in_part_can_be_filled() {
    let mut world = World::with_schema();
    let mut device = Device::new(1);
    let conn = world.join(&device, "writer");
    let (one, two, three) = (device.edit("n1"), device.edit("n1"), device.edit("n1"));
    world.submit(conn, unit([of("n1", &[&one])]));
    let ack = world.submit(conn, unit([of("n1", &[&three])]));
    assert_eq!(codes(&ack), [RefusalCode::MissingDependency]);
    assert_eq!(world.submit(conn, unit([of("n1", &[&two, &three])])).refused, []);
}

#[test]
fn a_transaction_is_taken_whole_or_not_at_all() {
    let mut world = World::with_schema();
    let mut device = Device::new(1);
    let conn = world.join(&device, "writer");
    let bad = device.write("a", Draft { field: "nope", ..in_tx(1, 3) });
    let (b, c) = (device.write("b", in_tx(1, 3)), device.write("c", in_tx(1, 3)));
    let after_c = device.write("c", in_tx(2, 2));
    let with_it = device.write("d", in_tx(2, 2));
    let alone = device.edit("e");
    let ack = world.submit(
        conn,
        unit([
            of("a", &[&bad]),
            of("b", &[&b]),
            of("c", &[&c, &after_c]),
            of("d", &[&with_it]),
            of("e", &[&alone]),
        ]),
    );
    use RefusalCode::*;
    assert_eq!(codes(&ack), [UnknownField, Transaction, Transaction, DependsOnRefused, Transaction]);
    assert_eq!(digest_of(&world.whole_feed()), world.digest().1);
    assert_eq!(world.submit(conn, unit([of("e", &[&device.edit("e")])])).refused, []);

    let (f, g) = (device.write("f", in_tx(3, 2)), device.write("g", in_tx(3, 2)));
    let whole = unit([of("f", &[&f]), of("g", &[&g])]);
    assert_eq!(world.submit(conn, whole.clone()).refused, []);
    assert_eq!(world.submit(conn, whole).refused, [], "known members count as present");
}

#[test]
fn a_transaction_that_lacks_a_member_or_has_one_too_many_is_refused() {
    let mut world = World::with_schema();
    let mut device = Device::new(1);
    let conn = world.join(&device, "writer");
    let (a, b, c) =
        (device.write("a", in_tx(1, 2)), device.write("b", in_tx(1, 2)), device.write("c", in_tx(1, 2)));
    let both = [RefusalCode::Transaction; 2];
    let lonely = device.write("l", in_tx(2, 2));
    assert_eq!(codes(&world.submit(conn, unit([of("l", &[&lonely])]))), both[..1]);
    assert_eq!(world.submit(conn, unit([of("a", &[&a]), of("b", &[&b])])).refused, []);
    let late = unit([of("a", &[&a]), of("b", &[&b]), of("c", &[&c])]);
    assert_eq!(codes(&world.submit(conn, late)), both[..1], "it was shown already");
    let (d, e) = (device.write("d", in_tx(3, 2)), device.write("e", in_tx(3, 3)));
    assert_eq!(codes(&world.submit(conn, unit([of("d", &[&d]), of("e", &[&e])]))), both);
}

#[test]
fn a_transaction_waits_whole_for_what_one_member_lacks() {
    let mut world = World::with_schema();
    let mut device = Device::new(1);
    let conn = world.join(&device, "writer");
    let first = device.edit("a");
    let (a, b) = (device.write("a", in_tx(1, 2)), device.write("b", in_tx(1, 2)));
    let tx = unit([of("a", &[&a]), of("b", &[&b])]);
    assert_eq!(codes(&world.submit(conn, tx.clone())), [RefusalCode::MissingDependency; 2]);
    world.submit(conn, unit([of("a", &[&first])]));
    assert_eq!(world.submit(conn, tx).refused, []);
}

#[test]
fn a_reader_writes_nothing_not_even_refusals() {
    let mut world = World::with_schema();
    let mut device = Device::new(1);
    let conn = world.join(&device, "reader");
    let attempt = unit([of("n1", &[&device.edit("n1")])]);
    let commits = world.store.commits();
    assert_eq!(codes(&world.submit(conn, attempt.clone())), [RefusalCode::Forbidden]);
    let garbage = EntityChanges { changes: vec![vec![1, 2, 3]], ..of("n1", &[]) };
    assert_eq!(codes(&world.submit(conn, unit([garbage]))), [RefusalCode::Malformed]);
    assert_eq!(world.store.commits(), commits);
    world.send(conn, sign_in(Some(&token("writer"))));
    world.settle(conn);
    assert_eq!(world.submit(conn, attempt).refused, [], "once it may, the same change is taken");
}

#[test]
fn nobody_writes_as_another_device_role_or_actor() {
    let mut world = World::with_schema();
    let (mut ada, mut eve) = (Device::new(1), Device::new(2));
    let (a, e) = (world.join(&ada, "writer"), world.join(&eve, "writer"));
    let stolen = ada.edit("n1");
    let later = ada.edit("n1");
    let commits = world.store.commits();
    let ack = world.submit(e, unit([of("n1", &[&stolen, &later])]));
    assert_eq!(codes(&ack), [RefusalCode::ForgedAuthor; 2]);
    assert_eq!(world.store.commits(), commits);
    let ack = world.submit(a, unit([of("n1", &[&stolen, &later])]));
    assert_eq!(ack.refused, [], "what another device tried with it does not stick to it");

    let fork = eve.clone();
    let forged_role = eve.write("n2", as_authority());
    assert_eq!(codes(&world.submit(e, unit([of("n2", &[&forged_role])]))), [RefusalCode::ForgedRole]);
    eve = fork;
    let wrong_actor = Author { device: eve.id(), incarnation: Incarnation(9) };
    let actor = Some(wrong_actor.actor(&home(), &key("note", "n3")));
    let forged_actor = eve.write("n3", Draft { actor, ..Draft::default() });
    assert_eq!(codes(&world.submit(e, unit([of("n3", &[&forged_actor])]))), [RefusalCode::ForgedActor]);
    let elsewhere = eve.edit("n4");
    assert_eq!(codes(&world.submit(e, unit([of("n5", &[&elsewhere])]))), [RefusalCode::ForgedActor]);
    assert_eq!(world.submit(e, unit([of("n4", &[&elsewhere])])).refused, [], "in its place it is good");
}

#[test]
fn authorities_and_admins_bring_what_others_wrote_and_writers_do_not() {
    let mut world = World::with_schema();
    let (mut ada, mut backend) = (Device::new(1), Device::new(2));
    let (writer, admin, authority) = (Device::new(3), Device::new(4), Device::new(5));
    let by_ada = [ada.edit("n1"), ada.edit("n1")];
    let country = key("country", "ch");
    let named = || Draft { field: "name", ..as_authority() };
    let by_backend = [backend.write_in(&country, named()), backend.write_in(&country, named())];
    let notes = || unit([of("n1", &[&by_ada[0], &by_ada[1]])]);
    let reference = || unit([of_entity(&country, &[&by_backend[0], &by_backend[1]])]);
    let conn = world.join(&writer, "writer");
    let commits = world.store.commits();
    assert_eq!(codes(&world.submit(conn, notes())), [RefusalCode::ForgedAuthor; 2]);
    assert_eq!(codes(&world.submit(conn, reference())), [RefusalCode::ForgedAuthor; 2]);
    let conn = world.join(&admin, "admin");
    assert_eq!(codes(&world.submit(conn, reference())), [RefusalCode::ForgedRole; 2]);
    assert_eq!(world.store.commits(), commits + 1, "none of these refusals lasts");
    // Out of its place, or without what it builds on, nobody's word helps.
    assert_eq!(codes(&world.submit(conn, unit([of("n2", &[&by_ada[0]])]))), [RefusalCode::ForgedActor]);
    assert_eq!(codes(&world.submit(conn, unit([of("n1", &[&by_ada[1]])]))), [RefusalCode::MissingDependency]);
    assert_eq!(world.submit(conn, notes()).refused, []);
    let conn = world.join(&authority, "authority");
    assert_eq!(world.submit(conn, reference()).refused, []);
    assert_eq!(digest_of(&world.whole_feed()), world.digest().1);
    // It is Ada's as before.
    let conn = world.join(&ada, "writer");
    assert_eq!(world.submit(conn, notes()).refused, [], "it is known");
    assert_eq!(world.submit(conn, unit([of("n1", &[&ada.edit("n1")])])).refused, []);
}

/// Of each change the relay says what is so of that change: a device must be able to tell what is there by another
/// name, and what waits.
#[test]
fn what_is_here_by_another_name_is_said_of_that_alone() {
    let mut world = World::with_schema();
    let mut lost = Device::new(1);
    let first = lost.edit("n1");
    let second = lost.write("n1", in_tx(7, 2));
    let beside = lost.write("n2", in_tx(7, 2));
    let below = lost.edit("n1");
    let mut life = Device::new(1);
    life.author.incarnation = Incarnation::new(7, 0);
    let conn = world.join(&life, "writer");
    let again = |life: &mut Device, of: &Change| {
        let note = Note { origin: Some(of.origin()), ..Note::default() };
        life.write("n1", Draft { note, ..Draft::default() })
    };
    let there = [again(&mut life, &first), again(&mut life, &second)];
    assert_eq!(world.submit(conn, unit([of("n1", &[&there[0], &there[1]])])).refused, []);
    let ack = world.submit(conn, unit([of("n1", &[&first, &second, &below]), of("n2", &[&beside])]));
    let mut found = codes(&ack);
    found.sort();
    let waits = [RefusalCode::MissingDependency; 2];
    assert_eq!(found, [&waits[..], &[RefusalCode::Superseded; 2]].concat());
}

#[test]
fn reference_data_is_written_by_authorities_only() {
    let mut world = World::with_schema();
    let (mut person, mut backend) = (Device::new(1), Device::new(2));
    let (p, b) = (world.join(&person, "writer"), world.join(&backend, "authority"));
    let country = key("country", "ch");
    let name = |draft: Draft| Draft { field: "name", ..draft };
    let attempt = person.write_in(&country, name(Draft::default()));
    assert_eq!(codes(&world.submit(p, unit([of_entity(&country, &[&attempt])]))), [RefusalCode::Forbidden]);
    let real = backend.write_in(&country, name(as_authority()));
    assert_eq!(world.submit(b, unit([of_entity(&country, &[&real])])).refused, []);
    // Its counters are reference data too.
    let visits = |draft: Draft| Draft { increments: Some("visits"), ahead_ms: 1_000, ..draft };
    let onto = vec![(real.hash(), real.max_op())];
    let visit = Device::new(3).write_in(&country, visits(Draft { onto, ..Draft::default() }));
    let third = world.join(&Device::new(3), "writer");
    let ack = world.submit(third, unit([of_entity(&country, &[&visit])]));
    assert_eq!(codes(&ack), [RefusalCode::Forbidden]);
    let counted = backend.write_in(&country, visits(as_authority()));
    assert_eq!(world.submit(b, unit([of_entity(&country, &[&counted])])).refused, []);
}

#[test]
fn a_fork_of_one_actor_is_refused() {
    let mut world = World::with_schema();
    let mut device = Device::new(1);
    let mut clone = device.clone();
    let conn = world.join(&device, "writer");
    world.submit(conn, unit([of("n1", &[&device.edit("n1")])]));
    let other = clone.write("n1", Draft { title: "another".into(), ..Draft::default() });
    assert_eq!(codes(&world.submit(conn, unit([of("n1", &[&other])]))), [RefusalCode::BadSequence]);
}

#[test]
fn without_a_schema_nothing_is_taken_by_default() {
    let mut world = World::strict();
    let mut device = Device::new(1);
    let conn = world.join(&device, "writer");
    let change = device.edit("n1");
    world.send(conn, changes(unit([of("n1", &[&change])])));
    assert_eq!(faults(&world.settle(conn)), [(Some(1), FaultCode::SchemaMissing)]);
    let admin = world.join(&Device::new(9), "admin");
    world.send(admin, PushSchema { channel: 1, source: SCHEMA.into() });
    world.flush();
    assert_eq!(world.submit(conn, unit([of("n1", &[&change])])).refused, []);
    let stranger = device.write_in(&key("planet", "mars"), Draft::default());
    let ack = world.submit(conn, unit([of_entity(&key("planet", "mars"), &[&stranger])]));
    assert_eq!(codes(&ack), [RefusalCode::UnknownField]);
}

#[test]
fn containers_come_from_the_schema_or_else_from_who_uses_them() {
    let counts = || Draft { increments: Some("stars"), ..Draft::default() };
    let mut world = World::with_schema();
    let mut device = Device::new(1);
    let conn = world.join(&device, "writer");
    assert_eq!(world.submit(conn, unit([of("n1", &[&device.write("n1", counts())])])).refused, []);

    let mut world = World::lenient();
    let mut device = Device::new(1);
    let conn = world.join(&device, "writer");
    let change = device.write("n1", counts());
    let ack = world.submit(conn, unit([of("n1", &[&change])]));
    assert_eq!(codes(&ack), [RefusalCode::MissingDependency], "nobody named it");
    let mut named = of("n1", &[&change]);
    named.genesis =
        vec![("stars".into(), GenesisKind::Counter.code()), ("no field!".into(), 1), ("x".into(), 99)];
    assert_eq!(world.submit(conn, unit([named])).refused, []);
    let mut config = RelayConfig::default();
    config.require_schema = false;
    world.crash(config);
    let conn = world.join(&device, "writer");
    let next = device.write("n1", counts());
    assert_eq!(world.submit(conn, unit([of("n1", &[&next])])).refused, [], "it is remembered");
    let forwarded = world.whole_feed().into_iter().find_map(|entry| match entry.body {
        FeedBody::Changes { unit, .. } => Some(unit.entities[0].genesis.clone()),
        _ => None,
    });
    assert_eq!(forwarded, Some(vec![("stars".to_owned(), GenesisKind::Counter.code())]));
}

/// However often it is told.
#[test]
fn a_relay_with_a_schema_takes_nobodys_word_for_what_a_field_is() {
    let mut world = World::with_schema();
    let mut device = Device::new(1);
    let conn = world.join(&device, "writer");
    for _ in 0..2 {
        let mut named = of("n1", &[&device.edit("n1")]);
        named.genesis = vec![("title".into(), GenesisKind::Counter.code())];
        assert_eq!(world.submit(conn, unit([named])).refused, []);
    }
    let forwarded = world.whole_feed().into_iter().filter_map(|entry| match entry.body {
        FeedBody::Changes { unit, .. } => Some(unit.entities[0].genesis.clone()),
        _ => None,
    });
    assert_eq!(forwarded.collect::<Vec<_>>(), [vec![], vec![]]);
}

#[test]
fn malformed_changes_are_refused_and_their_neighbours_taken() {
    let mut world = World::with_schema();
    let mut device = Device::new(1);
    let conn = world.join(&device, "writer");
    let good = device.edit("n1");
    let mut flipped = good.bytes().to_vec();
    *flipped.last_mut().unwrap() ^= 1;
    let mut part = of("n1", &[&good]);
    part.changes.extend([vec![], flipped, vec![0; 40]]);
    let ack = world.submit(conn, unit([part]));
    assert_eq!(codes(&ack), [RefusalCode::Malformed; 3]);
    assert_eq!(digest_of(&world.whole_feed()), world.digest().1);
}

/// Its author holds it by its hash, and others may have it from a relay that looked less closely.
#[test]
fn what_is_a_change_to_the_document_library_alone_is_refused_for_good_by_its_hash() {
    let mut world = World::with_schema();
    let mut device = Device::new(1);
    let honest = device.edit("n1");
    let below = device.edit("n1");
    let mut expanded = honest.expand().unwrap();
    expanded.author = None;
    expanded.extra_bytes = honest.raw().extra_bytes().to_vec();
    expanded.hash = None;
    expanded.message = Some("not one of ours".into());
    let foreign = RawChange::from(expanded);
    let attempt = unit([EntityChanges { changes: vec![foreign.raw_bytes().to_vec()], ..of("n1", &[]) }]);

    // Of what a reader sends nothing is kept.
    let conn = world.join(&device, "reader");
    let commits = world.store.commits();
    assert_eq!(codes(&world.submit(conn, attempt.clone())), [RefusalCode::Malformed]);
    assert_eq!(world.store.commits(), commits);

    let conn = world.join(&device, "writer");
    let ack = world.submit(conn, attempt.clone());
    assert_eq!(codes(&ack), [RefusalCode::Malformed]);
    assert_eq!(ack.refused[0].hash, foreign.hash().0);
    let told = world.whole_feed().into_iter().filter_map(|entry| match entry.body {
        FeedBody::Refused(refused) => Some(refused.hash),
        _ => None,
    });
    assert_eq!(told.collect::<Vec<_>>(), [foreign.hash().0]);
    let commits = world.store.commits();
    assert_eq!(world.submit(conn, attempt).refused, ack.refused);
    assert_eq!(world.store.commits(), commits, "it is known");
    let mut expanded = below.expand().unwrap();
    expanded.author = None;
    expanded.hash = None;
    expanded.deps = vec![foreign.hash()];
    let below = RawChange::from(expanded).raw_bytes().to_vec();
    let ack = world.submit(conn, unit([EntityChanges { changes: vec![below], ..of("n1", &[]) }]));
    assert_eq!(codes(&ack), [RefusalCode::DependsOnRefused]);
}

/// A refusal is found by the hash, and the hash does not cover the checksum: if damaged bytes
/// were refused for good, anybody could have anybody's change refused.
#[test]
fn a_damaged_copy_of_a_change_is_not_held_against_the_change() {
    let mut world = World::with_schema();
    let (mut ada, eve) = (Device::new(1), Device::new(2));
    let (a, e) = (world.join(&ada, "writer"), world.join(&eve, "writer"));
    let change = ada.edit("n1");
    let mut damaged = of("n1", &[&change]);
    damaged.changes[0][5] ^= 1;
    let commits = world.store.commits();
    assert_eq!(codes(&world.submit(e, unit([damaged]))), [RefusalCode::Malformed]);
    assert_eq!(world.store.commits(), commits);
    assert_eq!(world.submit(a, unit([of("n1", &[&change])])).refused, []);
}

#[test]
fn units_beyond_their_bounds_are_refused_and_the_session_goes_on() {
    let mut world = World::with_schema();
    let mut device = Device::new(1);
    let conn = world.join(&device, "writer");
    let wide = unit((0..UNIT_ENTITIES_MAX + 1).map(|n| of(&format!("n{n}"), &[])));
    let long = unit([EntityChanges { changes: vec![Vec::new(); 20_001], ..of("n1", &[]) }]);
    let heavy = unit([EntityChanges { changes: vec![vec![0; 1 << 20]; 5], ..of("n1", &[]) }]);
    for unit in [wide, long, heavy] {
        world.send(conn, changes(unit));
        assert_eq!(faults(&world.settle(conn)), [(Some(1), FaultCode::Quota)]);
    }
    assert_eq!(world.submit(conn, unit([of("n1", &[&device.edit("n1")])])).refused, []);
}

#[test]
fn refusals_that_chain_through_transactions_cost_no_more_than_the_unit() {
    let mut world = World::with_schema();
    let mut device = Device::new(1);
    let conn = world.join(&device, "writer");
    // Each transaction holds the end of one entity's chain and the start of the next one's.
    let mut parts = vec![vec![device.write("n0", Draft { field: "nope", ..Draft::default() })]];
    for number in 0..120u8 {
        parts[number as usize].push(device.write(&format!("n{number}"), in_tx(number, 2)));
        parts.push(vec![device.write(&format!("n{}", number + 1), in_tx(number, 2))]);
    }
    let parts = parts.iter().enumerate();
    let ack = world
        .submit(conn, unit(parts.map(|(n, part)| of(&format!("n{n}"), &part.iter().collect::<Vec<_>>()))));
    assert_eq!(ack.refused.len(), 241);
    assert_eq!(digest_of(&world.whole_feed()), world.digest().1);
}

/// A relay that lost everything may have been brought an older schema before it is brought back what a newer one
/// allowed. Refused for good, that would be lost to all who still hold it.
#[test]
fn what_another_brings_back_is_not_refused_for_good_for_a_field_that_the_schema_lacks() {
    let mut world = World::with_schema();
    let (mut author, authority) = (Device::new(1), Device::new(2));
    let conn = world.join(&authority, "authority");
    let change = author.write("n1", Draft { field: "more", ..Draft::default() });
    let lasting = |world: &mut World| {
        world.whole_feed().iter().filter(|entry| matches!(entry.body, FeedBody::Refused(_))).count()
    };
    assert_eq!(codes(&world.submit(conn, unit([of("n1", &[&change])]))), [RefusalCode::UnknownField]);
    assert_eq!(lasting(&mut world), 0);
    let newer = SCHEMA.replacen("version = 1", "version = 2", 1);
    let newer = newer.replacen("\nstars", "\nmore = { type = \"string\" }\nstars", 1);
    world.send(conn, PushSchema { channel: 1, source: newer });
    world.settle(conn);
    assert_eq!(world.submit(conn, unit([of("n1", &[&change])])).refused, []);
    // Its own author can do something about it.
    let conn = world.join(&author, "writer");
    let change = author.write("n2", Draft { field: "never", ..Draft::default() });
    assert_eq!(codes(&world.submit(conn, unit([of("n2", &[&change])]))), [RefusalCode::UnknownField]);
    assert_eq!(lasting(&mut world), 1);
}
