//! Models by their id on the Hugging Face hub: what is in the local cache is used as it is, the rest is fetched into
//! it. The cache is the one `huggingface_hub` keeps, so a model any other program has fetched is found.

use std::fs::File;
use std::path::{Path, PathBuf};

use hf_hub::api::sync::{ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};

use crate::ModelError;
use crate::defaults::{CHAT_TEMPLATE_FILE, TOOL_USE_TEMPLATE_FILE};
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

/// Why a model of the hub could not be had, and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// Not to be fetched, and not there.
    #[error(
        "`{id}` is not a local path, the cache {} holds no complete copy of it, and HF_HUB_OFFLINE is set; unset it, \
         or fetch the model where there is a network (`hf download {id}`) and copy it here",
        cache.display()
    )]
    Offline {
        /// The model.
        id: String,
        /// Where was looked.
        cache: PathBuf,
    },
    /// No answer.
    #[error(
        "`{id}` is not a local path or in the cache {}, and {endpoint} cannot be reached ({problem}); without a \
         network, give a directory or .gguf file, set HF_ENDPOINT to a mirror, or fetch the model elsewhere \
         (`hf download {id}`) and copy the cache here; behind a proxy that inspects TLS, fetch it into this cache \
         with `hf download`, which can be told of the proxy's certificate authority: here Mozilla's alone are trusted",
        cache.display()
    )]
    Unreachable {
        /// The model.
        id: String,
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
        let plain = |part: &str| !part.is_empty() && part != "." && part != "..";
        if !revision.split('/').all(plain) {
            return Err(HubError::Setting(format!("`{revision}` is not a revision")).into());
        }
        let with_content = |directory: PathBuf| read(&directory).map(|content| (directory, content));
        let copy = || self.cached(id, revision, weights);
        let is_whole = |directory: &PathBuf| self.offline || directory.join(TOKENIZER_CONFIG_FILE).exists();
        if let Some(directory) = copy().filter(is_whole) {
            return with_content(directory);
        }
        if self.offline {
            return Err(HubError::Offline { id: id.into(), cache: self.cache.clone() }.into());
        }
        let fetched = self.alone(id).and_then(|_alone| match copy() {
            // Whoever was waited for has fetched it.
            Some(directory) if is_whole(&directory) => with_content(directory),
            // What another program has fetched in part stays at its commit.
            Some(directory) => {
                let commit = directory.file_name().and_then(|commit| commit.to_str()).unwrap_or(revision);
                self.fetch(id, commit, weights, &read)
            }
            None => self.fetch(id, revision, weights, &read),
        });
        match (fetched, copy()) {
            (Err(error @ (ModelError::Hub(_) | ModelError::Io { .. })), Some(directory)) => {
                let problem = match error {
                    ModelError::Hub(HubError::Unreachable { problem, .. }) => problem,
                    error => error.to_string(),
                };
                tracing::warn!(
                    model = id,
                    problem,
                    "the copy in the cache has no {TOKENIZER_CONFIG_FILE}, and it cannot be fetched; used as it is"
                );
                with_content(directory)
            }
            (fetched, _) => fetched,
        }
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

    /// A copy in the cache that has all that a model cannot do without.
    fn cached(&self, id: &str, revision: &str, weights: bool) -> Option<PathBuf> {
        let model = self.cache.join(folder(id));
        let commit = std::fs::read_to_string(model.join("refs").join(revision));
        let commit = commit.map_or_else(|_| revision.to_owned(), |commit| commit.trim().to_owned());
        let directory = model.join("snapshots").join(commit);
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
        let api = ApiBuilder::from_cache(Cache::new(self.cache.clone()))
            .with_endpoint(self.endpoint.clone())
            .with_token(self.token.clone())
            .with_progress(self.progress)
            .build()
            .map_err(|error| self.explain(id, revision, &error))?;
        let named = Repo::with_revision(id.into(), RepoType::Model, revision.into());
        let info = api.repo(named.clone()).info().map_err(|error| self.explain(id, revision, &error))?;
        if info.sha.is_empty() || !info.sha.chars().all(|c| c.is_ascii_alphanumeric()) {
            let problem = format!("{} answers with a commit `{}`, which is none", self.endpoint, info.sha);
            return Err(HubError::Setting(problem).into());
        }
        // By commit, so that a branch that moves meanwhile, or has moved since some files were cached, is not mixed up.
        let repo = api.repo(Repo::with_revision(id.into(), RepoType::Model, info.sha.clone()));
        let files: Vec<&str> = info.siblings.iter().map(|file| file.rfilename.as_str()).collect();
        if !files.contains(&"config.json") || (weights && !files.contains(&SINGLE_FILE) && !files.contains(&INDEX_FILE))
        {
            let gguf: Vec<_> = files.iter().filter(|name| name.ends_with(".gguf")).take(3).copied().collect();
            let hint = match gguf.as_slice() {
                [] => String::new(),
                some => format!("; download one of its GGUF files ({}, ...) and give its path", some.join(", ")),
            };
            return Err(HubError::NoWeights { id: id.into(), hint }.into());
        }
        if !files.contains(&TOKENIZER_FILE) {
            return Err(HubError::NoTokenizer { id: id.into() }.into());
        }
        tracing::info!(model = id, endpoint = self.endpoint, cache = %self.cache.display(), "fetching");
        let directory = self.cache.join(folder(id)).join("snapshots").join(&info.sha);
        let get = |file: &str| self.get(&repo, id, &directory, file);
        // Weights last: a snapshot that has them has everything.
        for name in SMALL_FILES.into_iter().filter(|name| files.contains(name)) {
            get(name)?;
        }
        let content = read(&directory)?;
        if weights && files.contains(&SINGLE_FILE) {
            get(SINGLE_FILE)?;
        } else if weights {
            get(INDEX_FILE)?;
            for name in shards(&directory.join(INDEX_FILE))? {
                get(&name)?;
            }
        }
        Cache::new(self.cache.clone()).repo(named).create_ref(&info.sha).map_err(ModelError::io(&self.cache))?;
        Ok((directory, content))
    }

    /// Fetches a file into the snapshot `directory`, unless it is there: hf-hub finds only what it has fetched itself.
    fn get(&self, repo: &ApiRepo, id: &str, directory: &Path, file: &str) -> Result<(), HubError> {
        if directory.join(file).exists() {
            return Ok(());
        }
        let fetched = repo.download(file).map_err(|error| match status(&error) {
            Some(403) => HubError::Forbidden { id: id.into(), endpoint: self.endpoint.clone() },
            _ => HubError::Fetch {
                id: id.into(),
                file: file.into(),
                endpoint: self.endpoint.clone(),
                problem: error.to_string(),
            },
        });
        fetched.map(drop)
    }

    fn explain(&self, id: &str, revision: &str, error: &ApiError) -> HubError {
        let (id, endpoint) = (id.to_owned(), self.endpoint.clone());
        let revision = revision.to_owned();
        match status(error) {
            // The hub hides what the asker may not see.
            Some(401) if self.token.is_none() => {
                let hint = ", or it is private or gated: check the id, or set HF_TOKEN";
                HubError::NoSuchModel { id, revision, endpoint, hint }
            }
            Some(401 | 403) => HubError::Forbidden { id, endpoint },
            Some(404) => HubError::NoSuchModel { id, revision, endpoint, hint: "; check the id and --revision" },
            _ => HubError::Unreachable { id, cache: self.cache.clone(), endpoint, problem: error.to_string() },
        }
    }
}

/// What a model's directory in the cache is called.
fn folder(id: &str) -> String {
    format!("models--{}", id.replace('/', "--"))
}

fn status(error: &ApiError) -> Option<u16> {
    match error {
        ApiError::RequestError(error) => match **error {
            ureq::Error::StatusCode(code) => Some(code),
            _ => None,
        },
        _ => None,
    }
}

/// Whether `model` has the form of a hub id: `organisation/name`.
pub(crate) fn is_hub_id(model: &str) -> bool {
    let part = |part: &str| {
        part.starts_with(|c: char| c.is_ascii_alphanumeric())
            && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
            && !part.contains("..")
            && !part.contains("--")
    };
    model.split_once('/').is_some_and(|(organisation, name)| part(organisation) && part(name))
}

#[cfg(test)]
mod tests;
