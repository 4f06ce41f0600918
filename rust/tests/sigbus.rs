//! The SIGBUS handler among others. Each case is a process of its own: there is one handler in each, and some must die.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    missing_docs,
    reason = "a test stops at what it did not expect"
)]

use std::env;
use std::ffi::{c_int, c_void};
use std::mem::{MaybeUninit, transmute};
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus};
use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicUsize, Ordering};

use libc::{SA_RESETHAND, SA_SIGINFO, SIG_DFL, SIG_IGN, SIGBUS, siginfo_t};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap};
use virtio_test::mem::{Backing, GuestMemory, MemoryError, RegionError, RegionSpec};

const PAGE: u64 = 4096;

/// Run `body` in a process of its own, which begins with the default action; how that ended, or None inside of it.
fn alone(name: &str, body: impl FnOnce()) -> Option<ExitStatus> {
    if env::var_os("SIGBUS_CASE").is_some_and(|case| case == name) {
        install(SIG_DFL, 0);
        body();
        return None;
    }
    let mut child = Command::new(env::current_exe().unwrap());
    child
        .args(["--exact", name, "--test-threads=1"])
        .env("SIGBUS_CASE", name);
    let output = child.output().unwrap();
    // A signal is what some are about; a failed assertion never is.
    let failed = output.status.code().is_some_and(|code| code != 0);
    assert!(!failed, "{name}: {}", String::from_utf8_lossy(&output.stdout));
    Some(output.status)
}

fn lives(name: &str, body: impl FnOnce()) {
    if let Some(status) = alone(name, body) {
        assert!(status.success(), "{name}: {status}");
    }
}

fn dies(name: &str, body: impl FnOnce()) {
    match alone(name, body) {
        None => panic!("it should have died"),
        Some(status) => assert_eq!(status.signal(), Some(SIGBUS), "{name}: {status}"),
    }
}

fn install(handler: usize, flags: c_int) -> libc::sigaction {
    // SAFETY: all fields are numbers or a function that may be absent.
    let mut action: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
    action.sa_sigaction = handler;
    action.sa_flags = flags;
    exchange(&raw const action)
}

fn exchange(action: *const libc::sigaction) -> libc::sigaction {
    let mut old = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: null or an action of handlers that only count and call.
    assert_eq!(unsafe { libc::sigaction(SIGBUS, action, old.as_mut_ptr()) }, 0);
    // SAFETY: the call filled it.
    unsafe { old.assume_init() }
}

fn handler() -> usize {
    exchange(null()).sa_sigaction
}

fn send() {
    // SAFETY: it only sends a signal.
    assert_eq!(unsafe { libc::raise(SIGBUS) }, 0);
}

fn file(size: u64) -> OwnedFd {
    let fd = memfd_create("sigbus", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&fd, size).unwrap();
    fd
}

fn region(gpa: u64, fd: &OwnedFd) -> RegionSpec {
    RegionSpec {
        gpa,
        size: PAGE,
        backing: Backing::Received {
            fd: fd.try_clone().unwrap(),
            offset: 0,
            writable: true,
        },
    }
}

fn guarded() -> (OwnedFd, GuestMemory) {
    let fd = file(PAGE);
    let mem = GuestMemory::new(vec![region(0, &fd)], None).unwrap();
    (fd, mem)
}

/// Lose guarded memory and survive.
fn lose() {
    let (fd, mem) = guarded();
    ftruncate(&fd, 0).unwrap();
    assert_eq!(mem.read(0, &mut [0]), Err(MemoryError::Lost { gpa: 0 }));
}

/// Fault where nobody guards.
fn fault() {
    let fd = file(PAGE);
    // SAFETY: the kernel chooses where.
    let ptr = unsafe { mmap(null_mut(), 4096, ProtFlags::READ, MapFlags::SHARED, &fd, 0) }.unwrap();
    ftruncate(&fd, 0).unwrap();
    // SAFETY: mapped, and its page is gone: the process is meant to end here.
    let byte = unsafe { ptr.cast::<u8>().read_volatile() };
    panic!("read {byte}");
}

static CALLED: AtomicUsize = AtomicUsize::new(0);
/// What `middle` found.
static FOUND: AtomicUsize = AtomicUsize::new(0);
static PASSED: AtomicUsize = AtomicUsize::new(0);

extern "C" fn count(signal: c_int) {
    assert_eq!(signal, SIGBUS);
    CALLED.fetch_add(1, Ordering::SeqCst);
}

extern "C" fn count_with_info(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel's, handed on.
    let sent = unsafe { (*info).si_signo };
    assert_eq!((signal, sent), (SIGBUS, SIGBUS));
    assert!(!context.is_null());
    CALLED.fetch_add(10, Ordering::SeqCst);
}

/// Somebody who came later, and calls what was there.
extern "C" fn middle(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    assert!(PASSED.fetch_add(1, Ordering::SeqCst) < 100, "round and round");
    let found = FOUND.load(Ordering::SeqCst);
    // SAFETY: found installed, with SA_SIGINFO.
    let call = unsafe { transmute::<usize, extern "C" fn(c_int, *mut siginfo_t, *mut c_void)>(found) };
    call(signal, info, context);
}

#[test]
fn it_is_there_while_something_is_guarded() {
    lives("it_is_there_while_something_is_guarded", || {
        let sealed = file(PAGE);
        fcntl_add_seals(&sealed, SealFlags::SHRINK).unwrap();
        let own = RegionSpec {
            gpa: PAGE,
            size: PAGE,
            backing: Backing::Memfd,
        };
        let mem = GuestMemory::new(vec![region(0, &sealed), own], None).unwrap();
        assert_eq!(handler(), SIG_DFL, "nothing to guard");
        let (one, two) = (file(PAGE), file(PAGE));
        mem.add(region(2 * PAGE, &one)).unwrap();
        let ours = handler();
        assert_ne!(ours, SIG_DFL);
        mem.add(region(3 * PAGE, &two)).unwrap();
        assert_eq!(handler(), ours);
        mem.remove(2 * PAGE, PAGE).unwrap();
        assert_eq!(handler(), ours, "one is left");
        let view = mem.live(3 * PAGE, 8, virtio_test::mem::Want::Read).unwrap();
        mem.remove(3 * PAGE, PAGE).unwrap();
        assert_eq!(handler(), ours, "it is still mapped");
        drop(view);
        assert_eq!(handler(), SIG_DFL);
        for _ in 0..20 {
            lose();
            assert_eq!(handler(), SIG_DFL);
        }
    });
}

#[test]
fn a_fault_elsewhere_ends_the_process() {
    dies("a_fault_elsewhere_ends_the_process", || {
        let (_fd, _mem) = guarded();
        fault();
    });
}

#[test]
fn a_fault_elsewhere_ends_the_process_after_a_loss() {
    dies("a_fault_elsewhere_ends_the_process_after_a_loss", || {
        let (fd, mem) = guarded();
        ftruncate(&fd, 0).unwrap();
        assert!(mem.read(0, &mut [0]).is_err());
        fault();
    });
}

#[test]
fn a_signal_that_was_sent_ends_the_process() {
    dies("a_signal_that_was_sent_ends_the_process", || {
        let (_fd, _mem) = guarded();
        send();
    });
}

#[test]
fn who_ignores_goes_on_ignoring_what_is_sent() {
    lives("who_ignores_goes_on_ignoring_what_is_sent", || {
        install(SIG_IGN, 0);
        lose();
        assert_eq!(handler(), SIG_IGN);
        let (_fd, _mem) = guarded();
        send();
        lose();
    });
}

#[test]
fn nobody_can_ignore_a_fault() {
    dies("nobody_can_ignore_a_fault", || {
        install(SIG_IGN, 0);
        let (_fd, _mem) = guarded();
        fault();
    });
}

#[test]
fn an_older_handler_is_called() {
    lives("an_older_handler_is_called", || {
        for (older, flags, each) in [
            (count as *const () as usize, 0, 1),
            (count_with_info as *const () as usize, SA_SIGINFO, 10),
        ] {
            CALLED.store(0, Ordering::SeqCst);
            install(older, flags);
            {
                let (_fd, _mem) = guarded();
                assert_ne!(handler(), older);
                send();
                lose();
                send();
            }
            assert_eq!(CALLED.load(Ordering::SeqCst), 2 * each, "and not for what was lost");
            assert_eq!(handler(), older);
            send();
            assert_eq!(CALLED.load(Ordering::SeqCst), 3 * each);
        }
    });
}

/// Ends the process well.
extern "C" fn leave(_: c_int) {
    // SAFETY: it takes a number.
    unsafe { libc::_exit(0) };
}

#[test]
fn a_fault_elsewhere_is_for_an_older_handler_that_takes_it() {
    lives("a_fault_elsewhere_is_for_an_older_handler_that_takes_it", || {
        install(leave as *const () as usize, 0);
        let (_fd, _mem) = guarded();
        fault();
    });
}

#[test]
fn a_handler_for_once_is_called_once() {
    dies("a_handler_for_once_is_called_once", || {
        install(count as *const () as usize, SA_RESETHAND);
        let (_fd, _mem) = guarded();
        send();
        assert_eq!(CALLED.load(Ordering::SeqCst), 1);
        send();
    });
}

#[test]
fn what_only_claims_to_be_a_fault_is_passed_on() {
    lives("what_only_claims_to_be_a_fault_is_passed_on", || {
        install(count as *const () as usize, 0);
        let (_fd, mem) = guarded();
        let place = mem.live(0, 1, virtio_test::mem::Want::Read).unwrap().ptr();
        // Where the kernel puts the address of a fault, after three numbers and a gap.
        let mut info = [0u64; 16];
        // SI_QUEUE: the only kind that a process may send itself with fields of its own.
        info[1] = 0xffff_ffff;
        info[2] = place.addr() as u64;
        let me = i64::from(std::process::id());
        // SAFETY: 128 bytes, as a siginfo has; it only sends a signal.
        let sent = unsafe { libc::syscall(libc::SYS_rt_sigqueueinfo, me, i64::from(SIGBUS), info.as_ptr()) };
        assert_eq!(sent, 0);
        while CALLED.load(Ordering::SeqCst) == 0 {
            std::thread::yield_now();
        }
        assert!(!mem.regions()[0].lost());
    });
}

/// Install `middle` in front of whatever is there.
fn step_in() {
    let found = install(middle as *const () as usize, SA_SIGINFO);
    FOUND.store(found.sa_sigaction, Ordering::SeqCst);
}

#[test]
fn one_that_came_later_is_passed_through_and_then_passed() {
    lives("one_that_came_later_is_passed_through_and_then_passed", || {
        install(count as *const () as usize, 0);
        let (fd, mem) = guarded();
        step_in();
        // It stands in front, and hands on.
        ftruncate(&fd, 0).unwrap();
        assert!(mem.read(0, &mut [0]).is_err());
        assert_eq!(PASSED.load(Ordering::SeqCst), 1);
        // The next thing to guard puts us in front of it; every handler has its turn, once.
        let (later, other) = guarded();
        lose();
        assert_eq!((PASSED.load(Ordering::SeqCst), CALLED.load(Ordering::SeqCst)), (1, 0));
        send();
        assert_eq!((PASSED.load(Ordering::SeqCst), CALLED.load(Ordering::SeqCst)), (2, 1));
        drop((mem, later, other));
        assert_eq!(
            handler(),
            middle as *const () as usize,
            "it was there before our second"
        );
        send();
        assert_eq!((PASSED.load(Ordering::SeqCst), CALLED.load(Ordering::SeqCst)), (3, 2));
        // Again and again it takes no more than one level.
        for _ in 0..50 {
            lose();
            send();
        }
        assert_eq!((PASSED.load(Ordering::SeqCst), CALLED.load(Ordering::SeqCst)), (53, 52));
    });
}

#[test]
fn a_level_that_somebody_may_have_kept_is_given_to_nobody() {
    lives("a_level_that_somebody_may_have_kept_is_given_to_nobody", || {
        install(count as *const () as usize, 0);
        let first = guarded();
        let below = handler();
        step_in();
        let second = guarded();
        let above = handler();
        assert_ne!(above, below);
        // Somebody puts back what he found long ago, and who has seen the upper one may call it still.
        install(below, SA_SIGINFO);
        drop((first, second));
        assert_eq!(handler(), count as *const () as usize);
        let _third = guarded();
        assert_ne!(handler(), above);
    });
}

#[test]
fn a_fault_elsewhere_ends_the_process_through_all_of_them() {
    dies("a_fault_elsewhere_ends_the_process_through_all_of_them", || {
        let (_fd, _mem) = guarded();
        step_in();
        let (_later, _other) = guarded();
        fault();
    });
}

#[test]
fn what_cannot_be_guarded_is_not_mapped() {
    lives("what_cannot_be_guarded_is_not_mapped", || {
        let refused = |errno, result: Result<GuestMemory, RegionError>| match result {
            Err(RegionError::System { errno: found, .. }) => assert_eq!(found, errno),
            other => panic!("{other:?}"),
        };
        let fd = file(PAGE);
        let many = |count: u64| GuestMemory::new((0..count).map(|i| region(i * PAGE, &fd)).collect(), None);
        let full: Vec<_> = (0..8).map(|_| many(509).unwrap()).collect();
        let rest = many(4096 - 8 * 509).unwrap();
        refused(Errno::NOBUFS, many(1));
        drop(full);
        ftruncate(&fd, 0).unwrap();
        assert!(rest.read(PAGE, &mut [0]).is_err());
        ftruncate(&fd, PAGE).unwrap();
        drop(rest);
        assert_eq!(handler(), SIG_DFL);
        // Who steps in front again and again uses the levels up.
        let mut kept = Vec::new();
        for _ in 0..8 {
            kept.push(many(1).unwrap());
            install(count as *const () as usize, 0);
        }
        refused(Errno::BUSY, many(1));
        assert_eq!(handler(), count as *const () as usize);
    });
}
