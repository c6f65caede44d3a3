//! Lists what crates/abi declares, so that the test of its layout covers all of it.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use syn::{Fields, Item, Visibility};

fn main() {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/abi/src");
    println!("cargo::rerun-if-changed={}", sources.display());
    let mut files: Vec<PathBuf> = std::fs::read_dir(&sources)
        .expect("crates/abi has sources")
        .map(|entry| entry.expect("the directory can be read").path())
        .collect();
    files.sort();
    let (mut types, mut values) = (String::new(), String::new());
    for file in files {
        let text = std::fs::read_to_string(&file).expect("a source can be read");
        let parsed = syn::parse_file(&text).expect("a source is Rust");
        for item in parsed.items {
            list(&item, &mut types, &mut values);
        }
    }
    let text = format!(
        "fn types() -> Vec<Type> {{ vec![{types}] }}\n\
         fn values() -> Vec<(&'static str, i128)> {{ vec![{values}] }}\n"
    );
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    std::fs::write(out.join("declared.rs"), text).expect("OUT_DIR is writable");
}

/// Adds an item to the lists, if it is one that C sees.
fn list(item: &Item, types: &mut String, values: &mut String) {
    let (name, fields, safety) = match item {
        Item::Struct(item) if public(&item.vis) => match &item.fields {
            Fields::Named(fields) => (&item.ident, Some(fields), ""),
            _ => (&item.ident, None, ""),
        },
        Item::Union(item) if public(&item.vis) => (&item.ident, Some(&item.fields), "unsafe"),
        Item::Const(item) if public(&item.vis) => return value(&item.ident.to_string(), values),
        // A table: each constant stands before its equals sign.
        Item::Macro(item) if item.mac.path.is_ident("constants") => {
            let tokens = item.mac.tokens.to_string();
            let words: Vec<_> = tokens.split_ascii_whitespace().collect();
            for pair in words.windows(2).filter(|pair| pair[1] == "=") {
                value(pair[0], values);
            }
            return;
        }
        _ => return,
    };
    let mut list = String::new();
    for field in fields.iter().flat_map(|fields| &fields.named) {
        let field = field.ident.as_ref().expect("its fields are named");
        write!(
            list,
            "Field {{ name: \"{field}\", \
             offset: core::mem::offset_of!(freeflow_abi::{name}, {field}), \
             size: size_of_field(|it: &freeflow_abi::{name}| {safety} {{ &it.{field} }}) }},"
        )
        .expect("it is a string");
    }
    write!(
        types,
        "Type {{ name: \"{name}\", size: size_of::<freeflow_abi::{name}>(), \
         align: align_of::<freeflow_abi::{name}>(), fields: vec![{list}] }},"
    )
    .expect("it is a string");
}

fn value(name: &str, values: &mut String) {
    write!(values, "(\"{name}\", freeflow_abi::{name} as i128),").expect("it is a string");
}

fn public(visibility: &Visibility) -> bool {
    matches!(visibility, Visibility::Public(_))
}
