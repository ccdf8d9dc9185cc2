//! One write transaction: orders become rows.

use bitnetd_config::DurableConfig;
use bitnetd_proto::durable::JobState;
use bitnetd_proto::error::{ErrorCode, WireError};
use bitnetd_proto::request::GenerateRequest;
use redb::{ReadableTable as _, Table, WriteTransaction};

use super::rows::{
    ANSWERS, ENDED, EndRow, JOBS, JobRow, KEYS, META, META_BYTES, META_NEXT, OPEN, Outcome, REQUESTS,
    RowError, decode, encode, is_same, shown,
};
use super::{Applied, Counts, DurableId, OpenJob, Order, WriteError, overloaded};

/// Results that are pruned in one transaction beyond as many as it has orders, so that none takes long.
const PRUNED_MAX: usize = 256;
/// When to come back if the journal is full.
const FULL_RETRY_MS: u64 = 5000;

/// Every table, open for writing.
pub(super) struct Tables<'a> {
    meta: Table<'a, &'static str, u64>,
    jobs: Table<'a, u64, &'static [u8]>,
    open: Table<'a, u64, ()>,
    ended: Table<'a, (u64, u64), ()>,
    requests: Table<'a, u64, &'static [u8]>,
    answers: Table<'a, u64, &'static [u8]>,
    keys: Table<'a, (&'static str, &'static str), u64>,
    limits: &'a DurableConfig,
    counts: &'a mut Counts,
}

impl From<RowError> for WriteError {
    fn from(error: RowError) -> Self {
        let source = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
        Self(format!("{error}: {source}"))
    }
}

impl<'a> Tables<'a> {
    pub(super) fn open(
        transaction: &'a WriteTransaction,
        limits: &'a DurableConfig,
        counts: &'a mut Counts,
    ) -> Result<Self, WriteError> {
        Ok(Self {
            meta: transaction.open_table(META)?,
            jobs: transaction.open_table(JOBS)?,
            open: transaction.open_table(OPEN)?,
            ended: transaction.open_table(ENDED)?,
            requests: transaction.open_table(REQUESTS)?,
            answers: transaction.open_table(ANSWERS)?,
            keys: transaction.open_table(KEYS)?,
            limits,
            counts,
        })
    }

    pub(super) fn apply(&mut self, order: &Order, now_ms: u64) -> Result<Applied, WriteError> {
        match order {
            Order::Submit { owner, key, request, has_own_seed } => {
                if let Some(key) = key
                    && let Some(known) = self.known(owner, key, request, *has_own_seed)?
                {
                    return Ok(known);
                }
                self.submit(owner, key.as_deref(), request, now_ms)
            }
            Order::Start { job } => self.change(*job, |row| row.starts = row.starts.saturating_add(1)),
            Order::CountDeaths { job, deaths } => self.change(*job, |row| row.deaths = *deaths),
            Order::End { job, outcome } => self.end(*job, outcome, now_ms),
            Order::Probe => Ok(Applied::Noted),
        }
    }

    /// The answer if this client's key names a job already.
    fn known(
        &self,
        owner: &str,
        key: &str,
        request: &GenerateRequest,
        has_own_seed: bool,
    ) -> Result<Option<Applied>, WriteError> {
        let Some(job) = self.keys.get((owner, key))?.map(|job| job.value()) else { return Ok(None) };
        let kept = self.requests.get(job)?.ok_or_else(|| WriteError(format!("job {job} has no request")))?;
        let kept: GenerateRequest = decode(kept.value())?;
        let mut asked = request.clone();
        if !has_own_seed {
            asked.sampling.seed = None;
        }
        if !is_same(asked, &kept) {
            let text = format!("key `{key}` is that of job {job}, and it asks for something else");
            let error = WireError::new(ErrorCode::InvalidRequest, text).with_hint("choose another key");
            return Ok(Some(Applied::Refused(error)));
        }
        let seed = kept.sampling.seed.unwrap_or_default();
        Ok(Some(Applied::Submitted { job, seed, is_new: false, open: None }))
    }

    fn submit(
        &mut self,
        owner: &str,
        key: Option<&str>,
        request: &GenerateRequest,
        now_ms: u64,
    ) -> Result<Applied, WriteError> {
        let bytes = encode(request)?;
        if let Some(refusal) = self.refusal(owner, bytes.len() as u64) {
            return Ok(refusal);
        }
        let job = self.counts.next;
        let row = JobRow {
            owner: owner.to_owned(),
            key: key.map(str::to_owned),
            submitted_ms: now_ms,
            priority: request.priority,
            deadline_ms: request.deadline_ms.map(|ms| now_ms.saturating_add(ms)),
            starts: 0,
            deaths: 0,
            prompt: shown(&request.prompt),
            bytes: bytes.len() as u64,
            end: None,
        };
        self.jobs.insert(job, encode(&row)?.as_slice())?;
        self.requests.insert(job, bytes.as_slice())?;
        self.open.insert(job, ())?;
        if let Some(key) = key {
            self.keys.insert((owner, key), job)?;
        }
        self.counts.next += 1;
        self.counts.n_open += 1;
        self.counts.bytes += row.bytes;
        *self.counts.n_open_of.entry(owner.to_owned()).or_default() += 1;
        let open = OpenJob { job, owner: row.owner, priority: row.priority, deadline_ms: row.deadline_ms };
        let seed = request.sampling.seed.unwrap_or_default();
        Ok(Applied::Submitted { job, seed, is_new: true, open: Some(open) })
    }

    fn refusal(&self, owner: &str, bytes: u64) -> Option<Applied> {
        let DurableConfig { max_jobs, max_per_client, max_mib, .. } = *self.limits;
        if self.counts.n_open >= u64::from(max_jobs) {
            return Some(overloaded(format!("{max_jobs} durable jobs are waiting already"), FULL_RETRY_MS));
        }
        if self.counts.n_open_of.get(owner).is_some_and(|n| *n >= u64::from(max_per_client)) {
            let text = format!("{max_per_client} durable jobs of this client are waiting already");
            return Some(overloaded(text, FULL_RETRY_MS));
        }
        if self.counts.bytes.saturating_add(bytes) > u64::from(max_mib) << 20 {
            let text = format!("the journal holds {max_mib} MiB already");
            return Some(overloaded(text, FULL_RETRY_MS));
        }
        None
    }

    fn row(&self, job: DurableId) -> Result<Option<JobRow>, WriteError> {
        let row = self.jobs.get(job)?;
        Ok(row.map(|row| decode(row.value())).transpose()?)
    }

    fn change(&mut self, job: DurableId, change: impl FnOnce(&mut JobRow)) -> Result<Applied, WriteError> {
        if let Some(mut row) = self.row(job)?.filter(|row| row.end.is_none()) {
            change(&mut row);
            self.jobs.insert(job, encode(&row)?.as_slice())?;
        }
        Ok(Applied::Noted)
    }

    /// The first end counts.
    fn end(&mut self, job: DurableId, outcome: &Outcome, now_ms: u64) -> Result<Applied, WriteError> {
        let Some(mut row) = self.row(job)? else { return Ok(Applied::Ended(None)) };
        if let Some(end) = row.end {
            return Ok(Applied::Ended(Some(end.state)));
        }
        let (end, answer): (EndRow, _) = outcome.clone().into_rows(now_ms);
        let state: JobState = end.state;
        self.ended.insert((end.ended_ms, job), ())?;
        self.open.remove(job)?;
        if let Some(answer) = answer {
            self.answers.insert(job, answer.as_slice())?;
            row.bytes += answer.len() as u64;
            self.counts.bytes += answer.len() as u64;
        }
        row.end = Some(end);
        self.jobs.insert(job, encode(&row)?.as_slice())?;
        self.counts.n_open = self.counts.n_open.saturating_sub(1);
        self.counts.n_ended += 1;
        if let Some(n) = self.counts.n_open_of.get_mut(&row.owner) {
            *n = n.saturating_sub(1);
            if *n == 0 {
                self.counts.n_open_of.remove(&row.owner);
            }
        }
        Ok(Applied::Ended(Some(state)))
    }

    /// Forgets results that are too old or too many, the oldest first.
    pub(super) fn prune(&mut self, now_ms: u64, n_orders: usize) -> Result<(), WriteError> {
        let keep_ms = u64::try_from(self.limits.results_keep.as_millis()).unwrap_or(u64::MAX);
        let oldest_ms = now_ms.saturating_sub(keep_ms);
        for _ in 0..PRUNED_MAX + n_orders {
            let Some((ended_ms, job)) = self.ended.first()?.map(|(key, _)| key.value()) else { break };
            if ended_ms >= oldest_ms && self.counts.n_ended <= u64::from(self.limits.results_max) {
                break;
            }
            self.ended.remove((ended_ms, job))?;
            self.requests.remove(job)?;
            self.answers.remove(job)?;
            if let Some(row) = self.row(job)? {
                if let Some(key) = &row.key {
                    self.keys.remove((row.owner.as_str(), key.as_str()))?;
                }
                self.counts.bytes = self.counts.bytes.saturating_sub(row.bytes);
            }
            self.jobs.remove(job)?;
            self.counts.n_ended -= 1;
        }
        Ok(())
    }

    /// Writes the numbers down.
    pub(super) fn finish(mut self) -> Result<(), WriteError> {
        self.meta.insert(META_NEXT, self.counts.next)?;
        self.meta.insert(META_BYTES, self.counts.bytes)?;
        Ok(())
    }
}
