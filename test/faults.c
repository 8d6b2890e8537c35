/*
 * faults.c - an interposed library (LD_PRELOAD) that lets the file system fail
 *
 * It counts the operations that change anything below a folder, over all processes of a run: files
 * created or emptied, writes, truncations, syncs, renames, removals, folders made. At a given one
 * something happens; and all of them can be logged, with their data, so that a power cut can be
 * worked out afterwards.
 *
 *   FAULTS_UNDER   the folder; operations elsewhere do not count
 *   FAULTS_COUNT   a file of 8 octets: the number of operations so far, in the machine's order
 *   FAULTS_AT      the operation at which it happens, from 1; absent: never
 *   FAULTS_DO      before   die before it       half   die when a write is half done (else: after)
 *                  short    the write takes only half, that is all
 *                  call     run FAULTS_CALL (a shell command) after it, and go on
 *                  ENOSPC EIO EROFS EDQUOT    it fails so; a failing write may have done half
 *   FAULTS_EVER    1: and every operation after it as well
 *   FAULTS_DIES    group (default), self, parent: who gets the SIGKILL; the caller stops there
 *   FAULTS_UNREAD  "octet path": that octet of the file cannot be read, as in a bad sector (EIO)
 *   FAULTS_LOG     a file: a line "what octets offset path" and the octets, for each operation done
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static const char *under;
static _Atomic uint64_t *count;
static uint64_t at;
static const char *what = "";
static int log_fd = -1;

#define REAL(name) ((__typeof__(&name))(uintptr_t)dlsym(RTLD_NEXT, #name))

__attribute__((constructor)) static void set_up(void)
{
	const char *file = getenv("FAULTS_COUNT");
	int fd;

	under = getenv("FAULTS_UNDER");
	if (under == NULL || file == NULL || (fd = REAL(open64)(file, O_RDWR | O_CLOEXEC)) < 0)
		return;
	count = mmap(NULL, 8, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	at = getenv("FAULTS_AT") != NULL ? strtoull(getenv("FAULTS_AT"), NULL, 10) : 0;
	what = getenv("FAULTS_DO") != NULL ? getenv("FAULTS_DO") : "";
	if (getenv("FAULTS_LOG") != NULL)
		log_fd = REAL(open64)(getenv("FAULTS_LOG"), O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
}

static int counts(const char *path)
{
	return count != NULL && strncmp(path, under, strlen(under)) == 0;
}

static const char *path_of(int fd, char path[PATH_MAX])
{
	char link[40];
	ssize_t n;

	snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
	n = readlink(link, path, PATH_MAX - 1);
	path[n > 0 ? n : 0] = '\0';
	return path;
}

static void die(void)
{
	const char *who = getenv("FAULTS_DIES");

	if (who != NULL && strcmp(who, "self") == 0)
		kill(getpid(), SIGKILL);
	else if (who != NULL && strcmp(who, "parent") == 0)
		kill(getpgrp(), SIGKILL); /* the leader of its group */
	else
		kill(0, SIGKILL);
}

static int error_number(void)
{
	static const struct { const char *name; int number; } errors[] = {
		{ "ENOSPC", ENOSPC }, { "EIO", EIO }, { "EROFS", EROFS }, { "EDQUOT", EDQUOT },
	};

	for (size_t i = 0; i < sizeof errors / sizeof *errors; i++)
		if (strcmp(what, errors[i].name) == 0)
			return errors[i].number;
	return 0;
}

/*
 * An operation comes: 0 to let it be, -1 to fail with errno set; *n is cut where only a part of it
 * shall be done first, and 'after' told of that.
 */
enum after { GO_ON, THEN_DIE, THEN_CALL, THEN_FAIL };

static int operation(const char *name, size_t *n, enum after *after)
{
	int frees = strcmp(name, "truncate") == 0 || strcmp(name, "unlink") == 0;
	uint64_t now = atomic_fetch_add(count, 1) + 1;

	*after = GO_ON;
	if (at == 0 || now < at || (now > at && getenv("FAULTS_EVER") == NULL))
		return 0;
	if (strcmp(what, "before") == 0) {
		die();
	} else if (strcmp(what, "half") == 0) {
		*n /= 2;
		*after = THEN_DIE;
	} else if (strcmp(what, "short") == 0) {
		*n = (*n + 1) / 2;
	} else if (strcmp(what, "call") == 0) {
		*after = THEN_CALL;
	}
	if (error_number() == 0 || (frees && (error_number() == ENOSPC || error_number() == EDQUOT)))
		return 0;
	if (now % 2 == 0 && *n > 1) {
		*n /= 2;
		*after = THEN_FAIL;
		return 0;
	}
	errno = error_number();
	return -1;
}

static void done(const char *name, const char *path, off_t offset, const void *octets, size_t n)
{
	char line[PATH_MAX + 100];
	struct iovec parts[2] = { { .iov_base = line }, { .iov_base = (void *)(uintptr_t)octets,
							  .iov_len = octets != NULL ? n : 0 } };

	if (log_fd < 0)
		return;
	parts[0].iov_len = (size_t)snprintf(line, sizeof line, "%s %zu %lld %s\n", name,
					    octets != NULL ? n : 0, (long long)offset, path);
	if (syscall(SYS_writev, log_fd, parts, 2) < 0)
		abort();
}

static void then(enum after after)
{
	if (after == THEN_DIE)
		die();
	if (after == THEN_CALL) {
		unsetenv("LD_PRELOAD");
		if (system(getenv("FAULTS_CALL")) != 0)
			abort();
	}
}

static ssize_t written(int fd, const void *octets, size_t n, off_t offset, int positioned)
{
	char path[PATH_MAX];
	enum after after = GO_ON;
	ssize_t r;
	int counted = counts(path_of(fd, path));

	if (counted && operation("write", &n, &after) != 0)
		return -1;
	r = positioned ? REAL(pwrite64)(fd, octets, n, offset) : REAL(write)(fd, octets, n);
	if (counted && r > 0)
		done("write", path, positioned ? offset : -1, octets, (size_t)r);
	then(after);
	if (after == THEN_FAIL && r >= 0)
		return errno = error_number(), -1;
	return r;
}

ssize_t write(int fd, const void *octets, size_t n) { return written(fd, octets, n, 0, 0); }
ssize_t pwrite64(int fd, const void *octets, size_t n, off64_t offset) { return written(fd, octets, n, offset, 1); }
ssize_t pwrite(int fd, const void *octets, size_t n, off_t offset) { return written(fd, octets, n, offset, 1); }

ssize_t pread64(int fd, void *octets, size_t n, off64_t offset)
{
	char path[PATH_MAX], *bad = getenv("FAULTS_UNREAD"), *end;
	off64_t octet = bad != NULL ? strtoll(bad, &end, 10) : -1;

	if (octet >= offset && octet < offset + (off64_t)n && strcmp(path_of(fd, path), end + 1) == 0) {
		errno = EIO;
		if (octet == offset)
			return -1;
		n = (size_t)(octet - offset);
	}
	return REAL(pread64)(fd, octets, n, offset);
}
ssize_t pread(int fd, void *octets, size_t n, off_t offset) { return pread64(fd, octets, n, offset); }

/* The other operations: all or nothing. */
#define AROUND(path, name, offset, call) do { \
	size_t whole = 0; \
	enum after after = GO_ON; \
	int r, counted = counts(path); \
	if (counted && operation(name, &whole, &after) != 0) \
		return -1; \
	r = call; \
	if (counted && r >= 0) \
		done(name, path, offset, NULL, 0); \
	then(after); \
	return r; \
} while (0)

int open64(const char *path, int flags, ...)
{
	struct stat st;
	unsigned mode = 0;
	va_list list;

	if (flags & O_CREAT) {
		va_start(list, flags);
		mode = va_arg(list, unsigned);
		va_end(list);
	}
	if (((flags & O_CREAT) && lstat(path, &st) != 0) || ((flags & O_TRUNC) && stat(path, &st) == 0 && st.st_size > 0))
		AROUND(path, flags & O_TRUNC ? "empty" : "create", 0, REAL(open64)(path, flags, mode));
	return REAL(open64)(path, flags, mode);
}

int open(const char *path, int flags, ...)
{
	unsigned mode = 0;
	va_list list;

	if (flags & O_CREAT) {
		va_start(list, flags);
		mode = va_arg(list, unsigned);
		va_end(list);
	}
	return open64(path, flags, mode);
}

int fsync(int fd)
{
	char path[PATH_MAX];

	AROUND(path_of(fd, path), "sync", 0, REAL(fsync)(fd));
}

int ftruncate64(int fd, off64_t length)
{
	char path[PATH_MAX];

	AROUND(path_of(fd, path), "truncate", length, REAL(ftruncate64)(fd, length));
}

int ftruncate(int fd, off_t length) { return ftruncate64(fd, length); }
int unlink(const char *path) { AROUND(path, "unlink", 0, REAL(unlink)(path)); }
int mkdir(const char *path, mode_t mode) { AROUND(path, "mkdir", 0, REAL(mkdir)(path, mode)); }

int rename(const char *from, const char *to)
{
	char both[2 * PATH_MAX];

	snprintf(both, sizeof both, "%s\t%s", from, to);
	AROUND(both, "rename", 0, REAL(rename)(from, to));
}
