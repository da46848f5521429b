//! The card over a real tap. Ignored without being asked for: needs root, `/dev/net/tun` and `ip`.
//!
//! Each test has a network namespace of its own. The host's side is a packet socket on the tap.

use super::driver::{BUFFERS, FEATURES, Rig, readable};
use crate::net::tap::tests::{PacketSocket, frame, in_namespace, ip, tap_up};
use crate::virtio::device::VirtioDevice;

#[test]
#[ignore = "needs root and /dev/net/tun"]
fn frames_pass_between_guest_memory_and_the_host() {
    in_namespace(|| {
        let tap = tap_up("vml0");
        let host = PacketSocket::on("vml0");
        let mut rig = Rig::over(Box::new(tap), Vec::new(), 256);
        rig.activate(FEATURES, false)
            .expect("the driver keeps to the rules");
        rig.post_receive(20, 100);
        rig.settle().expect("the driver keeps to the rules");
        host.send(&frame(250));
        rig.settle().expect("the driver keeps to the rules");
        assert_eq!(rig.rings[0].used(), [(0, 100), (1, 100), (2, 62)]);
        assert_eq!(rig.read(BUFFERS + 10, 2), [3, 0]);
        assert_eq!(rig.read(BUFFERS + 12, 250), frame(250));

        rig.write(BUFFERS, &[0; 12]);
        rig.write(BUFFERS + 0x1000, &frame(300));
        rig.rings[1].post(&[readable(BUFFERS, 12), readable(BUFFERS + 0x1000, 300)]);
        rig.net.process_queue(1).expect("the driver keeps to the rules");
        assert_eq!(host.receive(), frame(300));

        // The kernel refuses a header that makes no sense; the driver gets its buffer back all the same.
        rig.write(BUFFERS, &[1, 0x7f, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0]);
        rig.rings[1].post(&[readable(BUFFERS, 12), readable(BUFFERS + 0x1000, 300)]);
        rig.net.process_queue(1).expect("the driver keeps to the rules");
        assert_eq!(rig.rings[1].used(), [(0, 0), (2, 0)]);
        assert_eq!(rig.counter("tx_errors"), 1);
    });
}

#[test]
#[ignore = "needs root and /dev/net/tun"]
fn a_deleted_tap_pulls_the_cable_and_wakes_nobody() {
    in_namespace(|| {
        let tap = tap_up("vml0");
        let mut rig = Rig::over(Box::new(tap), Vec::new(), 256);
        rig.activate(FEATURES, false)
            .expect("the driver keeps to the rules");
        rig.post_receive(20, 2048);
        rig.settle().expect("the driver keeps to the rules");
        ip("link del vml0");
        rig.settle().expect("the driver keeps to the rules");
        assert!(!rig.net.is_link_up());
        assert_eq!(rig.interrupts.config_count(), 1);
    });
}

#[test]
#[ignore = "needs root and /dev/net/tun"]
fn a_tap_that_is_down_drops_and_works_once_it_is_up() {
    in_namespace(|| {
        let tap = tap_up("vml0");
        ip("link set vml0 down");
        let mut rig = Rig::over(Box::new(tap), Vec::new(), 256);
        rig.activate(FEATURES, false)
            .expect("the driver keeps to the rules");
        rig.post_receive(20, 2048);
        rig.write(BUFFERS + 0x2_0000, &[0; 12]);
        rig.write(BUFFERS + 0x2_000c, &frame(100));
        rig.rings[1].post(&[readable(BUFFERS + 0x2_0000, 112)]);
        rig.settle().expect("the driver keeps to the rules");
        assert_eq!(rig.counter("tx_errors"), 1);
        ip("link set vml0 up");
        let host = PacketSocket::on("vml0");
        rig.rings[1].post(&[readable(BUFFERS + 0x2_0000, 112)]);
        rig.net.process_queue(1).expect("the driver keeps to the rules");
        assert_eq!(host.receive(), frame(100));
        host.send(&frame(100));
        rig.settle().expect("the driver keeps to the rules");
        assert_eq!(rig.rings[0].used(), [(0, 112)]);
    });
}
