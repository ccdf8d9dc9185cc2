//! The prompts of a batch: one a line as text, or one JSON object a line that may change single parameters.

use std::io::{BufRead as _, BufReader, Read};
use std::path::Path;

use bitnetd_proto::exit_code::ExitCode;
use bitnetd_proto::limits::REQUEST_FRAME_BYTES_MAX;
use bitnetd_proto::request::{ChatMessage, GenerateRequest, Prompt};
use serde_json::{Map, Value};

use crate::error::CliError;
use crate::request_args::GenerationArgs;

/// How the lines of a file are to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Format {
    /// Each line that is not empty is a prompt
    Txt,
    /// Each line is an object with `prompt` or `messages`, and parameters that are to differ
    Jsonl,
}

impl Format {
    /// By the file's name; a pipe is text.
    pub(crate) fn of(path: &Path) -> Self {
        let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
        match extension.to_ascii_lowercase().as_str() {
            "jsonl" | "ndjson" => Self::Jsonl,
            _ => Self::Txt,
        }
    }
}

/// One thing to do.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Item {
    /// Number of the prompt, from 0.
    pub index: usize,
    /// The prompt as results show it: the text, or what the last message says.
    pub prompt: String,
    /// What is asked.
    pub request: GenerateRequest,
}

impl Item {
    /// A short name of everything that was asked; results carry it, so that a resumed batch mixes nothing.
    pub(crate) fn fingerprint(&self) -> Result<String, CliError> {
        let json = serde_json::to_vec(&self.request)
            .map_err(|error| CliError::with_code(ExitCode::Software, error))?;
        // FNV-1a: stable everywhere, and nobody gains by making two requests collide.
        let hash = json.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
        });
        Ok(format!("{hash:016x}"))
    }
}

/// Reads all prompts of a file; `-` is stdin. Without a format it follows the name.
pub(crate) fn read_file(
    path: &Path,
    format: Option<Format>,
    usual: &GenerationArgs,
) -> Result<Vec<Item>, CliError> {
    let format = format.unwrap_or_else(|| Format::of(path));
    if path == Path::new("-") {
        return read(std::io::stdin().lock(), "stdin", format, usual);
    }
    let file =
        std::fs::File::open(path).map_err(|source| CliError::file("read the prompts from", path, source))?;
    read(file, &path.display().to_string(), format, usual)
}

/// Reads all prompts. Every problem names its line.
pub(crate) fn read(
    source: impl Read,
    name: &str,
    format: Format,
    usual: &GenerationArgs,
) -> Result<Vec<Item>, CliError> {
    let mut reader = BufReader::new(source);
    let mut items = Vec::new();
    let mut line = Vec::new();
    for number in 1.. {
        line.clear();
        let at_line = |error: CliError| error.within(format!("`{name}`, line {number}"));
        let n_bytes = (&mut reader)
            .take(REQUEST_FRAME_BYTES_MAX as u64 + 1)
            .read_until(b'\n', &mut line)
            .map_err(|source| CliError::file("read", Path::new(name), source))?;
        if n_bytes == 0 {
            break;
        }
        if n_bytes > REQUEST_FRAME_BYTES_MAX {
            let message = format!("longer than {REQUEST_FRAME_BYTES_MAX} bytes");
            return Err(at_line(CliError::new(ExitCode::Data, message)));
        }
        let text =
            str::from_utf8(&line).map_err(|error| at_line(CliError::with_code(ExitCode::Data, error)))?;
        let text = text.strip_suffix('\n').unwrap_or(text);
        let text = text.strip_suffix('\r').unwrap_or(text);
        if text.trim().is_empty() {
            continue;
        }
        let request = match format {
            Format::Txt => usual.unchecked_request(text.to_owned()),
            Format::Jsonl => parse_line(text, usual).map_err(at_line)?,
        };
        request.validate().map_err(|error| at_line(CliError::from(error).with_exit_code(ExitCode::Data)))?;
        items.push(Item { index: items.len(), prompt: shown(&request.prompt), request });
    }
    if items.is_empty() {
        return Err(CliError::new(ExitCode::Data, format!("there is no prompt in `{name}`")));
    }
    Ok(items)
}

/// A prompt as results show it.
pub(crate) fn shown(prompt: &Prompt) -> String {
    match prompt {
        Prompt::Text(text) => text.clone(),
        Prompt::Chat(messages) => messages.last().map(|message| message.content.clone()).unwrap_or_default(),
        Prompt::Tokens(ids) => format!("{ids:?}"),
    }
}

/// What is wrong with the JSON of one line; the place is a column, since the line is named around it.
fn broken(error: serde_json::Error) -> CliError {
    let text = error.to_string();
    let what = text.split(" at line ").next().unwrap_or_default();
    match error.column() {
        0 => CliError::new(ExitCode::Data, what),
        column => CliError::new(ExitCode::Data, format!("column {column}: {what}")),
    }
}

/// An object's `prompt` or `messages`; its other keys replace fields of the usual request.
fn parse_line(text: &str, usual: &GenerationArgs) -> Result<GenerateRequest, CliError> {
    let mut given: Map<String, Value> = serde_json::from_str(text).map_err(broken).map_err(|error| {
        error.hint("each line is one object, such as {\"prompt\": \"Once\", \"seed\": 7}")
    })?;
    let mut request = match (given.remove("prompt"), given.remove("messages")) {
        (Some(Value::String(prompt)), None) => usual.unchecked_request(prompt),
        (None, Some(messages)) => {
            let messages: Vec<ChatMessage> = serde_json::from_value(messages).map_err(broken)?;
            GenerateRequest { prompt: Prompt::Chat(messages), ..usual.unchecked_request(String::new()) }
        }
        (Some(_), None) => return Err(CliError::new(ExitCode::Data, "`prompt` is not a text")),
        _ => return Err(CliError::new(ExitCode::Data, "expected either `prompt` or `messages`")),
    };
    let prompt = std::mem::replace(&mut request.prompt, Prompt::Text(String::new()));
    let mut fields = serde_json::to_value(&request).map_err(broken)?;
    for (key, value) in given {
        // Fields that are left out when they are empty or unset are not seen in `fields`: name them.
        let target = match key.as_str() {
            "max_tokens" | "stop" | "logprobs" | "ignore_eos" | "priority" | "deadline_ms" => &mut fields,
            "temperature" | "top_k" | "top_p" | "min_p" | "repetition_penalty" | "penalty_last_n"
            | "presence_penalty" | "frequency_penalty" | "logit_bias" | "seed" => &mut fields["sampling"],
            _ => {
                return Err(CliError::new(ExitCode::Data, format!("unknown key `{key}`")).hint(KEYS_HINT));
            }
        };
        target[&key] = value;
    }
    let request: GenerateRequest = serde_json::from_value(fields).map_err(broken)?;
    Ok(GenerateRequest { prompt, ..request })
}

const KEYS_HINT: &str = "keys are prompt, messages, max_tokens, stop, logprobs, ignore_eos, priority, deadline_ms, \
temperature, top_k, top_p, min_p, repetition_penalty, penalty_last_n, presence_penalty, frequency_penalty, \
logit_bias, seed";

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        generation: GenerationArgs,
    }

    fn usual() -> GenerationArgs {
        Line::parse_from(["x", "-n", "9", "--top-k", "5", "-s", "1"]).generation
    }

    fn items(text: &str, format: Format) -> Result<Vec<Item>, CliError> {
        read(text.as_bytes(), "p", format, &usual())
    }

    fn complaint(text: &str, format: Format) -> String {
        items(text, format).unwrap_err().to_string()
    }

    #[test]
    fn text_lines_are_prompts_and_empty_ones_are_not() {
        let items = items("one\r\n\n  two \n\t\nthree", Format::Txt).unwrap();
        let prompts: Vec<&str> = items.iter().map(|item| item.prompt.as_str()).collect();
        assert_eq!(prompts, ["one", "  two ", "three"]);
        assert_eq!(items.iter().map(|item| item.index).collect::<Vec<_>>(), [0, 1, 2]);
        assert_eq!(items[1].request, usual().unchecked_request("  two ".into()));
    }

    #[test]
    fn an_object_changes_only_what_it_names() {
        let text = r#"{"prompt": "a", "max_tokens": 3, "seed": 2, "stop": ["."], "logit_bias": [[4, -1.5]]}"#;
        let items = items(text, Format::Jsonl).unwrap();
        let mut expected = usual().unchecked_request("a".into());
        (expected.max_tokens, expected.stop, expected.sampling.seed) = (3, vec![".".into()], Some(2));
        expected.sampling.logit_bias = vec![(4, -1.5)];
        assert_eq!(items[0].request, expected);
    }

    #[test]
    fn messages_are_a_conversation() {
        let text = r#"{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]}"#;
        let items = items(text, Format::Jsonl).unwrap();
        assert_eq!(items[0].prompt, "u");
        assert!(matches!(&items[0].request.prompt, Prompt::Chat(messages) if messages.len() == 2));
    }

    #[test]
    fn complaints_name_the_line() {
        let bad = [
            "{\"prompt\": \"a\"}\n{\"prompt\"",
            "\n{\"prompt\": \"a\", \"temprature\": 1}",
            "{\"prompt\": 3}",
            "{\"prompt\": \"a\", \"messages\": []}",
            "{\"prompt\": \"a\", \"top_p\": 7}",
            "{\"prompt\": \"a\", \"max_tokens\": \"x\"}",
            "\n\n",
        ];
        let shown: Vec<String> = bad.iter().map(|text| complaint(text, Format::Jsonl)).collect();
        insta::assert_snapshot!(shown.join("\n"), @r#"
        error: `p`, line 2: column 9: EOF while parsing an object
        hint: each line is one object, such as {"prompt": "Once", "seed": 7}
        error: `p`, line 2: unknown key `temprature`
        hint: keys are prompt, messages, max_tokens, stop, logprobs, ignore_eos, priority, deadline_ms, temperature, top_k, top_p, min_p, repetition_penalty, penalty_last_n, presence_penalty, frequency_penalty, logit_bias, seed
        error: `p`, line 1: `prompt` is not a text
        error: `p`, line 1: expected either `prompt` or `messages`
        error: `p`, line 1: invalid request: top_p is 7, it must be above 0 to 1
        error: `p`, line 1: invalid type: string "x", expected u32
        error: there is no prompt in `p`
        "#);
        let long = "x".repeat(REQUEST_FRAME_BYTES_MAX + 1);
        assert_eq!(complaint(&long, Format::Txt), "error: `p`, line 1: longer than 2097152 bytes");
    }

    #[test]
    fn the_fingerprint_is_of_everything_asked() {
        let items =
            items("{\"prompt\":\"a\"}\n{\"prompt\":\"a\"}\n{\"prompt\":\"a\",\"seed\":3}", Format::Jsonl)
                .unwrap();
        let prints: Vec<String> = items.iter().map(|item| item.fingerprint().unwrap()).collect();
        assert_eq!(prints[0], prints[1]);
        assert_ne!(prints[0], prints[2]);
    }

    #[test]
    fn the_format_follows_the_name() {
        assert_eq!(Format::of(Path::new("a.JSONL")), Format::Jsonl);
        assert_eq!(Format::of(Path::new("-")), Format::Txt);
    }
}
