/* What single operations cost on the real guest_memfd of this machine.
 *
 * real_gmem pair | bulk | touch     prints seconds: of one fallocate() and punch of a page, of 1 GiB
 * filled and punched, of one touch of a fresh page.  Exit status 2: this kernel cannot do it.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>

/* Older headers do not have these (Linux 6.8, 6.18). */
struct create_guest_memfd {
	__u64 size;
	__u64 flags;
	__u64 reserved[6];
};
#define CREATE_GUEST_MEMFD _IOWR(0xAE, 0xd4, struct create_guest_memfd)
#define MMAP_AND_INIT_SHARED 3

#define PAGE 4096L
#define PAGES 65536L
#define GIB (1L << 30)
#define KEEP_SIZE 1
#define PUNCH_HOLE (KEEP_SIZE | 2)

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec * 1e-9;
}

static int failed(const char *what)
{
	perror(what);
	return 2;
}

static int pairs(int fd)
{
	for (long i = 0; i < PAGES; i++)
		if (fallocate(fd, KEEP_SIZE, i * PAGE, PAGE) ||
		    fallocate(fd, PUNCH_HOLE, i * PAGE, PAGE))
			return failed("fallocate of a page");
	return 0;
}

static int bulk(int fd)
{
	if (fallocate(fd, KEEP_SIZE, 0, GIB) || fallocate(fd, PUNCH_HOLE, 0, GIB))
		return failed("fallocate of 1 GiB");
	return 0;
}

int main(int argc, char **argv)
{
	const char *what = argc > 1 ? argv[1] : "";
	int touches = !strcmp(what, "touch"), many = strcmp(what, "bulk") != 0;
	struct create_guest_memfd args = { .size = GIB };
	volatile char *at = NULL;
	int kvm, vm, fd, status = 0;
	double begun;

	kvm = open("/dev/kvm", O_RDWR);
	if (kvm < 0)
		return failed("/dev/kvm");
	vm = ioctl(kvm, KVM_CREATE_VM, 0);
	if (vm < 0)
		return failed("KVM_CREATE_VM");
	args.flags = touches ? MMAP_AND_INIT_SHARED : 0;
	fd = ioctl(vm, CREATE_GUEST_MEMFD, &args);
	if (fd < 0)
		return failed("KVM_CREATE_GUEST_MEMFD");
	if (touches) {
		at = mmap(NULL, GIB, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
		if (at == MAP_FAILED)
			return failed("mmap");
	}
	begun = now();
	if (touches)
		for (long i = 0; i < PAGES; i++)
			at[i * PAGE] = 1;
	else
		status = many ? pairs(fd) : bulk(fd);
	printf("%.9g\n", (now() - begun) / (many ? PAGES : 1));
	return status;
}
