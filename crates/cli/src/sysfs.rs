//! The tree that looks like `/sys/class` to programs that read about RDMA devices there.

use std::io;
use std::net::IpAddr;
use std::os::unix::fs::symlink;
use std::path::Path;

/// Name of the device.
pub(crate) const DEVICE: &str = "freeflow0";
/// Name of its character device.
pub(crate) const UVERBS: &str = "uverbs0";

/// An empty directory in the tree, to mount things on while they are put together.
pub(crate) const STAGE: &str = "stage";

/// Writes the tree of an endpoint with these addresses as GIDs. The first is on `interface`, if it is
/// on one. Of the others the interface may be in another network: it is not told.
pub(crate) fn write(
    root: &Path,
    ips: impl IntoIterator<Item = IpAddr>,
    interface: Option<&str>,
) -> io::Result<()> {
    std::fs::create_dir_all(root.join(STAGE))?;
    let device = root.join("infiniband").join(DEVICE);
    if let Some(name) = interface {
        let net = device.join("device/net");
        std::fs::create_dir_all(&net)?;
        // By its own path: the tree is not always at /sys/class.
        let to = Path::new("/sys/class/net").join(name);
        match symlink(to, net.join(name)) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
            _ => {}
        }
    }
    for (index, ip) in ips.into_iter().enumerate() {
        let v6 = match ip {
            IpAddr::V4(v4) => v4.to_ipv6_mapped(),
            IpAddr::V6(v6) => v6,
        };
        let gid = v6.segments().map(|s| format!("{s:04x}")).join(":");
        put(&device.join(format!("ports/1/gids/{index}")), &gid)?;
        let kind = device.join(format!("ports/1/gid_attrs/types/{index}"));
        put(&kind, "RoCE v2")?;
    }
    let files: [(&str, &str); 16] = [
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
        ("ports/1/gid_attrs/ndevs/0", interface.unwrap_or("lo")),
        ("device/vendor", "0x46464c"),
        ("device/numa_node", "-1"),
    ];
    for (file, text) in files {
        put(&device.join(file), text)?;
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
        let ips = ["10.1.2.3", "fd00::7"].map(|ip| ip.parse().unwrap());
        write(&root, ips, Some("eth0")).unwrap();
        let read = |file: &str| {
            let port = root.join("infiniband/freeflow0/ports/1");
            std::fs::read_to_string(port.join(file)).unwrap()
        };
        assert_eq!(read("gids/0"), "0000:0000:0000:0000:0000:ffff:0a01:0203\n");
        assert_eq!(read("gids/1"), "fd00:0000:0000:0000:0000:0000:0000:0007\n");
        for type_of in ["gid_attrs/types/0", "gid_attrs/types/1"] {
            assert_eq!(read(type_of), "RoCE v2\n");
        }
        assert_eq!(read("gid_attrs/ndevs/0"), "eth0\n");
        let net = root.join("infiniband/freeflow0/device/net/eth0");
        let shown = std::fs::read_link(net).unwrap();
        assert_eq!(shown, Path::new("/sys/class/net/eth0"));
        std::fs::remove_dir_all(root).unwrap();
    }
}
