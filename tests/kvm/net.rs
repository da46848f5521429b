//! Network cards: packets pass both ways through a tap, with offloads, and their bytes are right.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use libtest_mimic::Failed;
use vm_lifecycle::config::{NicConfig, NicSpec, VmConfig};
use vm_lifecycle::memory::host::HostMemory;
use vm_lifecycle::net::NetBackend;
use vm_lifecycle::net::tap::TapError;
use vm_lifecycle::vm::host::{HostDevices, HostPort};

use crate::Body;
use crate::guest::{Guest, TestHost, WITHIN, done, small};
use crate::harness::guest_shell::GuestShell;
use crate::harness::tap::Tap;
use crate::harness::wait::wait_for;

/// The trials of this file.
pub fn trials() -> Vec<Body> {
    vec![
        Body::new(
            "net::packets_pass_both_ways_with_offloads",
            packets_pass_both_ways,
        ),
        Body::new(
            "net::a_card_with_several_queues_works",
            a_card_with_several_queues_works,
        ),
    ]
}

/// The bits of virtio 1.2 §5.1.3 that must have been agreed on: CSUM, GUEST_CSUM, GUEST_TSO4, HOST_TSO4, MRG_RXBUF.
const OFFLOADS: [usize; 5] = [0, 1, 7, 11, 15];

fn bring_up(shell: &mut GuestShell, address: &str) -> Result<(), Failed> {
    shell.succeed(&format!(
        "ip addr add {address}/24 dev eth0 && ip link set eth0 up"
    ))?;
    Ok(())
}

/// The bytes and packets that the guest's driver has counted on way `rx` or `tx`.
fn counts(shell: &mut GuestShell, way: &str) -> Result<[u64; 2], Failed> {
    let text = shell.succeed(&format!(
        "cd /sys/class/net/eth0/statistics && cat {way}_bytes {way}_packets"
    ))?;
    let numbers: Vec<u64> = text.lines().map(str::parse).collect::<Result<_, _>>()?;
    Ok(numbers.try_into().map_err(|_| "two numbers")?)
}

/// What passed in between was on average longer than a packet of the usual MTU may be. A sender with all
/// that it has to send at hand has TCP send two segments at a time or more, however slow the machine is.
fn assert_segments([bytes_before, packets_before]: [u64; 2], [bytes, packets]: [u64; 2]) {
    let (bytes, packets) = (bytes - bytes_before, packets - packets_before);
    assert!(bytes / packets > 1514, "{bytes} bytes in {packets} packets");
}

fn packets_pass_both_ways() -> Result<(), Failed> {
    let tap = Tap::create(Ipv4Addr::new(10, 213, 20, 1))?;
    let nic = NicSpec::new("lan", tap.name()).mac("52:54:00:12:34:56".parse()?);
    let (guest, mut shell) = Guest::boot(small("net")?.nic(nic))?;
    assert_eq!(
        shell.succeed("cat /sys/class/net/eth0/address")?,
        "52:54:00:12:34:56"
    );
    let features = shell.succeed("cat /sys/class/net/eth0/device/features")?;
    for bit in OFFLOADS {
        assert_eq!(
            features.as_bytes().get(bit),
            Some(&b'1'),
            "feature bit {bit} of {features}"
        );
    }
    bring_up(&mut shell, "10.213.20.2")?;
    shell.wait_until("ping -c 1 -W 1 10.213.20.1", WITHIN)?;
    assert_eq!(shell.succeed("cat /sys/class/net/eth0/carrier")?, "1");

    // Guest to host: large segments leave the guest unchecked and unsplit; the host's TCP checks them.
    // A file, so that its sender need not collect it piece by piece.
    shell.succeed("yes guest | head -c 6000000 >/tmp/sent && httpd -p 5001 -h /tmp")?;
    let before = counts(&mut shell, "tx")?;
    let mut stream = TcpStream::connect_timeout(&([10, 213, 20, 2], 5001).into(), WITHIN)?;
    stream.set_read_timeout(Some(WITHIN))?;
    stream.write_all(b"GET /sent HTTP/1.0\r\n\r\n")?;
    let mut received = Vec::new();
    stream.read_to_end(&mut received)?;
    let body = received.len().checked_sub(6_000_000).ok_or("it is shorter")?;
    assert!(received[..body].ends_with(b"\r\n\r\n"));
    assert!(received[body..].chunks_exact(6).all(|line| line == b"guest\n"));
    assert_segments(before, counts(&mut shell, "tx")?);

    // Host to guest: segments arrive whole in mergeable buffers.
    let before = counts(&mut shell, "rx")?;
    shell.succeed("(nc -l -p 5000 >/tmp/received; touch /tmp/done) >/dev/null 2>&1 &")?;
    let mut stream = wait_for(WITHIN, "the guest's listener", || {
        TcpStream::connect(("10.213.20.2", 5000)).ok()
    })?;
    stream.write_all(&b"host!\n".repeat(1_000_000))?;
    drop(stream);
    shell.wait_until("test -e /tmp/done", WITHIN)?;
    assert_segments(before, counts(&mut shell, "rx")?);
    assert_eq!(shell.succeed("grep -cx 'host!' /tmp/received")?, "1000000");
    let errors = shell
        .succeed("cd /sys/class/net/eth0/statistics && cat rx_errors tx_errors rx_dropped tx_dropped")?;
    assert_eq!(errors.split_whitespace().collect::<Vec<_>>(), ["0"; 4]);

    // Packets that arrive while the guest stands still are delivered when it goes on. It counts what nobody listens to.
    let unwanted = "grep '^Udp:' /proc/net/snmp | tail -n 1 | cut -d ' ' -f 3";
    let before: u64 = shell.succeed(unwanted)?.parse()?;
    done(guest.vm.pause())?;
    let socket = UdpSocket::bind((tap.address(), 0))?;
    for _ in 0..5 {
        socket.send_to(b"while you slept", "10.213.20.2:6000")?;
    }
    done(guest.vm.resume())?;
    shell.wait_until(&format!("[ $({unwanted}) -ge {} ]", before + 5), WITHIN)?;
    shell.wait_until("ping -c 1 -W 1 10.213.20.1", WITHIN)?;
    Ok(())
}

/// An embedder that opens the tap of the card `handed` itself and hands its descriptors over.
struct HandsOver {
    host: TestHost,
    tap: Arc<Tap>,
}

impl HostDevices for HandsOver {
    fn serial_output(&self, vm: &VmConfig) -> io::Result<Box<dyn Write + Send>> {
        self.host.serial_output(vm)
    }

    fn ports(&self, vm: &VmConfig) -> io::Result<Vec<HostPort>> {
        self.host.ports(vm)
    }

    fn nic(&self, nic: &NicConfig) -> Result<Box<dyn NetBackend>, TapError> {
        if nic.name.as_str() != "handed" {
            return self.host.nic(nic);
        }
        let queues = (0..nic.queue_pairs).map(|_| self.tap.open().map(OwnedFd::from));
        let queues = queues
            .collect::<Result<_, _>>()
            .map_err(|source| TapError::Driver {
                name: nic.tap.clone(),
                source,
            })?;
        Ok(Box::new(vm_lifecycle::net::tap::Tap::from_fds(queues)?))
    }
}

fn a_card_with_several_queues_works() -> Result<(), Failed> {
    let tap = Tap::create_multi_queue(Ipv4Addr::new(10, 213, 21, 1))?;
    let handed = Arc::new(Tap::create_multi_queue(Ipv4Addr::new(10, 213, 22, 1))?);
    let builder = small("net-mq")?
        .cpus(2)
        .nic(NicSpec::new("lan", tap.name()).queue_pairs(2))
        .nic(NicSpec::new("handed", handed.name()).queue_pairs(2));
    let host = TestHost::default();
    let devices = HandsOver {
        host: host.clone(),
        tap: handed.clone(),
    };
    let guest = Guest::make_on(builder, host, devices, HostMemory::default())?;
    done(guest.vm.start())?;
    let mut shell = guest.shell()?;
    assert_eq!(
        shell.succeed("ls -d /sys/class/net/eth0/queues/rx-* | wc -l")?,
        "2"
    );
    bring_up(&mut shell, "10.213.21.2")?;
    shell.wait_until("ping -c 1 -W 1 10.213.21.1", WITHIN)?;
    let derived = guest.vm.config().nics()[0].mac.to_string();
    assert_eq!(shell.succeed("cat /sys/class/net/eth0/address")?, derived);
    flows(&mut shell, &tap)?;
    queue_one_carries(&guest, &mut shell, 0)?;
    shell.succeed("ip addr add 10.213.22.2/24 dev eth1 && ip link set eth1 up")?;
    shell.wait_until("ping -c 1 -W 1 10.213.22.1", WITHIN)?;
    flows(&mut shell, &handed)?;
    queue_one_carries(&guest, &mut shell, 1)
}

/// The second pair of card `index` has interrupted its guest, and sent.
fn queue_one_carries(guest: &Guest, shell: &mut GuestShell, index: usize) -> Result<(), Failed> {
    let count = shell.succeed(&format!(
        "card=$(basename $(readlink -f /sys/class/net/eth{index}/device)); grep -E \" $card-(in|out)put\\.1\" \
         /proc/interrupts | awk '{{ n += $2 + $3 }} END {{ print n }}'"
    ))?;
    assert!(
        count.parse::<u64>()? > 0,
        "queue 1 of eth{index} never interrupted"
    );
    let unit = guest.unit(guest.vm.config().nics()[index].unit_name())?;
    assert_ne!(
        unit["queues"][3]["next_used"], 0,
        "queue 1 of eth{index} sent nothing"
    );
    Ok(())
}

/// Several flows at once from both CPUs, so that both queues are used.
fn flows(shell: &mut GuestShell, tap: &Tap) -> Result<(), Failed> {
    let listener = TcpListener::bind((tap.address(), 0))?;
    let port = listener.local_addr()?.port();
    let host = tap.address();
    let command = format!(
        "for i in 1 2 3 4; do (yes flow | head -c 1000000 | taskset -c $((i%2)) nc {host} {port}) & done; wait"
    );
    let id = shell.send(&command)?;
    for _ in 0..4 {
        let mut received = Vec::new();
        listener.accept()?.0.read_to_end(&mut received)?;
        assert_eq!(received.len(), 1_000_000);
    }
    shell.answer(id, "four flows", Duration::from_secs(120))?;
    Ok(())
}
