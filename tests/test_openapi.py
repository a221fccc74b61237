"""The document at /openapi.json, and schemathesis, which asks for all that is in it and much that is not."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import trio
from harness import CLAUDE, GPT, IMAGE, Rig, start

import lmarena_proxy

SCHEMATHESIS = Path(sys.executable).with_name("st")
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


async def ask_for_everything(rig: Rig, document: str, directory: Path, *phases: str) -> str:
    """Run schemathesis to its end, without a finding; returns what it told."""
    command = (
        *(str(SCHEMATHESIS), "run", document, "--url", rig.url, "--checks", CHECKS),
        *("--phases", ",".join(phases), "--max-examples", "25", "--seed", "1", "--no-color"),
    )
    with trio.fail_after(300):
        done = await trio.run_process(
            command, cwd=directory, capture_stdout=True, capture_stderr=True, check=False
        )
    told = (done.stdout + done.stderr).decode()
    assert done.returncode == 0, told[-6000:]
    assert rig.program.pool.violations() == []
    assert rig.program.answers.active == 0
    return told


async def test_nothing_the_document_allows_or_forbids_is_an_error_of_the_program(
    nursery: trio.Nursery, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE, GPT, IMAGE), filled=True)
    document: Any = (await rig.http.get("/openapi.json")).json()
    del document["paths"]["/api/events"]  # It does not end.
    (tmp_path / "openapi.json").write_text(json.dumps(document), encoding="utf-8")
    told = await ask_for_everything(rig, "openapi.json", tmp_path, "coverage", "fuzzing")
    assert f"{len(lmarena_proxy.OPERATIONS) - 1} selected" in told
    assert [record for record in caplog.records if record.exc_info] == []


async def test_requests_that_reach_the_site_are_answered_as_the_document_says(
    nursery: trio.Nursery, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rig = await start(nursery, tmp_path, models=(CLAUDE, GPT, IMAGE), filled=True)
    rig.program.media.site_origins.add(rig.arena_url)
    document: Any = (await rig.http.get("/openapi.json")).json()
    schemas = document["components"]["schemas"]
    for body, models in (("ChatBody", [CLAUDE, GPT]), ("ImageBody", [IMAGE])):
        schemas[body]["properties"] |= {"model": {"enum": models}, "n": {"enum": [None, 1, 2]}}
    wanted = {"role": {"enum": ["user", "system"]}, "content": {"type": "string", "minLength": 1}}
    schemas["ChatMessage"] = {"type": "object", "required": [*wanted], "properties": wanted}
    only = ("/v1/chat/completions", "/v1/images/generations", "/v1/models")
    document["paths"] = {path: document["paths"][path] for path in only}
    (tmp_path / "openapi.json").write_text(json.dumps(document), encoding="utf-8")
    before = len(rig.calls)
    await ask_for_everything(rig, "openapi.json", tmp_path, "fuzzing")
    assert len(rig.calls) > before
    assert rig.program.answers.completed > 0
    assert [record for record in caplog.records if record.exc_info] == []
