//! The control stream: messages of `lazyvm_wire::control` over the first stream of a connection.

use lazyvm_wire::control::{ControlError, Decoder, encode};
use quinn::{ReadError, RecvStream, SendStream, WriteError};
use serde::{Serialize, de::DeserializeOwned};

/// Most bytes taken from the stream at a time.
const READ_MAX: usize = 64 * 1024;

/// A control stream that can't go on.
#[derive(Debug, thiserror::Error)]
pub enum ControlStreamError {
    /// What came is no message.
    #[error("the peer breaks the protocol")]
    Control(#[from] ControlError),
    /// The connection or the stream ended while a message was read.
    #[error("the control stream ended")]
    Read(#[from] ReadError),
    /// The connection or the stream ended while a message was written.
    #[error("the control stream ended")]
    Write(#[from] WriteError),
    /// The peer ended the stream in good order, but too early.
    #[error("the peer ended the control stream")]
    Finished,
}

/// The half that messages go out on.
#[derive(Debug)]
pub struct ControlSender(SendStream);

/// The half that messages come in on.
#[derive(Debug)]
pub struct ControlReceiver {
    stream: RecvStream,
    decoder: Decoder,
}

/// Both halves of the first stream, as QUIC opened or accepted it.
pub fn control_stream((send, recv): (SendStream, RecvStream)) -> (ControlSender, ControlReceiver) {
    (
        ControlSender(send),
        ControlReceiver {
            stream: recv,
            decoder: Decoder::default(),
        },
    )
}

impl ControlSender {
    /// Sends one message.
    ///
    /// # Errors
    /// When the message is too long, or the connection is lost.
    pub async fn send<M: Serialize>(&mut self, message: &M) -> Result<(), ControlStreamError> {
        self.0.write_chunk(encode(message)?.into()).await?;
        Ok(())
    }

    /// Ends the stream and waits until the peer has all of it, or is gone.
    pub async fn finish(&mut self) {
        if self.0.finish().is_ok() {
            let _ = self.0.stopped().await;
        }
    }
}

impl ControlReceiver {
    /// The next message, of at most `limit` bytes. Nothing is lost when the future is dropped before it is ready.
    ///
    /// # Errors
    /// When the peer sends something else, or is gone.
    pub async fn recv<M: DeserializeOwned>(
        &mut self,
        limit: usize,
    ) -> Result<M, ControlStreamError> {
        loop {
            if let Some(message) = self.decoder.next(limit)? {
                return Ok(message);
            }
            match self.stream.read_chunk(READ_MAX, true).await? {
                Some(chunk) => self.decoder.push(&chunk.bytes),
                None => return Err(ControlStreamError::Finished),
            }
        }
    }
}
