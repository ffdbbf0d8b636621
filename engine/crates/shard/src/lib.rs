//! Part of the page service: `docs/design/2026-11-27-page-service.md`.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
