//! One paper, keystroke by keystroke.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::process::Stdio;

use serde_json::{Value, json};

use crate::world::World;

const KEYSTROKES_PER_CHANGE: usize = 100;
/// How much is typed by default.
const CHANGES: usize = 60;

/// All keystrokes as the splices that `set -` takes, and the text that they come to.
fn trace(world: &World) -> Option<(Vec<Value>, String)> {
    let Ok(file) = File::open(world.data.join("automerge-paper.json.gz")) else {
        println!("skipped: no automerge-paper.json.gz in ANABRANCH_DATA");
        return None;
    };
    let mut text = String::new();
    flate2::read::GzDecoder::new(file).read_to_string(&mut text).unwrap();
    let trace: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(trace["startContent"], "");
    let txns = trace["txns"].as_array().unwrap();
    let patches = txns.iter().flat_map(|txn| txn["patches"].as_array().unwrap().clone()).collect();
    Some((patches, trace["endContent"].as_str().unwrap().to_owned()))
}

fn typed(patches: &[Value]) -> String {
    let mut text: Vec<char> = Vec::new();
    for patch in patches {
        let number = |place: usize| usize::try_from(patch[place].as_u64().unwrap()).unwrap();
        text.splice(number(0)..number(0) + number(1), patch[2].as_str().unwrap().chars());
    }
    text.into_iter().collect()
}

/// The writer types into a process that stays, as an editor would: `watch` owns the directory,
/// and each change goes through it.
#[test]
fn a_paper_arrives_as_it_was_typed() {
    let Some(world) = World::new() else { return };
    let Some((patches, end)) = trace(&world) else { return };
    let full = std::env::var("ANABRANCH_PAPER").is_ok_and(|text| text == "full");
    let take = if full { patches.len() } else { CHANGES * KEYSTROKES_PER_CHANGE };
    let relay = world.relay();
    world.join("desk", &relay, "writer");
    world.join("shelf", &relay, "reader");
    let watch = world.watch("desk");
    let start = std::time::Instant::now();
    for splices in patches[..take].chunks(KEYSTROKES_PER_CHANGE) {
        world.edit("desk", "note", "paper", &json!({"splice": {"body": splices}}), "0s").ok();
    }
    println!("{take} keystrokes in {:?}", start.elapsed());
    let expected = typed(&patches[..take]);
    if full {
        assert_eq!(expected, end);
    }
    let sent = world.sync("desk");
    let received = world.sync("shelf");
    assert_eq!(received["received"], take.div_ceil(KEYSTROKES_PER_CHANGE));
    assert_eq!(sent["digest"], received["digest"]);
    for device in ["desk", "shelf"] {
        assert!(world.fields(device, "note", "paper")["body"] == expected, "{device} reads something else");
    }
    drop(watch);
    // Without an owner it goes on; the whole text set at once is the difference to what is there.
    let next = &patches[take.min(patches.len() - 100)..][..100];
    if !full {
        world.edit("desk", "note", "paper", &json!({"splice": {"body": next}}), "0s").ok();
    }
    let shorter: String = typed(&patches[..take]).chars().skip(10).collect();
    world.edit("desk", "note", "paper", &json!({"set": {"body": shorter}}), "0s").ok();
    world.settle(&["desk", "shelf"]);
    assert!(world.fields("shelf", "note", "paper")["body"] == shorter);
}

/// A transaction is read to its end before anything is written.
#[test]
fn what_is_typed_slowly_is_one_change() {
    let Some(world) = World::new() else { return };
    world.local("a");
    let mut child = world.command("a", &["set", "-"]).stdin(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    for line in [
        "{\"type\":\"note\",\"id\":\"n\",\"set\":{\"body\":\"a\"}}\n",
        "{\"type\":\"note\",\"id\":\"m\",\"set\":{\"body\":\"b\"}}\n",
    ] {
        stdin.write_all(line.as_bytes()).unwrap();
        stdin.flush().unwrap();
        // Others are not kept waiting by somebody who types.
        world.run("a", &["get", "note", "n"]).error("not_found", 7);
    }
    drop(stdin);
    let lines = BufReader::new(child.stdout.take().unwrap()).lines().count();
    assert_eq!((lines, child.wait().unwrap().code()), (2, Some(0)));
    assert_eq!(world.run("a", &["list", "note"]).ok().lines().len(), 2);
}
