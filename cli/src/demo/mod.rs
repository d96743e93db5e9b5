//! `demo`: a relay and three devices, told as a story. Every value in it was read from what a
//! process printed, and what must hold is checked.

mod cast;

use std::collections::BTreeMap;

use anabranch::Schema;
use anabranch::schema::Policy;
use serde_json::{Value as Json, json};

use crate::args::DemoArgs;
use crate::config::read_text;
use crate::failure::Failure;
use crate::output::Output;
use cast::{Relay, Stage, failed};

const SCHEMA: &str = include_str!("schema.toml");
const EXERCISES: &str = include_str!("exercises.json");
/// The one that speaks for the backend, and two people's devices.
const DEVICES: [&str; 3] = ["coach", "phone", "tablet"];
/// Training days that the tablet imports when it is killed: several chunks of an import.
const LOG_ENTRIES: usize = 1_000;
/// Rounds of syncs after which everybody must have everything.
const ROUNDS_MAX: usize = 5;

pub(crate) async fn demo(args: DemoArgs, output: &mut Output) -> Result<(), Failure> {
    let exercises = match &args.exercises {
        Some(file) => read_text(file)?,
        None => EXERCISES.to_owned(),
    };
    let dir = tempfile::Builder::new()
        .prefix("anabranch-demo-")
        .tempdir()
        .map_err(|error| Failure::storage("create a directory in", &std::env::temp_dir(), &error))?;
    let stage = Stage::new(dir.path())?;
    let schema = crate::config::parse_schema(SCHEMA, "demo schema".as_ref())?;
    let mut story = Story { stage, schema, output, scene: 0 };
    let told = story.tell(&exercises).await;
    if args.keep {
        let path = dir.keep();
        output.note(format!("kept: {}", path.display())).await?;
    }
    told
}

struct Story<'a> {
    stage: Stage,
    schema: Schema,
    output: &'a mut Output,
    scene: u32,
}

/// What a device wrote into a field while it was alone.
struct Written {
    device: &'static str,
    field: &'static str,
    text: &'static str,
}

impl Story<'_> {
    async fn tell(&mut self, exercises: &str) -> Result<(), Failure> {
        self.write_files(exercises)?;
        let relay = self.meet().await?;
        self.share_reference_data().await?;
        self.share_sessions().await?;
        let address = relay.address().to_owned();
        self.go_offline(relay).await?;
        self.kill_an_import().await?;
        let written = self.edit_apart().await?;
        let _relay = self.rejoin(&address).await?;
        self.show_what_became(&written).await?;
        self.settle().await?;
        self.prove().await
    }

    async fn say(&mut self, text: impl Into<String>) -> Result<(), Failure> {
        let text = text.into();
        let object = json!({ "event": "story", "scene": self.scene, "text": text });
        self.output.result(object, format!("   {text}")).await?;
        self.output.flush().await
    }

    async fn scene(&mut self, title: &str) -> Result<(), Failure> {
        self.scene += 1;
        let object = json!({ "event": "scene", "scene": self.scene, "text": title });
        self.output.result(object, format!("\n{}. {title}", self.scene)).await?;
        self.output.flush().await
    }

    fn write_files(&self, exercises: &str) -> Result<(), Failure> {
        let log: Vec<Json> = (0..LOG_ENTRIES)
            .map(|day| json!({ "id": format!("day-{day:04}"), "day": day, "reps": reps_of_day(day) }))
            .collect();
        let log = Json::Array(log).to_string();
        for (name, text) in [("schema.toml", SCHEMA), ("exercises.json", exercises), ("log.json", &log)] {
            let path = self.stage.path(name);
            std::fs::write(&path, text).map_err(|error| Failure::storage("write", &path, &error))?;
        }
        Ok(())
    }

    fn file(&self, name: &str) -> String {
        self.stage.path(name).display().to_string()
    }

    fn join(&self, device: &str, role: &str) -> Result<(), Failure> {
        let token = ["token", "--workspace", "gym", "--user", device, "--role", role, "--invite"];
        let invite = self.stage.must("relay", &token)?.object()?;
        let invite = text(&invite["invite"]);
        let schema = self.file("schema.toml");
        self.stage.must(device, &["init", "--device", device, "--schema", &schema, "--invite", &invite])?;
        Ok(())
    }

    async fn meet(&mut self) -> Result<Relay, Failure> {
        self.scene("A relay, a coach's server, a phone and a tablet").await?;
        let relay = self.stage.relay("127.0.0.1:0")?;
        self.say(format!("The relay listens on {} (QUIC).", relay.address())).await?;
        for device in DEVICES {
            let role = if device == "coach" { "authority" } else { "writer" };
            self.join(device, role)?;
            self.say(format!("{device} joins by a single-use invite, as {role}.")).await?;
        }
        self.stage.must("coach", &["schema", "push"])?;
        self.say("coach pushes the schema: from now on the relay checks every change by it.").await?;
        Ok(relay)
    }

    async fn share_reference_data(&mut self) -> Result<(), Failure> {
        self.scene("Reference data: the coach writes it, everybody reads it").await?;
        let file = self.file("exercises.json");
        let imported = self.stage.must("coach", &["import", &file, "--type", "exercise"])?.object()?;
        let sync = self.sync("coach")?;
        self.say(format!("coach imports {} exercises and sends {}.", imported["imported"], sync["sent"]))
            .await?;
        for device in ["phone", "tablet"] {
            let sync = self.sync(device)?;
            self.say(format!("{device} syncs and receives {}.", sync["received"])).await?;
        }
        let first = self.stage.must("phone", &["list", "exercise", "--limit", "1"])?;
        if first.text.is_empty() {
            return Err(failed("there are no exercises; the file needs at least one".to_owned()));
        }
        let id = text(&first.object()?["id"]);
        let refused = self.stage.run("phone", &["set", "exercise", &id, "name=Mine now"])?;
        if refused.code != Some(3) {
            return Err(failed(format!("phone changed reference data (exit code {:?})", refused.code)));
        }
        self.say(format!("phone tries to rename {id:?} and is refused: {}.", refused.error())).await
    }

    async fn share_sessions(&mut self) -> Result<(), Failure> {
        self.scene("Three sessions that all of them know").await?;
        let monday = [
            "set",
            "session",
            "monday",
            "title=Monday",
            "target_kg=60",
            "mood=calm",
            "best_kg=90",
            "reps+=3",
            "tags+=legs",
            "notes=Warm up, then squats.",
            "weight_kg=80",
            "sets=3",
        ];
        self.stage.must("phone", &monday)?;
        self.stage.must("phone", &["set", "session", "tuesday", "title=Tuesday"])?;
        self.stage.must("phone", &["set", "session", "wednesday", "title=Wednesday"])?;
        self.settle_down().await?;
        let monday = self.stage.must("tablet", &["get", "session", "monday"])?.object()?;
        self.say(format!("phone creates monday, tuesday and wednesday; tablet sees {}.", monday["fields"]))
            .await
    }

    async fn go_offline(&mut self, relay: Relay) -> Result<(), Failure> {
        self.scene("The relay goes down").await?;
        drop(relay);
        let sync = self.stage.run("phone", &["sync", "--deadline", "1s"])?;
        if sync.code != Some(6) || sync.object()?["outcome"] != "offline" {
            return Err(failed(format!("phone synced without a relay (exit code {:?})", sync.code)));
        }
        self.say("The relay process is killed (SIGKILL).").await?;
        self.say(format!("phone syncs: {}, because {}.", text(&sync.object()?["outcome"]), sync.error()))
            .await
    }

    async fn kill_an_import(&mut self) -> Result<(), Failure> {
        self.scene("The tablet is killed in the middle of its work").await?;
        let file = self.file("log.json");
        let import = ["import", &file, "--type", "log_entry", "--progress"];
        let (acknowledged, killed) = self.stage.import_and_kill("tablet", &import)?;
        let end = if killed { "killed (SIGKILL)" } else { "over before the signal came" };
        self.say(format!(
            "tablet imports {LOG_ENTRIES} log entries; after it has told that {acknowledged} are saved, it is {end}."
        ))
        .await?;
        let found = self.count("tablet", "log_entry")?;
        if (found as u64) < acknowledged {
            return Err(failed(format!("of {acknowledged} entries told as saved, {found} are there")));
        }
        self.say(format!("Started again it has {found}: everything that it had acknowledged.")).await?;
        self.stage.must("tablet", &import)?;
        let found = self.count("tablet", "log_entry")?;
        if found != LOG_ENTRIES {
            return Err(failed(format!("{found} log entries instead of {LOG_ENTRIES}")));
        }
        let entries = self.stage.must("tablet", &["list", "log_entry"])?.lines()?;
        let reps = entries.iter().filter_map(|entry| entry["fields"]["reps"].as_u64()).sum::<u64>();
        let expected = (0..LOG_ENTRIES).map(reps_of_day).sum::<usize>() as u64;
        if reps != expected {
            return Err(failed(format!("the log counts {reps} repetitions instead of {expected}")));
        }
        self.say(format!("It imports the same file again: {found} entries, and their counters sum to {reps}, as in the file."))
            .await
    }

    /// The order below is the order in time.
    async fn edit_apart(&mut self) -> Result<Vec<Written>, Failure> {
        self.scene("All three edit the same things, each alone").await?;
        let edits: [(&'static str, &[(&'static str, &'static str)]); 3] = [
            (
                "phone",
                &[
                    ("title", "title=Leg day"),
                    ("started_by", "started_by=Ann"),
                    ("mood", "mood=strong"),
                    ("best_kg", "best_kg=102.5"),
                    ("reps", "reps+=10"),
                    ("tags", "tags+=heavy"),
                    ("tags", "tags+=legs"),
                    ("days", "days.mon=5x5"),
                    ("plan", "weight_kg=100"),
                    ("plan", "sets=5"),
                ],
            ),
            (
                "coach",
                &[
                    ("title", "title=Strength A"),
                    ("target_kg", "target_kg=75"),
                    ("mood", "mood=tired"),
                    ("reps", "reps+=2"),
                ],
            ),
            (
                "tablet",
                &[
                    ("title", "title=Squats"),
                    ("started_by", "started_by=Ben"),
                    ("target_kg", "target_kg=120"),
                    ("best_kg", "best_kg=97.5"),
                    ("reps", "reps+=20"),
                    ("tags", "tags+=evening"),
                    ("tags", "tags-=legs"),
                    ("days", "days.tue=rest"),
                    ("plan", "weight_kg=90"),
                    ("plan", "sets=8"),
                ],
            ),
        ];
        let mut written = Vec::new();
        for (device, fields) in edits {
            let mut arguments = vec!["set", "session", "monday"];
            arguments.extend(fields.iter().map(|(_, assignment)| *assignment));
            self.stage.must(device, &arguments)?;
            self.say(format!("{device} sets on monday: {}", arguments[3..].join(", "))).await?;
            written.extend(fields.iter().map(|(field, text)| Written { device, field, text }));
        }
        for (device, splice, told) in [
            ("phone", r#"[0,0,"Slept well. "]"#, "writes \"Slept well. \" before the notes"),
            ("tablet", r#"[14,6,"deadlifts"]"#, "replaces the word \"squats\" in the notes"),
        ] {
            let line = format!(r#"{{"type":"session","id":"monday","splice":{{"notes":[{splice}]}}}}"#);
            self.stage.must_with_input(device, &["set", "-"], Some(&line))?;
            self.say(format!("{device} {told}.")).await?;
        }
        self.stage.must("tablet", &["delete", "session", "tuesday"])?;
        self.stage.must("phone", &["set", "session", "tuesday", "title=Tuesday, moved"])?;
        self.say("tablet deletes tuesday; after that phone, which does not know, renames it.").await?;
        self.stage.must("phone", &["set", "session", "wednesday", "title=Wednesday, long"])?;
        self.stage.must("tablet", &["delete", "session", "wednesday"])?;
        self.say("phone renames wednesday; after that tablet, which does not know, deletes it.").await?;
        for device in DEVICES {
            let status = self.stage.must(device, &["status"])?.object()?;
            self.say(format!("{device} has {} to send.", status["pending"])).await?;
        }
        Ok(written)
    }

    async fn rejoin(&mut self, address: &str) -> Result<Relay, Failure> {
        self.scene("The relay is back; the devices rejoin").await?;
        let relay = self.stage.relay(address)?;
        for device in ["tablet", "coach", "phone"] {
            let sync = self.sync(device)?;
            self.say(format!("{device} syncs: {} sent, {} received.", sync["sent"], sync["received"]))
                .await?;
        }
        let rounds = self.settle_down().await?;
        self.say(format!("After {rounds} more rounds nothing moves any more.")).await?;
        Ok(relay)
    }

    async fn show_what_became(&mut self, written: &[Written]) -> Result<(), Failure> {
        self.scene("What became of it").await?;
        let now = self.same_everywhere("monday")?;
        let fields = now["fields"].clone();
        let mut shown = Vec::new();
        for Written { field, .. } in written {
            if shown.contains(field) {
                continue;
            }
            shown.push(*field);
            let (policy, value) = self.policy_and_value(field, &fields)?;
            let policy = if value.is_object() && *field == "days" { "map, each key" } else { policy.name() };
            let mut sides = Vec::new();
            for device in DEVICES {
                let of = |other: &&Written| other.field == *field && other.device == device;
                let wrote: Vec<&str> = written.iter().filter(of).map(|other| other.text).collect();
                if !wrote.is_empty() {
                    sides.push(format!("{device} {}", wrote.join(" ")));
                }
            }
            self.say(format!("{field:<10} {policy:<13} {:<62} → {value}", sides.join(", "))).await?;
        }
        let (policy, value) = self.policy_and_value("notes", &fields)?;
        self.say(format!("{:<10} {:<13} {:<62} → {value}", "notes", policy.name(), "both edits")).await?;
        self.check_monday(&fields)?;

        let tuesday = self.same_everywhere("tuesday")?;
        self.say(format!(
            "tuesday was edited after it was deleted: it lives, as {}.",
            tuesday["fields"]["title"]
        ))
        .await?;
        must_be("tuesday's title", &tuesday["fields"]["title"], &json!("Tuesday, moved"))?;
        for device in DEVICES {
            let code = self.stage.run(device, &["get", "session", "wednesday"])?.code;
            if code != Some(7) {
                return Err(failed(format!("wednesday is not gone from {device} (exit code {code:?})")));
            }
        }
        self.say("wednesday was deleted after it was edited: it is gone, and the lost edit is reported.")
            .await
    }

    fn policy_and_value(&self, field: &str, fields: &Json) -> Result<(Policy, Json), Failure> {
        let unknown = || failed(format!("the schema has no {field}"));
        let session = self.schema.types.get("session").ok_or_else(unknown)?;
        if let Some(group) = session.groups.get(field) {
            let members: serde_json::Map<String, Json> =
                group.members.iter().map(|member| (member.clone(), fields[member].clone())).collect();
            return Ok((group.policy, Json::Object(members)));
        }
        let policy = session.fields.get(field).ok_or_else(unknown)?.policy;
        Ok((policy, fields[field].clone()))
    }

    /// The values that the policies lead to, whatever the order of arrival.
    fn check_monday(&self, fields: &Json) -> Result<(), Failure> {
        for (field, value) in [
            ("title", json!("Squats")),
            ("started_by", json!("Ann")),
            ("target_kg", json!(75.0)),
            ("mood", json!("strong")),
            ("best_kg", json!(102.5)),
            ("reps", json!(35)),
            ("tags", json!(["evening", "heavy", "legs"])),
            ("days", json!({ "mon": "5x5", "tue": "rest" })),
            ("notes", json!("Slept well. Warm up, then deadlifts.")),
        ] {
            must_be(&format!("{field} of monday"), &fields[field], &value)?;
        }
        Ok(())
    }

    async fn settle(&mut self) -> Result<(), Failure> {
        self.scene("What waits for a person").await?;
        let open = self.stage.must("phone", &["conflicts"])?;
        for device in DEVICES {
            let theirs = self.stage.must(device, &["conflicts"])?;
            if theirs.text != open.text {
                return Err(failed(format!("{device} sees other conflicts than phone")));
            }
        }
        let open = open.lines()?;
        for conflict in &open {
            let sides: Vec<String> = conflict["sides"]
                .as_array()
                .into_iter()
                .flatten()
                .map(|side| format!("{} wrote {}", text(&side["device"]), side["value"]))
                .collect();
            let (id, field, kind) =
                (text(&conflict["id"]), text(&conflict["field"]), text(&conflict["kind"]));
            self.say(format!("{id}, {field} ({kind}): {}; before, {}", sides.join("; "), conflict["base"]))
                .await?;
        }
        let mut kinds: Vec<String> = open.iter().map(|conflict| text(&conflict["kind"])).collect();
        kinds.sort();
        if kinds != ["lost_edit", "manual"] {
            return Err(failed(format!(
                "one lost edit and one manual conflict were expected, not {kinds:?}"
            )));
        }
        self.say("All three show the same list.").await?;

        self.stage.must("tablet", &["resolve", "session", "monday", "plan", "--keep", "theirs"])?;
        self.say("tablet settles the plan and takes what phone wrote.").await?;
        self.stage.must("coach", &["resolve", "session", "wednesday", "*", "--value", "true"])?;
        self.say("coach settles wednesday and brings it back.").await?;
        self.settle_down().await?;
        let fields = self.same_everywhere("monday")?["fields"].clone();
        must_be("weight_kg of monday", &fields["weight_kg"], &json!(100.0))?;
        must_be("sets of monday", &fields["sets"], &json!(5))?;
        let wednesday = self.same_everywhere("wednesday")?["fields"]["title"].clone();
        for device in DEVICES {
            let left = self.stage.must(device, &["conflicts"])?;
            if !left.text.is_empty() {
                return Err(failed(format!("{device} still has a conflict: {}", left.text)));
            }
        }
        self.say(format!(
            "Synced, nobody has a conflict any more: the plan is {} kg, {} sets; wednesday is {wednesday}.",
            fields["weight_kg"], fields["sets"]
        ))
        .await
    }

    /// A device that joins only now has nothing but what the relay gave it: it shows what the
    /// relay holds.
    async fn prove(&mut self) -> Result<(), Failure> {
        self.scene("Proof").await?;
        self.join("witness", "reader")?;
        let mut digests = BTreeMap::new();
        for device in DEVICES.into_iter().chain(["witness"]) {
            let sync = self.sync(device)?;
            digests.insert(device, text(&sync["digest"]));
        }
        let digest = digests["witness"].clone();
        for (device, theirs) in &digests {
            self.say(format!("{device:<8} {theirs}")).await?;
        }
        if digest.is_empty() || digests.values().any(|theirs| *theirs != digest) {
            return Err(failed("the digests differ".to_owned()));
        }
        let types: Vec<String> = self.schema.types.keys().cloned().collect();
        for type_name in &types {
            let export = self.stage.must("witness", &["export", type_name])?.text;
            for device in DEVICES {
                if self.stage.must(device, &["export", type_name])?.text != export {
                    return Err(failed(format!("{device} exports other {type_name}s than the witness")));
                }
            }
            self.say(format!(
                "{} of type {type_name}: the exports are equal byte by byte.",
                export.lines().count()
            ))
            .await?;
        }
        let end = "All devices and the relay agree: the witness knows only what the relay holds, and each \
                   complete sync compared digests with the relay.";
        let object = json!({ "event": "end", "equal": true, "digest": digest });
        self.output.result(object, format!("\n{end}")).await
    }

    fn sync(&self, device: &str) -> Result<Json, Failure> {
        let report = self.stage.must(device, &["sync", "--deadline", "30s"])?.object()?;
        match text(&report["outcome"]) == "complete" {
            true => Ok(report),
            false => Err(failed(format!("{device} synced with {report}"))),
        }
    }

    /// Syncs all devices in turn until a round moved nothing and the digests are equal.
    async fn settle_down(&self) -> Result<usize, Failure> {
        for round in 1..=ROUNDS_MAX {
            let reports = DEVICES.iter().map(|device| self.sync(device)).collect::<Result<Vec<_>, _>>()?;
            let quiet = reports.iter().all(|report| report["sent"] == 0 && report["received"] == 0);
            if quiet && reports.iter().all(|report| report["digest"] == reports[0]["digest"]) {
                return Ok(round);
            }
        }
        Err(failed(format!("after {ROUNDS_MAX} rounds of syncs the devices do not agree")))
    }

    fn count(&self, device: &str, type_name: &str) -> Result<usize, Failure> {
        Ok(self.stage.must(device, &["list", type_name])?.text.lines().count())
    }

    /// A session as all devices show it.
    fn same_everywhere(&self, id: &str) -> Result<Json, Failure> {
        let mut all = Vec::new();
        for device in DEVICES {
            all.push(self.stage.must(device, &["get", "session", id])?.object()?);
        }
        match all
            .iter()
            .all(|other| other["fields"] == all[0]["fields"] && other["version"] == all[0]["version"])
        {
            true => Ok(all.swap_remove(0)),
            false => Err(failed(format!("the devices show different {id}s: {all:?}"))),
        }
    }
}

fn reps_of_day(day: usize) -> usize {
    10 + day % 7
}

fn must_be(what: &str, found: &Json, expected: &Json) -> Result<(), Failure> {
    match found == expected {
        true => Ok(()),
        false => Err(failed(format!("{what} is {found}; by its policy it is {expected}"))),
    }
}

/// A string without its quotes.
fn text(value: &Json) -> String {
    value.as_str().unwrap_or_default().to_owned()
}
