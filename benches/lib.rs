//! Benchmarks of Anabranch: `cargo bench -p anabranch-benches`.
