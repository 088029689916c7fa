//! Models by their id on the Hugging Face hub: what is in the local cache is used as it is, the rest is fetched into
//! it. The cache is the one `huggingface_hub` keeps, so a model any other program has fetched is found.

mod gguf;
mod remote;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use remote::Remote;

use crate::ModelError;
use crate::defaults::{CHAT_TEMPLATE_FILE, TOOL_USE_TEMPLATE_FILE, read_json};
use crate::tokenizer::TOKENIZER_FILE;
use crate::weights::{INDEX_FILE, SINGLE_FILE, shards};

/// Without it there is often no chat template, and an end token short. Programs that only compute leave it out.
const TOKENIZER_CONFIG_FILE: &str = "tokenizer_config.json";
/// Files fetched beside the weights, where a model has them.
const SMALL_FILES: [&str; 6] = [
    "config.json",
    "generation_config.json",
    TOKENIZER_FILE,
    TOKENIZER_CONFIG_FILE,
    CHAT_TEMPLATE_FILE,
    TOOL_USE_TEMPLATE_FILE,
];

/// Long for a few small files, short for who waits where a firewall swallows what is asked.
const PATIENCE: Duration = Duration::from_secs(10);

/// Why a model of the hub could not be had, and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// Not to be fetched, and not there.
    #[error(
        "`{id}` is not a local path, the cache {} holds no complete copy of it, and HF_HUB_OFFLINE is set; unset it, \
         or fetch the model where there is a network (`hf download {wanted}`) and copy it here",
        cache.display()
    )]
    Offline {
        /// The model.
        id: String,
        /// What of it, as `hf download` is told.
        wanted: String,
        /// Where was looked.
        cache: PathBuf,
    },
    /// No answer.
    #[error(
        "`{id}` is not a local path or in the cache {}, and {endpoint} cannot be reached ({problem}); without a \
         network, give a directory or .gguf file, set HF_ENDPOINT to a mirror, or fetch the model elsewhere \
         (`hf download {wanted}`) and copy the cache here; behind a proxy that inspects TLS, fetch it into this cache \
         with `hf download`, which can be told of the proxy's certificate authority: here Mozilla's alone are trusted",
        cache.display()
    )]
    Unreachable {
        /// The model.
        id: String,
        /// What of it, as `hf download` is told.
        wanted: String,
        /// Where was looked first.
        cache: PathBuf,
        /// The server.
        endpoint: String,
        /// What went wrong.
        problem: String,
    },
    /// The server knows no such model, or does not say that it does.
    #[error("{endpoint} has no model `{id}` at revision `{revision}`{hint}")]
    NoSuchModel {
        /// The model.
        id: String,
        /// The revision asked for.
        revision: String,
        /// The server.
        endpoint: String,
        /// What else it may mean, beginning with punctuation.
        hint: &'static str,
    },
    /// The model wants an agreement, or the token is not allowed to read it.
    #[error(
        "{endpoint} does not let this token read `{id}`: accept its terms at {endpoint}/{id}, or use another HF_TOKEN"
    )]
    Forbidden {
        /// The model.
        id: String,
        /// The server.
        endpoint: String,
    },
    /// The model has no weights in a format that is read.
    #[error("`{id}` has no safetensors weights{hint}")]
    NoWeights {
        /// The model.
        id: String,
        /// What it has instead.
        hint: String,
    },
    /// No GGUF file has the quantisation in its name.
    #[error("`{id}` has no GGUF file with `{quantization}` in its name; it has {files}")]
    NoGguf {
        /// The model.
        id: String,
        /// What was looked for.
        quantization: String,
        /// Its GGUF files.
        files: String,
    },
    /// More than one has.
    #[error(
        "`{id}` has several GGUF files with `{quantization}` in their names ({files}); give more of the name of one"
    )]
    SeveralGguf {
        /// The model.
        id: String,
        /// What was looked for.
        quantization: String,
        /// Those that have it.
        files: String,
    },
    /// The model has its tokenizer in another form only.
    #[error(
        "`{id}` has no tokenizer.json, the only form of tokenizer that is read (tekken.json and tokenizer.model are \
         not); take a conversion that has one, or a GGUF file"
    )]
    NoTokenizer {
        /// The model.
        id: String,
    },
    /// Fetching failed midway.
    #[error("cannot fetch {file} of `{id}` from {endpoint}: {problem}; what has arrived is kept, start again to go on")]
    Fetch {
        /// The model.
        id: String,
        /// The file.
        file: String,
        /// The server.
        endpoint: String,
        /// What went wrong.
        problem: String,
    },
    /// A setting that makes no sense.
    #[error("{0}")]
    Setting(String),
}

/// Where the hub and its cache are.
#[derive(Debug, Clone)]
pub(crate) struct Hub {
    cache: PathBuf,
    endpoint: String,
    token: Option<String>,
    offline: bool,
    progress: bool,
    /// How long a copy that can be used is kept waiting for the rest.
    patience: Duration,
}

impl Hub {
    /// Settings from HF_HOME, HF_HUB_CACHE, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE, as `huggingface_hub` reads them.
    pub(crate) fn from_env(progress: bool) -> Result<Self, HubError> {
        Self::from_vars(|name| std::env::var(name).ok().filter(|value| !value.is_empty()), progress)
    }

    fn from_vars(var: impl Fn(&str) -> Option<String>, progress: bool) -> Result<Self, HubError> {
        let home = match (var("HF_HOME"), var("XDG_CACHE_HOME"), var("HOME")) {
            (Some(home), ..) => Some(PathBuf::from(home)),
            (None, Some(cache), _) => Some(Path::new(&cache).join("huggingface")),
            (None, None, Some(home)) => Some(Path::new(&home).join(".cache/huggingface")),
            (None, None, None) => None,
        };
        let home =
            home.ok_or_else(|| HubError::Setting("neither HF_HOME nor HOME is set: no place for a cache".into()))?;
        let endpoint = var("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into());
        if !endpoint.starts_with("http://") && !endpoint.starts_with("https://") {
            return Err(HubError::Setting(format!("HF_ENDPOINT `{endpoint}` does not begin with http:// or https://")));
        }
        let token = var("HF_TOKEN").or_else(|| std::fs::read_to_string(home.join("token")).ok());
        let offline = var("HF_HUB_OFFLINE").unwrap_or_default().to_uppercase();
        Ok(Self {
            cache: var("HF_HUB_CACHE").map_or_else(|| home.join("hub"), PathBuf::from),
            endpoint: endpoint.trim_end_matches('/').into(),
            token: token.map(|token| token.trim().to_owned()).filter(|token| !token.is_empty()),
            offline: ["1", "ON", "YES", "TRUE"].contains(&offline.as_str()),
            progress,
            patience: PATIENCE,
        })
    }

    /// The directory of a model's files, fetched if need be, and what `read` makes of it. That is asked as soon as the
    /// small ones are there: a model it refuses costs no download. `weights`: whether they are wanted too.
    pub(crate) fn snapshot<T>(
        &self,
        id: &str,
        revision: &str,
        weights: bool,
        read: impl Fn(&Path) -> Result<T, ModelError>,
    ) -> Result<(PathBuf, T), ModelError> {
        check_revision(revision)?;
        let with_content = |directory: PathBuf| read(&directory).map(|content| (directory, content));
        let copy = || self.cached(id, revision, weights);
        if let Some(directory) = copy() {
            if !self.offline && !self.is_whole(id, &self.commit(id, revision)) {
                self.complete(id, revision);
            }
            return with_content(directory);
        }
        if self.offline {
            return Err(HubError::Offline { id: id.into(), wanted: id.into(), cache: self.cache.clone() }.into());
        }
        let _alone = self.alone(id)?;
        match copy() {
            // Whoever was waited for has fetched it.
            Some(directory) => with_content(directory),
            None => self.fetch(id, revision, weights, &read),
        }
    }

    /// Fetches what a copy lacks that can be used as it is. Where that takes too long, it goes on by itself, and the
    /// next start has what it brought.
    fn complete(&self, id: &str, revision: &str) {
        let (sender, receiver) = mpsc::channel();
        let (hub, model, revision) = (self.clone(), id.to_owned(), revision.to_owned());
        std::thread::spawn(move || {
            let completed = hub.complete_now(&model, &revision).map_err(|error| match error {
                ModelError::Hub(HubError::Unreachable { problem, .. }) => problem,
                error => error.to_string(),
            });
            // Nobody may be waiting any more.
            let _ = sender.send(completed);
        });
        let too_long = |_| Err(format!("not done within {} s", self.patience.as_secs()));
        if let Err(problem) = receiver.recv_timeout(self.patience).unwrap_or_else(too_long) {
            tracing::warn!(
                model = id,
                problem,
                "the copy in the cache has no {TOKENIZER_CONFIG_FILE} or no chat template, and it is not known whether \
                 the hub has; used as it is"
            );
        }
    }

    fn complete_now(&self, id: &str, revision: &str) -> Result<(), ModelError> {
        let _alone = self.alone(id)?;
        // Wherever the branch is by now.
        let commit = self.commit(id, revision);
        // Whoever was waited for has fetched it.
        if !self.is_whole(id, &commit) {
            Remote::ask(self, id, &commit, id)?.get_all(&SMALL_FILES)?;
        }
        Ok(())
    }

    /// Whether what programs leave out that only compute is there, or the model is known to have none.
    fn is_whole(&self, id: &str, commit: &str) -> bool {
        let directory = self.directory(id, commit);
        let known = |file: &str| directory.join(file).exists() || self.absence(id, commit, file).exists();
        let has_template = |config: serde_json::Value| !config["chat_template"].is_null();
        let inside =
            || read_json(&directory.join(TOKENIZER_CONFIG_FILE)).is_ok_and(|config| config.is_some_and(has_template));
        known(TOKENIZER_CONFIG_FILE) && (known(CHAT_TEMPLATE_FILE) || inside())
    }

    /// Where `huggingface_hub` notes with an empty file that a model has none of that path.
    fn absence(&self, id: &str, commit: &str, file: &str) -> PathBuf {
        self.cache.join(folder(id)).join(".no_exist").join(commit).join(file)
    }

    /// Waits until nobody else fetches the model into this cache, and keeps others from it until the file is dropped:
    /// hf-hub, which knows single files only, fails when it has waited five seconds for one, and else fetches it again.
    fn alone(&self, id: &str) -> Result<File, ModelError> {
        // `huggingface_hub` has its locks there.
        let directory = self.cache.join(".locks").join(folder(id));
        let path = directory.join("engine.lock");
        let lock = || -> std::io::Result<File> {
            std::fs::create_dir_all(&directory)?;
            let file = File::create(&path)?;
            if file.try_lock().is_err() {
                tracing::info!(model = id, "another process fetches it; waiting for that");
                file.lock()?;
            }
            Ok(file)
        };
        lock().map_err(ModelError::io(&path))
    }

    /// The commit that the cache has of a revision; the revision itself, if that is one or the cache has none.
    fn commit(&self, id: &str, revision: &str) -> String {
        let commit = std::fs::read_to_string(self.cache.join(folder(id)).join("refs").join(revision));
        commit.map_or_else(|_| revision.to_owned(), |commit| commit.trim().to_owned())
    }

    /// Where the cache has a model's files, if it has.
    fn directory(&self, id: &str, revision: &str) -> PathBuf {
        self.cache.join(folder(id)).join("snapshots").join(self.commit(id, revision))
    }

    /// A copy in the cache that has all that a model cannot do without.
    fn cached(&self, id: &str, revision: &str, weights: bool) -> Option<PathBuf> {
        let directory = self.directory(id, revision);
        let index = directory.join(INDEX_FILE);
        let has_weights = || {
            directory.join(SINGLE_FILE).exists()
                || shards(&index).is_ok_and(|names| names.iter().all(|name| directory.join(name).exists()))
        };
        let has = |name: &str| directory.join(name).exists();
        let complete = has("config.json") && has(TOKENIZER_FILE) && (!weights || has_weights());
        complete.then_some(directory)
    }

    fn fetch<T>(
        &self,
        id: &str,
        revision: &str,
        weights: bool,
        read: impl Fn(&Path) -> Result<T, ModelError>,
    ) -> Result<(PathBuf, T), ModelError> {
        let remote = Remote::ask(self, id, revision, id)?;
        if !remote.has("config.json") || (weights && !remote.has(SINGLE_FILE) && !remote.has(INDEX_FILE)) {
            let hint = match gguf::whole_files(&remote.files).as_slice() {
                [] => String::new(),
                some => {
                    let list = gguf::list(some);
                    format!("; `{id}:QUANT` is the one of its GGUF files that has QUANT in its name ({list})")
                }
            };
            return Err(HubError::NoWeights { id: id.into(), hint }.into());
        }
        // Weights last: a snapshot that has them has everything.
        remote.get_all(&SMALL_FILES)?;
        let content = read(&remote.directory)?;
        if !remote.has(TOKENIZER_FILE) {
            return Err(HubError::NoTokenizer { id: id.into() }.into());
        }
        if weights && remote.has(SINGLE_FILE) {
            remote.get(SINGLE_FILE)?;
        } else if weights {
            remote.get(INDEX_FILE)?;
            for name in shards(&remote.directory.join(INDEX_FILE))? {
                remote.get(&name)?;
            }
        }
        Ok((remote.finish()?, content))
    }
}

/// What a model's directory in the cache is called.
fn folder(id: &str) -> String {
    format!("models--{}", id.replace('/', "--"))
}

/// Whether a path with `/` names something below where it is looked for.
fn is_plain(path: &str) -> bool {
    path.split('/').all(|part| !part.is_empty() && part != "." && part != "..")
}

fn check_revision(revision: &str) -> Result<(), HubError> {
    match is_plain(revision) {
        true => Ok(()),
        false => Err(HubError::Setting(format!("`{revision}` is not a revision"))),
    }
}

/// A model's id, and what one of its GGUF files has in its name, where `model` has the form of one: `organisation/name`
/// or `organisation/name:QUANT`.
pub(crate) fn parse_id(model: &str) -> Option<(&str, Option<&str>)> {
    let (id, quantization) = match model.split_once(':') {
        Some((id, quantization)) => (id, Some(quantization)),
        None => (model, None),
    };
    let is_word = |text: &str| !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c));
    (is_id(id) && quantization.is_none_or(is_word)).then_some((id, quantization))
}

fn is_id(id: &str) -> bool {
    let part = |part: &str| {
        part.starts_with(|c: char| c.is_ascii_alphanumeric())
            && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
            && !part.contains("..")
            && !part.contains("--")
    };
    id.split_once('/').is_some_and(|(organisation, name)| part(organisation) && part(name))
}

#[cfg(test)]
mod tests;
