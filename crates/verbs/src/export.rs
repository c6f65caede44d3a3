//! Exported, versioned symbols.

/// Exports functions under a name and a version node: `"name" "@@NODE" function`. The trampoline
/// and its `.symver` stand in one assembly block, whatever object it lands in; the label itself is
/// removed, or it would be exported too. `@@` marks the default version, `@` an older one.
macro_rules! export {
    ($($name:literal $version:literal $function:path;)*) => {
        $(core::arch::global_asm!(
            concat!(".pushsection .text.ffv.", $name, $version, ",\"ax\",@progbits"),
            concat!(".globl \"ffv.", $name, $version, "\""),
            concat!(".type \"ffv.", $name, $version, "\",@function"),
            concat!("\"ffv.", $name, $version, "\":"),
            "jmp {f}",
            concat!(".size \"ffv.", $name, $version, "\", . - \"ffv.", $name, $version, "\""),
            concat!(".symver \"ffv.", $name, $version, "\", ", $name, $version, ", remove"),
            ".popsection",
            f = sym $function,
        );)*
    };
}

pub(crate) use export;

#[cfg(not(target_arch = "x86_64"))]
compile_error!("the trampolines are written for x86-64");
