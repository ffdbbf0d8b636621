//! logstore
