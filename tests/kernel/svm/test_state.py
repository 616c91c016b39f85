"""What kvm_amd keeps joins snapshots and fingerprints."""

import struct
from typing import Any

from softcvm.abi.ghcb import (
    GHCB_SHARED_BUFFER,
    Ghcb,
    GhcbExit,
    gpa_request,
    psc_entry,
    valid_mask,
)
from softcvm.abi.insn import Load, Program, Store, Vmgexit, Wrmsr
from softcvm.abi.kvm import _generated_kvm as k
from softcvm.abi.svm import Msr
from softcvm.machine import Machine
from softcvm.sim.state import State, unlisted
from softcvm.sim.steps import run
from softcvm.uapi import dispatch

GPA = 0x1000


def _guest(_: int) -> Program:
    yield Wrmsr(Msr.SEV_ES_GHCB, gpa_request(GPA >> 12))
    yield Vmgexit()
    yield Wrmsr(Msr.SEV_ES_GHCB, GPA)
    request = Ghcb(
        sw_exit_code=GhcbExit.PSC,
        sw_scratch=GPA + GHCB_SHARED_BUFFER,
        valid_bitmap=valid_mask(
            "sw_exit_code", "sw_exit_info_1", "sw_exit_info_2", "sw_scratch"
        ).to_bytes(16, "little"),
    )
    entries = struct.pack("<HHIQQ", 0, 1, 0, psc_entry(2, 1), psc_entry(9, 1))
    request.data[GHCB_SHARED_BUFFER : GHCB_SHARED_BUFFER + len(entries)] = entries
    yield Store(GPA, bytes(request), c=False)
    yield Vmgexit()
    yield Load(GPA, 64, c=False)


def _in_a_page_state_change(boot: Any) -> Any:
    host = boot()
    host.guest(_guest)
    vm = host.vm()
    vm.launch(16)
    vm.exit_hypercalls()
    vm.attributes(1, 1, private=False)
    assert vm.run().exit_reason == k.KVM_EXIT_HYPERCALL
    return vm


def test_no_attribute_is_forgotten(boot: Any) -> None:
    vm = _in_a_page_state_change(boot)
    linux, vcpu = vm.host.linux, vm.kvm.vcpus[0]
    svm = vcpu.arch.svm
    parts: list[State] = [
        linux.snp,
        linux.snp.direct_map,
        linux.sev_dev,
        linux.kvm_x86_ops,
        linux.kvm_x86_ops.asids,
        vm.kvm.arch.sev,
        svm,
        svm.sev_es,
        svm.sev_es.ghcb,
        svm.sev_es.scratch,
        svm.sev_es.psc,
    ]
    assert {type(part).__name__: unlisted(part) for part in parts if unlisted(part)} == {}


def test_a_copy_in_the_middle_of_a_page_state_change_goes_on_as_the_original_does(
    boot: Any,
) -> None:
    vm = _in_a_page_state_change(boot)
    machine: Machine = vm.host.machine
    copy = machine.snapshot()
    before = machine.fingerprint()
    assert copy.fingerprint() == before
    vm.run()
    assert machine.fingerprint() != before
    assert copy.fingerprint() == before
    proc = copy.linux.processes[0]
    run(dispatch.sys_ioctl(proc, vm.vcpus[0], k.KVM_RUN, 0))
    assert copy.fingerprint() == machine.fingerprint()


def test_two_machines_that_did_the_same_are_equal(boot: Any) -> None:
    first, second = (_in_a_page_state_change(boot).host.machine for _ in range(2))
    assert first.fingerprint() == second.fingerprint()
