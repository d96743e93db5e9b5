//! Examples of Anabranch: `cargo run -p anabranch-examples --example workouts`.
