//! One answer as it arrives: its text goes to stdout at once, or all of it as one JSON object at its end.
//!
//! Where the events come from (a service in this process, a daemon's socket) is a [`Source`].

use bitnetd_proto::durable::JobAnswer;
use bitnetd_proto::event::{Done, FinishReason, Token, TokenLogprobs};
use bitnetd_proto::request::GenerateRequest;
use indicatif::ProgressBar;
use serde::Serialize;

use crate::error::CliError;
use crate::terminal::Printer;

/// Something that happens to a job.
#[derive(Debug)]
pub(crate) enum AnswerEvent {
    /// It was accepted, with this seed.
    Accepted { seed: u64 },
    /// One more token.
    Token(Token),
    /// It ended well; nothing follows.
    Done(Done),
}

/// Where the events of one job come from. Dropping it cancels the job.
pub(crate) trait Source {
    /// The next event; after [`AnswerEvent::Done`] or an error nobody asks again.
    ///
    /// # Cancel safety
    /// Nothing is lost if it is dropped before it is ready.
    async fn next(&mut self) -> Result<AnswerEvent, CliError>;
}

/// A complete answer; as JSON, a line of `batch` and what `--json` prints.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Answer {
    /// Number of the prompt, from 0.
    pub index: usize,
    /// What was asked.
    pub prompt: String,
    /// What was answered.
    pub text: String,
    /// Number of tokens generated.
    pub tokens: u32,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// From acceptance to the end, without the wait for a worker.
    pub seconds: f64,
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Of those, how many were not computed again.
    pub cached_tokens: u32,
    /// From acceptance to the first token.
    pub ttft_seconds: f64,
    /// Spent on the prompt.
    pub prefill_seconds: f64,
    /// From the first generated token to the last.
    pub decode_seconds: f64,
    /// Keys the random choices.
    pub seed: u64,
    /// Name of the model that answered.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// The tokens themselves.
    pub token_ids: Vec<u32>,
    /// One entry for each token, if asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub logprobs: Option<Vec<TokenLogprobs>>,
}

impl Answer {
    /// The answer of a durable job.
    pub(crate) fn of_record(request: &GenerateRequest, answer: JobAnswer, prompt: String) -> Self {
        let JobAnswer { text, token_ids, logprobs, finish_reason, usage, timings, model } = answer;
        let mut collector = Collector::new(0, prompt, request.logprobs.is_some());
        collector.seed = request.sampling.seed.unwrap_or_default();
        (collector.text, collector.token_ids, collector.logprobs) = (text, token_ids, logprobs);
        collector.finish(&Done { finish_reason, tail: String::new(), usage, timings, model })
    }

    /// As one line of JSON.
    pub(crate) fn to_json_line(&self) -> Result<String, CliError> {
        json_line(self)
    }

    /// Prompt tokens for each second of work on them.
    pub(crate) fn prefill_rate(&self) -> Option<f64> {
        rate(self.prompt_tokens.saturating_sub(self.cached_tokens), self.prefill_seconds)
    }

    /// Tokens after the first for each second of work on them.
    pub(crate) fn decode_rate(&self) -> Option<f64> {
        rate(self.tokens.saturating_sub(1), self.decode_seconds)
    }
}

/// Any value as one line of JSON.
pub(crate) fn json_line(value: &impl Serialize) -> Result<String, CliError> {
    serde_json::to_string(value)
        .map(|json| json + "\n")
        .map_err(|error| CliError::with_code(bitnetd_proto::exit_code::ExitCode::Software, error))
}

/// Tokens for each second, if there were any in any time.
pub(crate) fn rate(tokens: u32, seconds: f64) -> Option<f64> {
    (tokens > 0 && seconds > 0.0).then(|| f64::from(tokens) / seconds)
}

/// Collects a job's events.
#[derive(Debug)]
pub(crate) struct Collector {
    index: usize,
    prompt: String,
    seed: u64,
    text: String,
    token_ids: Vec<u32>,
    logprobs: Vec<TokenLogprobs>,
    has_logprobs: bool,
}

impl Collector {
    /// For one prompt; `has_logprobs` if log-probabilities were asked for.
    pub(crate) fn new(index: usize, prompt: String, has_logprobs: bool) -> Self {
        Self {
            index,
            prompt,
            seed: 0,
            text: String::new(),
            token_ids: Vec::new(),
            logprobs: Vec::new(),
            has_logprobs,
        }
    }

    /// Takes events until the end; each piece of text goes to `on_text` at once.
    pub(crate) async fn collect(
        mut self,
        source: &mut impl Source,
        mut on_text: impl AsyncFnMut(&str) -> Result<(), CliError>,
    ) -> Result<Answer, CliError> {
        loop {
            match source.next().await? {
                AnswerEvent::Accepted { seed } => self.seed = seed,
                AnswerEvent::Token(token) => {
                    on_text(&token.text).await?;
                    self.text.push_str(&token.text);
                    self.token_ids.push(token.id);
                    self.logprobs.extend(token.logprobs);
                }
                AnswerEvent::Done(done) => {
                    on_text(&done.tail).await?;
                    self.text.push_str(&done.tail);
                    return Ok(self.finish(&done));
                }
            }
        }
    }

    fn finish(self, done: &Done) -> Answer {
        Answer {
            index: self.index,
            prompt: self.prompt,
            text: self.text,
            tokens: done.usage.completion_tokens,
            finish_reason: done.finish_reason,
            seconds: (done.timings.total_s - done.timings.queue_s).max(0.0),
            prompt_tokens: done.usage.prompt_tokens,
            cached_tokens: done.usage.cached_tokens,
            ttft_seconds: done.timings.ttft_s,
            prefill_seconds: done.timings.prefill_s,
            decode_seconds: done.timings.decode_s,
            seed: self.seed,
            model: done.model.clone(),
            token_ids: self.token_ids,
            logprobs: self.has_logprobs.then_some(self.logprobs),
        }
    }
}

/// Follows one job: text to stdout as it comes, or JSON at the end. The answer is returned for a closing line.
pub(crate) async fn print(
    source: &mut impl Source,
    collector: Collector,
    as_json: bool,
) -> Result<Answer, CliError> {
    let printer = Printer::start(ProgressBar::hidden())?;
    let followed = async {
        let answer = collector
            .collect(source, async |text| {
                if as_json || text.is_empty() { Ok(()) } else { printer.put(text.to_owned()).await }
            })
            .await?;
        if as_json {
            printer.put(answer.to_json_line()?).await?;
        } else if !answer.text.ends_with('\n') {
            printer.put("\n".to_owned()).await?;
        }
        Ok(answer)
    };
    let answer = followed.await;
    // A failed write is why the stream was given up, so its error is the one to tell.
    printer.finish().await?;
    answer
}

#[cfg(test)]
mod tests {
    use bitnetd_proto::event::{Timings, Usage};

    use super::*;

    struct Scripted(std::vec::IntoIter<AnswerEvent>);

    impl Source for Scripted {
        async fn next(&mut self) -> Result<AnswerEvent, CliError> {
            self.0.next().ok_or_else(|| CliError::usage("the script is over"))
        }
    }

    fn script() -> Scripted {
        let token = |index, text: &str| {
            AnswerEvent::Token(Token { index, id: index + 10, text: text.into(), logprobs: None })
        };
        let done = Done {
            finish_reason: FinishReason::Length,
            tail: "!".into(),
            usage: Usage { prompt_tokens: 5, cached_tokens: 1, completion_tokens: 3 },
            timings: Timings {
                queue_s: 1.0,
                prefill_s: 0.5,
                decode_s: 0.25,
                ttft_s: 1.5,
                total_s: 1.75,
                slot: 0,
                failovers: 0,
            },
            model: Some("tales".into()),
        };
        let events = vec![
            AnswerEvent::Accepted { seed: 7 },
            token(0, " there"),
            token(1, ""),
            token(2, " was"),
            AnswerEvent::Done(done),
        ];
        Scripted(events.into_iter())
    }

    #[tokio::test]
    async fn events_become_an_answer() {
        let mut seen = Vec::new();
        let answer = Collector::new(3, "Once".into(), false)
            .collect(&mut script(), async |text| {
                seen.push(text.to_owned());
                Ok(())
            })
            .await
            .unwrap();
        assert_eq!(seen.concat(), answer.text);
        assert_eq!((answer.prefill_rate(), answer.decode_rate()), (Some(8.0), Some(8.0)));
        insta::assert_snapshot!(answer.to_json_line().unwrap().trim(), @r#"{"index":3,"prompt":"Once","text":" there was!","tokens":3,"finish_reason":"length","seconds":0.75,"prompt_tokens":5,"cached_tokens":1,"ttft_seconds":1.5,"prefill_seconds":0.5,"decode_seconds":0.25,"seed":7,"model":"tales","token_ids":[10,11,12]}"#);
    }

    #[tokio::test]
    async fn what_the_listener_says_ends_the_job() {
        let outcome = Collector::new(0, "Once".into(), false)
            .collect(&mut script(), async |_| Err(CliError::reader_gone()))
            .await;
        assert_eq!(outcome.unwrap_err().exit_code(), bitnetd_proto::exit_code::ExitCode::Ok);
    }
}
