//! `engine.mlock`: the model, its fast image and the KV cache stay in memory, whatever else wants it.
//!
//! Model and image are read in at once; keys and values are locked as they are first written, so that a cache that is never
//! full takes no more than without. What the kernel counts against the limit is all of it, for each process.

use std::io;

use bitnetd_engine::Engine;
use bitnetd_engine::mapping::{LockPages, lock};
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};

use crate::budget::Size;

/// Memory that cannot be locked.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot lock {} of memory in each worker ({} of the model, {} for keys and values{}); the limit is {}",
    Size(*.needed_bytes), Size(*.model_bytes), Size(*.kv_bytes),
    if *.image_bytes > 0 { format!(", {} of the fast image", Size(*.image_bytes)) } else { String::new() },
    limit_words(*.limit_bytes)
)]
pub(crate) struct CannotLock {
    model_bytes: u64,
    kv_bytes: u64,
    image_bytes: u64,
    needed_bytes: u64,
    limit_bytes: u64,
    #[source]
    source: io::Error,
}

impl CannotLock {
    /// What to do about it.
    pub(crate) const HINT: &'static str = "raise the limit: `LimitMEMLOCK=infinity` in the unit, `ulimit -l unlimited` in \
        the shell that starts the daemon; or leave `engine.mlock` off";
}

fn limit_words(bytes: u64) -> String {
    if bytes == RLIM_INFINITY { "none".into() } else { Size(bytes).to_string() }
}

/// Locks the model and the KV cache of `engine`, if the limit also holds the fast image that is still to come.
pub(crate) fn lock_engine(engine: &Engine, image_bytes: u64) -> Result<(), CannotLock> {
    let model = engine.model().gguf().mapping();
    let (model_bytes, kv_bytes) = (model.len() as u64, engine.kv().shape().bytes());
    let needed_bytes = model_bytes.saturating_add(kv_bytes).saturating_add(image_bytes);
    let limit_bytes = getrlimit(Resource::RLIMIT_MEMLOCK).map_or(RLIM_INFINITY, |(soft, _hard)| soft);
    let locked = if limit_bytes < needed_bytes {
        // What the kernel would say now or when the image comes. A worker has no right to go beyond.
        Err(io::ErrorKind::OutOfMemory.into())
    } else {
        engine.kv().lock(LockPages::WhenTouched).and_then(|()| lock(model, LockPages::Now))
    };
    locked.map_err(|source| CannotLock {
        model_bytes,
        kv_bytes,
        image_bytes,
        needed_bytes,
        limit_bytes,
        source,
    })
}
