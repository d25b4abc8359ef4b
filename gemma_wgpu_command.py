"""The start of the command `gemma-wgpu`.

It lies outside of the package, which takes a moment to import: Ctrl-C in that moment is to end the command as quietly
as later.
"""

import sys


def main() -> None:
    """Run the command line."""
    try:
        from gemma_wgpu.apps.cli import main as command
    except KeyboardInterrupt:
        sys.exit(130)
    command()
