//! What a certificate's subject says: cluster, role, name.

use std::{fmt, str::FromStr};

use pgtypes::ClusterId;
use x509_parser::{
    prelude::{FromDer, X509Certificate},
    x509::{AttributeTypeAndValue, X509Name},
};

/// Longest member name: a DNS label, which names of pods are.
const NAME_BYTES_MAX: usize = 63;

/// What a certificate's bearer is. One certificate has one role.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Role {
    /// Grants terms, fences, changes membership: the operator, or a person with its certificate.
    Operator,
    /// A safekeeper.
    Safekeeper,
    /// A compute agent: the writer or a replica.
    Compute,
    /// A page server.
    PageServer,
    /// A PostgreSQL standby, `pg_receivewal` and the like.
    Follower,
    /// A user of the database. May call nothing of the engine.
    Client,
}

impl Role {
    /// Every role, in the order of the table in `docs/certificates.md`.
    pub const ALL: [Role; 6] =
        [Role::Operator, Role::Safekeeper, Role::Compute, Role::PageServer, Role::Follower, Role::Client];

    /// The organisational unit in certificates.
    pub const fn as_str(self) -> &'static str {
        match self {
            Role::Operator => "operator",
            Role::Safekeeper => "safekeeper",
            Role::Compute => "compute",
            Role::PageServer => "pageserver",
            Role::Follower => "follower",
            Role::Client => "client",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Role {
    type Err = PeerError;

    fn from_str(text: &str) -> Result<Self, PeerError> {
        Role::ALL.into_iter().find(|role| role.as_str() == text).ok_or(PeerError::UnknownRole)
    }
}

/// Whom a certificate names.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Peer {
    /// Organisation: the lakebase that it belongs to.
    pub cluster: ClusterId,
    /// Organisational unit.
    pub role: Role,
    /// Common name: which of them. Letters, digits, `.`, `_`, `-`; at most 63.
    pub name: String,
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} of {}", self.role, self.name, self.cluster)
    }
}

/// Why a certificate names nobody. Its issuer's fault.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PeerError {
    /// Not X.509 in DER.
    #[error("certificate: not a valid X.509 certificate")]
    NotACertificate,
    /// The subject lacks a part, or has it twice.
    #[error("certificate: subject must have exactly one {0}")]
    Subject(&'static str),
    /// The organisation is not a cluster's UUID.
    #[error("certificate: organisation is not the UUID of a cluster")]
    BadCluster,
    /// The organisational unit is none of the roles.
    #[error("certificate: organisational unit is none of operator, safekeeper, compute, pageserver, follower, client")]
    UnknownRole,
    /// The common name is empty, too long or has characters that names may not have.
    #[error("certificate: common name must be 1 to 63 letters, digits, '.', '_' or '-'")]
    BadName,
}

/// Whether `name` may name a member: also safe as a file name and in logs.
pub(crate) fn is_name(name: &str) -> bool {
    (1..=NAME_BYTES_MAX).contains(&name.len())
        && name.bytes().all(|c| c.is_ascii_alphanumeric() || matches!(c, b'.' | b'_' | b'-'))
        && !name.starts_with('.')
}

/// Whom the certificate `der` names. Does not verify it: the handshake did.
///
/// # Errors
/// See [`PeerError`].
pub fn peer_of(der: &[u8]) -> Result<Peer, PeerError> {
    let (rest, certificate) = X509Certificate::from_der(der).map_err(|_| PeerError::NotACertificate)?;
    if !rest.is_empty() {
        return Err(PeerError::NotACertificate);
    }
    let subject = certificate.subject();
    let cluster = cluster_of(subject)?;
    let role = only(subject.iter_organizational_unit(), "organisational unit (OU)")?.parse()?;
    let name = only(subject.iter_common_name(), "common name (CN)")?;
    if !is_name(name) {
        return Err(PeerError::BadName);
    }
    Ok(Peer { cluster, role, name: name.to_owned() })
}

pub(crate) fn cluster_of(subject: &X509Name<'_>) -> Result<ClusterId, PeerError> {
    only(subject.iter_organization(), "organisation (O)")?.parse().map_err(|_| PeerError::BadCluster)
}

fn only<'a>(
    mut values: impl Iterator<Item = &'a AttributeTypeAndValue<'a>>,
    what: &'static str,
) -> Result<&'a str, PeerError> {
    match (values.next(), values.next()) {
        (Some(value), None) => value.as_str().map_err(|_| PeerError::Subject(what)),
        _ => Err(PeerError::Subject(what)),
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, DnType, KeyPair};

    use super::*;

    fn certificate(subject: &[(DnType, &str)]) -> Vec<u8> {
        let mut parameters = CertificateParams::default();
        parameters.distinguished_name = rcgen::DistinguishedName::new();
        for (kind, value) in subject {
            parameters.distinguished_name.push(kind.clone(), *value);
        }
        parameters.self_signed(&KeyPair::generate().unwrap()).unwrap().der().to_vec()
    }

    const CLUSTER: &str = "00010203-0405-0607-0809-0a0b0c0dfeff";

    #[test]
    fn subject_names_cluster_role_and_member() {
        for role in Role::ALL {
            let der = certificate(&[
                (DnType::OrganizationName, CLUSTER),
                (DnType::OrganizationalUnitName, role.as_str()),
                (DnType::CommonName, "sk-0.zone_a"),
            ]);
            let expected = Peer { cluster: CLUSTER.parse().unwrap(), role, name: "sk-0.zone_a".to_owned() };
            assert_eq!(Ok(expected), peer_of(&der));
        }
    }

    #[test]
    fn subject_with_a_missing_or_bad_part_names_nobody() {
        let long = "x".repeat(64);
        let (o, ou, cn) = (DnType::OrganizationName, DnType::OrganizationalUnitName, DnType::CommonName);
        for (organisation, unit, name, expected) in [
            ("acme", "client", "a", PeerError::BadCluster),
            (CLUSTER, "root", "a", PeerError::UnknownRole),
            (CLUSTER, "Operator", "a", PeerError::UnknownRole),
            (CLUSTER, "client", "a b", PeerError::BadName),
            (CLUSTER, "client", "../a", PeerError::BadName),
            (CLUSTER, "client", "a\nb", PeerError::BadName),
            (CLUSTER, "client", &long, PeerError::BadName),
        ] {
            let der = certificate(&[(o.clone(), organisation), (ou.clone(), unit), (cn.clone(), name)]);
            assert_eq!(Err(expected), peer_of(&der), "{organisation} {unit} {name}");
        }
        assert_eq!(
            Err(PeerError::Subject("organisational unit (OU)")),
            peer_of(&certificate(&[(o.clone(), CLUSTER), (cn, "a")]))
        );
        assert_eq!(Err(PeerError::Subject("organisation (O)")), peer_of(&certificate(&[])));
        assert_eq!(Err(PeerError::NotACertificate), peer_of(b"-----BEGIN"));
    }
}
