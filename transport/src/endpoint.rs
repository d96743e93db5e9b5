//! The server's end: who is let in, and how many.

use crate::{
    connection::{Connection, LINGER_MAX, shorten},
    error::TransportError,
    key::{DeviceKey, PublicKey},
    tls,
};
use quinn::crypto::{CryptoError, HmacKey};
use quinn_proto::HashedConnectionIdGenerator;
use std::{
    net::{SocketAddr, UdpSocket},
    sync::Arc,
    time::Duration,
};
use tokio::{
    sync::{Mutex, OwnedSemaphorePermit, Semaphore, mpsc},
    task::{AbortHandle, JoinSet},
    time,
};

/// Connections that wait to be accepted. Beyond it they keep their places among the handshakes,
/// and when these are used up, new clients are refused.
const ACCEPT_QUEUE: usize = 64;
/// Least time between two resets of connections that an earlier life of this server had. A reset
/// is smaller than what it answers, so more of them amplify nothing.
const RESET_INTERVAL: Duration = Duration::from_millis(1);

/// What a server takes on. Over each bound it refuses rather than queues.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Limits {
    /// Connections at once, handshakes included; over it clients get [`TransportError::Busy`].
    /// 10,000 unless changed. A connection counts until its last handle is dropped.
    pub connections_max: usize,
    /// Handshakes at once; over it clients get [`TransportError::Busy`]. 512 unless changed.
    pub handshakes_max: usize,
    /// Handshakes at once with clients that have not shown to own their address; further ones have
    /// to show it first, by a stateless Retry that costs them a round trip (RFC 9000, section
    /// 8.1.2). 64 unless changed.
    pub unvalidated_handshakes_max: usize,
    /// How long a client may take for the handshake. 10 seconds unless changed.
    pub handshake_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections_max: 10_000,
            handshakes_max: 512,
            unvalidated_handshakes_max: 64,
            handshake_timeout: Duration::from_secs(10),
        }
    }
}

/// A UDP socket that takes connections in.
///
/// Dropping it takes no more in; connections that were accepted go on.
#[derive(Debug)]
pub struct Endpoint {
    quic: quinn::Endpoint,
    key: PublicKey,
    accepted: Mutex<mpsc::Receiver<Connection>>,
    doorkeeper: AbortHandle,
}

impl Endpoint {
    /// Listens at `addr` as the server of `key`. Port 0 lets the system choose one, see
    /// [`local_addr`](Self::local_addr). Must be called within a tokio runtime.
    ///
    /// A server that was killed is not missed for long: its successor at the same address with the
    /// same key answers packets of connections that it does not know by a reset that their clients
    /// believe (RFC 9000, section 10.3). A client learns so by the next packet that it sends.
    ///
    /// # Errors
    /// [`TransportError::Io`] if the address can't be had or there is no runtime.
    pub fn bind(addr: SocketAddr, key: &DeviceKey, limits: Limits) -> Result<Self, TransportError> {
        let config = tls::server_config(key, limits.handshakes_max)?;
        let listen = |error| TransportError::io(format!("listen at {addr} (UDP)"), error);
        let socket = UdpSocket::bind(addr).map_err(listen)?;
        let runtime = quinn::default_runtime().ok_or_else(|| {
            TransportError::io("listen (UDP)", std::io::Error::other("there is no tokio runtime"))
        })?;
        let quic =
            quinn::Endpoint::new(endpoint_config(key), Some(config), socket, runtime).map_err(listen)?;
        let (sender, accepted) = mpsc::channel(ACCEPT_QUEUE);
        let doorkeeper = Doorkeeper {
            slots: semaphore(limits.connections_max),
            unvalidated: semaphore(limits.unvalidated_handshakes_max),
            handshakes: JoinSet::new(),
            accepted: sender,
            limits,
        };
        let doorkeeper = tokio::spawn(doorkeeper.run(quic.clone())).abort_handle();
        tracing::info!(%addr, key = %key.public(), "listening");
        Ok(Self { quic, key: key.public(), accepted: Mutex::new(accepted), doorkeeper })
    }

    /// The next connection whose client has proved a key, or `None` once the endpoint is closed.
    ///
    /// Handshakes go on in the background; a slow one delays nobody else's. May be called from
    /// several tasks.
    ///
    /// # Cancellation
    /// If the future is dropped, no connection is lost.
    pub async fn accept(&self) -> Option<Connection> {
        self.accepted.lock().await.recv().await
    }

    /// The address this listens at.
    ///
    /// # Errors
    /// [`TransportError::Io`] if the system can't say.
    pub fn local_addr(&self) -> Result<SocketAddr, TransportError> {
        self.quic.local_addr().map_err(|error| TransportError::io("ask for the address of the socket", error))
    }

    /// The key this is known by.
    pub fn key(&self) -> PublicKey {
        self.key
    }

    /// Closes every connection with `code` and `reason`, takes no more in, and waits until the
    /// peers had the time to be told: a few round trips, at most two seconds.
    ///
    /// # Cancellation
    /// If the future is dropped after it was polled once, everything is closed all the same.
    pub async fn close(&self, code: u32, reason: &str) {
        self.doorkeeper.abort();
        self.quic.close(code.into(), shorten(reason).as_bytes());
        // Over time the peers are left to notice by their idle timeouts.
        let _ = time::timeout(LINGER_MAX, self.quic.wait_idle()).await;
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        self.doorkeeper.abort();
        // The socket lives as long as its connections, but must not collect newcomers meanwhile.
        self.quic.set_server_config(None);
    }
}

/// What makes this server's connection ids and resets recognisable to its next life.
fn endpoint_config(key: &DeviceKey) -> quinn::EndpointConfig {
    let seed = key.to_seed();
    let reset_key = blake3::derive_key("anabranch 2026 quic stateless reset v1", &seed);
    let id_key = blake3::derive_key("anabranch 2026 quic connection id v1", &seed);
    let id_key = u64::from_le_bytes(*id_key.first_chunk().unwrap_or(&[0; 8]));
    let mut config = quinn::EndpointConfig::new(Arc::new(ResetKey(reset_key)));
    config
        .cid_generator(move || Box::new(HashedConnectionIdGenerator::from_key(id_key)))
        .min_reset_interval(RESET_INTERVAL);
    config
}

/// Makes the tokens by which clients believe a reset.
struct ResetKey([u8; 32]);

impl HmacKey for ResetKey {
    fn sign(&self, data: &[u8], signature_out: &mut [u8]) {
        signature_out.copy_from_slice(blake3::keyed_hash(&self.0, data).as_bytes());
    }

    fn signature_len(&self) -> usize {
        blake3::OUT_LEN
    }

    fn verify(&self, data: &[u8], signature: &[u8]) -> Result<(), CryptoError> {
        // Takes as long for every signature.
        if blake3::keyed_hash(&self.0, data) == *signature { Ok(()) } else { Err(CryptoError) }
    }
}

/// Decides about each newcomer and sees those it lets in through the handshake.
struct Doorkeeper {
    limits: Limits,
    slots: Arc<Semaphore>,
    unvalidated: Arc<Semaphore>,
    handshakes: JoinSet<()>,
    accepted: mpsc::Sender<Connection>,
}

impl Doorkeeper {
    async fn run(mut self, quic: quinn::Endpoint) {
        loop {
            tokio::select! {
                incoming = quic.accept() => match incoming {
                    Some(incoming) => self.admit(incoming),
                    None => return,
                },
                Some(_) = self.handshakes.join_next() => {}
            }
        }
    }

    fn admit(&mut self, incoming: quinn::Incoming) {
        // Finished ones count until they are taken out here.
        while self.handshakes.try_join_next().is_some() {}
        if self.handshakes.len() >= self.limits.handshakes_max {
            tracing::debug!(from = %incoming.remote_address(), "refused: too many handshakes");
            return incoming.refuse();
        }
        let unvalidated = match incoming.remote_address_validated() {
            true => None,
            false => match self.unvalidated.clone().try_acquire_owned() {
                Ok(permit) => Some(permit),
                // An address that is not validated has not been through a Retry, so this is legal.
                Err(_) => {
                    if let Err(error) = incoming.retry() {
                        error.into_incoming().refuse();
                    }
                    return;
                }
            },
        };
        let Ok(slot) = self.slots.clone().try_acquire_owned() else {
            tracing::debug!(from = %incoming.remote_address(), "refused: too many connections");
            return incoming.refuse();
        };
        let handshake = handshake(incoming, slot, self.limits.handshake_timeout);
        let accepted = self.accepted.clone();
        self.handshakes.spawn(async move {
            let connection = handshake.await;
            drop(unvalidated);
            if let Some(connection) = connection {
                // It fails only when the endpoint is gone, and the connection with it.
                let _ = accepted.send(connection).await;
            }
        });
    }
}

async fn handshake(
    incoming: quinn::Incoming,
    slot: OwnedSemaphorePermit,
    timeout: Duration,
) -> Option<Connection> {
    let from = incoming.remote_address();
    let handshake = async { incoming.await.map_err(|error| TransportError::from_handshake(error, from)) };
    let result = match time::timeout(timeout, handshake).await {
        Ok(result) => result.and_then(|quic| Connection::accepted(quic, slot)),
        Err(_) => Err(TransportError::no_answer(from, timeout)),
    };
    match result {
        Ok(connection) => {
            tracing::debug!(%from, peer = %connection.peer_key(), "connected");
            Some(connection)
        }
        Err(error) => {
            tracing::debug!(%from, %error, "a handshake failed");
            None
        }
    }
}

fn semaphore(permits: usize) -> Arc<Semaphore> {
    Arc::new(Semaphore::new(permits.min(Semaphore::MAX_PERMITS)))
}
