use std::path::{Path, PathBuf};

use engine_kernels::{Backend, DType, KvDType};

use crate::bounded_file::{TOKENIZER_BYTES_MAX, read_bounded};
use crate::config::json::Fields;
use crate::config::quantization::Fp8;
use crate::config::{gguf as gguf_config, hf};
use crate::defaults::read_json;
use crate::fingerprint::Fingerprint;
use crate::gguf::{Gguf, GgufError, TensorInfo};
use crate::hub::{Hub, parse_id};
use crate::tokenizer::TOKENIZER_FILE;
use crate::weights::{DummyWeights, GgufWeights, SafetensorsFiles, WeightSource, kv_dtype};
use crate::{
    ChatTemplate, ForwardLimits, GenerationDefaults, LoadReport, Model, ModelConfig, ModelError, Tokenizer,
    TokenizerError,
};

/// Where weights come from: `--load-format`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum LoadFormat {
    /// From the model's files.
    #[default]
    Auto,
    /// Made up, from `config.json` alone: for measuring a shape.
    Dummy,
}

/// How to open a model.
#[derive(Debug, Clone, Default)]
pub struct OpenOptions {
    /// Where weights come from.
    pub load_format: LoadFormat,
    /// Branch, tag or commit of a model on the hub; `None`: `main`.
    pub revision: Option<String>,
    /// Show progress bars where standard error is a terminal.
    pub progress: bool,
    /// Seed of made-up weights.
    pub dummy_seed: u64,
}

impl OpenOptions {
    fn revision(&self) -> &str {
        self.revision.as_deref().unwrap_or("main")
    }
}

/// An opened model: its configuration read and checked, its files mapped, its weights not yet taken over by a backend.
pub struct ModelSource {
    name: String,
    path: PathBuf,
    files: Files,
    config: ModelConfig,
    generation_defaults: GenerationDefaults,
    chat_template: Option<ChatTemplate>,
    progress: bool,
}

enum Files {
    /// A Hugging Face directory.
    Safetensors(SafetensorsFiles),
    /// A GGUF file, or the parts of a split one.
    Gguf(Vec<Gguf>),
    /// A `config.json` whose weights are made up.
    Dummy(DummyWeights),
}

/// What the small files of a directory say, which are there before its weights are fetched.
struct Description {
    config: ModelConfig,
    fp8: Option<Fp8>,
    /// Element type of weights that are made up; `None`: there are files of them.
    made_up: Option<DType>,
    generation_defaults: GenerationDefaults,
    chat_template: Option<ChatTemplate>,
}

/// A model in a backend.
pub struct LoadedModel<B: Backend> {
    /// The model.
    pub model: Model<B>,
    /// What was loaded.
    pub report: LoadReport,
    /// The KV cache's element type unless the user says otherwise: that of the weights that are not quantised, f16 for
    /// GGUF's quantised ones.
    pub kv_dtype: KvDType,
}

impl ModelSource {
    /// Opens a directory with a `config.json`, a `.gguf` file, or a model of the Hugging Face hub
    /// (`organisation/name`, or `organisation/name:QUANT` for a GGUF file of one), which is fetched if it is not in the
    /// local cache.
    pub fn open(model: &str, options: &OpenOptions) -> Result<Self, ModelError> {
        let path = Path::new(model);
        let own_name = |name: Option<&std::ffi::OsStr>| {
            name.map_or_else(|| model.to_owned(), |name| name.to_string_lossy().into_owned())
        };
        if path.is_dir() {
            let canonical = path.canonicalize().map_err(ModelError::io(path))?;
            Self::open_directory(own_name(canonical.file_name()), path, options)
        } else if path.is_file() {
            Self::open_gguf(own_name(path.file_stem()), path, options)
        } else if let Some((id, quantization)) = parse_id(model) {
            let hub = Hub::from_env(options.progress)?;
            match quantization {
                None => Self::open_from_hub(&hub, id, options),
                Some(quantization) => Self::open_gguf_from_hub(&hub, id, quantization, options),
            }
        } else {
            Err(ModelError::NotFound { model: model.into() })
        }
    }

    /// Opens a model of the hub: what its small files say is read before its weights are fetched.
    pub(crate) fn open_from_hub(hub: &Hub, id: &str, options: &OpenOptions) -> Result<Self, ModelError> {
        let weights = options.load_format == LoadFormat::Auto;
        let read = |directory: &Path| Description::read(directory, options);
        let (directory, description) = hub.snapshot(id, options.revision(), weights, read)?;
        Self::open_described(id.into(), &directory, description, options)
    }

    fn open_directory(name: String, directory: &Path, options: &OpenOptions) -> Result<Self, ModelError> {
        Self::open_described(name, directory, Description::read(directory, options)?, options)
    }

    fn open_described(
        name: String,
        directory: &Path,
        description: Description,
        options: &OpenOptions,
    ) -> Result<Self, ModelError> {
        let Description { config, fp8, made_up, generation_defaults, chat_template } = description;
        let files = match made_up {
            None => Files::Safetensors(SafetensorsFiles::open(directory, fp8)?),
            Some(dtype) => Files::Dummy(DummyWeights {
                seed: options.dummy_seed,
                dtype,
                fp8,
                parameters: config.parameters(),
                projections: config.projections().collect(),
            }),
        };
        let (path, progress) = (directory.into(), options.progress);
        Ok(Self { name, path, files, config, generation_defaults, chat_template, progress })
    }

    /// Opens a GGUF file of a model of the hub.
    pub(crate) fn open_gguf_from_hub(
        hub: &Hub,
        id: &str,
        quantization: &str,
        options: &OpenOptions,
    ) -> Result<Self, ModelError> {
        let name = format!("{id}:{quantization}");
        // Before it is fetched.
        check_load_format(Path::new(&name), options)?;
        let path = hub.gguf(id, options.revision(), quantization)?;
        tracing::info!(model = id, quantization, path = %path.display(), "chosen by the quantisation in its name");
        Self::open_gguf(name, &path, options)
    }

    fn open_gguf(name: String, path: &Path, options: &OpenOptions) -> Result<Self, ModelError> {
        check_load_format(path, options)?;
        let parts = open_parts(path)?;
        let error = ModelError::gguf(path);
        let config = gguf_config::parse(&parts, path)?;
        Ok(Self {
            name,
            path: path.into(),
            generation_defaults: GenerationDefaults::from_gguf(&parts[0]).map_err(&error)?.checked(config.vocab_size),
            chat_template: ChatTemplate::from_gguf(&parts[0]).map_err(&error)?,
            files: Files::Gguf(parts),
            config,
            progress: options.progress,
        })
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// End tokens and sampling parameters its authors recommend.
    pub fn generation_defaults(&self) -> &GenerationDefaults {
        &self.generation_defaults
    }

    /// Its chat template, if it has one.
    pub fn chat_template(&self) -> Option<&ChatTemplate> {
        self.chat_template.as_ref()
    }

    /// Reads its tokenizer: `tokenizer.json` of a directory, the metadata of a GGUF file.
    pub fn tokenizer(&self) -> Result<Tokenizer, TokenizerError> {
        match &self.files {
            Files::Gguf(parts) => Tokenizer::from_gguf(&parts[0]),
            Files::Safetensors(_) | Files::Dummy(_) => Tokenizer::from_file(&self.path.join(TOKENIZER_FILE)),
        }
    }

    /// The name to serve it under unless the user says otherwise: the hub id, or the name of the directory or file.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where it was found: the directory (the snapshot in the cache for a hub id) or GGUF file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The KV cache's element type unless the user says otherwise: f32 for f32 weights, bf16 for bf16 ones (eight-bit
    /// floats do not count), else f16.
    pub fn kv_dtype(&self) -> KvDType {
        match &self.files {
            Files::Safetensors(files) => kv_dtype(files.bytes_by_type()),
            Files::Dummy(weights) => kv_dtype([(weights.dtype, 1)].into_iter()),
            Files::Gguf(parts) => {
                let tensors = parts.iter().flat_map(Gguf::tensors);
                kv_dtype(tensors.filter_map(|(_, info)| Some((info.dtype()?, info.bytes()))))
            }
        }
    }

    /// A digest that two processes compute alike exactly if they have opened the same model: its shape, its tokenizer,
    /// each tensor's name, type and shape, and samples of each tensor's contents (16 KiB, its first and last bytes
    /// among them; small tensors whole). Reading every byte would take as long as loading; models that differ anywhere
    /// but in the unread middle of tensors have different fingerprints, and training or merging leaves no tensor it
    /// touches the same in all samples. It does not protect from somebody who makes such a model on purpose. Touches
    /// the files: call it where blocking is allowed.
    pub fn fingerprint(&self) -> Result<[u8; 32], ModelError> {
        let mut fingerprint = Fingerprint::new();
        fingerprint.part("shape", format!("{:?}", self.config).as_bytes());
        match &self.files {
            Files::Gguf(parts) => {
                for part in parts {
                    // Tokenizer and all other metadata, and the tensor table.
                    fingerprint.part("header", part.header());
                    let mut names: Vec<_> = part.tensors().collect();
                    names.sort_unstable_by_key(|(name, _)| *name);
                    for (name, info) in names {
                        fingerprint.tensor(name, info.dtype(), &info.shape, part.data(name).unwrap_or_default());
                    }
                }
                return Ok(fingerprint.finish());
            }
            Files::Safetensors(files) => files.fingerprint(&mut fingerprint),
            Files::Dummy(weights) => {
                fingerprint.part("made up", format!("{:?} {}", weights.dtype, weights.seed).as_bytes());
                if let Some(fp8) = &weights.fp8 {
                    fingerprint.part("fp8", format!("{:?}", fp8.except).as_bytes());
                }
            }
        }
        let tokenizer = self.path.join(TOKENIZER_FILE);
        match read_bounded(&tokenizer, TOKENIZER_BYTES_MAX) {
            Ok(bytes) => fingerprint.part("tokenizer", &bytes),
            // Reading the tokenizer is where its absence is an error.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(ModelError::io(&tokenizer)(error)),
        }
        Ok(fingerprint.finish())
    }

    /// Bytes of its weights in memory, where a tensor of a type and shape takes `stored` bytes. Only quantised ones
    /// take others than in their files.
    pub fn weight_bytes(&self, stored: impl Fn(DType, &[usize]) -> usize) -> u64 {
        let parts = match &self.files {
            Files::Safetensors(files) => {
                // Many have it though it is tied.
                let left = self.config.tie_word_embeddings.then_some("lm_head.weight");
                return files.bytes_as(stored, left);
            }
            Files::Dummy(weights) => return weights.bytes_as(stored),
            Files::Gguf(parts) => parts,
        };
        let bytes = |info: &TensorInfo| match info.dtype() {
            Some(dtype) => stored(dtype, &info.shape),
            // Loading refuses it.
            None => 0,
        };
        parts.iter().flat_map(Gguf::tensors).map(|(_, info)| bytes(info) as u64).sum()
    }

    /// Hands all weights over to `backend` and makes working buffers for steps up to `limits`. Logs what was loaded.
    pub fn load<B: Backend>(&self, backend: &mut B, limits: ForwardLimits) -> Result<LoadedModel<B>, ModelError> {
        let gguf;
        let source: &dyn WeightSource = match &self.files {
            Files::Safetensors(files) => files,
            Files::Dummy(weights) => weights,
            Files::Gguf(parts) => {
                let interleaved = self.config.architecture.family().gguf_interleaved_qk;
                let interleaved_head_dim = interleaved.then_some(self.config.head_dim);
                gguf = GgufWeights { parts, path: &self.path, interleaved_head_dim };
                &gguf
            }
        };
        let (model, report) = Model::load(source, backend, &self.config, limits, self.progress)?;
        tracing::info!(model = self.name, "loaded {report}");
        Ok(LoadedModel { model, report, kv_dtype: self.kv_dtype() })
    }
}

impl Description {
    /// Refuses what is not supported.
    fn read(directory: &Path, options: &OpenOptions) -> Result<Self, ModelError> {
        let config_path = directory.join("config.json");
        let value = match read_json(&config_path)? {
            Some(value) => value,
            None => {
                let source = std::io::Error::new(
                    std::io::ErrorKind::NotFound,
                    "no such file; a model directory has a config.json (for GGUF, give the path of the .gguf file)",
                );
                return Err(ModelError::Io { path: config_path, source });
            }
        };
        let fields = Fields::new(&config_path, &value)?;
        let config = hf::parse(&fields)?;
        Ok(Self {
            fp8: Fp8::parse(&fields)?,
            made_up: match options.load_format {
                LoadFormat::Auto => None,
                LoadFormat::Dummy => Some(declared_dtype(&fields)?),
            },
            generation_defaults: GenerationDefaults::from_directory(directory, &fields)?.checked(config.vocab_size),
            chat_template: ChatTemplate::from_directory(directory)?,
            config,
        })
    }
}

/// Weights cannot be made up for a GGUF file.
fn check_load_format(path: &Path, options: &OpenOptions) -> Result<(), ModelError> {
    match options.load_format {
        LoadFormat::Auto => Ok(()),
        LoadFormat::Dummy => {
            let what = "load format `dummy` for GGUF files (it needs a directory with a config.json)".into();
            Err(ModelError::Unsupported { path: path.into(), what })
        }
    }
}

/// Opens a GGUF file, and the others of its set if it is the first part of a split one.
fn open_parts(path: &Path) -> Result<Vec<Gguf>, ModelError> {
    let open = |path: &Path| Gguf::open(path).map_err(ModelError::gguf(path));
    let first = open(path)?;
    let error = ModelError::gguf(path);
    let count = first.unsigned("split.count").map_err(&error)?.unwrap_or(1);
    if count <= 1 {
        return Ok(vec![first]);
    }
    let problem = |problem: String| error(GgufError::Value { key: "split.count".into(), problem });
    if first.unsigned("split.no").map_err(&error)? != Some(0) {
        return Err(problem(format!("this is a later part of a file split in {count}; give the path of the first")));
    }
    let name = path.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
    let suffix = format!("-00001-of-{count:05}.gguf");
    let Some(stem) = name.strip_suffix(&suffix) else {
        return Err(problem(format!("a file split in {count} is expected to be named …{suffix}, this is `{name}`")));
    };
    let mut parts = vec![first];
    for part in 2..=count {
        parts.push(open(&path.with_file_name(format!("{stem}-{part:05}-of-{count:05}.gguf")))?);
    }
    Ok(parts)
}

/// Element type `config.json` declares (`dtype`, or `torch_dtype` before transformers 5); bf16 if none.
fn declared_dtype(fields: &Fields<'_>) -> Result<DType, ModelError> {
    let field = if fields.get("dtype").is_some() { "dtype" } else { "torch_dtype" };
    match fields.string(field)? {
        Some("float32") => Ok(DType::F32),
        Some("float16") => Ok(DType::F16),
        Some("bfloat16") | None => Ok(DType::BF16),
        Some(other) => Err(fields.error(field, format!("is `{other}`; supported are float32, float16 and bfloat16"))),
    }
}

#[cfg(test)]
mod tests;
