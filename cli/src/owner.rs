//! One process owns a directory. While it does, it listens on a socket in it, and other
//! commands hand themselves over: what they would have printed comes back as frames.
//!
//! A request is one line of JSON, each frame of the answer too. The socket is as private as
//! the directory; whoever may connect may do what the commands do, and nothing else: a request
//! carries the contents of files and standard input, never a path to be opened here.

use std::fs::{File, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader, BufWriter};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc};

use crate::args::DataCommand;
use crate::commands;
use crate::config::Device;
use crate::failure::{Category, Failure};
use crate::output::{Frame, Output};

const SOCKET: &str = "anabranch.sock";
/// Longest request: an import carries its file.
const REQUEST_BYTES_MAX: u64 = 1 << 30;
/// Commands carried out at once; further ones wait in the socket's queue.
const COMMANDS_MAX: usize = 64;
/// Frames on their way to a reader; a slow one slows its own command down.
const FRAMES_QUEUED_MAX: usize = 64;
/// Longest path that a socket's address holds on every system.
const SOCKET_PATH_BYTES_MAX: usize = 100;
/// Both ends come from one installation, except while it is being updated.
const VERSION: u32 = 1;

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

/// Hands a command over and prints what comes back.
pub(crate) async fn forward(
    stream: UnixStream,
    request: &Request,
    output: &mut Output,
) -> Result<(), Failure> {
    let lost = |what: String| {
        Failure::new(Category::Storage, "owner_lost", format!("the process that owns the directory {what}"))
            .help("it may have done part of the command: look, and repeat what is missing")
    };
    let (from, mut to) = stream.into_split();
    let mut line = serde_json::to_vec(request).map_err(|error| Failure::internal(error.to_string()))?;
    line.push(b'\n');
    to.write_all(&line).await.map_err(|error| lost(format!("did not take it: {error}")))?;
    let mut frames = BufReader::new(from).lines();
    loop {
        let frame = match frames.next_line().await {
            Ok(Some(line)) => serde_json::from_str(&line)
                .map_err(|error| lost(format!("is of another version: {error}")))?,
            Ok(None) => return Err(lost("ended in the middle of it".to_owned())),
            Err(error) => return Err(lost(format!("can't be read: {error}"))),
        };
        match frame {
            Frame::End { failure: None } => return Ok(()),
            Frame::End { failure: Some(failure) } => return Err(failure),
            frame => output.frame(frame).await?,
        }
    }
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

    /// Carries out what comes in, for as long as it is polled.
    pub(crate) async fn serve(&self, device: Device) {
        let permits = Arc::new(Semaphore::new(COMMANDS_MAX));
        loop {
            let Ok(permit) = Arc::clone(&permits).acquire_owned().await else { return };
            match self.listener.accept().await {
                Ok((stream, _)) => {
                    let device = device.clone();
                    tokio::spawn(async move {
                        serve_one(stream, device).await;
                        drop(permit);
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "a connection could not be taken");
                    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
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

async fn serve_one(stream: UnixStream, device: Device) {
    let (from, to) = stream.into_split();
    let mut from = BufReader::new(from);
    let mut line = String::new();
    if (&mut from).take(REQUEST_BYTES_MAX).read_line(&mut line).await.is_err() || line.is_empty() {
        return;
    }
    let (frames, mut queue) = mpsc::channel(FRAMES_QUEUED_MAX);
    let writer = tokio::spawn(async move {
        let mut to = BufWriter::new(to);
        while let Some(frame) = queue.recv().await {
            let Ok(mut line) = serde_json::to_vec::<Frame>(&frame) else { return };
            line.push(b'\n');
            if to.write_all(&line).await.is_err() || (queue.is_empty() && to.flush().await.is_err()) {
                return;
            }
        }
        let _ = to.flush().await;
    });
    let command = async {
        let failure = carry_out(&line, &device, frames.clone()).await.err();
        // Nobody is left to tell if this fails.
        let _ = frames.send(Frame::End { failure }).await;
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

async fn carry_out(line: &str, device: &Device, frames: mpsc::Sender<Frame>) -> Result<(), Failure> {
    let request: Request = serde_json::from_str(line).map_err(|error| {
        Failure::usage("other_version", format!("the command was not understood: {error}"))
    })?;
    if request.version != VERSION {
        let message = format!("the owner of the directory speaks version {VERSION}, not {}", request.version);
        return Err(Failure::usage("other_version", message).help("restart `anabranch watch`"));
    }
    if request.clock_offset_ms != 0 && request.clock_offset_ms != device.clock_offset_ms {
        let message = "another process owns the directory, and its clock counts";
        return Err(Failure::usage("clock_of_owner", message)
            .help("give --clock-offset to `anabranch watch`, or stop it first"));
    }
    let mut output = Output::socket(request.json, frames);
    commands::carry_out(device, request.command, request.input, &mut output).await
}
