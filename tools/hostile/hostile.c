/*
 * hostile SEED SECONDS CALLS TALLY: call what there is to call in KVM and around it, with what should not be given
 * to it, until so many calls were made or so many seconds are over.  TALLY is a file of a struct tally's size.
 *
 * Two threads share one table of descriptors; a third changes the memory that they hand to the kernel.
 */
#include "hostile.h"
#include "numbers.h"
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>

#define FDS 96
#define LIMIT 640

struct tally *tally;
__thread int self;
static struct entry { int fd; enum kind kind; struct kvm_run *run; } fds[FDS];
static uint64_t deadline, budget, made;
static volatile bool over;
static bool child;

static uint64_t now_ms(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000UL + t.tv_nsec / 1000000;
}

static void noted(int signo) { (void)signo; }

long count(enum what what, uint64_t fd, uint64_t request, uint64_t arg, long result)
{
	int error = result < 0 ? errno : 0;

	(void)fd, (void)request, (void)arg;
	if (error >= ERRNOS)
		error = ERRNOS - 1;
	__atomic_add_fetch(&tally->count[what][error], 1, __ATOMIC_RELAXED);
	__atomic_add_fetch(&made, 1, __ATOMIC_RELAXED);
	return result;
}

static void about_to(enum what what, uint64_t fd, uint64_t request, uint64_t arg)
{
	typeof(&tally->last[0]) last = &tally->last[self];
	typeof(&last->call[0]) call = &last->call[last->at++ % LAST];

	call->what = what, call->fd = fd, call->request = request, call->arg = arg;
}
#define CALL(what, fd, request, arg, call) \
	(about_to(what, (uint64_t)(fd), (uint64_t)(request), (uint64_t)(arg)), \
	 count(what, (uint64_t)(fd), (uint64_t)(request), (uint64_t)(arg), call))

/* Descriptors */

static struct entry *any(void) { return &fds[below(FDS)]; }

static struct entry *of(enum kind kind)
{
	for (unsigned int i = below(FDS), n = 0; n < FDS; n++, i = (i + 1) % FDS)
		if (fds[i].kind == kind)
			return &fds[i];
	return any();
}

/* A new descriptor takes a place in the table; what was there is closed. */
static struct entry *keep(long fd, enum kind kind)
{
	struct entry *entry = any();
	struct entry old = *entry;

	if (fd < 0)
		return entry;
	if (old.kind < ORDINARY && old.fd >= 512 && old.fd != fd)
		CALL(CLOSE, old.fd, 0, 0, close(old.fd));
	if (old.run && once_in(2))
		munmap(old.run, 3 * PAGE);
	*entry = (struct entry){ (int)fd, kind, NULL };
	return entry;
}

static void open_some(void)
{
	bool sev = once_in(3);
	int flags = once_in(4) ? (int)rnd() & (O_CLOEXEC | O_NONBLOCK | 3) : O_RDWR;

	keep(CALL(OPEN, sev, flags, 0, open(sev ? "/dev/sev" : "/dev/kvm", flags)), sev ? SEV : KVM);
}

static void close_some(void)
{
	struct entry *entry = any();

	if (entry->fd < 512 && !once_in(8))
		return;
	if (entry->fd < 512 && fcntl(entry->fd, F_GETFD) >= 0)
		return;
	CALL(CLOSE, entry->fd, 0, 0, close(entry->fd));
	if (once_in(2))
		entry->kind = CLOSED;
}

static void dup_some(void)
{
	struct entry *entry = any();
	int to = 512 + (int)below(LIMIT - 500);

	switch (below(3)) {
	case 0:
		keep(CALL(DUP, entry->fd, 0, 0, dup(entry->fd)), entry->kind);
		break;
	case 1:
		keep(CALL(DUP2, entry->fd, to, 0, once_in(2) ? dup2(entry->fd, to) : dup3(entry->fd, to, O_CLOEXEC)),
		     entry->kind);
		break;
	default:
		keep(CALL(FCNTL, entry->fd, F_DUPFD, to, fcntl(entry->fd, F_DUPFD, once_in(4) ? (int)value() : to)),
		     entry->kind);
	}
}

/* Up to the limit, and what that leaves is used on. */
static void until_the_limit(void)
{
	struct entry *vm = of(VM);
	long fd;

	for (int n = 0; n < LIMIT && !over; n++) {
		if (once_in(3))
			fd = CALL(FILL, fds[0].fd, KVM_CREATE_VM, 0, ioctl(fds[0].fd, KVM_CREATE_VM, 0));
		else
			fd = CALL(FILL, vm->fd, KVM_CREATE_VCPU, n, ioctl(vm->fd, KVM_CREATE_VCPU, n));
		if (fd < 0 && errno == EMFILE)
			break;
	}
	about_to(FILL, 640, 0, 0);
	syscall(SYS_close_range, 560, LIMIT, 0);
}

static void other_calls(struct entry *entry)
{
	uint8_t data[256] = { 0 };
	void *at = place(data, sizeof(data), true);
	struct pollfd poll_fd = { entry->fd, (short)rnd(), 0 };
	static const int commands[] = { F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_GETOWN, F_GETLK, 1024 + 10, 77 };
	int fd = entry->fd, command = commands[below(8)];

	if (fd < 3)
		return;
	switch (below(9)) {
	case 0:
		CALL(READ, fd, at, 256, once_in(2) ? read(fd, at, 256) : pread(fd, at, value(), value()));
		break;
	case 1:
		CALL(WRITE, fd, at, 256, once_in(2) ? write(fd, at, 16) : pwrite(fd, at, 16, value()));
		break;
	case 2:
		CALL(LSEEK, fd, 0, 0, lseek(fd, value(), (int)below(6)));
		break;
	case 3:
		CALL(FTRUNCATE, fd, 0, 0, ftruncate(fd, once_in(2) ? 0 : value() >> 40));
		break;
	case 4:
		if (entry->kind == ORDINARY)
			break;
		CALL(FALLOCATE, fd, 0, 0, fallocate(fd, (int)(once_in(4) ? value() : below(4)),
						    once_in(3) ? value() : PAGE * below(64), once_in(3) ? value() : PAGE * below(64)));
		break;
	case 5:
		CALL(FSTAT, fd, at, 0, syscall(SYS_fstat, fd, at));
		break;
	case 6:
		CALL(POLL, fd, 0, 0, poll(&poll_fd, 1, 0));
		break;
	case 7:
		CALL(FCNTL, fd, command, at, fcntl(fd, command, command == F_GETLK ? (uint64_t)at : below(2)));
		break;
	default: {
		void *map = mmap(NULL, PAGE * below(20), (int)below(4), once_in(2) ? MAP_SHARED : MAP_PRIVATE, fd,
				 once_in(2) ? 0 : PAGE * below(80));
		long done = CALL(MMAP, fd, 0, 0, map == MAP_FAILED ? -1 : 0);

		if (!done && once_in(2))
			munmap(map, PAGE);
	}
	}
}

static void change_guest_memory(void)
{
	size_t at = PAGE * below(GUEST_SIZE / PAGE), size = PAGE * (1 + below(64));

	if (at + size > GUEST_SIZE)
		size = GUEST_SIZE - at;
	switch (below(4)) {
	case 0:
		CALL(MADVISE, at, size, 0, madvise(guest + at, size, once_in(4) ? (int)below(30) : MADV_DONTNEED));
		break;
	case 1:
		CALL(MPROTECT, at, size, 0, mprotect(guest + at, size, once_in(4) ? PROT_READ : PROT_READ | PROT_WRITE));
		break;
	case 2:
		CALL(MUNMAP, at, size, 0, munmap(guest + at, size));
		/* fallthrough */
	default:
		CALL(MMAP, at, size, 0, mmap(guest + at, size, PROT_READ | PROT_WRITE,
					     MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED ? -1 : 0);
	}
}

/* ioctls */

static enum kind made_by(unsigned int request, enum kind kind)
{
	switch (request) {
	case KVM_CREATE_VM:
		return VM;
	case KVM_CREATE_VCPU:
		return VCPU;
	case 0xC040AED4:
		return GMEM;
	case 0xAECE: /* KVM_GET_STATS_FD */
		return STATS;
	default:
		return kind == KVM || kind == VM || kind == VCPU ? KINDS : KINDS;
	}
}

static enum kind meant_for(unsigned int number)
{
	switch (number & 0xFF) {
	case 0x00 ... 0x0F:
		return KVM;
	case 0x40 ... 0x7F:
	case 0xC0 ... 0xCD:
	case 0xD0 ... 0xD5:
		return VM;
	default:
		return VCPU;
	}
}

/* The number of a request; some are none that anybody knows. */
static void pick(unsigned int *request)
{
	*request = numbers[below(sizeof(numbers) / sizeof(*numbers))].request;
	if (once_in(60))
		*request ^= 1u << below(32);
	if (once_in(60))
		*request = (unsigned int)rnd();
}

/* The entry of a request in the table, NULL for one that nobody knows. */
static const struct number *known(unsigned int request)
{
	for (size_t i = 0; i < sizeof(numbers) / sizeof(*numbers); i++)
		if (numbers[i].request == request)
			return &numbers[i];
	return NULL;
}

/*
 * Leave most of what is known not to be modelled alone: it would only end the run.  Whether the argument may also
 * be something else in the end.
 */
static bool spare(unsigned int request, int fd, uint8_t *data)
{
	struct kvm_sregs sregs;
	uint64_t word;

	if (once_in(2000))
		return true;
	switch (request) {
	case SEV_ISSUE_CMD: /* the commands that write nothing */
		memset(data, 0, 4);
		data[0] = once_in(2) ? 1 : 9;
		break;
	case KVM_SET_VCPU_EVENTS:
		memset(data, 0, 20);
		data[28] = 0;
		break;
	case KVM_SET_SIGNAL_MASK: /* the alarm that ends KVM_RUN is not blocked */
		data[5] &= (uint8_t)~(1 << (SIGALRM - 9));
		break;
	case KVM_SET_SREGS: /* what stays in 64-bit mode, or is refused */
	case 0x4140AECD: /* KVM_SET_SREGS2 */
		if (ioctl(fd, request == KVM_SET_SREGS ? KVM_GET_SREGS : KVM_GET_SREGS2, data) < 0)
			break;
		memcpy(&sregs, data, sizeof(sregs));
		if (once_in(2))
			sregs.cr4 = value();
		word = 24 + below(16);
		if (once_in(4) && word != 28 && word != 33) /* cr0 and efer */
			((uint64_t *)&sregs)[word] = value();
		sregs.cs.base = 0;
		memcpy(data, &sregs, sizeof(sregs));
		break;
	case KVM_GET_DEVICE_ATTR:
	case KVM_HAS_DEVICE_ATTR:
		data[4] |= 1;
		break;
	default:
		return true;
	}
	return false;
}

static void ioctl_some(void)
{
	unsigned int request;
	const struct number *number = (pick(&request), known(request));
	bool spared = number && number->unmodelled && !once_in(20000);
	struct entry *entry = once_in(8) ? any() : request >> 8 == SEV_ISSUE_CMD >> 8 ? of(SEV) : of(meant_for(request));
	uint8_t data[MOST];
	size_t size = half_valid(request, data, of(SEV)->fd, of(GMEM)->fd);
	uint64_t arg;
	bool others;
	long result;

	if (request == KVM_RUN || (spared && !number->copies && entry->fd >= 512))
		return;
	if (once_in(10))
		for (size_t i = 0; i < size; i++)
			data[i] = rnd();
	others = spare(request, entry->fd, data);
	if (spared && entry->fd >= 512) /* Linux refuses it before it looks at more */
		arg = nowhere();
	else if (number && !(request >> 16) && request != KVM_GET_CLOCK)
		arg = once_in(2) ? below(6) : value();
	else
		arg = (uint64_t)place(data, size, others);
	result = CALL(IOCTL_KVM + entry->kind, entry->fd, request, arg, ioctl(entry->fd, request, arg));
	if (result >= 0 && made_by(request, entry->kind) != KINDS && result >= 512)
		keep(result, made_by(request, entry->kind));
}

static void build(void)
{
	struct kvm_run *run = NULL;
	int vm = -1, vcpu = make_guest(of(KVM)->fd, &vm, &run);
	struct entry *entry;

	keep(vm, VM);
	entry = keep(vcpu, VCPU);
	if (vcpu >= 0)
		entry->run = run;
}

static void run_some(void)
{
	struct entry *entry = of(VCPU);
	struct kvm_run *run = entry->run;
	struct itimerspec soon = { { 0, 20000000 }, { 0, 1000000 + (long)below(8000000) } }, never = { 0 };
	struct sigevent event = { .sigev_notify = SIGEV_THREAD_ID, .sigev_signo = SIGALRM };
	timer_t timer;
	struct kvm_sregs sregs;
	struct kvm_regs regs;

	if (!once_in(500) && !ioctl(entry->fd, KVM_GET_SREGS, &sregs) && !(sregs.cs.l && sregs.efer & 1 << 10)) {
		ioctl(entry->fd, KVM_GET_REGS, &regs); /* outside of 64-bit mode where nothing is */
		regs.rip = 0xFFF0;
		ioctl(entry->fd, KVM_SET_REGS, &regs);
	}
	event._sigev_un._tid = (int)syscall(SYS_gettid);
	if (timer_create(CLOCK_MONOTONIC, &event, &timer))
		return;
	timer_settime(timer, 0, &soon, NULL);
	if (run && once_in(4))
		poke((uint8_t *)run + 8 * below(290), &(uint64_t){ value() }, 8);
	if (run)
		poke(&run->immediate_exit, &(uint8_t){ (uint8_t)once_in(6) }, 1);
	CALL(RUN, entry->fd, KVM_RUN, 0, ioctl(entry->fd, KVM_RUN, once_in(50) ? value() : 0));
	timer_settime(timer, 0, &never, NULL);
	timer_delete(timer);
}

static void signal_some(void)
{
	CALL(SIGNAL, 0, 0, 0, syscall(SYS_tgkill, getpid(), syscall(SYS_gettid), SIGALRM));
}

static void act(void);

static void fork_some(void)
{
	pid_t pid;

	if (child)
		return;
	about_to(FORK, 0, 0, 0);
	pid = fork();
	if (!pid) {
		child = true;
		self = THREADS - 1;
		seed ^= rnd();
		for (int i = 0; i < 40; i++)
			act();
		_exit(0);
	}
	count(FORK, 0, 0, 0, pid);
	while (pid > 0 && waitpid(pid, NULL, 0) < 0 && errno == EINTR)
		;
}

static void act(void)
{
	switch (below(64)) {
	case 0 ... 1:
		open_some();
		break;
	case 2 ... 3:
		close_some();
		break;
	case 4 ... 5:
		dup_some();
		break;
	case 6 ... 11:
		other_calls(any());
		break;
	case 12 ... 13:
		change_guest_memory();
		break;
	case 14:
		build();
		break;
	case 15 ... 16:
		run_some();
		break;
	case 17:
		signal_some();
		break;
	case 18:
		if (once_in(20))
			fork_some();
		break;
	case 19:
		if (once_in(60))
			until_the_limit();
		break;
	default:
		ioctl_some();
	}
}

static void *work(void *arg)
{
	self = (int)(intptr_t)arg;
	seed = tally->last[self].at;
	tally->last[self].at = 0;
	while (!over) {
		act();
		if (self == 0 && (now_ms() > deadline || made >= budget))
			over = true;
	}
	return NULL;
}

static void *shake(void *arg)
{
	self = THREADS - 2;
	seed = (uint64_t)arg;
	while (!over) {
		change_memory();
		usleep(50 + below(2000));
	}
	return NULL;
}

static void prepare(uint64_t first_seed)
{
	struct rlimit limit = { LIMIT, LIMIT };
	struct sigaction action = { .sa_handler = noted };

	seed = first_seed * 0x9E3779B97F4A7C15UL + 1;
	for (int i = 0; i < 4; i++)
		rnd();
	setrlimit(RLIMIT_NOFILE, &limit);
	sigaction(SIGALRM, &action, NULL);
	make_memory();
	for (int i = 0; i < FDS; i++)
		fds[i] = (struct entry){ i % 3 == 0 ? 3 + i : 500 + i, CLOSED, NULL };
	fds[0] = (struct entry){ open("/dev/kvm", O_RDWR), KVM, NULL };
	fds[1] = (struct entry){ open("/dev/sev", O_RDWR), SEV, NULL };
	fds[2] = (struct entry){ memfd_create("ordinary", 0), ORDINARY, NULL };
}

int main(int argc, char **argv)
{
	pthread_t second, shaker;
	int fd;

	if (argc != 5 || (fd = open(argv[4], O_RDWR)) < 0)
		return 2;
	tally = mmap(NULL, sizeof(*tally), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	close(fd);
	prepare(strtoull(argv[1], NULL, 0));
	deadline = now_ms() + strtoull(argv[2], NULL, 0) * 1000;
	budget = strtoull(argv[3], NULL, 0);
	tally->last[0].at = rnd() | 1;
	tally->last[1].at = rnd() | 1;
	pthread_create(&shaker, NULL, shake, (void *)(rnd() | 1));
	pthread_create(&second, NULL, work, (void *)1);
	work((void *)0);
	pthread_join(second, NULL);
	pthread_join(shaker, NULL);
	return 0;
}
