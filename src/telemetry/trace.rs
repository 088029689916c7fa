use std::{fmt, str::FromStr};

/// Which trace something belongs to, and which part of it: W3C trace context, as in the header `traceparent`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceContext {
    trace: u128,
    parent: u64,
    flags: u8,
}

/// A text that is no `traceparent`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a W3C trace context: expected 00-TRACE-PARENT-FLAGS in lower-case hexadecimal digits")]
pub struct BadTraceContext;

impl TraceContext {
    /// Name of the HTTP header.
    pub const HEADER: &str = "traceparent";
}

impl FromStr for TraceContext {
    type Err = BadTraceContext;

    /// Of a version after the first, the fields that the first has.
    fn from_str(text: &str) -> Result<Self, BadTraceContext> {
        let mut fields = text.split('-');
        let mut field = |digits: usize| {
            let field = fields.next().filter(|field| field.len() == digits).ok_or(BadTraceContext)?;
            let lower = field.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
            let value = lower.then(|| u128::from_str_radix(field, 16).ok()).flatten();
            value.ok_or(BadTraceContext)
        };
        // None of them is larger than its digits allow.
        let (version, trace, parent, flags) = (field(2)?, field(32)?, field(16)? as u64, field(2)? as u8);
        let more = fields.next().is_some();
        if version == 0xff || version == 0 && more || trace == 0 || parent == 0 {
            return Err(BadTraceContext);
        }
        Ok(Self { trace, parent, flags })
    }
}

impl fmt::Display for TraceContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00-{:032x}-{:016x}-{:02x}", self.trace, self.parent, self.flags)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    #[test]
    fn a_context_is_written_as_it_is_read() {
        let context: TraceContext = TEXT.parse().unwrap();
        assert_eq!(context.to_string(), TEXT);
    }

    #[test]
    fn what_a_later_version_adds_is_left_out() {
        let later = format!("01{}-what-ever", &TEXT[2..]);
        assert_eq!(later.parse::<TraceContext>(), TEXT.parse());
    }

    #[test]
    fn what_is_no_context_is_refused() {
        let zero = |from: usize, to: usize| format!("{}{}{}", &TEXT[..from], "0".repeat(to - from), &TEXT[to..]);
        let more = format!("{TEXT}-00");
        for bad in ["", "00", &TEXT[..54], &more, &TEXT.to_uppercase(), &zero(3, 35), &zero(36, 52)] {
            assert_eq!(bad.parse::<TraceContext>(), Err(BadTraceContext), "{bad}");
        }
        assert!(format!("ff{}", &TEXT[2..]).parse::<TraceContext>().is_err());
        assert!(TEXT.replace('b', "+").parse::<TraceContext>().is_err());
    }
}
