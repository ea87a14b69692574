//! The kernel and the archive that every guest boots, made once.

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// Kernel and first programs, where every user may read them.
pub struct Images {
    pub kernel: PathBuf,
    pub initrd: PathBuf,
    _folder: tempfile::TempDir,
}

pub fn images() -> Result<&'static Images, &'static str> {
    static IMAGES: OnceLock<Result<Images, String>> = OnceLock::new();
    IMAGES.get_or_init(make).as_ref().map_err(String::as_str)
}

/// The kernel that `.ci/set-up test` has fetched, and an archive with the guest's program and drivers.
fn make() -> Result<Images, String> {
    let target = Path::new(env!("CARGO_BIN_EXE_lazyvm"))
        .ancestors()
        .nth(2)
        .ok_or("no target directory")?;
    let fetched = target.join("guest-kernel");
    for part in ["vmlinuz", "modules"] {
        let part = fetched.join(part);
        if !part.exists() {
            return Err(format!(
                "there is no {}; .ci/set-up test fetches it",
                part.display()
            ));
        }
    }
    if Command::new("qemu-system-x86_64")
        .arg("--version")
        .output()
        .is_err()
    {
        return Err("no qemu-system-x86_64; .ci/set-up test installs it".to_owned());
    }
    let text = |error: std::io::Error| error.to_string();
    let folder = tempfile::tempdir().map_err(text)?;
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).map_err(text)?;
    let (kernel, initrd) = (folder.path().join("vmlinuz"), folder.path().join("initrd"));
    fs::copy(fetched.join("vmlinuz"), &kernel).map_err(text)?;
    let program = compile(&folder.path().join("init"))?;
    let modules = modules(&fetched.join("modules")).map_err(text)?;
    fs::write(&initrd, archive(&program, &modules)).map_err(text)?;
    Ok(Images {
        kernel,
        initrd,
        _folder: folder,
    })
}

fn compile(init: &Path) -> Result<Vec<u8>, String> {
    let flags = "-O2 -static -nostdlib -ffreestanding -fno-stack-protector -fno-pie -no-pie -o";
    let compiled = Command::new("gcc")
        .args(flags.split(' '))
        .arg(init)
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/qemu/init.c"))
        .status()
        .map_err(|error| format!("gcc: {error}"))?;
    if !compiled.success() {
        return Err("gcc does not compile the guest's program".to_owned());
    }
    fs::read(init).map_err(|error| error.to_string())
}

/// The drivers, in the order of their names, which is the one that they need.
fn modules(folder: &Path) -> std::io::Result<Vec<Vec<u8>>> {
    let mut paths = fs::read_dir(folder)?
        .map(|entry| Ok(entry?.path()))
        .collect::<std::io::Result<Vec<_>>>()?;
    paths.sort();
    paths.into_iter().map(fs::read).collect()
}

/// A `newc` archive (`cpio(5)`) with `/dev/console`, `/init` and the drivers as `/modules/00` and so on.
fn archive(init: &[u8], modules: &[Vec<u8>]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut entry = |name: &str, mode: u32, device: (u32, u32), data: &[u8]| {
        let (length, name_length) = (data.len() as u32, name.len() as u32 + 1);
        let (major, minor) = device;
        out.extend_from_slice(b"070701");
        for field in [
            0,
            mode,
            0,
            0,
            1,
            0,
            length,
            0,
            0,
            major,
            minor,
            name_length,
            0,
        ] {
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
    entry("modules", 0o040_755, (0, 0), &[]);
    for (number, module) in modules.iter().enumerate() {
        entry(&format!("modules/{number:02}"), 0o100_644, (0, 0), module);
    }
    entry("init", 0o100_755, (0, 0), init);
    entry("TRAILER!!!", 0, (0, 0), &[]);
    out
}
