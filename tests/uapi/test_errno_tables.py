"""Every errno of KVM's private-memory ioctls, in the order in which the kernel checks.

Read beside Documentation/virt/kvm/api.rst and virt/kvm/kvm_main.c, virt/kvm/guest_memfd.c,
arch/x86/kvm/mmu/mmu.c, arch/x86/kvm/svm/sev.c (v6.12.117, v6.18, v7.2).  A row is (what is wrong,
errno, a word of the model's reason, arguments).  Each is tried alone; then every two rows of a table
together, where the upper one must win.  Rows that one kernel lacks say so.
"""

import re
from functools import partial
from typing import Any

import pytest

from softcvm import Machine
from softcvm.abi.kvm import _generated_kvm as k
from softcvm.abi.kvm.memory import (
    KvmClearDirtyLog,
    KvmCreateGuestMemfd,
    KvmMemoryAttributes,
    KvmPreFaultMemory,
    KvmUserspaceMemoryRegion2,
    VmType,
)
from softcvm.abi.kvm.vcpu import KvmEnableCap
from softcvm.abi.layout import Layout
from softcvm.abi.sev import (
    KvmSevCmd,
    KvmSevInit,
    KvmSevSnpLaunchFinish,
    KvmSevSnpLaunchStart,
    KvmSevSnpLaunchUpdate,
    SevCmdId,
)
from softcvm.kernel.task import Rlimits
from softcvm.sim.choice import Scripted
from tests.uapi.calls import GUEST_MEMFD, MIB, PAGE, PRIVATE, VmCalls, anon
from tests.uapi.errno_table import KERNELS, Fault, outcome, pairs

U64 = (1 << 64) - 1
BAD = 0x1000
"""An address that nothing is mapped at."""
NEW = ("6.18", "7.3")

# KVM_CREATE_GUEST_MEMFD, api.rst 4.142

CREATE = [
    Fault("the argument cannot be read", "EFAULT", "nothing is mapped", {"_pointer": 1}),
    Fault("an unknown flag", "EINVAL", "flags", {"flags": 1 << 5}),
    Fault("size 0", "EINVAL", "size", {"size": 0}),
    Fault("a size of half a page", "EINVAL", "size", {"size": PAGE // 2}),
    Fault("a negative size", "EINVAL", "size", {"size": 1 << 63}),
    Fault("the descriptor table is full", "EMFILE", "NOFILE", {"_full": 1}),
]
CREATE_FLAGS = [
    # flags, VM type, kernels that take them
    (1, VmType.SW_PROTECTED, NEW),
    (1, VmType.DEFAULT, NEW),
    (3, VmType.DEFAULT, NEW),
    (2, VmType.DEFAULT, NEW),
    (3, VmType.SW_PROTECTED, ()),
    (2, VmType.SNP, ()),
    (4, VmType.DEFAULT, ()),
]

# KVM_SET_USER_MEMORY_REGION2, api.rst 4.140

LAST_PAGE = U64 & ~(PAGE - 1)
OFFSET_WRAPS = {"offset": LAST_PAGE, "_ends_at_offset": 1}
GPA_WRAPS = {"gpa": LAST_PAGE, "_ends_at_gpa": 1}
DELETE = {"size": 0, "slot": 7, "_ends_at_offset": 0, "_ends_at_gpa": 0}
"""A slot of no size ends nowhere, and only one that is not there cannot be deleted."""
REGION = [
    Fault("the argument cannot be read", "EFAULT", "nothing is mapped", {"_pointer": 1}),
    Fault("a slot number of KVM's own", "EINVAL", "slot 32764", {"slot": 32764}),
    Fault("an unknown flag", "EINVAL", "flags", {"flags": GUEST_MEMFD | 8}),
    Fault("dirty logging of private memory", "EINVAL", "flags", {"flags": GUEST_MEMFD | 1}),
    Fault("private memory read-only", "EINVAL", "flags", {"flags": GUEST_MEMFD | 2}),
    Fault("a size of half a page", "EINVAL", "memory_size", {"size": PAGE // 2}),
    Fault("an unaligned GPA", "EINVAL", "guest_phys_addr", {"gpa": PAGE // 2}),
    Fault("an unaligned user address", "EINVAL", "userspace_addr", {"hva": 1}),
    Fault("a user address in the kernel", "EINVAL", "userspace_addr", {"hva": 1 << 63}),
    Fault("an unaligned offset", "EINVAL", "guest_memfd_offset", {"offset": PAGE // 2}),
    Fault("offset + size wraps", "EINVAL", "guest_memfd_offset", OFFSET_WRAPS),
    Fault("no such address space", "EINVAL", "address space", {"slot": 1 << 16}),
    Fault("the GPA range wraps", "EINVAL", "wraps", GPA_WRAPS),
    Fault("2^31 pages", "EINVAL", "more pages", {"size": 1 << 43, "hva": 0}),
    Fault("deleting what is not there", "EINVAL", "to delete", DELETE),
    Fault("a private slot exists with this number", "EINVAL", "deleted", {"slot": 2}),
    Fault("the GPA is another slot's", "EEXIST", "overlaps", {"gpa": 0}),
    Fault("the descriptor is not open", "EBADF", "", {"gmem": 99}),
    Fault("the descriptor is no guest_memfd", "EINVAL", "no guest_memfd", {"gmem": 3}),
    Fault("another VM's guest_memfd", "EINVAL", "of VM", {"_theirs": 1}),
    Fault("the range ends beyond the file", "EINVAL", "beyond", {"offset": 4 * MIB}),
    Fault("the indices are bound already", "EINVAL", "bound already", {"offset": 2 * MIB}),
    Fault("a GFN beyond MAXPHYADDR", "EINVAL", "MAXPHYADDR", {"gpa": 1 << 60}),
]
MODIFY = [
    # An existing shared slot 0, 1 MiB at GPA 0, is set again with one difference.
    Fault("it becomes private", "EINVAL", "deleted", {"flags": GUEST_MEMFD}),
    Fault("another user address", "EINVAL", "userspace_addr or", {"hva": 16 * MIB}),
    Fault("another size", "EINVAL", "userspace_addr or", {"size": 2 * MIB}),
    Fault("READONLY", "EINVAL", "READONLY", {"flags": 2}),
    Fault("moved onto another slot", "EEXIST", "overlaps", {"gpa": 16 * MIB}),
    Fault("moved beyond MAXPHYADDR", "EINVAL", "MAXPHYADDR", {"gpa": 1 << 60}),
]
MODIFY_GOOD: list[dict[str, int]] = [{}, {"flags": 1}, {"gpa": 8 * MIB}, {"size": 0}]

# KVM_SET_MEMORY_ATTRIBUTES, api.rst 4.141

ATTRIBUTES = [
    Fault("the argument cannot be read", "EFAULT", "nothing is mapped", {"_pointer": 1}),
    Fault("a flag", "EINVAL", "flags", {"flags": 1}),
    Fault("an attribute nobody knows", "EINVAL", "attributes", {"attributes": PRIVATE | 1}),
    Fault("size 0", "EINVAL", "empty or wraps", {"size": 0}),
    Fault("the range wraps", "EINVAL", "empty or wraps", {"address": U64 & ~(PAGE - 1)}),
    Fault("an unaligned address", "EINVAL", "aligned", {"address": 8}),
    Fault("an unaligned size", "EINVAL", "aligned", {"size": PAGE + 8}),
]

# KVM_PRE_FAULT_MEMORY, api.rst 4.143

PREFAULT = [
    Fault("the argument cannot be read", "EFAULT", "nothing is mapped", {"_pointer": 1}),
    Fault("a flag", "EINVAL", "flags", {"flags": 1}),
    Fault("an unaligned GPA", "EINVAL", "unaligned", {"gpa": 8}),
    Fault("size 0", "EINVAL", "empty", {"size": 0}),
    Fault("an unaligned size", "EINVAL", "unaligned", {"size": 8}),
    Fault("the VM is not launched", "EOPNOTSUPP", "launched", {"_early": 1}),
    Fault("private, and no memslot", "EFAULT", "no memslot", {"gpa": 8 * MIB}),
    Fault("shared, and no memslot", "ENOENT", "no memslot", {"gpa": 64 * MIB}),
]

# KVM_ENABLE_CAP on a VM, api.rst 4.37

# KVM_CLEAR_DIRTY_LOG, api.rst 4.117

CLEAR_DIRTY_LOG = [
    Fault("the argument cannot be read", "EFAULT", "nothing is mapped", {"_pointer": 1}),
    Fault("a slot number of KVM's own", "EINVAL", "no slot", {"slot": 32764}),
    Fault("no such address space", "EINVAL", "no slot", {"slot": 2 << 16}),
    Fault("first_page inside a word", "EINVAL", "first of a word", {"first_page": 32}),
    Fault("no such slot", "ENOENT", "no dirty bitmap", {"slot": 7}),
    Fault("a slot that keeps no log", "ENOENT", "no dirty bitmap", {"slot": 1}),
    Fault("first_page beyond the slot", "EINVAL", "pages", {"first_page": 320, "num_pages": 0}),
    Fault("more pages than are left", "EINVAL", "pages", {"num_pages": 257}),
    Fault("a part of a word that is not the last", "EINVAL", "pages", {"num_pages": 33}),
    Fault("the bitmap cannot be read", "EFAULT", "copy_from_user", {"dirty_bitmap": 0}),
]

OTHER_HYPERCALL = {"cap": k.KVM_CAP_EXIT_HYPERCALL, "arg0": 1 << 12 | 1}
ENABLE_CAP = [
    Fault("the argument cannot be read", "EFAULT", "nothing is mapped", {"_pointer": 1}),
    Fault("a flag", "EINVAL", "flags", {"flags": 1}),
    Fault("a hypercall that does not leave", "EINVAL", "hypercalls", OTHER_HYPERCALL),
    Fault("a capability nobody knows", "EINVAL", "enabled", {"cap": 12345}),
]


class Calls:
    """One VM of a process on a machine, and the good arguments of each call."""

    def __init__(
        self, kernel: str, vm_type: int = VmType.SW_PROTECTED, rlimits: Rlimits | None = None
    ) -> None:
        self.machine = Machine(kernel=kernel, memory=128 * MIB)
        self.sys = self.machine.process(rlimits)
        self.vm = VmCalls(self.sys, vm_type)

    def ioctl(self, fd: int, request: int, fields: dict[str, int], args: Layout) -> None:
        self.sys.ioctl(fd, request, BAD if "_pointer" in fields else args.data)


class Create(Calls):
    def __call__(self, fields: dict[str, int]) -> None:
        if "_full" in fields:
            while len(self.sys.proc.files.fds) < 16:
                self.sys.dup(self.vm.kvm)
            self.sys.proc.rlimits = Rlimits(nofile=16)
        args = KvmCreateGuestMemfd(
            size=fields.get("size", PAGE), flags=fields.get("flags", 0), reserved=b"\xff" * 48
        )
        self.ioctl(self.vm.fd, k.KVM_CREATE_GUEST_MEMFD, fields, args)


class Region(Calls):
    """Slot 0 is shared at 0, slot 2 private at 16M and bound to the gmem's third MiB."""

    def __init__(self, kernel: str, vm_type: int = VmType.SW_PROTECTED) -> None:
        super().__init__(kernel, vm_type)
        self.hva = anon(self.sys, 4 * MIB)
        self.vm.region(0, 0, MIB, self.hva)
        self.gmem = self.vm.gmem(4 * MIB)
        self.theirs = VmCalls(self.sys).gmem(4 * MIB)
        self.vm.region(2, 16 * MIB, MIB, self.hva, GUEST_MEMFD, self.gmem, 2 * MIB)

    def __call__(self, fields: dict[str, int]) -> None:
        args = KvmUserspaceMemoryRegion2(
            slot=fields.get("slot", 1),
            flags=fields.get("flags", GUEST_MEMFD),
            guest_phys_addr=fields.get("gpa", 4 * MIB),
            memory_size=fields.get("size", MIB),
            userspace_addr=fields.get("hva", self.hva),
            guest_memfd_offset=fields.get("offset", 0),
            guest_memfd=self.theirs if "_theirs" in fields else fields.get("gmem", self.gmem),
            pad1=0xFFFF_FFFF,
            pad2=b"\xff" * 112,
        )
        self.ioctl(self.vm.fd, k.KVM_SET_USER_MEMORY_REGION2, fields, args)


class Modify(Region):
    def __init__(self, kernel: str, vm_type: int = VmType.SW_PROTECTED) -> None:
        super().__init__(kernel, vm_type)

    def __call__(self, fields: dict[str, int]) -> None:
        super().__call__({"slot": 0, "gpa": 0, "flags": 0, **fields})


class Attributes(Calls):
    def __call__(self, fields: dict[str, int]) -> None:
        args = KvmMemoryAttributes(
            address=fields.get("address", 0),
            size=fields.get("size", MIB),
            attributes=fields.get("attributes", PRIVATE),
            flags=fields.get("flags", 0),
        )
        self.ioctl(self.vm.fd, k.KVM_SET_MEMORY_ATTRIBUTES, fields, args)


class Prefault(Calls):
    def __init__(self, kernel: str) -> None:
        super().__init__(kernel)
        self.vm.private_slot(size=MIB)
        self.vm.attributes(8 * MIB, MIB, PRIVATE)
        self.vcpu = self.vm.vcpu()

    def __call__(self, fields: dict[str, int]) -> None:
        vcpu = self.vcpu
        if "_early" in fields:
            vcpu = VmCalls(self.sys, VmType.SNP).vcpu()
        args = KvmPreFaultMemory(
            gpa=fields.get("gpa", 0),
            size=fields.get("size", PAGE),
            flags=fields.get("flags", 0),
            padding=b"\xff" * 40,
        )
        self.ioctl(vcpu, k.KVM_PRE_FAULT_MEMORY, fields, args)


class ClearDirtyLog(Calls):
    """Slot 0 logs, slot 1 does not; 256 pages each."""

    def __init__(self, kernel: str) -> None:
        super().__init__(kernel, VmType.DEFAULT)
        hva = anon(self.sys, MIB)
        self.vm.region(0, 0, MIB, hva, 1)
        self.vm.region(1, MIB, MIB, hva)
        self.bitmap = anon(self.sys, MIB)

    def __call__(self, fields: dict[str, int]) -> None:
        args = KvmClearDirtyLog(
            slot=fields.get("slot", 0),
            num_pages=fields.get("num_pages", 256),
            first_page=fields.get("first_page", 0),
            dirty_bitmap=fields.get("dirty_bitmap", self.bitmap),
        )
        self.ioctl(self.vm.fd, k.KVM_CLEAR_DIRTY_LOG, fields, args)


class EnableCap(Calls):
    def __call__(self, fields: dict[str, int]) -> None:
        args = KvmEnableCap(
            cap=fields.get("cap", k.KVM_CAP_EXIT_HYPERCALL),
            flags=fields.get("flags", 0),
            arg0=fields.get("arg0", 1 << 12),
        )
        self.ioctl(self.vm.fd, k.KVM_ENABLE_CAP, fields, args)


# KVM_MEMORY_ENCRYPT_OP, Documentation/virt/kvm/x86/amd-memory-encryption.rst

OP = [
    Fault("the argument cannot be read", "EFAULT", "nothing is mapped", {"_pointer": 1}),
    Fault("a SEV command for an SNP VM", "EPERM", "on an SNP VM", {"id": 2}),
    Fault("no such command", "EINVAL", "does not exist", {"id": 104}),
]
INIT2 = [
    Fault("INIT2 of a VM that is none of SEV's", "EINVAL", "due", {"_type": 0}),
    Fault("the parameters cannot be read", "EFAULT", "nothing is mapped", {"_params": 1}),
    Fault("vCPUs exist", "EINVAL", "vCPUs", {"_vcpu": 1}),
    Fault("a flag", "EINVAL", "flags", {"flags": 1}),
    Fault("a VMSA feature KVM keeps for itself", "EINVAL", "features", {"vmsa_features": 1}),
    Fault("GHCB protocol 3", "EINVAL", "GHCB", {"ghcb_version": 3}),
    Fault("GHCB protocol 1 for SNP", "EINVAL", "SNP needs", {"ghcb_version": 1}, NEW),
]
START = [
    Fault("not an SNP VM", "ENOTTY", "not SNP", {"_type": 3}),
    Fault("the parameters cannot be read", "EFAULT", "nothing is mapped", {"_params": 1}),
    Fault("the launch has started", "EINVAL", "already", {"_started": 1}),
    Fault("a flag", "EINVAL", "flags", {"flags": 1}),
    Fault(
        "a policy bit nobody knows", "EINVAL", "does not know", {"policy": 1 << 40 | 0x30000}
    ),
    Fault("the bit that must be one is zero", "EINVAL", "must be one", {"policy": 0x10000}),
    Fault("SMT is not allowed", "EINVAL", "must be one", {"policy": 0x20000}),
    Fault("a single socket", "EINVAL", "single socket", {"policy": 0x130000}),
    Fault("sev_fd is not open", "ENOTTY", "", {"sev_fd": 99}),
    Fault("sev_fd is not /dev/sev", "ENOTTY", "/dev/sev", {"sev_fd": 3}),
]
UPDATE = [
    Fault("not an SNP VM", "EINVAL", "before SNP_LAUNCH_START", {"_type": 3}),
    Fault("before the launch started", "EINVAL", "before", {"_unstarted": 1}),
    Fault("the parameters cannot be read", "EFAULT", "nothing is mapped", {"_params": 1}),
    Fault("half a page", "EINVAL", "len", {"len": PAGE // 2}),
    Fault("a flag", "EINVAL", "flags", {"flags": 1}),
    Fault("a VMSA page", "EINVAL", "type 2", {"type": 2}),
    Fault("no page type", "EINVAL", "type 0", {"type": 0}),
    Fault("nothing", "EINVAL", "len is 0", {"len": 0}, ("7.3",)),
    Fault("an unaligned source", "EINVAL", "uaddr", {"uaddr": 8}, ("7.3",)),
    Fault("no memslot", "EINVAL", "no guest_memfd", {"gfn_start": 1 << 20}),
    Fault("a slot without guest_memfd", "EINVAL", "no guest_memfd", {"gfn_start": 4096}),
    Fault("no source that can be pinned", "EIO", "nothing is mapped", {"uaddr": BAD}, ("7.3",)),
    Fault("pages that are not private", "EIO", "not private", {"gfn_start": 8}),
    Fault(
        "no source to copy from", "EIO", "nothing is mapped", {"uaddr": BAD}, ("6.12", "6.18")
    ),
    Fault("sev_fd is not open", "EIO", "", {"sev_fd": 99}),
]
FINISH = [
    Fault("not an SNP VM", "ENOTTY", "not SNP", {"_type": 3}),
    Fault("before the launch started", "EINVAL", "before", {"_unstarted": 1}),
    Fault("the parameters cannot be read", "EFAULT", "nothing is mapped", {"_params": 1}),
    Fault("a flag", "EINVAL", "flags", {"flags": 1}),
    Fault("an ID block without an address", "EINVAL", "", {"id_block_en": 1}),
    Fault("an ID block at a bad address", "EFAULT", "nothing is mapped", {"_block": 1}),
    Fault("firmware refuses the ID block", "EIO", "", {"_zero_block": 1}),
]


class Op(Calls):
    """KVM_MEMORY_ENCRYPT_OP on an SNP VM whose launch is ready for `command`."""

    command = SevCmdId.SNP_LAUNCH_START
    params: type[Layout] = KvmSevSnpLaunchStart
    good: dict[str, int] = {"policy": 0x30000}

    def __init__(self, kernel: str) -> None:
        super().__init__(kernel, VmType.SNP)
        self.dev_sev = self.sys.open("/dev/sev")
        self.page = anon(self.sys, 2 * PAGE)

    def prepare(self, vm: VmCalls, fields: dict[str, int]) -> None:
        self.command_on(vm, SevCmdId.INIT2, KvmSevInit())

    def command_on(
        self,
        vm: VmCalls,
        command: int,
        params: Layout | None,
        fields: dict[str, int] | None = None,
    ) -> None:
        fields = fields or {}
        if params is not None:
            self.sys.store(self.page, bytes(params))
        cmd = KvmSevCmd(
            id=command,
            pad0=0xFFFF_FFFF,
            data_ptr=BAD if "_params" in fields else self.page,
            sev_fd=fields.get("sev_fd", self.dev_sev),
        )
        self.ioctl(vm.fd, k.KVM_MEMORY_ENCRYPT_OP, fields, cmd)

    def __call__(self, fields: dict[str, int]) -> None:
        vm = VmCalls(self.sys, fields["_type"]) if "_type" in fields else self.vm
        self.prepare(vm, fields)
        values: dict[str, Any] = {**self.good, **fields}
        layout = self.params.fields()
        params = self.params(**{name: v for name, v in values.items() if name in layout})
        self.command_on(vm, fields.get("id", self.command), params, fields)

    def memory(self, vm: VmCalls) -> None:
        if vm.fds:
            return
        hva = anon(self.sys, MIB)
        vm.region(0, 0, 16 * PAGE, hva, GUEST_MEMFD, vm.gmem(16 * PAGE))
        vm.region(1, 16 * MIB, MIB, hva)
        vm.attributes(0, 8 * PAGE, PRIVATE)


class Init2(Op):
    command, params = SevCmdId.INIT2, KvmSevInit

    def prepare(self, vm: VmCalls, fields: dict[str, int]) -> None:
        if "_vcpu" in fields:
            vm.vcpu()


class Start(Op):
    def prepare(self, vm: VmCalls, fields: dict[str, int]) -> None:
        super().prepare(vm, fields)
        if "_started" in fields and "_type" not in fields:
            self.command_on(vm, self.command, KvmSevSnpLaunchStart(policy=0x30000))


class Update(Op):
    command = SevCmdId.SNP_LAUNCH_UPDATE
    params: type[Layout] = KvmSevSnpLaunchUpdate

    def prepare(self, vm: VmCalls, fields: dict[str, int]) -> None:
        super().prepare(vm, fields)
        if "_type" not in fields:
            self.memory(vm)
            if "_unstarted" not in fields:
                start = KvmSevSnpLaunchStart(policy=0x30000)
                self.command_on(vm, SevCmdId.SNP_LAUNCH_START, start)
        self.good = {"len": PAGE, "type": 1, "uaddr": self.page + PAGE}


class Finish(Update):
    command = SevCmdId.SNP_LAUNCH_FINISH
    params: type[Layout] = KvmSevSnpLaunchFinish

    def prepare(self, vm: VmCalls, fields: dict[str, int]) -> None:
        super().prepare(vm, fields)
        self.good = {}
        if "_block" in fields:
            self.good = {"id_block_en": 1, "id_block_uaddr": BAD}
        elif "_zero_block" in fields:
            zeroes = anon(self.sys, 2 * PAGE)
            self.good = {
                "id_block_en": 1,
                "id_block_uaddr": zeroes,
                "id_auth_uaddr": zeroes + PAGE,
            }


TABLES: dict[str, tuple[type[Any], list[Fault]]] = {
    "KVM_CREATE_GUEST_MEMFD": (Create, CREATE),
    "KVM_SET_USER_MEMORY_REGION2": (Region, REGION),
    "KVM_SET_USER_MEMORY_REGION2 of a slot that exists": (Modify, MODIFY),
    "KVM_SET_MEMORY_ATTRIBUTES": (Attributes, ATTRIBUTES),
    "KVM_PRE_FAULT_MEMORY": (Prefault, PREFAULT),
    "KVM_CLEAR_DIRTY_LOG": (ClearDirtyLog, CLEAR_DIRTY_LOG),
    "KVM_ENABLE_CAP": (EnableCap, ENABLE_CAP),
    "KVM_MEMORY_ENCRYPT_OP": (Op, OP),
    "KVM_SEV_INIT2": (Init2, INIT2),
    "KVM_SEV_SNP_LAUNCH_START": (Start, START),
    "KVM_SEV_SNP_LAUNCH_UPDATE": (Update, UPDATE),
    "KVM_SEV_SNP_LAUNCH_FINISH": (Finish, FINISH),
}
EXCLUSIVE = [{"_type", "_unstarted"}, {"_type", "_started"}, {"_block", "_zero_block"}]
EXCLUSIVE += [{"_block", "id_block_en"}, {"_zero_block", "id_block_en"}, {"_theirs", "gmem"}]


def found(says: str, reason: str) -> bool:
    return re.search(re.escape(says), reason) is not None


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", TABLES)
def test_each_thing_that_is_wrong_has_its_errno(name: str, kernel: str) -> None:
    new_call, table = TABLES[name]
    assert outcome(new_call(kernel), {}) == ("0", "")
    for fault in table:
        if kernel not in fault.kernels:
            continue
        errno, reason = outcome(new_call(kernel), fault.fields)
        assert errno == fault.errno, (fault.why, reason)
        assert found(fault.says, reason), (fault.why, reason)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", TABLES)
def test_of_two_things_that_are_wrong_the_upper_one_is_reported(name: str, kernel: str) -> None:
    new_call, table = TABLES[name]
    for first, fields in pairs(table, kernel):
        if any(names <= fields.keys() for names in EXCLUSIVE):
            continue
        errno, reason = outcome(new_call(kernel), fields)
        assert (errno, found(first.says, reason)) == (first.errno, True), (
            first.why,
            fields,
            reason,
        )


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("flags", "vm_type", "taken"), CREATE_FLAGS)
def test_guest_memfd_flags_by_kernel_and_vm(
    kernel: str, flags: int, vm_type: VmType, taken: tuple[str, ...]
) -> None:
    expected = "0" if kernel in taken else "EINVAL"
    assert outcome(Create(kernel, vm_type), {"flags": flags})[0] == expected


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("change", MODIFY_GOOD)
def test_what_a_shared_slot_may_become(kernel: str, change: dict[str, int]) -> None:
    assert outcome(Modify(kernel), change) == ("0", "")


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("vm_type", "attributes", "errno"),
    [
        (VmType.DEFAULT, 0, "0"),
        (VmType.DEFAULT, PRIVATE, "EINVAL"),
        (VmType.SEV, PRIVATE, "EINVAL"),
        (VmType.SEV_ES, PRIVATE, "EINVAL"),
        (VmType.SW_PROTECTED, PRIVATE, "0"),
        (VmType.SNP, PRIVATE, "0"),
        (VmType.SNP, 0, "0"),
    ],
)
def test_attributes_by_vm_type(
    kernel: str, vm_type: VmType, attributes: int, errno: str
) -> None:
    assert outcome(Attributes(kernel, vm_type), {"attributes": attributes})[0] == errno


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("choice", "new_call", "fields"),
    [
        ("mem_attr_reserve", Attributes, {}),
        ("gmem_bind_xarray", Region, {}),
        ("alloc_pages", Prefault, {}),
    ],
)
def test_memory_that_runs_out_is_enomem_once_every_argument_is_good(
    kernel: str, choice: str, new_call: type[Any], fields: dict[str, int]
) -> None:
    call = new_call(kernel)
    call.machine.linux.choices = Scripted({choice: [1]})
    assert outcome(call, fields)[0] == "ENOMEM"
    assert outcome(call, fields) == ("0", "")  # and nothing was left half done


@pytest.mark.parametrize("kernel", ["6.12", "6.18"])
def test_an_empty_launch_update_was_a_success_before_7_3(kernel: str) -> None:
    assert outcome(Update(kernel), {"len": 0}) == ("0", "")


@pytest.mark.parametrize("kernel", KERNELS)
def test_another_process_and_a_dead_vm_get_eio_before_anything_else(kernel: str) -> None:
    calls = Calls(kernel)
    vcpu = calls.vm.vcpu()
    other = calls.machine.process()
    (kvm,) = calls.machine.linux.vm_list
    for sys, fds in (
        (other, [calls.sys.give(fd, other) for fd in (calls.vm.fd, vcpu)]),
        (calls.sys, [calls.vm.fd, vcpu]),
    ):
        if sys is calls.sys:
            kvm.bug("a test says so")
        for fd in fds:
            for request in (k.KVM_CREATE_GUEST_MEMFD, k.KVM_RUN, 0x5401):
                with pytest.raises(OSError, match=r"another address space|dead") as refused:
                    sys.ioctl(fd, request, BAD)
                assert refused.value.errno == 5


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_vm_without_dirty_rings_has_none_to_reset(kernel: str) -> None:
    calls = Calls(kernel)
    with pytest.raises(OSError, match="no dirty rings") as refused:
        calls.sys.ioctl(calls.vm.fd, k.KVM_RESET_DIRTY_RINGS)
    assert refused.value.errno == 22


# KVM_RUN, api.rst 4.10


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("why", "argument", "immediate_exit", "errno"),
    [
        ("an argument", 1, 0, "EINVAL"),
        ("an argument, before immediate_exit", 1, 1, "EINVAL"),
        ("immediate_exit", 0, 1, "EINTR"),
    ],
)
def test_kvm_run_refuses(
    kernel: str, why: str, argument: int, immediate_exit: int, errno: str
) -> None:
    calls = Calls(kernel, VmType.SNP)
    vcpu = calls.vm.vcpu()
    run = calls.sys.mmap(3 * PAGE, 3, 1, vcpu)
    calls.sys.store(run + 1, bytes([immediate_exit]))

    class Run:
        machine = calls.machine

        def __call__(self, fields: dict[str, int]) -> None:
            calls.sys.ioctl(vcpu, k.KVM_RUN, argument)

    assert outcome(Run(), {})[0] == errno, why


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("slot", ["gmem", "none", "without a log", "beyond", "address space"])
def test_get_dirty_log_of_what_keeps_no_log(kernel: str, slot: str) -> None:
    """api.rst 4.8: EINVAL for numbers that cannot be, ENOENT for slots that keep no bitmap."""
    calls = Region(kernel)
    number, errno = {
        "gmem": (2, 2),
        "none": (5, 2),
        "without a log": (0, 2),
        "beyond": (32764, 22),
        "address space": (1 << 16, 22),
    }[slot]
    call = partial(calls.sys.ioctl, calls.vm.fd, k.KVM_GET_DIRTY_LOG)
    with pytest.raises(OSError, match="slot") as refused:
        call(bytearray(number.to_bytes(16, "little")))
    assert refused.value.errno == errno
