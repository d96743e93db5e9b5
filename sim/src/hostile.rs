//! Those who attack the relay: who they are follows from the dice, and each attack comes on
//! connections of its own. None may be admitted with what is not theirs to write.

use std::num::NonZeroU64;
use std::sync::LazyLock;

use anabranch_core::admission::RefusalCode;
use anabranch_core::change::{Note, OP_COUNTER_MAX, Role, TxMark};
use anabranch_core::clock::{Hlc, WallMs};
use anabranch_core::genesis::{Genesis, GenesisKind};
use anabranch_core::id::{Author, DeviceId, EntityKey, Incarnation};
use anabranch_core::relay::ConnId;
use anabranch_core::shape::TOMBSTONE;
use anabranch_core::wire::{
    Ack, Changes, EntityChanges, GrantRole, Hello, MESSAGE_BYTES_MAX, Message, Open, Refresh, SignIn,
    UNIT_BYTES_MAX, UNIT_ENTITIES_MAX, Unit, VERSION_MAX,
};
use automerge::legacy::{Key, ObjectId, OpId, OpType, SortedVec};
use automerge::{ActorId, Change as RawChange, ChangeHash, ExpandedChange, ScalarValue};

use crate::cluster::{ACK_KIND, CHANNEL, Cluster, Event};
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
    NoPredecessor,
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

impl Forgery {
    /// All but none.
    const ALL: [Forgery; 15] = {
        use Forgery::*;
        [
            Actor,
            AnothersAuthor,
            AnotherEntity,
            SeqGap,
            NoPredecessor,
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

    /// Its class in reports.
    const fn class(self) -> &'static str {
        match self {
            Forgery::Nothing => "hostile: nothing",
            Forgery::Actor => "hostile: forged actor",
            Forgery::AnothersAuthor => "hostile: forged author",
            Forgery::AnotherEntity => "hostile: replayed into another entity",
            Forgery::SeqGap => "hostile: gap in a sequence",
            Forgery::NoPredecessor => "hostile: no predecessor",
            Forgery::StartOp => "hostile: counter at its limit",
            Forgery::NegativeTime => "hostile: negative time",
            Forgery::FutureTime => "hostile: future time",
            Forgery::Authority => "hostile: forged authority",
            Forgery::UnknownObject => "hostile: unknown object",
            Forgery::UnknownPredecessor => "hostile: replaces what is unknown",
            Forgery::IncrementsText => "hostile: increments a string",
            Forgery::MissingDependency => "hostile: unknown dependency",
            Forgery::Genesis => "hostile: forged genesis",
            Forgery::Object => "hostile: makes an object",
        }
    }

    /// Whether it comes after an honest change of the same author.
    fn follows(self) -> bool {
        matches!(self, Forgery::SeqGap | Forgery::NoPredecessor | Forgery::IncrementsText)
    }

    /// What the relay must say of it.
    fn expected(self) -> Expected {
        use Forgery::*;
        Expected::Refused(match self {
            Nothing => return Expected::Taken,
            Actor | AnotherEntity | Genesis => RefusalCode::ForgedActor,
            AnothersAuthor => RefusalCode::ForgedAuthor,
            SeqGap | NoPredecessor => RefusalCode::BadSequence,
            StartOp | NegativeTime => RefusalCode::Malformed,
            FutureTime => RefusalCode::ClockAhead,
            Authority => RefusalCode::ForgedRole,
            UnknownObject | UnknownPredecessor | IncrementsText | Object => RefusalCode::BadShape,
            MissingDependency => RefusalCode::MissingDependency,
        })
    }
}

/// The classes of forged changes.
pub(crate) const FORGERIES: [&str; 15] = {
    let (mut classes, mut at) = ([""; 15], 0);
    while at < classes.len() {
        classes[at] = Forgery::ALL[at].class();
        at += 1;
    }
    classes
};

/// What a stranger must be told of a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Expected {
    Taken,
    Refused(RefusalCode),
}

/// A change that a stranger makes.
struct Forged<'a> {
    device: DeviceId,
    key: &'a EntityKey,
    forgery: Forgery,
    tx: Option<TxMark>,
    theme: String,
    /// The change of the same author before it, and its number.
    after: Option<(ChangeHash, u64)>,
    /// Whether it deletes or revives, and replaces nothing.
    deletes: Option<bool>,
    /// What it writes where; none is a theme.
    puts: Option<(&'static str, ScalarValue)>,
}

impl<'a> Forged<'a> {
    fn new(device: DeviceId, key: &'a EntityKey, forgery: Forgery) -> Self {
        Self { device, key, forgery, tx: None, theme: "dark".into(), after: None, deletes: None, puts: None }
    }
}

/// Attacks of one step.
const ATTACKS_PER_STEP: usize = 4;
/// Devices that write one field at once.
const WRITERS: usize = 1_000;
/// Of so many attacks one is theirs.
const WRITERS_ONCE_IN: usize = 18_000;
/// How long attackers stay, at least and at most.
const STAYS_MS: (u64, u64) = (3_000, 40_000);
/// More changes than a unit may have.
const CHANGES_TOO_MANY: usize = 20_001;
/// What a bomb comes to.
const BOMB_BYTES: usize = 16 * 1024 * 1024;
/// Of the bytes at which a message can be cut, so many lie between two that are tried.
const CUT_EVERY: usize = 16;

/// A bomb, packed.
static PACKED_BOMB: LazyLock<Vec<u8>> =
    LazyLock::new(|| zstd::bulk::compress(&vec![0; BOMB_BYTES], 1).expect("zeros can be packed"));

impl Cluster {
    /// Some attacks, each on connections of its own. They count themselves.
    pub(crate) fn attack(&mut self, dice: &mut Dice) {
        for _ in 0..ATTACKS_PER_STEP {
            if self.relay.is_none() {
                return;
            }
            if dice.once_in(WRITERS_ONCE_IN) {
                self.thousand_writers(dice);
            }
            match dice.roll(16) {
                0 => self.speak_out_of_turn(dice),
                1 => self.forge(dice),
                2 => self.bring_anothers(dice),
                3 => self.bring_back(dice),
                4 => self.huge_message(dice),
                5 => self.bomb(dice),
                6 => self.overfill(dice),
                7 => self.damaged_frames(dice),
                8 => self.cut_frames(dice),
                9 => self.flood(dice),
                10 => self.revive_beside(dice),
                11 => self.write_nothing(dice),
                12 => self.write_at_once(dice),
                13 => self.lie(dice),
                14 => self.name_containers(dice),
                _ => self.never_read(dice),
            }
            if dice.once_in(8) {
                self.pretend(dice);
            }
        }
    }

    fn stranger(&mut self, dice: &mut Dice) -> (ConnId, DeviceId) {
        let mut key = [0xee; 32];
        key[..8].copy_from_slice(&dice.word().to_be_bytes());
        let conn = self.connect(Peer::Stranger, None, 0, Dice(dice.word()), DeviceId(key));
        self.at(self.time_ms + dice.between(STAYS_MS.0, STAYS_MS.1), Event::Notice { conn, relay: true });
        (conn, DeviceId(key))
    }

    /// Offers a unit, and remembers what must be said of what is in it.
    fn offer(
        &mut self,
        conn: ConnId,
        unit_id: u64,
        parts: Vec<EntityChanges>,
        of: Vec<(ChangeHash, Expected)>,
    ) {
        if let Some(link) = self.links.get_mut(&conn) {
            link.expected.insert(unit_id, of);
        }
        self.say(conn, changes(unit_id, parts));
    }

    /// Nothing of what is said on a connection may be answered like a unit.
    fn senseless(&mut self, conn: ConnId) {
        if let Some(link) = self.links.get_mut(&conn) {
            link.senseless = true;
        }
    }

    /// The relay answers a stranger: what was honest is taken, and the rest refused for what is wrong with it.
    pub(crate) fn stranger_hears(&mut self, conn: ConnId, bytes: &[u8]) {
        if bytes.first() != Some(&ACK_KIND) {
            return;
        }
        let Ok(Some(Message::Ack(ack))) = Message::decode(bytes) else { return };
        let Some(link) = self.links.get_mut(&conn) else { return };
        if link.senseless {
            return self.wrong(format!("connection {} made no sense, and is answered: {ack:?}", conn.0));
        }
        let malformed = |code: u16| code == RefusalCode::Malformed as u16;
        // What can't be read may have no hash that the relay could name.
        let mut unnamed = ack.refused.iter().filter(|refused| malformed(refused.code));
        for (hash, expected) in link.expected.remove(&ack.unit_id).unwrap_or_default() {
            let refused = match expected {
                Expected::Refused(RefusalCode::Malformed) => unnamed.next(),
                _ => ack.refused.iter().find(|refused| refused.hash == hash.0),
            };
            match (expected, refused.map(|refused| refused.code)) {
                (Expected::Taken, None) => {
                    self.report.count("strangers' changes taken", 1);
                    self.taken.insert(hash);
                }
                (Expected::Refused(code), Some(said)) if said == code as u16 => {
                    self.report.count("strangers' changes refused", 1);
                }
                (expected, said) => {
                    self.wrong(format!("a stranger's {hash} is {expected:?}, and the relay says {said:?}"));
                }
            }
        }
    }

    fn say(&mut self, conn: ConnId, message: impl Into<Message>) {
        self.send(conn, true, message.into().encode());
    }

    /// A stranger who has a token.
    fn insider(&mut self, role: GrantRole, dice: &mut Dice) -> (ConnId, DeviceId) {
        let (conn, device) = self.stranger(dice);
        self.say(conn, self.hello());
        let expires = START_MS + self.time_ms + 3_600_000;
        // Some share an account, some have one each.
        let user = if dice.once_in(2) { "mallory".to_owned() } else { format!("stranger {}", conn.0) };
        let token = Some(token(role, &user, expires));
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
        self.report.fault("hostile: out of turn");
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
        if dice.once_in(6) {
            // Someone of another time.
            let none_in_common = match dice.once_in(2) {
                true => Hello { version_min: VERSION_MAX + 1, version_max: u16::MAX, ..self.hello() },
                false => Hello { features_required: 1, ..self.hello() },
            };
            self.say(conn, none_in_common);
            return;
        }
        self.say(conn, self.hello());
        for _ in 0..1 + dice.roll(6) {
            match dice.roll(10) {
                0 => self.say(conn, self.hello()),
                1 => self.say(conn, lies.clone()),
                2 => self.say(conn, Ack { channel: CHANNEL, unit_id: 1, seq: u64::MAX, refused: Vec::new() }),
                3 => self.say(conn, sign_in(dice.word() as u32, Some("authority:ada:99".into()))),
                4 => self.say(conn, SignIn { workspace: "w".repeat(1_000), ..sign_in(CHANNEL, None) }),
                5 => self.say(conn, Refresh { channel: CHANNEL, token: "writer:ada:0".into() }),
                7 => {
                    // Two workspaces on one channel, a channel more than there may be.
                    let expires = START_MS + self.time_ms + 3_600_000;
                    let token = Some(token(GrantRole::Reader, "mallory", expires));
                    self.say(conn, sign_in(CHANNEL, token.clone()));
                    if dice.once_in(2) {
                        self.say(conn, SignIn { workspace: "other".into(), ..sign_in(CHANNEL, token) });
                    } else {
                        (0..70).for_each(|channel| self.say(conn, sign_in(channel, token.clone())));
                    }
                }
                8 => self.say(
                    conn,
                    Changes { channel: CHANNEL, unit_id: 1, sent: 0, unit: Unit { entities: Vec::new() } },
                ),
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

    /// One change of each forgery, each in an entity of its own, and an honest one.
    fn forge(&mut self, dice: &mut Dice) {
        let (conn, device) = self.insider(GrantRole::Writer, dice);
        let (mut entities, mut expected) = (Vec::new(), Vec::new());
        for forgery in Forgery::ALL {
            let favourite = self.types[0].clone();
            let key = match forgery {
                Forgery::Authority => EntityKey::new("exercise", "a").expect("a name"),
                Forgery::AnotherEntity => EntityKey::new(favourite, "a").expect("a name"),
                _ => self.own_key(dice),
            };
            let mut forged = Forged::new(device, &key, forgery);
            let mut made = Vec::new();
            if forgery.follows() {
                let (hash, bytes) = self.honest(device, &key);
                forged.after = Some((hash, 1));
                made.push(bytes);
                expected.push((hash, Expected::Taken));
            }
            let (hash, bytes) = self.change(&forged, dice);
            made.push(bytes);
            expected.push((hash, forgery.expected()));
            entities.push(part(&key, made));
            self.report.fault(forgery.class());
        }
        // The honest rest of the unit.
        let key = self.own_key(dice);
        let (hash, bytes) = self.honest(device, &key);
        expected.push((hash, Expected::Taken));
        entities.push(part(&key, vec![bytes]));
        dice.shuffle(&mut entities);
        self.offer(conn, 1, entities, expected);
    }

    /// A change within a stranger's rights.
    fn honest(&mut self, device: DeviceId, key: &EntityKey) -> (ChangeHash, Vec<u8>) {
        let (hash, bytes) = self.change(&Forged::new(device, key, Forgery::Nothing), &mut Dice(0));
        self.strangers.insert(hash, key.clone());
        (hash, bytes)
    }

    /// Someone who may only read writes.
    fn pretend(&mut self, dice: &mut Dice) {
        self.report.fault("hostile: reader pretends");
        let (conn, device) = self.insider(GrantRole::Reader, dice);
        let key = self.own_key(dice);
        let (hash, bytes) = self.change(&Forged::new(device, &key, Forgery::Nothing), dice);
        let expected = vec![(hash, Expected::Refused(RefusalCode::Forbidden))];
        self.offer(conn, 1, vec![part(&key, vec![bytes])], expected);
    }

    /// Takes a deletion back that it has seen, and leaves it where it stands.
    fn revive_beside(&mut self, dice: &mut Dice) {
        self.report.fault("hostile: revives beside a deletion");
        let (conn, device) = self.insider(GrantRole::Writer, dice);
        let key = self.own_key(dice);
        let (mut after, mut made, mut expected) = (None, Vec::new(), Vec::new());
        for deletes in [None, Some(true), Some(false)] {
            let forged = Forged { after, deletes, ..Forged::new(device, &key, Forgery::Nothing) };
            let (hash, bytes) = self.change(&forged, dice);
            self.strangers.insert(hash, key.clone());
            after = Some((hash, made.len() as u64 + 1));
            made.push(bytes);
            expected.push((hash, Expected::Taken));
        }
        self.offer(conn, 1, vec![part(&key, made)], expected);
    }

    /// Writes nothing where the first value stands.
    fn write_nothing(&mut self, dice: &mut Dice) {
        self.report.fault("hostile: writes nothing");
        let (conn, device) = self.insider(GrantRole::Writer, dice);
        let key = EntityKey::new("rest", format!("stranger-{:x}", dice.word() as u32)).expect("a name");
        let nothing = Some(("first", ScalarValue::Null));
        let forged = Forged { puts: nothing, ..Forged::new(device, &key, Forgery::Nothing) };
        let (hash, bytes) = self.change(&forged, dice);
        self.strangers.insert(hash, key.clone());
        self.offer(conn, 1, vec![part(&key, vec![bytes])], vec![(hash, Expected::Taken)]);
    }

    /// Two devices write one field, and date it alike to the last digit.
    fn write_at_once(&mut self, dice: &mut Dice) {
        self.report.fault("hostile: dated alike");
        let key = self.own_key(dice);
        for theme in ["dark", "light"] {
            let (conn, device) = self.insider(GrantRole::Writer, dice);
            let forged = Forged { theme: theme.into(), ..Forged::new(device, &key, Forgery::Nothing) };
            let (hash, bytes) = self.change(&forged, dice);
            self.strangers.insert(hash, key.clone());
            self.offer(conn, 1, vec![part(&key, vec![bytes])], vec![(hash, Expected::Taken)]);
        }
    }

    /// A thousand devices write one field, and none has seen another's value.
    fn thousand_writers(&mut self, dice: &mut Dice) {
        let key = self.own_key(dice);
        for number in 0..WRITERS {
            self.report.fault("hostile: one of a thousand writers");
            let (conn, device) = self.insider(GrantRole::Writer, dice);
            let mut forged = Forged::new(device, &key, Forgery::Nothing);
            forged.theme = format!("theme {number}");
            let (hash, bytes) = self.change(&forged, dice);
            self.strangers.insert(hash, key.clone());
            self.offer(conn, 1, vec![part(&key, vec![bytes])], vec![(hash, Expected::Taken)]);
        }
    }

    /// Changes of honest devices, as they were and put into other entities.
    fn bring_anothers(&mut self, dice: &mut Dice) {
        let count = self.ledger.sent.len();
        if count == 0 {
            return;
        }
        self.report.fault("hostile: another's change");
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

    /// Half a transaction is refused for good. It must stay so when it comes back whole, whoever
    /// brings it.
    fn bring_back(&mut self, dice: &mut Dice) {
        self.report.fault("hostile: refused brought back");
        let (conn, device) = self.insider(GrantRole::Writer, dice);
        let tx = TxMark { id: dice.word().to_be_bytes().repeat(2).try_into().expect("16 bytes"), members: 2 };
        let keys = [self.own_key(dice), self.own_key(dice)];
        let mut parts = Vec::new();
        for key in &keys {
            let forged = Forged { tx: Some(tx), ..Forged::new(device, key, Forgery::Nothing) };
            let (hash, bytes) = self.change(&forged, dice);
            // Should the third device be first, it is whole, and within its rights.
            self.strangers.insert(hash, key.clone());
            parts.push(part(key, vec![bytes]));
        }
        self.say(conn, changes(1, parts[..1].to_vec()));
        self.say(conn, changes(2, parts.clone()));
        let (third, other) = self.insider(*dice.pick(&[GrantRole::Writer, GrantRole::Authority]), dice);
        // What is honest beside it is taken, whatever becomes of it.
        let key = self.own_key(dice);
        let (hash, bytes) = self.honest(other, &key);
        parts.push(part(&key, vec![bytes]));
        self.offer(third, 1, parts, vec![(hash, Expected::Taken)]);
    }

    fn huge_message(&mut self, dice: &mut Dice) {
        self.report.fault("hostile: huge message");
        let (conn, _) = self.insider(GrantRole::Writer, dice);
        self.senseless(conn);
        self.send(conn, true, vec![dice.word() as u8; 10 * 1024 * 1024]);
    }

    /// Few bytes that are many, and say so or don't: kind 6, compressed.
    fn bomb(&mut self, dice: &mut Dice) {
        self.report.fault("hostile: decompression bomb");
        let (conn, _) = self.insider(GrantRole::Writer, dice);
        self.senseless(conn);
        let announced = *dice.pick(&[0, 1 << 10, MESSAGE_BYTES_MAX as u32, BOMB_BYTES as u32, u32::MAX]);
        let mut bomb = vec![6, 3];
        bomb.extend(announced.to_le_bytes());
        bomb.extend_from_slice(&PACKED_BOMB);
        self.send(conn, true, bomb);
    }

    /// More than a unit may have: entities, changes, or bytes.
    fn overfill(&mut self, dice: &mut Dice) {
        self.report.fault("hostile: too much in a unit");
        let (conn, device) = self.insider(GrantRole::Writer, dice);
        self.senseless(conn);
        let key = self.own_key(dice);
        let (parts, changes_of_each, change) = match dice.roll(6) {
            0 => (1, UNIT_BYTES_MAX / 65_536 + 1, vec![dice.word() as u8; 65_536]),
            1 => (1, CHANGES_TOO_MANY, vec![dice.word() as u8; 8]),
            _ => (UNIT_ENTITIES_MAX + 1, 0, Vec::new()),
        };
        let mut many: Vec<EntityChanges> =
            (0..parts).map(|_| part(&key, vec![change.clone(); changes_of_each])).collect();
        // What is honest in it is not taken either.
        many.push(part(&key, vec![self.change(&Forged::new(device, &key, Forgery::Nothing), dice).1]));
        self.say(conn, changes(1, many));
    }

    /// Someone who has signed in is wrong about all that devices and relays tell each other of where they are.
    fn lie(&mut self, dice: &mut Dice) {
        self.report.fault("hostile: lies about where it is");
        let (conn, device) = self.stranger(dice);
        self.say(conn, self.hello());
        let expires = START_MS + self.time_ms + 3_600_000;
        let token = Some(token(GrantRole::Writer, "mallory", expires));
        let high = *dice.pick(&[1, u64::from(u32::MAX), u64::MAX]);
        self.say(conn, SignIn { incarnation: high as u32, sent: high, ..sign_in(CHANNEL, token) });
        let epoch = match &self.relay {
            Some(relay) if dice.once_in(2) => relay.epoch(),
            _ => [dice.word() as u8; 16],
        };
        for _ in 0..1 + dice.roll(4) {
            let somewhere = dice.word() % 1_000;
            let cursor = *dice.pick(&[0, 1, somewhere, u64::MAX]);
            let digest = [dice.word() as u8; 32];
            self.say(conn, Open { channel: CHANNEL, epoch, cursor, digest, full: dice.once_in(2) });
        }
        // What it writes within its rights is taken all the same.
        let key = self.own_key(dice);
        let (hash, bytes) = self.honest(device, &key);
        if let Some(link) = self.links.get_mut(&conn) {
            link.expected.insert(7, vec![(hash, Expected::Taken)]);
        }
        self.say(conn, Changes { sent: u64::MAX, ..changes(7, vec![part(&key, vec![bytes])]) });
    }

    /// Containers that no type has, or of another kind, beside an honest change.
    fn name_containers(&mut self, dice: &mut Dice) {
        self.report.fault("hostile: names containers");
        let (conn, device) = self.insider(GrantRole::Writer, dice);
        let key = self.own_key(dice);
        let (hash, bytes) = self.honest(device, &key);
        let mut named = part(&key, vec![bytes]);
        for _ in 0..1 + dice.roll(20) {
            let field = *dice.pick(&["theme", "nothing", "", "\u{0}", TOMBSTONE]);
            named.genesis.push((field.to_owned(), dice.word() as u8));
        }
        self.offer(conn, 1, vec![named], vec![(hash, Expected::Taken)]);
    }

    /// A message within a stranger's rights, in bytes.
    fn message(&mut self, device: DeviceId, dice: &mut Dice) -> Vec<u8> {
        let key = self.own_key(dice);
        let bytes = self.honest(device, &key).1;
        Message::from(changes(1, vec![part(&key, vec![bytes])])).encode()
    }

    fn damaged_frames(&mut self, dice: &mut Dice) {
        self.report.fault("hostile: damaged frame");
        let (conn, device) = self.insider(GrantRole::Writer, dice);
        let mut message = self.message(device, dice);
        damage(&mut message, dice);
        self.send(conn, true, message);
    }

    /// One message, cut at many of its bytes; over some attacks at every one.
    fn cut_frames(&mut self, dice: &mut Dice) {
        let mut at = dice.roll(CUT_EVERY);
        loop {
            let (conn, device) = self.insider(GrantRole::Writer, dice);
            self.senseless(conn);
            let mut message = self.message(device, dice);
            if at >= message.len() {
                return;
            }
            message.truncate(at);
            self.report.fault("hostile: cut frame");
            self.send(conn, true, message);
            at += CUT_EVERY;
        }
    }

    fn flood(&mut self, dice: &mut Dice) {
        self.report.fault("hostile: flood of connections");
        for _ in 0..30 + dice.roll(70) {
            let (conn, _) = self.stranger(dice);
            if dice.once_in(2) {
                self.relay_hangs_up(conn);
            }
        }
    }

    /// Asks for everything, many times, and reads nothing.
    fn never_read(&mut self, dice: &mut Dice) {
        self.report.fault("hostile: never reads");
        let (conn, _) = self.insider(GrantRole::Reader, dice);
        if let Some(link) = self.links.get_mut(&conn) {
            link.deaf = true;
        }
        if dice.once_in(10) {
            // More answers than any connection may leave unread.
            for unit_id in 0..1_200 {
                self.say(conn, changes(unit_id, Vec::new()));
            }
        }
        for _ in 0..20 + dice.roll(200) {
            self.say(conn, Open { channel: CHANNEL, epoch: [0; 16], cursor: 0, digest: [0; 32], full: true });
        }
    }

    fn change(&self, forged: &Forged<'_>, dice: &mut Dice) -> (ChangeHash, Vec<u8>) {
        let Forged { device, key, forgery, tx, theme, after, deletes, puts } = forged;
        let (device, forgery) = (*device, *forgery);
        let honest = self.devices[0].config.device;
        let author = Author {
            device: if forgery == Forgery::AnothersAuthor { honest } else { device },
            incarnation: Incarnation(0),
        };
        let elsewhere = EntityKey::new("preferences", "elsewhere").expect("a name");
        let place = if forgery == Forgery::AnotherEntity { &elsewhere } else { key };
        let actor = match forgery {
            Forgery::Genesis => Genesis::new(key.type_name(), "theme", GenesisKind::Text).actor,
            Forgery::Actor => ActorId::from([7; 16]),
            _ => author.actor(&Self::workspace(), place),
        };
        let wall = START_MS + self.time_ms;
        let time = match forgery {
            Forgery::NegativeTime => *dice.pick(&[-1, -5, i64::MIN]),
            Forgery::FutureTime if dice.once_in(2) => i64::MAX,
            Forgery::FutureTime => Hlc::from_wall(WallMs(wall + 3_600_000)).to_change_time(),
            // Later than the one before it.
            _ => Hlc::from_wall(WallMs(wall + after.map_or(0, |(_, number)| number))).to_change_time(),
        };
        let unknown = OpId::new(1, &ActorId::from([9; 16]));
        let (action, field) = match forgery {
            _ if deletes.is_some() => (OpType::Put(ScalarValue::Boolean(*deletes == Some(true))), TOMBSTONE),
            Forgery::IncrementsText => (OpType::Increment(1), "theme"),
            Forgery::Genesis => (OpType::Make(automerge::ObjType::Text), "theme"),
            Forgery::Object => (OpType::Make(automerge::ObjType::Map), "theme"),
            Forgery::Authority => (OpType::Put(ScalarValue::Str("mine".into())), "name"),
            _ => (OpType::Put(ScalarValue::Str(theme.as_str().into())), "theme"),
        };
        let (action, field) = match puts {
            Some((field, value)) => (OpType::Put(value.clone()), *field),
            None => (action, field),
        };
        let op = automerge::legacy::Op {
            action,
            obj: match forgery {
                Forgery::UnknownObject => ObjectId::Id(unknown.clone()),
                _ => ObjectId::Root,
            },
            key: Key::Map(field.into()),
            pred: match forgery {
                Forgery::UnknownPredecessor => SortedVec::from(vec![unknown]),
                // What the change before it wrote.
                _ if after.is_some() && deletes.is_none() => SortedVec::from(vec![OpId::new(1, &actor)]),
                _ => SortedVec::new(),
            },
            insert: false,
        };
        let start_op = match forgery {
            Forgery::StartOp => *dice.pick(&[OP_COUNTER_MAX, u64::from(u32::MAX), 1 << 33, u64::MAX]),
            _ => after.map_or(1, |(_, number)| number + 1),
        };
        let bytes = author.to_bytes();
        let role = if forgery == Forgery::Authority { Role::Authority } else { Role::Device };
        let raw = RawChange::from(ExpandedChange {
            operations: vec![op],
            actor_id: actor,
            hash: None,
            seq: match forgery {
                Forgery::SeqGap => *dice.pick(&[3, 4, 1 << 30]),
                _ => after.map_or(1, |(_, number)| number + 1),
            },
            start_op: NonZeroU64::new(start_op).expect("not zero"),
            time,
            message: Some(
                Note { role, tx: *tx, revives: *deletes == Some(false), ..Note::default() }.to_message(),
            ),
            deps: match forgery {
                Forgery::MissingDependency => vec![ChangeHash([3; 32])],
                Forgery::NoPredecessor => Vec::new(),
                _ => after.iter().map(|(hash, _)| *hash).collect(),
            },
            // The author stands in an actor's first change.
            extra_bytes: match after {
                None => [&[1, bytes.len() as u8][..], &bytes].concat(),
                Some(_) => Vec::new(),
            },
            author: None,
        });
        (raw.hash(), raw.raw_bytes().to_vec())
    }
}

pub(crate) fn token(role: GrantRole, user: &str, expires: u64) -> String {
    format!("{}:{user}:{expires}", role.name())
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
