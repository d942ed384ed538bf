//! What will be written: every tensor with its type, known before a byte is read.
use std::{collections::BTreeMap, path::Path};

use ggml_kernels::quant::Type;

use crate::{
    Error, Result,
    encode::{self, Job, Options},
    gguf::{TensorPlan, Writer},
    imatrix::Imatrix,
    model::Model,
    recipe::{Candidate, Choice, Recipe},
};

/// ggml's version of its block layouts, the value of `general.quantization_version`.
const QUANTIZATION_VERSION: u32 = 2;

/// A model with a type for each tensor.
#[derive(Debug)]
pub struct Plan<'a> {
    model: Model<'a>,
    choices: Vec<Choice>,
    imatrix: Option<&'a Imatrix>,
}

/// A line of the plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line<'a> {
    /// The tensor's name in the file.
    pub name: &'a str,
    /// Values per dimension, row length first.
    pub shape: &'a [u64],
    /// Its type in the source.
    pub from: Type,
    /// What was chosen.
    pub choice: Choice,
    /// Bytes it will take.
    pub bytes: usize,
}

impl<'a> Plan<'a> {
    /// Chooses types.
    ///
    /// # Errors
    /// When an option fits no tensor, or the importance matrix is of another model.
    pub fn new(mut model: Model<'a>, recipe: &Recipe, imatrix: Option<&'a Imatrix>) -> Result<Self> {
        let recipe = Recipe { imatrix: imatrix.is_some(), ..recipe.clone() };
        let candidates: Vec<Candidate<'_>> = model
            .tensors
            .iter()
            .map(|t| Candidate { name: &t.name, shape: &t.shape, source: t.source.ty() })
            .collect();
        let choices = recipe.choose(&candidates, model.n_gqa)?;
        if let Some(imatrix) = imatrix {
            for t in &model.tensors {
                if let Some(columns) = imatrix.get(&t.name)
                    && columns.len() != t.row_len()
                {
                    return Err(Error::Input(format!(
                        "importance matrix: {}: expected {} columns, found {}: it was made for another model",
                        t.name,
                        t.row_len(),
                        columns.len()
                    )));
                }
            }
            if !model.tensors.iter().any(|t| imatrix.get(&t.name).is_some()) {
                return Err(Error::Input("importance matrix: none of its matrices is in the model".into()));
            }
        }
        model.metadata.u32("general.quantization_version", QUANTIZATION_VERSION);
        model.metadata.u32("general.file_type", recipe.mix.file_type());
        Ok(Self { model, choices, imatrix })
    }

    /// What the user should know about the source.
    #[must_use]
    pub fn notes(&self) -> &[String] {
        &self.model.notes
    }

    /// The tensors in the order of the file.
    pub fn lines(&self) -> impl Iterator<Item = Line<'_>> {
        self.model.tensors.iter().zip(&self.choices).map(|(t, &choice)| {
            let bytes = choice.ty.row_bytes(t.row_len()).unwrap_or(0).saturating_mul(t.n_rows());
            Line { name: &t.name, shape: &t.shape, from: t.source.ty(), choice, bytes }
        })
    }

    /// How many tensors get another type than wanted because their rows are not whole blocks: by wanted and actual type.
    #[must_use]
    pub fn fallbacks(&self) -> BTreeMap<(Type, Type), usize> {
        let mut counts = BTreeMap::new();
        for choice in &self.choices {
            if let Some(wanted) = choice.instead_of {
                *counts.entry((wanted, choice.ty)).or_default() += 1;
            }
        }
        counts
    }

    /// Matrices that the importance matrix says nothing about and that it would help.
    #[must_use]
    pub fn without_importance(&self) -> usize {
        let Some(imatrix) = self.imatrix else { return 0 };
        let embeds = |name: &str| name == "token_embd.weight" || name == "output.weight";
        self.lines()
            .filter(|l| l.choice.ty.is_quantized() && !embeds(l.name) && imatrix.get(l.name).is_none())
            .count()
    }

    /// Bytes of the finished file.
    ///
    /// # Errors
    /// When a tensor cannot be stored.
    pub fn file_size(&self) -> Result<u64> {
        Writer::file_size(&self.model.metadata, &self.tensor_plans())
    }

    /// Bytes that the progress counts to.
    #[must_use]
    pub fn work(&self) -> u64 {
        self.jobs().iter().map(|j| (j.row_work() * j.tensor.n_rows()) as u64).sum()
    }

    /// Writes the file.
    ///
    /// # Errors
    /// When a value is not finite or too large for its type, when reading or writing fails, or on abort. Nothing is left then, and
    /// a file that was there before stays as it was.
    pub fn write(&self, path: &Path, options: &Options<'_>) -> Result<()> {
        let writer = Writer::create(path, self.model.metadata.clone(), self.tensor_plans(), options.abort)?;
        encode::run(&self.jobs(), writer, options)
    }

    fn tensor_plans(&self) -> Vec<TensorPlan> {
        let tensors = self.model.tensors.iter().zip(&self.choices);
        tensors.map(|(t, c)| TensorPlan { name: t.name.clone(), shape: t.shape.clone(), ty: c.ty }).collect()
    }

    fn jobs(&self) -> Vec<Job<'_>> {
        let tensors = self.model.tensors.iter().zip(&self.choices);
        tensors
            .map(|(tensor, choice)| Job {
                tensor,
                ty: choice.ty,
                // `fit` chose a type that rows are whole blocks of.
                row_bytes: choice.ty.row_bytes(tensor.row_len()).unwrap_or(0),
                imatrix: self.imatrix.and_then(|m| m.get(&tensor.name)),
            })
            .collect()
    }
}
