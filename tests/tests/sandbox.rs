//! The router's threads that handle clients' input are confined, and work all the same.

use freeflow_tests::{Bed, have};

/// Fields of a thread's status.
fn field(status: &str, name: &str) -> String {
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    line.unwrap_or_default().trim().to_owned()
}

#[test]
fn hostile_input_is_handled_without_privilege() {
    let mut bed = Bed::new().unwrap();
    let said = bed.status().unwrap()["sandbox"].to_string();
    assert!(said.contains("seccomp"), "{said}");
    let tasks = format!("/proc/{}/task", bed.router().pid());
    let mut confined = 0;
    for task in std::fs::read_dir(tasks).unwrap() {
        let status = std::fs::read_to_string(task.unwrap().path().join("status")).unwrap();
        let name = field(&status, "Name:");
        if name == "ff-engine" || name == "ff-control" {
            assert_eq!(field(&status, "Seccomp:"), "2", "{name}");
            assert_eq!(field(&status, "NoNewPrivs:"), "1", "{name}");
            assert_eq!(field(&status, "CapEff:"), "0000000000000000", "{name}");
            assert_eq!(field(&status, "CapPrm:"), "0000000000000000", "{name}");
            confined += 1;
        }
    }
    assert_eq!(confined, 2);
    if have("ib_send_bw") {
        bed.pair("ib_send_bw", &["-n", "500", "-e"]).unwrap();
    }
}

/// Pages that cannot be shared are reached across processes, which the confined threads may not
/// open themselves.
#[test]
fn memory_that_cannot_be_shared_is_still_reached() {
    if !have("ib_write_bw") {
        return;
    }
    let bed = Bed::new().unwrap();
    let file = bed.dir().join("mapped");
    std::fs::write(&file, vec![7; 1 << 20]).unwrap();
    let mmap = format!("--mmap={}", file.display());
    bed.pair("ib_write_bw", &["-n", "200", "-s", "4096", &mmap])
        .unwrap();
}
