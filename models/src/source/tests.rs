use engine_kernels::reference::ReferenceBackend;
use engine_kernels::{Batch, KvLayout};
use proptest::prelude::*;
use serde_json::{Map, Value, json};

use super::*;
use crate::gguf::testing::GgufWriter;

mod fp8;

const HIDDEN: usize = 32;
const INNER: usize = 64;
const VOCABULARY: usize = 48;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const HEAD_DIM: usize = 8;

fn config() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "intermediate_size": INNER,
        "num_hidden_layers": 1, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "vocab_size": VOCABULARY,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": true, "torch_dtype": "float32",
    })
}

/// Name in Hugging Face files, name in GGUF, shape.
fn table() -> Vec<(&'static str, &'static str, Vec<usize>)> {
    let (q, kv) = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM);
    vec![
        ("model.embed_tokens.weight", "token_embd.weight", vec![VOCABULARY, HIDDEN]),
        ("model.norm.weight", "output_norm.weight", vec![HIDDEN]),
        ("model.layers.0.input_layernorm.weight", "blk.0.attn_norm.weight", vec![HIDDEN]),
        ("model.layers.0.self_attn.q_proj.weight", "blk.0.attn_q.weight", vec![q, HIDDEN]),
        ("model.layers.0.self_attn.k_proj.weight", "blk.0.attn_k.weight", vec![kv, HIDDEN]),
        ("model.layers.0.self_attn.v_proj.weight", "blk.0.attn_v.weight", vec![kv, HIDDEN]),
        ("model.layers.0.self_attn.o_proj.weight", "blk.0.attn_output.weight", vec![HIDDEN, q]),
        ("model.layers.0.post_attention_layernorm.weight", "blk.0.ffn_norm.weight", vec![HIDDEN]),
        ("model.layers.0.mlp.gate_proj.weight", "blk.0.ffn_gate.weight", vec![INNER, HIDDEN]),
        ("model.layers.0.mlp.up_proj.weight", "blk.0.ffn_up.weight", vec![INNER, HIDDEN]),
        ("model.layers.0.mlp.down_proj.weight", "blk.0.ffn_down.weight", vec![HIDDEN, INNER]),
    ]
}

fn data(name: &str, shape: &[usize]) -> Vec<u8> {
    let dummy = DummyWeights::of(DType::F32, 3);
    dummy.tensor(name, shape).unwrap().data.into_owned()
}

fn safetensors(tensors: &[(&str, &[usize], Vec<u8>)]) -> Vec<u8> {
    let mut header = Map::new();
    let mut bytes = Vec::new();
    for (name, shape, data) in tensors {
        let start = bytes.len();
        bytes.extend_from_slice(data);
        header.insert((*name).into(), json!({"dtype": "F32", "shape": shape, "data_offsets": [start, bytes.len()]}));
    }
    let header = Value::Object(header).to_string();
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &bytes].concat()
}

/// A model directory; `change` may spoil its tensors or configuration.
fn directory(change: impl FnOnce(&mut Value, &mut Vec<(&'static str, &'static str, Vec<usize>)>)) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let (mut config, mut table) = (config(), table());
    change(&mut config, &mut table);
    let tensors: Vec<_> = table.iter().map(|(name, _, shape)| (*name, shape.as_slice(), data(name, shape))).collect();
    std::fs::write(directory.path().join("config.json"), config.to_string()).unwrap();
    std::fs::write(directory.path().join("model.safetensors"), safetensors(&tensors)).unwrap();
    directory
}

/// The rows as `convert_hf_to_gguf.py` orders them for interleaved rotation.
fn interleaved(data: &[u8]) -> Vec<u8> {
    let rows: Vec<_> = data.chunks_exact(HIDDEN * 4).collect();
    let order = |row: usize| row / HEAD_DIM * HEAD_DIM + (row % 2) * HEAD_DIM / 2 + row % HEAD_DIM / 2;
    (0..rows.len()).flat_map(|row| rows[order(row)].to_vec()).collect()
}

fn gguf(table: &[(&str, &str, Vec<usize>)]) -> GgufWriter {
    let mut writer = GgufWriter::default();
    writer
        .string("general.architecture", "llama")
        .u32("llama.block_count", 1)
        .u32("llama.context_length", 64)
        .u32("llama.embedding_length", HIDDEN as u32)
        .u32("llama.feed_forward_length", INNER as u32)
        .u32("llama.attention.head_count", HEADS as u32)
        .u32("llama.attention.head_count_kv", KV_HEADS as u32)
        .f32("llama.attention.layer_norm_rms_epsilon", 1e-5)
        .strings("tokenizer.ggml.tokens", &[""; VOCABULARY]);
    for (canonical, name, shape) in table {
        let data = data(canonical, shape);
        let permuted = canonical.contains("q_proj") || canonical.contains("k_proj");
        writer.tensor(name, shape, 0, if permuted { interleaved(&data) } else { data });
    }
    writer
}

fn open(path: &Path) -> Result<ModelSource, ModelError> {
    ModelSource::open(path.to_str().unwrap(), &OpenOptions::default())
}

fn load(source: &ModelSource) -> Result<LoadedModel<ReferenceBackend>, ModelError> {
    source.load(&mut ReferenceBackend, ForwardLimits { max_tokens: 8, max_logit_rows: 8, max_positions: 16 })
}

fn logits(source: &ModelSource) -> Vec<f32> {
    let backend = &mut ReferenceBackend;
    let mut loaded = load(source).unwrap();
    let config = source.config();
    let layout = KvLayout {
        layers: config.layers,
        kv_heads: config.kv_heads,
        head_dim: config.head_dim,
        block_size: 8,
        blocks: 1,
        dtype: loaded.kv_dtype,
    };
    let mut cache = backend.kv_cache(layout).unwrap();
    let mut batch = Batch::default();
    batch.push(&[1, 47, 5, 5, 9], 0, &[0], 0);
    loaded.model.forward(backend, &mut cache, &batch, &mut |_| ());
    let logits = loaded.model.logits(backend, &batch.logit_rows);
    backend.read(logits)
}

#[test]
fn a_directory_and_its_gguf_conversion_give_the_same_logits() {
    let directory = directory(|_, _| ());
    let from_directory = open(directory.path()).unwrap();
    assert_eq!(from_directory.kv_dtype(), KvDType::F32);
    let report = load(&from_directory).unwrap().report;
    assert_eq!((report.parameters, report.unused_tensors), (from_directory.config().parameters(), 0));
    assert_eq!(report.file_bytes, 4 * report.parameters);
    assert!(report.to_string().contains("parameters (F32 100 %)"), "{report}");

    let path = directory.path().join("tiny-f32.gguf");
    std::fs::write(&path, gguf(&table()).build()).unwrap();
    let from_gguf = open(&path).unwrap();
    assert_eq!((from_gguf.name(), from_gguf.path()), ("tiny-f32", path.as_path()));
    assert_eq!(from_gguf.config(), from_directory.config());
    let weights = |shape: &[usize]| shape.iter().product::<usize>();
    let as_in_the_file = |dtype: DType, shape: &[usize]| weights(shape) / dtype.block_len() * dtype.block_bytes();
    assert_eq!(from_gguf.weight_bytes(as_in_the_file), 4 * report.parameters);
    assert_eq!(from_gguf.weight_bytes(|_, shape| weights(shape)), report.parameters);
    assert_eq!(logits(&from_gguf), logits(&from_directory));
}

#[test]
fn a_split_gguf_is_read_as_one() {
    let directory = tempfile::tempdir().unwrap();
    let table = table();
    let (first, second) = table.split_at(4);
    let whole = directory.path().join("whole.gguf");
    std::fs::write(&whole, gguf(&table).build()).unwrap();
    let part = |n: usize| directory.path().join(format!("m-{n:05}-of-00002.gguf"));
    let split = |tensors: &[_], number| {
        let mut writer = gguf(tensors);
        writer.u32("split.no", number).u32("split.count", 2);
        std::fs::write(part(number as usize + 1), writer.build()).unwrap();
    };
    split(first, 0);
    split(second, 1);
    assert_eq!(logits(&open(&part(1)).unwrap()), logits(&open(&whole).unwrap()));

    let error = open(&part(2)).err().unwrap().to_string();
    assert!(error.contains("give the path of the first"), "{error}");
    std::fs::rename(part(1), directory.path().join("renamed.gguf")).unwrap();
    let error = open(&directory.path().join("renamed.gguf")).err().unwrap().to_string();
    assert!(error.contains("-00001-of-00002.gguf"), "{error}");
}

#[test]
fn made_up_weights_need_a_configuration_alone() {
    let directory = tempfile::tempdir().unwrap();
    let write = |dtype: &str| {
        let mut config = config();
        config["torch_dtype"] = dtype.into();
        std::fs::write(directory.path().join("config.json"), config.to_string()).unwrap();
    };
    let open = |seed| {
        let options = OpenOptions { load_format: LoadFormat::Dummy, dummy_seed: seed, ..OpenOptions::default() };
        ModelSource::open(directory.path().to_str().unwrap(), &options)
    };
    for (dtype, kv_dtype) in [("float32", KvDType::F32), ("bfloat16", KvDType::BF16), ("float16", KvDType::F16)] {
        write(dtype);
        assert_eq!(open(0).unwrap().kv_dtype(), kv_dtype);
    }
    assert_eq!(logits(&open(1).unwrap()), logits(&open(1).unwrap()));
    assert_ne!(logits(&open(1).unwrap()), logits(&open(2).unwrap()));
    write("int8");
    assert!(open(0).err().unwrap().to_string().contains("`torch_dtype` is `int8`"));
}

#[test]
fn tensors_that_do_not_fit_are_named() {
    let error = |directory: tempfile::TempDir| load(&open(directory.path()).unwrap()).err().unwrap().to_string();
    let missing = error(directory(|_, table| drop(table.remove(9))));
    assert!(missing.contains("`model.layers.0.mlp.up_proj.weight` is missing"), "{missing}");
    let untied = error(directory(|config, _| config["tie_word_embeddings"] = false.into()));
    assert!(untied.contains("`lm_head.weight` is missing"), "{untied}");
    let shape = error(directory(|_, table| table[3].2 = vec![HIDDEN, 16]));
    assert!(shape.contains("`model.layers.0.self_attn.q_proj.weight` has shape [32, 16]"), "{shape}");
    assert!(shape.contains("[32, 32]"), "{shape}");
}

#[test]
fn tensors_nobody_needs_are_counted() {
    let directory = directory(|_, table| {
        table.push(("model.layers.0.surplus.weight", "", vec![2]));
        table.push(("model.layers.0.self_attn.rotary_emb.inv_freq", "", vec![4]));
        table.push(("lm_head.weight", "", vec![VOCABULARY, HIDDEN]));
    });
    assert_eq!(load(&open(directory.path()).unwrap()).unwrap().report.unused_tensors, 1);
}

#[test]
fn a_head_that_is_tied_takes_no_memory_though_it_is_there() {
    let without = directory(|_, _| {});
    let with = directory(|_, table| table.push(("lm_head.weight", "", vec![VOCABULARY, HIDDEN])));
    let [without, with] = [without, with].map(|directory| open(directory.path()).unwrap().weight_bytes(|_, _| 0));
    assert_eq!(with, without);
}

#[test]
fn a_bias_of_a_gguf_file_is_used_or_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("m.gguf");
    let mut writer = gguf(&table());
    writer.tensor("surplus.bias", &[1], 0, vec![0; 4]);
    std::fs::write(&path, writer.build()).unwrap();
    assert_eq!(load(&open(&path).unwrap()).unwrap().report.unused_tensors, 1);
    writer.tensor("blk.0.attn_k.bias", &[KV_HEADS * HEAD_DIM], 0, vec![0; KV_HEADS * HEAD_DIM * 4]);
    std::fs::write(&path, writer.build()).unwrap();
    let error = load(&open(&path).unwrap()).err().unwrap().to_string();
    assert!(error.contains("tensor `blk.0.attn_k.bias` is not supported"), "{error}");
}

#[test]
fn what_is_not_a_model_is_said_so() {
    let directory = tempfile::tempdir().unwrap();
    let error = |path: &Path| open(path).err().unwrap().to_string();
    assert!(error(&directory.path().join("absent")).contains("neither a directory with a config.json"));
    assert!(error(directory.path()).contains("give the path of the .gguf file"));
    let file = directory.path().join("model.bin");
    std::fs::write(&file, "x").unwrap();
    assert!(error(&file).contains("truncated"));
    std::fs::write(&file, "some text").unwrap();
    assert!(error(&file).contains("not a GGUF file"));
    std::fs::write(directory.path().join("config.json"), "{\"rope_theta\": NaN}").unwrap();
    assert!(error(directory.path()).contains("config.json"));
    let options = OpenOptions { load_format: LoadFormat::Dummy, ..OpenOptions::default() };
    let error = ModelSource::open(file.to_str().unwrap(), &options).err().unwrap().to_string();
    assert!(error.contains("needs a directory"), "{error}");
}

proptest! {
    /// Damage in the metadata and the tensor table: the first 1,500 bytes of the file.
    #[test]
    fn a_damaged_file_is_an_error_or_a_model_and_never_a_panic(
        damage in proptest::collection::vec((0usize..1500, any::<u8>()), 1..4),
    ) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("m.gguf");
        let mut bytes = gguf(&table()).build();
        for (at, value) in damage {
            bytes[at] = value;
        }
        std::fs::write(&path, bytes).unwrap();
        if let Ok(source) = open(&path) {
            let _ = load(&source);
        }
    }
}

#[test]
fn a_fingerprint_is_the_same_for_the_same_model_and_for_no_other() {
    let of = |directory: &tempfile::TempDir| open(directory.path()).unwrap().fingerprint().unwrap();
    let same = directory(|_, _| {});
    let base = of(&same);
    assert_eq!(base, of(&directory(|_, _| {})), "another copy");
    assert_ne!(base, of(&directory(|config, _| config["rope_theta"] = 5e5.into())), "another shape");
    assert_ne!(base, of(&directory(|_, table| table.truncate(5))), "fewer tensors");
    std::fs::write(same.path().join("tokenizer.json"), "{}").unwrap();
    assert_ne!(base, of(&same), "another tokenizer");
    let spoilt = directory(|_, _| {});
    let path = spoilt.path().join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&path, bytes).unwrap();
    assert_ne!(base, of(&spoilt), "other weights");
}

#[test]
fn a_fingerprint_of_a_gguf_file_covers_metadata_and_weights() {
    let directory = tempfile::tempdir().unwrap();
    let of = |writer: &GgufWriter| {
        let path = directory.path().join("m.gguf");
        std::fs::write(&path, writer.build()).unwrap();
        open(&path).unwrap().fingerprint().unwrap()
    };
    let base = of(&gguf(&table()));
    assert_eq!(base, of(&gguf(&table())));
    assert_ne!(base, of(gguf(&table()).string("general.name", "other")));
    let mut surplus = gguf(&table());
    surplus.tensor("surplus", &[1], 0, vec![0; 4]);
    assert_ne!(base, of(&surplus));
}
