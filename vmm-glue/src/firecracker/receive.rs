//! Taking the handshake off the page-fault socket.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};

use super::handshake::{DESCRIPTORS_MAX, Decoder, Handshake, HandshakeError};
use super::sys;

/// Bytes that are read at a time.
const PIECE: usize = 16 * 1024;

/// A handshake that did not come.
#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    /// It is wrong.
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
    /// It does not come.
    #[error(
        "Firecracker connected to the page-fault socket and did not end its message within {0:?}"
    )]
    Silent(Duration),
    /// The socket.
    #[error("the page-fault socket can't be read")]
    Socket(#[source] io::Error),
}

/// Reads a handshake and its userfaultfd, within `time`.
pub(super) fn receive(
    socket: &UnixStream,
    time: Duration,
) -> Result<(Handshake, OwnedFd), ReceiveError> {
    let start = Instant::now();
    let mut decoder = Decoder::default();
    let mut descriptors = Vec::new();
    let mut piece = vec![0; PIECE];
    loop {
        let left = time
            .checked_sub(start.elapsed())
            .filter(|left| !left.is_zero())
            .ok_or(ReceiveError::Silent(time))?;
        socket
            .set_read_timeout(Some(left))
            .map_err(ReceiveError::Socket)?;
        let (length, cut) = match receive_piece(socket, &mut piece, &mut descriptors) {
            Ok(received) => received,
            Err(Errno::EINTR) => continue,
            Err(Errno::EAGAIN) => return Err(ReceiveError::Silent(time)),
            Err(errno) => return Err(ReceiveError::Socket(errno.into())),
        };
        if cut {
            return Err(HandshakeError::DescriptorsCut.into());
        }
        if descriptors.len() > DESCRIPTORS_MAX {
            return Err(HandshakeError::Descriptors(descriptors.len()).into());
        }
        if length == 0 {
            return Err(decoder.end().into());
        }
        if let Some(handshake) = decoder.push(&piece[..length])? {
            return Ok((handshake, the_userfaultfd(descriptors)?));
        }
    }
}

/// Reads once: how many bytes, and whether descriptors were lost. Those that came are in `descriptors` in any case, so
/// that they are closed.
fn receive_piece(
    socket: &UnixStream,
    piece: &mut [u8],
    descriptors: &mut Vec<OwnedFd>,
) -> Result<(usize, bool), Errno> {
    let mut space = nix::cmsg_space!([i32; DESCRIPTORS_MAX]);
    let mut buffers = [IoSliceMut::new(piece)];
    let message = recvmsg::<()>(
        socket.as_raw_fd(),
        &mut buffers,
        Some(&mut space),
        MsgFlags::MSG_CMSG_CLOEXEC,
    )?;
    let cut = message.flags.contains(MsgFlags::MSG_CTRUNC);
    // Refused as a whole by nix where it was cut; what came by then is closed with this process.
    if let Ok(messages) = message.cmsgs() {
        for message in messages {
            if let ControlMessageOwned::ScmRights(came) = message {
                descriptors.extend(came.into_iter().map(sys::own));
            }
        }
    }
    Ok((message.bytes, cut))
}

fn the_userfaultfd(mut descriptors: Vec<OwnedFd>) -> Result<OwnedFd, HandshakeError> {
    if descriptors.is_empty() {
        return Err(HandshakeError::Descriptors(0));
    }
    let first = descriptors.swap_remove(0);
    let link = format!("/proc/self/fd/{}", first.as_raw_fd());
    let kind = std::fs::read_link(link).map_or_else(
        |error| error.to_string(),
        |kind| kind.to_string_lossy().into_owned(),
    );
    if kind != "anon_inode:[userfaultfd]" {
        return Err(HandshakeError::NotUserfaultfd(kind));
    }
    if !descriptors.is_empty() {
        tracing::warn!(
            more = descriptors.len(),
            "Firecracker sent more descriptors than its userfaultfd; they are not used"
        );
    }
    Ok(first)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{IoSlice, Write};

    use nix::sys::socket::{ControlMessage, sendmsg};

    use super::*;

    const MESSAGE: &[u8] = br#"[{"base_host_virt_addr":4096,"size":4096,"offset":0}]"#;
    const SOON: Duration = Duration::from_millis(300);

    fn send(socket: &UnixStream, bytes: &[u8], descriptors: &[i32]) {
        let rights = [ControlMessage::ScmRights(descriptors)];
        let control = if descriptors.is_empty() {
            &[][..]
        } else {
            &rights
        };
        let pieces = [IoSlice::new(bytes)];
        sendmsg::<()>(
            socket.as_raw_fd(),
            &pieces,
            control,
            MsgFlags::empty(),
            None,
        )
        .unwrap();
    }

    fn refusal(bytes: &[u8], descriptors: usize) -> String {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let files: Vec<File> = (0..descriptors)
            .map(|_| File::open("/dev/null").unwrap())
            .collect();
        let numbers: Vec<i32> = files.iter().map(AsRawFd::as_raw_fd).collect();
        send(&theirs, bytes, &numbers);
        drop(theirs);
        receive(&ours, SOON).unwrap_err().to_string()
    }

    #[test]
    fn what_is_no_handshake_is_refused_in_words() {
        assert!(refusal(MESSAGE, 0).contains("0 descriptors came"));
        assert!(refusal(MESSAGE, 1).contains("no userfaultfd, but /dev/null"));
        assert!(refusal(MESSAGE, 4).contains("4 descriptors came"));
        let cut = refusal(MESSAGE, 9);
        assert!(
            cut.contains("descriptors that came on the page-fault socket were cut short"),
            "{cut}"
        );
        assert!(refusal(b"[{", 1).contains("closed the page-fault socket after 2 bytes"));
        assert!(refusal(b"hello", 1).contains("does not begin with ["));
    }

    #[test]
    fn silence_ends() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(b"[").unwrap();
        let error = receive(&ours, SOON).unwrap_err();
        assert!(matches!(error, ReceiveError::Silent(_)), "{error}");
    }

    #[test]
    fn a_descriptor_that_is_refused_is_closed() {
        let (reader, writer) = std::io::pipe().unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        send(&theirs, MESSAGE, &[writer.as_raw_fd(), writer.as_raw_fd()]);
        drop(writer);
        receive(&ours, SOON).unwrap_err();
        // All writing ends are closed, so there is an end to read.
        assert_eq!(std::io::read_to_string(reader).unwrap(), "");
    }
}
