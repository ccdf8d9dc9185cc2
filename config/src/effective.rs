//! A [`Config`] as the text of a file that reads back to the same [`Config`].

use std::path::Path;

use crate::schema::{self, KEYS, Key};
use crate::sections::{Config, MetricsAddress, Place, SplitConfig};
use crate::{Choice, cpu_list, values};

impl Config {
    /// The effective configuration: every key that has a value, in the order of `example.toml`.
    #[must_use]
    pub fn to_toml(&self) -> String {
        self.write(false)
    }

    /// The same with a comment on every key, and those without a value as comments: `example.toml`.
    #[must_use]
    pub fn to_commented_toml(&self) -> String {
        self.write(true)
    }

    /// The keys with another value in `other` that a running daemon cannot take over.
    pub fn changes_that_need_restart(&self, other: &Self) -> impl Iterator<Item = &'static Key> {
        KEYS.iter().filter(|key| key.needs_restart() && self.value(key) != other.value(key))
    }

    fn write(&self, comments: bool) -> String {
        let mut text = String::new();
        for (section, about) in schema::SECTIONS {
            let keys = KEYS.iter().filter(|key| key.section == *section);
            let lines: String = keys.map(|key| self.lines(key, comments)).collect();
            if lines.is_empty() {
                continue;
            }
            if !text.is_empty() {
                text.push('\n');
            }
            if comments {
                text.push_str(&format!("# {about}\n"));
            }
            let head = if lines.starts_with('[') { String::new() } else { format!("[{section}]\n") };
            text.push_str(&head);
            text.push_str(&lines);
        }
        text
    }

    /// The lines for one key.
    fn lines(&self, key: &Key, comments: bool) -> String {
        let mut lines = String::new();
        if comments {
            for line in key.doc.lines() {
                lines.push_str(&format!("# {line}\n"));
            }
            if key.needs_restart() {
                lines.push_str("# (A change needs a restart.)\n");
            }
        }
        if key.section == "split" && key.name == "worker" {
            if let SplitConfig::Explicit(workers) = &self.split {
                for cpus in workers {
                    lines.push_str(&format!("[[split.worker]]\ncpus = \"{}\"\n", cpu_list::format(cpus)));
                }
            } else if comments {
                lines.push_str("# [[split.worker]]\n# cpus = \"0-3\"\n");
            }
        } else if let Some(value) = self.value(key) {
            lines.push_str(&format!("{} = {value}\n", key.name));
        } else if comments {
            lines.push_str(&format!("# {} = {}\n", key.name, key.example));
        }
        lines
    }

    /// The value of a key in TOML's notation; `None` if it has none.
    fn value(&self, key: &Key) -> Option<String> {
        match key.section {
            "model" => self.model_value(key.name),
            "split" => self.split_value(key.name),
            "affinity" => Some(match key.name {
                "reserve" => quoted(&cpu_list::format(&self.affinity.reserve)),
                "smt" => quoted(self.affinity.smt.name()),
                "cores" => quoted(self.affinity.cores.name()),
                "numa" => quoted(self.affinity.numa.name()),
                "copies" => quoted(self.affinity.copies.name()),
                _ => return None,
            }),
            "engine" => self.engine_value(key.name),
            "queue" => self.queue_value(key.name),
            "restart" => self.restart_value(key.name),
            "watchdog" => Some(match key.name {
                "interval" => quoted(&values::format_duration(self.watchdog.interval)),
                "timeout" => quoted(&values::format_duration(self.watchdog.timeout)),
                _ => return None,
            }),
            "service" => Some(match key.name {
                "ready_workers" => self.service.ready_workers?.to_string(),
                _ => return None,
            }),
            "listen" => self.listen_value(key.name),
            "security" => (key.name == "confinement").then(|| quoted(self.security.confinement.name())),
            "log" => Some(match key.name {
                "format" => quoted(self.log.format.name()),
                "level" => quoted(&self.log.level),
                "journal_socket" => quoted_path(&self.log.journal_socket),
                _ => return None,
            }),
            _ => None,
        }
    }

    fn queue_value(&self, name: &str) -> Option<String> {
        let durable = &self.queue.durable;
        Some(match name {
            "max_jobs" => self.queue.max_jobs.to_string(),
            "max_per_client" => self.queue.max_per_client.to_string(),
            "max_deaths" => self.queue.max_deaths.to_string(),
            "journal" => place(&self.queue.journal)?,
            "durable_max_jobs" => durable.max_jobs.to_string(),
            "durable_max_per_client" => durable.max_per_client.to_string(),
            "durable_max_mib" => durable.max_mib.to_string(),
            "durable_per_worker" => durable.per_worker.to_string(),
            "results_max" => durable.results_max.to_string(),
            "results_keep" => quoted(&values::format_duration(durable.results_keep)),
            _ => return None,
        })
    }

    fn model_value(&self, name: &str) -> Option<String> {
        match name {
            "path" => self.model.path.as_deref().map(quoted_path),
            "alias" => self.model.alias.as_deref().map(quoted),
            "head" => Some(quoted(self.model.head.name())),
            "image_cache" => place(&self.model.image_cache),
            _ => None,
        }
    }

    fn split_value(&self, name: &str) -> Option<String> {
        match (&self.split, name) {
            (SplitConfig::Profile(profile), "profile") => Some(quoted(profile.name())),
            (SplitConfig::Counts { workers, .. }, "workers") => Some(workers.to_string()),
            (SplitConfig::Counts { threads, .. }, "threads") => Some(threads.to_string()),
            _ => None,
        }
    }

    fn engine_value(&self, name: &str) -> Option<String> {
        Some(match name {
            "ctx" => self.engine.ctx?.to_string(),
            "max_batch" => self.engine.max_batch.to_string(),
            "prefill_chunk" => self.engine.prefill_chunk.to_string(),
            "prefill_time" => quoted(&values::format_duration(self.engine.prefill_time)),
            "kv_type" => quoted(&self.engine.kv_type),
            "isa" => quoted(&self.engine.isa),
            "wait" => quoted(&self.engine.wait),
            "huge_pages" => quoted(&self.engine.huge_pages),
            "nice" => self.engine.nice.to_string(),
            "scheduler" => quoted(self.engine.scheduler.name()),
            "speculation" => quoted(&self.engine.speculation),
            "mlock" => self.engine.mlock.to_string(),
            "memory_mib" => self.engine.memory_mib?.to_string(),
            _ => return None,
        })
    }

    fn restart_value(&self, name: &str) -> Option<String> {
        let duration = match name {
            "max" => return Some(self.restart.max.to_string()),
            "window" => self.restart.window,
            "backoff_min" => self.restart.backoff_min,
            "backoff_max" => self.restart.backoff_max,
            "start_timeout" => self.restart.start_timeout,
            "drain_timeout" => self.restart.drain_timeout,
            _ => return None,
        };
        Some(quoted(&values::format_duration(duration)))
    }

    fn listen_value(&self, name: &str) -> Option<String> {
        match name {
            "socket" => self.listen.socket.as_deref().map(quoted_path),
            "mode" => Some(quoted(&values::format_mode(self.listen.mode))),
            "owner" => self.listen.owner.as_deref().map(quoted),
            "group" => self.listen.group.as_deref().map(quoted),
            "allow_uids" => Some(format!("{:?}", self.listen.allow_uids)),
            "allow_gids" => Some(format!("{:?}", self.listen.allow_gids)),
            "max_connections" => Some(self.listen.max_connections.to_string()),
            "metrics" => Some(match self.listen.metrics.as_ref()? {
                MetricsAddress::Tcp(address) => quoted(&address.to_string()),
                MetricsAddress::Unix(path) => quoted_path(path),
            }),
            _ => None,
        }
    }
}

fn quoted(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

fn place(place: &Place) -> Option<String> {
    match place {
        Place::Usual => None,
        Place::Off => Some(quoted("off")),
        Place::At(path) => Some(quoted_path(path)),
    }
}

/// A path as the file can hold it; validated paths come from a file and are UTF-8.
fn quoted_path(path: &Path) -> String {
    quoted(&path.to_string_lossy())
}
