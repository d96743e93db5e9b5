//! The pure logic of Anabranch.

#[macro_use]
pub mod mutation;
#[macro_use]
pub mod reached;

pub mod admission;
pub mod change;
pub mod clock;
pub mod codec;
mod columns;
pub mod digest;
pub mod entity;
pub mod genesis;
pub mod header;
pub mod id;
pub mod intent;
pub mod query;
pub mod relay;
pub mod replica;
pub mod rows;
pub mod schema;
pub mod session;
pub mod shape;
pub mod store;
pub mod targets;
pub mod wire;
