//! Bounds checks of the op parameters: each returns what is wrong.
use crate::contracts::*;

pub(crate) type Check = Result<(), String>;

/// Positions are below this, so that the kernels may add to them.
const MAX_POSITIONS: i32 = 1 << 30;

macro_rules! ensure {
    ($ok:expr, $($what:tt)+) => {
        if !$ok {
            return Err(format!($($what)+));
        }
    };
}

/// Slices of a batch, which every check of rows goes by.
struct Batch<'a> {
    pos: &'a [i32],
    slot: &'a [i32],
    raw: &'a clsa_batch,
}

fn batch(raw: &clsa_batch) -> Result<Batch<'_>, String> {
    ensure!(raw.n_rows > 0 && raw.n_slots > 0, "{} rows, {} slots: at least one", raw.n_rows, raw.n_slots);
    ensure!(!raw.pos.is_null() && !raw.slot.is_null(), "pos or slot is null");
    let n = raw.n_rows as usize;
    // SAFETY: the header says [n_rows] of both; not null, and the caller of an op vouches for their length.
    let (pos, slot) =
        unsafe { (std::slice::from_raw_parts(raw.pos, n), std::slice::from_raw_parts(raw.slot, n)) };
    for (r, (&pos, &slot)) in pos.iter().zip(slot).enumerate() {
        ensure!((0..MAX_POSITIONS).contains(&pos), "row {r}: position {pos}, 0 up to {MAX_POSITIONS} wanted");
        ensure!((0..raw.n_slots).contains(&slot), "row {r}: slot {slot} of {}", raw.n_slots);
    }
    Ok(Batch { pos, slot, raw })
}

/// Type, width and strides of a pool against the memory it states.
fn pool(rows: &clsa_rows, width: i32, n_slots: i32) -> Check {
    ensure!(!rows.base.is_null(), "the pool's base is null");
    ensure!(rows.width == width, "rows of {} values, {width} wanted", rows.width);
    let values = width as usize;
    let (bytes, align) = match rows.type_ as u32 {
        CLSA_F32 => (values * 4, 4),
        CLSA_F16 => (values * 2, 2),
        CLSA_Q8_0 => (values / CLSA_QK8_0 as usize * (CLSA_QK8_0 as usize + 2), 2),
        other => return Err(format!("cache type {other}: F32, F16 or Q8_0 wanted")),
    };
    ensure!(
        rows.row_stride >= bytes && rows.row_stride.is_multiple_of(align),
        "row stride {}, rows are of {bytes} bytes",
        rows.row_stride
    );
    ensure!(rows.base.addr().is_multiple_of(align), "the pool's base is not aligned to {align}");
    ensure!(rows.ring >= 0, "ring of {} positions", rows.ring);
    let held = if rows.ring > 0 { rows.ring as usize } else { CLSA_PAGE as usize };
    let needed = held.checked_mul(rows.row_stride);
    ensure!(
        needed.is_some_and(|n| n <= rows.page_stride) && rows.page_stride.is_multiple_of(align),
        "page stride {}, {held} rows of {} bytes",
        rows.page_stride,
        rows.row_stride
    );
    if rows.ring > 0 {
        let all = rows.page_stride.checked_mul(n_slots as usize);
        ensure!(all.is_some_and(|a| a <= rows.bytes), "{n_slots} rings do not fit {} bytes", rows.bytes);
    }
    Ok(())
}

fn head_dim(d: i32, types: &[&clsa_rows]) -> Check {
    ensure!(
        d > 0 && d % 16 == 0 && d <= CLSA_MAX_D as i32,
        "{d} values: a multiple of 16 up to {CLSA_MAX_D}"
    );
    let q8 = types.iter().any(|r| r.type_ as u32 == CLSA_Q8_0);
    ensure!(!q8 || d % CLSA_QK8_0 as i32 == 0, "{d} values in Q8_0: a multiple of {CLSA_QK8_0}");
    Ok(())
}

fn heads(n_head: i32, n_kv: i32, d: i32) -> Check {
    ensure!(n_kv > 0 && n_head > 0 && n_head % n_kv == 0, "{n_head} query heads over {n_kv} KV heads");
    ensure!(i64::from(n_head) * i64::from(d) < i64::from(i32::MAX), "{n_head} heads of {d} are too wide");
    Ok(())
}

/// That positions 0..=pos of a slot lie in the pool (paged), for positions from `first` on.
fn pages(rows: &clsa_rows, batch: &clsa_batch, slot: i32, first: i32, last: i32) -> Check {
    if rows.ring > 0 {
        return Ok(());
    }
    let page = CLSA_PAGE as i32;
    ensure!(!batch.tables.is_null(), "page tables are null");
    ensure!(
        last / page < batch.table_stride,
        "position {last} is past the page table of {} pages",
        batch.table_stride
    );
    for i in first / page..=last / page {
        let at = slot as usize * batch.table_stride as usize + i as usize;
        // SAFETY: the header says [n_slots][table_stride]; slot < n_slots and i < table_stride are checked.
        let entry = unsafe { *batch.tables.add(at) } as usize;
        let end = (entry + 1).checked_mul(rows.page_stride);
        ensure!(
            end.is_some_and(|e| e <= rows.bytes),
            "slot {slot}, page {i}: page number {entry} is outside the pool"
        );
    }
    Ok(())
}

/// Runs of rows of one sequence as (slot, first position, last position).
fn runs<'a>(b: &'a Batch) -> impl Iterator<Item = (i32, i32, i32)> + 'a {
    let mut r = 0;
    std::iter::from_fn(move || {
        let start = r;
        let slot = *b.slot.get(r)?;
        while b.slot.get(r) == Some(&slot) && (r == start || b.pos[r] > b.pos[r - 1]) {
            r += 1;
        }
        Some((slot, b.pos[start], b.pos[r - 1]))
    })
}

/// That every row may read positions `pos - reach + 1 ..= pos` (all where `reach` is 0) of the pool.
fn readable(rows: &clsa_rows, b: &Batch, reach: i32) -> Check {
    for (slot, first, last) in runs(b) {
        let from = if reach > 0 { (first + 1).saturating_sub(reach).max(0) } else { 0 };
        pages(rows, b.raw, slot, from, last)?;
        ensure!(
            rows.ring == 0 || last - from < rows.ring,
            "a ring of {} positions does not hold {from}..={last}",
            rows.ring
        );
    }
    Ok(())
}

pub(crate) fn rope_append(p: &clsa_rope_append) -> Check {
    let b = batch(&p.batch)?;
    let (k, v) = (!p.k_cache.base.is_null(), !p.v_cache.base.is_null());
    let used: Vec<&clsa_rows> =
        [(k, &p.k_cache), (v, &p.v_cache)].into_iter().filter_map(|(on, r)| on.then_some(r)).collect();
    head_dim(p.d, &used)?;
    heads(p.n_head.max(p.n_kv), p.n_kv, p.d)?;
    ensure!(p.q.is_null() || !p.q_out.is_null(), "q without q_out");
    ensure!(!k || !p.k.is_null(), "a K cache without k");
    ensure!(!v || !p.v.is_null(), "a V cache without v");
    ensure!(p.cos.is_null() == p.sin.is_null(), "one of cos and sin");
    ensure!(
        p.cos.is_null() || (p.n_rot > 0 && p.n_rot % 2 == 0 && p.n_rot <= p.d),
        "{} rotated dimensions of {}",
        p.n_rot,
        p.d
    );
    for rows in used {
        pool(rows, p.n_kv * p.d, p.batch.n_slots)?;
        for (slot, first, last) in runs(&b) {
            pages(rows, &p.batch, slot, first, last)?;
            ensure!(
                rows.ring == 0 || last - first < rows.ring,
                "a ring of {} wraps within the batch",
                rows.ring
            );
        }
    }
    Ok(())
}

pub(crate) fn attention(p: &clsa_attention) -> Check {
    let b = batch(&p.batch)?;
    head_dim(p.d, &[&p.k, &p.v])?;
    heads(p.n_head, p.n_kv, p.d)?;
    ensure!(p.window >= 0, "window of {}", p.window);
    ensure!(!p.q.is_null() && !p.out.is_null(), "q or out is null");
    for rows in [&p.k, &p.v] {
        pool(rows, p.n_kv * p.d, p.batch.n_slots)?;
        readable(rows, &b, p.window)?;
    }
    Ok(())
}

pub(crate) fn gather_attention(p: &clsa_gather_attention) -> Check {
    let b = batch(&p.batch)?;
    head_dim(p.d, &[&p.k, &p.v])?;
    heads(p.n_head, p.n_kv, p.d)?;
    ensure!(!p.q.is_null() && !p.out.is_null(), "q or out is null");
    ensure!(!p.selected.is_null() && !p.count.is_null(), "selected or count is null");
    ensure!(p.n_columns > 0, "{} columns of selected", p.n_columns);
    for rows in [&p.k, &p.v] {
        pool(rows, p.n_kv * p.d, p.batch.n_slots)?;
        readable(rows, &b, 0)?;
    }
    Ok(())
}

pub(crate) fn route(p: &clsa_route) -> Check {
    let b = batch(&p.batch)?;
    head_dim(p.d, &[&p.keys])?;
    ensure!(!p.q.is_null() && !p.selected.is_null() && !p.count.is_null(), "q, selected or count is null");
    ensure!(p.k > 0 && (0..=1 << 20).contains(&p.block), "k = {}, block = {}", p.k, p.block);
    let block = p.block.max(1);
    let most = (i64::from(p.k / block).max(1) * i64::from(block)).max(i64::from(p.k));
    let longest = b.pos.iter().max().map_or(0, |&t| i64::from(t) + 1);
    ensure!(
        i64::from(p.n_columns) >= most.min(longest),
        "{} columns do not hold a selection of {}",
        p.n_columns,
        most.min(longest)
    );
    pool(&p.keys, p.d, p.batch.n_slots)?;
    readable(&p.keys, &b, 0)
}

pub(crate) fn score(p: &clsa_score) -> Check {
    head_dim(p.d, &[&p.keys])?;
    ensure!(!p.q.is_null() && !p.out.is_null(), "q or out is null");
    ensure!((0..p.batch.n_slots).contains(&p.slot), "slot {} of {}", p.slot, p.batch.n_slots);
    let end = p.start.checked_add(p.n).filter(|_| p.start >= 0 && p.n > 0);
    let Some(end) = end else { return Err(format!("{} positions from {}", p.n, p.start)) };
    pool(&p.keys, p.d, p.batch.n_slots)?;
    ensure!(p.keys.ring == 0 || p.n <= p.keys.ring, "{} positions in a ring of {}", p.n, p.keys.ring);
    pages(&p.keys, &p.batch, p.slot, p.start, end - 1)
}

pub(crate) fn topk(p: &clsa_topk) -> Check {
    ensure!(p.n > 0 && p.k > 0, "k = {} of {}", p.k, p.n);
    ensure!(!p.scores.is_null() && !p.selected.is_null(), "scores or selected is null");
    Ok(())
}

pub(crate) use crate::matmul::{check_matmul as matmul, check_pack as pack};
