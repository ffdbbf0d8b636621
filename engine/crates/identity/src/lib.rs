//! Who is at the other end, and what may it do: certificates, roles, calls, TLS configurations.
//!
//! A certificate names a cluster, a role and a member ([`Peer`]); [`allowed`] is the table of `docs/certificates.md`; [`Tls`]
//! holds the configurations of rustls and follows its files. Knows nothing about sockets: `driver` and `admin` run the
//! handshakes. [`ca`] is a development certificate authority.

pub mod ca;
mod call;
mod peer;
mod tls;

pub use call::{Call, Caller, NotAllowed, allowed};
pub use peer::{Peer, PeerError, Role, peer_of};
pub use tls::{FollowerTls, Tls, TlsError, TlsFiles};
