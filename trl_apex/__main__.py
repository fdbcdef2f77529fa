"""`python -m trl_apex`, and so `accelerate launch -m trl_apex train ...`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
