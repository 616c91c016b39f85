"""Programs that misuse every call there is cannot harm softcvm: tools/hostile, and what it found."""

import os
import shutil
from pathlib import Path

import pytest

from tests.attach.caught import caught, softcvm_exec
from tools.hostile.build import build
from tools.hostile.run import Outcome, Report, run_for

needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("hostile"))


def check(report: Report) -> None:
    assert not report.failures, report.as_text()
    assert set(report.outcomes) <= {Outcome.ENDED, Outcome.UNMODELLED}
    for what in ("ioctl kvm", "ioctl vm", "ioctl vcpu", "ioctl sev", "ioctl closed", "KVM_RUN"):
        assert sum(n for (kind, _), n in report.counts.items() if kind == what), what


@needs_gcc
def test_a_hostile_program_gets_errnos_and_leaves_a_machine_whose_invariants_hold(
    program: Path,
) -> None:
    check(run_for(program, 6, first_seed=1))


@needs_gcc
@pytest.mark.long
@pytest.mark.timeout(3600 * 2)
def test_hostile_programs_for_as_long_as_one_likes(program: Path) -> None:
    seconds = float(os.environ.get("SOFTCVM_HOSTILE_SECONDS", "60"))
    seed = int(os.environ.get("SOFTCVM_HOSTILE_SEED", "1000"))
    report = run_for(program, seconds, first_seed=seed)
    print(report.as_text())
    check(report)


def test_checked_runs_end_as_the_program_does() -> None:
    done = softcvm_exec("sh", "-c", "exit 3", options=("--check",))
    assert (done.returncode, done.stderr) == (3, "")


def test_a_vcpu_whose_thread_sleeps_is_ended_by_its_own_signal_while_others_call() -> None:
    out = caught("""
        vm = ioctl(kvm, CREATE_VM, 0)
        cap = struct.pack("<IIQ", 121, 0, 24) + bytes(88)  # KVM_CAP_SPLIT_IRQCHIP
        ioctl(vm, 0x4068AEA3, bytearray(cap))
        vcpu = ioctl(vm, CREATE_VCPU, 1)
        over = threading.Event()
        def busy():
            while not over.is_set():
                ioctl(kvm, API_VERSION)
        others = [threading.Thread(target=busy) for _ in range(2)]
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
        [t.start() for t in others]
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
        signal.signal(signal.SIGALRM, lambda *a: None)
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        print(ioctl(vcpu, RUN))
        over.set()
        [t.join() for t in others]
    """)
    assert out == "EINTR"


def test_who_waits_for_a_busy_vcpu_keeps_nobody_else_waiting() -> None:
    out = caught("""
        vm = ioctl(kvm, CREATE_VM, 0)
        cap = struct.pack("<IIQ", 121, 0, 24) + bytes(88)
        ioctl(vm, 0x4068AEA3, bytearray(cap))
        vcpu = ioctl(vm, CREATE_VCPU, 1)
        signal.signal(signal.SIGUSR1, lambda *a: None)
        said = []
        sleeper = threading.Thread(target=lambda: said.append(ioctl(vcpu, RUN)))
        sleeper.start()
        time.sleep(0.2)
        waiter = threading.Thread(target=lambda: said.append(ioctl(vcpu, GET_REGS, bytearray(144))))
        waiter.start()
        time.sleep(0.2)
        print(ioctl(kvm, API_VERSION), said)
        signal.pthread_kill(sleeper.ident, signal.SIGUSR1)
        sleeper.join(); waiter.join()
        print(sorted(map(str, said)))
    """)
    assert out.split("\n") == ["12 []", "['0', 'EINTR']"]


def test_what_is_not_modelled_is_refused_first_where_linux_refuses_it() -> None:
    out = caught("""
        vm = ioctl(kvm, CREATE_VM, 0)
        vcpu = ioctl(vm, CREATE_VCPU, 0)
        IRQFD, IRQ_LINE, CREATE_PIT, GET_PIT2 = 0x4020AE76, 0x4008AE61, 0xAE64, 0x8070AE9F
        INTERRUPT, CREATE_DEVICE = 0x4004AE86, 0xC00CAEE0
        print(ioctl(vm, IRQFD, 0), ioctl(vm, IRQ_LINE, bytearray(8)), ioctl(vm, CREATE_PIT))
        print(ioctl(vm, GET_PIT2, bytearray(112)), ioctl(vcpu, INTERRUPT, bytearray(b"\\0\\1\\0\\0")))
        print(ioctl(vm, CREATE_DEVICE, bytearray(b"\\1" + bytes(11))))
        informative = struct.pack("<I", 21).ljust(104, b"\\0")
        print(ioctl(vm, 0x4068AEA3, bytearray(informative)))
    """)
    assert out.split() == ["EFAULT", "ENXIO", "ENOENT", "ENXIO", "EINVAL", "ENODEV", "EINVAL"]


def test_a_program_that_ends_while_its_vcpu_runs_ends_softcvm_quietly() -> None:
    for _ in range(3):
        out = caught("""
            vm = ioctl(kvm, CREATE_VM, 0)
            cap = struct.pack("<IIQ", 121, 0, 24) + bytes(88)
            ioctl(vm, 0x4068AEA3, bytearray(cap))
            vcpu = ioctl(vm, CREATE_VCPU, 1)
            threading.Thread(target=lambda: ioctl(vcpu, RUN), daemon=True).start()
            time.sleep(0.1)
            print("over", flush=True)
            os._exit(0)
        """)
        assert out == "over"


def test_a_program_cannot_shrink_what_softcvm_has_mapped() -> None:
    """Stand-ins and DRAM are memfds that the program gets descriptors of; it reaches them past the filter."""
    out = caught("""
        vm = ioctl(kvm, CREATE_VM, 0)
        vcpu = ioctl(vm, CREATE_VCPU, 0)
        print(refused(os.truncate, f"/proc/self/fd/{vcpu}", 0), type(ioctl(vcpu, GET_REGS, bytearray(144))).__name__)
        print(ioctl(vcpu, RUN))
    """)
    assert out.split() == ["EPERM", "int", "0"]
