//! Flags that name a cluster's services.

use std::path::PathBuf;

use clap::{Args, builder::NonEmptyStringValueParser};

use super::values::parse_namespace;
use crate::cluster::{ClusterOptions, EtcdOptions, NatsAuth, NatsOptions};

/// How to reach the cluster's services, and how to be reached.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Cluster")]
pub struct ClusterArgs {
    /// etcd's endpoints, as http://host:2379 [default: 127.0.0.1:2379, if etcd and NATS answer there]
    #[arg(
        long,
        value_name = "URL",
        env = "ETCD_ENDPOINTS",
        value_delimiter = ',',
        value_parser = NonEmptyStringValueParser::new()
    )]
    pub etcd: Vec<String>,

    /// NATS's servers, as nats://host:4222 [default: 127.0.0.1:4222, if etcd and NATS answer there]
    #[arg(
        long,
        value_name = "URL",
        env = "NATS_SERVER",
        value_delimiter = ',',
        value_parser = NonEmptyStringValueParser::new()
    )]
    pub nats: Vec<String>,

    /// Which of the clusters that share etcd and NATS to join
    #[arg(long, value_name = "NAME", default_value = "engine", value_parser = parse_namespace)]
    pub namespace: String,

    /// Secret that all workers and frontends of a cluster share, and without which none takes another's word
    #[arg(
        long,
        value_name = "TOKEN",
        env = "ENGINE_CLUSTER_TOKEN",
        hide_env_values = true,
        value_parser = NonEmptyStringValueParser::new()
    )]
    pub cluster_token: Option<String>,

    /// Certificates (PEM) that may have signed etcd's, instead of the system's; its endpoints are then https://
    #[arg(long, value_name = "FILE", env = "ETCD_CA")]
    pub etcd_ca: Option<PathBuf>,

    /// Certificate (PEM) to show to etcd
    #[arg(long, value_name = "FILE", env = "ETCD_CERT", requires = "etcd_key")]
    pub etcd_cert: Option<PathBuf>,

    /// Key (PEM) of that certificate
    #[arg(long, value_name = "FILE", env = "ETCD_KEY", requires = "etcd_cert")]
    pub etcd_key: Option<PathBuf>,

    /// User of etcd
    #[arg(long, value_name = "NAME", env = "ETCD_USER", requires = "etcd_password")]
    pub etcd_user: Option<String>,

    /// Password of that user
    #[arg(long, value_name = "PASSWORD", env = "ETCD_PASSWORD", hide_env_values = true, requires = "etcd_user")]
    pub etcd_password: Option<String>,

    /// Certificates (PEM) that may have signed NATS's, instead of the system's; switches TLS on
    #[arg(long, value_name = "FILE", env = "NATS_CA")]
    pub nats_ca: Option<PathBuf>,

    /// Certificate (PEM) to show to NATS
    #[arg(long, value_name = "FILE", env = "NATS_CERT", requires = "nats_key")]
    pub nats_cert: Option<PathBuf>,

    /// Key (PEM) of that certificate
    #[arg(long, value_name = "FILE", env = "NATS_KEY", requires = "nats_cert")]
    pub nats_key: Option<PathBuf>,

    /// User of NATS
    #[arg(long, value_name = "NAME", env = "NATS_USER", requires = "nats_password")]
    pub nats_user: Option<String>,

    /// Password of that user
    #[arg(long, value_name = "PASSWORD", env = "NATS_PASSWORD", hide_env_values = true, requires = "nats_user")]
    pub nats_password: Option<String>,

    /// Credentials file of NATS: a JWT and its key
    #[arg(long, value_name = "FILE", env = "NATS_CREDS", conflicts_with_all = ["nats_user", "nats_nkey"])]
    pub nats_creds: Option<PathBuf>,

    /// File with an nkey's seed for NATS
    #[arg(long, value_name = "FILE", env = "NATS_NKEY", conflicts_with = "nats_user")]
    pub nats_nkey: Option<PathBuf>,
}

impl ClusterArgs {
    /// Which cluster they name.
    pub fn options(&self) -> ClusterOptions {
        let pair = |a: &Option<PathBuf>, b: &Option<PathBuf>| a.clone().zip(b.clone());
        let auth = if let Some((user, password)) = self.nats_user.clone().zip(self.nats_password.clone()) {
            NatsAuth::Password { user, password }
        } else if let Some(path) = self.nats_creds.clone() {
            NatsAuth::Credentials(path)
        } else if let Some(path) = self.nats_nkey.clone() {
            NatsAuth::Nkey(path)
        } else {
            NatsAuth::None
        };
        ClusterOptions {
            namespace: self.namespace.clone(),
            etcd: EtcdOptions {
                ca: self.etcd_ca.clone(),
                identity: pair(&self.etcd_cert, &self.etcd_key),
                user: self.etcd_user.clone().zip(self.etcd_password.clone()),
                ..EtcdOptions::new(self.etcd.clone())
            },
            nats: NatsOptions {
                ca: self.nats_ca.clone(),
                identity: pair(&self.nats_cert, &self.nats_key),
                auth,
                ..NatsOptions::new(self.nats.clone())
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        cluster: ClusterArgs,
    }

    fn options(line: &str) -> Result<ClusterOptions, String> {
        let line = Line::try_parse_from(["engine"].into_iter().chain(line.split_whitespace()));
        line.map(|line| line.cluster.options()).map_err(|error| error.to_string())
    }

    #[test]
    fn services_are_those_that_are_named() {
        let options =
            options("--namespace n --etcd http://a:1,http://b:2 --nats nats://c:3 --nats nats://d:4").unwrap();
        assert_eq!(options.namespace, "n");
        assert_eq!(options.etcd.endpoints, ["http://a:1", "http://b:2"]);
        assert_eq!(options.nats.servers, ["nats://c:3", "nats://d:4"]);
    }

    #[test]
    fn each_service_gets_the_files_and_the_name_that_are_meant_for_it() {
        let path = |name: &str| PathBuf::from(name);
        let etcd = "--etcd-ca a --etcd-cert b --etcd-key c --etcd-user ada --etcd-password secret";
        let etcd = options(etcd).unwrap().etcd;
        assert_eq!((etcd.ca, etcd.identity), (Some(path("a")), Some((path("b"), path("c")))));
        assert_eq!(etcd.user, Some(("ada".into(), "secret".into())));
        let nats = options("--nats-ca d --nats-cert e --nats-key f").unwrap().nats;
        assert_eq!((nats.ca, nats.identity), (Some(path("d")), Some((path("e"), path("f")))));
        assert_eq!(nats.auth, NatsAuth::None);
        let nothing = options("").unwrap();
        assert_eq!((nothing.etcd.ca, nothing.etcd.identity, nothing.etcd.user), (None, None, None));
        assert_eq!((nothing.nats.ca, nothing.nats.identity), (None, None));
    }

    #[test]
    fn there_are_three_ways_to_be_somebody_at_nats_and_one_at_a_time() {
        let auth = |line| options(line).map(|options| options.nats.auth);
        let password = NatsAuth::Password { user: "ada".into(), password: "secret".into() };
        assert_eq!(auth("--nats-user ada --nats-password secret"), Ok(password));
        assert_eq!(auth("--nats-creds file"), Ok(NatsAuth::Credentials("file".into())));
        assert_eq!(auth("--nats-nkey file"), Ok(NatsAuth::Nkey("file".into())));
        for wrong in [
            "--nats-creds a --nats-nkey b",
            "--nats-user ada --nats-password secret --nats-nkey b",
            "--nats-user ada --nats-password secret --nats-creds a",
            "--nats-user ada",
            "--nats-cert a",
            "--etcd-cert a",
            "--etcd-user ada",
        ] {
            assert!(auth(wrong).is_err(), "{wrong}");
        }
    }
}
