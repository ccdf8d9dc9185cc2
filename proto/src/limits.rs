//! Every limit of the wire protocol, in one place.
//!
//! A peer that goes beyond one is answered with a typed error; nothing is cut off silently.

/// Length of a frame's payload on any link, at most.
pub const FRAME_BYTES_MAX: usize = 4 << 20;
/// Length of a frame's payload from a client, at most.
///
/// It is half of [`FRAME_BYTES_MAX`], so that any request that came in still fits the frame to a worker together
/// with [`MAX_TOKENS_MAX`] tokens to resume after.
pub const REQUEST_FRAME_BYTES_MAX: usize = 2 << 20;
/// Bytes in front of a payload: its length as a little-endian `u32`.
pub const FRAME_HEADER_BYTES: usize = 4;

/// Length of a peer's name in its first message, at most.
pub const PEER_NAME_BYTES_MAX: usize = 128;

/// Length of a prompt as text (a conversation: of all its contents together), at most.
pub const PROMPT_BYTES_MAX: usize = 1 << 20;
/// Tokens of a prompt that is given as ids, at most.
pub const PROMPT_TOKENS_MAX: usize = 131_072;
/// Turns of a conversation, at most.
pub const CHAT_MESSAGES_MAX: usize = 1024;
/// Tokens to generate, at most (the context window is usually much smaller).
pub const MAX_TOKENS_MAX: u32 = 131_072;
/// Stop strings of one request, at most.
pub const STOP_STRINGS_MAX: usize = 16;
/// Length of one stop string, at most.
pub const STOP_STRING_BYTES_MAX: usize = 256;
/// Likeliest tokens reported at each position, at most.
pub const TOP_LOGPROBS_MAX: u8 = 20;
/// Biased tokens of one request, at most.
pub const LOGIT_BIAS_MAX: usize = 1024;
/// Size of one bias, at most.
pub const LOGIT_BIAS_ABS_MAX: f32 = 1000.0;
/// Temperature, at most.
pub const TEMPERATURE_MAX: f32 = 100.0;
/// Repetition penalty, at most (it is above 0).
pub const REPETITION_PENALTY_MAX: f32 = 100.0;
/// Size of the presence and frequency penalties, at most.
pub const PENALTY_ABS_MAX: f32 = 100.0;
/// Tokens the penalties look back on, at most.
pub const PENALTY_LAST_N_MAX: u32 = 2 * MAX_TOKENS_MAX;
/// Length of the key of a durable job, at most.
pub const JOB_KEY_BYTES_MAX: usize = 128;
/// Tokens of a durable job's answer, at most.
pub const DURABLE_TOKENS_MAX: u32 = 32_768;
/// Log-probabilities of a durable job's answer, at most: (likeliest ones + 1) for each token.
pub const DURABLE_LOGPROBS_MAX: u64 = 16_384;
/// Length of a durable job's answer as JSON, at most; with its request it fits a frame.
pub const JOB_ANSWER_BYTES_MAX: usize = FRAME_BYTES_MAX - REQUEST_FRAME_BYTES_MAX - (64 << 10);
/// Jobs in one answer to `jobs`, at most.
pub const JOBS_LISTED_MAX: u32 = 1000;
/// Durable questions of one connection that wait for their answer, at most.
pub const PENDING_QUESTIONS_MAX: usize = 256;
/// Deadline of a job, at most: seven days.
pub const DEADLINE_MS_MAX: u64 = 7 * 24 * 3600 * 1000;
