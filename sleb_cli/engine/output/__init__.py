"""What is handed over: checkpoints, GGUF files and exports, each proven before it is delivered."""
