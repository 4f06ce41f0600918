//! Memory that counts what is loaded, and stops where something is stored that nobody allowed.

use std::cell::{Cell, RefCell};

use virtio_test::mem::{Access, Area, At, DescStores, Descs, HeadStores, MemoryError, Useds, Want, Words};

/// A stretch of guest addresses: first byte and length.
pub type Span = (u64, u64);

/// See the module's head.
pub struct Watched<'a, A> {
    mem: &'a A,
    loads: Cell<u64>,
    stores: Cell<u64>,
    allowed: RefCell<Vec<Span>>,
    open: bool,
}

impl<'a, A: Access> Watched<'a, A> {
    /// Watch `mem`; nothing may be stored yet.
    pub fn new(mem: &'a A) -> Self {
        Self {
            mem,
            loads: Cell::new(0),
            stores: Cell::new(0),
            allowed: RefCell::default(),
            open: false,
        }
    }

    /// Let whoever wants to reach words directly do so, past the watch: if `mem` does.
    pub fn open(self) -> Self {
        Self { open: true, ..self }
    }

    fn beside<T>(&self, words: impl FnOnce(&'a A) -> Option<T>) -> Option<T> {
        if self.open { words(self.mem) } else { None }
    }

    /// From now on stores may go here, and nowhere else.
    pub fn allow(&self, spans: impl IntoIterator<Item = Span>) {
        let mut allowed = self.allowed.borrow_mut();
        allowed.clear();
        allowed.extend(spans);
    }

    /// Loads and copies out so far.
    pub fn loads(&self) -> u64 {
        self.loads.get()
    }

    /// Stores and copies in so far.
    pub fn stores(&self) -> u64 {
        self.stores.get()
    }

    fn load(&self) {
        self.loads.set(self.loads.get() + 1);
    }

    fn store(&self, at: At, off: u64, len: u64) {
        self.stores.set(self.stores.get() + 1);
        let gpa = at.gpa.wrapping_add(off);
        let inside = |&(first, size): &Span| {
            gpa.checked_sub(first)
                .and_then(|skip| size.checked_sub(skip))
                .is_some_and(|left| len <= left)
        };
        assert!(
            len == 0 || self.allowed.borrow().iter().any(inside),
            "{len} bytes are stored at {gpa:#x}, where nothing may be"
        );
    }
}

macro_rules! load {
    ($name:ident, $word:ty) => {
        fn $name(&self, at: At, off: u64) -> Result<$word, MemoryError> {
            self.load();
            self.mem.$name(at, off)
        }
    };
}

macro_rules! store {
    ($name:ident, $word:ty) => {
        fn $name(&self, at: At, off: u64, value: $word) -> Result<(), MemoryError> {
            self.store(at, off, size_of::<$word>() as u64);
            self.mem.$name(at, off, value)
        }
    };
}

impl<A: Access> Access for Watched<'_, A> {
    fn epoch(&self) -> u64 {
        self.mem.epoch()
    }

    fn resolve(&self, gpa: u64, len: u64, want: Want) -> Result<At, MemoryError> {
        self.mem.resolve(gpa, len, want)
    }

    fn intact(&self, gpa: u64, len: u64) -> Result<(), MemoryError> {
        self.mem.intact(gpa, len)
    }

    fn descs(&self, area: Area<16>) -> Descs<'_> {
        self.beside(|mem| Some(mem.descs(area))).unwrap_or(Words::none())
    }

    fn useds(&self, at: At) -> Option<Useds<'_>> {
        self.beside(|mem| mem.useds(at))
    }

    fn desc_stores(&self, at: At) -> Option<DescStores<'_>> {
        self.beside(|mem| mem.desc_stores(at))
    }

    fn head_stores(&self, at: At) -> Option<HeadStores<'_>> {
        self.beside(|mem| mem.head_stores(at))
    }

    load!(load_u16, u16);
    load!(load_u16_acquire, u16);
    load!(load_u32, u32);
    load!(load_u64, u64);
    store!(store_u16, u16);
    store!(store_u16_release, u16);
    store!(store_u32, u32);
    store!(store_u64, u64);

    fn fence(&self) {
        self.mem.fence();
    }

    fn read(&self, at: At, off: u64, dst: &mut [u8]) -> Result<(), MemoryError> {
        self.load();
        self.mem.read(at, off, dst)
    }

    fn write(&self, at: At, off: u64, src: &[u8]) -> Result<(), MemoryError> {
        self.store(at, off, src.len() as u64);
        self.mem.write(at, off, src)
    }

    unsafe fn read_raw(&self, at: At, off: u64, dst: *mut u8, len: usize) -> Result<(), MemoryError> {
        self.load();
        // SAFETY: our caller's promise, passed on.
        unsafe { self.mem.read_raw(at, off, dst, len) }
    }

    unsafe fn write_raw(&self, at: At, off: u64, src: *const u8, len: usize) -> Result<(), MemoryError> {
        self.store(at, off, len as u64);
        // SAFETY: our caller's promise, passed on.
        unsafe { self.mem.write_raw(at, off, src, len) }
    }

    fn fill(&self, at: At, off: u64, len: u64, value: u8) -> Result<(), MemoryError> {
        self.store(at, off, len);
        self.mem.fill(at, off, len, value)
    }
}
