use proptest::prelude::*;

use super::testing::GgufWriter;
use super::*;

fn small_file() -> Vec<u8> {
    let mut writer = GgufWriter::default();
    writer
        .string("general.architecture", "llama")
        .u32("llama.block_count", 2)
        .f32("llama.rope.freq_base", 10000.0)
        .bool("tokenizer.ggml.add_bos_token", true)
        .strings("tokenizer.ggml.tokens", &["a", "", "ä"])
        .i32s("tokenizer.ggml.token_type", &[1, -3, 2])
        .tensor("norm", &[2], 0, [1.0f32, 2.0].iter().flat_map(|x| x.to_le_bytes()).collect())
        .tensor("q", &[2, 32], 8, vec![7; 68]);
    writer.build()
}

#[test]
fn reads_what_was_written() {
    let file = Gguf::from_bytes(small_file()).unwrap();
    assert_eq!(file.string("general.architecture").unwrap(), Some("llama"));
    assert_eq!(file.unsigned("llama.block_count").unwrap(), Some(2));
    assert_eq!(file.float("llama.rope.freq_base").unwrap(), Some(10000.0));
    assert_eq!(file.boolean("tokenizer.ggml.add_bos_token").unwrap(), Some(true));
    let tokens = file.array("tokenizer.ggml.tokens").unwrap().unwrap();
    assert_eq!(tokens.strings().unwrap().collect::<Vec<_>>(), ["a", "", "ä"]);
    assert!(tokens.integers().is_none());
    let types = file.array("tokenizer.ggml.token_type").unwrap().unwrap();
    assert_eq!(types.integers().unwrap().collect::<Vec<_>>(), [1, -3, 2]);
    assert_eq!(file.unsigned("absent").unwrap(), None);

    let q = file.tensor("q").unwrap();
    assert_eq!((q.shape.as_slice(), q.dtype()), (&[2, 32][..], Some(DType::Q8_0)));
    assert_eq!(file.data("q").unwrap(), [7; 68]);
    assert_eq!(file.data("norm").unwrap()[..4], 1.0f32.to_le_bytes());
}

#[test]
fn a_value_of_another_type_is_an_error_that_names_the_key() {
    let file = Gguf::from_bytes(small_file()).unwrap();
    let error = file.unsigned("general.architecture").unwrap_err().to_string();
    assert_eq!(error, "metadata key `general.architecture`: \"llama\" is not a non-negative integer");
}

#[test]
fn every_truncation_is_an_error() {
    let bytes = small_file();
    for len in 0..bytes.len() {
        assert!(Gguf::from_bytes(bytes[..len].to_vec()).is_err(), "{len} of {} bytes were accepted", bytes.len());
    }
}

#[test]
fn hostile_counts_are_errors_and_allocate_nothing() {
    let header = |tensors: u64, keys: u64, rest: &[u8]| {
        let mut out = b"GGUF\x03\0\0\0".to_vec();
        out.extend(tensors.to_le_bytes());
        out.extend(keys.to_le_bytes());
        out.extend_from_slice(rest);
        out
    };
    let max = u64::MAX.to_le_bytes();
    let mut array = 1u64.to_le_bytes().to_vec();
    array.extend(b"k");
    array.extend(9u32.to_le_bytes());
    for element in 0..13u32 {
        for count in [u64::MAX, u64::MAX / 8, 1 << 40] {
            let mut rest = array.clone();
            rest.extend(element.to_le_bytes());
            rest.extend(count.to_le_bytes());
            rest.extend([0; 64]);
            assert!(Gguf::from_bytes(header(0, 1, &rest)).is_err(), "{count} elements of type {element}");
        }
    }
    for bytes in [header(u64::MAX, 0, &[]), header(0, u64::MAX, &[]), header(1 << 18, 0, &[]), header(0, 1, &max)] {
        assert!(Gguf::from_bytes(bytes).is_err());
    }
}

#[test]
fn a_tensor_of_impossible_size_is_an_error_that_names_it() {
    for shape in [&[usize::MAX, 2][..], &[1 << 40], &[1 << 31, 1 << 31], &[1 << 40, 1 << 40, 0]] {
        let bytes = GgufWriter::default().tensor("huge", shape, 0, vec![]).build();
        let error = Gguf::from_bytes(bytes).unwrap_err().to_string();
        assert!(error.contains("`huge`"), "{error}");
    }
}

#[test]
fn deep_arrays_versions_and_duplicates_are_refused() {
    let mut deep = Vec::new();
    for _ in 0..10_000 {
        deep.extend(9u32.to_le_bytes());
        deep.extend(1u64.to_le_bytes());
    }
    let error = |bytes| Gguf::from_bytes(bytes).unwrap_err();
    assert!(matches!(error(GgufWriter::default().raw("k", 9, &deep).build()), GgufError::Nesting { .. }));
    assert!(matches!(error(GgufWriter::default().u32("k", 1).u32("k", 2).build()), GgufError::Duplicate { .. }));
    assert!(matches!(error(GgufWriter::default().raw("k", 13, &[]).build()), GgufError::ValueType { kind: 13, .. }));
    assert!(matches!(error(b"GGUF\x01\0\0\0".to_vec()), GgufError::Version { version: 1 }));
    assert!(matches!(error(b"GGUF\0\0\0\x03".to_vec()), GgufError::BigEndian));
    assert!(matches!(error(b"PK\x03\x04".to_vec()), GgufError::NotGguf));
}

#[test]
fn an_unknown_tensor_type_is_kept_for_whoever_asks() {
    let file = Gguf::from_bytes(GgufWriter::default().tensor("t", &[256], 16, vec![0; 66]).build()).unwrap();
    let info = file.tensor("t").unwrap();
    assert_eq!((info.dtype(), ggml_type_name(info.ggml_type)), (None, "IQ2_XXS"));
    assert!(file.data("t").is_none());
}

proptest! {
    #[test]
    fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
        let mut file = b"GGUF\x03\0\0\0".to_vec();
        file.extend(bytes);
        let _ = Gguf::from_bytes(file);
    }

    #[test]
    fn a_damaged_file_never_panics(damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8)) {
        let mut bytes = small_file();
        for (at, value) in damage {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if let Ok(file) = Gguf::from_bytes(bytes) {
            for key in file.keys() {
                if let Some(Value::Array(array)) = file.get(key) {
                    let _ = (array.strings().map(Iterator::count), array.integers().map(Iterator::count));
                }
            }
            for (name, _) in file.tensors() {
                let _ = file.data(name);
            }
        }
    }
}
