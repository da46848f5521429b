//! Interrupts into the guest: pins of the I/O APIC and message-signalled interrupts, both through irqfds.
//!
//! KVM knows interrupts by GSI. GSIs 0–23 are the pins of the I/O APIC and are pinned by `memory::layout`; every MSI
//! vector that a driver really unmasks takes one above them and gives it back when it is dropped; there is one for each
//! vector of each device, or the device was refused. The routing table
//! is KVM's only as a whole, so this table keeps it and writes it on each change.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, kvm_irq_routing_entry,
    kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_irqchip, kvm_irq_routing_msi,
};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::HostVm;
use crate::memory::layout::IOAPIC_PIN_COUNT;

/// One more than the highest GSI that KVM routes (Linux KVM_MAX_IRQ_ROUTES).
const GSI_END: u32 = 4096;

/// The interrupt routing of one VM.
#[derive(Clone)]
pub struct GsiTable {
    inner: Arc<Inner>,
}

struct Inner {
    vm: Arc<dyn HostVm>,
    routes: Mutex<BTreeMap<u32, Route>>,
    /// How many MSI vectors the devices have together; never more than there are GSIs for them.
    promised_count: AtomicU32,
}

/// What a GSI leads to.
#[derive(Debug, Clone, Copy)]
enum Route {
    /// Taken but masked: it leads nowhere.
    Reserved,
    Msi(MsiMessage),
}

/// A message-signalled interrupt as the driver wrote it into the MSI-X table (PCI 3.0 §6.8.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct MsiMessage {
    /// The 64-bit message address.
    pub address: u64,
    /// The 32-bit message data.
    pub data: u32,
}

/// Why an interrupt could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum GsiError {
    /// A device's vectors do not fit beside those of the others.
    #[error("{count} more interrupt vectors are too many, the vm has {left_count} left")]
    TooMany { count: u32, left_count: u32 },
    /// Every GSI is in use.
    #[error("all {GSI_END} interrupt routes of the vm are in use")]
    Exhausted,
    /// The host refused.
    #[error("the host refused {what} for gsi {gsi}")]
    Host {
        what: &'static str,
        gsi: u32,
        #[source]
        source: io::Error,
    },
}

impl GsiTable {
    /// Makes the table of `vm`, which has an in-kernel irqchip.
    pub fn new(vm: Arc<dyn HostVm>) -> Self {
        Self {
            inner: Arc::new(Inner {
                vm,
                routes: Mutex::new(BTreeMap::new()),
                promised_count: AtomicU32::new(0),
            }),
        }
    }

    /// Hands the table to KVM, which until then routes the pins to the PICs too. Called once, before any vCPU runs.
    ///
    /// # Errors
    /// [`GsiError::Host`] when the host refuses.
    pub fn install(&self) -> Result<(), GsiError> {
        let entries = entries(&self.inner.lock());
        let installed = self.inner.vm.set_gsi_routing(&entries);
        installed.map_err(|source| GsiError::Host {
            what: "the interrupt routes of the pins",
            gsi: 0,
            source,
        })
    }

    /// Keeps `count` GSIs for a device, so that it is refused as a whole when it is added and never short of one at
    /// work.
    ///
    /// # Errors
    /// [`GsiError::TooMany`] when the devices would have more vectors than there are GSIs.
    pub fn promise(&self, count: u32) -> Result<MsiPromise, GsiError> {
        let limit = GSI_END - IOAPIC_PIN_COUNT;
        let add = |promised: u32| promised.checked_add(count).filter(|sum| *sum <= limit);
        let promised = &self.inner.promised_count;
        match promised.fetch_update(Ordering::SeqCst, Ordering::SeqCst, add) {
            Ok(_) => Ok(MsiPromise {
                table: self.inner.clone(),
                count,
            }),
            Err(promised) => Err(GsiError::TooMany {
                count,
                left_count: limit.saturating_sub(promised),
            }),
        }
    }

    /// Takes a free GSI for one MSI vector, masked at first.
    ///
    /// # Errors
    /// [`GsiError::Exhausted`], or [`GsiError::Host`] when no eventfd can be made.
    pub fn msi(&self) -> Result<MsiRoute, GsiError> {
        let mut routes = self.inner.lock();
        let gsi = (IOAPIC_PIN_COUNT..GSI_END).find(|gsi| !routes.contains_key(gsi));
        let gsi = gsi.ok_or(GsiError::Exhausted)?;
        let irqfd = new_eventfd(gsi)?;
        routes.insert(gsi, Route::Reserved);
        drop(routes);
        Ok(MsiRoute {
            table: self.inner.clone(),
            gsi,
            irqfd,
            bound: false,
        })
    }

    /// Connects a line to the I/O APIC's pin `gsi` (0–23).
    ///
    /// # Errors
    /// [`GsiError::Host`] when the host refuses the irqfd.
    pub fn line(&self, gsi: u32) -> Result<IrqLine, GsiError> {
        let irqfd = new_eventfd(gsi)?;
        self.inner
            .vm
            .register_irqfd(&irqfd, gsi)
            .map_err(|source| GsiError::Host {
                what: "an irqfd",
                gsi,
                source,
            })?;
        Ok(IrqLine {
            table: self.inner.clone(),
            gsi,
            irqfd,
        })
    }

    /// The number of MSI routes in use.
    pub fn msi_count(&self) -> usize {
        self.inner.lock().len()
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u32, Route>> {
        self.routes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets `gsi`'s route and hands the whole table to KVM. On error the table is as it was.
    fn set(&self, gsi: u32, route: Route) -> Result<(), GsiError> {
        let mut routes = self.lock();
        let before = routes.insert(gsi, route);
        if let Err(source) = self.vm.set_gsi_routing(&entries(&routes)) {
            match before {
                Some(before) => routes.insert(gsi, before),
                None => routes.remove(&gsi),
            };
            return Err(GsiError::Host {
                what: "the interrupt route",
                gsi,
                source,
            });
        }
        Ok(())
    }
}

/// GSIs that are kept for the vectors of one device, until it is dropped.
pub struct MsiPromise {
    table: Arc<Inner>,
    count: u32,
}

impl Drop for MsiPromise {
    fn drop(&mut self) {
        self.table.promised_count.fetch_sub(self.count, Ordering::SeqCst);
    }
}

/// One MSI vector's way into the guest. Dropping it frees the GSI.
pub struct MsiRoute {
    table: Arc<Inner>,
    gsi: u32,
    irqfd: EventFd,
    bound: bool,
}

impl MsiRoute {
    /// The GSI of this vector, fixed until it is dropped.
    pub fn gsi(&self) -> u32 {
        self.gsi
    }

    /// Routes the vector to `message`; a trigger reaches the guest from now on.
    ///
    /// # Errors
    /// [`GsiError::Host`] when the host refuses the route; the former one stays.
    pub fn set_message(&mut self, message: MsiMessage) -> Result<(), GsiError> {
        let gsi = self.gsi;
        self.table.set(gsi, Route::Msi(message))?;
        if !self.bound {
            let bound = self.table.vm.register_irqfd(&self.irqfd, gsi);
            bound.map_err(|source| GsiError::Host {
                what: "an irqfd",
                gsi,
                source,
            })?;
            self.bound = true;
        }
        Ok(())
    }

    /// Raises the interrupt once.
    pub fn trigger(&self) {
        trigger(&self.irqfd, self.gsi);
    }

    /// The eventfd behind the vector, for those who raise it without this process (vhost).
    pub fn irqfd(&self) -> &EventFd {
        &self.irqfd
    }
}

impl Drop for MsiRoute {
    fn drop(&mut self) {
        if self.bound
            && let Err(error) = self.table.vm.unregister_irqfd(&self.irqfd, self.gsi)
        {
            log::warn!("gsi {}: cannot unregister the irqfd: {error}", self.gsi);
        }
        // KVM keeps the stale route until the next change of the table; without an irqfd nothing can raise it.
        self.table.lock().remove(&self.gsi);
    }
}

/// A line to a pin of the I/O APIC: an edge by [`IrqLine::trigger`] or a level by [`IrqLine::hold`], as the guest was
/// told. Dropping it disconnects the line.
pub struct IrqLine {
    table: Arc<Inner>,
    gsi: u32,
    irqfd: EventFd,
}

impl IrqLine {
    /// Raises the interrupt once. A guest whose pin is masked then never hears of it.
    pub fn trigger(&self) {
        trigger(&self.irqfd, self.gsi);
    }

    /// Holds the line active, or lets go of it. A guest whose pin is masked hears of it when it unmasks the pin.
    pub fn hold(&self, active: bool) {
        if let Err(error) = self.table.vm.set_line(self.gsi, active) {
            log::error!("gsi {}: the line cannot be set: {error}", self.gsi);
        }
    }
}

impl Drop for IrqLine {
    fn drop(&mut self) {
        if let Err(error) = self.table.vm.unregister_irqfd(&self.irqfd, self.gsi) {
            log::warn!("gsi {}: cannot unregister the irqfd: {error}", self.gsi);
        }
    }
}

fn new_eventfd(gsi: u32) -> Result<EventFd, GsiError> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(|source| GsiError::Host {
        what: "an eventfd",
        gsi,
        source,
    })
}

fn trigger(irqfd: &EventFd, gsi: u32) {
    // A full counter (EAGAIN) means that the interrupt is pending already.
    if let Err(error) = irqfd.write(1)
        && error.kind() != io::ErrorKind::WouldBlock
    {
        log::warn!("gsi {gsi}: cannot raise the interrupt: {error}");
    }
}

/// The whole routing table: the pins of the I/O APIC, then the MSI routes. The PICs get no interrupts: a hardware-reduced
/// ACPI guest never programs them, and an unprogrammed PIC delivers its interrupts as exceptions.
fn entries(routes: &BTreeMap<u32, Route>) -> Vec<kvm_irq_routing_entry> {
    let mut entries = Vec::with_capacity(40 + routes.len());
    for gsi in 0..IOAPIC_PIN_COUNT {
        // Pin 2 carries the timer (ISA IRQ 0), as KVM's default routing has it.
        entries.push(pin(gsi, KVM_IRQCHIP_IOAPIC, if gsi == 0 { 2 } else { gsi }));
    }
    for (&gsi, route) in routes {
        if let Route::Msi(message) = route {
            entries.push(msi(gsi, *message));
        }
    }
    entries
}

fn pin(gsi: u32, irqchip: u32, pin: u32) -> kvm_irq_routing_entry {
    kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        u: kvm_irq_routing_entry__bindgen_ty_1 {
            irqchip: kvm_irq_routing_irqchip { irqchip, pin },
        },
        ..Default::default()
    }
}

fn msi(gsi: u32, message: MsiMessage) -> kvm_irq_routing_entry {
    let mut msi = kvm_irq_routing_msi {
        address_lo: message.address as u32,
        address_hi: (message.address >> 32) as u32,
        ..Default::default()
    };
    msi.data = message.data;
    kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        u: kvm_irq_routing_entry__bindgen_ty_1 { msi },
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::fake::FakeVm;

    #[test]
    fn a_dropped_vector_gives_its_gsi_back() {
        let vm = Arc::new(FakeVm::default());
        let table = GsiTable::new(vm.clone());
        let mut first = table.msi().expect("gsis are free");
        let second = table.msi().expect("gsis are free");
        assert_eq!((first.gsi(), second.gsi()), (24, 25));
        first
            .set_message(MsiMessage {
                address: 0xFEE0_0000,
                data: 0x41,
            })
            .expect("the fake accepts");
        assert_eq!(vm.irqfd_count(), 1);
        drop(first);
        assert_eq!((vm.irqfd_count(), table.msi_count()), (0, 1));
        assert_eq!(table.msi().expect("gsis are free").gsi(), 24);
    }

    #[test]
    fn running_out_of_gsis_is_a_named_error() {
        let table = GsiTable::new(Arc::new(FakeVm::default()));
        table
            .inner
            .lock()
            .extend((IOAPIC_PIN_COUNT..GSI_END).map(|gsi| (gsi, Route::Reserved)));
        let error = table.msi().err().expect("no gsi is left");
        assert_eq!(
            error.to_string(),
            "all 4096 interrupt routes of the vm are in use"
        );
    }

    #[test]
    fn a_device_whose_vectors_do_not_fit_is_refused_with_both_numbers() {
        let table = GsiTable::new(Arc::new(FakeVm::default()));
        let most = table.promise(4000).expect("there are 4072");
        let refusal = |count| table.promise(count).err().map(|error| error.to_string());
        let expected = "73 more interrupt vectors are too many, the vm has 72 left";
        assert_eq!(refusal(73).as_deref(), Some(expected));
        assert!(refusal(u32::MAX).is_some());
        assert_eq!(refusal(72), None, "a promise ends when it is dropped");
        drop(most);
        assert_eq!(refusal(4072), None);
    }
}
