// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * A VMM of the least size: launches one SNP guest through linux/kvm.h, and prints a line per exit to user space.
 *
 * The guest is the assembly at the end.  It is entered in 64-bit mode with its page table in place, talks to KVM by
 * the GHCB MSR protocol and through a GHCB page, converts one page both ways by each of them and once by using it,
 * and leaves what it saw in a shared page, which is printed after it has asked to be ended.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#define SIZE 0x200000UL
#define CODE 0x1000UL
#define TABLES 0x10000UL
#define GDT 0x20000UL
#define IDT 0x21000UL
#define STACK_PAGE 0x2f000UL
#define GHCB 0x40000UL
#define LOG 0x41000UL
#define DATA 0x50000UL
#define ALIAS 0x150000UL
#define SECRETS 0x60000UL
#define C_BIT (1UL << 51)

extern const char guest_code[], guest_vc[], guest_end[];

static int kvm, vm, vcpu, sev;
static uint8_t *memory;

static long check(long result, const char *what)
{
	if (result < 0) {
		printf("%s: %s\n", what, strerror(errno));
		exit(1);
	}
	return result;
}

static void sev_command(uint32_t id, void *data, const char *what)
{
	struct kvm_sev_cmd command = { .id = id, .data = (uintptr_t)data, .sev_fd = sev };

	check(ioctl(vm, KVM_MEMORY_ENCRYPT_OP, &command), what);
}

static void set_private(uint64_t gpa, uint64_t size, int private)
{
	struct kvm_memory_attributes attributes = {
		.address = gpa,
		.size = size,
		.attributes = private ? KVM_MEMORY_ATTRIBUTE_PRIVATE : 0,
	};

	check(ioctl(vm, KVM_SET_MEMORY_ATTRIBUTES, &attributes), "KVM_SET_MEMORY_ATTRIBUTES");
}

static void launch(uint64_t gpa, const uint8_t *source, uint64_t size, uint8_t type)
{
	struct kvm_sev_snp_launch_update update = {
		.gfn_start = gpa >> 12,
		.uaddr = (uintptr_t)source,
		.len = size,
		.type = type,
	};

	while (update.len)
		sev_command(KVM_SEV_SNP_LAUNCH_UPDATE, &update, "KVM_SEV_SNP_LAUNCH_UPDATE");
}

static void put(uint64_t gpa, uint64_t value)
{
	memcpy(memory + gpa, &value, 8);
}

static void write_image(void)
{
	uint64_t vc = CODE + (guest_vc - guest_code);

	memcpy(memory + CODE, guest_code, guest_end - guest_code);
	put(TABLES, (TABLES + 0x1000) | C_BIT | 3);
	put(TABLES + 0x1000, (TABLES + 0x2000) | C_BIT | 3);
	put(TABLES + 0x2000, (TABLES + 0x3000) | C_BIT | 3);
	for (uint64_t page = 0; page < SIZE; page += 0x1000)
		put(TABLES + 0x3000 + page / 512, page | 3 | (page == GHCB || page == LOG ? 0 : C_BIT));
	put(TABLES + 0x3000 + ALIAS / 512, DATA | 3);
	put(GDT + 8, 0x00af9b000000ffff);
	put(GDT + 16, 0x00cf93000000ffff);
	put(IDT + 16 * 29, (vc & 0xffff) | 8 << 16 | 0x8e00UL << 32 | (vc >> 16) << 48);
}

static struct kvm_segment segment(uint16_t selector, uint8_t type, int code)
{
	return (struct kvm_segment){
		.limit = 0xffffffff, .selector = selector, .type = type, .present = 1, .s = 1,
		.db = !code, .l = code, .g = 1,
	};
}

static void set_registers(void)
{
	struct kvm_regs regs = { .rip = CODE, .rsp = STACK_PAGE + 0x1000, .rflags = 2 };
	struct kvm_sregs sregs;

	check(ioctl(vcpu, KVM_GET_SREGS, &sregs), "KVM_GET_SREGS");
	sregs.cs = segment(8, 11, 1);
	sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = segment(16, 3, 0);
	sregs.gdt = (struct kvm_dtable){ .base = GDT, .limit = 23 };
	sregs.idt = (struct kvm_dtable){ .base = IDT, .limit = 0xfff };
	sregs.cr0 = 0x80050033;
	sregs.cr3 = TABLES | C_BIT;
	sregs.cr4 = 0x220;
	sregs.efer = 0xd00;
	check(ioctl(vcpu, KVM_SET_SREGS, &sregs), "KVM_SET_SREGS");
	check(ioctl(vcpu, KVM_SET_REGS, &regs), "KVM_SET_REGS");
}

static void set_cpuid(void)
{
	struct kvm_cpuid2 *cpuid = calloc(1, sizeof(*cpuid) + 256 * sizeof(struct kvm_cpuid_entry2));

	cpuid->nent = 256;
	check(ioctl(kvm, KVM_GET_SUPPORTED_CPUID, cpuid), "KVM_GET_SUPPORTED_CPUID");
	check(ioctl(vcpu, KVM_SET_CPUID2, cpuid), "KVM_SET_CPUID2");
	free(cpuid);
}

static void create_vm(void)
{
	struct kvm_sev_init init = { 0 };
	struct kvm_enable_cap hypercalls = { .cap = KVM_CAP_EXIT_HYPERCALL, .args = { 1 << 12 } };

	kvm = check(open("/dev/kvm", O_RDWR), "/dev/kvm");
	sev = check(open("/dev/sev", O_RDWR), "/dev/sev");
	vm = check(ioctl(kvm, KVM_CREATE_VM, KVM_X86_SNP_VM), "KVM_CREATE_VM");
	check(ioctl(vm, KVM_ENABLE_CAP, &hypercalls), "KVM_ENABLE_CAP");
	sev_command(KVM_SEV_INIT2, &init, "KVM_SEV_INIT2");
}

/* Private memory at a guest physical address; what it is filled from, and later the shared side of it. */
static uint8_t *add_memory(uint32_t slot, uint64_t gpa, uint64_t size)
{
	struct kvm_create_guest_memfd create = { .size = size };
	struct kvm_userspace_memory_region2 region = {
		.slot = slot,
		.flags = KVM_MEM_GUEST_MEMFD,
		.guest_phys_addr = gpa,
		.memory_size = size,
	};
	void *shared = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	region.userspace_addr = (uintptr_t)shared;
	region.guest_memfd = check(ioctl(vm, KVM_CREATE_GUEST_MEMFD, &create), "KVM_CREATE_GUEST_MEMFD");
	check(ioctl(vm, KVM_SET_USER_MEMORY_REGION2, &region), "KVM_SET_USER_MEMORY_REGION2");
	set_private(gpa, size, 1);
	return shared;
}

static void create_vcpu(void)
{
	vcpu = check(ioctl(vm, KVM_CREATE_VCPU, 0), "KVM_CREATE_VCPU");
	set_cpuid();
}

static void launch_start(void)
{
	struct kvm_sev_snp_launch_start start = { .policy = 0x30000 };

	sev_command(KVM_SEV_SNP_LAUNCH_START, &start, "KVM_SEV_SNP_LAUNCH_START");
}

static void launch_finish(void)
{
	struct kvm_sev_snp_launch_finish finish = { 0 };

	sev_command(KVM_SEV_SNP_LAUNCH_FINISH, &finish, "KVM_SEV_SNP_LAUNCH_FINISH");
}

static void launch_guest(void)
{
	memory = add_memory(0, 0, SIZE);
	set_private(GHCB, 0x2000, 0);
	create_vcpu();
	set_registers();
	write_image();
	launch_start();
	launch(CODE, memory + CODE, 0x1000, KVM_SEV_SNP_PAGE_TYPE_NORMAL);
	launch(TABLES, memory + TABLES, 0x4000, KVM_SEV_SNP_PAGE_TYPE_NORMAL);
	launch(GDT, memory + GDT, 0x2000, KVM_SEV_SNP_PAGE_TYPE_NORMAL);
	launch(STACK_PAGE, memory + STACK_PAGE, 0x1000, KVM_SEV_SNP_PAGE_TYPE_ZERO);
	launch(DATA, memory + DATA, 0x1000, KVM_SEV_SNP_PAGE_TYPE_UNMEASURED);
	launch(SECRETS, memory + SECRETS, 0x1000, KVM_SEV_SNP_PAGE_TYPE_SECRETS);
	launch_finish();
}

/* A firmware image below 4 GiB, then sections GPA:SIZE:TYPE of low memory, all zero; the vCPU as KVM resets it. */
static void launch_firmware(char **argv)
{
	int fd = check(open(argv[0], O_RDONLY), argv[0]);
	uint64_t size = check(lseek(fd, 0, SEEK_END), argv[0]);
	uint64_t gpa = (1UL << 32) - size, length, type;
	uint8_t *image = add_memory(0, gpa, size), *low = add_memory(1, 0, 0x2000000);
	struct kvm_regs regs;

	check(pread(fd, image, size, 0), argv[0]);
	create_vcpu();
	launch_start();
	launch(gpa, image, size, KVM_SEV_SNP_PAGE_TYPE_NORMAL);
	while (*++argv) {
		if (sscanf(*argv, "%li:%li:%li", &gpa, &length, &type) != 3)
			exit(2);
		launch(gpa, low + gpa, length, type);
	}
	check(ioctl(vcpu, KVM_GET_REGS, &regs), "KVM_GET_REGS");
	printf("%#llx\n", regs.rdx);			/* the processor's signature, which is measured */
	launch_finish();
}

static uint64_t *seen(void)
{
	return (uint64_t *)(memory + DATA);
}

static void port(struct kvm_run *run)
{
	uint8_t *data = (uint8_t *)run + run->io.data_offset;

	printf("io %s %#x size %u count %u", run->io.direction ? "out" : "in", run->io.port, run->io.size,
	       run->io.count);
	if (run->io.direction == KVM_EXIT_IO_IN)
		*data = 0x5a;
	else
		printf(" %#x", *data);
	if (run->io.port == 0xe0) {
		printf(" host sees %#lx", *seen());
		*seen() = 0x3344;
	}
	printf("\n");
}

static int one_exit(struct kvm_run *run)
{
	switch (run->exit_reason) {
	case KVM_EXIT_IO:
		port(run);
		return 1;
	case KVM_EXIT_HYPERCALL:
		printf("hypercall %llu %#llx %llu %#llx\n", run->hypercall.nr, run->hypercall.args[0],
		       run->hypercall.args[1], run->hypercall.args[2]);
		set_private(run->hypercall.args[0], run->hypercall.args[1] << 12, run->hypercall.args[2] >> 4 & 1);
		run->hypercall.ret = 0;
		return 1;
	case KVM_EXIT_MEMORY_FAULT:
		printf("memory fault flags %#llx gpa %#llx size %#llx\n", run->memory_fault.flags,
		       run->memory_fault.gpa, run->memory_fault.size);
		set_private(run->memory_fault.gpa, run->memory_fault.size,
			    !!(run->memory_fault.flags & KVM_MEMORY_EXIT_FLAG_PRIVATE));
		return 1;
	case KVM_EXIT_SYSTEM_EVENT:
		printf("system event %u ndata %u %#llx\n", run->system_event.type, run->system_event.ndata,
		       run->system_event.data[0]);
		return 0;
	default:
		printf("exit %u\n", run->exit_reason);
		return 0;
	}
}

int main(int argc, char **argv)
{
	struct kvm_regs regs;
	struct kvm_run *run;
	int result;

	setvbuf(stdout, NULL, _IOLBF, 0);
	create_vm();
	if (argc > 1) {
		launch_firmware(argv + 1);
		return 0;
	}
	launch_guest();
	run = mmap(NULL, ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
	do {
		result = ioctl(vcpu, KVM_RUN, 0);
		if (result < 0 && errno != EFAULT) {
			printf("KVM_RUN: %s\n", strerror(errno));
			return 1;
		}
	} while (one_exit(run));
	for (int i = 0; i < 14; i++)
		printf("log %d %#lx\n", i, ((uint64_t *)(memory + LOG))[i]);
	printf("host sees %#lx of the private page\n", *seen());
	printf("registers: %s\n", ioctl(vcpu, KVM_GET_REGS, &regs) ? strerror(errno) : "readable");
	return 0;
}

asm("	.pushsection .rodata\n"
    "	.macro	seen n\n"			/* log RAX */
    "	mov	%rax, 0x41000 + 8 * \\n\n"
    "	.endm\n"
    "	.macro	msr_call low, high\n"		/* GHCB MSR protocol; the answer in RAX */
    "	mov	$0xc0010130, %ecx\n"
    "	mov	$\\low, %eax\n"
    "	mov	$\\high, %edx\n"
    "	call	exchange\n"
    "	.endm\n"
    "	.macro	page_call code, info_1, info_2\n"	/* through the GHCB page */
    "	mov	$\\code, %esi\n"
    "	mov	$\\info_1, %r8d\n"
    "	mov	$\\info_2, %r9d\n"
    "	call	through_page\n"
    "	.endm\n"
    "	.macro	pvalidate validate\n"		/* RAX: EAX, and CF in bit 32 */
    "	mov	$0x50000, %eax\n"
    "	xor	%ecx, %ecx\n"
    "	mov	$\\validate, %edx\n"
    "	.byte	0xf2, 0x0f, 0x01, 0xff\n"
    "	setc	%dl\n"
    "	movzx	%dl, %edx\n"
    "	shl	$32, %rdx\n"
    "	mov	%eax, %eax\n"
    "	or	%rdx, %rax\n"
    "	.endm\n"
    "guest_code:\n"
    "	msr_call 0x002, 0\n"			/* SEV information */
    "	seen	0\n"
    "	msr_call 0x080, 0\n"			/* hypervisor features */
    "	seen	1\n"
    "	msr_call 0x40012, 0\n"			/* register the GHCB */
    "	seen	2\n"
    "	mov	$0x41, %r10d\n"
    "	page_call 0x7b, 0x3f80010, 0\n"		/* OUT 0x3f8, 1 byte */
    "	page_call 0x7b, 0x0800011, 0\n"		/* IN 0x80, 1 byte */
    "	movzx	%al, %eax\n"
    "	seen	3\n"
    "	xor	%eax, %eax\n"
    "	xor	%ecx, %ecx\n"
    "	cpuid\n"				/* #VC */
    "	mov	%rbx, %rax\n"
    "	seen	5\n"
    "	movq	$0x7788, 0x50000\n"
    "	pvalidate 0\n"
    "	seen	6\n"
    "	msr_call 0x50014, 0x200000\n"		/* page state change: shared */
    "	seen	7\n"
    "	movq	$0x1122, 0x150000\n"
    "	mov	$1, %r10d\n"
    "	page_call 0x7b, 0x0e00010, 0\n"		/* OUT 0xe0: the host's turn */
    "	mov	0x150000, %rax\n"
    "	seen	8\n"
    "	movl	$0, 0x40800\n"			/* page state change by buffer: private */
    "	movl	$0, 0x40804\n"
    "	movabs	$0x0010000000050000, %rax\n"
    "	mov	%rax, 0x40808\n"
    "	page_call 0x80000010, 0, 0\n"
    "	pvalidate 1\n"
    "	seen	9\n"
    "	movq	$0x5566, 0x50000\n"
    "	mov	0x50000, %rax\n"
    "	seen	10\n"
    "	movq	$0x99, 0x150000\n"		/* used as shared while it is private */
    "	pvalidate 1\n"				/* used as private while it is shared */
    "	seen	11\n"
    "	mov	$0x50000, %eax\n"
    "	xor	%ecx, %ecx\n"
    "	mov	$0x101, %edx\n"
    "	.byte	0xf3, 0x0f, 0x01, 0xfe\n"	/* RMPADJUST: VMPL1 may read */
    "	seen	12\n"
    "	mov	0x60000, %eax\n"
    "	seen	13\n"
    "	msr_call 0x17100, 0\n"			/* end: set 7, reason 1 */
    "1:	hlt\n"
    "	jmp	1b\n"
    "exchange:\n"
    "	wrmsr\n"
    "	rep; vmmcall\n"
    "	rdmsr\n"
    "	shl	$32, %rdx\n"
    "	or	%rdx, %rax\n"
    "	ret\n"
    "through_page:\n"
    "	mov	%r10, 0x401f8\n"		/* RAX */
    "	mov	%rsi, 0x40390\n"
    "	mov	%r8, 0x40398\n"
    "	mov	%r9, 0x403a0\n"
    "	movq	$0x40800, 0x403a8\n"		/* SW_SCRATCH */
    "	movabs	$0x8000000000000000, %rax\n"
    "	mov	%rax, 0x403f0\n"
    "	movabs	$0x003c000000000000, %rax\n"
    "	mov	%rax, 0x403f8\n"
    "	movw	$2, 0x40ffa\n"
    "	movl	$0, 0x40ffc\n"
    "	mov	$0xc0010130, %ecx\n"
    "	mov	$0x40000, %eax\n"
    "	xor	%edx, %edx\n"
    "	wrmsr\n"
    "	rep; vmmcall\n"
    "	mov	0x401f8, %rax\n"
    "	ret\n"
    "guest_vc:\n"				/* CPUID only: EBX by the MSR protocol */
    "	pop	%rax\n"
    "	seen	4\n"
    "	msr_call 0x40000004, 0\n"
    "	shr	$32, %rax\n"
    "	mov	%eax, %ebx\n"
    "	addq	$2, (%rsp)\n"
    "	iretq\n"
    "guest_end:\n"
    "	.popsection\n");
