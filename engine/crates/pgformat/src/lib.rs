//! pgformat
