use engine_kernels::DType;

/// Bytes of each sample of a tensor.
const SAMPLE_BYTES: usize = 4096;
/// Samples of a tensor, evenly spread, its first and last bytes among them.
const SAMPLES: usize = 4;

/// Collects what tells one model from another.
pub(crate) struct Fingerprint(blake3::Hasher);

impl Fingerprint {
    pub(crate) fn new() -> Self {
        let mut this = Self(blake3::Hasher::new());
        this.part("engine model fingerprint", b"1");
        this
    }

    /// Adds a named part. Lengths go in too, so that parts cannot run into each other.
    pub(crate) fn part(&mut self, name: &str, data: &[u8]) {
        for bytes in [name.as_bytes(), data] {
            self.0.update(&(bytes.len() as u64).to_le_bytes());
            self.0.update(bytes);
        }
    }

    /// Adds a tensor: what it is, and samples of its contents.
    pub(crate) fn tensor(&mut self, name: &str, dtype: Option<DType>, shape: &[usize], data: &[u8]) {
        self.part(name, format!("{dtype:?} {shape:?} {}", data.len()).as_bytes());
        if data.len() <= SAMPLES * SAMPLE_BYTES {
            self.0.update(data);
            return;
        }
        for sample in 0..SAMPLES {
            let start = (data.len() - SAMPLE_BYTES) * sample / (SAMPLES - 1);
            self.0.update(&data[start..start + SAMPLE_BYTES]);
        }
    }

    pub(crate) fn finish(self) -> [u8; 32] {
        *self.0.finalize().as_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(data: &[u8]) -> [u8; 32] {
        let mut fingerprint = Fingerprint::new();
        fingerprint.tensor("w", Some(DType::F32), &[data.len() / 4], data);
        fingerprint.finish()
    }

    #[test]
    fn a_change_at_either_end_of_a_tensor_is_seen() {
        let base = vec![0u8; 1_000_004];
        for place in [0, base.len() - 1, SAMPLE_BYTES - 1] {
            let mut other = base.clone();
            other[place] = 1;
            assert_ne!(of(&base), of(&other), "{place}");
        }
    }

    #[test]
    fn small_tensors_are_read_whole() {
        let base = vec![0u8; SAMPLES * SAMPLE_BYTES];
        for place in (0..base.len()).step_by(977) {
            let mut other = base.clone();
            other[place] = 1;
            assert_ne!(of(&base), of(&other), "{place}");
        }
    }

    #[test]
    fn parts_do_not_run_into_each_other() {
        let of = |parts: &[(&str, &[u8])]| {
            let mut fingerprint = Fingerprint::new();
            for (name, data) in parts {
                fingerprint.part(name, data);
            }
            fingerprint.finish()
        };
        assert_ne!(of(&[("ab", b"c")]), of(&[("a", b"bc")]));
    }
}
