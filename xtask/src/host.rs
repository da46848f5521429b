//! Runs a command where KVM is real: on this machine, or in the test host when this machine has no hardware for it.

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::path::PathBuf;

use crate::agent;
use crate::failure::{Context, Failure};
use crate::hardware::Hardware;
use crate::host_image;
use crate::images;
use crate::kernels::{Flavour, Kernel};
use crate::order::Order;
use crate::packages;
use crate::paths::{GUESTS_VARIABLE, Paths};
use crate::progress::note;
use crate::test_host::TestHost;

/// Tells a command where it may leave files; everything else it writes in the test host is lost.
const OUT_VARIABLE: &str = "VM_LIFECYCLE_OUT";
/// Set inside the test host.
pub const TEST_HOST_VARIABLE: &str = "VM_LIFECYCLE_TEST_HOST";

const PASSED_ON: [&str; 14] = [
    "PATH",
    "HOME",
    "USER",
    "LOGNAME",
    "SHELL",
    "LANG",
    "TERM",
    "TZ",
    "NO_COLOR",
    "CI",
    "CARGO_HOME",
    "CARGO_TARGET_DIR",
    "CARGO_TERM_COLOR",
    "LD_LIBRARY_PATH",
];
const PASSED_ON_PREFIXES: [&str; 6] = [
    "VM_LIFECYCLE_",
    "RUST",
    "LC_",
    "PROPTEST_",
    "CRITERION_",
    "INSTA_",
];

/// Runs `words` in the current folder, with `extra` added to its environment, and returns its exit status.
pub fn run(paths: &Paths, words: Vec<String>, extra: &[(&str, String)]) -> Result<i32, Failure> {
    packages::ensure(packages::GUESTS)?;
    let hardware = Hardware::find();
    let mut environment = environment(paths, hardware);
    environment.extend(
        extra
            .iter()
            .map(|(name, value)| ((*name).to_string(), value.clone())),
    );
    let folder = env::current_dir().context(|| "find the current folder".to_string())?;
    fs::create_dir_all(&paths.out).context(|| format!("create {}", paths.out.display()))?;
    match hardware {
        Hardware::Direct => {
            let order = Order {
                words,
                environment,
                folder,
                modules: PathBuf::new(),
            };
            let status = order
                .command()?
                .status()
                .context(|| format!("start `{}`", order.words[0]))?;
            Ok(agent::exit_code(status))
        }
        Hardware::Emulated(why) => {
            note(&format!("{why}: running in the emulated test host"));
            let (host, modules) = prepare(paths)?;
            host.run(
                paths,
                &Order {
                    words,
                    environment,
                    folder,
                    modules,
                },
            )
        }
    }
}

fn prepare(paths: &Paths) -> Result<(TestHost, PathBuf), Failure> {
    let _lock = images::lock(paths)?;
    let kernel = Kernel::ensure(paths, Flavour::Generic)?;
    let initramfs = host_image::ensure(paths, &kernel)?;
    let modules = kernel.module_base().join("lib/modules").join(&kernel.release);
    Ok((
        TestHost {
            kernel: kernel.folder.join("vmlinuz"),
            initramfs,
        },
        modules,
    ))
}

/// What of this process's environment a command needs; cargo's description of this tool itself is not part of it.
fn environment(paths: &Paths, hardware: Hardware) -> BTreeMap<String, String> {
    let mut environment: BTreeMap<String, String> =
        env::vars().filter(|(name, _)| is_passed_on(name)).collect();
    environment.insert(
        GUESTS_VARIABLE.to_string(),
        paths.guests.to_string_lossy().to_string(),
    );
    environment.insert(OUT_VARIABLE.to_string(), paths.out.to_string_lossy().to_string());
    if let Hardware::Emulated(_) = hardware {
        environment.insert(TEST_HOST_VARIABLE.to_string(), "1".to_string());
    }
    environment
}

fn is_passed_on(name: &str) -> bool {
    PASSED_ON.contains(&name) || PASSED_ON_PREFIXES.iter().any(|prefix| name.starts_with(prefix))
}
