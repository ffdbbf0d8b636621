//! Part of the page service: `docs/design/2026-11-27-page-service.md`.
