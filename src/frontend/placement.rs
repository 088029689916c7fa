//! Which of several workers gets a request. Pure: loads in, an index out.
//!
//! The prompt's leading bytes order the workers (rendezvous hashing, Thaler and Ravishankar 1998): the same beginning
//! finds the same first choice wherever a request comes in, hence whatever that worker's prefix index still has of it,
//! and workers that come or go move nobody else's first choice. How far such a favourite may run ahead of the others is
//! bounded (consistent hashing with bounded loads, Mirrokni, Thorup and Zadimoghaddam 2016). Prompts without a
//! beginning worth finding go to the less loaded of two picked at random (Mitzenmacher 1996), which needs no agreement
//! between frontends and does not send everybody to whoever was idle a moment ago.

/// Tokens a first choice may have above a quarter more than the average before others are preferred: the work of a few
/// requests, so that an idle cluster keeps its habits.
const SLACK_TOKENS: u64 = 4096;

/// A worker that could take a request.
#[derive(Debug, Clone, Copy)]
pub(super) struct Candidate {
    /// The same in every frontend, and as long as the worker's cache lives.
    pub(super) id: u64,
    /// Tokens it has to work on already.
    pub(super) load: u64,
}

/// The index of whoever should take a request; `None` if there is nobody. `affinity` is a digest of the prompt's
/// beginning, `random` any number.
pub(super) fn choose(candidates: &[Candidate], affinity: Option<u64>, random: u64) -> Option<usize> {
    if candidates.len() < 2 {
        return (!candidates.is_empty()).then_some(0);
    }
    if let Some(affinity) = affinity {
        // Loads are what others say they are, so no sum may be too much.
        let total = candidates.iter().fold(0, |total: u64, candidate| total.saturating_add(candidate.load));
        let average = total / candidates.len() as u64;
        let bound = average.saturating_add(average / 4).saturating_add(SLACK_TOKENS);
        let (first, second) = top_two(candidates, affinity);
        if let Some(&favourite) = [first, second].iter().find(|&&index| candidates[index].load <= bound) {
            return Some(favourite);
        }
    }
    let count = candidates.len() as u64;
    let first = (random >> 32) % count;
    let second = (first + 1 + (random & 0xFFFF_FFFF) % (count - 1)) % count;
    let (first, second) = (first as usize, second as usize);
    Some(if candidates[second].load < candidates[first].load { second } else { first })
}

/// The two workers that a prompt prefers, best first.
fn top_two(candidates: &[Candidate], affinity: u64) -> (usize, usize) {
    let (mut first, mut second) = ((0, 0), (0, 0));
    for (index, candidate) in candidates.iter().enumerate() {
        let score = mix(candidate.id ^ mix(affinity));
        if score >= first.0 {
            (first, second) = ((score, index), first);
        } else if score >= second.0 {
            second = (score, index);
        }
    }
    (first.1, second.1)
}

/// Spreads a number over all bits (the finaliser of SplitMix64).
fn mix(mut value: u64) -> u64 {
    value = value.wrapping_add(0x9E37_79B9_7F4A_7C15);
    value = (value ^ (value >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidates(loads: &[u64]) -> Vec<Candidate> {
        loads.iter().enumerate().map(|(id, &load)| Candidate { id: id as u64 + 77, load }).collect()
    }

    #[test]
    fn nobody_takes_nothing_and_the_only_one_takes_everything() {
        assert_eq!(choose(&[], Some(1), 2), None);
        assert_eq!(choose(&candidates(&[1 << 60]), None, 9), Some(0));
    }

    #[test]
    fn a_beginning_finds_the_same_worker_whoever_else_comes_and_goes() {
        let all = candidates(&[0; 20]);
        let mut taken = [0; 20];
        for affinity in 0..2000 {
            let chosen = choose(&all, Some(affinity), affinity).unwrap();
            taken[chosen] += 1;
            let without = (chosen + 7) % 20;
            let fewer: Vec<_> =
                all.iter().enumerate().filter(|(at, _)| *at != without).map(|(_, candidate)| *candidate).collect();
            assert_eq!(fewer[choose(&fewer, Some(affinity), 3).unwrap()].id, all[chosen].id);
        }
        assert!(taken.iter().all(|&taken| (60..150).contains(&taken)), "{taken:?}");
    }

    #[test]
    fn a_favourite_that_has_too_much_is_passed_over() {
        let mut all = candidates(&[1000; 10]);
        let favourite = choose(&all, Some(5), 0).unwrap();
        all[favourite].load = 5000;
        assert_eq!(choose(&all, Some(5), 0), Some(favourite), "within the bound");
        all[favourite].load = 50_000;
        let next = choose(&all, Some(5), 0).unwrap();
        assert_ne!(next, favourite);
        assert_eq!(choose(&all, Some(5), 99), Some(next), "the second choice is one too");
        all[next].load = 60_000;
        let third = choose(&all, Some(5), 4 << 32).unwrap();
        assert!(all[third].load <= 50_000);
    }

    #[test]
    fn any_load_may_be_told() {
        let all = candidates(&[u64::MAX, u64::MAX, 0]);
        assert!((0..100).all(|affinity| choose(&all, Some(affinity), affinity).is_some()));
        assert_eq!(choose(&candidates(&[u64::MAX, 0]), None, 0), Some(1));
    }

    #[test]
    fn without_a_beginning_the_less_loaded_of_two_takes_it() {
        let all = candidates(&[3, 2, 1, 0]);
        let mut taken = [0; 4];
        for random in 0..4000u64 {
            taken[choose(&all, None, mix(random)).unwrap()] += 1;
        }
        assert_eq!(taken[0], 0, "it is never the lesser of two");
        assert!(taken[1] > 0 && taken[1] < taken[2] && taken[2] < taken[3], "{taken:?}");
    }
}
