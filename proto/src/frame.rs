//! The frame codec: a little-endian `u32` length, then that many bytes of JSON.
//!
//! Three ways to use it over the same bytes: [`read_frame`] and [`write_frame`] on blocking streams, and
//! [`FrameDecoder`] for readers that get bytes as they come. Memory grows with the bytes that really arrived,
//! never with a length that a peer merely claims.

use std::io::{self, Read, Write};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{ErrorCode, WireError};
use crate::limits::{FRAME_BYTES_MAX, FRAME_HEADER_BYTES};

/// Why a frame could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The stream failed.
    #[error("cannot read or write a frame")]
    Io(#[source] io::Error),
    /// The stream ended inside a frame.
    #[error("the stream ended after {received} bytes of a frame of {expected}")]
    Cut {
        /// Bytes that came, header included.
        received: usize,
        /// Bytes the frame has, as far as is known.
        expected: usize,
    },
    /// The length in front is beyond the limit.
    #[error("frame of {bytes} bytes, the limit is {bytes_max}")]
    TooLarge {
        /// The length.
        bytes: usize,
        /// The limit.
        bytes_max: usize,
    },
    /// The payload is not a message of this link.
    #[error("not a message of this protocol: {reason}")]
    Payload {
        /// What is wrong and where.
        reason: String,
    },
    /// A message of ours cannot be written, such as one with a float that is not finite.
    #[error("cannot encode a message: {reason}")]
    Encode {
        /// What is wrong.
        reason: String,
    },
}

impl FrameError {
    /// What to tell the peer whose frame it was.
    #[must_use]
    pub fn to_wire(&self) -> WireError {
        match self {
            Self::Io(_) | Self::Encode { .. } => WireError::new(ErrorCode::Internal, self.to_string()),
            Self::Cut { .. } | Self::Payload { .. } => {
                WireError::new(ErrorCode::BadMessage, self.to_string())
                    .with_hint("the protocol is described in proto/PROTOCOL.md")
            }
            Self::TooLarge { .. } => WireError::new(ErrorCode::FrameTooLarge, self.to_string()),
        }
    }
}

/// One message as a whole frame, header included.
///
/// # Errors
/// [`FrameError::Encode`] if the message has a float that is not finite, [`FrameError::TooLarge`] beyond
/// [`FRAME_BYTES_MAX`].
pub fn encode_frame<T: Serialize>(message: &T) -> Result<Vec<u8>, FrameError> {
    let mut frame = vec![0; FRAME_HEADER_BYTES];
    serde_json::to_writer(&mut frame, message)
        .map_err(|source| FrameError::Encode { reason: source.to_string() })?;
    let bytes = frame.len() - FRAME_HEADER_BYTES;
    let too_large = FrameError::TooLarge { bytes, bytes_max: FRAME_BYTES_MAX };
    let Ok(header) = u32::try_from(bytes) else { return Err(too_large) };
    if bytes > FRAME_BYTES_MAX {
        return Err(too_large);
    }
    frame[..FRAME_HEADER_BYTES].copy_from_slice(&header.to_le_bytes());
    Ok(frame)
}

/// Writes one message. Each call is one `write_all`, so that frames of several threads behind one lock stay whole.
///
/// # Errors
/// Those of [`encode_frame`], and [`FrameError::Io`].
pub fn write_frame<T: Serialize>(mut writer: impl Write, message: &T) -> Result<(), FrameError> {
    let frame = encode_frame(message)?;
    writer.write_all(&frame).and_then(|()| writer.flush()).map_err(FrameError::Io)
}

/// Reads one message; `None` if the stream ends before its first byte.
///
/// # Errors
/// [`FrameError::Cut`] if it ends later, [`FrameError::TooLarge`], [`FrameError::Payload`], [`FrameError::Io`].
pub fn read_frame<T: DeserializeOwned>(mut reader: impl Read) -> Result<Option<T>, FrameError> {
    let mut header = Vec::with_capacity(FRAME_HEADER_BYTES);
    (&mut reader).take(FRAME_HEADER_BYTES as u64).read_to_end(&mut header).map_err(FrameError::Io)?;
    if header.is_empty() {
        return Ok(None);
    }
    let Ok(header) = <[u8; FRAME_HEADER_BYTES]>::try_from(header.as_slice()) else {
        return Err(FrameError::Cut { received: header.len(), expected: FRAME_HEADER_BYTES });
    };
    let bytes = payload_bytes(header, FRAME_BYTES_MAX)?;
    let mut payload = Vec::new();
    (&mut reader).take(bytes as u64).read_to_end(&mut payload).map_err(FrameError::Io)?;
    if payload.len() < bytes {
        return Err(FrameError::Cut {
            received: FRAME_HEADER_BYTES + payload.len(),
            expected: FRAME_HEADER_BYTES + bytes,
        });
    }
    decode_payload(&payload).map(Some)
}

fn payload_bytes(header: [u8; FRAME_HEADER_BYTES], bytes_max: usize) -> Result<usize, FrameError> {
    let bytes = usize::try_from(u32::from_le_bytes(header)).unwrap_or(usize::MAX);
    if bytes > bytes_max { Err(FrameError::TooLarge { bytes, bytes_max }) } else { Ok(bytes) }
}

fn decode_payload<T: DeserializeOwned>(payload: &[u8]) -> Result<T, FrameError> {
    serde_json::from_slice(payload).map_err(|source| FrameError::Payload { reason: source.to_string() })
}

/// Takes bytes as they come and gives back messages.
///
/// After an error the stream has no known frame boundary any more: close it. Until then at most one frame and
/// the bytes of one `push` are held.
#[derive(Debug)]
pub struct FrameDecoder {
    buffer: Vec<u8>,
    /// Bytes at the front of `buffer` that were given back already.
    consumed: usize,
    bytes_max: usize,
}

impl Default for FrameDecoder {
    fn default() -> Self {
        Self::new(FRAME_BYTES_MAX)
    }
}

impl FrameDecoder {
    /// A decoder that refuses payloads beyond `bytes_max`.
    #[must_use]
    pub fn new(bytes_max: usize) -> Self {
        Self { buffer: Vec::new(), consumed: 0, bytes_max }
    }

    /// Takes in what was just read. Call [`Self::next_message`] until it gives `None` before the next `push`.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.consumed > 0 {
            self.buffer.drain(..self.consumed);
            self.consumed = 0;
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole message, `None` if more bytes are needed.
    ///
    /// # Errors
    /// [`FrameError::TooLarge`] as soon as the header is there, [`FrameError::Payload`].
    pub fn next_message<T: DeserializeOwned>(&mut self) -> Result<Option<T>, FrameError> {
        let Some((header, rest)) = self.buffer[self.consumed..].split_first_chunk() else { return Ok(None) };
        let bytes = payload_bytes(*header, self.bytes_max)?;
        let Some(payload) = rest.get(..bytes) else { return Ok(None) };
        let message = decode_payload(payload)?;
        self.consumed += FRAME_HEADER_BYTES + bytes;
        if self.consumed == self.buffer.len() {
            self.consumed = 0;
            self.buffer.clear();
            // A huge frame must not pin its memory for the life of a quiet connection.
            self.buffer.shrink_to(64 << 10);
        }
        Ok(Some(message))
    }

    /// True between frames: the stream may end here.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.consumed == self.buffer.len()
    }

    /// The error for a stream that ended now; `None` if it may end here.
    #[must_use]
    pub fn cut(&self) -> Option<FrameError> {
        let rest = &self.buffer[self.consumed..];
        let expected = match rest.first_chunk() {
            _ if rest.is_empty() => return None,
            Some(header) => FRAME_HEADER_BYTES + payload_bytes(*header, self.bytes_max).unwrap_or(0),
            None => FRAME_HEADER_BYTES,
        };
        Some(FrameError::Cut { received: rest.len(), expected })
    }

    /// Bytes held now, for tests of the memory bound.
    #[must_use]
    pub fn buffered_bytes(&self) -> usize {
        self.buffer.capacity()
    }
}
