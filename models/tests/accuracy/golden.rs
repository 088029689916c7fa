use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};

/// Where the goldens are.
pub(crate) fn reference(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/reference").join(path)
}

/// A file of reference results.
pub(crate) struct Goldens(HashMap<String, Tensor>);

impl Goldens {
    pub(crate) fn open(path: &str) -> Self {
        Self(candle_core::safetensors::load(reference(path), &Device::Cpu).unwrap())
    }

    pub(crate) fn ids(&self, name: &str) -> Vec<u32> {
        self.0[name].to_dtype(DType::U32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    }

    pub(crate) fn floats(&self, name: &str) -> Vec<f32> {
        self.0[name].flatten_all().unwrap().to_vec1().unwrap()
    }

    /// A matrix, row by row.
    pub(crate) fn rows(&self, name: &str) -> Vec<Vec<f32>> {
        self.0[name].to_vec2().unwrap()
    }

    /// A matrix of ids, row by row.
    pub(crate) fn id_rows(&self, name: &str) -> Vec<Vec<u32>> {
        self.0[name].to_dtype(DType::U32).unwrap().to_vec2().unwrap()
    }
}
