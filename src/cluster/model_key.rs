use std::{fmt, str::FromStr};

use engine_kernels::KvLayout;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Of what two workers say to each other.
#[derive(Debug, Clone, Copy)]
pub struct Versions {
    /// Of what is said on a session.
    pub sessions: u32,
    /// Of what is written into a job.
    pub jobs: u32,
}

/// A digest of everything two workers must agree on before they exchange pages: the weights, the model's shape, element
/// types, the layout of a KV page and its size in tokens, and the language of their sessions and jobs. Workers that
/// disagree on any of it never meet, because etcd's keys and the queue's subjects begin with it. Written as 32
/// hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ModelKey([u8; 16]);

impl ModelKey {
    /// The key of a model whose weights and shape have this `fingerprint`
    /// ([`ModelSource::fingerprint`](engine_models::ModelSource::fingerprint)), for a cache of this `layout`, whose
    /// pages are ordered as `page_order` names it; `versions` are those of sessions and jobs. The number of pages is
    /// each worker's own business and not part of the key.
    pub fn new(fingerprint: &[u8; 32], layout: &KvLayout, page_order: &str, versions: Versions) -> Self {
        let KvLayout { layers, kv_heads, head_dim, block_size, blocks: _, dtype } = layout;
        let Versions { sessions, jobs } = versions;
        let mut text = format!(
            "engine model key 3\nsessions {sessions}\njobs {jobs}\nlayers {layers}\nkv_heads {kv_heads}\n\
             head_dim {head_dim}\nblock_size {block_size}\ndtype {dtype:?}\npage_order {page_order}\nweights "
        )
        .into_bytes();
        text.extend_from_slice(fingerprint);
        Self::of(&text)
    }

    /// The key of a description in one's own words.
    pub fn of(description: &[u8]) -> Self {
        let hash = blake3::hash(description);
        let mut half = [0; 16];
        half.copy_from_slice(&hash.as_bytes()[..16]);
        Self(half)
    }

    /// Its bytes.
    pub const fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl fmt::Display for ModelKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

/// A text that is no [`ModelKey`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a model key is 32 hexadecimal digits, not `{0}`")]
pub struct ParseModelKeyError(String);

impl FromStr for ModelKey {
    type Err = ParseModelKeyError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || ParseModelKeyError(text.to_owned());
        // from_str_radix would take a sign.
        if text.len() != 32 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(error());
        }
        u128::from_str_radix(text, 16).map(|number| Self(number.to_be_bytes())).map_err(|_| error())
    }
}

impl Serialize for ModelKey {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ModelKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use engine_kernels::KvDType;

    use super::*;

    const LAYOUT: KvLayout =
        KvLayout { layers: 30, kv_heads: 3, head_dim: 64, block_size: 16, blocks: 100, dtype: KvDType::F16 };

    #[test]
    fn a_key_reads_back_as_it_was_written() {
        let key = ModelKey::of(b"m");
        assert_eq!(key.to_string().len(), 32);
        assert_eq!(key.to_string().parse(), Ok(key));
        let sign = format!("+{}", &key.to_string()[1..]);
        for bad in ["", "abc", &"g".repeat(32), &sign] {
            assert!(bad.parse::<ModelKey>().is_err(), "{bad}");
        }
    }

    #[test]
    fn whatever_pages_depend_on_changes_the_key() {
        let key = |fingerprint: u8, layout: KvLayout, order| {
            ModelKey::new(&[fingerprint; 32], &layout, order, Versions { sessions: 1, jobs: 1 })
        };
        let base = key(1, LAYOUT, "a");
        assert_eq!(base, key(1, LAYOUT, "a"));
        assert_ne!(base, key(2, LAYOUT, "a"), "other weights");
        assert_ne!(base, key(1, LAYOUT, "b"), "another order inside a page");
        assert_ne!(base, key(1, KvLayout { dtype: KvDType::BF16, ..LAYOUT }, "a"), "another element type");
        assert_ne!(base, key(1, KvLayout { block_size: 32, ..LAYOUT }, "a"), "another page size");
        assert_ne!(base, key(1, KvLayout { layers: 29, ..LAYOUT }, "a"), "another depth");
        assert_ne!(
            base,
            ModelKey::new(&[1; 32], &LAYOUT, "a", Versions { sessions: 2, jobs: 1 }),
            "sessions in another language"
        );
        assert_ne!(
            base,
            ModelKey::new(&[1; 32], &LAYOUT, "a", Versions { sessions: 1, jobs: 2 }),
            "jobs in another language"
        );
    }

    #[test]
    fn workers_with_more_or_fewer_pages_have_the_same_key() {
        let more = KvLayout { blocks: 200, ..LAYOUT };
        assert_eq!(
            ModelKey::new(&[1; 32], &LAYOUT, "a", Versions { sessions: 1, jobs: 1 }),
            ModelKey::new(&[1; 32], &more, "a", Versions { sessions: 1, jobs: 1 })
        );
    }
}
