//! The serial console: a 16550 whose output goes to a file or to standard output.

use std::fs::File;
use std::io::{self, Write};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use vm_superio::serial::{Error as SerialError, NoEvents, SerialState};
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

/// The first of its eight ports (COM1).
pub(super) const PORT: u16 = 0x3f8;

/// Its interrupt line.
pub(super) const IRQ: u32 = 4;

/// Longest output that is held back for the rest of its line, in bytes.
const LINE_MAX: usize = 512;

/// Where the guest's serial output goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SerialTarget {
    /// To the end of this file, which is made if it isn't there.
    File(PathBuf),
    /// To standard output.
    Stdio,
    /// Nowhere.
    Nothing,
}

impl SerialTarget {
    fn open(&self) -> io::Result<Box<dyn Write + Send>> {
        Ok(match self {
            Self::File(path) => Box::new(File::options().append(true).create(true).open(path)?),
            Self::Stdio => Box::new(io::stdout()),
            Self::Nothing => Box::new(io::sink()),
        })
    }
}

/// The console's part of a machine's state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ConsoleState {
    baud_divisor: [u8; 2],
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    in_buffer: Vec<u8>,
}

/// A state that the console does not take.
#[derive(Debug, thiserror::Error)]
#[error("the serial console refuses its state: {0}")]
pub struct ConsoleStateError(String);

/// What came out of the console so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct ConsoleReport {
    /// Bytes.
    pub(super) bytes: u64,
    /// Complete lines.
    pub(super) lines: u64,
    /// The last complete line.
    pub(super) last_line: String,
}

/// The device.
pub(super) struct Console {
    uart: Serial<IrqLine, NoEvents, LineWriter>,
}

impl Console {
    /// Makes the device; `irq` is registered with KVM for [`IRQ`].
    pub(super) fn new(target: &SerialTarget, irq: EventFd) -> io::Result<Self> {
        let writer = LineWriter::new(target.open()?);
        Ok(Self {
            uart: Serial::new(IrqLine(irq), writer),
        })
    }

    /// The guest writes to register `offset`.
    pub(super) fn write(&mut self, offset: u8, value: u8) {
        // Output that can't be written is the guest's loss, not its end.
        if let Err(error) = self.uart.write(offset, value) {
            tracing::warn!(error = %describe(&error), "serial console");
        }
    }

    /// The guest reads register `offset`.
    pub(super) fn read(&mut self, offset: u8) -> u8 {
        self.uart.read(offset)
    }

    /// Writes out the part of a line that is held back.
    pub(super) fn flush(&mut self) {
        if let Err(error) = self.uart.writer_mut().push() {
            tracing::warn!(%error, "serial console");
        }
    }

    /// What came out so far.
    pub(super) fn report(&self) -> ConsoleReport {
        self.uart.writer().report.clone()
    }

    /// The registers.
    pub(super) fn state(&self) -> ConsoleState {
        let state = self.uart.state();
        ConsoleState {
            baud_divisor: [state.baud_divisor_low, state.baud_divisor_high],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.in_buffer,
        }
    }

    /// Takes over the registers of another machine's console.
    pub(super) fn load(&mut self, state: &ConsoleState) -> Result<(), ConsoleStateError> {
        let refused = |error: &SerialError<io::Error>| ConsoleStateError(describe(error));
        let [baud_divisor_low, baud_divisor_high] = state.baud_divisor;
        let registers = SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.in_buffer.clone(),
        };
        let irq = self.uart.interrupt_evt().0.try_clone();
        let irq = irq.map_err(|error| refused(&SerialError::Trigger(error)))?;
        let writer = std::mem::replace(
            self.uart.writer_mut(),
            LineWriter::new(Box::new(io::sink())),
        );
        self.uart = Serial::from_state(&registers, IrqLine(irq), NoEvents, writer)
            .map_err(|error| refused(&error))?;
        Ok(())
    }
}

fn describe(error: &SerialError<io::Error>) -> String {
    match error {
        SerialError::Trigger(error) => format!("cannot raise its interrupt: {error}"),
        SerialError::IOError(error) => format!("cannot write its output: {error}"),
        SerialError::FullFifo => "its input buffer is full".to_owned(),
    }
}

/// An interrupt line as KVM's `KVM_IRQFD` listens to it.
struct IrqLine(EventFd);

impl Trigger for IrqLine {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Gathers what the device writes byte by byte into lines.
struct LineWriter {
    out: Box<dyn Write + Send>,
    held: Vec<u8>,
    report: ConsoleReport,
}

impl LineWriter {
    fn new(out: Box<dyn Write + Send>) -> Self {
        Self {
            out,
            held: Vec::with_capacity(LINE_MAX),
            report: ConsoleReport::default(),
        }
    }

    fn push(&mut self) -> io::Result<()> {
        let held = std::mem::take(&mut self.held);
        let result = self.out.write_all(&held).and_then(|()| self.out.flush());
        self.held = held;
        self.held.clear();
        result
    }
}

impl Write for LineWriter {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        for &byte in data {
            self.held.push(byte);
            self.report.bytes += 1;
            let line_ends = byte == b'\n';
            if line_ends {
                self.report.lines += 1;
                let line = String::from_utf8_lossy(&self.held);
                self.report.last_line = line.trim_end().to_owned();
            }
            if line_ends || self.held.len() >= LINE_MAX {
                self.push()?;
            }
        }
        Ok(data.len())
    }

    /// The device asks for it after every byte; see [`LineWriter::push`].
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn console(path: &std::path::Path) -> Console {
        let irq = EventFd::new(nix::libc::EFD_NONBLOCK).unwrap();
        Console::new(&SerialTarget::File(path.to_owned()), irq).unwrap()
    }

    #[test]
    fn output_is_appended_line_by_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("serial");
        std::fs::write(&path, "before\n").unwrap();
        let mut console = console(&path);
        for byte in b"one\ntw" {
            console.write(0, *byte);
        }
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "before\none\n");
        console.flush();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "before\none\ntw");
        let report = console.report();
        assert_eq!(
            (report.bytes, report.lines, &*report.last_line),
            (6, 1, "one")
        );
    }

    #[test]
    fn the_registers_move_and_the_output_stays() {
        let folder = tempfile::tempdir().unwrap();
        let mut source = console(&folder.path().join("source"));
        source.write(7, 0x5a);
        source.write(3, 0x1b);
        let path = folder.path().join("destination");
        let mut destination = console(&path);
        destination.load(&source.state()).unwrap();
        assert_eq!(destination.read(7), 0x5a);
        assert_eq!(destination.state(), source.state());
        destination.write(0, b'\n');
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "\n");
    }

    #[test]
    fn an_input_buffer_that_is_too_long_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let mut console = console(&folder.path().join("serial"));
        let state = ConsoleState {
            in_buffer: vec![0; 4096],
            ..console.state()
        };
        assert!(console.load(&state).is_err());
    }
}
