//! What to say of a cluster's workers.

use std::collections::BTreeMap;

use super::{
    Area, Finding, Level,
    services::{CLOCKS_APART, clock},
};
use crate::{
    cluster::{ModelCard, ModelKey, Role, WorkerCard},
    doctor::facts::{ServicesFacts, Worker},
};

/// The workers of a cluster: whether they answer, and who can work with whom.
pub(in crate::doctor) fn workers(facts: &ServicesFacts) -> Vec<Finding> {
    let Some(workers) = &facts.workers else { return Vec::new() };
    if workers.is_empty() {
        let seen = format!("no worker is registered in the namespace {} (see --namespace)", facts.namespace);
        return vec![found("workers", Level::Note, seen)];
    }
    let mut findings: Vec<Finding> = workers.iter().flat_map(look_at).collect();
    let cards: Vec<&WorkerCard> = workers.iter().filter_map(|worker| worker.card.as_ref().ok()).collect();
    findings.extend(models(&cards));
    findings.extend(versions(&cards));
    findings
}

fn found(check: &'static str, level: Level, seen: String) -> Finding {
    Finding::new(Area::Cluster, check, level, seen)
}

/// One worker.
fn look_at(worker: &Worker) -> Vec<Finding> {
    let card = match &worker.card {
        Ok(card) => card,
        Err(error) => {
            let seen = format!("the card of worker {} cannot be read: {error}", worker.lease);
            return vec![found("worker", Level::Warning, seen).remedy("run the same version of the engine everywhere")];
        }
    };
    let who = format!("{} worker {}", card.role, card.address);
    let model = card.model.names.first().map_or("?", String::as_str);
    let mut about = format!("{who}: {model}, model key {}, over {}", card.model_key, card.transports.join(" or "));
    if !card.staging.is_empty() {
        about.push_str(&format!("; {}", card.staging));
    }
    let mut findings = vec![match &worker.health {
        Ok(health) if health.status == 200 => found("worker", Level::Ok, about),
        Ok(health) => {
            found("worker", Level::Warning, format!("{about}; it answers {}: draining, or failed", health.status))
                .remedy("see its log")
        }
        Err(error) => found("worker", Level::Warning, format!("{about}; it does not answer from here: {error}"))
            .remedy(
                "see that it runs and that its address can be reached from here; workers say under which with \
                     --advertise-host, and listen elsewhere than on this machine with --host 0.0.0.0",
            ),
    }];
    let ahead = worker.health.as_ref().ok().and_then(|health| health.ahead_seconds);
    findings.extend(
        ahead
            .filter(|ahead| ahead.abs() >= CLOCKS_APART)
            .map(|ahead| Finding { area: Area::Cluster, ..clock(&who, ahead) }),
    );
    findings
}

/// Decode and prefill workers meet if their model keys are equal. Those that meet nobody are told what keeps them from
/// the others.
fn models(cards: &[&WorkerCard]) -> Vec<Finding> {
    let mut keys: BTreeMap<ModelKey, [Vec<&WorkerCard>; 2]> = BTreeMap::new();
    for card in cards {
        keys.entry(card.model_key).or_default()[usize::from(card.role == Role::Prefill)].push(card);
    }
    let mut findings = Vec::new();
    for (key, [decode, prefill]) in &keys {
        let name = decode.iter().chain(prefill).find_map(|card| card.model.names.first()).map_or("?", String::as_str);
        let model = format!("{name} ({key})");
        let counted = |workers: &[&WorkerCard], role| match workers.len() {
            1 => format!("1 {role} worker"),
            many => format!("{many} {role} workers"),
        };
        let (missing, present) = match (decode.is_empty(), prefill.is_empty()) {
            (false, false) => {
                let seen = format!("{model}: {} and {}", counted(decode, "decode"), counted(prefill, "prefill"));
                findings.push(found("model", Level::Ok, seen));
                continue;
            }
            (false, true) => (Role::Prefill, decode),
            (true, _) => (Role::Decode, prefill),
        };
        let others: Vec<&WorkerCard> =
            cards.iter().copied().filter(|other| other.role == missing && other.model_key != *key).collect();
        let role = if missing == Role::Prefill { "decode" } else { "prefill" };
        let seen = format!("{model}: {} and no {missing} worker", counted(present, role));
        findings.push(match (nearest(present[0], &others), missing) {
            (Some((other, differences)), _) => found(
                "model",
                Level::Failure,
                format!("{seen}; {missing} worker {} differs in {}", other.address, differences.join(", ")),
            )
            .remedy(
                "start both with the same --model, --block-size and --kv-cache-dtype and the same version; a prefill \
                 worker without --model takes all of it from the cluster",
            ),
            (None, Role::Prefill) => {
                found("model", Level::Note, format!("{seen}: every prompt is prefilled by its decode worker"))
            }
            (None, Role::Decode) => found("model", Level::Failure, format!("{seen}: nothing will ever be prefilled"))
                .remedy("start a decode worker: engine --model … with the same --etcd, --nats and --namespace"),
        });
    }
    findings
}

/// Of `others` the one that differs in the least, and in what.
fn nearest<'a>(card: &WorkerCard, others: &[&'a WorkerCard]) -> Option<(&'a WorkerCard, Vec<String>)> {
    others.iter().map(|other| (*other, differences(card, other))).min_by_key(|(_, differences)| differences.len())
}

/// What of a model keeps two workers apart: of everything in the model key, what their cards tell.
fn differences(a: &WorkerCard, b: &WorkerCard) -> Vec<String> {
    fn differ<T: PartialEq + std::fmt::Display>(name: &str, a: &T, b: &T) -> Option<String> {
        (a != b).then(|| format!("{name} ({a} here, {b} there)"))
    }
    let (ModelCard { block_size, kv_cache_dtype, .. }, there) = (&a.model, &b.model);
    let mut differences: Vec<String> = [
        differ("block size", block_size, &there.block_size),
        differ("KV element type", kv_cache_dtype, &there.kv_cache_dtype),
        differ("order inside a page", &a.model.page_order, &there.page_order),
        differ("weights", &a.model.weights, &there.weights),
    ]
    .into_iter()
    .flatten()
    .collect();
    if a.model.weights != there.weights || differences.is_empty() {
        // What may be behind it.
        differences.extend(differ("source", &a.model.source, &there.source));
        differences.extend(differ("version of the engine", &a.version, &b.version));
    }
    if differences.is_empty() {
        differences.push("the model's files".to_owned());
    }
    differences
}

fn versions(cards: &[&WorkerCard]) -> Option<Finding> {
    let mut versions: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for card in cards {
        versions.entry(&card.version).or_default().push(&card.address);
    }
    if versions.len() < 2 {
        return None;
    }
    let listed: Vec<String> =
        versions.iter().map(|(version, addresses)| format!("{version} on {}", addresses.join(", "))).collect();
    let seen = format!("workers run different versions: {}", listed.join("; "));
    Some(found("versions", Level::Warning, seen).remedy("run the same version everywhere once an update is done"))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::cluster::{WorkerId, tests::card};
    use crate::doctor::{checks::services::tests::facts, facts::Health};

    /// A worker that answers.
    pub(in super::super) fn worker(role: Role, key: &str, address: &str) -> Worker {
        let health = Ok(Health { status: 200, ahead_seconds: Some(0) });
        Worker { lease: WorkerId(7), card: Ok(card(role, ModelKey::of(key.as_bytes()), address)), health }
    }

    fn with(mut worker: Worker, change: impl FnOnce(&mut WorkerCard)) -> Worker {
        change(worker.card.as_mut().unwrap());
        worker
    }

    fn check(workers: &[Worker]) -> Vec<Finding> {
        super::workers(&ServicesFacts { workers: Some(workers.to_vec()), ..facts() })
    }

    fn of(findings: &[Finding], check: &str) -> Vec<Finding> {
        findings.iter().filter(|finding| finding.check == check).cloned().collect()
    }

    #[test]
    fn workers_of_one_model_are_in_order() {
        let findings = check(&[worker(Role::Decode, "m", "d:1"), worker(Role::Prefill, "m", "p:1")]);
        assert!(findings.iter().all(|finding| finding.level == Level::Ok), "{findings:?}");
        assert!(of(&findings, "model")[0].seen.ends_with("1 decode worker and 1 prefill worker"));
    }

    #[test]
    fn workers_that_never_meet_are_told_what_keeps_them_apart() {
        let prefill = with(worker(Role::Prefill, "m32", "p:1"), |card| card.model.block_size = 32);
        let findings = of(&check(&[worker(Role::Decode, "m16", "d:1"), prefill]), "model");
        assert_eq!(findings.len(), 2);
        for finding in &findings {
            assert_eq!(finding.level, Level::Failure);
            assert!(finding.seen.contains("differs in block size ("), "{}", finding.seen);
        }
    }

    #[test]
    fn other_weights_are_told_with_where_they_come_from() {
        let prefill = with(worker(Role::Prefill, "n", "p:1"), |card| {
            card.model.weights = "ff".into();
            card.model.source = "/models/other.gguf".into();
        });
        let findings = of(&check(&[worker(Role::Decode, "m", "d:1"), prefill]), "model");
        assert!(findings[0].seen.contains("weights (") && findings[0].seen.contains("source ("), "{findings:?}");
    }

    #[test]
    fn decode_workers_alone_serve_and_prefill_workers_alone_do_not() {
        let finding = of(&check(&[worker(Role::Decode, "m", "d:1")]), "model").remove(0);
        assert_eq!(finding.level, Level::Note);
        let finding = of(&check(&[worker(Role::Prefill, "m", "p:1")]), "model").remove(0);
        assert_eq!(finding.level, Level::Failure);
    }

    #[test]
    fn a_worker_that_cannot_be_reached_or_read_is_a_warning() {
        let silent = Worker { health: Err("connection refused".into()), ..worker(Role::Decode, "m", "d:1") };
        let unreadable = Worker { card: Err("schema 99".into()), ..silent.clone() };
        let draining = Worker { health: Ok(Health { status: 503, ahead_seconds: Some(60) }), ..silent.clone() };
        let findings = check(&[silent, unreadable, draining]);
        assert_eq!(of(&findings, "worker").len(), 3);
        assert!(of(&findings, "worker").iter().all(|finding| finding.level == Level::Warning));
        assert_eq!(of(&findings, "clock").len(), 1);
    }

    #[test]
    fn versions_that_differ_are_a_warning() {
        let other = with(worker(Role::Prefill, "m", "p:1"), |card| card.version = "0.0.1".into());
        let findings = check(&[worker(Role::Decode, "m", "d:1"), other]);
        assert_eq!(of(&findings, "versions")[0].level, Level::Warning);
    }

    #[test]
    fn an_empty_namespace_is_said_and_an_unknown_one_is_not() {
        assert_eq!(check(&[])[0].level, Level::Note);
        assert!(super::workers(&ServicesFacts { workers: None, ..facts() }).is_empty());
    }
}
