//! Guest RAM from the host's pool of huge pages: it is really taken from there, given back, and never more than there is.

use std::fs;

use libtest_mimic::Failed;
use vm_lifecycle::config::VmConfigBuilder;
use vm_lifecycle::vm::host::KvmPlatform;
use vm_lifecycle::vm::memory::ResizeOptions;
use vm_lifecycle::vm::operation::Ended;
use vm_lifecycle::vm::{CreateError, Vm};

use crate::Body;
use crate::guest::{BOOT_WITHIN, CMDLINE, Guest, TestHost, done, small};

const POOL: &str = "/proc/sys/vm/nr_hugepages";
const RAM_BYTES: u64 = 128 << 20;
/// What is plugged is shown to the guest in slots of this size.
const SLOT_BYTES: u64 = 128 << 20;
const PAGE_COUNT: u64 = RAM_BYTES >> 21;

/// The trials of this file.
pub fn trials() -> Vec<Body> {
    vec![Body::new(
        "huge_pages::a_pool_is_used_given_back_and_never_overdrawn",
        a_pool_is_used_given_back_and_never_overdrawn,
    )]
}

/// More pages in the host's pool, for as long as this lives. No other trial uses the pool.
struct Pool {
    before: u64,
}

impl Pool {
    fn grow(page_count: u64) -> Result<Self, Failed> {
        let before = fs::read_to_string(POOL)?.trim().parse()?;
        let pool = Self { before };
        // The host finds more pages in one piece when its caches are gone.
        fs::write("/proc/sys/vm/drop_caches", "3")?;
        fs::write("/proc/sys/vm/compact_memory", "1")?;
        fs::write(POOL, (before + page_count).to_string())?;
        let now: u64 = fs::read_to_string(POOL)?.trim().parse()?;
        if now != before + page_count {
            return Err(format!("the host's pool has {now} huge pages, not {page_count} more").into());
        }
        Ok(pool)
    }

    /// Pages that a new VM could have.
    fn available() -> Result<u64, Failed> {
        let text = fs::read_to_string("/proc/meminfo")?;
        let field = |name: &str| -> Result<u64, Failed> {
            let line = text.lines().find_map(|line| line.strip_prefix(name));
            Ok(line.ok_or("the host has no such pool")?.trim().parse()?)
        };
        Ok(field("HugePages_Free:")? - field("HugePages_Rsvd:")?)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        if let Err(error) = fs::write(POOL, self.before.to_string()) {
            eprintln!("the pool of huge pages stays larger: {error}");
        }
    }
}

fn huge(name: &str) -> Result<VmConfigBuilder, Failed> {
    Ok(small(name)?
        .cmdline(format!("{CMDLINE} memhp_default_state=online_movable"))
        .startup_bytes(RAM_BYTES)
        .maximum_bytes(RAM_BYTES + 2 * SLOT_BYTES)
        .huge_pages(true))
}

/// Tries to make a VM and tells why there is none.
fn refusal() -> Result<String, Failed> {
    match Vm::new(
        huge("too-many")?.build()?,
        std::sync::Arc::new(KvmPlatform::new(TestHost::default())),
    ) {
        Ok(_) => Err("there was room for a second vm".into()),
        Err(CreateError::Build(error)) => Ok(error.to_string()),
        Err(other) => Err(other.into()),
    }
}

fn a_pool_is_used_given_back_and_never_overdrawn() -> Result<(), Failed> {
    let _pool = Pool::grow(PAGE_COUNT)?;
    let free = Pool::available()?;
    let (guest, mut shell) = Guest::boot(huge("huge")?)?;
    assert_eq!(Pool::available()?, free - PAGE_COUNT, "the ram is the pool's");
    let expected = format!("the host refused a mapping for ram of {RAM_BYTES} bytes");
    assert_eq!(refusal()?, expected);

    // What the guest has not touched yet is its own all the same, also after a reset.
    shell.succeed("head -c 20000000 /dev/urandom >/tmp/file")?;
    done(guest.vm.reset())?;
    let fresh = shell.run_within("[ ! -e /tmp/file ] && echo fresh", BOOT_WITHIN)?;
    assert_eq!(fresh.text.trim(), "fresh");
    assert_eq!(
        Pool::available()?,
        free - PAGE_COUNT,
        "a reset gives nothing away"
    );
    assert_eq!(refusal()?, expected);
    shell.succeed(
        "head -c 40000000 /dev/urandom >/tmp/file && md5sum /tmp/file >/tmp/sum && md5sum -c /tmp/sum",
    )?;

    let _more = Pool::grow(SLOT_BYTES >> 21)?;
    grow_from_the_pool(&guest)?;
    done(guest.vm.power_off())?;
    assert_eq!(
        Pool::available()?,
        free + (SLOT_BYTES >> 21),
        "everything is given back"
    );
    Ok(())
}

/// A slot takes its pages when its first block is plugged; what the pool does not have is refused up front.
fn grow_from_the_pool(guest: &Guest) -> Result<(), Failed> {
    let free = Pool::available()?;
    let reach = |target| -> Result<(), Failed> {
        let operation = guest.vm.resize_memory(target, ResizeOptions::default())?;
        match operation.wait(BOOT_WITHIN) {
            Some(outcome) if outcome.is_done() => Ok(()),
            outcome => Err(format!("{outcome:?}").into()),
        }
    };
    reach(RAM_BYTES + (2 << 20))?;
    assert_eq!(Pool::available()?, free - (SLOT_BYTES >> 21), "a slot is whole");
    reach(RAM_BYTES + SLOT_BYTES)?;
    let refused = guest
        .vm
        .resize_memory(RAM_BYTES + SLOT_BYTES + (2 << 20), ResizeOptions::default());
    let refused = refused.err().map(|error| error.reason());
    assert_eq!(refused, Some("host"), "the pool has no second slot");
    reach(RAM_BYTES)?;
    assert_eq!(Pool::available()?, free, "the slot is given back");
    Ok(())
}
