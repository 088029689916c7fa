use std::fmt;

use subtle::ConstantTimeEq;

/// Length of nonces and proofs.
pub(super) const PROOF_BYTES: usize = 32;

/// The secret that the workers of a cluster share. Empty is a secret like any other, which everybody knows.
///
/// It never crosses the network: each side proves that it has it by a keyed hash (BLAKE3) of what both have said,
/// random numbers of both included, so neither a listener nor an impostor learns anything to use again.
#[derive(Clone)]
pub struct ClusterToken([u8; blake3::KEY_LEN]);

/// Which side proves; a proof cannot be sent back as one's own.
#[derive(Clone, Copy)]
pub(super) enum Prover {
    Decode,
    Prefill,
}

impl ClusterToken {
    /// From the text given to all workers.
    pub fn new(secret: &str) -> Self {
        Self(blake3::derive_key("engine session 2026 cluster token", secret.as_bytes()))
    }

    /// What proves knowledge of the token in the conversation `transcript`.
    pub(super) fn proof(&self, prover: Prover, transcript: &[&[u8]]) -> [u8; PROOF_BYTES] {
        let mut hasher = blake3::Hasher::new_keyed(&self.0);
        hasher.update(match prover {
            Prover::Decode => b"decode ",
            Prover::Prefill => b"prefill",
        });
        for part in transcript {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part);
        }
        *hasher.finalize().as_bytes()
    }

    /// Checks a proof in a time that does not depend on how much of it is right.
    pub(super) fn verify(&self, prover: Prover, transcript: &[&[u8]], proof: &[u8; PROOF_BYTES]) -> bool {
        self.proof(prover, transcript).ct_eq(proof).into()
    }
}

impl Default for ClusterToken {
    fn default() -> Self {
        Self::new("")
    }
}

impl fmt::Debug for ClusterToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ClusterToken(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proof_holds_for_one_token_one_side_and_one_conversation() {
        let (token, other) = (ClusterToken::new("tea"), ClusterToken::new("coffee"));
        let proof = token.proof(Prover::Decode, &[b"ab", b"c"]);
        assert!(token.verify(Prover::Decode, &[b"ab", b"c"], &proof));
        assert!(!other.verify(Prover::Decode, &[b"ab", b"c"], &proof));
        assert!(!token.verify(Prover::Prefill, &[b"ab", b"c"], &proof));
        assert!(!token.verify(Prover::Decode, &[b"a", b"bc"], &proof));
    }

    #[test]
    fn a_token_is_not_printed() {
        assert!(!format!("{:?}", ClusterToken::new("tea")).contains("tea"));
    }
}
