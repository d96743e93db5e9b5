//! Who gets in, and how those who don't are told.

use std::time::Duration;

use anabranch_core::clock::WallMs;
use anabranch_core::wire::FaultCode;
use anabranch_relay::{Invite, MintOptions, RelayDaemon, mint_invite, mint_token};
use anabranch_transport::DeviceKey;

use crate::device::{Device, wall_ms};
use crate::{Bench, soon};

#[tokio::test]
async fn each_kind_of_bad_token_has_its_own_answer() {
    let (bench, elsewhere) = (Bench::new(), Bench::new());
    let relay = bench.start().await;
    let long_ago =
        MintOptions::new("home", "ann").now(WallMs(wall_ms() - 10_000)).ttl(Duration::from_secs(5));
    let expired = mint_token(&bench.dir(), &long_ago).unwrap().token;
    for (token, expected) in [
        ("no token".to_owned(), FaultCode::TokenInvalid),
        (elsewhere.token("home", "ann"), FaultCode::TokenInvalid),
        (expired, FaultCode::TokenExpired),
        (bench.token("work", "ann"), FaultCode::WrongWorkspace),
    ] {
        let mut device = Device::connect(relay.url()).await;
        assert_eq!(device.refusal("home", &token).await, Some(expected));
    }
    let mut device = Device::connect(relay.url()).await;
    let refused = device.sign_in("home", None).await.unwrap_err();
    assert_eq!(FaultCode::from_u16(refused.code), Some(FaultCode::NotSignedIn));
    soon(relay.shutdown()).await.unwrap();
}

#[tokio::test]
async fn an_invite_lets_in_the_first_device_only() {
    let bench = Bench::new();
    let relay = bench.start().await;
    let line = mint_invite(&bench.dir(), &MintOptions::invite("home", "ben"), None).unwrap().to_string();
    let invite = Invite::parse(&line).unwrap();
    assert_eq!(&invite.relay, relay.url());

    let key = DeviceKey::generate().unwrap();
    let mut first = Device::connect_as(&invite.relay, key.clone()).await;
    first.sign_in(&invite.workspace, Some(invite.token.clone())).await.unwrap();
    let mut second = Device::connect(&invite.relay).await;
    assert_eq!(second.refusal("home", &invite.token).await, Some(FaultCode::TokenUsed));
    // An answer can get lost: the same device may ask again.
    let mut first = Device::connect_as(&invite.relay, key).await;
    first.sign_in("home", Some(invite.token)).await.unwrap();
    soon(relay.shutdown()).await.unwrap();
}

#[tokio::test]
async fn a_key_made_beside_the_running_relay_is_trusted_at_once() {
    let bench = Bench::new();
    let relay = bench.start().await;
    assert!(!bench.dir().join("issuers/dev.key").exists());
    let mut device = Device::connect(relay.url()).await;
    device.sign_in("home", Some(bench.token("home", "ann"))).await.unwrap();
    soon(relay.shutdown()).await.unwrap();
}

#[tokio::test]
async fn a_shifted_clock_shifts_what_is_expired() {
    let bench = Bench::new();
    let mut options = bench.options();
    options.clock_offset_ms = 2 * 3600 * 1000;
    let relay = soon(RelayDaemon::start(options)).await.unwrap();
    let hour = MintOptions::new("home", "ann").ttl(Duration::from_secs(3600));
    let token = mint_token(&bench.dir(), &hour).unwrap().token;
    let mut device = Device::connect(relay.url()).await;
    assert_eq!(device.refusal("home", &token).await, Some(FaultCode::TokenExpired));
    soon(relay.shutdown()).await.unwrap();
}
