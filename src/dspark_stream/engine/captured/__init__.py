"""The round as one captured graph: the same function runs eagerly on a CPU, where it is tested.

`state.py` is what a round reads and writes, `round.py` the round, `graphs.py` captures it for a ladder of sizes,
`runner.py` binds the engine's streams to it and reads results one round late (docs/gpu.md).
"""
