//! Who pushes a schema.

use anabranch_core::relay::RelayConfig;
use anabranch_core::wire::*;

use crate::support::*;

#[test]
fn a_schema_is_pushed_by_those_who_manage_the_workspace() {
    let mut world = World::strict();
    for (number, role) in ["reader", "writer"].into_iter().enumerate() {
        let conn = world.join(&Device::new(number as u8), role);
        world.send(conn, PushSchema { channel: 1, source: SCHEMA.into() });
        let told = world.settle(conn);
        assert_eq!(faults(&told), []);
        let answers = told.iter().filter_map(|m| if let Message::SchemaIs(m) = m { Some(m) } else { None });
        let problems: Vec<&String> = answers.flat_map(|answer| &answer.problems).collect();
        assert_eq!(problems, ["only an admin or an authority pushes a schema"]);
    }
    let admin = world.join(&Device::new(9), "admin");
    let push = |world: &mut World, source: &str| {
        world.send(admin, PushSchema { channel: 1, source: source.into() });
        let told = world.settle(admin);
        told.into_iter()
            .find_map(|m| if let Message::SchemaIs(answer) = m { Some(answer) } else { None })
            .unwrap()
    };
    let broken = push(&mut world, "[note");
    assert_eq!((broken.hash, broken.problems.len()), ([0; 32], 1));
    let first = push(&mut world, SCHEMA);
    assert_eq!(first.problems, Vec::<String>::new());
    let commits = world.store.commits();
    assert_eq!(push(&mut world, SCHEMA), first);
    assert_eq!(world.store.commits(), commits, "the same again changes nothing");
    let incompatible = push(&mut world, &SCHEMA.replace("title =", "name ="));
    assert_eq!(incompatible.hash, first.hash);
    assert!(!incompatible.problems.is_empty());
    let wider = SCHEMA
        .replace("[note]\nversion = 1", "[note]\nversion = 2")
        .replace("[country]", "body = { type = \"text\" }\n[country]");
    let second = push(&mut world, &wider);
    assert_eq!(second.problems, Vec::<String>::new());
    assert_ne!(second.hash, first.hash);
    let told: Vec<Hash> = world
        .whole_feed()
        .into_iter()
        .filter_map(|entry| if let FeedBody::Schema { hash } = entry.body { Some(hash) } else { None })
        .collect();
    assert_eq!(told, [first.hash, second.hash]);

    world.crash(RelayConfig::default());
    let reader = world.join(&Device::new(3), "reader");
    world.send(reader, FetchSchema { channel: 1 });
    let answer = SchemaIs { source: Some(wider), ..second };
    assert_eq!(world.inbox(reader), [Message::SchemaIs(answer)]);
}
