//! Small file systems of one's own.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

/// Whether file systems can be mounted here. Says on standard error why not.
pub(crate) fn can_mount(test: &str) -> bool {
    let dir = tempfile::tempdir().unwrap();
    let tried = run("id", &["-u"]).and_then(|uid| match uid.trim() {
        "0" => Mounted::image(&make_image(dir.path(), 8), dir.path()).map(drop),
        _ => Err("it takes root".to_owned()),
    });
    if let Err(why) = &tried {
        eprintln!("SKIPPED {test}: file systems can't be mounted here: {why}");
    }
    tried.is_ok()
}

/// A file with an empty ext4.
pub(crate) fn make_image(dir: &Path, mb: u64) -> PathBuf {
    let image = dir.join("image");
    File::create(&image).unwrap().set_len(mb << 20).unwrap();
    // Nothing may be left for the kernel to write in the background.
    let eager = "lazy_itable_init=0,lazy_journal_init=0,nodiscard";
    run("mkfs.ext4", &["-q", "-F", "-m", "0", "-E", eager, &image.to_string_lossy()]).unwrap();
    image
}

/// A file system, unmounted when this is dropped, also by a panic.
pub(crate) struct Mounted {
    dir: PathBuf,
    /// The loop device under it.
    device: Option<String>,
}

impl Mounted {
    /// Mounts the image of an ext4 in `parent/mounted`. Its journal is committed by syncs only, not by
    /// the clock, so that nothing becomes durable by itself.
    pub(crate) fn image(image: &Path, parent: &Path) -> Result<Mounted, String> {
        let dir = mount_point(parent);
        let device = run("losetup", &["--find", "--show", &image.to_string_lossy()])?.trim().to_owned();
        // From here on dropping it lets go of the device.
        let mounted = Mounted { dir, device: Some(device.clone()) };
        let dir = mounted.dir.to_string_lossy();
        run("mount", &["-t", "ext4", "-o", "commit=300", &device, &dir])?;
        Ok(mounted)
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Copies the image as a power cut would leave it: with what had reached the device, as of
    /// one moment.
    pub(crate) fn copy_image(&self, image: &Path, copy: &Path) {
        loop {
            let before = self.writes();
            run("cp", &["--sparse=always", &image.to_string_lossy(), &copy.to_string_lossy()]).unwrap();
            let (writes, in_flight) = self.writes();
            if before == (writes, 0) && in_flight == 0 {
                return;
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// How many writes the device has finished, and how many requests it has not.
    fn writes(&self) -> (u64, u64) {
        let name = self.device.as_deref().unwrap().trim_start_matches("/dev/");
        let stat = fs::read_to_string(format!("/sys/block/{name}/stat")).unwrap();
        let fields: Vec<u64> = stat.split_whitespace().map(|field| field.parse().unwrap()).collect();
        (fields[4], fields[8])
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let dir = self.dir.to_string_lossy();
        if run("umount", &[&dir]).is_err() {
            // A process that was killed lets go of its files a little later.
            let _ = run("umount", &["--lazy", &dir]);
        }
        if let Some(device) = &self.device {
            let _ = run("losetup", &["--detach", device]);
        }
    }
}

fn mount_point(parent: &Path) -> PathBuf {
    let dir = parent.join("mounted");
    fs::create_dir_all(&dir).unwrap();
    dir
}

fn run(program: &str, args: &[&str]) -> Result<String, String> {
    let output = Command::new(program).args(args).output().map_err(|e| format!("{program}: {e}"))?;
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        false => Err(format!("{program}: {}", String::from_utf8_lossy(&output.stderr).trim())),
    }
}
