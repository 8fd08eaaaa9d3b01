"""`python -m ssl_vit <command> [key=value ...]`, the same as `ssl-vit`."""

import sys

from ssl_vit.cli import main

if __name__ == "__main__":
    sys.exit(main())
