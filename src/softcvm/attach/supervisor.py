"""The supervisor: serves the calls of a caught program until its first process has ended.

Owns the main loop, the threads that wait inside KVM_RUN, and the life of the caught processes as ptrace
tells it.  What a call does is calls.py; who drives the model is driver.py.

One thread, the one that started the program, receives all calls and does all ptrace.  KVM_RUN may take for
ever, so each caught thread that calls it gets a thread here which runs it and answers.
"""

import os
import queue
import select
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from errno import EMFILE, ENOENT
from time import monotonic

from softcvm.attach import ptrace
from softcvm.attach.calls import CARRY_ON, HANDLERS, LATER
from softcvm.attach.cpuid import answer_cpuid, patch_code, read_real_cpuid
from softcvm.attach.dram_memory import DramMemory
from softcvm.attach.driver import Driver, Sleeps
from softcvm.attach.kernel_abi import Nr
from softcvm.attach.listener import Listener, Notification
from softcvm.attach.mappable import SharedPages, mappable
from softcvm.attach.process import Caught, Thread
from softcvm.attach.ptrace import PtraceEvent, Stop, ThreadGone
from softcvm.attach.sharing import Sharing, forget_frames, private_again, share
from softcvm.attach.start import Started, exec_error, start
from softcvm.kernel.errors import KernelError, Unmodelled
from softcvm.kernel.fs.file import FileKind
from softcvm.kernel.mm.mmap import MAP_ANONYMOUS, MAP_FIXED, PROT_EXEC
from softcvm.kernel.virt.kvm.kvm_main import KvmVcpu
from softcvm.machine import Machine
from softcvm.sim.addr import PAGE_MASK, PAGE_SHIFT
from softcvm.sim.steps import Point, Steps, Task, Wait

__all__ = ("Supervisor",)

_EMPTYING = (4, 8, 9)
"""MADV_DONTNEED, MADV_FREE, MADV_REMOVE."""
_TICK = 10
"""Milliseconds between two ticks while guests may run."""
_GROUP_STOPS = (signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)


class Supervisor:
    """One program and its descendants on one machine."""

    def __init__(self, machine: Machine, memory: DramMemory) -> None:
        """memory: the backing of the machine's DRAM."""
        self.machine = machine
        self._memory = memory
        machine.linux.mappable = mappable
        machine.vm_machine_code()
        self.driver = Driver(machine.linux.lockdep, self._asked, self._hurry, self._idle)
        self.processes: dict[int, Caught] = {}
        self._threads: dict[int, Thread] = {}
        self._early: set[int] = set()
        """New threads that stopped before their parent's event said whose they are."""
        self._workers: dict[int, queue.SimpleQueue[Callable[[], None] | None]] = {}
        self._running: list[threading.Thread] = []
        self._after: dict[int, Callable[[], None]] = {}
        """What to do when a thread has stopped at the end of a call."""
        self._calls: dict[int, Notification] = {}
        """Calls that were received and not answered, by thread."""
        self._detached: set[int] = set()
        """Threads whose call is answered as a notification and goes on here: they are stopped behind it."""
        self._errands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        """What other threads want from the one that does ptrace."""
        self._missed: deque[Stop] = deque()
        """Stops and ends that came while a thread was waited for."""
        self._forking: set[int] = set()
        """Threads that wait in vfork() for their child; nothing else stops them."""
        self._moving = threading.RLock()
        """Held while memory of a program is moved: nobody else lets a thread of it go on."""
        self._failure: BaseException | None = None
        self._stand_in = os.open("/dev/null", 3)  # neither readable nor writable
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._executed = False
        self._own_thread = threading.get_ident()
        self._dram_fds: dict[int, int] = {}
        """The descriptor of DRAM in the process of a detached thread."""

    def run(self, argv: Sequence[str]) -> int:
        """Run a program to its end; its wait status.  UnavailableError, ExecError, Unmodelled."""
        with _signals_wake(self._wake_write):
            started = start(argv)
            self._listener = Listener(started.listener)
            first = self._new_process(started.pid)
            try:
                return self._serve(first.pid, argv[0], started)
            finally:
                self._end_all()
                os.close(started.listener)
                os.close(started.exec_failed)

    # The main loop

    def _serve(self, first: int, program: str, started: Started) -> int:
        poller = select.poll()
        poller.register(started.listener, select.POLLIN)
        poller.register(self._wake_read, select.POLLIN)
        ticked = 0.0
        while True:
            if self._workers and monotonic() - ticked > _TICK / 1000:
                ticked = monotonic()
                for vcpu in self._in_guest():  # the host's timer: KVM looks for signals
                    vcpu.kvm.ops.vcpu_kick(vcpu)
            for fd, events in poller.poll(_TICK if self._workers else None):
                if fd == self._wake_read:
                    os.read(self._wake_read, 4096)
                    status = self._reap(first)
                    self._idle()
                    if status is not None:
                        if not self._executed and (errno := os.read(started.exec_failed, 1)):
                            raise exec_error(program, errno[0])
                        return status
                elif events & select.POLLIN:
                    call = self._listener.receive()
                    if call is not None:
                        self._handle(call)
                else:
                    poller.unregister(fd)  # nobody is left under the filter

    def _handle(self, call: Notification) -> None:
        thread = self._threads.get(call.tid)
        if thread is None:
            self._listener.carry_on(call.id)
            return
        thread.began = monotonic()
        self._calls[call.tid] = call
        result = HANDLERS[call.nr](self, thread, call)
        if result != LATER:
            self._answer(call, result)

    def _idle(self) -> None:
        """What others want from the thread that does ptrace."""
        if threading.get_ident() != self._own_thread:
            return
        self._run_errands()
        if self._failure is not None:
            raise self._failure

    def _run_errands(self) -> None:
        while not self._errands.empty():
            self._errands.get()()

    def _answer(self, call: Notification, result: int) -> None:
        """End a call, in the thread that does ptrace or, while it is a notification, in any."""
        with self._moving:
            if call.tid in self._detached and threading.get_ident() != self._own_thread:
                self._errand(lambda: self._end_call(call, result))
            else:
                self._end_call(call, result)

    def _end_call(self, call: Notification, result: int) -> None:
        self._calls.pop(call.tid, None)
        if call.tid in self._detached:
            self._detached.discard(call.tid)
            with suppress(ThreadGone):
                ptrace.inject(call.tid, Nr.CLOSE, self._dram_fds.pop(call.tid))
                registers = ptrace.get_registers(call.tid)
                registers.rax = result & (1 << 64) - 1
                ptrace.set_registers(call.tid, registers)
                ptrace.carry_on(call.tid)
        elif result == CARRY_ON:
            self._listener.carry_on(call.id)
        else:
            self._listener.answer(call.id, result)

    def _in_guest(self) -> list[KvmVcpu]:
        vms = self.machine.linux.vm_list
        return [vcpu for kvm in list(vms) for vcpu in list(kvm.vcpus) if vcpu.arch.in_guest]

    def _hurry(self) -> None:
        for vcpu in self._in_guest():
            vcpu.arch.svm.core.interrupt()

    # What handlers use

    def model(
        self,
        thread: Thread,
        call: Notification,
        steps: "Steps[int] | Steps[None]",
        *,
        after: Point | None = None,
        patient: bool = True,
    ) -> int:
        """Run a system call of the model; its result or negative errno, with new files in place.

        Who is not patient gets LATER when the call must wait for another: a thread of its own ends it.
        """
        try:
            result = self.driver.run(steps, thread, after=after, patient=patient)
        except Sleeps as sleeps:
            self.model_later(thread, call, steps, sleeps.point)
            return LATER
        except OSError as error:
            return -(error.errno or 0)
        except KernelError as error:
            return -error.errno
        process = thread.process
        if len(process.proc.files.fds) != len(process.stand_ins):
            with self.driver.alone():
                self._place_stand_ins(process, call)
        return result or 0

    def model_later(
        self,
        thread: Thread,
        call: Notification,
        steps: "Steps[int] | Steps[None]",
        after: Point | None = None,
    ) -> None:
        """The same in a thread of its own, which answers the call."""

        def work() -> None:
            try:
                self._answer(call, self.model(thread, call, steps, after=after))
            except BaseException as error:  # reported by the main loop
                self._failure = error
                self._wake()

        worker = self._workers.get(thread.tid)
        if worker is None:
            worker = self._workers[thread.tid] = queue.SimpleQueue()
            running = threading.Thread(target=_work, args=(worker,), daemon=True)
            self._running = [other for other in self._running if other.is_alive()]
            self._running.append(running)
            running.start()
        worker.put(work)

    def give_text(self, call: Notification, text: str, *, cloexec: bool) -> int:
        """A file of the program's own with this text; its number there."""
        source = os.memfd_create("softcvm")
        try:
            os.write(source, text.encode())
            readable = os.open(f"/proc/self/fd/{source}", os.O_RDONLY)
        finally:
            os.close(source)
        try:
            return self._listener.add_any_fd(call.id, readable, cloexec=cloexec)
        except OSError as error:
            return -(error.errno or 0)
        finally:
            os.close(readable)

    def mapping_changes(self, thread: Thread, call: Notification) -> int:
        """The program is about to unmap or replace memory, or to map code; the call's result or CARRY_ON."""
        first, last = _replaced(call)
        if first < last and thread.process.proc.mm.pages.held(first, last):
            return self._memory_goes(thread, call, first, last)
        if call.nr == Nr.MMAP and call.args[2] & PROT_EXEC and not call.args[3] & MAP_ANONYMOUS:
            self._stop_after(thread, lambda: self._code_was_mapped(thread))
        return CARRY_ON

    def _memory_goes(self, thread: Thread, call: Notification, first: int, last: int) -> int:
        """Shared pages that the program takes away, or wants to be empty."""
        process = thread.process
        if call.nr == Nr.MREMAP:
            raise Unmodelled("mremap() of memory that is a guest's")
        forget_frames(process, first, last)
        held = process.proc.mm.pages.held(first, last)
        self.driver.run(process.proc.mm.forget(first, last), thread)
        if call.nr != Nr.MADVISE:
            return CARRY_ON
        self._detach(thread, call)
        for lo, hi, _ in held:
            private_again(thread, call.tid, lo, hi)
        return 0

    def _asked(self, waits: Wait, task: Task) -> None:
        """A task sleeps: for memory of its program, if it is us who must get it."""
        if not isinstance(waits, Sharing) or not isinstance(task, Thread):
            return
        if threading.get_ident() == self._own_thread:
            self._share(waits, task)
        else:
            self._errand(lambda: self._share(waits, task))

    def _share(self, waits: Sharing, task: Thread) -> None:
        """Stop the process, replace its memory, and let all but the asking thread go on."""
        with self._moving:
            try:
                call = self._calls.get(task.tid)
                if call is None:
                    raise ThreadGone(task.tid)
                self._detach(task, call)
                stopped = self._stop_others(task)
                try:
                    with self.driver.alone():
                        share(waits, task.tid, self._dram_fds[task.tid])
                finally:
                    for tid in stopped:
                        with suppress(ThreadGone):
                            ptrace.carry_on(tid)
            except ThreadGone:
                pass  # the process is being killed: nobody will look at what it asked for
            finally:
                waits.done = True

    def _stop_others(self, task: Thread) -> list[int]:
        """Stop all that run in this memory and are not in a call of ours, also what starts meanwhile.

        A thread in vfork() stops by itself before it goes on.
        """
        seen, stopped = {task.tid}, []
        mm = task.process.proc.mm
        while new := [
            tid
            for process in self.processes.values()
            if process.proc.mm is mm
            for tid in process.threads
            if tid not in seen
        ]:
            for tid in new:
                seen.add(tid)
                if tid not in self._calls and tid not in self._forking and self._stop(tid):
                    stopped.append(tid)
        return stopped

    def _detach(self, thread: Thread, call: Notification) -> None:
        """Have the thread stand stopped behind its call, whose result is written into its registers later."""
        if call.tid in self._detached:
            return
        try:
            fd = self._listener.add_any_fd(call.id, self._memory.fd, cloexec=True)
        except OSError as error:
            if error.errno == EMFILE:
                raise Unmodelled(
                    "memory of a guest in a program without a free descriptor"
                ) from error
            if error.errno != ENOENT:
                raise
            raise ThreadGone(call.tid) from error
        self._dram_fds[call.tid] = fd
        ptrace.interrupt(call.tid)
        self._listener.answer(call.id, 0)
        if not self._wait_stopped(call.tid):
            raise ThreadGone(call.tid)
        self._detached.add(call.tid)

    def _stop(self, tid: int) -> bool:
        try:
            ptrace.interrupt(tid)
        except ThreadGone:
            return False
        return self._wait_stopped(tid)

    def _wait_stopped(self, tid: int) -> bool:
        """Until the thread has stopped as it was told to; signals that come first are sent again.

        What else stops or ends it is dealt with later, and until then it stays as it is: False.
        """
        late: list[int] = []
        try:
            while True:
                stop = ptrace.wait_thread(tid)
                if stop.event == PtraceEvent.STOP:
                    break
                if stop.ended or stop.event:
                    self._missed.append(stop)
                    self._wake()
                    return False
                if stop.signo == signal.SIGTRAP and self._trapped(tid):
                    ptrace.carry_on(tid)
                else:
                    late.append(stop.signo)
                    ptrace.carry_on(tid)
        except ThreadGone:
            return False
        for signo in late:
            ptrace.send_signal(tid, signo)
        return True

    def _errand(self, act: Callable[[], None]) -> None:
        self._errands.put(act)
        self._wake()

    def _stop_after(self, thread: Thread, act: Callable[[], None]) -> None:
        """Stop a thread at the end of the call that it is allowed to make now."""
        self._after[thread.tid] = act
        with suppress(ThreadGone):
            ptrace.interrupt(thread.tid)

    def _code_was_mapped(self, thread: Thread) -> None:
        patch_code(thread.process, ptrace.get_registers(thread.tid).rax)

    def _place_stand_ins(self, process: Caught, call: Notification) -> None:
        """Give the process a descriptor for each of the model's files, under the same number."""
        files = process.proc.files
        for number in files.fds.keys() - process.stand_ins:
            file = files.fds[number]
            if file is None:
                continue
            source = self._stand_in
            if file.kind is FileKind.VCPU and isinstance(file.private, KvmVcpu):
                source = SharedPages.behind(file.private.run.data).fd
            cloexec = number in files.close_on_exec
            if not self._listener.add_fd(call.id, source, number, cloexec=cloexec):
                return  # the thread was killed meanwhile
            process.stand_ins.add(number)

    # Processes and threads

    def _new_process(self, pid: int) -> Caught:
        process = Caught(self.machine, pid, lambda: self.machine.linux.lockdep.current)
        self.processes[pid] = process
        self._threads[pid] = process.thread(pid)
        return process

    def _reap(self, first: int) -> int | None:
        """Deal with every stop and end that ptrace has; the wait status once the first process is over."""
        while True:
            try:
                stop = self._missed.popleft() if self._missed else ptrace.wait_any()
            except ChildProcessError:
                return None
            if stop is None:
                return None
            if stop.ended:
                self._thread_ended(stop.tid)
                if stop.tid == first:
                    return stop.status
                continue
            try:
                self._stopped(stop)
            except ThreadGone:
                continue

    def _stopped(self, stop: Stop) -> None:
        tid = stop.tid
        match stop.event:
            case PtraceEvent.FORK | PtraceEvent.VFORK | PtraceEvent.CLONE:
                if stop.event == PtraceEvent.VFORK:
                    self._forking.add(tid)
                self._cloned(tid, ptrace.event_message(tid), stop.event)
                ptrace.carry_on(tid)
            case PtraceEvent.VFORK_DONE:
                self._forking.discard(tid)
                ptrace.carry_on(tid)
            case PtraceEvent.EXEC:
                self._execed(tid)
                ptrace.carry_on(tid)
            case PtraceEvent.EXIT:
                self._thread_exits(tid)
                ptrace.carry_on(tid)
            case PtraceEvent.STOP if stop.signo in _GROUP_STOPS:
                ptrace.listen(tid)
            case PtraceEvent.STOP if tid in self._after:
                self._after.pop(tid)()
                ptrace.carry_on(tid)
            case PtraceEvent.STOP if tid not in self._threads:
                self._early.add(tid)
            case PtraceEvent.STOP:
                ptrace.carry_on(tid)
            case 0 if stop.signo == signal.SIGTRAP and self._trapped(tid):
                ptrace.carry_on(tid)
            case _:
                ptrace.carry_on(tid, stop.signo)

    def _trapped(self, tid: int) -> bool:
        """A breakpoint, which may be one of ours."""
        thread = self._threads.get(tid)
        return thread is not None and answer_cpuid(thread.process, tid)

    def _cloned(self, parent: int, child: int, event: int) -> None:
        family = self._threads[parent].process
        if os.path.exists(f"/proc/{family.pid}/task/{child}"):
            self._threads[child] = family.thread(child)
        else:
            shares = event == PtraceEvent.VFORK
            with self.driver.alone():
                process = family.fork(child, shares_memory=shares)
            self.processes[child] = process
            self._threads[child] = process.thread(child)
        if child in self._early:
            self._early.discard(child)
            ptrace.carry_on(child)

    def _execed(self, tid: int) -> None:
        """The process has one thread now, whose number is the process's, and a new address space."""
        self._executed = True
        process = self.processes[tid]
        for other in [t for t in process.threads if t != tid]:
            self._forget(other)
        thread = process.thread(tid)
        proc = process.proc
        shared = any(p is not process and p.proc.mm is proc.mm for p in self.processes.values())
        old = process.new_memory()
        if not shared:
            self.driver.run(old.exit_mmap(), thread)
        read_real_cpuid(process, tid)
        patch_code(process)
        process.stand_ins -= proc.files.close_on_exec
        self.driver.run(proc.files.do_close_on_exec(), thread)

    def _thread_exits(self, tid: int) -> None:
        """Before the thread is gone: with the last one the process's files are closed, as in do_exit()."""
        thread = self._threads.get(tid)
        if thread is not None and len(thread.process.threads) == 1:
            self._exit(thread.process, thread)

    def _thread_ended(self, tid: int) -> None:
        thread = self._threads.get(tid)
        if thread is None:
            self._early.discard(tid)
            return
        self._forget(tid)
        if not thread.process.threads:
            self._exit(thread.process, thread)

    def _exit(self, process: Caught, thread: Thread) -> None:
        if self.processes.pop(process.pid, None) is None:
            return
        proc = process.proc
        if any(other.proc.mm is proc.mm for other in self.processes.values()):
            self.driver.run(
                proc.files.close_all(), thread
            )  # a vfork() child: the memory is its parent's
        else:
            self.driver.run(proc.exit(), thread)
        self.machine.linux.processes.remove(proc)

    def _forget(self, tid: int) -> None:
        self._after.pop(tid, None)
        self._calls.pop(tid, None)
        self._detached.discard(tid)
        self._forking.discard(tid)
        self._dram_fds.pop(tid, None)
        thread = self._threads.pop(tid, None)
        if thread is not None:
            thread.process.threads.pop(tid, None)
        worker = self._workers.pop(tid, None)
        if worker is not None:
            worker.put(None)

    def _end_all(self) -> None:
        """Nothing of the program is left behind when softcvm gives up on it, or its first process ends."""
        for worker in self._workers.values():
            worker.put(None)
        for pid in self.processes:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        ptrace.wait_for_all()
        self._calls.clear()  # nobody can be stopped for what is asked for now
        while any(running.is_alive() for running in self._running):
            self._hurry()
            self._run_errands()
            for running in self._running:
                running.join(_TICK / 1000)

    def _wake(self) -> None:
        os.write(self._wake_write, b"!")


def _replaced(call: Notification) -> tuple[int, int]:
    """Pages whose contents the call takes away."""
    addr, length = call.args[:2]
    takes = call.nr in (Nr.MUNMAP, Nr.MREMAP)
    takes |= call.nr == Nr.MMAP and bool(call.args[3] & MAP_FIXED)
    takes |= call.nr == Nr.MADVISE and call.args[2] in _EMPTYING
    if not takes:
        return 0, 0
    return addr >> PAGE_SHIFT, (addr + length + PAGE_MASK) >> PAGE_SHIFT


def _work(jobs: "queue.SimpleQueue[Callable[[], None] | None]") -> None:
    """A thread that runs what one caught thread asks for, until that one ends."""
    while (job := jobs.get()) is not None:
        job()


@contextmanager
def _signals_wake(fd: int) -> Iterator[None]:
    """While the program runs, the end or stop of a thread wakes the main loop, and Ctrl-C is the program's."""
    old_fd = signal.set_wakeup_fd(fd, warn_on_full_buffer=False)
    old = {signo: signal.signal(signo, _noted) for signo in (signal.SIGCHLD, signal.SIGINT)}
    try:
        yield
    finally:
        for signo, handler in old.items():
            signal.signal(signo, handler)
        signal.set_wakeup_fd(old_fd)


def _noted(signo: int, frame: object) -> None:
    """The wake-up descriptor has said it."""
