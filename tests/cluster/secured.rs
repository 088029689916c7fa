use std::{path::PathBuf, process::Command, time::Duration};

use bytes::Bytes;
use engine::cluster::{Discovery, Etcd, EtcdOptions, Nats, NatsAuth, NatsOptions, Queue, Role};
use etcd_client::{Client, Permission, PermissionType};
use tempfile::TempDir;

use crate::{card, granted, key, services, soon};

#[tokio::test(flavor = "multi_thread")]
async fn nats_with_a_user_takes_jobs_of_that_user_alone() {
    let service = services::nats_with(&["--user", "engine", "--pass", "secret"]);
    let with =
        async |auth| Nats::new(NatsOptions { auth, ..NatsOptions::new(vec![service.url()]) }, "a").await.unwrap();
    let known = with(NatsAuth::Password { user: "engine".into(), password: "secret".into() }).await;
    soon("the server", known.reachable()).await.unwrap();
    known.publish(key("m"), "1".into(), Bytes::new()).await.unwrap();
    for auth in [NatsAuth::None, NatsAuth::Password { user: "engine".into(), password: "wrong".into() }] {
        let stranger = with(auth).await;
        assert!(stranger.publish(key("m"), "2".into(), Bytes::new()).await.is_err());
    }
    assert_eq!(known.depth(key("m")).await.unwrap().waiting, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn etcd_with_users_takes_registrations_of_those_it_knows_and_logs_them_in_again() {
    let service = services::etcd_with(&["--auth-token-ttl", "1"]);
    let mut admin = Client::connect([service.url()], None).await.unwrap();
    let mut auth = admin.auth_client();
    auth.role_add("workers").await.unwrap();
    let all = Permission::new(PermissionType::Readwrite, "/engine/a/").with_prefix();
    auth.role_grant_permission("workers", all).await.unwrap();
    for (user, role) in [("root", "root"), ("engine", "workers")] {
        auth.user_add(user, "secret", None).await.unwrap();
        if role == "root" {
            auth.role_add("root").await.unwrap();
        }
        auth.user_grant_role(user, role).await.unwrap();
    }
    auth.auth_enable().await.unwrap();
    let _ = admin.get("x", None).await;

    let options = EtcdOptions::new(vec![service.url()]);
    let user = |password: &str| Some(("engine".to_owned(), password.to_owned()));
    let known = Etcd::new(EtcdOptions { user: user("secret"), ..options.clone() }, "a").unwrap();
    let stranger = Etcd::new(EtcdOptions { user: user("wrong"), ..options }, "a").unwrap();
    assert!(stranger.reachable().await.is_err());
    let lease = known.register(card(Role::Decode, "m", "h:1"));
    granted(&lease, None).await;
    // Longer than a login lasts: the next registration needs another.
    tokio::time::sleep(Duration::from_secs(3)).await;
    let late = known.register(card(Role::Decode, "m", "h:2"));
    let late_id = granted(&late, None).await;
    let mut workers = known.workers(Default::default());
    soon("both workers", workers.wait_for(|workers| workers.contains_key(&late_id) && workers.len() == 2))
        .await
        .unwrap();
    assert!(stranger.register(card(Role::Decode, "m", "h:3")).id().borrow().is_none());
}

/// An authority, and a certificate for 127.0.0.1 by it, for servers and clients.
struct Certificates(TempDir);

impl Certificates {
    fn new() -> Self {
        let this = Self(tempfile::tempdir().unwrap());
        this.make("ca", &[]);
        let extensions =
            ["basicConstraints=CA:FALSE", "subjectAltName=IP:127.0.0.1", "extendedKeyUsage=serverAuth,clientAuth"];
        let mut by_authority = vec!["-CA".to_owned(), this.path("ca.pem"), "-CAkey".to_owned(), this.path("ca.key")];
        by_authority.extend(extensions.iter().flat_map(|extension| ["-addext".to_owned(), extension.to_string()]));
        this.make("leaf", &by_authority);
        this
    }

    fn make(&self, name: &str, arguments: &[String]) {
        let mut command = Command::new("openssl");
        command.args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "30"]);
        command.args(["-subj", &format!("/CN={name}"), "-keyout", &self.path(&format!("{name}.key"))]);
        command.args(["-out", &self.path(&format!("{name}.pem"))]).args(arguments);
        let output = command.output().expect("openssl runs (make setup)");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).to_str().unwrap().to_owned()
    }

    fn ca(&self) -> Option<PathBuf> {
        Some(self.path("ca.pem").into())
    }

    fn identity(&self) -> Option<(PathBuf, PathBuf)> {
        Some((self.path("leaf.pem").into(), self.path("leaf.key").into()))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn etcd_over_tls_takes_those_who_show_a_certificate_and_is_believed_if_it_shows_one() {
    let certificates = Certificates::new();
    let [ca, cert, key] = ["ca.pem", "leaf.pem", "leaf.key"].map(|name| certificates.path(name));
    let flags = ["--cert-file", &cert, "--key-file", &key, "--client-cert-auth", "--trusted-ca-file", &ca];
    let service = services::etcd_with(&flags);
    let options = EtcdOptions::new(vec![service.url()]);
    let (ca, identity) = (certificates.ca(), certificates.identity());
    let known = Etcd::new(EtcdOptions { ca: ca.clone(), identity: identity.clone(), ..options.clone() }, "a").unwrap();
    soon("etcd", async { while known.reachable().await.is_err() {} }).await;
    granted(&known.register(card(Role::Decode, "m", "h:1")), None).await;
    let anonymous = Etcd::new(EtcdOptions { ca, ..options.clone() }, "a").unwrap();
    assert!(anonymous.reachable().await.is_err(), "without a certificate of its own");
    let mistrustful = Etcd::new(EtcdOptions { identity, ..options }, "a").unwrap();
    assert!(mistrustful.reachable().await.is_err(), "without the authority's");
}

#[tokio::test(flavor = "multi_thread")]
async fn nats_over_tls_takes_those_who_show_a_certificate() {
    let certificates = Certificates::new();
    let [ca, cert, key_file] = ["ca.pem", "leaf.pem", "leaf.key"].map(|name| certificates.path(name));
    let service = services::nats_with(&["--tlsverify", "--tlscert", &cert, "--tlskey", &key_file, "--tlscacert", &ca]);
    let options = NatsOptions { ca: certificates.ca(), ..NatsOptions::new(vec![service.url()]) };
    let known = NatsOptions { identity: certificates.identity(), ..options.clone() };
    let known = Nats::new(known, "a").await.unwrap();
    soon("NATS", known.reachable()).await.unwrap();
    known.publish(key("m"), "1".into(), Bytes::new()).await.unwrap();
    let anonymous = Nats::new(options, "a").await.unwrap();
    assert!(anonymous.publish(key("m"), "2".into(), Bytes::new()).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn files_that_are_not_there_are_named_at_start() {
    let missing = PathBuf::from("/nowhere/ca.pem");
    let etcd = EtcdOptions { ca: Some(missing.clone()), ..EtcdOptions::new(vec!["https://127.0.0.1:1".into()]) };
    let nats = NatsOptions { ca: Some(missing), ..NatsOptions::new(vec!["nats://127.0.0.1:1".into()]) };
    for error in [Etcd::new(etcd, "a").err(), Nats::new(nats, "a").await.err()] {
        assert!(error.unwrap().to_string().contains("/nowhere/ca.pem"));
    }
}
