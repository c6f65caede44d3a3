/* Checks that say what failed and go on; the exit code is 1 if any did. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Nothing takes so long: a wait that does is a failure. */
#define DEADLINE_MS 60000

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

/* A step without which the rest makes no sense. */
#define MUST(condition)                                                                    \
	do {                                                                               \
		CHECK(condition);                                                          \
		if (checks_failed)                                                         \
			exit(1);                                                           \
	} while (0)

/* A call that fails with this errno. */
#define FAILS(call, error)                                                                 \
	do {                                                                               \
		errno = 0;                                                                 \
		CHECK((call) == -1 && errno == (error));                                   \
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
