//! A page server: one shard of the page service.
//!
//! The shell around the pure crates `shard`, `layers`, `filter`: it takes WAL in, keeps layers on its disk and in object storage,
//! and answers for pages. [`run`] starts it. Contract of the parts: `docs/design/2026-11-27-page-service.md`.

pub mod config;
