//! Frames at several sizes, with made-up daemons; keys.

use bitnetd_proto::status::{CpuReport, Health, JobReport, SlotReport, ThreadReport, Totals};
use bitnetd_proto::worker_link::{ModelSummary, WorkerLoad, WorkerMemory};

use super::*;

/// A daemon with so many workers of so many threads, two CPUs that belong to nobody, and jobs.
fn report(n_workers: u32, n_threads: u32, n_jobs: u32) -> StatusReport {
    let n_cpus = n_workers * n_threads;
    let cpu = |cpu: u32| CpuReport {
        cpu,
        slot: (cpu < n_cpus).then_some(cpu / n_threads),
        busy: Some(f64::from((cpu * 37) % 101) / 100.0),
        stolen: Some(if cpu == 1 { 0.2 } else { 0.0 }),
    };
    let job = |number: u32| JobReport {
        job: 100 + u64::from(number),
        slot: (number < n_workers * 8).then_some(number % n_workers),
        phase: ["decode", "prefill", "decode"][number as usize % 3].into(),
        is_durable: number % 5 == 4,
        tokens: number * 7 % 128,
        tokens_max: 128,
        tokens_per_s: (number % 3 != 1).then_some(f64::from(number % 40) + 0.5),
        age_s: f64::from(number) * 1.5,
    };
    StatusReport {
        server: "bitnetd/0.1.0".into(),
        pid: 4242,
        uptime_s: 3671.0,
        health: Health::Ready,
        model: Some(model()),
        queued: n_jobs.saturating_sub(n_workers * 8),
        queue_max: 512,
        totals: Totals {
            completed: 1700,
            failed: 3,
            refused: 12,
            restarts: 2,
            failovers: 5,
            ..Totals::default()
        },
        journal: None,
        kept_image: None,
        slots: (0..n_workers).map(|number| slot(number, n_threads)).collect(),
        jobs: (0..n_jobs).map(job).collect(),
        n_jobs_beyond: 0,
        cpus: (0..n_cpus + 2).map(cpu).collect(),
        usage_window_s: Some(1.0),
    }
}

fn slot(number: u32, n_threads: u32) -> SlotReport {
    let first = number * n_threads;
    let memory =
        WorkerMemory { pss_bytes: (600 << 20) + u64::from(number) * 333_000_000, ..WorkerMemory::default() };
    let thread = |thread: u32| ThreadReport {
        tid: 5000 + first + thread,
        name: format!("bnd-w{number}-t{thread}"),
        thread: Some(thread),
        cpu: Some(first + thread),
        cpu_s: 12.0,
        wait_s: Some(0.5),
        timeslices: Some(90),
        migrations: Some(3),
        running: Some(0.92),
        waiting: Some(0.01),
    };
    let last_exit =
        (number == 1).then(|| "killed by signal 9 (SIGKILL), the kernel was out of memory".to_owned());
    SlotReport {
        slot: number,
        state: if number == 1 { "backoff" } else { "ready" }.into(),
        pid: (number != 1).then_some(4300 + number),
        cpus: format!("{first}-{}", first + n_threads - 1),
        memory_nodes: String::new(),
        restarts: u64::from(number == 1) * 2,
        jobs: 8,
        load: WorkerLoad {
            kv_tokens: 700,
            kv_tokens_max: 2048,
            memory: Some(memory),
            ..WorkerLoad::default()
        },
        load_age_s: Some(0.5),
        prefill_per_s: Some(1234.5),
        decode_per_s: Some(f64::from(number) * 17.25),
        resident_bytes: None,
        threads: if number == 1 { Vec::new() } else { (0..n_threads).map(thread).collect() },
        confinement: None,
        last_exit,
    }
}

fn model() -> ModelSummary {
    ModelSummary {
        name: "story".into(),
        architecture: "bitnet-b1.58".into(),
        n_params: 7_350_000,
        n_ctx: 256,
        n_vocab: 4096,
        n_layers: 8,
        n_embd: 256,
        isa: "avx512-vnni".into(),
        head: "F16".into(),
        image_bytes: 4_200_000,
        kv_bytes: 0,
        has_chat_template: false,
        step_bytes: 1,
        token_macs: 1,
        head_macs: 1,
    }
}

/// What the screen shows with this report.
fn frame(report: StatusReport, width: u16, height: u16) -> String {
    let mut screen = Screen::new(Duration::from_secs(1), Palette::new(true));
    screen.take(Ok(Box::new(report)));
    as_text(&screen.view(), width, height).unwrap()
}

#[test]
fn a_laptop_at_80x24() {
    insta::assert_snapshot!(frame(report(3, 4, 9), 80, 24));
}

#[test]
fn a_laptop_at_200x50() {
    insta::assert_snapshot!(frame(report(3, 4, 40), 200, 50));
}

#[test]
fn a_server_with_192_cores_at_80x24() {
    insta::assert_snapshot!(frame(report(24, 8, 300), 80, 24));
}

#[test]
fn a_server_with_192_cores_at_200x50() {
    insta::assert_snapshot!(frame(report(24, 8, 300), 200, 50));
}

#[test]
fn one_frame_as_text_shows_everything() {
    let report = report(24, 8, 30);
    let text = as_text(&plain(&report), 80, draw::ideal_height(&report, 80)).unwrap();
    assert!(!text.contains("more"), "{text}");
    for number in 0..24 {
        assert!(
            text.lines().any(|line| line.starts_with(&format!("{number:>3} "))),
            "worker {number}:\n{text}"
        );
    }
    for job in 100..130 {
        assert!(text.lines().any(|line| line.starts_with(&format!("{job:>8} "))), "job {job}:\n{text}");
    }
    assert!(!text.contains("q quit"), "{text}");
    assert!(!text.ends_with("\n\n"), "{text}");
}

#[test]
fn no_size_is_too_small() {
    for width in [1, 2, 10, 79, 80, 169, 170, 500] {
        for height in [1, 2, 3, 5, 8, 13, 24, 100] {
            let text = frame(report(24, 8, 300), width, height);
            assert_eq!(text.lines().count(), usize::from(height));
        }
    }
}

#[test]
fn a_daemon_that_is_gone_is_named_and_its_last_word_stays() {
    let mut screen = Screen::new(Duration::from_secs(1), Palette::new(true));
    assert!(as_text(&screen.view(), 80, 24).unwrap().contains("no answer yet"));
    screen.take(Ok(Box::new(report(3, 4, 9))));
    screen
        .take(Err("cannot connect to `/run/bitnetd/bitnetd.sock`: Connection refused (os error 111)".into()));
    let since = screen.trouble.as_ref().map(|(_, since)| *since);
    screen.take(Err("again".into()));
    assert_eq!(screen.trouble.as_ref().map(|(_, since)| *since), since, "one trouble, from its beginning");
    let text = as_text(&screen.view(), 80, 24).unwrap();
    assert!(text.starts_with("bitnetd NO ANSWER for 0s: again; trying again\n"), "{text}");
    assert!(text.contains("so when it last answered") && text.contains("4302"), "{text}");
    screen.take(Ok(Box::new(report(3, 4, 9))));
    assert!(as_text(&screen.view(), 80, 24).unwrap().starts_with("bitnetd ready"));
}

#[test]
fn keys_scroll_and_quit() {
    let mut screen = Screen::new(Duration::from_secs(1), Palette::new(false));
    screen.take(Ok(Box::new(report(24, 8, 300))));
    let key = |code| KeyEvent::new(code, KeyModifiers::NONE);
    for code in [KeyCode::Down, KeyCode::PageDown, KeyCode::Up] {
        assert_eq!(screen.obey(key(code)), Next::Continue);
    }
    assert_eq!((screen.first_worker, screen.first_job), (0, 10));
    let text = as_text(&screen.view(), 80, 24).unwrap();
    assert!(text.contains("\n     110 ") && !text.contains("\n     109 "), "{text}");
    screen.obey(key(KeyCode::Tab));
    screen.obey(key(KeyCode::End));
    assert_eq!((screen.first_worker, screen.first_job), (23, 10));
    let text = as_text(&screen.view(), 80, 24).unwrap();
    assert!(text.contains("\n 23 ready"), "{text}");
    // What was scrolled to may be gone with the next report.
    screen.take(Ok(Box::new(report(3, 4, 2))));
    let text = as_text(&screen.view(), 80, 24).unwrap();
    assert!(text.contains("\n  0 ready") && text.contains("\n     100   "), "{text}");
    assert_eq!(screen.obey(KeyEvent::new(KeyCode::Char('c'), KeyModifiers::NONE)), Next::Continue);
    let control_c = KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL);
    for quit in [key(KeyCode::Esc), key(KeyCode::Char('q')), control_c] {
        assert_eq!(screen.obey(quit), Next::Quit);
    }
}

#[test]
fn intervals_are_bounded() {
    assert_eq!(parse_interval("0.5"), Ok(Duration::from_millis(500)));
    for text in ["0", "0.01", "1e9", "NaN", "soon"] {
        assert!(parse_interval(text).is_err(), "{text}");
    }
}
