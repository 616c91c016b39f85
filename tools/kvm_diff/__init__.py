"""The model against a real /dev/kvm: random scripts of system calls, played on both.

    python -m tools.kvm_diff --calls 100000 --seed 1

A script is data: calls with symbolic handles for what earlier calls opened (script.py).  It is
written by a seeded generator that knows what is likely to succeed (generate.py), played on any
Sys (play.py): on the real kernel in a process of its own (real.py, host.py), on the model in
this one (model.py).  Results, errnos, signals, what the kernel wrote into arguments and the
contents of memory are compared after every call (compare.py); a difference is shrunk to the
shortest script that has it (shrink.py).

No guest ever runs: KVM_RUN is called only with an argument, which is refused.
"""
