//! Mutual TLS 1.3 with raw ed25519 keys (RFC 7250), and the QUIC settings of both ends.

use crate::{
    error::TransportError,
    key::{DeviceKey, PublicKey},
};
use ed25519_dalek::pkcs8::EncodePrivateKey;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, PeerIncompatible, PeerMisbehaved,
    SignatureScheme,
    client::{
        AlwaysResolvesClientRawPublicKeys, Resumption,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, ring, verify_tls13_signature_with_raw_key},
    pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName, SubjectPublicKeyInfoDer, UnixTime},
    server::{
        AlwaysResolvesServerRawPublicKeys, NoServerSessionStorage,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
    sign::CertifiedKey,
};
use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

/// The protocol and its version; ends that share none fail the handshake.
const ALPN: &[u8] = b"anabranch/1";

/// DER of `SubjectPublicKeyInfo { ed25519 }` up to the 32 bytes of the key (RFC 8410, section 4).
const SPKI_PREFIX: [u8; 12] = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];

/// What a peer may have in flight over all streams before it has signed in. Twice this many bytes
/// are the worst case of memory for a connection that nobody vouches for yet.
const CONNECTION_WINDOW_BYTES_BEFORE_SIGN_IN: u32 = 256 * 1024;
/// The same after sign-in, and for servers, which have proved the pinned key. Also what is kept of what
/// was sent and not acknowledged. As much as the one stream that carries frames may have in flight:
/// more would be room that only streams take which nobody reads.
pub(crate) const CONNECTION_WINDOW_BYTES: u32 = STREAM_WINDOW_BYTES;
const STREAM_WINDOW_BYTES: u32 = 1024 * 1024;
const BIDI_STREAMS_MAX: u32 = 64;
const UNI_STREAMS_MAX: u32 = 8;
const IDLE_TIMEOUT_MS: u32 = 30_000;
const KEEP_ALIVE: Duration = Duration::from_secs(12);
/// Bytes kept for one attempt to connect that was not looked at yet; a handshake needs 2 KiB.
const INCOMING_BUFFER_BYTES: u64 = 16 * 1024;

/// Settings of a server known by `key`, with at most `incoming_max` attempts waiting to be looked at.
pub(crate) fn server_config(
    key: &DeviceKey,
    incoming_max: usize,
) -> Result<quinn::ServerConfig, TransportError> {
    server_config_of(certified_key(key.public(), key)?, incoming_max)
}

fn server_config_of(
    identity: Arc<CertifiedKey>,
    incoming_max: usize,
) -> Result<quinn::ServerConfig, TransportError> {
    let provider = Arc::new(ring::default_provider());
    let resolver = AlwaysResolvesServerRawPublicKeys::new(identity);
    let mut tls = rustls::ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(setup)?
        .with_client_cert_verifier(Arc::new(AnyKey(provider)))
        .with_cert_resolver(Arc::new(resolver));
    tls.alpn_protocols = vec![ALPN.to_vec()];
    // No resumption, so that both keys are proved in every handshake; hence no 0-RTT either.
    tls.session_storage = Arc::new(NoServerSessionStorage {});
    tls.send_tls13_tickets = 0;
    tls.max_early_data_size = 0;
    let crypto = QuicServerConfig::try_from(tls).map_err(setup)?;
    let mut config = quinn::ServerConfig::with_crypto(Arc::new(crypto));
    config
        .transport_config(Arc::new(transport_config(CONNECTION_WINDOW_BYTES_BEFORE_SIGN_IN)))
        .migration(true)
        .max_incoming(incoming_max)
        .incoming_buffer_size(INCOMING_BUFFER_BYTES)
        .incoming_buffer_size_total(INCOMING_BUFFER_BYTES.saturating_mul(incoming_max as u64));
    Ok(config)
}

/// Settings of a client known by `key` that talks to the server of the key `expected` only, and the
/// place where the key of any other server is found after a failed handshake.
pub(crate) fn client_config(
    key: &DeviceKey,
    expected: PublicKey,
) -> Result<(quinn::ClientConfig, WrongKey), TransportError> {
    client_config_of(certified_key(key.public(), key)?, expected)
}

fn client_config_of(
    identity: Arc<CertifiedKey>,
    expected: PublicKey,
) -> Result<(quinn::ClientConfig, WrongKey), TransportError> {
    let provider = Arc::new(ring::default_provider());
    let resolver = AlwaysResolvesClientRawPublicKeys::new(identity);
    let wrong_key = WrongKey::default();
    let verifier = PinnedKey { expected, wrong_key: wrong_key.clone(), provider: provider.clone() };
    let mut tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(setup)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_client_cert_resolver(Arc::new(resolver));
    tls.alpn_protocols = vec![ALPN.to_vec()];
    tls.resumption = Resumption::disabled();
    tls.enable_early_data = false;
    // Keys name servers, names don't: sending one would only tell observers where we go.
    tls.enable_sni = false;
    let crypto = QuicClientConfig::try_from(tls).map_err(setup)?;
    let mut config = quinn::ClientConfig::new(Arc::new(crypto));
    config.transport_config(Arc::new(transport_config(CONNECTION_WINDOW_BYTES)));
    Ok((config, wrong_key))
}

/// The key that the peer proved in the handshake of `connection`.
pub(crate) fn peer_key(connection: &quinn::Connection) -> Result<PublicKey, TransportError> {
    connection
        .peer_identity()
        .and_then(|identity| identity.downcast::<Vec<CertificateDer<'static>>>().ok())
        .and_then(|chain| chain.first().and_then(|key| parse_spki(key).ok()))
        .ok_or_else(|| TransportError::Handshake { detail: "the peer has proved no key".into() })
}

/// The key of a server that was not the expected one, if that is why the handshake failed.
#[derive(Debug, Clone, Default)]
pub(crate) struct WrongKey(Arc<OnceLock<PublicKey>>);

impl WrongKey {
    pub(crate) fn get(&self) -> Option<PublicKey> {
        self.0.get().copied()
    }
}

fn transport_config(connection_window_bytes: u32) -> quinn::TransportConfig {
    let mut config = quinn::TransportConfig::default();
    config
        .max_concurrent_bidi_streams(BIDI_STREAMS_MAX.into())
        .max_concurrent_uni_streams(UNI_STREAMS_MAX.into())
        .stream_receive_window(STREAM_WINDOW_BYTES.into())
        .receive_window(connection_window_bytes.into())
        .send_window(CONNECTION_WINDOW_BYTES.into())
        .datagram_receive_buffer_size(None)
        .max_idle_timeout(Some(quinn::VarInt::from_u32(IDLE_TIMEOUT_MS).into()))
        .keep_alive_interval(Some(KEEP_ALIVE));
    config
}

/// The identity of `shown`, with signatures by `signer`: the same key but in tests of forgery.
fn certified_key(shown: PublicKey, signer: &DeviceKey) -> Result<Arc<CertifiedKey>, TransportError> {
    let document =
        signer.signing().to_pkcs8_der().map_err(|_| TransportError::bad_key("it can't be encoded as DER"))?;
    let der = PrivatePkcs8KeyDer::from(document.as_bytes());
    let signer = ring::sign::any_eddsa_type(&der).map_err(setup)?;
    Ok(Arc::new(CertifiedKey::new(vec![spki(shown)], signer)))
}

/// Reads what a peer presents as its certificate and gives the key with its encoding, for tests of
/// hostile input.
#[doc(hidden)]
pub fn read_certificate(der: &[u8]) -> Option<(PublicKey, Vec<u8>)> {
    presented_key(der, &[]).ok().map(|key| (key, spki(key).to_vec()))
}

/// With raw keys the certificate is the key's SubjectPublicKeyInfo and nothing else.
fn spki(key: PublicKey) -> CertificateDer<'static> {
    let mut der = SPKI_PREFIX.to_vec();
    der.extend_from_slice(key.as_bytes());
    der.into()
}

/// DER has one encoding per key, so a prefix and a length are the whole parser.
fn parse_spki(der: &[u8]) -> Result<PublicKey, Error> {
    let bad_encoding = Error::InvalidCertificate(CertificateError::BadEncoding);
    let key: [u8; 32] = der
        .strip_prefix(&SPKI_PREFIX)
        .and_then(|key| key.try_into().ok())
        .ok_or_else(|| bad_encoding.clone())?;
    let key = PublicKey(key);
    key.check().map_err(|_| bad_encoding)?;
    Ok(key)
}

fn presented_key(end_entity: &[u8], intermediates: &[CertificateDer<'_>]) -> Result<PublicKey, Error> {
    if !intermediates.is_empty() {
        return Err(Error::InvalidCertificate(CertificateError::BadEncoding));
    }
    parse_spki(end_entity)
}

fn verify_signature(
    provider: &CryptoProvider,
    message: &[u8],
    key: &[u8],
    signature: &DigitallySignedStruct,
) -> Result<HandshakeSignatureValid, Error> {
    if signature.scheme != SignatureScheme::ED25519 {
        return Err(PeerMisbehaved::SignedHandshakeWithUnadvertisedSigScheme.into());
    }
    let key = SubjectPublicKeyInfoDer::from(key);
    verify_tls13_signature_with_raw_key(message, &key, signature, &provider.signature_verification_algorithms)
}

fn setup(error: impl ToString) -> TransportError {
    TransportError::io("set up TLS", std::io::Error::other(error.to_string()))
}

/// The client's check: one server key and no other.
#[derive(Debug)]
struct PinnedKey {
    expected: PublicKey,
    wrong_key: WrongKey,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for PinnedKey {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let found = presented_key(end_entity, intermediates)?;
        if found != self.expected {
            // One attempt has one handshake, so the first value is the only one.
            let _ = self.wrong_key.0.set(found);
            return Err(Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure));
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(PeerIncompatible::Tls13RequiredForQuic.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_signature(&self.provider, message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

/// The server's check: any usable key, as long as the client holds its private half.
#[derive(Debug)]
struct AnyKey(Arc<CryptoProvider>);

impl ClientCertVerifier for AnyKey {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        presented_key(end_entity, intermediates)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(PeerIncompatible::Tls13RequiredForQuic.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_signature(&self.0, message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{Ipv4Addr, SocketAddr};

    const LOOPBACK: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

    /// What a handshake between an honest and a forged end comes to, at the server.
    async fn handshake(
        server: quinn::ServerConfig,
        client: quinn::ClientConfig,
    ) -> (Result<quinn::Connection, quinn::ConnectionError>, Result<quinn::Connection, quinn::ConnectionError>)
    {
        let server = quinn::Endpoint::server(server, LOOPBACK).unwrap();
        let address = server.local_addr().unwrap();
        let endpoint = quinn::Endpoint::client(LOOPBACK).unwrap();
        let connecting = endpoint.connect_with(client, address, "forged").unwrap();
        let incoming = server.accept().await.unwrap();
        tokio::join!(async { incoming.await }, connecting)
    }

    #[tokio::test]
    async fn a_client_must_hold_the_key_it_shows() {
        let [server, victim, thief] = [(); 3].map(|()| DeviceKey::generate().unwrap());
        let forged = certified_key(victim.public(), &thief).unwrap();
        let (config, _) = client_config_of(forged, server.public()).unwrap();
        let (at_server, _) = handshake(server_config(&server, 8).unwrap(), config).await;
        assert!(at_server.is_err(), "the server took {at_server:?} for the victim");
    }

    #[tokio::test]
    async fn a_server_must_hold_the_key_it_shows() {
        let [client, victim, thief] = [(); 3].map(|()| DeviceKey::generate().unwrap());
        let forged = certified_key(victim.public(), &thief).unwrap();
        let (config, wrong_key) = client_config(&client, victim.public()).unwrap();
        let (_, at_client) = handshake(server_config_of(forged, 8).unwrap(), config).await;
        assert!(at_client.is_err(), "the client took {at_client:?} for the victim");
        assert_eq!(wrong_key.get(), None);
    }

    #[tokio::test]
    async fn a_client_without_a_key_is_refused() {
        let server = DeviceKey::generate().unwrap();
        let provider = Arc::new(ring::default_provider());
        let verifier = PinnedKey {
            expected: server.public(),
            wrong_key: WrongKey::default(),
            provider: provider.clone(),
        };
        let mut tls = rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_no_client_auth();
        tls.alpn_protocols = vec![ALPN.to_vec()];
        let config = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls).unwrap()));
        let (at_server, _) = handshake(server_config(&server, 8).unwrap(), config).await;
        assert!(at_server.is_err(), "the server let in {at_server:?}");
    }

    #[test]
    fn keys_survive_the_way_through_der_and_nothing_else_passes() {
        let key = DeviceKey::generate().unwrap().public();
        let der = spki(key);
        assert_eq!(parse_spki(&der).unwrap(), key);
        for length in 0..der.len() {
            assert!(parse_spki(der.get(..length).unwrap()).is_err());
        }
        assert!(parse_spki(&[&der, &[0][..]].concat()).is_err());
        assert!(parse_spki(&spki(PublicKey([0; 32]))).is_err(), "anybody can sign for a key of small order");
    }
}
