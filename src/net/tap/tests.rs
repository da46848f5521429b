//! What needs no privilege runs always. The tests on a real tap are marked ignored, so that a run without them says
//! so; they need root, `/dev/net/tun` and `ip`, and leave nothing behind: each has a network namespace of its own.

use std::os::fd::FromRawFd;
use std::process::{Command, Stdio};

use super::*;

const NEEDS: &str = "this test needs root, /dev/net/tun and ip";

#[test]
fn a_name_no_interface_can_have_is_refused_with_its_reason() {
    let long = "it is longer than 15 bytes";
    let odd = "only visible ascii characters except / : % are allowed";
    for (name, reason) in [
        ("", "it is empty or a directory"),
        ("..", "it is empty or a directory"),
        ("sixteen-bytes-xx", long),
        ("tap 0", odd),
        ("tap/0", odd),
        ("tap%d", odd),
        ("tap\0", odd),
        ("tāp", odd),
    ] {
        let error = Tap::open(name, 1).expect_err("the name is impossible");
        assert_eq!(
            error.to_string(),
            format!("{name:?} cannot be the name of a tap: {reason}")
        );
    }
}

#[test]
fn a_tap_that_does_not_exist_is_not_created() {
    for _ in 0..2 {
        let error = Tap::open("vml-no-such-tap", 1).expect_err("there is no such tap");
        assert_eq!(error.to_string(), "tap \"vml-no-such-tap\" does not exist");
    }
}

#[test]
fn the_number_of_queue_pairs_has_a_range() {
    for count in [0, 33] {
        let error = Tap::open("tap0", count).expect_err("out of range");
        assert_eq!(
            error.to_string(),
            format!("a tap cannot have {count} queue pairs, the range is 1 to 32")
        );
    }
    assert!(matches!(
        Tap::from_fds(Vec::new()),
        Err(TapError::QueuePairCount { count: 0 })
    ));
}

#[test]
fn another_descriptor_is_not_a_tap() {
    let null = File::open("/dev/null").expect("every host has it");
    let error = Tap::from_fds(vec![null.into()]).expect_err("the null device is no tap");
    assert_eq!(error.to_string(), "descriptor 0 is not attached to a tap");
}

#[test]
#[ignore = "needs root and /dev/net/tun"]
fn every_refusal_names_the_tap() {
    in_namespace(|| {
        ip("tuntap add dev vml0 mode tap");
        ip("tuntap add dev vml1 mode tun");
        let tap = Tap::open("vml0", 1).expect("the tap is free");
        assert_eq!((tap.name(), tap.queue_pair_count()), ("vml0", 1));
        for (name, count, message) in [
            ("vml0", 1, "tap \"vml0\" is in use"),
            ("vml1", 1, "interface \"vml1\" is not a tap"),
            ("lo", 2, "interface \"lo\" is not a tap"),
        ] {
            let error = Tap::open(name, count).expect_err("it cannot be taken");
            assert_eq!(error.to_string(), message);
        }
        drop(tap);
        let error = Tap::open("vml0", 2).expect_err("it has one queue");
        assert_eq!(
            error.to_string(),
            "tap \"vml0\" has a single queue, 2 queue pairs were asked for"
        );
        Tap::open("vml0", 1).expect("a refusal leaves the tap free");
    });
}

#[test]
#[ignore = "needs root and /dev/net/tun"]
fn handed_over_descriptors_must_be_one_tap_in_the_right_mode() {
    in_namespace(|| {
        let queue = |name: &str, flags| {
            let queue = open_driver(name).expect(NEEDS);
            let name = CString::new(name).expect("no nul");
            attach(&queue, &name, flags).expect(NEEDS);
            OwnedFd::from(queue)
        };
        let error = Tap::from_fds(vec![queue("vml0", IFF_TAP | IFF_NO_PI)]).expect_err("no header");
        assert_eq!(
            error.to_string(),
            "descriptor 0, tap \"vml0\", was not opened with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR"
        );
        let flags = TAP_FLAGS | IFF_MULTI_QUEUE;
        let error = Tap::from_fds(vec![queue("vml1", flags), queue("vml2", flags)]).expect_err("two taps");
        assert_eq!(
            error.to_string(),
            "descriptor 1 is attached to tap \"vml2\", the first one to \"vml1\""
        );
        let mut tap = Tap::from_fds(vec![queue("vml3", flags), queue("vml3", flags)]).expect("one tap");
        assert_eq!((tap.name(), tap.queue_pair_count()), ("vml3", 2));
        for count in [1, 2, 1] {
            tap.set_active_pair_count(count).expect("the tap has two queues");
            assert_eq!(tap.inspect()["active_pair_count"], count);
        }
        for count in [0, 3] {
            let error = tap.set_active_pair_count(count).expect_err("out of range");
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        }
    });
}

#[test]
#[ignore = "needs root and /dev/net/tun"]
fn a_multi_queue_tap_serves_one_pair_or_several_with_any_offload() {
    in_namespace(|| {
        ip("tuntap add dev vml0 mode tap multi_queue");
        for count in [1, 2, 4] {
            let mut tap = Tap::open("vml0", count).expect("the tap is free");
            assert_eq!(tap.queue_pair_count(), count);
            tap.set_receive_offloads(Offloads::ALL)
                .expect("linux has all of them");
            let error = tap.set_receive_offloads(Offloads {
                checksum: false,
                ..Offloads::ALL
            });
            let error = error.expect_err("segmentation needs checksums");
            assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
        }
    });
}

#[test]
#[ignore = "needs root and /dev/net/tun"]
fn a_multi_queue_tap_has_one_user() {
    in_namespace(|| {
        ip("tuntap add dev vml0 mode tap multi_queue");
        let refusal = |count| {
            let error = Tap::open("vml0", count).expect_err("somebody has it");
            assert_eq!(error.to_string(), "tap \"vml0\" is in use");
        };
        for (first, second) in [(1, 1), (1, 2), (2, 1), (4, 2)] {
            let mut tap = Tap::open("vml0", first).expect("the tap is free");
            refusal(second);
            if first > 1 {
                tap.set_active_pair_count(1).expect("fewer are possible");
                refusal(second);
            }
            drop(tap);
        }
        // Another process, which keeps its queue until its input ends.
        let name = CString::new("vml0").expect("no nul");
        let queue = open_driver("vml0").expect(NEEDS);
        attach(&queue, &name, TAP_FLAGS | IFF_MULTI_QUEUE).expect(NEEDS);
        let mut other = Command::new("cat")
            .stdin(Stdio::piped())
            .stdout(Stdio::from(queue))
            .spawn()
            .expect("every host has cat");
        refusal(1);
        drop(other.stdin.take());
        other.wait().expect("it ends with its input");
        Tap::open("vml0", 1).expect("the tap is free");
    });
}

#[test]
#[ignore = "needs root and /dev/net/tun"]
fn a_tap_of_another_user_is_not_permitted() {
    in_namespace(|| {
        ip("tuntap add dev vml0 mode tap user 65533");
        let attempt = || {
            // SAFETY: takes and returns integers only; changes this thread's user, and the thread ends afterwards. The
            // library's function would change all threads.
            checked(unsafe { libc::syscall(libc::SYS_setresuid, 65534, 65534, 65534) } as c_int)
                .expect(NEEDS);
            Tap::open("vml0", 1)
                .map(|_| ())
                .map_err(|error| error.to_string())
        };
        // A new thread is in the same network namespace.
        let error = std::thread::spawn(attempt).join().expect("no panic");
        let permitted = std::fs::metadata("/dev/net/tun").expect(NEEDS).permissions();
        let expected = if std::os::unix::fs::PermissionsExt::mode(&permitted) & 0o006 == 0o006 {
            "this process may not attach to tap \"vml0\""
        } else {
            "cannot open /dev/net/tun for tap \"vml0\""
        };
        assert_eq!(error, Err(expected.to_owned()));
    });
}

#[test]
#[ignore = "needs root and /dev/net/tun"]
fn frames_pass_both_ways_and_nothing_blocks() {
    in_namespace(|| {
        let mut tap = tap_up("vml0");
        let host = PacketSocket::on("vml0");
        let mut bytes = [0u8; 128];
        let buffers = [VolatileSlice::from(&mut bytes[..])];
        let error = tap.receive(0, &buffers).expect_err("no packet waits");
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        host.send(&frame(60));
        assert_eq!(tap.receive(0, &buffers).expect("a packet waits"), 72);
        let (header, body) = buffers[0].split_at(12).expect("128 is more than 12");
        let mut frame_bytes = [0; 60];
        body.copy_to(&mut frame_bytes[..]);
        assert_eq!(frame_bytes[..], frame(60));
        header.copy_from(&[0u8; 12]);
        let sent = buffers[0].subslice(0, 72).expect("72 is less than 128");
        tap.transmit(0, &[sent]).expect("the tap is up");
        assert_eq!(host.receive(), frame(60));
        // A cut packet fills the buffers, as the contract says.
        host.send(&frame(200));
        assert_eq!(tap.receive(0, &buffers).expect("a packet waits"), 128);
        let error = tap.receive(0, &buffers).expect_err("the rest is lost");
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    });
}

/// Runs `test` on a thread with a network namespace of its own, where IPv6 sends nothing by itself.
pub(crate) fn in_namespace(test: impl FnOnce() + Send + 'static) {
    let run = move || {
        // SAFETY: unshare takes and returns integers only.
        checked(unsafe { libc::unshare(libc::CLONE_NEWNET) }).expect(NEEDS);
        for interfaces in ["all", "default"] {
            let path = format!("/proc/sys/net/ipv6/conf/{interfaces}/disable_ipv6");
            // A host without IPv6 has no such file and sends nothing either.
            let _ = std::fs::write(path, "1");
        }
        test();
    };
    if let Err(panic) = std::thread::spawn(run).join() {
        std::panic::resume_unwind(panic);
    }
}

/// Runs `ip` with `arguments` in this thread's namespace.
pub(crate) fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split(' ')).status();
    assert!(status.expect(NEEDS).success(), "ip {arguments}");
}

/// A tap of one queue that is up.
pub(crate) fn tap_up(name: &str) -> Tap {
    ip(&format!("tuntap add dev {name} mode tap"));
    ip(&format!("link set {name} up"));
    Tap::open(name, 1).expect("the tap is free")
}

/// A broadcast frame of `length` bytes with the ethertype for local experiments.
pub(crate) fn frame(length: usize) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend([0x52, 0, 0, 0, 0, 1, 0x88, 0xb5]);
    frame.extend((14..length).map(|at| at as u8));
    frame
}

/// The host's side of an interface.
pub(crate) struct PacketSocket(File);

impl PacketSocket {
    pub(crate) fn on(name: &str) -> Self {
        let name = CString::new(name).expect("no nul");
        let protocol = 0x88b5u16.to_be();
        // SAFETY: socket takes and returns integers only.
        let fd = unsafe {
            libc::socket(
                libc::AF_PACKET,
                libc::SOCK_RAW | libc::SOCK_CLOEXEC,
                protocol.into(),
            )
        };
        checked(fd).expect(NEEDS);
        // SAFETY: the descriptor was just made and belongs to nobody else.
        let socket = unsafe { File::from_raw_fd(fd) };
        // SAFETY: sockaddr_ll is plain old data for which zero is a value.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = protocol;
        address.sll_ifindex = interface_index(&name).expect("the interface exists") as i32;
        let length = size_of::<libc::sockaddr_ll>() as u32;
        // SAFETY: the address is valid for reading `length` bytes during the call.
        checked(unsafe { libc::bind(fd, (&raw const address).cast(), length) }).expect(NEEDS);
        Self(socket)
    }

    pub(crate) fn send(&self, frame: &[u8]) {
        let length = io::Write::write(&mut &self.0, frame).expect("the interface is up");
        assert_eq!(length, frame.len());
    }

    pub(crate) fn receive(&self) -> Vec<u8> {
        let mut frame = vec![0; 2048];
        let length = io::Read::read(&mut &self.0, &mut frame).expect("the interface is up");
        frame.truncate(length);
        frame
    }
}
