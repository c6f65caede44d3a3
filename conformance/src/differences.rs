//! Where a reference device is known to differ from the rule.

/// A known difference.
pub(crate) struct Difference {
    /// Devices whose names begin so.
    pub(crate) device: &'static str,
    pub(crate) test: &'static str,
    /// What the device does.
    pub(crate) what: &'static str,
    /// What the suite follows instead.
    pub(crate) right: &'static str,
}

const DIFFERENCES: &[Difference] = &[];

/// The known difference of a device in a test.
pub(crate) fn difference(device: &str, test: &str) -> Option<&'static Difference> {
    DIFFERENCES
        .iter()
        .find(|d| device.starts_with(d.device) && d.test == test)
}
