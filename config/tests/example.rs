//! `example.toml` is the default configuration with every key explained.

use std::path::{Path, PathBuf};

use bitnetd_config::{Config, KEYS};

fn example_path() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("example.toml")
}

#[test]
fn example_is_what_the_defaults_print() {
    let expected = Config::default().to_commented_toml();
    let committed = std::fs::read_to_string(example_path()).unwrap_or_default();
    if committed != expected && std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(example_path(), &expected).unwrap();
        return;
    }
    assert_eq!(committed, expected, "write it anew with UPDATE_GOLDEN=1");
}

#[test]
fn example_reads_back_to_the_defaults() {
    assert_eq!(Config::load(&example_path()).unwrap(), Config::default());
}

#[test]
fn example_has_and_explains_every_key() {
    let text = std::fs::read_to_string(example_path()).unwrap();
    for key in KEYS {
        assert!(text.contains(key.name), "{}.{}", key.section, key.name);
        for line in key.doc.lines() {
            assert!(text.contains(&format!("# {line}\n")), "{}.{}", key.section, key.name);
        }
    }
    assert!(text.lines().all(|line| line.chars().count() <= 125), "a line is too long");
}

#[test]
fn the_commented_out_examples_are_valid_too() {
    let text = std::fs::read_to_string(example_path()).unwrap();
    for line in [
        "path = ",
        "alias = ",
        "ctx = ",
        "ready_workers = ",
        "socket = ",
        "owner = ",
        "group = ",
        "journal = ",
    ] {
        let commented = text.lines().find(|text| text.starts_with(&format!("# {line}"))).expect(line);
        let changed = text.replacen(commented, &commented[2..], 1);
        let config = Config::parse(&changed, Path::new("/etc/bitnetd/bitnetd.toml")).unwrap();
        assert_ne!(config, Config::default(), "{line}");
    }
}

#[test]
fn the_guide_explains_every_key() {
    let guide = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/configuration.md");
    let guide = std::fs::read_to_string(guide).unwrap();
    for key in KEYS {
        let section = guide.split("### ").find(|part| part.starts_with(&format!("`[{}]`", key.section)));
        let name = if key.name == "worker" { "[[split.worker]]" } else { key.name };
        assert!(section.expect(key.section).contains(&format!("`{name}`")), "{}.{}", key.section, key.name);
    }
}
