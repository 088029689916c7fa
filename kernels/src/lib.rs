//! The arithmetic of `engine`.
//!
//! [`Backend`] lists the fused operations a transformer needs; models are written once against it. [`mod@reference`]
//! is the naive f32 version of every operation and the oracle of the conformance suite; [`cpu`] is the fast one, and
//! [`cuda`] enqueues them on a device. Nothing here knows a model, a request or a socket.

mod backend;
mod batch;
mod blocks;
pub mod cpu;
pub mod cuda;
mod dtype;
mod error;
mod kv;
mod mapped;
mod pages;
pub mod reference;
mod region;
mod residual;
mod rope;
mod sampling;
mod token_mask;

pub use backend::{Attention, AttentionShape, Backend, DrawsAhead, QkNorm, WarmUp};
pub use batch::{Batch, SequenceSpan};
pub use dtype::{DType, Matrix};
pub use error::KernelError;
pub use kv::{KvDType, KvLayout};
pub use mapped::MappedFile;
pub use pages::{DeviceRegion, DmaBuf, KvPages, LockedRegion, PageCopies, PageRun, PeerPages};
pub use region::{KvRegion, RegionShape};
pub use residual::{Projection, Residual, RmsNorm};
pub use rope::RopeTable;
pub use sampling::{MAX_TOP_LOGPROBS, RowTask, SampleRow, Sampled, SamplingParams, SequenceId};
pub use token_mask::TokenMask;
