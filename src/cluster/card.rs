//! What a worker says of itself when it registers.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::ModelKey;

/// Version of [`WorkerCard`]'s meaning. Fields may be added under the same number; a reader ignores those it does not
/// know, and cards of another number altogether.
pub const CARD_SCHEMA: u32 = 1;

/// What a worker does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Answers requests.
    Decode,
    /// Computes prompts for decode workers.
    Prefill,
}

impl Role {
    /// As it stands in etcd's keys.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Decode => "decode",
            Self::Prefill => "prefill",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What a worker says of itself when it registers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WorkerCard {
    /// [`CARD_SCHEMA`].
    pub schema: u32,
    /// The engine's version, for people.
    pub version: String,
    /// What it does.
    pub role: Role,
    /// `host:port` of its HTTP server, as others reach it.
    pub address: String,
    /// Where its transfer sessions are opened, in the transfer layer's words; null if it takes none.
    #[serde(default)]
    pub session: serde_json::Value,
    /// Transports it speaks, best first.
    #[serde(default)]
    pub transports: Vec<String>,
    /// How pages get into device memory or out of it, if that is where they are: which are staged through host memory,
    /// and why, and how adapters reach those that are not. For people; the name is older than the second half.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub staging: String,
    /// Identity of its host (the boot id): workers that share it can share memory, if they meet there.
    pub host_id: String,
    /// With which of them it does; absent where nothing is said of it, as in older builds' cards.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub local: Option<LocalView>,
    /// What it serves.
    pub model: ModelCard,
    /// Everything it must agree on with a worker it exchanges pages with.
    pub model_key: ModelKey,
}

/// What a process sees of its host, and as whom: what decides whether it reaches another's unix socket and is let in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LocalView {
    /// Its user; a worker shares memory with processes of its own alone.
    pub user: u32,
    /// Its mount namespace, within which a path means one file.
    pub mounts: String,
    /// The folder of its sockets: path, device and inode, by which processes of other namespaces find it too.
    pub folder: String,
}

impl LocalView {
    /// Whether two processes of one host can share memory.
    pub fn meets(&self, other: &Self) -> bool {
        self.user == other.user && (self.mounts == other.mounts || self.folder == other.folder)
    }
}

/// A model as a frontend lists it and another worker loads it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelCard {
    /// Names clients may use, the first one its own.
    pub names: Vec<String>,
    /// Tokens of a prompt and its answer together.
    pub max_model_len: usize,
    /// `--model` as it was given (made absolute if it is a path).
    pub source: String,
    /// `--revision`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// `--load-format`.
    pub load_format: String,
    /// `--kv-cache-dtype`, resolved: `f32`, `f16`, `bf16` or `fp8`.
    pub kv_cache_dtype: String,
    /// Tokens of a KV page.
    pub block_size: usize,
    /// Layers of the model, and bytes of a KV page of one of them: what whoever measures needs to open a session. 0:
    /// not said.
    #[serde(default)]
    pub layers: usize,
    /// See `layers`.
    #[serde(default)]
    pub page_bytes: usize,
    /// How elements are ordered inside a page, in the backend's words. For people, as is `weights`: the model key is
    /// what counts, and these say what makes two of them differ.
    #[serde(default)]
    pub page_order: String,
    /// A digest of the weights and the model's shape, in hexadecimal digits.
    #[serde(default)]
    pub weights: String,
}

impl WorkerCard {
    /// Reads a card; `Err` says why it has to be ignored.
    pub fn from_json(json: &[u8]) -> Result<Self, String> {
        #[derive(Deserialize)]
        struct Version {
            schema: u32,
        }
        // The number first: a card of another schema may lack fields this one must have.
        let Version { schema } = serde_json::from_slice(json).map_err(|error| error.to_string())?;
        if schema != CARD_SCHEMA {
            return Err(format!("it has schema {schema}, this engine reads {CARD_SCHEMA}"));
        }
        serde_json::from_slice(json).map_err(|error| error.to_string())
    }

    /// Its JSON.
    pub fn to_json(&self) -> Vec<u8> {
        // Strings, numbers and values that were JSON before: there is nothing that could fail.
        serde_json::to_vec(self).unwrap_or_default()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A card to put in tests' registrations.
    pub(crate) fn card(role: Role, key: ModelKey, address: &str) -> WorkerCard {
        WorkerCard {
            schema: CARD_SCHEMA,
            version: "0".into(),
            role,
            address: address.into(),
            session: serde_json::json!({ "tcp": "127.0.0.1:1" }),
            transports: vec!["shm".into(), "tcp".into()],
            staging: String::new(),
            host_id: "host".into(),
            local: None,
            model: ModelCard {
                names: vec!["demo".into()],
                max_model_len: 1024,
                source: "/models/demo.gguf".into(),
                revision: None,
                load_format: "auto".into(),
                kv_cache_dtype: "f16".into(),
                block_size: 16,
                layers: 2,
                page_bytes: 4096,
                page_order: "as on CPUs".into(),
                weights: "0123456789abcdef".into(),
            },
            model_key: key,
        }
    }

    #[test]
    fn a_card_reads_back_and_a_newer_one_of_the_same_schema_too() {
        let card = card(Role::Decode, ModelKey::of(b"m"), "10.0.0.1:8000");
        assert_eq!(WorkerCard::from_json(&card.to_json()).unwrap(), card);
        let mut value = serde_json::to_value(&card).unwrap();
        value["added_later"] = true.into();
        assert_eq!(WorkerCard::from_json(value.to_string().as_bytes()).unwrap(), card);
        let local = Some(LocalView { user: 1, mounts: "m".into(), folder: "f".into() });
        let card = WorkerCard { local, ..card };
        assert_eq!(WorkerCard::from_json(&card.to_json()).unwrap(), card);
    }

    #[test]
    fn a_card_of_another_schema_is_refused_by_its_number() {
        let error = WorkerCard::from_json(br#"{"schema": 99, "all": "different"}"#).unwrap_err();
        assert!(error.contains("schema 99"), "{error}");
        assert!(WorkerCard::from_json(b"no json").is_err());
    }
}
