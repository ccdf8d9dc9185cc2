//! Metrics over HTTP, for a Prometheus that comes to fetch them: `GET /metrics`, and nothing else.
//!
//! Off unless `listen.metrics` names an address. One request a connection, small limits on everything; who is slow
//! is cut off. It knows the service through its public face only.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bitnetd_config::{ListenConfig, MetricsAddress};
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};

use crate::listener::{ACCEPT_PAUSE, ListenError, Listener};
use crate::service::Service;

/// Scrapes at once, at most; who comes beyond is closed without a word.
const SCRAPES_MAX: usize = 8;
/// A request, answered and written, takes this long at most.
const SCRAPE_TIMEOUT: Duration = Duration::from_secs(10);
/// Length of a request's head, at most (the least that the HTTP library takes).
const HEAD_BYTES_MAX: usize = 8 << 10;
/// What Prometheus asks for by this name.
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Why metrics cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ScrapeError {
    /// A Unix socket that cannot be had.
    #[error(transparent)]
    Unix(#[from] ListenError),
    /// An address that cannot be had.
    #[error("cannot listen for metrics on `{address}`: {source}")]
    Tcp {
        /// The address.
        address: SocketAddr,
        /// What the system says.
        #[source]
        source: io::Error,
    },
}

/// Where metrics are fetched.
#[derive(Debug)]
pub struct ScrapeListener {
    socket: Socket,
}

#[derive(Debug)]
enum Socket {
    Tcp(TcpListener),
    Unix(Box<Listener>),
}

impl ScrapeListener {
    /// Listens at the configured address; `None` if there is none.
    ///
    /// # Errors
    /// [`ScrapeError`].
    pub async fn bind(config: &ListenConfig) -> Result<Option<Self>, ScrapeError> {
        let socket = match &config.metrics {
            None => return Ok(None),
            Some(MetricsAddress::Unix(path)) => Socket::Unix(Box::new(Listener::bind(path, config)?)),
            Some(MetricsAddress::Tcp(address)) => {
                let failed = |source| ScrapeError::Tcp { address: *address, source };
                if !address.ip().is_loopback() {
                    tracing::warn!(%address, "metrics are open to whoever reaches this address");
                }
                let socket = TcpListener::bind(address).await.map_err(failed)?;
                let address = socket.local_addr().map_err(failed)?;
                tracing::info!(%address, "metrics at http://{address}/metrics");
                Socket::Tcp(socket)
            }
        };
        Ok(Some(Self { socket }))
    }

    /// The address, if it is one of TCP (the port may have been chosen by the system).
    #[must_use]
    pub fn address(&self) -> Option<SocketAddr> {
        match &self.socket {
            Socket::Tcp(socket) => socket.local_addr().ok(),
            Socket::Unix(_) => None,
        }
    }

    /// The path, if it is a Unix socket.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        match &self.socket {
            Socket::Tcp(_) => None,
            Socket::Unix(socket) => Some(socket.path()),
        }
    }

    /// Answers until the service has stopped.
    pub async fn serve(self, service: Service) {
        let places = Arc::new(Semaphore::new(SCRAPES_MAX));
        let stopped = service.stopped();
        let mut stopped = std::pin::pin!(stopped);
        loop {
            let accepted = tokio::select! {
                accepted = self.accept() => accepted,
                _ = &mut stopped => return,
            };
            let stream = match accepted {
                Ok(stream) => stream,
                Err(error) => {
                    tracing::error!(%error, "cannot accept scrapes for now");
                    sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let Ok(place) = places.clone().try_acquire_owned() else { continue };
            let service = service.clone();
            tokio::spawn(async move {
                if timeout(SCRAPE_TIMEOUT, converse(stream, service)).await.is_err() {
                    tracing::debug!("a scrape took too long");
                }
                drop(place);
            });
        }
    }

    async fn accept(&self) -> io::Result<Box<dyn Stream>> {
        Ok(match &self.socket {
            Socket::Tcp(socket) => Box::new(socket.accept().await?.0),
            Socket::Unix(socket) => Box::new(socket.accept_one().await?),
        })
    }
}

trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

async fn converse(stream: Box<dyn Stream>, service: Service) {
    let answer = service_fn(move |request: Request<Incoming>| {
        let service = service.clone();
        async move { Ok::<_, Infallible>(answer(&request, &service).await) }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(SCRAPE_TIMEOUT)
        .max_buf_size(HEAD_BYTES_MAX)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), answer)
        .await;
    if let Err(error) = served {
        tracing::debug!(%error, "a scrape was broken off");
    }
}

async fn answer(request: &Request<Incoming>, service: &Service) -> Response<Full<Bytes>> {
    let plain = |status: StatusCode, text: &'static str| {
        let mut response = Response::new(Full::from(text));
        *response.status_mut() = status;
        response
    };
    if request.uri().path() != "/metrics" {
        return plain(StatusCode::NOT_FOUND, "metrics are at /metrics\n");
    }
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        let mut response = plain(StatusCode::METHOD_NOT_ALLOWED, "GET only\n");
        response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return response;
    }
    match service.metrics().await {
        Ok(text) => {
            let mut response = Response::new(Full::from(text));
            response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(OPEN_METRICS));
            response
        }
        Err(_) => plain(StatusCode::SERVICE_UNAVAILABLE, "the service has stopped\n"),
    }
}
