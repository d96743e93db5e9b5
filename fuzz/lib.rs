//! What the binaries of `fuzz_targets` have in common.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;

/// Runs a target. libFuzzer's binding aborts at every panic, also at those that are caught where
/// a promise allows for them; here only one that comes out is a finding.
pub fn run(name: &str, data: &[u8]) {
    static QUIET: Once = Once::new();
    QUIET.call_once(|| std::panic::set_hook(Box::new(|_| {})));
    let target = anabranch_fuzz_targets::target(name).expect("a target of that name");
    if catch_unwind(AssertUnwindSafe(|| (target.run)(data))).is_err() {
        std::panic::set_hook(Box::new(|panic| eprintln!("{panic}")));
        eprintln!("{name} breaks its promise: {}", target.promise);
        let _ = catch_unwind(AssertUnwindSafe(|| (target.run)(data)));
        std::process::abort();
    }
}

/// The binary of one target.
#[macro_export]
macro_rules! target {
    ($name:ident) => {
        libfuzzer_sys::fuzz_target!(|data: &[u8]| $crate::run(stringify!($name), data));
    };
}
