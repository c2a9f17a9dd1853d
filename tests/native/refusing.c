/* Stands before the C library of a daemon: counts its system calls about files, and has one of them fail.

   REFUSING names a file that holds struct control, which the test maps, too. Integers and pointers are passed in the
   same way whatever a function calls them, so that one shape serves for all. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

struct control {
    int armed;
    int fail_at; /* the first call that fails, counted from 1 */
    int fail_to; /* the last one */
    int number;  /* the error it fails with */
    int count;   /* calls since the test armed it */
    char name[32];
};

typedef long call(long, long, long, long, long, long);

static struct control *control;

__attribute__((constructor)) static void begin(void)
{
    int fd = ((call *)dlsym(RTLD_NEXT, "open"))((long)getenv("REFUSING"), 2, 0, 0, 0, 0);
    void *at = mmap(NULL, sizeof(struct control), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

    if (at == MAP_FAILED)
        abort();
    control = at;
}

static int fails(const char *name)
{
    int count;

    if (!control || !control->armed)
        return 0;
    count = __atomic_add_fetch(&control->count, 1, __ATOMIC_SEQ_CST);
    if (count < control->fail_at || count > control->fail_to)
        return 0;
    strncpy(control->name, name, sizeof(control->name) - 1);
    errno = control->number;
    return 1;
}

#define CALL(name)                                                        \
    long name(long a, long b, long c, long d, long e, long f)             \
    {                                                                     \
        static call *real;                                                \
                                                                          \
        if (!real)                                                        \
            real = (call *)dlsym(RTLD_NEXT, #name);                       \
        return fails(#name) ? -1 : real(a, b, c, d, e, f);                \
    }

CALL(chmod) CALL(chown) CALL(copy_file_range) CALL(fallocate) CALL(fallocate64) CALL(fchmod) CALL(fchmodat)
CALL(fchown) CALL(fchownat) CALL(fdatasync) CALL(fgetxattr) CALL(flistxattr) CALL(fremovexattr) CALL(fsetxattr)
CALL(fstat) CALL(fstat64) CALL(fstatat) CALL(fstatat64) CALL(fstatfs) CALL(fstatfs64) CALL(fstatvfs) CALL(fstatvfs64)
CALL(fsync) CALL(ftruncate) CALL(ftruncate64) CALL(futimens) CALL(getdents64) CALL(getxattr) CALL(lchown)
CALL(lgetxattr) CALL(linkat) CALL(listxattr) CALL(llistxattr) CALL(lremovexattr) CALL(lseek) CALL(lseek64)
CALL(lsetxattr) CALL(lstat) CALL(lstat64) CALL(mkdir) CALL(mkdirat) CALL(mknod) CALL(mknodat)
CALL(name_to_handle_at) CALL(open) CALL(open64) CALL(open_by_handle_at) CALL(openat) CALL(openat64) CALL(pread)
CALL(pread64) CALL(preadv2) CALL(preadv64v2) CALL(pwrite) CALL(pwrite64) CALL(readlink) CALL(readlinkat)
CALL(removexattr) CALL(rename) CALL(renameat) CALL(renameat2) CALL(rmdir) CALL(setxattr) CALL(stat) CALL(stat64)
CALL(statx) CALL(symlink) CALL(symlinkat) CALL(sync_file_range) CALL(syncfs) CALL(unlink) CALL(unlinkat)
CALL(utimensat)

/* openat2(2), fchmodat2(2) and those that take xattrs by name, for which the C library may have no function. */
long syscall(long number, long a, long b, long c, long d, long e, long f)
{
    static long (*real)(long, long, long, long, long, long, long);

    if (!real)
        real = (long (*)(long, long, long, long, long, long, long))dlsym(RTLD_NEXT, "syscall");
    if (number == 437 || number == 452 || (number >= 463 && number <= 466))
        if (fails(number == 437 ? "openat2" : number == 452 ? "fchmodat2" : "xattrat"))
            return -1;
    return real(number, a, b, c, d, e, f);
}
