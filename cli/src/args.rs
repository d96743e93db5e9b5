//! The command line.

use std::path::PathBuf;

use anabranch::BackendKind;
use clap::{Args, Parser, Subcommand, ValueEnum};
use serde::{Deserialize, Serialize};

/// Local-first replication: work offline on several devices, rejoin through a relay, agree.
#[derive(Debug, Parser)]
#[command(name = "anabranch", version, propagate_version = true, after_help = AFTER_HELP)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

const AFTER_HELP: &str = "\
Exit codes:
  0  done
  1  a fault of this program
  2  usage: the command line or the set-up has to change
  3  validation: the data don't fit the schema, or this role may not write them
  4  conflict: settle it, or write on top of the newest version
  5  auth: sign in with another token
  6  network: the relay can't be reached; nothing is lost, try again later
  7  not found
  8  quota: a limit was reached
  9  server: the relay failed
 10  storage: the directory can't be read or written
 11  the deadline of a sync passed; what was exchanged until then is kept, go on with another sync";

/// What goes with every command.
#[derive(Clone, Debug, Args)]
pub(crate) struct Global {
    /// The directory of the device, or of the relay
    #[arg(long, global = true, value_name = "DIR")]
    pub(crate) data: Option<PathBuf>,
    /// The file that holds the passphrase of an encrypted directory; `init` makes one encrypted,
    /// and remembers the file's name. In place of a file: the variable ANABRANCH_PASSPHRASE
    #[arg(long, global = true, value_name = "FILE", env = "ANABRANCH_PASSPHRASE_FILE")]
    pub(crate) passphrase_file: Option<PathBuf>,
    /// Print JSON: one object, or one per line for lists and streams; errors too
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// Shift the wall clock, for tests of wrong clocks: 365d, -365d, 90s, 250ms
    #[arg(
        long,
        global = true,
        value_name = "DURATION",
        default_value = "0s",
        allow_hyphen_values = true,
        value_parser = offset_ms,
        hide_default_value = true
    )]
    pub(crate) clock_offset: i64,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a relay until SIGTERM or Ctrl-C
    Relay(RelayArgs),
    /// Make a token or an invite, beside a running relay too
    Token(TokenArgs),
    /// Make the directory of a device
    Init(InitArgs),
    /// Tell a story of three devices and a relay, on real processes
    Demo(DemoArgs),
    /// Check, push and show schemas
    #[command(subcommand)]
    Schema(SchemaCommand),
    /// Look after the store of a device or a relay
    Store(StoreArgs),
    /// Stay connected and print every change; other commands go through this process meanwhile
    Watch,
    #[command(flatten)]
    Data(DataCommand),
}

#[derive(Debug, Args)]
pub(crate) struct RelayArgs {
    /// Defaults for trying things out: data in ./anabranch-relay, listening on 127.0.0.1:4433
    #[arg(long)]
    pub(crate) dev: bool,
    /// Where to listen (UDP); port 0 lets the system choose
    #[arg(long, value_name = "ADDR")]
    pub(crate) listen: Option<String>,
    /// The configuration file
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// HOST:PORT that devices dial, if it is not the address listened on
    #[arg(long, value_name = "ADDR")]
    pub(crate) public_address: Option<String>,
    /// After a restore of the whole directory: begin a new epoch, so that devices bring what is lost
    #[arg(long)]
    pub(crate) new_epoch: bool,
    /// Check the configuration, and start nothing
    #[arg(long)]
    pub(crate) check: bool,
}

#[derive(Debug, Args)]
pub(crate) struct TokenArgs {
    /// The workspace that it opens
    #[arg(long, value_name = "NAME")]
    pub(crate) workspace: String,
    /// Whose devices may use it
    #[arg(long, value_name = "NAME")]
    pub(crate) user: String,
    /// What they may do
    #[arg(long, value_enum, default_value_t = Role::Writer)]
    pub(crate) role: Role,
    /// How long devices may sign in with it: 90s, 1h, 30d [default: 30d, an invite 1h]
    #[arg(long, value_name = "DURATION", value_parser = duration_ms)]
    pub(crate) ttl: Option<u64>,
    /// Print an invite for one device instead: address, relay key, workspace and token in one line
    #[arg(long)]
    pub(crate) invite: bool,
    /// The relay's address in an invite [default: where the relay last ran]
    #[arg(long, value_name = "URL", requires = "invite")]
    pub(crate) relay: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Role {
    /// Reads
    Reader,
    /// Reads and writes as a person's device
    Writer,
    /// Reads and writes as the app's backend
    Authority,
    /// Like a writer, and pushes schemas
    Admin,
}

#[derive(Debug, Args)]
pub(crate) struct InitArgs {
    /// What people call this device
    #[arg(long, value_name = "NAME")]
    pub(crate) device: String,
    /// The schema; the directory gets a copy
    #[arg(long, value_name = "FILE")]
    pub(crate) schema: PathBuf,
    /// The workspace
    #[arg(long, value_name = "NAME", required_unless_present = "invite", conflicts_with = "invite")]
    pub(crate) workspace: Option<String>,
    /// The relay: quic://HOST:PORT#KEY; the key may be left out where the token tells it
    #[arg(long, value_name = "URL", conflicts_with = "invite", requires = "token")]
    pub(crate) relay: Option<String>,
    /// A token for the relay
    #[arg(long, value_name = "TOKEN", conflicts_with = "invite", requires = "relay")]
    pub(crate) token: Option<String>,
    /// An invite in place of workspace, relay and token
    #[arg(long, value_name = "TEXT")]
    pub(crate) invite: Option<String>,
    /// What keeps the store on disk [default: sled]
    #[arg(long, value_name = "sled|redb", value_parser = backend)]
    pub(crate) backend: Option<BackendKind>,
}

#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// Exercises to import, as a JSON array or lines with an `id` each [default: built-in ones]
    #[arg(long, value_name = "FILE")]
    pub(crate) exercises: Option<PathBuf>,
    /// Keep the directories of relay and devices
    #[arg(long)]
    pub(crate) keep: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum SchemaCommand {
    /// Check a schema file, and whether it may follow an older one that is in use
    Check {
        /// `[OLD] NEW`
        #[arg(value_name = "[OLD] NEW", num_args = 1..=2, required = true)]
        files: Vec<PathBuf>,
    },
    /// Give the relay the device's schema; takes an admin or an authority
    Push {
        /// Make this the device's schema first
        file: Option<PathBuf>,
        /// When to give up
        #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = duration_ms)]
        deadline: u64,
    },
    /// Print the device's schema, or the relay's
    Show {
        /// Ask the relay for the one that was pushed
        #[arg(long)]
        relay: bool,
        /// When to give up
        #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = duration_ms)]
        deadline: u64,
    },
}

#[derive(Debug, Args)]
pub(crate) struct StoreArgs {
    /// The relay's configuration file, if that says where the key of its store is
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    #[command(subcommand)]
    pub(crate) command: StoreCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum StoreCommand {
    /// Print what the store holds, by kind, and what it takes on disk
    Stats,
    /// Look at everything: checksums, documents, rows, indexes, the feed, the digest
    Verify {
        /// On a device: write anew what follows from documents, and have the next sync fetch again
        /// what is damaged or missing
        #[arg(long)]
        mend: bool,
    },
    /// Back the directory up into a new one, also while `watch` or `relay` runs
    Backup {
        /// What is made; it must not exist
        #[arg(value_name = "BACKUP")]
        to: PathBuf,
    },
    /// Make the directory given by --data of a backup
    Restore {
        /// What `backup` made
        #[arg(value_name = "BACKUP")]
        from: PathBuf,
        /// What keeps the store from now on [default: what kept it]
        #[arg(long, value_name = "sled|redb", value_parser = backend)]
        backend: Option<BackendKind>,
    },
    /// Write the store anew, without the space that it no longer needs; nobody may have it open
    Compact {
        /// What keeps the store from now on
        #[arg(long, value_name = "sled|redb", value_parser = backend)]
        backend: Option<BackendKind>,
        /// Encrypt it, with a new passphrase, also if it is encrypted already
        #[arg(long, conflicts_with = "decrypt")]
        encrypt: bool,
        /// Encrypt it no longer
        #[arg(long)]
        decrypt: bool,
        #[command(flatten)]
        new: NewPassphrase,
    },
    /// Change the passphrase of an encrypted store; nobody may have it open
    Rekey {
        #[command(flatten)]
        new: NewPassphrase,
    },
}

#[derive(Debug, Args)]
pub(crate) struct NewPassphrase {
    /// The file that holds the new passphrase. In place of a file: the variable ANABRANCH_NEW_PASSPHRASE, or
    /// what is typed on a terminal
    #[arg(long, value_name = "FILE", env = "ANABRANCH_NEW_PASSPHRASE_FILE")]
    pub(crate) new_passphrase_file: Option<PathBuf>,
}

/// What the process that has a store open does for others.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum StoreTask {
    Stats,
    Verify { mend: bool },
    Backup { to: PathBuf },
}

/// Commands that work on a device's data. Where another process owns the directory, they are
/// carried out by it.
#[derive(Clone, Debug, Serialize, Deserialize, Subcommand)]
pub(crate) enum DataCommand {
    /// Create or change an entity
    #[command(after_help = SET_HELP)]
    Set(SetArgs),
    /// Delete an entity
    Delete {
        #[command(flatten)]
        entity: EntityArgs,
        /// The version that you saw
        #[arg(long, value_name = "VERSION", allow_hyphen_values = true)]
        if_version: Option<String>,
        /// Leave out this device's own checks, to prove the relay's
        #[arg(long, hide = true)]
        unchecked: bool,
    },
    /// Print one entity
    Get {
        #[command(flatten)]
        entity: EntityArgs,
    },
    /// Print the entities of a type
    List(ListArgs),
    /// Create or change entities from a JSON array or JSON lines
    Import(ImportArgs),
    /// Print all entities of a type as JSON lines that compare byte by byte between devices
    Export {
        /// The type
        #[arg(value_name = "TYPE")]
        type_name: String,
    },
    /// Exchange everything with the relay once
    Sync {
        /// When to stop; what was exchanged until then is kept
        #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = duration_ms)]
        deadline: u64,
    },
    /// Print where the device stands
    Status,
    /// Print what waits for a person
    Conflicts,
    /// Settle a conflict
    Resolve(ResolveArgs),
    /// Print, forget or send again what the relay refused
    Refused {
        #[command(subcommand)]
        action: Option<RefusedAction>,
    },
    /// The upkeep of the store
    #[command(skip)]
    Store(StoreTask),
    /// Follow changes through the process that owns the directory
    #[command(skip)]
    Follow {
        /// Another owner was followed before, and what happened between is not known.
        again: bool,
    },
    /// The relay's schema, or a push of the device's
    #[command(skip)]
    RelaySchema { push: bool, deadline: u64 },
}

const SET_HELP: &str = "\
Assignments:
  field=value     set; values are JSON, or plain text where the field is a string; null clears
  field+=n        add to a counter (field-=n takes away)
  field+=x        add an element to a set, or append an item to a list
  field-=x        remove an element from a set
  field.key=v     set an entry of a map; null removes it

With `-` in place of TYPE ID: JSON lines on standard input, all of them one transaction:
  {\"type\":\"note\",\"id\":\"n1\", and any of:
   \"set\":{field:value}, \"increment\":{field:n}, \"add\":{field:[x,…]}, \"remove\":{field:[x,…]},
   \"append\":{field:[x,…]}, \"put\":{field:{key:v}}, \"splice\":{field:[[position,deleted,\"inserted\"],…]},
   \"delete\":true, \"if_version\":VERSION}
Positions count Unicode code points; each splice sees the text that the ones before it left.";

#[derive(Clone, Debug, Serialize, Deserialize, Args)]
pub(crate) struct EntityArgs {
    /// The type
    #[arg(value_name = "TYPE")]
    pub(crate) type_name: String,
    /// The id
    pub(crate) id: String,
}

#[derive(Clone, Debug, Serialize, Deserialize, Args)]
pub(crate) struct SetArgs {
    /// The type, or `-` for JSON lines on standard input
    #[arg(value_name = "TYPE")]
    pub(crate) type_name: String,
    /// The id
    pub(crate) id: Option<String>,
    /// field=value, field+=x, field-=x, field.key=v
    #[arg(value_name = "ASSIGNMENT")]
    pub(crate) assignments: Vec<String>,
    /// The version that you saw: what came later is not overwritten unseen
    #[arg(long, value_name = "VERSION", allow_hyphen_values = true)]
    pub(crate) if_version: Option<String>,
    /// Leave out this device's own checks, to prove the relay's
    #[arg(long, hide = true)]
    pub(crate) unchecked: bool,
}

#[derive(Clone, Debug, Serialize, Deserialize, Args)]
pub(crate) struct ListArgs {
    /// The type
    #[arg(value_name = "TYPE")]
    pub(crate) type_name: String,
    /// Only those that fit: 'field > value'; may be given several times
    #[arg(long = "where", value_name = "FILTER")]
    pub(crate) filters: Vec<String>,
    /// Sort by a field; `-FIELD` sorts the other way round [default: by id]
    #[arg(long, value_name = "FIELD", allow_hyphen_values = true)]
    pub(crate) order_by: Option<String>,
    /// At most this many; the last line tells the cursor where there are more
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) limit: Option<u64>,
    /// Go on behind a cursor
    #[arg(long, value_name = "CURSOR", allow_hyphen_values = true)]
    pub(crate) after: Option<String>,
    /// Deleted ones too
    #[arg(long)]
    pub(crate) deleted: bool,
}

#[derive(Clone, Debug, Serialize, Deserialize, Args)]
pub(crate) struct ImportArgs {
    /// A JSON array or JSON lines; `-` reads standard input
    // Its contents go to the owner, not its name.
    #[serde(skip)]
    pub(crate) file: PathBuf,
    /// The type of all of them
    #[arg(long = "type", value_name = "TYPE")]
    pub(crate) type_name: String,
    /// The field that is the id
    #[arg(long, value_name = "FIELD", default_value = "id")]
    pub(crate) id_field: String,
    /// Print a JSON line on standard error for each step that is durable
    #[arg(long)]
    pub(crate) progress: bool,
}

#[derive(Clone, Debug, Serialize, Deserialize, Args)]
pub(crate) struct ResolveArgs {
    #[command(flatten)]
    pub(crate) entity: EntityArgs,
    /// The field or group, as `conflicts` names it
    pub(crate) field: String,
    #[command(flatten)]
    pub(crate) choice: Choice,
}

#[derive(Clone, Debug, Serialize, Deserialize, Args)]
#[group(required = true, multiple = false)]
pub(crate) struct Choice {
    /// Which side stands: mine, theirs, or its number in `conflicts` from 1
    #[arg(long, value_name = "mine|theirs|N", value_parser = side)]
    pub(crate) keep: Option<Side>,
    /// The value that shall stand instead; a group takes an object of its fields
    #[arg(long, value_name = "JSON", allow_hyphen_values = true)]
    pub(crate) value: Option<String>,
}

/// A side of a conflict.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Side {
    Mine,
    Theirs,
    Number(usize),
}

#[derive(Clone, Debug, Serialize, Deserialize, Subcommand)]
pub(crate) enum RefusedAction {
    /// Print them (what `refused` alone does)
    List,
    /// Forget one
    Dismiss {
        /// Its number
        number: u64,
    },
    /// Send one again
    Retry {
        /// Its number
        number: u64,
    },
}

fn backend(text: &str) -> Result<BackendKind, String> {
    BackendKind::from_name(text).ok_or_else(|| "give sled or redb".to_owned())
}

fn side(text: &str) -> Result<Side, String> {
    match text {
        "mine" => Ok(Side::Mine),
        "theirs" => Ok(Side::Theirs),
        number => match number.parse() {
            Ok(number) if number > 0 => Ok(Side::Number(number)),
            _ => Err("give mine, theirs, or the number of a side, from 1".to_owned()),
        },
    }
}

const DURATION_EXPECTED: &str = "give a number and ms, s, m, h or d, as in 90s, 1h or 365d";

/// A length of time in milliseconds: `250ms`, `90s`, `5m`, `1h`, `365d`. A bare number is seconds.
fn duration_ms(text: &str) -> Result<u64, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let unit_ms = match unit {
        "ms" => 1,
        "s" | "" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => return Err(DURATION_EXPECTED.to_owned()),
    };
    let number: u64 = number.parse().map_err(|_| DURATION_EXPECTED.to_owned())?;
    number
        .checked_mul(unit_ms)
        .filter(|ms| *ms <= i64::MAX as u64)
        .ok_or_else(|| format!("{text} is too long"))
}

/// The same with a sign.
fn offset_ms(text: &str) -> Result<i64, String> {
    let (sign, rest) = match text.strip_prefix('-') {
        Some(rest) => (-1, rest),
        None => (1, text.strip_prefix('+').unwrap_or(text)),
    };
    let ms = i64::try_from(duration_ms(rest)?).map_err(|_| format!("{text} is too long"))?;
    Ok(sign * ms)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn durations_have_units() {
        assert_eq!(duration_ms("250ms"), Ok(250));
        assert_eq!(duration_ms("90"), Ok(90_000));
        assert_eq!(offset_ms("365d"), Ok(31_536_000_000));
        assert_eq!(offset_ms("-365d"), Ok(-31_536_000_000));
        for wrong in ["", "d", "1w", "1.5h", "--1s", "99999999999999999999d"] {
            assert!(offset_ms(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn every_command_takes_the_global_arguments_on_either_side() {
        for line in [
            "anabranch --json --data d get note n1",
            "anabranch get note n1 --data d --json --clock-offset -365d",
            "anabranch set --data d note n1 reps-=5 body=-x --json",
            "anabranch set --data d -",
            "anabranch list note --order-by -title --where level=1 --where level<3",
            "anabranch list note --after -AAAAHQwMQ",
            // One version in 64 begins so.
            "anabranch set note n1 a=1 --if-version -lzyc_2E3Qe.AhX902Q1pz --json",
            "anabranch delete note n1 --if-version -lzyc_2E3Qe",
            "anabranch resolve note n1 body --keep 2",
            "anabranch schema check a.toml b.toml",
        ] {
            Cli::try_parse_from(line.split(' ')).unwrap_or_else(|error| panic!("{line}: {error}"));
        }
        for line in [
            "anabranch resolve note n1 body",
            "anabranch resolve note n1 body --keep 0",
            "anabranch list note --limit 0",
            "anabranch init --data d --device x --schema s --workspace w --relay u",
        ] {
            assert!(Cli::try_parse_from(line.split(' ')).is_err(), "{line}");
        }
    }
}
