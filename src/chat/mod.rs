//! Chat in a terminal.
pub mod command;
pub mod markdown;
pub mod reasoning;
pub mod render;
pub mod route;
pub mod style;
