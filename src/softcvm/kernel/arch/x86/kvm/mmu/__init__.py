"""arch/x86/kvm/mmu: nested page faults and zaps."""
