//! What RDMA devices the kernel knows, read from sysfs: it takes no library, and shows ports that are down too.

use std::{
    fmt, fs, io,
    net::{Ipv4Addr, Ipv6Addr},
    path::Path,
    str::FromStr,
};

/// Where the kernel lists devices by what they are.
pub const SYSFS_CLASS: &str = "/sys/class";

/// An RDMA device.
#[derive(Debug, Clone, PartialEq)]
pub struct Device {
    /// As `--rdma-device` names it: `mlx5_0`.
    pub name: String,
    /// The model, as its driver puts it: `MT4129`. Software devices have none.
    pub model: Option<String>,
    /// The version of its firmware.
    pub firmware: Option<String>,
    /// Identifies the device to its network.
    pub node_guid: Option<String>,
    /// The NUMA node its PCIe slot hangs off, where the machine has several.
    pub numa_node: Option<u32>,
    /// Its ports, by number.
    pub ports: Vec<Port>,
}

/// A port of a device.
#[derive(Debug, Clone, PartialEq)]
pub struct Port {
    /// From 1.
    pub number: u8,
    /// Whether it can be used.
    pub state: PortState,
    /// What the cable does, in the kernel's word: `LinkUp`, `Polling`, `Disabled`.
    pub physical_state: String,
    /// Gigabits a second.
    pub rate_gbps: f64,
    /// What it is plugged into.
    pub link: Link,
    /// Its address on an InfiniBand subnet, given by the subnet manager; 0 on Ethernet.
    pub lid: u16,
    /// Where the subnet manager is; 0 on Ethernet, and where there is none.
    pub sm_lid: u16,
    /// Its addresses, without the empty entries of its table.
    pub gids: Vec<Gid>,
    /// The network interface of the same port, on Ethernet.
    pub netdev: Option<String>,
    /// Bytes of a packet of that interface, which bound those of an RDMA packet.
    pub netdev_mtu: Option<u32>,
}

/// Whether a port can be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PortState {
    /// No link.
    Down,
    /// A link, and no subnet manager has seen it yet.
    Init,
    /// Nearly ready.
    Armed,
    /// Ready.
    Active,
    /// Something else.
    Other,
}

/// What a port is plugged into.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Link {
    /// An InfiniBand subnet.
    InfiniBand,
    /// Ethernet: RoCE.
    Ethernet,
    /// Something that has no queue pairs of the kind used here, as EFA.
    Other,
}

/// An address of a port: an entry of its GID table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gid {
    /// As `--rdma-gid-index` names it.
    pub index: u8,
    /// An IPv6 address; IPv4's are mapped.
    pub value: [u8; 16],
    /// What packets from this address look like.
    pub kind: GidKind,
    /// The interface it belongs to, on Ethernet.
    pub netdev: Option<String>,
}

/// What packets from an address look like. Both ends must use the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GidKind {
    /// InfiniBand's own.
    Ib,
    /// Ethernet frames, which no router forwards.
    RoceV1,
    /// UDP packets.
    RoceV2,
}

impl fmt::Display for PortState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Down => "down",
            Self::Init => "initialising",
            Self::Armed => "armed",
            Self::Active => "active",
            Self::Other => "in an unknown state",
        })
    }
}

impl fmt::Display for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::InfiniBand => "InfiniBand",
            Self::Ethernet => "Ethernet",
            Self::Other => "neither InfiniBand nor Ethernet",
        })
    }
}

impl fmt::Display for GidKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ib => "InfiniBand",
            Self::RoceV1 => "RoCE v1",
            Self::RoceV2 => "RoCE v2",
        })
    }
}

impl Gid {
    /// As an IPv6 address is written: `::ffff:10.0.0.7`.
    pub fn address(&self) -> Ipv6Addr {
        Ipv6Addr::from(self.value)
    }

    /// The IPv4 address it maps.
    pub fn ipv4(&self) -> Option<Ipv4Addr> {
        self.address().to_ipv4_mapped()
    }
}

/// All RDMA devices, by name. `class` is [`SYSFS_CLASS`], but in tests. What cannot be read of a device is left out: a
/// table's empty entries answer with errors, and old kernels and software devices lack files.
///
/// A kernel without RDMA has no list, and so no devices; an error is something else.
pub fn devices(class: &Path) -> io::Result<Vec<Device>> {
    let list = match fs::read_dir(class.join("infiniband")) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        list => list?,
    };
    let mut devices = Vec::new();
    for entry in list {
        let entry = entry?;
        if let Ok(name) = entry.file_name().into_string() {
            devices.push(device(name, &entry.path(), class));
        }
    }
    devices.sort_by(|a, b| natural_order(&a.name, &b.name));
    Ok(devices)
}

/// `mlx5_2` before `mlx5_10`.
pub(super) fn natural_order(a: &str, b: &str) -> std::cmp::Ordering {
    let key = |name: &str| {
        let stem = name.trim_end_matches(|c: char| c.is_ascii_digit()).len();
        (name[..stem].to_owned(), name[stem..].parse::<u64>().unwrap_or(0))
    };
    key(a).cmp(&key(b)).then_with(|| a.cmp(b))
}

fn device(name: String, folder: &Path, class: &Path) -> Device {
    let mut ports: Vec<Port> = numbered(&folder.join("ports"))
        .filter_map(|number| u8::try_from(number).ok())
        .map(|number| port(number, &folder.join("ports").join(number.to_string()), folder, class))
        .collect();
    ports.sort_by_key(|port| port.number);
    Device {
        model: text(&folder.join("hca_type")),
        firmware: text(&folder.join("fw_ver")),
        node_guid: text(&folder.join("node_guid")),
        // -1 where there is but one.
        numa_node: parsed(&folder.join("device/numa_node")),
        ports,
        name,
    }
}

fn port(number: u8, folder: &Path, device: &Path, class: &Path) -> Port {
    let link = match text(&folder.join("link_layer")).as_deref() {
        Some("Ethernet") => Link::Ethernet,
        Some("InfiniBand") => Link::InfiniBand,
        _ => Link::Other,
    };
    let mut gids: Vec<Gid> = numbered(&folder.join("gids"))
        .filter_map(|index| u8::try_from(index).ok())
        .filter_map(|index| gid(index, folder, link))
        .collect();
    gids.sort_by_key(|gid| gid.index);
    // A software device names its interface itself; its table does so too where the kernel lets it.
    let netdev = gids.iter().find_map(|gid| gid.netdev.clone()).or_else(|| text(&device.join("parent")));
    let netdev_mtu = netdev.as_ref().and_then(|netdev| parsed(&class.join("net").join(netdev).join("mtu")));
    Port {
        number,
        state: port_state(&text(&folder.join("state")).unwrap_or_default()),
        physical_state: after_number(&text(&folder.join("phys_state")).unwrap_or_default()).to_owned(),
        rate_gbps: text(&folder.join("rate")).as_deref().and_then(rate_gbps).unwrap_or(0.0),
        link,
        lid: text(&folder.join("lid")).as_deref().and_then(hexadecimal).unwrap_or(0),
        sm_lid: text(&folder.join("sm_lid")).as_deref().and_then(hexadecimal).unwrap_or(0),
        gids,
        netdev,
        netdev_mtu,
    }
}

fn gid(index: u8, port: &Path, link: Link) -> Option<Gid> {
    let index_name = index.to_string();
    let value: Ipv6Addr = parsed(&port.join("gids").join(&index_name))?;
    if value.is_unspecified() {
        return None;
    }
    let attributes = port.join("gid_attrs");
    let kind = match (link, text(&attributes.join("types").join(&index_name)).as_deref()) {
        (Link::InfiniBand | Link::Other, _) => GidKind::Ib,
        (Link::Ethernet, Some("RoCE v2")) => GidKind::RoceV2,
        // "IB/RoCE v1"; and without a word, the kind that is never chosen unasked.
        (Link::Ethernet, _) => GidKind::RoceV1,
    };
    let netdev = text(&attributes.join("ndevs").join(&index_name));
    Some(Gid { index, value: value.octets(), kind, netdev })
}

/// The entries of a folder that are numbers.
fn numbered(folder: &Path) -> impl Iterator<Item = u32> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

fn text(path: &Path) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    let text = text.trim();
    (!text.is_empty()).then(|| text.to_owned())
}

fn parsed<T: FromStr>(path: &Path) -> Option<T> {
    text(path)?.parse().ok()
}

/// `ACTIVE` of `4: ACTIVE`.
fn after_number(text: &str) -> &str {
    text.split_once(": ").map_or(text, |(_, word)| word)
}

fn port_state(text: &str) -> PortState {
    match after_number(text) {
        "DOWN" => PortState::Down,
        "INIT" => PortState::Init,
        "ARMED" => PortState::Armed,
        "ACTIVE" => PortState::Active,
        _ => PortState::Other,
    }
}

/// `100` of `100 Gb/sec (4X EDR)`.
fn rate_gbps(text: &str) -> Option<f64> {
    text.split_whitespace().next()?.parse().ok()
}

fn hexadecimal(text: &str) -> Option<u16> {
    u16::from_str_radix(text.strip_prefix("0x").unwrap_or(text), 16).ok()
}

#[cfg(test)]
pub(super) mod testing {
    //! Trees as kernels show them.

    use super::*;

    /// Writes files below a folder.
    pub(in super::super) fn write_all(folder: &Path, files: &[(&str, &str)]) {
        for (path, content) in files {
            let path = folder.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, format!("{content}\n")).unwrap();
        }
    }

    /// An entry of a GID table; the kernel has no attribute files for entries that are empty.
    pub(in super::super) fn write_gid(port: &Path, index: u8, value: &str, kind: &str, netdev: &str) {
        let name = |folder: &str| format!("{folder}/{index}");
        write_all(port, &[(&name("gids"), value)]);
        if !kind.is_empty() {
            write_all(port, &[(&name("gid_attrs/types"), kind), (&name("gid_attrs/ndevs"), netdev)]);
        }
    }

    pub(in super::super) const NO_GID: &str = "0000:0000:0000:0000:0000:0000:0000:0000";

    /// A host with an Ethernet adapter of two ports on two devices, the second down, an InfiniBand one, and soft-RoCE.
    pub(in super::super) fn class() -> tempfile::TempDir {
        let class = tempfile::tempdir().unwrap();
        let infiniband = class.path().join("infiniband");
        let roce = infiniband.join("mlx5_0");
        write_all(
            &roce,
            &[
                ("hca_type", "MT4129"),
                ("fw_ver", "28.39.1002"),
                ("node_guid", "946d:ae03:00f1:0a2c"),
                ("device/numa_node", "1"),
                ("ports/1/state", "4: ACTIVE"),
                ("ports/1/phys_state", "5: LinkUp"),
                ("ports/1/rate", "400 Gb/sec (4X NDR)"),
                ("ports/1/link_layer", "Ethernet"),
                ("ports/1/lid", "0x0"),
                ("ports/1/sm_lid", "0x0"),
            ],
        );
        let port = roce.join("ports/1");
        let entries = [
            (0, "fe80:0000:0000:0000:966d:aeff:fef1:0a2c", "IB/RoCE v1"),
            (1, "fe80:0000:0000:0000:966d:aeff:fef1:0a2c", "RoCE v2"),
            (2, "0000:0000:0000:0000:0000:ffff:0a00:0007", "IB/RoCE v1"),
            (3, "0000:0000:0000:0000:0000:ffff:0a00:0007", "RoCE v2"),
            (4, "fd00:0000:0000:0000:0000:0000:0000:0007", "IB/RoCE v1"),
            (5, "fd00:0000:0000:0000:0000:0000:0000:0007", "RoCE v2"),
        ];
        for (index, value, kind) in entries {
            write_gid(&port, index, value, kind, "ens1np0");
        }
        for index in 6..=255 {
            write_gid(&port, index, NO_GID, "", "");
        }
        write_all(&class.path().join("net"), &[("ens1np0/mtu", "9000"), ("lo/mtu", "65536")]);

        let down = infiniband.join("mlx5_10");
        write_all(
            &down,
            &[
                ("device/numa_node", "-1"),
                ("ports/1/state", "1: DOWN"),
                ("ports/1/phys_state", "3: Disabled"),
                ("ports/1/rate", "40 Gb/sec (4X QDR)"),
                ("ports/1/link_layer", "Ethernet"),
            ],
        );

        let ib = infiniband.join("mlx5_2");
        write_all(
            &ib,
            &[
                ("ports/1/state", "4: ACTIVE"),
                ("ports/1/phys_state", "5: LinkUp"),
                ("ports/1/rate", "200 Gb/sec (4X HDR)"),
                ("ports/1/link_layer", "InfiniBand"),
                ("ports/1/lid", "0x1f"),
                ("ports/1/sm_lid", "0x1"),
                ("ports/2/state", "2: INIT"),
                ("ports/2/phys_state", "5: LinkUp"),
                ("ports/2/rate", "200 Gb/sec (4X HDR)"),
                ("ports/2/link_layer", "InfiniBand"),
                ("ports/2/lid", "0xffff"),
            ],
        );
        write_gid(&ib.join("ports/1"), 0, "fe80:0000:0000:0000:946d:ae03:00f1:0b3c", "IB/RoCE v1", "");
        write_gid(&ib.join("ports/2"), 0, "fe80:0000:0000:0000:946d:ae03:00f1:0b3d", "IB/RoCE v1", "");

        let soft = infiniband.join("rxe0");
        write_all(
            &soft,
            &[
                ("parent", "lo"),
                ("ports/1/state", "4: ACTIVE"),
                ("ports/1/phys_state", "5: LinkUp"),
                ("ports/1/rate", "2.5 Gb/sec (1X SDR)"),
                ("ports/1/link_layer", "Ethernet"),
            ],
        );
        write_gid(&soft.join("ports/1"), 0, "fe80:0000:0000:0000:0200:00ff:fe00:0000", "RoCE v2", "lo");
        write_gid(&soft.join("ports/1"), 1, "0000:0000:0000:0000:0000:ffff:7f00:0001", "RoCE v2", "lo");
        write_gid(&soft.join("ports/1"), 2, "0000:0000:0000:0000:0000:0000:0000:0001", "", "");
        class
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_without_rdma_has_no_devices() {
        let class = tempfile::tempdir().unwrap();
        assert_eq!(devices(class.path()).unwrap(), []);
    }

    #[test]
    fn devices_come_in_the_order_people_count_in() {
        let class = testing::class();
        let names: Vec<String> = devices(class.path()).unwrap().into_iter().map(|device| device.name).collect();
        assert_eq!(names, ["mlx5_0", "mlx5_2", "mlx5_10", "rxe0"]);
    }

    #[test]
    fn a_roce_port_is_read_with_the_gids_it_has_and_its_interface() {
        let class = testing::class();
        let device = &devices(class.path()).unwrap()[0];
        assert_eq!(device.model.as_deref(), Some("MT4129"));
        assert_eq!(device.firmware.as_deref(), Some("28.39.1002"));
        assert_eq!(device.node_guid.as_deref(), Some("946d:ae03:00f1:0a2c"));
        assert_eq!(device.numa_node, Some(1));
        let [port] = &device.ports[..] else { panic!("{device:?}") };
        assert_eq!((port.number, port.state, port.link), (1, PortState::Active, Link::Ethernet));
        assert_eq!((port.physical_state.as_str(), port.rate_gbps, port.lid), ("LinkUp", 400.0, 0));
        assert_eq!((port.netdev.as_deref(), port.netdev_mtu), (Some("ens1np0"), Some(9000)));
        let found: Vec<_> = port.gids.iter().map(|gid| (gid.index, gid.kind)).collect();
        let v1_and_v2 = [GidKind::RoceV1, GidKind::RoceV2].into_iter().cycle();
        assert_eq!(found, (0..6).zip(v1_and_v2).collect::<Vec<_>>(), "250 empty entries are none");
        assert_eq!(port.gids[3].ipv4(), Some(Ipv4Addr::new(10, 0, 0, 7)));
    }

    #[test]
    fn infiniband_ports_have_their_addresses_on_the_subnet() {
        let class = testing::class();
        let device = &devices(class.path()).unwrap()[1];
        let [first, second] = &device.ports[..] else { panic!("{device:?}") };
        assert_eq!((first.link, first.lid, first.sm_lid, first.rate_gbps), (Link::InfiniBand, 0x1f, 1, 200.0));
        assert_eq!(first.gids[0].kind, GidKind::Ib, "whatever its attribute says");
        assert_eq!((second.state, second.lid), (PortState::Init, 0xffff));
        assert_eq!((first.netdev.as_deref(), device.numa_node), (None, None));
    }

    #[test]
    fn what_a_device_lacks_is_left_out() {
        let class = testing::class();
        let devices = devices(class.path()).unwrap();
        let down = &devices[2].ports[0];
        assert_eq!((down.state, down.physical_state.as_str(), down.gids.len()), (PortState::Down, "Disabled", 0));
        assert_eq!(devices[2].numa_node, None, "-1 is no node");
        let soft = &devices[3].ports[0];
        assert_eq!(soft.rate_gbps, 2.5);
        assert_eq!((soft.netdev.as_deref(), soft.netdev_mtu), (Some("lo"), Some(65536)));
        let kinds: Vec<_> = soft.gids.iter().map(|gid| gid.kind).collect();
        assert_eq!(
            kinds,
            [GidKind::RoceV2, GidKind::RoceV2, GidKind::RoceV1],
            "without an attribute, the kind never chosen unasked"
        );
    }
}
