//! Which pre-tokenizer of byte-level BPE a `tokenizer.json` means.

use serde_json::Value as Json;

use super::TokenizerFileError;

/// How Llama 3 cuts text into words.
const LLAMA_3_PATTERN: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The name of the pre-tokenizer, by the pattern it splits with.
pub(super) fn pre_tokenizer(json: Option<&Json>) -> Result<&'static str, TokenizerFileError> {
    let steps = match json {
        Some(Json::Object(step)) if step.contains_key("pretokenizers") => {
            step["pretokenizers"].as_array().cloned().unwrap_or_default()
        }
        Some(step) => vec![step.clone()],
        None => Vec::new(),
    };
    let kind_of = |step: &Json| step["type"].as_str().unwrap_or("").to_owned();
    let patterns: Vec<&str> = steps.iter().filter_map(|step| step["pattern"]["Regex"].as_str()).collect();
    let has_byte_level = steps.iter().any(|step| kind_of(step) == "ByteLevel");
    let has_gpt2_split = steps.iter().any(|step| kind_of(step) == "ByteLevel" && step["use_regex"] != false);
    match patterns[..] {
        [LLAMA_3_PATTERN] if has_byte_level && !has_gpt2_split && steps.len() == 2 => Ok("llama-bpe"),
        [] if has_gpt2_split && steps.len() == 1 => Ok("gpt-2"),
        _ => {
            let pattern =
                if patterns.is_empty() { "nothing known".to_owned() } else { patterns.join("` and `") };
            Err(TokenizerFileError::PreTokenizer { pattern })
        }
    }
}
