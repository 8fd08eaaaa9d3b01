"""`python -m ssl_vit <command> [key=value ...]`, the same as `ssl-vit`."""

import ctypes
import sys


def main() -> int:
    """Run `ssl_vit.cli.main` and return its exit code, 130 after Ctrl-C at any time, even during its import."""
    try:
        from ssl_vit import cli

        code = cli.main()
    except KeyboardInterrupt:
        print("\nssl-vit: stopped", file=sys.stderr)
        code = 130
    if code == 130:
        # After an interrupt in code run from a string (a dataclass is), Python would end itself by the signal, caught
        # or not. It forgets the interrupt when the next string is run.
        ctypes.pythonapi.PyRun_SimpleString(b"")
    return code


if __name__ == "__main__":
    sys.exit(main())
