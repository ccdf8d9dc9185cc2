//! What the log says, and how loud.
//!
//! `error`: someone must act. `warn`: something broke and was put right. `info`: lifecycle. `debug`: each job.

use crate::state::{Note, slot_number};

pub(crate) fn write(note: &Note) {
    match note {
        Note::WorkerReady { slot, load_s } => {
            tracing::info!(slot = slot_number(*slot), load_s, "worker ready")
        }
        Note::WorkerExited { slot, exit, n_jobs, is_expected } => {
            let (code, signal, is_out_of_memory) = (exit.code, exit.signal, exit.is_out_of_memory);
            if code == Some(0) || *is_expected {
                tracing::info!(slot = slot_number(*slot), code, signal, n_jobs, "worker ended");
            } else {
                tracing::warn!(
                    slot = slot_number(*slot),
                    code,
                    signal,
                    is_out_of_memory,
                    n_jobs,
                    "worker {exit}"
                );
            }
        }
        Note::WorkerKilled { slot, reason, n_jobs } => {
            tracing::warn!(slot = slot_number(*slot), n_jobs, "worker is killed: {reason}");
        }
        Note::RestartScheduled { slot, wait } => {
            let wait_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
            tracing::info!(slot = slot_number(*slot), wait_ms, "worker will be started again");
        }
        Note::SlotFailed { slot, error } => {
            tracing::error!(slot = slot_number(*slot), hint = error.hint, "slot is given up: {error}");
        }
        Note::JobDispatched { job, slot, resumed_at: 0 } => {
            tracing::debug!(job, slot = slot_number(*slot), "job given to a worker")
        }
        Note::JobDispatched { job, slot, resumed_at } => {
            tracing::info!(job, slot = slot_number(*slot), resumed_at, "job goes on on another worker");
        }
        Note::JobFailedOver { job, slot, n_delivered } => {
            tracing::warn!(job, slot = slot_number(*slot), n_delivered, "job lost its worker");
        }
        Note::JobEnded { job, error: None } => tracing::debug!(job, "job done"),
        Note::JobEnded { job, error: Some(error) } => {
            tracing::info!(job, code = ?error.code, "job ended: {error}");
        }
        Note::JobRefused { client, error } => {
            tracing::info!(?client, code = ?error.code, retry_after_ms = error.retry_after_ms, "job refused: {error}");
        }
        Note::Reloaded { edition, n_kept, n_new, is_new_model } => {
            tracing::info!(edition, n_kept, n_new, is_new_model, "a new configuration holds");
        }
        Note::ReloadFailed { edition, error } => {
            tracing::error!(edition, code = ?error.code, hint = error.hint, "the old configuration stays: {error}");
        }
        Note::WorkerRetired { slot, n_jobs } => {
            tracing::info!(
                slot = slot_number(*slot),
                n_jobs,
                "worker of a former configuration is told to end"
            );
        }
        Note::Draining { n_jobs } => tracing::info!(n_jobs, "draining: no new jobs"),
    }
}
