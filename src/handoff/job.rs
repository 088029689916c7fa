use serde::{Deserialize, Serialize};

use super::{HandoffId, WorkerId};

/// What a decode worker puts on the queue: that there is something to prefill, and where to ask for it.
///
/// It holds no tokens, so the queue's limit on payloads is never met, and no permission: whoever pulls it must claim
/// the handoff from the decode worker, which alone knows whether it is still wanted. A job that outlived its worker, or
/// was delivered twice, therefore costs one claim and harms nobody, and no clock ever decides that a job is too old.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Job {
    /// Names the handoff. Also the queue's message id, by which it drops repeated publishing.
    pub handoff: HandoffId,
    /// The decode worker.
    pub decode: WorkerId,
    /// Digest of all that two workers must agree on to exchange pages.
    pub model_key: String,
    /// Where the decode worker takes sessions. `transfer` writes and reads it.
    pub addresses: serde_json::Value,
    /// Tokens of the prompt, the last one included: a hint for whoever picks jobs.
    pub prompt_tokens: u32,
    /// W3C trace context of the request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub traceparent: Option<String>,
}

/// A message on the queue that is no job for this worker, and never will be. It is counted, logged, and acked, so that
/// it comes to nobody else.
#[derive(Debug, thiserror::Error)]
pub enum JobError {
    /// Larger than any job.
    #[error("a job of {0} bytes; the limit is {limit}", limit = Job::BYTES_MAX)]
    TooLarge(usize),
    /// Not JSON, or without a schema number.
    #[error("not a job: {0}")]
    NotAJob(serde_json::Error),
    /// Written by another version of this program.
    #[error("a job of schema {0}; this worker reads schema {schema}", schema = Job::SCHEMA)]
    UnknownSchema(u32),
    /// The right schema, but not its fields.
    #[error("a job that cannot be read: {0}")]
    Invalid(serde_json::Error),
    /// For workers whose pages look different.
    #[error("a job for model key {0}, which is not this worker's")]
    OtherModel(String),
}

#[derive(Serialize, Deserialize)]
struct Envelope<T> {
    schema: u32,
    #[serde(flatten)]
    job: T,
}

#[derive(Deserialize)]
struct SchemaOnly {
    schema: u32,
}

impl Job {
    /// Raised when an older worker could misunderstand a newer job.
    pub const SCHEMA: u32 = 1;
    /// A job takes some hundred bytes.
    pub const BYTES_MAX: usize = 64 << 10;

    /// JSON with the schema's number.
    pub fn encode(&self) -> Vec<u8> {
        // Serialising fails only for maps with keys that are no strings, which a `Value` cannot hold.
        serde_json::to_vec(&Envelope { schema: Self::SCHEMA, job: self }).unwrap_or_default()
    }

    /// Reads what came from the queue; `model_key` is this worker's.
    pub fn decode(bytes: &[u8], model_key: &str) -> Result<Self, JobError> {
        if bytes.len() > Self::BYTES_MAX {
            return Err(JobError::TooLarge(bytes.len()));
        }
        let SchemaOnly { schema } = serde_json::from_slice(bytes).map_err(JobError::NotAJob)?;
        if schema != Self::SCHEMA {
            return Err(JobError::UnknownSchema(schema));
        }
        let Envelope::<Self> { job, .. } = serde_json::from_slice(bytes).map_err(JobError::Invalid)?;
        if job.model_key != model_key {
            return Err(JobError::OtherModel(job.model_key));
        }
        Ok(job)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job() -> Job {
        Job {
            handoff: HandoffId(1),
            decode: WorkerId(2),
            model_key: "k".into(),
            addresses: serde_json::json!({"tcp": "127.0.0.1:9"}),
            prompt_tokens: 2_000,
            traceparent: None,
        }
    }

    #[test]
    fn a_job_survives_the_queue() {
        let bytes = job().encode();
        assert!(bytes.starts_with(br#"{"schema":1,"handoff":"#));
        assert_eq!(Job::decode(&bytes, "k").unwrap(), job());
    }

    #[test]
    fn what_is_no_job_of_ours_is_told_apart() {
        let newer = br#"{"schema":2,"handoff":17,"anything":[]}"#;
        assert!(matches!(Job::decode(newer, "k"), Err(JobError::UnknownSchema(2))));
        assert!(matches!(Job::decode(b"\xff\x00", "k"), Err(JobError::NotAJob(_))));
        assert!(matches!(Job::decode(b"{}", "k"), Err(JobError::NotAJob(_))));
        assert!(matches!(Job::decode(br#"{"schema":1}"#, "k"), Err(JobError::Invalid(_))));
        assert!(matches!(Job::decode(&job().encode(), "other dtype"), Err(JobError::OtherModel(_))));
        assert!(matches!(Job::decode(&vec![b' '; Job::BYTES_MAX + 1], "k"), Err(JobError::TooLarge(_))));
    }
}
