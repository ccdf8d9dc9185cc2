//! What a worker gives up before it reads a byte that it cannot trust, and what it keeps.
//!
//! Two steps, in this order, both on the main thread (docs/security.md has the reasons):
//! 1. [`Sandbox::enter`], before the model is parsed and before there is a second thread: not dumpable, no core file,
//!    no capability, no new privileges, no path and no network (Landlock), and only the system calls that loading needs.
//! 2. [`Sandbox::close`], when every thread is there and everything is mapped, before `ready` is said: no new descriptor,
//!    no new process or thread, no file but the fast image that grows, and only the system calls that serving needs, for all threads.
//!
//! A denied call ends the process with SIGSYS, after its handler has written the call's name to the log and to the pipe of
//! last words, which the supervisor reads. Looking for a file is the exception: it is refused with `EACCES` and logged,
//! because a runtime that reports a panic may look for its symbols.
#![expect(
    unsafe_code,
    reason = "a signal handler that reads and writes the registers of a denied call has no safe form"
)]

mod calls; // Which system calls are allowed, and why.

use std::backtrace::{Backtrace, BacktraceStatus};
use std::os::fd::{BorrowedFd, IntoRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};

use bitnetd_config::{Choice, Confinement as Mode};
use bitnetd_proto::exit_code::ExitCode;
use bitnetd_proto::worker_link::Confinement;
use caps::CapSet;
use landlock::{ABI, Access, AccessFs, AccessNet, LandlockStatus, Ruleset, RulesetAttr, RulesetError, Scope};
use nix::errno::Errno;
use nix::libc::{self, c_int, c_void, siginfo_t, ucontext_t};
use nix::sys::prctl;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use syscalls::Sysno;

pub use calls::{Call, Stage, calls};

/// Refused look-ups of files that are logged one by one; an attacker shall not fill the log.
const REFUSALS_LOGGED_MAX: usize = 8;

/// Newest Landlock interface whose rights are asked for; an older kernel gives what it has.
const LANDLOCK_ABI: ABI = ABI::V7;

/// Of a path that was looked for, this much is logged.
const PATH_BYTES_MAX: usize = 80;

/// The GNU allocator looks there once, and takes a refusal as "do not shrink arenas": nothing to report.
const HARMLESS: &str = "/proc/sys/vm/overcommit_memory";

/// The write end of the pipe of last words; -1 before the handler is installed.
static LAST_WORDS: AtomicI32 = AtomicI32::new(-1);
/// Refused look-ups so far.
static N_REFUSALS: AtomicUsize = AtomicUsize::new(0);

/// Why a worker is not confined as it should be.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// The set-up names a mode that there is not.
    #[error("`security.confinement` is `{0}`, expected auto, require or off")]
    Mode(String),
    /// `require`, and the kernel has none.
    #[error("this kernel has no Landlock, and `security.confinement` requires it")]
    NoLandlock,
    /// The kernel has it, and it failed.
    #[error("cannot forbid paths and network with Landlock")]
    Landlock(#[source] RulesetError),
    /// `require`, and the filter was not taken.
    #[error("cannot filter system calls")]
    Seccomp(#[source] calls::FilterError),
    /// Capabilities stay.
    #[error("cannot drop capabilities")]
    Capabilities(#[source] caps::errors::CapsError),
    /// A call that every Linux has.
    #[error("cannot {what}")]
    System {
        /// What was tried.
        what: &'static str,
        /// What the system said.
        #[source]
        source: Errno,
    },
}

impl SandboxError {
    /// How the process ends.
    #[must_use]
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Self::Mode(_) | Self::NoLandlock | Self::Seccomp(_) => ExitCode::Config,
            Self::Landlock(_) | Self::Capabilities(_) | Self::System { .. } => ExitCode::Os,
        }
    }
}

/// A worker that has taken the first step.
#[derive(Debug)]
#[must_use = "the second step is still to be taken"]
pub struct Sandbox {
    mode: Mode,
    landlock: u32,
    /// The first filter was taken, so that the second one will be.
    has_seccomp: bool,
}

impl Sandbox {
    /// Takes the first step. Denied calls are told to `last_words` from now on.
    ///
    /// Call it while the process has one thread: threads that are there already stay free.
    ///
    /// # Errors
    /// An unknown mode, something that every Linux must allow, or what `require` asks for and the kernel does not have.
    pub fn enter(mode: &str, last_words: OwnedFd) -> Result<Self, SandboxError> {
        let mode = Mode::from_name(mode).ok_or_else(|| SandboxError::Mode(mode.into()))?;
        if mode == Mode::Off {
            tracing::warn!("not confined: `security.confinement` is `off`");
            return Ok(Self { mode, landlock: 0, has_seccomp: false });
        }
        load_symbols();
        listen_for_denied_calls(last_words)?;
        prctl::set_dumpable(false).map_err(system("forbid dumps"))?;
        limit(Resource::RLIMIT_CORE)?;
        drop_capabilities()?;
        prctl::set_no_new_privs().map_err(system("give up new privileges"))?;
        let landlock = forbid_paths_and_network()?;
        if landlock == 0 && mode == Mode::Require {
            return Err(SandboxError::NoLandlock);
        }
        let has_seccomp = match calls::allow(Stage::Start) {
            Ok(()) => true,
            Err(error) if mode == Mode::Require => return Err(SandboxError::Seccomp(error)),
            Err(error) => {
                tracing::warn!(%error, "system calls are not filtered");
                false
            }
        };
        Ok(Self { mode, landlock, has_seccomp })
    }

    /// Takes the second step; gives what holds the process in. No file gets longer than `file_bytes_max`.
    ///
    /// # Errors
    /// The system refuses to take something away.
    pub fn close(self, file_bytes_max: u64) -> Result<Confinement, SandboxError> {
        if self.mode == Mode::Off {
            return Ok(Confinement::default());
        }
        limit(Resource::RLIMIT_NPROC)?;
        // Open descriptors stay; there will be no further one.
        limit(Resource::RLIMIT_NOFILE)?;
        setrlimit(Resource::RLIMIT_FSIZE, file_bytes_max, file_bytes_max)
            .map_err(system("limit the size of files"))?;
        if self.has_seccomp {
            calls::allow(Stage::Serve).map_err(SandboxError::Seccomp)?;
        }
        Ok(Confinement { landlock: self.landlock, seccomp: self.has_seccomp })
    }
}

fn system(what: &'static str) -> impl FnOnce(Errno) -> SandboxError {
    move |source| SandboxError::System { what, source }
}

fn limit(resource: Resource) -> Result<(), SandboxError> {
    setrlimit(resource, 0, 0).map_err(system("lower a resource limit"))
}

/// With `RUST_BACKTRACE` a panic names its functions, from files that cannot be opened later: read them now.
fn load_symbols() {
    let backtrace = Backtrace::capture();
    if backtrace.status() == BacktraceStatus::Captured {
        // Names are looked up when they are printed.
        let printed = backtrace.to_string();
        tracing::debug!(n_bytes = printed.len(), "symbols loaded");
    }
}

fn drop_capabilities() -> Result<(), SandboxError> {
    // Only who has a capability for it may empty the bounding set; who has not gains nothing by `exec`, which is denied.
    if let Err(error) = caps::clear(None, CapSet::Bounding) {
        tracing::debug!(%error, "the bounding set of capabilities stays");
    }
    for set in [CapSet::Inheritable, CapSet::Effective, CapSet::Permitted] {
        // A service manager that has taken them away may have forbidden the call, too.
        if !caps::read(None, set).map_err(SandboxError::Capabilities)?.is_empty() {
            caps::clear(None, set).map_err(SandboxError::Capabilities)?;
        }
    }
    Ok(()) // The ambient set went with the permitted one.
}

/// No rule allows anything, so every right that the kernel can deny is denied. Gives the version of its interface.
fn forbid_paths_and_network() -> Result<u32, SandboxError> {
    let ruleset = Ruleset::default()
        .handle_access(AccessFs::from_all(LANDLOCK_ABI))
        .and_then(|ruleset| ruleset.handle_access(AccessNet::from_all(LANDLOCK_ABI)))
        .and_then(|ruleset| ruleset.scope(Scope::from_all(LANDLOCK_ABI)))
        .and_then(Ruleset::create)
        .and_then(landlock::RulesetCreated::restrict_self);
    match ruleset.map_err(SandboxError::Landlock)?.landlock {
        LandlockStatus::Available { effective_abi, kernel_abi } => {
            let known = u32::try_from(effective_abi as i32).unwrap_or(0);
            Ok(kernel_abi.and_then(|abi| u32::try_from(abi).ok()).unwrap_or(known))
        }
        LandlockStatus::NotEnabled | LandlockStatus::NotImplemented => {
            tracing::warn!("this kernel has no Landlock: only the filter of system calls keeps paths away");
            Ok(0)
        }
    }
}

fn listen_for_denied_calls(last_words: OwnedFd) -> Result<(), SandboxError> {
    // The handler needs it for as long as the process lives.
    let fd = last_words.into_raw_fd();
    LAST_WORDS.store(fd, Ordering::Release);
    let flags = SaFlags::SA_SIGINFO | SaFlags::SA_ONSTACK | SaFlags::SA_NODEFER | SaFlags::SA_RESTART;
    let action = SigAction::new(SigHandler::SigAction(on_denied_call), flags, SigSet::empty());
    // SAFETY: the handler makes system calls, reads atomics and writes to its own stack; it takes no lock and allocates
    // nothing.
    unsafe { sigaction(Signal::SIGSYS, &action) }.map_err(system("watch for denied calls"))?;
    Ok(())
}

/// `siginfo_t` as the kernel fills it in for SIGSYS; the C library's type does not name these fields.
#[repr(C)]
struct DeniedCall {
    signal: c_int,
    error: c_int,
    code: c_int,
    _padding: c_int,
    address: *mut c_void,
    number: c_int,
    architecture: u32,
}

/// `si_code` of a signal that seccomp sent.
const SYS_SECCOMP: c_int = 1;

extern "C" fn on_denied_call(_signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel passes a `siginfo_t` that lives as long as this call; it is at least as large as `DeniedCall`
    // and laid out so for SIGSYS (asm-generic/siginfo.h, the same on all 64-bit machines).
    let call = unsafe { &*info.cast::<DeniedCall>() };
    if call.code != SYS_SECCOMP {
        die(); // Somebody sent the signal by hand.
    }
    let name = usize::try_from(call.number).ok().and_then(Sysno::new);
    let Some(place) = name.and_then(calls::looks_for_a_file) else {
        tell("denied system call ", call.number, name, "");
        die();
    };
    // SAFETY: the third argument of a handler with SA_SIGINFO is the interrupted thread's context.
    let context = unsafe { &mut *context.cast::<ucontext_t>() };
    let mut buffer = [0; PATH_BYTES_MAX];
    let path = place.map_or("", |place| copy_path(argument(context, place), &mut buffer));
    if path != HARMLESS && N_REFUSALS.fetch_add(1, Ordering::Relaxed) < REFUSALS_LOGGED_MAX {
        tell("refused system call ", call.number, name, path);
    }
    set_result(context, -libc::EACCES);
}

/// Argument 0 or 1 of the interrupted system call.
fn argument(context: &ucontext_t, place: usize) -> *const u8 {
    #[cfg(target_arch = "x86_64")]
    let registers = {
        const RDI: usize = 8; // `libc::REG_RDI`, which is no `usize`; RSI follows.
        [context.uc_mcontext.gregs[RDI].cast_unsigned(), context.uc_mcontext.gregs[RDI + 1].cast_unsigned()]
    };
    #[cfg(target_arch = "aarch64")]
    let registers = [context.uc_mcontext.regs[0], context.uc_mcontext.regs[1]];
    std::ptr::with_exposed_provenance(usize::try_from(registers[place.min(1)]).unwrap_or(0))
}

/// What can be shown of a path in memory.
fn copy_path(path: *const u8, buffer: &mut [u8; PATH_BYTES_MAX]) -> &str {
    let mut len = 0;
    while !path.is_null() && len < buffer.len() {
        // SAFETY: the address is what this process passed to a system call that expects a string there; all bytes before
        // this one were not its end. If it is a lie, this process ends by SIGSEGV, as a denied one may.
        let byte = unsafe { path.wrapping_add(len).read() };
        if byte == 0 {
            break;
        }
        buffer[len] = if byte.is_ascii_graphic() { byte } else { b'?' };
        len += 1;
    }
    std::str::from_utf8(&buffer[..len]).unwrap_or_default()
}

/// Lets the interrupted system call return this.
fn set_result(context: &mut ucontext_t, result: c_int) {
    #[cfg(target_arch = "x86_64")]
    {
        const RAX: usize = 13; // `libc::REG_RAX`, which is no `usize`.
        context.uc_mcontext.gregs[RAX] = i64::from(result);
    }
    #[cfg(target_arch = "aarch64")]
    {
        context.uc_mcontext.regs[0] = i64::from(result).cast_unsigned();
    }
}

/// Writes one line to stderr and to the pipe, without allocating.
fn tell(what: &str, number: c_int, name: Option<Sysno>, path: &str) {
    let mut line = Line::default();
    line.push(what);
    line.push_number(number.unsigned_abs());
    line.push(" (");
    line.push(name.map_or("unknown", |name| name.name()));
    line.push(if path.is_empty() { ")" } else { ") of " });
    line.push(path);
    line.push("\n");
    write(LAST_WORDS.load(Ordering::Acquire), line.bytes());
    let mut log = Line::default();
    log.push("bitnetd worker ");
    log.push_number(std::process::id());
    log.push(": ");
    write(libc::STDERR_FILENO, log.bytes());
    write(libc::STDERR_FILENO, line.bytes());
}

fn write(fd: RawFd, bytes: &[u8]) {
    // SAFETY: the descriptor is stderr or the pipe, both open to the end of the process; a number that is neither only
    // makes the call fail.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    // Nobody is left to be told of an error.
    let _unwritten = nix::unistd::write(fd, bytes);
}

/// Ends the process by SIGSYS, as without a handler.
fn die() -> ! {
    // SAFETY: no pointer to an action means the default one here, and the calls take only numbers.
    unsafe {
        libc::signal(libc::SIGSYS, libc::SIG_DFL);
    }
    let (process, thread) = (nix::unistd::getpid().as_raw(), nix::unistd::gettid().as_raw());
    // SAFETY: numbers only; a thread may signal itself.
    unsafe {
        libc::syscall(libc::SYS_tgkill, process, thread, libc::SIGSYS);
    }
    // SAFETY: ends the process; reached only if the signal is held back.
    unsafe { libc::_exit(ExitCode::Software as c_int) }
}

/// A line of text on the stack.
struct Line {
    text: [u8; 160],
    len: usize,
}

impl Default for Line {
    fn default() -> Self {
        Self { text: [0; 160], len: 0 }
    }
}

impl Line {
    fn push(&mut self, text: &str) {
        for &byte in text.as_bytes() {
            if let Some(place) = self.text.get_mut(self.len) {
                *place = byte;
                self.len += 1;
            }
        }
    }

    fn push_number(&mut self, mut number: u32) {
        let mut digits = [0; 10];
        let mut start = digits.len();
        loop {
            start -= 1;
            digits[start] = b'0' + u8::try_from(number % 10).unwrap_or(0);
            number /= 10;
            if number == 0 {
                break;
            }
        }
        self.push(std::str::from_utf8(&digits[start..]).unwrap_or_default());
    }

    fn bytes(&self) -> &[u8] {
        &self.text[..self.len]
    }
}
