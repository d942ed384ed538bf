//! llama.cpp itself, to compare with: its tokenizer here, its forward pass in [`run`].
pub mod observe;
pub mod quantize;
pub mod run;

use crate::ggml;
use std::{
    ffi::{CString, c_char, c_void},
    path::Path,
    ptr::NonNull,
    sync::Once,
};

/// The vocabulary of a GGUF file as llama.cpp reads it.
pub struct Vocab {
    model: NonNull<ggml::llama_model>,
}

// SAFETY: a model loaded with vocab_only is never changed after loading, and llama_tokenize and llama_token_to_piece only read it.
unsafe impl Send for Vocab {}
// SAFETY: as above.
unsafe impl Sync for Vocab {}

/// Keeps llama.cpp's messages off stderr.
unsafe extern "C" fn quiet(_: ggml::ggml_log_level, _: *const c_char, _: *mut c_void) {}

/// Starts llama.cpp, silently, once.
fn init() {
    static INIT: Once = Once::new();
    // SAFETY: both may be called at any time; the callback is a plain function without data.
    INIT.call_once(|| unsafe {
        ggml::llama_log_set(Some(quiet), std::ptr::null_mut());
        ggml::llama_backend_init();
    });
}

impl Vocab {
    /// Loads the vocabulary, and no weights, of the file at `path`; `None` where llama.cpp refuses it.
    #[must_use]
    pub fn open(path: &Path) -> Option<Self> {
        init();
        let path = CString::new(path.as_os_str().as_encoded_bytes()).ok()?;
        // SAFETY: returns a plain struct.
        let mut params = unsafe { ggml::llama_model_default_params() };
        params.vocab_only = true;
        // SAFETY: `path` ends with a NUL and outlives the call; null is the answer to a file that cannot be read.
        NonNull::new(unsafe { ggml::llama_model_load_from_file(path.as_ptr(), params) })
            .map(|model| Self { model })
    }

    fn vocab(&self) -> *const ggml::llama_vocab {
        // SAFETY: the model lives as long as self.
        unsafe { ggml::llama_model_get_vocab(self.model.as_ptr()) }
    }

    /// The ids of `text`, with BOS and EOS as the file asks for when `add_special`.
    ///
    /// # Panics
    /// When the text or its ids are more than `i32::MAX`.
    #[must_use]
    pub fn tokenize(&self, text: &str, add_special: bool, parse_special: bool) -> Vec<i32> {
        let len = i32::try_from(text.len()).expect("text of less than 2 GiB");
        let mut ids = vec![0; text.len() + 8];
        loop {
            let room = i32::try_from(ids.len()).expect("ids fit an i32");
            // SAFETY: `text` holds `len` bytes and `ids` has room for `room` values; llama.cpp writes at most that many.
            let n = unsafe {
                ggml::llama_tokenize(
                    self.vocab(),
                    text.as_ptr().cast(),
                    len,
                    ids.as_mut_ptr(),
                    room,
                    add_special,
                    parse_special,
                )
            };
            match usize::try_from(n) {
                Ok(n) => {
                    ids.truncate(n);
                    return ids;
                }
                // More are needed: the negative of how many.
                Err(_) => ids.resize(n.unsigned_abs() as usize, 0),
            }
        }
    }

    /// The bytes of a token; of control tokens only when `special`.
    ///
    /// # Panics
    /// When `id` is not in the vocabulary.
    #[must_use]
    pub fn piece(&self, id: i32, special: bool) -> Vec<u8> {
        // SAFETY: the vocabulary lives as long as self.
        let size = unsafe { ggml::llama_vocab_n_tokens(self.vocab()) };
        assert!((0..size).contains(&id), "token {id} of {size}");
        let mut bytes = vec![0u8; 256];
        loop {
            let room = i32::try_from(bytes.len()).expect("a piece fits an i32");
            // SAFETY: `id` is in range and `bytes` has `room` bytes.
            let n = unsafe {
                ggml::llama_token_to_piece(self.vocab(), id, bytes.as_mut_ptr().cast(), room, 0, special)
            };
            match usize::try_from(n) {
                Ok(n) => {
                    bytes.truncate(n);
                    return bytes;
                }
                Err(_) => bytes.resize(n.unsigned_abs() as usize, 0),
            }
        }
    }
}

impl Drop for Vocab {
    fn drop(&mut self) {
        // SAFETY: the model is ours alone and not used again.
        unsafe { ggml::llama_model_free(self.model.as_ptr()) }
    }
}
