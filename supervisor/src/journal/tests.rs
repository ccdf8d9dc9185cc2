//! The journal by itself: what is promised of one file, also when the disk is full or the file is damaged.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::sync::atomic::{AtomicU64, Ordering};

use bitnetd_proto::durable::JobAnswer;
use bitnetd_proto::event::{FinishReason, Timings, Usage};
use bitnetd_proto::exit_code::ExitCode;
use bitnetd_proto::request::Prompt;
use proptest::prelude::*;
use redb::backends::FileBackend;
use redb::{Builder, StorageBackend};
use tempfile::TempDir;

use super::*;

struct Place(TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("jobs.redb")
    }

    fn open(&self) -> Journal {
        Journal::open(&self.path(), &DurableConfig::default()).unwrap()
    }

    fn open_with(&self, limits: &DurableConfig) -> Journal {
        Journal::open(&self.path(), limits).unwrap()
    }

    /// On a disk that has so many bytes; the number can be changed at any time.
    fn open_on(&self, disk: &Arc<AtomicU64>) -> Journal {
        let disk = disk.clone();
        let opener = move |path: &Path| {
            let io = |source| JournalError::Io { path: path.to_owned(), source };
            let file =
                File::options().read(true).write(true).create(true).truncate(false).open(path).map_err(io)?;
            let file = FileBackend::new(file).map_err(|error| io(io::Error::other(error)))?;
            let backend = SmallDisk { file, disk: disk.clone() };
            let mut builder = Builder::new();
            match builder.set_check_integrity_on_open(true).create_with_backend(backend) {
                Ok(database) => Ok(Opened::Usable(database)),
                Err(error) => file::judge(path, error),
            }
        };
        Journal::open_with(&self.path(), &DurableConfig::default(), Box::new(opener)).unwrap()
    }

    /// Files beside the journal and its lock.
    fn others(&self) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(self.0.path()).unwrap().map(|entry| entry.unwrap().path());
        let ours = [self.path(), self.0.path().join("jobs.redb.lock")];
        entries.filter(|path| !ours.contains(path)).collect()
    }
}

/// A file on a disk with an end.
#[derive(Debug)]
struct SmallDisk {
    file: FileBackend,
    disk: Arc<AtomicU64>,
}

impl SmallDisk {
    fn check(&self, end: u64) -> io::Result<()> {
        if end > self.disk.load(Ordering::Relaxed) {
            return Err(io::Error::from(io::ErrorKind::StorageFull));
        }
        Ok(())
    }
}

impl StorageBackend for SmallDisk {
    fn len(&self) -> Result<u64, io::Error> {
        self.file.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), io::Error> {
        self.file.read(offset, out)
    }

    fn set_len(&self, len: u64) -> Result<(), io::Error> {
        self.file.set_len(len) // A file with a hole: the disk is full when the hole is filled.
    }

    fn sync_data(&self) -> Result<(), io::Error> {
        self.file.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), io::Error> {
        self.check(offset + data.len() as u64)?;
        self.file.write(offset, data)
    }
}

fn request(prompt: &str) -> GenerateRequest {
    let mut request = GenerateRequest::new(Prompt::Text(prompt.into()));
    request.sampling.seed = Some(7);
    request
}

fn submit(owner: &str, key: Option<&str>, prompt: &str) -> Order {
    Order::Submit {
        owner: owner.into(),
        key: key.map(str::to_owned),
        request: Arc::new(request(prompt)),
        has_own_seed: false,
    }
}

fn done(text: &str) -> Outcome {
    Outcome::Done(Box::new(JobAnswer {
        text: text.into(),
        token_ids: vec![1, 2, 3],
        logprobs: vec![],
        finish_reason: FinishReason::Length,
        usage: Usage::default(),
        timings: Timings::default(),
        model: Some("story".into()),
    }))
}

#[track_caller]
fn job_of(applied: &Applied) -> DurableId {
    match applied {
        Applied::Submitted { job, .. } => *job,
        other => panic!("not submitted: {other:?}"),
    }
}

#[track_caller]
fn code_of(applied: &Applied) -> ErrorCode {
    match applied {
        Applied::Refused(error) => error.code,
        other => panic!("not refused: {other:?}"),
    }
}

/// Numbers of the jobs that have not ended, as the file says.
fn open_jobs(journal: &mut Journal) -> Vec<DurableId> {
    journal.reopen().unwrap();
    journal.fresh.take().unwrap().iter().map(|open| open.job).collect()
}

#[test]
fn what_was_applied_is_there_after_a_restart() {
    let place = Place::new();
    let mut journal = place.open();
    let orders: Vec<Order> = (0..5).map(|n| submit("uid:1", None, &format!("prompt {n}"))).collect();
    let jobs: Vec<DurableId> = journal.apply(&orders).unwrap().iter().map(job_of).collect();
    assert_eq!(jobs, [1, 2, 3, 4, 5]);
    journal.apply(&[Order::End { job: 2, outcome: done("two") }, Order::Start { job: 3 }]).unwrap();
    drop(journal);
    let mut journal = place.open();
    let counts = journal.counts.clone();
    assert_eq!((counts.n_open, counts.n_ended, counts.next), (4, 1, 6));
    assert_eq!(open_jobs(&mut journal), [1, 3, 4, 5]);
    let mode = std::fs::metadata(place.path()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "prompts are private");
    assert_eq!(journal.notice(), None);
}

#[test]
fn the_first_end_counts() {
    let place = Place::new();
    let mut journal = place.open();
    journal.apply(&[submit("uid:1", None, "a")]).unwrap();
    let ends = [
        Order::End { job: 1, outcome: done("first") },
        Order::End { job: 1, outcome: Outcome::Cancelled },
        Order::End { job: 9, outcome: done("nobody's") },
    ];
    let states: Vec<Option<JobState>> = journal
        .apply(&ends)
        .unwrap()
        .into_iter()
        .map(|applied| match applied {
            Applied::Ended(state) => state,
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(states, [Some(JobState::Done), Some(JobState::Done), None]);
    assert_eq!((journal.counts.n_open, journal.counts.n_ended), (0, 1));
}

#[test]
fn a_key_is_one_job_of_one_owner() {
    let place = Place::new();
    let mut journal = place.open();
    let orders = [
        submit("uid:1", Some("k"), "a"),
        submit("uid:1", Some("k"), "a"),
        submit("uid:2", Some("k"), "b"),
        submit("uid:1", Some("k"), "c"),
    ];
    let applied = journal.apply(&orders).unwrap();
    assert_eq!([0, 1, 2].map(|n| job_of(&applied[n])), [1, 1, 2]);
    assert_eq!(code_of(&applied[3]), ErrorCode::InvalidRequest);
    // Also when it has ended, and after a restart.
    journal.apply(&[Order::End { job: 1, outcome: done("x") }]).unwrap();
    drop(journal);
    let applied = place.open().apply(&orders[..1]).unwrap();
    assert!(matches!(applied[0], Applied::Submitted { job: 1, is_new: false, .. }), "{applied:?}");
}

#[test]
fn a_seed_that_is_asked_for_must_be_the_one_that_is_kept() {
    let place = Place::new();
    let mut journal = place.open();
    let with_seed = |seed| {
        let mut request = request("a");
        request.sampling.seed = Some(seed);
        Order::Submit {
            owner: "uid:1".into(),
            key: Some("k".into()),
            request: request.into(),
            has_own_seed: true,
        }
    };
    let applied = journal.apply(&[with_seed(7), with_seed(7), with_seed(8)]).unwrap();
    assert_eq!((job_of(&applied[1]), code_of(&applied[2])), (1, ErrorCode::InvalidRequest));
}

#[test]
fn limits_hold_at_the_limit_and_one_beyond() {
    let place = Place::new();
    let limits = DurableConfig { max_jobs: 3, max_per_client: 2, max_mib: 1, ..DurableConfig::default() };
    let mut journal = place.open_with(&limits);
    let mut ask =
        |owner: &str, prompt: &str| journal.apply(&[submit(owner, None, prompt)]).unwrap().remove(0);
    assert_eq!([job_of(&ask("uid:1", "a")), job_of(&ask("uid:1", "a"))], [1, 2]);
    assert_eq!(code_of(&ask("uid:1", "a")), ErrorCode::Overloaded, "this client has its share");
    assert_eq!(code_of(&ask("uid:2", &"x".repeat(1 << 20))), ErrorCode::Overloaded, "too many bytes");
    assert_eq!(job_of(&ask("uid:2", "a")), 3);
    assert_eq!(code_of(&ask("uid:3", "a")), ErrorCode::Overloaded, "too many jobs");
    journal.apply(&[Order::End { job: 1, outcome: Outcome::Cancelled }]).unwrap();
    assert_eq!(job_of(&journal.apply(&[submit("uid:1", None, "a")]).unwrap()[0]), 4);
}

#[test]
fn results_are_forgotten_when_they_are_too_many_or_too_old() {
    let place = Place::new();
    let limits = DurableConfig { results_max: 2, ..DurableConfig::default() };
    let mut journal = place.open_with(&limits);
    for job in 1..=4 {
        journal.apply(&[submit("uid:1", Some(&format!("k{job}")), "a")]).unwrap();
        journal.apply(&[Order::End { job, outcome: done("x") }]).unwrap();
    }
    assert_eq!((journal.counts.n_ended, journal.counts.n_open), (2, 0));
    // The key of a forgotten job names a new one.
    assert_eq!(job_of(&journal.apply(&[submit("uid:1", Some("k1"), "a")]).unwrap()[0]), 5);
    journal.apply(&[Order::End { job: 5, outcome: done("x") }]).unwrap();
    drop(journal);
    let limits = DurableConfig { results_keep: Duration::ZERO, ..DurableConfig::default() };
    let mut journal = place.open_with(&limits);
    while now_ms() == journal_time(&journal) {} // An end of this very millisecond is not older than nothing.
    journal.apply(&[Order::Probe]).unwrap();
    assert_eq!((journal.counts.n_ended, journal.counts.bytes), (0, 0), "{journal:?}");
}

/// When the last job ended.
fn journal_time(journal: &Journal) -> u64 {
    let guard = journal.database.read().unwrap();
    let read = guard.as_ref().unwrap().begin_read().unwrap();
    let ended = read.open_table(ENDED).unwrap();
    ended.last().unwrap().map_or(0, |(key, _)| key.value().0)
}

#[test]
fn a_journal_belongs_to_one() {
    let place = Place::new();
    let first = place.open();
    let second = Journal::open(&place.path(), &DurableConfig::default()).unwrap_err();
    assert!(matches!(second, JournalError::InUse { .. }), "{second}");
    assert_eq!(second.exit_code(), ExitCode::Temporary);
    drop(first);
    place.open();
}

#[test]
fn what_is_not_ours_is_refused_and_not_touched() {
    let place = Place::new();
    let refused = || Journal::open(&place.path(), &DurableConfig::default()).unwrap_err();
    std::fs::write(place.path(), "a shopping list").unwrap();
    assert!(matches!(refused(), JournalError::Foreign { .. }));
    assert_eq!(std::fs::read_to_string(place.path()).unwrap(), "a shopping list");
    std::fs::remove_file(place.path()).unwrap();
    // A database of another program, and one of a version to come.
    let table: redb::TableDefinition<'_, u64, u64> = redb::TableDefinition::new("theirs");
    for is_ours in [false, true] {
        let database = Database::create(place.path()).unwrap();
        let write = database.begin_write().unwrap();
        if is_ours {
            write.open_table(META).unwrap().insert(META_FORMAT, FORMAT + 1).unwrap();
        } else {
            write.open_table(table).unwrap().insert(1, 2).unwrap();
        }
        write.commit().unwrap();
        drop(database);
        let error = refused();
        assert!(matches!(error, JournalError::Foreign { .. }), "{error}");
        assert_eq!(error.exit_code(), ExitCode::Config);
        std::fs::remove_file(place.path()).unwrap();
    }
    std::fs::create_dir(place.path()).unwrap();
    refused();
    let nowhere = Journal::open(Path::new("/nowhere/at/all.redb"), &DurableConfig::default()).unwrap_err();
    assert!(matches!(nowhere, JournalError::NoFolder { .. }), "{nowhere}");
}

/// A journal with some jobs, as bytes.
fn some_file() -> Vec<u8> {
    let place = Place::new();
    let mut journal = place.open();
    for n in 0..30 {
        let prompt = format!("prompt {n} {}", "x".repeat(500));
        journal.apply(&[submit("uid:1", Some(&format!("k{n}")), &prompt)]).unwrap();
    }
    for job in 1..10 {
        journal.apply(&[Order::End { job, outcome: done(&"y".repeat(500)) }]).unwrap();
    }
    drop(journal);
    std::fs::read(place.path()).unwrap()
}

#[test]
fn a_damaged_file_is_set_aside_and_said_so() {
    let whole = some_file();
    let mut blank = whole.clone();
    blank[..4096].fill(0);
    let mut scribbled = whole.clone();
    scribbled[4096..].iter_mut().for_each(|byte| *byte ^= 0x5a);
    let cut = whole[..whole.len() / 2].to_vec();
    let stump = whole[..100].to_vec();
    for (name, damaged) in [("blank", blank), ("scribbled", scribbled), ("cut", cut), ("stump", stump)] {
        let place = Place::new();
        std::fs::write(place.path(), &damaged).unwrap();
        let mut journal = place.open();
        let others = place.others();
        assert_eq!(others.len(), 1, "{name}: {others:?}");
        assert_eq!(std::fs::metadata(&others[0]).unwrap().len(), damaged.len() as u64, "{name}");
        let notice = journal.notice().expect(name);
        assert!(notice.contains(others[0].to_str().unwrap()), "{name}: {notice}");
        // It works, and no number of the old file names a new job.
        let job = job_of(&journal.apply(&[submit("uid:1", None, "a")]).unwrap()[0]);
        assert!(job > 1_000_000_000, "{name}: {job}");
        // Said again after a restart, until somebody has seen to it.
        drop(journal);
        let journal = place.open();
        assert!(journal.notice().is_some(), "{name}");
        std::fs::remove_file(&others[0]).unwrap();
        assert_eq!(journal.notice(), None, "{name}");
    }
}

#[test]
fn a_full_disk_is_told_and_nothing_acknowledged_is_lost() {
    let place = Place::new();
    let disk = Arc::new(AtomicU64::new(u64::MAX));
    let mut journal = place.open_on(&disk);
    let prompt = "x".repeat(20_000);
    let mut acknowledged = vec![job_of(&journal.apply(&[submit("uid:1", None, &prompt)]).unwrap()[0])];
    disk.store(std::fs::metadata(place.path()).unwrap().len() / 2, Ordering::Relaxed);
    let error = loop {
        match journal.apply(&[submit("uid:1", None, &prompt)]) {
            Ok(applied) => acknowledged.push(job_of(&applied[0])),
            Err(error) => break error,
        }
        assert!(acknowledged.len() < 10_000, "the disk is never full");
    };
    assert!(!error.to_string().is_empty() && !journal.is_open());
    // Still full: it stays closed or opens with what was there, and is never taken for damaged.
    let _full = journal.reopen();
    drop(journal);
    let mut journal = place.open_on(&disk);
    assert_eq!(place.others(), Vec::<PathBuf>::new());
    disk.store(u64::MAX, Ordering::Relaxed);
    let open = open_jobs(&mut journal);
    assert!(acknowledged.iter().all(|job| open.contains(job)), "{acknowledged:?} {open:?}");
    assert!(open.len() <= acknowledged.len() + 1, "only the last one may be there unasked: {open:?}");
    let next = job_of(&journal.apply(&[submit("uid:1", None, "a")]).unwrap()[0]);
    assert!(!open.contains(&next));
}

/// One step of a history.
#[derive(Clone, Debug)]
enum Step {
    Submit {
        owner: u8,
        key: Option<u8>,
    },
    End(u64),
    Restart,
    /// The disk is full for one write.
    Full,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0..3_u8, proptest::option::of(0..6_u8)).prop_map(|(owner, key)| Step::Submit { owner, key }),
        4 => (1..30_u64).prop_map(Step::End),
        1 => Just(Step::Restart),
        1 => Just(Step::Full),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Against a map: whatever happens, what was acknowledged is there, once, and ends once.
    #[test]
    fn any_history_comes_back(steps in proptest::collection::vec(step(), 1..40)) {
        let place = Place::new();
        let disk = Arc::new(AtomicU64::new(u64::MAX));
        let mut journal = place.open_on(&disk);
        let mut model: BTreeMap<DurableId, bool> = BTreeMap::new(); // Whether it has ended.
        let mut keys: BTreeMap<(u8, u8), DurableId> = BTreeMap::new();
        for step in steps {
            match step {
                Step::Submit { owner, key } => {
                    let name = key.map(|key| key.to_string());
                    let order = submit(&format!("uid:{owner}"), name.as_deref(), "a prompt");
                    let job = job_of(&journal.apply(&[order]).unwrap()[0]);
                    let known = key.and_then(|key| keys.get(&(owner, key)).copied());
                    prop_assert_eq!(model.contains_key(&job), known == Some(job));
                    model.entry(job).or_insert(false);
                    if let Some(key) = key {
                        prop_assert_eq!(*keys.entry((owner, key)).or_insert(job), job);
                    }
                }
                Step::End(job) => {
                    let applied = journal.apply(&[Order::End { job, outcome: done("x") }]).unwrap();
                    prop_assert!(matches!(applied[0], Applied::Ended(state) if state.is_some() == model.contains_key(&job)));
                    model.entry(job).and_modify(|has_ended| *has_ended = true);
                }
                Step::Restart => {
                    drop(journal);
                    journal = place.open_on(&disk);
                }
                Step::Full => {
                    disk.store(0, Ordering::Relaxed);
                    prop_assert!(journal.apply(&[submit("uid:9", None, &"x".repeat(50_000))]).is_err());
                    disk.store(u64::MAX, Ordering::Relaxed);
                    journal.reopen().unwrap();
                }
            }
        }
        let expected: Vec<DurableId> = model.iter().filter(|(_, has_ended)| !**has_ended).map(|(job, _)| *job).collect();
        prop_assert_eq!(open_jobs(&mut journal), expected);
        let n_ended = model.values().filter(|has_ended| **has_ended).count() as u64;
        prop_assert_eq!(journal.counts.n_ended, n_ended);
        prop_assert!(place.others().is_empty());
    }
}
