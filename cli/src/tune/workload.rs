//! What is measured: four kinds of work, as people have them.

use bitnetd_proto::request::{GenerateRequest, Prompt};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// A kind of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Workload {
    /// One large prompt and its answer, alone
    Large,
    /// Several prompts of medium length at once
    Medium,
    /// Many small prompts at once
    Small,
    /// A real-time server: clients that each ask again as soon as they are answered
    Server,
}

/// Workload in numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Load {
    /// Jobs in all.
    pub(crate) n_jobs: usize,
    /// Jobs under way at a time.
    pub(crate) n_together: usize,
    /// Tokens of each prompt.
    pub(crate) n_prompt: u32,
    /// Tokens generated for each.
    pub(crate) n_generated: u32,
}

/// Where the random token ids begin: below are bytes and, in some vocabularies, control tokens.
const TOKEN_MIN: u32 = 256;

impl Workload {
    /// Its name in tables and on the command line.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Large => "large",
            Self::Medium => "medium",
            Self::Small => "small",
            Self::Server => "server",
        }
    }

    /// In numbers, for so many CPUs and this context window. `is_quick` halves lengths and counts.
    pub(crate) fn load(self, n_cpus: usize, n_ctx: u32, is_quick: bool) -> Load {
        let (n_jobs, n_together, n_prompt, n_generated) = match self {
            Self::Large => (1, 1, 512, 64),
            Self::Medium => (n_cpus.clamp(8, 64), usize::MAX, 128, 32),
            Self::Small => ((4 * n_cpus).clamp(32, 256), usize::MAX, 16, 16),
            Self::Server => (2 * n_cpus.clamp(8, 64), n_cpus.clamp(8, 64), 64, 32),
        };
        let divisor: u32 = if is_quick { 2 } else { 1 };
        let n_jobs = (n_jobs / divisor as usize).max(1);
        // Prompt and answer have to fit, with room for a beginning-of-text token.
        let room = n_ctx.saturating_sub(1).max(2);
        let n_generated = (n_generated / divisor).min(room / 2);
        let n_prompt = (n_prompt / divisor).min(room - n_generated);
        Load { n_jobs, n_together: n_together.min(n_jobs), n_prompt, n_generated }
    }
}

impl Load {
    /// The same jobs, but only their prompts: one token each, since none is not a job.
    pub(crate) fn prefill(self) -> Self {
        Self { n_generated: 1, ..self }
    }

    /// The same jobs with next to no prompt.
    pub(crate) fn decode(self) -> Self {
        Self { n_prompt: 2, ..self }
    }

    /// `8 x (128 + 32)`
    pub(crate) fn words(self) -> String {
        format!("{} x ({} prompt + {} generated)", self.n_jobs, self.n_prompt, self.n_generated)
    }
}

/// A job with random tokens, none like another: a prefix cache must not help. `number` says which.
pub(crate) fn request(load: Load, n_vocab: u32, number: u64) -> GenerateRequest {
    let span = u64::from(n_vocab.saturating_sub(TOKEN_MIN).max(1));
    let first = u64::from(n_vocab.saturating_sub(1).min(TOKEN_MIN));
    let mut state = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut token = || {
        // SplitMix64 (Steele, Lea, Flood 2014).
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        u32::try_from((first + (bits ^ (bits >> 31)) % span).min(u64::from(n_vocab) - 1)).unwrap_or(0)
    };
    let ids = (0..load.n_prompt).map(|_| token()).collect();
    GenerateRequest {
        max_tokens: load.n_generated,
        ignore_eos: true,
        ..GenerateRequest::new(Prompt::Tokens(ids))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_load_fits_the_context_window() {
        for workload in Workload::value_variants() {
            for (n_cpus, n_ctx, is_quick) in
                [(1, 16, false), (2, 256, true), (12, 4096, false), (192, 512, true)]
            {
                let load = workload.load(n_cpus, n_ctx, is_quick);
                assert!(load.n_prompt >= 1 && load.n_generated >= 1 && load.n_together >= 1, "{load:?}");
                assert!(load.n_together <= load.n_jobs, "{load:?}");
                assert!(load.n_prompt + load.n_generated < n_ctx, "{load:?}");
            }
        }
    }

    #[test]
    fn no_two_prompts_are_alike_and_all_tokens_exist() {
        let load = Workload::Small.load(2, 4096, false);
        let prompts: Vec<Prompt> = (0..50).map(|number| request(load, 300, number).prompt).collect();
        for (idx, prompt) in prompts.iter().enumerate() {
            assert!(!prompts[..idx].contains(prompt), "{idx}");
            assert!(matches!(prompt, Prompt::Tokens(ids) if ids.iter().all(|id| (256..300).contains(id))));
        }
    }
}
