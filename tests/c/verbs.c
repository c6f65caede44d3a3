/*
 * Every verb that the header wraps in inline functions and macros, on the virtual device: what it
 * has works, what it has not answers as the man pages say, and the attributes agree with both.
 */
#include <infiniband/verbs.h>
#include <poll.h>
#include <stddef.h>
#include <stdlib.h>
#include <unistd.h>

#include "check.h"

static struct ibv_context *context;
static struct ibv_pd *pd;
static struct ibv_device_attr_ex device;
static struct ibv_port_attr port;
static union ibv_gid gid;
static char buffer[8192] __attribute__((aligned(4096)));

static void query(void)
{
	struct ibv_device_attr plain;
	struct ibv_query_device_ex_input input = {.comp_mask = 1};
	struct ibv_gid_entry entry, table[256];
	struct {
		struct ibv_port_attr attr;
		unsigned char behind[16];
	} room;
	union ibv_gid other;
	__be16 pkey = 0;
	ssize_t entries;

	CHECK(ibv_query_device(context, &plain) == 0);
	memset(&device, 0xff, sizeof device);
	CHECK(ibv_query_device_ex(context, NULL, &device) == 0);
	CHECK(memcmp(&device.orig_attr, &plain,
		     offsetof(struct ibv_device_attr, phys_port_cnt) + 1) == 0);
	CHECK(device.comp_mask == 0);
	CHECK(device.phys_port_cnt_ex == plain.phys_port_cnt);
	CHECK(ibv_query_device_ex(context, &input, &device) == EINVAL);
	CHECK(plain.max_qp > 0 && plain.max_cq > 0 && plain.max_mr > 0 && plain.max_sge > 0);
	CHECK(plain.vendor_id != 0x02c9 && plain.vendor_id != 0x15b3);
	CHECK(plain.node_guid == ibv_get_device_guid(context->device));

	/* The header's macro. */
	memset(&room, 0xff, sizeof room);
	CHECK(ibv_query_port(context, 1, &room.attr) == 0);
	port = room.attr;
	CHECK(room.behind[0] == 0xff);
	CHECK(port.state == IBV_PORT_ACTIVE && port.link_layer == IBV_LINK_LAYER_ETHERNET);
	CHECK(port.gid_tbl_len >= 1 && port.pkey_tbl_len >= 1);
	CHECK(port.port_cap_flags2 == 0);
	CHECK(ibv_query_port(context, 0, &room.attr) == EINVAL);
	CHECK(ibv_query_port(context, 2, &room.attr) == EINVAL);
	/* The exported function writes what the oldest programs have, and no byte more. */
	memset(&room, 0xff, sizeof room);
	CHECK((ibv_query_port)(context, 1, (void *)&room.attr) == 0);
	CHECK(room.attr.state == IBV_PORT_ACTIVE && room.attr.flags == port.flags);
	CHECK(room.attr.port_cap_flags2 == 0xffff);

	CHECK(ibv_query_gid(context, 1, 0, &gid) == 0);
	for (int i = 0; i < port.gid_tbl_len; i++)
		CHECK(ibv_query_gid(context, 1, i, &other) == 0);
	errno = 0;
	CHECK(ibv_query_gid(context, 1, port.gid_tbl_len, &other) == -1 && errno == EINVAL);
	CHECK(ibv_query_gid(context, 2, 0, &other) == -1);
	CHECK(ibv_query_gid(context, 1, -1, &other) == -1);
	CHECK(ibv_query_gid_ex(context, 1, 0, &entry, 0) == 0);
	CHECK(memcmp(&entry.gid, &gid, sizeof gid) == 0);
	CHECK(entry.gid_type == IBV_GID_TYPE_ROCE_V2 && entry.port_num == 1);
	CHECK(entry.gid_index == 0);
	CHECK(ibv_query_gid_ex(context, 1, port.gid_tbl_len, &entry, 0) == EINVAL);
	CHECK(ibv_query_gid_ex(context, 2, 0, &entry, 0) == EINVAL);
	CHECK(ibv_query_gid_ex(context, 1, 0, &entry, 1) == EINVAL);
	entries = ibv_query_gid_table(context, table, 256, 0);
	CHECK(entries >= 1 && entries <= port.gid_tbl_len);
	CHECK(memcmp(&table[0].gid, &gid, sizeof gid) == 0);
	CHECK(ibv_query_gid_table(context, table, 0, 0) == -EINVAL);
	CHECK(ibv_query_gid_table(context, table, 256, 1) == -EINVAL);

	CHECK(ibv_query_pkey(context, 1, 0, &pkey) == 0 && pkey == 0xffff);
	CHECK(ibv_get_pkey_index(context, 1, pkey) == 0);
	CHECK(ibv_query_pkey(context, 1, port.pkey_tbl_len, &pkey) == -1);
	CHECK(ibv_get_pkey_index(context, 1, htobe16(0x1234)) == -1);
	CHECK(ibv_get_device_index(context->device) >= -1);
}

static void clocks(void)
{
	struct ibv_values_ex first = {.comp_mask = IBV_VALUES_MASK_RAW_CLOCK}, second = first;

	if (!device.completion_timestamp_mask)
		return;
	CHECK(device.hca_core_clock > 0);
	CHECK(ibv_query_rt_values_ex(context, &first) == 0);
	CHECK(ibv_query_rt_values_ex(context, &second) == 0);
	CHECK(first.comp_mask == IBV_VALUES_MASK_RAW_CLOCK);
	CHECK(second.raw_clock.tv_sec > first.raw_clock.tv_sec ||
	      (second.raw_clock.tv_sec == first.raw_clock.tv_sec &&
	       second.raw_clock.tv_nsec >= first.raw_clock.tv_nsec));
	first.comp_mask = 0;
	CHECK(ibv_query_rt_values_ex(context, &first) == 0 && first.comp_mask == 0);
}

static void one_region(struct ibv_mr *mr, void *addr, size_t length)
{
	CHECK(mr);
	if (!mr)
		return;
	CHECK(mr->context == context && mr->pd == pd && mr->addr == addr);
	CHECK(mr->length == length && mr->lkey != 0);
	CHECK(ibv_dereg_mr(mr) == 0);
}

static void regions(void)
{
	volatile int variable = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE;
	volatile int relaxed = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_RELAXED_ORDERING;
	struct ibv_mr *mr;

	/* Constant access: the function. Variable or optional: ibv_reg_mr_iova2. */
	one_region(ibv_reg_mr(pd, buffer, 100, IBV_ACCESS_LOCAL_WRITE), buffer, 100);
	one_region(ibv_reg_mr(pd, buffer, 100, 0), buffer, 100);
	one_region(ibv_reg_mr(pd, buffer, 100, variable), buffer, 100);
	one_region(ibv_reg_mr(pd, buffer, 100, relaxed), buffer, 100);
	one_region(ibv_reg_mr(pd, buffer, 100,
			      IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_RELAXED_ORDERING),
		   buffer, 100);
	one_region(ibv_reg_mr_iova(pd, buffer, 100, 0x1000, IBV_ACCESS_LOCAL_WRITE), buffer, 100);
	one_region(ibv_reg_mr_iova(pd, buffer, 100, 0x1000, variable), buffer, 100);
	/* Remote writes need local ones. */
	errno = 0;
	CHECK(!ibv_reg_mr(pd, buffer, 100, IBV_ACCESS_REMOTE_WRITE) && errno == EINVAL);
	errno = 0;
	CHECK(!ibv_reg_mr(pd, buffer, 100, IBV_ACCESS_REMOTE_ATOMIC) && errno == EINVAL);
	/* No memory there. */
	errno = 0;
	CHECK(!ibv_reg_mr(pd, (void *)0x10000, 4096, IBV_ACCESS_LOCAL_WRITE) && errno == EFAULT);

	mr = ibv_reg_mr(pd, buffer, sizeof buffer, IBV_ACCESS_LOCAL_WRITE);
	CHECK(mr);
	if (mr) {
		uint32_t key = mr->lkey;
		int status = ibv_rereg_mr(mr, IBV_REREG_MR_CHANGE_ACCESS, NULL, NULL, 0,
					  IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_READ);
		CHECK(status == 0 || (status == IBV_REREG_MR_ERR_INPUT && errno == EOPNOTSUPP));
		CHECK(status == 0 || mr->lkey == key);
		CHECK(ibv_dereg_mr(mr) == 0);
	}

	errno = 0;
	CHECK(!ibv_reg_dmabuf_mr(pd, 0, 4096, 0, 0, IBV_ACCESS_LOCAL_WRITE) &&
	      errno == EOPNOTSUPP);
	mr = OFFERED(ibv_alloc_null_mr(pd));
	if (mr)
		CHECK(ibv_dereg_mr(mr) == 0);
	mr = OFFERED(ibv_reg_mr(pd, buffer, 4096, IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_ON_DEMAND));
	CHECK(!!mr == !!(device.odp_caps.general_caps & IBV_ODP_SUPPORT));
	/* Advice is for regions on demand. */
	if (mr) {
		struct ibv_sge sge = {(uintptr_t)buffer, 4096, mr->lkey};
		int status = ibv_advise_mr(pd, IBV_ADVISE_MR_ADVICE_PREFETCH, 0, &sge, 1);
		CHECK(status == 0 || status == EOPNOTSUPP);
		CHECK(ibv_dereg_mr(mr) == 0);
	}
}

static void device_memory(void)
{
	struct ibv_alloc_dm_attr attr = {.length = 64};
	struct ibv_dm *dm = OFFERED(ibv_alloc_dm(context, &attr));
	char in[64] = "in", out[64] = "";
	struct ibv_mr *mr;

	CHECK(!!dm == !!device.max_dm_size);
	if (!dm)
		return;
	CHECK(ibv_memcpy_to_dm(dm, 0, in, sizeof in) == 0);
	CHECK(ibv_memcpy_from_dm(out, dm, 0, sizeof out) == 0);
	CHECK(memcmp(in, out, sizeof in) == 0);
	mr = ibv_reg_dm_mr(pd, dm, 0, 64, IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_ZERO_BASED);
	CHECK(mr && ibv_dereg_mr(mr) == 0);
	CHECK(ibv_free_dm(dm) == 0);
}

static void windows(void)
{
	struct ibv_mw *mw;

	for (enum ibv_mw_type type = IBV_MW_TYPE_1; type <= IBV_MW_TYPE_2; type++) {
		mw = OFFERED(ibv_alloc_mw(pd, type));
		if (mw) {
			CHECK(device.orig_attr.max_mw > 0);
			CHECK(mw->context == context && mw->pd == pd && mw->type == type);
			CHECK(ibv_dealloc_mw(mw) == 0);
		}
	}
}

static void domains(void)
{
	struct ibv_td_init_attr td_attr = {0};
	struct ibv_td *td = OFFERED(ibv_alloc_td(context, &td_attr));
	struct ibv_parent_domain_init_attr attr = {.pd = pd, .td = td};
	struct ibv_pd *parent = OFFERED(ibv_alloc_parent_domain(context, &attr));
	struct ibv_xrcd_init_attr xrcd_attr = {
		.comp_mask = IBV_XRCD_INIT_ATTR_FD | IBV_XRCD_INIT_ATTR_OFLAGS, .fd = -1, .oflags = 0100};
	struct ibv_xrcd *xrcd = OFFERED(ibv_open_xrcd(context, &xrcd_attr));
	struct ibv_qp_open_attr open_attr = {
		.comp_mask = IBV_QP_OPEN_ATTR_NUM | IBV_QP_OPEN_ATTR_XRCD | IBV_QP_OPEN_ATTR_TYPE,
		.qp_num = 0xffffff, .xrcd = xrcd, .qp_type = IBV_QPT_XRC_RECV};

	if (parent) {
		struct ibv_mr *mr = ibv_reg_mr(parent, buffer, 64, IBV_ACCESS_LOCAL_WRITE);
		CHECK(mr && ibv_dereg_mr(mr) == 0);
		CHECK(ibv_dealloc_pd(parent) == 0);
	}
	if (td)
		CHECK(ibv_dealloc_td(td) == 0);
	CHECK(!!xrcd == !!(device.orig_attr.device_cap_flags & IBV_DEVICE_XRC));
	errno = 0;
	CHECK(!ibv_open_qp(context, &open_attr) && errno == (xrcd ? EINVAL : EOPNOTSUPP));
	if (xrcd)
		CHECK(ibv_close_xrcd(xrcd) == 0);
	/* Nobody's: there is no kernel's device to take over. */
	errno = 0;
	CHECK(!ibv_import_device(0) && errno == EOPNOTSUPP);
	CHECK(!ibv_import_pd(context, 0) && errno == EOPNOTSUPP);
	CHECK(!ibv_import_mr(pd, 0) && errno == EOPNOTSUPP);
	CHECK(!ibv_import_dm(context, 0) && errno == EOPNOTSUPP);
}

static void counters_and_flows(struct ibv_qp *qp)
{
	struct ibv_counters_init_attr init = {0};
	struct ibv_counters *counters = OFFERED(ibv_create_counters(context, &init));
	struct ibv_flow_attr flow_attr = {.type = IBV_FLOW_ATTR_NORMAL, .size = sizeof flow_attr, .port = 1};
	struct ibv_flow *flow = OFFERED(ibv_create_flow(qp, &flow_attr));
	struct ibv_flow_action_esp_attr esp = {0};
	struct ibv_flow_action *action = OFFERED(ibv_create_flow_action_esp(context, &esp));

	if (counters)
		CHECK(ibv_destroy_counters(counters) == 0);
	if (flow)
		CHECK(ibv_destroy_flow(flow) == 0);
	if (action)
		CHECK(ibv_destroy_flow_action(action) == 0);
}

static void shared_receive_queues(struct ibv_cq *cq)
{
	struct ibv_srq_init_attr attr = {.attr = {.max_wr = 16, .max_sge = 1}};
	struct ibv_srq_init_attr_ex extended = {.attr = {.max_wr = 16, .max_sge = 1},
		.comp_mask = IBV_SRQ_INIT_ATTR_PD, .pd = pd};
	struct ibv_srq_init_attr_ex tags = {.attr = {.max_wr = 16, .max_sge = 1},
		.comp_mask = IBV_SRQ_INIT_ATTR_PD | IBV_SRQ_INIT_ATTR_TYPE |
			     IBV_SRQ_INIT_ATTR_CQ | IBV_SRQ_INIT_ATTR_TM,
		.srq_type = IBV_SRQT_TM, .pd = pd, .cq = cq, .tm_cap = {1, 1}};
	struct ibv_srq *srqs[] = {OFFERED(ibv_create_srq(pd, &attr)),
				  OFFERED(ibv_create_srq_ex(context, &extended))};
	struct ibv_srq *tm = OFFERED(ibv_create_srq_ex(context, &tags));

	for (int i = 0; i < 2; i++) {
		struct ibv_srq_attr now;
		CHECK(!!srqs[i] == !!device.orig_attr.max_srq);
		if (!srqs[i])
			continue;
		CHECK(ibv_query_srq(srqs[i], &now) == 0 && now.max_wr >= 16);
		CHECK(ibv_destroy_srq(srqs[i]) == 0);
	}
	CHECK(!!tm == !!device.tm_caps.max_num_tags);
	if (tm)
		CHECK(ibv_destroy_srq(tm) == 0);
}

static void work_queues(struct ibv_cq *cq)
{
	struct ibv_wq_init_attr attr = {.wq_type = IBV_WQT_RQ, .max_wr = 16, .max_sge = 1,
					.pd = pd, .cq = cq};
	struct ibv_wq *wq = OFFERED(ibv_create_wq(context, &attr));
	struct ibv_rwq_ind_table_init_attr table_attr = {.ind_tbl = &wq};
	struct ibv_rwq_ind_table *table =
		wq ? ibv_create_rwq_ind_table(context, &table_attr)
		   : OFFERED(ibv_create_rwq_ind_table(context, &table_attr));

	CHECK(!!wq == !!device.max_wq_type_rq);
	if (table)
		CHECK(ibv_destroy_rwq_ind_table(table) == 0);
	if (wq)
		CHECK(ibv_destroy_wq(wq) == 0);
}

static void completion_queues(void)
{
	struct ibv_cq_init_attr_ex attr = {.cqe = 16};
	struct ibv_modify_cq_attr moderation = {.attr_mask = IBV_CQ_ATTR_MODERATE,
						.moderate = {.cq_count = 1, .cq_period = 1}};
	struct ibv_poll_cq_attr none = {0}, unknown = {.comp_mask = 1u << 31};
	struct ibv_comp_channel *channel = ibv_create_comp_channel(context);
	struct ibv_cq_ex *extended;
	struct ibv_cq *cq;
	struct ibv_wc wc;
	struct pollfd event;
	int status;

	CHECK(channel && channel->context == context && channel->fd >= 0);
	cq = ibv_create_cq(context, 10, &moderation, channel, 0);
	CHECK(cq && cq->cqe >= 10 && cq->cq_context == &moderation && cq->channel == channel);
	CHECK(ibv_poll_cq(cq, 1, &wc) == 0);
	CHECK(ibv_poll_cq(cq, 0, NULL) == 0);
	CHECK(ibv_req_notify_cq(cq, 0) == 0);
	event = (struct pollfd){.fd = channel->fd, .events = POLLIN};
	CHECK(poll(&event, 1, 0) == 0);
	CHECK(ibv_destroy_comp_channel(channel) == EBUSY);
	status = ibv_resize_cq(cq, 64);
	CHECK((status == 0 && cq->cqe >= 64) || status == EOPNOTSUPP);
	status = ibv_modify_cq(cq, &moderation);
	CHECK(status == (device.cq_mod_caps.max_cq_count ? 0 : EOPNOTSUPP));
	CHECK(ibv_destroy_cq(cq) == 0);
	CHECK(ibv_destroy_comp_channel(channel) == 0);

	errno = 0;
	CHECK(!ibv_create_cq(context, 10, NULL, NULL, context->num_comp_vectors) && errno == EINVAL);
	CHECK(!ibv_create_cq(context, 10, NULL, NULL, -1) && errno == EINVAL);
	CHECK(!ibv_create_cq(context, 0, NULL, NULL, 0) && errno == EINVAL);
	CHECK(!ibv_create_cq(context, -1, NULL, NULL, 0) && errno == EINVAL);
	CHECK(!ibv_create_cq(context, device.orig_attr.max_cqe + 1, NULL, NULL, 0) &&
	      errno == EINVAL);

	attr.wc_flags = IBV_WC_STANDARD_FLAGS;
	extended = ibv_create_cq_ex(context, &attr);
	CHECK(extended);
	if (extended) {
		CHECK(ibv_start_poll(extended, &unknown) == EINVAL);
		CHECK(ibv_start_poll(extended, &none) == ENOENT);
		CHECK(ibv_start_poll(extended, &none) == ENOENT);
		CHECK(ibv_poll_cq(ibv_cq_ex_to_cq(extended), 1, &wc) == 0);
		CHECK(ibv_destroy_cq(ibv_cq_ex_to_cq(extended)) == 0);
	}
	attr.wc_flags = IBV_WC_EX_WITH_TM_INFO;
	extended = OFFERED(ibv_create_cq_ex(context, &attr));
	if (extended)
		CHECK(ibv_destroy_cq(ibv_cq_ex_to_cq(extended)) == 0);
	attr.wc_flags = 1ull << 63;
	errno = 0;
	CHECK(!ibv_create_cq_ex(context, &attr) && errno == EOPNOTSUPP);
	attr.wc_flags = 0;
	attr.comp_mask = IBV_CQ_INIT_ATTR_MASK_FLAGS;
	attr.flags = 1u << 31;
	errno = 0;
	CHECK(!ibv_create_cq_ex(context, &attr) && (errno == EOPNOTSUPP || errno == EINVAL));
	attr.flags = IBV_CREATE_CQ_ATTR_SINGLE_THREADED;
	extended = ibv_create_cq_ex(context, &attr);
	CHECK(extended && ibv_destroy_cq(ibv_cq_ex_to_cq(extended)) == 0);
	attr.comp_mask = 1u << 31;
	errno = 0;
	CHECK(!ibv_create_cq_ex(context, &attr) && (errno == EOPNOTSUPP || errno == EINVAL));
}

static void address_handles(void)
{
	struct ibv_ah_attr attr = {.grh = {.dgid = gid, .hop_limit = 64}, .is_global = 1, .port_num = 1};
	struct ibv_wc wc = {.wc_flags = 0};
	unsigned char header[40] = {0};
	struct ibv_ah_attr back;
	struct ibv_ah *ah = ibv_create_ah(pd, &attr);

	CHECK(ah && ah->context == context && ah->pd == pd);
	CHECK(ibv_destroy_ah(ah) == 0);
	attr.is_global = 0;
	errno = 0;
	CHECK(!ibv_create_ah(pd, &attr) && errno == EINVAL);
	attr.is_global = 1;
	attr.port_num = 2;
	CHECK(!ibv_create_ah(pd, &attr) && errno == EINVAL);
	attr.port_num = 1;
	attr.grh.sgid_index = port.gid_tbl_len;
	CHECK(!ibv_create_ah(pd, &attr) && errno == EINVAL);

	/* A datagram that came over IPv4: the header is in the last 20 bytes. */
	CHECK(ibv_init_ah_from_wc(context, 1, &wc, (void *)header, &back) == -1);
	header[20] = 0x45;
	header[21] = 8;
	memcpy(header + 32, (unsigned char[]){192, 0, 2, 7}, 4);
	memcpy(header + 36, (unsigned char[]){192, 0, 2, 8}, 4);
	wc.wc_flags = IBV_WC_GRH;
	CHECK(ibv_init_ah_from_wc(context, 1, &wc, (void *)header, &back) == 0);
	CHECK(back.is_global && back.port_num == 1 && back.grh.traffic_class == 8);
	CHECK(back.grh.dgid.raw[10] == 0xff && back.grh.dgid.raw[12] == 192);
	CHECK(back.grh.dgid.raw[15] == 7);
	ah = ibv_create_ah_from_wc(pd, &wc, (void *)header, 1);
	CHECK(ah && ibv_destroy_ah(ah) == 0);
}

static struct ibv_qp *plain_qp(struct ibv_cq *cq, enum ibv_qp_type type)
{
	struct ibv_qp_init_attr attr = {.send_cq = cq, .recv_cq = cq, .qp_type = type,
		.cap = {16, 16, 2, 2, 32}, .sq_sig_all = 1, .qp_context = &gid};
	struct ibv_qp *qp = ibv_create_qp(pd, &attr);

	CHECK(qp && qp->context == context && qp->pd == pd && qp->qp_context == &gid);
	CHECK(qp->send_cq == cq && qp->recv_cq == cq && qp->qp_type == type && !qp->srq);
	CHECK(qp->state == IBV_QPS_RESET && qp->qp_num != 0);
	CHECK(attr.cap.max_send_wr >= 16 && attr.cap.max_inline_data >= 32);
	return qp;
}

static void queue_pairs(struct ibv_cq *cq)
{
	struct ibv_qp_init_attr bad = {.send_cq = cq, .recv_cq = cq, .qp_type = 77,
				       .cap = {1, 1, 1, 1, 0}};
	struct ibv_qp_init_attr_ex only_pd = {.send_cq = cq, .recv_cq = cq, .qp_type = IBV_QPT_RC,
		.cap = {1, 1, 1, 1, 0}, .comp_mask = IBV_QP_INIT_ATTR_PD, .pd = pd};
	struct ibv_qp_init_attr_ex extended = only_pd;
	struct ibv_qp_attr attr = {.qp_state = IBV_QPS_INIT, .port_num = 1};
	struct ibv_qp_init_attr init;
	struct ibv_qp_rate_limit_attr rate = {.rate_limit = 1000};
	struct ibv_ece ece = {0};
	struct ibv_send_wr wr = {.opcode = IBV_WR_SEND}, *bad_wr = NULL;
	struct ibv_recv_wr recv = {.wr_id = 1}, *bad_recv = NULL;
	struct ibv_qp *qp = plain_qp(cq, IBV_QPT_RC);
	union ibv_gid group = {.raw = {0xff, 0x0e}};
	struct ibv_wc wc;
	int status;

	CHECK(ibv_qp_to_qp_ex(qp) != NULL);
	CHECK(ibv_query_qp(qp, &attr, IBV_QP_STATE | IBV_QP_CAP, &init) == 0);
	CHECK(attr.qp_state == IBV_QPS_RESET && init.qp_type == IBV_QPT_RC && init.sq_sig_all == 1);
	CHECK(init.send_cq == cq && init.qp_context == &gid && init.cap.max_send_wr >= 16);
	/* RESET: nothing may be posted. */
	CHECK(ibv_post_recv(qp, &recv, &bad_recv) == EINVAL && bad_recv == &recv);
	CHECK(ibv_post_send(qp, &wr, &bad_wr) == EINVAL && bad_wr == &wr);
	/* A transition that is not, and one whose attributes lack. */
	attr = (struct ibv_qp_attr){.qp_state = IBV_QPS_RTS};
	CHECK(ibv_modify_qp(qp, &attr, IBV_QP_STATE) == EINVAL && qp->state == IBV_QPS_RESET);
	attr.qp_state = IBV_QPS_INIT;
	CHECK(ibv_modify_qp(qp, &attr, IBV_QP_STATE) == EINVAL);
	attr.port_num = 9;
	CHECK(ibv_modify_qp(qp, &attr, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT |
					       IBV_QP_ACCESS_FLAGS) == EINVAL);
	attr.port_num = 1;
	CHECK(ibv_modify_qp(qp, &attr, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT |
					       IBV_QP_ACCESS_FLAGS) == 0);
	CHECK(qp->state == IBV_QPS_INIT);
	CHECK(ibv_post_send(qp, &wr, &bad_wr) == EINVAL);
	CHECK(ibv_post_recv(qp, &recv, &bad_recv) == 0);
	attr.qp_state = IBV_QPS_ERR;
	CHECK(ibv_modify_qp(qp, &attr, IBV_QP_STATE) == 0);
	for (int spins = 0; (status = ibv_poll_cq(cq, 1, &wc)) == 0 && spins < 3000; spins++)
		usleep(10000);
	CHECK(status == 1 && wc.status == IBV_WC_WR_FLUSH_ERR && wc.wr_id == 1);
	CHECK(wc.qp_num == qp->qp_num);

	status = ibv_modify_qp_rate_limit(qp, &rate);
	CHECK(status == (device.packet_pacing_caps.qp_rate_limit_max ? 0 : EOPNOTSUPP) ||
	      status == EINVAL);
	CHECK(ibv_query_ece(qp, &ece) == EOPNOTSUPP);
	CHECK(ibv_set_ece(qp, &ece) == EOPNOTSUPP);
	status = ibv_query_qp_data_in_order(qp, IBV_WR_RDMA_WRITE, 0);
	CHECK(status == 0 || status == 1);
	status = ibv_attach_mcast(qp, &group, 0);
	CHECK(status == EINVAL || (status == EOPNOTSUPP && device.orig_attr.max_mcast_grp == 0));
	status = ibv_detach_mcast(qp, &group, 0);
	CHECK(status == EINVAL || (status == EOPNOTSUPP && device.orig_attr.max_mcast_grp == 0));
	counters_and_flows(qp);
	CHECK(ibv_destroy_cq(cq) == EBUSY);
	CHECK(ibv_destroy_qp(qp) == 0);

	errno = 0;
	CHECK(!ibv_create_qp(pd, &bad) && (errno == EOPNOTSUPP || errno == EINVAL));
	bad.qp_type = IBV_QPT_RC;
	bad.cap.max_send_wr = device.orig_attr.max_qp_wr + 1;
	CHECK(!ibv_create_qp(pd, &bad) && (errno == EINVAL || errno == ENOMEM));
	bad.cap.max_send_wr = 1;
	bad.cap.max_send_sge = device.orig_attr.max_sge + 1;
	CHECK(!ibv_create_qp(pd, &bad) && errno == EINVAL);
	qp = ibv_create_qp_ex(context, &only_pd);
	CHECK(qp && only_pd.pd == pd && only_pd.comp_mask == IBV_QP_INIT_ATTR_PD);
	CHECK(qp && ibv_destroy_qp(qp) == 0);
	extended.comp_mask |= 1u << 30;
	errno = 0;
	CHECK(!ibv_create_qp_ex(context, &extended) && (errno == EOPNOTSUPP || errno == EINVAL));
	extended.comp_mask = IBV_QP_INIT_ATTR_PD | IBV_QP_INIT_ATTR_SEND_OPS_FLAGS;
	extended.send_ops_flags = IBV_QP_EX_WITH_TSO;
	errno = 0;
	CHECK(!ibv_create_qp_ex(context, &extended) && errno == EOPNOTSUPP);
	extended.send_ops_flags = IBV_QP_EX_WITH_RDMA_READ;
	extended.qp_type = IBV_QPT_UC;
	errno = 0;
	CHECK(!ibv_create_qp_ex(context, &extended) && errno == EOPNOTSUPP);
	extended.comp_mask = IBV_QP_INIT_ATTR_PD | IBV_QP_INIT_ATTR_CREATE_FLAGS;
	extended.qp_type = IBV_QPT_RC;
	extended.create_flags = IBV_QP_CREATE_CVLAN_STRIPPING;
	errno = 0;
	CHECK(!ibv_create_qp_ex(context, &extended) && (errno == EOPNOTSUPP || errno == EINVAL));
	for (enum ibv_qp_type type = IBV_QPT_RC; type <= IBV_QPT_UD; type++)
		CHECK(ibv_destroy_qp(plain_qp(cq, type)) == 0);
}

static void connect(struct ibv_qp *from, struct ibv_qp *to)
{
	struct ibv_qp_attr attr = {.qp_state = IBV_QPS_INIT, .port_num = 1,
		.qp_access_flags = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_READ |
				   IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_ATOMIC,
		.path_mtu = IBV_MTU_1024, .dest_qp_num = to->qp_num, .rq_psn = 7, .sq_psn = 7,
		.max_dest_rd_atomic = 4, .max_rd_atomic = 4, .min_rnr_timer = 12, .timeout = 14,
		.retry_cnt = 7, .rnr_retry = 7,
		.ah_attr = {.grh = {.dgid = gid, .hop_limit = 64}, .is_global = 1, .port_num = 1}};

	CHECK(ibv_modify_qp(from, &attr, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT |
						 IBV_QP_ACCESS_FLAGS) == 0);
	attr.qp_state = IBV_QPS_RTR;
	CHECK(ibv_modify_qp(from, &attr, IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU |
						 IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
						 IBV_QP_MAX_DEST_RD_ATOMIC |
						 IBV_QP_MIN_RNR_TIMER) == 0);
	attr.qp_state = IBV_QPS_RTS;
	CHECK(ibv_modify_qp(from, &attr, IBV_QP_STATE | IBV_QP_SQ_PSN | IBV_QP_TIMEOUT |
						 IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY |
						 IBV_QP_MAX_QP_RD_ATOMIC) == 0);
}

/* Waits for a completion; the caller ends the poll. */
static int next(struct ibv_cq_ex *cq)
{
	struct ibv_poll_cq_attr none = {0};
	int status = ENOENT;

	for (int spins = 0; spins < 3000 && (status = ibv_start_poll(cq, &none)) == ENOENT; spins++)
		usleep(10000);
	return status;
}

static void expect(struct ibv_cq_ex *cq, uint64_t wr_id, enum ibv_wc_opcode opcode)
{
	int status = next(cq);

	CHECK(status == 0);
	if (status)
		return;
	CHECK(cq->status == IBV_WC_SUCCESS && cq->wr_id == wr_id);
	CHECK(ibv_wc_read_opcode(cq) == opcode);
	CHECK(ibv_next_poll(cq) == ENOENT);
	ibv_end_poll(cq);
}

/* The extended interfaces carry data, between two queue pairs of this process. */
static void extended_work(void)
{
	struct ibv_cq_init_attr_ex cq_attr = {.cqe = 64, .wc_flags = IBV_WC_STANDARD_FLAGS};
	struct ibv_cq_ex *send_cq = ibv_create_cq_ex(context, &cq_attr);
	struct ibv_cq_ex *recv_cq = ibv_create_cq_ex(context, &cq_attr);
	struct ibv_qp_init_attr_ex attr = {.send_cq = ibv_cq_ex_to_cq(send_cq),
		.recv_cq = ibv_cq_ex_to_cq(recv_cq), .qp_type = IBV_QPT_RC,
		.cap = {16, 16, 4, 4, 64},
		.comp_mask = IBV_QP_INIT_ATTR_PD | IBV_QP_INIT_ATTR_SEND_OPS_FLAGS, .pd = pd,
		.send_ops_flags = IBV_QP_EX_WITH_SEND | IBV_QP_EX_WITH_SEND_WITH_IMM |
				  IBV_QP_EX_WITH_RDMA_WRITE | IBV_QP_EX_WITH_RDMA_WRITE_WITH_IMM |
				  IBV_QP_EX_WITH_RDMA_READ | IBV_QP_EX_WITH_ATOMIC_CMP_AND_SWP |
				  IBV_QP_EX_WITH_ATOMIC_FETCH_AND_ADD};
	struct ibv_qp *a = ibv_create_qp_ex(context, &attr), *b = ibv_create_qp_ex(context, &attr);
	struct ibv_qp_ex *qp = ibv_qp_to_qp_ex(a);
	struct ibv_mr *mr = ibv_reg_mr(pd, buffer, sizeof buffer,
				       IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_READ |
					       IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_ATOMIC);
	uintptr_t base = (uintptr_t)buffer;
	struct ibv_sge sge = {base + 4096, 256, mr->lkey};
	struct ibv_sge two[] = {{base, 1, mr->lkey}, {base + 2, 3, mr->lkey}};
	struct ibv_data_buf parts[] = {{"ab", 2}, {"cde", 3}};
	struct ibv_recv_wr recv = {.wr_id = 100, .sg_list = &sge, .num_sge = 1}, *bad;
	uint64_t *number = (uint64_t *)(buffer + 4096 + 512);

	CHECK(a && b && qp && mr);
	connect(a, b);
	connect(b, a);
	memset(buffer, 0, sizeof buffer);
	strcpy(buffer, "hello");

	CHECK(ibv_post_recv(b, &recv, &bad) == 0);
	ibv_wr_start(qp);
	qp->wr_id = 1;
	qp->wr_flags = IBV_SEND_SIGNALED;
	ibv_wr_send(qp);
	ibv_wr_set_sge(qp, mr->lkey, base, 6);
	CHECK(ibv_wr_complete(qp) == 0);
	expect(send_cq, 1, IBV_WC_SEND);
	CHECK(next(recv_cq) == 0);
	CHECK(recv_cq->status == IBV_WC_SUCCESS && recv_cq->wr_id == 100);
	CHECK(ibv_wc_read_opcode(recv_cq) == IBV_WC_RECV && ibv_wc_read_byte_len(recv_cq) == 6);
	CHECK(ibv_wc_read_qp_num(recv_cq) == b->qp_num && ibv_wc_read_wc_flags(recv_cq) == 0);
	CHECK(ibv_wc_read_vendor_err(recv_cq) == 0);
	ibv_end_poll(recv_cq);
	CHECK(strcmp(buffer + 4096, "hello") == 0);

	/* Several elements, and inline data, in one batch. */
	recv.wr_id = 101;
	CHECK(ibv_post_recv(b, &recv, &bad) == 0);
	ibv_wr_start(qp);
	qp->wr_id = 2;
	ibv_wr_send_imm(qp, htobe32(0xfeed));
	ibv_wr_set_sge_list(qp, 2, two);
	qp->wr_id = 3;
	ibv_wr_rdma_write(qp, mr->rkey, base + 4096 + 300);
	ibv_wr_set_inline_data_list(qp, 2, parts);
	CHECK(ibv_wr_complete(qp) == 0);
	expect(recv_cq, 101, IBV_WC_RECV);
	for (int i = 2; i <= 3; i++) {
		CHECK(next(send_cq) == 0);
		CHECK(send_cq->wr_id == (uint64_t)i && send_cq->status == IBV_WC_SUCCESS);
		ibv_end_poll(send_cq);
	}
	CHECK(memcmp(buffer + 4096, "hllo", 4) == 0);
	CHECK(memcmp(buffer + 4096 + 300, "abcde", 5) == 0);

	recv.wr_id = 102;
	CHECK(ibv_post_recv(b, &recv, &bad) == 0);
	ibv_wr_start(qp);
	qp->wr_id = 4;
	ibv_wr_rdma_write_imm(qp, mr->rkey, base + 4096 + 320, htobe32(0xbeef));
	ibv_wr_set_inline_data(qp, "xyz", 3);
	CHECK(ibv_wr_complete(qp) == 0);
	expect(send_cq, 4, IBV_WC_RDMA_WRITE);
	CHECK(next(recv_cq) == 0);
	CHECK(ibv_wc_read_opcode(recv_cq) == IBV_WC_RECV_RDMA_WITH_IMM);
	CHECK(ibv_wc_read_wc_flags(recv_cq) & IBV_WC_WITH_IMM);
	CHECK(ibv_wc_read_imm_data(recv_cq) == htobe32(0xbeef));
	CHECK(ibv_wc_read_byte_len(recv_cq) == 3);
	ibv_end_poll(recv_cq);

	*number = 5;
	ibv_wr_start(qp);
	qp->wr_id = 5;
	ibv_wr_rdma_read(qp, mr->rkey, base + 4096 + 300);
	ibv_wr_set_sge(qp, mr->lkey, base + 64, 5);
	CHECK(ibv_wr_complete(qp) == 0);
	expect(send_cq, 5, IBV_WC_RDMA_READ);
	CHECK(memcmp(buffer + 64, "abcde", 5) == 0);
	ibv_wr_start(qp);
	qp->wr_id = 6;
	ibv_wr_atomic_fetch_add(qp, mr->rkey, (uintptr_t)number, 3);
	ibv_wr_set_sge(qp, mr->lkey, base + 128, 8);
	CHECK(ibv_wr_complete(qp) == 0);
	expect(send_cq, 6, IBV_WC_FETCH_ADD);
	CHECK(*number == 8 && *(uint64_t *)(buffer + 128) == 5);
	ibv_wr_start(qp);
	qp->wr_id = 7;
	ibv_wr_atomic_cmp_swp(qp, mr->rkey, (uintptr_t)number, 8, 99);
	ibv_wr_set_sge(qp, mr->lkey, base + 128, 8);
	CHECK(ibv_wr_complete(qp) == 0);
	expect(send_cq, 7, IBV_WC_COMP_SWAP);
	CHECK(*number == 99 && *(uint64_t *)(buffer + 128) == 8);

	/* Aborted: nothing comes. Then the queue is free for the next. */
	ibv_wr_start(qp);
	qp->wr_id = 8;
	ibv_wr_rdma_write(qp, mr->rkey, base + 4096 + 300);
	ibv_wr_set_inline_data(qp, "?????", 5);
	ibv_wr_abort(qp);
	ibv_wr_start(qp);
	qp->wr_id = 9;
	ibv_wr_rdma_write(qp, mr->rkey, base + 4096 + 400);
	ibv_wr_set_inline_data(qp, "!", 1);
	CHECK(ibv_wr_complete(qp) == 0);
	expect(send_cq, 9, IBV_WC_RDMA_WRITE);
	CHECK(memcmp(buffer + 4096 + 300, "abcde", 5) == 0);
	/* More inline data than the queue pair has room for. */
	ibv_wr_start(qp);
	qp->wr_id = 10;
	ibv_wr_send(qp);
	ibv_wr_set_inline_data(qp, buffer, attr.cap.max_inline_data + 1);
	CHECK(ibv_wr_complete(qp) == EINVAL);

	CHECK(ibv_dealloc_pd(pd) == EBUSY);
	CHECK(ibv_destroy_qp(a) == 0 && ibv_destroy_qp(b) == 0);
	CHECK(ibv_dereg_mr(mr) == 0);
	CHECK(ibv_destroy_cq(ibv_cq_ex_to_cq(send_cq)) == 0);
	CHECK(ibv_destroy_cq(ibv_cq_ex_to_cq(recv_cq)) == 0);
}

int main(void)
{
	struct ibv_device **list = ibv_get_device_list(NULL);
	struct ibv_cq *cq;

	if (!list || !list[0]) {
		printf("there is no device\n");
		return 2;
	}
	context = ibv_open_device(list[0]);
	ibv_free_device_list(list);
	if (!context) {
		perror("ibv_open_device");
		return 2;
	}
	CHECK(context->async_fd >= 0 && context->num_comp_vectors >= 1);
	query();
	clocks();
	pd = ibv_alloc_pd(context);
	CHECK(pd && pd->context == context);
	regions();
	device_memory();
	windows();
	domains();
	completion_queues();
	address_handles();
	cq = ibv_create_cq(context, 64, NULL, NULL, 0);
	CHECK(cq);
	queue_pairs(cq);
	shared_receive_queues(cq);
	work_queues(cq);
	CHECK(ibv_destroy_cq(cq) == 0);
	extended_work();
	CHECK(ibv_dealloc_pd(pd) == 0);
	CHECK(ibv_close_device(context) == 0);
	return checks();
}
