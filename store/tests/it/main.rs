//! What stores on disk keep through kills, power cuts, damage and full disks.

// The helpers of tests are tests too.
#![allow(clippy::unwrap_used)]

mod backup;
mod compact;
mod directory;
mod golden;
mod kill;
mod mount;
mod power;
mod space;
mod workload;
