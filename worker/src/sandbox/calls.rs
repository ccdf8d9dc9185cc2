//! Which system calls a worker may make, while it loads and while it serves, and why.
//!
//! The table is the only source: the filters are made from it, and a test holds docs/security.md to it.

use nix::libc;
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};
use syscalls::Sysno;

/// Why there is no filter.
#[derive(Debug, thiserror::Error)]
pub enum FilterError {
    /// A bug in the table, or a machine that the filter's maker does not know.
    #[error("cannot make the filter")]
    Make(#[from] BackendError),
    /// The kernel did not take it.
    #[error("the kernel does not take the filter")]
    Apply(#[from] seccompiler::Error),
}

/// When a call may be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// While the model is read and threads are made.
    Start,
    /// From before `ready` to the end, and while loading.
    Serve,
}

/// A system call that is allowed.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    /// Its number and name.
    pub number: Sysno,
    /// Until when.
    pub stage: Stage,
    /// With which arguments.
    pub only: Only,
    /// What needs it.
    pub why: &'static str,
}

/// Numbers with their names.
type Named = &'static [(i32, &'static str)];

/// A condition on the arguments of a call, in words too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Only {
    /// Whatever they are.
    Any,
    /// This process: argument 0 is our pid, argument 2 one of these signals.
    OwnProcess(Named),
    /// Argument 0 is one of these numbers.
    First(Named),
    /// Argument 1 is one of these numbers.
    Second(Named),
    /// Argument 0 has these bits.
    FirstHas((i32, &'static str)),
    /// Argument 2 (protection of memory) does not ask for execution.
    NotExecutable,
}

impl Only {
    /// The condition in words, for docs/security.md.
    #[must_use]
    pub fn words(self) -> String {
        let names = |of: Named| of.iter().map(|(_, name)| format!("`{name}`")).collect::<Vec<_>>().join(", ");
        match self {
            Self::Any => "any".into(),
            Self::OwnProcess(signals) => format!("this process; {}", names(signals)),
            Self::First(values) | Self::Second(values) => names(values),
            Self::FirstHas((_, name)) => format!("with `{name}`"),
            Self::NotExecutable => "without `PROT_EXEC`".into(),
        }
    }
}

use Stage::{Serve, Start};

const fn serve(number: Sysno, why: &'static str) -> Call {
    Call { number, stage: Serve, only: Only::Any, why }
}

const fn start(number: Sysno, why: &'static str) -> Call {
    Call { number, stage: Start, only: Only::Any, why }
}

const fn only(call: Call, only: Only) -> Call {
    Call { only, ..call }
}

/// One call, two names.
#[cfg(target_arch = "x86_64")]
const FSTATAT: Sysno = Sysno::newfstatat;
#[cfg(not(target_arch = "x86_64"))]
const FSTATAT: Sysno = Sysno::fstatat;

const CALLS: &[Call] = &[
    // The link to the supervisor, the log, the last words.
    serve(Sysno::read, "frames from the link"),
    serve(Sysno::recvfrom, "frames from the link, where the standard library receives instead of reading"),
    serve(Sysno::write, "frames to the link, lines to the log, last words"),
    serve(Sysno::writev, "lines to the log that the standard library writes in pieces"),
    serve(Sysno::sendto, "frames to the link, where the standard library sends instead of writing"),
    serve(
        Sysno::pread64,
        "what the process has in memory, from a file of its own that it opened before all this",
    ),
    serve(Sysno::close, "the link and what was mapped, when the process ends"),
    only(
        serve(
            Sysno::fcntl,
            "lock and seals of the fast image; debug builds check that a descriptor is open before they close it",
        ),
        Only::Second(&[
            (libc::F_GETFD, "F_GETFD"),
            (libc::F_SETLK, "F_SETLK"),
            (libc::F_GET_SEALS, "F_GET_SEALS"),
            (libc::F_ADD_SEALS, "F_ADD_SEALS"),
        ]),
    ),
    serve(
        Sysno::ftruncate,
        "the size of the fast image and of a node's copy of the model, by the worker that makes them",
    ),
    serve(Sysno::lseek, "the size of the fast image, by those that map it"),
    // Threads that wait for each other.
    serve(Sysno::futex, "locks, channels, sleeping compute threads"),
    serve(Sysno::sched_yield, "locks that spin"),
    serve(Sysno::restart_syscall, "a wait with a deadline goes on after SIGSTOP and SIGCONT"),
    // Time.
    serve(Sysno::clock_gettime, "timings, where the kernel's page of clocks does not serve"),
    serve(Sysno::clock_nanosleep, "pauses of a thread"),
    // Memory.
    only(
        serve(
            Sysno::mmap,
            "the allocator; the inherited model and fast image (no other file can be opened); never executable",
        ),
        Only::NotExecutable,
    ),
    serve(Sysno::munmap, "the allocator, and mappings that end"),
    serve(Sysno::mremap, "the allocator, for large blocks that grow"),
    only(serve(Sysno::mprotect, "the allocator's arenas; never executable"), Only::NotExecutable),
    serve(Sysno::mlock2, "`engine.mlock`: the model and the KV cache, and the fast image when it is there"),
    serve(Sysno::madvise, "the allocator gives pages back; huge pages"),
    serve(Sysno::brk, "the allocator"),
    serve(Sysno::getrandom, "seeds of hash tables; the allocator's secrets"),
    serve(Sysno::sched_getaffinity, "the allocator counts CPUs to limit its arenas"),
    // The end, good or bad.
    serve(Sysno::exit, "a thread ends"),
    serve(Sysno::exit_group, "the process ends"),
    serve(Sysno::sigaltstack, "a thread that ends gives its signal stack back"),
    serve(Sysno::rt_sigprocmask, "ending threads and `abort` hold signals back"),
    serve(Sysno::rt_sigreturn, "return from the handler of a denied call"),
    only(
        serve(
            Sysno::rt_sigaction,
            "handlers of bad memory accesses and denied calls give way to the default",
        ),
        Only::First(&[(libc::SIGSEGV, "SIGSEGV"), (libc::SIGBUS, "SIGBUS"), (libc::SIGSYS, "SIGSYS")]),
    ),
    serve(Sysno::getpid, "`abort` names the process that it ends"),
    serve(Sysno::gettid, "`abort` names the thread that it ends"),
    only(
        serve(Sysno::tgkill, "`abort`, and the death after a denied call: to this process only"),
        Only::OwnProcess(&[(libc::SIGABRT, "SIGABRT"), (libc::SIGSYS, "SIGSYS")]),
    ),
    // Loading: mapping the inherited files.
    start(Sysno::fstat, "kind and size of the inherited files"),
    start(Sysno::statx, "kind and size of the inherited files"),
    start(FSTATAT, "kind and size of the inherited files, with an older C library"),
    only(
        start(
            Sysno::fcntl,
            "a second descriptor of the link for its reader; lock of the node's copy of the model",
        ),
        Only::Second(&[
            (libc::F_SETFD, "F_SETFD"),
            (libc::F_GETFL, "F_GETFL"),
            (libc::F_SETLKW, "F_SETLKW"),
            (libc::F_DUPFD_CLOEXEC, "F_DUPFD_CLOEXEC"),
        ]),
    ),
    // Loading: threads.
    start(
        Sysno::clone3,
        "refused with ENOSYS by a filter of its own: its flags cannot be read, those of clone can",
    ),
    only(
        start(Sysno::clone, "threads; never a process"),
        Only::FirstHas((libc::CLONE_THREAD, "CLONE_THREAD")),
    ),
    only(
        start(Sysno::rt_sigaction, "the C library's own signals for its threads, with the first of them"),
        Only::First(&[(32, "SIGRTMIN"), (33, "SIGRTMIN + 1")]),
    ),
    start(Sysno::set_robust_list, "a new thread"),
    start(Sysno::rseq, "a new thread"),
    only(
        start(Sysno::sched_setaffinity, "a compute thread pins itself; never another process"),
        Only::First(&[(0, "itself")]),
    ),
    only(
        start(Sysno::prctl, "names of threads; no new privileges, again, with the second filter"),
        Only::First(&[
            (libc::PR_SET_NAME, "PR_SET_NAME"),
            (libc::PR_SET_NO_NEW_PRIVS, "PR_SET_NO_NEW_PRIVS"),
        ]),
    ),
    // Loading: the second step.
    only(
        start(Sysno::prlimit64, "the second step lowers limits; never those of another process"),
        Only::First(&[(0, "itself")]),
    ),
    only(start(Sysno::seccomp, "the second step's filter"), Only::First(&[(1, "SECCOMP_SET_MODE_FILTER")])),
];

/// Every allowed call.
#[must_use]
pub fn calls() -> &'static [Call] {
    CALLS
}

/// Calls that only look for a file are refused with an error and logged, instead of the end of the process: `Some`, with
/// the place of the path among the arguments if there is one.
pub(super) fn looks_for_a_file(call: Sysno) -> Option<Option<usize>> {
    #[cfg(target_arch = "x86_64")]
    if matches!(call, Sysno::open | Sysno::stat | Sysno::lstat | Sysno::access | Sysno::readlink) {
        return Some(Some(0));
    }
    match call {
        Sysno::openat
        | Sysno::openat2
        | FSTATAT
        | Sysno::statx
        | Sysno::faccessat
        | Sysno::faccessat2
        | Sysno::readlinkat => Some(Some(1)),
        Sysno::getcwd => Some(None),
        _ => None,
    }
}

/// From now on this process may make the calls of a stage only; with [`Serve`], all its threads.
pub(super) fn allow(stage: Stage) -> Result<(), FilterError> {
    match stage {
        Start => {
            seccompiler::apply_filter(&without_clone3()?)?;
            seccompiler::apply_filter(&filter(Start)?)?;
        }
        Serve => seccompiler::apply_filter_all_threads(&filter(Serve)?)?,
    }
    Ok(())
}

fn architecture() -> Result<TargetArch, BackendError> {
    std::env::consts::ARCH.try_into()
}

/// The C library falls back to `clone`, whose flags a filter can read.
fn without_clone3() -> Result<BpfProgram, FilterError> {
    let rules = [(i64::from(Sysno::clone3.id()), Vec::new())].into();
    let refuse = SeccompAction::Errno(libc::ENOSYS.unsigned_abs());
    Ok(SeccompFilter::new(rules, SeccompAction::Allow, refuse, architecture()?)?.try_into()?)
}

fn filter(stage: Stage) -> Result<BpfProgram, FilterError> {
    let mut rules = std::collections::BTreeMap::<i64, Vec<SeccompRule>>::new();
    let is_allowed = |call: &&Call| stage == Start || call.stage == Serve;
    for call in CALLS.iter().filter(is_allowed) {
        let of = rules.entry(i64::from(call.number.id())).or_default();
        // A call without a condition stays so: the table names it once (a test holds that).
        of.extend(conditions(call.only)?);
    }
    // Denied: the handler in `super` names the call.
    Ok(SeccompFilter::new(rules, SeccompAction::Trap, SeccompAction::Allow, architecture()?)?.try_into()?)
}

/// Rules of which one must hold; none for a call that may have any arguments.
fn conditions(only: Only) -> Result<Vec<SeccompRule>, BackendError> {
    let is = |argument: u8, op: SeccompCmpOp, value: i32| {
        // Flags and commands are numbers of 32 bits; the kernel ignores the upper half of the register.
        SeccompCondition::new(argument, SeccompCmpArgLen::Dword, op, u64::from(value.unsigned_abs()))
    };
    let each = |argument: u8, values: Named| -> Result<Vec<SeccompRule>, BackendError> {
        values
            .iter()
            .map(|&(value, _)| SeccompRule::new(vec![is(argument, SeccompCmpOp::Eq, value)?]))
            .collect()
    };
    let has = |bits: i32| SeccompCmpOp::MaskedEq(u64::from(bits.unsigned_abs()));
    match only {
        Only::Any => Ok(Vec::new()),
        Only::First(values) => each(0, values),
        Only::Second(values) => each(1, values),
        Only::FirstHas((bits, _)) => Ok(vec![SeccompRule::new(vec![is(0, has(bits), bits)?])?]),
        Only::NotExecutable => Ok(vec![SeccompRule::new(vec![is(2, has(libc::PROT_EXEC), 0)?])?]),
        Only::OwnProcess(signals) => {
            let pid = i32::try_from(std::process::id()).unwrap_or(i32::MAX);
            signals
                .iter()
                .map(|&(signal, _)| {
                    SeccompRule::new(vec![is(0, SeccompCmpOp::Eq, pid)?, is(2, SeccompCmpOp::Eq, signal)?])
                })
                .collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_filters_can_be_made() {
        let sizes =
            [filter(Start).unwrap().len(), filter(Serve).unwrap().len(), without_clone3().unwrap().len()];
        assert!(sizes[0] > sizes[1] && sizes[1] > sizes[2], "{sizes:?}");
    }

    #[test]
    fn a_call_with_a_condition_is_never_named_without_one() {
        for call in CALLS {
            let same = CALLS.iter().filter(|other| other.number == call.number);
            assert!(call.only != Only::Any || same.count() == 1, "{} is named twice", call.number.name());
        }
    }

    /// The table of docs/security.md, with the names that calls have on x86-64.
    #[cfg(target_arch = "x86_64")]
    fn table() -> String {
        let mut rows: Vec<String> = CALLS
            .iter()
            .map(|call| {
                let when = if call.stage == Serve { "always" } else { "loading" };
                format!("| `{}` | {when} | {} | {} |\n", call.number.name(), call.only.words(), call.why)
            })
            .collect();
        rows.sort_by_key(|row| row.contains("| loading |"));
        format!("| Call | When | Arguments | For |\n|---|---|---|---|\n{}", rows.concat())
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn the_page_on_security_names_every_call_with_its_reason() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/security.md");
        let page = std::fs::read_to_string(&path).unwrap();
        let (before, rest) = page.split_once("<!-- calls -->\n").expect("the table's first mark");
        let (committed, after) = rest.split_once("<!-- end of calls -->").expect("the table's last mark");
        if committed != table() && std::env::var_os("UPDATE_GOLDEN").is_some() {
            let anew = format!("{before}<!-- calls -->\n{}<!-- end of calls -->{after}", table());
            std::fs::write(&path, anew).unwrap();
            return;
        }
        assert_eq!(committed, table(), "write it anew with UPDATE_GOLDEN=1");
    }
}
