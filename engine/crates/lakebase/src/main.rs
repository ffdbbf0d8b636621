//! lakebase
fn main() {}
