"""`python -m server` is `atelier serve`."""

import sys

from server.main import main

sys.exit(main())
