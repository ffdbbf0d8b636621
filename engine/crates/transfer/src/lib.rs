//! A database into a lakebase and out of it: [`import`](import::run) makes image layers of a stopped PGDATA.
//!
//! Knows nothing about processes of a lakebase: import writes to object storage only, and nobody reads there before the
//! description of the cluster exists, which is written last. Read next: `pgdata.rs`, `import/mod.rs`.

pub mod export;
pub mod import;
mod page;
mod pgdata;
mod progress;
mod relations;

pub use page::{PageError, PageFault};
pub use pgdata::{PgData, PgDataError};
pub use progress::Progress;
pub use relations::{ForkFiles, RELATION_SEGMENT_BLOCKS, relation_forks};
