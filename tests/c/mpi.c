/* Collectives, point to point and one-sided: every byte that arrives is checked. */
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int rank, size;

static void check(const char *what, size_t len, int good)
{
	if (good)
		return;
	fprintf(stderr, "rank %d: %s of %zu bytes: other bytes than sent\n", rank, what, len);
	MPI_Abort(MPI_COMM_WORLD, 1);
}

static int all(const char *bytes, size_t len, char value)
{
	for (size_t i = 0; i < len; i++)
		if (bytes[i] != value)
			return 0;
	return 1;
}

static void exchange(size_t len)
{
	int next = (rank + 1) % size, previous = (rank + size - 1) % size;
	char *mine = malloc(len), *theirs = malloc(len * size);
	double one = rank, sum = 0;

	memset(mine, rank + 1, len);
	MPI_Allgather(mine, len, MPI_BYTE, theirs, len, MPI_BYTE, MPI_COMM_WORLD);
	for (int i = 0; i < size; i++)
		check("allgather", len, all(theirs + i * len, len, i + 1));
	MPI_Sendrecv(mine, len, MPI_BYTE, next, 1, theirs, len, MPI_BYTE, previous, 1, MPI_COMM_WORLD,
		     MPI_STATUS_IGNORE);
	check("sendrecv", len, all(theirs, len, previous + 1));
	MPI_Allreduce(&one, &sum, 1, MPI_DOUBLE, MPI_SUM, MPI_COMM_WORLD);
	check("allreduce", sizeof(sum), sum == size * (size - 1) / 2);
	free(mine);
	free(theirs);
}

static void one_sided(void)
{
	MPI_Win window;
	long *slots, mine = rank + 1;

	MPI_Win_allocate(size * sizeof(*slots), sizeof(*slots), MPI_INFO_NULL, MPI_COMM_WORLD, &slots,
			 &window);
	memset(slots, 0, size * sizeof(*slots));
	MPI_Win_fence(0, window);
	for (int i = 0; i < size; i++)
		MPI_Put(&mine, 1, MPI_LONG, i, rank, 1, MPI_LONG, window);
	MPI_Win_fence(0, window);
	for (int i = 0; i < size; i++)
		check("put", sizeof(mine), slots[i] == i + 1);
	MPI_Win_fence(0, window);
	for (int i = 0; i < size; i++)
		MPI_Accumulate(&mine, 1, MPI_LONG, i, 0, 1, MPI_LONG, MPI_SUM, window);
	MPI_Win_fence(0, window);
	check("accumulate", sizeof(mine), slots[0] == 1 + size * (size + 1) / 2);
	MPI_Win_free(&window);
}

int main(int argc, char **argv)
{
	MPI_Init(&argc, &argv);
	MPI_Comm_rank(MPI_COMM_WORLD, &rank);
	MPI_Comm_size(MPI_COMM_WORLD, &size);
	for (size_t len = 1; len <= 4 << 20; len *= 8)
		exchange(len);
	one_sided();
	if (rank == 0) {
		printf("%d ranks agree\n", size);
		fflush(stdout);
	}
	/* For who wants to see what happens when one of them dies. */
	while (argc > 1)
		exchange(1 << 16);
	MPI_Finalize();
	return 0;
}
