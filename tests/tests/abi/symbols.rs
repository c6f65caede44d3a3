//! What the shared objects export, against an explicit list and against the installed libraries.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use object::Endianness;
use object::elf::{DT_NEEDED, FileHeader64, STT_FUNC, STT_NOTYPE, STT_OBJECT};
use object::read::elf::{Dyn, ElfFile64, FileHeader, Sym};

use freeflow_tests::skip;

use crate::support::{SYSTEM, installed, library};

type Header = FileHeader64<Endianness>;

/// A dynamic symbol. As readers print it: `name@@NODE` is the default, `name@NODE` is not, `name`
/// has no version.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Symbol {
    name: String,
    /// Node, and whether it is the default.
    version: Option<(String, bool)>,
    data: bool,
}

impl std::fmt::Display for Symbol {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.version {
            Some((node, true)) => write!(f, "{}@@{node}", self.name),
            Some((node, false)) => write!(f, "{}@{node}", self.name),
            None => f.write_str(&self.name),
        }
    }
}

/// What the dynamic loader sees of a shared object.
struct Dynamic {
    exported: BTreeSet<Symbol>,
    imported: BTreeSet<Symbol>,
    nodes: BTreeSet<String>,
    needed: Vec<String>,
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("a symbol's name is text")
}

fn read(path: &Path) -> Dynamic {
    let bytes =
        std::fs::read(path).unwrap_or_else(|e| panic!("cannot read {}: {e}", path.display()));
    let file = ElfFile64::<Endianness>::parse(&*bytes).expect("it is a 64-bit ELF file");
    let (endian, sections) = (file.endian(), file.elf_section_table());
    let versions = sections
        .versions(endian, &*bytes)
        .expect("its versions can be read");
    let mut found = Dynamic {
        exported: BTreeSet::new(),
        imported: BTreeSet::new(),
        nodes: BTreeSet::new(),
        needed: Vec::new(),
    };
    let symbols = file.elf_dynamic_symbol_table();
    for (index, symbol) in symbols.enumerate() {
        let kind = symbol.st_type();
        let name = text(symbol.name(endian, symbols.strings()).expect("a name"));
        if name.is_empty() || ![STT_FUNC, STT_OBJECT, STT_NOTYPE].contains(&kind) {
            continue;
        }
        let version = versions.as_ref().and_then(|table| {
            let index = table.version_index(endian, index);
            let version = table.version(index).ok().flatten()?;
            Some((text(version.name()), !index.is_hidden()))
        });
        // A node has an absolute symbol of its own name in what GNU ld links.
        if version.as_ref().is_some_and(|(node, _)| *node == name) {
            continue;
        }
        let to = if symbol.is_undefined(endian) {
            &mut found.imported
        } else {
            &mut found.exported
        };
        let data = kind == STT_OBJECT;
        to.insert(Symbol {
            name,
            version,
            data,
        });
    }
    if let Some((mut definitions, strings)) =
        sections.gnu_verdef(endian, &*bytes).expect("definitions")
    {
        let strings = sections
            .strings(endian, &*bytes, strings)
            .expect("their names");
        while let Some((_, mut names)) = definitions.next().expect("a definition") {
            let name = names.next().expect("its names").expect("its own name");
            found
                .nodes
                .insert(text(name.name(endian, strings).expect("a name")));
        }
    }
    let (dynamic, strings) = sections
        .dynamic(endian, &*bytes)
        .expect("a dynamic section")
        .expect("a shared object has one");
    let strings = sections
        .strings(endian, &*bytes, strings)
        .expect("its strings");
    let needed = dynamic
        .iter()
        .filter(|entry| entry.tag32(endian) == Some(DT_NEEDED))
        .map(|entry| text(entry.string(endian, strings).expect("a name")));
    found.needed.extend(needed);
    found
}

fn header_is_64_bit(bytes: &[u8]) -> bool {
    Header::parse(bytes).is_ok_and(|header| header.is_supported())
}

fn is_private(node: &str) -> bool {
    node.starts_with("IBVERBS_PRIVATE_")
}

/// The list that ours must be.
fn listed() -> BTreeSet<String> {
    include_str!("exports.txt")
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .map(str::to_owned)
        .collect()
}

#[test]
fn exports_are_the_list_and_nothing_else() {
    let ours = read(&library("libibverbs.so.1"));
    let exported: BTreeSet<_> = ours.exported.iter().map(Symbol::to_string).collect();
    let listed = listed();
    let missing: Vec<_> = listed.difference(&exported).collect();
    let more: Vec<_> = exported.difference(&listed).collect();
    assert!(missing.is_empty(), "not exported: {missing:#?}");
    assert!(more.is_empty(), "not in exports.txt: {more:#?}");
}

#[test]
fn version_nodes_are_there() {
    let public = ["1.0", "1.1"].map(str::to_owned);
    let public = public
        .into_iter()
        .chain((5..=18).map(|minor| format!("1.{minor}")));
    let private = [15, 16, 17, 18, 19, 20, 21, 22, 25, 33, 34, 57, 59, 64, 65];
    let rdmacm: Vec<_> = (0..=5).map(|minor| format!("RDMACM_1.{minor}")).collect();
    let wanted: Vec<_> = public
        .map(|version| format!("IBVERBS_{version}"))
        .chain(private.map(|n| format!("IBVERBS_PRIVATE_{n}")))
        .chain(rdmacm.clone())
        .collect();
    let ours = read(&library("libibverbs.so.1"));
    for node in &wanted {
        assert!(ours.nodes.contains(node), "libibverbs.so.1 lacks {node}");
    }
    for n in private {
        let register = format!("verbs_register_driver_{n}");
        assert!(
            ours.exported.iter().any(|symbol| symbol.name == register),
            "a driver of node {n} calls {register} when it is loaded"
        );
    }
    let stub = read(&library("librdmacm.so.1"));
    for node in &rdmacm {
        assert!(stub.nodes.contains(node), "librdmacm.so.1 lacks {node}");
    }
    assert!(stub.exported.is_empty(), "{:?}", stub.exported);
    assert!(
        stub.needed.contains(&"libibverbs.so.1".to_owned()),
        "{:?}",
        stub.needed
    );
}

#[test]
fn librdmacm_is_small() {
    let size = library("librdmacm.so.1").metadata().unwrap().len();
    assert!(size < 64 * 1024, "{size} bytes for a list of versions");
}

/// Every symbol that the installed library exports is ours, with its version and default-ness; a
/// private one is there without a version (its node is empty).
fn covers(theirs: &str) {
    let Some(path) = installed(theirs) else {
        return skip(theirs, "it is not installed");
    };
    let theirs = read(&path);
    let ours = read(&library("libibverbs.so.1"));
    assert!(!theirs.exported.is_empty());
    let lacking: Vec<_> = theirs
        .exported
        .iter()
        .filter(|symbol| {
            let mut wanted = (*symbol).clone();
            if wanted
                .version
                .as_ref()
                .is_some_and(|(node, _)| is_private(node))
            {
                wanted.version = None;
            }
            !ours.exported.contains(&wanted)
        })
        .map(Symbol::to_string)
        .collect();
    assert!(lacking.is_empty(), "{}: {lacking:#?}", path.display());
    let nodes: Vec<_> = theirs
        .nodes
        .iter()
        .filter(|node| !node.ends_with(".so.1") && !ours.nodes.contains(*node))
        .collect();
    assert!(nodes.is_empty(), "{}: {nodes:?}", path.display());
}

#[test]
fn the_installed_libibverbs_is_covered() {
    covers("libibverbs.so.1");
}

#[test]
fn the_installed_librdmacm_is_covered() {
    covers("librdmacm.so.1");
}

/// Every installed shared object below a directory that needs one of our libraries.
fn users() -> BTreeMap<PathBuf, Dynamic> {
    let mut found = BTreeMap::new();
    let below = ["", "libibverbs", "ucx", "rsocket"];
    let dirs = SYSTEM
        .iter()
        .flat_map(|dir| below.map(|sub| Path::new(dir).join(sub)));
    for entry in dirs.filter_map(|dir| dir.read_dir().ok()).flatten() {
        let Ok(path) = entry
            .expect("a directory can be read")
            .path()
            .canonicalize()
        else {
            continue;
        };
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if !name.contains(".so") || !path.is_file() || found.contains_key(&path) {
            continue;
        }
        if !std::fs::read(&path).is_ok_and(|bytes| header_is_64_bit(&bytes)) {
            continue;
        }
        let dynamic = read(&path);
        let ours = ["libibverbs.so.1", "librdmacm.so.1"];
        if dynamic.needed.iter().any(|n| ours.contains(&n.as_str())) {
            found.insert(path, dynamic);
        }
    }
    found
}

#[test]
fn what_installed_libraries_import_is_there() {
    let users = users();
    if users.is_empty() {
        return skip(
            "what_installed_libraries_import_is_there",
            "no library that uses libibverbs is installed",
        );
    }
    let ours = read(&library("libibverbs.so.1"));
    let mut lacking = Vec::new();
    for (path, user) in &users {
        for symbol in &user.imported {
            let Some((node, _)) = &symbol.version else {
                continue;
            };
            if !node.starts_with("IBVERBS_") && !node.starts_with("RDMACM_") {
                continue;
            }
            let there = ours.nodes.contains(node)
                && ours.exported.iter().any(|export| {
                    export.name == symbol.name
                        && match &export.version {
                            Some((version, _)) => version == node,
                            None => is_private(node),
                        }
                });
            if !there {
                lacking.push(format!("{symbol} of {}", path.display()));
            }
        }
    }
    assert!(lacking.is_empty(), "{lacking:#?}");
}
