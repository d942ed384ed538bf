//! Chat: from lines at a prompt to answers on a screen.
//!
//! ```text
//! terminal -> editor -> command -> app -> talk -> format -> session -> generate -> screen -> render -> terminal
//! ```
//!
//! [`talk`] knows no terminal and [`render`] no model; everything but [`app`], [`editor`], [`screen`] and [`signals`] is pure.
pub mod app;
pub mod command;
pub mod conversation;
pub mod editor;
pub mod format;
pub mod markdown;
pub mod progress;
pub mod reasoning;
pub mod render;
pub mod route;
pub mod screen;
pub mod show;
pub mod signals;
pub mod status;
pub mod style;
pub mod talk;
pub mod terminal;
pub mod watch;
