//! The relay daemon of Anabranch: `anabranch_core::relay` decides, this crate acts.
//!
//! - [`keys`]: which file lies where in a relay's directory.
//! - [`token`]: tokens and invites, made and checked.
//! - [`config`]: a TOML file, the environment and flags.

pub mod config;
pub mod keys;
pub mod token;
