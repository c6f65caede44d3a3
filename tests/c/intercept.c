/*
 * Preloaded: notes which functions of libc our libraries call that libraries such as librspreload
 * put themselves in front of, and those that would start threads or install signal handlers. At
 * the program's end it appends their names to the file that INTERCEPTED names.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define FUNCTIONS(X)                                                                       \
	X(socket) X(socketpair) X(bind) X(listen) X(accept) X(accept4) X(connect)          \
	X(shutdown) X(getpeername) X(getsockname) X(getsockopt) X(setsockopt)              \
	X(recv) X(recvfrom) X(recvmsg) X(send) X(sendto) X(sendmsg) X(sendfile)            \
	X(read) X(readv) X(write) X(writev) X(poll) X(ppoll) X(select) X(pselect)          \
	X(epoll_create1) X(epoll_ctl) X(epoll_wait) X(eventfd)                             \
	X(fcntl) X(fcntl64) X(dup) X(dup2) X(dup3) X(close) X(ioctl)                       \
	X(pthread_create) X(fork)                                                 \
	X(sigaction) X(signal) X(sigprocmask) X(pthread_sigmask) X(signalfd) X(sigaltstack)

typedef long function(long, long, long, long, long, long);

enum {
#define NUMBER(name) NUMBER_##name,
	FUNCTIONS(NUMBER)
	COUNT
};

static const char *const names[] = {
#define NAME(name) #name,
	FUNCTIONS(NAME)
};

static char called[COUNT];

static void note(int number, void *caller)
{
	Dl_info info;

	if (!called[number] && dladdr(caller, &info) && info.dli_fname &&
	    (strstr(info.dli_fname, "/libibverbs.so") || strstr(info.dli_fname, "/librdmacm.so")))
		called[number] = 1;
}

/* Every one of them has at most six arguments, none a floating point number. */
#define WRAP(name)                                                                         \
	long wrapped_##name(long, long, long, long, long, long) __asm__(#name);            \
	long wrapped_##name(long a, long b, long c, long d, long e, long f)                \
	{                                                                                  \
		static function *real;                                                     \
                                                                                           \
		note(NUMBER_##name, __builtin_return_address(0));                          \
		if (!real)                                                                 \
			real = (function *)dlsym(RTLD_NEXT, #name);                        \
		return real(a, b, c, d, e, f);                                             \
	}
FUNCTIONS(WRAP)

__attribute__((destructor)) static void report(void)
{
	const char *path = getenv("INTERCEPTED");
	long fd = path ? syscall(SYS_open, path, O_WRONLY | O_CREAT | O_APPEND, 0600) : -1;

	for (int i = 0; i < COUNT && fd >= 0; i++) {
		if (called[i]) {
			syscall(SYS_write, fd, names[i], strlen(names[i]));
			syscall(SYS_write, fd, "\n", 1);
		}
	}
}
