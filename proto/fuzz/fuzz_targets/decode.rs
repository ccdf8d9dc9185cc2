//! Bytes from a hostile peer: whatever decodes encodes again to the same message, both readers agree, and memory
//! stays within the bytes that came.
#![no_main]

use std::fmt::Debug;

use bitnetd_proto::client_link::{ClientMessage, ServerMessage};
use bitnetd_proto::frame::{FrameDecoder, FrameError, encode_frame, read_frame};
use bitnetd_proto::handshake::{check_client_hello, check_welcome, check_worker_hello, check_worker_ready};
use bitnetd_proto::worker_link::{FromWorker, ToWorker};
use libfuzzer_sys::fuzz_target;
use serde::Serialize;
use serde::de::DeserializeOwned;

fuzz_target!(|data: &[u8]| {
    // The first byte chooses the link and where the stream is cut.
    let Some((&choice, bytes)) = data.split_first() else { return };
    let cut = usize::from(choice >> 2) + 1;
    match choice & 3 {
        0 => both_readers::<ClientMessage>(bytes, cut, |message| {
            if let ClientMessage::Generate { request, .. } = &message {
                let _verdict = request.validate();
            }
            let _verdict = check_client_hello(message);
        }),
        1 => both_readers::<ServerMessage>(bytes, cut, |message| drop(check_welcome(message))),
        2 => both_readers::<ToWorker>(bytes, cut, |message| drop(check_worker_hello(message))),
        _ => both_readers::<FromWorker>(bytes, cut, |message| drop(check_worker_ready(message))),
    }
});

fn both_readers<T>(bytes: &[u8], cut: usize, check: impl Fn(T))
where
    T: Serialize + DeserializeOwned + PartialEq + Debug,
{
    // A fuzzer that has to guess four length bytes learns nothing about messages: try the bytes as a payload too.
    if let Ok(message) = serde_json::from_slice::<T>(bytes) {
        round_trip(&message);
        check(message);
    }
    let mut rest = bytes;
    let mut blocking = Vec::new();
    let blocking_end = loop {
        match read_frame::<T>(&mut rest) {
            Ok(Some(message)) => blocking.push(message),
            Ok(None) => break None,
            Err(error) => break Some(error),
        }
    };
    let mut decoder = FrameDecoder::default();
    let mut incremental = Vec::new();
    let mut incremental_end = None;
    'stream: for part in bytes.chunks(cut) {
        decoder.push(part);
        loop {
            match decoder.next_message::<T>() {
                Ok(Some(message)) => incremental.push(message),
                Ok(None) => break,
                Err(error) => {
                    incremental_end = Some(error);
                    break 'stream;
                }
            }
        }
        assert!(decoder.buffered_bytes() <= 2 * bytes.len() + (64 << 10));
    }
    assert_eq!(blocking, incremental);
    match (&blocking_end, incremental_end.or_else(|| decoder.cut())) {
        (None, None) => {}
        (Some(FrameError::Cut { .. }), Some(FrameError::Cut { .. })) => {}
        (Some(a), Some(b)) => assert_eq!(a.to_string(), b.to_string()),
        (a, b) => panic!("{a:?} and {b:?}"),
    }
    for message in blocking {
        round_trip(&message);
        check(message);
    }
}

fn round_trip<T>(message: &T)
where
    T: Serialize + DeserializeOwned + PartialEq + Debug,
{
    let frame = encode_frame(message).expect("what was decoded can be encoded");
    let again: T = read_frame(frame.as_slice()).expect("what was encoded can be decoded").expect("one frame");
    assert_eq!(&again, message);
}
