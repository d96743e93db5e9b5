//! Devices and relays over stores in memory: each thing that they promise is told as a story.

// In a test a panic is the report.
#![allow(clippy::unwrap_used)]

mod again;
mod ancestry;
mod edges;
mod hostile;
mod limits;
mod relay;
mod sharing;
mod support;
