use std::{fs, path::PathBuf, time::Duration};

use bytes::Bytes;
use engine::cluster::{Discovery, Etcd, EtcdOptions, Nats, NatsAuth, NatsOptions, Queue, QueueDepth, Role};
use etcd_client::{Client, Permission, PermissionType};
use nkeys::KeyPair;
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::{
    card, granted, key,
    queue::{publish, wait_for_depth},
    services::{self, Certificates, Service},
    soon,
};

/// How long a stranger is watched: one that is let in is so at once. On a very busy machine a mistake may pass unseen,
/// but none is seen that is not there.
const WATCHED: Duration = Duration::from_secs(2);

/// Returns when it answers and keeps streams, which a busy machine may say too late the first time.
async fn reached(nats: &Nats) {
    soon("NATS", async {
        while nats.reachable().await.is_err() {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

/// Panics if it is let in: it tries again and again, and a job is refused as long as it does.
async fn stays_outside(stranger: &Nats, who: &str) {
    assert!(timeout(WATCHED, stranger.reachable()).await.is_err(), "{who} is let in");
    assert!(stranger.publish(key("m"), "2".into(), Bytes::new()).await.is_err(), "{who}");
}

/// A NATS that takes the jobs of `known`, and of nobody else.
async fn takes_jobs_of(service: &Service, known: NatsAuth, strangers: &[NatsAuth]) {
    let with =
        async |auth| Nats::new(NatsOptions { auth, ..NatsOptions::new(vec![service.url()]) }, "a").await.unwrap();
    let known = with(known).await;
    reached(&known).await;
    publish(&known, key("m"), "1").await;
    for auth in strangers {
        stays_outside(&with(auth.clone()).await, &format!("{auth:?}")).await;
    }
    wait_for_depth(&known, key("m"), QueueDepth { waiting: 1, ..QueueDepth::default() }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nats_with_a_user_takes_jobs_of_that_user_alone() {
    let service = services::nats_with(&["--user", "engine", "--pass", "secret"]);
    let password = |password: &str| NatsAuth::Password { user: "engine".into(), password: password.into() };
    takes_jobs_of(&service, password("secret"), &[NatsAuth::None, password("wrong")]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nats_with_an_nkey_takes_jobs_of_whoever_has_its_seed() {
    let (known, stranger) = (KeyPair::new_user(), KeyPair::new_user());
    let config = format!("authorization {{ users: [{{ nkey: {} }}] }}", known.public_key());
    let service = services::nats_with_config(&config);
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, pair: &KeyPair| {
        let path = folder.path().join(name);
        fs::write(&path, pair.seed().unwrap() + "\n").unwrap();
        NatsAuth::Nkey(path)
    };
    takes_jobs_of(&service, file("known", &known), &[NatsAuth::None, file("stranger", &stranger)]).await;
}

/// What `issuer` says of `subject`, as NATS reads it: a JSON web token signed with an nkey.
fn token(issuer: &KeyPair, subject: &KeyPair, claims: Value) -> String {
    let issued = json!({"jti": "x", "iat": 1, "iss": issuer.public_key(), "sub": subject.public_key(), "nats": claims});
    let said =
        [json!({"typ": "JWT", "alg": "ed25519-nkey"}), issued].map(|part| base64url(part.to_string().as_bytes()));
    let said = said.join(".");
    let signature = issuer.sign(said.as_bytes()).unwrap();
    format!("{said}.{}", base64url(&signature))
}

/// Without padding.
fn base64url(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let digits = bytes.chunks(3).flat_map(|three| {
        let bits = (0..3).fold(0, |bits, at| bits << 8 | u32::from(*three.get(at).unwrap_or(&0)));
        (0..=three.len()).map(move |digit| char::from(DIGITS[(bits >> (18 - 6 * digit)) as usize % 64]))
    });
    digits.collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn nats_with_an_operator_takes_jobs_of_whoever_has_credentials() {
    let (operator, account, system) = (KeyPair::new_operator(), KeyPair::new_account(), KeyPair::new_account());
    let limits = json!({
        "subs": -1, "data": -1, "payload": -1, "imports": -1, "exports": -1, "wildcards": true, "conn": -1, "leaf": -1,
        "mem_storage": -1, "disk_storage": -1, "streams": -1, "consumer": -1,
    });
    let of_system = json!({"type": "account", "version": 2, "limits": {
        "subs": -1, "data": -1, "payload": -1, "imports": -1, "exports": -1, "wildcards": true, "conn": -1, "leaf": -1,
    }});
    let of_account = json!({"type": "account", "version": 2, "limits": limits});
    let config = format!(
        "operator: {}\nresolver: MEMORY\nsystem_account: {system}\nresolver_preload: {{ {system}: {}, {account}: {} }}",
        token(&operator, &operator, json!({"type": "operator", "version": 2})),
        token(&operator, &system, of_system),
        token(&operator, &account, of_account),
        system = system.public_key(),
        account = account.public_key(),
    );
    let service = services::nats_with_config(&config);
    let folder = tempfile::tempdir().unwrap();
    let credentials = |name: &str, account: &KeyPair| {
        let user = KeyPair::new_user();
        let claims = json!({"type": "user", "version": 2, "subs": -1, "data": -1, "payload": -1});
        let path = folder.path().join(name);
        let text = format!(
            "-----BEGIN NATS USER JWT-----\n{}\n------END NATS USER JWT------\n\n\
             -----BEGIN USER NKEY SEED-----\n{}\n------END USER NKEY SEED------\n",
            token(account, &user, claims),
            user.seed().unwrap(),
        );
        fs::write(&path, text).unwrap();
        NatsAuth::Credentials(path)
    };
    // The stranger's are of an account that the operator does not know.
    let strangers = [NatsAuth::None, credentials("stranger", &KeyPair::new_account())];
    takes_jobs_of(&service, credentials("known", &account), &strangers).await;
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
    let strange = stranger.register(card(Role::Decode, "m", "h:3"));
    assert!(timeout(WATCHED, granted(&strange, None)).await.is_err(), "a stranger is let in");
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
    reached(&known).await;
    publish(&known, key("m"), "1").await;
    let anonymous = Nats::new(options, "a").await.unwrap();
    stays_outside(&anonymous, "one without a certificate").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn files_that_are_not_there_are_named_at_start() {
    let missing = PathBuf::from("/nowhere/ca.pem");
    let etcd = EtcdOptions { ca: Some(missing.clone()), ..EtcdOptions::new(vec!["https://127.0.0.1:1".into()]) };
    let nats = NatsOptions { ca: Some(missing), ..NatsOptions::new(vec!["nats://127.0.0.1:1".into()]) };
    for error in [Etcd::new(etcd, "a").err(), Nats::new(nats, "a").await.err()] {
        assert!(error.unwrap().to_string().contains("/nowhere/ca.pem"));
    }
    for auth in [NatsAuth::Credentials("/nowhere/creds".into()), NatsAuth::Nkey("/nowhere/seed".into())] {
        let options = NatsOptions { auth, ..NatsOptions::new(vec!["nats://127.0.0.1:1".into()]) };
        assert!(Nats::new(options, "a").await.err().unwrap().to_string().contains("/nowhere/"));
    }
}
