//! Which requests are refused at the door, before they cost a queue place.
//!
//! What needs the model (does the prompt fit the context window, do the token ids exist) is a worker's to check.

use crate::error::{ErrorCode, WireError};
use crate::limits::{
    CHAT_MESSAGES_MAX, DEADLINE_MS_MAX, LOGIT_BIAS_ABS_MAX, LOGIT_BIAS_MAX, MAX_TOKENS_MAX, PENALTY_ABS_MAX,
    PENALTY_LAST_N_MAX, PROMPT_BYTES_MAX, PROMPT_TOKENS_MAX, REPETITION_PENALTY_MAX, STOP_STRING_BYTES_MAX,
    STOP_STRINGS_MAX, TEMPERATURE_MAX, TOP_LOGPROBS_MAX,
};
use crate::request::{ChatMessage, GenerateRequest, Prompt, Sampling};

const ROLES: [&str; 3] = ["system", "user", "assistant"];

impl GenerateRequest {
    /// Checks every count, length and range that can be checked without the model.
    ///
    /// # Errors
    /// [`ErrorCode::EmptyPrompt`], or [`ErrorCode::InvalidRequest`] that names the first bad parameter.
    pub fn validate(&self) -> Result<(), WireError> {
        self.prompt.validate()?;
        within("max_tokens", u64::from(self.max_tokens), 1, u64::from(MAX_TOKENS_MAX))?;
        self.sampling.validate()?;
        within("stop: number of strings", self.stop.len() as u64, 0, STOP_STRINGS_MAX as u64)?;
        for stop in &self.stop {
            within("stop: bytes of a string", stop.len() as u64, 1, STOP_STRING_BYTES_MAX as u64)?;
        }
        if let Some(logprobs) = self.logprobs {
            within("logprobs", u64::from(logprobs), 0, u64::from(TOP_LOGPROBS_MAX))?;
        }
        if let Some(deadline_ms) = self.deadline_ms {
            within("deadline_ms", deadline_ms, 1, DEADLINE_MS_MAX)?;
        }
        Ok(())
    }
}

impl Prompt {
    fn validate(&self) -> Result<(), WireError> {
        match self {
            Self::Text(text) => {
                not_empty(!text.is_empty())?;
                within("prompt: bytes", text.len() as u64, 1, PROMPT_BYTES_MAX as u64)
            }
            Self::Tokens(ids) => {
                not_empty(!ids.is_empty())?;
                within("prompt: tokens", ids.len() as u64, 1, PROMPT_TOKENS_MAX as u64)
            }
            Self::Chat(messages) => {
                not_empty(messages.iter().any(|message| !message.content.is_empty()))?;
                within("prompt: messages", messages.len() as u64, 1, CHAT_MESSAGES_MAX as u64)?;
                let bytes: usize = messages.iter().map(|message| message.content.len()).sum();
                within("prompt: bytes", bytes as u64, 1, PROMPT_BYTES_MAX as u64)?;
                messages.iter().try_for_each(ChatMessage::validate)
            }
        }
    }
}

impl ChatMessage {
    fn validate(&self) -> Result<(), WireError> {
        if ROLES.contains(&self.role.as_str()) {
            return Ok(());
        }
        let shown: String = self.role.chars().take(32).collect();
        Err(invalid(format!("role `{shown}` of a message"))
            .with_hint("roles are `system`, `user` and `assistant`"))
    }
}

impl Sampling {
    fn validate(&self) -> Result<(), WireError> {
        float_within("temperature", self.temperature, 0.0, TEMPERATURE_MAX)?;
        float_within("top_p", self.top_p, f32::MIN_POSITIVE, 1.0)?;
        float_within("min_p", self.min_p, 0.0, 1.0)?;
        float_within(
            "repetition_penalty",
            self.repetition_penalty,
            f32::MIN_POSITIVE,
            REPETITION_PENALTY_MAX,
        )?;
        float_within("presence_penalty", self.presence_penalty, -PENALTY_ABS_MAX, PENALTY_ABS_MAX)?;
        float_within("frequency_penalty", self.frequency_penalty, -PENALTY_ABS_MAX, PENALTY_ABS_MAX)?;
        within("penalty_last_n", u64::from(self.penalty_last_n), 0, u64::from(PENALTY_LAST_N_MAX))?;
        within("logit_bias: number of tokens", self.logit_bias.len() as u64, 0, LOGIT_BIAS_MAX as u64)?;
        for &(id, bias) in &self.logit_bias {
            float_within("logit_bias", bias, -LOGIT_BIAS_ABS_MAX, LOGIT_BIAS_ABS_MAX)
                .map_err(|error| error.with_hint(format!("it is the bias of token {id}")))?;
        }
        Ok(())
    }
}

fn invalid(what: impl std::fmt::Display) -> WireError {
    WireError::new(ErrorCode::InvalidRequest, format!("invalid request: {what}"))
}

fn not_empty(is_there: bool) -> Result<(), WireError> {
    let error = || {
        WireError::new(ErrorCode::EmptyPrompt, "the prompt is empty")
            .with_hint("give at least one character to continue")
    };
    if is_there { Ok(()) } else { Err(error()) }
}

fn within(name: &str, value: u64, min: u64, max: u64) -> Result<(), WireError> {
    if (min..=max).contains(&value) {
        return Ok(());
    }
    Err(invalid(format_args!("{name} is {value}, it must be from {min} to {max}")))
}

fn float_within(name: &str, value: f32, min: f32, max: f32) -> Result<(), WireError> {
    if (min..=max).contains(&value) {
        return Ok(()); // A NaN is in no range.
    }
    let from = if min == f32::MIN_POSITIVE { "above 0".into() } else { format!("from {min}") };
    Err(invalid(format_args!("{name} is {value}, it must be {from} to {max}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(change: impl FnOnce(&mut GenerateRequest)) -> GenerateRequest {
        let mut request = GenerateRequest::new(Prompt::Text("hello".into()));
        change(&mut request);
        request
    }

    #[track_caller]
    fn refused(change: impl FnOnce(&mut GenerateRequest), expected: &str) {
        let error = with(change).validate().unwrap_err();
        assert!(error.message.contains(expected), "`{}` does not say `{expected}`", error.message);
    }

    #[test]
    fn limits_hold_at_the_limit_and_one_beyond() {
        assert_eq!(with(|_| ()).validate(), Ok(()));
        assert_eq!(with(|r| r.max_tokens = MAX_TOKENS_MAX).validate(), Ok(()));
        refused(|r| r.max_tokens = MAX_TOKENS_MAX + 1, "max_tokens is 131073");
        refused(|r| r.max_tokens = 0, "max_tokens is 0");
        assert_eq!(
            with(|r| r.stop = vec!["x".repeat(STOP_STRING_BYTES_MAX); STOP_STRINGS_MAX]).validate(),
            Ok(())
        );
        refused(|r| r.stop = vec!["x".into(); STOP_STRINGS_MAX + 1], "stop: number of strings is 17");
        refused(|r| r.stop = vec!["x".repeat(STOP_STRING_BYTES_MAX + 1)], "stop: bytes of a string is 257");
        refused(|r| r.stop = vec![String::new()], "stop: bytes of a string is 0");
        assert_eq!(with(|r| r.logprobs = Some(TOP_LOGPROBS_MAX)).validate(), Ok(()));
        refused(|r| r.logprobs = Some(TOP_LOGPROBS_MAX + 1), "logprobs is 21");
        refused(|r| r.deadline_ms = Some(0), "deadline_ms is 0");
        assert_eq!(with(|r| r.prompt = Prompt::Text("x".repeat(PROMPT_BYTES_MAX))).validate(), Ok(()));
        refused(|r| r.prompt = Prompt::Text("x".repeat(PROMPT_BYTES_MAX + 1)), "prompt: bytes is 1048577");
        refused(|r| r.prompt = Prompt::Tokens(vec![1; PROMPT_TOKENS_MAX + 1]), "prompt: tokens is 131073");
        refused(|r| r.sampling.logit_bias = vec![(1, 0.0); LOGIT_BIAS_MAX + 1], "logit_bias: number");
    }

    #[test]
    fn floats_are_in_range_and_never_nan() {
        refused(|r| r.sampling.temperature = f32::NAN, "temperature is NaN");
        refused(|r| r.sampling.temperature = -0.1, "temperature is -0.1, it must be from 0 to 100");
        refused(|r| r.sampling.top_p = 0.0, "top_p is 0, it must be above 0 to 1");
        refused(|r| r.sampling.min_p = 1.5, "min_p is 1.5");
        refused(|r| r.sampling.repetition_penalty = 0.0, "repetition_penalty is 0");
        refused(|r| r.sampling.presence_penalty = f32::INFINITY, "presence_penalty is inf");
        refused(|r| r.sampling.logit_bias = vec![(7, f32::NEG_INFINITY)], "logit_bias is -inf");
    }

    #[test]
    fn empty_prompts_have_their_own_code() {
        let message = |role: &str, content: &str| ChatMessage { role: role.into(), content: content.into() };
        let empty = [
            Prompt::Text(String::new()),
            Prompt::Tokens(vec![]),
            Prompt::Chat(vec![]),
            Prompt::Chat(vec![message("user", "")]),
        ];
        for prompt in empty {
            assert_eq!(with(|r| r.prompt = prompt).validate().unwrap_err().code, ErrorCode::EmptyPrompt);
        }
        assert_eq!(with(|r| r.prompt = Prompt::Chat(vec![message("user", "hi")])).validate(), Ok(()));
        refused(|r| r.prompt = Prompt::Chat(vec![message("tool", "hi")]), "role `tool`");
    }
}
