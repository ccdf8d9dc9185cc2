//! The repository checks itself: what the documents name exists, layers hold, unsafe stays where it belongs.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed unwrap is a failed test"
)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Longest file, tests included.
const LINES_MAX: usize = 800;

/// The only places with unsafe code; a folder stands for all below it.
const UNSAFE_PLACES: [&str; 8] = [
    "engine/src/kernels/",
    "engine/src/mapping.rs",
    "engine/src/pool.rs",
    "supervisor/src/activation.rs",
    "supervisor/src/child.rs",
    "supervisor/src/peer.rs",
    "worker/src/inherited.rs",
    "worker/src/sandbox.rs",
];

/// Which crates of the workspace a crate may depend on (ARCHITECTURE.md gives the reasons).
const LAYERS: [(&str, &[&str]); 7] = [
    ("engine", &[]),
    ("proto", &[]),
    ("config", &[]),
    ("placement", &["config"]),
    ("worker", &["config", "engine", "proto"]),
    ("supervisor", &["config", "placement", "proto"]),
    ("cli", &["config", "engine", "placement", "proto", "supervisor", "worker"]),
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

/// Files of the repository with one of these extensions, as paths from its root.
fn files(extensions: &[&str]) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![root().to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            if path.is_dir() {
                let is_made = ["target", "corpus", "artifacts", "coverage"].contains(&name);
                if !is_made && (!name.starts_with('.') || name == ".ci") {
                    folders.push(path);
                }
            } else if path.extension().is_some_and(|found| extensions.iter().any(|wanted| found == *wanted)) {
                found.push(path.strip_prefix(root()).unwrap().to_owned());
            }
        }
    }
    found.sort();
    assert!(found.len() > 5, "too few files with {extensions:?}: {found:?}");
    found
}

fn read(path: &Path) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[track_caller]
fn assert_none(what: &str, faults: &[String]) {
    assert!(faults.is_empty(), "{what}:\n  {}", faults.join("\n  "));
}

#[test]
fn every_source_file_says_what_it_is_and_is_of_readable_size() {
    let mut faults = Vec::new();
    for path in files(&["rs"]) {
        let text = read(&path);
        if !text.starts_with("//! ") {
            faults.push(format!("{} does not start with `//! `", path.display()));
        }
        let n_lines = text.lines().count();
        if n_lines > LINES_MAX {
            faults.push(format!("{} has {n_lines} lines, the limit is {LINES_MAX}", path.display()));
        }
    }
    assert_none("first lines and sizes", &faults);
}

#[test]
fn unsafe_code_is_only_where_it_is_allowed() {
    let marks = ["{", "fn", "impl", "extern", "trait"].map(|next| format!("{} {next}", "unsafe"));
    let openings = ["expect", "allow"].map(|kind| format!("{kind}({}", "unsafe_code"));
    let mut faults = Vec::new();
    for path in files(&["rs"]) {
        if UNSAFE_PLACES.iter().any(|place| path.to_str().unwrap().starts_with(place)) {
            continue;
        }
        for (number, line) in read(&path).lines().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            if marks.iter().chain(&openings).any(|mark| code.contains(mark)) {
                faults.push(format!("{}:{}: {}", path.display(), number + 1, line.trim()));
            }
        }
    }
    assert_none("unsafe code outside the allowed places", &faults);
}

#[test]
fn unsafe_places_exist() {
    let missing: Vec<&str> = UNSAFE_PLACES.into_iter().filter(|place| !root().join(place).exists()).collect();
    assert!(missing.is_empty(), "{missing:?}");
}

fn manifest(folder: &str) -> toml::Table {
    read(&Path::new(folder).join("Cargo.toml")).parse().unwrap()
}

#[test]
fn layers_hold() {
    let mut faults = Vec::new();
    for (name, allowed) in LAYERS {
        let manifest = manifest(name);
        for section in ["dependencies", "build-dependencies"] {
            let Some(dependencies) = manifest.get(section).and_then(toml::Value::as_table) else { continue };
            let own = dependencies.keys().filter_map(|key| key.strip_prefix("bitnetd-"));
            faults.extend(own.filter(|of| !allowed.contains(of)).map(|of| format!("{name} depends on {of}")));
        }
        assert_eq!(
            manifest["lints"]["workspace"].as_bool(),
            Some(true),
            "{name} does not take the workspace lints"
        );
    }
    assert_none("layers", &faults);
    let members: Vec<String> = manifest(".")["workspace"]["members"].clone().try_into().unwrap();
    for member in members {
        assert!(LAYERS.iter().any(|(name, _)| *name == member), "{member} has no layer in tests/tidy.rs");
    }
}

/// What stands between backquotes or as the target of a link, outside code blocks.
fn references(markdown: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut is_code = false;
    for line in markdown.lines() {
        let is_fence = line.trim_start().starts_with("```");
        is_code ^= is_fence;
        if is_code || is_fence {
            continue;
        }
        found.extend(line.split('`').skip(1).step_by(2).map(str::to_owned));
        found.extend(line.split("](").skip(1).filter_map(|rest| Some(rest.split_once(')')?.0.to_owned())));
    }
    found
}

/// The path that a reference names, if it looks like one of ours.
fn as_path(reference: &str) -> Option<&str> {
    let path = reference.split(['#', '*', '{']).next().unwrap_or_default();
    let path = path.split("::").next().unwrap_or_default();
    let is_word = !path.is_empty() && path.chars().all(|c| c.is_ascii_alphanumeric() || "_-./".contains(c));
    let is_ours = path.split_once('/').is_some_and(|(first, _)| root().join(first).is_dir())
        || (path.ends_with(".md") && !path.contains('/'));
    (is_word && is_ours && !path.starts_with('/')).then_some(path)
}

#[test]
fn every_path_that_a_document_names_exists() {
    let mut faults = Vec::new();
    for document in files(&["md"]) {
        let folder = root().join(document.parent().unwrap());
        for reference in references(&read(&document)) {
            let Some(path) = as_path(&reference) else { continue };
            let exists = root().join(path).exists() || folder.join(path).exists();
            if !exists {
                faults.push(format!("{}: `{reference}`", document.display()));
            }
        }
    }
    assert_none("documents name what does not exist", &faults);
}

#[test]
fn the_specification_names_tests_that_exist() {
    let mut proofs: BTreeMap<String, usize> = BTreeMap::new();
    let mut faults = Vec::new();
    let mut promise = None;
    for line in read(Path::new("SPECIFICATION.md")).lines() {
        if let Some(heading) = line.strip_prefix("## ") {
            promise = heading.split_whitespace().next().map(str::to_owned);
            continue;
        }
        let Some(promise) = &promise else { continue };
        let n_proofs = proofs.entry(promise.clone()).or_default();
        *n_proofs += usize::from(line.contains("pending"));
        for reference in line.split('`').skip(1).step_by(2) {
            let Some((path, name)) = reference.split_once("::") else { continue };
            if !path.ends_with(".rs") {
                continue;
            }
            *n_proofs += 1;
            let is_there =
                fs::read_to_string(root().join(path)).is_ok_and(|text| text.contains(&format!("fn {name}(")));
            if !is_there {
                faults.push(format!("{promise}: `{reference}`"));
            }
        }
    }
    assert_none("SPECIFICATION.md names tests that do not exist", &faults);
    for number in 1..=7 {
        let promise = format!("P{number}");
        let n_proofs = proofs.get(&promise).copied().unwrap_or(0);
        assert!(n_proofs > 0, "{promise} names no test and does not say `pending`: {proofs:?}");
    }
}

#[test]
fn nothing_names_the_machine_it_was_made_on() {
    let places = ["/root/."];
    let mut faults = Vec::new();
    for path in files(&["rs", "md", "toml", "py", "sh", "lock", "yml", "yaml", "json"]) {
        if path == Path::new("tests/tidy.rs") {
            continue;
        }
        for (number, line) in read(&path).lines().enumerate() {
            if places.iter().any(|place| line.contains(place)) {
                faults.push(format!("{}:{}: {}", path.display(), number + 1, line.trim()));
            }
        }
    }
    assert_none("paths in somebody's home", &faults);
}

#[test]
fn tests_do_not_wait_by_the_clock_and_none_is_switched_off() {
    let marks = ["#[ignore", "thread::sleep(", "todo!(", "unimplemented!("].map(str::to_owned);
    let mut faults = Vec::new();
    for path in files(&["rs"]) {
        // The places that may: one polls, one is a worker whose work is to take its time, one asks the kernel again.
        let may =
            ["tests/tidy.rs", "tests/e2e/support.rs", "tests/fake_worker/main.rs", "proto/src/sealed.rs"];
        if may.iter().any(|place| path == Path::new(place)) {
            continue;
        }
        for (number, line) in read(&path).lines().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            if marks.iter().any(|mark| code.contains(mark.as_str())) {
                faults.push(format!("{}:{}: {}", path.display(), number + 1, line.trim()));
            }
        }
    }
    assert_none("sleeps, ignored tests, unfinished code", &faults);
}

#[test]
fn references_are_found_in_documents() {
    let text =
        "a `tests/tidy.rs` b [c](ARCHITECTURE.md#x)\n```\n`not/this.rs`\n```\n`engine/src/kernels/**` `a b`";
    let references = references(text);
    let paths: Vec<Option<&str>> = references.iter().map(|reference| as_path(reference)).collect();
    assert_eq!(
        paths,
        [Some("tests/tidy.rs"), Some("ARCHITECTURE.md"), Some("engine/src/kernels/"), None],
        "{references:?}"
    );
}
