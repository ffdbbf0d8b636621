//! A development certificate authority: files in one directory, `ca.pem`, `ca.key`, and a pair for each member.
//!
//! Production has its own issuer (cert-manager or a company's); this one is for trying, tests and single machines.

use std::{
    fs::{self, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use pgtypes::ClusterId;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use rustls_pki_types::{CertificateDer, pem::PemObject};
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::{
    PeerError, Role, TlsFiles,
    peer::{cluster_of, is_name},
};

const DAY: Duration = Duration::from_secs(86_400);
/// How long the authority is valid.
const AUTHORITY_DAYS: u32 = 3650;
/// How long a member's certificate is valid.
const MEMBER_DAYS: u32 = 365;

/// The authority cannot do this; the text names the file. The user's fault, or the file system's.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// A file cannot be read or written.
    #[error("{}: {source}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A new authority would make all certificates of the one that is there worthless.
    #[error("{}: there is an authority already", path.display())]
    Exists {
        /// Its certificate or key.
        path: PathBuf,
    },
    /// A name that certificates may not have.
    #[error("name {0:?}: 1 to 63 letters, digits, '.', '_' or '-', and not \"ca\"")]
    BadName(String),
    /// The certificate or key of the authority, or a host name, is unusable.
    #[error("certificate: {0}")]
    Rcgen(#[from] rcgen::Error),
    /// The authority's certificate does not name a cluster.
    #[error("{}: {source}", path.display())]
    Authority {
        /// Its certificate.
        path: PathBuf,
        /// What is wrong.
        source: PeerError,
    },
}

/// Creates `dir` if need be, and in it the authority of `cluster`: `ca.pem` and `ca.key` (mode 0600).
///
/// # Errors
/// [`CaError::Exists`] when there is one already; nothing is overwritten.
pub fn init(dir: &Path, cluster: ClusterId) -> Result<(), CaError> {
    fs::create_dir_all(dir).map_err(|source| CaError::File { path: dir.to_owned(), source })?;
    let (certificate_path, key_path) = (dir.join("ca.pem"), dir.join("ca.key"));
    for path in [&certificate_path, &key_path] {
        if path.exists() {
            return Err(CaError::Exists { path: path.clone() });
        }
    }
    let mut parameters = parameters(vec![], AUTHORITY_DAYS)?;
    parameters.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    parameters.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    parameters.distinguished_name.push(DnType::OrganizationName, cluster.to_string());
    parameters.distinguished_name.push(DnType::CommonName, "lakebase development authority");
    let key = KeyPair::generate()?;
    let certificate = parameters.self_signed(&key)?;
    replace(&key_path, key.serialize_pem().as_bytes(), 0o600)?;
    replace(&certificate_path, certificate.pem().as_bytes(), 0o644)
}

/// Issues a certificate of the authority in `dir`: `<name>.pem` and `<name>.key` (mode 0600), valid for server and
/// client use. `hosts` are the DNS names and IP addresses that servers are reached by; a pure client needs none. Files
/// of the same name are replaced: that is a renewal.
///
/// # Errors
/// See [`CaError`].
pub fn issue(dir: &Path, role: Role, name: &str, hosts: &[String]) -> Result<TlsFiles, CaError> {
    if !is_name(name) || name == "ca" {
        return Err(CaError::BadName(name.to_owned()));
    }
    let ca = dir.join("ca.pem");
    let read = |path: &Path| fs::read_to_string(path).map_err(|source| CaError::File { path: path.to_owned(), source });
    let authority_pem = read(&ca)?;
    let malformed = |source| CaError::Authority { path: ca.clone(), source };
    let authority_der =
        CertificateDer::from_pem_slice(authority_pem.as_bytes()).map_err(|_| malformed(PeerError::NotACertificate))?;
    let (_, authority) =
        X509Certificate::from_der(&authority_der).map_err(|_| malformed(PeerError::NotACertificate))?;
    let cluster = cluster_of(authority.subject()).map_err(malformed)?;
    let issuer = Issuer::from_ca_cert_der(&authority_der, KeyPair::from_pem(&read(&dir.join("ca.key"))?)?)?;

    let mut parameters = parameters(hosts.to_vec(), MEMBER_DAYS)?;
    parameters.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    parameters.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    parameters.use_authority_key_identifier_extension = true;
    parameters.distinguished_name.push(DnType::OrganizationName, cluster.to_string());
    parameters.distinguished_name.push(DnType::OrganizationalUnitName, role.as_str());
    parameters.distinguished_name.push(DnType::CommonName, name);
    let key = KeyPair::generate()?;
    let certificate = parameters.signed_by(&key, &issuer)?;

    let files = TlsFiles { ca, certificate: dir.join(format!("{name}.pem")), key: dir.join(format!("{name}.key")) };
    replace(&files.key, key.serialize_pem().as_bytes(), 0o600)?;
    replace(&files.certificate, certificate.pem().as_bytes(), 0o644)?;
    Ok(files)
}

/// Valid from a day ago (clocks of two machines differ) for `days`.
fn parameters(hosts: Vec<String>, days: u32) -> Result<CertificateParams, rcgen::Error> {
    let mut parameters = CertificateParams::new(hosts)?;
    // Before 1970 the clock is wrong anyway; the certificate is then refused as expired, which says so.
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(DAY);
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    parameters.not_before = epoch + now.saturating_sub(DAY);
    parameters.not_after = epoch + now + DAY * days;
    parameters.distinguished_name = DistinguishedName::new();
    Ok(parameters)
}

/// Replaces a file at once: a process that re-reads it sees the old or the new one, never half of it.
fn replace(path: &Path, contents: &[u8], mode: u32) -> Result<(), CaError> {
    let temporary = path.with_added_extension("new");
    let written = (|| {
        match fs::remove_file(&temporary) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        // `create_new` with the mode: a private key is never readable by others, not even for a moment.
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&temporary)?;
        file.write_all(contents)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    })();
    written.map_err(|source| CaError::File { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::peer_of;

    fn directory() -> PathBuf {
        std::env::temp_dir().join(format!("identity-ca-{}", uuid::Uuid::new_v4()))
    }

    #[test]
    fn issued_certificates_name_cluster_role_and_member_and_keys_are_private() {
        let dir = directory();
        let cluster = ClusterId([9; 16]);
        init(&dir, cluster).unwrap();
        let files = issue(&dir, Role::Safekeeper, "sk-1", &["10.0.0.1".to_owned(), "sk-1.local".to_owned()]).unwrap();

        let der = CertificateDer::from_pem_file(&files.certificate).unwrap();
        let peer = peer_of(&der).unwrap();
        assert_eq!((cluster, Role::Safekeeper, "sk-1"), (peer.cluster, peer.role, peer.name.as_str()));
        for key in [dir.join("ca.key"), files.key] {
            assert_eq!(0o600, fs::metadata(key).unwrap().permissions().mode() & 0o777);
        }
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn authority_is_never_overwritten() {
        let dir = directory();
        init(&dir, ClusterId([9; 16])).unwrap();
        let before = fs::read(dir.join("ca.pem")).unwrap();
        assert!(matches!(init(&dir, ClusterId([8; 16])), Err(CaError::Exists { .. })));
        assert_eq!(before, fs::read(dir.join("ca.pem")).unwrap());
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn name_that_would_leave_the_directory_or_replace_the_authority_is_refused() {
        let dir = directory();
        init(&dir, ClusterId([9; 16])).unwrap();
        for name in ["", "ca", "../x", "a/b", ".hidden", "a b"] {
            assert!(matches!(issue(&dir, Role::Client, name, &[]), Err(CaError::BadName(_))), "{name:?}");
        }
        fs::remove_dir_all(dir).unwrap();
    }
}
