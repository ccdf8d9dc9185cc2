//! Every wrong input is named, with a hint where there is a next step, and has its exit code.

use std::fs;
use std::path::Path;

use bitnetd_proto::exit_code::ExitCode;

use crate::support::{Daemon, Finished, Folder};

/// What a user sees of a failure.
fn shown(finished: &Finished) -> String {
    let code = finished.code.and_then(ExitCode::from_raw);
    format!("{code:?}\n{}", finished.stderr.trim_end())
}

/// The built-in model's bytes.
fn story_model() -> Vec<u8> {
    fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/story.gguf")).unwrap()
}

/// Where `needle` ends.
fn end_of(bytes: &[u8], needle: &[u8]) -> usize {
    bytes.windows(needle.len()).position(|window| window == needle).unwrap() + needle.len()
}

#[track_caller]
fn run_model(name: &str, bytes: &[u8]) -> String {
    let folder = Folder::new();
    folder.write(name, bytes);
    let finished = folder.run(&format!("run -t 1 -n 4 -p Once -m %/{name}"));
    assert_eq!(finished.stdout, "", "{finished:?}");
    shown(&finished)
}

#[test]
fn a_model_that_is_not_there() {
    let folder = Folder::new();
    insta::assert_snapshot!(shown(&folder.run("run -p Once -m none.gguf")), @r#"
    Some(NoInput)
    error: cannot open model `[DIR]/none.gguf`: No such file or directory (os error 2)
    hint: -m takes a GGUF file; without it the built-in model runs
    "#);
    insta::assert_snapshot!(shown(&folder.run("run -p Once -m .")), @r#"
    Some(NoInput)
    error: model `[DIR]` is not a regular file
    hint: -m takes a GGUF file; without it the built-in model runs
    "#);
}

#[test]
fn a_model_that_is_none() {
    insta::assert_snapshot!(run_model("empty.gguf", b""), @r#"
    Some(Data)
    error: model `[DIR]/empty.gguf` is empty
    hint: -m takes a GGUF file; without it the built-in model runs
    "#);
    insta::assert_snapshot!(run_model("notes.gguf", b"Dear diary, today I trained a model."), @r#"
    Some(Data)
    error: `[DIR]/notes.gguf` is not a GGUF file that can be read: not a GGUF file: it does not start with `GGUF`
    hint: `bitnetd model info FILE` says more; is the download complete?
    "#);
}

#[test]
fn a_model_that_is_cut() {
    let model = story_model();
    insta::assert_snapshot!(run_model("half.gguf", &model[..model.len() / 2]), @r#"
    Some(Data)
    error: `[DIR]/half.gguf` is not a GGUF file that can be read: tensor `token_embd.weight` needs 2097152 bytes at offset 0 of the tensor data, the file has 1794112 there: it is cut or its size is wrong
    hint: `bitnetd model info FILE` says more; is the download complete?
    "#);
    insta::assert_snapshot!(run_model("start.gguf", &model[..100]), @r#"
    Some(Data)
    error: `[DIR]/start.gguf` is not a GGUF file that can be read: file ends inside the value of metadata key `general.name`: 8 bytes needed at offset 100, 0 are left
    hint: `bitnetd model info FILE` says more; is the download complete?
    "#);
}

#[test]
fn a_model_that_lies() {
    let mut model = story_model();
    model[8..16].copy_from_slice(&u64::MAX.to_le_bytes());
    insta::assert_snapshot!(run_model("count.gguf", &model), @r#"
    Some(Data)
    error: `[DIR]/count.gguf` is not a GGUF file that can be read: the number of tensors is 18446744073709551615, the limit is 65536
    hint: `bitnetd model info FILE` says more; is the download complete?
    "#);
    let mut model = story_model();
    let dimensions = end_of(&model, b"blk.0.attn_q.weight") + 4;
    model[dimensions..dimensions + 8].copy_from_slice(&(1_u64 << 40).to_le_bytes());
    insta::assert_snapshot!(run_model("dimension.gguf", &model), @r#"
    Some(Data)
    error: `[DIR]/dimension.gguf` is not a GGUF file that can be read: tensor `blk.0.attn_q.weight` needs 70368744177696 bytes at offset 2098176 of the tensor data, the file has 1623808 there: it is cut or its size is wrong
    hint: `bitnetd model info FILE` says more; is the download complete?
    "#);
}

#[test]
fn a_model_that_is_not_supported() {
    let mut model = story_model();
    let name = end_of(&model, b"general.architecture") + 4 + 8;
    model[name] = b'X';
    insta::assert_snapshot!(run_model("architecture.gguf", &model), @r#"
    Some(Data)
    error: `[DIR]/architecture.gguf` cannot be run: architecture `Xitnet-b1.58` is not supported, expected one of `bitnet-b1.58`, `bitnet-25`, `bitnet`, `llama`
    hint: `bitnetd model info FILE` lists what is supported
    "#);
    let mut model = story_model();
    let kind = end_of(&model, b"blk.0.attn_q.weight") + 4 + 2 * 8;
    model[kind..kind + 4].copy_from_slice(&19_u32.to_le_bytes()); // IQ1_S, which is smaller.
    let other_type = run_model("type.gguf", &model);
    assert!(
        other_type.starts_with("Some(Data)") && other_type.contains("blk.0.attn_q.weight"),
        "{other_type}"
    );
}

#[test]
fn a_prompt_that_cannot_be() {
    let folder = Folder::new();
    insta::assert_snapshot!(shown(&folder.run_prompt("run", "")), @r#"
    Some(Data)
    error: the prompt is empty
    hint: give at least one character to continue
    "#);
    insta::assert_snapshot!(shown(&folder.run_prompt("run", &"word ".repeat(3000))), @r#"
    Some(Data)
    error: the prompt has 3003 tokens, the context window 256
    hint: shorten the prompt, or use a model or `engine.ctx` with a longer context
    "#);
    insta::assert_snapshot!(shown(&folder.run("run -f none.txt")), @r#"
    Some(NoInput)
    error: cannot read the prompt from `none.txt`: No such file or directory (os error 2)
    "#);
    folder.write("latin1.txt", b"caf\xe9");
    insta::assert_snapshot!(shown(&folder.run("run -f latin1.txt")), @r#"
    Some(Data)
    error: cannot read the prompt from `latin1.txt`: incomplete utf-8 byte sequence from index 3
    "#);
    insta::assert_snapshot!(shown(&folder.run_prompt("run --chat", "hello")), @r#"
    Some(Usage)
    error: this model cannot chat: its file has no chat template
    hint: send the prompt as plain text
    "#);
}

#[test]
fn a_command_line_that_cannot_be() {
    let folder = Folder::new();
    insta::assert_snapshot!(shown(&folder.run("run -p Once --top-p 7")), @r#"
    Some(Usage)
    error: invalid request: top_p is 7, it must be above 0 to 1
    "#);
    insta::assert_snapshot!(shown(&folder.run("run -p Once --tmp 7")), @r#"
    Some(Usage)
    error: unexpected argument '--tmp' found

      tip: a similar argument exists: '--temp'

    Usage: bitnetd run --temp <T> <--prompt <TEXT>|--file <FILE>>

    For more information, try '--help'.
    "#);
    insta::assert_snapshot!(shown(&folder.run("run")), @r#"
    Some(Usage)
    error: the following required arguments were not provided:
      <--prompt <TEXT>|--file <FILE>>

    Usage: bitnetd run <--prompt <TEXT>|--file <FILE>>

    For more information, try '--help'.
    "#);
    insta::assert_snapshot!(shown(&folder.run("rnu")), @r#"
    Some(Usage)
    error: unrecognized subcommand 'rnu'

    Usage: bitnetd [OPTIONS] <COMMAND>

    For more information, try '--help'.
    "#);
    let many = folder.run("run -p Once -t 5000");
    assert_eq!(many.code, Some(78), "{many:?}");
    assert!(many.stderr.contains("5000 CPUs") && many.stderr.contains("hint: "), "{many:?}");
}

#[test]
fn a_configuration_that_is_wrong() {
    let folder = Folder::new();
    folder.write("bitnetd.toml", "[engine]\nmax_bach = 3\n[split]\nprofile = \"fast\"\n");
    insta::assert_snapshot!(shown(&folder.run("serve -c bitnetd.toml --socket %/s")), @r#"
    Some(Config)
    error: 2 problems in `bitnetd.toml`
      line 2, column 1: `engine.max_bach`: unknown key
        hint: did you mean `max_batch`?
      line 4, column 11: `split.profile`: expected one of "auto", "max-throughput", "balanced", "high-concurrency", "low-latency", found the string "fast"
    "#);
    insta::assert_snapshot!(shown(&folder.run("serve -c none.toml --socket %/s")), @r#"
    Some(NoInput)
    error: cannot read configuration `none.toml`: No such file or directory (os error 2)
    "#);
}

#[test]
fn a_daemon_that_is_not_there() {
    let folder = Folder::new();
    insta::assert_snapshot!(shown(&folder.run("generate -p Once --socket %/none.sock")), @r#"
    Some(Unavailable)
    error: cannot connect to `[DIR]/none.sock`: No such file or directory (os error 2)
    hint: start the daemon with `bitnetd serve`, or say where it is with --socket PATH
    "#);
    folder.write("file.sock", "");
    insta::assert_snapshot!(shown(&folder.run("status --socket %/file.sock")), @r#"
    Some(Unavailable)
    error: cannot connect to `[DIR]/file.sock`: Connection refused (os error 111)
    hint: start the daemon with `bitnetd serve`, or say where it is with --socket PATH
    "#);
}

#[test]
fn a_socket_that_cannot_be_had() {
    let folder = Folder::new();
    let daemon = Daemon::start(&folder, "--workers 1 --threads 1");
    insta::assert_snapshot!(shown(&folder.run("serve -q --socket %/bitnetd.sock")), @r#"
    Some(Temporary)
    error: socket `[DIR]/bitnetd.sock` is in use by another process
    hint: a bitnetd is running there: use it, stop it, or choose another `listen.socket`
    "#);
    folder.write("precious", "not a socket");
    insta::assert_snapshot!(shown(&folder.run("serve -q --socket %/precious")), @r#"
    Some(Config)
    error: `[DIR]/precious` is there and is not a socket
    hint: remove the file, or choose another `listen.socket`
    "#);
    assert_eq!(fs::read_to_string(folder.path("precious")).unwrap(), "not a socket");
    insta::assert_snapshot!(shown(&folder.run("serve -q --socket %/no/such/folder/s")), @r#"
    Some(Config)
    error: the folder of socket `[DIR]/no/such/folder/s` does not exist
    hint: create the folder, or choose another `listen.socket`
    "#);
    assert!(daemon.status().is_some(), "the first one was disturbed");
}

#[test]
fn a_prompt_that_the_daemon_refuses() {
    let folder = Folder::new();
    let daemon = Daemon::start(&folder, "--workers 1 --threads 1");
    let long = folder.run_prompt("generate --socket %/bitnetd.sock", &"word ".repeat(3000));
    insta::assert_snapshot!(shown(&long), @r#"
    Some(Data)
    error: the prompt has 3003 tokens, the context window 256
    hint: shorten the prompt, or use a model or `engine.ctx` with a longer context
    "#);
    assert_eq!(daemon.status().unwrap().totals.restarts, 0);
}

#[test]
fn what_does_not_fit_in_memory_is_refused_in_numbers() {
    let folder = Folder::new();
    folder.write(
        "small.toml",
        "[engine]\nctx = 256\nmax_batch = 16\nmemory_mib = 64\n[split]\nworkers = 2\nthreads = 1\n",
    );
    let refused = folder.run("serve -q -c small.toml --socket %/s");
    assert_eq!(refused.code, Some(78), "{refused:?}");
    // The log says it, too, with the time.
    let told = |line: &&str| line.starts_with("error: ") || line.starts_with("hint: ");
    insta::assert_snapshot!(refused.stderr.lines().filter(told).collect::<Vec<_>>().join("\n"), @r#"
    error: 2 workers of 16 sequences with 256 tokens need 32 MiB for keys and values, 45 MiB for buffers and 4 MiB for the model, 81 MiB in all; there are 64 MiB
    hint: lower `engine.max_batch` or the number of workers, or take a smaller model; `engine.memory_mib` says how much may be taken if this is not what there is
    "#);
    folder.write(
        "enough.toml",
        "[engine]\nctx = 256\nmax_batch = 16\nmemory_mib = 640\n[split]\nworkers = 2\nthreads = 1\n",
    );
    let daemon = Daemon::start(&folder, "-c enough.toml");
    assert_eq!(daemon.status().unwrap().slots.len(), 2);
}
