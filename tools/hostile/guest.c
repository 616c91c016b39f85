/* A VM whose vCPU executes garbage in 64-bit mode. */
#include "hostile.h"
#include <sys/ioctl.h>

#define CODE 0x8000
#define TABLES 0x1000
#define LOW (2UL << 20)

static const char *const snippets[] = {
	"\xF4", "\x0F\xA2", "\x0F\x01\xD9", "\xEB\xFE", "\xEE", "\xEC", "\xE6\x80", "\xE4\x71", "\x0F\x32", "\x0F\x30",
	"\x48\x89\x07", "\x48\x8B\x06", "\x50", "\x58", "\xFA", "\xFB", "\x0F\x0B", "\xCC", "\x0F\x22\xD8", "\x0F\x20\xC0",
	"\x48\xFF\xC0", "\xF3\xA4", "\xC3", "\x90", "\x48\x31\xC0", "\x0F\x31", "\xFF\xE0",
};

static void garbage(uint8_t *code, size_t size)
{
	for (size_t at = 0; at < size;) {
		const char *snippet = snippets[below(sizeof(snippets) / sizeof(*snippets))];

		if (once_in(12)) {
			code[at++] = rnd();
			continue;
		}
		for (; *snippet && at < size; snippet++)
			code[at++] = *snippet;
	}
}

/* Page tables that map the low 2M to themselves, and code. */
static void fill_memory(uint8_t *memory)
{
	uint64_t entry = TABLES + PAGE + 7;
	uint8_t code[256];

	poke(memory + TABLES, &entry, 8);
	entry += PAGE;
	poke(memory + TABLES + PAGE, &entry, 8);
	entry = 0x87;
	poke(memory + TABLES + 2 * PAGE, &entry, 8);
	if (once_in(2)) { /* and something else above them */
		entry = value() | 0x87;
		poke(memory + TABLES + 2 * PAGE + 8, &entry, 8);
	}
	garbage(code, sizeof(code));
	poke(memory + CODE, code, sizeof(code));
}

static void registers(int vcpu)
{
	struct kvm_sregs sregs;
	struct kvm_regs regs;
	uint64_t *word = (uint64_t *)&regs;

	if (ioctl(vcpu, KVM_GET_SREGS, &sregs) < 0)
		return;
	sregs.cs.l = 1;
	sregs.cs.db = 0;
	sregs.cs.base = 0;
	sregs.cs.selector = 8;
	sregs.cr3 = TABLES;
	sregs.cr4 = 0x20;
	sregs.efer = 0x500;
	sregs.cr0 = 0x80000011;
	ioctl(vcpu, KVM_SET_SREGS, &sregs);
	for (size_t i = 0; i < sizeof(regs) / 8; i++)
		word[i] = value();
	regs.rip = once_in(8) ? value() : CODE + below(64);
	regs.rsp = once_in(8) ? value() : LOW - 8 * below(64);
	regs.rflags = 2;
	ioctl(vcpu, KVM_SET_REGS, &regs);
}

/* The vCPU's descriptor, or -1; its VM's and the page that it shares are given back too. */
int make_guest(int kvm_fd, int *vm, struct kvm_run **run)
{
	uint8_t *memory = guest + PAGE * below(512);
	struct kvm_userspace_memory_region region = { .memory_size = LOW, .userspace_addr = (uint64_t)memory };
	int vcpu;

	*vm = ioctl(kvm_fd, KVM_CREATE_VM, below(2));
	if (*vm < 0)
		return -1;
	fill_memory(memory);
	ioctl(*vm, KVM_SET_USER_MEMORY_REGION, &region);
	vcpu = ioctl(*vm, KVM_CREATE_VCPU, below(4));
	if (vcpu < 0)
		return -1;
	registers(vcpu);
	*run = mmap(NULL, 3 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
	if (*run == MAP_FAILED)
		*run = NULL;
	return vcpu;
}
