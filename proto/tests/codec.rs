//! Frames: what goes in comes out, however the bytes are cut; garbage costs nothing.

use std::fmt::Debug;

use bitnetd_proto::client_link::{ClientMessage, ServerMessage};
use bitnetd_proto::error::ErrorCode;
use bitnetd_proto::frame::{FrameDecoder, FrameError, encode_frame, read_frame, write_frame};
use bitnetd_proto::limits::{FRAME_BYTES_MAX, REQUEST_FRAME_BYTES_MAX};
use bitnetd_proto::request::{GenerateRequest, Prompt};
use proptest::collection::vec;
use proptest::prelude::*;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::strategies;

/// Encodes all messages, decodes them three ways, and compares.
fn check_identity<T>(messages: &[T], cuts: &[usize]) -> Result<(), TestCaseError>
where
    T: Serialize + DeserializeOwned + PartialEq + Debug,
{
    let mut bytes = Vec::new();
    for message in messages {
        write_frame(&mut bytes, message).unwrap();
    }

    let mut reader = bytes.as_slice();
    for message in messages {
        prop_assert_eq!(&read_frame::<T>(&mut reader).unwrap().unwrap(), message);
    }
    prop_assert!(read_frame::<T>(&mut reader).unwrap().is_none());

    let mut decoder = FrameDecoder::default();
    let mut decoded = Vec::new();
    let mut rest = bytes.as_slice();
    let mut cuts = cuts.iter().cycle();
    while !rest.is_empty() {
        let n = (*cuts.next().unwrap()).clamp(1, rest.len());
        decoder.push(&rest[..n]);
        rest = &rest[n..];
        while let Some(message) = decoder.next_message::<T>().unwrap() {
            decoded.push(message);
        }
    }
    prop_assert_eq!(decoded.as_slice(), messages);
    prop_assert!(decoder.is_empty() && decoder.cut().is_none());
    Ok(())
}

proptest! {
    #[test]
    fn client_messages_survive_any_split(
        messages in vec(strategies::client_message(), 1..5), cuts in vec(1_usize..300, 1..9)
    ) {
        check_identity(&messages, &cuts)?;
    }

    #[test]
    fn server_messages_survive_any_split(
        messages in vec(strategies::server_message(), 1..5), cuts in vec(1_usize..300, 1..9)
    ) {
        check_identity(&messages, &cuts)?;
    }

    #[test]
    fn worker_messages_survive_any_split(
        to in vec(strategies::to_worker(), 1..4), from in vec(strategies::from_worker(), 1..4),
        cuts in vec(1_usize..300, 1..9)
    ) {
        check_identity(&to, &cuts)?;
        check_identity(&from, &cuts)?;
    }

    #[test]
    fn garbage_is_an_error_and_never_more_memory_than_it_has_bytes(bytes in vec(any::<u8>(), 0..400)) {
        let _any = read_frame::<ClientMessage>(bytes.as_slice());
        let mut decoder = FrameDecoder::default();
        decoder.push(&bytes);
        while let Ok(Some(_)) = decoder.next_message::<ClientMessage>() {}
        prop_assert!(decoder.buffered_bytes() <= 2 * bytes.len() + 64, "{}", decoder.buffered_bytes());
    }

    #[test]
    fn garbage_in_a_good_frame_is_a_typed_error(bytes in vec(any::<u8>(), 0..100)) {
        let mut frame = u32::try_from(bytes.len()).unwrap().to_le_bytes().to_vec();
        frame.extend_from_slice(&bytes);
        match read_frame::<ServerMessage>(frame.as_slice()) {
            Err(error @ FrameError::Payload { .. }) => {
                prop_assert_eq!(error.to_wire().code, ErrorCode::BadMessage);
            }
            other => prop_assert!(false, "{other:?}"),
        }
    }

    #[test]
    fn validation_never_panics(request in strategies::request()) {
        let _any = request.validate();
    }

    /// Whatever a client may send and we accept fits the frame to a worker, with any number of tokens to resume.
    #[test]
    fn an_accepted_request_is_not_longer_on_the_way_to_a_worker(request in strategies::request()) {
        let from_client = encode_frame(&ClientMessage::Generate { id: 0, request: Box::new(request.clone()) });
        let again: ClientMessage = read_frame(from_client.as_ref().unwrap().as_slice()).unwrap().unwrap();
        prop_assert_eq!(encode_frame(&again).unwrap().len(), from_client.unwrap().len());
    }
}

#[test]
fn a_frame_at_the_limit_passes_and_one_beyond_is_refused_by_its_header() {
    let mut decoder = FrameDecoder::new(REQUEST_FRAME_BYTES_MAX);
    let envelope = r#"{"type":"cancel","id":1}"#;
    let mut frame = u32::try_from(REQUEST_FRAME_BYTES_MAX).unwrap().to_le_bytes().to_vec();
    frame.extend_from_slice(envelope.as_bytes());
    frame.resize(4 + REQUEST_FRAME_BYTES_MAX, b' ');
    decoder.push(&frame);
    assert_eq!(decoder.next_message::<ClientMessage>().unwrap(), Some(ClientMessage::Cancel { id: 1 }));
    assert!(
        decoder.buffered_bytes() <= 64 << 10,
        "a drained decoder keeps {} bytes",
        decoder.buffered_bytes()
    );

    decoder.push(&u32::try_from(REQUEST_FRAME_BYTES_MAX + 1).unwrap().to_le_bytes());
    let error = decoder.next_message::<ClientMessage>().unwrap_err();
    assert_eq!(error.to_string(), "frame of 2097153 bytes, the limit is 2097152");
    assert_eq!(error.to_wire().code, ErrorCode::FrameTooLarge);
}

#[test]
fn a_claimed_length_allocates_nothing() {
    let mut claim = u32::try_from(FRAME_BYTES_MAX).unwrap().to_le_bytes().to_vec();
    claim.push(b'{');
    let mut decoder = FrameDecoder::default();
    decoder.push(&claim);
    assert!(decoder.next_message::<ClientMessage>().unwrap().is_none());
    assert!(decoder.buffered_bytes() <= 64, "{}", decoder.buffered_bytes());
    assert_eq!(decoder.cut().unwrap().to_string(), "the stream ended after 5 bytes of a frame of 4194308");
    let error = read_frame::<ClientMessage>(claim.as_slice()).unwrap_err();
    assert_eq!(error.to_string(), "the stream ended after 5 bytes of a frame of 4194308");
    let error = read_frame::<ClientMessage>(&claim[..2]).unwrap_err();
    assert_eq!(error.to_string(), "the stream ended after 2 bytes of a frame of 4");
}

#[test]
fn a_float_that_is_not_finite_is_not_sent() {
    let mut request = GenerateRequest::new(Prompt::Text("hello".into()));
    request.sampling.top_p = f32::NAN;
    let error = encode_frame(&ClientMessage::Generate { id: 1, request: Box::new(request) }).unwrap_err();
    assert_eq!(error.to_string(), "cannot encode a message: `NaN` is not a finite number");
}

#[test]
fn deep_nesting_is_refused() {
    let payload = "[".repeat(100_000);
    let mut frame = u32::try_from(payload.len()).unwrap().to_le_bytes().to_vec();
    frame.extend_from_slice(payload.as_bytes());
    assert!(matches!(read_frame::<ClientMessage>(frame.as_slice()), Err(FrameError::Payload { .. })));
}
