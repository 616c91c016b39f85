/* A program that misuses KVM: what its parts share.  Random numbers come from one seed per thread. */
#ifndef HOSTILE_H
#define HOSTILE_H

#include <errno.h>
#include <linux/kvm.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#define PAGE 4096UL
#define GUEST_SIZE (4UL << 20)
#define SHAKY_SIZE (64 * PAGE)
#define MOST 1024 /* bytes of an argument that is made here */

enum kind { KVM, SEV, VM, VCPU, GMEM, STATS, ORDINARY, CLOSED, KINDS };

enum what {
	IOCTL_KVM, IOCTL_SEV, IOCTL_VM, IOCTL_VCPU, IOCTL_GMEM, IOCTL_STATS, IOCTL_ORDINARY, IOCTL_CLOSED,
	RUN, OPEN, CLOSE, DUP, DUP2, FCNTL, READ, WRITE, LSEEK, FTRUNCATE, FALLOCATE, FSTAT, POLL, MMAP, MUNMAP,
	MADVISE, MPROTECT, FORK, SIGNAL, FILL, WHATS
};
#define NAMES "ioctl kvm", "ioctl sev", "ioctl vm", "ioctl vcpu", "ioctl gmem", "ioctl stats", "ioctl ordinary", \
	"ioctl closed", "KVM_RUN", "open", "close", "dup", "dup2", "fcntl", "read", "write", "lseek", "ftruncate", \
	"fallocate", "fstat", "poll", "mmap", "munmap", "madvise", "mprotect", "fork", "signal", "fd limit"
#define ERRNOS 136

/* The file that outlives the program, however it ends: counts, and the last calls of each thread. */
#define THREADS 4
#define LAST 16
struct tally {
	uint64_t count[WHATS][ERRNOS];
	struct { uint64_t at; struct { uint64_t what, fd, request, arg; } call[LAST]; } last[THREADS];
};
extern struct tally *tally;
extern __thread int self;

/* arguments.c */
extern __thread uint64_t seed;
extern uint8_t *guest, *shaky;
uint64_t rnd(void);
static inline uint64_t below(uint64_t n) { return rnd() % n; }
static inline bool once_in(uint64_t n) { return below(n) == 0; }
void make_memory(void);
void change_memory(void);
uint64_t value(void);
uint64_t nowhere(void);
void *place(const void *data, size_t size, bool others);
void poke(void *addr, const void *data, size_t size);
size_t half_valid(unsigned int request, uint8_t *data, int sev_fd, int gmem_fd);

/* guest.c */
int make_guest(int kvm_fd, int *vm, struct kvm_run **run);

long count(enum what what, uint64_t fd, uint64_t request, uint64_t arg, long result);

#endif
