use std::{path::PathBuf, process::Command};

use tempfile::TempDir;

/// An authority, and a certificate for 127.0.0.1 by it, for servers and clients: files in PEM.
pub(crate) struct Certificates(TempDir);

impl Certificates {
    pub(crate) fn new() -> Self {
        let this = Self(tempfile::tempdir().unwrap());
        this.make("ca", &[]);
        let extensions =
            ["basicConstraints=CA:FALSE", "subjectAltName=IP:127.0.0.1", "extendedKeyUsage=serverAuth,clientAuth"];
        let mut by_authority = vec!["-CA".to_owned(), this.path("ca.pem"), "-CAkey".to_owned(), this.path("ca.key")];
        by_authority.extend(extensions.iter().flat_map(|extension| ["-addext".to_owned(), extension.to_string()]));
        this.make("leaf", &by_authority);
        this
    }

    fn make(&self, name: &str, arguments: &[String]) {
        let mut command = Command::new("openssl");
        command.args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "30"]);
        command.args(["-subj", &format!("/CN={name}"), "-keyout", &self.path(&format!("{name}.key"))]);
        command.args(["-out", &self.path(&format!("{name}.pem"))]).args(arguments);
        let output = command.output().expect("openssl runs (make setup)");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    /// Of `ca.pem`, `leaf.pem` or `leaf.key`.
    pub(crate) fn path(&self, name: &str) -> String {
        self.0.path().join(name).to_str().unwrap().to_owned()
    }

    pub(crate) fn ca(&self) -> Option<PathBuf> {
        Some(self.path("ca.pem").into())
    }

    pub(crate) fn identity(&self) -> Option<(PathBuf, PathBuf)> {
        Some((self.path("leaf.pem").into(), self.path("leaf.key").into()))
    }
}
