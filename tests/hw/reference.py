"""A second implementation of the RMP: slow, obvious, one small object for every 4K page.

Written from the architecture's text and not from src/: [APM2-24593 §15.36] for the access checks, [APM3-24594]
for RMPUPDATE, PSMASH, PVALIDATE, RMPADJUST, RMPQUERY and RMPREAD.  It imports nothing of softcvm, handles
one page at a time and never a run.  Tests give both the same sequence and compare every answer and every
entry.

What the architecture leaves open is decided as docs/support.md says, here as there: a 4K request inside an
assigned 2M page is answered as one at its head; a 2M request over an immutable 4K entry is FAIL_PERMISSION;
FAIL_INUSE ranks last; PSMASH of what is not a 2M page is FAIL_BADADDR, of an immutable one FAIL_PERMISSION.
"""

from __future__ import annotations

from dataclasses import dataclass, field

PAGES_2M = 512

SUCCESS, FAIL_INPUT, FAIL_PERMISSION, FAIL_INUSE, FAIL_OVERLAP = 0, 1, 2, 3, 4
FAIL_BADADDR = 4
FAIL_SIZEMISMATCH = 6

READ, WRITE, EXEC_USER, EXEC_SUPERVISOR = 1, 2, 4, 8

ERR_P, ERR_W, ERR_U, ERR_ID = 1 << 0, 1 << 1, 1 << 2, 1 << 4
ERR_RMP = 1 << 31
ERR_FINAL = 1 << 32
ERR_ENC = 1 << 34
ERR_SIZEM = 1 << 35
ERR_VMPL = 1 << 36


@dataclass
class Page:
    """One RMP entry, and how the nested table and the processor see the page."""

    assigned: int = 0
    pagesize: int = 0
    immutable: int = 0
    gfn: int = 0
    asid: int = 0
    vmsa: int = 0
    validated: int = 0
    lock: int = 0
    perms: list[int] = field(default_factory=lambda: [0, 0, 0, 0])
    in_use: bool = False


@dataclass
class Leaf:
    """What the nested page table says of one guest 4K page."""

    pfn: int
    large: bool
    writable: bool = True


@dataclass(frozen=True)
class Npf:
    """#VMEXIT(NPF)."""

    error_code: int
    gpa: int


@dataclass(frozen=True)
class Vc:
    """#VC 0x404 in the guest."""

    gpa: int


@dataclass(frozen=True)
class Done:
    """The instruction or access completed; what it returned."""

    value: tuple[int, ...] = ()


Outcome = Npf | Vc | Done


class ReferenceRmp:
    """The table of pfn 0 .. covered-1 in a machine of `memory` pages."""

    def __init__(self, memory: int, covered: int) -> None:
        self.memory = memory
        self.covered = covered
        self.pages = [Page() for _ in range(memory)]
        self.nested: dict[int, dict[int, Leaf]] = {}

    # -- what decides for a page ------------------------------------------------------------------

    def head_of(self, pfn: int) -> Page:
        """The entry that decides: the 2M head where one covers the page, else the page's own."""
        first = self.pages[pfn - pfn % PAGES_2M]
        if first.assigned and first.pagesize:
            return first
        return self.pages[pfn]

    def gfn_of(self, pfn: int) -> int:
        head = self.head_of(pfn)
        if head.pagesize:
            return head.gfn + pfn % PAGES_2M
        return head.gfn

    def hypervisor_owned(self, pfn: int) -> bool:
        return pfn >= self.covered or not self.head_of(pfn).assigned

    def raw(self, pfn: int) -> bytes:
        """Sixteen bytes, field by field."""
        page = self.pages[pfn]
        count = 0
        if pfn % PAGES_2M == 0 and not page.pagesize:
            rest = self.pages[pfn + 1 : pfn + PAGES_2M]
            count = sum(1 for other in rest if other.assigned)
        bits = 0
        bits += page.assigned
        bits += page.pagesize * 2**1
        bits += page.immutable * 2**2
        bits += count * 2**3
        bits += page.gfn * 2**12
        bits += page.asid * 2**51
        bits += page.vmsa * 2**61
        bits += page.validated * 2**62
        bits += page.lock * 2**63
        for vmpl in range(4):
            bits += page.perms[vmpl] * 2 ** (64 + 8 * vmpl)
        return bits.to_bytes(16, "little")

    # -- hypervisor's instructions ----------------------------------------------------------------

    def rmpupdate(
        self, spa: int, assigned: int, pagesize: int, immutable: int, gpa: int, asid: int
    ) -> int:
        pfn = spa // 4096
        # The request itself.
        size = 4096 * (PAGES_2M if pagesize else 1)
        if spa % size or gpa % size:
            return FAIL_INPUT
        if not assigned and (immutable or asid):
            return FAIL_INPUT
        # The entry, and the head that stands for it.
        wanted = range(pfn, pfn + (PAGES_2M if pagesize else 1))
        if wanted[-1] >= self.covered:
            return FAIL_INPUT
        old = self.pages[pfn]
        head = self.head_of(pfn)
        if head.immutable:
            return FAIL_PERMISSION
        # Sizes.
        if not pagesize and head.pagesize:
            return FAIL_OVERLAP
        if pagesize and not head.pagesize:
            if any(self.pages[p].assigned for p in wanted):
                return FAIL_OVERLAP
            if any(self.pages[p].immutable for p in wanted):
                return FAIL_PERMISSION
        if any(self.pages[p].in_use for p in wanted):
            return FAIL_INUSE
        # The effect.
        new_size = pagesize if assigned else 0
        same = (
            old.assigned == assigned
            and old.pagesize == new_size
            and old.gfn == gpa // 4096
            and old.asid == asid
            and asid != 0
        )
        if not same:
            old.validated = 0
            old.vmsa = 0
            old.perms = [31, 0, 0, 0] if assigned else [0, 0, 0, 0]
        old.assigned = assigned
        old.pagesize = new_size
        old.immutable = immutable
        old.gfn = gpa // 4096
        old.asid = asid
        if pagesize:
            for p in wanted[1:]:
                self.pages[p] = Page(assigned=assigned)
        return SUCCESS

    def psmash(self, spa: int) -> int:
        pfn = spa // 4096
        if spa % (4096 * PAGES_2M) or pfn + PAGES_2M > self.covered:
            return FAIL_INPUT
        head = self.pages[pfn]
        if not (head.assigned and head.pagesize):
            return FAIL_BADADDR
        if head.immutable:
            return FAIL_PERMISSION
        if any(self.pages[pfn + i].in_use for i in range(PAGES_2M)):
            return FAIL_INUSE
        for i in range(PAGES_2M):
            self.pages[pfn + i] = Page(
                assigned=1,
                gfn=head.gfn + i,
                asid=head.asid,
                validated=head.validated,
                immutable=head.immutable,
                perms=list(head.perms),
            )
        return SUCCESS

    # -- the guest's walk and the checks on it ----------------------------------------------------

    def leaf(self, asid: int, gfn: int) -> Leaf | None:
        return self.nested.get(asid, {}).get(gfn)

    def map_nested(self, asid: int, gfn: int, pfn: int, *, large: bool) -> None:
        for i in range(PAGES_2M if large else 1):
            self.nested.setdefault(asid, {})[gfn + i] = Leaf(pfn + i, large)

    def mismatch(self, asid: int, gfn: int, pfn: int) -> bool:
        """Covered, owned, bound to this gpa, mutable: false when any of them is not so."""
        if pfn >= self.covered:
            return True
        page = self.head_of(pfn)
        if not page.assigned or page.asid != asid:
            return True
        if self.gfn_of(pfn) != gfn:
            return True
        return bool(page.immutable)

    def private(
        self, asid: int, vmpl: int, gpa: int, need: int, code: int, *, walk_writes: bool
    ) -> Outcome:
        """A data access or fetch with C=1.  code: the bits of EXITINFO1 that name the access."""
        gfn = gpa // 4096
        where = self.leaf(asid, gfn)
        if where is None:
            return Npf(code, gpa)
        if walk_writes and not where.writable:
            return Npf(code | ERR_P, gpa)
        code |= ERR_P
        if self.mismatch(asid, gfn, where.pfn):
            return Npf(code | ERR_RMP, gpa)
        page = self.head_of(where.pfn)
        if bool(page.pagesize) != where.large:
            return Npf(code | ERR_RMP, gpa)
        if not page.validated:
            return Vc(gpa)
        if need & ~page.perms[vmpl]:
            return Npf(code | ERR_RMP | ERR_VMPL, gpa)
        return Done()

    def shared(self, asid: int, gpa: int, code: int, *, write: bool) -> Outcome:
        """A data access with C=0."""
        where = self.leaf(asid, gpa // 4096)
        if where is None:
            return Npf(code, gpa)
        if write and not where.writable:
            return Npf(code | ERR_P, gpa)
        if write and not self.host_may_write(where.pfn, large=where.large):
            return Npf(code | ERR_P | ERR_RMP, gpa)
        return Done()

    def host_may_write(self, pfn: int, *, large: bool) -> bool:
        first = pfn - pfn % PAGES_2M
        under = range(first, first + PAGES_2M) if large else [pfn]
        return all(self.hypervisor_owned(p) for p in under)

    # -- guest's instructions ---------------------------------------------------------------------

    def _reach(self, asid: int, gpa: int, size: int, code: int) -> Outcome | Page | None:
        """The entry an instruction of this size works on; None: the entry is smaller than asked."""
        gfn = gpa // 4096
        where = self.leaf(asid, gfn)
        if where is None:
            return Npf(code, gpa)
        code |= ERR_P
        if not where.writable:
            return Npf(code, gpa)
        if self.mismatch(asid, gfn, where.pfn):
            return Npf(code | ERR_RMP, gpa)
        page = self.head_of(where.pfn)
        if not size and page.pagesize:
            return Npf(code | ERR_RMP | ERR_SIZEM, gpa)
        if size and not page.pagesize:
            return None
        return page

    def pvalidate(
        self, asid: int, vmpl: int, gpa: int, size: int, validate: int, code: int
    ) -> Outcome:
        """Done((eax, cf)); VMPL other than 0 is #GP and not asked here."""
        assert vmpl == 0
        if size not in (0, 1) or gpa % (4096 * (PAGES_2M if size else 1)):
            return Done((FAIL_INPUT, 0))
        reached = self._reach(asid, gpa, size, code)
        if reached is None:
            return Done((FAIL_SIZEMISMATCH, 0))
        if not isinstance(reached, Page):
            return reached
        if reached.validated == validate:
            return Done((SUCCESS, 1))
        reached.validated = validate
        return Done((SUCCESS, 0))

    def rmpadjust(
        self,
        asid: int,
        vmpl: int,
        gpa: int,
        size: int,
        target: int,
        perms: int,
        vmsa: int,
        code: int,
    ) -> Outcome:
        if target <= vmpl:
            return Done((FAIL_PERMISSION,))
        if size not in (0, 1) or gpa % (4096 * (PAGES_2M if size else 1)):
            return Done((FAIL_INPUT,))
        reached = self._reach(asid, gpa, size, code)
        if reached is None:
            return Done((FAIL_SIZEMISMATCH,))
        if not isinstance(reached, Page):
            return reached
        if not reached.validated:
            return Vc(gpa)
        if perms & ~reached.perms[vmpl]:
            return Done((FAIL_PERMISSION,))
        reached.perms[target] = perms
        if vmpl == 0:
            reached.vmsa = vmsa
        return Done((SUCCESS,))

    def rmpquery(self, asid: int, vmpl: int, gpa: int, target: int, code: int) -> Outcome:
        """Done((rax,)) on refusal, Done((0, size, perms, vmsa)) otherwise."""
        if target <= vmpl:
            return Done((FAIL_PERMISSION,))
        gfn = gpa // 4096
        where = self.leaf(asid, gfn)
        if where is None:
            return Npf(code, gpa)
        if self.mismatch(asid, gfn, where.pfn):
            return Npf(code | ERR_P | ERR_RMP, gpa)
        page = self.head_of(where.pfn)
        if not page.validated:
            return Vc(gpa)
        return Done((SUCCESS, page.pagesize, page.perms[target], page.vmsa))
