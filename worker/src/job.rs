//! Between the wire's words and the engine's: requests in, events and errors out.

use bitnetd_engine::chat::{ChatError, ChatTemplate, Message};
use bitnetd_engine::sampler::SamplingParams;
use bitnetd_engine::sequence::{FinishReason, SequenceRequest, Summary};
use bitnetd_engine::tokenizer::{Special, Tokenizer};
use bitnetd_engine::{EngineEvent, SubmitError};
use bitnetd_proto::error::{ErrorCode, WireError};
use bitnetd_proto::event::{self, Done, Timings, Token, TokenLogprobs, Usage};
use bitnetd_proto::request::{GenerateRequest, Prompt, Sampling};
use bitnetd_proto::worker_link::FromWorker;

/// Tokenises the prompt and translates the parameters.
pub(crate) fn to_sequence(
    request: GenerateRequest,
    resume: Vec<u32>,
    tokenizer: &Tokenizer,
    template: &Result<Option<ChatTemplate>, ChatError>,
) -> Result<SequenceRequest, WireError> {
    let prompt = match request.prompt {
        Prompt::Tokens(tokens) => tokens,
        Prompt::Text(text) => encode_text(tokenizer, &text)?,
        Prompt::Chat(messages) => encode_chat(tokenizer, template, messages)?,
    };
    Ok(SequenceRequest {
        prompt,
        resume,
        max_tokens: request.max_tokens as usize,
        sampling: to_params(request.sampling),
        stop: request.stop,
        n_logprobs: request.logprobs,
        ignore_eos: request.ignore_eos,
    })
}

fn encode_text(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>, WireError> {
    if text.is_empty() {
        return Err(WireError::new(ErrorCode::EmptyPrompt, "the prompt is empty")
            .with_hint("give at least one character to continue"));
    }
    tokenizer.encode(text, Special::AsText, tokenizer.adds_bos()).map_err(|error| {
        WireError::new(ErrorCode::InvalidRequest, format!("cannot tokenise the prompt: {error}"))
    })
}

fn encode_chat(
    tokenizer: &Tokenizer,
    template: &Result<Option<ChatTemplate>, ChatError>,
    messages: Vec<bitnetd_proto::request::ChatMessage>,
) -> Result<Vec<u32>, WireError> {
    let cannot_chat = |why: String| {
        WireError::new(ErrorCode::InvalidRequest, format!("this model cannot chat: {why}"))
            .with_hint("send the prompt as plain text")
    };
    let template = match template {
        Ok(Some(template)) => template,
        Ok(None) => return Err(cannot_chat("its file has no chat template".into())),
        Err(error) => return Err(cannot_chat(error.to_string())),
    };
    let messages: Vec<Message> = messages
        .into_iter()
        .map(|message| Message { role: message.role, content: message.content })
        .collect();
    template.encode_chat(tokenizer, &messages).map_err(|error| {
        WireError::new(ErrorCode::InvalidRequest, format!("cannot render the chat: {error}"))
    })
}

fn to_params(sampling: Sampling) -> SamplingParams {
    SamplingParams {
        temperature: sampling.temperature,
        top_k: sampling.top_k,
        top_p: sampling.top_p,
        min_p: sampling.min_p,
        repetition_penalty: sampling.repetition_penalty,
        penalty_last_n: sampling.penalty_last_n,
        presence_penalty: sampling.presence_penalty,
        frequency_penalty: sampling.frequency_penalty,
        logit_bias: sampling.logit_bias,
        // The supervisor fills the seed in when it accepts a job.
        seed: sampling.seed.unwrap_or(0),
    }
}

/// What the engine refuses, in words for the client.
pub(crate) fn to_error(error: &SubmitError) -> WireError {
    let message = error.to_string();
    match error {
        SubmitError::EmptyPrompt => WireError::new(ErrorCode::EmptyPrompt, message)
            .with_hint("give at least one character to continue"),
        SubmitError::ContextExceeded { .. } => WireError::new(ErrorCode::ContextExceeded, message)
            .with_hint("shorten the prompt, or use a model or `engine.ctx` with a longer context"),
        SubmitError::UnknownToken { .. } | SubmitError::Sampling(_) => {
            WireError::new(ErrorCode::InvalidRequest, message)
        }
        SubmitError::DuplicateId(_) => WireError::new(ErrorCode::Internal, message),
    }
}

/// What a step made, as a message.
pub(crate) fn to_message(event: EngineEvent, text: &str, tokenizer: &Tokenizer) -> FromWorker {
    match event {
        EngineEvent::Token { id, index, token, logprobs } => {
            let text_of = |id| String::from_utf8_lossy(tokenizer.token_bytes(id)).into_owned();
            let logprobs = logprobs.map(|logprobs| TokenLogprobs {
                logprob: logprobs.logprob,
                top: logprobs.top.into_iter().map(|(id, logprob)| (id, logprob, text_of(id))).collect(),
            });
            FromWorker::Token {
                job: id,
                token: Token { index: count(index), id: token, text: text.to_owned(), logprobs },
            }
        }
        EngineEvent::Finished { id, summary } => FromWorker::Done { job: id, done: to_done(summary) },
    }
}

fn to_done(summary: Summary) -> Done {
    Done {
        finish_reason: match summary.reason {
            FinishReason::Stop => event::FinishReason::Stop,
            FinishReason::Length => event::FinishReason::Length,
        },
        tail: summary.tail,
        usage: Usage {
            prompt_tokens: count(summary.n_prompt),
            cached_tokens: count(summary.n_cached),
            completion_tokens: count(summary.n_generated),
        },
        timings: Timings {
            prefill_s: summary.prefill.as_secs_f64(),
            decode_s: summary.decode.as_secs_f64(),
            ..Timings::default()
        },
        model: None,
    }
}

/// Counts of tokens fit: a context window does.
fn count(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}
