"""The command `peer-scale train` as launchers start it: by this file's path, or as the module `peer_scale.pretrain`."""

import sys
from pathlib import Path

if not __package__:  # run as a script: its folder must not be an import path, its project must be
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from peer_scale.commands.train import main

if __name__ == "__main__":
    sys.exit(main())
