//! Everything guests are started from, in one folder: kernels, initial file systems, a Debian disk.

use crate::debian_image;
use crate::failure::Failure;
use crate::guest_image;
use crate::images;
use crate::kernels::{Flavour, Kernel};
use crate::packages;
use crate::paths::Paths;
use crate::progress::step;

/// Fetches and builds what is missing or out of date.
pub fn ensure(paths: &Paths) -> Result<(), Failure> {
    kernels(paths)?;
    step("Debian's disk for guests", || {
        let _lock = images::lock(paths)?;
        debian_image::ensure(paths).map(drop)
    })
}

/// The same for the kernels and their initial file systems only, which need no more than a minute.
pub fn kernels(paths: &Paths) -> Result<(), Failure> {
    packages::ensure(packages::GUESTS)?;
    step(&format!("guests in {}", paths.guests.display()), || {
        let _lock = images::lock(paths)?;
        for flavour in Flavour::ALL {
            let kernel = Kernel::ensure(paths, flavour)?;
            guest_image::ensure(paths, &kernel)?;
        }
        Ok(())
    })
}
