//! Children of a process that opens devices in another thread: see `c/forks.c`.

use freeflow_tests::{Bed, compiled};

#[test]
fn a_child_opens_the_device_whatever_its_parent_was_doing() {
    let Some(program) = compiled("forks") else {
        return;
    };
    let bed = Bed::new().expect("a router starts");
    let said = bed.endpoint().run(&program, &[]).unwrap();
    assert_eq!(said.stdout, "forks hold\n", "{said}");
}
