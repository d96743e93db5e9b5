//! A deterministic simulator of Anabranch.
//!
//! Real replicas, sessions and a real relay run on a simulated network, on simulated disks, by
//! simulated clocks. From a seed follows a [`Plan`] of what users do and what goes wrong;
//! [`run`](run()) carries it out. At the end everything is healed, and what every device shows
//! is held to the reference [`model`], which knows what users meant and no documents.
//!
//! A run repeats to the byte: all order comes from one queue, and all chance from the seed.

// Everything here is test code: a panic is how it speaks.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod acts;
mod apps;
mod cluster;
mod device;
pub mod dice;
mod disk;
pub mod draft;
mod hostile;
mod ledger;
mod minimise;
pub mod model;
mod net;
mod oracle;
mod plan;
mod report;
mod run;
mod salvage;

pub use minimise::minimise;
pub use plan::{Act, Fault, Options, Plan, Step};
pub use report::{Report, classes};
pub use run::{Outcome, keep_panics, run};
