"""Random scripts: mostly sensible, often wrong, never dangerous to the host.

The generator remembers what its calls would have opened if they all succeeded, and mixes in
numbers that the kernel must refuse.  What it never writes: a file of private memory that could
grow large, a memslot that is large and legal (its metadata is), a mapping outside the arena, a
vCPU that runs.
"""

from random import Random
from typing import NamedTuple

from softcvm.abi.kvm import _generated_kvm as k
from tools.kvm_diff import numbers as n
from tools.kvm_diff.script import ARENA, ARENA_PAGES, NO_FD, PAGE, Call, Ref, Script, Struct
from tools.kvm_diff.script import ioctl as _ioctl

__all__ = ("Features", "Generator")


class Features(NamedTuple):
    """What the kernel under comparison has; the rest is not asked of it."""

    gmem: bool = True
    gmem_flags: int = 3
    attributes: bool = True
    prefault: bool = True
    address_spaces: int = 2
    vm_types: frozenset[int] = frozenset({0})

    def caps(self) -> list[int]:
        """Capabilities whose value the kernel decides and not its configuration or the host's
        hardware."""
        left_out = set(n.HOST_DECIDES)
        if not self.attributes:
            left_out.add(k.KVM_CAP_MEMORY_ATTRIBUTES)
        if not self.prefault:
            left_out.add(k.KVM_CAP_PRE_FAULT_MEMORY)
        if self.address_spaces < 2:
            left_out.add(k.KVM_CAP_MULTI_ADDRESS_SPACE)
        return [cap for cap in n.CAPS if cap not in left_out]

    def lacking(self) -> list[str]:
        """Calls that are not compared because this kernel has not got them."""
        missing = []
        if not self.gmem:
            missing.append("KVM_CREATE_GUEST_MEMFD")
        if self.gmem_flags & 3 != 3:
            missing.append("guest_memfd with MMAP and INIT_SHARED")
        if not self.attributes:
            missing.append("KVM_SET_MEMORY_ATTRIBUTES")
        if not self.prefault:
            missing.append("KVM_PRE_FAULT_MEMORY")
        if self.address_spaces < 2:
            missing.append("memslots of a second address space (no SMM)")
        names = ("DEFAULT", "SW_PROTECTED", "SEV", "SEV_ES", "SNP", "TDX")
        missing += [f"VMs of type {names[t]}" for t in range(6) if t not in self.vm_types]
        return missing


class _Gmem(NamedTuple):
    vm: int
    handle: int
    pages: int


class _Slot(NamedTuple):
    slot: int
    flags: int
    gpa: int
    size: int
    hva: int
    gmem: Ref | int
    offset: int


class Generator:
    """Scripts of one seed.  The same seed and features give the same scripts."""

    def __init__(self, seed: int, features: Features, length: int = 60) -> None:
        self._random = Random(seed)
        self._features = features
        self._length = length

    def script(self) -> Script:
        writer = _Writer(self._random, self._features)
        while len(writer.calls) < self._length:
            writer.write_one()
        return Script(tuple(writer.calls), watch=self._random.random() < 0.5)


class _Writer:
    """One script in the making."""

    def __init__(self, random: Random, features: Features) -> None:
        self.r = random
        self.features = features
        self.calls: list[Call] = []
        self.next = 0
        self.kvms: list[int] = []
        self.vms: list[int] = []
        self.vcpus: list[int] = []
        self.gmems: list[_Gmem] = []
        self.mapped: list[tuple[int, int]] = []
        self.slots: dict[int, dict[int, _Slot]] = {}
        self.add(Call("open", "open", ("/dev/kvm",), self._new(self.kvms)))
        self.create_vm()
        for _ in range(self.r.randrange(4)):
            self.create_gmem()

    def write_one(self) -> None:
        kinds = list(_WEIGHTS)
        kind = self.r.choices(kinds, [_WEIGHTS[name] for name in kinds])[0]
        getattr(self, kind)()

    def add(self, call: Call) -> None:
        self.calls.append(call)

    def _new(self, where: list[int]) -> int:
        self.next += 1
        where.append(self.next)
        return self.next

    def _bad(self, chance: float = 0.06) -> bool:
        return self.r.random() < chance

    def fd(self, wanted: list[int]) -> Ref | int:
        """A file of the kind that is wanted, sometimes of another, or closed, or none."""
        if self._bad(0.02):
            return self.r.choice((-1, NO_FD, (1 << 31) - 1))
        if wanted and not self._bad(0.04):
            return Ref(self.r.choice(wanted))
        return Ref(self.r.randint(1, max(1, self.next)))

    def page(self) -> int:
        return self.r.randrange(ARENA_PAGES)

    def addr(self) -> int:
        """A page of the arena, rather one that was mapped lately."""
        if self.mapped and self.r.random() < 0.7:
            start, pages = self.r.choice(self.mapped[-4:])
            return start + self.r.randrange(pages) * PAGE
        return ARENA + self.page() * PAGE

    # Files

    def open_kvm(self) -> None:
        path = "/dev/kvm" if not self._bad(0.2) else "/dev/no-such-device"
        self.add(Call("open", "open", (path,), self._new(self.kvms)))

    def close(self) -> None:
        """One in five is used again after this."""
        every = [*self.kvms, *self.vms, *self.vcpus, *(g.handle for g in self.gmems)]
        where = self.fd(every)
        self.add(Call("close", "close", (where,)))
        if isinstance(where, Ref) and self.r.random() < 0.8:
            for files in (self.kvms, self.vms, self.vcpus):
                if where.handle in files:
                    files.remove(where.handle)
            self.gmems = [g for g in self.gmems if g.handle != where.handle]

    def dup(self) -> None:
        """The second number is remembered as what it was."""
        match self.r.randrange(3):
            case 0 if self.gmems:
                gmem = self.r.choice(self.gmems)
                twin = self._new([])
                self.gmems.append(gmem._replace(handle=twin))
                self.add(Call("dup", "dup", (Ref(gmem.handle),), twin))
            case 1 if self.vms:
                vm = self.r.choice(self.vms)
                twin = self._new(self.vms)
                self.slots[twin] = self.slots[vm]
                self.add(Call("dup", "dup", (Ref(vm),), twin))
            case _:
                self.add(Call("dup", "dup", (self.fd([]),), self._new([])))

    # VMs and vCPUs

    def create_vm(self) -> None:
        kind = self.r.choice(sorted(self.features.vm_types))
        if self._bad():
            kind = self.r.choice((6, 7, 31, 32, 33, 1 << 32, 1 << 63, (1 << 64) - 1))
        vm = self._new(self.vms)
        self.slots[vm] = {}
        self.add(_ioctl("CREATE_VM", self.fd(self.kvms), kind, vm))

    def create_vcpu(self) -> None:
        vcpu_id = self.r.choice((0, 0, 1, 2, 3, 7, *n.VCPU_IDS))
        self.add(_ioctl("CREATE_VCPU", self.fd(self.vms), vcpu_id, self._new(self.vcpus)))

    def check_extension(self) -> None:
        cap = (
            self.r.choice(self.features.caps()) if not self._bad() else self.r.choice(n.NO_CAPS)
        )
        where = self.vms if self.r.random() < 0.7 else self.kvms
        self.add(_ioctl("CHECK_EXTENSION", self.fd(where), cap))

    def enable_cap(self) -> None:
        cap, args = self.r.choice(n.ENABLE_CAPS)
        flags = 0 if not self._bad() else self.r.choice(n.U32)
        fields = (("cap", cap), ("flags", flags), ("arg0", self.r.choice(args)))
        self.add(_ioctl("ENABLE_CAP", self.fd(self.vms), Struct("KvmEnableCap", fields)))

    def system_ioctl(self) -> None:
        name = self.r.choice(("GET_API_VERSION", "GET_VCPU_MMAP_SIZE"))
        arg = 0 if not self._bad(0.2) else self.r.choice((1, PAGE))
        self.add(_ioctl(name, self.fd(self.kvms), arg))

    def wrong_ioctl(self) -> None:
        """A request that the file does not know, or with an address that is no memory."""
        name, arg = self.r.choice(n.WRONG_IOCTLS)
        if arg is None:
            arg = self.r.choice((0, 1, self.addr(), (1 << 63) + self.addr()))
        self.add(_ioctl(name, self.fd([]), arg))

    def create_irqchip(self) -> None:
        self.add(_ioctl("CREATE_IRQCHIP", self.fd(self.vms)))

    def mp_state(self) -> None:
        where = self.fd(self.vcpus)
        self.add(_ioctl("GET_MP_STATE", where, Struct("KvmMpState")))
        state = (("mp_state", self.r.choice((0, 1, 2, 3, 5, 8, 10, 1 << 31))),)
        self.add(_ioctl("SET_MP_STATE", where, Struct("KvmMpState", state)))

    def debug_registers(self) -> None:
        where = self.fd(self.vcpus)
        if self.r.random() < 0.5:
            fields = tuple(
                (name, self.r.choice((0, 0, 1, 1 << 31, 1 << 32)))
                for name in ("dr6", "dr7", "flags")
            )
            self.add(_ioctl("SET_DEBUGREGS", where, Struct("KvmDebugregs", fields)))
        self.add(_ioctl("GET_DEBUGREGS", where, Struct("KvmDebugregs")))

    def registers(self) -> None:
        where = self.fd(self.vcpus)
        if self.r.random() < 0.5:
            regs = tuple((name, self.r.choice(n.U64)) for name in ("rax", "rsp", "rip", "r15"))
            self.add(_ioctl("SET_REGS", where, Struct("KvmRegs", regs)))
        self.add(_ioctl("GET_REGS", where, Struct("KvmRegs")))

    # guest_memfd

    def create_gmem(self) -> None:
        if not self.features.gmem or not self.vms or len(self.gmems) > 6:
            return
        vm, pages = self.r.choice(self.vms), self.r.randint(1, ARENA_PAGES)
        flags = self.r.choice((0, 1, 2, 3, 3, 3, 3)) & self.features.gmem_flags
        size = pages * PAGE
        if self._bad():
            flags = self.r.choice((4, 5, 1 << 31, 1 << 32, 1 << 63, (1 << 64) - 1))
        method, handle = "ioctl", None
        if self._bad(0.1):
            size = self.r.choice(n.GMEM_SIZES)
            method = "ioctl_close"
        else:
            handle = self._new([])
            self.gmems.append(_Gmem(vm, handle, pages))
        where = self.fd(self.vms) if self._bad() else Ref(vm)
        told = Struct("KvmCreateGuestMemfd", (("size", size), ("flags", flags)))
        self.add(_ioctl("CREATE_GUEST_MEMFD", where, told, handle, method=method))

    def _some_gmem(self) -> _Gmem:
        if not self.gmems:
            self.create_gmem()
        return self.r.choice(self.gmems) if self.gmems else _Gmem(0, NO_FD, 4)

    def fallocate(self) -> None:
        gmem = self._some_gmem()
        mode = self.r.choice((1, 3, 3))
        if self._bad(0.15):
            mode = self.r.choice(n.FALLOC_MODES)
        offset = self.r.randrange(gmem.pages + 1) * PAGE
        length = self.r.randint(1, gmem.pages + 2) * PAGE
        if self._bad():
            offset = self.r.choice(n.OFFSETS)
        if self._bad():
            length = self.r.choice(n.LENGTHS)
        where = self.fd([gmem.handle])
        self.add(Call("fallocate", "fallocate", (where, mode, offset, length)))

    # Memory

    def map_gmem(self) -> None:
        gmem = self._some_gmem()
        self._map(self.fd([gmem.handle]), self.r.randrange(gmem.pages + 2) * PAGE, 0)

    def map_anonymous(self) -> None:
        self._map(-1, 0, n.MAP_ANONYMOUS)

    def map_vcpu(self) -> None:
        if self.vcpus:
            page = self.r.choice((0, 1, 2, 3, 62, 63, 64, 64, 65, 66))
            self._map(self.fd(self.vcpus), page * PAGE, 0)

    def _map(self, fd: Ref | int, offset: int, kind: int) -> None:
        prot = self.r.choice((3, 3, 3, 1, 2, 0, 5, 7))
        how = self.r.choice((1, 1, 1, 2, 2, 3) if not kind else (1, 2, 2, 2))
        if self._bad(0.04):
            how = self.r.choice((0, 3, 4, 8, 15))
        length = self.r.randint(1, ARENA_PAGES - 1) * PAGE
        if self._bad():
            length = self.r.choice((0, 1, PAGE - 1, PAGE + 1, 1 << 47, (1 << 64) - 1))
        if self._bad() and not kind:
            offset = self.r.choice(n.MAP_OFFSETS)
        fixed = self.r.choice((n.MAP_FIXED, n.MAP_FIXED, n.MAP_FIXED_NOREPLACE))
        if self._bad(0.1):
            args = (length, prot, how | kind, fd, offset)
            self.add(Call("mmap", "mmap_munmap", args))
            return
        addr = ARENA + self.page() * PAGE
        length = min(length, ARENA + ARENA_PAGES * PAGE - addr) if length < 1 << 46 else length
        if PAGE <= length < 1 << 46:
            self.mapped.append((addr, length // PAGE))
        if self._bad(0.03):
            addr = self.r.choice((ARENA + 1, 1 << 47, (1 << 47) - PAGE, (1 << 64) - PAGE))
        self.add(Call("mmap", "mmap", (addr, length, prot, how | kind | fixed, fd, offset)))

    def munmap(self) -> None:
        addr, length = self.addr(), self.r.randint(1, 8) * PAGE
        if self._bad():
            addr = self.r.choice((ARENA + 1, 1 << 47, (1 << 64) - PAGE))
        if self._bad():
            length = self.r.choice((0, 1, PAGE + 1, 1 << 40, 1 << 47, 1 << 63, (1 << 64) - 1))
        self.add(Call("munmap", "munmap", (addr, length)))

    def madvise(self) -> None:
        addr, length = self.addr(), self.r.randint(0, 8) * PAGE
        if self._bad():
            addr = self.r.choice((ARENA + 1, (1 << 64) - PAGE))
        if self._bad():
            length = self.r.choice((1, PAGE + 1, 1 << 40, (1 << 64) - 1))
        advice = 4 if not self._bad() else self.r.choice((5, 6, 7, 99, -1))
        self.add(Call("madvise", "madvise", (addr, length, advice)))

    def load(self) -> None:
        addr = self.addr() + self.r.choice((0, 0, 1, 8, PAGE - 4))
        self.add(Call("load", "load", (addr, self.r.choice((1, 8, 64, PAGE, 2 * PAGE)))))

    def store(self) -> None:
        addr = self.addr() + self.r.choice((0, 0, 1, 8, PAGE - 4))
        data = bytes([self.r.randint(1, 255)]) * self.r.choice((1, 8, 64, PAGE, 2 * PAGE))
        self.add(Call("store", "store", (addr, data)))

    # Memslots

    def region(self) -> None:
        if not self.vms:
            return
        vm = self.r.choice(self.vms)
        known = self.slots[vm]
        if known and self.r.random() < 0.45:
            old = self.r.choice(list(known.values()))
            new = self._changed(old)
        else:
            new = self._fresh(vm)
        if self._bad(0.25):
            new = self._spoilt(new)
        version1 = self.r.random() < 0.2
        if new.size and new.size < 1 << 30:
            known[new.slot] = new
        elif not new.size:
            known.pop(new.slot, None)
        where: Ref | int = self.fd(self.vms) if self._bad() else Ref(vm)
        fields: list[tuple[str, int | Ref]] = [
            ("slot", new.slot),
            ("flags", new.flags),
            ("guest_phys_addr", new.gpa),
            ("memory_size", new.size),
            ("userspace_addr", new.hva),
        ]
        if version1:
            told = Struct("KvmUserspaceMemoryRegion", tuple(fields))
            self.add(_ioctl("SET_USER_MEMORY_REGION", where, told))
            return
        fields += [("guest_memfd", new.gmem), ("guest_memfd_offset", new.offset)]
        if self._bad():
            fields.append(("pad1", self.r.choice(n.U32)))
        told = Struct("KvmUserspaceMemoryRegion2", tuple(fields))
        self.add(_ioctl("SET_USER_MEMORY_REGION2", where, told))

    def _fresh(self, vm: int) -> _Slot:
        slot = self.r.choice((0, 1, 2, 3, 4, 32763))
        if self.features.address_spaces > 1 and self._bad(0.2):
            slot |= 1 << 16
        gpa, pages = self.r.randrange(4 * ARENA_PAGES) * PAGE, self.r.randint(1, ARENA_PAGES)
        mine = [g for g in self.gmems if g.vm == vm]
        if mine and self.r.random() < 0.6:
            gmem = self.r.choice(mine)
            offset = self.r.randrange(gmem.pages)
            pages = self.r.randint(1, gmem.pages - offset)
            return _Slot(
                slot, 4, gpa, pages * PAGE, self.addr(), self.fd([gmem.handle]), offset * PAGE
            )
        flags = self.r.choice((0, 0, 1, 1, 2, 3))
        return _Slot(slot, flags, gpa, pages * PAGE, self.addr(), NO_FD, 0)

    def _changed(self, old: _Slot) -> _Slot:
        match self.r.randrange(6):
            case 0 | 1:
                return old._replace(size=0, flags=self.r.choice((0, old.flags)))
            case 2:
                return old._replace(gpa=self.r.randrange(4 * ARENA_PAGES) * PAGE)
            case 3:
                return old._replace(flags=self.r.randrange(8))
            case 4:
                return old._replace(hva=self.addr())
            case _:
                return old

    def _spoilt(self, good: _Slot) -> _Slot:
        match self.r.randrange(7):
            case 0:
                return good._replace(slot=self.r.choice(n.BAD_SLOTS))
            case 1:
                return good._replace(flags=self.r.choice(n.BAD_SLOT_FLAGS))
            case 2:
                return good._replace(gpa=self.r.choice(n.BAD_GPAS))
            case 3:
                return good._replace(size=self.r.choice(n.BAD_SLOT_SIZES))
            case 4:
                return good._replace(hva=self.r.choice(n.BAD_HVAS))
            case 5:
                return good._replace(gmem=self.fd([]))
            case _:
                return good._replace(offset=self.r.choice(n.BAD_GMEM_OFFSETS))

    def dirty_log(self) -> None:
        """Fetch or clear a log, most often of a slot that should have one."""
        where, slot = self.fd(self.vms), self.r.choice((0, 1, 2, 3, 5, 32763, *n.BAD_SLOTS))
        pages = self.r.choice((*range(ARENA_PAGES + 1), 64, *n.U32))
        logging = [(vm, s) for vm in self.vms for s in self.slots[vm].values() if s.flags & 1]
        if logging and not self._bad(0.2):
            vm, known = self.r.choice(logging)
            where, slot = Ref(vm), known.slot
            if not self._bad(0.2):
                pages = known.size // PAGE
        bitmap = self.addr() if not self._bad() else self.r.choice(n.BAD_HVAS)
        fields: list[tuple[str, int | Ref]] = [("slot", slot), ("dirty_bitmap", bitmap)]
        if self.r.random() < 0.5:
            told = Struct("KvmDirtyLog", tuple(fields))
            self.add(_ioctl("GET_DIRTY_LOG", where, told))
            return
        first = 0 if not self._bad(0.2) else self.r.choice((1, 64, 1 << 40))
        fields += [("num_pages", pages), ("first_page", first)]
        told = Struct("KvmClearDirtyLog", tuple(fields))
        self.add(_ioctl("CLEAR_DIRTY_LOG", where, told))

    def reset_dirty_rings(self) -> None:
        self.add(_ioctl("RESET_DIRTY_RINGS", self.fd(self.vms)))

    def attributes(self) -> None:
        if not self.features.attributes:
            return
        fields = (
            ("address", self.r.choice((self.page() * PAGE, *n.BAD_GPAS))),
            ("size", self.r.choice((PAGE, 8 * PAGE, 0, 1, PAGE + 1, 1 << 63))),
            ("attributes", self.r.choice((0, 0, 8, 1, 7, 16, 1 << 63))),
            ("flags", 0 if not self._bad() else self.r.choice(n.U32)),
        )
        told = Struct("KvmMemoryAttributes", fields)
        self.add(_ioctl("SET_MEMORY_ATTRIBUTES", self.fd(self.vms), told))

    def prefault(self) -> None:
        if not self.features.prefault:
            return
        fields = (
            ("gpa", self.r.choice((self.page() * PAGE, *n.BAD_GPAS))),
            ("size", self.r.choice((PAGE, 8 * PAGE, 0, 1, PAGE + 1, 1 << 63))),
            ("flags", 0 if not self._bad() else self.r.choice(n.U32)),
        )
        told = Struct("KvmPreFaultMemory", fields)
        self.add(_ioctl("PRE_FAULT_MEMORY", self.fd(self.vcpus), told))


_WEIGHTS = {
    "open_kvm": 1,
    "close": 3,
    "dup": 2,
    "create_vm": 2,
    "create_vcpu": 2,
    "check_extension": 3,
    "enable_cap": 3,
    "system_ioctl": 1,
    "wrong_ioctl": 2,
    "create_irqchip": 1,
    "mp_state": 1,
    "debug_registers": 1,
    "registers": 2,
    "create_gmem": 6,
    "fallocate": 12,
    "map_gmem": 10,
    "map_anonymous": 6,
    "map_vcpu": 2,
    "munmap": 5,
    "madvise": 3,
    "load": 9,
    "store": 9,
    "region": 18,
    "dirty_log": 4,
    "reset_dirty_rings": 1,
    "attributes": 3,
    "prefault": 3,
}
