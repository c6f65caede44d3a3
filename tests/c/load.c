/*
 * Loads the libraries as NCCL does and asks for symbols by name and version.
 *
 * Usage: load LIBRARY FILE < LIST   where LIST has lines "NAME NODE", and FILE must have them all
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>

#include "check.h"

int main(int argc, char **argv)
{
	char name[256], node[256], real[4096];
	void *library, *symbol;
	Dl_info info;

	if (argc != 3)
		return 2;
	library = dlopen(argv[1], RTLD_NOW);
	if (!library) {
		printf("%s\n", dlerror());
		return 2;
	}
	while (scanf("%255s %255s", name, node) == 2) {
		symbol = dlvsym(library, name, node);
		if (!symbol || !dladdr(symbol, &info) || !realpath(info.dli_fname, real) ||
		    strcmp(real, argv[2]) != 0)
			printf("%s@%s: %s\n", name, node, symbol ? info.dli_fname : "not there");
		CHECK(symbol && strcmp(real, argv[2]) == 0);
	}
	CHECK(!dlvsym(library, "ibv_open_device", "IBVERBS_9.9"));
	return checks();
}
