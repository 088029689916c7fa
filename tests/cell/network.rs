//! Two places with a slow and lossy network in between: network namespaces of this machine.

use std::{
    io::{BufRead, BufReader},
    net::Ipv4Addr,
    path::Path,
    process::{Child, Command, Stdio},
};

/// One way.
const DELAY_MS: u32 = 5;
const LOSS_PERCENT: u32 = 1;

/// The namespace of the test, another one, and a third through which all packets between them go: with netem on its
/// interfaces, or, where the kernel has none, with `switch.py`, which delays and drops them as well.
pub(crate) struct Network {
    /// Address in the test's own namespace.
    pub(crate) here: Ipv4Addr,
    /// Address in the other one.
    pub(crate) there: Ipv4Addr,
    /// Names of the other two.
    middle: String,
    far: String,
    switch: Option<Child>,
}

impl Network {
    /// Makes it; an error says why this machine does not let us.
    pub(crate) fn make() -> Result<Self, String> {
        let number = std::process::id();
        // Of the block that is set aside for measuring networks.
        let address = |host| Ipv4Addr::new(198, 18, (number % 250) as u8, host);
        let mut network = Self {
            here: address(1),
            there: address(2),
            middle: format!("engine-mid-{number}"),
            far: format!("engine-far-{number}"),
            switch: None,
        };
        network.lay()?;
        Ok(network)
    }

    fn lay(&mut self) -> Result<(), String> {
        let (middle, far) = (self.middle.clone(), self.far.clone());
        // Interfaces: the test's, the two of the middle, the far one.
        let near = format!("eng{}", std::process::id());
        for namespace in [&middle, &far] {
            run(&format!("ip netns add {namespace}"))?;
            run(&format!("ip -n {namespace} link set lo up"))?;
        }
        run(&format!("ip link add {near} type veth peer name left netns {middle}"))?;
        run(&format!("ip -n {middle} link add right type veth peer name far netns {far}"))?;
        run(&format!("ip address add {}/30 dev {near}", self.here))?;
        run(&format!("ip -n {far} address add {}/30 dev far", self.there))?;
        for link in [format!("link set {near}"), format!("-n {middle} link set left")] {
            run(&format!("ip {link} up"))?;
        }
        run(&format!("ip -n {middle} link set right up"))?;
        run(&format!("ip -n {far} link set far up"))?;
        let netem = |interface| {
            run(&format!("tc -n {middle} qdisc add dev {interface} root netem delay {DELAY_MS}ms loss {LOSS_PERCENT}%"))
        };
        match netem("left").and_then(|()| netem("right")) {
            Ok(()) => {
                run(&format!("ip -n {middle} link add between type bridge"))?;
                for port in ["left", "right"] {
                    run(&format!("ip -n {middle} link set {port} master between"))?;
                }
                run(&format!("ip -n {middle} link set between up"))
            }
            Err(_) => self.start_switch(),
        }
    }

    fn start_switch(&mut self) -> Result<(), String> {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cell/switch.py");
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.middle, "python3"]).arg(script);
        command.args(["left", "right", &DELAY_MS.to_string(), &LOSS_PERCENT.to_string()]);
        let mut child = command.stdout(Stdio::piped()).spawn().map_err(|error| format!("ip: {error}"))?;
        let mut line = String::new();
        // It says that it is ready, or nothing.
        let _ = BufReader::new(child.stdout.take().unwrap()).read_line(&mut line);
        self.switch = Some(child);
        if line.is_empty() { Err("neither netem nor raw sockets".to_owned()) } else { Ok(()) }
    }

    /// What to put before a command to run it on the other side.
    pub(crate) fn enter(&self) -> [&str; 4] {
        ["ip", "netns", "exec", &self.far]
    }
}

fn run(line: &str) -> Result<(), String> {
    let words: Vec<&str> = line.split(' ').collect();
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let output = Command::new(words[0]).args(&words[1..]).env("PATH", path).output();
    match output {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(format!("{line}: {}", String::from_utf8_lossy(&output.stderr).trim())),
        Err(error) => Err(format!("{line}: {error}")),
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        if let Some(mut switch) = self.switch.take() {
            let _ = switch.kill();
            let _ = switch.wait();
        }
        for namespace in [&self.middle, &self.far] {
            // The interfaces go with it.
            let _ = run(&format!("ip netns del {namespace}"));
        }
    }
}
