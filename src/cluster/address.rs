use std::net::{IpAddr, SocketAddr, ToSocketAddrs, UdpSocket};

/// The host under which others reach a server that listens on `listening`: `wanted` if the operator says so, else the
/// address listened on, else, if that is all of them, the one from which `endpoint` (etcd's, as `http://host:port`) is
/// reached. Resolves a name, so it may block for a moment.
pub fn advertised_host(wanted: Option<&str>, listening: IpAddr, endpoint: Option<&str>) -> String {
    if let Some(wanted) = wanted {
        return bracketed(wanted);
    }
    let address = if listening.is_unspecified() {
        endpoint.and_then(source_address).unwrap_or(IpAddr::from([127, 0, 0, 1]))
    } else {
        listening
    };
    let distant = || endpoint.and_then(source_address).is_some_and(|source| !source.is_loopback());
    if address.is_loopback() && distant() {
        tracing::warn!(
            "this process registers {address}, which other hosts cannot reach: give --host 0.0.0.0 or --advertise-host"
        );
    }
    bracketed(&address.to_string())
}

/// An identity of this host: its boot id. Processes that share it can share memory.
pub fn host_id() -> String {
    let read = std::fs::read_to_string("/proc/sys/kernel/random/boot_id");
    // A system without one shares memory with nobody.
    read.map_or_else(|_| uuid::Uuid::new_v4().to_string(), |id| id.trim().to_owned())
}

/// This machine's address on the way to an endpoint. Nothing is sent: connecting a datagram socket only looks up the
/// route.
fn source_address(endpoint: &str) -> Option<IpAddr> {
    let authority = endpoint.split_once("://").map_or(endpoint, |(_, rest)| rest);
    let authority = authority.split('/').next()?;
    let target = authority.to_socket_addrs().ok()?.next()?;
    let any: SocketAddr = if target.is_ipv4() { ([0; 4], 0).into() } else { ([0u16; 8], 0).into() };
    let socket = UdpSocket::bind(any).ok()?;
    socket.connect(target).ok()?;
    Some(socket.local_addr().ok()?.ip())
}

/// IPv6 addresses need brackets before a port.
fn bracketed(host: &str) -> String {
    match host.parse() {
        Ok(IpAddr::V6(address)) => format!("[{address}]"),
        _ => host.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_operator_says_comes_first_then_what_is_listened_on_then_the_way_to_etcd() {
        let any = IpAddr::from([0, 0, 0, 0]);
        let local = IpAddr::from([127, 0, 0, 1]);
        assert_eq!(advertised_host(Some("node-7"), any, None), "node-7");
        assert_eq!(advertised_host(Some("fd00::7"), any, None), "[fd00::7]");
        assert_eq!(advertised_host(None, IpAddr::from([10, 1, 2, 3]), None), "10.1.2.3");
        assert_eq!(advertised_host(None, any, Some("http://127.0.0.1:2379")), "127.0.0.1");
        assert_eq!(advertised_host(None, local, Some("127.0.0.1:2379")), "127.0.0.1");
    }
}
