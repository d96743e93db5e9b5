//! The pure logic of Anabranch.

pub mod store;
