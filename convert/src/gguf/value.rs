//! Metadata values as they lie in the file.

macro_rules! value_types {
    ($($variant:ident = $number:literal, $width:literal, $name:literal;)*) => {
        /// The type of a metadata value, with GGUF's number.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u32)]
        pub enum ValueType {
            $(#[doc = concat!("`", $name, "`")] $variant = $number,)*
        }

        impl ValueType {
            /// The type with GGUF's `number`.
            #[must_use]
            pub const fn from_number(number: u32) -> Option<Self> {
                match number { $($number => Some(Self::$variant),)* _ => None }
            }
            /// Bytes of a value; `None` for strings and arrays.
            #[must_use]
            pub const fn width(self) -> Option<usize> {
                match self { $(Self::$variant => if $width == 0 { None } else { Some($width) },)* }
            }
            /// The name for people.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }
        }
    };
}

value_types! {
    U8 = 0, 1, "u8";
    I8 = 1, 1, "i8";
    U16 = 2, 2, "u16";
    I16 = 3, 2, "i16";
    U32 = 4, 4, "u32";
    I32 = 5, 4, "i32";
    F32 = 6, 4, "f32";
    Bool = 7, 1, "bool";
    String = 8, 0, "string";
    Array = 9, 0, "array";
    U64 = 10, 8, "u64";
    I64 = 11, 8, "i64";
    F64 = 12, 8, "f64";
}

/// A metadata value, borrowed from the file.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Value<'a> {
    /// An unsigned integer of any width.
    Unsigned(ValueType, u64),
    /// A signed integer of any width.
    Signed(ValueType, i64),
    /// A 32-bit float.
    F32(f32),
    /// A 64-bit float.
    F64(f64),
    /// A truth value.
    Bool(bool),
    /// A string.
    String(&'a str),
    /// An array of one type.
    Array(Array<'a>),
}

impl<'a> Value<'a> {
    /// Its type in the file.
    #[must_use]
    pub fn value_type(&self) -> ValueType {
        match self {
            Self::Unsigned(ty, _) | Self::Signed(ty, _) => *ty,
            Self::F32(_) => ValueType::F32,
            Self::F64(_) => ValueType::F64,
            Self::Bool(_) => ValueType::Bool,
            Self::String(_) => ValueType::String,
            Self::Array(_) => ValueType::Array,
        }
    }

    /// Its type in words: `u32`, `array of string`.
    #[must_use]
    pub fn describe(&self) -> String {
        match self {
            Self::Array(array) => format!("array of {} {}", array.len(), array.element_type().name()),
            _ => self.value_type().name().to_owned(),
        }
    }

    /// A number, bool or bytes of a string from its little-endian `bytes`, whose length and content the parser has checked.
    pub(super) fn from_bytes(ty: ValueType, bytes: &'a [u8]) -> Option<Self> {
        Some(match ty {
            ValueType::U8 => Self::Unsigned(ty, u64::from(*bytes.first()?)),
            ValueType::I8 => Self::Signed(ty, i64::from(i8::from_le_bytes(bytes.try_into().ok()?))),
            ValueType::U16 => Self::Unsigned(ty, u64::from(u16::from_le_bytes(bytes.try_into().ok()?))),
            ValueType::I16 => Self::Signed(ty, i64::from(i16::from_le_bytes(bytes.try_into().ok()?))),
            ValueType::U32 => Self::Unsigned(ty, u64::from(u32::from_le_bytes(bytes.try_into().ok()?))),
            ValueType::I32 => Self::Signed(ty, i64::from(i32::from_le_bytes(bytes.try_into().ok()?))),
            ValueType::U64 => Self::Unsigned(ty, u64::from_le_bytes(bytes.try_into().ok()?)),
            ValueType::I64 => Self::Signed(ty, i64::from_le_bytes(bytes.try_into().ok()?)),
            ValueType::F32 => Self::F32(f32::from_le_bytes(bytes.try_into().ok()?)),
            ValueType::F64 => Self::F64(f64::from_le_bytes(bytes.try_into().ok()?)),
            ValueType::Bool => match bytes {
                [0] => Self::Bool(false),
                [1] => Self::Bool(true),
                _ => return None,
            },
            ValueType::String => Self::String(std::str::from_utf8(bytes).ok()?),
            ValueType::Array => return None,
        })
    }
}

/// An array as it lies in the file: numbers side by side, strings each after its length in 8 bytes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Array<'a> {
    element: ValueType,
    len: usize,
    bytes: &'a [u8],
}

impl<'a> Array<'a> {
    /// `bytes` must have been checked to be `len` elements.
    pub(super) fn new(element: ValueType, len: usize, bytes: &'a [u8]) -> Self {
        Self { element, len, bytes }
    }
    /// Type of its elements.
    #[must_use]
    pub fn element_type(&self) -> ValueType {
        self.element
    }
    /// Number of elements.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }
    /// Whether it has no elements.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
    /// The elements as they lie in the file.
    #[must_use]
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }
    /// The elements.
    #[must_use]
    pub fn iter(&self) -> Elements<'a> {
        Elements { element: self.element, left: self.len, bytes: self.bytes }
    }
}

impl<'a> IntoIterator for &Array<'a> {
    type Item = Value<'a>;
    type IntoIter = Elements<'a>;
    fn into_iter(self) -> Elements<'a> {
        self.iter()
    }
}

/// Iterator over an [`Array`].
#[derive(Clone, Debug)]
pub struct Elements<'a> {
    element: ValueType,
    left: usize,
    bytes: &'a [u8],
}

impl<'a> Iterator for Elements<'a> {
    type Item = Value<'a>;
    fn next(&mut self) -> Option<Value<'a>> {
        self.left = self.left.checked_sub(1)?;
        let len = match self.element.width() {
            Some(width) => width,
            None => {
                let (len, rest) = self.bytes.split_first_chunk::<8>()?;
                self.bytes = rest;
                usize::try_from(u64::from_le_bytes(*len)).ok()?
            }
        };
        let (value, rest) = self.bytes.split_at_checked(len)?;
        self.bytes = rest;
        Value::from_bytes(self.element, value)
    }
    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }
}

/// A Rust type that a metadata value can be read as.
pub trait FromValue<'a>: Sized {
    /// What is expected, for error messages.
    const EXPECTED: &'static str;
    /// The value, when it is of a fitting type and in range.
    fn from_value(value: Value<'a>) -> Option<Self>;
}

macro_rules! integers {
    ($($ty:ident $expected:literal $list:literal;)*) => {$(
        impl<'a> FromValue<'a> for $ty {
            const EXPECTED: &'static str = $expected;
            /// Integers of other widths are taken when they fit: writers differ.
            fn from_value(value: Value<'a>) -> Option<Self> {
                match value {
                    Value::Unsigned(_, v) => v.try_into().ok(),
                    Value::Signed(_, v) => v.try_into().ok(),
                    _ => None,
                }
            }
        }
        impl<'a> FromValue<'a> for Vec<$ty> {
            const EXPECTED: &'static str = $list;
            fn from_value(value: Value<'a>) -> Option<Self> {
                list(value)
            }
        }
    )*};
}

integers! {
    u32 "u32" "array of u32";
    i32 "i32" "array of i32";
    u64 "u64" "array of u64";
    usize "u64" "array of u64";
}

impl<'a> FromValue<'a> for f32 {
    const EXPECTED: &'static str = "f32";
    fn from_value(value: Value<'a>) -> Option<Self> {
        match value {
            Value::F32(v) => Some(v),
            Value::F64(v) => Some(v as f32),
            _ => None,
        }
    }
}

impl<'a> FromValue<'a> for bool {
    const EXPECTED: &'static str = "bool";
    fn from_value(value: Value<'a>) -> Option<Self> {
        if let Value::Bool(v) = value { Some(v) } else { None }
    }
}

impl<'a> FromValue<'a> for &'a str {
    const EXPECTED: &'static str = "string";
    fn from_value(value: Value<'a>) -> Option<Self> {
        if let Value::String(v) = value { Some(v) } else { None }
    }
}

impl<'a> FromValue<'a> for Vec<f32> {
    const EXPECTED: &'static str = "array of f32";
    fn from_value(value: Value<'a>) -> Option<Self> {
        list(value)
    }
}

impl<'a> FromValue<'a> for Vec<&'a str> {
    const EXPECTED: &'static str = "array of string";
    fn from_value(value: Value<'a>) -> Option<Self> {
        list(value)
    }
}

fn list<'a, T: FromValue<'a>>(value: Value<'a>) -> Option<Vec<T>> {
    if let Value::Array(array) = value { array.iter().map(T::from_value).collect() } else { None }
}
