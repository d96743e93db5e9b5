/// Choices, drawn from bytes. When they run out every choice is the first one.
#[derive(Clone, Debug)]
pub struct Draw<'a>(&'a [u8]);

impl<'a> Draw<'a> {
    /// Draws from these bytes.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// One byte.
    pub fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    /// A number of 16 bits.
    pub fn word(&mut self) -> usize {
        usize::from(self.byte()) << 8 | usize::from(self.byte())
    }

    /// A number below a bound, which is at least one.
    pub fn below(&mut self, bound: usize) -> usize {
        if bound <= 256 { usize::from(self.byte()) % bound.max(1) } else { self.word() % bound }
    }

    /// Whether something that happens once in `n` times does.
    pub fn one_in(&mut self, n: u8) -> bool {
        self.byte() % n.max(1) == 1 % n.max(1)
    }

    /// One of some.
    pub fn of<'b, T>(&mut self, some: &'b [T]) -> &'b T {
        &some[self.below(some.len())]
    }

    /// A number of 64 bits, those at the edges more often than others.
    pub fn number(&mut self) -> u64 {
        const EDGES: [u64; 12] = [
            0,
            1,
            2,
            127,
            128,
            1 << 31,
            (1 << 31) - 1,
            u32::MAX as u64,
            1 << 47,
            i64::MAX as u64,
            1 << 63,
            u64::MAX,
        ];
        match self.byte() {
            edge if edge < 192 => EDGES[usize::from(edge) % EDGES.len()].wrapping_add(u64::from(edge / 64)),
            _ => (0..8).fold(0, |number, _| number << 8 | u64::from(self.byte())),
        }
    }

    /// At most `count` bytes.
    pub fn take(&mut self, count: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        taken
    }

    /// All that is left.
    pub fn rest(&mut self) -> &'a [u8] {
        self.take(usize::MAX)
    }
}
