"""The command `peer-scale finetune` as launchers start it: as the module `peer_scale.finetune`."""

import sys

from peer_scale.commands.finetune import main

if __name__ == "__main__":
    sys.exit(main())
