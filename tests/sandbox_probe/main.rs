//! A process in a worker's sandbox that does what a worker must not: `sandbox_probe STAGE ACT [ARGUMENT]`.
//!
//! STAGE is `none`, `loading` (after the first step) or `serving` (after the second, with a second thread that was there
//! before). It prints what came of the act; a denied call kills it. Its own program, so that no act can be reached in a
//! real worker.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a failed unwrap is a failed test, and stdout is its answer"
)]

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::process::Command;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use bitnetd_worker::sandbox::Sandbox;
use nix::fcntl::OFlag;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{Signal, kill};
use nix::sys::{prctl, ptrace};
use nix::unistd::{Pid, Uid, execv, pipe2, setuid};

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [stage, act, rest @ ..] = &args[..] else { panic!("sandbox_probe STAGE ACT [ARGUMENT]") };
    let (heard, last_words) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).unwrap();
    let mode = if stage == "none" { "off" } else { "auto" };
    let sandbox = Sandbox::enter(mode, last_words).unwrap();
    let (jobs, results) = second_thread();
    let confinement = (stage == "serving").then(|| sandbox.close(0).unwrap());
    println!("{}", confinement.map_or_else(|| "not closed".to_owned(), |held| held.to_string()));
    io::stdout().flush().unwrap();
    let (act, argument) = (act.clone(), rest.first().cloned().unwrap_or_default());
    let outcome = match act.strip_prefix("thread-") {
        // The second step holds threads that were there before, too.
        Some(act) => {
            jobs.send((act.to_owned(), argument)).unwrap();
            results.recv().unwrap()
        }
        None => perform(&act, &argument),
    };
    println!("{}", outcome.unwrap_or_else(|error| format!("refused: {error}")));
    println!("words: {}", words(heard));
}

type Job = (String, String);
type Outcome = Result<String, io::Error>;

fn second_thread() -> (Sender<Job>, Receiver<Outcome>) {
    let (jobs, jobs_in) = channel::<Job>();
    let (results_out, results) = channel();
    let (started, is_started) = channel();
    thread::spawn(move || {
        started.send(()).unwrap();
        for (act, argument) in jobs_in {
            results_out.send(perform(&act, &argument)).unwrap();
        }
    });
    is_started.recv().unwrap();
    (jobs, results)
}

/// What the handler of denied calls has said so far.
fn words(heard: OwnedFd) -> String {
    let mut buffer = [0; 1024];
    let n_bytes = File::from(heard).read(&mut buffer).unwrap_or(0);
    String::from_utf8_lossy(&buffer[..n_bytes]).trim_end().replace('\n', "; ")
}

fn perform(act: &str, argument: &str) -> Outcome {
    let pid = || Pid::from_raw(argument.parse().unwrap());
    let size = 1 << 16;
    match act {
        // What a worker does all day.
        "work" => work(),
        "abort" => std::process::abort(),
        // Files.
        "open" => File::open(argument).map(|_| "opened".into()),
        "create" => File::create(argument).map(|_| "created".into()),
        "list" => fs::read_dir(argument).map(|_| "listed".into()),
        "stat" => fs::metadata(argument).map(|_| "looked at".into()),
        "remove" => fs::remove_file(argument).map(|()| "removed".into()),
        "grow" => io::stderr().write_all(b"x").map(|()| "written".into()),
        "rename" => fs::rename(argument, format!("{argument}.x")).map(|()| "renamed".into()),
        // The network, and local sockets.
        "tcp" => TcpStream::connect(argument).map(|_| "connected".into()),
        "listen" => TcpListener::bind("127.0.0.1:0").map(|_| "listening".into()),
        "udp" => UdpSocket::bind("127.0.0.1:0").map(|_| "bound".into()),
        "unix" => UnixStream::connect(argument).map(|_| "connected".into()),
        "pair" => UnixDatagram::pair().map(|_| "made".into()),
        // Other processes.
        "exec" => {
            let program = CString::new(argument).unwrap();
            let never = execv(&program, &[&program])?;
            match never {}
        }
        "fork" => Command::new(argument).status().map(|_| "started".into()),
        "thread" => thread::Builder::new().spawn(|| ()).map(|_| "started".into()),
        "kill" => Ok(kill(pid(), Signal::SIGTERM).map(|()| "killed".into())?),
        "ptrace" => Ok(ptrace::attach(pid()).map(|()| "attached".into())?),
        "peek" => {
            let mut byte = [0];
            let local = &mut [io::IoSliceMut::new(&mut byte)];
            let remote = &[nix::sys::uio::RemoteIoVec { base: 4096, len: 1 }];
            Ok(nix::sys::uio::process_vm_readv(pid(), local, remote).map(|_| "read".into())?)
        }
        // Rights.
        "setuid" => Ok(setuid(Uid::from_raw(0)).map(|()| "changed".into())?),
        "limits" => Ok(setrlimit(Resource::RLIMIT_NOFILE, 64, 64).map(|()| "raised".into())?),
        "dumps" => Ok(prctl::set_dumpable(true).map(|()| "dumpable".into())?),
        "code" => memmap2::MmapMut::map_anon(size)?.make_exec().map(|_| "executable".into()),
        _ => panic!("unknown act `{act}`"),
    }
}

/// Memory, time, locks, other threads' memory: everything that serving needs.
fn work() -> Outcome {
    let mut blocks: Vec<Vec<u8>> = (0..200).map(|n| vec![1; 1000 * n]).collect();
    blocks.iter_mut().for_each(|block| block.resize(block.len() * 3, 2));
    let sum: usize = blocks.iter().map(Vec::len).sum();
    drop(blocks);
    let started = std::time::Instant::now();
    let mut table = std::collections::HashMap::new();
    table.insert("a", 1);
    let (_kept, receiver) = channel::<()>();
    let late = receiver.recv_timeout(std::time::Duration::from_millis(1)).is_err();
    thread::yield_now();
    let unwound = std::panic::catch_unwind(|| table["b"]).is_err();
    Ok(format!("worked: {sum} {late} {unwound} {}", started.elapsed().as_secs() < 100))
}
