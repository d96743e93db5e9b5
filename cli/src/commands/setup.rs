//! `relay`, `token` and `init`.

use std::time::Duration;

use anabranch::RelayUrl;
use anabranch_relay::{Invite, MintOptions, RelayDaemon, RelayOptions, mint_invite, mint_token, peek_claims};
use serde_json::json;

use super::time;
use crate::args::{Global, InitArgs, RelayArgs, Role, TokenArgs};
use crate::config::{DeviceConfig, DeviceDir, parse_schema, read_text};
use crate::failure::{Category, Failure};
use crate::output::Output;
use crate::owner::{Listener, Owner, Parting};

pub(crate) async fn relay(global: Global, args: RelayArgs, output: &mut Output) -> Result<(), Failure> {
    let mut options = RelayOptions::new();
    options.dev = args.dev;
    options.config = args.config;
    options.data = global.data;
    options.listen = args.listen;
    options.public_address = args.public_address;
    options.new_epoch = args.new_epoch;
    options.clock_offset_ms = global.clock_offset;
    if args.check {
        let settings = options.check()?;
        let object = json!({
            "data": settings.dir.root().display().to_string(),
            "listen": settings.listen.to_string(),
            "public_address": settings.public_address,
            "require_schema": settings.require_schema,
            "grant_days": settings.grant_days,
        });
        let text = format!(
            "the configuration is in order: {} on {}",
            settings.dir.root().display(),
            settings.listen
        );
        return output.result(object, text).await;
    }
    let (started, listening) = tokio::sync::oneshot::channel();
    let run = RelayDaemon::run_until_signal(options, |handle| {
        let key = handle.url().key().map(|key| key.to_string());
        let _ =
            started.send((handle.url().to_string(), key, handle.upkeep().clone(), handle.dir().to_owned()));
    });
    let announce = async {
        if let Ok((url, key, upkeep, root)) = listening.await {
            match Listener::bind(&root) {
                Ok(listener) => {
                    let owner = Owner::Relay { upkeep, root };
                    let forever = std::future::pending::<()>();
                    drop(tokio::spawn(async move {
                        listener.serve_during(&owner, Parting::Soon, forever).await;
                    }));
                }
                // Without it the relay has to be stopped for a backup.
                Err(failure) => tracing::warn!(error = failure.message, "no commands are taken"),
            }
            let object = json!({ "event": "listening", "url": url, "key": key });
            let text = format!("devices reach this relay at {url}\nCtrl-C stops it");
            // The relay goes on without whoever started it.
            let _ = output.result(object, text).await;
            let _ = output.flush().await;
        }
    };
    let (result, ()) = tokio::join!(run, announce);
    Ok(result?)
}

pub(crate) async fn token(global: Global, args: TokenArgs, output: &mut Output) -> Result<(), Failure> {
    let Some(dir) = global.data else {
        return Err(Failure::usage("no_data_dir", "no directory was given").help("give --data RELAY_DIR"));
    };
    let mut options = match args.invite {
        true => MintOptions::invite(&args.workspace, &args.user),
        false => MintOptions::new(&args.workspace, &args.user),
    };
    options = options.role(args.role.grant());
    if let Some(ttl_ms) = args.ttl {
        options = options.ttl(Duration::from_millis(ttl_ms));
    }
    options.now.0 = options.now.0.saturating_add_signed(global.clock_offset);
    if args.invite {
        let relay = args.relay.as_deref().map(relay_url).transpose()?;
        let invite = mint_invite(&dir, &options, relay)?;
        let object = json!({
            "invite": invite.to_string(),
            "workspace": invite.workspace,
            "relay": invite.relay.to_string(),
        });
        return output.result(object, invite.to_string()).await;
    }
    let minted = mint_token(&dir, &options)?;
    let object = json!({ "token": minted.token, "expires": time(minted.expires_ms) });
    output.result(object, minted.token).await
}

impl Role {
    fn grant(self) -> anabranch_relay::GrantRole {
        use anabranch_relay::GrantRole;
        match self {
            Role::Reader => GrantRole::Reader,
            Role::Writer => GrantRole::Writer,
            Role::Authority => GrantRole::Authority,
            Role::Admin => GrantRole::Admin,
        }
    }
}

pub(crate) async fn init(global: Global, args: InitArgs, output: &mut Output) -> Result<(), Failure> {
    let dir = DeviceDir::new(&global)?;
    let source = read_text(&args.schema)?;
    let schema = parse_schema(&source, &args.schema)?;
    let (workspace, relay, token) = match args.invite {
        Some(text) => {
            let invite = Invite::parse(&text)?;
            (invite.workspace, Some(invite.relay), Some(invite.token))
        }
        None => {
            let relay = args.relay.as_deref().map(relay_url).transpose()?;
            (args.workspace.unwrap_or_default(), relay, args.token)
        }
    };
    check_name("workspace", &workspace)?;
    check_name("device", &args.device)?;
    let relay = match relay {
        Some(url) if url.key().is_none() => {
            let claims = token.as_deref().and_then(peek_claims);
            let key = claims.and_then(|claims| claims.relay_key).ok_or_else(|| {
                Failure::usage(
                    "no_relay_key",
                    "neither the relay's address nor the token tells the relay's key",
                )
                .help("give the address as the relay prints it: quic://HOST:PORT#KEY")
            })?;
            Some(url.with_key(key))
        }
        other => other,
    };
    if token.as_ref().is_some_and(|token| token.trim().is_empty()) {
        return Err(Failure::new(Category::Usage, "no_token", "the token is empty"));
    }
    let key = dir.given_key()?;
    if let Some(key) = &key {
        key.check_new().map_err(|error| Failure::usage("bad_passphrase", error.to_string()))?;
    }
    // As long as it is where it was, later commands need not be told.
    let passphrase_file = match &global.passphrase_file {
        Some(path) => Some(path.canonicalize().map_err(|error| Failure::storage("find", path, &error))?),
        None => None,
    };
    let config = DeviceConfig {
        device: args.device,
        workspace,
        relay: relay.map(|url| url.to_string()),
        token: token.map(|token| token.trim().to_owned()),
        backend: args.backend.map(|kind| kind.name().to_owned()),
        encrypted: key.is_some(),
        passphrase_file,
    };
    dir.create(&config, &source)?;
    let root = dir.root().display().to_string();
    let object = json!({
        "data": root, "device": config.device, "workspace": config.workspace, "relay": config.relay,
        "backend": config.backend, "encrypted": config.encrypted, "types": schema.types.len(),
    });
    let text = format!("{root} is now device {:?} of workspace {:?}", config.device, config.workspace);
    output.result(object, text).await
}

fn relay_url(text: &str) -> Result<RelayUrl, Failure> {
    text.parse::<RelayUrl>().map_err(|error| {
        Failure::usage("bad_relay_url", error.to_string()).help("it looks like quic://HOST:PORT#KEY")
    })
}

fn check_name(what: &str, name: &str) -> Result<(), Failure> {
    let bytes = name.len();
    if name.trim().is_empty() || bytes > 64 || name.chars().any(char::is_control) {
        let message = format!("{what} {name:?} is no name; give 1 to 64 bytes without control characters");
        return Err(Failure::usage("bad_name", message));
    }
    Ok(())
}
