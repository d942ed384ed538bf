//! llama.cpp's own quantizer of whole files, to compare ours with: types, bytes and time.
use std::{ffi::CString, path::Path, ptr};

use super::init;
use crate::{ggml, quant::Type};

/// Options of [`file`].
#[derive(Clone, Debug, Default)]
pub struct Options<'a> {
    /// llama.cpp's number of the mix (`general.file_type`).
    pub file_type: u32,
    /// Worker threads.
    pub threads: usize,
    /// Every matrix of the mix's base type.
    pub pure: bool,
    /// Type of the output matrix.
    pub output: Option<Type>,
    /// Type of the embeddings.
    pub token_embedding: Option<Type>,
    /// Importance of columns by the name of the matrix; empty: none.
    pub imatrix: &'a [(String, Vec<f32>)],
}

/// Quantizes the GGUF file `input` to `output` with llama.cpp. Returns whether it succeeded.
///
/// # Panics
/// When a path or name contains a NUL.
#[must_use]
pub fn file(input: &Path, output: &Path, options: &Options<'_>) -> bool {
    init();
    let c_path = |p: &Path| CString::new(p.as_os_str().as_encoded_bytes()).expect("a path without NUL");
    let (input, output) = (c_path(input), c_path(output));
    let names: Vec<CString> =
        options.imatrix.iter().map(|(n, _)| CString::new(n.as_str()).expect("a name without NUL")).collect();
    let mut imatrix: Vec<_> = names
        .iter()
        .zip(options.imatrix)
        .map(|(name, (_, data))| ggml::llama_model_imatrix_data {
            name: name.as_ptr(),
            data: data.as_ptr(),
            size: data.len(),
        })
        .collect();
    // The list ends with an entry without a name.
    imatrix.push(ggml::llama_model_imatrix_data { name: ptr::null(), data: ptr::null(), size: 0 });
    // SAFETY: returns a plain struct.
    let mut params = unsafe { ggml::llama_model_quantize_default_params() };
    params.ftype = options.file_type as ggml::llama_ftype;
    params.nthread = i32::try_from(options.threads).unwrap_or(1);
    params.pure_ = options.pure;
    params.output_tensor_type = options.output.map_or(ggml::GGML_TYPE_COUNT, Type::to_ggml);
    params.token_embedding_type = options.token_embedding.map_or(ggml::GGML_TYPE_COUNT, Type::to_ggml);
    params.imatrix = if options.imatrix.is_empty() { ptr::null() } else { imatrix.as_ptr() };
    // SAFETY: the paths, names and the list outlive the call, and end with NUL or an empty entry; llama.cpp catches its exceptions.
    unsafe { ggml::llama_model_quantize(input.as_ptr(), output.as_ptr(), &raw const params) == 0 }
}
