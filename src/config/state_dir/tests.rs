//! State directories: replaced as a whole, held by one process, refused with the reason.

use std::error::Error;

use super::*;
use crate::config::{ConfigVersion, DiskSpec};

fn config(cmdline: &str) -> VmConfig {
    let builder = VmConfig::builder("db", "/boot/vmlinuz").cmdline(cmdline);
    builder.build().unwrap()
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn message(error: &dyn Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {}", message(source)),
        None => error.to_string(),
    }
}

#[test]
fn what_is_stored_is_found_again() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("vm");
    let state_dir = StateDir::create(&dir, &config("first")).unwrap();
    assert_eq!(names(&dir), ["config.json", "lock"]);
    let second = config("second");
    state_dir.store(&second).unwrap();
    drop(state_dir);
    let (state_dir, found) = StateDir::open(&dir).unwrap();
    assert_eq!((state_dir.path(), found), (dir.as_path(), second));
    let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o777;
    assert_eq!((mode(&dir), mode(&dir.join(CONFIG_FILE))), (0o700, 0o600));
}

#[test]
fn a_directory_stays_the_same_when_the_process_goes_elsewhere() {
    let folder = tempfile::tempdir().expect("the host has a folder for temporary files");
    let here = std::env::current_dir().expect("the test is somewhere");
    let up: PathBuf = here.components().skip(1).map(|_| "..").collect();
    let relative = up.join(folder.path().strip_prefix("/").expect("it is absolute"));
    let made = StateDir::create(relative.join("vm"), &config("relative")).expect("nothing is there");
    assert!(made.path().is_absolute(), "{}", made.path().display());
}

#[test]
fn a_directory_has_one_opener_at_a_time() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("vm");
    let state_dir = StateDir::create(&dir, &config("")).unwrap();
    let expected = format!("state directory {} is in use by another process", dir.display());
    assert_eq!(StateDir::open(&dir).unwrap_err().to_string(), expected);
    assert_eq!(
        StateDir::create(&dir, &config("")).unwrap_err().to_string(),
        expected
    );
    drop(state_dir);
    assert!(StateDir::open(&dir).is_ok(), "the lock went with its holder");
    assert_eq!(
        names(&dir),
        ["config.json", "lock"],
        "the refused opener took nothing away"
    );
}

#[test]
fn a_vm_is_never_created_over_another_nor_opened_where_none_is() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("vm");
    let missing = StateDir::open(&dir).unwrap_err();
    assert_eq!(
        missing.to_string(),
        format!("state directory {} holds no vm", dir.display())
    );
    fs::create_dir(&dir).unwrap();
    assert!(matches!(StateDir::open(&dir), Err(StateDirError::NoVm { .. })));
    assert!(names(&dir).is_empty(), "looking leaves no lock file behind");

    let first = config("first");
    drop(StateDir::create(&dir, &first).unwrap());
    let taken = StateDir::create(&dir, &config("second")).unwrap_err();
    assert_eq!(
        taken.to_string(),
        format!("state directory {} holds a vm already", dir.display())
    );
    assert_eq!(StateDir::open(&dir).unwrap().1, first);
}

#[test]
fn a_failed_creation_leaves_nothing_that_it_made() {
    let temp = tempfile::tempdir().unwrap();
    // The configuration cannot be put in place over a directory, which is how a full disk fails too: late.
    let dir = temp.path().join("vm");
    fs::create_dir(&dir).unwrap();
    fs::create_dir(dir.join(CONFIG_NEW_FILE)).unwrap();
    let error = StateDir::create(&dir, &config("")).unwrap_err();
    assert!(error.to_string().starts_with("cannot write "), "{error}");
    assert_eq!(names(&dir), [CONFIG_NEW_FILE], "only what was there before");

    let orphan = temp.path().join("missing").join("vm");
    let error = StateDir::create(&orphan, &config("")).unwrap_err();
    assert!(
        error.to_string().starts_with("cannot make the directory "),
        "{error}"
    );
    assert!(!temp.path().join("missing").exists());

    let file = temp.path().join("file");
    fs::write(&file, "x").unwrap();
    assert!(StateDir::create(&file, &config("")).is_err());
    assert_eq!(fs::read(&file).unwrap(), b"x");
}

#[test]
fn a_torn_replacement_is_never_read() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("vm");
    let first = config("first");
    drop(StateDir::create(&dir, &first).unwrap());
    let whole = document::write(&config("second"));
    for length in 0..whole.len() {
        fs::write(dir.join(CONFIG_NEW_FILE), &whole[..length]).unwrap();
        let (_, found) = StateDir::open(&dir).unwrap();
        assert_eq!(found, first, "torn after {length} bytes");
    }
    let (state_dir, _) = StateDir::open(&dir).unwrap();
    state_dir.store(&config("third")).unwrap();
    assert_eq!(
        names(&dir),
        ["config.json", "lock"],
        "the next replacement takes the torn file's place"
    );
}

#[test]
fn unusable_configurations_are_refused_with_the_reason() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("vm");
    let disk = DiskSpec::new("root", "/root.img");
    let builder = VmConfig::builder("db", "/k").version(ConfigVersion::V1_0);
    drop(StateDir::create(&dir, &builder.disk(disk).build().unwrap()).unwrap());
    let path = dir.join(CONFIG_FILE);
    let whole = fs::read(&path).unwrap();
    let prefix = format!("configuration {} cannot be used: ", path.display());
    // Every truncation but the one that only loses the final newline.
    for length in 0..whole.len() - 1 {
        fs::write(&path, &whole[..length]).unwrap();
        let error = StateDir::open(&dir).unwrap_err();
        assert!(
            message(&error).starts_with(&format!("{prefix}the document is not a vm configuration: EOF")),
            "{}",
            message(&error)
        );
    }
    fs::write(&path, vec![b' '; DOCUMENT_MAX_BYTES + 1]).unwrap();
    let long = message(&StateDir::open(&dir).unwrap_err());
    assert_eq!(long, format!("{prefix}the document has more than 1048576 bytes"));
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    let error = StateDir::open(&dir).unwrap_err();
    assert!(error.to_string().starts_with("cannot read "), "{error}");
    // A pipe would make its reader wait for ever.
    fs::remove_dir(&path).unwrap();
    let made = std::process::Command::new("mkfifo").arg(&path).status();
    assert!(made.unwrap().success());
    let error = message(&StateDir::open(&dir).unwrap_err());
    assert!(error.ends_with("it is not a regular file"), "{error}");
}

#[test]
fn a_directory_that_is_another_vms_by_now_is_left_alone() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("vm");
    let old = StateDir::create(&dir, &config("old")).unwrap();
    fs::remove_dir_all(&dir).unwrap();
    let lost = format!(
        "state directory {} was taken away, or another vm's put in its place",
        dir.display()
    );
    assert_eq!(old.store(&config("older")).unwrap_err().to_string(), lost);
    let newer = config("new");
    let new = StateDir::create(&dir, &newer).unwrap();
    assert_eq!(old.store(&config("older")).unwrap_err().to_string(), lost);
    drop(new);
    let (_, found) = StateDir::open(&dir).unwrap();
    assert_eq!(found, newer);
}
