//! Debian's perftest, unmodified, between two endpoints of one router.

use freeflow_tests::{Bed, perftest, skip};

struct Run {
    bed: Bed,
}

impl Run {
    fn new() -> Run {
        Run {
            bed: Bed::new().expect("a router starts"),
        }
    }

    /// Runs a program in all these ways; each must print a row of figures for the last size.
    fn ways(&self, program: &str, ways: &[&str]) {
        perftest::ways(program, ways, |program, args| self.bed.pair(program, args));
    }
}

#[test]
fn send_bandwidth() {
    let run = Run::new();
    run.ways(
        "ib_send_bw",
        &[
            "-a -n 300",
            "-c UC -a -n 300",
            "-c UD -s 4096 -n 2000",
            "-c UD -s 64 -n 2000",
            "-b -n 1000",
            "-b -c UC -n 1000",
            "-b -c UD -s 2048 -n 1000",
            "-e -n 1000",
            "-e -b -s 4096 -n 1000",
            "-q 16 -n 500",
            "-q 16 -b -e -s 1024 -n 300",
            "-I 64 -s 64 -n 2000",
            "-I 256 -s 200 -n 2000 -Q 16",
            "-l 8 -s 512 -n 2000",
            "-l 32 --recv_post_list=32 -s 64 -n 3200",
            "-r 1024 -t 512 -s 64 -n 5000",
            "--use_old_post_send -n 1000",
            "--mr_per_qp -q 4 -n 500",
            "-m 256 -n 1000",
            "--reversed -n 1000",
        ],
    );
}

#[test]
fn write_bandwidth() {
    let run = Run::new();
    run.ways(
        "ib_write_bw",
        &[
            "-a -n 300",
            "-c UC -a -n 300",
            "-b -a -n 100",
            "-q 16 -n 500",
            "-q 16 -b -n 300",
            "-I 1 -s 1 -n 5000",
            "-I 512 -s 512 -n 5000",
            "-l 16 -s 64 -n 5008",
            "-t 2048 -s 8 -n 20000",
            "--use_old_post_send -n 1000",
            "-Q 1 -s 2 -n 5000",
            "-s 8388608 -n 50",
            "--report_gbits --perform_warm_up -n 500",
            "-D 1 -s 4096",
        ],
    );
}

#[test]
fn read_bandwidth() {
    let run = Run::new();
    run.ways(
        "ib_read_bw",
        &[
            "-a -n 300",
            "-b -n 1000",
            "-e -n 1000",
            "-q 16 -n 300",
            "-o 1 -s 64 -n 2000",
            "-o 16 -s 64 -n 2000",
            "-l 4 -s 64 -n 2000",
        ],
    );
}

#[test]
fn atomic_bandwidth() {
    let run = Run::new();
    run.ways(
        "ib_atomic_bw",
        &[
            "-n 2000",
            "-A CMP_AND_SWAP -n 2000",
            "-A FETCH_AND_ADD -n 2000",
            "-b -n 1000",
            "-q 8 -n 500",
        ],
    );
}

#[test]
fn latencies() {
    let run = Run::new();
    run.ways(
        "ib_send_lat",
        &[
            "-a -n 200",
            "-c UC -a -n 200",
            "-c UD -s 64 -n 2000",
            "-e -s 64 -n 1000",
            "-c UD -e -s 64 -n 1000",
            "-I 220 -s 220 -n 1000",
            "-I 0 -s 8 -n 1000",
        ],
    );
    run.ways(
        "ib_write_lat",
        &[
            "-a -n 200",
            "-c UC -a -n 200",
            "-I 64 -s 64 -n 1000",
            "-I 0 -s 8 -n 1000",
        ],
    );
    run.ways("ib_read_lat", &["-a -n 200", "-e -s 64 -n 1000"]);
    run.ways(
        "ib_atomic_lat",
        &["-n 1000", "-A CMP_AND_SWAP -n 1000", "-e -n 1000"],
    );
}

#[test]
fn several_programs_of_several_endpoints_at_once() {
    let run = Run::new();
    std::thread::scope(|scope| {
        for program in ["ib_send_bw", "ib_write_bw", "ib_read_bw"] {
            let run = &run;
            scope.spawn(move || run.ways(program, &["-s 4096 -n 2000", "-q 4 -s 65536 -n 500"]));
        }
    });
}

#[test]
fn hundreds_of_queue_pairs() {
    let run = Run::new();
    run.ways(
        "ib_write_bw",
        &["-q 300 -n 20 -s 4096", "-q 300 -n 20 -s 65536 -b"],
    );
    // It counts 16 requests for each completion, and spins for ever if their number is no multiple.
    run.ways("ib_send_bw", &["-q 200 -n 32 -s 1024 -r 32 -t 16"]);
}

#[test]
fn buffers_in_huge_pages() {
    const PAGES: &str = "/proc/sys/vm/nr_hugepages";
    let reserved = || -> u64 {
        let text = std::fs::read_to_string(PAGES).unwrap_or_default();
        text.trim().parse().unwrap_or(0)
    };
    if reserved() < 16 {
        let _ = std::fs::write(PAGES, "16");
    }
    if reserved() < 16 {
        skip(
            "buffers_in_huge_pages",
            "no huge pages can be reserved here",
        );
        return;
    }
    let run = Run::new();
    run.ways(
        "ib_write_bw",
        &["--use_hugepages -n 500", "--use_hugepages -n 500 -b"],
    );
    run.ways("ib_send_lat", &["--use_hugepages -n 500 -s 64"]);
}
