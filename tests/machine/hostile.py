"""What hostile processes do with VMs: create, back, launch and run them, in any order.

The rules of the game are in hostile_host.py, what the guests do in hostile_guest.py, SEV and SEV-ES in
hostile_sev.py.
"""

from dataclasses import dataclass
from typing import Any

from softcvm.abi.kvm import _generated_kvm as k
from softcvm.abi.kvm.memory import (
    KvmClearDirtyLog,
    KvmCreateGuestMemfd,
    KvmDirtyLog,
    KvmMemoryAttributes,
    KvmPreFaultMemory,
    KvmUserspaceMemoryRegion2,
    MapGpaRange,
    VmType,
)
from softcvm.abi.kvm.run import KVM_RUN_MMAP_SIZE, KvmExit, KvmRun
from softcvm.abi.kvm.vcpu import KvmEnableCap, KvmMpState, KvmRegs
from softcvm.abi.sev import (
    KvmSevInit,
    KvmSevSnpLaunchFinish,
    KvmSevSnpLaunchStart,
    KvmSevSnpLaunchUpdate,
    SevCmdId,
)
from softcvm.kernel.mm.memory import load, store
from softcvm.kernel.virt.kvm.gmem_inode import GmemFile, kvm_gmem_error_folio
from softcvm.sim.steps import Steps
from softcvm.uapi import dispatch
from tests.machine.hostile_guest import REGISTER, TAPES
from tests.machine.hostile_host import (
    ANY,
    GFNS,
    NO,
    NPAGES,
    PAGE,
    PRIVATE_ANON,
    RW,
    SHARED,
    YES,
    Area,
    Gmem,
    HostWorld,
    Vcpu,
    Vm,
    action,
    pick,
)

__all__ = ("World",)

KEEP, PUNCH = 1, 3
POLICY = 0x30000
TYPES = (4, 4, 4, 4, 1, 1, 0, 2, 3, 5, 9)


@dataclass
class World(HostWorld):
    """VMs on a HostWorld."""

    # -- VMs --------------------------------------------------------------------------------------

    @action(who=ANY, vm_type=TYPES)
    def create_vm(self, who: int, vm_type: int) -> Steps[None]:
        actor = self.actors[who % len(self.actors)]
        if len(self.vms) < 4:
            fd = yield from self.ioctl(actor, actor.kvm, k.KVM_CREATE_VM, vm_type)
            if fd is not None:
                self.vms.append(Vm(actor, fd, vm_type))

    @action(vm=ANY, ghcb=(0, 0, 0, 2, 1, 3), features=(0, 0, 0, 0x20, 1), flags=(0, 0, 0, 0, 1))
    def init2(self, vm: int, ghcb: int, features: int, flags: int) -> Steps[None]:
        held = pick(self.vms, vm)
        if held is not None:
            params = KvmSevInit(vmsa_features=features, ghcb_version=ghcb, flags=flags)
            yield from self.op(held, SevCmdId.INIT2, params)

    @action(vm=ANY, command=(0, 1, 3, 4, 7, 16, 22, 99, 100, 103, 104))
    def some_sev_command(self, vm: int, command: int) -> Steps[None]:
        held = pick(self.vms, vm)
        if held is not None and command != 103:
            yield from self.op(held, command, KvmSevInit())

    @action(vm=ANY, mask=(1 << 12, 1 << 12, 1 << 12, 0, 1))
    def hypercall_exits(self, vm: int, mask: int) -> Steps[None]:
        held = pick(self.vms, vm)
        if held is not None:
            cap = KvmEnableCap(cap=k.KVM_CAP_EXIT_HYPERCALL, arg0=mask)
            yield from self.ioctl(held.actor, held.fd, k.KVM_ENABLE_CAP, cap)

    @action(vm=ANY, quirk=NO)
    def irqchip_or_quirk(self, vm: int, quirk: bool) -> Steps[None]:
        held = pick(self.vms, vm)
        if held is None:
            return
        if quirk:
            cap = KvmEnableCap(cap=k.KVM_CAP_DISABLE_QUIRKS2, arg0=1 << 7)
            yield from self.ioctl(held.actor, held.fd, k.KVM_ENABLE_CAP, cap)
        else:
            yield from self.ioctl(held.actor, held.fd, k.KVM_CREATE_IRQCHIP)

    @action(vm=ANY, npages=NPAGES, flags=(0, 0, 1, 3, 3, 4))
    def create_gmem(self, vm: int, npages: int, flags: int) -> Steps[None]:
        held = pick(self.vms, vm)
        if held is not None:
            yield from self._gmem(held, npages, flags)

    def _gmem(self, vm: Vm, npages: int, flags: int) -> Steps[Gmem | None]:
        told = KvmCreateGuestMemfd(size=npages * PAGE, flags=flags)
        fd = yield from self.ioctl(vm.actor, vm.fd, k.KVM_CREATE_GUEST_MEMFD, told)
        if fd is None:
            return None
        gmem = Gmem(vm.actor, fd, npages, vm)
        self.gmems.append(gmem)
        return gmem

    @action(
        vm=ANY,
        slot=(0, 0, 1, 2, 3, 0x10000),
        gfn=GFNS,
        npages=NPAGES,
        flags=(4, 4, 4, 0, 0, 1, 2, 5),
        gmem=ANY,
        pgoff=(0, 0, 1, 16, 512),
        area=ANY,
        shift=(0, 0, 0, 1),
    )
    def set_slot(
        self,
        vm: int,
        slot: int,
        gfn: int,
        npages: int,
        flags: int,
        gmem: int,
        pgoff: int,
        area: int,
        shift: int,
    ) -> Steps[None]:
        """Create, move or reflag a memslot."""
        held, backing, memory = (
            pick(self.vms, vm),
            pick(self.gmems, gmem),
            pick(self.areas, area),
        )
        if held is None:
            return
        region = KvmUserspaceMemoryRegion2(
            slot=slot,
            flags=flags,
            guest_phys_addr=gfn * PAGE,
            memory_size=npages * PAGE,
            userspace_addr=(memory.addr if memory else 0) + shift * PAGE,
            guest_memfd_offset=pgoff * PAGE,
            guest_memfd=backing.fd if backing else 0,
        )
        yield from self.ioctl(held.actor, held.fd, k.KVM_SET_USER_MEMORY_REGION2, region)

    @action(vm=ANY, slot=(0, 0, 1, 2, 3, 0x10000), gfn=GFNS, log=(0, 0, 1))
    def move_slot(self, vm: int, slot: int, gfn: int, log: int) -> Steps[None]:
        """To another address, or dirty logging switched, with the rest of it as KVM knows it."""
        held = pick(self.vms, vm)
        kvm: Any = held and held.actor.sys.proc.files.fds.get(held.fd)
        kvm = getattr(kvm, "private", None)
        if held is None or not hasattr(kvm, "memslots"):
            return
        old = next((s for space in kvm.memslots for s in space.all() if s.key == slot), None)
        if old is not None:
            region = KvmUserspaceMemoryRegion2(
                slot=slot,
                flags=int(old.flags) ^ log,
                guest_phys_addr=(old.base_gfn if log else gfn) * PAGE,
                memory_size=old.npages * PAGE,
                userspace_addr=old.userspace_addr,
            )
            yield from self.ioctl(held.actor, held.fd, k.KVM_SET_USER_MEMORY_REGION2, region)

    @action(vm=ANY, slot=(0, 0, 1, 2, 3, 0x10000))
    def delete_slot(self, vm: int, slot: int) -> Steps[None]:
        held = pick(self.vms, vm)
        if held is not None:
            region = KvmUserspaceMemoryRegion2(slot=slot)
            yield from self.ioctl(held.actor, held.fd, k.KVM_SET_USER_MEMORY_REGION2, region)

    @action(vm=ANY, slot=(0, 0, 1, 2, 3, 0x10000), area=ANY)
    def fetch_log(self, vm: int, slot: int, area: int) -> Steps[None]:
        """KVM_GET_DIRTY_LOG, often into memory that is too small or not there."""
        held, memory = pick(self.vms, vm), pick(self.areas, area)
        if held is not None:
            log = KvmDirtyLog(slot=slot, dirty_bitmap=memory.addr if memory else 0)
            yield from self.ioctl(held.actor, held.fd, k.KVM_GET_DIRTY_LOG, log)

    @action(
        vm=ANY,
        slot=(0, 0, 1, 2, 3, 0x10000),
        area=ANY,
        first=(0, 0, 64, 512, 7),
        npages=NPAGES,
        options=(0, 1, 3, 3, 2),
    )
    def clear_log(
        self, vm: int, slot: int, area: int, first: int, npages: int, options: int
    ) -> Steps[None]:
        """KVM_CLEAR_DIRTY_LOG by whatever bits lie there; the VM then logs by other rules."""
        held, memory = pick(self.vms, vm), pick(self.areas, area)
        if held is not None:
            log = KvmClearDirtyLog(
                slot=slot,
                first_page=first,
                num_pages=npages,
                dirty_bitmap=memory.addr if memory else 0,
            )
            yield from self.ioctl(held.actor, held.fd, k.KVM_CLEAR_DIRTY_LOG, log)
            cap = KvmEnableCap(cap=k.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, arg0=options)
            yield from self.ioctl(held.actor, held.fd, k.KVM_ENABLE_CAP, cap)

    @action(vm=ANY, size=(4096, 4096, 8192, 0, 16), reset=YES)
    def dirty_rings(self, vm: int, size: int, reset: bool) -> Steps[None]:
        """Rings for a VM that has no vCPU yet, or a reset of what nobody harvested."""
        held = pick(self.vms, vm)
        if held is not None and reset:
            yield from self.ioctl(held.actor, held.fd, k.KVM_RESET_DIRTY_RINGS)
        elif held is not None:
            cap = KvmEnableCap(cap=k.KVM_CAP_DIRTY_LOG_RING_ACQ_REL, arg0=size)
            yield from self.ioctl(held.actor, held.fd, k.KVM_ENABLE_CAP, cap)

    @action(vm=ANY, gfn=GFNS, npages=NPAGES, private=YES)
    def set_attributes(self, vm: int, gfn: int, npages: int, private: bool) -> Steps[None]:
        held = pick(self.vms, vm)
        if held is not None:
            yield from self._attributes(held, gfn, npages, private)

    def _attributes(self, vm: Vm, gfn: int, npages: int, private: bool) -> Steps[None]:
        told = KvmMemoryAttributes(
            address=gfn * PAGE & (1 << 64) - 1, size=npages * PAGE, attributes=8 * private
        )
        yield from self.ioctl(vm.actor, vm.fd, k.KVM_SET_MEMORY_ATTRIBUTES, told)

    @action(gmem=ANY, mode=(KEEP, KEEP, PUNCH, PUNCH, PUNCH, 0), pgoff=GFNS, npages=NPAGES)
    def fallocate(self, gmem: int, mode: int, pgoff: int, npages: int) -> Steps[None]:
        held = pick(self.gmems, gmem)
        if held is not None:
            proc = held.actor.sys.proc
            steps = dispatch.sys_fallocate(proc, held.fd, mode, pgoff * PAGE, npages * PAGE)
            yield from self.call(steps)

    @action(gmem=ANY, index=GFNS, really=NO)
    def poison(self, gmem: int, index: int, really: bool) -> Steps[None]:
        """Memory fails under a folio: memory_failure()."""
        held = pick(self.gmems, gmem)
        if held is None or not really:
            return
        file = held.actor.sys.proc.files.fds.get(held.fd)
        if file is not None and isinstance(file.private, GmemFile):
            inode = file.private.inode
            if index < inode.npages and not inode.invalidate_lock.busy:
                yield from kvm_gmem_error_folio(inode, index)

    # -- launching --------------------------------------------------------------------------------

    @action(vm=ANY, policy=(POLICY, POLICY, POLICY, POLICY | 1 << 19, 0x20000, 0), fd=NO)
    def launch_start(self, vm: int, policy: int, fd: bool) -> Steps[None]:
        held = pick(self.vms, vm)
        if held is not None:
            params = KvmSevSnpLaunchStart(policy=policy)
            sev_fd = held.actor.kvm if fd else None
            yield from self.op(held, SevCmdId.SNP_LAUNCH_START, params, sev_fd)

    @action(
        alone=True,
        vm=ANY,
        gfn=GFNS,
        npages=(1, 1, 2, 16, 0),
        type_=(1, 1, 1, 3, 4, 5, 6, 2),
        area=ANY,
    )
    def launch_update(
        self, vm: int, gfn: int, npages: int, type_: int, area: int
    ) -> Steps[None]:
        """Not beside a fault: see test_hostile_finds.py for what Linux does then."""
        held, memory = pick(self.vms, vm), pick(self.areas, area)
        if held is not None:
            uaddr = memory.addr if memory else 0
            yield from self._update(held, gfn, npages, type_, uaddr)

    def _update(self, vm: Vm, gfn: int, npages: int, type_: int, uaddr: int) -> Steps[None]:
        params = KvmSevSnpLaunchUpdate(
            gfn_start=gfn, uaddr=uaddr, len=npages * PAGE, type=type_
        )
        for _ in range(3):
            params = yield from self.op(vm, SevCmdId.SNP_LAUNCH_UPDATE, params)
            if params is None or not params.len:
                return

    @action(vm=ANY, id_block=NO)
    def launch_finish(self, vm: int, id_block: bool) -> Steps[None]:
        held = pick(self.vms, vm)
        if held is not None:
            params = KvmSevSnpLaunchFinish(id_block_en=int(id_block), id_block_uaddr=PAGE)
            yield from self.op(held, SevCmdId.SNP_LAUNCH_FINISH, params)

    @action(who=ANY, npages=(512, 1024, 1024, 1500), vcpus=(1, 2), update=(1, 16), finish=YES)
    def build(
        self, who: int, npages: int, vcpus: int, update: int, finish: bool
    ) -> Steps[None]:
        """A VM as a well-behaved VMM would bring it up: SNP, launched."""
        if len(self.vms) >= 4:
            return
        actor = self.actors[who % len(self.actors)]
        fd = yield from self.ioctl(actor, actor.kvm, k.KVM_CREATE_VM, VmType.SNP)
        if fd is None:
            return
        vm = Vm(actor, fd, VmType.SNP)
        self.vms.append(vm)
        yield from self.op(vm, SevCmdId.INIT2, KvmSevInit())
        cap = KvmEnableCap(cap=k.KVM_CAP_EXIT_HYPERCALL, arg0=1 << 12)
        yield from self.ioctl(actor, fd, k.KVM_ENABLE_CAP, cap)
        gmem = yield from self._gmem(vm, npages, 0)
        steps = dispatch.sys_mmap(actor.sys.proc, npages * PAGE, RW, PRIVATE_ANON, -1, 0)
        addr = yield from self.call(steps)
        if gmem is None or addr is None:
            return
        self.areas.append(Area(actor, addr, npages))
        region = KvmUserspaceMemoryRegion2(
            flags=4, memory_size=npages * PAGE, userspace_addr=addr, guest_memfd=gmem.fd
        )
        yield from self.ioctl(actor, fd, k.KVM_SET_USER_MEMORY_REGION2, region)
        yield from self._attributes(vm, 0, npages, True)
        yield from self._attributes(vm, 16, 8, False)
        yield from self.op(vm, SevCmdId.SNP_LAUNCH_START, KvmSevSnpLaunchStart(policy=POLICY))
        yield from self._update(vm, 0, update, 1, addr)
        for vcpu_id in range(vcpus):
            yield from self._vcpu(vm, vcpu_id)
        if finish:
            yield from self.op(vm, SevCmdId.SNP_LAUNCH_FINISH, KvmSevSnpLaunchFinish())

    @action(who=ANY, vm_type=(0, 1, 1), npages=(512, 1024), flags=(0, 1, 3), move=NO)
    def build_plain(
        self, who: int, vm_type: int, npages: int, flags: int, move: bool
    ) -> Steps[None]:
        """A VM without encryption: a slot, its memory touched, and what is private prefaulted."""
        if len(self.vms) >= 4:
            return
        actor = self.actors[who % len(self.actors)]
        fd = yield from self.ioctl(actor, actor.kvm, k.KVM_CREATE_VM, vm_type)
        if fd is None:
            return
        vm = Vm(actor, fd, vm_type)
        self.vms.append(vm)
        gmem = None if move else (yield from self._gmem(vm, npages, flags))
        steps = dispatch.sys_mmap(actor.sys.proc, npages * PAGE, RW, PRIVATE_ANON, -1, 0)
        addr = yield from self.call(steps)
        if addr is None:
            return
        self.areas.append(Area(actor, addr, npages))
        region = KvmUserspaceMemoryRegion2(
            flags=4 if gmem else 0,
            memory_size=npages * PAGE,
            userspace_addr=addr,
            guest_memfd=gmem.fd if gmem else 0,
        )
        yield from self.ioctl(actor, fd, k.KVM_SET_USER_MEMORY_REGION2, region)
        yield from self._attributes(vm, 3, npages - 5, True)
        yield from self._vcpu(vm, 0)
        if not self.vcpus:
            return
        if gmem in self.gmems:
            yield from self.map_gmem(self.gmems.index(gmem), 0, npages, True)
        for gpa in (0, 3, npages // 2):
            told = KvmPreFaultMemory(gpa=gpa * PAGE, size=npages * PAGE // 4)
            yield from self.ioctl(actor, self.vcpus[-1].fd, k.KVM_PRE_FAULT_MEMORY, told)

    # -- vCPUs ------------------------------------------------------------------------------------

    @action(vm=ANY, vcpu_id=(0, 0, 1, 2, 5000))
    def create_vcpu(self, vm: int, vcpu_id: int) -> Steps[None]:
        held = pick(self.vms, vm)
        if held is not None:
            yield from self._vcpu(held, vcpu_id)

    def _vcpu(self, vm: Vm, vcpu_id: int) -> Steps[None]:
        fd = yield from self.ioctl(vm.actor, vm.fd, k.KVM_CREATE_VCPU, vcpu_id)
        if fd is None:
            return
        proc = vm.actor.sys.proc
        steps = dispatch.sys_mmap(proc, KVM_RUN_MMAP_SIZE, RW, SHARED, fd, 0)
        run = yield from self.call(steps)
        self.vcpus.append(Vcpu(vm.actor, fd, vm, run or 0))

    @action(vcpu=ANY, gfn=GFNS, npages=NPAGES)
    def prefault(self, vcpu: int, gfn: int, npages: int) -> Steps[None]:
        held = pick(self.vcpus, vcpu)
        if held is not None:
            told = KvmPreFaultMemory(gpa=gfn * PAGE, size=npages * PAGE)
            yield from self.ioctl(held.actor, held.fd, k.KVM_PRE_FAULT_MEMORY, told)

    @action(vcpu=ANY, registers=YES, state=(0, 1, 3, 9))
    def set_registers(self, vcpu: int, registers: bool, state: int) -> Steps[None]:
        held = pick(self.vcpus, vcpu)
        if held is None:
            return
        if registers:
            yield from self.ioctl(held.actor, held.fd, k.KVM_SET_REGS, KvmRegs(rip=state))
        else:
            told = KvmMpState(mp_state=state)
            yield from self.ioctl(held.actor, held.fd, k.KVM_SET_MP_STATE, told)

    @action(
        vcpu=ANY,
        tape=tuple(range(len(TAPES))),
        more=tuple(range(len(TAPES))),
        register=YES,
        serve=YES,
    )
    def run(self, vcpu: int, tape: int, more: int, register: bool, serve: bool) -> Steps[None]:
        """KVM_RUN of a guest with something to do, and an answer to each exit."""
        held: Vcpu | None = pick(self.vcpus, vcpu)
        if held is not None and held.vm.vm_type != VmType.SNP and tape % 2:
            held = pick([one for one in self.vcpus if one.vm.vm_type == VmType.SNP], vcpu)
        if held is None:
            return
        if len(self.tape) > 40:
            self.tape.clear()
        self.tape += [*(REGISTER if register else ()), *TAPES[tape], *TAPES[more]]
        for _ in range(12):
            yield from self.ioctl(held.actor, held.fd, k.KVM_RUN)
            if not serve or not held.run:
                return
            reason = yield from self._serve(held)
            if reason not in (
                KvmExit.HYPERCALL,
                KvmExit.MEMORY_FAULT,
                KvmExit.IO,
                KvmExit.MMIO,
            ):
                return

    def _serve(self, vcpu: Vcpu) -> Steps[int]:
        """What a VMM should do about an exit; which exit it was."""
        mm = vcpu.actor.sys.proc.mm
        page = yield from self.call(load(mm, vcpu.run, PAGE))
        if page is None:
            return 0
        run = KvmRun(page)
        self.exits[str(run.exit_reason)] = self.exits.get(str(run.exit_reason), 0) + 1
        match run.exit_reason:
            case KvmExit.HYPERCALL:
                gpa, npages, attrs = (
                    int.from_bytes(run.hypercall_args[i : i + 8], "little") for i in (0, 8, 16)
                )
                private = bool(attrs & MapGpaRange.ENCRYPTED)
                yield from self._attributes(vcpu.vm, gpa // PAGE, npages, private)
            case KvmExit.MEMORY_FAULT:
                private = bool(run.memory_fault_flags & 8)
                yield from self._attributes(vcpu.vm, run.memory_fault_gpa // PAGE, 1, private)
            case _:
                pass
        return run.exit_reason

    @action(
        vcpu=ANY,
        at=(1, 1, 8, 16, 32, 40, 88, 88, 288),
        value=(0, 0, 1, 11, 22, 5, (1 << 64) - 1),
    )
    def scribble(self, vcpu: int, at: int, value: int) -> Steps[None]:
        """A VMM that answers what it likes, or writes where nothing is to be answered."""
        held = pick(self.vcpus, vcpu)
        if held is not None and held.run:
            data = value.to_bytes(8, "little")[: 1 if at == 1 else 8]
            if at != 288:  # KVM_CAP_SYNC_REGS is not modelled where it would be taken
                yield from self.call(store(held.actor.sys.proc.mm, held.run + at, data))
