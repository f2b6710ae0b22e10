//! `GET /metrics`, in Prometheus' text format.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::worker::Shared;

/// Upper bounds of the buckets, seconds.
const BUCKETS: [f64; 12] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0];

#[derive(Default)]
struct Histogram {
    counts: [u64; BUCKETS.len()],
    count: u64,
    sum: f64,
}

impl Histogram {
    fn add(&mut self, time: Duration) {
        let seconds = time.as_secs_f64();
        for (count, bound) in self.counts.iter_mut().zip(BUCKETS) {
            *count += u64::from(seconds <= bound);
        }
        self.count += 1;
        self.sum += seconds;
    }

    fn write(&self, name: &str, help: &str, text: &mut String) {
        let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} histogram");
        for (count, bound) in self.counts.iter().zip(BUCKETS) {
            let _ = writeln!(text, "{name}_bucket{{le=\"{bound}\"}} {count}");
        }
        let _ = writeln!(
            text,
            "{name}_bucket{{le=\"+Inf\"}} {0}\n{name}_sum {1}\n{name}_count {0}",
            self.count, self.sum
        );
    }
}

/// What HTTP counts.
#[derive(Default)]
pub(super) struct Metrics {
    inner: Mutex<Counts>,
}

#[derive(Default)]
struct Counts {
    responses: BTreeMap<(String, u16), u64>,
    first_token: Histogram,
    duration: Histogram,
}

impl Metrics {
    fn counts(&self) -> std::sync::MutexGuard<'_, Counts> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn response(&self, path: &str, status: u16) {
        *self.counts().responses.entry((path.to_string(), status)).or_default() += 1;
    }

    pub(super) fn first_token(&self, time: Duration) {
        self.counts().first_token.add(time);
    }

    pub(super) fn finished(&self, time: Duration) {
        self.counts().duration.add(time);
    }

    pub(super) fn text(&self, shared: &Shared) -> String {
        let mut text = String::new();
        let stats = shared.stats();
        let mut one = |name: &str, kind: &str, help: &str, value: f64| {
            let _ = writeln!(
                text,
                "# HELP ferrotune_{name} {help}\n# TYPE ferrotune_{name} {kind}\nferrotune_{name} {value}"
            );
        };
        one("requests_open", "gauge", "Requests that have been taken and not ended", shared.open() as f64);
        one("sequences_running", "gauge", "Sequences in the batch", stats.running as f64);
        one("sequences_waiting", "gauge", "Sequences in the queue", stats.waiting as f64);
        one(
            "kv_pages_held",
            "gauge",
            "Pages of keys and values that sequences hold",
            stats.pages_held as f64,
        );
        one("kv_pages", "gauge", "Pages of keys and values in all", stats.pages as f64);
        one("engine_steps_total", "counter", "Steps of the engine", stats.steps as f64);
        one("prompt_tokens_total", "counter", "Tokens of prompts that were read", stats.prompt_tokens as f64);
        one(
            "found_tokens_total",
            "counter",
            "Tokens of prompts that were found in the pages",
            stats.found_tokens as f64,
        );
        one("generation_tokens_total", "counter", "Tokens that were generated", stats.new_tokens as f64);
        one("preemptions_total", "counter", "Sequences that gave up their pages", stats.preemptions as f64);
        let counts = self.counts();
        let _ = writeln!(
            text,
            "# HELP ferrotune_http_responses_total Responses\n# TYPE ferrotune_http_responses_total counter"
        );
        for ((path, status), count) in &counts.responses {
            let _ = writeln!(
                text,
                "ferrotune_http_responses_total{{path=\"{path}\",status=\"{status}\"}} {count}"
            );
        }
        let (first, whole) = ("ferrotune_time_to_first_token_seconds", "ferrotune_request_duration_seconds");
        counts.first_token.write(first, "From the request to its first token", &mut text);
        counts.duration.write(whole, "From the request to its last token", &mut text);
        text
    }
}
