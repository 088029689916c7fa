//! As much of an HTTP client as the load generator needs: one request a connection, the answer read as it arrives.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context, Result, bail};

/// Longest silence of a server.
const READ_TIMEOUT: Duration = Duration::from_secs(600);

/// Sends a GET and returns the body of a 200.
pub(crate) fn get(address: &str, path: &str) -> Result<String> {
    let mut text = String::new();
    send(address, &format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n"))?
        .read_to_string(&mut text)?;
    Ok(text)
}

/// Sends a POST of JSON and returns the body of a 200, as it arrives.
pub(crate) fn post(address: &str, path: &str, body: &str) -> Result<impl BufRead + use<>> {
    let length = body.len();
    let head = format!(
        "POST {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\nContent-Type: application/json\r\n\
         Content-Length: {length}\r\n\r\n"
    );
    send(address, &(head + body))
}

fn send(address: &str, request: &str) -> Result<BufReader<Body>> {
    let stream = TcpStream::connect(address).with_context(|| format!("connecting to {address}"))?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(READ_TIMEOUT))?;
    (&stream).write_all(request.as_bytes())?;
    let mut stream = BufReader::new(stream);
    let status = line(&mut stream)?;
    let mut chunked = false;
    loop {
        let header = line(&mut stream)?.to_ascii_lowercase();
        match header.as_str() {
            "" => break,
            "transfer-encoding: chunked" => chunked = true,
            _ => {}
        }
    }
    let mut body = BufReader::new(Body { stream, chunked, left: 0, ended: false });
    if status.split(' ').nth(1) != Some("200") {
        let mut text = String::new();
        body.read_to_string(&mut text)?;
        bail!("{address}: {status}: {text}");
    }
    Ok(body)
}

fn line(stream: &mut impl BufRead) -> io::Result<String> {
    let mut line = String::new();
    match stream.read_line(&mut line)? {
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        _ => Ok(line.trim_end().to_string()),
    }
}

/// The body, up to the end of the connection or the last chunk.
struct Body {
    stream: BufReader<TcpStream>,
    chunked: bool,
    /// Bytes left of the current chunk.
    left: usize,
    /// The last chunk was read.
    ended: bool,
}

impl Read for Body {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if !self.chunked {
            return self.stream.read(buffer);
        }
        if self.left == 0 && !self.ended {
            let size = line(&mut self.stream)?;
            self.left = usize::from_str_radix(&size, 16).map_err(io::Error::other)?;
            if self.left == 0 {
                self.ended = true;
            }
        }
        if self.ended {
            return Ok(0);
        }
        let wanted = self.left.min(buffer.len());
        let read = self.stream.read(&mut buffer[..wanted])?;
        self.left -= read;
        if self.left == 0 {
            line(&mut self.stream)?;
        }
        Ok(read)
    }
}
