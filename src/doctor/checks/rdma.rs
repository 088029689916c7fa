//! What to say of RDMA devices.

use super::{Area, Finding, Level, Wanted};
use crate::{
    doctor::facts::RdmaFacts,
    transfer::rdma::{Choice, Device, Gid, GidKind, Link, Port, PortState},
};

/// Bytes of an Ethernet packet that let RDMA packets have their largest payload, 4096 bytes.
const MTU_WANTED: u32 = 4200;

/// Bytes that the kernel sets aside for headers when it derives the payload from an interface's MTU.
const HEADERS: u32 = 96;

/// Devices, ports, addresses, and what the engine would use of them.
pub(in crate::doctor) fn rdma(facts: &RdmaFacts, wanted: Wanted) -> Vec<Finding> {
    let found = |check, level, seen: String| Finding::new(Area::Rdma, check, level, seen);
    let devices = match &facts.devices {
        Ok(devices) => devices,
        Err(error) => {
            let seen = format!("the kernel's list of devices cannot be read: {error}");
            return vec![found("devices", wanted.broken_rdma(), seen).remedy("mount /sys, in a container too")];
        }
    };
    if devices.is_empty() {
        let seen =
            "none; between hosts KV pages would travel over TCP, the slowest way, and with --require-rdma not at all";
        let none = found("devices", wanted.missing_rdma(), seen.to_owned()).remedy(
            "with an adapter in place load its driver (`modprobe mlx5_ib` for ConnectX) and look for it with \
             `rdma link`; to try RDMA without one: `modprobe rdma_rxe && rdma link add rxe0 type rxe netdev eth0`",
        );
        return vec![none];
    }
    let mut findings: Vec<Finding> = devices.iter().flat_map(|device| ports(device, facts)).collect();
    findings.push(library(facts, wanted));
    findings.extend(device_files(facts, wanted));
    match &facts.choice {
        Ok(choices) => findings.extend(choices.iter().flat_map(|choice| chosen(choice, devices, wanted))),
        Err(error) => findings.push(split(found("choice", wanted.broken_rdma(), error.to_string()))),
    }
    match &facts.opened {
        Some(Ok(())) => findings.push(found("adapter", Level::Ok, "can be opened".to_owned())),
        Some(Err(error)) => findings.push(split(found("adapter", wanted.broken_rdma(), error.clone()))),
        None => {}
    }
    findings
}

/// Errors of `transfer` say what is wrong and then, after a semicolon, what to do.
fn split(finding: Finding) -> Finding {
    match finding.seen.split_once("; ") {
        Some((seen, remedy)) => Finding { seen: seen.to_owned(), ..finding.clone() }.remedy(remedy),
        None => finding,
    }
}

fn ports<'a>(device: &'a Device, facts: &'a RdmaFacts) -> impl Iterator<Item = Finding> + 'a {
    let mut about = vec![device.name.clone()];
    about.extend(device.model.clone());
    about.extend(device.firmware.as_ref().map(|version| format!("firmware {version}")));
    about.extend(device.numa_node.map(|node| format!("NUMA node {node}")));
    let about = about.join(", ");
    device.ports.iter().map(move |port| {
        let named = facts
            .wish
            .devices
            .iter()
            .any(|name| *name == device.name || *name == format!("{}:{}", device.name, port.number));
        let level = match port.state {
            PortState::Active => Level::Ok,
            _ if named => Level::Warning,
            _ => Level::Note,
        };
        let finding = Finding::new(Area::Rdma, "port", level, format!("{about}, {}", describe(port)));
        match (port.state, port.link) {
            (PortState::Active, _) => finding,
            (PortState::Init | PortState::Armed, Link::InfiniBand) => {
                finding.remedy("no subnet manager has set the port up: run one (opensm) on the fabric, or on a switch")
            }
            _ => finding.remedy(match &port.netdev {
                Some(netdev) => format!("check the cable, and `ip link set {netdev} up`"),
                None => "check the cable, and that the port's network interface is up".to_owned(),
            }),
        }
    })
}

/// `port 1: active (LinkUp), Ethernet, 400 Gb/s, ens1np0 with MTU 9000, 3 addresses of RoCE v2 and 3 of v1`.
fn describe(port: &Port) -> String {
    let mut text = format!("port {}: {}", port.number, port.state);
    if !port.physical_state.is_empty() {
        text.push_str(&format!(" ({})", port.physical_state));
    }
    text.push_str(&format!(", {}, {} Gb/s", port.link, port.rate_gbps));
    if let Some(netdev) = &port.netdev {
        text.push_str(&format!(", {netdev}"));
    }
    if let Some(mtu) = port.netdev_mtu {
        text.push_str(&format!(" with MTU {mtu}"));
    }
    let of = |kind| port.gids.iter().filter(|gid: &&Gid| gid.kind == kind).count();
    match port.link {
        Link::Ethernet => {
            text.push_str(&format!(", addresses: {} of RoCE v2, {} of v1", of(GidKind::RoceV2), of(GidKind::RoceV1)))
        }
        Link::InfiniBand => text.push_str(&format!(", LID {:#x}, subnet manager {:#x}", port.lid, port.sm_lid)),
        Link::Other => {}
    }
    text
}

fn library(facts: &RdmaFacts, wanted: Wanted) -> Finding {
    let found = |level, seen: String| Finding::new(Area::Rdma, "libibverbs", level, seen);
    match &facts.library {
        Ok(()) => found(Level::Ok, "found".to_owned()),
        Err(error) => found(wanted.broken_rdma(), error.clone()).remedy(
            "apt-get install libibverbs1 ibverbs-providers, or your distribution's rdma-core; in the container's \
             image too",
        ),
    }
}

fn device_files(facts: &RdmaFacts, wanted: Wanted) -> Vec<Finding> {
    let found = |level, seen: String| Finding::new(Area::Rdma, "device files", level, seen);
    if facts.device_files.is_empty() {
        let seen = "/dev/infiniband has no uverbs files, through which programs reach adapters".to_owned();
        return vec![found(wanted.broken_rdma(), seen).remedy(
            "modprobe ib_uverbs; in a container pass them: docker run --device /dev/infiniband, in Kubernetes an RDMA \
             device plugin",
        )];
    }
    let refused: Vec<String> = (facts.device_files.iter())
        .filter_map(|(name, opened)| opened.as_ref().err().map(|error| format!("{name}: {error}")))
        .collect();
    if refused.is_empty() {
        let names: Vec<&str> = facts.device_files.iter().map(|(name, _)| name.as_str()).collect();
        return vec![found(Level::Ok, format!("{} in /dev/infiniband can be opened", names.join(", ")))];
    }
    let seen = format!("in /dev/infiniband cannot be opened: {}", refused.join(", "));
    vec![found(wanted.broken_rdma(), seen).remedy(
        "give this user the files (udev rules of rdma-core make them mode 0666), and a container the devices (docker \
         run --device /dev/infiniband)",
    )]
}

/// A port that the engine would use.
fn chosen(choice: &Choice, devices: &[Device], wanted: Wanted) -> Vec<Finding> {
    let Choice { device, port, gid_index, gid_kind, link, rate_gbps, .. } = choice;
    let on = |level, check, seen: String| Finding::new(Area::Rdma, check, level, seen);
    let address = std::net::Ipv6Addr::from(choice.gid);
    let address = address.to_ipv4_mapped().map_or_else(|| address.to_string(), |address| address.to_string());
    let seen =
        format!("would use {device} port {port} at {rate_gbps} Gb/s, GID index {gid_index} ({gid_kind}, {address})");
    let mut findings = vec![on(Level::Ok, "choice", seen)];
    if *gid_kind == GidKind::RoceV1 {
        findings.push(
            on(
                Level::Warning,
                "address",
                format!("{device}: RoCE v1 does not cross routers, and peers must use it too"),
            )
            .remedy("leave --rdma-gid-index away, or name an entry of RoCE v2"),
        );
    }
    let port = devices.iter().find(|other| other.name == *device).map(|device| &device.ports);
    let port = port.and_then(|ports| ports.iter().find(|other| other.number == choice.port));
    if let Some(Port { netdev: Some(netdev), netdev_mtu: Some(mtu), .. }) = port
        && *link == Link::Ethernet
        && *mtu < MTU_WANTED
        && wanted != Wanted::NoRdma
    {
        let payload = [2048, 1024, 512, 256].into_iter().find(|payload| payload + HEADERS <= *mtu).unwrap_or(256);
        let seen = format!("{netdev} has MTU {mtu}: RDMA packets carry {payload} bytes instead of 4096");
        findings.push(on(Level::Warning, "mtu", seen).remedy(format!(
            "ip link set {netdev} mtu 9000 on all hosts, and the same or more on every switch between them"
        )));
    }
    findings
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::transfer::rdma::{ChooseError, Wish, choose};

    fn gid(index: u8, kind: GidKind) -> Gid {
        let value = std::net::Ipv4Addr::new(10, 0, 0, 7).to_ipv6_mapped().octets();
        Gid { index, value, kind, netdev: Some("ens1".into()) }
    }

    fn device() -> Device {
        Device {
            name: "mlx5_0".into(),
            model: Some("MT4129".into()),
            firmware: Some("28.39.1002".into()),
            node_guid: None,
            numa_node: Some(1),
            ports: vec![Port {
                number: 1,
                state: PortState::Active,
                physical_state: "LinkUp".into(),
                rate_gbps: 400.0,
                link: Link::Ethernet,
                lid: 0,
                sm_lid: 0,
                gids: vec![gid(2, GidKind::RoceV1), gid(3, GidKind::RoceV2)],
                netdev: Some("ens1".into()),
                netdev_mtu: Some(9000),
            }],
        }
    }

    fn facts_of(device: Device, wish: Wish) -> RdmaFacts {
        let devices = vec![device];
        let choice = choose(&devices, &wish);
        let device_files = vec![("uverbs0".into(), Ok(()))];
        let opened = choice.is_ok().then_some(Ok(()));
        RdmaFacts { devices: Ok(devices), device_files, library: Ok(()), wish, choice, opened }
    }

    /// One adapter on which nothing is amiss.
    pub(in super::super) fn facts() -> RdmaFacts {
        facts_of(device(), Wish::default())
    }

    fn worst(facts: &RdmaFacts, wanted: Wanted) -> Finding {
        rdma(facts, wanted).into_iter().max_by_key(|finding| finding.level).unwrap()
    }

    #[test]
    fn an_adapter_in_order_is_shown_with_what_would_be_used_of_it() {
        let findings = rdma(&facts(), Wanted::Rdma);
        assert!(findings.iter().all(|finding| finding.level == Level::Ok), "{findings:?}");
        let seen: Vec<&str> = findings.iter().map(|finding| finding.seen.as_str()).collect();
        assert_eq!(
            seen[0],
            "mlx5_0, MT4129, firmware 28.39.1002, NUMA node 1, port 1: active (LinkUp), Ethernet, 400 Gb/s, ens1 with \
             MTU 9000, addresses: 1 of RoCE v2, 1 of v1"
        );
        assert_eq!(seen[3], "would use mlx5_0 port 1 at 400 Gb/s, GID index 3 (RoCE v2, 10.0.0.7)");
    }

    #[test]
    fn no_adapter_is_a_failure_only_where_rdma_is_required() {
        let facts = RdmaFacts { devices: Ok(vec![]), choice: Err(ChooseError::NoDevice), ..facts() };
        assert_eq!(worst(&facts, Wanted::Any).level, Level::Note);
        let finding = worst(&facts, Wanted::Rdma);
        assert_eq!(finding.level, Level::Failure);
        assert!(finding.remedy.unwrap().contains("modprobe"));
    }

    #[test]
    fn a_port_that_is_down_is_shown_with_what_brings_it_up() {
        let mut down = device();
        down.ports[0].state = PortState::Down;
        let facts = facts_of(down.clone(), Wish::default());
        let findings = rdma(&facts, Wanted::Any);
        assert_eq!(findings[0].level, Level::Note);
        assert_eq!(findings[0].remedy.as_deref(), Some("check the cable, and `ip link set ens1 up`"));
        let choice = findings.last().unwrap();
        assert_eq!((choice.check, choice.level), ("choice", Level::Warning));
        assert!(choice.seen.contains("no RDMA port is active: mlx5_0 port 1 is down"), "{}", choice.seen);
        assert_eq!(worst(&facts, Wanted::Rdma).level, Level::Failure);

        let named = facts_of(down, Wish { devices: vec!["mlx5_0:1".into()], gid_index: None });
        assert_eq!(rdma(&named, Wanted::Any)[0].level, Level::Warning, "somebody counts on it");
    }

    #[test]
    fn an_infiniband_port_without_a_subnet_manager_is_told_from_one_without_a_cable() {
        let mut device = device();
        (device.ports[0].link, device.ports[0].state) = (Link::InfiniBand, PortState::Init);
        let finding = rdma(&facts_of(device, Wish::default()), Wanted::Any).remove(0);
        assert!(finding.remedy.unwrap().contains("opensm"));
    }

    #[test]
    fn addresses_of_roce_v1_alone_are_not_used_unasked() {
        let mut device = device();
        device.ports[0].gids.truncate(1);
        let finding = worst(&facts_of(device.clone(), Wish::default()), Wanted::Rdma);
        assert_eq!((finding.check, finding.level), ("choice", Level::Failure));
        assert!(finding.seen.contains("no RoCE v2 address"), "{}", finding.seen);
        assert!(finding.remedy.unwrap().contains("an IP address"));
        let asked = facts_of(device, Wish { devices: vec![], gid_index: Some(2) });
        assert_eq!(worst(&asked, Wanted::Rdma).check, "address");
    }

    #[test]
    fn without_the_library_or_the_device_files_nothing_works() {
        let facts = RdmaFacts { library: Err("not found".into()), ..facts() };
        assert_eq!(worst(&facts, Wanted::Any).level, Level::Warning);
        assert!(worst(&facts, Wanted::Rdma).remedy.unwrap().contains("libibverbs1"));
        let facts = RdmaFacts { library: Ok(()), device_files: vec![], ..facts };
        assert!(worst(&facts, Wanted::Rdma).remedy.unwrap().contains("--device /dev/infiniband"));
        let refused = vec![("uverbs0".to_owned(), Err("Permission denied".to_owned()))];
        let facts = RdmaFacts { device_files: refused, ..facts };
        assert!(worst(&facts, Wanted::Rdma).seen.contains("uverbs0: Permission denied"));
    }

    #[test]
    fn what_the_library_says_of_an_adapter_is_passed_on_with_its_remedy() {
        let said = "libibverbs has no driver for mlx5_0; install its provider".to_owned();
        let finding = worst(&RdmaFacts { opened: Some(Err(said)), ..facts() }, Wanted::Rdma);
        assert_eq!((finding.check, finding.level), ("adapter", Level::Failure));
        assert_eq!(finding.remedy.as_deref(), Some("install its provider"));
    }

    #[test]
    fn small_packets_are_a_warning() {
        let mut device = device();
        device.ports[0].netdev_mtu = Some(1500);
        let finding = worst(&facts_of(device, Wish::default()), Wanted::Any);
        assert_eq!((finding.check, finding.level), ("mtu", Level::Warning));
        assert!(finding.seen.contains("carry 1024 bytes"), "{}", finding.seen);
    }
}
