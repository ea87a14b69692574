//! Resumes from a snapshot, as a user makes them: `snapshot` of a guest that works, `serve --snapshot` at the source,
//! `resume` at the destination, twice. The second time there is a profile of the first.
//!
//! A clone goes on from the pause of the snapshot, which is long ago. Its signs of life count as if the guest had been
//! paused at the order to resume.

use std::process::Command;
use std::time::Duration;

use super::clones::{self, Clones};
use super::emulator::SOURCE;
use super::guest::{Guest, Images};
use super::lazyvm::{TICKET_WITHIN, resumed, wait_for_ticket};
use super::process::pause;
use super::trial::{End, Record, SETTLE, Trial};
use super::{Setup, WanError, figures};

/// How long a snapshot may take.
const SNAPSHOT_WITHIN: Duration = Duration::from_secs(300);

/// The line of a snapshot's log that says how long the guest stood still in all, and what stands before the figure.
const COMPLETE: &str = "the snapshot is complete";
const PAUSE: &str = "pause_us=";

/// Two resumes from one snapshot.
pub struct Resumes {
    /// How long the guest stood still for the snapshot, in microseconds.
    pub pause_us: u64,
    /// Without a profile.
    pub first: Record,
    /// With that of the first.
    pub profiled: Record,
    /// Many at once, where that was asked for.
    pub clones: Option<Clones>,
}

/// Takes a snapshot of a guest, which ends then, and resumes it twice.
///
/// # Errors
/// [`WanError`].
pub fn run(setup: &Setup, images: Option<&Images>) -> Result<Resumes, WanError> {
    let trial = Trial::new(setup, images)?;
    let guest = trial.start_guest()?;
    // The guest's own speed, which it is to have again.
    pause(figures::BASELINE)?;
    let pause_us = take(&trial, setup)?;
    drop(guest);
    trial.forget(End::Source)?;
    let ticket = trial.file("ticket");
    let mut command = Command::new(&setup.lazyvm);
    command
        .args(["serve", "--snapshot"])
        .arg(trial.file("snapshot"))
        .args(["--listen", &format!("{SOURCE}:0"), "--ticket-file"])
        .arg(&ticket)
        .args(&setup.serve_flags);
    let mut serve = trial.start(End::Source, "serve", command)?;
    wait_for_ticket(&mut serve, &ticket, TICKET_WITHIN)?;
    let mut resume = |name: &str| -> Result<Record, WanError> {
        // What ended before leaves much to be freed and written.
        pause(SETTLE)?;
        trial.cut_line();
        let order = trial.order_of_clone();
        let (record, clone) = resumed(&trial, setup, &ticket, name, &order)?;
        drop(clone);
        trial.forget(End::Destination)?;
        serve.check()?;
        Ok(record)
    };
    let (first, profiled) = (resume("first")?, resume("profiled")?);
    let clones = (setup.clones > 1).then(|| clones::run(&trial, setup, &ticket));
    Ok(Resumes {
        pause_us,
        first,
        profiled,
        clones: clones.transpose()?,
    })
}

/// Takes the snapshot; gives how long the guest stood still.
fn take(trial: &Trial<'_>, setup: &Setup) -> Result<u64, WanError> {
    let mut command = Command::new(&setup.lazyvm);
    let kind = match setup.guest {
        Guest::Payload => "--vm",
        Guest::Qemu => "--qemu",
    };
    command
        .args(["snapshot", kind])
        .arg(trial.socket(End::Source))
        .arg(trial.file("snapshot"));
    let mut snapshot = trial.start(End::Source, "snapshot", command)?;
    snapshot.wait_for_end("the snapshot", SNAPSHOT_WITHIN)?;
    let log = snapshot.last_words();
    let line = log.lines().find(|line| line.contains(COMPLETE));
    let told = line.and_then(|line| line.split(PAUSE).nth(1)).map(|rest| {
        let end = rest.find(|c: char| !c.is_ascii_digit());
        rest[..end.unwrap_or(rest.len())].parse().ok()
    });
    told.flatten().ok_or(WanError::TooLate {
        what: "what lazyvm snapshot says of its pause",
        seconds: 0,
        log,
    })
}
