//! QEMUs with the guest, as a user starts them.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use crate::common::{Home, Program, Tick, lazyvm, skip, wait_for};

/// Kernel and first program, made once.
struct Images {
    kernel: PathBuf,
    initrd: PathBuf,
    _folder: tempfile::TempDir,
}

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

fn images() -> Result<&'static Images, &'static str> {
    static IMAGES: OnceLock<Result<Images, String>> = OnceLock::new();
    IMAGES.get_or_init(make).as_ref().map_err(String::as_str)
}

/// The kernel that `.ci/set-up test` has fetched, and an archive with the guest's program.
fn make() -> Result<Images, String> {
    let target = Path::new(env!("CARGO_BIN_EXE_lazyvm"))
        .ancestors()
        .nth(2)
        .ok_or("no target directory")?;
    let kernel = target.join("guest-kernel").join("vmlinuz");
    if !kernel.is_file() {
        return Err(format!(
            "no kernel at {}; .ci/set-up test fetches it",
            kernel.display()
        ));
    }
    if Command::new("qemu-system-x86_64")
        .arg("--version")
        .output()
        .is_err()
    {
        return Err("no qemu-system-x86_64; .ci/set-up test installs it".to_owned());
    }
    let folder = tempfile::tempdir().map_err(|error| error.to_string())?;
    let init = folder.path().join("init");
    let compiled = Command::new("gcc")
        .args([
            "-O2",
            "-static",
            "-nostdlib",
            "-ffreestanding",
            "-fno-stack-protector",
            "-fno-pie",
            "-no-pie",
            "-o",
        ])
        .arg(&init)
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/qemu/init.c"))
        .status()
        .map_err(|error| format!("gcc: {error}"))?;
    if !compiled.success() {
        return Err("gcc does not compile the guest's program".to_owned());
    }
    let initrd = folder.path().join("initrd");
    let program = fs::read(&init).map_err(|error| error.to_string())?;
    fs::write(&initrd, archive(&program)).map_err(|error| error.to_string())?;
    Ok(Images {
        kernel,
        initrd,
        _folder: folder,
    })
}

/// A `newc` archive (`cpio(5)`) with `/dev/console` and `/init`.
fn archive(init: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut entry = |name: &str, mode: u32, device: (u32, u32), data: &[u8]| {
        let header = [
            0,
            mode,
            0,
            0,
            1,
            0,
            data.len() as u32,
            0,
            0,
            device.0,
            device.1,
            name.len() as u32 + 1,
            0,
        ];
        out.extend_from_slice(b"070701");
        for field in header {
            write!(out, "{field:08x}").unwrap();
        }
        out.extend_from_slice(name.as_bytes());
        out.push(0);
        out.resize(out.len().next_multiple_of(4), 0);
        out.extend_from_slice(data);
        out.resize(out.len().next_multiple_of(4), 0);
    };
    entry("dev", 0o040_755, (0, 0), &[]);
    entry("dev/console", 0o020_600, (5, 1), &[]);
    entry("init", 0o100_755, (0, 0), init);
    entry("TRAILER!!!", 0, (0, 0), &[]);
    out
}

/// What is the same in every QEMU of a test.
#[derive(Clone, Copy)]
pub struct Shape {
    pub memory_mib: u64,
    pub cpus: u64,
    /// How much of its memory the guest fills and checks.
    pub fill_mib: u64,
}

/// The QEMUs of a test, each with a name.
pub struct Qemus {
    pub home: Home,
    /// RAM is a file on tmpfs.
    ram: tempfile::TempDir,
    pub shape: Shape,
}

impl Qemus {
    pub fn new(shape: Shape) -> Self {
        Self {
            home: Home::new(),
            ram: tempfile::tempdir_in("/dev/shm").unwrap(),
            shape,
        }
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
             -serial file:{} -qmp unix:{},server=on,wait=off",
            images.kernel.display(),
            images.initrd.display(),
            self.home.path(&format!("{name}.serial")).display(),
            self.qmp(name).display(),
        );
        let mut words: Vec<String> = words.split_whitespace().map(str::to_owned).collect();
        words.push("-append".to_owned());
        words.push(format!("console=ttyS0 quiet cpus={cpus} fill={fill_mib}"));
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
            Command::new(&words[0])
                .args(&words[1..])
                .stdout(Stdio::null()),
        )
    }

    /// `lazyvm serve --qemu` of the QEMU `name`, and its ticket; empty when it prints none.
    pub fn serve(&self, name: &str) -> (Program, String) {
        let mut command = lazyvm();
        command
            .args(["serve", "--listen", "127.0.0.1:0", "--qemu"])
            .arg(self.qmp(name))
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
        let mut command = lazyvm();
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
        let (mut serve, ticket) = self.serve(from);
        assert!(!ticket.is_empty(), "{}", serve.log());
        let mut resume = self.resume(to, &ticket, &self.command(to));
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
