//! How much the columns of a change claim to hold, counted without reading them out.
//!
//! Columns are run-length encoded: ten bytes can stand for 2^62 operations, and Automerge walks
//! over every one of them to parse a change. One such change would keep whoever parses it busy
//! for ever. So the runs are added up first, in time proportional to the bytes.
//!
//! A key is written once for a run of operations, and once for each of them when they are read out:
//! a megabyte can stand for a terabyte. So the bytes of texts are added up as well.

/// The longest actor that a change may name, well above those that devices have: read out, each
/// operation has copies of those that it names.
const ACTOR_BYTES_MAX: u64 = 64;
/// What an operation weighs at least, in bytes: about what it takes once it is in a document.
const ITEM_BYTES: u64 = 32;

/// What the columns of a change claim to hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Claim {
    /// Items of the fullest column: no fewer than the operations, and no fewer than the
    /// predecessors of them all.
    pub(crate) items: u64,
    /// Bytes of all texts in columns, of each as often as it stands there when it is read out.
    pub(crate) text_bytes: u64,
}

impl Claim {
    /// What the operations weigh, in bytes.
    pub(crate) fn weight(self) -> u64 {
        self.items.saturating_mul(ITEM_BYTES).saturating_add(self.text_bytes)
    }
}

/// What a change chunk claims. `None` where the bytes are not laid out as a chunk of ours is.
pub(crate) fn claim(chunk: &[u8]) -> Option<Claim> {
    let mut head = Bytes(chunk);
    // Magic, checksum, type.
    head.take(9)?;
    let length = head.unsigned()?;
    // Whoever parses it cuts it at the same place, so a second form of one change can't be.
    if head.0.len() as u64 != length {
        return None;
    }
    let mut body = head;
    let deps = body.unsigned()?;
    body.take(deps.checked_mul(32)?)?;
    body.actor()?;
    // Sequence, first operation, time.
    for _ in 0..3 {
        body.unsigned()?;
    }
    let message = body.unsigned()?;
    body.take(message)?;
    for _ in 0..body.unsigned()? {
        body.actor()?;
    }
    let mut columns = Vec::new();
    for _ in 0..body.unsigned()? {
        columns.push((body.unsigned()?, body.unsigned()?));
    }
    let mut claim = Claim::default();
    for (kind, length) in columns {
        let column = Bytes(body.take(length)?).column(kind)?;
        claim.items = claim.items.max(column.items);
        claim.text_bytes = claim.text_bytes.saturating_add(column.text_bytes);
    }
    Some(claim)
}

/// Kinds of columns, as the lowest three bits of their specification say.
const DELTAS: u64 = 3;
const BOOLEANS: u64 = 4;
const STRINGS: u64 = 5;
const RAW: u64 = 7;

/// The longest number: 64 bits, seven to a byte.
const NUMBER_BYTES_MAX: usize = 10;

#[derive(Clone, Copy)]
struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    fn take(&mut self, count: u64) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(usize::try_from(count).ok()?)?;
        self.0 = rest;
        Some(taken)
    }

    /// A LEB128 number as its bits, and how many there are.
    fn number(&mut self) -> Option<(u64, u32)> {
        let mut value = 0;
        for place in 0..NUMBER_BYTES_MAX {
            let byte = *self.take(1)?.first()?;
            value |= u64::from(byte & 0x7f) << (7 * place);
            if byte & 0x80 == 0 {
                return Some((value, 7 * (place as u32 + 1)));
            }
        }
        None
    }

    fn unsigned(&mut self) -> Option<u64> {
        self.number().map(|(value, _)| value)
    }

    fn signed(&mut self) -> Option<i64> {
        let (value, bits) = self.number()?;
        let unused = 64u32.saturating_sub(bits);
        Some((value << unused) as i64 >> unused)
    }

    fn actor(&mut self) -> Option<()> {
        let length = self.unsigned().filter(|length| *length <= ACTOR_BYTES_MAX)?;
        self.take(length).map(drop)
    }

    /// Skips a value; returns how long it is if it is a text.
    fn skip_value(&mut self, kind: u64) -> Option<u64> {
        match kind {
            STRINGS => {
                let length = self.unsigned()?;
                self.take(length).map(|_| length)
            }
            DELTAS => self.signed().map(|_| 0),
            _ => self.unsigned().map(|_| 0),
        }
    }

    /// What a column claims to hold.
    fn column(mut self, specification: u64) -> Option<Claim> {
        let kind = specification & 7;
        let mut claim = Claim::default();
        if kind == RAW {
            return Some(claim);
        }
        while !self.0.is_empty() {
            let run = if kind == BOOLEANS {
                self.unsigned()?
            } else {
                match self.signed()? {
                    // A run of nulls.
                    0 => self.unsigned()?,
                    run if run > 0 => {
                        let all = self.skip_value(kind)?.saturating_mul(run as u64);
                        claim.text_bytes = claim.text_bytes.saturating_add(all);
                        run as u64
                    }
                    literals => {
                        for _ in 0..literals.unsigned_abs() {
                            claim.text_bytes = claim.text_bytes.saturating_add(self.skip_value(kind)?);
                        }
                        literals.unsigned_abs()
                    }
                }
            };
            claim.items = claim.items.saturating_add(run);
        }
        Some(claim)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::change::Change;

    fn unsigned(mut value: u64, out: &mut Vec<u8>) {
        while value >= 0x80 {
            out.push(value as u8 | 0x80);
            value >>= 7;
        }
        out.push(value as u8);
    }

    fn signed(value: i64) -> Vec<u8> {
        let mut out = Vec::new();
        let mut rest = value;
        loop {
            let byte = (rest & 0x7f) as u8;
            rest >>= 7;
            if (rest == 0 && byte & 0x40 == 0) || (rest == -1 && byte & 0x40 != 0) {
                out.push(byte);
                return out;
            }
            out.push(byte | 0x80);
        }
    }

    /// A change that sets the key `a` to null, or claims to do so `times` times.
    fn puts(times: i64) -> Vec<u8> {
        puts_at("a", 1, times)
    }

    /// The same at another key, by an actor of so many bytes.
    fn puts_at(key: &str, actor_bytes: usize, times: i64) -> Vec<u8> {
        let mut keys = signed(times);
        unsigned(key.len() as u64, &mut keys);
        keys.extend(key.as_bytes());
        let run = |value: u8| [signed(times), vec![value]].concat();
        let columns: [(u64, Vec<u8>); 5] = [
            // The key.
            (0x15, keys),
            // Whether it inserts: never.
            (0x34, {
                let mut runs = Vec::new();
                unsigned(times as u64, &mut runs);
                runs
            }),
            // The action: put.
            (0x42, run(1)),
            // The value: null, without bytes.
            (0x56, run(0)),
            // Predecessors: none.
            (0x70, run(0)),
        ];
        let mut body = vec![0, actor_bytes as u8];
        body.extend(vec![7; actor_bytes]);
        body.extend([1, 1, 0, 1, b'd', 0, columns.len() as u8]);
        for (kind, data) in &columns {
            unsigned(*kind, &mut body);
            unsigned(data.len() as u64, &mut body);
        }
        columns.iter().for_each(|(_, data)| body.extend(data));
        let mut chunk = vec![0x85, 0x6f, 0x4a, 0x83, 0, 0, 0, 0, 1];
        unsigned(body.len() as u64, &mut chunk);
        chunk.extend(body);
        chunk
    }

    #[test]
    fn what_is_counted_is_what_the_library_finds() {
        for times in [1, 2, 1000] {
            let bytes = puts(times);
            let claimed = claim(&bytes).unwrap();
            assert_eq!((claimed.items, claimed.text_bytes), (times as u64, times as u64));
            assert_eq!(claimed.weight(), 33 * times as u64);
            assert_eq!(automerge::Change::from_bytes(bytes).unwrap().len(), times as usize);
        }
    }

    /// Parsed by the library it would take years: 70 bytes from anybody who is signed in would
    /// stop a relay, and every device that got them.
    #[test]
    fn a_change_that_claims_endless_operations_is_refused_at_once() {
        for times in [1_000_001, 1 << 40, i64::MAX] {
            let error = Change::parse(&puts(times)).unwrap_err();
            assert_eq!(error.0, "its columns claim more than a change may hold", "{times}");
        }
    }

    /// Each operation that is read out has its key: a megabyte claimed a terabyte, and who read it was
    /// gone.
    #[test]
    fn a_long_key_that_is_written_to_often_is_refused_before_it_is_read_out() {
        let key = "k".repeat(1 << 20);
        for times in [17, 900_000] {
            let error = Change::parse(&puts_at(&key, 1, times)).unwrap_err();
            assert_eq!(error.0, "its columns claim more than a change may hold", "{times}");
        }
        let claimed = claim(&puts_at(&key, 1, 16)).unwrap();
        assert_eq!((claimed.items, claimed.text_bytes), (16, 16 << 20));
        assert!(claim(&puts_at("a", 64, 1)).is_some());
        assert_eq!(claim(&puts_at("a", 65, 1)), None, "no actor is so long");
    }

    #[test]
    fn no_bytes_make_the_count_fail_but_by_saying_so() {
        let bytes = puts(3);
        for end in 0..bytes.len() {
            assert_eq!(claim(&bytes[..end]), None, "{end}");
        }
        assert_eq!(claim(&[bytes, vec![0]].concat()), None, "nothing follows a change");
        assert_eq!(claim(&[0xff; 60]), None);
    }
}
