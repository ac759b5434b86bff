"""`sleb apply --recover` and `--heal`: give back to the kept blocks what the removal of others took."""
