//! One of a model's GGUF files, by what is in its name.

use std::path::{Path, PathBuf};

use super::remote::Remote;
use super::{Hub, HubError, check_revision, is_plain};
use crate::ModelError;

/// Files that a message lists at most: what a server says of a model may be long.
const LISTED_MAX: usize = 40;

impl Hub {
    /// A model's GGUF file (the first of a split one) that has `quantization` in its name, fetched if need be.
    pub(crate) fn gguf(&self, id: &str, revision: &str, quantization: &str) -> Result<PathBuf, ModelError> {
        check_revision(revision)?;
        let directory = self.directory(id, revision);
        // Without the quantisations that nobody asked for.
        let wanted = format!("{id} --include '*{quantization}*'");
        let cached = || {
            let parts = choose(id, &files_in(&directory), quantization)?;
            let paths: Vec<_> = parts.iter().map(|part| directory.join(part)).collect();
            Ok::<_, HubError>(paths.iter().all(|path| path.exists()).then(|| paths[0].clone()))
        };
        match cached() {
            Ok(Some(path)) => return Ok(path),
            Err(error @ HubError::SeveralGguf { .. }) if self.offline => return Err(error.into()),
            _ if self.offline => {
                return Err(HubError::Offline { id: id.into(), wanted, cache: self.cache.clone() }.into());
            }
            _ => {}
        }
        let _alone = self.alone(id)?;
        // Whoever was waited for has fetched it.
        if let Ok(Some(path)) = cached() {
            return Ok(path);
        }
        let ask = |revision: &str| {
            let remote = Remote::ask(self, id, revision, &wanted)?;
            let parts = choose(id, &remote.files, quantization)?;
            Ok::<_, HubError>((remote, parts))
        };
        // At the commit of the model's other files that are there, which would not be found any more beside a later
        // one's.
        let commit = self.commit(id, revision);
        let (remote, parts) = match ask(&commit) {
            Err(HubError::NoSuchModel { .. } | HubError::NoGguf { .. }) if commit != revision => ask(revision)?,
            there => there?,
        };
        for part in &parts {
            remote.get(part)?;
        }
        Ok(remote.finish()?.join(&parts[0]))
    }
}

/// The file with `quantization` in its name, or its parts. Not empty.
fn choose(id: &str, files: &[String], quantization: &str) -> Result<Vec<String>, HubError> {
    let whole = whole_files(files);
    let matching: Vec<_> = whole.iter().copied().filter(|file| has_word(file, quantization)).collect();
    let (id, quantization) = (id.to_owned(), quantization.to_owned());
    match matching.as_slice() {
        [] => Err(HubError::NoGguf { id, quantization, files: list(&whole) }),
        &[file] => Ok(match part(file) {
            Some((stem, 1, count)) if count > 0 => {
                (1..=count).map(|number| format!("{stem}-{number:05}-of-{count:05}.gguf")).collect()
            }
            _ => vec![file.into()],
        }),
        several => Err(HubError::SeveralGguf { id, quantization, files: list(several) }),
    }
}

/// GGUF files, and of split ones the first parts, in the order of their names.
pub(super) fn whole_files(files: &[String]) -> Vec<&str> {
    let is_whole =
        |file: &&str| file.ends_with(".gguf") && is_plain(file) && part(file).is_none_or(|(_, number, _)| number == 1);
    let mut whole: Vec<_> = files.iter().map(String::as_str).filter(is_whole).collect();
    whole.sort_unstable();
    whole
}

/// What comes before the number of a part of a split file, the number, and how many parts there are.
fn part(file: &str) -> Option<(&str, u32, u32)> {
    let (start, count) = file.strip_suffix(".gguf")?.rsplit_once("-of-")?;
    let (stem, number) = start.rsplit_once('-')?;
    let five_digits = |text: &str| text.parse::<u32>().ok().filter(|_| text.len() == 5);
    Some((stem, five_digits(number)?, five_digits(count)?))
}

/// Whether a name has `word` in it, in any case, and not as a piece of another quantisation's name, as `BF16` has `F16`
/// and `Q6_K_L` has `Q6_K`.
fn has_word(file: &str, word: &str) -> bool {
    let (file, word) = (file.to_ascii_lowercase(), word.to_ascii_lowercase());
    file.match_indices(&word).any(|(start, _)| {
        let before = file[..start].chars().next_back();
        let after = file[start + word.len()..].chars().next();
        before.is_none_or(|c| !c.is_ascii_alphanumeric())
            && after.is_none_or(|c| !c.is_ascii_alphanumeric() && c != '_')
    })
}

/// For messages.
pub(super) fn list(files: &[&str]) -> String {
    if files.is_empty() {
        return "none at all".into();
    }
    let listed = files[..files.len().min(LISTED_MAX)].join(", ");
    if files.len() > LISTED_MAX { listed + ", ..." } else { listed }
}

/// Paths of all files below a directory, with `/`.
fn files_in(directory: &Path) -> Vec<String> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        // Links, which files of a snapshot are, are not followed.
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            files.extend(files_in(&entry.path()).into_iter().map(|inner| format!("{name}/{inner}")));
        } else {
            files.push(name);
        }
    }
    files
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(files: &[&str], quantization: &str) -> Result<Vec<String>, String> {
        let files: Vec<String> = files.iter().map(|&file| file.into()).collect();
        choose("org/tiny", &files, quantization).map_err(|error| error.to_string())
    }

    #[test]
    fn a_file_is_chosen_by_a_whole_word_of_its_name_in_any_case() {
        let files = ["m-Q6_K_L.gguf", "m-Q6_K.gguf", "m-BF16.gguf", "m_f16.gguf", "m.Q4_K_M.gguf", "Q4_K_M.txt", "q8"];
        for (quantization, file) in
            [("q6_k", "m-Q6_K.gguf"), ("Q6_K_L", "m-Q6_K_L.gguf"), ("F16", "m_f16.gguf"), ("Q4_K_M", "m.Q4_K_M.gguf")]
        {
            assert_eq!(chosen(&files, quantization).unwrap(), [file]);
        }
        let error = chosen(&files, "q8").unwrap_err();
        let all = "it has m-BF16.gguf, m-Q6_K.gguf, m-Q6_K_L.gguf, m.Q4_K_M.gguf, m_f16.gguf";
        assert!(error.contains("`q8`") && error.ends_with(all), "{error}");
        assert!(chosen(&["m.safetensors"], "q8").unwrap_err().contains("none at all"));
    }

    #[test]
    fn several_files_are_told_apart_by_more_of_their_names() {
        let files = ["m-Q4_0.gguf", "m-UD-Q4_0.gguf", "m-Q8_0.gguf"];
        let error = chosen(&files, "Q4_0").unwrap_err();
        assert!(error.contains("(m-Q4_0.gguf, m-UD-Q4_0.gguf)"), "{error}");
        assert_eq!(chosen(&files, "ud-q4_0").unwrap(), ["m-UD-Q4_0.gguf"]);
        let many: Vec<String> = (0..100).map(|i| format!("m{i}.Q4_0.gguf")).collect();
        let error = choose("org/tiny", &many, "Q4_0").unwrap_err().to_string();
        assert!(error.matches(".gguf").count() == LISTED_MAX && error.contains(", ...)"), "{error}");
    }

    #[test]
    fn a_split_file_is_all_its_parts_in_order() {
        let files =
            ["BF16/m-BF16-00002-of-00002.gguf", "BF16/m-BF16-00001-of-00002.gguf", "m-Q8_0-00001-of-00000.gguf"];
        assert_eq!(chosen(&files, "bf16").unwrap(), [files[1], files[0]]);
        assert_eq!(chosen(&files, "q8_0").unwrap(), [files[2]]);
    }

    #[test]
    fn a_server_cannot_name_files_elsewhere() {
        for file in ["../m-Q4_0.gguf", "/m-Q4_0.gguf", "a/../../m-Q4_0.gguf", "a//m-Q4_0.gguf"] {
            assert!(chosen(&[file], "Q4_0").is_err(), "{file}");
        }
    }
}
