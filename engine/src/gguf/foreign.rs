//! Says what a file is that does not start with `GGUF`, as far as its first bytes tell.

/// What the file that starts with `bytes` looks like.
pub(super) fn looks_like(bytes: &[u8]) -> &'static str {
    let starts = |prefix: &[u8]| bytes.starts_with(prefix);
    if bytes.is_empty() {
        "it is empty"
    } else if starts(b"version https://git-lfs") {
        "it looks like a Git LFS pointer: the real file was not downloaded (`git lfs pull` gets it)"
    } else if starts(b"PK\x03\x04") {
        "it looks like a zip archive or a PyTorch checkpoint: convert the model with `bitnetd model convert`"
    } else if starts(b"\x80\x02") || starts(b"\x80\x04") {
        "it looks like a Python pickle (an old PyTorch checkpoint)"
    } else if is_safetensors(bytes) {
        "it looks like safetensors: convert its directory with `bitnetd model convert`"
    } else if starts(b"lmgg") || starts(b"tjgg") || starts(b"algg") || starts(b"fmgg") {
        "it looks like a GGML file from before GGUF: get or convert the model again"
    } else if starts(b"\x1f\x8b") {
        "it looks like a gzip archive: unpack it first"
    } else if starts(b"\x28\xb5\x2f\xfd") {
        "it looks like a zstd archive: unpack it first"
    } else if starts(b"\x7fELF") {
        "it looks like a program"
    } else if is_html(bytes) {
        "it looks like an HTML page: the download gave a page instead of the file"
    } else if starts(b"{") || starts(b"[") {
        "it looks like JSON"
    } else if bytes.iter().take(4096).all(|&byte| byte == 0) {
        "it starts with zeros: the download is not complete"
    } else if bytes.len() < 4 {
        "it is shorter than the magic number"
    } else {
        "it does not start with `GGUF`"
    }
}

fn is_html(bytes: &[u8]) -> bool {
    let start = bytes.trim_ascii_start();
    let prefix_is = |tag: &[u8]| start.len() >= tag.len() && start[..tag.len()].eq_ignore_ascii_case(tag);
    prefix_is(b"<!doctype") || prefix_is(b"<html") || prefix_is(b"<?xml")
}

// A length (8 bytes), then a JSON object.
fn is_safetensors(bytes: &[u8]) -> bool {
    bytes.len() > 9 && bytes[8] == b'{' && bytes[5..8] == [0, 0, 0]
}

#[cfg(test)]
mod tests {
    use super::looks_like;

    #[test]
    fn names_what_people_pass_by_mistake() {
        let cases: [(&[u8], &str); 9] = [
            (b"", "empty"),
            (b"PK\x03\x04....", "PyTorch"),
            (b"\x10\0\0\0\0\0\0\0{\"a\": 1}", "safetensors"),
            (b"\n<!DOCTYPE html>", "HTML"),
            (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
            (b"{}", "JSON"),
            (&[0; 100], "zeros"),
            (b"GGU", "shorter"),
            (b"something else", "does not start"),
        ];
        for (bytes, word) in cases {
            assert!(looks_like(bytes).contains(word), "{bytes:?}: {}", looks_like(bytes));
        }
    }
}
