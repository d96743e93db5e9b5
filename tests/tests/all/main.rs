//! One binary, so that the crates under test are linked once.

// Everything here is test code: a panic is how it speaks.
#![allow(clippy::unwrap_used)]

mod channel;
mod faults;
mod lies;
mod network;
mod queries;
mod rebuild;
mod repair;
mod schedules;
mod traps;
mod verify;
