"""What a relayed chunk and a request cost, beside a plain relay under the same load in the same run.

    python tests/bench/run.py                       the table, medians of five rounds
    python tests/bench/run.py --rounds 3 --only 64  fewer rounds, only the loads whose name contains "64"
    python tests/bench/run.py --beside FILE         an older lmarena_proxy.py as a third column
    python tests/bench/run.py --growth              how the cost of a chunk grows with the number of streams
    python tests/bench/run.py --start               from start to listening, with and without stored requests

Needs reference_relay.py and wire_bench.py in the directory given by --scripts or LMARENA_BENCH (else
../shared/bench beside the repository), and what they import:

    pip install fastapi 'uvicorn[standard]' websockets httptools uvloop

Only ratios mean anything: all programs share the machine with what drives them.
"""

import argparse
import importlib.util
import json
import os
import shutil
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
NEEDED = ("fastapi", "uvicorn", "websockets", "httptools", "uvloop")
STARTUP_SECONDS, ROUND_SECONDS = 30, 180

# The loads: name, and wire_bench's arguments.
LOADS = {
    "64 streams, 20 ms": "--streams 64 --chunks 100 --gap 0.02",
    "300 streams, 50 ms": "--streams 300 --chunks 60 --gap 0.05",
    "544 streams, 50 ms": "--streams 544 --chunks 60 --gap 0.05",
    "544 requests at once": "--streams 544 --chunks 1 --gap 0",
    "16 clients, one chunk": "--streams 16 --rounds 40 --chunks 1 --gap 0",
    "1 client, one chunk": "--streams 1 --rounds 200 --chunks 1 --gap 0",
}
# What is asked of a load: the measure, and the most it may be of the reference's.
TARGETS = [
    ("64 streams, 20 ms", "cpu_us_per_chunk", 1.0),
    ("300 streams, 50 ms", "cpu_us_per_chunk", 1.0),
    ("544 streams, 50 ms", "cpu_us_per_chunk", 1.0),
    ("544 streams, 50 ms", "chunk_latency_ms_p99", 0.5),
    ("544 streams, 50 ms", "rss_mb", 0.9),
    ("544 requests at once", "request_to_bridge_ms_p50", 2.0),
    ("16 clients, one chunk", "cpu_ms_per_request", 2.0),
    ("1 client, one chunk", "chunk_latency_ms_p50", 1.0),
]
GROWTH_STREAMS = (1, 10, 100, 300, 544, 1000)


@dataclass
class Relay:
    """A running program under test, and what was measured of it, by load."""

    name: str
    process: subprocess.Popen[bytes]
    kind: str
    api: int
    bridge: str
    results: dict[str, list[dict[str, float]]] = field(default_factory=dict)

    def measure(self, scripts: Path, load: str, arguments: str) -> None:
        command = [sys.executable, str(scripts / "wire_bench.py"), "--json", "--kind", self.kind]
        command += ["--pid", str(self.process.pid), "--api", str(self.api), "--ws", self.bridge]
        done = subprocess.run(
            [*command, *arguments.split()], capture_output=True, text=True, timeout=ROUND_SECONDS
        )
        if done.returncode:
            sys.exit(f"{self.name}, {load}: {done.stderr[-2000:]}")
        *remarks, line = done.stdout.splitlines()
        result = json.loads(line)
        if result["bad"] or remarks:
            print(f"{self.name}, {load}: {result['bad']} answers wrong {' '.join(remarks)}", flush=True)
        self.results.setdefault(load, []).append(result)

    def median(self, load: str, measure: str) -> float:
        return statistics.median(result[measure] for result in self.results[load])

    def wrong(self, load: str) -> int:
        return int(sum(result["bad"] for result in self.results[load]))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_listening(process: subprocess.Popen[bytes], port: int) -> None:
    gives_up_at = time.monotonic() + STARTUP_SECONDS
    while time.monotonic() < gives_up_at and process.poll() is None:
        with socket.socket() as probe:
            if not probe.connect_ex(("127.0.0.1", port)):
                return
        time.sleep(0.02)
    sys.exit(f"{process.args!r} does not listen at {port}.")


@contextmanager
def running(command: list[str], port: int, **options: object) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options)  # type: ignore[call-overload]
    try:
        wait_listening(process, port)
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()


@contextmanager
def this_program(name: str, file: Path, options: Sequence[str] = (), store: str = "state") -> Iterator[Relay]:
    """A lmarena_proxy.py in a directory of its own, with as many sessions as any load needs."""
    api, bridge = free_port(), free_port()
    with tempfile.TemporaryDirectory() as directory:
        shutil.copy(REPOSITORY / "models.json", directory)
        config = Path(directory, "config.toml")
        config.write_text(
            f"[server]\nport = {api}\n[bridge]\nport = {bridge}\n"
            f"[storage]\npath = {json.dumps(store)}\n"
            "[pool]\nsessions_per_model = 1100\n[limits]\nconnections = 2000\n[bootstrap]\nenabled = false\n"
        )
        command = [sys.executable, *options, str(file), "--config", str(config)]
        with running(command, api, cwd=directory) as process:
            yield Relay(name, process, "ours", api, f"ws://127.0.0.1:{bridge}/")


@contextmanager
def reference(scripts: Path) -> Iterator[Relay]:
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "reference_relay:app", "--port", str(port)]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    options = {"cwd": scripts, "env": environment}
    with running([*command, "--log-level", "warning"], port, **options) as process:
        yield Relay("reference", process, "json-chunks", port, f"ws://127.0.0.1:{port}/ws")


def fill_store(directory: Path, requests: int) -> None:
    """Give a store, which the program has made, so many requests."""
    columns = (
        "request_id, created_at, model, model_id, is_stream, status, outcome, attempts, queued_seconds, "
        "total_seconds, messages, answer"
    )
    texts = ("question " * 50, "answer " * 200)
    rows = ((f"req_{n}", time.time() - n, "m", "1", 1, 200, "stop", 1, 0, 1, *texts) for n in range(requests))
    with closing(sqlite3.connect(directory / "lmarena_proxy.sqlite3")) as connection, connection:
        places = ", ".join("?" * 12)
        connection.executemany(f"INSERT INTO requests ({columns}) VALUES ({places})", rows)


def print_starts(rounds: int, stored: int = 100_000) -> None:
    """Seconds from the start to listening: with an empty store and with a full one, in turn."""
    seconds: dict[int, list[float]] = {0: [], stored: []}
    with tempfile.TemporaryDirectory() as empty, tempfile.TemporaryDirectory() as full:
        for number in range(rounds + 1):
            for requests, directory in ((0, empty), (stored, full)):
                began_at = time.monotonic()
                with this_program("ours", REPOSITORY / "lmarena_proxy.py", store=directory):
                    if number:
                        seconds[requests].append(time.monotonic() - began_at)
            if not number:  # The first round has made the stores.
                fill_store(Path(full), stored)
    print("| stored requests | seconds to listening |\n| ---: | ---: |")
    for requests, values in seconds.items():
        print(f"| {requests:,} | {statistics.median(values):.2f} |")


def find_scripts(given: str | None) -> Path:
    place = Path(given or os.environ.get("LMARENA_BENCH") or REPOSITORY.parent / "shared" / "bench").resolve()
    missing = [name for name in ("reference_relay.py", "wire_bench.py") if not place.joinpath(name).is_file()]
    if missing:
        advice = "give their directory by --scripts or LMARENA_BENCH"
        sys.exit(f"No {' and no '.join(missing)} in {place}: {advice}.")
    if lacking := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        advice = "pip install fastapi 'uvicorn[standard]' websockets"
        sys.exit(f"This Python lacks {', '.join(lacking)}: {advice}")
    return place


def print_targets(ours: Relay, others: list[Relay], loads: set[str]) -> None:
    columns = [ours.name, *(other.name for other in others)]
    print(f"| load | measure | {' | '.join(columns)} | ours ÷ reference | at most |")
    print("| --- | --- |" + " ---: |" * (len(columns) + 2))
    for load, measure, limit in TARGETS:
        if load in loads:
            values = [relay.median(load, measure) for relay in (ours, *others)]
            ratio = values[0] / values[-1]
            cells = " | ".join(f"{value:.2f}" for value in values)
            mark = "" if ratio <= limit else " (missed)"
            print(f"| {load} | {measure} | {cells} | {ratio:.2f}{mark} | {limit:.1f} |")
    for relay in (ours, *others):
        print(f"Answers wrong, {relay.name}: {sum(relay.wrong(load) for load in loads)}")


def print_growth(ours: Relay, others: list[Relay]) -> None:
    print("| streams | program | CPU µs a chunk | chunks/s | p99 ms | memory MB | wrong |")
    print("| ---: | --- | ---: | ---: | ---: | ---: | ---: |")
    for load in ours.results:
        for relay in (ours, *others):
            measures = ("cpu_us_per_chunk", "chunks_per_s", "chunk_latency_ms_p99", "rss_mb")
            cells = " | ".join(f"{relay.median(load, measure):.1f}" for measure in measures)
            print(f"| {load} | {relay.name} | {cells} | {relay.wrong(load)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description="The cost of chunks and requests beside a plain relay's.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="only loads whose name contains this")
    parser.add_argument("--beside", type=Path, help="another lmarena_proxy.py to measure")
    parser.add_argument("--scripts", help="where reference_relay.py and wire_bench.py are")
    parser.add_argument("--growth", action="store_true", help="the cost by number of streams instead")
    parser.add_argument("--start", action="store_true", help="the time to listening instead")
    options = parser.parse_args()
    if options.start:
        print_starts(options.rounds)
        return
    scripts = find_scripts(options.scripts)
    loads = {name: arguments for name, arguments in LOADS.items() if options.only in name}
    if options.growth:
        loads = {str(count): f"--streams {count} --chunks 60 --gap 0.05" for count in GROWTH_STREAMS}
    with ExitStack() as stack:
        ours = stack.enter_context(this_program("ours", REPOSITORY / "lmarena_proxy.py"))
        others = []
        if options.beside:
            others.append(stack.enter_context(this_program("beside", options.beside.resolve())))
        others.append(stack.enter_context(reference(scripts)))
        for load, arguments in loads.items():
            for number in range(options.rounds):
                for relay in (ours, *others):
                    relay.measure(scripts, load, arguments)
                print(f"{load}: round {number + 1} of {options.rounds}", file=sys.stderr, flush=True)
        if options.growth:
            print_growth(ours, others)
        else:
            print_targets(ours, others, set(loads))


if __name__ == "__main__":
    main()
