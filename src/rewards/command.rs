//! A user's program as a reward, in any language: a line of JSON in, a line of JSON out.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use rustix::process::{Pid, Signal, kill_process_group};

use super::judge::{Said, question, read};
use super::{Reward, Sample, Stop};

/// No answer is longer, in bytes.
const LONGEST_LINE: u64 = 1 << 20;
/// What is kept of the end of stderr, in bytes.
const LAST_WORDS: usize = 2000;
/// How long stderr may take to end after the process has.
const PATIENCE: Duration = Duration::from_millis(500);
/// How long a wait goes on after a run was asked to stop.
const GLANCE: Duration = Duration::from_millis(100);
const TOO_MUCH: &str = "it wrote more than one line for this sample, and was ended";

/// A command line for `sh`, kept running. It reads a line of JSON for each sample,
/// `{"id", "prompt", "completion", "truncated", "columns"}`, and writes one for it before it is given the next: a number, null
/// (does not apply), or `{"reward": number or null}` or `{"error": text}`, in which `id` may be repeated to be checked. It must
/// flush each line. It is ended and started again, at the next sample, after it ended, said nothing for the time limit, or wrote
/// more than one line or one that is no answer. It runs in a process group of its own, which ends with this value.
pub struct Command {
    line: String,
    timeout: Duration,
    stop: Stop,
    process: Option<Process>,
    next_id: u64,
    starts: u64,
}

impl Command {
    /// Starts nothing yet.
    pub fn new(line: &str, timeout: Duration) -> Command {
        let stop = Stop::default();
        Command { line: line.to_owned(), timeout, stop, process: None, next_id: 0, starts: 0 }
    }

    /// The same, no longer waiting once `stop` is raised.
    pub fn until(self, stop: Stop) -> Command {
        Command { stop, ..self }
    }

    fn ask(&mut self, sample: &Sample) -> Result<Option<f64>> {
        self.stop.check()?;
        let id = self.next_id;
        self.next_id += 1;
        let mut text = serde_json::to_vec(&question(id, sample))?;
        text.push(b'\n');
        let process = match &mut self.process {
            Some(process) => process,
            none => {
                self.starts += 1;
                none.insert(Process::start(&self.line)?)
            }
        };
        let said = process.exchange(text, self.timeout, &self.stop).and_then(|line| read(id, &line));
        match said {
            Ok(Said::Value(value)) => Ok(value),
            Ok(Said::Error(error)) => Err(error),
            // A line that is no answer may have been before one, which would be taken for the next sample's.
            Err(error) => {
                self.process = None;
                Err(error)
            }
        }
    }

    /// Whether lines came that nobody asked for: then the last answer cannot be trusted, nor the next.
    fn said_too_much(&mut self) -> bool {
        let extra = self.process.as_ref().is_some_and(|process| process.lines.try_recv().is_ok());
        if extra {
            self.process = None;
        }
        extra
    }
}

impl Reward for Command {
    fn name(&self) -> &str {
        "command"
    }

    fn score(&mut self, samples: &[Sample]) -> Vec<Result<Option<f64>>> {
        let mut results: Vec<Result<Option<f64>>> = Vec::with_capacity(samples.len());
        for sample in samples {
            if self.said_too_much()
                && let Some(before) = results.last_mut()
            {
                *before = Err(anyhow!(TOO_MUCH));
            }
            results.push(self.ask(sample));
        }
        if self.said_too_much()
            && let Some(last) = results.last_mut()
        {
            *last = Err(anyhow!(TOO_MUCH));
        }
        results
    }

    fn restarts(&self) -> u64 {
        self.starts.saturating_sub(1)
    }
}

/// A line, and whether more came with it.
struct Line {
    line: Vec<u8>,
    more: bool,
}

/// A running command. Threads stand at its pipes, so that none of them can make us wait beyond the limit.
struct Process {
    child: Child,
    questions: Sender<Vec<u8>>,
    lines: Receiver<Result<Line>>,
    last_words: Receiver<String>,
}

impl Process {
    fn start(line: &str) -> Result<Process> {
        let mut child = std::process::Command::new("sh")
            .args(["-c", line])
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("starting sh -c {line:?}"))?;
        let missing = "the child has no pipe";
        let mut stdin = child.stdin.take().context(missing)?;
        let stdout = child.stdout.take().context(missing)?;
        let stderr = child.stderr.take().context(missing)?;
        let (questions, unasked) = channel::<Vec<u8>>();
        thread::spawn(move || {
            for question in unasked {
                // A process that does not read has ended or will: its stdout says so.
                if stdin.write_all(&question).and_then(|()| stdin.flush()).is_err() {
                    break;
                }
            }
        });
        let (said, lines) = sync_channel(16);
        thread::spawn(move || read_lines(BufReader::new(stdout), &said));
        let (last, last_words) = channel();
        thread::spawn(move || last.send(end_of(stderr)));
        Ok(Process { child, questions, lines, last_words })
    }

    /// The line that follows `question`.
    fn exchange(&mut self, question: Vec<u8>, timeout: Duration, stop: &Stop) -> Result<Vec<u8>> {
        // Its thread is gone where the process is: the answer below says so.
        let _ = self.questions.send(question);
        let began = Instant::now();
        let received = loop {
            let left = timeout.saturating_sub(began.elapsed());
            match self.lines.recv_timeout(left.min(GLANCE)) {
                Err(RecvTimeoutError::Timeout) if began.elapsed() < timeout => stop.check()?,
                received => break received,
            }
        };
        match received {
            Ok(line) => match line? {
                Line { more: true, .. } => bail!(TOO_MUCH),
                Line { line, .. } => Ok(line),
            },
            Err(RecvTimeoutError::Timeout) => bail!(
                "no answer within {} s, and it was ended (does it flush every line?)",
                timeout.as_secs_f64()
            ),
            Err(RecvTimeoutError::Disconnected) => {
                self.kill();
                let status =
                    self.child.wait().map_or("for no known reason".into(), |status| status.to_string());
                let said = self.last_words.recv_timeout(PATIENCE).unwrap_or_default();
                match said.trim() {
                    "" => bail!("it ended ({status}) without an answer"),
                    said => bail!("it ended ({status}) without an answer: {said}"),
                }
            }
        }
    }

    /// Ends the process and what it started; one that has ended keeps its status.
    fn kill(&self) {
        if let Some(group) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw) {
            // It fails where nobody is left.
            let _ = kill_process_group(group, Signal::KILL);
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
        let _ = self.child.wait();
    }
}

/// Sends each line without its end, until the pipe ends or nobody listens.
fn read_lines(mut stdout: BufReader<impl Read>, said: &SyncSender<Result<Line>>) {
    loop {
        let mut line = Vec::new();
        let read = (&mut stdout).take(LONGEST_LINE).read_until(b'\n', &mut line);
        let message = match (read, line.pop()) {
            (Ok(0) | Err(_), _) | (_, None) => return,
            (_, Some(b'\n')) => Ok(Line { line, more: !stdout.buffer().is_empty() }),
            (Ok(length), _) if length as u64 == LONGEST_LINE => {
                Err(anyhow!("an answer of more than {LONGEST_LINE} bytes without a line's end"))
            }
            (_, Some(last)) => {
                line.push(last);
                Ok(Line { line, more: false })
            }
        };
        let broken = message.is_err();
        if said.send(message).is_err() || broken {
            return;
        }
    }
}

/// The last of what comes, as text.
fn end_of(mut pipe: impl Read) -> String {
    let (mut kept, mut buffer) = (Vec::new(), [0; 4096]);
    while let Ok(length @ 1..) = pipe.read(&mut buffer) {
        kept.extend_from_slice(&buffer[..length]);
        let excess = kept.len().saturating_sub(LAST_WORDS);
        kept.drain(..excess);
    }
    String::from_utf8_lossy(&kept).into_owned()
}
