//! What a router shows to others, and whom it believes.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls::client::danger::ServerCertVerifier;
use rustls::client::{Resumption, WebPkiServerVerifier, verify_server_name};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{
    CertificateError, ClientConfig, ClientConnection, DigitallySignedStruct, DistinguishedName,
    Error as TlsError, RootCertStore, ServerConfig, ServerConnection, SignatureScheme,
};
use x509_parser::time::ASN1Time;

/// A protocol's name in the handshake (RFC 7301), so that no other server takes part by mistake.
const ALPN: &[u8] = b"freeflow-link";

/// Bytes that TLS keeps for a connection in each direction.
const BUFFER: usize = 64 << 10;

/// Why a certificate, key and authority are no identity.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// A part is not PEM, or the wrong one.
    #[error("{part}'s file holds no {} in PEM", part.holds())]
    Pem {
        /// Which of the three.
        part: Part,
    },
    /// The key is that of another certificate.
    #[error("the key is not the certificate's")]
    WrongKey,
    /// They do not go together.
    #[error("the certificate, key and authority cannot be used together: {0}")]
    Unusable(TlsError),
    /// The certificate is not one that others believe.
    #[error("this host's own certificate would not be believed by other hosts: {0}")]
    NotBelieved(String),
}

/// What an identity is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The certificate, with those between it and the authority.
    Certificate,
    /// Its key.
    Key,
    /// The authority's certificate.
    Authority,
}

impl Part {
    /// What its file has to hold.
    pub fn holds(self) -> &'static str {
        match self {
            Part::Certificate | Part::Authority => "certificate",
            Part::Key => "private key",
        }
    }
}

impl std::fmt::Display for Part {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Part::Certificate => "the certificate",
            Part::Key => "the key",
            Part::Authority => "the authority",
        })
    }
}

/// A certificate and key, and the authority whose certificates are believed. Clones share it.
#[derive(Clone)]
pub struct Identity {
    provider: Arc<CryptoProvider>,
    own: Arc<CertifiedKey>,
    authorities: Arc<[CertificateDer<'static>]>,
    client: Arc<ClientConfig>,
    clients: Arc<dyn ClientCertVerifier>,
    servers: Arc<WebPkiServerVerifier>,
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Identity")
    }
}

impl Identity {
    /// Of PEM: the certificate (with those between it and the authority behind it), its key, and the
    /// authority's certificate.
    pub fn from_pem(cert: &[u8], key: &[u8], ca: &[u8]) -> Result<Self, IdentityError> {
        let certificates = |pem: &[u8], part| {
            let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
            let all = all.ok().filter(|all| !all.is_empty());
            all.ok_or(IdentityError::Pem { part })
        };
        let chain = certificates(cert, Part::Certificate)?;
        let key = PrivateKeyDer::from_pem_slice(key)
            .map_err(|_| IdentityError::Pem { part: Part::Key })?;
        let authorities = certificates(ca, Part::Authority)?;
        let mut roots = RootCertStore::empty();
        for root in &authorities {
            roots.add(root.clone()).map_err(IdentityError::Unusable)?;
        }
        let (roots, provider) = (
            Arc::new(roots),
            Arc::new(rustls::crypto::ring::default_provider()),
        );
        let unusable =
            |e: &dyn std::fmt::Display| IdentityError::Unusable(TlsError::General(e.to_string()));
        let own = CertifiedKey::from_der(chain, key, &provider).map_err(|e| match e {
            TlsError::InconsistentKeys(_) => IdentityError::WrongKey,
            e => IdentityError::Unusable(e),
        })?;
        let own = Arc::new(own);
        let clients = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone())
            .build()
            .map_err(|e| unusable(&e))?;
        let servers = WebPkiServerVerifier::builder_with_provider(roots, provider.clone())
            .build()
            .map_err(|e| unusable(&e))?;
        let mut client = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(IdentityError::Unusable)?
            .with_webpki_verifier(servers.clone())
            .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(own.clone())));
        client.alpn_protocols = vec![ALPN.to_vec()];
        // Each connection shows its certificate anew.
        client.resumption = Resumption::disabled();
        Ok(Identity {
            provider,
            own,
            authorities: authorities.into(),
            client: Arc::new(client),
            clients,
            servers,
        })
    }

    /// Whether other hosts would believe the certificate at a time, if this host is known to them by
    /// a name, or else by its address.
    pub fn check(
        &self,
        name: Option<&str>,
        address: IpAddr,
        now: SystemTime,
    ) -> Result<(), IdentityError> {
        let refused = |e: &TlsError| IdentityError::NotBelieved(explain(e));
        let name = server_name(name, address).map_err(|e| refused(&e))?;
        let now = UnixTime::since_unix_epoch(since_epoch(now));
        // What is asked below takes an authority for one for ever.
        if let Some(date) = self.authority_expires()
            && date.has_passed(now)
        {
            let why = format!("its authority expired on {date}; every host needs another one's");
            return Err(IdentityError::NotBelieved(why));
        }
        let (own, between) = match self.own.cert.split_first() {
            Some(chain) => chain,
            None => return Err(IdentityError::NotBelieved("it is empty".to_owned())),
        };
        self.servers
            .verify_server_cert(own, between, &name, &[], now)
            .map(|_| ())
            .and_then(|()| {
                self.clients
                    .verify_client_cert(own, between, now)
                    .map(|_| ())
            })
            .map_err(|e| match (&e, self.own.cert.first().and_then(Expiry::of)) {
                (
                    TlsError::InvalidCertificate(
                        CertificateError::Expired | CertificateError::ExpiredContext { .. },
                    ),
                    Some(date),
                ) if date.has_passed(now) => {
                    IdentityError::NotBelieved(format!("it expired on {date}; {RENEW}"))
                }
                _ => refused(&e),
            })
    }

    /// The last day on which this host is to be believed: of its own certificate and those behind it,
    /// and of the authority, or the last one of several. None if one of these is not understood.
    pub fn expires(&self) -> Option<Expiry> {
        let own: Option<Vec<_>> = self.own.cert.iter().map(Expiry::of).collect();
        own?.into_iter().chain([self.authority_expires()?]).min()
    }

    fn authority_expires(&self) -> Option<Expiry> {
        let all: Option<Vec<_>> = self.authorities.iter().map(Expiry::of).collect();
        all?.into_iter().max()
    }

    /// Whether it shows and believes the same as another.
    pub(crate) fn is(&self, other: &Identity) -> bool {
        self.own.cert == other.own.cert && self.authorities == other.authorities
    }

    /// The side that connects to a host.
    pub(crate) fn connect(&self, name: ServerName<'static>) -> Result<ClientConnection, TlsError> {
        let mut connection = ClientConnection::new(self.client.clone(), name)?;
        connection.set_buffer_limit(Some(BUFFER));
        Ok(connection)
    }

    /// The side that a host connects to.
    pub(crate) fn accept(&self, name: ServerName<'static>) -> Result<ServerConnection, TlsError> {
        let mut config = ServerConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_client_cert_verifier(Arc::new(Named {
                clients: self.clients.clone(),
                name,
            }))
            .with_cert_resolver(Arc::new(SingleCertAndKey::from(self.own.clone())));
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.send_tls13_tickets = 0;
        let mut connection = ServerConnection::new(Arc::new(config))?;
        connection.set_buffer_limit(Some(BUFFER));
        Ok(connection)
    }
}

/// When a certificate expires; as text, the day (UTC).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Expiry(ASN1Time);

impl Expiry {
    /// None: it is no certificate.
    pub(crate) fn of(certificate: &CertificateDer<'_>) -> Option<Self> {
        let (_, read) = x509_parser::parse_x509_certificate(certificate).ok()?;
        Some(Expiry(read.validity().not_after))
    }

    /// How long it still is at a time; nothing if it has passed.
    pub fn left(self, now: SystemTime) -> Duration {
        let at = u64::try_from(self.0.timestamp()).unwrap_or(0);
        Duration::from_secs(at).saturating_sub(since_epoch(now))
    }

    fn has_passed(self, now: UnixTime) -> bool {
        u64::try_from(self.0.timestamp()).is_ok_and(|at| at < now.as_secs())
    }
}

impl std::fmt::Display for Expiry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.to_datetime().date().fmt(f)
    }
}

fn since_epoch(now: SystemTime) -> Duration {
    now.duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default()
}

/// Whether hosts may have a name in certificates: a DNS name, or an address.
pub fn is_host_name(name: &str) -> bool {
    ServerName::try_from(name).is_ok()
}

/// What a host is known by in certificates: its name, if it has one, or else its address. An error if
/// no certificate can have the name: it is not to be known by another one then.
pub(crate) fn server_name(
    name: Option<&str>,
    address: IpAddr,
) -> Result<ServerName<'static>, TlsError> {
    match name {
        Some(name) => ServerName::try_from(name.to_owned())
            .map_err(|_| TlsError::General(format!("\"{name}\" is no name of a host"))),
        None => Ok(ServerName::IpAddress(address.into())),
    }
}

/// Believes clients of one name alone.
#[derive(Debug)]
struct Named {
    clients: Arc<dyn ClientCertVerifier>,
    name: ServerName<'static>,
}

impl ClientCertVerifier for Named {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.clients.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, TlsError> {
        let verified = self
            .clients
            .verify_client_cert(end_entity, intermediates, now)?;
        verify_server_name(&ParsedCertificate::try_from(end_entity)?, &self.name)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, TlsError> {
        self.clients.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, TlsError> {
        self.clients.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.clients.supported_verify_schemes()
    }
}

/// What to do about a certificate that has expired.
const RENEW: &str = "renew it, with `freeflow host cert` or at your authority";

/// What is wrong, and what to do about it.
pub(crate) fn explain(error: &TlsError) -> String {
    use CertificateError as C;
    let what = match error {
        TlsError::InvalidCertificate(C::Expired | C::ExpiredContext { .. }) => RENEW,
        TlsError::InvalidCertificate(C::NotValidYet | C::NotValidYetContext { .. }) => {
            "are both hosts' clocks right?"
        }
        TlsError::InvalidCertificate(C::UnknownIssuer | C::BadSignature) => {
            "it is of another authority than --tls-ca"
        }
        TlsError::InvalidCertificate(C::NotValidForName | C::NotValidForNameContext { .. }) => {
            "it must be for the host's name or address in the map"
        }
        TlsError::AlertReceived(_) => {
            "the other host refuses this one's certificate or handshake; its log says why"
        }
        TlsError::InvalidMessage(_) => "does it run with --insecure, or is it no router?",
        TlsError::NoCertificatesPresented => "the other host runs without --tls-cert",
        _ => return error.to_string(),
    };
    format!("{error}; {what}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pki::{Authority, Pair, Validity};

    fn authority() -> (Pair, Authority) {
        let pair = Authority::generate(Validity::days(10)).unwrap();
        let authority = Authority::load(&pair.cert, &pair.key).unwrap();
        (pair, authority)
    }

    #[test]
    fn a_certificate_is_for_its_names_and_its_time() {
        let (ca, authority) = authority();
        let host = authority
            .issue(&["192.0.2.1", "node1"], Validity::days(5))
            .unwrap();
        let identity = Identity::from_pem(
            host.cert.as_bytes(),
            host.key.as_bytes(),
            ca.cert.as_bytes(),
        );
        let identity = identity.unwrap();
        let now = SystemTime::now();
        let address = |text: &str| text.parse::<IpAddr>().unwrap();
        let own = address("192.0.2.1");
        identity.check(None, own, now).unwrap();
        identity
            .check(Some("node1"), address("192.0.2.9"), now)
            .unwrap();
        let refused = |address, at, said: &str| {
            let why = identity.check(None, address, at).unwrap_err().to_string();
            assert!(why.contains(said), "{why}");
        };
        refused(address("192.0.2.2"), now, "name or address in the map");
        let day = Duration::from_secs(86_400);
        refused(own, now + 6 * day, "renew it");
        let expiry = identity.expires().unwrap();
        refused(own, now + 6 * day, &format!("it expired on {expiry};"));
        let left = expiry.left(now);
        assert!(left > 4 * day && left <= 5 * day, "{left:?}");
        assert_eq!(expiry.left(now + 6 * day), Duration::ZERO);
        refused(own, now - Duration::from_secs(86_400), "clocks");
        let (other, _) = self::authority();
        let identity = Identity::from_pem(
            host.cert.as_bytes(),
            host.key.as_bytes(),
            other.cert.as_bytes(),
        );
        let why = identity.unwrap().check(None, own, now).unwrap_err();
        assert!(why.to_string().contains("another authority"), "{why}");
    }

    #[test]
    fn an_authoritys_time_is_that_of_its_hosts() {
        let now = SystemTime::now();
        let day = Duration::from_secs(86_400);
        let ca = |from, to| Authority::generate(Validity { from, to }).unwrap();
        let (over, short) = (ca(now - 9 * day, now - day), ca(now - day, now + 3 * day));
        let load = |pair: &Pair| Authority::load(&pair.cert, &pair.key).unwrap();
        let refused = load(&over).issue(&["192.0.2.1"], Validity::days(5));
        let why = refused.err().unwrap().to_string();
        assert!(why.contains("the authority expired on "), "{why}");
        let host = load(&short).issue(&["192.0.2.1"], Validity::days(50));
        let host = host.unwrap();
        let with = |ca: &str| {
            Identity::from_pem(host.cert.as_bytes(), host.key.as_bytes(), ca.as_bytes()).unwrap()
        };
        let left = with(&short.cert).expires().unwrap().left(now);
        assert!(left > 2 * day && left <= 3 * day, "{left:?}");
        let address = "192.0.2.1".parse().unwrap();
        with(&short.cert).check(None, address, now).unwrap();
        // One of two is enough.
        let both = format!("{}{}", over.cert, short.cert);
        with(&both).check(None, address, now).unwrap();
        let why = with(&over.cert).check(None, address, now).unwrap_err();
        assert!(
            why.to_string().contains("its authority expired on "),
            "{why}"
        );
    }

    #[test]
    fn a_day_is_written_as_one() {
        let time = ASN1Time::from_timestamp(4_102_444_800).unwrap();
        assert_eq!(Expiry(time).to_string(), "2100-01-01");
    }

    #[test]
    fn a_name_that_no_certificate_can_have_is_not_replaced() {
        let (ca, authority) = authority();
        let host = authority.issue(&["192.0.2.1"], Validity::days(5)).unwrap();
        let (cert, key) = (host.cert.as_bytes(), host.key.as_bytes());
        let identity = Identity::from_pem(cert, key, ca.cert.as_bytes()).unwrap();
        let address = "192.0.2.1".parse().unwrap();
        for bad in ["bad..name", "", "a b", "-"] {
            assert!(!is_host_name(bad), "{bad}");
            let checked = identity.check(Some(bad), address, SystemTime::now());
            let why = checked.unwrap_err().to_string();
            assert!(why.contains(&format!("\"{bad}\" is no name")), "{why}");
        }
        for good in ["node1", "node1.example.org", "192.0.2.7", "fd00::1"] {
            assert!(is_host_name(good), "{good}");
        }
    }

    #[test]
    fn what_does_not_go_together_is_refused() {
        let (ca, authority) = authority();
        let one = authority.issue(&["node1"], Validity::days(5)).unwrap();
        let two = authority.issue(&["node2"], Validity::days(5)).unwrap();
        let (ca, cert) = (ca.cert.as_bytes(), one.cert.as_bytes());
        let made = |cert, key, ca| Identity::from_pem(cert, key, ca).map(drop);
        made(cert, one.key.as_bytes(), ca).unwrap();
        let why = made(cert, two.key.as_bytes(), ca).unwrap_err();
        assert!(matches!(why, IdentityError::WrongKey), "{why}");
        for (cert, key, ca, said) in [
            (&b""[..], one.key.as_bytes(), ca, "certificate's file"),
            (cert, cert, ca, "key's file"),
            (cert, one.key.as_bytes(), &b"junk"[..], "authority's file"),
        ] {
            let why = made(cert, key, ca).unwrap_err().to_string();
            assert!(why.contains(said), "{why}");
        }
        assert!(authority.issue(&["no name"], Validity::days(1)).is_err());
    }
}
