"""Plans and results as tables for every medium: screens, model cards, pages and plain text."""
