/* Fails, stops or kills at the n-th call to the file system below one folder; loaded with LD_PRELOAD.
 *
 * Python, torch, safetensors and SQLite all reach the disk through these functions of libc, so a fault here is met where
 * a real one would be. Nothing happens until faulty_io() is called, and calls on other files pass unchanged.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OPEN_READ = 1, OPEN_WRITE = 2, READ = 4, WRITE = 8, SYNC = 16, RENAME = 32, MAKE = 64, REMOVE = 128 };
enum { KILL = -1, STOP = -2 };

static char root[PATH_MAX];
static size_t root_length;
static int kinds, action, lasting;
static long nth;
static int trace = -1;
static atomic_long calls;

#define REAL(name) \
    static __typeof__(name) *real; \
    if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

/* Arm: the `n`-th call of these kinds below `folder` meets `what` (an errno, KILL or STOP), and with `forever` all after it.
 * With n = 0, calls are only counted. Each counted call is written as a line to
 * `trace_fd`, unless that is -1. */
void faulty_io(const char *folder, int which, long n, int what, int forever, int trace_fd) {
    root_length = 0;
    snprintf(root, sizeof root, "%s", folder);
    kinds = which, nth = n, action = what, lasting = forever, trace = trace_fd;
    atomic_store(&calls, 0);
    root_length = strlen(root);
}

static int is_below(const char *path) {
    return root_length && !strncmp(path, root, root_length) && (path[root_length] == '/' || !path[root_length]);
}

static int absolute(int folder, const char *path, char *out) {
    char link[64];
    if (*path == '/') return snprintf(out, PATH_MAX, "%s", path) > 0;
    if (folder == AT_FDCWD) {
        if (!getcwd(out, PATH_MAX)) return 0;
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        ssize_t length = readlink(link, out, PATH_MAX - 1);
        if (length < 0) return 0;
        out[length] = 0;
    }
    size_t used = strlen(out);
    snprintf(out + used, PATH_MAX - used, "/%s", path);
    return 1;
}

/* Returns 0 to go on, or -1 with errno set. */
static int meet(int kind, const char *name, const char *path) {
    if (!root_length || !(kinds & kind) || !is_below(path)) return 0;
    long number = atomic_fetch_add(&calls, 1) + 1;
    if (trace >= 0) dprintf(trace, "%d %s %s\n", kind, name, path + root_length);
    if (!nth || (lasting ? number < nth : number != nth)) return 0;
    if (action == KILL) kill(getpid(), SIGKILL);
    if (action == STOP) return kill(getpid(), SIGSTOP); /* and goes on when it is told to */
    errno = action;
    return -1;
}

static int meet_at(int kind, const char *name, int folder, const char *path) {
    char full[PATH_MAX];
    int saved = errno;
    if (!root_length || !(kinds & kind) || !absolute(folder, path, full)) return 0;
    errno = saved;
    return meet(kind, name, full);
}

static int meet_fd(int kind, const char *name, int fd) {
    char link[64], full[PATH_MAX];
    if (!root_length || !(kinds & kind)) return 0;
    int saved = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, full, sizeof full - 1);
    errno = saved;
    if (length < 0) return 0;
    full[length] = 0;
    return meet(kind, name, full);
}

static int opening(int flags) { return (flags & O_ACCMODE) == O_RDONLY ? OPEN_READ : OPEN_WRITE; }
static const char *opened(int kind) { return kind == OPEN_READ ? "open" : "open_write"; }

#define MODE(flags) \
    mode_t mode = 0; \
    if ((flags) & (O_CREAT | O_TMPFILE)) { \
        va_list rest; \
        va_start(rest, flags); \
        mode = va_arg(rest, mode_t); \
        va_end(rest); \
    }

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        REAL(name); \
        MODE(flags) \
        if (meet_at(opening(flags), opened(opening(flags)), AT_FDCWD, path)) return -1; \
        return real(path, flags, mode); \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name) \
    int name(int folder, const char *path, int flags, ...) { \
        REAL(name); \
        MODE(flags) \
        if (meet_at(opening(flags), opened(opening(flags)), folder, path)) return -1; \
        return real(folder, path, flags, mode); \
    }
OPENAT(openat)
OPENAT(openat64)

#define FOPEN(name) \
    FILE *name(const char *path, const char *how) { \
        REAL(name); \
        int kind = strpbrk(how, "wa+") ? OPEN_WRITE : OPEN_READ; \
        if (meet_at(kind, opened(kind), AT_FDCWD, path)) return NULL; \
        return real(path, how); \
    }
FOPEN(fopen)
FOPEN(fopen64)

/* A call on an open file. */
#define ON_FILE(type, name, kind, parameters, arguments) \
    type name parameters { \
        REAL(name); \
        if (meet_fd(kind, #name, fd)) return -1; \
        return real arguments; \
    }
ON_FILE(ssize_t, read, READ, (int fd, void *to, size_t count), (fd, to, count))
ON_FILE(ssize_t, pread, READ, (int fd, void *to, size_t count, off_t at), (fd, to, count, at))
ON_FILE(ssize_t, pread64, READ, (int fd, void *to, size_t count, off64_t at), (fd, to, count, at))
ON_FILE(ssize_t, write, WRITE, (int fd, const void *from, size_t count), (fd, from, count))
ON_FILE(ssize_t, pwrite, WRITE, (int fd, const void *from, size_t count, off_t at), (fd, from, count, at))
ON_FILE(ssize_t, pwrite64, WRITE, (int fd, const void *from, size_t count, off64_t at), (fd, from, count, at))
ON_FILE(ssize_t, readv, READ, (int fd, const struct iovec *to, int count), (fd, to, count))
ON_FILE(ssize_t, preadv, READ, (int fd, const struct iovec *to, int count, off_t at), (fd, to, count, at))
ON_FILE(ssize_t, preadv64, READ, (int fd, const struct iovec *to, int count, off64_t at), (fd, to, count, at))
ON_FILE(ssize_t, writev, WRITE, (int fd, const struct iovec *from, int count), (fd, from, count))
ON_FILE(int, fsync, SYNC, (int fd), (fd))
ON_FILE(int, fdatasync, SYNC, (int fd), (fd))
ON_FILE(int, ftruncate, WRITE, (int fd, off_t length), (fd, length))
ON_FILE(int, ftruncate64, WRITE, (int fd, off64_t length), (fd, length))

ssize_t copy_file_range(int in, off64_t *in_at, int out, off64_t *out_at, size_t count, unsigned flags) {
    REAL(copy_file_range);
    if (meet_fd(WRITE, "copy_file_range", out) || meet_fd(READ, "copy_file_range", in)) return -1;
    return real(in, in_at, out, out_at, count, flags);
}

int posix_fallocate(int fd, off_t at, off_t length) {
    REAL(posix_fallocate);
    if (meet_fd(WRITE, "fallocate", fd) == -1) return errno;
    return real(fd, at, length);
}
int posix_fallocate64(int fd, off64_t at, off64_t length) {
    REAL(posix_fallocate64);
    if (meet_fd(WRITE, "fallocate", fd) == -1) return errno;
    return real(fd, at, length);
}

/* A call on names: the one that changes is `path` below `folder`. */
#define ON_NAME(name, kind, parameters, arguments, folder, path) \
    int name parameters { \
        REAL(name); \
        if (meet_at(kind, #name, folder, path) == -1) return -1; \
        return real arguments; \
    }
ON_NAME(rename, RENAME, (const char *from, const char *to), (from, to), AT_FDCWD, to)
ON_NAME(renameat, RENAME, (int a, const char *from, int b, const char *to), (a, from, b, to), b, to)
ON_NAME(renameat2, RENAME, (int a, const char *from, int b, const char *to, unsigned how), (a, from, b, to, how), b, to)
ON_NAME(link, MAKE, (const char *from, const char *to), (from, to), AT_FDCWD, to)
ON_NAME(linkat, MAKE, (int a, const char *from, int b, const char *to, int how), (a, from, b, to, how), b, to)
ON_NAME(symlink, MAKE, (const char *from, const char *to), (from, to), AT_FDCWD, to)
ON_NAME(mkdir, MAKE, (const char *path, mode_t mode), (path, mode), AT_FDCWD, path)
ON_NAME(mkdirat, MAKE, (int folder, const char *path, mode_t mode), (folder, path, mode), folder, path)
ON_NAME(unlink, REMOVE, (const char *path), (path), AT_FDCWD, path)
ON_NAME(unlinkat, REMOVE, (int folder, const char *path, int how), (folder, path, how), folder, path)
ON_NAME(rmdir, REMOVE, (const char *path), (path), AT_FDCWD, path)
