//! Workers that tests play themselves, over real sockets.

use std::sync::Arc;

use hyper::{Request, header};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

use super::{upstream::Payload, worker::Worker};
use crate::cluster::{ModelKey, Role, WorkerId, tests::card};

/// Where a worker is to be, and that worker.
pub(super) async fn bound() -> (TcpListener, Arc<Worker>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let card = card(Role::Decode, ModelKey::of(b"model"), &listener.local_addr().unwrap().to_string());
    (listener, Worker::new(WorkerId(1), Arc::new(card)))
}

/// Something to ask.
pub(super) fn request() -> Request<Payload> {
    Request::builder().uri("/").header(header::HOST, "a").body(Payload::default()).unwrap()
}

/// Reads a request without a body. Returns whether one came.
pub(super) async fn is_asked(stream: &mut TcpStream) -> bool {
    let mut asked = Vec::new();
    while !asked.ends_with(b"\r\n\r\n") {
        if stream.read_buf(&mut asked).await.unwrap_or(0) == 0 {
            return false;
        }
    }
    true
}

/// Answers it.
pub(super) async fn say_ok(stream: &mut TcpStream) {
    stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await.unwrap();
}
