//! Both ends over real UDP on the loopback interface.
//!
//! Waits are for events; where a test has to wait for nothing to happen, it says so.

use crate::*;
use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};
use tokio::{net::UdpSocket, time::timeout};

const LOOPBACK: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 0);
/// Long enough for a busy machine; no test that passes waits for it.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long nothing has to happen to be taken for nothing.
const NOTHING: Duration = Duration::from_millis(50);
const MIB: usize = 1024 * 1024;

fn key() -> DeviceKey {
    DeviceKey::generate().unwrap()
}

struct Server {
    endpoint: Endpoint,
    address: SocketAddr,
}

impl Server {
    fn start(limits: Limits) -> Self {
        let endpoint = Endpoint::bind(LOOPBACK, &key(), limits).unwrap();
        let address = endpoint.local_addr().unwrap();
        Self { endpoint, address }
    }

    async fn client(&self) -> Result<Connection, TransportError> {
        connect_addr(self.address, self.endpoint.key(), &key(), PATIENCE).await
    }

    async fn accept(&self) -> Connection {
        timeout(PATIENCE, self.endpoint.accept()).await.unwrap().unwrap()
    }

    /// A client connects and is answered.
    async fn serves(&self) {
        let client = self.client().await.unwrap();
        // Others may be in the queue before it.
        let accepted = loop {
            let accepted = self.accept().await;
            if accepted.close_reason().is_none() {
                break accepted;
            }
        };
        let (mut sender, mut receiver) = client.open_control().await.unwrap();
        sender.send(b"ping".to_vec()).await.unwrap();
        let (mut back, mut there) = accepted.accept_control().await.unwrap();
        back.send(there.next().await.unwrap().unwrap()).await.unwrap();
        assert_eq!(receiver.next().await.unwrap().unwrap(), b"ping");
    }
}

/// Two ends with a control stream between them.
struct Pair {
    server: Server,
    client: Connection,
    accepted: Connection,
    up: FrameSender,
    down: FrameReceiver,
    server_down: FrameSender,
    server_up: FrameReceiver,
}

impl Pair {
    async fn new() -> Self {
        let server = Server::start(Limits::default());
        let client = server.client().await.unwrap();
        let accepted = server.accept().await;
        let (mut up, down) = client.open_control().await.unwrap();
        up.send(Vec::new()).await.unwrap();
        let (server_down, mut server_up) = accepted.accept_control().await.unwrap();
        assert_eq!(server_up.next().await.unwrap().unwrap(), b"");
        Self { server, client, accepted, up, down, server_down, server_up }
    }
}

fn header(length: u32, flags: u8) -> Vec<u8> {
    let mut bytes = length.to_le_bytes().to_vec();
    bytes.push(flags);
    bytes
}

/// Bytes that differ by position, so that a lost or doubled piece shows.
fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at as u32).wrapping_mul(2_654_435_761).to_le_bytes()[3]).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn both_ends_learn_the_key_of_the_other() {
    let server = Server::start(Limits::default());
    let device = key();
    let url: RelayUrl = format!("quic://{}#{}", server.address, server.endpoint.key()).parse().unwrap();
    let client = connect(&url, &device, PATIENCE).await.unwrap();
    let accepted = server.accept().await;
    assert_eq!(client.peer_key(), server.endpoint.key());
    assert_eq!(accepted.peer_key(), device.public());
    assert_eq!(client.remote_addr(), server.address);
    assert_eq!(accepted.remote_addr().ip(), server.address.ip());
    server.serves().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn names_and_ipv6_are_resolved() {
    // The name may have an IPv6 address too, at which nobody listens.
    let server = Server::start(Limits::default());
    let url: RelayUrl =
        format!("quic://localhost:{}#{}", server.address.port(), server.endpoint.key()).parse().unwrap();
    connect(&url, &key(), PATIENCE).await.unwrap();

    let Ok(endpoint) = Endpoint::bind("[::1]:0".parse().unwrap(), &key(), Limits::default()) else {
        return; // a machine without IPv6
    };
    let address = endpoint.local_addr().unwrap();
    let url: RelayUrl = format!("quic://{address}#{}", endpoint.key()).parse().unwrap();
    connect(&url, &key(), PATIENCE).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_with_another_key_is_told_apart_from_no_server() {
    let server = Server::start(Limits::default());
    let expected = key().public();
    let begin = Instant::now();
    let error = connect_addr(server.address, expected, &key(), PATIENCE).await.unwrap_err();
    assert!(begin.elapsed() < PATIENCE / 2, "took {:?}", begin.elapsed());
    assert!(error.is_wrong_key() && !error.is_offline() && !error.can_retry());
    match error {
        TransportError::WrongPeerKey { expected: e, found } => {
            assert_eq!((e, found), (expected, server.endpoint.key()));
        }
        other => panic!("{other}"),
    }
    let nobody = timeout(NOTHING, server.endpoint.accept()).await;
    assert!(nobody.is_err(), "the server took a client that had turned away");
    server.serves().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_server_is_unreachable_within_the_timeout() {
    // Held, so that nobody else listens there.
    let silent = UdpSocket::bind(LOOPBACK).await.unwrap();
    let begin = Instant::now();
    let within = Duration::from_millis(300);
    let error = connect_addr(silent.local_addr().unwrap(), key().public(), &key(), within).await.unwrap_err();
    assert!(begin.elapsed() >= within && begin.elapsed() < within + Duration::from_secs(5));
    assert!(matches!(error, TransportError::Unreachable { .. }), "{error}");
    assert!(error.is_offline() && error.can_retry());

    let url: RelayUrl = format!("quic://nobody.invalid:1#{}", key().public()).parse().unwrap();
    let error = connect(&url, &key(), Duration::from_secs(2)).await.unwrap_err();
    assert!(error.is_offline(), "{error}");
}

#[tokio::test]
async fn an_address_without_a_key_is_not_connected_to() {
    let url: RelayUrl = "quic://127.0.0.1:1".parse().unwrap();
    let error = connect(&url, &key(), PATIENCE).await.unwrap_err();
    assert!(matches!(error, TransportError::BadUrl { .. }), "{error}");
}

#[tokio::test]
async fn an_address_in_use_is_a_local_error() {
    let server = Server::start(Limits::default());
    let error = Endpoint::bind(server.address, &key(), Limits::default()).unwrap_err();
    assert_eq!(error.category(), Category::Local, "{error}");
}

/// The first datagram of a client, which waits in vain for an answer.
async fn first_datagram(server_key: PublicKey) -> Vec<u8> {
    let trap = UdpSocket::bind(LOOPBACK).await.unwrap();
    let address = trap.local_addr().unwrap();
    let attempt = tokio::spawn(async move { connect_addr(address, server_key, &key(), PATIENCE).await });
    let mut datagram = vec![0; 2048];
    let length = timeout(PATIENCE, trap.recv(&mut datagram)).await.unwrap().unwrap();
    attempt.abort();
    datagram.truncate(length);
    datagram
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_datagrams_do_no_harm() {
    let server = Server::start(Limits::default());
    let before = server.client().await.unwrap();
    let accepted = server.accept().await;
    let genuine = first_datagram(server.endpoint.key()).await;
    let socket = UdpSocket::bind(LOOPBACK).await.unwrap();
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for round in 0..6_000 {
        let datagram = match round % 4 {
            // Noise.
            0 => (0..random() % 1500).map(|_| random() as u8).collect(),
            // Noise behind the header of a first packet of QUIC version 1.
            1 => {
                let mut bytes: Vec<u8> = (0..1200 + random() % 200).map(|_| random() as u8).collect();
                bytes[..6].copy_from_slice(&[0xc0 | random() as u8 & 0x0f, 0, 0, 0, 1, 8]);
                bytes
            }
            // A genuine first packet with one flipped bit, of which some lie in the clear.
            2 => {
                let mut bytes = genuine.clone();
                let at = random() as usize % if round % 8 == 2 { 40 } else { bytes.len() };
                bytes[at] ^= 1 << (random() % 8);
                bytes
            }
            // The same, cut.
            _ => genuine[..random() as usize % genuine.len()].to_vec(),
        };
        socket.send_to(&datagram, server.address).await.unwrap();
    }
    server.serves().await;
    assert!(before.close_reason().is_none() && accepted.close_reason().is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_show_that_they_own_their_address_when_asked() {
    let limits = Limits { unvalidated_handshakes_max: 0, ..Limits::default() };
    let server = Server::start(limits);
    let socket = UdpSocket::bind(LOOPBACK).await.unwrap();
    socket.send_to(&first_datagram(server.endpoint.key()).await, server.address).await.unwrap();
    let mut answer = [0; 2048];
    timeout(PATIENCE, socket.recv(&mut answer)).await.unwrap().unwrap();
    assert_eq!(answer[0] & 0xf0, 0xf0, "a Retry packet (RFC 9000, section 17.2.5)");
    server.serves().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn half_open_clients_are_bounded_and_let_go() {
    let limits = Limits { handshakes_max: 3, handshake_timeout: Duration::from_secs(1), ..Limits::default() };
    let server = Server::start(limits);
    let socket = UdpSocket::bind(LOOPBACK).await.unwrap();
    for _ in 0..3 {
        socket.send_to(&first_datagram(server.endpoint.key()).await, server.address).await.unwrap();
        // The answer: from now on the server waits for the other half.
        timeout(PATIENCE, socket.recv(&mut [0; 2048])).await.unwrap().unwrap();
    }
    let begin = Instant::now();
    let mut refused = 0;
    let client = loop {
        match server.client().await {
            Ok(client) => break client,
            Err(TransportError::Busy) => refused += 1,
            Err(error) => panic!("{error}"),
        }
        // Well before QUIC's own idle timeout would let go of them.
        assert!(begin.elapsed() < Duration::from_secs(15));
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    assert!(refused > 0 && client.close_reason().is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_over_the_limit_are_refused() {
    let limits = Limits { connections_max: 2, ..Limits::default() };
    let server = Server::start(limits);
    let first = server.client().await.unwrap();
    let at_server = server.accept().await;
    let _second = server.client().await.unwrap();
    let _other = server.accept().await;
    let error = server.client().await.unwrap_err();
    assert!(matches!(error, TransportError::Busy) && error.can_retry() && !error.is_offline(), "{error}");

    // A place is free as soon as the server lets go of a connection, whatever its client does.
    drop(at_server);
    timeout(PATIENCE, first.closed()).await.unwrap();
    server.client().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn oversized_frames_are_refused_before_they_arrive() {
    let mut pair = Pair::new().await;
    let max = FRAME_BYTES_MAX_BEFORE_SIGN_IN;
    pair.up.send(pattern(max)).await.unwrap();
    assert_eq!(pair.server_up.next().await.unwrap().unwrap(), pattern(max));
    // Just the header: no payload is needed to refuse it.
    pair.up.send_raw(&header(max as u32 + 1, 0)).await;
    for _ in 0..2 {
        let error = timeout(PATIENCE, pair.server_up.next()).await.unwrap().unwrap_err();
        assert!(error.is_peer_fault());
        match error {
            TransportError::FrameTooLarge { bytes, max_bytes } => {
                assert_eq!((bytes, max_bytes), (max as u64 + 1, max as u64));
            }
            other => panic!("{other}"),
        }
    }
    // A raised limit has its own end, and never exceeds that of the format.
    pair.down.raise_limit(usize::MAX);
    pair.server_down.send_raw(&header(u32::MAX, 0)).await;
    let error = timeout(PATIENCE, pair.down.next()).await.unwrap().unwrap_err();
    assert!(
        matches!(error, TransportError::FrameTooLarge { max_bytes, .. } if max_bytes == FRAME_BYTES_MAX as u64)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_oversized_frame_of_our_own_is_not_sent() {
    let mut pair = Pair::new().await;
    let error = pair.up.send(vec![0; FRAME_BYTES_MAX + 1]).await.unwrap_err();
    assert_eq!(error.category(), Category::Local, "{error}");
    pair.up.send(b"next".to_vec()).await.unwrap();
    assert_eq!(pair.server_up.next().await.unwrap().unwrap(), b"next");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_has_not_signed_in_can_fill_little_memory() {
    let mut pair = Pair::new().await;
    let mut taken = 0;
    let mut streams = Vec::new();
    for _ in 0..8 {
        let (mut sender, receiver) = pair.client.open_control().await.unwrap();
        let frame = vec![0; FRAME_BYTES_MAX_BEFORE_SIGN_IN];
        while let Ok(sent) = timeout(NOTHING, sender.send(frame.clone())).await {
            sent.unwrap();
            taken += frame.len();
        }
        streams.push((sender, receiver));
    }
    assert!((100_000..=256 * 1024).contains(&taken), "{taken}");
    // Signing in sets them free.
    pair.server_up.raise_limit(8 * MIB);
    for (sender, _) in &mut streams {
        timeout(PATIENCE, sender.send(Vec::new())).await.unwrap().unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_flags_are_refused() {
    let mut pair = Pair::new().await;
    pair.up.send_raw(&[&header(3, 1)[..], b"abc"].concat()).await;
    let error = timeout(PATIENCE, pair.server_up.next()).await.unwrap().unwrap_err();
    assert!(matches!(error, TransportError::BadFrame { .. }) && error.is_peer_fault(), "{error}");
    // The connection itself still carries the reason back.
    pair.accepted.close(3, "flags");
    assert!(matches!(pair.client.closed().await, TransportError::Refused { code: 3, .. }));
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_cut_at_every_byte_end_in_a_clear_error() {
    let server = Server::start(Limits::default());
    let bytes = [&header(6, 0)[..], b"frames", &header(0, 0)[..], &header(1, 0)[..], b"x"].concat();
    let ends = [0, 11, 16, 22];
    let client = server.client().await.unwrap();
    let accepted = server.accept().await;
    for cut in 0..=bytes.len() {
        let (mut up, _down) = client.open_control().await.unwrap();
        up.send_raw(&bytes[..cut]).await;
        let (finished, frames) = tokio::join!(up.finish(), async {
            let (_down, mut up) = accepted.accept_control().await.unwrap();
            let mut frames = 0;
            loop {
                match up.next().await {
                    Ok(Some(_)) => frames += 1,
                    Ok(None) => return (frames, true),
                    Err(TransportError::BadFrame { .. }) => return (frames, false),
                    Err(error) => panic!("{error}"),
                }
            }
        });
        finished.unwrap();
        let whole = ends.iter().filter(|end| (1..=cut).contains(*end)).count();
        assert_eq!(frames, (whole, ends.contains(&cut)), "cut at {cut}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_receiver_dropped_within_a_frame_loses_nothing() {
    let mut pair = Pair::new().await;
    let payload = pattern(200);
    let bytes = [&header(200, 0)[..], &payload, &header(4, 0), b"next"].concat();
    let mut dropped = 0;
    for piece in bytes[..205].chunks(7) {
        // Nothing happens until the frame is complete.
        assert!(timeout(Duration::from_millis(5), pair.server_up.next()).await.is_err());
        dropped += 1;
        pair.up.send_raw(piece).await;
    }
    pair.up.send_raw(&bytes[205..]).await;
    assert!(dropped > 20);
    assert_eq!(timeout(PATIENCE, pair.server_up.next()).await.unwrap().unwrap().unwrap(), payload);
    assert_eq!(timeout(PATIENCE, pair.server_up.next()).await.unwrap().unwrap().unwrap(), b"next");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_announced_frame_stays_with_its_sender_until_it_is_wanted() {
    let mut pair = Pair::new().await;
    pair.server_up.raise_limit(8 * MIB);
    let payload = pattern(4 * MIB);
    {
        let mut sending = Box::pin(pair.up.send(payload.clone()));
        assert!(timeout(NOTHING, &mut sending).await.is_err());
        for _ in 0..2 {
            assert_eq!(timeout(PATIENCE, pair.server_up.announced()).await.unwrap().unwrap(), Some(4 * MIB));
        }
        assert!(timeout(NOTHING, &mut sending).await.is_err(), "no more than a window has left");
        let (sent, received) = tokio::join!(sending, pair.server_up.next());
        sent.unwrap();
        assert_eq!(received.unwrap().unwrap(), payload);
    }
    // A frame that is nothing but its header is one too; so is the end of the stream.
    pair.up.send(Vec::new()).await.unwrap();
    for _ in 0..2 {
        assert_eq!(timeout(PATIENCE, pair.server_up.announced()).await.unwrap().unwrap(), Some(0));
    }
    assert_eq!(pair.server_up.next().await.unwrap().unwrap(), b"");
    let (ended, end) = tokio::join!(pair.up.finish(), pair.server_up.announced());
    ended.unwrap();
    assert_eq!(end.unwrap(), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sender_dropped_within_a_frame_completes_it_later() {
    let mut pair = Pair::new().await;
    pair.server_up.raise_limit(8 * MIB);
    let large = pattern(5 * MIB);
    // Nobody reads, so flow control stops it; that it waits shows that there is backpressure.
    assert!(timeout(NOTHING, pair.up.send(large.clone())).await.is_err());
    let (sent, received) = tokio::join!(
        async {
            pair.up.send(b"next".to_vec()).await?;
            pair.up.finish().await
        },
        async {
            let frames = (pair.server_up.next().await, pair.server_up.next().await);
            (frames.0.unwrap().unwrap(), frames.1.unwrap().unwrap(), pair.server_up.next().await.unwrap())
        }
    );
    sent.unwrap();
    assert_eq!(received, (large, b"next".to_vec(), None));
    assert!(matches!(pair.up.send(Vec::new()).await, Err(TransportError::Closed)));
}

#[tokio::test(flavor = "multi_thread")]
async fn large_frames_go_both_ways_at_once() {
    let Pair {
        server,
        client: _client,
        accepted: _accepted,
        mut up,
        mut down,
        mut server_down,
        mut server_up,
    } = Pair::new().await;
    down.raise_limit(8 * MIB);
    server_up.raise_limit(8 * MIB);
    let large = pattern(5 * MIB);
    let transfer = async {
        tokio::join!(
            async { up.send(large.clone()).await.unwrap() },
            async { server_down.send(large.clone()).await.unwrap() },
            async { assert!(down.next().await.unwrap().unwrap() == large) },
            async { assert!(server_up.next().await.unwrap().unwrap() == large) },
        )
    };
    timeout(PATIENCE, transfer).await.unwrap();
    server.serves().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_close_carries_its_code_and_reason_to_every_waiter() {
    let mut pair = Pair::new().await;
    let reason = format!("no such workspace\n{}", "é".repeat(400));
    pair.accepted.close(17, &reason);
    for error in [pair.client.closed().await, pair.down.next().await.unwrap_err()] {
        assert_eq!(error.category(), Category::Refusal);
        match error {
            TransportError::Refused { code, reason } => {
                assert_eq!(code, 17);
                assert!(reason.starts_with("no such workspace é") && reason.chars().count() <= 256);
            }
            other => panic!("{other}"),
        }
    }
    assert!(matches!(pair.up.send(Vec::new()).await, Err(TransportError::Refused { code: 17, .. })));
    assert!(matches!(pair.client.open_control().await, Err(TransportError::Refused { code: 17, .. })));
    assert!(matches!(pair.accepted.closed().await, TransportError::Closed));
    assert!(matches!(pair.server_up.next().await, Err(TransportError::Closed)));
}

#[tokio::test(flavor = "multi_thread")]
async fn frames_before_a_graceful_end_all_arrive() {
    let mut pair = Pair::new().await;
    let reader = tokio::spawn(async move {
        let mut frames = 0;
        while pair.server_up.next().await.unwrap().is_some() {
            frames += 1;
        }
        frames
    });
    for _ in 0..100 {
        pair.up.send(pattern(10_000)).await.unwrap();
    }
    pair.up.finish().await.unwrap();
    assert_eq!(timeout(PATIENCE, reader).await.unwrap().unwrap(), 100);
    pair.client.close(0, "done");
    timeout(PATIENCE, pair.client.closed_and_sent()).await.unwrap();
    assert!(matches!(pair.accepted.closed().await, TransportError::Refused { code: 0, .. }));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_connection_closes() {
    let Pair { server: _server, client, accepted, up, down, .. } = Pair::new().await;
    drop(client);
    // Its streams hold it open.
    assert!(timeout(NOTHING, accepted.closed()).await.is_err());
    drop((up, down));
    assert!(matches!(
        timeout(PATIENCE, accepted.closed()).await.unwrap(),
        TransportError::Refused { code: 0, .. }
    ));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_closed_endpoint_tells_its_clients_and_takes_no_more() {
    let Pair { server, client, accepted: _accepted, .. } = Pair::new().await;
    let begin = Instant::now();
    server.endpoint.close(9, "restarting").await;
    assert!(matches!(client.closed().await, TransportError::Refused { code: 9, .. }));
    assert!(timeout(PATIENCE, server.endpoint.accept()).await.unwrap().is_none());
    assert!(begin.elapsed() < PATIENCE);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_endpoint_leaves_its_connections_alone() {
    let Pair { server, client: _client, accepted: _accepted, mut up, mut server_up, .. } = Pair::new().await;
    let (address, server_key) = (server.address, server.endpoint.key());
    drop(server);
    up.send(b"still here".to_vec()).await.unwrap();
    assert_eq!(timeout(PATIENCE, server_up.next()).await.unwrap().unwrap().unwrap(), b"still here");
    let error = connect_addr(address, server_key, &key(), Duration::from_millis(300)).await.unwrap_err();
    assert!(error.can_retry(), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_may_change_its_address() {
    let mut pair = Pair::new().await;
    let before = pair.accepted.remote_addr();
    pair.client.rebind();
    pair.up.send(b"from elsewhere".to_vec()).await.unwrap();
    assert_eq!(timeout(PATIENCE, pair.server_up.next()).await.unwrap().unwrap().unwrap(), b"from elsewhere");
    assert_ne!(pair.accepted.remote_addr(), before);
    pair.server_down.send(b"found".to_vec()).await.unwrap();
    assert_eq!(timeout(PATIENCE, pair.down.next()).await.unwrap().unwrap().unwrap(), b"found");
}

/// A client whose server was killed, and another server at its address.
async fn orphaned(server_key: &DeviceKey, successor_key: &DeviceKey) -> (Connection, FrameSender, Endpoint) {
    // A runtime that is shut down takes its sockets along and says nothing to anybody, as a kill does.
    let life = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let endpoint = {
        let _within = life.enter();
        Endpoint::bind(LOOPBACK, server_key, Limits::default()).unwrap()
    };
    let address = endpoint.local_addr().unwrap();
    let client = connect_addr(address, server_key.public(), &key(), PATIENCE).await.unwrap();
    let accepted = timeout(PATIENCE, endpoint.accept()).await.unwrap().unwrap();
    let (up, _) = client.open_control().await.unwrap();
    // All of it: what is dropped while the sockets still work says goodbye.
    tokio::task::block_in_place(|| life.shutdown_timeout(PATIENCE));
    drop((accepted, endpoint));

    let begin = Instant::now();
    loop {
        match Endpoint::bind(address, successor_key, Limits::default()) {
            Ok(successor) => return (client, up, successor),
            Err(error) => assert!(begin.elapsed() < PATIENCE, "{error}"),
        }
        tokio::task::yield_now().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_learns_of_a_killed_server_from_its_successor() {
    let server_key = key();
    let (client, mut up, _successor) = orphaned(&server_key, &server_key).await;
    let begin = Instant::now();
    // An acknowledgement that was late may have asked already.
    let _ = up.send(b"are you there?".to_vec()).await;
    let error = timeout(PATIENCE, client.closed()).await.unwrap();
    assert!(
        matches!(&error, TransportError::ConnectionLost { detail } if detail == "the peer restarted"),
        "{error}"
    );
    // Far below the idle timeout.
    assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_believes_nobody_else_that_its_server_was_killed() {
    let (client, mut up, _successor) = orphaned(&key(), &key()).await;
    up.send(b"are you there?".to_vec()).await.unwrap();
    assert!(timeout(20 * NOTHING, client.closed()).await.is_err());
}
