//! Random messages of every kind.

use bitnetd_proto::client_link::{ClientMessage, ServerMessage};
use bitnetd_proto::durable::{JobAnswer, JobRecord, JobState, JobSummary};
use bitnetd_proto::error::{ErrorCode, WireError};
use bitnetd_proto::event::{Done, FinishReason, Timings, Token, TokenLogprobs, Usage};
use bitnetd_proto::exit_code::ExitCode;
use bitnetd_proto::request::{ChatMessage, GenerateRequest, Prompt, Sampling};
use bitnetd_proto::worker_link::{
    Confinement, FromWorker, ImageState, ModelSummary, ToWorker, WorkerLoad, WorkerMemory, WorkerSetup,
};
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;

fn finite_f32() -> impl Strategy<Value = f32> {
    any::<u32>().prop_map(f32::from_bits).prop_filter("finite", |value| value.is_finite())
}

fn finite_f64() -> impl Strategy<Value = f64> {
    any::<u64>().prop_map(f64::from_bits).prop_filter("finite", |value| value.is_finite())
}

fn text() -> impl Strategy<Value = String> {
    vec(any::<char>(), 0..20).prop_map(String::from_iter)
}

fn prompt() -> impl Strategy<Value = Prompt> {
    prop_oneof![
        text().prop_map(Prompt::Text),
        vec((text(), text()), 0..4).prop_map(|turns| {
            Prompt::Chat(turns.into_iter().map(|(role, content)| ChatMessage { role, content }).collect())
        }),
        vec(any::<u32>(), 0..30).prop_map(Prompt::Tokens),
    ]
}

fn sampling() -> impl Strategy<Value = Sampling> {
    let floats = [(); 6].map(|()| finite_f32());
    (floats, any::<(u32, u32)>(), vec((any::<u32>(), finite_f32()), 0..5), option::of(any::<u64>())).prop_map(
        |(f, (top_k, penalty_last_n), logit_bias, seed)| Sampling {
            temperature: f[0],
            top_k,
            top_p: f[1],
            min_p: f[2],
            repetition_penalty: f[3],
            penalty_last_n,
            presence_penalty: f[4],
            frequency_penalty: f[5],
            logit_bias,
            seed,
        },
    )
}

pub(crate) fn request() -> impl Strategy<Value = GenerateRequest> {
    (
        prompt(),
        any::<u32>(),
        sampling(),
        vec(text(), 0..4),
        option::of(any::<u8>()),
        any::<(bool, i8)>(),
        any::<Option<u64>>(),
    )
        .prop_map(
            |(prompt, max_tokens, sampling, stop, logprobs, (ignore_eos, priority), deadline_ms)| {
                GenerateRequest {
                    prompt,
                    max_tokens,
                    sampling,
                    stop,
                    logprobs,
                    ignore_eos,
                    priority,
                    deadline_ms,
                }
            },
        )
}

fn token() -> impl Strategy<Value = Token> {
    let logprobs = (finite_f32(), vec((any::<u32>(), finite_f32(), text()), 0..4))
        .prop_map(|(logprob, top)| TokenLogprobs { logprob, top });
    (any::<(u32, u32)>(), text(), option::of(logprobs)).prop_map(|((index, id), text, logprobs)| Token {
        index,
        id,
        text,
        logprobs,
    })
}

fn done() -> impl Strategy<Value = Done> {
    let finish_reason = prop_oneof![Just(FinishReason::Stop), Just(FinishReason::Length)];
    let seconds = [(); 5].map(|()| finite_f64());
    (finish_reason, text(), any::<(u32, u32, u32)>(), seconds, any::<(u32, u32)>(), option::of(text()))
        .prop_map(|(finish_reason, tail, usage, s, (slot, failovers), model)| Done {
            finish_reason,
            tail,
            usage: Usage { prompt_tokens: usage.0, cached_tokens: usage.1, completion_tokens: usage.2 },
            timings: Timings {
                queue_s: s[0],
                prefill_s: s[1],
                decode_s: s[2],
                ttft_s: s[3],
                total_s: s[4],
                slot,
                failovers,
            },
            model,
        })
}

fn wire_error() -> impl Strategy<Value = WireError> {
    let code =
        prop_oneof![Just(ErrorCode::BadMessage), Just(ErrorCode::Overloaded), Just(ErrorCode::Poisoned)];
    (code, text(), option::of(text()), any::<Option<u64>>())
        .prop_map(|(code, message, hint, retry_after_ms)| WireError { code, message, hint, retry_after_ms })
}

fn job_state() -> impl Strategy<Value = JobState> {
    prop::sample::select(JobState::ALL.to_vec())
}

fn summary() -> impl Strategy<Value = JobSummary> {
    let texts = (text(), option::of(text()), text(), option::of(wire_error()));
    (job_state(), texts, any::<(u64, u64, Option<u64>)>(), any::<(i8, u32, u32, Option<u32>)>()).prop_map(
        |(state, (owner, key, prompt, error), (job, submitted_ms, ended_ms), n)| JobSummary {
            job,
            state,
            owner,
            key,
            submitted_ms,
            ended_ms,
            priority: n.0,
            starts: n.1,
            deaths: n.2,
            prompt,
            tokens: n.3,
            error,
        },
    )
}

fn record() -> impl Strategy<Value = JobRecord> {
    let answer = (text(), vec(token(), 0..4), done()).prop_map(|(text, tokens, done)| JobAnswer {
        text,
        token_ids: tokens.iter().map(|token| token.id).collect(),
        logprobs: tokens.into_iter().filter_map(|token| token.logprobs).collect(),
        finish_reason: done.finish_reason,
        usage: done.usage,
        timings: done.timings,
        model: done.model,
    });
    (summary(), request(), option::of(answer)).prop_map(|(summary, request, answer)| JobRecord {
        summary,
        request,
        answer,
    })
}

pub(crate) fn client_message() -> impl Strategy<Value = ClientMessage> {
    prop_oneof![
        (any::<u32>(), text()).prop_map(|(version, client)| ClientMessage::Hello { version, client }),
        (any::<u64>(), request())
            .prop_map(|(id, request)| ClientMessage::Generate { id, request: Box::new(request) }),
        any::<u64>().prop_map(|id| ClientMessage::Cancel { id }),
        (any::<u64>(), option::of(text()), request()).prop_map(|(id, key, request)| ClientMessage::Submit {
            id,
            key,
            request: Box::new(request)
        }),
        (any::<u64>(), option::of(job_state()), any::<Option<u64>>(), any::<Option<u32>>())
            .prop_map(|(id, state, before, limit)| ClientMessage::Jobs { id, state, before, limit }),
        any::<(u64, u64)>().prop_map(|(id, job)| ClientMessage::Result { id, job }),
        any::<(u64, u64, Option<u64>)>().prop_map(|(id, job, timeout_ms)| ClientMessage::Wait {
            id,
            job,
            timeout_ms
        }),
        any::<(u64, u64)>().prop_map(|(id, job)| ClientMessage::CancelJob { id, job }),
        Just(ClientMessage::Status),
        any::<u32>().prop_map(|slot| ClientMessage::Restart { slot }),
    ]
}

pub(crate) fn server_message() -> impl Strategy<Value = ServerMessage> {
    prop_oneof![
        any::<(u64, u64, u64)>().prop_map(|(id, job, seed)| ServerMessage::Accepted { id, job, seed }),
        (any::<u64>(), token()).prop_map(|(id, token)| ServerMessage::Token { id, token }),
        (any::<u64>(), done()).prop_map(|(id, done)| ServerMessage::Done { id, done }),
        (any::<Option<u64>>(), wire_error()).prop_map(|(id, error)| ServerMessage::Error { id, error }),
        any::<(u64, u64, u64, bool)>().prop_map(|(id, job, seed, is_new)| ServerMessage::Submitted {
            id,
            job,
            seed,
            is_new
        }),
        (any::<u64>(), vec(summary(), 0..4), any::<bool>())
            .prop_map(|(id, jobs, has_more)| ServerMessage::Jobs { id, jobs, has_more }),
        (any::<u64>(), record())
            .prop_map(|(id, record)| ServerMessage::Result { id, record: Box::new(record) }),
        (any::<u64>(), summary())
            .prop_map(|(id, summary)| ServerMessage::Job { id, summary: Box::new(summary) }),
        Just(ServerMessage::Ok),
    ]
}

pub(crate) fn to_worker() -> impl Strategy<Value = ToWorker> {
    let setup =
        (any::<(u32, u32, u32, u32)>(), vec(any::<u32>(), 0..9), text()).prop_map(|(n, cpus, model_name)| {
            WorkerSetup {
                slot: n.0,
                cpus,
                model_name,
                ctx: n.1,
                max_batch: n.2,
                prefill_chunk: n.3,
                prefill_ms: n.3,
                isa: "auto".into(),
                head: "auto".into(),
                kv_type: "f16".into(),
                wait: "hybrid".into(),
                huge_pages: "auto".into(),
                speculation: "auto".into(),
                mlock: n.0 % 2 == 0,
                n_workers: 3,
                n_threads: n.2,
                n_copies: n.1,
                has_copy: n.1 % 2 == 0,
                memory_bytes: 1 << 33,
                confinement: "auto".into(),
            }
        });
    prop_oneof![
        (any::<u32>(), setup)
            .prop_map(|(version, setup)| ToWorker::Hello { version, setup: Box::new(setup) }),
        (any::<u64>(), request(), vec(any::<u32>(), 0..50))
            .prop_map(|(job, request, resume)| ToWorker::Job { job, request: Box::new(request), resume }),
        any::<u64>().prop_map(|seq| ToWorker::Ping { seq }),
        Just(ToWorker::Drain),
    ]
}

pub(crate) fn from_worker() -> impl Strategy<Value = FromWorker> {
    let model = (text(), any::<(u64, u32, u64, bool)>()).prop_map(|(name, n)| ModelSummary {
        architecture: name.clone(),
        isa: name.clone(),
        head: name.clone(),
        name,
        n_params: n.0,
        n_ctx: n.1,
        n_vocab: n.1,
        n_layers: n.1,
        n_embd: n.1,
        image_bytes: n.2,
        kv_bytes: n.2,
        has_chat_template: n.3,
        step_bytes: 7,
        token_macs: 8,
        head_macs: 9,
    });
    let load = (any::<(u64, u32)>(), finite_f64(), finite_f64()).prop_map(|(n, prefill_s, decode_s)| {
        let image = [ImageState::Waiting, ImageState::Mapped, ImageState::Read][n.1 as usize % 3];
        let memory = (n.1 % 2 == 0).then(|| WorkerMemory { pss_bytes: n.0, ..WorkerMemory::default() });
        WorkerLoad { steps: n.0, sequences: n.1, prefill_s, decode_s, image, memory, ..WorkerLoad::default() }
    });
    prop_oneof![
        (any::<u32>(), model, finite_f64(), any::<(u32, bool)>()).prop_map(
            |(version, model, load_s, held)| {
                let confinement = Confinement { landlock: held.0, seccomp: held.1 };
                FromWorker::Ready { version, model: Box::new(model), load_s, confinement }
            }
        ),
        wire_error().prop_map(|error| FromWorker::StartFailed { error, exit_code: ExitCode::Data }),
        (any::<u64>(), token()).prop_map(|(job, token)| FromWorker::Token { job, token }),
        (any::<u64>(), done()).prop_map(|(job, done)| FromWorker::Done { job, done }),
        (any::<u64>(), wire_error()).prop_map(|(job, error)| FromWorker::Failed { job, error }),
        (any::<u64>(), load).prop_map(|(seq, load)| FromWorker::Pong { seq, load }),
    ]
}
