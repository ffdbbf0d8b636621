//! TLS configurations that follow their files.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock, Weak},
    thread,
    time::Duration,
};

use pgtypes::ClusterId;
use rustls::{
    ClientConfig, RootCertStore, ServerConfig, SupportedProtocolVersion,
    client::Resumption,
    crypto::{CryptoProvider, ring},
    server::{NoServerSessionStorage, WebPkiClientVerifier},
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use sha2::{Digest, Sha256, Sha384, Sha512};
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::{Peer, PeerError, Role, peer_of};

/// How often the files are looked at. A rotation may take this long to show.
const POLL_INTERVAL: Duration = Duration::from_secs(1);

const ENGINE_VERSIONS: &[&SupportedProtocolVersion] = &[&rustls::version::TLS13];
/// libpq of old distributions speaks TLS 1.2 only.
const FOLLOWER_VERSIONS: &[&SupportedProtocolVersion] = &[&rustls::version::TLS13, &rustls::version::TLS12];

/// Where the PEM files are.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TlsFiles {
    /// Certificates of the authorities that peers are verified with.
    pub ca: PathBuf,
    /// Own certificate, then the intermediate ones if there are any.
    pub certificate: PathBuf,
    /// Private key of the certificate.
    pub key: PathBuf,
}

/// The files cannot be used. The user's fault; the text names the file.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("{}: {source}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file is not PEM, or holds none of what it should.
    #[error("{}: {reason}", path.display())]
    Pem {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Certificate and key do not match, or the authority's certificate is unusable.
    #[error("{}, {}, {}: do not fit together: {reason}", files.ca.display(), files.certificate.display(), files.key.display())]
    Misfit {
        /// Which.
        files: TlsFiles,
        /// Why.
        reason: String,
    },
    /// Our own certificate names another than this process.
    #[error("{}: it names {own}; wanted is {wanted}", path.display())]
    NotOurs {
        /// Which.
        path: PathBuf,
        /// Whom it names.
        own: Peer,
        /// Whom it should name.
        wanted: String,
    },
    /// Our own certificate names nobody.
    #[error("{}: {source}", path.display())]
    Own {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        source: PeerError,
    },
    /// The watcher could not be started.
    #[error("cannot start the thread that watches TLS files: {0}")]
    Thread(io::Error),
}

struct Configurations {
    server: Arc<ServerConfig>,
    client: Arc<ClientConfig>,
    follower: FollowerTls,
    own: Arc<Peer>,
}

/// What the PostgreSQL port needs, of one version of the files.
#[derive(Clone)]
pub struct FollowerTls {
    /// TLS 1.2 and 1.3; client certificates are verified but optional (SCRAM otherwise).
    pub config: Arc<ServerConfig>,
    /// Hash of the certificate that the port shows, for SCRAM's channel binding (`tls-server-end-point`, RFC 5929);
    /// `None` when its signature has no hash function of its own.
    pub certificate_hash: Option<Arc<[u8]>>,
}

struct Shared {
    files: TlsFiles,
    current: RwLock<Configurations>,
}

/// The current TLS configurations. Cheap to clone; a thread re-reads the files while a clone exists.
#[derive(Clone)]
pub struct Tls(Arc<Shared>);

impl std::fmt::Debug for Tls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Tls").field(&self.0.files).finish()
    }
}

impl Tls {
    /// Reads the files and starts to follow them: when one changes, all are read again within a second. Files that
    /// cannot be used then are logged once, and the configurations stay as they are.
    ///
    /// # Errors
    /// The user's fault: see [`TlsError`].
    pub fn load(files: TlsFiles) -> Result<Tls, TlsError> {
        Tls::load_polled(files, POLL_INTERVAL)
    }

    fn load_polled(files: TlsFiles, interval: Duration) -> Result<Tls, TlsError> {
        // Before reading, so that a change in between is seen as one.
        let seen = Stamp::of(&files);
        let current = RwLock::new(read(&files)?);
        let tls = Tls(Arc::new(Shared { files, current }));
        let watched = Arc::downgrade(&tls.0);
        thread::Builder::new()
            .name("tls-files".to_owned())
            .spawn(move || watch(&watched, seen, interval))
            .map_err(TlsError::Thread)?;
        Ok(tls)
    }

    /// Checks that our own certificate is one of `role` (and of `cluster`, where the process serves only one), so that
    /// a wrong one is found at start and not by peers that refuse it.
    ///
    /// # Errors
    /// [`TlsError::NotOurs`].
    pub fn check_own(&self, role: Role, cluster: Option<ClusterId>) -> Result<(), TlsError> {
        let own = self.own();
        if own.role == role && cluster.is_none_or(|cluster| own.cluster == cluster) {
            return Ok(());
        }
        let of = cluster.map(|cluster| format!(" of {cluster}")).unwrap_or_default();
        Err(TlsError::NotOurs {
            path: self.0.files.certificate.clone(),
            own: (*own).clone(),
            wanted: format!("a certificate with role {role}{of}"),
        })
    }

    /// For ports of the engine: TLS 1.3, client certificates required.
    pub fn server_config(&self) -> Arc<ServerConfig> {
        self.with(|current| current.server.clone())
    }

    /// For connections to ports of the engine: TLS 1.3, with our certificate.
    pub fn client_config(&self) -> Arc<ClientConfig> {
        self.with(|current| current.client.clone())
    }

    /// For the PostgreSQL port.
    pub fn follower(&self) -> FollowerTls {
        self.with(|current| current.follower.clone())
    }

    /// Whom our own certificate names: the cluster and role of this process.
    pub fn own(&self) -> Arc<Peer> {
        self.with(|current| current.own.clone())
    }

    fn with<T>(&self, read: impl FnOnce(&Configurations) -> T) -> T {
        // A poisoned lock still holds whole configurations: they are replaced by one assignment.
        read(&self.0.current.read().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Tells versions of the three files apart. The inode is part of it: rotated secrets of Kubernetes are swapped
/// symbolic links whose modification times may be equal.
#[derive(PartialEq, Eq)]
struct Stamp([Option<FileStamp>; 3]);

#[derive(PartialEq, Eq)]
struct FileStamp {
    file: (u64, u64),
    modified: (i64, i64),
    length: u64,
}

impl Stamp {
    fn of(files: &TlsFiles) -> Stamp {
        Stamp([&files.ca, &files.certificate, &files.key].map(|path| {
            let data = fs::metadata(path).ok()?;
            Some(FileStamp {
                file: (data.dev(), data.ino()),
                modified: (data.mtime(), data.mtime_nsec()),
                length: data.len(),
            })
        }))
    }
}

fn watch(watched: &Weak<Shared>, mut seen: Stamp, interval: Duration) {
    loop {
        thread::sleep(interval);
        let Some(shared) = watched.upgrade() else { return };
        match shared.look(&mut seen) {
            Ok(Look::Unchanged) => {}
            Ok(Look::Replaced) => {
                tracing::info!(certificate = %shared.files.certificate.display(), "TLS files changed and were read again");
            }
            Err(error) => {
                tracing::error!(%error, "TLS files changed but cannot be used; the earlier ones stay in use");
            }
        }
    }
}

/// What a look at the files found.
#[derive(PartialEq, Eq, Debug)]
enum Look {
    Unchanged,
    Replaced,
}

impl Shared {
    /// Reads the files when they are not those that were `seen`. An error is returned once for each change.
    fn look(&self, seen: &mut Stamp) -> Result<Look, TlsError> {
        let stamp = Stamp::of(&self.files);
        if stamp == *seen {
            return Ok(Look::Unchanged);
        }
        *seen = stamp;
        let configurations = read(&self.files)?;
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = configurations;
        Ok(Look::Replaced)
    }
}

fn provider() -> Arc<CryptoProvider> {
    let mut provider = ring::default_provider();
    // First choice of a TLS 1.3 handshake: AES-128-GCM needs a quarter less time than the default's AES-256-GCM.
    provider.cipher_suites.sort_by_key(|suite| suite.suite() != rustls::CipherSuite::TLS13_AES_128_GCM_SHA256);
    Arc::new(provider)
}

fn read(files: &TlsFiles) -> Result<Configurations, TlsError> {
    let roots = Arc::new(read_roots(&files.ca)?);
    let chain = read_certificates(&files.certificate)?;
    let key = PrivateKeyDer::from_pem_slice(&read_file(&files.key)?)
        .map_err(|error| TlsError::Pem { path: files.key.clone(), reason: format!("no private key: {error}") })?;
    let own = peer_of(&chain[0]).map_err(|source| TlsError::Own { path: files.certificate.clone(), source })?;

    let misfit = |error: &dyn std::error::Error| TlsError::Misfit { files: files.clone(), reason: error.to_string() };
    let provider = provider();
    let verifier = || WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone());
    let server_config =
        |versions: &'static [&'static SupportedProtocolVersion], verifier| -> Result<Arc<ServerConfig>, TlsError> {
            let mut config = ServerConfig::builder_with_provider(provider.clone())
                .with_protocol_versions(versions)
                .map_err(|error| misfit(&error))?
                .with_client_cert_verifier(verifier)
                .with_single_cert(chain.clone(), key.clone_key())
                .map_err(|error| misfit(&error))?;
            // Connections are few and long, and a resumed session would outlive a removed authority.
            config.session_storage = Arc::new(NoServerSessionStorage {});
            config.send_tls13_tickets = 0;
            Ok(Arc::new(config))
        };
    let required = verifier().build().map_err(|error| misfit(&error))?;
    let optional = verifier().allow_unauthenticated().build().map_err(|error| misfit(&error))?;
    let server = server_config(ENGINE_VERSIONS, required)?;
    let follower = FollowerTls {
        config: server_config(FOLLOWER_VERSIONS, optional)?,
        certificate_hash: end_point_hash(&chain[0]).map(Arc::from),
    };

    let mut client = ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(ENGINE_VERSIONS)
        .map_err(|error| misfit(&error))?
        .with_root_certificates(roots.clone())
        .with_client_auth_cert(chain.clone(), key.clone_key())
        .map_err(|error| misfit(&error))?;
    client.resumption = Resumption::disabled();
    Ok(Configurations { server, client: Arc::new(client), follower, own: Arc::new(own) })
}

/// The hash that the certificate is signed with, of the certificate; SHA-256 in place of MD5 and SHA-1.
fn end_point_hash(der: &[u8]) -> Option<Vec<u8>> {
    let (_, certificate) = X509Certificate::from_der(der).ok()?;
    match certificate.signature_algorithm.algorithm.to_id_string().as_str() {
        // md5, sha1 and sha256 WithRSAEncryption; ecdsa-with-SHA1 and -SHA256.
        "1.2.840.113549.1.1.4"
        | "1.2.840.113549.1.1.5"
        | "1.2.840.113549.1.1.11"
        | "1.2.840.10045.4.1"
        | "1.2.840.10045.4.3.2" => Some(Sha256::digest(der).to_vec()),
        // The same with SHA-384 and SHA-512.
        "1.2.840.113549.1.1.12" | "1.2.840.10045.4.3.3" => Some(Sha384::digest(der).to_vec()),
        "1.2.840.113549.1.1.13" | "1.2.840.10045.4.3.4" => Some(Sha512::digest(der).to_vec()),
        _ => None,
    }
}

fn read_file(path: &Path) -> Result<Vec<u8>, TlsError> {
    fs::read(path).map_err(|source| TlsError::Read { path: path.to_owned(), source })
}

/// At least one certificate.
fn read_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let malformed = |reason: String| TlsError::Pem { path: path.to_owned(), reason };
    let certificates = CertificateDer::pem_slice_iter(&read_file(path)?)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| malformed(format!("not PEM: {error}")))?;
    if certificates.is_empty() { Err(malformed("no certificate".to_owned())) } else { Ok(certificates) }
}

fn read_roots(path: &Path) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in read_certificates(path)? {
        roots
            .add(certificate)
            .map_err(|error| TlsError::Pem { path: path.to_owned(), reason: format!("no authority: {error}") })?;
    }
    Ok(roots)
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        time::Instant,
    };

    use rustls::{ClientConnection, Connection, ServerConnection};

    use super::*;
    use crate::ca;

    const CLUSTER: ClusterId = ClusterId([7; 16]);

    /// A directory of its own that goes away with the test.
    struct Directory(PathBuf);

    impl Directory {
        fn new() -> Self {
            let path = std::env::temp_dir().join(format!("identity-{}", uuid::Uuid::new_v4()));
            fs::create_dir(&path).unwrap();
            Self(path)
        }

        fn files(&self, name: &str) -> TlsFiles {
            let file = |name: String| self.0.join(name);
            TlsFiles {
                ca: file("ca.pem".to_owned()),
                certificate: file(format!("{name}.pem")),
                key: file(format!("{name}.key")),
            }
        }

        fn with_members(names: &[(Role, &str)]) -> Self {
            let directory = Self::new();
            ca::init(&directory.0, CLUSTER).unwrap();
            for (role, name) in names {
                ca::issue(&directory.0, *role, name, &["localhost".to_owned(), "127.0.0.1".to_owned()]).unwrap();
            }
            directory
        }

        fn load(&self, name: &str) -> Tls {
            Tls::load_polled(self.files(name), Duration::from_millis(5)).unwrap()
        }
    }

    impl Drop for Directory {
        fn drop(&mut self) {
            // A test that failed already tells more than a directory left behind.
            let _left_behind = fs::remove_dir_all(&self.0);
        }
    }

    /// Both sides of a handshake in memory; the certificates that each saw of the other.
    fn handshake(
        client: Arc<ClientConfig>,
        server: Arc<ServerConfig>,
        name: &str,
    ) -> Result<[Option<Peer>; 2], rustls::Error> {
        let mut client: Connection = ClientConnection::new(client, name.to_owned().try_into().unwrap()).unwrap().into();
        let mut server: Connection = ServerConnection::new(server).unwrap().into();
        let transfer = |from: &mut Connection, to: &mut Connection| {
            let mut bytes = Vec::new();
            while from.wants_write() {
                from.write_tls(&mut bytes).unwrap();
            }
            let mut rest = &bytes[..];
            while !rest.is_empty() {
                to.read_tls(&mut rest).unwrap();
                to.process_new_packets()?;
            }
            Ok::<(), rustls::Error>(())
        };
        for _ in 0..4 {
            transfer(&mut client, &mut server)?;
            transfer(&mut server, &mut client)?;
        }
        assert!(!client.is_handshaking() && !server.is_handshaking());
        client.writer().write_all(b"hello").unwrap();
        transfer(&mut client, &mut server)?;
        let mut text = [0; 5];
        server.reader().read_exact(&mut text).unwrap();
        assert_eq!(b"hello", &text);
        let seen = |side: &Connection| side.peer_certificates().map(|chain| peer_of(&chain[0]).unwrap());
        Ok([seen(&client), seen(&server)])
    }

    #[test]
    fn both_sides_learn_who_the_other_is() {
        let directory = Directory::with_members(&[(Role::Safekeeper, "sk-1"), (Role::Compute, "pg-1")]);
        let (server, client) = (directory.load("sk-1"), directory.load("pg-1"));
        for host in ["localhost", "127.0.0.1"] {
            let seen = handshake(client.client_config(), server.server_config(), host).unwrap();
            assert_eq!([Some((*server.own()).clone()), Some((*client.own()).clone())], seen);
        }
        assert_eq!(Role::Compute, client.own().role);
    }

    #[test]
    fn server_certificate_for_another_host_is_refused() {
        let directory = Directory::with_members(&[(Role::Safekeeper, "sk-1"), (Role::Compute, "pg-1")]);
        let (server, client) = (directory.load("sk-1"), directory.load("pg-1"));
        assert!(handshake(client.client_config(), server.server_config(), "example.com").is_err());
    }

    #[test]
    fn certificate_of_another_authority_is_refused_by_either_side() {
        let ours = Directory::with_members(&[(Role::Safekeeper, "sk-1")]);
        let theirs = Directory::with_members(&[(Role::Compute, "pg-1")]);
        let mut mixed = theirs.files("pg-1");
        assert!(
            handshake(theirs.load("pg-1").client_config(), ours.load("sk-1").server_config(), "localhost").is_err()
        );
        // Now the client trusts the server, but not the other way round.
        mixed.ca = ours.0.join("ca.pem");
        let client = Tls::load(mixed).unwrap();
        assert!(handshake(client.client_config(), ours.load("sk-1").server_config(), "localhost").is_err());
    }

    #[test]
    fn client_without_certificate_is_refused_by_engine_ports_and_let_through_to_the_password_by_the_follower_port() {
        let directory = Directory::with_members(&[(Role::Safekeeper, "sk-1")]);
        let server = directory.load("sk-1");
        for version in [&rustls::version::TLS12, &rustls::version::TLS13] {
            let bare = || {
                let config =
                    ClientConfig::builder_with_provider(provider()).with_protocol_versions(&[version]).unwrap();
                let roots = read_roots(&directory.0.join("ca.pem")).unwrap();
                Arc::new(config.with_root_certificates(roots).with_no_client_auth())
            };
            assert!(handshake(bare(), server.server_config(), "localhost").is_err());
            let [own, client] = handshake(bare(), server.follower().config, "localhost").unwrap();
            assert_eq!((Some((*server.own()).clone()), None), (own, client));
        }
    }

    /// P-256 certificates are signed with SHA-256; the hash is over the whole certificate.
    #[test]
    fn channel_binding_hashes_the_certificate_that_is_shown() {
        let directory = Directory::with_members(&[(Role::Safekeeper, "sk-1")]);
        let der = CertificateDer::from_pem_file(directory.0.join("sk-1.pem")).unwrap();
        let hash = directory.load("sk-1").follower().certificate_hash.unwrap();
        assert_eq!(Sha256::digest(&der).as_slice(), &*hash);
    }

    /// Waits for `condition`, which the watcher fulfils within some of its 5 ms intervals.
    fn eventually(condition: impl Fn() -> bool) {
        let start = Instant::now();
        while !condition() {
            assert!(start.elapsed() < Duration::from_secs(20), "the files were not read again");
            thread::yield_now();
        }
    }

    #[test]
    fn changed_files_are_read_again_and_broken_ones_are_not_used() {
        let directory = Directory::with_members(&[(Role::Safekeeper, "sk-1")]);
        // The thread does not look within the test: the test looks itself.
        let tls = Tls::load_polled(directory.files("sk-1"), Duration::from_secs(3600)).unwrap();
        let mut seen = Stamp::of(&directory.files("sk-1"));
        let before = tls.server_config();
        assert_eq!(Look::Unchanged, tls.0.look(&mut seen).unwrap());

        // A key that does not fit: half of a rotation.
        let key = fs::read(directory.0.join("sk-1.key")).unwrap();
        ca::issue(&directory.0, Role::Safekeeper, "other", &[]).unwrap();
        fs::rename(directory.0.join("other.key"), directory.0.join("sk-1.key")).unwrap();
        assert!(matches!(tls.0.look(&mut seen), Err(TlsError::Misfit { .. })));
        // The same broken files are not reported again.
        assert_eq!(Look::Unchanged, tls.0.look(&mut seen).unwrap());
        fs::write(directory.0.join("sk-1.pem"), b"no certificate").unwrap();
        assert!(matches!(tls.0.look(&mut seen), Err(TlsError::Pem { .. })));
        assert!(Arc::ptr_eq(&before, &tls.server_config()));

        // The rotation ends with another role, so that the test can see it.
        fs::write(directory.0.join("sk-1.key"), key).unwrap();
        ca::issue(&directory.0, Role::Compute, "sk-1", &[]).unwrap();
        assert_eq!(Look::Replaced, tls.0.look(&mut seen).unwrap());
        assert_eq!(Role::Compute, tls.own().role);
        assert!(!Arc::ptr_eq(&before, &tls.server_config()));
    }

    #[test]
    fn own_certificate_is_of_the_wanted_role_and_cluster() {
        let directory = Directory::with_members(&[(Role::Safekeeper, "sk-1")]);
        let tls = directory.load("sk-1");
        assert!(tls.check_own(Role::Safekeeper, None).is_ok());
        assert!(tls.check_own(Role::Safekeeper, Some(CLUSTER)).is_ok());
        let error = tls.check_own(Role::Compute, None).unwrap_err().to_string();
        assert!(error.contains("sk-1.pem") && error.contains("role compute"), "{error}");
        let other = ClusterId([8; 16]);
        let error = tls.check_own(Role::Safekeeper, Some(other)).unwrap_err().to_string();
        assert!(error.contains(&other.to_string()), "{error}");
    }

    #[test]
    fn watcher_notices_a_change_by_itself() {
        let directory = Directory::with_members(&[(Role::Safekeeper, "sk-1")]);
        let tls = directory.load("sk-1");
        ca::issue(&directory.0, Role::Compute, "sk-1", &[]).unwrap();
        eventually(|| tls.own().role == Role::Compute);
    }

    #[test]
    fn watcher_ends_with_the_last_user() {
        let directory = Directory::with_members(&[(Role::Safekeeper, "sk-1")]);
        let tls = directory.load("sk-1");
        let watched = Arc::downgrade(&tls.0);
        drop(tls);
        eventually(|| watched.upgrade().is_none());
    }

    #[test]
    fn unusable_files_are_named() {
        let directory = Directory::with_members(&[(Role::Safekeeper, "sk-1")]);
        let missing = Tls::load(directory.files("sk-2")).unwrap_err().to_string();
        assert!(missing.contains("sk-2.pem"), "{missing}");
        let mut files = directory.files("sk-1");
        files.key = files.certificate.clone();
        let no_key = Tls::load(files).unwrap_err().to_string();
        assert!(no_key.contains("no private key"), "{no_key}");
    }
}
