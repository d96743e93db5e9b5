//! Starting, serving, stopping, starting again.

use std::process::Command;

use anabranch_core::store::StoreError;
use anabranch_core::wire::{FaultCode, FeedBody, Message};
use anabranch_relay::{RelayDaemon, RelayDir, RelayError, RelayOptions};
use anabranch_transport::DeviceKey;
use tokio::sync::oneshot;

use crate::device::Device;
use crate::{Bench, soon};

#[tokio::test]
async fn a_device_signs_in_writes_and_another_reads_it() {
    let bench = Bench::new();
    let relay = bench.start().await;
    assert_eq!(RelayDir::new(bench.dir()).address().unwrap().as_ref(), Some(relay.url()));

    let mut ann = Device::connect(relay.url()).await;
    let granted = ann.sign_in("home", Some(bench.token("home", "ann"))).await.unwrap();
    assert_eq!(granted.grant.user, "ann");
    let (feed, _) = ann.read_feed().await;
    assert!(matches!(&feed[..], [entry] if matches!(entry.body, FeedBody::Device { .. })), "{feed:?}");
    let ack = ann.create("home", "n1", "milk").await;
    assert_eq!(ack.refused, vec![]);

    let mut ben = Device::connect(relay.url()).await;
    ben.sign_in("home", Some(bench.token("home", "ben"))).await.unwrap();
    let (feed, _) = ben.read_feed().await;
    let changes = feed.iter().find_map(|entry| match &entry.body {
        FeedBody::Changes { author, unit } => Some((author, unit)),
        _ => None,
    });
    let (author, unit) = changes.unwrap();
    assert_eq!(author, ann.key.public().as_bytes());
    assert_eq!(unit.entities[0].id, "n1");
    soon(relay.shutdown()).await.unwrap();
}

#[tokio::test]
async fn what_was_acknowledged_is_there_after_a_restart() {
    let bench = Bench::new();
    let relay = bench.start().await;
    let key = DeviceKey::generate().unwrap();
    let mut ann = Device::connect_as(relay.url(), key.clone()).await;
    let before = ann.sign_in("home", Some(bench.token("home", "ann"))).await.unwrap();
    let ack = ann.create("home", "n1", "milk").await;
    soon(relay.shutdown()).await.unwrap();

    let again = bench.start().await;
    assert_eq!(again.url().key(), relay.url().key(), "the relay keeps its key");
    let mut ann = Device::connect_as(again.url(), key).await;
    let after = ann.sign_in("home", None).await.unwrap();
    assert_eq!(after.epoch, before.epoch);
    let (feed, caught_up) = ann.read_feed().await;
    assert!(caught_up.cursor >= ack.seq);
    assert!(
        feed.iter().any(|entry| matches!(entry.body, FeedBody::Own(_) | FeedBody::Changes { .. })),
        "{feed:?}"
    );
    soon(again.shutdown()).await.unwrap();
}

#[tokio::test]
async fn a_stopping_relay_tells_its_devices_and_they_are_gone_before_it_is() {
    let bench = Bench::new();
    let relay = bench.start().await;
    let mut device = Device::connect(relay.url()).await;
    device.sign_in("home", Some(bench.token("home", "ann"))).await.unwrap();
    let mut stranger = Device::connect(relay.url()).await;
    let begun = std::time::Instant::now();
    soon(relay.shutdown()).await.unwrap();
    assert!(begun.elapsed().as_secs() < 5, "nobody had to be waited for");

    let code = match device.try_next().await {
        Ok(Message::Fault(fault)) => u64::from(fault.code),
        Ok(other) => panic!("instead of a fault: {other:?}"),
        Err(_) => device.closed_with().await,
    };
    assert_eq!(code, FaultCode::ShuttingDown as u64);
    assert_eq!(stranger.closed_with().await, FaultCode::ShuttingDown as u64);
    soon(relay.shutdown()).await.unwrap();
}

#[tokio::test]
async fn a_second_relay_in_a_directory_is_refused_plainly() {
    let bench = Bench::new();
    let first = bench.start().await;
    let error = soon(RelayDaemon::start(bench.options())).await.unwrap_err();
    assert!(matches!(&error, RelayError::Store(StoreError::InUse { .. })), "{error}");
    assert!(error.to_string().contains("in use by process"), "{error}");
    assert!(error.can_retry());

    let mut device = Device::connect(first.url()).await;
    device.sign_in("home", Some(bench.token("home", "ann"))).await.unwrap();
    soon(first.shutdown()).await.unwrap();
    soon(bench.start().await.shutdown()).await.unwrap();
}

#[tokio::test]
async fn an_address_that_is_taken_is_named() {
    let bench = Bench::new();
    let taken = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let error = RelayDaemon::start(bench.options().listen(address.clone())).await.unwrap_err();
    assert!(error.to_string().contains(&address), "{error}");
    // The directory is free again.
    soon(bench.start().await.shutdown()).await.unwrap();
}

#[tokio::test]
async fn sigterm_stops_a_relay_in_order() {
    let bench = Bench::new();
    let (started, url) = oneshot::channel();
    let running = tokio::spawn(RelayDaemon::run_until_signal(bench.options(), move |relay| {
        started.send(relay.url().clone()).unwrap();
    }));
    let mut device = Device::connect(&soon(url).await.unwrap()).await;
    device.sign_in("home", Some(bench.token("home", "ann"))).await.unwrap();
    let killed = Command::new("kill").args(["-TERM", &std::process::id().to_string()]).status().unwrap();
    assert!(killed.success());
    soon(running).await.unwrap().unwrap();
    soon(bench.start().await.shutdown()).await.unwrap();
}

fn copy(from: &std::path::Path, to: &std::path::Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().map(Result::unwrap) {
        match entry.file_type().unwrap().is_dir() {
            true => copy(&entry.path(), &to.join(entry.file_name())),
            false => drop(std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap()),
        }
    }
}

/// The epoch that a relay tells, which writes something meanwhile.
async fn epoch(bench: &Bench, options: RelayOptions) -> [u8; 16] {
    let relay = RelayDaemon::start(options).await.unwrap();
    let mut ann = Device::connect(relay.url()).await;
    let granted = ann.sign_in("home", Some(bench.token("home", "ann"))).await.unwrap();
    assert_eq!(ann.create("home", "n1", "milk").await.refused, vec![]);
    soon(relay.shutdown()).await.unwrap();
    granted.epoch
}

#[tokio::test]
async fn a_store_that_went_back_begins_a_new_epoch_once() {
    let bench = Bench::new();
    let first = epoch(&bench, bench.options()).await;
    let (store, backup) = (bench.dir().join("store"), bench.dir().join("backup"));
    copy(&store, &backup);
    assert_eq!(epoch(&bench, bench.options()).await, first);
    // All but what tells how far the store had come.
    std::fs::copy(store.join("COMMITS"), backup.join("COMMITS")).unwrap();
    std::fs::remove_dir_all(&store).unwrap();
    std::fs::rename(&backup, &store).unwrap();
    let second = epoch(&bench, bench.options()).await;
    assert_ne!(second, first);
    assert_eq!(epoch(&bench, bench.options()).await, second, "it was dealt with");

    let mut asked = bench.options();
    asked.new_epoch = true;
    let third = epoch(&bench, asked).await;
    assert!(![first, second].contains(&third));
    assert_eq!(epoch(&bench, bench.options()).await, third);
}
