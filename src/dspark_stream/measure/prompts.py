"""Prompts for commands that measure speed and were given none: four each of mathematics, code and chat."""

from __future__ import annotations

PROMPTS: tuple[tuple[str, str], ...] = (
    (
        "math",
        "A train leaves at 9:40 and arrives at 13:05. How long does the trip take, in minutes? Show the steps.",
    ),
    (
        "code",
        "Write a Python function that returns the n-th Fibonacci number without recursion, and explain it.",
    ),
    (
        "chat",
        "What should a beginner know before planting tomatoes on a balcony?",
    ),
    (
        "math",
        "A baker sells 48 rolls in the morning and twice as many in the afternoon. Each costs 0.75 "
        "dollars. How much money does he take?",
    ),
    (
        "code",
        "Write a function that counts how often each word appears in a text, ignoring case.",
    ),
    (
        "chat",
        "Explain to a ten-year-old why the moon seems to change its shape.",
    ),
    (
        "math",
        "The perimeter of a rectangle is 54 cm and it is twice as long as it is wide. What is its area?",
    ),
    (
        "code",
        "Write a Python class for a stack with push, pop and peek, and show how to use it.",
    ),
    (
        "chat",
        "Write a polite letter to a neighbour whose dog barks at night.",
    ),
    (
        "math",
        "Three friends share a bill of 87 dollars in the ratio 2:3:4. How much does each pay?",
    ),
    (
        "code",
        "Write a function that checks whether a string is a palindrome, with tests.",
    ),
    (
        "chat",
        "Give me a plan for a rainy Sunday with two children.",
    ),
)
"""(domain, a user's turn)."""
