"""`python -m server` is `atelier serve`."""

import os
import sys

if __name__ == "__main__":
    os.environ.setdefault(
        "TRANSFORMERS_VERBOSITY", "error"
    )  # read at import; it complains of torchvision there
    from server.main import main

    sys.exit(main())
