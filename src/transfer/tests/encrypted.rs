//! TLS on TCP sessions.

use std::{
    io::{self, IoSlice, IoSliceMut, Write},
    process::Command,
};

use tokio::net::{TcpListener, TcpStream};

use super::support::*;
use crate::handoff::{MailboxSlot, MailboxWord, Status, WorkerId};
use crate::transfer::handshake;
use crate::transfer::socket::Socket;
use crate::transfer::tls::Tls;
use crate::transfer::{ClusterToken, ConnectError, SessionTls, TlsError, Transport};

/// An authority, and a certificate for 127.0.0.1 by it, for either side.
struct Certificates(tempfile::TempDir);

impl Certificates {
    fn new() -> Self {
        let this = Self(tempfile::tempdir().unwrap());
        this.make("ca", &[]);
        let (ca, key) = (this.path("ca.pem"), this.path("ca.key"));
        let mut by_authority = vec!["-CA", &ca, "-CAkey", &key];
        for extension in
            ["basicConstraints=CA:FALSE", "subjectAltName=IP:127.0.0.1", "extendedKeyUsage=serverAuth,clientAuth"]
        {
            by_authority.extend(["-addext", extension]);
        }
        this.make("leaf", &by_authority);
        this
    }

    fn make(&self, name: &str, arguments: &[&str]) {
        let mut command = Command::new("openssl");
        command.args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "30"]);
        command.args(["-subj", &format!("/CN={name}"), "-keyout", &self.path(&format!("{name}.key"))]);
        command.args(["-out", &self.path(&format!("{name}.pem"))]).args(arguments);
        let output = command.output().expect("openssl runs (make setup-services)");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).to_str().unwrap().to_owned()
    }

    fn tls(&self, ca: bool, identity: bool) -> SessionTls {
        SessionTls {
            ca: ca.then(|| self.path("ca.pem").into()),
            identity: identity.then(|| (self.path("leaf.pem").into(), self.path("leaf.key").into())),
        }
    }
}

async fn decode(tls: &SessionTls) -> Decode {
    let tls = tls.server().unwrap();
    Decode::start_with(|config| config.tls = tls).await
}

fn prefill(tls: &SessionTls) -> Prefill {
    let mut config = connector_config(Transport::Tcp);
    config.tls = tls.client().unwrap();
    Prefill::new_with(SHAPE, config)
}

async fn refused(decode: &Decode, prefill: &Prefill) -> ConnectError {
    soon(prefill.connector.connect(decode.server.addresses(), WorkerId(1))).await.err().expect("it is refused")
}

#[tokio::test]
async fn pages_and_messages_go_through_encrypted_sessions_and_back() {
    let certificates = Certificates::new();
    for mutual in [false, true] {
        let mut decode = decode(&certificates.tls(mutual, true)).await;
        let prefill = prefill(&certificates.tls(true, mutual));
        let (id, mut session) = decode.session(&prefill).await;
        assert_eq!(session.transport(), Transport::Tcp);
        // Larger than a record, and than what is encrypted at a time.
        let long = vec![3; 1 << 20];
        assert!(session.send(long.clone().into()));
        assert_eq!(decode.message().await, long);
        decode.server.send(id, long.clone().into());
        assert_eq!(soon(session.receive()).await.unwrap(), long);
        let lent: Vec<(u32, u32)> = (0..30).map(|i| (i, 2 * i)).collect();
        let pages: Vec<u32> = lent.iter().map(|&(_, remote)| remote).collect();
        decode.server.lend(id, MailboxSlot(2), epoch(5), pages.as_slice().into());
        write(&session.writer(), MailboxSlot(2), epoch(5), all_layers(&lent)).await.unwrap();
        complete(&session.writer(), MailboxSlot(2), epoch(5), Status::Done).await.unwrap();
        assert_eq!(decode.mailbox.load(MailboxSlot(2)), MailboxWord::new(epoch(5), Status::Done));
        for layer in 0..SHAPE.layers {
            for &(local, remote) in &lent {
                assert!(holds(&decode.page(layer, remote), layer, local), "layer {layer}, page {remote}");
            }
        }
        drop(session);
        decode.ended(id).await;
    }
}

#[tokio::test]
async fn a_worker_that_another_authority_vouches_for_is_refused_by_either_side() {
    let (ours, theirs) = (Certificates::new(), Certificates::new());
    let decode = decode(&ours.tls(true, true)).await;
    let stranger = SessionTls { identity: theirs.tls(false, true).identity, ..ours.tls(true, false) };
    for tls in [theirs.tls(true, true), stranger, ours.tls(true, false)] {
        let refused = refused(&decode, &prefill(&tls)).await;
        assert!(matches!(refused, ConnectError::Io(_)), "{refused}");
    }
    assert!(prefill(&ours.tls(true, true)).connector.connect(decode.server.addresses(), WorkerId(1)).await.is_ok());
}

#[tokio::test]
async fn whoever_does_not_encrypt_is_refused_by_who_does() {
    let certificates = Certificates::new();
    let secret = decode(&certificates.tls(false, true)).await;
    let open = Decode::start().await;
    assert!(matches!(refused(&secret, &Prefill::new(Transport::Tcp)).await, ConnectError::Encrypted));
    assert!(matches!(refused(&open, &prefill(&certificates.tls(true, false))).await, ConnectError::Plain));
    // One that does not care what the card says.
    let stream = TcpStream::connect(secret.server.addresses().tcp.as_deref().unwrap()).await.unwrap();
    let socket = Socket::new(stream.into_std().unwrap()).unwrap();
    let hello = hello(secret.server.addresses(), Transport::Tcp);
    assert!(soon(handshake::connect(&socket, &ClusterToken::new("tea"), &hello)).await.is_err());
    assert!(secret.metrics.refused.get() >= 1);
}

/// Carries what one side has to send to the other, the last byte changed if it is to be `damaged`.
fn carry(from: &mut Tls, to: &mut Tls, damaged: bool) {
    while !from.to_send().is_empty() {
        let (bytes, space) = (from.to_send(), to.space());
        let length = bytes.len().min(space.len());
        space[..length].copy_from_slice(&bytes[..length]);
        space[length - 1] ^= u8::from(damaged);
        from.sent(length);
        to.received(length);
    }
}

#[test]
fn what_was_damaged_on_the_way_ends_both_directions_with_the_same_error_and_the_peer_learns_of_it() {
    let certificates = Certificates::new();
    let (ours, theirs) =
        (certificates.tls(false, true).server().unwrap(), certificates.tls(true, false).client().unwrap());
    let mut server = Tls::server(&ours.unwrap()).unwrap();
    let mut client = Tls::client(&theirs.unwrap(), "127.0.0.1").unwrap();
    loop {
        let over = client.handshake().unwrap();
        carry(&mut client, &mut server, false);
        if server.handshake().unwrap() && over {
            break;
        }
        carry(&mut server, &mut client, false);
    }
    carry(&mut server, &mut client, false);
    let receive = |tls: &mut Tls| {
        let mut buffer = [0; 64];
        tls.decrypt(&mut [IoSliceMut::new(&mut buffer)]).map(|length| buffer[..length].to_vec())
    };
    client.encrypt(&[IoSlice::new(b"whole")]).unwrap();
    carry(&mut client, &mut server, false);
    assert_eq!(receive(&mut server).unwrap(), b"whole");
    client.encrypt(&[IoSlice::new(b"damaged")]).unwrap();
    carry(&mut client, &mut server, true);
    let error = receive(&mut server).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    for later in [receive(&mut server).map(drop), server.encrypt(&[IoSlice::new(b"more")]).map(drop)] {
        assert_eq!(later.unwrap_err().to_string(), error.to_string());
    }
    carry(&mut server, &mut client, false);
    let heard = receive(&mut client).unwrap_err().to_string();
    assert!(heard.contains("BadRecordMac"), "{heard}");
}

/// Either end of a TCP connection that has not agreed on keys yet.
async fn connection() -> [TcpStream; 2] {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (connected, accepted) = tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
    [connected.unwrap(), accepted.unwrap().0]
}

/// Agrees on keys: what came of it for the prefill worker, and for the decode worker.
async fn agree([ours, theirs]: [TcpStream; 2], client: &SessionTls, server: &SessionTls) -> [io::Result<Socket>; 2] {
    let client = Tls::client(&client.client().unwrap().unwrap(), "127.0.0.1").unwrap();
    let server = Tls::server(&server.server().unwrap().unwrap()).unwrap();
    let (ours, theirs) = (Socket::tcp(ours).unwrap(), Socket::tcp(theirs).unwrap());
    let (client, server) = soon(async { tokio::join!(ours.encrypted(client), theirs.encrypted(server)) }).await;
    [client, server]
}

#[tokio::test]
async fn a_peer_learns_what_was_wrong_with_it_before_there_are_keys_and_after() {
    let (ours, theirs) = (Certificates::new(), Certificates::new());
    let [client, server] = agree(connection().await, &ours.tls(true, false), &theirs.tls(false, true)).await;
    assert!(client.is_err());
    let heard = server.err().unwrap().to_string();
    assert!(heard.contains("fatal alert"), "{heard}");

    let [client, server] = connection().await;
    let wire = client.into_std().unwrap();
    let other = TcpStream::from_std(wire.try_clone().unwrap()).unwrap();
    let [client, server] = agree([other, server], &ours.tls(true, false), &ours.tls(false, true)).await;
    let (client, server) = (client.unwrap(), server.unwrap());
    // A record of nothing that was ever encrypted.
    (&wire).write_all(&[&[0x17, 3, 3, 0, 40][..], &[7; 40]].concat()).unwrap();
    let mut buffer = [0; 8];
    assert_eq!(soon(server.read(&mut buffer)).await.unwrap_err().kind(), io::ErrorKind::InvalidData);
    let heard = soon(client.read(&mut buffer)).await.unwrap_err().to_string();
    assert!(heard.contains("BadRecordMac"), "{heard}");
}

#[tokio::test]
async fn whoever_reads_sends_what_was_encrypted_before() {
    let certificates = Certificates::new();
    let both = connection().await;
    // So that the system takes little at a time.
    rustix::net::sockopt::set_socket_send_buffer_size(&both[0], 4096).unwrap();
    let agreed = agree(both, &certificates.tls(true, false), &certificates.tls(false, true)).await;
    let [client, server] = agreed.map(io::Result::unwrap);
    let sent = vec![5; 200 << 10];
    let taken = soon(client.write_vectored(&[IoSlice::new(&sent)])).await.unwrap();
    let (mut received, mut nothing) = (vec![0; taken], [0; 8]);
    tokio::select! {
        read = soon(server.read_exact(&mut received)) => read.unwrap(),
        read = client.read(&mut nothing) => panic!("nobody wrote: {read:?}"),
    }
    assert_eq!(received, sent[..taken]);
}

#[test]
fn certificates_that_do_not_do_are_named_at_start() {
    let certificates = Certificates::new();
    assert!(matches!(certificates.tls(true, false).server(), Err(TlsError::NoIdentity)));
    assert!(matches!(certificates.tls(false, true).client(), Err(TlsError::NoCa)));
    assert!(SessionTls::default().server().unwrap().is_none() && SessionTls::default().client().unwrap().is_none());
    let nowhere = SessionTls { ca: Some("/nowhere/ca.pem".into()), identity: None };
    assert!(nowhere.client().unwrap_err().to_string().contains("/nowhere/ca.pem"));
    let key = certificates.path("leaf.key");
    let swapped = SessionTls { ca: Some(key.clone().into()), identity: None };
    assert!(swapped.client().unwrap_err().to_string().contains(&key));
}
