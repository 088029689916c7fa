use std::path::{Path, PathBuf};

use engine_kernels::KernelError;

use crate::gguf::GgufError;

/// Why a model could not be opened or loaded. Each names the file, field or tensor, and where it can says what to do.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// Neither a path nor something that could be a model on the hub.
    #[error(
        "`{model}` is neither a directory with a config.json, nor a .gguf file, nor a model id of the form \
         `organisation/name` (`organisation/name:QUANT` for a GGUF file of it)"
    )]
    NotFound {
        /// What was asked for.
        model: String,
    },
    /// A file could not be read.
    #[error("cannot read {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A JSON file is not JSON, or not shaped as it should be.
    #[error("{}: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// What is wrong and where.
        source: serde_json::Error,
    },
    /// A field of `config.json` (or a key of GGUF metadata) is missing, out of range, or contradicts another.
    #[error("{}: `{field}` {problem}", path.display())]
    Field {
        /// The file.
        path: PathBuf,
        /// The field.
        field: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A model family this engine does not know.
    #[error("{}: architecture `{name}` is not supported; supported are {supported}", path.display())]
    Architecture {
        /// The file.
        path: PathBuf,
        /// What it declares.
        name: String,
        /// What could have been declared.
        supported: String,
    },
    /// Something a model may declare and this engine does not do.
    #[error("{}: {what} is not supported", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// The feature, as the file names it.
        what: String,
    },
    /// Weights quantised in a way this engine does not read.
    #[error("{}: quantization_config has {what}, which is not supported; {supported}", path.display())]
    Quantization {
        /// The file.
        path: PathBuf,
        /// What it asks for.
        what: String,
        /// What it could have asked for, and what to do.
        supported: &'static str,
    },
    /// A GGUF file is damaged or lacks something.
    #[error("{}: {source}", path.display())]
    Gguf {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: GgufError,
    },
    /// A safetensors file or its index is damaged.
    #[error("{}: {problem}", path.display())]
    Safetensors {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// The model needs a tensor its files do not have.
    #[error("tensor `{name}` is missing from {}", path.display())]
    MissingTensor {
        /// The tensor, as its file would name it.
        name: String,
        /// The file or directory.
        path: PathBuf,
    },
    /// A tensor does not have the shape the configuration implies.
    #[error("tensor `{name}` has shape {actual:?}; the configuration implies {expected:?}")]
    TensorShape {
        /// The tensor.
        name: String,
        /// Shape implied.
        expected: Vec<usize>,
        /// Shape found.
        actual: Vec<usize>,
    },
    /// A tensor is stored in a type this engine does not read.
    #[error("tensor `{name}` has type {found}, which is not supported{advice}")]
    TensorType {
        /// The tensor.
        name: String,
        /// Its type, as the format names it.
        found: String,
        /// What to do, beginning with punctuation; may be empty.
        advice: &'static str,
    },
    /// The backend refused a weight.
    #[error("tensor `{name}`: {source}")]
    Kernel {
        /// The (first) tensor of the weight.
        name: String,
        /// What it said.
        source: KernelError,
    },
    /// A model of the hub could not be had.
    #[error("{0}")]
    Hub(#[from] crate::hub::HubError),
}

impl ModelError {
    /// For `map_err` on file operations.
    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Io { path: path.into(), source }
    }

    /// For `map_err` on GGUF look-ups.
    pub(crate) fn gguf(path: &Path) -> impl Fn(GgufError) -> Self {
        move |source| match source {
            GgufError::Io(source) => Self::Io { path: path.into(), source },
            source => Self::Gguf { path: path.into(), source },
        }
    }
}
