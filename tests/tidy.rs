//! The house rules that a machine can check: sizes, layers, headers, SAFETY comments.

use std::fs;
use std::path::{Path, PathBuf};

const FILE_LINES_MAX: usize = 500;
const FUNCTION_LINES_MAX: usize = 70;

/// The layer of each module; `use` goes down or sideways, never up.
const LAYERS: [(&str, u8); 18] = [
    ("ids", 0),
    ("state", 0),
    ("event", 0),
    ("unit", 0),
    ("guest_log", 0),
    ("config", 0),
    ("machine", 1),
    ("memory", 1),
    ("bus", 1),
    ("storage", 1),
    ("net", 1),
    ("event_loop", 1),
    ("pci", 2),
    ("acpi", 2),
    ("legacy", 2),
    ("virtio", 2),
    ("boot", 2),
    ("vm", 4),
];

/// Where the host kernel is called or memory is mapped, and nowhere else.
const UNSAFE_ALLOWED: [&str; 5] = [
    "src/machine/",
    "src/memory/",
    "src/net/",
    "src/storage/",
    "tests/harness/",
];

fn sources() -> Vec<(PathBuf, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = Vec::new();
    let mut folders: Vec<_> = [
        "src",
        "tests",
        "examples",
        "benches",
        "xtask/src",
        "fuzz/fuzz_targets",
        "fuzz/src",
    ]
    .map(|f| root.join(f))
    .into();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).into_iter().flatten() {
            let path = entry.expect("the tree is readable").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path).expect("sources are UTF-8");
                found.push((path.strip_prefix(root).expect("below the root").to_owned(), text));
            }
        }
    }
    assert!(
        found.len() > 40,
        "only {} sources found: the walk is broken",
        found.len()
    );
    found
}

/// Whether a file holds nothing but tests: they may look wherever they want.
fn is_test(path: &Path) -> bool {
    let name = path.file_stem().unwrap_or_default().to_string_lossy();
    name.ends_with("tests") || path.components().any(|part| part.as_os_str() == "tests")
}

fn assert_none(what: &str, offenders: &[String]) {
    assert!(offenders.is_empty(), "{what}:\n{}", offenders.join("\n"));
}

#[test]
fn files_are_short_and_begin_with_their_purpose() {
    let mut offenders = Vec::new();
    for (path, text) in sources() {
        let count = text.lines().count();
        if count >= FILE_LINES_MAX {
            offenders.push(format!("{}: {count} lines", path.display()));
        }
        if !text.starts_with("//!") && !text.starts_with("#!") {
            offenders.push(format!("{}: no //! header", path.display()));
        }
    }
    assert_none("files too long or without a header", &offenders);
}

#[test]
fn functions_are_short() {
    let mut offenders = Vec::new();
    for (path, text) in sources() {
        let mut open: Option<(usize, usize)> = None;
        for (number, line) in text.lines().enumerate() {
            let indent = line.len() - line.trim_start().len();
            let is_function = line.trim_start().split(['(', '<']).next().is_some_and(|head| {
                head.split_whitespace().any(|word| word == "fn") && !line.trim_start().starts_with("//")
            });
            if is_function && !line.trim_end().ends_with(';') && !line.trim_end().ends_with('}') {
                open = Some((number, indent));
            }
            if let Some((start, at)) = open
                && indent == at
                && line.trim_start().starts_with('}')
            {
                if number - start >= FUNCTION_LINES_MAX {
                    offenders.push(format!(
                        "{}:{}: {} lines",
                        path.display(),
                        start + 1,
                        number - start + 1
                    ));
                }
                open = None;
            }
        }
    }
    assert_none("functions too long", &offenders);
}

#[test]
fn layers_only_look_down() {
    let layer = |module: &str| {
        LAYERS
            .iter()
            .find(|(name, _)| *name == module)
            .map(|(_, layer)| *layer)
    };
    let mut offenders = Vec::new();
    for (path, text) in sources() {
        let Ok(inside) = path.strip_prefix("src") else {
            continue;
        };
        if is_test(inside) {
            continue;
        }
        let first = inside
            .components()
            .next()
            .expect("a file has a name")
            .as_os_str()
            .to_string_lossy();
        let module = first.trim_end_matches(".rs").to_owned();
        if module == "lib" {
            continue;
        }
        let own = layer(&module).unwrap_or_else(|| panic!("module {module} has no layer"));
        let production = text
            .split("#[cfg(test)]\nmod tests")
            .next()
            .expect("split yields one part");
        for (number, line) in production.lines().enumerate() {
            for used in line.split("crate::").skip(1) {
                let name: String = used
                    .chars()
                    .take_while(|c| c.is_alphanumeric() || *c == '_')
                    .collect();
                if layer(&name).is_some_and(|other| other > own) {
                    offenders.push(format!("{}:{}: {}", path.display(), number + 1, line.trim()));
                }
            }
        }
    }
    assert_none("uses of a higher layer", &offenders);
}

#[test]
fn unsafe_is_argued_and_only_where_the_host_is_called() {
    let mut offenders = Vec::new();
    for (path, text) in sources() {
        let name = path.to_string_lossy().into_owned();
        if name == "tests/tidy.rs" {
            continue; // it names what it looks for
        }
        let lines: Vec<_> = text.lines().collect();
        for (number, line) in lines.iter().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            if !code.contains("unsafe {") && !code.contains("unsafe impl") && !code.contains("unsafe fn") {
                continue;
            }
            let above = &lines[number.saturating_sub(12)..=number];
            if !above
                .iter()
                .any(|line| line.contains("SAFETY:") || line.contains("# Safety"))
            {
                offenders.push(format!("{name}:{}: no SAFETY comment", number + 1));
            }
            if name.starts_with("src/") && !UNSAFE_ALLOWED.iter().any(|folder| name.starts_with(folder)) {
                offenders.push(format!(
                    "{name}:{}: unsafe outside the allowed folders",
                    number + 1
                ));
            }
        }
    }
    assert_none("unsafe code", &offenders);
}

#[test]
fn nothing_is_left_open() {
    let mut offenders = Vec::new();
    for (path, text) in sources() {
        let production = text.split("#[cfg(test)]").next().expect("split yields one part");
        for (number, line) in production.lines().enumerate() {
            let left_open = ["todo!(", "unimplemented!(", "FIXME"]
                .iter()
                .any(|mark| line.contains(mark));
            let unwraps =
                path.starts_with("src") && !path.ends_with("tests.rs") && line.contains(".unwrap()");
            if (left_open && path != Path::new("tests/tidy.rs"))
                || (unwraps && !line.trim().starts_with("//"))
            {
                offenders.push(format!("{}:{}: {}", path.display(), number + 1, line.trim()));
            }
        }
    }
    assert_none("left open", &offenders);
}
