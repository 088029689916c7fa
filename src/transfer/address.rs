use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::RdmaPort;

/// Where a decode worker takes sessions: part of its card.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SessionAddresses {
    /// The host it runs on, by [`host_identity`].
    pub host: String,
    /// Random, for this run of this server. Hosts that are clones, and containers that have the same path for different
    /// files, are told apart by it.
    pub instance: String,
    /// Its unix socket.
    pub unix: Option<PathBuf>,
    /// The CUDA device its pages are on, if other processes of the host may open them.
    #[serde(default)]
    pub cuda: Option<String>,
    /// Its TCP address, `host:port`.
    pub tcp: Option<String>,
    /// Whether it is encrypted there.
    #[serde(default)]
    pub tls: bool,
    /// Its RDMA ports, in the order in which a session is striped over them.
    #[serde(default)]
    pub rdma: Vec<RdmaPort>,
}

impl SessionAddresses {
    /// [`Self::instance`] of addresses as a card has them, of whatever build.
    pub fn instance_of(session: &Value) -> Option<&str> {
        session["instance"].as_str()
    }
}

/// What tells this host, since it was started, from all others: the kernel's boot id. Containers of a host have the
/// same.
pub fn host_identity() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_string())
}

/// The folder for this user's unix sockets, made if need be: `engine` in `XDG_RUNTIME_DIR`, or `/tmp/engine-{uid}`. An
/// error if somebody else owns it or may write to it.
pub fn runtime_directory() -> io::Result<PathBuf> {
    let user = rustix::process::geteuid().as_raw();
    let folder = match std::env::var_os("XDG_RUNTIME_DIR") {
        Some(run) if !run.is_empty() => PathBuf::from(run).join("engine"),
        _ => PathBuf::from(format!("/tmp/engine-{user}")),
    };
    private_folder(folder, user)
}

fn private_folder(folder: PathBuf, user: u32) -> io::Result<PathBuf> {
    match DirBuilder::new().mode(0o700).create(&folder) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let found = fs::symlink_metadata(&folder)?;
    if !found.is_dir() || found.uid() != user || found.mode() & 0o022 != 0 {
        let text = format!("{} is not a folder that this user alone may write to", folder.display());
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
    }
    Ok(folder)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn the_instance_is_found_in_what_a_card_has() {
        let (host, instance) = ("h".to_owned(), "i".to_owned());
        let addresses =
            SessionAddresses { host, instance, unix: None, cuda: None, tcp: None, tls: false, rdma: Vec::new() };
        let card = serde_json::to_value(&addresses).unwrap();
        assert_eq!(SessionAddresses::instance_of(&card), Some("i"));
        assert_eq!(SessionAddresses::instance_of(&Value::Null), None, "it takes no sessions");
    }

    #[test]
    fn a_folder_that_others_may_write_to_is_refused() {
        let parent = tempfile::tempdir().unwrap();
        let user = rustix::process::geteuid().as_raw();
        let folder = parent.path().join("engine");
        assert_eq!(private_folder(folder.clone(), user).unwrap(), folder);
        assert_eq!(private_folder(folder.clone(), user).unwrap(), folder);
        assert!(private_folder(folder.clone(), user + 1).is_err());
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o777)).unwrap();
        assert!(private_folder(folder, user).is_err());
    }

    #[test]
    fn a_host_has_one_identity() {
        assert_eq!(host_identity().unwrap(), host_identity().unwrap());
        assert!(!host_identity().unwrap().is_empty());
    }
}
