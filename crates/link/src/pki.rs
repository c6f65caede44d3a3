//! Certificates for those who have no authority of their own: one authority, and a certificate and
//! key for each host.

use std::net::IpAddr;
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use crate::identity::Expiry;

/// A certificate and its private key, in PEM.
pub struct Pair {
    /// The certificate.
    pub cert: String,
    /// The private key (PKCS #8).
    pub key: String,
}

/// From when to when a certificate is good.
#[derive(Clone, Copy, Debug)]
pub struct Validity {
    /// First moment.
    pub from: SystemTime,
    /// Last moment.
    pub to: SystemTime,
}

/// Days that a certificate is good for, at most: a century.
pub const MAX_DAYS: u32 = 36_500;

impl Validity {
    /// From now on, for so many days, of which [`MAX_DAYS`] count; other hosts' clocks may be an hour
    /// behind.
    pub fn days(days: u32) -> Self {
        let now = SystemTime::now();
        Validity {
            from: now - Duration::from_secs(3600),
            to: now + Duration::from_secs(86_400) * days.min(MAX_DAYS),
        }
    }
}

/// Why there is no certificate.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// Not a name for a host.
    #[error("\"{0}\" is neither an IP address nor a DNS name")]
    Name(String),
    /// The authority's files are none.
    #[error("the authority's certificate or key cannot be used: {0}")]
    Authority(rcgen::Error),
    /// The authority's time is over.
    #[error("the authority expired on {0}; make another one, and certificates of it for all hosts")]
    Expired(Expiry),
    /// Something failed.
    #[error("cannot make a certificate: {0}")]
    Make(#[from] rcgen::Error),
}

/// An authority that signs hosts' certificates.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    expiry: Expiry,
}

impl Authority {
    /// Makes one.
    pub fn generate(validity: Validity) -> Result<Pair, PkiError> {
        let mut params = params("FreeFlow hosts", validity);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate()?;
        let cert = params.self_signed(&key)?;
        Ok(Pair {
            cert: cert.pem(),
            key: key.serialize_pem(),
        })
    }

    /// One that was made before, of its certificate and key in PEM.
    pub fn load(cert: &str, key: &str) -> Result<Self, PkiError> {
        let key = KeyPair::from_pem(key).map_err(PkiError::Authority)?;
        let issuer = Issuer::from_ca_cert_pem(cert, key).map_err(PkiError::Authority)?;
        let der = CertificateDer::from_pem_slice(cert.as_bytes()).ok();
        let expiry = der.as_ref().and_then(Expiry::of);
        let expiry = expiry.ok_or(PkiError::Authority(rcgen::Error::CouldNotParseCertificate))?;
        Ok(Authority { issuer, expiry })
    }

    /// A certificate for a host, whose names are addresses in the network between hosts or DNS
    /// names. It is not good for longer than the authority is.
    pub fn issue(&self, names: &[&str], mut validity: Validity) -> Result<Pair, PkiError> {
        let last = SystemTime::UNIX_EPOCH + self.expiry.left(SystemTime::UNIX_EPOCH);
        if last <= validity.from {
            return Err(PkiError::Expired(self.expiry));
        }
        validity.to = validity.to.min(last);
        let mut params = params(names.first().copied().unwrap_or_default(), validity);
        for &name in names {
            params.subject_alt_names.push(match name.parse::<IpAddr>() {
                Ok(ip) => SanType::IpAddress(ip),
                Err(_) => {
                    let refused = |_| PkiError::Name(name.to_owned());
                    rustls::pki_types::DnsName::try_from(name).map_err(|_| refused(()))?;
                    SanType::DnsName(name.try_into().map_err(|_| refused(()))?)
                }
            });
        }
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        let key = KeyPair::generate()?;
        let cert = params.signed_by(&key, &self.issuer)?;
        Ok(Pair {
            cert: cert.pem(),
            key: key.serialize_pem(),
        })
    }
}

fn params(name: &str, validity: Validity) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.not_before = validity.from.into();
    params.not_after = validity.to.into();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params
}
