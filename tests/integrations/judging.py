"""A step with a judge, in a process of its own that is killed at a scripted point.

`python -m tests.integrations.judging <root> <url> <point> <notes>`, with a point as in `tests.killed`.
"""

from __future__ import annotations

import sys
from typing import Any

import dagster_mao as mao
from tests.integrations.llm_server import KEY
from tests.judged import COMPLAINTS, desk, polite
from tests.killed import script

COUNT = 6
PIPELINE = desk(polite(model="judge-mini", concurrency=1))


def judge_them(root: str, url: str, pipeline: mao.Pipeline = PIPELINE, **settings: Any) -> mao.Result:
    llm = mao.LLM(base_url=url, api_key=KEY, input_price=2.0, output_price=10.0, **settings)
    return mao.run(pipeline, COMPLAINTS[:COUNT], store=mao.StateStore(root), workflow="monday", resources={"llm": llm})


if __name__ == "__main__":
    root, url, point, notes = sys.argv[1:]
    script(point, notes)
    judge_them(root, url)
