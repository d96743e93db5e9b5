#![allow(clippy::unwrap_used)]
#[test]
fn explain() {
    anabranch_fuzz_targets::admission::explain();
}
