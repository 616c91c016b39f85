"""`softcvm exec`: programs caught as they are, from their first instruction to their exit status."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.attach.caught import caught, children_of, softcvm_exec


@pytest.mark.parametrize("status", [0, 1, 42])
def test_the_exit_status_is_the_programs(status: int) -> None:
    assert softcvm_exec("sh", "-c", f"exit {status}").returncode == status


@pytest.mark.parametrize("signo", [signal.SIGTERM, signal.SIGSEGV, signal.SIGKILL])
def test_a_signal_ends_it_as_a_shell_says(signo: int) -> None:
    assert softcvm_exec("sh", "-c", f"kill -{signo} $$").returncode == 128 + signo


def test_streams_are_the_programs() -> None:
    done = softcvm_exec("sh", "-c", "cat; echo err >&2", stdin="hello\n")
    assert (done.stdout, done.stderr) == ("hello\n", "err\n")


def test_a_program_that_cannot_be_executed_is_named(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("data")
    done = softcvm_exec("/no/such/program")
    assert done.returncode == 127
    assert done.stderr == "softcvm exec: /no/such/program: No such file or directory\n"
    done = softcvm_exec(str(plain))
    assert done.returncode == 126
    assert done.stderr == f"softcvm exec: {plain}: Permission denied\n"
    assert softcvm_exec("no-such-program-anywhere").returncode == 127


def test_no_program_is_bad_input() -> None:
    done = softcvm_exec()
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


def test_the_device_node_is_there_whatever_the_real_machine_has() -> None:
    out = caught("""
        import stat
        s = os.stat("/dev/kvm")
        print(ioctl(kvm, API_VERSION), os.access("/dev/kvm", os.R_OK | os.W_OK))
        print(stat.S_ISCHR(s.st_mode), os.major(s.st_rdev), os.minor(s.st_rdev))
        print(os.path.exists("/dev/sev"), refused(os.open, "/dev/sev-guest", os.O_RDWR))
    """)
    assert out.split("\n") == ["12 True", "True 10 232", "True ENOENT"]


def test_the_host_tells_one_story_about_itself() -> None:
    out = caught("""
        print(open("/sys/module/kvm_amd/parameters/sev_snp").read().strip())
        print(refused(open, "/sys/module/kvm_intel/parameters/ept"))
        print("sev_snp" in open("/proc/cpuinfo").read())
    """)
    assert out.split() == ["Y", "ENOENT", "True"]


def test_a_guest_memfd_is_a_file_of_its_own_kind() -> None:
    out = caught("""
        vm = ioctl(kvm, CREATE_VM, 0)
        vm = ioctl(kvm, CREATE_VM, 1)
        fd = gmem(vm, 0x4000)
        st = os.fstat(fd)
        print(st.st_size, st.st_blksize)
        print(refused(os.read, fd, 1), refused(os.write, fd, b"x"), refused(os.lseek, fd, 0, 0))
        libc = ctypes.CDLL(None, use_errno=True)
        def fallocate(mode, offset, length):
            done = libc.fallocate(fd, mode, ctypes.c_long(offset), ctypes.c_long(length))
            return "OK" if done == 0 else errno.errorcode[ctypes.get_errno()]
        print(fallocate(1, 0, 0x1000), fallocate(3, 0x1000, 0x1000))
        print(fallocate(1, 1, 0x1000), fallocate(0, 0, 0x1000), fallocate(1, 0x4000, 0x1000))
        print(refused(mmap.mmap, fd, 0x1000))
    """)
    assert out.split() == [
        *("16384", "4096", "EINVAL", "EINVAL", "ESPIPE", "OK", "OK"),
        *("EINVAL", "ENOTSUP", "EINVAL", "ENODEV"),
    ]


def test_descriptors_behave_as_descriptors_do() -> None:
    out = caught("""
        vm = ioctl(kvm, CREATE_VM, 0)
        other = os.dup(vm)
        os.close(vm)
        print(ioctl(vm, CHECK_EXTENSION, 10), ioctl(other, CHECK_EXTENSION, 10) > 0)
        print(fcntl.fcntl(other, fcntl.F_GETFD), fcntl.fcntl(vm2 := ioctl(kvm, CREATE_VM, 0), fcntl.F_GETFD))
        print(os.dup2(kvm, vm2) == vm2, ioctl(vm2, API_VERSION))
        print(os.dup2(0, vm2) == vm2, ioctl(vm2, API_VERSION))
        more = fcntl.fcntl(kvm, fcntl.F_DUPFD, 600)
        print(more >= 600, ioctl(more, API_VERSION))
    """)
    assert out.split() == [
        *("EBADF", "True", "1", "1", "True", "12", "True", "ENOTTY", "True", "12")
    ]


def test_descriptors_end_at_the_limit() -> None:
    out = caught("""
        resource.setrlimit(resource.RLIMIT_NOFILE, (540, 540))
        made = []
        while not isinstance(vm := ioctl(kvm, CREATE_VM, 0), str):
            made.append(vm)
        print(vm, max(made))
        os.close(made[3])
        print(ioctl(kvm, CREATE_VM, 0) == made[3])
    """)
    assert out.split() == ["EMFILE", "539", "True"]


def test_pointers_that_lead_nowhere_are_efault() -> None:
    out = caught("""
        vm = ioctl(kvm, CREATE_VM, 0)
        vcpu = ioctl(vm, CREATE_VCPU, 0)
        readonly = mmap.mmap(-1, 4096, prot=mmap.PROT_READ)
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_long
        addr = libc.mmap(0, 4096, 1, 0x22, -1, 0)
        def raw(arg):
            done = libc.ioctl(vcpu, ctypes.c_ulong(GET_REGS), ctypes.c_long(arg))
            return "OK" if done == 0 else errno.errorcode[ctypes.get_errno()]
        print(raw(0), raw(addr), raw(0xffff800000000000), raw(addr + 4096 - 8))
    """)
    assert out.split() == ["EFAULT"] * 4


def test_a_vcpu_runs_and_its_page_is_the_programs_memory() -> None:
    out = caught("""
        vm = ioctl(kvm, CREATE_VM, 0)
        vcpu = ioctl(vm, CREATE_VCPU, 0)
        size = ioctl(kvm, 0xAE04)
        run = mmap.mmap(vcpu, size)
        print(ioctl(vcpu, RUN), struct.unpack_from("<I", run, 8)[0])
        run[1] = 1
        print(ioctl(vcpu, RUN))
    """)
    # In real mode at the reset vector, where there is no memory: KVM_EXIT_INTERNAL_ERROR.
    assert out.split() == ["0", "17", "EINTR"]


def test_a_child_has_the_files_and_not_the_vm() -> None:
    out = caught("""
        vm = ioctl(kvm, CREATE_VM, 0)
        if os.fork() == 0:
            print(ioctl(kvm, API_VERSION), ioctl(vm, CHECK_EXTENSION, 10), flush=True)
            mine = ioctl(kvm, CREATE_VM, 0)
            print(ioctl(mine, CHECK_EXTENSION, 10) > 0, flush=True)
            os._exit(0)
        os.wait()
        print(ioctl(vm, CHECK_EXTENSION, 10) > 0)
    """)
    assert out.split() == ["12", "EIO", "True", "True"]


def test_a_program_that_it_starts_is_caught_too() -> None:
    out = caught("""
        import subprocess
        vm = ioctl(kvm, CREATE_VM, 0)
        os.set_inheritable(kvm, True)
        code = f"import fcntl; print(fcntl.ioctl({kvm}, 0xAE00))\\ntry: fcntl.ioctl({vm}, 0xAE03, 1)\\nexcept OSError as e: print(e.errno)"
        print(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, close_fds=False).stdout)
    """)
    assert out.split() == ["12", "9"]  # the VM's descriptor is close-on-exec: EBADF


def test_threads_use_one_machine_together() -> None:
    out = caught("""
        made, lock = [], threading.Lock()
        def work():
            for _ in range(40):
                vm = ioctl(kvm, CREATE_VM, 0)
                fd = gmem(vm, 0x2000) if not isinstance(vm, str) else vm
                with lock:
                    made.append(vm)
                os.close(vm)
        threads = [threading.Thread(target=work) for _ in range(6)]
        [t.start() for t in threads]; [t.join() for t in threads]
        print(len(made), all(isinstance(vm, int) for vm in made))
    """)
    assert out.split() == ["240", "True"]


def test_a_signal_ends_a_vcpu_that_sleeps() -> None:
    """An in-kernel APIC: a second vCPU waits in the kernel for an INIT that never comes."""
    out = caught("""
        vm = ioctl(kvm, CREATE_VM, 0)
        cap = struct.pack("<IIQ", 121, 0, 24) + bytes(88)  # KVM_CAP_SPLIT_IRQCHIP
        print(ioctl(vm, 0x4068AEA3, bytearray(cap)))
        vcpu = ioctl(vm, CREATE_VCPU, 1)
        signal.signal(signal.SIGALRM, lambda *a: None)
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        begun = time.monotonic()
        print(ioctl(vcpu, RUN), time.monotonic() - begun > 0.15)
    """)
    assert out.split() == ["0", "EINTR", "True"]


def test_what_is_not_modelled_ends_the_run_and_says_what() -> None:
    code = "import os, time; os.dup2(os.open('/dev/kvm', 2), 100); time.sleep(60)"
    begun = time.monotonic()
    done = softcvm_exec(sys.executable, "-c", code)
    assert done.returncode == 125
    assert done.stderr.startswith("softcvm exec: not modelled: ")
    assert time.monotonic() - begun < 20


def interrupted(program: list[str], signo: int) -> tuple[int, list[int]]:
    """Status of an exec that got a signal, as its whole process group did, and who is left of it."""
    path = os.pathsep.join(p for p in sys.path if p)
    child = subprocess.Popen(
        [sys.executable, "-m", "softcvm", "exec", "--", *program],
        env=dict(os.environ, PYTHONPATH=path),
        start_new_session=True,
        stdout=subprocess.PIPE,
    )
    assert child.stdout is not None
    child.stdout.readline()  # the program runs
    family = children_of(child.pid)
    if signo == signal.SIGKILL:
        child.kill()
    else:
        os.killpg(child.pid, signo)
    status = child.wait(timeout=20)
    child.stdout.close()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and any(Path(f"/proc/{p}").exists() for p in family):
        time.sleep(0.05)
    return status, [p for p in family if Path(f"/proc/{p}").exists()]


def test_ctrl_c_ends_the_program_and_leaves_nothing() -> None:
    status, left = interrupted(["sh", "-c", "echo; sleep 60 & sleep 61"], signal.SIGINT)
    assert (status, left) == (130, [])


def test_nothing_of_the_program_outlives_softcvm() -> None:
    status, left = interrupted(["sh", "-c", "echo; sleep 60"], signal.SIGKILL)
    assert (status, left) == (-signal.SIGKILL, [])


def test_a_trace_has_the_programs_calls(tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    caught("ioctl(kvm, CREATE_VM, 0)", options=("--trace", str(trace)))
    from softcvm.trace.reader import read

    with trace.open() as file:
        names = [record.get("name") for record in read(file)]
    assert names.index("open") < names.index("KVM_CREATE_VM")
