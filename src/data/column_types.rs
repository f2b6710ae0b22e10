//! What type a column of JSON values has.

use std::sync::Arc;

use anyhow::{Result, bail};
use arrow_schema::{DataType, Field, Fields, Schema};
use serde_json::{Map, Value};

/// The type that holds every value seen, null included; or the first two that no type holds both of.
#[derive(Clone, Debug, Default, PartialEq)]
enum Kind {
    #[default]
    Null,
    Bool,
    Int,
    /// One of them is beyond 2^53, so that a float may not hold it.
    LargeInt,
    Float,
    Text,
    List(Box<Kind>),
    Struct(Vec<(String, Kind)>),
    Mixed(&'static str, &'static str),
}

impl Kind {
    fn name(&self) -> &'static str {
        match self {
            Kind::Null => "nulls",
            Kind::Bool => "booleans",
            Kind::Int => "numbers",
            Kind::LargeInt => "integers beyond 2^53",
            Kind::Float => "fractions",
            Kind::Text => "strings",
            Kind::List(_) => "lists",
            Kind::Struct(_) => "objects",
            Kind::Mixed(..) => "values of several types",
        }
    }

    fn see(&mut self, value: &Value) {
        match (&mut *self, value) {
            (_, Value::Null) | (Kind::Mixed(..), _) => {}
            (Kind::Bool, Value::Bool(_)) | (Kind::Text, Value::String(_)) => {}
            (Kind::List(items), Value::Array(values)) => values.iter().for_each(|value| items.see(value)),
            (Kind::Struct(fields), Value::Object(object)) => see_fields(fields, object),
            (known @ (Kind::Int | Kind::LargeInt | Kind::Float), Value::Number(_)) => {
                let mut other = Kind::Null;
                other.see(value);
                match (&*known, &other) {
                    (Kind::Int, Kind::LargeInt | Kind::Float) => *known = other,
                    (Kind::LargeInt, Kind::Float) | (Kind::Float, Kind::LargeInt) => {
                        *known = Kind::Mixed(known.name(), other.name());
                    }
                    (_, Kind::Mixed(..)) => *known = other,
                    _ => {}
                }
            }
            (Kind::Null, value) => {
                *self = match value {
                    Value::Bool(_) => Kind::Bool,
                    Value::Number(number) => match (number.as_i64(), number.is_u64()) {
                        (Some(number), _) if number.unsigned_abs() <= 1 << 53 => Kind::Int,
                        (Some(_), _) => Kind::LargeInt,
                        (None, true) => Kind::Mixed("integers", "integers beyond 2^63"),
                        (None, false) => Kind::Float,
                    },
                    Value::String(_) => Kind::Text,
                    Value::Array(_) => Kind::List(Box::default()),
                    Value::Object(_) => Kind::Struct(Vec::new()),
                    Value::Null => Kind::Null,
                };
                if matches!(value, Value::Array(_) | Value::Object(_)) {
                    self.see(value);
                }
            }
            (known, value) => {
                let mut other = Kind::Null;
                other.see(value);
                *self = Kind::Mixed(known.name(), other.name());
            }
        }
    }

    fn data_type(&self, path: &str) -> Result<DataType> {
        Ok(match self {
            // No value was seen, so any type that can be absent will do.
            Kind::Null | Kind::Text => DataType::Utf8,
            Kind::Bool => DataType::Boolean,
            Kind::Int | Kind::LargeInt => DataType::Int64,
            Kind::Float => DataType::Float64,
            Kind::List(items) => {
                DataType::List(Arc::new(Field::new("element", items.data_type(&format!("{path}[]"))?, true)))
            }
            Kind::Struct(fields) if fields.is_empty() => {
                bail!("column {path} holds only empty objects, which Parquet cannot hold: write .jsonl")
            }
            Kind::Struct(fields) => DataType::Struct(schema_fields(fields, &format!("{path}."))?),
            Kind::Mixed(one, other) => bail!(
                "column {path} holds {one} and {other}, but a Parquet column has one type: write .jsonl, or make them \
                 one type first"
            ),
        })
    }
}

fn see_fields(fields: &mut Vec<(String, Kind)>, object: &Map<String, Value>) {
    for (at, (name, value)) in object.iter().enumerate() {
        // Rows have their fields in one order, as a rule.
        let found = match fields.get(at) {
            Some((known, _)) if known == name => Some(at),
            _ => fields.iter().position(|(known, _)| known == name),
        };
        let found = found.unwrap_or_else(|| {
            fields.push((name.clone(), Kind::Null));
            fields.len() - 1
        });
        fields[found].1.see(value);
    }
}

fn schema_fields(fields: &[(String, Kind)], prefix: &str) -> Result<Fields> {
    fields
        .iter()
        .map(|(name, kind)| Ok(Field::new(name, kind.data_type(&format!("{prefix}{name}"))?, true)))
        .collect()
}

/// The columns of rows and their types, in the order in which they first appear.
#[derive(Clone, Debug, Default)]
pub(super) struct ColumnTypes(Vec<(String, Kind)>);

impl ColumnTypes {
    pub(super) fn see(&mut self, row: &Map<String, Value>) {
        see_fields(&mut self.0, row);
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|(name, _)| name.as_str())
    }

    /// Columns in words: (name, `lists of strings`).
    pub(super) fn describe(&self) -> Vec<(String, String)> {
        self.0.iter().map(|(name, kind)| (name.clone(), describe(kind))).collect()
    }

    /// The columns as Arrow knows them, each of which may be null.
    ///
    /// # Errors
    /// Names a column with values of several types, or without any field.
    pub(super) fn schema(&self) -> Result<Arc<Schema>> {
        Ok(Arc::new(Schema::new(schema_fields(&self.0, "")?)))
    }
}

fn describe(kind: &Kind) -> String {
    match kind {
        Kind::Int | Kind::LargeInt => "integers".to_owned(),
        Kind::Float => "numbers".to_owned(),
        Kind::List(items) if **items == Kind::Null => "empty lists".to_owned(),
        Kind::List(items) => format!("lists of {}", describe(items)),
        Kind::Struct(fields) => {
            let names: Vec<&str> = fields.iter().map(|(name, _)| name.as_str()).collect();
            format!("{{{}}}", names.join(", "))
        }
        Kind::Mixed(one, other) => format!("{one} and {other}"),
        other => other.name().to_owned(),
    }
}
