"""One experiment per file: see the package above for how to add one."""
