//! A relay that thousands of hostile connections beset goes on serving those who mean well.
//!
//! The attackers are a process of their own, so that the memory of this one is the relay's and
//! the system shares the processors between the two. What that alone costs an honest device is
//! measured too: with two threads that only spin in the place of the attackers, and with the
//! attackers busy at *another* relay of this process. What is left between that and the siege of
//! its own relay is unfairness.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use anabranch_core::wire::{Hello, MESSAGE_BYTES_MAX, Message, Open, SignIn, VERSION_MAX, VERSION_MIN};
use anabranch_transport::{
    Connection, DeviceKey, FrameReceiver, FrameSender, RelayUrl, TransportError, connect,
};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;

use crate::device::{CHANNEL, Device, wall_ms};
use crate::{Bench, soon};

/// Connections in all; `ANABRANCH_SIEGE` says how many. Each holds a file descriptor of the
/// attackers' process, so at most as many stay open as half of what it may have.
const CONNECTIONS: usize = 10_000;
/// Handshakes at once.
const AT_ONCE: usize = 128;
/// One in so many has a token and is a device of the honest one's workspace;
/// `ANABRANCH_SIEGE_INSIDERS` says another number.
const INSIDER_EVERY: usize = 60;
/// Users that the insiders are; `ANABRANCH_SIEGE_USERS`.
const USERS: usize = 4;
/// How long it goes on once all connections were made.
const SECONDS_AFTER: u64 = 15;
/// How long making them may take.
const SECONDS_MAX: u64 = 240;
/// Writes of the honest device without and beside others.
const WRITES_ALONE: usize = 1_500;
/// How often a newcomer tries to get in.
const NEWCOMER_EVERY: Duration = Duration::from_secs(1);
/// In a hundred, the attackers' connections that have to come about, and newcomers that have to hear
/// something: a handshake that is given up for want of a processor is no fault.
const MADE_PERCENT: usize = 90;
/// How often its p99 alone, with nothing but busy processors beside, it may wait under siege.
const TIMES_MAX: u32 = 20;

/// Most that the relay's memory may grow by under siege, in MiB, by what docs/src/limits.md says of
/// each part and by what these attackers make use of:
///
/// - a stranger: 64 KiB of what it said, and as much for its state in QUIC, in TLS and in two tasks.
///   None sends more than 64 KiB, so the rest of the 256 KiB that it may have in flight stays empty;
/// - an insider: those, 2 MiB in flight both ways, and of the feed that it does not read 1 MiB and a
///   page of 128 KiB: 3.25 MiB;
/// - all together: 64 MiB of larger messages, 64 MiB of the store's pages, 128 MiB of header indexes
///   (640,000 headers), and 32 MiB for a message that is inflated: 288 MiB. What nobody reads, 512 MiB
///   at most, is counted with the insiders.
///
/// The other relay of this process is besieged first and then gone, so the higher of the two counts.
fn growth_mib_max(connections: usize, insiders: usize) -> u64 {
    let strangers_kib = connections.saturating_sub(insiders) as u64 * 128;
    let insiders_kib = insiders as u64 * (3 * 1024 + 256);
    (strangers_kib + insiders_kib) / 1024 + 288
}

/// What the attackers' process is told.
const TARGET: &str = "ANABRANCH_SIEGE_TARGET";
const TOKENS: &str = "ANABRANCH_SIEGE_TOKENS";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes minutes; prints figures: cargo test --release -p anabranch-relay --test it siege -- --ignored --nocapture"]
async fn an_honest_device_is_served_under_siege() {
    let (bench, elsewhere) = (Bench::new(), Bench::new());
    let (relay, other) = (bench.start().await, elsewhere.start().await);
    let mut honest = Honest::connect(&bench, relay.url()).await;
    let before = resident_mib();
    let mut calm = honest.work(WRITES_ALONE).await;
    println!("alone:                {calm}");
    let mut spinning = honest.beside(Besiegers::spinning()).await;
    println!("beside busy threads:  {spinning}");
    let mut afar = honest.beside(Besiegers::of(&elsewhere, other.url())).await;
    println!("another relay's siege: {afar}");
    soon(other.shutdown()).await.unwrap();
    let besieged = honest.beside(Besiegers::of(&bench, relay.url())).await;
    println!("under siege:          {besieged}");
    let highest = highest_mib();
    let made = total_connections();
    let open = made.min(open_max() + AT_ONCE);
    let bound = growth_mib_max(open, open.div_ceil(insider_every()));
    println!(
        "memory of the relay and its devices: {before:?} MiB before, {highest:?} MiB at its highest, \
         which may be {bound} MiB more"
    );
    for (name, figures) in
        [("alone", &mut calm), ("busy threads", &mut spinning), ("another's siege", &mut afar)]
    {
        println!(
            "p99 under siege is {:.1} times that {name}; of what others see {:.1} times",
            besieged.writes.p99().as_secs_f64() / figures.writes.p99().as_secs_f64(),
            besieged.seen.p99().as_secs_f64() / figures.seen.p99().as_secs_f64()
        );
    }
    for (name, figures) in [("another's siege", &afar), ("siege", &besieged)] {
        let AllMade { made, refused } =
            figures.all_made.expect("there were not as many attackers as it takes");
        assert_eq!(made + refused, total_connections(), "{name}");
        assert!(made * 100 >= total_connections() * MADE_PERCENT, "{name}: only {made} were made");
    }
    let (tried, joined, told) = (besieged.tried, besieged.connects.0.len(), besieged.told_busy);
    println!("of {tried} newcomers {joined} got in, and {told} were told that it is busy");
    assert!(joined > 0, "no newcomer got in");
    assert!((joined + told) * 100 >= tried * MADE_PERCENT, "newcomers heard nothing");
    if let (Some(before), Some(highest)) = (before, highest) {
        assert!(highest.saturating_sub(before) <= bound, "{before} MiB became {highest} MiB");
    }
    assert!(besieged.writes.0.len() > 10, "the honest device was not served");
    let (p99, limit) = (besieged.writes.p99(), afar.writes.p99().max(spinning.writes.p99()) * TIMES_MAX);
    assert!(p99 < limit, "the honest device waited for {p99:?}");
    soon(relay.shutdown()).await.unwrap();
}

/// The attackers' side, in the process that [`Besiegers`] starts.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "the other process of the test above; does nothing by itself"]
async fn siege_from_here() {
    let (Ok(target), Ok(tokens)) = (std::env::var(TARGET), std::env::var(TOKENS)) else { return };
    if target == "spin" {
        std::thread::spawn(|| {
            loop {
                std::hint::spin_loop()
            }
        });
        println!("all made");
        loop {
            std::hint::spin_loop();
        }
    }
    let tokens: Vec<String> = tokens.split(' ').map(ToOwned::to_owned).collect();
    besiege(target.parse().unwrap(), tokens).await;
}

/// A device that writes and one that hears of it.
struct Honest {
    writer: Device,
    heard: mpsc::Receiver<Instant>,
    written: usize,
    relay: RelayUrl,
}

impl Honest {
    async fn connect(bench: &Bench, relay: &RelayUrl) -> Self {
        let mut writer = Device::connect(relay).await;
        writer.sign_in("home", Some(bench.token("home", "ann"))).await.unwrap();
        let mut listener = Device::connect(relay).await;
        listener.sign_in("home", Some(bench.token("home", "ben"))).await.unwrap();
        listener.read_feed().await;
        let author = *writer.key.public().as_bytes();
        let (hear, heard) = mpsc::channel(1024);
        tokio::spawn(async move {
            // All of it: without its sender the stream ends.
            let mut listener = listener;
            while let Ok(Some(bytes)) = listener.receiver.next().await {
                if let Ok(Some(Message::Feed(feed))) = Message::decode(&bytes) {
                    for entry in feed.entries {
                        if matches!(entry.body, anabranch_core::wire::FeedBody::Changes { author: by, .. } if by == author)
                            && hear.send(Instant::now()).await.is_err()
                        {
                            return;
                        }
                    }
                }
            }
        });
        Self { writer, heard, written: 0, relay: relay.clone() }
    }

    /// Writes one entity after the other.
    async fn work(&mut self, count: usize) -> Figures {
        let mut figures = Figures::default();
        for _ in 0..count {
            self.write(&mut figures).await;
        }
        figures
    }

    async fn write(&mut self, figures: &mut Figures) {
        let at = Instant::now();
        self.written += 1;
        let answer = self.writer.create("home", &format!("honest{}", self.written), "milk").await;
        assert_eq!(answer.refused, vec![]);
        figures.writes.0.push(at.elapsed());
        let heard = tokio::time::timeout(Duration::from_secs(60), self.heard.recv()).await;
        figures.seen.0.push(heard.expect("the other device hears nothing").unwrap() - at);
    }

    /// Newcomers get in too, or are told to come back.
    async fn newcomer(&self, figures: &mut Figures) {
        let at = Instant::now();
        let key = DeviceKey::generate().unwrap();
        figures.tried += 1;
        match connect(&self.relay, &key, Duration::from_secs(10)).await {
            Ok(_) => figures.connects.0.push(at.elapsed()),
            Err(TransportError::Busy) => figures.told_busy += 1,
            Err(error) => println!("    a newcomer did not get in: {error}"),
        }
    }

    /// Works while others do.
    async fn beside(&mut self, mut others: Besiegers) -> Figures {
        let mut figures = Figures::default();
        let begun = Instant::now();
        let mut newcomer_at = begun;
        let mut all_made: Option<Instant> = None;
        loop {
            self.write(&mut figures).await;
            if newcomer_at.elapsed() >= NEWCOMER_EVERY {
                newcomer_at = Instant::now();
                self.newcomer(&mut figures).await;
            }
            if all_made.is_none() && others.all_made().is_some() {
                all_made = Some(Instant::now());
            }
            let done = all_made.is_some_and(|at| at.elapsed().as_secs() >= SECONDS_AFTER);
            if done || begun.elapsed().as_secs() > SECONDS_MAX {
                break;
            }
        }
        figures.all_made = others.all_made();
        println!("    {:.0?}, {}", begun.elapsed(), others.last_words());
        figures
    }
}

#[derive(Default)]
struct Figures {
    writes: Times,
    /// From the write until another device has it.
    seen: Times,
    /// Of newcomers.
    connects: Times,
    tried: usize,
    told_busy: usize,
    /// Nothing where the attackers were not done in time.
    all_made: Option<AllMade>,
}

/// What came of the attackers' connections.
#[derive(Clone, Copy, Default)]
struct AllMade {
    made: usize,
    refused: usize,
}

impl AllMade {
    /// From what their process says.
    fn parse(line: &str) -> Option<Self> {
        let said = line.strip_prefix("all made")?;
        let mut numbers = said.split(|c: char| !c.is_ascii_digit()).filter_map(|part| part.parse().ok());
        let [made, refused] = [numbers.next(), numbers.next()].map(Option::unwrap_or_default);
        Some(Self { made, refused })
    }
}

impl std::fmt::Display for Figures {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "writes {}; seen {}; connects {}", self.writes, self.seen, self.connects)
    }
}

#[derive(Default)]
struct Times(Vec<Duration>);

impl Times {
    fn at(&self, part: usize) -> Duration {
        let mut sorted = self.0.clone();
        sorted.sort_unstable();
        sorted
            .get((sorted.len() * part / 100).min(sorted.len().saturating_sub(1)))
            .copied()
            .unwrap_or_default()
    }

    fn p99(&self) -> Duration {
        self.at(99)
    }
}

impl std::fmt::Display for Times {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (p50, p99, max) = (self.at(50), self.at(99), self.at(100));
        write!(f, "{} p50 {p50:.2?} p99 {p99:.2?} max {max:.2?}", self.0.len())
    }
}

/// The attackers' process; it ends when this is dropped.
struct Besiegers {
    process: Child,
    said: std::sync::mpsc::Receiver<String>,
    all_made: Option<AllMade>,
    last: String,
}

impl Besiegers {
    fn spinning() -> Self {
        Self::start("spin", "")
    }

    fn of(bench: &Bench, relay: &RelayUrl) -> Self {
        let users = number("ANABRANCH_SIEGE_USERS", USERS);
        let tokens: Vec<String> =
            (0..users).map(|user| bench.token("home", &format!("mallory{user}"))).collect();
        Self::start(&relay.to_string(), &tokens.join(" "))
    }

    fn start(target: &str, tokens: &str) -> Self {
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "--nocapture", "siege::siege_from_here"])
            .envs([(TARGET, target), (TOKENS, tokens)])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(process.stdout.take().unwrap()).lines();
        let (say, said) = std::sync::mpsc::channel();
        std::thread::spawn(move || lines.map_while(Result::ok).try_for_each(|line| say.send(line)));
        Self { process, said, all_made: None, last: String::new() }
    }

    fn listen(&mut self) {
        while let Ok(line) = self.said.try_recv() {
            self.all_made = AllMade::parse(&line).or(self.all_made);
            self.last = line;
        }
    }

    fn all_made(&mut self) -> Option<AllMade> {
        self.listen();
        self.all_made
    }

    fn last_words(&mut self) -> &str {
        self.listen();
        &self.last
    }
}

impl Drop for Besiegers {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[derive(Default)]
struct Counts {
    made: AtomicUsize,
    refused: AtomicUsize,
    /// Units that insiders got sent.
    units: AtomicUsize,
}

async fn besiege(url: RelayUrl, tokens: Vec<String>) {
    let total = total_connections();
    let room = Arc::new(Semaphore::new(AT_ONCE));
    let open_max = open_max();
    let counts = Arc::new(Counts::default());
    let tokens = Arc::new(tokens);
    let mut tasks = JoinSet::new();
    let mut held: Vec<Held> = Vec::new();
    let report = |word: &str, held: &[Held]| {
        let open = held.iter().filter(|held| held.connection.close_reason().is_none()).count();
        let count = |of: &AtomicUsize| of.load(Ordering::Relaxed);
        println!(
            "{word}: {} hostile connections, {} refused, {open} open, {} units",
            count(&counts.made),
            count(&counts.refused),
            count(&counts.units)
        );
    };
    for number in 0..total {
        let permit = room.clone().acquire_owned().await.unwrap();
        let (url, tokens, counts) = (url.clone(), tokens.clone(), counts.clone());
        tasks.spawn(async move {
            let connection = attack(number, &url, &tokens, &counts).await;
            match &connection {
                Some(_) => counts.made.fetch_add(1, Ordering::Relaxed),
                None => counts.refused.fetch_add(1, Ordering::Relaxed),
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
    }
    while let Some(done) = tasks.join_next().await {
        held.extend(done.unwrap());
    }
    loop {
        report("all made", &held);
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

/// A connection that stays open, with its stream if it opened one.
struct Held {
    connection: Connection,
    /// Without its receiver where a task reads.
    _stream: Option<(FrameSender, Option<FrameReceiver>)>,
}

/// One hostile connection, of five kinds of strangers and four of insiders; kept open where the
/// relay allows it.
async fn attack(number: usize, url: &RelayUrl, tokens: &[String], counts: &Arc<Counts>) -> Option<Held> {
    let key = DeviceKey::generate().ok()?;
    let connection = connect(url, &key, Duration::from_secs(20)).await.ok()?;
    let every = insider_every();
    if number.is_multiple_of(every) {
        return inside(number / every, key, connection, tokens, counts).await;
    }
    // One kind of strangers says nothing at all.
    if number.is_multiple_of(5) {
        return Some(Held { connection, _stream: None });
    }
    let (mut sender, receiver) = connection.open_control().await.ok()?;
    let mut send = async |message: Message| sender.send(message.encode()).await.ok();
    match number % 5 {
        1 => send(hello().into()).await?,
        2 => sender.send(vec![0x5a; 60_000]).await.ok()?,
        3 => {
            send(hello().into()).await?;
            for _ in 0..50 {
                send(sign_in("no token").into()).await?;
            }
        }
        _ => {
            send(hello().into()).await?;
            sender.send(bomb(number / 5)).await.ok()?;
        }
    }
    Some(Held { connection, _stream: Some((sender, Some(receiver))) })
}

/// Signed in with a token, a member of the honest device's workspace.
async fn inside(
    number: usize,
    key: DeviceKey,
    connection: Connection,
    tokens: &[String],
    counts: &Arc<Counts>,
) -> Option<Held> {
    let token = &tokens[number % tokens.len()];
    let (mut sender, mut receiver) = connection.open_control().await.ok()?;
    sender.send(Message::from(hello()).encode()).await.ok()?;
    sender.send(Message::from(sign_in(token)).encode()).await.ok()?;
    let open = || Open { channel: CHANNEL, epoch: [0; 16], cursor: 0, digest: [0; 32], full: true };
    let ask = Message::from(open()).encode();
    if number % 4 < 2 {
        // Hears everything; half of them reads nothing of it.
        sender.send(ask).await.ok()?;
        if number % 4 == 1 {
            tokio::spawn(async move { while let Ok(Some(_)) = receiver.next().await {} });
            return Some(Held { connection, _stream: Some((sender, None)) });
        }
        return Some(Held { connection, _stream: Some((sender, Some(receiver))) });
    }
    let counts = counts.clone();
    let again = sign_in(token);
    tokio::spawn(async move { while let Ok(Some(_)) = receiver.next().await {} });
    tokio::spawn(async move {
        for round in 0_u64.. {
            let sent = if number % 4 == 2 {
                // A unit of entities of its own, as fast as the relay takes them.
                let unit = Device::unit(&key, "home", round * 20..round * 20 + 20);
                sender.send(Message::from(unit).encode()).await
            } else {
                // Signs in and reads the whole feed, over and over.
                match sender.send(Message::from(again.clone()).encode()).await {
                    Ok(()) => sender.send(ask.clone()).await,
                    failed => failed,
                }
            };
            if sent.is_err() {
                return;
            }
            counts.units.fetch_add(1, Ordering::Relaxed);
        }
    });
    Some(Held { connection, _stream: None })
}

/// A unit of 64 MiB of zeros in a few kilobytes, which says that it is as long as a message may be, or
/// less, so that it has to be inflated until it is longer, or much more.
fn bomb(number: usize) -> Vec<u8> {
    static PACKED: OnceLock<Vec<u8>> = OnceLock::new();
    let packed = PACKED.get_or_init(|| zstd::bulk::compress(&vec![0; 64 << 20], 3).unwrap());
    let announced = [MESSAGE_BYTES_MAX as u32, 1 << 20, u32::MAX][number % 3];
    [&[6, 3][..], &announced.to_le_bytes(), packed].concat()
}

fn hello() -> Hello {
    Hello {
        version_min: VERSION_MIN,
        version_max: VERSION_MAX,
        software: "siege".into(),
        wall_ms: wall_ms(),
        features_required: 0,
        features: 0,
        proof: Vec::new(),
    }
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

fn number(variable: &str, default: usize) -> usize {
    std::env::var(variable).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

fn total_connections() -> usize {
    number("ANABRANCH_SIEGE", CONNECTIONS)
}

fn insider_every() -> usize {
    number("ANABRANCH_SIEGE_INSIDERS", INSIDER_EVERY)
}

/// Connections that the attackers keep open at once.
fn open_max() -> usize {
    descriptors_max() / 2
}

/// File descriptors that this process may have open.
fn descriptors_max() -> usize {
    let limits = std::fs::read_to_string("/proc/self/limits").unwrap_or_default();
    let line = limits.lines().find(|line| line.starts_with("Max open files"));
    line.and_then(|line| line.split_whitespace().nth(3)?.parse().ok()).unwrap_or(1024)
}

fn highest_mib() -> Option<u64> {
    memory_mib("VmHWM:")
}

fn resident_mib() -> Option<u64> {
    memory_mib("VmRSS:")
}

fn memory_mib(what: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with(what))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? / 1024)
}
