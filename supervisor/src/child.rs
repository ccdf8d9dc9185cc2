//! One worker process, from `fork` to reaped.
//!
//! Affinity, memory policy, process group and parent-death signal are set in the child before `exec`, so that
//! not one instruction of the worker runs in the wrong place. Never decides *whether* to start or stop a
//! process: `state` does that.
//!
//! The parent-death signal follows the *thread* that forked. Spawn from the main thread only (a current-thread
//! runtime on it), or workers die with whatever thread it was.
//!
//! Invariant: dropping a [`Child`] that was not reaped kills its process group.

#![expect(unsafe_code, reason = "pre_exec, close_range and set_mempolicy have no safe form")]

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::Duration;

use bitnetd_config::{NumaPolicy, SERVICE_MANAGER_VARIABLES, SchedulerChoice};
use bitnetd_placement::WorkerPlacement;
use bitnetd_proto::error::{ErrorCode, WireError};
use bitnetd_proto::exit_code::ExitCode;
use bitnetd_proto::worker_link::{
    WORKER_COPY_FD, WORKER_HEAD_FD, WORKER_IMAGE_FD, WORKER_KEPT_FD, WORKER_LAST_WORDS_FD, WORKER_LINK_FD,
};
use command_fds::{CommandFdExt, FdMapping};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::libc;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::resource::{Resource, getrlimit, rlim_t, setrlimit};
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::{Pid, getpid, getppid, pipe2};
use tokio::net::UnixStream;
use tokio::process::{ChildStderr, Command};

use crate::image::ModelImage;
use crate::node_copy::NodeCopy;
use crate::state::{StopSignal, WorkerExit};

/// Memory nodes a mask has room for, as in the kernel's largest configuration.
const NODES_MAX: usize = 1024;
/// Linux 5.15; `libc` does not have it.
const MPOL_PREFERRED_MANY: libc::c_int = 5;
/// Between fork and exec are a few system calls. A child that takes longer was stopped there, and is killed.
const EXEC_LIMIT: Duration = Duration::from_secs(5);
const MASK_BITS: usize = usize::BITS as usize;

/// Of what a worker says when it dies, this much is heard.
const LAST_WORDS_BYTES_MAX: u64 = 1024;

/// What to start.
#[derive(Debug)]
pub(crate) struct SpawnSpec<'a> {
    pub(crate) program: &'a Path,
    pub(crate) args: &'a [OsString],
    pub(crate) image: &'a ModelImage,
    /// The copy that the workers of its node read.
    pub(crate) copy: Option<&'a NodeCopy>,
    pub(crate) placement: &'a WorkerPlacement,
    pub(crate) numa: NumaPolicy,
    pub(crate) nice: i8,
    pub(crate) scheduler: SchedulerChoice,
    /// Whether it will lock memory.
    pub(crate) is_locked: bool,
}

/// Why a process could not be started.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SpawnError {
    /// A CPU number beyond what the system call can express.
    #[error("CPU {cpu} is beyond the {cpus_max} CPUs of an affinity mask")]
    Cpu { cpu: u32, cpus_max: usize },
    /// A node number beyond what the system call can express.
    #[error("memory node {node} is beyond the {NODES_MAX} nodes of a mask")]
    Node { node: u32 },
    /// No socket pair, or no copy of the image's descriptor.
    #[error("cannot make the descriptors of a worker: {0}")]
    Descriptors(io::Error),
    /// Fork, set-up of the child, or exec.
    #[error("cannot start `{program}`: {source}")]
    Exec { program: PathBuf, source: io::Error },
}

impl SpawnError {
    /// What the state machine is told.
    pub(crate) fn to_wire(&self) -> (WireError, ExitCode) {
        let exit_code = match self {
            Self::Cpu { .. } | Self::Node { .. } => ExitCode::Config,
            Self::Exec { source, .. } if source.kind() == io::ErrorKind::NotFound => ExitCode::NoInput,
            Self::Exec { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
                ExitCode::Permission
            }
            Self::Descriptors(_) | Self::Exec { .. } => ExitCode::Os,
        };
        (WireError::new(ErrorCode::Internal, self.to_string()), exit_code)
    }
}

/// A process group that can be signalled until its leader is reaped.
#[derive(Debug)]
pub(crate) struct ProcessGroup {
    leader: Pid,
    /// Set by the task that reaps, at once after it did; read before each signal. Once the leader is reaped its
    /// number may belong to someone else.
    is_reaped: AtomicBool,
}

impl ProcessGroup {
    pub(crate) fn signal(&self, signal: StopSignal) {
        if self.is_reaped.load(Ordering::Acquire) {
            return;
        }
        let signal = match signal {
            StopSignal::Terminate => Signal::SIGTERM,
            StopSignal::Kill => Signal::SIGKILL,
        };
        // It can only fail because the group has just ended; its exit is on the way.
        let _gone = killpg(self.leader, signal);
    }
}

/// A worker process.
#[derive(Debug)]
pub(crate) struct Child {
    inner: tokio::process::Child,
    /// What it writes to its log, until somebody takes it.
    stderr: Option<ChildStderr>,
    /// Read once it is reaped; whoever wrote into it is gone then, and nobody waits.
    last_words: File,
    /// Processes that the kernel had killed for lack of memory when this one was started.
    n_oom_kills: Option<u64>,
    group: Arc<ProcessGroup>,
}

/// Of the kernel's kills for lack of memory, those up to this one have been told of a worker.
static OOM_KILLS_TOLD: AtomicU64 = AtomicU64::new(0);

impl Child {
    pub(crate) fn pid(&self) -> u32 {
        self.group.leader.as_raw().unsigned_abs()
    }

    pub(crate) fn group(&self) -> Arc<ProcessGroup> {
        self.group.clone()
    }

    /// What it writes to its log; `None` for who asks again.
    pub(crate) fn take_stderr(&mut self) -> Option<ChildStderr> {
        self.stderr.take()
    }

    /// Waits for the end and reaps.
    ///
    /// # Cancel safety
    /// Nothing is lost if it is dropped before it is done.
    pub(crate) async fn wait(&mut self) -> WorkerExit {
        let status = self.inner.wait().await;
        self.group.is_reaped.store(true, Ordering::Release);
        match status {
            Ok(status) => classify(status, self.n_oom_kills, self.last_words()),
            Err(_) => WorkerExit { code: None, signal: None, is_out_of_memory: false, last_words: None },
        }
    }

    /// The last line that the sandbox wrote before the end. Nothing in it is believed: a worker may write what it likes.
    fn last_words(&mut self) -> Option<String> {
        let mut bytes = Vec::new();
        // The pipe does not block: with a writer left, reading ends with an error and gives what was there.
        let _would_block = (&mut self.last_words).take(LAST_WORDS_BYTES_MAX).read_to_end(&mut bytes);
        let text = String::from_utf8_lossy(&bytes);
        let line = text.lines().rfind(|line| line.starts_with("denied"))?;
        Some(line.chars().filter(|c| c.is_ascii_graphic() || *c == ' ').take(100).collect())
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.group.signal(StopSignal::Kill);
    }
}

fn classify(status: ExitStatus, n_oom_kills_before: Option<u64>, last_words: Option<String>) -> WorkerExit {
    let signal = status.signal();
    let is_out_of_memory = signal == Some(libc::SIGKILL)
        && n_oom_kills_before
            .zip(oom_kills())
            .is_some_and(|(before, now)| is_one_of(before, now, &OOM_KILLS_TOLD));
    WorkerExit { code: status.code(), signal, is_out_of_memory, last_words }
}

/// Whether a death was one of the kernel's kills since `before`: each of them explains one death.
fn is_one_of(before: u64, now: u64, told: &AtomicU64) -> bool {
    let explained = before.max(told.load(Ordering::Relaxed));
    if now > explained {
        told.store(explained + 1, Ordering::Relaxed); // All workers are reaped by one thread.
    }
    now > explained
}

/// How many processes the kernel has killed for lack of memory: in our cgroup, else on the whole machine.
fn oom_kills() -> Option<u64> {
    let count = |file: &Path| {
        let text = std::fs::read_to_string(file).ok()?;
        text.lines().find_map(|line| line.strip_prefix("oom_kill "))?.trim().parse().ok()
    };
    let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let group = groups.lines().find_map(|line| line.strip_prefix("0::/"));
    let events = group.map(|group| Path::new("/sys/fs/cgroup").join(group).join("memory.events"));
    events.and_then(|file| count(&file)).or_else(|| count(Path::new("/proc/vmstat")))
}

/// Runs `spawn`, which waits until the child has executed its program, and sees to it that this ends: a child that
/// is stopped in between would hold the whole supervisor.
fn spawn_within(command: &mut Command, limit: Duration) -> io::Result<tokio::process::Child> {
    let (done, is_done) = sync_channel::<()>(0);
    let watch = std::thread::Builder::new().name("exec-watch".into()).spawn(move || {
        while is_done.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
            kill_children_before_exec();
        }
    });
    let spawned = command.spawn();
    drop(done);
    if let Ok(watch) = watch {
        let _panicked = watch.join();
    }
    spawned
}

/// Kills those of our children that have not executed another program: they still have our arguments.
fn kill_children_before_exec() {
    let arguments = |pid: &str| std::fs::read(format!("/proc/{pid}/cmdline")).ok();
    let ours = arguments("self");
    let tasks = std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let children = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok());
    for child in children.collect::<String>().split_whitespace() {
        if ours.is_some() && arguments(child) == ours {
            tracing::error!(pid = child, "a child did not get to executing its program; it is killed");
            let _gone = child.parse().map(|pid| kill(Pid::from_raw(pid), Signal::SIGKILL));
        }
    }
}

/// Starts a process; gives it and our end of its link.
pub(crate) fn spawn(spec: &SpawnSpec<'_>) -> Result<(Child, UnixStream), SpawnError> {
    let setup = ChildSetup::new(spec)?;
    let (ours, theirs) = StdUnixStream::pair().map_err(SpawnError::Descriptors)?;
    ours.set_nonblocking(true).map_err(SpawnError::Descriptors)?;
    let ours = UnixStream::from_std(ours).map_err(SpawnError::Descriptors)?;
    let image = spec.image.model().try_clone_to_owned().map_err(SpawnError::Descriptors)?;
    let head = spec.copy.map_or_else(|| spec.image.head(), NodeCopy::image);
    let head = head.try_clone_to_owned().map_err(SpawnError::Descriptors)?;
    let copy = spec.copy.map(|copy| copy.model().try_clone_to_owned()).transpose();
    let copy = copy.map_err(SpawnError::Descriptors)?;

    let kept = spec.image.kept().map(|kept| kept.try_clone_to_owned()).transpose();
    let kept = kept.map_err(SpawnError::Descriptors)?;

    let (last_words, words_in) =
        pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).map_err(|error| SpawnError::Descriptors(error.into()))?;

    let mut command = Command::new(spec.program);
    // The program is often `/proc/self/exe`, which would tell `ps` nothing.
    command.arg0("bitnetd").args(spec.args).process_group(0);
    // What it has to say goes through us: a worker with a file or a terminal could fill the one and command the other.
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    // The service manager talks to the supervisor alone.
    for variable in SERVICE_MANAGER_VARIABLES {
        command.env_remove(variable);
    }
    let mut mappings = vec![
        FdMapping { parent_fd: OwnedFd::from(theirs), child_fd: WORKER_LINK_FD },
        FdMapping { parent_fd: image, child_fd: WORKER_IMAGE_FD },
        FdMapping { parent_fd: head, child_fd: WORKER_HEAD_FD },
        FdMapping { parent_fd: words_in, child_fd: WORKER_LAST_WORDS_FD },
    ];
    mappings.extend(copy.map(|copy| FdMapping { parent_fd: copy, child_fd: WORKER_COPY_FD }));
    mappings.extend(kept.map(|kept| FdMapping { parent_fd: kept, child_fd: WORKER_KEPT_FD }));
    let collision = |_| SpawnError::Descriptors(io::ErrorKind::AlreadyExists.into());
    command.fd_mappings(mappings).map_err(collision)?;
    // SAFETY: `apply` makes system calls on values that were made before the fork; it neither allocates, nor
    // locks, nor panics, which is all that may happen between fork and exec.
    unsafe {
        command.pre_exec(move || setup.apply());
    }
    let exec = |source| SpawnError::Exec { program: spec.program.to_owned(), source };
    let n_oom_kills = oom_kills();
    let mut inner = spawn_within(&mut command, EXEC_LIMIT).map_err(exec)?;
    let stderr = inner.stderr.take();
    let leader =
        inner.id().and_then(|pid| i32::try_from(pid).ok()).ok_or_else(|| exec(Errno::ESRCH.into()))?;
    // When memory runs out a worker should go before the supervisor, which can replace it. Best effort.
    let _score = std::fs::write(format!("/proc/{leader}/oom_score_adj"), "500");
    let group = Arc::new(ProcessGroup { leader: Pid::from_raw(leader), is_reaped: AtomicBool::new(false) });
    Ok((Child { inner, stderr, last_words: last_words.into(), n_oom_kills, group }, ours))
}

/// Everything the child does to itself between fork and exec, prepared before the fork.
#[derive(Clone, Copy)]
struct ChildSetup {
    parent: Pid,
    /// Of the descriptors that not every worker has, those that this one does not.
    unused: [Option<RawFd>; 2],
    /// `None` leaves the affinity as it is.
    cpus: Option<CpuSet>,
    memory: Option<MemoryPolicy>,
    nice: i8,
    scheduler: SchedulerChoice,
    /// The most memory it may lock, from the start.
    locked_max: Option<rlim_t>,
}

#[derive(Clone, Copy)]
struct MemoryPolicy {
    mode: libc::c_int,
    nodes: [usize; NODES_MAX / MASK_BITS],
}

impl ChildSetup {
    fn new(spec: &SpawnSpec<'_>) -> Result<Self, SpawnError> {
        let mut set = CpuSet::new();
        for &cpu in &spec.placement.cpus {
            let index = usize::try_from(cpu).unwrap_or(usize::MAX);
            set.set(index).map_err(|_| SpawnError::Cpu { cpu, cpus_max: CpuSet::count() })?;
        }
        let cpus = (!spec.placement.cpus.is_empty()).then_some(set);
        let nodes = &spec.placement.memory_nodes;
        let memory = if nodes.is_empty() { None } else { Some(MemoryPolicy::new(nodes, spec.numa)?) };
        let limits = spec.is_locked.then(|| getrlimit(Resource::RLIMIT_MEMLOCK)).transpose();
        let locked_max = limits.unwrap_or_default().map(|(_soft, hard)| hard);
        let (nice, scheduler) = (spec.nice, spec.scheduler);
        let unused = [
            spec.copy.is_none().then_some(WORKER_COPY_FD),
            spec.image.kept().is_none().then_some(WORKER_KEPT_FD),
        ];
        Ok(Self { parent: getpid(), unused, cpus, memory, nice, scheduler, locked_max })
    }

    /// Runs in the child, between fork and exec.
    fn apply(&self) -> io::Result<()> {
        set_pdeathsig(Signal::SIGKILL)?;
        if getppid() != self.parent {
            return Err(Errno::ESRCH.into()); // The parent died before the line above.
        }
        close_others_at_exec(self.unused)?;
        if let Some(cpus) = &self.cpus {
            sched_setaffinity(Pid::from_raw(0), cpus)?;
        }
        self.take_priority()?;
        if let Some(max) = self.locked_max {
            setrlimit(Resource::RLIMIT_MEMLOCK, max, max)?;
        }
        self.memory.as_ref().map_or(Ok(()), MemoryPolicy::apply)
    }

    fn take_priority(&self) -> io::Result<()> {
        if self.scheduler == SchedulerChoice::Batch {
            let priority = libc::sched_param { sched_priority: 0 };
            // SAFETY: `priority` lives during the call; the kernel only reads it.
            let result = unsafe { libc::sched_setscheduler(0, libc::SCHED_BATCH, &raw const priority) };
            Errno::result(result)?;
        }
        if self.nice != 0 {
            // SAFETY: The call takes three numbers.
            let result = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, self.nice.into()) };
            Errno::result(result)?;
        }
        Ok(())
    }
}

/// Whatever else the supervisor was started with (a shell's stray descriptors, say) is none of a worker's business.
fn close_others_at_exec(unused: [Option<RawFd>; 2]) -> io::Result<()> {
    let beyond = (WORKER_KEPT_FD.unsigned_abs() + 1, libc::c_uint::MAX);
    let ranges = unused.into_iter().flatten().map(|fd| (fd.unsigned_abs(), fd.unsigned_abs()));
    for (first, last) in std::iter::once(beyond).chain(ranges) {
        close_range_at_exec(first, last)?;
    }
    Ok(())
}

fn close_range_at_exec(first: libc::c_uint, last: libc::c_uint) -> io::Result<()> {
    // SAFETY: The call takes three numbers and only marks descriptors of this process; none is closed before exec.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, last, libc::CLOSE_RANGE_CLOEXEC) };
    match Errno::result(result) {
        // A kernel before 5.11: our own descriptors are marked anyway.
        Ok(_) | Err(Errno::ENOSYS | Errno::EINVAL | Errno::EPERM) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

impl MemoryPolicy {
    fn new(list: &[u32], numa: NumaPolicy) -> Result<Self, SpawnError> {
        let mut nodes = [0; NODES_MAX / MASK_BITS];
        for &node in list {
            let index = usize::try_from(node).unwrap_or(usize::MAX);
            *nodes.get_mut(index / MASK_BITS).ok_or(SpawnError::Node { node })? |= 1 << (index % MASK_BITS);
        }
        let mode = match numa {
            NumaPolicy::Preferred if list.len() == 1 => libc::MPOL_PREFERRED,
            NumaPolicy::Preferred => MPOL_PREFERRED_MANY,
            NumaPolicy::Interleave => libc::MPOL_INTERLEAVE,
            _ => libc::MPOL_BIND,
        };
        Ok(Self { mode, nodes })
    }

    fn apply(&self) -> io::Result<()> {
        // SAFETY: `nodes` is a live array of `NODES_MAX` bits, the length that is passed; the kernel only reads it.
        let result =
            unsafe { libc::syscall(libc::SYS_set_mempolicy, self.mode, self.nodes.as_ptr(), NODES_MAX) };
        match Errno::result(result) {
            // A kernel without NUMA, or a container that forbids the call: placement is a wish there.
            Ok(_) | Err(Errno::ENOSYS | Errno::EPERM) => Ok(()),
            Err(Errno::EINVAL) if self.mode == MPOL_PREFERRED_MANY => Ok(()), // A kernel before 5.15.
            Err(error) => Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kill_of_the_kernel_explains_one_death() {
        let told = AtomicU64::new(0);
        let die = |before, now| is_one_of(before, now, &told);
        assert!(!die(3, 3), "by somebody else's hand");
        assert!(die(3, 4));
        assert!(!die(3, 4), "that one was another worker's");
        // Two at once.
        assert_eq!((die(4, 6), die(4, 6), die(4, 6)), (true, true, false));
        // What came before a worker does not explain its death.
        assert!(!die(9, 9) && die(9, 10));
    }

    #[tokio::test]
    async fn a_child_that_stops_before_its_program_does_not_hold_the_supervisor() {
        let mut command = Command::new("true");
        // SAFETY: raising a signal is a system call that is allowed between fork and exec.
        unsafe {
            command.pre_exec(|| Ok(nix::sys::signal::raise(Signal::SIGSTOP)?));
        }
        let mut child = spawn_within(&mut command, Duration::from_millis(100)).unwrap();
        assert_eq!(child.wait().await.unwrap().signal(), Some(libc::SIGKILL));
        let quick = spawn_within(&mut Command::new("true"), Duration::from_secs(60)).unwrap();
        assert!(quick.wait_with_output().await.unwrap().status.success());
    }
}
