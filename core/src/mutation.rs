//! Faults built in on purpose, so that whoever looks for faults can be seen to find them.
//!
//! Without the feature `mutations` there is nothing here, and [`mutated!`](crate::mutated) is
//! `false`. With it, one fault can be switched on for the current thread.

#[cfg(feature = "mutations")]
mod switch {
    use std::cell::Cell;

    /// A fault that can be switched on.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
    pub enum Mutation {
        /// The disk says that it has flushed, and has not.
        SkipFlush,
        /// The relay answers before it has kept.
        AcknowledgeEarly,
        /// What may have arrived is made again as something new.
        ApplyTwice,
        /// Between equal times the order of arrival decides.
        DropTieBreak,
        /// A place in the feed counts that is not the next one.
        AcceptStaleCursor,
        /// A store that went back goes on as who it was.
        ReuseIncarnation,
        /// A deletion counts only until someone else writes.
        DropTombstone,
        /// The members of a transaction travel apart, and the relay takes them so.
        SplitTransaction,
        /// Members of a group are chosen each for itself.
        ResolveApart,
        /// The authority's value can be hidden by a device that has not seen it.
        MaskAuthority,
        /// Wrongly dated changes leave as they are.
        SkipRestamp,
        /// What was refused is judged again when it comes back.
        ReadmitRefused,
        /// Some entities don't count in the digest.
        LeaveOutOfDigest,
        /// The outbox keeps less than what was meant.
        ForgetIntent,
        /// What is made again inserts less than what was meant.
        LoseInserted,
    }

    impl Mutation {
        /// All of them.
        pub const ALL: [Mutation; 15] = {
            use Mutation::*;
            [
                SkipFlush,
                AcknowledgeEarly,
                ApplyTwice,
                DropTieBreak,
                AcceptStaleCursor,
                ReuseIncarnation,
                DropTombstone,
                SplitTransaction,
                ResolveApart,
                MaskAuthority,
                SkipRestamp,
                ReadmitRefused,
                LeaveOutOfDigest,
                ForgetIntent,
                LoseInserted,
            ]
        };
    }

    thread_local! {
        static CURRENT: Cell<Option<Mutation>> = const { Cell::new(None) };
    }

    /// Switches one fault on for this thread, or all off.
    pub fn set(mutation: Option<Mutation>) {
        CURRENT.set(mutation);
    }

    /// Whether a fault is switched on.
    pub fn is(mutation: Mutation) -> bool {
        CURRENT.get() == Some(mutation)
    }
}

#[cfg(feature = "mutations")]
pub use switch::{Mutation, is, set};

/// Whether a fault is switched on; `false`, at no cost, without the feature `mutations`.
#[cfg(feature = "mutations")]
#[macro_export]
#[doc(hidden)]
macro_rules! mutated {
    ($name:ident) => {
        $crate::mutation::is($crate::mutation::Mutation::$name)
    };
}

/// Whether a fault is switched on; `false`, at no cost, without the feature `mutations`.
#[cfg(not(feature = "mutations"))]
#[macro_export]
#[doc(hidden)]
macro_rules! mutated {
    ($name:ident) => {
        false
    };
}
