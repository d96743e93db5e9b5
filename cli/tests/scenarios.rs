//! The bars of the main job on real processes: devices, an authority and a relay in directories
//! of their own, the real schema and the real input.
//!
//! `ANABRANCH_BIN` names another binary than the one that this build made; `ANABRANCH_DATA` the
//! directory of the input (`../shared/data` beside the workspace by default; tests that need it
//! say so and pass where it is absent). `ANABRANCH_KILL_ROUNDS` sets the rounds of kills,
//! `ANABRANCH_PAPER=full` types all of the paper.

#![expect(clippy::unwrap_used, reason = "a test says what is wrong by panicking")]

#[path = "scenarios/clocks.rs"]
mod clocks;
#[path = "scenarios/deletion.rs"]
mod deletion;
#[path = "scenarios/exercises.rs"]
mod exercises;
#[path = "scenarios/kills.rs"]
mod kills;
#[path = "scenarios/misuse.rs"]
mod misuse;
#[path = "scenarios/network.rs"]
mod network;
#[path = "scenarios/owner.rs"]
mod owner;
#[path = "scenarios/paper.rs"]
mod paper;
#[path = "scenarios/policies.rs"]
mod policies;
#[path = "scenarios/world.rs"]
mod world;
