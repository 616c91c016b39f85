"""python -m softcvm: the command, where its script is not on the path."""

import sys

from softcvm.cli.main import main

sys.exit(main())
