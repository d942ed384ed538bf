//! Texts for `/help`, `/show`, `/stats` and `/route`.
use std::fmt::Write;

use super::command::{COMMANDS, Topic};
use super::route::{Looked, bars};
use super::status::{Totals, count, plural};
use super::style::visible;
use super::talk::Talk;
use crate::backend::Routing;
use crate::cli::human_bytes;
use crate::placement;
use crate::sampler::SamplerParams;
use crate::tokenizer::Tokenizer;

/// `/help`.
#[must_use]
pub fn help() -> String {
    let usage = |name: &str, args: &str| format!("{name} {args}").trim_end().to_owned();
    let width = COMMANDS.iter().map(|e| usage(e.name, e.args).chars().count()).max().unwrap_or(0);
    let mut out = String::new();
    for e in &COMMANDS {
        let also =
            if e.aliases.is_empty() { String::new() } else { format!(" (also {})", e.aliases.join(", ")) };
        let _ = writeln!(out, "  {:width$}  {}{also}", usage(e.name, e.args), e.help);
    }
    out + "  Ctrl-C stops an answer and keeps what was said; twice at the prompt leaves."
}

/// `/show TOPIC`.
#[must_use]
pub fn show(talk: &Talk, settings: &[(&str, String)], topic: Topic) -> String {
    match topic {
        Topic::Params => params(talk, settings),
        Topic::Template => match talk.format().source() {
            "" => "raw completion (--no-chat): messages are given to the model as they are".into(),
            source => source.to_owned(),
        },
        Topic::Model => model(talk),
        Topic::Memory => memory(talk),
    }
}

fn params(talk: &Talk, settings: &[(&str, String)]) -> String {
    let mut out = String::new();
    let names = SamplerParams::names();
    let width = names.iter().map(|(n, _)| n.len()).max().unwrap_or(0);
    for (name, value) in settings {
        let _ = writeln!(out, "  {name:width$}  {value}");
    }
    for (name, what) in names {
        let mut value = talk.params().get(name).unwrap_or_default();
        if *name == "seed" && value == "random" {
            value = format!("random (now {})", talk.seed());
        }
        let _ = writeln!(out, "  {name:width$}  {value:<14}  {}", what.trim());
    }
    out.trim_end().to_owned()
}

fn model(talk: &Talk) -> String {
    let engine = talk.session().engine();
    let (c, file) = (&engine.model().config, &engine.model().file);
    let parameters: usize = file.tensors().iter().map(crate::gguf::TensorInfo::n_elements).sum();
    let name: Option<&str> = file.optional("general.name").ok().flatten();
    let layers = if c.is_yoco() {
        format!("{} self-decoder + {} cross-decoder over one shared cache", c.n_self, c.n_layer - c.n_self)
    } else {
        c.n_layer.to_string()
    };
    let window = c.window.map_or_else(|| "none".into(), |w| format!("{} positions", count(w)));
    let indexer =
        c.indexer.map_or_else(|| "none".into(), |ix| format!("width {}, top-k {}", ix.head_dim, ix.top_k));
    format!(
        "  file        {}\n  name        {}\n  size        {}, {} parameters\n  layers      {layers}\n  \
         hidden      {}, feed-forward {}\n  heads       {} of {} over {} KV heads\n  window      {window}\n  \
         indexer     {indexer}\n  vocabulary  {}\n  trained to  {} tokens\n  device      {}\n  routing     {}",
        file.path().display(),
        name.unwrap_or("-"),
        human_bytes(file.len() as u64),
        count(parameters),
        count(c.hidden),
        count(c.ffn),
        c.cross_heads.n_head,
        c.cross_heads.head_dim,
        c.cross_heads.n_kv,
        count(c.vocab),
        count(c.context_length),
        engine.backend().describe(),
        routing(talk),
    )
}

fn memory(talk: &Talk) -> String {
    let engine = talk.session().engine();
    let m = engine.backend().memory();
    let held = talk.session().tokens().len();
    let (row, windows) = engine.export_sizes(held);
    let checkpoints: usize = engine.checkpoints(talk.session().seq()).map(|(_, w)| w.len()).sum();
    let line =
        |what: &str, bytes: u64, note: &str| format!("  {what:<12} {:>12}  {note}\n", human_bytes(bytes));
    [
        line("weights", m.weights, "mapped from the file"),
        line("repacked", m.repacked, &format!("copies in another layout, made in {:.1?}", m.repack_time)),
        line("cache", m.cache, &format!("reserved for {} positions", count(engine.context()))),
        line(
            "  in use",
            (held * row + windows) as u64,
            &format!("{} positions, {row} bytes each", count(held)),
        ),
        line("checkpoints", checkpoints as u64, "windows to which an edit can return"),
        line("scratch", m.scratch, ""),
        line("free", placement::free_memory(), "on this machine").trim_end().to_owned(),
    ]
    .concat()
}

/// The routing mode in a few words.
#[must_use]
pub fn routing(talk: &Talk) -> String {
    match talk.session().engine().routing() {
        (Routing::Dense, _) => "dense".into(),
        (mode, k) => format!("{mode} k={}", count(k)),
    }
}

/// `/stats`.
#[must_use]
pub fn stats(talk: &Talk, totals: &Totals) -> String {
    let (used, context) = (talk.session().tokens().len(), talk.session().engine().context());
    let turns = plural(talk.conversation.turns(), "turn");
    format!("{}\ncontext    {} of {} tokens, {turns}", totals.lines(), count(used), count(context))
}

/// `/route`: what was selected for the last answer, over `tokens`, for a terminal of `width` columns.
#[must_use]
pub fn route(
    looked: &Looked,
    tokens: &[u32],
    tokenizer: &Tokenizer,
    mode: (Routing, usize),
    width: usize,
) -> String {
    const PASSAGES: usize = 5;
    const LENGTH: usize = 24;
    let (routing, k) = mode;
    if routing == Routing::Dense {
        return "routing is dense: every position was looked at".into();
    }
    if looked.is_empty() {
        return "nothing was routed for the last answer".into();
    }
    let n = looked.len();
    let histogram = looked.histogram(width.saturating_sub(2).clamp(10, 120));
    let bars = bars(&histogram);
    let end = format!("{:>1$}", count(n), histogram.len().saturating_sub(1));
    let mut out = format!(
        "{routing} selected {} of {} positions for each of {} tokens\n|{bars}|\n 0{end}\n",
        count(k.min(n)),
        count(n),
        count(looked.steps() as usize),
    );
    if n <= k {
        out += "every position fits into k: all of them were selected";
        return out;
    }
    out += "most selected passages (share of the answer's tokens that looked there):\n";
    for (i, passage) in looked.passages(PASSAGES, LENGTH).into_iter().enumerate() {
        let share = looked.share(passage.clone()) * 100.0;
        let ids = tokens.get(passage.start..passage.end.min(tokens.len())).unwrap_or_default();
        let text = tokenizer.decode(ids, true).unwrap_or_default();
        let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
        let head = format!("{}. {share:>3.0} % {}..{}  ", i + 1, passage.start, passage.end);
        let room = width.saturating_sub(head.len() + 1).max(20);
        let _ = writeln!(out, "{head}{}", clip(&text, room));
    }
    out.trim_end().to_owned()
}

/// At most `room` columns of a text, control characters made visible.
#[must_use]
pub fn clip(text: &str, room: usize) -> String {
    use unicode_width::UnicodeWidthChar;
    let (mut out, mut used) = (String::new(), 0);
    for c in text.chars().map(visible) {
        let width = c.width().unwrap_or(0);
        if used + width > room.saturating_sub(1) {
            return out + "…";
        }
        used += width;
        out.push(c);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn help_lists_every_command() {
        let help = help();
        assert!(COMMANDS.iter().all(|e| help.contains(e.name) && help.contains(e.help)), "{help}");
    }

    #[test]
    fn texts_are_clipped_to_columns() {
        assert_eq!(clip("abcdef", 4), "abc…");
        assert_eq!(clip("abc", 4), "abc");
        assert_eq!(clip("漢字漢字", 5), "漢字…");
        assert_eq!(clip("a\x1bb", 10), "a␛b");
    }
}
