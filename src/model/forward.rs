//! The forward pass, once, for all backends. It reads top to bottom like the equations of the paper.
use crate::backend::{Backend, Batch, Record, Routing};
use crate::cache::PageTables;
use crate::config::Config;
use crate::error::Result;

/// Calls the verbs for one micro-batch, unless the backend has a recording of the same shape: every row is appended to the caches;
/// [`Backend::finish`] then gives the logits of `batch.outputs`.
///
/// A YOCO prompt runs the self-decoder only: rows without wanted logits stop at the shared memory, which is exact
/// (arXiv 2405.05254, section 2.2).
pub fn record(
    b: &mut dyn Backend,
    c: &Config,
    batch: &Batch,
    tables: &PageTables,
    routing: Routing,
    top_k: usize,
) -> Result<()> {
    if b.begin(batch, tables, routing, top_k)? == Record::Reused {
        return Ok(());
    }
    if c.is_yoco() { decoder_decoder(b, c, batch, routing) } else { transformer(b, c, batch) }
}

/// YOCO with, or without, cross-layer sparse attention.
fn decoder_decoder(b: &mut dyn Backend, c: &Config, batch: &Batch, routing: Routing) -> Result<()> {
    b.embed()?;
    for layer in 0..c.n_self {
        b.self_attention(layer)?;
        b.feed_forward(layer)?;
    }
    b.append_shared()?;
    if batch.outputs.is_empty() {
        return Ok(());
    }
    b.keep_outputs()?;
    for layer in c.n_self..c.n_layer {
        if routing.routes_at(layer - c.n_self) {
            b.route()?;
        }
        b.cross_attention(layer)?;
        b.feed_forward(layer)?;
    }
    b.logits()
}

/// The baseline: every layer attends to its own cache of all positions.
fn transformer(b: &mut dyn Backend, c: &Config, batch: &Batch) -> Result<()> {
    b.embed()?;
    for layer in 0..c.n_layer {
        b.self_attention(layer)?;
        if layer + 1 == c.n_layer {
            if batch.outputs.is_empty() {
                return Ok(());
            }
            b.keep_outputs()?;
        }
        b.feed_forward(layer)?;
    }
    b.logits()
}

impl Routing {
    /// Whether positions are selected anew before cross layer `j`, counted from 0.
    #[must_use]
    pub fn routes_at(self, j: usize) -> bool {
        match self {
            Self::Clsa | Self::Block(_) => j == 0,
            Self::Dense => false,
            Self::Every(n) => j.is_multiple_of(n),
        }
    }

    /// Positions that may be selected for a row: block mode takes whole blocks, at least one.
    #[must_use]
    pub fn columns(self, top_k: usize) -> usize {
        match self {
            Self::Block(block) => top_k.max(block),
            _ => top_k,
        }
    }
}

impl std::fmt::Display for Routing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Clsa => write!(f, "clsa"),
            Self::Dense => write!(f, "dense"),
            Self::Every(1) => write!(f, "per-layer"),
            Self::Every(n) => write!(f, "every-{n}"),
            Self::Block(n) => write!(f, "block-{n}"),
        }
    }
}

impl std::str::FromStr for Routing {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let number = |s: &str| s.parse::<usize>().ok().filter(|n| (1..=65_536).contains(n));
        match s {
            "clsa" => Ok(Self::Clsa),
            "dense" => Ok(Self::Dense),
            "per-layer" => Ok(Self::Every(1)),
            _ => (s.strip_prefix("every-").and_then(number).map(Self::Every))
                .or_else(|| s.strip_prefix("block-").and_then(number).map(Self::Block))
                .ok_or_else(|| {
                    format!("found '{s}', expected clsa, dense, per-layer, every-N (e.g. every-4) or block-B (e.g. block-64)")
                }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn routing_names_round_trip() {
        for name in ["clsa", "dense", "per-layer", "every-4", "block-64"] {
            assert_eq!(name.parse::<Routing>().expect(name).to_string(), name);
        }
        for bad in ["", "Clsa", "every-", "every-0", "block--1", "block-99999999999999999999"] {
            assert!(bad.parse::<Routing>().is_err(), "{bad}");
        }
    }
}
