use std::path::PathBuf;

use hf_hub::api::sync::{ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};

use super::{Hub, HubError, folder};
use crate::ModelError;

/// A model as the server has it, at one commit: a branch that moves meanwhile, or has moved since some files were
/// cached, is not mixed up.
pub(super) struct Remote<'a> {
    hub: &'a Hub,
    id: &'a str,
    /// At the revision asked for.
    named: Repo,
    commit: String,
    /// At the commit.
    repo: ApiRepo,
    /// Paths of its files.
    pub(super) files: Vec<String>,
    /// Where they go.
    pub(super) directory: PathBuf,
}

impl<'a> Remote<'a> {
    /// Asks what there is. `wanted`: what of it, as `hf download` is told.
    pub(super) fn ask(hub: &'a Hub, id: &'a str, revision: &str, wanted: &str) -> Result<Self, HubError> {
        let explain = |error: ApiError| explain(hub, id, revision, wanted, &error);
        let api = ApiBuilder::from_cache(Cache::new(hub.cache.clone()))
            .with_endpoint(hub.endpoint.clone())
            .with_token(hub.token.clone())
            .with_progress(hub.progress)
            .build()
            .map_err(explain)?;
        let named = Repo::with_revision(id.into(), RepoType::Model, revision.into());
        let info = api.repo(named.clone()).info().map_err(explain)?;
        let commit = info.sha;
        if commit.is_empty() || !commit.chars().all(|c| c.is_ascii_alphanumeric()) {
            let problem = format!("{} answers with a commit `{commit}`, which is none", hub.endpoint);
            return Err(HubError::Setting(problem));
        }
        let repo = api.repo(Repo::with_revision(id.into(), RepoType::Model, commit.clone()));
        let files = info.siblings.into_iter().map(|file| file.rfilename).collect();
        let directory = hub.cache.join(folder(id)).join("snapshots").join(&commit);
        Ok(Self { hub, id, named, commit, repo, files, directory })
    }

    /// Whether it has a file of that path.
    pub(super) fn has(&self, file: &str) -> bool {
        self.files.iter().any(|path| path == file)
    }

    /// Fetches those of the files that there are, and notes that the others are not: they need not be asked for again.
    pub(super) fn get_all(&self, files: &[&str]) -> Result<(), HubError> {
        for &file in files {
            if self.has(file) {
                self.get(file)?;
            } else {
                let note = self.hub.absence(self.id, &self.commit, file);
                // Without it the next start asks once more.
                let _ = note.parent().map_or(Ok(()), std::fs::create_dir_all).and_then(|()| std::fs::write(&note, ""));
            }
        }
        Ok(())
    }

    /// Fetches a file, unless it is there: hf-hub finds only what it has fetched itself.
    pub(super) fn get(&self, file: &str) -> Result<(), HubError> {
        if self.directory.join(file).exists() {
            return Ok(());
        }
        let endpoint = &self.hub.endpoint;
        tracing::info!(model = self.id, file, endpoint, cache = %self.hub.cache.display(), "fetching");
        let fetched = self.repo.download(file).map_err(|error| match status(&error) {
            Some(403) => HubError::Forbidden { id: self.id.into(), endpoint: endpoint.clone() },
            _ => HubError::Fetch {
                id: self.id.into(),
                file: file.into(),
                endpoint: endpoint.clone(),
                problem: error.to_string(),
            },
        });
        fetched.map(drop)
    }

    /// Notes, once all is there, that the revision is this commit. The directory.
    pub(super) fn finish(self) -> Result<PathBuf, ModelError> {
        let cache = &self.hub.cache;
        let cached = Cache::new(cache.clone()).repo(self.named);
        cached.create_ref(&self.commit).map_err(ModelError::io(cache))?;
        Ok(self.directory)
    }
}

fn explain(hub: &Hub, id: &str, revision: &str, wanted: &str, error: &ApiError) -> HubError {
    let (id, endpoint) = (id.to_owned(), hub.endpoint.clone());
    let revision = revision.to_owned();
    match status(error) {
        // The hub hides what the asker may not see.
        Some(401) if hub.token.is_none() => {
            let hint = ", or it is private or gated: check the id, or set HF_TOKEN";
            HubError::NoSuchModel { id, revision, endpoint, hint }
        }
        Some(401 | 403) => HubError::Forbidden { id, endpoint },
        Some(404) => HubError::NoSuchModel { id, revision, endpoint, hint: "; check the id and --revision" },
        _ => {
            let (wanted, cache, problem) = (wanted.to_owned(), hub.cache.clone(), error.to_string());
            HubError::Unreachable { id, wanted, cache, endpoint, problem }
        }
    }
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
