use super::{Area, Finding, Level, Wanted, size};
use crate::doctor::facts::{Container, HostFacts, RdmaFacts};

/// Whether the KV cache, `kv_bytes` of it, may be registered with adapters, which locks it. It matters where there is
/// an adapter or one is wanted.
pub(in crate::doctor) fn locked_memory(
    host: &HostFacts,
    rdma: &RdmaFacts,
    kv_bytes: u64,
    wanted: Wanted,
) -> Vec<Finding> {
    let found = |level, seen: String| vec![Finding::new(Area::Rdma, "locked memory", level, seen)];
    let matters = wanted == Wanted::Rdma || wanted == Wanted::Any && rdma.choice.is_ok();
    let Some(limit) = host.memlock else { return found(Level::Ok, "no limit".to_owned()) };
    let text = format!("at most {} may be locked", size(limit));
    if host.may_lock_any {
        return found(Level::Ok, format!("{text}, but not for this process: it has the capability IPC_LOCK"));
    }
    if limit > kv_bytes {
        return found(Level::Ok, format!("{text}, more than the {} of the KV cache", size(kv_bytes)));
    }
    let seen = format!("{text}, and RDMA locks the KV cache: {}", size(kv_bytes));
    if !matters {
        return found(Level::Note, format!("{seen}; that matters only with an RDMA adapter"));
    }
    let remedy = match host.container {
        Some(Container::Docker) => "docker run --ulimit memlock=-1 --cap-add IPC_LOCK".to_owned(),
        Some(Container::Podman) => "podman run --ulimit memlock=-1 --cap-add IPC_LOCK".to_owned(),
        Some(Container::Kubernetes) => "set LimitMEMLOCK=infinity in the unit of the nodes' container runtime \
             (containerd), as Kubernetes has no setting for it; or, for a container that runs as root, add IPC_LOCK to \
             securityContext.capabilities, which other users' processes do not get"
            .to_owned(),
        None => "`* - memlock unlimited` in /etc/security/limits.d/rdma.conf and a new login, or \
                 LimitMEMLOCK=infinity in the systemd unit; in a shell of root's `ulimit -l unlimited`"
            .to_owned(),
    };
    vec![Finding::new(Area::Rdma, "locked memory", Level::Failure, seen).remedy(remedy)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::checks::{host::tests::facts as host_facts, rdma::tests::facts as rdma_facts};

    fn check(host: &HostFacts, wanted: Wanted) -> Finding {
        locked_memory(host, &rdma_facts(), 4 << 30, wanted).remove(0)
    }

    #[test]
    fn a_limit_below_the_kv_cache_is_a_failure_where_there_is_an_adapter() {
        let host = HostFacts { memlock: Some(8 << 20), ..host_facts() };
        let finding = check(&host, Wanted::Any);
        assert_eq!(finding.level, Level::Failure);
        assert!(finding.seen.contains("at most 8 MiB may be locked, and RDMA locks the KV cache: 4 GiB"));
        assert!(finding.remedy.unwrap().contains("LimitMEMLOCK=infinity"));
        assert_eq!(check(&host, Wanted::NoRdma).level, Level::Note);
        let none = RdmaFacts { choice: Err(crate::transfer::rdma::ChooseError::NoDevice), ..rdma_facts() };
        assert_eq!(locked_memory(&host, &none, 1 << 30, Wanted::Any)[0].level, Level::Note);
        assert_eq!(locked_memory(&host, &none, 1 << 30, Wanted::Rdma)[0].level, Level::Failure);
    }

    #[test]
    fn the_remedy_is_that_of_the_container() {
        let remedy = |container| {
            let host = HostFacts { memlock: Some(1), container: Some(container), ..host_facts() };
            check(&host, Wanted::Any).remedy.unwrap()
        };
        assert!(remedy(Container::Docker).contains("--ulimit memlock=-1"));
        assert!(remedy(Container::Kubernetes).contains("IPC_LOCK"));
    }

    #[test]
    fn no_limit_a_high_one_and_the_capability_are_all_right() {
        assert_eq!(check(&host_facts(), Wanted::Rdma).level, Level::Ok);
        assert_eq!(check(&HostFacts { memlock: Some(5 << 30), ..host_facts() }, Wanted::Rdma).level, Level::Ok);
        let capable = HostFacts { memlock: Some(1), may_lock_any: true, ..host_facts() };
        assert_eq!(check(&capable, Wanted::Rdma).level, Level::Ok);
    }
}
