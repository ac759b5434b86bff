"""What plans and results say, as tables for every medium: screens, model cards, pages and plain
text.
"""
