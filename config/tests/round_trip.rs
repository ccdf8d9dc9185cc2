//! What the effective configuration prints reads back to the same configuration.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use bitnetd_config::{
    AffinityConfig, Choice, Config, DurableConfig, EngineConfig, ListenConfig, LogConfig, MetricsAddress,
    ModelConfig, Place, QueueConfig, RestartConfig, SecurityConfig, ServiceConfig, SplitConfig,
    WatchdogConfig,
};
use proptest::prelude::*;

fn choice<T: Choice + std::fmt::Debug>() -> impl Strategy<Value = T> {
    prop::sample::select(T::CHOICES.iter().map(|(_, value)| *value).collect::<Vec<_>>())
}

fn cpus(n_max: usize) -> impl Strategy<Value = Vec<u32>> {
    prop::collection::btree_set(0..300_u32, 0..n_max).prop_map(|set| set.into_iter().collect())
}

fn split() -> impl Strategy<Value = SplitConfig> {
    prop_oneof![
        choice().prop_map(SplitConfig::Profile),
        (1..200_usize, 1..200_usize).prop_map(|(workers, threads)| SplitConfig::Counts { workers, threads }),
        prop::collection::vec(prop::collection::btree_set(0..64_u32, 1..9), 1..6).prop_map(|sets| {
            // Disjoint by giving each worker its own range.
            let shift =
                |(idx, set): (u32, BTreeSet<u32>)| set.into_iter().map(|cpu| cpu + 64 * idx).collect();
            SplitConfig::Explicit((0..).zip(sets).map(shift).collect())
        }),
    ]
}

fn durations() -> impl Strategy<Value = (Duration, Duration)> {
    (1..100_000_u64, 1..100_000_u64)
        .prop_map(|(short, more)| (Duration::from_millis(short), Duration::from_millis(short + more)))
}

fn place() -> impl Strategy<Value = Place> {
    prop_oneof![
        Just(Place::Usual),
        Just(Place::Off),
        "/[a-z /'\"]{1,20}x".prop_map(|path| Place::At(path.into())),
    ]
}

prop_compose! {
    fn config()(
        path in prop::option::of("/[a-zA-Z0-9 _.'\"\\\\é-]{1,40}"),
        alias in prop::option::of("[a-zA-Z0-9 .:'\"\\\\é-]{1,40}"),
        (head, split) in (choice(), split()),
        affinity in (cpus(9), choice(), choice(), choice(), choice()),
        (ctx, max_batch, prefill_chunk) in (prop::option::of(16..100_000_u32), 1..=256_u32, 1..=8192_u32),
        (journal, image_cache) in (place(), place()),
        isa in prop::sample::select(vec!["auto", "scalar", "avx512-vnni"]),
        (backoff, watchdog, rest) in (durations(), durations(), durations()),
        (mode, ids) in (0..0o200_u32, prop::collection::vec(0..70_000_u32, 0..5)),
        (confinement, format, nice, scheduler) in (choice(), choice(), -20..=19_i8, choice()),
        (owner, group) in (prop::option::of("[a-z_][a-z0-9._-]{0,20}"), prop::option::of("[0-9]{1,9}")),
    ) -> Config {
        let (reserve, smt, cores, numa, copies) = affinity;
        Config {
            model: ModelConfig { path: path.map(Into::into), alias, head, image_cache },
            split,
            affinity: AffinityConfig { reserve, smt, cores, numa, copies },
            engine: EngineConfig {
                ctx,
                max_batch,
                prefill_chunk,
                prefill_time: Duration::from_millis(u64::from(prefill_chunk) % 1000 + 1),
                isa: isa.into(),
                nice,
                scheduler,
                mlock: nice < 0,
                memory_mib: ctx,
                ..EngineConfig::default()
            },
            queue: QueueConfig {
                max_jobs: max_batch,
                max_per_client: prefill_chunk,
                max_deaths: 7,
                journal: journal.clone(),
                durable: DurableConfig {
                    max_jobs: prefill_chunk,
                    max_per_client: max_batch,
                    max_mib: prefill_chunk,
                    per_worker: max_batch,
                    results_max: max_batch,
                    results_keep: rest.0,
                },
            },
            restart: RestartConfig {
                max: max_batch,
                window: rest.0,
                backoff_min: backoff.0,
                backoff_max: backoff.1,
                start_timeout: rest.0,
                drain_timeout: rest.1,
            },
            watchdog: WatchdogConfig { interval: watchdog.0, timeout: watchdog.1 },
            service: ServiceConfig { ready_workers: ctx.map(|ctx| 1 + ctx % 64) },
            listen: ListenConfig {
                socket: ctx.map(|ctx| format!("/run/{ctx}.sock").into()),
                mode: mode | 0o600,
                owner,
                group,
                allow_uids: ids.clone(),
                allow_gids: ids,
                max_connections: prefill_chunk,
                metrics: ctx.map(|ctx| match ctx % 2 {
                    0 => MetricsAddress::Tcp(([127, 0, 0, 1], 9464).into()),
                    _ => MetricsAddress::Unix(format!("/run/{ctx}/metrics.sock").into()),
                }),
            },
            security: SecurityConfig { confinement },
            log: LogConfig {
                format,
                level: "info,bitnetd_supervisor=debug".into(),
                journal_socket: format!("/run/journal/{max_batch}").into(),
            },
        }
    }
}

proptest! {
    #[test]
    fn effective_configuration_reads_back(config in config()) {
        for text in [config.to_toml(), config.to_commented_toml()] {
            let read = Config::parse(&text, Path::new("/etc/bitnetd.toml"));
            prop_assert_eq!(read.as_ref(), Ok(&config), "{}", text);
        }
    }

    #[test]
    fn no_text_panics(text in "(\\[[a-z.]{0,9}\\]|[a-z_]{1,9} = |[0-9\"'\\[\\]{},.#-]{0,9}|\n|é){0,40}") {
        if let Err(errors) = Config::parse(&text, Path::new("x")) {
            prop_assert!(!errors.problems.is_empty());
            prop_assert!(errors.problems.iter().all(|problem| problem.line >= 1 && problem.column >= 1));
        }
    }
}
