//! Real TLS handshakes, in memory: who lets in whom.

use std::sync::Arc;

use lazyvm_wire::ledger::ALPN;
use lazyvm_wire::trust::{Fingerprint, Identity, SERVER_NAME, TrustError};
use rustls::client::ResolvesClientCert;
use rustls::crypto::ring::{default_provider, sign::any_supported_type};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{
    CertificateError, ClientConfig, ClientConnection, ConnectionCommon, Error, HandshakeKind,
    ProtocolVersion, RootCertStore, ServerConfig, ServerConnection, SupportedProtocolVersion,
};

fn identity() -> Identity {
    Identity::generate().unwrap()
}

fn certificate(identity: &Identity) -> CertificateDer<'static> {
    CertificateDer::from(identity.certificate_der().to_vec())
}

/// `shown`'s certificate with `held`'s key: what a thief of a certificate has.
fn stolen(shown: &Identity, held: &Identity) -> Arc<SingleCertAndKey> {
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(held.key_der().to_vec()));
    let certified = CertifiedKey::new(vec![certificate(shown)], any_supported_type(&key).unwrap());
    Arc::new(SingleCertAndKey::from(certified))
}

/// The error of the client and of the server, where there is one.
type Failure = Box<(Option<Error>, Option<Error>)>;

/// Carries each side's bytes to the other until both are done or one gives up.
fn handshake(
    client: ClientConfig,
    server: ServerConfig,
) -> Result<(ClientConnection, ServerConnection), Failure> {
    connect(&Arc::new(client), &Arc::new(server))
}

fn connect(
    client: &Arc<ClientConfig>,
    server: &Arc<ServerConfig>,
) -> Result<(ClientConnection, ServerConnection), Failure> {
    let name = SERVER_NAME.try_into().unwrap();
    let mut client = ClientConnection::new(Arc::clone(client), name).unwrap();
    let mut server = ServerConnection::new(Arc::clone(server)).unwrap();
    while client.is_handshaking() || server.is_handshaking() {
        let at_server = carry(&mut client, &mut server).err();
        let at_client = carry(&mut server, &mut client).err();
        if at_server.is_some() || at_client.is_some() {
            return Err(Box::new((at_client, at_server)));
        }
    }
    // What a server sends after the handshake: tickets to resume the session, if it gives any.
    carry(&mut server, &mut client).unwrap();
    Ok((client, server))
}

fn carry<A, B>(from: &mut ConnectionCommon<A>, to: &mut ConnectionCommon<B>) -> Result<(), Error> {
    let mut bytes = Vec::new();
    while from.wants_write() {
        from.write_tls(&mut bytes).unwrap();
    }
    let mut unread = bytes.as_slice();
    while !unread.is_empty() {
        to.read_tls(&mut unread).unwrap();
        to.process_new_packets()?;
    }
    Ok(())
}

#[test]
fn the_pinned_key_is_accepted_and_each_side_sees_the_others() {
    let (source, destination) = (identity(), identity());
    let client = destination.client_config(source.fingerprint()).unwrap();
    let (client, server) = handshake(client, source.server_config().unwrap()).unwrap();

    let seen =
        |certificates: Option<&[CertificateDer<'_>]>| Fingerprint::of(&certificates.unwrap()[0]);
    assert_eq!(seen(server.peer_certificates()), destination.fingerprint());
    assert_eq!(seen(client.peer_certificates()), source.fingerprint());
    assert_ne!(source.fingerprint(), destination.fingerprint());
    assert_eq!(client.protocol_version(), Some(ProtocolVersion::TLSv1_3));
    assert_eq!(server.alpn_protocol(), Some(ALPN));
}

#[test]
fn another_servers_key_is_refused() {
    let (expected, found, destination) = (identity(), identity(), identity());
    let client = destination.client_config(expected.fingerprint()).unwrap();
    let (at_client, _) = *handshake(client, found.server_config().unwrap()).unwrap_err();
    assert_eq!(
        at_client,
        Some(CertificateError::ApplicationVerificationFailure.into())
    );
}

#[test]
fn the_pinned_certificate_without_its_key_is_refused() {
    let (source, thief, destination) = (identity(), identity(), identity());
    let server = plain_server(&source, &rustls::version::TLS13, &thief);
    let client = destination.client_config(source.fingerprint()).unwrap();
    let (at_client, _) = *handshake(client, server).unwrap_err();
    assert_eq!(at_client, Some(CertificateError::BadSignature.into()));
}

/// A server of another make, which shows `source`'s certificate and has `held`'s key.
fn plain_server(
    source: &Identity,
    version: &'static SupportedProtocolVersion,
    held: &Identity,
) -> ServerConfig {
    let mut server = ServerConfig::builder_with_provider(Arc::new(default_provider()))
        .with_protocol_versions(&[version])
        .unwrap()
        .with_no_client_auth()
        .with_cert_resolver(stolen(source, held));
    server.alpn_protocols = vec![ALPN.to_vec()];
    server
}

#[test]
fn a_destinations_certificate_without_its_key_is_refused() {
    let (source, destination, thief) = (identity(), identity(), identity());
    let client = plain_client(
        &source,
        &rustls::version::TLS13,
        stolen(&destination, &thief),
    );
    let (_, at_server) = *handshake(client, source.server_config().unwrap()).unwrap_err();
    assert_eq!(at_server, Some(CertificateError::BadSignature.into()));
}

#[test]
fn a_destination_without_a_key_is_refused() {
    let source = identity();
    let client = plain_client(&source, &rustls::version::TLS13, Arc::new(NoCertificate));
    let (_, at_server) = *handshake(client, source.server_config().unwrap()).unwrap_err();
    assert_eq!(at_server, Some(Error::NoCertificatesPresented));
}

#[derive(Debug)]
struct NoCertificate;

impl ResolvesClientCert for NoCertificate {
    fn resolve(
        &self,
        _root_hint_subjects: &[&[u8]],
        _sigschemes: &[rustls::SignatureScheme],
    ) -> Option<Arc<CertifiedKey>> {
        None
    }

    fn has_certs(&self) -> bool {
        false
    }
}

/// A client of another make, which trusts `source`'s certificate the usual way.
fn plain_client(
    source: &Identity,
    version: &'static SupportedProtocolVersion,
    certificates: Arc<dyn ResolvesClientCert>,
) -> ClientConfig {
    let mut roots = RootCertStore::empty();
    roots.add(certificate(source)).unwrap();
    let mut client = ClientConfig::builder_with_provider(Arc::new(default_provider()))
        .with_protocol_versions(&[version])
        .unwrap()
        .with_root_certificates(roots)
        .with_client_cert_resolver(certificates);
    client.alpn_protocols = vec![ALPN.to_vec()];
    client
}

#[test]
fn no_side_speaks_tls_1_2() {
    let (source, destination) = (identity(), identity());
    let certificates = stolen(&destination, &destination);
    let old_client = plain_client(&source, &rustls::version::TLS12, certificates.clone());
    let (_, at_server) = *handshake(old_client, source.server_config().unwrap()).unwrap_err();
    assert!(
        matches!(at_server, Some(Error::PeerIncompatible(_))),
        "{at_server:?}"
    );

    let old_server = plain_server(&source, &rustls::version::TLS12, &source);
    let client = destination.client_config(source.fingerprint()).unwrap();
    let (_, at_server) = *handshake(client, old_server).unwrap_err();
    assert!(
        matches!(at_server, Some(Error::PeerIncompatible(_))),
        "{at_server:?}"
    );
}

#[test]
fn another_generation_of_the_protocol_is_refused() {
    let (source, destination) = (identity(), identity());
    let mut client = destination.client_config(source.fingerprint()).unwrap();
    client.alpn_protocols = vec![b"lazyvm/0".to_vec()];
    let (_, at_server) = *handshake(client, source.server_config().unwrap()).unwrap_err();
    assert_eq!(at_server, Some(Error::NoApplicationProtocol));
}

#[test]
fn each_connection_proves_both_keys_anew() {
    let (source, destination) = (identity(), identity());
    let client = destination.client_config(source.fingerprint()).unwrap();
    let server = source.server_config().unwrap();
    let certificates = stolen(&destination, &destination);
    let other_client = plain_client(&source, &rustls::version::TLS13, certificates);
    let other_server = plain_server(&source, &rustls::version::TLS13, &source);
    assert_eq!(
        second_handshake(other_client.clone(), other_server.clone()),
        HandshakeKind::Resumed,
        "rustls on its own resumes, else this test shows nothing"
    );
    // Either side alone sees to it.
    assert_eq!(second_handshake(client, other_server), HandshakeKind::Full);
    assert_eq!(second_handshake(other_client, server), HandshakeKind::Full);
}

fn second_handshake(client: ClientConfig, server: ServerConfig) -> HandshakeKind {
    let (client, server) = (Arc::new(client), Arc::new(server));
    connect(&client, &server).unwrap();
    let (client, _) = connect(&client, &server).unwrap();
    client.handshake_kind().unwrap()
}

#[test]
fn a_stored_identity_is_the_same() {
    let (source, destination) = (identity(), identity());
    let stored = Identity::from_der(source.certificate_der().to_vec(), source.key_der().to_vec());
    assert_eq!(stored.fingerprint(), source.fingerprint());
    let client = destination.client_config(source.fingerprint()).unwrap();
    handshake(client, stored.server_config().unwrap()).unwrap();
}

#[test]
fn a_stored_identity_that_is_damaged_is_an_error() {
    let source = identity();
    let certificate = source.certificate_der().to_vec();
    let damaged = [
        Identity::from_der(certificate.clone(), b"no key".to_vec()),
        Identity::from_der(certificate, identity().key_der().to_vec()),
        Identity::from_der(b"no certificate".to_vec(), source.key_der().to_vec()),
    ];
    for identity in damaged {
        assert!(matches!(identity.server_config(), Err(TrustError::Tls(_))));
        let client = identity.client_config(source.fingerprint());
        assert!(matches!(client, Err(TrustError::Tls(_))));
    }
}

#[test]
fn a_fingerprint_is_the_sha256_of_the_certificate() {
    let fingerprint = Fingerprint::of(&CertificateDer::from(b"abc".to_vec()));
    // FIPS 180-4's example.
    assert_eq!(
        fingerprint.to_string(),
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    );
}
