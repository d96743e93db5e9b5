//! What is missing or wrong in a store is found by looking at everything, and mended.

use std::sync::Arc;

use anabranch_core::id::{DeviceId, EntityKey, WorkspaceId};
use anabranch_core::intent::Intent;
use anabranch_core::replica::{Edit, Expect, Fault, Replica, ReplicaConfig};
use anabranch_core::rows::Rows;
use anabranch_core::schema::Schema;
use anabranch_core::store::{Batch, Keyspace, Store, View};
use anabranch_store::MemoryStore;
use serde_json::json;

use crate::faults::{START, set};

const NOTES: &str = r#"
[note]
version = 1
index = ["title"]
[note.fields]
title = { type = "string" }
body  = { type = "text" }
"#;

struct Device {
    store: Arc<MemoryStore>,
    config: ReplicaConfig,
    replica: Replica,
}

impl Device {
    fn with_notes(notes: usize) -> Self {
        let schema = Arc::new(Schema::parse(NOTES, "schema.toml").unwrap());
        let config = ReplicaConfig {
            workspace: WorkspaceId::new("home").unwrap(),
            device: DeviceId([1; 32]),
            device_name: "phone".into(),
            platform: "test".into(),
            schema,
            schema_source: NOTES.into(),
            assumed_role: None,
            store_life: 0,
            seed: [0; 32],
        };
        let store = Arc::new(MemoryStore::new());
        let replica = Replica::open(store.clone(), config.clone()).unwrap();
        let mut device = Self { store, config, replica };
        for n in 0..notes {
            device.write(n, vec![set("title", json!(format!("note {n}"))), set("body", json!("words"))]);
        }
        device
    }

    fn write(&mut self, n: usize, intents: Vec<Intent>) {
        let edit = Edit { key: key(n), intents, based_on: None, expect: Expect::Any };
        self.replica.write(START, &[edit], true).unwrap();
    }

    /// Takes the first entry of a keyspace out of the store, behind the replica's back.
    fn lose(&mut self, keyspace: Keyspace) {
        let (place, _) = self.store.scan(View::Latest, keyspace, &[], &[], 1).unwrap().remove(0);
        let mut batch = Batch::new();
        batch.delete(keyspace, place);
        self.store.commit(batch).unwrap();
        self.replica = Replica::open(self.store.clone(), self.config.clone()).unwrap();
    }

    /// Looks at everything in small steps, with `between` in between.
    fn verify_with(&mut self, mend: bool, mut between: impl FnMut(&mut Self)) -> Vec<Fault> {
        let mut faults = Vec::new();
        loop {
            let step = self.replica.verify(START, 2, mend).unwrap();
            faults.extend(step.faults);
            if step.done {
                return faults;
            }
            between(self);
        }
    }

    fn verify(&mut self, mend: bool) -> Vec<Fault> {
        self.verify_with(mend, |_| ())
    }

    fn rows(&self) -> Rows {
        Rows::new(self.store.clone(), self.config.schema.clone(), &self.config.workspace)
    }
}

fn key(n: usize) -> EntityKey {
    EntityKey::new("note", format!("n{n}")).unwrap()
}

#[test]
fn a_healthy_store_has_no_faults_while_it_is_written_to_either() {
    let mut device = Device::with_notes(7);
    assert_eq!(device.verify(false), []);
    let mut n = 0;
    let faults = device.verify_with(true, |device| {
        n += 1;
        device.write(n % 9, vec![set("title", json!(format!("again {n}")))]);
        if n == 3 {
            device.write(2, vec![Intent::Delete]);
        }
    });
    assert_eq!(faults, []);
    assert!(n > 5);
}

#[test]
fn a_lost_row_and_a_lost_index_entry_are_written_again() {
    for keyspace in [Keyspace::ROW, Keyspace::INDEX] {
        let mut device = Device::with_notes(5);
        device.lose(keyspace);
        let found = device.verify(false);
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(!found[0].mended);
        assert!(device.verify(true).iter().all(|fault| fault.mended));
        assert_eq!(device.verify(false), []);
        for n in 0..5 {
            assert!(device.rows().get(&key(n)).unwrap().is_some(), "note {n} after losing {keyspace:?}");
        }
    }
}

#[test]
fn what_is_shown_without_a_document_goes() {
    let mut device = Device::with_notes(5);
    device.lose(Keyspace::ENTITY);
    let found = device.verify(true);
    // Its row and its index entry; nothing of it was admitted, so the digest is as it was.
    assert_eq!(found.len(), 2, "{found:?}");
    assert_eq!(device.verify(false), []);
}

#[test]
fn what_was_pending_of_a_damaged_document_is_kept_for_its_user() {
    for keyspace in [Keyspace::DOC, Keyspace::HEADER] {
        let mut device = Device::with_notes(3);
        device.lose(keyspace);
        let found = device.verify(true);
        assert_eq!(found.len(), 1, "{found:?}");
        let lost = found[0].entity.clone().unwrap();
        assert!(device.rows().get(&lost).unwrap().is_none());
        let refused = device.rows().refused().unwrap();
        assert_eq!(refused.len(), 1);
        assert_eq!(refused[0].1.code, "damaged");
        assert_eq!(refused[0].1.intents[0], set("title", json!(format!("note {}", &lost.id()[1..]))));
        assert_eq!(device.replica.status().pending, 2);
        assert_eq!(device.verify(false), []);
    }
}

/// The rest of the transaction would have been sent alone, and refused.
#[test]
fn what_was_to_be_sent_with_a_damaged_document_is_kept_for_its_user_too() {
    let mut device = Device::with_notes(2);
    let edits = [0, 1].map(|n| {
        let intents = vec![set("title", json!(format!("together {n}")))];
        Edit { key: key(n), intents, based_on: None, expect: Expect::Any }
    });
    device.replica.write(START, &edits, true).unwrap();
    device.lose(Keyspace::DOC);
    let found = device.verify(true);
    assert_eq!(found.len(), 1, "{found:?}");
    let (lost, kept) = if found[0].entity == Some(key(0)) { (0, 1) } else { (1, 0) };
    let refused = device.rows().refused().unwrap();
    let mut refused: Vec<(&str, &str)> =
        refused.iter().map(|(_, record)| (record.code.as_str(), record.id.as_str())).collect();
    refused.sort_unstable();
    let (lost, kept_id) = (format!("n{lost}"), format!("n{kept}"));
    assert_eq!(refused, [("damaged", &*lost), ("damaged", &*lost), ("transaction", &*kept_id)]);
    // Without what they had in common, it is what it was before.
    let row = device.rows().get(&key(kept)).unwrap().unwrap();
    assert_eq!(row.fields["title"], json!(format!("note {kept}")));
    assert_eq!(device.replica.status().pending, 1);
    assert_eq!(device.verify(false), []);
}
