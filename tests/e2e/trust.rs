//! Who has not the right ticket learns so in words, is seen, and disturbs nothing.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};

use lazyvm_wire::trust::Fingerprint;
use lazyvm_wire::{Secret, Ticket};

use crate::common::{Home, Program, can_move, fifo, wait_for};

/// Lines of a server's log that tell of somebody who was not let in.
fn refusals(serve: &Program) -> usize {
    serve
        .log()
        .lines()
        .filter(|line| line.contains("refused: "))
        .count()
}

/// Resumes with a ticket that is not good, and gives what that says.
fn turned_away(home: &Home, serve: &Program, name: &str, ticket: &str) -> String {
    let before = refusals(serve);
    let log = home.resume(name, ticket, &[]).ends_with(3);
    wait_for("line in the server's log", || {
        (refusals(serve) > before).then_some(())
    });
    // It came with both lanes, or gave up when it heard about the first.
    assert!(refusals(serve) <= before + 2, "{}", serve.log());
    log
}

#[test]
fn a_wrong_ticket_is_turned_away_and_the_right_one_still_works() {
    if !can_move("a_wrong_ticket_is_turned_away_and_the_right_one_still_works") {
        return;
    }
    let home = Home::new();
    let mut run = home.run("a", "16M", &[]);
    let (mut serve, text) = home.serve("serve", "a", &[]);
    let ticket = Ticket::parse(&text).unwrap();

    let wrong_secret = Ticket {
        secret: Secret::from_bytes([7; 32]),
        ..ticket.clone()
    };
    let log = turned_away(&home, &serve, "secret", &wrong_secret.to_text());
    assert!(log.contains("wrong secret"), "{log}");

    let wrong_key = Ticket {
        server: Fingerprint([7; 32]),
        ..ticket
    };
    let log = turned_away(&home, &serve, "key", &wrong_key.to_text());
    assert!(log.contains("wrong fingerprint"), "{log}");

    home.wait_ticks("a", 2);
    home.resume("b", &text, &["--verify"]).ends_with(0);
    serve.ends_with(0);
    run.ends_with(0);
}

#[test]
fn a_ticket_serves_one_destination() {
    if !can_move("a_ticket_serves_one_destination") {
        return;
    }
    let home = Home::new();
    let _run = home.run("a", "16M", &[]);
    let (mut serve, ticket) = home.serve("serve", "a", &[]);
    let hold = home.path("hold");
    fifo(&hold);
    let mut first = home.resume(
        "b",
        &ticket,
        &["--verify", "--serial", hold.to_str().unwrap()],
    );
    first.wait_log("connected to the source");

    let log = turned_away(&home, &serve, "second", &ticket);
    assert!(log.contains("used by another destination"), "{log}");

    let _reader = fs::File::open(&hold).unwrap();
    first.ends_with(0);
    serve.ends_with(0);
    assert_eq!(home.report("b")["verified"], true);
}

#[test]
fn an_expired_ticket_is_turned_away_and_the_machine_runs_on() {
    if !can_move("an_expired_ticket_is_turned_away_and_the_machine_runs_on") {
        return;
    }
    let home = Home::new();
    let mut run = home.run("a", "16M", &[]);
    let (mut serve, ticket) = home.serve("serve", "a", &["--ticket-lifetime", "1s"]);
    serve.wait_log("the ticket has expired");
    let log = turned_away(&home, &serve, "late", &ticket);
    assert!(
        log.contains("has expired") && log.contains("start lazyvm serve again"),
        "{log}"
    );
    home.wait_ticks("a", 2);
    assert!(serve.is_running() && run.is_running());

    // The machine can be served again.
    drop(serve);
    let (mut serve, ticket) = home.serve("serve2", "a", &[]);
    home.resume("b", &ticket, &[]).ends_with(0);
    serve.ends_with(0);
    run.ends_with(0);
}

#[test]
fn a_ticket_shows_nowhere_but_where_it_is_handed_out() {
    if !can_move("a_ticket_shows_nowhere_but_where_it_is_handed_out") {
        return;
    }
    let home = Home::new();
    let _run = home.run("a", "16M", &[]);
    let (file, sessions) = (home.path("ticket"), home.path("session"));
    let flags = [
        "-vv",
        "--ticket-file",
        file.to_str().unwrap(),
        "--session-dir",
        sessions.to_str().unwrap(),
        // Any address will do for whoever does not come by it.
        "--advertise",
        "127.0.0.1:9",
    ];
    let (mut serve, ticket) = home.serve("serve", "a", &flags);
    let parsed = Ticket::parse(&ticket).unwrap();
    assert_eq!(
        parsed.addresses,
        [SocketAddr::from((Ipv4Addr::LOCALHOST, 9))]
    );
    assert_eq!(fs::read_to_string(&file).unwrap().trim_end(), ticket);
    let others = |path| {
        std::os::unix::fs::PermissionsExt::mode(&fs::metadata(path).unwrap().permissions()) & 0o077
    };
    assert_eq!((others(&file), others(&sessions)), (0, 0));

    let port: u16 = listening(&serve);
    let reachable = Ticket {
        addresses: vec![(Ipv4Addr::LOCALHOST, port).into()],
        ..parsed
    }
    .to_text();
    let hold = home.path("hold");
    fifo(&hold);
    let mut resume = home.resume(
        "b",
        &reachable,
        &["-vv", "--serial", hold.to_str().unwrap()],
    );
    resume.wait_log("connected to the source");
    let shown = fs::read(format!("/proc/{}/cmdline", resume.pid())).unwrap();
    let shown = String::from_utf8_lossy(&shown);
    assert!(
        shown.contains("resume") && shown.contains("xxxxxxxx"),
        "{shown}"
    );
    assert!(
        !shown.contains(secret_part(&reachable)) && !shown.contains("lazyvm-ticket"),
        "{shown}"
    );

    let status = crate::common::lazyvm()
        .arg("status")
        .arg(&sessions)
        .arg("--json")
        .output()
        .unwrap();
    let status = String::from_utf8(status.stdout).unwrap();
    assert!(
        status.contains("\"phase\": \"offered\"") && !status.contains("key"),
        "{status}"
    );

    let _reader = fs::File::open(&hold).unwrap();
    for log in [resume.ends_with(0), serve.ends_with(0)] {
        assert!(log.contains("TRACE"), "everything is logged");
        for ticket in [&ticket, &reachable] {
            assert!(!log.contains(secret_part(ticket)), "a log shows the ticket");
        }
    }
    let output = crate::common::lazyvm()
        .args(["resume", &ticket, "too", "much"])
        .output()
        .unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(
        error.contains("TICKET") && !error.contains(secret_part(&ticket)),
        "{error}"
    );
}

/// A piece of a ticket's text that is made of its secret: that is 32 bytes, with nine behind them.
fn secret_part(ticket: &str) -> &str {
    &ticket[ticket.len() - 40..ticket.len() - 20]
}

/// The port that a server says it listens at.
fn listening(serve: &Program) -> u16 {
    let log = serve.log();
    let (_, rest) = log.split_once("listening=127.0.0.1:").unwrap();
    let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().unwrap()
}
