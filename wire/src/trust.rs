//! Keys, and who trusts which: each side pins the other's, no authority in between.
//!
//! Both sides make a self-signed certificate. The destination knows the server's fingerprint from the ticket and
//! accepts no other. The server accepts any key in the handshake, which proves only that the peer holds it; the
//! session is bound to that key when the peer shows the ticket's secret, and from then on no other key is let in.

use std::fmt;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, ServerConfig,
    SignatureScheme,
};
use serde::{Deserialize, Serialize};

use crate::ledger::ALPN;

/// The name in both certificates. It proves nothing; the pinned key does.
pub const SERVER_NAME: &str = "lazyvm";

/// SHA-256 of a certificate's bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Fingerprint(pub [u8; 32]);

impl Fingerprint {
    /// Of this certificate.
    pub fn of(certificate: &CertificateDer<'_>) -> Self {
        Self(sha256(certificate))
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&data_encoding::HEXLOWER.encode(&self.0))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Fingerprint({self})")
    }
}

pub(crate) fn sha256(bytes: &[u8]) -> [u8; 32] {
    let mut out = [0; 32];
    out.copy_from_slice(ring::digest::digest(&ring::digest::SHA256, bytes).as_ref());
    out
}

/// A failure to make or use a key.
#[derive(Debug, thiserror::Error)]
pub enum TrustError {
    /// No key pair or certificate could be made.
    #[error("can't make a key pair")]
    Generate(#[source] rcgen::Error),
    /// The library refuses the key or the settings.
    #[error("can't set up TLS")]
    Tls(#[source] rustls::Error),
}

/// A side's own certificate and private key.
pub struct Identity {
    certificate: CertificateDer<'static>,
    key: PrivatePkcs8KeyDer<'static>,
}

impl Identity {
    /// A new key pair with a self-signed certificate.
    ///
    /// # Errors
    /// [`TrustError::Generate`].
    pub fn generate() -> Result<Self, TrustError> {
        let made = rcgen::generate_simple_self_signed(vec![SERVER_NAME.to_owned()])
            .map_err(TrustError::Generate)?;
        let key = PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
        Ok(Self {
            certificate: made.cert.into(),
            key,
        })
    }

    /// The identity that [`Identity::certificate_der`] and [`Identity::key_der`] gave earlier.
    pub fn from_der(certificate: Vec<u8>, key: Vec<u8>) -> Self {
        Self {
            certificate: certificate.into(),
            key: key.into(),
        }
    }

    /// The certificate's bytes.
    pub fn certificate_der(&self) -> &[u8] {
        &self.certificate
    }

    /// The private key's bytes (PKCS #8): a secret.
    pub fn key_der(&self) -> &[u8] {
        self.key.secret_pkcs8_der()
    }

    /// The fingerprint that the other side pins.
    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint::of(&self.certificate)
    }

    /// The server's side of TLS: this identity, and a client key of any kind, but one.
    ///
    /// # Errors
    /// [`TrustError::Tls`].
    pub fn server_config(&self) -> Result<ServerConfig, TrustError> {
        let provider = provider();
        let verifier = Arc::new(HeldKey(provider.signature_verification_algorithms));
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(TrustError::Tls)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(vec![self.certificate.clone()], self.private_key())
            .map_err(TrustError::Tls)?;
        config.alpn_protocols = vec![ALPN.to_vec()];
        // No session resumption and no early data: each connection proves both keys.
        config.send_tls13_tickets = 0;
        Ok(config)
    }

    /// The destination's side of TLS: this identity, and one server, no other.
    ///
    /// # Errors
    /// [`TrustError::Tls`].
    pub fn client_config(&self, server: Fingerprint) -> Result<ClientConfig, TrustError> {
        let provider = provider();
        let algorithms = provider.signature_verification_algorithms;
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(TrustError::Tls)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(PinnedKey { server, algorithms }))
            .with_client_auth_cert(vec![self.certificate.clone()], self.private_key())
            .map_err(TrustError::Tls)?;
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.resumption = rustls::client::Resumption::disabled();
        Ok(config)
    }

    fn private_key(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::Pkcs8(self.key.clone_key())
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// Accepts the one certificate whose fingerprint the ticket names.
#[derive(Debug)]
struct PinnedKey {
    server: Fingerprint,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for PinnedKey {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if Fingerprint::of(end_entity) == self.server {
            Ok(ServerCertVerified::assertion())
        } else {
            Err(CertificateError::ApplicationVerificationFailure.into())
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, cert, dss, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// Accepts any certificate whose private key the peer holds.
#[derive(Debug)]
struct HeldKey(WebPkiSupportedAlgorithms);

impl ClientCertVerifier for HeldKey {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, cert, dss, &self.0)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.0)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_schemes()
    }
}
