// One case of the memory verbs, and of the memory behind them, per run: `memory_verbs CASE`. Two queue pairs of one process,
// connected to each other, are requester (a) and responder (b).

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <infiniband/verbs.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define CHECK(condition)                                                                 \
	do {                                                                             \
		if (!(condition)) {                                                      \
			fprintf(stderr, "%s:%d: not so: %s (errno %d)\n", __FILE__,      \
				__LINE__, #condition, errno);                            \
			exit(1);                                                         \
		}                                                                        \
	} while (0)

#define SIZE 8192
#define DEADLINE_SECONDS 60

#define REMOTE (IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_ATOMIC)
#define ALL (IBV_ACCESS_LOCAL_WRITE | REMOTE)

// Newer than the oldest header this compiles against.
#define ACCESS_FLUSH_GLOBAL (1 << 8)
#define ACCESS_FLUSH_PERSISTENT (1 << 9)
#define EX_WITH_FLUSH (1 << 11)
#define EX_WITH_ATOMIC_WRITE (1 << 12)
#define WR_FLUSH 14
#define WR_ATOMIC_WRITE 15
#define WC_FLUSH 8
#define WC_ATOMIC_WRITE 9
typedef void (*wr_atomic_write_fn)(struct ibv_qp_ex *, uint32_t, uint64_t, const void *);
typedef void (*wr_flush_fn)(struct ibv_qp_ex *, uint32_t, uint64_t, size_t, uint8_t, uint8_t);
#define OP(qpx, type, offset) (*(type *)((char *)(qpx) + (offset)))
#define WR_ATOMIC_WRITE_OFFSET 344
#define WR_FLUSH_OFFSET 352

static struct ibv_context *ctx;

struct side {
	struct ibv_pd *pd;
	struct ibv_cq *cq;
	struct ibv_qp *qp;
	char *buf;
	struct ibv_mr *mr;
};

static struct side a, b;

static void *pages(size_t size)
{
	int prot = PROT_READ | PROT_WRITE, flags = MAP_PRIVATE | MAP_ANONYMOUS;
	void *at = mmap(NULL, size, prot, flags, -1, 0);
	CHECK(at != MAP_FAILED);
	return at;
}

static void open_device(void)
{
	struct ibv_device **list = ibv_get_device_list(NULL);
	CHECK(list && list[0]);
	ctx = ibv_open_device(list[0]);
	CHECK(ctx);
	ibv_free_device_list(list);
}

static struct ibv_qp *make_qp(struct side *s, enum ibv_qp_type type, uint64_t ops)
{
	struct ibv_qp_init_attr_ex init = {
		.send_cq = s->cq,
		.recv_cq = s->cq,
		.cap = { .max_send_wr = 64, .max_recv_wr = 64, .max_send_sge = 2, .max_recv_sge = 2 },
		.qp_type = type,
		.sq_sig_all = 1,
		.comp_mask = IBV_QP_INIT_ATTR_PD | (ops ? IBV_QP_INIT_ATTR_SEND_OPS_FLAGS : 0),
		.pd = s->pd,
		.send_ops_flags = ops,
	};
	return ibv_create_qp_ex(ctx, &init);
}

static void to_init(struct ibv_qp *qp)
{
	struct ibv_qp_attr attr = {
		.qp_state = IBV_QPS_INIT,
		.port_num = 1,
		.qp_access_flags = ALL | ACCESS_FLUSH_GLOBAL | ACCESS_FLUSH_PERSISTENT,
		.qkey = 1,
	};
	int mask = IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT;
	mask |= qp->qp_type == IBV_QPT_UD ? IBV_QP_QKEY : IBV_QP_ACCESS_FLAGS;
	CHECK(ibv_modify_qp(qp, &attr, mask) == 0);
}

static void connect_to(struct ibv_qp *qp, uint32_t peer)
{
	struct ibv_qp_attr attr = {
		.qp_state = IBV_QPS_RTR,
		.path_mtu = IBV_MTU_1024,
		.dest_qp_num = peer,
		.ah_attr = { .is_global = 1, .port_num = 1, .grh = { .hop_limit = 64 } },
		.max_dest_rd_atomic = 4,
		.min_rnr_timer = 12,
	};
	int rc = qp->qp_type != IBV_QPT_UC;
	int mask = IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN;
	if (rc)
		mask |= IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER;
	CHECK(ibv_query_gid(ctx, 1, 0, &attr.ah_attr.grh.dgid) == 0);
	CHECK(ibv_modify_qp(qp, &attr, mask) == 0);
	attr.qp_state = IBV_QPS_RTS;
	attr.timeout = 14;
	attr.retry_cnt = 7;
	attr.rnr_retry = 7;
	attr.max_rd_atomic = 4;
	mask = IBV_QP_STATE | IBV_QP_SQ_PSN;
	if (rc)
		mask |= IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY |
			IBV_QP_MAX_QP_RD_ATOMIC;
	CHECK(ibv_modify_qp(qp, &attr, mask) == 0);
}

// New queue pairs between a and b; those that were there are gone.
static void reconnect(enum ibv_qp_type type, uint64_t ops)
{
	struct side *sides[] = { &a, &b };
	for (int i = 0; i < 2; i++) {
		if (sides[i]->qp)
			CHECK(ibv_destroy_qp(sides[i]->qp) == 0);
		sides[i]->qp = make_qp(sides[i], type, ops);
		CHECK(sides[i]->qp);
		to_init(sides[i]->qp);
	}
	connect_to(a.qp, b.qp->qp_num);
	connect_to(b.qp, a.qp->qp_num);
}

static void make_side(struct side *s, int access)
{
	s->pd = ibv_alloc_pd(ctx);
	CHECK(s->pd);
	s->cq = ibv_create_cq(ctx, 256, NULL, NULL, 0);
	CHECK(s->cq);
	s->buf = pages(SIZE);
	s->mr = ibv_reg_mr(s->pd, s->buf, SIZE, access);
	CHECK(s->mr);
}

static void start(enum ibv_qp_type type, uint64_t ops, int access)
{
	open_device();
	make_side(&a, ALL);
	make_side(&b, access);
	reconnect(type, ops);
}

static struct ibv_wc next_wc(struct ibv_cq *cq)
{
	struct ibv_wc wc;
	time_t until = time(NULL) + DEADLINE_SECONDS;
	int n;
	while ((n = ibv_poll_cq(cq, 1, &wc)) == 0)
		CHECK(time(NULL) < until);
	CHECK(n == 1);
	return wc;
}

#define EXPECT(cq, wanted)                                                               \
	do {                                                                             \
		struct ibv_wc wc_ = next_wc(cq);                                         \
		if (wc_.status != (wanted)) {                                            \
			fprintf(stderr, "%s:%d: status is %s, not %s\n", __FILE__,       \
				__LINE__, ibv_wc_status_str(wc_.status),                 \
				ibv_wc_status_str(wanted));                              \
			exit(1);                                                         \
		}                                                                        \
	} while (0)

static void expect_op(struct ibv_cq *cq, uint64_t wr_id, int opcode)
{
	struct ibv_wc wc = next_wc(cq);
	CHECK(wc.status == IBV_WC_SUCCESS);
	CHECK(wc.wr_id == wr_id);
	CHECK((int)wc.opcode == opcode);
}

static int post(struct side *s, struct ibv_send_wr *wr)
{
	struct ibv_send_wr *bad = NULL;
	int result = ibv_post_send(s->qp, wr, &bad);
	CHECK(result == 0 || bad != NULL);
	return result;
}

static int rdma(struct side *s, int opcode, uint32_t rkey, uint64_t to, uint32_t len)
{
	struct ibv_sge sge = { .addr = (uintptr_t)s->buf, .length = len, .lkey = s->mr->lkey };
	struct ibv_send_wr wr = {
		.sg_list = &sge,
		.num_sge = 1,
		.opcode = opcode,
		.wr.rdma = { .remote_addr = to, .rkey = rkey },
	};
	return post(s, &wr);
}

// a writes to b under a key; the status of it. After an error both are connected anew.
static int write_status(uint32_t rkey, uint64_t to, uint32_t len)
{
	CHECK(rdma(&a, IBV_WR_RDMA_WRITE, rkey, to, len) == 0);
	int status = next_wc(a.cq).status;
	if (status != IBV_WC_SUCCESS)
		reconnect(a.qp->qp_type, 0);
	return status;
}

static void post_recv(struct side *s, uint64_t wr_id, void *addr, uint32_t len, uint32_t lkey)
{
	struct ibv_sge sge = { .addr = (uintptr_t)addr, .length = len, .lkey = lkey };
	struct ibv_recv_wr wr = { .wr_id = wr_id, .sg_list = &sge, .num_sge = 1 }, *bad;
	CHECK(ibv_post_recv(s->qp, &wr, &bad) == 0);
}

static int send_op(struct side *s, int opcode, uint32_t key, uint32_t len)
{
	struct ibv_sge sge = { .addr = (uintptr_t)s->buf, .length = len, .lkey = s->mr->lkey };
	struct ibv_send_wr wr = {
		.sg_list = &sge, .num_sge = 1, .opcode = opcode, .invalidate_rkey = key,
	};
	return post(s, &wr);
}

// ---------------------------------------------------------------- ibv_rereg_mr

static void case_rereg(void)
{
	start(IBV_QPT_RC, 0, IBV_ACCESS_LOCAL_WRITE);
	char *other = pages(SIZE);
	struct ibv_mr *mr = b.mr;
	uint64_t at = (uintptr_t)b.buf, there = (uintptr_t)other;
	uint32_t key = mr->rkey;

	// The library's own checks: the old region is valid.
	CHECK(ibv_rereg_mr(mr, 8, NULL, NULL, 0, 0) == IBV_REREG_MR_ERR_INPUT && errno == EINVAL);
	CHECK(ibv_rereg_mr(mr, IBV_REREG_MR_CHANGE_TRANSLATION, NULL, NULL, 10, 0) ==
	      IBV_REREG_MR_ERR_INPUT);
	CHECK(ibv_rereg_mr(mr, IBV_REREG_MR_CHANGE_TRANSLATION, NULL, other, 0, 0) ==
	      IBV_REREG_MR_ERR_INPUT);
	CHECK(ibv_rereg_mr(mr, IBV_REREG_MR_CHANGE_PD, a.pd, NULL, 0, ALL) ==
	      IBV_REREG_MR_ERR_INPUT);

	// Rights.
	CHECK(write_status(key, at, 8) == IBV_WC_REM_ACCESS_ERR);
	CHECK(ibv_rereg_mr(mr, IBV_REREG_MR_CHANGE_ACCESS, NULL, NULL, 0, ALL) == 0);
	strcpy(a.buf, "rights");
	CHECK(write_status(mr->rkey, at, 8) == IBV_WC_SUCCESS && !strcmp(b.buf, "rights"));
	CHECK(ibv_rereg_mr(mr, IBV_REREG_MR_CHANGE_ACCESS, NULL, NULL, 0, 0) == 0);
	CHECK(write_status(mr->rkey, at, 8) == IBV_WC_REM_ACCESS_ERR);
	CHECK(ibv_rereg_mr(mr, IBV_REREG_MR_CHANGE_ACCESS, NULL, NULL, 0, ALL) == 0);

	// Place.
	CHECK(ibv_rereg_mr(mr, IBV_REREG_MR_CHANGE_TRANSLATION, NULL, other, SIZE / 2, 0) == 0);
	CHECK(mr->addr == other && mr->length == SIZE / 2 && mr->pd == b.pd);
	strcpy(a.buf, "place");
	CHECK(write_status(mr->rkey, there, 8) == IBV_WC_SUCCESS && !strcmp(other, "place"));
	CHECK(write_status(mr->rkey, at, 8) == IBV_WC_REM_ACCESS_ERR);
	CHECK(write_status(mr->rkey, there + SIZE / 2, 1) == IBV_WC_REM_ACCESS_ERR);
	CHECK(!strcmp(b.buf, "rights"));

	// Domain: what it leaves is free of it.
	struct ibv_pd *pd = ibv_alloc_pd(ctx);
	CHECK(pd);
	CHECK(ibv_rereg_mr(mr, IBV_REREG_MR_CHANGE_PD, pd, NULL, 0, 0) == 0 && mr->pd == pd);
	CHECK(ibv_dealloc_pd(pd) == EBUSY);
	CHECK(write_status(mr->rkey, there, 8) == IBV_WC_REM_ACCESS_ERR);
	CHECK(ibv_rereg_mr(mr, IBV_REREG_MR_CHANGE_PD, b.pd, NULL, 0, 0) == 0);
	CHECK(ibv_dealloc_pd(pd) == 0);
	CHECK(write_status(mr->rkey, there, 8) == IBV_WC_SUCCESS);

	// All at once, and each pair.
	int all = IBV_REREG_MR_CHANGE_TRANSLATION | IBV_REREG_MR_CHANGE_PD |
		  IBV_REREG_MR_CHANGE_ACCESS;
	for (int flags = 1; flags <= all; flags++) {
		int access = flags & IBV_REREG_MR_CHANGE_ACCESS ? ALL : 0;
		CHECK(ibv_rereg_mr(mr, flags, b.pd, b.buf, SIZE, access) == 0);
		void *is = flags & IBV_REREG_MR_CHANGE_TRANSLATION ? b.buf : other;
		CHECK(mr->addr == is);
		CHECK(write_status(mr->rkey, (uintptr_t)is, 8) == IBV_WC_SUCCESS);
		CHECK(ibv_rereg_mr(mr, all, b.pd, other, SIZE, ALL) == 0);
	}

	// Refused commands: what was, is.
	void *hole = pages(SIZE);
	CHECK(munmap(hole, SIZE) == 0);
	CHECK(ibv_rereg_mr(mr, IBV_REREG_MR_CHANGE_TRANSLATION, NULL, hole, 8, 0) ==
		      IBV_REREG_MR_ERR_CMD && errno == EFAULT);
	CHECK(ibv_rereg_mr(mr, 0, NULL, NULL, 0, 0) == IBV_REREG_MR_ERR_CMD && errno == EINVAL);
	CHECK(ibv_rereg_mr(mr, IBV_REREG_MR_CHANGE_ACCESS, NULL, NULL, 0,
			   IBV_ACCESS_REMOTE_WRITE) == IBV_REREG_MR_ERR_CMD && errno == EINVAL);
	struct ibv_context *second = ibv_open_device(ctx->device);
	struct ibv_pd *foreign = ibv_alloc_pd(second);
	CHECK(foreign);
	CHECK(ibv_rereg_mr(mr, IBV_REREG_MR_CHANGE_PD, foreign, NULL, 0, 0) ==
	      IBV_REREG_MR_ERR_CMD && errno == EINVAL);
	CHECK(ibv_dealloc_pd(foreign) == 0 && ibv_close_device(second) == 0);
	CHECK(mr->pd == b.pd && mr->addr == other);
	CHECK(write_status(mr->rkey, there, 8) == IBV_WC_SUCCESS);

	// Read-only memory takes rights that do not write, and no others.
	char *constant = pages(SIZE);
	strcpy(constant, "constant");
	CHECK(mprotect(constant, SIZE, PROT_READ) == 0);
	CHECK(ibv_rereg_mr(mr, IBV_REREG_MR_CHANGE_TRANSLATION, NULL, constant, SIZE, 0) ==
	      IBV_REREG_MR_ERR_CMD && errno == EFAULT);
	int place_and_rights = IBV_REREG_MR_CHANGE_TRANSLATION | IBV_REREG_MR_CHANGE_ACCESS;
	CHECK(ibv_rereg_mr(mr, place_and_rights, NULL, constant, SIZE,
			   IBV_ACCESS_REMOTE_READ) == 0);
	CHECK(rdma(&a, IBV_WR_RDMA_READ, mr->rkey, (uintptr_t)constant, 9) == 0);
	expect_op(a.cq, 0, IBV_WC_RDMA_READ);
	CHECK(!strcmp(a.buf, "constant"));
	CHECK(ibv_rereg_mr(mr, IBV_REREG_MR_CHANGE_ACCESS, NULL, NULL, 0, ALL) ==
	      IBV_REREG_MR_ERR_CMD && errno == EFAULT);

	// Work that is outstanding finds the region as it is by then.
	CHECK(ibv_rereg_mr(mr, all, b.pd, b.buf, SIZE, ALL) == 0);
	post_recv(&b, 7, b.buf, 64, mr->lkey);
	CHECK(ibv_rereg_mr(mr, IBV_REREG_MR_CHANGE_TRANSLATION, NULL, other, SIZE, 0) == 0);
	CHECK(send_op(&a, IBV_WR_SEND, 0, 8) == 0);
	EXPECT(a.cq, IBV_WC_REM_OP_ERR);
	EXPECT(b.cq, IBV_WC_LOC_PROT_ERR);
	CHECK(ibv_dereg_mr(mr) == 0);
}

// ---------------------------------------------------------------- memory windows

static uint32_t posted_key;

static int bind_2(struct side *s, struct ibv_mw *mw, struct ibv_mr *mr, uint64_t addr,
		  uint64_t len, unsigned int access, uint32_t rkey)
{
	struct ibv_send_wr wr = {
		.wr_id = 2,
		.opcode = IBV_WR_BIND_MW,
		.bind_mw = { .mw = mw,
			     .rkey = rkey,
			     .bind_info = { .mr = mr,
					    .addr = addr,
					    .length = len,
					    .mw_access_flags = access } },
	};
	posted_key = rkey;
	return post(s, &wr);
}

static int bind_1(struct side *s, struct ibv_mw *mw, struct ibv_mr *mr, void *addr,
		  uint64_t len, unsigned int access)
{
	struct ibv_mw_bind bind = {
		.wr_id = 1,
		.send_flags = IBV_SEND_SIGNALED,
		.bind_info = { .mr = mr,
			       .addr = (uintptr_t)addr,
			       .length = len,
			       .mw_access_flags = access },
	};
	return ibv_bind_mw(s->qp, mw, &bind);
}

static void case_window_type_1(void)
{
	start(IBV_QPT_RC, 0, IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_MW_BIND);
	uint64_t at = (uintptr_t)b.buf;
	struct ibv_mw *mw = ibv_alloc_mw(b.pd, IBV_MW_TYPE_1);
	CHECK(mw && mw->pd == b.pd && mw->context == ctx && mw->type == IBV_MW_TYPE_1);
	CHECK(!ibv_alloc_mw(b.pd, 3) && errno == EINVAL);
	uint32_t first = mw->rkey;
	CHECK(write_status(first, at, 8) == IBV_WC_REM_ACCESS_ERR);
	CHECK(write_status(b.mr->rkey, at, 8) == IBV_WC_REM_ACCESS_ERR);

	CHECK(bind_1(&b, mw, b.mr, b.buf + 64, 128, IBV_ACCESS_REMOTE_WRITE) == 0);
	CHECK(mw->rkey != first && mw->rkey >> 8 == first >> 8);
	expect_op(b.cq, 1, IBV_WC_BIND_MW);
	strcpy(a.buf, "window");
	CHECK(write_status(mw->rkey, at + 64, 8) == IBV_WC_SUCCESS);
	CHECK(!strcmp(b.buf + 64, "window"));
	// Range, rights, old keys, and the key as a local one.
	CHECK(write_status(mw->rkey, at + 64, 128) == IBV_WC_SUCCESS);
	CHECK(write_status(mw->rkey, at + 63, 8) == IBV_WC_REM_ACCESS_ERR);
	CHECK(write_status(mw->rkey, at + 64, 129) == IBV_WC_REM_ACCESS_ERR);
	CHECK(write_status(first, at + 64, 8) == IBV_WC_REM_ACCESS_ERR);
	CHECK(rdma(&a, IBV_WR_RDMA_READ, mw->rkey, at + 64, 8) == 0);
	EXPECT(a.cq, IBV_WC_REM_ACCESS_ERR);
	reconnect(IBV_QPT_RC, 0);
	struct ibv_sge sge = { .addr = at + 64, .length = 8, .lkey = mw->rkey };
	struct ibv_send_wr wr = { .sg_list = &sge, .num_sge = 1, .opcode = IBV_WR_SEND };
	CHECK(post(&b, &wr) == 0);
	EXPECT(b.cq, IBV_WC_LOC_PROT_ERR);
	reconnect(IBV_QPT_RC, 0);

	// While it is bound its region stays.
	CHECK(ibv_dereg_mr(b.mr) == EBUSY);
	CHECK(ibv_rereg_mr(b.mr, IBV_REREG_MR_CHANGE_ACCESS, NULL, NULL, 0, ALL) ==
	      IBV_REREG_MR_ERR_CMD && errno == EBUSY);
	CHECK(ibv_dealloc_pd(b.pd) == EBUSY);

	// Bound anew, elsewhere; in order with what follows on the queue.
	uint32_t second = mw->rkey;
	post_recv(&a, 3, a.buf, 64, a.mr->lkey);
	CHECK(bind_1(&b, mw, b.mr, b.buf + 512, 8, IBV_ACCESS_REMOTE_READ) == 0);
	CHECK(send_op(&b, IBV_WR_SEND, 0, 8) == 0);
	expect_op(b.cq, 1, IBV_WC_BIND_MW);
	expect_op(b.cq, 0, IBV_WC_SEND);
	expect_op(a.cq, 3, IBV_WC_RECV);
	CHECK(rdma(&a, IBV_WR_RDMA_READ, mw->rkey, at + 512, 8) == 0);
	expect_op(a.cq, 0, IBV_WC_RDMA_READ);
	CHECK(write_status(second, at + 64, 8) == IBV_WC_REM_ACCESS_ERR);

	// A length of 0 unbinds.
	CHECK(bind_1(&b, mw, NULL, NULL, 0, 0) == 0);
	expect_op(b.cq, 1, IBV_WC_BIND_MW);
	CHECK(rdma(&a, IBV_WR_RDMA_READ, mw->rkey, at + 512, 8) == 0);
	EXPECT(a.cq, IBV_WC_REM_ACCESS_ERR);
	reconnect(IBV_QPT_RC, 0);

	// Any queue pair of the domain will do, also after the one that bound it is gone.
	CHECK(bind_1(&b, mw, b.mr, b.buf, 8, IBV_ACCESS_REMOTE_WRITE) == 0);
	expect_op(b.cq, 1, IBV_WC_BIND_MW);
	reconnect(IBV_QPT_RC, 0);
	CHECK(write_status(mw->rkey, at, 8) == IBV_WC_SUCCESS);

	// Invalidation is not for type 1.
	struct ibv_send_wr invalidate = {
		.opcode = IBV_WR_LOCAL_INV, .invalidate_rkey = mw->rkey,
	};
	CHECK(post(&b, &invalidate) == 0);
	EXPECT(b.cq, IBV_WC_LOC_QP_OP_ERR);
	reconnect(IBV_QPT_RC, 0);
	CHECK(write_status(mw->rkey, at, 8) == IBV_WC_SUCCESS);

	// What cannot be posted.
	CHECK(bind_1(&b, mw, b.mr, b.buf, 8, IBV_ACCESS_ZERO_BASED) == EINVAL);
	CHECK(bind_1(&b, mw, a.mr, a.buf, 8, IBV_ACCESS_REMOTE_READ) == EPERM);
	CHECK(bind_2(&b, mw, b.mr, at, 8, IBV_ACCESS_REMOTE_READ, 1) == EINVAL);

	// Freeing it unbinds it.
	uint32_t last = mw->rkey;
	CHECK(ibv_dealloc_mw(mw) == 0);
	CHECK(write_status(last, at, 8) == IBV_WC_REM_ACCESS_ERR);
	CHECK(ibv_dereg_mr(b.mr) == 0);
}

static void invalidate(struct side *s, uint32_t key)
{
	struct ibv_send_wr wr = { .wr_id = 9, .opcode = IBV_WR_LOCAL_INV, .invalidate_rkey = key };
	CHECK(post(s, &wr) == 0);
}

static void window_type_2(enum ibv_qp_type type)
{
	uint64_t at = (uintptr_t)b.buf;
	struct ibv_mw *mw = ibv_alloc_mw(b.pd, IBV_MW_TYPE_2);
	CHECK(mw);
	uint32_t key = ibv_inc_rkey(mw->rkey);
	CHECK(bind_2(&b, mw, b.mr, at + 64, 64, IBV_ACCESS_REMOTE_WRITE, key) == 0);
	expect_op(b.cq, 2, IBV_WC_BIND_MW);
	strcpy(a.buf, "type 2");
	CHECK(rdma(&a, IBV_WR_RDMA_WRITE, key, at + 64, 8) == 0);
	expect_op(a.cq, 0, IBV_WC_RDMA_WRITE);
	// A message behind it: then it has arrived on an unreliable service too.
	post_recv(&b, 5, b.buf + 1024, 64, b.mr->lkey);
	CHECK(send_op(&a, IBV_WR_SEND, 0, 8) == 0);
	expect_op(a.cq, 0, IBV_WC_SEND);
	expect_op(b.cq, 5, IBV_WC_RECV);
	CHECK(!strcmp(b.buf + 64, "type 2"));

	// Only its invalidation frees it; then the tag may be any.
	invalidate(&b, key);
	expect_op(b.cq, 9, IBV_WC_LOCAL_INV);
	uint32_t zero = (key & ~0xFFu) | 0x5A;
	unsigned int access = IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_ZERO_BASED;
	CHECK(bind_2(&b, mw, b.mr, at + 256, 64, access, zero) == 0);
	expect_op(b.cq, 2, IBV_WC_BIND_MW);
	strcpy(a.buf, "zero");
	CHECK(rdma(&a, IBV_WR_RDMA_WRITE, zero, 56, 8) == 0);
	expect_op(a.cq, 0, IBV_WC_RDMA_WRITE);

	// The peer invalidates it with a message.
	post_recv(&b, 6, b.buf + 1024, 64, b.mr->lkey);
	CHECK(send_op(&a, IBV_WR_SEND_WITH_INV, zero, 8) == 0);
	expect_op(a.cq, 0, IBV_WC_SEND);
	struct ibv_wc wc = next_wc(b.cq);
	CHECK(wc.status == IBV_WC_SUCCESS && wc.wr_id == 6 && wc.opcode == IBV_WC_RECV);
	CHECK(wc.wc_flags & IBV_WC_WITH_INV && !(wc.wc_flags & IBV_WC_WITH_IMM));
	CHECK(wc.invalidated_rkey == zero && wc.byte_len == 8);
	CHECK(!strcmp(b.buf + 256 + 56, "zero") && !strcmp(b.buf + 1024, "zero"));
	if (type == IBV_QPT_RC)
		CHECK(write_status(zero, 0, 8) == IBV_WC_REM_ACCESS_ERR);
	CHECK(ibv_dealloc_mw(mw) == 0);
}

static void case_window_type_2(void)
{
	start(IBV_QPT_RC, 0, IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_MW_BIND);
	window_type_2(IBV_QPT_RC);
	reconnect(IBV_QPT_UC, 0);
	window_type_2(IBV_QPT_UC);
	reconnect(IBV_QPT_RC, 0);

	// It is bound to its queue pair: no other one of the domain leads to it.
	uint64_t at = (uintptr_t)b.buf;
	struct ibv_mw *mw = ibv_alloc_mw(b.pd, IBV_MW_TYPE_2);
	uint32_t key = ibv_inc_rkey(mw->rkey);
	struct side old_a = a, old_b = b;
	CHECK(bind_2(&b, mw, b.mr, at, 64, IBV_ACCESS_REMOTE_WRITE, key) == 0);
	expect_op(b.cq, 2, IBV_WC_BIND_MW);
	a.qp = b.qp = NULL;
	reconnect(IBV_QPT_RC, 0);
	CHECK(write_status(key, at, 8) == IBV_WC_REM_ACCESS_ERR);
	invalidate(&b, key);
	EXPECT(b.cq, IBV_WC_LOC_QP_OP_ERR);
	reconnect(IBV_QPT_RC, 0);
	post_recv(&b, 5, b.buf + 1024, 64, b.mr->lkey);
	CHECK(send_op(&a, IBV_WR_SEND_WITH_INV, key, 8) == 0);
	EXPECT(a.cq, IBV_WC_SUCCESS);
	EXPECT(b.cq, IBV_WC_REM_INV_REQ_ERR);
	struct ibv_qp_attr attr;
	struct ibv_qp_init_attr init;
	CHECK(ibv_query_qp(b.qp, &attr, IBV_QP_STATE, &init) == 0);
	CHECK(attr.qp_state == IBV_QPS_ERR);
	CHECK(ibv_destroy_qp(a.qp) == 0 && ibv_destroy_qp(b.qp) == 0);
	a = old_a;
	b = old_b;
	CHECK(write_status(key, at, 8) == IBV_WC_SUCCESS);
	CHECK(ibv_dereg_mr(b.mr) == EBUSY);

	// A queue pair that is gone leaves it bound to nobody.
	reconnect(IBV_QPT_RC, 0);
	CHECK(write_status(key, at, 8) == IBV_WC_REM_ACCESS_ERR);
	CHECK(ibv_dereg_mr(b.mr) == EBUSY);
	CHECK(ibv_dealloc_mw(mw) == 0);
	CHECK(ibv_dereg_mr(b.mr) == 0);
}

static void case_windows_over_xrc(void)
{
	start(IBV_QPT_RC, 0, IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_MW_BIND);
	struct ibv_xrcd_init_attr domain = {
		.comp_mask = IBV_XRCD_INIT_ATTR_FD | IBV_XRCD_INIT_ATTR_OFLAGS,
		.fd = -1,
		.oflags = O_CREAT,
	};
	struct ibv_xrcd *xrcd = ibv_open_xrcd(ctx, &domain);
	CHECK(xrcd);
	struct ibv_srq_init_attr_ex shared = {
		.attr = { .max_wr = 16, .max_sge = 1 },
		.comp_mask = IBV_SRQ_INIT_ATTR_TYPE | IBV_SRQ_INIT_ATTR_XRCD |
			     IBV_SRQ_INIT_ATTR_CQ | IBV_SRQ_INIT_ATTR_PD,
		.srq_type = IBV_SRQT_XRC,
		.pd = b.pd,
		.xrcd = xrcd,
		.cq = b.cq,
	};
	struct ibv_srq *srq = ibv_create_srq_ex(ctx, &shared);
	uint32_t srqn;
	CHECK(srq && ibv_get_srq_num(srq, &srqn) == 0);
	struct ibv_qp_init_attr_ex init = {
		.qp_type = IBV_QPT_XRC_RECV,
		.comp_mask = IBV_QP_INIT_ATTR_XRCD,
		.xrcd = xrcd,
	};
	struct ibv_qp *target = ibv_create_qp_ex(ctx, &init);
	struct side sender = a;
	sender.qp = make_qp(&sender, IBV_QPT_XRC_SEND, IBV_QP_EX_WITH_BIND_MW);
	CHECK(target && sender.qp);
	to_init(target);
	to_init(sender.qp);
	connect_to(target, sender.qp->qp_num);
	connect_to(sender.qp, target->qp_num);

	// The window is of the domain of the shared queue, whoever of the domain has bound it.
	uint64_t at = (uintptr_t)b.buf;
	struct ibv_mw *mw = ibv_alloc_mw(b.pd, IBV_MW_TYPE_1);
	CHECK(bind_1(&b, mw, b.mr, b.buf, 64, IBV_ACCESS_REMOTE_WRITE) == 0);
	expect_op(b.cq, 1, IBV_WC_BIND_MW);
	strcpy(a.buf, "over xrc");
	struct ibv_sge sge = { .addr = (uintptr_t)a.buf, .length = 9, .lkey = a.mr->lkey };
	struct ibv_send_wr wr = {
		.wr_id = 5,
		.sg_list = &sge,
		.num_sge = 1,
		.opcode = IBV_WR_RDMA_WRITE,
		.wr.rdma = { .remote_addr = at, .rkey = mw->rkey },
		.qp_type.xrc.remote_srqn = srqn,
	};
	CHECK(post(&sender, &wr) == 0);
	expect_op(a.cq, 5, IBV_WC_RDMA_WRITE);
	CHECK(!strcmp(b.buf, "over xrc"));
	// A sending queue pair binds too.
	struct ibv_mr *mine = ibv_reg_mr(a.pd, a.buf, SIZE, ALL | IBV_ACCESS_MW_BIND);
	struct ibv_mw *own = ibv_alloc_mw(a.pd, IBV_MW_TYPE_2);
	CHECK(bind_2(&sender, own, mine, (uintptr_t)a.buf, 8, IBV_ACCESS_REMOTE_READ, 1) == 0);
	expect_op(a.cq, 2, IBV_WC_BIND_MW);
	// The receiving one has bound nothing that a peer could invalidate.
	struct ibv_sge room = { .addr = at + 1024, .length = 64, .lkey = b.mr->lkey };
	struct ibv_recv_wr recv = { .wr_id = 6, .sg_list = &room, .num_sge = 1 }, *bad;
	CHECK(ibv_post_srq_recv(srq, &recv, &bad) == 0);
	wr.opcode = IBV_WR_SEND_WITH_INV;
	wr.invalidate_rkey = mw->rkey;
	CHECK(post(&sender, &wr) == 0);
	EXPECT(a.cq, IBV_WC_SUCCESS);
	struct ibv_wc wc = next_wc(b.cq);
	CHECK(wc.wr_id == 6 && wc.status == IBV_WC_REM_INV_REQ_ERR);
}

static void case_bind_errors(void)
{
	start(IBV_QPT_RC, 0, IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_MW_BIND);
	int bindable = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_MW_BIND;
	struct ibv_mr *plain = ibv_reg_mr(b.pd, b.buf, SIZE, ALL);
	struct ibv_mr *constant = ibv_reg_mr(b.pd, b.buf, SIZE, IBV_ACCESS_MW_BIND);
	struct ibv_mr *based =
		ibv_reg_mr(b.pd, b.buf, SIZE, bindable | IBV_ACCESS_ZERO_BASED);
	struct ibv_mr *other = ibv_reg_mr(a.pd, b.buf, SIZE, bindable);
	CHECK(plain && constant && based && other);
	struct ibv_mw *mw = ibv_alloc_mw(b.pd, IBV_MW_TYPE_2);
	struct ibv_mw *elsewhere = ibv_alloc_mw(a.pd, IBV_MW_TYPE_2);
	uint64_t at = (uintptr_t)b.buf;
	unsigned int wr = IBV_ACCESS_REMOTE_WRITE, rd = IBV_ACCESS_REMOTE_READ;
	struct {
		struct ibv_mw *mw;
		struct ibv_mr *mr;
		uint64_t addr, len;
		unsigned int access;
	} bad[] = {
		{ mw, plain, at, 8, rd },
		{ mw, constant, at, 8, wr },
		{ mw, constant, at, 8, IBV_ACCESS_REMOTE_ATOMIC },
		{ mw, based, 0, 8, rd },
		{ mw, other, at, 8, rd },
		{ elsewhere, b.mr, at, 8, rd },
		{ elsewhere, other, at, 8, rd },
		{ mw, NULL, at, 8, rd },
		{ mw, b.mr, at, 0, rd },
		{ mw, b.mr, at - 1, 8, rd },
		{ mw, b.mr, at, SIZE + 1, rd },
		{ mw, b.mr, at, UINT64_MAX, rd },
		{ mw, b.mr, UINT64_MAX, 2, rd },
		{ mw, b.mr, at, 8, 1 << 19 },
	};
	for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
		uint32_t key = ibv_inc_rkey(bad[i].mw->rkey);
		CHECK(bind_2(&b, bad[i].mw, bad[i].mr, bad[i].addr, bad[i].len, bad[i].access,
			     key) == 0);
		CHECK(send_op(&b, IBV_WR_SEND, 0, 8) == 0);
		struct ibv_wc wc = next_wc(b.cq);
		if (wc.status != IBV_WC_MW_BIND_ERR || wc.wr_id != 2) {
			fprintf(stderr, "bind %zu: %s\n", i, ibv_wc_status_str(wc.status));
			exit(1);
		}
		EXPECT(b.cq, IBV_WC_WR_FLUSH_ERR);
		reconnect(IBV_QPT_RC, 0);
	}
	// Bound already: refused, and what was bound stands.
	uint32_t key = ibv_inc_rkey(mw->rkey);
	CHECK(bind_2(&b, mw, b.mr, at, 8, wr, key) == 0);
	expect_op(b.cq, 2, IBV_WC_BIND_MW);
	CHECK(bind_2(&b, mw, b.mr, at, 8, wr, ibv_inc_rkey(key)) == 0);
	EXPECT(b.cq, IBV_WC_MW_BIND_ERR);
	// What has no data takes none; other services have no windows.
	struct ibv_sge sge = { .addr = at, .length = 8, .lkey = b.mr->lkey };
	struct ibv_send_wr loaded = {
		.opcode = IBV_WR_LOCAL_INV, .invalidate_rkey = key, .sg_list = &sge, .num_sge = 1,
	};
	CHECK(post(&b, &loaded) == EINVAL);
	struct ibv_send_wr none = { .opcode = IBV_WR_BIND_MW };
	CHECK(post(&b, &none) == EINVAL);
	struct side ud = b;
	ud.qp = make_qp(&ud, IBV_QPT_UD, 0);
	CHECK(ud.qp);
	to_init(ud.qp);
	struct ibv_qp_attr attr = { .qp_state = IBV_QPS_RTR };
	CHECK(ibv_modify_qp(ud.qp, &attr, IBV_QP_STATE) == 0);
	attr.qp_state = IBV_QPS_RTS;
	CHECK(ibv_modify_qp(ud.qp, &attr, IBV_QP_STATE | IBV_QP_SQ_PSN) == 0);
	CHECK(bind_2(&ud, mw, b.mr, at, 8, rd, key) == EINVAL);
	CHECK(send_op(&ud, IBV_WR_SEND_WITH_INV, key, 8) == EINVAL);
	struct ibv_send_wr local = { .opcode = IBV_WR_LOCAL_INV, .invalidate_rkey = key };
	CHECK(post(&ud, &local) == EINVAL);
	CHECK(!make_qp(&ud, IBV_QPT_UD, IBV_QP_EX_WITH_BIND_MW) && errno == EOPNOTSUPP);
	// Keys of regions are not invalidated.
	reconnect(IBV_QPT_RC, 0);
	invalidate(&b, plain->rkey);
	EXPECT(b.cq, IBV_WC_LOC_QP_OP_ERR);
}

// ---------------------------------------------------------------- ibv_wr_*

static void case_extended_posting(void)
{
	uint64_t ops = IBV_QP_EX_WITH_BIND_MW | IBV_QP_EX_WITH_LOCAL_INV |
		       IBV_QP_EX_WITH_SEND_WITH_INV | IBV_QP_EX_WITH_RDMA_WRITE | EX_WITH_FLUSH |
		       EX_WITH_ATOMIC_WRITE;
	start(IBV_QPT_RC, ops, ALL | IBV_ACCESS_MW_BIND | ACCESS_FLUSH_GLOBAL);
	struct ibv_qp_ex *ax = ibv_qp_to_qp_ex(a.qp), *bx = ibv_qp_to_qp_ex(b.qp);
	uint64_t at = (uintptr_t)b.buf;
	struct ibv_mw *mw = ibv_alloc_mw(b.pd, IBV_MW_TYPE_2);
	struct ibv_mw_bind_info info = {
		.mr = b.mr,
		.addr = at,
		.length = 64,
		.mw_access_flags = IBV_ACCESS_REMOTE_WRITE,
	};
	uint32_t first = ibv_inc_rkey(mw->rkey), second = ibv_inc_rkey(first);
	ibv_wr_start(bx);
	bx->wr_id = 11;
	ibv_wr_bind_mw(bx, mw, first, &info);
	bx->wr_id = 12;
	ibv_wr_local_inv(bx, first);
	bx->wr_id = 13;
	ibv_wr_bind_mw(bx, mw, second, &info);
	CHECK(ibv_wr_complete(bx) == 0);
	expect_op(b.cq, 11, IBV_WC_BIND_MW);
	expect_op(b.cq, 12, IBV_WC_LOCAL_INV);
	expect_op(b.cq, 13, IBV_WC_BIND_MW);

	wr_atomic_write_fn atomic_write = OP(ax, wr_atomic_write_fn, WR_ATOMIC_WRITE_OFFSET);
	wr_flush_fn flush = OP(ax, wr_flush_fn, WR_FLUSH_OFFSET);
	CHECK(atomic_write && flush);
	uint64_t word = 0x0123456789ABCDEF;
	ibv_wr_start(ax);
	ax->wr_id = 21;
	atomic_write(ax, second, at + 8, &word);
	word = 0;
	ax->wr_id = 22;
	flush(ax, b.mr->rkey, at, 64, 1, 0);
	ax->wr_id = 23;
	flush(ax, b.mr->rkey, 0, 0, 1, 1);
	CHECK(ibv_wr_complete(ax) == 0);
	expect_op(a.cq, 21, WC_ATOMIC_WRITE);
	expect_op(a.cq, 22, WC_FLUSH);
	expect_op(a.cq, 23, WC_FLUSH);
	memcpy(&word, b.buf + 8, 8);
	CHECK(word == 0x0123456789ABCDEF);

	post_recv(&b, 31, b.buf + 1024, 64, b.mr->lkey);
	ibv_wr_start(ax);
	ax->wr_id = 24;
	ibv_wr_send_inv(ax, second);
	ibv_wr_set_sge(ax, a.mr->lkey, (uintptr_t)a.buf, 8);
	CHECK(ibv_wr_complete(ax) == 0);
	expect_op(a.cq, 24, IBV_WC_SEND);
	struct ibv_wc wc = next_wc(b.cq);
	CHECK(wc.wr_id == 31 && wc.wc_flags & IBV_WC_WITH_INV && wc.invalidated_rkey == second);

	// What cannot be meant fails the whole list.
	ibv_wr_start(ax);
	ax->wr_id = 25;
	ibv_wr_rdma_write(ax, b.mr->rkey, at);
	ibv_wr_set_sge(ax, a.mr->lkey, (uintptr_t)a.buf, 8);
	flush(ax, b.mr->rkey, at, 64, 0, 0);
	CHECK(ibv_wr_complete(ax) == EINVAL);
	ibv_wr_start(ax);
	flush(ax, b.mr->rkey, at, 64, 1, 2);
	CHECK(ibv_wr_complete(ax) == EINVAL);
	ibv_wr_start(ax);
	flush(ax, b.mr->rkey, at, (size_t)1 << 32, 1, 0);
	CHECK(ibv_wr_complete(ax) == EINVAL);
	struct ibv_send_wr wr = { .opcode = WR_FLUSH };
	CHECK(post(&a, &wr) == EOPNOTSUPP);
	struct ibv_wc none;
	CHECK(ibv_poll_cq(a.cq, 1, &none) == 0);

	// Nothing is persistent: the device does not say so, and a peer that asks is refused.
	CHECK(!ibv_reg_mr(b.pd, b.buf, SIZE, ALL | ACCESS_FLUSH_PERSISTENT) &&
	      errno == EOPNOTSUPP);
	struct ibv_mr *unflushed = ibv_reg_mr(b.pd, b.buf, SIZE, ALL);
	CHECK(unflushed);
	struct {
		uint32_t key;
		uint64_t at;
		size_t len;
		uint8_t types, level;
	} bad[] = {
		{ b.mr->rkey, at, 8, 2, 0 },          { b.mr->rkey, at, 8, 3, 0 },
		{ unflushed->rkey, at, 8, 1, 0 },     { unflushed->rkey, at, 8, 1, 1 },
		{ b.mr->rkey, at + SIZE, 1, 1, 0 },   { b.mr->rkey, at, SIZE + 1, 1, 0 },
		{ b.mr->rkey ^ 1, at, 8, 1, 1 },
	};
	for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
		reconnect(IBV_QPT_RC, ops);
		ax = ibv_qp_to_qp_ex(a.qp);
		ibv_wr_start(ax);
		flush(ax, bad[i].key, bad[i].at, bad[i].len, bad[i].types, bad[i].level);
		CHECK(ibv_wr_complete(ax) == 0);
		EXPECT(a.cq, IBV_WC_REM_ACCESS_ERR);
	}
	uint64_t newer[] = { EX_WITH_FLUSH, EX_WITH_ATOMIC_WRITE };
	for (int i = 0; i < 2; i++)
		CHECK(!make_qp(&a, IBV_QPT_UC, newer[i]) && errno == EOPNOTSUPP);
}

static void case_atomic_write(void)
{
	start(IBV_QPT_RC, 0, ALL);
	struct ibv_mr *readable = ibv_reg_mr(
		b.pd, b.buf, SIZE, IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_READ);
	uint64_t at = (uintptr_t)b.buf;
	strcpy(a.buf, "8 bytes");
	CHECK(rdma(&a, WR_ATOMIC_WRITE, b.mr->rkey, at + 16, 8) == 0);
	expect_op(a.cq, 0, WC_ATOMIC_WRITE);
	CHECK(!strcmp(b.buf + 16, "8 bytes"));
	// Gathered from two elements it would not be; inline it may be.
	CHECK(rdma(&a, WR_ATOMIC_WRITE, b.mr->rkey, at, 4) == EINVAL);
	CHECK(rdma(&a, WR_ATOMIC_WRITE, b.mr->rkey, at, 16) == EINVAL);
	struct ibv_sge sge = { .addr = (uintptr_t)a.buf, .length = 8 };
	struct ibv_send_wr wr = {
		.sg_list = &sge,
		.num_sge = 1,
		.opcode = WR_ATOMIC_WRITE,
		.send_flags = IBV_SEND_INLINE,
		.wr.rdma = { .remote_addr = at + 24, .rkey = b.mr->rkey },
	};
	CHECK(post(&a, &wr) == 0);
	expect_op(a.cq, 0, WC_ATOMIC_WRITE);
	CHECK(!strcmp(b.buf + 24, "8 bytes"));
	struct {
		uint32_t key;
		uint64_t at;
		enum ibv_wc_status status;
	} bad[] = {
		{ b.mr->rkey, at + 4, IBV_WC_REM_INV_REQ_ERR },
		{ readable->rkey, at, IBV_WC_REM_ACCESS_ERR },
		{ b.mr->rkey, at + SIZE, IBV_WC_REM_ACCESS_ERR },
	};
	for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
		CHECK(rdma(&a, WR_ATOMIC_WRITE, bad[i].key, bad[i].at, 8) == 0);
		EXPECT(a.cq, bad[i].status);
		reconnect(IBV_QPT_RC, 0);
	}
	// A zero-based region of unaligned memory has no aligned words.
	struct ibv_mr *odd = ibv_reg_mr(b.pd, b.buf + 1, SIZE - 1, ALL | IBV_ACCESS_ZERO_BASED);
	CHECK(odd);
	CHECK(rdma(&a, WR_ATOMIC_WRITE, odd->rkey, 8, 8) == 0);
	EXPECT(a.cq, IBV_WC_REM_INV_REQ_ERR);
	reconnect(IBV_QPT_UC, 0);
	CHECK(rdma(&a, WR_ATOMIC_WRITE, b.mr->rkey, at, 8) == EINVAL);
}

// ---------------------------------------------------------------- kinds of regions

static void case_zero_based(void)
{
	start(IBV_QPT_RC, 0, ALL | IBV_ACCESS_ZERO_BASED);
	strcpy(a.buf, "based");
	CHECK(write_status(b.mr->rkey, 100, 8) == IBV_WC_SUCCESS && !strcmp(b.buf + 100, "based"));
	CHECK(write_status(b.mr->rkey, SIZE - 8, 8) == IBV_WC_SUCCESS);
	CHECK(write_status(b.mr->rkey, SIZE - 7, 8) == IBV_WC_REM_ACCESS_ERR);
	CHECK(write_status(b.mr->rkey, (uintptr_t)b.buf, 8) == IBV_WC_REM_ACCESS_ERR);
	// Local elements are offsets too.
	post_recv(&b, 1, (void *)200, 64, b.mr->lkey);
	CHECK(send_op(&a, IBV_WR_SEND, 0, 8) == 0);
	expect_op(a.cq, 0, IBV_WC_SEND);
	expect_op(b.cq, 1, IBV_WC_RECV);
	CHECK(!strcmp(b.buf + 200, "based"));
	// Rights decide what addresses are; a move does not.
	CHECK(ibv_rereg_mr(b.mr, IBV_REREG_MR_CHANGE_TRANSLATION, NULL, b.buf + 8, 64, 0) == 0);
	CHECK(write_status(b.mr->rkey, 56, 8) == IBV_WC_SUCCESS && !strcmp(b.buf + 64, "based"));
	CHECK(ibv_rereg_mr(b.mr, IBV_REREG_MR_CHANGE_ACCESS, NULL, NULL, 0, ALL) == 0);
	CHECK(write_status(b.mr->rkey, (uintptr_t)b.buf + 8, 8) == IBV_WC_SUCCESS);
	CHECK(write_status(b.mr->rkey, 0, 8) == IBV_WC_REM_ACCESS_ERR);
}

static void case_null_region(void)
{
	start(IBV_QPT_RC, 0, ALL);
	struct ibv_mr *null = ibv_alloc_null_mr(a.pd);
	CHECK(null && null->pd == a.pd && null->lkey);
	// Sent, it is zeroes; received into, it swallows.
	memset(b.buf, 0x55, 64);
	struct ibv_sge sges[2] = {
		{ .addr = (uintptr_t)a.buf, .length = 8, .lkey = a.mr->lkey },
		{ .addr = 0xDEAD0000, .length = 16, .lkey = null->lkey },
	};
	strcpy(a.buf, "7 bytes");
	struct ibv_send_wr wr = {
		.sg_list = sges,
		.num_sge = 2,
		.opcode = IBV_WR_RDMA_WRITE,
		.wr.rdma = { .remote_addr = (uintptr_t)b.buf, .rkey = b.mr->rkey },
	};
	CHECK(post(&a, &wr) == 0);
	expect_op(a.cq, 0, IBV_WC_RDMA_WRITE);
	char zeroes[16] = "";
	CHECK(!strcmp(b.buf, "7 bytes") && !memcmp(b.buf + 8, zeroes, 16) && b.buf[24] == 0x55);
	memcpy(b.buf, "0123456789abcdef", 16);
	sges[0] = (struct ibv_sge){ .addr = 8, .length = 8, .lkey = null->lkey };
	sges[1] = (struct ibv_sge){ (uintptr_t)a.buf, 8, a.mr->lkey };
	struct ibv_recv_wr recv = { .wr_id = 4, .sg_list = sges, .num_sge = 2 }, *bad;
	CHECK(ibv_post_recv(a.qp, &recv, &bad) == 0);
	CHECK(send_op(&b, IBV_WR_SEND, 0, 16) == 0);
	expect_op(b.cq, 0, IBV_WC_SEND);
	expect_op(a.cq, 4, IBV_WC_RECV);
	CHECK(!memcmp(a.buf, "89abcdef", 8));
	// Null to null, more than one turn's worth.
	struct ibv_mr *nulls = ibv_alloc_null_mr(b.pd);
	post_recv(&b, 5, NULL, 1 << 30, nulls->lkey);
	struct ibv_sge big = { .addr = 1, .length = 1 << 30, .lkey = null->lkey };
	struct ibv_send_wr send = { .sg_list = &big, .num_sge = 1, .opcode = IBV_WR_SEND };
	CHECK(post(&a, &send) == 0);
	expect_op(a.cq, 0, IBV_WC_SEND);
	struct ibv_wc wc = next_wc(b.cq);
	CHECK(wc.status == IBV_WC_SUCCESS && wc.byte_len == 1 << 30);
	// It has no remote key, is not changed, and is not shown through windows.
	CHECK(write_status(nulls->lkey, 0, 8) == IBV_WC_REM_ACCESS_ERR);
	CHECK(write_status(nulls->rkey, 0, 8) == IBV_WC_REM_ACCESS_ERR);
	CHECK(ibv_rereg_mr(null, IBV_REREG_MR_CHANGE_ACCESS, NULL, NULL, 0, ALL) ==
	      IBV_REREG_MR_ERR_INPUT);
	struct ibv_mw *mw = ibv_alloc_mw(b.pd, IBV_MW_TYPE_1);
	CHECK(bind_1(&b, mw, nulls, NULL, 8, IBV_ACCESS_REMOTE_READ) == 0);
	EXPECT(b.cq, IBV_WC_MW_BIND_ERR);
	CHECK(ibv_dereg_mr(null) == 0 && ibv_dereg_mr(nulls) == 0);
}

static int advise(int advice, int flags, uint64_t addr, uint32_t len, uint32_t key)
{
	struct ibv_sge sge = { .addr = addr, .length = len, .lkey = key };
	return ibv_advise_mr(b.pd, advice, flags, &sge, 1);
}

static void case_on_demand(void)
{
	start(IBV_QPT_RC, 0, ALL);
	char *area = pages(4 * SIZE);
	uint64_t at = (uintptr_t)area;
	struct ibv_mr *mr = ibv_reg_mr(b.pd, area, 4 * SIZE, ALL | IBV_ACCESS_ON_DEMAND);
	CHECK(mr);
	strcpy(a.buf, "demand");
	CHECK(write_status(mr->rkey, at + SIZE - 4, 8) == IBV_WC_SUCCESS);
	CHECK(!strcmp(area + SIZE - 4, "demand"));
	// What is mapped there later is what is meant, and a hole is an error by then.
	void *fixed = mmap(area, SIZE, PROT_READ | PROT_WRITE,
			   MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
	CHECK(fixed == area);
	CHECK(write_status(mr->rkey, at, 8) == IBV_WC_SUCCESS && !strcmp(area, "demand"));
	CHECK(rdma(&a, IBV_WR_ATOMIC_FETCH_AND_ADD, 0, 0, 8) == 0);
	EXPECT(a.cq, IBV_WC_REM_ACCESS_ERR);
	reconnect(IBV_QPT_RC, 0);
	CHECK(munmap(area, SIZE) == 0);
	CHECK(write_status(mr->rkey, at, 8) == IBV_WC_REM_OP_ERR);
	CHECK(write_status(mr->rkey, at + SIZE, 8) == IBV_WC_SUCCESS);

	// Advice.
	int flush = IBV_ADVISE_MR_FLAG_FLUSH;
	struct ibv_mr *constant =
		ibv_reg_mr(b.pd, area, 4 * SIZE, IBV_ACCESS_REMOTE_READ | IBV_ACCESS_ON_DEMAND);
	struct ibv_mr *elsewhere = ibv_reg_mr(a.pd, area, 4 * SIZE, IBV_ACCESS_ON_DEMAND);
	CHECK(constant && elsewhere);
	for (int advice = IBV_ADVISE_MR_ADVICE_PREFETCH;
	     advice <= IBV_ADVISE_MR_ADVICE_PREFETCH_NO_FAULT; advice++) {
		CHECK(advise(advice, flush, at + SIZE, SIZE, mr->lkey) == 0);
		CHECK(advise(advice, 0, at, 4 * SIZE, mr->lkey) == 0);
		CHECK(advise(advice, 0, at + SIZE, SIZE, elsewhere->lkey) == EPERM);
		CHECK(advise(advice, 0, (uintptr_t)b.buf, 8, b.mr->lkey) == EINVAL);
		CHECK(advise(advice, 0, at, 8, mr->lkey ^ 1) == ENOENT);
		CHECK(advise(advice, 0, at, 4 * SIZE + 1, mr->lkey) == EFAULT);
		CHECK(advise(advice, 2, at, 8, mr->lkey) == EINVAL);
		CHECK(ibv_advise_mr(b.pd, advice, 0, NULL, 0) == EINVAL);
	}
	CHECK(advise(IBV_ADVISE_MR_ADVICE_PREFETCH, 0, at + SIZE, 8, constant->lkey) == 0);
	CHECK(advise(IBV_ADVISE_MR_ADVICE_PREFETCH_WRITE, 0, at + SIZE, 8, constant->lkey) ==
	      EPERM);
	CHECK(advise(99, 0, at, 8, mr->lkey) == EOPNOTSUPP);
	unsigned char there[SIZE / 4096];
	char *fresh = pages(SIZE);
	struct ibv_mr *fetched = ibv_reg_mr(b.pd, fresh, SIZE, ALL | IBV_ACCESS_ON_DEMAND);
	CHECK(advise(IBV_ADVISE_MR_ADVICE_PREFETCH_WRITE, flush, (uintptr_t)fresh, SIZE,
		     fetched->lkey) == 0);
	CHECK(mincore(fresh, SIZE, there) == 0);
	for (size_t i = 0; i < sizeof there; i++)
		CHECK(there[i] & 1);

	// A region may become an ordinary one.
	CHECK(ibv_rereg_mr(fetched, IBV_REREG_MR_CHANGE_ACCESS, NULL, NULL, 0, ALL) == 0);
	CHECK(write_status(fetched->rkey, (uintptr_t)fresh, 8) == IBV_WC_SUCCESS);
	CHECK(!strcmp(fresh, "demand"));
	CHECK(ibv_rereg_mr(fetched, IBV_REREG_MR_CHANGE_ACCESS, NULL, NULL, 0,
			   ALL | IBV_ACCESS_ON_DEMAND) == 0);
	strcpy(a.buf, "again");
	CHECK(write_status(fetched->rkey, (uintptr_t)fresh, 8) == IBV_WC_SUCCESS);
	CHECK(!strcmp(fresh, "again"));
}

// ---------------------------------------------------------------- device memory

static void case_implicit(void)
{
	start(IBV_QPT_RC, 0, ALL);
	int access = ALL | IBV_ACCESS_ON_DEMAND;
	// All addresses, on demand: nothing less, and nowhere else.
	CHECK(!ibv_reg_mr(b.pd, NULL, SIZE_MAX, ALL) && errno == EINVAL);
	CHECK(!ibv_reg_mr(b.pd, NULL, SIZE_MAX - 1, access) && errno == EINVAL);
	CHECK(!ibv_reg_mr(b.pd, (void *)4096, SIZE_MAX, access) && errno == EINVAL);
	CHECK(!ibv_reg_mr_iova(b.pd, NULL, SIZE_MAX, 4096, access) && errno == EINVAL);
	struct ibv_mr *mr = ibv_reg_mr(b.pd, NULL, SIZE_MAX, access);
	CHECK(mr && mr->addr == NULL && mr->length == SIZE_MAX);
	struct ibv_mr *other = ibv_reg_mr(b.pd, NULL, SIZE_MAX, IBV_ACCESS_ON_DEMAND);
	CHECK(other && other->rkey != mr->rkey);

	// Memory that was there, registered or not, and what is mapped later.
	static char variable[64];
	strcpy(a.buf, "demand");
	CHECK(write_status(mr->rkey, (uintptr_t)variable, 8) == IBV_WC_SUCCESS);
	CHECK(!strcmp(variable, "demand"));
	CHECK(write_status(mr->rkey, (uintptr_t)b.buf, 8) == IBV_WC_SUCCESS);
	CHECK(!strcmp(b.buf, "demand"));
	char *area = pages(4 * SIZE);
	uint64_t at = (uintptr_t)area;
	CHECK(write_status(mr->rkey, at + SIZE - 4, 8) == IBV_WC_SUCCESS);
	CHECK(!strcmp(area + SIZE - 4, "demand"));
	CHECK(advise(IBV_ADVISE_MR_ADVICE_PREFETCH_WRITE, 0, at, 4 * SIZE, mr->lkey) == 0);
	CHECK(advise(IBV_ADVISE_MR_ADVICE_PREFETCH_WRITE, 0, at, 8, other->lkey) == EPERM);

	// The same bytes by its local key.
	strcpy(variable, "local");
	struct ibv_sge sge = { .addr = (uintptr_t)variable, .length = 8, .lkey = mr->lkey };
	struct ibv_send_wr wr = {
		.sg_list = &sge,
		.num_sge = 1,
		.opcode = IBV_WR_RDMA_WRITE,
		.wr.rdma = { .remote_addr = (uintptr_t)a.buf, .rkey = a.mr->rkey },
	};
	CHECK(post(&b, &wr) == 0);
	expect_op(b.cq, 0, IBV_WC_RDMA_WRITE);
	CHECK(!strcmp(a.buf, "local"));

	// The ends of the address space, and the kernel's part: nothing is there.
	uint64_t nowhere[] = { 0, 4088, 1ULL << 47, 0xFFFF800000000000, UINT64_MAX - 4096,
			       UINT64_MAX - 8 };
	for (size_t i = 0; i < sizeof nowhere / sizeof *nowhere; i++) {
		CHECK(write_status(mr->rkey, nowhere[i], 8) == IBV_WC_REM_OP_ERR);
	}
	// Past the last address.
	CHECK(write_status(mr->rkey, UINT64_MAX - 4, 8) == IBV_WC_REM_ACCESS_ERR);
	CHECK(write_status(other->rkey, at, 8) == IBV_WC_REM_ACCESS_ERR);
	CHECK(munmap(area, 4 * SIZE) == 0);
	CHECK(write_status(mr->rkey, at, 8) == IBV_WC_REM_OP_ERR);

	// Other rights, but not without demand; and the end.
	int change = IBV_REREG_MR_CHANGE_ACCESS;
	CHECK(ibv_rereg_mr(mr, change, NULL, NULL, 0, ALL) == IBV_REREG_MR_ERR_CMD);
	CHECK(write_status(mr->rkey, (uintptr_t)variable, 8) == IBV_WC_SUCCESS);
	CHECK(ibv_rereg_mr(mr, change, NULL, NULL, 0, IBV_ACCESS_ON_DEMAND) == 0);
	CHECK(write_status(mr->rkey, (uintptr_t)variable, 8) == IBV_WC_REM_ACCESS_ERR);
	CHECK(ibv_rereg_mr(mr, change, NULL, NULL, 0, access) == 0);
	CHECK(write_status(mr->rkey, (uintptr_t)variable, 8) == IBV_WC_SUCCESS);
	CHECK(ibv_dereg_mr(mr) == 0 && ibv_dereg_mr(other) == 0);
}

static void case_device_memory(void)
{
	start(IBV_QPT_RC, 0, ALL);
	struct ibv_device_attr_ex attr;
	CHECK(ibv_query_device_ex(ctx, NULL, &attr) == 0 && attr.max_dm_size >= SIZE);
	struct ibv_alloc_dm_attr want = { .length = SIZE, .log_align_req = 6 };
	struct ibv_dm *dm = ibv_alloc_dm(ctx, &want);
	CHECK(dm && dm->comp_mask & IBV_DM_MASK_HANDLE);
	char out[64] = "dirt", zeroes[64] = "";
	CHECK(ibv_memcpy_from_dm(out, dm, SIZE - 64, 64) == 0 && !memcmp(out, zeroes, 64));
	CHECK(ibv_memcpy_to_dm(dm, 64, "device!", 8) == 0);
	// Programs for hardware know that it is reached by 4 bytes at a time.
	CHECK(ibv_memcpy_to_dm(dm, 2, "device!", 8) == EINVAL);
	CHECK(ibv_memcpy_from_dm(out, dm, 0, 7) == EINVAL);
	CHECK(ibv_memcpy_to_dm(dm, SIZE - 4, "device!", 8) == EFAULT);
	CHECK(ibv_memcpy_from_dm(out, dm, UINT64_MAX - 3, 8) == EFAULT);

	int based = ALL | IBV_ACCESS_ZERO_BASED;
	CHECK(!ibv_reg_dm_mr(b.pd, dm, 0, SIZE, ALL) && errno == EINVAL);
	CHECK(!ibv_reg_dm_mr(b.pd, dm, 0, SIZE + 1, based) && errno == EINVAL);
	CHECK(!ibv_reg_dm_mr(b.pd, dm, SIZE, 1, based) && errno == EINVAL);
	CHECK(!ibv_reg_dm_mr(b.pd, dm, UINT64_MAX, 2, based) && errno == EINVAL);
	CHECK(!ibv_reg_dm_mr(b.pd, dm, SIZE + 1, 0, based) && errno == EINVAL);
	// A region of nothing is one, as with hardware.
	for (uint64_t offset = 0; offset <= SIZE; offset += SIZE) {
		struct ibv_mr *empty = ibv_reg_dm_mr(b.pd, dm, offset, 0, based);
		CHECK(empty && empty->length == 0);
		CHECK(ibv_free_dm(dm) == EBUSY);
		CHECK(write_status(empty->rkey, 0, 0) == IBV_WC_SUCCESS);
		CHECK(write_status(empty->rkey, 0, 1) == IBV_WC_REM_ACCESS_ERR);
		CHECK(ibv_dereg_mr(empty) == 0);
	}
	struct ibv_mr *mr = ibv_reg_dm_mr(b.pd, dm, 64, 1024, based);
	CHECK(mr && mr->length == 1024);
	CHECK(ibv_free_dm(dm) == EBUSY);
	CHECK(ibv_rereg_mr(mr, IBV_REREG_MR_CHANGE_ACCESS, NULL, NULL, 0, ALL) ==
	      IBV_REREG_MR_ERR_INPUT);
	CHECK(rdma(&a, IBV_WR_RDMA_READ, mr->rkey, 0, 8) == 0);
	expect_op(a.cq, 0, IBV_WC_RDMA_READ);
	CHECK(!strcmp(a.buf, "device!"));
	CHECK(write_status(mr->rkey, 1020, 4) == IBV_WC_SUCCESS);
	CHECK(write_status(mr->rkey, 1020, 8) == IBV_WC_REM_ACCESS_ERR);

	uint64_t word = 40;
	CHECK(ibv_memcpy_to_dm(dm, 64 + 16, &word, 8) == 0);
	struct ibv_sge sge = { .addr = (uintptr_t)a.buf, .length = 8, .lkey = a.mr->lkey };
	struct ibv_send_wr wr = {
		.sg_list = &sge,
		.num_sge = 1,
		.opcode = IBV_WR_ATOMIC_FETCH_AND_ADD,
		.wr.atomic = { .remote_addr = 16, .compare_add = 2, .rkey = mr->rkey },
	};
	CHECK(post(&a, &wr) == 0);
	expect_op(a.cq, 0, IBV_WC_FETCH_ADD);
	CHECK(ibv_memcpy_from_dm(&word, dm, 64 + 16, 8) == 0 && word == 42);
	CHECK(*(uint64_t *)a.buf == 40);
	post_recv(&b, 1, NULL, 64, mr->lkey);
	strcpy(a.buf, "sent");
	CHECK(send_op(&a, IBV_WR_SEND, 0, 8) == 0);
	expect_op(a.cq, 0, IBV_WC_SEND);
	expect_op(b.cq, 1, IBV_WC_RECV);
	CHECK(ibv_memcpy_from_dm(out, dm, 64, 8) == 0 && !strcmp(out, "sent"));
	CHECK(ibv_dereg_mr(mr) == 0 && ibv_free_dm(dm) == 0);

	// As much as is promised, no more, and again after it was freed.
	for (int i = 0; i < 3; i++) {
		want = (struct ibv_alloc_dm_attr){ .length = attr.max_dm_size };
		dm = ibv_alloc_dm(ctx, &want);
		CHECK(dm);
		want.length = 1;
		CHECK(!ibv_alloc_dm(ctx, &want) && errno == ENOMEM);
		CHECK(ibv_memcpy_to_dm(dm, attr.max_dm_size - 8, "the end", 8) == 0);
		CHECK(ibv_free_dm(dm) == 0);
	}
	struct ibv_alloc_dm_attr bad[] = {
		{ .length = 0 },
		{ .length = attr.max_dm_size + 1 },
		{ .length = 8, .log_align_req = 63 },
		{ .length = 8, .comp_mask = 1 },
	};
	for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
		CHECK(!ibv_alloc_dm(ctx, &bad[i]) && errno == EINVAL);
}

// ---------------------------------------------------------------- buffers, ibv_reg_mr_ex

struct init_attr {
	size_t length;
	int access;
	uint64_t comp_mask, iova;
	void *addr;
	int fd;
	uint64_t fd_offset;
	void *dmah, *buf;
};

static void *symbol(const char *name, const char *version)
{
	void *found = dlvsym(RTLD_DEFAULT, name, version);
	CHECK(found);
	return found;
}

static void case_buffers(void)
{
	start(IBV_QPT_RC, 0, ALL);
	void *(*alloc_buf)(struct ibv_pd *, size_t, void **) =
		symbol("ibv_alloc_buf", "IBVERBS_1.17");
	void (*free_buf)(void *) = symbol("ibv_free_buf", "IBVERBS_1.17");
	struct ibv_mr *(*reg_buf)(struct ibv_pd *, void *, void *, size_t, int) =
		symbol("ibv_reg_buf_mr", "IBVERBS_1.17");
	int (*export)(void *) = symbol("ibv_export_buf_dmabuf_fd", "IBVERBS_1.18");
	struct ibv_mr *(*reg_ex)(struct ibv_pd *, struct init_attr *) =
		symbol("ibv_reg_mr_ex", "IBVERBS_1.15");

	void *handle = NULL;
	char *buf = alloc_buf(b.pd, SIZE + 100, &handle);
	CHECK(buf && handle && !buf[0] && !buf[SIZE + 99]);
	CHECK(export(handle) == -1 && errno == ENODATA);
	CHECK(!reg_buf(a.pd, handle, buf, SIZE, ALL) && errno == EINVAL);
	CHECK(!reg_buf(b.pd, handle, buf - 1, SIZE, ALL) && errno == EINVAL);
	CHECK(!reg_buf(b.pd, handle, buf + 1, SIZE + 100, ALL) && errno == EINVAL);
	CHECK(!reg_buf(b.pd, handle, buf, SIZE_MAX, ALL) && errno == EINVAL);
	struct ibv_mr *mr = reg_buf(b.pd, handle, buf + 100, SIZE, ALL);
	CHECK(mr && mr->addr == buf + 100 && mr->length == SIZE);
	strcpy(a.buf, "buffer");
	CHECK(write_status(mr->rkey, (uintptr_t)buf + 100, 8) == IBV_WC_SUCCESS);
	CHECK(!strcmp(buf + 100, "buffer"));

	struct init_attr attr = {
		.length = 64, .access = ALL, .comp_mask = 2 | 1 | 32, .addr = buf, .iova = 4096,
		.buf = handle,
	};
	struct ibv_mr *second = reg_ex(b.pd, &attr);
	CHECK(second && write_status(second->rkey, 4096, 8) == IBV_WC_SUCCESS);
	CHECK(!strcmp(buf, "buffer"));
	CHECK(ibv_dereg_mr(second) == 0);
	// A region outlives its buffer, as it does any memory.
	free_buf(handle);
	CHECK(ibv_dereg_mr(mr) == 0);

	attr = (struct init_attr){ .length = SIZE, .access = ALL, .comp_mask = 2, .addr = b.buf };
	mr = reg_ex(b.pd, &attr);
	CHECK(mr && mr->addr == b.buf);
	CHECK(write_status(mr->rkey, (uintptr_t)b.buf, 8) == IBV_WC_SUCCESS);
	CHECK(ibv_dereg_mr(mr) == 0);
	attr.comp_mask = 0;
	CHECK(!reg_ex(b.pd, &attr) && errno == EINVAL);
	attr.comp_mask = 2 | 4;
	CHECK(!reg_ex(b.pd, &attr) && errno == EINVAL);
	attr.comp_mask = 4 | 8;
	CHECK(!reg_ex(b.pd, &attr) && errno == EOPNOTSUPP);
	attr.comp_mask = 2 | 16;
	CHECK(!reg_ex(b.pd, &attr) && errno == EOPNOTSUPP);
	attr.comp_mask = 2 | 32;
	CHECK(!reg_ex(b.pd, &attr) && errno == EINVAL);
	CHECK(!ibv_reg_dmabuf_mr(b.pd, 0, SIZE, 0, -1, ALL) && errno == EOPNOTSUPP);

	// Many, so that what is freed is used again.
	for (int i = 0; i < 500; i++) {
		char *more = alloc_buf(b.pd, 1 << 20, &handle);
		CHECK(more && !more[0] && !more[(1 << 20) - 1]);
		more[0] = more[(1 << 20) - 1] = 1;
		mr = reg_buf(b.pd, handle, more, 1 << 20, ALL);
		CHECK(mr && ibv_dereg_mr(mr) == 0);
		free_buf(handle);
	}
	CHECK(!alloc_buf(b.pd, 0, &handle) && errno == EINVAL);
	CHECK(!alloc_buf(b.pd, SIZE_MAX, &handle));
}

// ---------------------------------------------------------------- rings and threads

enum { THREADS = 16, QUEUES = 40 };

static void *make_queues(void *unused)
{
	// Large ones: every fourth begins a new piece of the memory that rings are in.
	for (int i = 0; i < QUEUES; i++)
		CHECK(ibv_create_cq(ctx, 65536, NULL, NULL, 0));
	return unused;
}

static void case_rings_made_by_threads(void)
{
	pthread_t threads[THREADS];
	open_device();
	for (int i = 0; i < THREADS; i++)
		CHECK(pthread_create(&threads[i], NULL, make_queues, NULL) == 0);
	for (int i = 0; i < THREADS; i++)
		CHECK(pthread_join(threads[i], NULL) == 0);
}

// ---------------------------------------------------------------- what the device says

static void case_capabilities(void)
{
	open_device();
	struct ibv_device_attr_ex attr;
	CHECK(ibv_query_device_ex(ctx, NULL, &attr) == 0);
	unsigned int has = IBV_DEVICE_MEM_WINDOW | IBV_DEVICE_MEM_WINDOW_TYPE_2B |
			   IBV_DEVICE_MEM_MGT_EXTENSIONS;
	CHECK((attr.orig_attr.device_cap_flags & has) == has);
	CHECK(!(attr.orig_attr.device_cap_flags & IBV_DEVICE_MEM_WINDOW_TYPE_2A));
	uint64_t newer = (uint64_t)1 << 38 | (uint64_t)1 << 40, persistent = (uint64_t)1 << 39;
	CHECK((attr.device_cap_flags_ex & newer) == newer);
	CHECK(!(attr.device_cap_flags_ex & persistent));
	CHECK((attr.device_cap_flags_ex & has) == has);
	CHECK(attr.orig_attr.max_mw > 0 && attr.max_dm_size > 0);
	CHECK(attr.odp_caps.general_caps == (IBV_ODP_SUPPORT | IBV_ODP_SUPPORT_IMPLICIT));
	uint32_t datagram = IBV_ODP_SUPPORT_SEND | IBV_ODP_SUPPORT_RECV;
	uint32_t rc = datagram | IBV_ODP_SUPPORT_WRITE | IBV_ODP_SUPPORT_READ |
		      IBV_ODP_SUPPORT_ATOMIC | 1 << 6 | 1 << 7;
	CHECK((attr.odp_caps.per_transport_caps.rc_odp_caps & rc) == rc);
	datagram |= attr.orig_attr.max_srq ? IBV_ODP_SUPPORT_SRQ_RECV : 0;
	CHECK(attr.odp_caps.per_transport_caps.ud_odp_caps == datagram);
	CHECK(attr.xrc_odp_caps == attr.odp_caps.per_transport_caps.rc_odp_caps);
}

// Of an endpoint whose registered bytes are limited, and what is said then.
static void case_limited(void)
{
	open_device();
	a.pd = ibv_alloc_pd(ctx);
	struct ibv_device_attr_ex attr;
	CHECK(a.pd && ibv_query_device_ex(ctx, NULL, &attr) == 0);
	CHECK(attr.odp_caps.general_caps == IBV_ODP_SUPPORT);
	CHECK(!ibv_reg_mr(a.pd, NULL, SIZE_MAX, IBV_ACCESS_ON_DEMAND) && errno == ENOMEM);
	struct ibv_mr *mr = ibv_reg_mr(a.pd, pages(SIZE), SIZE, IBV_ACCESS_ON_DEMAND);
	CHECK(mr && ibv_dereg_mr(mr) == 0);
}

static const struct {
	const char *name;
	void (*run)(void);
} cases[] = {
	{ "rereg", case_rereg },
	{ "window_type_1", case_window_type_1 },
	{ "window_type_2", case_window_type_2 },
	{ "windows_over_xrc", case_windows_over_xrc },
	{ "bind_errors", case_bind_errors },
	{ "extended_posting", case_extended_posting },
	{ "atomic_write", case_atomic_write },
	{ "zero_based", case_zero_based },
	{ "null_region", case_null_region },
	{ "on_demand", case_on_demand },
	{ "implicit", case_implicit },
	{ "device_memory", case_device_memory },
	{ "buffers", case_buffers },
	{ "rings_made_by_threads", case_rings_made_by_threads },
	{ "capabilities", case_capabilities },
	{ "limited", case_limited },
};

int main(int argc, char **argv)
{
	for (size_t i = 0; argc == 2 && i < sizeof cases / sizeof *cases; i++) {
		if (!strcmp(cases[i].name, argv[1])) {
			cases[i].run();
			printf("%s holds\n", argv[1]);
			return 0;
		}
	}
	fprintf(stderr, "usage: memory_verbs CASE\n");
	return 2;
}
