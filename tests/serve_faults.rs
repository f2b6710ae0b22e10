//! The server beside clients that are slow, silent, too many or too late.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use ferrotune::serve::Limits;
use serde_json::json;

use crate::server::{CHAT, Running, TEXT, endless, limits, question, response};

/// All that comes before the connection ends, whichever way.
fn rest(stream: &mut TcpStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    let _ = stream.read_to_end(&mut bytes);
    bytes
}

fn get(server: &Running, path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: {}\r\n\r\n", server.address)
}

#[test]
fn connections_without_progress_are_closed() {
    let idle_time = Duration::from_millis(600);
    let server = Running::with(Limits { idle_time, ..limits() });
    let since = Instant::now();
    let mut silent = server.connect();
    let mut torn = server.connect();
    torn.write_all(b"GET /health HTTP/1.1\r\nHost: local").unwrap();
    // One that asks, and asks again before its time is over; then it only stays.
    let mut idle = server.connect();
    for _ in 0..3 {
        idle.write_all(get(&server, "/health").as_bytes()).unwrap();
        let mut answer = vec![0; 4096];
        let read = idle.read(&mut answer).unwrap();
        assert_eq!(response(&answer[..read]), (200, "{\"status\":\"ok\"}".into()));
        std::thread::sleep(idle_time / 3);
    }
    assert_eq!(rest(&mut silent), b"");
    assert_eq!(rest(&mut torn), b"");
    assert_eq!(rest(&mut idle), b"");
    assert!(since.elapsed() >= idle_time && since.elapsed() < Duration::from_secs(20), "{since:?}");

    // An answer may take longer than that, and so may its reader.
    let mut whole = endless(400);
    whole["stream"] = json!(false);
    (whole["n"], whole["logprobs"]) = (json!(4), json!(20));
    assert_eq!(server.post(TEXT, &whole).0, 200);
    let mut slow = server.send("POST", TEXT, "", endless(40).to_string().as_bytes());
    let mut events = Vec::new();
    for _ in 0..8 {
        std::thread::sleep(idle_time / 4);
        let mut some = [0; 100];
        slow.read_exact(&mut some).unwrap();
        events.extend(some);
    }
    events.extend(rest(&mut slow));
    let (status, events) = response(&events);
    assert!(status == 200 && events.ends_with("data: [DONE]\n\n"), "{events}");
    server.settle();
    server.stop();
}

#[test]
fn a_reader_that_stops_gives_its_place_back() {
    let idle_time = Duration::from_millis(300);
    let server = Running::with(Limits { idle_time, max_connections: 1, ..limits() });
    let mut stalled = server.connect();
    // More answers than the buffers between hold.
    let (page, pages) = (get(&server, "/"), 4000);
    stalled.set_write_timeout(Some(Duration::from_secs(20))).unwrap();
    for _ in 0..pages {
        if stalled.write_all(page.as_bytes()).is_err() {
            break;
        }
    }
    // It has the only place, until it is closed.
    let (status, whole) = server.request("GET", "/", "", b"");
    assert_eq!(status, 200);
    let taken = rest(&mut stalled).len();
    assert!(taken < pages * whole.len(), "{taken} bytes were sent to a reader that did not read");
    assert_eq!(server.post(CHAT, &json!({"messages": question("Hi"), "max_tokens": 3})).0, 200);
    server.settle();
    server.stop();
}

#[test]
fn what_takes_too_long_is_told() {
    let server = Running::with(Limits { request_time: Duration::from_secs(1), max_open: 64, ..limits() });
    // A body that does not come.
    let mut slow = server.connect();
    let head = format!("POST {CHAT} HTTP/1.1\r\nHost: {}\r\nContent-Length: 100\r\n\r\n{{", server.address);
    slow.write_all(head.as_bytes()).unwrap();
    let (status, body) = response(&rest(&mut slow));
    assert!(status == 408 && body.contains("took too long to arrive"), "{status} {body}");

    // An answer of a hundred thousand tokens, which has begun.
    let mut long = endless(400);
    long["prompt"] = json!(vec!["The sky"; 64]);
    (long["n"], long["logprobs"]) = (json!(4), json!(20));
    let events = server.stream(TEXT, &long);
    let error = &events.last().unwrap()["error"];
    assert_eq!(error["type"], json!("server_error"), "{error}");
    assert!(error["message"].as_str().unwrap().contains("longer than 1 s"), "{error}");
    assert!(events[0]["choices"][0]["text"].is_string(), "{}", events[0]);
    server.settle();
    server.stop();
}

#[test]
fn who_may_come_again_is_told_when() {
    let server = Running::with(Limits { max_open: 3, ..limits() });
    let mut batch = endless(400);
    batch["n"] = json!(4);
    let body = batch.to_string();
    let open: Vec<TcpStream> = (0..3).map(|_| server.send("POST", TEXT, "", body.as_bytes())).collect();
    while server.shared.open() < 3 {
        std::thread::sleep(Duration::from_millis(1));
    }
    let refused = rest(&mut server.send("POST", TEXT, "", body.as_bytes()));
    assert_eq!(response(&refused).0, 429);
    let head = String::from_utf8_lossy(&refused).to_lowercase();
    assert!(head.contains("\r\nretry-after: 1\r\n"), "{head}");
    drop(open);
    server.settle();

    // Half a request that comes whole while the server stops.
    let body = json!({"prompt": "a", "max_tokens": 2}).to_string();
    let mut late = server.connect();
    write!(late, "POST {TEXT} HTTP/1.1\r\nHost: {}\r\n", server.address).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    server.stop.store(true, std::sync::atomic::Ordering::Relaxed);
    while TcpStream::connect(server.address).is_ok() {
        std::thread::sleep(Duration::from_millis(10));
    }
    write!(late, "Content-Length: {}\r\n\r\n{body}", body.len()).unwrap();
    let refused = rest(&mut late);
    let (status, message) = response(&refused);
    assert!(status == 503 && message.contains("the server is stopping"), "{status} {message}");
    assert!(String::from_utf8_lossy(&refused).to_lowercase().contains("\r\nretry-after: 1\r\n"));
    server.stop();
}
