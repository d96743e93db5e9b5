//! Hubs and a relay in one thread, on stores that fail to order.

use anabranch_core::id::DeviceId;
use anabranch_core::intent::Intent;
use anabranch_core::relay::{Claims, ConnId, Input, Output as Told, Relay, RelayConfig, TokenVerifier};
use anabranch_core::replica::Expect;
use anabranch_core::schema::Schema;
use anabranch_core::wire::{FaultCode, GrantRole};
use anabranch_store::{FaultStore, MemoryStore};
use serde_json::json;

use super::*;
use crate::queue;

const SCHEMA: &str = "[task]\nversion = 1\n[task.fields]\ntitle = { type = \"string\" }\nn = { type = \"int\", merge = \"counter\" }\n";

type Disk = Arc<FaultStore<MemoryStore>>;

fn disk() -> Disk {
    Arc::new(FaultStore::new(MemoryStore::new()).unwrap())
}

struct AnyToken;

impl TokenVerifier for AnyToken {
    fn verify(&self, token: &str, now: WallMs) -> Result<Claims, (FaultCode, String)> {
        Ok(Claims {
            workspace: "home".into(),
            user: "ada".into(),
            role: GrantRole::from_name(token).unwrap(),
            token_id: token.into(),
            single_use: false,
            not_before: WallMs(0),
            expires: WallMs(now.0 + 3_600_000),
        })
    }
}

/// An engine's hub with its disk and its end of a link.
struct Device {
    hub: Hub,
    disk: Disk,
    inbox: Receiver<Command>,
    conn: ConnId,
    frames: Option<queue::Frames>,
}

struct Net {
    relay: Relay,
    disk: Disk,
    devices: Vec<Device>,
    conns: u64,
    permits: Arc<tokio::sync::Semaphore>,
}

fn home() -> WorkspaceId {
    WorkspaceId::new("home").unwrap()
}

impl Device {
    fn new(number: u8) -> Self {
        let schema = Schema::parse(SCHEMA, "schema.toml").unwrap();
        let template = ReplicaConfig {
            workspace: WorkspaceId::new("template").unwrap(),
            device: DeviceId([number; 32]),
            device_name: format!("device {number}"),
            platform: "test".into(),
            schema_source: schema.to_toml(),
            schema: Arc::new(schema),
            assumed_role: None,
            store_life: 0,
            seed: [number; 32],
        };
        let disk = disk();
        let (commands, inbox) = std::sync::mpsc::channel();
        let config = HubConfig { template, clock: Clock::new(0), scrub_every: None };
        let hub = Hub::new(config, disk.clone(), Arc::new(Wanted::default()), &commands);
        let mut device = Self { hub, disk, inbox, conn: ConnId(0), frames: None };
        device.ask(|reply| Command::Open { workspace: home(), reply }).unwrap();
        device
    }

    /// Asks something whose answer takes no relay.
    fn ask<T>(&mut self, command: impl FnOnce(Reply<T>) -> Command) -> Result<T, Error> {
        let (reply, mut answer) = oneshot::channel();
        self.hub.take(command(reply));
        self.settle();
        answer.try_recv().expect("it is answered")
    }

    fn settle(&mut self) {
        while let Ok(command) = self.inbox.try_recv() {
            self.hub.take(command);
        }
    }

    fn write(&mut self, id: &str) -> Result<Vec<String>, Error> {
        let intents = vec![
            Intent::Set { field: "title".into(), value: json!(id) },
            Intent::Increment { field: "n".into(), by: 1 },
        ];
        let key = EntityKey::new("task", id).unwrap();
        let edits = vec![Edit { key, intents, based_on: None, expect: Expect::Any }];
        self.ask(|reply| Command::Write { workspace: home(), edits, checked: true, reply })
    }

    fn status(&self) -> WorkspaceStatus {
        self.hub.slots[&home()].status.borrow().clone()
    }
}

impl Net {
    fn new() -> Self {
        let disk = disk();
        let relay = Relay::open(disk.clone(), Box::new(AnyToken), RelayConfig::default(), [7; 16]).unwrap();
        let devices = vec![Device::new(1), Device::new(2)];
        let permits = Arc::new(tokio::sync::Semaphore::new(1_000));
        let mut net = Self { relay, disk, devices, conns: 0, permits };
        net.connect(0);
        net.connect(1);
        net.run();
        net
    }

    fn connect(&mut self, device: usize) {
        self.conns += 1;
        let conn = ConnId(self.conns);
        let (outgoing, frames) = queue::frames();
        let token = if device == 0 { "authority" } else { "writer" };
        let Device { hub, conn: own, frames: queue, .. } = &mut self.devices[device];
        let gone = Input::Disconnected { conn: std::mem::replace(own, conn) };
        *queue = Some(frames);
        let key = hub.config.template.device;
        hub.take(Command::LinkUp { outgoing, token: Some(token.into()) });
        self.tell(gone);
        self.tell(Input::Connected { conn, device: key });
    }

    fn tell(&mut self, input: Input) {
        let now = self.devices[0].hub.config.clock.now();
        self.relay.handle(now, input).unwrap();
    }

    /// Moves one message either way. Returns whether there was one.
    fn step(&mut self) -> bool {
        for device in &mut self.devices {
            device.settle();
        }
        let frames = |device: &mut Device| Some((device.conn, device.frames.as_mut()?.try_next()?));
        let sent = self.devices.iter_mut().find_map(frames);
        if let Some((conn, bytes)) = sent {
            self.tell(Input::Received { conn, bytes });
            return true;
        }
        if let Ok(durable) = self.disk.durable() {
            self.tell(Input::Durable(durable));
        }
        let Some(told) = self.relay.poll_output() else { return false };
        if let Told::Send { conn, bytes } = told {
            self.tell(Input::Sent { conn });
            let permit = self.permits.clone().try_acquire_owned().unwrap();
            let device = self.devices.iter_mut().find(|device| device.conn == conn);
            if let Some(device) = device.filter(|device| device.hub.link.is_some()) {
                device.hub.take(Command::Frame { bytes, _permit: permit });
            }
        }
        true
    }

    fn run(&mut self) {
        while self.step() {}
    }

    /// Both devices and the relay hold the same, and nothing waits.
    fn agree(&mut self) {
        let digest = self.relay.digest(&home()).unwrap().unwrap().1.to_string();
        for device in &self.devices {
            let status = device.status();
            assert_eq!(status.state, SyncState::UpToDate, "{status:?}");
            assert_eq!((status.pending, &status.digest, &status.last_error), (0, &digest, &None));
        }
    }
}

#[test]
fn a_full_disk_at_any_moment_costs_the_link_and_nothing_else() {
    let mut cut = 0;
    for steps in 0.. {
        let mut net = Net::new();
        for n in 0..3 {
            net.devices[0].write(&format!("a{n}")).unwrap();
            net.devices[1].write(&format!("b{n}")).unwrap();
        }
        let done = (0..steps).any(|_| !net.step());
        net.devices[0].disk.fill();
        net.run();
        if net.devices[0].hub.link.is_none() {
            cut += 1;
            let status = net.devices[0].status();
            assert_eq!(status.error_category, Some(Category::Quota), "{status:?}");
            assert!(status.last_error.unwrap().contains("bytes are free"));
            // And again, as the link task does.
            net.connect(0);
            net.run();
            assert!(net.devices[0].hub.link.is_none());
        }
        assert_eq!(net.devices[0].write("c").unwrap_err().code(), "no_space");
        net.devices[0].disk.make_room();
        net.devices[0].write("c").unwrap();
        net.connect(0);
        net.run();
        net.agree();
        if done {
            assert!(cut > 10, "{cut} of {steps}");
            return;
        }
    }
}

#[test]
fn a_full_disk_of_the_relay_is_told_and_overcome() {
    let mut net = Net::new();
    net.disk.fill();
    net.devices[1].write("a").unwrap();
    net.run();
    let status = net.devices[1].status();
    assert_eq!(status.state, SyncState::Faulted);
    assert_eq!(status.error_category, Some(Category::Server));
    assert!(status.last_error.unwrap().contains("disk is full"));
    let mut waited_ms = 0;
    for attempt in 0..12 {
        if attempt == 11 {
            net.disk.make_room();
        }
        let hub = &mut net.devices[1].hub;
        let mut now = hub.config.clock.now();
        let replica = &mut hub.slots.get_mut(&home()).unwrap().replica;
        let at = replica.next_wakeup().unwrap();
        waited_ms = at.0 - now.mono.0;
        now.mono = at;
        now.wall.0 += waited_ms;
        replica.tick(now);
        assert_eq!(replica.next_wakeup(), None);
        hub.drain();
        net.run();
    }
    assert!(waited_ms > 60_000, "{waited_ms}");
    net.agree();
}

#[test]
fn a_store_that_failed_answers_every_call_with_why() {
    let mut net = Net::new();
    let device = &mut net.devices[1];
    let (reply, mut waiting) = oneshot::channel();
    device.hub.take(Command::Schema { workspace: home(), push: false, reply });
    let (reply, mut syncing) = oneshot::channel();
    device.hub.take(Command::Sync { workspace: home(), id: 1, reply });
    device.disk.poison("the disk is gone");
    device.settle();
    let why = |error: Error| assert!(error.to_string().contains("the disk is gone"), "{error}");
    why(waiting.try_recv().unwrap().unwrap_err());
    why(syncing.try_recv().unwrap().unwrap_err());
    why(device.write("a").unwrap_err());
    why(device.ask(|reply| Command::Dismiss { workspace: home(), number: 1, reply }).unwrap_err());
    why(device.ask(|reply| Command::Sync { workspace: home(), id: 2, reply }).unwrap_err());
    why(device.ask(|reply| Command::Schema { workspace: home(), push: true, reply }).unwrap_err());
    let workspace = || WorkspaceId::new("other").unwrap();
    why(device.ask(|reply| Command::Open { workspace: workspace(), reply }).err().unwrap());
    assert!(device.hub.link.is_none());
    let status = device.status();
    assert_eq!((status.state, status.error_category), (SyncState::Offline, Some(Category::Storage)));
    assert!(status.last_error.unwrap().contains("the disk is gone"));
}

#[test]
fn what_is_missing_from_a_store_is_found_by_looking_and_fetched_again() {
    use anabranch_core::store::{Batch, Keyspace, View};
    for keyspace in [Keyspace::ENTITY, Keyspace::DOC, Keyspace::HEADER, Keyspace::ROW] {
        let mut net = Net::new();
        for id in ["a", "b", "c"] {
            net.devices[0].write(id).unwrap();
        }
        net.run();
        net.agree();
        let device = &mut net.devices[1];
        let (lost, _) = device.disk.scan(View::Latest, keyspace, &[], &[], 1).unwrap().remove(0);
        let mut batch = Batch::new();
        batch.delete(keyspace, lost);
        device.disk.commit(batch).unwrap();
        let verify = |device: &mut Device, mend| {
            let mut faults = Vec::new();
            for step in 0.. {
                let from_start = step == 0;
                let ask = |reply| Command::Verify { workspace: home(), from_start, mend, reply };
                let verified = device.ask(ask).unwrap();
                faults.extend(verified.faults);
                if verified.done {
                    break;
                }
            }
            faults
        };
        let faults = verify(device, true);
        assert!(!faults.is_empty() && faults.iter().all(|fault| fault.mended), "{keyspace:?}: {faults:?}");
        assert_eq!(device.status().damage, faults.len() as u64);
        net.connect(1);
        net.run();
        net.agree();
        assert_eq!(verify(&mut net.devices[1], false), [], "{keyspace:?}");
        let device = &net.devices[1];
        assert_eq!(device.disk.scan(View::Latest, Keyspace::ROW, &[], &[], 9).unwrap().len(), 3);
    }
}

#[test]
fn the_slow_look_finds_by_itself_what_is_wrong() {
    use anabranch_core::store::{Batch, Keyspace, View};
    let mut net = Net::new();
    let device = &mut net.devices[0];
    device.write("a").unwrap();
    device.hub.scrubbing = scrub::Schedule::new(Some(Duration::from_secs(1)), MonoMs(0));
    let (lost, _) = device.disk.scan(View::Latest, Keyspace::ROW, &[], &[], 1).unwrap().remove(0);
    let mut batch = Batch::new();
    batch.delete(Keyspace::ROW, lost);
    device.disk.commit(batch).unwrap();
    for _ in 0..8 {
        // As time does.
        device.hub.config.clock.start -= Duration::from_secs(61);
        assert!(device.hub.sleep() < Duration::from_secs(1));
        device.hub.scrub();
    }
    device.settle();
    assert_eq!(device.status().damage, 1);
    assert_eq!(device.disk.scan(View::Latest, Keyspace::ROW, &[], &[], 9).unwrap().len(), 1);
}

/// What is damaged ends each link that meets it, so it is not left until the slow look gets there.
#[test]
fn a_damaged_document_is_mended_as_soon_as_it_is_met() {
    use anabranch_core::store::{Batch, Keyspace, View};
    let mut net = Net::new();
    for id in ["a", "b"] {
        net.devices[0].write(id).unwrap();
    }
    net.run();
    net.agree();
    let device = &mut net.devices[1];
    device.hub.scrubbing = scrub::Schedule::new(Some(Duration::from_secs(86_400)), MonoMs(0));
    let mut batch = Batch::new();
    for (place, _) in device.disk.scan(View::Latest, Keyspace::DOC, &[], &[], 9).unwrap() {
        batch.put(Keyspace::DOC, place, vec![1, 255]);
    }
    device.disk.commit(batch).unwrap();
    // What is in memory goes, as at a start.
    device.hub.stale = true;
    assert!(device.hub.sleep() > Duration::from_secs(1));
    net.devices[0].write("a").unwrap();
    net.run();
    let device = &mut net.devices[1];
    assert!(device.hub.link.is_none());
    for _ in 0..8 {
        if device.hub.sleep() < Duration::from_secs(1) {
            device.hub.scrub();
        }
    }
    device.settle();
    assert_eq!(device.status().damage, 2);
    assert!(device.hub.sleep() > Duration::from_secs(1), "it rests");
    net.connect(1);
    net.run();
    net.agree();
}

/// A relay that takes nothing can't make the device hold more and more for it.
#[test]
fn a_link_that_takes_nothing_is_let_go_and_loses_nothing() {
    let mut net = Net::new();
    assert!(net.devices[1].hub.link.is_some());
    // Nothing is taken from now on, and the app goes on and on giving tokens.
    for _ in 0..=FRAMES_PER_WORKSPACE_MAX {
        net.devices[1].hub.take(Command::Token { token: "writer".into() });
    }
    net.devices[1].write("while_it_takes_nothing").unwrap();
    assert!(net.devices[1].hub.link.is_none());
    assert!(net.devices[1].status().last_error.is_some_and(|why| why.contains("takes nothing more")));
    net.connect(1);
    net.run();
    assert_eq!(net.devices[1].status().pending, 0);
    net.agree();
}
