//! Which port of which device to use, and under which of its addresses. Pure: from what was found to what to open.

use super::devices::{Device, Gid, GidKind, Link, Port, PortState, natural_order};

/// What the operator asks for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wish {
    /// `--rdma-device`: `name` or `name:port`, each once. None: one that suits.
    pub devices: Vec<String>,
    /// `--rdma-gid-index`. None: one that suits.
    pub gid_index: Option<u8>,
}

/// A port to open, and what to open it with.
#[derive(Debug, Clone, PartialEq)]
pub struct Choice {
    /// The device's name.
    pub device: String,
    /// The port's number.
    pub port: u8,
    /// The address's place in the port's GID table.
    pub gid_index: u8,
    /// The address.
    pub gid: [u8; 16],
    /// What packets from it look like.
    pub gid_kind: GidKind,
    /// What the port is plugged into.
    pub link: Link,
    /// The port's address on an InfiniBand subnet.
    pub lid: u16,
    /// Gigabits a second.
    pub rate_gbps: f64,
}

/// Why RDMA cannot be had as it was asked for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChooseError {
    /// The kernel knows no device.
    #[error("this host has no RDMA device; load its adapter's driver (`modprobe mlx5_ib` for ConnectX) or plug one in")]
    NoDevice,
    /// There are devices, and none is ready.
    #[error(
        "no RDMA port is active: {found}; check cables and `ip link`, and on InfiniBand that a subnet manager runs"
    )]
    NoActivePort {
        /// The ports and their states.
        found: String,
    },
    /// What was asked for does not read as a device.
    #[error("'{wish}' names no RDMA device; expected a name and perhaps a port, as in mlx5_0 or mlx5_0:1")]
    Malformed {
        /// What was asked for.
        wish: String,
    },
    /// There is no such device.
    #[error("there is no RDMA device {device}; this host has {found}")]
    NoSuchDevice {
        /// What was asked for.
        device: String,
        /// What there is.
        found: String,
    },
    /// The device has no such port.
    #[error("RDMA device {device} has no port {port}; it has {found}")]
    NoSuchPort {
        /// The device.
        device: String,
        /// What was asked for.
        port: u8,
        /// What there is.
        found: String,
    },
    /// The same port was asked for twice.
    #[error("port {port} of RDMA device {device} is named twice; name each once")]
    Twice {
        /// The device.
        device: String,
        /// The port.
        port: u8,
    },
    /// The port has no address that is used unasked.
    #[error(
        "port {port} of RDMA device {device} has no RoCE v2 address ({found}); give its network interface an IP \
         address, or name an entry of its GID table with --rdma-gid-index"
    )]
    NoAddress {
        /// The device.
        device: String,
        /// The port.
        port: u8,
        /// What there is.
        found: String,
    },
    /// The device is of another kind.
    #[error(
        "port {port} of RDMA device {device} is neither InfiniBand nor RoCE (EFA, for one); use --transport tcp there"
    )]
    OtherKind {
        /// The device.
        device: String,
        /// The port.
        port: u8,
    },
    /// The port has no address at the place that was asked for.
    #[error("port {port} of RDMA device {device} has no address at index {index} of its GID table; it has {found}")]
    NoSuchGid {
        /// The device.
        device: String,
        /// The port.
        port: u8,
        /// What was asked for.
        index: u8,
        /// What there is.
        found: String,
    },
}

/// Chooses the ports to use: those that were named, all of them; else the fastest that is active, of equals the one
/// with the better address, then the first by name.
pub fn choose(devices: &[Device], wish: &Wish) -> Result<Vec<Choice>, ChooseError> {
    if devices.is_empty() {
        return Err(ChooseError::NoDevice);
    }
    if wish.devices.is_empty() {
        return best(devices.iter().flat_map(|device| device.ports.iter().map(move |port| (device, port))), wish)
            .map(|choice| vec![choice]);
    }
    let mut choices: Vec<Choice> = Vec::with_capacity(wish.devices.len());
    for named in &wish.devices {
        let choice = named_port(devices, named, wish)?;
        if choices.iter().any(|other| (&other.device, other.port) == (&choice.device, choice.port)) {
            return Err(ChooseError::Twice { device: choice.device, port: choice.port });
        }
        choices.push(choice);
    }
    Ok(choices)
}

fn named_port(devices: &[Device], named: &str, wish: &Wish) -> Result<Choice, ChooseError> {
    let malformed = || ChooseError::Malformed { wish: named.to_owned() };
    let (name, number) = match named.split_once(':') {
        Some((name, number)) => (name, Some(number.parse::<u8>().map_err(|_| malformed())?)),
        None => (named, None),
    };
    if name.is_empty() {
        return Err(malformed());
    }
    let device = devices.iter().find(|device| device.name == name).ok_or_else(|| ChooseError::NoSuchDevice {
        device: name.to_owned(),
        found: listed(devices.iter().map(|device| device.name.clone())),
    })?;
    let ports = device.ports.iter().filter(|port| number.is_none_or(|number| port.number == number));
    match number {
        Some(port) if ports.clone().next().is_none() => Err(ChooseError::NoSuchPort {
            device: name.to_owned(),
            port,
            found: listed(device.ports.iter().map(|port| port.number.to_string())),
        }),
        _ => best(ports.map(|port| (device, port)), wish),
    }
}

/// The best of some ports; if none will do, what is wrong with the one that comes closest.
fn best<'a>(ports: impl Iterator<Item = (&'a Device, &'a Port)> + Clone, wish: &Wish) -> Result<Choice, ChooseError> {
    let (mut active, mut found) = (Vec::new(), Vec::new());
    for (device, port) in ports {
        let cable = if port.physical_state.is_empty() { String::new() } else { format!(" ({})", port.physical_state) };
        found.push(format!("{} port {} is {}{cable}", device.name, port.number, port.state));
        if port.state == PortState::Active {
            active.push((device, port, address(device, port, wish)));
        }
    }
    let best = active.into_iter().min_by(|(device_a, port_a, gid_a), (device_b, port_b, gid_b)| {
        let rank = |gid: &Result<&Gid, ChooseError>| gid.as_ref().map_or(usize::MAX, |gid| preference(gid));
        (gid_a.is_err().cmp(&gid_b.is_err()))
            .then(port_b.rate_gbps.total_cmp(&port_a.rate_gbps))
            .then_with(|| rank(gid_a).cmp(&rank(gid_b)))
            .then_with(|| natural_order(&device_a.name, &device_b.name))
            .then(port_a.number.cmp(&port_b.number))
    });
    let (device, port, gid) = best.ok_or_else(|| ChooseError::NoActivePort { found: listed(found.into_iter()) })?;
    let gid = gid?;
    Ok(Choice {
        device: device.name.clone(),
        port: port.number,
        gid_index: gid.index,
        gid: gid.value,
        gid_kind: gid.kind,
        link: port.link,
        lid: port.lid,
        rate_gbps: port.rate_gbps,
    })
}

/// The address to use a port under.
fn address<'a>(device: &Device, port: &'a Port, wish: &Wish) -> Result<&'a Gid, ChooseError> {
    let found = || {
        let gids = port.gids.iter().map(|gid| format!("index {}: {} {}", gid.index, gid.kind, gid.address()));
        listed(gids)
    };
    if port.link == Link::Other {
        return Err(ChooseError::OtherKind { device: device.name.clone(), port: port.number });
    }
    if let Some(index) = wish.gid_index {
        return port.gids.iter().find(|gid| gid.index == index).ok_or_else(|| ChooseError::NoSuchGid {
            device: device.name.clone(),
            port: port.number,
            index,
            found: found(),
        });
    }
    let usable = port.gids.iter().filter(|gid| match port.link {
        Link::InfiniBand => gid.index == 0,
        Link::Ethernet => gid.kind == GidKind::RoceV2,
        Link::Other => false,
    });
    usable.min_by_key(|gid| (preference(gid), gid.index)).ok_or_else(|| ChooseError::NoAddress {
        device: device.name.clone(),
        port: port.number,
        found: found(),
    })
}

/// Lower is better. Routers forward the first two. A loopback address reaches this host alone, and is found on an
/// interface whose link-local address reaches nobody at all. A link-local address reaches who is on the same segment.
fn preference(gid: &Gid) -> usize {
    let address = gid.address();
    match gid.ipv4() {
        Some(v4) if v4.is_loopback() => 2,
        Some(v4) if v4.is_link_local() => 5,
        Some(_) => 0,
        None if address.is_loopback() => 3,
        None if address.is_unicast_link_local() => 4,
        None => 1,
    }
}

fn listed(items: impl Iterator<Item = String>) -> String {
    let items: Vec<String> = items.collect();
    if items.is_empty() { "none".to_owned() } else { items.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::{super::devices::testing, *};

    fn host() -> Vec<Device> {
        super::super::devices(testing::class().path()).unwrap()
    }

    fn wish(devices: &[&str], gid_index: Option<u8>) -> Wish {
        Wish { devices: devices.iter().map(ToString::to_string).collect(), gid_index }
    }

    fn only(devices: &[Device], name: &str) -> Vec<Device> {
        devices.iter().filter(|device| device.name == name).cloned().collect()
    }

    fn chosen(choices: &[Choice]) -> Vec<(&str, u8, u8)> {
        choices.iter().map(|choice| (choice.device.as_str(), choice.port, choice.gid_index)).collect()
    }

    #[test]
    fn unasked_the_fastest_active_port_is_taken_under_its_ipv4_address_of_roce_v2() {
        let choices = choose(&host(), &Wish::default()).unwrap();
        assert_eq!(chosen(&choices), [("mlx5_0", 1, 3)]);
        assert_eq!((choices[0].link, choices[0].gid_kind), (Link::Ethernet, GidKind::RoceV2));
        assert_eq!((choices[0].rate_gbps, choices[0].gid[12..].to_vec()), (400.0, vec![10, 0, 0, 7]));
    }

    #[test]
    fn without_ipv4_a_routable_ipv6_address_comes_before_a_link_local_one() {
        let mut devices = only(&host(), "mlx5_0");
        devices[0].ports[0].gids.retain(|gid| gid.ipv4().is_none());
        assert_eq!(chosen(&choose(&devices, &Wish::default()).unwrap()), [("mlx5_0", 1, 5)]);
        devices[0].ports[0].gids.retain(|gid| gid.index < 4);
        assert_eq!(chosen(&choose(&devices, &Wish::default()).unwrap()), [("mlx5_0", 1, 1)]);
    }

    #[test]
    fn infiniband_is_used_under_its_first_address() {
        let choices = choose(&only(&host(), "mlx5_2"), &Wish::default()).unwrap();
        assert_eq!(chosen(&choices), [("mlx5_2", 1, 0)]);
        assert_eq!((choices[0].link, choices[0].lid), (Link::InfiniBand, 0x1f));
    }

    #[test]
    fn of_ports_equally_fast_the_better_address_wins_and_then_the_name() {
        let mut devices = only(&host(), "mlx5_0");
        for name in ["mlx5_9", "mlx5_10"] {
            devices.push(Device { name: name.into(), ..devices[0].clone() });
        }
        devices.reverse();
        assert_eq!(chosen(&choose(&devices, &Wish::default()).unwrap()), [("mlx5_0", 1, 3)]);
        devices[2].ports[0].gids.retain(|gid| gid.index < 2);
        assert_eq!(chosen(&choose(&devices, &Wish::default()).unwrap()), [("mlx5_9", 1, 3)]);
    }

    #[test]
    fn a_fast_port_without_a_usable_address_is_passed_over() {
        let mut devices = host();
        devices[0].ports[0].gids.retain(|gid| gid.kind == GidKind::RoceV1);
        assert_eq!(chosen(&choose(&devices, &Wish::default()).unwrap()), [("mlx5_2", 1, 0)]);
    }

    #[test]
    fn a_device_that_is_neither_infiniband_nor_roce_is_passed_over_and_refused_by_name() {
        let mut devices = host();
        devices[0].ports[0].link = Link::Other;
        assert_eq!(chosen(&choose(&devices, &Wish::default()).unwrap()), [("mlx5_2", 1, 0)]);
        let error = choose(&devices, &wish(&["mlx5_0"], None)).unwrap_err();
        assert!(error.to_string().contains("mlx5_0 is neither InfiniBand nor RoCE"), "{error}");
    }

    #[test]
    fn soft_roce_on_loopback_will_do_where_there_is_nothing_else() {
        let choices = choose(&only(&host(), "rxe0"), &Wish::default()).unwrap();
        assert_eq!(chosen(&choices), [("rxe0", 1, 1)]);
    }

    #[test]
    fn all_that_is_named_is_used_in_that_order() {
        let choices = choose(&host(), &wish(&["mlx5_2:1", "mlx5_0"], None)).unwrap();
        assert_eq!(chosen(&choices), [("mlx5_2", 1, 0), ("mlx5_0", 1, 3)]);
    }

    #[test]
    fn an_index_that_is_asked_for_is_used_even_if_it_is_roce_v1() {
        let choices = choose(&host(), &wish(&["mlx5_0"], Some(2))).unwrap();
        assert_eq!((chosen(&choices), choices[0].gid_kind), (vec![("mlx5_0", 1, 2)], GidKind::RoceV1));
    }

    #[test]
    fn what_cannot_be_had_is_named_with_what_there_is() {
        let devices = host();
        let error = |devices: &[Device], wish: &Wish| choose(devices, wish).unwrap_err().to_string();
        for (wish, expected) in [
            (wish(&["mlx5_7"], None), "no RDMA device mlx5_7; this host has mlx5_0, mlx5_2, mlx5_10, rxe0"),
            (wish(&["mlx5_0:2"], None), "mlx5_0 has no port 2; it has 1"),
            (wish(&["mlx5_0:one"], None), "'mlx5_0:one' names no RDMA device"),
            (wish(&[":1"], None), "':1' names no RDMA device"),
            (wish(&["mlx5_10"], None), "no RDMA port is active: mlx5_10 port 1 is down (Disabled)"),
            (wish(&["mlx5_2:2"], None), "mlx5_2 port 2 is initialising (LinkUp); check cables"),
            (wish(&["mlx5_0", "mlx5_0:1"], None), "port 1 of RDMA device mlx5_0 is named twice"),
            (wish(&["mlx5_0"], Some(77)), "no address at index 77 of its GID table; it has index 0: RoCE v1 fe80::"),
        ] {
            let said = error(&devices, &wish);
            assert!(said.contains(expected), "{said}");
        }
        assert_eq!(choose(&[], &Wish::default()), Err(ChooseError::NoDevice));

        let mut old = only(&devices, "mlx5_0");
        old[0].ports[0].gids.retain(|gid| gid.kind == GidKind::RoceV1);
        let said = error(&old, &Wish::default());
        assert!(said.contains("mlx5_0 has no RoCE v2 address (index 0: RoCE v1 fe80::"), "{said}");
        assert!(said.contains("--rdma-gid-index"), "{said}");
    }
}
