/* Reads a block again and again, through the library and past it. To the library it is a PostgreSQL server, since it
 * exports what one exports. Prints the least nanoseconds per call of either. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>

bool enableFsync = true;
int wal_segment_size = 1 << 20;
int MyBackendType = 1;
volatile uint32_t CritSectionCount = 0;
volatile sig_atomic_t ProcDiePending = 0;
void PostmasterMain(void) {}
bool RecoveryInProgress(void) { return false; }
uint64_t GetXLogInsertRecPtr(void) { return 0x1000000; }
uint64_t GetCurrentReplayRecPtr(void *timeline) { (void)timeline; return 0; }

typedef ssize_t (*pread_function)(int, void *, size_t, off_t);

/* Rounds shorter than a time slice: among many, some are not interrupted. */
enum { CALLS = 500, ROUNDS = 2000, BLOCKS = 16 };

static double round_ns(pread_function function, int fd)
{
    static char buffer[8192];
    struct timespec start, end;
    clock_gettime(CLOCK_MONOTONIC, &start);
    for (int call = 0; call < CALLS; call++)
        if (function(fd, buffer, sizeof buffer, (off_t)(call % BLOCKS) * 8192) != sizeof buffer)
            return -1;
    clock_gettime(CLOCK_MONOTONIC, &end);
    return ((end.tv_sec - start.tv_sec) * 1e9 + (end.tv_nsec - start.tv_nsec)) / CALLS;
}

int main(int count, char **arguments)
{
    pread_function plain = (pread_function)dlsym(dlopen("libc.so.6", RTLD_NOW), "pread");
    double best[2] = {1e9, 1e9};
    if (count != 2 || chdir(arguments[1]) != 0 || plain == NULL || plain == pread)
        return 1;
    int fd = open("base/1/2", O_RDWR);
    for (int round = 0; round < ROUNDS; round++) {
        double ns[2] = {round_ns(pread, fd), round_ns(plain, fd)};
        for (int which = 0; which < 2; which++) {
            if (ns[which] < 0)
                return 2;
            if (ns[which] < best[which])
                best[which] = ns[which];
        }
    }
    printf("%.1f %.1f\n", best[0], best[1]);
    return 0;
}
