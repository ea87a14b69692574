//! The commands around a move: status, metrics, manual, completions, help.

use std::io::{Read, Write};
use std::net::TcpStream;

use serde_json::Value;

use crate::common::{Home, can_move, lazyvm, wait_for};

fn stdout(arguments: &[&str]) -> String {
    let output = lazyvm().args(arguments).output().unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn manual_completions_and_help_tell_of_every_command() {
    let commands = [
        "run",
        "serve",
        "resume",
        "snapshot",
        "status",
        "bench",
        "man",
        "completions",
    ];
    let (help, page) = (stdout(&["--help"]), stdout(&["man"]));
    for command in commands {
        assert!(
            help.contains(command) && page.contains(command),
            "{command}"
        );
        assert!(
            stdout(&["man", command]).contains(&format!("lazyvm\\-{command}")),
            "{command}"
        );
        for shell in ["bash", "zsh", "fish"] {
            assert!(
                stdout(&["completions", shell]).contains(command),
                "{shell} {command}"
            );
        }
    }
    for code in 0..=8 {
        assert!(
            help.contains(&format!("\n  {code}  ")) && page.contains(&format!("\n  {code}  ")),
            "{page}"
        );
    }
    assert!(stdout(&["resume", "--help"]).contains("A ticket is a secret"));
    let home = Home::new();
    stdout(&["man", "--dir", home.path("").to_str().unwrap()]);
    assert!(home.path("lazyvm-serve.1").exists());
}

#[test]
fn status_tells_of_a_machine_and_of_a_session() {
    if !can_move("status_tells_of_a_machine_and_of_a_session") {
        return;
    }
    let home = Home::new();
    let mut run = home.run("a", "16M", &[]);
    let sessions = home.path("session");
    let (mut serve, ticket) =
        home.serve("serve", "a", &["--session-dir", sessions.to_str().unwrap()]);
    let status = |target: &str| -> Value {
        serde_json::from_str(&stdout(&[
            "status",
            home.path(target).to_str().unwrap(),
            "--json",
        ]))
        .unwrap()
    };
    let machine = status("a");
    assert_eq!(
        (&machine["state"], &machine["memory_complete"]),
        (&"running".into(), &true.into()),
        "{machine}"
    );
    assert_eq!(machine["pid"], run.pid());
    let session = status("session");
    assert_eq!(
        (&session["phase"], &session["pid_runs"]),
        (&"offered".into(), &true.into()),
        "{session}"
    );
    assert_eq!(session["pid"], serve.pid());
    assert!(stdout(&["status", home.path("a").to_str().unwrap()]).contains("state:"));

    home.resume("b", &ticket, &[]).ends_with(0);
    serve.ends_with(0);
    run.ends_with(0);
    let session = status("session");
    assert_eq!(
        (&session["phase"], &session["pid_runs"]),
        (&"moved".into(), &false.into()),
        "{session}"
    );
}

#[test]
fn metrics_and_events_tell_how_far_a_move_is() {
    if !can_move("metrics_and_events_tell_how_far_a_move_is") {
        return;
    }
    let home = Home::new();
    let mut run = home.run("a", "16M", &[]);
    let (mut serve, ticket) = home.serve("serve", "a", &["--log-format", "json"]);
    let flags = [
        "--stay",
        "--status-addr",
        "127.0.0.1:0",
        "--log-format",
        "json",
    ];
    let resume = home.resume("b", &ticket, &flags);
    resume.wait_log("all memory is here");
    serve.ends_with(0);
    run.ends_with(0);
    let events = |log: &str| -> Vec<Value> {
        log.lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    };
    let events_here = events(&resume.log());
    assert!(
        events_here
            .iter()
            .any(|event| event["message"] == "progress" && event["pages_total"] == 4096)
    );
    assert!(
        events(&serve.log())
            .iter()
            .any(|event| event["message"] == "waiting for the destination")
    );

    let url = events_here
        .iter()
        .find_map(|event| event["url"].as_str())
        .unwrap();
    let address = url
        .strip_prefix("http://")
        .unwrap()
        .strip_suffix("/metrics")
        .unwrap();
    let get = |path: &str| -> String {
        let mut stream = TcpStream::connect(address).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    };
    let answer = wait_for("complete move in the metrics", || {
        Some(get("/metrics")).filter(|answer| answer.contains("\nlazyvm_complete 1\n"))
    });
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    assert!(
        answer.contains("\nlazyvm_pages 4096\n") && answer.contains("\nlazyvm_pages_here 4096\n"),
        "{answer}"
    );
    assert!(
        answer.contains("# TYPE lazyvm_faults_total counter"),
        "{answer}"
    );
    assert!(get("/").starts_with("HTTP/1.1 404"));
}
