"""A profile of the program under one load, driven as in run.py.

    python tests/bench/profile.py "--streams 64 --chunks 100 --gap 0.02" [--sort tottime] [--lines 40]

The figures are cProfile's, which makes calls dearer than they are: they say where to look, not what is saved.
"""

import argparse
import pstats
import signal
import sys
import tempfile
from pathlib import Path

from run import LOADS, REPOSITORY, find_scripts, this_program


def main() -> None:
    parser = argparse.ArgumentParser(description="Profile the program under a load.")
    parser.add_argument("load", help="wire_bench's arguments, or the name of one of run.py's loads")
    parser.add_argument("--program", type=Path, default=REPOSITORY / "lmarena_proxy.py")
    parser.add_argument("--scripts", help="where wire_bench.py is")
    parser.add_argument("--sort", default="tottime", help="pstats' order")
    parser.add_argument("--lines", type=int, default=40)
    options = parser.parse_args()
    scripts = find_scripts(options.scripts)
    with tempfile.TemporaryDirectory() as directory:
        result = Path(directory, "profile")
        profiler = ["-m", "cProfile", "-o", str(result)]
        with this_program("ours", options.program.resolve(), profiler) as relay:
            relay.measure(scripts, "warm-up", LOADS["16 clients, one chunk"])
            relay.measure(scripts, "load", LOADS.get(options.load, options.load))
            relay.process.send_signal(signal.SIGINT)
            relay.process.wait(30)
        pstats.Stats(str(result), stream=sys.stdout).sort_stats(options.sort).print_stats(options.lines)


if __name__ == "__main__":
    main()
