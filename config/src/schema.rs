//! Every key there is, with what it means: the source of `example.toml`, of hints and of the check of the docs.

/// One key of the configuration file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key {
    /// The section it stands in.
    pub section: &'static str,
    /// Its name there.
    pub name: &'static str,
    /// What it means, one line or more.
    pub doc: &'static str,
    /// What to write where the default is that the key is absent.
    pub example: &'static str,
}

impl Key {
    /// True if a running daemon cannot take a new value over.
    #[must_use]
    pub fn needs_restart(&self) -> bool {
        match (self.section, self.name) {
            ("listen", name) => !matches!(name, "allow_uids" | "allow_gids"),
            key => matches!(key, ("log", "format" | "journal_socket") | ("queue", "journal")),
        }
    }
}

const fn key(section: &'static str, name: &'static str, doc: &'static str) -> Key {
    Key { section, name, doc, example: "" }
}

const fn absent(section: &'static str, name: &'static str, example: &'static str, doc: &'static str) -> Key {
    Key { section, name, doc, example }
}

/// The sections in their order, with what they are about.
pub(crate) const SECTIONS: &[(&str, &str)] = &[
    ("model", "Which model is served."),
    (
        "split",
        "How the CPUs are divided: a profile, or workers and threads, or a list of CPUs for each worker.",
    ),
    ("affinity", "Which CPUs may be used, and how threads and memory are placed on them."),
    ("engine", "How a worker computes."),
    ("queue", "Which jobs are let in."),
    ("restart", "What happens when a worker dies, and when the service stops."),
    ("watchdog", "When a worker that does not answer counts as hung."),
    ("service", "When the whole service counts as ready."),
    ("listen", "Where clients come in, and who may."),
    ("security", "What holds workers in."),
    ("log", "What is written, to stderr or to the journal."),
];

/// Every key, in the order of `example.toml`.
pub const KEYS: &[Key] = &[
    absent(
        "model",
        "path",
        "\"models/ggml-model-i2_s.gguf\"",
        "GGUF file; a relative path starts at the directory of this file. Without it the built-in story model is served.",
    ),
    absent("model", "alias", "\"bitnet-2b\"", "The name clients see. Without it the model's own."),
    key(
        "model",
        "head",
        "What decoding reads: \"file\" (the weights as they are), \"fast\" (an image of the ternary weights and of the output\nhead in fewer bytes, made once and shared by all workers; every token stays the same), \"auto\" (fast for models\nof 64 MiB and more).",
    ),
    absent(
        "model",
        "image_cache",
        "\"/var/cache/bitnetd\"",
        "Directory in which fast images are kept once they are made, so that the next start reads them instead (some 700 MB\nfor a 2B model; four at most); \"off\": none is kept. Without it $CACHE_DIRECTORY, else /var/cache/bitnetd where that may\nbe written, else ~/.cache/bitnetd.",
    ),
    key(
        "split",
        "profile",
        "\"auto\", \"max-throughput\" (one worker on every CPU), \"balanced\" (for 12 CPUs 3 workers with 4 threads),\n\"high-concurrency\" (6 x 2), \"low-latency\" (4 x 3).",
    ),
    absent("split", "workers", "3", "Instead of a profile: this many workers …"),
    absent("split", "threads", "4", "… with this many compute threads each."),
    absent(
        "split",
        "worker",
        "",
        "Instead of both: the CPUs of each worker, one `[[split.worker]]` for each.",
    ),
    key(
        "affinity",
        "reserve",
        "CPUs that no worker gets, such as \"0\" or \"0-1,8\"; the supervisor keeps to them.",
    ),
    key(
        "affinity",
        "smt",
        "SMT siblings: \"spread\" (a thread on each core first, siblings when cores run out), \"pack\" (both siblings of a\ncore side by side in one worker), \"off\" (one thread on a core, never two).",
    ),
    key("affinity", "cores", "Kinds of core: \"all\", \"performance\", \"efficiency\"."),
    key(
        "affinity",
        "numa",
        "Memory of a worker: \"auto\" (bound to its node if the machine has several), \"bind\", \"preferred\", \"interleave\"\n(over the nodes of its CPUs), \"off\" (left to the kernel).",
    ),
    key(
        "affinity",
        "copies",
        "The model in memory: \"none\" (all workers read one), \"node\" (each memory node that has workers gets its own copy,\nmade once by the first of them; it takes the model's size for each node; nothing on a machine with one node).",
    ),
    absent("engine", "ctx", "4096", "Context window in tokens. Without it the model's own."),
    key("engine", "max_batch", "Sequences one worker works on together."),
    key(
        "engine",
        "prefill_chunk",
        "Prompt tokens in one step, at most, so that a long prompt does not stall the others.",
    ),
    key(
        "engine",
        "prefill_time",
        "How long a step with prompt tokens may take while others wait for their next token, about: shorter steps for a\nsteadier stream, longer ones for more tokens in all (at most \"1s\", which `batch` takes for itself).",
    ),
    key(
        "engine",
        "kv_type",
        "Type of the KV cache, which holds what was read and written so far: \"f16\", or \"q8_0\" (8 bits with a scale for each 32\nnumbers: 53 % of the memory; answers may differ from those with \"f16\", and are as reproducible).",
    ),
    key(
        "engine",
        "isa",
        "Instruction set: \"auto\", \"scalar\", \"avx2\", \"avx-vnni\", \"avx512-vnni\", \"neon\", \"neon-dotprod\".\nThe answers are the same with each.",
    ),
    key(
        "engine",
        "wait",
        "How a compute thread waits for work: \"spin\" (fastest, burns its CPU), \"hybrid\" (spins shortly, then sleeps),\n\"park\" (sleeps at once).",
    ),
    key(
        "engine",
        "huge_pages",
        "Huge pages for the fast image of the weights: \"auto\" (if there are any), \"on\" (a warning if not), \"off\".",
    ),
    key(
        "engine",
        "nice",
        "Niceness of the workers, -20 to 19: more leaves more to others. Less than 0 needs the right to it (CAP_SYS_NICE,\nLimitNICE=).",
    ),
    key(
        "engine",
        "scheduler",
        "How the kernel schedules the workers: \"normal\", \"batch\" (SCHED_BATCH: longer slices, for machines that do little else).",
    ),
    key(
        "engine",
        "speculation",
        "Guess what comes next from the text so far and check several tokens in one step: \"auto\" (where it pays),\n\"off\". The answers are the same.",
    ),
    key(
        "engine",
        "mlock",
        "Keep model and KV cache in memory, whatever else wants it. Needs a limit of locked memory that is large enough:\nLimitMEMLOCK= in a unit, `ulimit -l` in a shell.",
    ),
    absent(
        "engine",
        "memory_mib",
        "8192",
        "MiB that the model and all workers may take together. What does not fit is refused at the start. Without it what the\nmachine and our control group have left then.",
    ),
    key("queue", "max_jobs", "Jobs that wait, at most; the next one is refused as `overloaded`."),
    key("queue", "max_per_client", "Of those from one client, at most."),
    key("queue", "max_deaths", "A job that was on board of this many dying workers is given up."),
    absent(
        "queue",
        "journal",
        "\"/var/lib/bitnetd/jobs.redb\"",
        "File that keeps durable jobs (`bitnetd submit`) and their results; \"off\": there are none. Without it jobs.redb in\n$STATE_DIRECTORY, else in /var/lib/bitnetd where that may be written, else in ~/.local/state/bitnetd.",
    ),
    key(
        "queue",
        "durable_max_jobs",
        "Durable jobs that have not ended, at most; the next one is refused as `overloaded`.",
    ),
    key("queue", "durable_max_per_client", "Of those from one client, at most."),
    key(
        "queue",
        "durable_max_mib",
        "MiB of requests and answers that are kept, at most; beyond, new jobs are refused.",
    ),
    key(
        "queue",
        "durable_per_worker",
        "Durable jobs on one worker at a time, at most, so that places are left for clients who wait for theirs.",
    ),
    key("queue", "results_max", "Results of durable jobs that are kept, at most; the oldest go first."),
    key("queue", "results_keep", "How long the result of a durable job is kept."),
    key("restart", "max", "A worker slot that is restarted more often than this …"),
    key("restart", "window", "… within this time is given up, and the service is degraded."),
    key("restart", "backoff_min", "Wait before the first restart; it doubles with each further one …"),
    key("restart", "backoff_max", "… up to this."),
    key("restart", "start_timeout", "A worker that is not ready after this long is killed."),
    key("restart", "drain_timeout", "When the service stops, accepted jobs get this long to end."),
    key("watchdog", "interval", "Time between two pings of a worker's step loop."),
    key(
        "watchdog",
        "timeout",
        "A worker whose step loop has not answered for this long is killed and replaced.",
    ),
    absent(
        "service",
        "ready_workers",
        "1",
        "So many workers must be ready before the service says that it is. Without it all of them.",
    ),
    absent(
        "listen",
        "socket",
        "\"/run/bitnetd/bitnetd.sock\"",
        "Unix socket for clients. Without it /run/bitnetd/bitnetd.sock where that may be written, else\n$XDG_RUNTIME_DIR/bitnetd.sock, else ~/.local/state/bitnetd/bitnetd.sock.",
    ),
    key("listen", "mode", "Permission bits of the socket, octal."),
    absent(
        "listen",
        "owner",
        "\"bitnetd\"",
        "User who owns the socket, by name or number. Without it whoever runs the service.",
    ),
    absent(
        "listen",
        "group",
        "\"bitnetd\"",
        "Group of the socket, by name or number: with mode \"0660\" its members may connect. Without it the service's own.",
    ),
    key(
        "listen",
        "allow_uids",
        "Uids that may connect, such as [1000, 1001]; empty: whoever the mode lets in.",
    ),
    key("listen", "allow_gids", "Gids that may connect; empty: whoever the mode lets in."),
    key("listen", "max_connections", "Connections open at once, at most."),
    absent(
        "listen",
        "metrics",
        "\"127.0.0.1:9464\"",
        "Where Prometheus fetches metrics over HTTP: an address with a port, or the path of a Unix socket (with `mode`).\nWithout it nowhere; `bitnetd metrics` prints them in any case.",
    ),
    key(
        "security",
        "confinement",
        "Workers give up files, network, other processes and nearly all system calls: \"auto\" (what the kernel can do;\nwhat it cannot is logged and shown by `status`), \"require\" (no start without Landlock and seccomp), \"off\".",
    ),
    key(
        "log",
        "format",
        "\"auto\" (the journal where systemd has connected stderr to it, else text), \"journald\" (entries with fields); on stderr\n\"text\" for people or \"json\" with one object a line.",
    ),
    key(
        "log",
        "level",
        "\"error\", \"warn\", \"info\", \"debug\", \"trace\" or a filter such as \"info,bitnetd_supervisor=debug\".",
    ),
    key("log", "journal_socket", "Where the journal takes entries."),
];

/// Keys that are planned and refused until they do something, with what to do until then.
pub(crate) const NOT_YET: &[(&str, &str)] = &[
    ("listen.http_socket", "clients speak the framed protocol on `listen.socket`; remove the key"),
    ("listen.http_tcp", "clients speak the framed protocol on `listen.socket`; remove the key"),
    (
        "listen.api_keys_file",
        "access is by `listen.mode`, `listen.allow_uids` and `listen.allow_gids`; remove the key",
    ),
];

/// Values of `engine.kv_type`.
pub(crate) const KV_TYPES: &[&str] = &["f16", "q8_0"];
/// Values of `engine.isa`.
pub const ISAS: &[&str] = &["auto", "scalar", "avx2", "avx-vnni", "avx512-vnni", "neon", "neon-dotprod"];
/// Values of `engine.wait`.
pub(crate) const WAITS: &[&str] = &["spin", "hybrid", "park"];
/// Values of `engine.huge_pages`.
pub(crate) const HUGE_PAGES: &[&str] = &["auto", "on", "off"];
/// Values of `engine.speculation`.
pub const SPECULATIONS: &[&str] = &["auto", "off"];
/// Levels of `log.level`.
pub(crate) const LOG_LEVELS: &[&str] = &["off", "error", "warn", "info", "debug", "trace"];
