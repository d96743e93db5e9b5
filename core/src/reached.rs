//! Marks on the branches that simulations must reach: those of the policies, of the status of
//! entities and of the machines of sessions.
//!
//! Without the feature `marks` there is nothing here, and [`reached!`](crate::reached) does nothing. With
//! it, each mark counts how often the current thread passed it.

#[cfg(feature = "marks")]
mod count {
    use std::cell::Cell;

    macro_rules! marks {
        ($($name:ident $what:literal $elsewhere:literal,)*) => {
            /// A branch.
            #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
            pub enum Mark {
                $(#[doc = $what] $name,)*
            }

            impl Mark {
                /// All of them.
                pub const ALL: &'static [Mark] = &[$(Mark::$name,)*];

                /// What happens there.
                pub fn what(self) -> &'static str {
                    match self {
                        $(Mark::$name => $what,)*
                    }
                }

                /// The test that reaches it, where no simulation of honest software can.
                pub fn elsewhere(self) -> Option<&'static str> {
                    let test = match self {
                        $(Mark::$name => $elsewhere,)*
                    };
                    (!test.is_empty()).then_some(test)
                }
            }
        };
    }

    marks! {
        PickManualOpen "policy manual: values compete" "",
        PickTieOpen "policy lww, tie manual: equal times compete" "",
        PickTieByTime "policy lww, tie manual: the newest alone" "",
        PickFirst "policy first_write: the first value" "",
        PickFirstNull "policy first_write: nothing but nulls" "",
        PickMax "policy max: the greatest" "",
        PickMin "policy min: the least" "",
        PickBoundNull "policies max and min: nothing but nulls" "",
        PickNewest "the newest of several values" "",
        PickOnly "the only value" "",
        EqualValues "equal values of several devices are one" "",
        PrivilegedNone "policies by role: the first role wrote nothing" "",
        PrivilegedStands "policies by role: the first role's value stands" "",
        PrivilegedSeen "policies by role: the second role had seen the first one's" "",
        PrivilegedAuthority "policy server_wins" "",
        PrivilegedDevice "policy client_wins" "",
        LifeNoDelete "life: never deleted" "",
        LifeRevived "life: brought back on purpose" "",
        LifeEditedLater "life: edited later by someone who had not seen the deletion" "",
        LifeDeleted "life: deleted, and nothing lost" "",
        LifeLostEdit "life: deleted, and edits lost" "",
        LifeOnlyDeletes "life: what is lost is another deletion" "",
        CommonBase "a conflict with a common beginning" "",
        NoCommonBase "a conflict without a common beginning" "",
        WriteOpen "write: the field waits for a person" "",
        WriteSame "write: nothing new" "",
        WriteFirstTaken "write: first_write has its value" "",
        WriteBoundCleared "write: max or min can't be cleared" "",
        WriteBoundKept "write: no greater max, no lesser min" "",
        WriteBoundMoved "write: a greater max, a lesser min" "",
        WriteEntryOpen "write: the entry of a map waits for a person" "",
        ResolveRegister "a register's conflict is settled" "",
        ResolveGroup "a group's conflict is settled" "",
        ResolveEntry "the conflict of an entry is settled" "",
        WriteReference "write: reference data" "",
        WriteDeleted "write: the entity is deleted" "",
        WriteRevives "write: a revival" "",
        DeleteAgain "write: a deletion that lost edits is confirmed" "",
        StatusFailed "status: failed" "",
        StatusConflict "status: conflict" "",
        StatusSynced "status: synced" "",
        StatusPendingDelete "status: pending delete" "",
        StatusPendingCreate "status: pending create" "",
        StatusPendingUpdate "status: pending update" "",
        HeldRefusedParent "held: a parent was refused" "",
        HeldMissing "held: the relay lacks what it builds on" "core/tests/it/again/offers.rs",
        HeldSchemaLost "held: the relay lost the schema" "tests/tests/all/channel.rs",
        HeldDiverged "held: the digests differ" "tests/tests/all/lies.rs; LeaveOutOfDigest of sim/tests/mutations.rs",
        SigningIn "channel: signing in" "",
        Granted "channel: granted" "",
        GrantRenewed "channel: granted again" "",
        GrantedBehind "channel: granted to a store that went back" "",
        GrantedNewEpoch "channel: granted by a relay that went back" "",
        Faulted "channel: refused" "",
        FaultedAfter "channel: refused again behind the first refusal" "",
        FaultedRetry "channel: refused for what time may mend" "",
        Distrusted "channel: the relay said what can't be" "tests/tests/all/lies.rs",
        EndedFaulted "channel: the link of a refused one ends" "",
        EndedOffline "channel: the link of another ends" "",
        CaughtUpLate "caught up: by a channel that was refused, or another epoch" "",
        CaughtUpOvertaken "caught up: an answer was faster" "",
        FeedContradicts "feed: another change in the place of an admitted one" "",
        CaughtUpWentBack "caught up: the feed is shorter than before" "tests/tests/all/repair.rs",
        CaughtUpElsewhere "caught up: at another entry" "",
        CaughtUpAskAgain "caught up: asked once more" "",
        CaughtUpRecovered "caught up: what the store lost has come" "",
        CaughtUpRepaired "caught up: what the relay lost can be found" "",
        Live "channel: live" "",
        AckStalled "answer: what it builds on is missing" "",
        AckSuperseded "answer: the relay has the edit as another change" "tests/tests/all/repair.rs",
        AckAgain "answer: to be written again" "",
        AckGone "answer: refused" "",
        TransactionGone "a transaction loses a member" "",
        SessionReady "session: welcomed" "",
        SessionTwice "session: welcomed twice" "core/src/session.rs; the fuzz target wire",
        SessionIncompatible "session: another version" "core/src/session.rs; engine/tests/sync.rs; the fuzz target wire",
        SessionFault "session: the relay ends it" "",
        SessionEarly "session: a message before the welcome" "core/src/session.rs; the fuzz target wire",
        SessionForeign "session: what only a device sends" "core/src/session.rs; the fuzz target wire",
        SessionChannel "session: a message of a channel" "",
        SessionSkipped "session: something to skip" "core/src/session.rs; the fuzz target wire",
        RelayHello "relay: hello" "",
        RelayNoHello "relay: something else than hello" "",
        RelayHelloLate "relay: no hello in time" "",
        RelayHelloTwice "relay: a second hello" "",
        RelayIncompatible "relay: no common version or feature" "",
        RelayNoise "relay: no message" "",
        RelayUnknown "relay: a message that must be understood and is not" "",
        RelaySkips "relay: a message to skip" "",
        RelayClosing "relay: a message after the end" "",
        RelayDeaf "relay: answers are not read" "",
        RelayForeign "relay: what only a relay sends" "",
        RelayNotSignedIn "relay: not signed in" "",
        RelayExpired "relay: the grant has expired" "",
        RelayOtherWorkspace "relay: another workspace on a channel" "",
        RelayChannels "relay: too many channels" "",
        RelayNoWorkspace "relay: no name of a workspace" "",
        RelayNoLife "relay: more lives than a store can have had" "core/tests/it/relay/sign_in.rs",
        RelayDenied "relay: a token that is refused" "",
        RelayBehind "relay: a store that went back" "",
        RelayGranted "relay: granted" "",
        RelayRefreshed "relay: granted again" "",
        RelayOpenAnew "relay: the feed from another epoch" "",
        RelayOpenBeyond "relay: the feed from beyond its end" "",
        RelayOpen "relay: the feed from a cursor" "",
    }

    const COUNT: usize = Mark::ALL.len();

    thread_local! {
        static PASSED: [Cell<u64>; COUNT] = const { [const { Cell::new(0) }; COUNT] };
    }

    /// Counts one.
    pub fn pass(mark: Mark) {
        PASSED.with(|passed| passed[mark as usize].update(|times| times + 1));
    }

    /// How often each was passed on this thread since this was asked last.
    pub fn take() -> Vec<(Mark, u64)> {
        PASSED.with(|passed| Mark::ALL.iter().map(|mark| (*mark, passed[*mark as usize].take())).collect())
    }
}

#[cfg(feature = "marks")]
pub use count::{Mark, pass, take};

/// Counts that a branch was reached, or which of two; nothing, at no cost, without the feature `marks`.
#[cfg(feature = "marks")]
#[macro_export]
#[doc(hidden)]
macro_rules! reached {
    ($name:ident) => {
        $crate::reached::pass($crate::reached::Mark::$name)
    };
    ($which:expr, $yes:ident, $no:ident) => {
        if $which { $crate::reached!($yes) } else { $crate::reached!($no) }
    };
}

/// Counts that a branch was reached, or which of two; nothing, at no cost, without the feature `marks`.
#[cfg(not(feature = "marks"))]
#[macro_export]
#[doc(hidden)]
macro_rules! reached {
    ($name:ident) => {
        ()
    };
    ($which:expr, $yes:ident, $no:ident) => {
        _ = $which
    };
}
