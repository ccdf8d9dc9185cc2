//! The jobs that have no worker. Those that wait for their first: priorities, then clients in turn, then first come.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};

use super::{ClientId, JobId};

/// A durable job that could go is overtaken by this many attended ones, at most.
const OVERTAKEN_MAX: u32 = 7;

/// Jobs of one model that have no worker.
#[derive(Clone, Debug, Default)]
pub(super) struct Pool {
    /// Accepted, never on a worker.
    pub(super) waiting: WaitQueue,
    /// The same, of the journal.
    pub(super) durable: WaitQueue,
    /// Attended jobs that went before a durable one that could have gone.
    pub(super) n_overtaken: u32,
    /// Lost their worker; they go first, since their clients are in the middle of an answer.
    pub(super) resumed: BTreeSet<(Reverse<i8>, JobId)>,
    /// One death from being given up: each gets a worker to itself.
    pub(super) suspects: VecDeque<JobId>,
}

impl Pool {
    /// All but those of the journal that have not begun.
    pub(super) fn n_urgent(&self) -> usize {
        self.waiting.len() + self.resumed.len() + self.suspects.len()
    }

    pub(super) fn len(&self) -> usize {
        self.n_urgent() + self.durable.len()
    }

    /// Durable jobs go when nobody waits for a place, and now and then in between.
    pub(super) fn durable_has_its_turn(&self) -> bool {
        self.durable.len() > 0 && (self.waiting.len() == 0 || self.n_overtaken >= OVERTAKEN_MAX)
    }

    /// The next attended job.
    pub(super) fn pop_waiting(&mut self) -> Option<JobId> {
        let job = self.waiting.pop()?;
        self.n_overtaken = (self.n_overtaken + u32::from(self.durable.len() > 0)).min(OVERTAKEN_MAX);
        Some(job)
    }
}

/// Jobs that wait. Higher priorities go first; within one, each client in turn gives its oldest.
#[derive(Clone, Debug, Default)]
pub(crate) struct WaitQueue {
    lanes: BTreeMap<Reverse<i8>, Lane>,
    n_of_client: HashMap<ClientId, usize>,
    n_jobs: usize,
}

/// Jobs of one priority.
///
/// Invariant: `turns` names each client with a job in `jobs` once, and no other.
#[derive(Clone, Debug, Default)]
struct Lane {
    turns: VecDeque<ClientId>,
    jobs: HashMap<ClientId, VecDeque<JobId>>,
}

impl WaitQueue {
    pub(crate) fn len(&self) -> usize {
        self.n_jobs
    }

    pub(crate) fn len_of(&self, client: &ClientId) -> usize {
        self.n_of_client.get(client).copied().unwrap_or(0)
    }

    pub(crate) fn push(&mut self, client: ClientId, priority: i8, job: JobId) {
        let lane = self.lanes.entry(Reverse(priority)).or_default();
        let of_client = lane.jobs.entry(client.clone()).or_default();
        if of_client.is_empty() {
            lane.turns.push_back(client.clone());
        }
        of_client.push_back(job);
        *self.n_of_client.entry(client).or_default() += 1;
        self.n_jobs += 1;
    }

    pub(crate) fn pop(&mut self) -> Option<JobId> {
        let mut entry = self.lanes.first_entry()?;
        let lane = entry.get_mut();
        let client = lane.turns.pop_front()?;
        let of_client = lane.jobs.get_mut(&client)?;
        let job = of_client.pop_front()?;
        if of_client.is_empty() {
            lane.jobs.remove(&client);
        } else {
            lane.turns.push_back(client.clone());
        }
        if lane.turns.is_empty() {
            entry.remove();
        }
        self.forget_one(&client);
        Some(job)
    }

    /// Takes out one job, wherever it stands.
    pub(crate) fn remove(&mut self, client: &ClientId, priority: i8, job: JobId) {
        let Some(lane) = self.lanes.get_mut(&Reverse(priority)) else { return };
        let Some(of_client) = lane.jobs.get_mut(client) else { return };
        let Some(place) = of_client.iter().position(|&waiting| waiting == job) else { return };
        of_client.remove(place);
        if of_client.is_empty() {
            lane.jobs.remove(client);
            lane.turns.retain(|turn| turn != client);
        }
        if lane.turns.is_empty() {
            self.lanes.remove(&Reverse(priority));
        }
        self.forget_one(client);
    }

    fn forget_one(&mut self, client: &ClientId) {
        self.n_jobs -= 1;
        if let Some(n) = self.n_of_client.get_mut(client) {
            *n -= 1;
            if *n == 0 {
                self.n_of_client.remove(client);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drained(queue: &mut WaitQueue) -> Vec<JobId> {
        std::iter::from_fn(|| queue.pop()).collect()
    }

    #[test]
    fn clients_take_turns_within_a_priority() {
        let mut queue = WaitQueue::default();
        for job in 0..4 {
            queue.push(ClientId::Uid(1), 0, job);
        }
        queue.push(ClientId::Uid(2), 0, 10);
        queue.push(ClientId::Uid(2), 0, 11);
        queue.push(ClientId::Uid(3), 5, 20);
        queue.push(ClientId::Uid(1), -5, 30);
        assert_eq!((queue.len(), queue.len_of(&ClientId::Uid(1))), (8, 5));
        assert_eq!(drained(&mut queue), [20, 0, 10, 1, 11, 2, 3, 30]);
        assert_eq!((queue.len(), queue.len_of(&ClientId::Uid(1))), (0, 0));
    }

    #[test]
    fn a_removed_job_leaves_the_turns_in_order() {
        let mut queue = WaitQueue::default();
        for (client, job) in [(1, 0), (2, 1), (1, 2), (3, 3)] {
            queue.push(ClientId::Uid(client), 0, job);
        }
        queue.remove(&ClientId::Uid(2), 0, 1);
        queue.remove(&ClientId::Uid(2), 0, 1);
        queue.remove(&ClientId::Uid(9), 3, 1);
        assert_eq!(queue.len(), 3);
        assert_eq!(drained(&mut queue), [0, 3, 2]);
        assert!(queue.lanes.is_empty() && queue.n_of_client.is_empty());
    }
}
