"""Operations under the models: one folder each, `reference.py` (plain torch) is the contract.

Faster implementations stand beside their reference and must agree with it; the choice between them is made in
the operation's ``__init__`` and nowhere else.
"""
