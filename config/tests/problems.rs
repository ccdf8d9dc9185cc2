//! What is refused, in which words, and that nothing is left out.

use std::path::Path;

use bitnetd_config::{CONFIG_FILE_BYTES_MAX, Config, LoadError, SplitConfig};

#[track_caller]
fn problems(text: &str) -> String {
    Config::parse(text, Path::new("bitnetd.toml")).expect_err(text).to_string()
}

#[test]
fn every_problem_is_reported_at_once() {
    let text = r#"[model]
pth = "m.gguf"
head = "fats"

[split]
profile = "fast"

[engine]
max_batch = 0
max_jobs = 5
ctx = "many"
isa = "AVX512_VNNI"

[restart]
window = 30
backoff_min = "20s"

[listen]
mode = 660
allow_uids = [0, -1]
http_tcp = "127.0.0.1:8080"

[qeue]
max_jobs = 10

[log]
level = "loud"
"#;
    insta::assert_snapshot!(problems(text));
}

#[test]
fn a_split_is_said_in_one_way() {
    let texts = [
        "[split]\nprofile = 'balanced'\nworkers = 3\nthreads = 4\n",
        "[split]\nworkers = 3\n",
        "[[split.worker]]\ncpus = '0-3'\n[[split.worker]]\ncpus = '3-5'\n[[split.worker]]\ncpus = ''\n[[split.worker]]\n",
        "split.worker = []",
    ];
    insta::assert_snapshot!(texts.map(problems).join("\n\n"));
}

#[test]
fn values_that_exclude_each_other_are_named_together() {
    let texts =
        ["[watchdog]\ntimeout = '500ms'", "[restart]\nbackoff_max = '10ms'", "[listen]\nmode = '0060'"];
    insta::assert_snapshot!(texts.map(problems).join("\n\n"));
}

#[test]
fn text_that_is_no_toml_has_its_place_too() {
    let texts = [
        "[modl]\nx = 1\n[model]\npath = \n\n[log\nlevel = 'loud'\n",
        "model = 3\n[queue]\nmax_jobs = 1\nmax_jobs = 2\n",
        "[model]\npath = \"m.gguf",
    ];
    insta::assert_snapshot!(texts.map(problems).join("\n\n"));
}

#[test]
fn limits_hold_at_the_limit_and_one_beyond() {
    for (section, key, last) in [
        ("engine", "ctx", 1_u64 << 20),
        ("engine", "max_batch", 256),
        ("engine", "prefill_chunk", 8192),
        ("queue", "max_jobs", 1_000_000),
        ("queue", "max_per_client", 1_000_000),
        ("queue", "max_deaths", 100),
        ("restart", "max", 1000),
        ("service", "ready_workers", 8192),
        ("listen", "max_connections", 65_536),
    ] {
        let at = format!("[{section}]\n{key} = {last}\n");
        assert!(Config::parse(&at, Path::new("x")).is_ok(), "{at}");
        problems(&format!("[{section}]\n{key} = {}\n", last + 1));
        problems(&format!("[{section}]\n{key} = -1\n"));
        problems(&format!("[{section}]\n{key} = 1.0\n"));
    }
    assert!(Config::parse("[engine]\nprefill_time = '1s'", Path::new("x")).is_ok());
    problems("[engine]\nprefill_time = '1001ms'");
    problems("[engine]\nprefill_time = '0s'");
    assert!(Config::parse("[restart]\ndrain_timeout = '168h'", Path::new("x")).is_ok());
    problems("[restart]\ndrain_timeout = '169h'");
    let socket = |bytes: usize| format!("[listen]\nsocket = '/{}'", "s".repeat(bytes - 1));
    assert!(Config::parse(&socket(107), Path::new("x")).is_ok());
    problems(&socket(108));
}

#[test]
fn a_file_is_read_up_to_its_limit() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bitnetd.toml");
    assert!(matches!(Config::load(&path), Err(LoadError::Read { .. })));
    let max = usize::try_from(CONFIG_FILE_BYTES_MAX).unwrap();
    std::fs::write(&path, "#".repeat(max)).unwrap();
    assert_eq!(Config::load(&path).unwrap(), Config::default());
    std::fs::write(&path, "#".repeat(max + 1)).unwrap();
    assert!(matches!(Config::load(&path), Err(LoadError::TooLarge { .. })));
    std::fs::write(&path, b"# \xff").unwrap();
    assert!(matches!(Config::load(&path), Err(LoadError::NotUtf8 { offset: 2, .. })));
}

#[test]
fn relative_paths_start_at_the_file() {
    let config = Config::parse("[model]\npath = 'm/a.gguf'", Path::new("/etc/bitnetd/bitnetd.toml")).unwrap();
    assert_eq!(config.model.path.as_deref(), Some(Path::new("/etc/bitnetd/m/a.gguf")));
    let config =
        Config::parse("[model]\npath = '/m/a.gguf'", Path::new("/etc/bitnetd/bitnetd.toml")).unwrap();
    assert_eq!(config.model.path.as_deref(), Some(Path::new("/m/a.gguf")));
}

#[test]
fn cpu_lists_are_text_numbers_or_arrays() {
    for (value, cpus) in [("'0-2'", vec![0, 1, 2]), ("7", vec![7]), ("[4, 1]", vec![1, 4]), ("''", vec![])] {
        let config = Config::parse(&format!("affinity.reserve = {value}"), Path::new("x")).unwrap();
        assert_eq!(config.affinity.reserve, cpus, "{value}");
    }
    let config =
        Config::parse("[[split.worker]]\ncpus = '0-1'\n[[split.worker]]\ncpus = 5", Path::new("x")).unwrap();
    assert_eq!(config.split, SplitConfig::Explicit(vec![vec![0, 1], vec![5]]));
}
