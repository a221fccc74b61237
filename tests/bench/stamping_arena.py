"""The stand-in arena for browser.py: its answers say when each piece of them was sent.

A request whose text says `send 30 pieces, 0.1 s apart` gets so many, the first at once. Each piece carries
two times of the monotonic clock, in nanoseconds, which all processes of a machine share: when the call had
arrived with its whole body, and when this piece was handed to the server. All else is the stand-in's own.
"""

import random
import re
import sys
import time
from typing import Any

import trio

import demo.arena
from demo.contract import Call, Model, ending_lines, text_lines

ORDER = re.compile(r"send (\d+) pieces, ([\d.]+) s apart")


class StampingExchange(demo.arena.Exchange):
    def __init__(self, *arguments: Any) -> None:
        self.arrived_ns = time.monotonic_ns()
        super().__init__(*arguments)

    async def answer(self, call: Call, model: Model) -> None:
        order = ORDER.search(call.last_user_text)
        if order is None:
            await super().answer(call, model)
            return
        count, gap_seconds = int(order[1]), float(order[2])
        self.seen.status = 200
        head = [(b"content-type", b"text/plain; charset=utf-8"), (b"cache-control", b"no-cache")]
        await self.send({"type": "http.response.start", "status": 200, "headers": head})
        for number in range(count):
            if number:  # Not in step with the other streams: no site's answers are.
                await trio.sleep(gap_seconds * random.uniform(0.5, 1.5))
            await self.send_line(text_lines("a0", [f"<{self.arrived_ns} {time.monotonic_ns()}>"])[0])
        self.finish("complete")
        for line in ending_lines("a", "stop", {"promptTokens": 1, "completionTokens": count}):
            await self.send_line(line)
        await self.send({"type": "http.response.body", "body": b"", "more_body": False})

    async def send_line(self, line: str) -> None:
        await self.send({"type": "http.response.body", "body": line.encode(), "more_body": True})


def main() -> None:
    """`python tests/bench/stamping_arena.py PORT`, with the repository in PYTHONPATH."""
    demo.arena.Exchange = StampingExchange  # type: ignore[misc, assignment]
    trio.run(demo.arena.main, demo.arena.Arena(), "127.0.0.1", int(sys.argv[1]), True)


if __name__ == "__main__":
    main()
