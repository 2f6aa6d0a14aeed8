"""Drafters are made here: prompts → answers by the target → its hidden states → training → a drafter with its card.

`command` is `dspark-stream train`; `pipeline` is its stages in order; `loss` and `blocks` are what is learnt.
"""
