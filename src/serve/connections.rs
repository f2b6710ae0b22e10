//! Connections: how many there are, and when one that makes no progress is closed.

use std::convert::Infallible;
use std::io::{ErrorKind, IoSlice, Result};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{Sleep, sleep, timeout};

use super::http::App;
use super::routes;

/// Until the next try, where the process has no file for another connection.
const OUT_OF_FILES: Duration = Duration::from_secs(1);

/// Answers connections until `stopped`, and then those that are busy, for at most the limits' `stop_time`.
pub(super) async fn serve(listener: TcpListener, app: Arc<App>, stopped: impl Future<Output = ()>) {
    let limits = app.limits;
    let places = Arc::new(Semaphore::new(limits.max_connections));
    let mut http = http1::Builder::new();
    // Counts from the start of a connection, and from the end of the answer before.
    http.timer(TokioTimer::new()).header_read_timeout(limits.idle_time);
    let connections = GracefulShutdown::new();
    let mut stopped = pin!(stopped);
    loop {
        let accept = async {
            let place = places.clone().acquire_owned().await;
            (listener.accept().await, place)
        };
        let (accepted, place) = tokio::select! {
            accepted = accept => accepted,
            () = &mut stopped => break,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::debug!("a connection was not taken: {error}");
                if !matches!(error.kind(), ErrorKind::ConnectionAborted | ErrorKind::ConnectionReset) {
                    sleep(OUT_OF_FILES).await;
                }
                continue;
            }
        };
        // An event is a small write that must not wait for the answer to the one before, 40 ms where the client delays it.
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!("TCP_NODELAY: {error}");
        }
        let app = app.clone();
        let answer = service_fn(move |request| {
            let app = app.clone();
            async { Ok::<_, Infallible>(routes::handle(app, request).await) }
        });
        let connection = http.serve_connection(TokioIo::new(Stream::new(stream, limits.idle_time)), answer);
        let connection = connections.watch(connection);
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!("a connection ended: {error}");
            }
            drop(place);
        });
    }
    drop(listener);
    // Those that stay open do not hold the server.
    let _ = timeout(limits.stop_time, connections.shutdown()).await;
}

/// A connection whose writes fail where the other side takes nothing for the time of `limit`.
struct Stream {
    stream: TcpStream,
    limit: Duration,
    /// Runs while a write waits.
    waiting: Option<Pin<Box<Sleep>>>,
}

impl Stream {
    fn new(stream: TcpStream, limit: Duration) -> Stream {
        Stream { stream, limit, waiting: None }
    }

    fn written(&mut self, context: &mut Context, written: Poll<Result<usize>>) -> Poll<Result<usize>> {
        if written.is_ready() {
            self.waiting = None;
            return written;
        }
        let waiting = self.waiting.get_or_insert_with(|| Box::pin(sleep(self.limit)));
        ready!(waiting.as_mut().poll(context));
        Poll::Ready(Err(ErrorKind::TimedOut.into()))
    }
}

impl AsyncRead for Stream {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context, buffer: &mut ReadBuf) -> Poll<Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Stream {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context, bytes: &[u8]) -> Poll<Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.written(context, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context,
        slices: &[IoSlice],
    ) -> Poll<Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(context, slices);
        self.written(context, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context) -> Poll<Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context) -> Poll<Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
