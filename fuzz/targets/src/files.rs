//! What stands in files and comes through sockets beside the wire: configurations, requests to the
//! owner of a directory, keys, and the small files of stores and backups. The first byte says as what
//! the rest is read; where a hash stands over it, also with the hash that it then has.

use std::path::Path;

use anabranch_cli::{reread_config, reread_line};
use anabranch_relay::RelayOptions;
use anabranch_relay::keys::read_issuer_keys;
use anabranch_store::{reread_commits, reread_entries, reread_format, reread_key, reread_manifest};
use anabranch_transport::{DeviceKey, PublicKey, read_certificate};
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};

/// How each kind of file is read. The place is the first byte of an input.
const READERS: [fn(&[u8]); 12] = [
    device_config,
    relay_config,
    owner_line,
    issuer_set,
    issuer_key,
    device_key,
    certificate,
    manifest,
    entries,
    format_line,
    commits,
    key_file,
];

/// Ed25519 keys as SubjectPublicKeyInfo and as PKCS #8 begin with these (RFC 8410).
const SPKI_PREFIX: [u8; 12] = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];
const PKCS8_PREFIX: [u8; 16] =
    [0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20];
const COMMITS_RECORD_BYTES: usize = 64;
const KEY_RECORD_BYTES: usize = 113;

pub(crate) fn run(data: &[u8]) {
    let Some((first, data)) = data.split_first() else { return };
    READERS[usize::from(*first) % READERS.len()](data);
}

fn device_config(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let (config, edited) = reread_config(text);
    if let Some(config) = config {
        assert_eq!(reread_config(&config).0, Some(config), "a configuration reads back as another");
        let edited = edited.expect("what is a configuration can be edited");
        // A line of another type than the configuration's can stand nowhere in one.
        assert!(reread_config(&edited).0.is_some(), "an edit breaks a configuration:\n{edited}");
    }
}

fn relay_config(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    match RelayOptions::new().resolve_text(text) {
        Ok(settings) => {
            assert!(settings.grant_days > 0 && settings.cache_mb > 0 && settings.unsent_mb > 0);
            assert!(!settings.dir.root().as_os_str().is_empty());
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

fn owner_line(data: &[u8]) {
    let Ok(line) = std::str::from_utf8(data) else { return };
    let (request, frame) = reread_line(line);
    if let Some(request) = request {
        let again = reread_line(std::str::from_utf8(&request).unwrap()).0;
        assert_eq!(again, Some(request), "a request reads back as another");
    }
    if let Some(frame) = frame {
        let again = reread_line(std::str::from_utf8(&frame).unwrap()).1;
        assert_eq!(again, Some(frame), "a frame reads back as another");
    }
}

fn issuer_set(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(keys) = read_issuer_keys(Path::new("x.jwks.json"), text) {
        assert!((1..=64).contains(&keys.len()), "{} keys of one issuer", keys.len());
    }
}

fn issuer_key(data: &[u8]) {
    for text in pem_forms(data, "PUBLIC KEY", &SPKI_PREFIX) {
        if let Ok(keys) = read_issuer_keys(Path::new("x.pub.pem"), &text) {
            assert_eq!(keys.len(), 1);
        }
    }
}

fn device_key(data: &[u8]) {
    for text in pem_forms(data, "PRIVATE KEY", &PKCS8_PREFIX) {
        if let Ok(key) = DeviceKey::from_pem(&text) {
            let again = DeviceKey::from_pem(&key.to_pem().unwrap()).unwrap();
            assert_eq!(again.to_seed(), key.to_seed(), "a key reads back as another");
            assert_eq!(again.public(), key.public());
        }
    }
}

/// The text itself, and what it is as DER and as the bytes of a key.
fn pem_forms(data: &[u8], label: &str, prefix: &[u8]) -> Vec<String> {
    let armour = |der: &[u8]| {
        let body = STANDARD.encode(der);
        let lines: Vec<&str> = body.as_bytes().chunks(64).flat_map(std::str::from_utf8).collect();
        format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", lines.join("\n"))
    };
    let mut forms: Vec<String> = std::str::from_utf8(data).map(str::to_owned).into_iter().collect();
    forms.push(armour(data));
    forms.push(armour(&[prefix, &data[..data.len().min(32)]].concat()));
    forms
}

fn certificate(data: &[u8]) {
    let sealed = [&SPKI_PREFIX[..], &data[..data.len().min(32)]].concat();
    for der in [data, &sealed] {
        if let Some((key, written)) = read_certificate(der) {
            assert_eq!(written, der, "a key has two encodings");
            assert_eq!(key.to_string().parse::<PublicKey>().ok(), Some(key), "a key that none can hold");
        }
    }
}

fn manifest(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    for text in [text.to_owned(), sealed_manifest(text)] {
        if let Ok(written) = reread_manifest(&text) {
            let again = reread_manifest(&written).ok();
            assert_eq!(again, Some(written), "a manifest reads back as another");
        }
    }
}

/// The hash that belongs to them stands behind the lines.
fn sealed_manifest(lines: &str) -> String {
    format!("{lines}end {}\n", blake3::hash(lines.as_bytes()).to_hex())
}

fn entries(data: &[u8]) {
    let Ok(entries) = reread_entries(data) else { return };
    let written: Vec<u8> = entries.iter().flat_map(|(key, value)| entry(key, value)).collect();
    assert_eq!(written, data, "entries have two forms");
}

fn entry(key: &[u8], value: &[u8]) -> Vec<u8> {
    [&(key.len() as u16).to_be_bytes()[..], &(value.len() as u32).to_be_bytes(), key, value].concat()
}

fn format_line(data: &[u8]) {
    for line in [data.to_vec(), sealed_format(data)] {
        if let Ok(written) = reread_format(&line) {
            let again = reread_format(written.as_bytes()).ok();
            assert_eq!(again, Some(written), "a format reads back as another");
        }
    }
}

fn sealed_format(words: &[u8]) -> Vec<u8> {
    [words, format!(" {:08x}\n", crc32fast::hash(words)).as_bytes()].concat()
}

fn commits(data: &[u8]) {
    for slots in [data.to_vec(), sealed_commits(data)] {
        if let Some(written) = reread_commits(&slots) {
            let again = reread_commits(&written).expect("a record that was written can be read");
            // Only the generation goes on.
            let facts = 16..COMMITS_RECORD_BYTES - 4;
            assert_eq!(again[facts.clone()], written[facts], "a record reads back as another");
        }
    }
}

fn sealed_commits(slots: &[u8]) -> Vec<u8> {
    let sealed = slots.chunks(COMMITS_RECORD_BYTES).map(|slot| seal(slot, b"anabcmt1", COMMITS_RECORD_BYTES));
    sealed.flatten().collect()
}

fn key_file(data: &[u8]) {
    for file in [data.to_vec(), seal(data, b"anabkey1", KEY_RECORD_BYTES)] {
        if let Some(written) = reread_key(&file) {
            assert_eq!(reread_key(&written).as_ref(), Some(&written), "a slot reads back as another");
        }
    }
}

/// A record of so many bytes, with what it begins with and the checksum at its end.
fn seal(data: &[u8], magic: &[u8; 8], bytes: usize) -> Vec<u8> {
    let mut record = data.to_vec();
    record.resize(bytes, 0);
    record[..magic.len()].copy_from_slice(magic);
    let body = bytes - 4;
    let sum = crc32fast::hash(&record[..body]);
    record[body..].copy_from_slice(&sum.to_be_bytes());
    record
}

/// A value nested as deep as TOML's parser allows: so many tables inside each other, so many keys each.
pub(crate) fn deep_toml() -> String {
    const LEVELS: usize = 78;
    let keys = "a.".repeat(LEVELS);
    format!("a = {}1{}", format!("{{ {keys}a = ").repeat(LEVELS), " }".repeat(LEVELS))
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let texts: [(u8, &[&str]); 4] = [(0, DEVICE_CONFIGS), (1, RELAY_CONFIGS), (2, LINES), (7, MANIFESTS)];
    let texts =
        texts.iter().flat_map(|(reader, texts)| texts.iter().map(move |text| (*reader, text.to_string())));
    let hash = blake3::hash(b"").to_hex();
    let mut seeds: Vec<(u8, Vec<u8>)> =
        texts.map(|(reader, text)| (reader, text.replace("HASH", &hash).into_bytes())).collect();
    // Nested as deep as it goes.
    let deep = ["a.".repeat(2_000) + "a = 1", format!("a = {}", "[".repeat(2_000)), deep_toml()];
    for deep in deep.map(String::into_bytes) {
        seeds.extend([(0, deep.clone()), (1, deep)]);
    }
    let key = DeviceKey::from_seed(&[7; 32]);
    let x = URL_SAFE_NO_PAD.encode(key.public().as_bytes());
    let mixed = format!(
        r#"{{"keys":[{{"kty":"OKP","crv":"Ed25519","x":"{x}","kid":"a"}},{{"kty":"EC","crv":"P-256"}}]}}"#
    );
    seeds.push((3, mixed.replace(r#","kid":"a""#, r#","use":"enc""#).into_bytes()));
    seeds.push((3, mixed.into_bytes()));
    seeds.push((3, br#"{"keys":[{"kty":"OKP","crv":"Ed25519","x":"AAAA"}]}"#.to_vec()));
    seeds.extend([(4, key.public().as_bytes().to_vec()), (4, [0; 32].to_vec())]);
    seeds.extend([(5, key.to_pem().unwrap().into_bytes()), (5, key.to_seed().to_vec())]);
    seeds.extend([(6, key.public().as_bytes().to_vec()), (6, [0; 32].to_vec())]);
    seeds.push((6, [&SPKI_PREFIX[..], key.public().as_bytes()].concat()));
    seeds.push((8, [entry(b"\x01key", b"value"), entry(b"\x02", b"")].concat()));
    seeds.push((8, [&entry(b"k", b"")[..2], &u32::MAX.to_be_bytes()[..], b"k"].concat()));
    seeds.extend([(9, b"anabranch-store 2 redb encrypted".to_vec()), (9, b"anabranch-store 3 x".to_vec())]);
    seeds.push((9, b"anabranch-store 1 sled-0.34\n".to_vec()));
    let record = |generation: u64, reserved: u64, durable: u64| {
        let head = [&[0; 8][..], &generation.to_be_bytes(), &[7; 16]].concat();
        seal(&[head, reserved.to_be_bytes().into(), durable.to_be_bytes().into()].concat(), b"anabcmt1", 64)
    };
    seeds.push((10, [record(4, 2048, 3), record(3, 1024, 9), record(2, 1024, 5)].concat()));
    seeds.push((10, record(1, u64::MAX, u64::MAX)));
    seeds.push((11, seal(&[0, 0, 0, 0, 0, 0, 0, 0, 1], b"anabkey1", KEY_RECORD_BYTES)));
    let argon2id =
        [&[0, 0, 0, 0, 0, 0, 0, 0, 2][..], &(64u32 << 10).to_be_bytes(), &[0, 0, 0, 3, 0, 0, 0, 4]];
    seeds.push((11, seal(&argon2id.concat(), b"anabkey1", KEY_RECORD_BYTES)));
    seeds.into_iter().map(|(reader, data)| [&[reader][..], &data].concat()).collect()
}

const DEVICE_CONFIGS: &[&str] = &[
    "device = \"phone\"\nworkspace = \"home\"\nrelay = \"quic://127.0.0.1:4433\"\ntoken = \"a.b.c\"\n",
    "device = \"phone\" # mine\nworkspace = 'home'\nbackend = \"redb\"\nencrypted = true\npassphrase_file = \"p\"\n",
    "device = \"\"\"\na\\u0000\"\"\"\nworkspace = \"\"\nencrypted = 1\n",
    "[relay]\na = 1\n[[token]]\n",
    "relay.a = 1\nrelay.a.b = 2\n",
];

const RELAY_CONFIGS: &[&str] = &[
    "data = \"x\"\nlisten = \"[::]:4433\"\npublic_address = \"relay.example:4433\"\nrequire_schema = true\n",
    "data = \"x\"\ngrant_days = 7\nstore_backend = \"sled\"\nstore_key_file = \"k\"\n[issuers]\nacme = \"https://acme.example\"\n",
    "data = \"x\"\ngrant_days = -1\ncache_mb = 4294967296\n",
    "data = \"\"\nissuers = { \"\" = \"\", a.b = \"c\" }\n",
];

const LINES: &[&str] = &[
    r#"{"version":2,"json":true,"clock_offset_ms":0,"input":null,"command":"Status"}"#,
    r#"{"version":2,"json":false,"clock_offset_ms":-5,"input":"x\u0000","command":{"Sync":{"deadline":18446744073709551615}}}"#,
    r#"{"version":2,"json":true,"clock_offset_ms":0,"input":null,"command":{"Follow":{"again":true}}}"#,
    r#"{"version":2,"json":true,"clock_offset_ms":0,"input":null,"command":{"Export":{"type_name":"thing"}}}"#,
    r#"{"version":3,"json":true,"clock_offset_ms":0,"input":null,"command":"Status"}"#,
    r#"{"is":"line","text":"a"}"#,
    r#"{"is":"progress","done":1,"total":0,"lines":true}"#,
    r#"{"is":"end","failure":null}"#,
    r#"{"is":"leaving"}"#,
];

const MANIFESTS: &[&str] = &[
    "anabranch-backup 1\nstore 2 sled plain\ncommit 4711\nentries 1200\nfile 812345 HASH entries\nfile 1 HASH files/a\n",
    "anabranch-backup 1\nstore 2 redb encrypted\ncommit 1\nentries 0\nfile 0 HASH entries\nfile 9 HASH KEY\n",
    "anabranch-backup 1\nstore 2 sled plain\nfile 0 HASH entries\nfile 0 HASH files/../a\n",
    "anabranch-backup 2\nwhatever comes\n",
];
