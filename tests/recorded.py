"""The reference implementation's recorded rounds, asked of an engine again."""

from __future__ import annotations

from dspark_stream.engine.local import LocalEngine
from dspark_stream.engine.worker import EngineThread
from dspark_stream.types import GenerationRequest, RoundRecord, SamplingParams, TokensEvent


def run_cases(engine: EngineThread, cases: list[dict]) -> list[tuple[list[int], list[RoundRecord]]]:
    """Tokens and rounds of each case, all of them as one batch.

    Asked for a block more than was recorded: the recording runs one round more where its last one ends exactly at
    the limit, and a service does not.
    """
    requests = [
        GenerationRequest(
            request_id=str(i),
            prompt_ids=tuple(case["prompt"]),
            sampling=SamplingParams(max_tokens=len(case["output"]) + 8, temperature=0.0, ignore_eos=True),
            record_rounds=True,
        )
        for i, case in enumerate(cases)
    ]
    told: list[tuple[list[int], list[RoundRecord]]] = [([], []) for _ in cases]
    with LocalEngine(engine) as local:
        for event, _ in local.run(requests, streams=4):
            if isinstance(event, TokensEvent):
                ids, rounds = told[int(event.request_id)]
                ids += event.token_ids
                if event.round:
                    rounds.append(event.round)
    return told
