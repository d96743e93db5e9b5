//! Tokens: what lets a device sign in to a workspace.
//!
//! A token is a JWT (RFC 7519), signed with EdDSA (RFC 8037), with the claims `iss`, `aud` =
//! [`AUDIENCE`], `sub` = user, `ws` = workspace, `role`, `exp`, and optionally `nbf`, `iat`,
//! `jti`, `once` (the first device to use it is the only one; needs `jti`) and `rk`, the
//! relay's public key, by which a device can pin a relay whose address carries no key.
//!
//! Tokens are secrets: nothing here logs one or puts one into an error.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anabranch_core::clock::WallMs;
use anabranch_core::id::WorkspaceId;
use anabranch_core::relay::{Claims, TokenVerifier};
use anabranch_core::wire::{FaultCode, GrantRole};
use anabranch_transport::{PublicKey, RelayUrl};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ed25519_dalek::SigningKey;
use ed25519_dalek::pkcs8::EncodePrivateKey;
use jsonwebtoken::{Algorithm, EncodingKey, Header, Validation};
use serde::{Deserialize, Deserializer, Serialize};

use crate::keys::{BUILT_IN_ISSUER, Issuers, KeyError, RelayDir, key_id};

/// What the `aud` claim of a token has to say.
pub const AUDIENCE: &str = "anabranch";
/// Longest token that is looked at.
pub const TOKEN_BYTES_MAX: usize = 8 * 1024;
/// How far a relay's clock may be behind its issuer's.
const NOT_BEFORE_LEEWAY_MS: u64 = 60_000;
/// Bounds of claims: they become keys and values of the store.
const USER_BYTES_MAX: usize = 256;
const TOKEN_ID_BYTES_MAX: usize = 128;
const ISSUER_BYTES_MAX: usize = 256;
/// How long a key that was taken out of the directory may still be trusted.
const ISSUERS_AGE_MAX: Duration = Duration::from_secs(60);
/// Unknown keys may have the directory read again this often at once, then once a second:
/// tokens cost nothing to invent.
const REREADS_MAX: u32 = 8;
const INVITE_PREFIX: &str = "anabranch-invite:";
const INVITE_VERSION: u32 = 1;
const INVITE_CHARS_MAX: usize = 16 * 1024;

/// Why a token or an invite can't be made or read.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TokenError {
    /// A key is missing or unusable.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// Something asked for can't stand in a token.
    #[error("can't make the token: {what}")]
    Unusable {
        /// What, and what would be right.
        what: String,
    },
    /// An invite names the relay's address, and none is known.
    #[error("no relay has run in {} yet, so its address is not known; start it once, or give its address", dir.display())]
    NoAddress {
        /// The relay's directory.
        dir: PathBuf,
    },
    /// The text is no invite.
    #[error("this is no invite: {what}; copy the whole line, it begins with {INVITE_PREFIX}")]
    BadInvite {
        /// What is wrong with it.
        what: &'static str,
    },
    /// The signature could not be made.
    #[error("the token could not be signed: {cause}")]
    Signing {
        /// What the signer said.
        cause: String,
    },
}

/// What a token shall say.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct MintOptions {
    /// The workspace.
    pub workspace: String,
    /// The user.
    pub user: String,
    /// The role; [`GrantRole::Writer`] by default.
    pub role: GrantRole,
    /// How long devices may sign in with it; 30 days by default, one hour for an invite.
    pub ttl: Duration,
    /// Whether the first device to use it is the only one.
    pub invite: bool,
    /// When it is made; the system's clock by default.
    pub now: WallMs,
}

impl MintOptions {
    /// A token for any number of the user's devices.
    pub fn new(workspace: impl Into<String>, user: impl Into<String>) -> Self {
        Self {
            workspace: workspace.into(),
            user: user.into(),
            role: GrantRole::Writer,
            ttl: Duration::from_secs(30 * 24 * 3600),
            invite: false,
            now: system_wall(),
        }
    }

    /// A token for one device, valid for an hour.
    pub fn invite(workspace: impl Into<String>, user: impl Into<String>) -> Self {
        Self { invite: true, ttl: Duration::from_secs(3600), ..Self::new(workspace, user) }
    }

    /// Sets the role.
    #[must_use]
    pub fn role(mut self, role: GrantRole) -> Self {
        self.role = role;
        self
    }

    /// Sets how long devices may sign in with it.
    #[must_use]
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.ttl = ttl;
        self
    }

    /// Sets when it is made.
    #[must_use]
    pub fn now(mut self, now: WallMs) -> Self {
        self.now = now;
        self
    }
}

/// A new token.
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Minted {
    /// The token. Secret.
    pub token: String,
    /// Until when devices may sign in with it, milliseconds since 1970.
    pub expires_ms: u64,
}

impl fmt::Debug for Minted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Minted").field("expires_ms", &self.expires_ms).finish_non_exhaustive()
    }
}

/// Makes a token, signed by the built-in issuer of the relay in `dir`.
///
/// The directory and its keys are made where they are absent. Works beside a running relay,
/// which needs no notice. Blocks for a few file reads.
///
/// # Errors
/// [`TokenError::Unusable`] for a workspace or user that can't be one, [`TokenError::Key`]
/// where the directory can't be used.
pub fn mint_token(dir: &Path, options: &MintOptions) -> Result<Minted, TokenError> {
    let unusable = |what: String| TokenError::Unusable { what };
    WorkspaceId::new(options.workspace.as_str()).map_err(|error| unusable(error.to_string()))?;
    check_user(&options.user).map_err(|what| unusable(what.to_owned()))?;
    let (issued_s, ttl_s) = (options.now.0 / 1000, options.ttl.as_secs());
    if ttl_s == 0 {
        return Err(unusable("it would expire at once; let it hold for at least a second".into()));
    }
    let dir = RelayDir::new(dir);
    dir.create()?;
    let relay = dir.relay_key()?.public();
    let issuer = dir.issuer_key()?;

    let mut id = [0; 16];
    getrandom::fill(&mut id).map_err(|error| TokenError::Signing { cause: error.to_string() })?;
    let expires_s = issued_s.saturating_add(ttl_s);
    let body = TokenBody {
        iss: BUILT_IN_ISSUER.into(),
        aud: Audience::One(AUDIENCE.into()),
        sub: options.user.clone(),
        ws: options.workspace.clone(),
        role: options.role.name().into(),
        exp: Seconds(expires_s),
        nbf: Some(Seconds(issued_s)),
        iat: Some(Seconds(issued_s)),
        jti: Some(URL_SAFE_NO_PAD.encode(id)),
        once: options.invite,
        rk: Some(relay.to_string()),
    };
    let mut header = Header::new(Algorithm::EdDSA);
    header.kid = Some(key_id(issuer.public().as_bytes()));
    let signing = |cause: String| TokenError::Signing { cause };
    let der = SigningKey::from_bytes(&issuer.to_seed())
        .to_pkcs8_der()
        .map_err(|_| signing("the issuer's key can't be encoded".into()))?;
    let token = jsonwebtoken::encode(&header, &body, &EncodingKey::from_ed_der(der.as_bytes()))
        .map_err(|error| signing(error.to_string()))?;
    Ok(Minted { token, expires_ms: expires_s.saturating_mul(1000) })
}

/// Makes an invite: a single-use token with the relay's address.
///
/// `relay` is the address; without it, the one that the relay in `dir` last ran under.
///
/// # Errors
/// As [`mint_token`], and [`TokenError::NoAddress`].
pub fn mint_invite(dir: &Path, options: &MintOptions, relay: Option<RelayUrl>) -> Result<Invite, TokenError> {
    let relay = match relay {
        Some(relay) => relay,
        None => RelayDir::new(dir).address()?.ok_or_else(|| TokenError::NoAddress { dir: dir.to_owned() })?,
    };
    let minted = mint_token(dir, &MintOptions { invite: true, ..options.clone() })?;
    Ok(Invite { relay, workspace: options.workspace.clone(), token: minted.token })
}

/// Everything a new device needs to join, as one line of text to copy or scan.
///
/// `Display` shows the line, which is a secret until it was used; `Debug` does not.
#[derive(Clone, PartialEq, Eq)]
pub struct Invite {
    /// The relay's address, with its key where the inviter knew it.
    pub relay: RelayUrl,
    /// The workspace.
    pub workspace: String,
    /// The token. Secret.
    pub token: String,
}

/// The invite's form between prefix and end of line: JSON in base64url.
#[derive(Serialize, Deserialize)]
struct InviteBody {
    v: u32,
    relay: String,
    ws: String,
    token: String,
}

impl Invite {
    /// Reads the line; spaces and line breaks, which mail programs add, are ignored.
    ///
    /// # Errors
    /// [`TokenError::BadInvite`].
    pub fn parse(text: &str) -> Result<Self, TokenError> {
        let bad = |what| TokenError::BadInvite { what };
        if text.len() > INVITE_CHARS_MAX {
            return Err(bad("it is too long"));
        }
        let text: String = text.chars().filter(|c| !c.is_whitespace()).collect();
        let body = text.strip_prefix(INVITE_PREFIX).ok_or_else(|| bad("it begins with something else"))?;
        let body =
            URL_SAFE_NO_PAD.decode(body).map_err(|_| bad("it is cut off or has other characters in it"))?;
        let body: InviteBody = serde_json::from_slice(&body).map_err(|_| bad("it is cut off or damaged"))?;
        if body.v != INVITE_VERSION {
            return Err(bad("it was made by a newer version; update this program"));
        }
        let relay = body.relay.parse().map_err(|_| bad("the relay's address in it is none"))?;
        WorkspaceId::new(body.ws.as_str()).map_err(|_| bad("the workspace in it is none"))?;
        Ok(Self { relay, workspace: body.ws, token: body.token })
    }
}

impl FromStr for Invite {
    type Err = TokenError;

    fn from_str(text: &str) -> Result<Self, TokenError> {
        Self::parse(text)
    }
}

impl fmt::Display for Invite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let body = InviteBody {
            v: INVITE_VERSION,
            relay: self.relay.to_string(),
            ws: self.workspace.clone(),
            token: self.token.clone(),
        };
        let body = serde_json::to_vec(&body).map_err(|_| fmt::Error)?;
        write!(f, "{INVITE_PREFIX}{}", URL_SAFE_NO_PAD.encode(body))
    }
}

impl fmt::Debug for Invite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Invite")
            .field("relay", &self.relay)
            .field("workspace", &self.workspace)
            .finish_non_exhaustive()
    }
}

/// What a token says about itself, its signature unchecked.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PeekedClaims {
    /// The workspace.
    pub workspace: String,
    /// The role.
    pub role: GrantRole,
    /// The user.
    pub user: String,
    /// The key of the relay that it is for.
    pub relay_key: Option<PublicKey>,
    /// Until when devices may sign in with it, milliseconds since 1970.
    pub expires_ms: u64,
}

/// Reads a token without checking it: for a device, which trusts whoever gave it the token.
/// `None` if it is no token of this kind.
pub fn peek_claims(token: &str) -> Option<PeekedClaims> {
    let body = peek(token)?;
    let relay_key = match &body.rk {
        Some(key) => Some(key.parse().ok()?),
        None => None,
    };
    Some(PeekedClaims {
        role: GrantRole::from_name(&body.role)?,
        workspace: body.ws,
        user: body.sub,
        relay_key,
        expires_ms: body.exp.to_ms(),
    })
}

fn peek(token: &str) -> Option<TokenBody> {
    if token.len() > TOKEN_BYTES_MAX {
        return None;
    }
    let mut parts = token.split('.');
    let (_, body, _) = (parts.next()?, parts.next()?, parts.next()?);
    if parts.next().is_some() {
        return None;
    }
    serde_json::from_slice(&URL_SAFE_NO_PAD.decode(body).ok()?).ok()
}

/// The claims as they stand in a token.
#[derive(Debug, Serialize, Deserialize)]
struct TokenBody {
    iss: String,
    aud: Audience,
    sub: String,
    ws: String,
    role: String,
    exp: Seconds,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    nbf: Option<Seconds>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    iat: Option<Seconds>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    jti: Option<String>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    once: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    rk: Option<String>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(untagged)]
enum Audience {
    One(String),
    Many(Vec<String>),
}

impl Audience {
    fn includes(&self, name: &str) -> bool {
        match self {
            Audience::One(one) => one == name,
            Audience::Many(many) => many.iter().any(|one| one == name),
        }
    }
}

/// A NumericDate: seconds since 1970, by some issuers with a fraction, which is cut off.
#[derive(Clone, Copy, Debug, Serialize)]
struct Seconds(u64);

impl Seconds {
    fn to_ms(self) -> u64 {
        self.0.saturating_mul(1000)
    }
}

impl<'de> Deserialize<'de> for Seconds {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let number = serde_json::Number::deserialize(deserializer)?;
        let whole = number.as_u64().or_else(|| number.as_f64().filter(|s| *s >= 0.0).map(|s| s as u64));
        whole.map(Seconds).ok_or_else(|| serde::de::Error::custom("a time before 1970"))
    }
}

fn check_user(user: &str) -> Result<(), &'static str> {
    if user.is_empty() || user.len() > USER_BYTES_MAX || user.chars().any(char::is_control) {
        return Err("a user is named by 1 to 256 bytes without control characters");
    }
    Ok(())
}

/// The system's wall clock.
pub(crate) fn system_wall() -> WallMs {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    WallMs(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

/// Checks tokens against the issuers' keys in a relay's directory.
///
/// The directory is read again when a token names a key that is not known, and otherwise at
/// the first token after a minute, so that a key that was taken out loses its trust.
pub struct JwtVerifier {
    folder: PathBuf,
    names: BTreeMap<String, String>,
    state: RefCell<VerifierState>,
}

struct VerifierState {
    issuers: Issuers,
    read_at: Instant,
    rereads_left: u32,
    refilled_at: Instant,
}

impl JwtVerifier {
    /// Reads the trusted keys of a relay's directory. `names` maps names of issuer files to
    /// the `iss` claims of their issuers, where these differ.
    ///
    /// # Errors
    /// [`KeyError`] if the directory can't be read. A single bad file is logged and left out.
    pub fn open(dir: &RelayDir, names: BTreeMap<String, String>) -> Result<Self, KeyError> {
        let folder = dir.issuers_path();
        let (issuers, problems) = Issuers::read(&folder, &names)?;
        log_problems(&problems);
        let now = Instant::now();
        let state = VerifierState { issuers, read_at: now, rereads_left: REREADS_MAX, refilled_at: now };
        Ok(Self { folder, names, state: RefCell::new(state) })
    }

    /// How many keys are trusted now.
    pub fn key_count(&self) -> usize {
        self.state.borrow().issuers.key_count()
    }

    fn verify_body(&self, token: &str, now: WallMs) -> Result<TokenBody, (FaultCode, String)> {
        let invalid = |why: &str| (FaultCode::TokenInvalid, why.to_owned());
        if token.len() > TOKEN_BYTES_MAX {
            return Err(invalid("the token is longer than 8 KiB"));
        }
        let header = jsonwebtoken::decode_header(token).map_err(|_| invalid("this is not a JWT"))?;
        if header.alg != Algorithm::EdDSA {
            return Err(invalid("the token is not signed with EdDSA; this relay checks no other signature"));
        }
        if header.crit.is_some() {
            return Err(invalid("the token requires extensions that this relay does not know"));
        }
        // Unchecked yet: it only selects the key that has to have signed it.
        let issuer = peek(token)
            .ok_or_else(|| invalid("the token lacks claims; it needs iss, aud, sub, ws, role and exp"))?
            .iss;
        if issuer.len() > ISSUER_BYTES_MAX {
            return Err(invalid("the token's issuer is longer than 256 bytes"));
        }

        let mut state = self.state.borrow_mut();
        let stale = state.read_at.elapsed() > ISSUERS_AGE_MAX;
        if stale || (state.issuers.key(&issuer, header.kid.as_deref()).is_none() && state.take_reread()) {
            self.read_again(&mut state);
        }
        let key = state.issuers.key(&issuer, header.kid.as_deref()).ok_or_else(|| {
            invalid("this relay does not trust the key that the token names; is the token for another relay?")
        })?;
        let mut validation = Validation::new(Algorithm::EdDSA);
        // Audience and times are checked below: the library would ask the system's clock.
        validation.required_spec_claims.clear();
        validation.validate_exp = false;
        validation.validate_aud = false;
        let body = jsonwebtoken::decode::<TokenBody>(token, key, &validation)
            .map_err(|_| invalid("the token's signature is wrong"))?
            .claims;

        if !body.aud.includes(AUDIENCE) {
            return Err(invalid("the token is for another service; its aud has to be \"anabranch\""));
        }
        if now.0 >= body.exp.to_ms() {
            return Err((FaultCode::TokenExpired, "the token has expired; get a new one".into()));
        }
        if body.nbf.is_some_and(|from| from.to_ms() > now.0.saturating_add(NOT_BEFORE_LEEWAY_MS)) {
            return Err(invalid(
                "the token is not valid yet; compare the clocks of its issuer and the relay",
            ));
        }
        Ok(body)
    }

    fn read_again(&self, state: &mut VerifierState) {
        state.read_at = Instant::now();
        match Issuers::read(&self.folder, &self.names) {
            Ok((issuers, problems)) => {
                log_problems(&problems);
                state.issuers = issuers;
            }
            // What was trusted before stays so: an unreadable disk locks nobody out.
            Err(error) => tracing::error!(%error, "the issuers' keys can't be read again"),
        }
    }
}

impl VerifierState {
    fn take_reread(&mut self) -> bool {
        let seconds = self.refilled_at.elapsed().as_secs();
        if seconds > 0 {
            self.refilled_at = Instant::now();
            let earned = u32::try_from(seconds).unwrap_or(u32::MAX);
            self.rereads_left = self.rereads_left.saturating_add(earned).min(REREADS_MAX);
        }
        let left = self.rereads_left > 0;
        self.rereads_left = self.rereads_left.saturating_sub(1);
        left
    }
}

impl TokenVerifier for JwtVerifier {
    fn verify(&self, token: &str, now: WallMs) -> Result<Claims, (FaultCode, String)> {
        let invalid = |why: &str| (FaultCode::TokenInvalid, why.to_owned());
        let body = self.verify_body(token, now)?;
        let role = GrantRole::from_name(&body.role)
            .ok_or_else(|| invalid("the token's role is none of reader, writer, authority, admin"))?;
        WorkspaceId::new(body.ws.as_str()).map_err(|_| invalid("the token's workspace can't be one"))?;
        check_user(&body.sub).map_err(invalid)?;
        if body.jti.as_ref().is_some_and(|id| id.len() > TOKEN_ID_BYTES_MAX) {
            return Err(invalid("the token's jti is longer than 128 bytes"));
        }
        if body.once && body.jti.as_ref().is_none_or(String::is_empty) {
            return Err(invalid("the token is for single use but has no jti"));
        }
        // Issuers number their tokens independently.
        let token_id = body.jti.map(|id| format!("{}/{id}", body.iss)).unwrap_or_default();
        let not_before = body.nbf.or(body.iat).map_or(now.0, |from| from.to_ms().min(now.0));
        Ok(Claims {
            workspace: body.ws,
            user: body.sub,
            role,
            token_id,
            single_use: body.once,
            not_before: WallMs(not_before),
            expires: WallMs(body.exp.to_ms()),
        })
    }
}

impl fmt::Debug for JwtVerifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JwtVerifier").field("folder", &self.folder).finish_non_exhaustive()
    }
}

fn log_problems(problems: &[KeyError]) {
    for problem in problems {
        tracing::warn!(%problem, "an issuer's keys are not trusted");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    const NOW: WallMs = WallMs(1_800_000_000_000);

    struct Bench {
        _folder: tempfile::TempDir,
        dir: RelayDir,
    }

    impl Bench {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let dir = RelayDir::new(folder.path().join("relay"));
            dir.create().unwrap();
            Self { _folder: folder, dir }
        }

        fn verifier(&self) -> JwtVerifier {
            JwtVerifier::open(&self.dir, BTreeMap::new()).unwrap()
        }

        fn mint(&self, options: &MintOptions) -> String {
            mint_token(self.dir.root(), options).unwrap().token
        }

        /// Signs any body with the built-in issuer's key.
        fn sign(&self, body: &serde_json::Value, with: impl FnOnce(&mut Header)) -> String {
            let issuer = self.dir.issuer_key().unwrap();
            let mut header = Header::new(Algorithm::EdDSA);
            header.kid = Some(key_id(issuer.public().as_bytes()));
            with(&mut header);
            let der = SigningKey::from_bytes(&issuer.to_seed()).to_pkcs8_der().unwrap();
            jsonwebtoken::encode(&header, body, &EncodingKey::from_ed_der(der.as_bytes())).unwrap()
        }
    }

    fn options() -> MintOptions {
        MintOptions::new("home", "ann").ttl(Duration::from_secs(60)).now(NOW)
    }

    fn body() -> serde_json::Value {
        serde_json::json!({
            "iss": "dev", "aud": "anabranch", "sub": "ann", "ws": "home", "role": "writer",
            "exp": NOW.0 / 1000 + 60,
        })
    }

    #[test]
    fn a_minted_token_says_what_was_asked_for() {
        let bench = Bench::new();
        let verifier = bench.verifier();
        let token = bench.mint(&options().role(GrantRole::Admin));
        let claims = verifier.verify(&token, NOW).unwrap();
        assert_eq!((claims.workspace.as_str(), claims.user.as_str()), ("home", "ann"));
        assert_eq!(claims.role, GrantRole::Admin);
        assert!(!claims.single_use && claims.token_id.starts_with("dev/"));
        assert_eq!(claims.expires, WallMs(NOW.0 + 60_000));

        let peeked = peek_claims(&token).unwrap();
        assert_eq!(peeked.relay_key, Some(bench.dir.relay_key().unwrap().public()));
        assert_eq!((peeked.workspace.as_str(), peeked.expires_ms), ("home", claims.expires.0));
    }

    #[test]
    fn times_are_judged_by_the_clock_that_is_given() {
        let bench = Bench::new();
        let token = bench.mint(&options());
        let verifier = bench.verifier();
        let code = |wall: u64| verifier.verify(&token, WallMs(wall)).map_err(|(code, _)| code).map(|_| ());
        assert_eq!(code(NOW.0 + 59_999), Ok(()));
        assert_eq!(code(NOW.0 + 60_000), Err(FaultCode::TokenExpired));
        assert_eq!(code(NOW.0 - 60_000), Ok(()));
        assert_eq!(code(NOW.0 - 60_001), Err(FaultCode::TokenInvalid));
    }

    #[test]
    fn what_is_not_signed_by_a_trusted_key_is_refused() {
        let (bench, other) = (Bench::new(), Bench::new());
        let token = bench.mint(&options());
        let verifier = bench.verifier();
        let (head, signature) = token.rsplit_once('.').unwrap();
        let (header, claims) = head.split_once('.').unwrap();
        let admin =
            String::from_utf8(URL_SAFE_NO_PAD.decode(claims).unwrap()).unwrap().replace("writer", "admin");
        let unsigned = URL_SAFE_NO_PAD.encode(r#"{"alg":"none"}"#);
        let hmac = URL_SAFE_NO_PAD.encode(r#"{"alg":"HS256"}"#);
        for bad in [
            String::new(),
            "no token".into(),
            "..".into(),
            "x".repeat(TOKEN_BYTES_MAX + 1),
            head.into(),
            format!("{head}."),
            format!("{header}.{}.{signature}", URL_SAFE_NO_PAD.encode(admin)),
            format!("{unsigned}.{claims}."),
            format!("{hmac}.{claims}.{signature}"),
            other.mint(&options()),
        ] {
            let refused = verifier.verify(&bad, NOW).unwrap_err();
            assert_eq!(refused.0, FaultCode::TokenInvalid, "{bad}: {}", refused.1);
        }
    }

    #[test]
    fn a_signed_token_with_unfit_claims_is_refused() {
        let bench = Bench::new();
        bench.dir.issuer_key().unwrap();
        let verifier = bench.verifier();
        verifier.verify(&bench.sign(&body(), |_| {}), NOW).unwrap();
        verifier.verify(&bench.sign(&body(), |header| header.kid = None), NOW).unwrap();
        for (claim, value) in [
            ("aud", serde_json::json!("elsewhere")),
            ("aud", serde_json::json!(["a", "b"])),
            ("iss", serde_json::json!("acme")),
            ("role", serde_json::json!("root")),
            ("ws", serde_json::json!("")),
            ("ws", serde_json::json!("x".repeat(65))),
            ("sub", serde_json::json!("a\u{0}b")),
            ("exp", serde_json::json!(-1)),
            ("exp", serde_json::json!("soon")),
            ("once", serde_json::json!(true)),
            ("jti", serde_json::json!("x".repeat(129))),
        ] {
            let mut body = body();
            body[claim] = value;
            let refused = verifier.verify(&bench.sign(&body, |_| {}), NOW).unwrap_err();
            assert_eq!(refused.0, FaultCode::TokenInvalid, "{claim}: {}", refused.1);
        }
        for claim in ["iss", "aud", "sub", "ws", "role", "exp"] {
            let mut body = body();
            body.as_object_mut().unwrap().remove(claim);
            assert!(verifier.verify(&bench.sign(&body, |_| {}), NOW).is_err(), "{claim}");
        }
        let critical = bench.sign(&body(), |header| header.crit = Some(vec!["b64".into()]));
        assert!(verifier.verify(&critical, NOW).is_err());
        let mut fraction = body();
        fraction["exp"] = serde_json::json!(NOW.0 as f64 / 1000.0 + 1.5);
        fraction["aud"] = serde_json::json!(["elsewhere", "anabranch"]);
        verifier.verify(&bench.sign(&fraction, |_| {}), NOW).unwrap();
    }

    #[test]
    fn a_key_that_comes_later_is_found_and_one_that_goes_is_not_asked_for_endlessly() {
        let bench = Bench::new();
        let verifier = bench.verifier();
        assert_eq!(verifier.key_count(), 0);
        verifier.verify(&bench.mint(&options()), NOW).unwrap();

        // The built-in issuer's key is replaced beside the running relay.
        fs::remove_file(bench.dir.issuers_path().join("dev.key")).unwrap();
        let old = bench.mint(&options());
        verifier.verify(&old, NOW).unwrap();

        let stranger = Bench::new().mint(&options());
        for _ in 0..100 {
            assert!(verifier.verify(&stranger, NOW).is_err());
        }
        assert!(verifier.state.borrow().rereads_left < REREADS_MAX);
    }

    #[test]
    fn an_invite_survives_a_mail_program_and_shows_no_token_in_logs() {
        let bench = Bench::new();
        assert!(matches!(mint_invite(bench.dir.root(), &options(), None), Err(TokenError::NoAddress { .. })));
        let key = bench.dir.relay_key().unwrap().public();
        let url: RelayUrl = format!("quic://relay.example:4433#{key}").parse().unwrap();
        bench.dir.write_address(&url).unwrap();
        let invite = mint_invite(bench.dir.root(), &options(), None).unwrap();
        assert!(bench.verifier().verify(&invite.token, NOW).unwrap().single_use);

        let line = invite.to_string();
        let (left, right) = line.split_at(70);
        assert_eq!(Invite::parse(&format!("  {left}\r\n {right}\n")).unwrap(), invite);
        assert!(!format!("{invite:?}").contains(&invite.token));
        for end in 0..line.len() {
            assert!(Invite::parse(&line[..end]).is_err());
        }
    }

    #[test]
    fn what_cannot_stand_in_a_token_is_refused_when_it_is_made() {
        let bench = Bench::new();
        for bad in [
            MintOptions::new("", "ann"),
            MintOptions::new("home", ""),
            MintOptions::new("home", "a\nb"),
            options().ttl(Duration::ZERO),
        ] {
            assert!(matches!(mint_token(bench.dir.root(), &bad), Err(TokenError::Unusable { .. })));
        }
    }
}
