//! For tests: somebody at a QMP socket who answers as a QEMU would not, or not at will: late, never, or with what was not
//! asked for.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread;

use serde_json::{Value, json};

use super::qmp::Qmp;

const GREETING: &str =
    "{\"QMP\":{\"version\":{\"qemu\":{\"major\":9,\"minor\":1,\"micro\":0}}}}\r\n";

/// The side of a connection that answers.
pub(super) struct Peer(UnixStream);

impl Peer {
    /// Greets as QEMU does.
    pub fn greet(stream: UnixStream) -> Self {
        let mut peer = Self(stream);
        peer.0.write_all(GREETING.as_bytes()).unwrap();
        peer
    }

    /// Says this line. The other side may have had enough.
    pub fn say(&mut self, message: &Value) {
        let _ = self.0.write_all(format!("{message}\r\n").as_bytes());
    }

    /// Answers a command.
    pub fn answer(&mut self, request: &Value, value: Value) {
        self.say(&json!({ "return": value, "id": request["id"] }));
    }

    /// Refuses a command.
    pub fn refuse(&mut self, request: &Value, text: &str) {
        let error = json!({ "class": "GenericError", "desc": text });
        self.say(&json!({ "error": error, "id": request["id"] }));
    }

    /// Somebody who says this and goes.
    pub fn greeting_with<T>(greeting: &str, talk: impl FnOnce(&Path) -> T) -> T {
        listening(
            |mut stream| {
                let _ = stream.write_all(greeting.as_bytes());
            },
            talk,
        )
    }
}

/// Talks to somebody who greets as QEMU does and gives each command to `answer`, until that returns false or the other
/// side goes.
pub(super) fn conversation<T>(
    mut answer: impl FnMut(&mut Peer, &Value) -> bool + Send,
    talk: impl FnOnce(Qmp) -> T,
) -> T {
    let serve = |stream: UnixStream| {
        let lines = BufReader::new(stream.try_clone().unwrap()).lines();
        let mut peer = Peer::greet(stream);
        for line in lines.map_while(Result::ok) {
            let request: Value = serde_json::from_str(&line).unwrap();
            if request["execute"] == "qmp_capabilities" {
                peer.answer(&request, json!({}));
            } else if !answer(&mut peer, &request) {
                return;
            }
        }
    };
    // Gone when this returns, so that the other side ends.
    listening(serve, |path| talk(Qmp::connect(path).unwrap()))
}

/// Talks to somebody who does this with the connection.
pub(super) fn listening<T>(
    serve: impl FnOnce(UnixStream) + Send,
    talk: impl FnOnce(&Path) -> T,
) -> T {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("qmp");
    let listener = UnixListener::bind(&path).unwrap();
    thread::scope(|scope| {
        scope.spawn(|| serve(listener.accept().unwrap().0));
        talk(&path)
    })
}
