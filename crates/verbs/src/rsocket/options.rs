//! `setsockopt(2)` and `getsockopt(2)`.

use core::ffi::{c_int, c_void};
use std::time::{Duration, Instant};

use freeflow_client::{CmOption, Errno};
use freeflow_rsocket::{Config, Phase as End, map_entries};

use super::config::defaults;
use super::datagram::DatagramSocket;
use super::stream::{Phase, StreamSocket};
use super::wait::{Source, Waits, now};

/// Options of rsockets alone.
pub(super) const SOL_RDMA: c_int = 0x10000;
const RDMA_SQSIZE: c_int = 0;
const RDMA_RQSIZE: c_int = 1;
const RDMA_INLINE: c_int = 2;
const RDMA_IOMAPSIZE: c_int = 3;
const RDMA_ROUTE: c_int = 4;

/// How long `close` waits for what was sent to arrive, unless the program says how long: only a
/// peer that lives but does nothing takes longer.
const LINGER: Duration = Duration::from_secs(10);

/// `TCP_KEEPIDLE`, if the system does not say.
const KEEP_IDLE: u32 = 7200;

/// What a program has set.
#[derive(Clone)]
pub(super) struct Options {
    pub(super) config: Config,
    reuse_address: bool,
    keep_alive: bool,
    keep_idle: Option<u32>,
    keep_interval: i32,
    keep_count: i32,
    oob_inline: bool,
    no_delay: bool,
    v6_only: bool,
    tos: i32,
    linger: Option<Duration>,
    send_time: Option<Duration>,
    receive_time: Option<Duration>,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            config: defaults().config,
            reuse_address: false,
            keep_alive: false,
            keep_idle: None,
            keep_interval: 75,
            keep_count: 9,
            oob_inline: false,
            no_delay: false,
            v6_only: false,
            tos: 0,
            linger: None,
            send_time: None,
            receive_time: None,
        }
    }
}

impl Options {
    /// How long to wait in `close`.
    pub(super) fn linger(&self) -> Duration {
        self.linger.unwrap_or(LINGER)
    }

    /// Nanoseconds between signs of life, if they are asked for.
    pub(super) fn keep_alive(&self) -> Option<u64> {
        if !self.keep_alive {
            return None;
        }
        let idle = self.keep_idle.unwrap_or_else(|| {
            let text = std::fs::read_to_string("/proc/sys/net/ipv4/tcp_keepalive_time");
            let idle = text.ok().and_then(|text| text.trim().parse().ok());
            idle.unwrap_or(KEEP_IDLE)
        });
        Some(u64::from(idle) * 1_000_000_000)
    }

    pub(super) fn send_deadline(&self) -> Option<Instant> {
        deadline(self.send_time)
    }

    pub(super) fn receive_deadline(&self) -> Option<Instant> {
        deadline(self.receive_time)
    }
}

/// When a time from now is over; `None`: never, or later than can be told.
pub(super) fn deadline(time: Option<Duration>) -> Option<Instant> {
    Instant::now().checked_add(time?)
}

/// The program's value of an option.
pub(super) struct Value<'a>(pub(super) &'a [u8]);

impl Value<'_> {
    fn int(&self) -> Result<i32, Errno> {
        let bytes = self.0.first_chunk().ok_or(Errno::INVAL)?;
        Ok(i32::from_ne_bytes(*bytes))
    }

    fn flag(&self) -> Result<bool, Errno> {
        Ok(self.int()? != 0)
    }

    /// A size that is at least 0.
    fn size<T: TryFrom<i32>>(&self, most: T) -> Result<T, Errno> {
        let int = self.int()?;
        if int < 0 {
            return Err(Errno::INVAL);
        }
        Ok(T::try_from(int).unwrap_or(most))
    }

    /// `struct timeval`, as the kernel takes it: of zero, none; before that, no time at all. EDOM:
    /// its microseconds are negative, or a second.
    fn time(&self) -> Result<Option<Duration>, Errno> {
        let (seconds, micros) = self.0.split_at_checked(8).ok_or(Errno::INVAL)?;
        let (Some(seconds), Some(micros)) = (seconds.first_chunk(), micros.first_chunk()) else {
            return Err(Errno::INVAL);
        };
        let micros = i64::from_ne_bytes(*micros);
        let micros = u64::try_from(micros).map_err(|_| Errno::DOM)?;
        if micros >= 1_000_000 {
            return Err(Errno::DOM);
        }
        let Ok(seconds) = u64::try_from(i64::from_ne_bytes(*seconds)) else {
            return Ok(Some(Duration::ZERO));
        };
        let time = Duration::from_secs(seconds) + Duration::from_micros(micros);
        Ok(Some(time).filter(|time| !time.is_zero()))
    }
}

fn time_bytes(time: Option<Duration>) -> Vec<u8> {
    let time = time.unwrap_or_default();
    let mut bytes = (time.as_secs() as i64).to_ne_bytes().to_vec();
    bytes.extend_from_slice(&i64::from(time.subsec_micros()).to_ne_bytes());
    bytes
}

impl StreamSocket {
    /// `setsockopt(2)`. ENOTSUP: rsockets have no such option.
    pub(super) fn set_option(&self, level: c_int, name: c_int, v: &Value<'_>) -> Result<(), Errno> {
        let mut inner = self.lock();
        let fresh = matches!(inner.phase, Phase::Idle | Phase::Listening);
        let inner = &mut *inner;
        let options = &mut inner.options;
        let config = &mut options.config;
        match (level, name) {
            (libc::SOL_SOCKET, libc::SO_REUSEADDR) => {
                let on = v.flag()?;
                if fresh && inner.info.is_none() {
                    inner.id.set_option(CmOption::ReuseAddr(on))?;
                }
                options.reuse_address = on;
            }
            // As the kernel doubles it. A stream that has its buffers keeps them.
            (libc::SOL_SOCKET, libc::SO_SNDBUF) => {
                let size = v.size(u32::MAX)?.saturating_mul(2);
                config.send_buffer = size.clamp(Config::MIN_BUFFER, Config::MAX_BUFFER);
            }
            (libc::SOL_SOCKET, libc::SO_RCVBUF) => {
                let size = v.size(u32::MAX)?.saturating_mul(2);
                config.recv_buffer = size.clamp(Config::MIN_BUFFER, Config::MAX_BUFFER);
            }
            (libc::SOL_SOCKET, libc::SO_LINGER) => {
                let on = v.flag()?;
                let seconds = Value(v.0.get(4..).ok_or(Errno::INVAL)?).size(u32::MAX)?;
                options.linger = on.then(|| Duration::from_secs(seconds.into()));
            }
            (libc::SOL_SOCKET, libc::SO_KEEPALIVE) => {
                options.keep_alive = v.flag()?;
                inner.renew_keep_alive();
            }
            (libc::SOL_SOCKET, libc::SO_OOBINLINE) => options.oob_inline = v.flag()?,
            (libc::SOL_SOCKET, libc::SO_SNDTIMEO) => options.send_time = v.time()?,
            (libc::SOL_SOCKET, libc::SO_RCVTIMEO) => options.receive_time = v.time()?,
            (libc::IPPROTO_IP, libc::IP_TOS) => {
                let tos = v.int()?;
                inner.id.set_option(CmOption::Tos(tos as u8))?;
                options.tos = tos;
            }
            (libc::IPPROTO_IPV6, libc::IPV6_V6ONLY) => {
                let on = v.flag()?;
                inner.id.set_option(CmOption::AfOnly(on))?;
                options.v6_only = on;
            }
            (libc::IPPROTO_TCP, libc::TCP_NODELAY) => options.no_delay = v.flag()?,
            // The queue pair sees to it.
            (libc::IPPROTO_TCP, libc::TCP_KEEPINTVL) => options.keep_interval = v.int()?,
            (libc::IPPROTO_TCP, libc::TCP_KEEPCNT) => options.keep_count = v.int()?,
            (libc::IPPROTO_TCP, libc::TCP_MAXSEG | libc::TCP_CONGESTION) => {}
            (libc::IPPROTO_TCP, libc::TCP_KEEPIDLE) => {
                options.keep_idle = Some(v.size(u32::MAX)?).filter(|&n| n != 0);
                if options.keep_idle.is_none() {
                    return Err(Errno::INVAL);
                }
                inner.renew_keep_alive();
            }
            (SOL_RDMA, _) if !fresh => return Err(Errno::INVAL),
            (SOL_RDMA, RDMA_SQSIZE) => config.send_requests = v.size(u16::MAX)?,
            (SOL_RDMA, RDMA_RQSIZE) => config.recv_requests = v.size(u16::MAX)?,
            (SOL_RDMA, RDMA_INLINE) => config.inline = v.size(u32::MAX)?,
            (SOL_RDMA, RDMA_IOMAPSIZE) => config.maps = map_entries(v.size(u16::MAX)?),
            // The router knows the way.
            (SOL_RDMA, RDMA_ROUTE) => {}
            _ => return Err(Errno::NOTSUP),
        }
        Ok(())
    }

    /// `getsockopt(2)`: the value's bytes. ENOTSUP: rsockets have no such option.
    pub(super) fn option(&self, level: c_int, name: c_int) -> Result<Vec<u8>, Errno> {
        let mut inner = self.lock();
        if name == libc::SO_ERROR && inner.is_opening() {
            inner.advance(true);
        }
        let inner = &mut *inner;
        let options = &inner.options;
        // What a connected stream has.
        let config = match &inner.link {
            Some(link) => link.stream.config(),
            None => &options.config,
        };
        let connected = matches!(&inner.link, Some(l) if l.stream.phase() == End::Connected);
        let int = match (level, name) {
            (libc::SOL_SOCKET, libc::SO_REUSEADDR) => options.reuse_address.into(),
            (libc::SOL_SOCKET, libc::SO_KEEPALIVE) => options.keep_alive.into(),
            (libc::SOL_SOCKET, libc::SO_OOBINLINE) => options.oob_inline.into(),
            (libc::SOL_SOCKET, libc::SO_SNDBUF) => config.send_buffer as i32,
            (libc::SOL_SOCKET, libc::SO_RCVBUF) => config.recv_buffer as i32,
            (libc::SOL_SOCKET, libc::SO_BROADCAST) => 0,
            (libc::SOL_SOCKET, libc::SO_TYPE) => libc::SOCK_STREAM,
            (libc::SOL_SOCKET, libc::SO_DOMAIN) => self.family,
            (libc::SOL_SOCKET, libc::SO_PROTOCOL) => libc::IPPROTO_TCP,
            (libc::SOL_SOCKET, libc::SO_ACCEPTCONN) => {
                matches!(inner.phase, Phase::Listening).into()
            }
            (libc::SOL_SOCKET, libc::SO_ERROR) => inner.error.take().map_or(0, Errno::raw_os_error),
            (libc::SOL_SOCKET, libc::SO_SNDTIMEO) => return Ok(time_bytes(options.send_time)),
            (libc::SOL_SOCKET, libc::SO_RCVTIMEO) => return Ok(time_bytes(options.receive_time)),
            (libc::SOL_SOCKET, libc::SO_LINGER) => {
                let on = i32::from(options.linger.is_some());
                let seconds = options.linger.unwrap_or_default().as_secs() as i32;
                return Ok([on.to_ne_bytes(), seconds.to_ne_bytes()].concat());
            }
            (libc::IPPROTO_IP, libc::IP_TOS) => options.tos,
            (libc::IPPROTO_IPV6, libc::IPV6_V6ONLY) => options.v6_only.into(),
            (libc::IPPROTO_TCP, libc::TCP_NODELAY) => options.no_delay.into(),
            (libc::IPPROTO_TCP, libc::TCP_KEEPIDLE) => {
                options.keep_idle.unwrap_or(KEEP_IDLE) as i32
            }
            (libc::IPPROTO_TCP, libc::TCP_KEEPINTVL) => options.keep_interval,
            (libc::IPPROTO_TCP, libc::TCP_KEEPCNT) => options.keep_count,
            (libc::IPPROTO_TCP, libc::TCP_MAXSEG) => {
                let mtu = inner.info.and_then(|info| info.port).map(|port| port.mtu);
                mtu.map_or(2048, |mtu| mtu.bytes() as i32)
            }
            (libc::IPPROTO_TCP, libc::TCP_CONGESTION) => return Ok(b"rdma\0".to_vec()),
            (libc::IPPROTO_TCP, libc::TCP_INFO) => {
                let mut info = vec![0; TCP_INFO_BYTES];
                info[0] = if connected {
                    TCP_ESTABLISHED
                } else {
                    TCP_CLOSE
                };
                let window = u32::from(config.send_requests).to_ne_bytes();
                info[TCP_INFO_WINDOW..][..4].copy_from_slice(&window);
                return Ok(info);
            }
            (SOL_RDMA, RDMA_SQSIZE) => config.send_requests.into(),
            (SOL_RDMA, RDMA_RQSIZE) => config.recv_requests.into(),
            (SOL_RDMA, RDMA_INLINE) => config.inline as i32,
            (SOL_RDMA, RDMA_IOMAPSIZE) => config.maps.into(),
            (SOL_RDMA, RDMA_ROUTE) => return Ok(Vec::new()),
            _ => return Err(Errno::NOTSUP),
        };
        Ok(int.to_ne_bytes().to_vec())
    }
}

impl DatagramSocket {
    /// Takes a size that its queue pairs are to have, unless there are some, or how long a call may
    /// wait.
    pub(super) fn set_size(&self, level: c_int, name: c_int, v: &Value<'_>) -> Result<(), Errno> {
        let mut inner = self.lock();
        let has_paths = inner.has_paths();
        let inner = &mut *inner;
        let config = &mut inner.config;
        match (level, name) {
            (SOL_RDMA, _) if has_paths => return Err(Errno::INVAL),
            (SOL_RDMA, RDMA_SQSIZE) => config.send_requests = v.size(u16::MAX)?,
            (SOL_RDMA, RDMA_RQSIZE) => config.recv_requests = v.size(u16::MAX)?,
            (SOL_RDMA, RDMA_INLINE) => config.inline = v.size(u32::MAX)?,
            (SOL_RDMA, _) => return Err(Errno::NOTSUP),
            (libc::SOL_SOCKET, libc::SO_SNDBUF) if !has_paths => {
                config.send_buffer = v.size(u32::MAX)?.saturating_mul(2).min(Config::MAX_BUFFER);
            }
            (libc::SOL_SOCKET, libc::SO_RCVBUF) if !has_paths => {
                config.recv_buffer = v.size(u32::MAX)?.saturating_mul(2).min(Config::MAX_BUFFER);
            }
            (libc::SOL_SOCKET, libc::SO_SNDTIMEO) => inner.send_time = v.time()?,
            (libc::SOL_SOCKET, libc::SO_RCVTIMEO) => inner.receive_time = v.time()?,
            _ => {}
        }
        Ok(())
    }

    /// A size of its queue pairs; `None`: the UDP socket knows.
    pub(super) fn size(&self, level: c_int, name: c_int) -> Option<[u8; 4]> {
        let config = self.lock().config;
        let int: i32 = match (level, name) {
            (SOL_RDMA, RDMA_SQSIZE) => config.send_requests.into(),
            (SOL_RDMA, RDMA_RQSIZE) => config.recv_requests.into(),
            (SOL_RDMA, RDMA_INLINE) => config.inline as i32,
            _ => return None,
        };
        Some(int.to_ne_bytes())
    }
}

/// `struct tcp_info`: its first part, which all its versions have, and `tcpi_snd_cwnd` in it.
const TCP_INFO_BYTES: usize = 104;
const TCP_INFO_WINDOW: usize = 80;
const TCP_ESTABLISHED: u8 = 1;
const TCP_CLOSE: u8 = 7;

impl super::stream::Inner {
    fn renew_keep_alive(&mut self) {
        let interval = self.options.keep_alive();
        if let Some(link) = &mut self.link {
            link.stream.keep_alive(interval, now());
        }
    }
}

/// Copies a value to where the program wants it, as much as there is room.
///
/// # Safety
///
/// `len` is null or points at the room that `to` points at.
pub(super) unsafe fn give(
    bytes: &[u8],
    to: *mut c_void,
    len: *mut libc::socklen_t,
) -> Result<(), Errno> {
    if to.is_null() || len.is_null() {
        return Err(Errno::FAULT);
    }
    // SAFETY: by the caller's promise.
    unsafe {
        let n = bytes.len().min(*len as usize);
        std::ptr::copy_nonoverlapping(bytes.as_ptr(), to.cast(), n);
        *len = n as libc::socklen_t;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn time(seconds: i64, micros: i64) -> Result<Option<Duration>, Errno> {
        Value(&[seconds.to_ne_bytes(), micros.to_ne_bytes()].concat()).time()
    }

    #[test]
    fn times_are_those_of_the_kernel() {
        assert_eq!(time(0, 0), Ok(None));
        assert_eq!(time(2, 999_999), Ok(Some(Duration::from_micros(2_999_999))));
        for seconds in [-1, i64::MIN] {
            assert_eq!(time(seconds, 1), Ok(Some(Duration::ZERO)));
        }
        for (seconds, micros) in [(1, 1_000_000), (1, i64::MAX), (1, -1), (-1, -1)] {
            assert_eq!(time(seconds, micros), Err(Errno::DOM), "{seconds} {micros}");
        }
        assert_eq!(Value(&[0; 15]).time(), Err(Errno::INVAL));
    }

    #[test]
    fn the_longest_time_never_ends() {
        let longest = time(i64::MAX, 999_999).unwrap();
        assert_eq!(deadline(longest), None);
        assert!(deadline(time(1, 0).unwrap()).is_some());
    }
}
