//! What strangers, broken devices and slow ones do must not be felt by others.

use std::net::UdpSocket;

use anabranch_core::wire::FaultCode;
use anabranch_relay::RelayHandle;
use anabranch_transport::{DeviceKey, FRAME_BYTES_MAX_BEFORE_SIGN_IN};

use crate::device::Device;
use crate::{Bench, soon};

/// Bytes that look like nothing in particular, the same in every run.
fn noise(seed: u64, bytes: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 24) as u8
    };
    std::iter::repeat_with(next).take(bytes).collect()
}

async fn an_honest_device_works(bench: &Bench, relay: &RelayHandle) {
    let mut device = Device::connect(relay.url()).await;
    device.sign_in("home", Some(bench.token("home", "ann"))).await.unwrap();
    assert_eq!(device.create("home", "n1", "milk").await.refused, vec![]);
}

#[tokio::test]
async fn datagrams_of_noise_disturb_nobody() {
    let bench = Bench::new();
    let relay = bench.start().await;
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    for round in 0..500 {
        let mut packet = noise(round, 1 + (round as usize * 37) % 1400);
        if round % 2 == 0 {
            // The form of a QUIC long header.
            packet[0] |= 0xc0;
        }
        socket.send_to(&packet, relay.local_addr()).unwrap();
    }
    an_honest_device_works(&bench, &relay).await;
    soon(relay.shutdown()).await.unwrap();
}

#[tokio::test]
async fn frames_of_noise_end_their_own_connection_only() {
    let bench = Bench::new();
    let relay = bench.start().await;
    let mut honest = Device::connect(relay.url()).await;
    honest.sign_in("home", Some(bench.token("home", "ann"))).await.unwrap();
    for round in 0..40 {
        let key = DeviceKey::generate().unwrap();
        let mut device = match round % 2 {
            0 => Device::connect_silently(relay.url(), key).await,
            _ => Device::connect_as(relay.url(), key).await,
        };
        let mut frame = noise(round, 1 + (round as usize * 997) % 60_000);
        // Kinds that exist, so that some of the noise gets as far as the decoders.
        frame[0] = (round % 16) as u8;
        if let Some(flags) = frame.get_mut(1) {
            *flags = 1 | (round as u8 & 2);
        }
        soon(device.sender.send(frame)).await.unwrap();
        // Kinds 0 and 15 may be messages of a later version, for all that the relay knows, and others are
        // for those who have signed in.
        let codes = [FaultCode::Protocol, FaultCode::Incompatible, FaultCode::NotSignedIn].map(|c| c as u64);
        let code = device.closed_with().await;
        assert!(codes.contains(&code), "round {round}: {code}");
    }
    assert_eq!(honest.create("home", "n0", "milk").await.refused, vec![]);
    an_honest_device_works(&bench, &relay).await;
    soon(relay.shutdown()).await.unwrap();
}

#[tokio::test]
async fn large_frames_have_to_wait_for_the_sign_in() {
    let bench = Bench::new();
    let relay = bench.start().await;
    let mut stranger = Device::connect(relay.url()).await;
    // The relay may close before all of it has left.
    let _ = soon(stranger.sender.send(vec![0; FRAME_BYTES_MAX_BEFORE_SIGN_IN + 1])).await;
    assert_eq!(stranger.closed_with().await, FaultCode::Protocol as u64);

    let mut device = Device::connect(relay.url()).await;
    device.sign_in("home", Some(bench.token("home", "ann"))).await.unwrap();
    // Twice the bound, and noise, so that no compression helps.
    let title: String =
        noise(1, 2 * FRAME_BYTES_MAX_BEFORE_SIGN_IN).iter().map(|b| char::from(b % 90 + 33)).collect();
    assert_eq!(device.create("home", "n1", &title).await.refused, vec![]);
    soon(relay.shutdown()).await.unwrap();
}

#[tokio::test]
async fn a_device_that_does_not_read_slows_nobody() {
    let bench = Bench::new();
    let relay = bench.start().await;
    let mut deaf = Device::connect(relay.url()).await;
    deaf.sign_in("home", Some(bench.token("home", "deaf"))).await.unwrap();
    deaf.send(anabranch_core::wire::Open {
        channel: crate::device::CHANNEL,
        epoch: [0; 16],
        cursor: 0,
        digest: [0; 32],
        full: false,
    })
    .await;
    let mut writer = Device::connect(relay.url()).await;
    writer.sign_in("home", Some(bench.token("home", "ann"))).await.unwrap();
    // More than a stream's window of flow control holds.
    for round in 0..40 {
        let title: String = noise(round, 100_000).iter().map(|b| char::from(b % 90 + 33)).collect();
        assert_eq!(writer.create("home", &format!("n{round}"), &title).await.refused, vec![]);
    }
    an_honest_device_works(&bench, &relay).await;
    soon(relay.shutdown()).await.unwrap();
}

#[tokio::test]
async fn large_messages_of_one_user_wait_for_each_other_and_for_nobody_else() {
    let bench = Bench::new();
    let relay = bench.start().await;
    let mut honest = Device::connect(relay.url()).await;
    honest.sign_in("home", Some(bench.token("home", "ann"))).await.unwrap();
    let mut greedy = tokio::task::JoinSet::new();
    for _ in 0..6 {
        let mut device = Device::connect(relay.url()).await;
        device.sign_in("home", Some(bench.token("home", "mallory"))).await.unwrap();
        greedy.spawn(async move {
            // Two fill the room of their user; a kind that may be skipped.
            let mut large = vec![0; 5 << 20];
            large[0] = 200;
            for _ in 0..3 {
                device.sender.send(large.clone()).await.unwrap();
            }
            device.sign_in("home", None).await.unwrap();
        });
    }
    let large: String = noise(1, 300_000).iter().map(|b| char::from(b % 90 + 33)).collect();
    for round in 0..5 {
        assert_eq!(honest.create("home", &format!("small{round}"), "milk").await.refused, vec![]);
        assert_eq!(honest.create("home", &format!("large{round}"), &large).await.refused, vec![]);
    }
    while let Some(done) = soon(greedy.join_next()).await {
        done.unwrap();
    }
    soon(relay.shutdown()).await.unwrap();
}

#[tokio::test]
async fn a_device_that_connects_too_often_loses_its_oldest_connection() {
    let bench = Bench::new();
    let relay = bench.start().await;
    let key = DeviceKey::generate().unwrap();
    let mut connections = Vec::new();
    for _ in 0..9 {
        connections.push(Device::connect_as(relay.url(), key.clone()).await);
    }
    assert_eq!(connections[0].closed_with().await, FaultCode::Quota as u64);
    for device in &mut connections[1..] {
        device.sign_in("home", Some(bench.token("home", "ann"))).await.unwrap();
    }
    soon(relay.shutdown()).await.unwrap();
}

#[tokio::test]
async fn a_closed_connection_that_does_not_read_why_is_cut() {
    let bench = Bench::new();
    let relay = bench.start().await;
    let mut writer = Device::connect(relay.url()).await;
    writer.sign_in("home", Some(bench.token("home", "ann"))).await.unwrap();
    let key = DeviceKey::generate().unwrap();
    let mut deaf = Device::connect_as(relay.url(), key.clone()).await;
    deaf.sign_in("home", Some(bench.token("home", "deaf"))).await.unwrap();
    deaf.send(anabranch_core::wire::Open {
        channel: crate::device::CHANNEL,
        epoch: [0; 16],
        cursor: 0,
        digest: [0; 32],
        full: false,
    })
    .await;
    // More than a window, so that what it is told last can't reach it.
    for round in 0..30 {
        let title: String = noise(round, 100_000).iter().map(|b| char::from(b % 90 + 33)).collect();
        assert_eq!(writer.create("home", &format!("n{round}"), &title).await.refused, vec![]);
    }
    let mut later = Vec::new();
    for _ in 0..8 {
        later.push(Device::connect_as(relay.url(), key.clone()).await);
    }
    assert_eq!(deaf.closed_with().await, FaultCode::Quota as u64);
    soon(relay.shutdown()).await.unwrap();
}
