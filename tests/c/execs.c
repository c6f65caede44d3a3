// Executes itself anew while threads open devices, post, poll and close them, and while its main
// thread has a device open with work under way: the router must take back everything that the last
// program image had, and serve the next one as a new session of the same process.

#include <infiniband/verbs.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define IMAGES 8
#define THREADS 4
#define DEPTH 16
#define BYTES (64 * 1024)
#define SECONDS 60

static atomic_int rounds;

#define MUST(condition)                                                                    \
	do {                                                                               \
		if (!(condition)) {                                                        \
			fprintf(stderr, "%s:%d: %s: %m\n", __FILE__, __LINE__, #condition); \
			exit(1);                                                           \
		}                                                                          \
	} while (0)

// A device with a queue pair that is connected to itself.
struct device {
	struct ibv_context *context;
	struct ibv_pd *pd;
	struct ibv_cq *cq;
	struct ibv_qp *qp;
	struct ibv_mr *mr;
	unsigned char *memory;
};

static void open_device(struct device *d)
{
	struct ibv_device **list = ibv_get_device_list(NULL);
	MUST(list && list[0]);
	MUST(d->context = ibv_open_device(list[0]));
	ibv_free_device_list(list);
	union ibv_gid gid;
	MUST(ibv_query_gid(d->context, 1, 0, &gid) == 0);
	MUST(posix_memalign((void **)&d->memory, 4096, BYTES) == 0);
	MUST(d->pd = ibv_alloc_pd(d->context));
	MUST(d->mr = ibv_reg_mr(d->pd, d->memory, BYTES,
				IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE));
	MUST(d->cq = ibv_create_cq(d->context, DEPTH, NULL, NULL, 0));
	struct ibv_qp_init_attr init = {
		.send_cq = d->cq,
		.recv_cq = d->cq,
		.cap = {.max_send_wr = DEPTH, .max_recv_wr = 1, .max_send_sge = 1, .max_recv_sge = 1},
		.qp_type = IBV_QPT_RC,
	};
	MUST(d->qp = ibv_create_qp(d->pd, &init));
	struct ibv_qp_attr attr = {
		.qp_state = IBV_QPS_INIT,
		.port_num = 1,
		.qp_access_flags = IBV_ACCESS_REMOTE_WRITE,
	};
	MUST(ibv_modify_qp(d->qp, &attr, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT |
					 IBV_QP_ACCESS_FLAGS) == 0);
	attr = (struct ibv_qp_attr){
		.qp_state = IBV_QPS_RTR,
		.path_mtu = IBV_MTU_1024,
		.dest_qp_num = d->qp->qp_num,
		.min_rnr_timer = 12,
		.ah_attr = {.is_global = 1, .port_num = 1, .grh = {.dgid = gid, .hop_limit = 1}},
	};
	MUST(ibv_modify_qp(d->qp, &attr, IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU |
					 IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
					 IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER) == 0);
	attr = (struct ibv_qp_attr){
		.qp_state = IBV_QPS_RTS, .timeout = 14, .retry_cnt = 7, .rnr_retry = 7};
	MUST(ibv_modify_qp(d->qp, &attr, IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT |
					 IBV_QP_RNR_RETRY | IBV_QP_SQ_PSN |
					 IBV_QP_MAX_QP_RD_ATOMIC) == 0);
}

static void close_device(struct device *d)
{
	MUST(ibv_destroy_qp(d->qp) == 0);
	MUST(ibv_destroy_cq(d->cq) == 0);
	MUST(ibv_dereg_mr(d->mr) == 0);
	MUST(ibv_dealloc_pd(d->pd) == 0);
	MUST(ibv_close_device(d->context) == 0);
	free(d->memory);
}

// Writes the first half of the memory to the second.
static void post(struct device *d)
{
	struct ibv_sge sge = {
		.addr = (uintptr_t)d->memory, .length = BYTES / 2, .lkey = d->mr->lkey};
	struct ibv_send_wr *bad, wr = {
		.sg_list = &sge,
		.num_sge = 1,
		.opcode = IBV_WR_RDMA_WRITE,
		.send_flags = IBV_SEND_SIGNALED,
		.wr.rdma = {.remote_addr = (uintptr_t)d->memory + BYTES / 2, .rkey = d->mr->rkey},
	};
	MUST(ibv_post_send(d->qp, &wr, &bad) == 0);
}

static void complete(struct device *d)
{
	struct ibv_wc wc;
	int n;
	while ((n = ibv_poll_cq(d->cq, 1, &wc)) == 0)
		;
	MUST(n == 1 && wc.status == IBV_WC_SUCCESS);
}

static void *work(void *number)
{
	for (unsigned round = 0;; round++) {
		struct device d;
		open_device(&d);
		for (int i = 0; i < 32; i++) {
			memset(d.memory, (int)((uintptr_t)number + round + i), BYTES / 2);
			post(&d);
			complete(&d);
			MUST(memcmp(d.memory, d.memory + BYTES / 2, BYTES / 2) == 0);
		}
		close_device(&d);
		atomic_fetch_add(&rounds, 1);
	}
	return NULL;
}

int main(int argc, char **argv)
{
	int image = argc > 1 ? atoi(argv[1]) : 0;
	// A program that hangs is killed; the alarm goes on in the next image.
	if (image == 0)
		alarm(SECONDS);
	if (image == IMAGES) {
		struct device d;
		open_device(&d);
		post(&d);
		complete(&d);
		close_device(&d);
		puts("execs hold");
		return 0;
	}
	for (uintptr_t i = 0; i < THREADS; i++) {
		pthread_t thread;
		MUST(pthread_create(&thread, NULL, work, (void *)i) == 0);
	}
	struct device d;
	open_device(&d);
	// Every thread has had time to be anywhere.
	while (atomic_load(&rounds) < 2 * THREADS) {
		post(&d);
		complete(&d);
	}
	for (int i = 0; i < DEPTH; i++)
		post(&d);
	char next[16];
	snprintf(next, sizeof next, "%d", image + 1);
	execl("/proc/self/exe", argv[0], next, NULL);
	MUST(!"execl");
}
