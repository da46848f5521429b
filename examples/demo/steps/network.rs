//! Packets in both directions.

use libtest_mimic::Failed;

use crate::host;
use crate::report::Report;
use crate::tour::{GUEST_ADDRESS, HOST_ADDRESS, Tour};

/// Pings from both sides of the tap.
pub fn run(tour: &mut Tour, report: &mut Report) -> Result<(), Failed> {
    report.say(format!(
        "The guest takes the address {GUEST_ADDRESS}; the host's end of the cable is {HOST_ADDRESS}.\n\
         Each calls the other three times (ping)."
    ));
    let (_, shell) = tour.shell()?;
    shell.succeed(&format!(
        "ip addr add {GUEST_ADDRESS}/24 dev eth0 && ip link set eth0 up"
    ))?;
    let said = shell.run(&format!("ping -c 3 -W 10 {HOST_ADDRESS}"))?.text;
    report.equal("answers from the host", 3, answers(&said));
    let said = host::shell(
        "ping -c 3 -i 0.3 -W 10 \"$1\" || true",
        &GUEST_ADDRESS.to_string(),
    )?;
    report.equal("answers from the guest", 3, answers(&said));
    let errors = shell
        .succeed("cd /sys/class/net/eth0/statistics && cat rx_errors tx_errors rx_dropped tx_dropped")?;
    report.equal(
        "errors and lost packets on the guest's card",
        "0 0 0 0".to_owned(),
        errors.split_whitespace().collect::<Vec<_>>().join(" "),
    );
    Ok(())
}

/// Ping writes a line for every answer.
fn answers(said: &str) -> usize {
    said.lines().filter(|line| line.contains(" bytes from ")).count()
}
