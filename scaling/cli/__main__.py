"""``python -m scaling.cli``: the command line where the script is not on the path."""

from scaling.cli import main

main()
