/* Arguments: memory that is there, is not, ends, and changes; structures that are nearly right. */
#include "hostile.h"

__thread uint64_t seed;
uint8_t *guest, *shaky;
static uint8_t *edge[THREADS], *readonly, *gone;

uint64_t rnd(void)
{
	seed ^= seed >> 12;
	seed ^= seed << 25;
	seed ^= seed >> 27;
	return (seed * 0x2545F4914F6CDD1DUL) >> 16 ^ seed << 48;
}

static uint8_t *anonymous(size_t size, int prot)
{
	uint8_t *at = mmap(NULL, size, prot, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (at == MAP_FAILED)
		abort();
	return at;
}

void make_memory(void)
{
	for (int i = 0; i < THREADS; i++) {
		edge[i] = anonymous(4 * PAGE, PROT_READ | PROT_WRITE);
		mprotect(edge[i] + 3 * PAGE, PAGE, PROT_NONE);
	}
	readonly = anonymous(PAGE, PROT_READ);
	gone = anonymous(16 * PAGE, PROT_NONE);
	guest = anonymous(GUEST_SIZE, PROT_READ | PROT_WRITE);
	shaky = anonymous(SHAKY_SIZE, PROT_READ | PROT_WRITE);
}

/* Write what may not be writable, without dying of it. */
void poke(void *addr, const void *data, size_t size)
{
	struct iovec ours = { (void *)data, size }, theirs = { addr, size };

	process_vm_writev(getpid(), &ours, 1, &theirs, 1, 0);
}

/* One change to the memory that other threads give to the kernel. */
void change_memory(void)
{
	uint8_t *at = shaky + PAGE * below(SHAKY_SIZE / PAGE);
	size_t size = PAGE * (1 + below(4));
	uint64_t data[8];

	if (at + size > shaky + SHAKY_SIZE)
		size = shaky + SHAKY_SIZE - at;
	switch (below(6)) {
	case 0:
		munmap(at, size);
		break;
	case 1:
	case 2:
		mmap(at, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
		break;
	case 3:
		mprotect(at, size, (int)below(4));
		break;
	case 4:
		madvise(at, size, MADV_DONTNEED);
		break;
	default:
		for (int i = 0; i < 8; i++)
			data[i] = value();
		poke(at + 8 * below(500), data, sizeof(data));
	}
}

/* A number that means something somewhere. */
uint64_t value(void)
{
	switch (below(12)) {
	case 0:
		return 0;
	case 1:
		return below(8);
	case 2:
		return below(256);
	case 3:
		return 1UL << below(64);
	case 4:
		return -1UL << below(64);
	case 5:
		return rnd();
	case 6:
		return PAGE * below(1024);
	case 7:
		return (uint64_t)guest + PAGE * below(GUEST_SIZE / PAGE);
	case 8:
		return (uint64_t)shaky + PAGE * below(SHAKY_SIZE / PAGE) + (once_in(4) ? below(PAGE) : 0);
	case 9:
		return (1UL << below(64)) - 1;
	case 10:
		return nowhere();
	default:
		return below(1 << 16);
	}
}

/* An address where nothing is, or nothing of a program's. */
uint64_t nowhere(void)
{
	switch (below(6)) {
	case 0:
		return 0;
	case 1:
		return 1 + below(4000);
	case 2:
		return 0xFFFF800000000000UL + (rnd() >> 20);
	case 3:
		return -1UL - below(4096);
	case 4:
		return (1UL << 47) - 4096 - below(64);
	default:
		return (uint64_t)gone + below(16 * PAGE);
	}
}

/* Data where the kernel can read it, wholly, in part or not at all; or (others) where something else is. */
void *place(const void *data, size_t size, bool others)
{
	uint8_t *at = edge[self];

	switch (others ? below(16) : 3 + below(13)) {
	case 0:
		return (void *)nowhere();
	case 1:
		return readonly + below(PAGE);
	case 2:
		return shaky + below(SHAKY_SIZE);
	case 3: /* ends too early */
		at += 3 * PAGE - below(size + 1);
		memcpy(at, data, (size_t)(edge[self] + 3 * PAGE - at));
		return at;
	case 4: /* ends just there */
		at += 3 * PAGE - size;
		break;
	default:
		at += below(PAGE);
	}
	memcpy(at, data, size);
	return at;
}

static void put(uint8_t *data, int at, int size, uint64_t number)
{
	memcpy(data + at, &number, size);
}

static void *blob(void)
{
	uint64_t words[MOST / 8];

	for (int i = 0; i < MOST / 8; i++)
		words[i] = once_in(3) ? value() : 0;
	return place(words, MOST, true);
}

static uint64_t guest_page(void)
{
	return (uint64_t)(once_in(8) ? shaky : guest) + PAGE * below(SHAKY_SIZE / PAGE);
}

/* struct kvm_sev_cmd and what it points to. */
static void sev_command(uint8_t *data, int sev_fd)
{
	static const uint8_t ids[] = { 2, 3, 4, 6, 7, 16, 17, 18, 22, 100, 101, 102 };
	uint8_t more[MOST] = { 0 };
	uint64_t id = once_in(30) ? value() : ids[below(sizeof(ids))];

	switch (id) {
	case 2: /* LAUNCH_START: no session */
		put(more, 4, 4, below(8));
		break;
	case 3:
		put(more, 0, 8, guest_page());
		put(more, 8, 4, 16 * below(1024));
		break;
	case 6:
		put(more, 0, 8, (uint64_t)blob());
		put(more, 8, 4, below(64));
		break;
	case 17:
	case 18:
		put(more, 0, 8, guest_page());
		put(more, 8, 8, guest_page());
		put(more, 16, 4, below(8192));
		break;
	case 22:
		put(more, 12, 2, below(4));
		break;
	case 100:
		put(more, 0, 8, 0x30000 | (once_in(4) ? value() : 0));
		break;
	case 101:
		put(more, 0, 8, below(64));
		put(more, 8, 8, guest_page());
		put(more, 16, 8, PAGE * below(8));
		put(more, 24, 1, once_in(8) ? rnd() : below(7));
		break;
	case 102:
		put(more, 0, 8, (uint64_t)blob());
		put(more, 8, 8, (uint64_t)blob());
		put(more, 16, 1, below(2) & below(2));
		put(more, 17, 1, below(2) & below(2));
		break;
	}
	if (once_in(4))
		put(more, 8 * below(8), 8, value());
	put(data, 0, 4, id);
	put(data, 8, 8, (uint64_t)place(more, 96, true));
	put(data, 20, 4, once_in(10) ? value() : (uint64_t)sev_fd);
}

static void slot(uint8_t *data, int gmem_fd)
{
	put(data, 0, 4, once_in(20) ? value() : below(6));
	put(data, 4, 4, once_in(10) ? value() : below(2) | below(2) << 2);
	put(data, 8, 8, once_in(40) ? value() : PAGE * below(64) + (4UL << 20) * below(3));
	put(data, 16, 8, once_in(40) ? value() : PAGE * below(64));
	put(data, 24, 8, once_in(16) ? value() : guest_page());
	put(data, 32, 8, once_in(4) ? value() : 0);
	put(data, 40, 4, once_in(10) ? value() : (uint64_t)gmem_fd);
}

static void list_of(uint8_t *data, unsigned int most, size_t entry)
{
	put(data, 0, 4, once_in(8) ? value() : below(most));
	put(data, 4, 4, 0);
	for (unsigned int i = 0; entry && i < most; i++)
		put(data, 8 + entry * i, 4, once_in(2) ? 0xC0000080 + below(8) : once_in(2) ? below(0x400) : value());
}

/* An argument for a request: what its fields may be, with something wrong now and then; its size. */
size_t half_valid(unsigned int request, uint8_t *data, int sev_fd, int gmem_fd)
{
	size_t size = request >> 16 & 0x3FFF;

	if (size < 8 || size > MOST)
		size = MOST;
	for (size_t i = 0; i < MOST; i += 8)
		put(data, i, 8, once_in(4) ? value() : 0);
	switch (request) {
	case KVM_MEMORY_ENCRYPT_OP:
		sev_command(data, sev_fd);
		size = 24;
		break;
	case KVM_SET_USER_MEMORY_REGION:
	case 0x40A0AE49: /* KVM_SET_USER_MEMORY_REGION2 */
		slot(data, gmem_fd);
		break;
	case 0xC040AED4: /* KVM_CREATE_GUEST_MEMFD */
		put(data, 0, 8, once_in(4) ? value() : PAGE * (1 + below(64)));
		memset(data + 8, 0, 56);
		put(data, 8, 8, once_in(4) ? value() : 0);
		break;
	case 0x4020AED2: /* KVM_SET_MEMORY_ATTRIBUTES */
		put(data, 0, 8, once_in(8) ? value() : PAGE * below(2048));
		put(data, 8, 8, once_in(8) ? value() : PAGE * (1 + below(64)));
		put(data, 16, 8, once_in(8) ? value() : below(2) << 3);
		put(data, 24, 8, once_in(16) ? value() : 0);
		break;
	case KVM_ENABLE_CAP:
		put(data, 0, 4, below(250));
		put(data, 4, 4, once_in(8) ? value() : 0);
		break;
	case KVM_MEMORY_ENCRYPT_REG_REGION:
	case KVM_MEMORY_ENCRYPT_UNREG_REGION:
		put(data, 0, 8, guest_page());
		put(data, 8, 8, once_in(4) ? value() : PAGE * below(64));
		break;
	case KVM_GET_DIRTY_LOG:
	case KVM_CLEAR_DIRTY_LOG:
		put(data, 0, 4, below(6));
		put(data, request == KVM_GET_DIRTY_LOG ? 8 : 16, 8, (uint64_t)blob());
		break;
	case KVM_GET_MSRS:
	case KVM_SET_MSRS:
		list_of(data, 32, 16);
		break;
	case KVM_SET_CPUID2:
	case KVM_GET_CPUID2:
	case KVM_GET_SUPPORTED_CPUID:
		list_of(data, 20, 40);
		break;
	case KVM_GET_MSR_INDEX_LIST:
	case KVM_GET_MSR_FEATURE_INDEX_LIST:
		list_of(data, 200, 0);
		break;
	}
	if (once_in(6))
		put(data, 4 * below(size / 4), 4, value());
	return size > MOST ? MOST : size;
}
