//! llama.cpp running a model, as an oracle for Transformer files and as the yardstick of benchmarks.
use std::{ffi::CString, path::Path, ptr::NonNull};

use super::{
    init,
    observe::{Observer, see},
};
use crate::{ggml, quant::Type};

/// What a llama.cpp context is made for.
#[derive(Clone, Copy, Debug)]
pub struct Params {
    /// Positions.
    pub context: u32,
    /// Tokens of a micro-batch in prompt processing (`n_batch` and `n_ubatch`).
    pub batch: u32,
    /// Threads, for prompts and for single tokens.
    pub threads: i32,
    /// Type of cached keys and values.
    pub cache: Type,
    /// Flash attention; llama.cpp needs it for a quantized cache.
    pub flash_attention: bool,
}

/// A model and one sequence in llama.cpp, on the CPU.
pub struct Llama {
    context: NonNull<ggml::llama_context>,
    model: NonNull<ggml::llama_model>,
    n_vocab: usize,
    params: Params,
    len: usize,
    /// Freed after the context, which has its address.
    _observer: Option<Box<Observer>>,
}

// SAFETY: a llama.cpp context may be used from any thread, by one at a time; it is reached through &mut self only.
unsafe impl Send for Llama {}

impl Llama {
    /// Loads the file at `path` (memory-mapped, no layer on a GPU) and reserves a context.
    ///
    /// # Errors
    /// What could not be done, in words.
    pub fn open(path: &Path, params: Params) -> Result<Self, String> {
        Self::start(path, params, None)
    }

    /// As [`Self::open`]; `observer` hears what enters each product.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn observed(path: &Path, params: Params, observer: Observer) -> Result<Self, String> {
        Self::start(path, params, Some(Box::new(observer)))
    }

    fn start(path: &Path, params: Params, mut observer: Option<Box<Observer>>) -> Result<Self, String> {
        init();
        let name = CString::new(path.as_os_str().as_encoded_bytes()).map_err(|e| e.to_string())?;
        // SAFETY: returns a plain struct.
        let mut of_model = unsafe { ggml::llama_model_default_params() };
        of_model.n_gpu_layers = 0;
        // SAFETY: `name` ends with a NUL and outlives the call; null is the answer to a file that cannot be read.
        let model = NonNull::new(unsafe { ggml::llama_model_load_from_file(name.as_ptr(), of_model) })
            .ok_or_else(|| format!("{}: llama.cpp cannot load it", path.display()))?;
        // SAFETY: returns a plain struct.
        let mut of_context = unsafe { ggml::llama_context_default_params() };
        of_context.n_ctx = params.context;
        of_context.n_batch = params.batch;
        of_context.n_ubatch = params.batch;
        // A second sequence over the same cells, through which `fill` brings them in.
        of_context.n_seq_max = 2;
        of_context.kv_unified = true;
        of_context.n_threads = params.threads;
        of_context.n_threads_batch = params.threads;
        of_context.type_k = params.cache.to_ggml() as ggml::ggml_type;
        of_context.type_v = params.cache.to_ggml() as ggml::ggml_type;
        of_context.flash_attn_type = if params.flash_attention {
            ggml::LLAMA_FLASH_ATTN_TYPE_ENABLED
        } else {
            ggml::LLAMA_FLASH_ATTN_TYPE_DISABLED
        };
        if let Some(observer) = &mut observer {
            of_context.cb_eval = Some(see);
            of_context.cb_eval_user_data = std::ptr::from_mut::<Observer>(observer).cast();
        }
        // SAFETY: the model is alive; the parameters hold no pointer of ours but that of the observer, which is kept beside the context.
        let context = NonNull::new(unsafe { ggml::llama_init_from_model(model.as_ptr(), of_context) });
        let Some(context) = context else {
            // SAFETY: the model is ours alone and not used again.
            unsafe { ggml::llama_model_free(model.as_ptr()) };
            return Err(format!("{}: llama.cpp cannot make a context of {params:?}", path.display()));
        };
        // SAFETY: the model is alive.
        let n_vocab =
            unsafe { ggml::llama_vocab_n_tokens(ggml::llama_model_get_vocab(model.as_ptr())) } as usize;
        Ok(Self { context, model, n_vocab, params, len: 0, _observer: observer })
    }

    /// Positions that the sequence holds.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the sequence holds nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Forgets the sequence.
    pub fn clear(&mut self) {
        // SAFETY: the context is alive.
        unsafe { ggml::llama_memory_clear(ggml::llama_get_memory(self.context.as_ptr()), false) };
        self.len = 0;
    }

    /// Cuts the sequence back to `len` positions.
    pub fn truncate(&mut self, len: usize) {
        if len < self.len {
            // SAFETY: the context is alive; llama.cpp checks the range.
            unsafe {
                ggml::llama_memory_seq_rm(
                    ggml::llama_get_memory(self.context.as_ptr()),
                    0,
                    len as ggml::llama_pos,
                    -1,
                );
            }
            self.len = len;
        }
    }

    /// Positions that [`Self::fill`] stores at a time.
    pub const REPEATED: usize = 256;

    /// Makes the sequence hold `len` positions, rounded down to a multiple of [`Self::REPEATED`], without running the model for all of
    /// them: processes `start`, which are at most so many tokens, and stores the rows of its cache again and again. For timing at depth.
    ///
    /// # Errors
    /// As [`Self::decode`], and when llama.cpp's saved state is not laid out as this expects.
    pub fn fill(&mut self, start: &[u32], len: usize) -> Result<()> {
        self.clear();
        self.decode(start)?;
        if start.len() != Self::REPEATED || len < 2 * Self::REPEATED {
            return Ok(());
        }
        // SAFETY: the context is alive.
        let mut state = vec![0u8; unsafe { ggml::llama_state_seq_get_size(self.context.as_ptr(), 0) }];
        // SAFETY: the buffer has the size that is passed.
        let written = unsafe {
            ggml::llama_state_seq_get_data(self.context.as_ptr(), state.as_mut_ptr(), state.len(), 0)
        };
        // Magic, sequence, streams, cells; of each cell its position, how many sequences hold it, and which one.
        const FIRST: usize = 16;
        const CELL: usize = 12;
        let word = |at: usize| state.get(at..at + 4).map(|w| u32::from_ne_bytes([w[0], w[1], w[2], w[3]]));
        let as_expected = written == state.len()
            && word(8) == Some(1)
            && word(12) == Some(Self::REPEATED as u32)
            && (0..Self::REPEATED)
                .all(|i| word(FIRST + CELL * i) == Some(i as u32) && word(FIRST + CELL * i + 4) == Some(1));
        if !as_expected {
            return Err("its saved state is not laid out as expected: fill the depth by prefill".into());
        }
        for page in 1..len / Self::REPEATED {
            for i in 0..Self::REPEATED {
                let position = (page * Self::REPEATED + i) as u32;
                state[FIRST + CELL * i..][..4].copy_from_slice(&position.to_ne_bytes());
            }
            // SAFETY: the buffer holds a whole state; the sequences 0 and 1 exist and share one stream.
            let read = unsafe {
                let context = self.context.as_ptr();
                let read = ggml::llama_state_seq_set_data(context, state.as_ptr(), state.len(), 1);
                let memory = ggml::llama_get_memory(context);
                ggml::llama_memory_seq_cp(memory, 1, 0, -1, -1);
                ggml::llama_memory_seq_rm(memory, 1, -1, -1);
                read
            };
            if read != state.len() {
                return Err(format!("it took {read} of {} bytes of its own state", state.len()));
            }
            self.len += Self::REPEATED;
        }
        Ok(())
    }

    /// Tokens of its vocabulary.
    #[must_use]
    pub fn vocab(&self) -> usize {
        self.n_vocab
    }

    /// Whether `tokens` can be appended.
    fn check(&self, tokens: &[u32]) -> Result<()> {
        let needed = self.len + tokens.len();
        if tokens.is_empty() || needed > self.params.context as usize {
            return Err(format!(
                "{} tokens after {} in a context of {}",
                tokens.len(),
                self.len,
                self.params.context
            ));
        }
        match tokens.iter().find(|&&t| t as usize >= self.n_vocab) {
            Some(token) => Err(format!("token {token} is outside the vocabulary of {}", self.n_vocab)),
            None => Ok(()),
        }
    }

    /// Appends `tokens` and hands the logits `[vocab]` of each one for which `wanted` to `each`, with its index.
    ///
    /// # Errors
    /// As [`Self::decode`].
    pub fn decode_all(
        &mut self,
        tokens: &[u32],
        wanted: impl Fn(usize) -> bool,
        mut each: impl FnMut(usize, &[f32]),
    ) -> Result<()> {
        self.check(tokens)?;
        let size = self.params.batch as usize;
        for (c, chunk) in tokens.chunks(size).enumerate() {
            let mut ids: Vec<ggml::llama_token> = chunk.iter().map(|&t| t as ggml::llama_token).collect();
            let mut masks: Vec<i8> = (0..chunk.len()).map(|i| i8::from(wanted(c * size + i))).collect();
            // SAFETY: as in `decode`; the mask has as many entries as the chunk and outlives the call, and positions and sequences, which
            // are null, follow from the sequence's length.
            let status = unsafe {
                let mut batch = ggml::llama_batch_get_one(ids.as_mut_ptr(), ids.len() as i32);
                batch.logits = masks.as_mut_ptr();
                ggml::llama_decode(self.context.as_ptr(), batch)
            };
            if status != 0 {
                return Err(format!("llama_decode answered {status}"));
            }
            self.len += chunk.len();
            for i in (0..chunk.len()).filter(|&i| masks[i] != 0) {
                // SAFETY: token i of the batch was marked as an output.
                let logits = unsafe { ggml::llama_get_logits_ith(self.context.as_ptr(), i as i32) };
                if logits.is_null() {
                    return Err("llama.cpp has no logits".into());
                }
                // SAFETY: llama.cpp holds n_vocab floats there until the next decode.
                each(c * size + i, unsafe { std::slice::from_raw_parts(logits, self.n_vocab) });
            }
        }
        Ok(())
    }

    /// Appends `tokens` and returns the logits of the last one, `[vocab]`.
    ///
    /// # Errors
    /// When there is no token, one is outside the vocabulary, they do not fit the context, or llama.cpp fails.
    pub fn decode(&mut self, tokens: &[u32]) -> Result<&[f32]> {
        self.check(tokens)?;
        let mut ids: Vec<ggml::llama_token> = tokens.iter().map(|&t| t as ggml::llama_token).collect();
        for chunk in ids.chunks_mut(self.params.batch as usize) {
            // SAFETY: the chunk outlives the decode call below, which only reads it; it is at most n_batch tokens, each in the
            // vocabulary.
            let status = unsafe {
                let batch = ggml::llama_batch_get_one(chunk.as_mut_ptr(), chunk.len() as i32);
                ggml::llama_decode(self.context.as_ptr(), batch)
            };
            if status != 0 {
                return Err(format!("llama_decode answered {status}"));
            }
            self.len += chunk.len();
        }
        // SAFETY: the last token of a batch without a logits mask has logits; -1 names it.
        let logits = unsafe { ggml::llama_get_logits_ith(self.context.as_ptr(), -1) };
        if logits.is_null() {
            return Err("llama.cpp has no logits".into());
        }
        // SAFETY: llama.cpp holds n_vocab floats there until the next decode, which needs &mut self.
        Ok(unsafe { std::slice::from_raw_parts(logits, self.n_vocab) })
    }
}

impl Drop for Llama {
    fn drop(&mut self) {
        // SAFETY: both are ours alone and not used again; the context goes before its model.
        unsafe {
            ggml::llama_free(self.context.as_ptr());
            ggml::llama_model_free(self.model.as_ptr());
        }
    }
}

/// Result with an explanation in words.
type Result<T, E = String> = std::result::Result<T, E>;
