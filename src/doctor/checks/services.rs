//! What to say of etcd and NATS.

use super::{Area, Finding, Level};
use crate::{
    cluster::NatsServer,
    doctor::facts::{ServiceState, ServicesFacts},
};

/// Oldest versions the engine is tested with.
const ETCD_TESTED: (u32, u32) = (3, 4);
const NATS_TESTED: (u32, u32) = (2, 9);
/// Seconds between two clocks from which on they are said to differ. HTTP tells whole ones.
pub(super) const CLOCKS_APART: i64 = 3;

/// etcd and NATS: whether they answer, and as what.
pub(in crate::doctor) fn services(facts: &ServicesFacts) -> Vec<Finding> {
    if let Some(local) = facts.local.filter(|local| !local.is_cluster()) {
        let seen = format!("none named, and none to be found: {local}; a worker would serve alone");
        return vec![Finding::new(Area::Services, "cluster", Level::Note, seen)];
    }
    let mut findings = etcd(facts);
    findings.extend(nats(facts));
    findings
}

fn etcd(facts: &ServicesFacts) -> Vec<Finding> {
    let at = &facts.etcd_at;
    let found = |check, level, seen: String| Finding::new(Area::Services, check, level, seen);
    match &facts.etcd {
        ServiceState::NotNamed => vec![
            found("etcd", Level::Failure, "not named, though NATS is".into())
                .remedy("--etcd http://host:2379, or ETCD_ENDPOINTS"),
        ],
        ServiceState::Fails(error) => vec![found("etcd", Level::Failure, format!("{at}: {error}")).remedy(
            "see that etcd runs, listens on that address for clients (--listen-client-urls), and that no firewall is \
             between; with TLS or a login: --etcd-ca, --etcd-cert, --etcd-key, --etcd-user",
        )],
        ServiceState::Answers(version) => {
            let mut findings = vec![versioned("etcd", at, version, ETCD_TESTED, "")];
            findings.extend(facts.etcd_ahead_seconds.map(|ahead| clock("etcd", ahead)));
            findings
        }
    }
}

fn nats(facts: &ServicesFacts) -> Vec<Finding> {
    let at = &facts.nats_at;
    let found = |level, seen: String| Finding::new(Area::Services, "nats", level, seen);
    match &facts.nats {
        ServiceState::NotNamed => vec![
            found(Level::Failure, "not named, though etcd is".into())
                .remedy("--nats nats://host:4222, or NATS_SERVER; without it nothing is prefilled remotely"),
        ],
        ServiceState::Fails(error) => vec![found(Level::Failure, format!("{at}: {error}")).remedy(
            "see that nats-server runs and listens on that address (-a), and that no firewall is between; with TLS or \
             a login: --nats-ca, --nats-user, --nats-creds. Until then every prompt is prefilled by its decode worker",
        )],
        ServiceState::Answers(NatsServer { version, streams: Ok(streams) }) => {
            let streams = if *streams == 1 { "1 stream".to_owned() } else { format!("{streams} streams") };
            vec![versioned("nats", at, version, NATS_TESTED, &format!(", JetStream on, {streams}"))]
        }
        ServiceState::Answers(NatsServer { version, streams: Err(error) }) => {
            let seen = format!("{at}: NATS {version} keeps no streams, and jobs are on one: {error}");
            vec![found(Level::Failure, seen).remedy("start it as `nats-server -js`, or set jetstream in its file")]
        }
    }
}

fn versioned(check: &'static str, at: &str, version: &str, tested: (u32, u32), more: &str) -> Finding {
    let mut numbers = version.split('.').map_while(|number| number.parse::<u32>().ok());
    let seen = format!("{at}: version {version}{more}");
    match (numbers.next(), numbers.next()) {
        (Some(major), Some(minor)) if (major, minor) < tested => {
            Finding::new(Area::Services, check, Level::Warning, seen)
                .remedy(format!("use {}.{} or newer: older ones are not tested", tested.0, tested.1))
        }
        _ => Finding::new(Area::Services, check, Level::Ok, seen),
    }
}

/// How far another clock is from ours. Nothing in the engine compares them.
pub(super) fn clock(whose: &str, ahead_seconds: i64) -> Finding {
    let found = |level, seen: String| Finding::new(Area::Services, "clock", level, seen);
    if ahead_seconds.abs() < CLOCKS_APART {
        return found(Level::Ok, format!("within {CLOCKS_APART} seconds of {whose}'s"));
    }
    let way = if ahead_seconds > 0 { "behind" } else { "ahead of" };
    found(Level::Warning, format!("{} seconds {way} {whose}'s", ahead_seconds.abs())).remedy(
        "run chrony or systemd-timesyncd on all hosts; the engine compares no clocks, but certificates and whoever \
         reads logs do",
    )
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::cluster::LocalServices;

    /// Services that are in order.
    pub(in super::super) fn facts() -> ServicesFacts {
        ServicesFacts {
            namespace: "engine".into(),
            etcd_at: "http://etcd:2379".into(),
            etcd: ServiceState::Answers("3.4.23".into()),
            etcd_ahead_seconds: Some(0),
            nats_at: "nats://nats:4222".into(),
            nats: ServiceState::Answers(NatsServer { version: "2.9.10".into(), streams: Ok(1) }),
            local: None,
            workers: Some(vec![]),
        }
    }

    fn worst(facts: &ServicesFacts) -> Finding {
        services(facts).into_iter().max_by_key(|finding| finding.level).unwrap()
    }

    #[test]
    fn services_that_answer_are_shown_with_their_versions() {
        let findings = services(&facts());
        let seen: Vec<&str> = findings.iter().map(|finding| finding.seen.as_str()).collect();
        let nats = "nats://nats:4222: version 2.9.10, JetStream on, 1 stream";
        assert_eq!(seen, ["http://etcd:2379: version 3.4.23", "within 3 seconds of etcd's", nats]);
        assert!(findings.iter().all(|finding| finding.level == Level::Ok));
    }

    #[test]
    fn a_service_that_does_not_answer_is_a_failure_that_says_what_follows() {
        let facts = ServicesFacts { nats: ServiceState::Fails("connection refused".into()), ..facts() };
        let finding = worst(&facts);
        assert_eq!((finding.check, finding.level), ("nats", Level::Failure));
        assert!(finding.seen.contains("nats://nats:4222: connection refused"));
        assert!(finding.remedy.unwrap().contains("prefilled by its decode worker"));
        let facts = ServicesFacts { etcd: ServiceState::Fails("late".into()), ..facts };
        assert_eq!(services(&facts)[0].level, Level::Failure);
    }

    #[test]
    fn nats_without_jetstream_is_a_failure() {
        let nats = NatsServer { version: "2.9.10".into(), streams: Err("no responders".into()) };
        let finding = worst(&ServicesFacts { nats: ServiceState::Answers(nats), ..facts() });
        assert_eq!(finding.level, Level::Failure);
        assert!(finding.remedy.unwrap().contains("-js"));
    }

    #[test]
    fn one_service_without_the_other_is_a_failure() {
        assert_eq!(worst(&ServicesFacts { nats: ServiceState::NotNamed, ..facts() }).level, Level::Failure);
        assert_eq!(worst(&ServicesFacts { etcd: ServiceState::NotNamed, ..facts() }).level, Level::Failure);
    }

    #[test]
    fn no_services_at_all_are_no_fault() {
        let local = Some(LocalServices { etcd: false, nats: false, jetstream: false });
        let facts = ServicesFacts { local, etcd: ServiceState::NotNamed, nats: ServiceState::NotNamed, ..facts() };
        let finding = worst(&facts);
        assert_eq!(finding.level, Level::Note);
        assert!(finding.seen.contains("would serve alone"), "{}", finding.seen);
    }

    #[test]
    fn old_versions_and_clocks_that_differ_are_warnings() {
        let old = ServicesFacts { etcd: ServiceState::Answers("3.3.27".into()), ..facts() };
        assert_eq!(worst(&old).level, Level::Warning);
        let finding = worst(&ServicesFacts { etcd_ahead_seconds: Some(-90), ..facts() });
        assert_eq!((finding.level, finding.seen.as_str()), (Level::Warning, "90 seconds ahead of etcd's"));
    }
}
