//! The bodies over their corpora, over past crashes, and over a fixed number of inputs that are
//! made up: the same ones each time.

use std::path::{Path, PathBuf};

use freeflow_fuzz::{BODIES, Body};

/// Inputs that are made up, of each body.
const MADE_UP: u64 = 300;
/// Their longest.
const LONGEST: u64 = 2048;

/// SplitMix64: any fixed sequence will do.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end.max(1)
    }
}

fn directory(kind: &str, body: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("..")
        .join(kind)
        .join(body)
}

fn inputs(directory: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let Ok(entries) = std::fs::read_dir(directory) else {
        return Vec::new();
    };
    let mut paths: Vec<_> = entries.filter_map(|e| Some(e.ok()?.path())).collect();
    paths.sort();
    let read = |path: PathBuf| {
        let bytes = std::fs::read(&path).unwrap();
        (path, bytes)
    };
    paths.into_iter().map(read).collect()
}

fn run(name: &str, body: Body) {
    let mut known = inputs(&directory("corpus", name));
    assert!(!known.is_empty(), "{name} has no corpus");
    known.extend(inputs(&directory("regressions", name)));
    for (path, bytes) in &known {
        // What fails is known from the last line.
        println!("{}", path.display());
        body(bytes);
    }
    for seed in 0..MADE_UP {
        let mut numbers = Numbers(seed);
        let mut bytes: Vec<u8> = if seed % 2 == 0 {
            let len = numbers.below(LONGEST);
            (0..len).map(|_| numbers.next() as u8).collect()
        } else {
            let (_, bytes) = &known[numbers.below(known.len() as u64) as usize];
            bytes.clone()
        };
        for _ in 0..numbers.below(16) {
            let at = numbers.below(bytes.len() as u64) as usize;
            if let Some(byte) = bytes.get_mut(at) {
                *byte = numbers.next() as u8;
            }
        }
        println!("made up from {seed}");
        body(&bytes);
    }
}

#[test]
fn bodies_hold_on_what_is_known_and_what_is_made_up() {
    for (name, body) in BODIES {
        run(name, body);
    }
}
