//! Any bytes as a GGUF file: no panic, memory bounded by the file, and what is read writes back as the same file.
#![no_main]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bitnetd_engine::gguf::{Gguf, GgufWriter, Value};
use bitnetd_engine::inspect::{ModelInfo, verify};
use bitnetd_engine::mapping::Mapping;
use libfuzzer_sys::fuzz_target;

/// Counts what is asked for, in total.
struct Counting;

static N_ALLOCATED: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is passed on to the system's allocator as it is.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        N_ALLOCATED.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise is the one that is needed.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise is the one that is needed.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// What parsing may allocate in total, vectors that grow included, for each byte of the file.
const ALLOCATED_PER_BYTE: usize = 32;
/// And whatever the file's size: an error's text.
const ALLOCATED_ALWAYS: usize = 4096;

fuzz_target!(|bytes: &[u8]| {
    let mapping = Arc::new(Mapping::from_bytes(bytes).expect("memory for a copy"));
    let before = N_ALLOCATED.load(Ordering::Relaxed);
    let result = Gguf::parse(mapping);
    let n_allocated = N_ALLOCATED.load(Ordering::Relaxed) - before;
    let limit = ALLOCATED_ALWAYS + ALLOCATED_PER_BYTE * bytes.len();
    assert!(n_allocated <= limit, "{n_allocated} bytes allocated for a file of {}", bytes.len());
    match result {
        Ok(gguf) => check(Arc::new(gguf)),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
});

fn check(gguf: Arc<Gguf>) {
    let rewritten = write(&gguf);
    let again = Gguf::parse(Arc::new(Mapping::from_bytes(&rewritten).expect("memory"))).expect("own output");
    assert_eq!(write(&again), rewritten, "what is read back differs");
    assert_eq!(again.n_tensors(), gguf.n_tensors());
    for tensor in gguf.tensors() {
        let copy = again.tensor(tensor.name).expect("every tensor is found by its name");
        assert_eq!((copy.kind, copy.dims, copy.data), (tensor.kind, tensor.dims, tensor.data));
    }
    // The writer has an alignment of its own.
    for (key, value) in gguf.metadata().iter().filter(|(key, _)| *key != "general.alignment") {
        let copy = again.metadata().get(key).expect("every key is found by its name");
        assert_eq!(copy.describe(), value.describe());
        if let Value::Strings(strings) = value {
            for (idx, text) in strings.iter().enumerate() {
                assert_eq!(strings.get(idx), Some(text));
            }
            assert_eq!(strings.iter().count(), strings.len());
        }
    }
    let info = ModelInfo::new(&gguf);
    let found = verify(&gguf, &mut |_| ());
    assert!(info.is_supported || !found.problems.is_empty());
}

fn write(gguf: &Gguf) -> Vec<u8> {
    let mut writer = GgufWriter::new();
    for (key, value) in gguf.metadata().iter().filter(|(key, _)| *key != "general.alignment") {
        writer.value(key, value).expect("keys are unique");
    }
    for tensor in gguf.tensors() {
        writer.tensor(tensor.name, tensor.kind, tensor.dims).expect("shapes were checked");
    }
    let mut data = writer.start(Vec::new()).expect("a vector takes everything");
    for tensor in gguf.tensors() {
        data.append(tensor.data).expect("as many bytes as planned");
    }
    data.finish().expect("all were written")
}
