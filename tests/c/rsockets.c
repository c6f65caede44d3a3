/*
 * Rsockets: both ends in one process, on one endpoint.
 *
 * Usage: rsockets ADDRESS CASE [ARGUMENT]
 *
 * The argument is the port to listen at, or what the case says.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <ifaddrs.h>
#include <limits.h>
#include <net/if.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <rdma/rsocket.h>
#include <semaphore.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "check.h"

static struct sockaddr_in address;
static const char *argument;

struct pair {
	int listener, near, far;
};

/* A byte of the stream. */
static unsigned char byte_at(size_t at)
{
	return (unsigned char)((at * 2654435761u) >> 13);
}

static void fill(unsigned char *to, size_t at, size_t len)
{
	for (size_t i = 0; i < len; i++)
		to[i] = byte_at(at + i);
}

static int is_filled(const unsigned char *bytes, size_t at, size_t len)
{
	for (size_t i = 0; i < len; i++) {
		if (bytes[i] != byte_at(at + i))
			return 0;
	}
	return 1;
}

static int ready(int fd, short events, int timeout_ms)
{
	struct pollfd polled = {.fd = fd, .events = events};
	int n = rpoll(&polled, 1, timeout_ms);

	return n == 1 ? polled.revents : n;
}

static void set_nonblocking(int fd, int on)
{
	MUST(rfcntl(fd, F_SETFL, on ? O_NONBLOCK : 0) == 0);
	MUST(!!(rfcntl(fd, F_GETFL) & O_NONBLOCK) == on);
}

static int listen_with(int buffers, int maps)
{
	int fd = rsocket(AF_INET, SOCK_STREAM, 0);
	int on = 1;

	MUST(fd >= 0);
	MUST(rsetsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on) == 0);
	if (buffers) {
		MUST(rsetsockopt(fd, SOL_SOCKET, SO_SNDBUF, &buffers, sizeof buffers) == 0);
		MUST(rsetsockopt(fd, SOL_SOCKET, SO_RCVBUF, &buffers, sizeof buffers) == 0);
	}
	if (maps)
		MUST(rsetsockopt(fd, SOL_RDMA, RDMA_IOMAPSIZE, &maps, sizeof maps) == 0);
	MUST(rbind(fd, (struct sockaddr *)&address, sizeof address) == 0);
	MUST(rlisten(fd, 8) == 0);
	return fd;
}

static struct sockaddr_in name_of(int fd)
{
	struct sockaddr_in name;
	socklen_t len = sizeof name;

	MUST(rgetsockname(fd, (struct sockaddr *)&name, &len) == 0 && len == sizeof name);
	return name;
}

static int begin(int listener, int buffers, int maps)
{
	int fd = rsocket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, IPPROTO_TCP);
	struct sockaddr_in to = name_of(listener);

	MUST(fd >= 0 && (rfcntl(fd, F_GETFL) & O_NONBLOCK));
	if (buffers) {
		MUST(rsetsockopt(fd, SOL_SOCKET, SO_SNDBUF, &buffers, sizeof buffers) == 0);
		MUST(rsetsockopt(fd, SOL_SOCKET, SO_RCVBUF, &buffers, sizeof buffers) == 0);
	}
	if (maps)
		MUST(rsetsockopt(fd, SOL_RDMA, RDMA_IOMAPSIZE, &maps, sizeof maps) == 0);
	FAILS(rconnect(fd, (struct sockaddr *)&to, sizeof to), EINPROGRESS);
	return fd;
}

/* Begins to connect, until that is to be accepted. */
static int request(int listener, int buffers, int maps)
{
	int fd = begin(listener, buffers, maps);
	struct pollfd both[2] = {
		{.fd = listener, .events = POLLIN},
		{.fd = fd, .events = POLLOUT},
	};

	do {
		/* Waiting for it is what brings the connection on. */
		MUST(rpoll(both, 2, DEADLINE_MS) > 0);
		MUST(both[1].revents == 0);
	} while (!both[0].revents);
	return fd;
}

/* Connects without blocking: nobody else would accept. */
static struct pair connected_with(int buffers, int maps)
{
	struct pair pair = {.listener = listen_with(buffers, maps)};
	struct sockaddr_in from;
	socklen_t len = sizeof from;
	int error;

	pair.near = request(pair.listener, buffers, maps);
	pair.far = raccept(pair.listener, (struct sockaddr *)&from, &len);
	MUST(pair.far >= 0 && len == sizeof from);
	MUST(ready(pair.near, POLLOUT, DEADLINE_MS) == POLLOUT);
	len = sizeof error;
	MUST(rgetsockopt(pair.near, SOL_SOCKET, SO_ERROR, &error, &len) == 0 && error == 0);
	CHECK(name_of(pair.near).sin_port == from.sin_port);
	set_nonblocking(pair.near, 0);
	return pair;
}

static struct pair connected(void)
{
	return connected_with(0, 0);
}

/* Two datagram sockets. The second is connected to the first, whom others reach too. */
static void datagram_pair(int ends[2])
{
	struct sockaddr_in names[2];

	for (int i = 0; i < 2; i++) {
		ends[i] = rsocket(AF_INET, SOCK_DGRAM, 0);
		MUST(ends[i] >= 0);
		MUST(rbind(ends[i], (struct sockaddr *)&address, sizeof address) == 0);
		names[i] = name_of(ends[i]);
	}
	MUST(rconnect(ends[1], (struct sockaddr *)&names[0], sizeof *names) == 0);
}

/* Connects the first one as well. */
static void datagram_connect(const int ends[2])
{
	struct sockaddr_in name = name_of(ends[1]);

	MUST(rconnect(ends[0], (struct sockaddr *)&name, sizeof name) == 0);
}

/* One datagram there and one back: over UDP, and each knows the other's queue pair then. */
static void datagrams_meet(const int ends[2])
{
	char c = 0;

	for (int i = 0; i < 2; i++) {
		struct sockaddr_in name = name_of(ends[!i]);

		MUST(rsendto(ends[i], &c, 1, 0, (struct sockaddr *)&name, sizeof name) == 1);
		MUST(ready(ends[!i], POLLIN, DEADLINE_MS) == POLLIN);
		MUST(rrecv(ends[!i], &c, 1, 0) == 1);
	}
}

static double seconds(clockid_t clock)
{
	struct timespec now;

	clock_gettime(clock, &now);
	return now.tv_sec + now.tv_nsec / 1e9;
}

static double cpu_seconds(void)
{
	struct rusage used;

	getrusage(RUSAGE_SELF, &used);
	return used.ru_utime.tv_sec + used.ru_stime.tv_sec +
	       (used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6;
}

static void end(struct pair pair)
{
	CHECK(rclose(pair.near) == 0);
	CHECK(rclose(pair.far) == 0);
	CHECK(rclose(pair.listener) == 0);
}

static void send_all(int fd, size_t at, size_t len)
{
	unsigned char *bytes = malloc(len + 1);
	size_t done = 0;

	fill(bytes, at, len);
	while (done < len) {
		ssize_t n = rsend(fd, bytes + done, len - done, 0);
		MUST(n > 0);
		done += (size_t)n;
	}
	free(bytes);
}

static void receive_all(int fd, size_t at, size_t len, size_t step)
{
	unsigned char *bytes = malloc(step);

	while (len) {
		ssize_t n = rrecv(fd, bytes, step < len ? step : len, 0);
		MUST(n > 0);
		MUST(is_filled(bytes, at, (size_t)n));
		at += (size_t)n;
		len -= (size_t)n;
	}
	free(bytes);
}

static void stream(void)
{
	static const size_t sizes[] = {1, 63, 64, 65, 2048, 5000, 65536, 100000};
	struct pair pair = connected();
	struct sockaddr_in peer;
	socklen_t len = sizeof peer;
	size_t at = 0;
	char c;

	CHECK(rgetpeername(pair.near, (struct sockaddr *)&peer, &len) == 0);
	CHECK(peer.sin_addr.s_addr == address.sin_addr.s_addr);
	CHECK(peer.sin_port == name_of(pair.listener).sin_port);
	for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
		send_all(pair.near, at, sizes[i]);
		receive_all(pair.far, at, sizes[i], 100000);
		send_all(pair.far, at, sizes[i]);
		receive_all(pair.near, at, sizes[i], 1000);
		at += sizes[i];
	}
	CHECK(rclose(pair.near) == 0);
	CHECK(rread(pair.far, &c, 1) == 0);
	CHECK(rread(pair.far, &c, 1) == 0);
	FAILS(rwrite(pair.far, &c, 1), ECONNRESET);
	CHECK(rclose(pair.far) == 0 && rclose(pair.listener) == 0);
}

struct job {
	int fd;
	size_t len, step;
};

static void *sender(void *arg)
{
	struct job *job = arg;

	for (size_t at = 0; at < job->len; at += job->step)
		send_all(job->fd, at, job->step);
	return NULL;
}

static void *receiver(void *arg)
{
	struct job *job = arg;

	receive_all(job->fd, 0, job->len, job->step);
	return NULL;
}

/* All four directions of two sockets at once, each in a thread of its own. */
static void exchange(struct pair pair, size_t len, size_t send_step, size_t receive_step)
{
	struct job jobs[4] = {
		{pair.near, len, send_step},
		{pair.far, len, send_step},
		{pair.near, len, receive_step},
		{pair.far, len, receive_step},
	};
	pthread_t threads[4];

	for (int i = 0; i < 4; i++)
		MUST(!pthread_create(&threads[i], NULL, i < 2 ? sender : receiver, &jobs[i]));
	for (int i = 0; i < 4; i++)
		pthread_join(threads[i], NULL);
}

static void threads(void)
{
	struct pair pair = connected();

	exchange(pair, 8 << 20, 1 << 20, 50000);
	end(pair);
}

static void single_bytes(void)
{
	struct pair pair = connected();

	exchange(pair, 5000, 1, 7);
	end(pair);
}

static void small_buffers(void)
{
	struct pair pair = connected_with(1, 0);
	int size;
	socklen_t len = sizeof size;

	CHECK(rgetsockopt(pair.far, SOL_SOCKET, SO_RCVBUF, &size, &len) == 0 && size == 4096);
	exchange(pair, 1 << 19, 1 << 14, 3000);
	end(pair);
}

/* A peer that does not read stops the sender, and one that reads lets it go on. */
static void backpressure(void)
{
	struct pair pair = connected();
	unsigned char *bytes = malloc(1 << 20);
	size_t sent = 0;
	ssize_t n;

	set_nonblocking(pair.near, 1);
	do {
		fill(bytes, sent, 30000);
		n = rsend(pair.near, bytes, 30000, 0);
		if (n > 0)
			sent += (size_t)n;
		/* What is under way arrives meanwhile, and is taken in. */
		CHECK(n > 0 || errno == EAGAIN);
		CHECK(ready(pair.far, POLLIN, DEADLINE_MS) == POLLIN);
	} while (n > 0 || ready(pair.near, POLLOUT, 200) > 0);
	CHECK(sent >= 1 << 17);
	CHECK(ready(pair.near, POLLIN | POLLOUT, 0) == 0);
	CHECK(ready(pair.far, POLLIN, 0) == POLLIN);
	receive_all(pair.far, 0, sent, 4096);
	CHECK(ready(pair.near, POLLOUT, DEADLINE_MS) == POLLOUT);
	FAILS(rrecv(pair.far, bytes, 1, MSG_DONTWAIT), EAGAIN);
	send_all(pair.near, sent, 1000);
	receive_all(pair.far, sent, 1000, 1000);
	free(bytes);
	end(pair);
}

static void half_close(void)
{
	struct pair pair = connected();
	char c = 0;

	send_all(pair.near, 0, 60000);
	CHECK(rshutdown(pair.near, SHUT_WR) == 0);
	FAILS(rsend(pair.near, &c, 1, 0), EPIPE);
	receive_all(pair.far, 0, 60000, 5000);
	CHECK(rrecv(pair.far, &c, 1, 0) == 0);
	CHECK(ready(pair.far, POLLIN | POLLOUT | POLLRDHUP, 0) == (POLLIN | POLLOUT | POLLRDHUP));
	send_all(pair.far, 0, 60000);
	receive_all(pair.near, 0, 60000, 5000);
	CHECK(rshutdown(pair.far, SHUT_RDWR) == 0);
	CHECK(rrecv(pair.near, &c, 1, 0) == 0);
	CHECK(ready(pair.near, POLLIN, DEADLINE_MS) & POLLHUP);
	FAILS(rshutdown(pair.near, 17), EINVAL);
	end(pair);
}

static void nobody_listens(void)
{
	int fd = rsocket(AF_INET, SOCK_STREAM, 0), error = 0;
	int probe = listen_with(0, 0);
	struct sockaddr_in to = name_of(probe);
	socklen_t len = sizeof error;

	CHECK(rclose(probe) == 0);
	FAILS(rconnect(fd, (struct sockaddr *)&to, sizeof to), ECONNREFUSED);
	FAILS(rsend(fd, &to, 1, 0), ENOTCONN);
	CHECK(rclose(fd) == 0);
	fd = rsocket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
	/* The answer may be there at once. */
	CHECK(rconnect(fd, (struct sockaddr *)&to, sizeof to) == -1);
	if (errno == EINPROGRESS) {
		CHECK(ready(fd, POLLOUT, DEADLINE_MS) == (POLLOUT | POLLERR | POLLHUP));
		CHECK(rgetsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &len) == 0);
		errno = error;
	}
	CHECK(errno == ECONNREFUSED);
	CHECK(ready(fd, POLLOUT, DEADLINE_MS) == (POLLOUT | POLLERR | POLLHUP));
	CHECK(rgetsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &len) == 0 && error == 0);
	CHECK(rclose(fd) == 0);
}

static void flags_and_vectors(void)
{
	struct pair pair = connected();
	unsigned char in[3000], out[3000];
	struct iovec parts[] = {{out, 10}, {out + 10, 0}, {out + 10, 1990}, {out + 2000, 1000}};
	struct iovec into[] = {{in, 1}, {in + 1, 1999}, {in + 2000, 1000}};
	struct msghdr message = {.msg_iov = parts, .msg_iovlen = 4};
	struct sockaddr_in from;
	socklen_t len = sizeof from;

	fill(out, 0, sizeof out);
	CHECK(rwritev(pair.near, parts, 4) == 3000);
	CHECK(ready(pair.far, POLLIN, DEADLINE_MS) == POLLIN);
	CHECK(rrecv(pair.far, in, 10, MSG_PEEK) == 10 && is_filled(in, 0, 10));
	CHECK(rrecv(pair.far, in, 10, MSG_PEEK) == 10 && is_filled(in, 0, 10));
	CHECK(rrecv(pair.far, in, 3000, MSG_WAITALL) == 3000 && is_filled(in, 0, 3000));
	CHECK(rsendmsg(pair.far, &message, 0) == 3000);
	CHECK(ready(pair.near, POLLIN, DEADLINE_MS) == POLLIN);
	memset(in, 0, sizeof in);
	CHECK(rreadv(pair.near, into, 2) == 2000 && is_filled(in, 0, 2000));
	/* A stream begins with pieces of 2048 bytes: the rest may come later. */
	CHECK(rrecvfrom(pair.near, in, 1000, MSG_WAITALL, (struct sockaddr *)&from, &len) == 1000);
	CHECK(is_filled(in, 2000, 1000) && len == sizeof from);
	CHECK(from.sin_port == name_of(pair.listener).sin_port);
	FAILS(rsendto(pair.near, in, 1, 0, (struct sockaddr *)&from, len), EISCONN);
	message.msg_control = in;
	message.msg_controllen = 10;
	FAILS(rsendmsg(pair.near, &message, 0), ENOTSUP);
	CHECK(rsend(pair.near, in, 0, 0) == 0 && rrecv(pair.near, in, 0, 0) == 0);
	end(pair);
}

static int get(int fd, int level, int name)
{
	int value = -1;
	socklen_t len = sizeof value;

	CHECK(rgetsockopt(fd, level, name, &value, &len) == 0 && len == sizeof value);
	return value;
}

static void options(void)
{
	int fd = rsocket(AF_INET, SOCK_STREAM, 0), value = 1, size = 100;
	struct linger linger = {1, 3}, seen;
	struct timeval time = {0, 50000};
	struct tcp_info info;
	socklen_t len = sizeof seen;
	struct pair pair;
	char c;

	CHECK(get(fd, SOL_SOCKET, SO_SNDBUF) == 1 << 17 && get(fd, SOL_RDMA, RDMA_SQSIZE) == 384);
	CHECK(rsetsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &value, sizeof value) == 0);
	CHECK(get(fd, IPPROTO_TCP, TCP_NODELAY) == 1);
	CHECK(rsetsockopt(fd, SOL_RDMA, RDMA_RQSIZE, &size, sizeof size) == 0);
	CHECK(get(fd, SOL_RDMA, RDMA_RQSIZE) == 100);
	CHECK(rsetsockopt(fd, SOL_SOCKET, SO_LINGER, &linger, sizeof linger) == 0);
	CHECK(rgetsockopt(fd, SOL_SOCKET, SO_LINGER, &seen, &len) == 0);
	CHECK(seen.l_onoff == 1 && seen.l_linger == 3);
	CHECK(rsetsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &value, sizeof value) == 0);
	CHECK(rsetsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &value, sizeof value) == 0);
	CHECK(get(fd, IPPROTO_TCP, TCP_KEEPIDLE) == 1);
	CHECK(get(fd, SOL_SOCKET, SO_TYPE) == SOCK_STREAM);
	FAILS(rsetsockopt(fd, SOL_SOCKET, SO_MARK, &value, sizeof value), ENOTSUP);
	FAILS(rsetsockopt(fd, SOL_SOCKET, SO_SNDBUF, &value, 1), EINVAL);
	CHECK(rclose(fd) == 0);
	pair = connected();
	len = sizeof info;
	CHECK(rgetsockopt(pair.near, IPPROTO_TCP, TCP_INFO, &info, &len) == 0);
	CHECK(info.tcpi_state == TCP_ESTABLISHED);
	FAILS(rsetsockopt(pair.near, SOL_RDMA, RDMA_RQSIZE, &size, sizeof size), EINVAL);
	CHECK(rsetsockopt(pair.near, SOL_SOCKET, SO_RCVTIMEO, &time, sizeof time) == 0);
	FAILS(rrecv(pair.near, &c, 1, 0), EAGAIN);
	/* Signs of life go by unseen. */
	CHECK(rsetsockopt(pair.far, SOL_SOCKET, SO_KEEPALIVE, &value, sizeof value) == 0);
	CHECK(rsetsockopt(pair.far, IPPROTO_TCP, TCP_KEEPIDLE, &value, sizeof value) == 0);
	CHECK(ready(pair.far, POLLIN, 2500) == 0);
	CHECK(ready(pair.near, POLLIN, 0) == 0);
	send_all(pair.far, 0, 10);
	receive_all(pair.near, 0, 10, 10);
	end(pair);
}

static void set_time(int fd, int name, long seconds, long micros)
{
	struct timeval time = {seconds, micros};

	MUST(rsetsockopt(fd, SOL_SOCKET, name, &time, sizeof time) == 0);
}

/* How long calls may take, as the kernel takes it. */
static void times_out(int near, int far)
{
	struct timeval time = {1, 1000000}, seen;
	socklen_t len = sizeof seen;
	char c = 0;

	set_time(near, SO_RCVTIMEO, 0, 50000);
	FAILS(rrecv(near, &c, 1, 0), EAGAIN);
	FAILS(rsetsockopt(near, SOL_SOCKET, SO_RCVTIMEO, &time, sizeof time), EDOM);
	time = (struct timeval){-1, -1};
	FAILS(rsetsockopt(near, SOL_SOCKET, SO_RCVTIMEO, &time, sizeof time), EDOM);
	/* Before now: at once, but with what there is. */
	set_time(near, SO_RCVTIMEO, -1, 0);
	set_time(near, SO_SNDTIMEO, LONG_MIN, 999999);
	CHECK(rgetsockopt(near, SOL_SOCKET, SO_RCVTIMEO, &seen, &len) == 0);
	CHECK(seen.tv_sec == 0 && seen.tv_usec == 0);
	FAILS(rrecv(near, &c, 1, 0), EAGAIN);
	CHECK(rsend(far, &c, 1, 0) == 1);
	CHECK(ready(near, POLLIN, DEADLINE_MS) == POLLIN);
	CHECK(rrecv(near, &c, 1, 0) == 1);
	CHECK(rsend(near, &c, 1, 0) == 1 && rrecv(far, &c, 1, 0) == 1);
	/* Longer than clocks go. */
	set_time(near, SO_RCVTIMEO, LONG_MAX, 999999);
	set_time(near, SO_SNDTIMEO, LONG_MAX, 999999);
	CHECK(rsend(near, &c, 1, 0) == 1 && rrecv(far, &c, 1, 0) == 1);
	CHECK(rsend(far, &c, 1, 0) == 1 && rrecv(near, &c, 1, 0) == 1);
}

static void timeouts(void)
{
	struct pair pair = connected();
	int ends[2];

	times_out(pair.near, pair.far);
	end(pair);
	datagram_pair(ends);
	datagram_connect(ends);
	datagrams_meet(ends);
	times_out(ends[0], ends[1]);
	CHECK(rclose(ends[0]) == 0 && rclose(ends[1]) == 0);
}

static void mixed_polling(void)
{
	struct pair pair = connected();
	int pipes[2];
	struct pollfd fds[3];
	fd_set in, out;
	struct timeval none = {0, 0};

	MUST(pipe(pipes) == 0);
	fds[0] = (struct pollfd){.fd = pair.far, .events = POLLIN};
	fds[1] = (struct pollfd){.fd = pipes[0], .events = POLLIN};
	fds[2] = (struct pollfd){.fd = -1, .events = POLLIN};
	CHECK(rpoll(fds, 3, 20) == 0);
	CHECK(write(pipes[1], "x", 1) == 1);
	CHECK(rpoll(fds, 3, DEADLINE_MS) == 1 && fds[1].revents == POLLIN && !fds[0].revents);
	send_all(pair.near, 0, 1);
	CHECK(ready(pair.far, POLLIN, DEADLINE_MS) == POLLIN);
	CHECK(rpoll(fds, 3, DEADLINE_MS) == 2 && fds[0].revents == POLLIN);
	FD_ZERO(&in);
	FD_ZERO(&out);
	FD_SET(pair.far, &in);
	FD_SET(pair.near, &in);
	FD_SET(pipes[0], &in);
	FD_SET(pair.near, &out);
	CHECK(rselect(FD_SETSIZE, &in, &out, NULL, NULL) == 3);
	CHECK(FD_ISSET(pair.far, &in) && FD_ISSET(pipes[0], &in) && FD_ISSET(pair.near, &out));
	CHECK(!FD_ISSET(pair.near, &in));
	receive_all(pair.far, 0, 1, 1);
	FD_ZERO(&in);
	FD_SET(pair.far, &in);
	CHECK(rselect(pair.far + 1, &in, NULL, NULL, &none) == 0 && !FD_ISSET(pair.far, &in));
	fds[0].fd = 900;
	CHECK(rpoll(fds, 1, 0) == 1 && fds[0].revents == POLLNVAL);
	close(pipes[0]);
	close(pipes[1]);
	end(pair);
}

static int polled_events;

static void *poller(void *arg)
{
	polled_events = ready(*(int *)arg, POLLIN, DEADLINE_MS);
	return NULL;
}

static void *reader(void *arg)
{
	char c;

	return (void *)rrecv(*(int *)arg, &c, 1, 0);
}

/* Whatever one thread takes in, the others are told of. */
static void waiting_threads(void)
{
	struct pair pair = connected();
	pthread_t threads[2];
	void *got;

	MUST(!pthread_create(&threads[0], NULL, poller, &pair.far));
	MUST(!pthread_create(&threads[1], NULL, reader, &pair.near));
	usleep(20000);
	send_all(pair.near, 0, 1);
	pthread_join(threads[0], NULL);
	CHECK(polled_events == POLLIN);
	CHECK(rshutdown(pair.far, SHUT_RDWR) == 0);
	pthread_join(threads[1], &got);
	CHECK(got == NULL);
	end(pair);
	/* A listener that is closed wakes who accepts. */
	pair.listener = listen_with(0, 0);
	MUST(!pthread_create(&threads[0], NULL, poller, &pair.listener));
	usleep(20000);
	CHECK(rclose(pair.listener) == 0);
	pthread_join(threads[0], NULL);
	CHECK(polled_events == POLLNVAL);
}

/* Called when a thread that has set it is about to sleep, with what it sleeps for. */
static __thread void (*before_sleep)(struct pollfd *fds, nfds_t nfds);

/* The library's own system calls come here. */
long syscall(long number, ...)
{
	static long (*call)(long, ...);
	void (*hook)(struct pollfd *, nfds_t) = before_sleep;
	long args[6];
	va_list list;

	va_start(list, number);
	for (int i = 0; i < 6; i++)
		args[i] = va_arg(list, long);
	va_end(list);
	if (!call)
		call = (long (*)(long, ...))dlsym(RTLD_NEXT, "syscall");
	if (number == SYS_ppoll && hook) {
		const struct timespec *time = (void *)args[2];

		if (!time || time->tv_sec || time->tv_nsec) {
			before_sleep = NULL;
			hook((struct pollfd *)args[0], args[1]);
		}
	}
	return call(number, args[0], args[1], args[2], args[3], args[4], args[5]);
}

/* A thread that receives, and one that polls, on one socket. */
static struct {
	int fd, pipe;
	sem_t poller_sleeps, poller_ready, poller_may, polled;
	sem_t receiver_sleeps, receiver_may, received;
} sleeping;

static void await(sem_t *sem)
{
	struct timespec deadline;

	clock_gettime(CLOCK_REALTIME, &deadline);
	deadline.tv_sec += DEADLINE_MS / 1000;
	MUST(sem_timedwait(sem, &deadline) == 0);
}

/* Holds the poller until what it sleeps for is there. */
static void poller_sleeps(struct pollfd *fds, nfds_t nfds)
{
	sem_post(&sleeping.poller_sleeps);
	MUST(poll(fds, nfds, DEADLINE_MS) > 0);
	sem_post(&sleeping.poller_ready);
	await(&sleeping.poller_may);
}

static void *sleeping_poller(void *arg)
{
	struct pollfd both[2] = {
		{.fd = sleeping.fd, .events = POLLIN},
		{.fd = sleeping.pipe, .events = POLLIN},
	};

	before_sleep = poller_sleeps;
	MUST(rpoll(both, 2, DEADLINE_MS) > 0);
	sem_post(&sleeping.polled);
	return arg;
}

static void receiver_sleeps(struct pollfd *fds, nfds_t nfds)
{
	(void)fds;
	(void)nfds;
	sem_post(&sleeping.receiver_sleeps);
	await(&sleeping.receiver_may);
}

/* Takes the first byte while its event is under way to the poller, and then sleeps for the next. */
static void *sleeping_receiver(void *arg)
{
	char c;

	while (rrecv(sleeping.fd, &c, 1, MSG_DONTWAIT) != 1)
		MUST(errno == EAGAIN);
	before_sleep = receiver_sleeps;
	MUST(rrecv(sleeping.fd, &c, 1, 0) == 1);
	sem_post(&sleeping.received);
	return arg;
}

static void nobody_oversleeps(int near, int far)
{
	sem_t *sems[] = {&sleeping.poller_sleeps, &sleeping.poller_ready, &sleeping.poller_may,
			 &sleeping.polled, &sleeping.receiver_sleeps, &sleeping.receiver_may,
			 &sleeping.received};
	pthread_t threads[2];
	int pipes[2];

	MUST(pipe(pipes) == 0);
	sleeping.fd = near;
	sleeping.pipe = pipes[0];
	for (size_t i = 0; i < sizeof sems / sizeof *sems; i++)
		MUST(sem_init(sems[i], 0, 0) == 0);
	MUST(!pthread_create(&threads[0], NULL, sleeping_poller, NULL));
	await(&sleeping.poller_sleeps);
	MUST(rsend(far, "x", 1, 0) == 1);
	await(&sleeping.poller_ready);
	MUST(!pthread_create(&threads[1], NULL, sleeping_receiver, NULL));
	await(&sleeping.receiver_sleeps);
	/* The poller takes the event and goes: something else has happened too. */
	MUST(write(pipes[1], "x", 1) == 1);
	sem_post(&sleeping.poller_may);
	await(&sleeping.polled);
	MUST(rsend(far, "x", 1, 0) == 1);
	sem_post(&sleeping.receiver_may);
	await(&sleeping.received);
	pthread_join(threads[0], NULL);
	pthread_join(threads[1], NULL);
	close(pipes[0]);
	close(pipes[1]);
}

/* Who takes an event that others sleep for, and then sleeps no more, wakes them. */
static void sleepers(void)
{
	struct pair pair = connected();
	int ends[2];

	nobody_oversleeps(pair.near, pair.far);
	end(pair);
	datagram_pair(ends);
	datagram_connect(ends);
	datagrams_meet(ends);
	nobody_oversleeps(ends[0], ends[1]);
	CHECK(rclose(ends[0]) == 0 && rclose(ends[1]) == 0);
}

/* At the edge, an end of a stream is told when it comes, not for ever. */
static void epoll_tells_hang_ups_once(void)
{
	int (*create)(int) = dlsym(RTLD_DEFAULT, "repoll_create");
	int (*ctl)(int, int, int, struct epoll_event *) = dlsym(RTLD_DEFAULT, "repoll_ctl");
	int (*wait)(int, struct epoll_event *, int, int) = dlsym(RTLD_DEFAULT, "repoll_wait");
	struct pair pair = connected();
	struct epoll_event event = {.events = EPOLLIN | EPOLLET}, got[4];
	unsigned told = 0;
	double used;
	int fd, times = 0;

	MUST(create && ctl && wait);
	fd = create(0);
	MUST(fd >= 0 && ctl(fd, EPOLL_CTL_ADD, pair.far, &event) == 0);
	CHECK(rclose(pair.near) == 0);
	while (!(told & EPOLLHUP)) {
		MUST(wait(fd, got, 4, DEADLINE_MS) == 1);
		told |= got[0].events;
	}
	CHECK(told & EPOLLIN);
	/* The connection's end may come behind the stream's. Nothing keeps a wait busy then. */
	do {
		used = cpu_seconds();
	} while (wait(fd, got, 4, 2000) != 0 && ++times < 10);
	CHECK(times < 10);
	CHECK(cpu_seconds() - used < 0.5);
	CHECK(rclose(fd) == 0 && rclose(pair.far) == 0 && rclose(pair.listener) == 0);
}

static void epoll(void)
{
	int (*create)(int) = dlsym(RTLD_DEFAULT, "repoll_create");
	int (*ctl)(int, int, int, struct epoll_event *) = dlsym(RTLD_DEFAULT, "repoll_ctl");
	int (*wait)(int, struct epoll_event *, int, int) = dlsym(RTLD_DEFAULT, "repoll_wait");
	struct pair pair = connected();
	struct epoll_event event = {.events = EPOLLIN, .data.u64 = 7}, got[4];
	int pipes[2], fd;

	MUST(create && ctl && wait);
	MUST(pipe(pipes) == 0);
	fd = create(EPOLL_CLOEXEC);
	MUST(fd >= 0);
	CHECK(ctl(fd, EPOLL_CTL_ADD, pair.far, &event) == 0);
	FAILS(ctl(fd, EPOLL_CTL_ADD, pair.far, &event), EEXIST);
	FAILS(ctl(fd, EPOLL_CTL_MOD, pair.near, &event), ENOENT);
	event.data.u64 = 8;
	CHECK(ctl(fd, EPOLL_CTL_ADD, pipes[0], &event) == 0);
	CHECK(wait(fd, got, 4, 10) == 0);
	CHECK(write(pipes[1], "x", 1) == 1);
	CHECK(wait(fd, got, 4, DEADLINE_MS) == 1 && got[0].data.u64 == 8);
	send_all(pair.near, 0, 10);
	CHECK(ready(pair.far, POLLIN, DEADLINE_MS) == POLLIN);
	CHECK(wait(fd, got, 4, DEADLINE_MS) == 2);
	CHECK(wait(fd, got, 1, DEADLINE_MS) == 1);
	CHECK(ctl(fd, EPOLL_CTL_DEL, pipes[0], NULL) == 0);
	/* At the edge: once, until more comes. */
	event = (struct epoll_event){.events = EPOLLIN | EPOLLET, .data.u64 = 9};
	CHECK(ctl(fd, EPOLL_CTL_MOD, pair.far, &event) == 0);
	CHECK(wait(fd, got, 4, DEADLINE_MS) == 1 && got[0].data.u64 == 9);
	CHECK(got[0].events == EPOLLIN);
	CHECK(wait(fd, got, 4, 10) == 0);
	send_all(pair.near, 10, 10);
	CHECK(wait(fd, got, 4, DEADLINE_MS) == 1);
	/* Once, until it is asked for again. */
	event = (struct epoll_event){.events = EPOLLOUT | EPOLLONESHOT, .data.u64 = 10};
	CHECK(ctl(fd, EPOLL_CTL_MOD, pair.far, &event) == 0);
	CHECK(wait(fd, got, 4, DEADLINE_MS) == 1 && got[0].events == EPOLLOUT);
	CHECK(wait(fd, got, 4, 10) == 0);
	CHECK(ctl(fd, EPOLL_CTL_MOD, pair.far, &event) == 0);
	CHECK(wait(fd, got, 4, DEADLINE_MS) == 1);
	receive_all(pair.far, 0, 20, 20);
	CHECK(rclose(pair.far) == 0);
	CHECK(wait(fd, got, 4, 10) == 0);
	CHECK(rclose(pair.near) == 0 && rclose(pair.listener) == 0 && rclose(fd) == 0);
	FAILS(wait(fd, got, 4, 0), EBADF);
	close(pipes[0]);
	close(pipes[1]);
}

static void direct_writes(void)
{
	static unsigned char target[100000], other[100];
	struct pair pair = connected_with(0, 4);
	unsigned char source[50000];
	char c;

	fill(source, 0, sizeof source);
	CHECK(riomap(pair.far, target, sizeof target, PROT_WRITE, 0, 0) == 0);
	CHECK(riomap(pair.far, other, sizeof other, PROT_WRITE, 0, -1) == (off_t)(size_t)other);
	send_all(pair.far, 0, 1);
	receive_all(pair.near, 0, 1, 1);
	CHECK(riowrite(pair.near, source, sizeof source, 1000, 0) == sizeof source);
	CHECK(riowrite(pair.near, source, 100, (off_t)(size_t)other, 0) == 100);
	send_all(pair.near, 0, 1);
	receive_all(pair.far, 0, 1, 1);
	CHECK(is_filled(target + 1000, 0, sizeof source) && is_filled(other, 0, 100));
	FAILS((ssize_t)riowrite(pair.near, source, 10, 100000, 0), EINVAL);
	CHECK(riounmap(pair.far, target, sizeof target) == 0);
	FAILS(riounmap(pair.far, target, sizeof target), EINVAL);
	FAILS(riomap(pair.far, &c, 1, PROT_READ, 0, 0), EINVAL);
	FAILS(riomap(pair.listener, &c, 1, PROT_WRITE, 0, 0), EINVAL);
	end(pair);
}

static int open_descriptors(void)
{
	DIR *dir = opendir("/proc/self/fd");
	int n = 0;

	MUST(dir);
	while (readdir(dir))
		n++;
	closedir(dir);
	return n;
}

/* A child has nothing open of its parent's sockets once it has closed them. */
static void forks_close_all(void)
{
	struct pair first = connected(), pairs[8];
	int ends[2], status, open = open_descriptors();
	pid_t child;

	for (int i = 0; i < 8; i++)
		pairs[i] = connected();
	datagram_pair(ends);
	datagrams_meet(ends);
	child = fork();
	MUST(child >= 0);
	if (child == 0) {
		for (int i = 0; i < 8; i++)
			end(pairs[i]);
		CHECK(rclose(ends[0]) == 0 && rclose(ends[1]) == 0);
		CHECK(open_descriptors() <= open);
		end(first);
		_exit(checks());
	}
	MUST(waitpid(child, &status, 0) == child);
	CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
	datagrams_meet(ends);
	for (int i = 0; i < 8; i++) {
		exchange(pairs[i], 10000, 10000, 10000);
		end(pairs[i]);
	}
	CHECK(rclose(ends[0]) == 0 && rclose(ends[1]) == 0);
	end(first);
}

/* Memory that nobody may touch before its fault is handled. */
static void *faulting;

static void fault(int signal)
{
	(void)signal;
	sem_post(&sleeping.receiver_sleeps);
	await(&sleeping.receiver_may);
	MUST(mprotect(faulting, 10, PROT_READ | PROT_WRITE) == 0);
}

static void *faulting_receiver(void *arg)
{
	CHECK(rrecv(*(int *)arg, faulting, 10, 0) == 10);
	return NULL;
}

/* What a child has open when it has closed these. */
static int left_in_a_child(struct pair pair)
{
	pid_t child = fork();
	int status;

	MUST(child >= 0);
	if (child == 0) {
		end(pair);
		_exit(open_descriptors());
	}
	MUST(waitpid(child, &status, 0) == child && WIFEXITED(status));
	return WEXITSTATUS(status);
}

/* Nor if another thread of the parent's is at a socket at that time: here, copies what it receives. */
static void forks_beside_threads(void)
{
	struct sigaction action = {.sa_handler = fault};
	struct pair pair = connected();
	pthread_t thread;
	int left;

	MUST(sem_init(&sleeping.receiver_sleeps, 0, 0) == 0);
	MUST(sem_init(&sleeping.receiver_may, 0, 0) == 0);
	faulting = mmap(NULL, 10, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	MUST(faulting != MAP_FAILED && sigaction(SIGSEGV, &action, NULL) == 0);
	send_all(pair.far, 0, 10);
	CHECK(ready(pair.near, POLLIN, DEADLINE_MS) == POLLIN);
	left = left_in_a_child(pair);
	MUST(!pthread_create(&thread, NULL, faulting_receiver, &pair.near));
	await(&sleeping.receiver_sleeps);
	CHECK(left_in_a_child(pair) == left);
	sem_post(&sleeping.receiver_may);
	pthread_join(thread, NULL);
	CHECK(is_filled(faulting, 0, 10));
	end(pair);
}

/* What a program has put in the place of our descriptors is its own. */
static void forks_leave_what_is_not_theirs(void)
{
	enum { most = 256 };
	struct pair first = connected(), pair;
	int before[most], pipes[2], status;
	pid_t child;

	MUST(pipe(pipes) == 0);
	for (int fd = 0; fd < most; fd++)
		before[fd] = fcntl(fd, F_GETFD) >= 0;
	pair = connected();
	for (int fd = 0; fd < most; fd++)
		if (!before[fd] && fcntl(fd, F_GETFD) >= 0) {
			before[fd] = -1;
			MUST(dup2(pipes[0], fd) == fd);
		}
	CHECK(before[pair.near] == -1 && before[pair.far] == -1);
	child = fork();
	MUST(child >= 0);
	if (child == 0) {
		end(pair);
		for (int fd = 0; fd < most; fd++)
			CHECK(before[fd] != -1 || fcntl(fd, F_GETFD) >= 0);
		end(first);
		_exit(checks());
	}
	MUST(waitpid(child, &status, 0) == child);
	CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
	fflush(stdout);
	/* This process has nothing to end by. */
	printf("%d checks, %d failed\n", checks_done, checks_failed);
	fflush(stdout);
	_exit(checks_failed != 0);
}

/* A child cannot use its parent's connections, and does not end them. */
static void forks(void)
{
	struct pair pair = connected();
	int status;
	pid_t child;
	char c;

	send_all(pair.near, 0, 1000);
	child = fork();
	MUST(child >= 0);
	if (child == 0) {
		FAILS(rsend(pair.near, &c, 1, 0), EBADF);
		FAILS(rrecv(pair.far, &c, 1, 0), EBADF);
		end(pair);
		/* It has its own. */
		pair = connected();
		exchange(pair, 100000, 10000, 10000);
		end(pair);
		exit(checks());
	}
	MUST(waitpid(child, &status, 0) == child);
	CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
	receive_all(pair.far, 0, 1000, 1000);
	exchange(pair, 100000, 10000, 10000);
	end(pair);
}

/* What a program has sent arrives although it ends without closing. */
static void exits(void)
{
	int port[2], status, listener, fd;
	struct sockaddr_in to = address;
	pid_t child;
	char c;

	MUST(pipe(port) == 0);
	child = fork();
	MUST(child >= 0);
	if (child == 0) {
		close(port[1]);
		MUST(read(port[0], &to.sin_port, sizeof to.sin_port) == sizeof to.sin_port);
		fd = rsocket(AF_INET, SOCK_STREAM, 0);
		MUST(rconnect(fd, (struct sockaddr *)&to, sizeof to) == 0);
		send_all(fd, 0, 300000);
		exit(checks());
	}
	listener = listen_with(0, 0);
	to = name_of(listener);
	CHECK(write(port[1], &to.sin_port, sizeof to.sin_port) == sizeof to.sin_port);
	fd = raccept(listener, NULL, NULL);
	MUST(fd >= 0);
	receive_all(fd, 0, 300000, 10000);
	CHECK(rrecv(fd, &c, 1, 0) == 0);
	MUST(waitpid(child, &status, 0) == child);
	CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
	CHECK(rclose(fd) == 0 && rclose(listener) == 0);
	close(port[0]);
	close(port[1]);
}

static void errors(void)
{
	int fd = rsocket(AF_INET, SOCK_STREAM, 0);
	struct sockaddr_in name;
	socklen_t len = sizeof name;
	char c;

	FAILS(rsocket(AF_UNIX, SOCK_STREAM, 0), ENOTSUP);
	FAILS(rsocket(AF_INET, SOCK_RAW, 0), ENOTSUP);
	FAILS(rsocket(AF_INET, SOCK_STREAM, IPPROTO_UDP), ENOTSUP);
	FAILS(rsend(fd, &c, 1, 0), ENOTCONN);
	FAILS(rrecv(fd, &c, 1, 0), ENOTCONN);
	FAILS(rshutdown(fd, SHUT_WR), ENOTCONN);
	FAILS(raccept(fd, NULL, NULL), EINVAL);
	FAILS(rgetpeername(fd, (struct sockaddr *)&name, &len), ENOTCONN);
	CHECK(rgetsockname(fd, (struct sockaddr *)&name, &len) == 0);
	CHECK(name.sin_family == AF_INET && name.sin_port == 0);
	FAILS(rbind(fd, (struct sockaddr *)&address, 3), EINVAL);
	name.sin_addr.s_addr = htonl(0x0A0B0C0D);
	FAILS(rbind(fd, (struct sockaddr *)&name, sizeof name), ENODEV);
	FAILS(rfcntl(fd, F_DUPFD, 0), ENOTSUP);
	CHECK(rclose(fd) == 0);
	FAILS(rclose(fd), EBADF);
	FAILS(rsend(fd, &c, 1, 0), EBADF);
	FAILS(rlisten(-1, 1), EBADF);
	FAILS(rbind(0, (struct sockaddr *)&address, sizeof address), EBADF);
}

/* A stream on which nothing more comes when the router dies: whoever runs this kills it. */
static void router_dies(void)
{
	struct pair pair = connected();
	char c;
	int fd;

	printf("ready\n");
	fflush(stdout);
	CHECK(rrecv(pair.near, &c, 1, 0) <= 0);
	CHECK(ready(pair.far, POLLIN, DEADLINE_MS) & (POLLHUP | POLLERR));
	while (rsend(pair.far, &c, 1, 0) == 1)
		;
	end(pair);
	fd = rsocket(AF_INET, SOCK_STREAM, 0);
	CHECK(fd == -1 && errno == ENODEV);
}

/* Streams whose peers have hung up before the router dies, with bytes that nobody has read: nothing
 * more comes, and no wait for it is busy. */
static void hung_up_router_dies(void)
{
	int (*create)(int) = dlsym(RTLD_DEFAULT, "repoll_create");
	int (*ctl)(int, int, int, struct epoll_event *) = dlsym(RTLD_DEFAULT, "repoll_ctl");
	int (*wait)(int, struct epoll_event *, int, int) = dlsym(RTLD_DEFAULT, "repoll_wait");
	struct epoll_event event = {.events = EPOLLIN | EPOLLRDHUP | EPOLLET}, got[4];
	struct pair unread = connected(), told = connected(), alive = connected();
	double used, until;
	int fd;
	char c;

	MUST(create && ctl && wait);
	fd = create(0);
	MUST(fd >= 0 && ctl(fd, EPOLL_CTL_ADD, told.far, &event) == 0);
	send_all(unread.near, 0, 10);
	CHECK(rclose(unread.near) == 0 && rclose(told.near) == 0);
	CHECK(ready(unread.far, POLLRDHUP, DEADLINE_MS) == POLLRDHUP);
	CHECK(ready(told.far, POLLIN, DEADLINE_MS) == (POLLIN | POLLHUP));
	printf("ready\n");
	fflush(stdout);
	CHECK(rrecv(alive.near, &c, 1, 0) <= 0);
	used = cpu_seconds();
	CHECK(ready(unread.far, 0, 2000) == 0);
	CHECK(cpu_seconds() - used < 0.5);
	/* The hang-up is told, and perhaps once more. */
	for (int i = 0; i < 10; i++) {
		used = cpu_seconds();
		if (wait(fd, got, 4, 2000) == 0)
			break;
	}
	CHECK(cpu_seconds() - used < 0.5);
	receive_all(unread.far, 0, 10, 10);
	CHECK(rrecv(unread.far, &c, 1, 0) <= 0);
	CHECK(ready(unread.far, 0, DEADLINE_MS) & POLLHUP);
	until = seconds(CLOCK_MONOTONIC) + 5;
	CHECK(rclose(unread.far) == 0 && rclose(unread.listener) == 0 && rclose(fd) == 0);
	CHECK(rclose(told.far) == 0 && rclose(told.listener) == 0);
	CHECK(seconds(CLOCK_MONOTONIC) < until);
	end(alive);
}

/* Who waits for something else of a listener does not see to requests. */
static void listeners_sleep(void)
{
	int (*create)(int) = dlsym(RTLD_DEFAULT, "repoll_create");
	int (*ctl)(int, int, int, struct epoll_event *) = dlsym(RTLD_DEFAULT, "repoll_ctl");
	int (*wait)(int, struct epoll_event *, int, int) = dlsym(RTLD_DEFAULT, "repoll_wait");
	struct epoll_event event = {.events = EPOLLIN | EPOLLET}, got[4];
	int listener = listen_with(0, 0), fd, near[2], far[2];
	double used;

	MUST(create && ctl && wait);
	fd = create(0);
	MUST(fd >= 0 && ctl(fd, EPOLL_CTL_ADD, listener, &event) == 0);
	set_nonblocking(listener, 1);
	for (int i = 0; i < 2; i++) {
		near[i] = request(listener, 0, 0);
		/* At the edge: once for each that comes behind the last that was accepted. */
		MUST(wait(fd, got, 4, DEADLINE_MS) == 1 && got[0].events == EPOLLIN);
		used = cpu_seconds();
		CHECK(ready(listener, POLLOUT, 1000) == 0);
		CHECK(wait(fd, got, 4, 1000) == 0);
		CHECK(cpu_seconds() - used < 0.5);
		far[i] = raccept(listener, NULL, NULL);
		MUST(far[i] >= 0);
		FAILS(raccept(listener, NULL, NULL), EAGAIN);
	}
	for (int i = 0; i < 2; i++)
		CHECK(rclose(near[i]) == 0 && rclose(far[i]) == 0);
	CHECK(rclose(fd) == 0 && rclose(listener) == 0);
}

/* Datagrams, from each of two sockets to the other: over UDP first, then between queue pairs. */
static void datagrams(void)
{
	int ends[2], size;
	struct sockaddr_in names[2], from;
	socklen_t len = sizeof from;
	unsigned char out[2000], in[3000];

	fill(out, 0, sizeof out);
	for (int i = 0; i < 2; i++) {
		ends[i] = rsocket(AF_INET, SOCK_DGRAM, 0);
		MUST(ends[i] >= 0);
		MUST(rbind(ends[i], (struct sockaddr *)&address, sizeof address) == 0);
		names[i] = name_of(ends[i]);
	}
	FAILS(rrecv(ends[0], in, 10, MSG_DONTWAIT), EAGAIN);
	for (int round = 0; round < 200; round++) {
		int a = round % 2, b = 1 - a;
		size_t n = 1 + (size_t)round * 9;

		CHECK(rsendto(ends[a], out, n, 0, (struct sockaddr *)&names[b], sizeof from) ==
		      (ssize_t)n);
		MUST(ready(ends[b], POLLIN, DEADLINE_MS) == POLLIN);
		len = sizeof from;
		CHECK(rrecvfrom(ends[b], in, sizeof in, 0, (struct sockaddr *)&from, &len) ==
		      (ssize_t)n);
		CHECK(is_filled(in, 0, n) && from.sin_port == names[a].sin_port);
		CHECK(from.sin_addr.s_addr == address.sin_addr.s_addr);
	}
	CHECK(rconnect(ends[0], (struct sockaddr *)&names[1], sizeof from) == 0);
	CHECK(rsend(ends[0], out, 5, 0) == 5 && rrecv(ends[1], in, 2, 0) == 2);
	FAILS(rsend(ends[0], out, 1 << 20, 0), EMSGSIZE);
	size = get(ends[0], SOL_SOCKET, SO_TYPE);
	CHECK(size == SOCK_DGRAM);
	CHECK(rclose(ends[0]) == 0 && rclose(ends[1]) == 0);
}

/* Datagram sockets whose router dies: whoever runs this kills it. */
static void datagrams_router_dies(void)
{
	int ends[4][2];
	double until, used;
	ssize_t n;
	char c;

	for (int i = 0; i < 4; i++) {
		datagram_pair(ends[i]);
		datagram_connect(ends[i]);
		datagrams_meet(ends[i]);
	}
	used = cpu_seconds();
	printf("ready\n");
	fflush(stdout);
	/* In its sleep, */
	FAILS(rrecv(ends[0][0], &c, 1, 0), EIO);
	FAILS(rrecv(ends[0][0], &c, 1, 0), EIO);
	FAILS(rsend(ends[0][0], &c, 1, 0), EIO);
	CHECK(ready(ends[1][0], POLLIN, DEADLINE_MS) == (POLLIN | POLLERR));
	CHECK(ready(ends[1][0], 0, DEADLINE_MS) == POLLERR);
	CHECK(cpu_seconds() - used < 10);
	/* and awake. */
	until = seconds(CLOCK_MONOTONIC) + DEADLINE_MS / 1000;
	do {
		n = rrecv(ends[2][0], &c, 1, MSG_DONTWAIT);
	} while (n < 0 && errno == EAGAIN && seconds(CLOCK_MONOTONIC) < until);
	CHECK(n < 0 && errno == EIO);
	while (!(n = ready(ends[3][0], POLLIN, 0)) && seconds(CLOCK_MONOTONIC) < until)
		;
	CHECK(n == (POLLIN | POLLERR));
	for (int i = 0; i < 4; i++)
		CHECK(rclose(ends[i][0]) == 0 && rclose(ends[i][1]) == 0);
}

/* A socket whose queue pair always has something for it hears of newcomers too. */
static void newcomers(void)
{
	/* So many are under way that one is always there. */
	enum { under_way = 300, rounds = 2000 };
	struct sockaddr_in name, from;
	int ends[2], fd = rsocket(AF_INET, SOCK_DGRAM, 0), round = 0, size = 1 << 20;
	socklen_t len;
	char c = 0;

	datagram_pair(ends);
	MUST(rsetsockopt(ends[0], SOL_SOCKET, SO_RCVBUF, &size, sizeof size) == 0);
	datagrams_meet(ends);
	name = name_of(ends[0]);
	for (int i = 0; i < under_way; i++)
		MUST(rsend(ends[1], &c, 1, 0) == 1);
	MUST(fd >= 0 && rbind(fd, (struct sockaddr *)&address, sizeof address) == 0);
	MUST(rsendto(fd, &c, 1, 0, (struct sockaddr *)&name, sizeof name) == 1);
	do {
		len = sizeof from;
		MUST(rrecvfrom(ends[0], &c, 1, 0, (struct sockaddr *)&from, &len) == 1);
		MUST(rsend(ends[1], &c, 1, 0) == 1);
	} while (from.sin_port != name_of(fd).sin_port && ++round < rounds);
	CHECK(round < rounds);
	CHECK(rclose(ends[0]) == 0 && rclose(ends[1]) == 0 && rclose(fd) == 0);
}

/* An address of this host's that no endpoint has. */
static int unreachable(struct sockaddr_in *found)
{
	struct ifaddrs *all, *at;
	int some = 0;

	MUST(getifaddrs(&all) == 0);
	for (at = all; at && !some; at = at->ifa_next) {
		if (at->ifa_addr && at->ifa_addr->sa_family == AF_INET &&
		    !(at->ifa_flags & IFF_LOOPBACK)) {
			memcpy(found, at->ifa_addr, sizeof *found);
			found->sin_port = 0;
			some = 1;
		}
	}
	freeifaddrs(all);
	return some;
}

/* They tell a queue pair that is none, and ask for nothing. */
static unsigned char from_stranger[] = {0x55, 0x55, 0x55, 0x55, 4, 7, 16, 0,
					      0,    0,    0,    9,    1, 2, 3,  4};

struct flood {
	int fd;
	struct sockaddr_in to;
	volatile int ends;
};

static void *flooder(void *arg)
{
	struct flood *flood = arg;

	/* Each tells of another queue pair, whose way is to be found. */
	while (!flood->ends) {
		from_stranger[11]++;
		sendto(flood->fd, from_stranger, sizeof from_stranger, 0,
		       (struct sockaddr *)&flood->to, sizeof flood->to);
	}
	return NULL;
}

static int bound(struct sockaddr_in *from)
{
	int fd = socket(AF_INET, SOCK_DGRAM, 0);

	MUST(fd >= 0 && bind(fd, (struct sockaddr *)from, sizeof *from) == 0);
	return fd;
}

/* What strangers send to the UDP socket neither fails nor stops the program. */
static void strangers(void)
{
	int answers = 0, answered = 0;
	char answer[sizeof from_stranger];
	struct sockaddr_in from = {.sin_family = AF_INET};
	struct flood flood = {0};
	pthread_t thread;
	int ends[2], fd;
	char c;

	datagram_pair(ends);
	datagrams_meet(ends);
	datagrams_meet(ends);
	flood.to = name_of(ends[0]);
	from.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	if (!unreachable(&from))
		printf("no address but loopback's\n");
	for (int i = 0; i < 100; i++) {
		fd = bound(&from);
		for (size_t len = 0; len <= sizeof from_stranger; len += 4)
			MUST(sendto(fd, from_stranger, len, 0, (struct sockaddr *)&flood.to,
				    sizeof flood.to) == (ssize_t)len);
		close(fd);
		/* Nothing of theirs is the program's. */
		FAILS(rrecv(ends[0], &c, 1, MSG_DONTWAIT), EAGAIN);
	}
	datagrams_meet(ends);
	/* What they say is heard, but not all are remembered. */
	from_stranger[5] = 0;
	for (int i = 0; i < 1100; i++) {
		fd = bound(&from);
		MUST(sendto(fd, from_stranger, sizeof from_stranger, 0,
			    (struct sockaddr *)&flood.to, sizeof flood.to) > 0);
		MUST(rrecv(ends[0], &c, 1, 0) == 0);
		answered = recv(fd, answer, sizeof answer, MSG_DONTWAIT) == sizeof answer;
		answers += answered;
		close(fd);
	}
	CHECK(answers > 0 && !answered);
	from_stranger[5] = 7;
	datagrams_meet(ends);
	/* Nor does one who never ends. */
	flood.fd = bound(&from);
	MUST(!pthread_create(&thread, NULL, flooder, &flood));
	for (int i = 0; i < 5; i++) {
		FAILS(rrecv(ends[0], &c, 1, MSG_DONTWAIT), EAGAIN);
		datagrams_meet(ends);
	}
	flood.ends = 1;
	pthread_join(thread, NULL);
	close(flood.fd);
	CHECK(rclose(ends[0]) == 0 && rclose(ends[1]) == 0);
}

/* A call takes its time for one stranger, whose way is to be found, and leaves the others to the
 * next. */
static void strangers_in_turn(void)
{
	enum { many = 20 };
	int ends[2], fds[many], answered = 0;
	struct sockaddr_in from = {.sin_family = AF_INET}, to;
	char c, answer[sizeof from_stranger];

	from.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	datagram_pair(ends);
	datagrams_meet(ends);
	datagrams_meet(ends);
	to = name_of(ends[0]);
	from_stranger[5] = 0;
	for (int i = 0; i < many; i++) {
		fds[i] = bound(&from);
		MUST(sendto(fds[i], from_stranger, sizeof from_stranger, 0,
			    (struct sockaddr *)&to, sizeof to) > 0);
	}
	/* What is left of the two's own meeting has its turns too. */
	for (int turn = 0; answered < many && turn < 2 * many; turn++) {
		int before = answered;

		MUST(rrecv(ends[0], &c, 1, MSG_DONTWAIT) == 0 || errno == EAGAIN);
		for (int i = 0; i < many; i++)
			if (recv(fds[i], answer, sizeof answer, MSG_DONTWAIT) > 0)
				answered++;
		CHECK(answered - before <= 1);
	}
	CHECK(answered == many);
	for (int i = 0; i < many; i++)
		close(fds[i]);
	CHECK(rclose(ends[0]) == 0 && rclose(ends[1]) == 0);
}

/* A program with many streams ends although nothing that it has sent arrives: the router, whose
 * process the argument is, stands still meanwhile. */
static void exits_beside_a_stopped_router(void)
{
	enum { pairs = 100 };
	struct pair all[pairs];
	pid_t router = atoi(argument), child = fork();
	double until;
	int status;

	MUST(router > 0 && child >= 0);
	if (child == 0) {
		for (int i = 0; i < pairs; i++) {
			all[i] = connected_with(1, 0);
			exchange(all[i], 1, 1, 1);
		}
		MUST(kill(router, SIGSTOP) == 0);
		for (int i = 0; i < pairs; i++) {
			send_all(all[i].near, 0, 100);
			send_all(all[i].far, 0, 100);
		}
		exit(checks());
	}
	until = seconds(CLOCK_MONOTONIC) + DEADLINE_MS / 1000;
	while (waitpid(child, &status, WNOHANG) == 0 && seconds(CLOCK_MONOTONIC) < until)
		usleep(10000);
	CHECK(seconds(CLOCK_MONOTONIC) < until && WIFEXITED(status) && WEXITSTATUS(status) == 0);
	kill(child, SIGKILL);
	CHECK(kill(router, SIGCONT) == 0);
}

/* Sends back what one peer sends, until that ends. */
static void echo(void)
{
	int listener, fd;
	char *all = malloc(16 << 20);
	ssize_t n = 0, len = 0, sent = 0;

	address.sin_port = htons(atoi(argument));
	listener = listen_with(0, 0);
	fd = raccept(listener, NULL, NULL);
	MUST(fd >= 0);
	while ((n = rrecv(fd, all + len, (16 << 20) - len, 0)) > 0)
		len += n;
	MUST(n == 0);
	while (sent < len && (n = rsend(fd, all + sent, len - sent, 0)) > 0)
		sent += n;
	CHECK(sent == len && len > 0);
	CHECK(rclose(fd) == 0 && rclose(listener) == 0);
	free(all);
}

int main(int argc, char **argv)
{
	static const struct {
		const char *name;
		void (*run)(void);
	} cases[] = {
		{"stream", stream},
		{"threads", threads},
		{"single_bytes", single_bytes},
		{"small_buffers", small_buffers},
		{"backpressure", backpressure},
		{"half_close", half_close},
		{"nobody_listens", nobody_listens},
		{"flags_and_vectors", flags_and_vectors},
		{"options", options},
		{"mixed_polling", mixed_polling},
		{"waiting_threads", waiting_threads},
		{"sleepers", sleepers},
		{"timeouts", timeouts},
		{"epoll_tells_hang_ups_once", epoll_tells_hang_ups_once},
		{"epoll", epoll},
		{"direct_writes", direct_writes},
		{"forks_close_all", forks_close_all},
		{"forks_beside_threads", forks_beside_threads},
		{"forks_leave_what_is_not_theirs", forks_leave_what_is_not_theirs},
		{"forks", forks},
		{"exits", exits},
		{"errors", errors},
		{"router_dies", router_dies},
		{"hung_up_router_dies", hung_up_router_dies},
		{"listeners_sleep", listeners_sleep},
		{"datagrams_router_dies", datagrams_router_dies},
		{"newcomers", newcomers},
		{"strangers", strangers},
		{"strangers_in_turn", strangers_in_turn},
		{"exits_beside_a_stopped_router", exits_beside_a_stopped_router},
		{"datagrams", datagrams},
		{"echo", echo},
	};

	signal(SIGPIPE, SIG_DFL);
	if (argc < 3 || argc > 4 || inet_pton(AF_INET, argv[1], &address.sin_addr) != 1)
		return 2;
	address.sin_family = AF_INET;
	argument = argc == 4 ? argv[3] : "0";
	for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
		if (strcmp(cases[i].name, argv[2]) == 0) {
			cases[i].run();
			return checks();
		}
	}
	return 2;
}
