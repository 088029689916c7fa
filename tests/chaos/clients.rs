//! Clients: what they ask, how they read, and whether they got what they should have.

use std::{
    collections::BTreeMap,
    fmt,
    io::{self, BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpStream},
    sync::Mutex,
    thread,
    time::Duration,
};

use serde_json::{Value, json};

use crate::{cell::Model, clock::Clock, program::Server, random::Random};

/// When a client takes an answer for hanging. One that moves from worker to worker on a busy machine takes its time.
const DEADLINE: Duration = Duration::from_secs(240);
/// Between two looks at the clock.
const LOOK: Duration = Duration::from_millis(100);
const QUESTIONS: usize = 72;
/// In a storm, one answer, and another of every so many, may be given up because three workers in a row were lost under
/// it before it had got any further: what kills whoever takes it must not meet everybody. Here it is not the request's
/// fault, but who is to know.
const ANSWERS_PER_GIVEN_UP: usize = 100;
/// Wrong answers that are told in full.
const EXAMPLES: usize = 5;

pub(crate) struct Clients {
    questions: Vec<Question>,
    seed: u64,
    clock: Clock,
}

struct Question {
    body: Value,
    streams: bool,
    /// What a process that is alone and at peace answers.
    expected: Got,
}

/// What was read of an answer.
#[derive(Debug, Default, Clone, PartialEq)]
struct Got {
    text: String,
    /// A token each, with its log-probability, its alternatives and where it begins.
    tokens: Vec<Value>,
    finish: Value,
}

impl Got {
    fn take(&mut self, choice: &Value) {
        self.text += choice["text"].as_str().unwrap_or_default();
        let logprobs = &choice["logprobs"];
        for (at, token) in logprobs["tokens"].as_array().into_iter().flatten().enumerate() {
            let field = |name: &str| logprobs[name][at].clone();
            self.tokens.push(json!([token, field("token_logprobs"), field("top_logprobs"), field("text_offset")]));
        }
        if !choice["finish_reason"].is_null() {
            self.finish = choice["finish_reason"].clone();
        }
    }

    fn begins(&self, whole: &Self) -> bool {
        whole.text.starts_with(&self.text) && whole.tokens.starts_with(&self.tokens)
    }
}

enum Outcome {
    Whole,
    /// The client hung up.
    Left,
    /// Not 200.
    Refused(u16, String),
    /// 200, and then an error or the end of the connection.
    Broken(String),
}

/// How a client's connection ended, if not as it should.
#[derive(Debug)]
enum Trouble {
    Late,
    Io(io::Error),
}

impl From<io::Error> for Trouble {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Self::Late,
            _ => Self::Io(error),
        }
    }
}

/// A connection that is read from until a deadline and no longer.
struct Timed {
    stream: TcpStream,
    clock: Clock,
    until: Duration,
}

impl Read for Timed {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(Some(LOOK))?;
        loop {
            match self.stream.read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && self.clock.now() < self.until => {}
                done => return done,
            }
        }
    }
}

/// When a client hangs up.
#[derive(Clone, Copy)]
enum Patience {
    Endless,
    /// After so many events of a stream.
    Events(u64),
    /// After so long.
    Time(Duration),
}

/// An answer as it comes in.
struct Reply {
    reader: BufReader<Timed>,
    status: u16,
    chunked: bool,
    length: usize,
}

impl Reply {
    fn ask(address: SocketAddr, body: &Value, clock: &Clock, time: Duration) -> Result<Self, Trouble> {
        let body = body.to_string();
        let mut stream = TcpStream::connect(address)?;
        let head = format!(
            "POST /v1/completions HTTP/1.1\r\nHost: engine\r\nConnection: close\r\n\
             Content-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all((head + &body).as_bytes())?;
        let timed = Timed { stream, clock: clock.clone(), until: clock.now() + time };
        let mut reply = Self { reader: BufReader::new(timed), status: 0, chunked: false, length: 0 };
        let first = reply.line()?;
        reply.status = first.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
        loop {
            let line = reply.line()?.to_lowercase();
            match line.split_once(": ") {
                Some(("transfer-encoding", "chunked")) => reply.chunked = true,
                Some(("content-length", length)) => reply.length = length.parse().unwrap_or(0),
                Some(_) => {}
                None => return Ok(reply),
            }
        }
    }

    fn line(&mut self) -> Result<String, Trouble> {
        let mut line = String::new();
        self.reader.read_line(&mut line)?;
        match line.strip_suffix("\r\n") {
            Some(line) => Ok(line.to_owned()),
            None => Err(Trouble::Io(io::ErrorKind::UnexpectedEof.into())),
        }
    }

    /// The next piece of the body; `None` at its end.
    fn piece(&mut self) -> Result<Option<Vec<u8>>, Trouble> {
        let length = if self.chunked {
            usize::from_str_radix(&self.line()?, 16).map_err(|error| Trouble::Io(io::Error::other(error)))?
        } else {
            std::mem::take(&mut self.length)
        };
        let mut piece = vec![0; length];
        self.reader.read_exact(&mut piece)?;
        if self.chunked {
            self.line()?;
        }
        Ok((length > 0).then_some(piece))
    }

    fn rest(&mut self) -> Result<String, Trouble> {
        let mut body = Vec::new();
        while let Some(piece) = self.piece()? {
            body.extend(piece);
        }
        Ok(String::from_utf8_lossy(&body).into_owned())
    }
}

impl Question {
    fn new(model: &Model, number: usize) -> Self {
        let mut random = Random::of(number as u64, 7);
        let length = [8, 40, 100, 200, 400, 800, 1500][number % 7] + random.below(60) as usize;
        let streams = !number.is_multiple_of(4);
        let mut prompt = model.prompt(number, length);
        // Some begin as others do, up to where no page ends.
        if number % 5 == 4 {
            let other = model.prompt(number - 1, 90);
            let common = other.len().min(prompt.len() - 1);
            prompt[..common].copy_from_slice(&other[..common]);
        }
        let body = json!({
            "prompt": prompt, "max_tokens": 4 + random.below(150), "ignore_eos": true, "logprobs": 2, "seed": number,
            "temperature": if number % 6 == 5 { 0.8 } else { 0.0 }, "stream": streams,
        });
        Self { body, streams, expected: Got::default() }
    }

    /// Asks and compares. An error is an answer that is wrong.
    fn ask(&self, address: SocketAddr, patience: Patience, clock: &Clock) -> Result<Result<Outcome, Trouble>, String> {
        let mut got = Got::default();
        let outcome = self.read(address, patience, clock, &mut got);
        let right = match &outcome {
            Ok(Outcome::Whole) => got == self.expected,
            _ => got.begins(&self.expected),
        };
        if right { Ok(outcome) } else { Err(format!("{got:?}\ninstead of\n{:?}\nto\n{}", self.expected, self.body)) }
    }

    fn read(&self, address: SocketAddr, patience: Patience, clock: &Clock, got: &mut Got) -> Result<Outcome, Trouble> {
        let (mut events, time) = match patience {
            Patience::Endless => (u64::MAX, DEADLINE),
            Patience::Events(events) => (events, DEADLINE),
            Patience::Time(time) => (u64::MAX, time),
        };
        let mut reply = match Reply::ask(address, &self.body, clock, time) {
            Err(Trouble::Late) if matches!(patience, Patience::Time(_)) => return Ok(Outcome::Left),
            reply => reply?,
        };
        if reply.status != 200 {
            return Ok(Outcome::Refused(reply.status, reply.rest()?));
        }
        if !self.streams {
            let whole: Value = serde_json::from_str(&reply.rest()?).map_err(|error| Trouble::Io(error.into()))?;
            got.take(&whole["choices"][0]);
            return Ok(Outcome::Whole);
        }
        let mut text = String::new();
        loop {
            while let Some(end) = text.find("\n\n") {
                let event: String = text.drain(..end + 2).collect();
                let Some(data) = event.trim().strip_prefix("data: ") else { continue };
                if data == "[DONE]" {
                    return Ok(Outcome::Whole);
                }
                let event: Value = serde_json::from_str(data).map_err(|error| Trouble::Io(error.into()))?;
                if !event["error"].is_null() {
                    return Ok(Outcome::Broken(data.to_owned()));
                }
                got.take(&event["choices"][0]);
                if events == 0 {
                    return Ok(Outcome::Left);
                }
                events -= 1;
            }
            match reply.piece() {
                Ok(Some(piece)) => {
                    text += std::str::from_utf8(&piece).map_err(|error| Trouble::Io(io::Error::other(error)))?
                }
                Ok(None) => return Ok(Outcome::Broken("the end without [DONE]".to_owned())),
                Err(Trouble::Late) if matches!(patience, Patience::Time(_)) => return Ok(Outcome::Left),
                Err(trouble) => return Err(trouble),
            }
        }
    }
}

impl Clients {
    /// With the right answers, which a process by itself gives.
    pub(crate) fn new(model: &Model, seed: u64, clock: Clock) -> Self {
        let alone = model.alone();
        let mut questions: Vec<_> = (0..QUESTIONS).map(|number| Question::new(model, number)).collect();
        for question in &mut questions {
            let mut got = Got::default();
            let outcome = question.read(alone.address, Patience::Endless, &clock, &mut got);
            assert!(matches!(outcome, Ok(Outcome::Whole)), "{}", alone.log());
            question.expected = got;
        }
        Self { questions, seed, clock }
    }

    /// Each question once, a few at a time.
    pub(crate) fn everything_once(&self, frontend: &Server) -> Tally {
        let (tally, next) = (Mutex::new(Tally::default()), Mutex::new(self.questions.iter()));
        thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    loop {
                        let Some(question) = next.lock().unwrap().next() else { return };
                        self.ask(question, frontend.address, Patience::Endless, &tally);
                    }
                });
            }
        });
        tally.into_inner().unwrap()
    }

    /// So many clients ask one question after the other until it is time, and then wait for their last answers.
    pub(crate) fn storm(&self, frontend: &Server, clients: usize, until: Duration) -> Tally {
        let (tally, address) = (Mutex::new(Tally::default()), frontend.address);
        thread::scope(|scope| {
            for client in 0..clients {
                let tally = &tally;
                scope.spawn(move || {
                    let mut random = Random::of(self.seed, 1000 + client as u64);
                    while self.clock.now() < until {
                        let question = &self.questions[random.below(self.questions.len() as u64) as usize];
                        let patience = match random.below(8) {
                            0 if question.streams => Patience::Events(random.below(20)),
                            0 | 1 => Patience::Time(random.within(2, 400)),
                            _ => Patience::Endless,
                        };
                        self.ask(question, address, patience, tally);
                    }
                });
            }
        });
        tally.into_inner().unwrap()
    }

    fn ask(&self, question: &Question, address: SocketAddr, patience: Patience, tally: &Mutex<Tally>) {
        let started = self.clock.now();
        let outcome = question.ask(address, patience, &self.clock);
        let mut tally = tally.lock().unwrap();
        tally.slowest = tally.slowest.max(self.clock.now() - started);
        let excused = self.clock.excuses();
        let mut trouble = |what: String| match excused {
            true => tally.excused += 1,
            false if what.contains("\"workers_lost\"") => tally.given_up += 1,
            false => *tally.trouble.entry(format!("{what} (asked at {started:.1?})")).or_default() += 1,
        };
        match outcome {
            Ok(Ok(Outcome::Whole)) => tally.whole += 1,
            Ok(Ok(Outcome::Left)) => tally.left += 1,
            Ok(Ok(Outcome::Refused(status, body))) => {
                trouble(format!("{status}: {body}"));
                drop(tally);
                // As Retry-After says, more or less.
                thread::sleep(Duration::from_millis(300));
            }
            Ok(Ok(Outcome::Broken(how))) => trouble(format!("broken off: {how}")),
            Ok(Err(Trouble::Io(error))) => trouble(format!("broken off: {error}")),
            Ok(Err(Trouble::Late)) if excused => tally.excused += 1,
            Ok(Err(Trouble::Late)) => tally.late.push(question.body.to_string()),
            Err(wrong) if tally.wrong.len() < EXAMPLES => tally.wrong.push(wrong),
            Err(_) => {}
        }
    }
}

/// What clients got.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    /// Whole and right.
    pub(crate) whole: usize,
    /// Hung up on; what had come was right.
    pub(crate) left: usize,
    /// Errors, and answers that broke off, which none must while a decode worker is there.
    pub(crate) trouble: BTreeMap<String, usize>,
    /// Whose workers were killed or stopped three times in a row.
    given_up: usize,
    /// The same, when all of this was stopped and had just gone on.
    excused: usize,
    pub(crate) wrong: Vec<String>,
    /// Not there at the deadline.
    pub(crate) late: Vec<String>,
    slowest: Duration,
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { whole, left, trouble, given_up, excused, wrong, late, slowest } = self;
        let troubled: usize = trouble.values().sum();
        write!(
            f,
            "{whole} answers whole and right, {left} hung up on, {given_up} given up after three lost workers, \
             {troubled} other errors ({excused} excused), {} wrong, {} late; the slowest took {slowest:?}",
            wrong.len(),
            late.len()
        )?;
        trouble.iter().try_for_each(|(what, count)| write!(f, "\n  {count} × {what}"))
    }
}

impl Tally {
    /// Panics unless all was well while nobody was harmed.
    pub(crate) fn check_quiet(&self) {
        self.check(0);
    }

    /// Panics unless all was as well as it can be in a storm.
    pub(crate) fn check_storm(&self) {
        self.check(1 + self.whole / ANSWERS_PER_GIVEN_UP);
    }

    fn check(&self, given_up_max: usize) {
        assert!(self.wrong.is_empty(), "wrong answers: {}", self.wrong.join("\n\n"));
        assert!(self.late.is_empty(), "answers that hang: {}", self.late.join("\n"));
        assert!(self.trouble.is_empty(), "a decode worker was there all the time, and yet: {self}");
        assert!(self.given_up <= given_up_max, "too many given up: {self}");
        assert!(self.whole > 0, "nobody was answered");
    }
}
