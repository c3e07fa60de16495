"""`python -m patchattn` is `patchattn`."""

from .cli import main

main()
