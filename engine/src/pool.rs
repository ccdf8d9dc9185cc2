//! A fixed pool of compute threads: one per CPU, pinned, handed work by fork and join.
//!
//! A token costs some two hundred joins, so handing out a task must cost about a microsecond: threads wait by
//! spinning for a moment, and only then sleep. Work is claimed in chunks, so that a slow core or one with a busy
//! sibling takes fewer of them.
//!
//! The caller is thread 0. The pool is `Send` but not `Sync`: two callers, or a task that forks again, do not
//! compile.
#![expect(unsafe_code, reason = "threads borrow the caller's closure and disjoint parts of its data")]

use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::fmt;
use std::hint::spin_loop;
use std::io;
use std::marker::PhantomData;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

/// How long a thread of a [`Wait::Hybrid`] pool spins before it sleeps.
const SPIN_MAX: Duration = Duration::from_micros(50);

/// How many spins pass between two looks at the clock.
const SPINS_PER_CLOCK_READ: u32 = 64;

/// What a thread does while it has nothing to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Wait {
    /// Spins for ever: the fastest, if nobody else needs the CPU.
    Spin,
    /// Spins for some 50 microseconds, then sleeps.
    #[default]
    Hybrid,
    /// Sleeps at once.
    Park,
}

/// What a pool is made of.
#[derive(Clone, Debug)]
pub struct PoolOptions {
    /// One entry per thread; `Some(cpu)` pins it. Entry 0 is the thread that calls [`ThreadPool::new`].
    pub cpus: Vec<Option<u32>>,
    /// What idle threads do.
    pub wait: Wait,
    /// Thread `i` is named `{name}-t{i}`.
    pub name: String,
}

impl PoolOptions {
    /// `n_threads` threads that run wherever the system puts them.
    #[must_use]
    pub fn unpinned(n_threads: usize) -> Self {
        Self { cpus: vec![None; n_threads], wait: Wait::Hybrid, name: "compute".to_owned() }
    }
}

/// Why there is no pool.
#[derive(Debug, thiserror::Error)]
pub enum PoolError {
    /// The list of CPUs is empty.
    #[error("a pool needs at least one thread")]
    NoThreads,
    /// The system would not let a thread run on its CPU.
    #[error("cannot pin thread {thread} to CPU {cpu}")]
    Pin {
        /// Index of the thread.
        thread: usize,
        /// The CPU asked for.
        cpu: u32,
        /// What the system said.
        #[source]
        source: Errno,
    },
    /// The system would not start a thread.
    #[error("cannot start thread {thread}")]
    Spawn {
        /// Index of the thread.
        thread: usize,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

type Task<'a> = &'a (dyn Fn(usize) + Sync);
type Panic = Box<dyn Any + Send>;

/// Own cache line for a word that many threads write.
#[repr(align(128))]
#[derive(Default)]
struct Padded<T>(T);

/// What the caller and the threads share.
struct Shared {
    wait: Wait,
    /// Written by the caller while `n_running` is 0, read by the threads after they see a new `epoch`.
    task: UnsafeCell<Option<Task<'static>>>,
    /// Number of tasks handed out. A new value is the signal to start.
    epoch: Padded<AtomicU32>,
    /// Threads that have not finished the current task; the caller waits for 0.
    n_running: Padded<AtomicUsize>,
    /// One per thread: it sleeps, or is about to, and wants an `unpark`.
    is_parked: Vec<Padded<AtomicBool>>,
    /// The caller sleeps on `caller_wake`, or is about to.
    is_caller_parked: AtomicBool,
    caller_gate: Mutex<()>,
    caller_wake: Condvar,
    is_stopping: AtomicBool,
    /// The first panic of a thread in the current task.
    panic: Mutex<Option<Panic>>,
}

// SAFETY: `task` is the only field that is not `Sync`; `ThreadPool::run` writes it only while no thread is
// running a task, and the threads read it between the `epoch` and the `n_running` of one task.
unsafe impl Sync for Shared {}

/// A fixed set of threads that run one task at a time.
pub struct ThreadPool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    /// For each thread's share of the chunks, the next one that nobody has claimed.
    next_chunks: Vec<Padded<AtomicUsize>>,
    not_sync: PhantomData<Cell<()>>,
}

impl fmt::Debug for ThreadPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let wait = self.shared.wait;
        f.debug_struct("ThreadPool").field("n_threads", &self.n_threads()).field("wait", &wait).finish()
    }
}

impl ThreadPool {
    /// Pins the calling thread to entry 0 and starts a pinned thread for every other entry.
    ///
    /// # Errors
    /// No entries, a CPU that may not be used, or no more threads to be had. Nothing stays behind, except that
    /// the calling thread may already be pinned.
    pub fn new(options: PoolOptions) -> Result<Self, PoolError> {
        let PoolOptions { cpus, wait, name } = options;
        let Some(&caller_cpu) = cpus.first() else { return Err(PoolError::NoThreads) };
        pin(0, caller_cpu)?;
        let shared = Arc::new(Shared {
            wait,
            task: UnsafeCell::new(None),
            epoch: Padded::default(),
            n_running: Padded::default(),
            is_parked: cpus.iter().map(|_| Padded::default()).collect(),
            is_caller_parked: AtomicBool::new(false),
            caller_gate: Mutex::new(()),
            caller_wake: Condvar::new(),
            is_stopping: AtomicBool::new(false),
            panic: Mutex::new(None),
        });
        // From here on a return drops `pool`, which stops and joins what was started.
        let mut pool = Self {
            shared,
            threads: Vec::with_capacity(cpus.len() - 1),
            next_chunks: cpus.iter().map(|_| Padded::default()).collect(),
            not_sync: PhantomData,
        };
        let (pinned_tx, pinned_rx) = mpsc::channel();
        for (thread, &cpu) in cpus.iter().enumerate().skip(1) {
            let shared = Arc::clone(&pool.shared);
            let pinned_tx = pinned_tx.clone();
            let body = move || {
                let result = pin(thread, cpu);
                // A caller that no longer listens has met another thread's error and is stopping the pool.
                pinned_tx.send(result).ok();
                drop(pinned_tx);
                thread_loop(&shared, thread);
            };
            let spawned = thread::Builder::new().name(format!("{name}-t{thread}")).spawn(body);
            pool.threads.push(spawned.map_err(|source| PoolError::Spawn { thread, source })?);
        }
        drop(pinned_tx);
        pinned_rx.iter().collect::<Result<(), PoolError>>()?;
        Ok(pool)
    }

    /// Number of threads, the caller included.
    #[must_use]
    pub fn n_threads(&self) -> usize {
        self.threads.len() + 1
    }

    /// Calls `f(thread index)` once on every thread and returns when all are done.
    ///
    /// # Panics
    /// Re-raises a panic of `f` after every thread is done.
    pub fn run(&self, f: &(dyn Fn(usize) + Sync)) {
        if self.threads.is_empty() {
            return f(0);
        }
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes. The threads use the reference only until they count `n_running`
        // down, and this function does not return or unwind before `wait_for_threads` has seen 0.
        let task = unsafe { std::mem::transmute::<Task<'_>, Task<'static>>(f) };
        // SAFETY: no thread runs a task (`n_running` was 0 when the last `run` returned), and `ThreadPool` is
        // not `Sync`, so that nobody else is in this function.
        unsafe { *shared.task.get() = Some(task) };
        shared.n_running.0.store(self.threads.len(), Ordering::Relaxed);
        self.start();
        let own = catch_unwind(AssertUnwindSafe(|| f(0)));
        shared.wait_for_threads();
        let other = lock(&shared.panic).take();
        if let Some(panic) = own.err().or(other) {
            resume_unwind(panic);
        }
    }

    /// Cuts `0..n_items` into chunks of `chunk` (the last may be shorter), which the threads claim one by one:
    /// `f(thread index, items)`.
    ///
    /// A thread starts with its own even share, so that it reads memory in sequence, and then helps the others.
    ///
    /// # Panics
    /// If `chunk` is 0; re-raises a panic of `f`.
    pub fn for_each_chunk(&self, n_items: usize, chunk: usize, f: &(dyn Fn(usize, Range<usize>) + Sync)) {
        self.for_each_chunk_after(&|_| {}, n_items, chunk, f);
    }

    /// As [`Self::for_each_chunk`], after every thread that takes part has called `prepare(thread index)` for itself.
    ///
    /// # Panics
    /// As that.
    pub fn for_each_chunk_after(
        &self,
        prepare: &(dyn Fn(usize) + Sync),
        n_items: usize,
        chunk: usize,
        f: &(dyn Fn(usize, Range<usize>) + Sync),
    ) {
        assert!(chunk > 0, "a chunk has at least one item");
        let n_chunks = n_items.div_ceil(chunk);
        let items = |i: usize| i * chunk..n_items.min((i + 1) * chunk);
        if self.threads.is_empty() || n_chunks <= 1 {
            prepare(0);
            return (0..n_chunks).for_each(|i| f(0, items(i)));
        }
        let n_threads = self.n_threads();
        let share = |thread: usize| thread * n_chunks / n_threads..(thread + 1) * n_chunks / n_threads;
        for (thread, next) in self.next_chunks.iter().enumerate() {
            next.0.store(share(thread).start, Ordering::Relaxed);
        }
        let next_chunks = &self.next_chunks;
        self.run(&|thread| {
            prepare(thread);
            for victim in (thread..n_threads).chain(0..thread) {
                loop {
                    let i = next_chunks[victim].0.fetch_add(1, Ordering::Relaxed);
                    if i >= share(victim).end {
                        break;
                    }
                    f(thread, items(i));
                }
            }
        });
    }

    /// Cuts `data` into rows of `row_len` and calls `f(thread index, row index, row)` for each; the threads
    /// claim `rows_per_chunk` rows at a time.
    ///
    /// # Panics
    /// If `data` is not a whole number of rows, or `row_len` or `rows_per_chunk` is 0; re-raises a panic of `f`.
    pub fn for_each_row_mut<T: Send>(
        &self,
        data: &mut [T],
        row_len: usize,
        rows_per_chunk: usize,
        f: &(dyn Fn(usize, usize, &mut [T]) + Sync),
    ) {
        assert!(row_len > 0 && data.len().is_multiple_of(row_len), "rows of {row_len} in {}", data.len());
        let n_rows = data.len() / row_len;
        let base = SharedPointer(data.as_mut_ptr());
        self.for_each_chunk(n_rows, rows_per_chunk, &|thread, rows| {
            for row in rows {
                // SAFETY: `row < n_rows`, so that the row lies inside `data`.
                let start = unsafe { base.get().add(row * row_len) };
                // SAFETY: inside `data` (as above), which stays borrowed until all threads are done; each row
                // index comes up once, so that no other reference to this row exists.
                let row_data = unsafe { std::slice::from_raw_parts_mut(start, row_len) };
                f(thread, row, row_data);
            }
        });
    }

    /// Lets every thread see a new epoch.
    fn start(&self) {
        // `SeqCst`, here and where a thread is about to sleep: either it sees the new epoch, or we see its flag.
        self.shared.epoch.0.fetch_add(1, Ordering::SeqCst);
        for (thread, is_parked) in self.threads.iter().zip(&self.shared.is_parked[1..]) {
            if is_parked.0.load(Ordering::SeqCst) {
                thread.thread().unpark();
            }
        }
    }
}

impl Drop for ThreadPool {
    fn drop(&mut self) {
        self.shared.is_stopping.store(true, Ordering::Relaxed);
        self.start();
        for thread in self.threads.drain(..) {
            // A task's panic was re-raised by `run`; a thread itself does not panic.
            thread.join().ok();
        }
    }
}

impl Shared {
    /// Waits, as thread `thread`, for an epoch other than `seen`, and returns it.
    fn wait_for_task(&self, thread: usize, seen: u32) -> u32 {
        let epoch = &self.epoch.0;
        if spin_until(self.wait, || epoch.load(Ordering::Acquire) != seen) {
            return epoch.load(Ordering::Acquire);
        }
        let is_parked = &self.is_parked[thread].0;
        is_parked.store(true, Ordering::SeqCst);
        while epoch.load(Ordering::SeqCst) == seen {
            thread::park();
        }
        is_parked.store(false, Ordering::Relaxed);
        epoch.load(Ordering::Acquire)
    }

    /// Waits, as the caller, until every thread has finished the task.
    fn wait_for_threads(&self) {
        if spin_until(self.wait, || self.n_running.0.load(Ordering::Acquire) == 0) {
            return;
        }
        let mut gate = lock(&self.caller_gate);
        self.is_caller_parked.store(true, Ordering::SeqCst);
        while self.n_running.0.load(Ordering::SeqCst) != 0 {
            gate = self.caller_wake.wait(gate).unwrap_or_else(PoisonError::into_inner);
        }
        self.is_caller_parked.store(false, Ordering::Relaxed);
    }

    /// Counts one thread as done with the task, which it must not touch after this.
    fn finish_task(&self) {
        let was_last = self.n_running.0.fetch_sub(1, Ordering::SeqCst) == 1;
        if was_last && self.is_caller_parked.load(Ordering::SeqCst) {
            // With the gate held, the caller is either before its last look at `n_running` or in `wait`.
            drop(lock(&self.caller_gate));
            self.caller_wake.notify_one();
        }
    }
}

/// What a thread of the pool does all its life.
fn thread_loop(shared: &Shared, thread: usize) {
    let mut epoch = 0;
    loop {
        epoch = shared.wait_for_task(thread, epoch);
        if shared.is_stopping.load(Ordering::Relaxed) {
            return;
        }
        // SAFETY: `run` wrote the task before the epoch that was just seen, and writes the next one only after
        // this thread's `finish_task`.
        let task = unsafe { *shared.task.get() };
        if let Some(task) = task
            && let Err(panic) = catch_unwind(AssertUnwindSafe(|| task(thread)))
        {
            lock(&shared.panic).get_or_insert(panic);
        }
        shared.finish_task();
    }
}

/// Spins until `is_done`, as long as `wait` allows. Returns whether it is done.
fn spin_until(wait: Wait, is_done: impl Fn() -> bool) -> bool {
    let mut started = None;
    loop {
        for _ in 0..SPINS_PER_CLOCK_READ {
            if is_done() {
                return true;
            }
            match wait {
                Wait::Park => return false,
                Wait::Spin | Wait::Hybrid => spin_loop(),
            }
        }
        if wait == Wait::Hybrid && started.get_or_insert_with(Instant::now).elapsed() >= SPIN_MAX {
            return false;
        }
    }
}

/// Lets the calling thread run on `cpu` alone.
fn pin(thread: usize, cpu: Option<u32>) -> Result<(), PoolError> {
    let Some(cpu) = cpu else { return Ok(()) };
    let mut set = CpuSet::new();
    let cpu_idx = usize::try_from(cpu).unwrap_or(usize::MAX);
    set.set(cpu_idx)
        .and_then(|()| sched_setaffinity(Pid::from_raw(0), &set))
        .map_err(|source| PoolError::Pin { thread, cpu, source })
}

/// Locks, whether or not a holder panicked: each critical section here is one assignment.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A pointer that threads may share, because each uses another part of what it points to.
struct SharedPointer<T>(*mut T);

impl<T> SharedPointer<T> {
    fn get(&self) -> *mut T {
        self.0
    }
}

// SAFETY: the pointer is only a number; `for_each_row_mut` hands every part of its target to one thread, and
// `T: Send` lets a thread have it.
unsafe impl<T: Send> Sync for SharedPointer<T> {}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(n_threads: usize, wait: Wait) -> ThreadPool {
        ThreadPool::new(PoolOptions { wait, ..PoolOptions::unpinned(n_threads) }).unwrap()
    }

    #[test]
    fn every_thread_runs_once_per_task_however_it_waits() {
        for wait in [Wait::Spin, Wait::Hybrid, Wait::Park] {
            for n_threads in 1..=3 {
                let pool = pool(n_threads, wait);
                let counts: Vec<AtomicUsize> = (0..n_threads).map(|_| AtomicUsize::new(0)).collect();
                for _ in 0..50 {
                    pool.run(&|thread| {
                        counts[thread].fetch_add(1, Ordering::Relaxed);
                    });
                }
                let counts: Vec<usize> = counts.iter().map(|count| count.load(Ordering::Relaxed)).collect();
                assert_eq!(counts, vec![50; n_threads], "{wait:?}");
            }
        }
    }

    #[test]
    fn chunks_cover_every_item_once() {
        let pool = pool(3, Wait::Hybrid);
        for (n_items, chunk) in [(0, 4), (1, 4), (4, 4), (5, 4), (1000, 7), (3, 100)] {
            let seen: Vec<AtomicUsize> = (0..n_items).map(|_| AtomicUsize::new(0)).collect();
            pool.for_each_chunk(n_items, chunk, &|_, items| {
                assert!(items.len() <= chunk, "{items:?} is longer than {chunk}");
                items.for_each(|i| {
                    seen[i].fetch_add(1, Ordering::Relaxed);
                });
            });
            let all_once = seen.iter().all(|count| count.load(Ordering::Relaxed) == 1);
            assert!(all_once, "{n_items} items in chunks of {chunk}");
        }
    }

    #[test]
    fn rows_are_written_in_place() {
        let pool = pool(2, Wait::Hybrid);
        let mut data = vec![0_usize; 7 * 5];
        pool.for_each_row_mut(&mut data, 5, 2, &|_, row, values| values.fill(row));
        let expected: Vec<usize> = (0..35).map(|i| i / 5).collect();
        assert_eq!(data, expected);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let pool = pool(3, Wait::Hybrid);
        for guilty in 0..3 {
            let run = || pool.run(&|thread| assert_ne!(thread, guilty, "guilty"));
            let panic = catch_unwind(AssertUnwindSafe(run)).unwrap_err();
            let text = panic.downcast_ref::<String>().unwrap();
            assert!(text.contains("guilty"), "{text}");
        }
        let n_calls = AtomicUsize::new(0);
        pool.run(&|_| {
            n_calls.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(n_calls.into_inner(), 3);
    }

    #[test]
    fn threads_are_named_and_pinned() {
        let allowed = nix::sched::sched_getaffinity(Pid::from_raw(0)).unwrap();
        let cpu = (0..CpuSet::count()).find(|&cpu| allowed.is_set(cpu).unwrap()).unwrap();
        let run = move || {
            let cpu_id = u32::try_from(cpu).unwrap();
            let cpus = vec![Some(cpu_id); 2];
            let pool = ThreadPool::new(PoolOptions { cpus, wait: Wait::Park, name: "p".to_owned() }).unwrap();
            pool.run(&|thread| {
                let own = nix::sched::sched_getaffinity(Pid::from_raw(0)).unwrap();
                let cpus: Vec<usize> = (0..CpuSet::count()).filter(|&c| own.is_set(c).unwrap()).collect();
                assert_eq!(cpus, [cpu]);
                assert!(thread == 0 || thread::current().name() == Some("p-t1"));
            });
        };
        thread::spawn(run).join().unwrap();
    }

    #[test]
    fn no_threads_and_no_such_cpu_are_errors() {
        let none = PoolOptions { cpus: vec![], ..PoolOptions::unpinned(1) };
        assert!(matches!(ThreadPool::new(none), Err(PoolError::NoThreads)));
        let absent = PoolOptions { cpus: vec![None, Some(u32::MAX)], ..PoolOptions::unpinned(1) };
        assert!(matches!(ThreadPool::new(absent), Err(PoolError::Pin { thread: 1, cpu: u32::MAX, .. })));
    }
}
