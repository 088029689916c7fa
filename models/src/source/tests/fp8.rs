//! Directories with weights of eight-bit floats, as several tools write them.

use super::*;

/// A tensor as a file has it.
struct Stored {
    name: String,
    dtype: &'static str,
    shape: Vec<usize>,
    data: Vec<u8>,
}

fn file(tensors: &[Stored]) -> Vec<u8> {
    let mut header = Map::new();
    let mut bytes = Vec::new();
    for Stored { name, dtype, shape, data } in tensors {
        let start = bytes.len();
        bytes.extend_from_slice(data);
        header.insert(name.clone(), json!({"dtype": dtype, "shape": shape, "data_offsets": [start, bytes.len()]}));
    }
    let header = Value::Object(header).to_string();
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &bytes].concat()
}

fn write(tensors: &[Stored], quantization: Option<Value>) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let mut config = config();
    if let Some(quantization) = quantization {
        config["quantization_config"] = quantization;
    }
    std::fs::write(directory.path().join("config.json"), config.to_string()).unwrap();
    std::fs::write(directory.path().join("model.safetensors"), file(tensors)).unwrap();
    directory
}

/// What an E4M3 is.
fn value(quant: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(quant >> 3 & 15), f32::from(quant & 7) / 8.0);
    let magnitude = if exponent == 0 { mantissa * 2f32.powi(-6) } else { (1.0 + mantissa) * 2f32.powi(exponent - 7) };
    if quant & 0x80 == 0 { magnitude } else { -magnitude }
}

/// How a tool scales: the scales' name and type, their shape for so many rows, and the scale of a row.
struct Scheme {
    quantization: Value,
    end: &'static str,
    dtype: &'static str,
    shape: fn(usize) -> Vec<usize>,
    of_row: fn(usize) -> usize,
}

fn schemes() -> [Scheme; 7] {
    let weights = |strategy: &str| json!({"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": true});
    let compressed = |weights: Value| {
        json!({"quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head"],
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}})
    };
    let mut blocks = weights("block");
    blocks["block_structure"] = json!([16, 128]);
    let fp8 = |block: Value| json!({"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": block});
    let in_blocks = |rows: usize| vec![rows / 16, 1];
    [
        Scheme {
            quantization: fp8(json!([16, 128])),
            end: "weight_scale_inv",
            dtype: "BF16",
            shape: in_blocks,
            of_row: |row| row / 16,
        },
        Scheme {
            quantization: fp8(Value::Null),
            end: "weight_scale",
            dtype: "F32",
            shape: |_| Vec::new(),
            of_row: |_| 0,
        },
        Scheme {
            quantization: compressed(blocks),
            end: "weight_scale",
            dtype: "F32",
            shape: in_blocks,
            of_row: |row| row / 16,
        },
        Scheme {
            quantization: compressed(weights("channel")),
            end: "weight_scale",
            dtype: "BF16",
            shape: |rows| vec![rows, 1],
            of_row: |row| row,
        },
        Scheme {
            quantization: compressed(weights("tensor")),
            end: "weight_scale",
            dtype: "F16",
            shape: |_| vec![1],
            of_row: |_| 0,
        },
        Scheme {
            quantization: json!({"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}),
            end: "weight_scale",
            dtype: "F32",
            shape: |_| Vec::new(),
            of_row: |_| 0,
        },
        Scheme {
            quantization: json!({"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}),
            end: "weight_scale",
            dtype: "F32",
            shape: |rows| vec![rows],
            of_row: |row| row,
        },
    ]
}

impl Scheme {
    /// The model's tensors, with all projections but one quantised, and with the values that these have.
    fn tensors(&self) -> (Vec<Stored>, Vec<Stored>) {
        let (mut quantised, mut plain) = (Vec::new(), Vec::new());
        for (name, _, shape) in table() {
            let stored = |data| Stored { name: name.into(), dtype: "F32", shape: shape.clone(), data };
            if !name.ends_with("_proj.weight") || name.contains("up_proj") {
                quantised.push(stored(data(name, &shape)));
                plain.push(stored(data(name, &shape)));
                continue;
            }
            let (rows, cols) = (shape[0], shape[1]);
            let quants: Vec<u8> = (0..rows * cols).map(|i| (i * i % 127) as u8 | ((i % 3) << 7) as u8).collect();
            let shape_of_scales = (self.shape)(rows);
            // Sums of a few powers of two, which all types hold.
            let scales: Vec<f32> = (0..shape_of_scales.iter().product()).map(|i| (1 + i % 7) as f32 / 4096.0).collect();
            let bytes_of = |scale: &f32| match self.dtype {
                "BF16" => half::bf16::from_f32(*scale).to_le_bytes().to_vec(),
                "F16" => half::f16::from_f32(*scale).to_le_bytes().to_vec(),
                _ => scale.to_le_bytes().to_vec(),
            };
            let values = quants.iter().enumerate().map(|(i, quant)| value(*quant) * scales[(self.of_row)(i / cols)]);
            plain.push(stored(values.flat_map(f32::to_le_bytes).collect()));
            let base = name.strip_suffix("weight").unwrap();
            quantised.push(Stored {
                name: format!("{base}{}", self.end),
                dtype: self.dtype,
                shape: shape_of_scales,
                data: scales.iter().flat_map(bytes_of).collect(),
            });
            quantised.push(Stored {
                name: format!("{base}input_scale"),
                dtype: "F32",
                shape: vec![1],
                data: 0.5f32.to_le_bytes().to_vec(),
            });
            quantised.push(Stored { dtype: "F8_E4M3", data: quants, ..stored(Vec::new()) });
        }
        (quantised, plain)
    }

    fn error(&self, change: impl FnOnce(&mut Vec<Stored>)) -> String {
        let (mut tensors, _) = self.tensors();
        change(&mut tensors);
        load(&open(write(&tensors, Some(self.quantization.clone())).path()).unwrap()).err().unwrap().to_string()
    }
}

fn find<'a>(tensors: &'a mut [Stored], end: &str) -> &'a mut Stored {
    tensors.iter_mut().find(|tensor| tensor.name.ends_with(end)).unwrap()
}

#[test]
fn every_scheme_gives_the_logits_of_the_values_it_stands_for() {
    for scheme in schemes() {
        let (quantised, plain) = scheme.tensors();
        let directory = write(&quantised, Some(scheme.quantization.clone()));
        let source = open(directory.path()).unwrap();
        assert_eq!(logits(&source), logits(&open(write(&plain, None).path()).unwrap()), "{}", scheme.quantization);
        let report = load(&source).unwrap().report;
        assert_eq!((report.parameters, report.unused_tensors), (source.config().parameters(), 0));
        let activations = 4 * quantised.iter().filter(|tensor| tensor.name.ends_with("input_scale")).count();
        let in_files: usize = quantised.iter().map(|tensor| tensor.data.len()).sum();
        assert_eq!(report.file_bytes, (in_files - activations) as u64);
        assert!(report.to_string().contains("F8 "), "{report}");
        // What was not quantised is in f32.
        assert_eq!(source.kv_dtype(), KvDType::F32);
        let eights: usize = quantised.iter().filter(|tensor| tensor.dtype == "F8_E4M3").map(|t| t.data.len()).sum();
        let threefold = source.weight_bytes(|_, shape| 3 * shape[0] * shape[1]);
        assert_eq!(threefold, (in_files + 2 * eights) as u64);
    }
}

#[test]
fn scales_that_are_missing_or_do_not_fit_are_named() {
    let [blocks, whole, _, rows, ..] = schemes();
    let missing = blocks.error(|tensors| tensors.retain(|tensor| !tensor.name.ends_with("k_proj.weight_scale_inv")));
    assert!(
        missing.contains("k_proj.weight_scale_inv` or `model.layers.0.self_attn.k_proj.weight_scale` is missing"),
        "{missing}"
    );
    let shape = blocks.error(|tensors| {
        let scale = find(tensors, "q_proj.weight_scale_inv");
        (scale.shape, scale.data) = (vec![1, 1], vec![0; 2]);
    });
    assert!(shape.contains("q_proj.weight_scale_inv` has shape [1, 1]"), "{shape}");
    assert!(shape.contains("blocks of 16 by 128, [2, 1]"), "{shape}");
    let shape = rows.error(|tensors| {
        let scale = find(tensors, "gate_proj.weight_scale");
        (scale.shape, scale.data) = (vec![2], vec![0; 4]);
    });
    assert!(shape.contains("`model.layers.0.mlp.gate_proj.weight_scale` has shape [2]"), "{shape}");
    assert!(shape.contains("its matrix is [64, 32]") && shape.contains("[64, 1]"), "{shape}");
    let dtype = whole.error(|tensors| find(tensors, "q_proj.weight_scale").dtype = "I32");
    assert!(dtype.contains("q_proj.weight_scale` has type I32") && dtype.contains("for scales"), "{dtype}");
    let infinite =
        whole.error(|tensors| find(tensors, "o_proj.weight_scale").data = f32::INFINITY.to_le_bytes().into());
    assert!(infinite.contains("o_proj.weight_scale` has a scale of inf"), "{infinite}");
}

#[test]
fn weights_that_are_not_numbers_or_not_of_this_type_are_refused() {
    let [blocks, ..] = schemes();
    for nan in [0x7f, 0xff] {
        let error = blocks.error(|tensors| *find(tensors, "down_proj.weight").data.last_mut().unwrap() = nan);
        assert!(error.contains("`model.layers.0.mlp.down_proj.weight` has elements that are not numbers"), "{error}");
    }
    for dtype in ["I8", "F8_E5M2"] {
        let error = blocks.error(|tensors| find(tensors, "down_proj.weight").dtype = dtype);
        assert!(error.contains(&format!("has type {dtype}")) && error.contains("and F8_E4M3"), "{error}");
    }
    let norm = blocks.error(|tensors| {
        let norm = find(tensors, "input_layernorm.weight");
        (norm.dtype, norm.data) = ("F8_E4M3", vec![0; HIDDEN]);
    });
    assert!(norm.contains("input_layernorm.weight` of shape [32] is F8_E4M3"), "{norm}");
    // Before anything is made of them.
    for shape in [[64, 0], [2048, 1]] {
        let narrow = blocks.error(|tensors| {
            let weight = find(tensors, "down_proj.weight");
            (weight.shape, weight.data) = (shape.into(), vec![0; shape[0] * shape[1]]);
        });
        assert!(narrow.contains("down_proj.weight`") && narrow.contains(&format!("{shape:?}")), "{narrow}");
    }
    let (tensors, _) = blocks.tensors();
    let unscaled = load(&open(write(&tensors, None).path()).unwrap()).err().unwrap().to_string();
    assert!(unscaled.contains("has type F8_E4M3") && unscaled.contains("no quantization_config"), "{unscaled}");
    let gptq =
        open(write(&tensors, Some(json!({"quant_method": "gptq", "bits": 4}))).path()).err().unwrap().to_string();
    assert!(
        gptq.contains("quantization_config has quant_method `gptq`, which is not supported; supported are"),
        "{gptq}"
    );
}

#[test]
fn models_that_are_scaled_in_other_ways_have_other_fingerprints() {
    let [blocks, whole, ..] = schemes();
    let of = |tensors: &[Stored], quantization: Option<Value>| {
        open(write(tensors, quantization).path()).unwrap().fingerprint().unwrap()
    };
    let (quantised, plain) = blocks.tensors();
    let base = of(&quantised, Some(blocks.quantization.clone()));
    assert_eq!(base, of(&quantised, Some(blocks.quantization.clone())));
    assert_ne!(base, of(&plain, None));
    assert_ne!(base, of(&whole.tensors().0, Some(whole.quantization.clone())));
    let mut larger = blocks.quantization.clone();
    larger["weight_block_size"] = json!([32, 128]);
    assert_ne!(base, of(&quantised, Some(larger)));
}

#[test]
fn made_up_weights_are_quantised_where_the_configuration_says_so() {
    let directory = |quantization: Option<Value>| write(&[], quantization);
    let open = |directory: &tempfile::TempDir| {
        let options = OpenOptions { load_format: LoadFormat::Dummy, ..OpenOptions::default() };
        ModelSource::open(directory.path().to_str().unwrap(), &options).unwrap()
    };
    let quantization = json!({"quant_method": "fp8", "weight_block_size": [128, 128],
        "modules_to_not_convert": ["model.layers.0.self_attn"]});
    let (plain, quantised) = (open(&directory(None)), open(&directory(Some(quantization))));
    let report = load(&quantised).unwrap().report;
    let eights = (3 * HIDDEN * INNER) as f64 / report.parameters as f64;
    let share = |dtype| report.dtypes.iter().find(|(other, _)| *other == dtype).map(|(_, share)| *share);
    assert_eq!(share(DType::F8), Some(eights));
    assert!(logits(&quantised).iter().all(|x| x.is_finite()));
    assert_ne!(plain.fingerprint().unwrap(), quantised.fingerprint().unwrap());
    let eights: u64 = quantised.config().projections().map(|[rows, cols]| (rows * cols) as u64).sum();
    let once = quantised.weight_bytes(|_, shape| shape[0] * shape[1]);
    assert_eq!(plain.weight_bytes(|_, _| 0) - once, 3 * eights);
    assert_eq!(quantised.weight_bytes(|_, shape| 2 * shape[0] * shape[1]), once + eights);
}
