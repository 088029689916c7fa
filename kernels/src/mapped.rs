use std::fs::File;
use std::io;
use std::ops::Deref;
use std::path::Path;

use memmap2::Mmap;

/// A file's bytes, mapped read-only: what weights are borrowed from while a backend takes them over.
///
/// Mapping lives here because this crate is the one that may hold `unsafe`.
#[derive(Debug)]
pub struct MappedFile(Option<Mmap>);

impl MappedFile {
    /// Maps the file at `path`. The file must not be changed while it is mapped: on a shrunk file the system ends the
    /// process with SIGBUS, as it does for every program that maps its model.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
        }
        if metadata.len() == 0 {
            // A mapping cannot be empty; an empty file is its reader's error to report.
            return Ok(Self(None));
        }
        // SAFETY: the mapping is private and read-only, and nothing in this process writes to the file. Another process
        // that rewrites a model in place would change the bytes under us; they are read as plain integers and floats,
        // for which every bit pattern is valid, and whoever parses them checks text before calling it a string.
        let map = unsafe { Mmap::map(&file)? };
        Ok(Self(Some(map)))
    }
}

impl Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.0.as_deref().unwrap_or(&[])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_this_source_file() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/mapped.rs");
        let map = MappedFile::open(&path).unwrap();
        assert_eq!(&*map, include_bytes!("mapped.rs"));
    }

    #[test]
    fn a_directory_is_refused() {
        assert!(MappedFile::open(Path::new(env!("CARGO_MANIFEST_DIR"))).is_err());
    }
}
