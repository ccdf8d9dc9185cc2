//! The thread that writes: takes what has come together, makes one transaction of it, and says what came of it.

use std::io;
use std::thread::JoinHandle;

use tokio::sync::mpsc;

use super::{Applied, Counts, Journal, OpenJob, Order};

/// Orders that wait for the disk, at most; who wants more is refused.
const ORDERS_MAX: usize = 1024;
/// Orders in one transaction, at most.
const BATCH_MAX: usize = 256;
/// Orders of one transaction may have requests and answers of so many bytes, roughly, before it is closed.
const BATCH_BYTES_MAX: usize = 16 << 20;

/// What the thread says.
#[derive(Debug)]
pub(crate) enum Report {
    /// The file was opened, or opened again: these jobs have not ended, and no others.
    Opened { jobs: Vec<OpenJob> },
    /// An order was carried out, or could not be: then the reason.
    Carried { ticket: u64, order: Order, outcome: Result<Applied, String> },
    /// What there is now, after a batch. `problem` is `None` when writing works.
    Now { counts: Counts, problem: Option<String>, notice: Option<String> },
}

/// The way to the thread. Dropping it lets the thread finish what it has, close the file and end.
#[derive(Debug)]
pub(crate) struct Writer {
    orders: mpsc::Sender<(u64, Order)>,
    thread: Option<JoinHandle<()>>,
}

impl Writer {
    /// Starts the thread. What it says comes from the receiver; it waits while nobody takes it.
    pub(super) fn start(journal: Journal) -> io::Result<(Self, mpsc::Receiver<Report>)> {
        let (orders, orders_in) = mpsc::channel(ORDERS_MAX);
        let (reports_out, reports) = mpsc::channel(ORDERS_MAX);
        let thread = std::thread::Builder::new()
            .name("journal".into())
            .spawn(move || work(journal, orders_in, &reports_out))?;
        Ok((Self { orders, thread: Some(thread) }, reports))
    }

    /// Hands in an order; gives it back if too many wait.
    pub(crate) fn send(&self, ticket: u64, order: Order) -> Result<(), Order> {
        self.orders.try_send((ticket, order)).map_err(|error| error.into_inner().1)
    }

    /// Ends the hand-over of orders; the thread ends when it has written the last.
    pub(crate) fn close(self) -> Option<JoinHandle<()>> {
        let Self { orders, thread } = self;
        drop(orders);
        thread
    }
}

fn work(mut journal: Journal, mut orders: mpsc::Receiver<(u64, Order)>, reports: &mpsc::Sender<Report>) {
    // The first batch is empty: whoever listens learns what there is.
    let mut batch = vec![(u64::MAX, Order::Probe)];
    loop {
        let problem = serve(&mut journal, batch, reports);
        let now = Report::Now { counts: journal.counts.clone(), problem, notice: journal.notice() };
        if reports.blocking_send(now).is_err() {
            return;
        }
        let Some(first) = orders.blocking_recv() else { return };
        let mut n_bytes = weight(&first.1);
        batch = vec![first];
        while batch.len() < BATCH_MAX
            && n_bytes < BATCH_BYTES_MAX
            && let Ok(next) = orders.try_recv()
        {
            n_bytes += weight(&next.1);
            batch.push(next);
        }
    }
}

/// Bytes of an order that may be large, roughly.
fn weight(order: &Order) -> usize {
    match order {
        Order::Submit { request, .. } => match &request.prompt {
            bitnetd_proto::request::Prompt::Text(text) => text.len(),
            bitnetd_proto::request::Prompt::Chat(messages) => {
                messages.iter().map(|message| message.content.len()).sum()
            }
            bitnetd_proto::request::Prompt::Tokens(ids) => ids.len() * 8,
        },
        Order::End { outcome: super::Outcome::Done(answer), .. } => {
            answer.text.len() + answer.token_ids.len() * 8 + answer.logprobs.len() * 64
        }
        _ => 0,
    }
}

/// Carries a batch out; gives what is wrong, if something is.
fn serve(journal: &mut Journal, batch: Vec<(u64, Order)>, reports: &mpsc::Sender<Report>) -> Option<String> {
    let outcome = open(journal, reports).and_then(|()| {
        let orders: Vec<Order> = batch.iter().map(|(_, order)| order.clone()).collect();
        journal.apply(&orders).map_err(|error| error.to_string())
    });
    let mut applied = outcome.as_ref().ok().cloned().into_iter().flatten();
    for (ticket, order) in batch {
        let outcome = match &outcome {
            Ok(_) => Ok(applied.next().unwrap_or(Applied::Noted)),
            Err(reason) => Err(reason.clone()),
        };
        if ticket != u64::MAX && reports.blocking_send(Report::Carried { ticket, order, outcome }).is_err() {
            break; // Nobody listens any more; the orders were still carried out.
        }
    }
    outcome.err()
}

/// Opens the file if it is not open, and says once what is in it.
fn open(journal: &mut Journal, reports: &mpsc::Sender<Report>) -> Result<(), String> {
    if !journal.is_open() {
        journal.reopen().map_err(|error| {
            let source = std::error::Error::source(&error).map(|source| format!(": {source}"));
            format!("{error}{}", source.unwrap_or_default())
        })?;
    }
    if let Some(jobs) = journal.fresh.take() {
        let _nobody = reports.blocking_send(Report::Opened { jobs });
    }
    Ok(())
}
