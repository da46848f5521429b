//! What the guest, devices and the host see of a region whose blocks come and go.

use std::sync::Arc;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestMemoryBackend};

use super::*;
use crate::machine::fake::FakeVm;
use crate::memory::layout::HIGH_RAM_START;
use crate::memory::region::RAM_MIN_BYTES;

const BLOCK: u64 = BLOCK_BYTES;
const SLOT: u64 = RUNTIME_MEMORY_ALIGN_BYTES;

struct Rig {
    vm: Arc<FakeVm>,
    runtime: RuntimeMemory,
}

fn rig(size_bytes: u64, memslot_count_max: u32) -> Rig {
    let ram = GuestRam::new(RAM_MIN_BYTES, RamOptions::default(), 40).expect("64 MiB are there");
    let vm = Arc::new(FakeVm::default());
    let memslots = Memslots::new(vm.clone(), memslot_count_max);
    let runtime = RuntimeMemory::new(&ram, size_bytes, RamOptions::default(), 40, memslots);
    Rig {
        vm,
        runtime: runtime.expect("an empty region costs nothing"),
    }
}

impl Rig {
    fn reached(&self, offset: u64) -> bool {
        let address = GuestAddress(self.runtime.base() + offset);
        self.runtime.memory().memory().address_in_range(address)
    }

    fn write(&self, offset: u64) {
        let address = GuestAddress(self.runtime.base() + offset);
        let memory = self.runtime.memory().memory();
        memory.write_obj(7u64, address).expect("the slot is live");
    }

    fn resident_bytes(&self) -> u64 {
        self.runtime.resident_bytes().expect("the file has metadata")
    }
}

#[test]
fn what_it_costs_is_told_while_slots_come_and_go() {
    let rig = rig(4 * SLOT, 8);
    rig.runtime.plug(0, BLOCK).expect("it is in the region");
    rig.write(0);
    let _busy = rig.runtime.slots();
    assert!(rig.resident_bytes() > 0);
    assert_eq!(rig.runtime.live_bytes(), SLOT);
}

#[test]
fn a_slot_that_the_host_does_not_delete_stays_mapped() {
    let rig = rig(4 * SLOT, 8);
    rig.runtime.plug(0, BLOCK).expect("it is in the region");
    let mapping = Arc::downgrade(&rig.runtime.slots().live[&0].region);
    rig.vm.refuse_deletes(true);
    rig.runtime
        .unplug(0, BLOCK)
        .expect("the pages go back all the same");
    assert!(mapping.strong_count() > 0, "the guest still reaches it");
    assert_eq!((rig.runtime.live_bytes(), rig.reached(0)), (0, false));
}

#[test]
fn a_slot_is_there_while_any_block_in_it_is_plugged() {
    let rig = rig(4 * SLOT, 8);
    assert_eq!(rig.runtime.base(), HIGH_RAM_START);
    rig.runtime
        .plug(SLOT + BLOCK, BLOCK)
        .expect("it is in the region");
    rig.runtime
        .plug(2 * SLOT - BLOCK, 2 * BLOCK)
        .expect("it is in the region");
    assert_eq!((rig.vm.memslot_count(), rig.runtime.live_slot_count()), (2, 2));
    assert_eq!(
        [0, 1, 2, 3].map(|slot| rig.reached(slot * SLOT)),
        [false, true, true, false]
    );
    rig.write(SLOT + BLOCK);
    rig.write(2 * SLOT - 8);
    rig.runtime
        .unplug(SLOT + BLOCK, BLOCK)
        .expect("the file has holes");
    assert!(rig.reached(SLOT), "another block of the slot is plugged");
    let left_bytes = rig.resident_bytes();
    assert!(
        (4096..=BLOCK).contains(&left_bytes),
        "{left_bytes} bytes of one touched page"
    );
    rig.runtime
        .unplug(2 * SLOT - BLOCK, 2 * BLOCK)
        .expect("the file has holes");
    assert_eq!(
        (rig.vm.memslot_count(), rig.reached(SLOT), rig.reached(2 * SLOT)),
        (0, false, false)
    );
    assert_eq!(rig.resident_bytes(), 0);
}

#[test]
fn a_device_at_work_keeps_its_mapping_and_what_it_writes_late_is_given_back() {
    let rig = rig(SLOT, 8);
    rig.runtime.plug(0, BLOCK).expect("it is in the region");
    let in_flight = rig.runtime.memory().memory().into_inner();
    rig.runtime.unplug(0, BLOCK).expect("the file has holes");
    assert!(!rig.reached(0), "a new request does not reach it");
    let address = GuestAddress(rig.runtime.base());
    in_flight
        .write_obj(7u64, address)
        .expect("a request in flight does");
    assert!(rig.resident_bytes() > 0);
    drop(in_flight);
    assert_eq!(rig.resident_bytes(), 0);
}

#[test]
fn late_writes_do_not_take_memory_from_a_slot_that_came_back() {
    let rig = rig(SLOT, 8);
    rig.runtime.plug(0, BLOCK).expect("it is in the region");
    let in_flight = rig.runtime.memory().memory().into_inner();
    rig.runtime.unplug(0, BLOCK).expect("the file has holes");
    rig.runtime.plug(0, BLOCK).expect("it is in the region");
    rig.write(0);
    drop(in_flight);
    assert!(rig.resident_bytes() > 0);
    let memory = rig.runtime.memory().memory();
    assert_eq!(
        memory
            .read_obj::<u64>(GuestAddress(rig.runtime.base()))
            .expect("live"),
        7
    );
}

#[test]
fn what_cannot_be_plugged_leaves_nothing_behind() {
    let rig = rig(2 * SLOT, 1);
    let error = rig.runtime.plug(0, 2 * SLOT).expect_err("there is one memslot");
    assert_eq!(error.to_string(), "all 1 memslots of the vm are in use");
    assert_eq!((rig.vm.memslot_count(), rig.reached(0)), (0, false));
    for (offset, length_bytes) in [(2 * SLOT, BLOCK), (SLOT, 2 * SLOT), (u64::MAX, BLOCK)] {
        let error = rig.runtime.plug(offset, length_bytes).expect_err("outside");
        let told =
            format!("runtime memory {offset:#x}+{length_bytes:#x} is not in the region of 0x10000000 bytes");
        assert_eq!(error.to_string(), told);
    }
}

#[test]
fn pages_that_the_guest_does_not_use_are_given_back_and_stay_its_own() {
    let rig = rig(SLOT, 8);
    rig.runtime.plug(0, 2 * BLOCK).expect("it is in the region");
    rig.write(0);
    rig.write(BLOCK);
    let base = rig.runtime.base();
    rig.runtime
        .discard(base - BLOCK, 2 * BLOCK - 1)
        .expect("the file has holes");
    rig.runtime
        .discard(base + SLOT - 1, u64::MAX)
        .expect("the end is cut off");
    let memory = rig.runtime.memory().memory();
    assert_eq!(memory.read_obj::<u64>(GuestAddress(base)).expect("live"), 0);
    assert_eq!(
        memory.read_obj::<u64>(GuestAddress(base + BLOCK)).expect("live"),
        7
    );
    rig.runtime.clear().expect("the file has holes");
    assert_eq!(
        (rig.resident_bytes(), rig.vm.memslot_count(), rig.reached(0)),
        (0, 0, false)
    );
}

#[test]
fn large_regions_have_larger_slots_instead_of_more() {
    assert_eq!(slot_bytes(SLOT), SLOT);
    assert_eq!(slot_bytes(SLOT_COUNT_MAX * SLOT), SLOT);
    assert_eq!(slot_bytes((SLOT_COUNT_MAX + 1) * SLOT), 2 * SLOT);
    assert_eq!(slot_bytes(12 << 40), 128 * SLOT);
}

proptest! {
    #[test]
    fn guest_and_devices_see_exactly_the_slots_with_plugged_blocks(
        steps in prop::collection::vec((any::<bool>(), 0u64..12, 1u64..6), 1..40),
    ) {
        // Blocks of a quarter of a slot: twelve in three slots.
        let block = SLOT / 4;
        let rig = rig(3 * SLOT, 8);
        let mut plugged = [false; 12];
        for (plug, first, count) in steps {
            let range = first as usize..(first + count).min(12) as usize;
            // Plugged blocks are not plugged again; any block may be unplugged.
            if plug && plugged[range.clone()].contains(&true) {
                continue;
            }
            let length_bytes = range.len() as u64 * block;
            if plug {
                rig.runtime.plug(first * block, length_bytes).expect("it is in the region");
            } else {
                rig.runtime.unplug(first * block, length_bytes).expect("the file has holes");
            }
            plugged[range].fill(plug);
            let live: Vec<_> = plugged.chunks(4).map(|slot| slot.contains(&true)).collect();
            let reached: Vec<_> = (0..3).map(|slot| rig.reached(slot * SLOT)).collect();
            prop_assert_eq!(&reached, &live);
            prop_assert_eq!(rig.vm.memslot_count(), live.iter().filter(|live| **live).count());
        }
    }
}
