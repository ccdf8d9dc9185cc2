//! A client's questions about durable jobs: each waits for its answer on its own, and holds up nobody.

use std::collections::HashSet;
use std::time::Duration;

use bitnetd_proto::client_link::{ClientMessage, ServerMessage};
use bitnetd_proto::error::{ErrorCode, WireError};
use bitnetd_proto::limits::{DEADLINE_MS_MAX, PENDING_QUESTIONS_MAX};
use tokio::task::JoinSet;

use crate::durable::Durable;
use crate::state::ClientId;

/// Questions that have no answer yet. Dropping this drops them; what they asked for may still be done.
#[derive(Debug, Default)]
pub(super) struct Questions {
    ids: HashSet<u64>,
    tasks: JoinSet<(u64, ServerMessage)>,
}

impl Questions {
    pub(super) fn contains(&self, id: u64) -> bool {
        self.ids.contains(&id)
    }

    /// Begins to find the answer to one of the messages about durable jobs.
    pub(super) fn ask(
        &mut self,
        id: u64,
        message: ClientMessage,
        durable: Durable,
        client: ClientId,
    ) -> Result<(), WireError> {
        if self.ids.len() >= PENDING_QUESTIONS_MAX {
            let text = format!("{PENDING_QUESTIONS_MAX} questions of this connection wait already");
            return Err(WireError::new(ErrorCode::Overloaded, text).with_retry_after_ms(200));
        }
        self.ids.insert(id);
        self.tasks.spawn(async move {
            let answer = find(id, message, &durable, &client).await;
            (id, answer.unwrap_or_else(|error| ServerMessage::Error { id: Some(id), error }))
        });
        Ok(())
    }

    /// The next answer; `None` if there is no question.
    ///
    /// # Cancel safety
    /// Nothing is lost if it is dropped before it is done.
    pub(super) async fn next(&mut self) -> Option<ServerMessage> {
        loop {
            // A task that panicked has no answer; the panic is in the log.
            if let Ok((id, answer)) = self.tasks.join_next().await? {
                self.ids.remove(&id);
                return Some(answer);
            }
        }
    }
}

async fn find(
    id: u64,
    message: ClientMessage,
    durable: &Durable,
    client: &ClientId,
) -> Result<ServerMessage, WireError> {
    match message {
        ClientMessage::Submit { key, request, .. } => {
            let submitted = durable.submit(client, key, request).await?;
            let (job, seed, is_new) = (submitted.job, submitted.seed, submitted.is_new);
            Ok(ServerMessage::Submitted { id, job, seed, is_new })
        }
        ClientMessage::Jobs { state, before, limit, .. } => {
            let (jobs, has_more) = durable.jobs(client, state, before, limit).await?;
            Ok(ServerMessage::Jobs { id, jobs, has_more })
        }
        ClientMessage::Result { job, .. } => {
            let record = Box::new(durable.result(client, job).await?);
            Ok(ServerMessage::Result { id, record })
        }
        ClientMessage::Wait { job, timeout_ms, .. } => {
            let longest = timeout_ms.map(|ms| Duration::from_millis(ms.min(DEADLINE_MS_MAX)));
            let record = Box::new(durable.wait(client, job, longest).await?);
            Ok(ServerMessage::Result { id, record })
        }
        ClientMessage::CancelJob { job, .. } => {
            let summary = Box::new(durable.cancel(client, job).await?);
            Ok(ServerMessage::Job { id, summary })
        }
        _ => Err(WireError::new(ErrorCode::Internal, "not a question about durable jobs")),
    }
}
