//! Unpacking on the host what a guest without hardware virtualisation would need seconds for: the
//! kernel inside of its boot image, and modules.

use std::fs::File;
use std::io::{Seek, Write};
use std::path::Path;
use std::process::Command;

use crate::VmError;
use crate::machine::output_bytes;

/// The kernel as an ELF file, if the boot image (`vmlinuz`) has it in a form that can be unpacked.
///
/// The image's header is that of "The Linux/x86 Boot Protocol", version 2.08 or newer.
pub(crate) fn kernel_of(image: &[u8]) -> Result<Option<Vec<u8>>, VmError> {
    match payload(image) {
        Some(payload) if payload.starts_with(b"\xfd7zXZ\0") => {
            let kernel = unpack(payload)?;
            Ok(kernel.starts_with(b"\x7fELF").then_some(kernel))
        }
        _ => Ok(None),
    }
}

fn payload(image: &[u8]) -> Option<&[u8]> {
    let word = |at: usize| {
        let bytes = image.get(at..at + 4)?.try_into().ok()?;
        Some(u32::from_le_bytes(bytes) as usize)
    };
    let version = u16::from_le_bytes(image.get(0x206..0x208)?.try_into().ok()?);
    if image.get(0x202..0x206)? != b"HdrS" || version < 0x208 {
        return None;
    }
    // Zero means four, for images of before it was counted.
    let setup_sectors = match *image.get(0x1f1)? {
        0 => 4,
        n => usize::from(n),
    };
    let start = (setup_sectors + 1) * 512 + word(0x248)?;
    image.get(start..start + word(0x24c)?)
}

/// A module's name and content; newer Debians compress them.
pub(crate) fn module(path: &Path) -> Result<(String, Vec<u8>), VmError> {
    let bytes = std::fs::read(path)
        .map_err(|e| VmError::io(format!("cannot read {}", path.display()), e))?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    match name.strip_suffix(".xz") {
        Some(plain) => Ok((plain.to_owned(), unpack(&bytes)?)),
        None => Ok((name.into_owned(), bytes)),
    }
}

/// Unpacks the first of what may be several things.
fn unpack(bytes: &[u8]) -> Result<Vec<u8>, VmError> {
    let failed = |e| VmError::io("cannot write a temporary file".to_owned(), e);
    let write = || -> std::io::Result<File> {
        let mut file = tempfile::tempfile()?;
        file.write_all(bytes)?;
        file.rewind()?;
        Ok(file)
    };
    let mut xz = Command::new("xz");
    xz.args(["-dc", "--single-stream"])
        .stdin(write().map_err(failed)?);
    output_bytes(&mut xz)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `xz` makes of some bytes.
    fn pack(bytes: &[u8]) -> Vec<u8> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("x");
        std::fs::write(&file, bytes).unwrap();
        output_bytes(Command::new("xz").arg("-c").arg(&file)).unwrap()
    }

    fn image(kernel: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 3 * 512];
        image[0x1f1] = 1;
        image[0x202..0x208].copy_from_slice(b"HdrS\x0f\x02");
        image[0x248..0x24c].copy_from_slice(&512u32.to_le_bytes());
        let len = kernel.len() as u32 + 4;
        image[0x24c..0x250].copy_from_slice(&len.to_le_bytes());
        image.extend_from_slice(kernel);
        image.extend_from_slice(b"size");
        image
    }

    #[test]
    fn the_kernel_is_found_in_its_image() {
        let elf = b"\x7fELF and so on".to_vec();
        let whole = image(&pack(&elf));
        assert_eq!(kernel_of(&whole).unwrap(), Some(elf));
        assert_eq!(kernel_of(&image(&pack(b"no program"))).unwrap(), None);
        assert_eq!(kernel_of(&image(b"packed otherwise")).unwrap(), None);
        assert_eq!(kernel_of(&whole[..whole.len() - 1]).unwrap(), None);
        assert_eq!(kernel_of(b"no image").unwrap(), None);
    }

    #[test]
    fn compressed_modules_are_unpacked() {
        let dir = tempfile::tempdir().unwrap();
        let (plain, packed) = (dir.path().join("x.ko"), dir.path().join("x.ko.xz"));
        std::fs::write(&plain, "content").unwrap();
        std::fs::write(&packed, pack(b"content")).unwrap();
        let wanted = ("x.ko".to_owned(), b"content".to_vec());
        assert_eq!(module(&plain).unwrap(), wanted);
        assert_eq!(module(&packed).unwrap(), wanted);
        std::fs::write(&packed, "no archive").unwrap();
        assert!(module(&packed).is_err());
    }
}
