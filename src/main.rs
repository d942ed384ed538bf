//! The `clsa` command.
fn main() {}
