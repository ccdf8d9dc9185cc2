//! The fast image on disk: written once it is made, so that the next process reads it instead of making it again.
//!
//! The supervisor finds and opens the file, and later writes one, on a thread of its own; it copies bytes and looks at none.
//! A worker checks and reads it. A file's name says what it was made of and by which program, each in the state it was in.

use std::ffi::OsStr;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use bitnetd_config::{Config, HeadChoice};
use bitnetd_proto::kept::{Kept, KeptError};
use bitnetd_proto::status::{KeptImageReport, KeptImageState};
use bitnetd_proto::worker_link::ImageState;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::libc::{O_NOFOLLOW, O_NONBLOCK};
use nix::sys::statvfs::fstatvfs;
use nix::unistd::geteuid;

use crate::editions::Prepared;
use crate::image::{ModelImage, is_whole, made_of};

/// How often to look whether a worker has finished the image.
const INTERVAL: Duration = Duration::from_millis(500);
/// Images that are kept, at most; those that were not used for longest go first.
const KEPT_MAX: usize = 4;
/// Space that is left to others.
const SPACE_LEFT: u64 = 1 << 30;
/// How the names end.
const ENDING: &str = "image";

/// Why an image is not kept.
#[derive(Debug, thiserror::Error)]
enum KeepError {
    #[error("`{0}` is not a directory of ours that nobody else may write to")]
    NotOurs(PathBuf),
    #[error("another process is writing it")]
    InUse,
    #[error("{available} bytes of space are left, {needed} are needed: its own and {SPACE_LEFT} for others")]
    Space { available: u64, needed: u64 },
    #[error(transparent)]
    Kept(#[from] KeptError),
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// What there is, and why it cannot be written.
type Stage = Mutex<(Option<KeptImageState>, Option<String>)>;

/// Sees to it that the present image is on disk.
#[derive(Debug, Default)]
pub(crate) struct Keeper {
    /// What all below is about.
    image: Option<Arc<ModelImage>>,
    path: Option<PathBuf>,
    stage: Arc<Stage>,
    /// `None`: nothing is left to do.
    look_at: Option<Duration>,
}

impl Keeper {
    /// When to look again; `None`: not before there is another model.
    pub(crate) fn next_due(&self) -> Option<Duration> {
        self.look_at
    }

    /// Begins to write the image if it is whole and not there, or what was there was of no use to the workers, who say what
    /// they have.
    pub(crate) fn look(
        &mut self,
        present: &Prepared,
        workers: impl IntoIterator<Item = ImageState>,
        now: Duration,
    ) {
        if !self.image.as_ref().is_some_and(|image| Arc::ptr_eq(image, &present.image)) {
            self.begin(present);
        }
        let Some(path) = self.path.clone().filter(|_| self.look_at.is_some_and(|due| due <= now)) else {
            return;
        };
        self.look_at = Some(now + INTERVAL);
        let of_nodes = present.copies.values().map(|copy| copy.image());
        let whole = std::iter::once(present.image.head()).chain(of_nodes).find(is_whole);
        let Some(memory) = whole else { return };
        if self.stage().0 == Some(KeptImageState::Found) {
            match workers.into_iter().find(|worker| matches!(worker, ImageState::Read | ImageState::Made)) {
                None => return, // Where it came from is not known yet.
                Some(ImageState::Read) => {
                    self.look_at = None;
                    return;
                }
                Some(_) => {} // What was there was of no use.
            }
        }
        self.look_at = None;
        match memory.try_clone_to_owned() {
            Ok(memory) => write_on_a_thread(path, memory.into(), self.stage.clone()),
            Err(error) => settle(&self.stage, &path, Err(error.into())),
        }
    }

    /// What there is, in the words of the status.
    pub(crate) fn report(&self) -> Option<KeptImageReport> {
        let (state, problem) = self.stage().clone();
        Some(KeptImageReport { path: self.path.as_ref()?.display().to_string(), state: state?, problem })
    }

    fn begin(&mut self, present: &Prepared) {
        let spec = &present.spec;
        let path = path_of(spec.image_cache.as_deref(), &spec.config, &present.image);
        let found =
            if present.image.kept().is_some() { KeptImageState::Found } else { KeptImageState::Absent };
        // A thread that still writes the image of a former model speaks of that one.
        self.stage = Arc::new(Mutex::new((path.as_ref().map(|_| found), None)));
        // With one on disk and one in memory, of an earlier life, there is nothing to do.
        let is_settled = found == KeptImageState::Found && is_whole(&present.image.head());
        self.look_at = path.as_ref().filter(|_| !is_settled).map(|_| Duration::ZERO);
        (self.image, self.path) = (Some(present.image.clone()), path);
    }

    fn stage(&self) -> MutexGuard<'_, (Option<KeptImageState>, Option<String>)> {
        self.stage.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The file of the image, if there is a place for it.
fn path_of(dir: Option<&Path>, config: &Config, image: &ModelImage) -> Option<PathBuf> {
    let dir = dir.filter(|_| config.model.head != HeadChoice::File)?;
    Some(dir.join(format!("{}.{ENDING}", made_of(config, image)?)))
}

/// Opens what an earlier process kept for this model. Nothing is believed of its content.
pub(crate) fn find(dir: Option<&Path>, config: &Config, image: &ModelImage) -> Option<OwnedFd> {
    let path = path_of(dir, config, image)?;
    let mut options = OpenOptions::new();
    options.read(true).custom_flags(O_NOFOLLOW | O_NONBLOCK);
    let file = match options.open(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
        other => other.and_then(|file| Ok((file.metadata()?, file))),
    };
    let path = path.display();
    match file {
        Ok((metadata, file)) if metadata.is_file() && is_ours_alone(&metadata) => {
            // What was used last is cleared away last.
            let _read_only = file.set_modified(SystemTime::now());
            Some(file.into())
        }
        Ok(_) => {
            tracing::warn!(%path, "a fast image is not read: others may write to it");
            None
        }
        Err(error) => {
            tracing::warn!(%path, %error, "a fast image cannot be opened");
            None
        }
    }
}

/// Written by us or the system's owner, and by nobody else.
fn is_ours_alone(metadata: &std::fs::Metadata) -> bool {
    let is_owner = metadata.uid() == geteuid().as_raw() || metadata.uid() == 0;
    is_owner && metadata.mode() & 0o022 == 0
}

fn write_on_a_thread(path: PathBuf, memory: File, stage: Arc<Stage>) {
    *stage.lock().unwrap_or_else(PoisonError::into_inner) = (Some(KeptImageState::Writing), None);
    let (of_thread, of_path) = (stage.clone(), path.clone());
    let write = move || settle(&of_thread, &of_path, write(&of_path, &memory));
    if let Err(error) = std::thread::Builder::new().name("keep-image".into()).spawn(write) {
        settle(&stage, &path, Err(error.into()));
    }
}

fn settle(stage: &Stage, path: &Path, outcome: Result<usize, KeepError>) {
    let path = path.display();
    let settled = match outcome {
        Ok(n_bytes) => {
            tracing::info!(n_bytes, %path, "the fast image is kept on disk");
            (Some(KeptImageState::Kept), None)
        }
        Err(error) => {
            tracing::warn!(%path, %error, "the fast image is not kept on disk");
            (Some(KeptImageState::Failed), Some(error.to_string()))
        }
    };
    *stage.lock().unwrap_or_else(PoisonError::into_inner) = settled;
}

/// Writes `memory` to the file `path`, whole or not at all.
fn write(path: &Path, memory: &File) -> Result<usize, KeepError> {
    let dir = path.parent().unwrap_or(Path::new("/"));
    DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    let metadata = std::fs::metadata(dir)?;
    if !metadata.is_dir() || metadata.uid() != geteuid().as_raw() || metadata.mode() & 0o022 != 0 {
        return Err(KeepError::NotOurs(dir.to_owned()));
    }
    let part = path.with_extension(format!("{ENDING}.part"));
    let file = lock(&part)?;
    let written = make_room(path, memory.metadata()?.len()).and_then(|()| {
        file.set_len(0)?;
        let kept = Kept::write(memory, &file)?;
        std::fs::rename(&part, path)?;
        Ok(kept.n_bytes())
    });
    if written.is_err() {
        let _gone = std::fs::remove_file(&part);
    }
    written
}

/// The file `part`, which nobody else writes as long as it is held.
fn lock(part: &Path) -> Result<Flock<File>, KeepError> {
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(false).mode(0o600).custom_flags(O_NOFOLLOW);
    let file = Flock::lock(options.open(part)?, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| {
        if errno == Errno::EWOULDBLOCK { KeepError::InUse } else { KeepError::Io(errno.into()) }
    })?;
    // Whoever had it may have finished since, and given it another name.
    let is_still_there = std::fs::metadata(part)?.ino() == file.metadata()?.ino();
    if is_still_there { Ok(file) } else { Err(KeepError::InUse) }
}

/// Clears away what the new file `path` replaces, and the oldest of too many; then there has to be space.
fn make_room(path: &Path, n_bytes: u64) -> Result<(), KeepError> {
    let dir = path.parent().unwrap_or(Path::new("/"));
    // Made by another program, of the same model: `HEAD.ISA.MODEL.PROGRAM.image`.
    let model = |path: &Path| Some(path.file_name()?.to_str()?.rsplitn(3, '.').last()?.to_owned());
    let mut others: Vec<(SystemTime, PathBuf)> = std::fs::read_dir(dir)?
        .filter_map(|entry| {
            Some((entry.as_ref().ok()?.metadata().ok()?.modified().ok()?, entry.ok()?.path()))
        })
        .filter(|(_, other)| other.extension() == Some(OsStr::new(ENDING)) && other != path)
        .collect();
    others.sort();
    let n_beyond = (others.len() + 1).saturating_sub(KEPT_MAX);
    for (number, (_, other)) in others.iter().enumerate() {
        if number < n_beyond || model(other) == model(path) {
            tracing::debug!(path = %other.display(), "a fast image is of no use any more");
            std::fs::remove_file(other)?;
        }
    }
    let space = fstatvfs(File::open(dir)?).map_err(io::Error::from)?;
    let (available, needed) = (space.blocks_available() * space.fragment_size(), n_bytes + SPACE_LEFT);
    if available < needed { Err(KeepError::Space { available, needed }) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn memory() -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"an image").unwrap();
        file
    }

    fn names(dir: &Path) -> Vec<String> {
        let names = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name());
        let mut names: Vec<String> = names.map(|name| name.into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_new_image_replaces_that_of_another_program_and_the_oldest() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("made/by/us");
        for name in ["auto.auto.a.1", "auto.auto.a.2", "fast.auto.a.2", "auto.auto.b.2", "auto.auto.c.2"] {
            write(&dir.join(format!("{name}.image")), &memory()).unwrap();
            std::thread::yield_now();
        }
        // `a.1` went for `a.2`; four are left.
        let kept =
            ["auto.auto.a.2.image", "auto.auto.b.2.image", "auto.auto.c.2.image", "fast.auto.a.2.image"];
        assert_eq!(names(&dir), kept);
        let long_ago = SystemTime::now() - Duration::from_secs(3600);
        File::open(dir.join(kept[1])).unwrap().set_modified(long_ago).unwrap();
        write(&dir.join("auto.auto.d.2.image"), &memory()).unwrap();
        assert_eq!(names(&dir), [kept[0], kept[2], "auto.auto.d.2.image", kept[3]]);
        assert_eq!(std::fs::metadata(&dir).unwrap().mode() & 0o777, 0o700);
    }

    #[test]
    fn what_another_process_writes_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("auto.auto.a.1.image");
        std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
        let held = lock(&path.with_extension("image.part")).unwrap();
        assert!(matches!(write(&path, &memory()), Err(KeepError::InUse)));
        drop(held);
        assert_eq!(write(&path, &memory()).unwrap(), 8);
        assert_eq!(names(folder.path()), ["auto.auto.a.1.image"]);
    }

    #[test]
    fn a_directory_that_others_may_write_to_is_not_used() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
        let error = write(&folder.path().join("auto.auto.a.1.image"), &memory()).unwrap_err();
        assert!(matches!(error, KeepError::NotOurs(_)) && names(folder.path()).is_empty(), "{error}");
    }
}
