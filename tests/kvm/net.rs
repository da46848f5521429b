//! Network cards: packets pass both ways through a tap, with offloads, and their bytes are right.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::time::Duration;

use libtest_mimic::Failed;
use vm_lifecycle::config::NicSpec;

use crate::Body;
use crate::guest::{Guest, WITHIN, done, small};
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
    let listener = TcpListener::bind((tap.address(), 0))?;
    let port = listener.local_addr()?.port();
    let id = shell.send(&format!("yes guest | head -c 6000000 | nc 10.213.20.1 {port}"))?;
    let mut received = Vec::new();
    listener.accept()?.0.read_to_end(&mut received)?;
    assert_eq!(received.len(), 6_000_000);
    assert!(received.chunks_exact(6).all(|line| line == b"guest\n"));
    shell.answer(id, "nc to the host", WITHIN)?;

    // Host to guest: segments arrive whole in mergeable buffers.
    shell.succeed("(nc -l -p 5000 >/tmp/received; touch /tmp/done) >/dev/null 2>&1 &")?;
    let mut stream = wait_for(WITHIN, "the guest's listener", || {
        TcpStream::connect(("10.213.20.2", 5000)).ok()
    })?;
    stream.write_all(&b"host!\n".repeat(1_000_000))?;
    drop(stream);
    shell.wait_until("test -e /tmp/done", WITHIN)?;
    assert_eq!(shell.succeed("grep -cx 'host!' /tmp/received")?, "1000000");
    let errors = shell
        .succeed("cd /sys/class/net/eth0/statistics && cat rx_errors tx_errors rx_dropped tx_dropped")?;
    assert_eq!(errors.split_whitespace().collect::<Vec<_>>(), ["0"; 4]);

    // Packets that arrive while the guest stands still are delivered when it goes on.
    done(guest.vm.pause())?;
    done(guest.vm.resume())?;
    shell.wait_until("ping -c 1 -W 1 10.213.20.1", WITHIN)?;
    Ok(())
}

fn a_card_with_several_queues_works() -> Result<(), Failed> {
    let tap = Tap::create_multi_queue(Ipv4Addr::new(10, 213, 21, 1))?;
    let nic = NicSpec::new("lan", tap.name()).queue_pairs(2);
    let (guest, mut shell) = Guest::boot(small("net-mq")?.cpus(2).nic(nic))?;
    assert_eq!(
        shell.succeed("ls -d /sys/class/net/eth0/queues/rx-* | wc -l")?,
        "2"
    );
    bring_up(&mut shell, "10.213.21.2")?;
    shell.wait_until("ping -c 1 -W 1 10.213.21.1", WITHIN)?;
    let derived = guest.vm.config().nics()[0].mac.to_string();
    assert_eq!(shell.succeed("cat /sys/class/net/eth0/address")?, derived);
    // Several flows at once, so that both queues are used.
    let listener = TcpListener::bind((tap.address(), 0))?;
    let port = listener.local_addr()?.port();
    let command = format!(
        "for i in 1 2 3 4; do (yes flow | head -c 1000000 | taskset -c $((i%2)) nc 10.213.21.1 {port}) & done; wait"
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
