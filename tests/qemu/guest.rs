//! QEMUs with the guest, as a user starts them.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::common::{Home, Program, Tick, skip, wait_for};
use crate::hosts::{Hosts, end_all_of};
use crate::images::images;

/// Whether QEMUs with the guest can be moved here.
pub fn can_move(test: &str) -> bool {
    if !nix::unistd::geteuid().is_root() {
        skip(test, "only root can look into every process");
        return false;
    }
    if let Err(why) = images() {
        skip(test, why);
        return false;
    }
    true
}

/// What is the same in every QEMU of a test.
#[derive(Clone, Copy)]
pub struct Shape {
    pub memory_mib: u64,
    pub cpus: u64,
    /// How much of its memory the guest fills and checks.
    pub fill_mib: u64,
}

/// The QEMUs of a test, each with a name. Dropped, they end, wherever they are.
pub struct Qemus {
    pub home: Home,
    /// RAM is a file on tmpfs.
    ram: tempfile::TempDir,
    pub shape: Shape,
    /// Further arguments, with spaces between them.
    pub devices: String,
    /// Further words of the kernel's command line.
    pub append: String,
    /// Where moves go to and fro; without them, all is on this one.
    hosts: Option<Hosts>,
    /// The names on the second host.
    away: Vec<String>,
}

impl Qemus {
    pub fn new(shape: Shape) -> Self {
        Self {
            home: Home::new(),
            ram: tempfile::tempdir_in("/dev/shm").unwrap(),
            shape,
            devices: String::new(),
            append: String::new(),
            hosts: None,
            away: Vec::new(),
        }
    }

    /// Of these names each is on the other host than the one before.
    pub fn on_two_hosts(shape: Shape, names: &[&str]) -> Self {
        let mut qemus = Self::new(shape);
        qemus.hosts = Some(Hosts::new());
        let away = names.iter().skip(1).step_by(2);
        qemus.away = away.map(|&name| name.to_owned()).collect();
        qemus
    }

    /// A command where the QEMU `name` is.
    fn on_host_of(&self, name: &str, program: &str) -> Command {
        match &self.hosts {
            Some(hosts) => hosts.on(self.host_of(name), program),
            None => Command::new(program),
        }
    }

    fn host_of(&self, name: &str) -> usize {
        usize::from(self.away.iter().any(|away| away == name))
    }

    /// Where RAM files are.
    pub fn ram(&self) -> &Path {
        self.ram.path()
    }

    /// The whole command of the QEMU `name`.
    pub fn command(&self, name: &str) -> Vec<String> {
        self.command_with_ram(
            name,
            &format!(
                "memory-backend-file,id=ram0,mem-path={},share=on,size={}M",
                self.ram.path().join(name).display(),
                self.shape.memory_mib
            ),
        )
    }

    /// With another backend.
    pub fn command_with_ram(&self, name: &str, backend: &str) -> Vec<String> {
        let images = images().unwrap();
        let Shape {
            memory_mib,
            cpus,
            fill_mib,
        } = self.shape;
        let words = format!(
            "qemu-system-x86_64 -accel tcg,thread=multi -m {memory_mib}M -smp {cpus} -object {backend} \
             -machine memory-backend=ram0 -nodefaults -display none -kernel {} -initrd {} \
             -serial file:{} -qmp unix:{},server=on,wait=off {}",
            images.kernel.display(),
            images.initrd.display(),
            self.home.path(&format!("{name}.serial")).display(),
            self.qmp(name).display(),
            self.devices,
        );
        let mut words: Vec<String> = words.split_whitespace().map(str::to_owned).collect();
        words.push("-append".to_owned());
        words.push(format!(
            "console=ttyS0 quiet cpus={cpus} fill={fill_mib} {}",
            self.append
        ));
        words
    }

    pub fn qmp(&self, name: &str) -> PathBuf {
        self.home.path(&format!("{name}.qmp"))
    }

    /// Starts the QEMU `name` and waits until its guest works.
    pub fn start(&self, name: &str) -> Program {
        let qemu = self.launch(name, &self.command(name));
        self.wait_ticks(name, 3);
        qemu
    }

    pub fn launch(&self, name: &str, words: &[String]) -> Program {
        self.home.start(
            name,
            self.on_host_of(name, &words[0])
                .args(&words[1..])
                .stdout(Stdio::null()),
        )
    }

    /// `lazyvm serve --qemu` of the QEMU `name`, and its ticket; empty when it prints none.
    pub fn serve(&self, name: &str) -> (Program, String) {
        self.serve_with(name, &[])
    }

    /// With further arguments.
    pub fn serve_with(&self, name: &str, flags: &[&str]) -> (Program, String) {
        let address = match self.hosts {
            Some(_) => Hosts::address(self.host_of(name)),
            None => "127.0.0.1".to_owned(),
        };
        let mut command = self.on_host_of(name, env!("CARGO_BIN_EXE_lazyvm"));
        command
            .args(["serve", "--listen", &format!("{address}:0"), "--qemu"])
            .arg(self.qmp(name))
            .args(flags)
            .stdout(Stdio::piped());
        let mut serve = self.home.start(&format!("serve-{name}"), &mut command);
        let mut ticket = String::new();
        BufReader::new(serve.stdout())
            .read_line(&mut ticket)
            .unwrap();
        (serve, ticket.trim_end().to_owned())
    }

    /// `lazyvm resume --qemu` with a command for the QEMU `name`.
    pub fn resume(&self, name: &str, ticket: &str, words: &[String]) -> Program {
        let mut command = self.on_host_of(name, env!("CARGO_BIN_EXE_lazyvm"));
        command
            .args(["resume", ticket, "--verify", "--report"])
            .arg(self.home.path(&format!("{name}.json")))
            .args(["--qemu", "--"])
            .args(words)
            .stdout(Stdio::null());
        self.home.start(&format!("resume-{name}"), &mut command)
    }

    /// Moves the VM from one QEMU to another, new one.
    pub fn move_on(&self, from: &str, to: &str) -> serde_json::Value {
        self.move_to(from, to, &self.command(to))
    }

    /// With a command for the new one.
    pub fn move_to(&self, from: &str, to: &str, words: &[String]) -> serde_json::Value {
        let (mut serve, ticket) = self.serve(from);
        assert!(!ticket.is_empty(), "{}", serve.log());
        let mut resume = self.resume(to, &ticket, words);
        resume.ends_with(0);
        serve.ends_with(0);
        let report = self.home.report(to);
        assert_eq!(report["verified"], true, "{report}");
        let _ = fs::remove_file(self.ram.path().join(from));
        report
    }

    /// Whole lines of the QEMU `name`'s guest. A move may cut one in two.
    pub fn ticks(&self, name: &str) -> Vec<Tick> {
        self.home.ticks(name)
    }

    /// Waits for more ticks; none may tell of an error.
    pub fn wait_ticks(&self, name: &str, more: usize) -> Vec<Tick> {
        let ticks = self.home.wait_ticks(name, more);
        assert!(ticks.iter().all(|tick| tick.errors == 0), "{ticks:?}");
        ticks
    }

    /// What the QEMU `name`'s guest last said of its load.
    pub fn load(&self, name: &str) -> Option<Load> {
        let text =
            fs::read_to_string(self.home.path(&format!("{name}.serial"))).unwrap_or_default();
        let (whole, _) = text.rsplit_once('\n')?;
        whole.lines().rev().find_map(Load::parse)
    }

    /// Runs a command of QMP in the QEMU `name`, and gives the line that it answers with.
    pub fn qmp_command(&self, name: &str, command: &str) -> String {
        // It serves one after the other.
        wait_for("answer of QMP", || {
            let mut stream = UnixStream::connect(self.qmp(name)).ok()?;
            stream
                .write_all(b"{\"execute\":\"qmp_capabilities\"}")
                .ok()?;
            stream.write_all(command.as_bytes()).ok()?;
            // The greeting, and one answer for each command.
            BufReader::new(stream)
                .lines()
                .map_while(Result::ok)
                .filter(|line| !line.contains("\"event\""))
                .nth(2)
        })
    }

    /// Ends the QEMU `name`, which is nobody's child any more.
    pub fn quit(&self, name: &str) {
        if let Ok(mut stream) = UnixStream::connect(self.qmp(name)) {
            let _ = stream.write_all(b"{\"execute\":\"qmp_capabilities\"}{\"execute\":\"quit\"}\n");
            let mut lines = BufReader::new(stream).lines();
            // It closes when it ends.
            while let Some(Ok(_)) = lines.next() {}
        }
    }

    /// Waits until nobody answers at the QEMU `name`'s socket.
    pub fn wait_gone(&self, name: &str) {
        wait_for("end of QEMU", || {
            UnixStream::connect(self.qmp(name)).is_err().then_some(())
        });
    }
}

impl Drop for Qemus {
    fn drop(&mut self) {
        end_all_of(&self.home.path(""));
    }
}

/// How often each part of the load was done, and how often it was wrong.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    pub disk: (u64, u64),
    pub tcp: (u64, u64),
    pub net: (u64, u64),
}

impl Load {
    fn parse(line: &str) -> Option<Self> {
        let words: Vec<_> = line.trim_end().split(' ').collect();
        let &["load", "disk", d, de, "tcp", t, te, "net", n, ne, "lost", _] = &words[..] else {
            return None;
        };
        let pair = |done: &str, errors: &str| Some((done.parse().ok()?, errors.parse().ok()?));
        Some(Self {
            disk: pair(d, de)?,
            tcp: pair(t, te)?,
            net: pair(n, ne)?,
        })
    }

    pub fn errors(&self) -> u64 {
        self.disk.1 + self.tcp.1 + self.net.1
    }

    /// Whether each part has gone on so much since.
    pub fn has_gone_on(&self, since: &Self, turns: u64) -> bool {
        self.disk.0 >= since.disk.0 + turns
            && self.tcp.0 >= since.tcp.0 + turns
            && self.net.0 >= since.net.0 + turns
    }
}
