use std::path::Path;

use serde_json::{Map, Value};

use crate::ModelError;

/// A JSON object of a model's configuration, read field by field so that every complaint names one. `null` counts as
/// absent, as it does in transformers.
#[derive(Clone, Copy)]
pub(crate) struct Fields<'a> {
    path: &'a Path,
    object: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    /// The fields of `value`, which must be an object; `path` is the file it came from.
    pub(crate) fn new(path: &'a Path, value: &'a Value) -> Result<Self, ModelError> {
        match value {
            Value::Object(object) => Ok(Self { path, object }),
            _ => {
                Err(ModelError::Field { path: path.into(), field: "(root)".into(), problem: "is not an object".into() })
            }
        }
    }

    /// The file.
    pub(crate) fn path(&self) -> &'a Path {
        self.path
    }

    /// The value of a field that is there and not null.
    pub(crate) fn get(&self, field: &str) -> Option<&'a Value> {
        self.object.get(field).filter(|value| !value.is_null())
    }

    /// The names of all fields.
    pub(crate) fn names(&self) -> impl Iterator<Item = &'a str> {
        self.object.keys().map(String::as_str)
    }

    /// An error about a field.
    pub(crate) fn error(&self, field: &str, problem: impl Into<String>) -> ModelError {
        ModelError::Field { path: self.path.into(), field: field.into(), problem: problem.into() }
    }

    fn typed<T>(
        &self,
        field: &str,
        wanted: &str,
        convert: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, ModelError> {
        match self.get(field) {
            None => Ok(None),
            Some(value) => match convert(value) {
                Some(value) => Ok(Some(value)),
                None => Err(self.error(field, format!("is {}, not {wanted}", shortened(value)))),
            },
        }
    }

    /// A non-negative integer. Python writes some of them as `4096.0`.
    pub(crate) fn size(&self, field: &str) -> Result<Option<usize>, ModelError> {
        self.typed(field, "a non-negative integer", |value| {
            let integral = |x: f64| (x >= 0.0 && x.fract() == 0.0 && x < 2f64.powi(53)).then_some(x as u64);
            value.as_u64().or_else(|| value.as_f64().and_then(integral)).and_then(|n| n.try_into().ok())
        })
    }

    /// An integer of either sign.
    pub(crate) fn integer(&self, field: &str) -> Result<Option<i64>, ModelError> {
        self.typed(field, "an integer", Value::as_i64)
    }

    /// A non-negative integer that must be there.
    pub(crate) fn required_size(&self, field: &str) -> Result<usize, ModelError> {
        self.size(field)?.ok_or_else(|| self.error(field, "is missing"))
    }

    /// A number that an f32 holds.
    pub(crate) fn float(&self, field: &str) -> Result<Option<f32>, ModelError> {
        self.typed(field, "a finite number", |value| value.as_f64().map(|x| x as f32).filter(|x| x.is_finite()))
    }

    /// A number that must be there.
    pub(crate) fn required_float(&self, field: &str) -> Result<f32, ModelError> {
        self.float(field)?.ok_or_else(|| self.error(field, "is missing"))
    }

    /// `true` or `false`.
    pub(crate) fn boolean(&self, field: &str) -> Result<Option<bool>, ModelError> {
        self.typed(field, "true or false", Value::as_bool)
    }

    /// Text.
    pub(crate) fn string(&self, field: &str) -> Result<Option<&'a str>, ModelError> {
        self.typed(field, "a string", Value::as_str)
    }

    /// An object inside this one.
    pub(crate) fn object(&self, field: &str) -> Result<Option<Self>, ModelError> {
        let object = self.typed(field, "an object", Value::as_object)?;
        Ok(object.map(|object| Self { path: self.path, object }))
    }

    /// One token id or a list of them.
    pub(crate) fn token_ids(&self, field: &str) -> Result<Option<Vec<u32>>, ModelError> {
        let id = |value: &Value| value.as_u64().and_then(|n| u32::try_from(n).ok());
        self.typed(field, "a token id or a list of them", |value| match value {
            Value::Array(values) => values.iter().map(id).collect(),
            value => id(value).map(|id| vec![id]),
        })
    }
}

/// A value as it stands in the file, cut to a length fit for a message.
fn shortened(value: &Value) -> String {
    match value {
        Value::Array(_) => "a list".into(),
        Value::Object(_) => "an object".into(),
        value => value.to_string().chars().take(60).collect(),
    }
}
