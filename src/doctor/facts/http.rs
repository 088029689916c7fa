//! Questions to HTTP servers, short ones with short answers.

use std::time::{Duration, SystemTime};

use chrono::{DateTime, Utc};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

/// How long the answer to a GET may take.
const TIME_MAX: Duration = Duration::from_secs(2);
/// Bytes of an answer that are looked at.
const BYTES_MAX: u64 = 16 << 10;

/// What a server answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Answer {
    pub(super) status: u16,
    /// By how many seconds its clock is ahead of ours, if it said the time: whole ones, as HTTP's are.
    pub(super) ahead_seconds: Option<i64>,
    pub(super) body: String,
}

/// Asks `host:port` for `path`.
pub(super) async fn get(address: &str, path: &str) -> Result<Answer, String> {
    ask(&format!("GET {path} HTTP/1.1\r\nHost: {address}"), address, TIME_MAX).await
}

/// Has `host:port` do something that may take so long. `headers` are lines.
pub(super) async fn post(address: &str, path: &str, headers: &str, time_max: Duration) -> Result<Answer, String> {
    let head = format!("POST {path} HTTP/1.1\r\nHost: {address}\r\nContent-Length: 0\r\n{headers}");
    ask(head.trim_end(), address, time_max).await
}

async fn ask(head: &str, address: &str, time_max: Duration) -> Result<Answer, String> {
    let asking = async {
        let mut stream = TcpStream::connect(address).await?;
        let request = format!("{head}\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut answer = Vec::new();
        stream.take(BYTES_MAX).read_to_end(&mut answer).await?;
        std::io::Result::Ok(String::from_utf8_lossy(&answer).into_owned())
    };
    let text = match timeout(time_max, asking).await {
        Ok(Ok(text)) => text,
        Ok(Err(error)) => return Err(error.to_string()),
        Err(_) => return Err(format!("no answer within {time_max:?}")),
    };
    read(&text, SystemTime::now().into()).ok_or_else(|| "what answers there does not speak HTTP".to_owned())
}

fn read(text: &str, now: DateTime<Utc>) -> Option<Answer> {
    let (head, body) = text.split_once("\r\n\r\n")?;
    let mut lines = head.lines();
    let status = lines.next()?.strip_prefix("HTTP/1.")?.split(' ').nth(1)?.parse().ok()?;
    let mut headers = lines.filter_map(|line| line.split_once(':'));
    let date = headers.find(|(name, _)| name.eq_ignore_ascii_case("date")).map(|(_, value)| value.trim());
    let date = date.and_then(|date| DateTime::parse_from_rfc2822(date).ok());
    let ahead_seconds = date.map(|date| date.timestamp() - now.timestamp());
    Some(Answer { status, ahead_seconds, body: body.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_has_a_status_and_perhaps_the_time() {
        let now = DateTime::from_timestamp(1_795_873_012, 0).unwrap();
        let text = "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\ndate: Sat, 28 Nov 2026 13:36:57 GMT\r\n\r\nok\n";
        assert_eq!(read(text, now), Some(Answer { status: 200, ahead_seconds: Some(5), body: "ok\n".into() }));
        let text = "HTTP/1.0 503 Service Unavailable\r\n\r\nDate: not a header\r\n";
        let body = "Date: not a header\r\n".into();
        assert_eq!(read(text, now), Some(Answer { status: 503, ahead_seconds: None, body }));
        assert_eq!(read("INFO {}\r\n", now), None);
    }
}
