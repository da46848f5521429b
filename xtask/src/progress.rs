//! What the person at the terminal sees while the steps run. Everything goes to standard error, so that
//! standard output belongs to the commands that are run.

use std::time::Instant;

use crate::failure::Failure;

/// Announces a step, runs it, and says how long it took and whether it failed.
pub fn step<T>(what: &str, work: impl FnOnce() -> Result<T, Failure>) -> Result<T, Failure> {
    eprintln!("==> {what}");
    let began = Instant::now();
    let result = work();
    let seconds = began.elapsed().as_secs_f64();
    match &result {
        Ok(_) => eprintln!("    took {seconds:.1} s: {what}"),
        Err(_) => eprintln!("    FAILED after {seconds:.1} s: {what}"),
    }
    result
}

/// One line beside the steps.
pub fn note(text: &str) {
    eprintln!("    {text}");
}
