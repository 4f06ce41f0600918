//! Two cores that poll: our driver end on one, a device end on the other; million chains per second.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::ends::{Done, End};
use crate::shape::Shape;
use crate::world::World;

/// Chains of one round.
const CHAINS: u64 = 2_000_000;
/// Nothing takes as long as this.
const PATIENCE: Duration = Duration::from_secs(50);

/// Keep this thread on the `index`-th of the cores that the process may use.
fn stay_on(index: usize) {
    let allowed = sched_getaffinity(None).expect("it can be asked");
    let mut cores = (0..CpuSet::MAX_CPU).filter(|&core| allowed.is_set(core));
    if let Some(core) = cores.nth(index) {
        let mut one = CpuSet::new();
        one.set(core);
        sched_setaffinity(None, &one).expect("it is allowed");
    }
}

/// One round with the device that `make` gives; million chains per second, and what it did.
pub fn round<E: End>(world: &World, shape: &Shape, burst: u16, make: impl FnOnce(&World) -> E + Send) -> (f64, Done) {
    // A driver of its own, which begins with an empty ring.
    let mut driver = world.driver();
    let buffers: Vec<_> = (0..32).map(|number| world.buffers(shape, number)).collect();
    let (stop, burst, mem) = (AtomicBool::new(false), usize::from(burst), world.mem);
    std::thread::scope(|scope| {
        let device = scope.spawn(|| {
            stay_on(1);
            let mut end = make(world);
            let mut done = Done::default();
            while !stop.load(Ordering::Relaxed) {
                if end.serve(burst, &mut done) == 0 {
                    std::hint::spin_loop();
                }
            }
            done
        });
        let spent = scope.spawn(|| {
            stay_on(0);
            let start = Instant::now();
            let (mut added, mut taken) = (0u64, 0u64);
            let mut used = Vec::new();
            while taken < CHAINS && start.elapsed() < PATIENCE {
                let room = usize::from(driver.free() / shape.slots()) / burst;
                if room > 0 && added < CHAINS {
                    let first = usize::try_from(added % 32).expect("it is small");
                    let tokens = driver.add_many(mem, &buffers[first..first + burst]);
                    let tokens = tokens.expect("they are chains");
                    assert_eq!(tokens.count(), burst, "the ring has room");
                    added += burst as u64;
                    driver.publish(mem).expect("the ring is mapped");
                }
                used.clear();
                let got = driver.get_used_into(mem, burst, &mut used);
                taken += got.expect("the device breaks no rule") as u64;
            }
            let spent = start.elapsed();
            assert!(taken >= CHAINS, "{taken} chains of {CHAINS} came back");
            spent
        });
        let spent = spent.join();
        stop.store(true, Ordering::Relaxed);
        let done = device.join().expect("the device meets nothing wrong");
        let spent = spent.expect("the driver meets nothing wrong").as_secs_f64();
        #[allow(clippy::cast_precision_loss, reason = "a round fits the mantissa")]
        let rate = done.chains as f64 / spent / 1e6;
        (rate, done)
    })
}
