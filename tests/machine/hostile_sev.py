"""What hostile processes do with SEV and SEV-ES VMs: launches, pinned regions, MOVE and COPY."""

from dataclasses import dataclass

from softcvm.abi.kvm import _generated_kvm as k
from softcvm.abi.kvm.memory import KvmEncRegion, KvmUserspaceMemoryRegion2, VmType
from softcvm.abi.kvm.vcpu import KvmEnableCap
from softcvm.abi.sev import (
    KvmSevDbg,
    KvmSevGuestStatus,
    KvmSevInit,
    KvmSevLaunchMeasure,
    KvmSevLaunchStart,
    KvmSevLaunchUpdateData,
    SevCmdId,
)
from softcvm.sim.steps import Steps
from softcvm.uapi import dispatch
from tests.machine.hostile import World
from tests.machine.hostile_host import (
    ANY,
    GFNS,
    NO,
    NPAGES,
    PAGE,
    PRIVATE_ANON,
    RW,
    YES,
    Actor,
    Area,
    Vm,
    action,
    pick,
)

__all__ = ("SevWorld",)


@dataclass
class SevWorld(World):
    """World, and encryption without an RMP."""

    @action(who=ANY, vm_type=(2, 3, 3), npages=(16, 512), vcpus=(1, 2), finish=YES)
    def build_sev(
        self, who: int, vm_type: int, npages: int, vcpus: int, finish: bool
    ) -> Steps[None]:
        """A SEV or SEV-ES VM as a well-behaved VMM would launch it."""
        if len(self.vms) >= 4:
            return
        actor = self.actors[who % len(self.actors)]
        fd = yield from self.ioctl(actor, actor.kvm, k.KVM_CREATE_VM, vm_type)
        if fd is None:
            return
        vm = Vm(actor, fd, vm_type)
        self.vms.append(vm)
        yield from self.op(vm, SevCmdId.INIT2, KvmSevInit())
        steps = dispatch.sys_mmap(actor.sys.proc, npages * PAGE, RW, PRIVATE_ANON, -1, 0)
        addr = yield from self.call(steps)
        if addr is None:
            return
        self.areas.append(Area(actor, addr, npages))
        slot = KvmUserspaceMemoryRegion2(memory_size=npages * PAGE, userspace_addr=addr)
        yield from self.ioctl(actor, fd, k.KVM_SET_USER_MEMORY_REGION2, slot)
        region = KvmEncRegion(addr=addr, size=npages * PAGE)
        yield from self.ioctl(actor, fd, k.KVM_MEMORY_ENCRYPT_REG_REGION, region)
        for vcpu_id in range(vcpus):
            yield from self._vcpu(vm, vcpu_id)
        policy = 5 if vm_type == VmType.SEV_ES else 1
        yield from self.op(vm, SevCmdId.LAUNCH_START, KvmSevLaunchStart(policy=policy))
        update = KvmSevLaunchUpdateData(uaddr=addr, len=3 * PAGE)
        yield from self.op(vm, SevCmdId.LAUNCH_UPDATE_DATA, update)
        yield from self.op(vm, SevCmdId.LAUNCH_UPDATE_VMSA, KvmSevInit())
        yield from self.op(vm, SevCmdId.LAUNCH_MEASURE, KvmSevLaunchMeasure())
        if finish:
            yield from self.op(vm, SevCmdId.LAUNCH_FINISH, KvmSevInit())

    @action(vm=ANY, step=(2, 3, 4, 6, 7, 16, 17, 18), area=ANY, size=(16, 4096, 5000, 0))
    def sev_launch_step(self, vm: int, step: int, area: int, size: int) -> Steps[None]:
        """A launch command out of turn."""
        held, memory = pick(self.vms, vm), pick(self.areas, area)
        if held is None:
            return
        addr = memory.addr if memory else 0
        params = {
            2: KvmSevLaunchStart(policy=5),
            3: KvmSevLaunchUpdateData(uaddr=addr, len=size),
            6: KvmSevLaunchMeasure(uaddr=addr, len=size & 0xFF),
            16: KvmSevGuestStatus(),
            17: KvmSevDbg(src_uaddr=addr, dst_uaddr=addr + 16, len=size),
            18: KvmSevDbg(src_uaddr=addr, dst_uaddr=addr + PAGE, len=size),
        }
        yield from self.op(held, step, params.get(step, KvmSevInit()))

    @action(vm=ANY, area=ANY, page=GFNS, npages=NPAGES, register=YES)
    def region(self, vm: int, area: int, page: int, npages: int, register: bool) -> Steps[None]:
        held, memory = pick(self.vms, vm), pick(self.areas, area)
        if held is None or memory is None:
            return
        at = memory.addr + page % memory.npages * PAGE
        told = KvmEncRegion(addr=at, size=npages * PAGE)
        request = (
            k.KVM_MEMORY_ENCRYPT_REG_REGION if register else k.KVM_MEMORY_ENCRYPT_UNREG_REGION
        )
        yield from self.ioctl(held.actor, held.fd, request, told)

    @action(vm=ANY, source=ANY, copy=YES, raw=NO)
    def move_or_copy(self, vm: int, source: int, copy: bool, raw: bool) -> Steps[None]:
        """The encryption context of one VM to another, of this process or of another's."""
        to, fro = pick(self.vms, vm), pick(self.vms, source)
        if to is None or (fro.vm_type == VmType.SNP and self.kernel == "6.18"):
            return  # SNP on 6.18: state is left behind, and that is not modelled
        fd = fro.fd
        if fro.actor is not to.actor and not raw:
            fd = yield from self.call(
                dispatch.sys_send_fd(fro.actor.sys.proc, fro.fd, to.actor.sys.proc)
            )
            if fd is None:
                return
        cap = k.KVM_CAP_VM_COPY_ENC_CONTEXT_FROM if copy else k.KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM
        told = KvmEnableCap(cap=cap, arg0=fd)
        yield from self.ioctl(to.actor, to.fd, k.KVM_ENABLE_CAP, told)
        if fd != fro.fd:
            yield from self.call(dispatch.sys_close(to.actor.sys.proc, fd))

    @action(who=ANY, source=ANY, copy=(True, False), vcpus=YES)
    def mirror_or_heir(self, who: int, source: int, copy: bool, vcpus: bool) -> Steps[None]:
        """A fresh VM for the context of an encrypted one to go to."""
        actor: Actor = self.actors[who % len(self.actors)]
        encrypted = [vm for vm in self.vms if vm.vm_type in (VmType.SEV, VmType.SEV_ES)]
        fro: Vm | None = pick(encrypted, source)
        if fro is None or len(self.vms) >= 6:
            return
        fd = yield from self.ioctl(actor, actor.kvm, k.KVM_CREATE_VM, fro.vm_type)
        if fd is None:
            return
        vm = Vm(actor, fd, fro.vm_type)
        self.vms.append(vm)
        if vcpus and not copy:
            for vcpu_id in range(sum(vcpu.vm is fro for vcpu in self.vcpus)):
                yield from self._vcpu(vm, vcpu_id)
        if fro in self.vms and vm in self.vms:
            yield from self.move_or_copy(self.vms.index(vm), self.vms.index(fro), copy, False)
