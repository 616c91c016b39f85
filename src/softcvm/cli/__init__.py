"""The `softcvm` command: one module per sub-command, imported when it is chosen."""
