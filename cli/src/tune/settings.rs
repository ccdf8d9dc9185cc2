//! The winner in a configuration file: `[split]` with the evidence as a comment. Everything else stays as it is.

use std::path::Path;

use bitnetd_proto::exit_code::ExitCode;
use toml_edit::{DocumentMut, Item, Table, value};

use super::report::{Report, Winner};
use crate::error::CliError;
use crate::picture;

/// Writes the winner of `report` into the file at `path`, which need not exist.
pub(super) fn write(path: &Path, report: &Report) -> Result<(), CliError> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
        Err(error) => return Err(CliError::file("read", path, error)),
    };
    let text = edit(&text, report.winner(), &report.to_string())
        .map_err(|error| CliError::with_code(ExitCode::Config, error).within(path.display().to_string()))?;
    picture::replace(path, text.as_bytes())
}

/// The text of a configuration file with another split.
fn edit(text: &str, winner: &Winner, evidence: &str) -> Result<String, toml_edit::TomlError> {
    let mut document: DocumentMut = text.parse()?;
    let split = table(&mut document, "split");
    for key in ["profile", "worker", "workers", "threads"] {
        split.remove(key);
    }
    for (key, count) in [("workers", winner.workers), ("threads", winner.threads)] {
        split.insert(key, value(i64::try_from(count).unwrap_or(i64::MAX)));
    }
    let comment: String =
        evidence.lines().map(|line| format!("# {line}").trim_end().to_owned() + "\n").collect();
    split.decor_mut().set_prefix(format!("\n# Measured by `bitnetd tune`:\n{comment}"));
    if winner.is_performance_only {
        table(&mut document, "affinity").insert("cores", value("performance"));
    }
    Ok(document.to_string())
}

fn table<'a>(document: &'a mut DocumentMut, name: &str) -> &'a mut Table {
    let item = document.entry(name).or_insert_with(toml_edit::table);
    if !item.is_table() {
        *item = match std::mem::take(item).into_table() {
            Ok(table) => Item::Table(table),
            Err(_) => toml_edit::table(),
        };
    }
    match item {
        Item::Table(table) => table,
        _ => unreachable!("it was just made a table"),
    }
}

#[cfg(test)]
mod tests {
    use bitnetd_config::{Config, CoreChoice, SplitConfig};

    use super::*;

    fn winner(is_performance_only: bool) -> Winner {
        Winner { name: "3x4".into(), workers: 3, threads: 4, is_performance_only }
    }

    fn parsed(text: &str) -> Config {
        Config::parse(text, Path::new("bitnetd.toml")).unwrap()
    }

    #[test]
    fn comments_and_other_sections_stay() {
        let old = "# My server.\n[model]\nalias = \"mine\" # a name\n\n[split]\nprofile = \"balanced\"\n\n[queue]\nmax_jobs = 9\n";
        let new = edit(old, &winner(false), "3x4 wins.\n\nBy much.").unwrap();
        insta::assert_snapshot!(new);
        let config = parsed(&new);
        assert_eq!(config.split, SplitConfig::Counts { workers: 3, threads: 4 });
        assert_eq!(config.queue.max_jobs, 9);
    }

    #[test]
    fn every_form_of_the_old_split_goes() {
        for old in [
            "",
            "[split]\nworkers = 1\nthreads = 2\n",
            "[[split.worker]]\ncpus = \"0-3\"\n[[split.worker]]\ncpus = \"4-7\"\n",
            "split = { profile = \"balanced\" }\n",
            "[affinity]\nsmt = \"off\"\n",
        ] {
            let config = parsed(&edit(old, &winner(true), "why").unwrap());
            assert_eq!(config.split, SplitConfig::Counts { workers: 3, threads: 4 }, "{old}");
            assert_eq!(config.affinity.cores, CoreChoice::Performance, "{old}");
        }
    }

    #[test]
    fn what_is_no_toml_is_refused() {
        assert!(edit("[split", &winner(false), "why").is_err());
    }
}
