"""Run `train` in the directory given; for launchers that would take `--run` as an option of their own."""

import sys

from grpo_lite.cli import main

if __name__ == "__main__":
    run, *arguments = sys.argv[1:]
    main(["train", *arguments, "--run", run])
