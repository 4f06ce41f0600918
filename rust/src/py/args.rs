//! What Python hands in: whole numbers, buffers, fds.
//!
//! # Theory
//!
//! A number outside its type's range is an impossible value (`InvalidArgument`), not an overflow of ours. Buffers are
//! taken by raw pointer and never become slices: other threads may write to a `bytearray` or array meanwhile, and a
//! live view *is* guest memory. While a buffer is held its exporter neither frees nor moves it, with or without the
//! GIL, so copies may run detached.

use std::fmt::Display;
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};

use pyo3::buffer::PyUntypedBuffer;
use pyo3::exceptions::{PyOSError, PyOverflowError};
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use rustix::io::{Errno, fcntl_dupfd_cloexec};

use super::errors::InvalidArgument;

/// A refusal of the operating system, as Python knows it.
pub(crate) fn os_error(errno: Errno, text: String) -> PyErr {
    PyOSError::new_err((errno.raw_os_error(), text))
}

/// `InvalidArgument` with this text.
pub(crate) fn invalid(text: impl Display) -> PyErr {
    InvalidArgument::new_err(text.to_string())
}

/// A whole number type and its limits.
pub(crate) trait Whole: Display + for<'a, 'py> FromPyObject<'a, 'py, Error = PyErr> {
    /// Its smallest value.
    const LEAST: Self;
    /// Its largest value.
    const MOST: Self;
}

macro_rules! whole {
    ($($name:ty),*) => {
        $(impl Whole for $name {
            const LEAST: Self = <$name>::MIN;
            const MOST: Self = <$name>::MAX;
        })*
    };
}
whole!(u8, u16, u32, u64, u128, usize, i32);

/// A number argument: out of range is `InvalidArgument`.
#[derive(Clone, Copy)]
pub(crate) struct Int<T>(pub(crate) T);

impl<'a, 'py, T: Whole> FromPyObject<'a, 'py> for Int<T> {
    type Error = PyErr;

    fn extract(obj: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        obj.extract::<T>().map(Self).map_err(|error| {
            if error.is_instance_of::<PyOverflowError>(obj.py()) {
                invalid(format_args!("{} is not in {} to {}", &*obj, T::LEAST, T::MOST))
            } else {
                error
            }
        })
    }
}

/// Where bytes lie that a held buffer keeps in place.
#[derive(Clone, Copy)]
pub(crate) struct Raw {
    /// First byte.
    pub(crate) ptr: *mut u8,
    /// Number of bytes.
    pub(crate) len: usize,
}

// SAFETY: an address and a number; whoever dereferences it proves that the buffer is still held (M6).
unsafe impl Send for Raw {}
// SAFETY: as above.
unsafe impl Sync for Raw {}

impl Raw {
    /// Of a slice of ours, for as long as the caller keeps the slice.
    pub(crate) fn of(bytes: &mut [u8]) -> Self {
        Self {
            ptr: bytes.as_mut_ptr(),
            len: bytes.len(),
        }
    }

    /// Of an immutable object, for as long as the caller holds it; only to read from.
    #[inline]
    pub(crate) fn of_bytes(bytes: &Bound<'_, PyBytes>) -> Self {
        let data = bytes.as_bytes();
        Self {
            ptr: data.as_ptr().cast_mut(),
            len: data.len(),
        }
    }

    /// Row `row` of rows of `itemsize` bytes, when it lies wholly inside.
    pub(crate) fn row(self, row: usize, itemsize: usize) -> Option<Self> {
        let start = row.checked_mul(itemsize)?;
        let end = start.checked_add(itemsize)?;
        (end <= self.len).then(|| Self {
            ptr: self.ptr.wrapping_add(start),
            len: itemsize,
        })
    }
}

/// What keeps the bytes of an argument in place.
enum Keep<'py> {
    /// Immutable, so a reference to the object is enough.
    Bytes(#[expect(dead_code, reason = "held, not used")] Bound<'py, PyBytes>),
    /// Anything else with the buffer protocol.
    Buffer(#[expect(dead_code, reason = "held, not used")] PyUntypedBuffer),
}

/// A bytes-like argument to read from.
pub(crate) struct Input<'py> {
    raw: Raw,
    _keep: Keep<'py>,
}

impl Input<'_> {
    /// Its bytes; valid for reads while `self` lives (M6).
    pub(crate) const fn raw(&self) -> Raw {
        self.raw
    }

    /// A copy of its bytes.
    pub(crate) fn to_vec(&self) -> Vec<u8> {
        let mut out = vec![0; self.raw.len];
        self.copy_to(&mut out);
        out
    }

    /// Copy its bytes to `out`, if they are as many.
    pub(crate) fn copy_to(&self, out: &mut [u8]) -> bool {
        if out.len() != self.raw.len {
            return false;
        }
        // SAFETY: the source is valid for reads of `len` bytes while `self` holds the buffer (M6), the target has that
        // length and is ours.
        unsafe { out.as_mut_ptr().copy_from(self.raw.ptr, self.raw.len) };
        true
    }
}

impl<'py> FromPyObject<'_, 'py> for Input<'py> {
    type Error = PyErr;

    fn extract(obj: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        if let Ok(bytes) = obj.cast::<PyBytes>() {
            return Ok(Self {
                raw: Raw::of_bytes(&bytes),
                _keep: Keep::Bytes(bytes.to_owned()),
            });
        }
        let buffer = contiguous(&obj)?;
        let raw = Raw {
            ptr: buffer.buf_ptr().cast(),
            len: buffer.len_bytes(),
        };
        Ok(Self {
            raw,
            _keep: Keep::Buffer(buffer),
        })
    }
}

/// A bytes-like argument to write to.
pub(crate) struct Output {
    raw: Raw,
    _keep: PyUntypedBuffer,
}

impl Output {
    /// Its bytes; valid for reads and writes while `self` lives (M6).
    pub(crate) const fn raw(&self) -> Raw {
        self.raw
    }
}

impl FromPyObject<'_, '_> for Output {
    type Error = PyErr;

    fn extract(obj: Borrowed<'_, '_, PyAny>) -> PyResult<Self> {
        let buffer = contiguous(&obj)?;
        if buffer.readonly() {
            return Err(invalid(format_args!(
                "the {} to write to is read-only",
                obj.get_type().name()?
            )));
        }
        let raw = Raw {
            ptr: buffer.buf_ptr().cast(),
            len: buffer.len_bytes(),
        };
        Ok(Self { raw, _keep: buffer })
    }
}

/// The buffer of an object: plain values that lie in a row.
fn contiguous(obj: &Bound<'_, PyAny>) -> PyResult<PyUntypedBuffer> {
    let buffer = PyUntypedBuffer::get(obj)?;
    if !buffer.is_c_contiguous() {
        return Err(invalid(format_args!(
            "the {} is not C-contiguous",
            obj.get_type().name()?
        )));
    }
    // The bytes of an array of objects are pointers: neither to be shown to a guest nor to be written by one.
    if holds_objects(buffer.format().to_bytes()) {
        return Err(invalid(format_args!(
            "the {} holds Python objects, not bytes",
            obj.get_type().name()?
        )));
    }
    Ok(buffer)
}

/// Whether a format of the buffer protocol has an object in it; names stand between colons.
fn holds_objects(format: &[u8]) -> bool {
    format
        .split(|&byte| byte == b':')
        .step_by(2)
        .any(|types| types.contains(&b'O'))
}

/// A duplicate of the fd `fd`, which stays the caller's.
pub(crate) fn duplicate(fd: RawFd) -> PyResult<OwnedFd> {
    if fd < 0 {
        return Err(invalid(format_args!("{fd} is no fd")));
    }
    // SAFETY: the number is not negative, and it is only handed to one system call, which reports a number that is not
    // open (M5).
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    fcntl_dupfd_cloexec(borrowed, 0).map_err(|errno| match errno {
        Errno::BADF => invalid(format_args!("fd {fd} is not open")),
        errno => os_error(errno, format!("cannot duplicate fd {fd}")),
    })
}
