use std::{io::Write, net::SocketAddr};

/// A worker or frontend that has begun to serve.
#[derive(Debug)]
pub struct Ready {
    /// Where its HTTP server listens.
    pub address: SocketAddr,
    /// What to tell who started it.
    pub text: String,
}

impl Ready {
    /// Says so on standard output.
    pub fn print(self) {
        // Nobody may be reading; the work is done all the same.
        let mut out = std::io::stdout();
        let _ = out.write_all(self.text.as_bytes()).and_then(|()| out.flush());
    }
}
