//! A relay that thousands of hostile connections beset goes on serving those who mean well.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anabranch_core::wire::{Hello, Message, Open, SignIn, VERSION_MAX, VERSION_MIN};
use anabranch_transport::{Connection, DeviceKey, FrameReceiver, FrameSender, RelayUrl, connect};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::device::{CHANNEL, Device, wall_ms};
use crate::{Bench, soon};

/// Connections in all; `ANABRANCH_SIEGE` says how many. Each holds a file descriptor of this
/// process, so at most as many stay open as half of what it may have.
const CONNECTIONS: usize = 10_000;
/// Handshakes at once.
const AT_ONCE: usize = 128;
/// One in so many has a token and is a device of the honest one's workspace. The others are
/// strangers: what insiders may do is not bounded by user yet, and each of them hears what all
/// the others do.
const INSIDER_EVERY: usize = 60;
/// How long all of it may take.
const SECONDS_MAX: u64 = 400;
/// Entities that the honest device writes before the siege.
const WRITES_BEFORE: usize = 300;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes minutes; prints figures: cargo test -p anabranch-relay --test it siege -- --ignored --nocapture"]
async fn an_honest_device_is_served_under_siege() {
    let bench = Bench::new();
    let relay = bench.start().await;
    let mut honest = Device::connect(relay.url()).await;
    honest.sign_in("home", Some(bench.token("home", "ann"))).await.unwrap();
    let mut calm = Vec::new();
    for number in 0..WRITES_BEFORE {
        calm.push(write(&mut honest, &format!("calm{number}")).await);
    }
    let memory_before = resident_mib();

    let total =
        std::env::var("ANABRANCH_SIEGE").ok().and_then(|text| text.parse().ok()).unwrap_or(CONNECTIONS);
    let figures = Arc::new(Figures::default());
    let token = bench.token("home", "mallory");
    let siege = tokio::spawn(besiege(relay.url().clone(), token, total, figures.clone()));
    let begun = Instant::now();
    let mut besieged = Vec::new();
    let mut connects = Vec::new();
    while !siege.is_finished() && begun.elapsed().as_secs() < SECONDS_MAX {
        besieged.push(write(&mut honest, &format!("siege{}", besieged.len())).await);
        if besieged.len() % 100 == 0 {
            // Newcomers get in too, or are told to come back.
            let at = Instant::now();
            let key = DeviceKey::generate().unwrap();
            if connect(relay.url(), &key, Duration::from_secs(10)).await.is_ok() {
                connects.push(at.elapsed());
            }
        }
    }
    let took = begun.elapsed();
    siege.abort();
    println!(
        "{total} hostile connections in {took:.1?}: {} made, {} refused, {} open at the end; \
         memory of relay and clients {memory_before:?} MiB before, {:?} MiB at its highest",
        figures.made.load(Ordering::Relaxed),
        figures.refused.load(Ordering::Relaxed),
        figures.open.load(Ordering::Relaxed),
        resident_mib(),
    );
    println!("writes without: {}", percentiles(&mut calm));
    println!("writes under it: {}", percentiles(&mut besieged));
    println!("connects under it: {}", percentiles(&mut connects));
    assert!(besieged.len() > 10, "the honest device was not served");
    let p99 = besieged[besieged.len() * 99 / 100];
    assert!(p99 < Duration::from_secs(5), "the honest device waited for {p99:?}");
    soon(relay.shutdown()).await.unwrap();
}

async fn write(device: &mut Device, id: &str) -> Duration {
    let at = Instant::now();
    assert_eq!(device.create("home", id, "milk").await.refused, vec![]);
    at.elapsed()
}

#[derive(Default)]
struct Figures {
    made: AtomicUsize,
    refused: AtomicUsize,
    open: AtomicUsize,
}

/// A connection that stays open, with its stream if it opened one, which is never read.
struct Held {
    connection: Connection,
    _stream: Option<(FrameSender, FrameReceiver)>,
}

async fn besiege(url: RelayUrl, token: String, total: usize, figures: Arc<Figures>) {
    let room = Arc::new(Semaphore::new(AT_ONCE));
    let open_max = descriptors_max() / 2;
    let mut tasks = JoinSet::new();
    let mut held: Vec<Held> = Vec::new();
    for number in 0..total {
        let permit = room.clone().acquire_owned().await.unwrap();
        let (url, token, counted) = (url.clone(), token.clone(), figures.clone());
        tasks.spawn(async move {
            let connection = attack(number, &url, &token).await;
            match &connection {
                Some(_) => counted.made.fetch_add(1, Ordering::Relaxed),
                None => counted.refused.fetch_add(1, Ordering::Relaxed),
            };
            drop(permit);
            connection
        });
        while let Some(done) = tasks.try_join_next() {
            held.extend(done.unwrap());
        }
        if held.len() > open_max {
            held.drain(..held.len() / 2);
        }
        figures.open.store(held.len(), Ordering::Relaxed);
    }
    while let Some(done) = tasks.join_next().await {
        held.extend(done.unwrap());
    }
    held.retain(|held| held.connection.close_reason().is_none());
    figures.open.store(held.len(), Ordering::Relaxed);
}

/// One hostile connection, of six kinds; kept open where the relay allows it.
async fn attack(number: usize, url: &RelayUrl, token: &str) -> Option<Held> {
    let key = DeviceKey::generate().ok()?;
    let connection = connect(url, &key, Duration::from_secs(20)).await.ok()?;
    let insider = number.is_multiple_of(INSIDER_EVERY);
    // One kind of strangers says nothing at all.
    if !insider && number.is_multiple_of(5) {
        return Some(Held { connection, _stream: None });
    }
    let (mut sender, receiver) = connection.open_control().await.ok()?;
    let hello = Hello {
        version_min: VERSION_MIN,
        version_max: VERSION_MAX,
        software: "siege".into(),
        wall_ms: wall_ms(),
        features_required: 0,
        features: 0,
        proof: Vec::new(),
    };
    let mut send = async |message: Message| sender.send(message.encode()).await.ok();
    match number % 5 {
        _ if insider => {
            // Signed in, hears everything, reads nothing.
            send(hello.into()).await?;
            send(sign_in(token).into()).await?;
            let open = Open { channel: CHANNEL, epoch: [0; 16], cursor: 0, digest: [0; 32], full: true };
            send(open.into()).await?;
        }
        1 => send(hello.into()).await?,
        2 => sender.send(vec![0x5a; 60_000]).await.ok()?,
        3 => {
            send(hello.into()).await?;
            for _ in 0..50 {
                send(sign_in("no token").into()).await?;
            }
        }
        _ => {
            // A bomb, as large as a stranger may send.
            send(hello.into()).await?;
            let mut bomb = vec![6, 3, 0, 0, 128, 0];
            bomb.extend(vec![0; 50_000]);
            sender.send(bomb).await.ok()?;
        }
    }
    Some(Held { connection, _stream: Some((sender, receiver)) })
}

fn sign_in(token: &str) -> SignIn {
    SignIn {
        channel: CHANNEL,
        workspace: "home".into(),
        token: Some(token.into()),
        device_name: "siege".into(),
        platform: "test".into(),
        incarnation: 0,
        sent: 0,
    }
}

fn percentiles(times: &mut [Duration]) -> String {
    times.sort_unstable();
    let at = |part: usize| times.get((times.len() * part / 100).min(times.len().saturating_sub(1)));
    format!("{} of them, p50 {:?}, p99 {:?}, max {:?}", times.len(), at(50), at(99), times.last())
}

/// File descriptors that this process may have open.
fn descriptors_max() -> usize {
    let limits = std::fs::read_to_string("/proc/self/limits").unwrap_or_default();
    let line = limits.lines().find(|line| line.starts_with("Max open files"));
    line.and_then(|line| line.split_whitespace().nth(3)?.parse().ok()).unwrap_or(1024)
}

fn resident_mib() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? / 1024)
}
