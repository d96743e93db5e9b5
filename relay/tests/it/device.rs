//! A device that speaks the protocol and does nothing of its own accord.

use std::time::Duration;

use anabranch_core::change::Note;
use anabranch_core::clock::{Hlc, WallMs};
use anabranch_core::id::{Author, DeviceId, EntityKey, Incarnation, WorkspaceId};
use anabranch_core::wire::{
    Ack, CaughtUp, Changes, EntityChanges, Fault, FaultCode, FeedEntry, Granted, Hello, Message, Open,
    SignIn, Unit, VERSION_MAX, VERSION_MIN,
};
use anabranch_transport::{
    Connection, DeviceKey, FrameReceiver, FrameSender, RelayUrl, TransportError, connect,
};
use automerge::transaction::{CommitOptions, Transactable};
use automerge::{AutoCommit, ROOT};

use crate::soon;

pub(crate) const CHANNEL: u32 = 1;

pub(crate) struct Device {
    pub(crate) key: DeviceKey,
    pub(crate) connection: Connection,
    pub(crate) sender: FrameSender,
    pub(crate) receiver: FrameReceiver,
}

impl Device {
    /// Connects as a new device and says hello.
    pub(crate) async fn connect(url: &RelayUrl) -> Self {
        Self::connect_as(url, DeviceKey::generate().unwrap()).await
    }

    pub(crate) async fn connect_as(url: &RelayUrl, key: DeviceKey) -> Self {
        let mut device = Self::connect_silently(url, key).await;
        let hello = Hello {
            version_min: VERSION_MIN,
            version_max: VERSION_MAX,
            software: "test".into(),
            wall_ms: wall_ms(),
            features_required: 0,
            features: 0,
            proof: Vec::new(),
        };
        device.send(hello).await;
        match device.next().await {
            Message::Welcome(welcome) => assert_eq!(welcome.version, VERSION_MAX),
            other => panic!("instead of a welcome: {other:?}"),
        }
        device
    }

    /// Connects and says nothing.
    pub(crate) async fn connect_silently(url: &RelayUrl, key: DeviceKey) -> Self {
        let connection = soon(connect(url, &key, Duration::from_secs(10))).await.unwrap();
        let (sender, receiver) = soon(connection.open_control()).await.unwrap();
        Self { key, connection, sender, receiver }
    }

    pub(crate) async fn send(&mut self, message: impl Into<Message>) {
        soon(self.sender.send(message.into().encode())).await.unwrap();
    }

    pub(crate) async fn next(&mut self) -> Message {
        self.try_next().await.unwrap()
    }

    pub(crate) async fn try_next(&mut self) -> Result<Message, TransportError> {
        loop {
            let bytes = soon(self.receiver.next()).await?.ok_or(TransportError::Closed)?;
            if let Some(message) = Message::decode(&bytes).unwrap() {
                return Ok(message);
            }
        }
    }

    pub(crate) async fn sign_in(&mut self, workspace: &str, token: Option<String>) -> Result<Granted, Fault> {
        self.send(SignIn {
            channel: CHANNEL,
            workspace: workspace.into(),
            token,
            device_name: "test device".into(),
            platform: "test".into(),
            incarnation: 0,
            sent: 0,
        })
        .await;
        match self.next().await {
            Message::Granted(granted) => Ok(granted),
            Message::Fault(fault) => Err(fault),
            other => panic!("instead of an answer to the sign-in: {other:?}"),
        }
    }

    /// The code by which a sign-in was refused.
    pub(crate) async fn refusal(&mut self, workspace: &str, token: &str) -> Option<FaultCode> {
        let refused = self.sign_in(workspace, Some(token.into())).await.err()?;
        FaultCode::from_u16(refused.code)
    }

    /// Reads the feed from its beginning to its end.
    pub(crate) async fn read_feed(&mut self) -> (Vec<FeedEntry>, CaughtUp) {
        self.send(Open { channel: CHANNEL, epoch: [0; 16], cursor: 0, digest: [0; 32], full: false }).await;
        let mut entries = Vec::new();
        loop {
            match self.next().await {
                Message::Feed(feed) => entries.extend(feed.entries),
                Message::CaughtUp(caught_up) => return (entries, caught_up),
                other => panic!("instead of the feed: {other:?}"),
            }
        }
    }

    /// Sends a new entity and waits until the relay has stored it.
    pub(crate) async fn create(&mut self, workspace: &str, id: &str, title: &str) -> Ack {
        let entities = vec![entity(&self.key, workspace, id, title)];
        self.send(Changes { channel: CHANNEL, unit_id: 7, sent: 1, unit: Unit { entities } }).await;
        loop {
            match self.next().await {
                Message::Ack(ack) => return ack,
                Message::Feed(_) | Message::CaughtUp(_) => {}
                other => panic!("instead of an ack: {other:?}"),
            }
        }
    }

    /// A unit of new entities of a device.
    pub(crate) fn unit(key: &DeviceKey, workspace: &str, numbers: std::ops::Range<u64>) -> Changes {
        let by = key.public();
        let entities =
            numbers.map(|number| entity(key, workspace, &format!("{by}-{number}"), "milk")).collect();
        Changes { channel: CHANNEL, unit_id: 7, sent: 1, unit: Unit { entities } }
    }

    /// Waits until the relay closes the connection, and says with which code.
    pub(crate) async fn closed_with(&mut self) -> u64 {
        match soon(self.connection.closed()).await {
            TransportError::Refused { code, .. } => code,
            other => panic!("instead of a close by the relay: {other}"),
        }
    }
}

/// A new entity.
fn entity(key: &DeviceKey, workspace: &str, id: &str, title: &str) -> EntityChanges {
    let author = Author { device: DeviceId(*key.public().as_bytes()), incarnation: Incarnation::default() };
    let workspace = WorkspaceId::new(workspace).unwrap();
    let actor = author.actor(&workspace, &EntityKey::new("note", id).unwrap());
    // Setting an author draws a random actor, so the actor comes after it.
    let mut document = AutoCommit::new().with_author(Some(author.to_bytes().into())).with_actor(actor);
    document.put(ROOT, "title", title).unwrap();
    let time = Hlc::from_wall(WallMs(wall_ms())).to_change_time();
    document.commit_with(CommitOptions::default().with_message(Note::default().to_message()).with_time(time));
    EntityChanges {
        type_name: "note".into(),
        id: id.into(),
        genesis: Vec::new(),
        changes: vec![document.get_last_local_change().unwrap().raw_bytes().to_vec()],
        signature: Vec::new(),
    }
}

pub(crate) fn wall_ms() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis() as u64
}
