//! What enters llama.cpp's matrix products, as llama-imatrix sees it.
use std::ffi::{CStr, c_void};

use crate::ggml as g;

/// Hears the name of the weight and the rows `[rows][n_in]` that it multiplies.
pub type Observer = Box<dyn FnMut(&str, usize, &[f32]) + Send>;

/// llama.cpp's callback for graph nodes: first it asks whether a node is of interest, later it shows the finished node. `data` is the
/// address of an [`Observer`] that outlives the context.
pub(super) unsafe extern "C" fn see(node: *mut g::ggml_tensor, ask: bool, data: *mut c_void) -> bool {
    // SAFETY: llama.cpp hands over a live node of its graph, whose sources are live too; `data` as above.
    unsafe {
        let [weight, x] = [(*node).src[0], (*node).src[1]];
        if (*node).op != g::GGML_OP_MUL_MAT || weight.is_null() || x.is_null() {
            return !ask;
        }
        let name = CStr::from_ptr((*weight).name.as_ptr()).to_string_lossy();
        if !name.ends_with(".weight") {
            return !ask;
        }
        if ask {
            return true;
        }
        assert!((*x).type_ == g::GGML_TYPE_F32 && g::ggml_is_contiguous(x), "rows of floats enter {name}");
        let rows = std::slice::from_raw_parts((*x).data.cast::<f32>(), g::ggml_nelements(x) as usize);
        (*data.cast::<Observer>())(&name, (*x).ne[0] as usize, rows);
    }
    true
}
