"""SEV and SEV-ES VMs for tests, on top of conftest's Host and Vm: launch, memory, measurement."""

import hmac
from collections.abc import Iterator
from contextlib import contextmanager
from errno import errorcode
from hashlib import sha256
from typing import Any

from softcvm.abi.kvm import _generated_kvm as k
from softcvm.abi.kvm.memory import KvmEncRegion, KvmUserspaceMemoryRegion2, VmType
from softcvm.abi.kvm.vcpu import KvmEnableCap
from softcvm.abi.layout import Layout
from softcvm.abi.sev import (
    KvmSevCmd,
    KvmSevDbg,
    KvmSevGuestStatus,
    KvmSevInit,
    KvmSevLaunchMeasure,
    KvmSevLaunchSecret,
    KvmSevLaunchStart,
    KvmSevLaunchUpdateData,
    SevCmdId,
)
from softcvm.abi.sev_firmware import SevGuestPolicy, SevMeasurement, SevPacketHeader
from softcvm.invariants import check_all

PAGE = 4096
ES = int(SevGuestPolicy.ES)
MOVE, COPY = k.KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM, k.KVM_CAP_VM_COPY_ENC_CONTEXT_FROM


class SevVm:
    """One VM of a host's first process, or of another user; legacy: a VM of type 0 and KVM_SEV_(ES_)INIT."""

    def __init__(
        self, host: Any, vm_type: int = VmType.SEV, *, init: bool = True, user: Any = None
    ) -> None:
        self.host = host
        self.user = host.user if user is None else user
        self.sys = self.user.sys
        self.sev_fd = self.sys.open("/dev/sev")
        dev_kvm = self.sys.open("/dev/kvm")
        self.fd = self.user.ioctl(dev_kvm, k.KVM_CREATE_VM, vm_type)
        self.sys.close(dev_kvm)
        self.vcpus: list[int] = []
        if init:
            assert self.cmd(SevCmdId.INIT2, KvmSevInit()) == 0

    @property
    def kvm(self) -> Any:
        return self.sys.proc.files.lookup(self.fd).private

    @property
    def sev(self) -> Any:
        return self.kvm.arch.sev

    @property
    def in_firmware(self) -> Any:
        return self.host.soc.psp.sev_guests[self.sev.handle]

    def issue(
        self, command: int, params: Layout | None = None, *, sev_fd: int | None = None
    ) -> tuple[int, KvmSevCmd]:
        """errno and the command as it comes back; params come back too."""
        addr = 0
        if params is not None:
            addr = self.user.mmap(PAGE)
            self.sys.store(addr, bytes(params))
        fd = self.sev_fd if sev_fd is None else sev_fd
        cmd = KvmSevCmd(id=command, data_ptr=addr, sev_fd=fd, error=0x77)
        errno = self.user.errno(self.fd, k.KVM_MEMORY_ENCRYPT_OP, cmd)
        if params is not None:
            params.data[:] = self.sys.load(addr, params.SIZE)
            self.sys.munmap(addr, PAGE)
        return errno, cmd

    def cmd(self, command: int, params: Layout | None = None) -> int:
        return self.issue(command, params)[0]

    def fw_error(self, command: int, params: Layout | None = None) -> int:
        """Firmware's status of a command that it refuses: KVM says EIO."""
        errno, cmd = self.issue(command, params)
        assert errorcode[errno] == "EIO"
        return cmd.error

    def start(self, policy: int = 0, *, handle: int = 0) -> KvmSevLaunchStart:
        params = KvmSevLaunchStart(policy=policy, handle=handle)
        assert self.cmd(SevCmdId.LAUNCH_START, params) == 0
        return params

    def update(self, addr: int, length: int) -> int:
        return self.cmd(
            SevCmdId.LAUNCH_UPDATE_DATA, KvmSevLaunchUpdateData(uaddr=addr, len=length)
        )

    def data(self, contents: bytes) -> int:
        """Contents in fresh memory, encrypted there; the address."""
        addr: int = self.user.mmap(len(contents))
        self.sys.store(addr, contents)
        assert self.update(addr, len(contents)) == 0
        return addr

    def measure(self, length: int = SevMeasurement.SIZE) -> SevMeasurement:
        addr = self.user.mmap(PAGE)
        params = KvmSevLaunchMeasure(uaddr=addr, len=length)
        assert self.cmd(SevCmdId.LAUNCH_MEASURE, params) == 0
        return SevMeasurement(self.sys.load(addr, SevMeasurement.SIZE))

    def measured(self, digest: bytes, policy: int, length: int = SevMeasurement.SIZE) -> bool:
        """Whether the measurement is one of this launch digest, as the guest's owner finds out."""
        profile = self.host.soc.profile
        found = self.measure(length)
        api = bytes((4, profile.api_major, profile.api_minor, profile.build))
        covered = api + policy.to_bytes(4, "little") + digest + found.mnonce
        return hmac.new(bytes(16), covered, sha256).digest() == found.measure

    def status(self) -> KvmSevGuestStatus:
        params = KvmSevGuestStatus()
        assert self.cmd(SevCmdId.GUEST_STATUS, params) == 0
        return params

    def vcpu(self, vcpu_id: int | None = None) -> int:
        vcpu_id = len(self.vcpus) if vcpu_id is None else vcpu_id
        self.vcpus.append(self.user.ioctl(self.fd, k.KVM_CREATE_VCPU, vcpu_id))
        return self.vcpus[-1]

    def slot(self, npages: int) -> int:
        """A memslot at GFN 0; its user address."""
        addr: int = self.user.mmap(npages * PAGE)
        region = KvmUserspaceMemoryRegion2(memory_size=npages * PAGE, userspace_addr=addr)
        self.user.ioctl(self.fd, k.KVM_SET_USER_MEMORY_REGION2, region)
        return addr

    def region(self, addr: int, size: int, *, register: bool = True) -> int:
        request = (
            k.KVM_MEMORY_ENCRYPT_REG_REGION if register else k.KVM_MEMORY_ENCRYPT_UNREG_REGION
        )
        errno: int = self.user.errno(self.fd, request, KvmEncRegion(addr=addr, size=size))
        return errno

    def debug(self, src: int, dst: int, length: int, *, decrypt: bool = True) -> int:
        command = SevCmdId.DBG_DECRYPT if decrypt else SevCmdId.DBG_ENCRYPT
        return self.cmd(command, KvmSevDbg(src_uaddr=src, dst_uaddr=dst, len=length))

    def enable(self, cap: int, fd: int) -> int:
        errno: int = self.user.errno(
            self.fd, k.KVM_ENABLE_CAP, KvmEnableCap(cap=cap, arg0=fd & (1 << 64) - 1)
        )
        return errno

    def move_from(self, source: "SevVm") -> int:
        return self.enable(MOVE, source.fd)

    def mirror(self, source: "SevVm") -> int:
        return self.enable(COPY, source.fd)

    def close(self) -> None:
        for fd in (*self.vcpus, self.fd, self.sev_fd):
            self.sys.close(fd)

    def secret(
        self, addr: int, plain: bytes, measure: bytes, **header: Any
    ) -> KvmSevLaunchSecret:
        """Parameters of a LAUNCH_SECRET, its packet sealed with the transport keys of no session: zeroes."""
        packet, sealed = seal(plain, measure, **header)
        blob = self.user.mmap(2 * PAGE)
        self.sys.store(blob, bytes(sealed))
        self.sys.store(blob + PAGE, packet)
        return KvmSevLaunchSecret(
            hdr_uaddr=blob,
            hdr_len=SevPacketHeader.SIZE,
            guest_uaddr=addr,
            guest_len=len(plain),
            trans_uaddr=blob + PAGE,
            trans_len=len(packet),
        )


def seal(
    plain: bytes, measure: bytes, *, flags: int = 0, iv: bytes = bytes(range(16))
) -> tuple[bytes, SevPacketHeader]:
    """A secret as its owner wraps it, with AES in counter mode spelled out block by block."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    ecb = Cipher(algorithms.AES(bytes(16)), modes.ECB()).encryptor()
    packet = b""
    for at in range(0, len(plain), 16):
        counter = (int.from_bytes(iv, "big") + at // 16) % (1 << 128)
        stream = ecb.update(counter.to_bytes(16, "big"))
        packet += bytes(a ^ b for a, b in zip(plain[at : at + 16], stream, strict=True))
    length = len(plain).to_bytes(4, "little")
    covered = b"\x01" + flags.to_bytes(4, "little") + iv + length + length + packet + measure
    mac = hmac.new(bytes(16), covered, sha256).digest()
    return packet, SevPacketHeader(flags=flags, iv=iv, mac=mac)


def launched(host: Any, *, es: bool = False, vcpus: int = 0, user: Any = None) -> SevVm:
    """A VM as the kernel's selftests start one: of type 0, by the legacy ioctls, not finished."""
    vm = SevVm(host, VmType.DEFAULT, init=False, user=user)
    assert vm.cmd(SevCmdId.ES_INIT if es else SevCmdId.INIT) == 0
    for _ in range(vcpus):
        vm.vcpu()
    vm.start(ES if es else 0)
    if es:
        assert vm.cmd(SevCmdId.LAUNCH_UPDATE_VMSA) == 0
    return vm


def plain_vm(host: Any, *, vcpus: int = 0, user: Any = None) -> SevVm:
    """A VM of type 0 that is nothing yet."""
    vm = SevVm(host, VmType.DEFAULT, init=False, user=user)
    for _ in range(vcpus):
        vm.vcpu()
    return vm


@contextmanager
def nothing_left(host: Any) -> Iterator[None]:
    """Invariants hold, and in the end the host's RMP, free pages and firmware are as they were."""
    census, free = host.machine.census(), host.linux.page_alloc.free_pages
    yield
    holds(host)
    host.machine.teardown()
    assert host.machine.census() == census
    assert host.linux.page_alloc.free_pages == free
    assert host.linux.leaked_pages == 0
    assert host.soc.psp.sev_guests == {}
    holds(host)


def holds(host: Any) -> None:
    broken = [found for found in check_all(host.machine) if found.violations]
    assert not broken, broken
