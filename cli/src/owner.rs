//! One process owns a directory. While it does, it listens on a socket in it, and other
//! commands hand themselves over: what they would have printed comes back as frames.
//!
//! A request is one line of JSON, each frame of the answer too. The socket is as private as
//! the directory; whoever may connect may do what the commands do, and nothing else: a request
//! carries the contents of files and standard input, and no path but that of a backup to make.
//!
//! A relay listens in its directory in the same way, for the upkeep of its store.
//!
//! The first frame says that the command is taken: an owner that ends before has done nothing of
//! it, and whoever asked looks for the next owner, or becomes it. From then on frames come at
//! least once in [`ALIVE_PERIOD`], so that an owner that is stopped or hangs is told from a
//! command that takes long.

use std::fs::{File, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::time::Duration;

use anabranch::store::Upkeep;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader, BufWriter};
use tokio::net::unix::OwnedWriteHalf;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::args::DataCommand;
use crate::commands;
use crate::config::Device;
use crate::failure::{Category, Failure};
use crate::output::{Frame, Output};

const SOCKET: &str = "anabranch.sock";
/// Longest request: an import carries its file.
const REQUEST_BYTES_MAX: usize = 1 << 30;
/// Commands carried out at once; further ones wait in the socket's queue.
const COMMANDS_MAX: usize = 64;
/// Frames on their way to a reader; a slow one slows its own command down.
const FRAMES_QUEUED_MAX: usize = 64;
/// Longest path that a socket's address holds on every system.
const SOCKET_PATH_BYTES_MAX: usize = 100;
/// Both ends come from one installation, except while it is being updated.
const VERSION: u32 = 2;
/// How often an owner shows that it is alive.
const ALIVE_PERIOD: Duration = Duration::from_secs(1);
/// How long one end of the socket waits for the other to move.
pub(crate) const SILENCE_MAX: Duration = Duration::from_secs(10);
/// How long an owner that ends waits for a reader that does not read.
const STALLED_MAX: Duration = Duration::from_secs(2);
/// What a command with a deadline of its own gets beyond it, to be told how it ended.
const DEADLINE_GRACE: Duration = Duration::from_secs(1);

/// A command with all that it needs.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Request {
    version: u32,
    json: bool,
    clock_offset_ms: i64,
    /// The file or the standard input that the command reads.
    input: Option<String>,
    command: DataCommand,
}

impl Request {
    pub(crate) fn new(json: bool, clock_offset_ms: i64, input: Option<String>, command: DataCommand) -> Self {
        Self { version: VERSION, json, clock_offset_ms, input, command }
    }

    /// The command, and what it reads.
    pub(crate) fn into_parts(self) -> (DataCommand, Option<String>) {
        (self.command, self.input)
    }
}

fn parse_request(line: &[u8]) -> Result<Request, Failure> {
    let request: Request = serde_json::from_slice(line).map_err(|error| {
        Failure::usage("other_version", format!("the command was not understood: {error}"))
    })?;
    if request.version != VERSION {
        let message = format!("the owner of the directory speaks version {VERSION}, not {}", request.version);
        return Err(Failure::usage("other_version", message).help("restart the process that owns it"));
    }
    Ok(request)
}

/// Reads a line as a request and writes what was understood, for tests of hostile input.
pub(crate) fn reread_request(line: &[u8]) -> Option<Vec<u8>> {
    let request = parse_request(line).ok()?;
    let _ = patience(&request.command);
    serde_json::to_vec(&request).ok()
}

/// Reads a line as a frame and writes what was understood, for tests of hostile input.
pub(crate) fn reread_frame(line: &str) -> Option<Vec<u8>> {
    serde_json::to_vec(&serde_json::from_str::<Frame>(line).ok()?).ok()
}

/// A path short enough for a socket's address. The file keeps a detour open while it is used.
struct SocketPath {
    path: PathBuf,
    _dir: Option<File>,
}

impl SocketPath {
    fn of(dir: &Path) -> std::io::Result<Self> {
        let path = dir.join(SOCKET);
        if path.as_os_str().len() <= SOCKET_PATH_BYTES_MAX || !cfg!(target_os = "linux") {
            return Ok(Self { path, _dir: None });
        }
        use std::os::fd::AsRawFd as _;
        let dir = File::open(dir)?;
        let path = PathBuf::from(format!("/proc/self/fd/{}/{SOCKET}", dir.as_raw_fd()));
        Ok(Self { path, _dir: Some(dir) })
    }
}

/// Connects to the process that owns the directory; none if nobody listens. A socket that a
/// killed process left behind refuses connections.
pub(crate) async fn connect(dir: &Path) -> Option<UnixStream> {
    let socket = SocketPath::of(dir).ok()?;
    UnixStream::connect(&socket.path).await.ok()
}

/// How a command that was handed over ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Forwarded {
    /// It was carried out.
    Done,
    /// The owner ended before it did any of it.
    NotTaken,
    /// The owner ends, and the command can go on elsewhere.
    Leaving,
}

/// How long to wait for an owner that does not move: what has a deadline keeps it.
pub(crate) fn patience(command: &DataCommand) -> Duration {
    match command {
        DataCommand::Sync { deadline } | DataCommand::RelaySchema { deadline, .. } => {
            SILENCE_MAX.min(Duration::from_millis(*deadline).saturating_add(DEADLINE_GRACE))
        }
        _ => SILENCE_MAX,
    }
}

/// Hands a command over and prints what comes back.
///
/// # Errors
/// Those of the command; `owner_lost` if the owner ends in the middle of it, `owner_silent` if
/// it does not move for as long as `request` has patience.
pub(crate) async fn forward(
    stream: UnixStream,
    request: &Request,
    output: &mut Output,
) -> Result<Forwarded, Failure> {
    let owner = stream.peer_cred().ok().and_then(|owner| owner.pid());
    let patience = patience(&request.command);
    let follows = matches!(request.command, DataCommand::Follow { .. });
    let lost = |what: String| {
        Failure::new(Category::Storage, "owner_lost", format!("the process that owns the directory {what}"))
            .help("it may have done part of the command: look, and repeat what is missing")
    };
    let (from, mut to) = stream.into_split();
    let mut line = serde_json::to_vec(request).map_err(|error| Failure::internal(error.to_string()))?;
    line.push(b'\n');
    let mut rest = &line[..];
    while !rest.is_empty() {
        match timeout(patience, to.write(rest)).await {
            Ok(Ok(written)) if written > 0 => rest = &rest[written..],
            // It never had the whole command.
            Ok(_) => return Ok(Forwarded::NotTaken),
            Err(_) => return Err(silent(owner, patience)),
        }
    }
    let mut frames = BufReader::new(from).lines();
    let mut taken = false;
    loop {
        let frame = match timeout(patience, frames.next_line()).await {
            Ok(Ok(Some(line))) => serde_json::from_str(&line)
                .map_err(|error| lost(format!("is of another version: {error}")))?,
            Ok(Ok(None) | Err(_)) if !taken => return Ok(Forwarded::NotTaken),
            // Changes are followed elsewhere, however this owner ended.
            Ok(Ok(None) | Err(_)) if follows => return Ok(Forwarded::Leaving),
            Ok(Ok(None)) => return Err(lost("ended in the middle of it".to_owned())),
            Ok(Err(error)) => return Err(lost(format!("can't be read: {error}"))),
            Err(_) => return Err(silent(owner, patience)),
        };
        match frame {
            Frame::Alive => taken = true,
            Frame::Leaving => return Ok(Forwarded::Leaving),
            Frame::End { failure: None } => return Ok(Forwarded::Done),
            Frame::End { failure: Some(failure) } => return Err(failure),
            frame => output.frame(frame).await?,
        }
    }
}

/// The owner is there and does not move.
fn silent(owner: Option<i32>, patience: Duration) -> Failure {
    let (who, pid) = match owner {
        Some(pid) => (format!("process {pid}"), pid.to_string()),
        None => ("another process".to_owned(), "PID".to_owned()),
    };
    let seconds = patience.as_secs_f32();
    let message = format!("{who} owns the directory and has not answered for {seconds} s");
    Failure::new(Category::Storage, "owner_silent", message).help(format!(
        "it is stopped or hangs: let it go on with `kill -CONT {pid}`, or end it with `kill -KILL {pid}`; \
         what it has saved is kept. If it goes on, look whether it did the command before you repeat it"
    ))
}

/// How an owner parts from the commands of others when its own is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Parting {
    /// It was told to end: it takes no more and waits a while for those that it took.
    Soon,
    /// It serves on until no command is in work: a long one locks nobody out.
    Idle,
}

/// Who owns the directory.
#[derive(Clone)]
pub(crate) enum Owner {
    Device(Device),
    Relay { upkeep: Upkeep, root: PathBuf },
}

/// The owner's end of the socket. Dropping it removes the socket.
pub(crate) struct Listener {
    listener: UnixListener,
    path: PathBuf,
}

impl Listener {
    /// Listens in a directory that this process owns: whatever socket is there is stale.
    pub(crate) fn bind(dir: &Path) -> Result<Self, Failure> {
        let path = dir.join(SOCKET);
        let bind = || {
            match std::fs::remove_file(&path) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            let socket = SocketPath::of(dir)?;
            let listener = UnixListener::bind(&socket.path)?;
            std::fs::set_permissions(&path, Permissions::from_mode(0o600))?;
            Ok(listener)
        };
        let listener = bind().map_err(|error| Failure::storage("listen on", &path, &error))?;
        Ok(Self { listener, path })
    }

    /// Does this process's own `work`, and carries out what comes in meanwhile. Returns what
    /// the work came to when no command is left that was taken.
    pub(crate) async fn serve_during<T>(
        self,
        owner: &Owner,
        parting: Parting,
        work: impl Future<Output = T>,
    ) -> T {
        let mut work = pin!(work);
        let (closing, closed) = watch::channel(false);
        let mut commands = JoinSet::new();
        let result = loop {
            tokio::select! {
                // First: what others ask for may depend on it.
                biased;
                result = &mut work => break result,
                stream = self.accept(), if commands.len() < COMMANDS_MAX => {
                    commands.spawn(serve_one(stream, owner.clone(), closed.clone()));
                }
                Some(_) = commands.join_next() => {}
            }
        };
        // Those who follow changes go elsewhere.
        closing.send_replace(true);
        let parted = async {
            loop {
                tokio::select! {
                    // First: who has just come shall not be cut off by the end.
                    biased;
                    stream = self.accept(), if parting == Parting::Idle && commands.len() < COMMANDS_MAX => {
                        commands.spawn(serve_one(stream, owner.clone(), closed.clone()));
                    }
                    done = commands.join_next() => if done.is_none() { break },
                }
            }
        };
        match parting {
            // What is cut off says so to whoever asked.
            Parting::Soon => drop(timeout(SILENCE_MAX, parted).await),
            Parting::Idle => parted.await,
        }
        result
    }

    async fn accept(&self) -> UnixStream {
        loop {
            match self.listener.accept().await {
                Ok((stream, _)) => return stream,
                Err(error) => {
                    tracing::warn!(%error, "a connection could not be taken");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

async fn serve_one(stream: UnixStream, owner: Owner, mut closed: watch::Receiver<bool>) {
    let (from, to) = stream.into_split();
    let mut from = BufReader::new(from);
    let Some(line) = read_request(&mut from).await else { return };
    let (frames, queue) = mpsc::channel(FRAMES_QUEUED_MAX);
    let (taken, told) = oneshot::channel();
    let writer = tokio::spawn(write_frames(to, queue, taken, closed.clone()));
    let command = async {
        // Nothing is done before whoever asked can know that it is.
        if told.await.is_err() {
            return;
        }
        let end = match carry_out(line, &owner, frames.clone(), &mut closed).await {
            Ok(Carried::Out) => Frame::End { failure: None },
            Ok(Carried::Elsewhere) => Frame::Leaving,
            Err(failure) => Frame::End { failure: Some(failure) },
        };
        // Nobody is left to tell if this fails.
        let _ = frames.send(end).await;
    };
    // Whoever asked sends nothing more: the end of their stream is the end of the command.
    let mut rest = [0; 1];
    tokio::select! {
        () = command => {}
        _ = from.read(&mut rest) => {}
    }
    drop(frames);
    let _ = writer.await;
}

/// One line, as long as it keeps coming.
async fn read_request(from: &mut (impl tokio::io::AsyncBufRead + Unpin)) -> Option<Vec<u8>> {
    let mut line = Vec::new();
    loop {
        let piece = timeout(SILENCE_MAX, from.fill_buf()).await.ok()?.ok()?;
        let end = piece.iter().position(|byte| *byte == b'\n');
        let used = end.map_or(piece.len(), |end| end + 1);
        if used == 0 || line.len() + used > REQUEST_BYTES_MAX {
            return None;
        }
        line.extend_from_slice(&piece[..used]);
        from.consume(used);
        if end.is_some() {
            return Some(line);
        }
    }
}

/// Writes frames, and between them that this process is alive; the first says that the command
/// is taken. A reader that does not read slows its own command down, and is left when the owner
/// ends.
async fn write_frames(
    to: OwnedWriteHalf,
    mut queue: mpsc::Receiver<Frame>,
    taken: oneshot::Sender<()>,
    mut closed: watch::Receiver<bool>,
) {
    let mut to = BufWriter::new(to);
    let mut taken = Some(taken);
    let mut next = Some(Frame::Alive);
    while let Some(frame) = next {
        let flush = queue.is_empty();
        let written = tokio::select! {
            written = write_frame(&mut to, &frame, flush) => written.is_ok(),
            () = stalled(&mut closed) => false,
        };
        if !written || taken.take().is_some_and(|taken| taken.send(()).is_err()) {
            return;
        }
        next = timeout(ALIVE_PERIOD, queue.recv()).await.unwrap_or(Some(Frame::Alive));
    }
    let _ = timeout(STALLED_MAX, to.flush()).await;
}

async fn write_frame(to: &mut BufWriter<OwnedWriteHalf>, frame: &Frame, flush: bool) -> std::io::Result<()> {
    let mut line = serde_json::to_vec(frame)?;
    line.push(b'\n');
    to.write_all(&line).await?;
    if flush { to.flush().await } else { Ok(()) }
}

/// The owner ends, and has waited long enough.
async fn stalled(closed: &mut watch::Receiver<bool>) {
    // A listener that is gone has ended.
    let _ = closed.wait_for(|closed| *closed).await;
    tokio::time::sleep(STALLED_MAX).await;
}

/// What became of a command.
enum Carried {
    Out,
    /// It goes on with the next owner.
    Elsewhere,
}

async fn carry_out(
    line: Vec<u8>,
    owner: &Owner,
    frames: mpsc::Sender<Frame>,
    closed: &mut watch::Receiver<bool>,
) -> Result<Carried, Failure> {
    let request = parse_request(&line)?;
    drop(line);
    let mut output = Output::socket(request.json, frames);
    let device = match (owner, &request.command) {
        (Owner::Device(device), _) => device,
        (Owner::Relay { upkeep, root }, DataCommand::Store(task)) => {
            let done = commands::look_after(upkeep.clone(), root, task.clone(), &mut output).await;
            return done.map(|()| Carried::Out);
        }
        (Owner::Relay { .. }, _) => {
            return Err(Failure::usage("not_a_device", "this is the directory of a relay"));
        }
    };
    if request.clock_offset_ms != 0 && request.clock_offset_ms != device.clock_offset_ms {
        let message = "another process owns the directory, and its clock counts";
        return Err(Failure::usage("clock_of_owner", message)
            .help("give --clock-offset to `anabranch watch`, or stop it first"));
    }
    let follows = matches!(request.command, DataCommand::Follow { .. });
    let command = commands::carry_out(device, request.command, request.input, &mut output);
    tokio::select! {
        result = command => result.map(|()| Carried::Out),
        // A command that ends by itself is waited for.
        _ = closed.wait_for(|closed| *closed), if follows => Ok(Carried::Elsewhere),
    }
}
