//! `bitnetd jobs`, `wait`, `result` and `cancel`: look at durable jobs, get their answers, give them up.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use bitnetd_proto::client::{Client, ClientError, JobFilter};
use bitnetd_proto::durable::{JobRecord, JobState, JobSummary};
use bitnetd_proto::error::ErrorCode;
use bitnetd_proto::exit_code::ExitCode;
use bitnetd_proto::limits::JOBS_LISTED_MAX;
use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser as _};
use serde::Serialize;

use crate::answer::{Answer, json_line};
use crate::batch::input;
use crate::control::format_age;
use crate::daemon::{self, SocketArgs};
use crate::error::CliError;
use crate::request_args::parse_seconds;
use crate::{runtime, terminal};

/// A daemon that went away while somebody waits may be away for so long.
const AWAY_MAX: Duration = Duration::from_secs(60);
/// Time between two looks for it.
const LOOK_AGAIN: Duration = Duration::from_millis(250);

/// `bitnetd jobs`
#[derive(Debug, Args)]
#[command(after_help = "\
STARTS counts how often the workers were given the job: more than once if the daemon ended in between.

Examples:
  bitnetd jobs                       the 20 newest
  bitnetd jobs --state queued --all
  bitnetd jobs --all --json | jq -r 'select(.state == \"failed\") | .job'")]
pub(crate) struct JobsArgs {
    /// Only jobs in this state
    #[arg(long, value_name = "STATE", value_parser = states())]
    state: Option<JobState>,
    /// So many, the newest
    #[arg(short = 'n', long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    limit: u32,
    /// All of them
    #[arg(long, conflicts_with = "limit")]
    all: bool,
    /// Print one JSON object for each job
    #[arg(long, help_heading = "Output")]
    json: bool,
    #[command(flatten)]
    socket: SocketArgs,
}

/// `bitnetd wait`
#[derive(Debug, Args)]
#[command(after_help = "\
Goes on waiting while the daemon is restarted. Exit code: 0 if every job has an answer, 1 if one failed or was cancelled, 75 if
the time was over.

Examples:
  bitnetd wait 17
  bitnetd wait 17 18 19 --json --timeout 600")]
pub(crate) struct WaitArgs {
    /// Numbers of jobs, as `bitnetd submit` prints them
    #[arg(value_name = "JOB", required = true)]
    jobs: Vec<u64>,
    /// Wait so long at most, for all of them together
    #[arg(long, value_name = "SECONDS", value_parser = parse_seconds)]
    timeout: Option<u64>,
    #[command(flatten)]
    output: OutputArgs,
    #[command(flatten)]
    socket: SocketArgs,
}

/// `bitnetd result`
#[derive(Debug, Args)]
pub(crate) struct ResultArgs {
    /// Number of a job that has ended
    #[arg(value_name = "JOB")]
    job: u64,
    #[command(flatten)]
    output: OutputArgs,
    #[command(flatten)]
    socket: SocketArgs,
}

/// `bitnetd cancel`
#[derive(Debug, Args)]
#[command(after_help = "Exit code: 0 if every job is cancelled, 1 if one had ended before or is not there.")]
pub(crate) struct CancelArgs {
    /// Numbers of jobs
    #[arg(value_name = "JOB", required = true)]
    jobs: Vec<u64>,
    #[command(flatten)]
    socket: SocketArgs,
}

/// How results are printed.
#[derive(Clone, Copy, Debug, Args)]
struct OutputArgs {
    /// Print one JSON object for each job instead of the text
    #[arg(long, help_heading = "Output")]
    json: bool,
}

fn states() -> impl clap::builder::TypedValueParser<Value = JobState> {
    PossibleValuesParser::new(JobState::ALL.map(JobState::name))
        .map(|name| JobState::ALL.into_iter().find(|state| state.name() == name).unwrap_or(JobState::Queued))
}

/// Lists jobs.
pub(crate) fn jobs(args: &JobsArgs) -> Result<ExitCode, CliError> {
    let mut client = args.socket.connect()?;
    let mut left = if args.all { u32::MAX } else { args.limit };
    let (mut before, mut found) = (None, Vec::new());
    while left > 0 {
        let limit = Some(left.min(JOBS_LISTED_MAX));
        let (jobs, has_more) = client.jobs(JobFilter { state: args.state, before, limit })?;
        before = jobs.last().map(|job| job.job);
        left = left.saturating_sub(u32::try_from(jobs.len()).unwrap_or(u32::MAX));
        if args.json {
            let lines: Result<Vec<String>, CliError> = jobs.iter().map(json_line).collect();
            terminal::put(lines?.concat().as_bytes())?;
        } else {
            found.extend(jobs);
        }
        if !has_more || before.is_none() {
            break;
        }
    }
    if !args.json {
        terminal::put(table(&found, now_ms()).as_bytes())?;
    }
    Ok(ExitCode::Ok)
}

fn table(jobs: &[JobSummary], now_ms: u64) -> String {
    let owners: BTreeSet<&str> = jobs.iter().map(|job| job.owner.as_str()).collect();
    let header = ["JOB", "STATE", "AGE", "TOKENS", "STARTS", "OWNER", "ID", "PROMPT"];
    let mut rows = vec![header.map(str::to_owned)];
    for job in jobs {
        let prompt = match &job.error {
            Some(error) => format!("{} -- {}", job.prompt, error.message),
            None => job.prompt.clone(),
        };
        rows.push([
            job.job.to_string(),
            job.state.name().to_owned(),
            format_age(Duration::from_millis(now_ms.saturating_sub(job.submitted_ms))),
            job.tokens.map_or_else(|| "-".to_owned(), |tokens| tokens.to_string()),
            job.starts.to_string(),
            job.owner.clone(),
            job.key.clone().unwrap_or_else(|| "-".to_owned()),
            prompt,
        ]);
    }
    let hidden = |column: usize| {
        (header[column] == "OWNER" && owners.len() < 2)
            || (header[column] == "ID" && jobs.iter().all(|job| job.key.is_none()))
    };
    terminal::columns(&rows, hidden)
}

fn now_ms() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

/// Waits for jobs and prints what came of them.
pub(crate) fn wait(args: &WaitArgs) -> Result<ExitCode, CliError> {
    let end = args.timeout.map(|ms| Instant::now() + Duration::from_millis(ms));
    let mut code = ExitCode::Ok;
    let mut client = Some(args.socket.connect()?); // Nobody there at the beginning is an error at once.
    for &job in &args.jobs {
        let record = wait_for(args, &mut client, job, end)?;
        if !record.summary.state.has_ended() {
            let text = format!("job {job} has not ended in time: it is {}", record.summary.state.name());
            return Err(
                CliError::new(ExitCode::Temporary, text).hint(format!("`bitnetd wait {job}` goes on"))
            );
        }
        code = print(record, args.output, args.jobs.len() > 1, code)?;
    }
    Ok(code)
}

/// A job when it has ended; a daemon that is restarted meanwhile is found again.
fn wait_for(
    args: &WaitArgs,
    connection: &mut Option<Client>,
    job: u64,
    end: Option<Instant>,
) -> Result<JobRecord, CliError> {
    let mut away_since: Option<Instant> = None;
    loop {
        let left = end.map(|end| end.saturating_duration_since(Instant::now()));
        let outcome = match connection.take() {
            Some(client) => Ok(client),
            None => daemon::connect_once(&args.socket.find()?, daemon::ANSWER_TIMEOUT),
        }
        .and_then(|mut client| {
            away_since = None;
            let record = client.wait(job, left)?;
            *connection = Some(client); // For the next job.
            Ok(record)
        });
        let error = match outcome {
            Ok(record) => return Ok(record),
            Err(error) if is_away(&error) => CliError::from(error),
            Err(error) => return Err(error.into()),
        };
        if away_since.is_none() {
            terminal::say(&format!("{}; waiting for the daemon to come back", error.message()));
        }
        let since = *away_since.get_or_insert_with(Instant::now);
        if end.is_some_and(|end| Instant::now() >= end) || since.elapsed() >= AWAY_MAX {
            return Err(error.hint(format!("when the daemon is back, `bitnetd wait {job}` goes on")));
        }
        runtime::block_on(async {
            tokio::time::sleep(LOOK_AGAIN).await;
            Ok(())
        })?;
    }
}

/// Whether the daemon may come back and know the job.
fn is_away(error: &ClientError) -> bool {
    match error {
        ClientError::Connect { .. } | ClientError::Link(_) | ClientError::Closed => true,
        ClientError::Refused(error) => {
            matches!(error.code, ErrorCode::Draining | ErrorCode::Overloaded | ErrorCode::JournalUnavailable)
        }
        ClientError::Unexpected(_) => false,
    }
}

/// Prints what came of a job that has ended.
pub(crate) fn result(args: &ResultArgs) -> Result<ExitCode, CliError> {
    let job = args.job;
    let record = args.socket.connect()?.result(job)?;
    if !record.summary.state.has_ended() {
        let text = format!("job {job} has not ended: it is {}", record.summary.state.name());
        return Err(
            CliError::new(ExitCode::Temporary, text).hint(format!("`bitnetd wait {job}` waits for it"))
        );
    }
    print(record, args.output, false, ExitCode::Ok)
}

/// Gives jobs up.
pub(crate) fn cancel(args: &CancelArgs) -> Result<ExitCode, CliError> {
    let mut client = args.socket.connect()?;
    let mut code = ExitCode::Ok;
    for &job in &args.jobs {
        let complaint = match client.cancel_job(job) {
            Ok(summary) if summary.state == JobState::Cancelled => continue,
            Ok(summary) => format!("job {job} had ended before: it is {}", summary.state.name()),
            Err(ClientError::Refused(error)) if error.code == ErrorCode::NotFound => error.message,
            Err(error) => return Err(error.into()),
        };
        terminal::say(&format!("error: {complaint}"));
        code = ExitCode::Failure;
    }
    Ok(code)
}

/// What `--json` prints of a job without an answer.
#[derive(Debug, Serialize)]
struct Unanswered<'a> {
    job: u64,
    state: JobState,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    prompt: &'a str,
    error: String,
}

/// What `--json` prints of a job with one: a line of `batch`, and whose it is.
#[derive(Debug, Serialize)]
struct Answered {
    job: u64,
    state: JobState,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    #[serde(flatten)]
    answer: Answer,
}

/// Prints one result; gives the exit code so far.
fn print(
    record: JobRecord,
    output: OutputArgs,
    is_one_of_many: bool,
    code: ExitCode,
) -> Result<ExitCode, CliError> {
    let JobRecord { summary, request, answer } = record;
    let (job, state, id) = (summary.job, summary.state, summary.key);
    let prompt = input::shown(&request.prompt);
    let Some(answer) = answer else {
        let error = match &summary.error {
            Some(error) => error.message.clone(),
            None => format!("it is {}", state.name()),
        };
        if output.json {
            let line = Unanswered { job, state, id, prompt: &prompt, error };
            terminal::put(json_line(&line)?.as_bytes())?;
        } else {
            terminal::say(&format!("error: job {job}: {error}"));
        }
        return Ok(ExitCode::Failure);
    };
    let shown = if output.json {
        let answer = Answer::of_record(&request, answer, prompt);
        json_line(&Answered { job, state, id, answer })?
    } else if is_one_of_many {
        format!("[{job}] {prompt}\n{}\n\n", answer.text)
    } else if answer.text.ends_with('\n') {
        answer.text
    } else {
        answer.text + "\n"
    };
    terminal::put(shown.as_bytes())?;
    Ok(code)
}

#[cfg(test)]
mod tests {
    use bitnetd_proto::error::WireError;

    use super::*;

    #[test]
    fn the_list_hides_columns_that_say_nothing() {
        let job = |job, state, key: Option<&str>, error| JobSummary {
            job,
            state,
            owner: "uid 1000".into(),
            key: key.map(str::to_owned),
            submitted_ms: 1_000_000,
            ended_ms: None,
            priority: 0,
            starts: 1,
            deaths: 0,
            prompt: "Once upon a time".into(),
            tokens: (state == JobState::Done).then_some(64),
            error,
        };
        let poisoned =
            WireError::new(ErrorCode::Poisoned, "3 workers died with this job on board; it is given up");
        let mut jobs = vec![
            job(12, JobState::Queued, None, None),
            job(11, JobState::Failed, None, Some(poisoned)),
            job(9, JobState::Done, None, None),
        ];
        let plain = table(&jobs, 1_185_000);
        jobs[0].owner = "uid 0".into();
        jobs[0].key = Some("monday/7".into());
        let full = table(&jobs, 1_185_000);
        insta::assert_snapshot!(format!("{plain}\n{full}"), @r#"
        JOB  STATE   AGE    TOKENS  STARTS  PROMPT
        12   queued  3m 5s  -       1       Once upon a time
        11   failed  3m 5s  -       1       Once upon a time -- 3 workers died with this job on board; it is given up
        9    done    3m 5s  64      1       Once upon a time

        JOB  STATE   AGE    TOKENS  STARTS  OWNER     ID        PROMPT
        12   queued  3m 5s  -       1       uid 0     monday/7  Once upon a time
        11   failed  3m 5s  -       1       uid 1000  -         Once upon a time -- 3 workers died with this job on board; it is given up
        9    done    3m 5s  64      1       uid 1000  -         Once upon a time
        "#);
    }
}
