//! A device: a real replica on a simulated disk, with clocks of its own.

use std::collections::BTreeMap;
use std::sync::Arc;

use anabranch_core::clock::{MonoMs, Now, WallMs};
use anabranch_core::entity::{Conflict, ConflictKind, Row};
use anabranch_core::id::{DeviceId, EntityKey, WorkspaceId};
use anabranch_core::relay::ConnId;
use anabranch_core::replica::{Replica, ReplicaConfig, parse_version};
use anabranch_core::rows::{RowRecord, Rows};
use anabranch_core::schema::{EntityType, Schema};
use anabranch_core::store::{CommitNo, StoreError};
use anabranch_core::wire::GrantRole;
use automerge::ChangeHash;

use crate::disk::Disk;
use crate::draft::screen_of;
use crate::model::Screen;

/// The true wall clock when a run begins.
pub(crate) const START_MS: u64 = 1_750_000_000_000;

/// What a user looks at.
#[derive(Clone, Debug)]
pub(crate) struct View {
    pub(crate) base: Vec<ChangeHash>,
    pub(crate) row: Row,
    pub(crate) screen: Screen,
    pub(crate) exists: bool,
}

pub(crate) struct Device {
    pub(crate) config: ReplicaConfig,
    pub(crate) role: GrantRole,
    pub(crate) disk: Arc<Disk>,
    /// None while it is off.
    pub(crate) replica: Option<Replica>,
    pub(crate) link: Option<ConnId>,
    pub(crate) dials: u64,
    pub(crate) starts: u64,
    /// Clocks: how far off, how fast off, how often set.
    pub(crate) offset_ms: i64,
    drift_ppm: i64,
    /// What the drift had come to when its rate changed last, and when that was.
    drifted: (i64, u64),
    /// What it had drifted either way by then.
    wandered_ms: u64,
    pub(crate) jumps: u32,
    /// Until when nothing passes, to the relay and from it.
    pub(crate) blocked_ms: [u64; 2],
    pub(crate) slow_until_ms: u64,
    pub(crate) full_until_ms: u64,
    /// How many of the tokens that it gets next have expired.
    pub(crate) stale_tokens: u32,
    pub(crate) away: bool,
    /// It is never there: a plan without it fails as well.
    pub(crate) absent: bool,
    /// It is to bring its schema to the relay when it can.
    pub(crate) brings_schema: bool,
    pub(crate) upgraded: bool,
    pub(crate) backups: Vec<Disk>,
    pub(crate) forms: BTreeMap<EntityKey, View>,
    pub(crate) flush_due: bool,
    /// When its timer is due.
    pub(crate) wakes_at_ms: Option<u64>,
    /// How far the app was told that things are durable.
    pub(crate) told: CommitNo,
}

impl Device {
    pub(crate) fn new(number: usize, role: GrantRole, schema: &Arc<Schema>, source: &str) -> Self {
        let mut key = [0xd0; 32];
        key[..8].copy_from_slice(&(number as u64).to_be_bytes());
        let config = ReplicaConfig {
            workspace: WorkspaceId::new("home").expect("a name"),
            device: DeviceId(key),
            device_name: format!("device {number}"),
            platform: "sim".into(),
            schema: Arc::clone(schema),
            schema_source: source.to_owned(),
            assumed_role: Some(role),
            store_life: 0,
            seed: [0; 32],
        };
        Self {
            config,
            role,
            disk: Arc::new(Disk::new()),
            replica: None,
            link: None,
            dials: 0,
            starts: 0,
            offset_ms: 0,
            drift_ppm: 0,
            drifted: (0, 0),
            wandered_ms: 0,
            jumps: 0,
            blocked_ms: [0; 2],
            slow_until_ms: 0,
            full_until_ms: 0,
            stale_tokens: 0,
            away: false,
            absent: false,
            brings_schema: false,
            upgraded: false,
            backups: Vec::new(),
            forms: BTreeMap::new(),
            flush_due: false,
            wakes_at_ms: None,
            told: CommitNo(0),
        }
    }

    /// Starts the engine on what the disk holds, with the randomness of a new process.
    pub(crate) fn start(&mut self, seed: u64) -> Result<(), StoreError> {
        self.starts += 1;
        self.config.seed[..8].copy_from_slice(&seed.to_be_bytes());
        self.config.seed[8..16].copy_from_slice(&self.starts.to_be_bytes());
        self.config.seed[16..].copy_from_slice(&self.config.device.0[..16]);
        self.replica = Some(Replica::open(self.disk.clone(), self.config.clone())?);
        Ok(())
    }

    fn drift(&self, time_ms: u64) -> i64 {
        self.drifted.0 + (time_ms - self.drifted.1) as i64 / 1_000 * self.drift_ppm / 1_000
    }

    /// How far the clock has drifted in all, back and forth.
    pub(crate) fn wandered_ms(&self, time_ms: u64) -> u64 {
        self.wandered_ms + self.drift(time_ms).abs_diff(self.drifted.0)
    }

    /// From now on the clock is fast or slow by this much.
    pub(crate) fn drift_by(&mut self, time_ms: u64, ppm: i64) {
        self.wandered_ms = self.wandered_ms(time_ms);
        self.drifted = (self.drift(time_ms), time_ms);
        self.drift_ppm = ppm;
    }

    pub(crate) fn now(&self, time_ms: u64) -> Now {
        let drift = self.drift(time_ms);
        let mono = MonoMs(1_000u64.saturating_add(time_ms).saturating_add_signed(drift));
        let wall = (START_MS + time_ms).saturating_add_signed(self.offset_ms).saturating_add_signed(drift);
        Now { mono, wall: WallMs(wall) }
    }

    pub(crate) fn rows(&self) -> Rows {
        Rows::new(self.disk.clone(), Arc::clone(&self.config.schema), &self.config.workspace)
    }

    pub(crate) fn ty(&self, key: &EntityKey) -> Option<&EntityType> {
        self.config.schema.types.get(key.type_name())
    }

    /// What a user sees of an entity now: durable state.
    pub(crate) fn look(&self, key: &EntityKey) -> Result<Option<View>, StoreError> {
        let Some(ty) = self.ty(key) else { return Ok(None) };
        let record = self.rows().get(key)?;
        let exists = record.is_some();
        let (base, row) = match record {
            Some(record) => {
                let base = parse_version(&record.version).unwrap_or_default();
                (base, self.shown(key, &record)?)
            }
            None => {
                let fields = ty.fields.values().map(|field| (field.name.clone(), field.empty_value()));
                (Vec::new(), Row { fields: fields.collect(), deleted: false, conflicts: Vec::new() })
            }
        };
        let screen = screen_of(ty, &row.fields);
        Ok(Some(View { base, row, screen, exists }))
    }

    fn shown(&self, key: &EntityKey, record: &RowRecord) -> Result<Row, StoreError> {
        let conflicts = self.rows().conflicts()?.into_iter().filter(|(entity, _)| entity == key);
        let conflicts = conflicts.filter_map(|(_, conflict)| {
            Some(Conflict {
                field: conflict.field,
                kind: ConflictKind::from_name(&conflict.kind)?,
                sides: Vec::new(),
                base: conflict.base,
            })
        });
        let (fields, deleted) = (record.fields.clone(), record.deleted);
        Ok(Row { fields, deleted, conflicts: conflicts.collect() })
    }
}
