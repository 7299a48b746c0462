"""`compressvit tool curves`, as a file."""

from __future__ import annotations

import sys

from compressvit.programs.tools.curves import main

if __name__ == "__main__":
    sys.exit(main())
