//! As much of HTTP/1.1 as Firecracker's API speaks: a request, and an answer that is bounded in length and time.

use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serde_json::Value;

/// Longest answer, in bytes.
const ANSWER_MAX: usize = 1 << 20;

/// Most header fields of an answer.
const HEADERS_MAX: usize = 32;

pub(super) fn request_text(method: &str, path: &str, body: Option<&Value>) -> String {
    let head =
        format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n");
    match body {
        None => format!("{head}\r\n"),
        Some(body) => {
            let body = body.to_string();
            format!(
                "{head}Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
                body.len()
            )
        }
    }
}

pub(super) struct Answer {
    pub status: u16,
    pub body: Vec<u8>,
}

#[derive(Debug)]
pub(super) enum AnswerError {
    Io(io::Error),
    NotHttp(String),
}

pub(super) fn read_answer(socket: &mut UnixStream, time: Duration) -> Result<Answer, AnswerError> {
    let start = Instant::now();
    let mut bytes = Vec::new();
    let mut piece = [0; 4096];
    loop {
        if let Some(answer) = parse_answer(&bytes).map_err(AnswerError::NotHttp)? {
            return Ok(answer);
        }
        if bytes.len() > ANSWER_MAX {
            return Err(AnswerError::NotHttp("its answer is too long".to_owned()));
        }
        let left = time
            .checked_sub(start.elapsed())
            .filter(|left| !left.is_zero())
            .ok_or_else(|| AnswerError::Io(io::ErrorKind::TimedOut.into()))?;
        socket
            .set_read_timeout(Some(left))
            .map_err(AnswerError::Io)?;
        match socket.read(&mut piece) {
            Ok(0) => return Err(AnswerError::Io(io::ErrorKind::UnexpectedEof.into())),
            Ok(length) => bytes.extend_from_slice(&piece[..length]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                return Err(AnswerError::Io(io::ErrorKind::TimedOut.into()));
            }
            Err(error) => return Err(AnswerError::Io(error)),
        }
    }
}

/// The answer, once it is whole.
fn parse_answer(bytes: &[u8]) -> Result<Option<Answer>, String> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut response = httparse::Response::new(&mut headers);
    let head = match response.parse(bytes).map_err(|error| error.to_string())? {
        httparse::Status::Partial => return Ok(None),
        httparse::Status::Complete(head) => head,
    };
    let status = response.code.unwrap_or_default();
    let length = response
        .headers
        .iter()
        .find(|header| header.name.eq_ignore_ascii_case("content-length"))
        .map(|header| {
            std::str::from_utf8(header.value)
                .ok()
                .and_then(|value| value.trim().parse::<usize>().ok())
                .filter(|&length| length <= ANSWER_MAX)
                .ok_or_else(|| "its answer has a wrong Content-Length".to_owned())
        })
        .transpose()?
        .unwrap_or(0);
    // No content, whatever a header says.
    let length = if status == 204 { 0 } else { length };
    Ok(bytes.get(head..head + length).map(|body| Answer {
        status,
        body: body.to_owned(),
    }))
}
