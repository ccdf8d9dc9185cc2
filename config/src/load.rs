//! From a file or text to a validated [`Config`].

use std::io::Read as _;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use toml::de::{DeTable, DeValue};

use crate::problem::{ConfigErrors, LoadError};
use crate::reader::{Problems, Refusal, Table};
use crate::sections::{
    AffinityConfig, Config, DurableConfig, EngineConfig, ListenConfig, LogConfig, MetricsAddress,
    ModelConfig, Place, QueueConfig, RestartConfig, SecurityConfig, ServiceConfig, SplitConfig,
    WatchdogConfig,
};
use crate::{Choice, cpu_list, schema, values};

/// Longest configuration file that is read, in bytes.
pub const CONFIG_FILE_BYTES_MAX: u64 = 1 << 20;
/// Longest path of a Unix socket, in bytes, without its end marker.
const SOCKET_PATH_BYTES_MAX: usize = 107;
/// Longest alias, in bytes.
const ALIAS_BYTES_MAX: usize = 128;
/// Longest name of a user or a group, in bytes.
const PRINCIPAL_BYTES_MAX: usize = 64;
/// Longest duration anywhere.
const DURATION_MAX: Duration = Duration::from_secs(7 * 24 * 3600);
/// Most workers or threads, and most entries of a list.
const COUNT_MAX: u32 = 8192;

impl Config {
    /// Reads and checks a configuration file.
    ///
    /// # Errors
    /// If the file cannot be read, is longer than [`CONFIG_FILE_BYTES_MAX`] or says something wrong.
    pub fn load(path: &Path) -> Result<Self, LoadError> {
        let unreadable = |source| LoadError::Read { path: path.to_owned(), source };
        let file = std::fs::File::open(path).map_err(unreadable)?;
        let mut bytes = Vec::new();
        file.take(CONFIG_FILE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(unreadable)?;
        if bytes.len() as u64 > CONFIG_FILE_BYTES_MAX {
            return Err(LoadError::TooLarge { path: path.to_owned(), max: CONFIG_FILE_BYTES_MAX });
        }
        let text = String::from_utf8(bytes).map_err(|error| LoadError::NotUtf8 {
            path: path.to_owned(),
            offset: error.utf8_error().valid_up_to(),
        })?;
        Ok(Self::parse(&text, path)?)
    }

    /// Checks the text of a configuration file; relative paths in it start at the directory of `origin`.
    ///
    /// # Errors
    /// With everything that is wrong in `text`.
    pub fn parse(text: &str, origin: &Path) -> Result<Self, ConfigErrors> {
        let mut problems = Problems::new(text);
        let (document, syntax_errors) = DeTable::parse_recoverable(text);
        let base = origin.parent().unwrap_or(Path::new(""));
        let mut root = Table::root(document.get_ref(), &mut problems);
        let config = Self {
            model: root.section("model", |table| model(table, base)),
            split: root.section("split", split),
            affinity: root.section("affinity", affinity),
            engine: root.section("engine", engine),
            queue: root.section("queue", |table| queue(table, base)),
            restart: root.section("restart", restart),
            watchdog: root.section("watchdog", watchdog),
            service: root.section("service", service),
            listen: root.section("listen", |table| listen(table, base)),
            security: root.section("security", security),
            log: root.section("log", |table| log(table, base)),
        };
        root.finish();
        for error in syntax_errors {
            let span = error.span().unwrap_or(text.len()..text.len());
            problems.add_syntax_error(span, error.message());
        }
        let problems = problems.into_sorted();
        if problems.is_empty() {
            Ok(config)
        } else {
            Err(ConfigErrors { origin: origin.to_owned(), problems })
        }
    }
}

fn model(table: &mut Table<'_, '_, '_>, base: &Path) -> ModelConfig {
    ModelConfig {
        path: table.get("path", |value| path(value, base)),
        alias: table.get("alias", |value| match value.as_str() {
            Some(name) if (1..=ALIAS_BYTES_MAX).contains(&name.len()) && !name.contains(char::is_control) => {
                Ok(name.to_owned())
            }
            _ => Err(Refusal::expected(format!("a name of 1 to {ALIAS_BYTES_MAX} bytes"), value)),
        }),
        head: table.get("head", choice).unwrap_or_default(),
        image_cache: table.get("image_cache", |value| place(value, base)).unwrap_or_default(),
    }
}

fn split(table: &mut Table<'_, '_, '_>) -> SplitConfig {
    let profile = table.get("profile", choice);
    let workers = table.get("workers", |value| integer(value, 1..=COUNT_MAX));
    let threads = table.get("threads", |value| integer(value, 1..=COUNT_MAX));
    let explicit = table.sections("worker", |worker| {
        let cpus = worker.get("cpus", cpus);
        if !worker.has("cpus") {
            worker.refuse("", Refusal::new("`cpus` is missing").hint("such as `cpus = \"0-3\"`"));
        } else if cpus.as_ref().is_some_and(Vec::is_empty) {
            worker.refuse("cpus", Refusal::new("the list is empty, and a worker needs a CPU"));
        }
        cpus.unwrap_or_default()
    });
    let ways = [
        ("profile", table.has("profile")),
        ("workers", table.has("workers") || table.has("threads")),
        ("worker", table.has("worker")),
    ];
    let given: Vec<&str> = ways.into_iter().filter(|(_, given)| *given).map(|(name, _)| name).collect();
    if let [_, second, ..] = given[..] {
        let refusal = Refusal::new("there is more than one way to split the CPUs here")
            .hint("keep one of `profile`, `workers` with `threads`, and `[[split.worker]]`");
        table.refuse(second, refusal);
    } else {
        for (given, other) in [("workers", "threads"), ("threads", "workers")] {
            if table.has(given) && !table.has(other) {
                let hint = format!("add `{other}`, or take a `profile` instead");
                table.refuse(given, Refusal::new(format!("needs `{other}` beside it")).hint(hint));
            }
        }
    }
    if let Some(explicit) = explicit {
        refuse_shared_cpus(table, &explicit);
        return SplitConfig::Explicit(explicit);
    }
    match (workers, threads) {
        (Some(workers), Some(threads)) => {
            SplitConfig::Counts { workers: workers as usize, threads: threads as usize }
        }
        _ => SplitConfig::Profile(profile.unwrap_or_default()),
    }
}

fn refuse_shared_cpus(table: &mut Table<'_, '_, '_>, workers: &[Vec<u32>]) {
    let mut owners = std::collections::BTreeMap::new();
    for (idx, cpus) in workers.iter().enumerate() {
        let shared: Vec<u32> =
            cpus.iter().copied().filter(|cpu| *owners.entry(*cpu).or_insert(idx) != idx).collect();
        if let Some(owner) = shared.first().and_then(|cpu| owners.get(cpu)) {
            let list = cpu_list::format(&shared);
            let message = format!("workers {owner} and {idx} (counted from 0) both claim CPU {list}");
            table.refuse("worker", Refusal::new(message).hint("each CPU belongs to one worker"));
        }
    }
    if workers.is_empty() {
        table.refuse("worker", Refusal::new("there is no worker in it"));
    }
}

fn affinity(table: &mut Table<'_, '_, '_>) -> AffinityConfig {
    AffinityConfig {
        reserve: table.get("reserve", cpus).unwrap_or_default(),
        smt: table.get("smt", choice).unwrap_or_default(),
        cores: table.get("cores", choice).unwrap_or_default(),
        numa: table.get("numa", choice).unwrap_or_default(),
        copies: table.get("copies", choice).unwrap_or_default(),
    }
}

fn engine(table: &mut Table<'_, '_, '_>) -> EngineConfig {
    let default = EngineConfig::default();
    EngineConfig {
        ctx: table.get("ctx", |value| integer(value, 16..=1 << 20)),
        max_batch: table.get("max_batch", |value| integer(value, 1..=256)).unwrap_or(default.max_batch),
        prefill_chunk: table
            .get("prefill_chunk", |value| integer(value, 1..=8192))
            .unwrap_or(default.prefill_chunk),
        prefill_time: table.get("prefill_time", step_time).unwrap_or(default.prefill_time),
        kv_type: table.get("kv_type", |value| word(value, schema::KV_TYPES)).unwrap_or(default.kv_type),
        isa: table.get("isa", |value| word(value, schema::ISAS)).unwrap_or(default.isa),
        wait: table.get("wait", |value| word(value, schema::WAITS)).unwrap_or(default.wait),
        huge_pages: table
            .get("huge_pages", |value| word(value, schema::HUGE_PAGES))
            .unwrap_or(default.huge_pages),
        nice: table.get("nice", nice).unwrap_or(default.nice),
        scheduler: table.get("scheduler", choice).unwrap_or_default(),
        speculation: table
            .get("speculation", |value| word(value, schema::SPECULATIONS))
            .unwrap_or(default.speculation),
        mlock: table.get("mlock", boolean).unwrap_or(default.mlock),
        memory_mib: table.get("memory_mib", |value| integer(value, 1..=1 << 30)),
    }
}

fn boolean(value: &DeValue<'_>) -> Result<bool, Refusal> {
    value.as_bool().ok_or_else(|| Refusal::expected("true or false", value))
}

fn nice(value: &DeValue<'_>) -> Result<i8, Refusal> {
    let number =
        value.as_integer().and_then(|number| i8::from_str_radix(number.as_str(), number.radix()).ok());
    number
        .filter(|number| (-20..=19).contains(number))
        .ok_or_else(|| Refusal::expected("a whole number from -20 to 19", value))
}

fn queue(table: &mut Table<'_, '_, '_>, base: &Path) -> QueueConfig {
    let default = QueueConfig::default();
    let durable = default.durable;
    let number = |table: &mut Table<'_, '_, '_>, key, max, default| {
        table.get(key, |value| integer(value, 1..=max)).unwrap_or(default)
    };
    QueueConfig {
        max_jobs: table.get("max_jobs", |value| integer(value, 1..=1_000_000)).unwrap_or(default.max_jobs),
        max_per_client: table
            .get("max_per_client", |value| integer(value, 1..=1_000_000))
            .unwrap_or(default.max_per_client),
        max_deaths: table.get("max_deaths", |value| integer(value, 1..=100)).unwrap_or(default.max_deaths),
        journal: table.get("journal", |value| place(value, base)).unwrap_or(default.journal),
        durable: DurableConfig {
            max_jobs: number(table, "durable_max_jobs", 1_000_000, durable.max_jobs),
            max_per_client: number(table, "durable_max_per_client", 1_000_000, durable.max_per_client),
            max_mib: number(table, "durable_max_mib", 1 << 20, durable.max_mib),
            per_worker: number(table, "durable_per_worker", 256, durable.per_worker),
            results_max: number(table, "results_max", 1_000_000, durable.results_max),
            results_keep: table.get("results_keep", positive).unwrap_or(durable.results_keep),
        },
    }
}

fn place(value: &DeValue<'_>, base: &Path) -> Result<Place, Refusal> {
    match value.as_str() {
        Some("off") => Ok(Place::Off),
        _ => path(value, base).map(Place::At),
    }
}

fn restart(table: &mut Table<'_, '_, '_>) -> RestartConfig {
    let default = RestartConfig::default();
    let config = RestartConfig {
        max: table.get("max", |value| integer(value, 0..=1000)).unwrap_or(default.max),
        window: table.get("window", positive).unwrap_or(default.window),
        backoff_min: table.get("backoff_min", positive).unwrap_or(default.backoff_min),
        backoff_max: table.get("backoff_max", positive).unwrap_or(default.backoff_max),
        start_timeout: table.get("start_timeout", positive).unwrap_or(default.start_timeout),
        drain_timeout: table.get("drain_timeout", duration).unwrap_or(default.drain_timeout),
    };
    if config.backoff_min > config.backoff_max {
        let [min, max] = [config.backoff_min, config.backoff_max].map(values::format_duration);
        let key = if table.has("backoff_min") { "backoff_min" } else { "backoff_max" };
        table
            .refuse(key, Refusal::new(format!("`backoff_min` ({min}) is longer than `backoff_max` ({max})")));
    }
    config
}

fn watchdog(table: &mut Table<'_, '_, '_>) -> WatchdogConfig {
    let default = WatchdogConfig::default();
    let config = WatchdogConfig {
        interval: table.get("interval", positive).unwrap_or(default.interval),
        timeout: table.get("timeout", positive).unwrap_or(default.timeout),
    };
    if config.interval >= config.timeout {
        let [interval, timeout] = [config.interval, config.timeout].map(values::format_duration);
        let key = if table.has("timeout") { "timeout" } else { "interval" };
        let message = format!("`timeout` ({timeout}) must be longer than `interval` ({interval})");
        table.refuse(
            key,
            Refusal::new(message).hint("several intervals, so that one late answer kills nobody"),
        );
    }
    config
}

fn service(table: &mut Table<'_, '_, '_>) -> ServiceConfig {
    ServiceConfig { ready_workers: table.get("ready_workers", |value| integer(value, 1..=COUNT_MAX)) }
}

fn listen(table: &mut Table<'_, '_, '_>, base: &Path) -> ListenConfig {
    let default = ListenConfig::default();
    ListenConfig {
        socket: table.get("socket", |value| socket_path(value, base)),
        mode: table.get("mode", mode).unwrap_or(default.mode),
        owner: table.get("owner", principal),
        group: table.get("group", principal),
        allow_uids: table.get("allow_uids", ids).unwrap_or_default(),
        allow_gids: table.get("allow_gids", ids).unwrap_or_default(),
        max_connections: table
            .get("max_connections", |value| integer(value, 1..=65_536))
            .unwrap_or(default.max_connections),
        metrics: table.get("metrics", |value| metrics_address(value, base)),
    }
}

fn metrics_address(value: &DeValue<'_>, base: &Path) -> Result<MetricsAddress, Refusal> {
    match value.as_str() {
        Some(text) if text.contains('/') => Ok(MetricsAddress::Unix(socket_path(value, base)?)),
        text => text.and_then(|text| text.parse().ok()).map(MetricsAddress::Tcp).ok_or_else(|| {
            let expected =
                "an address such as \"127.0.0.1:9464\", or the path of a Unix socket (with a slash in it)";
            Refusal::expected(expected, value)
        }),
    }
}

fn socket_path(value: &DeValue<'_>, base: &Path) -> Result<PathBuf, Refusal> {
    let path = path(value, base)?;
    match path.as_os_str().len() {
        0..=SOCKET_PATH_BYTES_MAX => Ok(path),
        bytes => Err(Refusal::new(format!(
            "the path has {bytes} bytes, and that of a Unix socket at most {SOCKET_PATH_BYTES_MAX}"
        ))),
    }
}

fn security(table: &mut Table<'_, '_, '_>) -> SecurityConfig {
    SecurityConfig { confinement: table.get("confinement", choice).unwrap_or_default() }
}

fn log(table: &mut Table<'_, '_, '_>, base: &Path) -> LogConfig {
    let default = LogConfig::default();
    LogConfig {
        format: table.get("format", choice).unwrap_or_default(),
        level: table.get("level", log_filter).unwrap_or(default.level),
        journal_socket: table
            .get("journal_socket", |value| socket_path(value, base))
            .unwrap_or(default.journal_socket),
    }
}

fn integer(value: &DeValue<'_>, range: RangeInclusive<u32>) -> Result<u32, Refusal> {
    value
        .as_integer()
        .and_then(|number| u32::from_str_radix(number.as_str(), number.radix()).ok())
        .filter(|number| range.contains(number))
        .ok_or_else(|| {
            Refusal::expected(format!("a whole number from {} to {}", range.start(), range.end()), value)
        })
}

fn duration(value: &DeValue<'_>) -> Result<Duration, Refusal> {
    value.as_str().and_then(values::parse_duration).filter(|duration| *duration <= DURATION_MAX).ok_or_else(
        || {
            let refusal =
                Refusal::expected("a duration such as \"50ms\", \"30s\", \"2m\", at most \"168h\"", value);
            match value.as_integer() {
                Some(number) => refusal.hint(format!("with its unit and in quotes: \"{number}s\"")),
                None => refusal,
            }
        },
    )
}

fn positive(value: &DeValue<'_>) -> Result<Duration, Refusal> {
    let duration = duration(value)?;
    if duration.is_zero() { Err(Refusal::new("must be longer than zero")) } else { Ok(duration) }
}

fn step_time(value: &DeValue<'_>) -> Result<Duration, Refusal> {
    let duration = duration(value)?;
    let range = Duration::from_millis(1)..=Duration::from_secs(1);
    let refusal = || Refusal::expected("a duration from \"1ms\" to \"1s\"", value);
    if range.contains(&duration) { Ok(duration) } else { Err(refusal()) }
}

fn choice<T: Choice>(value: &DeValue<'_>) -> Result<T, Refusal> {
    let names: Vec<&str> = T::CHOICES.iter().map(|(name, _)| *name).collect();
    let name = word(value, &names)?;
    T::from_name(&name).ok_or_else(|| Refusal::expected("another name", value))
}

/// One of `names`.
fn word(value: &DeValue<'_>, names: &[&str]) -> Result<String, Refusal> {
    if let Some(name) = value.as_str().filter(|name| names.contains(name)) {
        return Ok(name.to_owned());
    }
    let list: Vec<String> = names.iter().map(|name| format!("\"{name}\"")).collect();
    let refusal = Refusal::expected(format!("one of {}", list.join(", ")), value);
    let given = value.as_str().unwrap_or_default().to_lowercase().replace('_', "-");
    let near = names
        .iter()
        .map(|name| (strsim::damerau_levenshtein(&given, &name.replace('_', "-")), *name))
        .filter(|(distance, name)| *distance <= 1 + name.len() / 4)
        .min();
    Err(match near {
        Some((_, near)) if !given.is_empty() => refusal.hint(format!("did you mean \"{near}\"?")),
        _ => refusal,
    })
}

fn path(value: &DeValue<'_>, base: &Path) -> Result<PathBuf, Refusal> {
    match value.as_str() {
        Some(text) if text.starts_with("~/") => {
            Err(Refusal::new("`~` is not expanded here").hint("write the whole path"))
        }
        Some(text) if !text.is_empty() && !text.contains('\0') => {
            let joined = base.join(text);
            // A path without a place to start from stays relative to the working directory.
            Ok(std::path::absolute(&joined).unwrap_or(joined))
        }
        _ => Err(Refusal::expected("a path", value)),
    }
}

/// A CPU list as text, or CPU numbers as an array or a single number.
fn cpus(value: &DeValue<'_>) -> Result<Vec<u32>, Refusal> {
    let text = match value {
        DeValue::String(text) => text.to_string(),
        DeValue::Integer(_) => integer(value, 0..=cpu_list::CPU_MAX)?.to_string(),
        DeValue::Array(array) => {
            let numbers: Result<Vec<u32>, Refusal> =
                array.iter().map(|number| integer(number.get_ref(), 0..=cpu_list::CPU_MAX)).collect();
            numbers?.iter().map(u32::to_string).collect::<Vec<_>>().join(",")
        }
        _ => return Err(Refusal::expected("a CPU list such as \"0-3,8\"", value)),
    };
    cpu_list::parse(&text)
        .map_err(|error| Refusal::new(format!("expected a CPU list such as \"0-3,8\": {error}")))
}

fn mode(value: &DeValue<'_>) -> Result<u32, Refusal> {
    let bits = value.as_str().and_then(values::parse_mode).ok_or_else(|| {
        let refusal = Refusal::expected("permission bits in octal, as text, such as \"0660\"", value);
        match value.as_integer() {
            Some(number) => {
                refusal.hint(format!("in quotes: \"0{}\"", number.as_str().trim_start_matches('0')))
            }
            None => refusal,
        }
    })?;
    if bits & 0o600 == 0o600 {
        Ok(bits)
    } else {
        Err(Refusal::new(format!("`{}` keeps the owner itself out", values::format_mode(bits)))
            .hint("\"0600\" lets in only the owner, \"0660\" the group too"))
    }
}

/// The name or number of a user or a group; whether there is one shows when the socket is made.
fn principal(value: &DeValue<'_>) -> Result<String, Refusal> {
    if matches!(value, DeValue::Integer(_)) {
        return Ok(integer(value, 0..=u32::MAX - 1)?.to_string());
    }
    let is_name = |name: &&str| {
        (1..=PRINCIPAL_BYTES_MAX).contains(&name.len())
            && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_.-$".contains(&byte))
            && !name.starts_with('-')
    };
    value
        .as_str()
        .filter(is_name)
        .map(str::to_owned)
        .ok_or_else(|| Refusal::expected("the name or the number of a user or a group", value))
}

fn ids(value: &DeValue<'_>) -> Result<Vec<u32>, Refusal> {
    let expected = || Refusal::expected(format!("an array of at most {COUNT_MAX} ids such as [1000]"), value);
    let array = value.as_array().filter(|array| array.len() <= COUNT_MAX as usize).ok_or_else(expected)?;
    array.iter().map(|id| integer(id.get_ref(), 0..=u32::MAX - 1)).collect()
}

fn log_filter(value: &DeValue<'_>) -> Result<String, Refusal> {
    let is_directive = |directive: &str| {
        let (target, level) = directive.rsplit_once('=').unwrap_or(("all", directive));
        let is_target = !target.is_empty()
            && target.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_:".contains(&byte));
        is_target && schema::LOG_LEVELS.contains(&level)
    };
    value.as_str().filter(|filter| filter.split(',').all(is_directive)).map(str::to_owned).ok_or_else(|| {
        Refusal::expected(
            "one of \"error\", \"warn\", \"info\", \"debug\", \"trace\", \"off\" or a filter such as \"info,bitnetd_supervisor=debug\"",
            value,
        )
    })
}
