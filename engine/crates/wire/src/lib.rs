//! Bytes of the engine's protocols, as pure encoders and decoders.
//!
//! Two are ours: [`append`] (`docs/formats/append-protocol.md`), which proposers, peers and readers speak with a
//! safekeeper, and [`page`] (`docs/formats/page-protocol.md`), which readers of pages speak with a page server.
//! [`postgres`] is PostgreSQL's, the part that stock followers need (`docs/formats/replication-protocol.md`).
//! Knows nothing about sockets: callers hand bytes in and send what comes out. Every decoder takes hostile input: it
//! returns a typed error, never panics, and never allocates by a length that it has not checked against a limit.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod append;
mod bytes;
pub mod page;
pub mod postgres;
