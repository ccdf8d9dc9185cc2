//! What the log says, and how loud.
//!
//! `error`: someone must act. `warn`: something broke and was put right. `info`: lifecycle. `debug`: each job.
//! Every line has fields a program can select by: `job`, `slot`, `pid`, `cause`, `code`, `signal`.

use nix::sys::signal::Signal;

use crate::state::{Cause, Note, slot_number};

pub(crate) fn write(note: &Note) {
    match note {
        Note::WorkerReady { slot, pid, load_s, confinement } => {
            tracing::info!(slot = slot_number(*slot), pid, load_s, %confinement, "worker ready");
        }
        Note::WorkerExited { slot, pid, exit, cause, n_jobs } => {
            let (slot, cause_name) = (slot_number(*slot), cause.name());
            let (code, signal) = (exit.code, exit.signal);
            let is_wanted = matches!(cause, Cause::Operator | Cause::Reload | Cause::Stop);
            if is_wanted && !exit.is_out_of_memory {
                // A worker with nothing to do ends by the very signal that tells it to: that is its normal end.
                let signal = signal.filter(|signal| *signal != Signal::SIGTERM as i32);
                tracing::info!(slot, pid, code, signal, n_jobs, cause = cause_name, "worker ended");
            } else {
                tracing::warn!(
                    slot,
                    pid,
                    code,
                    signal,
                    out_of_memory = exit.is_out_of_memory,
                    n_jobs,
                    cause = cause_name,
                    "worker {exit}"
                );
            }
        }
        Note::WorkerKilled { slot, pid, cause, reason, n_jobs } => {
            let slot = slot_number(*slot);
            tracing::warn!(slot, pid, n_jobs, cause = cause.name(), "worker is killed: {reason}");
        }
        Note::RestartScheduled { slot, cause, wait } => {
            let wait_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
            let (slot, cause) = (slot_number(*slot), cause.name());
            tracing::info!(slot, wait_ms, cause, "worker will be started again");
        }
        Note::SlotFailed { slot, error } => {
            let slot = slot_number(*slot);
            tracing::error!(slot, code = ?error.code, hint = error.hint, "slot is given up: {error}");
        }
        Note::Reloaded { edition, n_kept, n_new, is_new_model } => {
            tracing::info!(edition, n_kept, n_new, is_new_model, "a new configuration holds");
        }
        Note::ReloadFailed { edition, error } => {
            // Whoever asked is told, and then it is logged: there are more reasons than this one.
            tracing::debug!(edition, code = ?error.code, "no new configuration: {error}");
        }
        Note::WorkerRetired { slot, n_jobs } => {
            tracing::info!(
                slot = slot_number(*slot),
                n_jobs,
                "worker of a former configuration is told to end"
            );
        }
        Note::Draining { n_jobs } => tracing::info!(n_jobs, "draining: no new jobs"),
        _ => write_job(note),
    }
}

fn write_job(note: &Note) {
    match note {
        Note::JobDispatched { job, slot, waited: Some(waited), .. } => {
            let (slot, waited_s) = (slot_number(*slot), waited.as_secs_f64());
            tracing::debug!(job, slot, waited_s, "job given to a worker");
        }
        Note::JobDispatched { job, slot, resumed_at, .. } => {
            tracing::info!(job, slot = slot_number(*slot), resumed_at, "job goes on on another worker");
        }
        Note::JobFailedOver { job, slot, n_delivered } => {
            tracing::warn!(job, slot = slot_number(*slot), n_delivered, "job lost its worker");
        }
        Note::JobEnded { job, error: None, n_tokens, after } => {
            tracing::debug!(job, n_tokens, total_s = after.as_secs_f64(), "job done");
        }
        Note::JobEnded { job, error: Some(error), n_tokens, after } => {
            let total_s = after.as_secs_f64();
            tracing::info!(job, n_tokens, total_s, code = ?error.code, "job ended: {error}");
        }
        Note::JobRefused { client, error } => {
            tracing::info!(?client, code = ?error.code, retry_after_ms = error.retry_after_ms, "job refused: {error}");
        }
        _ => {} // Tokens are counted, not told.
    }
}
