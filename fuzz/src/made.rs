//! Made-up inputs, the same ones in every run: rings that are nearly right, and changes of inputs that are.

/// Xorshift: small, and the same everywhere.
#[derive(Clone, Debug)]
pub struct Dice(u64);

impl Dice {
    /// Dice that fall alike for the same seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// 53 bits.
    pub fn roll(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 >> 11
    }

    /// A number below `limit`.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.roll() % limit
    }

    /// True once in `count` times.
    pub fn one_in(&mut self, count: u64) -> bool {
        self.below(count) == 0
    }

    /// Any byte.
    pub fn byte(&mut self) -> u8 {
        self.roll() as u8
    }

    fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len() as u64) as usize]
    }

    /// A descriptor of a table of `size` entries, as its 16 bytes; in a split one `next` is in the last two.
    fn desc(&mut self, size: u16, index: u16, packed: bool) -> [u8; 16] {
        let addr = if self.one_in(40) {
            self.of(&[u64::MAX, 4096, 1 << 40, u64::MAX - 15])
        } else {
            self.below(4000)
        };
        let len = if self.one_in(30) {
            self.of(&[0, u32::MAX, 4097, 17])
        } else {
            1 + self.below(90) as u32
        };
        let more = index + 1 < size && !self.one_in(3);
        let mut flags = u16::from(more) | if index > size / 2 { 2 } else { 0 };
        if self.one_in(12) {
            flags ^= 2;
        }
        let (mut addr, mut len) = (addr, len);
        if self.one_in(10) {
            flags = 4 | u16::from(self.one_in(8));
            addr = 512 + self.below(3) * 8;
            len = 16 * (1 + self.below(6) as u32) + u32::from(self.one_in(12));
        }
        if packed {
            flags |= if self.one_in(6) {
                self.of(&[0, 0x8080, 0x8000])
            } else {
                0x80
            };
        }
        let last = if self.one_in(20) {
            self.roll() as u16 % (size + 2)
        } else {
            index + 1
        };
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        let (low, high) = if packed { (last, flags) } else { (flags, last) };
        bytes[12..14].copy_from_slice(&low.to_le_bytes());
        bytes[14..].copy_from_slice(&high.to_le_bytes());
        bytes
    }

    /// An input of the targets that begin with `setup`: a ring and tables that a driver could have written.
    pub fn ring(&mut self, packed: bool) -> Vec<u8> {
        let choice = self.byte() & !33 | u8::from(packed) | if self.one_in(4) { 32 } else { 0 };
        let size_byte = self.byte();
        let size = if packed {
            1 + u16::from(size_byte % 9)
        } else {
            1 << (size_byte % 4)
        };
        let start: u16 = if choice & 32 == 0 {
            0
        } else {
            self.of(&[0, 1, 0xffff, 0x8000, 0x8001, 3])
        };
        let mut image = vec![0; 700];
        for index in 0..size {
            let at = usize::from(index) * 16;
            image[at..at + 16].copy_from_slice(&self.desc(size, index, packed));
        }
        for index in 0..8 {
            let at = 512 + usize::from(index) * 16;
            let mut entry = self.desc(8, index, packed);
            if !self.one_in(4) {
                entry[if packed { 14 } else { 12 }] &= !4;
            }
            image[at..at + 16].copy_from_slice(&entry);
        }
        if !packed {
            let avail = 16 * usize::from(size);
            let ahead = if self.one_in(12) {
                self.roll() as u16
            } else {
                self.below(u64::from(size) + 1) as u16
            };
            image[avail + 2..avail + 4].copy_from_slice(&start.wrapping_add(ahead).to_le_bytes());
            for slot in 0..usize::from(size) {
                let head = if self.one_in(15) {
                    self.roll() as u16
                } else {
                    self.below(u64::from(size)) as u16
                };
                image[avail + 4 + 2 * slot..][..2].copy_from_slice(&head.to_le_bytes());
            }
        }
        let mut bytes = vec![choice, size_byte];
        bytes.extend(start.to_le_bytes());
        bytes.extend((image.len() as u16).to_le_bytes());
        bytes.extend(image);
        bytes.extend((0..self.below(60)).map(|_| self.byte()));
        bytes
    }

    /// `count` bytes.
    pub fn bytes(&mut self, count: u64) -> Vec<u8> {
        (0..count).map(|_| self.byte()).collect()
    }

    /// Change `input` in one to four places, as libFuzzer does; parts of `other` may come in. `room` bounds its length.
    pub fn change(&mut self, input: &mut Vec<u8>, other: &[u8], room: usize) {
        for _ in 0..1 + self.below(4) {
            let len = input.len() as u64;
            let at = self.below(len.max(1)) as usize;
            match self.below(8) {
                0 | 1 if len > 0 => input[at] ^= 1 << self.below(8),
                2 | 3 if len > 0 => input[at] = self.byte(),
                4 if len > 0 => input[at] = self.of(&[0, 1, 2, 4, 7, 0x7f, 0x80, 0xff]),
                5 if len > 8 => {
                    let from = self.below(len - 8) as usize;
                    let count = 1 + self.below(8) as usize;
                    let to = at.min(input.len() - count);
                    input.copy_within(from..from + count, to);
                }
                6 if !other.is_empty() => {
                    input.truncate(at);
                    let from = at.min(other.len());
                    input.extend_from_slice(&other[from..]);
                }
                _ => {
                    let count = 1 + self.below(12);
                    for _ in 0..count {
                        input.push(self.byte());
                    }
                }
            }
        }
        input.truncate(room);
    }
}
