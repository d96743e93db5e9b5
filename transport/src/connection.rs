//! Connections, and how a client makes them.

use crate::{
    error::TransportError,
    frame::{FrameReceiver, FrameSender},
    key::{DeviceKey, PublicKey},
    tls,
    url::RelayUrl,
};
use std::{
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};
use tokio::{sync::OwnedSemaphorePermit, task::JoinSet, time};

/// Addresses of one name that are tried; more would only delay the answer.
const ADDRESSES_MAX: usize = 8;
/// The head start of each address over the next (RFC 8305, section 5).
const HEAD_START: Duration = Duration::from_millis(250);
/// Longest reason sent to a peer, so that it fits one packet whole.
const REASON_BYTES_MAX: usize = 512;
/// How long to wait for a close to reach the network.
pub(crate) const LINGER_MAX: Duration = Duration::from_secs(2);

/// TLS wants a name for the server; with raw keys nobody looks at it.
const SERVER_NAME: &str = "anabranch";

/// An encrypted connection to a peer that has proved its key.
///
/// Clones are handles of the same connection. When the last handle, [`FrameSender`] and
/// [`FrameReceiver`] are gone, the connection closes with code 0 and no reason.
#[derive(Debug, Clone)]
pub struct Connection {
    shared: Arc<Shared>,
}

impl Connection {
    pub(crate) fn accepted(
        quic: quinn::Connection,
        slot: OwnedSemaphorePermit,
    ) -> Result<Self, TransportError> {
        let peer_key = tls::peer_key(&quic)?;
        Ok(Self { shared: Arc::new(Shared { quic, peer_key, client: None, _slot: Some(slot) }) })
    }

    /// The key that the peer proved in the handshake.
    ///
    /// At a client it is the pinned one. At a server it can be anybody's: authorise it.
    pub fn peer_key(&self) -> PublicKey {
        self.shared.peer_key
    }

    /// Where the peer is at the moment. It changes when a device changes networks; never authorise
    /// by it.
    pub fn remote_addr(&self) -> SocketAddr {
        let address = self.shared.quic.remote_address();
        SocketAddr::new(address.ip().to_canonical(), address.port())
    }

    /// Opens the control stream. One end does so once, usually the client; it has to send first,
    /// because the other end learns of the stream by what is sent on it.
    ///
    /// # Errors
    /// What became of the connection, if it ended.
    pub async fn open_control(&self) -> Result<(FrameSender, FrameReceiver), TransportError> {
        self.halves(self.shared.quic.open_bi().await)
    }

    /// Waits for the control stream that the peer opens.
    ///
    /// A peer may never open one: bound the wait by a timeout.
    ///
    /// # Errors
    /// What became of the connection, if it ended.
    ///
    /// # Cancellation
    /// If the future is dropped, the stream stays for the next call.
    pub async fn accept_control(&self) -> Result<(FrameSender, FrameReceiver), TransportError> {
        self.halves(self.shared.quic.accept_bi().await)
    }

    /// Closes the connection at once and throws away what is on its way; see
    /// [`FrameSender::finish`] for a graceful end.
    ///
    /// The peer learns `code` and `reason` as [`TransportError::Refused`]; the reason is cut to 512
    /// bytes. The packet leaves in the background: before a program ends, wait with
    /// [`closed_and_sent`](Self::closed_and_sent). Has no effect on a closed connection.
    pub fn close(&self, code: u32, reason: &str) {
        self.shared.quic.close(code.into(), shorten(reason).as_bytes());
    }

    /// Waits until the connection ends and says why: [`TransportError::Closed`] if this end closed
    /// it, [`TransportError::Refused`] if the peer did.
    pub async fn closed(&self) -> TransportError {
        TransportError::from_connection(self.shared.quic.closed().await)
    }

    /// Why the connection ended, or `None` while it is open.
    pub fn close_reason(&self) -> Option<TransportError> {
        self.shared.quic.close_reason().map(TransportError::from_connection)
    }

    /// Waits until the connection has ended and, at a client, the peer had the time to be told: a
    /// few round trips, at most two seconds. At a server [`Endpoint::close`](crate::Endpoint::close)
    /// does that for all connections.
    pub async fn closed_and_sent(&self) {
        self.shared.quic.closed().await;
        if let Some(client) = &self.shared.client {
            // Over time the peer is left to notice by its idle timeout.
            let _ = time::timeout(LINGER_MAX, client.wait_idle()).await;
        }
    }

    /// Goes on from another port, as a device that changes networks does.
    #[cfg(test)]
    pub(crate) fn rebind(&self) {
        let socket = std::net::UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
        self.shared.client.as_ref().unwrap().rebind(socket).unwrap();
    }

    fn halves(
        &self,
        stream: Result<(quinn::SendStream, quinn::RecvStream), quinn::ConnectionError>,
    ) -> Result<(FrameSender, FrameReceiver), TransportError> {
        let (sender, receiver) = stream.map_err(TransportError::from_connection)?;
        Ok((FrameSender::new(sender, self.shared.clone()), FrameReceiver::new(receiver, self.shared.clone())))
    }
}

/// What the handles of one connection have in common.
#[derive(Debug)]
pub(crate) struct Shared {
    quic: quinn::Connection,
    peer_key: PublicKey,
    /// The socket of a client, which serves this connection only.
    client: Option<quinn::Endpoint>,
    /// The place of this connection among those a server may have.
    _slot: Option<OwnedSemaphorePermit>,
}

impl Shared {
    /// Lets the peer have as much in flight as a signed-in peer may.
    pub(crate) fn widen_window(&self) {
        self.quic.set_receive_window(tls::CONNECTION_WINDOW_BYTES.into());
    }
}

/// Connects to the relay at `url`, which must have a key, as the device of `key`.
///
/// Every address of a name is tried, each a quarter of a second after the one before; the first to
/// answer is taken. `timeout` covers all of it, the look-up of the name included.
///
/// The client is done with the handshake half a round trip before the server is: a server that
/// refuses the client's key does so on the returned connection.
///
/// # Errors
/// - [`TransportError::WrongPeerKey`] as soon as a server answers with another key.
/// - [`TransportError::Unreachable`] if nobody answers in time or the name can't be resolved.
/// - [`TransportError::Busy`], [`TransportError::Refused`] or [`TransportError::Handshake`] if the
///   server answers but doesn't let us in.
/// - [`TransportError::BadUrl`] if `url` has no key.
///
/// # Cancellation
/// If the future is dropped, the attempt ends.
pub async fn connect(
    url: &RelayUrl,
    key: &DeviceKey,
    timeout: Duration,
) -> Result<Connection, TransportError> {
    let expected = url.key().ok_or_else(|| TransportError::BadUrl {
        url: url.to_string(),
        detail: "it does not say the relay's key, without which any server could pose as the relay".into(),
    })?;
    let attempt = async {
        let addresses = url.resolve().await?;
        connect_any(&addresses, expected, key, url).await
    };
    time::timeout(timeout, attempt).await.unwrap_or_else(|_| Err(TransportError::no_answer(url, timeout)))
}

/// Connects to the server of the key `expected` at `address`; else as [`connect`].
///
/// # Errors
/// As [`connect`], but for [`TransportError::BadUrl`].
pub async fn connect_addr(
    address: SocketAddr,
    expected: PublicKey,
    key: &DeviceKey,
    timeout: Duration,
) -> Result<Connection, TransportError> {
    connect(&RelayUrl::from(address).with_key(expected), key, timeout).await
}

async fn connect_any(
    addresses: &[SocketAddr],
    expected: PublicKey,
    key: &DeviceKey,
    url: &RelayUrl,
) -> Result<Connection, TransportError> {
    // Dropped with this future, and then ends every attempt that is left.
    let mut attempts = JoinSet::new();
    let mut head_start = Duration::ZERO;
    for &address in addresses.iter().take(ADDRESSES_MAX) {
        let key = key.clone();
        attempts.spawn(async move {
            time::sleep(head_start).await;
            connect_one(address, expected, &key).await
        });
        head_start += HEAD_START;
    }
    let mut last = TransportError::unreachable(url, "no address could be tried");
    while let Some(attempt) = attempts.join_next().await {
        match attempt {
            Ok(Ok(connection)) => return Ok(connection),
            // A server that answered is an answer; waiting for a dead address would only hide it.
            Ok(Err(error)) if !error.is_offline() => return Err(error),
            Ok(Err(error)) => last = error,
            Err(_) => {}
        }
    }
    Err(last)
}

async fn connect_one(
    address: SocketAddr,
    expected: PublicKey,
    key: &DeviceKey,
) -> Result<Connection, TransportError> {
    let (config, wrong_key) = tls::client_config(key, expected)?;
    let any_port: SocketAddr = match address {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    // Without IPv6 in the system this fails for IPv6 addresses, and IPv4 must still be tried.
    let client = quinn::Endpoint::client(any_port)
        .map_err(|error| TransportError::unreachable(address, format!("no socket for it ({error})")))?;
    let connecting = client
        .connect_with(config, address, SERVER_NAME)
        .map_err(|error| TransportError::unreachable(address, error.to_string()))?;
    let quic = connecting.await.map_err(|error| match wrong_key.get() {
        Some(found) => TransportError::WrongPeerKey { expected, found },
        None => TransportError::from_handshake(error, address),
    })?;
    // The handshake has compared the keys already; this keeps the promise of `peer_key` in sight.
    let found = tls::peer_key(&quic)?;
    if found != expected {
        return Err(TransportError::WrongPeerKey { expected, found });
    }
    tracing::debug!(%address, peer = %found, "connected");
    let client = Some(client);
    Ok(Connection { shared: Arc::new(Shared { quic, peer_key: found, client, _slot: None }) })
}

/// The beginning of a reason that fits one packet.
pub(crate) fn shorten(reason: &str) -> &str {
    let mut end = reason.len().min(REASON_BYTES_MAX);
    while !reason.is_char_boundary(end) {
        end -= 1;
    }
    reason.get(..end).unwrap_or_default()
}
