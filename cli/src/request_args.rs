//! What to generate and how: the flags that `run`, `generate` and `batch` share, and the request they make.
//!
//! Letters are those of llama.cpp and `run_inference.py`. Defaults are the protocol's own.

use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use bitnetd_proto::limits::PROMPT_BYTES_MAX;
use bitnetd_proto::request::{ChatMessage, GenerateRequest, Prompt, Sampling};
use clap::Args;

use crate::error::CliError;

/// Where the prompt comes from.
#[derive(Clone, Debug, Args)]
#[group(id = "prompt_source", required = true, multiple = false)]
pub(crate) struct PromptArgs {
    /// The text to continue (with --chat: what the user says)
    #[arg(short, long, value_name = "TEXT")]
    prompt: Option<String>,
    /// Read the prompt from a file; `-` is stdin. One newline at its end is dropped
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
}

impl PromptArgs {
    /// The prompt's text, at most as long as the protocol lets it be.
    pub(crate) fn read(&self) -> Result<String, CliError> {
        match (&self.prompt, &self.file) {
            (Some(text), _) => Ok(text.clone()),
            (None, Some(path)) => read_text(path),
            (None, None) => Err(CliError::usage("there is no prompt")),
        }
    }
}

fn read_text(path: &Path) -> Result<String, CliError> {
    let failed = |source| CliError::file("read the prompt from", path, source);
    let mut bytes = Vec::new();
    let limit = PROMPT_BYTES_MAX as u64 + 2; // One newline, and one byte to see that it is too long.
    if path == Path::new("-") {
        io::stdin().lock().take(limit).read_to_end(&mut bytes).map_err(failed)?;
    } else {
        std::fs::File::open(path)
            .and_then(|file| file.take(limit).read_to_end(&mut bytes))
            .map_err(failed)?;
    }
    let mut text = String::from_utf8(bytes)
        .map_err(|error| failed(io::Error::new(io::ErrorKind::InvalidData, error.utf8_error())))?;
    if text.ends_with('\n') {
        text.pop();
    }
    Ok(text)
}

/// How to choose tokens and when to end.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Generation")]
pub(crate) struct GenerationArgs {
    /// Most tokens to generate
    #[arg(
        short,
        long = "n-predict",
        visible_alias = "max-tokens",
        value_name = "TOKENS",
        default_value_t = 128
    )]
    n_predict: u32,
    /// Answer as in a conversation, with the model's chat template
    #[arg(long)]
    chat: bool,
    /// What the model is told before the conversation (with --chat)
    #[arg(long, value_name = "TEXT", requires = "chat")]
    system: Option<String>,
    /// End the answer before this text; may be given several times
    #[arg(short = 'r', long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Go on after an end-of-text token (for measurements)
    #[arg(long)]
    ignore_eos: bool,
    /// Report the log-probability of each token, and of the N likeliest (0 to 20; seen with --json)
    #[arg(long, value_name = "N")]
    logprobs: Option<u8>,
    /// Give up when the answer is not complete after this many seconds
    #[arg(long, value_name = "SECONDS", value_parser = parse_seconds)]
    deadline: Option<u64>,
    #[command(flatten)]
    sampling: SamplingArgs,
}

/// How to choose each token.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Sampling")]
struct SamplingArgs {
    /// Randomness; 0 always takes the likeliest token
    #[arg(long, visible_alias = "temperature", value_name = "T", default_value_t = Sampling::default().temperature)]
    temp: f32,
    /// Number that keys the random choices: same seed, same answer. Without it, one is drawn (and shown with --json)
    #[arg(short, long, value_name = "N")]
    seed: Option<u64>,
    /// Choose among the K likeliest tokens; 0 is all
    #[arg(long, value_name = "K", default_value_t = Sampling::default().top_k)]
    top_k: u32,
    /// Choose among the likeliest tokens that have this probability together; 1 is all
    #[arg(long, value_name = "P", default_value_t = Sampling::default().top_p)]
    top_p: f32,
    /// Choose among tokens with at least this share of the likeliest one's probability; 0 is all
    #[arg(long, value_name = "P", default_value_t = Sampling::default().min_p)]
    min_p: f32,
    /// Make tokens that came lately less likely, by this factor; 1 is off
    #[arg(long, value_name = "X", default_value_t = Sampling::default().repetition_penalty)]
    repeat_penalty: f32,
    /// How many last tokens the penalties look at
    #[arg(long, value_name = "TOKENS", default_value_t = Sampling::default().penalty_last_n)]
    repeat_last_n: u32,
    /// Taken off the logit of each token that came lately; 0 is off
    #[arg(long, value_name = "X", default_value_t = Sampling::default().presence_penalty, allow_negative_numbers = true)]
    presence_penalty: f32,
    /// Taken off the logit of a token for each time it came lately; 0 is off
    #[arg(long, value_name = "X", default_value_t = Sampling::default().frequency_penalty, allow_negative_numbers = true)]
    frequency_penalty: f32,
    /// Added to the logit of one token, such as `15=-2.5`; may be given several times
    #[arg(short = 'l', long, value_name = "TOKEN=BIAS", value_parser = parse_bias)]
    logit_bias: Vec<(u32, f32)>,
}

impl GenerationArgs {
    /// The request for a prompt, checked as far as it can be without the model.
    pub(crate) fn request(&self, prompt: String) -> Result<GenerateRequest, CliError> {
        let request = self.unchecked_request(prompt);
        request.validate()?;
        Ok(request)
    }

    /// The request for a prompt.
    pub(crate) fn unchecked_request(&self, prompt: String) -> GenerateRequest {
        let prompt = if self.chat {
            let message = |role: &str, content| ChatMessage { role: role.into(), content };
            let system = self.system.clone().map(|content| message("system", content));
            Prompt::Chat(system.into_iter().chain([message("user", prompt)]).collect())
        } else {
            Prompt::Text(prompt)
        };
        GenerateRequest {
            max_tokens: self.n_predict,
            sampling: self.sampling.to_sampling(),
            stop: self.stop.clone(),
            logprobs: self.logprobs,
            ignore_eos: self.ignore_eos,
            deadline_ms: self.deadline,
            ..GenerateRequest::new(prompt)
        }
    }

    /// Whether the prompt is a turn of a conversation.
    pub(crate) fn is_chat(&self) -> bool {
        self.chat
    }
}

impl SamplingArgs {
    fn to_sampling(&self) -> Sampling {
        Sampling {
            temperature: self.temp,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repeat_penalty,
            penalty_last_n: self.repeat_last_n,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            logit_bias: self.logit_bias.clone(),
            seed: self.seed,
        }
    }
}

/// Seconds to whole milliseconds, at least one.
pub(crate) fn parse_seconds(text: &str) -> Result<u64, String> {
    let seconds: f64 = text.parse().map_err(|_| "not a number of seconds".to_owned())?;
    let duration = std::time::Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())?;
    let ms = u64::try_from(duration.as_millis()).map_err(|error| error.to_string())?;
    if ms == 0 { Err("must be at least 0.001".to_owned()) } else { Ok(ms) }
}

fn parse_bias(text: &str) -> Result<(u32, f32), String> {
    let (token, bias) = text.split_once('=').ok_or("expected TOKEN=BIAS, such as 15=-2.5")?;
    let token = token.parse().map_err(|_| format!("`{token}` is not a token id"))?;
    let bias = bias.parse().map_err(|_| format!("`{bias}` is not a number"))?;
    Ok((token, bias))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        generation: GenerationArgs,
    }

    fn request(line: &str) -> GenerateRequest {
        let words = ["x"].into_iter().chain(line.split_whitespace());
        Line::parse_from(words).generation.unchecked_request("hello".into())
    }

    #[test]
    fn without_flags_it_is_the_default_request() {
        assert_eq!(request(""), GenerateRequest::new(Prompt::Text("hello".into())));
    }

    #[test]
    fn each_flag_reaches_its_field() {
        let all = request(
            "-n 7 -s 42 --temp 0.5 --top-k 40 --top-p 0.9 --min-p 0.1 --repeat-penalty 1.1 --repeat-last-n 32 \
             --presence-penalty -0.5 --frequency-penalty 0.25 -l 15=-2.5 -l 3=1 -r END --logprobs 2 --ignore-eos \
             --deadline 1.5",
        );
        let sampling = Sampling {
            temperature: 0.5,
            top_k: 40,
            top_p: 0.9,
            min_p: 0.1,
            repetition_penalty: 1.1,
            penalty_last_n: 32,
            presence_penalty: -0.5,
            frequency_penalty: 0.25,
            logit_bias: vec![(15, -2.5), (3, 1.0)],
            seed: Some(42),
        };
        let expected = GenerateRequest {
            max_tokens: 7,
            sampling,
            stop: vec!["END".into()],
            logprobs: Some(2),
            ignore_eos: true,
            deadline_ms: Some(1500),
            ..GenerateRequest::new(Prompt::Text("hello".into()))
        };
        assert_eq!(all, expected);
    }

    #[test]
    fn chat_makes_a_conversation() {
        let message = |role: &str, content: &str| ChatMessage { role: role.into(), content: content.into() };
        let chat = request("--chat --system short");
        assert_eq!(chat.prompt, Prompt::Chat(vec![message("system", "short"), message("user", "hello")]));
    }

    #[test]
    fn words_that_are_no_numbers_are_refused() {
        assert!(parse_seconds("-1").is_err() && parse_seconds("0").is_err() && parse_seconds("nan").is_err());
        assert!(parse_bias("15").is_err() && parse_bias("x=1").is_err() && parse_bias("1=x").is_err());
        assert_eq!(parse_bias("15=-2.5"), Ok((15, -2.5)));
    }
}
