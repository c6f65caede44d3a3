// Forks while another thread opens and closes devices: each child must get an answer, whatever its
// parent was doing. A child that hangs is killed by its alarm.

#include <infiniband/verbs.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#define FORKS 300
#define CHILD_SECONDS 20

static atomic_bool stop;
static atomic_int opened;

static int open_and_close(void)
{
	struct ibv_device **list = ibv_get_device_list(NULL);
	if (!list)
		return 1;
	struct ibv_context *context = list[0] ? ibv_open_device(list[0]) : NULL;
	ibv_free_device_list(list);
	return !context || ibv_close_device(context);
}

static void *opener(void *unused)
{
	(void)unused;
	while (!atomic_load(&stop)) {
		if (open_and_close()) {
			fprintf(stderr, "the parent cannot open its device\n");
			exit(1);
		}
		atomic_fetch_add(&opened, 1);
	}
	return NULL;
}

int main(void)
{
	pthread_t thread;
	if (pthread_create(&thread, NULL, opener, NULL))
		return 1;
	for (int i = 0; i < FORKS; i++) {
		pid_t child = fork();
		if (child < 0)
			return 1;
		if (child == 0) {
			alarm(CHILD_SECONDS);
			_exit(open_and_close());
		}
		int status;
		if (waitpid(child, &status, 0) != child || status != 0) {
			fprintf(stderr, "child %d: status %#x\n", i, status);
			return 1;
		}
	}
	atomic_store(&stop, 1);
	pthread_join(thread, NULL);
	printf("%s\n", atomic_load(&opened) > 0 ? "forks hold" : "never opened");
	return 0;
}
