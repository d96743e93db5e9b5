//! A reference model of what entities come to, and a world that holds the engine to it.
//!
//! "All replicas are equal" alone is no test: last write wins everywhere would pass it. So
//! [`model`] computes rows and open conflicts from the log of what users meant, without any
//! document library; [`world`] lets devices edit and meet in every order and compares; and
//! [`draft`] makes edits of any type from a few bytes, so that failures shrink.

// Everything here is test code: a panic is how it speaks.
#![allow(clippy::unwrap_used)]

pub mod net;
pub mod world;

pub use anabranch_sim::{draft, model};
