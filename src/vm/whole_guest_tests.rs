//! A whole guest is taken out of one machine and goes on in another: every unit is saved and restored, its RAM copied.
//!
//! What tells a restored guest from one that booted again is a nonce that exists only in its RAM. The machines are
//! driven without a supervisor, through the mailbox that it would read; the guest is asked, by the same shell that
//! the tests in `tests/kvm` use.

#[path = "../../tests/harness/mod.rs"]
mod harness;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::net::Ipv4Addr;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use harness::artefacts::{Flavour, GuestKernel, PORT_NAME};
use harness::guest_shell::GuestShell;
use harness::tap::Tap;
use harness::wait::wait_for;

use super::builder::KvmPlatform;
use super::host::{HostDevices, HostPort};
use super::mailbox::{Mailbox, Message, Notice, Notices, Report};
use super::platform::Machine;
use super::units::KvmMachine;
use crate::config::{DiskSpec, NicSpec, VmConfig};
use crate::ids::PortName;
use crate::unit::{PauseTicket, PowerRequest, Section, Unit};

/// Long enough for a boot on a busy machine; a test that waits this long has failed.
const WITHIN: Duration = Duration::from_secs(300);
const RAM_BYTES: u64 = 192 << 20;
const CHUNK_BYTES: usize = 64 << 10;

/// Gives each machine a port, keeps the test's end of the last one, and collects what the serial ports say.
#[derive(Clone, Default)]
struct TestHost {
    stream: Arc<Mutex<Option<UnixStream>>>,
    console: Arc<Mutex<Vec<u8>>>,
}

/// A serial port's output.
struct Console(Arc<Mutex<Vec<u8>>>);

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut text = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        text.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl TestHost {
    fn stream(&self) -> UnixStream {
        let mut stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        stream.take().expect("the machine was given its port")
    }

    /// The numbers that the counting process has written on the serial ports, in order.
    fn ticks(&self) -> Vec<u64> {
        let text = self.console.lock().unwrap_or_else(PoisonError::into_inner);
        let text = String::from_utf8_lossy(&text);
        let ticks = text.lines().filter_map(|line| line.strip_prefix("tick "));
        ticks.filter_map(|number| number.trim().parse().ok()).collect()
    }
}

impl HostDevices for TestHost {
    fn serial_output(&self, _vm: &VmConfig) -> io::Result<Box<dyn Write + Send>> {
        Ok(Box::new(Console(self.console.clone())))
    }

    fn ports(&self, _vm: &VmConfig) -> io::Result<Vec<HostPort>> {
        let (ours, stream) = UnixStream::pair()?;
        *self.stream.lock().unwrap_or_else(PoisonError::into_inner) = Some(ours);
        let name = PortName::new(PORT_NAME).map_err(io::Error::other)?;
        let port = HostPort {
            name,
            console: false,
            stream,
        };
        Ok(vec![port])
    }
}

/// A machine without a supervisor.
struct Bench {
    machine: KvmMachine,
    mailbox: Mailbox,
    notices: Arc<Notices>,
    reports: Receiver<Message>,
}

/// Everything of a guest.
struct SavedGuest {
    sections: BTreeMap<String, Section>,
    /// The pieces of RAM that are not all zero, by their place in its file.
    ram: Vec<(u64, Vec<u8>)>,
}

impl Bench {
    fn build(config: &VmConfig, host: &TestHost) -> Self {
        let (sender, reports) = channel();
        let notices = Arc::new(Notices::default());
        let mailbox = Mailbox::new(sender, 1, notices.clone(), Weak::new());
        let platform = KvmPlatform::new(host.clone());
        let machine = platform.assemble(config, mailbox.clone());
        Self {
            machine: machine.expect("the host builds the machine"),
            mailbox,
            notices,
            reports,
        }
    }

    fn run(&self) {
        self.machine.resume_units();
        self.machine.run_vcpus();
    }

    /// vCPUs first, then units, as the supervisor does.
    fn pause(&self) {
        self.machine.park_vcpus();
        for _ in 0..self.machine.vcpu_count() {
            self.wait("a parked vcpu", |report| {
                matches!(report, Report::VcpuParked { .. })
            });
        }
        let mailbox = self.mailbox.clone();
        let ticket = PauseTicket::new(move || mailbox.report(Report::UnitsQuiet { halt: 1 }));
        self.machine.pause_units(ticket);
        self.wait("quiet units", |report| {
            matches!(report, Report::UnitsQuiet { .. })
        });
    }

    fn wait(&self, what: &str, wanted: impl Fn(&Report) -> bool) {
        loop {
            match self.reports.recv_timeout(WITHIN) {
                Ok(Message::Report { report, .. }) if wanted(&report) => return,
                Ok(Message::Report {
                    report: Report::Ended { cause },
                    ..
                }) => panic!("a vcpu ended while {what} was waited for: {cause:?}"),
                Ok(_) => {}
                Err(error) => panic!("no {what}: {error}"),
            }
        }
    }

    /// Waits until the guest has switched itself off.
    fn wait_for_power_off(&self) {
        let off = Notice::Power(PowerRequest::PowerOff);
        while !self.notices.take().contains(&off) {
            self.wait("power-off", |report| matches!(report, Report::Noticed));
        }
    }

    fn save(&self) -> SavedGuest {
        let save = |unit: &&dyn Unit| {
            let name = unit.name().to_string();
            let section = unit
                .save()
                .unwrap_or_else(|error| panic!("{name} is saved: {error}"));
            (name, section)
        };
        let sections = self.machine.with_units(None, |units| {
            let sections: BTreeMap<_, _> = units.iter().map(save).collect();
            assert_eq!(sections.len(), units.len(), "two units have one name");
            sections
        });
        let file = self.machine.ram.file();
        let mut ram = Vec::new();
        for offset in (0..RAM_BYTES).step_by(CHUNK_BYTES) {
            let mut chunk = vec![0; CHUNK_BYTES];
            file.read_exact_at(&mut chunk, offset).expect("inside the ram");
            if chunk.iter().any(|byte| *byte != 0) {
                ram.push((offset, chunk));
            }
        }
        SavedGuest { sections, ram }
    }

    /// In the order that `unit.rs` tells.
    fn restore(&self, saved: &SavedGuest) {
        self.machine.ram.clear().expect("a memory file has holes");
        for (offset, chunk) in &saved.ram {
            let written = self.machine.ram.file().write_all_at(chunk, *offset);
            written.expect("inside the ram");
        }
        let is_vcpu = |unit: &&dyn Unit| unit.name().as_str().starts_with("vcpu-");
        self.machine.with_units(None, |units| {
            let (vcpus, others): (Vec<&dyn Unit>, Vec<_>) = units.iter().copied().partition(is_vcpu);
            for unit in vcpus.into_iter().chain(others) {
                restore(unit, saved);
            }
        });
    }
}

fn restore(unit: &dyn Unit, saved: &SavedGuest) {
    let name = unit.name().to_string();
    let section = saved.sections.get(&name);
    let section = section.unwrap_or_else(|| panic!("{name} was not saved"));
    let restored = unit.restore(section);
    restored.unwrap_or_else(|error| panic!("{name} is restored: {error}"));
}

fn config(kernel: &GuestKernel, disk: &Path, tap: &Tap, cpu_count: u8) -> VmConfig {
    let builder = VmConfig::builder("whole", &kernel.elf)
        .initrd(&kernel.initramfs)
        .cmdline("console=ttyS0 quiet loglevel=3 panic=-1 harness.modules=all")
        .startup_bytes(RAM_BYTES)
        .cpus(cpu_count.into())
        .disk(DiskSpec::new("data", disk))
        .nic(NicSpec::new("lan", tap.name()));
    builder.build().expect("the configuration is valid")
}

fn ask(shell: &mut GuestShell, command: &str) -> String {
    shell
        .succeed(command)
        .unwrap_or_else(|error| panic!("the guest answers: {error}"))
}

fn uptime(shell: &mut GuestShell) -> f64 {
    ask(shell, "cut -d ' ' -f 1 /proc/uptime")
        .parse()
        .expect("seconds")
}

/// Leaves what a boot would lose: a file in RAM, a mounted file system, a configured card and a counting
/// process that holds a nonce in a variable and keeps disk and serial port busy.
fn leave_traces(shell: &mut GuestShell, tap: &Tap) {
    ask(shell, "echo 8c61 >/tmp/nonce");
    ask(
        shell,
        "mkdir -p /mnt && mount -t ext4 /dev/vda /mnt && echo written before >/mnt/before",
    );
    ask(
        shell,
        "(nonce=c8a2; i=0; until [ -e /tmp/stop ]; do i=$((i+1)); echo $nonce $i >/tmp/beat.new; echo tick $i >/dev/ttyS0; \
         mv /tmp/beat.new /tmp/beat; dd if=/dev/zero of=/mnt/busy bs=64k count=4 conv=fsync; done; touch /tmp/stopped) \
         >/dev/null 2>&1 &",
    );
    let [a, b, c, _] = tap.address().octets();
    let bring_up = format!("ip addr add {a}.{b}.{c}.2/24 dev eth0 && ip link set eth0 up");
    ask(shell, &bring_up);
    shell
        .wait_until(&format!("ping -c 1 -W 1 {}", tap.address()), WITHIN)
        .expect("the host answers before the save");
    shell
        .wait_until("test -e /tmp/beat", WITHIN)
        .expect("the process counts");
}

fn beat(shell: &mut GuestShell) -> u64 {
    let beat = ask(shell, "cat /tmp/beat");
    let count = beat.strip_prefix("c8a2 ").and_then(|count| count.parse().ok());
    count.unwrap_or_else(|| panic!("the process counts with its nonce, it wrote {beat:?}"))
}

fn goes_on(cpu_count: u8) {
    // Tests run in parallel, each in a network of its own.
    let tap = &Tap::create(Ipv4Addr::new(10, 213, 40 + cpu_count, 1)).expect("taps can be made");
    let folder = tempfile::tempdir().expect("a place for the disk");
    let disk = folder.path().join("disk.img");
    let sized = File::create(&disk).and_then(|file| file.set_len(32 << 20));
    sized.expect("room for the disk");
    let made = Command::new("/usr/sbin/mkfs.ext4").arg("-q").arg(&disk).status();
    assert!(made.is_ok_and(|status| status.success()), "mkfs.ext4");
    let kernel = GuestKernel::find(Flavour::Cloud).expect("the guests were made");
    let config = config(&kernel, &disk, tap, cpu_count);
    let host = TestHost::default();

    let first = Bench::build(&config, &host);
    first.run();
    let mut shell = GuestShell::connect(host.stream(), WITHIN).expect("the guest boots");
    leave_traces(&mut shell, tap);
    let boot_id = ask(&mut shell, "cat /proc/sys/kernel/random/boot_id");
    let (asked, before, beat_before) = (Instant::now(), uptime(&mut shell), beat(&mut shell));
    first.pause();
    let ran = asked.elapsed();
    let saved = first.save();
    // The second machine has the same disk and the same tap, so the first is gone for good.
    drop((first, shell));

    let second = Bench::build(&config, &host);
    second.pause();
    second.restore(&saved);
    let resumed = Instant::now();
    second.run();
    let mut shell = GuestShell::attach(host.stream());
    let after = uptime(&mut shell);
    let ran = (ran + resumed.elapsed()).as_secs_f64();
    assert!(after >= before, "time ran backwards: {before} to {after}");
    // The guest's own clock counts hundredths of a second.
    assert!(
        after - before <= ran + 0.02,
        "{} s passed in the guest, it ran {ran} s",
        after - before
    );
    assert_eq!(ask(&mut shell, "cat /tmp/nonce"), "8c61");
    assert_eq!(ask(&mut shell, "cat /proc/sys/kernel/random/boot_id"), boot_id);
    assert_eq!(ask(&mut shell, "nproc"), cpu_count.to_string());
    counts_on(&mut shell, &host, beat_before);
    devices_work(&mut shell, tap);
    let dmesg = ask(&mut shell, "dmesg");
    let complaints = [
        "stall",
        "soft lockup",
        "timekeeping watchdog",
        "I/O error",
        "BUG:",
    ];
    let complaint = complaints.iter().find(|complaint| dmesg.contains(**complaint));
    assert_eq!(complaint, None, "{dmesg}");
    hears_a_button_pressed_before(second, &config, &host);
}

/// The process counts on with its nonce, and what it has written on the serial port is without a gap.
fn counts_on(shell: &mut GuestShell, host: &TestHost, before: u64) {
    let further = format!("[ $(cut -d ' ' -f 2 /tmp/beat) -gt {} ]", before + 5);
    shell.wait_until(&further, WITHIN).expect("the process counts on");
    beat(shell);
    ask(shell, "touch /tmp/stop");
    shell
        .wait_until("test -e /tmp/stopped", WITHIN)
        .expect("the process ends its last write");
    let ticks = host.ticks();
    let is_whole = ticks.first() == Some(&1) && ticks.windows(2).all(|pair| pair[1] == pair[0] + 1);
    assert!(is_whole, "the serial port lost something: {ticks:?}");
}

/// An interrupt that was on its way when the guest was saved arrives after the restore.
fn hears_a_button_pressed_before(bench: Bench, config: &VmConfig, host: &TestHost) {
    bench.pause();
    bench.machine.press_power_button();
    let saved = bench.save();
    drop(bench);
    let last = Bench::build(config, host);
    last.pause();
    last.restore(&saved);
    last.run();
    last.wait_for_power_off();
}

/// What was written before the save is on the disk, the disk's bytes are the guest's, packets pass both ways,
/// and timers and interrupts reach every CPU.
fn devices_work(shell: &mut GuestShell, tap: &Tap) {
    ask(
        shell,
        "head -c 3000000 /dev/urandom >/mnt/file && sync && md5sum /mnt/file >/tmp/sum && umount /mnt && \
         mount -t ext4 /dev/vda /mnt",
    );
    ask(shell, "md5sum -c /tmp/sum");
    assert_eq!(ask(shell, "cat /mnt/before"), "written before");
    shell
        .wait_until(&format!("ping -c 1 -W 1 {}", tap.address()), WITHIN)
        .expect("the host answers after the restore");
    ask(
        shell,
        "for i in $(seq 0 $(($(nproc)-1))); do taskset -c $i sleep 0.1; done",
    );
    ask(shell, "head -c 64 /dev/hwrng | wc -c");
}

#[test]
#[ignore = "needs KVM that runs a stock kernel"]
fn a_guest_with_one_cpu_goes_on_in_another_machine() {
    goes_on(1);
}

#[test]
#[ignore = "needs KVM that runs a stock kernel"]
fn a_guest_with_two_cpus_goes_on_in_another_machine() {
    goes_on(2);
}

fn free_kib(shell: &mut GuestShell) -> u64 {
    let free = ask(shell, "awk '/^MemFree:/ { print $2 }' /proc/meminfo");
    free.parse().expect("a number")
}

#[test]
#[ignore = "needs KVM that runs a stock kernel"]
fn a_guest_hints_at_what_it_has_free_and_uses_it_again() {
    let kernel = GuestKernel::find(Flavour::Cloud).expect("the guests were made");
    let config = VmConfig::builder("hints", &kernel.elf)
        .initrd(&kernel.initramfs)
        .cmdline("console=ttyS0 quiet loglevel=3 panic=-1 harness.modules=all")
        .startup_bytes(RAM_BYTES)
        // A balloon is there only where memory can change.
        .minimum_bytes(128 << 20);
    let host = TestHost::default();
    let bench = Bench::build(&config.build().expect("the configuration is valid"), &host);
    bench.run();
    let mut shell = GuestShell::connect(host.stream(), WITHIN).expect("the guest boots");
    let free = free_kib(&mut shell);
    let memory = &bench.machine.memory;
    assert!(memory.begin_hints(), "Debian's driver has hints");
    let hints = wait_for(WITHIN, "the guest's hints", || {
        Some(memory.hints()).filter(|hints| hints.completed_count > 0)
    });
    let hints = hints.expect("the guest hints");
    assert!(
        hints.hinted_bytes / 1024 >= free / 2,
        "{hints:?} of {free} KiB that were free"
    );
    memory.end_hints();
    let free_again = format!(
        "[ $(awk '/^MemFree:/ {{ print $2 }}' /proc/meminfo) -ge {} ]",
        free / 10 * 9
    );
    shell
        .wait_until(&free_again, WITHIN)
        .expect("what was hinted at is the guest's again");
    assert_eq!(memory.hints().completed_count, 1);
}
