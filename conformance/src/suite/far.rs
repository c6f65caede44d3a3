//! The far end of a pair, wherever it is.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command as Process, Stdio};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{Addr, End, Env, LONG, Outcome, Side, Spec, Stop, fail};
use crate::verbs::{AsyncEvent, Attr, Mr, Recv, Send, Wc};

/// What the far end is told.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Command {
    Open(Spec),
    Connect(Addr),
    /// Registers more memory: length and access; in another domain if so.
    Register(usize, u32, bool),
    PostRecv(Vec<Recv>),
    PostSend(Vec<Send>),
    Wait(Side, u32),
    Peek(Side),
    Get(usize, usize),
    Put(usize, Vec<u8>),
    State,
    SetState(u32),
    Event(u64),
    /// Destroys the queue pair.
    Destroy,
    /// Deregisters the memory.
    Deregister,
    /// Ends the process at once, without destroying anything.
    Die,
}

/// What it answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Reply {
    Done,
    Addr(Addr),
    Key(u64, u32),
    Completions(Vec<Wc>),
    Bytes(Vec<u8>),
    State(u32),
    Event(Option<u32>),
    Failed(String),
    Skipped(String),
}

fn put(stream: &mut UnixStream, value: &impl Serialize) -> std::io::Result<()> {
    let bytes = postcard::to_stdvec(value).map_err(std::io::Error::other)?;
    stream.write_all(&(bytes.len() as u32).to_le_bytes())?;
    stream.write_all(&bytes)
}

fn take<T: for<'a> Deserialize<'a>>(stream: &mut UnixStream) -> std::io::Result<T> {
    let mut len = [0; 4];
    stream.read_exact(&mut len)?;
    let mut bytes = vec![0; u32::from_le_bytes(len) as usize];
    stream.read_exact(&mut bytes)?;
    postcard::from_bytes(&bytes).map_err(std::io::Error::other)
}

/// Executes a command on an end of this process.
fn execute(env: &Env, end: &mut Option<End>, command: Command) -> Outcome<Reply> {
    if let Command::Open(spec) = command {
        let made = End::open(env, true, &spec)?;
        let addr = made.addr();
        *end = Some(made);
        return Ok(Reply::Addr(addr));
    }
    let Some(end) = end else {
        fail!("the far end is not open");
    };
    Ok(match command {
        Command::Open(_) => Reply::Done,
        Command::Connect(to) => {
            end.connect(&to)?;
            Reply::Done
        }
        Command::Register(len, access, elsewhere) => {
            let pd = if elsewhere {
                crate::verbs::Pd::new(&end.ctx)?
            } else {
                end.pd.clone()
            };
            let mr = Mr::new(&pd, len, access)?;
            let key = Reply::Key(mr.base, mr.rkey());
            end.more.push(mr);
            key
        }
        Command::PostRecv(requests) => {
            end.post_recv(&requests)?;
            Reply::Done
        }
        Command::PostSend(requests) => {
            end.send(&requests)?;
            Reply::Done
        }
        Command::Wait(side, n) => Reply::Completions(end.wait(side, n as usize)?),
        Command::Peek(side) => Reply::Completions(end.peek(side)?),
        Command::Get(at, len) => Reply::Bytes(end.get(at, len)?),
        Command::Put(at, bytes) => {
            end.put(at, &bytes)?;
            Reply::Done
        }
        Command::State => Reply::State(end.state()?),
        Command::SetState(state) => {
            end.qp().must_modify(&Attr::state(state))?;
            Reply::Done
        }
        Command::Event(millis) => {
            let event = end.ctx.event(Duration::from_millis(millis));
            Reply::Event(event.map(|AsyncEvent { kind, .. }| kind))
        }
        Command::Destroy => {
            end.qp = None;
            Reply::Done
        }
        Command::Deregister => {
            end.mr = None;
            Reply::Done
        }
        Command::Die => std::process::exit(0),
    })
}

/// The far end of a pair.
pub(crate) enum Far {
    /// In this process.
    Here(Env, Box<Option<End>>),
    /// At the other side of a socket.
    There(UnixStream, Option<Child>),
}

impl Far {
    pub(crate) fn call(&mut self, command: Command) -> Outcome<Reply> {
        match self {
            Far::Here(env, end) => execute(env, end, command),
            Far::There(stream, _) => {
                let reply = put(stream, &command).and_then(|()| take(stream));
                match reply {
                    Ok(Reply::Failed(why)) => fail!("far end: {why}"),
                    Ok(Reply::Skipped(why)) => Err(Stop::Skip(format!("far end: {why}"))),
                    Ok(reply) => Ok(reply),
                    Err(why) => fail!("far end does not answer to {command:?}: {why}"),
                }
            }
        }
    }

    fn done(&mut self, command: Command) -> Outcome {
        match self.call(command)? {
            Reply::Done => Ok(()),
            other => fail!("far end answered {other:?}"),
        }
    }

    /// The end itself, if it is in this process.
    pub(crate) fn here(&self) -> Outcome<&End> {
        match self {
            Far::Here(_, end) => (**end)
                .as_ref()
                .ok_or_else(|| Stop::Fail("not open".to_owned())),
            Far::There(..) => fail!("the test needs both ends in one process"),
        }
    }

    pub(crate) fn here_mut(&mut self) -> Outcome<&mut End> {
        match self {
            Far::Here(_, end) => (**end)
                .as_mut()
                .ok_or_else(|| Stop::Fail("not open".to_owned())),
            Far::There(..) => fail!("the test needs both ends in one process"),
        }
    }

    pub(crate) fn connect(&mut self, to: Addr) -> Outcome {
        self.done(Command::Connect(to))
    }

    pub(crate) fn open(&mut self, spec: &Spec) -> Outcome<Addr> {
        match self.call(Command::Open(spec.clone()))? {
            Reply::Addr(addr) => Ok(addr),
            other => fail!("far end answered {other:?}"),
        }
    }

    pub(crate) fn post_recv(&mut self, requests: Vec<Recv>) -> Outcome {
        self.done(Command::PostRecv(requests))
    }

    pub(crate) fn post_send(&mut self, requests: Vec<Send>) -> Outcome {
        self.done(Command::PostSend(requests))
    }

    pub(crate) fn put(&mut self, at: usize, bytes: &[u8]) -> Outcome {
        self.done(Command::Put(at, bytes.to_vec()))
    }

    pub(crate) fn set_state(&mut self, state: u32) -> Outcome {
        self.done(Command::SetState(state))
    }

    pub(crate) fn destroy(&mut self) -> Outcome {
        self.done(Command::Destroy)
    }

    pub(crate) fn deregister(&mut self) -> Outcome {
        self.done(Command::Deregister)
    }

    pub(crate) fn wait(&mut self, side: Side, n: usize) -> Outcome<Vec<Wc>> {
        match self.call(Command::Wait(side, n as u32))? {
            Reply::Completions(got) => Ok(got),
            other => fail!("far end answered {other:?}"),
        }
    }

    pub(crate) fn one(&mut self, side: Side) -> Outcome<Wc> {
        match self.wait(side, 1)?.first() {
            Some(wc) => Ok(*wc),
            None => fail!("no completion"),
        }
    }

    pub(crate) fn peek(&mut self, side: Side) -> Outcome<Vec<Wc>> {
        match self.call(Command::Peek(side))? {
            Reply::Completions(got) => Ok(got),
            other => fail!("far end answered {other:?}"),
        }
    }

    pub(crate) fn get(&mut self, at: usize, len: usize) -> Outcome<Vec<u8>> {
        match self.call(Command::Get(at, len))? {
            Reply::Bytes(bytes) => Ok(bytes),
            other => fail!("far end answered {other:?}"),
        }
    }

    pub(crate) fn state(&mut self) -> Outcome<u32> {
        match self.call(Command::State)? {
            Reply::State(state) => Ok(state),
            other => fail!("far end answered {other:?}"),
        }
    }

    pub(crate) fn until_state(&mut self, state: u32) -> Outcome {
        let end = std::time::Instant::now() + LONG;
        loop {
            let now = self.state()?;
            if now == state {
                return Ok(());
            }
            if std::time::Instant::now() > end {
                fail!("far end in state {now}, expected {state} within {LONG:?}");
            }
            std::thread::yield_now();
        }
    }

    /// The kind of the next asynchronous event.
    pub(crate) fn event(&mut self, within: Duration) -> Outcome<Option<u32>> {
        match self.call(Command::Event(within.as_millis() as u64))? {
            Reply::Event(kind) => Ok(kind),
            other => fail!("far end answered {other:?}"),
        }
    }

    /// Address and key of a region of the far end.
    pub(crate) fn register(
        &mut self,
        len: usize,
        access: u32,
        elsewhere: bool,
    ) -> Outcome<(u64, u32)> {
        match self.call(Command::Register(len, access, elsewhere))? {
            Reply::Key(base, rkey) => Ok((base, rkey)),
            other => fail!("far end answered {other:?}"),
        }
    }

    /// Kills the far end's process: no object is destroyed by the program.
    pub(crate) fn die(&mut self) -> Outcome {
        let Far::There(stream, child) = self else {
            fail!("the far end is in this process");
        };
        let told = put(stream, &Command::Die);
        // Its socket closes when it has ended.
        let mut end = [0];
        if told.is_err() || !matches!(stream.read(&mut end), Ok(0)) {
            fail!("the far end does not die");
        }
        if let Some(mut child) = child.take() {
            let _ = child.wait();
        }
        Ok(())
    }

    /// The far end that a run asks for.
    pub(crate) fn new(env: &Env) -> Outcome<Self> {
        let stream = match &env.place {
            super::Place::Here => return Ok(Far::Here(env.clone(), Box::new(None))),
            super::Place::Process => {
                let (ours, theirs) =
                    UnixStream::pair().map_err(|e| Stop::Fail(format!("socketpair: {e}")))?;
                let child = spawn_far(env, theirs.into())
                    .map_err(|e| Stop::Fail(format!("far end: {e}")))?;
                let far = Far::There(ours, Some(child));
                return far.limited();
            }
            super::Place::Server(path) => UnixStream::connect(path),
        };
        match stream {
            Ok(stream) => Far::There(stream, None).limited(),
            Err(why) => fail!("the server of the far end: {why}"),
        }
    }

    /// No answer takes for ever.
    fn limited(self) -> Outcome<Self> {
        if let Far::There(stream, _) = &self {
            let limit = Some(LONG + LONG);
            if let Err(why) = stream.set_read_timeout(limit) {
                fail!("setting the far end's time limit: {why}");
            }
        }
        Ok(self)
    }
}

impl Drop for Far {
    fn drop(&mut self) {
        if let Far::There(stream, child) = self {
            let _ = stream.shutdown(std::net::Shutdown::Write);
            // It ends when it has destroyed what it made.
            let mut rest = [0; 64];
            while matches!(stream.read(&mut rest), Ok(n) if n != 0) {}
            if let Some(child) = child {
                let _ = child.wait();
            }
        }
    }
}

/// Starts a process that is the far end of this socket.
pub(crate) fn spawn_far(env: &Env, socket: OwnedFd) -> std::io::Result<Child> {
    let mut process = Process::new("/proc/self/exe");
    process
        .arg("--far")
        .arg("--gid-index")
        .arg(env.gid_index.to_string());
    if let Some(device) = env.device2.as_ref().or(env.device.as_ref()) {
        process.arg("--device").arg(device);
    }
    process.stdin(Stdio::from(socket)).stdout(Stdio::null());
    process.spawn()
}

/// Obeys the commands that come on a socket until it closes.
pub(crate) fn serve(env: &Env, mut stream: UnixStream) {
    let mut end = None;
    while let Ok(command) = take::<Command>(&mut stream) {
        let reply = match execute(env, &mut end, command) {
            Ok(reply) => reply,
            Err(Stop::Fail(why)) => Reply::Failed(why),
            Err(Stop::Skip(why)) => Reply::Skipped(why),
        };
        if put(&mut stream, &reply).is_err() {
            break;
        }
    }
    drop(end);
    for complaint in super::complaints() {
        eprintln!("ff-conform: far end: {complaint}");
    }
}

/// Listens at a path; each connection is a far end in a process of its own.
pub(crate) fn listen(env: &Env, path: &Path) -> std::io::Result<()> {
    let _ = std::fs::remove_file(path);
    let listener = UnixListener::bind(path)?;
    println!("serving at {}", path.display());
    let mut children: Vec<Child> = Vec::new();
    for stream in listener.incoming() {
        children.retain_mut(|child| !matches!(child.try_wait(), Ok(Some(_))));
        children.push(spawn_far(env, stream?.into())?);
    }
    Ok(())
}
