"""Measurements for people: loads against each other, charts, pages."""
