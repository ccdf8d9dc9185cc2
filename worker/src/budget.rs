//! Whether what a configuration needs fits in memory, before any of it is taken.
//!
//! Counted are the model and, if it is asked for, its fast image (once, as all workers map the same, or once for each
//! memory node that has its own copy) and, for each worker, keys and values at their fullest and its buffers. A context
//! window that was asked for fits or is refused; the model's own is halved until it fits, since nobody asked for it. All workers are told the same numbers and so come to the same window.

use std::fmt;

use bitnetd_engine::buffer_bytes;
use bitnetd_engine::kv::{KvShape, KvType, pages_for};
use bitnetd_engine::model::HyperParams;
use bitnetd_proto::worker_link::WorkerSetup;

/// Of a worker with one thread, beside keys, values, and what grows with its options: tokenizer, norms, tables and panels of the
/// kernels, the screen of the head, sampling, its share of the program.
const BUFFERS_BYTES: u64 = 20 << 20;
/// Of each other thread: tables and panels, which are the largest with AVX2 (3.9 MB measured).
const THREAD_BYTES: u64 = 4 << 20;
/// A window that nobody asked for is not made shorter than this.
const CTX_MIN: usize = 512;

/// A configuration that does not fit.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{workers} of {max_batch} sequences with {n_ctx} tokens need {} for keys and values, {} for buffers{weights}, \
     {} in all; there are {}",
    Size(*.kv_bytes), Size(*.buffers_bytes), Size(*.needed_bytes), Size(*.memory_bytes),
    workers = Workers(*.n_workers)
)]
pub(crate) struct DoesNotFit {
    n_workers: u32,
    max_batch: u32,
    n_ctx: usize,
    kv_bytes: u64,
    buffers_bytes: u64,
    weights: Weights,
    needed_bytes: u64,
    memory_bytes: u64,
    /// The longest window that would fit, in steps of 256.
    fitting_ctx: Option<usize>,
    /// Whether it would fit with eight bits for keys and values.
    fits_as_q8_0: bool,
}

impl DoesNotFit {
    /// What to do about it.
    pub(crate) fn hint(&self) -> String {
        let others = "`engine.max_batch` or the number of workers";
        let known_better = "`engine.memory_mib` says how much may be taken if this is not what there is";
        let q8_0 = if self.fits_as_q8_0 { ", or set `engine.kv_type` to \"q8_0\"" } else { "" };
        match self.fitting_ctx {
            Some(ctx) => {
                format!("set `engine.ctx` to {ctx} or less, or lower {others}{q8_0}; {known_better}")
            }
            None => format!("lower {others}{q8_0}, or take a smaller model; {known_better}"),
        }
    }
}

/// Sizes of what is needed.
#[derive(Clone, Copy, Debug)]
struct Need<'a> {
    hparams: &'a HyperParams,
    setup: &'a WorkerSetup,
    kv_type: KvType,
    weights: Weights,
}

/// Bytes of what all workers map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Weights {
    /// Of the model file.
    pub(crate) file: u64,
    /// Of the fast image, if it is to be there in any case.
    pub(crate) image: u64,
    /// How often both are there: once, or once for each memory node.
    pub(crate) n_copies: u32,
}

/// What the model and all workers take with a window of `n_ctx` tokens.
pub(crate) fn needed_bytes(
    hparams: &HyperParams,
    (setup, kv_type): (&WorkerSetup, KvType),
    weights: Weights,
    n_ctx: usize,
) -> u64 {
    Need { hparams, setup, kv_type, weights }.needed_bytes(n_ctx)
}

/// The context window in tokens to run with.
pub(crate) fn context(
    hparams: &HyperParams,
    (setup, kv_type): (&WorkerSetup, KvType),
    weights: Weights,
) -> Result<usize, DoesNotFit> {
    let need = Need { hparams, setup, kv_type, weights };
    let asked = usize::try_from(setup.ctx).ok().filter(|ctx| *ctx > 0);
    let mut n_ctx = asked.unwrap_or(hparams.n_ctx);
    while asked.is_none() && n_ctx / 2 >= CTX_MIN && !need.fits(n_ctx) {
        n_ctx /= 2;
    }
    // A window beyond the model's is refused as such, later.
    if need.fits(n_ctx) || n_ctx > hparams.n_ctx {
        return Ok(n_ctx);
    }
    Err(need.refusal(n_ctx))
}

impl Need<'_> {
    /// Of all workers.
    fn kv_bytes(&self, n_ctx: usize) -> u64 {
        let HyperParams { n_layers, n_kv_heads, head_dim, .. } = *self.hparams;
        let n_pages = self.setup.max_batch as usize * pages_for(n_ctx);
        let shape = KvShape { kv_type: self.kv_type, n_layers, n_kv_heads, head_dim, n_pages };
        shape.bytes().saturating_mul(self.n_workers())
    }

    fn buffers_bytes(&self) -> u64 {
        let [max_batch, chunk] = [self.setup.max_batch, self.setup.prefill_chunk].map(|n| n as usize);
        let buffers = buffer_bytes(self.hparams, max_batch, chunk).saturating_add(BUFFERS_BYTES);
        let n_others = u64::from(self.setup.n_threads).saturating_sub(self.n_workers());
        buffers.saturating_mul(self.n_workers()).saturating_add(n_others.saturating_mul(THREAD_BYTES))
    }

    fn n_workers(&self) -> u64 {
        u64::from(self.setup.n_workers.max(1))
    }

    fn needed_bytes(&self, n_ctx: usize) -> u64 {
        let Weights { file, image, n_copies } = self.weights;
        let [file, image] = [file, image].map(|bytes| bytes.saturating_mul(n_copies.into()));
        [self.buffers_bytes(), file, image].into_iter().fold(self.kv_bytes(n_ctx), u64::saturating_add)
    }

    /// An unknown amount of memory fits everything.
    fn fits(&self, n_ctx: usize) -> bool {
        self.setup.memory_bytes == 0 || self.needed_bytes(n_ctx) <= self.setup.memory_bytes
    }

    fn refusal(&self, n_ctx: usize) -> DoesNotFit {
        let steps = (1..=n_ctx / 256).rev().map(|n| n * 256);
        DoesNotFit {
            n_workers: self.setup.n_workers.max(1),
            max_batch: self.setup.max_batch,
            n_ctx,
            kv_bytes: self.kv_bytes(n_ctx),
            buffers_bytes: self.buffers_bytes(),
            weights: self.weights,
            needed_bytes: self.needed_bytes(n_ctx),
            memory_bytes: self.setup.memory_bytes,
            fitting_ctx: steps.into_iter().find(|ctx| *ctx < n_ctx && self.fits(*ctx)),
            fits_as_q8_0: Need { kv_type: KvType::Q8_0, ..*self }.fits(n_ctx),
        }
    }
}

/// Bytes for people.
pub(crate) struct Size(pub(crate) u64);

impl fmt::Display for Size {
    #[expect(clippy::cast_precision_loss, reason = "shown with a few digits")]
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = self.0 as f64 / f64::from(1 << 20);
        if mib < 1.0 {
            write!(f, "{:.0} KiB", mib * 1024.0)
        } else if mib < 1024.0 {
            write!(f, "{mib:.0} MiB")
        } else {
            write!(f, "{:.1} GiB", mib / 1024.0)
        }
    }
}

impl fmt::Display for Weights {
    /// The end of a list.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { file, image, n_copies } = *self;
        let [file, image] = [file, image].map(|bytes| Size(bytes.saturating_mul(n_copies.into())));
        match (self.image, n_copies) {
            (0, 1) => write!(f, " and {file} for the model"),
            (0, n) => write!(f, " and {file} for {n} copies of the model"),
            (_, 1) => write!(f, ", {file} for the model and {image} for its fast image"),
            (_, n) => write!(f, ", {file} for {n} copies of the model and {image} for their fast images"),
        }
    }
}

/// `1 worker`, `3 workers`.
struct Workers(u32);

impl fmt::Display for Workers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} worker{}", self.0, if self.0 == 1 { "" } else { "s" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 2B-4T: 75 KiB for keys and values of a token.
    fn hparams() -> HyperParams {
        let gguf = bitnetd_engine::gguf::Gguf::parse(std::sync::Arc::new(
            bitnetd_engine::mapping::Mapping::open(
                &std::path::PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../models/story.gguf"),
            )
            .unwrap(),
        ))
        .unwrap();
        let story = bitnetd_engine::model::Model::load(std::sync::Arc::new(gguf)).unwrap();
        HyperParams {
            n_layers: 30,
            n_kv_heads: 5,
            head_dim: 128,
            n_vocab: 128_256,
            n_ctx: 4096,
            ..story.hparams().clone()
        }
    }

    fn setup(n_workers: u32, max_batch: u32, ctx: u32, memory_bytes: u64) -> WorkerSetup {
        WorkerSetup {
            slot: 0,
            cpus: vec![0],
            model_name: "m".into(),
            ctx,
            max_batch,
            prefill_chunk: 256,
            prefill_ms: 300,
            isa: "auto".into(),
            head: "auto".into(),
            kv_type: "f16".into(),
            wait: "hybrid".into(),
            huge_pages: "auto".into(),
            confinement: "auto".into(),
            speculation: "auto".into(),
            mlock: false,
            n_copies: 1,
            has_copy: false,
            n_workers,
            n_threads: n_workers,
            memory_bytes,
        }
    }

    const MODEL: Weights = Weights { file: 1_185_000_000, image: 0, n_copies: 1 };

    #[test]
    fn what_was_asked_for_fits_or_is_refused_in_numbers() {
        let hparams = hparams();
        assert_eq!(context(&hparams, (&setup(1, 8, 4096, 4 << 30), KvType::F16), MODEL), Ok(4096));
        let refusal = context(&hparams, (&setup(3, 8, 4096, 6 << 30), KvType::F16), MODEL).unwrap_err();
        assert_eq!(
            refusal.to_string(),
            "3 workers of 8 sequences with 4096 tokens need 7.0 GiB for keys and values, 80 MiB for buffers and 1.1 GiB \
             for the model, 8.2 GiB in all; there are 6.0 GiB"
        );
        let hint = refusal.hint();
        assert!(hint.starts_with("set `engine.ctx` to 2560 or less"), "{hint}");
        let with_q8_0 =
            "or lower `engine.max_batch` or the number of workers, or set `engine.kv_type` to \"q8_0\"; ";
        assert!(hint.contains(with_q8_0), "{hint}");
        // And the hint holds.
        assert_eq!(context(&hparams, (&setup(3, 8, 4096, 6 << 30), KvType::Q8_0), MODEL), Ok(4096));
        assert_eq!(context(&hparams, (&setup(3, 8, 2560, 6 << 30), KvType::F16), MODEL), Ok(2560));
        assert!(context(&hparams, (&setup(3, 8, 2816, 6 << 30), KvType::F16), MODEL).is_err());
    }

    #[test]
    fn an_image_that_was_asked_for_is_counted() {
        let weights = Weights { image: 600_000_000, ..MODEL };
        let without = context(&hparams(), (&setup(3, 8, 4096, 6 << 30), KvType::F16), MODEL).unwrap_err();
        let refusal = context(&hparams(), (&setup(3, 8, 4096, 6 << 30), KvType::F16), weights).unwrap_err();
        assert_eq!(refusal.needed_bytes, without.needed_bytes + 600_000_000);
        let text = refusal.to_string();
        let end = "80 MiB for buffers, 1.1 GiB for the model and 572 MiB for its fast image, 8.8 GiB in all; there are 6.0 GiB";
        assert!(text.ends_with(end), "{text}");
    }

    #[test]
    fn each_copy_for_a_node_is_counted() {
        let weights = Weights { image: 600_000_000, n_copies: 3, ..MODEL };
        let without = context(&hparams(), (&setup(3, 8, 4096, 6 << 30), KvType::F16), MODEL).unwrap_err();
        let refusal = context(&hparams(), (&setup(3, 8, 4096, 6 << 30), KvType::F16), weights).unwrap_err();
        assert_eq!(refusal.needed_bytes, without.needed_bytes + 2 * MODEL.file + 3 * 600_000_000);
        let text = refusal.to_string();
        let part = "3.3 GiB for 3 copies of the model and 1.7 GiB for their fast images, ";
        assert!(text.contains(part), "{text}");
    }

    #[test]
    fn eight_bits_for_keys_and_values_leave_room_for_more() {
        let hparams = hparams();
        let q8 = |ctx, memory| context(&hparams, (&setup(3, 8, ctx, memory), KvType::Q8_0), MODEL);
        assert_eq!(q8(4096, 6 << 30), Ok(4096), "3.7 GiB instead of 7.0");
        let refusal = q8(4096, 4 << 30).unwrap_err();
        assert_eq!(
            refusal.to_string(),
            "3 workers of 8 sequences with 4096 tokens need 3.7 GiB for keys and values, 80 MiB for buffers and 1.1 GiB \
             for the model, 4.9 GiB in all; there are 4.0 GiB"
        );
        assert!(!refusal.hint().contains("kv_type"), "{}", refusal.hint());
    }

    #[test]
    fn long_prompt_steps_are_counted() {
        let hparams = hparams();
        let refusal = |prefill_chunk| {
            let setup = WorkerSetup { prefill_chunk, ..setup(2, 8, 4096, 1) };
            context(&hparams, (&setup, KvType::F16), MODEL).unwrap_err()
        };
        let (short, long) = (refusal(256), refusal(8192));
        let row = 4 * (hparams.n_embd + 2 * hparams.n_ff) as u64;
        let more = long.buffers_bytes - short.buffers_bytes;
        assert!(more > 2 * (8192 - 256) * row && more < 4 * (8192 - 256) * row, "{more} for rows of {row}");
        assert_eq!(long.needed_bytes - short.needed_bytes, more);
    }

    #[test]
    fn the_tables_of_many_threads_are_counted() {
        let refusal = |n_threads| {
            let setup = WorkerSetup { n_threads, ..setup(3, 8, 4096, 1) };
            context(&hparams(), (&setup, KvType::F16), MODEL).unwrap_err()
        };
        let (one, twelve) = (refusal(3), refusal(36));
        assert_eq!(twelve.buffers_bytes - one.buffers_bytes, 33 * THREAD_BYTES);
        assert_eq!(twelve.needed_bytes - one.needed_bytes, 33 * THREAD_BYTES);
    }

    #[test]
    fn exactly_enough_is_enough() {
        let hparams = hparams();
        let needed = context(&hparams, (&setup(2, 4, 1024, 1), KvType::F16), MODEL).unwrap_err().needed_bytes;
        assert_eq!(context(&hparams, (&setup(2, 4, 1024, needed), KvType::F16), MODEL), Ok(1024));
        assert!(context(&hparams, (&setup(2, 4, 1024, needed - 1), KvType::F16), MODEL).is_err());
    }

    #[test]
    fn a_window_that_nobody_asked_for_is_halved_until_it_fits() {
        let hparams = hparams();
        assert_eq!(context(&hparams, (&setup(3, 8, 0, 9 << 30), KvType::F16), MODEL), Ok(4096));
        assert_eq!(context(&hparams, (&setup(3, 8, 0, 6 << 30), KvType::F16), MODEL), Ok(2048));
        assert_eq!(context(&hparams, (&setup(3, 8, 0, 5 << 29), KvType::F16), MODEL), Ok(512));
        let refusal = context(&hparams, (&setup(3, 8, 0, 1 << 30), KvType::F16), MODEL).unwrap_err();
        assert!(refusal.hint().starts_with("lower `engine.max_batch`"), "{}", refusal.hint());
    }

    #[test]
    fn where_nothing_is_known_nothing_is_refused() {
        assert_eq!(context(&hparams(), (&setup(99, 256, 0, 0), KvType::F16), MODEL), Ok(4096));
        assert_eq!(
            context(&hparams(), (&setup(1, 8, 9000, 0), KvType::F16), MODEL),
            Ok(9000),
            "too long for the model: said later"
        );
    }
}
