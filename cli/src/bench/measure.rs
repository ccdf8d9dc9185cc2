//! Runs jobs on a worker of one size and times what comes back.

use std::time::{Duration, Instant};

use bitnetd_config::Config;
use bitnetd_proto::event::Done;
use bitnetd_proto::exit_code::ExitCode;
use bitnetd_proto::limits::MAX_TOKENS_MAX;
use bitnetd_proto::request::{GenerateRequest, Prompt};
use bitnetd_proto::worker_link::{ImageState, WorkerLoad};
use tokio::task::LocalSet;

use super::bounds::Bounds;
use super::{Rate, Report};
use crate::answer::{AnswerEvent, Source as _};
use crate::error::CliError;
use crate::local::{Local, LocalJob};

/// Tokens in the prompts of answers that are timed.
const SHORT_PROMPT: u32 = 8;

/// Longest wait for the fast image of the model to be made.
const IMAGE_DEADLINE: Duration = Duration::from_secs(120);

/// Longest wait for the worker to tell of what it did.
const REPORT_DEADLINE: Duration = Duration::from_secs(5);

/// Prompts that are read before the first that counts.
const N_UNCOUNTED: u16 = 2;

/// How often answers that were hardly ever generated together are asked for again, each time twice as long.
const N_LONGER: u32 = 8;

/// How often to look whether it is so.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);

/// What is measured with each number of threads.
#[derive(Clone, Debug)]
pub(super) struct Setup {
    pub(super) sequences: Vec<usize>,
    pub(super) prompt_tokens: u32,
    pub(super) answer_tokens: u32,
    pub(super) repeats: u16,
}

/// Measures everything with one worker and adds it to the report.
pub(super) async fn run(
    config: Config,
    bounds: impl Fn() -> Result<Bounds, CliError>,
    setup: &Setup,
    report: &mut Option<Report>,
    note: impl Fn(&str),
) -> Result<(), CliError> {
    note("what the machine can do");
    let before = bounds()?;
    let (prefill, decode, local) = Local::with(config, async |local| {
        let mut tokens = Tokens::below(local.model.n_vocab);
        // The first steps are short: how fast the machine is, the worker learns from them. And pages are touched first.
        read_prompts(&local, setup, N_UNCOUNTED, &mut tokens).await?;
        note("waiting for the fast image");
        image_settled(&local).await?;
        note("reading a prompt");
        let prefill = read_prompts(&local, setup, setup.repeats, &mut tokens).await?;
        let mut decode = Vec::new();
        // One of each prompt that was read.
        let mut n_generated = u64::from(N_UNCOUNTED) + u64::from(setup.repeats);
        for n in &setup.sequences {
            note(&format!("{n} answers together"));
            let mut runs = Vec::new();
            for _ in 0..setup.repeats {
                runs.push(self::decode(&local, setup, *n, &mut tokens, &mut n_generated).await?);
            }
            decode.push((*n, runs, step_bytes(&local, n_generated).await));
        }
        Ok((prefill, decode, local))
    })
    .await?;
    note("what the machine can do, again");
    let bounds = before.or_better(bounds()?);
    let step_bytes = decode.first().map_or(local.model.step_bytes, |(_, _, step_bytes)| *step_bytes);
    let model = &local.model;
    let report = report.get_or_insert_with(|| Report {
        program: concat!("bitnetd ", env!("CARGO_PKG_VERSION")),
        model: model.name.clone(),
        head: model.head.clone(),
        isa: model.isa.clone(),
        step_bytes,
        token_macs: model.token_macs,
        head_macs: model.head_macs,
        prompt_tokens: setup.prompt_tokens,
        answer_tokens: setup.answer_tokens,
        repeats: setup.repeats,
        bounds: Vec::new(),
        prefill: Vec::new(),
        decode: Vec::new(),
    });
    let n_rows = usize::try_from(setup.prompt_tokens).unwrap_or(usize::MAX);
    let bound = bounds.tokens_per_s(model.step_bytes, model.token_macs, n_rows);
    report.prefill.push(rate(&bounds, 1, prefill, bound));
    for (n, runs, step_bytes) in decode {
        let bound = bounds.tokens_per_s(step_bytes, model.token_macs + model.head_macs, n);
        report.decode.push(rate(&bounds, n, runs, bound));
    }
    report.bounds.push(bounds);
    Ok(())
}

fn rate(bounds: &Bounds, sequences: usize, runs: Vec<f64>, bound: (f64, super::BoundBy)) -> Rate {
    let tokens_per_s = median(&runs);
    let (bound_tokens_per_s, bound_by) = bound;
    Rate {
        threads: bounds.threads,
        sequences,
        tokens_per_s,
        runs,
        bound_tokens_per_s,
        bound_by,
        share_of_bound: tokens_per_s / bound_tokens_per_s,
    }
}

/// The middle one; of an even number the mean of the two in the middle.
fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match (sorted.get(middle.wrapping_sub(1)), sorted.get(middle)) {
        (Some(a), Some(b)) if sorted.len().is_multiple_of(2) => (a + b) / 2.0,
        (_, Some(b)) => *b,
        _ => 0.0,
    }
}

/// Waits until the worker has settled what it reads weights from.
async fn image_settled(local: &Local) -> Result<(), CliError> {
    let deadline = Instant::now() + IMAGE_DEADLINE;
    while Instant::now() < deadline {
        let loads = local.loads().await;
        let is_settled = |load: &WorkerLoad| {
            load.step_bytes > 0 && !matches!(load.image, ImageState::Waiting | ImageState::Making)
        };
        if loads.iter().all(is_settled) {
            return Ok(());
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
    Err(CliError::new(ExitCode::Software, "the fast image of the model was not made in time"))
}

/// Bytes that the last step read, when the worker has told of all tokens it generated.
async fn step_bytes(local: &Local, n_generated: u64) -> u64 {
    let deadline = Instant::now() + REPORT_DEADLINE;
    loop {
        let loads = local.loads().await;
        let n_told: u64 = loads.iter().map(|load| load.decode_tokens).sum();
        if n_told >= n_generated || Instant::now() > deadline {
            return loads.iter().map(|load| load.step_bytes).max().unwrap_or(0);
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}

/// Prompt tokens a second, `n` times.
async fn read_prompts(
    local: &Local,
    setup: &Setup,
    n: u16,
    tokens: &mut Tokens,
) -> Result<Vec<f64>, CliError> {
    let mut runs = Vec::new();
    for _ in 0..n {
        let (_, done) = follow(start(local, tokens.prompt(setup.prompt_tokens), 1).await?).await?;
        runs.push(f64::from(setup.prompt_tokens) / done.timings.prefill_s.max(1e-9));
    }
    Ok(runs)
}

/// Tokens a second of `n` answers together, while all of them are being generated; `n_generated` grows by their tokens. Answers
/// of a small model may be over before the last of them has begun: longer ones are not.
async fn decode(
    local: &Local,
    setup: &Setup,
    n: usize,
    tokens: &mut Tokens,
    n_generated: &mut u64,
) -> Result<f64, CliError> {
    for n_longer in 0..=N_LONGER {
        let answer_tokens = setup.answer_tokens.saturating_mul(1 << n_longer).min(MAX_TOKENS_MAX);
        let arrivals = answers(local, n, answer_tokens, tokens).await?;
        *n_generated += arrivals.iter().map(|job| job.len() as u64).sum::<u64>();
        if let Some(rate) = common_rate(&arrivals) {
            return Ok(rate);
        }
    }
    let what = format!("{n} answers were over before all of them had begun, however long they were");
    Err(CliError::new(ExitCode::Software, what).hint("measure fewer of them together: --sequences"))
}

/// When each token of `n` answers came that were asked for at the same time.
async fn answers(
    local: &Local,
    n: usize,
    answer_tokens: u32,
    tokens: &mut Tokens,
) -> Result<Vec<Vec<Instant>>, CliError> {
    let mut jobs = Vec::new();
    for _ in 0..n {
        jobs.push(start(local, tokens.prompt(SHORT_PROMPT), answer_tokens).await?);
    }
    let all = LocalSet::new();
    let following: Vec<_> = jobs.into_iter().map(|job| all.spawn_local(follow(job))).collect();
    all.run_until(async {
        let mut arrivals = Vec::new();
        for job in following {
            let followed = job.await.map_err(|error| CliError::new(ExitCode::Software, error))?;
            arrivals.push(followed?.0);
        }
        Ok(arrivals)
    })
    .await
}

/// Arrivals a second from the moment every job has its first until one has its last; none if that is less than half of them.
#[expect(clippy::cast_precision_loss, reason = "a rate, good to a few digits")]
fn common_rate(arrivals: &[Vec<Instant>]) -> Option<f64> {
    let begin = *arrivals.iter().filter_map(|job| job.first()).max()?;
    let end = *arrivals.iter().filter_map(|job| job.last()).min()?;
    let (mut n, mut n_common) = (0_usize, 0_usize);
    for at in arrivals.iter().flatten() {
        n += 1;
        n_common += usize::from(*at > begin && *at <= end);
    }
    let is_enough = n_common > 0 && 2 * n_common >= n;
    is_enough.then(|| n_common as f64 / end.saturating_duration_since(begin).as_secs_f64())
}

async fn start(local: &Local, prompt: Vec<u32>, max_tokens: u32) -> Result<LocalJob, CliError> {
    let request =
        GenerateRequest { max_tokens, ignore_eos: true, ..GenerateRequest::new(Prompt::Tokens(prompt)) };
    local.start(request).await
}

/// When each token came, and the end.
async fn follow(mut job: LocalJob) -> Result<(Vec<Instant>, Done), CliError> {
    let mut arrivals = Vec::new();
    loop {
        match job.next().await? {
            AnswerEvent::Accepted { .. } => {}
            AnswerEvent::Token(_) => arrivals.push(Instant::now()),
            AnswerEvent::Done(done) => return Ok((arrivals, done)),
        }
    }
}

/// Random tokens, the same in every run (a linear congruential sequence; Knuth's constants).
struct Tokens {
    state: u64,
    n_vocab: u64,
}

impl Tokens {
    fn below(n_vocab: u32) -> Self {
        Self { state: 1, n_vocab: u64::from(n_vocab.max(1)) }
    }

    fn prompt(&mut self, n: u32) -> Vec<u32> {
        let next = |_| {
            self.state =
                self.state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            u32::try_from((self.state >> 33) % self.n_vocab).unwrap_or(0)
        };
        (0..n).map(next).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(median(&[]), 0.0);
    }

    #[test]
    fn only_the_time_in_which_all_generate_counts() {
        let zero = Instant::now();
        let at = |ms: &[u64]| ms.iter().map(|ms| zero + Duration::from_millis(*ms)).collect::<Vec<_>>();
        // From 20 to 40: two tokens of each.
        let rate = common_rate(&[at(&[10, 20, 30, 40]), at(&[20, 35, 38, 50])]);
        assert!(rate.is_some_and(|rate| (rate - 200.0).abs() < 1e-6), "{rate:?}");
        assert_eq!(common_rate(&[Vec::new()]), None);
    }

    #[test]
    fn answers_one_after_the_other_have_no_rate_together() {
        let zero = Instant::now();
        let at = |ms: &[u64]| ms.iter().map(|ms| zero + Duration::from_millis(*ms)).collect::<Vec<_>>();
        assert_eq!(common_rate(&[at(&[10, 20, 30]), at(&[40, 50, 60])]), None);
        assert_eq!(common_rate(&[at(&[10, 20, 30]), at(&[30, 40, 50])]), None);
        assert_eq!(common_rate(&[at(&[10])]), None);
        assert_eq!(common_rate(&[at(&[10]), at(&[10])]), None);
    }

    #[test]
    fn prompts_differ_and_stay_in_the_vocabulary() {
        let mut tokens = Tokens::below(100);
        let (a, b) = (tokens.prompt(64), tokens.prompt(64));
        assert_ne!(a, b);
        assert!(a.iter().chain(&b).all(|token| *token < 100));
    }
}
