//! What the chains of a case look like.

/// Lengths of the buffers of a chain.
#[derive(Debug)]
pub struct Shape {
    pub name: &'static str,
    pub readable: &'static [u32],
    pub writable: &'static [u32],
    pub indirect: bool,
}

impl Shape {
    /// Descriptors of the ring that one chain takes.
    pub fn slots(&self) -> u16 {
        let count = self.readable.len() + self.writable.len();
        if self.indirect {
            1
        } else {
            u16::try_from(count).expect("it is small")
        }
    }

    pub fn bytes(&self) -> (u64, u64) {
        let sum = |lens: &[u32]| lens.iter().map(|&len| u64::from(len)).sum();
        (sum(self.readable), sum(self.writable))
    }
}

/// Every shape there is.
pub static ALL: [Shape; 4] = [
    Shape {
        name: "48+12",
        readable: &[48],
        writable: &[12],
        indirect: false,
    },
    Shape {
        name: "4x4096+12",
        readable: &[4096; 4],
        writable: &[12],
        indirect: false,
    },
    Shape {
        name: "table-1",
        readable: &[48],
        writable: &[],
        indirect: true,
    },
    Shape {
        name: "table-4",
        readable: &[48; 3],
        writable: &[12],
        indirect: true,
    },
];
