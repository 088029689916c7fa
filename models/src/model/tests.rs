//! A model on the reference backend against candle-transformers' models: other people's code, the same weights.

use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::os::unix::fs::FileExt;
use std::path::Path;

use candle_core::{Device, Tensor as CandleTensor};
use candle_nn::VarBuilder;
use candle_transformers::models::{llama, qwen2, qwen3};
use engine_kernels::cpu::{CpuBackend, CpuOptions};
use engine_kernels::reference::ReferenceBackend;
use engine_kernels::{DType, KvDType, KvLayout, KvPages};
use serde_json::{Value, json};

use super::*;
use crate::config::hf;
use crate::config::json::Fields;
use crate::weights::{DummyWeights, Tensor, floats};

/// Made-up weights, large enough that logits spread over several units, and norms that are not all one. Remembers what
/// it gave out.
struct Lively {
    dummy: DummyWeights,
    given: RefCell<HashMap<String, CandleTensor>>,
}

impl Lively {
    fn new(seed: u64) -> Self {
        Self { dummy: DummyWeights::of(DType::F32, seed), given: RefCell::default() }
    }
}

impl WeightSource for Lively {
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor<'_>, ModelError> {
        let values = if name.contains("norm.") {
            let spread = self.dummy.tensor(&format!("spread of {}", name.replace('.', " ")), shape)?;
            floats(DType::F32, &spread.data).iter().map(|x| 1.0 + 10.0 * x).collect()
        } else {
            let plain = self.dummy.tensor(name, shape)?;
            floats(DType::F32, &plain.data).iter().map(|x| 8.0 * x).collect::<Vec<_>>()
        };
        let data: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        let tensor = CandleTensor::from_vec(values, shape, &Device::Cpu).unwrap();
        self.given.borrow_mut().insert(name.into(), tensor);
        Ok(Tensor { dtype: DType::F32, shape: shape.into(), file_bytes: data.len(), data: Cow::Owned(data) })
    }

    fn total_bytes(&self) -> u64 {
        0
    }

    fn unused(&self, _: &HashSet<String>) -> Result<Vec<String>, ModelError> {
        Ok(Vec::new())
    }
}

const VOCABULARY: usize = 96;
const TOKENS: [u32; 11] = [3, 95, 17, 0, 42, 42, 8, 61, 77, 5, 30];

fn configuration(class: &str, changes: Value) -> Value {
    let mut value = json!({
        "architectures": [class], "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": VOCABULARY,
        "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": false,
        "hidden_act": "silu", "sliding_window": 128, "max_window_layers": 3, "use_sliding_window": false,
        "attention_bias": false,
    });
    for (key, change) in changes.as_object().unwrap() {
        value[key] = change.clone();
    }
    value
}

/// Twelve pages of four tokens.
fn layout(config: &ModelConfig) -> KvLayout {
    KvLayout {
        layers: config.layers,
        kv_heads: config.kv_heads,
        head_dim: config.head_dim,
        block_size: 4,
        blocks: 12,
        dtype: KvDType::F32,
    }
}

/// Logits of every position, the tokens computed in chunks of these sizes beside a sequence of other tokens.
fn logits_of_every_position(config: &Value, source: &Lively, chunks: &[usize]) -> Vec<Vec<f32>> {
    let config = hf::parse(&Fields::new(Path::new("config.json"), config).unwrap()).unwrap();
    let mut backend = ReferenceBackend;
    let limits = ForwardLimits { max_tokens: 16, max_logit_rows: 16, max_positions: 32 };
    let (mut model, report) = Model::load(source, &mut backend, &config, limits, false).unwrap();
    assert_eq!(report.parameters, config.parameters());
    let mut cache = backend.kv_cache(layout(&config)).unwrap();
    let mut all = Vec::new();
    let mut done = 0;
    for &len in chunks {
        let mut batch = Batch::default();
        batch.push(&[9, 8, 7], 0, &[11], 3);
        batch.push(&TOKENS[done..done + len], done as u32, &[5, 2, 7], 0);
        model.forward(&mut backend, &mut cache, &batch, &mut |_| ());
        let logits = model.logits(&mut backend, &batch.logit_rows);
        all.extend(backend.read(logits).chunks_exact(VOCABULARY).map(<[f32]>::to_vec));
        done += len;
    }
    assert_eq!(all.len(), TOKENS.len());
    all
}

/// `candle` computes the logits that follow a prompt.
fn check_against_candle(config: &Value, mut candle: impl FnMut(VarBuilder<'static>, &CandleTensor) -> CandleTensor) {
    let source = Lively::new(7);
    let ours = logits_of_every_position(config, &source, &[4, 1, 6]);
    let weights = VarBuilder::from_tensors(source.given.take(), candle_core::DType::F32, &Device::Cpu);
    for (position, ours) in ours.iter().enumerate() {
        let prompt = CandleTensor::new(&TOKENS[..=position], &Device::Cpu).unwrap().unsqueeze(0).unwrap();
        let theirs: Vec<f32> = candle(weights.clone(), &prompt).flatten_all().unwrap().to_vec1().unwrap();
        let spread = theirs.iter().fold(0f32, |max, x| max.max(x.abs()));
        assert!(spread > 0.5, "logits of at most {spread} prove nothing");
        for (token, (a, b)) in ours.iter().zip(&theirs).enumerate() {
            assert!((a - b).abs() < 1e-4, "position {position} token {token}: {a} here, {b} in candle");
        }
    }
}

fn check_llama(changes: Value) {
    let config = configuration("LlamaForCausalLM", changes);
    let parsed: llama::LlamaConfig = serde_json::from_value(config.clone()).unwrap();
    let parsed = parsed.into_config(false);
    check_against_candle(&config, |weights, prompt| {
        let mut cache = llama::Cache::new(true, candle_core::DType::F32, &parsed, &Device::Cpu).unwrap();
        llama::Llama::load(weights, &parsed).unwrap().forward(prompt, 0, &mut cache).unwrap()
    });
}

#[test]
fn llama_agrees_with_candle() {
    check_llama(json!({}));
}

#[test]
fn a_tied_llama_with_one_kv_head_agrees_with_candle() {
    check_llama(json!({"tie_word_embeddings": true, "num_key_value_heads": 1}));
}

#[test]
fn llama3_scaling_agrees_with_candle() {
    check_llama(json!({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 32}}));
}

#[test]
fn qwen2_agrees_with_candle() {
    let config = configuration("Qwen2ForCausalLM", json!({"num_key_value_heads": 4}));
    let parsed: qwen2::Config = serde_json::from_value(config.clone()).unwrap();
    check_against_candle(&config, |weights, prompt| {
        qwen2::ModelForCausalLM::new(&parsed, weights).unwrap().forward(prompt, 0).unwrap()
    });
}

#[test]
fn qwen3_with_wide_heads_agrees_with_candle() {
    let config = configuration("Qwen3ForCausalLM", json!({"head_dim": 32}));
    let parsed: qwen3::Config = serde_json::from_value(config.clone()).unwrap();
    check_against_candle(&config, |weights, prompt| {
        qwen3::ModelForCausalLM::new(&parsed, weights).unwrap().forward(prompt, 0).unwrap()
    });
}

#[test]
fn chunks_do_not_change_a_bit() {
    let config = configuration("Qwen3ForCausalLM", json!({"attention_bias": true}));
    let source = Lively::new(1);
    let whole = logits_of_every_position(&config, &source, &[11]);
    assert_eq!(whole, logits_of_every_position(&config, &source, &[1, 7, 3]));
}

#[test]
fn llama_biases_are_all_applied() {
    let config = configuration("LlamaForCausalLM", json!({}));
    let biased = configuration("LlamaForCausalLM", json!({"attention_bias": true, "mlp_bias": true}));
    let source = Lively::new(1);
    let plain = logits_of_every_position(&config, &source, &[11]);
    assert_ne!(plain, logits_of_every_position(&biased, &source, &[11]));
    let names: HashSet<_> = source.given.take().into_keys().filter(|name| name.ends_with(".bias")).collect();
    assert_eq!(names.len(), 3 * 7);
}

#[test]
fn a_layer_is_told_of_when_its_pages_are_there_and_the_next_is_not_begun() {
    let config = configuration("Qwen3ForCausalLM", json!({}));
    let config = hf::parse(&Fields::new(Path::new("config.json"), &config).unwrap()).unwrap();
    let mut backend = CpuBackend::new(CpuOptions { threads: 1, level: None });
    // What others find there while the model computes.
    backend.share_kv_cache();
    let limits = ForwardLimits { max_tokens: 16, max_logit_rows: 16, max_positions: 32 };
    let (mut model, _) = Model::load(&Lively::new(1), &mut backend, &config, limits, false).unwrap();
    let mut cache = backend.kv_cache(layout(&config)).unwrap();
    let Some(KvPages::Host(region)) = backend.kv_pages(&cache) else { panic!("pages are in host memory") };
    let (file, shape) = (region.file().unwrap(), region.shape());
    let page_of = |layer, page: u32| {
        let mut bytes = vec![0; shape.page_bytes];
        file.read_exact_at(&mut bytes, shape.offset(layer, page as usize, 1) as u64).unwrap();
        bytes
    };
    // All logits, and none: the same keys and values are there, and all layers are told of.
    for (logits_from, pages) in [(0, [5, 2, 7]), (TOKENS.len(), [1, 6, 3])] {
        let mut batch = Batch::default();
        batch.push(&TOKENS, 0, &pages, logits_from);
        let mut told = Vec::new();
        model.forward(&mut backend, &mut cache, &batch, &mut |done| {
            told.push(done);
            for layer in 0..config.layers {
                let written = pages.map(|page| !page_of(layer, page).iter().all(|&byte| byte == 0));
                assert_eq!(written, [layer <= done; 3], "layer {layer} at {done}");
            }
        });
        assert_eq!(told, [0, 1, 2]);
    }
    for layer in 0..config.layers {
        assert_eq!([5, 2, 7].map(|page| page_of(layer, page)), [1, 6, 3].map(|page| page_of(layer, page)));
    }
}
