//! A real replica over a store in memory, whose messages are carried by hand.

#![allow(unreachable_pub, missing_docs)]

use std::sync::Arc;

use anabranch_core::id::DeviceId;
use anabranch_core::intent::Intent;
use anabranch_core::relay::{ConnId, Input};
use anabranch_core::replica::{self, Edit, Expect, Replica, ReplicaConfig, WriteError};
use anabranch_core::rows::{RowRecord, Rows};
use anabranch_core::schema::Schema;
use anabranch_core::store::Store;
use anabranch_core::wire::{GrantRole, Message};
use serde_json::Value as Json;

use crate::support::*;

/// A device as an engine drives it.
pub struct Phone {
    pub store: Arc<MemoryStore>,
    pub replica: Replica,
    pub schema: Arc<Schema>,
    pub device: Device,
    pub conn: ConnId,
}

impl Phone {
    pub fn new(number: u8, source: &str) -> Self {
        let store = Arc::new(MemoryStore::default());
        let schema = Arc::new(Schema::parse(source, "test.toml").unwrap());
        let device = Device::new(number);
        let replica = Self::open(&store, &schema, source, device.id());
        Self { store, replica, schema, device, conn: ConnId(0) }
    }

    /// What the store holds, opened as at a start.
    pub fn open(store: &Arc<MemoryStore>, schema: &Arc<Schema>, source: &str, device: DeviceId) -> Replica {
        let config = ReplicaConfig {
            workspace: home(),
            device,
            device_name: "phone".into(),
            platform: "test".into(),
            schema: schema.clone(),
            schema_source: source.to_owned(),
            assumed_role: Some(GrantRole::Writer),
            store_life: 0,
            seed: device.0,
        };
        Replica::open(store.clone(), config).unwrap()
    }

    pub fn join(&mut self, world: &mut World, role: &str) {
        self.conn = world.greet(&self.device);
        self.replica.disconnect();
        self.replica.connect(1, Some(token(role)));
        self.talk(world);
    }

    /// Says all that there is to say and hears all of it.
    pub fn talk(&mut self, world: &mut World) {
        loop {
            self.replica.durable(self.store.flush()).unwrap();
            while let Some(output) = self.replica.poll_output() {
                if let replica::Output::Send(bytes) = output {
                    world.handle(Input::Received { conn: self.conn, bytes });
                }
            }
            let told = world.settle(self.conn);
            if told.is_empty() && self.store.durable().unwrap() == self.replica.last_commit() {
                return;
            }
            for message in told.into_iter().filter(|message| !matches!(message, Message::Welcome(_))) {
                assert!(!matches!(message, Message::Fault(_)), "{message:?}");
                self.replica.receive(world.now, message).unwrap();
            }
        }
    }

    pub fn hear(&mut self, world: &World, message: impl Into<Message>) {
        self.replica.receive(world.now, message.into()).unwrap();
        self.replica.durable(self.store.flush()).unwrap();
    }

    pub fn write(&mut self, world: &World, edits: &[Edit]) -> Result<replica::Written, WriteError> {
        self.replica.write(world.now, edits, true)
    }

    pub fn rows(&self) -> Rows {
        Rows::new(self.store.clone(), self.schema.clone(), &home())
    }

    pub fn row(&self, id: &str) -> Option<RowRecord> {
        self.rows().get(&key("note", id)).unwrap()
    }
}

pub fn edit(id: &str, intents: Vec<Intent>) -> Edit {
    Edit { key: key("note", id), intents, based_on: None, expect: Expect::Any }
}

pub fn set(field: &str, value: Json) -> Intent {
    Intent::Set { field: field.into(), value }
}
