//! `Model`: guest memory made of loom's atomics, so that the real ring code runs under every order of two threads that the
//! memory model allows.
//!
//! Each ring word is one atomic, each payload word a cell of which loom reports data races. A model can be *weakened*: then
//! one kind of ordering is not what the ring code asked for, and the scenario must fail, or it would prove nothing.
//!
//! loom tries another order where an access meets the *last* access of another thread to the same word. In a packed ring both
//! ends load and store the same flags, so the last access is often one's own and orders would be left out. Hence each
//! end has a side of the memory, and what one end loads meets what the other stores in a word beside it: `pace`.

use std::collections::BTreeMap;

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicU64, Ordering, fence};
use virtio_test::mem::{Access, At, MemoryError, Want};
use virtio_test::ring::RingLayout;

/// What is less than was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weak {
    Nothing,
    /// Acquire loads are relaxed.
    Acquire,
    /// Release stores are relaxed.
    Release,
    /// There are no fences.
    Fence,
}

pub const REQUEST: u64 = 0x1000;
pub const RESPONSE: u64 = 0x1008;

pub struct Model {
    words: BTreeMap<u64, AtomicU64>,
    payload: [UnsafeCell<u64>; 2],
    /// Where loads of the driver meet stores of the device, and the other way round; only with a packed ring.
    pace: Option<[AtomicU64; 2]>,
    weak: Weak,
}

/// The memory as one end sees it.
#[derive(Clone)]
pub struct Side {
    model: Arc<Model>,
    driver: bool,
}

// SAFETY: words are atomics; of the payload cells loom itself reports every access that is not ordered.
unsafe impl Sync for Model {}
// SAFETY: as above; it holds no pointers.
unsafe impl Send for Model {}

impl Model {
    /// The words of one queue, all zero.
    pub fn new(layout: &RingLayout, weak: Weak) -> Self {
        let mut words = BTreeMap::new();
        for field in layout.fields() {
            // A split descriptor is two words of 8 bytes.
            let wide = !layout.packed && field.name.starts_with("desc.");
            for index in 0..field.count {
                let address = field.address + index * field.stride;
                words
                    .entry(if wide { address & !7 } else { address })
                    .or_insert_with(|| AtomicU64::new(0));
            }
        }
        Self {
            words,
            payload: [UnsafeCell::new(0), UnsafeCell::new(0)],
            pace: layout.packed.then(|| [AtomicU64::new(0), AtomicU64::new(0)]),
            weak,
        }
    }

    /// Both sides: the driver's and the device's.
    pub fn sides(self) -> (Side, Side) {
        let model = Arc::new(self);
        let side = |driver| Side {
            model: Arc::clone(&model),
            driver,
        };
        (side(true), side(false))
    }

    fn word(&self, at: At, off: u64) -> Result<&AtomicU64, MemoryError> {
        let gpa = at.gpa + off;
        self.words.get(&gpa).ok_or(MemoryError::Unmapped { gpa })
    }

    fn cell(&self, at: At, off: u64) -> Result<&UnsafeCell<u64>, MemoryError> {
        match at.gpa + off {
            REQUEST => Ok(&self.payload[0]),
            RESPONSE => Ok(&self.payload[1]),
            gpa => Err(MemoryError::Unmapped { gpa }),
        }
    }

    fn unless(&self, weak: Weak, order: Ordering) -> Ordering {
        if self.weak == weak { Ordering::Relaxed } else { order }
    }

    /// Set a word before the threads begin.
    pub fn set(&self, gpa: u64, value: u64) {
        self.words[&gpa].store(value, Ordering::SeqCst);
    }
}

impl Side {
    fn meet(&self, store: bool) {
        if let Some(pace) = &self.model.pace {
            pace[usize::from(self.driver == store)].store(0, Ordering::Relaxed);
        }
    }

    /// What is in a word, by whoever looks last.
    pub fn peek(&self, gpa: u64) -> u64 {
        self.model.words[&gpa].load(Ordering::SeqCst)
    }

    /// Set a word, as a driver does after a reset.
    pub fn set(&self, gpa: u64, value: u64) {
        self.model.set(gpa, value);
    }
}

macro_rules! load {
    ($name:ident, $word:ty) => {
        fn $name(&self, at: At, off: u64) -> Result<$word, MemoryError> {
            self.meet(false);
            Ok(self.model.word(at, off)?.load(Ordering::Relaxed) as $word)
        }
    };
}

macro_rules! store {
    ($name:ident, $word:ty) => {
        fn $name(&self, at: At, off: u64, value: $word) -> Result<(), MemoryError> {
            self.meet(true);
            self.model
                .word(at, off)?
                .store(u64::from(value), Ordering::Relaxed);
            Ok(())
        }
    };
}

impl Access for Side {
    fn epoch(&self) -> u64 {
        0
    }

    fn resolve(&self, gpa: u64, _len: u64, _want: Want) -> Result<At, MemoryError> {
        Ok(At::unresolved(gpa))
    }

    fn intact(&self, _gpa: u64, _len: u64) -> Result<(), MemoryError> {
        Ok(())
    }

    load!(load_u16, u16);
    load!(load_u32, u32);
    load!(load_u64, u64);
    store!(store_u16, u16);
    store!(store_u32, u32);
    store!(store_u64, u64);

    fn load_u16_acquire(&self, at: At, off: u64) -> Result<u16, MemoryError> {
        self.meet(false);
        let order = self.model.unless(Weak::Acquire, Ordering::Acquire);
        Ok(self.model.word(at, off)?.load(order) as u16)
    }

    fn store_u16_release(&self, at: At, off: u64, value: u16) -> Result<(), MemoryError> {
        self.meet(true);
        let order = self.model.unless(Weak::Release, Ordering::Release);
        self.model.word(at, off)?.store(u64::from(value), order);
        Ok(())
    }

    fn fence(&self) {
        if self.model.weak != Weak::Fence {
            fence(Ordering::SeqCst);
        }
    }

    fn read(&self, at: At, off: u64, dst: &mut [u8]) -> Result<(), MemoryError> {
        // SAFETY: loom reports a write that is not ordered with this.
        let value = self.model.cell(at, off)?.with(|value| unsafe { *value });
        dst.copy_from_slice(&value.to_le_bytes());
        Ok(())
    }

    fn write(&self, at: At, off: u64, src: &[u8]) -> Result<(), MemoryError> {
        let value = u64::from_le_bytes(src.try_into().expect("payload is 8 bytes"));
        // SAFETY: loom reports an access that is not ordered with this.
        self.model.cell(at, off)?.with_mut(|cell| unsafe { *cell = value });
        Ok(())
    }

    unsafe fn read_raw(&self, at: At, off: u64, dst: *mut u8, len: usize) -> Result<(), MemoryError> {
        // SAFETY: our caller's promise; the scenarios pass slices of their own.
        self.read(at, off, unsafe { std::slice::from_raw_parts_mut(dst, len) })
    }

    unsafe fn write_raw(&self, at: At, off: u64, src: *const u8, len: usize) -> Result<(), MemoryError> {
        // SAFETY: as above.
        self.write(at, off, unsafe { std::slice::from_raw_parts(src, len) })
    }

    fn fill(&self, at: At, off: u64, _len: u64, _value: u8) -> Result<(), MemoryError> {
        Err(MemoryError::Unmapped { gpa: at.gpa + off })
    }
}
