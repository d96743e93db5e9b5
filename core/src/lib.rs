//! The pure logic of Anabranch.

pub mod id;
pub mod schema;
pub mod store;
