/* The floor of any FUSE filesystem: how long it takes to ask a daemon that does nothing but say that there is none.
 *
 * roundtrip MOUNTPOINT COUNT mounts itself, looks COUNT missing names up, again while processors are kept awake
 * (/dev/cpu_dma_latency), and prints the microseconds of one look-up of each kind, the lesser of five rounds by turns.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { ROOM = 64 << 10, ROUNDS = 5 };

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

static void answer(int device, const struct fuse_in_header *asked)
{
    struct {
        struct fuse_out_header head;
        union {
            struct fuse_init_out init;
            struct fuse_attr_out attributes;
        } body;
    } out;
    memset(&out, 0, sizeof out);
    out.head.unique = asked->unique;
    out.head.len = sizeof out.head;
    switch (asked->opcode) {
    case FUSE_FORGET:
    case FUSE_BATCH_FORGET:
        return;
    case FUSE_INIT:
        out.body.init.major = FUSE_KERNEL_VERSION;
        out.body.init.minor = 31;
        out.body.init.max_write = 4096;
        out.head.len += sizeof out.body.init;
        break;
    case FUSE_GETATTR:
        out.body.attributes.attr_valid = 1000;
        out.body.attributes.attr.ino = FUSE_ROOT_ID;
        out.body.attributes.attr.mode = S_IFDIR | 0755;
        out.body.attributes.attr.nlink = 2;
        out.head.len += sizeof out.body.attributes;
        break;
    default:
        out.head.error = asked->opcode == FUSE_LOOKUP ? -ENOENT : -ENOSYS;
    }
    if (write(device, &out, out.head.len) < 0 && errno != ENOENT && errno != ENODEV)
        fail("answer");
}

static void serve(int device)
{
    static char room[ROOM];
    for (;;) {
        if (read(device, room, ROOM) >= 0)
            answer(device, (const struct fuse_in_header *)room);
        else if (errno == ENODEV)
            exit(0);
        else if (errno != EINTR && errno != ENOENT)
            fail("read");
    }
}

static double look_up(const char *mountpoint, long count, int round)
{
    struct timespec began, ended;
    struct stat st;
    char path[4096];
    clock_gettime(CLOCK_MONOTONIC, &began);
    for (long number = 0; number < count; number++) {
        snprintf(path, sizeof path, "%s/%d-%ld", mountpoint, round, number);
        if (stat(path, &st) == 0 || errno != ENOENT)
            fail(path);
    }
    clock_gettime(CLOCK_MONOTONIC, &ended);
    return ((ended.tv_sec - began.tv_sec) * 1e6 + (ended.tv_nsec - began.tv_nsec) / 1e3) / count;
}

static double awake(const char *mountpoint, long count, int round)
{
    int latency = open("/dev/cpu_dma_latency", O_WRONLY), none = 0;
    if (latency < 0 || write(latency, &none, sizeof none) != sizeof none)
        fail("/dev/cpu_dma_latency");
    double taken = look_up(mountpoint, count, round);
    close(latency);
    return taken;
}

int main(int argc, char **argv)
{
    if (argc != 3) {
        fprintf(stderr, "usage: roundtrip MOUNTPOINT COUNT\n");
        return 2;
    }
    char options[100];
    double best[2] = {1e9, 1e9};
    int device = open("/dev/fuse", O_RDWR | O_CLOEXEC);
    if (device < 0)
        fail("/dev/fuse");
    snprintf(options, sizeof options, "fd=%d,rootmode=40000,user_id=0,group_id=0", device);
    if (mount("roundtrip", argv[1], "fuse.roundtrip", 0, options) != 0)
        fail(argv[1]);
    pid_t daemon = fork();
    if (daemon == 0)
        serve(device);
    if (daemon < 0)
        fail("fork");
    close(device);
    for (int round = 0; round < 2 * ROUNDS; round++) {
        double taken = (round % 2 ? awake : look_up)(argv[1], atol(argv[2]), round);
        if (taken < best[round % 2])
            best[round % 2] = taken;
    }
    if (umount(argv[1]) != 0)
        fail("umount");
    waitpid(daemon, NULL, 0);
    printf("%.2f %.2f\n", best[0], best[1]);
    return 0;
}
