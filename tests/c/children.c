// Every control verb with the parent's objects, each in a child of its own: the child is told that
// they are not its own, and lives; the parent's objects are as they were.

#include "check.h"
#include <infiniband/verbs.h>
#include <sys/wait.h>
#include <unistd.h>

#define CHILD_SECONDS 60
#define SIZE 4096
// Regions until the library registers without asking the router, and some.
#define REGIONS 100

#define LOCAL IBV_ACCESS_LOCAL_WRITE
#define BOUND (LOCAL | IBV_ACCESS_MW_BIND)

// The error that an expression gives in a child: 0 for none, -1 if the child died.
#define IN_CHILD(expression)                                                               \
	({                                                                                 \
		fflush(stdout);                                                            \
		pid_t child = fork();                                                      \
		if (child == 0) {                                                          \
			alarm(CHILD_SECONDS);                                              \
			errno = 0;                                                         \
			_exit(expression);                                                 \
		}                                                                          \
		int status;                                                                \
		child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status)      \
			? WEXITSTATUS(status)                                              \
			: -1;                                                              \
	})

// Verbs that return errno, that return less than 0 and set it, and that return NULL and set it.
#define REFUSES(call) CHECK(IN_CHILD(call) == EINVAL)
#define REFUSES_BELOW_ZERO(call) CHECK(IN_CHILD((call) < 0 ? errno : 0) == EINVAL)
#define REFUSES_BY_NULL(call) CHECK(IN_CHILD((call) ? 0 : errno) == EINVAL)
#define ANSWERS(call) CHECK(IN_CHILD(call) == 0)

static char memory[SIZE] __attribute__((aligned(SIZE)));
static char other[SIZE] __attribute__((aligned(SIZE)));

int main(void)
{
	struct ibv_device **list = ibv_get_device_list(NULL);
	MUST(list && list[0]);
	struct ibv_context *context = ibv_open_device(list[0]);
	MUST(context);
	struct ibv_pd *pd = ibv_alloc_pd(context);
	struct ibv_comp_channel *channel = ibv_create_comp_channel(context);
	MUST(pd && channel);
	struct ibv_cq *cq = ibv_create_cq(context, 16, NULL, channel, 0);
	MUST(cq);
	struct ibv_qp_init_attr init = {.send_cq = cq,
					.recv_cq = cq,
					.qp_type = IBV_QPT_UD,
					.cap = {.max_send_wr = 4, .max_recv_wr = 4,
						.max_send_sge = 1, .max_recv_sge = 1}};
	struct ibv_qp *qp = ibv_create_qp(pd, &init);
	struct ibv_srq_init_attr srq_init = {.attr = {.max_wr = 4, .max_sge = 1}};
	struct ibv_srq *srq = ibv_create_srq(pd, &srq_init);
	struct ibv_xrcd_init_attr xrcd_init = {.comp_mask = IBV_XRCD_INIT_ATTR_FD |
							    IBV_XRCD_INIT_ATTR_OFLAGS,
					       .fd = -1};
	struct ibv_xrcd *xrcd = ibv_open_xrcd(context, &xrcd_init);
	MUST(qp && srq && xrcd);
	struct ibv_qp_init_attr_ex xrc_init = {.qp_type = IBV_QPT_XRC_RECV,
					       .comp_mask = IBV_QP_INIT_ATTR_XRCD,
					       .xrcd = xrcd};
	struct ibv_qp *xrc_qp = ibv_create_qp_ex(context, &xrc_init);
	struct ibv_srq_init_attr_ex xrc_srq_init = {
		.attr = {.max_wr = 4, .max_sge = 1},
		.comp_mask = IBV_SRQ_INIT_ATTR_TYPE | IBV_SRQ_INIT_ATTR_PD |
			     IBV_SRQ_INIT_ATTR_CQ | IBV_SRQ_INIT_ATTR_XRCD,
		.srq_type = IBV_SRQT_XRC,
		.pd = pd,
		.cq = cq,
		.xrcd = xrcd};
	struct ibv_srq *xrc_srq = ibv_create_srq_ex(context, &xrc_srq_init);
	struct ibv_alloc_dm_attr dm_init = {.length = SIZE};
	struct ibv_dm *dm = ibv_alloc_dm(context, &dm_init);
	struct ibv_mw *mw = ibv_alloc_mw(pd, IBV_MW_TYPE_2);
	struct ibv_mr *asked_for = ibv_reg_mr(pd, memory, SIZE, BOUND);
	struct ibv_mr *null_mr = ibv_alloc_null_mr(pd);
	MUST(xrc_qp && xrc_srq && dm && mw && asked_for && null_mr);
	struct ibv_mr *dm_mr = ibv_reg_dm_mr(pd, dm, 0, SIZE, IBV_ACCESS_ZERO_BASED | LOCAL);
	struct ibv_mr *mr = NULL;
	MUST(dm_mr);
	for (int i = 0; i < REGIONS; i++) {
		if (mr)
			MUST(ibv_dereg_mr(mr) == 0);
		mr = ibv_reg_mr(pd, memory, SIZE, LOCAL);
		MUST(mr);
	}

	// What the device is, is known without asking.
	struct ibv_device_attr device;
	struct ibv_device_attr_ex extended;
	struct ibv_port_attr port;
	union ibv_gid gid;
	uint16_t pkey;
	ANSWERS(ibv_query_device(context, &device));
	ANSWERS(ibv_query_device_ex(context, NULL, &extended));
	ANSWERS(ibv_query_port(context, 1, &port));
	ANSWERS(ibv_query_gid(context, 1, 0, &gid));
	ANSWERS(ibv_query_pkey(context, 1, 0, &pkey));
	MUST(ibv_query_gid(context, 1, 0, &gid) == 0);

	struct ibv_qp_init_attr same;
	struct ibv_qp_attr attr = {.qp_state = IBV_QPS_INIT, .port_num = 1, .qkey = 1};
	const int to_init = IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_QKEY;
	struct ibv_qp_attr reset = {.qp_state = IBV_QPS_RESET};
	struct ibv_modify_cq_attr moderation = {.attr_mask = IBV_CQ_ATTR_MODERATE,
						.moderate = {.cq_count = 2, .cq_period = 2}};
	struct ibv_cq_init_attr_ex cq_init = {.cqe = 16, .wc_flags = IBV_WC_STANDARD_FLAGS};
	struct ibv_srq_attr srq_attr = {.max_wr = 8, .srq_limit = 1};
	struct ibv_qp_open_attr open = {.comp_mask = IBV_QP_OPEN_ATTR_NUM |
						     IBV_QP_OPEN_ATTR_XRCD |
						     IBV_QP_OPEN_ATTR_TYPE,
					.qp_num = xrc_qp->qp_num,
					.xrcd = xrcd,
					.qp_type = IBV_QPT_XRC_RECV};
	union ibv_gid group = {.raw = {0xff, 0x0e, [15] = 1}};
	struct ibv_sge sge = {.addr = (uintptr_t)memory, .length = SIZE, .lkey = asked_for->lkey};

	REFUSES_BY_NULL(ibv_alloc_pd(context));
	REFUSES(ibv_dealloc_pd(pd));
	REFUSES_BY_NULL(ibv_reg_mr(pd, other, SIZE, LOCAL));
	REFUSES_BY_NULL(ibv_alloc_null_mr(pd));
	REFUSES_BELOW_ZERO(ibv_rereg_mr(asked_for, IBV_REREG_MR_CHANGE_ACCESS, NULL, NULL, 0, BOUND));
	REFUSES_BELOW_ZERO(ibv_rereg_mr(mr, IBV_REREG_MR_CHANGE_ACCESS, NULL, NULL, 0, 0));
	REFUSES(ibv_dereg_mr(asked_for));
	REFUSES(ibv_dereg_mr(mr));
	REFUSES(ibv_dereg_mr(null_mr));
	REFUSES(ibv_dereg_mr(dm_mr));
	REFUSES(ibv_advise_mr(pd, IBV_ADVISE_MR_ADVICE_PREFETCH, IBV_ADVISE_MR_FLAG_FLUSH, &sge, 1));
	REFUSES_BY_NULL(ibv_alloc_mw(pd, IBV_MW_TYPE_2));
	REFUSES(ibv_dealloc_mw(mw));
	REFUSES_BY_NULL(ibv_alloc_dm(context, &dm_init));
	REFUSES_BY_NULL(ibv_reg_dm_mr(pd, dm, 0, SIZE, IBV_ACCESS_ZERO_BASED | LOCAL));
	REFUSES(ibv_free_dm(dm));
	REFUSES_BY_NULL(ibv_create_comp_channel(context));
	REFUSES(ibv_destroy_comp_channel(channel));
	REFUSES_BY_NULL(ibv_create_cq(context, 16, NULL, NULL, 0));
	REFUSES_BY_NULL(ibv_create_cq_ex(context, &cq_init));
	REFUSES(ibv_resize_cq(cq, 64));
	REFUSES(ibv_modify_cq(cq, &moderation));
	REFUSES(ibv_destroy_cq(cq));
	REFUSES_BY_NULL(ibv_create_qp(pd, &init));
	REFUSES_BY_NULL(ibv_create_qp_ex(context, &xrc_init));
	REFUSES(ibv_modify_qp(qp, &attr, to_init));
	REFUSES(ibv_modify_qp(qp, &reset, IBV_QP_STATE));
	REFUSES(ibv_modify_qp(xrc_qp, &reset, IBV_QP_STATE));
	REFUSES(ibv_query_qp(qp, &attr, IBV_QP_STATE, &same));
	REFUSES(ibv_query_qp(xrc_qp, &attr, IBV_QP_STATE, &same));
	REFUSES(ibv_attach_mcast(qp, &group, 0));
	REFUSES(ibv_detach_mcast(qp, &group, 0));
	REFUSES(ibv_destroy_qp(qp));
	REFUSES(ibv_destroy_qp(xrc_qp));
	REFUSES_BY_NULL(ibv_create_srq(pd, &srq_init));
	REFUSES_BY_NULL(ibv_create_srq_ex(context, &xrc_srq_init));
	REFUSES(ibv_modify_srq(srq, &srq_attr, IBV_SRQ_MAX_WR | IBV_SRQ_LIMIT));
	REFUSES(ibv_query_srq(srq, &srq_attr));
	REFUSES(ibv_destroy_srq(srq));
	REFUSES(ibv_destroy_srq(xrc_srq));
	REFUSES_BY_NULL(ibv_open_xrcd(context, &xrcd_init));
	REFUSES_BY_NULL(ibv_open_qp(context, &open));
	REFUSES(ibv_close_xrcd(xrcd));
	REFUSES_BELOW_ZERO(ibv_close_device(context));

	CHECK(ibv_resize_cq(cq, 64) == 0);
	CHECK(ibv_modify_qp(qp, &attr, to_init) == 0);
	CHECK(ibv_dereg_mr(mr) == 0);
	CHECK(ibv_dereg_mr(dm_mr) == 0 && ibv_dereg_mr(null_mr) == 0);
	CHECK(ibv_dereg_mr(asked_for) == 0);
	CHECK(ibv_dealloc_mw(mw) == 0 && ibv_free_dm(dm) == 0);
	CHECK(ibv_destroy_qp(qp) == 0 && ibv_destroy_qp(xrc_qp) == 0);
	CHECK(ibv_destroy_srq(srq) == 0 && ibv_destroy_srq(xrc_srq) == 0);
	CHECK(ibv_close_xrcd(xrcd) == 0);
	CHECK(ibv_destroy_cq(cq) == 0 && ibv_destroy_comp_channel(channel) == 0);
	CHECK(ibv_dealloc_pd(pd) == 0 && ibv_close_device(context) == 0);
	ibv_free_device_list(list);
	return checks();
}
