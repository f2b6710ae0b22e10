//! Metadata values and their bytes.

use std::fmt;

use anyhow::{Context, Result, bail};

/// A metadata value. An array's number is the type of its elements.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    String(String),
    Array(u32, Vec<Value>),
    U64(u64),
    I64(i64),
    F64(f64),
}

const STRING: u32 = 8;
const ARRAY: u32 = 9;
const BOOL: u32 = 7;
const I32: u32 = 5;
const F32: u32 = 6;

impl Value {
    pub fn strings(values: impl IntoIterator<Item = String>) -> Value {
        Value::Array(STRING, values.into_iter().map(Value::String).collect())
    }

    pub fn i32s(values: impl IntoIterator<Item = i32>) -> Value {
        Value::Array(I32, values.into_iter().map(Value::I32).collect())
    }

    pub fn f32s(values: impl IntoIterator<Item = f32>) -> Value {
        Value::Array(F32, values.into_iter().map(Value::F32).collect())
    }

    pub fn bools(values: impl IntoIterator<Item = bool>) -> Value {
        Value::Array(BOOL, values.into_iter().map(Value::Bool).collect())
    }

    /// Any integer type.
    pub fn as_i64(&self) -> Option<i64> {
        Some(match *self {
            Value::U8(value) => value.into(),
            Value::I8(value) => value.into(),
            Value::U16(value) => value.into(),
            Value::I16(value) => value.into(),
            Value::U32(value) => value.into(),
            Value::I32(value) => value.into(),
            Value::U64(value) => i64::try_from(value).ok()?,
            Value::I64(value) => value,
            _ => return None,
        })
    }

    /// Any number.
    pub fn as_f64(&self) -> Option<f64> {
        match *self {
            // The shortest text of an f32 is what the writer meant: 0.00001, not 0.000009999999747.
            Value::F32(value) => value.to_string().parse().ok(),
            Value::F64(value) => Some(value),
            _ => self.as_i64().map(|value| value as f64),
        }
    }

    pub fn as_bool(&self) -> Option<bool> {
        match self {
            Value::Bool(value) => Some(*value),
            _ => None,
        }
    }

    pub fn as_str(&self) -> Option<&str> {
        match self {
            Value::String(text) => Some(text),
            _ => None,
        }
    }

    pub fn as_array(&self) -> Option<&[Value]> {
        match self {
            Value::Array(_, values) => Some(values),
            _ => None,
        }
    }

    fn type_id(&self) -> u32 {
        match self {
            Value::U8(_) => 0,
            Value::I8(_) => 1,
            Value::U16(_) => 2,
            Value::I16(_) => 3,
            Value::U32(_) => 4,
            Value::I32(_) => I32,
            Value::F32(_) => F32,
            Value::Bool(_) => BOOL,
            Value::String(_) => STRING,
            Value::Array(..) => ARRAY,
            Value::U64(_) => 10,
            Value::I64(_) => 11,
            Value::F64(_) => 12,
        }
    }

    /// Appends type and value.
    pub(super) fn write(&self, bytes: &mut Vec<u8>) {
        bytes.extend(self.type_id().to_le_bytes());
        self.write_bare(bytes);
    }

    fn write_bare(&self, bytes: &mut Vec<u8>) {
        match self {
            Value::U8(value) => bytes.push(*value),
            Value::I8(value) => bytes.extend(value.to_le_bytes()),
            Value::U16(value) => bytes.extend(value.to_le_bytes()),
            Value::I16(value) => bytes.extend(value.to_le_bytes()),
            Value::U32(value) => bytes.extend(value.to_le_bytes()),
            Value::I32(value) => bytes.extend(value.to_le_bytes()),
            Value::F32(value) => bytes.extend(value.to_le_bytes()),
            Value::Bool(value) => bytes.push(u8::from(*value)),
            Value::String(text) => write_string(text, bytes),
            Value::Array(kind, values) => {
                bytes.extend(kind.to_le_bytes());
                bytes.extend((values.len() as u64).to_le_bytes());
                values.iter().for_each(|value| value.write_bare(bytes));
            }
            Value::U64(value) => bytes.extend(value.to_le_bytes()),
            Value::I64(value) => bytes.extend(value.to_le_bytes()),
            Value::F64(value) => bytes.extend(value.to_le_bytes()),
        }
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Value::String(text) => write!(f, "{text:?}"),
            other => write!(f, "{other:?}"),
        }
    }
}

pub(super) fn write_string(text: &str, bytes: &mut Vec<u8>) {
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend(text.as_bytes());
}

/// Bytes read from front to back, never past their end.
pub(super) struct Cursor<'a> {
    pub(super) bytes: &'a [u8],
    pub(super) at: usize,
}

impl<'a> Cursor<'a> {
    pub(super) fn take(&mut self, count: usize) -> Result<&'a [u8]> {
        let end = self.at.checked_add(count).filter(|end| *end <= self.bytes.len());
        let end = end.context("the header ends before it is complete")?;
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        Ok(self.take(N)?.try_into()?)
    }

    pub(super) fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    pub(super) fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    pub(super) fn string(&mut self) -> Result<String> {
        let length = usize::try_from(self.u64()?)?;
        String::from_utf8(self.take(length)?.to_vec()).context("a string that is not UTF-8")
    }

    pub(super) fn value(&mut self) -> Result<Value> {
        let kind = self.u32()?;
        self.value_of(kind)
    }

    fn value_of(&mut self, kind: u32) -> Result<Value> {
        Ok(match kind {
            0 => Value::U8(self.take(1)?[0]),
            1 => Value::I8(i8::from_le_bytes(self.array()?)),
            2 => Value::U16(u16::from_le_bytes(self.array()?)),
            3 => Value::I16(i16::from_le_bytes(self.array()?)),
            4 => Value::U32(self.u32()?),
            I32 => Value::I32(i32::from_le_bytes(self.array()?)),
            F32 => Value::F32(f32::from_le_bytes(self.array()?)),
            BOOL => Value::Bool(self.take(1)?[0] != 0),
            STRING => Value::String(self.string()?),
            ARRAY => {
                let element = self.u32()?;
                if element == ARRAY {
                    bail!("an array of arrays");
                }
                let count = usize::try_from(self.u64()?)?;
                // Every element takes a byte at least: a hostile count must not become an allocation.
                if count > self.bytes.len() - self.at {
                    bail!("an array of {count} elements in a file of {} bytes", self.bytes.len());
                }
                Value::Array(element, (0..count).map(|_| self.value_of(element)).collect::<Result<_>>()?)
            }
            10 => Value::U64(self.u64()?),
            11 => Value::I64(i64::from_le_bytes(self.array()?)),
            12 => Value::F64(f64::from_le_bytes(self.array()?)),
            other => bail!("value type {other} is unknown"),
        })
    }
}
