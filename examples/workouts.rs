//! Two phones of one person, a relay between them, and a train without reception.
//!
//! `cargo run -p anabranch-examples --example workouts`

use std::collections::BTreeSet;
use std::error::Error;
use std::path::Path;
use std::time::Duration;

use anabranch::{Engine, Entities, Entity, Resolution, Workspace};
use anabranch_relay::{MintOptions, RelayDaemon, RelayOptions, mint_token};
use serde::{Deserialize, Serialize};

#[derive(Serialize, Deserialize, Entity, Clone, Debug, Default)]
#[entity(name = "workout", version = 1, index = "place")]
#[serde(default)]
struct Workout {
    title: String,
    place: String,
    #[merge(text)]
    notes: String,
    #[merge(counter)]
    reps: i64,
    tags: BTreeSet<String>,
    #[merge(max)]
    best_kg: f64,
    #[merge(manual)]
    partner: Option<String>,
}

const PATIENCE: Duration = Duration::from_secs(10);

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let dir = tempfile::tempdir()?;
    let relay_dir = dir.path().join("relay");
    let relay = RelayDaemon::start(RelayOptions::dev().data(&relay_dir).listen("127.0.0.1:0")).await?;
    let url = relay.url().to_string();
    let token =
        |user: &str| mint_token(&relay_dir, &MintOptions::new("home", user)).map(|minted| minted.token);

    let (first, on_first) = phone(&dir.path().join("first"), "first phone", &url, token("ann")?).await?;
    let (second, on_second) = phone(&dir.path().join("second"), "second phone", &url, token("ann")?).await?;

    let workout = Workout { title: "Legs".into(), notes: "Squats.".into(), reps: 5, ..Workout::default() };
    let id = first.create(&workout).await?; // durable here; the relay has not heard of it
    on_first.sync(PATIENCE).await?;
    on_second.sync(PATIENCE).await?;

    // In the train, on both phones.
    first
        .update(&id, |w| {
            w.reps += 10;
            w.notes.push_str(" Felt strong.");
            w.tags.insert("heavy".into());
            w.best_kg = 102.5;
            w.partner = Some("Ben".into());
        })
        .await?;
    second
        .update(&id, |w| {
            w.reps += 20;
            w.notes.insert_str(0, "Warm up. ");
            w.tags.insert("evening".into());
            w.best_kg = 97.5;
            w.partner = Some("Cleo".into());
        })
        .await?;
    for workspace in [&on_first, &on_second, &on_first] {
        workspace.sync(PATIENCE).await?;
    }

    println!("{:#?}", first.get(&id).await?);
    for conflict in on_first.conflicts().await? {
        println!("{} waits for a person:", conflict.field);
        for side in &conflict.sides {
            println!("  {} wrote {}", side.device, side.value);
        }
    }
    on_first.resolve("workout", &id, "partner", Resolution::Mine).await?;
    on_first.sync(PATIENCE).await?;
    on_second.sync(PATIENCE).await?;
    let partner = second.get(&id).await?.and_then(|workout| workout.partner);
    println!("Settled on one phone, settled on the other: {partner:?}");

    relay.shutdown().await?;
    Ok(())
}

async fn phone(
    dir: &Path,
    name: &str,
    url: &str,
    token: String,
) -> Result<(Entities<Workout>, Workspace), anabranch::Error> {
    let engine = Engine::builder(dir)
        .register::<Workout>()
        .device_name(name)
        .relay(url)
        .token(token)
        .background_sync(false) // an app leaves it on; a story is easier to tell step by step
        .open()
        .await?;
    let workspace = engine.workspace("home").await?;
    Ok((workspace.entities(), workspace))
}
