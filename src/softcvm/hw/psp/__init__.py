"""The AMD-SP: firmware that starts SNP, measures launches and takes pages in and out of use.

platform.py dispatches; each other file is one family of commands.  Every command checks in the
order of [ABI-56860] and of AMD's published firmware 1.55.25 [ASPFW]: reserved bits, platform
state, operand pages, guest state, activity, ownership.  docs/support.md lists the commands that
are not modelled.
"""
