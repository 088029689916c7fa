use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use serde_json::Value;

/// An answer, whole.
#[derive(Debug)]
pub(crate) struct Response {
    pub(crate) status: u16,
    headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
}

impl Response {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    /// Whether it says when to come back.
    pub(crate) fn says_when_to_come_back(&self) -> bool {
        matches!(self.header("retry-after"), Some("1" | "2" | "3"))
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8(self.body.clone()).expect("answers are UTF-8")
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error} in {}", self.text()))
    }

    /// Status, `param` and message of an OpenAI error.
    pub(crate) fn error(&self) -> (u16, Option<String>, String) {
        let error = &self.json()["error"];
        assert!(error["type"].is_string(), "no OpenAI error: {}", self.text());
        let text = |field: &str| error[field].as_str().map(str::to_owned);
        (self.status, text("param"), text("message").expect("an error has a message"))
    }
}

fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).expect("the server accepts");
    stream.set_nodelay(true).unwrap();
    // A server that hangs fails the test rather than hanging it.
    stream.set_read_timeout(Some(Duration::from_secs(120))).unwrap();
    stream
}

fn head(method: &str, path: &str, headers: &[(&str, &str)], length: usize) -> String {
    let mut head =
        format!("{method} {path} HTTP/1.1\r\nHost: engine\r\nConnection: close\r\nContent-Length: {length}\r\n");
    for (name, value) in headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head + "\r\n"
}

/// One request on a connection of its own.
pub(crate) fn request(
    address: SocketAddr,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &[u8],
) -> Response {
    let mut stream = connect(address);
    stream.write_all(head(method, path, headers, body.len()).as_bytes()).unwrap();
    stream.write_all(body).unwrap();
    read_response(BufReader::new(stream))
}

/// Posts bytes as they are, with JSON's content type.
pub(crate) fn post_bytes(address: SocketAddr, path: &str, body: &[u8]) -> Response {
    request(address, "POST", path, &[("Content-Type", "application/json")], body)
}

fn read_head(reader: &mut impl BufRead) -> Response {
    let mut line = String::new();
    reader.read_line(&mut line).expect("the server answers");
    let status = line.split(' ').nth(1).and_then(|status| status.parse().ok());
    let status = status.unwrap_or_else(|| panic!("no status in {line:?}"));
    let mut headers = Vec::new();
    loop {
        line.clear();
        reader.read_line(&mut line).unwrap();
        match line.trim_end().split_once(": ") {
            Some((name, value)) => headers.push((name.to_owned(), value.to_owned())),
            None => return Response { status, headers, body: Vec::new() },
        }
    }
}

fn read_response(mut reader: impl BufRead) -> Response {
    let mut response = read_head(&mut reader);
    if response.header("transfer-encoding") == Some("chunked") {
        while let Some(chunk) = read_chunk(&mut reader) {
            response.body.extend(chunk);
        }
    } else {
        let length = response.header("content-length").map_or(0, |length| length.parse().unwrap());
        response.body.resize(length, 0);
        reader.read_exact(&mut response.body).unwrap();
    }
    response
}

/// The next chunk; `None` at the end. A body that breaks off fails the test.
fn read_chunk(reader: &mut impl BufRead) -> Option<Vec<u8>> {
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    let length = usize::from_str_radix(line.trim(), 16).unwrap_or_else(|_| panic!("the body breaks off at {line:?}"));
    let mut chunk = vec![0; length + 2];
    reader.read_exact(&mut chunk).unwrap();
    chunk.truncate(length);
    (length > 0).then_some(chunk)
}

/// Server-sent events of an answer. Dropping it closes the connection.
pub(crate) struct Events {
    reader: BufReader<TcpStream>,
    text: String,
    pending: Vec<u8>,
    /// Events before `[DONE]`, so far.
    pub(crate) seen: Vec<Value>,
}

impl Events {
    pub(crate) fn open(address: SocketAddr, path: &str, body: &Value) -> Self {
        let body = body.to_string();
        let mut stream = connect(address);
        let json = [("Content-Type", "application/json")];
        stream.write_all(head("POST", path, &json, body.len()).as_bytes()).unwrap();
        stream.write_all(body.as_bytes()).unwrap();
        let mut reader = BufReader::new(stream);
        let mut response = read_head(&mut reader);
        if response.status != 200 {
            let length = response.header("content-length").map_or(0, |length| length.parse().unwrap());
            response.body.resize(length, 0);
            reader.read_exact(&mut response.body).unwrap();
            panic!("{}: {}", response.status, response.text());
        }
        assert_eq!(response.header("content-type"), Some("text/event-stream; charset=utf-8"));
        Self { reader, text: String::new(), pending: Vec::new(), seen: Vec::new() }
    }

    /// The rest of the events, to `[DONE]` and the end of the body.
    pub(crate) fn finish(mut self) -> Vec<Value> {
        while self.next().is_some() {}
        self.seen
    }
}

impl Iterator for Events {
    type Item = Value;

    /// The next event; `None` after `[DONE]`, which has to be the last.
    fn next(&mut self) -> Option<Value> {
        loop {
            // Signs of life are empty lines, which begin no event.
            self.text.drain(..self.text.len() - self.text.trim_start_matches('\n').len());
            if let Some(end) = self.text.find("\n\n") {
                let event: String = self.text.drain(..end + 2).collect();
                let data = event.trim_end().strip_prefix("data: ").unwrap_or_else(|| panic!("no event: {event:?}"));
                if data == "[DONE]" {
                    assert!(self.text.is_empty() && read_chunk(&mut self.reader).is_none(), "more after [DONE]");
                    return None;
                }
                let value: Value = serde_json::from_str(data).expect("events are JSON");
                self.seen.push(value.clone());
                return Some(value);
            }
            let chunk = read_chunk(&mut self.reader).expect("the stream ends with [DONE]");
            self.pending.extend(chunk);
            // Each piece on the wire may end anywhere; each event is whole UTF-8 all the same.
            if let Ok(text) = std::str::from_utf8(&self.pending) {
                self.text.push_str(text);
                self.pending.clear();
            }
        }
    }
}
