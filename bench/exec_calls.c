/* What system calls cost: run as it is, or caught by softcvm exec.
 *
 * exec_calls pingpong | syscall | ioctl | slots N    prints seconds: of one round trip between two processes
 * over a Unix socket, of one getppid(), of one ioctl of /dev/kvm, and of one of N memory slots of a VM.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define ROUNDS 20000L
#define SYSCALLS 1000000L
#define SLOT 0x200000UL

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

static int report(double begun, long count)
{
	printf("%.9g\n", (now() - begun) / count);
	return 0;
}

static int pingpong(void)
{
	double begun;
	char byte = 0;
	int ends[2];
	pid_t child;

	if (socketpair(AF_UNIX, SOCK_STREAM, 0, ends))
		return failed("socketpair");
	child = fork();
	if (child < 0)
		return failed("fork");
	if (!child) {
		close(ends[0]);
		while (read(ends[1], &byte, 1) == 1 && write(ends[1], &byte, 1) == 1)
			;
		_exit(0);
	}
	close(ends[1]);
	begun = now();
	for (long i = 0; i < ROUNDS; i++)
		if (write(ends[0], &byte, 1) != 1 || read(ends[0], &byte, 1) != 1)
			return failed("socket");
	report(begun, ROUNDS);
	close(ends[0]);
	waitpid(child, NULL, 0);
	return 0;
}

static int syscalls(void)
{
	double begun = now();

	for (long i = 0; i < SYSCALLS; i++)
		syscall(SYS_getppid);
	return report(begun, SYSCALLS);
}

static int ioctls(int kvm)
{
	double begun = now();

	for (long i = 0; i < ROUNDS; i++)
		if (ioctl(kvm, KVM_CHECK_EXTENSION, KVM_CAP_NR_MEMSLOTS) <= 0)
			return failed("KVM_CHECK_EXTENSION");
	return report(begun, ROUNDS);
}

static int slots(int kvm, long count)
{
	struct kvm_userspace_memory_region region = { .memory_size = SLOT };
	int vm = ioctl(kvm, KVM_CREATE_VM, 0);
	double begun;
	void *memory;

	if (vm < 0)
		return failed("KVM_CREATE_VM");
	memory = mmap(NULL, SLOT, PROT_READ | PROT_WRITE,
		      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (memory == MAP_FAILED)
		return failed("mmap");
	region.userspace_addr = (unsigned long)memory;
	begun = now();
	for (long i = 0; i < count; i++) {
		region.slot = i;
		region.guest_phys_addr = i * SLOT;
		if (ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region))
			return failed("KVM_SET_USER_MEMORY_REGION");
	}
	return report(begun, count);
}

int main(int argc, char **argv)
{
	const char *what = argc > 1 ? argv[1] : "";
	int kvm;

	if (!strcmp(what, "pingpong"))
		return pingpong();
	if (!strcmp(what, "syscall"))
		return syscalls();
	kvm = open("/dev/kvm", O_RDWR);
	if (kvm < 0)
		return failed("/dev/kvm");
	return argc > 2 ? slots(kvm, atol(argv[2])) : ioctls(kvm);
}
