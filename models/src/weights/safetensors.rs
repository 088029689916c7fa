use std::borrow::Cow;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::ops::Range;
use std::path::{Component, Path, PathBuf};

use engine_kernels::{DType, MappedFile};
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;

use super::fp8::{Scales, blocks};
use super::{Tensor, WeightSource, floats};
use crate::ModelError;
use crate::bounded_file::{CONFIG_BYTES_MAX, read_bounded};
use crate::config::quantization::Fp8;
use crate::fingerprint::Fingerprint;

/// The file of a model that fits in one.
pub(crate) const SINGLE_FILE: &str = "model.safetensors";
/// The list of files of one that does not.
pub(crate) const INDEX_FILE: &str = "model.safetensors.index.json";

/// A directory's safetensors files, mapped, their tables checked.
pub(crate) struct SafetensorsFiles {
    directory: PathBuf,
    files: Vec<MappedFile>,
    tensors: HashMap<String, Entry>,
    /// How weights of eight-bit floats are scaled.
    fp8: Option<Fp8>,
}

/// Ends of the names of scales of weights, in place of `weight`: of `fp8` by transformers, and of all others.
const SCALES: [&str; 2] = ["weight_scale_inv", "weight_scale"];
/// Of those and of other scales that tools leave: of activations, keys and values, which are used as they are.
const ALL_SCALES: [&str; 10] = [
    ".weight_scale_inv",
    ".weight_scale",
    ".input_scale",
    ".output_scale",
    ".activation_scale",
    ".q_scale",
    ".k_scale",
    ".v_scale",
    ".kv_scale",
    ".prob_output_scale",
];

struct Entry {
    file: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    range: Range<usize>,
}

impl SafetensorsFiles {
    /// Opens `model.safetensors`, or where there is none the files its index names, as transformers does. `fp8` is what
    /// the configuration says.
    pub(crate) fn open(directory: &Path, fp8: Option<Fp8>) -> Result<Self, ModelError> {
        let mut this = Self { directory: directory.into(), files: Vec::new(), tensors: HashMap::new(), fp8 };
        let (single, index) = (directory.join(SINGLE_FILE), directory.join(INDEX_FILE));
        if single.exists() {
            this.add(&single)?;
        } else if index.exists() {
            for name in shards(&index)? {
                this.add(&directory.join(name))?;
            }
        } else {
            let problem = format!("has neither {SINGLE_FILE} nor {INDEX_FILE}; other formats have to be converted");
            return Err(ModelError::Safetensors { path: directory.into(), problem });
        }
        Ok(this)
    }

    fn add(&mut self, path: &Path) -> Result<(), ModelError> {
        let map = MappedFile::open(path).map_err(ModelError::io(path))?;
        let error = |problem: String| ModelError::Safetensors { path: path.into(), problem };
        // Checks the header's length and JSON, and that offsets and shapes fit each other and the file.
        let (header_len, table) = SafeTensors::read_metadata(&map)
            .map_err(|source| error(format!("{source}: the file is damaged or incomplete, download it again")))?;
        let data_start = header_len + size_of::<u64>();
        for (name, info) in table.tensors() {
            let (start, end) = info.data_offsets;
            let range = data_start + start..data_start + end;
            if range.end > map.len() || start > end {
                return Err(error(format!("tensor `{name}` reaches beyond the end of the file")));
            }
            let entry = Entry { file: self.files.len(), dtype: info.dtype, shape: info.shape.clone(), range };
            if self.tensors.insert(name.clone(), entry).is_some() {
                return Err(error(format!("tensor `{name}` is in another file of the model too")));
            }
        }
        self.files.push(map);
        Ok(())
    }

    /// Adds all tensors, in the order of their names.
    pub(crate) fn fingerprint(&self, fingerprint: &mut Fingerprint) {
        if let Some(Fp8 { block, .. }) = &self.fp8 {
            fingerprint.part("fp8", format!("{block:?}").as_bytes());
        }
        let mut tensors: Vec<_> = self.tensors.iter().collect();
        tensors.sort_unstable_by_key(|(name, _)| *name);
        for (name, entry) in tensors {
            fingerprint.tensor(name, dtype_of(entry.dtype), &entry.shape, self.data(entry));
        }
    }

    /// Bytes of the tensors of each type that is read, scales not counted.
    pub(crate) fn bytes_by_type(&self) -> impl Iterator<Item = (DType, usize)> {
        let weights = self.tensors.iter().filter(|(name, _)| !self.is_scale(name));
        weights.filter_map(|(_, entry)| Some((dtype_of(entry.dtype)?, entry.range.len())))
    }

    /// Whether it is a scale of eight-bit floats, of weights or of something else.
    fn is_scale(&self, name: &str) -> bool {
        self.fp8.is_some() && ALL_SCALES.iter().any(|end| name.ends_with(end))
    }

    /// Bytes of all tensors but the one that is `left` where it is, where those of eight-bit floats take `stored` bytes,
    /// and others what they take in the files.
    pub(crate) fn bytes_as(&self, stored: impl Fn(DType, &[usize]) -> usize, left: Option<&str>) -> u64 {
        let bytes = |entry: &Entry| match entry.dtype {
            Dtype::F8_E4M3 => stored(DType::F8, &entry.shape),
            _ => entry.range.len(),
        };
        let loaded = self.tensors.iter().filter(|(name, _)| left != Some(name.as_str()));
        loaded.map(|(_, entry)| bytes(entry) as u64).sum()
    }

    fn data(&self, entry: &Entry) -> &[u8] {
        &self.files[entry.file][entry.range.clone()]
    }

    /// A matrix of eight-bit floats, put together with its scales.
    fn scaled(&self, name: &str, entry: &Entry) -> Result<Tensor<'_>, ModelError> {
        let error = |name: &str, problem: String| ModelError::Safetensors {
            path: self.directory.clone(),
            problem: format!("tensor `{name}` {problem}"),
        };
        let Some(fp8) = &self.fp8 else {
            let advice = "; config.json has no quantization_config that says how it is scaled";
            return Err(ModelError::TensorType { name: name.into(), found: "F8_E4M3".into(), advice });
        };
        let (Some(base), &[rows, cols]) = (name.strip_suffix("weight"), entry.shape.as_slice()) else {
            return Err(error(name, format!("of shape {:?} is F8_E4M3, which weight matrices alone are", entry.shape)));
        };
        let names = SCALES.map(|end| format!("{base}{end}"));
        let Some((scale_name, scale)) = names.iter().find_map(|name| Some((name, self.tensors.get(name)?))) else {
            let name = format!("{}` or `{}", names[0], names[1]);
            return Err(ModelError::MissingTensor { name, path: self.directory.clone() });
        };
        let dtype =
            dtype_of(scale.dtype).filter(|dtype| *dtype != DType::F8).ok_or_else(|| ModelError::TensorType {
                name: scale_name.clone(),
                found: format!("{:?}", scale.dtype),
                advice: " for scales; supported are F32, F16 and BF16",
            })?;
        let scales = Scales::new(fp8, [rows, cols], &scale.shape, floats(dtype, self.data(scale)))
            .map_err(|problem| error(scale_name, problem))?;
        let data = blocks(self.data(entry), cols, &scales).ok_or_else(|| {
            error(name, "has elements that are not numbers: the file is damaged, download it again".into())
        })?;
        let file_bytes = entry.range.len() + scale.range.len();
        Ok(Tensor { dtype: DType::F8, shape: entry.shape.clone(), data: Cow::Owned(data), file_bytes })
    }
}

impl WeightSource for SafetensorsFiles {
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor<'_>, ModelError> {
        let missing = || ModelError::MissingTensor { name: name.into(), path: self.directory.clone() };
        let entry = self.tensors.get(name).ok_or_else(missing)?;
        let dtype = dtype_of(entry.dtype).ok_or_else(|| ModelError::TensorType {
            name: name.into(),
            found: format!("{:?}", entry.dtype),
            advice: "; supported are F32, F16, BF16 and F8_E4M3",
        })?;
        if dtype == DType::F8 {
            // Looked at first: a narrow one would become many times as large.
            if entry.shape != shape {
                let (name, expected, actual) = (name.into(), shape.into(), entry.shape.clone());
                return Err(ModelError::TensorShape { name, expected, actual });
            }
            return self.scaled(name, entry);
        }
        let data = Cow::Borrowed(self.data(entry));
        Ok(Tensor { dtype, shape: entry.shape.clone(), data, file_bytes: entry.range.len() })
    }

    fn total_bytes(&self) -> u64 {
        self.tensors.values().map(|entry| entry.range.len() as u64).sum()
    }

    fn unused(&self, used: &HashSet<String>) -> Result<Vec<String>, ModelError> {
        // Old conversions stored the rotary frequencies, which follow from the configuration.
        let is_known =
            |name: &str| used.contains(name) || name.ends_with(".rotary_emb.inv_freq") || self.is_scale(name);
        Ok(self.tensors.keys().filter(|name| !is_known(name)).cloned().collect())
    }
}

fn dtype_of(dtype: Dtype) -> Option<DType> {
    match dtype {
        Dtype::F32 => Some(DType::F32),
        Dtype::F16 => Some(DType::F16),
        Dtype::BF16 => Some(DType::BF16),
        Dtype::F8_E4M3 => Some(DType::F8),
        _ => None,
    }
}

/// The files an index names, each a plain name beside it: an index from the network must not lead out of its directory.
pub(crate) fn shards(index: &Path) -> Result<BTreeSet<String>, ModelError> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: HashMap<String, String>,
    }
    let text = read_bounded(index, CONFIG_BYTES_MAX).map_err(ModelError::io(index))?;
    let parsed: Index =
        serde_json::from_slice(&text).map_err(|source| ModelError::Json { path: index.into(), source })?;
    let files: BTreeSet<_> = parsed.weight_map.into_values().collect();
    let plain = |name: &&String| {
        let mut components = Path::new(name.as_str()).components();
        matches!((components.next(), components.next()), (Some(Component::Normal(_)), None))
            && name.ends_with(".safetensors")
    };
    match files.iter().find(|name| !plain(name)) {
        Some(name) => Err(ModelError::Safetensors {
            path: index.into(),
            problem: format!("names the file `{name}`, which is not a .safetensors file beside it"),
        }),
        None if files.is_empty() => {
            Err(ModelError::Safetensors { path: index.into(), problem: "names no file".into() })
        }
        None => Ok(files),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn file(header: &str, data: &[u8]) -> Vec<u8> {
        let mut out = (header.len() as u64).to_le_bytes().to_vec();
        out.extend_from_slice(header.as_bytes());
        out.extend_from_slice(data);
        out
    }

    fn open(bytes: &[u8]) -> Result<SafetensorsFiles, ModelError> {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join(SINGLE_FILE), bytes).unwrap();
        SafetensorsFiles::open(directory.path(), None)
    }

    const HEADER: &str = r#"{"a":{"dtype":"BF16","shape":[2,2],"data_offsets":[0,8]},
        "b":{"dtype":"I64","shape":[1],"data_offsets":[8,16]}}"#;

    #[test]
    fn reads_tensors_and_refuses_types_by_name() {
        let files = open(&file(HEADER, &[1; 16])).unwrap();
        let a = files.tensor("a", &[]).unwrap();
        assert_eq!((a.dtype, a.shape.as_slice(), a.data.len()), (DType::BF16, &[2, 2][..], 8));
        let error = files.tensor("b", &[]).err().unwrap().to_string();
        assert!(error.contains("`b` has type I64"), "{error}");
        let error = files.tensor("c", &[]).err().unwrap().to_string();
        assert!(error.contains("`c` is missing"), "{error}");
    }

    #[test]
    fn truncated_and_hostile_headers_are_errors() {
        let whole = file(HEADER, &[1; 16]);
        for len in 0..whole.len() {
            assert!(open(&whole[..len]).is_err(), "{len} of {} bytes were accepted", whole.len());
        }
        let deep = format!("{}{}", "[".repeat(50_000), "]".repeat(50_000));
        let huge = r#"{"a":{"dtype":"F32","shape":[4294967296,4294967296,4294967296],"data_offsets":[0,0]}}"#;
        let reversed = r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}"#;
        for header in [&deep, huge, reversed, "{", "[]", "null", ""] {
            assert!(open(&file(header, &[0; 8])).is_err());
        }
        assert!(open(&u64::MAX.to_le_bytes()).is_err());
    }

    #[test]
    fn an_index_may_not_name_files_elsewhere() {
        let directory = tempfile::tempdir().unwrap();
        let index = directory.path().join(INDEX_FILE);
        for name in ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", "", "model.bin"] {
            std::fs::write(&index, serde_json::json!({"weight_map": {"a": name}}).to_string()).unwrap();
            assert!(SafetensorsFiles::open(directory.path(), None).is_err(), "`{name}` was accepted");
        }
    }

    #[test]
    fn the_files_of_an_index_are_read_as_one() {
        let directory = tempfile::tempdir().unwrap();
        let one = |name: &str| format!(r#"{{"{name}":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}}}"#);
        for (name, tensor) in [("m-1.safetensors", "a"), ("m-2.safetensors", "b")] {
            std::fs::write(directory.path().join(name), file(&one(tensor), &[0; 4])).unwrap();
        }
        let index = serde_json::json!({"metadata": {}, "weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}});
        std::fs::write(directory.path().join(INDEX_FILE), index.to_string()).unwrap();
        let files = SafetensorsFiles::open(directory.path(), None).unwrap();
        assert!(files.tensor("a", &[]).is_ok() && files.tensor("b", &[]).is_ok());
        let single = directory.path().join(SINGLE_FILE);
        std::fs::write(&single, file(&one("c"), &[0; 4])).unwrap();
        let files = SafetensorsFiles::open(directory.path(), None).unwrap();
        assert!(files.tensor("c", &[]).is_ok() && files.tensor("a", &[]).is_err(), "the single file counts");
        std::fs::remove_file(single).unwrap();
        std::fs::remove_file(directory.path().join("m-2.safetensors")).unwrap();
        let error = || SafetensorsFiles::open(directory.path(), None).err().unwrap().to_string();
        assert!(error().contains("m-2.safetensors"), "{}", error());
        std::fs::remove_file(directory.path().join(INDEX_FILE)).unwrap();
        assert!(error().contains("has neither model.safetensors nor"), "{}", error());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn damaged_headers_never_panic(
            damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        ) {
            let mut bytes = file(HEADER, &[1; 16]);
            for (at, value) in damage {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            if let Ok(files) = open(&bytes) {
                for name in ["a", "b"] {
                    let _ = files.tensor(name, &[]);
                }
            }
        }
    }
}
