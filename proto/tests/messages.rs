//! What the JSON looks like, as `PROTOCOL.md` shows it to people who write a client in another language.

use bitnetd_proto::PROTOCOL_VERSION;
use bitnetd_proto::client_link::{ClientMessage, ServerMessage};
use bitnetd_proto::error::{ErrorCode, WireError};
use bitnetd_proto::exit_code::ExitCode;
use bitnetd_proto::handshake::{check_client_hello, check_welcome};
use bitnetd_proto::request::Prompt;

/// Every example in `PROTOCOL.md` parses as what it stands under.
#[test]
fn examples_of_the_specification_parse() {
    let specification = include_str!("../PROTOCOL.md");
    let (mut n_client, mut n_server) = (0, 0);
    for line in specification.lines() {
        if let Some(json) = line.strip_prefix("C: ") {
            serde_json::from_str::<ClientMessage>(json).unwrap_or_else(|error| panic!("{error} in {json}"));
            n_client += 1;
        } else if let Some(json) = line.strip_prefix("S: ") {
            serde_json::from_str::<ServerMessage>(json).unwrap_or_else(|error| panic!("{error} in {json}"));
            n_server += 1;
        }
    }
    assert!(n_client >= 4 && n_server >= 5, "{n_client} client and {n_server} server examples");
}

#[test]
fn the_specification_names_every_error_code() {
    let specification = include_str!("../PROTOCOL.md");
    let codes = [
        ErrorCode::BadMessage,
        ErrorCode::FrameTooLarge,
        ErrorCode::UnsupportedVersion,
        ErrorCode::InvalidRequest,
        ErrorCode::EmptyPrompt,
        ErrorCode::ContextExceeded,
        ErrorCode::PermissionDenied,
        ErrorCode::NotFound,
        ErrorCode::Overloaded,
        ErrorCode::Draining,
        ErrorCode::DeadlineExceeded,
        ErrorCode::Degraded,
        ErrorCode::Poisoned,
        ErrorCode::JournalUnavailable,
        ErrorCode::Internal,
        ErrorCode::Cancelled,
    ];
    for code in codes {
        let name = serde_json::to_string(&code).unwrap();
        let row = format!("| `{}` |", name.trim_matches('"'));
        assert!(specification.contains(&row), "no row {row}");
    }
}

#[test]
fn a_minimal_request_gets_the_defaults() {
    let json = r#"{"type":"generate","id":1,"request":{"prompt":{"text":"hi"}}}"#;
    let ClientMessage::Generate { request, .. } = serde_json::from_str(json).unwrap() else {
        panic!("not generate")
    };
    assert_eq!(request.prompt, Prompt::Text("hi".into()));
    assert_eq!((request.max_tokens, request.sampling.temperature, request.sampling.seed), (128, 0.0, None));
    let typo = r#"{"type":"generate","id":1,"request":{"prompt":{"text":"hi"},"max_token":3}}"#;
    let error = serde_json::from_str::<ClientMessage>(typo).unwrap_err().to_string();
    assert!(error.contains("unknown field `max_token`"), "{error}");
}

#[test]
fn handshakes_refuse_other_versions_other_messages_and_long_names() {
    let hello = |version, client: &str| ClientMessage::Hello { version, client: client.into() };
    assert_eq!(check_client_hello(hello(PROTOCOL_VERSION, "me/1")).unwrap(), "me/1");
    let error = check_client_hello(hello(PROTOCOL_VERSION + 1, "me/1")).unwrap_err();
    assert_eq!(error.code, ErrorCode::UnsupportedVersion);
    assert_eq!(error.message, "the client speaks protocol version 2, this side speaks 1");
    assert_eq!(check_client_hello(ClientMessage::Status).unwrap_err().code, ErrorCode::BadMessage);
    assert_eq!(
        check_client_hello(hello(PROTOCOL_VERSION, &"x".repeat(129))).unwrap_err().code,
        ErrorCode::BadMessage
    );
    let refusal = WireError::new(ErrorCode::Overloaded, "too many connections").with_retry_after_ms(10);
    let refused = check_welcome(ServerMessage::Error { id: None, error: refusal.clone() }).unwrap_err();
    assert_eq!(refused, refusal);
}

#[test]
fn exit_codes_are_unique_and_known_by_number() {
    for code in ExitCode::ALL {
        assert_eq!(ExitCode::from_raw(i32::from(code as u8)), Some(code));
    }
    assert_eq!(ExitCode::from_raw(42), None);
}
