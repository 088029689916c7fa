//! Tiny random models in every architecture, dtype and tensor type.

use engine_kernels::cpu::weight_bytes;
use engine_kernels::{Backend, KvDType};
use engine_models::{ForwardLimits, ModelSource, OpenOptions};

use crate::golden::{Goldens, reference};
use crate::runner::{Runner, cpu_backend, cuda_backend, reference_backend};
use crate::stats::Regrets;

const F32_MODELS: [&str; 7] =
    ["llama-gqa", "llama-rope-llama3", "llama-rope-linear", "llama-bias", "qwen2", "qwen3", "qwen3-yarn"];
const HALF_MODELS: [&str; 3] = ["llama-f16", "llama-bf16", "qwen3-bf16"];
const FP8_MODELS: [&str; 3] = ["qwen3-fp8", "llama-fp8", "qwen2-fp8-static"];
const GGUF_FILES: [&str; 6] = ["q4_0-q4_1", "q5_0-q5_1", "q8_0-q6_k", "q4_k-q5_k", "mixed", "q3_k-iq4"];
const PROMPTS: usize = 3;
const POSITIONS: usize = 400;

/// The largest difference of logits, as a part of the range of the reference's.
fn relative_error(ours: &[Vec<f32>], theirs: &[Vec<f32>]) -> f32 {
    assert_eq!(ours.len(), theirs.len());
    let bounds = |acc: (f32, f32), &x: &f32| (acc.0.min(x), acc.1.max(x));
    let (low, high) = theirs.iter().flatten().fold((f32::INFINITY, f32::NEG_INFINITY), bounds);
    let difference = ours.iter().flatten().zip(theirs.iter().flatten()).map(|(a, b)| (a - b).abs());
    // `f32::max` would ignore a NaN.
    difference.fold(0.0, |worst: f32, d| if d > worst || d.is_nan() { d } else { worst }) / (high - low)
}

/// With keys and values in f32.
fn models_agree<B: Backend>(names: &[&str], backend: impl Fn() -> B) {
    for name in names {
        let folder = format!("models/{name}");
        let goldens = Goldens::open(&format!("{folder}/expected.safetensors"));
        let mut runner = Runner::load(backend(), &reference(&folder), POSITIONS, Some(KvDType::F32));
        for prompt in 0..PROMPTS {
            runner.restart();
            let ours = runner.logits(&goldens.ids(&format!("ids.{prompt}")));
            let error = relative_error(&ours, &goldens.rows(&format!("logits.{prompt}")));
            println!("{name}, prompt of {}: largest error {error:.1e} of the range", ours.len());
            assert!(error <= 1e-3, "{name}, prompt {prompt}: {error} of the logits' range");
            let expected = goldens.ids(&format!("greedy.{prompt}"));
            assert_eq!(runner.greedy(&ours[ours.len() - 1], expected.len()), expected, "{name}, prompt {prompt}");
        }
    }
}

fn rounding_models_agree<B: Backend>(names: &[&str], backend: impl Fn() -> B) {
    for name in names {
        let folder = format!("models/{name}");
        let goldens = Goldens::open(&format!("{folder}/expected.safetensors"));
        let mut runner = Runner::load(backend(), &reference(&folder), POSITIONS, None);
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for prompt in 0..PROMPTS {
            runner.restart();
            ours.extend(runner.logits(&goldens.ids(&format!("ids.{prompt}"))));
            theirs.extend(goldens.rows(&format!("logits.{prompt}")));
        }
        let regrets = Regrets::of_logits(ours.iter().zip(&theirs));
        println!("{name}: {regrets}, largest error {:.1e} of the range", relative_error(&ours, &theirs));
        assert!(regrets.mean() <= 0.01 && regrets.p99() <= 0.05, "{name}: {regrets}");
    }
}

fn gguf_logits<B: Backend>(backend: B, name: &str, kv_dtype: Option<KvDType>) -> (Vec<Vec<f32>>, Vec<Vec<f32>>) {
    let goldens = Goldens::open(&format!("gguf/{name}.safetensors"));
    let mut runner = Runner::load(backend, &reference(&format!("gguf/{name}.gguf")), POSITIONS, kv_dtype);
    (runner.logits(&goldens.ids("ids")), goldens.rows("logits"))
}

#[test]
fn f32_models_on_the_reference_backend_give_transformers_logits() {
    models_agree(&F32_MODELS, reference_backend);
}

#[test]
fn f32_models_on_the_cpu_backend_give_transformers_logits() {
    models_agree(&F32_MODELS, cpu_backend);
}

#[test]
fn f32_models_on_the_emulated_cuda_backend_give_transformers_logits() {
    models_agree(&F32_MODELS, cuda_backend);
}

#[test]
fn half_precision_models_on_the_reference_backend_choose_transformers_tokens() {
    rounding_models_agree(&HALF_MODELS, reference_backend);
}

#[test]
fn half_precision_models_on_the_cpu_backend_choose_transformers_tokens() {
    rounding_models_agree(&HALF_MODELS, cpu_backend);
}

#[test]
fn half_precision_models_on_the_emulated_cuda_backend_choose_transformers_tokens() {
    rounding_models_agree(&HALF_MODELS, cuda_backend);
}

#[test]
fn eight_bit_models_on_the_reference_backend_give_transformers_logits() {
    models_agree(&FP8_MODELS, reference_backend);
}

#[test]
fn eight_bit_models_on_the_cpu_backend_give_transformers_logits() {
    models_agree(&FP8_MODELS, cpu_backend);
}

#[test]
fn eight_bit_models_on_the_emulated_cuda_backend_choose_transformers_tokens() {
    rounding_models_agree(&FP8_MODELS, cuda_backend);
}

#[test]
fn every_gguf_type_means_what_it_means_to_llama_cpp() {
    for name in GGUF_FILES {
        let (ours, theirs) = gguf_logits(reference_backend(), name, Some(KvDType::F32));
        let error = relative_error(&ours, &theirs);
        println!("{name}: largest error {error:.1e} of the range");
        assert!(error <= 1e-3, "{name}: {error} of the logits' range");
    }
}

#[test]
fn weights_of_every_gguf_type_take_the_memory_on_cpus_that_is_foreseen() {
    for name in GGUF_FILES {
        let path = reference(&format!("gguf/{name}.gguf"));
        let source = ModelSource::open(path.to_str().unwrap(), &OpenOptions::default()).unwrap();
        // What is loaded is told of matrices alone.
        let foreseen = source.weight_bytes(|dtype, shape| if shape.len() > 1 { weight_bytes(dtype, shape) } else { 0 });
        let limits = ForwardLimits { max_tokens: 8, max_logit_rows: 8, max_positions: POSITIONS };
        assert_eq!(source.load(&mut cpu_backend(), limits).unwrap().report.memory_bytes, foreseen, "{name}");
    }
}

/// `error_max` is of the range of logits.
fn gguf_files_agree<B: Backend>(backend: impl Fn() -> B, error_max: f32) {
    for name in GGUF_FILES {
        let (ours, theirs) = gguf_logits(backend(), name, None);
        let regrets = Regrets::of_logits(ours.iter().zip(&theirs));
        let error = relative_error(&ours, &theirs);
        println!("{name}: {regrets}, largest error {error:.1e} of the range");
        assert!(regrets.mean() <= 0.02 && regrets.p99() <= 0.2, "{name}: {regrets}");
        assert!(error <= error_max, "{name}: {error} of the logits' range");
    }
}

#[test]
fn every_gguf_type_on_the_cpu_backend_chooses_transformers_tokens() {
    gguf_files_agree(cpu_backend, 0.05);
}

#[test]
fn every_gguf_type_on_the_emulated_cuda_backend_chooses_transformers_tokens() {
    // Activations are not rounded, as they are on CPUs.
    gguf_files_agree(cuda_backend, 0.01);
}
