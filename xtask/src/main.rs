//! Repository tasks, run as `cargo xtask TASK`. Each installs what it needs.

mod bench;
mod cargo;
mod checks;
mod demo;
mod dist;
mod fairness;
mod fuzz;
mod measure;
mod packages;
mod sanitizer;
mod test;
mod vm;

use std::process::ExitCode;

use clap::Parser;

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Tasks of the FreeFlow repository")]
enum Task {
    /// Run Debian's RDMA programs between two endpoints, and print their figures beside TCP's
    Demo,
    /// Run every test that can run on this machine
    Test(test::TestArgs),
    /// Build target/dist: bin/freeflow and the libraries
    Dist,
    /// Fuzz what reads others' bytes; see fuzz/README.md
    Fuzz(fuzz::FuzzArgs),
    /// Measure speed and cost beside their peers, as a table and as JSON
    Bench(bench::BenchArgs),
    /// Run a script in a virtual machine with a kernel RDMA device
    Vm(vm::VmArgs),
}

fn main() -> ExitCode {
    let success = |()| ExitCode::SUCCESS;
    let done = match Task::parse() {
        Task::Demo => demo::demo().map(success),
        Task::Test(args) => test::test(&args).map(success),
        Task::Fuzz(args) => fuzz::fuzz(&args).map(success),
        Task::Dist => dist::dist()
            .map(|dir| println!("{}", dir.display()))
            .map(success),
        Task::Bench(args) => bench::bench(&args).map(success),
        Task::Vm(args) => vm::vm(&args),
    };
    done.unwrap_or_else(|e| {
        eprintln!("xtask: {e:#}");
        ExitCode::FAILURE
    })
}
