/// Why the manager does not do what it is asked.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Refused {
    /// The id is in a state in which this cannot be asked, or not one of that kind.
    #[error("the id is in a state in which this cannot be asked")]
    State,
    /// There is no such id.
    #[error("there is no such id")]
    Unknown,
    /// A value is out of bounds.
    #[error("{what} is {value}, at most {limit}")]
    Bounds {
        /// Which.
        what: &'static str,
        /// Its value.
        value: usize,
        /// The greatest.
        limit: usize,
    },
    /// Addresses of two families.
    #[error("the addresses are of different families")]
    Families,
    /// Not an address that this can be done with.
    #[error("the address is none that this can be done with")]
    Address,
    /// The address is not the endpoint's.
    #[error("the address is not the endpoint's")]
    NoDevice,
    /// Another id has the port at that address.
    #[error("another id has the port")]
    AddressInUse,
    /// Another id has the port at an address that counts for this one too, or there is no port
    /// left.
    #[error("the port cannot be had at this address")]
    AddressNotAvailable,
    /// The connection is established already.
    #[error("the connection is established")]
    Established,
    /// Too much waits to be sent or told.
    #[error("the manager has no room for another connection")]
    Full,
}

impl Refused {
    /// The errno value of Linux that the man pages of librdmacm's functions lead to.
    pub fn errno(self) -> i32 {
        match self {
            Refused::State
            | Refused::Unknown
            | Refused::Bounds { .. }
            | Refused::Families
            | Refused::Address => 22,
            Refused::Full => 12,
            Refused::NoDevice => 19,
            Refused::AddressInUse => 98,
            Refused::AddressNotAvailable => 99,
            Refused::Established => 106,
        }
    }
}
