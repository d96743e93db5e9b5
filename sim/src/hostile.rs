//! Those who attack the relay: who they are follows from the dice, and each attack comes on
//! connections of its own. None may be admitted with what is not theirs to write.

use std::num::NonZeroU64;

use anabranch_core::change::{Note, Role, TxMark};
use anabranch_core::clock::{Hlc, WallMs};
use anabranch_core::id::{Author, DeviceId, EntityKey, Incarnation};
use anabranch_core::relay::ConnId;
use anabranch_core::wire::{
    Ack, Changes, EntityChanges, GrantRole, Hello, Message, Open, Refresh, SignIn, Unit, VERSION_MAX,
};
use automerge::legacy::{Key, ObjectId, OpId, OpType, SortedVec};
use automerge::{ActorId, Change as RawChange, ChangeHash, ExpandedChange, ScalarValue};

use crate::cluster::{CHANNEL, Cluster};
use crate::device::START_MS;
use crate::dice::Dice;
use crate::net::Peer;

/// Damages bytes: flips, cuts, adds.
pub(crate) fn damage(bytes: &mut Vec<u8>, dice: &mut Dice) {
    match dice.roll(4) {
        0 if !bytes.is_empty() => bytes.truncate(dice.roll(bytes.len())),
        1 => bytes.extend((0..1 + dice.roll(64)).map(|_| dice.word() as u8)),
        _ => {
            for _ in 0..1 + dice.roll(4) {
                let place = dice.roll(bytes.len());
                if let Some(byte) = bytes.get_mut(place) {
                    *byte ^= 1 << dice.roll(8);
                }
            }
        }
    }
}

/// How a change is not what it should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Forgery {
    Nothing,
    Actor,
    AnothersAuthor,
    AnotherEntity,
    SeqGap,
    StartOp,
    NegativeTime,
    FutureTime,
    Authority,
    UnknownObject,
    UnknownPredecessor,
    IncrementsText,
    MissingDependency,
    Genesis,
    Object,
}

const FORGERIES: [Forgery; 14] = {
    use Forgery::*;
    [
        Actor,
        AnothersAuthor,
        AnotherEntity,
        SeqGap,
        StartOp,
        NegativeTime,
        FutureTime,
        Authority,
        UnknownObject,
        UnknownPredecessor,
        IncrementsText,
        MissingDependency,
        Genesis,
        Object,
    ]
};

impl Cluster {
    /// One attack. Counts itself.
    pub(crate) fn attack(&mut self, dice: &mut Dice) {
        if self.relay.is_none() {
            return;
        }
        let class = match dice.roll(9) {
            0 => {
                self.speak_out_of_turn(dice);
                "hostile: out of turn"
            }
            1 | 2 => {
                self.forge(dice);
                "hostile: forged change"
            }
            3 => {
                self.bring_anothers(dice);
                "hostile: another's change"
            }
            4 => {
                self.bring_back(dice);
                "hostile: refused brought back"
            }
            5 => {
                self.overfeed(dice);
                "hostile: huge message"
            }
            6 => {
                self.damaged_frames(dice);
                "hostile: damaged frames"
            }
            7 => {
                self.flood(dice);
                "hostile: flood of connections"
            }
            _ => {
                self.never_read(dice);
                "hostile: never reads"
            }
        };
        self.report.fault(class);
    }

    fn stranger(&mut self, dice: &mut Dice) -> (ConnId, DeviceId) {
        let mut key = [0xee; 32];
        key[..8].copy_from_slice(&dice.word().to_be_bytes());
        let conn = self.connect(Peer::Stranger, None, 0, Dice(dice.word()), DeviceId(key));
        (conn, DeviceId(key))
    }

    fn say(&mut self, conn: ConnId, message: impl Into<Message>) {
        self.send(conn, true, message.into().encode());
    }

    /// A stranger who has a token.
    fn insider(&mut self, role: GrantRole, dice: &mut Dice) -> (ConnId, DeviceId) {
        let (conn, device) = self.stranger(dice);
        self.say(conn, self.hello());
        let expires = START_MS + self.time_ms + 3_600_000;
        let token = Some(format!("{}:{expires}", role.name()));
        self.say(conn, sign_in(CHANNEL, token));
        (conn, device)
    }

    fn hello(&self) -> Hello {
        Hello {
            version_min: 1,
            version_max: VERSION_MAX,
            software: "stranger".into(),
            wall_ms: START_MS + self.time_ms,
            features_required: 0,
            features: 0,
            proof: Vec::new(),
        }
    }

    fn speak_out_of_turn(&mut self, dice: &mut Dice) {
        let (conn, _) = self.stranger(dice);
        let lies = Open {
            channel: CHANNEL,
            epoch: [dice.word() as u8; 16],
            cursor: dice.word(),
            digest: [dice.word() as u8; 32],
            full: dice.once_in(2),
        };
        if dice.once_in(3) {
            self.say(conn, lies);
            return;
        }
        self.say(conn, self.hello());
        for _ in 0..1 + dice.roll(6) {
            match dice.roll(8) {
                0 => self.say(conn, self.hello()),
                1 => self.say(conn, lies.clone()),
                2 => self.say(conn, Ack { channel: CHANNEL, unit_id: 1, seq: u64::MAX, refused: Vec::new() }),
                3 => self.say(conn, sign_in(dice.word() as u32, Some("authority:99".into()))),
                4 => self.say(conn, SignIn { workspace: "w".repeat(100_000), ..sign_in(CHANNEL, None) }),
                5 => self.say(conn, Refresh { channel: CHANNEL, token: "writer:0".into() }),
                // A kind that nobody knows, with and without the mark that it must be understood.
                6 => self.send(conn, true, vec![250, dice.word() as u8 & 1, 1, 2, 3]),
                _ => {
                    let unit = Unit { entities: Vec::new() };
                    self.say(conn, Changes { channel: CHANNEL, unit_id: dice.word(), sent: u64::MAX, unit });
                }
            }
        }
    }

    /// What a stranger may write: a note of their own, beside which all else is judged.
    fn own_key(&mut self, dice: &mut Dice) -> EntityKey {
        EntityKey::new("preferences", format!("stranger-{:x}", dice.word() as u32)).expect("a name")
    }

    fn forge(&mut self, dice: &mut Dice) {
        let (conn, device) = self.insider(GrantRole::Writer, dice);
        let mut entities = Vec::new();
        for _ in 0..1 + dice.roll(4) {
            let forgery = *dice.pick(&FORGERIES);
            let favourite = self.types[0].clone();
            let key = match forgery {
                Forgery::Authority => EntityKey::new("exercise", "a").expect("a name"),
                Forgery::AnotherEntity => EntityKey::new(favourite, "a").expect("a name"),
                _ => self.own_key(dice),
            };
            let (_, bytes) = self.change(device, &key, forgery, None);
            entities.push(part(&key, vec![bytes]));
        }
        // The honest rest of the unit.
        let key = self.own_key(dice);
        let (hash, bytes) = self.change(device, &key, Forgery::Nothing, None);
        self.strangers.insert(hash, key.clone());
        entities.push(part(&key, vec![bytes]));
        self.say(conn, changes(1, entities));
    }

    /// Changes of honest devices, as they were and put into other entities.
    fn bring_anothers(&mut self, dice: &mut Dice) {
        let count = self.ledger.sent.len();
        if count == 0 {
            return;
        }
        // An authority or an admin would be within its rights.
        let role = *dice.pick(&[GrantRole::Writer, GrantRole::Reader]);
        let (conn, _) = self.insider(role, dice);
        let mut entities = Vec::new();
        for _ in 0..1 + dice.roll(6) {
            let Some((key, change)) = self.ledger.sent.values().nth(dice.roll(count)).cloned() else {
                continue;
            };
            let other = EntityKey::new(key.type_name(), "elsewhere").expect("a name");
            let mut bytes = change.bytes().to_vec();
            if dice.once_in(4) {
                damage(&mut bytes, dice);
            }
            entities.push(part(if dice.once_in(2) { &key } else { &other }, vec![bytes]));
        }
        self.say(conn, changes(1, entities));
    }

    /// Half a transaction is refused for good. It must stay so when it comes back whole.
    fn bring_back(&mut self, dice: &mut Dice) {
        let (conn, device) = self.insider(GrantRole::Writer, dice);
        let tx = TxMark { id: [dice.word() as u8; 16], members: 2 };
        let (first, second) = (self.own_key(dice), self.own_key(dice));
        let half = part(&first, vec![self.change(device, &first, Forgery::Nothing, Some(tx)).1]);
        let other = part(&second, vec![self.change(device, &second, Forgery::Nothing, Some(tx)).1]);
        self.say(conn, changes(1, vec![half.clone()]));
        self.say(conn, changes(2, vec![half, other]));
    }

    fn overfeed(&mut self, dice: &mut Dice) {
        let (conn, device) = self.insider(GrantRole::Writer, dice);
        match dice.roll(3) {
            0 => self.send(conn, true, vec![dice.word() as u8; 10 * 1024 * 1024]),
            1 => {
                // Few bytes that say that they are many: kind 5, compressed.
                let mut bomb = vec![5, 3];
                bomb.extend([0x28, 0xb5, 0x2f, 0xfd, 0xa0, 0xff, 0xff, 0xff, 0x7f]);
                bomb.extend((0..200).flat_map(|_| [0x02, 0x00, 0x10, 0x00]));
                self.send(conn, true, bomb);
            }
            _ => {
                let key = self.own_key(dice);
                let bytes = self.change(device, &key, Forgery::SeqGap, None).1;
                let many = (0..2_000).map(|_| part(&key, vec![bytes.clone()])).collect();
                self.say(conn, changes(1, many));
            }
        }
    }

    fn damaged_frames(&mut self, dice: &mut Dice) {
        for _ in 0..4 {
            let (conn, device) = self.insider(GrantRole::Writer, dice);
            let key = self.own_key(dice);
            let (hash, bytes) = self.change(device, &key, Forgery::Nothing, None);
            self.strangers.insert(hash, key.clone());
            let mut message = Message::from(changes(1, vec![part(&key, vec![bytes])])).encode();
            if dice.once_in(2) {
                message.truncate(dice.roll(message.len()));
            } else {
                damage(&mut message, dice);
            }
            self.send(conn, true, message);
        }
    }

    fn flood(&mut self, dice: &mut Dice) {
        for _ in 0..30 + dice.roll(70) {
            let (conn, _) = self.stranger(dice);
            if dice.once_in(2) {
                self.relay_hangs_up(conn);
            }
        }
    }

    /// Asks for everything, many times, and reads nothing.
    fn never_read(&mut self, dice: &mut Dice) {
        let (conn, _) = self.insider(GrantRole::Reader, dice);
        if let Some(link) = self.links.get_mut(&conn) {
            link.deaf = true;
        }
        for _ in 0..20 + dice.roll(200) {
            self.say(conn, Open { channel: CHANNEL, epoch: [0; 16], cursor: 0, digest: [0; 32], full: true });
        }
    }

    fn change(
        &self,
        device: DeviceId,
        key: &EntityKey,
        forgery: Forgery,
        tx: Option<TxMark>,
    ) -> (ChangeHash, Vec<u8>) {
        let honest = self.devices[0].config.device;
        let author = Author {
            device: if forgery == Forgery::AnothersAuthor { honest } else { device },
            incarnation: Incarnation(0),
        };
        let elsewhere = EntityKey::new("preferences", "elsewhere").expect("a name");
        let place = if forgery == Forgery::AnotherEntity { &elsewhere } else { key };
        let actor = match forgery {
            Forgery::Actor => ActorId::from([7; 16]),
            _ => author.actor(&Self::workspace(), place),
        };
        let wall = START_MS + self.time_ms;
        let future = if forgery == Forgery::FutureTime { 3_600_000 } else { 0 };
        let time = match forgery {
            Forgery::NegativeTime => -5,
            Forgery::Genesis => 0,
            _ => Hlc::from_wall(WallMs(wall + future)).to_change_time(),
        };
        let unknown = OpId::new(1, &ActorId::from([9; 16]));
        let (action, field) = match forgery {
            Forgery::IncrementsText => (OpType::Increment(1), "theme"),
            Forgery::Genesis => (OpType::Make(automerge::ObjType::Text), "theme"),
            Forgery::Object => (OpType::Make(automerge::ObjType::Map), "theme"),
            Forgery::Authority => (OpType::Put(ScalarValue::Str("mine".into())), "name"),
            _ => (OpType::Put(ScalarValue::Str("dark".into())), "theme"),
        };
        let op = automerge::legacy::Op {
            action,
            obj: match forgery {
                Forgery::UnknownObject => ObjectId::Id(unknown.clone()),
                _ => ObjectId::Root,
            },
            key: Key::Map(field.into()),
            pred: match forgery {
                Forgery::UnknownPredecessor | Forgery::IncrementsText => SortedVec::from(vec![unknown]),
                _ => SortedVec::new(),
            },
            insert: false,
        };
        let bytes = author.to_bytes();
        let role = if forgery == Forgery::Authority { Role::Authority } else { Role::Device };
        let raw = RawChange::from(ExpandedChange {
            operations: vec![op],
            actor_id: actor,
            hash: None,
            seq: if forgery == Forgery::SeqGap { 3 } else { 1 },
            start_op: NonZeroU64::new(if forgery == Forgery::StartOp { 1 << 33 } else { 1 })
                .expect("not zero"),
            time,
            message: (forgery != Forgery::Genesis).then(|| Note { role, tx, ..Note::default() }.to_message()),
            deps: match forgery {
                Forgery::MissingDependency => vec![ChangeHash([3; 32])],
                _ => Vec::new(),
            },
            extra_bytes: [&[1, bytes.len() as u8][..], &bytes].concat(),
            author: None,
        });
        (raw.hash(), raw.raw_bytes().to_vec())
    }
}

fn sign_in(channel: u32, token: Option<String>) -> SignIn {
    SignIn {
        channel,
        workspace: "home".into(),
        token,
        device_name: "stranger".into(),
        platform: "sim".into(),
        incarnation: 0,
        sent: 0,
    }
}

fn part(key: &EntityKey, changes: Vec<Vec<u8>>) -> EntityChanges {
    EntityChanges {
        type_name: key.type_name().to_owned(),
        id: key.id().to_owned(),
        genesis: Vec::new(),
        changes,
        signature: Vec::new(),
    }
}

fn changes(unit_id: u64, entities: Vec<EntityChanges>) -> Changes {
    Changes { channel: CHANNEL, unit_id, sent: 0, unit: Unit { entities } }
}
