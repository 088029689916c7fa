use std::fs::File;
use std::io::{Error, ErrorKind, Read, Result};
use std::path::Path;

/// Largest `config.json`, index or template that is read: real ones have some kilobytes, an index of many shards
/// megabytes.
pub(crate) const CONFIG_BYTES_MAX: u64 = 64 << 20;
/// Largest `tokenizer.json` that is read: those of 260,000 tokens have 33 MB.
pub(crate) const TOKENIZER_BYTES_MAX: u64 = 256 << 20;

/// Reads a file of at most `bytes_max` bytes: a model's files come from strangers, and whoever reads one whole must
/// know how much memory that may take.
pub(crate) fn read_bounded(path: &Path, bytes_max: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    // Read and counted, not asked for its size: a pipe has none.
    File::open(path)?.take(bytes_max + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > bytes_max {
        return Err(Error::new(ErrorKind::FileTooLarge, format!("it is larger than {bytes_max} bytes")));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_read_up_to_the_limit_and_refused_beyond() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        std::fs::write(&path, b"12345").unwrap();
        assert_eq!(read_bounded(&path, 5).unwrap(), b"12345");
        assert_eq!(read_bounded(&path, 4).unwrap_err().kind(), ErrorKind::FileTooLarge);
        assert_eq!(read_bounded(Path::new("/dev/zero"), 1000).unwrap_err().kind(), ErrorKind::FileTooLarge);
    }
}
