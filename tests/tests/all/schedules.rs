//! Any schedule of edits and meetings ends as the model says, whatever came first.

use anabranch_core::change::Role;
use anabranch_core::schema::EntityType;
use anabranch_tests::draft::{self, Draw};
use anabranch_tests::world::{World, fields, schema};
use proptest::prelude::*;
use proptest::test_runner::{FileFailurePersistence, RngSeed};

/// A field for every policy and every way to hold a value.
pub(crate) const EVERYTHING: &str = r#"
        plain  = { type = "string" }
        flag   = { type = "bool", default = false }
        tied   = { type = "string", tie = "manual" }
        first  = { type = "string", merge = "first_write" }
        best   = { type = "int", merge = "max" }
        least  = { type = "float", merge = "min" }
        latest = { type = "timestamp", merge = "max" }
        count  = { type = "int", merge = "counter" }
        tags   = { type = "set", of = "string" }
        marks  = { type = "set", of = "int" }
        items  = { type = "list", of = "json" }
        body   = { type = "text" }
        days   = { type = "map", of = "json", merge = "lww" }
        tops   = { type = "map", of = "int", merge = "max" }
        firsts = { type = "map", of = "string", merge = "first_write" }
        asks   = { type = "map", of = "string", merge = "manual" }
        ask    = { type = "string", merge = "manual" }
        server = { type = "string", merge = "server_wins" }
        client = { type = "json", merge = "client_wins" }
        only   = { type = "string", merge = "server_only" }
        amount   = { type = "int", merge = "manual", group = "money" }
        currency = { type = "string", merge = "manual", group = "money" }
        street = { type = "string", group = "address" , tie = "manual" }
        city   = { type = "string", group = "address" , tie = "manual" }
        lat = { type = "float", merge = "server_wins", group = "spot" }
        lon = { type = "float", merge = "server_wins", group = "spot" }
        born = { type = "int", merge = "first_write", group = "birth" }
        town = { type = "string", merge = "first_write", group = "birth" }
        "#;

pub(crate) fn everything() -> EntityType {
    fields(EVERYTHING)
}

/// What happens next.
#[derive(Clone, Debug)]
pub(crate) enum Step {
    Edit { device: u8, wait_ms: u16, base: u8, draws: Vec<Draw> },
    Meet { from: u8, to: u8, part: u8 },
}

impl Step {
    /// The same, but this device tells the others nothing.
    pub(crate) fn hears_only(self, device: u8) -> Self {
        match self {
            Step::Meet { from, to, part } => match from % 3 == device {
                true => Step::Meet { from: to, to: from, part },
                false => Step::Meet { from, to, part },
            },
            edit => edit,
        }
    }
}

pub(crate) fn steps(most: usize) -> impl Strategy<Value = Vec<Step>> {
    let draws = prop::collection::vec(any::<Draw>(), 1..4);
    let wait_ms = prop_oneof![3 => Just(0u16), 2 => Just(1), 2 => 2u16..2_000];
    let base = prop_oneof![3 => Just(0u8), 1 => any::<u8>()];
    let edit = (any::<u8>(), wait_ms, base, draws).prop_map(|(device, wait_ms, base, draws)| Step::Edit {
        device,
        wait_ms,
        base,
        draws,
    });
    let meet = (any::<u8>(), any::<u8>(), 0u8..8).prop_map(|(from, to, part)| Step::Meet { from, to, part });
    prop::collection::vec(prop_oneof![3 => edit, 2 => meet], 1..most)
}

/// Devices, some with wrong clocks, sometimes an authority.
pub(crate) fn devices() -> impl Strategy<Value = Vec<(bool, i64)>> {
    let offset = prop_oneof![4 => Just(0i64), 1 => -5_000i64..5_000, 1 => Just(31_536_000_000)];
    prop::collection::vec((prop::bool::weighted(0.3), offset), 2..5)
}

pub(crate) fn world(ty: &EntityType, devices: &[(bool, i64)]) -> World {
    let role = |authority: bool| if authority { Role::Authority } else { Role::Device };
    let roles: Vec<Role> = devices.iter().map(|(authority, _)| role(*authority)).collect();
    let mut world = World::new(ty, &roles);
    for (device, (_, offset_ms)) in world.devices.iter_mut().zip(devices) {
        device.offset_ms = *offset_ms;
    }
    world
}

pub(crate) fn play(world: &mut World, steps: &[Step], unique: &mut u32) {
    let devices = world.devices.len();
    for step in steps {
        match step {
            Step::Meet { from, to, part } => {
                let (from, to) = (usize::from(*from) % devices, usize::from(*to) % devices);
                if from != to {
                    world.meet(from, to, usize::from(*part).min(4), 4);
                }
            }
            Step::Edit { device, wait_ms, base, draws } => {
                let device = usize::from(*device) % devices;
                world.wall_ms += u64::from(*wait_ms);
                let versions = &world.devices[device].versions;
                let base = match (*base, versions.len()) {
                    (0, _) | (_, 0) => None,
                    // The last choice is a form opened before there was anything.
                    (n, len) => Some(versions.get(usize::from(n) % (len + 1)).cloned().unwrap_or_default()),
                };
                let entity = &world.devices[device].entity;
                let row = match &base {
                    Some(base) => entity.row_at(&world.ty, base),
                    None => entity.row(&world.ty),
                };
                let screen = world.screen(device, base.as_deref());
                let creates = entity.headers().is_empty() || base.as_ref().is_some_and(Vec::is_empty);
                let intents = draft::intents(&world.ty, &row, &screen, draws, creates, unique);
                // Refusals that the model foresees are part of the story.
                let _ = world.try_edit(device, base.as_deref(), &intents);
            }
        }
    }
}

/// How many schedules to try. The default is one fixed choice; `ANABRANCH_CASES` draws as
/// many new ones.
pub(crate) fn config(cases: u32) -> ProptestConfig {
    let asked = std::env::var("ANABRANCH_CASES").ok().and_then(|cases| cases.parse().ok());
    ProptestConfig {
        cases: asked.unwrap_or(cases),
        rng_seed: if asked.is_some() { RngSeed::Random } else { RngSeed::Fixed(20_260_101) },
        failure_persistence: Some(Box::new(FileFailurePersistence::Direct(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/seeds/schedules.txt"
        )))),
        max_shrink_iters: 4_000,
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(config(150))]

    #[test]
    fn every_policy_in_any_order(devices in devices(), steps in steps(24), seed: u64) {
        let mut world = world(&everything(), &devices);
        play(&mut world, &steps, &mut 0);
        world.settle(seed);
    }
}

proptest! {
    #![proptest_config(config(60))]

    #[test]
    fn texts_and_lists_in_any_order(devices in devices(), steps in steps(40), seed: u64) {
        let ty = fields("body = { type = \"text\" }\nitems = { type = \"list\", of = \"int\" }");
        let mut world = world(&ty, &devices);
        play(&mut world, &steps, &mut 0);
        world.settle(seed);
    }

    #[test]
    fn one_field_of_each_policy_in_any_order(which: u8, devices in devices(), steps in steps(24), seed: u64) {
        let mut ty = everything();
        let name = ty.fields.keys().nth(usize::from(which) % ty.fields.len()).unwrap().clone();
        let group = ty.fields[&name].group.clone();
        ty.fields.retain(|other, field| *other == name || (group.is_some() && field.group == group));
        ty.groups.retain(|other, _| Some(other) == group.as_ref());
        let mut world = world(&ty, &devices);
        play(&mut world, &steps, &mut 0);
        world.settle(seed);
    }
}

/// The schema of the five apps that the engine is for, where the data is at hand.
fn apps() -> Option<Vec<EntityType>> {
    let data = match std::env::var_os("ANABRANCH_DATA") {
        Some(data) => std::path::PathBuf::from(data),
        None => std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data"),
    };
    let source = std::fs::read_to_string(data.join("schema.toml")).ok()?;
    Some(schema(&source).types.into_values().collect())
}

#[test]
fn every_type_of_the_five_apps_in_any_order() {
    let Some(types) = apps() else {
        println!("skipped: no schema.toml in ANABRANCH_DATA");
        return;
    };
    assert_eq!(types.len(), 19);
    for ty in types {
        let mut runner = proptest::test_runner::TestRunner::new(config(12));
        let plan = (devices(), steps(20), any::<u64>());
        let result = runner.run(&plan, |(devices, steps, seed)| {
            let mut world = world(&ty, &devices);
            play(&mut world, &steps, &mut 0);
            world.settle(seed);
            Ok(())
        });
        result.unwrap_or_else(|failure| panic!("{}: {failure}", ty.name));
    }
}
