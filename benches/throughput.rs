//! What a guest gets through its disk and its network card, beside QEMU's `q35` and `microvm` in the same run, as ratios.
//!
//! Three guests with the same kernel run all the time and take turns: one of this crate, in this process, and two of
//! QEMU with virtio-blk-pci and virtio-net-pci, for which `microvm` has its PCI Express switched on. The disk is a raw
//! file in memory behind io_uring, the card a tap without
//! vhost. The guest's own `dd` and `nc` make the load.

#[path = "../tests/kvm/guest.rs"]
#[allow(dead_code)]
mod guest;
#[path = "../tests/harness/mod.rs"]
mod harness;
mod report;

use std::error::Error;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::time::Instant;

use libtest_mimic::Failed;
use vm_lifecycle::config::{DiskSpec, NicSpec};

use guest::{BOOT_WITHIN, CMDLINE, Guest, WITHIN, small};
use harness::artefacts::{Flavour, GuestKernel};
use harness::guest_shell::GuestShell;
use harness::kvm::{self, Verdict};
use harness::qemu::{QemuGuest, QemuOptions};
use harness::tap::Tap;

const MICROVM: &str = "microvm,rtc=on,pcie=on";
const DISK_BYTES: u64 = 128 << 20;
const STREAM_BYTES: usize = 16 << 20;
const SMALL_COUNT: u64 = 1000;

/// A running guest under load.
struct Subject {
    shell: GuestShell,
    tap: Tap,
    /// Seconds, by load and round.
    samples: Vec<Vec<f64>>,
}

/// One kind of load: its name, what it moves, and how.
struct Load {
    name: &'static str,
    bytes: u64,
    run: fn(&mut Subject) -> Result<(), Box<dyn Error>>,
}

const LOADS: [Load; 6] = [
    Load {
        name: "disk: write 1 MiB blocks",
        bytes: DISK_BYTES,
        run: |subject| subject.dd("if=/dev/zero of=/dev/vda bs=1M count=128 oflag=direct"),
    },
    Load {
        name: "disk: read 1 MiB blocks",
        bytes: DISK_BYTES,
        run: |subject| subject.dd("if=/dev/vda of=/dev/null bs=1M count=128 iflag=direct"),
    },
    Load {
        name: "disk: write 4 KiB blocks, one at a time",
        bytes: SMALL_COUNT * 4096,
        run: |subject| subject.dd("if=/dev/zero of=/dev/vda bs=4k count=1000 oflag=direct"),
    },
    Load {
        name: "disk: read 4 KiB blocks, one at a time",
        bytes: SMALL_COUNT * 4096,
        run: |subject| subject.dd("if=/dev/vda of=/dev/null bs=4k count=1000 iflag=direct"),
    },
    Load {
        name: "net: TCP from guest to host",
        bytes: STREAM_BYTES as u64,
        run: Subject::send,
    },
    Load {
        name: "net: TCP from host to guest",
        bytes: STREAM_BYTES as u64,
        run: Subject::receive,
    },
];

fn main() -> Result<(), Box<dyn Error>> {
    match kvm::verdict() {
        Verdict::Run => {}
        Verdict::Ignore(why) => {
            println!("not measured: {why}");
            return Ok(());
        }
        Verdict::Fail(why) => return Err(why.into()),
    }
    let folder = tempfile::tempdir_in("/dev/shm")?;
    let tell = |failed: Failed| failed.message().unwrap_or("it failed").to_string();
    let (_ours, ours) = start_ours(folder.path()).map_err(tell)?;
    let (_q35, q35) = start_qemu(folder.path(), "q35", Ipv4Addr::new(10, 213, 41, 1))?;
    let (_microvm, microvm) = start_qemu(folder.path(), MICROVM, Ipv4Addr::new(10, 213, 42, 1))?;
    let mut subjects = [ours, q35, microvm];
    for round in 0..=report::rounds() {
        for (index, load) in LOADS.iter().enumerate() {
            for subject in &mut subjects {
                let began = Instant::now();
                (load.run)(subject)?;
                let seconds = began.elapsed().as_secs_f64();
                eprintln!("round {round}: {} {seconds:.2} s", load.name);
                if round > 0 {
                    subject.samples[index].push(seconds);
                }
            }
        }
    }
    show(&subjects);
    Ok(())
}

fn disk(folder: &Path, name: &str) -> io::Result<std::path::PathBuf> {
    let path = folder.join(name);
    File::create(&path)?.set_len(DISK_BYTES)?;
    Ok(path)
}

fn start_ours(folder: &Path) -> Result<(Guest, Subject), Failed> {
    let tap = Tap::create(Ipv4Addr::new(10, 213, 40, 1))?;
    let builder = small("throughput")?
        .disk(DiskSpec::new("data", disk(folder, "ours.img")?))
        .nic(NicSpec::new("lan", tap.name()));
    let (guest, shell) = Guest::boot(builder)?;
    Ok((guest, Subject::new(shell, tap)?))
}

fn start_qemu(
    folder: &Path,
    machine: &str,
    address: Ipv4Addr,
) -> Result<(QemuGuest, Subject), Box<dyn Error>> {
    let tap = Tap::create(address)?;
    let (name, _) = machine.split_once(',').unwrap_or((machine, ""));
    let file = disk(folder, &format!("{name}.img"))?;
    let drive = format!("file={},if=none,id=d,format=raw,aio=io_uring", file.display());
    let netdev = format!("tap,id=n,ifname={},script=no,downscript=no,vhost=off", tap.name());
    let words = [
        "-drive",
        &drive,
        "-device",
        "virtio-blk-pci,drive=d",
        "-netdev",
        &netdev,
    ];
    let mut arguments = words.map(str::to_string).to_vec();
    arguments.extend(["-device", "virtio-net-pci,netdev=n,romfile="].map(str::to_string));
    let options = QemuOptions {
        machine: machine.to_string(),
        cmdline: CMDLINE.to_string(),
        arguments,
        ..QemuOptions::default()
    };
    let guest = QemuGuest::start(&GuestKernel::find(Flavour::Cloud)?, &options)?;
    let shell = GuestShell::connect(guest.port()?, BOOT_WITHIN)?;
    let subject = Subject::new(shell, tap).map_err(|error| error.to_string())?;
    Ok((guest, subject))
}

impl Subject {
    /// Brings the guest's network up.
    fn new(mut shell: GuestShell, tap: Tap) -> Result<Self, harness::guest_shell::ShellError> {
        let address = Self::guest_address(&tap);
        shell.succeed(&format!(
            "ip addr add {address}/24 dev eth0 && ip link set eth0 up"
        ))?;
        shell.wait_until(&format!("ping -c 1 -W 1 {}", tap.address()), WITHIN)?;
        Ok(Self {
            shell,
            tap,
            samples: vec![Vec::new(); LOADS.len()],
        })
    }

    fn guest_address(tap: &Tap) -> Ipv4Addr {
        let [a, b, c, _] = tap.address().octets();
        Ipv4Addr::new(a, b, c, 2)
    }

    fn dd(&mut self, words: &str) -> Result<(), Box<dyn Error>> {
        self.shell.succeed(&format!("dd {words}"))?;
        Ok(())
    }

    fn send(&mut self) -> Result<(), Box<dyn Error>> {
        let listener = TcpListener::bind((self.tap.address(), 0))?;
        let (host, port) = (self.tap.address(), listener.local_addr()?.port());
        let id = self.shell.send(&format!(
            "dd if=/dev/zero bs=64k count={} | nc {host} {port}",
            STREAM_BYTES >> 16
        ))?;
        let (mut stream, _) = listener.accept()?;
        let mut buffer = vec![0; 1 << 18];
        let mut received = 0;
        loop {
            match stream.read(&mut buffer)? {
                0 => break,
                length => received += length,
            }
        }
        assert_eq!(received, STREAM_BYTES, "the guest sent all of it");
        // The guest's nc waits for this.
        drop(stream);
        self.shell.answer(id, "nc to the host", WITHIN)?;
        Ok(())
    }

    fn receive(&mut self) -> Result<(), Box<dyn Error>> {
        let listener = TcpListener::bind((self.tap.address(), 0))?;
        let (host, port) = (self.tap.address(), listener.local_addr()?.port());
        let id = self.shell.send(&format!("nc {host} {port} </dev/null | wc -c"))?;
        let (stream, _) = listener.accept()?;
        feed(stream)?;
        let output = self.shell.answer(id, "nc from the host", WITHIN)?;
        assert_eq!(
            output.text.trim(),
            STREAM_BYTES.to_string(),
            "the guest got all of it"
        );
        Ok(())
    }
}

fn feed(mut stream: TcpStream) -> io::Result<()> {
    let chunk = vec![0; 1 << 18];
    for _ in 0..STREAM_BYTES / chunk.len() {
        stream.write_all(&chunk)?;
    }
    Ok(())
}

fn show([ours, q35, microvm]: &[Subject; 3]) {
    let titles = [
        "throughput, medians",
        "ours MiB/s",
        "q35 MiB/s",
        "ours to q35",
        "microvm MiB/s",
        "ours to microvm",
    ];
    let mut rows = vec![titles.map(str::to_string).to_vec()];
    for (index, load) in LOADS.iter().enumerate() {
        let rate = |subject: &Subject| {
            let seconds = report::median(&subject.samples[index]);
            load.bytes as f64 / f64::from(1 << 20) / seconds
        };
        let (ours, q35, microvm) = (rate(ours), rate(q35), rate(microvm));
        rows.push(vec![
            load.name.to_string(),
            format!("{ours:.1}"),
            format!("{q35:.1}"),
            report::ratio(ours, q35),
            format!("{microvm:.1}"),
            report::ratio(ours, microvm),
        ]);
    }
    report::print(&rows);
}
