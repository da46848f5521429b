//! A VM's memory on paper: how much it starts with and how far it may grow.

use std::fmt;

use super::builder::ConfigError;
use super::version::{ConfigVersion, Feature};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// The smallest start-up size: less does not boot a general-purpose kernel.
pub const STARTUP_MIN_BYTES: u64 = 64 * MIB;
/// The start-up size is a multiple of this.
pub const STARTUP_STEP_BYTES: u64 = MIB;
/// With huge pages the start-up size is a multiple of this.
pub const HUGE_PAGE_BYTES: u64 = 2 * MIB;
/// What lies between start-up size and maximum is a multiple of this: a memory block of Linux, which it adds whole.
pub const RUNTIME_MEMORY_STEP_BYTES: u64 = 128 * MIB;
/// The largest maximum.
pub const MEMORY_MAX_BYTES: u64 = 12 << 40;

/// A VM's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryConfig {
    /// The size of RAM at power-on, in bytes; a multiple of [`STARTUP_STEP_BYTES`] from [`STARTUP_MIN_BYTES`] up.
    pub startup_bytes: u64,
    /// The size that a running guest can be given, in bytes; the start-up size plus a multiple of
    /// [`RUNTIME_MEMORY_STEP_BYTES`], at most [`MEMORY_MAX_BYTES`].
    pub maximum_bytes: u64,
    /// The size to which a running guest can be brought down, in bytes; a multiple of [`STARTUP_STEP_BYTES`] from
    /// [`MemoryConfig::floor_bytes`] to the start-up size. If maximum and minimum
    /// both are the start-up size, the guest is spared the balloon.
    pub minimum_bytes: u64,
    /// The size that the guest is given when it has started, in bytes, from the minimum to the maximum.
    pub assigned_bytes: u64,
    /// Whether the host backs the guest's memory with pages of [`HUGE_PAGE_BYTES`].
    pub huge_pages: bool,
    /// Whether the guest may be promised more memory than the host has left.
    pub overcommit: bool,
    /// Whether the guest may take memory back out of its balloon when it has none left (virtio 1.2 §5.5.6.2,
    /// `VIRTIO_BALLOON_F_DEFLATE_ON_OOM`). It then has more than it was asked to keep.
    pub deflate_on_oom: bool,
}

/// What is said of a VM's memory before it is checked.
#[derive(Debug, Clone, Copy)]
pub(super) struct MemorySpec {
    pub startup_bytes: u64,
    pub maximum_bytes: Option<u64>,
    pub minimum_bytes: Option<u64>,
    pub assigned_bytes: Option<u64>,
    pub huge_pages: bool,
    pub overcommit: bool,
    pub deflate_on_oom: bool,
}

/// The least that a Linux guest with `startup_bytes` can be left with: what Hyper-V's balloon driver leaves to its
/// guest, a share of the start-up size that becomes smaller as the guest becomes larger.
const fn balloon_floor_bytes(startup_bytes: u64) -> u64 {
    let startup_mib = startup_bytes / MIB;
    let floor_mib = match startup_mib {
        0..128 => 8 + startup_mib / 2,
        128..512 => 40 + startup_mib / 4,
        512..2048 => 104 + startup_mib / 8,
        2048..8192 => 232 + startup_mib / 16,
        _ => 488 + startup_mib / 32,
    };
    floor_mib * MIB
}

impl MemoryConfig {
    /// Below this no guest with this start-up size is brought, in bytes. Huge pages cannot be taken out of a running
    /// guest: with them it is the start-up size.
    pub const fn floor_bytes(&self) -> u64 {
        floor_bytes(self.startup_bytes, self.huge_pages)
    }

    /// What a VM can be brought down to about whose minimum nothing is said: to the floor if its memory can change at
    /// all, which it says by a maximum above the start-up size; version 1.0 has no maximum, its memory can always
    /// change. Otherwise the guest is spared the device.
    pub(super) const fn default_minimum_bytes(&self, version: ConfigVersion) -> u64 {
        let can_change = match version {
            ConfigVersion::V1_0 => true,
            ConfigVersion::V2_0 => self.maximum_bytes > self.startup_bytes,
        };
        if can_change {
            self.floor_bytes()
        } else {
            self.startup_bytes
        }
    }

    /// Checks the sizes for a VM of `version`.
    pub(super) fn checked(spec: MemorySpec, version: ConfigVersion) -> Result<Self, ConfigError> {
        let MemorySpec {
            startup_bytes,
            maximum_bytes,
            minimum_bytes,
            assigned_bytes,
            huge_pages,
            overcommit,
            deflate_on_oom,
        } = spec;
        let maximum_bytes = maximum_bytes.unwrap_or(startup_bytes);
        let (startup, maximum) = (ByteSize(startup_bytes), ByteSize(maximum_bytes));
        if startup_bytes < STARTUP_MIN_BYTES {
            let minimum = ByteSize(STARTUP_MIN_BYTES);
            return Err(ConfigError::StartupTooSmall { startup, minimum });
        }
        let step = if huge_pages {
            HUGE_PAGE_BYTES
        } else {
            STARTUP_STEP_BYTES
        };
        check_step("start-up memory", startup_bytes, step)?;
        if maximum_bytes < startup_bytes {
            return Err(ConfigError::MaximumBelowStartup { maximum, startup });
        }
        if maximum_bytes > MEMORY_MAX_BYTES {
            let limit = ByteSize(MEMORY_MAX_BYTES);
            return Err(ConfigError::MaximumTooLarge { maximum, limit });
        }
        let runtime_bytes = maximum_bytes - startup_bytes;
        if runtime_bytes > 0 {
            version.require(Feature::RuntimeMemoryAboveStartup)?;
        }
        check_step(
            "memory between start-up size and maximum",
            runtime_bytes,
            RUNTIME_MEMORY_STEP_BYTES,
        )?;
        let mut memory = Self {
            startup_bytes,
            maximum_bytes,
            minimum_bytes: startup_bytes,
            assigned_bytes: assigned_bytes.unwrap_or(startup_bytes),
            huge_pages,
            overcommit,
            deflate_on_oom,
        };
        memory.minimum_bytes = minimum_bytes.unwrap_or_else(|| memory.default_minimum_bytes(version));
        memory.check_runtime_sizes()?;
        Ok(memory)
    }

    pub(super) fn with_assigned(self, assigned_bytes: u64) -> Result<Self, ConfigError> {
        let memory = Self {
            assigned_bytes,
            ..self
        };
        memory.check_runtime_sizes()?;
        Ok(memory)
    }

    fn check_runtime_sizes(&self) -> Result<(), ConfigError> {
        let Self {
            startup_bytes,
            maximum_bytes,
            minimum_bytes,
            assigned_bytes,
            huge_pages: _,
            overcommit: _,
            deflate_on_oom: _,
        } = *self;
        check_step("minimum memory", minimum_bytes, STARTUP_STEP_BYTES)?;
        check_between("minimum memory", minimum_bytes, self.floor_bytes(), startup_bytes)?;
        check_between("assigned memory", assigned_bytes, minimum_bytes, maximum_bytes)
    }
}

const fn floor_bytes(startup_bytes: u64, huge_pages: bool) -> u64 {
    if huge_pages {
        return startup_bytes;
    }
    balloon_floor_bytes(startup_bytes)
}

fn check_between(what: &'static str, size: u64, least: u64, most: u64) -> Result<(), ConfigError> {
    if (least..=most).contains(&size) {
        return Ok(());
    }
    Err(ConfigError::MemoryRange {
        what,
        size: ByteSize(size),
        least: ByteSize(least),
        most: ByteSize(most),
    })
}

fn check_step(what: &'static str, size_bytes: u64, step_bytes: u64) -> Result<(), ConfigError> {
    if size_bytes.is_multiple_of(step_bytes) {
        return Ok(());
    }
    Err(ConfigError::MemoryStep {
        what,
        size: ByteSize(size_bytes),
        step: ByteSize(step_bytes),
    })
}

/// A number of bytes, shown in the largest unit that expresses it exactly.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ByteSize(pub u64);

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            0 => f.write_str("0 bytes"),
            bytes if bytes.is_multiple_of(GIB) => write!(f, "{} GiB", bytes / GIB),
            bytes if bytes.is_multiple_of(MIB) => write!(f, "{} MiB", bytes / MIB),
            bytes => write!(f, "{bytes} bytes"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(startup_bytes: u64, maximum_bytes: u64, huge_pages: bool) -> MemorySpec {
        MemorySpec {
            startup_bytes,
            maximum_bytes: Some(maximum_bytes),
            minimum_bytes: None,
            assigned_bytes: None,
            huge_pages,
            overcommit: false,
            deflate_on_oom: false,
        }
    }

    fn check(startup_bytes: u64, maximum_bytes: u64, huge_pages: bool) -> Result<(), String> {
        let spec = spec(startup_bytes, maximum_bytes, huge_pages);
        let checked = MemoryConfig::checked(spec, ConfigVersion::V2_0);
        checked.map(|_| ()).map_err(|error| error.to_string())
    }

    #[test]
    fn sizes_are_checked_with_both_numbers_in_the_message() {
        assert_eq!(check(64 * MIB, 64 * MIB, true), Ok(()));
        assert_eq!(check(GIB, GIB + 128 * MIB, false), Ok(()));
        assert_eq!(check(MEMORY_MAX_BYTES, MEMORY_MAX_BYTES, true), Ok(()));
        let refused = |startup, maximum, huge_pages| check(startup, maximum, huge_pages).unwrap_err();
        assert_eq!(
            refused(63 * MIB, GIB, false),
            "start-up memory 63 MiB is below the minimum 64 MiB"
        );
        assert_eq!(
            refused(GIB + 1, 2 * GIB, false),
            "start-up memory 1073741825 bytes is not a multiple of 1 MiB"
        );
        assert_eq!(
            refused(65 * MIB, 65 * MIB, true),
            "start-up memory 65 MiB is not a multiple of 2 MiB"
        );
        assert_eq!(
            refused(2 * GIB, GIB, false),
            "maximum memory 1 GiB is below start-up memory 2 GiB"
        );
        assert_eq!(
            refused(GIB, GIB + 64 * MIB, false),
            "memory between start-up size and maximum 64 MiB is not a multiple of 128 MiB"
        );
        assert_eq!(
            refused(GIB, u64::MAX, false),
            "maximum memory 18446744073709551615 bytes exceeds the limit 12288 GiB"
        );
    }

    #[test]
    fn growth_needs_version_2() {
        let spec = spec(GIB, 2 * GIB, false);
        assert_eq!(
            MemoryConfig::checked(spec, ConfigVersion::V1_0)
                .unwrap_err()
                .to_string(),
            "runtime memory above the start-up size needs configuration version 2.0, the vm has 1.0"
        );
    }

    #[test]
    fn the_floor_is_that_of_hyper_v_and_grows_with_the_start_up_size() {
        let floors = [64, 127, 128, 511, 512, 2047, 2048, 8191, 8192, 65536]
            .map(|startup_mib| floor_bytes(startup_mib * MIB, false) / MIB);
        assert_eq!(floors, [40, 71, 72, 167, 168, 359, 360, 743, 744, 2536]);
        for startup_mib in STARTUP_MIN_BYTES / MIB..20_000 {
            let floor = floor_bytes(startup_mib * MIB, false);
            assert!(floor < startup_mib * MIB, "{startup_mib} MiB");
            assert!(
                floor <= floor_bytes((startup_mib + 1) * MIB, false),
                "{startup_mib} MiB"
            );
        }
        assert_eq!(floor_bytes(GIB, true), GIB, "huge pages stay");
    }

    #[test]
    fn a_minimum_and_an_assigned_size_are_between_their_limits() {
        let sizes = |minimum_bytes, assigned_bytes| {
            let spec = MemorySpec {
                minimum_bytes,
                assigned_bytes,
                ..spec(512 * MIB, GIB, false)
            };
            let checked = MemoryConfig::checked(spec, ConfigVersion::V2_0);
            checked.map(|memory| (memory.minimum_bytes / MIB, memory.assigned_bytes / MIB))
        };
        assert_eq!(sizes(None, None), Ok((168, 512)));
        assert_eq!(sizes(Some(256 * MIB), Some(256 * MIB)), Ok((256, 256)));
        assert_eq!(sizes(Some(512 * MIB), Some(GIB)), Ok((512, 1024)));
        let refused = |minimum, assigned| sizes(minimum, assigned).unwrap_err().to_string();
        assert_eq!(
            refused(Some(167 * MIB), None),
            "minimum memory 167 MiB is not between 168 MiB and 512 MiB"
        );
        assert_eq!(
            refused(None, Some(GIB + 1)),
            "assigned memory 1073741825 bytes is not between 168 MiB and 1 GiB"
        );
    }

    #[test]
    fn memory_that_cannot_change_has_no_room_below_the_start_up_size() {
        let minimum = |version, maximum_bytes| {
            let checked = MemoryConfig::checked(spec(GIB, maximum_bytes, false), version);
            checked.expect("the sizes are allowed").minimum_bytes
        };
        assert_eq!(minimum(ConfigVersion::V2_0, GIB), GIB);
        assert_eq!(minimum(ConfigVersion::V2_0, 2 * GIB), 232 * MIB);
        assert_eq!(minimum(ConfigVersion::V1_0, GIB), 232 * MIB);
    }
}
