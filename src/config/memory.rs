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
    /// Whether the host backs the guest's memory with pages of [`HUGE_PAGE_BYTES`].
    pub huge_pages: bool,
}

impl MemoryConfig {
    /// Checks the sizes for a VM of `version`.
    pub(super) fn checked(self, version: ConfigVersion) -> Result<Self, ConfigError> {
        let Self {
            startup_bytes,
            maximum_bytes,
            huge_pages,
        } = self;
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
        Ok(self)
    }
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

    fn check(startup_bytes: u64, maximum_bytes: u64, huge_pages: bool) -> Result<(), String> {
        let memory = MemoryConfig {
            startup_bytes,
            maximum_bytes,
            huge_pages,
        };
        let checked = memory.checked(ConfigVersion::V2_0);
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
        let memory = MemoryConfig {
            startup_bytes: GIB,
            maximum_bytes: 2 * GIB,
            huge_pages: false,
        };
        assert_eq!(
            memory.checked(ConfigVersion::V1_0).unwrap_err().to_string(),
            "runtime memory above the start-up size needs configuration version 2.0, the vm has 1.0"
        );
    }
}
