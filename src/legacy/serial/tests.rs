//! The serial port driven as a kernel does it.

use std::io;

use kvm_bindings::{kvm_irq_routing_entry, kvm_userspace_memory_region};
use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::legacy::serial_output::OUTPUT_WAITING_BYTES_MAX;
use crate::machine::HostVm;
use crate::machine::gsi::GsiTable;
use crate::memory::layout::SERIAL_GSI;

const IER: u64 = 1;
const IIR: u64 = 2;
const MCR: u64 = 4;

/// A host that hands the port's interrupt to the test.
#[derive(Default)]
struct Pin(Mutex<Option<EventFd>>);

impl Pin {
    /// The interrupts since the last call.
    fn take(&self) -> u64 {
        let pin = self.0.lock().expect("no panic while locked");
        pin.as_ref().expect("the port is connected").read().unwrap_or(0)
    }
}

impl HostVm for Pin {
    fn set_memslot(&self, _region: kvm_userspace_memory_region) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn register_irqfd(&self, fd: &EventFd, gsi: u32) -> io::Result<()> {
        assert_eq!(gsi, SERIAL_GSI);
        *self.0.lock().expect("no panic while locked") = Some(fd.try_clone()?);
        Ok(())
    }

    fn unregister_irqfd(&self, _fd: &EventFd, _gsi: u32) -> io::Result<()> {
        Ok(())
    }

    fn set_line(&self, _gsi: u32, _active: bool) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn set_gsi_routing(&self, _entries: &[kvm_irq_routing_entry]) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn register_ioevent(&self, _fd: &EventFd, _address: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn unregister_ioevent(&self, _fd: &EventFd, _address: u64) -> io::Result<()> {
        Ok(())
    }
}

/// A sink whose content and number of writes the test sees.
#[derive(Clone, Default)]
struct Page(Arc<Mutex<(Vec<u8>, usize)>>);

impl Page {
    fn text(&self) -> String {
        let page = self.0.lock().expect("no panic while locked");
        String::from_utf8(page.0.clone()).expect("the test writes text")
    }

    fn write_count(&self) -> usize {
        self.0.lock().expect("no panic while locked").1
    }
}

impl Write for Page {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let mut page = self.0.lock().expect("no panic while locked");
        page.0.extend_from_slice(data);
        page.1 += 1;
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn serial(sink: impl Write + Send + 'static) -> (Serial, Arc<Pin>) {
    let pin = Arc::new(Pin::default());
    let line = GsiTable::new(pin.clone())
        .line(SERIAL_GSI)
        .expect("the pin is free");
    (Serial::new(line, Box::new(sink), || ()), pin)
}

/// Waits until the sink has what was handed to it.
fn written(serial: &Serial) {
    serial.lock().output.wait_until_written();
}

fn send(serial: &Serial, text: &str) {
    text.bytes().for_each(|byte| serial.write(DATA_OFFSET, &[byte]));
}

fn read(serial: &Serial, offset: u64) -> u8 {
    let mut data = [0xFF];
    serial.read(offset, &mut data);
    data[0]
}

/// Reads as long as the line status says that data is ready.
fn receive(serial: &Serial) -> Vec<u8> {
    let ready = || read(serial, LSR_OFFSET) & 1 != 0;
    std::iter::from_fn(|| ready().then(|| read(serial, DATA_OFFSET))).collect()
}

#[test]
fn a_line_reaches_the_sink_in_one_write() {
    let page = Page::default();
    let (serial, _pin) = serial(page.clone());
    send(&serial, "hello");
    assert_eq!(page.text(), "");
    assert_eq!(read(&serial, LSR_OFFSET), 0x60);
    written(&serial);
    assert_eq!(page.text(), "");
    send(&serial, "\n");
    written(&serial);
    assert_eq!((page.text().as_str(), page.write_count()), ("hello\n", 1));
}

#[test]
fn output_without_a_newline_is_shown_when_the_driver_stops_or_the_buffer_is_full() {
    let page = Page::default();
    let (serial, _pin) = serial(page.clone());
    send(&serial, "login: ");
    read(&serial, IIR);
    written(&serial);
    assert_eq!(page.text(), "login: ");
    send(&serial, &"x".repeat(OUTPUT_BUFFER_BYTES));
    written(&serial);
    assert_eq!(
        (page.text().len(), page.write_count()),
        (7 + OUTPUT_BUFFER_BYTES, 2)
    );
    send(&serial, "last");
    drop(serial);
    assert!(page.text().ends_with("last"));
}

#[test]
fn a_failing_sink_is_counted_and_does_not_stop_the_guest() {
    struct Full;
    impl Write for Full {
        fn write(&mut self, _data: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::StorageFull.into())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let (serial, _pin) = serial(Full);
    send(&serial, "abc\n");
    written(&serial);
    assert_eq!(serial.inspect()["lost_bytes"], 4);
    assert_eq!(serial.inspect()["output_bytes"], 0);
    assert_eq!(read(&serial, LSR_OFFSET), 0x60);
}

/// A sink that blocks until the test opens it.
struct Blocked(std::sync::mpsc::Receiver<()>);

impl Write for Blocked {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        // The other end is gone when the test lets go.
        let _ = self.0.recv();
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_sink_that_blocks_holds_nobody_and_what_it_has_no_room_for_is_counted() {
    let (open, blocked) = std::sync::mpsc::channel();
    let (serial, _pin) = serial(Blocked(blocked));
    let line = format!("{}\n", "x".repeat(OUTPUT_BUFFER_BYTES - 1));
    let line_count = 2 * OUTPUT_WAITING_BYTES_MAX / line.len();
    (0..line_count).for_each(|_| send(&serial, &line));
    let lost_bytes = serial.inspect()["lost_bytes"].as_u64().expect("a number");
    let sent_bytes = (line_count * line.len()) as u64;
    // At most what fits twice: into the queue, and into the sink's hands before that.
    assert!(lost_bytes > 0 && sent_bytes - lost_bytes >= OUTPUT_WAITING_BYTES_MAX as u64);
    serial.pause(PauseTicket::new(|| ()));
    serial.reset();
    drop(open);
    written(&serial);
    let written_bytes = serial.inspect()["output_bytes"].as_u64();
    assert_eq!(
        written_bytes,
        Some(sent_bytes - lost_bytes),
        "nothing else is lost"
    );
}

#[test]
fn a_sink_that_blocks_for_ever_does_not_hold_the_end_of_the_port() {
    let (open, blocked) = std::sync::mpsc::channel();
    let (serial, _pin) = serial(Blocked(blocked));
    send(&serial, "never\n");
    drop(serial);
    drop(open);
}

#[test]
fn input_beyond_the_fifo_waits_and_input_beyond_the_limit_is_refused() {
    let (serial, pin) = serial(io::sink());
    serial.write(IER, &[1]);
    let typed: Vec<u8> = (0..200).collect();
    assert_eq!(serial.input(&typed), 200);
    assert_eq!(pin.take(), 1);
    assert_eq!(receive(&serial), typed);
    // One interrupt for each time the FIFO was filled again: 200 bytes are 64 four times.
    assert_eq!(pin.take(), 3);
    let flood = vec![7; INPUT_PENDING_BYTES_MAX + FIFO_BYTES];
    assert_eq!(serial.input(&flood), INPUT_PENDING_BYTES_MAX);
    assert_eq!(serial.input(&flood), FIFO_BYTES);
    assert_eq!(serial.input(&[7]), 0);
    assert_eq!(receive(&serial).len(), flood.len());
}

#[test]
fn saving_carries_registers_and_unread_input() {
    let page = Page::default();
    let (before, _pin) = serial(page.clone());
    before.write(IER, &[3]);
    before.write(7, &[0x5A]);
    before.input(&[9; 100]);
    send(&before, "tail");
    let section = before.save().expect("the state encodes");
    written(&before);
    assert_eq!(page.text(), "tail");
    let (after, pin) = serial(io::sink());
    after.restore(&section).expect("the state was just saved");
    assert_eq!(pin.take(), 2);
    after.resume();
    assert_eq!(pin.take(), 1);
    assert_eq!((read(&after, IER), read(&after, 7)), (3, 0x5A));
    assert_eq!(read(&after, IIR), 0xC0 | 0b110);
    assert_eq!(receive(&after), [9; 100]);
    after.resume();
    pin.take();
    assert_eq!(after.save().expect("the state encodes").schema, 1);
}

#[test]
fn impossible_saved_values_are_refused_by_name() {
    let (serial, _pin) = serial(io::sink());
    let good = serial.save().expect("the state encodes");
    let cases = [
        (
            "fifo",
            json!(vec![0; 65]),
            "saved fifo is 65 bytes: the fifo holds 64 bytes",
        ),
        (
            "input_pending",
            json!(vec![0; 4097]),
            "saved input_pending is 4097 bytes: the limit is 4096 bytes",
        ),
        (
            "interrupt_enable",
            json!(0x10),
            "saved interrupt_enable is 0x10: only bits 0 to 3 exist",
        ),
        (
            "interrupt_identification",
            json!(3),
            "saved interrupt_identification is 0x03: the port never shows this",
        ),
    ];
    for (field, value, message) in cases {
        let mut section = good.clone();
        section.body[field] = value;
        let error = serial.restore(&section).expect_err("the value is impossible");
        assert_eq!(error.to_string(), message);
    }
}

#[test]
fn reset_forgets_registers_and_input() {
    let (serial, _pin) = serial(io::sink());
    serial.write(MCR, &[0x1F]);
    serial.input(b"abc");
    serial.reset();
    assert_eq!((read(&serial, MCR), read(&serial, LSR_OFFSET)), (0x08, 0x60));
    assert_eq!(serial.inspect()["input_pending_bytes"], 0);
}
