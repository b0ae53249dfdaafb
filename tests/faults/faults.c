// Preloaded before libc (LD_PRELOAD): lets the N-th operation that changes a file below a folder fail, or kills the process there.
//
// faults_arm(folder, n, error, forever) starts counting: operation n fails with `error` (an errno), and with `forever` all after it; error 0 is
// kill -9, before the operation. faults_count() says how many there were.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[PATH_MAX];
static long at, seen;
static int failure, lasting;

void faults_arm(const char *below, long n, int error, int forever) {
    strncpy(folder, below, sizeof folder - 1);
    at = n, failure = error, lasting = forever;
    __atomic_store_n(&seen, 0, __ATOMIC_SEQ_CST);
}

long faults_count(void) { return seen; }

static int below_folder(const char *path) { return folder[0] && strncmp(path, folder, strlen(folder)) == 0; }

static int path_concerns(int at_folder, const char *path) {
    char whole[2 * PATH_MAX], place[64];
    if (path[0] == '/' || !folder[0]) return below_folder(path);
    if (at_folder == AT_FDCWD) {
        if (!getcwd(whole, PATH_MAX)) return 0;
    } else {
        snprintf(place, sizeof place, "/proc/self/fd/%d", at_folder);
        ssize_t length = readlink(place, whole, PATH_MAX - 1);
        if (length < 0) return 0;
        whole[length] = 0;
    }
    strcat(whole, "/");
    strncat(whole, path, PATH_MAX);
    return below_folder(whole);
}

static int file_concerns(int file) { return folder[0] && path_concerns(file, ""); }

// Whether this operation, which concerns the folder, is to fail.
static int fails(void) {
    long number = __atomic_add_fetch(&seen, 1, __ATOMIC_SEQ_CST);
    if (number != at && !(lasting && at && number > at)) return 0;
    if (failure == 0) kill(getpid(), SIGKILL), pause();
    errno = failure;
    return 1;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define WRITES(flags) ((flags) & (O_WRONLY | O_RDWR | O_CREAT))
#define OPEN(name)                                                                                     \
    int name(const char *path, int flags, ...) {                                                       \
        va_list rest;                                                                                  \
        va_start(rest, flags);                                                                         \
        mode_t mode = va_arg(rest, mode_t);                                                            \
        va_end(rest);                                                                                  \
        return WRITES(flags) && path_concerns(AT_FDCWD, path) && fails() ? -1 : REAL(name)(path, flags, mode); \
    }
#define OPENAT(name)                                                                                   \
    int name(int at_folder, const char *path, int flags, ...) {                                        \
        va_list rest;                                                                                  \
        va_start(rest, flags);                                                                         \
        mode_t mode = va_arg(rest, mode_t);                                                            \
        va_end(rest);                                                                                  \
        return WRITES(flags) && path_concerns(at_folder, path) && fails() ? -1 : REAL(name)(at_folder, path, flags, mode); \
    }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

FILE *fopen(const char *path, const char *mode) {
    return strpbrk(mode, "wa+") && path_concerns(AT_FDCWD, path) && fails() ? NULL : REAL(fopen)(path, mode);
}
FILE *fopen64(const char *path, const char *mode) {
    return strpbrk(mode, "wa+") && path_concerns(AT_FDCWD, path) && fails() ? NULL : REAL(fopen64)(path, mode);
}
ssize_t write(int file, const void *data, size_t size) {
    if (file_concerns(file)) {
        if (failure == 0 && seen + 1 == at) size = REAL(write)(file, data, size / 2);  // killed when half is written
        if (fails()) return -1;
    }
    return REAL(write)(file, data, size);
}
ssize_t writev(int file, const struct iovec *parts, int count) {
    return file_concerns(file) && fails() ? -1 : REAL(writev)(file, parts, count);
}
size_t fwrite(const void *data, size_t size, size_t count, FILE *file) {
    return file_concerns(fileno(file)) && fails() ? 0 : REAL(fwrite)(data, size, count, file);
}
ssize_t pwrite(int file, const void *data, size_t size, off_t place) {
    return file_concerns(file) && fails() ? -1 : REAL(pwrite)(file, data, size, place);
}
ssize_t pwrite64(int file, const void *data, size_t size, off64_t place) {
    return file_concerns(file) && fails() ? -1 : REAL(pwrite64)(file, data, size, place);
}
int fsync(int file) { return file_concerns(file) && fails() ? -1 : REAL(fsync)(file); }
int fdatasync(int file) { return file_concerns(file) && fails() ? -1 : REAL(fdatasync)(file); }
int ftruncate(int file, off_t size) { return file_concerns(file) && fails() ? -1 : REAL(ftruncate)(file, size); }
int mkdir(const char *path, mode_t mode) {
    return path_concerns(AT_FDCWD, path) && fails() ? -1 : REAL(mkdir)(path, mode);
}
int rename(const char *from, const char *to) {
    return (path_concerns(AT_FDCWD, from) || path_concerns(AT_FDCWD, to)) && fails() ? -1 : REAL(rename)(from, to);
}
int renameat2(int from_folder, const char *from, int to_folder, const char *to, unsigned flags) {
    int concerns = path_concerns(from_folder, from) || path_concerns(to_folder, to);
    return concerns && fails() ? -1 : REAL(renameat2)(from_folder, from, to_folder, to, flags);
}
int unlink(const char *path) { return path_concerns(AT_FDCWD, path) && fails() ? -1 : REAL(unlink)(path); }
int unlinkat(int at_folder, const char *path, int flags) {
    return path_concerns(at_folder, path) && fails() ? -1 : REAL(unlinkat)(at_folder, path, flags);
}
int rmdir(const char *path) { return path_concerns(AT_FDCWD, path) && fails() ? -1 : REAL(rmdir)(path); }
