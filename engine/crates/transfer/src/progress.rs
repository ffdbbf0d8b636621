//! How far a transfer is, and whether it shall go on.

/// Told by import and export, from any of their threads.
pub trait Progress: Sync {
    /// `what` begins, and will move about `bytes`.
    fn begin(&self, what: &str, bytes: u64);
    /// `bytes` more were moved.
    fn advance(&self, bytes: u64);
    /// Nothing goes on for now, and why.
    fn wait(&self, why: &str);
    /// Whether the user wants it to end; asked often.
    fn is_interrupted(&self) -> bool;
}
