//! What lets a device in: tokens, invites, addresses, keys; and versions of entities.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use anabranch_core::clock::WallMs;
use anabranch_core::relay::TokenVerifier as _;
use anabranch_core::replica::{parse_version, version_token};
use anabranch_relay::{Invite, JwtVerifier, RelayDir, peek_claims};
use anabranch_transport::{PublicKey, RelayUrl};
use automerge::ChangeHash;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ed25519_dalek::SigningKey;
use ed25519_dalek::pkcs8::spki::der::pem::LineEnding;
use ed25519_dalek::pkcs8::{EncodePrivateKey as _, EncodePublicKey as _};
use jsonwebtoken::{Algorithm, EncodingKey, Header};

const NOW: WallMs = WallMs(1_750_000_000_000);

fn issuer() -> SigningKey {
    SigningKey::from_bytes(&[42; 32])
}

/// The directory of a relay that trusts [`issuer`] as `acme`.
fn directory() -> &'static RelayDir {
    static DIRECTORY: OnceLock<(tempfile::TempDir, RelayDir)> = OnceLock::new();
    let (_, dir) = DIRECTORY.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let dir = RelayDir::new(folder.path().join("relay"));
        dir.create().unwrap();
        let pem = issuer().verifying_key().to_public_key_pem(LineEnding::LF).unwrap();
        std::fs::write(dir.issuers_path().join("acme.pub.pem"), pem).unwrap();
        (folder, dir)
    });
    dir
}

thread_local! {
    static VERIFIER: JwtVerifier = JwtVerifier::open(directory(), BTreeMap::new()).unwrap();
}

/// A token of the trusted issuer with these claims, which need not be claims at all.
fn sign(claims: &[u8]) -> String {
    let header = URL_SAFE_NO_PAD.encode(br#"{"alg":"EdDSA","typ":"JWT"}"#);
    let signed = format!("{header}.{}", URL_SAFE_NO_PAD.encode(claims));
    let der = issuer().to_pkcs8_der().unwrap();
    let key = EncodingKey::from_ed_der(der.as_bytes());
    let signature = jsonwebtoken::crypto::sign(signed.as_bytes(), &key, Algorithm::EdDSA).unwrap();
    format!("{signed}.{signature}")
}

pub(crate) fn run_token(data: &[u8]) {
    let verify = |token: &str| VERIFIER.with(|verifier| verifier.verify(token, NOW));
    match data.split_first() {
        // Half of the inputs are claims that the trusted issuer signed.
        Some((first, claims)) if first % 2 == 1 => {
            let token = sign(claims);
            let peeked = peek_claims(&token);
            if let Ok(claims) = verify(&token) {
                let peeked = peeked.map(|peeked| peeked.workspace);
                // A device may be unable to use the relay's key in it, the relay does not look.
                assert!(peeked.is_none_or(|workspace| workspace == claims.workspace));
                assert!(claims.expires > NOW && claims.not_before <= NOW);
                assert!(!claims.user.is_empty() && claims.user.len() <= 256);
                assert!(!claims.workspace.is_empty() && claims.workspace.len() <= 64);
                assert!(!claims.single_use || !claims.token_id.is_empty());
            }
        }
        Some((_, text)) => {
            let Ok(text) = std::str::from_utf8(text) else { return };
            let _ = peek_claims(text);
            if verify(text).is_ok() {
                let claims = text.split('.').nth(1).unwrap_or_default();
                let claims = URL_SAFE_NO_PAD.decode(claims).unwrap_or_default();
                assert_eq!(
                    sign(&claims).split('.').nth(2),
                    text.split('.').nth(2),
                    "a forged token is taken"
                );
            }
        }
        None => {}
    }
}

fn claims(more: &str) -> Vec<u8> {
    format!(
        r#"{{"iss":"acme","aud":"anabranch","sub":"ann","ws":"home","role":"writer","exp":1750003600{more}}}"#
    )
    .into_bytes()
}

pub(crate) fn token_seeds() -> Vec<Vec<u8>> {
    let signed = [
        claims(""),
        claims(r#","nbf":1750000000.5,"iat":1e9,"jti":"a","once":true,"rk":"x""#),
        claims(r#","nbf":-1"#),
        claims(r#","exp":1e308"#),
        br#"{"iss":"acme","aud":["x","anabranch"],"sub":"","ws":"","role":"king","exp":0}"#.to_vec(),
        b"[]".to_vec(),
    ];
    let mut seeds: Vec<Vec<u8>> = signed.iter().map(|claims| [&[1][..], claims].concat()).collect();
    let text = |text: String| [&[0][..], text.as_bytes()].concat();
    seeds.push(text(sign(&claims(""))));
    let none = Header::new(Algorithm::HS256);
    let other = jsonwebtoken::encode(&none, &serde_json::json!({"exp": 1}), &EncodingKey::from_secret(b"x"));
    seeds.push(text(other.unwrap()));
    let parts: Vec<String> =
        [&br#"{"alg":"none"}"#[..], &claims("")].iter().map(|part| URL_SAFE_NO_PAD.encode(part)).collect();
    seeds.push(text(format!("{}.", parts.join("."))));
    seeds.push(text("..".into()));
    seeds
}

pub(crate) fn run_invite(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(invite) = Invite::parse(text) {
        assert_eq!(Invite::parse(&invite.to_string()).ok(), Some(invite), "an invite reads back as another");
    }
    let body = format!("anabranch-invite:{}", URL_SAFE_NO_PAD.encode(data));
    if let Ok(invite) = Invite::parse(&body) {
        assert_eq!(Invite::parse(&invite.to_string()).ok(), Some(invite), "an invite reads back as another");
    }
    if let Ok(url) = text.parse::<RelayUrl>() {
        assert_eq!(url.to_string().parse::<RelayUrl>().ok(), Some(url), "an address reads back as another");
    }
    if let Ok(key) = text.parse::<PublicKey>() {
        assert_eq!(key.to_string().parse::<PublicKey>().ok(), Some(key), "a key reads back as another");
    }
    if let Some(heads) = parse_version(text) {
        assert_eq!(parse_version(&version_token(&heads)), Some(heads), "a version reads back as another");
    }
}

pub(crate) fn invite_seeds() -> Vec<Vec<u8>> {
    let key = URL_SAFE_NO_PAD.encode([7; 32]);
    let url = format!("quic://relay.example:4433#{key}");
    let relay: RelayUrl = "quic://127.0.0.1:4433".parse().unwrap();
    let invite = Invite { relay, workspace: "home".into(), token: "a.b.c".into() };
    let body = format!(r#"{{"v":1,"relay":"{url}","ws":"home","token":"t"}}"#);
    let version = version_token(&[ChangeHash([1; 32]), ChangeHash([2; 32])]);
    [
        invite.to_string(),
        body.clone(),
        body.replace("\"v\":1", "\"v\":2"),
        url,
        "quic://[::1]:1/".into(),
        "quic://[::1:1".into(),
        "QUIC://EXAMPLE.org:0065535".into(),
        "quic://a@b:1?x#y".into(),
        key,
        version,
        "anabranch-invite:".into(),
    ]
    .map(String::into_bytes)
    .into()
}
