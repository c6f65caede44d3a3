/* Checks that say what failed and go on; the exit code is 1 if any did. */
#include <errno.h>
#include <stdio.h>
#include <string.h>

static int checks_failed, checks_done;

#define CHECK(condition)                                                                   \
	do {                                                                               \
		int said = errno;                                                          \
		checks_done++;                                                             \
		if (!(condition)) {                                                        \
			checks_failed++;                                                   \
			printf("%s:%d: %s (errno %d, %s)\n", __FILE__, __LINE__,           \
			       #condition, said, strerror(said));                          \
		}                                                                          \
	} while (0)

/* An object, or NULL with EOPNOTSUPP: true if it is there. */
#define OFFERED(object)                                                                    \
	({                                                                                 \
		errno = 0;                                                                 \
		__typeof__(object) made = (object);                                        \
		if (!made)                                                                 \
			CHECK(errno == EOPNOTSUPP && #object);                             \
		made;                                                                      \
	})

static inline int checks(void)
{
	printf("%d checks, %d failed\n", checks_done, checks_failed);
	return checks_failed != 0;
}
