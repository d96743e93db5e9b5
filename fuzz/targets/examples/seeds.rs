//! Writes the corpus that the targets start from: `cargo run -p anabranch-fuzz-targets --example
//! seeds`. The same files each time.

// A program for people: a panic is its report.
#![allow(clippy::unwrap_used)]

use std::path::Path;

fn main() {
    for target in anabranch_fuzz_targets::TARGETS {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../corpus").join(target.name);
        std::fs::create_dir_all(&folder).unwrap();
        for (number, seed) in (target.seeds)().into_iter().enumerate() {
            std::fs::write(folder.join(format!("seed-{number:02}")), seed).unwrap();
        }
    }
}
