"""Skip blocks in memory, and score all candidates in one walk through the blocks."""
