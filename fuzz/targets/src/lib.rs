//! What is fuzzed: each target is a plain function of bytes that panics where a promise is
//! broken.
//!
//! The same bodies run under libFuzzer (`fuzz/fuzz_targets`), in a built-in mutation loop
//! (`examples/mutate.rs`) where libFuzzer can't be had, and as ordinary tests over the corpus in
//! `fuzz/corpus` and over random inputs (`tests/corpus.rs`).
//!
//! A body draws what it needs from its bytes ([`Draw`]), so that a failing input shrinks, and
//! reads no clock and no entropy: an input that fails once fails always.

// Everything here is test code: a panic is how it speaks.
#![allow(clippy::unwrap_used)]

pub mod admission;
mod change;
pub mod chunk;
mod draw;
mod engine;
mod files;
mod frame;
mod link;
mod query;
mod relay;
mod replica;
mod schema;
mod store;
mod things;
mod tokens;
mod values;
mod wire;
mod world;

pub use draw::Draw;

/// One target.
#[derive(Clone, Copy)]
pub struct Target {
    /// Its name: that of its binary and of its folder in the corpus.
    pub name: &'static str,
    /// What it promises.
    pub promise: &'static str,
    /// The body.
    pub run: fn(&[u8]),
    /// Inputs to start from, valid ones among them; the same each time.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

/// All targets, the cheapest first.
pub const TARGETS: &[Target] = &[
    Target {
        name: "wire",
        promise: "bytes are a message or are refused; a message reads back as itself",
        run: wire::run,
        seeds: wire::seeds,
    },
    Target {
        name: "frame",
        promise: "a stream gives the same frames wherever it is cut, none above the limit",
        run: frame::run,
        seeds: frame::seeds,
    },
    Target {
        name: "change",
        promise: "bytes are a change within its bounds or are refused, in bounded time",
        run: change::run,
        seeds: change::seeds,
    },
    Target {
        name: "schema",
        promise: "a schema file is read or its mistakes are named; it is written out as it was read",
        run: schema::run,
        seeds: schema::seeds,
    },
    Target {
        name: "token",
        promise: "nothing but a signed token with usable claims lets anybody in",
        run: tokens::run_token,
        seeds: tokens::token_seeds,
    },
    Target {
        name: "invite",
        promise: "invites, addresses, keys and versions are read or refused, and read back as themselves",
        run: tokens::run_invite,
        seeds: tokens::invite_seeds,
    },
    Target {
        name: "files",
        promise: "configurations, requests, keys and small files are read or refused, and read back as themselves",
        run: files::run,
        seeds: files::seeds,
    },
    Target {
        name: "query",
        promise: "a condition or a cursor is understood or refused; pages neither repeat nor skip",
        run: query::run,
        seeds: query::seeds,
    },
    Target {
        name: "values",
        promise: "what a person writes as values is understood or refused, and what is written is kept",
        run: values::run,
        seeds: values::seeds,
    },
    Target {
        name: "store",
        promise: "a store that holds anything at all is an error where it is damaged, never a panic",
        run: store::run,
        seeds: store::seeds,
    },
    Target {
        name: "relay",
        promise: "whatever devices send: a feed without gaps and a digest that belongs to it",
        run: relay::run,
        seeds: relay::seeds,
    },
    Target {
        name: "link",
        promise: "whatever a relay sends: a device goes on and keeps what it wrote",
        run: link::run,
        seeds: link::seeds,
    },
    Target {
        name: "admission",
        promise: "no changed change panics, or leaves a document that does not load again",
        run: admission::run,
        seeds: admission::seeds,
    },
    Target {
        name: "replica_model",
        promise: "a device shows what was written, through errors, crashes and restarts",
        run: replica::run,
        seeds: replica::seeds,
    },
    Target {
        name: "engine_model",
        promise: "an app is shown what it wrote, at once and after every opening and restoring",
        run: engine::run,
        seeds: engine::seeds,
    },
];

/// The target of a name.
pub fn target(name: &str) -> Option<&'static Target> {
    TARGETS.iter().find(|target| target.name == name)
}

/// A sequence that looks random and is the same in every run, for seeds and for mutations.
#[derive(Clone, Debug)]
pub struct Noise(u64);

impl Noise {
    /// The sequence of a number.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x2545_f491_4f6c_dd1d)
    }

    /// The next number (splitmix64).
    pub fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below a bound.
    pub fn below(&mut self, bound: usize) -> usize {
        (self.word() % bound.max(1) as u64) as usize
    }

    /// Some bytes.
    pub fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| (self.word() >> 32) as u8).collect()
    }
}

/// Seeds for targets that draw everything from their bytes.
fn noise_seeds(lengths: &[usize]) -> Vec<Vec<u8>> {
    lengths.iter().enumerate().map(|(number, length)| Noise::new(number as u64).bytes(*length)).collect()
}
