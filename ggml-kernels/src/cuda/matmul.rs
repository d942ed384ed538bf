//! Launches of the matrix kernels (`gpu_matmul.h`): which kernel, how many blocks, how the warps share the work.
use super::{Error, Launch, Matrix, Result, Stream};
use crate::contracts::*;
use crate::quant::Type;

/// What happens to the products of a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// `out = y`
    Store,
    /// `out += y`: the residual stream.
    Add,
    /// Of a gate and an up matrix: `out = silu(y0) * y1`.
    Glu,
}

/// One product of a launch.
#[derive(Clone, Copy)]
pub struct Product<'a> {
    /// The weights.
    pub matrix: &'a Matrix,
    /// Device address of `[n][rows]` floats. Of a [`Mode::Glu`] launch only the first product's counts.
    pub out: *mut f32,
}

/// The activation row of [`matvec`].
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// `[cols]` on the device.
    pub x: *const f32,
    /// RMSNorm's weights `[cols]`; null: none.
    pub norm: *const f32,
    /// RMSNorm's epsilon.
    pub eps: f32,
}

/// Up to [`CLSA_MATMUL_ROWS`] activation rows in fragment order, made by [`pack`].
#[derive(Clone, Copy, Debug)]
pub struct Packed {
    /// `[padded][cols to 128]` f16 on the device.
    pub a: *const half::f16,
    /// Rows.
    pub rows: usize,
    /// The factor that they carry.
    pub scale: f32,
}

/// Rows that `rows` are padded to in fragment order.
#[must_use]
pub fn padded(rows: usize) -> usize {
    match rows {
        0..=8 => 8,
        9..=32 => 32,
        _ => 64,
    }
}

/// Values of a buffer for `rows` activation rows of `cols` in fragment order.
#[must_use]
pub fn packed_len(rows: usize, cols: usize) -> usize {
    padded(rows) * cols.next_multiple_of(128)
}

fn tasks(
    products: &[Product<'_>],
    mode: Mode,
) -> Result<([clsa_matmul_task; CLSA_MATMUL_TASKS as usize], i32)> {
    let first = products.first().ok_or_else(|| Error::Range("no product in a launch".into()))?.matrix;
    let alike = |p: &Product<'_>| (p.matrix.cols(), p.matrix.ty()) == (first.cols(), first.ty());
    if products.len() > CLSA_MATMUL_TASKS as usize || !products.iter().all(alike) {
        let n = products.len();
        return Err(Error::Range(format!("{n} products of one launch, of equal type and columns wanted")));
    }
    if mode == Mode::Glu
        && !(products.len() == 2
            && products[1].matrix.ty() == first.ty()
            && products[1].matrix.rows() == first.rows())
    {
        return Err(Error::Range("gate and up of one type and shape wanted".into()));
    }
    if products.iter().any(|p| p.matrix.ty() == Type::F32) {
        return Err(Error::Range("F32 matrices have kernels of their own".into()));
    }
    let mut tasks = [clsa_matmul_task::default(); CLSA_MATMUL_TASKS as usize];
    for (task, product) in tasks.iter_mut().zip(products) {
        *task = clsa_matmul_task { w: product.matrix.view(), out: product.out };
    }
    Ok((tasks, products.len() as i32))
}

fn mode_number(mode: Mode) -> i32 {
    (match mode {
        Mode::Store => CLSA_STORE,
        Mode::Add => CLSA_ADD,
        Mode::Glu => CLSA_GLU,
    }) as i32
}

/// 16-row tiles of all products (GLU: 8-row tiles of both).
fn tile_count(products: &[Product<'_>], mode: Mode, per_block: usize) -> usize {
    match mode {
        Mode::Glu => products[0].matrix.rows().div_ceil(8 * per_block),
        _ => products.iter().map(|p| p.matrix.rows().div_ceil(16 * per_block)).sum(),
    }
}

/// How the one-row kernel is spread over the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spread {
    /// Warps of a block, which share the columns; at most [`Spread::most_warps`].
    pub warps: usize,
    /// Blocks of a multiprocessor; each takes tiles in turn.
    pub blocks: usize,
}

impl Spread {
    /// Warps that a block of the kernel for `ty` has at most: units of some types take registers enough for eight.
    #[must_use]
    pub fn most_warps(ty: Type) -> usize {
        let wide = matches!(ty, Type::Q8_0 | Type::Q5_K);
        (if wide { CLSA_MATVEC_WARPS_WIDE } else { CLSA_MATVEC_WARPS }) as usize
    }
    /// For `tiles` tiles of weights of `ty`, as measured on an H100 (docs/gpu-notes.md): so many warps that all of a tile is in flight at
    /// once; of types whose units take more registers, where the tiles fill the device, few warps a block and many blocks.
    #[must_use]
    pub fn of(ty: Type, tiles: usize, multiprocessors: usize) -> Self {
        match ty {
            Type::Q8_0 | Type::Q5_K if tiles > 2 * multiprocessors => Self { warps: 5, blocks: 3 },
            _ => Self { warps: Self::most_warps(ty), blocks: 2 },
        }
    }
}

/// Runs of products of one type.
fn same_type<'p, 'a>(products: &'p [Product<'a>]) -> impl Iterator<Item = &'p [Product<'a>]> {
    products.chunk_by(|a, b| a.matrix.ty() == b.matrix.ty())
}

/// Queues products with one activation row, one launch for each run of equal types; these run at the same time.
///
/// # Safety
/// The addresses are valid on the stream's device until the work is done, and no product writes what another reads or writes.
pub unsafe fn matvec(stream: &Stream, row: Row, products: &[Product<'_>], mode: Mode) -> Result<()> {
    let several = same_type(products).nth(1).is_some();
    for (i, now) in same_type(products).enumerate() {
        let spread =
            Spread::of(now[0].matrix.ty(), tile_count(now, mode, 1), stream.device().multiprocessors());
        let order = match (several, i) {
            (false, _) => CLSA_ALONE,
            (true, 0) => CLSA_LEADS,
            (true, _) => CLSA_BESIDE,
        };
        // SAFETY: the caller's.
        unsafe { matvec_in_order(stream, row, now, mode, spread, order) }?;
    }
    Ok(())
}

/// [`matvec`] of products of one type with a given spread, for benches.
///
/// # Safety
/// As [`matvec`].
pub unsafe fn matvec_with(
    stream: &Stream,
    row: Row,
    products: &[Product<'_>],
    mode: Mode,
    spread: Spread,
) -> Result<()> {
    // SAFETY: the caller's.
    unsafe { matvec_in_order(stream, row, products, mode, spread, CLSA_ALONE) }
}

unsafe fn matvec_in_order(
    stream: &Stream,
    row: Row,
    products: &[Product<'_>],
    mode: Mode,
    spread: Spread,
    order: clsa_matvec_order,
) -> Result<()> {
    let (task, n_tasks) = tasks(products, mode)?;
    let first = products[0].matrix;
    let n_tiles = tile_count(products, mode, 1);
    let units = first.cols().div_ceil(256);
    let warps = spread.warps.clamp(1, Spread::most_warps(first.ty()));
    let p = clsa_matvec {
        x: row.x,
        norm: row.norm,
        eps: row.eps,
        inverse_cols: 1.0 / first.cols() as f32,
        mode: mode_number(mode),
        n_tasks,
        n_tiles: n_tiles as i32,
        order: order as i32,
        units: units as i32,
        turns: units.next_multiple_of(warps) as i32,
        task,
    };
    let function = stream.device().function(&format!("clsa_matvec_{}_kernel", first.ty().name()))?;
    let shared = units * CLSA_MATVEC_UNIT as usize;
    let blocks = n_tiles.min(spread.blocks * stream.device().multiprocessors());
    let launch = Launch::new(blocks, 32 * warps).shared(shared).overlap();
    // SAFETY: the kernel's own struct; the rest is the caller's.
    unsafe { launch.run(stream, &function, &(p,)) }
}

/// Queues products with up to [`CLSA_MATMUL_ROWS`] activation rows. GLU writes `out_packed`, f16 in fragment order, times `out_scale`.
///
/// # Safety
/// As [`matvec`].
pub unsafe fn matmul(
    stream: &Stream,
    a: Packed,
    products: &[Product<'_>],
    mode: Mode,
    (out_packed, out_scale): (*mut half::f16, f32),
) -> Result<()> {
    if a.rows == 0 || a.rows > CLSA_MATMUL_ROWS as usize {
        return Err(Error::Range(format!("{} activation rows, 1 to {CLSA_MATMUL_ROWS} wanted", a.rows)));
    }
    for now in same_type(products) {
        let first = now[0];
        let (task, n_tasks) = tasks(now, mode)?;
        let n_padded = padded(a.rows);
        // The most rows a block, which read the activations once, that leave blocks for three multiprocessors in five; the other warps share
        // the columns (docs/gpu-notes.md).
        let wanted = stream.device().multiprocessors() * 3 / 5;
        let tile_warps = [8, 4, 2].into_iter().find(|&w| tile_count(now, mode, w) >= wanted).unwrap_or(1);
        let shares = (CLSA_MATMUL_WARPS as usize / tile_warps).min(first.matrix.cols().div_ceil(128)).max(1);
        let p = clsa_gpu_matmul {
            a: a.a.cast(),
            out_packed: out_packed.cast(),
            in_scale: a.scale,
            out_scale,
            n_rows: a.rows as i32,
            n_padded: n_padded as i32,
            mode: mode_number(mode),
            n_tasks,
            tile_warps: tile_warps as i32,
            reserved: 0,
            task,
        };
        let name = format!("clsa_matmul_{n_padded}_{}_kernel", first.matrix.ty().name());
        let function = stream.device().function(&name)?;
        let shared = (shares - 1) * tile_warps * (n_padded / 8) * 512;
        let blocks = tile_count(now, mode, tile_warps);
        let launch = Launch::new(blocks, 32 * tile_warps * shares).shared(shared).overlap();
        // SAFETY: the kernel's own struct; the rest is the caller's.
        unsafe { launch.run(stream, &function, &(p,)) }?;
    }
    Ok(())
}

/// Queues an RMSNorm or plain conversion of f32 rows to f16.
///
/// # Safety
/// As [`matvec`].
pub unsafe fn pack(stream: &Stream, p: clsa_gpu_pack) -> Result<()> {
    let blocks = if p.packed != 0 { p.n_padded } else { p.n_rows };
    let threads = ((p.cols as usize / 8).next_multiple_of(32)).clamp(32, 512);
    // SAFETY: the kernel's own struct; the rest is the caller's.
    unsafe {
        Launch::new(blocks as usize, threads).overlap().run(
            stream,
            &stream.device().function("clsa_pack_kernel")?,
            &(p,),
        )
    }
}

/// Queues an RMSNorm to f32 rows.
///
/// # Safety
/// As [`matvec`].
pub unsafe fn norm(stream: &Stream, p: clsa_norm) -> Result<()> {
    // SAFETY: the kernel's own struct; the rest is the caller's.
    unsafe {
        Launch::new(p.n_rows as usize, 256).overlap().run(
            stream,
            &stream.device().function("clsa_norm_kernel")?,
            &(p,),
        )
    }
}

/// Queues SwiGLU over rows of gate and up side by side.
///
/// # Safety
/// As [`matvec`].
pub unsafe fn glu(stream: &Stream, p: clsa_glu) -> Result<()> {
    let blocks = (p.ffn as usize / 4).div_ceil(256);
    // SAFETY: the kernel's own struct; the rest is the caller's.
    unsafe {
        Launch::new(1, 256).grid(blocks, (p.n_rows as usize).min(65_535), 1).overlap().run(
            stream,
            &stream.device().function("clsa_glu_kernel")?,
            &(p,),
        )
    }
}

/// Queues the lookup of embedding rows.
///
/// # Safety
/// As [`matvec`].
pub unsafe fn embed(stream: &Stream, p: clsa_embed) -> Result<()> {
    let groups = p.matrix.cols as usize / 32;
    // SAFETY: the kernel's own struct; the rest is the caller's.
    unsafe {
        Launch::new(1, 64).grid(groups.div_ceil(64), (p.n_rows as usize).min(65_535), 1).overlap().run(
            stream,
            &stream.device().function("clsa_embed_kernel")?,
            &(p,),
        )
    }
}

/// Queues a product with an F32 matrix in f32.
///
/// # Safety
/// As [`matvec`].
pub unsafe fn matmul_f32(
    stream: &Stream,
    x: *const f32,
    n_rows: usize,
    product: Product<'_>,
    mode: Mode,
) -> Result<()> {
    let m = product.matrix;
    if m.ty() != Type::F32 || mode == Mode::Glu {
        return Err(Error::Range("an F32 matrix to store or add wanted".into()));
    }
    let p = clsa_matmul_f32 {
        w: m.start().cast(),
        x,
        out: product.out,
        rows: m.rows() as i32,
        cols: m.cols() as i32,
        n_rows: n_rows as i32,
        mode: mode_number(mode),
    };
    // SAFETY: the kernel's own struct; the rest is the caller's.
    unsafe {
        Launch::new(1, 256).grid(m.rows().div_ceil(8), n_rows.min(65_535), 1).overlap().run(
            stream,
            &stream.device().function("clsa_matmul_f32_kernel")?,
            &(p,),
        )
    }
}

/// Queues the angles of rotary encoding.
///
/// # Safety
/// As [`matvec`].
pub unsafe fn angles(stream: &Stream, p: clsa_angles) -> Result<()> {
    let blocks = (p.n_rows as usize * p.half as usize).div_ceil(128);
    // SAFETY: the kernel's own struct; the rest is the caller's.
    unsafe {
        Launch::new(blocks, 128).overlap().run(
            stream,
            &stream.device().function("clsa_angles_kernel")?,
            &(p,),
        )
    }
}

/// Queues a copy of some rows.
///
/// # Safety
/// As [`matvec`].
pub unsafe fn select_rows(stream: &Stream, p: clsa_select_rows) -> Result<()> {
    let launch =
        Launch::new(1, 256).grid((p.cols as usize / 4).div_ceil(256), (p.n_rows as usize).min(65_535), 1);
    // SAFETY: the kernel's own struct; the rest is the caller's.
    unsafe { launch.overlap().run(stream, &stream.device().function("clsa_select_rows_kernel")?, &(p,)) }
}
