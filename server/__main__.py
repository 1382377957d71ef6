"""`python -m server` is `atelier serve`."""

import os
import sys

from server.options import parse

if __name__ == "__main__":
    arguments = parse()
    os.environ.setdefault(
        "TRANSFORMERS_VERBOSITY", "error"
    )  # read at import; it complains of torchvision there
    from server.main import main

    sys.exit(main(arguments))
