//! The fast image on disk: what one process made, the next one reads, checks, and makes again if it is not whole.

use std::fs;
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use bitnetd_proto::status::{KeptImageState, StatusReport};
use bitnetd_proto::worker_link::ImageState;

use crate::support::{Daemon, Folder, wait_for};

/// The built-in model is small: without this it has no fast image.
const FAST: &str = "[model]\nhead = \"fast\"\n";

fn story_model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/story.gguf")
}

/// The images in a directory.
fn images(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten();
    entries.map(|entry| entry.unwrap().path()).collect()
}

/// A daemon with these settings, once its image is in use, and on disk or not to be had there.
fn daemon(folder: &Folder, config: &str) -> (Daemon, StatusReport) {
    fs::write(folder.path("bitnetd.toml"), config).unwrap();
    let line = format!("serve -c %/bitnetd.toml --workers 2 --threads 1 -m {}", story_model().display());
    let daemon = Daemon::start(folder, line.trim_start_matches("serve "));
    let report = wait_for("the image is settled", || {
        let settled = |report: &StatusReport| {
            // A worker that has given it up would be waited for in vain.
            let log = daemon.log(folder);
            assert!(!log.contains("no fast image"), "{log}");
            let is_used = report.slots.iter().all(|slot| slot.load.image.is_used());
            let kept = report.kept_image.as_ref().map(|kept| kept.state);
            is_used && !matches!(kept, Some(KeptImageState::Absent | KeptImageState::Writing))
        };
        daemon.status().filter(settled)
    });
    (daemon, report)
}

/// Who has the image from where: `[read, made]`.
fn origins(report: &StatusReport) -> [usize; 2] {
    let n = |state| report.slots.iter().filter(|slot| slot.load.image == state).count();
    [n(ImageState::Read), n(ImageState::Made)]
}

fn answer(folder: &Folder) -> String {
    folder.run("generate --socket %/bitnetd.sock -p Once -n 24 --temp 0 -q").ok()
}

#[test]
fn an_image_is_kept_and_read_by_the_next_daemon() {
    let folder = Folder::new();
    let cache = folder.path("cache");
    let config = format!("{FAST}image_cache = \"{}\"\n", cache.display());
    let (first, report) = daemon(&folder, &config);
    assert_eq!((origins(&report), report.kept_image.unwrap().state), ([0, 1], KeptImageState::Kept));
    let expected = answer(&folder);
    drop(first);
    let [image] = images(&cache).try_into().unwrap();
    assert_eq!(fs::metadata(&image).unwrap().permissions().mode() & 0o777, 0o600);
    let content = fs::read(&image).unwrap();

    let (second, report) = daemon(&folder, &config);
    let kept = report.kept_image.clone().unwrap();
    assert_eq!((origins(&report), kept.state), ([1, 0], KeptImageState::Found));
    assert_eq!(kept.path, image.display().to_string());
    assert_eq!(answer(&folder), expected);
    let shown = folder.run("status --socket %/bitnetd.sock").ok();
    assert!(shown.contains("read from disk by worker") && shown.contains("kept in [DIR]/cache/"), "{shown}");
    drop(second);

    // Damage anywhere is noticed; the image is made anew, and kept in place of the damaged one.
    let middle = content.len() as u64 / 2;
    let damages: [&dyn Fn(&fs::File); 4] = [
        &|file| file.write_all_at(&[content[middle as usize] ^ 1], middle).unwrap(),
        &|file| file.write_all_at(b"what", 0).unwrap(),
        &|file| file.set_len(middle).unwrap(),
        &|file| file.set_len(0).unwrap(),
    ];
    for (number, damage) in damages.into_iter().enumerate() {
        damage(&fs::File::options().write(true).open(&image).unwrap());
        fs::write(folder.path("log"), "").unwrap();
        let (daemon, report) = daemon(&folder, &config);
        assert_eq!(origins(&report)[0], 0, "damage {number}: {report:?}");
        wait_for("the image is kept again", || {
            let kept = daemon.status()?.kept_image?;
            (kept.state == KeptImageState::Kept).then_some(())
        });
        assert_eq!(answer(&folder), expected);
        let log = daemon.log(&folder);
        assert!(log.contains("what was kept on disk is of no use"), "damage {number}: {log}");
        assert!(fs::read(&image).unwrap() == content, "damage {number}");
    }
}

#[test]
fn an_image_that_others_could_have_written_is_not_read() {
    let folder = Folder::new();
    let cache = folder.path("cache");
    let config = format!("{FAST}image_cache = \"{}\"\n", cache.display());
    drop(daemon(&folder, &config));
    let [image] = images(&cache).try_into().unwrap();
    fs::set_permissions(&image, fs::Permissions::from_mode(0o666)).unwrap();
    let (first, report) = daemon(&folder, &config);
    assert_eq!((origins(&report), report.kept_image.unwrap().state), ([0, 1], KeptImageState::Kept));
    drop(first);
    assert_eq!(fs::metadata(&image).unwrap().permissions().mode() & 0o777, 0o600, "a new one");

    // Into a directory that others may write to nothing is written, and the daemon serves all the same.
    fs::remove_file(&image).unwrap();
    fs::set_permissions(&cache, fs::Permissions::from_mode(0o777)).unwrap();
    let (_second, report) = daemon(&folder, &config);
    let kept = report.kept_image.unwrap();
    assert_eq!(kept.state, KeptImageState::Failed);
    assert!(kept.problem.unwrap().contains("nobody else may write to"));
    assert!(images(&cache).is_empty());
    let shown = folder.run("status --socket %/bitnetd.sock").ok();
    assert!(shown.contains("NOT KEPT in [DIR]/cache/"), "{shown}");
    answer(&folder);
}

#[test]
fn nothing_is_kept_where_it_is_off() {
    let folder = Folder::new();
    let (_daemon, report) = daemon(&folder, &format!("{FAST}image_cache = \"off\"\n"));
    assert_eq!((origins(&report), report.kept_image), ([0, 1], None));
    assert!(images(&folder.path("cache")).is_empty());
}

#[test]
fn an_image_can_be_prepared_before_anybody_waits() {
    let folder = Folder::new();
    let model = story_model();
    let prepare = |options: &str| folder.run(&format!("model prepare {} {options}", model.display()));
    assert!(prepare("").ok().starts_with("nothing to prepare: this model is small"));
    assert!(images(&folder.path("cache")).is_empty());
    assert!(prepare("--head fast").ok().starts_with("made and kept: `[DIR]/cache/fast.auto."));
    assert!(prepare("--head fast").ok().starts_with("there already, and whole: `[DIR]/cache/fast.auto."));
    let [image] = images(&folder.path("cache")).try_into().unwrap();
    assert_eq!(image.extension().unwrap(), "image");
    // A changed model wants a new one, and loses the old one.
    let copy = folder.path("copy.gguf");
    fs::copy(&model, &copy).unwrap();
    let of_copy = || folder.run("model prepare %/copy.gguf --head fast");
    assert!(of_copy().ok().starts_with("made and kept: "));
    assert_eq!(images(&folder.path("cache")).len(), 2);
    fs::File::options()
        .append(true)
        .open(&copy)
        .unwrap()
        .set_len(fs::metadata(&copy).unwrap().len())
        .unwrap();
    fs::File::open(&copy).unwrap().set_modified(std::time::UNIX_EPOCH).unwrap();
    assert!(of_copy().ok().starts_with("made and kept: "));

    let nowhere = folder.run("model prepare %/nowhere.gguf");
    assert_eq!(nowhere.code, Some(66), "{nowhere:?}");
    fs::write(folder.path("file"), "").unwrap();
    let mut command = folder.command(&format!("model prepare {} --head fast", model.display()));
    command.env("CACHE_DIRECTORY", folder.path("file/below"));
    let refused = folder.finish(command);
    assert!(refused.stderr.contains("cannot write `[DIR]/file/below/"), "{refused:?}");
    assert_eq!(refused.code, Some(71), "{refused:?}");
}
