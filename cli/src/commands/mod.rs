//! What each command does.

mod conflicts;
mod import;
mod read;
mod schema;
mod setup;
mod store;
mod sync;
mod write;

pub(crate) use schema::schema;
pub(crate) use setup::{init, relay, token};
pub(crate) use store::{carry_out as look_after, store};
pub(crate) use sync::{follow, watch};

use std::io::Read as _;

use tokio::time::Instant;

use crate::args::{DataCommand, Global, StoreTask};
use crate::config::{Device, DeviceDir, Opened, read_text};
use crate::failure::{Category, Failure};
use crate::output::Output;
use crate::owner::{self, Forwarded, Listener, Owner, Parting, Request};

/// Carries out a command on a directory: through the process that owns it, or by owning it
/// for as long as the command takes.
pub(crate) async fn data(global: Global, command: DataCommand, output: &mut Output) -> Result<(), Failure> {
    let dir = DeviceDir::new(&global)?;
    let config = dir.config()?;
    let input = input(&command)?;
    let patience = owner::patience(&command);
    let offset = global.clock_offset;
    let request = Request::new(global.json, offset, input, command);
    let deadline = Instant::now() + patience;
    loop {
        let device = match dir.reach(&config, offset, false, patience).await? {
            Opened::Here(device) => device,
            Opened::Elsewhere(stream) => match owner::forward(stream, &request, output).await? {
                Forwarded::Done => return Ok(()),
                // The next owner may be this process.
                _ if Instant::now() < deadline => continue,
                _ => return Err(owners_end()),
            },
        };
        let result = own(&dir, &device, request, output).await;
        let closed = device.engine.shutdown().await.map_err(Failure::from);
        return result.and(closed);
    }
}

/// Carries out this process's own command. While it takes long, others come through the socket.
async fn own(dir: &DeviceDir, device: &Device, request: Request, output: &mut Output) -> Result<(), Failure> {
    let (command, input) = request.into_parts();
    if !takes_long(&command) {
        return carry_out(device, command, input, output).await;
    }
    let listener = Listener::bind(dir.root())?;
    let work = async {
        let result = carry_out(device, command, input, output).await;
        // What it came to is seen now, whatever is still in work for others.
        let flushed = output.flush().await;
        result.and(flushed)
    };
    listener.serve_during(&Owner::Device(device.clone()), Parting::Idle, work).await
}

fn takes_long(command: &DataCommand) -> bool {
    use DataCommand::{Import, RelaySchema, Sync};
    matches!(command, Import(_) | Sync { .. } | RelaySchema { .. })
}

fn owners_end() -> Failure {
    let message = "one process after another owned the directory, and none took the command";
    Failure::new(Category::Storage, "in_use", message)
        .help("nothing of it was done; repeat it, or let `anabranch watch` own the directory")
}

/// Reads what a command reads, before it is decided which process carries it out.
fn input(command: &DataCommand) -> Result<Option<String>, Failure> {
    match command {
        DataCommand::Set(args) if args.type_name == "-" => standard_input().map(Some),
        DataCommand::Import(args) if args.file.as_os_str() == "-" => standard_input().map(Some),
        DataCommand::Import(args) => read_text(&args.file).map(Some),
        _ => Ok(None),
    }
}

fn standard_input() -> Result<String, Failure> {
    let mut text = String::new();
    match std::io::stdin().lock().read_to_string(&mut text) {
        Ok(_) => Ok(text),
        Err(error) if error.kind() == std::io::ErrorKind::InvalidData => {
            Err(Failure::validation("not_utf8", "the standard input is not UTF-8 text"))
        }
        Err(error) => {
            let message = format!("could not read the standard input: {error}");
            Err(Failure::new(Category::Storage, "io", message))
        }
    }
}

/// Carries out a command in the process that owns the directory.
pub(crate) async fn carry_out(
    device: &Device,
    command: DataCommand,
    input: Option<String>,
    output: &mut Output,
) -> Result<(), Failure> {
    let workspace = &device.workspace;
    match command {
        DataCommand::Set(args) => write::set(workspace, args, input.as_deref(), output).await,
        DataCommand::Delete { entity, if_version, unchecked } => {
            write::delete(workspace, &entity, if_version.as_deref(), unchecked, output).await
        }
        DataCommand::Get { entity } => read::get(workspace, &entity, output).await,
        DataCommand::List(args) => read::list(workspace, args, output).await,
        DataCommand::Export { type_name } => read::export(workspace, &type_name, output).await,
        DataCommand::Import(args) => {
            import::import(workspace, &args, input.as_deref().unwrap_or_default(), output).await
        }
        DataCommand::Sync { deadline } => sync::sync(workspace, deadline, output).await,
        DataCommand::Status => sync::status(workspace, output).await,
        DataCommand::Conflicts => conflicts::conflicts(workspace, output).await,
        DataCommand::Resolve(args) => conflicts::resolve(workspace, &args, output).await,
        DataCommand::Refused { action } => conflicts::refused(workspace, action, output).await,
        DataCommand::Store(StoreTask::Verify { mend }) => store::verify_device(device, mend, output).await,
        DataCommand::Store(task) => {
            store::carry_out(device.engine.upkeep(), &device.root, task, output).await
        }
        DataCommand::Follow { again } => follow(workspace, again, output).await,
        DataCommand::RelaySchema { push, deadline } => {
            schema::with_relay(workspace, push, deadline, output).await
        }
    }
}

/// RFC 3339 from milliseconds since 1970.
fn time(ms: u64) -> String {
    anabranch::schema::timestamp_from_ms(i64::try_from(ms).unwrap_or(i64::MAX))
}
