//! Memory of somebody else, who reads and writes it for us and may fail to.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use virtio_test::mem::{Backing, MAX_TRANSFER, RegionSpec, Transfer, TransferFailed, transferring};

/// Which transfers fail, counted from 0: none from here on.
pub const NEVER: u64 = u64::MAX;

/// Somebody else's memory: bytes behind a lock, a count of transfers, and one that fails.
#[derive(Debug)]
pub struct Far {
    pub gpa: u64,
    pub bytes: Mutex<Vec<u8>>,
    pub count: AtomicU64,
    pub fails: AtomicU64,
    /// Whether all that come after it fail too.
    pub for_good: bool,
    /// Lengths that were asked for.
    pub lengths: Mutex<Vec<usize>>,
}

impl Far {
    pub fn new(gpa: u64, size: usize) -> Arc<Self> {
        Self::failing(gpa, size, NEVER, false)
    }

    pub fn failing(gpa: u64, size: usize, fails: u64, for_good: bool) -> Arc<Self> {
        Arc::new(Self {
            gpa,
            bytes: Mutex::new(vec![0; size]),
            count: AtomicU64::new(0),
            fails: AtomicU64::new(fails),
            for_good,
            lengths: Mutex::new(Vec::new()),
        })
    }

    pub fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    pub fn spec(self: &Arc<Self>, writable: bool) -> RegionSpec {
        RegionSpec {
            gpa: self.gpa,
            size: self.bytes.lock().unwrap().len() as u64,
            backing: Backing::Remote {
                transfer: Arc::clone(self) as _,
                writable,
            },
        }
    }

    fn one(&self, gpa: u64, len: usize) -> Result<usize, TransferFailed> {
        assert!(transferring());
        assert!(len > 0 && len <= MAX_TRANSFER);
        let number = self.count.fetch_add(1, Ordering::Relaxed);
        self.lengths.lock().unwrap().push(len);
        let fails = self.fails.load(Ordering::Relaxed);
        if number == fails || (self.for_good && number > fails) {
            return Err(TransferFailed);
        }
        Ok(usize::try_from(gpa - self.gpa).unwrap())
    }
}

impl Transfer for Far {
    fn read(&self, gpa: u64, dst: &mut [u8]) -> Result<(), TransferFailed> {
        let start = self.one(gpa, dst.len())?;
        dst.copy_from_slice(&self.bytes.lock().unwrap()[start..start + dst.len()]);
        Ok(())
    }

    fn write(&self, gpa: u64, src: &[u8]) -> Result<(), TransferFailed> {
        let start = self.one(gpa, src.len())?;
        self.bytes.lock().unwrap()[start..start + src.len()].copy_from_slice(src);
        Ok(())
    }
}
