"""Silicon and firmware of an SEV-SNP host: memory, keys, the RMP, the instructions on it, the AMD-SP.

Knows nothing of Linux.  Sources: docs/sources.md.
"""
