//! SCRAM-SHA-256, the server's side (RFC 5802, RFC 7677; PostgreSQL's `auth-scram.c`).
//!
//! Knows no passwords: a [`Verifier`] is what `pg_authid` stores. For a user that does not exist the exchange runs over a
//! verifier made up from its name ([`Verifier::mock`]), so that strangers cannot tell which users there are.

use alloc::{format, string::String, vec::Vec};

use base64::{Engine, engine::general_purpose::STANDARD};
use hmac::{Hmac, KeyInit, Mac};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

/// Name of the mechanism.
pub const MECHANISM: &str = "SCRAM-SHA-256";
/// Name of the mechanism bound to the TLS channel.
pub const MECHANISM_PLUS: &str = "SCRAM-SHA-256-PLUS";
/// Random bytes in a server's nonce (`SCRAM_RAW_NONCE_LEN`).
pub const NONCE_BYTES: usize = 18;

/// PostgreSQL's default (`SCRAM_SHA_256_DEFAULT_ITERATIONS`), so that made-up verifiers look like real ones.
const DEFAULT_ITERATIONS: u32 = 4096;
const SALT_BYTES: usize = 16;
/// Longest message that is looked at (`PG_MAX_SASL_MESSAGE_LENGTH`).
const MESSAGE_BYTES_MAX: usize = 1024;

/// What is stored of a password.
#[derive(Clone, PartialEq, Eq)]
pub struct Verifier {
    iterations: u32,
    salt: Vec<u8>,
    stored_key: [u8; 32],
    server_key: [u8; 32],
    /// Belongs to a user that exists.
    genuine: bool,
}

/// The text is not a verifier of the form `SCRAM-SHA-256$iterations:salt$StoredKey:ServerKey`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("not a SCRAM-SHA-256 verifier: expected SCRAM-SHA-256$iterations:salt$StoredKey:ServerKey")]
pub struct ParseVerifierError;

/// Why the exchange failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ScramError {
    /// The client broke the protocol: what it did.
    #[error("malformed SCRAM message: {0}")]
    Malformed(&'static str),
    /// User or password is wrong; which of them is not told.
    #[error("password authentication failed")]
    WrongPassword,
    /// The client believes that the server does not offer channel binding, but it does: someone is in between.
    #[error("SCRAM channel binding negotiation error")]
    Downgrade,
    /// The client is bound to another TLS channel than this one.
    #[error("SCRAM channel binding check failed")]
    ChannelBinding,
}

// No secret in logs.
impl core::fmt::Debug for Verifier {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Verifier").field("iterations", &self.iterations).finish_non_exhaustive()
    }
}

impl core::str::FromStr for Verifier {
    type Err = ParseVerifierError;

    fn from_str(text: &str) -> Result<Self, ParseVerifierError> {
        let parse = || {
            let (parameters, keys) = text.strip_prefix("SCRAM-SHA-256$")?.split_once('$')?;
            let (iterations, salt) = parameters.split_once(':')?;
            let (stored_key, server_key) = keys.split_once(':')?;
            Some(Verifier {
                iterations: iterations.parse().ok().filter(|count| (1..=i32::MAX as u32).contains(count))?,
                salt: STANDARD.decode(salt).ok().filter(|salt| !salt.is_empty())?,
                stored_key: STANDARD.decode(stored_key).ok()?.try_into().ok()?,
                server_key: STANDARD.decode(server_key).ok()?.try_into().ok()?,
                genuine: true,
            })
        };
        parse().ok_or(ParseVerifierError)
    }
}

impl core::fmt::Display for Verifier {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let [salt, stored, server] =
            [&self.salt[..], &self.stored_key, &self.server_key].map(|bytes| STANDARD.encode(bytes));
        write!(f, "SCRAM-SHA-256${}:{salt}${stored}:{server}", self.iterations)
    }
}

impl Verifier {
    /// The verifier of a password. Passwords with characters outside ASCII must have gone through SASLprep.
    pub fn of_password(password: &str, salt: &[u8], iterations: u32) -> Self {
        let salted = salted_password(password, salt, iterations);
        let stored_key = Sha256::digest(hmac(&salted, &[b"Client Key"])).into();
        let server_key = hmac(&salted, &[b"Server Key"]);
        Verifier { iterations, salt: salt.to_vec(), stored_key, server_key, genuine: true }
    }

    /// A verifier for a user that does not exist: always the same for the same name and `secret` (of this process), and
    /// no password fits (`mock_scram_secret`).
    pub fn mock(user: &str, secret: &[u8; 32]) -> Self {
        let salt = hmac(secret, &[b"salt", user.as_bytes()])[..SALT_BYTES].to_vec();
        let key = |purpose: &[u8]| hmac(secret, &[purpose, user.as_bytes()]);
        let (stored_key, server_key) = (key(b"stored"), key(b"server"));
        Verifier { iterations: DEFAULT_ITERATIONS, salt, stored_key, server_key, genuine: false }
    }
}

/// What ties the exchange to the TLS channel (`tls-server-end-point`, RFC 5929): the hash of the server's certificate.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ChannelBinding<'a> {
    /// Not offered: no TLS, or no certificate to bind to.
    None,
    /// `SCRAM-SHA-256-PLUS` was offered with this hash.
    Offered(&'a [u8]),
}

/// An exchange that waits for the client's proof.
#[derive(Debug)]
pub struct Exchange {
    verifier: Verifier,
    /// `client-first-message-bare` and `server-first-message`.
    authenticated: String,
    /// Client's and server's nonce.
    nonce: String,
    /// What `c=` must hold.
    expected_binding: Vec<u8>,
}

/// Answers the client's first message with the challenge to send, and the exchange to finish. `nonce` must be fresh
/// random bytes; `mechanism` is what the client chose.
///
/// # Errors
/// See [`ScramError`].
pub fn start(
    mechanism: &str,
    client_first: &[u8],
    verifier: Verifier,
    nonce: &[u8; NONCE_BYTES],
    binding: ChannelBinding<'_>,
) -> Result<(Exchange, String), ScramError> {
    let message = text(client_first)?;
    // gs2-header: flag, authorization identity, then the bare message.
    let mut parts = message.splitn(3, ',');
    let (Some(flag), Some(identity), Some(bare)) = (parts.next(), parts.next(), parts.next()) else {
        return Err(ScramError::Malformed("header"));
    };
    let mut expected_binding = format!("{flag},{identity},").into_bytes();
    match (mechanism, flag, binding) {
        (MECHANISM, "n", _) | (MECHANISM, "y", ChannelBinding::None) => {}
        (MECHANISM, "y", ChannelBinding::Offered(_)) => return Err(ScramError::Downgrade),
        (MECHANISM_PLUS, "p=tls-server-end-point", ChannelBinding::Offered(hash)) => {
            expected_binding.extend_from_slice(hash);
        }
        _ => return Err(ScramError::Malformed("channel binding flag")),
    }
    if !identity.is_empty() {
        return Err(ScramError::Malformed("authorization identity"));
    }
    // The user name is the one of the startup packet; what stands here is ignored, as PostgreSQL does. `m=` would be a
    // mandatory extension.
    let mut attributes = bare.split(',');
    if !attributes.next().is_some_and(|name| name.starts_with("n=")) {
        return Err(ScramError::Malformed("user name"));
    }
    let client_nonce = attributes
        .next()
        .and_then(|attribute| attribute.strip_prefix("r="))
        .filter(|nonce| !nonce.is_empty() && nonce.bytes().all(|c| (0x21..=0x7E).contains(&c)))
        .ok_or(ScramError::Malformed("nonce"))?;

    let nonce = format!("{client_nonce}{}", STANDARD.encode(nonce));
    let challenge = format!("r={nonce},s={},i={}", STANDARD.encode(&verifier.salt), verifier.iterations);
    let authenticated = format!("{bare},{challenge}");
    Ok((Exchange { verifier, authenticated, nonce, expected_binding }, challenge))
}

impl Exchange {
    /// Checks the client's proof; returns the server's own to send.
    ///
    /// # Errors
    /// See [`ScramError`].
    pub fn finish(self, client_final: &[u8]) -> Result<String, ScramError> {
        let message = text(client_final)?;
        let (without_proof, proof) = message.rsplit_once(",p=").ok_or(ScramError::Malformed("proof"))?;
        let mut attributes = without_proof.split(',');
        let binding = attributes
            .next()
            .and_then(|attribute| STANDARD.decode(attribute.strip_prefix("c=")?).ok())
            .ok_or(ScramError::Malformed("channel binding"))?;
        let nonce = attributes.next().and_then(|attribute| attribute.strip_prefix("r="));
        let nonce = nonce.ok_or(ScramError::Malformed("nonce"))?;
        let proof: [u8; 32] = STANDARD
            .decode(proof)
            .ok()
            .and_then(|proof| proof.try_into().ok())
            .ok_or(ScramError::Malformed("proof"))?;
        if binding != self.expected_binding {
            return Err(ScramError::ChannelBinding);
        }
        if nonce != self.nonce {
            return Err(ScramError::Malformed("nonce"));
        }

        let authenticated: [&[u8]; 3] = [self.authenticated.as_bytes(), b",", without_proof.as_bytes()];
        let signature = hmac(&self.verifier.stored_key, &authenticated);
        let mut client_key = proof;
        for (byte, mask) in client_key.iter_mut().zip(signature) {
            *byte ^= mask;
        }
        let stored_key = Sha256::digest(client_key);
        // Both are evaluated always, so that the time tells nothing.
        let right = stored_key.as_slice().ct_eq(&self.verifier.stored_key);
        if bool::from(right & subtle::Choice::from(u8::from(self.verifier.genuine))) {
            Ok(format!("v={}", STANDARD.encode(hmac(&self.verifier.server_key, &authenticated))))
        } else {
            Err(ScramError::WrongPassword)
        }
    }
}

/// The mechanism and the first message in a `SASLInitialResponse`.
///
/// # Errors
/// [`ScramError::Malformed`].
pub fn initial_response(body: &[u8]) -> Result<(&str, &[u8]), ScramError> {
    const MALFORMED: ScramError = ScramError::Malformed("initial response");
    let end = body.iter().position(|byte| *byte == 0).ok_or(MALFORMED)?;
    let mechanism = core::str::from_utf8(&body[..end]).map_err(|_| MALFORMED)?;
    let (length, data) = body[end + 1..].split_first_chunk::<4>().ok_or(MALFORMED)?;
    if u32::from_be_bytes(*length) as usize != data.len() {
        return Err(MALFORMED);
    }
    Ok((mechanism, data))
}

fn text(message: &[u8]) -> Result<&str, ScramError> {
    if message.len() > MESSAGE_BYTES_MAX || message.contains(&0) {
        return Err(ScramError::Malformed("length"));
    }
    core::str::from_utf8(message).map_err(|_| ScramError::Malformed("encoding"))
}

fn hmac(key: &[u8], parts: &[&[u8]]) -> [u8; 32] {
    let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(key) else { unreachable!("HMAC takes keys of any length") };
    for part in parts {
        mac.update(part);
    }
    mac.finalize().into_bytes().into()
}

/// `Hi` of RFC 5802: PBKDF2 with one block.
fn salted_password(password: &str, salt: &[u8], iterations: u32) -> [u8; 32] {
    let mut last = hmac(password.as_bytes(), &[salt, &1u32.to_be_bytes()]);
    let mut result = last;
    for _ in 1..iterations {
        last = hmac(password.as_bytes(), &[&last]);
        for (byte, mask) in result.iter_mut().zip(last) {
            *byte ^= mask;
        }
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::{string::ToString, vec};

    const NONCE: [u8; NONCE_BYTES] = [7; NONCE_BYTES];

    /// The client's final message for a password (RFC 5802, section 3).
    fn client_final(password: &str, verifier: &Verifier, bare: &str, challenge: &str, binding: &[u8]) -> String {
        let salted = salted_password(password, &verifier.salt, verifier.iterations);
        let client_key = hmac(&salted, &[b"Client Key"]);
        let stored_key: [u8; 32] = Sha256::digest(client_key).into();
        let nonce = challenge.strip_prefix("r=").unwrap().split(',').next().unwrap();
        let without_proof = format!("c={},r={nonce}", STANDARD.encode(binding));
        let signature = hmac(&stored_key, &[format!("{bare},{challenge},{without_proof}").as_bytes()]);
        let proof: Vec<u8> = client_key.iter().zip(signature).map(|(a, b)| a ^ b).collect();
        format!("{without_proof},p={}", STANDARD.encode(proof))
    }

    fn verifier() -> Verifier {
        Verifier::of_password("pencil", &[1; 16], 4096)
    }

    /// The example of RFC 7677, section 3.
    #[test]
    fn example_of_the_standard() {
        let salt = STANDARD.decode("W22ZaJ0SNY7soEsUEjb6gQ==").unwrap();
        let verifier = Verifier::of_password("pencil", &salt, 4096);
        let bare = "n=user,r=rOprNGfwEbeRWgbNEkqO";
        let challenge =
            "r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096".to_string();
        let exchange = Exchange {
            verifier,
            authenticated: format!("{bare},{challenge}"),
            nonce: "rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0".to_string(),
            expected_binding: b"n,,".to_vec(),
        };
        let message = "c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,\
                       p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ=";
        let answer = exchange.finish(message.as_bytes());
        assert_eq!(Ok("v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=".to_string()), answer);
    }

    #[test]
    fn verifier_round_trips_in_the_form_of_pg_authid() {
        let text = verifier().to_string();
        assert!(text.starts_with("SCRAM-SHA-256$4096:AQEBAQEBAQEBAQEBAQEBAQ==$"), "{text}");
        assert_eq!(Ok(verifier()), text.parse());
        for malformed in [
            "",
            "md5abc",
            "SCRAM-SHA-256$0:AQ==$AQ==:AQ==",
            "SCRAM-SHA-256$4096:AQ==$AQ==:AQ==",
            "SCRAM-SHA-256$4096:$x:y",
            &text.replace("4096", "-1"),
            &text[..text.len() - 4],
        ] {
            assert_eq!(Err(ParseVerifierError), malformed.parse::<Verifier>(), "{malformed}");
        }
    }

    #[test]
    fn right_password_is_accepted_and_the_server_proves_itself() {
        for (mechanism, flag, offered, cbind) in [
            (MECHANISM, "n,,", ChannelBinding::None, &b""[..]),
            (MECHANISM, "y,,", ChannelBinding::None, b""),
            (MECHANISM, "n,,", ChannelBinding::Offered(b"hash"), b""),
            (MECHANISM_PLUS, "p=tls-server-end-point,,", ChannelBinding::Offered(b"hash"), b"hash"),
        ] {
            let first = format!("{flag}n=,r=abc");
            let (exchange, challenge) = start(mechanism, first.as_bytes(), verifier(), &NONCE, offered).unwrap();
            let binding = [flag.as_bytes(), cbind].concat();
            let last = client_final("pencil", &verifier(), "n=,r=abc", &challenge, &binding);
            assert!(exchange.finish(last.as_bytes()).unwrap().starts_with("v="), "{mechanism} {flag}");
        }
    }

    #[test]
    fn wrong_password_and_unknown_user_look_the_same() {
        let secret = [3; 32];
        let unknown = Verifier::mock("nobody", &secret);
        assert_eq!(unknown, Verifier::mock("nobody", &secret));
        assert_ne!(unknown, Verifier::mock("somebody", &secret));
        for known in [verifier(), unknown] {
            let (exchange, challenge) =
                start(MECHANISM, b"n,,n=,r=abc", known.clone(), &NONCE, ChannelBinding::None).unwrap();
            assert!(challenge.contains(",i=4096"));
            let last = client_final("pen", &known, "n=,r=abc", &challenge, b"n,,");
            assert_eq!(Err(ScramError::WrongPassword), exchange.finish(last.as_bytes()));
        }
    }

    /// Even someone who knows the made-up keys cannot use them.
    #[test]
    fn made_up_verifier_admits_nobody() {
        let mock = Verifier { genuine: false, ..verifier() };
        let (exchange, challenge) =
            start(MECHANISM, b"n,,n=,r=abc", mock.clone(), &NONCE, ChannelBinding::None).unwrap();
        let last = client_final("pencil", &mock, "n=,r=abc", &challenge, b"n,,");
        assert_eq!(Err(ScramError::WrongPassword), exchange.finish(last.as_bytes()));
    }

    #[test]
    fn someone_in_between_is_noticed() {
        let offered = ChannelBinding::Offered(b"hash");
        assert_eq!(
            Err(ScramError::Downgrade),
            start(MECHANISM, b"y,,n=,r=abc", verifier(), &NONCE, offered).map(|(_, challenge)| challenge)
        );
        let first = b"p=tls-server-end-point,,n=,r=abc";
        let (exchange, challenge) = start(MECHANISM_PLUS, first, verifier(), &NONCE, offered).unwrap();
        let other = b"p=tls-server-end-point,,other";
        let last = client_final("pencil", &verifier(), "n=,r=abc", &challenge, other);
        assert_eq!(Err(ScramError::ChannelBinding), exchange.finish(last.as_bytes()));
    }

    #[test]
    fn malformed_messages_are_refused() {
        let long = vec![b'x'; 2000];
        for first in [
            &b""[..],
            b"n",
            b"n,,",
            b"n,a=me,n=,r=abc",
            b"n,,m=x,n=,r=abc",
            b"n,,n=,r=",
            b"n,,n=",
            b"p=tls-unique,,n=,r=abc",
            b"z,,n=,r=abc",
            b"n,,n=,r=\xFF",
            b"n,,n=,r=a\0",
            &long,
        ] {
            let refused = start(MECHANISM, first, verifier(), &NONCE, ChannelBinding::None);
            assert!(matches!(refused, Err(ScramError::Malformed(_))), "{first:?}");
        }
        for last in ["", "c=biws", "c=biws,r=abc", "c=biws,r=abc,p=AAAA", "c=!,r=abc,p=AAAA", "p=x", ",p="] {
            let (exchange, _) = start(MECHANISM, b"n,,n=,r=abc", verifier(), &NONCE, ChannelBinding::None).unwrap();
            assert!(matches!(exchange.finish(last.as_bytes()), Err(ScramError::Malformed(_))), "{last}");
        }
    }

    #[test]
    fn replayed_proof_of_another_exchange_is_refused() {
        let (_, challenge) = start(MECHANISM, b"n,,n=,r=abc", verifier(), &[1; 18], ChannelBinding::None).unwrap();
        let last = client_final("pencil", &verifier(), "n=,r=abc", &challenge, b"n,,");
        let (exchange, _) = start(MECHANISM, b"n,,n=,r=abc", verifier(), &[2; 18], ChannelBinding::None).unwrap();
        assert_eq!(Err(ScramError::Malformed("nonce")), exchange.finish(last.as_bytes()));
    }

    #[test]
    fn initial_response_is_read() {
        assert_eq!(Ok((MECHANISM, &b"n,,n=,r=a"[..])), initial_response(b"SCRAM-SHA-256\0\0\0\0\x09n,,n=,r=a"));
        for malformed in [&b""[..], b"SCRAM-SHA-256", b"SCRAM-SHA-256\0", b"X\0\0\0\0\x09n", b"\xFF\0\0\0\0\0"] {
            assert!(initial_response(malformed).is_err());
        }
    }
}
