/*
 * The connection manager's C API: both ends in one process, on one endpoint.
 *
 * Usage: rdma_cm ADDRESS CASE
 */
#include <arpa/inet.h>
#include <fcntl.h>
#include <infiniband/verbs.h>
#include <poll.h>
#include <pthread.h>
#include <rdma/rdma_cma.h>
#include <rdma/rdma_verbs.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"

#define REASON_NO_LISTENER 8
#define REASON_BY_CONSUMER 28

static struct sockaddr_in address;
static char buffer[8192] __attribute__((aligned(4096)));

static struct sockaddr *at(uint16_t port)
{
	static struct sockaddr_in made;
	made = address;
	made.sin_port = htons(port);
	return (struct sockaddr *)&made;
}

static int readable(struct rdma_event_channel *channel, int timeout_ms)
{
	struct pollfd fd = {.fd = channel->fd, .events = POLLIN};

	return poll(&fd, 1, timeout_ms);
}

/* The next event, which must be this one. */
static struct rdma_cm_event *expect(struct rdma_event_channel *channel,
				    enum rdma_cm_event_type type)
{
	struct rdma_cm_event *event = NULL;

	MUST(readable(channel, DEADLINE_MS) == 1);
	MUST(rdma_get_cm_event(channel, &event) == 0);
	if (event->event != type)
		printf("%s (status %d) in place of %s\n", rdma_event_str(event->event),
		       event->status, rdma_event_str(type));
	MUST(event->event == type);
	return event;
}

static void expect_and_ack(struct rdma_event_channel *channel, enum rdma_cm_event_type type,
			   struct rdma_cm_id *id)
{
	struct rdma_cm_event *event = expect(channel, type);

	CHECK(event->id == id && event->status == 0);
	CHECK(rdma_ack_cm_event(event) == 0);
}

static struct rdma_event_channel *new_channel(void)
{
	struct rdma_event_channel *channel = rdma_create_event_channel();

	MUST(channel != NULL);
	return channel;
}

static struct rdma_cm_id *new_id(struct rdma_event_channel *channel, void *context,
				 enum rdma_port_space ps)
{
	struct rdma_cm_id *id = NULL;

	MUST(rdma_create_id(channel, &id, context, ps) == 0);
	CHECK(id->channel && id->context == context && id->ps == ps);
	CHECK(!id->verbs && !id->qp && !id->pd && !id->event);
	return id;
}

static struct rdma_cm_id *new_listener(struct rdma_event_channel *channel, void *context,
				       enum rdma_port_space ps)
{
	struct rdma_cm_id *id = new_id(channel, context, ps);

	MUST(rdma_bind_addr(id, at(0)) == 0);
	MUST(rdma_listen(id, 8) == 0);
	CHECK(rdma_get_src_port(id) != 0);
	return id;
}

static void new_qp(struct rdma_cm_id *id, enum ibv_qp_type type)
{
	struct ibv_qp_init_attr init = {
		.cap = {4, 4, 1, 1, 64},
		.qp_type = type,
		.sq_sig_all = 1,
	};

	MUST(rdma_create_qp(id, NULL, &init) == 0);
	CHECK(id->qp && id->send_cq && id->recv_cq && id->send_cq_channel && id->recv_cq_channel);
	CHECK(id->qp->pd == id->pd && init.send_cq == id->send_cq && init.cap.max_send_wr >= 4);
	CHECK(id->qp->state == (type == IBV_QPT_UD ? IBV_QPS_RTS : IBV_QPS_INIT));
}

/* An id that knows the way to a listener. */
static struct rdma_cm_id *resolved(struct rdma_event_channel *channel, struct rdma_cm_id *to)
{
	struct rdma_cm_id *id = new_id(channel, NULL, to->ps);

	MUST(rdma_resolve_addr(id, NULL, at(ntohs(rdma_get_src_port(to))), 2000) == 0);
	expect_and_ack(channel, RDMA_CM_EVENT_ADDR_RESOLVED, id);
	CHECK(id->verbs && id->pd && id->port_num == 1);
	CHECK(memcmp(&id->route.addr.src_sin.sin_addr, &address.sin_addr, 4) == 0);
	CHECK(rdma_get_dst_port(id) == rdma_get_src_port(to));
	MUST(rdma_resolve_route(id, 2000) == 0);
	expect_and_ack(channel, RDMA_CM_EVENT_ROUTE_RESOLVED, id);
	CHECK(id->route.num_paths == 1 && id->route.path_rec);
	CHECK(memcmp(&id->route.path_rec->dgid, &id->route.addr.addr.ibaddr.dgid, 16) == 0);
	CHECK(memcmp(&id->route.addr.addr.ibaddr.dgid.raw[12], &address.sin_addr, 4) == 0);
	CHECK(id->route.path_rec->mtu >= IBV_MTU_1024 && id->route.path_rec->pkey == 0xffff);
	return id;
}

/* One message from one end to the other. */
static void message(struct rdma_cm_id *from, struct rdma_cm_id *to)
{
	struct ibv_mr *mr = rdma_reg_msgs(to, buffer, sizeof buffer);
	struct ibv_wc wc;

	MUST(mr != NULL);
	memset(buffer, 0, sizeof buffer);
	strcpy(buffer, "hello");
	CHECK(rdma_post_recv(to, to, buffer + 4096, 64, mr) == 0);
	CHECK(rdma_post_send(from, from, buffer, 6, NULL, IBV_SEND_INLINE) == 0);
	CHECK(rdma_get_send_comp(from, &wc) == 1 && wc.status == IBV_WC_SUCCESS);
	CHECK(rdma_get_recv_comp(to, &wc) == 1 && wc.status == IBV_WC_SUCCESS);
	CHECK(wc.wr_id == (uintptr_t)to && wc.byte_len == 6);
	CHECK(strcmp(buffer + 4096, "hello") == 0);
	CHECK(rdma_dereg_mr(mr) == 0);
}

struct pair {
	struct rdma_event_channel *near, *far;
	struct rdma_cm_id *listener, *active, *passive;
};

static const struct rdma_conn_param greeting = {
	.private_data = "knock knock",
	.private_data_len = 12,
	.responder_resources = 3,
	.initiator_depth = 5,
	.retry_count = 6,
	.rnr_retry_count = 7,
};

/* Two connected ids, each with a channel of its own. */
static struct pair connected(void)
{
	struct pair pair = {new_channel(), new_channel(), NULL, NULL, NULL};
	struct rdma_conn_param param = greeting;
	struct rdma_cm_event *event;
	struct ibv_qp_attr attr;
	struct ibv_qp_init_attr init;

	pair.listener = new_listener(pair.far, &pair, RDMA_PS_TCP);
	pair.active = resolved(pair.near, pair.listener);
	new_qp(pair.active, IBV_QPT_RC);
	MUST(rdma_connect(pair.active, &param) == 0);

	event = expect(pair.far, RDMA_CM_EVENT_CONNECT_REQUEST);
	pair.passive = event->id;
	CHECK(event->listen_id == pair.listener && event->id != pair.listener);
	CHECK(event->status == 0 && event->param.conn.private_data_len >= 12);
	CHECK(memcmp(event->param.conn.private_data, "knock knock", 12) == 0);
	/* As the passive side sees them. */
	CHECK(event->param.conn.responder_resources == 5);
	CHECK(event->param.conn.initiator_depth == 3);
	CHECK(event->param.conn.retry_count == 6 && event->param.conn.rnr_retry_count == 7);
	CHECK(event->param.conn.qp_num == pair.active->qp->qp_num && !event->param.conn.srq);
	CHECK(pair.passive->context == &pair && pair.passive->channel == pair.far);
	CHECK(pair.passive->verbs == pair.active->verbs && pair.passive->pd == pair.active->pd);
	CHECK(rdma_get_src_port(pair.passive) == rdma_get_src_port(pair.listener));
	CHECK(rdma_get_dst_port(pair.passive) == rdma_get_src_port(pair.active));
	CHECK(pair.passive->route.num_paths == 1);
	new_qp(pair.passive, IBV_QPT_RC);
	param = (struct rdma_conn_param){
		.private_data = "who is there",
		.private_data_len = 13,
		.responder_resources = RDMA_MAX_RESP_RES,
		.initiator_depth = RDMA_MAX_INIT_DEPTH,
		.rnr_retry_count = 7,
	};
	MUST(rdma_accept(pair.passive, &param) == 0);
	CHECK(rdma_ack_cm_event(event) == 0);

	event = expect(pair.near, RDMA_CM_EVENT_ESTABLISHED);
	CHECK(event->id == pair.active && event->status == 0);
	CHECK(event->param.conn.private_data_len >= 13);
	CHECK(memcmp(event->param.conn.private_data, "who is there", 13) == 0);
	CHECK(event->param.conn.qp_num == pair.passive->qp->qp_num);
	CHECK(rdma_ack_cm_event(event) == 0);
	expect_and_ack(pair.far, RDMA_CM_EVENT_ESTABLISHED, pair.passive);

	CHECK(ibv_query_qp(pair.active->qp, &attr, 0, &init) == 0);
	CHECK(attr.qp_state == IBV_QPS_RTS && attr.dest_qp_num == pair.passive->qp->qp_num);
	CHECK(attr.max_rd_atomic == 5 && attr.max_dest_rd_atomic == 3);
	CHECK(attr.qp_access_flags & IBV_ACCESS_REMOTE_READ);
	CHECK(ibv_query_qp(pair.passive->qp, &attr, 0, &init) == 0);
	CHECK(attr.qp_state == IBV_QPS_RTS && attr.dest_qp_num == pair.active->qp->qp_num);
	CHECK(attr.max_rd_atomic == 3 && attr.max_dest_rd_atomic == 5);
	return pair;
}

static void end_pair(struct pair *pair)
{
	rdma_destroy_qp(pair->active);
	CHECK(!pair->active->qp && !pair->active->send_cq && !pair->active->recv_cq);
	rdma_destroy_qp(pair->passive);
	CHECK(rdma_destroy_id(pair->active) == 0);
	CHECK(rdma_destroy_id(pair->passive) == 0);
	CHECK(rdma_destroy_id(pair->listener) == 0);
	rdma_destroy_event_channel(pair->near);
	rdma_destroy_event_channel(pair->far);
}

static void connection(void)
{
	struct pair pair = connected();
	struct ibv_qp_attr attr;
	struct ibv_qp_init_attr init;

	message(pair.active, pair.passive);
	message(pair.passive, pair.active);
	CHECK(rdma_disconnect(pair.active) == 0);
	CHECK(ibv_query_qp(pair.active->qp, &attr, 0, &init) == 0 && attr.qp_state == IBV_QPS_ERR);
	expect_and_ack(pair.far, RDMA_CM_EVENT_DISCONNECTED, pair.passive);
	CHECK(rdma_disconnect(pair.passive) == 0);
	expect_and_ack(pair.near, RDMA_CM_EVENT_DISCONNECTED, pair.active);
	expect_and_ack(pair.near, RDMA_CM_EVENT_TIMEWAIT_EXIT, pair.active);
	end_pair(&pair);
}

/* Both ends at once. */
static void both_disconnect(void)
{
	struct pair pair = connected();

	CHECK(rdma_disconnect(pair.active) == 0);
	CHECK(rdma_disconnect(pair.passive) == 0);
	expect_and_ack(pair.near, RDMA_CM_EVENT_DISCONNECTED, pair.active);
	expect_and_ack(pair.far, RDMA_CM_EVENT_DISCONNECTED, pair.passive);
	end_pair(&pair);
}

/* An end that is destroyed disconnects. */
static void destroyed_end(void)
{
	struct pair pair = connected();

	rdma_destroy_qp(pair.active);
	CHECK(rdma_destroy_id(pair.active) == 0);
	expect_and_ack(pair.far, RDMA_CM_EVENT_DISCONNECTED, pair.passive);
	rdma_destroy_qp(pair.passive);
	CHECK(rdma_destroy_id(pair.passive) == 0);
	CHECK(rdma_destroy_id(pair.listener) == 0);
	rdma_destroy_event_channel(pair.near);
	rdma_destroy_event_channel(pair.far);
}

static void rejection(void)
{
	struct rdma_event_channel *near = new_channel(), *far = new_channel();
	struct rdma_cm_id *listener = new_listener(far, NULL, RDMA_PS_TCP);
	struct rdma_cm_id *active = resolved(near, listener);
	struct rdma_conn_param param = greeting;
	struct rdma_cm_event *event;

	new_qp(active, IBV_QPT_RC);
	MUST(rdma_connect(active, &param) == 0);
	event = expect(far, RDMA_CM_EVENT_CONNECT_REQUEST);
	CHECK(rdma_reject(event->id, "go away", 8) == 0);
	/* The event is the listener's. */
	CHECK(rdma_destroy_id(event->id) == 0);
	CHECK(rdma_ack_cm_event(event) == 0);
	event = expect(near, RDMA_CM_EVENT_REJECTED);
	CHECK(event->id == active && event->status == REASON_BY_CONSUMER);
	CHECK(event->param.conn.private_data_len >= 8);
	CHECK(memcmp(event->param.conn.private_data, "go away", 8) == 0);
	CHECK(active->qp->state == IBV_QPS_ERR);
	CHECK(rdma_ack_cm_event(event) == 0);
	rdma_destroy_qp(active);
	CHECK(rdma_destroy_id(active) == 0);
	CHECK(rdma_destroy_id(listener) == 0);
	rdma_destroy_event_channel(near);
	rdma_destroy_event_channel(far);
}

static void nobody_listens(void)
{
	struct rdma_event_channel *near = new_channel();
	struct rdma_cm_id *listener = new_listener(near, NULL, RDMA_PS_TCP);
	struct rdma_cm_id *active = resolved(near, listener), *sync;
	struct rdma_conn_param param = greeting;
	struct rdma_cm_event *event;
	struct sockaddr_in port = listener->route.addr.src_sin;

	CHECK(rdma_destroy_id(listener) == 0);
	new_qp(active, IBV_QPT_RC);
	MUST(rdma_connect(active, &param) == 0);
	event = expect(near, RDMA_CM_EVENT_REJECTED);
	CHECK(event->status == REASON_NO_LISTENER);
	CHECK(rdma_ack_cm_event(event) == 0);
	rdma_destroy_qp(active);
	CHECK(rdma_destroy_id(active) == 0);
	rdma_destroy_event_channel(near);

	sync = new_id(NULL, NULL, RDMA_PS_TCP);
	MUST(rdma_resolve_addr(sync, NULL, (struct sockaddr *)&port, 2000) == 0);
	CHECK(sync->event && sync->event->event == RDMA_CM_EVENT_ADDR_RESOLVED);
	MUST(rdma_resolve_route(sync, 2000) == 0);
	new_qp(sync, IBV_QPT_RC);
	FAILS(rdma_connect(sync, &param), ECONNREFUSED);
	CHECK(sync->event && sync->event->event == RDMA_CM_EVENT_REJECTED);
	rdma_destroy_ep(sync);
}

struct server {
	struct rdma_cm_id *listener;
	struct ibv_pd *pd;
};

static void *serve(void *argument)
{
	struct server *server = argument;
	struct rdma_cm_id *id = NULL;
	struct rdma_conn_param param = {.rnr_retry_count = 7};
	struct ibv_mr *mr;
	struct ibv_wc wc;

	MUST(rdma_get_request(server->listener, &id) == 0);
	CHECK(id->event && id->event->event == RDMA_CM_EVENT_CONNECT_REQUEST);
	CHECK(id->channel != server->listener->channel);
	MUST(id->qp && id->send_cq && id->recv_cq);
	MUST((mr = rdma_reg_msgs(id, buffer, sizeof buffer)) != NULL);
	CHECK(rdma_post_recv(id, NULL, buffer + 4096, 64, mr) == 0);
	MUST(rdma_accept(id, &param) == 0);
	CHECK(id->event && id->event->event == RDMA_CM_EVENT_ESTABLISHED);
	CHECK(rdma_get_recv_comp(id, &wc) == 1 && wc.status == IBV_WC_SUCCESS);
	CHECK(strcmp(buffer + 4096, "hello") == 0);
	CHECK(rdma_dereg_mr(mr) == 0);
	CHECK(rdma_disconnect(id) == 0);
	rdma_destroy_ep(id);
	return NULL;
}

/* Calls that wait for their events, and endpoints. */
static void synchronous(void)
{
	struct rdma_addrinfo hints = {.ai_port_space = RDMA_PS_TCP, .ai_flags = RAI_PASSIVE};
	struct ibv_qp_init_attr init = {.cap = {4, 4, 1, 1, 64}, .sq_sig_all = 1};
	struct rdma_addrinfo *info = NULL;
	struct server server = {0};
	struct rdma_cm_id *active = NULL;
	char port[8], host[INET_ADDRSTRLEN];
	struct ibv_wc wc;
	pthread_t thread;

	inet_ntop(AF_INET, &address.sin_addr, host, sizeof host);
	MUST(rdma_getaddrinfo(host, "0", &hints, &info) == 0);
	CHECK(info->ai_flags == RAI_PASSIVE && info->ai_src_len == sizeof address);
	CHECK(info->ai_qp_type == IBV_QPT_RC && info->ai_port_space == RDMA_PS_TCP);
	CHECK(!info->ai_dst_addr && !info->ai_next);
	MUST(rdma_create_ep(&server.listener, info, NULL, &init) == 0);
	rdma_freeaddrinfo(info);
	MUST(rdma_listen(server.listener, 0) == 0);
	MUST(pthread_create(&thread, NULL, serve, &server) == 0);

	hints.ai_flags = RAI_NUMERICHOST;
	snprintf(port, sizeof port, "%d", ntohs(rdma_get_src_port(server.listener)));
	MUST(rdma_getaddrinfo(host, port, &hints, &info) == 0);
	CHECK(info->ai_dst_len == sizeof address && !info->ai_src_addr);
	MUST(rdma_create_ep(&active, info, NULL, &init) == 0);
	rdma_freeaddrinfo(info);
	CHECK(active->qp && active->event);
	MUST(rdma_connect(active, NULL) == 0);
	CHECK(active->event->event == RDMA_CM_EVENT_ESTABLISHED);
	strcpy(buffer, "hello");
	CHECK(rdma_post_send(active, NULL, buffer, 6, NULL, IBV_SEND_INLINE) == 0);
	CHECK(rdma_get_send_comp(active, &wc) == 1 && wc.status == IBV_WC_SUCCESS);
	CHECK(rdma_disconnect(active) == 0);
	MUST(pthread_join(thread, NULL) == 0);
	rdma_destroy_ep(active);
	rdma_destroy_ep(server.listener);
}

static void names(void)
{
	struct rdma_addrinfo hints = {.ai_qp_type = IBV_QPT_UD, .ai_port_space = RDMA_PS_TCP};
	struct rdma_addrinfo *info = NULL;

	FAILS(rdma_getaddrinfo(NULL, NULL, NULL, &info), EINVAL);
	CHECK(rdma_getaddrinfo("10.1.2.3", "7", &hints, &info) > 0 ||
	      rdma_getaddrinfo("10.1.2.3", "7", &hints, &info) < -1);
	hints.ai_port_space = 0;
	MUST(rdma_getaddrinfo("10.1.2.3", "7", &hints, &info) == 0);
	CHECK(info->ai_qp_type == IBV_QPT_UD && info->ai_port_space == RDMA_PS_UDP);
	CHECK(((struct sockaddr_in *)info->ai_dst_addr)->sin_port == htons(7));
	rdma_freeaddrinfo(info);
	hints = (struct rdma_addrinfo){.ai_flags = RAI_NUMERICHOST};
	CHECK(rdma_getaddrinfo("no.number", "7", &hints, &info) != 0);
	hints = (struct rdma_addrinfo){
		.ai_src_addr = at(1),
		.ai_src_len = sizeof address,
		.ai_port_space = RDMA_PS_UDP,
	};
	MUST(rdma_getaddrinfo(NULL, NULL, &hints, &info) == 0);
	CHECK(info->ai_src_len == sizeof address && info->ai_src_addr != hints.ai_src_addr);
	CHECK(memcmp(info->ai_src_addr, hints.ai_src_addr, sizeof address) == 0);
	rdma_freeaddrinfo(info);
	rdma_freeaddrinfo(NULL);
}

static void errors(void)
{
	struct rdma_event_channel *channel = new_channel();
	struct rdma_cm_id *id = new_id(channel, NULL, RDMA_PS_TCP), *other = NULL;
	struct ibv_qp_init_attr init = {.cap = {1, 1, 1, 1, 0}, .qp_type = IBV_QPT_RC};
	struct rdma_conn_param param = greeting;
	struct sockaddr_in foreign = {.sin_family = AF_INET};
	struct rdma_cm_event *event;
	uint8_t tos = 8;
	int yes = 1;

	FAILS(rdma_create_id(channel, &other, NULL, 0x777), EINVAL);
	FAILS(rdma_create_qp(id, NULL, &init), EINVAL);
	FAILS(rdma_disconnect(id), EINVAL);
	FAILS(rdma_resolve_route(id, 1000), EINVAL);
	FAILS(rdma_get_request(id, &other), EINVAL);
	inet_pton(AF_INET, "192.0.2.77", &foreign.sin_addr);
	FAILS(rdma_bind_addr(id, (struct sockaddr *)&foreign), ENODEV);
	foreign.sin_family = AF_UNIX;
	FAILS(rdma_bind_addr(id, (struct sockaddr *)&foreign), EINVAL);
	FAILS(rdma_bind_addr(id, NULL), EINVAL);
	FAILS(rdma_resolve_addr(id, NULL, NULL, 1000), EINVAL);

	CHECK(rdma_set_option(id, RDMA_OPTION_ID, RDMA_OPTION_ID_TOS, &tos, 1) == 0);
	FAILS(rdma_set_option(id, RDMA_OPTION_ID, RDMA_OPTION_ID_TOS, &yes, 4), EINVAL);
	FAILS(rdma_set_option(id, RDMA_OPTION_ID, 99, &yes, 4), ENOSYS);
	FAILS(rdma_set_option(id, 99, 0, &yes, 4), ENOSYS);
	CHECK(rdma_set_option(id, RDMA_OPTION_ID, RDMA_OPTION_ID_ACK_TIMEOUT, &tos, 1) == 0);
	CHECK(rdma_set_option(id, RDMA_OPTION_ID, RDMA_OPTION_ID_REUSEADDR, &yes, 4) == 0);
	yes = 0;
	CHECK(rdma_set_option(id, RDMA_OPTION_ID, RDMA_OPTION_ID_REUSEADDR, &yes, 4) == 0);

	MUST(rdma_bind_addr(id, at(0)) == 0);
	CHECK(id->verbs && id->pd && id->port_num == 1 && rdma_get_src_port(id));
	FAILS(rdma_bind_addr(id, at(0)), EINVAL);
	other = new_id(channel, NULL, RDMA_PS_TCP);
	FAILS(rdma_bind_addr(other, at(ntohs(rdma_get_src_port(id)))), EADDRINUSE);
	CHECK(rdma_destroy_id(other) == 0);
	/* Another port space has ports of its own. */
	other = new_id(channel, NULL, RDMA_PS_UDP);
	CHECK(rdma_bind_addr(other, at(ntohs(rdma_get_src_port(id)))) == 0);
	CHECK(rdma_destroy_id(other) == 0);
	FAILS(rdma_connect(id, NULL), EINVAL);
	FAILS(rdma_connect(id, &param), EINVAL);
	param.initiator_depth = 200;
	FAILS(rdma_connect(id, &param), EINVAL);
	FAILS(rdma_accept(id, NULL), EINVAL);
	MUST(rdma_create_qp(id, NULL, &init) == 0);
	FAILS(rdma_create_qp(id, NULL, &init), EINVAL);
	FAILS(rdma_establish(id), EINVAL);
	rdma_destroy_qp(id);
	CHECK(rdma_destroy_id(id) == 0);

	/* Nobody has this address, and no device is on the way to it. */
	id = new_id(channel, NULL, RDMA_PS_TCP);
	foreign.sin_family = AF_INET;
	foreign.sin_port = htons(5);
	inet_pton(AF_INET, "192.0.2.77", &foreign.sin_addr);
	if (rdma_resolve_addr(id, NULL, (struct sockaddr *)&foreign, 1000) == 0) {
		event = expect(channel, RDMA_CM_EVENT_ADDR_ERROR);
		CHECK(event->status < 0);
		CHECK(rdma_ack_cm_event(event) == 0);
	} else {
		CHECK(errno == EHOSTUNREACH);
	}
	CHECK(rdma_destroy_id(id) == 0);

	/* Loopback is any address to who listens, and to who connects this endpoint's own. */
	id = new_id(channel, NULL, RDMA_PS_TCP);
	foreign.sin_port = 0;
	inet_pton(AF_INET, "127.0.0.1", &foreign.sin_addr);
	MUST(rdma_bind_addr(id, (struct sockaddr *)&foreign) == 0);
	CHECK(!id->verbs && rdma_get_src_port(id));
	MUST(rdma_listen(id, 1) == 0);
	other = new_id(channel, NULL, RDMA_PS_TCP);
	foreign.sin_port = rdma_get_src_port(id);
	MUST(rdma_resolve_addr(other, NULL, (struct sockaddr *)&foreign, 1000) == 0);
	CHECK(rdma_ack_cm_event(expect(channel, RDMA_CM_EVENT_ADDR_RESOLVED)) == 0);
	CHECK(other->verbs && other->pd);
	CHECK(rdma_destroy_id(other) == 0 && rdma_destroy_id(id) == 0);
	rdma_destroy_event_channel(channel);
	FAILS(rdma_ack_cm_event(NULL), EINVAL);
	FAILS(rdma_get_cm_event(NULL, &event), EINVAL);
}

static void devices(void)
{
	struct rdma_event_channel *channel = new_channel();
	struct rdma_cm_id *bound = new_id(channel, NULL, RDMA_PS_TCP);
	struct rdma_cm_id *wild = new_id(channel, NULL, RDMA_PS_TCP);
	struct sockaddr_in any = {.sin_family = AF_INET};
	struct ibv_context **list;
	int n = -1;

	list = rdma_get_devices(&n);
	MUST(list && n == 1 && list[0] && !list[1]);
	CHECK(strcmp(ibv_get_device_name(list[0]->device), "freeflow0") == 0);
	MUST(rdma_bind_addr(bound, at(0)) == 0);
	CHECK(bound->verbs == list[0]);
	MUST(rdma_bind_addr(wild, (struct sockaddr *)&any) == 0);
	CHECK(!wild->verbs && !wild->port_num);
	CHECK(rdma_listen(wild, 1) == 0 && rdma_get_src_port(wild));
	rdma_free_devices(list);
	CHECK(rdma_destroy_id(bound) == 0);
	CHECK(rdma_destroy_id(wild) == 0);
	rdma_destroy_event_channel(channel);
}

static void nonblocking(void)
{
	struct rdma_event_channel *channel = new_channel();
	struct rdma_cm_id *listener = new_listener(channel, NULL, RDMA_PS_TCP);
	struct rdma_cm_id *id = new_id(channel, NULL, RDMA_PS_TCP);
	struct rdma_cm_event *event;

	CHECK(readable(channel, 0) == 0);
	CHECK(fcntl(channel->fd, F_SETFL, fcntl(channel->fd, F_GETFL) | O_NONBLOCK) == 0);
	FAILS(rdma_get_cm_event(channel, &event), EAGAIN);
	MUST(rdma_resolve_addr(id, NULL, at(ntohs(rdma_get_src_port(listener))), 2000) == 0);
	expect_and_ack(channel, RDMA_CM_EVENT_ADDR_RESOLVED, id);
	CHECK(readable(channel, 0) == 0);
	FAILS(rdma_get_cm_event(channel, &event), EAGAIN);
	/* What waits goes with its id. */
	MUST(rdma_resolve_route(id, 2000) == 0);
	MUST(readable(channel, DEADLINE_MS) == 1);
	CHECK(rdma_destroy_id(id) == 0);
	CHECK(readable(channel, 0) == 0);
	FAILS(rdma_get_cm_event(channel, &event), EAGAIN);
	CHECK(rdma_destroy_id(listener) == 0);
	rdma_destroy_event_channel(channel);
}

static void migration(void)
{
	struct rdma_event_channel *first = new_channel(), *second = new_channel();
	struct rdma_cm_id *listener = new_listener(first, NULL, RDMA_PS_TCP);
	struct rdma_cm_id *id = new_id(first, NULL, RDMA_PS_TCP);
	struct rdma_cm_id *stays = new_id(first, NULL, RDMA_PS_TCP);

	MUST(rdma_resolve_addr(id, NULL, at(ntohs(rdma_get_src_port(listener))), 2000) == 0);
	MUST(readable(first, DEADLINE_MS) == 1);
	CHECK(rdma_migrate_id(id, second) == 0);
	CHECK(id->channel == second && readable(first, 0) == 0);
	expect_and_ack(second, RDMA_CM_EVENT_ADDR_RESOLVED, id);
	MUST(rdma_resolve_addr(stays, NULL, at(ntohs(rdma_get_src_port(listener))), 2000) == 0);
	expect_and_ack(first, RDMA_CM_EVENT_ADDR_RESOLVED, stays);

	/* Into synchronous operation and back. */
	CHECK(rdma_migrate_id(id, NULL) == 0);
	CHECK(id->channel != second && id->channel != first);
	FAILS(rdma_migrate_id(id, NULL), EINVAL);
	CHECK(rdma_resolve_route(id, 2000) == 0);
	CHECK(id->event && id->event->event == RDMA_CM_EVENT_ROUTE_RESOLVED);
	CHECK(rdma_migrate_id(id, first) == 0);
	CHECK(!id->event && id->channel == first);
	CHECK(rdma_destroy_id(id) == 0);
	CHECK(rdma_destroy_id(stays) == 0);
	CHECK(rdma_destroy_id(listener) == 0);
	rdma_destroy_event_channel(first);
	rdma_destroy_event_channel(second);
}

static void *acknowledge(void *event)
{
	/* Long enough for the other thread to be in its call, if it does not wait; nothing depends on
	 * it otherwise. */
	usleep(100000);
	*(volatile char *)buffer = 1;
	CHECK(rdma_ack_cm_event(event) == 0);
	return NULL;
}

/* To destroy an id waits for acknowledgements. */
static void acknowledgements(void)
{
	struct rdma_event_channel *channel = new_channel();
	struct rdma_cm_id *listener = new_listener(channel, NULL, RDMA_PS_TCP);
	struct rdma_cm_id *id = new_id(channel, NULL, RDMA_PS_TCP);
	struct rdma_cm_event *event;
	pthread_t thread;

	MUST(rdma_resolve_addr(id, NULL, at(ntohs(rdma_get_src_port(listener))), 2000) == 0);
	event = expect(channel, RDMA_CM_EVENT_ADDR_RESOLVED);
	buffer[0] = 0;
	MUST(pthread_create(&thread, NULL, acknowledge, event) == 0);
	CHECK(rdma_destroy_id(id) == 0);
	CHECK(buffer[0] == 1);
	MUST(pthread_join(thread, NULL) == 0);
	CHECK(rdma_destroy_id(listener) == 0);
	rdma_destroy_event_channel(channel);
}

/* Queue pairs that the program makes and moves itself. */
static void own_queue_pairs(void)
{
	struct rdma_event_channel *near = new_channel(), *far = new_channel();
	struct rdma_cm_id *listener = new_listener(far, NULL, RDMA_PS_TCP);
	struct rdma_cm_id *active = resolved(near, listener), *passive;
	struct ibv_cq *cq = ibv_create_cq(active->verbs, 16, NULL, NULL, 0);
	struct ibv_qp_init_attr init = {
		.send_cq = cq,
		.recv_cq = cq,
		.cap = {4, 4, 1, 1, 64},
		.qp_type = IBV_QPT_RC,
	};
	struct ibv_qp *qps[2] = {ibv_create_qp(active->pd, &init),
				 ibv_create_qp(active->pd, &init)};
	struct ibv_ece ours = {.vendor_id = 0x1234, .options = 0x5678}, theirs;
	struct rdma_conn_param param = greeting;
	struct rdma_cm_event *event;
	struct ibv_qp_attr attr = {.qp_state = IBV_QPS_INIT};
	int mask = 0;

	MUST(cq && qps[0] && qps[1]);
	param.qp_num = qps[0]->qp_num;
	CHECK(rdma_init_qp_attr(active, &attr, &mask) == 0);
	CHECK(attr.qp_state == IBV_QPS_INIT && mask == (IBV_QP_STATE | IBV_QP_PKEY_INDEX |
						       IBV_QP_PORT | IBV_QP_ACCESS_FLAGS));
	CHECK(attr.port_num == 1 && ibv_modify_qp(qps[0], &attr, mask) == 0);
	CHECK(rdma_set_local_ece(active, &ours) == 0);
	MUST(rdma_connect(active, &param) == 0);
	event = expect(far, RDMA_CM_EVENT_CONNECT_REQUEST);
	passive = event->id;
	CHECK(event->param.conn.qp_num == qps[0]->qp_num);
	CHECK(rdma_get_remote_ece(passive, &theirs) == 0);
	CHECK(theirs.vendor_id == 0x1234 && theirs.options == 0x5678);
	CHECK(rdma_ack_cm_event(event) == 0);
	for (int state = IBV_QPS_INIT; state <= IBV_QPS_RTS; state++) {
		attr.qp_state = state;
		CHECK(rdma_init_qp_attr(passive, &attr, &mask) == 0);
		CHECK(ibv_modify_qp(qps[1], &attr, mask) == 0);
	}
	param.qp_num = qps[1]->qp_num;
	MUST(rdma_accept(passive, &param) == 0);
	event = expect(near, RDMA_CM_EVENT_CONNECT_RESPONSE);
	CHECK(event->param.conn.qp_num == qps[1]->qp_num && event->status == 0);
	CHECK(rdma_ack_cm_event(event) == 0);
	for (int state = IBV_QPS_RTR; state <= IBV_QPS_RTS; state++) {
		attr.qp_state = state;
		CHECK(rdma_init_qp_attr(active, &attr, &mask) == 0);
		CHECK(ibv_modify_qp(qps[0], &attr, mask) == 0);
	}
	CHECK(rdma_establish(active) == 0);
	expect_and_ack(far, RDMA_CM_EVENT_ESTABLISHED, passive);
	CHECK(rdma_disconnect(passive) == 0);
	expect_and_ack(near, RDMA_CM_EVENT_DISCONNECTED, active);
	CHECK(ibv_destroy_qp(qps[0]) == 0 && ibv_destroy_qp(qps[1]) == 0);
	CHECK(ibv_destroy_cq(cq) == 0);
	CHECK(rdma_destroy_id(active) == 0 && rdma_destroy_id(passive) == 0);
	CHECK(rdma_destroy_id(listener) == 0);
	rdma_destroy_event_channel(near);
	rdma_destroy_event_channel(far);
}

static struct ibv_ah *reach(struct rdma_cm_id *id, struct rdma_ud_param *where)
{
	struct ibv_ah *ah = ibv_create_ah(id->pd, &where->ah_attr);

	MUST(ah != NULL);
	return ah;
}

static void datagrams(void)
{
	struct rdma_event_channel *near = new_channel(), *far = new_channel();
	struct rdma_cm_id *listener = new_listener(far, NULL, RDMA_PS_UDP);
	struct rdma_cm_id *active = resolved(near, listener), *passive;
	struct rdma_conn_param param = greeting;
	struct rdma_cm_event *event;
	struct ibv_ah *ah;
	struct ibv_mr *mr;
	struct ibv_wc wc;

	CHECK(active->qp_type == IBV_QPT_UD);
	new_qp(active, IBV_QPT_UD);
	MUST(rdma_connect(active, &param) == 0);
	event = expect(far, RDMA_CM_EVENT_CONNECT_REQUEST);
	passive = event->id;
	CHECK(event->listen_id == listener && event->param.ud.private_data_len >= 12);
	CHECK(memcmp(event->param.ud.private_data, "knock knock", 12) == 0);
	CHECK(rdma_ack_cm_event(event) == 0);
	new_qp(passive, IBV_QPT_UD);
	MUST((mr = rdma_reg_msgs(passive, buffer, sizeof buffer)) != NULL);
	CHECK(rdma_post_recv(passive, NULL, buffer + 4096, 256, mr) == 0);
	MUST(rdma_accept(passive, &param) == 0);
	event = expect(near, RDMA_CM_EVENT_ESTABLISHED);
	CHECK(event->param.ud.qp_num == passive->qp->qp_num);
	CHECK(event->param.ud.qkey == RDMA_UDP_QKEY && event->param.ud.ah_attr.is_global);
	ah = reach(active, &event->param.ud);
	strcpy(buffer, "hello");
	CHECK(rdma_post_ud_send(active, NULL, buffer, 6, NULL, IBV_SEND_INLINE, ah,
				event->param.ud.qp_num) == 0);
	CHECK(rdma_ack_cm_event(event) == 0);
	CHECK(rdma_get_send_comp(active, &wc) == 1 && wc.status == IBV_WC_SUCCESS);
	CHECK(rdma_get_recv_comp(passive, &wc) == 1 && wc.status == IBV_WC_SUCCESS);
	CHECK(wc.byte_len == 46 && strcmp(buffer + 4096 + 40, "hello") == 0);
	CHECK(rdma_dereg_mr(mr) == 0 && ibv_destroy_ah(ah) == 0);
	rdma_destroy_qp(active);
	rdma_destroy_qp(passive);
	CHECK(rdma_destroy_id(active) == 0 && rdma_destroy_id(passive) == 0);
	CHECK(rdma_destroy_id(listener) == 0);
	rdma_destroy_event_channel(near);
	rdma_destroy_event_channel(far);
}

static void multicast(void)
{
	struct rdma_event_channel *channel = new_channel();
	struct rdma_cm_id *ids[2];
	struct sockaddr_in group = {.sin_family = AF_INET};
	struct rdma_cm_join_mc_attr_ex send_only = {
		.comp_mask = RDMA_CM_JOIN_MC_ATTR_ADDRESS | RDMA_CM_JOIN_MC_ATTR_JOIN_FLAGS,
		.join_flags = RDMA_MC_JOIN_FLAG_SENDONLY_FULLMEMBER,
		.addr = (struct sockaddr *)&group,
	};
	struct rdma_cm_event *event;
	struct ibv_ah *ah = NULL;
	uint32_t qpn = 0;
	struct ibv_mr *mr;
	struct ibv_wc wc;

	inet_pton(AF_INET, "239.1.2.3", &group.sin_addr);
	for (int i = 0; i < 2; i++) {
		ids[i] = new_id(channel, NULL, RDMA_PS_UDP);
		MUST(rdma_bind_addr(ids[i], at(0)) == 0);
		new_qp(ids[i], IBV_QPT_UD);
		if (i == 0)
			MUST(rdma_join_multicast(ids[i], (struct sockaddr *)&group, &ids[i]) == 0);
		else
			MUST(rdma_join_multicast_ex(ids[i], &send_only, &ids[i]) == 0);
		event = expect(channel, RDMA_CM_EVENT_MULTICAST_JOIN);
		CHECK(event->id == ids[i] && event->status == 0);
		CHECK(event->param.ud.private_data == &ids[i]);
		CHECK(event->param.ud.qp_num == 0xffffff);
		qpn = event->param.ud.qp_num;
		if (i == 1)
			ah = reach(ids[1], &event->param.ud);
		CHECK(rdma_ack_cm_event(event) == 0);
	}
	MUST((mr = rdma_reg_msgs(ids[0], buffer, sizeof buffer)) != NULL);
	CHECK(rdma_post_recv(ids[0], NULL, buffer + 4096, 256, mr) == 0);
	strcpy(buffer, "hello");
	CHECK(rdma_post_ud_send(ids[1], NULL, buffer, 6, NULL, IBV_SEND_INLINE, ah, qpn) == 0);
	CHECK(rdma_get_send_comp(ids[1], &wc) == 1 && wc.status == IBV_WC_SUCCESS);
	CHECK(rdma_get_recv_comp(ids[0], &wc) == 1 && wc.status == IBV_WC_SUCCESS);
	CHECK(strcmp(buffer + 4096 + 40, "hello") == 0);
	/* Who only sends gets nothing, not its own either. */
	CHECK(ibv_poll_cq(ids[1]->recv_cq, 1, &wc) == 0);
	CHECK(rdma_dereg_mr(mr) == 0 && ibv_destroy_ah(ah) == 0);
	CHECK(rdma_leave_multicast(ids[0], (struct sockaddr *)&group) == 0);
	FAILS(rdma_leave_multicast(ids[0], (struct sockaddr *)&group), EADDRNOTAVAIL);
	send_only.comp_mask = RDMA_CM_JOIN_MC_ATTR_ADDRESS;
	FAILS(rdma_join_multicast_ex(ids[0], &send_only, NULL), EINVAL);
	for (int i = 0; i < 2; i++) {
		rdma_destroy_qp(ids[i]);
		CHECK(rdma_destroy_id(ids[i]) == 0);
	}
	rdma_destroy_event_channel(channel);
}

/* Receive queues that connections share. */
static void shared_receives(void)
{
	struct rdma_event_channel *channel = new_channel();
	struct rdma_cm_id *listener = new_listener(channel, NULL, RDMA_PS_TCP);
	struct ibv_srq_init_attr init = {.attr = {.max_wr = 8, .max_sge = 1}};

	CHECK(rdma_create_srq(listener, NULL, &init) == 0);
	CHECK(listener->srq && init.attr.max_wr >= 8);
	FAILS(rdma_create_srq(listener, NULL, &init), EINVAL);
	rdma_destroy_srq(listener);
	CHECK(!listener->srq);
	CHECK(rdma_destroy_id(listener) == 0);
	rdma_destroy_event_channel(channel);
}

/* A child has nothing of its parent's ids, but can have its own. */
static void forks(void)
{
	struct pair pair = connected();
	struct rdma_cm_event *event;
	pid_t child = fork();
	int status;

	MUST(child >= 0);
	if (child == 0) {
		struct rdma_conn_param param = greeting;
		struct rdma_event_channel *channel;

		alarm(DEADLINE_MS / 1000);
		FAILS(rdma_disconnect(pair.active), EINVAL);
		FAILS(rdma_resolve_route(pair.active, 1000), EINVAL);
		FAILS(rdma_connect(pair.active, &param), EINVAL);
		FAILS(rdma_get_cm_event(pair.near, &event), EINVAL);
		FAILS(rdma_destroy_id(pair.active), EINVAL);
		channel = new_channel();
		CHECK(rdma_destroy_id(new_listener(channel, NULL, RDMA_PS_TCP)) == 0);
		rdma_destroy_event_channel(channel);
		fflush(stdout);
		_exit(checks_failed != 0);
	}
	CHECK(waitpid(child, &status, 0) == child && status == 0);
	message(pair.active, pair.passive);
	CHECK(rdma_disconnect(pair.active) == 0);
	expect_and_ack(pair.far, RDMA_CM_EVENT_DISCONNECTED, pair.passive);
	end_pair(&pair);
}

/* Waits for events while the router dies: whoever runs this kills it. */
static void router_dies(void)
{
	struct pair pair = connected();
	struct rdma_cm_event *event;
	int removed = 0;

	printf("ready\n");
	fflush(stdout);
	while (rdma_get_cm_event(pair.near, &event) == 0) {
		MUST(event->event == RDMA_CM_EVENT_DEVICE_REMOVAL && event->id == pair.active);
		CHECK(rdma_ack_cm_event(event) == 0);
		MUST(++removed == 1);
	}
	CHECK(errno == EIO && removed == 1);
	FAILS(rdma_connect(pair.active, NULL), EIO);
	end_pair(&pair);
}

int main(int argc, char **argv)
{
	static const struct {
		const char *name;
		void (*run)(void);
	} cases[] = {
		{"connection", connection},
		{"both_disconnect", both_disconnect},
		{"destroyed_end", destroyed_end},
		{"rejection", rejection},
		{"nobody_listens", nobody_listens},
		{"synchronous", synchronous},
		{"names", names},
		{"errors", errors},
		{"devices", devices},
		{"nonblocking", nonblocking},
		{"migration", migration},
		{"acknowledgements", acknowledgements},
		{"own_queue_pairs", own_queue_pairs},
		{"datagrams", datagrams},
		{"multicast", multicast},
		{"shared_receives", shared_receives},
		{"forks", forks},
		{"router_dies", router_dies},
	};

	if (argc != 3 || inet_pton(AF_INET, argv[1], &address.sin_addr) != 1)
		return 2;
	address.sin_family = AF_INET;
	for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
		if (strcmp(cases[i].name, argv[2]) == 0) {
			cases[i].run();
			return checks();
		}
	}
	return 2;
}
