//! Sign-in: a token is exchanged for a grant, and the grant is what sessions act by.

use super::layout::{UsedTokenRecord, WorkspaceHash};
use super::workspace::Draft;
use super::{Claims, RelayConfig, TokenVerifier};
use crate::clock::WallMs;
use crate::codec;
use crate::id::{DeviceId, WorkspaceId};
use crate::store::{Keyspace, Store, StoreError, View};
use crate::wire::{FaultCode, Grant, GrantRole};

/// Longest user or token id in bytes.
const CLAIM_BYTES_MAX: usize = 256;

/// Why a sign-in failed.
pub(super) type SignInFault = (FaultCode, String);

/// Who asks for what.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asked<'a> {
    pub(super) workspace: &'a WorkspaceId,
    pub(super) hash: WorkspaceHash,
    pub(super) device: DeviceId,
    pub(super) token: Option<&'a str>,
    pub(super) now: WallMs,
}

/// By which grant a device acts from now on.
#[derive(Clone, Debug)]
pub(super) enum Decision {
    /// The one it has.
    Keep(Grant),
    /// A new one, by a token.
    New {
        /// The claims.
        claims: Claims,
        /// Until when the grant holds.
        not_after_ms: u64,
    },
}

impl Decision {
    /// The grant, which is put into `draft` if it is new.
    pub(super) fn grant(self, asked: Asked<'_>, draft: &mut Draft) -> Grant {
        let (claims, not_after_ms) = match self {
            Decision::Keep(grant) => return grant,
            Decision::New { claims, not_after_ms } => (claims, not_after_ms),
        };
        draft.serial += 1;
        let grant = Grant {
            workspace: asked.workspace.as_str().to_owned(),
            device: asked.device.0,
            user: claims.user,
            role: claims.role.code(),
            types: Vec::new(),
            not_before_ms: asked.now.0,
            not_after_ms,
            serial: draft.serial,
        };
        draft.batch.put(Keyspace::GRANT, asked.hash.grant(asked.device), codec::encode(&grant));
        if claims.single_use {
            let record = UsedTokenRecord { device: asked.device.0 };
            draft.batch.put(Keyspace::GRANT, asked.hash.used_token(&claims.token_id), codec::encode(&record));
        }
        grant
    }

    /// Whose grant it is.
    pub(super) fn user(&self) -> &str {
        match self {
            Decision::Keep(grant) => &grant.user,
            Decision::New { claims, .. } => &claims.user,
        }
    }
}

/// Whether a grant still holds. Its beginning is not looked at: the relay itself gave it, and
/// a relay whose clock was set back must not lock everybody out.
pub(super) fn holds(grant: &Grant, now: WallMs) -> bool {
    now.0 < grant.not_after_ms && GrantRole::from_code(grant.role).is_some()
}

/// Decides a sign-in: by the token, else by the grant that the device has.
pub(super) fn decide(
    store: &dyn Store,
    verifier: &dyn TokenVerifier,
    config: &RelayConfig,
    asked: Asked<'_>,
) -> Result<Result<Decision, SignInFault>, StoreError> {
    let stored: Option<Grant> = store
        .get(View::Latest, Keyspace::GRANT, &asked.hash.grant(asked.device))?
        .map(|bytes| codec::decode(&bytes, "a grant"))
        .transpose()?;
    let valid = stored.clone().filter(|grant| holds(grant, asked.now));
    let Some(token) = asked.token else {
        return Ok(match (valid, stored) {
            (Some(grant), _) => Ok(Decision::Keep(grant)),
            (None, Some(_)) => Err((
                FaultCode::TokenExpired,
                "the grant of this device has expired; sign in with a token".into(),
            )),
            (None, None) => Err((
                FaultCode::NotSignedIn,
                format!("this device has no grant for {}; sign in with a token", asked.workspace),
            )),
        });
    };
    let (claims, bound) = match check(store, verifier, asked, token)? {
        Ok(checked) => checked,
        // The right that the device already has outlives the token that it came by.
        Err((FaultCode::TokenExpired | FaultCode::TokenUsed, _)) if valid.is_some() => {
            return Ok(valid.map(Decision::Keep).ok_or((FaultCode::Internal, String::new())));
        }
        Err(fault) => return Ok(Err(fault)),
    };
    // A token that says what the grant says, while half of the grant's time is left, costs no
    // write: devices that show their token at each reconnect would wear out the disk.
    let enough = claims.expires.0.max(asked.now.0.saturating_add(config.grant_ms / 2));
    Ok(Ok(match valid {
        Some(grant)
            if bound
                && grant.user == claims.user
                && grant.role == claims.role.code()
                && grant.not_after_ms >= enough =>
        {
            Decision::Keep(grant)
        }
        _ => Decision::New {
            not_after_ms: claims.expires.0.max(asked.now.0.saturating_add(config.grant_ms)),
            claims,
        },
    }))
}

/// Checks a token for this workspace and device. Returns its claims, and whether there is
/// nothing left to store about the token: it may be used often, or is bound to the device.
fn check(
    store: &dyn Store,
    verifier: &dyn TokenVerifier,
    asked: Asked<'_>,
    token: &str,
) -> Result<Result<(Claims, bool), SignInFault>, StoreError> {
    let claims = match verifier.verify(token, asked.now) {
        Ok(claims) => claims,
        Err(fault) => return Ok(Err(fault)),
    };
    if claims.workspace != asked.workspace.as_str() {
        return Ok(Err((
            FaultCode::WrongWorkspace,
            format!("the token is not for the workspace {}", asked.workspace),
        )));
    }
    if claims.user.len() > CLAIM_BYTES_MAX || claims.token_id.len() > CLAIM_BYTES_MAX {
        return Ok(Err((
            FaultCode::TokenInvalid,
            format!("the token's user or id is longer than {CLAIM_BYTES_MAX} bytes"),
        )));
    }
    if claims.expires <= asked.now {
        return Ok(Err((FaultCode::TokenExpired, "the token has expired; get a new one".into())));
    }
    if !claims.single_use {
        return Ok(Ok((claims, true)));
    }
    let key = asked.hash.used_token(&claims.token_id);
    let Some(bytes) = store.get(View::Latest, Keyspace::GRANT, &key)? else {
        return Ok(Ok((claims, false)));
    };
    let used: UsedTokenRecord = codec::decode(&bytes, "the record of a used token")?;
    Ok(if used.device == asked.device.0 {
        Ok((claims, true))
    } else {
        Err((FaultCode::TokenUsed, "another device has used this invite; ask for a new one".into()))
    })
}
