/* Faults on demand, for a process and its children: LD_PRELOAD this (tools/faults.py).
 *
 * FAULT_DIRECTORY  writes below it count, in bytes, in a counter that all processes share
 * FAULT_COUNTER    file of 8 bytes that holds the counter
 * FAULT_LIMIT      bytes after which every write below the directory fails with ENOSPC (negative: never)
 * FAULT_READ       reads below this directory fail with EIO ...
 * FAULT_READ_AFTER ... after so many of their bytes, counted in the 8 bytes that follow the counter
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static long *counter;
static long limit = -1, read_after = -1;
static const char *directory, *read_directory;

__attribute__((constructor)) static void begin(void) {
    const char *file = getenv("FAULT_COUNTER"), *most = getenv("FAULT_LIMIT"), *after = getenv("FAULT_READ_AFTER");
    directory = getenv("FAULT_DIRECTORY");
    read_directory = getenv("FAULT_READ");
    limit = most ? atol(most) : -1;
    read_after = after ? atol(after) : -1;
    int descriptor = file ? open(file, O_RDWR | O_CLOEXEC) : -1;
    if (descriptor < 0) return;
    void *place = mmap(NULL, 16, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
    close(descriptor);
    if (place != MAP_FAILED) counter = place;
}

static int inside(int descriptor, const char *where) {
    char link[64], path[PATH_MAX];
    if (!counter || !where) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length <= 0) return 0;
    path[length] = 0;
    return strncmp(path, where, strlen(where)) == 0;
}

static int full(int descriptor, size_t bytes) {
    if (!inside(descriptor, directory)) return 0;
    long before = __atomic_fetch_add(counter, (long)bytes, __ATOMIC_SEQ_CST);
    if (limit < 0 || before + (long)bytes <= limit) return 0;
    errno = ENOSPC;
    return 1;
}

static int bad(int descriptor, size_t bytes) {
    if (!inside(descriptor, read_directory)) return 0;
    long before = __atomic_fetch_add(counter + 1, (long)bytes, __ATOMIC_SEQ_CST);
    if (read_after < 0 || before + (long)bytes <= read_after) return 0;
    errno = EIO;
    return 1;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int d, const void *b, size_t n) { return full(d, n) ? -1 : REAL(write)(d, b, n); }
ssize_t pwrite(int d, const void *b, size_t n, off_t o) { return full(d, n) ? -1 : REAL(pwrite)(d, b, n, o); }
ssize_t pwrite64(int d, const void *b, size_t n, off64_t o) { return full(d, n) ? -1 : REAL(pwrite64)(d, b, n, o); }

static size_t sum(const struct iovec *v, int n) {
    size_t bytes = 0;
    for (int i = 0; i < n; i++) bytes += v[i].iov_len;
    return bytes;
}

ssize_t writev(int d, const struct iovec *v, int n) { return full(d, sum(v, n)) ? -1 : REAL(writev)(d, v, n); }
int posix_fallocate(int d, off_t o, off_t n) { return full(d, n) ? ENOSPC : REAL(posix_fallocate)(d, o, n); }
int posix_fallocate64(int d, off64_t o, off64_t n) { return full(d, n) ? ENOSPC : REAL(posix_fallocate64)(d, o, n); }
ssize_t sendfile(int out, int in, off_t *o, size_t n) {
    return full(out, 4096) ? -1 : ((ssize_t(*)(int, int, off_t *, size_t))dlsym(RTLD_NEXT, "sendfile"))(out, in, o, n);
}
size_t fwrite(const void *b, size_t s, size_t n, FILE *f) {
    return full(fileno(f), s * n) ? 0 : REAL(fwrite)(b, s, n, f);
}

ssize_t read(int d, void *b, size_t n) { return bad(d, n) ? -1 : REAL(read)(d, b, n); }
ssize_t pread(int d, void *b, size_t n, off_t o) { return bad(d, n) ? -1 : REAL(pread)(d, b, n, o); }
ssize_t pread64(int d, void *b, size_t n, off64_t o) { return bad(d, n) ? -1 : REAL(pread64)(d, b, n, o); }
ssize_t preadv(int d, const struct iovec *v, int n, off_t o) {
    return bad(d, sum(v, n)) ? -1 : REAL(preadv)(d, v, n, o);
}
ssize_t preadv64(int d, const struct iovec *v, int n, off64_t o) {
    return bad(d, sum(v, n)) ? -1 : REAL(preadv64)(d, v, n, o);
}
