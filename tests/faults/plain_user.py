"""
Runs a script as a plain user does, who cannot read every file, also where root runs the tests:

    python plain_user.py SCRIPT [FLAG ...]
"""

import ctypes
import os
import runpy
import sys


CAPABILITIES_VERSION_3 = 0x20080522  # linux/capability.h


def give_up_capabilities() -> None:
    """Of this process; root's are what opens files without permission. Only Linux has them."""
    if sys.platform != "linux":
        return
    header = (ctypes.c_uint32 * 2)(CAPABILITIES_VERSION_3, 0)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.capset(header, (ctypes.c_uint32 * 6)()):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


if __name__ == "__main__":
    give_up_capabilities()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
