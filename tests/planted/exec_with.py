"""`softcvm exec` with a defect in the model: python -m tests.planted.exec_with DEFECT PROGRAM [ARG ...]

A process of its own, so that the program under test is the binary as it is.  DEFECT may be "none".
"""

import sys

from softcvm.cli.main import main
from tests.planted.defects import DEFECTS
from tests.planted.plant import planted

if __name__ == "__main__":
    name = sys.argv[1]
    with planted(() if name == "none" else DEFECTS[name].edits):
        status = main(["exec", "--", *sys.argv[2:]])
    sys.exit(status)
