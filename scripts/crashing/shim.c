/* LD_PRELOAD shim: writes down, and where asked fails, the system calls that durability rests on.
 *
 * Watched are paths below CRASH_ROOT. Every change (create, write, truncate, rename, link, unlink,
 * mkdir, rmdir), every fsync, and what goes out on sockets of CRASH_PORT (ours) and CRASH_PEER (a
 * peer's) is appended to CRASH_TRACE in the one order in which it happened, over all processes: the
 * operation and its record share a lock. CRASH_FAULTS is a mapped control block that makes the n-th
 * call of a kind fail. Records and control block are read and written by shim.py.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <netinet/in.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define SENT_BYTES 65536
#define HEAD_BYTES 1024

#define KILL 0x7fff /* instead of an errno: the process dies here, before the call */

enum { OP_CREATE = 1, OP_WRITE = 2, OP_SYNC = 4, OP_RENAME = 8, OP_UNLINK = 16, OP_MKDIR = 32, OP_TRUNCATE = 64 };

struct record {
    uint32_t total;
    uint8_t kind, pad[3];
    uint32_t pid, flags;
    uint64_t ino;
    int64_t offset, length;
    uint32_t path, other, data; /* byte counts of what follows */
} __attribute__((packed));

struct control {
    uint32_t armed, ops, error, sticky, shorten, countdown, seen, fired;
    char match[128];
    char avoid[128];
};

static char root[PATH_MAX];
static size_t root_length;
static int trace_fd = -1, ours = -1, peers = -1;
static const char *trace_path;
static struct control *control;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static int ready;

#define REAL(type, name, ...)                        \
    static type (*real_##name)(__VA_ARGS__);         \
    if (!real_##name) real_##name = dlsym(RTLD_NEXT, #name)

static int real_openat_(int dir, const char *path, int flags, mode_t mode) {
    REAL(int, openat, int, const char *, int, ...);
    return real_openat(dir, path, flags, mode);
}

static ssize_t real_write_(int fd, const void *data, size_t count) {
    REAL(ssize_t, write, int, const void *, size_t);
    return real_write(fd, data, count);
}

static void open_trace(void) {
    if (!trace_path) return;
    int fd = real_openat_(AT_FDCWD, trace_path, O_RDWR | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
    if (fd < 0) abort();
    trace_fd = fcntl(fd, F_DUPFD_CLOEXEC, 900); /* out of the way of numbers that others rely on */
    close(fd);
    if (trace_fd < 0) abort();
}

static void before_fork(void) { pthread_mutex_lock(&mutex); }
static void after_fork(void) { pthread_mutex_unlock(&mutex); }
static void in_child(void) {
    pthread_mutex_init(&mutex, NULL);
    if (trace_fd >= 0) close(trace_fd); /* a lock of its own: flock belongs to the open file */
    open_trace();
}

__attribute__((constructor)) static void begin(void) {
    const char *watched = getenv("CRASH_ROOT");
    if (!watched) return;
    snprintf(root, sizeof root, "%s", watched);
    root_length = strlen(root);
    trace_path = getenv("CRASH_TRACE");
    open_trace();
    if (getenv("CRASH_PORT")) ours = atoi(getenv("CRASH_PORT"));
    if (getenv("CRASH_PEER")) peers = atoi(getenv("CRASH_PEER"));
    const char *faults = getenv("CRASH_FAULTS");
    if (faults) {
        int fd = real_openat_(AT_FDCWD, faults, O_RDWR | O_CLOEXEC, 0);
        REAL(void *, mmap, void *, size_t, int, int, int, off_t);
        control = real_mmap(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (fd < 0 || control == MAP_FAILED) abort();
        close(fd);
    }
    pthread_atfork(before_fork, after_fork, in_child);
    ready = 1;
}

static void lock(void) {
    pthread_mutex_lock(&mutex);
    if (trace_fd >= 0)
        while (flock(trace_fd, LOCK_EX) && errno == EINTR) {}
}

static void unlock(void) {
    int saved = errno;
    if (trace_fd >= 0) flock(trace_fd, LOCK_UN);
    pthread_mutex_unlock(&mutex);
    errno = saved;
}

/* What a path or descriptor is, relative to the root; 0 when it is not watched. */

static int below(const char *path, const char **relative) {
    if (strncmp(path, root, root_length)) return 0;
    if (path[root_length] && path[root_length] != '/') return 0;
    *relative = path[root_length] ? path + root_length + 1 : "";
    return 1;
}

static int of_path(int dir, const char *path, char *full, const char **relative) {
    if (!ready || !path) return 0;
    if (path[0] == '/') {
        snprintf(full, PATH_MAX, "%s", path);
    } else {
        char name[64];
        ssize_t count;
        if (dir == AT_FDCWD) snprintf(name, sizeof name, "/proc/self/cwd");
        else snprintf(name, sizeof name, "/proc/self/fd/%d", dir);
        count = readlink(name, full, PATH_MAX - 1);
        if (count < 0) return 0;
        snprintf(full + count, PATH_MAX - count, "/%s", path);
    }
    return below(full, relative);
}

static int of_fd(int fd, char *full, const char **relative, struct stat *info) {
    char name[64];
    if (!ready || fd < 0) return 0;
    int saved = errno;
    int found = 0;
    if (!fstat(fd, info) && (S_ISREG(info->st_mode) || S_ISDIR(info->st_mode))) {
        snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
        ssize_t count = readlink(name, full, PATH_MAX - 1);
        if (count > 0) {
            full[count] = 0;
            found = below(full, relative);
        }
    }
    errno = saved;
    return found;
}

static void put(int kind, uint32_t flags, uint64_t ino, int64_t offset, int64_t length, const char *path,
                const char *other, const struct iovec *data, int parts, size_t most) {
    if (trace_fd < 0) return;
    int saved = errno;
    struct record head = {.kind = kind, .pid = getpid(), .flags = flags, .ino = ino, .offset = offset, .length = length};
    head.path = path ? strlen(path) : 0;
    head.other = other ? strlen(other) : 0;
    size_t size = 0;
    for (int i = 0; i < parts; i++) size += data[i].iov_len;
    if (size > most) size = most;
    head.data = size;
    head.total = sizeof head + head.path + head.other + head.data;
    char *buffer = malloc(head.total), *at = buffer;
    if (!buffer) abort();
    at = mempcpy(at, &head, sizeof head);
    at = mempcpy(at, path ? path : "", head.path);
    at = mempcpy(at, other ? other : "", head.other);
    for (int i = 0; i < parts && size; i++) {
        size_t part = data[i].iov_len < size ? data[i].iov_len : size;
        at = mempcpy(at, data[i].iov_base, part);
        size -= part;
    }
    if (real_write_(trace_fd, buffer, head.total) != (ssize_t)head.total) abort();
    free(buffer);
    errno = saved;
}

/* Whether this call is to fail. Called with the lock held. */
static int failing(uint32_t op, const char *path) {
    if (!control || !control->armed || !(control->ops & op)) return 0;
    if (control->match[0] && !strstr(path, control->match)) return 0;
    if (control->avoid[0] && strstr(path, control->avoid)) return 0;
    control->seen++;
    if (control->countdown) {
        control->countdown--;
        return 0;
    }
    if (control->fired && !control->sticky) return 0;
    control->fired++;
    if (control->error == KILL) {
        kill(getpid(), SIGKILL);
        for (;;) pause();
    }
    put('F', op, 0, 0, control->error, path, NULL, NULL, 0, 0);
    errno = control->error;
    return 1;
}

/* Names */

static int opened(int dir, const char *path, int flags, mode_t mode) {
    char full[PATH_MAX];
    const char *relative;
    if (!of_path(dir, path, full, &relative)) return real_openat_(dir, path, flags, mode);
    lock();
    struct stat info;
    int existed = !fstatat(dir, path, &info, 0);
    int makes = (flags & O_CREAT) && !existed;
    int result = -1;
    if (!(makes || (flags & O_TRUNC)) || !failing(OP_CREATE, relative)) result = real_openat_(dir, path, flags, mode);
    if (result >= 0) {
        int saved = errno;
        fstat(result, &info);
        if ((flags & O_TMPFILE) == O_TMPFILE) put('!', 0, 0, 0, 0, relative, "O_TMPFILE", NULL, 0, 0);
        else if (makes) put('O', 0, info.st_ino, 0, 0, relative, NULL, NULL, 0, 0);
        else if ((flags & O_TRUNC) && S_ISREG(info.st_mode)) put('T', 0, info.st_ino, 0, 0, relative, NULL, NULL, 0, 0);
        errno = saved;
    }
    unlock();
    return result;
}

static mode_t mode_of(int flags, va_list list) {
    return (flags & (O_CREAT | O_TMPFILE)) ? (mode_t)va_arg(list, int) : 0;
}

#define OPEN(name)                                  \
    int name(const char *path, int flags, ...) {    \
        va_list list;                               \
        va_start(list, flags);                      \
        mode_t mode = mode_of(flags, list);         \
        va_end(list);                               \
        return opened(AT_FDCWD, path, flags, mode); \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                      \
    int name(int dir, const char *path, int flags, ...) { \
        va_list list;                                     \
        va_start(list, flags);                            \
        mode_t mode = mode_of(flags, list);               \
        va_end(list);                                     \
        return opened(dir, path, flags, mode);            \
    }
OPENAT(openat)
OPENAT(openat64)

int __open_2(const char *path, int flags) { return opened(AT_FDCWD, path, flags, 0); }
int __open64_2(const char *path, int flags) { return opened(AT_FDCWD, path, flags, 0); }
int __openat_2(int dir, const char *path, int flags) { return opened(dir, path, flags, 0); }
int __openat64_2(int dir, const char *path, int flags) { return opened(dir, path, flags, 0); }
int creat(const char *path, mode_t mode) { return opened(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int creat64(const char *path, mode_t mode) { return opened(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode); }

static int renamed(int from_dir, const char *from, int to_dir, const char *to, unsigned flags) {
    REAL(int, renameat2, int, const char *, int, const char *, unsigned);
    char full_from[PATH_MAX], full_to[PATH_MAX];
    const char *source = NULL, *target = NULL;
    int watched = of_path(from_dir, from, full_from, &source);
    watched |= of_path(to_dir, to, full_to, &target);
    if (!watched) return real_renameat2(from_dir, from, to_dir, to, flags);
    lock();
    int result = failing(OP_RENAME, target ? target : source) ? -1 : real_renameat2(from_dir, from, to_dir, to, flags);
    if (!result) {
        if (!source || !target) put('!', 0, 0, 0, 0, source ? source : target, "rename across the root", NULL, 0, 0);
        else if (flags & ~RENAME_NOREPLACE) put('!', 0, 0, 0, 0, source, "renameat2 flags", NULL, 0, 0);
        else put('R', 0, 0, 0, 0, source, target, NULL, 0, 0);
    }
    unlock();
    return result;
}

int rename(const char *from, const char *to) { return renamed(AT_FDCWD, from, AT_FDCWD, to, 0); }
int renameat(int a, const char *from, int b, const char *to) { return renamed(a, from, b, to, 0); }
int renameat2(int a, const char *from, int b, const char *to, unsigned flags) { return renamed(a, from, b, to, flags); }

int linkat(int from_dir, const char *from, int to_dir, const char *to, int flags) {
    REAL(int, linkat, int, const char *, int, const char *, int);
    char full[PATH_MAX];
    const char *target;
    if (!of_path(to_dir, to, full, &target)) return real_linkat(from_dir, from, to_dir, to, flags);
    lock();
    int result = failing(OP_RENAME, target) ? -1 : real_linkat(from_dir, from, to_dir, to, flags);
    struct stat info;
    if (!result && !fstatat(to_dir, to, &info, AT_SYMLINK_NOFOLLOW))
        put('L', 0, info.st_ino, 0, 0, target, NULL, NULL, 0, 0);
    unlock();
    return result;
}
int link(const char *from, const char *to) { return linkat(AT_FDCWD, from, AT_FDCWD, to, 0); }

int symlinkat(const char *what, int dir, const char *path) {
    REAL(int, symlinkat, const char *, int, const char *);
    char full[PATH_MAX];
    const char *relative;
    int result = real_symlinkat(what, dir, path);
    if (!result && of_path(dir, path, full, &relative)) {
        lock();
        put('!', 0, 0, 0, 0, relative, "symlink", NULL, 0, 0);
        unlock();
    }
    return result;
}
int symlink(const char *what, const char *path) { return symlinkat(what, AT_FDCWD, path); }

int unlinkat(int dir, const char *path, int flags) {
    REAL(int, unlinkat, int, const char *, int);
    char full[PATH_MAX];
    const char *relative;
    if (!of_path(dir, path, full, &relative)) return real_unlinkat(dir, path, flags);
    lock();
    int result = failing(OP_UNLINK, relative) ? -1 : real_unlinkat(dir, path, flags);
    if (!result) put((flags & AT_REMOVEDIR) ? 'X' : 'U', 0, 0, 0, 0, relative, NULL, NULL, 0, 0);
    unlock();
    return result;
}
int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }

int remove(const char *path) {
    struct stat info;
    if (lstat(path, &info)) return -1;
    return S_ISDIR(info.st_mode) ? rmdir(path) : unlink(path);
}

int mkdirat(int dir, const char *path, mode_t mode) {
    REAL(int, mkdirat, int, const char *, mode_t);
    char full[PATH_MAX];
    const char *relative;
    if (!of_path(dir, path, full, &relative)) return real_mkdirat(dir, path, mode);
    lock();
    int result = failing(OP_MKDIR, relative) ? -1 : real_mkdirat(dir, path, mode);
    struct stat info;
    if (!result && !fstatat(dir, path, &info, 0)) put('M', 0, info.st_ino, 0, 0, relative, NULL, NULL, 0, 0);
    unlock();
    return result;
}
int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }

/* Contents */

static void put_written(int fd, uint64_t ino, const char *relative, int64_t offset, int64_t count) {
    char name[64], *data = malloc(count ? count : 1);
    snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
    int again = real_openat_(AT_FDCWD, name, O_RDONLY | O_CLOEXEC, 0);
    struct iovec part = {data, count};
    if (again < 0 || !data || pread(again, data, count, offset) != count) abort();
    put('W', 0, ino, offset, count, relative, NULL, &part, 1, count);
    close(again);
    free(data);
}

static ssize_t do_write(int fd, const struct iovec *parts, int count, off64_t offset) {
    REAL(ssize_t, writev, int, const struct iovec *, int);
    REAL(ssize_t, pwritev64, int, const struct iovec *, int, off64_t);
    return offset < 0 ? real_writev(fd, parts, count) : real_pwritev64(fd, parts, count, offset);
}

/* offset < 0: at the file's own position. */
static ssize_t written(int fd, const struct iovec *parts, int count, off64_t offset) {
    char full[PATH_MAX];
    const char *relative;
    struct stat info;
    if (!of_fd(fd, full, &relative, &info)) return do_write(fd, parts, count, offset);
    lock();
    fstat(fd, &info);
    int flags = fcntl(fd, F_GETFL);
    off64_t at = (flags & O_APPEND) ? info.st_size : offset >= 0 ? offset : lseek64(fd, 0, SEEK_CUR);
    size_t size = 0;
    ssize_t result = -1;
    for (int i = 0; i < count; i++) size += parts[i].iov_len;
    if (!failing(OP_WRITE, relative)) {
        result = do_write(fd, parts, count, offset);
    } else if (control->shorten && control->fired == 1 && size > 1) { /* a short write first, as a full disk does it */
        struct iovec half = {parts[0].iov_base, parts[0].iov_len > 1 ? parts[0].iov_len / 2 : 1};
        result = do_write(fd, &half, 1, offset);
    }
    if (result > 0) put('W', 0, info.st_ino, at, result, relative, NULL, parts, count, result);
    unlock();
    return result;
}

static void note_socket(int fd, const struct iovec *parts, int count, int kind, ssize_t received);

ssize_t write(int fd, const void *data, size_t count) {
    struct iovec part = {(void *)data, count};
    struct stat info;
    if (!ready || fstat(fd, &info)) return real_write_(fd, data, count);
    if (S_ISSOCK(info.st_mode)) note_socket(fd, &part, 1, 'N', -1);
    if (!S_ISREG(info.st_mode)) return real_write_(fd, data, count);
    return written(fd, &part, 1, -1);
}
ssize_t writev(int fd, const struct iovec *parts, int count) { return written(fd, parts, count, -1); }
ssize_t pwrite64(int fd, const void *data, size_t count, off64_t offset) {
    struct iovec part = {(void *)data, count};
    return written(fd, &part, 1, offset);
}
ssize_t pwrite(int fd, const void *data, size_t count, off_t offset) { return pwrite64(fd, data, count, offset); }
ssize_t pwritev64(int fd, const struct iovec *parts, int count, off64_t offset) {
    return written(fd, parts, count, offset);
}
ssize_t pwritev(int fd, const struct iovec *parts, int count, off_t offset) {
    return written(fd, parts, count, offset);
}
ssize_t pwritev64v2(int fd, const struct iovec *parts, int count, off64_t offset, int flags) {
    (void)flags;
    return written(fd, parts, count, offset);
}
ssize_t pwritev2(int fd, const struct iovec *parts, int count, off_t offset, int flags) {
    (void)flags;
    return written(fd, parts, count, offset);
}

ssize_t sendfile64(int out, int in, off64_t *offset, size_t count) {
    REAL(ssize_t, sendfile64, int, int, off64_t *, size_t);
    char full[PATH_MAX];
    const char *relative;
    struct stat info;
    if (!of_fd(out, full, &relative, &info)) return real_sendfile64(out, in, offset, count);
    lock();
    off64_t at = lseek64(out, 0, SEEK_CUR);
    ssize_t result = failing(OP_WRITE, relative) ? -1 : real_sendfile64(out, in, offset, count);
    if (result > 0) put_written(out, info.st_ino, relative, at, result);
    unlock();
    return result;
}
ssize_t sendfile(int out, int in, off_t *offset, size_t count) { return sendfile64(out, in, offset, count); }

ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t count, unsigned flags) {
    REAL(ssize_t, copy_file_range, int, off64_t *, int, off64_t *, size_t, unsigned);
    char full[PATH_MAX];
    const char *relative;
    struct stat info;
    if (!of_fd(out, full, &relative, &info)) return real_copy_file_range(in, from, out, to, count, flags);
    lock();
    off64_t at = to ? *to : lseek64(out, 0, SEEK_CUR);
    ssize_t result = failing(OP_WRITE, relative) ? -1 : real_copy_file_range(in, from, out, to, count, flags);
    if (result > 0) put_written(out, info.st_ino, relative, at, result);
    unlock();
    return result;
}

static int sized(int fd, off64_t length, int grow_only) {
    REAL(int, ftruncate64, int, off64_t);
    REAL(int, posix_fallocate64, int, off64_t, off64_t);
    char full[PATH_MAX];
    const char *relative;
    struct stat info;
    if (!of_fd(fd, full, &relative, &info))
        return grow_only ? real_posix_fallocate64(fd, 0, length) : real_ftruncate64(fd, length);
    lock();
    fstat(fd, &info);
    int result;
    if (failing(OP_TRUNCATE, relative)) result = grow_only ? (int)control->error : -1;
    else result = grow_only ? real_posix_fallocate64(fd, 0, length) : real_ftruncate64(fd, length);
    if (!result && !(grow_only && length <= info.st_size)) put('T', 0, info.st_ino, 0, length, relative, NULL, NULL, 0, 0);
    unlock();
    return result;
}
int ftruncate64(int fd, off64_t length) { return sized(fd, length, 0); }
int ftruncate(int fd, off_t length) { return sized(fd, length, 0); }
int posix_fallocate64(int fd, off64_t offset, off64_t length) { return sized(fd, offset + length, 1); }
int posix_fallocate(int fd, off_t offset, off_t length) { return sized(fd, offset + length, 1); }

int truncate64(const char *path, off64_t length) {
    int fd = opened(AT_FDCWD, path, O_WRONLY | O_CLOEXEC, 0);
    if (fd < 0) return -1;
    int result = sized(fd, length, 0), saved = errno;
    close(fd);
    errno = saved;
    return result;
}
int truncate(const char *path, off_t length) { return truncate64(path, length); }

int fallocate64(int fd, int mode, off64_t offset, off64_t length) {
    REAL(int, fallocate64, int, int, off64_t, off64_t);
    char full[PATH_MAX];
    const char *relative;
    struct stat info;
    int result = real_fallocate64(fd, mode, offset, length);
    if (!result && of_fd(fd, full, &relative, &info)) {
        lock();
        if (mode) put('!', 0, info.st_ino, 0, 0, relative, "fallocate mode", NULL, 0, 0);
        else put('T', 0, info.st_ino, 0, info.st_size, relative, NULL, NULL, 0, 0);
        unlock();
    }
    return result;
}
int fallocate(int fd, int mode, off_t offset, off_t length) { return fallocate64(fd, mode, offset, length); }

static int synced(int fd, int data_only) {
    REAL(int, fsync, int);
    REAL(int, fdatasync, int);
    char full[PATH_MAX];
    const char *relative;
    struct stat info;
    if (!of_fd(fd, full, &relative, &info)) return data_only ? real_fdatasync(fd) : real_fsync(fd);
    lock();
    int result = -1;
    if (!failing(OP_SYNC, relative)) result = data_only ? real_fdatasync(fd) : real_fsync(fd);
    if (!result) put('S', data_only, info.st_ino, 0, 0, relative, NULL, NULL, 0, 0);
    unlock();
    return result;
}
int fsync(int fd) { return synced(fd, 0); }
int fdatasync(int fd) { return synced(fd, 1); }

static void note_mapping(int fd, int protection, int flags) {
    char full[PATH_MAX];
    const char *relative;
    struct stat info;
    if (!(protection & PROT_WRITE) || !(flags & MAP_SHARED) || !of_fd(fd, full, &relative, &info)) return;
    lock();
    put('P', 0, info.st_ino, 0, 0, relative, NULL, NULL, 0, 0);
    unlock();
}
void *mmap64(void *at, size_t length, int protection, int flags, int fd, off64_t offset) {
    REAL(void *, mmap64, void *, size_t, int, int, int, off64_t);
    if (fd >= 0) note_mapping(fd, protection, flags);
    return real_mmap64(at, length, protection, flags, fd, offset);
}
void *mmap(void *at, size_t length, int protection, int flags, int fd, off_t offset) {
    REAL(void *, mmap, void *, size_t, int, int, int, off_t);
    if (fd >= 0) note_mapping(fd, protection, flags);
    return real_mmap(at, length, protection, flags, fd, offset);
}

/* Sockets: what leaves is written down before it leaves, what comes after it came. */

static int port_of(int fd, int (*ask)(int, struct sockaddr *, socklen_t *)) {
    struct sockaddr_in6 address;
    socklen_t size = sizeof address;
    if (ask(fd, (struct sockaddr *)&address, &size)) return -1;
    if (address.sin6_family == AF_INET) return ntohs(((struct sockaddr_in *)&address)->sin_port);
    return address.sin6_family == AF_INET6 ? ntohs(address.sin6_port) : -1;
}

static void note_socket(int fd, const struct iovec *parts, int count, int kind, ssize_t received) {
    struct stat info;
    if (!ready || trace_fd < 0 || (ours < 0 && peers < 0)) return;
    int saved = errno;
    int mine = kind == 'N' && ours >= 0 && port_of(fd, getsockname) == ours;
    if (mine || (peers >= 0 && port_of(fd, getpeername) == peers)) {
        fstat(fd, &info);
        size_t most = mine ? SENT_BYTES : HEAD_BYTES;
        lock();
        if (received >= 0 && (size_t)received < most) most = received;
        put(kind, mine, info.st_ino, 0, 0, NULL, NULL, parts, count, most);
        unlock();
    }
    errno = saved;
}

ssize_t send(int fd, const void *data, size_t count, int flags) {
    REAL(ssize_t, send, int, const void *, size_t, int);
    struct iovec part = {(void *)data, count};
    note_socket(fd, &part, 1, 'N', -1);
    return real_send(fd, data, count, flags);
}
ssize_t sendto(int fd, const void *data, size_t count, int flags, const struct sockaddr *to, socklen_t size) {
    REAL(ssize_t, sendto, int, const void *, size_t, int, const struct sockaddr *, socklen_t);
    struct iovec part = {(void *)data, count};
    if (!to) note_socket(fd, &part, 1, 'N', -1);
    return real_sendto(fd, data, count, flags, to, size);
}
ssize_t sendmsg(int fd, const struct msghdr *message, int flags) {
    REAL(ssize_t, sendmsg, int, const struct msghdr *, int);
    note_socket(fd, message->msg_iov, message->msg_iovlen, 'N', -1);
    return real_sendmsg(fd, message, flags);
}
ssize_t recv(int fd, void *data, size_t count, int flags) {
    REAL(ssize_t, recv, int, void *, size_t, int);
    ssize_t result = real_recv(fd, data, count, flags);
    struct iovec part = {data, count};
    if (result > 0) note_socket(fd, &part, 1, 'G', result);
    return result;
}
