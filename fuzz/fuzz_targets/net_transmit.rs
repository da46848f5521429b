//! A network card fed with any chains, rings and packets, in both directions.
#![no_main]
#![forbid(unsafe_code)]

use std::os::unix::net::UnixDatagram;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use vm_lifecycle::ids::MacAddr;
use vm_lifecycle::net::fake::FakeNet;
use vm_lifecycle::virtio::device::DeviceFault;
use vm_lifecycle::virtio::net::Net;
use vm_lifecycle_fuzz::driver::{Driven, Step};

#[derive(Debug, Arbitrary)]
struct Input {
    features: u64,
    size_log2: u8,
    two_pairs: bool,
    steps: Vec<NetStep>,
}

#[derive(Debug, Arbitrary)]
enum NetStep {
    Driver(Step),
    /// A packet of `length` bytes arrives at a pair.
    Arrive {
        pair: u8,
        length: u16,
    },
    /// The network takes what was sent.
    Take {
        pair: u8,
    },
    Link(bool),
    /// The network is gone for good.
    Lose {
        pair: u8,
    },
}

/// A control command (virtio 1.2 §5.1.6.5), or the header of a packet.
fn header([class, command, low, high]: [u8; 4]) -> Vec<u8> {
    vec![class % 8, command % 8, low, high, 0, 0, 0, 0, 0, 0, 0, 0]
}

fn play(
    driven: &mut Driven<Net>,
    far: &mut [Option<UnixDatagram>],
    step: &NetStep,
) -> Result<(), DeviceFault> {
    let count = far.len();
    let at = |pair: &u8| usize::from(*pair) % count;
    match step {
        NetStep::Driver(step) => driven.play(step)?,
        NetStep::Arrive { pair, length } => {
            if let Some(far) = &far[at(pair)] {
                // A full socket refuses, as a network does.
                let _ = far.send(&vec![0xAA; usize::from(*length)]);
            }
        }
        NetStep::Take { pair } => {
            if let Some(far) = &far[at(pair)] {
                let mut packet = vec![0; 1 << 17];
                while far.recv(&mut packet).is_ok() {}
            }
        }
        NetStep::Link(up) => driven.device.set_link(*up),
        NetStep::Lose { pair } => far[at(pair)] = None,
    }
    Ok(())
}

fuzz_target!(|input: Input| {
    let (backend, far) = FakeNet::new(1 + u16::from(input.two_pairs)).expect("descriptors are free");
    let mut far: Vec<_> = far.into_iter().map(Some).collect();
    let mac = MacAddr::new([0x52, 1, 2, 3, 4, 5]).expect("a unicast address");
    let net = Net::new(mac, Box::new(backend)).expect("descriptors are free");
    let Some(mut driven) = Driven::start(net, input.features, input.size_log2, header) else {
        return;
    };
    let steps = &mut input.steps.iter();
    let outcome = steps.try_for_each(|step| play(&mut driven, &mut far, step));
    driven.finish(outcome);
});
