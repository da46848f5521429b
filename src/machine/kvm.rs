//! The host's KVM and one VM of it.
//!
//! [`Kvm`] is opened once per process and tells what the host can do; [`KvmVm`] is the host's side of one VM: it has
//! the in-kernel interrupt controllers and the interval timer from the start and implements [`HostVm`].
//! References are to the KVM API documentation (`Documentation/virt/kvm/api.rst`).

use std::io;
use std::sync::Arc;

use kvm_bindings::{
    CpuId, KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY, KvmIrqRouting, kvm_cpuid_entry2,
    kvm_irq_routing_entry, kvm_pit_config, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, NoDatamatch, VcpuFd, VmFd};
use vmm_sys_util::errno;
use vmm_sys_util::eventfd::EventFd;

use super::HostVm;
use super::caps::REQUIREMENTS;
use crate::memory::layout::{KVM_IDENTITY_MAP_BASE, KVM_TSS_BASE};

/// The most vCPUs of a VM: every APIC id stays below 255, which is the broadcast address (Intel SDM 3A §11.6.2).
pub const VCPU_COUNT_MAX: u32 = 254;
/// How often the creation of a VM is tried again after a signal interrupted it.
const CREATE_ATTEMPTS_MAX: u32 = 16;

/// The host's KVM.
#[derive(Clone)]
pub struct Kvm {
    host: Arc<Host>,
}

/// What the host can do, read once.
pub(super) struct Host {
    kvm: kvm_ioctls::Kvm,
    pub(super) supported_cpuid: Vec<kvm_cpuid_entry2>,
    pub(super) msr_indices: Vec<u32>,
    pub(super) tsc_deadline_timer: bool,
}

/// Why KVM or a VM cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// The host has no KVM: the device is absent.
    #[error(
        "/dev/kvm does not exist: the host has no hardware virtualization or its kvm module is not loaded"
    )]
    Absent,
    /// This process may not use KVM.
    #[error("/dev/kvm may not be opened by this process")]
    NotPermitted(#[source] io::Error),
    /// The device cannot be opened for another reason.
    #[error("/dev/kvm cannot be opened")]
    Open(#[source] io::Error),
    /// The device does not speak the KVM API.
    #[error("/dev/kvm speaks api version {have}, version {need} is needed")]
    ApiVersion {
        /// The version that the device told.
        have: i32,
        /// The only version there is.
        need: u32,
    },
    /// The host's KVM is too old or too small.
    #[error("the host's kvm lacks {name}, which is needed for {needed_for}")]
    Capability {
        /// The capability's name in the KVM API.
        name: &'static str,
        /// What it is needed for.
        needed_for: &'static str,
    },
    /// The host refused a step.
    #[error("the host refused {what}")]
    Host {
        /// The step.
        what: &'static str,
        /// The host's error.
        #[source]
        source: io::Error,
    },
}

impl Kvm {
    /// Opens `/dev/kvm` and checks that it can do what is needed.
    ///
    /// # Errors
    /// [`KvmError`], one variant for each reason.
    pub fn open() -> Result<Self, KvmError> {
        let kvm = kvm_ioctls::Kvm::new().map_err(open_error)?;
        let have = kvm.get_api_version();
        if have != KVM_API_VERSION as i32 {
            return Err(KvmError::ApiVersion {
                have,
                need: KVM_API_VERSION,
            });
        }
        check_capabilities(|cap| kvm.check_extension(cap))?;
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(refused("the supported cpuid"))?;
        let msrs = kvm.get_msr_index_list().map_err(refused("the list of msrs"))?;
        let host = Host {
            supported_cpuid: cpuid.as_slice().to_vec(),
            msr_indices: msrs.as_slice().to_vec(),
            tsc_deadline_timer: kvm.check_extension(Cap::TscDeadlineTimer),
            kvm,
        };
        Ok(Self { host: Arc::new(host) })
    }

    /// The most vCPUs that a VM can have on this host, at most [`VCPU_COUNT_MAX`].
    pub fn vcpu_count_max(&self) -> u32 {
        let host = u32::try_from(self.host.kvm.get_max_vcpus()).unwrap_or(u32::MAX);
        host.min(VCPU_COUNT_MAX)
    }

    /// The number of memslots that the host offers to each VM.
    pub fn memslot_count_max(&self) -> u32 {
        u32::try_from(self.host.kvm.get_nr_memslots()).unwrap_or(u32::MAX)
    }

    /// How many bits a guest-physical address can have on this host (CPUID 0x80000008 EAX bits 7–0).
    pub fn physical_address_bits(&self) -> u32 {
        let leaf = self
            .host
            .supported_cpuid
            .iter()
            .find(|entry| entry.function == 0x8000_0008);
        // 36 bits is what a CPU without this leaf has (Intel SDM 3A §4.1.4).
        leaf.map_or(36, |entry| entry.eax & 0xFF)
    }

    /// Makes a VM with in-kernel interrupt controllers and interval timer, without memory and vCPUs.
    ///
    /// # Errors
    /// [`KvmError::Host`] with the step that the host refused.
    pub fn create_vm(&self) -> Result<Arc<KvmVm>, KvmError> {
        let fd = self.create_fd().map_err(refused("a new vm"))?;
        // The addresses must be set before the first vCPU exists (KVM API 4.41).
        fd.set_identity_map_address(KVM_IDENTITY_MAP_BASE)
            .map_err(refused("the identity map address"))?;
        fd.set_tss_address(KVM_TSS_BASE as usize)
            .map_err(refused("the tss address"))?;
        fd.create_irq_chip()
            .map_err(refused("the interrupt controllers"))?;
        let pit = kvm_pit_config {
            // Port 0x61 is answered in the kernel, which some kernels poll while they calibrate clocks.
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        };
        fd.create_pit2(pit).map_err(refused("the interval timer"))?;
        Ok(Arc::new(KvmVm {
            fd,
            host: self.host.clone(),
        }))
    }

    fn create_fd(&self) -> Result<VmFd, errno::Error> {
        for _ in 1..CREATE_ATTEMPTS_MAX {
            match self.host.kvm.create_vm() {
                Err(error) if error.errno() == libc::EINTR => {}
                result => return result,
            }
        }
        self.host.kvm.create_vm()
    }
}

/// The host's side of one VM.
pub struct KvmVm {
    pub(super) fd: VmFd,
    pub(super) host: Arc<Host>,
}

impl KvmVm {
    pub(super) fn create_vcpu(&self, index: u32) -> io::Result<VcpuFd> {
        Ok(self.fd.create_vcpu(u64::from(index))?)
    }

    /// The size of a vCPU's extended state (KVM API 4.134 KVM_GET_XSAVE2): at least 4096 bytes.
    pub(super) fn xsave_size_bytes(&self) -> usize {
        usize::try_from(self.fd.check_extension_int(Cap::Xsave2)).unwrap_or(0)
    }
}

impl HostVm for KvmVm {
    fn set_memslot(&self, region: kvm_userspace_memory_region) -> io::Result<()> {
        // SAFETY: the kernel checks the region's alignment and overlap. The memory behind it is owned by whoever
        // registers the slot: `Memslots` is the only caller, checks the range against the mapping and keeps it mapped
        // until the slot is deleted, for ever if that fails. The guest's writes to it are those of another thread,
        // which vm-memory's volatile accesses allow for.
        unsafe { self.fd.set_user_memory_region(region) }?;
        Ok(())
    }

    fn register_irqfd(&self, fd: &EventFd, gsi: u32) -> io::Result<()> {
        Ok(self.fd.register_irqfd(fd, gsi)?)
    }

    fn unregister_irqfd(&self, fd: &EventFd, gsi: u32) -> io::Result<()> {
        Ok(self.fd.unregister_irqfd(fd, gsi)?)
    }

    fn set_line(&self, gsi: u32, active: bool) -> io::Result<()> {
        Ok(self.fd.set_irq_line(gsi, active)?)
    }

    fn set_gsi_routing(&self, entries: &[kvm_irq_routing_entry]) -> io::Result<()> {
        let routing =
            KvmIrqRouting::from_entries(entries).map_err(|_| io::Error::from_raw_os_error(libc::E2BIG))?;
        Ok(self.fd.set_gsi_routing(&routing)?)
    }

    fn register_ioevent(&self, fd: &EventFd, address: u64) -> io::Result<()> {
        let address = IoEventAddress::Mmio(address);
        Ok(self.fd.register_ioevent(fd, &address, NoDatamatch)?)
    }

    fn unregister_ioevent(&self, fd: &EventFd, address: u64) -> io::Result<()> {
        let address = IoEventAddress::Mmio(address);
        Ok(self.fd.unregister_ioevent(fd, &address, NoDatamatch)?)
    }
}

/// Refuses a host that lacks one of [`REQUIREMENTS`].
fn check_capabilities(has: impl Fn(Cap) -> bool) -> Result<(), KvmError> {
    match REQUIREMENTS.iter().find(|requirement| !has(requirement.cap)) {
        None => Ok(()),
        Some(requirement) => Err(KvmError::Capability {
            name: requirement.name,
            needed_for: requirement.needed_for,
        }),
    }
}

fn open_error(error: errno::Error) -> KvmError {
    match error.errno() {
        libc::ENOENT | libc::ENXIO | libc::ENODEV => KvmError::Absent,
        libc::EACCES | libc::EPERM => KvmError::NotPermitted(error.into()),
        _ => KvmError::Open(error.into()),
    }
}

fn refused(what: &'static str) -> impl FnOnce(errno::Error) -> KvmError {
    move |error| KvmError::Host {
        what,
        source: error.into(),
    }
}

pub(super) fn cpuid_from(entries: &[kvm_cpuid_entry2]) -> io::Result<CpuId> {
    CpuId::from_entries(entries).map_err(|_| io::Error::from_raw_os_error(libc::E2BIG))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reasons_for_having_no_kvm_are_told_apart() {
        let of = |errno| open_error(errno::Error::new(errno)).to_string();
        assert!(of(libc::ENOENT).starts_with("/dev/kvm does not exist"));
        assert_eq!(of(libc::EACCES), "/dev/kvm may not be opened by this process");
        assert_eq!(of(libc::EMFILE), "/dev/kvm cannot be opened");
    }

    #[test]
    fn each_capability_that_is_missing_is_named_with_what_needs_it() {
        assert!(check_capabilities(|_| true).is_ok());
        for requirement in &REQUIREMENTS {
            let lacking = |cap| cap as u32 != requirement.cap as u32;
            let error = check_capabilities(lacking)
                .expect_err(requirement.name)
                .to_string();
            let (name, what) = (requirement.name, requirement.needed_for);
            assert!(error.contains(name) && error.contains(what), "{error}");
        }
    }

    #[test]
    #[ignore = "needs /dev/kvm"]
    fn a_vm_takes_irqfds_ioevents_and_routes() {
        let kvm = Kvm::open().expect("this test needs /dev/kvm");
        let vm = kvm.create_vm().expect("kvm makes vms");
        let fd = EventFd::new(0).expect("descriptors are free");
        vm.register_irqfd(&fd, 5).expect("gsi 5 exists");
        vm.unregister_irqfd(&fd, 5).expect("it was registered");
        vm.register_ioevent(&fd, 0xC000_0000)
            .expect("the address is free");
        let error = vm.register_ioevent(&fd, 0xC000_0000).expect_err("taken");
        assert_eq!(error.raw_os_error(), Some(libc::EEXIST));
        vm.unregister_ioevent(&fd, 0xC000_0000)
            .expect("it was registered");
        vm.set_gsi_routing(&[]).expect("an empty table is allowed");
        assert!(kvm.vcpu_count_max() >= 1 && kvm.memslot_count_max() >= 2);
        assert!((32..=57).contains(&kvm.physical_address_bits()));
    }
}
