//! Addresses of relays.

use crate::{error::TransportError, key::PublicKey};
use std::{
    fmt,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    str::FromStr,
};

const SCHEME: &str = "quic://";
/// Longest address that is looked at: a host name has at most 253 characters (RFC 1035).
const URL_BYTES_MAX: usize = 512;
const HOST_BYTES_MAX: usize = 253;
const LABEL_BYTES_MAX: usize = 63;

/// Where a relay is and who it is: `quic://HOST:PORT#KEY`.
///
/// HOST is a DNS name, an IPv4 address, or an IPv6 address in brackets. KEY is the relay's public
/// key; it may be missing where another source tells it (see [`with_key`](Self::with_key)).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct RelayUrl {
    host: Host,
    port: u16,
    key: Option<PublicKey>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Host {
    Ip(IpAddr),
    /// Lower case, because names that differ in case are the same name.
    Name(String),
}

impl RelayUrl {
    /// The relay's port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The relay's public key, if the address has one.
    pub fn key(&self) -> Option<PublicKey> {
        self.key
    }

    /// The same address with `key` in place of any other.
    pub fn with_key(mut self, key: PublicKey) -> Self {
        self.key = Some(key);
        self
    }

    /// The addresses that the host has at the moment, in the system's order of preference.
    ///
    /// # Errors
    /// [`TransportError::Unreachable`] if the name can't be resolved, which is also what happens
    /// to every name while a device is offline.
    pub async fn resolve(&self) -> Result<Vec<SocketAddr>, TransportError> {
        let name = match &self.host {
            Host::Ip(ip) => return Ok(vec![SocketAddr::new(*ip, self.port)]),
            Host::Name(name) => name,
        };
        let addresses: Vec<_> = tokio::net::lookup_host((name.as_str(), self.port))
            .await
            .map_err(|error| {
                TransportError::unreachable(self, format!("the name can't be resolved ({error})"))
            })?
            .collect();
        match addresses.is_empty() {
            true => Err(TransportError::unreachable(self, "the name has no address")),
            false => Ok(addresses),
        }
    }
}

/// The address of a server whose key is told by other means.
impl From<SocketAddr> for RelayUrl {
    fn from(address: SocketAddr) -> Self {
        Self { host: Host::Ip(address.ip()), port: address.port(), key: None }
    }
}

impl fmt::Display for RelayUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.host {
            Host::Ip(IpAddr::V6(ip)) => write!(f, "{SCHEME}[{ip}]:{}", self.port)?,
            Host::Ip(IpAddr::V4(ip)) => write!(f, "{SCHEME}{ip}:{}", self.port)?,
            Host::Name(name) => write!(f, "{SCHEME}{name}:{}", self.port)?,
        }
        match self.key {
            Some(key) => write!(f, "#{key}"),
            None => Ok(()),
        }
    }
}

impl FromStr for RelayUrl {
    type Err = TransportError;

    fn from_str(text: &str) -> Result<Self, TransportError> {
        let bad = |detail: String| TransportError::BadUrl {
            url: text.chars().take(URL_BYTES_MAX).collect(),
            detail,
        };
        if text.len() > URL_BYTES_MAX {
            return Err(bad(format!("it is longer than {URL_BYTES_MAX} bytes")));
        }
        let rest = text
            .get(..SCHEME.len())
            .filter(|scheme| scheme.eq_ignore_ascii_case(SCHEME))
            .and_then(|_| text.get(SCHEME.len()..))
            .ok_or_else(|| bad(format!("it does not start with {SCHEME}")))?;
        let (authority, key) = match rest.split_once('#') {
            Some((authority, key)) => (authority, Some(key)),
            None => (rest, None),
        };
        let authority = authority.strip_suffix('/').unwrap_or(authority);
        if let Some(extra) = authority.chars().find(|c| matches!(c, '/' | '?' | '@')) {
            return Err(bad(format!("there is a {extra:?} in it, but it has no path, query or user")));
        }
        let (host, port) = match authority.strip_prefix('[') {
            Some(bracketed) => {
                let (ip, port) =
                    bracketed.split_once(']').ok_or_else(|| bad("the bracket is not closed".into()))?;
                let ip = ip.parse::<Ipv6Addr>().map_err(|_| bad(format!("{ip:?} is no IPv6 address")))?;
                (Host::Ip(ip.into()), port.strip_prefix(':'))
            }
            None => match authority.rsplit_once(':') {
                Some((host, _)) if host.contains(':') => {
                    return Err(bad("an IPv6 address must be in brackets".into()));
                }
                Some((host, port)) => (parse_host(host).map_err(bad)?, Some(port)),
                None => (parse_host(authority).map_err(bad)?, None),
            },
        };
        let port = port.ok_or_else(|| bad("the port is missing".into()))?;
        // `u16::from_str` would take a sign.
        let digits_only = !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit());
        let port = match port.parse::<u16>() {
            Ok(port) if digits_only && port > 0 => port,
            _ => return Err(bad(format!("{port:?} is no port, which is a number from 1 to 65535"))),
        };
        let key = match key.map(PublicKey::from_str).transpose() {
            Ok(key) => key,
            Err(TransportError::BadKey { detail }) => return Err(bad(format!("after the # {detail}"))),
            Err(error) => return Err(error),
        };
        Ok(Self { host, port, key })
    }
}

fn parse_host(host: &str) -> Result<Host, String> {
    if let Ok(ip) = host.parse::<IpAddr>() {
        return Ok(Host::Ip(ip));
    }
    if host.is_empty() {
        return Err("the host is missing".into());
    }
    let label_ok = |label: &str| {
        let in_label = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
        (1..=LABEL_BYTES_MAX).contains(&label.len()) && label.bytes().all(in_label)
    };
    // A final dot marks a name as complete; it is part of no label.
    let labels = host.strip_suffix('.').unwrap_or(host);
    if host.len() > HOST_BYTES_MAX || !labels.split('.').all(label_ok) {
        return Err(format!("{host:?} is neither a host name nor an IP address"));
    }
    Ok(Host::Name(host.to_ascii_lowercase()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "Gb9ECWmEzf6FQbrBZ9w7lshQhqowtrbLDFw4rXAxZuE";

    #[test]
    fn addresses_survive_the_way_through_text() {
        for text in [
            format!("quic://relay.example:4433#{KEY}"),
            format!("quic://10.0.0.1:1#{KEY}"),
            format!("quic://[2001:db8::1]:65535#{KEY}"),
            "quic://my_relay-2.lan.:4433".into(),
        ] {
            let url: RelayUrl = text.parse().unwrap();
            assert_eq!(url.to_string(), text);
            assert_eq!(url.key().is_some(), text.contains('#'));
        }
        let url: RelayUrl = "QUIC://Relay.Example:4433/".parse().unwrap();
        assert_eq!(url.to_string(), "quic://relay.example:4433");
    }

    #[test]
    fn a_bad_address_is_told_what_is_wrong() {
        let long = format!("quic://{}:1", "a.".repeat(300));
        for (text, expected) in [
            ("", "does not start with"),
            ("http://relay:1", "does not start with"),
            ("quíc://relay:1", "does not start with"),
            ("quic://relay", "port is missing"),
            ("quic://[::1]", "port is missing"),
            ("quic://relay:", "is no port"),
            ("quic://relay:0", "is no port"),
            ("quic://relay:+1", "is no port"),
            ("quic://relay:65536", "is no port"),
            ("quic://:1", "host is missing"),
            ("quic://::1:1", "in brackets"),
            ("quic://[::1:1", "not closed"),
            ("quic://[relay]:1", "no IPv6 address"),
            ("quic://[fe80::1%eth0]:1", "no IPv6 address"),
            ("quic://re lay:1", "neither a host name"),
            ("quic://a..b:1", "neither a host name"),
            ("quic://relay:1/path", "no path, query or user"),
            ("quic://me@relay:1", "no path, query or user"),
            ("quic://relay:1#", "43 characters"),
            ("quic://relay:1#Gb9ECWmEzf6FQbrBZ9w7lshQhqowtrbLDFw4rXAxZu+", "only the characters"),
            (&long, "longer than"),
        ] {
            let error = text.parse::<RelayUrl>().unwrap_err().to_string();
            assert!(error.contains(expected), "{text:?}: {error}");
        }
    }
}
