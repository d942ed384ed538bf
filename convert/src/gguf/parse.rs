//! The header's parser: trusts nothing, allocates nothing that the file's size does not bound.
use std::collections::HashSet;

use ggml_kernels::quant;

use super::{DEFAULT_ALIGNMENT, Entry, MAX_DIMS, MAX_KEY, MAX_TENSOR_NAME, TensorInfo, Value, ValueType};

/// The largest alignment taken: no system pages or devices ask for more.
const MAX_ALIGNMENT: u64 = 1 << 30;

/// What is wrong, and where.
#[derive(Debug)]
pub(super) struct Damage {
    pub offset: u64,
    pub what: String,
}

type Result<T> = std::result::Result<T, Damage>;

/// The checked header.
#[derive(Debug)]
pub(super) struct Header {
    pub version: u32,
    pub entries: Vec<Entry>,
    pub tensors: Vec<TensorInfo>,
    pub alignment: usize,
    pub data_offset: usize,
}

/// Reads a GGUF header from the start of `bytes`, the whole file.
pub(super) fn header(bytes: &[u8]) -> Result<Header> {
    let mut cursor = Cursor { bytes, at: 0 };
    let version = cursor.magic_and_version()?;
    // A tensor's info takes at least 8 + 1 + 4 + 8 + 4 + 8 bytes, a metadata entry 8 + 1 + 4 + 1.
    let n_tensors = cursor.count("tensors", 33)?;
    let n_entries = cursor.count("metadata entries", 14)?;
    let entries = entries(&mut cursor, n_entries)?;
    let alignment = alignment(bytes, &entries)?;
    let mut tensors = tensors(&mut cursor, n_tensors, alignment)?;
    let data_offset = cursor.at.next_multiple_of(alignment);
    place(&mut tensors, data_offset, bytes.len())?;
    Ok(Header {
        version,
        entries,
        tensors: tensors.into_iter().map(|t| t.info).collect(),
        alignment,
        data_offset,
    })
}

struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

fn damage<T>(at: usize, what: impl Into<String>) -> Result<T> {
    Err(Damage { offset: at as u64, what: what.into() })
}

impl<'a> Cursor<'a> {
    fn take(&mut self, n: u64, what: &str) -> Result<&'a [u8]> {
        let left = &self.bytes[self.at..];
        let Some(bytes) = usize::try_from(n).ok().and_then(|n| left.get(..n)) else {
            return damage(
                self.at,
                format!("the file ends within {what}: {n} bytes expected, {} left", left.len()),
            );
        };
        self.at += bytes.len();
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N as u64, what)?);
        Ok(array)
    }

    fn u32(&mut self, what: &str) -> Result<u32> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Result<u64> {
        self.array(what).map(u64::from_le_bytes)
    }

    fn magic_and_version(&mut self) -> Result<u32> {
        let magic = self.array::<4>("the magic")?;
        if magic != *b"GGUF" {
            return damage(
                0,
                format!(
                    "not a GGUF file: expected the magic \"GGUF\", found {:?}",
                    magic.escape_ascii().to_string()
                ),
            );
        }
        match self.u32("the version")? {
            version @ (2 | 3) => Ok(version),
            version if matches!(version.swap_bytes(), 1..=3) => {
                damage(4, "the file is big-endian: expected little-endian")
            }
            version => damage(4, format!("version {version} of GGUF: expected 2 or 3")),
        }
    }

    /// A number of things that take `least` bytes each at least.
    fn count(&mut self, what: &str, least: u64) -> Result<usize> {
        let at = self.at;
        let n = self.u64(&format!("the number of {what}"))?;
        let most = self.bytes.len() as u64 / least;
        if n > most {
            return damage(
                at,
                format!("{n} {what}: a file of {} bytes has at most {most}", self.bytes.len()),
            );
        }
        Ok(n as usize)
    }

    /// A string with its length, at most `most` bytes.
    fn string(&mut self, what: &str, most: u64) -> Result<&'a str> {
        let at = self.at;
        let len = self.u64(what)?;
        if len > most {
            return damage(at, format!("{what} of {len} bytes: at most {most} expected"));
        }
        let start = self.at;
        match std::str::from_utf8(self.take(len, what)?) {
            Ok(text) => Ok(text),
            Err(e) => damage(start + e.valid_up_to(), format!("{what} is not UTF-8")),
        }
    }

    fn value_type(&mut self, key: &str) -> Result<ValueType> {
        let at = self.at;
        let number = self.u32("a value's type")?;
        ValueType::from_number(number).map_or_else(
            || damage(at, format!("key {key}: unknown value type {number}: expected 0 to 12")),
            Ok,
        )
    }

    /// One value that is no array; returns where its content begins.
    fn scalar(&mut self, ty: ValueType, key: &str) -> Result<usize> {
        let Some(width) = ty.width() else {
            let text = self.string(&format!("a string of key {key}"), u64::MAX)?;
            return Ok(self.at - text.len());
        };
        let at = self.at;
        let bytes = self.take(width as u64, &format!("the value of key {key}"))?;
        if Value::from_bytes(ty, bytes).is_none() {
            return damage(at, format!("key {key}: a bool of value {bytes:?}: expected 0 or 1"));
        }
        Ok(at)
    }

    fn entry(&mut self) -> Result<Entry> {
        let at = self.at;
        let key = self.string("a key", MAX_KEY as u64)?;
        if key.is_empty() {
            return damage(at, "an empty key");
        }
        let ty = self.value_type(key)?;
        let (array, at) = if ty == ValueType::Array {
            let at = self.at;
            let element = self.value_type(key)?;
            if element == ValueType::Array {
                return damage(at, format!("key {key}: an array of arrays is not supported"));
            }
            let len = self.count(&format!("elements in key {key}"), element.width().unwrap_or(8) as u64)?;
            let at = self.at;
            match element.width() {
                Some(width) if element != ValueType::Bool => {
                    // `count` bounds len * width by the file's size.
                    self.take((len * width) as u64, &format!("the array of key {key}"))?;
                }
                _ => (0..len).try_for_each(|_| self.scalar(element, key).map(drop))?,
            }
            (Some((element, len)), at)
        } else {
            (None, self.scalar(ty, key)?)
        };
        Ok(Entry { key: key.to_owned(), ty, array, at, len: self.at - at })
    }

    fn tensor(&mut self, alignment: usize) -> Result<Placed> {
        let at = self.at;
        let name = self.string("a tensor's name", MAX_TENSOR_NAME as u64)?;
        if name.is_empty() {
            return damage(at, "a tensor without a name");
        }
        let dims_at = self.at;
        let n_dims = self.u32("a tensor's number of dimensions")?;
        if n_dims == 0 || n_dims as usize > MAX_DIMS {
            return damage(dims_at, format!("tensor {name}: {n_dims} dimensions: expected 1 to {MAX_DIMS}"));
        }
        let shape = (0..n_dims).map(|_| self.u64("a tensor's shape")).collect::<Result<Vec<_>>>()?;
        let type_at = self.at;
        let number = self.u32("a tensor's type")?;
        let Some(ty) = quant::Type::from_ggml(number) else {
            let known: Vec<_> = quant::Type::ALL.iter().map(|t| t.name()).collect();
            let what = format!(
                "tensor {name}: type number {number} is not supported: expected one of {}",
                known.join(", ")
            );
            return damage(type_at, what);
        };
        let bytes = tensor_bytes(&shape, ty)
            .or_else(|why| damage(dims_at, format!("tensor {name}: shape {shape:?} of {ty}: {why}")))?;
        let offset_at = self.at;
        let offset = self.u64("a tensor's offset")?;
        if !offset.is_multiple_of(alignment as u64) {
            return damage(
                offset_at,
                format!("tensor {name}: offset {offset} is not a multiple of the alignment {alignment}"),
            );
        }
        let info = TensorInfo { name: name.to_owned(), shape, ty, offset: 0, bytes };
        Ok(Placed { info, relative: offset, offset_at })
    }
}

/// Bytes of a tensor, or why its shape cannot be.
pub(super) fn tensor_bytes(shape: &[u64], ty: quant::Type) -> std::result::Result<usize, String> {
    if shape.contains(&0) {
        return Err("a dimension is zero".into());
    }
    let elements = shape.iter().try_fold(1u64, |n, &d| n.checked_mul(d)).filter(|&n| n <= i64::MAX as u64);
    let row = usize::try_from(shape[0]).ok();
    let (Some(elements), Some(row)) = (elements, row) else {
        return Err("more values than can be counted".into());
    };
    if !row.is_multiple_of(ty.block_len()) {
        return Err(format!("rows of {row} values are not whole blocks of {}", ty.block_len()));
    }
    let rows = usize::try_from(elements / shape[0]).ok();
    rows.and_then(|rows| rows.checked_mul(ty.row_bytes(row)?))
        .filter(|&n| n <= isize::MAX as usize)
        .ok_or_else(|| "more bytes than can be addressed".into())
}

/// A tensor whose offset is still relative to the data.
struct Placed {
    info: TensorInfo,
    relative: u64,
    offset_at: usize,
}

fn entries(cursor: &mut Cursor<'_>, n: usize) -> Result<Vec<Entry>> {
    let mut entries: Vec<Entry> = Vec::new();
    let mut seen = HashSet::new();
    for _ in 0..n {
        let at = cursor.at;
        let entry = cursor.entry()?;
        if !seen.insert(entry.key.clone()) {
            return damage(at, format!("key {} appears twice", entry.key));
        }
        entries.push(entry);
    }
    Ok(entries)
}

fn alignment(bytes: &[u8], entries: &[Entry]) -> Result<usize> {
    let Some(entry) = entries.iter().find(|e| e.key == "general.alignment") else {
        return Ok(DEFAULT_ALIGNMENT);
    };
    let value = bytes.get(entry.at..entry.at + entry.len).and_then(|b| Value::from_bytes(entry.ty, b));
    match value {
        Some(Value::Unsigned(ValueType::U32, n))
            if n.is_power_of_two() && (8..=MAX_ALIGNMENT).contains(&n) =>
        {
            Ok(n as usize)
        }
        _ => damage(
            entry.at,
            format!("general.alignment: expected a u32 that is a power of two from 8 to {MAX_ALIGNMENT}"),
        ),
    }
}

fn tensors(cursor: &mut Cursor<'_>, n: usize, alignment: usize) -> Result<Vec<Placed>> {
    let mut tensors: Vec<Placed> = Vec::new();
    let mut seen = HashSet::new();
    for _ in 0..n {
        let at = cursor.at;
        let tensor = cursor.tensor(alignment)?;
        if !seen.insert(tensor.info.name.clone()) {
            return damage(at, format!("tensor {} appears twice", tensor.info.name));
        }
        tensors.push(tensor);
    }
    Ok(tensors)
}

/// Turns relative offsets into absolute ones; each tensor must lie within the file and apart from all others.
fn place(tensors: &mut [Placed], data_offset: usize, file: usize) -> Result<()> {
    for t in &mut *tensors {
        let start = usize::try_from(t.relative).ok().and_then(|o| o.checked_add(data_offset));
        let end = start.and_then(|s| s.checked_add(t.info.bytes)).filter(|&end| end <= file);
        let (Some(start), Some(_)) = (start, end) else {
            let what = format!(
                "tensor {}: its {} bytes at data offset {} end past the file's {file} bytes: the file is cut short or damaged",
                t.info.name, t.info.bytes, t.relative
            );
            return damage(t.offset_at, what);
        };
        t.info.offset = start;
    }
    let mut order: Vec<&Placed> = tensors.iter().collect();
    order.sort_by_key(|t| t.info.offset);
    for pair in order.windows(2) {
        let [first, second] = pair else { continue };
        if first.info.offset + first.info.bytes > second.info.offset {
            return damage(
                second.offset_at,
                format!("tensors {} and {} overlap", first.info.name, second.info.name),
            );
        }
    }
    Ok(())
}
