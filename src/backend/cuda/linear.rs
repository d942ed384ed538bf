//! Products with weights: which kernel for how many rows.
use ggml_kernels::contracts::{clsa_glu, clsa_gpu_pack, clsa_norm};
use ggml_kernels::cuda::blas::{Output, Shape};
use ggml_kernels::cuda::matmul::{self, Mode, Packed, Product, Row};
use ggml_kernels::cuda::weight_scale;
use ggml_kernels::quant::Type;
use half::f16;

use super::Cuda;
use super::scratch::{FEW, glu_in_one};
use crate::error::Result;
use crate::model::{Layer, Weight};

/// Activations in f32, `[n][cols]`.
#[derive(Clone, Copy)]
pub struct Input {
    pub x: *const f32,
    pub n: usize,
    /// Weights of an RMSNorm that comes first; null: none.
    pub norm: *const f32,
    pub eps: f32,
    /// Factor before rounding to f16.
    pub scale: f32,
}

/// What keeps the feed-forward's hidden values, whose outliers go far, inside f16's range.
const HIDDEN_SCALE: f32 = 1.0 / 16.0;

impl Cuda {
    /// Each weight times the input, stored or added.
    pub(super) fn linear(&mut self, input: Input, out: &[(&Weight, *mut f32)], mode: Mode) -> Result<()> {
        if out.iter().any(|(w, _)| w.ty == Type::F32) {
            return self.linear_f32(input, out, mode);
        }
        if self.expands(&out.iter().map(|&(w, _)| w).collect::<Vec<_>>()) {
            return self.linear_many(input, out, mode);
        }
        let cols = out[0].0.n_in;
        let products: Vec<_> =
            out.iter().map(|&(w, to)| Product { matrix: self.weights.matrix(w), out: to }).collect();
        if input.n == 1 {
            let row = Row { x: input.x, norm: input.norm, eps: input.eps };
            // SAFETY: buffers of this backend, sized for max_rows.
            return Ok(unsafe { matmul::matvec(&self.stream, row, &products, mode) }?);
        }
        for first in (0..input.n).step_by(FEW) {
            let rows = FEW.min(input.n - first);
            let packed =
                self.pack(Input { x: input.x.wrapping_add(first * cols), n: rows, ..input }, cols)?;
            let now: Vec<_> = products
                .iter()
                .map(|p| Product { matrix: p.matrix, out: p.out.wrapping_add(first * p.matrix.rows()) })
                .collect();
            // SAFETY: as above.
            unsafe { matmul::matmul(&self.stream, packed, &now, mode, (std::ptr::null_mut(), 1.0)) }?;
        }
        Ok(())
    }

    /// Whether the rows in hand are multiplied with these weights expanded to f16.
    pub(super) fn expands(&self, weights: &[&Weight]) -> bool {
        let fits = |w: &&Weight| w.ty != Type::F32 && w.n_in * w.n_out <= self.s.w16.len();
        self.rows().0 > FEW && self.blas.is_some() && weights.iter().all(fits)
    }

    /// Up to [`FEW`] rows as f16 in fragment order.
    fn pack(&self, input: Input, cols: usize) -> Result<Packed> {
        let p = clsa_gpu_pack {
            x: input.x,
            norm: input.norm,
            out: self.s.a16.ptr().cast(),
            eps: input.eps,
            scale: input.scale,
            n_rows: input.n as i32,
            n_padded: matmul::padded(input.n) as i32,
            cols: cols as i32,
            packed: 1,
        };
        // SAFETY: a16 holds packed_len of that many rows of the widest input.
        unsafe { matmul::pack(&self.stream, p) }?;
        Ok(Packed { a: self.s.a16.ptr(), rows: input.n, scale: input.scale })
    }

    /// Rows as f16, row-major.
    fn halves(&self, input: Input, cols: usize) -> Result<()> {
        let p = clsa_gpu_pack {
            x: input.x,
            norm: input.norm,
            out: self.s.a16.ptr().cast(),
            eps: input.eps,
            scale: input.scale,
            n_rows: input.n as i32,
            n_padded: input.n as i32,
            cols: cols as i32,
            packed: 0,
        };
        // SAFETY: a16 holds max_rows of the widest input.
        Ok(unsafe { matmul::pack(&self.stream, p) }?)
    }

    /// Queues the expansion of matrices side by side, then one product with f16 rows. Their weights carry one scale.
    fn expanded(
        &mut self,
        x: *const f16,
        n: usize,
        matrices: &[&Weight],
        out: *mut std::ffi::c_void,
        output: Output,
        alpha: f32,
    ) -> Result<()> {
        let cols = matrices[0].n_in;
        let mut rows = 0;
        for w in matrices {
            // SAFETY: w16 holds the largest matrix, and gate and up together.
            unsafe { self.weights.matrix(w).dequantize(&self.stream, self.s.w16.at(rows * cols)) }?;
            rows += w.n_out;
        }
        let shape = Shape { n, rows, cols, stride: rows, output };
        let alpha = alpha / weight_scale(matrices[0].ty);
        if let Some(blas) = &mut self.blas {
            // SAFETY: buffers of this backend, sized for max_rows; one stream.
            unsafe { blas.matmul(&self.stream, shape, alpha, self.s.w16.ptr(), x, out) }?;
        }
        Ok(())
    }

    fn linear_many(&mut self, input: Input, out: &[(&Weight, *mut f32)], mode: Mode) -> Result<()> {
        self.halves(input, out[0].0.n_in)?;
        let output = if mode == Mode::Add { Output::AddF32 } else { Output::F32 };
        for &(w, to) in out {
            self.expanded(self.s.a16.ptr(), input.n, &[w], to.cast(), output, 1.0 / input.scale)?;
        }
        Ok(())
    }

    /// Products with at least one F32 matrix.
    fn linear_f32(&mut self, input: Input, out: &[(&Weight, *mut f32)], mode: Mode) -> Result<()> {
        let mut x = input.x;
        if !input.norm.is_null() {
            let p = clsa_norm {
                x,
                norm: input.norm,
                out: self.s.normed.ptr(),
                eps: input.eps,
                n_rows: input.n as i32,
                cols: out[0].0.n_in as i32,
            };
            // SAFETY: `normed` holds max_rows of the widest input.
            unsafe { matmul::norm(&self.stream, p) }?;
            x = self.s.normed.ptr();
        }
        for &(w, to) in out {
            if w.ty == Type::F32 {
                let product = Product { matrix: self.weights.matrix(w), out: to };
                // SAFETY: buffers of this backend, sized for max_rows.
                unsafe { matmul::matmul_f32(&self.stream, x, input.n, product, mode) }?;
            } else {
                let plain = Input { x, norm: std::ptr::null(), ..input };
                self.linear(plain, &[(w, to)], mode)?;
            }
        }
        Ok(())
    }

    /// `x += Wo attended`
    pub(super) fn output(&mut self, o: &Weight) -> Result<()> {
        let (n, x) = self.rows();
        if std::mem::take(&mut self.state.halves) {
            return self.expanded(self.s.a16.ptr(), n, &[o], x.cast(), Output::AddF32, 1.0);
        }
        let input = Input { x: self.s.attended.ptr(), n, norm: std::ptr::null(), eps: 0.0, scale: 1.0 };
        self.linear(input, &[(o, x)], Mode::Add)
    }

    /// `x += Wdown( silu(Wgate b) * (Wup b) )`, `b = RMS(x)`
    pub(super) fn gated(&mut self, layer: &Layer) -> Result<()> {
        let ffn = &layer.ffn;
        let (input, (n, x)) = (self.residual(&ffn.norm), self.rows());
        let hidden = |x| Input { x, n, norm: std::ptr::null(), eps: 0.0, scale: HIDDEN_SCALE };
        if !glu_in_one(layer) {
            let (gate, up) = (self.s.gate.ptr(), self.s.up.ptr());
            self.linear(input, &[(&ffn.gate, gate), (&ffn.up, up)], Mode::Store)?;
            let p = clsa_glu {
                gate: gate.cast(),
                up: up.cast(),
                out: gate.cast(),
                in_scale: 1.0,
                scale: 1.0,
                n_rows: n as i32,
                ffn: ffn.gate.n_out as i32,
                stride: ffn.gate.n_out as i32,
                in_f16: 0,
                out_f32: 1,
                reserved: 0,
            };
            // SAFETY: each thread reads its own values before it writes them.
            unsafe { matmul::glu(&self.stream, p) }?;
            return self.linear(hidden(gate), &[(&ffn.down, x)], Mode::Add);
        }
        if n > FEW && self.blas.is_some() {
            return self.gated_many(layer, input, x);
        }
        let [gate, up, down] = [&ffn.gate, &ffn.up, &ffn.down].map(|w| self.weights.matrix(w));
        if n == 1 {
            let to = self.s.gate.ptr();
            let row = Row { x: input.x, norm: input.norm, eps: input.eps };
            let products = [Product { matrix: gate, out: to }, Product { matrix: up, out: to }];
            // SAFETY: buffers of this backend, sized for max_rows.
            unsafe { matmul::matvec(&self.stream, row, &products, Mode::Glu) }?;
            return self.linear(hidden(to), &[(&ffn.down, x)], Mode::Add);
        }
        let (cols, width) = (ffn.gate.n_in, ffn.down.n_out);
        let none = std::ptr::null_mut();
        for first in (0..n).step_by(FEW) {
            let rows = FEW.min(n - first);
            let packed =
                self.pack(Input { x: input.x.wrapping_add(first * cols), n: rows, ..input }, cols)?;
            let products = [Product { matrix: gate, out: none }, Product { matrix: up, out: none }];
            let h = self.s.h16.ptr();
            let hidden = Packed { a: h, rows, scale: HIDDEN_SCALE };
            let last = [Product { matrix: down, out: x.wrapping_add(first * width) }];
            // SAFETY: as above; h16 holds packed_len of FEW rows.
            unsafe {
                matmul::matmul(&self.stream, packed, &products, Mode::Glu, (h, HIDDEN_SCALE))?;
                matmul::matmul(&self.stream, hidden, &last, Mode::Add, (none.cast(), 1.0))?;
            }
        }
        Ok(())
    }

    fn gated_many(&mut self, layer: &Layer, input: Input, x: *mut f32) -> Result<()> {
        let ffn = &layer.ffn;
        self.halves(input, ffn.gate.n_in)?;
        let gu = self.s.gu16.ptr();
        self.expanded(
            self.s.a16.ptr(),
            input.n,
            &[&ffn.gate, &ffn.up],
            gu.cast(),
            Output::F16,
            HIDDEN_SCALE,
        )?;
        let width = ffn.gate.n_out;
        let p = clsa_glu {
            gate: gu.cast(),
            up: self.s.gu16.at(width).cast(),
            out: self.s.h16.ptr().cast(),
            in_scale: 1.0 / HIDDEN_SCALE,
            scale: HIDDEN_SCALE,
            n_rows: input.n as i32,
            ffn: width as i32,
            stride: 2 * width as i32,
            in_f16: 1,
            out_f32: 0,
            reserved: 0,
        };
        // SAFETY: gu16 and h16 hold max_rows rows.
        unsafe { matmul::glu(&self.stream, p) }?;
        self.expanded(self.s.h16.ptr(), input.n, &[&ffn.down], x.cast(), Output::AddF32, 1.0 / HIDDEN_SCALE)
    }
}
