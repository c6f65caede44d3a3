/*
 * Prints what the functions answer that need no device, for every input in range: two libraries
 * that are alike print the same.
 *
 * Usage: words DIRECTORY   (to write small files to)
 */
#include <errno.h>
#include <fcntl.h>
#include <infiniband/sa.h>
#include <infiniband/verbs.h>
#include <rdma/ib_user_sa.h>
#include <rdma/ib_user_verbs.h>
#include <rdma/rdma_cma.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

/* Exported, but declared by no installed header. */
const char *ibv_get_sysfs_path(void);
int ibv_read_sysfs_file(const char *dir, const char *file, char *buf, size_t size);
void ibv_copy_ah_attr_from_kern(struct ibv_ah_attr *dst, struct ib_uverbs_ah_attr *src);
void ibv_copy_qp_attr_from_kern(struct ibv_qp_attr *dst, struct ib_uverbs_qp_attr *src);
void ibv_copy_path_rec_from_kern(struct ibv_sa_path_rec *dst, struct ib_user_path_rec *src);
void ibv_copy_path_rec_to_kern(struct ib_user_path_rec *dst, struct ibv_sa_path_rec *src);

static void words(void)
{
	for (int i = -2; i < 64; i++) {
		printf("wc_status %d: %s\n", i, ibv_wc_status_str(i));
		printf("event_type %d: %s\n", i, ibv_event_type_str(i));
		printf("node_type %d: %s\n", i, ibv_node_type_str(i));
		printf("port_state %d: %s\n", i, ibv_port_state_str(i));
		printf("cm_event %d: %s\n", i, rdma_event_str(i));
	}
}

static void rates(void)
{
	for (int i = -300; i < 300; i++)
		printf("rate %d: mult %d mbps %d\n", i, ibv_rate_to_mult(i), ibv_rate_to_mbps(i));
	for (int i = -10; i < 2000; i++)
		printf("mult %d: rate %d\n", i, mult_to_ibv_rate(i));
	for (int i = -10; i < 3000000; i++)
		if (mbps_to_ibv_rate(i) != IBV_RATE_MAX)
			printf("mbps %d: rate %d\n", i, mbps_to_ibv_rate(i));
}

static void file(const char *dir, const char *text, size_t size)
{
	char buf[64], path[4096];
	int fd, n;

	snprintf(path, sizeof path, "%s/attribute", dir);
	fd = open(path, O_CREAT | O_TRUNC | O_WRONLY, 0600);
	if (fd < 0 || write(fd, text, strlen(text)) != (ssize_t)strlen(text) || close(fd)) {
		perror(path);
		_exit(2);
	}
	memset(buf, 'x', sizeof buf);
	n = ibv_read_sysfs_file(dir, "attribute", buf, size);
	printf("file %zu of %zu: %d", size, strlen(text), n);
	/* rdma-core does not end an empty text. */
	for (int i = 0; n > 0 && i <= n && i < (int)size; i++)
		printf(" %02x", buf[i]);
	printf("\n");
}

static void files(const char *dir)
{
	char buf[8];

	printf("sysfs %s\n", ibv_get_sysfs_path());
	file(dir, "1: CA\n", 64);
	file(dir, "1: CA", 64);
	file(dir, "", 64);
	file(dir, "\n", 64);
	file(dir, "two\nlines\n", 64);
	file(dir, "12345678\n", 10);
	file(dir, "12345678\n", 9);
	file(dir, "12345678\n", 8);
	file(dir, "12345678", 8);
	file(dir, "12345678", 9);
	errno = 0;
	printf("no file: %d\n", ibv_read_sysfs_file(dir, "absent", buf, sizeof buf));
}

static void fill(void *to, size_t size, unsigned seed)
{
	for (size_t i = 0; i < size; i++)
		((unsigned char *)to)[i] = (unsigned char)(i * 7 + seed);
}

#define SHOW(of, field)                                                                    \
	do {                                                                               \
		printf("%s:", #field);                                                     \
		for (size_t i = 0; i < sizeof((of)->field); i++)                           \
			printf(" %02x", ((const unsigned char *)&(of)->field)[i]);         \
		printf("\n");                                                              \
	} while (0)

static void show_ah(const struct ibv_ah_attr *ah)
{
	SHOW(ah, grh.dgid);
	SHOW(ah, grh.flow_label);
	SHOW(ah, grh.sgid_index);
	SHOW(ah, grh.hop_limit);
	SHOW(ah, grh.traffic_class);
	SHOW(ah, dlid);
	SHOW(ah, sl);
	SHOW(ah, src_path_bits);
	SHOW(ah, static_rate);
	SHOW(ah, is_global);
	SHOW(ah, port_num);
}

static void copies(void)
{
	struct ib_uverbs_ah_attr kernel_ah;
	struct ibv_ah_attr ah;
	struct ib_uverbs_qp_attr kernel_qp;
	struct ibv_qp_attr qp;
	struct ib_user_path_rec kernel_path;
	struct ibv_sa_path_rec path;

	fill(&kernel_ah, sizeof kernel_ah, 3);
	memset(&ah, 0xaa, sizeof ah);
	ibv_copy_ah_attr_from_kern(&ah, &kernel_ah);
	show_ah(&ah);

	fill(&kernel_qp, sizeof kernel_qp, 5);
	memset(&qp, 0xaa, sizeof qp);
	ibv_copy_qp_attr_from_kern(&qp, &kernel_qp);
	SHOW(&qp, qp_state);
	SHOW(&qp, cur_qp_state);
	SHOW(&qp, path_mtu);
	SHOW(&qp, path_mig_state);
	SHOW(&qp, qkey);
	SHOW(&qp, rq_psn);
	SHOW(&qp, sq_psn);
	SHOW(&qp, dest_qp_num);
	SHOW(&qp, qp_access_flags);
	SHOW(&qp, cap);
	show_ah(&qp.ah_attr);
	show_ah(&qp.alt_ah_attr);
	SHOW(&qp, pkey_index);
	SHOW(&qp, alt_pkey_index);
	SHOW(&qp, en_sqd_async_notify);
	SHOW(&qp, sq_draining);
	SHOW(&qp, max_rd_atomic);
	SHOW(&qp, max_dest_rd_atomic);
	SHOW(&qp, min_rnr_timer);
	SHOW(&qp, port_num);
	SHOW(&qp, timeout);
	SHOW(&qp, retry_cnt);
	SHOW(&qp, rnr_retry);
	SHOW(&qp, alt_port_num);
	SHOW(&qp, alt_timeout);
	SHOW(&qp, rate_limit);

	fill(&kernel_path, sizeof kernel_path, 9);
	memset(&path, 0xaa, sizeof path);
	ibv_copy_path_rec_from_kern(&path, &kernel_path);
	SHOW(&path, dgid);
	SHOW(&path, sgid);
	SHOW(&path, dlid);
	SHOW(&path, slid);
	SHOW(&path, raw_traffic);
	SHOW(&path, flow_label);
	SHOW(&path, hop_limit);
	SHOW(&path, traffic_class);
	SHOW(&path, reversible);
	SHOW(&path, numb_path);
	SHOW(&path, pkey);
	SHOW(&path, sl);
	SHOW(&path, mtu_selector);
	SHOW(&path, mtu);
	SHOW(&path, rate_selector);
	SHOW(&path, rate);
	SHOW(&path, packet_life_time_selector);
	SHOW(&path, packet_life_time);
	SHOW(&path, preference);

	fill(&path, sizeof path, 11);
	memset(&kernel_path, 0xaa, sizeof kernel_path);
	ibv_copy_path_rec_to_kern(&kernel_path, &path);
	SHOW(&kernel_path, dgid);
	SHOW(&kernel_path, sgid);
	SHOW(&kernel_path, dlid);
	SHOW(&kernel_path, slid);
	SHOW(&kernel_path, raw_traffic);
	SHOW(&kernel_path, flow_label);
	SHOW(&kernel_path, reversible);
	SHOW(&kernel_path, mtu);
	SHOW(&kernel_path, pkey);
	SHOW(&kernel_path, hop_limit);
	SHOW(&kernel_path, traffic_class);
	SHOW(&kernel_path, numb_path);
	SHOW(&kernel_path, sl);
	SHOW(&kernel_path, mtu_selector);
	SHOW(&kernel_path, rate_selector);
	SHOW(&kernel_path, rate);
	SHOW(&kernel_path, packet_life_time_selector);
	SHOW(&kernel_path, packet_life_time);
	SHOW(&kernel_path, preference);
}

int main(int argc, char **argv)
{
	if (argc != 2)
		return 2;
	words();
	rates();
	files(argv[1]);
	copies();
	return 0;
}
