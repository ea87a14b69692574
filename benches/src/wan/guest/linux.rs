//! The Linux guest: a kernel that is there, and an archive with one program, compiled when it is needed.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::wan::WanError;

/// The program.
const SOURCE: &str = include_str!("init.c");

/// Where `.ci/set-up test` puts the kernel, seen from the directory that cargo builds into.
const KERNEL: &str = "guest-kernel/vmlinuz";

/// What the guest boots.
pub struct Images {
    /// A bzImage.
    pub kernel: PathBuf,
    /// An archive with `/init`.
    pub initrd: PathBuf,
}

impl Images {
    /// Compiles the program into `folder`. Without `kernel`, it is where the build's directories are.
    ///
    /// # Errors
    /// [`WanError`] says what is missing.
    pub fn make(folder: &Path, kernel: Option<&Path>) -> Result<Self, WanError> {
        let kernel = match kernel {
            Some(path) => path.to_owned(),
            None => built_for()?.join(KERNEL),
        };
        if !kernel.is_file() {
            return Err(WanError::NoKernel(kernel));
        }
        let version = Command::new("qemu-system-x86_64").arg("--version").output();
        if version.is_err() {
            return Err(WanError::Missing("qemu-system-x86_64"));
        }
        let program = compile(folder)?;
        let initrd = folder.join("initrd");
        fs::write(&initrd, archive(&program)?)?;
        Ok(Self { kernel, initrd })
    }
}

/// The directory that cargo builds into, if this program is still there.
fn built_for() -> Result<PathBuf, WanError> {
    let program = std::env::current_exe()?;
    let folder = program.ancestors().nth(2);
    Ok(folder.unwrap_or(Path::new("/")).to_owned())
}

fn compile(folder: &Path) -> Result<Vec<u8>, WanError> {
    let source = folder.join("init.c");
    let program = folder.join("init");
    fs::write(&source, SOURCE)?;
    let flags = "-O2 -static -nostdlib -ffreestanding -fno-stack-protector -fno-pie -no-pie -o";
    let compiled = Command::new("gcc")
        .args(flags.split(' '))
        .args([&program, &source])
        .output()
        .map_err(|_| WanError::Missing("gcc"))?;
    if !compiled.status.success() {
        let text = String::from_utf8_lossy(&compiled.stderr);
        return Err(WanError::Guest(text.trim().to_owned()));
    }
    Ok(fs::read(&program)?)
}

/// A `newc` archive (`cpio(5)`) with `/dev/console` and `/init`.
fn archive(init: &[u8]) -> Result<Vec<u8>, WanError> {
    let mut out = Vec::new();
    let mut entry = |name: &str, mode: u32, device: [u32; 2], data: &[u8]| {
        let [major, minor] = device;
        let name_bytes = name.len() as u32 + 1;
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
            major,
            minor,
            name_bytes,
            0,
        ];
        out.extend_from_slice(b"070701");
        for field in header {
            write!(out, "{field:08x}")?;
        }
        out.extend_from_slice(name.as_bytes());
        out.push(0);
        out.resize(out.len().next_multiple_of(4), 0);
        out.extend_from_slice(data);
        out.resize(out.len().next_multiple_of(4), 0);
        Ok::<(), std::io::Error>(())
    };
    entry("dev", 0o040_755, [0, 0], &[])?;
    entry("dev/console", 0o020_600, [5, 1], &[])?;
    entry("init", 0o100_755, [0, 0], init)?;
    entry("TRAILER!!!", 0, [0, 0], &[])?;
    Ok(out)
}
