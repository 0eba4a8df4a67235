"""`python -m engram.demo` is `engram demo`."""

import sys

from engram.cli import main

main(["demo", *sys.argv[1:]])
