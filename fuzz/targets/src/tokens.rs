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
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use ed25519_dalek::SigningKey;
use ed25519_dalek::pkcs8::spki::der::pem::LineEnding;
use ed25519_dalek::pkcs8::{EncodePrivateKey as _, EncodePublicKey as _};
use jsonwebtoken::{Algorithm, EncodingKey, Header};

const NOW: WallMs = WallMs(1_750_000_000_000);

/// The key of the issuer `mixed` that this relay can't check: P-256, PKCS #8. It signs nothing else.
const ES256_KEY: &str = "MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgOO1+++TLpw2+5mQiXO4ZIi7LBBXrdpGxRwd6jQh0ACSh\
    RANCAATvVp/LE837ttX/52lp+SN0GSnNT8kuvxlGCXKZEbNHJasCnIJ4aEEyLyIVSY/WfQ1bBT/LsoNNLRSoR+ZAdEG+";
/// Where the point begins in it, of two times 32 bytes.
const ES256_POINT_AT: usize = 74;

fn issuer() -> SigningKey {
    SigningKey::from_bytes(&[42; 32])
}

/// The key of the issuer `mixed` that this relay can check.
fn other_issuer() -> SigningKey {
    SigningKey::from_bytes(&[43; 32])
}

fn issuer_pem() -> String {
    issuer().verifying_key().to_public_key_pem(LineEnding::LF).unwrap()
}

/// The directory of a relay that trusts [`issuer`] as `acme`, and as `mixed` one with two keys, `ed`
/// and `es`.
fn directory() -> &'static RelayDir {
    static DIRECTORY: OnceLock<(tempfile::TempDir, RelayDir)> = OnceLock::new();
    let (_, dir) = DIRECTORY.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let dir = RelayDir::new(folder.path().join("relay"));
        dir.create().unwrap();
        std::fs::write(dir.issuers_path().join("acme.pub.pem"), issuer_pem()).unwrap();
        let encode = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
        let der = STANDARD.decode(ES256_KEY).unwrap();
        let (x, y) = der[ES256_POINT_AT..].split_at(32);
        let set = serde_json::json!({ "keys": [
            { "kty": "OKP", "crv": "Ed25519", "x": encode(other_issuer().verifying_key().as_bytes()), "kid": "ed" },
            { "kty": "EC", "crv": "P-256", "x": encode(x), "y": encode(y), "kid": "es", "use": "sig" },
        ]});
        std::fs::write(dir.issuers_path().join("mixed.jwks.json"), set.to_string()).unwrap();
        (folder, dir)
    });
    dir
}

thread_local! {
    static VERIFIER: JwtVerifier = JwtVerifier::open(directory(), BTreeMap::new()).unwrap();
}

/// A token of the trusted issuer with these claims, which need not be claims at all.
fn sign(claims: &[u8]) -> String {
    token(r#"{"alg":"EdDSA","typ":"JWT"}"#, claims, |signed| ed25519(&issuer(), signed))
}

fn token(header: &str, claims: &[u8], signature: impl FnOnce(&str) -> String) -> String {
    let signed = format!("{}.{}", URL_SAFE_NO_PAD.encode(header), URL_SAFE_NO_PAD.encode(claims));
    let signature = signature(&signed);
    format!("{signed}.{signature}")
}

fn ed25519(key: &SigningKey, signed: &str) -> String {
    let der = key.to_pkcs8_der().unwrap();
    let key = EncodingKey::from_ed_der(der.as_bytes());
    jsonwebtoken::crypto::sign(signed.as_bytes(), &key, Algorithm::EdDSA).unwrap()
}

/// Never twice the same, which is no matter: none is ever right.
fn es256(signed: &str) -> String {
    let key = EncodingKey::from_ec_der(&STANDARD.decode(ES256_KEY).unwrap());
    jsonwebtoken::crypto::sign(signed.as_bytes(), &key, Algorithm::ES256).unwrap()
}

fn hs256(secret: &[u8], signed: &str) -> String {
    let key = EncodingKey::from_secret(secret);
    jsonwebtoken::crypto::sign(signed.as_bytes(), &key, Algorithm::HS256).unwrap()
}

/// Ways in which verifiers were talked into a token that its issuer never signed.
const CONFUSIONS: [fn(&[u8]) -> String; 10] = [
    // Keyed with what everybody knows.
    |claims| token(r#"{"alg":"HS256"}"#, claims, |signed| hs256(issuer_pem().as_bytes(), signed)),
    |claims| token(r#"{"alg":"HS256"}"#, claims, |signed| hs256(issuer_pem().trim().as_bytes(), signed)),
    |claims| token(r#"{"alg":"HS256"}"#, claims, |signed| hs256(issuer().verifying_key().as_bytes(), signed)),
    |claims| token(r#"{"alg":"none"}"#, claims, |_| String::new()),
    |claims| token(r#"{"alg":"nOnE"}"#, claims, |signed| ed25519(&issuer(), signed)),
    |claims| token(r#"{"alg":"EdDSA"}"#, claims, |_| String::new()),
    // Signed well, by a key that is not the one.
    |claims| token(r#"{"alg":"EdDSA","kid":"ed"}"#, claims, |signed| ed25519(&issuer(), signed)),
    |claims| token(r#"{"alg":"EdDSA","kid":"../es"}"#, claims, |signed| ed25519(&issuer(), signed)),
    |claims| {
        let own = SigningKey::from_bytes(&[44; 32]);
        let x = URL_SAFE_NO_PAD.encode(own.verifying_key().as_bytes());
        let jwk = format!(r#"{{"kty":"OKP","crv":"Ed25519","x":"{x}"}}"#);
        token(&format!(r#"{{"alg":"EdDSA","jwk":{jwk}}}"#), claims, |signed| ed25519(&own, signed))
    },
    |claims| token(r#"{"alg":"ES256","kid":"ed"}"#, claims, |signed| ed25519(&other_issuer(), signed)),
];

pub(crate) fn run_token(data: &[u8]) {
    let verify = |token: &str| VERIFIER.with(|verifier| verifier.verify(token, NOW));
    match data.split_first() {
        // Claims that the trusted issuer signed.
        Some((first, claims)) if first % 4 == 1 => {
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
                assert_eq!(issuer_of(&token).as_deref(), Some("acme"), "an issuer speaks for another");
            }
        }
        Some((first, data)) if first % 4 == 2 => {
            let Some((which, claims)) = data.split_first() else { return };
            let token = CONFUSIONS[usize::from(*which) % CONFUSIONS.len()](claims);
            assert!(verify(&token).is_err(), "a forged token is taken: {token}");
        }
        Some((first, claims)) if first % 4 == 3 => {
            for header in [r#"{"alg":"ES256","kid":"es"}"#, r#"{"alg":"EdDSA","kid":"es"}"#] {
                let token = token(header, claims, es256);
                assert!(verify(&token).is_err(), "a signature that can't be checked is taken: {token}");
            }
        }
        Some((_, text)) => {
            let Ok(text) = std::str::from_utf8(text) else { return };
            let _ = peek_claims(text);
            if verify(text).is_ok() {
                let (signed, signature) = text.rsplit_once('.').unwrap();
                let key = match issuer_of(text).as_deref() {
                    Some("acme") => issuer(),
                    Some("mixed") => other_issuer(),
                    other => panic!("a token of {other:?} is taken"),
                };
                assert_eq!(ed25519(&key, signed), signature, "a forged token is taken");
            }
        }
        None => {}
    }
}

fn issuer_of(token: &str) -> Option<String> {
    /// Of claims beside it that nobody asks for, even a number may be one that no number can hold.
    #[derive(serde::Deserialize)]
    struct Issued {
        iss: String,
    }
    let claims = URL_SAFE_NO_PAD.decode(token.split('.').nth(1)?).ok()?;
    serde_json::from_slice(&claims).ok().map(|Issued { iss }| iss)
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
    let mixed = String::from_utf8(claims("")).unwrap().replace("acme", "mixed").into_bytes();
    seeds.push(text(token(r#"{"alg":"EdDSA","kid":"ed"}"#, &mixed, |signed| {
        ed25519(&other_issuer(), signed)
    })));
    seeds.push([&[1][..], &mixed].concat());
    seeds.push([&[3][..], &mixed].concat());
    for (which, confused) in CONFUSIONS.iter().enumerate() {
        for claims in [&claims(""), &mixed] {
            seeds.push([&[2, which as u8][..], claims].concat());
        }
        // The header can be mutated in these too.
        seeds.push(text(confused(&claims(""))));
    }
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
