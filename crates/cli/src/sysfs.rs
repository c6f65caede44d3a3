//! The tree that looks like `/sys/class` to programs that read about RDMA devices there.

use std::io;
use std::net::IpAddr;
use std::path::Path;

/// Name of the device.
pub(crate) const DEVICE: &str = "freeflow0";
/// Name of its character device.
pub(crate) const UVERBS: &str = "uverbs0";

/// An empty directory in the tree, to mount things on while they are put together.
pub(crate) const STAGE: &str = "stage";

/// Writes the tree of an endpoint whose address is on the interface `ndev`.
pub(crate) fn write(root: &Path, ip: IpAddr, ndev: &str) -> io::Result<()> {
    std::fs::create_dir_all(root.join(STAGE))?;
    let v6 = match ip {
        IpAddr::V4(v4) => v4.to_ipv6_mapped(),
        IpAddr::V6(v6) => v6,
    };
    let gid = v6.segments().map(|s| format!("{s:04x}")).join(":");
    let files: [(&str, &str); 18] = [
        ("node_type", "1: CA"),
        ("node_desc", DEVICE),
        ("fw_ver", env!("CARGO_PKG_VERSION")),
        ("hca_type", "FreeFlow"),
        ("ports/1/state", "4: ACTIVE"),
        ("ports/1/phys_state", "5: LinkUp"),
        ("ports/1/link_layer", "Ethernet"),
        ("ports/1/lid", "0x0"),
        ("ports/1/sm_lid", "0x0"),
        ("ports/1/lid_mask_count", "0"),
        ("ports/1/rate", "100 Gb/sec (4X EDR)"),
        ("ports/1/cap_mask", "0x00000000"),
        ("ports/1/pkeys/0", "0xffff"),
        ("ports/1/gids/0", &gid),
        ("ports/1/gid_attrs/types/0", "RoCE v2"),
        ("ports/1/gid_attrs/ndevs/0", ndev),
        ("device/vendor", "0x46464c"),
        ("device/numa_node", "-1"),
    ];
    for (file, text) in files {
        put(&root.join("infiniband").join(DEVICE).join(file), text)?;
    }
    for (file, text) in [("ibdev", DEVICE), ("abi_version", "1"), ("dev", "231:192")] {
        put(&root.join("infiniband_verbs").join(UVERBS).join(file), text)?;
    }
    put(&root.join("infiniband_verbs").join("abi_version"), "6")
}

fn put(path: &Path, text: &str) -> io::Result<()> {
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent)?;
    }
    std::fs::write(path, format!("{text}\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gid_is_written_as_sysfs_does() {
        let root = std::env::temp_dir().join(format!("ff-sysfs-{}", std::process::id()));
        write(&root, "10.1.2.3".parse().unwrap(), "eth0").unwrap();
        let gid = root.join("infiniband/freeflow0/ports/1/gids/0");
        let text = std::fs::read_to_string(gid).unwrap();
        assert_eq!(text, "0000:0000:0000:0000:0000:ffff:0a01:0203\n");
        std::fs::remove_dir_all(root).unwrap();
    }
}
