"""How long a test waits for another process: only a hang takes this long, however busy the machine is."""

HANGS_AFTER = 600  # seconds
