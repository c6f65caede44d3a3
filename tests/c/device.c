/*
 * Finding and opening the device, with care and without, and what the library does to the process.
 *
 * Usage: device present | device absent | device dying (the router ends when it says so)
 *      | device handing-on (goes on as cat, which has a duplicate of cmd_fd)
 */
#include <dirent.h>
#include <fcntl.h>
#include <infiniband/verbs.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/time.h>
#include <unistd.h>

#include "check.h"

static int entries(const char *path)
{
	DIR *dir = opendir(path);
	int n = 0;

	while (dir && readdir(dir))
		n++;
	if (dir)
		closedir(dir);
	return n;
}

static struct sigaction actions[65];
static sigset_t mask;
static int inherited[64];

static void look_at_signals(struct sigaction *to, sigset_t *blocked)
{
	memset(to, 0, sizeof actions);
	for (int i = 1; i < 65; i++)
		sigaction(i, NULL, &to[i]);
	sigprocmask(SIG_SETMASK, NULL, blocked);
}

/* Nothing of the process has changed but its descriptors, which no child inherits. */
static void untouched(void)
{
	static struct sigaction now[65];
	sigset_t blocked;

	look_at_signals(now, &blocked);
	for (int i = 1; i < 65; i++)
		CHECK(now[i].sa_handler == actions[i].sa_handler);
	for (int i = 1; i < 65; i++)
		CHECK(sigismember(&blocked, i) == sigismember(&mask, i));
	/* ".", "..", and the one thread. */
	CHECK(entries("/proc/self/task") == 3);
	for (int fd = 0; fd < 64; fd++)
		CHECK(inherited[fd] || fcntl(fd, F_GETFD) < 0 || fcntl(fd, F_GETFD) & FD_CLOEXEC);
}

static void absent(void)
{
	struct ibv_device **list;
	int n;

	for (int i = 0; i < 3; i++) {
		n = -1;
		list = ibv_get_device_list(&n);
		CHECK(list && n == 0 && !list[0]);
		ibv_free_device_list(list);
	}
	list = ibv_get_device_list(NULL);
	CHECK(list && !list[0]);
	ibv_free_device_list(list);
	CHECK(ibv_fork_init() == 0);
	CHECK(strcmp(ibv_wc_status_str(IBV_WC_SUCCESS), "success") == 0);
}

static void handler(int signal)
{
	(void)signal;
}

/* A signal handler ends a wait for an event, as it ends a read(2). */
static void interrupted(struct ibv_context *context)
{
	struct sigaction action = {.sa_handler = handler}, old;
	struct itimerval soon = {{0, 20000}, {0, 20000}}, never = {{0, 0}, {0, 0}};
	struct ibv_comp_channel *channel = ibv_create_comp_channel(context);
	struct ibv_async_event event;
	struct ibv_cq *cq;
	void *of;

	CHECK(channel && sigaction(SIGALRM, &action, &old) == 0);
	CHECK(setitimer(ITIMER_REAL, &soon, NULL) == 0);
	errno = 0;
	CHECK(ibv_get_async_event(context, &event) == -1 && errno == EINTR);
	errno = 0;
	CHECK(ibv_get_cq_event(channel, &cq, &of) == -1 && errno == EINTR);
	/* But not a verb that asks the router. */
	for (int i = 0; i < 200; i++) {
		struct ibv_pd *pd = ibv_alloc_pd(context);
		CHECK(pd && ibv_dealloc_pd(pd) == 0);
	}
	CHECK(setitimer(ITIMER_REAL, &never, NULL) == 0);
	CHECK(sigaction(SIGALRM, &old, NULL) == 0);
	CHECK(ibv_destroy_comp_channel(channel) == 0);
}

static void present(void)
{
	struct ibv_device **first, **second, *device;
	struct ibv_context *contexts[2];
	struct ibv_port_attr port;
	struct ibv_pd *pds[2];
	char buffer[64], path[512];
	struct ibv_mr *mrs[2];
	uint64_t guid;
	int n = -1, before, flags, command;
	FILE *file;

	CHECK(ibv_fork_init() == 0);
	first = ibv_get_device_list(&n);
	CHECK(first && n == 1 && first[0] && !first[1]);
	second = ibv_get_device_list(NULL);
	CHECK(second && second != first && second[0] == first[0] && !second[1]);
	device = first[0];
	ibv_free_device_list(first);
	ibv_free_device_list(second);
	ibv_free_device_list(NULL);

	/* The device outlives its lists. */
	CHECK(strcmp(ibv_get_device_name(device), "freeflow0") == 0);
	CHECK(device->node_type == IBV_NODE_CA && device->transport_type == IBV_TRANSPORT_IB);
	CHECK(strcmp(device->name, "freeflow0") == 0);
	CHECK(device->dev_name[0] && device->dev_path[0] && device->ibdev_path[0]);
	CHECK(ibv_get_device_name(NULL) == NULL);
	guid = ibv_get_device_guid(device);
	CHECK(guid != 0);
	CHECK(ibv_is_fork_initialized() == IBV_FORK_UNNEEDED ||
	      ibv_is_fork_initialized() == IBV_FORK_ENABLED);
	/* What programs read of it beside the library. */
	snprintf(path, sizeof path, "%s/ports/1/gid_attrs/types/0", device->ibdev_path);
	file = fopen(path, "r");
	CHECK(file && fgets(buffer, sizeof buffer, file) && strcmp(buffer, "RoCE v2\n") == 0);
	if (file)
		fclose(file);

	/* Twice open, each on its own. */
	for (int i = 0; i < 2; i++) {
		contexts[i] = ibv_open_device(device);
		CHECK(contexts[i] && contexts[i]->device == device);
		CHECK(ibv_query_port(contexts[i], 1, &port) == 0);
		pds[i] = ibv_alloc_pd(contexts[i]);
		mrs[i] = ibv_reg_mr(pds[i], buffer, sizeof buffer, IBV_ACCESS_LOCAL_WRITE);
		CHECK(pds[i] && mrs[i]);
	}
	CHECK(contexts[0] != contexts[1] && contexts[0]->async_fd != contexts[1]->async_fd);
	CHECK(contexts[0]->cmd_fd >= 0 && contexts[0]->cmd_fd != contexts[1]->cmd_fd);
	CHECK(mrs[0]->lkey != mrs[1]->lkey);
	untouched();
	CHECK(ibv_dealloc_pd(pds[0]) == EBUSY);
	CHECK(ibv_dereg_mr(mrs[0]) == 0 && ibv_dealloc_pd(pds[0]) == 0);
	CHECK(ibv_close_device(contexts[0]) == 0);
	CHECK(ibv_query_port(contexts[1], 1, &port) == 0);
	CHECK(ibv_dereg_mr(mrs[1]) == 0 && ibv_dealloc_pd(pds[1]) == 0);

	interrupted(contexts[1]);

	/* Whatever a program does with a duplicate of cmd_fd, verbs go on. */
	command = dup(contexts[1]->cmd_fd);
	CHECK(command >= 0 && fcntl(command, F_SETFL, O_NONBLOCK) == 0);
	for (int i = 0; i < 200; i++) {
		pds[1] = ibv_alloc_pd(contexts[1]);
		CHECK(pds[1] && ibv_dealloc_pd(pds[1]) == 0);
	}
	CHECK(write(command, "12345678", 8) == 8 && close(command) == 0);
	pds[1] = ibv_alloc_pd(contexts[1]);
	CHECK(pds[1] && ibv_dealloc_pd(pds[1]) == 0);

	/* The program's own flags on a descriptor hold. */
	flags = fcntl(contexts[1]->async_fd, F_GETFL);
	CHECK(fcntl(contexts[1]->async_fd, F_SETFL, flags | O_NONBLOCK) == 0);
	errno = 0;
	CHECK(ibv_get_async_event(contexts[1], &(struct ibv_async_event){}) == -1 &&
	      errno == EAGAIN);
	CHECK(ibv_close_device(contexts[1]) == 0);
	CHECK(ibv_get_device_guid(device) == guid);

	/* Opening and closing leaves nothing. */
	before = entries("/proc/self/fd");
	for (int i = 0; i < 50; i++) {
		contexts[0] = ibv_open_device(device);
		CHECK(contexts[0]);
		if (contexts[0])
			CHECK(ibv_close_device(contexts[0]) == 0);
	}
	CHECK(entries("/proc/self/fd") == before);
}

/* The router ends while the device is open: everything answers, and can be put away. */
static void dying(void)
{
	struct ibv_device **list = ibv_get_device_list(NULL);
	struct ibv_context *context = list[0] ? ibv_open_device(list[0]) : NULL;
	struct ibv_comp_channel *channel = context ? ibv_create_comp_channel(context) : NULL;
	struct ibv_cq *cq = channel ? ibv_create_cq(context, 8, NULL, channel, 0) : NULL, *of_event;
	struct ibv_pd *pd = context ? ibv_alloc_pd(context) : NULL;
	struct ibv_mr *mr = pd ? ibv_reg_mr(pd, actions, sizeof actions, 0) : NULL;
	struct ibv_async_event event;
	struct ibv_port_attr port;
	struct ibv_wc wc;
	void *of;
	int n = -1;

	CHECK(mr && cq);
	if (!mr || !cq)
		return;
	printf("ready\n");
	fflush(stdout);
	CHECK(ibv_get_async_event(context, &event) == 0);
	CHECK(event.event_type == IBV_EVENT_DEVICE_FATAL);
	ibv_ack_async_event(&event);
	errno = 0;
	CHECK(ibv_get_async_event(context, &event) == -1 && errno == EIO);
	CHECK(ibv_get_cq_event(channel, &of_event, &of) == 0 && of_event == cq);
	ibv_ack_cq_events(cq, 1);
	CHECK(ibv_get_cq_event(channel, &of_event, &of) == -1 && errno == EIO);

	CHECK(ibv_poll_cq(cq, 1, &wc) <= 0);
	errno = 0;
	CHECK(!ibv_alloc_pd(context) && errno == EIO);
	CHECK(!ibv_reg_mr(pd, &wc, sizeof wc, IBV_ACCESS_LOCAL_WRITE) && errno == EIO);
	CHECK(!ibv_create_comp_channel(context) && errno == EIO);
	/* What the library knows itself. */
	CHECK(ibv_query_port(context, 1, &port) == 0);
	CHECK(strcmp(ibv_get_device_name(list[0]), "freeflow0") == 0);
	ibv_get_device_guid(list[0]);

	CHECK(ibv_dereg_mr(mr) == 0 && ibv_dealloc_pd(pd) == 0);
	CHECK(ibv_destroy_cq(cq) == 0 && ibv_destroy_comp_channel(channel) == 0);
	CHECK(ibv_close_device(context) == 0);
	ibv_free_device_list(list);
	for (int i = 0; i < 3; i++) {
		list = ibv_get_device_list(&n);
		CHECK(list && n == 0 && !list[0]);
		ibv_free_device_list(list);
	}
}

/* A duplicate of cmd_fd goes on in the next program, and no device with it. */
static void handing_on(void)
{
	struct ibv_device **list = ibv_get_device_list(NULL);
	struct ibv_context *context = list[0] ? ibv_open_device(list[0]) : NULL;

	MUST(context && ibv_alloc_pd(context) && dup(context->cmd_fd) >= 0);
	execlp("cat", "cat", NULL);
	CHECK(!"execlp");
}

int main(int argc, char **argv)
{
	look_at_signals(actions, &mask);
	for (int fd = 0; fd < 64; fd++)
		inherited[fd] = fcntl(fd, F_GETFD) >= 0;
	if (argc != 2)
		return 2;
	if (strcmp(argv[1], "present") == 0)
		present();
	else if (strcmp(argv[1], "dying") == 0)
		dying();
	else if (strcmp(argv[1], "handing-on") == 0)
		handing_on();
	else
		absent();
	untouched();
	return checks();
}
