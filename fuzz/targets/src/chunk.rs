//! A change as its parts, so that each can be changed and the checksum be right again.

use sha2::{Digest as _, Sha256};

/// A plain change chunk, taken apart. What [`Chunk::write`] gives need not be a change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Hashes of what it depends on.
    pub deps: Vec<[u8; 32]>,
    /// Its actor.
    pub actor: Vec<u8>,
    /// Its place among the actor's changes.
    pub seq: u64,
    /// Counter of its first operation.
    pub start_op: u64,
    /// Its time.
    pub time: i64,
    /// Its commit message.
    pub message: Vec<u8>,
    /// Actors that its operations name beside its own.
    pub others: Vec<Vec<u8>>,
    /// Columns of its operations: specification and data.
    pub columns: Vec<(u64, Vec<u8>)>,
    /// What follows.
    pub extra: Vec<u8>,
}

/// Specification of the column of actions.
pub const ACTIONS: u64 = 0x42;
/// Specification of the column of predecessors' actors.
pub const PREDECESSOR_ACTORS: u64 = 0x71;

/// A chunk of type 1 around `body`, with the checksum that belongs to it.
pub fn seal(body: &[u8]) -> Vec<u8> {
    let mut hashed = vec![1];
    put_unsigned(body.len() as u64, &mut hashed);
    hashed.extend_from_slice(body);
    let digest = Sha256::digest(&hashed);
    let mut chunk = vec![0x85, 0x6f, 0x4a, 0x83];
    chunk.extend_from_slice(&digest[..4]);
    chunk.extend(hashed);
    chunk
}

/// What [`seal`] was given, if the bytes are laid out so.
pub fn body_of(chunk: &[u8]) -> Option<&[u8]> {
    let mut reader = Reader(chunk);
    reader.take(9)?;
    let length = reader.unsigned()?;
    (reader.0.len() as u64 == length).then_some(reader.0)
}

impl Chunk {
    /// Takes a change apart.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let mut body = Reader(body_of(bytes)?);
        let deps = (0..body.unsigned()?)
            .map(|_| body.take(32)?.try_into().ok())
            .collect::<Option<Vec<[u8; 32]>>>()?;
        let actor = body.prefixed()?.to_vec();
        let (seq, start_op, time) = (body.unsigned()?, body.unsigned()?, body.signed()?);
        let message = body.prefixed()?.to_vec();
        let others =
            (0..body.unsigned()?).map(|_| Some(body.prefixed()?.to_vec())).collect::<Option<Vec<_>>>()?;
        let layout = (0..body.unsigned()?)
            .map(|_| Some((body.unsigned()?, body.unsigned()?)))
            .collect::<Option<Vec<_>>>()?;
        let columns = layout
            .into_iter()
            .map(|(kind, length)| Some((kind, body.take(usize::try_from(length).ok()?)?.to_vec())))
            .collect::<Option<Vec<_>>>()?;
        Some(Self { deps, actor, seq, start_op, time, message, others, columns, extra: body.0.to_vec() })
    }

    /// The bytes, with the checksum that belongs to them.
    pub fn write(&self) -> Vec<u8> {
        let mut body = Vec::new();
        put_unsigned(self.deps.len() as u64, &mut body);
        self.deps.iter().for_each(|dep| body.extend_from_slice(dep));
        put_prefixed(&self.actor, &mut body);
        put_unsigned(self.seq, &mut body);
        put_unsigned(self.start_op, &mut body);
        put_signed(self.time, &mut body);
        put_prefixed(&self.message, &mut body);
        put_unsigned(self.others.len() as u64, &mut body);
        self.others.iter().for_each(|other| put_prefixed(other, &mut body));
        put_unsigned(self.columns.len() as u64, &mut body);
        for (kind, data) in &self.columns {
            put_unsigned(*kind, &mut body);
            put_unsigned(data.len() as u64, &mut body);
        }
        self.columns.iter().for_each(|(_, data)| body.extend_from_slice(data));
        body.extend_from_slice(&self.extra);
        seal(&body)
    }

    /// The data of a column.
    pub fn column(&mut self, kind: u64) -> Option<&mut Vec<u8>> {
        self.columns.iter_mut().find(|(found, _)| *found == kind).map(|(_, data)| data)
    }
}

/// Appends a LEB128 number.
pub fn put_unsigned(mut value: u64, out: &mut Vec<u8>) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Appends a signed LEB128 number.
pub fn put_signed(mut value: i64, out: &mut Vec<u8>) {
    loop {
        let byte = (value & 0x7f) as u8;
        value >>= 7;
        if (value == 0 && byte & 0x40 == 0) || (value == -1 && byte & 0x40 != 0) {
            out.push(byte);
            return;
        }
        out.push(byte | 0x80);
    }
}

fn put_prefixed(bytes: &[u8], out: &mut Vec<u8>) {
    put_unsigned(bytes.len() as u64, out);
    out.extend_from_slice(bytes);
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    fn number(&mut self) -> Option<(u64, u32)> {
        let mut value = 0;
        for place in 0..10 {
            let byte = self.take(1)?[0];
            value |= u64::from(byte & 0x7f) << (7 * place);
            if byte & 0x80 == 0 {
                return Some((value, 7 * (place + 1)));
            }
        }
        None
    }

    fn unsigned(&mut self) -> Option<u64> {
        Some(self.number()?.0)
    }

    fn signed(&mut self) -> Option<i64> {
        let (value, bits) = self.number()?;
        let unused = 64u32.saturating_sub(bits);
        Some((value << unused) as i64 >> unused)
    }

    fn prefixed(&mut self) -> Option<&'a [u8]> {
        let length = usize::try_from(self.unsigned()?).ok()?;
        self.take(length)
    }
}
