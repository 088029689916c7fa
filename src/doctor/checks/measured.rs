use super::{Area, Finding, Level, MISSED_RDMA, Wanted};
use crate::{doctor::facts::Pair, transfer::Transport};

/// Of what the link can do, the share below which something is amiss.
const SHARE_WANTED: f64 = 0.5;

/// Transfers that were made between workers.
pub(in crate::doctor) fn measured(pairs: &[Pair], wanted: Wanted) -> Vec<Finding> {
    if pairs.is_empty() {
        let seen = "nothing, as no decode worker is registered";
        return vec![Finding::new(Area::Measured, "transfer", Level::Note, seen)];
    }
    pairs.iter().map(|pair| one(pair, wanted)).collect()
}

fn one(pair: &Pair, wanted: Wanted) -> Finding {
    let who = format!("{} → {}", pair.from, pair.to);
    let found = |level, seen: String| Finding::new(Area::Measured, "transfer", level, seen);
    let measured = match &pair.measured {
        Ok(measured) => measured,
        Err(error) => {
            return found(Level::Failure, format!("{who}: {error}"))
                .remedy("see the logs of both workers, and --cluster-token, which must be the cluster's here too");
        }
    };
    let speed = format!(
        "{who}: {:.2} GB/s ({:.2} to {:.2}) over {}",
        measured.gigabytes_per_second,
        measured.gigabytes_per_second_min,
        measured.gigabytes_per_second_max,
        measured.transport.name(),
    );
    match (measured.transport, pair.link_gbps) {
        (Transport::Tcp, _) if wanted != Wanted::NoRdma => {
            found(Level::Failure, format!("{speed}: NOT OVER RDMA BUT OVER TCP, THE SLOWEST WAY")).remedy(MISSED_RDMA)
        }
        (Transport::Rdma, Some(link_gbps)) if link_gbps > 0.0 => {
            let share = measured.gigabytes_per_second * 8.0 / link_gbps;
            let seen = format!("{speed}: {:.0} % of the link's {link_gbps} Gb/s", share * 100.0);
            if share >= SHARE_WANTED {
                return found(Level::Ok, seen);
            }
            found(Level::Warning, seen).remedy(
                "compare with engine transfer-bench and ib_write_bw on an idle fabric; look at MTU, PCIe width and \
                 speed (lspci -vv), the adapter's NUMA node, and on Ethernet at PFC and ECN counters (ethtool -S)",
            )
        }
        _ => found(Level::Ok, speed),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::Measured;

    fn pair(transport: Transport, gigabytes_per_second: f64) -> Pair {
        let (gigabytes_per_second_min, gigabytes_per_second_max) = (gigabytes_per_second, gigabytes_per_second);
        let measured = Measured {
            transport,
            bytes: 1 << 26,
            gigabytes_per_second,
            gigabytes_per_second_min,
            gigabytes_per_second_max,
        };
        Pair { from: "p:1".into(), to: "d:1".into(), link_gbps: Some(100.0), measured: Ok(measured) }
    }

    fn only(pair: Pair, wanted: Wanted) -> Finding {
        measured(&[pair], wanted).remove(0)
    }

    #[test]
    fn what_comes_near_the_link_is_in_order_and_what_does_not_is_a_warning() {
        let finding = only(pair(Transport::Rdma, 11.5), Wanted::Rdma);
        assert_eq!(finding.level, Level::Ok);
        assert!(finding.seen.ends_with("92 % of the link's 100 Gb/s"), "{}", finding.seen);
        assert_eq!(only(pair(Transport::Rdma, 1.0), Wanted::Rdma).level, Level::Warning);
        assert_eq!(only(pair(Transport::Shm, 1.0), Wanted::Rdma).level, Level::Ok, "no link is in between");
    }

    #[test]
    fn tcp_is_a_loud_failure_unless_it_is_wanted() {
        let finding = only(pair(Transport::Tcp, 1.0), Wanted::Any);
        assert_eq!(finding.level, Level::Failure);
        assert!(finding.seen.contains("THE SLOWEST WAY"));
        assert_eq!(only(pair(Transport::Tcp, 1.0), Wanted::NoRdma).level, Level::Ok);
    }

    #[test]
    fn what_could_not_be_measured_is_a_failure() {
        let failed = Pair { measured: Err("refused".into()), ..pair(Transport::Shm, 1.0) };
        assert_eq!(only(failed, Wanted::Any).level, Level::Failure);
    }
}
