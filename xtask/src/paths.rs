//! Where things are: the workspace, the target folder, the guests' artefacts, the tools.
//!
//! `VM_LIFECYCLE_GUESTS` moves the artefacts elsewhere, so that several checkouts can share one download.

use std::env;
use std::path::PathBuf;

use crate::failure::{Context, Failure};

/// The environment variable that names the folder of kernels and images, for this tool and for the tests.
pub const GUESTS_VARIABLE: &str = "VM_LIFECYCLE_GUESTS";

/// The folders this tool reads and writes.
#[derive(Clone, Debug)]
pub struct Paths {
    /// The workspace's root.
    pub root: PathBuf,
    /// Cargo's target folder.
    pub target: PathBuf,
    /// Kernels and images for guests and for the test host.
    pub guests: PathBuf,
    /// The one folder a command in the test host can leave results in; the same path inside and outside.
    pub out: PathBuf,
    /// `cargo install --root` of the tools.
    pub tools: PathBuf,
}

impl Paths {
    /// Finds the folders of the workspace this binary was built from.
    pub fn find() -> Result<Self, Failure> {
        let manifest = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
        let root = manifest.parent().unwrap_or(&manifest).to_path_buf();
        let root = root
            .canonicalize()
            .context(|| format!("find the workspace {}", root.display()))?;
        let target = env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
        let target = std::path::absolute(&target).context(|| format!("find {}", target.display()))?;
        let guests = env::var_os(GUESTS_VARIABLE).map_or_else(|| target.join("guests"), PathBuf::from);
        let guests = std::path::absolute(&guests).context(|| format!("find {}", guests.display()))?;
        Ok(Paths {
            out: target.join("out"),
            tools: target.join("tools"),
            root,
            target,
            guests,
        })
    }
}
