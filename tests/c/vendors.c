/* Vendors' libraries, asked about a device that is not theirs. */
#include <infiniband/efadv.h>
#include <infiniband/mlx5dv.h>
#include <infiniband/verbs.h>

#include "check.h"

int main(void)
{
	struct ibv_device **list = ibv_get_device_list(NULL);
	struct ibv_context *context = list && list[0] ? ibv_open_device(list[0]) : NULL;
	struct mlx5dv_context_attr open_attr = {0};
	struct mlx5dv_context mlx5 = {0};
	struct efadv_device_attr efa = {0};

	CHECK(context != NULL);
	if (!context)
		return checks();
	CHECK(!mlx5dv_is_supported(list[0]));
	errno = 0;
	CHECK(!mlx5dv_open_device(list[0], &open_attr) && errno == EOPNOTSUPP);
	CHECK(mlx5dv_query_device(context, &mlx5) == EOPNOTSUPP);
	CHECK(efadv_query_device(context, &efa, sizeof efa) == EOPNOTSUPP);
	CHECK(ibv_close_device(context) == 0);
	ibv_free_device_list(list);
	return checks();
}
