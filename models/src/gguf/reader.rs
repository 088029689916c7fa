use super::{GgufError, MAX_HEADER_BYTES};

/// A cursor over bytes nobody vouches for: nothing is taken that is not there.
pub(super) struct Reader<'a> {
    bytes: &'a [u8],
    position: usize,
    /// Whether the file goes on after `bytes`, so that running out means a header over the limit, not a short file.
    cut: bool,
}

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8], cut: bool) -> Self {
        Self { bytes, position: 0, cut }
    }

    pub(super) fn position(&self) -> usize {
        self.position
    }

    pub(super) fn left(&self) -> usize {
        self.bytes.len() - self.position
    }

    /// Takes `len` bytes; `what` names them in the error.
    pub(super) fn take(&mut self, len: u64, what: &str) -> Result<&'a [u8], GgufError> {
        if len > self.left() as u64 {
            return Err(self.too_short(what, len));
        }
        let start = self.position;
        self.position += len as usize;
        Ok(&self.bytes[start..self.position])
    }

    /// The error of wanting `needed` bytes that are not there.
    pub(super) fn too_short(&self, what: &str, needed: u64) -> GgufError {
        if self.cut {
            return GgufError::HeaderTooLong { limit: MAX_HEADER_BYTES };
        }
        GgufError::Truncated { what: what.into(), position: self.position, needed, left: self.left() }
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], GgufError> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N as u64, what)?);
        Ok(out)
    }

    pub(super) fn u32(&mut self, what: &str) -> Result<u32, GgufError> {
        self.array(what).map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self, what: &str) -> Result<u64, GgufError> {
        self.array(what).map(u64::from_le_bytes)
    }
}
