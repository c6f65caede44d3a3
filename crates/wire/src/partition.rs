//! Partition keys.

/// The partition of a tenant's packets between FreeFlow routers.
///
/// A program chooses the queue pair number that it connects to, and must not reach another
/// tenant's by it. Every router comes to the same number, never to the default one. The numbers
/// are of 15 bits: among hundreds of tenants two may share one.
pub fn tenant_pkey(tenant: &str) -> u16 {
    const FULL_MEMBER: u16 = 0x8000;
    // FNV-1a of 32 bits.
    let hash = tenant.bytes().fold(0x811C_9DC5_u32, |hash, byte| {
        (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
    });
    FULL_MEMBER | ((hash % 0x7FFE) as u16 + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DEFAULT_PKEY;

    #[test]
    fn tenants_have_partitions_of_their_own() {
        let all: std::collections::HashSet<_> = ["default", "a", "b", "blue", "green", ""]
            .into_iter()
            .map(tenant_pkey)
            .collect();
        assert_eq!(all.len(), 6);
        assert!(
            all.iter()
                .all(|&pkey| pkey > 0x8000 && pkey != DEFAULT_PKEY)
        );
    }
}
