//! A database into a lakebase and out of it: [`import`](import::run) makes image layers of a stopped PGDATA.
//!
//! Knows nothing about processes of a lakebase: import writes to object storage only, and nobody reads there before the
//! description of the cluster exists, which is written last. Read next: `pgdata.rs`, `import/mod.rs`.

mod pgdata;
mod relations;

pub use pgdata::{PgData, PgDataError};
pub use relations::{ForkFiles, RELATION_SEGMENT_BLOCKS, relation_forks};
