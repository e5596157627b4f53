"""`python -m renorm_lab` is `renorm`."""

import sys

if __name__ == "__main__":
    try:
        from .cli import main

        status = main()
    except KeyboardInterrupt:  # in the seconds of the imports
        status = 130
    sys.exit(status)
