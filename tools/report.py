#!/usr/bin/env python
"""The command `peer-scale report`, from a checkout that need not be installed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from peer_scale.commands.report import main

if __name__ == "__main__":
    sys.exit(main())
