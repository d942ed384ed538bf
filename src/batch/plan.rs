//! What is to be done: the jobs with their tokens, the prefixes they share, and what an engine for them is sized for.
use rayon::prelude::*;

use super::job::{Ask, Job};
use super::prefix::{Prefix, shared_prefixes};
use super::schedule::pages_needed;
use super::{document_tokens, tokenize};
use crate::cache::PAGE;
use crate::config::Config;
use crate::engine::Options;
use crate::error::Result;
use crate::placement;
use crate::template::ChatTemplate;
use crate::tokenizer::Tokenizer;

/// Shared tokens that make a prefix worth keeping.
pub const LEAST_PREFIX: usize = 64;
/// Slots beyond the jobs' own, for prefixes.
pub const PREFIX_SLOTS: usize = 8;
/// Sequences at a time when nothing was said.
const MOST_PARALLEL: usize = 32;

/// A job with its tokens.
#[derive(Debug)]
pub struct Planned {
    /// The job.
    pub job: Job,
    /// Its prompt.
    pub tokens: Vec<u32>,
    /// The longest kept prefix of the prompt.
    pub prefix: Option<usize>,
}

impl Planned {
    /// Positions it may come to hold.
    #[must_use]
    pub fn worst(&self) -> usize {
        self.tokens.len().saturating_add(self.job.max_tokens)
    }
}

/// What is to be done.
#[derive(Debug, Default)]
pub struct Plan {
    /// The jobs.
    pub jobs: Vec<Planned>,
    /// What they share, parents before children.
    pub prefixes: Vec<Prefix>,
    /// Prompts beyond the jobs' own that prefixes refer to: documents before no question.
    pub(super) documents: Vec<Vec<u32>>,
}

impl Plan {
    /// Tokenizes `jobs` on all cores; those that have no prompt come back with the reason. With `keep_documents` the documents of every job
    /// are prefixes, also those that no other job shares. Without `share` there are no prefixes at all.
    #[must_use]
    pub fn new(
        jobs: Vec<Job>,
        tokenizer: &Tokenizer,
        template: &Result<ChatTemplate>,
        vocab: usize,
        share: bool,
        keep_documents: bool,
    ) -> (Self, Vec<(Job, String)>) {
        let read = |job: &Job| {
            let usable = template.as_ref().ok();
            let tokens = tokenize(job, tokenizer, usable).map_err(|what| match (template, &job.ask) {
                (Err(e), Ask::Messages(_)) => e.to_string(),
                _ => what,
            })?;
            if let Some(id) = tokens.iter().find(|&&id| id as usize >= vocab) {
                return Err(format!("token {id} of the prompt is outside the model's vocabulary of {vocab}"));
            }
            let document = if keep_documents { document_tokens(job, &tokens, tokenizer, usable) } else { 0 };
            Ok((tokens, document))
        };
        let read: Vec<_> = jobs.par_iter().map(read).collect();
        let (mut plan, mut failed) = (Self::default(), vec![]);
        for (job, read) in jobs.into_iter().zip(read) {
            match read {
                Ok((tokens, document)) => {
                    if document >= LEAST_PREFIX {
                        // A prompt that parts from every other one where the documents end.
                        let end = tokens[..document].iter().copied().chain([u32::MAX]);
                        plan.documents.push(end.collect());
                    }
                    plan.jobs.push(Planned { job, tokens, prefix: None });
                }
                Err(what) => failed.push((job, what)),
            }
        }
        plan.documents.sort_unstable();
        plan.documents.dedup();
        if share {
            plan.share();
        }
        (plan, failed)
    }

    /// Finds the prefixes.
    pub fn share(&mut self) {
        let own = self.jobs.iter().map(|p| p.tokens.as_slice());
        let prompts: Vec<&[u32]> = own.chain(self.documents.iter().map(Vec::as_slice)).collect();
        let (prefixes, of_prompt) = shared_prefixes(&prompts, LEAST_PREFIX);
        self.prefixes = prefixes;
        self.jobs.iter_mut().zip(of_prompt).for_each(|(p, prefix)| p.prefix = prefix);
    }

    /// The tokens of a prefix.
    #[must_use]
    pub fn prefix_tokens(&self, i: usize) -> &[u32] {
        let Prefix { prompt, len, .. } = self.prefixes[i];
        match self.jobs.get(prompt) {
            Some(p) => &p.tokens[..len],
            None => &self.documents[prompt - self.jobs.len()][..len],
        }
    }

    /// Tokens of a prefix that its parent has not.
    #[must_use]
    pub fn prefix_own(&self, i: usize) -> usize {
        let p = &self.prefixes[i];
        p.len - p.parent.map_or(0, |up| self.prefixes[up].len)
    }

    /// Prompt tokens of a job that a prefix has.
    #[must_use]
    pub fn shared(&self, job: usize) -> usize {
        self.jobs[job].prefix.map_or(0, |i| self.prefixes[i].len)
    }

    /// Prompt tokens in all, those that run when every prefix runs once, and tokens of the answers at most.
    #[must_use]
    pub fn totals(&self) -> (usize, usize, usize) {
        let prompt = self.jobs.iter().map(|p| p.tokens.len()).sum();
        let own: usize = (0..self.jobs.len()).map(|i| self.jobs[i].tokens.len() - self.shared(i)).sum();
        let once: usize = (0..self.prefixes.len()).map(|i| self.prefix_own(i)).sum();
        let answers = self.jobs.iter().map(|p| p.job.max_tokens).fold(0, usize::saturating_add);
        (prompt, own + once, answers)
    }

    /// What an engine for `n` jobs at a time is sized for; no job holds more than `context` positions.
    #[must_use]
    pub fn sized(&self, n: usize, context: usize, base: &Options) -> Options {
        let fitting = || self.jobs.iter().enumerate().filter(|(_, p)| p.worst() <= context);
        let longest = fitting().map(|(_, p)| p.worst()).max().unwrap_or(1);
        // The pages that n jobs of the average size take beyond what they share, and those of the largest prefixes.
        let pages = fitting().map(|(i, p)| pages_needed(p.worst(), self.shared(i))).sum::<usize>();
        let mean = pages.div_ceil(fitting().count().max(1));
        let mut prefixes: Vec<usize> = (0..self.prefixes.len()).map(|i| self.prefix_own(i)).collect();
        prefixes.sort_unstable_by(|a, b| b.cmp(a));
        let slots = if prefixes.is_empty() { 0 } else { PREFIX_SLOTS };
        let kept: usize = prefixes.iter().take(PREFIX_SLOTS).map(|len| len.div_ceil(PAGE) + 1).sum();
        let total = (n * mean + kept).max(longest.div_ceil(PAGE) + slots) * PAGE;
        Options { context: longest, n_seq: n + slots, total_positions: Some(total), ..base.clone() }
    }

    /// How many jobs at a time: as many as the caches for them fit into `budget` bytes.
    #[must_use]
    pub fn parallel(&self, context: usize, base: &Options, config: &Config, budget: u64) -> usize {
        let most = self.jobs.len().clamp(1, MOST_PARALLEL).min(base.max_rows);
        let fits =
            |n: &usize| placement::cache_bytes(config, &self.sized(*n, context, base).cache_spec()) <= budget;
        (1..=most).rev().find(fits).unwrap_or(1)
    }
}
