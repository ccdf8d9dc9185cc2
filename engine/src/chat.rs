//! Conversations as prompts: the model's own chat template, and who may write control tokens.
//!
//! Control tokens come from the template, never from a message: before rendering, an unused character is put
//! inside of everything in a message that could be part of one, and taken out again after the special tokens
//! have been found. A template sees these marks as ordinary characters.
//!
//! Rendering is bounded ([`FUEL`], [`RECURSION_MAX`], [`PROMPT_BYTES_MAX`]) and pure: a template sees the messages,
//! `bos_token`, `eos_token` and `add_generation_prompt`, no clock and no files.

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, ErrorKind, Value, context};

use crate::gguf::{Gguf, GgufError};
use crate::tokenizer::{Tokenizer, TokenizerError};

/// Instructions of the template machine that one rendering may take.
pub const FUEL: u64 = 2_000_000;
/// How deep macros and includes may nest.
pub const RECURSION_MAX: usize = 32;
/// Longest template, in bytes.
pub const TEMPLATE_BYTES_MAX: usize = 256 << 10;
/// Longest rendered prompt, in bytes.
pub const PROMPT_BYTES_MAX: usize = 16 << 20;
/// Roles that a message may have. A template may write a role into a control token, so there are no others.
pub const ROLES: [&str; 4] = ["system", "user", "assistant", "tool"];

/// What BitNet b1.58 2B-4T was tuned with. Its published GGUF files carry an older one.
const BITNET_2B_4T: &str = "{{ bos_token }}{% for message in messages %}\
    {{ message.role | capitalize }}: {{ message.content | trim }}<|eot_id|>{% endfor %}\
    {% if add_generation_prompt %}Assistant: {% endif %}";

/// Why there is no template, or no prompt.
#[derive(Debug, thiserror::Error)]
pub enum ChatError {
    /// The key is not a string.
    #[error("the chat template cannot be read")]
    Metadata(#[from] GgufError),
    /// Larger than any real one.
    #[error("the chat template has {len} bytes, more than {TEMPLATE_BYTES_MAX}")]
    TemplateTooLong {
        /// Its length.
        len: usize,
    },
    /// Not the language of templates.
    #[error("the chat template is not valid: {detail}")]
    BadTemplate {
        /// What the parser says.
        detail: String,
    },
    /// Nothing to answer.
    #[error("a conversation needs at least one message")]
    NoMessages,
    /// The template does not say what it is.
    #[error("message {idx} has the unknown role `{role}`; roles are system, user, assistant and tool")]
    UnknownRole {
        /// The message.
        idx: usize,
        /// Its role, or the start of it.
        role: String,
    },
    /// The template raised an exception of its own: the conversation is not one the model knows.
    #[error("the model's chat template refuses this conversation: {message}")]
    Refused {
        /// What the template says.
        message: String,
    },
    /// The template went wrong.
    #[error("the model's chat template failed: {detail}")]
    Failed {
        /// What the template machine says.
        detail: String,
    },
    /// The template works without end.
    #[error("the model's chat template takes too many steps for this conversation")]
    OutOfFuel,
    /// The template writes without end, or the messages are too long.
    #[error("the prompt has {len} bytes, more than {PROMPT_BYTES_MAX}")]
    PromptTooLong {
        /// Its length, or that of the messages alone.
        len: usize,
    },
    /// The prompt cannot be tokenised.
    #[error("the rendered conversation cannot be tokenised")]
    Tokenizer(#[from] TokenizerError),
}

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// One of [`ROLES`].
    pub role: String,
    /// What was said. Special tokens in it are text.
    pub content: String,
}

impl Message {
    /// A message.
    #[must_use]
    pub fn new(role: &str, content: &str) -> Self {
        Self { role: role.to_owned(), content: content.to_owned() }
    }
}

/// How a model wants conversations to be written.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
}

/// Name of the only template in its environment. No ending, so nothing is escaped as HTML.
const NAME: &str = "chat";
/// Marks the text of an exception that the template raised.
const RAISED: &str = "raised: ";

impl ChatTemplate {
    /// The template of a model file; `None` if it has none.
    ///
    /// # Errors
    /// It has one that cannot be used.
    pub fn from_gguf(gguf: &Gguf) -> Result<Option<Self>, ChatError> {
        let metadata = gguf.metadata();
        let architecture = metadata.str("general.architecture")?.unwrap_or_default();
        let Some(source) = metadata.str("tokenizer.chat_template")? else { return Ok(None) };
        Self::new(corrected(architecture, source)).map(Some)
    }

    /// A template in the language of Jinja, as Hugging Face's chat templates are.
    ///
    /// # Errors
    /// It is too long or not valid.
    pub fn new(source: &str) -> Result<Self, ChatError> {
        if source.len() > TEMPLATE_BYTES_MAX {
            return Err(ChatError::TemplateTooLong { len: source.len() });
        }
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|error| ChatError::BadTemplate { detail: error.to_string() })?);
        environment.set_recursion_limit(RECURSION_MAX);
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", raise_exception);
        environment
            .add_template_owned(NAME, source.to_owned())
            .map_err(|error| ChatError::BadTemplate { detail: error.to_string() })?;
        Ok(Self { environment, source: source.to_owned() })
    }

    /// The template's text.
    #[must_use]
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The prompt as text, up to where the assistant's answer begins. For people to look at: the tokens are not
    /// those of this text wherever a message has a special token in it.
    ///
    /// # Errors
    /// The template refuses the conversation, or fails.
    pub fn render(&self, tokenizer: &Tokenizer, messages: &[Message]) -> Result<String, ChatError> {
        self.render_with(tokenizer, messages, str::to_owned)
    }

    /// The prompt as tokens, begin-of-text included if the model wants it.
    ///
    /// # Errors
    /// As [`Self::render`].
    pub fn encode_chat(&self, tokenizer: &Tokenizer, messages: &[Message]) -> Result<Vec<u32>, ChatError> {
        let mark = unused_char(&self.source, messages);
        let edges = Edges::of(tokenizer);
        let prompt = self.render_with(tokenizer, messages, |content| edges.mark(content, mark))?;
        let ids = tokenizer.encode_marked(&prompt, mark)?;
        let starts_with_bos = tokenizer.bos().is_some() && ids.first().copied() == tokenizer.bos();
        if !tokenizer.adds_bos() || starts_with_bos {
            return Ok(ids);
        }
        Ok(tokenizer.bos().into_iter().chain(ids).collect())
    }

    fn render_with(
        &self,
        tokenizer: &Tokenizer,
        messages: &[Message],
        prepare: impl Fn(&str) -> String,
    ) -> Result<String, ChatError> {
        check(messages)?;
        let messages: Vec<Value> = messages
            .iter()
            .map(|message| context! { role => message.role.as_str(), content => prepare(&message.content) })
            .collect();
        let text_of = |id: Option<u32>| {
            id.map_or_else(String::new, |id| String::from_utf8_lossy(tokenizer.token_bytes(id)).into_owned())
        };
        let context = context! {
            messages => messages,
            bos_token => text_of(tokenizer.bos()),
            eos_token => text_of(tokenizer.eos()),
            add_generation_prompt => true,
        };
        let template = self.environment.get_template(NAME).map_err(failed)?;
        let mut prompt = BoundedText::default();
        let result = template.render_captured_to(context, &mut prompt);
        if prompt.overflowed {
            return Err(ChatError::PromptTooLong { len: prompt.bytes.len() });
        }
        result.map_err(failed)?;
        Ok(String::from_utf8_lossy(&prompt.bytes).into_owned())
    }
}

/// The template to use for a file's own: the one of 2B-4T where the file has the outdated one.
fn corrected<'a>(architecture: &str, source: &'a str) -> &'a str {
    let is_outdated = source.contains("BITNETAssistant");
    if architecture.starts_with("bitnet") && is_outdated { BITNET_2B_4T } else { source }
}

fn check(messages: &[Message]) -> Result<(), ChatError> {
    if messages.is_empty() {
        return Err(ChatError::NoMessages);
    }
    if let Some(idx) = messages.iter().position(|message| !ROLES.contains(&message.role.as_str())) {
        let role = messages[idx].role.chars().take(32).collect();
        return Err(ChatError::UnknownRole { idx, role });
    }
    let len = messages.iter().map(|message| message.content.len()).sum();
    if len > PROMPT_BYTES_MAX { Err(ChatError::PromptTooLong { len }) } else { Ok(()) }
}

fn raise_exception(message: String) -> Result<Value, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, format!("{RAISED}{message}")))
}

fn failed(error: minijinja::Error) -> ChatError {
    if error.kind() == ErrorKind::OutOfFuel {
        return ChatError::OutOfFuel;
    }
    match error.detail().and_then(|detail| detail.strip_prefix(RAISED)) {
        Some(message) => ChatError::Refused { message: message.to_owned() },
        None => ChatError::Failed { detail: error.to_string() },
    }
}

/// The first and last characters of special tokens.
struct Edges {
    first: Vec<char>,
    last: Vec<char>,
}

impl Edges {
    fn of(tokenizer: &Tokenizer) -> Self {
        let (mut first, mut last) = (Vec::new(), Vec::new());
        for text in tokenizer.control_texts() {
            first.extend(text.chars().next());
            last.extend(text.chars().next_back());
        }
        for edge in [&mut first, &mut last] {
            edge.sort_unstable();
            edge.dedup();
        }
        Self { first, last }
    }

    /// Puts `mark` after each character that can start a special token and before each that can end one, so that
    /// no part of `content` is the start, the end or the whole of one.
    fn mark(&self, content: &str, mark: char) -> String {
        let mut marked = String::with_capacity(content.len());
        for c in content.chars() {
            if self.last.binary_search(&c).is_ok() {
                marked.push(mark);
            }
            marked.push(c);
            if self.first.binary_search(&c).is_ok() {
                marked.push(mark);
            }
        }
        marked
    }
}

/// A noncharacter of Unicode that neither the template nor a message has. Someone who writes all 32 of them finds the
/// first taken out.
fn unused_char(template: &str, messages: &[Message]) -> char {
    let mut used = 0_u32;
    for text in messages.iter().map(|message| message.content.as_str()).chain([template]) {
        let noncharacters = text.chars().filter(|c| ('\u{fdd0}'..='\u{fdef}').contains(c));
        used |= noncharacters.fold(0, |bits, c| bits | 1 << (u32::from(c) - 0xfdd0));
    }
    char::from_u32(0xfdd0 + used.trailing_ones() % 32).unwrap_or('\u{fdd0}')
}

/// Text that takes no more than [`PROMPT_BYTES_MAX`] bytes.
#[derive(Default)]
struct BoundedText {
    bytes: Vec<u8>,
    overflowed: bool,
}

impl std::io::Write for BoundedText {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.bytes.len() + bytes.len() > PROMPT_BYTES_MAX {
            self.overflowed = true;
            return Err(std::io::ErrorKind::FileTooLarge.into());
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests;
