//! What a claim of a shard says: its generation, and a nonce that makes it one disk's own.

use std::{fmt, num::ParseIntError, str::FromStr};

use layers::ShardGeneration;
use serde::Deserialize;

/// Version of the object that this program writes and reads.
const VERSION: u32 = 1;

/// Random number by which an owner knows its claim again: it lies on its disk before the claim is made. So one generation that
/// was given to two disks by mistake has one owner.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ClaimNonce(pub u64);

impl ClaimNonce {
    /// A new one.
    ///
    /// # Errors
    /// The system has no random numbers.
    pub fn random() -> Result<ClaimNonce, getrandom::Error> {
        getrandom::u64().map(ClaimNonce)
    }
}

impl fmt::Display for ClaimNonce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl FromStr for ClaimNonce {
    type Err = ParseIntError;

    fn from_str(text: &str) -> Result<ClaimNonce, ParseIntError> {
        u64::from_str_radix(text, 16).map(ClaimNonce)
    }
}

/// The bytes of a claim.
pub(crate) fn encode(generation: ShardGeneration, nonce: ClaimNonce) -> String {
    format!("{{\"version\":{VERSION},\"generation\":{},\"nonce\":\"{nonce}\"}}\n", generation.0)
}

/// The nonce of the claim of `generation`, or what is wrong with it.
pub(crate) fn decode(bytes: &[u8], generation: ShardGeneration) -> Result<ClaimNonce, String> {
    #[derive(Deserialize)]
    struct Version {
        version: u32,
    }
    #[derive(Deserialize)]
    struct Claim {
        generation: u64,
        nonce: String,
    }
    let damaged = |error: serde_json::Error| format!("it is no claim: {error}");
    let Version { version } = serde_json::from_slice(bytes).map_err(damaged)?;
    if version != VERSION {
        return Err(format!("version {version} of a claim, this program knows {VERSION}"));
    }
    let claim: Claim = serde_json::from_slice(bytes).map_err(damaged)?;
    if claim.generation != generation.0 {
        return Err(format!("it is the claim of generation {}", claim.generation));
    }
    claim.nonce.parse().map_err(|_| format!("{:?} is no nonce", claim.nonce))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_claim_says_whose_it_is_and_others_are_refused_by_name() {
        let (generation, nonce) = (ShardGeneration(7), ClaimNonce(0xAB));
        let text = encode(generation, nonce);
        assert_eq!("{\"version\":1,\"generation\":7,\"nonce\":\"00000000000000ab\"}\n", text);
        assert_eq!(Ok(nonce), decode(text.as_bytes(), generation));
        for (other, expected) in [
            (text.replace("\"version\":1", "\"version\":2"), "version 2"),
            (text.replace('7', "8"), "generation 8"),
            (text.replace("00ab", "xyz"), "no nonce"),
            (String::new(), "no claim"),
        ] {
            let refused = decode(other.as_bytes(), generation).unwrap_err();
            assert!(refused.contains(expected), "{refused}");
        }
    }
}
