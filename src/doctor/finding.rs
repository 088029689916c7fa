//! What the doctor says.

use std::fmt::Write as _;

use serde::Serialize;

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// As it should be.
    Ok,
    /// Worth knowing; nothing to be done.
    Note,
    /// Works, and could be better or may fail later.
    Warning,
    /// Does not work as it was asked for.
    Failure,
}

/// What a finding is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Area {
    /// This machine.
    Host,
    /// Its GPUs.
    Gpu,
    /// Its RDMA adapters.
    Rdma,
    /// etcd and NATS.
    Services,
    /// The workers that are registered.
    Cluster,
    /// Transfers that were made.
    Measured,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What it is about.
    pub area: Area,
    /// What was looked at: a word or two that stay the same from version to version.
    pub check: &'static str,
    /// How bad it is.
    pub level: Level,
    /// What was seen.
    pub seen: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

impl Finding {
    /// A finding without a remedy.
    pub(super) fn new(area: Area, check: &'static str, level: Level, seen: impl Into<String>) -> Self {
        Self { area, check, level, seen: seen.into(), remedy: None }
    }

    /// The same with what to do about it.
    pub(super) fn remedy(self, remedy: impl Into<String>) -> Self {
        Self { remedy: Some(remedy.into()), ..self }
    }
}

/// All findings, in the order in which they are read.
#[derive(Debug, Default)]
pub struct Report {
    findings: Vec<Finding>,
}

/// Columns that text is broken at.
const COLUMNS: usize = 110;
/// Before what was seen: the level, and a space.
const INDENT: usize = 10;

impl Report {
    /// Adds findings.
    pub(super) fn extend(&mut self, findings: impl IntoIterator<Item = Finding>) {
        self.findings.extend(findings);
    }

    /// Whether nothing failed. Warnings pass.
    pub fn passed(&self) -> bool {
        self.count(Level::Failure) == 0
    }

    fn count(&self, level: Level) -> usize {
        self.findings.iter().filter(|finding| finding.level == level).count()
    }

    /// One JSON object.
    pub fn json(&self) -> String {
        #[derive(Serialize)]
        struct Json<'a> {
            version: &'static str,
            passed: bool,
            findings: &'a [Finding],
        }
        let json = Json { version: env!("CARGO_PKG_VERSION"), passed: self.passed(), findings: &self.findings };
        // Strings and names of variants: there is nothing that could fail.
        serde_json::to_string_pretty(&json).unwrap_or_default() + "\n"
    }

    /// For people.
    pub fn text(&self) -> String {
        let lines: String = (0..self.findings.len()).map(|at| self.line(at)).collect();
        lines + &self.verdict()
    }

    /// The finding that was added last, for people. There is one.
    pub(super) fn last(&self) -> String {
        self.line(self.findings.len() - 1)
    }

    /// A finding for people, below its area's name if it is the first there.
    fn line(&self, at: usize) -> String {
        let mut text = String::new();
        let finding = &self.findings[at];
        if at == 0 || self.findings[at - 1].area != finding.area {
            let title = match finding.area {
                Area::Host => "This machine",
                Area::Gpu => "GPUs",
                Area::Rdma => "RDMA",
                Area::Services => "Services",
                Area::Cluster => "Cluster",
                Area::Measured => "Measured",
            };
            let _ = writeln!(text, "{}{title}", if at == 0 { "" } else { "\n" });
        }
        let level = match finding.level {
            Level::Ok => "ok",
            Level::Note => "note",
            Level::Warning => "WARNING",
            Level::Failure => "FAILURE",
        };
        wrap(&mut text, &format!("  {level:<8}"), &format!("{}: {}", finding.check, finding.seen));
        if let Some(remedy) = &finding.remedy {
            wrap(&mut text, &format!("{:INDENT$}→ ", ""), remedy);
        }
        text
    }

    /// The last line.
    pub(super) fn verdict(&self) -> String {
        let counted = |level, one: &str| match self.count(level) {
            1 => format!("1 {one}"),
            many => format!("{many} {one}s"),
        };
        let verdict = if self.passed() { "passed" } else { "failed" };
        let (failures, warnings) = (counted(Level::Failure, "failure"), counted(Level::Warning, "warning"));
        format!("\n{verdict}: {failures}, {warnings}\n")
    }
}

/// Adds `words` after `first`, broken into lines that are indented as far as `first` reaches.
fn wrap(text: &mut String, first: &str, words: &str) {
    let indent = first.chars().count();
    text.push_str(first);
    let mut column = indent;
    for word in words.split(' ') {
        let length = word.chars().count();
        if column > indent && column + 1 + length > COLUMNS {
            let _ = write!(text, "\n{:indent$}", "");
            column = indent;
        } else if column > indent {
            text.push(' ');
            column += 1;
        }
        text.push_str(word);
        column += length;
    }
    text.push('\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(levels: &[Level]) -> Report {
        let findings = levels.iter().map(|&level| Finding::new(Area::Rdma, "port", level, "as it is")).collect();
        Report { findings }
    }

    #[test]
    fn warnings_pass_and_failures_do_not() {
        assert!(report(&[Level::Ok, Level::Note, Level::Warning]).passed());
        assert!(!report(&[Level::Ok, Level::Failure]).passed());
    }

    #[test]
    fn text_names_the_level_what_was_seen_and_the_remedy() {
        let mut report = report(&[Level::Warning]);
        report.findings[0].remedy = Some("mend it".into());
        let expected = "RDMA\n  WARNING port: as it is\n          → mend it\n\npassed: 0 failures, 1 warning\n";
        assert_eq!(report.text(), expected);
    }

    #[test]
    fn long_lines_are_broken_between_words_and_indented() {
        let mut text = String::new();
        wrap(&mut text, "  ok      ", &["word"; 50].join(" "));
        assert!(text.lines().all(|line| line.chars().count() <= COLUMNS), "{text}");
        assert!(text.lines().skip(1).all(|line| line.starts_with("          word")), "{text}");
        assert_eq!(text.split_whitespace().count(), 51);
    }

    #[test]
    fn json_says_whether_it_passed_and_leaves_out_remedies_that_are_not_there() {
        let json: serde_json::Value = serde_json::from_str(&report(&[Level::Failure]).json()).unwrap();
        assert_eq!(json["passed"], false);
        let finding = serde_json::json!({
            "area": "rdma", "check": "port", "level": "failure", "seen": "as it is"
        });
        assert_eq!(json["findings"][0], finding);
    }
}
