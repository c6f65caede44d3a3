//! Children of a process with devices: see `c/forks.c` and `c/children.c`.

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

#[test]
fn a_child_is_told_that_its_parents_objects_are_not_its_own() {
    let Some(program) = compiled("children") else {
        return;
    };
    let bed = Bed::new().expect("a router starts");
    let said = bed.endpoint().run(&program, &[]).unwrap();
    said.success().unwrap();
}
